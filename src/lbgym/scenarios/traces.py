"""Read recorded flows: MARLLB, CSV, Parquet, access logs and LLM request traces, gzip-compressed or not."""

from __future__ import annotations

import csv
import gzip
import logging
import math
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from datetime import date
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import LbgymError, MissingExtraError, ScenarioError, TraceError, UnknownNameError
from .model import TRACE_LIMIT, Trace, _boolean, _number, _set, _shown, _text

logger = logging.getLogger(__name__)

TRACE_FORMATS = ("auto", "marllb", "csv", "parquet", "clf", "azure-llm")

#: CPU seconds of one iteration of MARLLB's request loop: the published mean of 3.67 million iterations takes 200 ms.
SECONDS_PER_ITERATION = 0.2 / 3.67e6
#: A request of an access log costs 5 ms and 100 ns per byte sent (10 MB/s of one core).
BASE_DEMAND = 5e-3
SECONDS_PER_BYTE = 1e-7
#: Tokens per second of one request on one lane of an accelerator: reading the prompt, and writing the answer.
PREFILL_RATE = 10_000.0
DECODE_RATE = 80.0

#: The options each format takes besides those that every format takes, with their defaults.
FORMAT_OPTIONS: dict[str, dict[str, Any]] = {
    "marllb": {"seconds_per_iteration": SECONDS_PER_ITERATION},
    "csv": {"time_column": "time", "demand_column": "demand"},
    "parquet": {"time_column": "time", "demand_column": "demand"},
    "clf": {"base_demand": BASE_DEMAND, "seconds_per_byte": SECONDS_PER_BYTE},
    "azure-llm": {"prefill_rate": PREFILL_RATE, "decode_rate": DECODE_RATE},
}
#: Every keyword of :func:`read_trace`.
TRACE_OPTIONS = (
    "format",
    "speedup",
    "scale",
    "on_error",
    "repeat",
    "random_start",
    *dict.fromkeys(name for options in FORMAT_OPTIONS.values() for name in options),
)

