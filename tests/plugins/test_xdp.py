"""The core and the program in the kernel, packet by packet: the same verdicts, servers, bytes and counts."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable

import numpy as np
import pytest
from scapy.layers.inet import ICMP, IP
from scapy.layers.inet import TCP as Tcp
from scapy.packet import Raw

from lbgym.drivers.afpacket.core import DROP as DROPPED
from lbgym.drivers.afpacket.core import PASS as LET_PASS
from lbgym.drivers.afpacket.core import REPLY, SEND
from lbgym.drivers.xdp.plane import Vip, XdpPlane
from tests.drivers.xdp.conftest import Load, _needs_xdp, load
from tests.drivers.xdp.packets import DROP, PASS, TX, install, runner, tcp4
from tests.plugins.packets import ACK, CLIENT, ETHERNET, FIN, PORT, RST, SYN, VIP4, Bench, servers

__all__ = ["_needs_xdp", "load"]
pytestmark = pytest.mark.xdp

PACKETS = 2000
FLAGS = np.array([SYN, SYN, ACK, ACK, ACK, ACK | 8, FIN | ACK, RST, SYN | ACK, 0])
VERDICTS = {PASS: {LET_PASS}, TX: {SEND, REPLY}, DROP: {DROPPED}}


@pytest.mark.parametrize("mode", ["dsr", "dnat"])
def test_any_traffic_in_both(load: Load, bench: Callable[..., Bench], mode: str) -> None:
    rng = np.random.default_rng(8)
    dnat = mode == "dnat"
    plane, one = load(flows=4096, syn_flows=40, dnat=dnat), bench(mode=mode, syn_flows=40, flows=4096)
    vip = Vip(VIP4, PORT)
    plane.set_vips([vip])
    plane.set_sampling(1.0, 0.0)
    run = runner(plane)
    for i in range(PACKETS):
        if i % 200 == 0:
            rule = ("wcmp", "sed", "p2c", "maglev", "round_robin", "lsq", "ecmp", "p2c_sed")[i // 200 % 8]
            weights, active = rng.choice([0.0, 1.0, 2.5], 5), rng.random(5) < 0.8
            install(plane, rule, weights, active)
            one.core.install(rule, servers(weights, active))
        client, port = CLIENT + int(rng.integers(3)), int(rng.integers(1000, 1030))
        flags, isn = int(rng.choice(FLAGS)), int(rng.integers(3))
        kind = rng.random()
        if dnat and kind < 0.2:
            source = f"10.77.2.{rng.integers(1, 6)}"
            packet = IP(src=source, dst=str(ipaddress.IPv4Address(client))) / Tcp(sport=8080, dport=port, flags=flags)
            frame = bytes(ETHERNET - 2) + b"\x08\x00" + bytes(packet)
        elif kind < 0.3:
            about = IP(src=str(VIP4), dst=str(ipaddress.IPv4Address(client))) / Tcp(sport=PORT, dport=port)
            packet = IP(src="11.9.9.9", dst=str(VIP4)) / ICMP(type=3, code=4) / Raw(bytes(about)[:32])
            frame = bytes(ETHERNET - 2) + b"\x08\x00" + bytes(packet)
        else:
            frame = tcp4(client, port, vip, flags, isn)
        code, sent = run(frame)
        result = one.one(frame[ETHERNET:])
        if dnat and (code, result.verdict) == (TX, DROPPED):
            # As a NAT, the core lets no flow begin that it could not translate back.
            assert flags == SYN
            continue
        assert result.verdict in VERDICTS[code], i
        if code == TX:
            assert sent[ETHERNET:] == result.data, i
            assert result.verdict == REPLY or int.from_bytes(sent[4:6], "big") == result.server
        if i % 50 == 0:
            check_same_counts(plane, one)
    check_same_counts(plane, one)
    assert int(plane.shared["counters"]["started"].sum()) > 200


def check_same_counts(plane: XdpPlane, one: Bench) -> None:
    counters, _, totals = one.read(5)
    theirs = plane.shared
    for name in ("started", "completed", "rejected", "failed", "fct_count"):
        assert counters[name].tolist() == theirs["counters"][name][:5].tolist(), name
    assert counters["entries"].tolist() == theirs["entries"][:5].tolist()
    for name in ("syn_open", "unrouted", "syn_limited", "untracked", "adopted", "after_close", "reused", "conflicts"):
        assert int(totals[name]) == int(theirs["totals"][name]), name
