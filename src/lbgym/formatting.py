"""Numbers as short text, for terminals and pictures."""

from __future__ import annotations

import math

#: Characters that :func:`bar` draws with, by eighths filled.
BLOCKS = " ▏▎▍▌▋▊▉█"


def bar(share: float, width: int, unicode: bool = True) -> str:
    """``width`` characters, filled from the left to ``share`` (0..1)."""
    share = min(max(share, 0.0), 1.0)
    if not unicode:
        return ("#" * round(share * width)).ljust(width)
    full, part = divmod(round(share * width * 8), 8)
    return ("█" * full + (BLOCKS[part] if part else "")).ljust(width)


def short(value: float) -> str:
    """A non-negative number in at most 7 characters."""
    if value == 0 or 1e-3 <= value < 1e5:
        return f"{value:.0f}" if float(value).is_integer() else f"{value:.3g}" if value < 1000 else f"{value:.0f}"
    return f"{value:.1e}"


def seconds(value: float) -> str:
    """A duration in at most 9 characters."""
    if value <= 0:
        return "-"
    if value < 0.9995:
        return f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} us"
    if value < 999.5:
        return f"{value:.3g} s"
    return f"{value:.0f} s" if value < 999_999 else f"{value:.1e} s"


def age(value: float) -> str:
    """A duration in a few characters, in the unit that fits; an infinite one is "never"."""
    if not math.isfinite(value):
        return "never"
    if value < 1e-3:
        return f"{value * 1e3:.2f} ms"
    if value < 600.0:
        return seconds(value)
    unit, length = ("min", 60.0) if value < 6000.0 else ("h", 3600.0) if value < 360_000.0 else ("d", 86_400.0)
    return f"{value / length:.3g} {unit}"


def shortened(text: str, width: int) -> str:
    """Text in at most ``width`` characters: without its middle if it is longer, as names differ at either end."""
    if len(text) <= width:
        return text
    tail = (width - 1) // 2
    return f"{text[: width - 1 - tail]}…{text[len(text) - tail :]}"
