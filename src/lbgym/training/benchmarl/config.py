"""BenchMARL's algorithms, what each takes, and the recipe's configuration."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ...checks import choice
from ...errors import MissingExtraError

try:
    with warnings.catch_warnings():
        # TorchRL and its dependencies warn of their own classes while they are imported.
        warnings.simplefilter("ignore")
        import benchmarl.algorithms as algorithms
except ModuleNotFoundError as error:
    raise MissingExtraError("benchmarl", "benchmarl", "training with BenchMARL") from error

from ...env.multi_agent_vector import REWARD_SHARINGS, MultiLoadBalanceVectorEnv
from ...scenarios import AnyScenario
from ..config import OF_SEVERAL, PER_ALGORITHM, AlgorithmConfig

#: Keys of the environment by action type, unless given. Two levels make 2 ** 7 joint actions of the 7 servers
#: of "marllb-moderate", three would make 2,187; and weights that are too far apart at random overload servers.
WEIGHTS: dict[str, dict[str, Any]] = {
    "joint": {"action_weights": [1.0, 2.0]},
    "normalized": {"min_weight": 0.25, "max_weight": 4.0},
    "index": {"min_weight": 0.25, "max_weight": 4.0},
}


@dataclass(frozen=True)
class Algorithm:
    """An algorithm of BenchMARL: what it takes, and its defaults here.

    Attributes:
        name: of its configuration's class, in ``benchmarl.algorithms``.
        action_types: those it takes, the default first.
        own_critic: whether its critic, if any, sees what one balancer sees, and not the state.
        num_steps: steps of every replica between two updates.
        learning_rate: step size of the optimiser.
        options: over BenchMARL's defaults.
    """

    name: str
    action_types: tuple[str, ...]
    own_critic: bool
    num_steps: int
    learning_rate: float
    options: Mapping[str, Any] = field(default_factory=dict)

    def load(self) -> Any:
        """Its configuration's class."""
        return getattr(algorithms, self.name)

    @property
    def on_policy(self) -> bool:
        return bool(self.load().on_policy())


_CONTINUOUS = ("normalized", "index")
_ANY = (*_CONTINUOUS, "joint")
# With gamma 0.6 a reward matters for two or three steps: targets can follow at once, and old experience is of no use.
_REPLAY = {"off_policy_memory_size": 65_536, "polyak_tau": 0.05}
# Balancers that always act alike learn nothing of how much better that is than anything else.
_GREEDY = _REPLAY | {"exploration_eps_init": 1.0, "exploration_eps_end": 0.1}
# Actions are in [-1, 1], which a standard deviation of 1 would leave all the time.
_ACTOR = {"use_tanh_normal": False, "scale_mapping": "biased_softplus_0.3"}
# The entropy of an action per server outweighs rewards scaled to 1 for long if its weight begins at 1, too.
_SOFT = _REPLAY | {"alpha_init": 0.02, "scale_mapping": "biased_softplus_0.3"}

#: The algorithms by name.
ALGORITHMS = {
    "qmix": Algorithm("QmixConfig", ("joint",), True, 8, 1e-3, _GREEDY),
    "vdn": Algorithm("VdnConfig", ("joint",), True, 8, 1e-3, _GREEDY),
    "iql": Algorithm("IqlConfig", ("joint",), True, 8, 1e-3, _GREEDY),
    "mappo": Algorithm("MappoConfig", _ANY, False, 16, 3e-3, _ACTOR),
    "ippo": Algorithm("IppoConfig", _ANY, True, 16, 3e-3, _ACTOR),
    "maddpg": Algorithm(
        "MaddpgConfig",
        _CONTINUOUS,
        False,
        8,
        2e-4,
        _REPLAY | {"exploration_eps_init": 0.4, "exploration_eps_end": 0.05},
    ),
    "isac": Algorithm("IsacConfig", _ANY, True, 8, 1e-3, _SOFT),
    "masac": Algorithm("MasacConfig", _ANY, False, 8, 1e-3, _SOFT),
}


