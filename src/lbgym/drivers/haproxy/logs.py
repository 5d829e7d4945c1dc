"""Flow completion times from HAProxy's log: :class:`FlowLog`."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import selectors
import socket
import stat
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...features import STATISTICS
from ...features.reservoir_kernel import CHANGED, META_SIZE, OVERWRITE, RESULT_SIZE, RNG, add_many, reservoir_features
from ..base import DriverError
from .runtime import shown

#: What a frontend in ``mode tcp`` must log; in ``mode http`` with %Ta, the time of a request, in place of %Tt.
LOG_FORMAT = "lbgym1 %pid %f %lc %b %s %Tt %ts"

_LINE = re.compile(rb"lbgym1 (\d+) (\S+) (\d+) (\S+) (\S+) \+?(-?\d+) (\S)")
#: Bytes asked for to hold datagrams that have not been read; what the system grants may be less.
_BUFFER = 16 << 20
#: States of termination (first letter of %ts) of flows whose time says how long a server took: normal, and ended by
#: the client. The others were ended by a timeout, by HAProxy, or by a server that did not do its work.
_TIMED = b"-C"
#: Samples kept of each server.
_SLOTS = 128
#: Weight of a sample per second of its age, as everywhere in lbgym.
_LOG_DECAY = float(np.log(0.9))


@dataclass(slots=True)
class FlowTimes:
    """Flows of one backend that have ended, as logged.

    Attributes:
        servers: name of each flow's server.
        seconds: FCT of each.
        received: when its line came, seconds on the monotonic clock.
        ended: flows that ended, by server, also those whose time says nothing.
        failed: those of them that the server did not answer or broke off.
    """

    servers: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    received: list[float] = field(default_factory=list)
    ended: dict[str, int] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)


class FlowLog:
    """Receives HAProxy's log lines on a datagram socket, in a thread of its own: one for all backends.

    Lines are those of :data:`LOG_FORMAT`, with whatever header before it; others are left alone. Every frontend of
    every process numbers its lines, so that lines that are lost on the way, even in this machine's buffers, are
    counted.

    Args:
        place: path of a Unix datagram socket to make, which everybody may write to as to ``/dev/log``, or host and
            UDP port.

    Raises:
        DriverError: if it cannot be bound.
    """

    def __init__(self, place: str | tuple[str, int]) -> None:
        self.place = place
        self._lock = threading.Lock()
        self._flows: dict[str, FlowTimes] = {}
        #: By sender, process and frontend: the first number, the largest, and how many have come.
        self._numbers: dict[tuple[object, bytes, bytes], list[int]] = {}
        self._received = 0
        self._users = 0
        self._socket = _bind(place)
        self._identity = _file_of(place)
        self._wake, self._end = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="lbgym-haproxy-log", daemon=True)
        self._thread.start()

    @property
    def received(self) -> int:
        """Lines that have come."""
        with self._lock:
            return self._received

    @property
    def lost(self) -> int:
        """Lines that HAProxy numbered and that have not come."""
        with self._lock:
            return sum(last - first + 1 - count for first, last, count in self._numbers.values())

    def take(self, backend: str) -> FlowTimes:
        """The flows of a backend that have ended since the last call."""
        with self._lock:
            return self._flows.pop(backend, None) or FlowTimes()

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._socket, selectors.EVENT_READ)
            selector.register(self._end, selectors.EVENT_READ)
            while True:
                if any(key.fileobj is self._end for key, _ in selector.select()):
                    return
                lines: list[tuple[bytes, object]] = []
                with contextlib.suppress(BlockingIOError):
                    while len(lines) < 1000:
                        lines.append(self._socket.recvfrom(2048))
                self._note(lines)

    def _note(self, lines: Iterable[tuple[bytes, object]]) -> None:
        now = time.monotonic()
        with self._lock:
            for line, sender in lines:
                found = _LINE.search(line)
                if found is None:
                    continue
                process, frontend, number, backend, server, milliseconds, state = found.groups()
                self._received += 1
                # A process may log from a new port for every line; its host stays.
                host = sender[0] if isinstance(sender, tuple) else None
                count = self._numbers.setdefault((host, process, frontend), [int(number), int(number), 0])
                count[0], count[1], count[2] = min(count[0], int(number)), max(count[1], int(number)), count[2] + 1
                if server.startswith(b"<"):
                    continue
                flows, name = self._flows.setdefault(backend.decode(), FlowTimes()), server.decode()
                flows.ended[name] = flows.ended.get(name, 0) + 1
                if state in _TIMED:
                    flows.servers.append(name)
                    flows.seconds.append(max(0, int(milliseconds)) * 1e-3)
                    flows.received.append(now)
                elif state != b"c":
                    flows.failed[name] = flows.failed.get(name, 0) + 1

    def share(self) -> FlowLog:
        """For one more user, who closes it."""
        self._users += 1
        return self

    def close(self) -> None:
        """End when the last user closes it."""
        self._users -= 1
        if self._users > 0 or self._socket.fileno() < 0:
            return
        self._wake.close()
        self._thread.join()
        self._end.close()
        self._socket.close()
        if isinstance(self.place, str) and self._identity == _file_of(self.place):
            with contextlib.suppress(OSError):
                os.unlink(self.place)


def _file_of(place: str | tuple[str, int]) -> tuple[int, int] | None:
    """Device and inode of a socket's file."""
    if isinstance(place, str):
        with contextlib.suppress(OSError):
            status = os.lstat(place)
            return status.st_dev, status.st_ino
    return None


