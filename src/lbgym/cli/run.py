"""``lbgym run``: drive a live data plane by a policy."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..controller.config import KEYS, config_from, help_of
from ..controller.logs import logging_to_stderr
from ..errors import LbgymError
from ._console import results_console
from ._signals import stop_on_signal

if TYPE_CHECKING:
    from ..controller import Controller
    from ..controller.shadow import Shadow

logger = logging.getLogger("lbgym.controller")

#: Exit code when no observation came for ``--max-timeouts`` in a row.
SILENT = 3
#: Exit code when the rollback rule handed back to the safe weights.
ROLLED_BACK = 4


def _option(key: str, *names: str) -> Any:
    """The option of a key of the configuration: None where it is not given, so that the file counts."""
    return typer.Option(*names, help=help_of(key), show_default=False)


def run(
    policy: Annotated[str | None, _option("policy", "--policy", "-p")] = None,
    shm: Annotated[str | None, _option("shm")] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="TOML file with the same keys as these options, _ for -.")
    ] = None,
    step_interval: Annotated[float | None, _option("step_interval")] = None,
    scenario: Annotated[str | None, _option("scenario", "--scenario", "-s")] = None,
    lease: Annotated[float | None, _option("lease")] = None,
    timeout: Annotated[float | None, _option("timeout")] = None,
    attach_timeout: Annotated[float | None, _option("attach_timeout")] = None,
    max_timeouts: Annotated[int | None, _option("max_timeouts")] = None,
    fallback: Annotated[str | None, _option("fallback")] = None,
    fallback_after: Annotated[int | None, _option("fallback_after")] = None,
    trial_steps: Annotated[int | None, _option("trial_steps")] = None,
    recover: Annotated[bool | None, _option("recover")] = None,
    floor: Annotated[float | None, _option("floor")] = None,
    max_ratio: Annotated[float | None, _option("max_ratio")] = None,
    rate_limit: Annotated[float | None, _option("rate_limit")] = None,
    smoothing: Annotated[float | None, _option("smoothing")] = None,
    metrics_port: Annotated[int | None, _option("metrics_port")] = None,
    metrics_address: Annotated[str | None, _option("metrics_address")] = None,
    log_format: Annotated[str | None, _option("log_format")] = None,
    log_level: Annotated[str | None, _option("log_level")] = None,
    summary_interval: Annotated[float | None, _option("summary_interval")] = None,
    duration: Annotated[float | None, _option("duration")] = None,
    steps: Annotated[int | None, _option("steps")] = None,
    shadow: Annotated[bool | None, _option("shadow", "--shadow")] = None,
    out: Annotated[str | None, _option("out", "--out", "-o")] = None,
    share: Annotated[float | None, _option("share")] = None,
    ramp: Annotated[float | None, _option("ramp")] = None,
    rollback: Annotated[float | None, _option("rollback")] = None,
    rollback_metric: Annotated[str | None, _option("rollback_metric")] = None,
    rollback_failures: Annotated[float | None, _option("rollback_failures")] = None,
    rollback_slot: Annotated[float | None, _option("rollback_slot")] = None,
    rollback_alarm: Annotated[float | None, _option("rollback_alarm")] = None,
) -> None:
    """Drive a live data plane by a policy: the agent in production.

    It renews the lease of its weights with every step and keeps them within a safety envelope; where the policy fails,
    a fallback decides. Logs go to standard error.

    SIGTERM, SIGHUP and Ctrl-C give the weights up, so that the data plane's safe ones are in force at once, and exit
    with code 0; a second one exits at once. Exit code 3: no observation for --max-timeouts in a row; 4: --rollback has
    handed back to the safe weights.
    """
    given = locals()
    chosen = config_from({key: given[key] for key in KEYS}, config)
    # The networks are small: a second thread would only take the data plane's cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with (
        logging_to_stderr(chosen.log_format, chosen.log_level),
        stop_on_signal(expected=True, patience=False) as stop,
    ):
        try:
            stop.raises = True
            from ..controller.control import Controller, Outcome

            controller = Controller(chosen)
            stop.raises, stop.then = False, controller.interrupt
            with _reports_on_signal(controller):
                outcome = controller.run(stop)
        except LbgymError as error:
            logger.error("%s", error, extra={"event": "error", "region": chosen.shm})
            raise typer.Exit(2) from None
        except Exception:
            logger.critical("a fault of lbgym", exc_info=True, extra={"event": "crash", "region": chosen.shm})
            raise typer.Exit(1) from None
    if controller.shadow is not None:
        _show(controller.shadow)
    raise typer.Exit({Outcome.SILENT: SILENT, Outcome.ROLLED_BACK: ROLLED_BACK}.get(outcome, 0))


@contextmanager
def _reports_on_signal(controller: Controller) -> Iterator[None]:
    """A shadow reports on SIGUSR1."""
    if controller.shadow is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGUSR1, lambda *_: controller.request_report())
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


def _show(shadow: Shadow) -> None:
    """What the policy would have done, as a table on standard output."""
    from ..evaluation.tables import Cell, Table
    from ._tables import drawn_table, plain

    console, summary = results_console(), shadow.summary()
    if not summary["steps"]:
        said = f"{summary['policy']} in the shadow of region {summary['region']}: no decisions"
        console.print(plain(said, console), markup=False)
        return
    console.print(
        plain(
            f"{summary['policy']} in the shadow of region {summary['region']}: {summary['steps']:,} decisions in "
            f"{summary['seconds']:.0f} s, {summary['fallback_steps']:,} of them by the fallback.\n"
            f"Of the new flows, {100 * summary['moved_mean']:.1f} % in the mean and {100 * summary['moved_max']:.1f} % "
            "at most would have gone elsewhere; from one decision to the next "
            f"{100 * summary['churn_mean']:.1f} % move.",
            console,
        ),
        markup=False,
    )
    rows = tuple(
        (
            Cell(row["server"]),
            Cell(f"{100 * row['share']:.1f} %"),
            Cell(f"{100 * row['share_low']:.1f} to {100 * row['share_high']:.1f}"),
            Cell(f"{100 * row['in_force']:.1f} %"),
            Cell(f"{row['open_flows']:.3g}"),
            Cell(f"{1e3 * row['fct_mean_decay']:.3g}"),
        )
        for row in shadow.servers()
    )
    columns = ("", "share", "least to most", "in force", "open flows", "FCT, ms")
    console.print(drawn_table(Table("Shares of the weights", columns, rows), console))
