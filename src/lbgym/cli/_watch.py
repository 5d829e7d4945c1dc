"""The live view of ``lbgym shm watch``."""

from __future__ import annotations

import math
import os
import select
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from rich.console import Group
from rich.live import Live
from rich.text import Text

from ..env.rendering import _bar as bar
from ..env.rendering import _seconds as seconds
from ..env.rendering import _short as short
from ..errors import RegionError
from ..features.columns import GROUND_TRUTH_NAMES, column_index
from ..recording import Follower
from .shm import age, agent_state, clock, lease, producer_state

if TYPE_CHECKING:
    from rich.console import Console

    from ..sharedmemory import Action

_NS = 1_000_000_000
#: Rates are over so many seconds.
_WINDOW = 2.0
#: Looks between two pictures are at most this far apart, so that fewer actions are overlooked; seconds.
_LOOK = 0.05
#: A live producer is silent if its newest observation is older than this, and than three intervals; seconds.
_SILENT = 1.0
#: Actions of which is remembered when they were written.
_REMEMBERED = 64

#: Lines that say who lives and who acts.
_HEADING = 4

_LEVELS = "▁▂▃▄▅▆▇█"
_STATES = {"alive": "green", "dead": "bold red", "closed": "bold yellow", "none": "dim"}
_GAP = 2
_SERVER, _NARROW, _BAR = 6, 6, 4
#: Lines for servers from which some are given to strips of all of them.
_LEAST_ROWS = 12

_OPEN, _FCT, _FCT_P90 = column_index("n_flow_on"), column_index("fct_mean_decay"), column_index("fct_p90_decay")
_DURATION, _DURATION_P90 = column_index("duration_mean_decay"), column_index("duration_p90_decay")
_CPU = GROUND_TRUTH_NAMES.index("cpu_usage")


@dataclass(slots=True)
class _Instant:
    """What rates are made of."""

    published_at: int
    timestamp: int
    sequence_id: int
    counters: NDArray[np.int64]  # [N, 4]
    fct_count: int
    fct_sum: int


