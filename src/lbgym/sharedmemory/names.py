"""Regions by name: :class:`SharedMemoryRegion` creates, replaces and opens them; a list, and removal."""

from __future__ import annotations

import errno
import os
import secrets
import stat
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import checks
from ..errors import (
    InvalidOptionError,
    InvalidWeightsError,
    RegionBusyError,
    RegionError,
    RegionExistsError,
    RegionFormatError,
    RegionNotFoundError,
)
from ..features.columns import FEATURE_NAMES, GROUND_TRUTH_NAMES, column_index
from . import abi, system
from .agent import AgentSide
from .producer import ProducerSide
from .region import DAY, NS, checked_timeout, checked_weights, feature_bits, permissions_of

#: Errors of the system where a file may not be written to.
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
#: Seconds between looks for a region.
_LOOK_UP = 0.01
#: Looks at a name that belongs to somebody, a millisecond apart, before it counts as taken: whoever replaces the region
#: of a dead producer holds that region's lock for a moment.
_LOOKS = 10


class SharedMemoryRegion(ProducerSide, AgentSide):
    """One balancer's data plane and its agent, connected by a file in shared memory.

    The data plane is the producer: it creates the region, publishes observations and puts the newest action's weights
    in force. The agent attaches, reads observations and writes actions. Anybody else may attach and look. Reading never
    holds up a writer; a reader gets a whole observation or action, or none. There is one producer and one agent at a
    time, which the kernel's file locks guarantee also when a process is killed.

    Made by :meth:`create` or :meth:`attach`. As a context manager it is closed at the end, and unlinked, too, if it was
    created here. Not for several threads at once. A process that is forked does not inherit it: there it is closed, so
    that no child keeps the locks of a parent that was killed.

    Attributes:
        name, path: the region's name and file.
        layout: :class:`~lbgym.sharedmemory.abi.Layout` for its capacity and version.
        version: (major, minor) of the binary interface.
        capacity: servers there is room for.
        instance: int, a different one for each creation.
        created_at: seconds since 1970.
        publish_interval: seconds on the data plane's clock between observations, as planned.
        clock_rate: seconds of the data plane's clock per second.
        producer_pid: process id of the producer.
        driver: kind of data plane.
        real_features: frozenset of the features and ground-truth columns that this data plane measures; the others
            are zero. All of them in a region of version 1.0, which cannot say.
        takes_index: whether the data plane dispatches by index parameters, so that an action may give them.
        is_producer: whether it was created here.
        read_only: whether it was attached without the right to write.
    """

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
        features: Iterable[str] | None = None,
        takes_index: bool = False,
        driver: str = "",
        mode: int = 0o600,
        group: int | str | None = None,
    ) -> SharedMemoryRegion:
        """Create a region, as its producer. One whose producer is gone is replaced, a live one never.

        The file appears under its name when it is complete, and with all its memory reserved.

        Args:
            name: 1 to 200 letters, digits, ".", "-", "_".
            num_servers: servers known now; observations may have more later, up to the capacity.
            capacity: room for this many servers; None: 64, or ``num_servers`` if that is more.
            publish_interval: seconds on the data plane's clock between observations, as planned.
            clock_rate: seconds of that clock per second; 1 unless time is scaled.
            safe_weights: float[num_servers] in force without an agent's; None: all 1.
            features: names (or aliases) of the features and ground-truth columns that this data plane measures, the
                others being zero; None: all.
            takes_index: whether it dispatches by index parameters where an action gives them.
            driver: kind of data plane, at most 24 bytes; for people.
            mode: permissions of the file.
            group: owning group, id or name; None: the process's.

        Raises:
            RegionExistsError: if the name belongs to a live region or to a file that is no region.
            RegionError: for a bad name, or if there is no room or no right to create it.
            UnknownNameError: for a feature that does not exist.
            InvalidOptionError, InvalidWeightsError: for a value out of its range.
        """
        system.require_linux()
        path = system.path_of(name)
        num_servers = checks.whole("num_servers", num_servers, high=abi.MAX_CAPACITY)
        if capacity is None:
            capacity = max(num_servers, abi.DEFAULT_CAPACITY)
        capacity = checks.whole("capacity", capacity, low=num_servers, high=abi.MAX_CAPACITY)
        layout = abi.Layout(capacity, options=abi.OPTION_INDEX if takes_index else 0)
        header = np.zeros((), abi.HEADER.dtype)
        header["magic"] = abi.MAGIC
        header["version_major"], header["version_minor"] = abi.VERSION_MAJOR, abi.VERSION_MINOR
        header["header_size"], header["total_size"] = abi.HEADER.size, layout.total_size
        header["capacity"], header["options"] = layout.capacity, layout.options
        header["num_frames"], header["num_actions"] = abi.NUM_FRAMES, abi.NUM_ACTIONS
        header["frames_offset"], header["frame_size"] = layout.frames_offset, layout.frame_size
        header["actions_offset"], header["action_size"] = layout.actions_offset, layout.action_size
        header["names_offset"], header["names_size"] = layout.names_offset, layout.names_size
        header["features"] = feature_bits(_checked_features(features))
        header["instance"] = secrets.randbits(63)
        header["created_at"], header["heartbeat"] = time.time_ns(), time.monotonic_ns()
        interval = checks.seconds("publish_interval", publish_interval, low=1e-6, high=DAY)
        header["publish_interval"] = round(interval * NS)
        header["clock_rate"] = checks.number("clock_rate", clock_rate, low=1e-6, high=1e6)
        header["producer_pid"], header["state"] = os.getpid(), abi.STATE_RUNNING
        if not driver.isprintable() or len(driver.encode()) > 24:
            raise InvalidOptionError(f"driver must be at most 24 bytes of printable text, got {driver!r}")
        header["driver"] = driver.encode()
        safe = checked_weights("safe_weights", np.ones(num_servers) if safe_weights is None else safe_weights)
        if len(safe) != num_servers:
            raise InvalidWeightsError(f"safe_weights must be {num_servers} numbers, one per server, got {len(safe)}")
        if isinstance(mode, bool) or not isinstance(mode, int) or not 0 <= mode <= 0o777:
            raise InvalidOptionError(f"mode must be permissions from 0 to 0o777, got {mode!r}")
        region = cls._create_file(name, path, header, mode, _group_id(group))
        region._begin(safe)
        try:
            region._take_name()
        except BaseException:
            region.close()
            raise
        return region

    @classmethod
    def _create_file(cls, name: str, path: Path, header: NDArray[Any], mode: int, group: int) -> SharedMemoryRegion:
        """A region in a file that has no name yet."""
        size = int(header["total_size"])
        try:
            descriptor = system.unnamed_file(path.parent, size, mode, group)
            try:
                os.pwrite(descriptor, header.tobytes(), 0)
                system.try_lock(descriptor, abi.PRODUCER_LOCK)
            except BaseException:
                os.close(descriptor)
                raise
            # Mapped before it has a name, so that a failure leaves nothing behind.
            return cls(name, descriptor, is_producer=True, read_only=False)
        except OSError as error:
            raise _cannot_create(name, path, size, error) from error

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
                # Only the holder of the old region's lock removes its name, so that two who start at once cannot both;
                # and it is marked first, so that the lock does not look like that of a live producer.
                if system.try_lock(old._descriptor, abi.PRODUCER_LOCK):
                    old._retire()
                    old.unlink()
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
        """Open an existing region, as its agent or to look at it.

        Args:
            name: the region's name.
            timeout: seconds to wait for it.
            live: wait for one whose producer lives.
            read_only: map it without the right to write; None: only if the file's permissions forbid writing.

        Raises:
            RegionNotFoundError: if there is no region (or no live one) in time.
            RegionFormatError: if the file is no region of this version; the message says what was found.
            RegionError: if permission is denied.
        """
        system.require_linux()
        path = system.path_of(name)
        deadline = time.monotonic() + checked_timeout(timeout)
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
                raise RegionError(f"no permission for region {name!r}: {permissions_of(path)}") from error
            raise RegionError(f"cannot open region {name!r}, {path}: {error.strerror}") from error


