"""The command line, ``lbgym``: compare, train, tune, fit, run, scenarios, describe, suite, dashboard, lab,
server-agent, dataplane, shm.

Exit codes: 0; 1 for a fault of lbgym; 2 for what the user can put right; 128 + n after signal n (130 after Ctrl-C), 141
if whoever reads standard output has closed it. Errors are one line on standard error; ``LBGYM_DEBUG=1`` adds the
traceback.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer


__all__ = ["main"]


class _Messages(logging.Handler):
    """Log records as lines on standard error; looked up each time, as a progress bar replaces it while it shows."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"lbgym: {self.format(record)}", file=sys.stderr, flush=True)


def _help(command: Callable[..., None]) -> str:
    """The docstring with a line per paragraph: typer keeps line breaks, whatever the terminal's width."""
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.splitlines()) for paragraph in paragraphs)


def _app() -> typer.Typer:
    import typer

    from . import lab, shm, suite
    from ._options import options
    from .compare import compare
    from .dashboard import dashboard
    from .dataplane import afpacket, check, ctl, emulate, envoy, haproxy, vpp_lb, xdp
    from .fit import fit
    from .run import run
    from .scenarios import describe, scenarios
    from .server_agent import server_agent
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
    for command in (compare, train, tune, fit, run, scenarios, describe, dashboard, server_agent):
        app.command(help=_help(command))(command)
    benchmark = typer.Typer(
        help="Run the benchmark with a fixed protocol, and check and show its results.", no_args_is_help=True
    )
    for part in (suite.run, suite.verify, suite.table, suite.show):
        benchmark.command(help=_help(part))(part)
    app.add_typer(benchmark, name="suite")
    laboratory = typer.Typer(help="Measure policies on real servers on this machine.", no_args_is_help=True)
    for act in (lab.up, lab.status, lab.run, lab.twin, lab.down):
        laboratory.command(help=_help(act))(act)
    app.add_typer(laboratory, name="lab")
    dataplane = typer.Typer(help="Publish a data plane in shared memory, check and change it.", no_args_is_help=True)
    for work in (emulate, xdp, afpacket, haproxy, envoy, vpp_lb, check, ctl):
        dataplane.command(help=_help(work))(work)
    app.add_typer(dataplane, name="dataplane")
    regions = typer.Typer(help="Look at regions of shared memory, record them, remove them.", no_args_is_help=True)
    for look in (shm.ls, shm.inspect, shm.watch, shm.record, shm.report, shm.rm, shm.include):
        regions.command(help=_help(look))(look)
    app.add_typer(regions, name="shm")
    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: None: those of the process.

    Raises:
        SystemExit: always, with the exit code.
    """
    from ._command_line import running
    from ._outcome import exit_code_of
    from ._signals import interruptible

    logger = logging.getLogger("lbgym")
    if not logger.handlers:
        logger.addHandler(_Messages())
        logger.propagate = False
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)

    def command() -> None:
        import typer

        given = list(sys.argv[1:] if arguments is None else arguments)
        group = typer.main.get_command(_app())
        # Not group.main, which makes "Aborted." of an EOFError and exit code 1 of a closed pipe.
        with running(given), group.make_context("lbgym", given) as context:
            group.invoke(context)

    with interruptible():
        code = exit_code_of(command)
    sys.exit(code)
