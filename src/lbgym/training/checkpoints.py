"""Writing checkpoints, and checking them against the environment to train on.

A recipe whose framework has networks of its own writes its actor as one of ours
(:data:`lbgym.policies.networks.NETWORKS`), so that the policy acts without the framework.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium.spaces import Box, Space

from ..errors import CheckpointError
from ..policies.action_kind import ActionKind
from ..policies.checkpoints import contents
from .config import TrainingConfig, plain_config
from .runs import clone, write_torch

if TYPE_CHECKING:
    from torch import Tensor


def write_policy(
    path: Path,
    config: TrainingConfig,
    *,
    algo: str,
    network: str,
    arguments: Mapping[str, Any],
    parameters: Mapping[str, Tensor],
    kind: ActionKind,
    num_servers: int,
    features: int,
    squash: bool = False,
    step: int,
    seconds: float,
    trainer: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint, whole or not at all.

    Args:
        path: the file, ending in .pt.
        config: of the training.
        algo: name of the recipe, such as "rllib-ppo".
        network: its name among ``lbgym.policies.networks.NETWORKS``; its input is the flat observation,
            float[B, N (1 + F)].
        arguments: keywords of the network's class.
        parameters: its ``state_dict``.
        kind: the kind of its actions.
        num_servers: N it was trained with.
        features: F, columns per server of an observation.
        squash: continuous actions are the hyperbolic tangent of the network's outputs.
        step: environment steps it was trained for.
        seconds: time it was trained for.
        trainer: tensors and plain data for resuming.

    Raises:
        FileWriteError: if the file cannot be written.
    """
    state = contents(
        algo=algo,
        config=plain_config(config),
        env_kwargs=config.observation_kwargs(),
        shapes=network_shapes(kind, num_servers, features),
        network=network,
        arguments=arguments,
        parameters=clone(dict(parameters)),
        squash=squash,
        step=step,
        seconds=seconds,
        trainer=trainer,
    )
    write_torch(path, state)


def network_shapes(
    kind: ActionKind,
    num_servers: int,
    features: int,
    *,
    hidden: int | None = None,
    spaces: tuple[Space[Any], Space[Any]] | None = None,
) -> dict[str, Any]:
    """Describe the shapes of a policy's networks, for a checkpoint and for :func:`check_shapes`.

    Args:
        kind: of its actions.
        num_servers: N.
        features: F, columns per server of an observation.
        hidden: width of the layers; None: left out.
        spaces: of observations and actions, which messages show; None: left out.
    """
    shapes: dict[str, Any] = {
        "features": features,
        "choices": kind.choices,
        "joint": kind.joint,
        "numbers": kind.numbers,
        "num_servers": num_servers,
    }
    if hidden is not None:
        shapes["hidden"] = hidden
    return shapes if spaces is None else shapes | {"observation": _in_one_line(spaces[0]), "action": str(spaces[1])}


def _in_one_line(space: Space[Any]) -> str:
    """A space as text; NumPy prints bounds that differ between columns over many lines."""
    if isinstance(space, Box) and len(np.unique(space.low)) + len(np.unique(space.high)) > 2:
        return f"Box({space.shape}, {space.dtype})"
    return str(space)


def check_shapes(
    saved: Mapping[str, Any], path: str | os.PathLike[str], here: Mapping[str, Any], keys: Sequence[str]
) -> None:
    """Check that a checkpoint, read from ``path``, fits the environment to train on.

    Args:
        saved: the checkpoint's content, with its ``shapes``.
        path: its file.
        here: the shapes needed, by name, and where known the spaces as texts, ``observation`` and ``action``.
        keys: names of those that must be equal.

    Raises:
        CheckpointError: naming both, for the first one that differs.
    """
    there = dict(saved["shapes"])
    # In older files the weights in force were not part of the observation, but the networks read them as now.
    there["features"] += saved["inputs"]["weights"]
    # Those that do not say it act by one number per server.
    there.setdefault("numbers", 1)

    def shown(shapes: Mapping[str, Any]) -> str:
        return f" ({shapes['observation']} -> {shapes['action']})" if "observation" in shapes else ""

    for key in keys:
        if there[key] != here[key]:
            raise CheckpointError(
                f"checkpoint {os.fspath(path)} has {key}={there[key]}{shown(there)}, but the environment to train on "
                f"needs {key}={here[key]}{shown(here)}"
            )
