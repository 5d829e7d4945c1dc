"""A backend of HAProxy as a data plane: :class:`HaproxyBackend`."""

from __future__ import annotations

import logging
from collections.abc import Hashable

import numpy as np
from numpy.typing import NDArray

from ...errors import InvalidOptionError
from ...sharedmemory import abi
from ..base import DriverError
from ..config import ServerConfig
from ..proxy import ProxySource, shown
from ..proxy.places import canonical, claim
from ..proxy.source import LOGGED, UNLOGGED
from .agent_check import AgentCheck
from .logs import FlowLog
from .runtime import Backend, Haproxy, HaproxyProcess, Server, check_rule
from .weights import MAX_WEIGHT

logger = logging.getLogger("lbgym")

#: Flags of srv_admin_state.
_MAINTENANCE = 0x01 | 0x02 | 0x04 | 0x20 | 0x40
_DRAIN = 0x08 | 0x10
#: Flag of srv_agent_state: the configuration has an agent-check.
_AGENT = 0x02
#: Values of srv_op_state.
_STOPPED, _STOPPING = 0, 3

#: What versions of HAProxy call ``random``.
_RANDOM = ("random", "unknown")


class HaproxyBackend(ProxySource[Server]):
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
        place = shown(haproxy.place)
        self._lock = claim(
            "haproxy",
            f"{canonical(haproxy.place)} {backend}",
            f"another driver drives backend {backend!r} of the HAProxy at {place}",
        )
        self._haproxy, self._agent = haproxy.share(), agent and agent.share()
        self.features = UNLOGGED if log is None else LOGGED
        super().__init__(backend, log, capacity or abi.DEFAULT_CAPACITY)
        #: Servers that were drained here by the runtime API, and the process that knows it.
        self._drained: set[str] = set()
        self._drained_at: Hashable = haproxy.newest.identity
        #: Servers without a row, for their names.
        self._unnamed: set[str] = set()
        try:
            found = self._look(haproxy.newest)
            if not found.servers:
                raise DriverError(f"backend {backend!r} has no servers")
            if agent is None:
                check_rule(haproxy.newest, backend, found)
            else:
                _check_agents(backend, found)
            self.rule = found.rule
            if capacity is None:
                self._slots.capacity = max(self._slots.capacity, len(found.servers))
            self._take_over(found)
            # Flows are counted from the driver's start.
            self._count([(haproxy.newest, found.servers, found.unrouted)], began=False)
            self._weights = np.array([row.weight for row in self._slots.rows])
        except BaseException:
            self.close()
            raise

    def drain(self, server: str) -> None:
        self._slots[server]
        if self._agent is not None:
            self._agent.drain(self.backend, server)
            self._slots.drain(server)
        else:
            self._haproxy.newest.change(f"set server {self.backend}/{server} state drain")
            self._slots.drain(server)
            self._drained.add(server)

    def undrain(self, server: str) -> None:
        self._slots.undrain(server)
        if self._agent is not None:
            self._agent.undrain(self.backend, server)
        else:
            self._drained.discard(server)
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
        return self._haproxy.newest.pid

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

    def _look(self, process: HaproxyProcess) -> Backend:
        found = process.backend(self.backend)
        if found is None:
            raise DriverError(f"HAProxy at {shown(self._haproxy.place)} has no backend {self.backend!r}")
        for name in sorted(found.servers.keys() - self._rows()):
            try:
                ServerConfig(name=name, address=self.backend)
            except InvalidOptionError as error:
                if not self._before:
                    raise DriverError(f"server {self.backend}/{name}: {error}") from None
                # One that has come by a reload must not keep the others from what they need.
                del found.servers[name]
                if name not in self._unnamed:
                    self._unnamed.add(name)
                    logger.warning("server %s/%s is left as it is: %s", self.backend, name, error)
        return found

    def _drain_again(self, process: HaproxyProcess, found: Backend) -> None:
        """A process that has taken over knows of no drain; one that somebody else has ended is none any more."""
        if process.identity != self._drained_at:
            drained = sorted(self._drained & found.servers.keys())
            process.change(*(f"set server {self.backend}/{name} state drain" for name in drained))
            for name in drained:
                found.servers[name].administrative |= _DRAIN
            self._drained_at = process.identity
        self._drained = {
            name for name in self._drained & found.servers.keys() if found.servers[name].administrative & _DRAIN
        }

    def _observe(self, now: float) -> None:
        self._haproxy.look(now)
        founds = [(process, self._look(process)) for process in self._haproxy.processes]
        self._drain_again(*founds[-1])
        self._take_over(founds[-1][1])
        self._count([(process, found.servers, found.unrouted) for process, found in founds])

    def _take_over(self, found: Backend) -> None:
        """Take over servers, their configured weights and states."""
        self._found = found
        self._update(
            ServerConfig(name=server.name, address=self.backend, weight=float(server.configured))
            for server in found.servers.values()
        )
        spared = any(_state(server) == "up" and not server.backup for server in found.servers.values())
        for name, server in found.servers.items():
            slot, state = self._slots[name], _state(server)
            slot.healthy = state != "down"
            slot.drained = state == "draining" or (server.backup and spared)

    def _loss(self, lost: int, received: int) -> str:
        return (
            f"{lost} of HAProxy's log lines are lost ({self._haproxy.dropped_logs} it could not send), {received} have "
            "come: FCTs are of the others; raise net.core.rmem_max, or net.unix.max_dgram_qlen for a Unix socket"
        )

    # Acting

    def _scaled(self, weights: NDArray[np.float64], safe: NDArray[np.float64]) -> NDArray[np.float64]:
        if self.rule in _RANDOM and weights.any() and not np.array_equal(weights, safe):
            # It draws from a ring with 16 points per unit of a server's weight: with few, shares are unequal.
            return weights * (MAX_WEIGHT / weights.max())
        return weights

    def _install(self) -> None:
        found = self._found
        wanted = self._whole(found.servers, MAX_WEIGHT)
        if self._agent is not None:
            self._agent.answer(
                self.backend, {name: (weight, found.servers[name].configured) for name, weight in wanted.items()}
            )
            return
        changes = [name for name, weight in wanted.items() if found.servers[name].weight != weight]
        self._haproxy.newest.change(*(f"set server {self.backend}/{name} weight {wanted[name]}" for name in changes))
        for name in changes:
            found.servers[name].weight = wanted[name]


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


__all__ = ["HaproxyBackend"]
