"""Features of the kernel's samples, against the plain reservoir."""

from __future__ import annotations

import numpy as np
import pytest

from lbgym.drivers.xdp.layout import SLOTS
from lbgym.drivers.xdp.statistics import SampleStatistics
from lbgym.features import ReservoirSampler

TICK = 2.0**20 * 1e-9


@pytest.mark.parametrize("count", [0, 1, 2, 50, SLOTS])
def test_statistics_are_those_of_a_reservoir(count: int) -> None:
    rng = np.random.default_rng(count)
    # Whole microseconds and ticks, so that both see the same numbers; a machine that has been up for forty days.
    values, ticks = rng.integers(1, 5_000_000, count), np.sort(rng.integers(3_300_000_000, 3_300_100_000, count))
    samples, accepted = np.zeros((2, 2, SLOTS), np.uint64), np.zeros((2, 2), np.uint64)
    samples[1, 0, :count] = ((ticks + 1) << 32 | values).astype(np.uint64)
    accepted[1, 0] = count
    statistics = SampleStatistics(2)
    found = statistics.refresh(accepted, samples)
    plain = ReservoirSampler(SLOTS, seed=0)
    for value, tick in zip(values, ticks, strict=True):
        plain.add(float(value) * 1e-6, float(tick - 3_300_000_000) * TICK)
    np.testing.assert_allclose(found[1, :5], plain.get_feature_vector(), 1e-5)
    assert not found[0].any() and not found[1, 5:].any()
    # Nothing new: the same; and a slot that is promised and not yet written does no harm.
    accepted[1, 1] = 1
    np.testing.assert_array_equal(statistics.refresh(accepted, samples), found)
    statistics.forget(1)
    assert statistics.refresh(accepted * np.uint64(0), samples).any() == 0
