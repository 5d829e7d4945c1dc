"""The scores of a suite as one HTML file: :func:`suite_report`."""

from __future__ import annotations

import html
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..evaluation.suite.page import case_table, family_table, score_table
from ..evaluation.tables import Cell, Table, Verdict
from .charts import COLOURS, FAINT, INK, Plot, finished, hover, new_figure, require_bokeh, short, style
from .document import document, table_html, write_page

if TYPE_CHECKING:
    from bokeh.plotting import figure as Figure

    from ..evaluation.suite import Scores

_NAMES = {"fct_mean": "mean FCT", "fct_p99": "p99 FCT"}
_TITLES = {"fct_mean": "Mean FCT", "fct_p99": "p99 FCT"}
#: By what a contender knows.
_KINDS = {
    "trained": COLOURS[1],
    "nothing": COLOURS[0],
    "configured": COLOURS[2],
    "ground truth": COLOURS[5],
    "oracle": COLOURS[7],
}
_WORDS = {
    "trained": "trained",
    "nothing": "knows nothing more",
    "configured": "knows the configuration",
    "ground truth": "knows the ground truth",
    "oracle": "oracle",
}
#: Scores beyond this are shown at the edge: queues without end say how long a run was, not how good a rule is.
_MOST = 2.0
#: Contenders whose profiles are drawn: the best ones.
_MOST_LINES = 8


def save_suite_report(scores: Scores, path: str | Path, *, command: str | None = None) -> None:
    """Write :func:`suite_report` to a file, whole or not at all.

    Raises:
        FileWriteError: if it cannot be written.
        MissingExtraError: without Bokeh.
    """
    write_page(path, suite_report(scores, command=command))


def suite_report(scores: Scores, *, command: str | None = None) -> str:
    """A self-contained page: verdict, tables of scores, plots, the protocol, versions and command.

    Args:
        scores: what is shown.
        command: the command line that made them.

    Raises:
        MissingExtraError: without Bokeh.
    """
    require_bokeh()
    protocol, seeds = scores.protocol, len(scores.seeds)
    base = protocol.baseline
    plots = [
        Plot(
            f"{_TITLES[metric]} over {base}'s",
            "Dots: geometric means over the scenarios; bars: interquartile means of all runs; with 95 % intervals.",
            _intervals(scores, metric),
        )
        for metric in _NAMES
    ]
    plots += [
        Plot(
            f"Performance profiles: {_NAMES[metric]}",
            f"Share of runs with a score of at most so much, with its 95 % band, of the {_MOST_LINES} best. Further up "
            "and left is better.",
            _profiles(scores, metric),
        )
        for metric in _NAMES
    ]
    plots += [
        Plot(
            f"{_TITLES[metric]} over {base}'s by scenario",
            "Blue is better than the baseline, red is worse; point at a field for its value.",
            _scenarios(scores, metric),
            wide=True,
        )
        for metric in _NAMES
    ]
    return document(
        title=f"Suite {protocol.version}: {', '.join(scores.labels)}",
        heading=f"Suite {protocol.version}",
        verdict=suite_verdict(scores),
        facts={
            "Scenarios": f"{len(protocol.cases)} in {len(protocol.families)} families",
            "Seeds": f"{seeds} of the protocol's {len(protocol.seeds)}",
            "Runs": f"{seeds * len(protocol.cases) * len(scores.labels):,}",
            "Baseline": base,
            "A score": f"an FCT over that of {base} on the same flows",
            "Protocol hash": protocol.hash,
        },
        tables=[
            score_table(scores),
            *(family_table(scores, metric) for metric in _NAMES),
        ],
        plots=plots,
        appendix="\n".join(
            f"<details><summary>{html.escape(title)}</summary>{table_html(table)}</details>"
            for title, table in (
                *((f"{_TITLES[metric]} by scenario", _by_scenario(scores, metric)) for metric in _NAMES),
                ("The protocol's scenarios", case_table(protocol)),
            )
        ),
        command=command,
    )


