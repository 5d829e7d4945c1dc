"""Feedback controllers: weights that move until the servers' signals agree, without a model of the servers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...checks import number, seconds
from ...errors import PolicyError
from ...snapshot import DEFAULT_STEP_INTERVAL
from ..base import WeightPolicy, check_features
from ._estimates import FCT, FCT_NAME, LEAST_FCT, OPEN_FLOWS, OPEN_FLOWS_NAME, SPREAD, News, mean_of, relative, steps_in


class AIMDWeights(WeightPolicy):
    """Additive increase, multiplicative decrease of each weight, by the server's FCT against the fleet's median.

    With L_j the decayed mean FCT, every ``period``: w_j <- w_j + a where L_j is at most ``tolerance`` times the median
    of the servers, w_j <- b w_j where it is more; then all are scaled to a mean of 1. The law is that of D. Chiu and
    R. Jain, "Analysis of the increase and decrease algorithms for congestion avoidance in computer networks", 1989; to
    set the weights of servers by it is our own construction. A server from which no flow came back meanwhile keeps its
    weight.

    Args:
        increase: a, per period, in units of the mean weight.
        decrease: b, in (0, 1).
        tolerance: target over the median FCT.
        period: seconds.
        step_interval: seconds between two steps.
    """

    uses_features: tuple[str, ...] = (FCT_NAME,)

    def __init__(
        self,
        increase: float = 0.05,
        decrease: float = 0.7,
        tolerance: float = 1.2,
        period: float = 1.0,
        step_interval: float = DEFAULT_STEP_INTERVAL,
    ) -> None:
        self._increase = number("increase", increase, above=0.0, error=PolicyError)
        self._decrease = number("decrease", decrease, above=0.0, high=1.0, error=PolicyError)
        self._tolerance = number("tolerance", tolerance, above=0.0, error=PolicyError)
        step = seconds("step_interval", step_interval, error=PolicyError)
        self._period = steps_in(seconds("period", period, error=PolicyError), step)
        self._news = News()
        self.reset()

    def reset(self, seed: int | None = None) -> None:
        """Go back to equal weights."""
        self._news.reset()
        self._steps = 0
        self._weights: NDArray[np.float64] | None = None

    def weights(self, features: NDArray[Any], active: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Shapes as in :meth:`WeightPolicy.weights`."""
        fct = check_features(self, features, active)[..., FCT]
        if self._weights is None or self._weights.shape != active.shape:
            self._steps, self._weights = 0, np.ones(active.shape)
            self._heard = np.zeros(active.shape, dtype=np.bool_)
        self._heard |= self._news(fct)
        self._steps += 1
        if self._steps % self._period == 0:
            known = (fct > 0) & active
            target = self._tolerance * _median(fct, known)
            moved = np.where(fct <= target, self._weights + self._increase, self._weights * self._decrease)
            self._weights = relative(np.where(known & self._heard, moved, self._weights), active)
            self._heard = np.zeros(active.shape, dtype=np.bool_)
        return self._weights.copy()


