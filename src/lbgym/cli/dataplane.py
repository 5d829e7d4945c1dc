"""``lbgym dataplane``: publish a data plane in shared memory, check a driver, and change its servers while it runs."""

from __future__ import annotations

import json
import logging
from contextlib import ExitStack
from typing import Annotated, Any

import typer

from ..errors import InvalidOptionError
from ..scenarios import fixed_scenario
from ._signals import stop_on_signal

logger = logging.getLogger("lbgym")


def emulate(
    name: Annotated[
        str, typer.Option("--name", help="Name of the region; with m balancers NAME_0 to NAME_{m-1}, one for each.")
    ],
    scenario: Annotated[
        str, typer.Option("--scenario", "-s", help="Name of a scenario or path of a TOML file.")
    ] = "heterogeneous",
    speedup: Annotated[float, typer.Option(help="Simulated seconds per second.")] = 1.0,
    publish_interval: Annotated[float, typer.Option(help="Simulated seconds between observations.")] = 0.05,
    dispatch: Annotated[str | None, typer.Option(help="Dispatch rule, instead of the scenario's.")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of the flows.", show_default="one from the operating system")
    ] = None,
    duration: Annotated[
        float | None, typer.Option(help="Simulated seconds until it ends.", show_default="until it is stopped")
    ] = None,
    safe_weights: Annotated[
        str | None,
        typer.Option(help="Weights in force without an agent's, separated by commas.", show_default="numbers of cores"),
    ] = None,
    capacity: Annotated[
        int | None, typer.Option(help="Servers a region has room for.", show_default="64, or more if needed")
    ] = None,
    mode: Annotated[str, typer.Option(help="Permissions of the regions, octal.")] = "600",
    group: Annotated[str | None, typer.Option(help="Owning group of the regions.", show_default="the user's")] = None,
) -> None:
    """Emulate a data plane: a scenario simulated in real or scaled time behind shared memory.

    Prints one line as soon as agents can attach. SIGTERM, SIGHUP or Ctrl-C end it: the regions are removed, and the
    exit code is 0. Servers are drained and undrained by `lbgym dataplane ctl`.
    """
    from ..drivers import Emulator

    chosen = fixed_scenario(scenario)
    options: dict[str, Any] = {
        "speedup": speedup,
        "publish_interval": publish_interval,
        "dispatch": dispatch,
        "seed": seed,
        "safe_weights": None if safe_weights is None else _numbers(safe_weights),
        "capacity": capacity,
        "mode": _permissions(mode),
        "group": group,
    }
    with ExitStack() as stack:
        stop = stack.enter_context(stop_on_signal(expected=True))
        stop.raises = True  # while it compiles and starts
        emulator = stack.enter_context(Emulator(chosen, name, **options))
        stop.raises = False
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


def check(
    name: Annotated[str, typer.Argument(help="Name of the region.")],
    observations: Annotated[int, typer.Option(help="Observations to watch.")] = 24,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for each.")] = 10.0,
    only_look: Annotated[bool, typer.Option("--only-look", help="Write no actions.")] = False,
    end: Annotated[bool, typer.Option("--end", help="Also end the driver by SIGTERM.")] = False,
) -> None:
    """Hold a running driver, in whatever language, to the contract: one line per check.

    It drives the region for a moment and leaves it with the safe weights in force. Exit code 1: a check failed.
    """
    from ..drivers.check import check_driver

    verdicts = check_driver(name, observations=observations, timeout=timeout, drive=not only_look, end=end)
    for verdict in verdicts:
        typer.echo(str(verdict))
    if any(verdict.passed is False for verdict in verdicts):
        raise typer.Exit(1)


#: Requests of ``ctl`` that name a server.
_OF_A_SERVER = ("add", "drain", "undrain", "remove")


def ctl(
    name: Annotated[str, typer.Argument(help="Name of the region.")],
    request: Annotated[str, typer.Argument(help="list, add, drain, undrain, remove or reload.")],
    server: Annotated[str | None, typer.Argument(help="Name of the server.", show_default=False)] = None,
    address: Annotated[str | None, typer.Option(help="Of a server to add.", show_default=False)] = None,
    port: Annotated[int | None, typer.Option(help="Of a server to add.", show_default=False)] = None,
    weight: Annotated[float, typer.Option(help="Of a server to add: relative speed.")] = 1.0,
    cores: Annotated[int | None, typer.Option(help="Of a server to add.", show_default=False)] = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the driver.")] = 10.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the driver's answer as JSON.")] = False,
) -> None:
    """List, add, drain and remove servers of a running driver, or have it read its configuration again.

    A server that is drained or removed finishes its flows and takes no new ones; a removed one is forgotten then.
    """
    from ..drivers.control import control

    if request in _OF_A_SERVER and server is None:
        raise InvalidOptionError(f"{request} needs the name of a server: lbgym dataplane ctl {name} {request} SERVER")
    if request == "add" and address is None:
        raise InvalidOptionError("add needs --address")
    message: dict[str, Any] = {"op": request}
    if request in _OF_A_SERVER:
        message["server"] = server
    if request == "add":
        message |= {"address": address, "port": port, "weight": weight, "cores": cores}
    answer = control(name, message, timeout)
    if as_json:
        typer.echo(json.dumps(answer))
        return
    if answer["done"]:
        typer.echo(f"{name}: {answer['done']}")
    if request == "list":
        width = max((len(row["name"]) for row in answer["servers"]), default=0)
        for row in answer["servers"]:
            typer.echo(f"{row['slot']:>5}  {row['name']:{width}}  {row['state']:8}  weight {row['weight']:g}")


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
