"""Every recipe by one name, such as "ppo", "sb3-dqn" or "benchmarl-qmix", and its configuration as a TOML file.

Nothing here needs a framework; the recipe's module is imported when it trains.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import CheckpointError, InvalidOptionError, MissingExtraError, UnknownNameError
from ..policies.checkpoints import read_checkpoint
from ..toml_files import read_toml
from .config import TrainingConfig, plain_config

if TYPE_CHECKING:
    from .runs import Progress


class TrainingResult(Protocol):
    """What every recipe returns: its policy or model, and these."""

    @property
    def checkpoint(self) -> Path | None:
        """The last checkpoint; None without ``out``."""

    @property
    def history(self) -> list[Progress]:
        """The progress after every update."""


@dataclass(frozen=True)
class Recipe:
    """Where a recipe is.

    Attributes:
        module: of this package.
        config: name of its configuration's class.
        train: name of its function.
        suffix: of its checkpoints.
        algorithm: what its configuration calls the algorithm; None: the recipe has one only.
    """

    module: str
    config: str
    train: str
    suffix: str
    algorithm: str | None = None

    def load(self, name: str) -> Any:
        """A name of its module.

        Raises:
            MissingExtraError: if the framework is not installed.
        """
        return getattr(import_module(f".{self.module}", __package__), name)


def _family(prefix: str, algorithms: str, config: str, suffix: str) -> dict[str, Recipe]:
    """Recipes of one module, which share all but the algorithm."""
    return {f"{prefix}-{name}": Recipe(prefix, config, f"train_{prefix}", suffix, name) for name in algorithms.split()}


#: The recipes by name, those in plain torch first.
RECIPES: dict[str, Recipe] = {
    "ppo": Recipe("ppo", "PPOConfig", "train_ppo", ".pt"),
    "sac-gru": Recipe("sac_gru", "SACGRUConfig", "train_sac_gru", ".pt"),
    **_family("sb3", "ppo a2c dqn sac td3 recurrent-ppo", "SB3Config", ".zip"),
    **_family("rllib", "ppo dqn sac impala appo", "RLlibConfig", ".pt"),
    **_family("benchmarl", "qmix vdn iql mappo ippo maddpg isac masac", "BenchMARLConfig", ".pt"),
}


def recipe_of(algo: str) -> Recipe:
    """The recipe of that name.

    Raises:
        UnknownNameError: there is none; the message lists those there are.
    """
    if algo not in RECIPES:
        raise UnknownNameError("recipe", algo, RECIPES)
    return RECIPES[algo]


def train(
    algo: str = "ppo",
    config: TrainingConfig | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    resume_from: str | os.PathLike[str] | None = None,
    callback: Callable[[Progress], bool | None] | None = None,
    tensorboard: bool = False,
    **changes: Any,
) -> TrainingResult:
    """Train with any recipe.

    Args:
        algo: its name, one of ``RECIPES``.
        config: of the recipe's class; None: the checkpoint's with ``resume_from``, else the defaults.
        out: the checkpoint's file, or a folder for it; None: keep nothing.
        resume_from: a checkpoint of the same recipe to go on with.
        callback: told the progress after every update; returning True stops the training.
        tensorboard: log to a folder ``tensorboard`` beside the checkpoint.
        changes: fields of the configuration over ``config``.

    Returns:
        The recipe's result, which has ``checkpoint`` and ``history``.

    Raises:
        UnknownNameError: for an unknown recipe or field.
        MissingExtraError: if its framework is not installed.
        CheckpointError: for a checkpoint that does not fit.
    """
    recipe = recipe_of(algo)
    if config is None:
        config = make_config(algo, changes, resume_from=resume_from)
    elif changes:
        config = replace(config, **check_settings(type(config), changes, f"the configuration of {algo!r}"))
    result: TrainingResult = recipe.load(recipe.train)(
        config, out=out, resume_from=resume_from, callback=callback, tensorboard=tensorboard
    )
    return result


def make_config(
    algo: str,
    changes: Mapping[str, Any] | None = None,
    *,
    resume_from: str | os.PathLike[str] | None = None,
    where: str | None = None,
) -> TrainingConfig:
    """The configuration of a recipe, with some fields changed.

    Args:
        algo: the recipe's name.
        changes: fields by name.
        resume_from: a checkpoint whose configuration is changed; None: the defaults.
        where: what an error names as the place of the fields.

    Raises:
        UnknownNameError: for an unknown recipe or field.
        InvalidOptionError: for a value of another type than the field's.
        CheckpointError: for a checkpoint of another recipe, or none.
        MissingExtraError: if the recipe's framework is not installed.
    """
    recipe = recipe_of(algo)
    kind: type[TrainingConfig] = recipe.load(recipe.config)
    changes = check_settings(kind, changes or {}, where or f"the configuration of {algo!r}")
    if "algorithm" in changes:
        raise InvalidOptionError(
            f"algorithm={changes['algorithm']!r} in {where or 'the configuration'}: the recipe {algo!r} says which"
        )
    if resume_from is not None:
        arguments = () if recipe.algorithm is None else (recipe.algorithm,)
        base = recipe.load("config_of")(resume_from, *arguments)
    else:
        base = None
        if recipe.algorithm is not None:
            changes = {"algorithm": recipe.algorithm} | changes
    shared = "replicas_per_seed"
    if "num_envs" in changes and shared not in changes and shared in _known(kind):
        # any number of replicas will do: share the flows among as many as go into it
        changes[shared] = math.gcd(getattr(base or kind(), shared), changes["num_envs"])
    if base is not None:
        made: TrainingConfig = replace(base, **changes)
        return made
    return kind(**changes)


def _known(kind: type[TrainingConfig]) -> dict[str, str]:
    """The fields of a configuration and their types, as they are written."""
    return {f.name: str(f.type) for f in fields(kind)}


def check_settings(kind: type[TrainingConfig], values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values, if a configuration has fields of these names and types.

    Raises:
        UnknownNameError, InvalidOptionError: naming ``where`` they come from.
    """
    known = _known(kind)
    for name, value in values.items():
        if name not in known:
            raise UnknownNameError("setting", name, known, where)
        if not _fits(value, known[name]):
            wanted = known[name].replace("bool", "true or false").replace(" | None", "")
            raise InvalidOptionError(f"{name} in {where} must be of type {wanted}, got {value!r}")
    return dict(values)


