"""``lbgym scenarios`` and ``lbgym describe``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import MissingExtraError, ScenarioError, UnknownNameError
from ..policies.pretrained import pretrained_names
from ..scenarios import (
    RULES,
    AnyScenario,
    Choice,
    LogUniform,
    RandomEvents,
    Sampling,
    Scenario,
    ScenarioDistribution,
    Uniform,
    Variant,
    distribution_names,
    load_scenario,
    named_distribution,
    named_scenario,
    scenario_names,
    to_toml,
)
from ..snapshot import DEFAULT_STEP_INTERVAL
from ._console import heading, results_console
from ._options import installed
from ._policies import describe_policy, is_policy

if TYPE_CHECKING:
    from rich.table import Table

MAX_EVENTS = 12
#: Columns below which descriptions get lines of their own.
NARROW = 100
PLOT_FORMATS = (".png", ".svg", ".pdf")


def scenarios(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    rules: Annotated[bool, typer.Option("--rules", help="List the dispatch rules instead.")] = False,
) -> None:
    """List the built-in scenarios, and the distributions of scenarios."""
    if rules:
        _list_rules(as_json)
        return
    every = [named_scenario(name) for name in scenario_names()]
    distributions = [named_distribution(name) for name in distribution_names()]
    if as_json:
        listed = [_summary(scenario) for scenario in every] + [_distribution_summary(d) for d in distributions]
        typer.echo(json.dumps(listed, indent=1))
        return
    rows = [
        ((s.name, str(s.num_servers), str(s.balancers), f"{s.load:.2f}", f"{s.rate:,.0f}"), s.description)
        for s in every
    ]
    drawn = [
        ((d.name, _ends(d.min_servers, d.max_servers), str(d.balancers), "drawn", "drawn"), d.description)
        for d in distributions
    ]
    _list_scenarios(rows, drawn)


def _list_scenarios(*sections: Sequence[tuple[tuple[str, ...], str]]) -> None:
    """Print cells and descriptions as a table; on a narrow terminal the descriptions are below their rows."""
    from rich import box
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    console = results_console()
    titles = ("scenario", "servers", "balancers", "load", "flows/s")
    if console.width < NARROW:
        size = max(len(cells[0]) for rows in sections for cells, _ in rows)

        def line(cells: tuple[str, ...]) -> str:
            return cells[0].ljust(size) + "".join(cell.rjust(11) for cell in cells[1:])

        console.print(Text(line(titles), "dim"))
        for rows in sections:
            for cells, description in rows:
                console.print(Text(line(cells), "bold"))
                console.print(Padding(Text(description), (0, 0, 0, 2)))
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for title in titles:
        first = title == titles[0]
        table.add_column(title, justify="left" if first else "right", style="bold" if first else "", no_wrap=True)
    table.add_column("what it is", max_width=76)
    for rows in sections:
        for cells, description in rows:
            table.add_row(*cells, description)
        table.add_section()
    console.print(table)


def _list_rules(as_json: bool) -> None:
    """Print the table of dispatch rules."""
    if as_json:
        typer.echo(json.dumps([asdict(rule) for rule in RULES.values()], indent=1))
        return
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("rule", style="bold", no_wrap=True)
    for name in ("mechanism", "weights", "oracle"):
        table.add_column(name, no_wrap=True)
    for name in ("choice", "source"):
        table.add_column(name)
    for rule in RULES.values():
        flags = ("yes" if flag else "" for flag in (rule.weighted, rule.oracle))
        table.add_row(rule.name, rule.mechanism, *flags, rule.description, rule.source)
    results_console().print(table)


def describe(
    scenario: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="A scenario or a distribution of them, by name or TOML file; a pretrained policy (adaptive), or "
            "the file of a trained one.",
        ),
    ],
    draw: Annotated[
        int | None, typer.Option(min=0, help="Describe what a distribution draws with this seed, not the distribution.")
    ] = None,
    draws: Annotated[int, typer.Option(min=1, help="Draws of a distribution to summarise and plot.")] = 1000,
    plot: Annotated[
        Path | None, typer.Option(help="Plot the draws of a distribution to this file (.png, .svg, .pdf).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
    as_toml: Annotated[bool, typer.Option("--toml", help="Print the scenario as TOML, to change and use.")] = False,
) -> None:
    """Describe a scenario, a distribution of scenarios and its draws, or a trained policy."""
    if as_json and as_toml:
        raise ScenarioError("describe prints --json or --toml, not both")
    if is_policy(scenario):
        if as_toml or plot is not None or draw is not None:
            option = "--toml" if as_toml else "--plot" if draw is None else "--draw"
            raise ScenarioError(f"{option} is for scenarios, and {scenario!r} is a trained policy")
        describe_policy(scenario, as_json=as_json)
        return
    try:
        loaded = load_scenario(scenario)
    except UnknownNameError as error:
        if error.kind != "scenario":
            raise
        raise UnknownNameError("scenario", scenario, [*error.known, *pretrained_names()]) from None
    if not loaded.varies and not (draw is None and plot is None):
        option = "--plot" if draw is None else "--draw"
        raise ScenarioError(f"{option} needs a distribution, and {loaded.name!r} is a scenario: nothing is drawn")
    if draw is not None:
        if plot is not None:
            raise ScenarioError(f"--plot shows many draws, --draw={draw} asks for one; give one of them")
        loaded = loaded.draw(draw)
    if plot is not None:
        _check_plot(plot)
    if as_toml:
        typer.echo(to_toml(loaded), nl=False)
    elif isinstance(loaded, Scenario):
        if as_json:
            typer.echo(json.dumps(_details(loaded), indent=1))
        else:
            _show(loaded)
    elif as_json:
        typer.echo(json.dumps(_distribution_details(loaded, draws), indent=1))
    else:
        _show_distribution(loaded, draws)
    if plot is not None:
        _plot(loaded, draws, plot, quiet=as_json or as_toml)


def _summary(scenario: Scenario) -> dict[str, Any]:
    return {
        "name": scenario.name,
        "description": scenario.description,
        "servers": scenario.num_servers,
        "balancers": scenario.balancers,
        "load": scenario.load,
        "rate": scenario.rate,
    }


def _distribution_summary(distribution: ScenarioDistribution) -> dict[str, Any]:
    return {
        "name": distribution.name,
        "description": distribution.description,
        "servers": [distribution.min_servers, distribution.max_servers],
        "balancers": distribution.balancers,
        "load": None,
        "rate": None,
    }


def _distribution_details(distribution: ScenarioDistribution, draws: int) -> dict[str, Any]:
    from ..scenarios.distribution_summary import draw_many

    return {
        "name": distribution.name,
        "description": distribution.description,
        "base": _details(distribution.base),
        "randomize": _plain({key: getattr(distribution, key) for key in ("num_servers", "load", "rate", "dispatch")})
        | {"server": _plain(distribution.server.ranges()), "sampling": _plain(distribution.sampling.ranges())}
        | {
            key: [_plain(asdict(v) | {"parameters": dict(v.parameters)}) for v in getattr(distribution, key)]
            for key in ("arrivals", "demand")
        }
        | {
            "events": [
                _plain({"kind": e.kind, "every": e.every, "duration": e.duration, "value": e.value})
                for e in distribution.events
            ]
        },
        "draws": {"count": draws, **draw_many(distribution, draws).summary()},
    }


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Ranges as tables, as in a TOML file."""
    kinds = {Uniform: "uniform", LogUniform: "log_uniform", Choice: "choice"}
    return {
        key: {"kind": kinds[type(x)], **asdict(x)} if type(x) in kinds else _plain(x) if isinstance(x, dict) else x
        for key, x in values.items()
    }


