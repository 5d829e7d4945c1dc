"""SAC-GRU: recurrent discrete soft actor-critic over :class:`lbgym.LoadBalanceVectorEnv`, in one file.

The algorithm that MARLLB proposes for one balancer ("Multi-Agent Reinforcement Learning for Network Load Balancing in
Data Center", Yao et al., CIKM 2022), with what is published on its parts:

* Discrete SAC (Christodoulou, arXiv:1910.07207, 2019): the actor minimises the expectation
  sum_a π(a) (α log π(a) - Q(a)) itself. With one drawn action in its place, Q(a) is a constant to the gradient, and the
  expected gradient does not depend on Q at all.
* The action of N servers with K levels each is factored: π(a|s) = prod_i π_i(a_i|s), and Q(s, a) is the mean over
  the active servers of q_i(s, a_i). A sum of one utility per component is value decomposition (Sunehag et al.,
  arXiv:1706.05296, 2017) applied to the branches of one action (Tavakoli et al., "Action Branching Architectures",
  2018); the mean keeps the scale whatever the number of servers. So the expectation over K^N actions is N
  expectations over K. The entropy is the mean over the servers likewise.
* The GRU of actor and critics sees the observations and the last actions, in the form of the weights in force. Replay
  is of sequences, whose first steps only warm up the recurrent state (Kapturowski et al., "Recurrent Experience Replay
  in Distributed Reinforcement Learning", 2019).

Load balancing never terminates: the value of an episode's last observation is bootstrapped.
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..errors import CheckpointError, LbgymError, MissingExtraError

try:
    import torch
    from torch import Tensor, nn
except ModuleNotFoundError as error:
    raise MissingExtraError("torch", "train", "training with SAC-GRU") from error

from ..policies.action_kind import ActionKind
from ..policies.checkpoints import contents, read_checkpoint
from ..policies.inputs import server_inputs
from ..policies.networks import Moments, RecurrentActor, RecurrentNetwork, draw
from ..policies.neural import SACGRUPolicy
from .config import TrainingConfig, plain_config, saved_config
from .runs import (
    Progress,
    clone,
    log,
    output_file,
    summary_writer,
    torch_threads,
    write_whole,
)

ALGO = "sac-gru"
CHECKPOINT_NAME = "sac-gru.pt"
LOSSES = ("policy", "value", "entropy", "temperature", "q")


@dataclass(kw_only=True)
class SACGRUConfig(TrainingConfig):
    """What to train on and how. Values named "MARLLB" are those of its paper's moderate testbed."""

    action_type: str = "discrete"
    """"discrete" or "joint"; see ``LoadBalanceEnv``"""
    action_weights: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0)
    """levels to choose each server's weight from. MARLLB's 1 to 2 in steps of 0.2 are for servers whose speeds differ
    twofold"""
    max_steps: int = 240
    """steps of an episode; MARLLB: 60 s of 0.25 s each"""

    total_steps: int | None = 300_000
    """environment steps, all replicas together; None: no limit"""
    num_envs: int = 64
    """replicas; each lives through flows of its own"""
    num_steps: int = 8
    """steps of every replica between two rounds of updates"""

    learning_rate: float = 1e-3
    """step size of Adam for actor and critics; MARLLB: 1e-3"""
    temperature_rate: float = 1e-2
    """step size of Adam for the logarithm of the temperature"""
    tau: float = 0.01
    """share of the critics that their targets take over per update"""
    updates: int = 4
    """updates after every ``num_steps`` steps"""
    batch_size: int = 24
    """sequences per update; MARLLB: 12 whole episodes"""
    sequence_length: int = 16
    """steps of a sequence that are learnt from"""
    burn_in: int = 8
    """steps before those, which only warm up the recurrent state"""
    replay: int = 3000
    """episodes kept at most, the newest; MARLLB: 3000"""
    warmup: int = 25
    """episodes' worth of steps before the first update; MARLLB: 25"""
    target_entropy: float = 0.3
    """entropy per server that the temperature is steered to, as a share of log K, that of a uniform choice. MARLLB's
    -\\|A\\| is below any entropy of a discrete choice and would let the temperature vanish"""
    initial_temperature: float = 0.5
    """α at the start, in standard deviations of the reward"""
    max_grad_norm: float = 5.0
    """gradients of the actor and of the critics are scaled down to this norm"""
    hidden: int = 64
    """width of every layer and of the recurrent state. MARLLB: 128, for all servers at once; here the parameters are
    those of one server"""

    whole_numbers: ClassVar[dict[str, int]] = TrainingConfig.whole_numbers | {
        "updates": 1,
        "batch_size": 1,
        "sequence_length": 1,
        "burn_in": 0,
        "warmup": 0,
    }

    def __post_init__(self) -> None:
        self.action_weights = tuple(float(w) for w in self.action_weights)
        super().__post_init__()
        action_type = self.observation_kwargs()["action_type"]
        if action_type not in ("discrete", "joint"):
            raise LbgymError(
                f'SAC-GRU chooses among levels: use action_type="discrete" or "joint" instead of {action_type!r}'
            )
        if self.sequence_length > self.max_steps:
            raise LbgymError(
                f"SACGRUConfig.sequence_length must be at most max_steps={self.max_steps}, got {self.sequence_length}"
            )
        if self.replay < 2 * self.num_envs:
            raise LbgymError(
                f"SACGRUConfig.replay must be at least 2 * num_envs = {2 * self.num_envs} episodes, got {self.replay}"
            )

    def observation_kwargs(self) -> dict[str, Any]:
        """The environment keys that a policy's observations and actions depend on."""
        return {"action_weights": self.action_weights} | super().observation_kwargs()


