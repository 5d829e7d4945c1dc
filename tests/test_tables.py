"""Tables of results on terminals."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from lbgym.cli._tables import drawn_table
from lbgym.evaluation.tables import Cell, Table

HEADINGS = "contender", "knows", "mean FCT, ms", "p99", "P(< sed)", "worst scenario", "rejected, %"


@pytest.mark.parametrize("width", [50, 60, 80, 100, 140])
def test_no_number_is_cut_off_however_narrow_the_terminal(width: int) -> None:
    cells = [
        [Cell(f"contender-{i}"), Cell("oracle"), *(Cell(f"{i}{j}7.123", f"±0.{i}{j}9") for j in range(5))]
        for i in range(1, 4)
    ]
    stream = io.StringIO()
    console = Console(file=stream, width=width)
    console.print(drawn_table(Table("What was measured", HEADINGS, cells), console))
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= width and "…" not in stream.getvalue()
    assert stream.getvalue().count("What was measured") == 1
    words = stream.getvalue().split()
    for row in cells:
        for cell in row[1:]:
            assert cell.text in words and (not cell.spread or words.count(cell.spread) == 1)
    # A row of every part says whose it is.
    parts = words.count("contender")
    assert [words.count(row[0].text) for row in cells] == [parts] * 3
    assert (parts > 1) == (width < 80)
    assert all(word in words for heading in HEADINGS for word in heading.split())
