"""``lbgym scenarios`` and ``lbgym describe``."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import groupby
from typing import Annotated, Any

import typer

from ..errors import ScenarioError
from ..scenarios import Scenario, load_scenario, scenario_names, to_toml
from ._console import results_console

#: Seconds per control step that the mean number of flows is given for: the environment's default.
STEP_INTERVAL = 0.25
MAX_EVENTS = 12


def scenarios(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the built-in scenarios."""
    every = [load_scenario(name) for name in scenario_names()]
    if as_json:
        typer.echo(json.dumps([_summary(scenario) for scenario in every], indent=1))
        return
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("scenario", style="bold", no_wrap=True)
    for name in ("servers", "balancers", "load", "flows/s"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("what it is", max_width=76)
    for s in every:
        table.add_row(s.name, str(s.num_servers), str(s.balancers), f"{s.load:.2f}", f"{s.rate:,.0f}", s.description)
    results_console().print(table)


def describe(
    scenario: Annotated[str, typer.Argument(help="Name of a scenario or path of a TOML file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
    as_toml: Annotated[bool, typer.Option("--toml", help="Print the scenario as TOML, to change and use.")] = False,
) -> None:
    """Say what a scenario consists of."""
    if as_json and as_toml:
        raise ScenarioError("describe prints --json or --toml, not both")
    loaded = load_scenario(scenario)
    if as_toml:
        typer.echo(to_toml(loaded), nl=False)
    elif as_json:
        typer.echo(json.dumps(_details(loaded), indent=1))
    else:
        _show(loaded)


def _summary(scenario: Scenario) -> dict[str, Any]:
    return {
        "name": scenario.name,
        "description": scenario.description,
        "servers": scenario.num_servers,
        "balancers": scenario.balancers,
        "load": scenario.load,
        "rate": scenario.rate,
    }


def _details(scenario: Scenario) -> dict[str, Any]:
    workload = scenario.workload
    trace = workload.trace
    return {
        "name": scenario.name,
        "description": scenario.description,
        "servers": [asdict(server) | {"capacity": server.capacity} for server in scenario.servers],
        "capacity": scenario.capacity,
        "load": scenario.load,
        "rate": scenario.rate,
        "flows_per_step": scenario.rate * STEP_INTERVAL,
        "mean_demand": workload.mean_demand,
        "arrivals": None if trace is not None else _kind(workload.arrivals),
        "demand": None if trace is not None else _kind(workload.demand),
        "trace": None
        if trace is None
        else {"source": trace.source, "flows": len(trace.times), "period": trace.period, "rate": trace.rate},
        "balancers": scenario.balancers,
        "dispatch": scenario.dispatch,
        "events": [asdict(event) for event in scenario.events],
        "reject_timeout": scenario.reject_timeout,
        "sampling": asdict(scenario.sampling),
        "duration": scenario.duration,
    }


def _kind(part: Any) -> dict[str, Any]:
    return {"kind": type(part).__name__, **asdict(part)}


def _show(scenario: Scenario) -> None:
    from rich import box
    from rich.padding import Padding
    from rich.table import Table

    console = results_console()
    console.print(f"[bold]{scenario.name}[/bold]  {scenario.description}", soft_wrap=False)
    servers = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in ("servers", "cores", "speed", "workers", "backlog", "capacity"):
        servers.add_column(name, justify="right")
    first = 0
    for server, group in groupby(scenario.servers):
        count = len(list(group))
        numbers = f"{first}" if count == 1 else f"{first} to {first + count - 1}"
        first += count
        servers.add_row(
            numbers,
            str(server.cores),
            f"{server.speed:g}",
            "unlimited" if server.workers is None else str(server.workers),
            "unlimited" if server.backlog is None else str(server.backlog),
            f"{count * server.capacity:g}",
        )
    console.print(servers)
    workload = scenario.workload
    facts = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column()
    facts.add_row("capacity", f"{scenario.capacity:g} core-seconds per second")
    facts.add_row("load", f"{scenario.load:.3g} of the capacity")
    facts.add_row(
        "rate", f"{scenario.rate:.4g} flows/s, {scenario.rate * STEP_INTERVAL:.3g} in a step of {STEP_INTERVAL} s"
    )
    if workload.trace is None:
        facts.add_row("arrivals", _words(workload.arrivals))
        facts.add_row("demand", f"{_words(workload.demand)}; mean {workload.mean_demand:.4g} core-seconds")
    else:
        trace = workload.trace
        facts.add_row("trace", f"{trace.source}: {len(trace.times):,} flows in {trace.period:.4g} s")
        facts.add_row("demand", f"mean {workload.mean_demand:.4g} core-seconds")
    facts.add_row("balancers", str(scenario.balancers))
    facts.add_row("dispatch", scenario.dispatch)
    facts.add_row("rejected", f"a rejected or failed flow counts as an FCT of {scenario.reject_timeout:g} s")
    sampling = scenario.sampling
    facts.add_row(
        "reservoirs",
        f"{sampling.capacity} samples, {sampling.algorithm}, probability {sampling.probability:g}, "
        f"{sampling.packets_per_flow:g} duration samples per flow",
    )
    facts.add_row("duration", f"{scenario.duration:g} s unless told otherwise")
    if scenario.events:
        facts.add_row("events", _events(scenario))
    console.print(Padding(facts, (0, 0, 0, 1)))


def _words(part: Any) -> str:
    values = ", ".join(f"{key} {_short(value)}" for key, value in asdict(part).items() if value is not None)
    name = "".join(f" {c.lower()}" if c.isupper() else c for c in type(part).__name__).strip()
    return f"{name} ({values})" if values else name


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (tuple, list)):
        shown = ", ".join(_short(item) for item in value[:6])
        return f"({shown}{', ...' if len(value) > 6 else ''})"
    return str(value)


def _events(scenario: Scenario) -> str:
    """The events of one duration, and how many more there are."""
    within = [event for event in scenario.events if event.time <= scenario.duration]
    lines = []
    for event in within[:MAX_EVENTS]:
        what = event.kind if event.value is None else f"{event.kind} x {event.value:g}"
        lines.append(f"{event.time:g} s: {'' if event.server is None else f'server {event.server} '}{what}")
    more = len(scenario.events) - len(lines)
    return "\n".join([*lines, *([f"and {more} more until {scenario.events[-1].time:g} s"] if more else [])])
