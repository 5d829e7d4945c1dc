"""A backend of HAProxy as a data plane: :class:`HaproxyBackend`."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Sequence
from pathlib import Path

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
from .runtime import Backend, Haproxy, Process, Server, check_rule, shown
from .weights import MAX_WEIGHT, whole_weights

logger = logging.getLogger("lbgym")

#: Flags of srv_admin_state.
_MAINTENANCE = 0x01 | 0x02 | 0x04 | 0x20 | 0x40
_DRAIN = 0x08 | 0x10
#: Flag of srv_agent_state: the configuration has an agent-check.
_AGENT = 0x02
#: Values of srv_op_state.
_STOPPED, _STOPPING = 0, 3
#: Seconds between warnings of one kind.
_WARN = 10.0

#: What versions of HAProxy call ``random``.
_RANDOM = ("random", "unknown")

#: Columns that are measured with, and without, the log.
LOGGED = tuple(name for name in FEATURE_NAMES if name == "n_flow_on" or name.startswith("fct_"))
UNLOGGED = ("n_flow_on",)


class HaproxyBackend(Source):
    """One backend of a HAProxy that runs.

    Open flows, counters, states and names of servers come from HAProxy's runtime API, FCTs from its log. Weights go by
    the runtime API, or as percentages to HAProxy's agent-checks. Flow durations are not measured: HAProxy says nothing
    of a flow before its end.

    HAProxy is followed through reloads: a process that takes over gets the weights in force, and flows of processes
    that are finishing theirs are counted until they end. What another sets in the meantime is set back.

    Args:
        haproxy: where it runs; several backends can share it.
        backend: name of the backend.
        log: where its log lines come in, shared likewise; None: no FCTs.
        agent: answers agent-checks, shared likewise; None: the runtime API sets weights, which needs ``level admin``.
        capacity: rows there is room for; None: 64, or as many as there are servers if that is more.

    Raises:
        DriverError: if HAProxy has no such backend, its rule of ``balance`` follows no weights, this user has not the
            right to set them, a server asks no agent, or another driver drives the backend.
    """

    driver = "haproxy"

    def __init__(
        self,
        haproxy: Haproxy,
        backend: str,
        *,
        log: FlowLog | None = None,
        agent: AgentCheck | None = None,
        capacity: int | None = None,
    ) -> None:
        self.backend = backend
        self._lock = _claim(f"{_canonical(haproxy.place)} {backend}")
        self._haproxy, self._log, self._agent = haproxy.share(), log and log.share(), agent and agent.share()
        self.features = UNLOGGED if log is None else LOGGED
        self._counters, self._fct = FlowCounters(), FctStatistics()
        self._unrouted = 0
        self._before: dict[tuple[int, int], _Seen] = {}
        self._next_warning = 0.0
        self._lost = 0
        try:
            found = self._look(haproxy.newest)
            if not found.servers:
                raise DriverError(f"backend {backend!r} has no servers")
            if agent is None:
                check_rule(haproxy.newest, backend, found)
            else:
                _check_agents(backend, found)
            self.rule = found.rule
            self._slots = Slots(capacity or max(abi.DEFAULT_CAPACITY, len(found.servers)))
            self._take_over(found)
            # Flows are counted from the driver's start.
            self._seen_of(haproxy.newest, found)
            self._weights = np.array([row.weight for row in self._slots.rows])
        except BaseException:
            self.close()
            raise

    def servers(self) -> Sequence[ServerRow]:
        return self._slots.rows

    def read(self, now: float) -> Publication:
        self._haproxy.look(now)
        self._count()
        self._install()
        n = len(self._slots)
        stats = np.zeros((n, NUM_FEATURES), np.float32)
        stats[:, 0] = self._counters.open[:n]
        if self._log is not None:
            self._take_flows(self._log)
            stats[:, 1:6] = self._fct.statistics(n)
        started, completed, failed = self._counters.values(n)
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
        self._haproxy.look(now)
        self._count()
        self._install()

    def drain(self, server: str) -> None:
        self._slots[server]
        if self._agent is not None:
            self._agent.drain(self.backend, server)
            self._slots.drain(server)
        else:
            self._haproxy.newest.change(f"set server {self.backend}/{server} state drain")
            self._slots.drain(server)

    def undrain(self, server: str) -> None:
        self._slots.undrain(server)
        if self._agent is not None:
            self._agent.undrain(self.backend, server)
        else:
            self._haproxy.newest.change(f"set server {self.backend}/{server} state ready")

    def add(self, server: str, **_: object) -> None:
        raise DriverError(f"add {server!r} to HAProxy's configuration and reload HAProxy: the driver follows")

    def remove(self, server: str) -> None:
        raise DriverError(f"take {server!r} out of HAProxy's configuration and reload HAProxy: the driver follows")

    def close(self) -> None:
        if self._lock.fileno() < 0:
            return
        self._lock.close()
        for shared in (self._haproxy, self._log, self._agent):
            if shared is not None:
                shared.close()

    @property
    def version(self) -> str:
        """Of HAProxy."""
        return self._haproxy.newest.version

    @property
    def process(self) -> int:
        """Id of the process that takes new flows."""
        return self._haproxy.newest.identity[0]

    @property
    def processes(self) -> int:
        """How many there are, with those that only finish their flows."""
        return len(self._haproxy.processes)

    @property
    def lost_lines(self) -> int:
        """Log lines that have not come, those that HAProxy could not send among them."""
        # HAProxy numbers those, too; but a gap shows only when another line has come.
        return 0 if self._log is None else max(self._log.lost, self._haproxy.dropped_logs)

    # Observing

    def _look(self, process: Process) -> Backend:
        found = process.backend(self.backend)
        if found is None:
            raise DriverError(f"HAProxy at {shown(self._haproxy.place)} has no backend {self.backend!r}")
        return found

    def _count(self) -> None:
        """Count the flows of all processes, and take over the servers of the newest."""
        living = {process.identity for process in self._haproxy.processes}
        for identity in [identity for identity in self._before if identity not in living]:
            self._part_from(self._before.pop(identity))
        founds = [(process, self._look(process)) for process in self._haproxy.processes]
        self._take_over(founds[-1][1])
        rows = self._rows()
        total = np.zeros(len(self._slots), np.int64)
        for process, found in founds:
            seen = self._before.get(process.identity)
            if seen is None:
                # All that a new process has done was done while this driver ran.
                seen = self._before[process.identity] = _Seen()
            seen.stopping = process.stopping
            for name, server in found.servers.items():
                row = rows.get(name)
                if row is not None:
                    self._counters.count(row, *seen.more(server))
                    total[row] += server.open
            self._unrouted += max(0, found.unrouted - seen.unrouted)
            seen.unrouted = found.unrouted
        for slot in self._slots.release(total.tolist()):
            self._fct.forget(slot.index)
        self._counters.update(total[: len(self._slots)])

    def _seen_of(self, process: Process, found: Backend) -> None:
        """Count from now on."""
        seen = self._before[process.identity] = _Seen(unrouted=found.unrouted)
        for server in found.servers.values():
            seen.more(server)

    def _part_from(self, seen: _Seen) -> None:
        """A process has ended: one that was stopping when its flows had, another has taken them with it."""
        rows = self._rows()
        for name, last in seen.servers.items():
            if name in rows:
                self._counters.count(rows[name], last.open, 0 if seen.stopping else last.open)

    def _rows(self) -> dict[str, int]:
        return {slot.server.name: slot.index for slot in self._slots}

    def _take_over(self, found: Backend) -> None:
        """Take over servers, their configured weights and states."""
        self._found = found
        changes = self._slots.update(
            ServerConfig(name=server.name, address=self.backend, weight=float(server.configured))
            for server in found.servers.values()
        )
        if changes and len(self._before):
            logger.info("backend %r: %s", self.backend, changes)
        spared = any(_state(server) == "up" and not server.backup for server in found.servers.values())
        for name, server in found.servers.items():
            slot, state = self._slots[name], _state(server)
            slot.healthy = state != "down"
            slot.drained = state == "draining" or (server.backup and spared)

    def _take_flows(self, log: FlowLog) -> None:
        self._fct.add(log.take(self.backend), self._rows())
        lost, now = self.lost_lines, time.monotonic()
        if lost > self._lost and now >= self._next_warning:
            logger.warning(
                "%d of HAProxy's log lines are lost (%d it could not send), %d have come: FCTs are of the others; "
                "raise net.core.rmem_max, or net.unix.max_dgram_qlen for a Unix socket",
                lost, self._haproxy.dropped_logs, log.received,
            )  # fmt: skip
            self._lost, self._next_warning = lost, now + _WARN

    # Acting

    def _install(self) -> None:
        """Have the weights in force that were applied, wherever HAProxy has others."""
        found = self._found
        wanted = self._wanted(found)
        if self._agent is not None:
            self._agent.answer(
                self.backend, {name: (weight, found.servers[name].configured) for name, weight in wanted.items()}
            )
            return
        changes = [name for name, weight in wanted.items() if found.servers[name].weight != weight]
        self._haproxy.newest.change(*(f"set server {self.backend}/{name} weight {wanted[name]}" for name in changes))
        for name in changes:
            found.servers[name].weight = wanted[name]

    def _wanted(self, found: Backend) -> dict[str, int]:
        """Whole weights by server."""
        slots = [slot for slot in self._slots if slot.server.name in found.servers and not slot.removed]
        safe = np.array([slot.server.safe_weight for slot in slots])
        weights = np.array(
            [self._weights[slot.index] if slot.index < len(self._weights) else safe[i] for i, slot in enumerate(slots)]
        )
        takes = np.array([slot.active for slot in slots], np.bool_)
        if self.rule in _RANDOM and weights.any() and not np.array_equal(weights, safe):
            # It draws from a ring with 16 points per unit of a server's weight: with few, shares are unequal.
            weights = weights * (MAX_WEIGHT / weights.max())
        # An operator who gives a server the weight 0 wants it to have no flows.
        weights[safe == 0.0] = 0.0
        if not weights[takes].any():
            weights = np.where(takes & (safe > 0.0), 1.0, weights)
        return {slot.server.name: weight for slot, weight in zip(slots, whole_weights(weights).tolist(), strict=True)}


class _Seen:
    """What was counted of a process.

    Attributes:
        servers: by name, as of the last look.
        unrouted: flows that found no server, likewise.
        stopping: likewise.
    """

    def __init__(self, unrouted: int = 0) -> None:
        self.servers: dict[str, Server] = {}
        self.unrouted, self.stopping = unrouted, False

    def more(self, server: Server) -> tuple[int, int]:
        """Flows that have ended, and failed, since the last look."""
        last = self.servers.get(server.name)
        self.servers[server.name] = server
        if last is None:
            return server.ended, server.failed
        if server.attempts < last.attempts:
            # An operator has cleared the counters.
            return 0, 0
        ended, failed = server.ended - last.ended, server.failed - last.failed
        # Between an attempt that fails and the next, a flow has not ended.
        server.ended, server.failed = max(server.ended, last.ended), max(server.failed, last.failed)
        return max(0, ended), max(0, failed)


def _state(server: Server) -> str:
    """Up, draining or down."""
    if server.operational == _STOPPED or server.administrative & _MAINTENANCE:
        return "down"
    drains = server.administrative & _DRAIN or server.operational == _STOPPING or server.configured == 0
    return "draining" if drains else "up"


def _check_agents(backend: str, found: Backend) -> None:
    for server in found.servers.values():
        if not server.agent & _AGENT:
            raise DriverError(
                f"server {backend}/{server.name} asks no agent: give it agent-check, agent-port and "
                f"agent-send '{backend}/{server.name}\\n' in HAProxy's configuration"
            )


def _canonical(place: str | tuple[str, int]) -> str:
    return str(Path(place).resolve()) if isinstance(place, str) else shown(place)


def _claim(what: str) -> socket.socket:
    """A lock that ends with this process: an abstract Unix socket, which needs no file.

    Raises:
        DriverError: if another driver has it.
    """
    lock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        lock.bind(b"\0lbgym-haproxy " + what.encode()[-90:])
    except OSError:
        lock.close()
        place, backend = what.rsplit(" ", 1)
        raise DriverError(f"another driver drives backend {backend!r} of the HAProxy at {place}") from None
    return lock


__all__ = ["LOGGED", "UNLOGGED", "HaproxyBackend"]
