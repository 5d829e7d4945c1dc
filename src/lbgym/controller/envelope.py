"""Bounds on a policy's weights and on their changes: :class:`SafetyEnvelope`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidOptionError, InvalidWeightsError

#: The limits that can hold a proposal back.
LIMITS = ("floor", "max_ratio", "rate_limit", "smoothing")
#: Bounds are met to this relative accuracy, so that the rounding of a sum does not count as an intervention.
_TOLERANCE = 1e-9


@dataclass(frozen=True, slots=True)
class SafetyEnvelope:
    """Bounds on weights and on how fast they move.

    Dispatch rules depend only on the ratios of weights, so all bounds are on *relative weights*: weights of the active
    servers over their mean.

    1. **Bounds.** Weights out of bounds are drawn towards equal ones, along the straight line, until the least relative
       weight is at least ``floor`` and the largest at most ``max_ratio`` times the least. The order of the servers
       stays, and the floor alone never moves the weights by more than that share of the way.
    2. **Speed.** From the weights in force they move towards the result, again along the straight line, as far as no
       relative weight changes by more than a factor of ``rate_limit`` to the power of the elapsed seconds; with
       ``smoothing``, no further than a first-order lag of that time constant would go.

    Where the weights in force are themselves out of bounds (a data plane's safe weights may be), the bounds win: the
    movement begins at the weights in force *brought into bounds*, in one step. So the result is in bounds always, and
    it obeys the rate limit whenever the weights in force were in bounds.

    Attributes:
        floor: least relative weight of an active server, from 1e-6 to 1. A server without flows would never show that
            it is well again.
        max_ratio: largest over least weight, at least 1; infinite: no bound.
        rate_limit: largest factor per second, at least 1; infinite: no limit.
        smoothing: time constant, seconds; 0: none.

    Raises:
        InvalidOptionError: for a value out of its range.
    """

    floor: float = 0.05
    max_ratio: float = 100.0
    rate_limit: float = 10.0
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        for name, low, high in (("floor", 1e-6, 1.0), ("max_ratio", 1.0, math.inf), ("rate_limit", 1.0, math.inf)):
            if not low <= getattr(self, name) <= high:
                raise InvalidOptionError(f"{name} must be from {low:g} to {high:g}, got {getattr(self, name)!r}")
        if not 0.0 <= self.smoothing < math.inf:
            raise InvalidOptionError(f"smoothing must be a number of seconds of at least 0, got {self.smoothing!r}")

    def apply(
        self, proposed: NDArray[np.float64], in_force: NDArray[np.float64], active: NDArray[np.bool_], elapsed: float
    ) -> tuple[NDArray[np.float64], tuple[str, ...]]:
        """Weights to put in force.

        Args:
            proposed: float[N], at least 0 and finite, above 0 for at least one active server; the values of inactive
                servers are ignored.
            in_force: float[N]; a server without a finite weight above 0 counts as having the others' mean.
            active: bool[N].
            elapsed: seconds that the movement may take.

        Returns:
            float64[N], finite and above 0, and which of ``LIMITS`` held the proposal back. If none did, active servers
            have the proposed weights, bit by bit; else weights of the same mean. Inactive servers have the mean of the
            active ones, which is what they begin with when they join. While no server is active, the weights stay.

        Raises:
            InvalidWeightsError: if the proposal breaks these rules.
        """
        now = usable_weights(in_force)
        if not active.any():
            return now, ()
        wanted = np.asarray(proposed, np.float64)
        if wanted.shape != active.shape:
            raise InvalidWeightsError(f"weights must have shape {active.shape}, got {wanted.shape}")
        wanted = wanted[active]
        largest = wanted.max()
        if not (np.isfinite(wanted).all() and wanted.min() >= 0.0 and largest > 0.0):
            raise InvalidWeightsError(
                f"weights of active servers must be finite, at least 0 and not all 0, got {wanted.tolist()}"
            )
        target, limits = self._bounded(_relative(wanted))
        start, _ = self._bounded(_relative(now[active]))
        way, speed_limits = self._way(start, target, elapsed)
        limits += speed_limits
        weights = np.empty(active.shape)
        if limits:
            # The mean of the proposal, so that the numbers stay comparable, unless that is at the end of the floats.
            scale = min(max(largest * (wanted / largest).mean(), 1e-300), 1e300)
            weights[active] = (start + way * (target - start)) * scale
        else:
            weights[active] = wanted
        weights[~active] = _mean(weights[active])
        return weights, limits

    def _bounded(self, relative: NDArray[np.float64]) -> tuple[NDArray[np.float64], tuple[str, ...]]:
        """The point nearest to ``relative`` (mean 1) on the line to equal weights that is in bounds."""
        least, most = relative.min(), relative.max()
        by_floor = by_ratio = 1.0
        if least < self.floor * (1.0 - _TOLERANCE):
            by_floor = (1.0 - self.floor) / (1.0 - least)
        if self.max_ratio < math.inf and most > self.max_ratio * least * (1.0 + _TOLERANCE):
            by_ratio = (self.max_ratio - 1.0) / (most - 1.0 + self.max_ratio * (1.0 - least))
        way = min(by_floor, by_ratio)
        if way == 1.0:
            return relative, ()
        return 1.0 + way * (relative - 1.0), ("floor" if by_floor <= by_ratio else "max_ratio",)

    def _way(
        self, start: NDArray[np.float64], target: NDArray[np.float64], elapsed: float
    ) -> tuple[float, tuple[str, ...]]:
        """The allowed part of the way from ``start`` to ``target``, and the limits that shorten it."""
        way = 1.0
        limits: tuple[str, ...] = ()
        change = target / start
        grows, shrinks = float(change.max()) - 1.0, 1.0 - float(change.min())
        if grows <= _TOLERANCE and shrinks <= _TOLERANCE:
            return way, limits
        if self.rate_limit < math.inf:
            # Beyond e^700 there is no float, and no limit.
            factor = math.exp(min(max(elapsed, 0.0) * math.log(self.rate_limit), 700.0))
            allowed = min(
                (factor - 1.0) / grows if grows > 0.0 else 1.0, (1.0 - 1.0 / factor) / shrinks if shrinks > 0.0 else 1.0
            )
            if allowed < 1.0 - _TOLERANCE:
                way, limits = allowed, ("rate_limit",)
        if self.smoothing > 0.0:
            allowed = -math.expm1(-max(elapsed, 0.0) / self.smoothing)
            if allowed < way:
                way, limits = allowed, ("smoothing",)
        return way, limits


def usable_weights(in_force: NDArray[np.float64]) -> NDArray[np.float64]:
    """Replace weights that are not finite and above 0 by the mean of those that are, or by 1 if none is."""
    weights = np.array(in_force, np.float64)
    good = np.isfinite(weights) & (weights > 0.0)
    if not good.all():
        weights[~good] = _mean(weights[good]) if good.any() else 1.0
    return weights


def _mean(weights: NDArray[np.float64]) -> float:
    """Mean of positive numbers whose sum may overflow and whose mean may underflow."""
    largest = weights.max()
    return max(float(largest * (weights / largest).mean()), 5e-324)


def _relative(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Over their mean."""
    shares = weights / weights.max()
    relative: NDArray[np.float64] = shares / shares.mean()
    return relative
