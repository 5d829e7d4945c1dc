"""``lbgym dataplane``: what publishes a data plane in shared memory."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated, Any

import typer

from ..errors import InvalidOptionError
from ..scenarios import fixed_scenario

logger = logging.getLogger("lbgym")


def emulate(
    name: Annotated[
        str, typer.Option("--name", help="Name of the region; with m balancers NAME_0 to NAME_{m-1}, one for each.")
    ],
    scenario: Annotated[
        str, typer.Option("--scenario", "-s", help="Name of a scenario or path of a TOML file.")
    ] = "heterogeneous",
    speedup: Annotated[float, typer.Option(help="Simulated seconds per second.")] = 1.0,
    interval: Annotated[float, typer.Option(help="Simulated seconds between observations.")] = 0.05,
    dispatch: Annotated[str | None, typer.Option(help="Dispatch rule, instead of the scenario's.")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of the flows.", show_default="one from the operating system")
    ] = None,
    duration: Annotated[
        float | None, typer.Option(help="Simulated seconds until it ends.", show_default="until it is stopped")
    ] = None,
    safe_weights: Annotated[
        str | None,
        typer.Option(
            help="Weights while no agent's are good, separated by commas.", show_default="the numbers of cores"
        ),
    ] = None,
    capacity: Annotated[
        int | None, typer.Option(help="Servers a region has room for.", show_default="64, or more if needed")
    ] = None,
    mode: Annotated[str, typer.Option(help="Permissions of the regions, octal.")] = "600",
    group: Annotated[str | None, typer.Option(help="Owning group of the regions.", show_default="the user's")] = None,
) -> None:
    """Emulate a data plane: a scenario simulated in real or scaled time behind shared memory.

    Prints one line as soon as agents can attach. SIGTERM or Ctrl-C end it: the regions are removed, and the exit
    code is 0.
    """
    from ..drivers import Emulator

    chosen = fixed_scenario(scenario)
    options: dict[str, Any] = {
        "speedup": speedup,
        "publish_interval": interval,
        "dispatch": dispatch,
        "seed": seed,
        "safe_weights": None if safe_weights is None else _numbers(safe_weights),
        "capacity": capacity,
        "mode": _permissions(mode),
        "group": group,
    }
    with _stop_signals() as stop, Emulator(chosen, name, **options) as emulator:
        stop.interrupts = False
        names = [region.name for region in emulator.regions]
        typer.echo(
            f"{'region' if len(names) == 1 else 'regions'} {', '.join(names)}: {chosen.num_servers} servers, scenario "
            f"{chosen.name}, an observation every {emulator.publish_interval:g} s, {emulator.speedup:g} times real "
            f"time, seed {emulator.seed}"
        )
        emulator.run(stop, duration)
        logger.info(
            "%.6g s emulated, %d observations, %d of them late, clock stood still for %.3g s",
            emulator.time, emulator.observations, emulator.slips, emulator.lost,
        )  # fmt: skip


class _Stop(threading.Event):
    """Set by a signal, which also ends the process (code 0) as long as ``interrupts``: while it compiles or starts."""

    interrupts = True


@contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """An event that SIGTERM and SIGINT set."""
    stop = _Stop()

    def end(_number: int, _frame: FrameType | None) -> None:
        stop.set()
        if stop.interrupts:
            raise SystemExit(0)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InvalidOptionError(f"--safe-weights takes numbers separated by commas, got {text!r}") from None


def _permissions(text: str) -> int:
    try:
        return int(text, 8)
    except ValueError:
        raise InvalidOptionError(f"--mode takes octal permissions such as 600 or 660, got {text!r}") from None
