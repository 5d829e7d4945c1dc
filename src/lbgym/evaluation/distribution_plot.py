"""A figure of the draws of a distribution of scenarios."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..errors import MissingExtraError
from ..scenarios.distribution_summary import Draws

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise MissingExtraError("matplotlib", "eval", "a plot of a distribution") from error

from .plots import _COLOURS, _TEXT, _dress

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BINS = 24
#: Whole numbers over a wider range are binned like others.
_MAX_BARS = 40
#: Ratio of the largest to the least value above which the axis is logarithmic.
_LOG_RATIO = 3.0


def draws_figure(draws: Draws, name: str) -> Figure:
    """Histograms of the cluster, the load and the demand over the draws of the distribution ``name``."""
    figure = Figure(figsize=(11.5, 6.2), layout="constrained")
    grid = figure.subplots(2, 3)
    by_demand = {k: draws.mean_demand[np.array(draws.demand) == k] for k in dict.fromkeys(sorted(draws.demand))}
    by_arrivals = {k: draws.load[np.array(draws.arrivals) == k] for k in dict.fromkeys(sorted(draws.arrivals))}
    by_cores = {f"{c} core{'s' * (c > 1)}": draws.speeds[draws.cores == c] for c in np.unique(draws.cores).tolist()}
    if len(by_cores) > len(_COLOURS):
        by_cores = {"": draws.speeds}
    _histogram(grid[0, 0], {"": draws.servers}, "servers")
    _histogram(grid[0, 1], by_cores, "speed of a server", of="servers")
    _histogram(grid[0, 2], {"": draws.capacity}, "capacity, core-seconds per second")
    _histogram(grid[1, 0], by_arrivals, "load: offered work over the capacity")
    _histogram(grid[1, 1], by_demand, "mean demand of a flow, core-seconds")
    _histogram(grid[1, 2], {"": draws.rate}, "flows per second")
    figure.suptitle(f"{name}: {len(draws.load):,} draws", x=0.01, ha="left", fontsize=12, color=_TEXT)
    return figure


def _histogram(
    axes: Axes, groups: dict[str, NDArray[np.float64] | NDArray[np.int64]], label: str, of: str = "draws"
) -> None:
    """Shares of the values in bins, the groups on top of each other."""
    every = np.concatenate(list(groups.values()))
    low, high = float(every.min()), float(every.max())
    _dress(axes)
    axes.grid(False, axis="x")
    axes.set_xlabel(label)
    axes.set_ylabel(f"share of {of}")
    axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:g} %")
    whole = every.dtype == np.int64 and high - low < _MAX_BARS
    if np.isclose(low, high):
        bins = np.array([low - 0.5, low + 0.5]) if whole else low * np.array([0.97, 1.03])
        axes.set_xlim(low * 0.5, low * 1.5)
        axes.set_xticks([low], [f"always {low:.4g}"])
    elif whole:
        bins = np.arange(low - 0.5, high + 1)
        axes.set_xticks(np.arange(low, high + 1)[:: max(1, int(high - low) // 12)])
    elif high / low >= _LOG_RATIO:
        bins = np.geomspace(low, high, _BINS + 1)
        axes.set_xscale("log")
        ticks = [m * 10.0**e for e in range(-12, 13) for m in (1, 2, 5) if low * 0.95 <= m * 10.0**e <= high * 1.05]
        if 2 <= len(ticks) <= 10:
            axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
            axes.minorticks_off()
    else:
        bins = np.linspace(low, high, _BINS + 1)
    axes.hist(
        list(groups.values()),
        bins=list(bins),
        weights=[np.full(len(values), 1 / len(every)) for values in groups.values()],
        stacked=True,
        color=_COLOURS[: len(groups)],
        label=[name.replace("_", " ") for name in groups],
        rwidth=0.85 if whole and not np.isclose(low, high) else 1.0,
        edgecolor="white",
        linewidth=0.5,
    )
    axes.margins(y=0.12)
    if len(groups) > 1:
        # Above the axes: uniform draws leave no room among the bars.
        axes.legend(
            frameon=False,
            fontsize=8,
            loc="lower left",
            bbox_to_anchor=(-0.02, 0.98),
            ncols=min(len(groups), 4),
            handlelength=1.0,
            columnspacing=1.2,
        )
