"""The console for results."""

from __future__ import annotations

import json
import math
import os
import sys
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text


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


def heading(name: str, rest: str) -> Text:
    """A name in bold and what follows it, both as they are: brackets of a user's text are no markup."""
    from rich.text import Text

    return Text.assemble((name, "bold"), rest)


def print_json(document: Any, *, indent: int | None = 1) -> None:
    """Print a document as JSON; numbers that JSON does not have are null."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, list):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    print(json.dumps(finite(document), indent=indent, allow_nan=False))
