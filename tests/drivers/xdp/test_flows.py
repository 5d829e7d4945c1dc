"""The life of flows: every packet of one at one server, counted once at its beginning and once at its end."""

from __future__ import annotations

import ipaddress
import threading
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lbgym.drivers.xdp.libbpf import PacketRun
from lbgym.drivers.xdp.plane import Vip, XdpPlane
from tests.drivers.xdp.conftest import Load
from tests.drivers.xdp.packets import (
    ACK,
    DROP,
    FIN,
    RST,
    SYN,
    TX,
    VIP4,
    VIP6,
    counters,
    install,
    open_flows,
    runner,
    server_of,
    tcp4,
    tcp6,
)

pytestmark = pytest.mark.xdp

CLIENT = 0x0B000001
#: Seconds after which a collection with the timeouts of `collect_all` finds every flow idle.
LATER = 3600


def collect_all(plane: XdpPlane) -> None:
    now = time.monotonic_ns() + LATER * 1_000_000_000
    plane.collect(syn_timeout=60, idle_timeout=60, close_timeout=60, now=now)


def balancer(load: Load, rule: str = "sed", servers: int = 4, **sizes: object) -> XdpPlane:
    plane = load(**sizes)
    plane.set_vips([VIP4, VIP6] if not plane.sizes.dnat else [VIP4])
    install(plane, rule, np.ones(servers))
    return plane


def totals(plane: XdpPlane, *names: str) -> list[int]:
    return [int(plane.shared["totals"][name]) for name in names]


def check_counts(plane: XdpPlane) -> None:
    """What must hold at every instant at which no packet is under way."""
    c = plane.shared["counters"]
    left = c["started"] - c["completed"] - c["rejected"] - c["failed"]
    assert (left == plane.shared["open_flows"]).all()
    assert (plane.shared["open_flows"] <= plane.shared["entries"]).all()
    assert 0 <= int(plane.shared["totals"]["syn_open"]) <= int(plane.shared["open_flows"].sum())


def test_a_flow_is_counted_and_its_fct_is_measured(load: Load) -> None:
    plane = balancer(load)
    plane.set_sampling(1.0, 1.0)
    run = runner(plane)
    begun = time.monotonic()
    server = server_of(run(tcp4(CLIENT, 4000, VIP4, SYN, 7)))
    assert totals(plane, "syn_open") == [1]
    time.sleep(0.02)
    assert server_of(run(tcp4(CLIENT, 4000, VIP4, ACK, 8))) == server
    assert totals(plane, "syn_open") == [0]
    before = time.monotonic_ns()
    assert server_of(run(tcp4(CLIENT, 4000, VIP4, ACK | FIN, 8))) == server
    after, took = time.monotonic_ns(), time.monotonic() - begun
    c = plane.shared["counters"][server]
    assert [int(c[name]) for name in ("started", "completed", "failed", "fct_count")] == [1, 1, 0, 1]
    assert 0.02 <= c["fct_sum"] * 1e-9 <= took
    fct, duration = plane.shared["reservoirs"][server]
    assert fct["accepted"] == duration["accepted"] == 1
    assert abs(int(fct["samples"][0]) & 0xFFFFFFFF) == int(c["fct_sum"]) // 1000
    assert 20_000 <= int(duration["samples"][0]) & 0xFFFFFFFF <= int(fct["samples"][0]) & 0xFFFFFFFF
    # Times in units of 2**20 ns, plus 1.
    assert before >> 20 <= int(fct["samples"][0] >> 32) - 1 <= after >> 20
    # The last ACK still goes there, and counts nothing.
    assert server_of(run(tcp4(CLIENT, 4000, VIP4, ACK, 9))) == server
    assert totals(plane, "after_close") == [1]
    assert plane.flow_count() == 1 and open_flows(plane) == [0] * 4
    collect_all(plane)
    assert plane.flow_count() == 0 and plane.flow(0, ipaddress.IPv4Address(CLIENT), 4000) is None


def test_a_syn_that_is_sent_again_is_the_same_flow(load: Load) -> None:
    plane = balancer(load)
    run = runner(plane)
    servers = {server_of(run(tcp4(CLIENT, 4000, VIP4, SYN, 7))) for _ in range(5)}
    assert len(servers) == 1 and counters(plane)["started"] == 1


