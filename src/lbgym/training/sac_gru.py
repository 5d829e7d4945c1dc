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
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from gymnasium import Env, Space
from gymnasium.vector import AutoresetMode, VectorEnv
from numpy.typing import NDArray

from ..atomic import check_writable
from ..checks import items, number
from ..env.observations import ObservationLayout
from ..errors import CheckpointError, InvalidOptionError, LbgymError, MissingExtraError

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
from .checkpoints import check_shapes, network_shapes
from .config import NOT_NEGATIVE, POSITIVE, POSITIVE_LIMIT, SHARE, TrainingConfig, current_fields, plain_config
from .env_interface import EnvInterface
from .loop import Trainer
from .replay import Batch, Replay
from .runs import Budget, Callback, Progress, clone, write_torch

ALGO = "sac-gru"
LOSSES = ("policy", "value", "entropy", "temperature", "q")
#: Keys that an agent takes from its environment.
_OF_THE_ENVIRONMENT = (
    "action_type", "action_weights", "observation", "normalize", "use_ground_truth", "observe_weights", "step_interval",
    "relative_to_configured",
)  # fmt: skip


@dataclass(kw_only=True)
class SACGRUConfig(TrainingConfig):
    """The configuration of SAC-GRU. Values named "MARLLB" are those of its paper's moderate testbed."""

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
        "replay": 1,
        "warmup": 0,
    }
    numbers: ClassVar[dict[str, dict[str, Any]]] = TrainingConfig.numbers | {
        "temperature_rate": NOT_NEGATIVE,
        "tau": SHARE,
        "target_entropy": {},
        "initial_temperature": POSITIVE,
        "max_grad_norm": POSITIVE_LIMIT,
    }

    def __post_init__(self) -> None:
        name = "SACGRUConfig.action_weights"
        self.action_weights = tuple(number(f"each of {name}", w) for w in items(name, self.action_weights))
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


# The networks and their losses


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


# The agent


