"""The option ``--report`` of commands that write an HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..atomic import check_writable

Report = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="One HTML file with verdict, tables and interactive plots; it needs no network."),
]


def check_report(report: Path | None) -> None:
    """Refuse before the work starts a page that could not be written when it is done.

    Raises:
        MissingExtraError: without Bokeh.
        FileWriteError: if the file cannot be written.
    """
    if report is None:
        return
    from ..report.charts import require_bokeh

    require_bokeh()
    check_writable(report)
