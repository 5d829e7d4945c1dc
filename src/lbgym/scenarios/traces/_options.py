"""Formats of traces, the options that each takes, and their defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TRACE_FORMATS = ("auto", "marllb", "csv", "parquet", "clf", "azure-llm")

#: CPU seconds of one iteration of MARLLB's request loop: the published mean of 3.67 million iterations takes 200 ms.
SECONDS_PER_ITERATION = 0.2 / 3.67e6
#: A request of an access log costs 5 ms and 100 ns per byte sent (10 MB/s of one core).
BASE_DEMAND = 5e-3
SECONDS_PER_BYTE = 1e-7
#: Tokens per second of one request on one lane of an accelerator: reading the prompt, and writing the answer.
PREFILL_RATE = 10_000.0
DECODE_RATE = 80.0

#: Units of numeric times: how many there are in a second.
TIME_UNITS = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}

_TOKENS = {"prefill_rate": PREFILL_RATE, "decode_rate": DECODE_RATE}
_CLOCK = {"time_unit": None, "sort": False, "clock_resolution": None}
_TABLE = {
    "time_column": "time",
    "demand_column": "demand",
    "input_tokens_column": None,
    "output_tokens_column": None,
    **_TOKENS,
    **_CLOCK,
}
#: The options each format takes besides those that every format takes, with their defaults.
FORMAT_OPTIONS: dict[str, dict[str, Any]] = {
    "marllb": {"seconds_per_iteration": SECONDS_PER_ITERATION, "sort": False, "clock_resolution": None},
    "csv": _TABLE,
    "parquet": _TABLE,
    "clf": {"base_demand": BASE_DEMAND, "seconds_per_byte": SECONDS_PER_BYTE, "clock_resolution": None},
    "azure-llm": {
        "time_column": "TIMESTAMP",
        "input_tokens_column": "ContextTokens",
        "output_tokens_column": "GeneratedTokens",
        **_TOKENS,
        **_CLOCK,
    },
}
#: Every keyword of :func:`~lbgym.scenarios.read_trace`.
TRACE_OPTIONS = (
    "format",
    "speedup",
    "scale",
    "on_error",
    "repeat",
    "random_start",
    *dict.fromkeys(name for options in FORMAT_OPTIONS.values() for name in options),
)


def required_columns(kind: str, options: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the time column and of the one or two columns that give the demand."""
    if kind == "marllb":
        return ("time", "query")
    if options.get("input_tokens_column") is not None:
        return (options["time_column"], options["input_tokens_column"], options["output_tokens_column"])
    return (options["time_column"], options["demand_column"])
