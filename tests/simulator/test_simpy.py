"""The kernel against an independent SimPy model: every flow the same end and the same FCT, every placement lawful."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings

from lbgym.scenarios import (
    DISPATCH_RULES,
    Deterministic,
    Event,
    Exponential,
    Hyperexponential,
    Lognormal,
    ModulatedPoisson,
    Scenario,
    Server,
    Workload,
)

from .running import UNROUTED, drained, trace_scenario
from .simpy_model import COMPLETED, Replay
from .strategies import scenarios

WEIGHTS = np.array([1.0, 2.0, 0.7, 3.0, 1.3, 0.4, 2.2])


def replay(scenario: Scenario, flows: dict, before: Callable[[Replay, int], None] | None = None) -> Replay:
    """Send the recorded flows through the SimPy model and compare; returns the model for further questions."""
    model = Replay(
        arrival=flows["arrival"],
        demand=flows["demand"],
        balancer=flows["balancer"],
        server=flows["server"],
        servers=scenario.servers,
        events=scenario.events,
        before=before,
    )
    result = model.run()
    np.testing.assert_array_equal(flows["status"], result.status)
    done = result.status == COMPLETED
    np.testing.assert_allclose(flows["fct"][done], result.fct[done], rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(flows["fct"][~done], scenario.reject_timeout)
    return model


def delay_of(flows: np.ndarray, cores: np.ndarray) -> np.ndarray:
    """Total time that so many flows of a server take, where one alone takes 1."""
    return flows * np.maximum(1.0, flows / cores)


@functools.cache
def whittle(n: int, cores: int, weight: float, total: float) -> float:
    """Whittle's index by its definition: from the stationary laws of chains that accept up to n and n + 1 flows."""
    speed = weight / cores
    rate = min(0.8 * total, 1.5 * weight)
    mean, throughput = [], []
    for limit in (n, n + 1):
        chain = np.cumprod([1.0, *(rate / (speed * min(k, cores)) for k in range(1, limit + 1))])
        chain /= chain.sum()
        mean.append(chain @ np.arange(limit + 1))
        throughput.append(rate * (1.0 - chain[-1]))
    return float((mean[1] - mean[0]) / (throughput[1] - throughput[0]))


def lawful(rule: str, weights: np.ndarray, flows: dict) -> Callable[[Replay, int], None]:
    """A check that each flow goes where the rule sends it, by the SimPy model's own counters."""
    balancers = int(flows["balancer"].max()) + 1

    def before(model: Replay, i: int) -> None:
        chosen, own, active = flows["server"][i], model.own[flows["balancer"][i]], model.active
        if not active.any():
            assert chosen == -1
            return
        assert active[chosen]
        if rule.startswith("oracle"):
            speed = np.array([m.speed * min(m.cores, m.workers) for m in model.models])
            cores = np.array([min(m.cores, m.workers) for m in model.models])
            if rule == "oracle_lsq":
                score = model.total
            elif rule == "oracle_whittle":
                total = speed[active].sum()
                score = np.array([whittle(n, c, v, total) for n, c, v in zip(model.total, cores, speed, strict=True)])
            elif rule == "oracle_marginal":
                score = (delay_of(model.total + 1, cores) - delay_of(model.total, cores)) * cores / speed
            elif rule == "oracle_sed":
                score = (model.total + 1) / speed
            else:
                left = np.array([m.remaining_work for m in model.models])
                score = (left + flows["demand"][i]) / speed
            slack = 1e-9
        else:
            cores = np.array([min(m.cores, m.workers) for m in model.models])
            total = weights[active].sum()
            index = [whittle(n, c, w, total) for n, c, w in zip(own, cores, weights, strict=True)]
            marginal = (delay_of(own + 1, cores) - delay_of(own, cores)) * cores / weights
            score = {
                "lsq": own,
                "table": own,
                "p2c": own,
                "marginal": marginal,
                "whittle": np.array(index),
                "p2c_marginal": marginal,
                "sed": (own + 1) / weights,
                "p2c_sed": (own + 1) / weights,
                "sed_scaled": (balancers * own + 1) / weights,
            }[rule]
            slack = 1e-12
        score = np.where(active, score, np.inf)
        if rule.startswith("p2c"):
            # Of two different candidates the better one: somebody else is at least as bad, if there is anybody else.
            others = np.delete(score[active], np.flatnonzero(active).tolist().index(chosen))
            assert len(others) == 0 or score[chosen] <= others.max() * (1 + slack)
        else:
            assert score[chosen] <= score.min() * (1 + slack) + slack
            if rule == "lsq":
                assert own[chosen] == own[active].min()

    return before


SPEED_EVENTS = (
    Event(time=20.0, kind="speed", server=0, value=0.3),
    Event(time=33.0, kind="speed", server=1, value=2.5),
    Event(time=60.0, kind="speed", server=0, value=1.0),
    Event(time=61.0, kind="speed", server=0, value=4.0),
)
LIFE_EVENTS = (
    Event(time=15.0, kind="down", server=1),
    Event(time=25.0, kind="drain", server=0),
    Event(time=40.0, kind="up", server=1),
    Event(time=50.0, kind="up", server=0),
    Event(time=55.0, kind="down", server=0),
    Event(time=57.0, kind="down", server=1),
    Event(time=58.0, kind="down", server=2),
    Event(time=60.0, kind="up", server=2),
)
PS = (Server(), Server(speed=2.0), Server(speed=0.5))
CLUSTERS = {
    "plain processor sharing": PS,
    "several cores": (Server(cores=4), Server(cores=2, speed=1.7), Server(cores=8, speed=0.6)),
    "first in, first out": (Server(workers=1), Server(cores=4, workers=4), Server(cores=2, workers=2, speed=3.0)),
    "limited sharing": (
        Server(cores=2, workers=6),
        Server(cores=1, workers=3, backlog=4),
        Server(cores=4, workers=5, backlog=0, speed=0.4),
    ),
    "more cores than workers": (Server(cores=8, workers=3, backlog=2), Server(cores=2, workers=1), Server()),
    "a backlog without workers": (Server(backlog=3), Server(cores=2, backlog=0), Server()),
}


