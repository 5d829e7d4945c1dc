"""What the reservoirs in the kernel hold: FCTs of ended flows, and ages of flows in proportion to service received."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from lbgym.features import FEATURE_NAMES, ReservoirSampler
from lbgym.scenarios import Deterministic, Exponential, Sampling, Scenario, Server, Workload
from lbgym.simulator import Simulation

from .running import trace_scenario

FCT = slice(1, 6)
DURATION = slice(6, 11)


def statistic(name: str) -> int:
    return FEATURE_NAMES.index(name)


def test_fct_features_are_those_of_a_python_reservoir():
    """The same samples, offered in order to the Python class while there is room for all of them."""
    scenario = Scenario(
        name="reservoir",
        servers=(Server(), Server(speed=2.0), Server(workers=1, backlog=1)),
        workload=Workload(load=0.9),
        balancers=2,
        sampling=Sampling(capacity=4000),
        reject_timeout=5.0,
    )
    sim = Simulation(scenario, record_flows=True)
    sim.reset([1])
    samplers = [[ReservoirSampler(capacity=4000) for _ in range(3)] for _ in range(2)]
    for _ in range(20):
        snapshot = sim.step(None, 2.0)
        flows = sim.take_flows()
        ended = flows["arrival"] + np.where(flows["status"] == 0, flows["fct"], 0.0)
        for i in np.argsort(ended, kind="stable"):
            samplers[flows["balancer"][i]][flows["server"][i]].add(flows["fct"][i], ended[i])
        for b in range(2):
            for j in range(3):
                expected = samplers[b][j].get_feature_vector()
                np.testing.assert_allclose(snapshot.stats[0, b, j, FCT], expected, rtol=3e-7)
    assert all(len(sampler) > 20 for row in samplers for sampler in row)


def test_a_full_reservoir_forgets():
    """After 10,000 quick flows nothing is left of the slow ones before them."""
    times = np.concatenate([np.arange(50) * 20.0, 1000.0 + np.arange(10_000) * 0.1])
    demands = np.concatenate([np.full(50, 10.0), np.full(10_000, 0.05)])
    for algorithm in ("overwrite", "uniform"):
        scenario = trace_scenario(times, demands, sampling=Sampling(capacity=50, algorithm=algorithm))
        sim = Simulation(scenario)
        sim.reset([1])
        assert sim.step(None, 999.0).stats[0, 0, 0, statistic("fct_mean")] == pytest.approx(10.0)
        mean = sim.step(None, 1500.0).stats[0, 0, 0, statistic("fct_mean")]
        if algorithm == "overwrite":
            assert mean == pytest.approx(0.05)
        else:
            # Uniform over all history: one flow in 201 was slow.
            assert mean < 1.5


def test_features_rest_while_nothing_happens():
    scenario = trace_scenario(np.arange(200) * 0.5, np.full(200, 0.4))
    sim = Simulation(scenario)
    sim.reset([1])
    last = sim.step(None, 200.0).stats
    assert last[..., 1:].all(axis=-1).any() or last[..., 1:].any()
    for gap in (0.25, 1e3, 1e6, 1e9):
        np.testing.assert_array_equal(sim.step(None, gap).stats, last)


def duration_features(scenario: Scenario, duration: float, seed: int = 1) -> dict[str, float]:
    sim = Simulation(scenario)
    sim.reset([seed])
    row = sim.step(None, duration).stats[0, 0, 0]
    return dict(zip(FEATURE_NAMES, row.tolist(), strict=True))


ALL = Sampling(capacity=32_767, packets_per_flow=5.0, decay=1.0)


def test_ages_of_flows_served_alone_are_uniform():
    """One flow at a time, equal demands d: a packet is anywhere in its service."""
    d, flows = 0.5, 6000
    scenario = trace_scenario(np.arange(flows) * 1.0, np.full(flows, d), sampling=ALL)
    features = duration_features(scenario, flows)
    assert features["duration_mean"] == pytest.approx(d / 2, rel=0.03)
    assert features["duration_p90"] == pytest.approx(0.9 * d, rel=0.02)
    assert features["duration_std"] == pytest.approx(d / np.sqrt(12), rel=0.03)
    assert features["duration_mean_decay"] == pytest.approx(d / 2, rel=0.03)


def test_larger_flows_are_sampled_more_often():
    """Alone in service, age seen by a packet: E[S^2] / (2 E[S]), the residual-life law."""
    rng = np.random.default_rng(1)
    flows = 6000
    demands = rng.exponential(scale=0.2, size=flows)
    scenario = trace_scenario(np.arange(flows) * 5.0, demands, sampling=ALL)
    features = duration_features(scenario, flows * 5.0)
    assert features["duration_mean"] == pytest.approx((demands**2).mean() / (2 * demands.mean()), rel=0.03)


def test_ages_grow_with_the_speed_of_the_server():
    """A server of speed 4 is sampled at the same points of a flow's service, so at a quarter of the ages."""
    flows = 6000
    slow, fast = (
        duration_features(
            trace_scenario(np.arange(flows) * 1.0, np.full(flows, 0.5), Server(speed=speed), sampling=ALL), flows
        )
        for speed in (1.0, 4.0)
    )
    assert fast["duration_mean"] == pytest.approx(slow["duration_mean"] / 4, rel=0.05)


