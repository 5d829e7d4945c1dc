"""A backend known by its agent-checks and its log alone: :class:`AgentCheckedBackend`."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ...features import FEATURE_NAMES, NUM_FEATURES
from ...sharedmemory import Publication, abi
from ..base import DriverError, ServerRow, Source
from ..config import ServerConfig
from ..discovery import Slots
from .agent_check import AgentCheck
from .counters import FlowCounters
from .logs import FctStatistics, FlowLog
from .weights import whole_weights

#: A server of which nobody has asked for so many of its intervals, and seconds, is down.
_SILENT_INTERVALS, _SILENT = 3.0, 3.0


class AgentCheckedBackend(Source):
    """A backend without any socket of HAProxy's: weights by agent-checks, FCTs by the log.

    The servers are those that ask, in one HAProxy or in several that balance over the same servers: their flows count
    together. FCTs alone are measured. Flows are counted when they end, so none is ever open here.

    Args:
        backend: name of the backend.
        log: where HAProxy's log lines come in.
        agent: answers agent-checks.
        configured: the weight that HAProxy's configuration gives to every server; percentages are of it, and HAProxy
            cuts off fractions, so that with 1, its own default, no weight below 1 could be set.
        wait: seconds to wait at the start for servers to ask.
        capacity: rows there is room for; None: 64.

    Raises:
        DriverError: if no server asks in time.
    """

    driver = "haproxy"
    features = tuple(name for name in FEATURE_NAMES if name.startswith("fct_"))

    def __init__(
        self,
        backend: str,
        *,
        log: FlowLog,
        agent: AgentCheck,
        configured: int = 100,
        wait: float = 10.0,
        capacity: int | None = None,
    ) -> None:
        self.backend, self._configured = backend, configured
        self._log, self._agent = log.share(), agent.share()
        self._counters, self._fct = FlowCounters(), FctStatistics()
        self._slots = Slots(capacity or abi.DEFAULT_CAPACITY)
        self._weights = np.zeros(0)
        self._closed = False
        try:
            self._await_servers(wait)
        except BaseException:
            self.close()
            raise

    def _await_servers(self, wait: float) -> None:
        """Until every server that has asked has done so twice, and so there is none that has not asked yet."""
        until = time.monotonic() + wait
        while time.monotonic() < until:
            asked = self._agent.asked(self.backend)
            if asked and all(interval > 0.0 for _, interval in asked.values()):
                break
            time.sleep(0.02)
        self._refresh()
        if not any(slot.server.name for slot in self._slots):
            raise DriverError(
                f"no server of backend {self.backend!r} has asked the agent within {wait:g} s: HAProxy's servers need "
                f"agent-check, agent-addr, agent-port and agent-send '{self.backend}/NAME\\n'"
            )

    def servers(self) -> Sequence[ServerRow]:
        return self._slots.rows

    def read(self, now: float) -> Publication:
        self._refresh()
        flows = self._log.take(self.backend)
        rows = {slot.server.name: slot.index for slot in self._slots}
        for name, ended in flows.ended.items():
            if name in rows:
                self._counters.count(rows[name], ended, flows.failed.get(name, 0))
        self._fct.add(flows, rows)
        n = len(self._slots)
        self._counters.update(np.zeros(n, np.int64))
        stats = np.zeros((n, NUM_FEATURES), np.float32)
        stats[:, 1:6] = self._fct.statistics(n)
        started, completed, failed = self._counters.values(n)
        self._install()
        return Publication(
            timestamp=now,
            active=self._slots.active,
            stats=stats,
            started=started,
            completed=completed,
            rejected=np.zeros(n, np.int64),
            failed=failed,
            fct_count=self._fct.count,
            fct_sum=self._fct.sum,
        )

    def apply(self, weights: NDArray[np.float64], now: float) -> None:
        self._weights = weights.copy()
        self._install()

    def drain(self, server: str) -> None:
        self._slots.drain(server)
        self._agent.drain(self.backend, server)

    def undrain(self, server: str) -> None:
        self._slots.undrain(server)
        self._agent.undrain(self.backend, server)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._log.close()
            self._agent.close()

    def _refresh(self) -> None:
        asked = self._agent.asked(self.backend)
        known = {slot.server.name for slot in self._slots}
        for name in sorted(asked):
            if name not in known:
                self._slots.add(ServerConfig(name=name, address=self.backend, weight=float(self._configured)))
        now = time.monotonic()
        for slot in self._slots:
            at, interval = asked[slot.server.name]
            slot.healthy = now - at <= max(_SILENT, _SILENT_INTERVALS * interval)

    def _install(self) -> None:
        slots = list(self._slots)
        weights = np.array(
            [
                self._weights[slot.index] if slot.index < len(self._weights) else float(self._configured)
                for slot in slots
            ]
        )
        takes = np.array([slot.active for slot in slots], np.bool_)
        if not weights[takes].any():
            weights = np.full(len(slots), float(self._configured))
        whole = whole_weights(weights, max(2, self._configured)).tolist()
        self._agent.answer(
            self.backend,
            {slot.server.name: (weight, self._configured) for slot, weight in zip(slots, whole, strict=True)},
        )
