"""A comparison as one HTML file that needs nothing else: :func:`comparison_report`.

The plots are Bokeh's. Of the kept plotting libraries on PyPI that work without a network it has the least to put into a
file, 1.3 MB: Plotly's only bundle there has 4.5 MB, and Vega-Lite's comes in a wheel of 33 MB with a browser engine.
"""

from __future__ import annotations

import html
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .. import __version__
from ..atomic import write_whole
from ..errors import MissingExtraError, ScenarioError
from ..evaluation import Comparison, Run
from ..evaluation.tables import HEADINGS, Table
from ..scenarios import AnyScenario, to_toml

if TYPE_CHECKING:
    from bokeh.plotting import figure as Figure

#: Distinct for most kinds of colour vision (Okabe and Ito, 2008), as in the pictures of ``lbgym compare --out``.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7a5195", "#8c8c8c")
_DASHES = ("solid", "dashed", "dotted")
#: Numbers of all time series together, and of one at most.
_NUMBERS, _POINTS = 120_000, 400
#: More servers than this are shown by their least, median and largest.
_SERVERS = 16
#: Metrics of the per-seed differences.
_DIFFERENCES = ("fct_mean", "fct_p99")


def save_report(
    comparison: Comparison, path: str | Path, *, scenario: AnyScenario | None = None, command: str | None = None
) -> None:
    """Write :func:`comparison_report` to a file, whole or not at all.

    Raises:
        FileWriteError: if it cannot be written.
        MissingExtraError: without Bokeh.
    """
    text = comparison_report(comparison, scenario=scenario, command=command)
    write_whole(Path(path), lambda stream: stream.write(text.encode()))


def comparison_report(
    comparison: Comparison, *, scenario: AnyScenario | None = None, command: str | None = None
) -> str:
    """A self-contained page: verdict, tables, plots, scenario, versions and command.

    Args:
        comparison: what is shown.
        scenario: what was simulated, for its TOML; None: its name alone.
        command: the command line that made the comparison.

    Raises:
        MissingExtraError: without Bokeh.
    """
    require_bokeh()
    from bokeh.embed import components
    from bokeh.resources import Resources

    wide = {0}
    plots: list[tuple[str, str, Figure]] = [
        (
            "Flow completion times",
            "Share of flows that took longer, over all seeds. Click a name to hide it.",
            _distribution(comparison),
        )
    ]
    if len(comparison.labels) > 1:
        plots += [
            (
                f"{HEADINGS[metric]} FCT against {comparison.baseline}, per seed",
                "A dot per seed, each on the same flows; the bar is the mean with its 95 % interval.",
                _differences(comparison, metric),
            )
            for metric in _DIFFERENCES
        ]
    series = [run for run in comparison.runs if run.series is not None]
    if series:
        every = _every(series)
        seed = f"seed {series[0].seed}"
        plots.append((f"Open flows over time, {seed}", "In all servers together.", _open_flows(series, every)))
        wide.add(len(plots) - 1)
        for run in series:
            plots.append((f"{run.label}: open flows per server, {seed}", "", _per_server(run, "open_flows", every)))
            if _moves(run):
                plots.append((f"{run.label}: weights", "Over their mean.", _per_server(run, "weights", every)))
            else:
                wide.add(len(plots) - 1)
    script, divisions = components({f"plot{k}": figure for k, (_, _, figure) in enumerate(plots)}, wrap_script=True)
    assert isinstance(divisions, Mapping)
    figures = "\n".join(
        f"<figure{' class=wide' if k in wide else ''}><h3>{html.escape(title)}</h3><p>{html.escape(text)}</p>"
        f"{divisions[f'plot{k}']}</figure>"
        for k, (title, text, _) in enumerate(plots)
    )
    tables = [comparison.table()] + ([comparison.difference_table()] if len(comparison.labels) > 1 else [])
    page = files(__package__) / "page"
    return Template((page / "report.html").read_text()).substitute(
        title=html.escape(f"{comparison.scenario}: {', '.join(comparison.labels)}"),
        style=(page / "report.css").read_text(),
        heading=html.escape(comparison.scenario),
        verdict=html.escape(verdict(comparison)),
        facts=_facts(comparison),
        tables="\n".join(_table(table) for table in tables if table.rows),
        figures=figures,
        scenario=_scenario(scenario),
        versions=_versions(command),
        # Its first part; the second would announce itself in the console.
        library=f"<script>{Resources(mode='inline', components=['bokeh']).js_raw[0]}</script>",
        script=script,
    )


