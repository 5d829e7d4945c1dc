"""A recording as one HTML file: :func:`recording_report`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..errors import RecordingError
from ..evaluation.tables import Cell, Table
from ..features.columns import FEATURE_NAMES, GROUND_TRUTH_NAMES
from ..monitor import server_labels
from .charts import MOST_SERVERS, Plot, every_of, over_time, per_server, require_bokeh
from .document import document, write_page

if TYPE_CHECKING:
    from bokeh.plotting import figure as Figure

    from ..recording import Recording

#: What the columns are called, with the units of their axes.
_TITLES = {"mean": "mean", "p90": "90th percentile", "std": "standard deviation"}
_TITLES |= {"mean_decay": "decayed mean", "p90_decay": "decayed 90th percentile"}
_TRUTH = {"cpu_usage": "CPU use", "memory_usage": "memory use", "busy_workers": "busy workers"}


def save_recording_report(recording: Recording, path: str | Path, *, command: str | None = None) -> None:
    """Write :func:`recording_report` to a file, whole or not at all.

    Raises:
        RecordingError: for a recording of fewer than two observations.
        FileWriteError: if it cannot be written.
        MissingExtraError: without Bokeh.
    """
    write_page(path, recording_report(recording, command=command))


def recording_report(recording: Recording, *, command: str | None = None) -> str:
    """A self-contained page: what was recorded of every server, and all that was measured over time.

    Servers have the names of the last observation. What the data plane does not measure is left out.

    Args:
        recording: what is shown.
        command: the command line that made it.

    Raises:
        RecordingError: for a recording of fewer than two observations.
        MissingExtraError: without Bokeh.
    """
    require_bokeh()
    if len(recording) < 2:
        raise RecordingError(f"a page needs two observations or more, and the recording has {len(recording)}")
    seen = _Seen(recording)
    return document(
        title=f"Recording of {seen.region}",
        heading=f"Recording of {seen.region}",
        verdict=_verdict(recording, seen),
        facts=_facts(recording, seen),
        tables=[_table(recording, seen)],
        plots=_plots(recording, seen),
        command=command,
    )


class _Seen:
    """What is derived of a recording.

    Attributes:
        region: its name.
        names: of the servers.
        time: float64[T], seconds from the first observation on the data plane's clock.
        started, completed, rejected, failed: int64[T - 1, N], flows since the observation before.
        weights: float64[T, N], in force, over the mean of those of active servers.
        unrouted, fct_count, fct_sum: int64[T - 1], likewise.
    """

    def __init__(self, recording: Recording) -> None:
        names = server_labels(recording.server_names(), recording.active.shape[1])
        self.region = str(recording.metadata["region"])
        self.names = [f"server {name}" if name.isdigit() else name for name in names]
        same = np.diff(recording.instance) == 0
        # A producer that starts anew has another clock.
        between = np.where(same, np.diff(recording.timestamp), 1e-9 * np.diff(recording.published_at))
        self.time = np.concatenate([[0.0], np.cumsum(np.maximum(between, 0.0))])
        self.seconds = float(self.time[-1])

        count = np.maximum(recording.active.sum(axis=1), 1)[:, None]
        mean = (recording.weights * recording.active).sum(axis=1)[:, None] / count
        self.weights = recording.weights / np.where(mean > 0.0, mean, 1.0)

        def since(counter: NDArray[np.int64]) -> NDArray[np.int64]:
            goes_on = same.reshape(-1, *[1] * (counter.ndim - 1))
            # A server that takes the index of one that has left begins at 0.
            return np.maximum(np.where(goes_on, np.diff(counter, axis=0), counter[1:]), 0)

        self.started, self.completed = since(recording.started), since(recording.completed)
        self.rejected, self.failed = since(recording.rejected), since(recording.failed)
        self.unrouted, self.fct_count = since(recording.unrouted), since(recording.fct_count)
        self.fct_sum = since(recording.fct_sum)


def _verdict(recording: Recording, seen: _Seen) -> str:
    completed, count = int(seen.completed.sum()), int(seen.fct_count.sum())
    lost = {"rejected": int(seen.rejected.sum()), "failed": int(seen.failed.sum())}
    lost["found no server"] = int(seen.unrouted.sum())
    servers = int(recording.num_servers.max())
    text = f"{servers} server{'s' * (servers != 1)} completed {completed:,} flows in {seen.seconds:,.4g} s"
    text += f", with a mean FCT of {1e-6 * seen.fct_sum.sum() / count:,.4g} ms" if count else ""
    bad = ", ".join(f"{number:,} {what}" for what, number in lost.items() if number)
    agent = 1.0 - float(recording.safe.mean())
    whose = (
        "the safe weights were in force throughout"
        if agent == 0
        else f"an agent's weights were in force {100 * agent:.3g} % of the time"
    )
    return f"{text}; {bad or 'none was lost'}; {whose}."


def _facts(recording: Recording, seen: _Seen) -> dict[str, str]:
    producers = recording.metadata["producers"]
    real = [name for name in (*FEATURE_NAMES, *GROUND_TRUTH_NAMES) if name in recording.real_features]
    absent = [name for name in FEATURE_NAMES if name not in real]
    return {
        "Driver": ", ".join(dict.fromkeys(str(producer["driver"]) for producer in producers)),
        "Servers": f"{recording.num_servers.min()} to {recording.num_servers.max()}"
        if np.ptp(recording.num_servers)
        else f"{recording.num_servers[0]}",
        "Observations": f"{len(recording):,}, {int(recording.missed.sum()):,} missed",
        "Seconds": f"{seen.seconds:,.4g}",
        "Restarts of the producer": f"{len(producers) - 1}",
        "Changes of weights": f"{int((np.diff(recording.weights, axis=0) != 0).any(axis=1).sum()):,}",
        "Not measured": ", ".join(absent),
    }


def _table(recording: Recording, seen: _Seen) -> Table:
    total = max(1, int(seen.started.sum()))
    rows = []
    for j, name in enumerate(seen.names):
        there = recording.active[:, j]
        opened, weight = recording.stats[:, j, 0], seen.weights[there, j]
        weights = (
            [f"{value:.3g}" for value in (weight.mean(), weight.min(), weight.max())] if there.any() else ["-"] * 3
        )
        rows.append(
            (
                Cell(name),
                Cell(f"{100 * there.mean():.3g}"),
                Cell(f"{int(seen.started[:, j].sum()):,}"),
                Cell(f"{100 * seen.started[:, j].sum() / total:.1f}"),
                Cell(f"{int(seen.completed[:, j].sum()):,}"),
                Cell(f"{int(seen.rejected[:, j].sum()):,}"),
                Cell(f"{int(seen.failed[:, j].sum()):,}"),
                Cell(f"{opened.mean():.3g}"),
                Cell(f"{opened.max():.0f}"),
                *(Cell(text) for text in weights),
            )
        )
    flows = ("started", "of all, %", "completed", "rejected", "failed", "open, mean", "open, most")
    columns = ("server", "active, %", *flows, "weight, mean", "least", "largest")
    return Table(
        "Flows since the first observation, open flows, and weights over the mean of the active servers",
        columns,
        tuple(rows),
    )


def _plots(recording: Recording, seen: _Seen) -> list[Plot]:
    real = [name for name in FEATURE_NAMES if name in recording.real_features]
    truth = recording.ground_truth
    shown_truth = [] if truth is None else [name for name in GROUND_TRUTH_NAMES if name in recording.real_features]
    servers = min(len(seen.names), MOST_SERVERS)
    every = every_of(len(recording), servers * (len(real) + len(shown_truth) + 2) + 1)
    many = f" The least, median and largest of {len(seen.names)} servers." * (len(seen.names) > MOST_SERVERS)
    active = recording.active

    def servers_over_time(values: NDArray[np.floating], label: str, *, steps: bool = False) -> Figure:
        lines = per_server(np.where(active, values, np.nan), seen.names)
        return over_time(seen.time, lines, label, every, steps=steps)

    total = {"all servers": recording.stats[:, :, 0].sum(axis=1)}
    text = "In all servers together."
    plots = [Plot("Open flows", text, over_time(seen.time, total, "open flows", every), wide=True)]
    plots.append(Plot("Open flows per server", many, servers_over_time(recording.stats[:, :, 0], "open flows")))
    weights = servers_over_time(seen.weights, "weight", steps=True)
    plots.append(Plot("Weights in force", f"Over the mean of those that are active.{many}", weights))
    # A second or more each, since single flows make no rate.
    longer = max(every, math.ceil((len(seen.time) - 1) / max(seen.seconds, 1.0)))
    starts = np.arange(0, len(seen.completed), longer)
    passed = np.add.reduceat(np.diff(seen.time), starts)
    rate = np.add.reduceat(seen.completed, starts) / np.maximum(passed, 1e-9)[:, None]
    rates = over_time(seen.time[starts], per_server(rate, seen.names), "flows per second", 1, steps=True)
    plots.append(Plot("Completed flows per second", many, rates))
    for name in real[1:]:
        metric, _, statistic = name.partition("_")
        kind = {"fct": "FCT", "duration": "Flow duration"}[metric]
        values = recording.stats[:, :, FEATURE_NAMES.index(name)]
        plots.append(Plot(f"{kind}: {_TITLES[statistic]}", many, servers_over_time(values, "s")))
    for name in shown_truth:
        assert truth is not None
        values = truth[:, :, GROUND_TRUTH_NAMES.index(name)]
        plots.append(Plot(f"Ground truth: {_TRUTH[name]}", many, servers_over_time(values, _TRUTH[name])))
    return plots
