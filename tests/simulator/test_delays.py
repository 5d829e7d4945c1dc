"""Weights that come into force during a step, or in a later one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lbgym.errors import ScenarioError
from lbgym.scenarios import DISPATCH_RULES, Event, Exponential, Scenario, Server, Workload
from lbgym.simulator import Simulation
from lbgym.snapshot import Snapshot

#: With these, a balancer under wcmp sends every flow to one server.
LEFT, RIGHT = [1.0, 0.0], [0.0, 1.0]


def pair(**changes: Any) -> Scenario:
    """Two servers behind two balancers."""
    workload = Workload(rate=200.0, demand=Exponential(mean=0.005))
    return Scenario(servers=(Server(), Server(cores=2)), workload=workload, balancers=2, dispatch="wcmp").with_changes(
        **changes
    )


def same(a: Snapshot, b: Snapshot) -> None:
    for name in Snapshot.__slots__:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


def flows_of(simulation: Simulation, replica: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Arrival, server and balancer of every flow so far, in the order of arrival; asks once only."""
    ended, left = simulation.take_flows(replica), simulation.open_flows(replica)
    columns = [np.concatenate([ended[key], left[key]]) for key in ("flow_id", "arrival", "server", "balancer")]
    order = np.argsort(columns[0])
    return columns[1][order], columns[2][order], columns[3][order]


@pytest.mark.parametrize("rule", DISPATCH_RULES)
def test_a_stop_on_the_way_changes_no_bit(rule: str) -> None:
    """Handing over the weights that are in force already, whenever, is as good as leaving them."""
    events = (Event(time=0.6, kind="speed", server=0, value=0.5), Event(time=0.8, kind="down", server=1))
    rng = np.random.default_rng(0)
    scenario = pair(dispatch=rule, events=events, load=0.9)
    plain, stopped = Simulation(scenario, 3), Simulation(scenario, 3)
    weights = rng.uniform(0.5, 2.0, (3, 2, 2))
    for simulation in (plain, stopped):
        simulation.reset([1, 2, 3])
        simulation.step(weights, 0.25)
    for _ in range(6):
        same(plain.step(weights, 0.25), stopped.step(weights, 0.25, delays=rng.uniform(0.0, 0.6, (3, 2))))


def test_no_delay_is_the_same_as_none() -> None:
    rng = np.random.default_rng(1)
    now, queued = Simulation(pair(dispatch="sed"), 2), Simulation(pair(dispatch="sed"), 2)
    same(now.reset([4, 5]), queued.reset([4, 5]))
    for _ in range(8):
        weights = rng.uniform(0.5, 2.0, (2, 2, 2))
        same(now.step(weights, 0.25), queued.step(weights, 0.25, delays=np.zeros((2, 2))))


def test_flows_go_by_the_weights_in_force_when_they_arrive() -> None:
    simulation = Simulation(pair(), 2, record_flows=True)
    simulation.reset([7, 8])
    simulation.step(np.tile(LEFT, (2, 2, 1)), 0.25)
    delays = np.array([[0.1, 0.4], [0.0, 0.25]])
    simulation.step(np.tile(RIGHT, (2, 2, 1)), 0.25, delays=delays)
    np.testing.assert_array_equal(simulation.weights_in_force(), [[RIGHT, LEFT], [RIGHT, LEFT]])
    simulation.step(None, 0.25)
    np.testing.assert_array_equal(simulation.weights_in_force(), np.tile(RIGHT, (2, 2, 1)))
    for replica in range(2):
        arrival, server, balancer = flows_of(simulation, replica)
        assert len(arrival) > 100
        np.testing.assert_array_equal(server, arrival > 0.25 + delays[replica, balancer])


def test_newer_weights_displace_those_that_would_come_later() -> None:
    simulation = Simulation(pair(), record_flows=True)
    simulation.reset([7])
    simulation.step(np.tile(LEFT, (1, 2, 1)), 0.2)
    simulation.step(np.tile(RIGHT, (1, 2, 1)), 0.2, delays=np.array([[0.5, 0.1]]))
    # Comes into force at 0.6 s at both: before the weights that balancer 0 waits for, after those balancer 1 has.
    simulation.step(np.tile(LEFT, (1, 2, 1)), 0.2, delays=np.array([[0.2, 0.2]]))
    simulation.step(None, 0.4)
    arrival, server, balancer = flows_of(simulation)
    assert not server[balancer == 0].any()
    ones = balancer == 1
    np.testing.assert_array_equal(server[ones], (arrival[ones] > 0.3) & (arrival[ones] < 0.6))
    assert server[ones].any()


def test_several_may_be_on_their_way() -> None:
    simulation = Simulation(pair(), record_flows=True)
    simulation.reset([7])
    for k in range(40):
        weights = np.tile(RIGHT if k % 2 else LEFT, (1, 2, 1))
        simulation.step(weights, 0.25, delays=np.full((1, 2), 1.1))
    arrival, server, _ = flows_of(simulation)
    later = arrival > 1.1
    np.testing.assert_array_equal(server[later], ((arrival[later] - 1.1) // 0.25).astype(int) % 2)


def test_weights_without_a_delay_and_a_reset_drop_what_was_on_its_way() -> None:
    simulation = Simulation(pair(), 2)
    simulation.reset([1, 2])
    simulation.step(np.tile(RIGHT, (2, 2, 1)), 0.25, delays=np.full((2, 2), 1.0))
    simulation.reset([1, 2], np.array([True, False]))
    simulation.step(None, 1.0)
    np.testing.assert_array_equal(simulation.weights_in_force(), [[[1.0, 1.0]] * 2, [RIGHT] * 2])
    simulation.step(np.tile(LEFT, (2, 2, 1)), 0.25, delays=np.full((2, 2), 1.0))
    simulation.step(np.tile(RIGHT, (2, 2, 1)), 2.0)
    np.testing.assert_array_equal(simulation.weights_in_force(), np.tile(RIGHT, (2, 2, 1)))


def test_arrays_grow_in_the_middle_of_a_step() -> None:
    """More flows than there is room for, before and after the weights change."""
    scenario = pair(rate=20_000.0)
    whole = Simulation(scenario)
    whole.reset([3])
    whole.step(np.tile(LEFT, (1, 2, 1)), 0.3)
    whole.step(np.tile(RIGHT, (1, 2, 1)), 0.3)
    parts = Simulation(scenario)
    parts.reset([3])
    parts.step(np.tile(LEFT, (1, 2, 1)), 0.0)
    snapshot = parts.step(np.tile(RIGHT, (1, 2, 1)), 0.6, delays=np.full((1, 2), 0.3))
    assert snapshot.interval is not None
    expected = whole.observe()
    np.testing.assert_array_equal(snapshot.completed, expected.completed)
    np.testing.assert_array_equal(snapshot.started, expected.started)
    assert snapshot.interval.completed[0] == snapshot.completed.sum()


@pytest.mark.parametrize(
    ("delays", "said"),
    [(np.zeros((2, 1)), r"shape \(1, 2\)"), (np.array([[0.0, -0.1]]), "-0.1"), (np.array([[np.nan, 0.0]]), "nan")],
    ids=["shape", "negative", "nan"],
)
def test_bad_delays_change_nothing(delays: np.ndarray, said: str) -> None:
    simulation = Simulation(pair())
    simulation.reset([1])
    with pytest.raises(ScenarioError, match=said):
        simulation.step(np.ones((1, 2, 2)), 0.25, delays=delays)
    assert simulation.observe().timestamp[0] == 0.0
