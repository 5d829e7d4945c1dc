"""Packets as the core leaves them: addresses, ports, outer headers and checksums as scapy has them."""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scapy.layers.inet import GRE, ICMP, IP, IPOption_NOP, fragment
from scapy.layers.inet import TCP as Tcp
from scapy.layers.inet import UDP as Udp
from scapy.layers.inet6 import (
    ICMPv6EchoRequest,
    ICMPv6PacketTooBig,
    ICMPv6TimeExceeded,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    fragment6,
)
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw
from scapy.utils import PcapReader, wrpcap

from lbgym.drivers.afpacket.core import DROP, PASS, REPLY, SEND, TCP, UDP
from tests.plugins.packets import PORT, VIP4, VIP6, Bench, servers

logging.getLogger("scapy").setLevel(logging.ERROR)

CLIENT4, CLIENT6 = "11.0.0.1", "fd11::1"
SERVER4, SERVER6 = "10.77.2.1", "fd77::1:1"
IPV6 = pytest.mark.parametrize("ipv6", [False, True], ids=["ipv4", "ipv6"])
PROTOCOL = pytest.mark.parametrize("protocol", [TCP, UDP], ids=["tcp", "udp"])
PAYLOAD = pytest.mark.parametrize("payload", [b"", b"a", b"GET / HTTP/1.0\r\n\r\n" * 50])
Make = Callable[..., Bench]


def head(ipv6: bool, **fields: Any) -> Packet:
    if ipv6:
        return IPv6(src=CLIENT6, dst=str(VIP6), **fields)
    return IP(src=CLIENT4, dst=str(VIP4), id=4711, **fields)


def l4(protocol: int, flags: str = "S", port: int = 4000, destination: int | None = None) -> Packet:
    if protocol == UDP:
        return Udp(sport=port, dport=destination or 53)
    return Tcp(sport=port, dport=destination or PORT, flags=flags, seq=1)


def balancer(bench: Make, mode: str, *, ipv6: bool = False, count: int = 1, **options: Any) -> Bench:
    one = bench(mode=mode, **options)
    one.core.install("lsq", servers(np.ones(count), ipv6=ipv6))
    return one


def parsed(ipv6: bool, data: bytes) -> Packet:
    return (IPv6 if ipv6 else IP)(data)


def checked(packet: Packet) -> bytes:
    """The same packet with checksums of scapy's own, also of packets that an ICMP error quotes."""
    fresh = packet.__class__(bytes(packet))
    layer: Any = fresh
    while layer:
        for name in ("chksum", "cksum"):
            if name in layer.fields and not (layer.name == "UDP" and layer.fields[name] == 0):
                del layer.fields[name]
        layer = layer.payload
    return bytes(fresh)


@IPV6
@PROTOCOL
def test_direct_server_return_changes_nothing(bench: Make, ipv6: bool, protocol: int) -> None:
    one = balancer(bench, "dsr")
    for flags in ("S", "A", "PA", "FA"):
        frame = bytes(head(ipv6) / l4(protocol, flags) / (b"GET /" * 100))
        result = one.one(frame)
        assert (result.verdict, result.server, result.via, result.data) == (SEND, 0, 100, frame)


@IPV6
@PROTOCOL
@PAYLOAD
def test_nat_in_both_directions(bench: Make, ipv6: bool, protocol: int, payload: bytes) -> None:
    one = balancer(bench, "dnat", ipv6=ipv6)
    client, server = (CLIENT6, SERVER6) if ipv6 else (CLIENT4, SERVER4)
    for flags in ("S", "A", "PA"):
        result = one.one(bytes(head(ipv6) / l4(protocol, flags) / payload), link=9)
        after = parsed(ipv6, result.data)
        assert (result.verdict, after.src, after.dst) == (SEND, client, server)
        assert (after.payload.sport, after.payload.dport) == (4000, 8080)
        assert result.data == checked(after) and bytes(after.payload.payload) == payload
    kind = IPv6 if ipv6 else IP
    reply = kind(src=server, dst=client) / l4(protocol, "A", 8080, 4000) / payload
    result = one.one(bytes(reply))
    after = parsed(ipv6, result.data)
    assert (result.verdict, result.link, after.src, after.dst) == (REPLY, 9, str(VIP6 if ipv6 else VIP4), client)
    assert (after.payload.sport, after.payload.dport) == (PORT if protocol == TCP else 53, 4000)
    assert result.data == checked(after)


