"""Limits of scenarios, and the package's checks in the words of a scenario's errors, with the value first."""

from __future__ import annotations

import math
from typing import Any

from .. import checks
from ..errors import ScenarioError

#: The simulator counts cores, workers and places in the backlog in 32 bits.
MAX_COUNT = 2**31 - 1
#: Largest time (s) and demand (core-seconds) in a trace, so that sums over it stay finite.
TRACE_LIMIT = 1e15
#: Limits within which every loop of the simulator ends: most flows per second in the mean,
MAX_RATE = 1e8
#: least mean demand that is not 0, core-seconds,
MIN_MEAN_DEMAND = 1e-15
#: most packets per flow in the mean,
MAX_PACKETS = 10_000.0
#: least mean sojourn in a modulating state, seconds,
MIN_SOJOURN = 1e-6
#: and most changes of that state, or thinned arrivals, on the way from one flow to the next: about a second's work.
MAX_CHANGES = 1e8
#: Least demand in a trace that is not 0, core-seconds: clocks of a simulation resolve no less after some weeks.
MIN_DEMAND = 1e-9


_shown = checks.shown


def _number(value: Any, name: str, *, low: float = 0.0, strict: bool = True, high: float = math.inf) -> float:
    """``value`` as a finite float above ``low`` (or equal, unless strict) and at most ``high``."""
    bound = None if low == -math.inf else low
    return checks.number(
        name,
        value,
        low=None if strict else bound,
        above=bound if strict else None,
        high=None if high == math.inf else high,
        error=ScenarioError,
    )


def _items(values: Any, name: str, kind: str = "numbers") -> tuple[Any, ...]:
    return checks.items(name, values, kind, error=ScenarioError)


def _numbers(values: Any, name: str, *, strict: bool = True, high: float = math.inf) -> tuple[float, ...]:
    return tuple(_number(x, f"{name}[{i}]", strict=strict, high=high) for i, x in enumerate(_items(values, name)))


def _integer(value: Any, name: str, *, low: int, high: int = MAX_COUNT) -> int:
    if high == MAX_COUNT:
        # A bound that nobody comes near would only be noise in the message.
        checks.whole(name, value, low=low, error=ScenarioError)
    return checks.whole(name, value, low=low, high=high, error=ScenarioError)


def _boolean(value: Any, name: str) -> bool:
    return checks.boolean(name, value, error=ScenarioError)


def _text(value: Any, name: str) -> str:
    return checks.text(name, value, error=ScenarioError)


def _instance(value: Any, kinds: Any, name: str, allowed: str) -> None:
    checks.instance(name, value, kinds, allowed, error=ScenarioError)


def _set(instance: object, **values: Any) -> None:
    """Assign normalised values on a frozen dataclass."""
    for name, value in values.items():
        object.__setattr__(instance, name, value)
