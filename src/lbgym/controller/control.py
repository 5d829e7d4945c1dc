"""The loop that drives a live data plane: :class:`Controller`."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import __version__
from ..dataplanes.live import SharedMemoryDataPlane
from ..errors import (
    DataPlaneTimeout,
    InvalidOptionError,
    LbgymError,
    PolicyError,
    RegionFormatError,
    RegionNotFoundError,
)
from ..monitor import region_labels
from ..policies import Agent, Policy, WeightPolicy, make_agent, make_weight_policy
from ..scenarios import fixed_scenario
from ..sharedmemory import DEFAULT_LEASE, SharedMemoryRegion, region_names
from ..snapshot import DEFAULT_STEP_INTERVAL, Snapshot
from .config import ControllerConfig
from .envelope import usable_weights
from .logs import log_event, logger
from .metrics import Counts, Metrics, State, Step
from .notify import Notifier
from .rollback import Alarm, RollbackGuard
from .shadow import Shadow, shares

_DEBUG, _INFO, _WARNING = logging.DEBUG, logging.INFO, logging.WARNING
#: Intervals of movement that a pause saves up at most.
_MOST_INTERVALS = 2.0
#: Seconds between two attempts to find the region.
_LOOK = 0.05
#: Deadlines missed in a row that are worth a line in the log.
_MANY_MISSED = 3
#: Seconds for which the metrics stay after a rollback, so that they are read.
_LINGER = 60.0


class Outcome(StrEnum):
    """The reason a controller ended."""

    STOPPED = "stopped"
    FINISHED = "finished"
    SILENT = "silent"
    ROLLED_BACK = "rolled back"


class StopRequested(BaseException):
    """Raised by :meth:`Controller.interrupt` during a wait; not a fault, and so not an Exception."""


class Controller:
    """Drives the data plane of one region by a policy, within a safety envelope.

    A step observes, asks the policy, passes its proposal through the :class:`SafetyEnvelope`, writes the result, which
    renews the lease, and waits for the observation one interval on.

    **When the policy fails** (an exception, an action of a wrong shape or not finite, or a decision that took longer
    than an interval) the step keeps the weights in force, or takes the late action. After ``fallback_after`` failures
    in a row the fallback decides, through the same envelope. After another ``trial_steps`` steps, each step also tries
    the policy, once the fallback's weights are written, and discards the result; after a failed trial the policy rests
    for as long again. After ``trial_steps`` good trials in a row, each on an observation that came in time, the policy
    decides again, unless ``recover`` is false.

    **When no observation comes**, no weights are written: the lease runs out, and the data plane puts its safe weights
    in force, by design. The controller keeps waiting, follows a producer that takes over the region, and gives up after
    ``max_timeouts`` timeouts in a row, if that is not 0. After ``fallback_after`` of them or more, the fallback decides
    first, until ``trial_steps`` observations in a row have come in time and the policy was good on each, whatever
    ``recover`` is.

    **Careful beginnings.** With ``shadow`` nothing is written, and no lock is held, so that another agent may drive the
    region. With ``share`` the weights go only part of the way from the data plane's safe ones to the policy's, along
    the straight line between the servers' shares. With ``rollback`` the safe weights are in force for a quarter of the
    time, and a :class:`~lbgym.controller.rollback.RollbackGuard` compares; its alarm ends the run.

    The policy's memory is cleared when another producer takes over, when the data plane's clock jumps, when unknown
    servers join, and when the policy fails.

    Args:
        config: the configuration.
        policy: decides in place of ``config.policy``, which then only names it in logs and metrics.

    Attributes:
        config: as given.
        state: the state so far, with all counts.
        metrics: None without ``config.metrics_port``, and before ``run``.
        shadow: what the policy would have done; None without ``config.shadow``.
        alarm: that ended the run; None if none did.

    Raises:
        LbgymError: if the policy, fallback or scenario does not exist, or they do not match.
    """

    def __init__(self, config: ControllerConfig, *, policy: WeightPolicy | Policy | None = None) -> None:
        self.config = config
        scenario = None if config.scenario is None else fixed_scenario(config.scenario)
        self._policy = make_agent(config.policy if policy is None else policy, scenario=scenario, name=config.policy)
        self._fallback = make_agent(
            make_weight_policy(config.fallback, scenario), scenario=scenario, name=config.fallback
        )
        self._interval = config.step_interval or self._policy.step_interval or DEFAULT_STEP_INTERVAL
        self._envelope = config.envelope
        self.state = State(__version__, self._policy.name, config.shm)
        self.metrics: Metrics | None = None
        if config.out is not None and not config.shadow:
            raise InvalidOptionError(f"out is the file of a shadow, and this is none; got {config.out!r}")
        self.shadow = Shadow(config.shm, self._policy.name, config.out) if config.shadow else None
        self.alarm: Alarm | None = None
        self._guard: RollbackGuard | None = None
        if config.rollback is not None and not config.shadow:
            if config.rollback_slot < 4.0 * self._interval:
                raise InvalidOptionError(
                    f"rollback_slot must be at least 4 steps of {self._interval:g} s, got {config.rollback_slot:g}"
                )
            self._guard = RollbackGuard(
                config.rollback, config.rollback_metric, config.rollback_failures, config.rollback_slot,
                config.rollback_alarm,
            )  # fmt: skip
            self.state.evidence = {config.rollback_metric: 1.0, "failures": 1.0}
        self.state.share = 0.0 if config.ramp else config.share
        self._completed: NDArray[np.int64] | None = None
        self._driving_since = math.inf
        self._report_due = False
        self._stop = threading.Event()
        self._waiting = False
        self._notifier = Notifier("")
        self._steps_left = math.inf if config.steps is None else config.steps
        # The reason why the fallback decides; None: the policy does.
        self._distrust: str | None = None
        # In a row: failures of the policy, missing observations, good trials.
        self._failures = self._timeouts = self._good = 0
        # Steps until the next trial of the policy.
        self._rest = 0
        self._forget = True
        # Servers that the policy and the fallback decide for.
        self._servers = 0
        # The weights written last; None: none yet for this producer and these servers.
        self._weights: NDArray[np.float64] | None = None
        self._decided_at = math.nan
        self._summary = _Summary(self.state.counts)

    def run(self, stop: threading.Event | None = None) -> Outcome:
        """Drive the data plane until the end.

        An orderly end, also by KeyboardInterrupt, withdraws the weights: the data plane puts its safe ones in force at
        once. After any other exception the weights stay until the lease runs out, so that another controller can take
        over from them.

        Args:
            stop: ends the run when set. It is checked between steps, so a signal handler should also call
                :meth:`interrupt`.

        Raises:
            RegionNotFoundError: if no such region is live within ``attach_timeout``.
            RegionBusyError: if another agent drives it.
            PolicyError: if the policy was made for other servers, or it or the rollback rule needs what the data plane
                does not publish.
            InvalidOptionError: if a step can outlast the lease, or the port of the metrics is taken.
            RegionError: if the file is not a region, or may not be written.
        """
        self._stop = stop or threading.Event()
        with ExitStack() as resources:
            if self.shadow is not None:
                # However it ends, what the shadow has seen is kept.
                resources.callback(self.shadow.close)
            self._notifier = resources.enter_context(closing(Notifier()))
            if self.config.metrics_port is not None:
                self.metrics = Metrics(self.state, self.config.metrics_port, self.config.metrics_address)
                resources.enter_context(closing(self.metrics))
                self._log(_INFO, "metrics", url=self.metrics.url)
            outcome, plane = Outcome.STOPPED, None
            interrupted: KeyboardInterrupt | None = None
            try:
                plane = resources.enter_context(closing(self._connect()))
                resources.callback(setattr, self.state, "connected", False)
                outcome = self._drive(plane)
            except StopRequested:
                pass
            except KeyboardInterrupt as error:
                interrupted = error
            self._notifier.notify("STOPPING=1")
            if plane is not None:
                self._withdraw(plane)
                self._summarize()
            if self.shadow is not None:
                self._report_shadow()
            if self.alarm is not None:
                self._hand_back(self.alarm)
            self._log(_INFO, "stopped", reason=str(outcome), steps=self.state.counts.steps)
            if interrupted is not None:
                raise interrupted
            return outcome

    def request_report(self) -> None:
        """Have a shadow report before its next step; for signal handlers."""
        self._report_due = True

    def _report_shadow(self) -> None:
        assert self.shadow is not None
        self._report_due = False
        summary = self.shadow.summary()
        self._log(_INFO, "shadow", **{key: value for key, value in summary.items() if key != "region"})
        self.shadow.write()

    def _hand_back(self, alarm: Alarm) -> None:
        """Say why the safe weights are in force, and let the metrics say it for a while."""
        self.state.rolled_back = True
        self._notifier.notify(f"STATUS=rolled back region {self.config.shm}: {alarm}")
        self._log(
            logging.ERROR, "rollback", f"{alarm}; the data plane's safe weights are in force",
            metric=alarm.metric, policy=alarm.policy, safe=alarm.safe, evidence=alarm.evidence, seconds=alarm.seconds,
        )  # fmt: skip
        if self.metrics is not None:
            self._stop.wait(_LINGER)

    def interrupt(self) -> None:
        """Cut short the present wait, if there is one; for signal handlers, in the thread that runs the controller."""
        if self._waiting:
            raise StopRequested

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Let :meth:`interrupt` raise in the block: a wait, or the policy's decision."""
        self._waiting = True
        try:
            if self._stop.is_set():
                raise StopRequested
            yield
        finally:
            self._waiting = False

    def _connect(self) -> SharedMemoryDataPlane:
        """Attach to the region and get ready for the first step."""
        plane = self._attach()
        try:
            agents = self._policy, self._fallback
            bound = {agent.servers for agent in agents} - {None}
            if bound:
                self._bind(plane, agents)
            plane.grows = not bound
            self._fit(plane)
            self._set_lease(plane, refuse=True)
            region = plane.region
            self._log(
                _INFO, "attached",
                version=__version__, policy=self._policy.name, fallback=self._fallback.name, interval=self._interval,
                lease=plane.lease, servers=plane.num_servers, names=region_labels(region, plane.known_servers),
                driver=region.driver, producer_pid=region.producer_pid,
                clock_rate=region.clock_rate, publish_interval=region.publish_interval,
                shadow=self.config.shadow, share=self.config.share, rollback=self.config.rollback, pid=os.getpid(),
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

    def _attach(self) -> SharedMemoryDataPlane:
        config = self.config
        deadline = time.monotonic() + config.attach_timeout
        reported = False
        while True:
            try:
                with self._interruptible():
                    SharedMemoryRegion.attach(config.shm, live=True, read_only=True).close()
                    return SharedMemoryDataPlane(
                        config.shm, interval=self._interval, timeout=config.timeout, read_only=config.shadow
                    )
            except (RegionNotFoundError, DataPlaneTimeout) as error:
                if time.monotonic() >= deadline:
                    raise
                if not reported:
                    reported = True
                    self._notifier.notify(f"STATUS=waiting for the data plane of region {config.shm}")
                    self._log(_INFO, "waiting", str(error), regions=list(region_names()))
            with self._interruptible():
                time.sleep(_LOOK)

    def _bind(self, plane: SharedMemoryDataPlane, agents: tuple[Agent, Agent]) -> None:
        """Observe as many servers as the agents are made for; those that do not exist yet are inactive."""
        for agent in agents:
            if agent.servers is None:
                continue
            if plane.num_servers > agent.servers:
                raise PolicyError(
                    f"policy {agent.name!r} is for {agent.servers} servers, and the data plane of region "
                    f"{self.config.shm!r} has {plane.num_servers}"
                )
            for other in agents:
                if other.servers not in (None, agent.servers):
                    raise PolicyError(
                        f"policy {agent.name!r} is for {agent.servers} servers, and policy {other.name!r} for "
                        f"{other.servers}"
                    )
        plane.num_servers = next(agent.servers for agent in agents if agent.servers is not None)

    def _fit(self, plane: SharedMemoryDataPlane) -> None:
        if self._guard is not None:
            self._guard.check_features(plane.region.real_features)
        self._servers = plane.num_servers
        for agent in (self._policy, self._fallback):
            agent.fit(
                plane.num_servers,
                features=plane.region.real_features,
                ground_truth=plane.has_ground_truth,
                index=plane.region.takes_index,
                tables=False,
            )
            if agent.weights_only:
                self._log(
                    _WARNING, "weights_only",
                    f"policy {agent.name!r}: the data plane takes weights only, so background loads are left out",
                )  # fmt: skip

    def _check_features(self, plane: SharedMemoryDataPlane) -> None:
        """Leave a data plane that measures less than the policy or the rollback rule needs to its safe weights."""
        try:
            for one in (self._policy, self._fallback, self._guard):
                if one is not None:
                    one.check_features(plane.region.real_features)
        except PolicyError:
            self._withdraw(plane)
            raise

    def _set_lease(self, plane: SharedMemoryDataPlane, *, refuse: bool = False) -> None:
        """Set the lease: longer than the longest time between two actions in normal operation."""
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

    def _warm_up(self, plane: SharedMemoryDataPlane) -> None:
        """Call the policy once and discard the result: a network's first call is slow."""
        try:
            with self._interruptible():
                self._policy(plane.last(), np.ones(plane.num_servers), {})
        except Exception as error:
            self._log(_WARNING, "policy_error", f"{_name_of(error)} before the first step: {error}")

    def _drive(self, plane: SharedMemoryDataPlane) -> Outcome:
        config = self.config
        self._driving_since = time.monotonic()
        ends_at = math.inf if config.duration is None else self._driving_since + config.duration
        self._summary = _Summary(self.state.counts)
        self._notifier.notify("READY=1", f"STATUS=driving region {config.shm}")
        snapshot: Snapshot | None = None
        while not self._stop.is_set():
            self._notifier.notify("WATCHDOG=1")
            if self._summary.age >= config.summary_interval:
                self._summarize()
            if self._steps_left <= 0 or time.monotonic() >= ends_at:
                return Outcome.FINISHED
            if 0 < config.max_timeouts <= self._timeouts:
                return Outcome.SILENT
            if self.alarm is not None:
                return Outcome.ROLLED_BACK
            if self._report_due and self.shadow is not None:
                self._report_shadow()
            snapshot = self._observe(plane) if snapshot is None else self._step(plane, snapshot)
        return Outcome.STOPPED

    def _observe(self, plane: SharedMemoryDataPlane) -> Snapshot | None:
        """Wait for the next observation without writing weights; None if it does not come in time."""
        try:
            with self._interruptible():
                snapshot = plane.wait()
        except (DataPlaneTimeout, RegionFormatError) as error:
            self._note_silence(error)
            return None
        self._note_observation(plane)
        return snapshot

    def _step(self, plane: SharedMemoryDataPlane, snapshot: Snapshot) -> Snapshot | None:
        """Decide on an observation, act, and wait for the next one; None if it does not come in time."""
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
            before if proposed is None else self._part_of_the_way(plane, proposed, snapshot.active),
            before, snapshot.active, self._elapsed(snapshot),
        )  # fmt: skip
        for limit in limits:
            counts.interventions[limit] += 1
        safe_slot = self.state.safe_slot = self._guard is not None and self._guard.safe_now(snapshot.timestamp)
        if safe_slot:
            weights = plane.safe_weights
        self._decided_at, self._weights = snapshot.timestamp, weights
        in_force = info["weights_in_force"]
        servers = region_labels(plane.region, known)
        self.state.step = Step(
            None if proposed is None else proposed[:known], weights[:known], in_force[:known], snapshot.active[:known],
            snapshot.stats[:known], info["safe_weights"], servers, plane.states.copy(),
            plane.region.real_features,
        )  # fmt: skip
        written_at = self._try_policy(plane, snapshot, before, weights) if self._trial_is_due() else None
        after: Snapshot | None = None
        acting = self._policy if self._distrust is None else self._fallback
        try:
            with self._interruptible():
                after = plane.step(weights, index=None if safe_slot else self._index(acting, weights))
        except (DataPlaneTimeout, RegionFormatError) as error:
            self._note_silence(error)
        counts.steps += 1
        self._steps_left -= 1
        latency = max(0, (written_at or plane.written_at) - seen_at) / 1e9
        self._summary.latencies.append(latency)
        if self.metrics is not None:
            self.metrics.latency.observe(latency)
        if self.shadow is not None:
            self.shadow.add(
                snapshot.timestamp, int(snapshot.sequence_id), servers, weights[:known], in_force[:known],
                snapshot.active[:known], snapshot.stats[:known], safe=info["safe_weights"],
                fallback=self._distrust is not None,
            )  # fmt: skip
        if logger.isEnabledFor(_DEBUG):
            self._log(
                _DEBUG, "step",
                sequence_id=snapshot.sequence_id, timestamp=snapshot.timestamp, servers=servers,
                weights=weights[:known],
                proposed=None if proposed is None else proposed[:known], in_force=in_force[:known],
                active=snapshot.active[:known], safe_weights=info["safe_weights"], limits=limits,
                fallback=self._distrust is not None, latency=latency,
                action_delay=math.nan if after is None else plane.info["action_delay"],
                missed=0 if after is None else plane.info["missed_observations"],
            )  # fmt: skip
        if after is not None:
            self._note_observation(plane)
            self._compare(plane, after, safe_slot)
        return after

    def _part_of_the_way(
        self, plane: SharedMemoryDataPlane, proposed: NDArray[np.float64], active: NDArray[np.bool_]
    ) -> NDArray[np.float64]:
        """Weights between the safe ones and the proposed, whose shares differ from the safe ones' by a part of that."""
        config = self.config
        driven = time.monotonic() - self._driving_since
        share = self.state.share = config.share * (min(driven / config.ramp, 1.0) if config.ramp else 1.0)
        if share == 1.0 or not active.any():
            return proposed
        safe = plane.safe_weights
        # Safe weights that are 0 for every active server say nothing of them.
        start = shares(safe if safe[active].any() else np.ones(len(safe)), active)
        target = shares(proposed, active)
        mixed: NDArray[np.float64] = ((1.0 - share) * start + share * target) * active.sum()
        return mixed

    def _index(self, acting: Agent, weights: NDArray[np.float64]) -> NDArray[np.float64] | None:
        """What goes with the weights to a data plane that dispatches by index; background loads by the share, too."""
        index = acting.index(weights)
        return index if index is None else index * (1.0, self.state.share)

    def _compare(self, plane: SharedMemoryDataPlane, after: Snapshot, safe_slot: bool) -> None:
        """Tell the rollback guard of a step."""
        if self._guard is None:
            return
        info, before, self._completed = plane.info, self._completed, after.completed
        if info["producer_restarted"] or info["clock_jumped"] or before is None or len(before) != len(after.completed):
            self._guard.restart()
            return
        finished = np.maximum(after.completed - before, 0).astype(np.float64)
        self.alarm = self._guard.observe(
            after.timestamp, safe_slot, info["completed"], info["rejected"], info["fct_mean"], after.stats, finished
        )
        self.state.evidence.update(
            {self.config.rollback_metric: self._guard.wealth, "failures": self._guard.failure_wealth}
        )

    def _in_force(self, info: dict[str, Any]) -> NDArray[np.float64]:
        """The weights that the data plane uses, or will use once it has picked up those written last."""
        reported: NDArray[np.float64] = info["weights_in_force"]
        written = self._weights
        if written is None:
            return reported
        if self.config.shadow:
            return written
        picked_up = info["applied_sequence_id"] == info["action_sequence_id"]
        return reported if picked_up or info["safe_weights"] else written

    def _elapsed(self, snapshot: Snapshot) -> float:
        """Seconds of the data plane's clock since the last decision, for which the weights may move."""
        elapsed = snapshot.timestamp - self._decided_at
        return min(elapsed, _MOST_INTERVALS * self._interval) if elapsed >= 0.0 else self._interval

    def _ask(
        self, plane: SharedMemoryDataPlane, snapshot: Snapshot, weights: NDArray[np.float64]
    ) -> NDArray[np.float64] | None:
        """The policy's proposal, None if it fails; ``_failures`` counts the failures in a row."""
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
            details = {} if self._failures else {"traceback": traceback.format_exc()}
            self._log(level, "policy_error", f"{_name_of(error)}: {error}", **details)
        took = time.monotonic() - began
        allowed = self._interval / plane.region.clock_rate
        if took > allowed:
            counts.overruns += 1
            self._log(level, "policy_overrun", seconds=took, allowed=allowed)
        good = proposed is not None and took <= allowed
        self._failures = 0 if good else self._failures + 1
        return proposed

    def _ask_fallback(
        self, plane: SharedMemoryDataPlane, snapshot: Snapshot, weights: NDArray[np.float64]
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
        self._notifier.notify(f"STATUS=driving region {self.config.shm} by fallback {self._fallback.name}: {message}")
        self._log(_WARNING, "fallback", f"{message}; {self._fallback.name!r} decides", why=why)

    def _trial_is_due(self) -> bool:
        if self._distrust is None or (self._distrust == "policy" and not self.config.recover):
            return False
        self._rest -= 1
        return self._rest < 0

    def _try_policy(
        self,
        plane: SharedMemoryDataPlane,
        snapshot: Snapshot,
        before: NDArray[np.float64],
        weights: NDArray[np.float64],
    ) -> int:
        """Try whether the policy works again; return the instant at which the fallback's weights were written."""
        # Write first: the trial may take long.
        plane.write(weights, index=self._fallback.index(weights))
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
            self._notifier.notify(f"STATUS=driving region {self.config.shm}")
            self._log(_INFO, "policy_back", f"policy {self._policy.name!r} decides again", good_steps=self._good)
        return written_at

    def _usually_missed(self, plane: SharedMemoryDataPlane) -> int:
        """Deadlines without an observation of their own between two publications, where those are rarer than steps."""
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

    def _note_observation(self, plane: SharedMemoryDataPlane) -> None:
        """React to what an observation reports beside the servers' features."""
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
        if self.metrics is not None and not self.config.shadow and math.isfinite(info["action_delay"]):
            self.metrics.delay.observe(max(0.0, info["action_delay"]))
        if info["producer_restarted"]:
            counts.restarts += 1
            region = plane.region
            self._log(_WARNING, "producer_restarted", producer_pid=region.producer_pid, driver=region.driver)
            self._check_features(plane)
            self._set_lease(plane)
        if info["clock_jumped"]:
            counts.jumps += 1
            self._log(_WARNING, "clock_jumped")
        joined = plane.num_servers != self._servers
        if joined:
            names = region_labels(plane.region, plane.known_servers)
            self._log(_INFO, "servers_joined", servers=plane.num_servers, joined=names[self._servers :])
            self._fit(plane)
        if joined or info["producer_restarted"] or info["clock_jumped"]:
            # The past says nothing about what comes.
            self._forget = True
            self._fallback.reset()
            self._weights = None
            self._decided_at = math.nan

    def _withdraw(self, plane: SharedMemoryDataPlane) -> None:
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
    """Counts and latencies since the summary was begun."""

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
        fields: dict[str, Any] = {"seconds": self.age}
        fields |= {name: getattr(self._counts, name) - getattr(self._before, name) for name in names}
        if self.latencies:
            fields |= {"latency_mean": np.mean(self.latencies), "latency_p99": np.quantile(self.latencies, 0.99)}
        return fields


def _name_of(error: Exception) -> str:
    return type(error).__name__