def test_ports_are_used_again(load: Load) -> None:
    plane = balancer(load, "round_robin")
    run = runner(plane)
    for turn in range(8):
        server = server_of(run(tcp4(CLIENT, 4000, VIP4, SYN, 100 + turn)))
        assert server == turn % 4
        assert server_of(run(tcp4(CLIENT, 4000, VIP4, ACK | RST))) == server
    assert counters(plane) == {"started": 8, "completed": 0, "rejected": 0, "failed": 8}
    assert plane.flow_count() == 1
    assert plane.shared["entries"][:4].astype(int).tolist() == [0, 0, 0, 1]
    # A SYN that never was answered, then one of another connection.
    run(tcp4(CLIENT, 5000, VIP4, SYN, 1))
    run(tcp4(CLIENT, 5000, VIP4, SYN, 2))
    assert counters(plane) == {"started": 10, "completed": 0, "rejected": 0, "failed": 9}
    check_counts(plane)


def test_a_forged_syn_moves_no_established_flow(load: Load) -> None:
    plane = balancer(load, "round_robin")
    run = runner(plane)
    server = server_of(run(tcp4(CLIENT, 4000, VIP4, SYN, 7)))
    run(tcp4(CLIENT, 4000, VIP4, ACK, 8))
    assert server_of(run(tcp4(CLIENT, 4000, VIP4, SYN, 12345))) == server
    assert server_of(run(tcp4(CLIENT, 4000, VIP4, ACK, 9))) == server
    assert totals(plane, "reused") == [1] and sum(open_flows(plane)) == 1
    check_counts(plane)


def test_established_flows_stay_where_they_are_whatever_changes(load: Load) -> None:
    plane = balancer(load, "wcmp")
    run = runner(plane)
    rng = np.random.default_rng(0)
    ports = range(2000, 2500)
    placed = {port: server_of(run(tcp4(CLIENT, port, VIP4, SYN, port))) for port in ports}
    assert set(placed.values()) == {0, 1, 2, 3}
    for rule in ("maglev", "sed", "ecmp", "wcmp", "p2c_sed", "round_robin"):
        active = np.array([True, True, rng.random() < 0.5, False])
        install(plane, rule, rng.uniform(0.1, 5.0, 4), active)
        assert {port: server_of(run(tcp4(CLIENT, port, VIP4, ACK, 1))) for port in ports} == placed


def test_no_server_no_flow(load: Load) -> None:
    plane = balancer(load)
    install(plane, "sed", np.ones(4), np.zeros(4, np.bool_))
    run = runner(plane)
    assert run(tcp4(CLIENT, 4000, VIP4, SYN, 7))[0] == DROP
    assert run(tcp4(CLIENT, 4001, VIP4, ACK, 7))[0] == DROP
    assert totals(plane, "unrouted") == [1] and counters(plane)["started"] == 0


def test_a_flow_first_seen_in_the_middle_goes_by_configured_weights_and_is_adopted(load: Load) -> None:
    plane, other = balancer(load, "wcmp"), balancer(load, "sed")
    install(other, "sed", np.array([9.0, 1.0, 1.0, 2.0]))
    run, run_other = runner(plane), runner(other)
    for port in range(3000, 3100):
        # Another balancer behind the same router takes a flow over: both choose alike.
        server = server_of(run(tcp4(CLIENT, port, VIP4, ACK, 5)))
        assert server == server_of(run_other(tcp4(CLIENT, port, VIP4, ACK, 5)))
        install(plane, "wcmp", np.array([1.0, 9.0, 1.0, 1.0])) if port % 20 == 0 else None
        assert server_of(run(tcp4(CLIENT, port, VIP4, ACK, 6))) == server
    assert totals(plane, "adopted") == [100] and counters(plane)["started"] == 100
    assert totals(plane, "syn_open") == [0]
    # What only ends a flow, or belongs to none, makes none.
    for flags in (FIN | ACK, RST, SYN | ACK, SYN | FIN, 0, 0x20):
        assert run(tcp4(CLIENT, 9000, VIP4, flags, 5))[0] == TX
    assert totals(plane, "untracked") == [6] and counters(plane)["started"] == 100


