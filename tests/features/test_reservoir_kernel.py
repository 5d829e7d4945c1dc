"""The compiled reservoirs: the Python ones again, slot by slot and feature by feature."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lbgym.features import ReservoirSampler
from lbgym.features import reservoir_kernel as k

from .test_reservoir import GAPS, KEYS, VALUES

CODES = {"overwrite": k.OVERWRITE, "uniform": k.UNIFORM}


class CompiledReservoir:
    """The arrays of one compiled reservoir."""

    def __init__(self, capacity=128, seed=0, *, probability=1.0, algorithm="overwrite", decay=0.9):
        self.values = np.zeros(capacity)
        self.weights = np.zeros(capacity)
        self.meta = np.zeros(k.META_SIZE, np.int64)
        self.meta[k.RNG] = np.uint64(seed).astype(np.int64)
        self.result = np.zeros(k.RESULT_SIZE)
        self.probability, self.algorithm, self.log_decay = probability, CODES[algorithm], math.log(decay)

    def add(self, samples, times):
        k.add_many(
            self.values,
            self.weights,
            self.meta,
            self.result,
            np.asarray(samples, np.float64),
            np.asarray(times, np.float64),
            self.probability,
            self.algorithm,
            self.log_decay,
        )

    def features(self):
        k.reservoir_features(self.values, self.weights, self.meta, self.result)
        return self.result[:5].copy()

    @property
    def held(self):
        return self.values[: self.meta[k.FILLED]]


def assert_same(compiled: np.ndarray, sampler: ReservoirSampler) -> None:
    """Equal to float32 rounding; a deviation around a large mean is good to the mean's own rounding."""
    expected = np.array(list(sampler.get_features().values()))
    scale = sampler.values.max(initial=0.0)
    np.testing.assert_allclose(compiled, expected, rtol=2.0**-23, atol=1e-12 * scale)
    vector = sampler.get_feature_vector()
    np.testing.assert_allclose(compiled.astype(np.float32), vector, rtol=2.0**-23, atol=1e-12 * scale)


@given(bursts=st.lists(st.lists(st.tuples(VALUES, GAPS), max_size=50), max_size=8), **KEYS)
def test_agrees_with_python(bursts, **keys):
    """Observed after every burst, so that reservoirs with none, a few and all slots dirty are met."""
    sampler, compiled = ReservoirSampler(**keys), CompiledReservoir(**keys)
    now = 0.0
    for burst in bursts:
        times = now + np.cumsum([gap for _, gap in burst]) if burst else np.zeros(0)
        for (value, _), time in zip(burst, times, strict=True):
            sampler.add(value, time)
            now = float(time)
        compiled.add([value for value, _ in burst], times)
        features = compiled.features()
        assert np.isfinite(features).all()
        np.testing.assert_array_equal(compiled.held, sampler.values)
        assert_same(features, sampler)


@pytest.mark.parametrize("algorithm", ["overwrite", "uniform"])
@pytest.mark.parametrize("every", [1, 3, 20, 40, 500])
def test_agrees_with_python_over_a_long_stream(algorithm, every):
    rng = np.random.default_rng(1)
    keys = {"capacity": 128, "seed": 2**64 - 7, "algorithm": algorithm}
    sampler, compiled = ReservoirSampler(**keys), CompiledReservoir(**keys)
    values = rng.lognormal(size=6000)
    times = np.cumsum(rng.exponential(size=6000)) * np.where(np.arange(6000) < 3000, 1.0, 3.0)
    for start in range(0, 6000, every):
        part = slice(start, start + every)
        compiled.add(values[part], times[part])
        for value, time in zip(values[part], times[part], strict=True):
            sampler.add(value, time)
        features = compiled.features()
        if start % (10 * every) == 0:
            assert_same(features, sampler)


@given(stream=st.lists(st.tuples(VALUES, GAPS), min_size=1, max_size=100), capacity=st.integers(1, 40))
def test_looking_does_not_change_the_features(stream, capacity):
    times = np.cumsum([gap for _, gap in stream])
    compiled = CompiledReservoir(capacity, seed=1)
    compiled.add([value for value, _ in stream], times)
    first = compiled.features()
    for _ in range(3):
        np.testing.assert_array_equal(compiled.features(), first)


