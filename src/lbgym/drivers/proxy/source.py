"""A backend of a proxy as a data plane: :class:`ProxySource`."""

from __future__ import annotations

import logging
import time
from collections.abc import Container, Hashable, Iterable, Mapping, Sequence
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from ...features import FEATURE_NAMES, NUM_FEATURES
from ...sharedmemory import Publication
from ..base import ServerRow, Source
from ..config import ServerConfig
from ..discovery import Slots
from .counters import Counted, FlowCounters, ProcessFlows
from .processes import Process
from .times import FctStatistics, Log
from .weights import whole_weights

logger = logging.getLogger("lbgym")

#: Seconds between warnings of one kind.
_WARN = 10.0
#: Columns that a log gives.
TIMES = tuple(name for name in FEATURE_NAMES if name.startswith("fct_"))
#: Columns that are measured with, and without, a log.
LOGGED, UNLOGGED = ("n_flow_on", *TIMES), ("n_flow_on",)

C = TypeVar("C", bound=Counted)


class ProxySource(Source, Generic[C]):
    """What backends of proxies have in common: rows by server, counters, FCTs from a log, whole weights by name.

    A subclass implements :meth:`_observe` and :meth:`_install`.

    Args:
        backend: in the proxy's own words.
        log: where its log comes in; None: no FCTs.
        capacity: rows there is room for.
    """

    #: The proxy's word for a backend.
    kind = "backend"

    def __init__(self, backend: str, log: Log | None, capacity: int) -> None:
        self.backend, self._log = backend, log and log.share(backend)
        self._slots = Slots(capacity)
        self._counters, self._fct = FlowCounters(), FctStatistics()
        self._unrouted = 0
        self._before: dict[Hashable, ProcessFlows[C]] = {}
        self._weights = np.zeros(0)
        #: True where nothing but the log says which flows there were: none is known before its end.
        self._counts_by_log = False
        #: Flows that have ended, by the log.
        self._logged = 0
        self._lost, self._next_warning = 0, 0.0

    def _observe(self, now: float) -> None:
        """Find out which servers there are, and count their flows.

        Raises:
            DriverError: if the proxy does not answer.
        """
        raise NotImplementedError

    def _install(self) -> None:
        """Have the weights in force that were applied, wherever the proxy has others.

        Raises:
            DriverError: if the proxy does not take them.
        """
        raise NotImplementedError

    def servers(self) -> Sequence[ServerRow]:
        return self._slots.rows

    def read(self, now: float) -> Publication:
        self._observe(now)
        self._install()
        if self._log is not None:
            self._take_times(self._log)
        n = len(self._slots)
        started, completed, failed = self._counters.values(n)
        stats = np.zeros((n, NUM_FEATURES), np.float32)
        stats[:, 0] = self._counters.open[:n]
        stats[:, 1:6] = self._fct.statistics(n)
        return Publication(
            timestamp=now,
            active=self._slots.active,
            stats=stats,
            started=started,
            completed=completed,
            rejected=np.zeros(n, np.int64),
            failed=failed,
            unrouted=self._unrouted,
            fct_count=self._fct.count,
            fct_sum=self._fct.sum,
        )

    def apply(self, weights: NDArray[np.float64], now: float) -> None:
        self._weights = weights.copy()
        # It may have restarted since the last look, and would be asked in vain.
        self._observe(now)
        self._install()

    @property
    def lost_lines(self) -> int:
        """Log lines that have not come, or that the proxy could not send."""
        return 0 if self._log is None else self._log.lost

    def counts(self) -> Mapping[str, int]:
        return {} if self._log is None else {"lost_log_lines": self.lost_lines}

    # Rows

    def _rows(self) -> dict[str, int]:
        """Rows by the server's name."""
        return {slot.server.name: slot.index for slot in self._slots}

    def _logged_rows(self) -> Mapping[str, int]:
        """Rows by the server's name in the log."""
        return self._rows()

    def _update(self, servers: Iterable[ServerConfig]) -> None:
        """Take over a list of servers."""
        changes = self._slots.update(servers)
        if changes and self._before:
            logger.info("%s %r: %s", self.kind, self.backend, changes)

    def _take_times(self, log: Log) -> None:
        flows, rows = log.take(self.backend), self._logged_rows()
        self._fct.add(flows, rows)
        self._logged += sum(flows.ended.values())
        if self._counts_by_log:
            for name, ended in flows.ended.items():
                if name in rows:
                    self._counters.count(rows[name], ended, flows.failed.get(name, 0))
            self._counters.update(np.zeros(len(self._slots), np.int64))
        lost, now = self.lost_lines, time.monotonic()
        if lost > self._lost and now >= self._next_warning:
            logger.warning("%s", self._loss(lost, log.received))
            self._lost, self._next_warning = lost, now + _WARN

    def _loss(self, lost: int, received: int) -> str:
        """A sentence on log lines that are lost."""
        raise NotImplementedError

    # Counting

    def _count(self, founds: Sequence[tuple[Process, Mapping[str, C], int]], *, began: bool = True) -> None:
        """Count the flows of all processes.

        Args:
            founds: of each process its servers by name, and flows that found no server.
            began: count all that a process has done that was not known before; False: from now on.
        """
        living = {process.identity for process, _, _ in founds}
        rows = self._rows()
        for identity in [identity for identity in self._before if identity not in living]:
            self._part_from(self._before.pop(identity), rows)
        total = np.zeros(len(self._slots), np.int64)
        for process, servers, unrouted in founds:
            seen = self._before.get(process.identity)
            count = began or seen is not None
            if seen is None:
                seen = self._before[process.identity] = ProcessFlows(0 if began else unrouted)
            seen.stopping = process.stopping
            for name, server in servers.items():
                row = rows.get(name)
                if row is not None:
                    more = seen.more(server)
                    if count:
                        self._counters.count(row, *more)
                    total[row] += server.open
            self._unrouted += max(0, unrouted - seen.unrouted)
            seen.unrouted = unrouted
        self._release(total.tolist())
        self._counters.update(total[: len(self._slots)])

    def _release(self, open_flows: Sequence[int]) -> None:
        """Free the rows of removed servers without open flows, given by row."""
        for slot in self._slots.release(open_flows):
            self._fct.forget(slot.index)

    def _part_from(self, seen: ProcessFlows[C], rows: Mapping[str, int]) -> None:
        """A process has ended: one that was stopping when its flows had, another has taken them with it."""
        for name, last in seen.servers.items():
            if name in rows:
                self._counters.count(rows[name], last.open, 0 if seen.stopping else last.open)

    # Acting

    def _scaled(self, weights: NDArray[np.float64], safe: NDArray[np.float64]) -> NDArray[np.float64]:
        """Weights, float64[N], in the proportions of those given, as the proxy likes them best."""
        return weights

    def _whole(self, names: Container[str], top: int) -> dict[str, int]:
        """Whole weights by server, from 0 to ``top``, of the servers that the proxy has."""
        slots = [slot for slot in self._slots if slot.server.name in names and not slot.removed]
        safe = np.array([slot.server.safe_weight for slot in slots])
        weights = np.array(
            [self._weights[slot.index] if slot.index < len(self._weights) else safe[i] for i, slot in enumerate(slots)]
        )
        takes = np.array([slot.active for slot in slots], np.bool_)
        weights = self._scaled(weights, safe)
        # An operator who gives a server the weight 0 wants it to have no flows.
        weights[safe == 0.0] = 0.0
        if not weights[takes].any():
            weights = np.where(takes & (safe > 0.0), 1.0, weights)
        whole = whole_weights(weights, top).tolist()
        return {slot.server.name: weight for slot, weight in zip(slots, whole, strict=True)}


__all__ = ["LOGGED", "TIMES", "UNLOGGED", "ProxySource"]
