from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lbgym.errors import InvalidWeightsError, PolicyError, UnknownNameError
from lbgym.features.columns import column_index
from lbgym.policies import (
    AdaptiveWeights,
    LatencyWeights,
    LittlesLawWeights,
    RandomWeights,
    StaticWeights,
    UniformWeights,
    WeightPolicy,
    make_weight_policy,
    weight_policy_names,
)
from lbgym.scenarios import Scenario, Server, Workload, load_scenario
from lbgym.simulator import Simulation

N = 4
ON = column_index("n_flow_on")
FCT = column_index("fct_mean_decay")
BUSY = column_index("busy_workers")


def features(*, fct: list[float] | None = None, on: list[float] | None = None, busy: list[float] | None = None):
    table = np.zeros((N, 14))
    for column, values in ((FCT, fct), (ON, on), (BUSY, busy)):
        if values is not None:
            table[:, column] = values
    return table


ALL = np.ones(N, dtype=bool)


def settled(policy: WeightPolicy, *, fct: list[float], on: list[float] | None = None):
    """Weights once the same has been seen for so long, with news at every step, that it is believed."""
    policy.reset()
    for step in range(80):
        last = policy.weights(features(fct=[x * (1 + 1e-12 * (step % 2)) for x in fct], on=on), ALL)
    return last


def every_policy() -> list[WeightPolicy]:
    scenario = Scenario(servers=tuple(Server(cores=c) for c in (1, 2, 4, 8)), workload=Workload(load=0.5))
    return [make_weight_policy(name, scenario, seed=0) for name in weight_policy_names()]