def verdict(comparison: Comparison) -> str:
    """What the comparison shows, in a sentence: the contender of least mean FCT against the others."""
    best = min(comparison.labels, key=lambda label: comparison.interval(label, "fct_mean").mean)
    mean = 1e3 * comparison.interval(best, "fct_mean").mean
    if len(comparison.labels) == 1:
        return f"{best} has a mean FCT of {mean:.4g} ms."
    if len(comparison.seeds) == 1:
        return f"{best} has the least mean FCT, {mean:.4g} ms; one seed cannot show whether by chance."
    return f"{comparison.verdict(best)} Its mean FCT is {mean:.4g} ms."


def require_bokeh() -> None:
    """Refuse what needs Bokeh where it is missing.

    Raises:
        MissingExtraError: without it.
    """
    try:
        import bokeh  # noqa: F401
    except ImportError:
        raise MissingExtraError("bokeh", "report", "an HTML report") from None


# Plots


def _new(**options: Any) -> Figure:
    from bokeh.plotting import figure

    made = figure(
        sizing_mode="stretch_width",
        height=320,
        tools="pan,box_zoom,wheel_zoom,reset,save",
        toolbar_location="above",
        background_fill_color="#ffffff",
        border_fill_color=None,
        outline_line_color=None,
        **options,
    )
    made.toolbar.logo = None
    made.grid.grid_line_color = "#e3e7ed"
    for axis in made.axis:
        axis.axis_line_color = "#98a2b3"
        axis.major_tick_line_color = axis.minor_tick_line_color = "#98a2b3"
        axis.axis_label_text_font_style = "normal"
    return made


def _finish(figure: Figure) -> Figure:
    """Legends beside the plot, whose entries hide what they name."""
    if figure.legend:
        legend = figure.legend[0]
        figure.add_layout(legend, "right")
        legend.click_policy = "hide"
        legend.border_line_color = None
        legend.label_text_font_size = "12px"
    return figure


def _style(k: int) -> dict[str, Any]:
    dash = _DASHES[k // len(_COLOURS) % len(_DASHES)]
    return {"line_color": _COLOURS[k % len(_COLOURS)], "line_dash": dash, "line_width": 1.8}


def _hover(tooltips: Sequence[tuple[str, str]], renderers: Sequence[Any]) -> Any:
    from bokeh.models import HoverTool

    return HoverTool(tooltips=list(tooltips), renderers=list(renderers), point_policy="snap_to_data")


def _distribution(comparison: Comparison) -> Figure:
    from bokeh.models import ColumnDataSource

    figure = _new(
        x_axis_type="log", y_axis_type="log", x_axis_label="FCT, s", y_axis_label="share of flows that took longer"
    )
    lines = []
    for k, label in enumerate(comparison.labels):
        fct, longer = comparison.fct_ccdf(label)
        # A logarithmic axis has no 0, and a few tiny flows would fill half of it; of the rest every step that is one.
        there = (longer > 0) & (longer < 0.999)
        there[1:] &= longer[1:] != longer[:-1]
        data = ColumnDataSource({"fct": _short(fct[there]), "longer": _short(longer[there])}, name=label)
        lines.append(figure.line("fct", "longer", source=data, legend_label=label, name=label, **_style(k)))
    figure.add_tools(_hover((("", "$name"), ("FCT", "@fct{0.000[000]} s"), ("longer", "@longer{0.000 %}")), lines))
    figure.height = 380
    return _finish(figure)


def _differences(comparison: Comparison, metric: str) -> Figure:
    from bokeh.models import ColumnDataSource, Range1d
    from bokeh.models.annotations import Span, Whisker

    others = [label for label in comparison.labels if label != comparison.baseline]
    figure = _new(y_range=list(reversed(others)), x_axis_label=f"{HEADINGS[metric]} FCT, % of {comparison.baseline}'s")
    figure.height = 110 + 36 * len(others)
    figure.add_layout(Span(location=0.0, dimension="height", line_color="#667085", line_dash="dashed"))
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
        fill_color=_COLOURS[0],
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
            line_color="#1b2330",
        )
    )
    mean = figure.scatter("mean", "label", source=source, marker="diamond", size=11, color="#1b2330")
    figure.add_tools(
        _hover((("seed", "@seed"), ("difference", "@difference{+0.00} %")), [seeds]),
        _hover((("mean", "@mean{+0.00} %"), ("95 %", "@low{+0.00} to @high{+0.00} %")), [mean]),
    )
    return figure


