"""What scheduled events do, on flows few enough to follow by hand."""

from __future__ import annotations

import numpy as np
import pytest

from lbgym.features import FEATURE_NAMES, SERVICE_NAMES
from lbgym.scenarios import DISPATCH_RULES, Event, Scenario, Server, Workload
from lbgym.simulator import Simulation

from .running import COMPLETED, FAILED, UNROUTED, broadcast, run_flows, trace_scenario

TWO = (Server(),) * 2
FOUR = (Server(),) * 4


def steady(*events: Event, dispatch: str = "ecmp", servers=FOUR, load: float = 0.6, **changes) -> Scenario:
    return Scenario(
        name="steady", servers=servers, workload=Workload(load=load), dispatch=dispatch, events=events, **changes
    )


def test_speed_changes_what_is_left():
    """5 of 10 core-seconds at speed 1, the others at half the speed, then at four times it."""
    events = (Event(time=5.0, kind="speed", server=0, value=0.5),)
    _, flows = run_flows(trace_scenario([0.0], [10.0], Server(), events=events), 100.0)
    np.testing.assert_array_equal(flows["fct"], [15.0])
    events += (Event(time=7.0, kind="speed", server=0, value=4.0),)
    _, flows = run_flows(trace_scenario([0.0], [10.0], Server(), events=events), 100.0)
    np.testing.assert_array_equal(flows["fct"], [8.0])


def test_speed_is_a_factor_of_the_configured_one():
    events = (Event(time=0.0, kind="speed", server=0, value=0.5), Event(time=1.0, kind="speed", server=0, value=1.0))
    _, flows = run_flows(trace_scenario([0.0], [9.0], Server(speed=4.0), events=events), 100.0)
    # 2 core-seconds in the first second, then 4 a second: the second event undoes the first.
    np.testing.assert_array_equal(flows["fct"], [1.0 + 7.0 / 4.0])


def test_speed_of_one_server_leaves_the_others():
    events = (Event(time=0.0, kind="speed", server=0, value=0.5),)
    _, flows = run_flows(trace_scenario([0.0, 0.0], [1.0, 1.0], *TWO, dispatch="round_robin", events=events), 10.0)
    assert sorted(flows["fct"]) == [1.0, 2.0]


def test_down_fails_its_flows_at_once():
    """Waiting and served flows fail, count with the timeout, and no flow is sent there any more."""
    times = [0.0, 0.0, 0.0, 0.0, 6.0, 7.0]
    servers = (Server(workers=1), Server(workers=1))
    events = (Event(time=5.0, kind="down", server=0),)
    scenario = trace_scenario(times, [10.0] * 6, *servers, dispatch="round_robin", events=events, reject_timeout=33.0)
    sim = Simulation(scenario, record_flows=True)
    sim.reset([1])
    before = sim.step(None, 4.9)
    np.testing.assert_array_equal(before.started, [[2, 2]])
    after = sim.step(None, 0.2)
    np.testing.assert_array_equal(after.failed, [[2, 0]])
    np.testing.assert_array_equal(after.active, [[False, True]])
    assert not after.stats[0, 0, 0].any()
    assert not after.ground_truth[0, 0].any()
    flows = sim.take_flows()
    np.testing.assert_array_equal(flows["status"], [FAILED, FAILED])
    np.testing.assert_array_equal(flows["fct"], 33.0)
    service = dict(zip(SERVICE_NAMES, after.interval.values[0], strict=True))
    assert service["rejected"] == 2
    assert service["completed"] == 0
    assert service["fct_mean"] == service["fct_p99"] == 33.0
    np.testing.assert_allclose(sim.integrals()["lost_time"], [[10.0, 0.0]])
    end = sim.step(None, 100.0)
    np.testing.assert_array_equal(end.started, [[2, 4]])
    np.testing.assert_array_equal(end.completed, [[0, 4]])