def _check_plot(file: Path) -> None:
    if file.suffix.lower() not in PLOT_FORMATS:
        raise ScenarioError(f"--plot writes {', '.join(PLOT_FORMATS)}, got {str(file)!r}")
    if not installed("matplotlib"):
        raise MissingExtraError("matplotlib", "eval", "--plot")


def _plot(distribution: AnyScenario, draws: int, file: Path, *, quiet: bool) -> None:
    from ..evaluation.distribution_plot import draws_figure
    from ..scenarios.distribution_summary import draw_many

    figure = draws_figure(draw_many(distribution, draws), distribution.name)
    try:
        figure.savefig(file, dpi=150)
    except OSError as error:
        raise ScenarioError(f"cannot write the plot {file}: {error}") from error
    if not quiet:
        typer.echo(f"wrote {file}")


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
        "flows_per_step": scenario.rate * DEFAULT_STEP_INTERVAL,
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
    console.print(heading(scenario.name, f"  {scenario.description}"), soft_wrap=False)
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
    _fact(facts, "capacity", f"{scenario.capacity:g} core-seconds per second")
    _fact(facts, "load", f"{scenario.load:.3g} of the capacity")
    per_step = scenario.rate * DEFAULT_STEP_INTERVAL
    _fact(facts, "rate", f"{scenario.rate:.4g} flows/s, {per_step:.3g} in a step of {DEFAULT_STEP_INTERVAL} s")
    if workload.trace is None:
        _fact(facts, "arrivals", _words(workload.arrivals))
        _fact(facts, "demand", f"{_words(workload.demand)}; mean {workload.mean_demand:.4g} core-seconds")
    else:
        trace = workload.trace
        _fact(facts, "trace", f"{trace.source}: {len(trace.times):,} flows in {trace.period:.4g} s")
        _fact(facts, "demand", f"mean {workload.mean_demand:.4g} core-seconds")
    _fact(facts, "balancers", str(scenario.balancers))
    _fact(facts, "dispatch", scenario.dispatch)
    _fact(facts, "rejected", f"a rejected or failed flow counts as an FCT of {scenario.reject_timeout:g} s")
    _fact(facts, "reservoirs", _reservoirs(scenario.sampling))
    _fact(facts, "duration", f"{scenario.duration:g} s by default")
    if scenario.events:
        _fact(facts, "events", _events(scenario))
    console.print(Padding(facts, (0, 0, 0, 1)))


