"""Copies of a simulation, by ``copy.deepcopy`` and by ``pickle``, continue bit for bit as the original does."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbgym.features import ReservoirSampler
from lbgym.scenarios import (
    Event,
    OnOff,
    Scenario,
    Server,
    Trace,
    Workload,
    default_scenario,
    named_distribution,
    named_scenario,
)
from lbgym.simulator import FlowSimulation, Simulation
from lbgym.snapshot import Snapshot

from .strategies import scenarios


def pickled(instance: Any) -> Any:
    return pickle.loads(pickle.dumps(instance))


WAYS = pytest.mark.parametrize("way", [copy.deepcopy, pickled])

BUSY = Scenario(
    servers=(Server(cores=1, workers=2, backlog=3), Server(cores=2), Server(cores=4, speed=0.5)),
    workload=Workload(arrivals=OnOff(on=0.4, off=0.6, random=True), load=0.9),
    balancers=2,
    events=(
        Event(time=1.0, kind="down", server=1),
        Event(time=1.6, kind="up", server=1),
        Event(time=1.2, kind="speed", server=0, value=0.5),
        Event(time=2.1, kind="rate", value=2.0),
    ),
)


def equal(one: Snapshot, other: Snapshot) -> None:
    for name in Snapshot.__dataclass_fields__:
        a, b = getattr(one, name), getattr(other, name)
        assert a is b is None or np.asarray(a).tobytes() == np.asarray(b).tobytes(), name


def steps(simulation: Simulation, count: int, seed: int = 0) -> list[Snapshot]:
    """Weights that change in every step, the same for the same seed; the first ones come into force late."""
    rng = np.random.default_rng(seed)
    shape = (simulation.num_replicas, simulation.num_balancers, simulation.num_servers)
    return [
        simulation.step(rng.uniform(0.1, 2.0, shape), 0.25, delays=rng.uniform(0.0, 0.4, shape[:2]))
        for _ in range(count)
    ]


def same(one: Simulation, other: Simulation, count: int = 8) -> None:
    for a, b in zip(steps(one, count), steps(other, count), strict=True):
        equal(a, b)
    for r in range(one.num_replicas):
        mine, its = one.take_flows(r), other.take_flows(r)
        for name, column in mine.items():
            assert column.tobytes() == its[name].tobytes(), name


@WAYS
@pytest.mark.parametrize("dispatch", ["sed", "maglev", "wcmp", "round_robin", "p2c_sed", "oracle_least_work"])
def test_in_an_episode(way: Callable[[Any], Any], dispatch: str) -> None:
    simulation = Simulation(BUSY, 3, dispatch=dispatch, record_flows=True)
    simulation.reset([1, 2, 3])
    steps(simulation, 5, seed=9)
    same(simulation, way(simulation))


@WAYS
def test_before_the_first_reset(way: Callable[[Any], Any]) -> None:
    simulation = Simulation(BUSY, 2, record_flows=True)
    other = way(simulation)
    equal(simulation.reset([4, 5]), other.reset([4, 5]))
    same(simulation, other)


@WAYS
def test_neither_moves_the_other(way: Callable[[Any], Any]) -> None:
    simulation, untouched = Simulation(BUSY, record_flows=True), Simulation(BUSY, record_flows=True)
    for each in (simulation, untouched):
        each.reset([1])
        steps(each, 3)
    steps(way(simulation), 10, seed=5)
    same(simulation, untouched)


@WAYS
def test_on_threads(way: Callable[[Any], Any]) -> None:
    simulation = Simulation(BUSY, 8, num_threads=3, record_flows=True)
    simulation.reset(range(8))
    steps(simulation, 2)
    other = way(simulation)
    same(simulation, other)
    simulation.close()
    other.step(None, 0.25)  # has threads of its own
    other.close()


@WAYS
def test_a_replayed_trace(way: Callable[[Any], Any]) -> None:
    rng = np.random.default_rng(3)
    trace = Trace(np.cumsum(rng.exponential(0.02, 500)), rng.exponential(0.1, 500), random_start=True)
    scenario = default_scenario(4).with_changes(workload=Workload(trace=trace))
    simulation = Simulation(scenario, 2, record_flows=True)
    simulation.reset([1, 2])
    steps(simulation, 3)
    other = way(simulation)
    same(simulation, other)
    with pytest.raises(ValueError, match="read-only"):
        other.scenario.workload.trace.times[0] = 1.0


@WAYS
def test_another_scenario_after_the_copy(way: Callable[[Any], Any]) -> None:
    distribution = named_distribution("random-clusters")
    simulation = Simulation(distribution.reference, 2, num_servers=distribution.max_servers, record_flows=True)
    simulation.reset([1, 2])
    steps(simulation, 2)
    other = way(simulation)
    for each in (simulation, other):
        each.set_scenario(distribution.draw(7), np.array([False, True]))
        each.reset([8, 9], np.array([False, True]))
    same(simulation, other)


@WAYS
@given(scenario=scenarios(), before=st.integers(0, 6))
def test_any_scenario_at_any_time(way: Callable[[Any], Any], scenario: Scenario, before: int) -> None:
    simulation = Simulation(scenario, record_flows=True)
    simulation.reset([3])
    steps(simulation, before)
    same(simulation, way(simulation), 4)


def test_in_another_process(tmp_path: Path) -> None:
    simulation = Simulation(named_scenario("noisy-neighbour"), 2, num_threads=2)
    simulation.reset([1, 2])
    simulation.step(None, 10.0)
    (tmp_path / "before").write_bytes(pickle.dumps(simulation))
    program = (
        "import pickle, sys; from pathlib import Path; folder = Path(sys.argv[1]);"
        "simulation = pickle.loads((folder / 'before').read_bytes());"
        "(folder / 'after').write_bytes(pickle.dumps([simulation.step(None, 5.0) for _ in range(4)]))"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
    for theirs in pickle.loads((tmp_path / "after").read_bytes()):
        equal(theirs, simulation.step(None, 5.0))


@WAYS
def test_one_decision_per_flow(way: Callable[[Any], Any]) -> None:
    simulation = FlowSimulation(BUSY.with_changes(balancers=1), 3, record_flows=True)
    simulation.begin([1, 2, 3])
    for k in range(40):
        simulation.decide([k % 3] * 3)
    other = way(simulation)
    for k in range(200):
        one, two = simulation.decide([k % 3] * 3), other.decide([k % 3] * 3)
        assert [a.tobytes() for a in one] == [b.tobytes() for b in two]


@WAYS
def test_a_reservoir(way: Callable[[Any], Any]) -> None:
    sampler = ReservoirSampler(8, seed=1, probability=0.7)
    for k in range(50):
        sampler.add(float(k), k * 0.1)
    other = way(sampler)
    for k in range(50, 100):
        sampler.add(float(k), k * 0.1)
        other.add(float(k), k * 0.1)
    assert sampler.get_features() == other.get_features()
