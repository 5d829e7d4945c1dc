"""A region of shared memory between a data plane (producer) and an agent: :class:`SharedMemoryRegion`."""

from __future__ import annotations

import ctypes
import errno
import math
import mmap
import os
import secrets
import stat
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import (
    DataPlaneTimeout,
    InvalidOptionError,
    InvalidWeightsError,
    RegionBusyError,
    RegionError,
    RegionExistsError,
    RegionFormatError,
    RegionNotFoundError,
)
from ..snapshot import Snapshot
from . import abi, seqlock, system
from .buffers import Action, ObservationBuffer

#: Seconds for which weights are good unless the agent says otherwise.
DEFAULT_LEASE = 5.0
_NS = 1_000_000_000
_DAY = 86_400.0
#: What the system says where a file may not be written to.
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
#: How often a name is looked up while waiting for a region, seconds.
_LOOK_UP = 0.01
#: Looks at a name that belongs to somebody, a millisecond apart, before it counts as taken: whoever replaces the region
#: of a dead producer holds that region's lock for a moment.
_LOOKS = 10


class SharedMemoryRegion:
    """One balancer's data plane and its agent, connected by a file in shared memory.

    The data plane is the producer: it creates the region, publishes observations and puts the newest action's weights
    in force. The agent attaches, reads observations and writes actions. Anybody may attach and only look. Reading never
    holds up a writer; a reader gets a whole observation or action, or none. There is one producer and one agent at a
    time, which the kernel's file locks guarantee also when a process is killed.

    Made by :meth:`create` or :meth:`attach`. As a context manager it is closed at the end, and unlinked, too, if it was
    created here. Not for several threads at once. A process that is forked does not inherit it: there it is closed, so
    that no child keeps the locks of a parent that was killed.

    Attributes:
        name, path: the region's name and file.
        layout: :class:`~lbgym.sharedmemory.abi.Layout` for its capacity.
        version: (major, minor) of the binary interface.
        capacity: servers there is room for.
        instance: int, another one for each creation.
        created_at: seconds since 1970.
        publish_interval: seconds on the data plane's clock between observations, as planned.
        clock_rate: seconds of the data plane's clock per second.
        producer_pid: process id of the producer.
        driver: what kind of data plane it is.
        is_producer: whether it was created here.
        read_only: whether it was attached without the right to write.
    """

    def __init__(self, name: str, descriptor: int, *, is_producer: bool, read_only: bool) -> None:
        """Map an open file; takes the descriptor over. Use :meth:`create` or :meth:`attach`."""
        self.name, self.path = name, system.path_of(name)
        self.is_producer, self.read_only = is_producer, read_only
        self._descriptor = descriptor
        try:
            status = os.fstat(descriptor)
            self._identity = status.st_dev, status.st_ino
            header = _checked_header(name, descriptor, status)
            access = mmap.ACCESS_READ if read_only else mmap.ACCESS_WRITE
            try:
                memory = mmap.mmap(descriptor, int(header["total_size"]), access=access)
            except ValueError as error:
                raise RegionFormatError(f"{self.path} was truncated while it was opened") from error
        except BaseException:
            os.close(descriptor)
            raise
        self.version = int(header["version_major"]), int(header["version_minor"])
        self.capacity = int(header["capacity"])
        self.instance = int(header["instance"])
        self.created_at = int(header["created_at"]) / _NS
        self.publish_interval = int(header["publish_interval"]) / _NS
        self.clock_rate = float(header["clock_rate"])
        self.producer_pid = int(header["producer_pid"])
        driver = bytes(header["driver"]).decode("utf-8", "replace")
        self.driver = "".join(letter if letter.isprintable() else "?" for letter in driver)
        self.layout = layout = abi.Layout(self.capacity)
        self._words: NDArray[np.uint64] | None = _array_over(memory)
        first, stride = int(header["frames_offset"]) // 8, int(header["frame_size"]) // 8
        self._frames = np.array([first, stride, int(header["num_frames"]), self.capacity])
        first, stride = int(header["actions_offset"]) // 8, int(header["action_size"]) // 8
        self._actions = np.array([first, stride, int(header["num_actions"]), self.capacity])
        self._frame_sections = np.array(list(layout.frame_sections.values())) // 8
        self._action_sections = np.array(list(layout.action_sections.values())) // 8
        address = self._words.ctypes.data
        self._observation_event = abi.HEADER.offset("observation_event")
        self._action_event = abi.HEADER.offset("action_event")
        self._observation_futex = system.Futex(address + self._observation_event)
        self._action_futex = system.Futex(address + self._action_event)
        self._state = self._words[: abi.HEADER.size // 8].view(np.uint32)[abi.HEADER.offset("state") // 4 :][:1]
        self._buffer: ObservationBuffer | None = None
        self._agent = False
        # Agent's scratch for the alias table.
        self._threshold = self._alias = np.empty(0, np.uint32)
        self._stack, self._share = np.empty(0, np.int64), np.empty(0)
        # Producer's state.
        self._sequence_id = 0
        self._action: Action | None = None
        self._action_known = self._action_seen = 0
        self._applied: tuple[int, int] | None = None
        self._safe = True
        self._safe_weights = np.ones(0)
        self._lease_end: float = 0
        self._in_force = np.ones(0)
        self._forked = False
        _open_regions.add(self)

    @classmethod
    def create(
        cls,
        name: str,
        *,
        num_servers: int,
        capacity: int | None = None,
        publish_interval: float = 0.25,
        clock_rate: float = 1.0,
        safe_weights: ArrayLike | None = None,
        driver: str = "",
        mode: int = 0o600,
        group: int | str | None = None,
    ) -> SharedMemoryRegion:
        """A new region, as its producer. A region whose producer is gone is replaced, a live one never.

        The file appears under its name when it is complete, and with all its memory reserved.

        Args:
            name: 1 to 200 letters, digits, ".", "-", "_".
            num_servers: servers known now; observations may have more later, up to the capacity.
            capacity: room for so many servers; None: 64, or ``num_servers`` if that is more.
            publish_interval: seconds on the data plane's clock between observations, as planned.
            clock_rate: seconds of that clock per second; 1 unless time is scaled.
            safe_weights: float[num_servers] in force without an agent's; None: all 1.
            driver: what kind of data plane this is, at most 24 bytes; for people.
            mode: permissions of the file.
            group: owning group, id or name; None: the process's.

        Raises:
            RegionExistsError: if the name belongs to a live region or to a file that is no region.
            RegionError: for a bad name, or if there is no room or no right to create it.
            InvalidOptionError, InvalidWeightsError: for a value out of its range.
        """
        system.require_linux()
        path = system.path_of(name)
        num_servers = _whole("num_servers", num_servers, 1, abi.MAX_CAPACITY)
        if capacity is None:
            capacity = max(num_servers, abi.DEFAULT_CAPACITY)
        layout = abi.Layout(_whole("capacity", capacity, num_servers, abi.MAX_CAPACITY))
        header = np.zeros((), abi.HEADER.dtype)
        header["magic"] = abi.MAGIC
        header["version_major"], header["version_minor"] = abi.VERSION_MAJOR, abi.VERSION_MINOR
        header["header_size"], header["total_size"] = abi.HEADER.size, layout.total_size
        header["capacity"] = layout.capacity
        header["num_frames"], header["num_actions"] = abi.NUM_FRAMES, abi.NUM_ACTIONS
        header["frames_offset"], header["frame_size"] = layout.frames_offset, layout.frame_size
        header["actions_offset"], header["action_size"] = layout.actions_offset, layout.action_size
        header["instance"] = secrets.randbits(63)
        header["created_at"], header["heartbeat"] = time.time_ns(), time.monotonic_ns()
        header["publish_interval"] = round(_seconds("publish_interval", publish_interval, 1e-6, _DAY) * _NS)
        header["clock_rate"] = _seconds("clock_rate", clock_rate, 1e-6, 1e6)
        header["producer_pid"], header["state"] = os.getpid(), abi.STATE_RUNNING
        if not driver.isprintable() or len(driver.encode()) > 24:
            raise InvalidOptionError(f"driver must be at most 24 bytes of printable text, got {driver!r}")
        header["driver"] = driver.encode()
        safe = _checked_weights("safe_weights", np.ones(num_servers) if safe_weights is None else safe_weights)
        if len(safe) != num_servers:
            raise InvalidWeightsError(f"safe_weights must be {num_servers} numbers, one per server, got {len(safe)}")
        if isinstance(mode, bool) or not isinstance(mode, int) or not 0 <= mode <= 0o777:
            raise InvalidOptionError(f"mode must be permissions from 0 to 0o777, got {mode!r}")
        try:
            descriptor = system.unnamed_file(path.parent, layout.total_size, mode, _group_id(group))
            try:
                os.pwrite(descriptor, header.tobytes(), 0)
                system.try_lock(descriptor, abi.PRODUCER_LOCK)
            except BaseException:
                os.close(descriptor)
                raise
            # Mapped before it has a name, so that a failure leaves nothing behind.
            region = cls(name, descriptor, is_producer=True, read_only=False)
        except OSError as error:
            raise _cannot_create(name, path, layout.total_size, error) from error
        region._safe_weights = safe
        region._in_force = safe.copy()
        try:
            region._take_name()
        except BaseException:
            region.close()
            raise
        return region

    def _take_name(self) -> None:
        """Give the new file its name, in place of a region whose producer is gone."""
        for look in range(100):
            try:
                system.give_name(self._descriptor, self.path)
                return
            except FileExistsError:
                pass
            except OSError as error:
                raise _cannot_create(self.name, self.path, self.layout.total_size, error) from error
            try:
                old = SharedMemoryRegion.attach(self.name, read_only=False)
            except RegionNotFoundError:
                continue
            except RegionFormatError as error:
                raise RegionExistsError(
                    f"the name {self.name!r} is taken: {error}; remove that file or use another name"
                ) from None
            with old:
                # Only who holds the old region's lock removes its name, so that two who start at once cannot both; and
                # it is marked first, so that the lock does not look like that of a live producer.
                if system.try_lock(old._descriptor, abi.PRODUCER_LOCK):
                    _retire(old._memory)
                    old.unlink()
                    old._observation_futex.wake()
                elif look < _LOOKS:
                    time.sleep(0.001)
                else:
                    raise RegionExistsError(
                        f"the name {self.name!r} belongs to a live region (producer process {old.producer_pid}, "
                        f"{old.latest:,} observations); stop that one or use another name"
                    )
        raise RegionExistsError(f"the name {self.name!r} is taken again and again by other producers")

    @classmethod
    def attach(
        cls, name: str, *, timeout: float = 0.0, live: bool = False, read_only: bool | None = None
    ) -> SharedMemoryRegion:
        """An existing region, as its agent or to look at it.

        Args:
            name: the region's name.
            timeout: seconds to wait for it.
            live: wait for one whose producer lives.
            read_only: map it without the right to write; None: only if the file's permissions forbid writing.

        Raises:
            RegionNotFoundError: if there is none (or none that lives) in time.
            RegionFormatError: if the file is no region of this version; the message says what was found.
            RegionError: if permission is denied.
        """
        system.require_linux()
        path = system.path_of(name)
        deadline = time.monotonic() + _checked_timeout(timeout)
        while True:
            try:
                region = cls._attach_once(name, path, read_only)
            except FileNotFoundError:
                if time.monotonic() >= deadline:
                    waited = f" after {timeout:g} s" if timeout else ""
                    raise RegionNotFoundError(f"there is no region {name!r} in {path.parent}{waited}") from None
            else:
                if not live or region.producer_alive:
                    return region
                region.close()
                if time.monotonic() >= deadline:
                    raise RegionNotFoundError(
                        f"the producer of region {name!r} (process {region.producer_pid}) is gone"
                    )
            time.sleep(_LOOK_UP)

    @classmethod
    def _attach_once(cls, name: str, path: Path, read_only: bool | None) -> SharedMemoryRegion:
        flags = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            if not read_only:
                try:
                    return cls(name, os.open(path, flags | os.O_RDWR), is_producer=False, read_only=False)
                except OSError as error:
                    if read_only is False or error.errno not in _FORBIDDEN:
                        raise
            return cls(name, os.open(path, flags | os.O_RDONLY), is_producer=False, read_only=True)
        except FileNotFoundError:
            raise
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise RegionFormatError(f"{path} is no region of lbgym: it is no regular file") from error
            if error.errno in _FORBIDDEN:
                raise RegionError(f"no permission for region {name!r}: {_whose(path)}") from error
            raise RegionError(f"cannot open region {name!r}, {path}: {error.strerror}") from error

    # What the region says about itself

    @property
    def latest(self) -> int:
        """Sequence id of the newest observation; 0: none yet."""
        return int(seqlock.load_word(self._memory, seqlock.LATEST))

    @property
    def heartbeat_age(self) -> float:
        """Seconds since the producer's last sign of life."""
        return _age(int(seqlock.load_word(self._memory, seqlock.HEARTBEAT)))

    @property
    def agent_heartbeat_age(self) -> float:
        """Seconds since the agent's last sign of life; infinite if there never was one."""
        beat = int(seqlock.load_word(self._memory, seqlock.AGENT_HEARTBEAT))
        return _age(beat) if beat else math.inf

    @property
    def agent_pid(self) -> int | None:
        """Process id of the agent that wrote last; None if none did."""
        pid = int(self._header()["agent_pid"])
        return pid or None

    @property
    def closed_by_producer(self) -> bool:
        """Whether the producer has said that it will publish no more, or another region has taken the name."""
        return int(self._state[0]) != abi.STATE_RUNNING

    @property
    def producer_alive(self) -> bool:
        """Whether the producer's process lives and has not closed the region."""
        memory = self._memory  # refuses a closed region
        del memory
        if not self.is_producer and not system.is_locked(self._descriptor, abi.PRODUCER_LOCK):
            return False
        return not self.closed_by_producer

    @property
    def agent_alive(self) -> bool:
        """Whether an agent (this one or another) holds the region."""
        memory = self._memory  # refuses a closed region
        del memory
        return self._agent or system.is_locked(self._descriptor, abi.AGENT_LOCK)

    @property
    def replaced(self) -> bool:
        """Whether the name now belongs to another file."""
        found = self._found_at_name()
        return found is not None and found != self._identity

    def _found_at_name(self) -> tuple[int, int] | None:
        """Which file has the region's name; None if none has."""
        try:
            status = os.lstat(self.path)
        except OSError:
            return None
        return status.st_dev, status.st_ino

    # The agent's side

    def new_buffer(self) -> ObservationBuffer:
        """Private memory that observations of this region are read into."""
        return ObservationBuffer(self.layout)

    def read_into(self, buffer: ObservationBuffer) -> bool:
        """Copy the newest observation into ``buffer``; false if none was published yet. Allocates nothing.

        Raises:
            InvalidOptionError: if the buffer was made for another capacity, as that of the region before.
            RegionFormatError: if the region holds what no data plane may publish, such as a feature that is no number.
            RegionBusyError: if the producer overwrote the observation during every one of 1,000 copies.
        """
        if buffer.capacity != self.capacity:
            raise self._misfit(buffer)
        status = seqlock.read_frame(self._memory, self._frames, self._frame_sections, buffer.words)
        if status == seqlock.OK:
            return True
        if status == seqlock.NOTHING:
            return False
        if status == seqlock.BUSY:
            raise RegionBusyError(f"region {self.name!r} is written to faster than it can be read")
        raise RegionFormatError(f"region {self.name!r} holds an observation that no data plane may publish")

    def read_earlier(self, buffer: ObservationBuffer, sequence_id: int) -> bool:
        """Copy observation ``sequence_id`` into ``buffer``; false if the ring does not have it (any more, or yet).

        The ring keeps the last three for sure, which is how a reader that is late once misses nothing.

        Raises:
            InvalidOptionError, RegionFormatError: as :meth:`read_into`.
        """
        if buffer.capacity != self.capacity:
            raise self._misfit(buffer)
        memory = self._memory
        if not 1 <= sequence_id < 1 << 63:
            return False
        status = seqlock.read_earlier_frame(memory, self._frames, self._frame_sections, buffer.words, sequence_id)
        if status == seqlock.INVALID:
            raise RegionFormatError(f"region {self.name!r} holds an observation that no data plane may publish")
        return bool(status == seqlock.OK)

    def _misfit(self, buffer: ObservationBuffer) -> InvalidOptionError:
        return InvalidOptionError(
            f"the buffer was made for {buffer.capacity} servers, region {self.name!r} has room for {self.capacity}; "
            "get one from new_buffer()"
        )

    def read_observation(self, timeout: float = 0.0) -> dict[str, Any]:
        """The newest observation as a dictionary.

        Keys: ``sequence_id``; ``timestamp`` (s, the data plane's clock); ``age`` (s since it was published);
        ``active_servers`` (list of server ids); ``server_stats``: by the id of each active server a dictionary of the
        11 features by name, of ``reservoir_features`` (the ten of them that are drawn from reservoirs) and ``weight``
        in force; ``applied_sequence_id`` of the action in force, None if the safe weights are.

        Args:
            timeout: seconds to wait for the first observation.

        Raises:
            DataPlaneTimeout: if there is none.
            RegionFormatError, RegionBusyError: as :meth:`read_into`.
        """
        buffer = self._buffer
        if buffer is None:
            buffer = self._buffer = self.new_buffer()
        if not self.read_into(buffer) and not (self.wait_observation(0, timeout) and self.read_into(buffer)):
            raise DataPlaneTimeout(f"region {self.name!r}: nothing has been published yet, waited {timeout:g} s")
        n = buffer.num_servers
        active = np.flatnonzero(buffer.active[:n]).tolist()
        stats = buffer.stats[:n].tolist()
        weights = buffer.weights[:n].tolist()
        servers = {}
        for i in active:
            servers[i] = _by_name(*stats[i], weights[i])  # type: ignore[call-arg]
        return {
            "sequence_id": buffer.sequence_id,
            "timestamp": buffer.timestamp,
            "age": _age(buffer.published_at),
            "active_servers": active,
            "server_stats": servers,
            "applied_sequence_id": None if buffer.safe else buffer.applied_sequence_id,
        }

    def wait_observation(self, after: int, timeout: float) -> bool:
        """Sleep until there is an observation other than number ``after``; false after ``timeout`` seconds.

        Returns false at once when the producer closes the region.
        """
        return self._wait(seqlock.LATEST, self._observation_event // 8, self._observation_futex, after, timeout)

    def _wait(self, word: int, event: int, futex: system.Futex, after: int, timeout: float) -> bool:
        words = self._memory
        deadline = time.monotonic() + _checked_timeout(timeout)
        value, flagged = 0, False
        while seqlock.load_word(words, word) == after:
            left = deadline - time.monotonic()
            if left <= 0.0 or self.closed_by_producer:
                return False
            if self.read_only:
                # Without the right to raise the flag nobody would wake us.
                time.sleep(min(left, max(0.001, self.publish_interval / self.clock_rate / 8)))
            elif flagged:
                futex.wait(value, left)
                flagged = False
            else:
                # And look again, before sleeping, for what came meanwhile.
                value, flagged = int(seqlock.raise_flag(words, event)), True
        return True

    def lock_agent(self) -> None:
        """Become the region's agent.

        Raises:
            RegionBusyError: if another one is.
            RegionError: if the region was attached read-only.
        """
        if self._agent:
            return
        memory = self._memory
        if self.read_only:
            raise RegionError(f"region {self.name!r} was attached read-only; an agent must be allowed to write")
        if not system.try_lock(self._descriptor, abi.AGENT_LOCK):
            raise RegionBusyError(
                f"region {self.name!r} is driven by another agent (process {self.agent_pid or 'unknown'}); "
                "stop it first, there is one agent per region"
            )
        self._agent = True
        header = memory[: abi.HEADER.size // 8].view(abi.HEADER.dtype)
        header["agent_pid"] = os.getpid()

    def unlock_agent(self) -> None:
        """Let another agent have the region; does nothing if this one is not its agent."""
        if self._agent:
            self._agent = False
            system.unlock(self._descriptor, abi.AGENT_LOCK)

    def write_action(self, *, sequence_id: int, weights: ArrayLike, lease: float = DEFAULT_LEASE) -> int:
        """Give the data plane weights, and their alias table, so that it can choose a server in constant time.

        The first call makes this process the region's agent.

        Args:
            sequence_id: the agent's number of this action, from 0; observations say which one they reflect.
            weights: float[n], n up to the capacity; at least 0, finite, not all 0. Further servers have safe weights.
            lease: seconds for which the weights are good: without another action the data plane then puts its safe
                weights in force. ``math.inf``: for ever.

        Returns:
            The instant of writing, ns of the monotonic clock.

        Raises:
            RegionBusyError: if the region has another agent.
            InvalidWeightsError: for weights that are not as above; nothing has been written then.
            InvalidOptionError: for a sequence id or lease out of range.
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
        sequence_id = _whole("sequence_id", sequence_id, 0, (1 << 63) - 1)
        if not isinstance(lease, (int, float, np.number)) or not lease > 0.0:
            raise InvalidOptionError(f"lease must be above 0 seconds, got {lease!r}")
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
            sequence_id,
            0 if lease > _DAY * 36_500 else max(1, int(lease * _NS)),
            now,
            self._threshold,
            self._alias,
            self._stack,
            self._share,
        )
        if written < 0:
            _checked_weights("weights", checked)
        if written == 1:
            self._action_futex.wake()
        return now

    # The producer's side

    def publish(self, snapshot: Snapshot, *, fct_count: int = 0, fct_sum: float = 0.0) -> int:
        """Publish an observation; its sequence id is one more than the last.

        Which action is in force, and since when, is what :meth:`weights_in_force` last found.

        Args:
            snapshot: of one data plane, up to ``capacity`` servers. Its ``sequence_id`` and ``service`` are not used.
            fct_count: flows that ended so far and whose FCT is known.
            fct_sum: seconds, the sum of those FCTs.

        Returns:
            The sequence id.

        Raises:
            InvalidOptionError: if it does not fit, or holds a number that is negative or not finite; nothing has been
                published then.
        """
        memory = self._producer()
        n = snapshot.active.shape[0]
        if not 0 < n <= self.capacity:
            raise InvalidOptionError(f"region {self.name!r} has room for 1 to {self.capacity} servers, got {n}")
        buffer = self._buffer
        if buffer is None:
            buffer = self._buffer = self.new_buffer()
        try:
            buffer.fill(snapshot, fct_count, int(fct_sum * _NS))
        except (ValueError, TypeError, OverflowError) as error:
            raise InvalidOptionError(f"an observation for region {self.name!r} cannot be published: {error}") from error
        if n != len(self._safe_weights):
            self._resize(n)
        buffer.weights[:n] = self._in_force
        buffer.safe_weights[:n] = self._safe_weights
        buffer.set_applied(self._applied, self._safe)
        if not seqlock.frame_is_valid(self._frame_sections, buffer.words):
            raise InvalidOptionError(
                f"an observation for region {self.name!r} has features, ground truth, counters or times that are "
                "negative, not finite or beyond 2**63"
            )
        self._sequence_id += 1
        if seqlock.publish_frame(
            memory, self._frames, self._frame_sections, buffer.words, self._sequence_id, time.monotonic_ns()
        ):
            self._observation_futex.wake()
        return self._sequence_id

    def heartbeat(self) -> None:
        """Say that the producer lives, though it has nothing to publish."""
        seqlock.store_word(self._producer(), seqlock.HEARTBEAT, time.monotonic_ns())

    def set_safe_weights(self, weights: ArrayLike) -> None:
        """Change the weights that are in force without an agent's, float[number of servers]."""
        self._producer()
        checked = _checked_weights("safe_weights", weights)
        if len(checked) != len(self._safe_weights):
            raise InvalidWeightsError(f"safe_weights must be {len(self._safe_weights)} numbers, got {len(checked)}")
        self._safe_weights = checked
        self._combine()

    def read_action(self) -> Action | None:
        """The newest action, whatever its lease; None if there is none.

        Raises:
            RegionFormatError: if the region holds weights that no agent may write.
            RegionBusyError: if the agent overwrote it during every one of 1,000 copies.
        """
        action = Action(self.layout)
        found = self._read_action(action, 0)
        return action if found else None

    def _read_action(self, action: Action, known: int) -> int:
        found = int(seqlock.read_action(self._memory, self._actions, self._action_sections, action.words, known))
        if found == -seqlock.BUSY:
            raise RegionBusyError(f"region {self.name!r}: actions are written faster than they can be read")
        if found == -seqlock.INVALID:
            raise RegionFormatError(f"region {self.name!r} holds an action that no agent may write")
        return found

    def weights_in_force(self) -> NDArray[np.float64]:
        """What the data plane is to dispatch by now, float64[number of servers]; a view, do not change it.

        That is the newest action while its lease lasts, else the safe weights; an action that cannot be read is as
        none. Call it before each publication and whenever :meth:`wait_action` says so.
        """
        self._producer()
        now = time.monotonic_ns()
        if self._action is None:
            self._action = Action(self.layout)
        seen = int(seqlock.load_word(self._memory, seqlock.ACTION_COUNT))
        try:
            found = self._read_action(self._action, self._action_known)
        except RegionError:
            # The copy now holds what no agent may write.
            found = self._action_known = 0
        self._action_seen = found or seen
        action = self._action
        if found:
            self._action_known = found
            # From now on if it says that it was written later, as on the clock of another namespace.
            self._lease_end = min(action.written_at, time.monotonic_ns()) + (action.lease_ns or math.inf)
            if now < self._lease_end:
                self._applied = action.sequence_id, now
        good = self._action_known > 0 and now < self._lease_end
        if found or self._safe == good:
            self._safe = not good
            self._combine()
        return self._in_force

    @property
    def safe_weights_in_force(self) -> bool:
        """Whether :meth:`weights_in_force` last found no action with a lease that lasts."""
        return self._safe

    def _combine(self) -> None:
        weights = self._safe_weights.copy()
        if not self._safe and self._action is not None:
            count = min(self._action.num_servers, len(weights))
            weights[:count] = self._action.weights[:count]
            if not weights.any():
                # The servers that were to take flows have left.
                self._safe = True
                weights = self._safe_weights.copy()
        self._in_force = weights

    def _resize(self, num_servers: int) -> None:
        """Servers have joined or left: those that joined have the safe weight 1 until told otherwise."""
        weights = np.ones(num_servers)
        known = min(num_servers, len(self._safe_weights))
        weights[:known] = self._safe_weights[:known]
        self._safe_weights = weights if weights.any() else np.ones(num_servers)
        self._combine()

    def wait_action(self, timeout: float) -> bool:
        """Sleep until the agent has written an action that :meth:`weights_in_force` has not seen, or ``timeout``."""
        self._producer()
        return self._wait(seqlock.ACTION_COUNT, self._action_event // 8, self._action_futex, self._action_seen, timeout)

    # The end

    def unlink(self) -> None:
        """Remove the region's name, unless it belongs to another file by now; who is attached stays so.

        Raises:
            RegionError: if permission is denied.
        """
        if self._found_at_name() != self._identity:
            return
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            raise RegionError(
                f"cannot remove region {self.name!r} from {self.path.parent}: {error.strerror}; {_whose(self.path)}"
            ) from error

    def close(self) -> None:
        """Give up the region and its locks; a producer says that it publishes no more. Idempotent."""
        if self._words is None:
            return
        if self.is_producer:
            _retire(self._words)
            self._observation_futex.wake()
            system.unlock(self._descriptor, abi.PRODUCER_LOCK)
        self.unlock_agent()
        self._let_go()

    def _let_go(self) -> None:
        """Unmap and close the file, and change nothing in it."""
        self._words = None
        self._state = self._state.copy()
        os.close(self._descriptor)

    def _lose(self) -> None:
        """In a forked child: let go what is the parent's."""
        if self._words is not None:
            self._agent = False
            self._forked = True
            self._let_go()

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._words is None

    def __enter__(self) -> SharedMemoryRegion:
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_producer and not self.closed:
            self.unlink()
        self.close()

    def __repr__(self) -> str:
        role = "closed" if self.closed else "producer" if self.is_producer else "agent" if self._agent else "reader"
        return f"<SharedMemoryRegion {self.name!r}, capacity {self.capacity}, {role}>"

    @property
    def _memory(self) -> NDArray[np.uint64]:
        if self._words is None:
            why = "was opened before this process was forked; open it here" if self._forked else "is closed"
            raise RegionError(f"region {self.name!r} {why}")
        return self._words

    def _producer(self) -> NDArray[np.uint64]:
        if not self.is_producer:
            raise RegionError(f"region {self.name!r} was attached; only its creator is its producer")
        return self._memory

    def _header(self) -> Any:
        return self._memory[: abi.HEADER.size // 8].view(abi.HEADER.dtype)[0]


def _array_over(memory: mmap.mmap) -> NDArray[np.uint64]:
    """The words of a mapping, which lives as long as the array.

    NumPy would mark those of a read-only mapping so, and Numba would compile every function once more for them.
    """
    count = len(memory) // 8
    address = np.frombuffer(memory, np.uint8).ctypes.data
    words = (ctypes.c_uint64 * count).from_address(address)
    words.mapping = memory  # type: ignore[attr-defined]
    return np.ctypeslib.as_array(words)


def _by_name(
    n_flow_on: float,
    fct_mean: float,
    fct_p90: float,
    fct_std: float,
    fct_mean_decay: float,
    fct_p90_decay: float,
    duration_mean: float,
    duration_p90: float,
    duration_std: float,
    duration_mean_decay: float,
    duration_p90_decay: float,
    weight: float,
) -> dict[str, Any]:
    """The row of one server as a dictionary; written out, because 64 of them are made at every call."""
    return {
        "n_flow_on": n_flow_on,
        "fct_mean": fct_mean,
        "fct_p90": fct_p90,
        "fct_std": fct_std,
        "fct_mean_decay": fct_mean_decay,
        "fct_p90_decay": fct_p90_decay,
        "duration_mean": duration_mean,
        "duration_p90": duration_p90,
        "duration_std": duration_std,
        "duration_mean_decay": duration_mean_decay,
        "duration_p90_decay": duration_p90_decay,
        "weight": weight,
        "reservoir_features": {
            "fct_mean": fct_mean,
            "fct_p90": fct_p90,
            "fct_std": fct_std,
            "fct_mean_decay": fct_mean_decay,
            "fct_p90_decay": fct_p90_decay,
            "duration_mean": duration_mean,
            "duration_p90": duration_p90,
            "duration_std": duration_std,
            "duration_mean_decay": duration_mean_decay,
            "duration_p90_decay": duration_p90_decay,
        },
    }


def _age(instant: int) -> float:
    return max(0, time.monotonic_ns() - instant) / _NS


def _whole(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not low <= value <= high:
        raise InvalidOptionError(f"{name} must be a whole number from {low} to {high}, got {value!r}")
    return int(value)


def _seconds(name: str, value: Any, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not low <= value <= high:
        raise InvalidOptionError(f"{name} must be from {low:g} to {high:g}, got {value!r}")
    return float(value)


def _checked_timeout(timeout: Any) -> float:
    """A number of seconds, also infinite or below 0."""
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float, np.number)) or timeout != timeout:
        raise InvalidOptionError(f"timeout must be a number of seconds, got {timeout!r}")
    return float(timeout)


def _checked_weights(name: str, weights: ArrayLike) -> NDArray[np.float64]:
    try:
        checked = np.array(weights, np.float64)
    except (TypeError, ValueError) as error:
        raise InvalidWeightsError(f"{name} must be numbers, one per server, got {weights!r}") from error
    if checked.ndim != 1 or not np.isfinite(checked).all() or (checked < 0.0).any():
        raise InvalidWeightsError(f"{name} must be finite numbers of at least 0, got {weights!r}")
    if not checked.any():
        raise InvalidWeightsError(f"one of {name} must be above 0, got {weights!r}")
    return checked


def _whose(path: Path) -> str:
    """A sentence about who may use a file."""
    user = f"this process is user {os.geteuid()}"
    try:
        owner = path.lstat()
    except OSError as error:
        return f"{path.parent} cannot be searched ({error.strerror}); {user}"
    mode = stat.filemode(owner.st_mode)
    return f"{path} has mode {mode} and belongs to user {owner.st_uid}, group {owner.st_gid}; {user}"


def _group_id(group: int | str | None) -> int:
    if group is None:
        return -1
    if not isinstance(group, str):
        return _whole("group", group, 0, (1 << 32) - 2)
    import grp

    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise InvalidOptionError(f"there is no group {group!r} on this machine") from None


def _cannot_create(name: str, path: Path, size: int, error: OSError) -> RegionError:
    if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
        why = f"there is no room for its {size:,} bytes"
    elif error.errno in _FORBIDDEN:
        why = "permission denied"
    elif error.errno in (errno.EOPNOTSUPP, errno.EISDIR):
        why = "that file system makes no unnamed files; use one like tmpfs"
    else:
        why = error.strerror or str(error)
    return RegionError(f"cannot create region {name!r} in {path.parent}: {why}")


def _checked_header(name: str, descriptor: int, status: os.stat_result) -> Any:
    """The header of a file, or a sentence about why it is none that this version can read."""

    def refuse(what: str) -> RegionFormatError:
        return RegionFormatError(f"{system.path_of(name)} is no region that this lbgym can use: {what}")

    if not stat.S_ISREG(status.st_mode):
        raise refuse("it is no regular file")
    data = os.pread(descriptor, abi.HEADER.size, 0)
    if len(data) < abi.HEADER.size:
        raise refuse(f"it has {len(data)} bytes, and a header has {abi.HEADER.size}")
    header = np.frombuffer(data, abi.HEADER.dtype)[0]
    values = {
        field: int(header[field]) for field in abi.HEADER.dtype.names or () if field not in ("driver", "clock_rate")
    }
    if values["magic"] != abi.MAGIC:
        raise refuse(f"it begins with {data[:8]!r} instead of {abi.MAGIC.to_bytes(8, 'little')!r}")
    if values["version_major"] != abi.VERSION_MAJOR:
        found = f"{values['version_major']}.{values['version_minor']}"
        raise refuse(f"it has version {found} of the binary interface, this is {abi.VERSION_MAJOR}")
    if values["total_size"] != status.st_size:
        raise refuse(f"its header says {values['total_size']:,} bytes, the file has {status.st_size:,}")
    capacity = values["capacity"]
    if not 1 <= capacity <= abi.MAX_CAPACITY:
        raise refuse(f"its capacity is {capacity}, allowed are 1 to {abi.MAX_CAPACITY}")
    layout = abi.Layout(capacity)
    frames_end = values["frames_offset"] + values["num_frames"] * values["frame_size"]
    actions_end = values["actions_offset"] + values["num_actions"] * values["action_size"]
    sizes = ("header_size", "frames_offset", "frame_size", "actions_offset", "action_size", "total_size")
    fits = (
        all(values[size] % abi.LINE == 0 for size in sizes)
        and abi.HEADER.size <= values["header_size"] <= values["frames_offset"]
        and values["frame_size"] >= layout.frame_size
        and values["action_size"] >= layout.action_size
        and all(
            2 <= values[count] <= 1024 and values[count].bit_count() == 1 for count in ("num_frames", "num_actions")
        )
        and frames_end <= values["actions_offset"]
        and actions_end <= values["total_size"]
    )
    if not fits:
        raise refuse("its sizes and offsets contradict each other")
    if not (1e-6 <= float(header["clock_rate"]) <= 1e6):
        raise refuse(f"its clock rate is {float(header['clock_rate'])!r}")
    if not 1 <= values["publish_interval"] <= _DAY * _NS:
        raise refuse(f"its publish interval is {values['publish_interval']} ns")
    return header


def _retire(words: NDArray[np.uint64]) -> None:
    """Mark a region as one that is published no more, so that those who wait look up its name again."""
    header = words[: abi.HEADER.size // 8].view(abi.HEADER.dtype)
    header["state"] = abi.STATE_CLOSED
    header["observation_event"] += 1


_open_regions: weakref.WeakSet[SharedMemoryRegion] = weakref.WeakSet()


def _lose_all() -> None:
    for region in list(_open_regions):
        region._lose()


os.register_at_fork(after_in_child=_lose_all)


def region_names() -> Iterator[str]:
    """The names of all regions that this process may read, also of other versions."""
    magic = abi.MAGIC.to_bytes(8, "little")
    try:
        paths = sorted(system.directory().iterdir())
    except OSError:
        return
    for path in paths:
        try:
            if not stat.S_ISREG(path.lstat().st_mode):
                continue
            with path.open("rb") as file:
                if file.read(8) == magic:
                    yield path.name
        except PermissionError:
            continue
        except OSError:
            continue
