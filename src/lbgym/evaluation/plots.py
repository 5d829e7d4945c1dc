"""Figures of a comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import MissingExtraError, ScenarioError
from ..scenarios import WEIGHTED_RULES
from .results import Comparison, Run, Series

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise MissingExtraError("matplotlib", "eval", "a plot of a comparison") from error

if TYPE_CHECKING:
    from matplotlib.axes import Axes


# Distinct in hue and lightness, also in grey and for the colour-blind (after Okabe and Ito).
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7a5195", "#8c8c8c")
_STYLES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
_TEXT = "#333333"

#: Most servers drawn as lines; more become rows of an image.
MAX_LINES = 8
MAX_PANELS = 4


def fct_distribution(comparison: Comparison) -> Figure:
    """Share of flows that take longer than an FCT, both on logarithmic axes: one line per contender, all seeds."""
    figure = Figure(figsize=(8.6, 5.4), layout="constrained")
    axes = figure.add_subplot()
    flows = min(sum(r.metrics["flows"] for r in comparison.runs_of(label)) for label in comparison.labels)
    floor = max(1e-6, min(1e-2, 10 / flows))
    ends: list[float] = []
    starts: list[float] = []
    trained = [contender.label for contender in comparison.contenders if contender.path is not None]
    heuristics = [label for label in comparison.labels if label not in trained]
    for label in comparison.labels:
        fct, longer = comparison.fct_ccdf(label)
        shown = (longer >= floor) & (longer < 1)
        axes.plot(
            fct[shown],
            longer[shown],
            **(_agent_line(trained.index(label)) if label in trained else _line(heuristics.index(label))),
            label=f"{label} (baseline)" if label == comparison.baseline else label,
        )
        if shown.any():
            ends.append(float(fct[shown][-1]))
            starts.append(float(fct[longer < 0.97][0]))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(floor, 1.15)
    if ends:
        axes.set_xlim(min(starts) * 0.9, max(ends) * 1.1)
    axes.xaxis.set_major_formatter(lambda x, _: _seconds(x))
    axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:g} %")
    for share, name in ((0.5, "p50"), (0.1, "p90"), (0.01, "p99"), (0.001, "p99.9")):
        if share > floor:
            axes.axhline(share, color="#9a9a9a", linewidth=0.8, linestyle=(0, (2, 3)), zorder=0)
            axes.annotate(
                name,
                (0, share),
                xycoords=("axes fraction", "data"),
                xytext=(5, 2),
                textcoords="offset points",
                va="bottom",
                fontsize=8,
                color="#777777",
            )
    _dress(axes)
    axes.set_xlabel("FCT")
    axes.set_ylabel("flows that take longer")
    axes.set_title(f"Flow completion times, {_subject(comparison)}", loc="left", fontsize=11, color=_TEXT)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=9, handlelength=2.6)
    return figure


def _line(i: int) -> dict[str, Any]:
    return {
        "color": _COLOURS[i % len(_COLOURS)],
        "linestyle": _STYLES[i // len(_COLOURS) % len(_STYLES)],
        "linewidth": 1.7,
    }


def _agent_line(i: int) -> dict[str, Any]:
    """Style of a trained model: black, heavier, on top."""
    return {"color": "black", "linestyle": _STYLES[i % len(_STYLES)], "linewidth": 2.2, "zorder": 3}


def load_and_weights(comparison: Comparison, labels: Sequence[str] | None = None) -> Figure:
    """Open flows of every server and balancer 0's weights over time, first seed, one column per contender.

    Args:
        comparison: whose runs of the first seed have time series.
        labels: contenders; None: up to four of the baseline, trained models, the best, and those whose weights change.

    Raises:
        ScenarioError: if none of them has a time series.
    """
    chosen = list(labels) if labels is not None else _interesting(comparison)
    runs = [comparison.runs_of(label)[0] for label in chosen]
    panels = [(run, run.series) for run in runs if run.series is not None]
    if not panels:
        raise ScenarioError("no run of the comparison has a time series")
    figure = Figure(figsize=(max(6.4, 3.4 * len(panels) + 1.4), 5.8), layout="constrained")
    grid = figure.subplots(2, len(panels), sharex=True, sharey="row", squeeze=False)
    most = max(float(_smooth(column).max()) for _, series in panels for column in series.open_flows.T)
    factor = max(_spread(series) for run, series in panels)
    draw = _lines if panels[0][1].active.shape[1] <= MAX_LINES else _pictures
    draw(figure, grid, panels, most, factor)
    for column, (run, _) in enumerate(panels):
        grid[0, column].set_title(run.label, loc="left", fontsize=10, color=_TEXT)
        grid[1, column].set_xlabel("time, s")
        if run.dispatch not in WEIGHTED_RULES:
            grid[1, column].annotate(
                f"{run.dispatch} reads no weights",
                (0.5, 0.5),
                xycoords="axes fraction",
                ha="center",
                va="center",
                fontsize=9,
                color="#777777",
            )
    title = f"Open flows and weights by server: {comparison.scenario}, seed {comparison.seeds[0]}"
    if len(panels) < len(comparison.labels):
        title += f" ({len(panels)} of {len(comparison.labels)} contenders)"
    figure.suptitle(
        title,
        x=0.01,
        ha="left",
        fontsize=11,
        color=_TEXT,
    )
    return figure


_Panels = Sequence[tuple["Run", "Series"]]


def _lines(figure: Figure, grid: Any, panels: _Panels, most: float, factor: float) -> None:
    """A line per server."""
    for column, (run, series) in enumerate(panels):
        load, weight = grid[:, column]
        for j in range(series.open_flows.shape[1]):
            style = {"color": _COLOURS[j % len(_COLOURS)], "linewidth": 1.3, "drawstyle": "steps-post"}
            load.plot(series.time, _smooth(series.open_flows[:, j]), label=f"server {j}", **style)
            if run.dispatch in WEIGHTED_RULES:
                in_force = series.active[:, j] & (series.weights[:, j] > 0)
                weight.plot(series.time, np.where(in_force, series.weights[:, j], np.nan), **style)
        _dress(load)
        _dress(weight)
    load, weight = grid[:, 0]
    # Linear if it fits, to show a few flows more or less; logarithmic if one queue would hide all others.
    if most > 50:
        load.set_yscale("symlog", linthresh=10, linscale=1.6)
        load.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    load.set_ylim(0, most * (2 if most > 50 else 1.05))
    weight.set_yscale("log")
    weight.set_ylim(0.93 / factor, factor * 1.07)
    named = (0.1, 0.2, 0.5, 1, 2, 5, 10)
    for set_formatter in (weight.yaxis.set_major_formatter, weight.yaxis.set_minor_formatter):
        set_formatter(lambda y, _: f"{y:g}" if any(math.isclose(y, name) for name in named) else "")
    load.set_ylabel("open flows")
    weight.set_ylabel("weight (mean 1)")
    handles, names = load.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", frameon=False, fontsize=9)


def _pictures(figure: Figure, grid: Any, panels: _Panels, most: float, factor: float) -> None:
    """A row of pixels per server."""
    from matplotlib.colors import LogNorm, SymLogNorm

    # Beyond a factor of 10 colours saturate.
    factor = min(factor, 10.0)
    load_norm, weight_norm = SymLogNorm(5, vmin=0, vmax=max(most, 10.0)), LogNorm(1 / factor, factor, clip=True)
    for column, (run, series) in enumerate(panels):
        step = float(series.time[1] - series.time[0]) if len(series.time) > 1 else 1.0
        servers = series.open_flows.shape[1]
        options: dict[str, Any] = {
            "aspect": "auto",
            "origin": "lower",
            "interpolation": "nearest",
            "extent": (float(series.time[0]), float(series.time[-1]) + step, -0.5, servers - 0.5),
        }
        weights = np.where(series.active & (series.weights > 0), series.weights, np.nan)
        if run.dispatch not in WEIGHTED_RULES:
            weights[:] = np.nan
        load = grid[0, column].imshow(series.open_flows.T, norm=load_norm, cmap="magma_r", **options)
        weight = grid[1, column].imshow(weights.T, norm=weight_norm, cmap="RdBu_r", **options)
        for axes in grid[:, column]:
            axes.tick_params(colors=_TEXT, labelsize=9)
    figure.colorbar(load, ax=list(grid[0]), label="open flows", pad=0.01, format="%g")
    bar = figure.colorbar(weight, ax=list(grid[1]), label="weight (mean 1)", pad=0.01)
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10) if 1 / factor <= t <= factor]
    bar.set_ticks(ticks, labels=[f"{t:g}" for t in ticks])
    bar.minorticks_off()
    for axes in grid[:, 0]:
        axes.set_ylabel("server")


def _smooth(values: Any) -> Any:
    """A running mean over about a hundredth of the time: counts of a few flows are jagged."""
    kernel = np.ones(max(1, len(values) // 100))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def _spread(series: Series) -> float:
    """The largest factor by which a weight in force differs from the mean."""
    weights = series.weights[series.active & (series.weights > 0)]
    if not len(weights):
        return 2.0
    return max(1.5, float(weights.max()), float(1 / weights.min()))


def _interesting(comparison: Comparison) -> list[str]:
    def moves(label: str) -> bool:
        series = comparison.runs_of(label)[0].series
        return series is not None and bool(np.ptp(series.weights, axis=0).max() > 1e-6)

    ranked = sorted(comparison.labels, key=lambda label: float(comparison.values(label, "fct_mean").mean()))
    trained = [contender.label for contender in comparison.contenders if contender.path is not None]
    moving = [label for label in ranked if moves(label)]
    chosen = list(dict.fromkeys([comparison.baseline, *trained, ranked[0], *moving, *ranked]))[:MAX_PANELS]
    return [label for label in comparison.labels if label in chosen]


def _dress(axes: Axes, label_size: float = 9) -> None:
    axes.grid(True, which="major", color="#e3e3e3", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.tick_params(which="both", colors=_TEXT, labelsize=label_size)


def _seconds(x: float) -> str:
    if x <= 0 or not math.isfinite(x):
        return ""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if x >= size * 0.999:
            return f"{x / size:g} {unit}"
    return f"{x / 1e-6:g} µs"


def _subject(comparison: Comparison) -> str:
    loads = [condition.load for condition in comparison.conditions if condition.load is not None]
    count = len(comparison.seeds)
    load = " to ".join(dict.fromkeys(f"{x:.2f}" for x in (min(loads), max(loads)))) if loads else ""
    return f"{comparison.scenario}{f' at load {load}' if load else ''}, {count} seed{'s' * (count > 1)}"
