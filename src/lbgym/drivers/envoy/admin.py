"""Envoy's admin interface: persistent connections to its processes, and what they say."""

from __future__ import annotations

import http.client
import json
import re
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from ...errors import InvalidOptionError
from ..base import DriverError
from ..proxy import Followed, Place, Process, parse_place, shown
from .endpoints import address_key

#: The oldest version whose answers are understood.
OLDEST = (1, 30)
#: The first version that has weights of EDS come into force at once, whatever update_merge_window is: 1.39.3 does not.
_UNMERGED = (1, 40)
#: Seconds to wait for an answer.
_TIMEOUT = 2.0
#: Seconds for which a worker of Envoy may be held up between two steps of one flow, on a busy machine.
_HELD_UP = 0.1
#: Counters that are read at every look.
_STATISTICS = r"\.upstream_cx_none_healthy$|\.update_rejected$"
#: Policies of load balancing that follow the weights of endpoints, by their names in Envoy's two ways to write them.
_WEIGHTED = {
    "ROUND_ROBIN": "round_robin",
    "LEAST_REQUEST": "least_request",
    "RING_HASH": "ring_hash",
    "MAGLEV": "maglev",
    "RoundRobin": "round_robin",
    "LeastRequest": "least_request",
    "RingHash": "ring_hash",
    "Maglev": "maglev",
}


def parse_admin(text: str) -> Place:
    """The place of an admin interface: ``[http://]HOST:PORT``, or the path of a Unix socket.

    Raises:
        InvalidOptionError: for anything else.
    """
    if text.startswith("https://"):
        raise InvalidOptionError(f"admin must be http://HOST:PORT, since Envoy's admin has no TLS, got {text!r}")
    return parse_place(text.removeprefix("http://").rstrip("/") if text.startswith("http://") else text, "admin")


class _Http(http.client.HTTPConnection):
    """HTTP to a place."""

    def __init__(self, place: Place) -> None:
        super().__init__("envoy", timeout=_TIMEOUT)
        self.place = place

    def connect(self) -> None:
        if isinstance(self.place, str):
            self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.sock.settimeout(_TIMEOUT)
            self.sock.connect(self.place)
        else:
            self.sock = socket.create_connection(self.place, _TIMEOUT)


