"""Quantiles of one run, confidence intervals over seeds, paired differences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import MissingExtraError

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over seeds with a two-sided Student-t confidence interval.

    Attributes:
        mean: over the seeds; NaN if there is no finite value.
        half_width: of the interval mean ± half_width; NaN for fewer than two values.
        n: values it rests on.
    """

    mean: float
    half_width: float
    n: int

    @property
    def low(self) -> float:
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        return self.mean + self.half_width

    @property
    def excludes_zero(self) -> bool:
        """True if the whole interval lies on one side of 0; False without an interval."""
        return bool(self.low > 0 or self.high < 0)

    def to_dict(self) -> dict[str, float | int | None]:
        """Return plain numbers; None where unknown."""
        values = {"mean": self.mean, "low": self.low, "high": self.high}
        return {**{k: v if np.isfinite(v) else None for k, v in values.items()}, "n": self.n}


def mean_interval(values: NDArray[Any] | list[float], confidence: float = CONFIDENCE) -> Interval:
    """Mean and Student-t interval of independent values, one per seed; non-finite values are left out.

    Raises:
        MissingExtraError: without SciPy.
    """
    finite = np.asarray(values, dtype=np.float64)
    finite = finite[np.isfinite(finite)]
    n = len(finite)
    if n == 0:
        return Interval(float("nan"), float("nan"), 0)
    if n == 1:
        return Interval(float(finite[0]), float("nan"), 1)
    try:
        from scipy.stats import t
    except ImportError:
        raise MissingExtraError("scipy", "eval", "a confidence interval") from None
    half_width = float(t.ppf(0.5 + confidence / 2, n - 1)) * float(finite.std(ddof=1)) / n**0.5
    return Interval(float(finite.mean()), half_width, n)


@dataclass(frozen=True, slots=True)
class Difference:
    """Of one contender from the baseline, paired by seed.

    Attributes:
        absolute: contender minus baseline, in the metric's unit.
        relative: the same over the baseline's value of the same seed, in percent. Seeds where that value is 0 are
            left out.
    """

    absolute: Interval
    relative: Interval

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"absolute": self.absolute.to_dict(), "relative_percent": self.relative.to_dict()}


def paired_difference(
    values: NDArray[Any] | list[float], baseline: NDArray[Any] | list[float], confidence: float = CONFIDENCE
) -> Difference:
    """Differences seed by seed: both arrays are in the same order of seeds.

    The same seed gives the same flows, so what is common to both runs cancels and the interval is narrower than that
    of two independent means.
    """
    a, b = np.asarray(values, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    delta = a - b
    relative = np.divide(delta, b, out=np.full(len(b), np.nan), where=b != 0)
    return Difference(mean_interval(delta, confidence), mean_interval(100 * relative, confidence))


def jain_index(loads: NDArray[Any]) -> float:
    """Jain's fairness index (Σx)² / (n Σx²) of loads of at least 0: 1 when all are equal, 1/n when one has all.

    R. Jain, D. Chiu, W. Hawe, DEC-TR-301, 1984. NaN for no loads; 1 when all are 0.
    """
    x = np.asarray(loads, dtype=np.float64)
    if not len(x):
        return float("nan")
    square = float((x**2).sum())
    return 1.0 if square == 0 else float(x.sum()) ** 2 / (len(x) * square)


#: Upper edges of the FCT histogram of a run: 1 % wide from 1 microsecond to 100,000 s.
HISTOGRAM_EDGES: NDArray[np.float64] = np.geomspace(1e-6, 1e5, 2546)


def fct_histogram(fct: NDArray[np.float64]) -> NDArray[np.int64]:
    """Counts of FCTs (s) per bin: below the first edge, between edges, above the last. int64[edges + 1]."""
    return np.bincount(np.searchsorted(HISTOGRAM_EDGES, fct), minlength=len(HISTOGRAM_EDGES) + 1).astype(np.int64)
