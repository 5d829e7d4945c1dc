"""ReservoirSampler: its statistics against NumPy, its forgetting against the laws it claims."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lbgym.errors import UnknownNameError
from lbgym.features import STATISTICS, ReservoirSampler

VALUES = st.floats(min_value=0.0, max_value=1e9, allow_subnormal=False)
GAPS = st.one_of(st.just(0.0), st.floats(min_value=1e-9, max_value=10.0), st.floats(min_value=10.0, max_value=1e9))
STREAMS = st.lists(st.tuples(VALUES, GAPS), max_size=120)
KEYS = {
    "capacity": st.integers(1, 40),
    "seed": st.integers(0, 2**64 - 1),
    "algorithm": st.sampled_from(["overwrite", "uniform"]),
    "probability": st.sampled_from([1.0, 0.5]),
    "decay": st.sampled_from([0.9, 0.5, 1.0, 1e-3]),
}


def filled(stream: list[tuple[float, float]], **keys) -> ReservoirSampler:
    sampler = ReservoirSampler(**keys)
    now = 0.0
    for value, gap in stream:
        now += gap
        sampler.add(value, now)
    return sampler


@given(stream=STREAMS, **KEYS)
def test_statistics_are_numpys(stream, **keys):
    sampler = filled(stream, **keys)
    features = sampler.get_features()
    if len(sampler) == 0:
        assert features == dict.fromkeys(STATISTICS, 0.0)
        return
    values, times = sampler.values, sampler.times
    scale = values.max()
    near = {"rtol": 1e-12, "atol": 1e-12 * scale}
    np.testing.assert_allclose(features["mean"], np.mean(values), **near)
    np.testing.assert_allclose(features["std"], np.std(values), rtol=1e-9, atol=1e-7 * scale)
    np.testing.assert_allclose(features["p90"], np.percentile(values, 90), **near)
    weights = keys["decay"] ** (times.max() - times)
    np.testing.assert_allclose(features["mean_decay"], np.average(values, weights=weights), **near)
    share_below = weights[values < features["p90_decay"]].sum() / weights.sum()
    share_up_to = weights[values <= features["p90_decay"]].sum() / weights.sum()
    assert share_below < 0.9 + 1e-9
    assert share_up_to > 0.9 - 1e-9
    if np.abs(np.cumsum(weights[np.argsort(values)]) / weights.sum() - 0.9).min() > 1e-9:
        assert features["p90_decay"] == np.percentile(values, 90, method="inverted_cdf", weights=weights)


@given(stream=STREAMS, **KEYS)
def test_never_nan_infinite_or_negative(stream, **keys):
    vector = filled(stream, **keys).get_feature_vector()
    assert vector.shape == (5,)
    assert vector.dtype == np.float32
    assert np.isfinite(vector).all()
    assert (vector >= 0).all()


@given(stream=STREAMS, **KEYS)
def test_statistics_lie_between_the_extremes(stream, **keys):
    sampler = filled(stream, **keys)
    if len(sampler):
        low, high = sampler.values.min(), sampler.values.max()
        features = sampler.get_features(("mean", "p90", "mean_decay", "p90_decay"))
        slack = 1e-12 * high
        assert all(low - slack <= value <= high + slack for value in features.values())


@given(stream=STREAMS, shift=st.integers(0, 10**6), **KEYS)
def test_only_relative_ages_count(stream, shift, **keys):
    """A clock that starts elsewhere changes nothing, so an idle server keeps its features."""
    # Gaps of whole seconds survive the shift without rounding.
    stream = [(value, float(round(gap))) for value, gap in stream]
    moved = ReservoirSampler(**keys)
    now = float(shift)
    for value, gap in stream:
        now += gap
        moved.add(value, now)
    np.testing.assert_array_equal(filled(stream, **keys).get_feature_vector(), moved.get_feature_vector())


def test_old_samples_lose_to_new_ones():
    sampler = ReservoirSampler(capacity=10, seed=1)
    for _ in range(5):
        sampler.add(1.0, 0.0)
    for _ in range(5):
        sampler.add(3.0, 60.0)
    features = sampler.get_features()
    assert features["mean"] == pytest.approx(2.0)
    assert features["mean_decay"] == pytest.approx((1.0 * 0.9**60 + 3.0) / (0.9**60 + 1.0))
    assert features["mean_decay"] > 2.99


def test_order_of_the_vector_and_subsets():
    sampler = ReservoirSampler(seed=1)
    for i in range(20):
        sampler.add(i * 0.1, float(i))
    vector = sampler.get_feature_vector()
    features = sampler.get_features()
    assert tuple(features) == STATISTICS
    np.testing.assert_array_equal(vector, np.float32(list(features.values())))
    assert sampler.get_features(["std", "mean"]) == {"std": features["std"], "mean": features["mean"]}


def test_fills_in_order_then_stays_full():
    sampler = ReservoirSampler(capacity=4, seed=1)
    for i in range(4):
        assert len(sampler) == i
        sampler.add(float(i), float(i))
    np.testing.assert_array_equal(sampler.values, [0.0, 1.0, 2.0, 3.0])
    for i in range(50):
        sampler.add(10.0 + i, 10.0 + i)
    assert len(sampler) == 4


def test_reset_begins_the_same_sequence_again():
    sampler = ReservoirSampler(capacity=8, seed=3)
    other = ReservoirSampler(capacity=8, seed=3)
    for i in range(40):
        sampler.add(float(i), float(i))
        other.add(float(i), float(i))
    before = sampler.values
    np.testing.assert_array_equal(before, other.values)
    sampler.reset()
    assert len(sampler) == 0
    assert not sampler.get_feature_vector().any()
    for i in range(40):
        sampler.add(float(i), float(i))
    np.testing.assert_array_equal(before, sampler.values)


def test_unseeded_samplers_differ():
    samplers = [ReservoirSampler(capacity=16) for _ in range(2)]
    for sampler in samplers:
        for i in range(400):
            sampler.add(float(i), float(i))
    assert not np.array_equal(samplers[0].values, samplers[1].values)


def test_copies_cannot_spoil_the_reservoir():
    sampler = ReservoirSampler(capacity=4, seed=1)
    sampler.add(1.0, 0.0)
    sampler.values[:] = -1.0
    sampler.times[:] = math.nan
    assert sampler.get_features()["mean_decay"] == 1.0


@pytest.mark.parametrize(
    "keys",
    [
        {"capacity": 0},
        {"capacity": 32_768},
        {"capacity": 1.5},
        {"capacity": True},
        {"probability": 0.0},
        {"probability": 1.1},
        {"probability": math.nan},
        {"decay": 0.0},
        {"decay": 1.5},
        {"decay": math.nan},
        {"algorithm": "newest"},
    ],
)
def test_bad_arguments(keys):
    with pytest.raises(ValueError, match=str(next(iter(keys.values())))):
        ReservoirSampler(**keys)


@pytest.mark.parametrize("sample", [(math.nan, 0.0), (math.inf, 0.0), (-1.0, 0.0), (1.0, math.nan), (1.0, math.inf)])
def test_bad_samples_are_refused_and_leave_no_trace(sample):
    sampler = ReservoirSampler(seed=1)
    sampler.add(2.0, 1.0)
    with pytest.raises(ValueError, match="finite"):
        sampler.add(*sample)
    assert len(sampler) == 1
    assert sampler.get_features()["mean"] == 2.0


def test_unknown_statistic_names_the_known_ones():
    with pytest.raises(UnknownNameError, match=r"p91.*Did you mean 'p90'.*mean_decay"):
        ReservoirSampler().get_features(["p91"])


def test_probability_thins():
    offered, probability = 4000, 0.3
    sampler = ReservoirSampler(capacity=32_000, seed=5, probability=probability)
    for i in range(offered):
        sampler.add(1.0, float(i))
    assert stats.binomtest(len(sampler), offered, probability).pvalue > 1e-4


@pytest.mark.parametrize("algorithm", ["overwrite", "uniform"])
def test_python_forgets_by_the_law(algorithm):
    """Which of 200 samples are still there, over many reservoirs, in ten classes of age."""
    capacity, offered, runs = 10, 200, 1500
    kept = np.zeros(offered)
    for seed in range(runs):
        sampler = ReservoirSampler(capacity=capacity, seed=seed, algorithm=algorithm)
        for i in range(offered):
            sampler.add(0.0, float(i))
        kept[sampler.times.astype(int)] += 1
    if algorithm == "uniform":
        law = np.full(offered, capacity / offered)
    else:
        after = offered - 1 - np.maximum(np.arange(offered), capacity - 1)
        law = (1 - 1 / capacity) ** after
    observed = kept.reshape(10, -1).sum(axis=1)
    expected = runs * law.reshape(10, -1).sum(axis=1)
    likely = expected > 5
    # Slots compete, so the counts vary less than independent ones would: the test is on the safe side.
    statistic = ((observed - expected)[likely] ** 2 / expected[likely]).sum()
    assert stats.chi2.sf(statistic, likely.sum() - 1) > 1e-4


def test_a_sample_without_a_time_is_of_now() -> None:
    sampler = ReservoirSampler(seed=1)
    before = time.monotonic()
    sampler.add(1.0)
    assert before <= sampler.times[0] <= time.monotonic()