def _bind(place: str | tuple[str, int]) -> socket.socket:
    if isinstance(place, str):
        family, address = socket.AF_UNIX, place
        _remove_dead(place)
    else:
        family, address = (socket.AF_INET6 if ":" in place[0] else socket.AF_INET), place  # type: ignore[assignment]
    receiver = socket.socket(family, socket.SOCK_DGRAM)
    try:
        receiver.setblocking(False)
        receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
        receiver.bind(address)
        if isinstance(place, str):
            os.chmod(place, 0o666)
    except OSError as error:
        receiver.close()
        raise DriverError(f"cannot receive HAProxy's log at {shown(place)}: {error.strerror or error}") from error
    return receiver


def _remove_dead(path: str) -> None:
    """Remove the socket of a process that has ended."""
    with contextlib.suppress(OSError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                Path(path).unlink()


class FctStatistics:
    """A reservoir of FCTs per row, and the five statistics drawn from each."""

    def __init__(self) -> None:
        self._values, self._weights = np.zeros((0, _SLOTS)), np.zeros((0, _SLOTS))
        self._meta = np.zeros((0, META_SIZE), np.int64)
        self._results = np.zeros((0, RESULT_SIZE))
        self.count, self.sum = 0, 0.0

    def add(self, flows: FlowTimes, rows: Mapping[str, int]) -> None:
        """Take in the FCTs of the servers that have ``rows``, in the order they came."""
        of = np.array([rows.get(name, -1) for name in flows.servers], np.int64)
        seconds, times = np.array(flows.seconds), np.array(flows.received)
        self.count += int((of >= 0).sum())
        self.sum += float(seconds[of >= 0].sum())
        for row in np.unique(of[of >= 0]).tolist():
            self._grow(row + 1)
            mine = of == row
            add_many(
                self._values[row], self._weights[row], self._meta[row], self._results[row],
                seconds[mine], times[mine], 1.0, OVERWRITE, _LOG_DECAY,
            )  # fmt: skip

    def statistics(self, count: int) -> NDArray[np.float32]:
        """float32[count, 5], seconds; 0 without a sample."""
        self._grow(count)
        for row in np.flatnonzero(self._meta[:, CHANGED]).tolist():
            reservoir_features(self._values[row], self._weights[row], self._meta[row], self._results[row])
        return self._results[:count, : len(STATISTICS)].astype(np.float32)

    def forget(self, row: int) -> None:
        """A row belongs to another server from now on."""
        if row < len(self._meta):
            self._meta[row, :RNG], self._results[row] = 0, 0.0

    def _grow(self, count: int) -> None:
        more = count - len(self._meta)
        if more <= 0:
            return
        meta = np.zeros((more, META_SIZE), np.int64)
        meta[:, RNG] = [secrets.randbits(63) for _ in range(more)]
        self._values = np.concatenate([self._values, np.zeros((more, _SLOTS))])
        self._weights = np.concatenate([self._weights, np.zeros((more, _SLOTS))])
        self._meta = np.concatenate([self._meta, meta])
        self._results = np.concatenate([self._results, np.zeros((more, RESULT_SIZE))])
