"""A small network of namespaces: a client, a balancer, servers, and a bridge between them; real TCP."""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from lbgym.drivers import DriverError
from lbgym.lab import namespaces
from lbgym.lab.data_planes import pass_packets
from lbgym.lab.namespaces import inside, missing_tools
from lbgym.sharedmemory import ObservationBuffer, SharedMemoryRegion
from tests.chance import as_likely
from tests.drivers.test_discovery import eventually

VIP4, VIP6 = "10.77.1.100", "fd77::100"
PORT = 8080
SOCKETS = Path(__file__).with_name("sockets.py")
#: Own addresses of clients, so that there are ports for all connections.
SOURCES = 4


#: A packet filter of Linux: "tcp[tcpflags] & tcp-rst != 0" of either IP version, without options.
_RESETS = b"".join(
    struct.pack("HBBI", *instruction)
    for instruction in (
        (0x30, 0, 0, 0), (0x54, 0, 0, 0xF0), (0x15, 0, 4, 0x40), (0x30, 0, 0, 9), (0x15, 0, 8, 6), (0x30, 0, 0, 33),
        (0x45, 5, 6, 4), (0x15, 0, 5, 0x60), (0x30, 0, 0, 6), (0x15, 0, 3, 6), (0x30, 0, 0, 53), (0x45, 0, 1, 4),
        (0x06, 0, 0, 128), (0x06, 0, 0, 0),
    )
)  # fmt: skip
_ATTACH_FILTER = 26


