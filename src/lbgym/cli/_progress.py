"""Progress on standard error: shown on a terminal alone, gone when the work is done."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def _errors() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False)


class ProgressBar:
    """A bar with a status beside it.

    Args:
        title: what is going on, such as "training".
        total: steps that can be counted; None: a share and the time that has passed are shown.
        quiet: show nothing.
        status: before the first update.
    """

    def __init__(self, title: str, *, total: int | None = None, quiet: bool = False, status: str = "starting") -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        console = _errors()
        counts = (
            (TaskProgressColumn(), TimeElapsedColumn())
            if total is None
            else (MofNCompleteColumn(), TimeRemainingColumn())
        )
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            *counts,
            TextColumn("{task.fields[status]}", style="dim", markup=False),
            console=console,
            transient=True,
            disable=quiet or not console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=1.0 if total is None else total, status=status)

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, completed: float, status: str, *, total: float | None = None) -> None:
        """Draw the bar anew: steps, or a share of 1, the status, and the number of steps where it is known only now."""
        self._bar.update(self._task, completed=completed, status=status, total=total)


class StatusLine:
    """One line that changes, where there is no end to measure against."""

    def __init__(self, *, quiet: bool = False) -> None:
        from rich.live import Live

        console = _errors()
        self._quiet = quiet or not console.is_terminal
        self._live = Live(console=console, transient=True, refresh_per_second=4)

    def __enter__(self) -> StatusLine:
        if not self._quiet:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, text: str) -> None:
        """Replace the line."""
        if not self._quiet:
            from rich.text import Text

            self._live.update(Text(text))
