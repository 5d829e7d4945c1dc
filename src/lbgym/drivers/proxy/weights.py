"""From weights to a proxy's whole numbers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

#: With no more numbers than these, which one the greatest weight becomes makes a difference.
_FEW = 1024


def whole_weights(weights: NDArray[np.float64], top: int) -> NDArray[np.int64]:
    """Whole numbers from 0 to ``top`` in nearly the proportions of ``weights``.

    Weights that are such numbers already stay as they are. Others are scaled and rounded: so that the greatest becomes
    ``top``, or, if that is at most 1,024, the whole number above ``top / 2`` that makes the largest relative error of
    any weight least. A weight of r times the greatest is then off by at most 1 / (2 top r) of itself: with 256, 2 % at
    a tenth of the greatest. One above 0 never becomes 0: below ``1 / top`` of the greatest it counts as that.

    Args:
        weights: float64[N], finite, at least 0.
        top: the largest number allowed, at least 2.
    """
    if not weights.any():
        return np.zeros(len(weights), np.int64)
    if (weights == np.round(weights)).all() and weights.max() <= top:
        return weights.astype(np.int64)
    used = weights > 0.0
    # Whatever is below 1 / top counts as that; errors of what is far below would be beyond all numbers.
    shares = np.maximum(weights[used] / weights.max(), 1e-3 / top)
    tops = np.arange(top // 2 + 1 if top <= _FEW else top, top + 1, dtype=np.float64)
    exact = tops[:, None] * shares
    rounded = np.maximum(np.round(exact), 1.0)
    # The largest of equally good ones, whose steps are the finest; what differs less is a rounding of floats.
    worst = np.round(np.abs(rounded / exact - 1.0).max(axis=1), 9)
    best = len(tops) - 1 - int(np.argmin(worst[::-1]))
    result = np.zeros(len(weights), np.int64)
    result[used] = rounded[best]
    return result