class Network:
    """Namespaces client, balancer, fabric and server-0 to server-{n-1}, each with an interface eth0.

    Args:
        servers: n.
        dnat: servers answer through the balancer; else they have the VIPs.
        xdp: the balancer's kernel has the VIPs, and its veth pair is made ready for XDP; else they are nobody's.
    """

    def __init__(self, servers: int, *, dnat: bool = False, xdp: bool = True) -> None:
        self._network = namespaces.Network(f"lbt{os.getpid()}-")
        self.servers = [f"server-{i}" for i in range(servers)]
        self.dnat, self.xdp = dnat, xdp
        self._processes: list[subprocess.Popen[str]] = []
        self._watches: list[socket.socket] = []

    def name(self, part: str) -> str:
        return self._network.name(part)

    def up(self) -> None:
        net = self._network
        addresses = {
            "client": [
                *(f"{source}/16" for source in self.sources(ipv6=False)),
                *(f"{source}/64" for source in self.sources(ipv6=True)),
            ],
            "balancer": ["10.77.0.2/16", "fd77::2/64"],
        }
        for i, server in enumerate(self.servers):
            addresses[server] = [f"10.77.2.{i + 1}/16", f"fd77::1:{i + 1}/64"]
        net.create(addresses)
        # Ports of the client for tens of thousands of connections that have just been closed.
        self.run("client", "sysctl", "-qw", "net.ipv4.ip_local_port_range=1024 65535")
        for subnet in ("10.77.0.0/16", "fd77::/64"):
            net.ip("route", "add", subnet, "dev", "eth0", part="client")
        for part in ("balancer", *self.servers):
            for subnet, router in (("10.78.0.0/16", "10.77.0.2"), ("fd78::/64", "fd77::2")):
                via = ["via", router] if self.dnat and part != "balancer" else []
                net.ip("route", "add", subnet, *via, "dev", "eth0", part=part)
        for vip in (f"{VIP4}/32", f"{VIP6}/128"):
            if self.xdp:
                net.add_address("balancer", vip, "eth0")
            for server in [] if self.dnat else self.servers:
                net.hold_vip(server, vip)
        if self.xdp:
            pass_packets(self.name("fabric"), net.port("balancer"))
        else:
            for family in ("ipv4", "ipv6"):
                net.sysctl("balancer", **{f"net.{family}.conf.eth0.forwarding": 0})

    def command(self, part: str, *arguments: object) -> list[str]:
        return self._network.command(part, *map(str, arguments))

    def run(self, part: str, *arguments: object) -> str:
        done = subprocess.run(self.command(part, *arguments), capture_output=True, text=True)
        assert done.returncode == 0, f"{arguments}: {done.stderr}"
        return done.stdout

    def start(self, part: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            self.command(part, *arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
        )
        self._processes.append(process)
        return process

    def serve(self, server: str) -> subprocess.Popen[str]:
        """A TCP server that answers with its name."""
        process = self.start(server, sys.executable, "-I", SOCKETS, "serve", server, PORT)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        return process

    def clients(self, connections: int, **keys: Any) -> subprocess.Popen[str]:
        """Clients at work, by the keys of ``sockets.connect``; :func:`outcome` has what came of it."""
        keys = {"host": VIP4, "port": PORT, "connections": connections, **keys}
        return self.start("client", sys.executable, "-I", SOCKETS, "connect", json.dumps(keys))

    def sources(self, *, ipv6: bool) -> list[str]:
        """Addresses of clients."""
        return [f"fd78::{i + 1}" if ipv6 else f"10.78.0.{i + 1}" for i in range(SOURCES)]

    def watch_resets(self) -> None:
        """Notice RSTs that servers send from now on: as they do for packets of connections that they do not know."""
        for server in self.servers:
            with inside(self.name(server)):
                watch = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0003))
            code = ctypes.create_string_buffer(_RESETS)
            watch.setsockopt(
                socket.SOL_SOCKET, _ATTACH_FILTER, struct.pack("HP", len(_RESETS) // 8, ctypes.addressof(code))
            )
            watch.setblocking(False)
            self._watches.append(watch)

    def resets(self) -> list[tuple[int, str, int]]:
        """Of each RST since :meth:`watch_resets`: the server, by number, and the client's address and port."""
        found = []
        for number, watch in enumerate(self._watches):
            with contextlib.suppress(BlockingIOError):
                while True:
                    packet, where = watch.recvfrom(128)
                    is_ipv6 = packet[0] >> 4 == 6
                    address, port = (packet[24:40], packet[42:44]) if is_ipv6 else (packet[16:20], packet[22:24])
                    if where[2] == socket.PACKET_OUTGOING:
                        found.append((number, str(ipaddress.ip_address(address)), int.from_bytes(port)))
        return found

    def down(self) -> None:
        for watch in self._watches:
            watch.close()
        for process in self._processes:
            process.kill()
            process.communicate()
        self._network.remove()


def whole_outcome(process: subprocess.Popen[str], timeout: float = 120.0) -> Mapping[str, Any]:
    """What ``sockets.connect`` returned."""
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == 0, err
    told: Mapping[str, Any] = json.loads(out)
    return told


def outcome(process: subprocess.Popen[str]) -> tuple[Counter[str], list[str], int]:
    """Answers by server, failures, and connections that changed their server."""
    told = whole_outcome(process)
    return Counter(told["answered"]), told["failed"], told["moved"]


@contextmanager
def network(servers: int, **options: Any) -> Iterator[Network]:
    if reason := missing_tools():
        raise DriverError(reason)
    made = Network(servers, **options)
    try:
        made.up()
        yield made
    finally:
        made.down()


def dataplane_toml(
    path: Path,
    name: str,
    servers: Sequence[str],
    *,
    ipv6: bool = False,
    head: str = "",
    driver: Mapping[str, Any] | None = None,
) -> Path:
    """A configuration for a network's balancer."""
    keys: dict[str, Any] = {"vips": [f"{VIP4}:{PORT}", f"[{VIP6}]:{PORT}"], "interfaces": ["eth0"], **(driver or {})}
    lines = [f'name = "{name}"', "publish_interval = 0.05", head, "[driver]"]
    lines += [f"{key} = {json.dumps(value)}" for key, value in keys.items()]
    for server in servers:
        number = int(server.rpartition("-")[2]) + 1
        address = f"fd77::1:{number}" if ipv6 else f"10.77.2.{number}"
        lines += ["[[servers]]", f'name = "{server}"', f'address = "{address}"', f"port = {PORT}"]
    path.write_text("\n".join(lines) + "\n")
    return path


@contextmanager
def driver(net: Network, *arguments: object, kind: str = "xdp") -> Iterator[subprocess.Popen[str]]:
    """``lbgym dataplane KIND`` in the balancer's namespace, at work."""
    process = net.start("balancer", sys.executable, "-m", "lbgym", "dataplane", kind, *arguments)
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line.startswith("region"):
        raise DriverError(process.communicate()[1])
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def newest(region: SharedMemoryRegion) -> ObservationBuffer:
    """The next observation that is published from now on."""
    buffer = region.new_buffer()
    assert region.read_into(buffer)
    assert region.wait_observation(buffer.sequence_id, 10.0)
    assert region.read_into(buffer)
    return buffer


def balance(net: Network, region: SharedMemoryRegion, host: str, connections: int) -> ObservationBuffer:
    """Check twice so many connections: whole while weights change, and spread as by weights that stay.

    Returns:
        An observation of after they have ended.
    """
    turn = 1
    region.write_action(sequence_id=turn, weights=[1.0, 1.0, 1.0], lease=5.0)  # compiled now
    clients = net.clients(connections, host=host, pause=0.01)
    while clients.poll() is None:
        turn += 1
        region.write_action(sequence_id=turn, weights=np.roll([1.0, 2.0, 7.0], turn), lease=5.0)
        time.sleep(0.1)
    answered, failed, moved = outcome(clients)
    assert (sum(answered.values()), failed, moved, turn > 3) == (connections, [], 0, True)

    before = newest(region).counters[:3, 0].astype(int)
    region.write_action(sequence_id=turn + 1, weights=[1.0, 2.0, 7.0], lease=60.0)
    eventually(lambda: newest(region).applied_sequence_id == turn + 1)
    answered, failed, moved = outcome(net.clients(connections, host=host))
    assert (failed, moved) == ([], 0)
    placed = newest(region).counters[:3, 0].astype(int) - before
    assert placed.tolist() == [answered[server] for server in net.servers]
    assert placed.sum() == connections and as_likely(placed, [0.1, 0.2, 0.7])
    eventually(lambda: not newest(region).stats[:, 0].any())
    seen = newest(region)
    # Of the first ones each took two pauses of 10 ms and more.
    assert (seen.stats[:3, 1] > 0.0).all() and (seen.stats[:3, 6] > 0.0).all()
    assert seen.fct_count == 2 * connections
    return seen


def has_program(net: Network) -> bool:
    return "xdp" in net.run("balancer", "ip", "link", "show", "dev", "eth0")
