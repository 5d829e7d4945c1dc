"""A cluster of Envoy as a data plane: :class:`EnvoyCluster`."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from socket import socket

import numpy as np

from ...sharedmemory import abi
from ..base import DriverError
from ..proxy import Log, ProxySource, shown
from ..proxy.counters import ProcessFlows
from ..proxy.source import LOGGED, TIMES, UNLOGGED
from .access_log import LogFile, LogService
from .admin import ClusterConfig, Envoy, EnvoyProcess, Host
from .delivery import Delivery
from .endpoints import DRAINING, MAX_WEIGHT, Endpoint
from .xds import XdsDelivery

logger = logging.getLogger("lbgym")

#: Seconds to wait for Envoy to take weights: it does within milliseconds unless its main thread is busy.
_TAKE = 1.0
#: Seconds between looks meanwhile.
_LOOK = 0.002
#: Seconds after which a flow that has ended must be in the log, besides what Envoy lets a file wait.
_PATIENCE = 2.0


class EnvoyCluster(ProxySource[Host]):
    """One cluster of an Envoy that runs, or of several that share its servers.

    Servers, their weights and drains go to Envoy by EDS. Open flows, counters and health come from the admin interface,
    FCTs from the access log. Flow durations are not measured: Envoy says nothing of a flow before its end.

    Envoys are followed through restarts and hot restarts: a process that takes over asks for the servers and weights by
    itself, and flows of one that is finishing its own are counted until they end.

    Args:
        cluster: name of the cluster.
        delivery: has the servers, and brings them to Envoy; closed with this.
        lock: of the cluster, likewise.
        envoys: those whose admin interface can be reached, with the cluster's configuration in each, shared; none: no
            open flows are measured, flows are counted by the log, and weights are taken for granted once they are
            served.
        log: of all Envoys, shared; None: no FCTs.
        capacity: rows there is room for; None: 64, or as many as there are servers if that is more.
        wait: seconds to wait at the start for Envoys to ask for the servers.

    Raises:
        DriverError: if an Envoy does not take them.
    """

    driver = "envoy"
    kind = "cluster"

    def __init__(
        self,
        cluster: str,
        *,
        delivery: Delivery,
        lock: socket,
        envoys: Sequence[tuple[Envoy, ClusterConfig]] = (),
        log: LogFile | LogService | None = None,
        capacity: int | None = None,
        wait: float = 40.0,
    ) -> None:
        self._delivery, self._lock = delivery, lock
        self._envoys = [(envoy.share(), config) for envoy, config in envoys]
        for envoy, _ in envoys:
            envoy.driven.add(cluster)
        measured = LOGGED if envoys else TIMES
        self.features = measured if log is not None else UNLOGGED if envoys else ()
        endpoints = delivery.assignment.endpoints
        super().__init__(cluster, log, capacity or max(abi.DEFAULT_CAPACITY, len(endpoints)))
        self._counts_by_log = not envoys
        self._closed = False
        #: When looked, and how many flows had completed by then.
        self._completed: deque[tuple[float, int]] = deque()
        self._missing = 0
        self._patience = _PATIENCE
        #: States that drained servers had before.
        self._undrained: dict[str, str] = {}
        #: What was delivered last has been waited for.
        self._waited = False
        try:
            self._warn()
            self._take_over()
            self._weights = np.array([row.weight for row in self._slots.rows])
            self._start(wait)
        except BaseException:
            self.close()
            raise

    def _start(self, wait: float) -> None:
        """Serve the configured weights, and count from now on."""
        if isinstance(self._delivery, XdsDelivery):
            # What Envoy has may be those of a driver that ran before, and it does not come back at once.
            self._delivery.deliver(self._wanted())
            until = time.monotonic() + wait
            while self._envoys and not self._delivery.subscribers:
                if time.monotonic() >= until:
                    raise DriverError(
                        f"no Envoy has asked for the servers of cluster {self.backend!r} within {wait:g} s: does its "
                        "eds_config lead here?"
                    )
                time.sleep(0.02)
            self._delivery.await_answers(_TAKE)
        for envoy, _ in self._envoys:
            envoy.look(math.inf)
        self._count(self._founds(), began=False)

    def _warn(self) -> None:
        """Say what makes weights or FCTs late."""
        for envoy, config in self._envoys:
            if config.merge_window > 0.0 and envoy.newest.merges:
                logger.warning(
                    "cluster %r of the Envoy at %s holds weights back for up to %g s: set update_merge_window to 0s in "
                    "common_lb_config",
                    self.backend, shown(envoy.place), config.merge_window,
                )  # fmt: skip
            if isinstance(self._log, LogFile) and envoy.newest.flush_interval > 1.0:
                logger.warning(
                    "the Envoy at %s writes its access log every %g s: FCTs are that late; start it with "
                    "--file-flush-interval-msec 100",
                    shown(envoy.place), envoy.newest.flush_interval,
                )  # fmt: skip
            self._patience = max(self._patience, _PATIENCE + envoy.newest.flush_interval)

    # What operators ask for

    def drain(self, server: str) -> None:
        self._slots[server]
        endpoint = self._delivery.assignment.endpoints.get(server)
        if endpoint is not None and not endpoint.draining:
            self._undrained[server], endpoint.status = endpoint.status, DRAINING
        self._slots.drain(server)
        self._install()

    def undrain(self, server: str) -> None:
        self._slots.undrain(server)
        self._delivery.assignment.endpoints[server].status = self._undrained.pop(server, "UNKNOWN")
        self._install()

    def add(self, server: str, *, address: str, port: int | None, weight: float, cores: int | None) -> None:
        endpoints = self._delivery.assignment.endpoints
        if server in endpoints:
            raise DriverError(f"there is a server {server!r} already")
        self._delivery.assignment.add(server, address, port, weight)
        try:
            self._take_over()
        except DriverError:
            del endpoints[server]
            raise
        self._install()

    def remove(self, server: str) -> None:
        self._slots.remove(server)
        endpoints = self._delivery.assignment.endpoints
        if server in endpoints:
            self._delivery.removed[server] = endpoints.pop(server)
        self._install()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for envoy, _ in self._envoys:
            envoy.driven.discard(self.backend)
            envoy.close()
        if self._log is not None:
            self._log.close()
        self._delivery.close()
        self._lock.close()

    @property
    def version(self) -> str:
        """Of the first Envoy; empty without an admin interface."""
        return self._envoys[0][0].newest.version if self._envoys else ""

    @property
    def processes(self) -> int:
        """How many there are, with those that only finish their flows."""
        return sum(len(envoy.processes) for envoy, _ in self._envoys)

    @property
    def lost_lines(self) -> int:
        """Flows that have completed by Envoy's counters and are not in its log: at least so many."""
        return self._missing

    def counts(self) -> Mapping[str, int]:
        refusals = self._delivery.refusals
        return super().counts() if refusals is None else {**super().counts(), "refused_updates": refusals}

    # Observing

    def _observe(self, now: float) -> None:
        if self._delivery.poll():
            self._take_over()
        for envoy, _ in self._envoys:
            envoy.look(now)
        self._count(self._founds())
        self._take_health()

    def _take_over(self) -> None:
        """Take over the servers, and what their operator says of them."""
        self._update(endpoint.server for endpoint in self._delivery.assignment.endpoints.values())
        for endpoint in self._delivery.assignment.endpoints.values():
            slot = self._slots[endpoint.name]
            slot.drained, slot.healthy = endpoint.draining, not endpoint.down

    def _founds(self) -> list[tuple[EnvoyProcess, Mapping[str, Host], int]]:
        """Of each process the hosts by the server's name, and flows that found none."""
        names = self._names()
        founds: list[tuple[EnvoyProcess, Mapping[str, Host], int]] = []
        for envoy, config in self._envoys:
            for process in envoy.processes:
                hosts = {
                    names[key]: host for key, host in process.clusters.get(self.backend, {}).items() if key in names
                }
                # While two run, what the older counts is counted by the newer, too.
                statistics = {} if process.stopping else process.statistics
                unrouted = statistics.get(f"cluster.{config.statistics}.upstream_cx_none_healthy", 0)
                founds.append((process, _named(hosts), unrouted))
        return founds

    def _part_from(self, seen: ProcessFlows[Host], rows: Mapping[str, int]) -> None:
        # One that has finished its flows is left before it ends; so has none of them here.
        seen.stopping = False
        super()._part_from(seen, rows)

    def _take_health(self) -> None:
        """A server is down if every Envoy that knows it has it so."""
        for endpoint in self._delivery.assignment.endpoints.values():
            hosts = [
                host
                for envoy, _ in self._envoys
                if (host := envoy.newest.clusters.get(self.backend, {}).get(endpoint.key)) is not None
            ]
            healthy = not hosts or any(host.healthy for host in hosts)
            self._slots[endpoint.name].healthy = healthy and not endpoint.down

    def _endpoints(self) -> list[Endpoint]:
        return [*self._delivery.removed.values(), *self._delivery.assignment.endpoints.values()]

    def _names(self) -> dict[str, str]:
        """Names of servers by address."""
        return {endpoint.key: endpoint.name for endpoint in self._endpoints()}

    def _logged_rows(self) -> Mapping[str, int]:
        rows = self._rows()
        return {key: rows[name] for key, name in self._names().items() if name in rows}

    def _take_times(self, log: Log) -> None:
        super()._take_times(log)
        # Envoy gives up entries that it cannot send without a word.
        now, done = time.monotonic(), self._completed
        done.append((now, int(self._counters.values(len(self._slots))[1].sum())))
        while len(done) > 1 and done[1][0] <= now - self._patience:
            done.popleft()
        if self._envoys and done[0][0] <= now - self._patience:
            self._missing = max(self._missing, done[0][1] - self._logged)

    def _loss(self, lost: int, received: int) -> str:
        return (
            f"{lost} flows that have completed are not in Envoy's access log, {received} entries have come: FCTs are "
            "of the others; does every listener of the cluster log here?"
        )

    # Acting

    def _wanted(self) -> dict[str, int]:
        # A region has at most 65,536 servers: the sum of a locality's weights stays below Envoy's bound.
        endpoints = self._delivery.assignment.endpoints
        return self._whole(endpoints, min(MAX_WEIGHT, (2**32 - 1) // max(1, len(endpoints))))

    def _install(self) -> None:
        known = self._rows()
        endpoints = self._delivery.assignment.endpoints
        for name in [name for name in self._delivery.removed if name not in known or name in endpoints]:
            self._delivery.drop(name)
        wanted = self._wanted()
        if self._delivery.deliver(wanted):
            self._waited = False
        # What has been waited for may have come into force since the last look.
        look_first = self._waited
        until = time.monotonic() + (0.0 if self._waited else _TAKE)
        if not self._envoys:
            self._delivery.await_answers(until - time.monotonic())
        while trouble := self._trouble(wanted):
            if look_first:
                look_first = False
            elif time.monotonic() >= until:
                self._waited = True
                # It is sent again at the next attempt.
                self._delivery.again()
                raise DriverError(trouble)
            self._delivery.await_answers(until - time.monotonic())
            time.sleep(_LOOK)
            for envoy, _ in self._envoys:
                envoy.newest.look()

    def _trouble(self, wanted: Mapping[str, int]) -> str:
        """A sentence on weights that are not in force; empty if they are."""
        refusal = self._delivery.refusal()
        if refusal:
            return f"the servers of cluster {self.backend!r} by {self._delivery.way}: {refusal}"
        for envoy, config in self._envoys:
            hosts = envoy.newest.clusters.get(self.backend, {})
            for endpoint in self._delivery.assignment.endpoints.values():
                host, weight = hosts.get(endpoint.key), wanted[endpoint.name]
                drained = weight == 0 or endpoint.draining
                taken = host is not None and host.draining == (drained and not endpoint.down)
                if host is not None and not drained:
                    taken &= host.weight == weight
                if not taken:
                    rejected = envoy.newest.statistics.get(f"cluster.{config.statistics}.update_rejected", 0)
                    return (
                        f"the Envoy at {shown(envoy.place)} has not taken the servers of cluster {self.backend!r} by "
                        f"{self._delivery.way}: of {endpoint.name!r} it has "
                        f"{'nothing' if host is None else f'weight {host.weight}'}, not {weight} ({rejected} updates "
                        "rejected so far; Envoy's own log has the reasons)"
                    )
        return ""


def _named(hosts: dict[str, Host]) -> dict[str, Host]:
    for name, host in hosts.items():
        host.name = name
    return hosts


__all__ = ["EnvoyCluster"]