class View:
    """What there is to see of a region, and of those that take its name later.

    Raises:
        RegionNotFoundError, RegionFormatError, RegionError: as ``SharedMemoryRegion.attach``.
    """

    def __init__(self, name: str) -> None:
        self._follower = Follower(name)
        self._past: deque[_Instant] = deque()
        self._action: Action | None = None
        self._written: dict[int, int] = {}
        self._delay: tuple[int, float] | None = None
        self._restarts = 0
        self._problem = ""
        self._stale = False

    def __enter__(self) -> View:
        return self

    def __exit__(self, *_: object) -> None:
        self._follower.close()

    def look(self) -> None:
        """Read what is new."""
        follower = self._follower
        fresh = follower.wait(0.0)
        if follower.restarts != self._restarts:
            self._restarts = follower.restarts
            self._past.clear()
            self._written.clear()
            self._action = self._delay = None
        try:
            action = follower.region.read_action()
            self._problem = ""
        except RegionError as error:
            action, self._problem = None, str(error)
        if action is not None:
            self._action = action
            self._written[action.sequence_id] = action.written_at
            while len(self._written) > _REMEMBERED:
                del self._written[next(iter(self._written))]
        invalid = follower.invalid
        if fresh and follower.read_newest():
            self._note()
        elif follower.invalid > invalid:
            self._problem = "the newest observation is none that a data plane may publish"

    def _note(self) -> None:
        buffer = self._follower.buffer
        instant = _Instant(
            buffer.published_at,
            buffer.timestamp_ns,
            buffer.sequence_id,
            buffer.counters[: buffer.num_servers].astype(np.int64),
            buffer.fct_count,
            buffer.fct_sum_ns,
        )
        past = self._past
        if past and (
            instant.sequence_id <= past[-1].sequence_id
            or instant.timestamp < past[-1].timestamp
            or instant.counters.shape != past[-1].counters.shape
        ):
            past.clear()
        past.append(instant)
        # One that is older than the window, so that the rates are over all of it.
        while len(past) > 2 and instant.published_at - past[1].published_at > _WINDOW * _NS:
            past.popleft()
        applied, applied_at = buffer.applied_sequence_id, buffer.applied_at
        if applied is not None and applied_at is not None and applied in self._written:
            self._delay = applied, max(0, applied_at - self._written[applied]) / _NS

    def look_until(self, deadline: float, pressed: Callable[[float], bool] | None = None) -> bool:
        """Look again and again until ``deadline`` (monotonic clock, seconds); true at once if a key was pressed."""
        while (left := deadline - time.monotonic()) > 0.0:
            if pressed is None:
                time.sleep(min(left, _LOOK))
            elif pressed(min(left, _LOOK)):
                return True
            self.look()
        return False

    def look_twice(self) -> None:
        """Look at two observations, for rates; at one if the second does not come soon."""
        self.look()
        region = self._follower.region
        if producer_state(region) == "alive" and self._past:
            self._follower.wait(min(1.0, 1.5 * region.publish_interval / region.clock_rate))
            self.look()

    # Drawing

    def picture(self, console: Console, *, screen: bool = False) -> Group:
        """The picture, as wide as the console, and as high if it is to fill the ``screen``."""
        unicode = not console.options.ascii_only
        width, height = console.size if screen else (console.width, 1_000_000)
        lines = self._heading(width, screen)
        if self._past:
            lines += [Text(), *_table(self._servers(), width, height - len(lines) - 1, unicode)]
        if self._stale:
            # What is left of the last observation.
            for line in lines[_HEADING:]:
                line.stylize("dim")
        for line in lines:
            line.no_wrap, line.overflow = True, "crop" if screen else "ignore"
        return Group(*lines)

    def _heading(self, width: int, screen: bool) -> list[Text]:
        region, buffer, past = self._follower.region, self._follower.buffer, self._past
        state, now = producer_state(region), time.monotonic_ns()
        since = (now - past[-1].published_at) / _NS if past else math.inf
        up = max(0.0, time.time() - region.created_at)
        silent = (since if past else up) > max(_SILENT, 3.0 * region.publish_interval / region.clock_rate)
        self._stale = silent or state != "alive"
        title = Text.assemble((region.name, "bold"), f"  {region.driver}{clock(region.clock_rate)}")
        if past:
            n = buffer.num_servers
            active = int(buffer.active[:n].sum())
            title.append(f"  {active:,} of {n:,} servers active", "" if active == n else "yellow")
        right = ("q quits  " if screen else "") + time.strftime("%H:%M:%S")
        title.append(" " * max(2, width - title.cell_len - len(right)) + right, "dim")

        producer = Text.assemble(("producer ", "dim"), (state, _STATES[state]), f"  process {region.producer_pid}")
        if self._restarts:
            producer.append(f"  restarts {self._restarts:,}", "yellow")
        if state != "alive":
            producer.append(f"  last heard {age(region.heartbeat_age)} ago, waiting", "bold red")
        elif silent:
            producer.append(f"  silent for {age(since if past else up)}", "bold yellow")
            producer.append(f", last sign of life {age(region.heartbeat_age)} ago")
        else:
            producer.append(f"  up {age(up)}")

        living = agent_state(region)
        agent = Text.assemble(("agent    ", "dim"), (living, _STATES[living]))
        if region.agent_pid is not None:
            agent.append(f"  process {region.agent_pid}")
        action = self._action
        if action is not None:
            passed = max(0, now - action.written_at) / _NS
            agent.append(f"  action {action.sequence_id:,}, {age(passed)} old, ")
            left = action.lease - passed
            agent.append(lease(action.lease, left), "" if left > 0.0 else "bold yellow")
        lines = [title, producer, agent]
        if not past:
            lines.append(Text.assemble(("observed ", "dim"), "nothing yet"))
        else:
            weights = Text.assemble(("weights  ", "dim"))
            applied = buffer.applied_sequence_id
            if buffer.safe:
                weights.append("safe weights in force", "bold yellow")
                weights.append("" if applied is None else f"  last applied action {applied:,}")
            else:
                weights.append(f"of action {applied:,}" if applied is not None else "of no action")
            if applied is not None and self._delay is not None and not buffer.safe:
                which = "" if self._delay[0] == applied else f" (action {self._delay[0]:,})"
                weights.append(f", in force {age(self._delay[1])} after it was written{which}")
            observed = Text.assemble(("observed ", "dim"), f"{buffer.sequence_id:,}  ")
            observed.append(f"{age(since)} old", "bold yellow" if self._stale else "")
            observed.append("" if self._stale else f"  {self._rate()}/s")
            observed.append(f"  clock {buffer.timestamp:,.2f} s")
            lines += [weights, observed, self._flows()]
        if self._problem:
            lines.append(Text(self._problem, "bold red"))
        return lines

    def _rate(self) -> str:
        """Observations per second."""
        first, last = self._past[0], self._past[-1]
        if last.published_at <= first.published_at:
            return "-"
        return short((last.sequence_id - first.sequence_id) / (last.published_at - first.published_at) * _NS)

    def _per_second(self, column: int) -> NDArray[np.float64] | None:
        """Flows of a counter per second of the data plane's clock and server; None if not known."""
        first, last = self._past[0], self._past[-1]
        if last.timestamp <= first.timestamp:
            return None
        more = np.maximum(last.counters[:, column] - first.counters[:, column], 0)
        return more / (last.timestamp - first.timestamp) * _NS

    def _flows(self) -> Text:
        first, last = self._past[0], self._past[-1]
        buffer = self._follower.buffer
        n = buffer.num_servers
        new = self._per_second(0)
        line = Text.assemble(
            ("flows    ", "dim"),
            f"{'-' if new is None else short(float(new.sum()))}/s new  {buffer.stats[:n, _OPEN].sum():,.0f} open",
        )
        ended = last.fct_count - first.fct_count
        if ended > 0 and last.fct_sum >= first.fct_sum:
            line.append(f"  mean FCT {seconds((last.fct_sum - first.fct_sum) / ended / _NS)}")
        lost = int(last.counters[:, 2:].sum()) + buffer.unrouted
        line.append(f"  {lost:,} lost", "red" if lost else "")
        line.append(f"  {last.counters[:, 1].sum():,} completed")
        return line

    def _servers(self) -> _Servers:
        buffer = self._follower.buffer
        n = buffer.num_servers
        stats = buffer.stats[:n].astype(np.float64)
        return _Servers(
            active=buffer.active[:n].copy(),
            open=stats[:, _OPEN],
            weights=buffer.weights[:n].copy(),
            safe=buffer.safe,
            fct=stats[:, _FCT],
            fct_p90=stats[:, _FCT_P90],
            duration=stats[:, _DURATION],
            duration_p90=stats[:, _DURATION_P90],
            new=self._per_second(0),
            cpu=buffer.ground_truth[:n, _CPU].astype(np.float64) if buffer.has_ground_truth else None,
            completed=self._past[-1].counters[:, 1],
            lost=self._past[-1].counters[:, 2:].sum(axis=1),
        )