@IPV6
@PROTOCOL
def test_nat_of_checksums_that_the_device_completes(bench: Make, ipv6: bool, protocol: int) -> None:
    """What is left of such a checksum is the sum of the pseudo header; with the rest added it is the packet's."""
    one = balancer(bench, "dnat", ipv6=ipv6)
    before = parsed(ipv6, bytes(head(ipv6) / l4(protocol) / b"payload"))
    result = one.one(bytes(with_pseudo_sum(before, ipv6)), partial=True)
    after = parsed(ipv6, result.data)
    assert result.verdict == SEND and after.dst == (SERVER6 if ipv6 else SERVER4)
    assert result.data == bytes(with_pseudo_sum(parsed(ipv6, checked(after)), ipv6))


def with_pseudo_sum(packet: Packet, ipv6: bool) -> Packet:
    l4_bytes = bytes(packet.payload)
    addresses = ipaddress.ip_address(packet.src).packed + ipaddress.ip_address(packet.dst).packed
    protocol = packet.nh if ipv6 else packet.proto
    total = sum(np.frombuffer(addresses, ">u2").astype(int)) + protocol + len(l4_bytes)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    packet.payload.chksum = total
    return packet


def test_nat_of_udp_without_a_checksum(bench: Make) -> None:
    one = balancer(bench, "dnat")
    result = one.one(bytes(head(False) / Udp(sport=4000, dport=53, chksum=0) / b"x"))
    assert result.verdict == SEND and IP(result.data)[Udp].chksum == 0


def test_incremental_checksums_never_disagree_with_whole_ones(bench: Make) -> None:
    """Over many addresses, ports and payloads, the sums that come out as 0 and 0xFFFF among them."""
    one = balancer(bench, "dnat", count=50, flows=20_000, syn_flows=20_000)
    rng = np.random.default_rng(0)
    for i in range(150):
        client = str(ipaddress.IPv4Address(int(rng.integers(1 << 28, 1 << 31))))
        packet = IP(src=client, dst=str(VIP4)) / Udp(sport=int(rng.integers(1, 65536)), dport=53) / rng.bytes(2)
        result = one.one(bytes(packet))
        assert result.verdict == SEND and result.data == checked(IP(result.data)), i
    # Payloads for which the checksum comes out as 0, which UDP writes as 0xFFFF.
    zero = IP(src=CLIENT4, dst=str(VIP4)) / Udp(sport=4000, dport=53, chksum=0) / b"\0\0"
    server = IP(one.one(bytes(zero)).data).dst
    target = IP(src=CLIENT4, dst=server) / Udp(sport=4000, dport=8080) / b"\0\0"
    payload = (0xFFFF - (0xFFFF - IP(bytes(target))[Udp].chksum)).to_bytes(2, "big")
    result = one.one(bytes(IP(src=CLIENT4, dst=str(VIP4)) / Udp(sport=4000, dport=53) / payload))
    assert IP(result.data)[Udp].chksum == 0xFFFF and result.data == checked(IP(result.data))


@pytest.mark.parametrize("mode", ["gre", "ipip"])
@pytest.mark.parametrize("outer6", [False, True], ids=["over-ipv4", "over-ipv6"])
@IPV6
def test_encapsulation(bench: Make, mode: str, outer6: bool, ipv6: bool) -> None:
    source4, source6 = ipaddress.ip_address("10.0.0.9"), ipaddress.ip_address("fd00::9")
    one = balancer(bench, mode, ipv6=outer6, source4=source4.packed, source6=source6.packed)
    fields = {"tc": 0xB8} if ipv6 else {"tos": 0xB8, "flags": "DF"}
    frame = bytes(head(ipv6, **fields) / l4(TCP) / b"payload")
    result = one.one(frame)
    outer = parsed(outer6, result.data)
    assert result.verdict == SEND and result.data == checked(outer)
    assert (outer.src, outer.dst) == (str(source6 if outer6 else source4), SERVER6 if outer6 else SERVER4)
    length = outer.plen + 40 if outer6 else outer.len
    assert length == len(result.data) and (outer.tc if outer6 else outer.tos) == 0xB8
    if not outer6:
        assert outer.flags == "DF"
    inner = outer[GRE].payload if mode == "gre" else outer.payload
    if mode == "gre":
        assert outer[GRE].proto == (0x86DD if ipv6 else 0x0800) and len(bytes(outer[GRE])) - len(frame) == 4
    assert bytes(inner) == frame and isinstance(inner, IPv6 if ipv6 else IP)


def test_what_encapsulation_has_no_room_for_is_dropped(bench: Make) -> None:
    one = balancer(bench, "gre")
    assert one.one(bytes(head(False) / l4(TCP) / bytes(65_490))).verdict == DROP
    assert one.totals("no_room") == [1]


