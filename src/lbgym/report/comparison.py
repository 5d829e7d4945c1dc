"""A comparison as one HTML file: :func:`comparison_report`."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ScenarioError
from ..evaluation import Comparison, Run
from ..evaluation.tables import HEADINGS, Table
from ..scenarios import AnyScenario, to_toml
from .charts import (
    COLOURS,
    FAINT,
    INK,
    MOST_SERVERS,
    Plot,
    every_of,
    finished,
    hover,
    new_figure,
    over_time,
    per_server,
    require_bokeh,
    short,
    style,
    thinned,
)
from .document import document, write_page

if TYPE_CHECKING:
    from bokeh.plotting import figure as Figure

#: Metrics of the per-seed differences.
_DIFFERENCES = ("fct_mean", "fct_p99")


def save_report(
    comparison: Comparison,
    path: str | Path,
    *,
    scenario: AnyScenario | None = None,
    command: str | None = None,
    facts: Mapping[str, str] | None = None,
    tables: Sequence[Table] = (),
) -> None:
    """Write :func:`comparison_report` to a file, whole or not at all.

    Raises:
        FileWriteError: if it cannot be written.
        MissingExtraError: without Bokeh.
    """
    write_page(path, comparison_report(comparison, scenario=scenario, command=command, facts=facts, tables=tables))


def comparison_report(
    comparison: Comparison,
    *,
    scenario: AnyScenario | None = None,
    command: str | None = None,
    facts: Mapping[str, str] | None = None,
    tables: Sequence[Table] = (),
) -> str:
    """A self-contained page: verdict, tables, plots, scenario, versions and command.

    Args:
        comparison: what is shown.
        scenario: what was simulated, for its TOML; None: its name alone.
        command: the command line that made the comparison.
        facts: more of them, by name, such as where it was measured.
        tables: more of them, below the comparison's own.

    Raises:
        MissingExtraError: without Bokeh.
    """
    require_bokeh()
    several = len(comparison.labels) > 1
    return document(
        title=f"{comparison.scenario}: {', '.join(comparison.labels)}",
        heading=comparison.scenario,
        verdict=verdict(comparison),
        facts=_facts(comparison) | dict(facts or {}),
        tables=[comparison.table(), *([comparison.difference_table()] if several else []), *tables],
        plots=_plots(comparison),
        appendix=_scenario(scenario),
        command=command,
    )


def _plots(comparison: Comparison) -> list[Plot]:
    longer = "Share of flows that took longer, over all seeds. Click a name to hide it."
    plots = [Plot("Flow completion times", longer, _distribution(comparison), wide=True)]
    if len(comparison.labels) > 1:
        plots += [
            Plot(
                f"{HEADINGS[metric]} FCT against {comparison.baseline}, per seed",
                "A dot per seed, each on the same flows; the bar is the mean with its 95 % interval.",
                _differences(comparison, metric),
            )
            for metric in _DIFFERENCES
        ]
    runs = [run for run in comparison.runs if run.series is not None]
    if not runs:
        return plots
    seed = f"seed {runs[0].seed}"
    servers = [min(run.series.weights.shape[1], MOST_SERVERS) for run in runs if run.series is not None]
    every = every_of(max(len(run.series.time) for run in runs if run.series is not None), 2 * sum(servers) + len(runs))
    text = "In all servers together."
    plots.append(Plot(f"Open flows over time, {seed}", text, _open_flows(runs, every), wide=True))
    for run in runs:
        series = run.series
        assert series is not None
        names = [f"server {j}" for j in range(series.weights.shape[1])]
        opened = per_server(np.where(series.active, series.open_flows, 0.0), names)
        moves = bool(np.ptp(series.weights, axis=0).max() > 1e-6)
        shown = over_time(series.time, opened, "open flows", every)
        plots.append(Plot(f"{run.label}: open flows per server, {seed}", "", shown, wide=not moves))
        if moves:
            weights = per_server(np.where(series.active, series.weights, np.nan), names)
            drawn = over_time(series.time, weights, "weight", every, steps=True)
            plots.append(Plot(f"{run.label}: weights", "Over their mean.", drawn))
    return plots


def _open_flows(runs: Sequence[Run], every: int) -> Figure:
    """A line per contender, each of its own times."""
    from bokeh.models import ColumnDataSource

    figure = new_figure(x_axis_label="time, s", y_axis_label="open flows")
    lines = []
    for k, run in enumerate(runs):
        assert run.series is not None
        total = thinned(run.series.open_flows.sum(axis=1), every)
        data = ColumnDataSource({"time": short(run.series.time[::every]), "flows": short(total)})
        lines.append(figure.line("time", "flows", source=data, legend_label=run.label, name=run.label, **style(k)))
    figure.add_tools(hover((("", "$name"), ("time", "@time s"), ("open", "@flows{0.0}")), lines))
    return finished(figure, wide=True)


def verdict(comparison: Comparison) -> str:
    """What the comparison shows, in a sentence: the contender of least mean FCT against the others."""
    best = min(comparison.labels, key=lambda label: comparison.interval(label, "fct_mean").mean)
    mean = 1e3 * comparison.interval(best, "fct_mean").mean
    if len(comparison.labels) == 1:
        return f"{best} has a mean FCT of {mean:.4g} ms."
    if len(comparison.seeds) == 1:
        return f"{best} has the least mean FCT, {mean:.4g} ms; one seed cannot show whether by chance."
    return f"{comparison.verdict(best)} Its mean FCT is {mean:.4g} ms."


def _distribution(comparison: Comparison) -> Figure:
    from bokeh.models import ColumnDataSource

    figure = new_figure(
        x_axis_type="log", y_axis_type="log", x_axis_label="FCT, s", y_axis_label="share of flows that took longer"
    )
    lines = []
    for k, label in enumerate(comparison.labels):
        fct, longer = comparison.fct_ccdf(label)
        # A logarithmic axis has no 0, and a few tiny flows would fill half of it; of the rest every step that is one.
        there = (longer > 0) & (longer < 0.999)
        there[1:] &= longer[1:] != longer[:-1]
        data = ColumnDataSource({"fct": short(fct[there]), "longer": short(longer[there])}, name=label)
        lines.append(figure.line("fct", "longer", source=data, legend_label=label, name=label, **style(k)))
    figure.add_tools(hover((("", "$name"), ("FCT", "@fct{0.000[000]} s"), ("longer", "@longer{0.000 %}")), lines))
    figure.height = 380
    return finished(figure, wide=True)


def _differences(comparison: Comparison, metric: str) -> Figure:
    from bokeh.models import ColumnDataSource, Range1d
    from bokeh.models.annotations import Span, Whisker

    others = [label for label in comparison.labels if label != comparison.baseline]
    figure = new_figure(
        y_range=list(reversed(others)), x_axis_label=f"{HEADINGS[metric]} FCT, % of {comparison.baseline}'s"
    )
    figure.height = 110 + 36 * len(others)
    figure.add_layout(Span(location=0.0, dimension="height", line_color=FAINT, line_dash="dashed"))
    base = comparison.values(comparison.baseline, metric)
    dots: dict[str, list[Any]] = {"label": [], "seed": [], "difference": []}
    means: dict[str, list[Any]] = {"label": [], "mean": [], "low": [], "high": []}
    for label in others:
        each = 100.0 * (comparison.values(label, metric) - base) / np.where(base > 0, base, np.nan)
        for seed, value in zip(comparison.seeds, each.tolist(), strict=True):
            dots["label"].append(label)
            dots["seed"].append(seed)
            dots["difference"].append(value)
        relative = comparison.difference(label, metric).relative
        means["label"].append(label)
        means["mean"].append(relative.mean)
        means["low"].append(relative.low if np.isfinite(relative.low) else relative.mean)
        means["high"].append(relative.high if np.isfinite(relative.high) else relative.mean)
    seeds = figure.scatter(
        "difference", "label", source=ColumnDataSource(dots), size=7, fill_alpha=0.45, line_color=None,
        fill_color=COLOURS[0],
    )  # fmt: skip
    # A plot's own range leaves out the bars.
    reach = [*dots["difference"], *means["low"], *means["high"], 0.0]
    low, high = float(np.nanmin(reach)), float(np.nanmax(reach))
    figure.x_range = Range1d(start=low - 0.05 * (high - low) - 0.1, end=high + 0.05 * (high - low) + 0.1)
    source = ColumnDataSource(means)
    figure.add_layout(
        Whisker(
            base="label",
            lower="low",
            upper="high",
            source=source,
            dimension="width",
            line_width=2,
            line_color=INK,
        )
    )
    mean = figure.scatter("mean", "label", source=source, marker="diamond", size=11, color=INK)
    figure.add_tools(
        hover((("seed", "@seed"), ("difference", "@difference{+0.00} %")), [seeds]),
        hover((("mean", "@mean{+0.00} %"), ("95 %", "@low{+0.00} to @high{+0.00} %")), [mean]),
    )
    return figure


def _facts(comparison: Comparison) -> dict[str, str]:
    settings, first = comparison.settings, comparison.conditions[0]
    facts = {
        "Servers": _span([c.servers for c in comparison.conditions], "d"),
        "Balancers": f"{comparison.balancers}",
        "Load": _span([c.load for c in comparison.conditions], ".2f"),
        "Flows per second": _span([c.rate for c in comparison.conditions], ".4g"),
        "Seeds": f"{comparison.seeds[0]} to {comparison.seeds[-1]}" if len(comparison.seeds) > 1 else "one",
        "Flows that count": f"those that arrive from {settings.warmup:.4g} to {settings.duration:.4g} s",
        "Baseline": comparison.baseline,
    }
    if first.capacity is not None:
        facts["Capacity"] = _span([c.capacity for c in comparison.conditions], ".4g") + " core-seconds per second"
    if comparison.trace is not None:
        facts["Trace"] = Path(comparison.trace).name
    return facts


def _span(values: Sequence[Any], form: str) -> str:
    known = [value for value in values if value is not None]
    return " to ".join(dict.fromkeys(f"{x:{form}}" for x in (min(known), max(known)))) if known else "unknown"


def _scenario(scenario: AnyScenario | None) -> str:
    if scenario is None:
        return ""
    try:
        text = to_toml(scenario)
    except ScenarioError:
        # A trace given as arrays has no file to name.
        return ""
    about = f"<p>{html.escape(scenario.description)}</p>" if scenario.description else ""
    return f"<h2>Scenario</h2>{about}<details><summary>As TOML</summary><pre>{html.escape(text)}</pre></details>"