def _every(series: Sequence[Run]) -> int:
    """Rows of the time series per point of a plot, so that the page stays small."""
    longest = max(len(run.series.time) for run in series if run.series is not None)
    lines = sum(2 * min(run.series.weights.shape[1], _SERVERS) + 1 for run in series if run.series is not None)
    points = max(50, min(_POINTS, _NUMBERS // max(lines, 1)))
    return max(1, -(-longest // points))


def _moves(run: Run) -> bool:
    """True if the weights over time are worth a plot: they are not always the same."""
    return run.series is not None and bool(np.ptp(run.series.weights, axis=0).max() > 1e-6)


def _open_flows(series: Sequence[Run], every: int) -> Figure:
    from bokeh.models import ColumnDataSource

    figure = _new(x_axis_label="time, s", y_axis_label="open flows")
    lines = []
    for k, run in enumerate(series):
        assert run.series is not None
        total = _thinned(run.series.open_flows.sum(axis=1), every)
        data = ColumnDataSource({"time": _short(run.series.time[::every]), "flows": _short(total)})
        lines.append(figure.line("time", "flows", source=data, legend_label=run.label, name=run.label, **_style(k)))
    figure.add_tools(_hover((("", "$name"), ("time", "@time s"), ("open", "@flows{0.0}")), lines))
    return _finish(figure)


def _per_server(run: Run, what: str, every: int) -> Figure:
    """A line per server; of many servers the least, the median and the largest value."""
    from bokeh.models import ColumnDataSource

    assert run.series is not None
    values = np.where(run.series.active, getattr(run.series, what), np.nan)
    figure = _new(x_axis_label="time, s", y_axis_label="open flows" if what == "open_flows" else "weight")
    figure.height = 260
    if values.shape[1] > _SERVERS:
        lines = {
            name: _thinned(np.nan_to_num(np.nanquantile(values, q, axis=1)), every)
            for name, q in (("least", 0.0), ("median", 0.5), ("largest", 1.0))
        }
    elif what == "open_flows":
        lines = {f"server {j}": _thinned(np.nan_to_num(values[:, j]), every) for j in range(values.shape[1])}
    else:
        lines = {f"server {j}": values[::every, j] for j in range(values.shape[1])}
    drawn: list[Any] = []
    for k, (name, line) in enumerate(lines.items()):
        data = ColumnDataSource({"time": _short(run.series.time[::every]), "value": _short(line)})
        options: dict[str, Any] = {"source": data, "legend_label": name, "name": name, **_style(k)}
        if what == "weights":
            drawn.append(figure.step("time", "value", mode="after", **options))
        else:
            drawn.append(figure.line("time", "value", **options))
    figure.add_tools(_hover((("", "$name"), ("time", "@time s"), ("", "@value{0.00}")), drawn))
    return _finish(figure)


def _thinned(values: NDArray[Any], every: int) -> NDArray[np.float64]:
    """Means of so many values each; the last ones may be fewer."""
    starts = np.arange(0, len(values), every)
    sums = np.add.reduceat(values.astype(np.float64), starts)
    return sums / np.diff(np.append(starts, len(values)))


def _short(values: NDArray[Any]) -> NDArray[np.float32]:
    """Half the bytes; six digits are more than a plot shows."""
    return values.astype(np.float32)


# Text


def _facts(comparison: Comparison) -> str:
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
    return "".join(f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in facts.items())


def _span(values: Sequence[Any], form: str) -> str:
    known = [value for value in values if value is not None]
    return " to ".join(dict.fromkeys(f"{x:{form}}" for x in (min(known), max(known)))) if known else "unknown"


def _table(table: Table) -> str:
    return f'<div class="scroll">{table._repr_html_()}</div>'


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


def _versions(command: str | None) -> str:
    rows = {
        "Command": f"<code>{html.escape(command)}</code>" if command else "",
        "lbgym": __version__,
        "Python": f"{platform.python_version()} on {platform.system()}, {platform.machine()}",
        **{name: _version(name) for name in ("numpy", "numba", "gymnasium", "bokeh")},
        "Made": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    }
    return "".join(f"<div><dt>{name}</dt><dd>{text}</dd></div>" for name, text in rows.items() if text)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
