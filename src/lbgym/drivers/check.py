"""Hold a driver to the contract from outside: ``python -m lbgym.drivers.check NAME``.

The driver, in whatever language, runs; the suite watches its region and then drives it as an agent would, with good and
with spoilt actions. Each check is one line with its verdict.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import mmap
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import checks
from ..errors import LbgymError, RegionBusyError, RegionFormatError
from ..features import FEATURE_NAMES
from ..sharedmemory import ObservationBuffer, ServerState, SharedMemoryRegion, abi, seqlock
from .base import TAKES_FLOWS

_NS = 1_000_000_000
#: Publications within which an action must be in force: one may be under way when it is written.
_PUBLICATIONS = 2
#: Publications for which a server with a background load of so many flows must take none.
_FLOW_PUBLICATIONS, _LARGE = 8, 1e6
#: Observations that are laid on one grid.
_STRETCH = 64
#: Longest wait between looks at the heartbeat, seconds.
_LOOK = 0.05

#: The checks, in order, and what each demands.
CHECKS = {
    "region": "a region of a known version with a live producer",
    "publications": "something new is published all the time",
    "sequence": "sequence ids grow by one",
    "heartbeat": "a sign of life at least every second, or every three intervals",
    "grid": "timestamps at whole publish intervals, without drift, at the clock's rate",
    "counters": "counters never go back",
    "flows": "started = completed + rejected + failed + open",
    "features": "features finite, at least 0, and 0 where they are not real",
    "inactive": "rows of inactive servers are zero",
    "servers": "names unique, states valid and in agreement with who takes flows",
    "ground truth": "CPU and memory use from 0 to 1",
    "action": "weights in force, and their id published, within two publications",
    "bad actions": "actions that no agent may write do no harm",
    "index": "no flows for a server with a large background load, where a data plane takes index parameters",
    "lease": "the safe weights in force when the lease ends",
    "end": "SIGTERM closes and removes the region",
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of one check.

    Attributes:
        check: a key of ``CHECKS``.
        passed: None: not made.
        detail: one line.
    """

    check: str
    passed: bool | None
    detail: str

    def __str__(self) -> str:
        word = {True: "ok", False: "FAILED", None: "skipped"}[self.passed]
        return f"{word:8}{self.check:14}{self.detail}"


class _Failed(Exception):
    """A check has failed; the message says how."""


class _Unreadable(_Failed):
    """An observation that no data plane may publish, by the check that it fails."""

    def __init__(self, check: str, message: str) -> None:
        super().__init__(message)
        self.check = check


@dataclass(slots=True)
class _Frame:
    """A copy of one observation."""

    sequence_id: int
    timestamp: int
    published_at: int
    applied: int | None
    safe: bool
    active: NDArray[np.bool_]
    stats: NDArray[np.float32]
    counters: NDArray[np.int64]
    totals: tuple[int, int, int]
    weights: NDArray[np.float64]
    safe_weights: NDArray[np.float64]
    states: NDArray[np.uint8]
    ground_truth: NDArray[np.float32] | None

    @classmethod
    def of(cls, buffer: ObservationBuffer) -> _Frame:
        n = buffer.num_servers
        return cls(
            buffer.sequence_id, buffer.timestamp_ns, buffer.published_at, buffer.applied_sequence_id, buffer.safe,
            buffer.active[:n].copy(), buffer.stats[:n].copy(), buffer.counters[:n].astype(np.int64),
            (buffer.unrouted, buffer.fct_count, buffer.fct_sum_ns), buffer.weights[:n].copy(),
            buffer.safe_weights[:n].copy(), buffer.states[:n].copy(),
            buffer.ground_truth[:n].copy() if buffer.has_ground_truth else None,
        )  # fmt: skip


