"""Room for more servers than a scenario has: those beyond do not exist, and nothing else differs to the bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lbgym.errors import ScenarioError
from lbgym.scenarios import (
    DISPATCH_RULES,
    Empirical,
    Exponential,
    ModulatedPoisson,
    OnOff,
    Scenario,
    Server,
    Trace,
    Workload,
    named_scenario,
)
from lbgym.simulator import Simulation

ROOM = 9
STATS = ("stats", "ground_truth", "started", "completed", "rejected", "failed", "active")


def scenario(rule: str, balancers: int = 1) -> Scenario:
    """Servers that fail, drain and reject."""
    base = named_scenario("failure")
    servers = tuple(Server(cores=1 + j % 3, workers=4, backlog=2) for j in range(6))
    return replace(base, servers=servers, dispatch=rule, balancers=balancers)


@pytest.mark.parametrize("rule", DISPATCH_RULES)
@pytest.mark.parametrize("balancers", [1, 3])
def test_absent_servers_never_get_a_flow_and_change_nothing(rule: str, balancers: int) -> None:
    some = scenario(rule, balancers)
    exact = Simulation(some, record_flows=True)
    roomy = Simulation(some, record_flows=True, num_servers=ROOM)
    exact.reset([3])
    roomy.reset([3])
    rng = np.random.default_rng(1)
    for k in range(200):
        # The weights of absent servers are the largest of all, or all there are.
        weights = np.where(np.arange(ROOM) < 6, rng.choice([0.0, 0.5, 1.0, 3.0], (1, balancers, ROOM)), 10.0)
        weights[..., :6] *= k % 5 != 0
        a, b = exact.step(weights[..., :6], 0.25), roomy.step(weights, 0.25)
        for name in STATS:
            one, two = np.moveaxis(getattr(a, name), 2 if name == "stats" else 1, 0), getattr(b, name)
            two = np.moveaxis(two, 2 if name == "stats" else 1, 0)
            np.testing.assert_array_equal(one, two[:6], err_msg=name)
            assert not two[6:].any(), name
        assert a.interval is not None and b.interval is not None
        np.testing.assert_array_equal(a.interval.values, b.interval.values)
    flows, same = exact.take_flows(), roomy.take_flows()
    assert len(flows["server"]) > 1000 and flows["server"].max() == 5 and (flows["status"] > 0).any()
    for name in flows:
        np.testing.assert_array_equal(flows[name], same[name])


def test_a_replica_may_shrink_and_grow_again() -> None:
    large, small = named_scenario("heterogeneous"), named_scenario("uniform")
    sim = Simulation(large, 2)
    fresh = Simulation(small, 1), Simulation(large, 1)
    sim.reset([1, 1])
    for _ in range(40):
        sim.step(None, 0.25)
    for current, twin in ((small, fresh[0]), (large, fresh[1])):
        sim.set_scenarios({1: current})
        sim.reset([9, 9], np.array([False, True]))
        twin.reset([9])
        n = current.num_servers
        for _ in range(40):
            got, want = sim.step(None, 0.25), twin.step(None, 0.25)
            np.testing.assert_array_equal(got.stats[1, :, :n], want.stats[0])
            assert got.active[1].tolist() == [True] * n + [False] * (8 - n) and got.active[0].all()


def with_workload(name: str, workload: Workload) -> Scenario:
    return replace(named_scenario("uniform"), name=name, workload=workload)


def various() -> list[Scenario]:
    """Scenarios whose parameters are of different widths, some with a table of flows."""
    times = np.arange(50) / 25
    return [
        with_workload("plain", Workload(load=0.5)),
        with_workload("measured", Workload(demand=Empirical(values=(0.05, 0.1, 0.3)), load=0.6)),
        with_workload("trace", Workload(trace=Trace(times=times, demands=0.01 + 0.1 * (times % 0.3)), load=0.7)),
        with_workload("states", Workload(arrivals=ModulatedPoisson(levels=(1, 2, 4), sojourns=(1, 2, 1)), load=0.5)),
        with_workload("bursts", Workload(arrivals=OnOff(), demand=Exponential(mean=0.2), load=0.5)),
        with_workload("other trace", Workload(trace=Trace(times=times[:9], demands=np.full(9, 0.2)), load=0.4)),
        named_scenario("failure").with_changes(servers=(Server(cores=4),) * 6),
        named_scenario("flash-crowd"),
    ]


def test_replicas_of_different_scenarios_are_each_what_they_would_be_alone() -> None:
    every = various()
    room = max(s.num_servers for s in every)
    sim = Simulation(every[0], 3, num_servers=room)
    rng = np.random.default_rng(5)
    running: list[Simulation | None] = [None] * 3
    for _ in range(60):
        chosen = np.flatnonzero(rng.random(3) < 0.5).tolist() if running[0] is not None else [0, 1, 2]
        seeds = rng.integers(1 << 40, size=3).tolist()
        drawn = {r: every[rng.integers(len(every))] for r in chosen}
        sim.set_scenarios(drawn)
        sim.reset(seeds, np.isin(np.arange(3), chosen))
        for r, each in drawn.items():
            running[r] = Simulation(each, 1, num_servers=room)
            running[r].reset([seeds[r]])
        for _ in range(4):
            got = sim.step(None, 0.5)
            for r, alone in enumerate(running):
                want = alone.step(None, 0.5)
                np.testing.assert_array_equal(got.stats[r], want.stats[0])
                np.testing.assert_array_equal(got.interval.values[r], want.interval.values[0])


def test_the_table_of_flows_does_not_grow_without_end() -> None:
    times = np.arange(100) / 25
    trace = Trace(times=times, demands=np.full(100, 0.1))
    sim = Simulation(with_workload("trace", Workload(trace=trace, load=0.7)), 2)
    for k in range(200):
        sim.set_scenarios({k % 2: with_workload("trace", Workload(trace=trace, load=0.3 + k / 1000))})
    assert len(sim._parameters.table) <= 4 * 2 * 100


def test_a_scenario_that_does_not_fit_is_refused_and_no_replica_changed() -> None:
    sim = Simulation(named_scenario("uniform"), 2, num_servers=6)
    before = sim.scenario_of(0)
    with pytest.raises(ScenarioError, match="has 8 servers; this simulation has room for 6"):
        sim.set_scenarios({0: named_scenario("failure"), 1: named_scenario("heterogeneous")})
    assert sim.scenario_of(0) is before
    with pytest.raises(ScenarioError, match="room for 3"):
        Simulation(named_scenario("uniform"), num_servers=3)
