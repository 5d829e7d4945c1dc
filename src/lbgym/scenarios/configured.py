"""What an operator states of a cluster, as arrays: :class:`Configured`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .model import Scenario


@dataclass(frozen=True)
class Configured:
    """Weights and cores of the servers and the number of balancers, as an operator states them.

    Attributes:
        weights: float64[..., N], above 0; 1 for servers that do not exist.
        cores: float64[..., N], usable ones: no more than a server has workers; 1 for servers that do not exist.
        balancers: float64[...], m.
    """

    weights: NDArray[np.float64]
    cores: NDArray[np.float64]
    balancers: NDArray[np.float64]

    @classmethod
    def of(cls, scenario: Scenario | None, num_servers: int, balancers: int = 1) -> Configured:
        """Of a scenario with up to N servers; None: nothing is known, weights and cores are 1.

        Args:
            scenario: states it all.
            num_servers: N.
            balancers: m where there is no scenario.
        """
        weights, cores = np.ones(num_servers), np.ones(num_servers)
        if scenario is not None:
            balancers = scenario.balancers
            known = min(num_servers, scenario.num_servers)
            weights[:known] = scenario.configured_weights[:known]
            cores[:known] = [server.usable_cores for server in scenario.servers[:known]]
        return cls(weights, cores, np.float64(balancers) * np.ones(()))

    @classmethod
    def stack(cls, parts: Sequence[Configured]) -> Configured:
        """Several with a new leading axis."""
        return cls(
            np.stack([part.weights for part in parts]),
            np.stack([part.cores for part in parts]),
            np.stack([part.balancers for part in parts]),
        )

    def index(self, weights: NDArray[np.float64], background: NDArray[np.float64]) -> NDArray[np.float64]:
        """Weights and background loads [..., N] as shared memory has them: speed per core and flows, [..., N, 2]."""
        return np.stack([weights / self.cores, background], axis=-1)
