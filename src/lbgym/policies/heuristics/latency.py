"""Weights from flow completion times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...checks import seconds
from ...errors import PolicyError
from ...snapshot import DEFAULT_STEP_INTERVAL
from ..base import WeightPolicy, check_features
from ._estimates import FCT, FCT_NAME, LEAST_FCT, News, Trust, relative, share
from .static import StaticWeights


class LatencyWeights(WeightPolicy):
    """Weights in inverse proportion to the decayed mean FCT.

    A server from which no flow has come back yet gets the mean weight of the others; a weight departs from it as flows
    confirm it, and returns to it when none does.

    With cores the weights are cores over FCT: where a flow finds a core free, its FCT is that of one core.

    Args:
        smoothing: share of the former weight (its logarithm) that a step keeps, in [0, 1). Without it the balancer
            chases its own tail: the FCTs it reads are those of flows it placed by its former weights.
        exponent: weights are FCT to the power of minus this; 0 is uniform.
        half_life: steps without a flow coming back until the logarithm of a weight is halved.
        cores: of each server, which an operator knows; None: as many everywhere.
    """

    uses_features: tuple[str, ...] = (FCT_NAME,)

    def __init__(
        self,
        smoothing: float = 0.9,
        exponent: float = 1.0,
        half_life: float = 20.0,
        cores: Sequence[float] | None = None,
    ) -> None:
        self._cores = None if cores is None else StaticWeights(cores)
        self._smoothing = share(smoothing)
        self._exponent = exponent
        self._trust = Trust(half_life)
        self.reset()

    def reset(self, seed: int | None = None) -> None:
        """Forget the former weights."""
        self._trust.reset()
        self._log: NDArray[np.float64] | None = None

    def weights(self, features: NDArray[Any], active: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Shapes as in :meth:`WeightPolicy.weights`."""
        fct = check_features(self, features, active)[..., FCT]
        known = fct > 0
        raw = np.where(known, np.maximum(fct, LEAST_FCT), 1.0) ** -self._exponent
        new = np.log(relative(raw, known & active))
        if self._log is not None and self._log.shape == new.shape:
            new = self._smoothing * self._log + (1 - self._smoothing) * new
        self._log = new
        weights = np.exp(new * self._trust(fct))
        return weights if self._cores is None else weights * self._cores.weights(features, active)


class PeakEwmaWeights(WeightPolicy):
    """Weights in inverse proportion to a peak-sensitive moving average of the FCT.

    Finagle's ``PeakEwma`` (and tower's ``peak_ewma``): with c the average and w = exp(-Δ/τ) after a time Δ,

        c <- x                      where a sample x is above c,
        c <- c w + x (1 - w)        otherwise, and with x = 0 while no sample comes: a server that is left alone is
                                    forgiven, and tried again.

    It picks the lesser c (q + 1) of two servers with q requests open: exactly ``p2c_sed`` with the weights 1 / c;
    ``sed`` takes the least of all.

    A balancer sees the decayed mean of the FCTs at every step in place of each FCT, and that is the sample here. A
    server from which no flow has come back yet gets the mean weight of the others.

    Args:
        decay: τ, seconds; 10 in Finagle.
        step_interval: seconds between two steps.
    """

    uses_features: tuple[str, ...] = (FCT_NAME,)

    def __init__(self, decay: float = 10.0, step_interval: float = DEFAULT_STEP_INTERVAL) -> None:
        decay, step_interval = (
            seconds("decay", decay, error=PolicyError),
            seconds("step_interval", step_interval, error=PolicyError),
        )
        self._kept = float(np.exp(-step_interval / decay))
        self._news = News()
        self.reset()

    def reset(self, seed: int | None = None) -> None:
        """Forget the average."""
        self._news.reset()
        self._cost: NDArray[np.float64] | None = None

    def weights(self, features: NDArray[Any], active: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Shapes as in :meth:`WeightPolicy.weights`."""
        fct = check_features(self, features, active)[..., FCT]
        cost = self._cost if self._cost is not None and self._cost.shape == fct.shape else np.zeros(fct.shape)
        sample = np.where(self._news(fct), fct, 0.0)
        self._cost = np.where(sample > cost, sample, cost * self._kept + sample * (1 - self._kept))
        known = self._cost > 0
        return relative(1 / np.where(known, np.maximum(self._cost, LEAST_FCT), 1.0), known & active)
