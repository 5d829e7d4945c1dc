"""The simulator as a data plane behind shared memory, in real or scaled time: :class:`Emulator`."""

from __future__ import annotations

import logging
import math
import threading
import time
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import InvalidOptionError
from ..scenarios import Scenario
from ..sharedmemory import Publication, SharedMemoryRegion, seqlock, system
from ..simulator import Simulation
from ..simulator import layout as at
from ..snapshot import Snapshot

logger = logging.getLogger("lbgym")

#: Simulated seconds between observations. A fifth of the environment's default step of 0.25 s: every deadline of an
#: agent that steps in multiples of it meets an observation taken at that very instant, one that is late by a moment
#: loses a fifth of a step and not a whole one, and a balancer's clocks of 0.05 s to 1 s can be tried on one region.
PUBLISH_INTERVAL = 0.05

_NS = 1_000_000_000
#: Longest sleep before another look at leases and at ``stop``, and between signs of life; seconds (real time).
_LOOK = 0.1
#: With several balancers: longest sleep before another look at their actions, seconds (real time).
_POLL = 0.001
#: Least time between warnings of being slow, seconds (real time).
_WARN = 10.0


class Emulator:
    """A simulated data plane that publishes and takes weights as a real one does; agents need not know.

    One region of shared memory per balancer: ``name`` for a scenario with one balancer, ``name_0`` to ``name_{m-1}``
    for one with m. Each shows its balancer's own view: features and counters are of the flows it placed. Timestamps are
    simulated seconds, from 0. All regions exist, and hold the observation of time 0, when the constructor returns; time
    begins to pass with :meth:`run`.

    Observations are taken on a grid of whole publish intervals and published when the clock, ``speedup`` simulated
    seconds per second, comes to them. An agent's weights are put in force when it writes them, at the simulated instant
    that the clock shows then: with one balancer it wakes the emulator, with several they are looked up every
    millisecond (or four times per interval, if that is more often). In the same way a lease that ends puts the safe
    weights in force, at the next observation or within 0.1 s, whatever comes first.

    Simulated time passes in full and in order, whatever happens. If an observation is ready more than one interval late
    (a speedup that the machine cannot keep up with, a suspended process), the clock has stood still for that long: it
    goes on at the same rate from there, ``slips`` and ``lost`` count it, and a warning says so. Agents pace themselves
    by the timestamps, and so are not late because of it.

    With the same seed and weights that change at the same simulated instants the flows are the same; what the agents'
    process makes of its time is not reproducible.

    Args:
        scenario: what to simulate.
        name: of the region, or what the names of several begin with.
        speedup: simulated seconds per second, above 0.
        publish_interval: simulated seconds between observations.
        dispatch: overrides the scenario's dispatch rule.
        seed: of the flows, at least 0; None: one from the operating system.
        safe_weights: float[N] in force without an agent's; None: in proportion to the servers' cores, which is what
            an operator knows.
        capacity: servers each region has room for; None: 64, or the scenario's if that is more.
        mode: permissions of the regions.
        group: owning group of the regions, id or name; None: the process's.

    Attributes:
        regions: one per balancer.
        seed: of the flows.
        slips: int, observations that were more than one interval late.
        lost: seconds (real time) that the clock has stood still because of it.

    Raises:
        RegionExistsError: if a name belongs to a live region or to a file that is no region; no region is left then.
        RegionError: for a bad name, or if there is no room or no right to create a region.
        UnknownNameError: for an unknown dispatch rule.
        InvalidOptionError, InvalidWeightsError: for a value out of its range.
    """

    def __init__(
        self,
        scenario: Scenario,
        name: str,
        *,
        speedup: float = 1.0,
        publish_interval: float = PUBLISH_INTERVAL,
        dispatch: str | None = None,
        seed: int | None = None,
        safe_weights: ArrayLike | None = None,
        capacity: int | None = None,
        mode: int = 0o600,
        group: int | str | None = None,
    ) -> None:
        self.speedup = _number("speedup", speedup, 1e-6, 1e6)
        self._interval = round(_number("publish_interval", publish_interval, 1e-6, 86_400.0) * _NS)
        if seed is None:
            seed = int(np.random.SeedSequence().generate_state(1, np.uint64)[0])
        elif isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
            raise InvalidOptionError(f"seed must be a whole number of at least 0, or None, got {seed!r}")
        self.scenario, self.seed = scenario, int(seed)
        self.slips, self.lost = 0, 0.0
        m = scenario.balancers
        names = [name] if m == 1 else [f"{name}_{b}" for b in range(m)]
        for region_name in names:
            # A bad name is refused before the simulator is compiled for it.
            system.path_of(region_name)
        # The snapshot counts for all balancers together; where there are several, the flows say whose they are.
        self._simulation = Simulation(scenario, dispatch=dispatch, service=m == 1, record_flows=m > 1)
        self._fct_count = np.zeros(m, np.int64)
        self._fct_sum = np.zeros(m)
        self._ended = np.zeros((3, m, scenario.num_servers), np.int64)  # completed, rejected, failed
        self._unrouted = np.zeros(m, np.int64)
        # Compiled, or loaded from disk, before anybody sees a region.
        seqlock.warm_up()
        self._simulation.reset([self.seed])
        self._simulation.observe()
        self._batch = self._simulation.reset([self.seed])
        self._tick = 0  # intervals since time 0
        # Of the interval under way: parts and seconds simulated, CPU use times seconds.
        self._parts, self._elapsed, self._cpu = 0, 0.0, np.zeros(scenario.num_servers)
        self._next_warning = 0
        with ExitStack() as made:
            regions = []
            for region_name in names:
                region = SharedMemoryRegion.create(
                    region_name,
                    num_servers=scenario.num_servers,
                    capacity=capacity,
                    publish_interval=self.publish_interval,
                    clock_rate=self.speedup,
                    safe_weights=scenario.core_weights if safe_weights is None else safe_weights,
                    driver="emulator",
                    mode=mode,
                    group=group,
                )
                regions.append(made.enter_context(region))
            self.regions: tuple[SharedMemoryRegion, ...] = tuple(regions)
            self._weights = np.array([[region.weights_in_force() for region in regions]])
            self._changed = True
            self._publish()
            self._made = made.pop_all()

    @property
    def publish_interval(self) -> float:
        """Simulated seconds between observations."""
        return self._interval / _NS

    @property
    def time(self) -> float:
        """Simulated seconds so far."""
        return float(self._batch.timestamp[0])

    @property
    def observations(self) -> int:
        """Published so far, each of them in every region."""
        return self._tick + 1

    def run(self, stop: threading.Event | None = None, duration: float | None = None) -> None:
        """Let time pass.

        Args:
            stop: end when it is set, within 0.1 s.
            duration: end with the last observation of these simulated seconds; None: go on until ``stop``.

        Raises:
            InvalidOptionError: for a duration that is no number of seconds.
            RegionError: if the emulator is closed.
        """
        last: float = math.inf
        if duration is not None:
            seconds = _number("duration", duration, 0.0, 1e12)
            last = self._tick + int(seconds * _NS + 0.5) // self._interval
        # When the clock showed 0, ns of the monotonic clock.
        origin = time.monotonic_ns() - self._real(self.time * _NS)
        while self._tick < last and not (stop is not None and stop.is_set()):
            due = origin + self._real((self._tick + 1) * self._interval)
            now = time.monotonic_ns()
            if now < due:
                self._wait((due - now) / _NS)
                now = time.monotonic_ns()
            if now >= due:
                self._tick += 1
                self._advance(self._tick * self._interval / _NS)
                self._publish()
                late = time.monotonic_ns() - due
                if late > self._real(self._interval):
                    origin += late
                    self._slipped(late / _NS)
            self._take_actions(origin)

    def close(self) -> None:
        """Close the regions and remove them; idempotent."""
        self._made.close()
        self._simulation.close()

    def __enter__(self) -> Emulator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Time

    def _real(self, simulated: float) -> int:
        """Ns of real time for ns of simulated time."""
        return round(simulated / self.speedup)

    def _wait(self, left: float) -> None:
        """Sleep until an agent acts, at most ``left`` seconds."""
        left = min(left, _LOOK)
        if len(self.regions) > 1:
            left = min(left, _POLL, max(_POLL / 10, self.publish_interval / self.speedup / 4))
        self.regions[0].wait_action(left)

    def _slipped(self, seconds: float) -> None:
        self.slips += 1
        self.lost += seconds
        now = time.monotonic_ns()
        if now >= self._next_warning:
            self._next_warning = now + round(_WARN * _NS)
            logger.warning(
                "the emulator does not keep up with %g simulated seconds per second: the observation of %.2f s was "
                "%.3g ms late (%d such so far); its clock has stood still for %.3g s in all",
                self.speedup, self.time, 1e3 * seconds, self.slips, self.lost,
            )  # fmt: skip

    # Flows

    def _take_actions(self, origin: int) -> None:
        """Put in force what the agents want by now, if that is something new. ``origin``: when the clock showed 0."""
        weights = np.array([[region.weights_in_force() for region in self.regions]])
        for region in self.regions:
            region.heartbeat()
        if np.array_equal(weights, self._weights):
            return
        shown = (time.monotonic_ns() - origin) * self.speedup
        self._advance(min(shown, (self._tick + 1) * self._interval) / _NS)
        self._weights, self._changed = weights, True

    def _advance(self, to: float) -> None:
        """Simulate up to ``to`` seconds."""
        duration = to - self.time
        if duration <= 0.0:
            return
        batch = self._batch = self._simulation.step(self._weights if self._changed else None, duration)
        self._changed = False
        assert batch.ground_truth is not None
        self._parts += 1
        self._elapsed += duration
        self._cpu += duration * batch.ground_truth[0, :, 0]
        if batch.service is not None:
            completed, rejected, mean = batch.service[0, :3]
            self._fct_count[0] += round(completed + rejected)
            self._fct_sum[0] += (completed + rejected) * mean
        else:
            self._count_flows()

    def _count_flows(self) -> None:
        """Count the flows that ended for each balancer."""
        flows = self._simulation.take_flows()
        balancer, status, m = flows["balancer"], flows["status"], len(self._fct_count)
        routed = status != at.UNROUTED
        np.add.at(self._ended, (status[routed], balancer[routed], flows["server"][routed]), 1)
        self._unrouted += np.bincount(balancer[~routed], minlength=m)
        self._fct_count += np.bincount(balancer, minlength=m)
        self._fct_sum += np.bincount(balancer, weights=flows["fct"], minlength=m)

    def _publish(self) -> None:
        """Publish what each balancer sees now."""
        batch = self._batch
        assert batch.ground_truth is not None
        ground_truth = batch.ground_truth[0]
        if self._parts > 1:
            # CPU use is a mean over the interval, which an action has cut in parts.
            ground_truth[:, 0] = np.where(batch.active[0], self._cpu / self._elapsed, 0.0)
        self._parts, self._elapsed = 0, 0.0
        self._cpu[:] = 0.0
        if len(self.regions) == 1:
            started, unrouted = batch.started, batch.unrouted
            completed, rejected, failed = batch.completed, batch.rejected, batch.failed
        else:
            started, unrouted = self._open() + self._ended.sum(axis=0), self._unrouted
            completed, rejected, failed = self._ended
        for b, region in enumerate(self.regions):
            snapshot = Snapshot(
                sequence_id=self._tick + 1,
                timestamp=self._tick * self._interval / _NS,
                active=batch.active[0],
                stats=batch.stats[0, b],
                ground_truth=ground_truth,
                started=started[b],
                completed=completed[b],
                rejected=rejected[b],
                failed=failed[b],
                unrouted=int(unrouted[b]),
                service=None,
            )
            region.publish(Publication.of(snapshot, fct_count=int(self._fct_count[b]), fct_sum=float(self._fct_sum[b])))

    def _open(self) -> NDArray[np.int64]:
        """Open flows of each balancer at each server, int64[m, N]."""
        batch = self._batch
        if batch.active.all():
            return batch.stats[0, :, :, 0].astype(np.int64)
        # Inactive servers have zero rows there, and flows if they are being drained.
        flows = self._simulation.open_flows()
        counts = np.zeros(self._ended.shape[1:], np.int64)
        np.add.at(counts, (flows["balancer"], flows["server"]), 1)
        return counts


def _number(name: str, value: Any, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not low <= value <= high:
        raise InvalidOptionError(f"{name} must be a number from {low:g} to {high:g}, got {value!r}")
    return float(value)
