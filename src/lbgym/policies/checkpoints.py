"""Checkpoints: one file format for every recipe in plain torch, and the loader of all trained models.

A checkpoint is what ``torch.save`` writes of a dictionary of tensors and plain data:

* ``format`` ("lbgym-policy"), ``version``, and the versions of ``lbgym`` and ``torch`` that wrote it;
* ``algo``: the recipe; ``config``: its configuration; ``step`` and ``seconds``: how long it was trained;
* ``observation``, ``action``, ``environment``: the keys of ``LoadBalanceEnv`` that make its observations, its actions,
  and the rest of its environment;
* ``shapes``: ``features`` per server of an observation, ``choices`` per server, whether they are ``joint``,
  ``num_servers`` trained with;
* ``network``: its ``name`` among ``lbgym.policies.networks.NETWORKS``, ``arguments`` and ``parameters``;
* ``inputs``: the ``memory`` of the network's moving average (None: none), and whether it reads the ``weights`` in force
  beside the observation, as it did before ``observe_weights`` was a key of the environment;
* ``outputs``: whether to ``squash`` continuous actions by the hyperbolic tangent;
* ``trainer``: what resuming needs beyond that, in the recipe's own form. A policy acts without it.

Only tensors and plain data are unpickled. Acting needs NumPy alone, resuming needs torch.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, MissingExtraError, PolicyError
from .trained import TRAINED_SUFFIXES, TrainedPolicy

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "lbgym-policy"
VERSION = 1

_OBSERVATION_KEYS = (
    "observation", "features", "normalize", "use_ground_truth", "observe_weights", "observe_background",
    "observe_configured",
)  # fmt: skip
_ACTION_KEYS = ("action_type", "action_weights", "min_weight", "max_weight", "relative_to_configured")


def contents(
    *,
    algo: str,
    config: Mapping[str, Any],
    env_kwargs: Mapping[str, Any],
    shapes: Mapping[str, Any],
    network: str,
    arguments: Mapping[str, Any],
    parameters: Mapping[str, Tensor],
    memory: float | None = None,
    squash: bool = False,
    step: int,
    seconds: float,
    trainer: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Assemble a checkpoint; the module describes its keys.

    Args:
        algo: name of the recipe, such as "rllib-ppo".
        config: its configuration as plain data.
        env_kwargs: keys of the environment that the policy's observations and actions depend on.
        shapes: ``features`` F per server of an observation; ``choices`` K per server, whether they are
            ``joint``, ``num_servers`` it was trained with, and what else the recipe compares when it resumes. The
            network's outputs are [B, N K] logits, server by server; if joint [B, K^N] logits or values of all joint
            actions; and [B, N D] actions in [-1, 1], server by server, where there is nothing to choose among (K = 0);
            ``numbers`` D is 1 if left out.
        network: its name among ``lbgym.policies.networks.NETWORKS``.
        arguments: keywords of the network's class, plain data.
        parameters: its ``state_dict``.
        memory: share of the moving average of the inputs that a step keeps; None: the network reads none.
        squash: whether continuous actions are the hyperbolic tangent of the network's outputs.
        step: environment steps it was trained for.
        seconds: time it was trained for.
        trainer: tensors and plain data that resuming needs beyond that.
    """
    import torch

    from .. import __version__

    return {
        "format": FORMAT,
        "version": VERSION,
        "lbgym": __version__,
        "torch": str(torch.__version__),
        "algo": algo,
        "config": dict(config),
        **_split(env_kwargs),
        "shapes": dict(shapes),
        "network": {"name": network, "arguments": dict(arguments), "parameters": dict(parameters)},
        "inputs": {"weights": False, "memory": memory},
        "outputs": {"squash": squash},
        "step": step,
        "seconds": seconds,
        "trainer": dict(trainer or {}),
    }


