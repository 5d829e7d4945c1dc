"""Rules that count flows: one mechanism, whatever fills its table of scores."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from lbgym.errors import InvalidWeightsError, ScenarioError
from lbgym.scenarios import Event, Exponential, Lognormal, Scenario, Server, Workload
from lbgym.simulator import Simulation

from .running import by_id

#: No two servers alike, so that no two scores are ever equal and the flows' hashes decide nothing.
SERVERS = (
    Server(cores=1, speed=1.31),
    Server(cores=2, speed=0.77),
    Server(cores=4, speed=1.07),
    Server(cores=8, speed=0.43),
    Server(cores=3, speed=0.93),
)
WEIGHTS = np.array([1.31, 1.62, 4.11, 3.57, 2.83])
CORES = np.array([server.cores for server in SERVERS])


def scenario(balancers: int = 1, rule: str = "marginal", load: float = 0.85) -> Scenario:
    workload = Workload(load=load, demand=Lognormal(mean=0.1, cv=1.5))
    return Scenario(name="index", servers=SERVERS, workload=workload, balancers=balancers, dispatch=rule)


def placed(which: Scenario, seconds: float = 40.0, **action: NDArray) -> dict[str, NDArray]:
    """Flows in order of arrival, under an action of one balancer's shape for all of them."""
    sim = Simulation(which, record_flows=True)
    sim.reset([11])
    shape = (1, sim.num_balancers)
    keys = {"weights": WEIGHTS} | action
    sim.step(duration=seconds, **{name: np.broadcast_to(v, (*shape, *v.shape)).copy() for name, v in keys.items()})
    return by_id(sim.take_flows())


def delays_of_all(n: float, cores: float) -> float:
    """Total time of n equal flows on a server, in units of a flow's time alone."""
    return n * max(1.0, n / cores)


def marginal(q: float, j: int) -> float:
    """Increase of the total delay by one more flow, where a core has speed weight / cores."""
    return (delays_of_all(q + 1, CORES[j]) - delays_of_all(q, CORES[j])) * CORES[j] / WEIGHTS[j]


def plain_loop(flows: dict[str, NDArray], score: Callable[[int, int], float]) -> tuple[list[int], NDArray]:
    """The cluster once more, without heaps, virtual time or compilation: where each flow goes, and its FCT."""
    n = len(SERVERS)
    inside: list[list[list[float]]] = [[] for _ in range(n)]  # [what is left, flow]
    own = np.zeros((int(flows["balancer"].max()) + 1, n), int)
    chosen: list[int] = []
    fct = np.full(len(flows["arrival"]), np.nan)
    now = 0.0

    def pace(j: int) -> float:
        return SERVERS[j].speed * min(1.0, SERVERS[j].cores / len(inside[j]))

    for i, arrival in itertools.chain(enumerate(flows["arrival"]), [(-1, np.inf)]):
        while True:
            ends = [(now + min(inside[j])[0] / pace(j), j) for j in range(n) if inside[j]]
            end, server = min(ends, default=(np.inf, -1))
            until = min(end, arrival)
            if until == np.inf:
                return chosen, fct
            for j in range(n):
                for flow in inside[j]:
                    flow[0] -= (until - now) * pace(j)
            now = until
            if arrival < end:
                break
            done = min(inside[server])
            inside[server].remove(done)
            k = int(done[1])
            fct[k] = now - flows["arrival"][k]
            own[flows["balancer"][k], server] -= 1
        b = flows["balancer"][i]
        best = min(range(n), key=lambda j: score(own[b, j], j))
        chosen.append(best)
        inside[best].append([flows["demand"][i], i])
        own[b, best] += 1
    raise AssertionError


