"""Read recorded flows: MARLLB, CSV, Parquet, access logs and LLM request traces, gzip-compressed or not."""

from __future__ import annotations

from ._options import (
    BASE_DEMAND,
    DECODE_RATE,
    FORMAT_OPTIONS,
    PREFILL_RATE,
    SECONDS_PER_BYTE,
    SECONDS_PER_ITERATION,
    TRACE_FORMATS,
    TRACE_OPTIONS,
)
from ._read import expand_path, read_trace, write_trace

__all__ = [
    "BASE_DEMAND",
    "DECODE_RATE",
    "FORMAT_OPTIONS",
    "PREFILL_RATE",
    "SECONDS_PER_BYTE",
    "SECONDS_PER_ITERATION",
    "TRACE_FORMATS",
    "TRACE_OPTIONS",
    "expand_path",
    "read_trace",
    "write_trace",
]
