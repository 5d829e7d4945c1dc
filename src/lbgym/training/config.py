"""The configuration that all recipes share, as plain data that needs no framework."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from gymnasium.vector import AutoresetMode

from ..checks import boolean, choice, instance, number, whole
from ..env.actions import ACTION_TYPES
from ..errors import CheckpointError, InvalidOptionError, LbgymError, UnknownNameError, UnsupportedSpaceError
from ..scenarios import AnyScenario
from ..snapshot import DEFAULT_STEP_INTERVAL

if TYPE_CHECKING:
    from ..env.vector import LoadBalanceVectorEnv

#: The scenario that stands for the distribution in :mod:`lbgym.training.pretraining`.
PRETRAINING = "pretraining"

#: Keys of the environment that concern several balancers; a single one has none of them.
OF_SEVERAL = ("num_balancers", "reward_sharing", "action_offsets", "action_delay")

#: Limits of common kinds of numbers, as :func:`~lbgym.checks.number` takes them. Infinity is for no limit at all.
SHARE = {"low": 0.0, "high": 1.0}
NOT_NEGATIVE = {"low": 0.0}
POSITIVE = {"above": 0.0}
LIMIT = {"low": 0.0, "finite": False}
POSITIVE_LIMIT = {"above": 0.0, "finite": False}

#: Value of a field that was not given, until the algorithm's default takes its place.
PER_ALGORITHM: Any = None


@dataclass(kw_only=True)
class TrainingConfig:
    """The task and the budget of a training; every recipe's configuration adds fields of its own."""

    scenario: str | Path | AnyScenario | None = "heterogeneous"
    """a scenario's name, a TOML path, a Scenario, or a distribution of them"""
    num_servers: int | None = None
    """servers; None: the scenario's"""
    action_type: str = "normalized"
    """an ``action_type`` of ``LoadBalanceEnv``"""
    reward_type: Any = "open_flows"
    """what is maximised; any ``reward_type`` of the environment"""
    reward_field: str | None = None
    """the feature that a fairness reward is taken on; None: the environment's default"""
    dispatch: str | None = None
    """dispatch rule; None: the scenario's"""
    max_steps: int = 256
    """steps of an episode; it is then truncated, and its last observation has a value like any other"""
    observe_weights: bool = True
    """append each server's weight in force to the observation; without it a slow server and an overloaded one look the
    same"""
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    """further keys of the environment"""

    seed: int = 1
    """seeds the networks, the actions, the batches and every replica"""
    total_steps: int | None = 1_000_000
    """environment steps, all replicas together; None: no limit"""
    seconds: float | None = None
    """wall-clock limit, without the compilation of the simulator; None: no limit"""
    num_envs: int = 256
    """replicas"""
    num_steps: int = 16
    """steps of every replica between two updates"""
    learning_rate: float = 1e-3
    """step size of the optimiser"""
    gamma: float = 0.95
    """discount per step"""
    hidden: int = 64
    """width of the layers"""

    torch_threads: int = 1
    """threads of torch; more than one rarely pays for a network this small"""
    checkpoint_every: float = 30.0
    """seconds between checkpoints"""

    #: Autoreset mode of the recipe's vector environment.
    autoreset_mode: ClassVar[AutoresetMode] = AutoresetMode.DISABLED
    #: Fields that must be whole numbers, and the least they may be; None where the field takes it.
    whole_numbers: ClassVar[dict[str, int]] = {
        "num_servers": 1, "max_steps": 1, "seed": 0, "total_steps": 1, "num_envs": 1, "num_steps": 1, "hidden": 1,
        "torch_threads": 1,
    }  # fmt: skip
    #: The most they may be: what torch can be given.
    most: ClassVar[dict[str, int]] = {"seed": 2**64 - 1, "torch_threads": 4096}
    #: Fields that must be numbers, and their limits; None where the field takes it.
    numbers: ClassVar[dict[str, dict[str, Any]]] = {
        "seconds": POSITIVE_LIMIT | {"unit": "seconds"},
        "learning_rate": NOT_NEGATIVE,
        "gamma": SHARE,
        "checkpoint_every": LIMIT | {"unit": "seconds"},
    }

    #: Keys of observations whose value the recipe needs.
    needed: ClassVar[dict[str, Any]] = {"observation": "flat", "normalize": True}

    def __new__(cls, *args: Any, **values: Any) -> Self:
        """Refuse names that are no field with the nearest one, or with the field's present name."""
        check_field_names(cls, values, cls.__name__)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        name = type(self).__name__
        self.observe_weights = boolean(f"{name}.observe_weights", self.observe_weights)
        instance(f"{name}.env_kwargs", self.env_kwargs, Mapping, "keys of the environment with their values")
        known = self.environment_keys()
        for key, value in self.env_kwargs.items():
            if key in ("observe_weights", "num_envs"):
                raise InvalidOptionError(f"{key}={value!r} in {name}.env_kwargs: it is a field of {name} itself")
            if key not in known:
                raise UnknownNameError("key", key, known, f"{name}.env_kwargs")
        for key, value in self.needed.items():
            if self.env_kwargs.get(key, value) != value:
                raise InvalidOptionError(
                    f"{key}={self.env_kwargs[key]!r} in {name}.env_kwargs: this recipe needs {key}={value!r}"
                )
        if self.total_steps is None and self.seconds is None:
            raise LbgymError(f"{name} needs total_steps, seconds or both, got neither")
        optional = {f.name for f in fields(self) if str(f.type).endswith("None")}
        for key, least in self.whole_numbers.items():
            value = getattr(self, key)
            if value is not None or key not in optional:
                setattr(self, key, whole(f"{name}.{key}", value, low=least, high=self.most.get(key)))
        for key, limits in self.numbers.items():
            value = getattr(self, key)
            if value is not None or key not in optional:
                setattr(self, key, number(f"{name}.{key}", value, **limits))

    def fill_in(self, **defaults: Any) -> None:
        """Give fields that were left to the algorithm (``PER_ALGORITHM``) the algorithm's defaults."""
        for name, value in defaults.items():
            if getattr(self, name) is PER_ALGORITHM:
                setattr(self, name, value)

    def check_action_type(self, who: str, allowed: Sequence[str], other: str) -> None:
        """Check ``action_type`` against those that an algorithm takes; the environment refuses unknown names.

        Args:
            who: the algorithm, as an error names it.
            allowed: those it takes, the default first.
            other: an algorithm for where joint actions would be too many.

        Raises:
            UnsupportedSpaceError: naming what fits.
        """
        if self.action_type not in ACTION_TYPES or self.action_type in allowed:
            return
        fits = f"use action_type {' or '.join(map(repr, allowed))}"
        if tuple(allowed) == ("joint",):
            fits += f", with few enough action_weights ** servers, or an algorithm for many servers such as {other!r}"
        raise UnsupportedSpaceError(f"{who} cannot take action_type {self.action_type!r}: {fits}")

    def environment_keys(self) -> set[str]:
        """All keys that the environment has, but for the number of replicas and the autoreset mode."""
        from ..env.options import EnvOptions

        return {*signature(EnvOptions).parameters, "num_threads", "shm_name", "shm_timeout"}

    def observation_kwargs(self) -> dict[str, Any]:
        """The environment keys that a policy's observations and actions depend on."""
        keys: dict[str, Any] = {"action_type": self.action_type, "dispatch": self.dispatch}
        keys["step_interval"] = DEFAULT_STEP_INTERVAL
        keys |= {k: v for k, v in self.env_kwargs.items() if k not in ("num_threads", "render_mode")}
        return keys | {"observation": "flat", "normalize": True, "observe_weights": self.observe_weights}

    def environment_kwargs(self) -> dict[str, Any]:
        """All keys of the environment to train on, but the number of replicas and the autoreset mode."""
        keys: dict[str, Any] = {"scenario": self.scenario, "num_servers": self.num_servers, "max_steps": self.max_steps}
        keys |= {"reward_type": self.reward_type}
        if self.reward_field is not None:
            keys["reward_field"] = self.reward_field
        return keys | self.env_kwargs | self.observation_kwargs()

    def make_env(self) -> LoadBalanceVectorEnv:
        """The vector environment to train on."""
        from ..env.vector import LoadBalanceVectorEnv

        return LoadBalanceVectorEnv(
            num_envs=self.num_envs, autoreset_mode=self.autoreset_mode, **self.environment_kwargs()
        )