@dataclass(frozen=True)
class SACGRUResult:
    """A finished training run: the policy, the last checkpoint (None without ``out``) and the history of updates."""

    policy: SACGRUPolicy
    checkpoint: Path | None
    history: list[Progress]


# The agent


class Agent(RecurrentActor):
    """Actor, twin critics and their targets, temperature, and the scales of inputs and rewards."""

    def __init__(self, features: int, hidden: int, choices: int, temperature: float = 1.0) -> None:
        super().__init__(features, hidden, choices)
        self.rewards = Moments(1)
        self.critics = nn.ModuleList(RecurrentNetwork(features, hidden, choices) for _ in range(2))
        self.targets = copy.deepcopy(self.critics).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(temperature)))


def mean_where(x: Tensor, active: Tensor) -> Tensor:
    """Mean [...] of x [..., N] over the active servers."""
    return (x * active).sum(-1) / active.sum(-1).clamp(min=1)


def actor_loss(logits: Tensor, q: Tensor, alpha: Tensor | float, active: Tensor) -> Tensor:
    """sum_a π_i(a) (α log π_i(a) - q_i(a)), averaged over the active servers and the batch.

    Args:
        logits: of every server's levels, [..., N, K].
        q: utilities of the same, [..., N, K]; constants to the gradient.
        alpha: the temperature.
        active: bool[..., N].
    """
    log_p = logits.log_softmax(-1)
    return mean_where((log_p.exp() * (alpha * log_p - q.detach())).sum(-1), active).mean()


def soft_value(logits: Tensor, q: Tensor, alpha: Tensor | float, active: Tensor) -> Tensor:
    """The value [...] of a state: the mean over the active servers of sum_a π_i(a) (q_i(a) - α log π_i(a))."""
    log_p = logits.log_softmax(-1)
    return mean_where((log_p.exp() * (q - alpha * log_p)).sum(-1), active)


def action_value(q: Tensor, choices: Tensor, active: Tensor) -> Tensor:
    """Q [...] of choices [..., N]: the mean over the active servers of their utilities q [..., N, K]."""
    return mean_where(q.gather(-1, choices.unsqueeze(-1)).squeeze(-1), active)


