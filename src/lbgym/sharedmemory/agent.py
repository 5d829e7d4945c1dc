"""The agent's side of a region: :class:`AgentSide` writes actions."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import checks
from ..errors import InvalidOptionError, InvalidWeightsError, RegionBusyError, RegionError
from . import abi, seqlock, system
from .region import DAY, NS, Region, checked_weights

#: Seconds for which weights are good unless the agent says otherwise.
DEFAULT_LEASE = 5.0
_NO_INDEX = np.zeros((0, 2))


class AgentSide(Region):
    """An open region as its agent uses it."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # Scratch for the alias table.
        self._threshold = self._alias = np.empty(0, np.uint32)
        self._stack, self._share = np.empty(0, np.int64), np.empty(0)

    def lock_agent(self) -> None:
        """Become the region's agent.

        Raises:
            RegionBusyError: if it has another one.
            RegionError: if the region was attached read-only.
        """
        if self._agent:
            return
        header = self._header()
        if self.read_only:
            raise RegionError(f"region {self.name!r} was attached read-only; an agent must be allowed to write")
        if not system.try_lock(self._descriptor, abi.AGENT_LOCK):
            raise RegionBusyError(
                f"region {self.name!r} is driven by another agent (process {self.agent_pid or 'unknown'}); "
                "stop it first, there is one agent per region"
            )
        self._agent = True
        header["agent_pid"] = os.getpid()

    def unlock_agent(self) -> None:
        """Let another agent have the region; does nothing if this one is not its agent."""
        if self._agent:
            self._agent = False
            system.unlock(self._descriptor, abi.AGENT_LOCK)

    def write_action(
        self, sequence_id: int, weights: ArrayLike, lease: float = DEFAULT_LEASE, *, index: ArrayLike | None = None
    ) -> int:
        """Give the data plane weights, and their alias table, so that it can choose a server in constant time.

        The first call makes this process the region's agent.

        Args:
            sequence_id: the agent's number of this action, from 0; observations say which one they reflect.
            weights: float[n], n up to the capacity; at least 0, finite, not all 0. Further servers have safe weights.
            lease: seconds for which the weights are good: without another action the data plane then puts its safe
                weights in force. ``math.inf``: for ever.
            index: float[n, 2], each server's speed per core (above 0 where its weight is) and background load (flows
                of others, at least 0), for a data plane that dispatches by index (``takes_index``); None: weights only.

        Returns:
            The instant of writing, ns of the monotonic clock.

        Raises:
            RegionBusyError: if the region has another agent.
            InvalidWeightsError: for weights that are not as above; nothing has been written then.
            InvalidOptionError: for a sequence id, lease or index out of range, or an index where none is taken.
        """
        if not self._agent:
            self.lock_agent()
        memory = self._memory
        try:
            checked = np.asarray(weights, np.float64, order="C")
        except (TypeError, ValueError) as error:
            raise InvalidWeightsError(f"weights must be numbers, one per server, got {weights!r}") from error
        if checked.ndim != 1 or not 0 < checked.shape[0] <= self.capacity:
            raise InvalidWeightsError(
                f"weights must be 1 to {self.capacity} numbers, one per server, got shape {checked.shape}"
            )
        sequence_id = checks.whole("sequence_id", sequence_id, low=0, high=(1 << 63) - 1)
        lease = checks.number("lease", lease, above=0.0, unit="seconds", finite=False)
        parameters = _NO_INDEX if index is None else self._checked_index(index, checked)
        n = checked.shape[0]
        if n != self._threshold.shape[0]:
            self._threshold, self._alias = np.empty(n, np.uint32), np.empty(n, np.uint32)
            self._stack, self._share = np.empty(n, np.int64), np.empty(n)
        now = time.monotonic_ns()
        written = seqlock.write_action(
            memory,
            self._actions,
            self._action_sections,
            checked,
            parameters,
            sequence_id,
            0 if lease > DAY * 36_500 else max(1, int(lease * NS)),
            now,
            self._threshold,
            self._alias,
            self._stack,
            self._share,
        )
        if written < 0:
            checked_weights("weights", checked)
        if written == 1:
            self._action_futex.wake()
        return now

    def _checked_index(self, index: ArrayLike, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        if not self.takes_index:
            raise InvalidOptionError(f"the data plane of region {self.name!r} does not dispatch by index: give weights")
        try:
            checked = np.array(index, np.float64, order="C")
        except (TypeError, ValueError) as error:
            raise InvalidOptionError(f"index must be numbers, two per server, got {index!r}") from error
        if checked.shape != (len(weights), 2):
            raise InvalidOptionError(f"index must have shape ({len(weights)}, 2), got {checked.shape}")
        if not np.isfinite(checked).all() or (checked < 0.0).any() or ((weights > 0.0) & (checked[:, 0] == 0.0)).any():
            raise InvalidOptionError(
                "index must be finite: speeds of at least 0, and above 0 where the weight is, and background loads of "
                f"at least 0; got {index!r}"
            )
        return checked
