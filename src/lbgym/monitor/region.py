"""The model of a live region: states, rates and delays, made of what is published in it."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import RegionError
from ..features.columns import GROUND_TRUTH_NAMES, column_index
from ..sharedmemory import Action, SharedMemoryRegion
from .follow import Follower
from .servers import region_labels, state_names

_NS = 1_000_000_000
#: Rates are over so many seconds.
WINDOW = 2.0
#: Looks between two views are at most this far apart, so that fewer actions are overlooked; seconds.
_LOOK = 0.05
#: A live producer is silent if its newest observation is older than this, and than three intervals; seconds.
_SILENT = 1.0
#: Actions whose times of writing are remembered.
_REMEMBERED = 64

_CPU = GROUND_TRUTH_NAMES.index("cpu_usage")


def producer_state(region: SharedMemoryRegion) -> str:
    """``alive``, ``closed`` (it ended in order) or ``dead``."""
    if region.closed_by_producer:
        return "closed"
    return "alive" if region.producer_alive else "dead"


def agent_state(region: SharedMemoryRegion) -> str:
    """``alive``, ``dead``, or ``none`` if there never was an agent or it has detached."""
    if region.agent_alive:
        return "alive"
    return "none" if region.agent_pid is None else "dead"


@dataclass(frozen=True, slots=True)
class ServerColumns:
    """Columns over the N servers. A feature that this data plane does not measure is None.

    Attributes:
        labels: unique per server: its name, or its index where it has none.
        states: ``up``, ``draining``, ``down`` or ``unknown``.
        active: bool[N].
        open: float64[N], open flows of this balancer.
        weights: float64[N], in force.
        fct, fct_p90, duration, duration_p90: float64[N], seconds, decayed.
        new: float64[N], new flows per second of the data plane's clock; None before there are two observations.
        cpu: float64[N] in 0..1, NaN where it is not known; None without ground truth.
        ground_truth_age: float64[N], seconds from the measurement to the publication; NaN where unknown.
        completed, lost: int64[N], flows since the producer started.
    """

    labels: tuple[str, ...]
    states: tuple[str, ...]
    active: NDArray[np.bool_]
    open: NDArray[np.float64] | None
    weights: NDArray[np.float64]
    fct: NDArray[np.float64] | None
    fct_p90: NDArray[np.float64] | None
    duration: NDArray[np.float64] | None
    duration_p90: NDArray[np.float64] | None
    new: NDArray[np.float64] | None
    cpu: NDArray[np.float64] | None
    ground_truth_age: NDArray[np.float64]
    completed: NDArray[np.int64]
    lost: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ActionView:
    """The newest action.

    Attributes:
        sequence_id: of the action.
        age: seconds since it was written.
        lease, lease_left: seconds; infinite if the weights are good for ever, and 0 or less when the lease is over.
    """

    sequence_id: int
    age: float
    lease: float
    lease_left: float


@dataclass(frozen=True, slots=True)
class Delay:
    """Seconds between an action's being written and its being applied."""

    sequence_id: int
    seconds: float


@dataclass(frozen=True, slots=True)
class ObservationView:
    """The newest observation, and rates over the last :data:`WINDOW` seconds.

    Attributes:
        sequence_id: of the observation.
        age: seconds since it was published.
        timestamp: seconds on the data plane's clock.
        rate: observations per second; None before there are two.
        safe: whether the safe weights are in force.
        applied: sequence id of the action applied last; None if none was.
        delay: of the newest action of which both ends are known.
        mean_fct: seconds, of the flows that ended within the window; None if none did.
        unrouted: flows that found no server, since the producer started.
        servers: columns over the servers.
    """

    sequence_id: int
    age: float
    timestamp: float
    rate: float | None
    safe: bool
    applied: int | None
    delay: Delay | None
    mean_fct: float | None
    unrouted: int
    servers: ServerColumns