@dataclass(frozen=True)
class Batch:
    """Sequences of T = burn-in + length steps, with the observation after the last.

    ``inputs`` [B, T + 1, N, F], ``active`` [B, T + 1, N]; of the last ``length`` steps: ``choices`` [B, L, N] and
    ``rewards`` [B, L]. ``first`` bool[B]: those steps begin an episode, and what stands for the burn-in means nothing.
    """

    inputs: Tensor
    active: Tensor
    choices: Tensor
    rewards: Tensor
    first: Tensor


class Replay:
    """Episodes of all replicas, the newest overwriting the oldest; memory is taken as they are written."""

    def __init__(self, episodes: int, steps: int, num_envs: int, num_servers: int, features: int) -> None:
        self.num_envs = num_envs
        self.episodes = episodes // num_envs * num_envs
        self.inputs = torch.empty(self.episodes, steps + 1, num_servers, features)
        self.active = torch.empty(self.episodes, steps + 1, num_servers, dtype=torch.bool)
        self.choices = torch.empty(self.episodes, steps, num_servers, dtype=torch.uint8)
        self.rewards = torch.empty(self.episodes, steps)
        #: Steps of each episode that are there.
        self.filled = torch.zeros(self.episodes, dtype=torch.int64)
        self._rows = slice(0, 0)
        self._step = 0

    def begin(self, inputs: Tensor, active: Tensor) -> None:
        """Begin an episode of every replica, with its first observation."""
        start = self._rows.stop % self.episodes
        self._rows, self._step = slice(start, start + self.num_envs), 0
        self.inputs[self._rows, 0], self.active[self._rows, 0] = inputs, active
        self.filled[self._rows] = 0

    def add(self, choices: Tensor, rewards: Tensor, inputs: Tensor, active: Tensor) -> None:
        """A step of every replica, and the observation after it."""
        rows, t = self._rows, self._step
        self.choices[rows, t], self.rewards[rows, t] = choices.to(torch.uint8), rewards
        self.inputs[rows, t + 1], self.active[rows, t + 1] = inputs, active
        self._step = t + 1
        self.filled[rows] = self._step

    def sample(self, batch_size: int, length: int, burn_in: int, generator: torch.Generator) -> Batch:
        """Sequences drawn with equal chances from all there are, none across an episode's end.

        One that would begin within the first ``burn_in`` steps begins at the first, where the state is known.
        """
        starts = (self.filled - length + 1).clamp(min=0)
        row = torch.multinomial(starts.double(), batch_size, replacement=True, generator=generator)
        start = (torch.rand(batch_size, generator=generator) * starts[row]).long()
        start[start < burn_in] = 0
        steps = start[:, None] + torch.arange(-burn_in, length + 1)
        rows, seen, learnt = row[:, None], steps.clamp(min=0), steps[:, burn_in:-1]
        return Batch(
            self.inputs[rows, seen],
            self.active[rows, seen],
            self.choices[rows, learnt].long(),
            self.rewards[rows, learnt],
            start == 0,
        )


# Training


