"""Traces in text: which format a file has, and one flow of each of its lines."""

from __future__ import annotations

import csv
import io
import logging
import math
import re
import time as clock
from array import array
from collections.abc import Callable, Iterator, Mapping
from datetime import date
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import TraceError
from .._validation import TRACE_LIMIT
from ._foreign import foreign_log
from ._options import FORMAT_OPTIONS, TRACE_FORMATS, required_columns
from ._rows import Rows, check_demand

logger = logging.getLogger(__name__)

#: A column of CSV files that says how finely their clock ticks (see ``clock_resolution`` of ``read_trace``).
RESOLUTION_COLUMN = "clock_resolution"

#: Seconds between messages of how far a long file has been read.
_MESSAGE_INTERVAL = 3.0
_LINES_BETWEEN_LOOKS = 1 << 15
# Largest time that is written, in whatever unit, and largest response in bytes.
_LARGEST_TIME = 1e24
_LARGEST_SIZE = 1e15
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_INTEGER = re.compile(r"[+-]?\d{1,18}|[+-]?[0-8]\d{18}", re.ASCII)
_DECIMAL_COMMA = re.compile(r"[+-]?\d*,\d+", re.ASCII)
_ITERATIONS = re.compile(r"[?&]n=([^&\s]*)")
_TIMESTAMP = re.compile(r"(\d{4})-(\d\d)-(\d\d)[T ](\d\d):(\d\d):(\d\d)(\.\d+)?(?:Z|([+-])(\d\d):?(\d\d))?", re.ASCII)
_MARLLB_LINE = re.compile(r"[^\t]+\t[^\t]*[?&]n=\d+", re.ASCII)
# Common log format, with up to three more fields between time and request. What follows the size (referer and agent of
# the combined format, or more) is not needed. A request with raw quotes ends where a status and a size follow.
_CLF_TIME = (
    r"\[(\d\d)/([A-Za-z]{3})/(\d{4}):(\d\d):(\d\d):(\d\d)(\.\d{1,9})?(?: +([+-])(\d\d):?(\d\d))?\]\s+"
    r"(?:[^\s\"\[\]]+\s+){0,3}"
)
_CLF = re.compile(r"\S+ +\S+ .*?" + _CLF_TIME + r'"(?:(?:[^"\\]|\\.)*|.*?)"\s+\d{3}\s+(-|\d+)(?:\s|$)', re.ASCII)
_CLF_PARTS = (
    (
        re.compile(r"\S+ +\S+ .*?" + _CLF_TIME, re.ASCII),
        "no time such as [17/May/2015:10:05:03 +0000] before a request",
    ),
    (re.compile(r".*?" + _CLF_TIME + r'".*"', re.ASCII), "no request in quotes after the time"),
    (re.compile(r".*?" + _CLF_TIME + r'".*?"\s+\d{3}\s', re.ASCII), "no status of three digits after the request"),
)
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")

#: Whole and further time, in the unit of the file, and demand.
_Flow = tuple[int, float, float]


def detect(data: bytes, file: Path, options: Mapping[str, Any]) -> str:
    """The format of a trace, from its first lines.

    Raises:
        TraceError: none of ours.
    """
    if data.startswith(b"PAR1"):
        return "parquet"
    head = [line for line in data[:65_536].decode("utf-8-sig", errors="replace").split("\n") if line.strip()]
    first = head[0] if head else ""
    for kind in ("azure-llm", "csv"):
        names = FORMAT_OPTIONS[kind] | dict(options)
        # A demand column is no token column, whatever the other names.
        if kind == "azure-llm" and "demand_column" in options:
            continue
        if _columns(first, kind, names):
            return kind
    if _columns(first, "marllb", {}) or _MARLLB_LINE.match(first):
        return "marllb"
    if any(_CLF.match(line) for line in head[:20]):
        return "clf"
    found = "binary data" if "\0" in first or "\ufffd" in first else f"the first line {short(first)}"
    if foreign := foreign_log(first):
        raise TraceError(f"{file}: cannot tell the format of the trace from {found}; {foreign}")
    raise TraceError(
        f"{file}: cannot tell the format of the trace from {found}. Give format= (one of "
        f"{', '.join(TRACE_FORMATS[1:])}), or time_column= and demand_column= for a CSV file with other column names"
    )


def short(text: str) -> str:
    """``text`` in quotes, cut if long."""
    return repr(text if len(text) <= 60 else text[:60] + "...")


def _cells(line: str, delimiter: str) -> list[str]:
    if '"' not in line:
        return line.split(delimiter)
    try:
        return next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])
    except csv.Error as error:
        raise ValueError(str(error)) from error


