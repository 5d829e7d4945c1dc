"""The law of demands without a formula, from the FCTs of single flows: :func:`unfold`.

Where exactly one flow ended between two rows, the sum of FCTs shows its own. Such FCTs are not demands: flows share
their servers, and short ones are alone more often. Simulated ones are distorted alike, and of those the demands are
known. So the law is found by unfolding: expectation maximization over a histogram of demands, with the twin's response
to each (L. B. Lucy, AJ 79, 1974; G. D'Agostini, NIM A 362, 1995), which is simulated anew under the law so found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...scenarios import Demand, Empirical, Scenario
from .counts import Counts
from .replay import quantiles, replay_flows

_MILLISECOND = 1e-3
#: Fewest single flows that a law is made of.
FEWEST = 300
#: Values of a law.
_VALUES = 400
#: Simulations of the response, steps of expectation maximization after each, and bins of demands and of FCTs.
_ROUNDS, _STEPS, _BINS = 4, 60, 120
#: Simulated flows of nearly the same demand that a response is made of.
_NEIGHBOURS = 300
#: The width, in logarithms, that a density is smoothed to, since speeds are off by a few percent; and the part of it
#: that is spread over all.
_SMOOTHING, _SPREAD = 0.1, 0.01


@dataclass(frozen=True, slots=True)
class Stopwatch:
    """How FCTs are measured.

    Attributes:
        overhead: seconds of each FCT that no server works on.
        resolution: seconds that FCTs are rounded down to a multiple of, as proxies log them; 0: not rounded.
    """

    overhead: float = 0.0
    resolution: float = 0.0

    def measured(self, relative: NDArray[np.float64], rates: NDArray[np.float64]) -> NDArray[np.float64]:
        """Measure times at servers; 0 for what is shorter than the resolution.

        All are in mean service times of a flow's server, of which there are ``rates`` in a second.
        """
        if not self.resolution:
            return relative + self.overhead * rates
        # A sum of times in floating point is off by far less than this.
        steps = np.floor((relative / rates + self.overhead) / self.resolution + 1e-6)
        measured: NDArray[np.float64] = steps * self.resolution * rates
        return measured


def single_flows(counts: Counts) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """FCTs of flows that ended alone between two rows, float64[S], seconds, and their servers, int64[S]."""
    recording, rows = counts.recording, counts.rows
    known = recording.fct_count[rows] - recording.fct_count[rows - 1]
    alone = (known == 1) & (counts.completed.sum(axis=1) == 1) & (counts.lost.sum(axis=1) == 0)
    seconds = 1e-9 * (recording.fct_sum[rows] - recording.fct_sum[rows - 1])
    alone &= seconds > 0.0
    return seconds[alone], counts.completed[alone].argmax(axis=1)


def resolution_of(seconds: NDArray[np.float64]) -> float:
    """The resolution of measured FCTs: a millisecond, or 0 for a finer one."""
    steps = seconds / _MILLISECOND
    rounded = len(steps) > 0 and np.abs(steps - np.rint(steps)).max() < 1e-3
    return _MILLISECOND if rounded else 0.0


def unfold(
    twin: Scenario,
    counts: Counts,
    start: Demand,
    singles: NDArray[np.float64],
    stopwatch: Stopwatch,
    warmup: float,
    seed: int,
) -> Empirical:
    """The law under which single flows have the recorded FCTs; its mean is that of ``start``.

    Args:
        twin: the estimated cluster.
        counts: the intervals in which the flows were recorded.
        start: law to begin with.
        singles: float64[S], FCTs of :func:`single_flows` in mean service times of their servers.
        stopwatch: that measured them.
        warmup: seconds at the beginning whose simulated flows do not count.
        seed: of the simulation.
    """
    normal = np.random.default_rng(seed).standard_normal(int(counts.arrivals.sum()))
    # Logarithms of demands and of FCTs, both in mean service times; sharing makes FCTs longer.
    edges = np.linspace(np.log(singles.min()) - 2.0, np.log(singles.max()) + 0.1, _BINS + 1)
    seen, _ = np.histogram(np.log(singles), bins=edges)
    law: Demand = start
    share = np.full(_BINS, 1.0 / _BINS)
    for _ in range(_ROUNDS):
        flows = replay_flows(twin, counts, quantiles(law, normal), seed)
        response = _response(_ended(twin, counts, flows, start.mean, warmup), stopwatch, edges)
        seen_at_all = response.sum(axis=0)
        for _ in range(_STEPS):
            expected = response @ share
            ratio = np.divide(seen, expected, out=np.zeros(_BINS), where=expected > 0.0)
            share = share * np.divide(ratio @ response, seen_at_all, out=np.zeros(_BINS), where=seen_at_all > 0.0)
            share = np.convolve(share, (0.02, 0.96, 0.02), mode="same")
            share = _with_mean(np.exp((edges[:-1] + edges[1:]) / 2.0), share)
        law = _drawn(edges, share, start.mean)
    assert isinstance(law, Empirical)
    return law


def _response(ended: Ended, stopwatch: Stopwatch, edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """The probability that a flow of a demand is seen alone with an FCT: float64[FCT, demand].

    Few flows have quite the demand of a bin. Those of the nearest ones are slowed down nearly alike.
    """
    order = np.argsort(ended.demand)
    demand, slowdown = ended.demand[order], (ended.relative / ended.demand)[order]
    rates, alone = ended.rates[order], ended.alone[order]
    width = edges[1] - edges[0]
    response = np.zeros((_BINS, _BINS))
    for k, middle in enumerate(np.exp((edges[:-1] + edges[1:]) / 2.0)):
        first = int(np.searchsorted(demand, middle)) - _NEIGHBOURS // 2
        near = slice(max(0, min(first, len(demand) - _NEIGHBOURS)), max(first, 0) + _NEIGHBOURS)
        seen = alone[near]
        measured = stopwatch.measured(middle * slowdown[near][seen], rates[near][seen])
        bins = np.floor((np.log(measured[measured > 0.0]) - edges[0]) / width).astype(int)
        np.add.at(response[:, k], bins[(bins >= 0) & (bins < _BINS)], 1.0 / max(len(seen), 1))
    return response


def _with_mean(values: NDArray[np.float64], share: NDArray[np.float64]) -> NDArray[np.float64]:
    """The probabilities nearest to ``share``, by relative entropy, under which the mean is 1.

    The mean is known from the servers' speeds, and a few long flows, of which little is known, make most of it.
    """
    low, high = -40.0 / values[-1], 40.0 / values[-1]
    for _ in range(60):
        tilt = (low + high) / 2.0
        tilted = share * np.exp(-tilt * values)
        tilted /= tilted.sum()
        low, high = (tilt, high) if tilted @ values > 1.0 else (low, tilt)
    return tilted


def _drawn(edges: NDArray[np.float64], share: NDArray[np.float64], mean: float) -> Empirical:
    """A histogram as values of equal probability, each the mean of its part."""
    levels = (np.arange(32 * _VALUES) + 0.5) / (32 * _VALUES)
    fine = np.exp(np.interp(levels, np.concatenate([[0.0], np.cumsum(share)]), edges))
    values = fine.reshape(_VALUES, -1).mean(axis=1)
    return Empirical(values=tuple(float(f"{value:.5g}") for value in mean * values / values.mean()))


@dataclass(frozen=True, eq=False)
class Ended:
    """Simulated flows that ended and count, M of them.

    Attributes:
        demand, relative: float64[M], demands and FCTs in mean service times of their servers.
        rates: float64[M], flows per second that a core of the server completes.
        alone: bool[M], true if no other flow ended between the same two rows.
    """

    demand: NDArray[np.float64]
    relative: NDArray[np.float64]
    rates: NDArray[np.float64]
    alone: NDArray[np.bool_]

    def singles(self, stopwatch: Stopwatch, fixed: float = 0.0) -> NDArray[np.float64]:
        """Measured FCTs of those that ended alone, in mean service times.

        Args:
            stopwatch: that measures them.
            fixed: part of the mean demand that is the same for every flow; the rest is of the simulated law. Each flow
                is slowed down as it was without.
        """
        factor = 1.0 - fixed + fixed / self.demand[self.alone]
        measured = stopwatch.measured(self.relative[self.alone] * factor, self.rates[self.alone])
        return measured[measured > 0.0]


def _ended(twin: Scenario, counts: Counts, flows: dict[str, NDArray[Any]], mean: float, warmup: float) -> Ended:
    """The flows that ended after the warm-up."""
    ends = np.cumsum(counts.seconds)
    done, ended = flows["status"] == 0, flows["arrival"] + flows["fct"]
    interval = np.minimum(np.searchsorted(ends, ended), len(ends))
    alone = (np.bincount(interval, minlength=len(ends) + 1) == 1)[interval]
    counted = done & (ended > warmup) & (interval < len(ends)) & (flows["demand"] > 0.0)
    rates = (np.array([server.speed for server in twin.servers]) / mean)[flows["server"]]
    return Ended(
        demand=flows["demand"][counted] / mean,
        relative=(flows["fct"] * rates)[counted],
        rates=rates[counted],
        alone=alone[counted],
    )


def simulated(
    twin: Scenario, counts: Counts, law: Demand, normal: NDArray[np.float64], warmup: float, seed: int
) -> Ended:
    """Flows of a law, by the twin under the recorded arrivals and weights."""
    flows = replay_flows(twin, counts, quantiles(law, normal), seed)
    return _ended(twin, counts, flows, law.mean, warmup)


def log_likelihood(singles: NDArray[np.float64], simulated: NDArray[np.float64]) -> NDArray[np.float64]:
    """The log-density, over the logarithm of the FCT, of recorded flows by that of simulated ones: float64[S]."""
    if not len(simulated):
        return np.full(len(singles), np.log(_SPREAD))
    logs, others = np.log(singles), np.log(simulated)
    low, high = min(logs.min(), others.min()) - 0.5, max(logs.max(), others.max()) + 0.5
    width = (high - low) / _BINS
    density, _ = np.histogram(others, bins=_BINS, range=(low, high))
    reach = np.arange(-_BINS // 2, _BINS // 2 + 1)
    kernel = np.exp(-0.5 * (reach * width / _SMOOTHING) ** 2)
    smooth = np.convolve(density, kernel / kernel.sum(), mode="same")
    probability = (1.0 - _SPREAD) * smooth / smooth.sum() + _SPREAD / _BINS
    found: NDArray[np.float64] = np.log(probability[np.minimum(((logs - low) / width).astype(int), _BINS - 1)] / width)
    return found
