"""Health checks of servers: :class:`HealthChecks`."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable

from .base import DriverError
from .config import HealthCheck, ServerConfig
from .probes import Probes, connect, http_get

logger = logging.getLogger("lbgym")


class HealthChecks:
    """Checks servers in the background, with HAProxy's ``inter``, ``rise`` and ``fall``.

    Nothing is known of a server before its first check, which decides alone; from then on ``fall`` failures in a row
    take it down and ``rise`` successes in a row bring it up.
    """

    def __init__(self) -> None:
        self._probes = Probes("lbgym-health")
        self._lock = threading.Lock()
        self._judges: dict[str, _Judge] = {}

    def watch(self, servers: Iterable[ServerConfig]) -> None:
        """Check these servers; those without a health check are left alone.

        What is known of a server stays as long as its address and check do.
        """
        wanted = {server.name: server for server in servers if server.health is not None}
        with self._lock:
            judges = {}
            for name, server in wanted.items():
                judge = self._judges.get(name)
                judges[name] = judge if judge is not None and judge.is_for(server) else _Judge(server, self._lock)
            self._judges = judges
        self._probes.set_targets({judge: (judge.check, judge.health.interval) for judge in judges.values()})

    @property
    def healthy(self) -> dict[str, bool | None]:
        """By the name of each server that is checked: up, down, or None before its first check."""
        with self._lock:
            return {name: judge.healthy for name, judge in self._judges.items()}

    def close(self) -> None:
        """End the checks. Idempotent."""
        self._probes.close()


class _Judge:
    """Checks one server and counts."""

    def __init__(self, server: ServerConfig, lock: threading.Lock) -> None:
        assert server.health is not None
        self.health: HealthCheck = server.health
        self.healthy: bool | None = None
        self._server, self._lock = server, lock
        self._against = 0  # checks in a row that contradict `healthy`

    def is_for(self, server: ServerConfig) -> bool:
        mine = self._server
        return (mine.address, mine.port, mine.health) == (server.address, server.port, server.health)

    async def check(self) -> None:
        health, address = self.health, self._server.address
        port = health.port or self._server.port
        assert port is not None
        why = ""
        try:
            if health.kind == "tcp":
                await connect(address, port, health.timeout)
            else:
                status, _ = await http_get(address, port, health.path, health.timeout)
                if not 200 <= status < 400:
                    raise DriverError(f"http://{address}:{port}{health.path}: status {status}")
        except DriverError as error:
            why = str(error)
        self._count(not why, why)

    def _count(self, passed: bool, why: str) -> None:
        if passed == self.healthy:
            self._against = 0
            return
        self._against += 1
        if self.healthy is not None and self._against < (self.health.rise if passed else self.health.fall):
            return
        first, self._against = self.healthy is None, 0
        with self._lock:
            self.healthy = passed
        if not passed:
            logger.warning("server %r is down: %s", self._server.name, why)
        elif not first:
            logger.info("server %r is up again", self._server.name)
