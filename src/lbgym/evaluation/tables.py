"""A comparison as Rich tables that fit a terminal of 100 columns."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..errors import MissingExtraError

try:
    from rich import box
    from rich.table import Table
    from rich.text import Text
except ImportError as error:
    raise MissingExtraError("rich", "eval", "a table of a comparison") from error

from .runner import METRICS
from .statistics import Interval

if TYPE_CHECKING:
    from .comparison import Comparison

#: Column headings.
HEADINGS = {
    "fct_mean": "mean",
    "fct_p50": "p50",
    "fct_p90": "p90",
    "fct_p99": "p99",
    "fct_p999": "p99.9",
    "jain": "Jain",
    "rejected_share": "rejected",
}
#: Metrics of which more is better.
MORE_IS_BETTER = ("jain",)


def metrics_table(comparison: Comparison, *, stacked: bool = False) -> Table:
    """Every metric of every contender: mean over the seeds ± half width of the 95 % confidence interval.

    A metric's best mean is bold. ``stacked`` puts the half width under the mean, for narrow terminals.
    """
    unit, factor = _unit(comparison)
    table = _table(f"FCT in {unit}: mean ± 95 % confidence interval over {_seeds(comparison)}")
    for name in METRICS:
        heading = "rejected, %" if name == "rejected_share" else HEADINGS[name]
        table.add_column(heading, justify="right", no_wrap=True)
    best = {name: _best(comparison, name) for name in METRICS}
    for label in comparison.labels:
        cells = []
        for name in METRICS:
            scale = factor if METRICS[name] == "s" else 100.0 if name == "rejected_share" else 1.0
            interval = comparison.interval(label, name)
            decimals = 3 if name == "jain" else _decimals(interval.mean * scale, interval.half_width * scale)
            text = _measured(interval, scale, decimals, stacked=stacked)
            cells.append(Text(text, style="bold green" if label in best[name] else ""))
        table.add_row(Text(label, style="bold"), *cells)
    return table


def difference_table(comparison: Comparison, *, stacked: bool = False) -> Table:
    """Paired differences from the baseline, percent of its value on the same seed; points for the rejected share.

    Green: better, and the 95 % interval leaves 0 out; red: worse, likewise; dim: the interval does not tell.
    """
    baseline = comparison.baseline
    title = f"Difference from {baseline} on the same flows: % of its value ± 95 % confidence interval"
    pairs = [(label, label, baseline) for label in comparison.labels if label != baseline]
    return _differences(comparison, title, pairs, stacked)


def versus_table(comparison: Comparison, label: str, *, stacked: bool = False) -> Table:
    """Paired differences of one contender from each of the others; colours as in :func:`difference_table`."""
    title = f"Difference of {label} from each on the same flows: % of the other's value ± 95 % confidence interval"
    pairs = [(other, label, other) for other in comparison.labels if other != label]
    return _differences(comparison, title, pairs, stacked)


def _differences(comparison: Comparison, title: str, pairs: list[tuple[str, str, str]], stacked: bool) -> Table:
    """A row per (name of the row, contender, what it is compared with)."""
    table = _table(title)
    for name in METRICS:
        heading = "rejected, pp" if name == "rejected_share" else HEADINGS[name]
        table.add_column(heading, justify="right", no_wrap=True)
    for row, label, other in pairs:
        cells = []
        for name in METRICS:
            difference = comparison.difference(label, name, other)
            if name == "rejected_share":
                interval, scale = difference.absolute, 100.0
            else:
                interval, scale = difference.relative, 1.0
            large, fine = abs(interval.mean * scale) >= 1000, interval.half_width * scale < 0.05
            decimals = 0 if large else 2 if fine or abs(interval.mean * scale) < 1 else 1
            text = _measured(interval, scale, decimals, signed=True, stacked=stacked)
            cells.append(Text(text, style=_verdict(interval, name)))
        table.add_row(Text(row, style="bold"), *cells)
    return table


def _table(caption: str) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        title=caption,
        title_justify="left",
        title_style="italic",
        pad_edge=False,
        padding=(0, 1),
        collapse_padding=True,
        # The title is not broken over two lines by a narrow table.
        min_width=len(caption),
    )
    table.add_column("contender", no_wrap=True)
    return table


def _seeds(comparison: Comparison) -> str:
    count = len(comparison.seeds)
    return f"{count} seed{'s' * (count > 1)}"


def _unit(comparison: Comparison) -> tuple[str, float]:
    """Milliseconds as long as the smallest mean FCT is below a second."""
    return (
        ("ms", 1e3)
        if min(comparison.interval(label, "fct_mean").mean for label in comparison.labels) < 1
        else ("s", 1.0)
    )


def _best(comparison: Comparison, name: str) -> list[str]:
    """Labels with the best mean, unless all have the same."""
    means = {label: comparison.interval(label, name).mean for label in comparison.labels}
    best = (max if name in MORE_IS_BETTER else min)(means.values())
    labels = [label for label, mean in means.items() if mean == best]
    return labels if len(labels) < len(means) else []


def _verdict(interval: Interval, name: str) -> str:
    if not interval.excludes_zero:
        return "dim"
    better = (interval.mean > 0) == (name in MORE_IS_BETTER)
    return "green" if better else "red"


def _measured(interval: Interval, scale: float, decimals: int, *, signed: bool = False, stacked: bool = False) -> str:
    mean, half = interval.mean * scale, interval.half_width * scale
    if not math.isfinite(mean):
        return "-"
    if mean == 0 and not half > 0:
        return "0"
    text = f"{mean:{'+' if signed else ''}.{decimals}f}"
    if not math.isfinite(half):
        return text
    return f"{text}{chr(10) if stacked else ' '}±{half:.{decimals}f}"


def _decimals(mean: float, half: float) -> int:
    """Three significant digits of the mean, and one or two more while they hide the half width."""
    if mean == 0 or not math.isfinite(mean):
        return 2 if half > 0 else 0
    decimals = max(0, 2 - math.floor(math.log10(abs(mean))))
    if 0 < half < 0.5 * 10.0**-decimals:
        decimals = min(decimals + 2, -math.floor(math.log10(half)))
    return decimals
