"""Packets for BPF_PROG_TEST_RUN: by scapy where one is looked at, by hand where there are many."""

from __future__ import annotations

import ipaddress
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lbgym.drivers.xdp.layout import Mechanism
from lbgym.drivers.xdp.libbpf import PacketRun
from lbgym.drivers.xdp.plane import Address, Reach, Vip, XdpPlane
from lbgym.drivers.xdp.tables import DispatchTable, IndexInputs, dispatch_table, maglev_table

PASS, DROP, TX = 2, 1, 3
FIN, SYN, RST, ACK = 0x01, 0x02, 0x04, 0x10

CLIENT_MAC, BALANCER_MAC = "02:00:00:00:00:01", "02:00:00:00:00:02"
VIP4, VIP6 = Vip(ipaddress.ip_address("10.77.1.100"), 80), Vip(ipaddress.ip_address("fd77::100"), 80)


def server_mac(row: int) -> bytes:
    return bytes([2, 0, 0, 1, row >> 8, row & 0xFF])


def reach(count: int, *, ipv6: bool = False) -> list[Reach | None]:
    """Servers that are reached by the interface of test runs, number 1."""
    base = int(ipaddress.ip_address("fd77::1:0" if ipv6 else "10.77.2.0"))
    make = ipaddress.IPv6Address if ipv6 else ipaddress.IPv4Address
    own = bytes.fromhex(BALANCER_MAC.replace(":", ""))
    return [Reach(f"s{i}", make(base + i + 1), 8080, server_mac(i), own, 1) for i in range(count)]


def install(
    plane: XdpPlane,
    rule: str,
    weights: NDArray[np.float64],
    active: NDArray[np.bool_] | None = None,
    *,
    inputs: IndexInputs | None = None,
    ipv6: bool = False,
) -> DispatchTable:
    """Put a rule in force; the fallback table is by equal weights."""
    active = np.ones(len(weights), np.bool_) if active is None else active
    table = dispatch_table(rule, weights, active, inputs)
    servers = np.flatnonzero(active).astype(np.uint32)
    fallback = maglev_table(np.ones(len(weights)), servers) if len(servers) else servers
    plane.install(table, fallback, reach(len(weights), ipv6=ipv6))
    assert table.mechanism is not Mechanism.NOBODY or not active.any()
    return table


def tcp4(client: int, port: int, vip: Vip, flags: int, seq: int = 0) -> bytes:
    """A TCP packet without checksums: from an IPv4 client, as a whole number, to a VIP."""
    ethernet = bytes.fromhex((BALANCER_MAC + CLIENT_MAC).replace(":", "")) + b"\x08\x00"
    ip = struct.pack("!BBHHHBBHI4s", 0x45, 0, 40, 0, 0, 64, 6, 0, client, vip.address.packed)
    return ethernet + ip + struct.pack("!HHIIBBHHH", port, vip.port, seq, 0, 0x50, flags, 1024, 0, 0)


def tcp6(client: Address, port: int, vip: Vip, flags: int, seq: int = 0) -> bytes:
    ethernet = bytes.fromhex((BALANCER_MAC + CLIENT_MAC).replace(":", "")) + b"\x86\xdd"
    ip = struct.pack("!IHBB16s16s", 0x60000000, 20, 6, 64, client.packed, vip.address.packed)
    return ethernet + ip + struct.pack("!HHIIBBHHH", port, vip.port, seq, 0, 0x50, flags, 1024, 0, 0)


def mix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser, of arrays."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def flow_hashes(vip: Vip, clients: NDArray[np.uint32], ports: NDArray[np.uint16]) -> NDArray[np.uint64]:
    """The hashes of flows of IPv4 clients: words as they are in the memory of a little-endian machine."""
    h = mix64(np.uint64(vip.service) ^ clients.astype(">u4").view("<u4").astype(np.uint64))
    return mix64(mix64(h) ^ ports.astype(">u2").view("<u2").astype(np.uint64))


def server_of(result: tuple[int, bytes]) -> int:
    """The row of the server that a frame was sent to."""
    code, frame = result
    assert code == TX, code
    assert frame[:4] == bytes([2, 0, 0, 1])
    return int.from_bytes(frame[4:6], "big")


def runner(plane: XdpPlane, program: str = "balancer") -> PacketRun:
    return PacketRun(plane.program(program))


def open_flows(plane: XdpPlane) -> list[int]:
    rows = int(plane.shared["settings"]["tables"][plane.bank]["rows"])
    return list(plane.shared["open_flows"][:rows].astype(int))


def counters(plane: XdpPlane) -> dict[str, int]:
    counted: Any = plane.shared["counters"]
    return {name: int(counted[name].sum()) for name in ("started", "completed", "rejected", "failed")}
