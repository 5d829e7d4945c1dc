"""The networks of :mod:`lbgym.policies.networks`, where those who train networks of their own look for them."""

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
