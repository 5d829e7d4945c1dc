"""``lbgym compare``: contenders on the same flows, in a table and in files."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ScenarioError, UnknownNameError
from ..scenarios import (
    TRACE_FORMATS,
    TRACE_OPTIONS,
    Scenario,
    ScenarioDistribution,
    Workload,
    load_scenario,
    read_trace,
)
from ._console import results_console

if TYPE_CHECKING:
    from ..evaluation import Comparison, Run

#: A trace is replayed once, but no longer than this unless told otherwise, seconds.
MAX_TRACE_DURATION = 600.0

_POLICIES_HELP = """\
Contenders, separated by commas: a dispatch rule (sed), with a policy's weights (sed+latency), a trained model
(out/agent.pt, sed+model.zip), any of them under a name (mine=out/agent.pt)."""


def compare(
    scenario: Annotated[
        str, typer.Option("--scenario", "-s", help="Name of a scenario or path of a TOML file.")
    ] = "heterogeneous",
    policies: Annotated[
        str, typer.Option("--policies", "-p", help=_POLICIES_HELP)
    ] = "ecmp,wcmp,maglev,lsq,sed,p2c,sed+latency,sed+littles-law",
    seeds: Annotated[int, typer.Option("--seeds", "-n", min=1, help="Seeds; each is the same flows for all.")] = 10,
    first_seed: Annotated[int, typer.Option(min=0, help="The first of the seeds.")] = 0,
    baseline: Annotated[
        str | None, typer.Option(help="Contender to compare the others with.", show_default="the first")
    ] = None,
    load: Annotated[
        float | None, typer.Option(help="Offered work over the capacity, instead of the scenario's.")
    ] = None,
    rate: Annotated[float | None, typer.Option(help="Flows per second, instead of the scenario's.")] = None,
    duration: Annotated[float | None, typer.Option(help="Seconds of a run.", show_default="the scenario's")] = None,
    warmup: Annotated[
        float | None, typer.Option(help="Seconds whose flows do not count.", show_default="a sixth of the duration")
    ] = None,
    drain: Annotated[
        float | None,
        typer.Option(help="Seconds after the duration to wait for flows.", show_default="the reject timeout"),
    ] = None,
    interval: Annotated[
        float | None,
        typer.Option(help="Seconds between changes of weights.", show_default="a model's own, else 0.25"),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(help="Replay this trace instead of the scenario's workload; each seed begins elsewhere."),
    ] = None,
    trace_format: Annotated[str, typer.Option(help=f"One of {', '.join(TRACE_FORMATS)}.")] = "auto",
    speedup: Annotated[float, typer.Option(help="Divides the trace's times.")] = 1.0,
    scale: Annotated[float, typer.Option(help="Multiplies the trace's demands.")] = 1.0,
    skip_malformed: Annotated[
        bool, typer.Option("--skip-malformed", help="Count malformed lines of the trace instead of stopping.")
    ] = False,
    trace_option: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE, further keys of read_trace such as base_demand=0.01.")
    ] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="Processes.", show_default="one per core")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for results, summary and plots.")] = None,
    flows: Annotated[
        bool, typer.Option("--flows", help="With --out, also save each flow that arrives from warm-up to end.")
    ] = False,
    plots: Annotated[bool, typer.Option(help="Draw plots, with --out.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables, and no progress.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Compare policies on the same flows.

    Prints FCT quantiles, Jain's index of the servers' load and the rejected share,
    with 95 % confidence intervals over the seeds,
    and the differences from a baseline, paired by seed.
    """
    from ..evaluation import compare as run
    from ..evaluation import parse_contenders

    if load is not None and rate is not None:
        raise ScenarioError(f"give --load or --rate, not both; got {load!r} and {rate!r}")
    if flows and out is None:
        raise ScenarioError("--flows saves to the folder of --out, which is missing")
    contenders = parse_contenders(policies)
    chosen = load_scenario(scenario)
    if trace is not None:
        options = _trace_options(trace_option or [])
        options |= {"format": trace_format, "speedup": speedup, "scale": scale}
        options |= {"on_error": "skip" if skip_malformed else "raise"}
        if isinstance(chosen, ScenarioDistribution):
            raise ScenarioError(f"--trace needs a scenario, and {chosen.name!r} is a distribution of them")
        chosen = _with_trace(chosen, trace, options, load, rate)
    elif speedup != 1 or scale != 1 or trace_option or trace_format != "auto" or skip_malformed:
        raise ScenarioError("--speedup, --scale and the options of a trace need --trace")
    elif load is not None or rate is not None:
        chosen = chosen.with_changes(**({"load": load} if load is not None else {"rate": rate}))
    numbers = range(first_seed, first_seed + seeds)
    with _Progress(len(contenders) * seeds, quiet=quiet or as_json) as progress:
        comparison = run(
            chosen,
            contenders,
            numbers,
            duration=duration,
            warmup=warmup,
            drain=drain,
            interval=interval,
            baseline=baseline,
            processes=processes,
            keep_flows=flows,
            progress=progress,
        )
    files = comparison.save(out, plots=plots) if out is not None else []
    if as_json:
        typer.echo(json.dumps(comparison.to_dict(), indent=1, allow_nan=False))
    else:
        _report(comparison, files)


