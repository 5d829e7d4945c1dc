"""Public import path of the networks of :mod:`lbgym.policies.networks`, for training with other frameworks."""

from __future__ import annotations

from ..policies.networks import (
    MLP,
    NETWORKS,
    EquivariantNetwork,
    FlatServerNetwork,
    Moments,
    RecurrentNetwork,
    ServerEncoder,
    ServerHead,
    ServerNetwork,
)

__all__ = [
    "MLP",
    "NETWORKS",
    "EquivariantNetwork",
    "FlatServerNetwork",
    "Moments",
    "RecurrentNetwork",
    "ServerEncoder",
    "ServerHead",
    "ServerNetwork",
]
