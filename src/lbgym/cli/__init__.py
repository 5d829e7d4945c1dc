"""The command line, ``lbgym``: compare, train, tune, run, scenarios, describe, dataplane, shm.

Exit codes: 0; 1 for a fault of lbgym, with its traceback; 2 for what the user can put right, in one line on
standard error; 130 after Ctrl-C.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import LbgymError

if TYPE_CHECKING:
    import typer


class _Messages(logging.Handler):
    """Log records as lines on standard error; looked up each time, as a progress bar replaces it while it shows."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"lbgym: {self.format(record)}", file=sys.stderr, flush=True)


def _guarded(command: Callable[..., None]) -> Callable[..., None]:
    """The command with our exceptions as one line and exit code 2, and Ctrl-C as exit code 130."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        import typer

        try:
            command(*args, **kwargs)
        except LbgymError as error:
            print(f"lbgym: error: {error}", file=sys.stderr)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            print("lbgym: interrupted", file=sys.stderr)
            raise typer.Exit(130) from None
        except BrokenPipeError:
            # The reader (head, less) has had enough; Python would complain once more when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(141) from None

    return run


def _app() -> typer.Typer:
    import typer

    from . import shm
    from ._options import options
    from .compare import compare
    from .dataplane import check, ctl, emulate
    from .run import run
    from .scenarios import describe, scenarios
    from .train import train
    from .tune import tune

    app = typer.Typer(
        name="lbgym",
        help="A reinforcement-learning environment for network load balancing.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    app.callback()(options)
    for command in (compare, train, tune, run, scenarios, describe):
        app.command()(_guarded(command))
    dataplane = typer.Typer(help="Publish a data plane in shared memory, check and change it.", no_args_is_help=True)
    for work in (emulate, check, ctl):
        dataplane.command()(_guarded(work))
    app.add_typer(dataplane, name="dataplane")
    regions = typer.Typer(help="Look at regions of shared memory, record them, remove them.", no_args_is_help=True)
    for look in (shm.ls, shm.inspect, shm.watch, shm.record, shm.rm, shm.include):
        regions.command()(_guarded(look))
    app.add_typer(regions, name="shm")
    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: None: those of the process.
    """
    logger = logging.getLogger("lbgym")
    if not logger.handlers:
        logger.addHandler(_Messages())
        logger.propagate = False
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    try:
        app = _app()
    except ImportError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("typer", "rich"):
            raise
        print(f"lbgym: error: the command line needs {missing!r}: pip install 'lbgym[eval]'", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    app(args=None if arguments is None else list(arguments), prog_name="lbgym")
