"""Flows on their way from a file to a trace."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .._validation import MIN_DEMAND, TRACE_LIMIT


@dataclass
class Rows:
    """The well-formed rows of a file, and what is wrong with the others.

    Attributes:
        numbers: int64[n], line (or row) of the file, from 1.
        whole, further: int64[n] and float64[n], times in the file's unit: their sum. They are apart because a float64
            of a present-day epoch resolves only 0.24 microseconds.
        demands: float64[n], core-seconds.
        problems: (line, problem) of each malformed row.
        timestamps: times are calendar dates, not numbers.
    """

    numbers: NDArray[np.int64]
    whole: NDArray[np.int64]
    further: NDArray[np.float64]
    demands: NDArray[np.float64]
    problems: list[tuple[int, str]] = field(default_factory=list)
    timestamps: bool = False

    def take(self, where: NDArray[np.int64]) -> Rows:
        """The rows at these places, in this order."""
        return Rows(
            self.numbers[where],
            self.whole[where],
            self.further[where],
            self.demands[where],
            self.problems,
            self.timestamps,
        )


def check_demand(demand: float, name: str = "the demand") -> float:
    """A demand that the simulator can serve.

    Raises:
        ValueError: if it is neither 0 nor from ``MIN_DEMAND`` to ``TRACE_LIMIT``.
    """
    if 0 < demand < MIN_DEMAND:
        raise ValueError(f"{name} must be 0 or at least {MIN_DEMAND:g} core-seconds, got {demand:g}")
    if demand > TRACE_LIMIT:
        raise ValueError(f"{name} must be at most {TRACE_LIMIT:g} core-seconds, got {demand:g}")
    return demand