class Gradient2Weights(WeightPolicy):
    """Each server's concurrency limit as its weight, from the gradient of its latency.

    The law of ``Gradient2Limit`` in Netflix's concurrency-limits, for every server on its own. With *short* the present
    FCT and *long* its exponential mean over ``window`` samples (the plain mean of the first ten), at every sample:

        long  <- 0.95 long                                    where long is more than twice short,
        g      = min(1, max(1/2, tolerance long / short)),
        limit <- 0.8 limit + 0.2 (limit g + queue)            within [minimum, maximum],

    but for a server with fewer open flows than half its limit, whose limit stays. The sample is the decayed mean FCT of
    a step in which a flow came back.

    Netflix's defaults (queue 4, limits from 20 to 200) are made for the requests of a whole service; those here are for
    the flows that one balancer has open at one server.

    Args:
        tolerance: growth of the FCT that is no reason to lower the limit.
        queue: flows that may wait.
        initial, minimum, maximum: limits, flows.
        window: samples.
    """

    uses_features: tuple[str, ...] = (OPEN_FLOWS_NAME, FCT_NAME)

    def __init__(
        self,
        tolerance: float = 1.5,
        queue: float = 1.0,
        initial: float = 4.0,
        minimum: float = 1.0,
        maximum: float = 200.0,
        window: int = 600,
    ) -> None:
        self._tolerance = number("tolerance", tolerance, above=0.0, error=PolicyError)
        self._queue = number("queue", queue, above=0.0, error=PolicyError)
        self._minimum = number("minimum", minimum, above=0.0, error=PolicyError)
        self._maximum = number("maximum", maximum, low=self._minimum, error=PolicyError)
        self._initial = number("initial", initial, low=self._minimum, high=self._maximum, error=PolicyError)
        self._kept = 1 - 2 / (number("window", window, low=1.0, error=PolicyError) + 1)
        self._news = News()
        self.reset()

    def reset(self, seed: int | None = None) -> None:
        """Go back to the initial limits."""
        self._news.reset()
        self._limit: NDArray[np.float64] | None = None

    def weights(self, features: NDArray[Any], active: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Shapes as in :meth:`WeightPolicy.weights`."""
        features = check_features(self, features, active)
        fct, inflight = features[..., FCT], features[..., OPEN_FLOWS]
        if self._limit is None or self._limit.shape != active.shape:
            self._limit = np.full(active.shape, self._initial)
            self._long, self._samples = np.zeros(active.shape), np.zeros(active.shape)
        sampled = self._news(fct) & (fct > 0)
        self._samples = self._samples + sampled
        # The plain mean of the first ten, then exponential.
        kept = np.where(self._samples <= 10, 1 - 1 / np.maximum(self._samples, 1), self._kept)
        long = np.where(sampled, kept * self._long + (1 - kept) * fct, self._long)
        short = np.where(sampled, np.maximum(fct, LEAST_FCT), 1.0)
        gradient = np.clip(self._tolerance * long / short, 0.5, 1.0)
        self._long = np.where(sampled & (long > 2 * short), 0.95 * long, long)
        limit = np.clip(self._limit * (0.8 + 0.2 * gradient) + 0.2 * self._queue, self._minimum, self._maximum)
        self._limit = np.where(sampled & (inflight >= self._limit / 2), limit, self._limit)
        return relative(self._limit, active)


class PIDWeights(WeightPolicy):
    """A PID controller per server that brings the servers' FCTs together.

    With u_j the decayed mean FCT over the mean of the servers and e_j = mean(u) - u_j, at every step of T seconds:

        w_j <- w_j + T (Kp e_j + Ki ∫ e_j dt + Kd de_j/dt)

    with the integral held within ``windup`` and the weights scaled to a mean of 1. The shape of the controller is that
    of Dropbox's Robinhood, which equalises the servers' utilization (:class:`PIDCPUWeights`); a balancer sees FCTs
    alone. A server from which no flow has come back yet has no error.

    Args:
        proportional, integral, derivative: Kp, Ki, Kd, per second of control.
        windup: bound of the integral, seconds.
        step_interval: T, seconds.
    """

    uses_features: tuple[str, ...] = (FCT_NAME,)

    def __init__(
        self,
        proportional: float = 0.2,
        integral: float = 0.01,
        derivative: float = 0.05,
        windup: float = 10.0,
        step_interval: float = DEFAULT_STEP_INTERVAL,
    ) -> None:
        self._gains = tuple(
            number(name, gain, low=0.0, error=PolicyError)
            for name, gain in (("proportional", proportional), ("integral", integral), ("derivative", derivative))
        )
        self._windup = seconds("windup", windup, error=PolicyError)
        self._step = seconds("step_interval", step_interval, error=PolicyError)
        self.reset()

    def reset(self, seed: int | None = None) -> None:
        """Go back to equal weights."""
        self._weights: NDArray[np.float64] | None = None

    def weights(self, features: NDArray[Any], active: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Shapes as in :meth:`WeightPolicy.weights`."""
        signal, known = self._signal(check_features(self, features, active), active)
        error = np.where(known, mean_of(signal, known) - signal, 0.0)
        if self._weights is None or self._weights.shape != active.shape:
            self._weights, self._integral, self._error = np.ones(active.shape), np.zeros(active.shape), error
        self._integral = np.clip(self._integral + error * self._step, -self._windup, self._windup)
        proportional, integral, derivative = self._gains
        push = proportional * error + integral * self._integral + derivative * (error - self._error) / self._step
        self._error = error
        moved = np.clip(self._weights + self._step * push, 1 / SPREAD, SPREAD)
        self._weights = relative(moved, active)
        return self._weights.copy()

    def _signal(
        self, features: NDArray[np.float64], active: NDArray[np.bool_]
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """The signal to equalise, and for which servers it is known."""
        fct = features[..., FCT]
        known = (fct > 0) & active
        mean = mean_of(fct, known)
        return fct / np.where(mean > 0, mean, 1.0), known


def _median(values: NDArray[np.float64], known: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Median of the known values along the last axis, which is kept; 0 where none is known."""
    count = known.sum(axis=-1, keepdims=True)
    ordered = np.sort(np.where(known, values, np.inf), axis=-1)
    middle = np.take_along_axis(ordered, np.maximum(count - 1, 0) // 2, axis=-1)
    other = np.take_along_axis(ordered, np.minimum(count // 2, ordered.shape[-1] - 1), axis=-1)
    return np.where(count > 0, (middle + other) / 2, 0.0)
