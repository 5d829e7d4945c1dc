"""What commands that compare policies share: their options, and the report of a comparison."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from ..errors import MissingExtraError
from ._console import results_console
from ._options import installed

if TYPE_CHECKING:
    from ..evaluation import Comparison

FirstSeed = Annotated[int, typer.Option(min=0, help="The first of the seeds.")]
Baseline = Annotated[str | None, typer.Option(help="Contender to compare the others with.", show_default="the first")]
Load = Annotated[float | None, typer.Option(help="Offered work over the capacity, instead of the scenario's.")]
Rate = Annotated[float | None, typer.Option(help="Flows per second, instead of the scenario's.")]
Duration = Annotated[float | None, typer.Option(help="Seconds of a run.", show_default="the scenario's")]
Warmup = Annotated[
    float | None, typer.Option(help="Seconds whose flows do not count.", show_default="a sixth of the duration")
]
Drain = Annotated[
    float | None, typer.Option(help="Seconds after the duration to wait for flows.", show_default="the reject timeout")
]
StepInterval = Annotated[
    float | None, typer.Option(help="Seconds between changes of weights.", show_default="a model's own, else 0.25")
]
Plots = Annotated[bool, typer.Option(help="Draw plots, with --out.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables, and no progress.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]


def require_extras(seeds: int, plots: bool) -> None:
    """Refuse before the work starts what would fail for want of a package when it is done."""
    if seeds > 1 and not installed("scipy"):
        raise MissingExtraError("scipy", "eval", "a confidence interval (with --seeds above 1)")
    if plots and not installed("matplotlib"):
        raise MissingExtraError("matplotlib", "eval", "a plot (--no-plots does without)")


def report_comparison(comparison: Comparison) -> None:
    """Print the tables of a comparison and what must be said beside them."""
    from ._tables import drawn_table, plain

    console = results_console()
    settings = comparison.settings
    source = "" if comparison.trace is None else f", trace {Path(comparison.trace).name}"
    drawn = ", drawn for each seed" if comparison.drawn else ""
    flows = comparison.values(comparison.baseline, "flows").mean()
    count = comparison.balancers
    name = f"[bold]{escape(comparison.scenario)}[/bold]{escape(source)}{drawn}"
    console.print(
        f"{name}: {_span(comparison, 'servers', 'd')} servers, {count} balancer{'s' * (count > 1)}, "
        f"load {_span(comparison, 'load', '.2f')}, {_span(comparison, 'rate', '.4g')} flows/s\n"
        f"{flows:,.0f} flows per seed count: those that arrive from {settings.warmup:.4g} to {settings.duration:.4g} s"
    )
    console.print()
    tables = [comparison.table()]
    if len(comparison.labels) > 1:
        tables.append(comparison.difference_table())
    verdicts = []
    for label in [contender.label for contender in comparison.contenders if contender.path is not None]:
        if len(comparison.labels) > 2 or label == comparison.baseline:
            tables.append(comparison.versus_table(label))
        if len(comparison.labels) > 1:
            verdicts.append(comparison.verdict(label))
    for table in tables:
        if table.rows:
            console.print(drawn_table(table, console))
    for verdict in verdicts:
        console.print(plain(verdict, console), markup=False)
    still = {label: comparison.values(label, "open").mean() for label in comparison.labels}
    if max(still.values()) >= 0.5:
        counts = ", ".join(f"{label} {count:,.0f}" for label, count in still.items() if count >= 0.5)
        console.print(
            f"Flows per seed still open {settings.drain:g} s after the end, counted with their age: {counts}.",
            markup=False,
        )


def _span(comparison: Comparison, name: str, form: str) -> str:
    """A condition of the runs, or the range of those of the seeds."""
    values = [getattr(conditions, name) for conditions in comparison.conditions]
    return " to ".join(dict.fromkeys(f"{x:{form}}" for x in (min(values), max(values))))
