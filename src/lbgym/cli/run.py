"""``lbgym run``: drive a live data plane by a policy."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ..controller.config import KEYS, config_from, help_of
from ..controller.logs import logging_to_stderr
from ..errors import LbgymError
from ._signals import stop_on_signal

logger = logging.getLogger("lbgym.controller")

#: Exit code when no observation came for ``--max-timeouts`` in a row.
SILENT = 3


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
    dry_run: Annotated[bool | None, _option("dry_run", "--dry-run")] = None,
) -> None:
    """Drive a live data plane by a policy: the agent in production.

    It renews the lease of its weights with every step and keeps them within a safety envelope; where the policy fails,
    a fallback decides. Logs go to standard error.

    SIGTERM, SIGHUP and Ctrl-C give the weights up, so that the data plane's safe ones are in force at once, and exit
    with code 0; a second one exits at once. Exit code 3: no observation for --max-timeouts in a row.
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
            outcome = controller.run(stop)
        except LbgymError as error:
            logger.error("%s", error, extra={"event": "error", "region": chosen.shm})
            raise typer.Exit(2) from None
        except Exception:
            logger.critical("a fault of lbgym", exc_info=True, extra={"event": "crash", "region": chosen.shm})
            raise typer.Exit(1) from None
    raise typer.Exit(SILENT if outcome is Outcome.SILENT else 0)