class Connection:
    """A persistent connection to the admin interface of one process, which lasts longer than its listener does.

    Args:
        place: path of a Unix socket, or host and port.

    Raises:
        DriverError: if nobody answers there, or may not be asked.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self._http = _Http(place)
        try:
            self._http.connect()
        except OSError as error:
            self._http.close()
            raise DriverError(_unreachable(place, error)) from error
        # A second connection would be one to another process.
        self._http.auto_open = 0

    def get(self, path: str) -> Any:
        """The answer to a GET, read as JSON.

        Raises:
            DriverError: if there is none.
        """
        try:
            self._http.request("GET", path, headers={"Host": "envoy"})
            answer = self._http.getresponse()
            body = answer.read()
        except (OSError, http.client.HTTPException) as error:
            self._http.close()
            raise DriverError(f"Envoy's admin interface at {shown(self._place)} does not answer: {error}") from error
        try:
            if answer.status == 200:
                return json.loads(body)
        except ValueError:
            pass
        raise DriverError(
            f"this is no admin interface of Envoy at {shown(self._place)}: it answers {path.partition('?')[0]} by "
            f"{answer.status} and {body[:40]!r}"
        )

    def statistics(self, pattern: str) -> dict[str, int]:
        """Counters and gauges whose names match a pattern.

        Raises:
            DriverError: if there is no answer.
        """
        answer = self.get(f"/stats?format=json&filter={quote(pattern)}")
        return {row["name"]: int(row["value"]) for row in answer["stats"] if isinstance(row.get("value"), int)}

    def close(self) -> None:
        """Close it. Idempotent."""
        self._http.close()


def _unreachable(place: Place, error: OSError) -> str:
    where = shown(place)
    if isinstance(error, FileNotFoundError):
        return f"there is no socket {where}: does Envoy run, with its 'admin' there?"
    if isinstance(error, PermissionError):
        return f"no right to use Envoy's admin socket {where}: let this user in by the 'mode' of its pipe"
    if isinstance(error, ConnectionRefusedError):
        return f"nobody answers at {where}: is it the 'admin' address of an Envoy that runs?"
    return f"cannot connect to Envoy's admin interface at {where}: {error.strerror or error}"


class _Begun:
    """Flows that have begun for certain: that were there, waiting or not, at every look for some time.

    Until a flow's first bytes have gone to its server, Envoy has it among those that wait and among those that the
    server has. Counted twice, it would have to be one that has ended in the end. On a busy machine a worker is held up
    even there, over several looks that follow each other closely.
    """

    def __init__(self) -> None:
        self._looks: deque[tuple[float, int]] = deque()

    def certain(self, now: float, begun: int) -> int:
        """As of a look.

        Args:
            now: seconds.
            begun: flows, some of them perhaps counted twice.
        """
        looks = self._looks
        looks.append((now, begun))
        while len(looks) > 1 and looks[1][0] <= now - _HELD_UP:
            looks.popleft()
        return min(flows for _, flows in looks) if looks[0][0] <= now - _HELD_UP else 0


@dataclass(slots=True)
class Host:
    """A server as a process sees it.

    Attributes:
        name: its address and port, or path.
        weight: that the process uses.
        draining: by EDS.
        healthy: by Envoy's own checks and ejections.
        open: flows it has; with :meth:`add_waiting`, also those that wait for it.
        ended: flows that it had and has no more, since the process began.
        failed: those of them that it refused, or of requests that it answered by a status of 5xx or not at all.
        attempts: to begin a flow, since the process began.
        waiting: flows that wait for it; for a moment also those that it has just got.
    """

    name: str
    weight: int
    draining: bool
    healthy: bool
    open: int
    ended: int
    failed: int
    attempts: int
    waiting: int

    _begun: _Begun = field(default_factory=_Begun, repr=False)

    def add_waiting(self, last: Host | None, now: float) -> None:
        """Add to ``open`` the flows that wait, once they have for some time.

        Args:
            last: the server at the last look.
            now: seconds.
        """
        if last is not None and last.attempts <= self.attempts:
            self._begun = last._begun
            self.ended = max(self.ended, last.ended)
        self.open = max(self.open, self._begun.certain(now, self.attempts + self.waiting) - self.ended)


#: What Envoy holds against a host, other than what EDS says.
_UNHEALTHY = (
    "failed_active_health_check",
    "failed_outlier_check",
    "pending_active_hc",
    "active_hc_timeout",
    "excluded_via_immediate_hc_fail",
)


def _host(status: Mapping[str, Any]) -> Host:
    values = {row["name"]: int(row.get("value", 0)) for row in status.get("stats", ())}
    health = status.get("health_status", {})
    refused, errors = values.get("cx_connect_fail", 0), values.get("rq_error", 0)
    now, total = values.get("rq_active", 0), values.get("rq_total", 0)
    return Host(
        name=address_key(status.get("address", {})),
        weight=int(status.get("weight", 1)),
        draining=health.get("eds_health_status") == "DRAINING",
        healthy=not any(health.get(key) for key in _UNHEALTHY),
        open=now,
        # A flow counts as begun once there is a connection for it.
        ended=max(0, total - now) + refused,
        failed=max(refused, errors),
        attempts=total + refused,
        waiting=values.get("rq_pending_active", 0),
    )


class EnvoyProcess(Process):
    """A process of Envoy.

    Attributes:
        connection: to it, by which a process is asked that another has taken over from.
        epoch: of hot restarts.
        merges: it puts updates of weights together, and so some off.
        flush_interval: of its file logs, seconds.
        clusters: hosts by cluster and address, as of the last look.
        statistics: counters, likewise.
        configured: the configuration of every cluster, when it began to be followed.
        ads: that of ADS, likewise; empty without.
        driven: clusters that somebody drives; flows of others keep nobody.
    """

    connection: Connection

    def __init__(
        self, connection: Connection, place: Place, driven: set[str], clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(connection)
        self._place = place
        self._clock = clock
        self.epoch, self.flush_interval, self.merges = 0, 0.0, False
        self.clusters: dict[str, dict[str, Host]] = {}
        self.statistics: dict[str, int] = {}
        self.configured: dict[str, dict[str, Any]] = {}
        self.ads: dict[str, Any] = {}
        self.driven = driven

    def look(self) -> None:
        if self.identity is None:
            self._introduce()
        answer = self.connection.get("/clusters?format=json")
        before = self.clusters
        self.clusters = {
            row["name"]: {host.name: host for host in map(_host, row.get("host_statuses", ()))}
            for row in answer.get("cluster_statuses", ())
        }
        self.statistics = self.connection.statistics(_STATISTICS)
        now = self._clock()
        driven = [(name, host) for name in self.driven for host in self.clusters.get(name, {}).values()]
        self.idle = not any(host.open or host.waiting for _, host in driven)
        for name, host in driven:
            host.add_waiting(before.get(name, {}).get(host.name), now)
        if not self.stopping and self.identity is not None:
            self.stopping = self._succeeded()

    def _introduce(self) -> None:
        """Find out which process this is, and how it is configured."""
        info = self.connection.get("/server_info")
        try:
            self.version = str(info["version"]).split("/")[1]
            options = info["command_line_options"]
            self.epoch = int(options.get("restart_epoch", 0))
            self.flush_interval = float(str(options.get("file_flush_interval", "10s")).removesuffix("s"))
        except (KeyError, IndexError, TypeError, ValueError):
            raise DriverError(
                f"this is no Envoy at {shown(self._place)}: it answers /server_info by {str(info)[:60]!r}"
            ) from None
        found = re.match(r"(\d+)\.(\d+)", self.version)
        number = tuple(map(int, found.groups())) if found else (0, 0)
        self.merges = number < _UNMERGED
        if number < OLDEST:
            raise DriverError(f"Envoy {self.version} is too old: {OLDEST[0]}.{OLDEST[1]} or newer is needed")
        self.configure()

    def configure(self) -> None:
        """Read the configuration of its clusters.

        Raises:
            DriverError: if it does not answer.
        """
        dump = {row.get("@type", "").rpartition(".")[2]: row for row in self.connection.get("/config_dump")["configs"]}
        bootstrap, clusters = dump.get("BootstrapConfigDump", {}), dump.get("ClustersConfigDump", {})
        # Of a precision that no two processes share.
        self.identity = (shown(self._place), self.epoch, bootstrap.get("last_updated"))
        self.ads = bootstrap.get("bootstrap", {}).get("dynamic_resources", {}).get("ads_config", {})
        self.configured = {
            row["cluster"]["name"]: row["cluster"]
            for key in ("static_clusters", "dynamic_warming_clusters", "dynamic_active_clusters")
            for row in clusters.get(key, ())
            if "cluster" in row
        }

    def _succeeded(self) -> bool:
        """True if another process answers where this one did."""
        try:
            connection = Connection(self._place)
        except DriverError:
            return False
        try:
            epoch = connection.statistics(r"^server\.hot_restart_epoch$").get("server.hot_restart_epoch", self.epoch)
        except DriverError:
            return False
        finally:
            connection.close()
        return epoch != self.epoch


class Envoy(Followed[EnvoyProcess]):
    """An Envoy, followed through restarts and hot restarts; shared by the clusters that are driven.

    Args:
        place: path of its admin socket, or host and port.
    """

    proxy = "Envoy"

    def __init__(self, place: Place) -> None:
        self.driven: set[str] = set()
        super().__init__(place)

    def _open(self) -> EnvoyProcess:
        return EnvoyProcess(Connection(self.place), self.place, self.driven)

    def cluster(self, name: str) -> dict[str, Any]:
        """The configuration of a cluster.

        Raises:
            DriverError: if there is none of this name.
        """
        configured = self.newest.configured
        if name not in configured:
            # It may have come since.
            self.newest.configure()
            configured = self.newest.configured
        if name not in configured:
            known = ", ".join(sorted(configured)) or "none"
            raise DriverError(f"Envoy at {shown(self.place)} has no cluster {name!r}; it has {known}")
        return configured[name]


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """What the driver must know of a cluster's configuration.

    Attributes:
        resource: name by which it asks for its endpoints.
        statistics: name in statistics.
        policy: of load balancing.
        file: that it reads its endpoints from; empty if it asks by gRPC.
        merge_window: seconds for which an Envoy that merges updates may hold back weights.
    """

    resource: str
    statistics: str
    policy: str
    file: str
    merge_window: float


def read_cluster(envoy: Envoy, name: str) -> ClusterConfig:
    """Read the configuration of a cluster, and refuse one whose servers or weights EDS does not rule.

    Raises:
        DriverError: with what is in the way.
    """
    cluster = envoy.cluster(name)
    kind = cluster.get("type") or cluster.get("cluster_type", {}).get("name", "STATIC")
    if kind != "EDS":
        raise DriverError(f"cluster {name!r} has type {kind}: weights can be set where its servers come by EDS alone")
    policy = _policy(cluster)
    if policy not in _WEIGHTED:
        raise DriverError(
            f"cluster {name!r} has the load balancing policy {policy}, which does not follow the weights of EDS; use "
            "ROUND_ROBIN, LEAST_REQUEST, RING_HASH or MAGLEV"
        )
    if "locality_weighted_lb_config" in _keys(cluster):
        raise DriverError(
            f"cluster {name!r} has locality_weighted_lb_config, by which the weights of servers count within their "
            "locality alone; leave it out"
        )
    eds = cluster.get("eds_cluster_config", {})
    source = eds.get("eds_config", {})
    file = source.get("path_config_source", {}).get("path") or source.get("path", "")
    api = source.get("api_config_source") or (envoy.newest.ads if "ads" in source else {})
    if "DELTA" in api.get("api_type", ""):
        raise DriverError(
            f"cluster {name!r} asks for its servers by {api['api_type']}, which is not served here; use GRPC"
        )
    common = cluster.get("common_lb_config", {})
    return ClusterConfig(
        resource=eds.get("service_name") or name,
        statistics=(cluster.get("alt_stat_name") or name).replace(":", "_"),
        policy=_WEIGHTED[policy],
        file=file,
        merge_window=float(common.get("update_merge_window", "1s").removesuffix("s")),
    )


def _policy(cluster: Mapping[str, Any]) -> str:
    policies = cluster.get("load_balancing_policy", {}).get("policies", ())
    if policies:
        return str(policies[0].get("typed_extension_config", {}).get("typed_config", {}).get("@type", "")).rpartition(
            "."
        )[2]
    return "subset" if "lb_subset_config" in cluster else str(cluster.get("lb_policy", "ROUND_ROBIN"))


def _keys(value: Any) -> Iterator[str]:
    """Every key of a value of JSON."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _keys(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _keys(inner)


__all__ = ["ClusterConfig", "Connection", "Envoy", "EnvoyProcess", "Host", "parse_admin", "read_cluster"]