def train_sac_gru(
    config: SACGRUConfig | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    resume_from: str | os.PathLike[str] | None = None,
    callback: Callable[[Progress], bool | None] | None = None,
    tensorboard: bool = False,
) -> SACGRUResult:
    """Train a policy with SAC-GRU.

    Args:
        config: None: the defaults, or the checkpoint's with ``resume_from``.
        out: the checkpoint's file, ending in .pt, or a folder for ``sac-gru.pt``; always written whole or not at all.
            None: keep nothing.
        resume_from: a checkpoint to continue: parameters, optimisers, random state and step count. The replay is not in
            the file; ``warmup`` episodes are played with the trained policy before the updates go on.
        callback: told the progress after every round of updates; returning True stops the training.
        tensorboard: log to a folder ``tensorboard`` beside the checkpoint.

    On KeyboardInterrupt the state after the last whole round is saved before the exception goes on.

    Raises:
        CheckpointError: if the checkpoint does not fit the environment.
        MissingExtraError: if TensorBoard is asked for and not installed.
    """
    saved = None
    if resume_from is not None:
        saved = read_checkpoint(resume_from, ALGO)
        config = config or SACGRUConfig(**saved_config(saved["config"], resume_from))
    config = config or SACGRUConfig()
    checkpoint = output_file(out, CHECKPOINT_NAME)
    logs = checkpoint.parent / "tensorboard" if checkpoint is not None and tensorboard else None
    with torch_threads(config.torch_threads), summary_writer(logs) as writer:
        trainer = _Trainer(config)
        try:
            if saved is not None:
                trainer.restore(saved, Path(resume_from or ""))
            return trainer.run(checkpoint, callback, writer)
        finally:
            trainer.env.close()