@pytest.mark.parametrize("events", [(), SPEED_EVENTS, LIFE_EVENTS], ids=["steady", "speeds", "failures"])
@pytest.mark.parametrize("cluster", CLUSTERS)
def test_every_flow_ends_as_in_simpy(cluster, events):
    demand = Hyperexponential(probabilities=(0.8, 0.2), means=(0.2, 2.0))
    workload = Workload(load=1.05, demand=demand, arrivals=ModulatedPoisson())
    scenario = Scenario(
        name=cluster, servers=CLUSTERS[cluster], workload=workload, dispatch="wcmp", balancers=2, events=events
    )
    sim, flows = drained(scenario, 80.0, weights=WEIGHTS[:3])
    assert len(flows["fct"]) > 150
    model = replay(scenario, flows)
    integrals = sim.integrals()
    mine = {"queue": "queue_integral", "busy": "busy_integral", "work": "work"}
    for name, attribute in mine.items():
        expected = [getattr(m, attribute) for m in model.models]
        np.testing.assert_allclose(integrals[name][0], expected, rtol=1e-9, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("events", [(), SPEED_EVENTS + LIFE_EVENTS], ids=["steady", "speeds and failures"])
@pytest.mark.parametrize("rule", [r for r in DISPATCH_RULES if r not in ("ecmp", "wcmp", "maglev", "round_robin")])
def test_every_flow_is_placed_by_the_rule(rule, events):
    servers = (
        Server(),
        Server(cores=2, speed=1.5),
        Server(cores=4, workers=6, backlog=3),
        Server(cores=2, workers=2),
        Server(speed=0.4),
        Server(cores=3, workers=3, backlog=0),
        Server(cores=2, speed=0.9),
    )
    workload = Workload(load=0.9, demand=Lognormal(mean=0.5, cv=1.5))
    scenario = Scenario(name=rule, servers=servers, workload=workload, dispatch=rule, balancers=2, events=events)
    _, flows = drained(scenario, 80.0, weights=WEIGHTS)
    # The oracles may leave the slowest server idle.
    assert len(np.unique(flows["server"][flows["status"] != UNROUTED])) >= 6
    replay(scenario, flows, lawful(rule, WEIGHTS, flows))


def test_ten_thousand_flows():
    """Long busy periods: rounding must not pile up."""
    workload = Workload(load=0.97, demand=Exponential(mean=0.3))
    scenario = Scenario(name="long", servers=(Server(), Server(cores=3)), workload=workload, dispatch="lsq")
    _, flows = drained(scenario, 10_000 / scenario.rate)
    assert len(flows["fct"]) > 9500
    replay(scenario, flows, lawful("lsq", WEIGHTS[:2], flows))


@settings(max_examples=60)
@given(scenario=scenarios(max_rate=60.0))
def test_any_scenario_ends_as_in_simpy(scenario):
    trace = scenario.workload.trace
    if trace is not None:
        # Flows that coincide, or end where another begins, may end in another order: the ties have tests of their own.
        scenario = scenario.with_changes(
            workload=Workload(rate=10.0, demand=Exponential(mean=0.1)), name="drawn, without its trace"
        )
    _, flows = drained(scenario, 5.0)
    if len(flows["fct"]):
        replay(scenario, flows)


def test_completions_come_before_arrivals():
    """A flow that arrives when another ends finds its place free; all numbers are exact in binary."""
    times = np.arange(12) * 0.5
    for server in (Server(workers=1, backlog=0), Server(backlog=0, workers=1, cores=2)):
        scenario = trace_scenario(times, np.full(12, 0.5), server)
        _, flows = drained(scenario, 100.0)
        assert (flows["status"] == COMPLETED).all()
        np.testing.assert_array_equal(flows["fct"], 0.5)
        replay(scenario, flows)
    scenario = trace_scenario(times, np.full(12, 0.5), Server(), Server(), dispatch="lsq")
    _, flows = drained(scenario, 100.0)
    np.testing.assert_array_equal(flows["fct"], 0.5)
    replay(scenario, flows, lawful("lsq", WEIGHTS[:2], flows))


def test_ties_of_arrivals_keep_their_order():
    """Four flows at once on one worker with two places: served in order, the fourth is turned away."""
    scenario = trace_scenario([1.0, 1.0, 1.0, 1.0], [0.5, 0.25, 1.0, 0.5], Server(workers=1, backlog=2))
    _, flows = drained(scenario, 100.0)
    np.testing.assert_array_equal(flows["status"], [0, 0, 0, 1])
    np.testing.assert_array_equal(flows["fct"][:3], [0.5, 0.75, 1.75])
    replay(scenario, flows)


def test_deterministic_flows_in_step():
    """Equal demands and arrivals in pairs: many simultaneous departures."""
    times = np.repeat(np.arange(50) * 2.0, 2)
    demand = Deterministic(mean=0.75).mean
    scenario = trace_scenario(times, np.full(100, demand), Server())
    _, flows = drained(scenario, 1000.0)
    np.testing.assert_array_equal(flows["fct"], 1.5)
    replay(scenario, flows)
