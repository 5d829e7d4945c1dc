"""The loop that every driver shares: :class:`Publisher`."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from .. import checks
from ..errors import InvalidOptionError, LbgymError
from ..features import FEATURE_NAMES, GROUND_TRUTH_NAMES
from ..sharedmemory import SharedMemoryRegion, seqlock, system
from .base import DriverError, ServerRow, Source
from .control import ControlServer

logger = logging.getLogger("lbgym")

_NS = 1_000_000_000
#: Longest sleep before another look at leases, requests and ``stop``, and between heartbeats; seconds (real time).
_LOOK = 0.1
#: With several regions: longest sleep before another look at their actions, seconds (real time).
_POLL = 0.001
#: Least time between warnings of one kind, seconds (real time).
_WARN = 10.0
_COUNTERS = ("started", "completed", "rejected", "failed")


class Publisher:
    """Publishes data planes in shared memory and puts their agents' weights in force.

    One region per data plane, all on one grid of publications. All regions exist, and hold the observation of time 0,
    when the constructor returns; time begins to pass with :meth:`run` or :meth:`serve`.

    * Publications are due at whole multiples of the interval, so that a late one does not delay the next.
    * An agent's weights are applied when it writes them: it wakes the publisher (with several regions, actions are
      looked up every millisecond, or four times per interval if that is more often). They stay in force for their
      lease; then the rows' own weights, the safe ones, are applied within 0.1 s.
    * A data plane that does not answer is not published, since no observation may be made up; weights that it did not
      take are offered again, and no observation claims them before.
    * ``lbgym dataplane ctl`` lists, adds, drains and removes servers through a socket beside each region.
    * At the end the safe weights are applied and the regions closed and removed.

    Args:
        sources: by the name of the region.
        publish_interval: seconds on the data planes' clock between publications, 1e-6 to 86,400.
        clock_rate: seconds of that clock per second; 1 unless time is scaled.
        skip_late: leave out publications that are a whole interval late, as real time demands. False: publish every
            one, and let the clock stand still meanwhile.
        capacity: servers each region has room for; None: 64, or as many as there are if that is more.
        lease: longest time in seconds for which an agent's weights are honoured, whatever lease it asks for.
        mode: permissions of the regions.
        group: owning group of the regions, id or name; None: the process's.

    Attributes:
        regions: one per source, in the same order.
        slips: publications that were more than one interval late; with ``skip_late`` those left out.
        lost: seconds (real time) that the clock stood still or the publications left out would have covered.
        failures: times that a data plane did not answer.

    Raises:
        RegionExistsError: if a name belongs to a live region or to a file that is no region; no region is left then.
        RegionError: for a bad name, or if there is no room or no right to create a region.
        InvalidOptionError, InvalidWeightsError: for a value out of its range.
        DriverError: if a data plane cannot be read.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        *,
        publish_interval: float = 0.25,
        clock_rate: float = 1.0,
        skip_late: bool = True,
        capacity: int | None = None,
        lease: float = math.inf,
        mode: int = 0o600,
        group: int | str | None = None,
    ) -> None:
        if not sources:
            raise InvalidOptionError("a publisher needs at least one data plane")
        seconds = checks.number("publish_interval", publish_interval, low=1e-6, high=86_400.0)
        self._interval = round(seconds * _NS)
        self._rate = checks.number("clock_rate", clock_rate, low=1e-6, high=1e6)
        self._lease = lease if lease == math.inf else checks.seconds("lease", lease)
        self._skip_late = skip_late
        self.slips, self.lost, self.failures = 0, 0.0, 0
        self._tick = 0  # intervals since time 0
        self._published = 0
        self._next_warning: dict[str, int] = {}
        self._reload = False
        for name in sources:
            # A bad name is refused before anything is made or compiled.
            system.path_of(name)
        seqlock.warm_up()
        with ExitStack() as made:
            for source in sources.values():
                made.callback(source.close)
            self._planes = [
                made.enter_context(
                    _Plane(
                        name,
                        source,
                        publish_interval=seconds,
                        clock_rate=self._rate,
                        lease=self._lease,
                        capacity=capacity,
                        mode=mode,
                        group=group,
                    )
                )
                for name, source in sources.items()
            ]
            self.regions: tuple[SharedMemoryRegion, ...] = tuple(plane.region for plane in self._planes)
            for plane in self._planes:
                plane.apply(0.0)
            for plane in self._planes:
                plane.publish(0.0)
            self._published = 1
            self._made = made.pop_all()

    @property
    def publish_interval(self) -> float:
        """Seconds on the data planes' clock between publications."""
        return self._interval / _NS

    @property
    def observations(self) -> int:
        """Publications so far, counted once for all regions."""
        return self._published

    def serve(self, duration: float | None = None) -> None:
        """:meth:`run` until SIGTERM, SIGINT or SIGHUP; SIGHUP reloads the configuration where a source has one.

        For the main thread.

        Raises:
            InvalidOptionError, RegionError: as :meth:`run`.
        """
        with end_signals(self._hang_up if any(plane.source.reloads for plane in self._planes) else None) as stop:
            self.run(stop, duration)

    def _hang_up(self) -> None:
        self._reload = True

    def run(self, stop: threading.Event | None = None, duration: float | None = None) -> None:
        """Let time pass.

        Args:
            stop: end when it is set, within 0.1 s.
            duration: end with the last publication of these seconds (data planes' clock); None: go on until ``stop``.

        Raises:
            InvalidOptionError: for a duration that is no number of seconds.
            RegionError: if the publisher is closed.
        """
        last: float = math.inf
        if duration is not None:
            seconds = checks.number("duration", duration, low=0.0, high=1e12)
            last = self._tick + int(seconds * _NS + 0.5) // self._interval
        # Ns of the monotonic clock when the data planes' clock showed 0.
        self._origin = time.monotonic_ns() - self._real(self._tick * self._interval)
        while self._tick < last and not (stop is not None and stop.is_set()):
            due = self._due()
            now = time.monotonic_ns()
            if now < due:
                self._wait((due - now) / _NS)
                now = time.monotonic_ns()
            self._serve_requests()
            self._take_actions()
            if now >= due:
                self._publish(due, last)

    def _due(self) -> int:
        """Time of the next publication, ns of the monotonic clock."""
        return self._origin + self._real((self._tick + 1) * self._interval)

    def _real(self, shown: float) -> int:
        """Ns of real time for ns of the data planes' clock."""
        return round(shown / self._rate)

    def _clock(self) -> float:
        """Seconds that the data planes' clock shows; without ``skip_late`` at most those of the next publication."""
        shown = (time.monotonic_ns() - self._origin) * self._rate
        if not self._skip_late:
            shown = min(shown, (self._tick + 1) * self._interval)
        return max(0.0, shown / _NS)

    def _wait(self, left: float) -> None:
        """Sleep until an agent acts, at most ``left`` seconds."""
        left = min(left, _LOOK)
        if len(self.regions) > 1:
            left = min(left, _POLL, max(_POLL / 10, self.publish_interval / self._rate / 4))
        self.regions[0].wait_action(left)

    def _take_actions(self) -> None:
        """Apply the weights that are to be in force by now, where they have changed."""
        wanted = [plane for plane in self._planes if plane.look()]
        if wanted:
            now = self._clock()
            for plane in wanted:
                with self._trouble(plane):
                    plane.apply(now)

    def _publish(self, due: int, last: float) -> None:
        self._tick += 1
        if self._skip_late:
            late = time.monotonic_ns() - due
            left_out = min(late // max(1, self._real(self._interval)), max(0, last - self._tick))
            if left_out > 0:
                self._tick += int(left_out)
                self._slipped(int(left_out), left_out * self.publish_interval / self._rate, late)
            shown = self._clock()
        else:
            shown = self._tick * self._interval / _NS
        for plane in self._planes:
            with self._trouble(plane):
                if plane.pending:
                    plane.apply(shown)
                plane.publish(shown)
        self._published += 1
        late = time.monotonic_ns() - due
        if not self._skip_late and late > self._real(self._interval):
            self._origin += late
            self._slipped(1, late / _NS, late)

    @contextmanager
    def _trouble(self, plane: _Plane) -> Iterator[None]:
        """A data plane that does not answer is warned of and tried again."""
        try:
            yield
        except (DriverError, OSError) as error:
            self.failures += 1
            self._warn(
                f"failure {plane.region.name}",
                "region %r: the data plane does not answer, nothing is published meanwhile: %s (%d failures so far)",
                plane.region.name, error, self.failures,
            )  # fmt: skip

    def _slipped(self, count: int, seconds: float, late: int) -> None:
        self.slips += count
        self.lost += seconds
        consequence = "publications were left out for" if self._skip_late else "its clock has stood still for"
        self._warn(
            "slip",
            "the %s driver does not keep up with an observation every %g s at %g times real time: the last one was "
            "%.3g ms late (%d such so far); %s %.3g s in all",
            self._planes[0].source.driver, self.publish_interval, self._rate, late / 1e6, self.slips, consequence,
            self.lost,
        )  # fmt: skip

    def _warn(self, kind: str, message: str, *values: Any) -> None:
        now = time.monotonic_ns()
        if now >= self._next_warning.get(kind, 0):
            self._next_warning[kind] = now + round(_WARN * _NS)
            logger.warning(message, *values)

    def _serve_requests(self) -> None:
        if self._reload:
            self._reload = False
            for plane in self._planes:
                if plane.source.reloads:
                    try:
                        logger.info("region %r: %s", plane.region.name, plane.source.reload())
                    except (LbgymError, OSError) as error:
                        logger.error("region %r: not reloaded: %s", plane.region.name, error)
        for plane in self._planes:
            plane.poll_control()

    def close(self) -> None:
        """Apply the safe weights, close and remove the regions, and close the sources. Idempotent."""
        self._made.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Plane:
    """One source, its region and its control socket."""

    def __init__(self, name: str, source: Source, *, lease: float, **options: Any) -> None:
        self.source = source
        known = set(FEATURE_NAMES)
        for feature in source.features:
            checks.choice("feature", feature, known, where=f"the features of the {source.driver!r} driver")
        self._unreal = np.array([feature not in source.features for feature in FEATURE_NAMES])
        rows = self._rows = list(source.servers())
        self.region = SharedMemoryRegion.create(
            name,
            num_servers=len(rows),
            safe_weights=_safe_weights(rows),
            features=frozenset(source.features) | frozenset(GROUND_TRUTH_NAMES),
            driver=source.driver,
            takes_index=source.takes_index,
            **options,
        )
        self.region.longest_lease = lease
        self._last: list[NDArray[np.int64]] | None = None
        self._offsets = [np.zeros(len(rows), np.int64) for _ in _COUNTERS]
        self._weights: NDArray[np.float64] | None = None
        self._index: NDArray[np.float64] | None = None
        self._last_totals, self._total_offsets = np.zeros(3), np.zeros(3)
        self.pending = True
        self._now = 0.0
        self._control: ControlServer | None = None
        try:
            self._name_rows([])
            try:
                self._control = ControlServer(name, self._answer)
            except DriverError as error:
                logger.warning("%s", error)
        except BaseException:
            self._end()
            raise

    def _end(self) -> None:
        if self._control is not None:
            self._control.close()
        with self.region:
            pass

    def __enter__(self) -> _Plane:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.region.safe_weights_in_force:
            # A data plane outlives its driver; it shall not go on with the weights of an agent that nobody hears.
            try:
                self.source.apply(_safe_weights(self._rows), self._now)
            except (LbgymError, OSError) as error:
                logger.error("region %r: the safe weights could not be applied: %s", self.region.name, error)
        self._end()

    def look(self) -> bool:
        """Note what is to be in force by now; true if the data plane does not have it yet."""
        wanted = self.region.weights_in_force()
        index = _index_of(wanted, self.region.index_in_force)
        self.region.heartbeat()
        if self._weights is None or not (np.array_equal(wanted, self._weights) and _equal(index, self._index)):
            self._weights, self._index = wanted.copy(), index
            self.pending = True
        return self.pending

    def apply(self, now: float) -> None:
        """Put in force what :meth:`look` found."""
        self._now = now
        self.look()
        assert self._weights is not None
        if self._index is None:
            self.source.apply(self._weights, now)
        else:
            self.source.apply_index(self._weights, self._index, now)
        self.pending = False

    def publish(self, now: float) -> None:
        """Read the data plane and publish it."""
        self._now = now
        reading = self.source.read(now)
        # After the reading, so that states are not older than what it shows.
        self._update_rows()
        if self.pending:
            self.apply(now)
        n = len(self._rows)
        for name in ("active", *_COUNTERS):
            array = getattr(reading, name)
            if np.shape(array) != (n,):
                raise InvalidOptionError(
                    f"{name} of an observation of the {self.source.driver!r} driver must have shape ({n},), one value "
                    f"per server, got {np.shape(array)}"
                )
        started, completed, rejected, failed = self._monotone(
            [np.asarray(getattr(reading, name), np.int64) for name in _COUNTERS]
        )
        totals = np.array([reading.unrouted, reading.fct_count, reading.fct_sum])
        if (totals < self._last_totals).any():
            self._total_offsets = self._total_offsets + self._last_totals
        self._last_totals = totals
        unrouted, fct_count, fct_sum = totals + self._total_offsets
        truth, age = reading.ground_truth, reading.ground_truth_age
        if truth is not None:
            # A row of which something is unknown has no age, and so does not count.
            unknown = np.asarray(np.logical_not(np.isfinite(truth).all(axis=1)))
            age = np.full(n, np.nan) if age is None else np.where(np.isfinite(age), age, np.nan)
            age = np.where(unknown, np.nan, age)
            truth = np.where(unknown[:, None], np.float32(0.0), truth)
            if np.isnan(age).all():
                truth = age = None
        stats = np.where(reading.active[:, None] & ~self._unreal, reading.stats, np.float32(0.0))
        self.region.publish(
            dataclasses.replace(
                reading,
                timestamp=now,
                stats=stats,
                started=started,
                completed=completed,
                rejected=rejected,
                failed=failed,
                unrouted=int(unrouted),
                fct_count=int(fct_count),
                fct_sum=float(fct_sum),
                ground_truth=truth,
                ground_truth_age=age,
            )
        )

    def _monotone(self, counters: list[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
        """Counters since the driver started, also where the data plane has begun again at 0."""
        if self._last is not None:
            n = len(self._last[0])
            restarted = np.zeros(len(counters[0]), np.bool_)
            for now, before in zip(counters, self._last, strict=True):
                restarted[:n] |= now[:n] < before
            if restarted.any():
                started, completed, rejected, _failed = (
                    np.concatenate([array, np.zeros(len(restarted) - n, np.int64)]) for array in self._last
                )
                # What was open then has gone with the counters.
                lost = started, completed, rejected, started - completed - rejected
                for offset, count in zip(self._offsets, lost, strict=True):
                    offset[restarted] += count[restarted]
        self._last = counters
        return [count + offset for count, offset in zip(counters, self._offsets, strict=True)]

    def _update_rows(self) -> None:
        """Take over rows that have changed since the last look."""
        rows = list(self.source.servers())
        before = self._rows
        if rows == before:
            return
        if len(rows) < len(before):
            raise InvalidOptionError(
                f"the {self.source.driver!r} driver had {len(before)} rows and has {len(rows)} now; a row that belongs "
                "to no server any more has an empty name"
            )
        self._rows = rows
        if len(rows) > len(before):
            self.region.set_num_servers(len(rows))
            more = np.zeros(len(rows) - len(before), np.int64)
            self._offsets = [np.concatenate([offset, more]) for offset in self._offsets]
        self._name_rows(before)
        if [row.weight for row in rows] != [row.weight for row in before]:
            self.region.set_safe_weights(_safe_weights(rows))
        self.look()

    def _name_rows(self, before: Sequence[ServerRow]) -> None:
        names = [row.name for row in self._rows if row.name]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise InvalidOptionError(f"the {self.source.driver!r} driver has two servers of the name {twice!r}")
        for i, row in enumerate(self._rows):
            if i >= len(before) or row != before[i]:
                self.region.set_server(i, name=row.name, state=row.state)

    def poll_control(self) -> None:
        """Answer requests that have come through the control socket."""
        if self._control is not None:
            self._control.poll()

    def _answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Do what a request wants and show the servers."""
        op, server = request.get("op"), request.get("server")
        said = ""
        if op in ("add", "drain", "undrain", "remove"):
            if not isinstance(server, str) or not server:
                raise DriverError(f"{op} needs the name of a server, got {server!r}")
            try:
                if op == "add":
                    self.source.add(server, **_new_server(request))
                else:
                    getattr(self.source, op)(server)
            except OSError as error:
                raise DriverError(f"the data plane does not answer: {error}") from error
            said = f"{op} {server}"
            logger.info("region %r: %s, by the control socket", self.region.name, said)
        elif op == "reload":
            said = self.source.reload()
        elif op != "list":
            raise DriverError(f"unknown request {op!r}; there are list, add, drain, undrain, remove and reload")
        rows = self.source.servers()
        return {
            "region": self.region.name,
            "driver": self.source.driver,
            "done": said,
            "servers": [
                {"slot": i, "name": row.name, "state": row.state.name.lower(), "weight": row.weight}
                for i, row in enumerate(rows)
                if row.name
            ],
        }


def _new_server(request: Mapping[str, Any]) -> dict[str, Any]:
    address, port = request.get("address"), request.get("port")
    if not isinstance(address, str) or not address:
        raise DriverError(f"add needs the address of the server, got {address!r}")
    cores = request.get("cores")
    return {
        "address": address,
        "port": None if port is None else checks.whole("port", port, low=1, high=65_535),
        "weight": checks.number("weight", request.get("weight", 1.0), low=0.0),
        "cores": None if cores is None else checks.whole("cores", cores),
    }


def _index_of(weights: NDArray[np.float64], given: NDArray[np.float64] | None) -> NDArray[np.float64] | None:
    """Index parameters of all servers: those that an action says nothing of have one core and no background load."""
    if given is None:
        return None
    index = np.stack([weights, np.zeros(len(weights))], axis=1)
    index[: len(given)] = given
    return index


def _equal(one: NDArray[np.float64] | None, other: NDArray[np.float64] | None) -> bool:
    return one is other if one is None or other is None else np.array_equal(one, other)


def _safe_weights(rows: Sequence[ServerRow]) -> NDArray[np.float64]:
    """The rows' own weights; where all are 0, 1 each."""
    weights = np.array([row.weight for row in rows], np.float64)
    return weights if weights.any() else np.ones(len(rows))


@contextmanager
def end_signals(reload: Callable[[], None] | None = None) -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set, and SIGHUP unless it calls ``reload``; for the main thread."""
    stop = threading.Event()

    def end(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGHUP and reload is not None:
            reload()
        else:
            stop.set()

    # A process that was started with SIGHUP ignored, as by nohup, is not ended by it.
    numbers = [signal.SIGTERM, signal.SIGINT]
    if reload is not None or signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            with contextlib.suppress(TypeError):
                signal.signal(number, handler)