def test_a_failed_server_comes_back_empty():
    events = (Event(time=1.0, kind="down", server=0), Event(time=2.0, kind="up", server=0))
    _, flows = run_flows(trace_scenario([0.0, 2.5], [3.0, 1.0], Server(), events=events), 10.0)
    np.testing.assert_array_equal(flows["status"], [FAILED, COMPLETED])
    assert flows["fct"][1] == 1.0


def test_a_failed_server_keeps_its_speed():
    events = (
        Event(time=0.5, kind="speed", server=0, value=0.25),
        Event(time=1.0, kind="down", server=0),
        Event(time=2.0, kind="up", server=0),
    )
    _, flows = run_flows(trace_scenario([3.0], [1.0], Server(), events=events), 10.0)
    np.testing.assert_array_equal(flows["fct"], [4.0])


def test_drain_finishes_what_it_has():
    events = (Event(time=1.0, kind="drain", server=0),)
    servers = (Server(workers=1), Server(workers=1))
    times = [0.0, 0.0, 0.0, 0.0, 2.0, 3.0]
    scenario = trace_scenario(times, [1.5] * 6, *servers, dispatch="round_robin", events=events)
    sim, flows = run_flows(scenario, 100.0)
    np.testing.assert_array_equal(flows["status"], COMPLETED)
    np.testing.assert_array_equal(sim.observe().started, [[2, 4]])
    np.testing.assert_array_equal(sim.observe().active, [[False, True]])


def test_a_drain_by_hand_ends_with_its_episode():
    scenario = steady(Event(time=3.0, kind="down", server=3))
    sim, fresh = (Simulation(scenario, 3, record_flows=True) for _ in range(2))
    for each in (sim, fresh):
        each.reset([1, 2, 3])
        each.step(None, 1.0)
    sim.drain(0, replica=0)
    sim.drain(1, replica=1)
    sim.step(None, 1.0)
    assert sim.observe().active.tolist() == [[False, True, True, True], [True, False, True, True], [True] * 4]
    # Replica 1 goes on, with its drain.
    sim.reset([7, 0, 0], np.array([True, False, False]))
    sim.step(None, 4.0)
    assert sim.observe().active.tolist() == [[True] * 3 + [False], [True, False, True, False], [True] * 3 + [False]]
    snapshots = []
    for each in (sim, fresh):
        each.reset([4, 5, 6])
        snapshots.append(each.step(None, 10.0))
    np.testing.assert_array_equal(snapshots[0].active, snapshots[1].active)
    np.testing.assert_array_equal(snapshots[0].stats, snapshots[1].stats)


def test_no_active_server_leaves_flows_unrouted():
    events = tuple(Event(time=1.0, kind="down", server=j) for j in range(2))
    times = [0.0, 2.0, 3.0]
    scenario = trace_scenario(times, [10.0] * 3, *TWO, events=events, reject_timeout=7.0)
    sim = Simulation(scenario, record_flows=True)
    sim.reset([1])
    snapshot = sim.step(None, 10.0)
    assert snapshot.unrouted[0] == 2
    assert snapshot.started.sum() == snapshot.failed.sum() == 1
    service = dict(zip(SERVICE_NAMES, snapshot.interval.values[0], strict=True))
    assert service["rejected"] == 3
    assert service["fct_mean"] == 7.0
    flows = sim.take_flows()
    np.testing.assert_array_equal(np.sort(flows["status"]), [FAILED, UNROUTED, UNROUTED])
    np.testing.assert_array_equal(flows["server"][flows["status"] == UNROUTED], -1)


@pytest.mark.parametrize("rule", DISPATCH_RULES)
@pytest.mark.parametrize("kind", ["down", "drain"])
def test_no_rule_uses_an_inactive_server(rule, kind):
    """From 10 s on nothing new for servers 1 and 3, until server 1 is back at 20 s."""
    events = (
        Event(time=10.0, kind=kind, server=1),
        Event(time=10.0, kind=kind, server=3),
        Event(time=20.0, kind="up", server=1),
    )
    sim = Simulation(steady(*events, dispatch=rule, load=0.8, balancers=2))
    sim.reset([1])
    first = sim.step(broadcast(sim, [1.0, 2.0, 1.5, 3.0]), 10.0).started[0]
    second = sim.step(None, 10.0).started[0]
    third = sim.step(None, 10.0).started[0]
    assert (first > 0).all()
    np.testing.assert_array_equal((second - first)[[1, 3]], 0)
    assert ((second - first)[[0, 2]] > 0).all()
    assert third[3] == second[3]
    assert third[1] > second[1]