def _show_distribution(distribution: ScenarioDistribution, draws: int) -> None:
    from rich import box
    from rich.padding import Padding
    from rich.table import Table

    from ..scenarios.distribution_summary import QUANTILES, draw_many

    console = results_console()
    console.print(heading(distribution.name, f"  {distribution.description}"), soft_wrap=False)
    base = distribution.base
    facts = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column()
    drawn: list[tuple[str, str]] = []
    if distribution.num_servers is not None:
        drawn.append(("servers", _range(distribution.num_servers)))
    drawn += [(f"{name} of a server", _range(value)) for name, value in distribution.server.ranges().items()]
    if distribution.load is not None:
        drawn.append(("load", _range(distribution.load, " of the capacity")))
    if distribution.rate is not None:
        drawn.append(("rate", _range(distribution.rate, " flows/s")))
    for name in ("arrivals", "demand"):
        variants = getattr(distribution, name)
        if variants:
            drawn.append((name, "\n".join(_variant(variant, 1 / len(variants)) for variant in variants)))
    if distribution.dispatch is not None:
        drawn.append(("dispatch", _range(distribution.dispatch)))
    drawn += [(f"sampling {name}", _range(value)) for name, value in distribution.sampling.ranges().items()]
    if distribution.events:
        drawn.append(("events", "\n".join(map(_random_events, distribution.events))))
    for name, text in drawn:
        _fact(facts, name, text)
    console.print("\nDrawn for every episode")
    console.print(Padding(facts, (0, 0, 0, 1)))

    fixed = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    fixed.add_column(style="dim", no_wrap=True)
    fixed.add_column()
    workload = base.workload
    if distribution.num_servers is None:
        _fact(fixed, "servers", str(base.num_servers))
    if workload.trace is not None:
        _fact(fixed, "trace", f"{workload.trace.source}: {len(workload.trace.times):,} flows")
    else:
        if not distribution.arrivals:
            _fact(fixed, "arrivals", _words(workload.arrivals))
        if not distribution.demand:
            _fact(fixed, "demand", f"{_words(workload.demand)}; mean {workload.mean_demand:.4g} core-seconds")
    _fact(fixed, "balancers", str(base.balancers))
    if distribution.dispatch is None:
        _fact(fixed, "dispatch", base.dispatch)
    _fact(fixed, "rejected", f"a rejected or failed flow counts as an FCT of {base.reject_timeout:g} s")
    varies = distribution.sampling.ranges()
    _fact(fixed, "reservoirs", f"{base.sampling.capacity} samples" if varies else _reservoirs(base.sampling))
    _fact(fixed, "duration", f"{base.duration:g} s by default")
    if base.events:
        _fact(fixed, "events", f"{len(base.events)} of the base, those of servers that were drawn")
    console.print("\nThe same in all")
    console.print(Padding(fixed, (0, 0, 0, 1)))

    summary = draw_many(distribution, draws).summary()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column(f"of {draws:,} draw{'s' * (draws > 1)}", no_wrap=True)
    for label in QUANTILES:
        table.add_column(label, justify="right", no_wrap=True)
    units = {
        "servers": "servers",
        "capacity": "capacity, core-seconds per second",
        "load": "load",
        "rate": "rate, flows/s",
        "mean_demand": "mean demand, core-seconds",
        "events": f"events within {base.duration:g} s",
    }
    for name, text in units.items():
        table.add_row(text, *(f"{value:.4g}" for value in summary[name].values()))
    console.print()
    console.print(table)