def read_checkpoint(path: str | os.PathLike[str], algo: str | None = None) -> dict[str, Any]:
    """Read a checkpoint, also of an older format: its contents are given in the present one.

    Args:
        path: the file.
        algo: the recipe that must have written it; None: any.

    Raises:
        CheckpointError: if the file is missing, empty, damaged, no checkpoint, of a newer version or of another recipe.
        MissingExtraError: without torch.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        raise MissingExtraError("torch", "train", f"resuming the checkpoint {os.fspath(path)!r}") from error

    def load(content: bytes) -> Any:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)

    return _read(path, load, algo)


def _read(path: str | os.PathLike[str], load: Callable[[bytes], Any], algo: str | None = None) -> dict[str, Any]:
    """Read a checkpoint by ``load``, which makes its tensors torch's or NumPy's."""
    where = f"checkpoint {os.fspath(path)}"
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"{where} does not exist") from error
    except OSError as error:
        raise CheckpointError(f"{where} cannot be read: {error.strerror or error}") from error
    if not content:
        raise CheckpointError(f"{where} is empty: whatever wrote it did not finish")
    try:
        saved = load(content)
    except Exception as error:
        raise CheckpointError(f"{where} cannot be read: it is damaged, or was not written by torch.save") from error
    found = saved.get("format") if isinstance(saved, dict) else type(saved).__name__
    if not isinstance(saved, dict) or (found != FORMAT and found not in _OLDER):
        raise CheckpointError(f"{where} is not an lbgym checkpoint: its format is {found}")
    # Formats that are no longer written ended at version 1.
    reads = VERSION if found == FORMAT else 1
    if saved.get("version") != reads:
        raise CheckpointError(
            f"{where} has format version {saved.get('version')}, written by lbgym {saved.get('lbgym')}; this lbgym "
            f"reads version {reads}"
        )
    try:
        saved = saved if found == FORMAT else _OLDER[str(found)](saved)
        missing = next((key for key in _SECTIONS if key not in saved), None)
    except KeyError as error:
        missing = str(error.args[0])
    if missing is not None:
        raise CheckpointError(f"{where} is damaged: it has no {missing!r}")
    if algo is not None and saved["algo"] != algo:
        raise CheckpointError(f"{where} was trained by recipe {saved['algo']!r}, not by {algo!r}")
    return saved


def load_policy(
    path: str | os.PathLike[str],
    *,
    deterministic: bool = True,
    seed: int | None = None,
    env_kwargs: Mapping[str, Any] | None = None,
    algorithm: Any = None,
) -> TrainedPolicy:
    """A trained model from its file; ``LoadBalanceEnv(**policy.env_kwargs, scenario=...)`` makes its environment.

    Load only .zip files that you trust: those of Stable-Baselines3 hold pickled code.

    Args:
        path: ``.pt`` of ``lbgym train``, or ``.zip`` of Stable-Baselines3 (any algorithm; sb3-contrib's if installed).
        deterministic: the most likely action instead of a drawn one.
        seed: of drawn actions.
        env_kwargs: keys of the environment it was trained on, over those recorded in the file. What a .zip does not
            record is read from its spaces, and where these do not show weights or bounds the defaults are assumed.
        algorithm: Stable-Baselines3 class to load with, for a model that needs its own ``load``; None: the policy
            class recorded in the file.

    Raises:
        PolicyError: for a file that is missing or no trained model (:class:`~lbgym.errors.CheckpointError` for a .pt),
            or spaces that no lbgym environment has.
        MissingExtraError: for a .zip without torch or Stable-Baselines3.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no trained model at {str(path)!r}: the file does not exist")
    if path.suffix.lower() not in TRAINED_SUFFIXES:
        raise PolicyError(f"a trained model is a {' or '.join(TRAINED_SUFFIXES)} file, got {str(path)!r}")
    if path.suffix.lower() == ".zip":
        from .sb3 import load_sb3_policy

        return load_sb3_policy(
            path, deterministic=deterministic, seed=seed, env_kwargs=env_kwargs or {}, algorithm=algorithm
        )
    from .neural import POLICIES
    from .torch_files import load_arrays

    saved = _read(path, load_arrays)

    name = saved["network"]["name"]
    if name not in POLICIES:
        raise CheckpointError(f"checkpoint {path} has the unknown network {name!r}; known: {', '.join(POLICIES)}")
    return POLICIES[name](saved, deterministic=deterministic, seed=seed, path=path, env_kwargs=env_kwargs)


def _split(env_kwargs: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The sections ``observation``, ``action`` and ``environment``."""
    return {
        "observation": {k: v for k, v in env_kwargs.items() if k in _OBSERVATION_KEYS},
        "action": {k: v for k, v in env_kwargs.items() if k in _ACTION_KEYS},
        "environment": {k: v for k, v in env_kwargs.items() if k not in _OBSERVATION_KEYS + _ACTION_KEYS},
    }


_SECTIONS = (
    "algo", "config", "observation", "action", "environment", "shapes", "network", "inputs", "outputs", "step",
    "seconds", "trainer",
)  # fmt: skip


# Formats of lbgym before one format served all recipes.


def _from_older(saved: Mapping[str, Any], algo: str, **sections: Any) -> dict[str, Any]:
    """An older file's contents in the present format; ``sections`` are those that differ by recipe."""
    kept = {key: saved[key] for key in ("lbgym", "torch", "config", "shapes", "step", "seconds")}
    return {"format": FORMAT, "version": VERSION, "algo": algo, **kept, **_split(saved["env_kwargs"]), **sections}


def _from_ppo(saved: Mapping[str, Any]) -> dict[str, Any]:
    shapes, memory = saved["shapes"], saved["config"]["memory"]
    # The inputs, with the weights in force, and their moving average.
    arguments = {"features": 2 * (shapes["features"] + 1), "hidden": shapes["hidden"], "choices": shapes["choices"]}
    return _from_older(
        saved,
        "ppo",
        network={"name": "actor-critic", "arguments": arguments, "parameters": saved["network"]},
        inputs={"weights": True, "memory": memory},
        outputs={"squash": False},
        trainer={key: saved[key] for key in ("optimiser", "generator", "iteration", "episode")},
    )


def _from_sac_gru(saved: Mapping[str, Any]) -> dict[str, Any]:
    shapes = saved["shapes"]
    arguments = {"features": shapes["features"] + 1, "hidden": shapes["hidden"], "choices": shapes["choices"]}
    acts = {name: value for name, value in saved["agent"].items() if name.startswith(("actor.", "moments."))}
    learns = {name: value for name, value in saved["agent"].items() if name not in acts}
    return _from_older(
        saved,
        "sac-gru",
        network={"name": "recurrent", "arguments": arguments, "parameters": acts},
        inputs={"weights": True, "memory": None},
        outputs={"squash": False},
        trainer={"agent": learns} | {key: saved[key] for key in ("optimisers", "generator", "episode")},
    )


def _from_exported(saved: Mapping[str, Any]) -> dict[str, Any]:
    return _from_older(
        saved,
        saved["algo"],
        network=saved["network"],
        inputs={"weights": saved["sees_weights"], "memory": None},
        outputs={"squash": saved["squash"]},
        trainer=saved["trainer"],
    )


_OLDER: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "lbgym-ppo": _from_ppo,
    "lbgym-sac-gru": _from_sac_gru,
    "lbgym-exported": _from_exported,
}
