"""Pictures of an episode: a table for the terminal and a dashboard for videos.

The functions draw a :class:`Frame`, plain data that knows nothing of environments; :class:`Viewer` makes frames
from snapshots and remembers the last ones, so an environment needs one object and one call::

    viewer = Viewer("rgb_array", scenario)          # at construction, and again when the scenario changes
    viewer.reset()                                  # at reset
    return viewer.render(snapshot, weights=weights, reward=reward, step=step)
"""

from __future__ import annotations

import functools
import io
import os
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TextIO

import numpy as np
from numpy.typing import NDArray

from ..errors import MissingExtraError, UnknownNameError
from ..features.columns import GROUND_TRUTH_NAMES, column_index
from ..formatting import BLOCKS, bar, seconds, short
from ..scenarios.model import Scenario
from ..snapshot import Snapshot

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

RENDER_MODES = ("human", "ansi", "rgb_array")

#: Width and height of ``rgb_array`` frames, pixels; even, as video codecs want them.
DEFAULT_SIZE = (960, 540)

#: Frames that a viewer remembers for the curves.
HISTORY = 160


@dataclass(frozen=True, slots=True)
class Frame:
    """The contents of a picture: one instant; arrays are over the N servers.

    Attributes:
        scenario, dispatch: names for the heading.
        step: steps since reset.
        time: seconds on the data plane's clock.
        reward: of the last step, or None right after reset.
        active: bool[N].
        weights: float[N].
        open_flows: float[N], what the balancer counts (``n_flow_on``).
        fct, duration: float[N], seconds (``fct_mean_decay``, ``duration_mean_decay``).
        new_flows: int[N], flows started since the previous frame.
        cpu: float[N] in 0..1 and busy: float[N], flows in service; None where the data plane has no ground truth.
        cores: int[N], or None.
        completed, rejected: flows since reset; rejected includes failed and unrouted ones.
        fct_mean, fct_p99: seconds, over the flows that ended in the last interval; None if none did, or if the data
            plane has no such statistics.
    """

    scenario: str
    dispatch: str
    step: int
    time: float
    reward: float | None
    active: NDArray[np.bool_]
    weights: NDArray[np.float64]
    open_flows: NDArray[np.float64]
    fct: NDArray[np.float64]
    duration: NDArray[np.float64]
    new_flows: NDArray[np.int64]
    cpu: NDArray[np.float64] | None
    busy: NDArray[np.float64] | None
    cores: NDArray[np.int64] | None
    completed: int
    rejected: int
    fct_mean: float | None
    fct_p99: float | None

    @property
    def num_servers(self) -> int:
        return len(self.active)

    @property
    def new_flow_share(self) -> NDArray[np.float64]:
        """float[N], each server's share of the new flows; 0 where there are none."""
        total = int(self.new_flows.sum())
        return self.new_flows / total if total else np.zeros(self.num_servers)


