"""The laboratory against the simulator: ``python -m benchmarks.lab_fidelity``, as root.

The same flows, rules and policies on real packets and simulated, at several loads: mean and p99 FCT, ranking, and how
much CPU time the servers used of what the simulator says. Nothing is fitted but what a laboratory measures of its
servers when it is set up, one request at a time: CPU time per unit of work and per request, and a latency.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import markdown, parser, report
from lbgym.errors import LbgymError
from lbgym.evaluation import Comparison
from lbgym.lab import LabConfig, Laboratory, compare_in, fidelity, kendall_tau, predict, swapped_pairs
from lbgym.lab.config import small_scenario
from lbgym.scenarios import Exponential, Workload

#: Predicted mean FCTs are to be this near.
LIMIT = 0.10
POLICIES = "round_robin,wcmp+configured,lsq,sed+configured,p2c,sed+latency"
METRICS = {"fct_mean": "mean", "fct_p99": "p99"}


def main(arguments: list[str] | None = None) -> int:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--policies", default=POLICIES, help="contenders, as lbgym compare takes them")
    options.add_argument("--loads", type=_loads, default="0.4,0.6,0.8", help="separated by commas")
    options.add_argument("--repetitions", type=int, default=10, help="seeds per load")
    options.add_argument("--duration", type=float, default=60.0, help="seconds of a run")
    options.add_argument("--demand", type=float, default=0.04, help="mean of the exponential demands, core-seconds")
    given = options.parse_args(arguments)
    if given.quick:
        given.policies, given.loads, given.repetitions, given.duration = "round_robin,lsq", [0.5], 1, 5.0
    loads = given.loads
    base = small_scenario()
    config = LabConfig(
        name="fidelity", scenario=replace(base, workload=Workload(load=loads[0], demand=Exponential(mean=given.demand)))
    )
    lab = Laboratory(config)
    averages = [os.getloadavg()[0]]
    pairs: dict[float, tuple[Comparison, Comparison]] = {}
    with lab.temporarily():
        known = lab.config.calibration
        assert known is not None
        for load in loads:
            lab.config = replace(lab.config, scenario=lab.config.scenario.with_changes(load=load))
            measured = compare_in(
                lab,
                given.policies,
                given.repetitions,
                duration=given.duration,
                progress=lambda done, total, run: print(
                    f"{run.label}, seed {run.seed}: {done} of {total}", file=sys.stderr, flush=True
                ),
            )
            pairs[load] = predict(lab, measured.contenders, measured.seeds, measured.settings), measured
            averages.append(os.getloadavg()[0])
    rows, errors = _rows(pairs)
    text = markdown(
        [[f"{load:g}", label, *_cells(numbers)] for load, label, *numbers in rows],
        (
            "load",
            "contender",
            *(f"{name}, {how}" for name in METRICS.values() for how in ("sim., ms", "ms", "error, %")),
        ),
    )
    taus = {load: {metric: kendall_tau(*pair, metric) for metric in METRICS} for load, pair in pairs.items()}
    for load, pair in pairs.items():
        text += (
            f"\n\nload {load:g}: Kendall's tau {taus[load]['fct_mean']:.2f} (mean), {taus[load]['fct_p99']:.2f} (p99)"
        )
        for first, second, simulated, real in swapped_pairs(*pair):
            text += (
                f"\n{first} less {second}: {1e3 * simulated.mean:+.3g} ±{1e3 * simulated.half_width:.2g} ms simulated, "
                f"{1e3 * real.mean:+.3g} ±{1e3 * real.half_width:.2g} ms measured"
            )
        text += f"\nCPU time of the servers over the simulated one: {_cpu_ratio(*pair):.2f}"
    mean_error = float(np.mean(np.abs(errors)))
    text += (
        f"\n\nmean error of the mean FCT: {100 * mean_error:.1f} % (at most {100 * LIMIT:g} %)"
        f"\nservers: {1e9 * known.per_unit:.3g} ns of CPU time per microsecond asked for, {1e3 * known.fixed:.3g} ms "
        f"per request, latency {1e3 * known.latency:.3g} ms"
        f"\nload average of the machine from {min(averages):.1f} to {max(averages):.1f}, {os.cpu_count()} cores"
    )
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        draw(rows, given.out / "lab_fidelity.png")
    reached = mean_error <= LIMIT and all(tau["fct_mean"] == 1.0 for tau in taus.values())
    report("lab_fidelity", given, text, {"rows": rows, "taus": taus, "mean_error": mean_error, "reached": reached})
    return 0 if reached or given.quick else 1


def _loads(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"numbers separated by commas, such as 0.4,0.6, got {text!r}") from None


def _rows(pairs: dict[float, tuple[Comparison, Comparison]]) -> tuple[list[list[Any]], list[float]]:
    """Load, contender, and of each metric what was simulated, measured, and the error in %, each with half width."""
    rows, errors = [], []
    for load, (predicted, measured) in pairs.items():
        entries = {(entry.label, entry.metric): entry for entry in fidelity(predicted, measured, tuple(METRICS))}
        for label in measured.labels:
            row: list[Any] = [load, label]
            for metric in METRICS:
                entry = entries[label, metric]
                for interval, scale in ((entry.predicted, 1e3), (entry.measured, 1e3), (entry.error.relative, 1.0)):
                    half = scale * interval.half_width
                    row += [scale * interval.mean, None if np.isnan(half) else half]
            rows.append(row)
            errors.append(entries[label, "fct_mean"].predicted.mean / entries[label, "fct_mean"].measured.mean - 1.0)
    return rows, errors


def _cells(numbers: Sequence[float | None]) -> list[str]:
    pairs = zip(numbers[::2], numbers[1::2], strict=True)
    return [
        f"{value:{'+' if i % 3 == 2 else ''}.1f}" + ("" if half is None else f" ±{half:.1f}")
        for i, (value, half) in enumerate(pairs)
    ]


def _cpu_ratio(predicted: Comparison, measured: Comparison) -> float:
    """CPU time that the servers used over the simulated one: above 1 where a busy machine slows their cores down."""
    shares = [[np.mean(run.utilization) for run in comparison.runs] for comparison in (predicted, measured)]
    return float(np.sum(shares[1]) / np.sum(shares[0]))


def draw(rows: Sequence[Sequence[Any]], file: Path) -> None:
    """Measured over simulated FCTs, from the rows of a result."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    loads = dict(zip(dict.fromkeys(row[0] for row in rows), "osD^vP", strict=False))
    labels = list(dict.fromkeys(row[1] for row in rows))
    figure = Figure(figsize=(9.6, 4.8), layout="constrained")
    for k, (axes, name) in enumerate(zip(figure.subplots(1, 2), METRICS.values(), strict=True)):
        ends = []
        for load, label, *numbers in rows:
            x, x_half, y, y_half = numbers[6 * k : 6 * k + 4]
            axes.errorbar(
                x, y, y_half, x_half, fmt=loads[load], color=f"C{labels.index(label)}", markersize=6, elinewidth=0.8,
                label=label if load == rows[0][0] else None,
            )  # fmt: skip
            ends += [x, y]
        for load, marker in loads.items():
            axes.plot([], [], marker, color="#777777", label=f"load {load:g}")
        span = [0.8 * min(ends), 1.25 * max(ends)]
        axes.plot(span, span, color="#999999", linewidth=0.8, zorder=0)
        axes.fill_between(span, [0.9 * x for x in span], [1.1 * x for x in span], color="#eeeeee", zorder=-1)
        axes.set(xscale="log", yscale="log", xlim=span, ylim=span)
        axes.set(
            xlabel=f"{name} FCT simulated, ms", ylabel=f"{name} FCT measured, ms", title=f"{name} FCT (band: 10 %)"
        )
        for side in (axes.xaxis, axes.yaxis):
            side.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            side.set_minor_locator(NullLocator())
            side.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LbgymError as error:
        sys.exit(f"not measured: {error}")