@pytest.mark.parametrize("table_full", [False, True])
def test_a_syn_flood_leaves_existing_flows_and_counts_alone(load: Load, table_full: bool) -> None:
    plane = balancer(load, "wcmp", flows=600, syn_flows=600 if table_full else 100)
    run = runner(plane)
    real = {port: server_of(run(tcp4(CLIENT, port, VIP4, SYN, 1))) for port in range(2000, 2050)}
    for port in real:
        run(tcp4(CLIENT, port, VIP4, ACK, 2))
    flood = np.random.default_rng(0).integers(1 << 28, 1 << 31, 5000)
    for client in flood:
        assert run(tcp4(int(client), 1234, VIP4, SYN, 9))[0] == TX
    assert {port: server_of(run(tcp4(CLIENT, port, VIP4, ACK, 3))) for port in real} == real
    limited, full = totals(plane, "syn_limited", "table_full")
    assert (full > 4000) if table_full else (limited == 4900 and full == 0)
    assert totals(plane, "syn_open")[0] <= plane.sizes.syn_flows
    # A client that comes now is served without state, always by the same server, also when weights change ...
    late = server_of(run(tcp4(CLIENT, 7000, VIP4, SYN, 1)))
    install(plane, "wcmp", np.array([9.0, 1.0, 1.0, 1.0]))
    assert server_of(run(tcp4(CLIENT, 7000, VIP4, ACK, 2))) == late
    check_counts(plane)
    # ... and has a flow once the flood's have been collected.
    plane.collect(syn_timeout=0.0, idle_timeout=60, close_timeout=60)
    assert sum(open_flows(plane)) == 50
    assert server_of(run(tcp4(CLIENT, 7000, VIP4, ACK, 3))) == late
    assert sum(open_flows(plane)) == 51
    check_counts(plane)


def test_flows_are_collected_by_their_state(load: Load) -> None:
    plane = balancer(load)
    run = runner(plane)
    run(tcp4(CLIENT, 1, VIP4, SYN, 1))
    for port in (2, 3):
        run(tcp4(CLIENT, port, VIP4, SYN, 1))
        run(tcp4(CLIENT, port, VIP4, ACK, 2))
    run(tcp4(CLIENT, 3, VIP4, ACK | FIN, 2))
    now = time.monotonic_ns()
    left = []
    for seconds in (5, 15, 25, 35):
        plane.collect(syn_timeout=10, idle_timeout=30, close_timeout=20, now=now + seconds * 1_000_000_000)
        left.append([port for port in (1, 2, 3) if plane.flow(0, ipaddress.IPv4Address(CLIENT), port) is not None])
        check_counts(plane)
    assert left == [[1, 2, 3], [2, 3], [2], []]
    assert counters(plane) == {"started": 3, "completed": 1, "rejected": 0, "failed": 2}


def test_without_a_driver_new_flows_go_by_the_configured_weights(load: Load) -> None:
    plane = balancer(load, "wcmp")
    run = runner(plane)
    install(plane, "wcmp", np.array([1.0, 0.0, 0.0, 0.0]))
    assert {server_of(run(tcp4(CLIENT, port, VIP4, SYN, 1))) for port in range(100, 200)} == {0}
    plane.keep_alive(0.0)
    assert {server_of(run(tcp4(CLIENT, port, VIP4, SYN, 1))) for port in range(200, 300)} == {0, 1, 2, 3}
    assert totals(plane, "orphaned") == [100]
    assert {server_of(run(tcp4(CLIENT, port, VIP4, ACK, 1))) for port in range(100, 200)} == {0}
    plane.keep_alive(60.0)
    assert {server_of(run(tcp4(CLIENT, port, VIP4, SYN, 1))) for port in range(300, 400)} == {0}


PACKET = st.tuples(
    st.integers(0, 3),  # client
    st.integers(1, 4),  # port
    st.integers(0, 1),  # VIP
    st.sampled_from([SYN, SYN, ACK, ACK, FIN | ACK, RST, RST | ACK, SYN | ACK, FIN, SYN | FIN, SYN | RST, 0, 0xFF]),
    st.integers(0, 2),  # initial sequence number
)
ACTION = st.one_of(
    PACKET,
    st.tuples(st.just("weights"), st.sampled_from(["wcmp", "sed", "p2c", "maglev"]), st.integers(1, 2**4 - 1)),
    st.tuples(st.just("collect"), st.sampled_from([0.0, 60.0])),
)


