"""Tables of a comparison as data: rows of cells, for terminals, text and reports to draw."""

from __future__ import annotations

import html
import math
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from .statistics import Difference, Interval

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


class Verdict(StrEnum):
    """The verdict of a cell on its row's contender."""

    NONE = ""
    BEST = "best"
    BETTER = "better"
    WORSE = "worse"
    UNCLEAR = "unclear"


@dataclass(frozen=True, slots=True)
class Cell:
    """A number as text.

    Attributes:
        text: the mean.
        spread: half width of its confidence interval, such as "±1.2"; empty if there is none.
        verdict: ``UNCLEAR`` if the interval includes 0, else whether the difference is better or worse.
    """

    text: str
    spread: str = ""
    verdict: Verdict = Verdict.NONE


@dataclass(frozen=True, slots=True)
class Table:
    """A title, headings and rows of cells, of which the first is the row's name.

    ``str(table)`` is plain text, as wide as the terminal; notebooks show HTML.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def text(self, width: int | None = None) -> str:
        """Plain text in aligned columns.

        Args:
            width: if the table is wider, half widths have lines of their own; None: as wide as it is.
        """
        wide = [[[f"{cell.text} {cell.spread}".rstrip()] for cell in row] for row in self.rows]
        lines = self._aligned(wide)
        if width is not None and max(map(len, lines)) > width:
            lines = self._aligned([[[cell.text, cell.spread] for cell in row] for row in self.rows])
        return "\n".join([self.title, "", *lines])

    def _aligned(self, rows: list[list[list[str]]]) -> list[str]:
        grid = [list(self.columns)]
        for row in rows:
            height = max(map(len, row))
            grid += [[cell[k] if k < len(cell) else "" for cell in row] for k in range(height)]
        sizes = [max(map(len, column)) for column in zip(*grid, strict=True)]
        lines = [
            "  ".join(text.ljust(size) if i == 0 else text.rjust(size) for i, (text, size) in enumerate(pairs)).rstrip()
            for pairs in (list(zip(line, sizes, strict=True)) for line in grid)
        ]
        return [lines[0], "-" * (sum(sizes) + 2 * (len(sizes) - 1)), *lines[1:]]

    def __str__(self) -> str:
        text = self.text(shutil.get_terminal_size((120, 24)).columns)
        try:
            text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
        except UnicodeEncodeError:
            return text.replace("±", "+/-").encode("ascii", "replace").decode()
        return text

    def _repr_html_(self) -> str:
        def row(tag: str, texts: Iterable[str]) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts) + "</tr>"

        def cells(line: Iterable[Cell]) -> str:
            marks = ((f' class="{cell.verdict}"' if cell.verdict else "", cell) for cell in line)
            texts = ((mark, f"{cell.text} {cell.spread}".rstrip()) for mark, cell in marks)
            return "<tr>" + "".join(f"<td{mark}>{html.escape(text)}</td>" for mark, text in texts) + "</tr>"

        body = "".join(cells(line) for line in self.rows)
        return (
            f"<table><caption>{html.escape(self.title)}</caption>"
            f"<thead>{row('th', self.columns)}</thead><tbody>{body}</tbody></table>"
        )


class Measured(Protocol):
    """The data of the tables; see :class:`lbgym.evaluation.Comparison`."""

    @property
    def labels(self) -> list[str]: ...
    @property
    def seeds(self) -> tuple[int, ...]: ...
    @property
    def baseline(self) -> str: ...
    def interval(self, label: str, metric: str) -> Interval: ...
    def difference(self, label: str, metric: str, baseline: str | None = None) -> Difference: ...


def metrics_table(comparison: Measured, metrics: Mapping[str, str]) -> Table:
    """Every metric (name: unit) of every contender: mean over the seeds ± half width of the 95 % confidence interval.

    A metric's best mean has the verdict ``BEST``.
    """
    unit, factor = _unit(comparison)
    best = {name: _best(comparison, name) for name in metrics}

    def cell(label: str, name: str) -> Cell:
        scale = factor if metrics[name] == "s" else 100.0 if name == "rejected_share" else 1.0
        interval = comparison.interval(label, name)
        decimals = 3 if name == "jain" else _decimals(interval.mean * scale, interval.half_width * scale)
        return _cell(interval, scale, decimals, Verdict.BEST if label in best[name] else Verdict.NONE)

    title = f"FCT in {unit}: mean ± 95 % confidence interval over {_seeds(comparison)}"
    return _table(title, metrics, "rejected, %", [(label, label) for label in comparison.labels], cell)


def difference_table(comparison: Measured, metrics: Mapping[str, str]) -> Table:
    """Paired differences from the baseline, percent of its value on the same seed; points for the rejected share."""
    baseline = comparison.baseline
    title = f"Difference from {baseline} on the same flows: % of its value ± 95 % confidence interval"
    names = [(label, label) for label in comparison.labels if label != baseline]
    return _table(title, metrics, "rejected, pp", names, lambda label, name: _difference(comparison, label, name))


def versus_table(comparison: Measured, metrics: Mapping[str, str], label: str) -> Table:
    """Paired differences of one contender from each of the others."""
    title = f"Difference of {label} from each on the same flows: % of the other's value ± 95 % confidence interval"
    others = [(other, other) for other in comparison.labels if other != label]
    return _table(
        title, metrics, "rejected, pp", others, lambda other, name: _difference(comparison, label, name, other)
    )


def _table(
    title: str,
    metrics: Mapping[str, str],
    rejected: str,
    names: list[tuple[str, str]],
    cell: Callable[[str, str], Cell],
) -> Table:
    headings = [rejected if name == "rejected_share" else HEADINGS[name] for name in metrics]
    rows = tuple((Cell(shown), *(cell(key, name) for name in metrics)) for shown, key in names)
    return Table(title, ("contender", *headings), rows)


def _difference(comparison: Measured, label: str, name: str, other: str | None = None) -> Cell:
    difference = comparison.difference(label, name, other)
    interval, scale = (difference.absolute, 100.0) if name == "rejected_share" else (difference.relative, 1.0)
    large, fine = abs(interval.mean * scale) >= 1000, interval.half_width * scale < 0.05
    decimals = 0 if large else 2 if fine or abs(interval.mean * scale) < 1 else 1
    return _cell(interval, scale, decimals, _verdict(interval, name), signed=True)


def _seeds(comparison: Measured) -> str:
    count = len(comparison.seeds)
    return f"{count} seed{'s' * (count > 1)}"


def _unit(comparison: Measured) -> tuple[str, float]:
    """Unit of FCTs: milliseconds if the smallest mean FCT is below a second."""
    return (
        ("ms", 1e3)
        if min(comparison.interval(label, "fct_mean").mean for label in comparison.labels) < 1
        else ("s", 1.0)
    )


def _best(comparison: Measured, name: str) -> list[str]:
    """Labels with the best mean, unless all have the same."""
    means = {label: comparison.interval(label, name).mean for label in comparison.labels}
    best = (max if name in MORE_IS_BETTER else min)(means.values())
    labels = [label for label, mean in means.items() if mean == best]
    return labels if len(labels) < len(means) else []


def _verdict(interval: Interval, name: str) -> Verdict:
    if not interval.excludes_zero:
        return Verdict.UNCLEAR
    better = (interval.mean > 0) == (name in MORE_IS_BETTER)
    return Verdict.BETTER if better else Verdict.WORSE


def _cell(interval: Interval, scale: float, decimals: int, verdict: Verdict, *, signed: bool = False) -> Cell:
    mean, half = interval.mean * scale, interval.half_width * scale
    if not math.isfinite(mean):
        return Cell("-", "", verdict)
    if mean == 0 and not half > 0:
        return Cell("0", "", verdict)
    text = f"{mean:{'+' if signed else ''}.{decimals}f}"
    return Cell(text, f"±{half:.{decimals}f}" if math.isfinite(half) else "", verdict)


def _decimals(mean: float, half: float) -> int:
    """Decimals for three significant digits of the mean, and up to two more if they would hide the half width."""
    if mean == 0 or not math.isfinite(mean):
        return 2 if half > 0 else 0
    decimals = max(0, 2 - math.floor(math.log10(abs(mean))))
    if 0 < half < 0.5 * 10.0**-decimals:
        decimals = min(decimals + 2, -math.floor(math.log10(half)))
    return decimals
