"""Reservoir sampling in plain Python and NumPy: the readable twin of ``lbgym.features.reservoir_kernel``."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .. import checks
from .columns import STATISTICS

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
ALGORITHMS = ("overwrite", "uniform")


def _mix64(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


class ReservoirSampler:
    """A reservoir of (value, time) samples and the five statistics drawn from it.

    The first ``capacity`` samples fill the slots. After that "overwrite" puts each sample in a uniformly random slot,
    so that a sample survives n further ones with probability (1 - 1/capacity)**n: exponential forgetting, as in the
    MARLLB data plane (arXiv 2201.11727, Algorithm 2). "uniform" is Vitter's Algorithm R (1985): every sample ever
    offered is in the reservoir with equal probability, so it never forgets.

    Statistics over the filled slots: mean, population standard deviation and 90th percentile (linear interpolation);
    and mean and 90th percentile (inverted distribution function) under weights ``decay ** age`` divided by their sum.
    Dividing by the sum makes ages relative: the statistics of an idle server stay as they are. An empty reservoir
    gives 0 everywhere.

    Args:
        capacity: slots, 1 to 32,767.
        seed: of the random choices; None: from the operating system.
        probability: chance that an offered sample is taken, above 0 and at most 1.
        algorithm: "overwrite" or "uniform".
        decay: weight per second of age, above 0 and at most 1.

    Raises:
        ValueError: for an argument outside its range.
    """

    def __init__(
        self,
        capacity: int = 128,
        seed: int | None = None,
        *,
        probability: float = 1.0,
        algorithm: Literal["overwrite", "uniform"] = "overwrite",
        decay: float = 0.9,
    ) -> None:
        self.capacity = checks.whole("ReservoirSampler capacity", capacity, high=32_767)
        self.probability = checks.number("ReservoirSampler probability", probability, above=0.0, high=1.0)
        self.algorithm = checks.choice("sampling algorithm", algorithm, ALGORITHMS)
        self.decay = checks.number("ReservoirSampler decay", decay, above=0.0, high=1.0)
        self._seed = secrets.randbits(64) if seed is None else int(seed) & _MASK
        self.reset()

    def reset(self) -> None:
        """Forget every sample and begin the random sequence again."""
        self._values = np.zeros(self.capacity)
        self._times = np.zeros(self.capacity)
        self._filled = 0
        self._accepted = 0
        self._state = self._seed

    def __len__(self) -> int:
        """Filled slots."""
        return self._filled

    @property
    def values(self) -> NDArray[np.float64]:
        """The samples held, float64[len(self)], in slot order (a copy)."""
        return self._values[: self._filled].copy()

    @property
    def times(self) -> NDArray[np.float64]:
        """The time of each sample in ``values``, seconds (a copy)."""
        return self._times[: self._filled].copy()

    def _next(self) -> int:
        self._state = (self._state + _GOLDEN) & _MASK
        return _mix64(self._state)

    def add(self, value: float, timestamp: float | None = None) -> None:
        """Offer a sample.

        Args:
            value: seconds, at least 0.
            timestamp: seconds, on any clock that does not go back; None: now, on ``time.monotonic()``. Do not mix the
                two: only differences between the times of samples have a meaning.

        Raises:
            ValueError: if either is not finite or the value is negative; the reservoir is left as it was.
        """
        value = checks.number("a sample", value, low=0.0)
        timestamp = time.monotonic() if timestamp is None else checks.number("a timestamp", timestamp)
        if self.probability < 1.0 and ((self._next() >> 11) + 1) * 2.0**-53 > self.probability:
            return
        self._accepted += 1
        if self._filled < self.capacity:
            slot = self._filled
            self._filled += 1
        elif self.algorithm == "overwrite":
            slot = ((self._next() >> 32) * self.capacity) >> 32
        else:
            slot = self._next() % self._accepted
            if slot >= self.capacity:
                return
        self._values[slot] = value
        self._times[slot] = timestamp

    def get_features(self, names: Iterable[str] = STATISTICS) -> dict[str, float]:
        """The statistics asked for, by name: mean, p90, std, mean_decay, p90_decay (seconds).

        Raises:
            UnknownNameError: for a statistic that does not exist.
        """
        wanted = tuple(checks.choice("reservoir statistic", name, STATISTICS) for name in names)
        if self._filled == 0:
            return dict.fromkeys(wanted, 0.0)
        values, times = self._values[: self._filled], self._times[: self._filled]
        weights = self.decay ** (times.max() - times)
        order = np.argsort(values)
        below = np.cumsum(weights[order])
        # The slack decides exact ties (equal weights) for the lower value, as exact arithmetic would.
        first = int(np.argmax(below >= 0.9 * below[-1] * (1.0 - 1e-12)))
        features = {
            "mean": values.mean(),
            "p90": np.percentile(values, 90),
            "std": values.std(),
            "mean_decay": np.average(values, weights=weights),
            "p90_decay": values[order[first]],
        }
        return {name: float(features[name]) for name in wanted}

    def get_feature_vector(self) -> NDArray[np.float32]:
        """float32[5]: mean, p90, std, mean_decay, p90_decay."""
        return np.array(list(self.get_features().values()), dtype=np.float32)