@dataclass(frozen=True, slots=True)
class RegionView:
    """The visible state of a region at one instant.

    Attributes:
        name, driver: of the region.
        clock_rate: seconds of the data plane's clock per second.
        producer, agent: states, as :func:`producer_state` and :func:`agent_state` give them.
        producer_pid, agent_pid: process ids; None for no agent.
        up: seconds since the region was created.
        heartbeat_age: seconds since the producer's last sign of life.
        silent: seconds that a live producer has published nothing, if that is too long; else None.
        restarts: times that another producer took the name.
        action: None if none was written.
        observation: None if none was published.
        problem: what could not be read; empty if all could.
    """

    name: str
    driver: str
    clock_rate: float
    producer: str
    agent: str
    producer_pid: int
    agent_pid: int | None
    up: float
    heartbeat_age: float
    silent: float | None
    restarts: int
    action: ActionView | None
    observation: ObservationView | None
    problem: str

    @property
    def stale(self) -> bool:
        """True if the observation is the last of a data plane that has ended."""
        return self.silent is not None or self.producer != "alive"


@dataclass(frozen=True, slots=True)
class _Instant:
    """Counters that rates are computed from."""

    published_at: int
    timestamp: int
    sequence_id: int
    counters: NDArray[np.int64]  # [N, 4]
    fct_count: int
    fct_sum: int