@dataclass(slots=True)
class _Servers:
    """Columns of the table."""

    active: NDArray[np.bool_]
    open: NDArray[np.float64]
    weights: NDArray[np.float64]
    safe: bool
    fct: NDArray[np.float64]
    fct_p90: NDArray[np.float64]
    duration: NDArray[np.float64]
    duration_p90: NDArray[np.float64]
    new: NDArray[np.float64] | None
    cpu: NDArray[np.float64] | None
    completed: NDArray[np.int64]
    lost: NDArray[np.int64]


def _table(servers: _Servers, width: int, height: int, unicode: bool) -> list[Text]:
    """The servers in a table of at most ``height`` lines; the busiest, and all in strips, if there are too many."""
    n = len(servers.active)
    rows = max(1, height - 1)
    panels = 1
    if n > rows:
        # Side by side, where the terminal is wide enough.
        panels = max(1, min(width // 78, -(-n // rows)))
    shown = np.arange(n)
    below: list[Text] = []
    if n > rows * panels:
        below = _strips(servers, width, unicode) if rows >= _LEAST_ROWS else []
        rows = max(1, rows - len(below) - 1)
        busiest = np.argsort(-servers.open, kind="stable")[: rows * panels]
        shown = np.sort(busiest)
        rest = np.setdiff1d(np.arange(n), shown)
        out = int((~servers.active[rest]).sum())
        below.append(
            Text(
                f"and {len(rest):,} servers with fewer open flows, {servers.open[rest].sum():,.0f} in all"
                + (f"; {out:,} of them out of service" if out else ""),
                "dim",
            )
        )
    count = -(-len(shown) // panels)
    each = (width - _GAP * (panels - 1)) // panels
    parts = [_panel(servers, shown[k * count : (k + 1) * count], each, unicode) for k in range(panels)]
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


def _panel(servers: _Servers, which: NDArray[np.int64], width: int, unicode: bool) -> list[Text]:
    """A table of some servers, with the columns that there is room for."""
    right: dict[str, tuple[int, Callable[[int], str]]] = {
        "FCT": (8, lambda j: seconds(float(servers.fct[j]))),
        "FCT p90": (8, lambda j: seconds(float(servers.fct_p90[j]))),
        "new/s": (6, lambda j: "-" if servers.new is None else _rate(float(servers.new[j]))),
        "duration": (8, lambda j: seconds(float(servers.duration[j]))),
        "CPU": (4, lambda j: "" if servers.cpu is None else f"{servers.cpu[j]:.0%}"),
        "dur. p90": (8, lambda j: seconds(float(servers.duration_p90[j]))),
        "lost": (7, lambda j: f"{servers.lost[j]:,}"),
        "completed": (11, lambda j: f"{servers.completed[j]:,}"),
    }
    if servers.cpu is None:
        del right["CPU"]
    left = width - _SERVER - 2 * (_GAP + _NARROW + 1 + _BAR)
    titles = []
    for title, (size, _) in right.items():
        if left < size + _GAP:
            break
        titles.append(title)
        left -= size + _GAP
    # What is left is for the bars: two parts for the load, one for the weights.
    weight_bar = _BAR + max(0, left) // 3
    load_bar = _BAR + max(0, left) - max(0, left) // 3
    most = float(servers.open.max(initial=0.0)) or 1.0
    heaviest = float(servers.weights.max(where=servers.active, initial=0.0)) or 1.0
    gap = " " * _GAP
    heading = Text(
        f"{'server':>{_SERVER}}{gap}{'open flows':<{_NARROW + 1 + load_bar}}{gap}"
        f"{'weight':<{_NARROW + 1 + weight_bar}}",
        "dim",
    )
    for title in titles:
        heading.append(gap + f"{title:>{right[title][0]}}")
    lines = [heading]
    for j in which.tolist():
        line = Text(f"{j:>{_SERVER}}{gap}{short(servers.open[j]):>{_NARROW}} ")
        line.append(bar(servers.open[j] / most, load_bar, unicode), "blue")
        if not servers.active[j]:
            line.append(f"{gap}out of service")
            line.stylize("dim")
            lines.append(line)
            continue
        line.append(f"{gap}{_weight(float(servers.weights[j])):>{_NARROW}} ")
        line.append(bar(servers.weights[j] / heaviest, weight_bar, unicode), "yellow" if servers.safe else "cyan")
        for title in titles:
            size, cell = right[title]
            line.append(f"{gap}{cell(j):>{size}}", _tone(servers, title, j))
        lines.append(line)
    return lines


def _rate(rate: float) -> str:
    """With one decimal, so that columns do not wobble, where that says enough."""
    return f"{rate:.1f}" if rate < 1000.0 else short(rate)


def _weight(weight: float) -> str:
    """With two, likewise."""
    return f"{weight:.2f}" if weight == 0.0 or 0.01 <= weight < 1000.0 else short(weight)


def _tone(servers: _Servers, title: str, j: int) -> str:
    if title == "CPU" and servers.cpu is not None:
        return "red" if servers.cpu[j] >= 0.9 else "yellow" if servers.cpu[j] >= 0.7 else "green"
    return "red" if title == "lost" and servers.lost[j] else ""


def _strips(servers: _Servers, width: int, unicode: bool) -> list[Text]:
    """All servers, one character each, or the largest of a few; nothing where there are no such characters."""
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
        ("weight", servers.weights * servers.active, "yellow" if servers.safe else "cyan"),
        ("FCT", servers.fct, "default"),
    ):
        padded = np.zeros(-(-n // group) * group)
        padded[:n] = values
        heights = padded.reshape(-1, group).max(axis=1)
        scale = heights.max(initial=0.0) or 1.0
        levels = np.minimum((heights / scale * 8).astype(int), 7)
        text = "".join(_LEVELS[level] if height > 0.0 else " " for level, height in zip(levels, heights, strict=True))
        lines.append(Text.assemble((f"{title:<{label}}", "dim"), (text, style)))
    return lines


# The terminal


def show_live(view: View, console: Console, rate: float) -> None:
    """Draw pictures on the whole screen until q or a signal; leaves the terminal as it was.

    Raises:
        SystemExit: 128 + n after signal n, unless that was Ctrl-C.
    """
    view.look()
    with _signals() as caught:
        with _keys() as pressed, Live(console=console, screen=True, auto_refresh=False) as live:
            due = time.monotonic()
            while not caught:
                live.update(view.picture(console, screen=True), refresh=True)
                # A picture that is late, as after a stop, does not have others hurry after it.
                due = max(due + 1.0 / rate, time.monotonic())
                if view.look_until(due, lambda timeout: pressed(timeout) or bool(caught)):
                    break
        if caught and caught[0] != signal.SIGINT:
            raise SystemExit(128 + caught[0])


@contextmanager
def _signals() -> Iterator[list[int]]:
    """A list that a signal to end is added to, so that none comes in the middle of a picture; the second one does."""
    caught: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _keys() -> Iterator[Callable[[float], bool]]:
    """A function that sleeps for seconds and says whether q was pressed; other keys are swallowed."""
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