@dataclass(kw_only=True)
class AlgorithmConfig(TrainingConfig):
    """The configuration of a framework's recipe, which has several algorithms.

    The fields whose default depends on the algorithm hold it once the configuration is made; so ``dataclasses.replace``
    with another ``algorithm`` keeps those of the first.
    """

    algorithm: str
    """a name of the framework's ``ALGORITHMS``"""
    network: str = "mlp"
    """"mlp", or "equivariant", parameters shared over the servers"""
    options: dict[str, Any] = field(default_factory=dict)
    """further arguments of the algorithm in its framework"""

    gae_lambda: float = 0.95
    """lambda of the generalised advantage estimate; on-policy algorithms only"""
    epochs: int = 4
    """passes over the rollout per update; algorithms of the PPO family only"""
    minibatches: int = 4
    """minibatches per pass; algorithms of the PPO family only"""

    #: The algorithms by name; each has ``action_types``, the default first, and defaults for fields.
    algorithms: ClassVar[Mapping[str, Any]]
    #: The framework, and an algorithm of it for where joint actions would be too many.
    framework: ClassVar[tuple[str, str]]
    #: Fields whose default is the attribute of that name of the algorithm.
    per_algorithm: ClassVar[tuple[str, ...]] = ("num_envs", "num_steps", "learning_rate")
    whole_numbers: ClassVar[dict[str, int]] = TrainingConfig.whole_numbers | {"epochs": 1, "minibatches": 1}
    # The frameworks seed NumPy's global generator as well.
    most: ClassVar[dict[str, int]] = TrainingConfig.most | {"seed": 2**32 - 1}
    numbers: ClassVar[dict[str, dict[str, Any]]] = TrainingConfig.numbers | {"gae_lambda": SHARE}

    def __post_init__(self) -> None:
        name = type(self).__name__
        kind = self.algorithms[choice("algorithm", self.algorithm, self.algorithms, where=name)]
        self.fill_in(action_type=kind.action_types[0], **{key: getattr(kind, key) for key in self.per_algorithm})
        super().__post_init__()
        choice("network", self.network, ("mlp", "equivariant"), where=name)
        framework, other = self.framework
        self.check_action_type(f"{self.algorithm.upper()} of {framework}", kind.action_types, other)