@pytest.mark.parametrize("small", [False, True])
def test_open_flows_return_to_zero_after_any_traffic(load: Load, small: bool) -> None:
    plane = balancer(load, flows=8 if small else 4096, syn_flows=5 if small else 4096)
    run = runner(plane)

    @given(st.lists(ACTION, min_size=20, max_size=200))
    @settings(max_examples=100, deadline=None)
    def check(actions: list[Any]) -> None:
        install(plane, "sed", np.ones(4))
        any_traffic(plane, run, actions, small)

    check()


def any_traffic(plane: XdpPlane, run: PacketRun, actions: list[Any], small: bool) -> None:
    established: dict[tuple[int, int, int], int] = {}
    for action in actions:
        if action[0] == "weights":
            _, rule, mask = action
            install(plane, rule, np.array([1.0, 2.0, 0.0, 5.0]), np.array([mask >> i & 1 for i in range(4)], np.bool_))
        elif action[0] == "collect":
            plane.collect(syn_timeout=action[1], idle_timeout=action[1], close_timeout=action[1])
            established = established if action[1] else {}
        else:
            client, port, vip, flags, isn = action
            if vip:
                result = run(tcp6(ipaddress.IPv6Address(CLIENT + client), port, VIP6, flags, isn))
            else:
                result = run(tcp4(CLIENT + client, port, VIP4, flags, isn))
            assert result[0] in (TX, DROP)
            key = (client, port, vip)
            if flags == ACK and result[0] == TX and not small:
                # From now on it is known, and has its server until it ends.
                assert established.setdefault(key, server_of(result)) == server_of(result)
            elif flags != ACK:
                established.pop(key, None)
        check_counts(plane)
    collect_all(plane)
    check_counts(plane)
    assert plane.flow_count() == 0 and not plane.shared["open_flows"].any() and totals(plane, "syn_open") == [0]


def test_counters_do_not_drift_when_cpus_race(load: Load) -> None:
    """Threads run the same packets at the same time, while another collects flows, whatever they are doing."""
    plane = balancer(load, flows=256, syn_flows=200)
    end = threading.Event()

    def send(seed: int) -> None:
        rng, run = np.random.default_rng(seed), runner(plane)
        flags = [SYN, SYN, ACK, FIN | ACK, RST]
        while not end.is_set():
            packets = [
                tcp4(CLIENT, int(port), VIP4, flags[int(flag)], int(isn))
                for port, flag, isn in rng.integers((1, 0, 0), (6, 5, 3), (500, 3))
            ]
            for packet in packets:
                run(packet)

    def collect() -> None:
        while not end.is_set():
            plane.collect(syn_timeout=0, idle_timeout=0, close_timeout=0)

    threads = [threading.Thread(target=send, args=(seed,)) for seed in range(3)] + [threading.Thread(target=collect)]
    for thread in threads:
        thread.start()
    time.sleep(2.0)
    end.set()
    for thread in threads:
        thread.join()
    assert counters(plane)["started"] > 1000
    check_counts(plane)
    collect_all(plane)
    check_counts(plane)
    assert plane.flow_count() == 0 and not plane.shared["open_flows"].any() and totals(plane, "syn_open") == [0]


def test_two_vips_of_one_client_port_are_two_flows(load: Load) -> None:
    plane = load()
    other = Vip(VIP4.address, 443)
    plane.set_vips([VIP4, other, VIP6])
    install(plane, "round_robin", np.ones(3))
    run = runner(plane)
    assert server_of(run(tcp4(CLIENT, 4000, VIP4, SYN, 7))) == 0
    assert server_of(run(tcp4(CLIENT, 4000, other, SYN, 7))) == 1
    assert server_of(run(tcp6(ipaddress.ip_address("fd77::5"), 4000, VIP6, SYN, 7))) == 2
    assert [plane.flow(i, ipaddress.IPv4Address(CLIENT), 4000) is not None for i in range(2)] == [True, True]
    run(tcp4(CLIENT, 4000, VIP4, FIN | ACK))
    assert open_flows(plane) == [0, 1, 1]