class SACGRUAgent:
    """SAC-GRU as an agent for a loop of the user's own, over one environment or a vector of them::

        agent = SACGRUAgent(env)
        observation, info = env.reset(seed=0)
        for _ in range(20_000):
            action = agent.get_action(observation)
            following, reward, terminated, truncated, info = env.step(action)
            agent.store_transition(observation, action, reward, following, terminated | truncated)
            agent.update()
            observation = following
            if terminated or truncated:
                observation, info = env.reset()

    It takes any observation layout and the action types "discrete" and "joint". It remembers the episodes under way,
    and a transition that is done ends one. A vector environment may reset itself: in SAME_STEP mode the agent takes
    the last observation of an episode from the info, and in NEXT_STEP mode it does not store the step that resets.
    :func:`train_sac_gru` is a loop over this class.

    Args:
        env: a :class:`~lbgym.LoadBalanceEnv` or a :class:`~lbgym.LoadBalanceVectorEnv`, wrapped or not; or the pair of
            spaces (observation, action) of one environment, such as those of one agent of
            :class:`~lbgym.MultiLoadBalanceEnv`.
        config: None: the defaults. Its keys of the environment give way to those of ``env``; its budget has no effect.
        changes: fields of the configuration over ``config``. With spaces, ``action_weights`` is the environment's.

    Attributes:
        config: the configuration in use.
        step: transitions stored, over all replicas.

    Raises:
        UnsupportedSpaceError: for an environment that the agent cannot act in.
        LbgymError: for an invalid configuration.
    """

    def __init__(
        self,
        env: Env[Any, Any] | VectorEnv[Any, Any, Any] | tuple[Space[Any], Space[Any]],
        config: SACGRUConfig | None = None,
        **changes: Any,
    ) -> None:
        base = config or SACGRUConfig()
        self.interface = interface = EnvInterface.of(env, changes.get("action_weights", base.action_weights))
        layout = interface.layout
        self.num_envs, self.num_servers = interface.num_envs or 1, layout.num_servers
        given = changes.get("env_kwargs", base.env_kwargs)
        found: dict[str, Any] = {
            "num_servers": self.num_servers,
            "num_envs": self.num_envs,
            "action_type": interface.action_type,
            "action_weights": interface.levels,
            "observe_weights": layout.observe_weights or changes.get("observe_weights", base.observe_weights),
            "env_kwargs": {key: value for key, value in given.items() if key not in _OF_THE_ENVIRONMENT},
        }
        if interface.max_steps is not None:
            # A row of the replay; longer episodes are cut into pieces.
            found["max_steps"] = min(interface.max_steps, changes.get("max_steps", base.max_steps))
        self.config = config = replace(base, **changes | found)
        #: Keys of the environments that the trained policy acts in.
        self.env_kwargs = config.observation_kwargs() | {"normalize": layout.normalize}
        if layout.use_ground_truth:
            self.env_kwargs["use_ground_truth"] = True
        if interface.codec.needs_configured:
            self.env_kwargs["relative_to_configured"] = True
        if interface.step_interval is not None:
            self.env_kwargs["step_interval"] = interface.step_interval
        # The weights in force, where the environment does not show them.
        self._adds_weights = config.observe_weights and not layout.observe_weights
        self.features = len(layout.columns) + self._adds_weights
        space = interface.codec.space
        self.kind = ActionKind.of(space, self.num_servers)
        flat = ObservationLayout(
            self.num_servers,
            "flat",
            normalize=layout.normalize,
            use_ground_truth=layout.use_ground_truth,
            observe_weights=config.observe_weights,
        )
        self.shapes = network_shapes(
            self.kind, self.num_servers, self.features, hidden=config.hidden, spaces=(flat.space, space)
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.networks = Agent(self.features, config.hidden, self.kind.choices, config.initial_temperature)
        rate = config.learning_rate
        self.optimisers = {
            "actor": torch.optim.Adam(self.networks.actor.parameters(), lr=rate, eps=1e-5),
            "critics": torch.optim.Adam(self.networks.critics.parameters(), lr=rate, eps=1e-5),
            "temperature": torch.optim.Adam([self.networks.log_alpha], lr=config.temperature_rate),
        }
        self.generator = torch.Generator().manual_seed(config.seed)
        self.replay = Replay(config.replay, config.max_steps, self.num_envs, self.num_servers, self.features)
        self.step = 0
        self._forget()

    # Acting

    def begin(self, observation: Any, info: Mapping[str, Any] | None = None) -> None:
        """Begin new episodes in all replicas, for loops that end episodes without a done transition.

        After a done transition :meth:`get_action` begins the next episode by itself.
        """
        self._forget()
        self._look(observation, info)

    def _forget(self) -> None:
        #: Replicas whose next observation is the first of an episode, and those that the next step resets.
        self._fresh = torch.ones(self.num_envs, dtype=torch.bool)
        self._over = torch.zeros(self.num_envs, dtype=torch.bool)
        self._memory: Tensor | None = None
        self._seen: Any = None
        self._weights: NDArray[Any] = np.ones((self.num_envs, self.num_servers))

    @torch.no_grad()
    def get_action(
        self, observation: Any, info: Mapping[str, Any] | None = None, *, deterministic: bool = False
    ) -> Any:
        """Choose the action for an observation, or one per replica.

        Args:
            observation: the environment's, in its layout.
            info: the environment's, with the ``weights`` in force; None: those of the last action, and equal ones at
                the beginning of an episode, as in a simulation.
            deterministic: the most likely action instead of a drawn one.
        """
        inputs, active = self._look(observation, info)
        logits, self._memory = self.networks.logits(inputs, active, self._memory)
        choices = logits.argmax(-1) if deterministic else draw(logits, active, self.generator)
        actions = self.kind.encode(choices.numpy())
        return actions if self.interface.num_envs is not None else actions[0]

    def store_transition(
        self,
        observation: Any,
        action: Any,
        reward: Any,
        next_observation: Any,
        done: Any = False,
        info: Mapping[str, Any] | None = None,
    ) -> None:
        """Store a step of the environment, or one of every replica, to learn from.

        Args:
            observation: before the step.
            action: the action taken.
            reward: a number, or float[R].
            next_observation: what the step returned, before any reset of the loop's own.
            done: whether the episode ended, or bool[R]. Load balancing does not terminate: the value of the last
                observation is bootstrapped.
            info: that of the step, with the ``weights`` in force; None: those of the action. Needed where a vector
                environment resets itself in SAME_STEP mode.

        Raises:
            InvalidOptionError: without the info that holds the last observations of SAME_STEP mode.
        """
        self._look(observation, None)
        ended = np.broadcast_to(np.asarray(done, dtype=np.bool_).reshape(-1), self.num_envs)
        if ended.any() and self.interface.autoreset == AutoresetMode.SAME_STEP:
            if info is None or "final_obs" not in info:
                raise InvalidOptionError(
                    "store_transition needs the step's info: in SAME_STEP mode it has the last observations, final_obs"
                )
            next_observation = self.interface.before_reset(next_observation, info["final_obs"], ended)
            info = info["final_info"]
        self._weights = self.interface.weights(action) if info is None else self._rows(info["weights"])
        self._encode(next_observation)
        rewards = torch.from_numpy(np.asarray(reward, dtype=np.float32).reshape(self.num_envs))
        was_over = self._over
        self.replay.add(self._choices(action), rewards, self._inputs, self._active, ~was_over)
        self.step += self.num_envs - int(was_over.sum())
        over = torch.from_numpy(ended.copy())
        if self.interface.autoreset == AutoresetMode.NEXT_STEP:
            self._fresh, self._over = was_over, over
        else:
            self._fresh = over

    def _rows(self, weights: Any) -> NDArray[Any]:
        return np.reshape(weights, (self.num_envs, self.num_servers))

    def _encode(self, observation: Any) -> None:
        flat = self.interface.flat(observation, self._weights if self._adds_weights else None)
        self._inputs, self._active = map(torch.from_numpy, server_inputs(flat, self.features))
        self._seen = observation

    def _look(self, observation: Any, info: Mapping[str, Any] | None) -> tuple[Tensor, Tensor]:
        """Return the inputs and active servers of an observation; begin the episodes whose first it is."""
        fresh = self._fresh
        begins = bool(fresh.any())
        # The observation after the last step was encoded when that was stored.
        if begins or observation is not self._seen:
            if info is not None:
                self._weights = self._rows(info["weights"])
            elif begins:
                self._weights = np.where(fresh.numpy()[:, None], 1.0, self._weights)
            self._encode(observation)
        if begins:
            if self._memory is not None:
                self._memory = self._memory * ~fresh[:, None, None]
            self.replay.begin(self._inputs, self._active, fresh)
            self._fresh = torch.zeros_like(fresh)
        return self._inputs, self._active

    def _choices(self, action: Any) -> Tensor:
        """Choices [R, N] of actions."""
        index = torch.from_numpy(np.asarray(action, dtype=np.int64).reshape(self.num_envs, -1))
        if not self.kind.joint:
            return index
        # Numbered together, the last server's varying fastest.
        return index // self.kind.choices ** torch.arange(self.num_servers - 1, -1, -1) % self.kind.choices

    # Learning

    def update(self) -> dict[str, float]:
        """Make ``config.updates`` gradient steps, once there is enough to learn from.

        Returns:
            The mean losses by name, of ``LOSSES``; zeros as long as fewer than ``warmup * max_steps`` steps are kept.
        """
        config, replay, networks = self.config, self.replay, self.networks
        steps = int(replay.filled.sum())
        if steps < config.warmup * config.max_steps or not bool((replay.filled >= config.sequence_length).any()):
            return dict.fromkeys(LOSSES, 0.0)
        if networks.moments.count == 0:
            # The scales are fixed from here on: values learnt on one scale are wrong on another.
            for row in torch.nonzero(replay.filled).flatten().tolist():
                seen = slice(0, int(replay.filled[row]))
                networks.moments.update(replay.inputs[row, seen][replay.active[row, seen]])
                networks.rewards.update(replay.rewards[row, seen, None])
        sums = torch.zeros(len(LOSSES))
        for _ in range(config.updates):
            batch = replay.sample(config.batch_size, config.sequence_length, config.burn_in, self.generator)
            sums += self.learn(batch)
        return {name: float(x) for name, x in zip(LOSSES, sums / config.updates, strict=True)}

    def learn(self, batch: Batch) -> Tensor:
        """One step of critics, actor and temperature; returns the losses in the order of ``LOSSES``."""
        config, networks = self.config, self.networks
        scaled = networks.moments.scale(batch.inputs, batch.active)
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

        alpha = networks.log_alpha.detach().exp()
        logits = unroll(networks.actor)
        with torch.no_grad():
            values = [soft_value(logits[:, 1:], unroll(q)[:, 1:], alpha, active[:, 1:]) for q in networks.targets]
            rewards = (batch.rewards - networks.rewards.mean) / networks.rewards.std
            target = rewards + config.gamma * torch.minimum(*values)
        utilities = [unroll(q)[:, :-1] for q in networks.critics]
        now = active[:, :-1]
        value_loss = torch.stack(
            [(action_value(q, batch.choices, now) - target).square().mean() for q in utilities]
        ).sum()
        self._descend("critics", value_loss, networks.critics)

        smaller = torch.minimum(*(q.detach() for q in utilities))
        policy_loss = actor_loss(logits[:, :-1], smaller, alpha, now)
        self._descend("actor", policy_loss, networks.actor)

        with torch.no_grad():
            log_p = logits[:, :-1].log_softmax(-1)
            entropy = mean_where(-(log_p.exp() * log_p).sum(-1), now).mean()
        wanted = config.target_entropy * math.log(self.kind.choices)
        self._descend("temperature", networks.log_alpha * (entropy - wanted), None)
        with torch.no_grad():
            for slow, fast in zip(networks.targets.parameters(), networks.critics.parameters(), strict=True):
                slow.lerp_(fast, config.tau)
        return torch.stack([policy_loss.detach(), value_loss.detach() / 2, entropy, alpha, target.mean()])

    def _descend(self, name: str, loss: Tensor, clipped: nn.Module | None) -> None:
        self.optimisers[name].zero_grad()
        loss.backward()
        if clipped is not None:
            nn.utils.clip_grad_norm_(clipped.parameters(), self.config.max_grad_norm)
        self.optimisers[name].step()

    # Checkpoints

    def state(
        self,
        *,
        config: SACGRUConfig | None = None,
        env_kwargs: Mapping[str, Any] | None = None,
        episode: int = 0,
        seconds: float = 0.0,
    ) -> dict[str, Any]:
        """Everything a checkpoint holds, as copies; the arguments are those of a run over the agent."""
        parameters = clone(self.networks.state_dict())
        acting = {name: value for name, value in parameters.items() if name.startswith(("actor.", "moments."))}
        return contents(
            algo=ALGO,
            config=plain_config(config or self.config),
            env_kwargs=env_kwargs or self.env_kwargs,
            shapes=self.shapes,
            network="recurrent",
            arguments={"features": self.features, "hidden": self.config.hidden, "choices": self.kind.choices},
            parameters=acting,
            step=self.step,
            seconds=seconds,
            trainer={
                "agent": {name: value for name, value in parameters.items() if name not in acting},
                "optimisers": {name: clone(optimiser.state_dict()) for name, optimiser in self.optimisers.items()},
                "generator": self.generator.get_state(),
                "episode": episode,
            },
        )

    def restore(self, saved: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
        """Take over the parameters, optimisers and random state of a checkpoint, which was read from ``path``.

        Raises:
            CheckpointError: if it does not fit the environment.
        """
        check_shapes(saved, path, self.shapes, ("features", "choices", "joint", "hidden"))
        was, now = saved["observation"]["normalize"], self.env_kwargs["normalize"]
        if was != now:
            raise CheckpointError(
                f"checkpoint {os.fspath(path)} was trained with normalize={was}, but the environment has {now}"
            )
        trainer = saved["trainer"]
        self.networks.load_state_dict(saved["network"]["parameters"] | trainer["agent"])
        for name, optimiser in self.optimisers.items():
            optimiser.load_state_dict(clone(trainer["optimisers"][name]))
        self.generator.set_state(trainer["generator"])
        self.step = saved["step"]
        self._forget()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint, whole or not at all, that ``lbgym compare`` and ``lbgym run`` take as well.

        Raises:
            FileWriteError: if the file cannot be written.
        """
        check_writable(Path(path))
        write_torch(Path(path), self.state())

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        env: Env[Any, Any] | VectorEnv[Any, Any, Any] | tuple[Space[Any], Space[Any]],
        **changes: Any,
    ) -> SACGRUAgent:
        """Load the agent of a checkpoint, of :meth:`save` or of the recipe, to continue learning in ``env``.

        The replay begins empty: the next update comes after ``warmup`` episodes' worth of steps.

        Raises:
            CheckpointError: if the file cannot be read, or does not fit the environment.
        """
        saved = read_checkpoint(path, ALGO)
        # Neither acting nor learning needs the scenario, which may have been a Python object.
        plain = saved["config"] | {"scenario": saved["config"]["scenario"] or None}
        agent = cls(env, SACGRUConfig(**current_fields(plain)), **changes)
        agent.restore(saved, path)
        return agent

    def policy(self) -> SACGRUPolicy:
        """Return the policy learnt so far; it takes the most likely actions and has a recurrent state of its own."""
        return SACGRUPolicy(self.state())


# Training


def train_sac_gru(
    config: SACGRUConfig | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    resume_from: str | os.PathLike[str] | None = None,
    callback: Callback | None = None,
    tensorboard: bool = False,
) -> SACGRUResult:
    """Train a policy with SAC-GRU.

    Args:
        config: None: the defaults, or the checkpoint's with ``resume_from``.
        out: the checkpoint's file, ending in .pt, or a folder for ``sac-gru.pt``; always written whole or not at all.
            None: keep nothing.
        resume_from: a checkpoint to continue: parameters, optimisers, random state and step count. The replay is not in
            the file; ``warmup`` episodes are played with the trained policy before the updates go on.
        callback: receives the progress after every round of updates; returning True stops the training.
        tensorboard: log to a folder ``tensorboard`` beside the checkpoint.

    If it is interrupted or fails, the state after the last whole round is saved before the exception propagates.

    Raises:
        CheckpointError: if the checkpoint does not fit the environment.
        DivergedError: if the networks are not finite any more; the state before that is saved.
        FileWriteError: if the checkpoint cannot be written.
        MissingExtraError: if TensorBoard is asked for and not installed.
    """
    state, checkpoint, history = _Trainer.train(config, out, resume_from, callback, tensorboard)
    return SACGRUResult(SACGRUPolicy(state), checkpoint, history)


class _Trainer(Trainer[SACGRUConfig]):
    """A loop over the agent, whose replicas begin and end their episodes together."""

    ALGO = ALGO
    CONFIG = SACGRUConfig

    def __init__(self, config: SACGRUConfig) -> None:
        super().__init__(config)
        self.agent = SACGRUAgent(self.env, config)
        self.episode = 0

    def state(self) -> dict[str, Any]:
        return self.agent.state(
            config=self.config,
            env_kwargs=self.config.observation_kwargs(),
            episode=self.episode,
            seconds=self.budget.seconds,
        )

    def restore(self, saved: dict[str, Any], path: Path) -> None:
        self.agent.restore(saved, path)
        self.episode = saved["trainer"]["episode"]
        self.budget = Budget(self.config, saved["step"], saved["seconds"])

    def begin(self) -> None:
        """Begin the next episode in all replicas, which end together."""
        seeds = np.random.SeedSequence([self.config.seed, self.episode]).generate_state(self.config.num_envs)
        self.episode += 1
        self.observation, self.info = self.env.reset(seed=[int(s) for s in seeds])
        self.agent.begin(self.observation, self.info)

    def round(self) -> tuple[float, float, dict[str, float]]:
        reward, fct_mean = self.collect()
        return reward, fct_mean, self.agent.update()

    def collect(self) -> tuple[float, float]:
        """Step every replica ``num_steps`` times with actions drawn from the policy; mean reward and mean FCT."""
        reward_sum = fct_sum = ended_flows = 0.0
        for _ in range(self.config.num_steps):
            before = self.observation
            action = self.agent.get_action(before, self.info)
            self.observation, rewards, _, truncated, self.info = self.env.step(action)
            self.agent.store_transition(before, action, rewards, self.observation, truncated, self.info)
            reward_sum += float(torch.from_numpy(rewards.astype(np.float32)).mean())
            flows = self.info["completed"] + self.info["rejected"]
            fct_sum += float(np.where(flows > 0, self.info["fct_mean"] * flows, 0.0).sum())
            ended_flows += float(flows.sum())
            if truncated.any():
                self.begin()
        return reward_sum / self.config.num_steps, fct_sum / ended_flows if ended_flows else math.nan