def region_names() -> Iterator[str]:
    """The names of all regions that this process may read, also of other versions."""
    try:
        paths = sorted(system.directory().iterdir())
    except OSError:
        return
    for path in paths:
        try:
            if _is_region(path):
                yield path.name
        except OSError:
            continue


def remove_region(name: str, *, force: bool = False) -> None:
    """Remove a region whose producer is gone; nobody can replace it meanwhile. Whoever is attached stays so.

    Args:
        name: the region's name.
        force: also if its producer lives, or it is a region of another version.

    Raises:
        RegionNotFoundError: if there is no such region.
        RegionBusyError: if its producer lives.
        RegionFormatError: if the file is no region, or one of which this version cannot say whether it is in use.
        RegionError: if permission is denied.
    """
    path = system.path_of(name)
    try:
        if not _is_region(path):
            raise RegionFormatError(f"{path} is no region, and is not removed")
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        raise RegionNotFoundError(f"there is no region {name!r} in {path.parent}") from None
    except OSError as error:
        raise _cannot_remove(name, path, error) from error
    try:
        if not force:
            _require_unused(name, descriptor)
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            path.unlink()
    except FileNotFoundError:
        raise RegionNotFoundError(f"region {name!r} was removed from {path.parent} meanwhile") from None
    except OSError as error:
        raise _cannot_remove(name, path, error) from error
    finally:
        os.close(descriptor)


def _require_unused(name: str, descriptor: int) -> None:
    """Take the producer's lock of an open file, or say who has it."""
    try:
        with SharedMemoryRegion.attach(name, read_only=True) as region:
            pid = region.producer_pid
    except RegionFormatError as error:
        raise RegionFormatError(f"{error}; it may be in use; --force removes it") from None
    if not system.try_lock(descriptor, abi.PRODUCER_LOCK):
        raise RegionBusyError(
            f"region {name!r} has a live producer (process {pid}); stop that one, or take the region from it "
            "with --force"
        )


def _is_region(path: Path) -> bool:
    """True if a file begins as regions of all versions do."""
    if not stat.S_ISREG(path.lstat().st_mode):
        return False
    with path.open("rb") as file:
        return file.read(8) == abi.MAGIC.to_bytes(8, "little")


def _checked_features(features: Iterable[str] | None) -> frozenset[str]:
    every = (*FEATURE_NAMES, *GROUND_TRUTH_NAMES)
    if features is None:
        return frozenset(every)
    if isinstance(features, str):
        raise InvalidOptionError(f"features must be several names, got the text {features!r}")
    return frozenset(every[column_index(name)] for name in features)


def _group_id(group: int | str | None) -> int:
    if group is None:
        return -1
    if not isinstance(group, str):
        return checks.whole("group", group, low=0, high=(1 << 32) - 2)
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


def _cannot_remove(name: str, path: Path, error: OSError) -> RegionError:
    return RegionError(f"cannot remove region {name!r} from {path.parent}: {error.strerror or error}")
