"""``lbgym shm record``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .._progress import StatusLine
from .._report import Report, check_report
from .._signals import stop_on_signal
from ._arguments import Name
from ._report import write_report

if TYPE_CHECKING:
    from ...recording import Summary


def record(
    name: Name,
    out: Annotated[Path, typer.Argument(help="The Parquet file to write.")],
    duration: Annotated[
        float | None, typer.Option(help="Seconds to record.", show_default="until it is stopped")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Observations to record.", show_default="until it is stopped")
    ] = None,
    sample_interval: Annotated[
        float | None,
        typer.Option(help="Seconds between observations, on the data plane's clock.", show_default="every observation"),
    ] = None,
    minari: Annotated[
        str | None, typer.Option(metavar="DATASET_ID", help="Also write a Minari dataset, such as balancers/lb0-v0.")
    ] = None,
    report: Report = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Record observations and the weights in force, for offline training. Read-only.

    Ctrl-C, SIGTERM or SIGHUP ends the recording and finishes the file, exit code 0; a second one leaves it unfinished.
    """
    from ... import recording

    if minari is not None:
        recording.check_dataset_id(minari)
    check_report(report)
    with stop_on_signal(expected=True) as stop, StatusLine(quiet=quiet) as line:
        summary = recording.record(
            name,
            out,
            duration=duration,
            steps=steps,
            interval=sample_interval,
            overwrite=overwrite,
            stop=stop.is_set,
            progress=lambda summary: line.show(f"recording {name}: {_words(summary)}; Ctrl-C ends it"),
        )
    typer.echo(f"wrote {out}: {_words(summary)}")
    if report is not None:
        write_report(out, report)
    if minari is not None:
        dataset = recording.to_minari(out, minari)
        typer.echo(f"wrote Minari dataset {minari}: {dataset.total_steps:,} steps, {dataset.total_episodes:,} episodes")


def _words(summary: Summary) -> str:
    rows = summary.observations
    parts = [f"{rows:,} observation{'s' * (rows != 1)} in {summary.seconds:.1f} s", f"{summary.missed:,} missed"]
    if summary.invalid:
        parts.append(f"{summary.invalid:,} invalid")
    if summary.restarts:
        parts.append(f"{summary.restarts:,} restart{'s' * (summary.restarts != 1)} of the producer")
    return ", ".join(parts)
