"""What every recipe is told alike: what to train on, and for how long. Plain data that needs no framework."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from gymnasium.vector import AutoresetMode

from ..env.actions import ACTION_TYPES
from ..errors import CheckpointError, LbgymError, UnsupportedSpaceError
from ..snapshot import DEFAULT_STEP_INTERVAL

if TYPE_CHECKING:
    from ..env.vector import LoadBalanceVectorEnv
    from ..scenarios import Scenario, ScenarioDistribution

#: What a field that was not given is until the algorithm's default takes its place.
PER_ALGORITHM: Any = None


@dataclass(kw_only=True)
class TrainingConfig:
    """What to train on and for how long; every recipe's configuration has these fields and some of its own."""

    scenario: str | Path | Scenario | ScenarioDistribution | None = "heterogeneous"
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

    #: What a vector environment of this recipe does at the end of an episode.
    autoreset_mode: ClassVar[AutoresetMode] = AutoresetMode.DISABLED
    #: Fields that must be whole numbers, and the least they may be.
    whole_numbers: ClassVar[dict[str, int]] = {"max_steps": 1, "num_envs": 1, "num_steps": 1, "hidden": 1}

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.total_steps is None and self.seconds is None:
            raise LbgymError(f"{name} needs total_steps, seconds or both, got neither")
        for key, least in self.whole_numbers.items():
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise LbgymError(f"{name}.{key} must be a whole number of at least {least}, got {value!r}")

    def fill_in(self, **defaults: Any) -> None:
        """Give fields that were left to the algorithm (``PER_ALGORITHM``) the algorithm's defaults."""
        for name, value in defaults.items():
            if getattr(self, name) is PER_ALGORITHM:
                setattr(self, name, value)

    def check_action_type(self, who: str, allowed: Sequence[str], other: str) -> None:
        """Hold ``action_type`` to those that an algorithm takes; a name that is none is the environment's to refuse.

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

    def observation_kwargs(self) -> dict[str, Any]:
        """The environment keys that a policy's observations and actions depend on."""
        keys: dict[str, Any] = {
            "action_type": self.action_type,
            "dispatch": self.dispatch,
            "step_interval": DEFAULT_STEP_INTERVAL,
        }
        keys |= {k: v for k, v in self.env_kwargs.items() if k not in ("num_threads", "render_mode")}
        return keys | {"observation": "flat", "normalize": True}

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


def plain_config(config: TrainingConfig) -> dict[str, Any]:
    """A configuration as plain data. A Scenario object or a callable reward has no plain form and becomes None."""
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


def saved_config(plain: Mapping[str, Any], path: str | os.PathLike[str]) -> dict[str, Any]:
    """Fields of the configuration that a checkpoint was trained with, from their plain form in the file ``path``.

    Raises:
        CheckpointError: if it had a part with no plain form.
    """
    for name in ("scenario", "reward_type"):
        if plain[name] is None:
            raise CheckpointError(
                f"checkpoint {os.fspath(path)} was trained with a {name} that is a Python object: resume it from "
                f"Python with a config that has it"
            )
    return dict(plain)
