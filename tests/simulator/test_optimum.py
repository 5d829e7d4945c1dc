"""Dispatch rules beside the optimum, and Whittle's index beside its definition."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks import optimum
from lbgym.simulator import Simulation


def test_one_server_is_the_queue_of_the_textbook() -> None:
    """M/M/1: load / (1 - load) flows; M/M/2: 2 load / (1 - load^2)."""
    for cores, expected in ((1, 0.7 / 0.3), (2, 2 * 0.7 / (1 - 0.49))):
        process = optimum.Process((cores,), (1.5,), 0.7, 120)
        held, _ = process.evaluate(process.routing(process.scores(lambda j, n: n)))
        assert held == pytest.approx(expected, rel=1e-9)


def test_two_equal_servers_want_the_shortest_queue() -> None:
    """Winston, 1977."""
    process = optimum.Process((1, 1), (1.0, 1.0), 0.7, 40)
    shortest = process.routing(process.scores(lambda j, n: n))
    least, _ = process.optimum(process.routing(process.scores(lambda j, n: n * (1 + j))))
    assert process.evaluate(shortest)[0] == pytest.approx(least, rel=1e-9)


@pytest.mark.parametrize("load", [0.5, 0.8])
@pytest.mark.parametrize("cluster", [((4, 4), (0.4, 1.6)), ((1, 8), (2.0, 0.5)), ((1, 1), (1.0, 10.0))])
def test_whittle_is_close_to_the_optimum(cluster: tuple[tuple[int, ...], tuple[float, ...]], load: float) -> None:
    case, _ = optimum.solve(*cluster, load, 40)
    assert all(gap > -1e-9 for gap in case.gaps.values())
    assert case.gaps["whittle"] < 0.03
    assert case.gaps["whittle"] < case.gaps["lsq"] / 10


def test_an_optimal_table_in_the_simulator_has_the_optimums_mean_fct() -> None:
    case, best = optimum.solve((4, 1), (0.5, 2.0), 0.8, 40)
    exact = case.optimum / (0.8 * 4.0) * optimum.MEAN
    measured, error = optimum.simulate_table(case, best, 40, 16, 6_000)
    assert error < 0.03 * exact
    assert abs(measured - exact) < 4 * error


@pytest.mark.parametrize("weights", [[2.0, 2.0, 3.0], [1.0, 1.0, 1.0], [40.0, 4.0, 0.0]])
@pytest.mark.parametrize("background", [[0.0, 0.0, 0.0], [3.0, 0.0, 1.0]])
def test_the_rule_is_its_table(weights: list[float], background: list[float]) -> None:
    cores = (4, 1, 8)
    total = sum(weights)

    def places(rule: str, **action: NDArray[np.float64]) -> NDArray[np.int64]:
        scenario = optimum.scenario_of(cores, (0.7, 1.9, 0.31), 0.95, rule)
        sim = Simulation(scenario, record_flows=True)
        sim.reset([2])
        sim.step(np.array([[weights]]), 60.0, background=np.array([[background]]), **action)
        flows = sim.take_flows()
        servers: NDArray[np.int64] = flows["server"][np.argsort(flows["flow_id"])]
        return servers

    tables = np.full((1, 1, 3, 56), 1e9)
    for j, (c, w) in enumerate(zip(cores, weights, strict=True)):
        if w > 0.0:
            # From 48 flows beyond the cores on it is continued by its last difference.
            own = optimum.whittle(c, w / c, min(0.8 * total, 1.5 * w), np.arange(c + 48.0))
            more = own[-1] + (own[-1] - own[-2]) * np.arange(1, 56 - len(own) + 1)
            tables[0, 0, j] = np.concatenate([own, more])
    np.testing.assert_array_equal(places("whittle"), places("table", tables=tables))


def test_scales_of_weights_do_not_matter() -> None:
    runs = []
    for scale in (1.0, 1024.0):
        sim = Simulation(optimum.scenario_of((4, 1, 8), (0.7, 1.9, 0.31), 0.9, "whittle"), record_flows=True)
        sim.reset([2])
        sim.step(scale * np.array([[[3.0, 2.0, 2.5]]]), 30.0)
        runs.append(sim.take_flows()["server"].tobytes())
    assert runs[0] == runs[1]


def test_a_server_of_very_many_cores() -> None:
    """Weights of the chain beyond what a float64 can hold."""
    sim = Simulation(optimum.scenario_of((1500, 700), (1.0, 1.3), 0.97, "whittle"), reservoirs=False)
    sim.reset([2])
    snapshot = sim.step(np.array([[[1500.0, 910.0]]]), 2.0)
    assert np.isfinite(sim._state.bf).all()
    assert (snapshot.started > 1000).all()