# What a file may be instead of a trace, by its first bytes.
_FOREIGN = {
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"\xfd7zXZ\x00": "compressed with xz",
    b"BZh": "compressed with bzip2",
    b"PK\x03\x04": "a zip archive",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_ITERATIONS = re.compile(r"[?&]n=([^&\s]*)")
_TIMESTAMP = re.compile(r"(\d{4})-(\d\d)-(\d\d)[T ](\d\d):(\d\d):(\d\d)(\.\d+)?(?:Z|([+-])(\d\d):?(\d\d))?", re.ASCII)
_MARLLB_LINE = re.compile(r"[^\t]+\t[^\t]*[?&]n=\d+", re.ASCII)
# Common log format; what follows the size (referer and agent of the combined format, or more) is not needed.
_CLF = re.compile(
    r"\S+ \S+ .*?\[(\d\d)/([A-Z][a-z][a-z])/(\d{4}):(\d\d):(\d\d):(\d\d)(?: ([+-])(\d\d)(\d\d))?\] "
    r'"(?:[^"\\]|\\.)*" \d{3} (-|\d+)(?:\s|$)',
    re.ASCII,
)
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def read_trace(
    path: str | os.PathLike[str],
    format: str = "auto",
    *,
    speedup: float = 1.0,
    scale: float = 1.0,
    on_error: Literal["raise", "skip"] = "raise",
    repeat: bool = True,
    random_start: bool = False,
    time_column: str | None = None,
    demand_column: str | None = None,
    seconds_per_iteration: float | None = None,
    base_demand: float | None = None,
    seconds_per_byte: float | None = None,
    prefill_rate: float | None = None,
    decode_rate: float | None = None,
) -> Trace:
    """Read the arrival times and demands of flows from a file.

    Gzip is recognised by content, whatever the file's name. Formats:

    * ``marllb``: tab-separated ``time`` (s) and ``query`` with ``?n=ITERATIONS``;
      demand = iterations * ``seconds_per_iteration`` (default 0.2 / 3.67e6).
    * ``csv``: a header line and columns named by ``time_column`` (default "time"; seconds, or ISO 8601 timestamps) and
      ``demand_column`` (default "demand"; core-seconds), separated by commas, semicolons or tabs; one line per flow.
    * ``parquet``: the same columns; times may be timestamps.
    * ``clf``: the common or combined log format of Apache and NGINX. Demand = ``base_demand`` (default 0.005 s) +
      bytes * ``seconds_per_byte`` (default 1e-7); a size of "-" is 0 bytes. The log's clock ticks once a second: the k
      flows of a second are spread evenly over it, in the order of their lines. Servers write a line when
      the response is complete, so lines are sorted by time first.
    * ``azure-llm``: columns ``TIMESTAMP``, ``ContextTokens``, ``GeneratedTokens``;
      demand = context / ``prefill_rate`` + generated / ``decode_rate`` (defaults 10,000 and 80 tokens per second).
    * ``auto``: one of these, told by the content.

    Args:
        path: the file.
        format: one of ``TRACE_FORMATS``.
        speedup: divides the times.
        scale: multiplies the demands.
        on_error: "raise" an error at a malformed line, or "skip" it; skipped lines are counted in ``Trace.skipped`` and
            reported by one logged warning. Except in access logs, a line whose time is before that of an earlier line
            is malformed. Empty lines never count.
        repeat: the trace begins again after its end.
        random_start: each seed begins at another flow.
        time_column: for ``csv`` and ``parquet``. This and what follows is refused for a format that does not use it.
        demand_column: for ``csv`` and ``parquet``.
        seconds_per_iteration: for ``marllb``, core-seconds.
        base_demand: for ``clf``, core-seconds.
        seconds_per_byte: for ``clf``, core-seconds.
        prefill_rate: for ``azure-llm``, tokens per second.
        decode_rate: for ``azure-llm``, tokens per second.

    Returns:
        The trace, its times counted from the first flow.

    Raises:
        TraceError: the file cannot be read, is not of the format, or has a malformed line (named as file:line).
        ScenarioError: an option of the wrong type or out of range.
        UnknownNameError: an unknown format or value of ``on_error``.
        MissingExtraError: a Parquet file without pyarrow installed.
    """
    if _text(format, "trace format") not in TRACE_FORMATS:
        raise UnknownNameError("trace format", format, TRACE_FORMATS)
    if _text(on_error, "trace on_error") not in ("raise", "skip"):
        raise UnknownNameError("on_error", on_error, ("raise", "skip"))
    speedup, scale = _number(speedup, "trace speedup"), _number(scale, "trace scale")
    repeat, random_start = _boolean(repeat, "trace repeat"), _boolean(random_start, "trace random_start")
    if not isinstance(path, (str, os.PathLike)):
        raise ScenarioError(f"trace path must be a path, got {_shown(path)}")
    given = {
        "time_column": time_column,
        "demand_column": demand_column,
        "seconds_per_iteration": seconds_per_iteration,
        "base_demand": base_demand,
        "seconds_per_byte": seconds_per_byte,
        "prefill_rate": prefill_rate,
        "decode_rate": decode_rate,
    }
    given = {name: _checked(name, value) for name, value in given.items() if value is not None}

    file = expand_path(path, TraceError)
    data = _read_bytes(file)
    kind = _detect(data, file, given) if format == "auto" else format
    known = FORMAT_OPTIONS[kind]
    for name in given:
        if name not in known:
            raise ScenarioError(
                f"{file}: trace option {name!r} does not apply to the format {kind!r}, which takes: {', '.join(known)}"
            )
    options = known | given
    if kind == "parquet":
        rows = _read_parquet(data, file, options)
    else:
        # Nothing that is needed of an access log can hold other letters than ASCII, but addresses and agents do.
        rows = _read_lines(_decode(data, file, tolerant=kind == "clf" or on_error == "skip"), kind, file, options)
    times, demands, skipped = _collect(rows, file, skip=on_error == "skip", resort=kind == "clf")
    trace = Trace(times, demands, source=str(file), repeat=repeat, random_start=random_start, skipped=skipped)
    if speedup != 1 or scale != 1:
        trace = trace.scaled(speedup=speedup, scale=scale)
    read_as = {"speedup": speedup, "scale": scale, "on_error": on_error}
    plain = {"speedup": 1.0, "scale": 1.0, "on_error": "raise"}
    changed = {name: value for name, value in read_as.items() if value != plain[name]}
    _set(trace, origin={"path": str(file.absolute()), "format": kind} | changed | given)
    return trace


def write_trace(trace: Trace, path: str | os.PathLike[str]) -> None:
    """Write the flows of a trace as CSV (``time``, ``demand``), gzip-compressed if the name ends in ``.gz``.

    ``read_trace`` gives back the same flows, and the same bytes come out for the same flows.

    Raises:
        TraceError: the file cannot be written.
    """
    file = expand_path(path, TraceError)
    rows = zip(trace.times.tolist(), trace.demands.tolist(), strict=True)
    data = ("time,demand\n" + "".join(f"{time!r},{demand!r}\n" for time, demand in rows)).encode()
    try:
        file.write_bytes(gzip.compress(data, mtime=0) if file.suffix == ".gz" else data)
    except (OSError, ValueError) as error:
        raise TraceError(f"cannot write trace file {file}: {_reason(error)}") from error


def expand_path(path: str | os.PathLike[str], error_type: type[LbgymError]) -> Path:
    """``path`` with a leading ~ replaced by the home folder."""
    try:
        return Path(os.fsdecode(path)).expanduser()
    except RuntimeError as error:
        raise error_type(f"no such path: {path}: {error}") from error


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


def _checked(name: str, value: Any) -> Any:
    if name.endswith("_column"):
        return _text(value, f"trace {name}")
    return _number(value, f"trace {name}", strict=name.endswith("_rate"))


def _read_bytes(file: Path) -> bytes:
    """The content of a file, decompressed."""
    try:
        data = file.read_bytes()
    except FileNotFoundError as error:
        raise TraceError(f"no such trace file: {file}") from error
    except (OSError, ValueError) as error:
        raise TraceError(f"cannot read trace file {file}: {_reason(error)}") from error
    if data.startswith(b"\x1f\x8b"):
        try:
            data = gzip.decompress(data)
        except EOFError as error:
            raise TraceError(f"{file}: the gzip data is cut off; copy or download the file again") from error
        except (OSError, zlib.error) as error:
            raise TraceError(f"{file}: damaged gzip data: {error}") from error
    if not data.strip():
        raise TraceError(f"{file}: the trace file is empty")
    for magic, what in _FOREIGN.items():
        if data.startswith(magic):
            raise TraceError(f"{file}: the trace file is {what}; give plain UTF-8 text, gzip or Parquet")
    return data


def _decode(data: bytes, file: Path, *, tolerant: bool) -> list[str]:
    """Lines of text. With ``tolerant``, bytes that are not UTF-8 become replacement characters."""
    try:
        text = data.decode("utf-8-sig", errors="replace" if tolerant else "strict")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise TraceError(f"{file}:{line}: not UTF-8 text (byte 0x{data[error.start]:02x})") from error
    return text.split("\n")


def _detect(data: bytes, file: Path, options: Mapping[str, Any]) -> str:
    """The format of a trace, from its first lines."""
    if data.startswith(b"PAR1"):
        return "parquet"
    head = [line for line in data[:65_536].decode("utf-8-sig", errors="replace").split("\n") if line.strip()]
    first = head[0] if head else ""
    if _columns(first, "azure-llm", FORMAT_OPTIONS["azure-llm"]):
        return "azure-llm"
    if _columns(first, "csv", FORMAT_OPTIONS["csv"] | dict(options)):
        return "csv"
    if _columns(first, "marllb", {}) or _MARLLB_LINE.match(first):
        return "marllb"
    if any(_CLF.match(line) for line in head[:20]):
        return "clf"
    found = "binary data" if "\0" in first or "\ufffd" in first else f"the first line {_short(first)}"
    raise TraceError(
        f"{file}: cannot tell the format of the trace from {found}. Give format= (one of "
        f"{', '.join(TRACE_FORMATS[1:])}), or time_column= and demand_column= for a CSV file with other column names"
    )


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:60] + "...")


