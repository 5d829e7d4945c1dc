"""``lbgym shm watch``: draws what :class:`lbgym.monitor.RegionMonitor` sees."""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Group
from rich.live import Live
from rich.text import Text

from ...formatting import age, bar, seconds, short, shortened
from .._console import results_console
from .._signals import Interrupted, stop_on_signal
from .._words import SERVER_STYLES, STATE_STYLES, clock, lease
from ._arguments import Name

if TYPE_CHECKING:
    from rich.console import Console

    from ...monitor import ObservationView, RegionMonitor, RegionView, ServerColumns

#: Lines of the heading that say who lives and who acts.
_HEADING = 4

_LEVELS = "▁▂▃▄▅▆▇█"
_GAP = 2
_SERVER, _NARROW, _BAR, _STATE = 6, 6, 4, 8
#: From so many lines for servers on, some are given to strips of all of them.
_LEAST_ROWS = 12
#: Width from which on there is a column for the servers' states.
_WITH_STATE = 60


def watch(
    name: Name,
    rate: Annotated[float, typer.Option(min=0.1, max=30.0, help="Pictures per second.")] = 4.0,
    once: Annotated[bool, typer.Option("--once", help="Print one picture and exit.")] = False,
) -> None:
    """Watch a region live: load, weights, FCT, who publishes and who acts. Read-only; q or Ctrl-C ends it."""
    from ...monitor import RegionMonitor

    console = results_console()
    try:
        with RegionMonitor(name) as monitor:
            if console.is_terminal and not once:
                _show_live(monitor, console, rate)
                return
            monitor.look_twice()
            console.print(picture(monitor.view(), console))
            while not once:
                sys.stdout.flush()
                monitor.look_until(time.monotonic() + 1.0 / rate)
                console.print(picture(monitor.view(), console))
    except KeyboardInterrupt as end:
        # Ctrl-C is how one leaves, as in top.
        if isinstance(end, Interrupted) and end.signum != signal.SIGINT:
            raise


# Drawing


def picture(view: RegionView, console: Console, *, screen: bool = False) -> Group:
    """The picture, as wide as the console, and as high if it is to fill the ``screen``."""
    unicode = not console.options.ascii_only
    width, height = console.size if screen else (console.width, 1_000_000)
    lines = _heading(view, width, screen)
    if view.observation is not None:
        style = "yellow" if view.observation.safe else "cyan"
        room = height - len(lines) - 1
        lines += [Text(), *_table(view.observation.servers, style, width, room, unicode)]
    if view.stale:
        # What is left of the last observation.
        for line in lines[_HEADING:]:
            line.stylize("dim")
    for line in lines:
        line.no_wrap, line.overflow = True, "crop" if screen else "ignore"
    return Group(*lines)


def _heading(view: RegionView, width: int, screen: bool) -> list[Text]:
    observation = view.observation
    title = Text.assemble((view.name, "bold"), f"  {view.driver}{clock(view.clock_rate)}")
    if observation is not None:
        n, active = len(observation.servers.active), int(observation.servers.active.sum())
        title.append(f"  {active:,} of {n:,} servers active", "" if active == n else "yellow")
    right = ("q quits  " if screen else "") + time.strftime("%H:%M:%S")
    title.append(" " * max(2, width - title.cell_len - len(right)) + right, "dim")

    producer = Text.assemble(
        ("producer ", "dim"), (view.producer, STATE_STYLES[view.producer]), f"  process {view.producer_pid}"
    )
    if view.restarts:
        producer.append(f"  restarts {view.restarts:,}", "yellow")
    if view.producer != "alive":
        producer.append(f"  last heard {age(view.heartbeat_age)} ago, waiting", "bold red")
    elif view.silent is not None:
        producer.append(f"  silent for {age(view.silent)}", "bold yellow")
        producer.append(f", last sign of life {age(view.heartbeat_age)} ago")
    else:
        producer.append(f"  up {age(view.up)}")

    agent = Text.assemble(("agent    ", "dim"), (view.agent, STATE_STYLES[view.agent]))
    if view.agent_pid is not None:
        agent.append(f"  process {view.agent_pid}")
    if view.action is not None:
        agent.append(f"  action {view.action.sequence_id:,}, {age(view.action.age)} old, ")
        left = view.action.lease_left
        agent.append(lease(view.action.lease, left), "" if left > 0.0 else "bold yellow")
    lines = [title, producer, agent]
    if observation is None:
        lines.append(Text.assemble(("observed ", "dim"), "nothing yet"))
    else:
        observed = Text.assemble(("observed ", "dim"), f"{observation.sequence_id:,}  ")
        observed.append(f"{age(observation.age)} old", "bold yellow" if view.stale else "")
        if not view.stale:
            observed.append(f"  {'-' if observation.rate is None else short(observation.rate)}/s")
        observed.append(f"  clock {observation.timestamp:,.2f} s")
        lines += [_weights(observation), observed, _flows(observation)]
    if view.problem:
        lines.append(Text(view.problem, "bold red"))
    return lines


