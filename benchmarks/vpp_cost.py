"""Cycles per packet in VPP, beside its own load balancer: ``python -m benchmarks.vpp_cost``, as root.

VPP's packet generator sends TCP packets to a VIP of the plugin and to one of VPP's ``lb``, both with GRE and the same
servers, in the same run and on the same thread; ``show runtime`` says what each node takes for a packet of the vectors
that it was given. A loopback interface follows. VPP_PREFIX is where VPP is installed.
"""

from __future__ import annotations

import ipaddress
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import markdown, parser, report, run_if_possible
from lbgym.drivers import DriverError
from lbgym.drivers.xdp.plane import Vip
from tests.drivers.xdp.network import network
from tests.drivers.xdp.packets import tcp4
from tests.vpp.vpp import Vpp, missing, prepare

SYN, ACK = 0x02, 0x10
ETHERNET = 14
#: VIPs, and the node that serves each.
RULES = ("wcmp", "maglev", "sed")
LB = "lb4-gre4-port"


def write_pcap(path: Path, packets: Sequence[bytes]) -> None:
    """A capture of IP packets."""
    head = np.array([0xA1B2C3D4, 0x00040002, 0, 0, 65_535, 101], "<u4").tobytes()
    with path.open("wb") as file:
        file.write(head)
        for packet in packets:
            file.write(np.array([0, 0, len(packet), len(packet)], "<u4").tobytes() + packet)


class Generator:
    """Streams of packets into a VPP."""

    def __init__(self, vpp: Vpp, folder: Path) -> None:
        self.vpp, self.folder, self._count = vpp, folder, 0
        vpp.cli("create loopback interface")
        vpp.cli("set interface ip address loop0 10.98.0.1/24")
        vpp.cli("set interface state loop0 up")
        vpp.cli("set ip neighbor loop0 10.98.0.2 02:00:00:00:00:02")
        vpp.cli("ip route add 10.99.0.0/16 via 10.98.0.2 loop0")

    def send(self, vip: str, flags: int, first: int, flows: int, packets: int, node: str) -> float:
        """Send packets of as many flows, in turn; returns the cycles that ``node`` took for each."""
        self._count += 1
        name = f"stream{self._count}"
        pcap = self.folder / f"{name}.pcap"
        to = Vip(ipaddress.IPv4Address(vip), 80)
        numbers = range(first, first + flows)
        write_pcap(pcap, [tcp4(0x0B000000 + n // 50_000, 1024 + n % 50_000, to, flags, n)[ETHERNET:] for n in numbers])
        self.vpp.cli(f"packet-generator new {{ name {name} limit {packets} node ip4-lookup pcap {pcap} }}")
        self.vpp.cli("clear runtime")
        self.vpp.cli(f"packet-generator enable-stream {name}")
        while True:
            shown = self.vpp.cli("show runtime")
            found = re.search(rf"^{node} +\w+ +\d+ +(\d+) +\d+ +([\d.e+]+) +([\d.]+)", shown, re.MULTILINE)
            if found is not None and int(found[1]) >= packets:
                break
        self.vpp.cli(f"packet-generator delete {name}")
        pcap.unlink()
        return float(found[2])


def measure(servers: int, flows: int, packets: int, rounds: int) -> dict[str, NDArray[np.float64]]:
    """Cycles per packet of each round; raises DriverError if something is missing."""
    if reason := missing():
        raise DriverError(reason)
    measured: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name, network(1, xdp=False) as net:
        folder = Path(name)
        prepare(net, "dsr")
        vpp = Vpp(net, folder / "vpp")
        try:
            vpp.start()
            generator = Generator(vpp, folder)
            vpp.cli("lb conf ip4-src-address 10.98.0.1 buckets 262144 timeout 40")
            vpp.cli("lb vip 10.97.0.1/32 protocol tcp port 80 encap gre4 new_len 65536")
            vips = {f"lbgym, {rule}": (f"10.97.1.{i + 1}", "lbgym4") for i, rule in enumerate(RULES)}
            for rule, (vip, _) in zip(RULES, vips.values(), strict=True):
                vpp.cli(
                    f"lbgym vip add cost-{rule} {vip} 80 mode gre rule {rule} source 10.98.0.1 flows 1048576 "
                    f"syn-flows 1048576 servers {servers} interval 1"
                )
            for server in range(servers):
                address = f"10.99.{server // 200}.{server % 200 + 1}"
                vpp.cli(f"lb as 10.97.0.1/32 protocol tcp port 80 {address}")
                for rule in RULES:
                    vpp.cli(f"lbgym server add cost-{rule} s{server} {address}")
            vips["VPP's lb"] = "10.97.0.1", LB
            for turn in range(rounds):
                for shown, (vip, node) in vips.items():
                    first = turn * flows
                    new = generator.send(vip, SYN, first, flows, flows, node)
                    generator.send(vip, ACK, first, flows, flows, node)
                    existing = generator.send(vip, ACK, first, flows, packets, node)
                    measured.setdefault(f"{shown}: new flow", []).append(new)
                    measured.setdefault(f"{shown}: existing flow", []).append(existing)
        finally:
            vpp.kill()
    return {key: np.array(values) for key, values in measured.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--servers", type=int, default=64)
    options.add_argument("--flows", type=int, default=None, help="of each round (20,000)")
    given = options.parse_args(arguments)
    flows = given.flows or (1_000 if given.quick else 20_000)
    measured = measure(given.servers, flows, 10 * flows, 2 if given.quick else 7)
    rows = [(key, float(values.min()), float(np.median(values))) for key, values in measured.items()]
    text = markdown(rows, ("cycles per packet", "least", "median"))
    report("vpp_cost", given, text, {"servers": given.servers, "flows": flows, "cycles": measured})
    return 0


if __name__ == "__main__":
    run_if_possible(main)
