"""``lbgym compare``: contenders on the same flows, in a table and in files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..atomic import check_writable
from ..errors import ScenarioError, UnknownNameError
from ..scenarios import (
    TRACE_FORMATS,
    TRACE_OPTIONS,
    Scenario,
    Workload,
    load_scenario,
    read_trace,
)
from ._command_line import command_line
from ._comparison import (
    AsJson,
    Baseline,
    Drain,
    Duration,
    FirstSeed,
    Load,
    Plots,
    Quiet,
    Rate,
    StepInterval,
    Warmup,
    report_comparison,
    require_extras,
)
from ._console import print_json
from ._progress import ProgressBar
from ._report import Report, check_report

#: A trace is replayed once, but by default no longer than this, seconds.
MAX_TRACE_DURATION = 600.0

#: Keys of read_trace that have an option of their own.
_OPTIONS = {"format": "--trace-format", "speedup": "--speedup", "scale": "--scale", "on_error": "--skip-malformed"}

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
    first_seed: FirstSeed = 0,
    baseline: Baseline = None,
    load: Load = None,
    rate: Rate = None,
    duration: Duration = None,
    warmup: Warmup = None,
    drain: Drain = None,
    step_interval: StepInterval = None,
    trace: Annotated[
        Path | None,
        typer.Option(help="Replay this trace instead of the scenario's workload; each seed begins elsewhere."),
    ] = None,
    trace_format: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(TRACE_FORMATS)}.", show_default="auto")
    ] = None,
    speedup: Annotated[float | None, typer.Option(help="Divides the trace's times.", show_default="1")] = None,
    scale: Annotated[float | None, typer.Option(help="Multiplies the trace's demands.", show_default="1")] = None,
    skip_malformed: Annotated[
        bool, typer.Option("--skip-malformed", help="Count malformed lines of the trace instead of stopping.")
    ] = False,
    trace_option: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE, further keys of read_trace such as base_demand=0.01.")
    ] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="Processes.", show_default="one per core")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for results, summary and plots.")] = None,
    report: Report = None,
    flows: Annotated[
        bool, typer.Option("--flows", help="With --out, also save each flow that arrives from warm-up to end.")
    ] = False,
    plots: Plots = True,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Compare policies on the same flows.

    Prints FCT quantiles, Jain's index of the servers' load and the rejected share,
    with 95 % confidence intervals over the seeds,
    and the differences from a baseline, paired by seed.
    """
    from ..evaluation import compare as run
    from ..evaluation import parse_contenders, save

    if load is not None and rate is not None:
        raise ScenarioError(f"give --load or --rate, not both; got {load!r} and {rate!r}")
    if flows and out is None:
        raise ScenarioError("--flows saves to the folder of --out, which is missing")
    require_extras(seeds, plots and out is not None)
    contenders = parse_contenders(policies)
    chosen = load_scenario(scenario)
    own = {"format": trace_format, "speedup": speedup, "scale": scale, "on_error": "skip" if skip_malformed else None}
    own = {key: value for key, value in own.items() if value is not None}
    if trace is not None:
        options = _trace_options(trace_option or [])
        for key in options.keys() & own.keys():
            raise ScenarioError(
                f"give {_OPTIONS[key]} or --trace-option {key}, not both; got {own[key]!r} and {options[key]!r}"
            )
        options |= own
        if not isinstance(chosen, Scenario):
            raise ScenarioError(f"--trace needs a scenario, and {chosen.name!r} is a distribution of them")
        chosen = _with_trace(chosen, trace, options, load, rate)
    elif own or trace_option:
        raise ScenarioError("--speedup, --scale and the options of a trace need --trace")
    elif load is not None or rate is not None:
        chosen = chosen.with_changes(**({"load": load} if load is not None else {"rate": rate}))
    if out is not None:
        check_writable(out / "summary.json")
    check_report(report)
    numbers = range(first_seed, first_seed + seeds)
    with ProgressBar("comparing", total=len(contenders) * seeds, quiet=quiet or as_json) as bar:
        comparison = run(
            chosen,
            contenders,
            numbers,
            duration=duration,
            warmup=warmup,
            drain=drain,
            interval=step_interval,
            baseline=baseline,
            processes=processes,
            keep_flows=flows,
            progress=lambda done, _, result: bar.show(done, f"{result.label}, seed {result.seed}"),
        )
    if as_json:
        print_json(comparison.to_dict())
    else:
        # First: a full disk or a lack of permission is no reason to lose the result.
        report_comparison(comparison)
    for file in save(comparison, out, plots=plots) if out is not None else []:
        if not as_json:
            typer.echo(f"wrote {file}")
    if report is not None:
        from ..report import save_report

        save_report(comparison, report, scenario=chosen, command=command_line())
        if not as_json:
            typer.echo(f"wrote {report}")


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
