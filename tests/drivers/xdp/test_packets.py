"""Packets as they come out: addresses, ports and checksums as scapy has them, and what is left to the kernel."""

from __future__ import annotations

import ipaddress
import logging
from typing import Any

import numpy as np
import pytest

from lbgym.drivers import DriverError
from lbgym.drivers.xdp.plane import Vip, XdpPlane
from tests.drivers.xdp.conftest import Load, missing
from tests.drivers.xdp.packets import (
    BALANCER_MAC,
    CLIENT_MAC,
    DROP,
    PASS,
    TX,
    VIP4,
    VIP6,
    counters,
    install,
    open_flows,
    reach,
    runner,
    server_mac,
)

pytestmark = pytest.mark.xdp

if not missing():
    logging.getLogger("scapy").setLevel(logging.ERROR)
    from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_NOP, fragment
    from scapy.layers.inet6 import (
        ICMPv6EchoRequest,
        ICMPv6PacketTooBig,
        ICMPv6TimeExceeded,
        IPv6,
        IPv6ExtHdrDestOpt,
        IPv6ExtHdrFragment,
    )
    from scapy.layers.l2 import ARP, Dot1Q, Ether
    from scapy.packet import Packet, Raw

CLIENT4, CLIENT6 = "11.0.0.1", "fd11::1"
SERVER_MAC = server_mac(0).hex(":")
#: With addresses: scapy would ask the network for each that is missing.
ETHER = Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02")


def ether() -> Packet:
    return Ether(src=CLIENT_MAC, dst=BALANCER_MAC)


def client_packet(ipv6: bool, flags: str = "S", *, port: int = 4000, payload: bytes = b"", seq: int = 1) -> Packet:
    ip = IPv6(src=CLIENT6, dst=str(VIP6.address)) if ipv6 else IP(src=CLIENT4, dst=str(VIP4.address), ttl=63)
    return ether() / ip / TCP(sport=port, dport=80, flags=flags, seq=seq) / payload


def balancer(load: Load, ipv6: bool, dnat: bool, servers: int = 1) -> XdpPlane:
    plane = load(dnat=dnat)
    plane.set_vips([VIP6 if ipv6 else VIP4])
    install(plane, "lsq", np.ones(servers), ipv6=ipv6)
    return plane


def sent(result: tuple[int, bytes]) -> Packet:
    assert result[0] == TX
    return Ether(result[1])


def checked(packet: Packet) -> bytes:
    """The same packet with checksums of scapy's own."""
    fresh = Ether(bytes(packet))
    layer: Any = fresh
    while layer:
        for name in ("chksum", "cksum"):
            if name in layer.fields:
                del layer.fields[name]
        # What an ICMP error quotes is not made again, but quoted.
        layer = layer.payload if not isinstance(layer, ICMP) else None
    return bytes(fresh)


@pytest.mark.parametrize("ipv6", [False, True], ids=["ipv4", "ipv6"])
def test_direct_server_return_changes_mac_addresses_only(load: Load, ipv6: bool) -> None:
    run = runner(balancer(load, ipv6, dnat=False))
    for flags in ("S", "A", "PA", "FA"):
        before = client_packet(ipv6, flags, payload=b"GET /" * 100)
        after = sent(run(bytes(before)))
        assert (after.src, after.dst) == (BALANCER_MAC, SERVER_MAC)
        assert bytes(after)[12:] == bytes(before)[12:]