def _names(header: str, delimiter: str) -> list[str]:
    try:
        return [name.strip() for name in _cells(header, delimiter)]
    except ValueError:
        return []


def _columns(header: str, kind: str, options: Mapping[str, Any]) -> tuple[str, list[int]] | None:
    """The delimiter of a header line and where the required columns are; None if one is missing."""
    for delimiter in "\t" if kind == "marllb" else ",\t;":
        names = _names(header, delimiter)
        if all(name in names for name in required_columns(kind, options)):
            return delimiter, [names.index(name) for name in required_columns(kind, options)]
    return None


class LineReader:
    """Reads the flows of a text, line by line.

    Args:
        data: the file's content.
        kind: its format.
        file: its path, for messages.
        options: those of the format.
        tolerant: take bytes that are not UTF-8 for replacement characters, instead of refusing their line.
        strict: stop at the first malformed line.
    """

    def __init__(
        self, data: bytes, kind: str, file: Path, options: Mapping[str, Any], *, tolerant: bool, strict: bool
    ) -> None:
        self._data = data.removeprefix(b"\xef\xbb\xbf")
        self._kind, self._file, self._options = kind, file, options
        self._tolerant, self._strict = tolerant, strict
        self._timestamps = False
        #: Column of the clock's resolution, if the file has one, and what it says.
        self._resolution_column: int | None = None
        self.resolution: float | None = None

    def read(self) -> Rows:
        """The rows of the file, until the first malformed one if strict.

        Raises:
            TraceError: the header is not that of the format.
        """
        numbers, whole, further, demands = array("q"), array("q"), array("d"), array("d")
        problems: list[tuple[int, str]] = []
        parse: Callable[[str], _Flow] | None = None
        for number, line in self._lines():
            if parse is None:
                parse, is_header = self._parser(number, line)
                if is_header:
                    continue
            try:
                seconds, rest, demand = parse(self._decoded(line))
                check_demand(demand)
            except ValueError as error:
                problems.append((number, str(error)))
                if self._strict:
                    break
            else:
                numbers.append(number)
                whole.append(seconds)
                further.append(rest)
                demands.append(demand)
        columns = (np.array(numbers, np.int64), np.array(whole, np.int64), np.array(further), np.array(demands))
        return Rows(*columns, problems, self._timestamps)

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """Numbers and bytes of the lines that are not blank; says how far it is when that takes long."""
        stream = io.BytesIO(self._data)
        reported = clock.monotonic()
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield number, line
            if number % _LINES_BETWEEN_LOOKS == 0 and clock.monotonic() - reported > _MESSAGE_INTERVAL:
                reported = clock.monotonic()
                logger.info(
                    "reading %s: %d lines, %.0f %%", self._file, number, 100 * stream.tell() / max(len(self._data), 1)
                )

    def _decoded(self, line: bytes) -> str:
        try:
            return line.rstrip(b"\r\n").decode(errors="replace" if self._tolerant else "strict")
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8 text (byte 0x{line[error.start]:02x})") from error

    def _parser(self, number: int, first: bytes) -> tuple[Callable[[str], _Flow], bool]:
        """The function that takes a line apart, and whether the first one is a header."""
        options, kind = self._options, self._kind
        if kind == "clf":
            return partial(_parse_clf, base=options["base_demand"], per_byte=options["seconds_per_byte"]), False
        try:
            line = self._decoded(first)
        except ValueError as error:
            raise TraceError(f"{self._file}:{number}: {error}") from error
        found = _columns(line, kind, options)
        if kind == "marllb":
            seconds = options["seconds_per_iteration"]
            if _MARLLB_LINE.match(line):
                return partial(_parse_marllb, columns=("\t", [0, 1]), seconds=seconds), False
            if found is not None:
                return partial(_parse_marllb, columns=found, seconds=seconds), True
        if found is None:
            foreign = foreign_log(line)
            raise TraceError(
                f"{self._file}:{number}: a trace of format {kind!r} needs a header line with the columns "
                f"{', '.join(map(repr, required_columns(kind, options)))}, got {short(line)}"
                + (f"; {foreign}" if foreign else "")
            )
        names = _names(line, found[0])
        if RESOLUTION_COLUMN in names:
            self._resolution_column = names.index(RESOLUTION_COLUMN)
        return partial(self._parse_table, columns=found, names=required_columns(kind, options)), True

    def _parse_table(self, line: str, columns: tuple[str, list[int]], names: tuple[str, ...]) -> _Flow:
        if line.lstrip().startswith("#"):
            raise ValueError(foreign_log(line))
        cells = _cells(line, columns[0])
        time, *values = _pick(cells, columns[1])
        if ":" in time or (self._kind == "azure-llm" and not _NUMBER.fullmatch(time.strip())):
            if self._options["time_unit"] is not None:
                raise ValueError(f"the time is a date, and time_unit is for numbers, got {short(time)}")
            self._timestamps = True
            whole, further = _timestamp(time)
        else:
            whole, further = _time(time, names[0])
        if self._resolution_column is not None and self.resolution is None and len(cells) > self._resolution_column:
            self.resolution = _float(cells[self._resolution_column], RESOLUTION_COLUMN, low=0)
        demand = _float(values[0], names[1], low=0)
        if len(values) == 2:
            rates = self._options["prefill_rate"], self._options["decode_rate"]
            demand = demand / rates[0] + _float(values[1], names[2], low=0) / rates[1]
        return whole, further, demand