def plain_config(config: TrainingConfig) -> dict[str, Any]:
    """Convert a configuration to plain data. A Scenario object or a callable reward has no plain form: None."""
    plain = {f.name: getattr(config, f.name) for f in fields(config)}
    if isinstance(config.scenario, Path):
        plain["scenario"] = str(config.scenario)
    elif not isinstance(config.scenario, str):
        plain["scenario"] = None
    if callable(config.reward_type):
        plain["reward_type"] = None
    elif isinstance(config.reward_type, Mapping):
        plain["reward_type"] = dict(config.reward_type)
    return plain


#: Fields of configurations by the names they had before.
RENAMED = {"policy": "network", "sees_weights": "observe_weights"}


def check_field_names(kind: type[TrainingConfig], names: Iterable[str], where: str) -> None:
    """Check names of fields of a configuration.

    Raises:
        UnknownNameError: for a name that is no field, naming ``where`` it comes from.
        InvalidOptionError: for the former name of a field, naming the present one.
    """
    known = [field.name for field in fields(kind)]
    for name in names:
        if (now := RENAMED.get(name)) in known:
            raise InvalidOptionError(f"{name} in {where} is now called {now}")
        if name not in known:
            raise UnknownNameError("setting", name, known, where)


def current_fields(plain: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration's plain form by the present names of its fields."""
    return {RENAMED.get(name, name): value for name, value in plain.items()}


def saved_config(plain: Mapping[str, Any], path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the configuration of a checkpoint in the file ``path`` from its plain form.

    Raises:
        CheckpointError: if part of it had no plain form.
    """
    for name in ("scenario", "reward_type"):
        if plain[name] is None:
            raise CheckpointError(
                f"checkpoint {os.fspath(path)} was trained with a {name} that is a Python object: resume it from "
                f"Python with a config that has it"
            )
    return current_fields(plain)


def check_recipe(path: str | os.PathLike[str], found: str, family: str, algorithm: str | None) -> None:
    """Check that a checkpoint is of a family of recipes, such as "rllib", and of one of its algorithms unless None.

    Raises:
        CheckpointError: naming both.
    """
    prefix, _, name = found.partition("-")
    if prefix != family:
        raise CheckpointError(f"checkpoint {os.fspath(path)} was trained by recipe {found!r}, not by one of {family!r}")
    if algorithm not in (None, name):
        raise CheckpointError(f"checkpoint {os.fspath(path)} was trained with algorithm {name!r}, not {algorithm!r}")


def check_same(
    path: str | os.PathLike[str], plain: Mapping[str, Any], config: TrainingConfig, names: Sequence[str]
) -> None:
    """Check that a configuration equals the one a checkpoint was trained with, in the fields that shape the networks.

    Args:
        path: the checkpoint's file.
        plain: its configuration, in plain form.
        config: of the new run.
        names: of the fields.

    Raises:
        CheckpointError: for the first field that differs.
    """
    fields_there = current_fields(plain)
    for name in names:
        there, here = fields_there[name], getattr(config, name)
        if there != here:
            raise CheckpointError(
                f"checkpoint {os.fspath(path)} was trained with {name} {there!r}, but the configuration has {here!r}"
            )
