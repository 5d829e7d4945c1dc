"""Read recorded flows: MARLLB, CSV, Parquet, access logs and LLM request traces, gzip-compressed or not."""

from __future__ import annotations

import gzip
import logging
import os
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ...checks import number
from ...errors import LbgymError, ScenarioError, TraceError, UnknownNameError
from .._validation import _boolean, _set, _shown, _text
from ..workload import Trace
from ._clock import coarse_tick, from_first, in_order, in_seconds, spread, time_unit
from ._lines import RESOLUTION_COLUMN, LineReader, detect
from ._options import (
    FORMAT_OPTIONS,
    TIME_UNITS,
    TRACE_FORMATS,
)
from ._parquet import read_parquet
from ._rows import Rows

logger = logging.getLogger(__name__)

# What a file may be instead of a trace, by its first bytes.
_FOREIGN = {
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"\xfd7zXZ\x00": "compressed with xz",
    b"BZh": "compressed with bzip2",
    b"PK\x03\x04": "a zip archive",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}
_SKIP = 'on_error = "skip" (--skip-malformed) leaves such lines out'


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
    input_tokens_column: str | None = None,
    output_tokens_column: str | None = None,
    time_unit: Literal["s", "ms", "us", "ns"] | None = None,
    sort: bool | None = None,
    clock_resolution: float | None = None,
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
    * ``csv``: a header line and columns named by ``time_column`` (default "time"; numbers, or ISO 8601 timestamps) and
      ``demand_column`` (default "demand"; core-seconds), separated by commas, semicolons or tabs; one line per flow.
      With ``input_tokens_column`` and ``output_tokens_column`` the demand is that of ``azure-llm`` instead.
    * ``parquet``: the same columns; times may be timestamps.
    * ``clf``: the common or combined log format of Apache and NGINX. Demand = ``base_demand`` (default 0.005 s) +
      bytes * ``seconds_per_byte`` (default 1e-7); a size of "-" is 0 bytes. Servers write a line when the response is
      complete, so lines are sorted by time first.
    * ``azure-llm``: CSV with columns ``TIMESTAMP``, ``ContextTokens``, ``GeneratedTokens``, or those named by the
      options; demand = input tokens / ``prefill_rate`` + output tokens / ``decode_rate`` (defaults 10,000 and 80 tokens
      per second).
    * ``auto``: recognised by the content.

    **Coarse clocks.** Where several flows have the same time and every time is a multiple of 1 h, 1 min, 1 s, 0.1 s,
    10 ms or 1 ms, the clock is taken to tick at the largest of these, as that of an access log at 1 s: the k flows of a
    tick are put at (i + 1/2) / k of it, in the order of their lines. Left together they would queue behind each other
    as they never did. A logged message says so, and ``Trace.origin`` holds the tick.

    Args:
        path: the file.
        format: one of ``TRACE_FORMATS``.
        speedup: divides the times.
        scale: multiplies the demands.
        on_error: "raise" an error at a malformed line, or "skip" it; skipped lines are counted in ``Trace.skipped`` and
            reported by one logged warning. Empty lines never count. A time before that of an earlier line is always an
            error, unless lines are sorted.
        repeat: the trace begins again after its end.
        random_start: each seed begins at another flow.
        time_column: for ``csv``, ``parquet`` and ``azure-llm``. This and what follows is refused for a format that does
            not use it.
        demand_column: for ``csv`` and ``parquet``.
        input_tokens_column: for ``csv``, ``parquet`` and ``azure-llm``, with ``output_tokens_column``.
        output_tokens_column: likewise.
        time_unit: of numeric times in ``csv``, ``parquet`` and ``azure-llm``: "s", "ms", "us" or "ns". None: what the
            first time shows, seconds below 1e11 and milli-, micro- or nanoseconds below 1e14, 1e17 and 1e20.
        sort: put lines in order of time; for all formats but ``clf``, which always does.
        clock_resolution: seconds between ticks of the file's clock, to spread flows over; 0: times are exact. None: as
            above, or as the column ``clock_resolution`` of a CSV file says.
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
    speedup = number("trace speedup", speedup, above=0, error=ScenarioError)
    scale = number("trace scale", scale, above=0, error=ScenarioError)
    repeat, random_start = _boolean(repeat, "trace repeat"), _boolean(random_start, "trace random_start")
    if not isinstance(path, (str, os.PathLike)):
        raise ScenarioError(f"trace path must be a path, got {_shown(path)}")
    given = {
        "time_column": time_column,
        "demand_column": demand_column,
        "input_tokens_column": input_tokens_column,
        "output_tokens_column": output_tokens_column,
        "time_unit": time_unit,
        "sort": sort,
        "clock_resolution": clock_resolution,
        "seconds_per_iteration": seconds_per_iteration,
        "base_demand": base_demand,
        "seconds_per_byte": seconds_per_byte,
        "prefill_rate": prefill_rate,
        "decode_rate": decode_rate,
    }
    given = {name: _checked(name, value) for name, value in given.items() if value is not None}

    file = expand_path(path, TraceError)
    data = _read_bytes(file)
    kind = detect(data, file, given) if format == "auto" else format
    options = _options_of(kind, given, file)
    skip = on_error == "skip"
    resolution = options["clock_resolution"]
    if kind == "parquet":
        rows = read_parquet(data, file, options)
    else:
        # Nothing that is needed of an access log can hold other letters than ASCII, but addresses and agents do.
        reader = LineReader(data, kind, file, options, tolerant=skip or kind == "clf", strict=not skip)
        rows = reader.read()
        resolution = reader.resolution if resolution is None else resolution
    _check_problems(rows, file, skip)
    found: dict[str, Any] = {}
    if "time_unit" in options:
        unit = _unit(rows, options["time_unit"], speedup, file)
        rows = in_seconds(rows, unit)
        _check_problems(rows, file, skip)
        if unit != "s":
            found["time_unit"] = unit
    rows = in_order(rows, file, sort=kind == "clf" or options["sort"])
    times, tick = from_first(rows), coarse_tick(rows) if resolution is None else resolution
    if tick > 0:
        times = spread(rows, tick)
    if resolution is None and tick > 0:
        # That access logs have whole seconds is no news.
        logger.log(
            logging.INFO if kind == "clf" else logging.WARNING,
            "%s: its clock ticks every %g s, so flows of the same time are spread over a tick; clock_resolution = 0 "
            "takes times as they are",
            file,
            tick,
        )
    if tick > 0 or resolution is not None:
        found["clock_resolution"] = float(tick)
    skipped = _report_skipped(rows, file)
    trace = Trace(times, rows.demands, source=str(file), repeat=repeat, random_start=random_start, skipped=skipped)
    if speedup != 1 or scale != 1:
        trace = trace.scaled(speedup=speedup, scale=scale)
    read_as = {"speedup": speedup, "scale": scale, "on_error": on_error}
    plain = {"speedup": 1.0, "scale": 1.0, "on_error": "raise"}
    changed = {name: value for name, value in read_as.items() if value != plain[name]}
    _set(trace, origin={"path": str(file.absolute()), "format": kind} | changed | given | found)
    return trace


