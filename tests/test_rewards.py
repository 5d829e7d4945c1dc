"""Rewards against definitions written anew with NumPy and SciPy."""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lbgym.env.rewards import (
    EPSILON,
    FAIRNESS_REWARDS,
    REWARDS,
    SERVICE_REWARDS,
    Reward,
    fairness,
    make_reward,
    reward_table,
)
from lbgym.errors import InvalidRewardError, LbgymError, UnknownNameError
from lbgym.features import FEATURE_NAMES, GROUND_TRUTH_NAMES, SERVICE_NAMES
from lbgym.snapshot import IntervalStatistics, Snapshot

LOG0 = -math.log(EPSILON)


def make_snapshot(
    shape: tuple[int, ...] = (4,), seed: int = 0, *, active: Any = None, truth: bool = True, service: bool = True
) -> Snapshot:
    rng = np.random.default_rng(seed)
    zeros = np.zeros(shape, np.int64)
    active = rng.random(shape) < 0.8 if active is None else np.broadcast_to(np.asarray(active, bool), shape)
    return Snapshot(
        sequence_id=np.ones(shape[:-1], int),
        timestamp=np.ones(shape[:-1]),
        active=active,
        stats=rng.exponential(size=(*shape, len(FEATURE_NAMES))).astype(np.float32),
        ground_truth=rng.random((*shape, 3)).astype(np.float32) if truth else None,
        started=zeros,
        completed=zeros,
        rejected=zeros,
        failed=zeros,
        unrouted=np.zeros(shape[:-1], int),
        interval=IntervalStatistics(rng.random((*shape[:-1], len(SERVICE_NAMES)))) if service else None,
    )


def row(snapshot: Snapshot, i: int) -> Snapshot:
    """Replica i of a batched snapshot."""
    values = {f.name: getattr(snapshot, f.name) for f in dataclasses.fields(snapshot)}
    return Snapshot(**{name: None if v is None else v[i] for name, v in values.items()})


# The definitions, of the loads of active servers only, of which there is at least one, not all 0.
DEFINITIONS = {
    "jain": lambda x: x.sum() ** 2 / (len(x) * (x**2).sum()),
    "var": lambda x: -np.var(x),
    "var_exp": lambda x: np.exp(-np.var(x)),
    "var_log": lambda x: -np.log(np.var(x) + 1e-6),
    "max": lambda x: -x.max(),
    "max_exp": lambda x: np.exp(-x.max()),
    "max_log": lambda x: -np.log(x.max() + 1e-6),
    "min_max": lambda x: x.min() / x.max(),
    "product": lambda x: np.prod(x / x.max()),
    "product_raw": lambda x: np.prod(x) / (x.max() + 1e-6),
    "cv": lambda x: -scipy.stats.variation(x),
    "range": lambda x: -np.ptp(x),
    "gini": lambda x: -np.abs(x[:, None] - x[None, :]).mean() / (2 * x.mean()),
}

loads_and_masks = st.integers(1, 12).flatmap(
    lambda n: st.tuples(
        hnp.arrays(np.float64, n, elements=st.floats(0.0, 50.0).map(lambda v: v if v > 1e-3 else 0.0)),
        hnp.arrays(bool, n),
    )
)
# Anything a snapshot can hold: float32, zeros and denormals included.
any_loads = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=1, max_dims=3, max_side=9),
    elements=st.floats(0, float(np.finfo(np.float32).max), width=32),
)


def test_every_fairness_metric_has_a_definition_here() -> None:
    assert set(DEFINITIONS) == set(FAIRNESS_REWARDS)
    assert set(FAIRNESS_REWARDS) | set(SERVICE_REWARDS) == set(REWARDS)


