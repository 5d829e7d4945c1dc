"""The data plane as a controller uses it: :class:`ControlledDataPlane`, and one that is only looked at."""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from ..dataplanes.live import SharedMemoryDataPlane
from ..sharedmemory import SharedMemoryRegion
from ..snapshot import Snapshot


class ControlledDataPlane(SharedMemoryDataPlane):
    """A live data plane whose weights can be written, and whose observations awaited, each without the other.

    Attributes:
        grows: whether servers that join are observed and given weights, too.
    """

    grows = False

    @property
    def published_at(self) -> int:
        """When the last observation was published, ns of the monotonic clock."""
        return self._buffer.published_at

    @property
    def written_at(self) -> int:
        """When the last action was written, ns of the monotonic clock."""
        return self._written_at

    @property
    def known_servers(self) -> int:
        """Servers that the data plane had in the last observation."""
        return self._buffer.num_servers

    def last(self) -> Snapshot:
        """The last observation again."""
        return self._buffer.snapshot(self.num_servers)

    def write(self, weights: NDArray[np.float64]) -> None:
        """Write float[N] weights now; nothing is waited for."""
        self._write(weights, self._action_id + 1)
        self._action_id += 1

    def wait(self) -> Snapshot:
        """The next observation. No weights are written meanwhile, also not for a producer that takes over.

        Raises:
            DataPlaneTimeout: if nothing is published in time.
            RegionFormatError: if the data plane publishes what is no observation.
        """
        self._weights = None
        return self.reset()

    def _observed(self, action_id: int, missed: int, late: int) -> Snapshot:
        if self.grows:
            self.num_servers = max(self.num_servers, self._buffer.num_servers)
        return super()._observed(action_id, missed, late)


class ObservedDataPlane(ControlledDataPlane):
    """A live data plane that is only looked at: no lock is taken and nothing is written."""

    def _attach(self, timeout: float) -> SharedMemoryRegion:
        return SharedMemoryRegion.attach(self.name, timeout=timeout, live=True, read_only=True)

    def _write(self, weights: NDArray[np.float64], sequence_id: int) -> None:
        self._written_at = time.monotonic_ns()

    def withdraw(self) -> None:
        """Nothing is to be given up."""