def test_waiting_shows_in_the_first_packet():
    """Two flows at once on one worker: half of the packets belong to one that has waited d."""
    d, pairs = 0.5, 3000
    times = np.repeat(np.arange(pairs) * 2.0, 2)
    scenario = trace_scenario(times, np.full(2 * pairs, d), Server(workers=1), sampling=ALL)
    features = duration_features(scenario, pairs * 2.0)
    assert features["duration_mean"] == pytest.approx(d, rel=0.03)
    assert features["duration_p90"] == pytest.approx(0.9 * 2 * d, rel=0.02)


def test_ages_under_processor_sharing():
    """M/M/1-PS: packets fall at the rate of service, so their mean age is E[int age dS] / E[S].

    As E[T | S = x] = x / (1 - rho), the age after service s is s / (1 - rho) in the mean, which gives
    E[S^2] / (2 E[S] (1 - rho)).
    """
    load = 0.6
    scenario = Scenario(
        name="ages", servers=(Server(),), workload=Workload(load=load, demand=Exponential(mean=1.0)), sampling=ALL
    )
    means = [duration_features(scenario, 10_000.0, seed=seed)["duration_mean"] for seed in range(40)]
    error = np.std(means, ddof=1) / np.sqrt(len(means))
    assert abs(np.mean(means) - 1.0 / (1 - load)) < 4 * error
    assert error < 0.05


@pytest.mark.parametrize("packets", [0.5, 4.0, 12.0])
def test_packets_are_a_poisson_process(packets):
    """One flow of demand 1, many replicas, reservoirs of one place: the age at the last packet of the flow.

    No packet with probability exp(-packets); backwards from the end, the first packet is exponential.
    """
    replicas = 10_000
    scenario = trace_scenario([0.0], [1.0], sampling=Sampling(packets_per_flow=packets, capacity=1))
    sim = Simulation(scenario, replicas)
    sim.reset(list(range(replicas)))
    last = sim.step(None, 2.0).stats[:, 0, 0, statistic("duration_mean")]
    none = np.exp(-packets)
    assert stats.binomtest(int((last == 0).sum()), replicas, none).pvalue > 1e-4
    law = stats.truncexpon(packets, scale=1 / packets)
    assert stats.kstest(1.0 - last[last > 0].astype(float), law.cdf).pvalue > 1e-4


def test_no_packets_no_samples():
    workload = Workload(load=0.8, demand=Deterministic(mean=0.1))
    scenario = Scenario(name="silent", servers=(Server(),), workload=workload, sampling=Sampling(packets_per_flow=0.0))
    features = duration_features(scenario, 100.0)
    assert features["fct_mean"] > 0
    assert not any(value for name, value in features.items() if name.startswith("duration"))


def test_sampling_probability_applies_to_both_reservoirs():
    flows = 4000
    times, demands = np.arange(flows) * 1.0, np.full(flows, 0.5)
    rare = trace_scenario(times, demands, sampling=Sampling(probability=1e-9))
    features = duration_features(rare, flows)
    assert not any(value for name, value in features.items() if name != "n_flow_on")