def _required(kind: str, options: Mapping[str, Any]) -> tuple[str, ...]:
    if kind == "marllb":
        return ("time", "query")
    if kind == "azure-llm":
        return ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
    return (options["time_column"], options["demand_column"])


def _cells(line: str, delimiter: str) -> list[str]:
    if '"' not in line:
        return line.split(delimiter)
    try:
        return next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])
    except csv.Error as error:
        raise ValueError(str(error)) from error


def _columns(header: str, kind: str, options: Mapping[str, Any]) -> tuple[str, list[int]] | None:
    """The delimiter of a header line and where the required columns are; None if one is missing."""
    for delimiter in "\t" if kind == "marllb" else ",\t;":
        try:
            names = [name.strip() for name in _cells(header, delimiter)]
        except ValueError:
            continue
        if all(name in names for name in _required(kind, options)):
            return delimiter, [names.index(name) for name in _required(kind, options)]
    return None


# Rows: (line number, whole seconds, further seconds, demand), or (line number, what is wrong with the line). Whole
# seconds are apart because a float64 of a present-day epoch resolves only 0.24 microseconds.
_Row = tuple[int, int, float, float] | tuple[int, str]


def _read_lines(lines: list[str], kind: str, file: Path, options: Mapping[str, Any]) -> Iterator[_Row]:
    start = 0
    parse: Callable[[str], tuple[int, float, float]]
    if kind == "clf":
        parse = partial(_parse_clf, base=options["base_demand"], per_byte=options["seconds_per_byte"])
    else:
        # Text of no letters but control characters counts as blank for text, not for bytes: the header is then line 1.
        start = next((i for i, line in enumerate(lines) if line.strip()), 0)
        if kind == "marllb" and _MARLLB_LINE.match(lines[start]):
            columns = ("\t", [0, 1])
        else:
            found = _columns(lines[start], kind, options)
            if found is None:
                raise TraceError(
                    f"{file}:{start + 1}: a trace of format {kind!r} needs a header line with the columns "
                    f"{', '.join(map(repr, _required(kind, options)))}, got {_short(lines[start])}"
                )
            columns = found
            start += 1
        if kind == "marllb":
            parse = partial(_parse_marllb, columns=columns, seconds=options["seconds_per_iteration"])
        elif kind == "csv":
            parse = partial(_parse_csv, columns=columns, names=_required(kind, options))
        else:
            rates = (options["prefill_rate"], options["decode_rate"])
            parse = partial(_parse_azure_llm, columns=columns, rates=rates)
    for number, line in enumerate(lines[start:], start=start + 1):
        if not line.strip():
            continue
        try:
            seconds, further, demand = parse(line)
            if demand > TRACE_LIMIT:
                raise ValueError(f"the demand must be at most {TRACE_LIMIT:g} core-seconds, got {demand:g}")
        except ValueError as error:
            yield number, str(error)
        else:
            yield number, seconds, further, demand


