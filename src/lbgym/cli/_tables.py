"""Draws the tables of a comparison on a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group
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


def drawn_table(table: Table, console: Console) -> Group:
    """The table.

    Where the terminal is too narrow, half widths of intervals are below their means, headings are broken at their
    spaces, and at last columns go on below: no number is cut off.
    """
    every = range(1, len(table.columns))
    for between, heading in ((" ", " "), ("\n", " "), ("\n", "\n")):
        drawn = _draw(table, every, console, between, heading)
        if _width(drawn, console) <= console.width:
            return Group(drawn)
    blocks: list[list[int]] = []
    for column in every:
        if blocks and _width(_draw(table, [*blocks[-1], column], console, "\n", "\n"), console) <= console.width:
            blocks[-1].append(column)
        else:
            blocks.append([column])
    return Group(*(_draw(table, block, console, "\n", "\n", title=i == 0) for i, block in enumerate(blocks)))


def _width(drawn: RichTable, console: Console) -> int:
    return console.measure(drawn, options=console.options.update(width=1000)).maximum


def plain(text: str, console: Console) -> str:
    """The text without the plus-minus sign where the terminal lacks it."""
    return text.replace("±", "+/-") if console.options.ascii_only else text


def _draw(
    table: Table, columns: Iterable[int], console: Console, between: str, in_heading: str, title: bool = True
) -> RichTable:
    def text(cell: Cell) -> Text:
        spread = f"{between}{cell.spread}" if cell.spread else ""
        return Text(plain(f"{cell.text}{spread}", console), style=_STYLES[cell.verdict])

    words = plain(table.title, console) if title else ""
    drawn = RichTable(
        box=box.SIMPLE_HEAD,
        title=Text(words, style="italic") if words else None,
        title_justify="left",
        pad_edge=False,
        padding=(0, 1),
        collapse_padding=True,
        # A narrow table does not break its title over two lines.
        min_width=min(len(words), console.width),
    )
    chosen = [0, *columns]
    for i in chosen:
        heading = Text(plain(table.columns[i], console).replace(" ", in_heading))
        drawn.add_column(heading, justify="right" if i else "left", no_wrap=True, vertical="top")
    for row in table.rows:
        name, *cells = (row[i] for i in chosen)
        drawn.add_row(Text(plain(name.text, console), style="bold"), *map(text, cells))
    return drawn
