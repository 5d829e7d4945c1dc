"""Weights that look at nothing: static, uniform, random."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import InvalidWeightsError, PolicyError
from ..base import WeightPolicy, check_features


class StaticWeights(WeightPolicy):
    """The same weights always.

    Args:
        weights: one per server, finite and above 0.
    """

    def __init__(self, weights: Sequence[float] | NDArray[Any]) -> None:
        values = np.array(weights, dtype=np.float64)
        if values.ndim != 1 or not len(values) or not np.isfinite(values).all() or (values <= 0).any():
            raise InvalidWeightsError(f"static weights must be one finite number above 0 per server, got {weights!r}")
        self._weights = values

    def weights(self, features: NDArray[Any], active: NDArray[np.bool_]) -> NDArray[np.float64]:
        """The given weights; shapes as in :meth:`WeightPolicy.weights`."""
        check_features(self, features, active)
        if active.shape[-1] != len(self._weights):
            raise PolicyError(f"{len(self._weights)} static weights do not fit {active.shape[-1]} servers")
        return np.broadcast_to(self._weights, active.shape).copy()


class UniformWeights(WeightPolicy):
    """Equal weights: all that a balancer can do without any knowledge."""

    def weights(self, features: NDArray[Any], active: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Ones; shapes as in :meth:`WeightPolicy.weights`."""
        check_features(self, features, active)
        return np.ones(active.shape)


class RandomWeights(WeightPolicy):
    """New weights at every step, log-uniform in [low, high], as from an untrained agent.

    The baseline that a learned policy must beat under the same dispatch rule.

    Args:
        low, high: bounds, above 0. The default is the range of the default discrete actions.
        seed: of the stream of weights, which :meth:`reset` without a seed does not rewind.
    """

    def __init__(self, low: float = 1.0, high: float = 2.0, seed: int | None = None) -> None:
        if not (0 < low <= high and np.isfinite(high)):
            raise InvalidWeightsError(f"random weights need 0 < low <= high, got low={low!r} and high={high!r}")
        self._low, self._high = np.log(low), np.log(high)
        self._rng = np.random.default_rng(seed)

    def reset(self, seed: int | None = None) -> None:
        """Restart the stream from ``seed`` if given."""
        if seed is not None:
            self._rng = np.random.default_rng(seed)

    def weights(self, features: NDArray[Any], active: NDArray[np.bool_]) -> NDArray[np.float64]:
        """A fresh draw; shapes as in :meth:`WeightPolicy.weights`."""
        check_features(self, features, active)
        return np.exp(self._rng.uniform(self._low, self._high, active.shape))