def _pick(line: str, columns: tuple[str, list[int]]) -> list[str]:
    delimiter, indices = columns
    cells = _cells(line.rstrip("\r"), delimiter)
    try:
        return [cells[i] for i in indices]
    except IndexError:
        raise ValueError(f"{len(cells)} columns where at least {max(indices) + 1} are needed") from None


def _float(text: str, name: str, *, low: float = -math.inf) -> float:
    # Python's float() takes more than a data file should hold: 1_000, nan, infinity, digits of other scripts.
    text = text.strip()
    if not _NUMBER.fullmatch(text):
        raise ValueError(f"{name} must be a number, got {_short(text)}")
    value = float(text)
    if value < low:
        raise ValueError(f"{name} must be at least {low:g}, got {_short(text)}")
    if abs(value) > TRACE_LIMIT:
        raise ValueError(f"{name} must be at most {TRACE_LIMIT:g}, got {_short(text)}")
    return value


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
        raise ValueError(f"the time must be like 2023-11-16 18:17:03.97, got {_short(text)}")
    year, month, day, hour, minute, second, fraction, sign, off_hour, off_minute = match.groups()
    whole = _second(_day(int(year), int(month), int(day)), hour, minute, second, sign, off_hour, off_minute)
    return whole, float(fraction or 0.0)


def _parse_marllb(line: str, columns: tuple[str, list[int]], seconds: float) -> tuple[int, float, float]:
    time, query = _pick(line, columns)
    match = _ITERATIONS.search(query)
    if match is None:
        raise ValueError(f"the query has no n=ITERATIONS: {_short(query)}")
    return 0, _float(time, "time"), _float(match[1], "n", low=0) * seconds


def _parse_csv(line: str, columns: tuple[str, list[int]], names: tuple[str, ...]) -> tuple[int, float, float]:
    time, demand = _pick(line, columns)
    whole, further = (0, _float(time, names[0])) if ":" not in time else _timestamp(time)
    return whole, further, _float(demand, names[1], low=0)


def _parse_azure_llm(line: str, columns: tuple[str, list[int]], rates: tuple[float, float]) -> tuple[int, float, float]:
    time, context, generated = _pick(line, columns)
    demand = _float(context, "ContextTokens", low=0) / rates[0] + _float(generated, "GeneratedTokens", low=0) / rates[1]
    return *_timestamp(time), demand