def suite_verdict(scores: Scores) -> str:
    """What the scores show, in a sentence: the best contender but oracles, against the baseline and the next."""
    base = scores.protocol.baseline
    # Nobody can have what an oracle knows.
    labels = [label for label in scores.labels if scores.results[label].entry.knows != "oracle"] or scores.labels
    best = labels[0]
    count = len(scores.protocol.cases)
    some = (
        "" if scores.complete else f" Not a complete result: {len(scores.seeds)} of {len(scores.protocol.seeds)} seeds."
    )
    if len(labels) == 1:
        return f"{base} is the baseline, and there is no other contender.{some}"
    text = f"{best} has the least mean FCT over {count} scenarios"
    text += "" if best == base else f": {scores.geometric_mean(best, 'fct_mean').value:.3f} of {base}'s"
    second = labels[1]
    against = scores.geometric_mean(best, "fct_mean", versus=second)
    if not np.isfinite(against.high):
        return f"{text}; one seed cannot show whether by chance.{some}"
    text += f", {against.value:.3f} [{against.low:.3f}, {against.high:.3f}] of that of {second}, the next"
    return f"{text}{'' if against.high < 1.0 else '; that difference may be chance'}.{some}"


def _kind(scores: Scores, label: str) -> str:
    entry = scores.results[label].entry
    return "trained" if entry.model is not None else entry.knows


def _intervals(scores: Scores, metric: str) -> Figure:
    """Geometric and interquartile means of every contender, the best on top."""
    from bokeh.models import ColumnDataSource, Range1d
    from bokeh.models.annotations import Span

    labels = scores.labels
    figure = new_figure(y_range=labels[::-1], x_axis_label=f"{_NAMES[metric]} over {scores.protocol.baseline}'s")
    figure.height = 110 + 24 * len(labels)
    figure.add_layout(Span(location=1.0, dimension="height", line_color=FAINT, line_dash="dashed"))
    dots, ends = [], [1.0]
    for kind in dict.fromkeys(_kind(scores, label) for label in labels):
        data: dict[str, list[Any]] = {}
        for label in (label for label in labels if _kind(scores, label) == kind):
            mean, middle = scores.geometric_mean(label, metric), scores.iqm(label, metric)
            row = {"label": label, "mean": mean.value, "low": mean.low, "high": mean.high}
            row |= {"middle": middle.value, "middle_low": middle.low, "middle_high": middle.high}
            row["shown"] = min(mean.value, _MOST)
            row["beyond"] = f"{mean.value:.3g} →" if mean.value > _MOST else ""
            for name, value in row.items():
                data.setdefault(name, []).append(value)
            ends += [min(end, _MOST) for end in (mean.value, mean.low, mean.high) if np.isfinite(end)]
        source = ColumnDataSource(data)
        colour, text = _KINDS[kind], _WORDS[kind]
        figure.hbar(
            "label", left="middle_low", right="middle_high", height=0.6, source=source, fill_color=colour,
            fill_alpha=0.28, line_color=None, legend_label=text,
        )  # fmt: skip
        figure.segment("low", "label", "high", "label", source=source, line_color=colour, line_width=2)
        dots.append(figure.scatter("shown", "label", source=source, size=8, color=colour, legend_label=text))
        figure.text(
            "shown", "label", "beyond", source=source, text_align="right", text_baseline="middle", x_offset=-8,
            text_font_size="12px", text_color=INK,
        )  # fmt: skip
    room = 0.06 * (max(ends) - min(ends)) + 0.01
    figure.x_range = Range1d(start=min(ends) - room, end=max(ends) + room)
    tips = (("", "@label"), ("mean", "@mean{0.000} (@low{0.000} to @high{0.000})"))
    figure.add_tools(hover((*tips, ("IQM", "@middle{0.000} (@middle_low{0.000} to @middle_high{0.000})")), dots))
    return finished(figure)