def test_when_it_is_looked_at_does_not_matter():
    """Features after the stream are the same whether they were drawn after every sample or once."""
    rng = np.random.default_rng(2)
    values = rng.exponential(size=3000)
    times = np.cumsum(rng.exponential(scale=5.0, size=3000))
    often, once = CompiledReservoir(64, seed=9), CompiledReservoir(64, seed=9)
    for i in range(3000):
        often.add(values[i : i + 1], times[i : i + 1])
        often.features()
    once.add(values, times)
    np.testing.assert_allclose(often.features(), once.features(), rtol=1e-12)


@pytest.mark.parametrize("age", [1e3, 1e6, 1e9])
def test_a_long_silence_leaves_finite_features(age):
    compiled = CompiledReservoir(8, seed=1)
    compiled.add([1.0, 2.0, 3.0], [0.0, 0.0, 0.0])
    before = compiled.features()
    np.testing.assert_allclose(before[[0, 3]], 2.0)
    compiled.add([10.0], [age])
    features = compiled.features()
    assert np.isfinite(features).all()
    np.testing.assert_allclose(features[0], 4.0)
    np.testing.assert_allclose(features[3:], 10.0)
    compiled.add([20.0], [2 * age])
    np.testing.assert_allclose(compiled.features()[3:], 20.0)


def test_a_year_of_samples_keeps_its_weights():
    """One sample an hour for a year: every weight but the newest is far below rounding, none is lost or overflows."""
    compiled = CompiledReservoir(16, seed=1)
    for hour in range(24 * 365):
        compiled.add([float(hour % 7)], [3600.0 * hour])
        features = compiled.features()
        assert features[3] == pytest.approx(hour % 7, abs=1e-9)
        assert features[4] == hour % 7


def test_empty_is_zero():
    np.testing.assert_array_equal(CompiledReservoir().features(), 0.0)


def test_overwriting_forgets_exponentially():
    """The age of a slot's sample, counted in samples, is geometric: one slot of each of many reservoirs."""
    capacity, runs = 32, 2000
    offered = 40 * capacity
    ages = np.empty(runs)
    for seed in range(runs):
        compiled = CompiledReservoir(capacity, seed=seed)
        compiled.add(np.arange(offered, dtype=float), np.arange(offered, dtype=float))
        ages[seed] = offered - 1 - compiled.values[seed % capacity]
    edges = np.array([0, *(capacity * np.array([0.1, 0.25, 0.5, 1, 1.5, 2, 3]).round(2)).astype(int), offered])
    survival = (1 - 1 / capacity) ** edges
    survival[-1] = 0.0
    observed = np.histogram(ages, edges)[0]
    assert stats.chisquare(observed, runs * -np.diff(survival)).pvalue > 1e-4


def test_exponential_ages_in_time():
    """With Poisson samples of rate r the age in seconds is exponential of mean capacity / r."""
    capacity, rate, runs = 16, 20.0, 1500
    rng = np.random.default_rng(4)
    ages = np.empty(runs)
    for seed in range(runs):
        times = np.cumsum(rng.exponential(scale=1 / rate, size=30 * capacity))
        compiled = CompiledReservoir(capacity, seed=seed)
        compiled.add(times, times)
        now = times[-1] + rng.exponential(scale=1 / rate)
        ages[seed] = now - compiled.values[3]
    # An age counts the time since a Poisson number of samples: exponential beyond the gap to the newest sample.
    assert stats.kstest(ages, stats.expon(scale=capacity / rate).cdf).pvalue > 1e-4


def test_algorithm_r_is_uniform():
    capacity, offered, runs = 20, 400, 3000
    kept = np.zeros(offered)
    for seed in range(runs):
        compiled = CompiledReservoir(capacity, seed=seed, algorithm="uniform")
        compiled.add(np.arange(offered, dtype=float), np.arange(offered, dtype=float))
        kept[compiled.values.astype(int)] += 1
    classes = kept.reshape(20, -1).sum(axis=1)
    assert stats.chisquare(classes).pvalue > 1e-4
    # Counts vary less than with replacement; a factor of at least 1 - 2 * share is left.
    assert stats.chi2.cdf(((classes - classes.mean()) ** 2 / classes.mean()).sum(), 19) > 1e-4


def test_first_slots_are_no_better_than_the_others():
    capacity, runs = 10, 4000
    hits = np.zeros(capacity)
    for seed in range(runs):
        compiled = CompiledReservoir(capacity, seed=seed)
        compiled.add(np.zeros(capacity), np.zeros(capacity))
        compiled.add([1.0], [1.0])
        hits += compiled.values
    assert hits.sum() == runs
    assert stats.chisquare(hits).pvalue > 1e-4
