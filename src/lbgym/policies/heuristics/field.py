"""The other balancers as a field: :class:`FieldWeights`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...checks import seconds, whole
from ...errors import PolicyError
from ...snapshot import DEFAULT_STEP_INTERVAL
from ..base import WeightPolicy
from ._estimates import OPEN_FLOWS, OPEN_FLOWS_NAME


class FieldWeights(WeightPolicy):
    """Another policy's weights, and as background load what the other balancers hold in the mean.

    By symmetry each of the other m - 1 balancers holds on average what this one does: the background load of a server
    is (m - 1) times the moving average of the own open flows there, which rules that count flows add to the present own
    count. With one balancer it is 0.

    Args:
        policy: sets the weights.
        num_balancers: m.
        time_constant: of the moving average, seconds.
        step_interval: seconds between two steps.
    """

    sets_background = True

    def __init__(
        self,
        policy: WeightPolicy,
        num_balancers: int,
        time_constant: float = 3.0,
        step_interval: float = DEFAULT_STEP_INTERVAL,
    ) -> None:
        self.policy = policy
        self.uses_ground_truth = policy.uses_ground_truth
        self.uses_features = tuple(dict.fromkeys((*policy.uses_features, OPEN_FLOWS_NAME)))
        self._others = whole("num_balancers", num_balancers, error=PolicyError) - 1
        step = seconds("step_interval", step_interval, error=PolicyError)
        self._kept = float(np.exp(-step / seconds("time_constant", time_constant, error=PolicyError)))
        self._mean: NDArray[np.float64] | None = None

    def reset(self, seed: int | None = None) -> None:
        """Forget the flows seen; reset the policy."""
        self.policy.reset(seed)
        self._mean = self.background = None

    def weights(self, features: NDArray[Any], active: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Shapes as in :meth:`WeightPolicy.weights`."""
        weights = self.policy.weights(features, active)
        flows = np.asarray(features, dtype=np.float64)[..., OPEN_FLOWS]
        if self._mean is None or self._mean.shape != flows.shape:
            self._mean = np.zeros(flows.shape)
        self._mean = self._kept * self._mean + (1 - self._kept) * flows
        self.background = self._others * self._mean
        return weights