def _profiles(scores: Scores, metric: str) -> Figure:
    from bokeh.models import ColumnDataSource, Range1d
    from bokeh.models.annotations import Span

    base = scores.protocol.baseline
    figure = new_figure(x_axis_label=f"{_NAMES[metric]} over {base}'s, at most", y_axis_label="share of runs")
    shown = [label for label in scores.labels if label != base][:_MOST_LINES] or [base]
    limits = np.linspace(0.3 if metric == "fct_mean" else 0.1, 1.3, 201)
    figure.x_range, figure.y_range = Range1d(start=limits[0], end=limits[-1]), Range1d(start=0.0, end=1.02)
    figure.add_layout(Span(location=1.0, dimension="height", line_color=FAINT, line_dash="dashed"))
    lines = []
    for k, label in enumerate(shown):
        share, low, high = scores.profile(label, metric, limits)
        data = ColumnDataSource({"limit": short(limits), "share": short(share), "low": short(low), "high": short(high)})
        figure.varea("limit", "low", "high", source=data, fill_color=COLOURS[k], fill_alpha=0.13, legend_label=label)
        lines.append(figure.line("limit", "share", source=data, legend_label=label, name=label, **style(k)))
    figure.add_tools(hover((("", "$name"), ("at most", "@limit{0.00}"), ("share", "@share{0.0 %}")), lines))
    return finished(figure)


def _scenarios(scores: Scores, metric: str) -> Figure:
    """Scores of every contender (row) in every scenario (column), as colours."""
    from bokeh.models import ColumnDataSource, FixedTicker, LinearColorMapper
    from bokeh.models.annotations import ColorBar
    from bokeh.palettes import RdBu11

    names, labels = list(scores.protocol.names), scores.labels
    figure = new_figure(x_range=names, y_range=labels[::-1])
    # In a narrow window it is scrolled.
    figure.height, figure.min_width = 190 + 20 * len(labels), 220 + 18 * len(names)
    table = np.array([scores.case_means(label, metric) for label in labels])
    data = {
        "case": names * len(labels),
        "label": [label for label in labels for _ in names],
        "score": table.ravel().tolist(),
        # Twice as long and half as long are as far from 1.
        "log": short(np.log2(np.clip(table, 1 / _MOST, _MOST)).ravel()),
    }
    colours = LinearColorMapper(palette=list(RdBu11), low=-np.log2(_MOST), high=np.log2(_MOST))
    fields = figure.rect(
        "case", "label", width=1, height=1, source=ColumnDataSource(data), line_color="#ffffff", line_width=1,
        fill_color={"field": "log", "transform": colours},
    )  # fmt: skip
    figure.xaxis.major_label_orientation = 0.9
    figure.grid.grid_line_color = None
    ticks = [0.5, 0.7, 1.0, 1.4, 2.0]
    places = [float(np.log2(tick)) for tick in ticks]
    bar = ColorBar(color_mapper=colours, ticker=FixedTicker(ticks=places), width=10)
    bar.major_label_overrides = {place: f"{tick:g}" for place, tick in zip(places, ticks, strict=True)}
    figure.add_layout(bar, "right")
    figure.add_tools(hover((("", "@label"), ("scenario", "@case"), ("score", "@score{0.000}")), [fields]))
    return figure


def _by_scenario(scores: Scores, metric: str) -> Table:
    """A row per scenario, a column per contender; the best score of a row is marked."""
    labels = scores.labels
    table = np.array([scores.case_means(label, metric) for label in labels]).T
    rows = tuple(
        (
            Cell(name),
            *(
                Cell(
                    f"{value:.3f}" if value < 10 else f"{value:.3g}",
                    "",
                    Verdict.BEST if value == row.min() else Verdict.NONE,
                )
                for value in row.tolist()
            ),
        )
        for name, row in zip(scores.protocol.names, table, strict=True)
    )
    title = f"{_TITLES[metric]} over {scores.protocol.baseline}'s by scenario, geometric mean over the seeds"
    return Table(title, ("scenario", *labels), rows)