def _fits(value: Any, written: str) -> bool:
    """Whether a value is of a type as it is written in a dataclass."""
    kinds = {part.split("[")[0].strip() for part in written.split("|")}
    if "Any" in kinds:
        return True
    if value is None:
        # also an algorithm's own default
        return True
    if isinstance(value, bool):
        return "bool" in kinds
    if isinstance(value, int):
        return bool(kinds & {"int", "float"})
    if isinstance(value, (list, tuple)):
        return bool(kinds & {"tuple", "list", "Sequence"})
    if isinstance(value, Mapping):
        return bool(kinds & {"dict", "Mapping"})
    return type(value).__name__ in kinds or (isinstance(value, os.PathLike) and "Path" in kinds) or "Scenario" in kinds


def read_config(path: str | os.PathLike[str]) -> tuple[str | None, dict[str, Any]]:
    """The recipe's name (key ``algo``; None: not given) and the fields of its configuration from a TOML file.

    A scenario's file is looked for beside it.

    Raises:
        InvalidOptionError: for a file that cannot be read.
        UnknownNameError: for an unknown recipe; fields are looked at by :func:`make_config`.
    """
    file, values = read_toml(path)
    algo = values.pop("algo", None)
    if algo is not None:
        recipe_of(algo)
    if "seconds" in values:
        # TOML has no null: a budget in the file is all of it
        values.setdefault("total_steps", None)
    scenario = values.get("scenario")
    if isinstance(scenario, str) and (file.parent / scenario).is_file():
        values["scenario"] = str(file.parent / scenario)
    return algo, values


def to_toml(algo: str, config: TrainingConfig) -> str:
    """A configuration as a TOML file, from which :func:`read_config` and :func:`make_config` make an equal one.

    Raises:
        InvalidOptionError: if a part of it is a Python object.
        MissingExtraError: without tomli-w.
    """
    try:
        import tomli_w
    except ModuleNotFoundError as error:
        raise MissingExtraError("tomli_w", "train", "writing TOML") from error
    plain = plain_config(config)
    for name in ("scenario", "reward_type"):
        if plain[name] is None and getattr(config, name) is not None:
            raise InvalidOptionError(f"{name} is a Python object, which TOML cannot hold: {getattr(config, name)!r}")
    plain.pop("algorithm", None)
    # TOML has no null: a key left out is None
    return tomli_w.dumps({"algo": algo} | {name: value for name, value in plain.items() if value is not None})


def algo_of(checkpoint: str | os.PathLike[str]) -> str:
    """The name of the recipe that wrote a checkpoint.

    Raises:
        CheckpointError: if it is none of a recipe.
        MissingExtraError: if it takes a framework that is not installed to tell.
    """
    path = Path(checkpoint)
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist")
    if path.suffix == ".zip":
        from .sb3 import config_of

        return f"sb3-{config_of(path).algorithm}"
    return str(read_checkpoint(path)["algo"])
