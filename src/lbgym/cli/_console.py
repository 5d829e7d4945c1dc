"""Where results are printed."""

from __future__ import annotations

import os
import sys
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def results_console() -> Console:
    """Standard output: as wide as the terminal, 120 columns where there is none (a file, a pipe)."""
    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return _console_class()(highlight=False, width=None if known else 120)


@cache
def _console_class() -> type[Console]:
    from rich.console import Console

    class ResultsConsole(Console):
        def on_broken_pipe(self) -> None:
            # Rich would end the process with exit code 1.
            raise

    return ResultsConsole