def _options_of(kind: str, given: dict[str, Any], file: Path) -> dict[str, Any]:
    """The options of a format, with those that were given."""
    known = FORMAT_OPTIONS[kind]
    for name in given:
        if name not in known:
            raise ScenarioError(
                f"{file}: trace option {name!r} does not apply to the format {kind!r}, which takes: {', '.join(known)}"
            )
    tokens = [name for name in ("input_tokens_column", "output_tokens_column") if name in given]
    if kind != "azure-llm" and tokens and (len(tokens) == 1 or "demand_column" in given):
        raise ScenarioError(
            f"{file}: demands are those of demand_column, or of input_tokens_column and output_tokens_column together, "
            f"got {', '.join(sorted({*tokens, *given} & {*tokens, 'demand_column'}))}"
        )
    rates = [name for name in ("prefill_rate", "decode_rate") if name in given]
    if kind != "azure-llm" and rates and not tokens:
        raise ScenarioError(
            f"{file}: trace option {rates[0]!r} does not apply to the format {kind!r} without input_tokens_column and "
            "output_tokens_column"
        )
    return known | given


def _unit(rows: Rows, given: str | None, speedup: float, file: Path) -> str:
    unit = time_unit(rows, given, speedup, file)
    if unit != "s" and given is None:
        logger.warning('%s: times are read as %s since 1970; time_unit = "s" takes them as seconds', file, unit)
    return unit


def _check_problems(rows: Rows, file: Path, skip: bool) -> None:
    """Refuse malformed rows, unless they are skipped, and a file without any other."""
    if rows.problems and not skip:
        line, problem = min(rows.problems)
        raise TraceError(f"{file}:{line}: {problem} ({_SKIP})")
    if not len(rows.numbers):
        found = "no flow in the trace"
        if rows.problems:
            line, problem = min(rows.problems)
            found += f"; the first of {len(rows.problems)} malformed lines is {line}: {problem}"
        raise TraceError(f"{file}: {found}")


def _report_skipped(rows: Rows, file: Path) -> int:
    """The number of malformed rows; a warning if there are any."""
    count = len(rows.problems)
    if count:
        line, problem = min(rows.problems)
        total = count + len(rows.numbers)
        logger.warning("%s: skipped %d of %d lines; the first, line %d: %s", file, count, total, line, problem)
    return count


def write_trace(trace: Trace, path: str | os.PathLike[str]) -> None:
    """Write the flows of a trace as CSV (``time``, ``demand``), gzip-compressed if the name ends in ``.gz``.

    ``read_trace`` gives back the same flows, and the same flows give the same bytes. A third column,
    ``clock_resolution``, says that times are exact where flows share one. The file is whole or not there.

    Raises:
        TraceError: the file cannot be written.
    """
    file = expand_path(path, TraceError)
    rows = zip(trace.times.tolist(), trace.demands.tolist(), strict=True)
    # Where flows have the same time, the file says that they do, and not that its clock is coarse.
    tied = bool((np.diff(trace.times) == 0).any())
    header, end = (f"time,demand,{RESOLUTION_COLUMN}\n", ",0\n") if tied else ("time,demand\n", "\n")
    data = (header + "".join(f"{time!r},{demand!r}{end}" for time, demand in rows)).encode()
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        try:
            temporary.write_bytes(gzip.compress(data, mtime=0) if file.suffix == ".gz" else data)
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)
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
    if name == "sort":
        return _boolean(value, "trace sort")
    if name == "time_unit":
        if _text(value, "trace time_unit") not in TIME_UNITS:
            raise UnknownNameError("time_unit", value, TIME_UNITS)
        return value
    positive = name.endswith("_rate")
    return number(
        f"trace {name}", value, low=None if positive else 0, above=0 if positive else None, error=ScenarioError
    )


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
    if b"\n" not in data and not data.startswith(b"PAR1"):
        # Old Macs ended lines with a lone CR, and some spreadsheets still do.
        data = data.replace(b"\r", b"\n")
    return data
