"""Flow completion times from HAProxy's log: :class:`FlowLog`."""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import socket
import stat
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from ..base import DriverError
from ..proxy import Log, Place, shown

#: What a frontend in ``mode tcp`` must log; in ``mode http`` with %Ta, the time of a request, in place of %Tt.
LOG_FORMAT = "lbgym1 %pid %f %lc %b %s %Tt %ts"

# Anybody may write to the socket: numbers are no longer than HAProxy's.
_LINE = re.compile(rb"lbgym1 (\d{1,19}) (\S+) (\d{1,19}) (\S+) (\S+) \+?(-?\d{1,15}) (\S)")
#: Bytes asked for to hold datagrams that have not been read; what the system grants may be less.
_BUFFER = 16 << 20
#: States of termination (first letter of %ts) of flows whose time says how long a server took: normal, and ended by
#: the client. The others were ended by a timeout, by HAProxy, or by a server that did not do its work.
_TIMED = b"-C"


class FlowLog(Log):
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

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place = place
        #: By sender, process and frontend: the first number, the largest, and how many have come.
        self._numbers: dict[tuple[object, bytes, bytes], list[int]] = {}
        self._socket = _bind(place)
        self._identity = _file_of(place)
        self._wake, self._end = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="lbgym-haproxy-log", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> int:
        """Lines that HAProxy numbered and that have not come."""
        with self._lock:
            return sum(last - first + 1 - count for first, last, count in self._numbers.values())

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
                timed = state in _TIMED
                seconds = max(0, int(milliseconds)) * 1e-3 if timed else None
                names = backend.decode("utf-8", "replace"), server.decode("utf-8", "replace")
                self._note_flow(*names, now, seconds, not timed and state != b"c")

    def _stop(self) -> None:
        if self._socket.fileno() < 0:
            return
        self._wake.close()
        self._thread.join()
        self._end.close()
        self._socket.close()
        if isinstance(self.place, str) and self._identity == _file_of(self.place):
            with contextlib.suppress(OSError):
                os.unlink(self.place)


def _file_of(place: Place) -> tuple[int, int] | None:
    """Device and inode of a socket's file."""
    if isinstance(place, str):
        with contextlib.suppress(OSError):
            status = os.lstat(place)
            return status.st_dev, status.st_ino
    return None


def _bind(place: Place) -> socket.socket:
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
