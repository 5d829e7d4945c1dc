"""The loop that drives a live data plane: :class:`Controller`."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import __version__
from ..errors import (
    DataPlaneTimeout,
    InvalidOptionError,
    LbgymError,
    PolicyError,
    RegionFormatError,
    RegionNotFoundError,
)
from ..policies import TrainedPolicy, WeightPolicy
from ..scenarios import fixed_scenario
from ..sharedmemory import DEFAULT_LEASE, SharedMemoryRegion, region_names
from ..snapshot import Snapshot
from .config import ControllerConfig
from .decisions import Decider
from .envelope import usable_weights
from .logs import log_event, logger
from .metrics import Counts, Metrics, State, Step
from .notify import Notifier
from .plane import ControlledDataPlane, ObservedDataPlane

_DEBUG, _INFO, _WARNING = logging.DEBUG, logging.INFO, logging.WARNING
#: Seconds per step of a policy that does not say what it was made for.
DEFAULT_INTERVAL = 0.25
#: A pause saves up no more than so many intervals of movement.
_MOST_INTERVALS = 2.0
#: Seconds between two looks for a region that is not there yet.
_LOOK = 0.05
#: Deadlines missed at once that are worth a line of the log.
_MANY_MISSED = 3


class Outcome(StrEnum):
    """Why a controller ended."""

    STOPPED = "stopped"
    FINISHED = "finished"
    SILENT = "silent"


class StopRequested(BaseException):
    """Raised by :meth:`Controller.interrupt` in the midst of a wait; no fault, and so no Exception."""


class Controller:
    """Drives the data plane of one region by a policy, within a safety envelope.

    A step observes, asks the policy, shapes what it proposes (:class:`SafetyEnvelope`), writes it, which renews the
    lease, and waits for the observation one interval on.

    **When the policy fails** (an exception, an action of a wrong shape or not finite, or one that took longer than an
    interval) the step holds the weights in force, or takes the late action. After ``fallback_after`` failures in a row
    the fallback decides, through the same envelope. From ``trial_steps`` steps later on, each step tries the policy,
    when the fallback's weights are written and without using what it says; after a failed trial it rests for as long
    again. After ``trial_steps`` good trials in a row, each on an observation that came in time, the policy decides
    again; never, if ``recover`` is false.

    **When no observation comes**, there is nothing to decide on: no weights are written, the lease runs out, and the
    data plane puts its safe weights in force, which is by design. The controller waits on, follows a producer that
    takes the region over, and gives up after ``max_timeouts`` timeouts in a row, if that is not 0. If there were
    ``fallback_after`` of them or more, the first steps afterwards are the fallback's, until ``trial_steps``
    observations in a row have come in time and the policy was good on each; ``recover`` has no say in this.

    What the policy remembers of the past is forgotten when another producer takes over, when the data plane's clock
    jumps, when servers join that it did not know, and when it fails.

    Args:
        config: what it is told.
        policy: what decides instead of ``config.policy``, which is then only its name.

    Attributes:
        config: as given.
        state: what it did so far, with all counts.
        metrics: None without ``config.metrics_port``, and before ``run``.

    Raises:
        LbgymError: for a policy, fallback or scenario that there is not, or that do not go together.
    """

    def __init__(self, config: ControllerConfig, *, policy: WeightPolicy | TrainedPolicy | None = None) -> None:
        self.config = config
        scenario = None if config.scenario is None else fixed_scenario(config.scenario)
        if policy is None:
            self._policy = Decider.named(config.policy, scenario)
        else:
            self._policy = Decider(policy, config.policy, scenario)
        self._fallback = Decider.heuristic(config.fallback, scenario)
        self._interval = config.step_interval or self._policy.step_interval or DEFAULT_INTERVAL
        self._envelope = config.envelope
        self.state = State(__version__, self._policy.name, config.shm)
        self.metrics: Metrics | None = None
        self._stop = threading.Event()
        self._waiting = False
        self._notifier = Notifier("")
        self._steps_left = math.inf if config.steps is None else config.steps
        # Why the fallback decides, None: the policy does.
        self._distrust: str | None = None
        # In a row: failures of the policy, observations that did not come, good trials.
        self._failures = self._timeouts = self._good = 0
        # Steps until the policy is tried.
        self._rest = 0
        self._forget = True
        # Servers that the policy and the fallback decide for.
        self._servers = 0
        # What was written last, None: nothing for this producer and these servers.
        self._weights: NDArray[np.float64] | None = None
        self._decided_at = math.nan
        self._summary = _Summary(self.state.counts)

    def run(self, stop: threading.Event | None = None) -> Outcome:
        """Drive the data plane until the end.

        When it ends in order the weights are withdrawn: the data plane puts its safe ones in force at once. If it
        raises, that is left to the lease, so that another controller can go on from them.

        Args:
            stop: set by whoever wants an end; it is looked at between steps, so call :meth:`interrupt` as well from a
                signal handler.

        Raises:
            RegionNotFoundError: if there is no such live region within ``attach_timeout``.
            RegionBusyError: if another agent drives it.
            PolicyError: for a policy that was made for other servers, or needs what the data plane does not publish.
            InvalidOptionError: for a lease that a step can outlast, or a port of the metrics that is taken.
            RegionError: for a region that is none, or without the right to write.
        """
        self._stop = stop or threading.Event()
        self._notifier = Notifier()
        outcome, plane = Outcome.STOPPED, None
        try:
            if self.config.metrics_port is not None:
                self.metrics = Metrics(self.state, self.config.metrics_port, self.config.metrics_address)
                self._log(_INFO, "metrics", url=self.metrics.url)
            try:
                plane = self._connect()
                outcome = self._drive(plane)
            except StopRequested:
                pass
            self._notifier.tell("STOPPING=1")
            if plane is not None:
                self._withdraw(plane)
                self._summarize()
            self._log(_INFO, "stopped", reason=str(outcome), steps=self.state.counts.steps)
            return outcome
        finally:
            self.state.connected = False
            if plane is not None:
                plane.close()
            if self.metrics is not None:
                self.metrics.close()
            self._notifier.close()

    def interrupt(self) -> None:
        """Cut short what it waits for, if it waits; for handlers of signals, in the thread that runs it."""
        if self._waiting:
            raise StopRequested

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Where :meth:`interrupt` may raise: a wait, or the policy's work."""
        self._waiting = True
        try:
            if self._stop.is_set():
                raise StopRequested
            yield
        finally:
            self._waiting = False

    # The beginning

    def _connect(self) -> ControlledDataPlane:
        """Attach, and make everything ready for the first step."""
        plane = self._attach()
        try:
            deciders = self._policy, self._fallback
            bound = {decider.servers for decider in deciders} - {None}
            if bound:
                self._bind(plane, deciders)
            plane.grows = not bound
            self._fit(plane)
            self._set_lease(plane, refuse=True)
            region = plane.region
            self._log(
                _INFO, "attached",
                version=__version__, policy=self._policy.name, fallback=self._fallback.name, interval=self._interval,
                lease=plane.lease, servers=plane.num_servers, driver=region.driver, producer_pid=region.producer_pid,
                clock_rate=region.clock_rate, publish_interval=region.publish_interval,
                dry_run=self.config.dry_run, pid=os.getpid(),
            )  # fmt: skip
            if self._usually_missed(plane):
                self._log(
                    _WARNING, "interval",
                    f"the data plane publishes every {region.publish_interval:g} s, which is longer than a step of "
                    f"{self._interval:g} s",
                )  # fmt: skip
            self._warm_up(plane)
        except BaseException:
            plane.close()
            raise
        self.state.connected = True
        return plane

    def _attach(self) -> ControlledDataPlane:
        config = self.config
        kind = ObservedDataPlane if config.dry_run else ControlledDataPlane
        deadline = time.monotonic() + config.attach_timeout
        told = False
        while True:
            try:
                with self._interruptible():
                    SharedMemoryRegion.attach(config.shm, live=True, read_only=True).close()
                    return kind(config.shm, interval=self._interval, timeout=config.timeout)
            except (RegionNotFoundError, DataPlaneTimeout) as error:
                if time.monotonic() >= deadline:
                    raise
                if not told:
                    told = True
                    self._notifier.tell(f"STATUS=waiting for the data plane of region {config.shm}")
                    self._log(_INFO, "waiting", str(error), regions=list(region_names()))
            with self._interruptible():
                time.sleep(_LOOK)

    def _bind(self, plane: ControlledDataPlane, deciders: tuple[Decider, Decider]) -> None:
        """Observe as many servers as the deciders are for; those that are not there yet are inactive."""
        for decider in deciders:
            if decider.servers is None:
                continue
            if plane.num_servers > decider.servers:
                raise PolicyError(
                    f"policy {decider.name!r} is for {decider.servers} servers, and the data plane of region "
                    f"{self.config.shm!r} has {plane.num_servers}"
                )
            for other in deciders:
                if other.servers not in (None, decider.servers):
                    raise PolicyError(
                        f"policy {decider.name!r} is for {decider.servers} servers, and policy {other.name!r} for "
                        f"{other.servers}"
                    )
        plane.num_servers = next(decider.servers for decider in deciders if decider.servers is not None)

    def _fit(self, plane: ControlledDataPlane) -> None:
        self._servers = plane.num_servers
        for decider in (self._policy, self._fallback):
            decider.fit(plane.num_servers, ground_truth=plane.has_ground_truth)

    def _set_lease(self, plane: ControlledDataPlane, *, refuse: bool = False) -> None:
        """Longer than the longest time between two actions that is still in order."""
        longest = self._interval / plane.region.clock_rate + plane.timeout
        lease = self.config.lease
        if lease is None:
            lease = max(DEFAULT_LEASE, 2.0 * longest)
        elif lease <= longest:
            problem = (
                f"lease must be more than {longest:.4g} s, which is an interval of {self._interval:g} s at "
                f"{plane.region.clock_rate:g} times real time and the timeout of {plane.timeout:g} s; got {lease:g}"
            )
            if refuse:
                raise InvalidOptionError(problem)
            self._log(_WARNING, "lease", problem)
        plane.lease = self.state.lease = lease

    def _warm_up(self, plane: ControlledDataPlane) -> None:
        """One decision for nothing: the first one of a network takes longer than those that follow."""
        try:
            with self._interruptible():
                self._policy(plane.last(), np.ones(plane.num_servers), {})
        except Exception as error:
            self._log(_WARNING, "policy_error", f"{_name_of(error)} before the first step: {error}")

    # The loop

    def _drive(self, plane: ControlledDataPlane) -> Outcome:
        config = self.config
        ends_at = math.inf if config.duration is None else time.monotonic() + config.duration
        self._summary = _Summary(self.state.counts)
        self._notifier.tell("READY=1", f"STATUS=driving region {config.shm}")
        snapshot: Snapshot | None = None
        while not self._stop.is_set():
            self._notifier.tell("WATCHDOG=1")
            if self._summary.age >= config.summary_interval:
                self._summarize()
            if self._steps_left <= 0 or time.monotonic() >= ends_at:
                return Outcome.FINISHED
            if 0 < config.max_timeouts <= self._timeouts:
                return Outcome.SILENT
            snapshot = self._observe(plane) if snapshot is None else self._step(plane, snapshot)
        return Outcome.STOPPED

    def _observe(self, plane: ControlledDataPlane) -> Snapshot | None:
        """The next observation, with no weights written; None if there is none in time."""
        try:
            with self._interruptible():
                snapshot = plane.wait()
        except (DataPlaneTimeout, RegionFormatError) as error:
            self._note_silence(error)
            return None
        self._note_observation(plane)
        return snapshot

    def _step(self, plane: ControlledDataPlane, snapshot: Snapshot) -> Snapshot | None:
        """Decide on an observation, act, and wait for the next one; None if there is none in time."""
        counts, info, seen_at, known = self.state.counts, plane.info, plane.published_at, plane.known_servers
        before = usable_weights(self._in_force(info))
        proposed = None
        if self._distrust is None:
            proposed = self._ask(plane, snapshot, before)
            if self._failures >= self.config.fallback_after:
                self._fall_back("policy", f"policy {self._policy.name!r} failed {self._failures} times in a row")
        if self._distrust is not None:
            proposed = self._ask_fallback(plane, snapshot, before)
            counts.fallback_steps += 1
        if proposed is None:
            counts.held_steps += 1
        weights, limits = self._envelope.apply(
            before if proposed is None else proposed, before, snapshot.active, self._elapsed(snapshot)
        )
        for limit in limits:
            counts.interventions[limit] += 1
        self._decided_at, self._weights = snapshot.timestamp, weights
        in_force = info["weights_in_force"]
        self.state.step = Step(
            None if proposed is None else proposed[:known], weights[:known], in_force[:known], snapshot.active[:known],
            snapshot.stats[:known], info["safe_weights"],
        )  # fmt: skip
        written_at = self._try_policy(plane, snapshot, before, weights) if self._trial_is_due() else None
        after: Snapshot | None = None
        try:
            with self._interruptible():
                after = plane.step(weights)
        except (DataPlaneTimeout, RegionFormatError) as error:
            self._note_silence(error)
        counts.steps += 1
        self._steps_left -= 1
        latency = max(0, (written_at or plane.written_at) - seen_at) / 1e9
        self._summary.latencies.append(latency)
        if self.metrics is not None:
            self.metrics.latency.observe(latency)
        if logger.isEnabledFor(_DEBUG) or self.config.dry_run:
            self._log(
                _INFO if self.config.dry_run else _DEBUG, "step",
                sequence_id=snapshot.sequence_id, timestamp=snapshot.timestamp, weights=weights[:known],
                proposed=None if proposed is None else proposed[:known], in_force=in_force[:known],
                active=snapshot.active[:known], safe_weights=info["safe_weights"], limits=limits,
                fallback=self._distrust is not None, latency=latency,
                action_delay=math.nan if after is None else plane.info["action_delay"],
                missed=0 if after is None else plane.info["missed_observations"],
            )  # fmt: skip
        if after is not None:
            self._note_observation(plane)
        return after

    def _in_force(self, info: dict[str, Any]) -> NDArray[np.float64]:
        """What the data plane dispatches by, or will as soon as it has picked up what was written last."""
        reported: NDArray[np.float64] = info["weights_in_force"]
        written = self._weights
        if written is None:
            return reported
        if self.config.dry_run:
            return written
        picked_up = info["applied_sequence_id"] == info["action_sequence_id"]
        return reported if picked_up or info["safe_weights"] else written

    def _elapsed(self, snapshot: Snapshot) -> float:
        """Seconds of the data plane's clock that the weights may move for."""
        elapsed = snapshot.timestamp - self._decided_at
        return min(elapsed, _MOST_INTERVALS * self._interval) if elapsed >= 0.0 else self._interval

    # The policy, and whether it is trusted

    def _ask(
        self, plane: ControlledDataPlane, snapshot: Snapshot, weights: NDArray[np.float64]
    ) -> NDArray[np.float64] | None:
        """What the policy proposes, None if it fails; ``_failures`` says how often in a row it did."""
        counts, proposed = self.state.counts, None
        level = _DEBUG if self._distrust else _WARNING
        began = time.monotonic()
        try:
            with self._interruptible():
                if self._forget:
                    self._policy.reset()
                    self._forget = False
                proposed = self._policy(snapshot, weights, plane.info)
        except Exception as error:
            counts.errors += 1
            told = {} if self._failures else {"traceback": traceback.format_exc()}
            self._log(level, "policy_error", f"{_name_of(error)}: {error}", **told)
        took = time.monotonic() - began
        allowed = self._interval / plane.region.clock_rate
        if took > allowed:
            counts.overruns += 1
            self._log(level, "policy_overrun", seconds=took, allowed=allowed)
        good = proposed is not None and took <= allowed
        self._failures = 0 if good else self._failures + 1
        return proposed

    def _ask_fallback(
        self, plane: ControlledDataPlane, snapshot: Snapshot, weights: NDArray[np.float64]
    ) -> NDArray[np.float64] | None:
        try:
            return self._fallback(snapshot, weights, plane.info)
        except Exception as error:
            self._log(_WARNING, "fallback_error", f"{_name_of(error)}: {error}")
            return None

    def _fall_back(self, why: str, message: str) -> None:
        self._distrust = why
        self._good = 0
        self._rest = self.config.trial_steps if why == "policy" else 0
        self._forget = self._forget or why == "policy"
        self._fallback.reset()
        self.state.fallback = True
        self.state.counts.fallbacks += 1
        self._notifier.tell(f"STATUS=driving region {self.config.shm} by fallback {self._fallback.name}: {message}")
        self._log(_WARNING, "fallback", f"{message}; {self._fallback.name!r} decides", why=why)

    def _trial_is_due(self) -> bool:
        if self._distrust is None or (self._distrust == "policy" and not self.config.recover):
            return False
        self._rest -= 1
        return self._rest < 0

    def _try_policy(
        self, plane: ControlledDataPlane, snapshot: Snapshot, before: NDArray[np.float64], weights: NDArray[np.float64]
    ) -> int:
        """See whether the policy can be trusted again; the instant at which the fallback's weights were written."""
        # Before the trial, which may take long.
        plane.write(weights)
        written_at = plane.written_at
        self._ask(plane, snapshot, before)
        if self._failures:
            self._good, self._rest, self._forget = 0, self.config.trial_steps, True
            if self._failures >= self.config.fallback_after:
                self._distrust = "policy"
        else:
            in_time = plane.info["missed_observations"] <= self._usually_missed(plane)
            self._good = self._good + 1 if in_time else 0
        if self._good >= self.config.trial_steps:
            self._distrust = None
            self.state.fallback = False
            self._notifier.tell(f"STATUS=driving region {self.config.shm}")
            self._log(_INFO, "policy_back", f"policy {self._policy.name!r} decides again", good_steps=self._good)
        return written_at

    # What comes from the data plane

    def _usually_missed(self, plane: ControlledDataPlane) -> int:
        """Deadlines that pass without an observation of their own where the data plane publishes less often."""
        return max(0, math.ceil(plane.region.publish_interval / self._interval - 1e-6) - 1)

    def _note_silence(self, error: LbgymError) -> None:
        self._timeouts += 1
        level = _WARNING if self._timeouts == 1 else _DEBUG
        if isinstance(error, DataPlaneTimeout):
            self.state.counts.timeouts += 1
            self._log(level, "timeout", str(error), in_a_row=self._timeouts)
        else:
            self.state.counts.invalid += 1
            self._log(level, "invalid_observation", str(error), in_a_row=self._timeouts)

    def _note_observation(self, plane: ControlledDataPlane) -> None:
        """Take note of what an observation says beside the servers' features."""
        counts, info = self.state.counts, plane.info
        self.state.observed_at = plane.published_at
        if self._timeouts:
            self._log(_INFO, "recovered", safe_weights=info["safe_weights"], timeouts=self._timeouts)
            if self._timeouts >= self.config.fallback_after:
                if self._distrust is None:
                    self._fall_back("timeouts", f"{self._timeouts} timeouts in a row")
                self._good = 0
            self._timeouts = 0
        missed = info["missed_observations"]
        counts.missed += missed
        if missed >= self._usually_missed(plane) + _MANY_MISSED:
            self._log(_WARNING, "missed", missed=missed, overrun=info["overrun"])
        if self.metrics is not None and not self.config.dry_run and math.isfinite(info["action_delay"]):
            self.metrics.delay.observe(max(0.0, info["action_delay"]))
        if info["producer_restarted"]:
            counts.restarts += 1
            region = plane.region
            self._log(_WARNING, "producer_restarted", producer_pid=region.producer_pid, driver=region.driver)
            self._set_lease(plane)
        if info["clock_jumped"]:
            counts.jumps += 1
            self._log(_WARNING, "clock_jumped")
        joined = plane.num_servers != self._servers
        if joined:
            self._log(_INFO, "servers_joined", servers=plane.num_servers)
            self._fit(plane)
        if joined or info["producer_restarted"] or info["clock_jumped"]:
            # What was seen and done so far says nothing about what comes.
            self._forget = True
            self._fallback.reset()
            self._weights = None
            self._decided_at = math.nan

    # The end, and what is told

    def _withdraw(self, plane: ControlledDataPlane) -> None:
        try:
            plane.withdraw()
        except LbgymError as error:
            self._log(_WARNING, "withdraw", f"{error}; the lease will put the safe weights in force")

    def _summarize(self) -> None:
        self._log(_INFO, "summary", fallback=self.state.fallback, **self._summary.fields())
        self._summary = _Summary(self.state.counts)

    def _log(self, level: int, event: str, message: str = "", **fields: Any) -> None:
        log_event(level, event, self.config.shm, message, **fields)


class _Summary:
    """What happened since it was made."""

    def __init__(self, counts: Counts) -> None:
        self._counts, self._before = counts, replace(counts)
        self._began = time.monotonic()
        self.latencies: list[float] = []

    @property
    def age(self) -> float:
        """Seconds."""
        return time.monotonic() - self._began

    def fields(self) -> dict[str, Any]:
        names = ("steps", "timeouts", "invalid", "missed", "errors", "overruns", "restarts", "fallback_steps")
        told: dict[str, Any] = {"seconds": self.age}
        told |= {name: getattr(self._counts, name) - getattr(self._before, name) for name in names}
        if self.latencies:
            told |= {"latency_mean": np.mean(self.latencies), "latency_p99": np.quantile(self.latencies, 0.99)}
        return told


def _name_of(error: Exception) -> str:
    return type(error).__name__
