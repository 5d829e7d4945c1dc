"""The life of flows in the core: every packet of one at one server, counted once at its beginning and its end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lbgym.drivers.afpacket.core import DROP, PASS, REPLY, SEND
from lbgym.errors import InvalidOptionError
from tests.plugins.packets import (
    ACK,
    BOTH,
    CLIENT,
    FIN,
    PORT,
    RST,
    SYN,
    TCP,
    VIP4,
    Bench,
    packet4,
    packet6,
    servers,
    vips,
)

RULES = ["wcmp", "maglev", "sed", "ecmp", "p2c_sed", "round_robin", "marginal", "whittle", "lsq"]
Make = Callable[..., Bench]


def balancer(bench: Make, rule: str = "sed", count: int = 4, **options: Any) -> Bench:
    one = bench(**options)
    one.core.install(rule, servers(np.ones(count)))
    return one


def counted(one: Bench, *names: str) -> list[int]:
    counters = one.read()[0]
    return [int(counters[name].sum()) for name in names or ("started", "completed", "rejected", "failed")]


def check_counts(one: Bench) -> None:
    """What must hold whenever no packet is under way."""
    c, _, totals = one.read()
    assert (c["started"] - c["completed"] - c["rejected"] - c["failed"] == c["open"]).all()
    assert one.open() == c["open"].tolist()
    assert (c["open"] <= c["entries"]).all()
    assert 0 <= int(totals["syn_open"]) <= int(c["open"].sum())


def test_a_flow_is_counted_and_its_fct_is_measured(bench: Make) -> None:
    one = balancer(bench, duration_sampling=1.0)
    server = one.one(packet4(CLIENT, 4000, SYN, 7)).server
    assert one.totals("syn_open") == [1]
    one.now += 20_000_000
    assert one.one(packet4(CLIENT, 4000, ACK, 8)).server == server
    assert one.totals("syn_open") == [0]
    one.now += 10_000_000
    assert one.one(packet4(CLIENT, 4000, ACK | FIN, 8)).server == server
    counters, features, _ = one.read()
    assert [int(counters[server][name]) for name in ("started", "completed", "failed", "fct_count", "fct_sum")] == [
        1, 1, 0, 1, 30_000_000,
    ]  # fmt: skip
    assert features[server] == pytest.approx([0, 0.03, 0.03, 0, 0.03, 0.03, 0.02, 0.02, 0, 0.02, 0.02])
    # The last ACK still goes there, and counts nothing.
    assert one.one(packet4(CLIENT, 4000, ACK, 9)).server == server
    assert one.totals("after_close") == [1] and counted(one, "entries", "open") == [1, 0]
    one.tick(9.9)
    assert counted(one, "entries") == [1]
    one.tick(0.3)
    assert counted(one, "entries") == [0]


def test_a_syn_that_is_sent_again_is_the_same_flow(bench: Make) -> None:
    one = balancer(bench)
    assert len({one.one(packet4(CLIENT, 4000, SYN, 7)).server for _ in range(5)}) == 1
    assert len({result.server for result in one.run(*[packet4(CLIENT, 4001, SYN, 7)] * 40)}) == 1
    assert counted(one, "started") == [2]


def test_ports_are_used_again(bench: Make) -> None:
    one = balancer(bench, "round_robin")
    for turn in range(8):
        server = one.one(packet4(CLIENT, 4000, SYN, 100 + turn)).server
        assert server == turn % 4
        assert one.one(packet4(CLIENT, 4000, ACK | RST)).server == server
    assert counted(one) == [8, 0, 0, 8]
    assert one.read()[0]["entries"].tolist() == [0, 0, 0, 1]
    one.run(packet4(CLIENT, 5000, SYN, 1), packet4(CLIENT, 5000, SYN, 2))
    assert counted(one) == [10, 0, 0, 9]
    check_counts(one)


def test_a_forged_syn_moves_no_established_flow(bench: Make) -> None:
    one = balancer(bench, "round_robin")
    server = one.one(packet4(CLIENT, 4000, SYN, 7)).server
    one.one(packet4(CLIENT, 4000, ACK, 8))
    assert one.one(packet4(CLIENT, 4000, SYN, 12345)).server == server
    assert one.one(packet4(CLIENT, 4000, ACK, 9)).server == server
    assert one.totals("reused") == [1] and sum(one.open()) == 1


def test_established_flows_stay_where_they_are_whatever_changes(bench: Make) -> None:
    one = balancer(bench, "wcmp")
    rng = np.random.default_rng(0)
    ports = range(2000, 2500)
    placed = {port: one.one(packet4(CLIENT, port, SYN, port)).server for port in ports}
    assert set(placed.values()) == {0, 1, 2, 3}
    for rule in RULES:
        one.core.install(rule, servers(rng.uniform(0.1, 5.0, 4), rng.random(4) < 0.5))
        results = one.run(*[packet4(CLIENT, port, ACK, 1) for port in ports])
        assert {port: result.server for port, result in zip(ports, results, strict=True)} == placed


def test_no_server_no_flow(bench: Make) -> None:
    one = balancer(bench)
    one.core.install("sed", servers(np.ones(4), 0))
    assert [r.verdict for r in one.run(packet4(CLIENT, 4000, SYN), packet4(CLIENT, 4001, ACK))] == [DROP, DROP]
    assert one.totals("unrouted") == [1] and counted(one, "started") == [0]
    # Nor one that cannot be reached.
    one.core.install("sed", servers([1.0], reachable=0))
    assert one.one(packet4(CLIENT, 4000, SYN)).verdict == DROP
    assert one.totals("unreachable") == [1]


def test_a_flow_first_seen_in_the_middle_is_adopted_by_configured_weights(bench: Make) -> None:
    one, other = balancer(bench, "wcmp"), balancer(bench, "sed", seed=99)
    other.core.install("sed", servers([9.0, 1.0, 1.0, 2.0]))
    for port in range(3000, 3100):
        # Another balancer behind the same router takes a flow over: both choose alike.
        server = one.one(packet4(CLIENT, port, ACK, 5)).server
        assert server == other.one(packet4(CLIENT, port, ACK, 5)).server
        one.core.install("wcmp", servers([1.0, 9.0, 1.0, 1.0])) if port % 20 == 0 else None
        assert one.one(packet4(CLIENT, port, ACK, 6)).server == server
    assert one.totals("adopted", "syn_open") == [100, 0] and counted(one, "started") == [100]
    # What only ends a flow, or belongs to none, makes none.
    for flags in (FIN | ACK, RST, SYN | ACK, SYN | FIN, 0, 0x20):
        assert one.one(packet4(CLIENT, 9000, flags, 5)).verdict == SEND
    assert one.totals("untracked") == [6] and counted(one, "started") == [100]


@pytest.mark.parametrize("table_full", [False, True])
def test_a_syn_flood_leaves_existing_flows_and_counts_alone(bench: Make, table_full: bool) -> None:
    one = balancer(bench, "wcmp", flows=600, syn_flows=600 if table_full else 100)
    real = {port: one.one(packet4(CLIENT, port, SYN, 1)).server for port in range(2000, 2050)}
    one.run(*[packet4(CLIENT, port, ACK, 2) for port in real])
    flood = np.random.default_rng(0).integers(1 << 28, 1 << 31, 5000)
    assert {r.verdict for r in one.run(*[packet4(int(client), 1234, SYN, 9) for client in flood])} == {SEND}
    assert {port: one.one(packet4(CLIENT, port, ACK, 3)).server for port in real} == real
    limited, full = one.totals("syn_limited", "table_full")
    # The 600 entries of the table fill to the last.
    assert (limited, full) == ((0, 4450) if table_full else (4900, 0))
    # A client that comes now is served without state, always by the same server, also when weights change ...
    late = one.one(packet4(CLIENT, 7000, SYN, 1)).server
    one.core.install("wcmp", servers([9.0, 1.0, 1.0, 1.0]))
    assert one.one(packet4(CLIENT, 7000, ACK, 2)).server == late
    check_counts(one)
    # ... and has a flow once the flood's have been forgotten.
    one.tick(11.0)
    assert sum(one.open()) == 50
    assert one.one(packet4(CLIENT, 7000, ACK, 3)).server == late
    assert sum(one.open()) == 51
    check_counts(one)


def test_flows_are_forgotten_by_their_state(bench: Make) -> None:
    one = balancer(bench, syn_timeout=2.0, idle_timeout=20.0, close_timeout=5.0, udp_timeout=8.0)
    for port in (1, 2, 3):
        one.one(packet4(CLIENT, port, SYN, 1))
    one.run(packet4(CLIENT, 2, ACK, 2), packet4(CLIENT, 3, ACK, 2), packet4(CLIENT, 3, FIN | ACK, 2))
    entries = []
    for _ in range(12):
        one.tick(2.1)
        entries.append(counted(one, "entries")[0])
    # That of only a SYN at 2 s, the closed one at 5 s, the idle one at 20 s.
    assert entries == [2, 2, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0]
    assert counted(one) == [3, 1, 0, 2]


def test_a_flow_that_goes_on_is_never_forgotten(bench: Make) -> None:
    one = balancer(bench, idle_timeout=300.0)
    server = one.one(packet4(CLIENT, 1, SYN, 1)).server
    for _ in range(100):
        assert one.one(packet4(CLIENT, 1, ACK, 2)).server == server
        one.tick(299.0)
    assert counted(one) == [1, 0, 0, 0]


def test_a_tick_looks_at_no_more_flows_than_its_budget(bench: Make) -> None:
    one = balancer(bench)
    one.run(*[packet4(CLIENT, port, SYN, 1) for port in range(1000, 2000)])
    one.now += 11_000_000_000
    assert [one.tick(budget=300) for _ in range(5)] == [300, 300, 300, 100, 0]
    assert counted(one, "entries") == [0]


def test_clocks_near_zero_and_long_pauses(bench: Make) -> None:
    one = balancer(bench)
    one.now = 0
    one.one(packet4(CLIENT, 1, SYN, 1))
    one.tick(9.0)
    assert counted(one, "entries") == [1]
    one.tick(1e8)
    assert counted(one, "entries") == [0]
    one.one(packet4(CLIENT, 1, SYN, 1))
    one.tick(11.0)
    assert counted(one, "entries") == [0]


def test_udp_flows_end_by_idleness(bench: Make) -> None:
    one = balancer(bench, udp_timeout=5.0, syn_timeout=3.0)

    def datagram(port: int) -> bytes:
        raw = bytearray(packet4(CLIENT, port, 0, vip=VIP4, vip_port=53)[:28])
        raw[2:4], raw[9], raw[24:28] = (28).to_bytes(2, "big"), 17, bytes([0, 8, 0, 0])
        return bytes(raw)

    server = one.one(datagram(5000)).server
    one.tick(1.0)
    assert one.one(datagram(5000)).server == server and one.totals("syn_open") == [0]
    single = one.one(datagram(5001))
    assert single.verdict == SEND and one.totals("syn_open") == [1]
    one.tick(6.0)
    # One that was seen to take a second, and one of which nothing is known.
    assert counted(one) == [2, 2, 0, 0] and counted(one, "fct_count", "fct_sum") == [1, 1_000_000_000]


FLAGS = [SYN, SYN | 0x40, ACK, ACK, ACK, FIN | ACK, RST, RST | ACK, SYN | ACK, 0]
PACKET = st.tuples(st.integers(0, 2), st.integers(1, 4), st.integers(0, 1), st.sampled_from(FLAGS), st.integers(0, 2))
ACTION = st.one_of(
    PACKET,
    st.tuples(st.just("weights"), st.sampled_from(RULES), st.integers(1, 2**4 - 1)),
    st.tuples(st.just("tick"), st.sampled_from([0.05, 1.0, 15.0, 400.0])),
    st.tuples(st.just("server"), st.integers(0, 3), st.integers(1, 4), st.sampled_from([ACK, FIN | ACK, RST])),
)


@pytest.mark.parametrize("mode", ["dsr", "dnat"])
@pytest.mark.parametrize("small", [False, True])
def test_open_flows_return_to_zero_after_any_traffic(bench: Make, small: bool, mode: str) -> None:
    one = balancer(bench, flows=16 if small else 4096, syn_flows=5 if small else 4096, mode=mode)

    @given(st.lists(ACTION, min_size=20, max_size=150))
    @settings(max_examples=35, deadline=None)
    def check(actions: list[Any]) -> None:
        one.core.install("sed", servers(np.ones(4)))
        any_traffic(one, actions, small)

    check()


def any_traffic(one: Bench, actions: list[Any], small: bool) -> None:
    established: dict[tuple[int, int, int], int] = {}
    nat = one.core.options.mode == "dnat"
    for action in actions:
        if action[0] == "weights":
            _, rule, mask = action
            active = np.array([mask >> i & 1 for i in range(4)], np.bool_)
            one.core.install(rule, servers([1.0, 2.0, 0.0, 5.0], active))
        elif action[0] == "tick":
            one.tick(action[1])
            established = established if action[1] < 10.0 else {}
        elif action[0] == "server":
            _, row, port, flags = action
            raw = packet4(int.from_bytes(bytes([10, 77, 2, row + 1]), "big"), 8080, flags, vip_port=port)
            raw = raw[:16] + CLIENT.to_bytes(4, "big") + raw[20:]
            assert one.one(raw).verdict == PASS or nat
            if flags != ACK:
                established.pop((0, port, 0), None)
        else:
            client, port, vip, flags, isn = action
            vip = 0 if nat else vip
            make = packet6 if vip else packet4
            result = one.one(make(CLIENT + client, port, flags, isn))
            assert result.verdict in (SEND, DROP)
            key = (client, port, vip)
            if flags == ACK and result.verdict == SEND and not small:
                # From now on it is known, and has its server until it ends.
                assert established.setdefault(key, result.server) == result.server
            elif flags != ACK:
                established.pop(key, None)
        check_counts(one)
    one.forget_all()
    check_counts(one)
    counters, _, totals = one.read()
    assert not counters["entries"].any() and one.open() == [0] * 4 and totals["syn_open"] == 0


def test_a_table_that_is_full_is_full_to_the_last_entry(bench: Make) -> None:
    """Buckets overflow into others long before: next to none is refused while there are free entries."""
    flows = 20_000
    one = balancer(bench, flows=flows, syn_flows=flows)
    rng = np.random.default_rng(1)
    for _ in range(3):
        clients = rng.integers(1 << 28, 1 << 31, flows)
        one.run(*[packet4(int(client), 1234, SYN, 9) for client in clients])
        counters = one.read()[0]
        assert int(counters["entries"].sum()) >= 0.999 * flows
        # Found again, each at its server.
        one.forget_all()
        assert counted(one, "entries") == [0]


def test_rows_are_given_to_other_servers(bench: Make) -> None:
    one = balancer(bench, count=2)
    for port in range(1000, 1100):
        one.run(packet4(CLIENT, port, SYN, 1), packet4(CLIENT, port, ACK, 1))
        one.now += 1_000_000
        one.one(packet4(CLIENT, port, FIN | ACK, 1))
    features = one.read()[1]
    assert (features[:2, 1] > 0.0).all()
    one.forget_all()
    rows = servers(np.ones(2))
    rows["generation"][1] = 1
    one.core.install("sed", rows)
    one.core.install("sed", rows)
    features = one.read()[1]
    # The other server begins without samples; counters go on.
    assert features[0, 1] > 0.0 and not features[1].any() and counted(one, "started") == [100]


def test_workers_share_what_dispatch_compares(bench: Make) -> None:
    one = balancer(bench, "lsq", workers=3)
    for i in range(40):
        one.one(packet4(CLIENT, 1000 + i, SYN, 1), worker=i % 3)
    assert one.open() == [10] * 4
    counters, _, totals = one.read()
    assert counters["open"].tolist() == [10] * 4 and totals["syn_open"] == 40
    one.forget_all()
    assert one.open() == [0] * 4


def test_nat_counts_ends_of_servers(bench: Make) -> None:
    one = balancer(bench, mode="dnat", count=1)

    def from_server(flags: int) -> bytes:
        raw = packet4(int.from_bytes(bytes([10, 77, 2, 1]), "big"), 8080, flags, vip_port=4000)
        return raw[:16] + CLIENT.to_bytes(4, "big") + raw[20:]

    assert one.one(from_server(ACK)).verdict == PASS
    one.one(packet4(CLIENT, 4000, SYN, 1), link=77)
    reply = one.one(from_server(SYN | ACK))
    assert (reply.verdict, reply.link, reply.server) == (REPLY, 77, 0)
    one.one(packet4(CLIENT, 4000, ACK, 1))
    # A client that closes its half may await an answer.
    one.one(packet4(CLIENT, 4000, FIN | ACK, 1))
    assert one.open()[0] == 1
    one.one(from_server(FIN | ACK))
    assert counted(one) == [1, 1, 0, 0]
    assert one.one(from_server(ACK)).verdict == REPLY
    one.one(packet4(CLIENT, 4000, SYN, 2))
    one.one(from_server(RST | ACK))
    assert counted(one) == [2, 1, 1, 0] and counted(one, "fct_count") == [1]


def test_nat_one_client_port_cannot_have_flows_of_two_vips_at_one_server(bench: Make) -> None:
    one = balancer(bench, mode="dnat", count=1)
    one.core.set_vips(vips(*BOTH, (VIP4, 443, TCP)))
    assert one.one(packet4(CLIENT, 4000, SYN, 1)).verdict == SEND
    assert one.one(packet4(CLIENT, 4000, SYN, 1, vip_port=443)).verdict == DROP
    assert one.totals("conflicts") == [1] and counted(one, "entries") == [1]
    one.one(packet4(CLIENT, 4000, RST, 1))
    assert one.one(packet4(CLIENT, 4000, SYN, 1, vip_port=443)).verdict == SEND
    check_counts(one)
    one.forget_all()
    assert counted(one, "entries") == [0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "workers must be from 1 to 64, got 0"),
        ({"servers": 5000}, "servers must be from 1 to 4096, got 5000"),
        ({"flows": 3}, "flows must be from 16 to 67108864, got 3"),
        ({"syn_flows": 5000}, "syn_flows must be from 0 to 4096, got 5000"),
        ({"idle_timeout": 0.0}, "idle_timeout must be from 1 to 1000000000000000, got 0"),
        ({"fct_sampling": 1.5}, "fct_sampling must be from 0 to 1, got 1.5"),
        ({"duration_sampling": float("nan")}, "duration_sampling must be from 0 to 1, got nan"),
    ],
)
def test_bad_options(bench: Make, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOptionError, match=f"^{message}$"):
        bench(**options)


def test_bad_servers_and_vips_change_nothing(bench: Make) -> None:
    one = balancer(bench, mode="dnat")
    good = servers(np.ones(4))
    bad = [
        ("there is room for 64 servers, got 65", servers(np.ones(65))),
        ("server 1: weights .* got nan, 1 and 0", servers([1.0, np.nan])),
        ("server 0: weights .* got 1, 1 and -1", servers([1.0], background=-1.0)),
        ("server 0: cores must be from 1 to 1048576, got 0.5", servers([1.0], cores=0.5)),
        ("server 0 is active and not present", servers([1.0], present=0)),
        ("servers 0 and 3 have the same address and port", np.concatenate([good[:3], good[:1]])),
    ]
    for message, rows in bad:
        with pytest.raises(InvalidOptionError, match=message):
            one.core.install("sed", rows)
        assert one.one(packet4(CLIENT, 1, ACK)).verdict == SEND
    for message, wanted in (
        ("VIP 0 is there and cannot become another one", vips(*[(VIP4, 81 + i, TCP) for i in range(4)])),
        ("there are 4 VIPs, and none can be removed", vips((VIP4, PORT, TCP))),
        ("there can be 64 VIPs, got 65", vips(*[(VIP4, 81 + i, TCP) for i in range(65)])),
    ):
        with pytest.raises(InvalidOptionError, match=message):
            one.core.set_vips(wanted)