@pytest.mark.parametrize("name", FAIRNESS_REWARDS)
@given(case=loads_and_masks)
def test_metric_is_its_definition_over_the_active_servers(name: str, case: tuple[np.ndarray, np.ndarray]) -> None:
    loads, active = case
    if not loads[active].any():
        return
    assert fairness(name, loads, active) == pytest.approx(DEFINITIONS[name](loads[active]), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", FAIRNESS_REWARDS)
@given(loads=any_loads, seed=st.integers(0, 1000))
def test_metrics_are_finite_and_raise_no_warning(name: str, loads: np.ndarray, seed: int) -> None:
    active = np.random.default_rng(seed).random(loads.shape) < 0.7
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isfinite(fairness(name, loads, active)).all()
        assert np.isfinite(fairness(name, loads)).all()
        snapshot = make_snapshot(loads.shape, active=active)
        snapshot.stats[..., 9] = loads
        assert np.isfinite(make_reward(name, "duration_mean_decay")(snapshot)).all()


@pytest.mark.parametrize("name", FAIRNESS_REWARDS)
@pytest.mark.parametrize("load", [0.0, 5e-324, 1e-310, 1e-45, 1e30, 1e200, np.finfo(float).max])
def test_metrics_are_finite_for_any_double(name: str, load: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for loads in ([load] * 40, [load, 0.0, 1.0], [load]):
            assert np.isfinite(fairness(name, loads))


@given(case=loads_and_masks, scale=st.sampled_from([1e-6, 0.5, 3.0, 1e6]), seed=st.integers(0, 100))
def test_jain_range_and_invariances(case: tuple[np.ndarray, np.ndarray], scale: float, seed: int) -> None:
    loads, active = case
    jain = float(fairness("jain", loads, active))
    n = active.sum()
    assert (1 / n if n else 1) - 1e-12 <= jain <= 1 + 1e-12
    order = np.random.default_rng(seed).permutation(len(loads))
    assert fairness("jain", loads[order], active[order]) == pytest.approx(jain, rel=1e-12)
    assert fairness("jain", loads * scale, active) == pytest.approx(jain, rel=1e-9)


@pytest.mark.parametrize("name", FAIRNESS_REWARDS)
@given(case=loads_and_masks, seed=st.integers(0, 100))
def test_the_order_of_servers_and_idle_places_do_not_matter(
    name: str, case: tuple[np.ndarray, np.ndarray], seed: int
) -> None:
    loads, active = case
    rng = np.random.default_rng(seed)
    expected = fairness(name, loads, active)
    order = rng.permutation(len(loads))
    assert fairness(name, loads[order], active[order]) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    more = np.append(loads, rng.random(3) * 100), np.append(active, [False] * 3)
    assert fairness(name, *more) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", [r.name for r in REWARDS.values() if r.scale == "none"])
@given(case=loads_and_masks)
def test_metrics_said_to_ignore_the_scale_do(name: str, case: tuple[np.ndarray, np.ndarray]) -> None:
    loads, active = case
    assert fairness(name, loads * 7, active) == pytest.approx(fairness(name, loads, active), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", [n for n in FAIRNESS_REWARDS if REWARDS[n].scale != "none"])
def test_metrics_said_to_mind_the_scale_do(name: str) -> None:
    loads = np.array([0.5, 1.5, 1.0])
    sign = 1 if REWARDS[name].scale.startswith("better") else -1
    assert sign * (fairness(name, 2 * loads) - fairness(name, loads)) > 0


CORNERS = {
    #               no server, one server of load 2, three zeros
    "jain": (1, 1, 1),
    "var": (0, 0, 0),
    "var_exp": (1, 1, 1),
    "var_log": (LOG0, LOG0, LOG0),
    "max": (0, -2, 0),
    "max_exp": (1, math.exp(-2), 1),
    "max_log": (LOG0, -math.log(2 + EPSILON), LOG0),
    "min_max": (1, 1, 1),
    "product": (1, 1, 1),
    "product_raw": (0, 2 / (2 + EPSILON), 0),
    "cv": (0, 0, 0),
    "range": (0, 0, 0),
    "gini": (0, 0, 0),
}


@pytest.mark.parametrize("name", FAIRNESS_REWARDS)
def test_corner_cases_are_what_the_table_says(name: str) -> None:
    empty, single, zeros = CORNERS[name]
    assert fairness(name, [3.0, 1.0], [False, False]) == pytest.approx(empty, abs=1e-12)
    assert fairness(name, [9.0, 2.0], [False, True]) == pytest.approx(single, abs=1e-9)
    assert fairness(name, [0.0, 0.0, 0.0]) == pytest.approx(zeros, abs=1e-12)

    def stated(text: str) -> float:
        known = {"l": 2.0, "k": 1.0, "exp": math.exp, "ln": math.log}
        return float(eval(text.replace("k l", "k * l"), {"__builtins__": {}}, known))

    info = REWARDS[name]
    assert stated(info.empty) == pytest.approx(empty, abs=5e-3)
    assert stated(info.single) == pytest.approx(single, abs=5e-3)
    assert stated(info.zeros) == pytest.approx(zeros, abs=5e-3)


def test_product_is_zero_and_not_tiny_with_an_idle_server() -> None:
    assert fairness("product", [0.0, 1.0]) == 0.0
    assert fairness("min_max", [0.0, 1.0]) == 0.0
    assert fairness("product_raw", [0.0, 1.0]) == 0.0


def test_rate_of_the_exponential_metrics() -> None:
    assert fairness("var_exp", [1.0, 3.0], k=0.5) == pytest.approx(math.exp(-0.5))
    assert fairness("max_exp", [1.0, 3.0], k=2) == pytest.approx(math.exp(-6))
    snapshot = make_snapshot(active=True)
    expected = fairness("max_exp", snapshot.stats[:, 0], k=0.1)
    assert make_reward("max_exp", "n_flow_on", k=0.1)(snapshot) == pytest.approx(expected)


@pytest.mark.parametrize("num_servers", [1, 4, 9, 150])
@pytest.mark.parametrize("name", REWARDS)
def test_a_batch_has_the_bits_of_its_rows(name: str, num_servers: int) -> None:
    reward = make_reward(name, "fct_p90")
    snapshot = make_snapshot((37, num_servers))
    batch = reward(snapshot)
    assert batch.shape == (37,) and batch.dtype == np.float64
    for i in range(37):
        single = reward(row(snapshot, i))
        assert np.ndim(single) == 0
        assert single == batch[i], i


def test_leading_axes_of_any_number() -> None:
    snapshot = make_snapshot((3, 2, 5))
    batch = make_reward({"jain": 1.0, "gini:n_flow_on": 1.0, "var": 1.0, "product": 2.0})(snapshot)
    assert batch.shape == (3, 2)
    inner = make_reward({"jain": 1.0, "gini:n_flow_on": 1.0, "var": 1.0, "product": 2.0})(row(snapshot, 1))
    np.testing.assert_array_equal(batch[1], inner)


def test_reward_field_selects_the_column() -> None:
    snapshot = make_snapshot(active=True)
    for column, name in enumerate(FEATURE_NAMES):
        assert make_reward("max", name)(snapshot) == -snapshot.stats[:, column].max()
    assert make_reward("max", "flow_duration_avg_decay")(snapshot) == make_reward("max", "duration_mean_decay")(
        snapshot
    )
    assert snapshot.ground_truth is not None
    for column, name in enumerate(GROUND_TRUTH_NAMES):
        assert make_reward("max", name)(snapshot) == -snapshot.ground_truth[:, column].max()


def test_the_default_is_jain_of_the_decayed_mean_duration() -> None:
    snapshot = make_snapshot(active=True)
    assert make_reward()(snapshot) == fairness("jain", snapshot.stats[:, 9])


def test_service_rewards() -> None:
    snapshot = make_snapshot()
    assert snapshot.interval is not None
    snapshot.interval.values[:] = [75, 25, 0.2, 0.1, 0.5, 0.9, 1.5, 12]
    expected = {"mean_fct": -0.2, "p99_fct": -0.9, "slowdown": -1.5, "rejected": -0.25, "open_flows": -12}
    assert set(expected) == set(SERVICE_REWARDS)
    for name, value in expected.items():
        assert make_reward(name)(snapshot) == pytest.approx(value)
    snapshot.interval.values[:] = 0
    for name in SERVICE_REWARDS:
        assert make_reward(name)(snapshot) == float(REWARDS[name].empty) == 0


def test_weighted_sum() -> None:
    snapshot = make_snapshot()
    total = make_reward({"jain": 1.0, "p99_fct": 0.1, "jain:n_flow_on": 0.5, "max:cpu_usage": -2}, "fct_mean")(snapshot)
    parts = (
        make_reward("jain", "fct_mean")(snapshot)
        + 0.1 * make_reward("p99_fct")(snapshot)
        + 0.5 * make_reward("jain", "n_flow_on")(snapshot)
        - 2 * make_reward("max", "cpu_usage")(snapshot)
    )
    assert total == pytest.approx(parts, rel=1e-12)
    assert make_reward("jain:n_flow_on")(snapshot) == make_reward("jain", "n_flow_on")(snapshot)


def test_what_a_reward_needs_and_a_clear_error_without() -> None:
    bare = make_snapshot(truth=False, service=False)
    plain = make_reward("jain")
    assert not plain.needs_ground_truth and not plain.needs_service
    assert np.isfinite(plain(bare))
    truth, service = make_reward("var", "cpu_usage"), make_reward("p99_fct")
    both = make_reward({"var:busy_workers": 1, "mean_fct": 1})
    assert truth.needs_ground_truth and service.needs_service and both.needs_service and both.needs_ground_truth
    with pytest.raises(InvalidRewardError, match=r"var:cpu_usage.*ground truth.*fct_mean_decay"):
        truth(bare)
    with pytest.raises(InvalidRewardError, match=r"p99_fct.*statistics of the flows.*jain"):
        service(bare)
    with pytest.raises(InvalidRewardError):
        both(bare)


def test_callables() -> None:
    single, batch = make_snapshot(), make_snapshot((6, 4))

    def busiest(snapshot: Snapshot) -> Any:
        return -snapshot.stats[..., 0].max(axis=-1)

    reward = make_reward(busiest)
    assert reward(single) == -single.stats[:, 0].max()
    np.testing.assert_array_equal(reward(batch), -batch.stats[..., 0].max(axis=-1))
    assert make_reward(lambda s: 3)(single) == 3.0
    ready = make_reward("var_exp", k=1e4)
    assert make_reward(ready) is ready


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda s: s.stats[:, 0], r"single number, got shape \(4,\)"),
        (lambda s: float("nan"), "finite"),
        (lambda s: -math.inf, "finite"),
        (lambda s: "high", "must return numbers"),
        (lambda s: None, "finite|numbers"),
    ],
)
def test_a_callable_that_returns_no_reward_is_an_error(function: Any, message: str) -> None:
    with pytest.raises(InvalidRewardError, match=message) as caught:
        make_reward(function)(make_snapshot())
    assert "lambda" in str(caught.value)


