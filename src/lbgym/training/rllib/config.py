"""RLlib's algorithms, what each takes, and the recipe's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, ClassVar

from gymnasium.vector import AutoresetMode

from ...errors import LbgymError
from ..config import OF_SEVERAL, PER_ALGORITHM, AlgorithmConfig


@dataclass(frozen=True)
class Algorithm:
    """An algorithm of RLlib: what it takes, and its defaults here.

    Attributes:
        module: where its configuration's class is.
        name: of that class.
        rl_module: name of its class in :mod:`lbgym.training.rllib.modules`.
        actor: where the actor's parameters are in it.
        action_types: those it takes, the default first.
        num_envs: replicas.
        num_steps: steps of every replica between two updates.
        learning_rate: step size of the optimiser.
        env_runners: remote env runners.
        multi_agent: whether balancers can be its agents.
        off_policy: whether it learns from a replay buffer.
        squash: whether its continuous actions are squashed by tanh.
        seconds: least time of an iteration, for those whose updates are too short to be reported one by one.
        options: further arguments of its configuration's ``training``.
        env_kwargs: keys of the environment.
    """

    module: str
    name: str
    rl_module: str
    actor: str
    action_types: tuple[str, ...]
    num_envs: int
    num_steps: int
    learning_rate: float
    env_runners: int = 0
    multi_agent: bool = True
    off_policy: bool = False
    squash: bool = False
    seconds: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    env_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def load(self) -> type[Any]:
        """The class of its configuration."""
        found: type[Any] = getattr(import_module(f"ray.rllib.algorithms.{self.module}"), self.name)
        return found


_ON_POLICY = ("normalized", "discrete", "joint")
# With gamma 0.95 a reward matters for about 20 steps: old experience is of no use.
_REPLAY = {
    "replay_buffer_config": {"type": "EpisodeReplayBuffer", "capacity": 100_000},
    "num_steps_sampled_before_learning_starts": 4_096,
}
# Polling for samples without waiting would take a core from the env runners.
_ASYNCHRONOUS = {"entropy_coeff": 0.0, "timeout_s_sampler_manager": 0.05}

#: The algorithms by name.
ALGORITHMS = {
    "ppo": Algorithm(
        "ppo",
        "PPOConfig",
        "ActorCriticModule",
        "actor",
        _ON_POLICY,
        64,
        32,
        1e-3,
        options={"use_kl_loss": False, "clip_param": 0.2, "grad_clip": 0.5, "grad_clip_by": "global_norm"},
    ),
    "dqn": Algorithm(
        "dqn",
        "DQNConfig",
        "QModule",
        "af",
        ("joint",),
        64,
        4,
        5e-4,
        multi_agent=False,
        off_policy=True,
        seconds=0.5,
        options=_REPLAY | {"target_network_update_freq": 4_096},
        # Two levels make 2 ** 8 joint actions of the 8 servers of "heterogeneous"; three would be too many.
        env_kwargs={"action_weights": [1.0, 4.0]},
    ),
    "sac": Algorithm(
        "sac",
        "SACConfig",
        "SACModule",
        "pi.mean",
        ("normalized",),
        64,
        4,
        1e-3,
        multi_agent=False,
        off_policy=True,
        squash=True,
        seconds=0.5,
        # The entropy of an action per server outweighs scaled rewards for long if its weight begins at 1.
        options=_REPLAY | {"initial_alpha": 0.02, "tau": 0.02},
    ),
    "impala": Algorithm(
        "impala",
        "IMPALAConfig",
        "ActorCriticModule",
        "actor",
        _ON_POLICY,
        64,
        8,
        5e-4,
        env_runners=1,
        seconds=0.5,
        options=_ASYNCHRONOUS,
    ),
    "appo": Algorithm(
        "appo",
        "APPOConfig",
        "TargetActorCriticModule",
        "actor",
        _ON_POLICY,
        64,
        8,
        1e-3,
        env_runners=1,
        seconds=0.5,
        # Each sample is learnt from twice; an old actor that is seldom renewed would hold the new one back.
        options=_ASYNCHRONOUS
        | {
            "circular_buffer_num_batches": 2,
            "circular_buffer_iterations_per_batch": 2,
            "target_network_update_freq": 0.5,
        },
    ),
}


@dataclass(kw_only=True)
class RLlibConfig(AlgorithmConfig):
    """The configuration of a training with an algorithm of RLlib.

    Rewards are divided by the standard deviation of discounted returns under equal weights, measured once before the
    training. The off-policy algorithms (DQN, SAC) make one gradient step per 32 transitions, whatever the number of
    replicas; another ratio is ``options={"training_intensity": ...}``.
    """

    algorithm: str = "ppo"
    """"ppo", "dqn", "sac", "impala" or "appo": a name of ``ALGORITHMS``"""
    network: str = "mlp"
    """"mlp", or "equivariant", parameters shared over the servers"""
    multi_agent: bool = False
    """every balancer of the scenario is an agent, and all share one policy; "ppo", "impala" and "appo" only"""
    env_runners: int = PER_ALGORITHM
    """env runners in processes of their own, on any node of the Ray cluster, which share the replicas; 0: sampling
    takes place in this process. 1 for "impala" and "appo", which need at least that, and 0 for the others."""
    ray_address: str | None = None
    """of a Ray cluster, such as "auto" or "ray://10.0.0.1:10001"; None: that of RAY_ADDRESS, else a local Ray. A Ray
    that this process is connected to already is used, and left running, in any case."""
    options: dict[str, Any] = field(default_factory=dict)
    """further arguments of the ``training`` of the algorithm's configuration over those of ``ALGORITHMS``"""

    action_type: str = PER_ALGORITHM
    """an ``action_type`` of ``LoadBalanceEnv``: "normalized" (default), "discrete" or "joint" for "ppo", "impala" and
    "appo", "joint" for "dqn" and "normalized" for "sac"."""
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    """further keys of the environment; "dqn" has ``action_weights`` of 1 and 4 unless given"""

    num_envs: int = PER_ALGORITHM
    """replicas, all env runners together; 64, but 16 with ``multi_agent``, where each is stepped on its own"""
    num_steps: int = PER_ALGORITHM
    """steps of every replica between two updates; 32 for "ppo", 8 for "impala" and "appo", 4 for "dqn" and "sac"."""
    learning_rate: float = PER_ALGORITHM
    """step size of the optimiser; 1e-3, but 5e-4 for "dqn" and "impala"."""
    hidden: int = 64
    """width of the layers, two of them with "mlp"."""
    log_std: float = -2.0
    """initial log standard deviation of continuous actions. With much more noise than this the first thing that dense
    layers learn is to keep all actions beyond the bounds of the space, where the noise is cut off"""

    autoreset_mode: ClassVar[AutoresetMode] = AutoresetMode.NEXT_STEP
    algorithms: ClassVar[Mapping[str, Algorithm]] = ALGORITHMS
    framework: ClassVar[tuple[str, str]] = ("RLlib", "ppo")
    per_algorithm: ClassVar[tuple[str, ...]] = (*AlgorithmConfig.per_algorithm, "env_runners")
    # No steps at all leave the policy as it is made.
    whole_numbers: ClassVar[dict[str, int]] = AlgorithmConfig.whole_numbers | {"env_runners": 0, "total_steps": 0}
    numbers: ClassVar[dict[str, dict[str, Any]]] = AlgorithmConfig.numbers | {"log_std": {}}

    def __post_init__(self) -> None:
        if self.multi_agent:
            self.fill_in(num_envs=16)
        super().__post_init__()
        kind = ALGORITHMS[self.algorithm]
        self.env_kwargs = {**kind.env_kwargs, **self.env_kwargs}
        if self.multi_agent and not kind.multi_agent:
            having = ", ".join(name for name, other in ALGORITHMS.items() if other.multi_agent)
            raise LbgymError(f"multi_agent=True is for {having}, not for {self.algorithm!r}")
        if self.env_runners < kind.env_runners:
            raise LbgymError(
                f"{self.algorithm!r} samples while it learns: RLlibConfig.env_runners must be at least "
                f"{kind.env_runners}, got {self.env_runners}"
            )
        if self.num_envs % max(1, self.env_runners):
            raise LbgymError(
                f"the env runners share the replicas evenly: RLlibConfig.num_envs must be a multiple of "
                f"env_runners={self.env_runners}, got {self.num_envs}"
            )

    def environment_keys(self) -> set[str]:
        """All keys that the environment has, but for the number of replicas and the autoreset mode."""
        return super().environment_keys() | ({*OF_SEVERAL} if self.multi_agent else set())

    def environment_kwargs(self) -> dict[str, Any]:
        """All keys of the environment to train on, but the number of replicas and the autoreset mode."""
        # Runners in processes of their own share the cores already.
        threads = {} if self.multi_agent or not self.env_runners else {"num_threads": 1}
        return threads | super().environment_kwargs()
