"""The results of a comparison as plain data, filled by :func:`lbgym.evaluation.compare` or from a testbed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UnknownNameError
from .contenders import Contender
from .statistics import HISTOGRAM_EDGES, Difference, Interval, mean_interval, paired_difference
from .tables import HEADINGS, Table, difference_table, metrics_table, versus_table

#: Metrics of a run and their units. Less is better for all but ``jain``.
METRICS = {
    "fct_mean": "s",
    "fct_p50": "s",
    "fct_p90": "s",
    "fct_p99": "s",
    "fct_p999": "s",
    "jain": "",
    "rejected_share": "",
}
#: Counts of flows, by how they ended.
COUNTS = ("flows", "completed", "rejected", "failed", "unrouted", "open")


@dataclass(frozen=True, slots=True)
class RunSettings:
    """The settings that all runs of a comparison share; see :func:`lbgym.evaluation.compare`."""

    duration: float
    warmup: float
    drain: float
    interval: float | None = None
    keep_flows: bool = False


@dataclass(frozen=True, slots=True)
class Series:
    """Time series of a run, at every control step from 0 to ``duration``.

    Attributes:
        time: float64[T], seconds.
        open_flows: float32[T, N], flows in each server.
        weights: float32[T, N], balancer 0's weights from that instant on; the mean over active servers is 1.
        active: bool[T, N].
    """

    time: NDArray[np.float64]
    open_flows: NDArray[np.float32]
    weights: NDArray[np.float32]
    active: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Run:
    """The result of one contender on one seed.

    Attributes:
        label, seed: contender and seed.
        dispatch: the dispatch rule that placed the flows.
        metrics: ``METRICS``, and ``COUNTS`` as whole numbers; NaN if not measured.
        utilization: float64[N], busy time of each server's usable cores from the warm-up to the end; NaN for a server
            that the seed's scenario does not have, or that was not measured.
        histogram: counts of FCTs; see :func:`lbgym.evaluation.statistics.fct_histogram`.
        series: if asked for.
        flows: every flow that counts, in order of arrival, if kept: ``flow_id``, ``arrival``, ``fct``, ``demand``,
            ``server``, ``balancer``, ``status`` (0 completed, 1 rejected, 2 failed, 3 unrouted, 4 open at the end).
    """

    label: str
    seed: int
    dispatch: str
    metrics: dict[str, float]
    utilization: NDArray[np.float64]
    histogram: NDArray[np.int64]
    series: Series | None = None
    flows: dict[str, NDArray[Any]] | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Conditions:
    """The conditions of all runs of one seed; None where unknown, as on a testbed.

    Attributes:
        servers: how many.
        capacity: core-seconds per second.
        rate: flows per second.
        load: offered work over the capacity.
    """

    servers: int
    capacity: float | None = None
    rate: float | None = None
    load: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Contenders, seeds and the runs of every contender on every seed.

    Printed, it is a table of the metrics and one of the differences from the baseline.

    Attributes:
        scenario: name of what was run.
        balancers: how many.
        conditions: of each seed, in the order of the seeds.
        contenders: in the order they were given.
        seeds: in order; the same seed is the same flows for every contender.
        baseline: label of the contender that the others are compared with.
        settings: duration, warm-up and the like.
        runs: of each contender in turn, in the order of the seeds.
        trace: where the flows come from; None if they are synthetic.
        drawn: whether each seed has conditions of its own, drawn from a distribution of scenarios.
    """

    scenario: str
    balancers: int
    conditions: tuple[Conditions, ...]
    contenders: tuple[Contender, ...]
    seeds: tuple[int, ...]
    baseline: str
    settings: RunSettings
    runs: tuple[Run, ...] = field(repr=False)
    trace: str | None = None
    drawn: bool = False

    def __str__(self) -> str:
        tables = [self.table()] + ([self.difference_table()] if len(self.labels) > 1 else [])
        return "\n\n".join(map(str, tables))

    @property
    def labels(self) -> list[str]:
        """The contenders' names."""
        return [contender.label for contender in self.contenders]

    def runs_of(self, label: str) -> list[Run]:
        """A contender's runs, in the order of the seeds.

        Raises:
            UnknownNameError: for a label that did not take part.
        """
        if label not in self._by_label:
            raise UnknownNameError("contender", label, self.labels)
        return self._by_label[label]

    @cached_property
    def _by_label(self) -> dict[str, list[Run]]:
        return {label: [run for run in self.runs if run.label == label] for label in self.labels}

    def values(self, label: str, metric: str) -> NDArray[np.float64]:
        """A metric or count of a contender, one value per seed.

        Raises:
            UnknownNameError: for an unknown label or metric.
        """
        if metric not in METRICS and metric not in COUNTS:
            raise UnknownNameError("metric", metric, (*METRICS, *COUNTS))
        return np.array([run.metrics[metric] for run in self.runs_of(label)])

    def interval(self, label: str, metric: str) -> Interval:
        """Mean over the seeds of a metric, with its 95 % confidence interval."""
        return mean_interval(self.values(label, metric))

    def difference(self, label: str, metric: str, baseline: str | None = None) -> Difference:
        """Difference from the baseline (or another contender), paired by seed, with its 95 % confidence interval."""
        return paired_difference(self.values(label, metric), self.values(baseline or self.baseline, metric))

    def fct_ccdf(self, label: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """FCTs (s) and the share of flows that took longer, over all seeds; exact to 1 % of the FCT."""
        counts = np.sum([run.histogram for run in self.runs_of(label)], axis=0)
        longer = 1 - np.cumsum(counts)[:-1] / counts.sum()
        return HISTOGRAM_EDGES, longer

    def to_dict(self) -> dict[str, Any]:
        """Return everything but flows and time series as plain data; None where unknown.

        Where each seed has its own conditions, the scenario's are None and those of the seeds are in ``draws``.
        """
        from .. import __version__

        first = self.conditions[0]
        shared = [None] * 4 if self.drawn else [first.servers, first.capacity, first.rate, first.load]
        servers, capacity, rate, load = shared
        scenario: dict[str, Any] = {
            "name": self.scenario,
            "servers": servers,
            "balancers": self.balancers,
            "capacity": capacity,
            "rate": rate,
            "load": load,
            "trace": self.trace,
        }
        if self.drawn:
            scenario["draws"] = [
                {"seed": seed, "servers": c.servers, "capacity": c.capacity, "rate": c.rate, "load": c.load}
                for seed, c in zip(self.seeds, self.conditions, strict=True)
            ]
        return {
            "lbgym": __version__,
            "scenario": scenario,
            "settings": {
                "duration": self.settings.duration,
                "warmup": self.settings.warmup,
                "drain": self.settings.drain,
                "interval": self.settings.interval,
                "confidence": 0.95,
            },
            "seeds": list(self.seeds),
            "baseline": self.baseline,
            "contenders": [self._contender_dict(contender) for contender in self.contenders],
        }

    def _contender_dict(self, contender: Contender) -> dict[str, Any]:
        label = contender.label
        runs = self.runs_of(label)
        return {
            "label": label,
            "dispatch": ", ".join(dict.fromkeys(run.dispatch for run in runs)),
            "policy": contender.path or contender.policy,
            "metrics": {name: self.interval(label, name).to_dict() for name in METRICS},
            "versus_baseline": {name: self.difference(label, name).to_dict() for name in METRICS},
            "runs": [{"seed": run.seed, **_plain(run.metrics)} for run in runs],
        }

    def table(self) -> Table:
        """Every metric of every contender: mean over the seeds ± half width of its 95 % confidence interval."""
        return metrics_table(self, METRICS)

    def difference_table(self) -> Table:
        """The paired differences from the baseline ± half widths of their 95 % confidence intervals."""
        return difference_table(self, METRICS)

    def versus_table(self, label: str) -> Table:
        """The paired differences of one contender from each of the others.

        Raises:
            UnknownNameError: for a label that did not take part.
        """
        self.runs_of(label)
        return versus_table(self, METRICS, label)

    def verdict(self, label: str, metrics: Sequence[str] = ("fct_mean", "fct_p99")) -> str:
        """One sentence: which contenders this one beats on every metric, judged by the 95 % intervals."""
        names = " and ".join(HEADINGS[metric] for metric in metrics)
        others = [other for other in self.labels if other != label]
        better, rest = [], []
        for other in others:
            differences = {m: self.difference(label, m, other).relative for m in metrics}
            if all(d.high < 0 for d in differences.values()):
                better.append(other)
            else:
                shown = (f"{HEADINGS[m]} {_percent(d)}" for m, d in differences.items())
                rest.append(f"{other} ({', '.join(shown)})")
        parts = []
        if better:
            parts.append(f"{label} has a lower {names} FCT than {', '.join(better)}: every 95 % interval is below 0.")
        if rest:
            parts.append(f"{label} is not shown to have a lower {names} FCT than {', '.join(rest)}.")
        return " ".join(parts)


def _percent(interval: Interval) -> str:
    """With its half width, where more than one seed gives it one."""
    half = f" ±{interval.half_width:.1f}" if np.isfinite(interval.half_width) else ""
    return f"{interval.mean:+.1f}{half} %"


def _plain(metrics: dict[str, float]) -> dict[str, float | int | None]:
    return {name: value if np.isfinite(value) else None for name, value in metrics.items()}
