"""The data planes of a laboratory: :class:`LabDataPlane` and its registry."""

from __future__ import annotations

import dataclasses
import json
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from .. import checks
from ..drivers import DriverError
from ..errors import InvalidOptionError, MissingExtraError, UnknownNameError
from ..scenarios import Scenario
from .base import LabError, run_tool
from .namespaces import Network, inside

VIP, VIP_PORT = "10.77.1.100", 80


@dataclass(frozen=True, slots=True)
class Place:
    """Where one balancer of a laboratory stands.

    Attributes:
        network: of the laboratory.
        part: of the network that the balancer has for itself, with one interface eth0.
        region: name of its region.
        servers: name, address and port of each.
        scenario: what is balanced.
        options: table ``[driver]`` of the configuration.
        publish_interval: seconds.
        folder: for its configuration.
    """

    network: Network
    part: str
    region: str
    servers: Sequence[tuple[str, str, int]]
    scenario: Scenario
    options: Mapping[str, Any]
    publish_interval: float
    folder: Path


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


#: Every data plane by its name.
DATA_PLANES: Mapping[str, LabDataPlane] = MappingProxyType({"xdp": XdpDataPlane()})


def data_plane(name: str) -> LabDataPlane:
    """A data plane by its name.

    Raises:
        UnknownNameError: for another name.
    """
    return DATA_PLANES[checks.choice("data plane", name, DATA_PLANES)]
