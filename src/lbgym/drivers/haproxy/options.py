"""From options to sources: :func:`open_backends`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

from ... import checks
from ...errors import InvalidOptionError
from ..base import Source
from ..proxy import parse_place
from ..proxy.places import check_pairs, parse_port
from .agent_check import AgentCheck
from .fleet import AgentCheckedBackend
from .logs import FlowLog
from .runtime import Haproxy
from .source import HaproxyBackend
from .weights import MAX_WEIGHT


@dataclass(frozen=True, slots=True, kw_only=True)
class HaproxyOptions:
    """How HAProxy is reached.

    Attributes:
        backends: backend by name of the region.
        socket: HAProxy's ``stats socket``, a path or HOST:PORT; None: there is none, and agent-checks and log suffice.
        log: where HAProxy logs to, a path or HOST:PORT; None: FCTs are not measured.
        agent_check: [ADDRESS:]PORT to answer agent-checks on, by default on 127.0.0.1; None: the socket sets weights.
        configured_weight: of every server in HAProxy's configuration, for agent-checks without a socket, 1 to 256.
        capacity: servers each region has room for; None: 64, or more if needed.

    Raises:
        InvalidOptionError: for what does not go together, and a value out of its range.
    """

    backends: Mapping[str, str]
    socket: str | None = None
    log: str | None = None
    agent_check: str | None = None
    configured_weight: int = 100
    capacity: int | None = None

    def __post_init__(self) -> None:
        check_pairs(self.backends, "backend")
        for backend in self.backends.values():
            checks.text("backend", backend)
            if any(not (c.isascii() and (c.isalnum() or c in "-_.:")) for c in backend):
                raise InvalidOptionError(f"a backend's name has letters, digits and -_.: only, got {backend!r}")
        for what in ("socket", "log"):
            if (place := getattr(self, what)) is not None:
                parse_place(place, what)
        if self.agent_check is not None:
            parse_port(self.agent_check, "agent_check")
        if self.socket is None and (self.agent_check is None or self.log is None):
            raise InvalidOptionError(
                "give socket, HAProxy's 'stats socket'; or both agent_check and log, which do without it"
            )
        checks.whole("configured_weight", self.configured_weight, high=MAX_WEIGHT)
        if self.capacity is not None:
            checks.whole("capacity", self.capacity)


def open_backends(options: HaproxyOptions, *, wait: float = 10.0) -> dict[str, Source]:
    """The sources of the backends, by name of the region; they share one connection, log and agent.

    Args:
        options: how HAProxy is reached.
        wait: seconds to wait for agent-checks where there is no socket.

    Raises:
        DriverError: if HAProxy or a backend cannot be driven; nothing is left open then, and nothing has changed.
    """
    with ExitStack() as made:
        log = haproxy = agent = None
        if options.socket is not None:
            haproxy = Haproxy(parse_place(options.socket, "socket")).share()
            made.callback(haproxy.close)
        if options.log is not None:
            log = FlowLog(parse_place(options.log, "log")).share()
            made.callback(log.close)
        if options.agent_check is not None:
            agent = AgentCheck(parse_port(options.agent_check, "agent_check")).share()
            made.callback(agent.close)
        sources: dict[str, Source] = {}
        try:
            for name, backend in options.backends.items():
                if haproxy is not None:
                    sources[name] = HaproxyBackend(haproxy, backend, log=log, agent=agent, capacity=options.capacity)
                else:
                    assert log is not None and agent is not None
                    sources[name] = AgentCheckedBackend(
                        backend,
                        log=log,
                        agent=agent,
                        configured=options.configured_weight,
                        wait=wait,
                        capacity=options.capacity,
                    )
        except BaseException:
            for source in sources.values():
                source.close()
            raise
        return sources


__all__ = ["HaproxyOptions", "open_backends"]
