"""Policies trained by other frameworks, as checkpoints in plain torch: they act without the framework.

A recipe whose framework has networks of its own hands over what the actor computes (:class:`MLP`, or a
:class:`~lbgym.training.networks.FlatServerNetwork`), how its outputs become actions, and what the framework needs to go
on with the training.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError, MissingExtraError

try:
    import torch
    from torch import Tensor, nn
except ModuleNotFoundError as error:
    raise MissingExtraError("torch", "train", "policies in plain torch") from error

from .config import TrainingConfig, plain_config
from .networks import ActionKind, FlatServerNetwork, server_inputs
from .runs import clone, read_format, write_torch

FORMAT = "lbgym-exported"
VERSION = 1

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "linear": nn.Identity}


class MLP(nn.Sequential):
    """Dense layers.

    Args:
        sizes: widths, from the inputs to the outputs.
        activation: after each layer but the last: a name of ``ACTIVATIONS``.
    """

    def __init__(self, sizes: Sequence[int], activation: str = "tanh") -> None:
        layers: list[nn.Module] = []
        for i in range(len(sizes) - 1):
            layers.append(nn.Linear(sizes[i], sizes[i + 1]))
            if i < len(sizes) - 2:
                layers.append(ACTIVATIONS[activation]())
        super().__init__(*layers)


#: Networks by the name that a checkpoint has for them; their keywords are plain data.
NETWORKS = {"mlp": MLP, "equivariant": FlatServerNetwork}


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
    sees_weights: bool,
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
        network: a name of ``NETWORKS``, whose input is the flat observation, float[B, N (1 + F)].
        arguments: keywords of the network's class.
        parameters: its ``state_dict``.
        kind: how its outputs are actions: [B, N K] logits, server by server, of ``kind.choices`` levels each; with
            ``kind.joint`` [B, K^N] logits or values of all joint actions; and [B, N] actions in [-1, 1] where there is
            nothing to choose among.
        num_servers: N it was trained with.
        features: F, without the weights in force.
        sees_weights: whether each server's features end with the logarithm of its weight in force, as
            :func:`~lbgym.training.networks.server_inputs` gives it; the input is then float[B, N (2 + F)].
        squash: whether continuous actions are the hyperbolic tangent of the network's outputs.
        step: environment steps it was trained for.
        seconds: time it was trained for.
        trainer: tensors and plain data that resuming needs.
    """
    from .. import __version__

    state = {
        "format": FORMAT,
        "version": VERSION,
        "lbgym": __version__,
        "torch": str(torch.__version__),
        "algo": algo,
        "config": plain_config(config),
        "env_kwargs": config.observation_kwargs(),
        "shapes": {"features": features, "choices": kind.choices, "joint": kind.joint, "num_servers": num_servers},
        "sees_weights": sees_weights,
        "squash": squash,
        "network": {"name": network, "arguments": dict(arguments), "parameters": clone(dict(parameters))},
        "step": step,
        "seconds": seconds,
        "trainer": dict(trainer or {}),
    }
    write_torch(path, state)


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint; only tensors and plain data are unpickled.

    Raises:
        CheckpointError: if the file is missing, is no checkpoint of this format or is of another version.
    """
    return read_format(path, {FORMAT: VERSION})


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
    there = saved["shapes"]

    def spaces(shapes: Mapping[str, Any]) -> str:
        return f" ({shapes['observation']} -> {shapes['action']})" if "observation" in shapes else ""

    for key in keys:
        if there[key] != here[key]:
            raise CheckpointError(
                f"checkpoint {os.fspath(path)} has {key}={there[key]}{spaces(there)}, but the environment to train on "
                f"needs {key}={here[key]}{spaces(here)}"
            )


class ExportedPolicy:
    """A trained policy without memory: maps observations to actions.

    Attributes:
        env_kwargs: the environment keys it needs (observation layout, action type, levels, ...).
        config: what it was trained with, as plain data.
        step: environment steps it was trained for.
        algo: the recipe that trained it.
    """

    def __init__(self, state: dict[str, Any], *, deterministic: bool = True, seed: int | None = None) -> None:
        """Build from the content of a checkpoint; ``seed`` is for drawn actions (``deterministic=False``)."""
        shapes, network = state["shapes"], state["network"]
        self.env_kwargs: dict[str, Any] = dict(state["env_kwargs"])
        self.config: dict[str, Any] = dict(state["config"])
        self.step: int = state["step"]
        self.algo: str = state["algo"]
        self.deterministic = deterministic
        self.features: int = shapes["features"]
        self.kind = ActionKind(shapes["choices"], shapes["joint"])
        self.sees_weights: bool = state["sees_weights"]
        self.squash: bool = state["squash"]
        # dense layers are for the servers they were trained with, the others for any number
        self.num_servers: int | None = shapes["num_servers"] if network["name"] == "mlp" else None
        self.network = NETWORKS[network["name"]](**network["arguments"])
        self.network.load_state_dict(network["parameters"])
        self.network.requires_grad_(False)
        self._generator = torch.Generator()
        self._seed = seed
        self.reset()

    def reset(self) -> None:
        """Begin an episode; drawn actions start over from the seed."""
        if self._seed is not None:
            self._generator.manual_seed(self._seed)

    def act(self, observation: Any, info: Mapping[str, Any]) -> Any:
        """The action for a flat observation [N (1 + F)], or one per row of [R, N (1 + F)].

        ``info["weights"]`` are the weights in force, [N] or [R, N].

        Raises:
            CheckpointError: for an observation that is not the one it was trained on.
        """
        flat, weights = np.asarray(observation, np.float32), np.asarray(info["weights"])
        single = flat.ndim == 1
        n = weights.shape[-1]
        if flat.ndim not in (1, 2) or flat.shape[-1] != n * (1 + self.features) or self.num_servers not in (None, n):
            servers = f" of {self.num_servers} servers" if self.num_servers else ""
            raise CheckpointError(
                f"the policy was trained on flat observations{servers}, {1 + self.features} numbers per server, "
                f"got shape {flat.shape} for {n} servers"
            )
        rows = np.atleast_2d(flat)
        with torch.inference_mode():
            inputs = torch.from_numpy(np.ascontiguousarray(rows))
            if self.sees_weights:
                inputs = with_weights(inputs, np.atleast_2d(weights), self.features)
            choice = self._choose(self.network(inputs), n)
        actions = self.kind.encode(choice.numpy())
        return actions[0] if single else actions

    def _choose(self, out: Tensor, n: int) -> Tensor:
        """Choices [B, N] from the network's outputs."""
        if not self.kind.choices:
            return out.tanh() if self.squash else out
        logits = out if self.kind.joint else out.unflatten(-1, (n, self.kind.choices))
        if self.deterministic:
            index = logits.argmax(-1)
        else:
            flat = logits.reshape(-1, logits.shape[-1]).softmax(-1)
            index = torch.multinomial(flat, 1, generator=self._generator).view(logits.shape[:-1])
        if not self.kind.joint:
            return index
        # numbered together, the last server's varying fastest
        powers = self.kind.choices ** torch.arange(n - 1, -1, -1)
        return index.unsqueeze(-1) // powers % self.kind.choices


def with_weights(flat: Tensor, weights: Any, features: int) -> Tensor:
    """Flat observations [B, N (1 + F)] and weights in force [B, N] -> [B, N (2 + F)], still flat: mask, then features.

    The feature added to each server is that of :func:`~lbgym.training.networks.server_inputs`.
    """
    inputs, active = server_inputs(flat.numpy(), weights, features)
    return torch.cat([active.to(inputs.dtype), inputs.flatten(1)], -1)