@pytest.mark.parametrize("ipv6", [False, True], ids=["ipv4", "ipv6"])
@pytest.mark.parametrize("payload", [b"", b"a", b"GET / HTTP/1.0\r\n\r\n" * 50])
def test_dnat_in_both_directions(load: Load, ipv6: bool, payload: bytes) -> None:
    plane = balancer(load, ipv6, dnat=True)
    run = runner(plane)
    kind, vip, client = (IPv6, VIP6, CLIENT6) if ipv6 else (IP, VIP4, CLIENT4)
    server = reach(1, ipv6=ipv6)[0]
    assert server is not None
    for flags in ("S", "A", "PA"):
        before = client_packet(ipv6, flags, payload=payload)
        after = sent(run(bytes(before)))
        assert (after.src, after.dst) == (BALANCER_MAC, SERVER_MAC)
        assert (after[kind].src, after[kind].dst) == (client, str(server.address))
        assert (after[TCP].sport, after[TCP].dport) == (4000, 8080)
        assert bytes(after) == checked(after)
        assert bytes(after[TCP].payload) == payload
    reply = (
        Ether(src=SERVER_MAC, dst=BALANCER_MAC)
        / kind(src=str(server.address), dst=client)
        / TCP(sport=8080, dport=4000, flags="A", seq=9)
        / payload
    )
    after = sent(run(bytes(reply)))
    assert (after.src, after.dst) == (BALANCER_MAC, CLIENT_MAC)
    assert (after[kind].src, after[kind].dst) == (str(vip.address), client)
    assert (after[TCP].sport, after[TCP].dport) == (80, 4000)
    assert bytes(after) == checked(after)
    # The client's FIN does not end the flow, as it may await an answer; the server's does.
    run(bytes(client_packet(ipv6, "FA")))
    assert open_flows(plane) == [1]
    reply[TCP].flags = "FA"
    del reply[TCP].chksum
    run(bytes(reply))
    assert open_flows(plane) == [0] and counters(plane)["completed"] == 1


@pytest.mark.parametrize("state", ["S", "A"])
def test_a_server_that_refuses_or_resets(load: Load, state: str) -> None:
    plane = balancer(load, False, dnat=True)
    run = runner(plane)
    run(bytes(client_packet(False)))
    if state == "A":
        run(bytes(client_packet(False, "A")))
    reset = ETHER / IP(src="10.77.2.1", dst=CLIENT4) / TCP(sport=8080, dport=4000, flags="RA")
    assert sent(run(bytes(reset)))[IP].src == str(VIP4.address)
    assert counters(plane) == {"started": 1, "completed": 0, "rejected": state == "S", "failed": state == "A"}
    assert int(plane.shared["counters"]["fct_count"].sum()) == 1 * (state == "A")


def test_packets_of_servers_without_a_flow_are_left_to_the_kernel(load: Load) -> None:
    run = runner(balancer(load, False, dnat=True))
    for source, port in (("10.77.2.1", 8080), ("10.77.2.1", 22), ("10.77.2.9", 8080)):
        assert run(bytes(ETHER / IP(src=source, dst=CLIENT4) / TCP(sport=port, dport=4000)))[0] == PASS


def test_one_client_port_cannot_have_flows_of_two_vips_at_one_server(load: Load) -> None:
    plane = load(dnat=True)
    other = Vip(ipaddress.ip_address("10.77.1.101"), 80)
    plane.set_vips([VIP4, other])
    install(plane, "lsq", np.ones(1))
    run = runner(plane)

    def syn(vip: Vip, flags: str = "S", seq: int = 1) -> int:
        packet = ether() / IP(src=CLIENT4, dst=str(vip.address)) / TCP(sport=4000, dport=80, flags=flags, seq=seq)
        return run(bytes(packet))[0]

    assert syn(VIP4) == TX
    assert syn(other) == DROP
    assert plane.shared["totals"]["conflicts"] == 1 and open_flows(plane) == [1]
    assert syn(VIP4, "R") == TX
    assert syn(other, seq=2) == TX
    reply = ETHER / IP(src="10.77.2.1", dst=CLIENT4) / TCP(sport=8080, dport=4000, flags="SA")
    assert sent(run(bytes(reply)))[IP].src == str(other.address)


