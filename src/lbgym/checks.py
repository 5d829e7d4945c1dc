"""Checks of values that users give: one rule per kind, the same words everywhere.

NumPy's scalars are as good as Python's own; booleans are no numbers, and complex numbers are no real ones. Every check
returns the value as a plain Python object.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np

from .errors import InvalidOptionError, UnknownNameError

__all__ = ["boolean", "choice", "host", "instance", "items", "number", "seconds", "shown", "text", "whole"]


def shown(value: Any) -> str:
    """``repr`` for an error message: short, and safe for integers that Python refuses to print."""
    try:
        text = repr(value)
    except ValueError:
        return f"{type(value).__name__} of too many digits to print"
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"


def _bound(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def _limits(low: float | None, high: float | None, above: float | None, unit: str) -> str:
    unit = f" {unit}" if unit else ""
    if above is not None:
        return f" above {_bound(above)}{unit}" + (f" and at most {_bound(high)}" if high is not None else "")
    if low is not None and high is not None:
        return f" from {_bound(low)} to {_bound(high)}{unit}"
    if low is not None:
        return f" of at least {_bound(low)}{unit}"
    if high is not None:
        return f" of at most {_bound(high)}{unit}"
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
        raise error(f"{name} must be a whole number{_limits(low, high, None, '')}, got {shown(value)}")
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
    found = math.nan
    if isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool):
        # A whole number may be too large for a float.
        with suppress(OverflowError):
            found = float(value)
    if (
        math.isnan(found)
        or (finite and math.isinf(found))
        or (low is not None and found < low)
        or (high is not None and found > high)
        or (above is not None and found <= above)
    ):
        kind = "finite number" if finite else "number"
        raise error(f"{name} must be a {kind}{_limits(low, high, above, unit)}, got {shown(value)}")
    return found


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


def boolean(name: str, value: Any, *, error: type[Exception] = InvalidOptionError) -> bool:
    """True or false.

    Raises:
        InvalidOptionError: or ``error``, with the name and the value.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise error(f"{name} must be true or false, got {shown(value)}")
    return bool(value)


def text(name: str, value: Any, *, error: type[Exception] = InvalidOptionError) -> str:
    """A string; raises as :func:`boolean`."""
    if not isinstance(value, str):
        raise error(f"{name} must be text, got {shown(value)}")
    return value


def host(name: str, value: Any, *, error: type[Exception] = InvalidOptionError) -> str:
    """A host name that can be looked up, or an IP address; raises as :func:`boolean`."""
    good = isinstance(value, str) and value.isprintable()
    try:
        if good:
            # As sockets do it, which raise this or that where it fails.
            value.encode("idna")
    except UnicodeError:
        good = False
    if not good:
        raise error(
            f"{name} must be an IP address or a host name, whose parts between dots have 1 to 63 characters, "
            f"got {shown(value)}"
        )
    return str(value)


def items(
    name: str, values: Any, kind: str = "numbers", *, error: type[Exception] = InvalidOptionError
) -> tuple[Any, ...]:
    """The items of a list, or of anything else that holds some, but for text and mappings; raises as :func:`boolean`.

    Args:
        name: of the option.
        values: the list.
        kind: what it holds, for the message.
        error: the class of the error.
    """
    each = None
    if isinstance(values, Iterable) and not isinstance(values, (str, bytes, Mapping)):
        # A NumPy array without axes is an Iterable and has no items.
        with suppress(TypeError):
            each = iter(values)
    if each is None:
        raise error(f"{name} must be a list of {kind}, got {shown(values)}")
    return tuple(each)


def instance(name: str, value: Any, kinds: Any, allowed: str, *, error: type[Exception] = InvalidOptionError) -> None:
    """Refuse what is not of one of some classes; raises as :func:`boolean`.

    Args:
        name: of the option.
        value: what was given.
        kinds: a class, a tuple or a union of them.
        allowed: those classes in words.
        error: the class of the error.
    """
    if not isinstance(value, kinds):
        raise error(f"{name} must be {allowed}, got {shown(value)}")


def choice(kind: str, value: Any, known: Iterable[str], *, where: str = "") -> str:
    """One of the ``known`` names.

    Raises:
        UnknownNameError: that names the nearest known one.
    """
    names = tuple(known)
    if not isinstance(value, str) or value not in names:
        raise UnknownNameError(kind, value, names, where=where)
    return value
