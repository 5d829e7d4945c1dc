"""Heuristics on recorded requests: one table per trace file.

Every file of the folder is replayed on the cluster that suits its kind: requests of the MARLLB testbed at their own
rate on ``marllb-large``; LLM requests on ``llm-serving`` and web requests on ``heterogeneous``, both sped up or slowed
down to a load of 0.8. Each seed begins at another flow of the trace.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from benchmarks.common import markdown, parser, report
from lbgym.evaluation import compare
from lbgym.scenarios import SAMPLE_TRACE, Workload, load_scenario, read_trace

CONTENDERS = ["lsq", "ecmp", "wcmp", "maglev", "p2c", "sed", "sed+latency", "sed+littles-law", "oracle_sed"]


def cluster_of(file: Path) -> tuple[str, float | None]:
    """The scenario a trace is replayed on, and the load it is brought to (None: its own)."""
    if "marllb" in file.name:
        return "marllb-large", None
    if "llm" in file.name:
        return "llm-serving", 0.8
    return "heterogeneous", 0.8


def plain(mean: float, half_width: float) -> str:
    """An interval with as many decimals as its size deserves."""
    decimals = 0 if mean >= 1000 else 1 if mean >= 10 else 3
    return f"{mean:,.{decimals}f} ±{half_width:,.{decimals}f}"


def main() -> int:
    options = parser(__doc__ or "")
    options.add_argument(
        "--traces", type=Path, default=None, help="folder of traces; without it, the trace lbgym ships"
    )
    options.add_argument("--seeds", type=int, default=10)
    options.add_argument("--duration", type=float, default=60.0, help="seconds per run")
    arguments = options.parse_args()
    folder = arguments.traces
    files = [Path(str(SAMPLE_TRACE))] if folder is None else sorted(folder.glob("*.gz"))
    if not files:
        print(f"no *.gz in {folder}", file=sys.stderr)
        return 2
    seeds, duration = (2, 10.0) if arguments.quick else (arguments.seeds, arguments.duration)
    results = {}
    text = []
    for file in files:
        name, load = cluster_of(file)
        trace = replace(read_trace(file), random_start=True)
        scenario = load_scenario(name).with_changes(
            workload=Workload(trace=trace, load=load), name=f"{file.name} on {name}", duration=duration
        )
        comparison = compare(scenario, CONTENDERS, seeds=seeds)
        rows = []
        for label in comparison.labels:
            cells = [label]
            for metric, scale in (("fct_mean", 1e3), ("fct_p50", 1e3), ("fct_p99", 1e3), ("jain", 1.0)):
                interval = comparison.interval(label, metric)
                cells.append(plain(interval.mean * scale, interval.half_width * scale))
            paired = comparison.difference(label, "fct_mean").relative
            cells.append("" if label == comparison.labels[0] else f"{paired.mean:+,.1f} ±{paired.half_width:,.1f}")
            rows.append(cells)
        text.append(
            f"{scenario.name}: {len(trace.times):,} flows, load {scenario.load:.2f}, {scenario.rate:.4g} flows/s, "
            f"{seeds} seeds of {duration:g} s\n\n"
            + markdown(rows, ["contender", "mean, ms", "p50, ms", "p99, ms", "Jain", "mean against lsq, %"])
        )
        results[scenario.name] = comparison.to_dict()
    report("traces", arguments, "\n\n".join(text), {"comparisons": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