class Viewer:
    """Draws snapshots in one render mode and keeps a history for the curves.

    Args:
        render_mode: "human" (a table on standard output, in place on a terminal), "ansi" (the table as a string) or
            "rgb_array" (uint8[H, W, 3]).
        scenario: names and cores for the heading; None on a data plane without one.
        dispatch: dispatch rule to show; the scenario's if None.
        size: width and height of "rgb_array" frames in pixels.
        stream: where "human" writes; standard output if None.

    Raises:
        UnknownNameError: for another render mode.
    """

    def __init__(
        self,
        render_mode: str,
        scenario: Scenario | None = None,
        *,
        dispatch: str | None = None,
        size: tuple[int, int] = DEFAULT_SIZE,
        stream: TextIO | None = None,
    ) -> None:
        if render_mode not in RENDER_MODES:
            raise UnknownNameError("render mode", render_mode, RENDER_MODES)
        self.render_mode = render_mode
        self.size = size
        self._stream = stream
        self._name = scenario.name if scenario is not None else "live data plane"
        self._dispatch = dispatch or (scenario.dispatch if scenario is not None else "")
        self._cores = np.array([server.cores for server in scenario.servers]) if scenario is not None else None
        self._history: deque[Frame] = deque(maxlen=HISTORY)
        self._started: NDArray[np.int64] | None = None

    def reset(self) -> None:
        """Forget the previous episode."""
        self._history.clear()
        self._started = None

    def render(
        self, snapshot: Snapshot, *, weights: NDArray[np.float64], reward: float | None, step: int
    ) -> str | NDArray[np.uint8] | None:
        """Draw a single (not batched) snapshot.

        Args:
            snapshot: what the balancer sees.
            weights: float[N], the weights in force.
            reward: of the last step; None right after reset.
            step: steps since reset.

        Returns:
            A string for "ansi", uint8[H, W, 3] for "rgb_array", None for "human".

        Raises:
            MissingExtraError: for "rgb_array" without Pillow.
        """
        frame = self.frame(snapshot, weights=weights, reward=reward, step=step)
        if self._history and self._history[-1].step == frame.step:
            self._history.pop()  # The same instant drawn twice is one point of the curves.
        else:
            self._started = np.array(snapshot.started)
        self._history.append(frame)
        if self.render_mode == "ansi":
            return render_ansi(frame)
        if self.render_mode == "rgb_array":
            return render_rgb(frame, *self.size, history=tuple(self._history))
        show(frame, self._stream)
        return None

    def frame(self, snapshot: Snapshot, *, weights: NDArray[np.float64], reward: float | None, step: int) -> Frame:
        """Make the frame of a snapshot: copies of its arrays, for the servers that exist."""
        n = len(snapshot.active) if self._cores is None else len(self._cores)
        if self._history and self._history[-1].step == step:
            new_flows = self._history[-1].new_flows
        else:
            started = np.array(snapshot.started)
            new_flows = (started if self._started is None else np.maximum(started - self._started, 0))[:n]
        stats = np.asarray(snapshot.stats, dtype=np.float64)[:n]
        truth, interval = snapshot.ground_truth, snapshot.interval
        ended = interval if interval is not None and interval.ended > 0.0 else None

        def truth_column(name: Literal["cpu_usage", "busy_workers"]) -> NDArray[np.float64] | None:
            return None if truth is None else np.array(truth[:n, GROUND_TRUTH_NAMES.index(name)], dtype=np.float64)

        return Frame(
            scenario=self._name,
            dispatch=self._dispatch,
            step=int(step),
            time=float(snapshot.timestamp),
            reward=None if reward is None else float(reward),
            active=np.array(snapshot.active[:n], dtype=bool),
            weights=np.array(weights[:n], dtype=np.float64),
            open_flows=stats[:, column_index("n_flow_on")].copy(),
            fct=stats[:, column_index("fct_mean_decay")].copy(),
            duration=stats[:, column_index("duration_mean_decay")].copy(),
            new_flows=new_flows,
            cpu=truth_column("cpu_usage"),
            busy=truth_column("busy_workers"),
            cores=self._cores,
            completed=int(np.sum(snapshot.completed)),
            rejected=int(np.sum(snapshot.rejected) + np.sum(snapshot.failed) + np.sum(snapshot.unrouted)),
            fct_mean=None if ended is None else float(ended.fct_mean),
            fct_p99=None if ended is None else float(ended.fct_p99),
        )


# Terminal

_RESET, _BOLD, _DIM = "\x1b[0m", "\x1b[1m", "\x1b[2m"
_GREEN, _YELLOW, _RED, _CYAN = "\x1b[32m", "\x1b[33m", "\x1b[31m", "\x1b[36m"
#: CPU use from which a server is drawn as busy and as saturated.
_WARM, _HOT = 0.7, 0.9