@PROTOCOL
def test_ip_options_and_extension_headers_are_looked_behind(bench: Make, protocol: int) -> None:
    for mode in ("dsr", "dnat"):
        one = balancer(bench, mode, count=3)
        plain = one.one(bytes(head(False) / l4(protocol))).server
        result = one.one(bytes(head(False, options=[IPOption_NOP()] * 5) / l4(protocol, "A")))
        assert (result.verdict, result.server) == (SEND, plain)
        assert result.data == checked(IP(result.data))
        one = balancer(bench, mode, count=3, ipv6=True)
        plain = one.one(bytes(head(True) / l4(protocol))).server
        chain = IPv6ExtHdrHopByHop() / IPv6ExtHdrDestOpt() / IPv6ExtHdrRouting(segleft=0)
        result = one.one(bytes(head(True) / chain / l4(protocol, "A")))
        assert (result.verdict, result.server) == (SEND, plain)
        # Scapy's pseudo header of a routing header that is used up is the packet's own.
        assert result.data == checked(IPv6(result.data))


@pytest.mark.parametrize("mode", ["dsr", "dnat", "ipip"])
@IPV6
def test_fragments_follow_their_first(bench: Make, mode: str, ipv6: bool) -> None:
    one = balancer(bench, mode, count=3, ipv6=ipv6)
    if ipv6:
        whole = head(True) / IPv6ExtHdrFragment(id=77) / l4(UDP) / (bytes(range(250)) * 8)
        pieces = [bytes(piece) for piece in fragment6(whole, 600)]
    else:
        whole = head(False) / l4(UDP) / (bytes(range(250)) * 8)
        pieces = [bytes(piece) for piece in fragment(IP(bytes(whole)), 600)]
    assert len(pieces) > 3
    # A later one whose first has not come is nobody's.
    assert one.one(pieces[1]).verdict == PASS and one.totals("fragments") == [1]
    results = one.run(*pieces)
    assert {(r.verdict, r.server) for r in results} == {(SEND, results[0].server)}
    if mode == "dnat":
        server = parsed(ipv6, results[0].data).dst
        assert {parsed(ipv6, r.data).dst for r in results} == {server}
        assert [r.data for r in results if not ipv6] == [checked_l3(r.data) for r in results if not ipv6]
        # Put together they are a datagram with a good checksum.
        payload = b"".join(bytes(parsed(ipv6, r.data).payload)[8 if ipv6 else 0 :] for r in results)
        kind = IPv6(src=CLIENT6, dst=server, nh=17) if ipv6 else IP(src=CLIENT4, dst=server, proto=17)
        assert bytes(kind / Raw(payload)) == checked(parsed(ipv6, bytes(kind / Raw(payload))))
    one.now += 3_000_000_000
    assert one.one(pieces[1]).verdict == PASS


def checked_l3(data: bytes) -> bytes:
    packet = IP(data)
    del packet.chksum
    return bytes(packet)


@IPV6
@PROTOCOL
@pytest.mark.parametrize("mode", ["dsr", "dnat", "ipip"])
def test_icmp_errors_go_to_the_server_of_the_flow(bench: Make, mode: str, ipv6: bool, protocol: int) -> None:
    one = balancer(bench, mode, count=3, ipv6=ipv6)
    server = one.one(bytes(head(ipv6) / l4(protocol))).server
    vip, client = (str(VIP6), CLIENT6) if ipv6 else (str(VIP4), CLIENT4)
    kind = IPv6 if ipv6 else IP
    sent = kind(src=vip, dst=client) / l4(protocol, "A", PORT if protocol == TCP else 53, 4000) / b"answer"
    router = "fd11::ff" if ipv6 else "11.0.0.254"
    for cut in (8, 100):
        quoted = bytes(sent)[: (40 if ipv6 else 20) + cut]
        if ipv6:
            packet = IPv6(src=router, dst=vip) / ICMPv6PacketTooBig(mtu=1280) / Raw(quoted)
        else:
            packet = IP(src=router, dst=vip) / ICMP(type=3, code=4, nexthopmtu=1400) / Raw(quoted)
        result = one.one(bytes(packet))
        assert (result.verdict, result.server) == (SEND, server)
        if mode == "dnat":
            after = parsed(ipv6, result.data)
            address = (SERVER6 if ipv6 else SERVER4)[:-1] + str(server + 1)
            assert (after.src, after.dst) == (router, address)
            inner = kind(bytes(after.payload.payload))
            assert (inner.src, inner.dst) == (address, client)
            assert bytes(inner.payload)[:4] == (8080).to_bytes(2, "big") + (4000).to_bytes(2, "big")
            # The outer checksums, and those inside where they are there.
            assert result.data == outer_checked(after)
            if cut == 100:
                assert bytes(inner) == checked(inner)
    assert one.totals("icmp") == [2]
    # One about a packet of somebody else.
    other = kind(src=vip, dst=client) / l4(protocol, "A", 999, 4000)
    error = ICMPv6TimeExceeded() if ipv6 else ICMP(type=11)
    assert one.one(bytes(kind(src=router, dst=vip) / error / Raw(bytes(other)))).verdict == PASS
    ping = ICMPv6EchoRequest() if ipv6 else ICMP()
    assert one.one(bytes(kind(src=client, dst=vip) / ping)).verdict == PASS