class RegionMonitor:
    """Follows a region, and those that take its name after it. Only looks.

    Raises:
        RegionNotFoundError, RegionFormatError, RegionError: as ``SharedMemoryRegion.attach``.
    """

    def __init__(self, name: str) -> None:
        self._follower = Follower(name)
        self._past: deque[_Instant] = deque()
        self._action: Action | None = None
        self._written: dict[int, int] = {}
        self._delay: Delay | None = None
        self._restarts = 0
        self._problem = ""

    def __enter__(self) -> RegionMonitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Detach; idempotent."""
        self._follower.close()

    def look(self) -> None:
        """Read what is new."""
        follower = self._follower
        fresh = follower.wait(0.0)
        if follower.restarts != self._restarts:
            self._restarts = follower.restarts
            self._past.clear()
            self._written.clear()
            self._action = self._delay = None
        try:
            action = follower.region.read_action()
            self._problem = ""
        except RegionError as error:
            action, self._problem = None, str(error)
        if action is not None:
            self._action = action
            self._written[action.sequence_id] = action.written_at
            while len(self._written) > _REMEMBERED:
                del self._written[next(iter(self._written))]
        invalid = follower.invalid
        if fresh and follower.read_newest():
            self._note()
        elif follower.invalid > invalid:
            self._problem = "the newest observation is invalid: no data plane may publish it"

    def _note(self) -> None:
        buffer = self._follower.buffer
        instant = _Instant(
            buffer.published_at,
            buffer.timestamp_ns,
            buffer.sequence_id,
            buffer.counters[: buffer.num_servers].astype(np.int64),
            buffer.fct_count,
            buffer.fct_sum_ns,
        )
        past = self._past
        if past and (
            instant.sequence_id <= past[-1].sequence_id
            or instant.timestamp < past[-1].timestamp
            or instant.counters.shape != past[-1].counters.shape
        ):
            past.clear()
        past.append(instant)
        # One that is older than the window, so that the rates are over all of it.
        while len(past) > 2 and instant.published_at - past[1].published_at > WINDOW * _NS:
            past.popleft()
        applied, applied_at = buffer.applied_sequence_id, buffer.applied_at
        if applied is not None and applied_at is not None and applied in self._written:
            self._delay = Delay(applied, max(0, applied_at - self._written[applied]) / _NS)

    def look_until(self, deadline: float, pressed: Callable[[float], bool] | None = None) -> bool:
        """Look until ``deadline`` (monotonic clock, seconds).

        Args:
            deadline: when to return.
            pressed: sleeps for so many seconds instead, and returns True to end at once.

        Returns:
            Whether ``pressed`` ended it.
        """
        while (left := deadline - time.monotonic()) > 0.0:
            if pressed is None:
                time.sleep(min(left, _LOOK))
            elif pressed(min(left, _LOOK)):
                return True
            self.look()
        return False

    def look_twice(self) -> None:
        """Look at two observations, for rates; at one if the second does not come soon."""
        self.look()
        region = self._follower.region
        if producer_state(region) == "alive" and self._past:
            self._follower.wait(min(1.0, 1.5 * region.publish_interval / region.clock_rate))
            self.look()

    def view(self) -> RegionView:
        """The view as of now."""
        region = self._follower.region
        now, state = time.monotonic_ns(), producer_state(region)
        since = (now - self._past[-1].published_at) / _NS if self._past else math.inf
        up = max(0.0, time.time() - region.created_at)
        unheard = since if self._past else up
        silent = state == "alive" and unheard > max(_SILENT, 3.0 * region.publish_interval / region.clock_rate)
        action = None
        if self._action is not None:
            age = max(0, now - self._action.written_at) / _NS
            action = ActionView(self._action.sequence_id, age, self._action.lease, self._action.lease - age)
        return RegionView(
            name=region.name,
            driver=region.driver,
            clock_rate=region.clock_rate,
            producer=state,
            agent=agent_state(region),
            producer_pid=region.producer_pid,
            agent_pid=region.agent_pid,
            up=up,
            heartbeat_age=region.heartbeat_age,
            silent=unheard if silent else None,
            restarts=self._restarts,
            action=action,
            observation=self._observation(since) if self._past else None,
            problem=self._problem,
        )

    def _observation(self, age: float) -> ObservationView:
        first, last, buffer = self._past[0], self._past[-1], self._follower.buffer
        passed = (last.published_at - first.published_at) / _NS
        ended = last.fct_count - first.fct_count
        known = ended > 0 and last.fct_sum >= first.fct_sum
        return ObservationView(
            sequence_id=buffer.sequence_id,
            age=age,
            timestamp=buffer.timestamp,
            rate=(last.sequence_id - first.sequence_id) / passed if passed > 0.0 else None,
            safe=buffer.safe,
            applied=buffer.applied_sequence_id,
            delay=self._delay,
            mean_fct=(last.fct_sum - first.fct_sum) / ended / _NS if known else None,
            unrouted=buffer.unrouted,
            servers=self._servers(),
        )

    def _servers(self) -> ServerColumns:
        first, last, buffer = self._past[0], self._past[-1], self._follower.buffer
        region = self._follower.region
        n = buffer.num_servers
        new = cpu = None
        if last.timestamp > first.timestamp:
            started = np.maximum(last.counters[:, 0] - first.counters[:, 0], 0)
            new = started / (last.timestamp - first.timestamp) * _NS
        ages = buffer.ground_truth_age[:n]
        if buffer.has_ground_truth and "cpu_usage" in region.real_features:
            cpu = buffer.ground_truth[:n, _CPU].astype(np.float64)
            if not np.isnan(ages).all():
                # A data plane that publishes ages has none for servers that were not measured.
                cpu[np.isnan(ages)] = np.nan

        def feature(name: str) -> NDArray[np.float64] | None:
            return buffer.stats[:n, column_index(name)].astype(np.float64) if name in region.real_features else None

        return ServerColumns(
            labels=region_labels(region, n),
            states=state_names(buffer.states[:n]),
            active=buffer.active[:n].copy(),
            open=feature("n_flow_on"),
            weights=buffer.weights[:n].copy(),
            fct=feature("fct_mean_decay"),
            fct_p90=feature("fct_p90_decay"),
            duration=feature("duration_mean_decay"),
            duration_p90=feature("duration_p90_decay"),
            new=new,
            cpu=cpu,
            ground_truth_age=ages,
            completed=last.counters[:, 1],
            lost=last.counters[:, 2:].sum(axis=1),
        )
