"""Structured logs: every record is one line, a JSON object or text."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import numpy as np

LOG_FORMATS = ("json", "text")
LOG_LEVELS = ("debug", "info", "warning", "error")

logger = logging.getLogger("lbgym.controller")


def log_event(level: int, event: str, region: str, message: str = "", **fields: Any) -> None:
    """Log an event.

    Args:
        level: of the logging module.
        event: the kind of event, one word.
        region: name of the region.
        message: a sentence for people; empty where the fields are enough.
        fields: numbers, texts, arrays.
    """
    if logger.isEnabledFor(level):
        logger.log(level, "%s", message or event, extra={"event": event, "region": region, "fields": fields})


class _Formatter(logging.Formatter):
    """One line per record; records without an event, such as a library's warnings, get the event "log"."""

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        event = getattr(record, "event", "log")
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")[:-6] + "Z",
            "level": record.levelname.lower(),
            "event": event,
        }
        if region := getattr(record, "region", None):
            entry["region"] = region
        if text != event:
            entry["message"] = text
        entry |= getattr(record, "fields", {})
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return self._line({key: _plain(value) for key, value in entry.items()})

    def _line(self, entry: dict[str, Any]) -> str:
        raise NotImplementedError


class JsonFormatter(_Formatter):
    """A JSON object: time, level, event, region, message, and the fields of the event."""

    def _line(self, entry: dict[str, Any]) -> str:
        return json.dumps(entry, allow_nan=False)


class TextFormatter(_Formatter):
    """Time, level, event and message, then the fields as ``key=value``."""

    def _line(self, entry: dict[str, Any]) -> str:
        traceback = entry.pop("traceback", None)
        head = f"{entry.pop('time')} {entry.pop('level'):7} {entry.pop('event')}"
        if "message" in entry:
            head += f": {entry.pop('message')}"
        line = " ".join([head, *(f"{key}={json.dumps(value)}" for key, value in entry.items())])
        return line if traceback is None else f"{line}\n{traceback}"


def _plain(value: Any) -> Any:
    """Convert to JSON's types: arrays to lists, and numbers that are not finite to null."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    elif isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.9g}") if math.isfinite(value) else None
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


@contextmanager
def logging_to_stderr(log_format: str, log_level: str) -> Iterator[None]:
    """Send lbgym's logs and Python's warnings to standard error in one format."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    loggers = [logging.getLogger(name) for name in ("lbgym", "py.warnings")]
    before = [(each.handlers[:], each.level, each.propagate) for each in loggers]
    for each in loggers:
        each.handlers[:] = [handler]
        each.setLevel(log_level.upper())
        each.propagate = False
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        for each, (handlers, level, propagate) in zip(loggers, before, strict=True):
            each.handlers[:] = handlers
            each.setLevel(level)
            each.propagate = propagate
