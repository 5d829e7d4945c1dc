"""HAProxy's weights."""

from __future__ import annotations

#: Largest weight that HAProxy knows.
MAX_WEIGHT = 256


def percentage(weight: int, configured: int) -> int:
    """The percentage of a configured weight by which HAProxy comes to ``weight``, or to the least above it.

    HAProxy cuts off what is behind the point: ``configured * percentage // 100``.
    """
    return -(-100 * weight // configured)
