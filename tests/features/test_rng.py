"""The random numbers of the kernel, against the laws they are drawn from."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from lbgym.features import rng

CHANCE = 1e-4
DRAWS = 1_000_000


@pytest.fixture(scope="module")
def words() -> np.ndarray:
    states = np.array([rng.stream_seed(1, 1, 0)])
    return np.array([rng.next_u64(states, 0) for _ in range(DRAWS)], np.uint64)


@pytest.fixture(scope="module")
def exponentials() -> np.ndarray:
    states = np.array([rng.stream_seed(2, 1, 0)])
    return np.array([rng.next_exponential(states, 0) for _ in range(2 * DRAWS)])


def test_every_bit_is_fair(words):
    bits = ((words[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)).sum(axis=0, dtype=np.int64)
    z = (bits - DRAWS / 2) / np.sqrt(DRAWS / 4)
    assert np.abs(z).max() < stats.norm.isf(CHANCE / 128)


def test_units_are_uniform(words):
    for unit in (rng.to_unit, rng.low_unit):
        drawn = np.array([unit(word) for word in words[:200_000]])
        assert stats.kstest(drawn, stats.uniform.cdf).pvalue > CHANCE
    assert rng.to_unit(np.uint64(2**64 - 1)) == 1.0
    assert rng.to_unit(np.uint64(0)) > 0.0
    assert rng.low_unit(np.uint64(2**64 - 1)) < 1.0


@pytest.mark.parametrize("n", [1, 2, 7, 1000])
def test_indices_are_uniform(words, n):
    drawn = np.array([rng.to_range(word, n) for word in words[:200_000]])
    assert drawn.min() >= 0
    assert drawn.max() < n
    if n > 1:
        assert stats.chisquare(np.bincount(drawn, minlength=n)).pvalue > CHANCE
    assert rng.to_range(np.uint64(2**64 - 1), n) == n - 1


def test_index_and_fraction_of_one_word_are_independent(words):
    """An alias table takes both from the same word."""
    some = words[:200_000]
    index = np.array([rng.to_range(word, 8) for word in some])
    fraction = np.array([int(8 * rng.low_unit(word)) for word in some])
    assert stats.chi2_contingency(np.histogram2d(index, fraction, bins=8)[0]).pvalue > CHANCE


def test_exponentials(exponentials):
    """By equally likely cells, which sees every layer of a ziggurat, and far out, which sees its tail."""
    cells = 4000
    edges = stats.expon.ppf(np.linspace(0, 1, cells + 1))
    assert (exponentials >= 0).all()
    assert stats.chisquare(np.histogram(exponentials, edges)[0]).pvalue > CHANCE
    for start in (5.0, 7.0, 8.0, 10.0):
        beyond = exponentials[exponentials > start] - start
        assert stats.binomtest(len(beyond), len(exponentials), np.exp(-start)).pvalue > CHANCE
        assert stats.kstest(beyond, stats.expon.cdf).pvalue > CHANCE


def test_successive_exponentials_are_independent(exponentials):
    law = stats.expon.cdf(exponentials)
    for lag in (1, 2, 7):
        cells = np.histogram2d(law[:-lag], law[lag:], bins=20)[0]
        assert stats.chisquare(cells.ravel()).pvalue > CHANCE


def test_streams_of_a_seed_are_unrelated():
    """Streams next to each other, and the same stream of neighbouring seeds."""
    kinds = [(1, 1, 0), (1, 2, 0), (1, 1, 1), (2, 1, 0), (2**63, 1, 0)]
    drawn = []
    for seed, kind, index in kinds:
        states = np.array([rng.stream_seed(np.uint64(seed), kind, index)])
        drawn.append([rng.to_unit(np.uint64(rng.next_u64(states, 0))) for _ in range(20_000)])
    correlation = np.corrcoef(drawn)[np.triu_indices(len(kinds), 1)]
    assert np.abs(correlation).max() * np.sqrt(20_000) < stats.norm.isf(CHANCE / 20)
