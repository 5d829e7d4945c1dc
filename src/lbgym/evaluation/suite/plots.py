"""Figures of a suite."""

from __future__ import annotations

import numpy as np

from ...errors import MissingExtraError
from ..plots import _TEXT, _dress
from .scores import SCORED, Scores

try:
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
except ImportError as error:
    raise MissingExtraError("matplotlib", "eval", "a plot of a suite") from error

#: By what a contender knows, distinct in hue and lightness (after Okabe and Ito).
_COLOURS = {"nothing": "#0072b2", "configured": "#009e73", "ground truth": "#e69f00", "oracle": "#8c8c8c"}
_KINDS = {
    "nothing": "knows nothing more",
    "configured": "knows the configuration",
    "ground truth": "knows the ground truth",
    "oracle": "oracle",
}
_TRAINED = "#d55e00"
_NAMES = {"fct_mean": "mean FCT", "fct_p99": "p99 FCT"}

#: Scores beyond this are shown at the edge: queues without end say how long a run was, not how good a rule is.
_MOST = 2.0
#: Contenders that are drawn as lines: the best ones.
_MOST_LINES = 8


def _colour(scores: Scores, label: str) -> str:
    entry = scores.results[label].entry
    return _TRAINED if entry.model is not None else _COLOURS[entry.knows]


def intervals(scores: Scores) -> Figure:
    """Geometric mean (dot) and interquartile mean (bar) of every contender with 95 % intervals, the best on top."""
    labels = scores.labels[::-1]
    figure = Figure(figsize=(9.6, 1.6 + 0.27 * len(labels)), layout="constrained")
    grid = figure.subplots(1, 2, sharey=True, squeeze=False)[0]
    for axes, metric in zip(grid, SCORED, strict=True):
        for row, label in enumerate(labels):
            colour = _colour(scores, label)
            mean, middle = scores.geometric_mean(label, metric), scores.iqm(label, metric)
            if mean.value > _MOST:
                axes.annotate(
                    f"{mean.value:.3g} →", (_MOST, row), ha="right", va="center", fontsize=8, color=colour,
                )  # fmt: skip
                continue
            axes.barh(
                row, middle.high - middle.low, left=middle.low, height=0.62, color=colour, alpha=0.28, linewidth=0
            )
            axes.plot([middle.value] * 2, [row - 0.31, row + 0.31], color=colour, linewidth=1.4)
            axes.plot([mean.low, mean.high], [row, row], color=colour, linewidth=1.8)
            axes.plot([mean.value], [row], "o", color=colour, markersize=4.5)
        axes.axvline(1.0, color="#9a9a9a", linewidth=0.8, linestyle=(0, (2, 3)), zorder=0)
        # Bars would keep the margin off the side that they end at, and cut the baseline's dot in half.
        axes.use_sticky_edges = False
        axes.margins(x=0.04)
        axes.set_title(f"{_NAMES[metric]} over {scores.protocol.baseline}'s", loc="left", fontsize=10, color=_TEXT)
        axes.set_ylim(-0.6, len(labels) - 0.4)
        _dress(axes, 8.5)
    grid[0].set_yticks(range(len(labels)), labels, fontsize=8.5)
    kinds = dict.fromkeys(
        "trained" if scores.results[label].entry.model is not None else _KINDS[scores.results[label].entry.knows]
        for label in scores.labels
    )
    colours = {_KINDS[name]: colour for name, colour in _COLOURS.items()} | {"trained": _TRAINED}
    handles = [grid[0].plot([], [], "o", color=colours[kind], label=kind)[0] for kind in kinds]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(kinds), frameon=False, fontsize=8.5)
    figure.suptitle(
        "Geometric mean over the scenarios (dot) and interquartile mean of all runs (bar), 95 % intervals",
        x=0.01, ha="left", fontsize=11, color=_TEXT,
    )  # fmt: skip
    return figure


def profiles(scores: Scores) -> Figure:
    """Performance profiles: the share of runs with a score of at most a limit, for the best contenders."""
    figure = Figure(figsize=(9.6, 4.4), layout="constrained")
    grid = figure.subplots(1, 2, sharey=True, squeeze=False)[0]
    shown = [label for label in scores.labels if label != scores.protocol.baseline][:_MOST_LINES]
    lines = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7a5195", "#8c8c8c")
    for axes, metric in zip(grid, SCORED, strict=True):
        limits = np.linspace(0.3 if metric == "fct_mean" else 0.1, 1.3, 201)
        for label, colour in zip(shown, lines, strict=False):
            share, low, high = scores.profile(label, metric, limits)
            axes.fill_between(limits, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.plot(limits, share, color=colour, linewidth=1.6, label=label)
        axes.axvline(1.0, color="#9a9a9a", linewidth=0.8, linestyle=(0, (2, 3)), zorder=0)
        axes.set_xlim(limits[0], limits[-1])
        axes.set_ylim(0, 1.02)
        axes.set_xlabel(f"{_NAMES[metric]} over {scores.protocol.baseline}'s, at most", fontsize=9)
        _dress(axes, 8.5)
    grid[0].set_ylabel("share of runs", fontsize=9)
    grid[1].legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=8.5)
    figure.suptitle(
        f"Performance profiles of the {len(shown)} best: further up and left is better",
        x=0.01, ha="left", fontsize=11, color=_TEXT,
    )  # fmt: skip
    return figure


def scenarios(scores: Scores) -> Figure:
    """Scores of every contender (row) on every scenario (column), as colours and numbers."""
    names, labels = scores.protocol.names, scores.labels
    figure = Figure(figsize=(2.6 + 0.36 * len(names), 2 * (1.0 + 0.24 * len(labels)) + 1.6), layout="constrained")
    grid = figure.subplots(2, 1, sharex=True, squeeze=False)[:, 0]
    for axes, metric in zip(grid, SCORED, strict=True):
        table = np.array([scores.case_means(label, metric) for label in labels])
        picture = axes.imshow(table, norm=LogNorm(1 / _MOST, _MOST, clip=True), cmap="RdBu_r", aspect="auto")
        for (i, j), value in np.ndenumerate(table):
            dark = abs(np.log(value)) > 0.75 * np.log(_MOST)
            text = f"{value:.2f}" if value < 9.995 else f"{value:.0f}" if value < 1000 else "≫"
            axes.text(j, i, text, ha="center", va="center", fontsize=5.5, color="white" if dark else _TEXT)
        axes.set_yticks(range(len(labels)), labels, fontsize=7.5)
        axes.set_title(f"{_NAMES[metric]} over {scores.protocol.baseline}'s", loc="left", fontsize=10, color=_TEXT)
        axes.tick_params(colors=_TEXT, length=0)
        bar = figure.colorbar(picture, ax=axes, pad=0.01, fraction=0.02)
        bar.set_ticks([0.5, 0.7, 1.0, 1.4, 2.0], labels=["0.5", "0.7", "1", "1.4", "2"])
        bar.minorticks_off()
        bar.ax.tick_params(labelsize=7)
    grid[1].set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor", fontsize=7.5)
    return figure