@pytest.mark.parametrize("dnat", [False, True], ids=["dsr", "dnat"])
@pytest.mark.parametrize("error", ["fragmentation needed", "time exceeded"])
def test_icmp_errors_reach_the_server_of_their_flow(load: Load, dnat: bool, error: str) -> None:
    plane = balancer(load, False, dnat, servers=3)
    run = runner(plane)
    for port in range(4000, 4030):
        server = sent(run(bytes(client_packet(False, port=port)))).dst
        quoted = IP(src=str(VIP4.address), dst=CLIENT4, len=1500) / TCP(sport=80, dport=port, seq=77)
        kind = ICMP(type=3, code=4, nexthopmtu=1400) if error.startswith("frag") else ICMP(type=11, code=0)
        packet = ether() / IP(src="192.0.2.1", dst=str(VIP4.address)) / kind / Raw(bytes(quoted)[:28])
        after = sent(run(bytes(packet)))
        assert (after.dst, after.src) == (server, BALANCER_MAC)
        if not dnat:
            assert bytes(after)[12:] == bytes(packet)[12:]
            continue
        row = int(server[-2:], 16)
        address = str(reach(3)[row].address)  # type: ignore[union-attr]
        assert after[IP].dst == address and after[IP].src == "192.0.2.1"
        inner = IP(bytes(after[ICMP].payload))
        assert (inner.src, inner.dst, inner.len) == (address, CLIENT4, 1500)
        assert int.from_bytes(bytes(inner)[20:22], "big") == 8080
        assert bytes(after) == checked(after)
        header = bytes(inner)[:20]
        again = IP(header)
        del again.chksum
        assert bytes(again)[:20] == header
    assert plane.shared["totals"]["icmp"] == 30


@pytest.mark.parametrize("dnat", [False, True], ids=["dsr", "dnat"])
def test_icmpv6_errors_reach_the_server_of_their_flow(load: Load, dnat: bool) -> None:
    plane = balancer(load, True, dnat, servers=3)
    run = runner(plane)
    for port in range(4000, 4030):
        server = sent(run(bytes(client_packet(True, port=port)))).dst
        quoted = IPv6(src=str(VIP6.address), dst=CLIENT6, plen=1440) / TCP(sport=80, dport=port)
        kind = ICMPv6PacketTooBig(mtu=1400) if port % 2 else ICMPv6TimeExceeded()
        packet = ether() / IPv6(src="fd99::1", dst=str(VIP6.address)) / kind / Raw(bytes(quoted)[:60])
        after = sent(run(bytes(packet)))
        assert (after.dst, after.src) == (server, BALANCER_MAC)
        if not dnat:
            assert bytes(after)[12:] == bytes(packet)[12:]
            continue
        address = reach(3, ipv6=True)[int(server[-2:], 16)].address  # type: ignore[union-attr]
        assert after[IPv6].dst == str(address)
        inner = IPv6(bytes(after)[14 + 40 + 8 :])
        assert (inner.src, inner.dst, inner[TCP].sport) == (str(address), CLIENT6, 8080)
        assert bytes(after) == checked(after)
    assert plane.shared["totals"]["icmp"] == 30


def test_an_icmp_error_without_a_flow_goes_by_the_fallback_table(load: Load) -> None:
    plane = balancer(load, False, dnat=False, servers=3)
    run = runner(plane)
    for port in range(4000, 4030):
        quoted = IP(src=str(VIP4.address), dst=CLIENT4) / TCP(sport=80, dport=port)
        packet = ether() / IP(src="192.0.2.1", dst=str(VIP4.address)) / ICMP(type=3, code=4) / Raw(bytes(quoted))
        assert sent(run(bytes(packet))).dst == sent(run(bytes(client_packet(False, "A", port=port)))).dst