def _trace_options(items: list[str]) -> dict[str, Any]:
    """``KEY=VALUE`` texts; a value that reads as a number is one."""
    options: dict[str, Any] = {}
    for item in items:
        key, equals, text = item.partition("=")
        key = key.strip().replace("-", "_")
        if not equals:
            raise ScenarioError(f"--trace-option takes KEY=VALUE, got {item!r}")
        if key not in TRACE_OPTIONS:
            raise UnknownNameError("trace option", key, TRACE_OPTIONS)
        if text.lower() in ("true", "false"):
            options[key] = text.lower() == "true"
            continue
        try:
            options[key] = float(text)
        except ValueError:
            options[key] = text
    return options


def _with_trace(
    scenario: Scenario, path: Path, options: dict[str, Any], load: float | None, rate: float | None
) -> Scenario:
    """The scenario's servers and balancers under a trace; it lasts as long as the trace, but not for hours."""
    trace = read_trace(path, **({"random_start": True} | options))
    changed = replace(scenario, workload=Workload(trace=trace, load=load, rate=rate))
    return replace(changed, duration=min(trace.period * trace.rate / changed.rate, MAX_TRACE_DURATION))


class _Progress:
    """A progress bar on standard error; call it after every run."""

    def __init__(self, total: int, *, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("comparing"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[run]}", style="dim"),
            console=Console(stderr=True),
            transient=True,
            disable=quiet or not sys.stderr.isatty(),
        )
        self._task = self._bar.add_task("comparing", total=total, run="starting")

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, done: int, total: int, run: Run) -> None:
        self._bar.update(self._task, completed=done, run=f"{run.label}, seed {run.seed}")


def _report(comparison: Comparison, files: list[Path]) -> None:
    console = results_console()
    scenario, settings = comparison.scenario, comparison.settings
    trace = comparison.scenarios[0].workload.trace
    source = "" if trace is None else f", trace {Path(trace.source).name}"
    drawn = ", drawn for each seed" if isinstance(scenario, ScenarioDistribution) else ""
    flows = comparison.values(comparison.baseline, "flows").mean()
    console.print(
        f"[bold]{scenario.name}[/bold]{source}{drawn}: {_span(comparison, 'num_servers', 'd')} servers, "
        f"{scenario.balancers} balancer{'s' * (scenario.balancers > 1)}, load {_span(comparison, 'load', '.2f')}, "
        f"{_span(comparison, 'rate', '.4g')} flows/s\n{flows:,.0f} flows per seed count, those that arrive from "
        f"{settings.warmup:.4g} to {settings.duration:.4g} s"
    )
    console.print()
    trained = [contender.label for contender in comparison.contenders if contender.path is not None]
    for make in (comparison.table, comparison.difference_table):
        console.print(_fitting(console, make))
    for label in trained:
        if len(comparison.labels) > 2 or label == comparison.baseline:
            console.print(_fitting(console, lambda label=label, **options: comparison.versus_table(label, **options)))
        if len(comparison.labels) > 1:
            console.print(comparison.verdict(label))
    still = {label: comparison.values(label, "open").mean() for label in comparison.labels}
    if max(still.values()) >= 0.5:
        counts = ", ".join(f"{label} {count:,.0f}" for label, count in still.items() if count >= 0.5)
        console.print(
            f"Flows per seed still open {settings.drain:g} s after the end, which count with their age: {counts}."
        )
    for file in files:
        typer.echo(f"wrote {file}")


def _span(comparison: Comparison, name: str, form: str) -> str:
    """A value of the scenario, or from the least to the largest of the seeds' scenarios."""
    values = [getattr(scenario, name) for scenario in comparison.scenarios]
    return " to ".join(dict.fromkeys(f"{x:{form}}" for x in (min(values), max(values))))


def _fitting(console: Any, make: Any) -> Any:
    """The table, with cells of two lines where the terminal is too narrow for one."""
    table = make()
    if console.measure(table, options=console.options.update(width=1000)).maximum <= console.width:
        return table
    return make(stacked=True)
