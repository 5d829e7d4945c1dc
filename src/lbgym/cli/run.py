"""``lbgym run``: drive a live data plane by a policy."""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..controller.config import KEYS, config_from, help_of
from ..controller.logs import logging_to_stderr
from ..errors import LbgymError

if TYPE_CHECKING:
    from ..controller.control import Controller

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
    interval: Annotated[float | None, _option("interval")] = None,
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

    SIGTERM and Ctrl-C give the weights up, so that the data plane's safe ones are in force at once, and exit with code
    0; a second one exits at once. Exit code 3: no observation for --max-timeouts in a row.
    """
    given = locals()
    told = config_from({key: given[key] for key in KEYS}, config)
    # The networks are small: a second thread would only take the data plane's cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with logging_to_stderr(told.log_format, told.log_level), _Signals() as signals:
        try:
            from ..controller.control import Controller, Outcome

            signals.controller = Controller(told)
            outcome = signals.controller.run(signals.stop)
        except LbgymError as error:
            logger.error("%s", error, extra={"event": "error", "region": told.shm})
            raise typer.Exit(2) from None
        except Exception:
            logger.critical("a fault of lbgym", exc_info=True, extra={"event": "crash", "region": told.shm})
            raise typer.Exit(1) from None
    raise typer.Exit(SILENT if outcome is Outcome.SILENT else 0)


#: Seconds within which a second signal means the same as the first.
_SAME_SIGNAL = 1.0


class _Signals:
    """The first SIGTERM or SIGINT asks the controller to stop, the second one ends the process; SIGHUP does nothing.

    One that follows within a second is the first once more: who signals a wrapper (timeout, make) and its whole process
    group sends two at once, and the weights must be given up all the same.

    Attributes:
        stop: set by the first.
        controller: None while there is none yet; a signal ends the process then (code 0).
    """

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.controller: Controller | None = None
        self._first = math.nan

    def __enter__(self) -> _Signals:
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        self._before[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.stop.is_set():
            if time.monotonic() - self._first > _SAME_SIGNAL:
                os._exit(128 + number)
            return
        self._first = time.monotonic()
        self.stop.set()
        if self.controller is None:
            raise SystemExit(0)
        self.controller.interrupt()
