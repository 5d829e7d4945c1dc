"""Columns, trust and bounds that the heuristics share."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...errors import PolicyError
from ...features.columns import column_index

OPEN_FLOWS_NAME, FCT_NAME = "n_flow_on", "fct_mean_decay"
OPEN_FLOWS, FCT = column_index(OPEN_FLOWS_NAME), column_index(FCT_NAME)
CPU = column_index("cpu_usage")
BUSY = column_index("busy_workers")

#: Seconds; no quotient overflows for a flow that took no time at all.
LEAST_FCT = 1e-9

#: A learned weight stays within this factor of the servers' mean, so that one bad estimate cannot starve a server
#: (which would then never show that it is well again) nor bury it.
SPREAD = 10.0


class News:
    """Servers from which a flow has come back since the last step: their decayed mean FCT has changed."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._seen: NDArray[np.float64] | None = None

    def __call__(self, fct: NDArray[np.float64]) -> NDArray[np.bool_]:
        """True per server where ``fct`` differs from that of the step before, which counts as 0 at the first step."""
        if self._seen is None or self._seen.shape != fct.shape:
            self._seen = np.zeros(fct.shape)
        news = fct != self._seen
        self._seen = fct.copy()
        return news


class RunningSum:
    """Exponentially forgetting sums of a quantity and of its weights, whose quotient is a mean from the first step on.

    Args:
        smoothing: share of the former sums that a step keeps, in [0, 1).
    """

    def __init__(self, smoothing: float) -> None:
        self._smoothing = share(smoothing)
        self.reset()

    def reset(self) -> None:
        self._sum, self._total = np.zeros(0), 0.0

    def __call__(self, values: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
        """The sums after a step with these values: of the values, and of their weights."""
        if self._sum.shape != values.shape:
            self._sum, self._total = np.zeros(values.shape), 0.0
        self._sum = self._smoothing * self._sum + (1 - self._smoothing) * values
        self._total = self._smoothing * self._total + (1 - self._smoothing)
        return self._sum, self._total


class Trust:
    """Trust in an estimate from FCTs: it grows with every step that brings news and shrinks with every other.

    The first few FCTs carry little information, and too low a weight keeps flows away, so that no FCT comes back to
    correct it. A reservoir without new samples shows as features that stand still.

    Args:
        half_life: steps without news until trust is halved.
        evidence: steps with news until trust is half of what it can be.
    """

    def __init__(self, half_life: float, evidence: float = 3.0) -> None:
        if not half_life > 0:
            raise PolicyError(f"half_life must be above 0 steps, got {half_life!r}")
        self._half_life, self._evidence = half_life, evidence
        self.reset()

    def reset(self) -> None:
        self._news = News()
        self._since = self._count = np.zeros(0)

    def __call__(self, fct: NDArray[np.float64]) -> NDArray[np.float64]:
        """Trust in [0, 1] per server after a step that shows ``fct``."""
        if self._count.shape != fct.shape:
            self._since = self._count = np.zeros(fct.shape)
        news = self._news(fct)
        self._since = np.where(news, 0.0, self._since + 1)
        self._count = self._count + news
        return 0.5 ** (self._since / self._half_life) * (1 - 0.5 ** (self._count / self._evidence))


def share(smoothing: float) -> float:
    if not 0 <= smoothing < 1:
        raise PolicyError(f"smoothing must be at least 0 and below 1, got {smoothing!r}")
    return float(smoothing)


def relative(values: NDArray[np.float64], known: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Values over the mean of the known ones, within ``SPREAD`` of it; 1 where unknown."""
    mean = mean_of(values, known)
    ratio = np.where(known, values, 1.0) / np.where(mean > 0, mean, 1.0)
    return np.where(known, np.clip(ratio, 1 / SPREAD, SPREAD), 1.0)


def mean_of(values: NDArray[np.float64], known: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Mean of the known values along the last axis, which is kept; 0 where none is known."""
    count = known.sum(axis=-1, keepdims=True)
    return np.where(known, values, 0.0).sum(axis=-1, keepdims=True) / np.maximum(count, 1)


def steps_in(period: float, step_interval: float) -> int:
    """Control steps in a period, at least 1."""
    return max(1, round(period / step_interval))
