"""All recipes by name, such as "ppo", "sb3-dqn" or "benchmarl-qmix", and their configurations as TOML files.

Nothing here needs a framework; the recipe's module is imported when it trains.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from importlib import import_module
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Protocol, Union, get_args, get_origin, get_type_hints

from ..errors import CheckpointError, InvalidOptionError, MissingExtraError, UnknownNameError
from ..policies.checkpoints import read_checkpoint
from ..toml_files import read_toml
from .config import TrainingConfig, check_field_names, plain_config, saved_config

if TYPE_CHECKING:
    from .runs import Callback, Progress


class TrainingResult(Protocol):
    """The part of a recipe's result that all recipes share; each adds its policy or model."""

    @property
    def checkpoint(self) -> Path | None:
        """The last checkpoint; None without ``out``."""

    @property
    def history(self) -> list[Progress]:
        """The progress after every update."""


@dataclass(frozen=True)
class Recipe:
    """A recipe's place in this package.

    Attributes:
        module: of this package.
        config: name of its configuration's class.
        train: name of its function.
        suffix: of its checkpoints.
        algorithm: its name in the configuration; None: the recipe has only one.
    """

    module: str
    config: str
    train: str
    suffix: str
    algorithm: str | None = None

    def load(self, name: str) -> Any:
        """Load a name from its module.

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
    "cma-es": Recipe("cma_es", "CMAESConfig", "train_cma_es", ".pt"),
    "sac-gru": Recipe("sac_gru", "SACGRUConfig", "train_sac_gru", ".pt"),
    **_family("sb3", "ppo a2c dqn sac td3 recurrent-ppo", "SB3Config", ".zip"),
    **_family("rllib", "ppo dqn sac impala appo", "RLlibConfig", ".pt"),
    **_family("benchmarl", "qmix vdn iql mappo ippo maddpg isac masac", "BenchMARLConfig", ".pt"),
}


def recipe_of(algo: str) -> Recipe:
    """Look up a recipe.

    Raises:
        UnknownNameError: if it does not exist; the message lists those that do.
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
    callback: Callback | None = None,
    tensorboard: bool = False,
    **changes: Any,
) -> TrainingResult:
    """Train with any recipe.

    Args:
        algo: its name, one of ``RECIPES``.
        config: of the recipe's class; None: the checkpoint's with ``resume_from``, else the defaults.
        out: the checkpoint's file, or a folder for it; None: keep nothing.
        resume_from: a checkpoint of the same recipe to continue.
        callback: receives the progress after every update; returning True stops the training.
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
    """Make the configuration of a recipe, with some fields changed.

    Args:
        algo: the recipe's name.
        changes: fields by name.
        resume_from: a checkpoint whose configuration is changed; None: the defaults.
        where: the place of the fields, as errors name it.

    Raises:
        UnknownNameError: for an unknown recipe or field.
        InvalidOptionError: for a value of another type than the field's.
        CheckpointError: if the file is no checkpoint of this recipe.
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
        base = config_of(resume_from, algo)
    else:
        base = None
        if recipe.algorithm is not None:
            changes = {"algorithm": recipe.algorithm} | changes
    shared = "replicas_per_seed"
    if "num_envs" in changes and shared not in changes and hasattr(kind, shared):
        # Any number of replicas will do: the flows are shared among as many as divide it.
        changes[shared] = math.gcd(getattr(base or kind(), shared), changes["num_envs"])
    if base is not None:
        made: TrainingConfig = replace(base, **changes)
        return made
    return kind(**changes)


def check_settings(kind: type[TrainingConfig], values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Check values for fields of a configuration by name and type; None stands for the default everywhere.

    Returns:
        The values.

    Raises:
        UnknownNameError: for a name that is no field, naming ``where`` it comes from.
        InvalidOptionError: for a value of another type, or a field by the name that it had before.
    """
    hints = get_type_hints(kind)
    known = {field.name: field.type for field in fields(kind)}
    check_field_names(kind, values, where)
    for name, value in values.items():
        if value is not None and not _fits(value, hints[name]):
            wanted = str(known[name]).replace("bool", "true or false").replace(" | None", "")
            raise InvalidOptionError(f"{name} in {where} must be of type {wanted}, got {value!r}")
    return dict(values)


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a value is of a type; TOML has lists for tuples, and whole numbers are also floats."""
    if hint is Any:
        return True
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    kind = get_origin(hint) or hint
    if isinstance(value, bool):
        return kind is bool
    also = {float: (float, int), tuple: (tuple, list), dict: (Mapping,)}
    return isinstance(value, also.get(kind, kind))


def read_config(path: str | os.PathLike[str]) -> tuple[str | None, dict[str, Any]]:
    """Read a recipe's name (key ``algo``; None: not given) and the fields of its configuration from a TOML file.

    A scenario's file is looked for beside it.

    Raises:
        InvalidOptionError: for a file that cannot be read.
        UnknownNameError: for an unknown recipe; :func:`make_config` checks the fields.
    """
    file, values = read_toml(path)
    algo = values.pop("algo", None)
    if algo is not None:
        recipe_of(algo)
    if "seconds" in values:
        # TOML has no null: a budget in the file is all of it.
        values.setdefault("total_steps", None)
    scenario = values.get("scenario")
    if isinstance(scenario, str) and (file.parent / scenario).is_file():
        values["scenario"] = str(file.parent / scenario)
    return algo, values


def to_toml(algo: str, config: TrainingConfig) -> str:
    """Write a configuration as TOML, from which :func:`read_config` and :func:`make_config` make an equal one.

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
    # TOML has no null: a key left out is None.
    return tomli_w.dumps({"algo": algo} | {name: value for name, value in plain.items() if value is not None})


def algo_of(checkpoint: str | os.PathLike[str]) -> str:
    """Return the name of the recipe that wrote a checkpoint.

    Raises:
        CheckpointError: if no recipe wrote it.
        MissingExtraError: if reading it takes a framework that is not installed.
    """
    return _recorded(Path(checkpoint))[0]


def config_of(checkpoint: str | os.PathLike[str], algo: str | None = None) -> TrainingConfig:
    """Return the configuration that a checkpoint was trained with.

    Args:
        checkpoint: its file.
        algo: the recipe that must have written it; None: any.

    Raises:
        CheckpointError: if another recipe or none wrote it, or part of the configuration had no plain form.
        MissingExtraError: if the recipe's framework is not installed.
    """
    found, plain = _recorded(Path(checkpoint))
    if algo not in (None, found):
        raise CheckpointError(f"checkpoint {os.fspath(checkpoint)} was trained by recipe {found!r}, not by {algo!r}")
    recipe = recipe_of(found)
    made: TrainingConfig = recipe.load(recipe.config)(**saved_config(plain, checkpoint))
    return made


def _recorded(path: Path) -> tuple[str, dict[str, Any]]:
    """Read a checkpoint's recipe and its configuration in plain form."""
    if path.suffix != ".zip":
        saved = read_checkpoint(path)
        return saved["algo"], saved["config"]
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist")
    from .sb3 import model_algo, read_model

    data = read_model(path)
    return model_algo(data), data["lbgym_config"]
