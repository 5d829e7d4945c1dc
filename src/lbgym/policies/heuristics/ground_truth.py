"""Weights from the ground truth, which a balancer has only where an agent on every server reports it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...checks import number, seconds
from ...errors import PolicyError
from ...snapshot import DEFAULT_STEP_INTERVAL
from ..base import WeightPolicy, check_features
from ._estimates import BUSY, CPU, relative, steps_in
from .feedback import PIDWeights
from .static import StaticWeights, UniformWeights


class AdaptiveWeights(WeightPolicy):
    """Adaptive WCMP (AWCMP): configured weights divided by the number of busy workers plus one, every step.

    The rule of the MARLLB testbed, which polls the servers for it; here the ground truth plays the poll. Between two
    steps every flow follows the same weights, so the least busy server of one step is the busiest of the next.

    Args:
        base: the configured weights, one per server (an operator takes the cores), or None for ones.
    """

    uses_ground_truth = True

    def __init__(self, base: Sequence[float] | None = None) -> None:
        self._base = StaticWeights(base) if base is not None else UniformWeights()

    def weights(self, features: NDArray[Any], active: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Shapes as in :meth:`WeightPolicy.weights`, with the ground truth."""
        features = check_features(self, features, active)
        return self._base.weights(features, active) / (features[..., BUSY] + 1.0)


class OrcaWeights(WeightPolicy):
    """Weights of gRPC's ``weighted_round_robin`` from ORCA load reports: requests per second over the utilization.

    gRFC A58: weight = qps / (utilization + eps / qps * penalty). Every ``period`` the latest report of each server with
    qps and utilization above 0 becomes its weight. A weight counts once reports have come for ``blackout`` seconds, and
    no longer when none has come for ``expiration`` seconds; a server without a weight gets the mean of the others'.

    The servers of lbgym report no qps. Under a rule that follows the weights alone they are in proportion to the
    weights in force, and only their ratios matter. The utilization is the CPU use; both are means over the period.
    Errors per second (eps) are not reported, and 0 here.

    gRPC draws from the weights by earliest deadline first; ``round_robin`` is that rule here. Rules that count open
    flows do not follow the weights alone, and have no use for these.

    Args:
        period, blackout, expiration: seconds; the defaults of the gRFC.
        step_interval: seconds between two steps.
    """

    uses_ground_truth = True

    def __init__(
        self,
        period: float = 1.0,
        blackout: float = 10.0,
        expiration: float = 180.0,
        step_interval: float = DEFAULT_STEP_INTERVAL,
    ) -> None:
        step = seconds("step_interval", step_interval, error=PolicyError)
        self._period = steps_in(seconds("period", period, error=PolicyError), step)
        self._blackout = round(number("blackout", blackout, low=0.0, unit="seconds", error=PolicyError) / step)
        self._expiration = steps_in(seconds("expiration", expiration, error=PolicyError), step)
        self.reset()

    def reset(self, seed: int | None = None) -> None:
        """Forget all reports."""
        self._steps = 0
        self._weight: NDArray[np.float64] | None = None

    def weights(self, features: NDArray[Any], active: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Shapes as in :meth:`WeightPolicy.weights`, with the ground truth."""
        features = check_features(self, features, active)
        if self._weight is None or self._weight.shape != active.shape:
            self._steps = 0
            self._weight, self._in_force = np.zeros(active.shape), np.ones(active.shape)
            self._sums = np.zeros((2, *active.shape))
            # Steps since the first report of a run of them, and since the last one; -1: none yet.
            self._first = self._last = np.full(active.shape, -1)
        self._sums += self._in_force, features[..., CPU]
        self._steps += 1
        self._first = np.where(self._first >= 0, self._first + 1, -1)
        self._last = np.where(self._last >= 0, self._last + 1, -1)
        if self._steps % self._period == 0:
            qps, utilization = self._sums
            reported = (utilization > 0) & active
            self._weight = np.where(reported, qps / np.where(reported, utilization, 1.0), self._weight)
            self._first = np.where(reported & (self._first < 0), 0, self._first)
            self._last = np.where(reported, 0, self._last)
            self._sums = np.zeros((2, *active.shape))
        self._first = np.where(self._last > self._expiration, -1, self._first)
        self._in_force = relative(self._weight, (self._first >= self._blackout) & active)
        return self._in_force.copy()


class PIDCPUWeights(PIDWeights):
    """:class:`PIDWeights` on the servers' CPU use, as in Robinhood; the ground truth plays the servers' reports."""

    uses_ground_truth = True
    uses_features: tuple[str, ...] = ()

    def _signal(
        self, features: NDArray[np.float64], active: NDArray[np.bool_]
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        return features[..., CPU], active
