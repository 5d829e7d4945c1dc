"""``lbgym lab``: a laboratory of real servers on this machine, set up, used and removed."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..atomic import check_writable
from ..errors import InvalidOptionError, ScenarioError
from ..scenarios import Scenario, fixed_scenario
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
from ._console import print_json, results_console
from ._progress import ProgressBar
from ._report import Report, check_report

if TYPE_CHECKING:
    from ..lab import LabConfig, Laboratory

_Name = Annotated[str | None, typer.Argument(help="Name of the laboratory.", show_default="that of --config, else lab")]
_Config = Annotated[Path | None, typer.Option("--config", "-c", help="lab.toml; the options below go before it.")]
_Scenario = Annotated[
    str | None,
    typer.Option("--scenario", "-s", help="Name of a scenario or path of a TOML file.", show_default="4 servers"),
]
_Servers = Annotated[
    str | None, typer.Option(help="CPUs of each server instead of the scenario's servers, such as 0.15,0.15,0.3.")
]
_Balancers = Annotated[int | None, typer.Option(min=1, help="Balancers.", show_default="the scenario's")]
_Kind = Annotated[str | None, typer.Option(help="apache-php or nginx.", show_default="apache-php")]
_DataPlane = Annotated[str | None, typer.Option(help="Balancer.", show_default="xdp")]


def up(
    name: _Name = None,
    config: _Config = None,
    scenario: _Scenario = None,
    servers: _Servers = None,
    balancers: _Balancers = None,
    load: Load = None,
    rate: Rate = None,
    server_kind: _Kind = None,
    data_plane: _DataPlane = None,
) -> None:
    """Set up a laboratory: clients, balancers and servers in network namespaces of this machine.

    Servers are real ones with a share of the CPUs each. How long a request of a given size takes is measured once.
    Afterwards the balancers publish their regions, for `lbgym lab run`, `lbgym run` or an environment, until
    `lbgym lab down`. Needs root.
    """
    from ..lab import Laboratory

    chosen = _configuration(name, config, scenario, servers, balancers, server_kind, data_plane, load, rate)
    with Laboratory(chosen) as lab:
        lab.up()
        _describe(lab.status())


def status(
    name: _Name = None, as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False
) -> None:
    """Show the parts of a laboratory that is up and how they are; of all of them without a name."""
    from ..lab import Laboratory, laboratories

    found = []
    for each in laboratories() if name is None else [name]:
        with Laboratory.attach(each, shared=True) as lab:
            found.append(lab.status())
    if as_json:
        print_json(found)
        return
    for document in found:
        _describe(document)
    if not found:
        typer.echo("no laboratory is up")


def down(
    name: _Name = None,
    every: Annotated[bool, typer.Option("--all", help="All laboratories that no process uses.")] = False,
) -> None:
    """Remove a laboratory, also what is left of one whose command was killed."""
    from ..lab import laboratories, remove

    if name is not None and every:
        raise InvalidOptionError(f"give a name or --all, not both; got {name!r}")
    for each in laboratories() if every else [name or "lab"]:
        gone = remove(each)
        typer.echo(f"removed laboratory {each}" if gone else f"there is nothing of a laboratory {each!r}")


def twin(
    name: _Name = None,
    config: _Config = None,
    scenario: _Scenario = None,
    servers: _Servers = None,
    balancers: _Balancers = None,
    load: Load = None,
    rate: Rate = None,
) -> None:
    """Print the scenario that simulates a laboratory as TOML, to train on it or to compare in simulation."""
    from ..lab import Laboratory, twin_of

    options = (scenario, servers, balancers, None, None)
    if _is_up(name, config, options):
        with Laboratory.attach(name or "lab", shared=True) as lab:
            chosen = replace(lab.config, scenario=_loaded(lab.config.scenario, load, rate))
    else:
        chosen = _configuration(name, config, *options, load, rate)
    typer.echo(twin_of(chosen), nl=False)


def run(
    name: _Name = None,
    config: _Config = None,
    policies: Annotated[
        str, typer.Option("--policies", "-p", help="Contenders as of lbgym compare, separated by commas.")
    ] = "round_robin,wcmp+configured,lsq,sed+configured,sed+latency",
    repetitions: Annotated[
        int, typer.Option("--repetitions", "-n", min=1, help="Seeds; each is the same flows for all.")
    ] = 10,
    first_seed: FirstSeed = 0,
    baseline: Baseline = None,
    duration: Duration = None,
    warmup: Warmup = None,
    drain: Drain = None,
    step_interval: StepInterval = None,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="Also simulate the same runs, and print predicted beside measured.")
    ] = False,
    scenario: _Scenario = None,
    servers: _Servers = None,
    balancers: _Balancers = None,
    load: Load = None,
    rate: Rate = None,
    server_kind: _Kind = None,
    data_plane: _DataPlane = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for results, flows, recordings, summary and plots.")
    ] = None,
    report: Report = None,
    recordings: Annotated[bool, typer.Option(help="Record the balancers, with --out.")] = True,
    plots: Plots = True,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Compare policies on real flows in a laboratory: the table of `lbgym compare`, measured.

    Uses the laboratory of this name if it is up. Else it sets one up for the time of the comparison. Dispatch rules are
    those of the data plane; weights are set by the agent of `lbgym run`. Needs root.
    """
    from ..evaluation import parse_contenders, save
    from ..lab import compare_in, fidelity_table, predict

    require_extras(repetitions, plots and out is not None)
    contenders = parse_contenders(policies)
    if out is not None:
        check_writable(out / "summary.json")
    check_report(report)
    options = (scenario, servers, balancers, server_kind, data_plane, load, rate)
    with (
        _used(name, config, options) as lab,
        ProgressBar("measuring", total=len(contenders) * repetitions, quiet=quiet or as_json) as bar,
    ):
        done = 0

        def ended(count: int, _total: int, _result: Any) -> None:
            nonlocal done
            done = count

        def watch(label: str, seed: int, seconds: float, length: float) -> None:
            state = f"{label}, seed {seed}: {max(0.0, seconds):.0f} of {length:.0f} s"
            bar.show(done + min(1.0, max(0.0, seconds / length)), state)

        measured = compare_in(
            lab, contenders, range(first_seed, first_seed + repetitions),
            duration=duration, warmup=warmup, drain=drain, interval=step_interval, baseline=baseline,
            keep_flows=out is not None,
            recordings=out / "recordings" if out is not None and recordings else None,
            progress=ended, watch=watch,
        )  # fmt: skip
        predicted = None
        if simulate:
            predicted = predict(lab, measured.contenders, measured.seeds, measured.settings, baseline=measured.baseline)
    table = None if predicted is None else fidelity_table(predicted, measured)
    if as_json:
        document = measured.to_dict()
        print_json(document if predicted is None else {"measured": document, "predicted": predicted.to_dict()})
    else:
        report_comparison(measured)
        if table is not None:
            from ._tables import drawn_table

            console = results_console()
            console.print(drawn_table(table, console))
    files = [] if out is None else save(measured, out, plots=plots)
    if out is not None and predicted is not None:
        files += save(predicted, out / "predicted", plots=False)
    if report is not None:
        from ..report import save_report

        save_report(
            measured, report, scenario=lab.config.scenario, command=command_line(), facts=_facts(lab.config),
            tables=[] if table is None else [table],
        )  # fmt: skip
        files = [*files, report]
    for file in files:
        if not as_json:
            typer.echo(f"wrote {file}")


