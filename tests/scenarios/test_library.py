"""The built-in scenarios are what their names and descriptions say."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import lbgym.scenarios as scenarios
from lbgym.errors import ScenarioError, UnknownNameError
from lbgym.scenarios import (
    MARLLB_CPU_SPEED,
    SAMPLE_TRACE,
    Empirical,
    Exponential,
    OnOff,
    Server,
    Sinusoidal,
    default_scenario,
    load_scenario,
    named_scenario,
    read_trace,
    scenario_names,
    write_trace,
)
from lbgym.scenarios.sample import NUM_FLOWS, make_sample_trace
from lbgym.scenarios.traces import DECODE_RATE, PREFILL_RATE
from lbgym.simulator import Simulation

STEP = 0.25
LARGE = {"fleet", "marllb-moderate", "marllb-large", "prequal-ramp"}
#: As published, with a decision per flow in mind rather than one per step.
PER_FLOW = {"park"}


def test_all_public_names_are_exported() -> None:
    public = {name for name, value in vars(scenarios).items() if name[0] != "_" and not isinstance(value, ModuleType)}
    assert sorted(scenarios.__all__) == sorted(public)


def test_the_scenarios_users_are_promised_exist() -> None:
    promised = {
        "uniform",
        "heterogeneous",
        "noisy-neighbour",
        "failure",
        "diurnal",
        "marllb-moderate",
        "marllb-large",
        "llm-serving",
        "bursty",
        "heavy-tailed",
    }
    assert promised <= set(scenario_names())


@pytest.mark.parametrize("name", scenario_names())
def test_every_scenario_is_small_enough_to_learn_on_and_says_what_it_shows(name: str) -> None:
    scenario = named_scenario(name)
    assert scenario.name == name
    assert scenario == named_scenario(name) or scenario.workload.trace is not None
    assert len(scenario.description) > 40
    assert "\n" not in scenario.description
    assert 0.3 <= scenario.load <= 1.2
    if name not in LARGE | PER_FLOW:
        assert 4 <= scenario.num_servers <= 8
        assert 15 <= scenario.rate * STEP <= 100
    assert all(event.time >= 0 for event in scenario.events)


def test_an_unknown_name_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown scenario 'noisy_neighbor'. Did you mean 'noisy-neighbour'\?"):
        named_scenario("noisy_neighbor")


@pytest.mark.parametrize("num_servers", [1, 2, 5, 64])
def test_default_scenario_alternates_two_sizes(num_servers: int) -> None:
    scenario = default_scenario(num_servers)
    assert [server.cores for server in scenario.servers] == ([2, 4] * num_servers)[:num_servers]
    assert scenario.load == pytest.approx(0.8)
    assert scenario.workload.demand == Exponential(mean=0.1)


@pytest.mark.parametrize("num_servers", [0, -1, 2.0, None, 65_537])
def test_default_scenario_refuses_other_numbers(num_servers: object) -> None:
    with pytest.raises(ScenarioError, match=r"num_servers must be .*from 1 to 65536"):
        default_scenario(num_servers)  # type: ignore[arg-type]


def test_uniform_servers_are_equal() -> None:
    assert len(set(named_scenario("uniform").servers)) == 1


def test_heterogeneous_hides_speeds_behind_equal_cores() -> None:
    scenario = named_scenario("heterogeneous")
    for cores in {server.cores for server in scenario.servers}:
        assert len({server.speed for server in scenario.servers if server.cores == cores}) > 1
    # True capacities are not in proportion to the cores, so weights from cores cannot be best.
    capacities = np.array([server.capacity for server in scenario.servers])
    assert np.corrcoef(capacities, scenario.core_weights)[0, 1] < 0.8
    assert scenario.load == pytest.approx(0.8)


def test_heterogeneous_rewards_knowing_the_true_speeds() -> None:
    scenario = named_scenario("heterogeneous")
    true_weights = np.array([server.capacity for server in scenario.servers])

    def mean_and_p99(weights: np.ndarray) -> np.ndarray:
        simulation = Simulation(scenario, 4, dispatch="sed", reservoirs=False, service=False, record_flows=True)
        simulation.reset([1, 2, 3, 4])
        simulation.step(np.broadcast_to(weights, (4, 1, scenario.num_servers)).copy(), 100.0)
        fct = np.concatenate([simulation.take_flows(replica)["fct"] for replica in range(4)])
        return np.array([fct.mean(), np.quantile(fct, 0.99)])

    # The same flows for each: counting alone (LSQ is SED with equal weights), known cores, true speeds.
    counting, cores, true = map(mean_and_p99, (np.ones(8), np.array(scenario.core_weights), true_weights))
    assert (cores < 0.95 * counting).all()
    assert (true < 0.85 * cores).all()


def test_noisy_neighbours_halve_the_speed_for_30_of_75_seconds_in_turn() -> None:
    scenario = named_scenario("noisy-neighbour")
    slow = np.zeros((scenario.num_servers, 3000))
    speed = np.ones(scenario.num_servers)
    for second in range(3000):
        for event in (e for e in scenario.events if second <= e.time < second + 1):
            assert event.kind == "speed"
            speed[event.server] = event.value
        slow[:, second] = speed < 1
    share = slow[:, 300:].mean(axis=1)
    np.testing.assert_allclose(sorted(share)[-2:], 30 / 75, atol=0.01)
    assert sorted(share)[:-2] == [0] * 4
    assert set(speed) <= {0.5, 1.0}


def test_failures_never_take_two_servers_at_once_and_end() -> None:
    scenario = named_scenario("failure")
    out: set[int] = set()
    kinds = set()
    for event in scenario.events:
        assert event.server is not None
        if event.kind == "up":
            out.remove(event.server)
        else:
            assert not out
            out.add(event.server)
        kinds.add(event.kind)
    assert kinds == {"down", "drain", "up"}
    assert not out
    first_minute = [event.kind for event in scenario.events if event.time < scenario.duration]
    assert first_minute == ["down", "up", "drain", "up"]


def test_diurnal_stays_below_its_capacity_at_noon() -> None:
    scenario = named_scenario("diurnal")
    arrivals = scenario.workload.arrivals
    assert isinstance(arrivals, Sinusoidal)
    assert 0.9 < scenario.load * (1 + arrivals.amplitude) < 1
    assert math.sin(arrivals.phase) == -1  # begins at night


def test_bursts_exceed_the_capacity_and_the_mean_does_not() -> None:
    scenario = named_scenario("bursty")
    arrivals = scenario.workload.arrivals
    assert isinstance(arrivals, OnOff)
    mean_level = (arrivals.on + arrivals.off * arrivals.off_level) / (arrivals.on + arrivals.off)
    assert scenario.load / mean_level > 1.1
    assert scenario.load < 0.8


def test_the_testbeds_of_marllb() -> None:
    moderate, large = named_scenario("marllb-moderate"), named_scenario("marllb-large")
    assert [server.cores for server in moderate.servers] == [2] * 4 + [4] * 3
    assert [server.cores for server in large.servers] == [4] * 12 + [8] * 12
    assert (moderate.balancers, large.balancers) == (2, 6)
    for server in moderate.servers + large.servers:
        assert (server.workers, server.backlog) == (32, 128)
    assert {server.speed for server in large.servers} == {MARLLB_CPU_SPEED}
    assert large.workload.demand == Exponential(mean=0.2)
    assert large.rate == 398.5
    # The paper names 80 to 95 % of the capacity for its rates.
    assert 0.75 < large.with_changes(rate=391.5).load < large.with_changes(rate=436.7).load < 0.95
    assert 0.75 < moderate.load < moderate.with_changes(rate=796.3).load < 0.95


def test_llm_demands_are_those_of_the_stated_tokens_and_rates() -> None:
    demand = named_scenario("llm-serving").workload.demand
    assert isinstance(demand, Empirical)
    # The mean of a lognormal is its median times exp(sigma ** 2 / 2).
    expected = math.exp(0.8**2 / 2) * (800 / PREFILL_RATE + 150 / DECODE_RATE)
    assert demand.mean == pytest.approx(expected, rel=0.02)


def test_fleet_is_seen_in_parts() -> None:
    scenario = named_scenario("fleet")
    assert scenario.num_servers == 64
    assert scenario.balancers == 4
    assert len({(server.cores, server.speed) for server in scenario.servers}) > 6


def test_overload_can_only_reject() -> None:
    scenario = named_scenario("overload")
    assert scenario.load > 1
    assert all(server.workers is not None and server.backlog is not None for server in scenario.servers)


# The shipped trace


def test_the_shipped_trace_is_what_its_generator_makes(tmp_path: Path) -> None:
    shipped, made = read_trace(SAMPLE_TRACE), make_sample_trace()
    write_trace(made, tmp_path / "again.csv.gz")
    again = read_trace(tmp_path / "again.csv.gz")
    assert len(shipped.times) == NUM_FLOWS
    np.testing.assert_allclose(again.times, shipped.times, atol=2e-5)
    np.testing.assert_allclose(again.demands, shipped.demands, atol=2e-5)
    assert SAMPLE_TRACE.stat().st_size < 64 * 1024


def test_the_shipped_trace_has_its_two_classes_and_its_burst() -> None:
    trace = read_trace(SAMPLE_TRACE)
    assert trace.mean == pytest.approx(0.7 * 0.033 + 0.3 * 0.25, rel=0.1)
    assert trace.rate == pytest.approx(108, rel=0.05)
    counts = np.histogram(trace.times, np.arange(46))[0]
    assert counts[30:32].mean() > 2 * np.delete(counts, [30, 31]).mean()


def test_sample_trace_scenario_replays_it_at_a_load() -> None:
    scenario = load_scenario("sample-trace")
    assert scenario.workload.trace is not None
    assert scenario.load == pytest.approx(0.8)
    assert scenario.servers[0] == Server(cores=2)


@pytest.mark.parametrize("count", [1, 4, 17])
def test_the_name_that_a_default_scenario_shows_is_known(count: int) -> None:
    assert load_scenario(default_scenario(count).name) == default_scenario(count)


@pytest.mark.parametrize("name", ["default-0", "default-", "default-04", "default-x"])
def test_names_that_only_look_like_a_default_scenario(name: str) -> None:
    with pytest.raises(UnknownNameError):
        load_scenario(name)
