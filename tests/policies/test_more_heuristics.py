"""Heuristics of production balancers and of the literature, against numbers worked out by hand or in closed form."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from lbgym.errors import PolicyError, UnknownNameError
from lbgym.features.columns import column_index
from lbgym.policies import (
    HEURISTICS,
    AIMDWeights,
    C3Weights,
    FieldWeights,
    Gradient2Weights,
    HotColdWeights,
    IdleQueueWeights,
    KnapsackWeights,
    LatencyWeights,
    NeverQueueWeights,
    OrcaWeights,
    PeakEwmaWeights,
    PIDCPUWeights,
    PIDWeights,
    SlowStartWeights,
    StaticWeights,
    WeightPolicy,
    heuristic,
    make_weight_policy,
)
from lbgym.policies.heuristics.knapsack import fitted_lines, grid_weights
from lbgym.scenarios import Scenario, Server, Workload, load_scenario
from lbgym.simulator import Simulation

COLUMNS = {name: column_index(name) for name in ("n_flow_on", "fct_mean_decay", "cpu_usage", "busy_workers")}


def step(policy: WeightPolicy, *, active: list[bool] | None = None, **columns: list[float]) -> np.ndarray:
    """Weights after a step that shows these columns; the rest is 0."""
    n = len(next(iter(columns.values())))
    table = np.zeros((n, 14))
    for name, values in columns.items():
        table[:, COLUMNS[name]] = values
    return policy.weights(table, np.ones(n, dtype=bool) if active is None else np.array(active))


def test_the_table_says_what_a_heuristic_needs() -> None:
    scenario = load_scenario("uniform")
    for name, entry in HEURISTICS.items():
        policy = entry.make(scenario, 0)
        sets = policy.uses_ground_truth, policy.sets_background, policy.sets_tables
        assert sets == (entry.ground_truth, entry.background, entry.tables), name
        assert entry.description and entry.source
        if entry.configured:
            with pytest.raises(PolicyError, match="must know the cores"):
                make_weight_policy(name, None)
        else:
            make_weight_policy(name, None, seed=0)


def test_peak_ewma_follows_peaks_at_once_and_forgets_them_slowly() -> None:
    policy, kept = PeakEwmaWeights(decay=10.0, step_interval=0.25), math.exp(-0.025)
    # A server with a steady FCT of 0.2 s beside one with a peak.
    step(policy, fct_mean_decay=[0.2, 0.1])
    up = step(policy, fct_mean_decay=[0.2000001, 0.4])
    assert up[0] / up[1] == pytest.approx(0.4 / 0.2, rel=1e-5)
    down = step(policy, fct_mean_decay=[0.2000002, 0.1])
    average = 0.4 * kept + 0.1 * (1 - kept)
    assert down[0] / down[1] == pytest.approx(average / 0.2, rel=1e-5)
    # No flow comes back from the second server: its average falls as with samples of 0.
    for k in range(1, 5):
        alone = step(policy, fct_mean_decay=[0.2000002 + k * 1e-7, 0.1])
        assert alone[0] / alone[1] == pytest.approx(average * kept**k / 0.2, rel=1e-4)


def test_peak_ewma_gives_an_unknown_server_the_mean_weight() -> None:
    weights = step(PeakEwmaWeights(), fct_mean_decay=[0.1, 0.3, 0.0])
    assert weights == pytest.approx([1.5, 0.5, 1.0])


def test_aimd_adds_below_the_target_and_multiplies_above() -> None:
    policy = AIMDWeights(increase=0.05, decrease=0.7, tolerance=1.2, period=0.25)
    # The median is 0.1, the target 0.12.
    weights = step(policy, fct_mean_decay=[0.1, 0.12, 0.121, 0.09, 0.05])
    raw = np.array([1.05, 1.05, 0.7, 1.05, 1.05])
    assert weights == pytest.approx(raw / raw.mean())
    # No news: nothing moves. News of the second server alone: it moves alone.
    assert step(policy, fct_mean_decay=[0.1, 0.12, 0.121, 0.09, 0.05]) == pytest.approx(weights)
    moved = step(policy, fct_mean_decay=[0.1, 0.2, 0.121, 0.09, 0.05])
    raw = weights * [1, 0.7, 1, 1, 1]
    assert moved == pytest.approx(raw / raw.mean())


def test_aimd_moves_once_a_period() -> None:
    policy = AIMDWeights(period=1.0, step_interval=0.25)
    seen = [step(policy, fct_mean_decay=[0.1 + k * 1e-9, 0.2]) for k in range(8)]
    assert [not np.array_equal(seen[k], seen[k - 1]) for k in range(1, 8)] == [k in (3, 7) for k in range(1, 8)]


def test_aimd_medians_are_numpys() -> None:
    from lbgym.policies.heuristics.feedback import _median

    rng = np.random.default_rng(0)
    values, known = rng.random((50, 7)), rng.random((50, 7)) < 0.6
    expected = [np.median(v[k]) if k.any() else 0.0 for v, k in zip(values, known, strict=True)]
    assert _median(values, known)[:, 0] == pytest.approx(expected)


def test_gradient2_grows_while_the_latency_stands_and_shrinks_when_it_rises() -> None:
    policy = Gradient2Weights(tolerance=1.0, queue=4.0, initial=20.0, minimum=20.0, maximum=200.0)
    # Constant latency, g = 1: the limit grows by 0.2 * 4 a sample where enough flows are open; the other one stays.
    for k in range(3):
        weights = step(policy, fct_mean_decay=[0.1 + k * 1e-12, 0.1 + k * 1e-12], n_flow_on=[15.0, 1.0])
    assert weights[0] / weights[1] == pytest.approx((20 + 3 * 0.8) / 20)
    # The latency triples. The long-term mean of four samples is 0.15; g = 0.5, the bound.
    weights = step(policy, fct_mean_decay=[0.3, 0.1], n_flow_on=[15.0, 1.0])
    assert weights[0] / weights[1] == pytest.approx((0.8 * 22.4 + 0.2 * (22.4 * 0.5 + 4)) / 20)


def test_gradient2_lowers_a_long_term_mean_that_is_twice_the_present() -> None:
    policy = Gradient2Weights(tolerance=1.0)
    for _ in range(2):
        step(policy, fct_mean_decay=[1.0, 1.0], n_flow_on=[9.0, 9.0])
    step(policy, fct_mean_decay=[0.1, 1.0], n_flow_on=[9.0, 9.0])
    # The first sample is the only other one: (1 + 0.1) / 2 = 0.55 > 0.2.
    assert policy._long.tolist() == pytest.approx([0.95 * 0.55, 1.0])


def test_pid_is_the_law() -> None:
    policy = PIDWeights(proportional=0.4, integral=0.1, derivative=0.02, step_interval=0.25)
    # Relative FCTs 0.5 and 1.5, errors 0.5 and -0.5; the derivative needs a step before.
    weights = step(policy, fct_mean_decay=[0.1, 0.3])
    push = 0.25 * (0.4 * 0.5 + 0.1 * 0.5 * 0.25)
    assert weights == pytest.approx([1 + push, 1 - push])
    # Relative FCTs 0.75 and 1.25.
    moved = step(policy, fct_mean_decay=[0.15, 0.25])
    push += 0.25 * (0.4 * 0.25 + 0.1 * (0.5 + 0.25) * 0.25 + 0.02 * (0.25 - 0.5) / 0.25)
    assert moved == pytest.approx([1 + push, 1 - push])


def test_pid_integral_does_not_wind_up() -> None:
    policy = PIDWeights(proportional=0.0, integral=1.0, derivative=0.0, windup=1.0)
    for _ in range(100):
        step(policy, fct_mean_decay=[0.1, 0.3])
    # Held at 1, it is used up by errors of the other sign within 1 / (0.5 * 0.25) = 8 steps.
    before = step(policy, fct_mean_decay=[0.3, 0.1])
    for _ in range(9):
        after = step(policy, fct_mean_decay=[0.3, 0.1])
    assert after[0] < before[0]


def test_pid_on_cpu_equalises_the_utilization_of_the_simulated_servers() -> None:
    scenario = Scenario(
        servers=(Server(cores=2, speed=0.5), Server(cores=2), Server(cores=2, speed=2.0)),
        workload=Workload(load=0.7),
        dispatch="wcmp",
    )
    policy, simulation = PIDCPUWeights(), Simulation(scenario)
    snapshot = simulation.reset([3])
    logs, use = [], []
    for k in range(2400):
        assert snapshot.ground_truth is not None
        features = np.concatenate([snapshot.stats[0, 0], snapshot.ground_truth[0]], axis=-1)
        weights = policy.weights(features, snapshot.active[0])
        snapshot = simulation.step(weights[None, None], 0.25)
        if k >= 800:
            logs.append(np.log(weights))
            use.append(features[:, COLUMNS["cpu_usage"]])
    assert np.mean(use, axis=0) == pytest.approx([0.7] * 3, abs=0.08)
    assert np.exp(np.mean(logs, axis=0)) == pytest.approx([3 / 7, 6 / 7, 12 / 7], rel=0.15)


def test_orca_finds_the_capacity_from_the_first_report_on() -> None:
    capacity, rate = np.array([1.0, 2.0, 4.0]), 0.9
    policy, weights = OrcaWeights(blackout=0.0, period=0.25), np.ones(3)
    # The utilization of a server is its share of the arrivals over its capacity.
    for _ in range(3):
        weights = step(policy, cpu_usage=list(rate * weights / capacity))
        assert weights == pytest.approx(capacity / capacity.mean())


def test_orca_waits_for_the_blackout_keeps_a_report_and_lets_it_expire() -> None:
    policy = OrcaWeights(period=1.0, blackout=2.0, expiration=3.0, step_interval=0.5)
    seen = [step(policy, cpu_usage=[0.2, 0.8]) for _ in range(7)]
    # The first report is at the second step, 1 s; the blackout ends 2 s later.
    assert [w.tolist() == [1.0, 1.0] for w in seen] == [True] * 5 + [False] * 2
    assert seen[-1] == pytest.approx([1.6, 0.4])
    # The last report is that of the sixth step; it lasts for 3 s, six steps.
    policy.reset()
    for _ in range(6):
        step(policy, cpu_usage=[0.2, 0.8])
    later = [step(policy, cpu_usage=[0.0, 0.0]) for _ in range(8)]
    assert [w.tolist() == [1.0, 1.0] for w in later] == [False] * 6 + [True] * 2


def test_grid_weights_are_the_best_of_all_on_the_grid() -> None:
    rng = np.random.default_rng(5)
    for _ in range(20):
        base, slope, levels = rng.random(3), rng.random(3) * rng.integers(0, 2, 3), 4

        def cost(w: np.ndarray, base: np.ndarray = base, slope: np.ndarray = slope) -> float:
            return float((w * (base + slope * w)).sum())

        every = (np.array(w) / levels for w in itertools.product(range(1, 40), repeat=3) if sum(w) == 3 * levels)
        best = min(cost(w) for w in every)
        found = grid_weights(base, slope, levels)
        assert found.sum() == pytest.approx(3) and cost(found) == pytest.approx(best)


def test_fitted_lines_are_least_squares() -> None:
    rng = np.random.default_rng(2)
    w = rng.uniform(0.5, 1.5, (30, 2))
    latency = np.array([0.1, 0.3]) + np.array([0.2, 0.05]) * w + rng.normal(0, 0.001, w.shape)
    sums = np.array([np.full(2, 30.0), w.sum(0), (w**2).sum(0), latency.sum(0), (w * latency).sum(0)])
    base, slope = fitted_lines(sums)
    for j in range(2):
        assert (slope[j], base[j]) == pytest.approx(tuple(np.polyfit(w[:, j], latency[:, j], 1)))
    # A line that falls is flat, one that starts below 0 goes through the origin.
    falling = np.array([[2.0], [3.0], [5.0], [3.0], [4.0]])  # (1, 2), (2, 1)
    assert [x.tolist() for x in fitted_lines(falling)] == [[1.5], [0.0]]
    steep = np.array([[2.0], [3.0], [5.0], [3.0], [6.0]])  # (1, 0), (2, 3)
    assert [x.tolist() for x in fitted_lines(steep)] == [[0.0], [1.2]]


def test_knapsack_finds_the_weights_that_equalise_the_marginal_latency() -> None:
    base, slope = np.array([0.1, 0.1, 0.3, 0.2]), np.array([0.1, 0.4, 0.1, 0.2])
    policy = KnapsackWeights(levels=100, period=0.25, caution=0.0)
    weights = np.ones(4)
    for k in range(200):
        weights = step(policy, fct_mean_decay=list(base + slope * weights + 1e-9 * k))
    # a + 2 b w is the same for all, and the weights have a mean of 1.
    price = (4 + (base / (2 * slope)).sum()) / (1 / (2 * slope)).sum()
    best = (price - base) / (2 * slope)
    assert policy._chosen == pytest.approx(best, abs=0.02)


def test_slow_start_is_envoys_law() -> None:
    policy = SlowStartWeights(
        StaticWeights([1.0, 4.0]), window=10.0, aggression=2.0, least_share=0.35, step_interval=1.0
    )
    quiet = {"n_flow_on": [0.0, 0.0]}
    assert step(policy, **quiet).tolist() == [1.0, 4.0]
    step(policy, **quiet, active=[True, False])
    seen = [step(policy, **quiet)[1] / 4 for _ in range(12)]
    # At t = 0 it counts as 1 s: sqrt(1 / 10) = 0.316 is below the least share.
    expected = [max(0.35, math.sqrt(max(t, 1) / 10)) for t in range(10)] + [1.0, 1.0]
    assert seen == pytest.approx(expected)


def test_slow_start_wraps_any_heuristic() -> None:
    name, entry = heuristic("Slow_Start+Latency")
    assert name == "slow-start+latency" and not entry.configured
    policy = make_weight_policy(name, None)
    assert isinstance(policy, SlowStartWeights) and isinstance(policy.policy, LatencyWeights)
    assert make_weight_policy("slow-start+orca", None).uses_ground_truth
    twin = policy.copy()
    assert isinstance(twin, SlowStartWeights) and twin.policy is not policy.policy
    with pytest.raises(UnknownNameError, match="Did you mean 'latency'"):
        heuristic("slow-start+latenzy")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PeakEwmaWeights(decay=0), "decay must be"),
        (lambda: AIMDWeights(decrease=1.5), "decrease must be"),
        (lambda: Gradient2Weights(initial=300), "initial must be"),
        (lambda: PIDWeights(proportional=-1), "proportional must be"),
        (lambda: OrcaWeights(period=math.nan), "period must be"),
        (lambda: KnapsackWeights(levels=0), "levels must be"),
        (lambda: SlowStartWeights(StaticWeights([1.0]), aggression=0), "aggression must be"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(make, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        make()


def choice(tables: np.ndarray, flows: list[int]) -> list[int]:
    """Servers of the least score at these open flows."""
    scores = np.array([tables[j, q] for j, q in enumerate(flows)])
    return np.flatnonzero(scores == scores.min()).tolist()


def tables_of(policy: WeightPolicy, **columns: list[float]) -> np.ndarray:
    step(policy, **columns)
    assert policy.tables is not None and (policy.tables >= 0).all()
    return policy.tables


def test_never_queue_takes_an_idle_server_else_the_shortest_expected_delay() -> None:
    tables = tables_of(NeverQueueWeights([1.0, 2.0, 4.0]), n_flow_on=[0.0, 0.0, 0.0])
    assert choice(tables, [0, 0, 3]) == [0, 1]
    # The third is less delayed than the first, which is idle.
    assert choice(tables, [0, 1, 1]) == [0]
    # (q + 1) / w: 2, 2, 1.75
    assert choice(tables, [1, 3, 6]) == [2]
    assert choice(tables, [1, 3, 7]) == [0, 1, 2]


def test_the_idle_queue_takes_an_idle_server_else_any() -> None:
    tables = tables_of(IdleQueueWeights(), n_flow_on=[0.0, 0.0, 0.0])
    assert choice(tables, [0, 5, 0]) == [0, 2]
    assert choice(tables, [1, 5, 60]) == [0, 1, 2]


def test_hot_and_cold_is_prequals_order() -> None:
    fct, flows = [0.3, 0.1, 0.2, 0.0], [1.0, 2.0, 3.0, 9.0]
    # Two of four servers at most have 2 flows: servers with more are hot.
    tables = tables_of(HotColdWeights(quantile=0.5), fct_mean_decay=fct, n_flow_on=flows)
    assert choice(tables, [1, 2, 3, 9]) == [1]
    assert choice(tables, [1, 3, 2, 9]) == [2]
    # The unknown one counts with the mean latency, 0.2.
    assert choice(tables, [1, 3, 3, 2]) == [3]
    # All hot: the fewest flows.
    assert choice(tables, [5, 4, 3, 9]) == [2]
    # A quantile of 0 looks at the flows alone, but for those with as few as the least.
    tables = tables_of(HotColdWeights(quantile=0.0), fct_mean_decay=fct, n_flow_on=flows)
    assert choice(tables, [2, 3, 4, 9]) == [0]


def test_quantiles_are_of_the_servers_that_are_active() -> None:
    from lbgym.policies.heuristics.tables import _quantile

    rng = np.random.default_rng(0)
    values, known = rng.integers(0, 9, (50, 7)).astype(float), rng.random((50, 7)) < 0.6
    for share in (0.0, 0.3, 0.84, 1.0):
        expected = [
            np.quantile(v[k], share, method="inverted_cdf") if k.any() else 0.0
            for v, k in zip(values, known, strict=True)
        ]
        assert _quantile(values, known, share)[:, 0] == pytest.approx(expected)


def test_c3_is_the_cubic_rank() -> None:
    policy = C3Weights([1.0, 2.0], num_balancers=2, smoothing=0.5)
    # 2 * 2 flows on a core: a service time of 0.4 / 4; 2 flows on two cores: 0.1.
    step(policy, fct_mean_decay=[0.4, 0.1], n_flow_on=[2.0, 1.0])
    tables = tables_of(policy, fct_mean_decay=[0.2, 0.1], n_flow_on=[1.0, 0.0])
    # News of the first alone: R = (0.4 + 0.2) / 2, S = (0.1 + 0.2 / 2) / 2.
    # Q = ((0 + 4) / 2 + 2) / 2 and ((0 + 2) / 2) / 2.
    q = np.arange(4)
    assert tables[0, :4] == pytest.approx(0.3 - 0.1 + 0.1 * (1 + 2 * q + 2.0) ** 3)
    assert tables[1, :4] == pytest.approx(0.1 - 0.1 + 0.1 * (1 + 2 * q + 0.5) ** 3)


def test_the_field_is_what_the_others_hold_by_symmetry() -> None:
    policy = FieldWeights(StaticWeights([1.0, 2.0]), 3, time_constant=1.0, step_interval=0.5)
    kept = math.exp(-0.5)
    assert step(policy, n_flow_on=[4.0, 2.0]).tolist() == [1.0, 2.0]
    assert policy.background == pytest.approx(2 * (1 - kept) * np.array([4.0, 2.0]))
    for _ in range(60):
        step(policy, n_flow_on=[4.0, 2.0])
    assert policy.background == pytest.approx([8.0, 4.0])
    alone = FieldWeights(StaticWeights([1.0, 2.0]), 1)
    step(alone, n_flow_on=[4.0, 2.0])
    assert alone.background == pytest.approx([0.0, 0.0])
    name, entry = heuristic("field+core-latency")
    assert name == "field+core-latency" and entry.background
    with pytest.raises(PolicyError, match="slow-start is for policies that set weights, and c3 sets tables"):
        heuristic("slow-start+c3")
    with pytest.raises(PolicyError, match="and field sets background loads"):
        heuristic("field+field")


def test_latency_with_cores_is_cores_over_fct() -> None:
    plain, cores = LatencyWeights(), LatencyWeights(cores=[1.0, 4.0])
    for k in range(40):
        shown = {"fct_mean_decay": [0.1 + 1e-9 * k, 0.2 + 1e-9 * k]}
        one, other = step(plain, **shown), step(cores, **shown)
    assert other == pytest.approx(one * [1.0, 4.0])


def test_what_is_more_than_weights_needs_a_data_plane_that_takes_it() -> None:
    from lbgym import LoadBalanceEnv
    from lbgym.policies import make_agent, make_policy

    scenario = load_scenario("uniform")
    with pytest.raises(PolicyError, match="sets tables of scores, which the data plane does not take"):
        make_agent("c3", scenario=scenario).fit(4, tables=False)
    with pytest.raises(PolicyError, match="sets background loads, but the data plane takes weights only"):
        make_agent("field", scenario=scenario).fit(4, index=False)
    env = LoadBalanceEnv(num_servers=4)
    for name in ("c3", "field"):
        with pytest.raises(PolicyError, match="which a heuristic cannot in an environment"):
            make_policy(name, env)