def test_what_is_left_to_the_kernel_and_what_of_it_is_counted(load: Load) -> None:
    plane = load()
    plane.set_vips([VIP4, VIP6])
    install(plane, "lsq", np.ones(2))
    run = runner(plane)
    vip4, vip6 = str(VIP4.address), str(VIP6.address)
    tcp = TCP(sport=4000, dport=80, flags="S")
    pieces = fragment(IP(src=CLIENT4, dst=vip4) / tcp / Raw(b"x" * 3000), fragsize=1000)
    passed = {
        "fragments": [*(ether() / piece for piece in pieces), ether() / IPv6(dst=vip6) / IPv6ExtHdrFragment() / tcp],
        "options": [
            ether() / IP(src=CLIENT4, dst=vip4, options=[IPOption_NOP()] * 4) / tcp,
            ether() / IPv6(dst=vip6) / IPv6ExtHdrDestOpt() / tcp,
        ],
        "malformed": [Ether(bytes(client_packet(False))[: 14 + 20 + 12])],
        "": [
            ether() / ARP(pdst=vip4),
            ether() / IP(src=CLIENT4, dst="10.77.1.99") / tcp,
            ether() / IP(src=CLIENT4, dst=vip4) / TCP(dport=81),
            ether() / IP(src=CLIENT4, dst=vip4) / UDP(dport=80),
            ether() / IP(src=CLIENT4, dst=vip4) / ICMP() / Raw(b"echo" * 10),
            ether() / IPv6(src=CLIENT6, dst=vip6) / ICMPv6EchoRequest(data="echo"),
            ether() / IPv6(src=CLIENT6, dst="fd77::99") / tcp,
            ether() / Dot1Q(vlan=3) / IP(src=CLIENT4, dst=vip4) / tcp,
            *(ether() / piece for piece in fragment(IP(src=CLIENT4, dst="10.77.1.99") / tcp / Raw(b"x" * 3000), 1000)),
            # An ICMP error about a packet that is none of ours.
            ether() / IP(dst=vip4) / ICMP(type=3, code=4) / Raw(bytes(IP(src="10.9.9.9", dst=CLIENT4) / TCP())),
        ],
    }
    for kind, packets in passed.items():
        for packet in packets:
            raw = bytes(packet)
            code, after = run(raw)
            assert (code, after) == (PASS, raw), packet.summary()
        if kind:
            assert plane.shared["totals"][kind] == len(packets)
    assert counters(plane)["started"] == 0


def test_a_server_without_a_link_layer_address_gets_nothing(load: Load) -> None:
    plane = balancer(load, False, dnat=False)
    bank = plane.bank
    plane.shared["servers"][bank]["ifindex"][0] = 0
    assert runner(plane)(bytes(client_packet(False)))[0] == DROP
    assert plane.shared["totals"]["unreachable"] == 1


def test_random_bytes_do_no_harm(load: Load) -> None:
    plane = balancer(load, False, dnat=True)
    run, rng = runner(plane), np.random.default_rng(0)
    for _ in range(3000):
        packet = bytearray(bytes(client_packet(False)) if rng.random() < 0.7 else rng.bytes(int(rng.integers(14, 90))))
        for _ in range(int(rng.integers(1, 4))):
            packet[int(rng.integers(12, len(packet)))] = int(rng.integers(256))
        packet = packet[: max(14, int(rng.integers(14, len(packet) + 1)))]
        assert run(bytes(packet))[0] in (PASS, DROP, TX)
    started = plane.shared["counters"]["started"] - plane.shared["counters"]["failed"]
    assert (started - plane.shared["counters"]["completed"] == plane.shared["open_flows"]).all()


def test_vips_keep_their_places(load: Load) -> None:
    plane = load()
    other = Vip(VIP4.address, 443)
    plane.set_vips([VIP4])
    plane.set_vips([VIP4, other])
    assert plane.vips() == [VIP4, other]
    for vips in ([other], [VIP4, VIP6], []):
        with pytest.raises(DriverError, match="the balancer that is taken over has"):
            plane.set_vips(vips)


def test_the_verifier_looks_at_few_instructions(load: Load) -> None:
    """29,000 of what clang 14 makes; another compiler may make many times more of the same source."""
    from lbgym.drivers.xdp import libbpf

    assert 1_000 < libbpf.program_info(load().program())[1] < 60_000
