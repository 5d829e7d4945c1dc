from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy import stats

from lbgym.evaluation import jain_index, mean_interval, paired_difference
from lbgym.evaluation.statistics import HISTOGRAM_EDGES, fct_histogram

RNG = np.random.default_rng(7)
A, B = RNG.lognormal(size=12), RNG.lognormal(size=12)


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_interval_is_that_of_student(confidence: float) -> None:
    interval = mean_interval(A, confidence)
    low, high = stats.t.interval(confidence, len(A) - 1, loc=A.mean(), scale=stats.sem(A))
    assert (interval.low, interval.high) == pytest.approx((low, high), rel=1e-12)


def test_paired_interval_is_that_of_the_paired_test() -> None:
    difference = paired_difference(A, B)
    expected = stats.ttest_rel(A, B).confidence_interval(0.95)
    assert (difference.absolute.low, difference.absolute.high) == pytest.approx(
        (expected.low, expected.high), rel=1e-12
    )
    relative = stats.ttest_1samp(100 * (A - B) / B, 0).confidence_interval(0.95)
    assert (difference.relative.low, difference.relative.high) == pytest.approx(
        (relative.low, relative.high), rel=1e-12
    )


def test_pairing_removes_what_both_share() -> None:
    common = RNG.normal(0, 100, 20)
    difference = paired_difference(1000 + common + 1, 1000 + common)
    assert difference.absolute.mean == pytest.approx(1) and difference.absolute.excludes_zero
    assert mean_interval(1000 + common).half_width > 20 * difference.absolute.half_width


def test_few_or_no_values() -> None:
    one, none = mean_interval([3.0]), mean_interval([math.nan])
    assert one.mean == 3.0 and math.isnan(one.half_width) and not one.excludes_zero
    assert none.n == 0 and math.isnan(none.mean)
    assert json.loads(json.dumps(none.to_dict(), allow_nan=False)) == {"mean": None, "low": None, "high": None, "n": 0}
    assert mean_interval([1.0, math.inf, 3.0]).mean == 2.0


def test_relative_to_a_baseline_of_zero_is_unknown() -> None:
    difference = paired_difference([1.0, 2.0], [0.0, 0.0])
    assert difference.absolute.mean == 1.5 and difference.relative.n == 0


def test_jain() -> None:
    assert jain_index(np.array([2.0, 2.0, 2.0])) == pytest.approx(1)
    assert jain_index(np.array([5.0, 0.0, 0.0, 0.0])) == pytest.approx(0.25)
    assert jain_index(np.array([1.0, 3.0])) == pytest.approx(16 / 20)
    assert jain_index(np.zeros(3)) == 1.0
    assert math.isnan(jain_index(np.zeros(0)))


def test_histogram_counts_everything_to_one_percent() -> None:
    fct = np.concatenate([RNG.lognormal(-2, 3, 5000), [0.0, 1e-9, 1e7]])
    counts = fct_histogram(fct)
    assert counts.sum() == len(fct) and len(counts) == len(HISTOGRAM_EDGES) + 1
    longer = 1 - np.cumsum(counts)[:-1] / counts.sum()
    for q in (0.1, 0.5, 0.9, 0.99):
        edge = HISTOGRAM_EDGES[np.argmax(longer <= 1 - q)]
        assert edge == pytest.approx(np.quantile(fct, q), rel=0.02)