def check_driver(
    name: str, *, observations: int = 24, timeout: float = 10.0, drive: bool = True, end: bool = False
) -> list[Verdict]:
    """Check the running driver of region ``name`` and return a verdict per check.

    It becomes the region's agent for a moment, and leaves it with the safe weights in force.

    Args:
        name: of the region.
        observations: to watch, at least 8.
        timeout: seconds to wait for a publication, and for the driver's end.
        drive: also write actions. False: only look.
        end: also end the driver by SIGTERM.

    Raises:
        InvalidOptionError: for an argument out of its range.
    """
    checks.whole("observations", observations, low=8, high=100_000)
    checks.seconds("timeout", timeout)
    try:
        region = SharedMemoryRegion.attach(name, timeout=timeout, live=True)
    except LbgymError as error:
        return [Verdict("region", False, str(error))]
    with region:
        # So that the first action is not late by what loading its kernel takes.
        seqlock.warm_up()
        return list(_Suite(region, observations, timeout).run(drive, end))


class _Suite:
    """The checks of one region."""

    def __init__(self, region: SharedMemoryRegion, observations: int, timeout: float) -> None:
        self._region, self._count, self._timeout = region, observations, timeout
        self._buffer = region.new_buffer()
        self._period = region.publish_interval / region.clock_rate  # seconds of real time
        self._seen = 0
        #: Age of the driver's heartbeat at its oldest, while waiting for each observation.
        self._beats: list[float] = []
        self._skipped: list[int] = []

    def run(self, drive: bool, end: bool) -> Iterator[Verdict]:
        region = self._region
        major, minor = region.version
        yield Verdict(
            "region",
            True,
            f"version {major}.{minor}, driver {region.driver!r}, process {region.producer_pid}, an observation every "
            f"{region.publish_interval:g} s at {region.clock_rate:g} times real time",
        )
        try:
            frames = [self._next() for _ in range(self._count)]
        except _Unreadable as error:
            # What cannot be read cannot be checked further.
            yield Verdict(error.check, False, str(error))
            yield from (Verdict(check, None, "observations cannot be read") for check in CHECKS if check != error.check)
            return
        except _Failed as error:
            yield Verdict("publications", False, str(error))
            return
        yield Verdict("publications", True, f"{len(frames)} observed")
        for check in ("sequence", "heartbeat", "grid", "counters", "flows", "features", "inactive", "servers"):
            yield self._verdict(check, frames)
        yield self._verdict("ground truth", frames)
        for check in ("action", "bad actions", "index", "lease"):
            if drive:
                yield self._verdict(check, frames)
            else:
                yield Verdict(check, None, "only looked")
        region.unlock_agent()
        yield self._verdict("end", frames) if end else Verdict("end", None, "the driver goes on")

    def _verdict(self, check: str, frames: Sequence[_Frame]) -> Verdict:
        try:
            return Verdict(check, True, getattr(self, f"_{check.replace(' ', '_')}")(frames))
        except _Failed as error:
            return Verdict(check, False, str(error))
        except RegionBusyError as error:
            return Verdict(check, None, str(error))

    # Reading

    def _next(self) -> _Frame:
        """The next observation, also if more have been published since."""
        region, deadline = self._region, time.monotonic() + self._timeout
        self._beats.append(0.0)
        while region.latest == self._seen:
            self._beats[-1] = max(self._beats[-1], region.heartbeat_age)
            if region.closed_by_producer:
                raise _Failed("the driver has closed the region")
            if time.monotonic() >= deadline:
                raise _Failed(f"nothing new within {self._timeout:g} s, the last observation is number {self._seen}")
            region.wait_observation(self._seen, min(_LOOK, self._period))
        self._beats[-1] = max(self._beats[-1], region.heartbeat_age)
        try:
            # The ring keeps three for sure; a reader that was away for longer goes on with the newest.
            for wanted in range(self._seen + 1 if self._seen else region.latest, region.latest + 1):
                if region.read_earlier(self._buffer, wanted):
                    if self._seen and wanted > self._seen + 1 and region.latest - self._seen <= abi.NUM_FRAMES - 1:
                        self._skipped.append(self._seen + 1)
                    self._seen = wanted
                    return _Frame.of(self._buffer)
            if not region.read_into(self._buffer):
                raise _Failed("no observation can be read")
        except RegionFormatError as error:
            raise _Unreadable(*_blame(self._buffer, error)) from None
        except RegionBusyError as error:
            raise _Failed(str(error)) from None
        self._seen = self._buffer.sequence_id
        return _Frame.of(self._buffer)

    # Watching

    def _sequence(self, frames: Sequence[_Frame]) -> str:
        ids = [frame.sequence_id for frame in frames]
        if self._skipped:
            raise _Failed(f"observation {self._skipped[0]} was never published")
        for before, after in pairwise(ids):
            if after <= before:
                raise _Failed(f"observation {after} follows {before}")
        return f"{ids[0]} to {ids[-1]}"

    def _heartbeat(self, frames: Sequence[_Frame]) -> str:
        most = max(1.0, 3.0 * self._period)
        # A busy machine may hold a driver up for seconds, now and then; one that seldom beats does so all the time.
        typical, oldest = float(np.quantile(self._beats, 0.9)), max(self._beats)
        if typical > most:
            raise _Failed(f"the last sign of life was {typical:.3g} s old, allowed are {most:.3g} s")
        return f"at most {oldest:.3g} s old" + (f", nine times of ten {typical:.3g} s" if oldest > most else "")

    def _grid(self, frames: Sequence[_Frame]) -> str:
        interval = self._region.publish_interval
        times = np.array([frame.timestamp for frame in frames], np.float64) / _NS
        steps = np.diff(times) / interval
        if (steps <= 0.0).any():
            at = int(np.argmin(steps))
            raise _Failed(f"the timestamp goes from {times[at]:.9g} s to {times[at + 1]:.9g} s")
        period, fit, fit_of_interval = _best_period((times - times[0]) / interval)
        # On a busy machine observations are late, and nothing fits well.
        if abs(period - 1.0) > 0.05 and fit > max(0.7, fit_of_interval + 0.2):
            raise _Failed(f"observations are {interval * period:.4g} s apart where the interval is {interval:g} s")
        # One that was published late is no clock that runs wrong.
        published = np.array([frame.published_at for frame in frames], np.float64) / _NS * self._region.clock_rate
        third = max(1, len(frames) // 3)
        shown, passed = (float(np.median(each[-third:]) - np.median(each[:third])) for each in (times, published))
        if passed > 0.0 and not 0.2 < shown / passed < 1.5:
            raise _Failed(f"{shown:.4g} s went by on the data plane's clock, it should have been {passed:.4g} s")
        return f"{interval * float(np.median(steps)):.4g} s apart in the median, the interval is {interval:g} s"

    def _counters(self, frames: Sequence[_Frame]) -> str:
        for before, after in pairwise(frames):
            n = min(len(before.counters), len(after.counters))
            back = np.argwhere(after.counters[:n] < before.counters[:n])
            if len(back):
                server, column = back[0]
                raise _Failed(
                    f"{abi.COUNTER_NAMES[column]} of server {server} goes from {before.counters[server, column]} to "
                    f"{after.counters[server, column]} in observation {after.sequence_id}"
                )
            for label, old, new in zip(("unrouted", "fct_count", "fct_sum"), before.totals, after.totals, strict=True):
                if new < old:
                    raise _Failed(f"{label} goes from {old} to {new} in observation {after.sequence_id}")
        flows = frames[-1].counters.sum(axis=0) - frames[0].counters[: len(frames[-1].counters)].sum(axis=0)
        return f"{flows[0]} flows started meanwhile, {flows[1:].sum()} ended"

    def _flows(self, frames: Sequence[_Frame]) -> str:
        for frame in frames:
            started, completed, rejected, failed = frame.counters.T
            is_open = started - completed - rejected - failed
            if (is_open < 0).any():
                server = int(np.argmin(is_open))
                raise _Failed(
                    f"server {server} has ended {-is_open[server]} flows more than it was sent, in observation "
                    f"{frame.sequence_id}"
                )
            wrong = frame.active & (is_open != np.round(frame.stats[:, 0]))
            if wrong.any() and "n_flow_on" in self._region.real_features:
                server = int(np.argmax(wrong))
                raise _Failed(
                    f"server {server} has {frame.stats[server, 0]:g} open flows, by its counters {is_open[server]}, in "
                    f"observation {frame.sequence_id}"
                )
        return f"{int(frames[-1].stats[:, 0].sum())} open"

    def _features(self, frames: Sequence[_Frame]) -> str:
        # Numbers that are negative or not finite are refused by the reader before.
        real = self._region.real_features
        unreal = np.array([name not in real for name in FEATURE_NAMES])
        for frame in frames:
            if frame.stats[:, unreal].any():
                column = int(np.argmax(frame.stats.any(axis=0) & unreal))
                raise _Failed(f"{FEATURE_NAMES[column]} is declared as not real, and is not 0")
        return f"{int((~unreal).sum())} of {len(unreal)} are real"

    def _inactive(self, frames: Sequence[_Frame]) -> str:
        for frame in frames:
            filled = ~frame.active & frame.stats.any(axis=1)
            if filled.any():
                server = int(np.argmax(filled))
                raise _Failed(f"server {server} is inactive and has features, in observation {frame.sequence_id}")
        return f"{int((~frames[-1].active).sum())} of {len(frames[-1].active)} servers are inactive"

    def _servers(self, frames: Sequence[_Frame]) -> str:
        names = [name for name in self._region.server_names if name]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise _Failed(f"two servers are called {min(twice)!r}")
        takes = [int(state) for state in TAKES_FLOWS]
        for frame in frames:
            known = frame.states <= max(ServerState)
            if not known.all():
                raise _Failed(f"server {int(np.argmin(known))} has the unknown state {frame.states[np.argmin(known)]}")
            wrong = (frame.active & ~np.isin(frame.states, takes)) | (~frame.active & (frame.states == ServerState.UP))
            if wrong.any():
                server = int(np.argmax(wrong))
                state = ServerState(frame.states[server]).name.lower()
                takes_flows = "takes flows" if frame.active[server] else "takes no flows"
                raise _Failed(f"server {server} is {state} and {takes_flows}, in observation {frame.sequence_id}")
        return f"{len(names)} of {len(frames[-1].active)} have names"

    def _ground_truth(self, frames: Sequence[_Frame]) -> str:
        for frame in frames:
            if frame.ground_truth is not None and (frame.ground_truth[:, :2] > 1.0).any():
                server = int(np.argmax(frame.ground_truth[:, :2].max(axis=1)))
                raise _Failed(
                    f"CPU and memory use of server {server} are {frame.ground_truth[server, :2].tolist()}, in "
                    f"observation {frame.sequence_id}"
                )
        return "none" if frames[-1].ground_truth is None else "published"

    # Driving

    def _new_id(self) -> int:
        """An action id that is not in force already."""
        region = self._region
        region.lock_agent()
        applied = self._buffer.applied_sequence_id or 0
        newest = None
        with contextlib.suppress(LbgymError):
            newest = region.read_action()
        return max(applied, newest.sequence_id if newest is not None else 0) + 1

    def _act(self, weights: ArrayLike, lease: float, index: ArrayLike | None = None) -> tuple[int, int]:
        """Write an action; returns its id and since when it has been there, ns of the monotonic clock.

        This process may have been held up for many publications since the instant that the action bears.
        """
        number = self._new_id()
        self._region.write_action(sequence_id=number, weights=weights, lease=lease, index=index)
        return number, time.monotonic_ns()

    def _published_after(self, instant: int, count: int) -> list[_Frame]:
        """The first ``count`` observations published after an instant of the monotonic clock.

        Those at the heels of another, by which a driver catches up that was held up, count as one with it.
        """
        frames: list[_Frame] = []
        apart = 0.5 * self._period * _NS
        while len(frames) < count:
            frame = self._next()
            if frames and frame.published_at - frames[-1].published_at < apart:
                frames[-1] = frame
            elif frame.published_at > instant:
                frames.append(frame)
        return frames

    def _action(self, frames: Sequence[_Frame]) -> str:
        n = len(frames[-1].active)
        longest = 0
        for turn in range(3):
            weights = 1.0 + (np.arange(n) + turn) % 3
            number, written = self._act(weights, math.inf)
            for seen in self._published_after(written, _PUBLICATIONS):
                longest = max(longest, seen.published_at - written)
                if seen.applied == number and not seen.safe:
                    break
            else:
                raise _Failed(
                    f"{_PUBLICATIONS} observations after action {number} was written, action {seen.applied} is in force"
                    f"{' and the safe weights are' if seen.safe else ''}"
                )
            if not np.array_equal(seen.weights[:n], weights):
                raise _Failed(
                    f"the weights {_shown(weights)} were given, {_shown(seen.weights)} are said to be in force"
                )
        return f"3 actions, in force after at most {longest / _NS:.3g} s"

    def _bad_actions(self, frames: Sequence[_Frame]) -> str:
        n = len(frames[-1].active)
        good = 1.0 + np.arange(n) % 2
        self._act(good, math.inf)
        kinds = ["NaN", "negative", "all 0", "too many", "alias out of range", "half-written"]
        if self._region.takes_index:
            kinds += ["index of NaN", "index without a speed"]
        for what in kinds:
            number = self._new_id() + 1000
            with _Vandal(self._region) as vandal:
                written = vandal.write(what, number, n)
                try:
                    seen = self._published_after(written, _PUBLICATIONS)[-1]
                except _Failed as error:
                    raise _Failed(f"after a bad action ({what}): {error}") from None
            if seen.applied == number:
                raise _Failed(f"a bad action ({what}) is said to be in force")
            fine = [seen.safe_weights, good] if not seen.safe else [seen.safe_weights]
            if not any(np.array_equal(seen.weights, weights) for weights in fine):
                raise _Failed(f"after a bad action ({what}), {_shown(seen.weights)} are in force")
            number, written = self._act(good, math.inf)
            if self._published_after(written, _PUBLICATIONS)[-1].applied != number:
                raise _Failed(f"after a bad action ({what}) a good one is not taken up")
        return f"{len(kinds)} kinds are ignored, and a good action after each is taken up"

    def _index(self, frames: Sequence[_Frame]) -> str:
        if not self._region.takes_index:
            return "none: the data plane takes weights only"
        servers = np.flatnonzero(frames[-1].active)
        if len(servers) < 2:
            return "not tried: fewer than two servers take flows"
        n = len(frames[-1].active)
        shunned, begun = int(servers[0]), 0
        index = np.stack([np.ones(n), np.zeros(n)], axis=1)
        index[shunned, 1] = _LARGE
        number, written = self._act(np.ones(n), math.inf, index)
        before, *seen = self._published_after(written, _PUBLICATIONS + _FLOW_PUBLICATIONS)[_PUBLICATIONS - 1 :]
        if before.applied != number or before.safe:
            raise _Failed(
                f"action {number}, which has index parameters, is not in force after {_PUBLICATIONS} observations"
            )
        for frame in seen:
            placed = frame.counters[:n, 0] - before.counters[:n, 0]
            begun = int(placed.sum())
            if placed[shunned]:
                raise _Failed(
                    f"server {shunned} has taken {placed[shunned]} of {begun} flows with a background load of "
                    f"{_LARGE:g} flows, where the others have none"
                )
        return f"none of {begun} flows for server {shunned} with a background load of {_LARGE:g}"

    def _lease(self, frames: Sequence[_Frame]) -> str:
        n = len(frames[-1].active)
        weights = 2.0 + (np.arange(n) % 3)
        lease = max(0.1, 4.0 * self._period)
        begun = time.monotonic_ns()
        number, written = self._act(weights, lease)
        # The lease begins between the two.
        ends = written + round(lease * _NS)
        seen = self._published_after(written, _PUBLICATIONS)[-1]
        if seen.published_at < begun + round(lease * _NS) and (seen.applied != number or seen.safe):
            raise _Failed(f"the weights of action {number} are not in force during their lease of {lease:.3g} s")
        seen = self._published_after(ends, _PUBLICATIONS)[-1]
        late = (seen.published_at - ends) / _NS
        if not seen.safe:
            raise _Failed(f"{late:.3g} s after the lease of {lease:.3g} s ended, the safe weights are not in force")
        if not np.array_equal(seen.weights, seen.safe_weights):
            raise _Failed(f"the safe weights are {_shown(seen.safe_weights)}, in force are {_shown(seen.weights)}")
        return f"safe weights in force at most {late:.3g} s after a lease of {lease:.3g} s"

    def _end(self, frames: Sequence[_Frame]) -> str:
        region, begun = self._region, time.monotonic()
        try:
            os.kill(region.producer_pid, signal.SIGTERM)
        except OSError as error:
            raise _Failed(f"process {region.producer_pid} cannot be signalled: {error.strerror}") from error
        deadline = begun + self._timeout
        while not region.closed_by_producer and time.monotonic() < deadline:
            if not region.producer_alive:
                time.sleep(_LOOK)
                if not region.closed_by_producer:
                    raise _Failed("the driver ended and has not closed the region, as if it had been killed")
            time.sleep(_LOOK / 10)
        if not region.closed_by_producer:
            raise _Failed(f"the driver goes on {self._timeout:g} s after SIGTERM")
        while region.path.exists() and not region.replaced:
            if time.monotonic() >= deadline:
                raise _Failed(f"the driver has closed the region, but its file {region.path} is still there")
            time.sleep(_LOOK / 10)
        return f"after {time.monotonic() - begun:.2g} s"


def _blame(buffer: ObservationBuffer, error: RegionFormatError) -> tuple[str, str]:
    """The check that a refused observation fails, and why; the reader leaves what it refuses in the buffer."""
    n = buffer.num_servers
    if not 0 < n <= buffer.capacity:
        return "region", f"an observation of {n} servers, there is room for {buffer.capacity}"
    for check, name, values in (
        ("features", "features", buffer.stats[:n]),
        ("ground truth", "ground truth", buffer.ground_truth[:n]),
        ("action", "weights in force", buffer.weights[:n, None]),
        ("lease", "safe weights", buffer.safe_weights[:n, None]),
    ):
        with np.errstate(invalid="ignore"):
            bad = np.argwhere(~(np.isfinite(values) & (values >= 0.0)))
        if len(bad) and (name != "ground truth" or buffer.has_ground_truth):
            server, column = bad[0]
            label = FEATURE_NAMES[column] if check == "features" else name
            return check, f"{label} of server {server} is {values[server, column]:g}"
    if (buffer.counters[:n] >> np.uint64(63)).any():
        return "counters", "a counter is negative or beyond 2**63"
    return "region", str(error)


def _best_period(times: NDArray[np.float64]) -> tuple[float, float, float]:
    """The period, in intervals, that instants are nearest to whole multiples of, whatever is late or left out.

    Args:
        times: in intervals, float64[N].

    Returns:
        The period, from 0.4 to 2.5; how well it fits, from 0 to 1 (the mean of the instants' phases as unit vectors);
        how well the interval does.
    """
    periods = np.arange(400, 2501) / 1000
    # Over many instants even the nearest of these periods would lose step.
    parts = np.array_split(times, -(-len(times) // _STRETCH))
    fits = np.mean([np.abs(np.exp(2j * np.pi * part / periods[:, None]).mean(axis=1)) for part in parts], axis=0)
    best = int(np.argmax(fits))
    return float(periods[best]), float(fits[best]), float(fits[periods == 1.0].item())


def _shown(weights: NDArray[np.floating[Any]]) -> str:
    return "[" + ", ".join(f"{w:g}" for w in weights[:8]) + (", ...]" if len(weights) > 8 else "]")


class _Vandal:
    """Writes actions that no agent may write, past all checks, straight into the file."""

    def __init__(self, region: SharedMemoryRegion) -> None:
        self._region = region

    def __enter__(self) -> _Vandal:
        region = self._region
        with region.path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 0)
        self._bytes = np.frombuffer(self._memory, np.uint8)
        self._header = self._bytes[: abi.HEADER.size].view(abi.HEADER.dtype)
        self._half: NDArray[np.uint64] | None = None
        return self

    def write(self, what: str, number: int, num_servers: int) -> int:
        """Write one and return since when it has been there, ns of the monotonic clock."""
        _region, layout = self._region, self._region.layout
        count = int(self._header["action_count"][0]) + 1
        first = layout.actions_offset + count % abi.NUM_ACTIONS * layout.action_size
        slot = self._bytes[first : first + layout.action_size]
        lock = slot[:8].view(np.uint64)
        head = slot[: abi.ACTION.size].view(abi.ACTION.dtype)
        lock[0] += np.uint64(1 + int(lock[0]) % 2)
        head["sequence_id"], head["written_at"], head["lease"] = number, time.monotonic_ns(), 0
        n = layout.capacity + 1 if what == "too many" else num_servers
        head["num_servers"] = n

        def section(name: str, dtype: type, columns: int = 1) -> NDArray[Any]:
            at = layout.action_sections[name]
            return slot[at : at + np.dtype(dtype).itemsize * columns * num_servers].view(dtype)

        head["flags"] = 0
        weights = section("weights", np.float64)
        weights[:] = 5.0
        section("threshold", np.uint32)[:] = 0
        section("alias", np.uint32)[:] = np.arange(num_servers)
        if what == "NaN":
            weights[0] = np.nan
        elif what == "negative":
            weights[-1] = -1.0
        elif what == "all 0":
            weights[:] = 0.0
        elif what == "alias out of range":
            section("alias", np.uint32)[0] = layout.capacity
        elif what.startswith("index"):
            head["flags"] = abi.FLAG_INDEX
            index = section("index", np.float64, 2)
            index[:] = 1.0
            index[0] = np.nan if what == "index of NaN" else 0.0
        if what == "half-written":
            self._half = lock
        else:
            lock[0] += np.uint64(1)
        self._header["action_count"] = count
        self._header["action_event"] += 1
        return time.monotonic_ns()

    def __exit__(self, *_: object) -> None:
        if self._half is not None:
            # Whole again, as the next agent makes it.
            self._half[0] += np.uint64(1)
        self._half = None
        del self._bytes, self._header


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns 0 if no check failed, 1 if one did, 2 for bad arguments."""
    parser = argparse.ArgumentParser(prog="python -m lbgym.drivers.check", description=__doc__.split("\n")[0])
    parser.add_argument("name", help="of the region")
    parser.add_argument("--observations", type=int, default=24, help="observations to watch (default: 24)")
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds to wait for each (default: 10)")
    parser.add_argument("--only-look", action="store_true", help="write no actions")
    parser.add_argument("--end", action="store_true", help="also end the driver by SIGTERM")
    given = parser.parse_args(arguments)
    try:
        verdicts = check_driver(
            given.name,
            observations=given.observations,
            timeout=given.timeout,
            drive=not given.only_look,
            end=given.end,
        )
    except LbgymError as error:
        parser.error(str(error))
    for verdict in verdicts:
        sys.stdout.write(f"{verdict}\n")
    return int(any(verdict.passed is False for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