def _fact(table: Table, name: str, text: str) -> None:
    """A row of a table; the text may be the user's, and is no markup."""
    from rich.text import Text

    table.add_row(name, Text(text))


def _reservoirs(sampling: Sampling) -> str:
    return (
        f"{sampling.capacity} samples, {sampling.algorithm}, probability {sampling.probability:g}, "
        f"{sampling.packets_per_flow:g} duration samples per flow"
    )


def _range(value: Any, unit: str = "") -> str:
    """A range in words."""
    if isinstance(value, Choice):
        shares = value.probabilities or (1 / len(value.values),) * len(value.values)
        return ", ".join(f"{_short(x)} ({100 * p:.3g} %)" for x, p in zip(value.values, shares, strict=True))
    if isinstance(value, (Uniform, LogUniform)):
        law = ", log-uniform" if isinstance(value, LogUniform) else ""
        return f"{_ends(value.low, value.high)}{unit}{law}"
    return f"{_short(value)}{unit}"


def _ends(low: float, high: float) -> str:
    return _short(low) if low == high else f"{_short(low)} to {_short(high)}"


def _variant(variant: Variant, share: float) -> str:
    values = "; ".join(f"{name} {_range(value)}" for name, value in variant.parameters.items())
    probability = share if variant.probability is None else variant.probability
    return f"{100 * probability:.3g} %: {variant.kind.replace('_', ' ')}{f' ({values})' if values else ''}"


def _random_events(event: RandomEvents) -> str:
    what = {
        "down": "each server goes down",
        "drain": "each server is drained",
        "speed": f"each server runs at {_range(event.value)} times its speed",
        "rate": f"flows arrive at {_range(event.value)} times the rate",
    }[event.kind]
    return f"{what} for {_range(event.duration, ' s')}; every {_range(event.every, ' s')}, in the mean"


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