def _parse_clf(line: str, base: float, per_byte: float) -> tuple[int, float, float]:
    match = _CLF.match(line)
    if match is None:
        raise ValueError(f"not in the common or combined log format: {_short(line)}")
    day, month, year, hour, minute, second, sign, off_hour, off_minute, size = match.groups()
    if month not in _MONTHS:
        raise ValueError(f"no such month: {month!r}")
    whole = _second(
        _day(int(year), _MONTHS.index(month) + 1, int(day)), hour, minute, second, sign, off_hour, off_minute
    )
    return whole, 0.0, base + (0.0 if size == "-" else float(size)) * per_byte


def _collect(
    rows: Iterator[_Row], file: Path, *, skip: bool, resort: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64], int]:
    """Times from the first flow, demands, and the number of rows left out."""
    problems: list[tuple[int, str]] = []
    good: list[tuple[int, int, float, float]] = []
    for row in rows:
        if len(row) == 4:
            good.append(row)
        elif skip:
            problems.append(row)
        else:
            raise TraceError(f"{file}:{row[0]}: {row[1]}")
    if not good:
        found = "no flow in the trace"
        if problems:
            found += f"; the first of {len(problems)} malformed lines is {problems[0][0]}: {problems[0][1]}"
        raise TraceError(f"{file}: {found}")
    total = len(good) + len(problems)
    numbers, whole, further, demands = (np.array(column) for column in zip(*good, strict=True))
    if resort:
        whole, further, demands = _spread(whole, demands)
    times = (whole - whole[0]) + (further - further[0])
    newest = np.maximum.accumulate(times)
    late = times < newest
    for i in np.flatnonzero(late):
        problem = f"the time is {newest[i] - times[i]:g} s before that of an earlier line; times must not decrease"
        if not skip:
            raise TraceError(f"{file}:{numbers[i]}: {problem}")
        problems.append((int(numbers[i]), problem))
    if problems:
        line, problem = min(problems)
        logger.warning("%s: skipped %d of %d lines; the first, line %d: %s", file, len(problems), total, line, problem)
    return times[~late], demands[~late], len(problems)


def _spread(seconds: NDArray[np.int64], demands: NDArray[np.float64]) -> tuple[NDArray[Any], ...]:
    """Sort by second and put the k flows of a second at (i + 1/2) / k of it, in the order given."""
    order = np.argsort(seconds, kind="stable")
    seconds = seconds[order]
    _, first, count = np.unique(seconds, return_index=True, return_counts=True)
    rank = np.arange(len(seconds)) - np.repeat(first, count)
    return seconds, (rank + 0.5) / np.repeat(count, count), demands[order]


def _read_parquet(data: bytes, file: Path, options: Mapping[str, Any]) -> Iterator[_Row]:
    """Rows of a Parquet file, numbered from 1."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingExtraError("pyarrow", "eval", "reading a Parquet trace") from error
    names = _required("parquet", options)
    try:
        parquet = pq.ParquetFile(pa.BufferReader(data))
        missing = [name for name in names if name not in parquet.schema_arrow.names]
        if missing:
            found = ", ".join(parquet.schema_arrow.names)
            raise TraceError(f"{file}: no column {missing[0]!r} in the Parquet trace; it has: {found}")
        table = parquet.read(columns=list(names))
        columns = []
        for name in names:
            column = table.column(name)
            if pa.types.is_timestamp(column.type) and name == names[0]:
                nanoseconds = column.cast(pa.timestamp("ns", column.type.tz)).cast(pa.int64()).to_pylist()
                columns.append([None if value is None else divmod(value, 1_000_000_000) for value in nanoseconds])
            elif pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
                columns.append(column.cast(pa.float64(), safe=False).to_pylist())
            else:
                raise TraceError(f"{file}: column {name!r} of the Parquet trace must hold numbers, not {column.type}")
    except (pa.ArrowException, OSError) as error:
        raise TraceError(f"{file}: not a readable Parquet file: {error}") from error
    for number, (time, demand) in enumerate(zip(*columns, strict=True), start=1):
        whole, further = (time[0], time[1] * 1e-9) if isinstance(time, tuple) else (0, time)
        if further is None or not abs(further) <= TRACE_LIMIT:
            yield number, f"{names[0]} must be a number of at most {TRACE_LIMIT:g}, got {further}"
        elif demand is None or not 0 <= demand <= TRACE_LIMIT:
            yield number, f"{names[1]} must be a number from 0 to {TRACE_LIMIT:g}, got {demand}"
        else:
            yield number, whole, further, demand
