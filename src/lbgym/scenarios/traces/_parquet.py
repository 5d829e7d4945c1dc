"""Traces in Parquet."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import MissingExtraError, TraceError
from .._validation import MIN_DEMAND, TRACE_LIMIT
from ._options import required_columns
from ._rows import Rows


def read_parquet(data: bytes, file: Path, options: Mapping[str, Any]) -> Rows:
    """The rows of a Parquet file, numbered from 1."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingExtraError("pyarrow", "eval", "reading a Parquet trace") from error
    names = required_columns("parquet", options)
    columns: list[NDArray[Any]] = []
    present: list[NDArray[np.bool_]] = []
    timestamps = False
    try:
        parquet = pq.ParquetFile(pa.BufferReader(data))
        known = parquet.schema_arrow.names
        missing = [name for name in names if name not in known]
        if missing:
            found = ", ".join(known)
            raise TraceError(f"{file}: no column {missing[0]!r} in the Parquet trace; it has: {found}")
        for name in names:
            if known.count(name) > 1:
                raise TraceError(
                    f"{file}: the Parquet trace has {known.count(name)} columns {name!r}, which must be one"
                )
        table = parquet.read(columns=list(dict.fromkeys(names)))
        for name in names:
            column = table.column(name)
            present.append(column.is_valid().to_numpy())
            if name == names[0] and pa.types.is_timestamp(column.type):
                timestamps = True
                column = column.cast(pa.timestamp("ns", column.type.tz)).cast(pa.int64())
            elif name == names[0] and pa.types.is_integer(column.type):
                column = column.cast(pa.int64())
            elif pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
                column = column.cast(pa.float64(), safe=False)
            else:
                raise TraceError(f"{file}: column {name!r} of the Parquet trace must hold numbers, not {column.type}")
            columns.append(column.fill_null(0).to_numpy())
    except (pa.ArrowException, OSError) as error:
        raise TraceError(f"{file}: not a readable Parquet file: {error}") from error
    time, good = columns[0], present[0] & np.isfinite(columns[0])
    problems: dict[int, str] = {}
    for i in np.flatnonzero(~good):
        got = time[i] if present[0][i] else None
        problems[int(i)] = f"{names[0]} must be a number of at most {TRACE_LIMIT:g}, got {got}"
    for name, column, there in zip(names[1:], columns[1:], present[1:], strict=True):
        fits = there & (column >= 0) & (column <= TRACE_LIMIT)
        for i in np.flatnonzero(~fits):
            got = column[i] if there[i] else None
            problems.setdefault(int(i), f"{name} must be a number from 0 to {TRACE_LIMIT:g}, got {got}")
        good &= fits
    demands = columns[1]
    if len(names) == 3:
        demands = columns[1] / options["prefill_rate"] + columns[2] / options["decode_rate"]
    odd = good & ((demands > TRACE_LIMIT) | ((demands > 0) & (demands < MIN_DEMAND)))
    for i in np.flatnonzero(odd):
        problems[int(i)] = f"the demand must be 0 or from {MIN_DEMAND:g} to {TRACE_LIMIT:g} s, got {demands[i]:g}"
    kept = np.flatnonzero(good & ~odd)
    demands = np.asarray(demands[kept], np.float64)
    if timestamps:
        whole, rest = np.divmod(time[kept], 1_000_000_000)
        further = rest * 1e-9
    elif time.dtype == np.int64:
        whole, further = time[kept], np.zeros(len(kept))
    else:
        whole, further = np.zeros(len(kept), np.int64), time[kept]
    listed = [(i + 1, problem) for i, problem in sorted(problems.items())]
    return Rows(kept + 1, whole, further, demands, listed, timestamps)
