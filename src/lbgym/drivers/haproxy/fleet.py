"""A backend known by its agent-checks and its log alone: :class:`AgentCheckedBackend`."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable

from ...sharedmemory import abi
from ..base import DriverError
from ..config import ServerConfig
from ..proxy import ProxySource
from ..proxy.source import TIMES
from .agent_check import AgentCheck
from .logs import FlowLog
from .runtime import Server

logger = logging.getLogger("lbgym")

#: A server of which nobody has asked for so many of its intervals, and seconds, is down.
_SILENT_INTERVALS, _SILENT = 3.0, 3.0
#: And one that is no more likewise, so that others get its row.
_GONE_INTERVALS, _GONE = 20.0, 60.0


class AgentCheckedBackend(ProxySource[Server]):
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
    features = TIMES

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
        super().__init__(backend, log, capacity or abi.DEFAULT_CAPACITY)
        self._flow_log, self._agent = log, agent.share()
        self._configured = configured
        self._counts_by_log = True
        #: Servers without a row.
        self._outside: set[str] = set()
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
        self._observe(0.0)
        if not any(slot.server.name for slot in self._slots):
            raise DriverError(
                f"no server of backend {self.backend!r} has asked the agent within {wait:g} s: HAProxy's servers need "
                f"agent-check, agent-addr, agent-port and agent-send '{self.backend}/NAME\\n'"
            )

    def drain(self, server: str) -> None:
        self._slots.drain(server)
        self._agent.drain(self.backend, server)

    def undrain(self, server: str) -> None:
        self._slots.undrain(server)
        self._agent.undrain(self.backend, server)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._flow_log.close()
            self._agent.close()

    def _observe(self, now: float) -> None:
        asked = self._agent.asked(self.backend)
        clock = time.monotonic()
        gone = {name for name, (at, interval) in asked.items() if clock - at > max(_GONE, _GONE_INTERVALS * interval)}
        for name in gone:
            self._agent.forget(self.backend, name)
        self._free(gone)
        known = {slot.server.name for slot in self._slots}
        for name in sorted(asked.keys() - gone - known):
            self._admit(name)
        for slot in self._slots:
            at, interval = asked[slot.server.name]
            slot.healthy = clock - at <= max(_SILENT, _SILENT_INTERVALS * interval)

    def _free(self, gone: Iterable[str]) -> None:
        """Give up the rows of servers: no flow is open as far as is known here."""
        known = self._rows()
        for name in known.keys() & gone:
            self._slots.remove(name)
            logger.info("backend %r: removed %s, of which nobody has asked for long", self.backend, name)
        self._release([0] * len(self._slots))
        self._outside.difference_update(gone)

    def _admit(self, name: str) -> None:
        """Give a server a row, if there is one: what the others do goes on."""
        try:
            self._slots.add(ServerConfig(name=name, address=self.backend, weight=float(self._configured)))
        except DriverError as error:
            if name not in self._outside:
                self._outside.add(name)
                logger.warning("backend %r: %s", self.backend, error)
            return
        self._outside.discard(name)

    def _loss(self, lost: int, received: int) -> str:
        return f"{lost} of HAProxy's log lines are lost, {received} have come: flows and FCTs are of the others"

    def _install(self) -> None:
        weights = self._whole(self._rows(), max(2, self._configured))
        self._agent.answer(self.backend, {name: (weight, self._configured) for name, weight in weights.items()})
