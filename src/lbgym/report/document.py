"""One HTML file that needs nothing else: :func:`document`."""

from __future__ import annotations

import html
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from string import Template

from .. import __version__
from ..atomic import write_whole
from ..evaluation.tables import Table
from .charts import Plot, require_bokeh

#: Characters of a fact that has a row of its own.
_LONG = 60


def document(
    *,
    title: str,
    heading: str,
    verdict: str,
    facts: Mapping[str, str],
    tables: Sequence[Table],
    plots: Sequence[Plot],
    appendix: str = "",
    command: str | None = None,
) -> str:
    """A self-contained page.

    Args:
        title: of the window.
        heading: what the page is about.
        verdict: what it shows, in a sentence.
        facts: how that was found.
        tables: those without rows are left out.
        plots: in their order.
        appendix: HTML after the plots.
        command: the command line that made it.

    Raises:
        MissingExtraError: without Bokeh.
    """
    require_bokeh()
    from bokeh.embed import components
    from bokeh.resources import Resources

    script, divisions = components({f"plot{k}": plot.figure for k, plot in enumerate(plots)}, wrap_script=True)
    assert isinstance(divisions, Mapping)
    figures = "\n".join(
        f"<figure{' class=wide' if plot.wide else ''}><h3>{html.escape(plot.title)}</h3><p>{html.escape(plot.text)}</p>"
        f"{divisions[f'plot{k}']}</figure>"
        for k, plot in enumerate(plots)
    )
    page = files(__package__) / "page"
    return Template((page / "report.html").read_text()).substitute(
        title=html.escape(title),
        style=(page / "report.css").read_text(),
        heading=html.escape(heading),
        verdict=html.escape(verdict),
        facts=_listed({name: html.escape(text) for name, text in facts.items()}),
        tables="\n".join(table_html(table) for table in tables if table.rows),
        figures=figures,
        appendix=appendix,
        versions=_listed(_versions(command)),
        # Its first part; the second would announce itself in the console.
        library=f"<script>{Resources(mode='inline', components=['bokeh']).js_raw[0]}</script>",
        script=script,
    )


def table_html(table: Table) -> str:
    """A table that scrolls where it is wider than the page."""
    title, untitled = html.escape(table.title), replace(table, title="")
    # A table's own caption would be as wide as the table.
    return f'<div class="card"><p class="caption">{title}</p><div class="scroll">{untitled._repr_html_()}</div></div>'


def write_page(path: str | Path, text: str) -> None:
    """Write a page, whole or not at all.

    Raises:
        FileWriteError: if it cannot be written.
    """
    write_whole(Path(path), lambda stream: stream.write(text.encode()))


def _listed(rows: Mapping[str, str]) -> str:
    return "".join(
        f"<div{' class=wide' if len(text) > _LONG else ''}><dt>{html.escape(name)}</dt><dd>{text}</dd></div>"
        for name, text in rows.items()
        if text
    )


def _versions(command: str | None) -> dict[str, str]:
    return {
        "Command": f"<code>{html.escape(command)}</code>" if command else "",
        "lbgym": __version__,
        "Python": f"{platform.python_version()} on {platform.system()}, {platform.machine()}",
        **{name: _version(name) for name in ("numpy", "numba", "gymnasium", "bokeh")},
        "Made": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