def test_all_servers_at_zero_weight_still_take_flows():
    for rule in DISPATCH_RULES:
        sim = Simulation(steady(dispatch=rule))
        sim.reset([1])
        snapshot = sim.step(np.zeros((1, 1, 4)), 50.0)
        assert (snapshot.started > 0).all(), rule
        assert snapshot.unrouted[0] == 0


def test_events_between_steps_and_inside_them_are_the_same():
    events = (Event(time=3.0, kind="speed", server=0, value=0.2), Event(time=7.5, kind="down", server=2))
    _, one = run_flows(steady(*events), 20.0)
    sim = Simulation(steady(*events), record_flows=True)
    sim.reset([1])
    for _ in range(40):
        sim.step(None, 0.5)
    many = sim.take_flows()
    order = np.argsort(many["flow_id"])
    np.testing.assert_allclose(one["fct"], many["fct"][order], rtol=1e-9)


def test_events_begin_again_with_every_reset():
    sim = Simulation(steady(Event(time=5.0, kind="down", server=0)))
    for _ in range(2):
        assert sim.reset([1]).active.all()
        assert sim.step(None, 4.0).active.all()
        np.testing.assert_array_equal(sim.step(None, 2.0).active, [[False, True, True, True]])


# Rejection and the samples of the balancers


def column(name: str) -> int:
    return FEATURE_NAMES.index(name)


def test_a_full_server_rejects_and_the_balancer_notices():
    scenario = trace_scenario(
        [0.0, 1.0, 2.0], [100.0] * 3, Server(workers=1, backlog=1), reject_timeout=9.0, dispatch="lsq"
    )
    sim = Simulation(scenario, record_flows=True)
    sim.reset([1])
    assert not sim.step(None, 1.5).stats[..., 1:6].any()
    snapshot = sim.step(None, 1.5)
    np.testing.assert_array_equal(snapshot.rejected, [[1]])
    row = snapshot.stats[0, 0, 0]
    assert row[column("n_flow_on")] == 2
    for name in ("fct_mean", "fct_p90", "fct_mean_decay", "fct_p90_decay"):
        assert row[column(name)] == 9.0
    assert row[column("fct_std")] == 0.0


def test_a_failed_flow_leaves_a_sample():
    events = (Event(time=1.0, kind="down", server=0), Event(time=2.0, kind="up", server=0))
    sim = Simulation(trace_scenario([0.0], [5.0], Server(), events=events, reject_timeout=12.0))
    sim.reset([1])
    snapshot = sim.step(None, 3.0)
    assert snapshot.stats[0, 0, 0, column("fct_mean")] == 12.0
    assert snapshot.stats[0, 0, 0, column("n_flow_on")] == 0


def test_only_the_balancer_that_placed_a_flow_samples_it():
    sim = Simulation(steady(balancers=3, servers=TWO), record_flows=True)
    sim.reset([2])
    counts = np.zeros((3, 2), int)
    for _ in range(40):
        snapshot = sim.step(None, 0.05)
        flows = sim.take_flows()
        np.add.at(counts, (flows["balancer"], flows["server"]), 1)
        # A balancer has a mean FCT for a server exactly when one of its own flows there has ended.
        np.testing.assert_array_equal(snapshot.stats[0, :, :, column("fct_mean")] > 0, counts > 0)
        still = sim.open_flows()
        own = np.zeros((3, 2))
        np.add.at(own, (still["balancer"], still["server"]), 1)
        np.testing.assert_array_equal(snapshot.stats[0, :, :, 0], own)
    assert (counts > 0).all()
