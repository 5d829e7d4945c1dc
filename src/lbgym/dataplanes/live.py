"""A real data plane behind shared memory, in real time."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import checks
from ..errors import (
    DataPlaneTimeout,
    InvalidOptionError,
    InvalidWeightsError,
    LiveCopyError,
    RegionError,
    RegionFormatError,
    RegionNotFoundError,
)
from ..sharedmemory import DEFAULT_LEASE, ObservationBuffer, SharedMemoryRegion, seqlock
from ..snapshot import DEFAULT_STEP_INTERVAL, Snapshot

logger = logging.getLogger("lbgym")

_NS = 1_000_000_000
#: Longest sleep before another look at whether the producer lives, seconds.
_LOOK = 0.1
#: An observation counts as an interval newer if no more than this part of a publication is missing: timers jitter.
_SLACK = 0.25


class SharedMemoryDataPlane:
    """The data plane that publishes in a region; as long as this exists, its agent.

    :class:`~lbgym.dataplanes.LiveDataPlanes` makes one or several of them a port for environments.

    A step writes the weights and then waits for the first observation taken at or after the step's deadline. Deadlines
    lie on a grid of whole intervals on the data plane's clock, so a late observation does not make the next one later.
    An agent that calls ``step`` after its deadline skips the deadlines that have passed, and ``info`` says so.

    :meth:`write` and :meth:`wait` are the two halves for a caller that may act without waiting, or wait without acting.

    ``info`` after each reset, wait and step:

    * ``applied_sequence_id``: int, the sequence id of the action that was in force when the observation was taken, -1
      before the first; ``action_sequence_id``: int, that of the action this step wrote, -1 after a reset.
    * ``action_delay``: float, seconds on the data plane's clock from the writing of this step's action to when the data
      plane put it in force; NaN if the observation does not reflect it yet.
    * ``safe_weights``: bool, whether the safe weights were in force instead, as after the end of a lease.
    * ``missed_observations``: int, deadlines that passed without an observation of their own.
    * ``overrun``: float, seconds (real time) by which ``step`` was called after its deadline; 0 if in time.
    * ``producer_restarted``: bool, whether another producer has taken over since the last observation.
    * ``clock_jumped``: bool, whether the data plane's clock or sequence jumped, so that a new grid of deadlines began.
    * ``completed``, ``rejected``: int, flows since the last observation (rejected: or failed, or unrouted);
      ``fct_mean``: float, seconds, of those whose FCT the data plane knows; 0 if there are none.
    * ``weights_in_force``: float64[N], as the data plane states them.

    Args:
        name: of the region.
        interval: seconds of the data plane's clock per step.
        timeout: seconds (real time) to wait for a region, and for an observation after its deadline.
        num_servers: N, at least as many as the data plane has now, so that others can join; None: as many as it has.
        lease: seconds (real time) that weights stay good without another step.
        read_only: only observe: take no lock and write nothing, so that another agent can drive the region.

    Attributes:
        grows: whether servers that join are observed and given weights, too.

    Raises:
        RegionNotFoundError: without a live producer in time.
        RegionBusyError: if another agent drives the region.
        DataPlaneTimeout: if the producer publishes nothing in time.
        InvalidOptionError: for a value out of its range.
    """

    def __init__(
        self,
        name: str,
        *,
        interval: float = DEFAULT_STEP_INTERVAL,
        timeout: float = 2.0,
        num_servers: int | None = None,
        lease: float = DEFAULT_LEASE,
        read_only: bool = False,
    ) -> None:
        self.name, self.read_only, self.grows = name, read_only, False
        self.interval, self.timeout = checks.seconds("interval", interval), checks.seconds("timeout", timeout)
        self.lease = math.inf if lease == math.inf else checks.seconds("lease", lease)
        self._interval = round(self.interval * _NS)
        self.info: dict[str, Any] = {}
        self._action_id = self._written_at = self._called = self._deadline = 0
        self._weights: NDArray[np.float64] | None = None
        self._index: NDArray[np.float64] | None = None
        self._restarted = self._jumped = self._warned = False
        seqlock.warm_up()
        self._adopt(self._attach(self.timeout))
        try:
            self._await_first()
            known = self._buffer.num_servers
            if num_servers is not None and num_servers < known:
                raise InvalidOptionError(
                    f"num_servers={num_servers}, but the data plane of region {name!r} has {known} servers"
                )
            self.num_servers = known if num_servers is None else num_servers
            if self.num_servers > self._region.capacity:
                raise InvalidOptionError(
                    f"num_servers={num_servers}, but region {name!r} has room for {self._region.capacity}"
                )
        except BaseException:
            self._region.close()
            raise

    @property
    def region(self) -> SharedMemoryRegion:
        """The region it is attached to now."""
        return self._region

    @property
    def published_at(self) -> int:
        """Time of the last observation's publication, ns of the monotonic clock."""
        return self._buffer.published_at

    @property
    def written_at(self) -> int:
        """Time of the last action, ns of the monotonic clock."""
        return self._written_at

    @property
    def known_servers(self) -> int:
        """Servers that the data plane had in the last observation."""
        return self._buffer.num_servers

    @property
    def states(self) -> NDArray[np.uint8]:
        """Of :class:`~lbgym.sharedmemory.ServerState`, uint8[known_servers], in the last observation."""
        return self._buffer.states[: self._buffer.num_servers]

    @property
    def safe_weights(self) -> NDArray[np.float64]:
        """The data plane's safe weights in the last observation, float64[num_servers]; 1 for servers not known yet."""
        weights = np.ones(self.num_servers)
        count = min(self._buffer.num_servers, self.num_servers)
        weights[:count] = self._buffer.safe_weights[:count]
        return weights

    @property
    def has_ground_truth(self) -> bool:
        """True if the last observation had CPU use, memory use and busy workers."""
        return self._buffer.has_ground_truth

    def reset(self, *, after: int | None = None) -> Snapshot:
        """Begin an episode with the next observation. The data plane goes on as it is: no flow ends, no weight changes.

        Args:
            after: sequence id of the last observation to skip; None: the newest.

        Raises:
            DataPlaneTimeout: if nothing is published in time.
            RegionFormatError: if the data plane publishes what is no observation.
        """
        wait = self._period / _NS + self.timeout
        if not self._next(self._region.latest if after is None else after, time.monotonic() + wait):
            raise self._silence(wait)
        self._deadline = self._buffer.timestamp_ns
        return self._observed(-1, 0, 0)

    def step(self, weights: NDArray[np.float64], *, index: NDArray[np.float64] | None = None) -> Snapshot:
        """Write float[N] weights, wait for the observation one interval on.

        Args:
            weights: float[N].
            index: float[N, 2], each server's speed per core and background load, for a data plane that dispatches by
                index; None: weights only.

        Raises:
            InvalidWeightsError: for weights that are negative, not finite or all 0; nothing has happened then.
            InvalidOptionError: for an index that is out of range, or that the data plane does not take; nothing has
                happened then.
            DataPlaneTimeout: if there is no such observation in time; the next step tries anew.
            RegionFormatError: if the data plane publishes what is no observation.
        """
        self.begin_step(weights, index=index)
        return self.end_step()

    def begin_step(self, weights: NDArray[np.float64], *, index: NDArray[np.float64] | None = None) -> None:
        """The first half of :meth:`step`: write the weights. Whoever has several data planes writes to all first.

        Raises:
            InvalidWeightsError, InvalidOptionError: as :meth:`step`.
        """
        weights = np.array(weights, np.float64)
        self.write(weights, index=index)
        self._weights = weights
        self._index = None if index is None else np.array(index, np.float64)
        self._called = time.monotonic_ns()

    def write(self, weights: NDArray[np.float64], *, index: NDArray[np.float64] | None = None) -> None:
        """Write float[N] weights, and perhaps an index as :meth:`step` takes it, now, and wait for nothing.

        Raises:
            InvalidWeightsError, InvalidOptionError: as :meth:`step`.
        """
        if np.shape(weights) != (self.num_servers,):
            raise InvalidWeightsError(f"weights must have shape ({self.num_servers},), got {np.shape(weights)}")
        self._write(weights, self._action_id + 1, index)
        self._action_id += 1

    def wait(self) -> Snapshot:
        """The next observation. No weights are written meanwhile, not even for a producer that takes over.

        Raises:
            DataPlaneTimeout, RegionFormatError: as :meth:`reset`.
        """
        self._weights = None
        return self.reset()

    def last(self) -> Snapshot:
        """The last observation once more."""
        return self._buffer.snapshot(self.num_servers)

    def end_step(self) -> Snapshot:
        """The second half of :meth:`step`: wait for the observation.

        Raises:
            DataPlaneTimeout, RegionFormatError: as :meth:`step`.
        """
        called = self._called
        missed = late = 0
        deadline = self._deadline + self._interval
        if self._new_grid:
            # The step before saw a new producer, or a jump, and then nothing.
            limit = called
        else:
            late = max(0, called - self._instant(deadline))
            if late > 0:
                missed = int(late * self._region.clock_rate) // self._interval + 1
                deadline += missed * self._interval
            limit = max(called, self._instant(deadline))
        self._wait_for(deadline, limit / _NS + self.timeout)
        if self._new_grid:
            self._deadline = self._buffer.timestamp_ns
            missed = 0
        else:
            skipped = max(0, self._buffer.timestamp_ns + self._slack - deadline) // self._interval
            missed += skipped
            self._deadline = deadline + skipped * self._interval
        return self._observed(self._action_id, missed, late)

    def close(self) -> None:
        """Let another agent have the region; the data plane keeps the last weights until their lease is over."""
        self._region.close()

    def __reduce__(self) -> Any:
        raise LiveCopyError(
            f"the live data plane of region {self.name!r} cannot be copied or pickled: its traffic has no state to "
            "copy, and a region has one agent; make another environment on another region, or simulate"
        )

    def withdraw(self) -> None:
        """Give the weights up before their lease is over: the data plane puts its safe ones in force at once."""
        if self.read_only:
            return
        self._action_id += 1
        self._region.write_action(
            sequence_id=self._action_id, weights=np.ones(min(self.num_servers, self._region.capacity)), lease=1e-9
        )

    # Waiting

    @property
    def _new_grid(self) -> bool:
        """True after a restart or jump since the last observation returned."""
        return self._restarted or self._jumped

    def _wait_for(self, deadline: int, limit: float) -> None:
        """Until the buffer holds an observation of ``deadline`` (data plane's clock) or later, or of another grid."""
        enough = deadline - self._slack
        while True:
            # Publications well before the deadline need not wake us.
            early = 0.0
            if not self._new_grid:
                early = (self._instant(deadline) - self._period - time.monotonic_ns()) / _NS
            if early > 0.0:
                time.sleep(min(early, _LOOK))
                if early > _LOOK and self._region.producer_alive:
                    continue
            if not self._next(self._buffer.sequence_id, limit):
                raise self._silence(self.timeout)
            if self._new_grid or self._buffer.timestamp_ns >= enough:
                return

    def _next(self, after: int, limit: float) -> bool:
        """Read the next observation into the buffer; false if there is none by ``limit`` (monotonic clock, seconds)."""
        while True:
            region, buffer = self._region, self._buffer
            left = limit - time.monotonic()
            if region.wait_observation(after, min(max(left, 0.0), _LOOK)):
                sequence, timestamp, published = buffer.sequence_id, buffer.timestamp_ns, buffer.published_at
                if region.read_into(buffer):
                    self._check_clock(sequence, timestamp, published)
                    return True
            if left <= 0.0:
                return False
            if not region.producer_alive and self._follow():
                after = 0

    def _follow(self) -> bool:
        """Attach to the region that has taken the name since the producer went; false if there is none."""
        try:
            region = self._attach(0.0)
        except (RegionNotFoundError, RegionFormatError):
            time.sleep(_LOOK / 10)
            return False
        before = self._region
        try:
            self._adopt(region)
            if self._weights is not None:
                # A new producer may take no index.
                self._write(self._weights, self._action_id, self._index if region.takes_index else None)
        except BaseException:
            region.close()
            raise
        before.close()
        self._restarted = True
        logger.warning(
            "region %r has a new producer (process %d, %s); following it", self.name, region.producer_pid, region.driver
        )
        return True

    def _attach(self, timeout: float) -> SharedMemoryRegion:
        """The region of this name with a live producer, as its agent unless ``read_only``."""
        region = SharedMemoryRegion.attach(self.name, timeout=timeout, live=True, read_only=self.read_only)
        try:
            if not self.read_only:
                region.lock_agent()
        except BaseException:
            region.close()
            raise
        return region

    def _adopt(self, region: SharedMemoryRegion) -> None:
        """Continue with another region."""
        # Continue the previous agent's ids, so that observations show whose action is in force.
        with contextlib.suppress(RegionError):
            # An action that cannot be read is not in force either.
            newest = region.read_action()
            self._action_id = max(self._action_id, newest.sequence_id if newest is not None else 0)
        self._region = region
        self._buffer: ObservationBuffer = region.new_buffer()
        self._counts: NDArray[np.int64] | None = None
        self._period = round(region.publish_interval / region.clock_rate * _NS)
        self._slack = round(_SLACK * min(region.publish_interval, self.interval) * _NS)

    def _await_first(self) -> None:
        if not (self._region.read_into(self._buffer) or self._next(0, time.monotonic() + self.timeout)):
            raise self._silence(self.timeout)

    def _check_clock(self, sequence: int, timestamp: int, published: int) -> None:
        """Note a jump of the data plane's clock or sequence between the last observation and the one in the buffer."""
        buffer = self._buffer
        if sequence == 0:
            return
        passed = (buffer.published_at - published) * self._region.clock_rate
        ahead = (buffer.timestamp_ns - timestamp) - passed
        if (
            buffer.sequence_id <= sequence
            or buffer.timestamp_ns < timestamp
            or ahead > self._interval + self.timeout * _NS * self._region.clock_rate
        ):
            self._jumped = True
            logger.warning(
                "region %r jumped from observation %d at %.6f s to %d at %.6f s",
                self.name, sequence, timestamp / _NS, buffer.sequence_id, buffer.timestamp,
            )  # fmt: skip

    def _instant(self, timestamp: int) -> int:
        """Convert ``timestamp`` of the data plane's clock to ns of the monotonic clock, by the last observation."""
        ahead = timestamp - self._buffer.timestamp_ns
        return self._buffer.published_at + int(ahead / self._region.clock_rate)

    def _silence(self, waited: float) -> DataPlaneTimeout:
        region, buffer = self._region, self._buffer
        if region.producer_alive:
            state = f"its producer (process {region.producer_pid}) lives, last heard {region.heartbeat_age:.3g} s ago"
        elif region.closed_by_producer:
            state = f"its producer (process {region.producer_pid}) has closed it"
        else:
            state = f"its producer (process {region.producer_pid}) is gone"
        age = max(0, time.monotonic_ns() - buffer.published_at) / _NS
        last = (
            f"the last one is number {buffer.sequence_id}, {age:.3g} s old" if buffer.sequence_id else "there is none"
        )
        return DataPlaneTimeout(f"region {self.name!r}: no new observation within {waited:g} s; {last}; {state}")

    # Writing and reporting

    def _write(self, weights: NDArray[np.float64], sequence_id: int, index: NDArray[np.float64] | None) -> None:
        if self.read_only:
            self._written_at = time.monotonic_ns()
            return
        self._written_at = self._region.write_action(
            sequence_id=sequence_id,
            weights=weights[: self._region.capacity],
            lease=self.lease,
            index=None if index is None else index[: self._region.capacity],
        )

    def _count(self) -> NDArray[np.int64]:
        """Since the last call: flows completed, rejected (in any way) and known by FCT, and the sum of FCTs, ns."""
        buffer = self._buffer
        _, completed, rejected, failed = buffer.counters[: buffer.num_servers].sum(axis=0, dtype=np.int64)
        counts = np.array(
            [completed, rejected + failed + buffer.unrouted, buffer.fct_count, buffer.fct_sum_ns], np.int64
        )
        before, self._counts = self._counts, counts
        if before is None or (counts < before).any():
            # A producer that has taken over counts from 0; anything else before is unknown.
            return counts if self._restarted else np.zeros_like(counts)
        return counts - before

    def _observed(self, action_id: int, missed: int, late: int) -> Snapshot:
        buffer = self._buffer
        if self.grows:
            self.num_servers = max(self.num_servers, buffer.num_servers)
        completed, rejected, ended, fct_sum = self._count().tolist()
        applied = buffer.applied_sequence_id
        delay = math.nan
        if applied is not None and applied == action_id:
            assert buffer.applied_at is not None
            delay = (buffer.applied_at - self._written_at) / _NS * self._region.clock_rate
        known = buffer.num_servers
        if known > self.num_servers and not self._warned:
            self._warned = True
            logger.warning(
                "region %r now has %d servers, but this agent was made for %d: the others keep their safe weights",
                self.name, known, self.num_servers,
            )  # fmt: skip
        in_force = np.zeros(self.num_servers)
        count = min(known, self.num_servers)
        in_force[:count] = buffer.weights[:count]
        self.info = {
            "action_sequence_id": action_id,
            "applied_sequence_id": -1 if applied is None else applied,
            "action_delay": delay,
            "safe_weights": buffer.safe,
            "missed_observations": missed,
            "overrun": late / _NS,
            "producer_restarted": self._restarted,
            "clock_jumped": self._jumped,
            "completed": completed,
            "rejected": rejected,
            "fct_mean": fct_sum / ended / _NS if ended else 0.0,
            "weights_in_force": in_force,
        }
        self._restarted = self._jumped = False
        return buffer.snapshot(self.num_servers)