@pytest.mark.parametrize("policy", every_policy(), ids=lambda p: type(p).__name__)
@given(
    steps=st.lists(
        st.tuples(
            arrays(np.float64, (N, 14), elements=st.floats(0, 1e9, allow_subnormal=False)),
            arrays(np.bool_, N),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_weights_are_finite_and_positive_whatever_is_seen(policy: WeightPolicy, steps) -> None:
    policy.reset()
    for table, active in steps:
        weights = policy.weights(table, active)
        assert weights.shape == (N,) and weights.dtype == np.float64
        assert np.isfinite(weights).all() and (weights > 0).all()


@pytest.mark.parametrize("name", [name for name in weight_policy_names() if name != "random"])
def test_leading_axes_are_policies_of_their_own(name: str) -> None:
    rng = np.random.default_rng(3)
    scenario = load_scenario("heterogeneous")
    n = scenario.num_servers
    batch = make_weight_policy(name, scenario)
    single = [make_weight_policy(name, scenario) for _ in range(3)]
    for _ in range(6):
        table = rng.gamma(1.0, 1.0, (3, n, 14))
        active = rng.random((3, n)) > 0.2
        expected = [policy.weights(table[i], active[i]) for i, policy in enumerate(single)]
        assert np.array_equal(batch.weights(table, active), expected)


@pytest.mark.parametrize("policy", every_policy(), ids=lambda p: type(p).__name__)
def test_wrong_shapes_are_refused(policy: WeightPolicy) -> None:
    with pytest.raises(PolicyError, match=r"features \[\.\.\., N, .*got shapes"):
        policy.weights(np.zeros((N, 5)), ALL)
    with pytest.raises(PolicyError, match="got shapes"):
        policy.weights(np.zeros((N, 14)), np.ones(N + 1, dtype=bool))


def test_static_weights() -> None:
    policy = StaticWeights([1.0, 2.0, 3.0, 4.0])
    first = policy.weights(features(), ALL)
    assert first.tolist() == [1.0, 2.0, 3.0, 4.0]
    first[:] = 7.0
    assert policy.weights(features(), ALL).tolist() == [1.0, 2.0, 3.0, 4.0]
    with pytest.raises(PolicyError, match="4 static weights do not fit 3 servers"):
        policy.weights(np.zeros((3, 11)), np.ones(3, dtype=bool))


@pytest.mark.parametrize("bad", [[], [1.0, 0.0], [1.0, -1.0], [1.0, np.nan], [1.0, np.inf], [[1.0]]])
def test_bad_static_weights_are_refused(bad) -> None:
    with pytest.raises(InvalidWeightsError, match="above 0"):
        StaticWeights(bad)


def test_cores_and_uniform_come_from_the_scenario() -> None:
    scenario = load_scenario("marllb-moderate")
    table, active = np.zeros((7, 11)), np.ones(7, dtype=bool)
    assert make_weight_policy("cores", scenario).weights(table, active).tolist() == [2, 2, 2, 2, 4, 4, 4]
    assert UniformWeights().weights(table, active).tolist() == [1] * 7


def test_random_weights_cover_their_range_and_follow_their_seed() -> None:
    policy = RandomWeights(0.5, 8.0, seed=5)
    drawn = np.array([policy.weights(features(), ALL) for _ in range(500)])
    assert drawn.min() >= 0.5 and drawn.max() <= 8.0
    # log-uniform: the geometric middle of the range splits the draws in half
    assert abs((drawn < 2.0).mean() - 0.5) < 4 * 0.5 / np.sqrt(drawn.size)
    again = RandomWeights(0.5, 8.0, seed=5)
    assert np.array_equal(drawn, [again.weights(features(), ALL) for _ in range(500)])
    with pytest.raises(InvalidWeightsError, match="0 < low <= high"):
        RandomWeights(2.0, 1.0)


def test_adaptive_weights_divide_by_the_busy_workers() -> None:
    policy = AdaptiveWeights([2.0, 2.0, 4.0, 4.0])
    assert policy.weights(features(busy=[0, 3, 0, 7]), ALL).tolist() == [2.0, 0.5, 4.0, 0.5]
    with pytest.raises(PolicyError, match=r"N, 14\]"):
        policy.weights(np.zeros((N, 11)), ALL)


def test_latency_weights_are_inverse_to_the_fct() -> None:
    weights = settled(LatencyWeights(), fct=[0.1, 0.2, 0.4, 0.4])
    assert weights / weights[0] == pytest.approx([1, 0.5, 0.25, 0.25])


def test_latency_weights_do_not_depend_on_the_unit_of_time() -> None:
    fct = np.array([0.1, 0.2, 0.4, 0.3])
    weights = [settled(LatencyWeights(), fct=list(unit * fct)) for unit in (1.0, 1000.0)]
    assert weights[0] == pytest.approx(weights[1])


@pytest.mark.parametrize("policy", [LatencyWeights(), LittlesLawWeights()])
def test_a_server_nobody_came_back_from_is_neutral(policy: WeightPolicy) -> None:
    weights = settled(policy, fct=[0.1, 0.3, 0.0, 0.2], on=[1, 1, 5, 1])
    assert weights[2] == pytest.approx(weights[[0, 1, 3]].mean())
    policy.reset()
    assert policy.weights(features(on=[3, 0, 1, 2]), ALL).tolist() == [1.0] * N


@pytest.mark.parametrize("policy", [LatencyWeights(smoothing=0.0, half_life=4), LittlesLawWeights(half_life=4)])
def test_a_weight_that_no_flow_confirms_returns_to_neutral(policy: WeightPolicy) -> None:
    fct = np.array([0.1, 0.1, 0.1, 5.0])
    first = settled(policy, fct=list(fct))
    assert first[3] < 0.5
    for step in range(1, 41):
        fct[:3] = 0.1 + 1e-6 * (step % 2)  # news from the others
        last = policy.weights(features(fct=list(fct)), ALL)
    assert last[3] == pytest.approx(1.0, abs=0.01)
    assert last[:3] == pytest.approx(first[:3], rel=0.01)
    assert np.array_equal(settled(policy, fct=[0.1, 0.1, 0.1, 5.0]), first)


@pytest.mark.parametrize("policy", [LatencyWeights(), LittlesLawWeights()])
def test_the_first_flows_are_not_believed_at_once(policy: WeightPolicy) -> None:
    fct, on = [0.01, 0.2, 0.2, 0.2], [0.0, 1.0, 1.0, 1.0]
    believed = settled(policy, fct=fct, on=on)
    policy.reset()
    distances = []
    for step in range(6):
        weights = policy.weights(features(fct=[x * (1 + 1e-12 * step) for x in fct], on=on), ALL)
        distances.append(np.abs(np.log(weights / believed)).max())
    assert (np.diff(distances) < 0).all() and distances[0] > 0.5 * np.abs(np.log(believed)).max()


def test_littles_law_gives_the_capacity_of_processor_sharing_servers_at_any_load() -> None:
    # n = rho / (1 - rho) and T = 1 / (C (1 - rho)): capacities 1, 2, 4, 8 at four loads
    capacity, load = np.array([1.0, 2.0, 4.0, 8.0]), np.array([0.1, 0.5, 0.9, 0.99])
    on, fct = load / (1 - load), 1 / (capacity * (1 - load))
    weights = settled(LittlesLawWeights(), on=list(on), fct=list(fct))
    assert weights / weights[0] == pytest.approx(capacity)
    # three balancers, each with a third of the flows open
    weights = settled(LittlesLawWeights(num_balancers=3), on=list(on / 3), fct=list(fct))
    assert weights / weights[0] == pytest.approx(capacity)


def test_littles_law_knows_that_idle_cores_are_capacity() -> None:
    cores = [1.0, 2.0, 4.0, 8.0]
    weights = settled(LittlesLawWeights(cores), fct=[0.1] * N, on=[0] * N)
    assert weights / weights[0] == pytest.approx(cores)


@pytest.mark.parametrize("rule", ["sed", "p2c_sed"])
def test_littles_law_finds_capacities_in_the_simulator(rule: str) -> None:
    servers = tuple(Server(cores=c, speed=s) for c, s in ((1, 1.0), (1, 3.0), (4, 0.5), (4, 2.0)))
    scenario = Scenario(servers=servers, workload=Workload(load=0.7), dispatch=rule)
    capacity = np.array([server.capacity for server in servers])
    policy = make_weight_policy("littles-law", scenario)
    simulation = Simulation(scenario)
    snapshot = simulation.reset([11])
    logs = []
    for step in range(1600):
        weights = policy.weights(snapshot.stats[0, 0], snapshot.active[0])
        snapshot = simulation.step(weights[None, None], 0.25)
        if step >= 400:
            logs.append(np.log(weights / weights.sum()))
    found = np.exp(np.mean(logs, axis=0))
    # equal weights would be wrong by a factor of 3.5
    assert found / found.sum() == pytest.approx(capacity / capacity.sum(), rel=0.5)


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match=r"'latenzy'.*Did you mean 'latency'.*littles-law"):
        make_weight_policy("latenzy", load_scenario("uniform"))
    assert isinstance(make_weight_policy("Littles_Law", load_scenario("uniform")), LittlesLawWeights)


@pytest.mark.parametrize("make", [lambda: LatencyWeights(smoothing=1.0), lambda: LittlesLawWeights(smoothing=-0.1)])
def test_bad_smoothing_is_refused(make) -> None:
    with pytest.raises(PolicyError, match="smoothing must be at least 0 and below 1"):
        make()
    with pytest.raises(PolicyError, match="num_balancers"):
        LittlesLawWeights(num_balancers=0)
    with pytest.raises(PolicyError, match="half_life"):
        LatencyWeights(half_life=0)
