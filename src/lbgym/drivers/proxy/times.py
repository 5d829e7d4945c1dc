"""Flow completion times that a proxy logs: :class:`FlowTimes`, and the statistics of each server's."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import NDArray

from ...features import STATISTICS
from ...features.reservoir_kernel import CHANGED, META_SIZE, OVERWRITE, RESULT_SIZE, RNG, add_many, reservoir_features
from ..sharing import Shared

#: Samples kept of each server.
_SLOTS = 128
#: Weight of a sample per second of its age, as everywhere in lbgym.
_LOG_DECAY = float(np.log(0.9))


@dataclass(slots=True)
class FlowTimes:
    """Flows of one backend that have ended, as logged.

    Attributes:
        servers: name of each flow's server.
        seconds: FCT of each.
        received: when its line came, seconds on the monotonic clock.
        ended: flows that ended, by server, also those whose time says nothing.
        failed: those of them that the server did not answer or broke off.
    """

    servers: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    received: list[float] = field(default_factory=list)
    ended: dict[str, int] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)


class Log(Shared):
    """Flows of backends that have ended, noted in one thread and taken in another; shared by its users."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        #: Of those that somebody takes; a proxy may log those of others, too.
        self._flows: dict[str, FlowTimes] = {}
        self._received = 0

    @property
    def received(self) -> int:
        """Lines that have come."""
        with self._lock:
            return self._received

    def take(self, backend: str) -> FlowTimes:
        """The flows of a backend that have ended since the last call."""
        with self._lock:
            taken, self._flows[backend] = self._flows[backend], FlowTimes()
        return taken

    def _note_flow(self, backend: str, server: str, now: float, seconds: float | None, failed: bool) -> None:
        """A flow that has ended; for whoever holds the lock. ``seconds``: None if its time says nothing."""
        flows = self._flows.get(backend)
        if flows is None:
            return
        flows.ended[server] = flows.ended.get(server, 0) + 1
        if seconds is not None:
            flows.servers.append(server)
            flows.seconds.append(seconds)
            flows.received.append(now)
        elif failed:
            flows.failed[server] = flows.failed.get(server, 0) + 1

    @property
    def lost(self) -> int:
        """Lines that were sent and have not come, as far as the log itself shows."""
        return 0

    def share(self, *backends: str) -> Self:
        """For one more user, who closes it and takes the flows of these backends."""
        with self._lock:
            for backend in backends:
                self._flows.setdefault(backend, FlowTimes())
        return super().share()


class FctStatistics:
    """A reservoir of FCTs per row, and the five statistics drawn from each."""

    def __init__(self) -> None:
        self._values, self._weights = np.zeros((0, _SLOTS)), np.zeros((0, _SLOTS))
        self._meta = np.zeros((0, META_SIZE), np.int64)
        self._results = np.zeros((0, RESULT_SIZE))
        self.count, self.sum = 0, 0.0

    def add(self, flows: FlowTimes, rows: Mapping[str, int]) -> None:
        """Take in the FCTs of the servers that have ``rows``, in the order they came."""
        of = np.array([rows.get(name, -1) for name in flows.servers], np.int64)
        seconds, times = np.array(flows.seconds), np.array(flows.received)
        self.count += int((of >= 0).sum())
        self.sum += float(seconds[of >= 0].sum())
        for row in np.unique(of[of >= 0]).tolist():
            self._grow(row + 1)
            mine = of == row
            add_many(
                self._values[row], self._weights[row], self._meta[row], self._results[row],
                seconds[mine], times[mine], 1.0, OVERWRITE, _LOG_DECAY,
            )  # fmt: skip

    def statistics(self, count: int) -> NDArray[np.float32]:
        """float32[count, 5], seconds; 0 without a sample."""
        self._grow(count)
        for row in np.flatnonzero(self._meta[:, CHANGED]).tolist():
            reservoir_features(self._values[row], self._weights[row], self._meta[row], self._results[row])
        return self._results[:count, : len(STATISTICS)].astype(np.float32)

    def forget(self, row: int) -> None:
        """A row belongs to another server from now on."""
        if row < len(self._meta):
            self._meta[row, :RNG], self._results[row] = 0, 0.0

    def _grow(self, count: int) -> None:
        more = count - len(self._meta)
        if more <= 0:
            return
        meta = np.zeros((more, META_SIZE), np.int64)
        meta[:, RNG] = [secrets.randbits(63) for _ in range(more)]
        self._values = np.concatenate([self._values, np.zeros((more, _SLOTS))])
        self._weights = np.concatenate([self._weights, np.zeros((more, _SLOTS))])
        self._meta = np.concatenate([self._meta, meta])
        self._results = np.concatenate([self._results, np.zeros((more, RESULT_SIZE))])
