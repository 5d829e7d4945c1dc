"""Scores of a suite: FCTs over the baseline's on the same flows, and what rliable makes of such numbers.

The aggregates are those of R. Agarwal et al., "Deep reinforcement learning at the edge of the statistical precipice",
NeurIPS 2021, for scores of which less is better. The authors' package, rliable 1.2.0, cannot be used here: it hands a
``random_state`` to arch's bootstrap, which arch 7 refuses, and arch 6 and older are compiled for NumPy 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import ResultError, UnknownNameError
from ..contenders import parse_contender
from ..statistics import CONFIDENCE, mean_interval
from .protocol import Protocol
from .results import SuiteResult

#: The metrics that are scored.
SCORED = ("fct_mean", "fct_p99")
#: Resamples of a bootstrap.
RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its 95 % interval; NaN where one seed gives none."""

    value: float
    low: float
    high: float


class Scores:
    """Scores of contenders of a protocol on the same seeds.

    A score is a contender's FCT of a run over that of the baseline on the same scenario and seed; less is better.

    Args:
        protocol: what was run.
        results: of the baseline and of others, on the same seeds.

    Attributes:
        labels: the contenders, the best geometric mean of the mean FCT first.
        seeds: those of all.

    Raises:
        ResultError: for results of another protocol or other seeds, without all cases, without the baseline, or of
            another contender under its name.
    """

    def __init__(self, protocol: Protocol, results: Sequence[SuiteResult]) -> None:
        self.protocol = protocol
        self.results = {result.label: result for result in results}
        for result in results:
            if result.protocol_hash != protocol.hash:
                raise ResultError(
                    f"the result of {result.label!r} is of protocol {result.protocol} with hash "
                    f"{result.protocol_hash[:12]}..., and this is {protocol.version} with {protocol.hash[:12]}..."
                )
            missing = [name for name in protocol.names if name not in result.runs]
            if missing:
                raise ResultError(f"the result of {result.label!r} lacks {', '.join(missing)}")
        if protocol.baseline not in self.results:
            raise ResultError(
                f"there is no result of the baseline {protocol.baseline!r}: run it, or give its file as well"
            )
        baseline, entry = parse_contender(protocol.baseline), self.results[protocol.baseline].entry
        model = None if baseline.path is None else Path(baseline.path).name
        if (entry.dispatch, entry.policy, entry.model) != (baseline.dispatch, baseline.policy, model):
            raise ResultError(
                f"the result of {entry.label!r} is not of the baseline of that name, but of rule {entry.dispatch!r} "
                f"with {entry.policy or entry.model!r}: leave it out, and run the baseline"
            )
        self.seeds = self.results[protocol.baseline].seeds
        for result in results:
            if result.seeds != self.seeds or not self.seeds:
                raise ResultError(
                    f"the result of {result.label!r} has the seeds {list(result.seeds)}, that of {protocol.baseline!r} "
                    f"{list(self.seeds)}: scores need the same"
                )
        self.labels = sorted(self.results, key=lambda label: self.geometric_mean(label, "fct_mean").value)

    def scores(self, label: str, metric: str) -> NDArray[np.float64]:
        """The score of every run: float64[seeds, cases].

        Raises:
            UnknownNameError: for a contender that is not among the results, or a metric that is not scored.
        """
        if label not in self.results:
            raise UnknownNameError("contender", label, self.results)
        if metric not in SCORED:
            raise UnknownNameError("metric", metric, SCORED)
        names = self.protocol.names
        base = self.results[self.protocol.baseline].values(metric, names)
        return self.results[label].values(metric, names) / base

    def case_means(self, label: str, metric: str) -> NDArray[np.float64]:
        """Geometric mean over the seeds of each case's scores: float64[cases]."""
        return np.exp(np.log(self.scores(label, metric)).mean(axis=0))

    def geometric_mean(
        self, label: str, metric: str, *, versus: str | None = None, family: str | None = None
    ) -> Estimate:
        """Geometric mean over the cases, with its Student-t interval over the seeds.

        Args:
            label: the contender.
            metric: one of ``SCORED``.
            versus: over the scores of this contender on the same flows, instead of the baseline's.
            family: of this family's cases alone.
        """
        logs = np.log(self.scores(label, metric))
        if versus is not None:
            logs = logs - np.log(self.scores(versus, metric))
        if family is not None:
            logs = logs[:, self._members(family)]
        interval = mean_interval(logs.mean(axis=1))
        return Estimate(*(float(np.exp(x)) for x in (interval.mean, interval.low, interval.high)))

    def iqm(self, label: str, metric: str) -> Estimate:
        """Interquartile mean of the scores of all runs, with its stratified bootstrap interval."""
        scores = self.scores(label, metric)
        return _bootstrapped(lambda x: interquartile_mean(x.reshape(*x.shape[:-2], -1)), self._rng(), scores)

    def probability_of_improvement(self, label: str, other: str, metric: str) -> Estimate:
        """The probability that a run of a contender has a lower score than another's on a scenario drawn at random."""
        scores = self.scores(label, metric), self.scores(other, metric)
        return _bootstrapped(probability_of_improvement, self._rng(), *scores)

    def profile(self, label: str, metric: str, limits: NDArray[np.float64]) -> NDArray[np.float64]:
        """Performance profile: the share of runs with a score of at most each limit, and its pointwise 95 % band.

        Args:
            label: the contender.
            metric: one of ``SCORED``.
            limits: float64[L].

        Returns:
            float64[3, L]: share, lower and upper bound.
        """
        scores = self.scores(label, metric)
        drawn = resampled(scores, self._rng(), RESAMPLES // 4).reshape(RESAMPLES // 4, -1)
        ordered = np.sort(drawn, axis=1)
        shares = np.array([np.searchsorted(row, limits, side="right") for row in ordered]) / ordered.shape[1]
        share = (scores.reshape(-1, 1) <= limits).mean(axis=0)
        tail = (1 - CONFIDENCE) / 2
        bounds = np.quantile(shares, [tail, 1 - tail], axis=0)
        return np.stack([share, *(bounds if len(scores) > 1 else np.full_like(bounds, np.nan))])

    def rejected(self, label: str) -> float:
        """Share of flows that were rejected or failed, mean over all runs."""
        return float(self.results[label].values("rejected_share", self.protocol.names).mean())

    def worst(self, label: str, metric: str) -> tuple[str, float]:
        """The case with the highest score, and that score."""
        means = self.case_means(label, metric)
        place = int(means.argmax())
        return self.protocol.names[place], float(means[place])

    def to_dict(self) -> dict[str, Any]:
        """The scores as plain data."""
        rows = [
            {
                "contender": label,
                "knows": self.results[label].entry.knows,
                "rejected_share": self.rejected(label),
                **{
                    metric: {
                        "geometric_mean": _listed(self.geometric_mean(label, metric)),
                        "iqm": _listed(self.iqm(label, metric)),
                        "families": {
                            family: _listed(self.geometric_mean(label, metric, family=family))
                            for family in self.protocol.families
                        },
                        "cases": dict(zip(self.protocol.names, self.case_means(label, metric).tolist(), strict=True)),
                    }
                    for metric in SCORED
                },
            }
            for label in self.labels
        ]
        return {
            "protocol": self.protocol.version,
            "hash": self.protocol.hash,
            "baseline": self.protocol.baseline,
            "seeds": list(self.seeds),
            "complete": self.complete,
            "contenders": rows,
        }

    def _members(self, family: str) -> list[int]:
        if family not in self.protocol.families:
            raise UnknownNameError("family", family, self.protocol.families)
        return [place for place, case in enumerate(self.protocol.cases) if case.family == family]

    @staticmethod
    def _rng() -> np.random.Generator:
        # The same for all: the intervals are the same whenever they are asked for.
        return np.random.default_rng(0)

    @cached_property
    def complete(self) -> bool:
        """True if every result has all runs of the protocol."""
        return all(result.is_complete(self.protocol) for result in self.results.values())


def _listed(estimate: Estimate) -> list[float]:
    return [estimate.value, estimate.low, estimate.high]


def interquartile_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean along the last axis without the lowest and the highest quarter, each rounded down to whole values."""
    count = values.shape[-1]
    cut = count // 4
    middle: NDArray[np.float64] = np.sort(values, axis=-1)[..., cut : count - cut].mean(axis=-1)
    return middle


def probability_of_improvement(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the cases of P(X < Y) + P(X = Y) / 2, X and Y drawn from the runs of a case.

    Args:
        x: float64[..., seeds, cases].
        y: float64[..., seeds, cases].

    Returns:
        float64[...].
    """
    a, b = x[..., :, None, :], y[..., None, :, :]
    better: NDArray[np.float64] = ((a < b) + 0.5 * (a == b)).mean(axis=(-3, -2, -1))
    return better


def resampled(scores: NDArray[np.float64], rng: np.random.Generator, resamples: int) -> NDArray[np.float64]:
    """Stratified bootstrap: the runs of each case drawn anew with replacement, float64[resamples, seeds, cases]."""
    seeds, cases = scores.shape
    chosen = rng.integers(seeds, size=(resamples, seeds, cases))
    return np.take_along_axis(scores[None], chosen, axis=1)


def _bootstrapped(
    statistic: Callable[..., NDArray[np.float64]], rng: np.random.Generator, *scores: NDArray[np.float64]
) -> Estimate:
    """A statistic with its percentile interval from a stratified bootstrap of each of its arguments.

    A single run of each case says nothing of an interval: it is NaN, as a Student-t interval is.
    """
    if len(scores[0]) < 2:
        return Estimate(float(statistic(*scores)), math.nan, math.nan)
    values = []
    # In parts, as pairs of runs take memory.
    for _ in range(10):
        values.append(statistic(*(resampled(part, rng, RESAMPLES // 10) for part in scores)))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.concatenate(values), [tail, 1 - tail])
    return Estimate(float(statistic(*scores)), float(low), float(high))