def _facts(config: LabConfig) -> dict[str, str]:
    """How flows were measured, for a page."""
    known = config.calibration
    return {
        "Measured": f"on real {config.server_kind} servers behind {config.data_plane}",
        "Quotas": f"{', '.join(f'{share:g}' for share in config.shares())} CPU, every {1e3 * config.period:g} ms",
        "Latency": "" if known is None else f"{1e3 * known.latency:.3g} ms beside demand over speed",
    }


@contextmanager
def _used(name: str | None, config: Path | None, options: tuple[Any, ...]) -> Iterator[Laboratory]:
    """The laboratory that is up, or one for the time of the block."""
    from ..lab import Laboratory

    *fixed, load, rate = options
    if _is_up(name, config, fixed):
        with Laboratory.attach(name or "lab") as lab, lab.restored():
            lab.config = replace(lab.config, scenario=_loaded(lab.config.scenario, load, rate))
            yield lab
    else:
        lab = Laboratory(_configuration(name, config, *options))
        with lab.temporarily():
            yield lab


def _loaded(scenario: Scenario, load: float | None, rate: float | None) -> Scenario:
    if load is not None and rate is not None:
        raise ScenarioError(f"give --load or --rate, not both; got {load!r} and {rate!r}")
    changes = {key: value for key, value in (("load", load), ("rate", rate)) if value is not None}
    return scenario.with_changes(**changes)


def _is_up(name: str | None, config: Path | None, options: Iterable[Any]) -> bool:
    """True if the laboratory that is meant is up; refuses a name of none without a configuration to make one of."""
    from ..lab import laboratories

    if config is not None or any(option is not None for option in options):
        return False
    there = (name or "lab") in laboratories()
    if name is not None and not there:
        raise InvalidOptionError(f"laboratory {name!r} is not up; give --config or --scenario for one that is not")
    return there


def _configuration(
    name: str | None,
    config: Path | None,
    scenario: str | None = None,
    servers: str | None = None,
    balancers: int | None = None,
    server_kind: str | None = None,
    data_plane: str | None = None,
    load: float | None = None,
    rate: float | None = None,
) -> LabConfig:
    from ..lab import load_lab, with_servers

    chosen = load_lab(
        config,
        name=name,
        scenario=None if scenario is None else fixed_scenario(scenario),
        server_kind=server_kind,
        data_plane=data_plane,
    )
    known = chosen.scenario if servers is None else with_servers(chosen.scenario, servers)
    if balancers is not None:
        known = known.with_changes(balancers=balancers)
    return replace(chosen, scenario=_loaded(known, load, rate))


def _describe(document: dict[str, Any]) -> None:
    typer.echo(
        f"laboratory {document['name']}: scenario {document['scenario']}, {len(document['servers'])} servers "
        f"({document['server_kind']}) behind {document['vip']} ({document['data_plane']})"
    )
    for region, live in document["regions"].items():
        typer.echo(f"  region {region}{'' if live else ': no driver publishes it'}")
    width = max(len(server["name"]) for server in document["servers"])
    for server in document["servers"]:
        busy = "no answer" if server["busy_workers"] is None else f"{server['busy_workers']} busy"
        typer.echo(
            f"  {server['name']:{width}}  {server['address']}  {server['share']:g} CPU  "
            f"{server['processes']} processes, {busy}"
        )
    known = document["calibration"]
    if known is not None:
        typer.echo(
            f"  a request takes {1e3 * known['fixed']:.3g} ms of CPU and {known['per_unit']:.4g} s for each of the "
            f"{known['unit']}, and {1e3 * known['latency']:.3g} ms beside"
        )
    typer.echo(f"  try: ip netns exec {document['client_namespace']} curl -s http://{document['vip']}/")
    sys.stdout.flush()
