"""A service in C, whose servers come and go, and the worker that has a flow's packets."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import pytest

from lbgym.drivers.afpacket.build import source_folder
from lbgym.drivers.afpacket.core import HANDOVER, PASS, REPLY, SEND, Core, CoreOptions
from lbgym.errors import InvalidOptionError
from tests.plugins.packets import ACK, SYN, Bench, packet4, servers
from tests.plugins.test_sanitizers import build, cc, run
from tests.sharedmemory.conftest import shm_dir

__all__ = ["cc", "shm_dir"]

NAT = {"mode": "dnat", "workers": 3, "owners": 2}


def test_servers_come_drain_and_go(cc: list[str], shm_dir: Path, tmp_path: Path) -> None:
    run(build(cc, "service", tmp_path, "address", "undefined", more=[source_folder() / "service.c"]), "service")


def test_every_packet_of_a_flow_has_the_same_owner(bench: Callable[..., Bench]) -> None:
    from scapy.layers.inet import ICMP, IP, TCP, IPerror, TCPerror, fragment

    one = bench(**NAT)
    one.core.install("ecmp", servers([1.0] * 4))
    owners = set()
    for client in range(0x0B000001, 0x0B000001 + 40):
        syn = packet4(client, 1000 + client % 7, SYN)
        results = [one.one(syn, worker=worker) for worker in range(3)]
        keepers = [worker for worker in range(3) if results[worker].verdict != HANDOVER]
        # The first worker is the main thread, to which nothing belongs.
        assert len(keepers) == 1 and keepers[0] in (1, 2)
        owner = keepers[0]
        owners.add(owner)
        assert results[owner].verdict == SEND
        assert all(result.data == syn and result.via == owner for result in results if result.verdict == HANDOVER)
        sent = IP(results[owner].data)
        answer = IP(src=sent.dst, dst=sent.src) / TCP(sport=sent.dport, dport=sent.sport, flags="SA")
        large = IP(src=sent.dst, dst=sent.src, id=7) / TCP(sport=sent.dport, dport=sent.sport, flags="A") / bytes(64)
        about = IP(src="10.77.1.100", dst=sent.src) / TCP(sport=80, dport=sent.sport)
        error = IP(src="9.9.9.9", dst="10.77.1.100") / ICMP(type=3, code=4) / IPerror(bytes(about[IP]))
        assert TCPerror in IP(bytes(error))
        packets = [bytes(answer), *map(bytes, fragment(large, 32)), bytes(error), packet4(client, sent.sport, ACK)]
        expected = [REPLY] * (len(packets) - 2) + [SEND, SEND]
        for other in {0, 1, 2} - {owner}:
            assert {(r.verdict, r.via) for r in one.run(*packets, worker=other)} == {(HANDOVER, owner)}
        assert [result.verdict for result in one.run(*packets, worker=owner)] == expected
    assert owners == {1, 2}
    # What is nobody's is not handed over.
    assert one.one(packet4(0x0B000001, 1, SYN, vip_port=81), worker=0).verdict == PASS


def test_only_a_nat_hands_over(library: ctypes.CDLL) -> None:
    with pytest.raises(InvalidOptionError, match="owners must be from 0 to 0, got 1"):
        Core(CoreOptions(workers=2, owners=1), library)
    with pytest.raises(InvalidOptionError, match="owners must be from 0 to 2, got 3"):
        Core(CoreOptions(workers=2, owners=3, mode="dnat"), library)
