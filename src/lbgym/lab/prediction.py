"""A simulated comparison beside the measured one: :func:`fidelity_table`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from ..errors import MissingExtraError
from ..evaluation import Cell, Comparison, Difference, Interval, Table, Verdict, paired_difference

#: What is predicted.
FIDELITY_METRICS = ("fct_mean", "fct_p99")


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Predicted and measured values of one metric of one contender.

    Attributes:
        label, metric: of which contender and metric.
        predicted, measured: over the seeds.
        error: predicted minus measured on the same flows, paired by seed.
    """

    label: str
    metric: str
    predicted: Interval
    measured: Interval
    error: Difference


def fidelity(predicted: Comparison, measured: Comparison, metrics: Sequence[str] = FIDELITY_METRICS) -> list[Fidelity]:
    """How near a simulation comes to measurements, for each contender and metric."""
    return [
        Fidelity(
            label,
            metric,
            predicted.interval(label, metric),
            measured.interval(label, metric),
            paired_difference(predicted.values(label, metric), measured.values(label, metric)),
        )
        for label in measured.labels
        for metric in metrics
    ]


def kendall_tau(predicted: Comparison, measured: Comparison, metric: str = "fct_mean") -> float:
    """Kendall's tau-b between the predicted and the measured ranking of the contenders; NaN for one contender.

    Raises:
        MissingExtraError: without SciPy.
    """
    try:
        from scipy.stats import kendalltau
    except ImportError:
        raise MissingExtraError("scipy", "eval", "Kendall's tau") from None
    values = [[c.interval(label, metric).mean for label in measured.labels] for c in (predicted, measured)]
    return float(kendalltau(*values).statistic) if len(measured.labels) > 1 else float("nan")


def swapped_pairs(
    predicted: Comparison, measured: Comparison, metric: str = "fct_mean"
) -> list[tuple[str, str, Interval, Interval]]:
    """Contenders whose order differs, with the predicted and the measured difference of the first from the second."""
    pairs = []
    for first, second in combinations(measured.labels, 2):
        simulated, real = (c.difference(first, metric, second).absolute for c in (predicted, measured))
        if np.sign(simulated.mean) * np.sign(real.mean) < 0:
            pairs.append((first, second, simulated, real))
    return pairs


def fidelity_table(predicted: Comparison, measured: Comparison) -> Table:
    """Predicted beside measured mean and p99 FCT, their relative difference, and Kendall's tau of the rankings."""
    entries = {(entry.label, entry.metric): entry for entry in fidelity(predicted, measured)}
    rows = []
    for label in measured.labels:
        cells = [Cell(label)]
        for metric in FIDELITY_METRICS:
            entry = entries[label, metric]
            cells += [_cell(entry.predicted, 1e3), _cell(entry.measured, 1e3), _cell(entry.error.relative, 1.0, True)]
        rows.append(tuple(cells))
    taus = [kendall_tau(predicted, measured, metric) for metric in FIDELITY_METRICS]
    count = len(measured.seeds)
    title = (
        f"Simulated and measured FCT in ms: mean ± 95 % confidence interval over {count} seed{'s' * (count > 1)}; "
        f"Kendall's tau of the rankings {taus[0]:.2f} (mean), {taus[1]:.2f} (p99)"
    )
    columns = ("contender", "mean, sim.", "mean", "error, %", "p99, sim.", "p99", "error, %")
    return Table(title, columns, tuple(rows))


def _cell(interval: Interval, scale: float, signed: bool = False) -> Cell:
    mean = scale * interval.mean
    spread = "" if np.isnan(interval.half_width) else f"±{scale * interval.half_width:.3g}"
    return Cell(f"{mean:+.1f}" if signed else f"{mean:.4g}", spread, Verdict.NONE)