def _weights(observation: ObservationView) -> Text:
    weights = Text.assemble(("weights  ", "dim"))
    applied, delay = observation.applied, observation.delay
    if observation.safe:
        weights.append("safe weights in force", "bold yellow")
        weights.append("" if applied is None else f"  last applied action {applied:,}")
        return weights
    weights.append(f"of action {applied:,}" if applied is not None else "of no action")
    if applied is not None and delay is not None:
        which = "" if delay.sequence_id == applied else f" (action {delay.sequence_id:,})"
        weights.append(f", in force {age(delay.seconds)} after it was written{which}")
    return weights


def _flows(observation: ObservationView) -> Text:
    servers = observation.servers
    new = "-" if servers.new is None else short(float(servers.new.sum()))
    opened = "-" if servers.open is None else f"{servers.open.sum():,.0f}"
    line = Text.assemble(("flows    ", "dim"), f"{new}/s new  {opened} open")
    if observation.mean_fct is not None:
        line.append(f"  mean FCT {seconds(observation.mean_fct)}")
    lost = int(servers.lost.sum()) + observation.unrouted
    line.append(f"  {lost:,} lost", "red" if lost else "")
    line.append(f"  {servers.completed.sum():,} completed")
    return line


def _table(servers: ServerColumns, weight_style: str, width: int, height: int, unicode: bool) -> list[Text]:
    """A table of the servers in at most ``height`` lines; if there are too many, the busiest, and strips of all."""
    n = len(servers.active)
    rows = max(1, height - 1)
    panels = 1
    if n > rows:
        # Side by side, where the terminal is wide enough.
        panels = max(1, min(width // 78, -(-n // rows)))
    shown = np.arange(n)
    below: list[Text] = []
    if n > rows * panels:
        below = _strips(servers, weight_style, width, unicode) if rows >= _LEAST_ROWS else []
        rows = max(1, rows - len(below) - 1)
        load, unit = (servers.weights, "less weight") if servers.open is None else (servers.open, "fewer open flows")
        busiest = np.argsort(-load, kind="stable")[: rows * panels]
        shown = np.sort(busiest)
        rest = np.setdiff1d(np.arange(n), shown)
        out = int((~servers.active[rest]).sum())
        below.append(
            Text(
                f"and {len(rest):,} servers with {unit}, {load[rest].sum():,.0f} in all"
                + (f"; {out:,} of them out of service" if out else ""),
                "dim",
            )
        )
    count = -(-len(shown) // panels)
    each = (width - _GAP * (panels - 1)) // panels
    parts = [_panel(servers, weight_style, shown[k * count : (k + 1) * count], each, unicode) for k in range(panels)]
    lines = []
    for k in range(count + 1):
        line = Text()
        for part in parts:
            if k < len(part):
                line.append(" " * _GAP if line else "")
                line.append_text(part[k])
                line.pad_right(max(0, each - part[k].cell_len))
        lines.append(line)
    return [*lines, *below]


def _panel(
    servers: ServerColumns, weight_style: str, which: NDArray[np.int64], width: int, unicode: bool
) -> list[Text]:
    """A table of some servers, with the columns that fit."""
    right: dict[str, tuple[int, Callable[[int], str]]] = {
        "FCT": (8, lambda j: _measured(servers.fct, j, seconds)),
        "FCT p90": (8, lambda j: _measured(servers.fct_p90, j, seconds)),
        "new/s": (6, lambda j: _measured(servers.new, j, _rate)),
        "duration": (8, lambda j: _measured(servers.duration, j, seconds)),
        "CPU": (4, lambda j: _measured(servers.cpu, j, "{:.0%}".format)),
        "dur. p90": (8, lambda j: _measured(servers.duration_p90, j, seconds)),
        "lost": (7, lambda j: f"{servers.lost[j]:,}"),
        "completed": (11, lambda j: f"{servers.completed[j]:,}"),
    }
    if servers.cpu is None:
        del right["CPU"]
    # Names take a quarter of the width at most; states are there if the data plane says any.
    longest = max((len(servers.labels[j]) for j in which.tolist()), default=0)
    name = min(max(_SERVER, longest), max(_SERVER, width // 4))
    named = longest > _SERVER or any(not label.isdecimal() for label in servers.labels)
    with_state = width >= _WITH_STATE and any(state != "unknown" for state in servers.states)
    left = width - name - 2 * (_GAP + _NARROW + 1 + _BAR) - (_GAP + _STATE if with_state else 0)
    titles = []
    for title, (size, _) in right.items():
        if left < size + _GAP:
            break
        titles.append(title)
        left -= size + _GAP
    # What is left is for the bars: two parts for the load, one for the weights.
    weight_bar = _BAR + max(0, left) // 3
    load_bar = _BAR + max(0, left) - max(0, left) // 3
    most = 1.0 if servers.open is None else float(servers.open.max(initial=0.0)) or 1.0
    heaviest = float(servers.weights.max(where=servers.active, initial=0.0)) or 1.0
    gap = " " * _GAP
    align = "<" if named else ">"
    heading = Text(f"{'server':{align}{name}}{gap}", "dim")
    if with_state:
        heading.append(f"{'state':<{_STATE}}{gap}")
    heading.append(f"{'open flows':<{_NARROW + 1 + load_bar}}{gap}{'weight':<{_NARROW + 1 + weight_bar}}")
    for title in titles:
        heading.append(gap + f"{title:>{right[title][0]}}")
    lines = [heading]
    for j in which.tolist():
        line = Text(f"{shortened(servers.labels[j], name):{align}{name}}{gap}")
        if with_state:
            line.append(f"{servers.states[j]:<{_STATE}}{gap}", SERVER_STYLES[servers.states[j]])
        line.append(f"{_measured(servers.open, j, short):>{_NARROW}} ")
        line.append(bar(0.0 if servers.open is None else servers.open[j] / most, load_bar, unicode), "blue")
        if not servers.active[j]:
            line.append(f"{gap}out of service")
            line.stylize("dim")
            lines.append(line)
            continue
        line.append(f"{gap}{_weight(float(servers.weights[j])):>{_NARROW}} ")
        line.append(bar(servers.weights[j] / heaviest, weight_bar, unicode), weight_style)
        for title in titles:
            size, cell = right[title]
            line.append(f"{gap}{cell(j):>{size}}", _tone(servers, title, j))
        lines.append(line)
    return lines


def _measured(values: NDArray[np.float64] | None, j: int, text: Callable[[float], str]) -> str:
    """A server's value, "-" where this data plane does not measure it."""
    return "-" if values is None or np.isnan(values[j]) else text(float(values[j]))


def _rate(rate: float) -> str:
    """One decimal where that says enough, so that columns do not wobble."""
    return f"{rate:.1f}" if rate < 1000.0 else short(rate)


def _weight(weight: float) -> str:
    """Two decimals, likewise."""
    return f"{weight:.2f}" if weight == 0.0 or 0.01 <= weight < 1000.0 else short(weight)


def _tone(servers: ServerColumns, title: str, j: int) -> str:
    if title == "CPU" and servers.cpu is not None and not np.isnan(servers.cpu[j]):
        return "red" if servers.cpu[j] >= 0.9 else "yellow" if servers.cpu[j] >= 0.7 else "green"
    return "red" if title == "lost" and servers.lost[j] else ""


def _strips(servers: ServerColumns, weight_style: str, width: int, unicode: bool) -> list[Text]:
    """One character per server, or for the largest of a few; nothing where the terminal lacks the characters."""
    if not unicode:
        return []
    label = 12
    room = max(8, width - label)
    n = len(servers.active)
    group = -(-n // room)
    each = "each server" if group == 1 else f"the largest of each {group} servers"
    lines = [Text(), Text(f"{'':{label}}{each}, from 0", "dim")]
    for title, values, style in (
        ("open flows", servers.open, "blue"),
        ("weight", servers.weights * servers.active, weight_style),
        ("FCT", servers.fct, "default"),
    ):
        if values is None:
            continue
        padded = np.zeros(-(-n // group) * group)
        padded[:n] = values
        heights = padded.reshape(-1, group).max(axis=1)
        scale = heights.max(initial=0.0) or 1.0
        levels = np.minimum((heights / scale * 8).astype(int), 7)
        text = "".join(_LEVELS[level] if height > 0.0 else " " for level, height in zip(levels, heights, strict=True))
        lines.append(Text.assemble((f"{title:<{label}}", "dim"), (text, style)))
    return lines


# The terminal


def _show_live(monitor: RegionMonitor, console: Console, rate: float) -> None:
    """Draw pictures on the whole screen until q or a signal; leaves the terminal as it was.

    Raises:
        Interrupted: after a signal other than Ctrl-C.
    """
    monitor.look()
    # No signal interrupts a picture.
    with stop_on_signal() as stop:
        with _keys() as pressed, Live(console=console, screen=True, auto_refresh=False) as live:
            due = time.monotonic()
            while not stop.is_set():
                live.update(picture(monitor.view(), console, screen=True), refresh=True)
                # A picture that is late, as after a stop, does not have others hurry after it.
                due = max(due + 1.0 / rate, time.monotonic())
                if monitor.look_until(due, lambda timeout: pressed(timeout) or stop.is_set()):
                    break
        if stop.signum is not None and stop.signum != signal.SIGINT:
            raise Interrupted(stop.signum)


@contextmanager
def _keys() -> Iterator[Callable[[float], bool]]:
    """A function that sleeps for some seconds and returns whether q was pressed; other keys are swallowed."""
    if not sys.stdin.isatty():

        def sleep(timeout: float) -> bool:
            time.sleep(timeout)
            return False

        yield sleep
        return
    import termios
    import tty

    descriptor = sys.stdin.fileno()

    def pressed(timeout: float) -> bool:
        if not select.select([descriptor], [], [], timeout)[0]:
            return False
        keys = os.read(descriptor, 1024)
        if not keys:
            # The terminal is gone.
            return True
        return b"q" in keys.lower()

    before = termios.tcgetattr(descriptor)
    try:
        tty.setcbreak(descriptor)
        yield pressed
    finally:
        termios.tcsetattr(descriptor, termios.TCSAFLUSH, before)
