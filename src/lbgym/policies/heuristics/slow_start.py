"""Slow start: servers that join get their share little by little."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...checks import number, seconds
from ...errors import PolicyError
from ...snapshot import DEFAULT_STEP_INTERVAL
from ..base import WeightPolicy


class SlowStartWeights(WeightPolicy):
    """Another policy's weights, reduced for a while on servers that have just become active.

    Envoy's slow start: t seconds after a server became active, and until ``window``, its weight is multiplied by

        max(least_share, (max(t, 1) / window) ** (1 / aggression)).

    Servers that are active at the first step count as established: it is the balancer that has just started.

    Args:
        policy: sets the weights.
        window: seconds.
        aggression: above 0; above 1 the weight rises faster at first.
        least_share: in (0, 1]; Envoy's ``min_weight_percent``.
        step_interval: seconds between two steps.
    """

    def __init__(
        self,
        policy: WeightPolicy,
        window: float = 10.0,
        aggression: float = 1.0,
        least_share: float = 0.1,
        step_interval: float = DEFAULT_STEP_INTERVAL,
    ) -> None:
        self.policy = policy
        self.uses_features = policy.uses_features
        self.uses_ground_truth, self.sets_background = policy.uses_ground_truth, policy.sets_background
        self._window = seconds("window", window, error=PolicyError)
        self._exponent = 1 / number("aggression", aggression, above=0.0, error=PolicyError)
        self._least = number("least_share", least_share, above=0.0, high=1.0, error=PolicyError)
        self._step = seconds("step_interval", step_interval, error=PolicyError)
        self._age: NDArray[np.float64] | None = None

    def reset(self, seed: int | None = None) -> None:
        """Forget when the servers became active; reset the policy."""
        self.policy.reset(seed)
        self._age = None

    def weights(self, features: NDArray[Any], active: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Shapes as in :meth:`WeightPolicy.weights`."""
        weights = self.policy.weights(features, active)
        self.background = self.policy.background
        if self._age is None or self._age.shape != active.shape:
            self._age = np.where(active, self._window, -self._step)
        else:
            self._age = np.where(active, self._age + self._step, -self._step)
        share = np.maximum(self._least, (np.maximum(self._age, 1.0) / self._window) ** self._exponent)
        return np.where(active & (self._age < self._window), weights * np.minimum(share, 1.0), weights)
