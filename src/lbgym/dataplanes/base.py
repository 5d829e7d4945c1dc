"""What an environment steps: the :class:`DataPlane` protocol."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ..scenarios import Scenario
from ..snapshot import Snapshot


@runtime_checkable
class DataPlane(Protocol):
    """Anything that moves flows by weights: simulated, or real behind shared memory."""

    num_servers: int
    #: What it tells of the last reset or step beyond the snapshot; the environment adds it to ``info``.
    info: dict[str, Any]

    @property
    def scenario(self) -> Scenario | None:
        """What is known to run there since the last reset; None for a real data plane."""

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None) -> Snapshot:
        """Begin an episode and return the first snapshot."""

    def step(self, weights: NDArray[np.float64]) -> Snapshot:
        """Apply float[N] weights, let one control interval pass, return the newest snapshot."""

    def close(self) -> None:
        """Release what the data plane holds; idempotent."""
