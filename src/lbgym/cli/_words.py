"""Words for the parts of a region, the same in every command."""

from __future__ import annotations

import math
import time

_NS = 1_000_000_000
#: Styles of the states of producers and agents.
STATE_STYLES = {"alive": "green", "dead": "bold red", "closed": "bold yellow", "none": "dim"}

#: Styles of the states of servers.
SERVER_STYLES = {"up": "green", "draining": "yellow", "down": "bold red", "unknown": "dim"}


def lease(whole: float, left: float) -> str:
    """The time that weights are still in force, in words."""
    if math.isinf(whole):
        return "good for ever"
    return f"lease {left:.1f} of {whole:.3g} s left" if left > 0.0 else f"lease of {whole:.3g} s over"


def clock(rate: float) -> str:
    """The rate of the data plane's clock, unless it is that of all clocks."""
    return "" if rate == 1.0 else f" x{rate:g}"


def state(name: str) -> str:
    """A state in its colour, as Rich markup."""
    return f"[{STATE_STYLES[name]}]{name}[/]"


def since(instant: int) -> float:
    """Seconds since an instant of CLOCK_MONOTONIC, ns; 0 for one that is ahead."""
    return max(0, time.monotonic_ns() - instant) / _NS