def test_a_callable_that_forgets_the_replicas_is_an_error() -> None:
    with pytest.raises(InvalidRewardError, match=r"one per replica, shape \(6,\), got shape \(\)"):
        make_reward(lambda s: s.stats[..., 0].max())(make_snapshot((6, 4)))


def test_unknown_names() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown reward 'jian'.*Did you mean 'jain'"):
        make_reward("jian")
    with pytest.raises(UnknownNameError, match=r"unknown reward 'maximum'"):
        make_reward({"jain": 1, "maximum": 1})
    with pytest.raises(UnknownNameError, match=r"reward field 'flow_on'.*n_flow_on.*cpu_usage"):
        make_reward("jain", "flow_on")
    with pytest.raises(UnknownNameError, match="fct_p95"):
        make_reward({"jain:fct_p95": 1.0})
    with pytest.raises(UnknownNameError, match="wrong_field"):
        make_reward("p99_fct", "wrong_field")
    with pytest.raises(UnknownNameError):
        make_reward({3: 1.0})  # type: ignore[dict-item]
    with pytest.raises(UnknownNameError, match="fairness metric 'p99_fct'"):
        fairness("p99_fct", [1.0])


@pytest.mark.parametrize(
    ("reward_type", "message"),
    [
        ({}, "at least one"),
        ({"jain": math.nan}, "weight of reward 'jain'"),
        ({"jain": "1"}, "weight of reward 'jain'"),
        ({"jain": True}, "weight of reward 'jain'"),
        ("p99_fct:n_flow_on", "takes no field"),
        (7, "got int"),
        (None, "got NoneType"),
    ],
)
def test_invalid_rewards(reward_type: Any, message: str) -> None:
    with pytest.raises(InvalidRewardError, match=message) as caught:
        make_reward(reward_type)
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, LbgymError)


