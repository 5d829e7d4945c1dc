"""Flows per row, from what processes that come and go count: :class:`FlowCounters`, :class:`ProcessFlows`."""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray


class FlowCounters:
    """Flows that started, completed and failed, by row, since the driver started.

    A proxy's threads count on while it is read, so what it shows may be off by the flows of that moment. Here nothing
    goes back, and ``started = completed + failed + open`` holds in every row.

    Attributes:
        open: int64[N].
    """

    def __init__(self) -> None:
        self.open = np.zeros(0, np.int64)
        self._ended = np.zeros(0, np.int64)  # as counted
        self._failures = np.zeros(0, np.int64)  # as counted
        self._started = np.zeros(0, np.int64)
        self._completed = np.zeros(0, np.int64)
        self._failed = np.zeros(0, np.int64)

    def count(self, row: int, ended: int, failed: int) -> None:
        """Flows of a row that have ended since the last call, ``failed`` of them in failure."""
        self._grow(row + 1)
        self._ended[row] += ended
        self._failures[row] += failed

    def update(self, open_flows: NDArray[np.int64]) -> None:
        """Open flows now, int64[N]."""
        self._grow(len(open_flows))
        n = len(self._ended)
        is_open = np.zeros(n, np.int64)
        is_open[: len(open_flows)] = open_flows
        before = self._completed + self._failed
        ended = np.maximum(before, self._ended)
        self._started = np.maximum(self._started, ended + is_open)
        ended = self._started - is_open
        # Of flows that have only just ended: one that was counted as completed does not fail later.
        self._failed = np.maximum(self._failed, np.minimum(self._failures, ended - self._completed))
        self._completed = ended - self._failed
        self.open = is_open

    def values(self, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Started, completed and failed, int64[count] each, as of the last :meth:`update`."""
        self._grow(count)
        return self._started[:count].copy(), self._completed[:count].copy(), self._failed[:count].copy()

    def _grow(self, count: int) -> None:
        more = count - len(self._ended)
        if more > 0:
            names = ("open", "_ended", "_failures", "_started", "_completed", "_failed")
            for name in names:
                setattr(self, name, np.concatenate([getattr(self, name), np.zeros(more, np.int64)]))


class Counted(Protocol):
    """A server as one process has counted.

    Attributes:
        name: of the server.
        open: flows it has, or that wait for it.
        ended: flows that it had and has no more, since the process began.
        failed: those of them that failed.
        attempts: to begin a flow, since the process began.
    """

    name: str
    open: int
    ended: int
    failed: int
    attempts: int


C = TypeVar("C", bound=Counted)


class ProcessFlows(Generic[C]):
    """What was counted of a process.

    Attributes:
        servers: by name, as of the last look.
        unrouted: flows that found no server, likewise.
        stopping: likewise.
    """

    def __init__(self, unrouted: int = 0) -> None:
        self.servers: dict[str, C] = {}
        self.unrouted, self.stopping = unrouted, False

    def more(self, server: C) -> tuple[int, int]:
        """Flows that have ended, and failed, since the last look."""
        last = self.servers.get(server.name)
        self.servers[server.name] = server
        if last is None:
            return server.ended, server.failed
        if server.attempts < last.attempts:
            # An operator has cleared the counters, or the server is a new one of the same name.
            return 0, 0
        ended, failed = server.ended - last.ended, server.failed - last.failed
        # Between an attempt that fails and the next, a flow has not ended.
        server.ended, server.failed = max(server.ended, last.ended), max(server.failed, last.failed)
        return max(0, ended), max(0, failed)
