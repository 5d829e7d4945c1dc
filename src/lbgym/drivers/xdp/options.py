"""Options of an XDP balancer beyond its servers, table ``[driver]`` of dataplane.toml: :class:`XdpOptions`."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ... import checks
from ...errors import InvalidOptionError
from ..config import DataPlaneConfig, ServerConfig, parse_table
from .layout import MAX_SERVERS, MAX_VIPS, NAME_SIZE
from .plane import Address, Vip
from .tables import MECHANISMS

#: Dispatch rules that a configuration may name: scores of ``table`` come from nowhere.
RULES = tuple(rule for rule in MECHANISMS if rule != "table")
_LOOKS = re.compile(r"(?:\[(?P<v6>[^\]]+)\]|(?P<v4>[^:\[\]]+)):(?P<port>\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class XdpOptions:
    """Table ``[driver]``.

    Attributes:
        vips: addresses and TCP ports that clients connect to, such as "10.0.0.100:80" or "[fd00::100]:80"; all of them
            are served by all servers.
        interfaces: that clients' packets come in by; with ``dnat`` also those of the servers' answers.
        mode: "dsr": only MAC addresses change, servers have the VIP on an interface that does not answer ARP, and
            answer clients directly; "dnat": servers see their own address, and answer through the balancer.
        rule: dispatch rule; any but ``table``, whose scores no configuration and no action has.
        balancers: m of ``sed_scaled``.
        attach: "native", "generic", or "auto": native where the interface's driver can.
        flows: entries of the flow table, 16 to 2**24; about 120 bytes each, twice that with ``dnat``.
        syn_flows: most of them that are of flows of which only a SYN was seen; None: a quarter.
        fct_sampling: probability that the FCT of a flow is sampled.
        duration_sampling: probability that the age of a flow is sampled at one of its packets.
        syn_timeout: seconds after which a flow of which only a SYN was seen is forgotten.
        idle_timeout: seconds without a packet after which an open flow is forgotten; it has failed.
        close_timeout: seconds without a packet after which a flow that has ended is forgotten.
        orphan_timeout: seconds without a driver after which new flows go by the configured weights.
        keep: leave the balancer at work when the driver ends, for the next driver.
        pin: folder of a BPF file system; None: /sys/fs/bpf/lbgym/NAME.
        object: compiled program; None: compiled by clang at first use.
    """

    vips: tuple[str, ...]
    interfaces: tuple[str, ...]
    mode: str = "dsr"
    rule: str = "sed"
    balancers: int = 1
    attach: str = "auto"
    flows: int = 262_144
    syn_flows: int | None = None
    fct_sampling: float = 1.0
    duration_sampling: float = 1 / 64
    syn_timeout: float = 10.0
    idle_timeout: float = 300.0
    close_timeout: float = 10.0
    orphan_timeout: float = 10.0
    keep: bool = False
    pin: str | None = None
    object: str | None = None

    def __post_init__(self) -> None:
        for key in ("vips", "interfaces"):
            values = checks.items(key, getattr(self, key), "texts")
            if not values:
                raise InvalidOptionError(f"{key} must not be empty")
            for value in values:
                checks.text(key, value)
            if len(set(values)) < len(values):
                twice = next(value for value in values if values.count(value) > 1)
                raise InvalidOptionError(f"{key}: {twice!r} is there twice")
            object.__setattr__(self, key, values)
        if len(self.vips) > MAX_VIPS:
            raise InvalidOptionError(f"there can be {MAX_VIPS} VIPs, got {len(self.vips)}")
        _ = self.parsed_vips
        checks.choice("mode", self.mode, ("dsr", "dnat"))
        checks.choice("dispatch rule of an XDP balancer", self.rule, RULES)
        checks.whole("balancers", self.balancers, high=1 << 16)
        checks.choice("way to attach", self.attach, ("auto", "native", "generic"))
        checks.whole("flows", self.flows, low=16, high=1 << 24)
        if self.syn_flows is not None:
            checks.whole("syn_flows", self.syn_flows, high=self.flows)
        for key in ("fct_sampling", "duration_sampling"):
            checks.number(key, getattr(self, key), low=0.0, high=1.0)
        for key in ("syn_timeout", "idle_timeout", "close_timeout", "orphan_timeout"):
            checks.seconds(key, getattr(self, key), low=0.1, high=1e6)
        checks.boolean("keep", self.keep)
        for key in ("pin", "object"):
            if getattr(self, key) is not None:
                checks.text(key, getattr(self, key))
        if self.pin is not None and (not self.pin.startswith("/") or "." in self.pin):
            raise InvalidOptionError(f"pin must be an absolute path without dots in it, got {self.pin!r}")

    @property
    def parsed_vips(self) -> list[Vip]:
        """The VIPs as addresses and ports."""
        vips = [parse_vip(text) for text in self.vips]
        if len(set(vips)) < len(vips):
            twice = next(vip for vip in vips if vips.count(vip) > 1)
            raise InvalidOptionError(f"vips: {twice} is there twice")
        return vips

    def pin_folder(self, name: str) -> Path:
        """Where program and maps of region ``name`` are pinned."""
        return Path(self.pin) if self.pin else default_pin_folder(name)


def default_pin_folder(name: str) -> Path:
    """Where a balancer is pinned unless it says otherwise; a BPF file system allows no dots in names."""
    return Path("/sys/fs/bpf/lbgym", re.sub(r"[^A-Za-z0-9_-]", "_", name))


def parse_options(table: Mapping[str, Any], where: str) -> XdpOptions:
    """The table ``[driver]``.

    Raises:
        InvalidOptionError: for a key that is missing or has a bad value; the message begins with ``where``.
        UnknownNameError: for a key that does not exist.
    """
    options: XdpOptions = parse_table(XdpOptions, dict(table), where)
    return options


def parse_vip(text: str) -> Vip:
    """ADDRESS:PORT, with an IPv6 address in brackets."""
    found = _LOOKS.fullmatch(text)
    try:
        if found is None:
            raise ValueError
        port = int(found["port"])
        if not 0 < port < 65_536:
            raise ValueError
        address: Address = ipaddress.IPv6Address(found["v6"]) if found["v6"] else ipaddress.IPv4Address(found["v4"])
    except ValueError:
        raise InvalidOptionError(
            f"a VIP must be an IP address and a port such as 10.0.0.100:80 or [fd00::100]:80, got {text!r}"
        ) from None
    return Vip(address, port)


def check_servers(servers: Sequence[ServerConfig], options: XdpOptions, where: str) -> None:
    """Refuse servers that the balancer cannot reach, or that share an address.

    Raises:
        InvalidOptionError: with the server's name.
    """
    seen: dict[tuple[Address, int], str] = {}
    vips = options.parsed_vips
    for server in servers:
        try:
            address = ipaddress.ip_address(server.address)
        except ValueError:
            raise InvalidOptionError(
                f"{where}: the address of server {server.name!r} must be an IP address, got {server.address!r}"
            ) from None
        if len(server.name.encode()) >= NAME_SIZE:
            raise InvalidOptionError(
                f"{where}: the name of a server must be below {NAME_SIZE} bytes, got {server.name!r}"
            )
        port = 0
        if options.mode == "dnat":
            if server.port is None:
                raise InvalidOptionError(f"{where}: server {server.name!r} needs a port for mode dnat")
            port = server.port
            for vip in vips:
                if vip.address.version != address.version:
                    raise InvalidOptionError(
                        f"{where}: the VIP {vip} is of IPv{vip.address.version} and server {server.name!r} ({address}) "
                        f"of IPv{address.version}; mode dnat does not translate between them"
                    )
        if any(vip.address == address for vip in vips):
            raise InvalidOptionError(f"{where}: the address of server {server.name!r}, {address}, is a VIP's")
        other = seen.setdefault((address, port), server.name)
        if other != server.name:
            shown = f"{address} port {port}" if port else str(address)
            raise InvalidOptionError(f"{where}: servers {other!r} and {server.name!r} have the same address, {shown}")


def check_config(config: DataPlaneConfig, options: XdpOptions, where: str) -> None:
    """Refuse what the parts of a configuration do not say by themselves; raises InvalidOptionError."""
    if config.capacity is not None and config.capacity > MAX_SERVERS:
        raise InvalidOptionError(f"{where}: an XDP balancer has room for {MAX_SERVERS} servers, got {config.capacity}")
    if len(config.servers) > (config.capacity or MAX_SERVERS):
        raise InvalidOptionError(
            f"{where}: there are {len(config.servers)} servers, and room for {config.capacity or MAX_SERVERS}"
        )
    check_servers(config.servers, options, where)