def _pick(cells: list[str], indices: list[int]) -> list[str]:
    try:
        return [cells[i] for i in indices]
    except IndexError:
        raise ValueError(f"{len(cells)} columns where at least {max(indices) + 1} are needed") from None


def _float(text: str, name: str, *, low: float = -math.inf, high: float = TRACE_LIMIT) -> float:
    # Python's float() takes more than a data file should hold: 1_000, nan, infinity, digits of other scripts.
    text = text.strip()
    if not _NUMBER.fullmatch(text):
        comma = f"; write a decimal point, {text.replace(',', '.')}" if _DECIMAL_COMMA.fullmatch(text) else ""
        raise ValueError(f"{name} must be a number, got {short(text)}{comma}")
    value = float(text)
    if value < low:
        raise ValueError(f"{name} must be at least {low:g}, got {short(text)}")
    if abs(value) > high:
        raise ValueError(f"{name} must be at most {high:g}, got {short(text)}")
    return value


def _time(text: str, name: str) -> tuple[int, float]:
    """A time in the unit of the file; whole numbers stay exact, as a float64 has too few digits for epochs in ns."""
    text = text.strip()
    if _INTEGER.fullmatch(text):
        return int(text), 0.0
    return 0, _float(text, name, high=_LARGEST_TIME)


@lru_cache(maxsize=1024)
def _day(year: int, month: int, day: int) -> int:
    return date(year, month, day).toordinal() * 86_400


def _second(day: int, hour: str, minute: str, second: str, sign: str | None, off_hour: str, off_minute: str) -> int:
    h, m, s = int(hour), int(minute), int(second)
    if h > 23 or m > 59 or s > 60:
        raise ValueError(f"no such time of day: {hour}:{minute}:{second}")
    offset = (int(off_hour) * 3600 + int(off_minute) * 60) * (-1 if sign == "-" else 1) if sign else 0
    return day + h * 3600 + m * 60 + s - offset


def _timestamp(text: str) -> tuple[int, float]:
    match = _TIMESTAMP.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"the time must be like 2023-11-16 18:17:03.97, got {short(text)}")
    year, month, day, hour, minute, second, fraction, sign, off_hour, off_minute = match.groups()
    whole = _second(_day(int(year), int(month), int(day)), hour, minute, second, sign, off_hour, off_minute)
    return whole, float(fraction or 0.0)


def _parse_marllb(line: str, columns: tuple[str, list[int]], seconds: float) -> _Flow:
    time, query = _pick(_cells(line, columns[0]), columns[1])
    match = _ITERATIONS.search(query)
    if match is None:
        raise ValueError(f"the query has no n=ITERATIONS: {short(query)}")
    return *_time(time, "time"), _float(match[1], "n", low=0) * seconds


def _parse_clf(line: str, base: float, per_byte: float) -> _Flow:
    match = _CLF.match(line)
    if match is None:
        raise ValueError(f"not in the common or combined log format: {short(line)}; {_clf_problem(line)}")
    day, month, year, hour, minute, second, fraction, sign, off_hour, off_minute, size = match.groups()
    if month.title() not in _MONTHS:
        raise ValueError(f"no such month: {month!r}")
    bytes_sent = 0.0 if size == "-" else float(size)
    if bytes_sent > _LARGEST_SIZE:
        raise ValueError(
            f"a response of {size if len(size) <= 40 else size[:40] + '...'} bytes; at most 1e+15 make sense"
        )
    midnight = _day(int(year), _MONTHS.index(month.title()) + 1, int(day))
    whole = _second(midnight, hour, minute, second, sign, off_hour, off_minute)
    return whole, float(fraction or 0.0), base + bytes_sent * per_byte


def _clf_problem(line: str) -> str:
    """Say why a line is not in the common log format."""
    if foreign := foreign_log(line):
        return foreign
    for pattern, problem in _CLF_PARTS:
        if not pattern.match(line):
            return problem
    return "the bytes sent must be a whole number, or -"
