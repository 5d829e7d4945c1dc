"""Where results are printed."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def results_console() -> Console:
    """Standard output: as wide as the terminal, 120 columns where there is none (a file, a pipe)."""
    from rich.console import Console

    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(highlight=False, width=None if known else 120)
