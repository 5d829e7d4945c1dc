"""Weights from open flows and flow completion times, by Little's law."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import PolicyError
from ..base import WeightPolicy, check_features
from ._estimates import FCT, FCT_NAME, LEAST_FCT, OPEN_FLOWS, OPEN_FLOWS_NAME, RunningSum, Trust, relative
from .static import StaticWeights, UniformWeights


class LittlesLawWeights(WeightPolicy):
    """Weights in proportion to each server's capacity, estimated from open flows and FCT.

    By Little's law (J. D. C. Little, Operations Research 9(3), 1961) the flows that a balancer has open at a server are
    n = λ T on average, with λ the rate at which it sends flows there and T their mean FCT. So n / T is the server's
    *throughput*, which is useless as a weight: it reproduces the former weights, whatever they were. The weight should
    be what the server *could* carry. On a processor-sharing server of capacity C (flows per second) and utilization
    ρ = λ / C,
    n = ρ / (1 - ρ) and T = 1 / (C (1 - ρ)), for any law of demands, hence exactly

        (n + 1) / T = C

    at every load: the flow that arrives shares the server with the n it finds. With c cores it is slowed only once
    n + 1 exceeds c, so T = max(1, (n + 1) / c) / (speed of a core) but for fluctuations, and the estimate is

        max(n + 1, c) / T = C

    A balancer that is one of m alike has n / m of the flows open, hence ``num_balancers``.

    All this holds in a steady state. From a server whose queue grows only the short flows come back, T stays behind n,
    and the estimate is too high. Dispatch rules that count open flows (``sed``, ``p2c_sed``) relieve such a server
    whatever its weight; under ``wcmp`` nothing does.

    T is the decayed mean FCT, which looks back several seconds; n is smoothed to look back as far, since the ratio of
    an instant to a long mean is mostly noise. A server from which no flow has come back yet gets the mean weight of the
    others; a weight departs from it as flows confirm it, and returns to it when none does.

    Args:
        cores: cores of each server, which an operator knows, or None for one each.
        num_balancers: balancers that share the servers.
        smoothing: share of the former mean of n that a step keeps, in [0, 1). The default forgets as the default
            decayed features do, 0.9 per second, at steps of 0.25 s.
        half_life: steps without a flow coming back until the logarithm of a weight is halved.
    """

    uses_features: tuple[str, ...] = (OPEN_FLOWS_NAME, FCT_NAME)

    def __init__(
        self,
        cores: Sequence[float] | None = None,
        num_balancers: int = 1,
        smoothing: float = 0.9**0.25,
        half_life: float = 20.0,
    ) -> None:
        if num_balancers < 1:
            raise PolicyError(f"num_balancers must be at least 1, got {num_balancers!r}")
        self._cores = StaticWeights(cores) if cores is not None else UniformWeights()
        self._balancers = num_balancers
        self._flows = RunningSum(smoothing)
        self._trust = Trust(half_life)
        self.reset()

    def reset(self, seed: int | None = None) -> None:
        """Forget the flows seen."""
        self._trust.reset()
        self._flows.reset()

    def weights(self, features: NDArray[Any], active: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Shapes as in :meth:`WeightPolicy.weights`."""
        features = check_features(self, features, active)
        flows, total = self._flows(features[..., OPEN_FLOWS])
        fct = features[..., FCT]
        known = fct > 0
        met = self._balancers * flows / total + 1
        capacity = np.maximum(met, self._cores.weights(features, active)) / np.where(
            known, np.maximum(fct, LEAST_FCT), 1.0
        )
        return relative(capacity, known & active) ** self._trust(fct)