@pytest.mark.parametrize("k", [0, -1.0, math.inf, math.nan, "1", True])
def test_invalid_rate(k: Any) -> None:
    with pytest.raises(InvalidRewardError, match="k must be"):
        make_reward("var_exp", k=k)


def test_invalid_loads() -> None:
    with pytest.raises(ValueError, match=r"not negative, got -1"):
        fairness("jain", [1.0, -1.0])
    with pytest.raises(ValueError, match="finite"):
        fairness("jain", [1.0, math.nan])
    with pytest.raises(ValueError, match=r"\(2,\).*\(3,\)"):
        fairness("jain", [1.0, 2.0], [True] * 3)
    with pytest.raises(ValueError, match="array over servers"):
        fairness("jain", 1.0)
    assert fairness("jain", [1.0, math.nan], [True, False]) == 1.0


def test_the_table_lists_every_reward() -> None:
    table = reward_table()
    lines = [line for line in table.splitlines() if line.startswith("| `")]
    assert [line.split("`")[1] for line in lines] == list(REWARDS)
    widths = {line.replace("\\|", "").count("|") for line in table.splitlines() if line}
    assert widths == {8, 6}
    for info in REWARDS.values():
        assert info.definition and info.source and info.scale.split()[0].rstrip(":") in ("none", "better", "worse")


def test_repr_says_what_it_is() -> None:
    assert repr(make_reward({"jain": 1.0, "p99_fct": 0.1})) == "Reward('1 jain:duration_mean_decay + 0.1 p99_fct')"
    assert isinstance(make_reward("cv"), Reward)
