from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbgym.controller import SafetyEnvelope
from lbgym.controller.envelope import LIMITS, usable_weights
from lbgym.errors import InvalidOptionError, InvalidWeightsError

#: What the bounds are met to, relative.
CLOSE = 1e-6

weights = st.one_of(st.floats(1e-3, 1e3), st.floats(1e-300, 1e300), st.just(0.0))
in_force = st.one_of(st.floats(1e-3, 1e3), st.floats(allow_nan=True, allow_infinity=True))
envelopes = st.builds(
    SafetyEnvelope,
    floor=st.floats(1e-6, 1.0),
    max_ratio=st.one_of(st.floats(1.0, 1e6), st.just(math.inf)),
    rate_limit=st.one_of(st.floats(1.0, 1e3), st.just(math.inf)),
    smoothing=st.one_of(st.just(0.0), st.floats(1e-3, 100.0)),
)
elapsed = st.floats(0.0, 10.0)


@st.composite
def servers(draw: st.DrawFn, force: st.SearchStrategy[float] = in_force) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Proposed weights, weights in force, who is active."""
    n = draw(st.integers(1, 12))
    rows = st.lists(st.tuples(weights, force, st.booleans()), min_size=n, max_size=n)
    proposed, now, active = (np.array(column) for column in zip(*draw(rows), strict=True))
    if not proposed[active].any():
        proposed[active] = 1.0
    return proposed, now, active


def relative(values: np.ndarray) -> np.ndarray:
    values = values / values.max()
    return values / values.mean()


def within(envelope: SafetyEnvelope, values: np.ndarray) -> bool:
    """Whether weights of active servers are in bounds."""
    shares = relative(values)
    ratio_kept = envelope.max_ratio == math.inf or shares.max() <= envelope.max_ratio * shares.min() * (1 + CLOSE)
    return bool(shares.min() >= envelope.floor * (1 - CLOSE) and ratio_kept)


@given(envelopes, servers(), elapsed)
def test_results_are_positive_finite_and_in_bounds(
    envelope: SafetyEnvelope, rows: tuple[np.ndarray, np.ndarray, np.ndarray], seconds: float
) -> None:
    proposed, now, active = rows
    before = proposed.copy(), now.copy(), active.copy()
    result, limits = envelope.apply(proposed, now, active, seconds)
    assert result.shape == active.shape and np.isfinite(result).all() and (result > 0.0).all()
    assert set(limits) <= set(LIMITS)
    if active.any():
        assert within(envelope, result[active])
        np.testing.assert_allclose(relative(np.append(result[active], result[~active]))[active.sum() :], 1.0)
    for given_, kept in zip((proposed, now, active), before, strict=True):
        np.testing.assert_array_equal(given_, kept)


@given(envelopes, servers(st.floats(1e-3, 1e3)), elapsed)
def test_weights_in_bounds_never_move_faster_than_the_limit(
    envelope: SafetyEnvelope, rows: tuple[np.ndarray, np.ndarray, np.ndarray], seconds: float
) -> None:
    proposed, now, active = rows
    if not active.any():
        return
    # Brought into bounds: what the envelope would have put in force.
    now, _ = SafetyEnvelope(envelope.floor, envelope.max_ratio, math.inf).apply(now, now, active, 0.0)
    result, _ = envelope.apply(proposed, now, active, seconds)
    change = relative(result[active]) / relative(now[active])
    limit = envelope.rate_limit**seconds if envelope.rate_limit < math.inf else math.inf
    assert change.max() <= limit * (1 + CLOSE) and change.min() >= (1 - CLOSE) / limit


@given(envelopes, servers(), elapsed)
def test_a_proposal_inside_passes_unchanged_and_only_then(
    envelope: SafetyEnvelope, rows: tuple[np.ndarray, np.ndarray, np.ndarray], seconds: float
) -> None:
    proposed, now, active = rows
    result, limits = envelope.apply(proposed, now, active, seconds)
    if not limits and active.any():
        np.testing.assert_array_equal(result[active], proposed[active])
    # What came out is inside, wherever it is in force already, or nothing limits its movement.
    again, limits = envelope.apply(result, result, active, seconds)
    assert not limits
    np.testing.assert_array_equal(again[active], result[active])
    free = SafetyEnvelope(envelope.floor, envelope.max_ratio, math.inf)
    assert free.apply(result, now, active, seconds)[1] == ()


@given(servers(), elapsed)
def test_only_ratios_count(rows: tuple[np.ndarray, np.ndarray, np.ndarray], seconds: float) -> None:
    proposed, now, active = rows
    proposed = np.clip(proposed, 0.0, 1e290)
    envelope = SafetyEnvelope()
    plain, limits = envelope.apply(proposed, now, active, seconds)
    scaled, same = envelope.apply(proposed * 64.0, now, active, seconds)
    assert limits == same
    np.testing.assert_allclose(scaled[active] / scaled[active].max() if active.any() else [],
                               plain[active] / plain[active].max() if active.any() else [])  # fmt: skip


def applied(envelope: SafetyEnvelope, proposed: list[float], now: list[float], seconds: float = 1.0) -> list[float]:
    return envelope.apply(np.array(proposed), np.array(now), np.ones(len(now), np.bool_), seconds)[0].tolist()


def test_examples() -> None:
    free = SafetyEnvelope(floor=0.1, max_ratio=math.inf, rate_limit=math.inf)
    # Relative weights 0 and 2; a tenth of the way to equal ones is the floor.
    assert applied(free, [0.0, 5.0], [1.0, 1.0]) == pytest.approx([0.25, 4.75])
    three = SafetyEnvelope(floor=0.1, max_ratio=3.0, rate_limit=math.inf)
    assert applied(three, [1.0, 9.0], [1.0, 1.0]) == pytest.approx([2.5, 7.5])
    # Twice as much per second: 1 -> 1.5 of a mean of 1 is allowed in one second, 1.25 in log2(1.25) seconds.
    slow = SafetyEnvelope(floor=0.01, max_ratio=math.inf, rate_limit=2.0)
    assert applied(slow, [1.5, 0.5], [1.0, 1.0], 1.0) == [1.5, 0.5]
    assert applied(slow, [1.5, 0.5], [1.0, 1.0], math.log2(1.25)) == pytest.approx([1.2, 0.8])
    assert applied(slow, [1.5, 0.5], [1.0, 1.0], 0.0) == pytest.approx([1.0, 1.0])
    smooth = SafetyEnvelope(rate_limit=math.inf, smoothing=2.0)
    assert applied(smooth, [1.5, 0.5], [1.0, 1.0], 2.0 * math.log(2.0)) == pytest.approx([1.25, 0.75])


def test_weights_in_force_out_of_bounds_are_brought_in_at_once_whatever_the_rate() -> None:
    envelope = SafetyEnvelope(floor=0.5, max_ratio=math.inf, rate_limit=1.0)
    assert applied(envelope, [1.0, 1.0], [0.0, 4.0]) == pytest.approx([1.0, 1.0])  # no weight counts as the mean
    assert applied(envelope, [1.0, 1.0], [0.4, 3.6]) == pytest.approx([0.5, 1.5])


def test_limits_are_named() -> None:
    active = np.ones(2, np.bool_)
    one = np.ones(2)
    assert SafetyEnvelope(floor=0.5).apply(np.array([1.0, 9.0]), one, active, 9.0)[1] == ("floor",)
    assert SafetyEnvelope(max_ratio=2.0).apply(np.array([1.0, 9.0]), one, active, 9.0)[1] == ("max_ratio",)
    assert SafetyEnvelope(rate_limit=1.1).apply(np.array([1.0, 2.0]), one, active, 1.0)[1] == ("rate_limit",)
    assert SafetyEnvelope(smoothing=1.0).apply(np.array([1.0, 2.0]), one, active, 1.0)[1] == ("smoothing",)
    both = SafetyEnvelope(floor=0.5, rate_limit=1.1).apply(np.array([1.0, 9.0]), one, active, 1.0)[1]
    assert both == ("floor", "rate_limit")


def test_servers_that_are_inactive_have_the_mean_and_the_last_ones_weights_stay() -> None:
    envelope = SafetyEnvelope()
    active = np.array([True, False, True])
    weights, limits = envelope.apply(np.array([1.0, 77.0, 3.0]), np.ones(3), active, 1.0)
    assert weights.tolist() == [1.0, 2.0, 3.0] and limits == ()
    weights, limits = envelope.apply(np.zeros(3), np.array([1.0, math.nan, 3.0]), np.zeros(3, np.bool_), 1.0)
    assert weights.tolist() == [1.0, 2.0, 3.0] and limits == ()
    assert usable_weights(np.array([0.0, -1.0])).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("bad", [[1.0, -1.0], [1.0, math.nan], [1.0, math.inf], [0.0, 0.0], [1.0]], ids=str)
def test_bad_proposals_are_refused(bad: list[float]) -> None:
    with pytest.raises(InvalidWeightsError, match="weights"):
        SafetyEnvelope().apply(np.array(bad), np.ones(2), np.ones(2, np.bool_), 1.0)


@pytest.mark.parametrize(
    "key", [{"floor": 0.0}, {"floor": 1.5}, {"max_ratio": 0.5}, {"rate_limit": math.nan}, {"smoothing": -1.0}], ids=str
)
def test_bad_limits_are_refused(key: dict[str, float]) -> None:
    with pytest.raises(InvalidOptionError, match=next(iter(key))):
        SafetyEnvelope(**key)
