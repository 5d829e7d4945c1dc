"""Weights by rule: static, from the cores, random, from busy workers, from latency, from Little's law."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidWeightsError, PolicyError
from ..features.columns import GROUND_TRUTH_NAMES, NUM_FEATURES, column_index
from .base import WeightPolicy, check_features

_OPEN_FLOWS = column_index("n_flow_on")
_FCT = column_index("fct_mean_decay")
# Seconds; no quotient overflows for a flow that took no time at all.
_LEAST_FCT = 1e-9
_BUSY = NUM_FEATURES + GROUND_TRUTH_NAMES.index("busy_workers")

#: A learned weight stays within this factor of the servers' mean, so that one bad estimate cannot starve a server
#: (which would then never show that it is well again) nor bury it.
SPREAD = 10.0


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
        return self._base.weights(features, active) / (features[..., _BUSY] + 1.0)


class _Trust:
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
        self._fct: NDArray[np.float64] | None = None
        self._since = self._news = np.zeros(0)

    def __call__(self, fct: NDArray[np.float64]) -> NDArray[np.float64]:
        """Trust in [0, 1] per server after a step that shows ``fct``."""
        if self._fct is None or self._fct.shape != fct.shape:
            self._fct = self._since = self._news = np.zeros(fct.shape)
        news = fct != self._fct
        self._since = np.where(news, 0.0, self._since + 1)
        self._news = self._news + news
        self._fct = fct.copy()
        return 0.5 ** (self._since / self._half_life) * (1 - 0.5 ** (self._news / self._evidence))


class LatencyWeights(WeightPolicy):
    """Weights in inverse proportion to the decayed mean FCT.

    A server from which no flow has come back yet gets the mean weight of the others; a weight departs from it as flows
    confirm it, and returns to it when none does.

    Args:
        smoothing: share of the former weight (its logarithm) that a step keeps, in [0, 1). Without it the balancer
            chases its own tail: the FCTs it reads are those of flows it placed by its former weights.
        exponent: weights are FCT to the power of minus this; 0 is uniform.
        half_life: steps without a flow coming back until the logarithm of a weight is halved.
    """

    def __init__(self, smoothing: float = 0.9, exponent: float = 1.0, half_life: float = 20.0) -> None:
        self._smoothing = _share(smoothing)
        self._exponent = exponent
        self._trust = _Trust(half_life)
        self.reset()

    def reset(self, seed: int | None = None) -> None:
        """Forget the former weights."""
        self._trust.reset()
        self._log: NDArray[np.float64] | None = None

    def weights(self, features: NDArray[Any], active: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Shapes as in :meth:`WeightPolicy.weights`."""
        fct = check_features(self, features, active)[..., _FCT]
        known = fct > 0
        raw = np.where(known, np.maximum(fct, _LEAST_FCT), 1.0) ** -self._exponent
        new = np.log(_relative(raw, known & active))
        if self._log is not None and self._log.shape == new.shape:
            new = self._smoothing * self._log + (1 - self._smoothing) * new
        self._log = new
        return np.exp(new * self._trust(fct))


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
        self._smoothing = _share(smoothing)
        self._trust = _Trust(half_life)
        self.reset()

    def reset(self, seed: int | None = None) -> None:
        """Forget the flows seen."""
        self._trust.reset()
        self._sum: NDArray[np.float64] | None = None
        self._total = 0.0

    def weights(self, features: NDArray[Any], active: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Shapes as in :meth:`WeightPolicy.weights`."""
        features = check_features(self, features, active)
        if self._sum is None or self._sum.shape != active.shape:
            self._sum, self._total = np.zeros(active.shape), 0.0
        # A weighted mean from the first step on, not one that starts at 0.
        self._sum = self._smoothing * self._sum + (1 - self._smoothing) * features[..., _OPEN_FLOWS]
        self._total = self._smoothing * self._total + (1 - self._smoothing)
        fct = features[..., _FCT]
        known = fct > 0
        met = self._balancers * self._sum / self._total + 1
        capacity = np.maximum(met, self._cores.weights(features, active)) / np.where(
            known, np.maximum(fct, _LEAST_FCT), 1.0
        )
        return _relative(capacity, known & active) ** self._trust(fct)


def _share(smoothing: float) -> float:
    if not 0 <= smoothing < 1:
        raise PolicyError(f"smoothing must be at least 0 and below 1, got {smoothing!r}")
    return float(smoothing)


def _relative(values: NDArray[np.float64], known: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Values over the mean of the known ones, within ``SPREAD`` of it; 1 where unknown."""
    count = known.sum(axis=-1, keepdims=True)
    mean = np.where(known, values, 0.0).sum(axis=-1, keepdims=True) / np.maximum(count, 1)
    relative = np.where(known, values, 1.0) / np.where(mean > 0, mean, 1.0)
    return np.where(known, np.clip(relative, 1 / SPREAD, SPREAD), 1.0)
