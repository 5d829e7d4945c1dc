"""Draws the tables of a comparison on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from ..evaluation.tables import Cell, Table, Verdict

if TYPE_CHECKING:
    from rich.console import Console

_STYLES = {
    Verdict.NONE: "",
    Verdict.BEST: "bold green",
    Verdict.BETTER: "green",
    Verdict.WORSE: "red",
    Verdict.UNCLEAR: "dim",
}


def drawn_table(table: Table, console: Console) -> RichTable:
    """The table; half widths of intervals are below their means where the terminal is too narrow."""
    drawn = _draw(table, console, " ")
    if console.measure(drawn, options=console.options.update(width=1000)).maximum <= console.width:
        return drawn
    return _draw(table, console, "\n")


def plain(text: str, console: Console) -> str:
    """The text without the plus-minus sign where the terminal lacks it."""
    return text.replace("±", "+/-") if console.options.ascii_only else text


def _draw(table: Table, console: Console, between: str) -> RichTable:
    def text(cell: Cell) -> Text:
        spread = f"{between}{cell.spread}" if cell.spread else ""
        return Text(plain(f"{cell.text}{spread}", console), style=_STYLES[cell.verdict])

    title = plain(table.title, console)
    drawn = RichTable(
        box=box.SIMPLE_HEAD,
        title=Text(title, style="italic"),
        title_justify="left",
        pad_edge=False,
        padding=(0, 1),
        collapse_padding=True,
        # A narrow table does not break its title over two lines.
        min_width=min(len(title), console.width),
    )
    for i, heading in enumerate(table.columns):
        drawn.add_column(Text(heading), justify="right" if i else "left", no_wrap=True)
    for name, *cells in table.rows:
        drawn.add_row(Text(plain(name.text, console), style="bold"), *map(text, cells))
    return drawn