def outer_checked(packet: Packet) -> bytes:
    """With the outer IP and ICMP checksums of scapy's own."""
    raw = bytes(packet.payload.payload)
    fresh = packet.copy()
    fresh.payload.remove_payload()
    for layer in (fresh, fresh.payload):
        for name in ("chksum", "cksum"):
            if name in layer.fields:
                del layer.fields[name]
    return bytes(fresh / Raw(raw))


def test_what_is_not_the_balancers_is_passed(bench: Make) -> None:
    one = balancer(bench, "dsr")
    for packet in (
        IP(src=CLIENT4, dst="10.77.1.101") / l4(TCP),
        head(False) / l4(TCP, destination=81),
        head(False) / l4(UDP, destination=PORT),
        IP(src=CLIENT4, dst=str(VIP4), proto=50) / Raw(bytes(40)),
        IPv6(src=CLIENT6, dst=str(VIP6), nh=59),
    ):
        result = one.one(bytes(packet))
        assert (result.verdict, result.data) == (PASS, bytes(packet))
    assert one.totals("malformed", "untracked") == [0, 0]


def test_what_is_cut_off_is_passed_and_counted(bench: Make) -> None:
    one = balancer(bench, "dnat", ipv6=False)
    count = 0
    for whole in (head(False) / l4(TCP), head(True) / IPv6ExtHdrDestOpt() / l4(TCP), head(False) / l4(UDP)):
        raw = bytes(whole)
        for length in range(len(raw)):
            assert one.one(raw[:length]).verdict == PASS
            count += length >= (40 if raw[0] >> 4 == 6 else 20)
    assert one.totals("malformed") == [count]


#: With addresses: scapy would ask the network for each that is missing.
ETHER = Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02")


def test_a_capture_is_replayed(bench: Make, tmp_path: Path) -> None:
    """Whole conversations from a file, with retransmissions and ports that are used again."""
    rng = np.random.default_rng(4)
    conversations = []
    for i in range(60):
        port, seq = 1000 + i % 40, int(rng.integers(1, 1 << 31))
        flags = ["S", "S", "A", "PA", "A", *["PA", "A"] * int(rng.integers(0, 5)), "FA" if i % 3 else "R", "A"]
        conversations.append([head(bool(i % 2)) / Tcp(sport=port, dport=PORT, flags=f, seq=seq) for f in flags])
    # Interleaved within each half, as ports come again in the second.
    order: list[Packet] = []
    for half in (conversations[:40], conversations[40:]):
        left = [list(packets) for packets in half]
        while any(left):
            chosen = [packets for packets in left if packets]
            order.append(ETHER / chosen[int(rng.integers(len(chosen)))].pop(0))
    wrpcap(str(tmp_path / "capture.pcap"), order)
    one = balancer(bench, "dsr", count=5)
    placed: dict[tuple[str, int, int], set[int]] = {}
    with PcapReader(str(tmp_path / "capture.pcap")) as capture:
        for frame in capture:
            packet = frame.payload
            one.now += 1_000_000
            result = one.one(bytes(packet))
            assert result.verdict == SEND
            placed.setdefault((packet.src, packet[Tcp].sport, packet[Tcp].seq), set()).add(result.server)
    assert {len(rows) for rows in placed.values()} == {1} and len(placed) == 60
    counters, features, _ = one.read(5)
    assert [int(counters[name].sum()) for name in ("started", "completed", "failed")] == [60, 40, 20]
    assert int(counters["fct_count"].sum()) == 60 and (features[:, 1] > 0.0).all()
    one.forget_all()
    assert one.open(5) == [0] * 5 and not one.read(5)[0]["entries"].any()