def render_ansi(frame: Frame, *, color: bool = False, unicode: bool = True, max_rows: int = 40) -> str:
    """Draw the frame as an aligned table with bars.

    Args:
        frame: what to draw.
        color: add ANSI colours.
        unicode: draw bars with block elements; else with ``#``.
        max_rows: servers listed; the rest of a larger cluster are summed up in a line.

    Returns:
        Lines, each ending with a newline.
    """

    def paint(text: str, *codes: str) -> str:
        return "".join(codes) + text + _RESET if color and codes else text

    reward = "-" if frame.reward is None else f"{frame.reward:+.4f}"
    heading = [paint(frame.scenario, _BOLD), frame.dispatch, f"step {frame.step}", f"t {frame.time:.2f} s"]
    totals = [f"completed {frame.completed:,}", paint(f"rejected {frame.rejected:,}", *([_RED] * bool(frame.rejected)))]
    if frame.fct_mean is not None and frame.fct_p99 is not None:
        totals.append(f"FCT of the step: mean {seconds(frame.fct_mean)}, p99 {seconds(frame.fct_p99)}")
    lines = [
        "  ".join(part for part in [*heading, f"reward {reward}"] if part),
        "  ".join(totals),
        "",
    ]

    titles = [f"{'server':>6}", f"{'weight':<18}", f"{'open flows':<18}", f"{'new flows':<17}", f"{'FCT':>9}"]
    titles.append(f"{'duration':>9}")
    if frame.cpu is not None:
        titles.append(f"{'CPU':<16}")
    lines.append(paint("  ".join(titles).rstrip(), _DIM))

    shown = min(frame.num_servers, max_rows)
    largest_weight = _largest(frame.weights, frame.active)
    largest_queue = _largest(frame.open_flows, np.ones_like(frame.active))
    share = frame.new_flow_share
    for j in range(shown):
        cells = [f"{j:>6}"]
        if not frame.active[j]:
            note = f"out of service{f', {frame.open_flows[j]:.0f} open flows' if frame.open_flows[j] else ''}"
            lines.append(paint("  ".join([*cells, note]), _DIM))
            continue
        cells.append(
            f"{short(frame.weights[j]):>7} " + paint(bar(frame.weights[j] / largest_weight, 10, unicode), _CYAN)
        )
        cells.append(f"{short(frame.open_flows[j]):>7} " + bar(frame.open_flows[j] / largest_queue, 10, unicode))
        cells.append(f"{share[j]:>6.1%} " + bar(share[j], 10, unicode))
        cells.append(f"{seconds(frame.fct[j]):>9}")
        cells.append(f"{seconds(frame.duration[j]):>9}")
        if frame.cpu is not None:
            cpu = float(frame.cpu[j])
            tone = _RED if cpu >= _HOT else _YELLOW if cpu >= _WARM else _GREEN
            cells.append(f"{cpu:>5.0%} " + paint(bar(cpu, 10, unicode), tone))
        lines.append("  ".join(cells).rstrip())
    if shown < frame.num_servers:
        rest = slice(shown, None)
        lines.append(
            f"{'...':>6}  {frame.num_servers - shown} more servers: {frame.open_flows[rest].sum():.0f} open flows, "
            f"{share[rest].sum():.1%} of the new flows, {int((~frame.active[rest]).sum())} out of service"
        )
    return "\n".join(lines) + "\n"


def show(frame: Frame, stream: TextIO | None = None) -> None:
    """Write the frame to a stream (standard output); on a terminal each frame replaces the previous one."""
    out = sys.stdout if stream is None else stream
    terminal = out.isatty()
    text = render_ansi(frame, color=terminal and "NO_COLOR" not in os.environ, unicode=_can_encode(out, BLOCKS))
    if terminal:
        # Home, then clear to the end of each line and of the screen: clearing everything first would flicker.
        text = "\x1b[H" + text.replace("\n", "\x1b[K\n") + "\x1b[J"
    else:
        text += "\n"
    out.write(text)
    out.flush()


