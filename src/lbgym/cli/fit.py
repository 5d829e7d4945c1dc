"""``lbgym fit``: a scenario from a recording of a live data plane."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..atomic import check_writable
from ..errors import InvalidOptionError
from ._console import print_json, results_console

if TYPE_CHECKING:
    from ..evaluation.tables import Table
    from ..recording.fit import Fit


def fit(
    recording: Annotated[Path, typer.Argument(help="Of `lbgym shm record`.", show_default=False)],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="TOML file of the scenario to write.")] = None,
    cores: Annotated[
        str | None,
        typer.Option(
            help="Cores of the servers, separated by commas, or one number for all; 'weights': the safe weights.",
            show_default="estimated",
        ),
    ] = None,
    dispatch: Annotated[
        str | None, typer.Option(help="Dispatch rule of the data plane.", show_default="estimated")
    ] = None,
    demand: Annotated[
        str | None,
        typer.Option(
            help="Law of demands: deterministic, exponential, lognormal, bounded_pareto, empirical.",
            show_default="the nearest",
        ),
    ] = None,
    mean_demand: Annotated[
        float | None,
        typer.Option(help="Core-seconds of a flow, in the mean.", show_default="so that the mean core has speed 1"),
    ] = None,
    hold_out: Annotated[float, typer.Option(help="Share of the time, at the end, to test the scenario on.")] = 0.25,
    name: Annotated[str | None, typer.Option(help="Of the scenario.", show_default="the file's")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap and the simulations.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Estimate the scenario that a recording is of: servers, demands, arrivals, dispatch rule.

    Prints the estimates with 95 % intervals, and how well the scenario predicts the end of the recording, which it was
    not fitted to. The scenario is for `lbgym train`, `lbgym compare` and everything else that takes one.
    """
    from ..recording.fit import fit_recording

    if out is not None:
        check_writable(out)
    found = fit_recording(
        recording,
        cores=_cores(cores),
        dispatch=dispatch,
        demand=demand,
        mean_demand=mean_demand,
        hold_out=hold_out,
        name=name or (recording if out is None else out).name.split(".")[0] or "twin",
        seed=seed,
    )
    if out is not None:
        found.save(out)
    if as_json:
        print_json(found.to_dict())
    else:
        _report(found)
        if out is not None:
            typer.echo(f"wrote {out}")


def _cores(text: str | None) -> list[int] | int | str | None:
    if text is None or text == "weights":
        return text
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise InvalidOptionError(
            f"--cores takes whole numbers separated by commas, or 'weights', got {text!r}"
        ) from None
    return numbers if len(numbers) > 1 else numbers[0]


def _report(fit: Fit) -> None:
    import numpy as np

    from ..scenarios import Empirical
    from ._tables import drawn_table, plain

    console = results_console()
    arrivals, law, fixed = fit.arrivals, fit.demand.law, fit.demand.fixed
    if isinstance(law, Empirical):
        levels = ("median", 0.5), ("p90", 0.9), ("p99", 0.99)
        drawn = ", ".join(f"{word} {np.quantile(law.values, level):.4g}" for word, level in levels)
        parameters = f"{len(law.values)} values, mean {law.mean:.4g}, {drawn}"
    else:
        parameters = ", ".join(f"{key} {value:.4g}" for key, value in vars(law).items())
    likely = ", ".join(f"{kind} {value:.3g}" for kind, value in fit.demand.likelihoods.items())
    burst = ", ".join(f"{value:.3g} in {window:g} s" for window, value in arrivals.dispersion.items())
    known = "given" if fit.dispatch is None else "estimated" if fit.dispatch.scores else "assumed"
    lines = [
        f"{fit.source}: fitted to {fit.seconds:.0f} s, tested on {fit.held_out_seconds:.0f} s",
        "",
        f"demand:    {type(law).__name__} ({parameters}) core-seconds; {fit.convention}",
        f"           mean log-likelihood of {fit.demand.singles:,} flows, each the only one to end in its interval: "
        f"{likely or 'too few'}",
        *([f"           {100 * fixed:.0f} % of the mean demand may be the same for every flow"] if fixed else []),
        f"arrivals:  {arrivals.rate:.4g} flows/s ({arrivals.rate_low:.4g} to {arrivals.rate_high:.4g}), "
        f"{type(arrivals.process).__name__}; load {fit.scenario.load:.2f}",
        f"           variance over mean of counts (1: Poisson): {burst or 'unknown'}",
        f"dispatch:  {fit.scenario.dispatch} ({known})",
        "overhead:  {:.3g} ms of each FCT ({:.3g} to {:.3g})".format(
            *(1e3 * seconds for seconds in (fit.overhead, fit.overhead_low, fit.overhead_high))
        ),
        "",
    ]
    console.print(plain("\n".join(lines), console), markup=False)
    for table in _tables(fit):
        console.print(drawn_table(table, console))
    for warning in fit.warnings:
        console.print(plain(f"warning: {warning}", console), markup=False)


def _tables(fit: Fit) -> list[Table]:
    from ..evaluation.tables import Cell, Table
    from ..recording.fit import MEASURES

    tables = [
        Table(
            f"Servers (cores {fit.cores_from})",
            ("", "cores", "speed", "95 % interval", "flows/s per core", "busy", "flows"),
            tuple(
                (
                    Cell(server.name),
                    Cell(f"{server.cores}"),
                    Cell(f"{server.speed:.4g}"),
                    Cell(f"{server.speed_low:.4g} to {server.speed_high:.4g}"),
                    Cell(f"{server.rate:.4g}"),
                    Cell(f"{100 * server.busy:.0f} %"),
                    Cell(f"{server.completed:,}"),
                )
                for server in fit.servers
            ),
        )
    ]
    if fit.held_out:
        rows: dict[str, list[Cell]] = {}
        for row in fit.held_out:
            text = f"{row.predicted:.3g}/{row.recorded:.3g}" if row.recorded == row.recorded else "-"
            error = f"{100 * row.error:+.0f} %" if row.error == row.error else ""
            rows.setdefault(row.server, [Cell(row.server)]).append(Cell(text, error))
        tables.append(
            Table(
                f"Held out {fit.held_out_seconds:.0f} s: predicted / recorded, error",
                ("", *MEASURES.values()),
                tuple((*cells, *[Cell("")] * (len(MEASURES) + 1 - len(cells))) for cells in rows.values()),
            )
        )
    return tables
