"""``lbgym shm report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .._command_line import command_line
from .._report import check_report


def report(
    recording: Annotated[Path, typer.Argument(help="Of lbgym shm record or lbgym lab run.", show_default=False)],
    page: Annotated[Path, typer.Argument(help="The HTML file to write.", show_default=False)],
) -> None:
    """Show a recording as one HTML file: load, weights and features of every server over time."""
    check_report(page)
    write_report(recording, page)


def write_report(recording: Path, page: Path) -> None:
    """Write the page of a recording, and say so."""
    from ...recording import load_recording
    from ...report import save_recording_report

    save_recording_report(load_recording(recording), page, command=command_line())
    typer.echo(f"wrote {page}")