def _can_encode(stream: TextIO, text: str) -> bool:
    if isinstance(stream, io.StringIO):
        return True
    try:
        text.encode(getattr(stream, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _largest(values: NDArray[Any], mask: NDArray[np.bool_]) -> float:
    """Return the largest masked value, or 1 if that is 0: the scale of bars."""
    return float(np.max(values, where=mask, initial=0.0)) or 1.0


# Dashboard

_BACKGROUND, _PANEL, _TRACK, _GRID = "#11161d", "#1a212b", "#2a3441", "#2f3a48"
_TEXT, _MUTED = "#e8edf3", "#8fa0b3"
_BLUE, _VIOLET, _TEAL, _AMBER, _ROSE = "#58a6ff", "#b392f0", "#3fb98c", "#e3a53a", "#f0666c"
_SUPERSAMPLE = 2
_MARGIN, _GAP = 16, 12
_HEADER, _CHART = 112, 132
_MIN_ROW, _MAX_ROW = 13, 52


def render_rgb(
    frame: Frame, width: int = DEFAULT_SIZE[0], height: int = DEFAULT_SIZE[1], *, history: Sequence[Frame] = ()
) -> NDArray[np.uint8]:
    """Draw the frame as a dashboard.

    A row of bars per server, or for large clusters a strip of bars per quantity; below, the last steps' reward and
    FCT.

    Args:
        frame: what to draw.
        width: pixels, at least 320. A picture smaller than ``DEFAULT_SIZE`` is scaled down.
        height: pixels, at least 180.
        history: earlier frames, oldest first, for the curves; a trailing ``frame`` is not drawn twice.

    Returns:
        uint8[height, width, 3].

    Raises:
        MissingExtraError: without Pillow.
        ValueError: for a smaller picture.
    """
    if width < 320 or height < 180:
        raise ValueError(f"a dashboard needs at least 320 x 180 pixels, got {width} x {height}")
    past = [*history] if history and history[-1] is frame else [*history, frame]
    past = [f for f in past if f.num_servers == frame.num_servers][-HISTORY:]
    canvas = _Canvas(width, height)
    _draw_heading(canvas, frame)
    right_edge, bottom = canvas.width - _MARGIN, canvas.height - _MARGIN
    charts_top = bottom - _CHART
    panel = (_MARGIN, _HEADER, right_edge, charts_top - _GAP)
    canvas.box(panel, _PANEL, radius=8)
    if (panel[3] - panel[1] - 38) / frame.num_servers >= _MIN_ROW:
        _draw_rows(canvas, panel, frame, past)
    else:
        _draw_strips(canvas, panel, frame)

    middle = canvas.width / 2
    left = (_MARGIN, charts_top, middle - _GAP / 2, bottom)
    right = (middle + _GAP / 2, charts_top, right_edge, bottom)
    _draw_curves(canvas, left, "reward", [(_TEAL, "", [f.reward for f in past])], from_zero=False)
    fct = [(_AMBER, "p99", [f.fct_p99 for f in past]), (_BLUE, "mean", [f.fct_mean for f in past])]
    _draw_curves(canvas, right, "FCT of the step", fct, from_zero=True)
    return canvas.pixels()


_Box = tuple[float, float, float, float]


class _Canvas:
    """A Pillow image drawn at twice its size and averaged down.

    Coordinates are pixels of a picture of at least ``DEFAULT_SIZE``; a smaller one is scaled down.
    """

    def __init__(self, width: int, height: int) -> None:
        try:
            from PIL import Image, ImageDraw
        except ImportError as error:
            raise MissingExtraError("PIL", "eval", "render_mode='rgb_array'") from error
        shrink = min(1.0, width / DEFAULT_SIZE[0], height / DEFAULT_SIZE[1])
        self.width, self.height = width / shrink, height / shrink
        self._scale = _SUPERSAMPLE * shrink
        self._image: Image.Image = Image.new("RGB", (width * _SUPERSAMPLE, height * _SUPERSAMPLE), _BACKGROUND)
        self._draw: ImageDraw.ImageDraw = ImageDraw.Draw(self._image)

    def box(self, box: _Box, fill: str, radius: float = 0.0) -> None:
        x0, y0, x1, y1 = (v * self._scale for v in box)
        if x1 - x0 < 1 or y1 - y0 < 1:
            return
        corner = min(radius * self._scale, (x1 - x0) / 2, (y1 - y0) / 2)
        self._draw.rounded_rectangle((x0, y0, x1 - 1, y1 - 1), corner, fill=fill)

    def bar(self, box: _Box, share: float, fill: str) -> None:
        """A track filled from the left to ``share`` (0..1)."""
        x0, y0, x1, y1 = box
        radius = min(3.0, (y1 - y0) / 2)
        self.box(box, _TRACK, radius)
        self.box((x0, y0, x0 + (x1 - x0) * min(max(share, 0.0), 1.0), y1), fill, radius)

    def line(self, points: Sequence[tuple[float, float]], fill: str, width: float = 1.5) -> None:
        scaled = [(x * self._scale, y * self._scale) for x, y in points]
        if len(scaled) > 1:
            self._draw.line(scaled, fill=fill, width=max(round(width * self._scale), 1), joint="curve")

    def dot(self, point: tuple[float, float], fill: str, radius: float = 2.5) -> None:
        x, y, r = (v * self._scale for v in (*point, radius))
        self._draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)

    def text(
        self, position: tuple[float, float], text: str, size: float, fill: str = _TEXT, anchor: str = "lm"
    ) -> float:
        """Draw a line of text; returns its width."""
        font = _font(max(round(size * self._scale), 1))
        x, y = (v * self._scale for v in position)
        self._draw.text((x, y), text, font=font, fill=fill, anchor=anchor)
        return float(self._draw.textlength(text, font=font)) / self._scale

    def pixels(self) -> NDArray[np.uint8]:
        return np.array(self._image.reduce(_SUPERSAMPLE), dtype=np.uint8)


@functools.lru_cache(maxsize=32)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _draw_heading(canvas: _Canvas, frame: Frame) -> None:
    width = canvas.text((_MARGIN, 28), frame.scenario, 22)
    if frame.dispatch:
        canvas.text((_MARGIN + width + 14, 30), f"dispatch {frame.dispatch}", 13, _MUTED)
    canvas.text((canvas.width - _MARGIN, 28), f"{frame.time:.2f} s", 18, anchor="rm")
    canvas.text((canvas.width - _MARGIN - 110, 30), f"step {frame.step:,}", 13, _MUTED, anchor="rm")

    cards = [
        ("reward", "-" if frame.reward is None else _short_signed(frame.reward), _TEAL),
        ("mean FCT", "-" if frame.fct_mean is None else seconds(frame.fct_mean), _BLUE),
        ("p99 FCT", "-" if frame.fct_p99 is None else seconds(frame.fct_p99), _AMBER),
        ("open flows", f"{frame.open_flows.sum():,.0f}", _VIOLET),
        ("completed", f"{frame.completed:,}", _TEXT),
        ("rejected", f"{frame.rejected:,}", _ROSE if frame.rejected else _TEXT),
    ]
    each = (canvas.width - 2 * _MARGIN - _GAP * (len(cards) - 1)) / len(cards)
    for i, (label, value, tone) in enumerate(cards):
        x = _MARGIN + i * (each + _GAP)
        canvas.box((x, 52, x + each, _HEADER - _GAP), _PANEL, radius=8)
        canvas.text((x + 12, 66), label, 10.5, _MUTED)
        canvas.text((x + 12, 85), value, 17, tone)


def _draw_rows(canvas: _Canvas, panel: _Box, frame: Frame, past: Sequence[Frame]) -> None:
    """A row per server: name, weight, share of new flows, open flows, CPU, FCT, and recent open flows."""
    x0, y0, x1, y1 = panel
    has_cpu = frame.cpu is not None
    # Share of the width of each column; the bars take the rest.
    columns = [("server", 0.13), ("weight", 0.165), ("new flows", 0.165), ("open flows", 0.165)]
    columns += [("CPU", 0.155)] if has_cpu else []
    columns += [("FCT", 0.08), ("open flows of late", 0.14 if has_cpu else 0.295)]
    inner = x1 - x0 - 28
    lefts: dict[str, float] = {}
    widths: dict[str, float] = {}
    x = x0 + 14
    for title, part in columns:
        lefts[title], widths[title] = x, part * inner - 16
        canvas.text((x, y0 + 16), title, 11, _MUTED)
        x += part * inner

    top = y0 + 30
    row = min((y1 - 8 - top) / frame.num_servers, _MAX_ROW)
    size = min(13.0, row * 0.62)
    thickness = min(10.0, row * 0.5)
    largest_weight = _largest(frame.weights, frame.active)
    largest_queue = max(_largest(f.open_flows, np.ones_like(f.active)) for f in past)
    share = frame.new_flow_share
    value_width = 46

    for j in range(frame.num_servers):
        y = top + (j + 0.5) * row
        active = bool(frame.active[j])
        label = canvas.text((lefts["server"], y), f"{j}", size, _TEXT if active else _MUTED)
        if frame.cores is not None:
            noun = "core" if frame.cores[j] == 1 else "cores"
            canvas.text((lefts["server"] + max(label, 14) + 10, y), f"{frame.cores[j]} {noun}", size * 0.85, _MUTED)

        def cell(column: str, text: str, part: float, tone: str, y: float = y) -> None:
            left = lefts[column]
            canvas.text((left + value_width - 8, y), text, size, anchor="rm")
            canvas.bar((left + value_width, y - thickness / 2, left + widths[column], y + thickness / 2), part, tone)

        if active:
            cell("weight", short(frame.weights[j]), frame.weights[j] / largest_weight, _BLUE)
            cell("new flows", f"{share[j]:.0%}", share[j], _TEAL)
        else:
            canvas.text((lefts["weight"], y), "out of service", size, _ROSE)
        if active or frame.open_flows[j]:
            cell("open flows", short(frame.open_flows[j]), frame.open_flows[j] / largest_queue, _VIOLET)
        if frame.cpu is not None and active:
            cpu = float(frame.cpu[j])
            cell("CPU", f"{cpu:.0%}", cpu, _ROSE if cpu >= _HOT else _AMBER if cpu >= _WARM else _TEAL)
        if active:
            canvas.text((lefts["FCT"], y), seconds(frame.fct[j]), size)
        low, high = y + row * 0.36, y - row * 0.36
        values = [float(f.open_flows[j]) / largest_queue for f in past]
        left, right = lefts["open flows of late"], x1 - 14
        canvas.line([(left, low), (right, low)], _GRID, 1)
        _draw_line(canvas, (left, high, right, low), values, _VIOLET)


def _draw_strips(canvas: _Canvas, panel: _Box, frame: Frame) -> None:
    """For clusters with more servers than rows: a strip of N thin bars per quantity."""
    x0, y0, x1, y1 = panel
    share = frame.new_flow_share
    strips: list[tuple[str, NDArray[Any], float, str]] = [
        ("weight", frame.weights * frame.active, _largest(frame.weights, frame.active), _BLUE),
        ("new flows", share, float(share.max()) or 1.0, _TEAL),
        ("open flows", frame.open_flows, float(frame.open_flows.max()) or 1.0, _VIOLET),
    ]
    if frame.cpu is not None:
        strips.append(("CPU", frame.cpu, 1.0, _AMBER))
    label = 92
    left, right = x0 + 14 + label, x1 - 14
    each = (y1 - y0 - 30) / len(strips)
    n = frame.num_servers
    pitch = (right - left) / n
    gap = 1.0 if pitch >= 4 else 0.0
    for i, (name, values, largest, tone) in enumerate(strips):
        top, bottom = y0 + 12 + i * each, y0 + 12 + (i + 1) * each - 8
        if bottom - top < 6:
            continue
        canvas.box((left, top, right, bottom), _TRACK)
        canvas.text((x0 + 14, (top + bottom) / 2 - 7), name, 11.5)
        peak = f"max {largest:.0%}" if name in ("new flows", "CPU") else f"max {short(largest)}"
        canvas.text((x0 + 14, (top + bottom) / 2 + 7), peak, 10, _MUTED)
        for j in range(n):
            height = (bottom - top) * min(float(values[j]) / largest, 1.0)
            hot = name == "CPU" and values[j] >= _HOT
            x = left + j * pitch
            canvas.box((x, bottom - height, x + pitch - gap, bottom), _ROSE if hot else tone)
            if not frame.active[j]:
                canvas.box((x, top, x + pitch, bottom), _PANEL)
    down = int((~frame.active).sum())
    legend = f"{n} servers, left to right" + (f"; {down} out of service" if down else "")
    canvas.text((left, y1 - 11), legend, 10, _MUTED)


def _draw_curves(
    canvas: _Canvas,
    box: _Box,
    title: str,
    series: Sequence[tuple[str, str, Sequence[float | None]]],
    *,
    from_zero: bool,
) -> None:
    """A panel of lines over the last steps, scaled to its data."""
    x0, y0, x1, y1 = box
    canvas.box(box, _PANEL, radius=8)
    canvas.text((x0 + 12, y0 + 14), title, 11, _MUTED)
    x = x1 - 12
    for tone, name, _ in series:
        if name:
            x -= canvas.text((x, y0 + 14), name, 11, _MUTED, anchor="rm") + 8
            canvas.dot((x, y0 + 14), tone, 3)
            x -= 12
    known = [v for _, _, values in series for v in values if v is not None]
    plot = (x0 + 62, y0 + 30, x1 - 14, y1 - 14)
    if not known:
        canvas.text(((x0 + x1) / 2, (y0 + y1) / 2 + 6), "nothing yet", 11, _MUTED, anchor="mm")
        return
    low, high = (0.0 if from_zero else min(known)), max(known)
    if high - low < 1e-9 * max(abs(high), abs(low), 1e-30):
        margin = 0.5 * abs(high) or 0.5
        low, high = (0.0 if from_zero else low - margin), high + margin
    for part in (0.0, 0.5, 1.0):
        y = plot[3] + (plot[1] - plot[3]) * part
        canvas.line([(plot[0], y), (plot[2], y)], _GRID, 1)
        value = low + (high - low) * part
        text = ("0" if value == 0 else seconds(value)) if from_zero else _short_signed(value)
        canvas.text((plot[0] - 8, y), text, 10, _MUTED, anchor="rm")
    for tone, _, values in series:
        scaled = [None if v is None else (v - low) / (high - low) for v in values]
        _draw_line(canvas, plot, scaled, tone)


def _draw_line(canvas: _Canvas, box: _Box, values: Sequence[float | None], tone: str) -> None:
    """Values in 0..1, the newest at the right edge; the picture is full after ``HISTORY`` steps."""
    x0, y0, x1, y1 = box
    # A young episode fills the width sooner than with one pixel pitch for all of HISTORY.
    pitch = (x1 - x0) / max(min(len(values), HISTORY) - 1, 39)
    points = [
        (x1 - (len(values) - 1 - i) * pitch, y1 + (y0 - y1) * min(max(v, 0.0), 1.0))
        for i, v in enumerate(values)
        if v is not None
    ]
    canvas.line(points, tone)
    if points:
        canvas.dot(points[-1], tone)


def _short_signed(value: float) -> str:
    """A number in at most 9 characters."""
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}" if abs(value) < 1000 else f"{value:.0f}"
    return f"{value:.2e}"
