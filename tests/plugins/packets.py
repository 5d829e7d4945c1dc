"""Packets through the balancer core: by hand where there are many, by scapy where one is looked at."""

from __future__ import annotations

import ctypes
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lbgym.drivers.afpacket.core import SERVER, TCP, UDP, VIP, Core, CoreOptions, Packet
from tests.drivers.xdp.packets import tcp4, tcp6

FIN, SYN, RST, ACK = 0x01, 0x02, 0x04, 0x10
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
VIP4, VIP6 = ipaddress.ip_address("10.77.1.100"), ipaddress.ip_address("fd77::100")
PORT = 80
CLIENT = 0x0B000001
SECOND = 1_000_000_000
#: Bytes of a frame before its IP header.
ETHERNET = 14
HEADROOM = 64


def wire(address: Address) -> NDArray[np.uint8]:
    return np.frombuffer(address.packed.ljust(16, b"\0"), np.uint8)


def vips(*wanted: tuple[Address, int, int]) -> NDArray[Any]:
    """Addresses, ports and protocols as the core has them."""
    rows = np.zeros(len(wanted), VIP)
    for row, (address, port, protocol) in zip(rows, wanted, strict=True):
        row["address"], row["port"], row["protocol"] = wire(address), port, protocol
        row["is_ipv6"] = address.version == 6
    return rows


BOTH = ((VIP4, PORT, TCP), (VIP6, PORT, TCP), (VIP4, 53, UDP), (VIP6, 53, UDP))


def servers(
    weights: Sequence[float] | NDArray[np.float64], active: Any = None, *, ipv6: bool = False, **columns: Any
) -> NDArray[Any]:
    """Rows of the table of servers, all there and reachable; safe weights are 1."""
    rows = np.zeros(len(weights), SERVER)
    base = int(ipaddress.ip_address("fd77::1:0" if ipv6 else "10.77.2.0"))
    make = ipaddress.IPv6Address if ipv6 else ipaddress.IPv4Address
    for i, row in enumerate(rows):
        row["address"] = wire(make(base + i + 1))
    rows["port"], rows["is_ipv6"], rows["present"], rows["reachable"] = 8080, ipv6, 1, 1
    rows["active"] = 1 if active is None else active
    rows["weight"], rows["safe_weight"], rows["cores"] = weights, 1.0, 1.0
    rows["via"] = np.arange(len(rows)) + 100
    for name, values in columns.items():
        rows[name] = values
    return rows


@dataclass
class Result:
    """Of one packet."""

    verdict: int
    server: int
    vip: int
    link: int
    via: int
    data: bytes


class Bench:
    """A core, and the clock that its packets come at."""

    def __init__(self, library: ctypes.CDLL, **options: Any) -> None:
        self.core = Core(CoreOptions(**{"flows": 4096, "syn_flows": 4096, "seed": 5, **options}), library)
        self.core.set_vips(vips(*BOTH))
        self.now = 100 * SECOND
        self._memory = ctypes.create_string_buffer(1 << 17)

    def run(self, *frames: bytes, link: int = 0, partial: bool = False, worker: int = 0) -> list[Result]:
        """One burst of IP packets."""
        packets = (Packet * len(frames))()
        memory = ctypes.create_string_buffer(sum(len(frame) + HEADROOM for frame in frames))
        at = ctypes.addressof(memory)
        for packet, frame in zip(packets, frames, strict=True):
            ctypes.memmove(at + HEADROOM, frame, len(frame))
            packet.data, packet.length, packet.headroom = at + HEADROOM, len(frame), HEADROOM
            packet.link, packet.partial = link, partial
            at += HEADROOM + len(frame)
        self.core.library.lbgym_worker_run(self.core.worker(worker), packets, len(frames), self.now)
        return [Result(p.verdict, p.server, p.vip, p.link, p.via, ctypes.string_at(p.data, p.length)) for p in packets]

    def one(self, frame: bytes, **options: Any) -> Result:
        (result,) = self.run(frame, **options)
        return result

    def tick(self, seconds: float = 0.0, budget: int = 1 << 30, worker: int = 0) -> int:
        self.now += round(seconds * SECOND)
        return int(self.core.library.lbgym_worker_tick(self.core.worker(worker), self.now, budget))

    def read(self, count: int = 4) -> tuple[NDArray[Any], NDArray[np.float32], Any]:
        self.core.ask()
        for worker in range(self.core.options.workers):
            self.tick(worker=worker)
        return self.core.read(count)

    def totals(self, *names: str) -> list[int]:
        totals = self.read()[2]
        return [int(totals[name]) for name in names]

    def open(self, count: int = 4) -> list[int]:
        return [int(n) for n in self.core.open_flows[:count]]

    def forget_all(self) -> None:
        for worker in range(self.core.options.workers):
            for _ in range(4):
                self.tick(1000.0, worker=worker)


def packet4(client: int, port: int, flags: int, seq: int = 0, vip: Address = VIP4, vip_port: int = PORT) -> bytes:
    from lbgym.drivers.xdp.plane import Vip

    return tcp4(client, port, Vip(vip, vip_port), flags, seq)[ETHERNET:]


def packet6(client: int, port: int, flags: int, seq: int = 0) -> bytes:
    from lbgym.drivers.xdp.plane import Vip

    return tcp6(ipaddress.IPv6Address(client), port, Vip(VIP6, PORT), flags, seq)[ETHERNET:]