@dataclass(kw_only=True)
class BenchMARLConfig(AlgorithmConfig):
    """The configuration of a training with an algorithm of BenchMARL.

    A step is one of a whole replica: all its balancers act.
    """

    algorithm: str = "qmix"
    """"qmix", "vdn", "iql", "mappo", "ippo", "maddpg", "isac" or "masac": a name of ``ALGORITHMS``"""
    network: str = "equivariant"
    """"equivariant", parameters shared over the servers, or "mlp", dense layers; central critics are always dense"""
    options: dict[str, Any] = field(default_factory=dict)
    """further fields of the algorithm's configuration in BenchMARL, such as ``mixing_embed_dim``, or of its
    ``ExperimentConfig``, such as ``polyak_tau``, over those of ``ALGORITHMS``"""

    scenario: str | Path | AnyScenario | None = "marllb-moderate"
    """a scenario's name, a TOML path, a Scenario, or a distribution of them"""
    num_balancers: int | None = None
    """balancers; None: the scenario's"""
    reward_sharing: str = "mean"
    """how rewards are shared among the balancers: "mean", "field", "own" or "difference"."""
    action_type: str = PER_ALGORITHM
    """an ``action_type`` of ``LoadBalanceEnv``: "joint" for "qmix", "vdn" and "iql", "normalized" (default) or "index"
    for "maddpg", any of these for the others (default "normalized")"""
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    """further keys of ``MultiLoadBalanceVectorEnv``; unless given "joint" actions are of weights 1 and 2, "normalized"
    and "index" ones of weights from 0.25 to 4, those of "index" times the configured ones"""

    num_steps: int = PER_ALGORITHM
    """steps of every replica between two updates; 16 for "mappo" and "ippo", 8 for the others"""
    learning_rate: float = PER_ALGORITHM
    """step size of the optimiser; 3e-3 for "mappo" and "ippo", 2e-4 for "maddpg", 1e-3 for the others"""
    gamma: float = 0.6
    """discount per step; queues forget within a second what was done, and a longer view adds noise"""
    batch_size: int = 256
    """steps of a replica in a gradient step; off-policy algorithms only"""
    optimizer_steps: int = 4
    """gradient steps after each collection; off-policy algorithms only"""
    hidden: int = 32
    """width of the layers; those of central critics are twice as wide"""
    exploration: float = 0.4
    """share of the budget over which exploration falls from ``exploration_eps_init`` to ``exploration_eps_end``: the
    share of random actions of "qmix", "vdn" and "iql", the standard deviation of the noise of "maddpg"."""
    gae_lambda: float = 0.9
    """lambda of the generalised advantage estimate; "mappo" and "ippo" only"""
    epochs: int = 2
    """passes over the rollout per update; "mappo" and "ippo" only"""

    algorithms: ClassVar[Mapping[str, Algorithm]] = ALGORITHMS
    framework: ClassVar[tuple[str, str]] = ("BenchMARL", "mappo")
    per_algorithm: ClassVar[tuple[str, ...]] = ("num_steps", "learning_rate")
    whole_numbers: ClassVar[dict[str, int]] = AlgorithmConfig.whole_numbers | {
        "num_balancers": 1, "batch_size": 1, "optimizer_steps": 1,
    }  # fmt: skip
    numbers: ClassVar[dict[str, dict[str, Any]]] = AlgorithmConfig.numbers | {
        "exploration": {"above": 0.0, "high": 1.0}
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("reward sharing", self.reward_sharing, REWARD_SHARINGS, where="BenchMARLConfig")
        self.env_kwargs = {**WEIGHTS.get(self.action_type, {}), **self.env_kwargs}

    def environment_keys(self) -> set[str]:
        """All keys that the environment has, but for the number of replicas and the autoreset mode."""
        return super().environment_keys() | {*OF_SEVERAL}

    def observation_kwargs(self) -> dict[str, Any]:
        """The environment keys that a balancer's observations and actions depend on, also where it is alone."""
        return {k: v for k, v in super().observation_kwargs().items() if k not in OF_SEVERAL}

    def environment_kwargs(self) -> dict[str, Any]:
        """All keys of the environment to train on, but the number of replicas and the autoreset mode."""
        together = {"num_balancers": self.num_balancers, "reward_sharing": self.reward_sharing}
        return together | super().environment_kwargs()

    def make_env(self) -> MultiLoadBalanceVectorEnv:  # type: ignore[override]
        """The vector environment to train on."""
        return MultiLoadBalanceVectorEnv(self.num_envs, autoreset_mode=self.autoreset_mode, **self.environment_kwargs())
