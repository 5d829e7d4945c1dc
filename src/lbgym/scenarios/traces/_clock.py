"""The clock of a trace: its unit, the order of its times, and how finely it ticks."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...errors import ScenarioError, TraceError
from .._validation import TRACE_LIMIT
from ._options import TIME_UNITS
from ._rows import Rows

# From this number on, a time is not in seconds but in the first unit in which it is below it: 1e11 s are 3,000 years
# after 1970, and 1e11 ms were in 1973.
_LARGEST = 1e11
# Ticks that a clock may have, seconds. Finer ones do not matter to the FCT of any flow.
_TICKS = (3600.0, 60.0, 1.0, 0.1, 0.01, 0.001)
# Spacings between float64 numbers by which a time may be off its tick.
_ERRORS = 4.0
# Different times that must agree before a tick of more than a second is believed.
_AGREE = 4


def time_unit(rows: Rows, given: str | None, speedup: float, file: Path) -> str:
    """The unit of numeric times: the one given, else the one that the magnitude of the first shows.

    Raises:
        ScenarioError: the magnitude shows a unit that ``speedup`` already makes up for.
        TraceError: the times do not show their unit.
    """
    if given is not None or rows.timestamps:
        return given or "s"
    magnitude = np.abs(rows.whole + rows.further)
    first = float(magnitude[0])
    unit = next((name for name, each in TIME_UNITS.items() if first < _LARGEST * each), "s")
    if unit == "s" and (magnitude >= _LARGEST).any():
        raise TraceError(
            f"{file}: times up to {magnitude.max():g} would be thousands of years in seconds; say their unit, "
            f"time_unit = {_listed()}"
        )
    if unit != "s" and speedup == TIME_UNITS[unit]:
        raise ScenarioError(
            f'{file}: the times (the first is {first:.16g}) are read as {unit} since 1970; write time_unit = "{unit}" '
            f"in place of speedup = {speedup:g}"
        )
    return unit


def _listed() -> str:
    return " or ".join(f'"{name}"' for name in TIME_UNITS)


def in_seconds(rows: Rows, unit: str) -> Rows:
    """The rows with times in seconds; those that are too large join the malformed ones."""
    per_second = TIME_UNITS[unit]
    if per_second != 1:
        whole, rest = np.divmod(rows.whole, per_second)
        rows = replace(rows, whole=whole, further=rest / per_second + rows.further / per_second)
    wrong = ~(np.abs(rows.whole + rows.further) <= TRACE_LIMIT)
    if wrong.any():
        rows.problems.extend(
            (int(rows.numbers[i]), f"the time must be at most {TRACE_LIMIT:g} s") for i in np.flatnonzero(wrong)
        )
        rows = rows.take(np.flatnonzero(~wrong))
    return rows


def from_first(rows: Rows) -> NDArray[np.float64]:
    """Seconds from the first row."""
    times: NDArray[np.float64] = (rows.whole - rows.whole[0]) + (rows.further - rows.further[0])
    return times


def in_order(rows: Rows, file: Path, *, sort: bool) -> Rows:
    """The rows in order of time, rows of the same time in that of their lines.

    Raises:
        TraceError: some are not, and ``sort`` is False.
    """
    times = from_first(rows)
    late = np.flatnonzero(np.diff(times) < 0)
    if not len(late):
        return rows
    if sort:
        return rows.take(np.argsort(times, kind="stable"))
    i = int(late[0]) + 1
    raise TraceError(
        f"{file}:{rows.numbers[i]}: the time is {times[i - 1] - times[i]:g} s before that of an earlier line; times "
        "must not decrease, unless sort = true (--trace-option sort=true) puts them in order"
    )


def coarse_tick(rows: Rows) -> float:
    """Seconds between ticks of a clock that ties show to be coarse; 0 if none do.

    A clock is coarse where several flows have the same time and every time is a multiple of one of a few ticks, from an
    hour to a millisecond. A trace of which every time is 0 is a burst.
    """
    times = from_first(rows)
    distinct = 1 + int(np.count_nonzero(np.diff(times)))
    if distinct == len(times) or not (rows.whole.any() or rows.further.any()):
        return 0.0
    floor = np.floor(rows.further)
    seconds, fraction = rows.whole + floor.astype(np.int64), rows.further - floor
    error = float(np.spacing(np.abs(rows.further).max()))
    for tick in _TICKS:
        if tick > 1.0:
            fits = distinct >= _AGREE and not fraction.any() and not (seconds % int(tick)).any()
        else:
            per_second = round(1.0 / tick)
            tolerance = max(1e-9, _ERRORS * error * per_second)
            scaled = fraction * per_second
            fits = tolerance < 0.05 and bool((np.abs(scaled - np.round(scaled)) <= tolerance).all())
        if fits:
            return tick
    return 0.0


def spread(rows: Rows, tick: float) -> NDArray[np.float64]:
    """Times of flows that are in order, from the first: the k flows of a tick at (i + 1/2) / k of it."""
    floor = np.floor(rows.further)
    seconds, fraction = rows.whole + floor.astype(np.int64), rows.further - floor
    # Counted from a tick near the first flow, so that the numbers stay small.
    base = math.floor(seconds[0] / tick) * tick if tick > 1.0 else float(seconds[0])
    # A float64 of a present-day epoch may be a little before its tick.
    tolerance = min(max(1e-6, _ERRORS * float(np.spacing(np.abs(rows.further).max())) / tick), 0.05)
    key = np.floor(((seconds - base) + fraction) / tick + tolerance)
    _, first, count = np.unique(key, return_index=True, return_counts=True)
    rank = np.arange(len(key)) - np.repeat(first, count)
    place = (rank + 0.5) / np.repeat(count, count)
    times: NDArray[np.float64] = (key - key[0]) * tick + (place - place[0]) * tick
    return times
