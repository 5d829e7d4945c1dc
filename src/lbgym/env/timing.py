"""Delays until the weights of several balancers come into force: :class:`ActionTiming`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checks import choice, number
from ..errors import InvalidOptionError

#: Values of ``action_offsets`` by name.
OFFSETS = ("even", "random")

_Float = NDArray[np.float64]


class ActionTiming:
    """Delay from an observation until the weights that answer it come into force.

    Args:
        offsets, delay: as the environment takes them.
        num_envs: R.
        num_balancers: m.
        interval: seconds per step.

    Attributes:
        asynchronous: whether that is ever anything but 0.
    """

    def __init__(
        self,
        offsets: float | Sequence[float] | str,
        delay: float | Sequence[float] | Mapping[str, float],
        num_envs: int,
        num_balancers: int,
        interval: float,
    ) -> None:
        self._shape = num_envs, num_balancers
        self._interval = interval
        self._random = False
        if isinstance(offsets, str):
            choice("value of action_offsets", offsets, OFFSETS)
            self._random = offsets == "random"
            row = np.arange(num_balancers) * (interval / num_balancers) * (not self._random)
        else:
            row = _each("action_offsets", offsets, num_balancers)
            if not row.max() < interval:
                raise InvalidOptionError(
                    f"action_offsets must be below the step_interval of {interval:g} s, got {offsets!r}; "
                    "an action_delay may be longer"
                )
        self._offsets = np.tile(row, (num_envs, 1))
        if isinstance(delay, Mapping):
            if set(delay) != {"low", "high"}:
                raise InvalidOptionError(f'action_delay takes the keys "low" and "high", got {dict(delay)!r}')
            self._low, self._high = (_each(f"action_delay {key}", delay[key], 1)[0] for key in ("low", "high"))
            if self._low > self._high:
                raise InvalidOptionError(f"action_delay low must be at most high, got {dict(delay)!r}")
            self._delay = np.full(num_balancers, self._low)
        else:
            self._delay = _each("action_delay", delay, num_balancers)
            self._low = self._high = 0.0
        self._drawn = self._low < self._high
        self.asynchronous = bool(self._random or self._drawn or self._offsets.any() or self._delay.any())
        self._generators: list[np.random.Generator | None] = [None] * num_envs

    def begin(self, mask: NDArray[np.bool_], seeds: Sequence[int]) -> None:
        """Begin episodes of the masked replicas, with the seeds of their flows."""
        if not (self._random or self._drawn):
            return
        for i in np.flatnonzero(mask).tolist():
            # Other words than the simulator's, so that timing and flows are independent.
            generator = self._generators[i] = np.random.default_rng([seeds[i], 0xA5])
            if self._random:
                self._offsets[i] = generator.uniform(0.0, self._interval, self._shape[1])

    def delays(self, reset: NDArray[np.bool_] | None = None) -> _Float:
        """Float64[R, m] seconds for this step; nothing is drawn for the replicas in ``reset``."""
        delays = self._offsets + self._delay
        if self._drawn:
            for i in range(len(delays)) if reset is None else np.flatnonzero(~reset).tolist():
                generator = self._generators[i]
                assert generator is not None
                delays[i] = self._offsets[i] + generator.uniform(self._low, self._high, self._shape[1])
        return delays


def _each(name: str, value: Any, count: int) -> _Float:
    """Float64[count] seconds from a number or one per balancer."""
    several = isinstance(value, (Sequence, np.ndarray)) and not isinstance(value, str) and np.ndim(value) == 1
    if several and len(value) != count:
        raise InvalidOptionError(
            f"{name} must be a number of seconds or {count} of them, one per balancer, got {value!r}"
        )
    each = list(value) if several else [value.item() if isinstance(value, np.ndarray) and value.ndim == 0 else value]
    checked = [number(name, one, low=0.0, unit="seconds") for one in each]
    return np.broadcast_to(np.array(checked), count).copy()