class _Trainer:
    """The state of a run and the loop over it."""

    def __init__(self, config: SACGRUConfig) -> None:
        self.config = config
        self.env = config.make_env()
        observation = self.env.single_observation_space
        action = self.env.single_action_space
        self.num_servers = self.env.num_servers
        assert observation.shape is not None
        self.features = observation.shape[0] // self.num_servers - 1
        self.kind = ActionKind.of(action, self.num_servers)
        self.shapes = {
            "features": self.features,
            "choices": self.kind.choices,
            "joint": self.kind.joint,
            "hidden": config.hidden,
            "num_servers": self.num_servers,
            "observation": str(observation),
            "action": str(action),
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.agent = Agent(self.features + 1, config.hidden, self.kind.choices, config.initial_temperature)
        rate = config.learning_rate
        self.optimisers = {
            "actor": torch.optim.Adam(self.agent.actor.parameters(), lr=rate, eps=1e-5),
            "critics": torch.optim.Adam(self.agent.critics.parameters(), lr=rate, eps=1e-5),
            "temperature": torch.optim.Adam([self.agent.log_alpha], lr=config.temperature_rate),
        }
        self.generator = torch.Generator().manual_seed(config.seed)
        self.replay = Replay(config.replay, config.max_steps, config.num_envs, self.num_servers, self.features + 1)
        self.step = self.episode = 0
        self.seconds = 0.0

    def state(self) -> dict[str, Any]:
        """Everything a checkpoint holds, as copies."""
        parameters = clone(self.agent.state_dict())
        acting = {name: value for name, value in parameters.items() if name.startswith(("actor.", "moments."))}
        return contents(
            algo=ALGO,
            config=plain_config(self.config),
            env_kwargs=self.config.observation_kwargs(),
            shapes=self.shapes,
            network="recurrent",
            arguments={"features": self.features + 1, "hidden": self.config.hidden, "choices": self.kind.choices},
            parameters=acting,
            sees_weights=True,
            step=self.step,
            seconds=self.seconds,
            trainer={
                "agent": {name: value for name, value in parameters.items() if name not in acting},
                "optimisers": {name: clone(optimiser.state_dict()) for name, optimiser in self.optimisers.items()},
                "generator": self.generator.get_state(),
                "episode": self.episode,
            },
        )

    def restore(self, saved: dict[str, Any], path: Path) -> None:
        for key in ("features", "choices", "joint", "hidden"):
            if saved["shapes"][key] != self.shapes[key]:
                raise CheckpointError(
                    f"checkpoint {path} has {key}={saved['shapes'][key]} ({saved['shapes']['observation']} -> "
                    f"{saved['shapes']['action']}), but the environment to train on needs {key}={self.shapes[key]} "
                    f"({self.shapes['observation']} -> {self.shapes['action']})"
                )
        trainer = saved["trainer"]
        self.agent.load_state_dict(saved["network"]["parameters"] | trainer["agent"])
        for name, optimiser in self.optimisers.items():
            optimiser.load_state_dict(clone(trainer["optimisers"][name]))
        self.generator.set_state(trainer["generator"])
        self.step, self.episode, self.seconds = saved["step"], trainer["episode"], saved["seconds"]

    def fraction(self) -> float:
        """Share of the budget that is used."""
        config = self.config
        by_steps = self.step / config.total_steps if config.total_steps is not None else 0.0
        by_time = self.seconds / config.seconds if config.seconds is not None else 0.0
        return min(1.0, max(by_steps, by_time))

    def run(
        self, checkpoint: Path | None, callback: Callable[[Progress], bool | None] | None, writer: Any
    ) -> SACGRUResult:
        config = self.config
        self.env.reset(seed=config.seed)
        self.env.step(self.env.action_space.sample())  # compiles the simulator outside the time budget
        self.begin_episode()
        history: list[Progress] = []
        state = self.state()
        started, written = time.perf_counter() - self.seconds, time.perf_counter()
        try:
            while self.fraction() < 1.0:
                begun = self.seconds
                reward, fct_mean = self.collect()
                losses = self.improve()
                self.step += config.num_envs * config.num_steps
                self.seconds = time.perf_counter() - started
                progress = Progress(
                    step=self.step,
                    seconds=self.seconds,
                    fraction=self.fraction(),
                    steps_per_second=config.num_envs * config.num_steps / (self.seconds - begun),
                    reward=reward,
                    fct_mean=fct_mean,
                    losses=losses,
                )
                history.append(progress)
                state = self.state()
                if writer is not None:
                    log(writer, progress)
                if checkpoint is not None and time.perf_counter() - written >= config.checkpoint_every:
                    write_whole(checkpoint, partial(torch.save, state))
                    written = time.perf_counter()
                if callback is not None and callback(progress):
                    break
        except KeyboardInterrupt:
            # a round may be half done: keep the state after the last whole one
            if checkpoint is not None:
                write_whole(checkpoint, partial(torch.save, state))
            raise
        if checkpoint is not None:
            write_whole(checkpoint, partial(torch.save, state))
        return SACGRUResult(SACGRUPolicy(state), checkpoint, history)

    def begin_episode(self) -> None:
        """Begin the next episode in all replicas; they have no reason to end at different steps."""
        seeds = np.random.SeedSequence([self.config.seed, self.episode]).generate_state(self.config.num_envs)
        self.episode += 1
        observation, info = self.env.reset(seed=[int(s) for s in seeds])
        self.inputs, self.active = server_inputs(observation, info["weights"], self.features)
        self.memory: Tensor | None = None
        self.replay.begin(self.inputs, self.active)

    @torch.no_grad()
    def collect(self) -> tuple[float, float]:
        """Step every replica ``num_steps`` times with actions drawn from the policy; mean reward and mean FCT."""
        config = self.config
        reward_sum = fct_sum = ended_flows = 0.0
        for _ in range(config.num_steps):
            logits, self.memory = self.agent.logits(self.inputs, self.active, self.memory)
            choices = draw(logits, self.active, self.generator)
            observation, reward, _, truncated, info = self.env.step(self.kind.encode(choices.numpy()))
            self.inputs, self.active = server_inputs(observation, info["weights"], self.features)
            rewards = torch.from_numpy(np.asarray(reward, dtype=np.float32))
            self.replay.add(choices, rewards, self.inputs, self.active)
            reward_sum += float(rewards.mean())
            flows = info["completed"] + info["rejected"]
            fct_sum += float(np.where(flows > 0, info["fct_mean"] * flows, 0.0).sum())
            ended_flows += float(flows.sum())
            if truncated.any():
                self.begin_episode()
        return reward_sum / config.num_steps, fct_sum / ended_flows if ended_flows else math.nan

    def improve(self) -> dict[str, float]:
        """A round of updates, once there is enough to learn from; returns the mean losses."""
        config, replay, agent = self.config, self.replay, self.agent
        steps = int(replay.filled.sum())
        if steps < config.warmup * config.max_steps or not bool((replay.filled >= config.sequence_length).any()):
            return dict.fromkeys(LOSSES, 0.0)
        if agent.moments.count == 0:
            # scales are kept from here on: values learnt on one scale are wrong on another
            for row in torch.nonzero(replay.filled).flatten().tolist():
                seen = slice(0, int(replay.filled[row]))
                agent.moments.update(replay.inputs[row, seen][replay.active[row, seen]])
                agent.rewards.update(replay.rewards[row, seen, None])
        sums = torch.zeros(len(LOSSES))
        for _ in range(config.updates):
            batch = replay.sample(config.batch_size, config.sequence_length, config.burn_in, self.generator)
            sums += self.update(batch)
        return {name: float(x) for name, x in zip(LOSSES, sums / config.updates, strict=True)}

    def update(self, batch: Batch) -> Tensor:
        """One step of critics, actor and temperature, in the order of ``LOSSES``."""
        config, agent = self.config, self.agent
        scaled = agent.moments.scale(batch.inputs, batch.active)
        warm, learnt = slice(0, config.burn_in), slice(config.burn_in, None)
        active = batch.active[:, learnt]

        def unroll(network: Any) -> Tensor:
            """Outputs [B, L + 1, N, K] after the burn-in."""
            state = None
            if config.burn_in:
                with torch.no_grad():
                    state = network.remember(scaled[:, warm], batch.active[:, warm])[1]
                state = state * ~batch.first[:, None, None]
            return network.forward_sequence(scaled[:, learnt], active, state)[0]

        alpha = agent.log_alpha.detach().exp()
        logits = unroll(agent.actor)
        with torch.no_grad():
            values = [soft_value(logits[:, 1:], unroll(q)[:, 1:], alpha, active[:, 1:]) for q in agent.targets]
            rewards = (batch.rewards - agent.rewards.mean) / agent.rewards.std
            target = rewards + config.gamma * torch.minimum(*values)
        utilities = [unroll(q)[:, :-1] for q in agent.critics]
        now = active[:, :-1]
        value_loss = torch.stack(
            [(action_value(q, batch.choices, now) - target).square().mean() for q in utilities]
        ).sum()
        self._descend("critics", value_loss, agent.critics)

        smaller = torch.minimum(*(q.detach() for q in utilities))
        policy_loss = actor_loss(logits[:, :-1], smaller, alpha, now)
        self._descend("actor", policy_loss, agent.actor)

        with torch.no_grad():
            log_p = logits[:, :-1].log_softmax(-1)
            entropy = mean_where(-(log_p.exp() * log_p).sum(-1), now).mean()
        wanted = config.target_entropy * math.log(self.kind.choices)
        self._descend("temperature", agent.log_alpha * (entropy - wanted), None)
        with torch.no_grad():
            for slow, fast in zip(agent.targets.parameters(), agent.critics.parameters(), strict=True):
                slow.lerp_(fast, config.tau)
        return torch.stack([policy_loss.detach(), value_loss.detach() / 2, entropy, alpha, target.mean()])

    def _descend(self, name: str, loss: Tensor, clipped: nn.Module | None) -> None:
        self.optimisers[name].zero_grad()
        loss.backward()
        if clipped is not None:
            nn.utils.clip_grad_norm_(clipped.parameters(), self.config.max_grad_norm)
        self.optimisers[name].step()


# Checkpoints


def config_of(path: str | os.PathLike[str]) -> SACGRUConfig:
    """The configuration that a checkpoint was trained with.

    Raises:
        CheckpointError: if the file is none of this recipe, or the configuration had a part with no plain form.
    """
    return SACGRUConfig(**saved_config(read_checkpoint(path, ALGO)["config"], path))
