"""Checks of values that users give: one rule per kind, the same words everywhere.

NumPy's scalars are as good as Python's own; booleans are no numbers, and complex numbers are no real ones. Every check
returns the value as a plain Python object.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from .errors import InvalidOptionError, UnknownNameError

__all__ = ["choice", "number", "seconds", "whole"]


def _limits(low: float | None, high: float | None, above: float | None, unit: str) -> str:
    unit = f" {unit}" if unit else ""
    if above is not None:
        return f" above {above:g}{unit}" + (f", up to {high:g}" if high is not None else "")
    if low is not None and high is not None:
        return f" from {low:g} to {high:g}{unit}"
    if low is not None:
        return f" of at least {low:g}{unit}"
    if high is not None:
        return f" of at most {high:g}{unit}"
    return unit and f" of{unit}"


def whole(
    name: str, value: Any, *, low: int | None = 1, high: int | None = None, error: type[Exception] = InvalidOptionError
) -> int:
    """A whole number within ``low`` and ``high``, both included; None: no bound.

    Raises:
        InvalidOptionError: or ``error``, with the name, the bounds and the value.
    """
    if (
        isinstance(value, (bool, np.bool_))
        or not isinstance(value, (int, np.integer))
        or (low is not None and value < low)
        or (high is not None and value > high)
    ):
        raise error(f"{name} must be a whole number{_limits(low, high, None, '')}, got {value!r}")
    return int(value)


def number(
    name: str,
    value: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    unit: str = "",
    finite: bool = True,
    error: type[Exception] = InvalidOptionError,
) -> float:
    """A real number, finite unless said otherwise, within ``low`` and ``high``, both included, or above ``above``.

    Raises:
        InvalidOptionError: or ``error``, with the name, the bounds, the unit and the value.
    """
    if (
        isinstance(value, (bool, np.bool_))
        or not isinstance(value, (int, float, np.integer, np.floating))
        or math.isnan(value)
        or (finite and math.isinf(value))
        or (low is not None and value < low)
        or (high is not None and value > high)
        or (above is not None and value <= above)
    ):
        kind = "finite number" if finite else "number"
        raise error(f"{name} must be a {kind}{_limits(low, high, above, unit)}, got {value!r}")
    return float(value)


def seconds(
    name: str,
    value: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    error: type[Exception] = InvalidOptionError,
) -> float:
    """A duration above 0 seconds, or of at least ``low``; raises as :func:`number`."""
    return number(name, value, low=low, high=high, above=0.0 if low is None else None, unit="seconds", error=error)


def choice(kind: str, value: Any, known: Iterable[str], *, where: str = "") -> str:
    """One of the ``known`` names.

    Raises:
        UnknownNameError: that names the nearest known one.
    """
    names = tuple(known)
    if not isinstance(value, str) or value not in names:
        raise UnknownNameError(kind, value, names, where=where)
    return value
