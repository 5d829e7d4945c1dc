"""A region of shared memory as everybody sees it: the mapping, the header, who lives, and reading."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import stat
import time
import weakref
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import checks
from ..errors import (
    DataPlaneTimeout,
    InvalidOptionError,
    InvalidWeightsError,
    RegionBusyError,
    RegionError,
    RegionFormatError,
)
from ..features.columns import FEATURE_ALIASES, FEATURE_NAMES, GROUND_TRUTH_NAMES
from . import abi, seqlock, system
from .buffers import Action, ObservationBuffer

NS = 1_000_000_000
DAY = 86_400.0


class Region:
    """An open region; ``producer`` and ``agent`` add the roles, ``names.SharedMemoryRegion`` lists attributes."""

    def __init__(self, name: str, descriptor: int, *, is_producer: bool, read_only: bool) -> None:
        """Map an open file and take over its descriptor. Use ``SharedMemoryRegion.create`` or ``attach``."""
        self.name, self.path = name, system.path_of(name)
        self.is_producer, self.read_only = is_producer, read_only
        self._descriptor = descriptor
        try:
            status = os.fstat(descriptor)
            self._identity = status.st_dev, status.st_ino
            header, self.layout = _checked_header(name, descriptor, status)
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
        self.created_at = int(header["created_at"]) / NS
        self.publish_interval = int(header["publish_interval"]) / NS
        self.clock_rate = float(header["clock_rate"])
        self.producer_pid = int(header["producer_pid"])
        self.driver = _printable(bytes(header["driver"]))
        self.real_features = _features_of(self.version[1], int(header["features"]))
        self.takes_index = bool(self.layout.options & abi.OPTION_INDEX)
        self._words: NDArray[np.uint64] | None = _array_over(memory)
        layout, private = self.layout, self.layout.private
        self._frames = self._plan(header, "frames_offset", "frame_size", "num_frames", layout.frame_sections)
        self._actions = self._plan(header, "actions_offset", "action_size", "num_actions", layout.action_sections)
        self._names = np.array(
            [int(header["names_offset"]) // 8, int(header["names_size"]) // 8, abi.NUM_NAMES, self.capacity, 1]
        )
        self._frame_sections = np.array(list(private.frame_sections.values())) // 8
        self._action_sections = np.array(list(private.action_sections.values())) // 8
        address = self._words.ctypes.data
        self._observation_event = abi.HEADER.offset("observation_event")
        self._action_event = abi.HEADER.offset("action_event")
        self._observation_futex = system.Futex(address + self._observation_event)
        self._action_futex = system.Futex(address + self._action_event)
        self._state = self._words[: abi.HEADER.size // 8].view(np.uint32)[abi.HEADER.offset("state") // 4 :][:1]
        self._buffer: ObservationBuffer | None = None
        self._server_names: tuple[str, ...] = ()
        self._server_names_version = 0
        self._agent = self._forked = False
        _open_regions.add(self)

    def _plan(self, header: Any, offset: str, size: str, count: str, sections: dict[str, int]) -> NDArray[np.int64]:
        """The plan of frames or actions, for the functions of ``seqlock``."""
        first, stride = int(header[offset]) // 8, int(header[size]) // 8
        return np.array([first, stride, int(header[count]), self.capacity, len(sections)])

    # Liveness

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
        """True if the producer has said that it will publish no more, or another region has taken the name."""
        return int(self._state[0]) != abi.STATE_RUNNING

    @property
    def producer_alive(self) -> bool:
        """True if the producer's process lives and has not closed the region."""
        self._require_open()
        if not self.is_producer and not system.is_locked(self._descriptor, abi.PRODUCER_LOCK):
            return False
        return not self.closed_by_producer

    @property
    def agent_alive(self) -> bool:
        """True if an agent (this one or another) holds the region."""
        self._require_open()
        return self._agent or system.is_locked(self._descriptor, abi.AGENT_LOCK)

    @property
    def replaced(self) -> bool:
        """True if the name now belongs to another file."""
        found = self._found_at_name()
        return found is not None and found != self._identity

    def _found_at_name(self) -> tuple[int, int] | None:
        """The file that has the region's name; None if there is none."""
        try:
            status = os.lstat(self.path)
        except OSError:
            return None
        return status.st_dev, status.st_ino

    # Reading

    @property
    def names_version(self) -> int:
        """Number of changes of the servers' names; 0: no server was ever named."""
        memory = self._memory
        return int(seqlock.load_word(memory, seqlock.NAMES_VERSION)) if self.layout.names_size else 0

    @property
    def server_names(self) -> tuple[str, ...]:
        """The servers' names, "" for those without one.

        As many as the data plane has ever had at once, so that every server of an observation read before has its
        entry. A region without names (of version 1.0, or before the first publication) has "" for each server that
        there is room for.

        Raises:
            RegionFormatError: if the region holds names that no data plane may publish.
            RegionBusyError: if the producer changed them during every one of 1,000 copies.
        """
        version = self.names_version
        if version == 0:
            return ("",) * self.capacity
        if version != self._server_names_version:
            table = np.zeros(self._names[1], np.uint64)
            status = seqlock.read_names(self._memory, self._names, table)
            if status == seqlock.BUSY:
                raise RegionBusyError(f"region {self.name!r}: names change faster than they can be read")
            if status != seqlock.OK:
                raise RegionFormatError(f"region {self.name!r} holds names that no data plane may publish")
            head = table[: abi.NAMES.size // 8].view(abi.NAMES.dtype)[0]
            rows = table[abi.NAMES.size // 8 :].view(f"S{abi.NAME_SIZE}")[: int(head["num_servers"])]
            self._server_names = tuple(_printable(name) for name in rows.tolist())
            self._server_names_version = int(head["version"])
        return self._server_names

    def new_buffer(self) -> ObservationBuffer:
        """Private memory that observations of this region are read into."""
        return ObservationBuffer(self.layout)

    def read_into(self, buffer: ObservationBuffer) -> bool:
        """Copy the newest observation into ``buffer``; false if none was published yet. Allocates nothing.

        Raises:
            InvalidOptionError: if the buffer was made for another capacity, such as the previous region's.
            RegionFormatError: if the region holds what no data plane may publish, such as a feature that is NaN.
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

        The ring always keeps the last three, so that a reader that is late once misses nothing.

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
        in force; ``applied_sequence_id`` of the action in force, None if the safe weights are. Features are also found
        by their aliases (``lbgym.features.FEATURE_ALIASES``), such as ``flow_duration_avg_decay``.

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
        return {
            "sequence_id": buffer.sequence_id,
            "timestamp": buffer.timestamp,
            "age": _age(buffer.published_at),
            "active_servers": active,
            "server_stats": {i: _server_stats(stats[i], weights[i]) for i in active},
            "applied_sequence_id": None if buffer.safe else buffer.applied_sequence_id,
        }

    def wait_observation(self, after: int, timeout: float) -> bool:
        """Sleep until there is an observation other than number ``after``; false after ``timeout`` seconds.

        Returns false at once when the producer closes the region.
        """
        return self._wait(seqlock.LATEST, self._observation_event // 8, self._observation_futex, after, timeout)

    def read_action(self) -> Action | None:
        """The newest action, whatever its lease; None if there is none.

        Raises:
            RegionFormatError: if the region holds an action that no agent may write.
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

    def _wait(self, word: int, event: int, futex: system.Futex, after: int, timeout: float) -> bool:
        words = self._memory
        deadline = time.monotonic() + checked_timeout(timeout)
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
                # Look again before sleeping: something may have arrived meanwhile.
                value, flagged = int(seqlock.raise_flag(words, event)), True
        return True

    # The end

    def unlink(self) -> None:
        """Remove the region's name, unless it belongs to another file by now; whoever is attached stays so.

        Raises:
            RegionError: if permission is denied.
        """
        if self._found_at_name() != self._identity:
            return
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            raise RegionError(
                f"cannot remove region {self.name!r} from {self.path.parent}: {error.strerror}; "
                f"{permissions_of(self.path)}"
            ) from error

    def close(self) -> None:
        """Give up the region and its locks; a producer also announces that it publishes no more. Idempotent."""
        if self._words is None:
            return
        if self.is_producer:
            self._retire()
            system.unlock(self._descriptor, abi.PRODUCER_LOCK)
        if self._agent:
            self._agent = False
            system.unlock(self._descriptor, abi.AGENT_LOCK)
        self._let_go()

    def _retire(self) -> None:
        """Mark the region as one without a producer, and wake whoever waits, to look up its name again."""
        header = self._header()
        header["state"] = abi.STATE_CLOSED
        header["observation_event"] += 1
        self._observation_futex.wake()

    def _let_go(self) -> None:
        """Unmap and close the file without changing anything in it."""
        self._words = None
        self._state = self._state.copy()
        os.close(self._descriptor)

    def _lose(self) -> None:
        """In a forked child: let go of what belongs to the parent."""
        if self._words is not None:
            self._agent = False
            self._forked = True
            self._let_go()

    @property
    def closed(self) -> bool:
        """True if :meth:`close` was called."""
        return self._words is None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_producer and not self.closed:
            self.unlink()
        self.close()

    def __repr__(self) -> str:
        role = "closed" if self.closed else "producer" if self.is_producer else "agent" if self._agent else "reader"
        return f"<{type(self).__name__} {self.name!r}, capacity {self.capacity}, {role}>"

    @property
    def _memory(self) -> NDArray[np.uint64]:
        if self._words is None:
            why = "was opened before this process was forked; open it here" if self._forked else "is closed"
            raise RegionError(f"region {self.name!r} {why}")
        return self._words

    def _require_open(self) -> None:
        _ = self._memory

    def _header(self) -> Any:
        return self._memory[: abi.HEADER.size // 8].view(abi.HEADER.dtype)[0]


class _ByName(dict[str, Any]):
    """Features by their names, and by the aliases of these names."""

    def __missing__(self, key: str) -> Any:
        name = FEATURE_ALIASES.get(key)
        if name is None or name not in self:
            raise KeyError(key)
        return self[name]

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or super().__contains__(FEATURE_ALIASES.get(key))  # type: ignore[call-overload]

    def get(self, key: str, default: Any = None) -> Any:
        try:
            return self[key]
        except KeyError:
            return default


def _server_stats(row: list[float], weight: float) -> dict[str, Any]:
    """One server's row of features as a dictionary."""
    stats = _ByName(zip(FEATURE_NAMES, row, strict=True))
    reservoirs = _ByName(stats)
    del reservoirs["n_flow_on"]
    stats["weight"] = weight
    stats["reservoir_features"] = reservoirs
    return stats


def feature_bits(names: frozenset[str]) -> int:
    """The header's ``features`` for the real columns."""
    bits = sum(1 << i for i, name in enumerate(FEATURE_NAMES) if name in names)
    return bits | sum(1 << abi.GROUND_TRUTH_BIT + i for i, name in enumerate(GROUND_TRUTH_NAMES) if name in names)


def _features_of(minor: int, bits: int) -> frozenset[str]:
    everything = frozenset((*FEATURE_NAMES, *GROUND_TRUTH_NAMES))
    return (
        everything if minor == 0 else frozenset(name for name in everything if bits & feature_bits(frozenset({name})))
    )


def _printable(text: bytes) -> str:
    """Text that another process wrote, for people: without control characters."""
    return "".join(letter if letter.isprintable() else "?" for letter in text.decode("utf-8", "replace"))


def _array_over(memory: mmap.mmap) -> NDArray[np.uint64]:
    """The words of a mapping, which lives as long as the array.

    NumPy would mark those of a read-only mapping so, and Numba would compile every function once more for them.
    """
    count = len(memory) // 8
    address = np.frombuffer(memory, np.uint8).ctypes.data
    words = (ctypes.c_uint64 * count).from_address(address)
    words.mapping = memory  # type: ignore[attr-defined]
    return np.ctypeslib.as_array(words)


def _age(instant: int) -> float:
    """Seconds since an instant of the monotonic clock, ns; 0 if it is still to come, as across time namespaces."""
    return max(0, time.monotonic_ns() - instant) / NS


def checked_timeout(timeout: Any) -> float:
    """A number of seconds; may be infinite or below 0."""
    return checks.number("timeout", timeout, unit="seconds", finite=False)


def checked_weights(name: str, weights: ArrayLike) -> NDArray[np.float64]:
    """A copy of weights: float64[n], finite, at least 0, not all 0.

    Raises:
        InvalidWeightsError: for anything else.
    """
    try:
        checked = np.array(weights, np.float64)
    except (TypeError, ValueError) as error:
        raise InvalidWeightsError(f"{name} must be numbers, one per server, got {weights!r}") from error
    if checked.ndim != 1 or not np.isfinite(checked).all() or (checked < 0.0).any():
        raise InvalidWeightsError(f"{name} must be finite numbers of at least 0, got {weights!r}")
    if not checked.any():
        raise InvalidWeightsError(f"one of {name} must be above 0, got {weights!r}")
    return checked


def permissions_of(path: Path) -> str:
    """A sentence about who may use a file."""
    user = f"this process is user {os.geteuid()}"
    try:
        owner = path.lstat()
    except OSError as error:
        return f"{path.parent} cannot be searched ({error.strerror}); {user}"
    mode = stat.filemode(owner.st_mode)
    return f"{path} has mode {mode} and belongs to user {owner.st_uid}, group {owner.st_gid}; {user}"


def _checked_header(name: str, descriptor: int, status: os.stat_result) -> tuple[Any, abi.Layout]:
    """Return the file's header and the layout it stands for, or raise RegionFormatError saying why there is none."""

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
    minor = min(values["version_minor"], abi.VERSION_MINOR)
    # Version 1.0 had nothing but reserved bytes where the options are.
    layout = abi.Layout(capacity, minor, values["options"] & abi.OPTION_INDEX if minor else 0)
    frames_end = values["frames_offset"] + values["num_frames"] * values["frame_size"]
    actions_end = values["actions_offset"] + values["num_actions"] * values["action_size"]
    names_end = values["names_offset"] + abi.NUM_NAMES * values["names_size"]
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
    if fits and layout.names_size:
        fits = (
            values["names_offset"] % abi.LINE == 0
            and values["names_size"] % abi.LINE == 0
            and values["names_size"] >= layout.names_size
            and actions_end <= values["names_offset"]
            and names_end <= values["total_size"]
        )
    if not fits:
        raise refuse("its sizes and offsets contradict each other")
    if not (1e-6 <= float(header["clock_rate"]) <= 1e6):
        raise refuse(f"its clock rate is {float(header['clock_rate'])!r}")
    if not 1 <= values["publish_interval"] <= DAY * NS:
        raise refuse(f"its publish interval is {values['publish_interval']} ns")
    return header, layout


_open_regions: weakref.WeakSet[Region] = weakref.WeakSet()


def _lose_all() -> None:
    for region in list(_open_regions):
        region._lose()


os.register_at_fork(after_in_child=_lose_all)
