"""Proximal policy optimisation over :class:`lbgym.LoadBalanceVectorEnv`, in one file.

Schulman et al., "Proximal Policy Optimization Algorithms" (2017) and "High-Dimensional Continuous Control Using
Generalized Advantage Estimation" (2016). What is particular to load balancing:

* The network shares its parameters over the servers and is equivariant to their order, so one trained policy serves
  any number of servers and leaves inactive ones out.
* Load balancing never terminates: every episode ends by truncation, and the value of its last observation is
  bootstrapped.
* Arrivals do not depend on the actions, so several replicas live through the same flows and their mean advantage is
  subtracted: a baseline that removes the luck of the arrivals (Mao et al., "Variance Reduction for Reinforcement
  Learning in Input-Driven Environments", 2019).
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidOptionError, LbgymError, MissingExtraError

try:
    import torch
    from torch import Tensor, nn
except ModuleNotFoundError as error:
    raise MissingExtraError("torch", "train", "training with PPO") from error

from ..policies.action_kind import ActionKind
from ..policies.checkpoints import contents
from ..policies.inputs import Encoder
from ..policies.networks import ServerNetwork
from ..policies.neural import PPOPolicy
from .checkpoints import check_shapes, network_shapes
from .config import LIMIT, NOT_NEGATIVE, POSITIVE_LIMIT, SHARE, TrainingConfig, plain_config
from .loop import Trainer
from .runs import Budget, Callback, Progress, clone

ALGO = "ppo"
LOSSES = ("policy", "value", "entropy", "kl", "clipped")


@dataclass(kw_only=True)
class PPOConfig(TrainingConfig):
    """The configuration of PPO, for the action types "normalized" (continuous), "discrete" and "joint"."""

    total_steps: int | None = 1_500_000
    """environment steps, all replicas together; None: no limit"""
    replicas_per_seed: int = 4
    """replicas that see the same flows; their mean advantage is the baseline. 1: no such baseline"""

    learning_rate: float = 3e-3
    """step size of Adam"""
    anneal_lr: bool = True
    """let the step size fall linearly to zero over the budget"""
    gae_lambda: float = 0.95
    """lambda of the generalised advantage estimate"""
    epochs: int = 1
    """passes over the rollout per update; new steps are cheap enough to learn from each once"""
    minibatches: int = 4
    """minibatches per pass"""
    normalize_advantage: bool = True
    """scale the advantages of each minibatch to mean 0 and standard deviation 1"""
    clip: float = 0.2
    """the probability ratio is clipped to [1 - clip, 1 + clip]"""
    clip_value: bool = False
    """clip the change of the value, in standard deviations of the return, likewise"""
    entropy_coefficient: float = 0.0
    """weight of the entropy bonus"""
    value_coefficient: float = 0.5
    """weight of the value loss"""
    max_grad_norm: float = 0.5
    """gradients are scaled down to this norm"""
    target_kl: float | None = None
    """stop an update's passes once the mean KL divergence exceeds this"""

    memory: float = 0.9
    """share of the moving averages of the observations that a step keeps; 0: no memory"""
    hidden: int = 32
    """width of every layer"""
    log_std: float = -2.0
    """initial log standard deviation of continuous actions"""

    whole_numbers: ClassVar[dict[str, int]] = TrainingConfig.whole_numbers | {
        "replicas_per_seed": 1,
        "epochs": 1,
        "minibatches": 1,
    }
    numbers: ClassVar[dict[str, dict[str, Any]]] = TrainingConfig.numbers | {
        "gae_lambda": SHARE,
        "clip": LIMIT,
        "entropy_coefficient": {},
        "value_coefficient": NOT_NEGATIVE,
        "max_grad_norm": POSITIVE_LIMIT,
        "target_kl": LIMIT,
        "memory": SHARE,
        "log_std": {},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_envs % self.replicas_per_seed:
            raise LbgymError(
                f"PPOConfig.num_envs must be a multiple of replicas_per_seed={self.replicas_per_seed}, "
                f"got {self.num_envs}"
            )
        samples = self.num_envs * self.num_steps
        if samples < self.minibatches:
            raise LbgymError(
                f"PPOConfig.minibatches must be at most num_envs * num_steps = {samples}, got {self.minibatches}"
            )
        size = math.ceil(samples / self.minibatches)
        if self.normalize_advantage and 1 in (size, samples % size):
            # A single sample has no standard deviation.
            raise InvalidOptionError(
                f"PPOConfig.minibatches={self.minibatches} leaves a minibatch of one sample of num_envs * num_steps = "
                f"{self.num_envs} * {self.num_steps}: normalize_advantage needs at least 2"
            )


@dataclass(frozen=True)
class PPOResult:
    """A finished training run: the policy, the last checkpoint (None without ``out``) and the history of updates."""

    policy: PPOPolicy
    checkpoint: Path | None
    history: list[Progress]


def gae(
    rewards: Tensor, values: Tensor, next_values: Tensor, terminated: Tensor, ended: Tensor, gamma: float, lam: float
) -> Tensor:
    """Generalised advantage estimates [T, R].

    Args:
        rewards: of step t, [T, R].
        values: of the observation before step t, [T, R].
        next_values: of the observation after step t *before any reset*, [T, R].
        terminated: bool[T, R], the observation after step t has no future; truncation alone does not set it.
        ended: bool[T, R], the episode ended (either way) with step t, so that later steps say nothing about it.
        gamma: discount.
        lam: lambda.
    """
    delta = rewards + gamma * next_values * (~terminated) - values
    carry = gamma * lam * (~ended)
    advantages = torch.empty_like(delta)
    running = torch.zeros_like(delta[0])
    for t in reversed(range(len(delta))):
        running = delta[t] + carry[t] * running
        advantages[t] = running
    return advantages


# Training


def train_ppo(
    config: PPOConfig | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    resume_from: str | os.PathLike[str] | None = None,
    callback: Callback | None = None,
    tensorboard: bool = False,
) -> PPOResult:
    """Train a policy with PPO.

    Args:
        config: None: the defaults, or the checkpoint's with ``resume_from``.
        out: the checkpoint's file, ending in .pt, or a folder for ``ppo.pt``; always written whole or not at all. None:
            keep nothing.
        resume_from: a checkpoint to continue: parameters, optimiser, random states, step count and schedule. From a
            checkpoint at the end of an episode the run goes on bit for bit as if it had not been interrupted; from
            any other it first repeats the begun episode's flows from their start.
        callback: receives the progress after every update; returning True stops the training.
        tensorboard: log to a folder ``tensorboard`` beside the checkpoint.

    If it is interrupted or fails, the state after the last whole update is saved before the exception propagates.

    Raises:
        CheckpointError: if the checkpoint does not fit the environment.
        DivergedError: if the network is not finite any more; the state before that is saved.
        FileWriteError: if the checkpoint cannot be written.
        MissingExtraError: if TensorBoard is asked for and not installed.
    """
    state, checkpoint, history = _Trainer.train(config, out, resume_from, callback, tensorboard)
    return PPOResult(PPOPolicy(state), checkpoint, history)


class _Trainer(Trainer[PPOConfig]):
    """Rollouts of all replicas, and passes over each."""

    ALGO = ALGO
    CONFIG = PPOConfig

    def __init__(self, config: PPOConfig) -> None:
        super().__init__(config)
        observation = self.env.single_observation_space
        action = self.env.single_action_space
        self.num_servers = self.env.num_servers
        assert observation.shape is not None
        self.features = observation.shape[0] // self.num_servers - 1
        self.kind = ActionKind.of(action, self.num_servers)
        self.shapes = network_shapes(
            self.kind, self.num_servers, self.features, hidden=config.hidden, spaces=(observation, action)
        )
        self.encoder = Encoder(self.features, config.memory)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.network = ServerNetwork(
                self.encoder.size, config.hidden, self.kind.choices, config.log_std, self.kind.numbers
            )
        if self.kind.numbers > 1:
            with torch.no_grad():
                # "index" begins with next to no background load, which is -1, and room to both sides.
                self.network.head.bias[1] = -0.75
        self.optimiser = torch.optim.Adam(self.network.parameters(), lr=config.learning_rate, eps=1e-5, fused=True)
        self.generator = torch.Generator().manual_seed(config.seed)
        # Torch releases the interpreter lock, so two Python threads learn on two cores. Its own threads spin while they
        # wait for one another, which is very slow when another process holds a core.
        self.pool = ThreadPoolExecutor(2, "ppo", lambda: torch.set_num_threads(config.torch_threads))
        self.iteration = self.episode = 0

    def close(self) -> None:
        self.pool.shutdown()
        super().close()

    def state(self) -> dict[str, Any]:
        return contents(
            algo=ALGO,
            config=plain_config(self.config),
            env_kwargs=self.config.observation_kwargs(),
            shapes=self.shapes,
            network="actor-critic",
            arguments={
                "features": self.encoder.size,
                "hidden": self.config.hidden,
                "choices": self.kind.choices,
                "numbers": self.kind.numbers,
            },
            parameters=clone(self.network.state_dict()),
            memory=self.config.memory,
            step=self.budget.step,
            seconds=self.budget.seconds,
            trainer={
                "optimiser": clone(self.optimiser.state_dict()),
                "generator": self.generator.get_state(),
                "iteration": self.iteration,
                "episode": self.episode,
            },
        )

    def restore(self, saved: dict[str, Any], path: Path) -> None:
        check_shapes(saved, path, self.shapes, ("features", "choices", "joint", "numbers", "hidden"))
        trainer = saved["trainer"]
        self.network.load_state_dict(saved["network"]["parameters"])
        self.optimiser.load_state_dict(clone(trainer["optimiser"]))
        self.generator.set_state(trainer["generator"])
        self.iteration, self.episode = trainer["iteration"], trainer["episode"]
        self.budget = Budget(self.config, saved["step"], saved["seconds"])

    def begin(self) -> None:
        self.reset_env(None)

    def round(self) -> tuple[float, float, dict[str, float]]:
        if self.config.anneal_lr:
            for group in self.optimiser.param_groups:
                group["lr"] = self.config.learning_rate * (1.0 - self.budget.fraction)
        rollout = self.collect()
        losses = self.update(rollout)
        self.iteration += 1
        return float(rollout.rewards.mean()), rollout.fct_mean, losses

    def reset_env(self, mask: NDArray[np.bool_] | None) -> None:
        """Begin the episode numbered ``self.episode`` in the replicas of ``mask`` (None: in all)."""
        config = self.config
        sequence = np.random.SeedSequence([config.seed, self.episode])
        seeds = sequence.generate_state(config.num_envs // config.replicas_per_seed)
        repeated = [int(s) for s in np.repeat(seeds, config.replicas_per_seed)]
        if mask is None:
            self.encoder.reset()
        options = None if mask is None or mask.all() else {"reset_mask": mask}
        observation, _ = self.env.reset(seed=repeated, options=options)
        self.inputs, self.active = map(torch.from_numpy, self.encoder(observation, mask))

    @torch.no_grad()
    def collect(self) -> _Rollout:
        """Step every replica ``num_steps`` times with actions drawn from the policy."""
        config, net = self.config, self.network
        shape = (config.num_steps, config.num_envs)
        rollout = _Rollout(shape, self.num_servers, self.encoder.size, self.kind.numbers)
        fct_sum = ended_flows = 0.0
        for t in range(config.num_steps):
            out, value = net(net.scale(self.inputs, self.active), self.active)
            choice = net.sample(out, self.active, self.generator)
            rollout.inputs[t], rollout.active[t], rollout.choices[t] = self.inputs, self.active, choice
            rollout.log_probs[t] = net.log_prob(out, self.active, choice)[0]
            rollout.values[t] = net.denormalize(value)
            if t:
                rollout.next_values[t - 1] = rollout.values[t]
            observation, reward, terminated, truncated, info = self.env.step(self.kind.encode(choice.numpy()))
            self.inputs, self.active = map(torch.from_numpy, self.encoder(observation))
            rollout.rewards[t] = torch.from_numpy(np.asarray(reward, dtype=np.float32))
            rollout.terminated[t] = torch.from_numpy(terminated)
            ended = terminated | truncated
            rollout.ended[t] = torch.from_numpy(ended)
            flows = info["completed"] + info["rejected"]
            fct_sum += float((info["fct_mean"] * flows).sum())
            ended_flows += float(flows.sum())
            if ended.any():
                # Bootstrap the last observation of the episode, not the first of the next one.
                rollout.final_values[t] = net.value(self.inputs, self.active)
                self.episode += 1
                self.reset_env(ended)
        rollout.next_values[-1] = net.value(self.inputs, self.active)
        rollout.next_values = torch.where(rollout.ended, rollout.final_values, rollout.next_values)
        rollout.fct_mean = fct_sum / ended_flows if ended_flows else math.nan
        return rollout

    def update(self, rollout: _Rollout) -> dict[str, float]:
        """Improve the network on a rollout; returns the mean losses."""
        config, net = self.config, self.network
        advantages = gae(
            rollout.rewards,
            rollout.values,
            rollout.next_values,
            rollout.terminated,
            rollout.ended,
            config.gamma,
            config.gae_lambda,
        )
        returns = advantages + rollout.values
        residual = float((returns - rollout.values).var() / returns.var().clamp(min=1e-12))
        if config.replicas_per_seed > 1:
            groups = advantages.view(config.num_steps, -1, config.replicas_per_seed)
            advantages = (groups - groups.mean(-1, keepdim=True)).view_as(advantages)
        first = bool(net.moments.count == 0)
        net.returns.update(returns.reshape(-1, 1))
        if first:
            # Learn nothing before the scale of the features is known.
            net.moments.update(rollout.inputs[rollout.active])
            return dict.fromkeys(LOSSES, 0.0) | {"explained_variance": 1 - residual}

        inputs, active = rollout.inputs.flatten(0, 1), rollout.active.flatten(0, 1)
        samples = _Samples(
            net.scale(inputs, active),
            active,
            rollout.choices.flatten(0, 1),
            rollout.log_probs.flatten(),
            ((returns - net.returns.mean) / net.returns.std).flatten(),
            ((rollout.values - net.returns.mean) / net.returns.std).flatten(),
            advantages.flatten(),
        )
        size = math.ceil(len(inputs) / config.minibatches)
        parameters = list(net.parameters())
        sums = torch.zeros(5)
        batches = 0
        for _ in range(config.epochs):
            kl_of_epoch = 0.0
            for index in torch.randperm(len(inputs), generator=self.generator).split(size):
                batch = samples.at(index)
                if config.normalize_advantage:
                    batch.advantages = (batch.advantages - batch.advantages.mean()) / (batch.advantages.std() + 1e-8)
                # Always the same halves, added in the same order: results do not depend on the number of threads.
                halves = [batch.at(half) for half in torch.arange(len(index)).chunk(2)]
                done = list(self.pool.map(partial(self.gradients, total=len(index)), halves))
                for i, parameter in enumerate(parameters):
                    parameter.grad = sum(gradients[i] for gradients, _ in done)  # type: ignore[assignment]
                nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
                self.optimiser.step()
                of_batch = torch.stack([part for _, part in done]).sum(0)
                sums += of_batch
                batches += 1
                kl_of_epoch = float(of_batch[LOSSES.index("kl")])
            if config.target_kl is not None and kl_of_epoch > config.target_kl:
                break
        net.moments.update(rollout.inputs[rollout.active])
        losses = {name: float(x) for name, x in zip(LOSSES, sums / batches, strict=True)}
        return losses | {"explained_variance": 1 - residual}

    def gradients(self, part: _Samples, total: int) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return what part of a minibatch of ``total`` steps adds to the gradients and to ``LOSSES``."""
        config, net = self.config, self.network
        out, value = net(part.inputs, part.active)
        log_probs, entropy = net.log_prob(out, part.active, part.choices)
        log_ratio = log_probs - part.log_probs
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - config.clip, 1 + config.clip)
        policy_loss = -torch.minimum(part.advantages * ratio, part.advantages * clipped).sum() / total
        value_loss = (value - part.targets).square()
        if config.clip_value:
            near = part.values + (value - part.values).clamp(-config.clip, config.clip)
            value_loss = torch.maximum(value_loss, (near - part.targets).square())
        value_loss = 0.5 * value_loss.sum() / total
        entropy = entropy.sum() / total
        loss = policy_loss + config.value_coefficient * value_loss - config.entropy_coefficient * entropy
        gradients = torch.autograd.grad(loss, list(net.parameters()), materialize_grads=True)
        with torch.no_grad():
            # An estimate of the KL divergence that is never negative (Schulman, "Approximating KL Divergence")
            kl = (ratio - 1 - log_ratio).sum() / total
            share = ((ratio - 1).abs() > config.clip).float().sum() / total
            return gradients, torch.stack([policy_loss, value_loss, entropy, kl, share])


@dataclass
class _Samples:
    """Steps to learn from, [B, ...]: scaled inputs, choices, and what the losses compare them with."""

    inputs: Tensor
    active: Tensor
    choices: Tensor
    log_probs: Tensor
    targets: Tensor
    values: Tensor
    advantages: Tensor

    def at(self, index: Tensor) -> _Samples:
        """Select steps by index."""
        return _Samples(*(getattr(self, part.name)[index] for part in fields(self)))


class _Rollout:
    """Buffers of one rollout, [T, R, ...]."""

    def __init__(self, shape: tuple[int, int], num_servers: int, features: int, numbers: int) -> None:
        self.inputs = torch.empty(*shape, num_servers, features)
        self.active = torch.empty(*shape, num_servers, dtype=torch.bool)
        self.choices = torch.empty(*shape, num_servers, *((numbers,) if numbers > 1 else ()))
        self.log_probs = torch.empty(shape)
        self.values = torch.empty(shape)
        self.next_values = torch.empty(shape)
        self.final_values = torch.zeros(shape)
        self.rewards = torch.empty(shape)
        self.terminated = torch.empty(shape, dtype=torch.bool)
        self.ended = torch.empty(shape, dtype=torch.bool)
        self.fct_mean = math.nan