@pytest.mark.parametrize("background", [None, np.array([0.0, 0.4, 2.5, 7.7, 0.25])], ids=["own", "background"])
@pytest.mark.parametrize("balancers", [1, 6])
def test_marginal_is_that_of_a_plain_loop_flow_by_flow(balancers: int, background: NDArray | None) -> None:
    load = np.zeros(5) if background is None else background
    some = scenario(balancers).with_events([Event(time=40.0, kind="rate", value=0.0)])
    flows = placed(some, 1000.0, **({} if background is None else {"background": background}))
    assert len(flows["fct"]) > 3000
    np.testing.assert_array_equal(flows["flow_id"], np.arange(len(flows["fct"])))
    chosen, fct = plain_loop(flows, lambda q, j: marginal(q + load[j], j))
    np.testing.assert_array_equal(flows["server"], chosen)
    np.testing.assert_allclose(flows["fct"], fct, rtol=1e-9, atol=1e-12)


def column(rule: str, j: int, balancers: int, background: float, q: NDArray) -> NDArray:
    """The scores that a rule's formula gives, as its documentation has it."""
    if rule == "lsq":
        return q + background
    if rule == "sed":
        return (q + background + 1) / WEIGHTS[j]
    if rule == "sed_scaled":
        return (balancers * q + background + 1) / WEIGHTS[j]
    return np.array([marginal(k + background, j) for k in q])


@pytest.mark.parametrize("background", [np.zeros(5), np.array([0.0, 0.4, 2.5, 7.7, 0.25])], ids=["none", "some"])
@pytest.mark.parametrize("rule", ["lsq", "sed", "sed_scaled", "marginal"])
@pytest.mark.parametrize("balancers", [1, 6])
def test_every_rule_that_counts_is_a_table(rule: str, balancers: int, background: NDArray) -> None:
    formula = placed(scenario(balancers, rule), background=background)
    q = np.arange(60.0)
    tables = np.array([column(rule, j, balancers, background[j], q) for j in range(5)])
    table = placed(scenario(balancers, "table"), tables=tables)
    if rule == "lsq" and not background.any():
        # Equal scores: exact in either.
        np.testing.assert_array_equal(tables, np.broadcast_to(q, tables.shape))
    np.testing.assert_array_equal(formula["server"], table["server"])
    np.testing.assert_array_equal(formula["fct"], table["fct"])


def test_a_table_goes_on_by_its_last_difference() -> None:
    busy = scenario(rule="table", load=1.2)
    sim = Simulation(busy)
    sim.reset([11])
    sim.step(np.ones((1, 1, 5)), 40.0)
    assert sim.integrals()["open"].max() > 40
    # marginal is linear from q = cores on, and these numbers are exact in binary.
    weights = np.array([1.0, 2.0, 4.0, 8.0, 2.0])
    q = np.arange(300)
    full = np.where(q < CORES[:, None], CORES[:, None], 2 * q + 1) / weights[:, None]
    flows = [placed(busy, tables=tables) for tables in (full, full[:, :10])]
    np.testing.assert_array_equal(flows[0]["server"], flows[1]["server"])


def test_without_a_table_the_rule_table_is_lsq() -> None:
    np.testing.assert_array_equal(placed(scenario(2, "table"))["server"], placed(scenario(2, "lsq"))["server"])


def test_a_table_stays_until_another_or_a_reset() -> None:
    sim = Simulation(scenario(rule="table"), record_flows=True)
    sim.reset([1])
    weights = np.ones((1, 1, 5))
    only_two = np.broadcast_to(np.where(np.arange(5) == 2, 0.0, 1.0)[:, None], (1, 1, 5, 7)).copy()
    sim.step(weights, 1.0, tables=only_two)
    sim.step(weights, 1.0)
    # A narrower table is continued to the width of the first.
    only_one = np.broadcast_to(np.where(np.arange(5) == 1, 0.0, 1.0)[:, None], (1, 1, 5, 2)).copy()
    assert set(sim.take_flows()["server"]) == {2}
    sim.step(weights, 20.0, tables=only_one)
    later = sim.take_flows()
    assert set(later["server"][later["arrival"] > 2.0]) == {1}
    sim.reset([1])
    sim.step(weights, 20.0)
    assert set(sim.take_flows()["server"]) == set(range(5))


