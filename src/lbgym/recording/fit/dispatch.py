"""The dispatch rule that placed the flows of a recording: :func:`estimate_dispatch`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .counts import Counts

#: Rules that are told apart, by preference where weights are equal and some of them are the same.
RULES = ("sed", "wcmp", "p2c_sed", "lsq", "p2c")
#: Fewest flows that are evidence.
FEWEST = 100
#: Share of flows that any rule may have placed otherwise: counters and weights are read at slightly different instants.
_NOISE = 0.1


@dataclass(frozen=True, slots=True)
class DispatchEstimate:
    """The likeliest rule.

    Attributes:
        rule: its name.
        flows: flows that were evidence; with fewer than ``FEWEST`` the rule is assumed.
        scores: mean log-likelihood of a flow's server by rule.
    """

    rule: str
    flows: int
    scores: dict[str, float]


def estimate_dispatch(counts: Counts) -> DispatchEstimate:
    """Compare rules by the flows that arrived alone in an interval.

    What ended in the interval did so before the flow or after it, which is as likely.
    """
    alone = (counts.arrivals == 1) & (counts.unrouted == 0)
    k = int(alone.sum())
    recording, rows = counts.recording, counts.rows[alone]
    if k < FEWEST:
        return DispatchEstimate(RULES[0], k, {})
    first, server = counts.before[alone], counts.started[alone].argmax(axis=1)
    # The flow itself is among those that started, and may be among those that ended.
    last = np.maximum(first - (counts.completed + counts.lost)[alone], 0)
    weights = np.where(recording.active[rows], recording.weights[rows], 0.0)
    n = np.maximum((weights > 0.0).sum(axis=1), 1)
    scores = {}
    for rule in RULES:
        likely = (_probabilities(rule, first, weights) + _probabilities(rule, last, weights)) / 2.0
        share = (1.0 - _NOISE) * likely[np.arange(k), server] + _NOISE / n
        scores[rule] = float(np.log(share).mean())
    best = max(scores.values())
    return DispatchEstimate(next(rule for rule in RULES if scores[rule] > best - 1e-9), k, scores)


def _probabilities(rule: str, q: NDArray[np.int64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Probability that a rule sends a flow to each server, float64[K, N]."""
    there = weights > 0.0
    if rule == "wcmp":
        return weights / np.maximum(weights.sum(axis=1, keepdims=True), 1e-300)
    with np.errstate(divide="ignore"):
        score = np.where(there, q if rule in ("lsq", "p2c") else (q + 1.0) / weights, np.inf)
    if rule in ("sed", "lsq"):
        least = there & (score <= score.min(axis=1, keepdims=True) * (1.0 + 1e-9))
        result: NDArray[np.float64] = least / np.maximum(least.sum(axis=1, keepdims=True), 1)
        return result
    # The better of two different servers, drawn alike: each beats those that score more, and half of its equals.
    n = there.sum(axis=1, keepdims=True)
    worse = (score[:, None, :] > score[:, :, None]) & there[:, None, :]
    equal = (score[:, None, :] == score[:, :, None]) & there[:, None, :]
    wins = worse.sum(axis=2) + (equal.sum(axis=2) - 1) / 2.0
    return np.where(there, wins / np.maximum(n * (n - 1) / 2.0, 1.0), 0.0)
