"""Checkpoints of policies that other frameworks train: written in plain torch, they act without the framework.

A recipe whose framework has networks of its own hands over what the actor computes (a network of
:data:`lbgym.policies.networks.NETWORKS`), how its outputs become actions, and what the framework needs to resume.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium import spaces

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
        config: what it was trained with.
        algo: name of the recipe, such as "rllib-ppo".
        network: its name among ``lbgym.policies.networks.NETWORKS``; its input is the flat observation,
            float[B, N (1 + F)].
        arguments: keywords of the network's class.
        parameters: its ``state_dict``.
        kind: the kind of its actions.
        num_servers: N it was trained with.
        features: F, columns per server of an observation.
        squash: whether continuous actions are the hyperbolic tangent of the network's outputs.
        step: environment steps it was trained for.
        seconds: time it was trained for.
        trainer: tensors and plain data that resuming needs.

    Raises:
        FileWriteError: if the system refuses.
    """
    state = contents(
        algo=algo,
        config=plain_config(config),
        env_kwargs=config.observation_kwargs(),
        shapes={"features": features, "choices": kind.choices, "joint": kind.joint, "num_servers": num_servers},
        network=network,
        arguments=arguments,
        parameters=clone(dict(parameters)),
        squash=squash,
        step=step,
        seconds=seconds,
        trainer=trainer,
    )
    write_torch(path, state)


def space_text(space: spaces.Space[Any]) -> str:
    """A space in one line: NumPy prints bounds that differ between columns over many."""
    if isinstance(space, spaces.Box) and len(np.unique(space.low)) + len(np.unique(space.high)) > 2:
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
    # In older files the weights in force were no part of the observation, but the networks read them as now.
    there["features"] += saved["inputs"]["weights"]

    def shown(shapes: Mapping[str, Any]) -> str:
        return f" ({shapes['observation']} -> {shapes['action']})" if "observation" in shapes else ""

    for key in keys:
        if there[key] != here[key]:
            raise CheckpointError(
                f"checkpoint {os.fspath(path)} has {key}={there[key]}{shown(there)}, but the environment to train on "
                f"needs {key}={here[key]}{shown(here)}"
            )