def test_a_background_load_goes_with_its_weights() -> None:
    sim = Simulation(scenario(2))
    sim.reset([1])
    load = np.arange(10.0).reshape(1, 2, 5)
    sim.step(np.ones((1, 2, 5)), 0.5, background=load)
    np.testing.assert_array_equal(sim.background_in_force(), load)
    sim.step(None, 0.5)
    np.testing.assert_array_equal(sim.background_in_force(), load)
    sim.step(np.ones((1, 2, 5)), 0.5, background=2 * load, delays=np.array([[0.1, 0.7]]))
    np.testing.assert_array_equal(sim.background_in_force(), np.stack([2 * load[:, 0], load[:, 1]], axis=1))
    sim.step(None, 0.5)
    np.testing.assert_array_equal(sim.background_in_force(), 2 * load)
    sim.step(np.ones((1, 2, 5)), 0.5)
    assert not sim.background_in_force().any()


@pytest.mark.parametrize(
    ("action", "said"),
    [
        ({"background": np.ones((1, 1, 4))}, "background loads must have shape"),
        ({"background": np.full((1, 1, 5), -0.5)}, "background loads must be finite and at least 0, got -0.5"),
        ({"tables": np.ones((1, 1, 5))}, "tables must have shape"),
        ({"tables": np.ones((1, 1, 5, 1))}, "at least 2 scores"),
        ({"tables": np.full((1, 1, 5, 3), np.nan)}, "tables must be finite"),
        ({"tables": np.arange(3.0, 0.0, -1.0) * np.ones((1, 1, 5, 1))}, "must not fall at their end"),
        ({"tables": np.ones((1, 1, 5, 3)), "delays": np.zeros((1, 1))}, "at once"),
    ],
)
def test_bad_actions_change_nothing(action: dict, said: str) -> None:
    runs = []
    for bad in (False, True):
        sim = Simulation(scenario(rule="table"), record_flows=True)
        sim.reset([3])
        sim.step(np.ones((1, 1, 5)), 2.0)
        if bad:
            with pytest.raises((InvalidWeightsError, ScenarioError), match=said):
                sim.step(np.full((1, 1, 5), 2.0), 2.0, **action)
        sim.step(np.ones((1, 1, 5)), 2.0)
        runs.append(sim.take_flows()["server"])
    np.testing.assert_array_equal(*runs)


def test_tables_need_the_rule_table() -> None:
    sim = Simulation(scenario(rule="sed"))
    sim.reset([3])
    with pytest.raises(ScenarioError, match="need the dispatch rule 'table', got 'sed'"):
        sim.step(np.ones((1, 1, 5)), 1.0, tables=np.ones((1, 1, 5, 3)))


def mean_fct(servers: tuple[Server, ...], rule: str, load: float) -> float:
    workload = Workload(load=load, demand=Exponential(mean=0.1))
    which = Scenario(name="means", servers=servers, workload=workload, dispatch=rule)
    sim = Simulation(which, 8, service=False, reservoirs=False)
    sim.reset(list(range(8)))
    weights = np.array([server.cores * server.speed for server in servers])
    sim.step(np.broadcast_to(weights, (8, 1, len(servers))), 100.0)
    return float(sim.integrals()["fct_sum"].sum()) / int(sim.observe().completed.sum())


def test_oracle_sed_is_no_bound() -> None:
    """A flow on an idle server of many cores runs on one of them: SED with true speeds loses to counting alone."""
    servers = tuple(Server(cores=4, speed=speed) for speed in np.linspace(0.4, 2.2, 8)) * 4
    means = {rule: mean_fct(servers, rule, 0.9) for rule in ("oracle_sed", "lsq", "oracle_marginal", "marginal")}
    assert means["lsq"] < means["oracle_sed"]
    assert means["oracle_marginal"] < 0.9 * means["oracle_sed"]
    # One balancer sees every flow, and these weights are the true speeds.
    assert means["marginal"] == pytest.approx(means["oracle_marginal"], rel=0.01)
