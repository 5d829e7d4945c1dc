"""An open-loop load generator: one TCP connection per flow, latency from the scheduled time.

``python -m lbgym.lab.generator JOB`` runs one in a process of its own: it prints "ready", reads the time of the start
(seconds of the monotonic clock) from standard input, and writes what it measured beside the job.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import resource
import select
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .servers import HEADER

#: How flows end, as in ``lbgym.evaluation.Run.flows``.
COMPLETED, REJECTED, FAILED, OPEN = 0, 1, 2, 4
#: The reasons of failed and rejected flows.
REASONS = ("", "refused", "reset", "unreachable", "no answer in time", "answer cut short", "status of the answer")
_REFUSED, _RESET, _UNREACHABLE, _TIMEOUT, _SHORT, _STATUS = range(1, len(REASONS))
_HEAD = re.compile(rb"HTTP/1\.[01] (\d{3})[^\n]*\n")
_LENGTH = re.compile(rb"^content-length: *(\d+)", re.IGNORECASE | re.MULTILINE)
_SERVER = re.compile(rb"^" + HEADER.encode() + rb": *([^\r\n]*)", re.IGNORECASE | re.MULTILINE)
_READ, _LONGEST_HEAD = 1 << 16, 1 << 14
#: Connections begun between two looks at those that are open.
_BATCH = 16


@dataclass(frozen=True)
class Outcome:
    """What became of each flow, in order of arrival.

    Attributes:
        fct: float64[n], seconds from the scheduled time to the end of the answer, or until it failed or was given up.
        lag: float64[n], seconds by which its connection was begun late; NaN if it never was.
        status: int64[n], ``COMPLETED``, ``REJECTED`` (refused, or status 503), ``FAILED`` or ``OPEN`` at the end.
        reason: int64[n], index into ``REASONS``.
        server: the name in each answer; empty without an answer.
        begun: how many were begun, the first ones.
    """

    fct: NDArray[np.float64]
    lag: NDArray[np.float64]
    status: NDArray[np.int64]
    reason: NDArray[np.int64]
    server: list[str]
    begun: int


@dataclass(slots=True)
class _Flow:
    number: int
    connection: socket.socket
    due: float
    unsent: bytes
    answer: bytearray = field(default_factory=bytearray)
    received: int = 0
    body: int = -1
    length: int = -1
    code: int = 0


class Generator:
    """Opens a connection per flow at its time, whatever became of those before.

    Args:
        address: IPv4 address and port.
        arrivals: float64[n], seconds from the start, not decreasing.
        requests: what each flow sends; the answer ends with the connection.
        counted: flows that are followed to their end, the first ones.
        duration: seconds during which flows are begun in any case; after it, until the last counted one has ended.
        timeout: seconds from its scheduled time after which a flow is given up; it has failed.
    """

    def __init__(
        self,
        address: tuple[str, int],
        arrivals: NDArray[np.float64],
        requests: Callable[[int], bytes],
        *,
        counted: int,
        duration: float,
        timeout: float,
    ) -> None:
        n = len(arrivals)
        self._address, self._arrivals, self._requests = address, arrivals, requests
        self._counted, self._duration, self._timeout = counted, duration, timeout
        self._fct, self._lag = np.full(n, np.nan), np.full(n, np.nan)
        self._status, self._reason = np.full(n, OPEN), np.zeros(n, np.int64)
        self._server = [""] * n
        self._flows: dict[int, _Flow] = {}
        # All flows have the same time, so they time out in the order in which they begin.
        self._queue: deque[_Flow] = deque()
        self._left = counted
        self._poll = select.epoll()

    def run(self, start: float, limit: float = math.inf) -> Outcome:
        """Generate.

        Args:
            start: time 0, seconds of the monotonic clock.
            limit: seconds after which it ends at the latest; what is open then stays so.
        """
        arrivals, following, n = self._arrivals, 0, len(self._arrivals)
        try:
            while True:
                now = time.monotonic() - start
                if now >= limit or (now >= self._duration and self._left == 0 and following >= self._counted):
                    break
                for _ in range(_BATCH):
                    if following == n or arrivals[following] > now:
                        break
                    self._begin(following, start, now)
                    following += 1
                due = float(arrivals[following]) if following < n else math.inf
                self._give_up(start, now)
                oldest = self._queue[0].due - start + self._timeout if self._queue else math.inf
                until = min(due, oldest, limit, self._duration if now < self._duration else math.inf)
                self._serve(start, until - (time.monotonic() - start))
            now = time.monotonic() - start
            for flow in self._flows.values():
                self._fct[flow.number] = now - arrivals[flow.number]
                flow.connection.close()
        finally:
            self._poll.close()
        return Outcome(self._fct, self._lag, self._status, self._reason, self._server, following)

    def _begin(self, number: int, start: float, now: float) -> None:
        self._lag[number] = now - self._arrivals[number]
        connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        connection.setblocking(False)
        flow = _Flow(number, connection, start + float(self._arrivals[number]), self._requests(number))
        code = connection.connect_ex(self._address)
        if code not in (0, errno.EINPROGRESS):
            self._end(flow, now, *_failure(code))
            return
        handle = connection.fileno()
        self._flows[handle] = flow
        self._queue.append(flow)
        self._poll.register(handle, select.EPOLLOUT)

    def _give_up(self, start: float, now: float) -> None:
        queue = self._queue
        while queue and (queue[0].connection.fileno() < 0 or now >= queue[0].due - start + self._timeout):
            flow = queue.popleft()
            if flow.connection.fileno() >= 0:
                self._end(flow, now, FAILED, _TIMEOUT)

    def _serve(self, start: float, seconds: float) -> None:
        """Wait for something to happen, and handle it."""
        events = self._poll.poll(0.0)
        if not events and seconds > 0.0:
            # epoll of Python rounds up to milliseconds; select does not, and an epoll object can be waited for.
            select.select([self._poll], [], [], min(seconds, 1.0))
            events = self._poll.poll(0.0)
        for handle, happened in events:
            flow = self._flows[handle]
            try:
                if flow.unsent and happened & ~select.EPOLLIN:
                    self._send(flow)
                else:
                    self._receive(flow, start)
            except BlockingIOError:
                continue
            except OSError as error:
                self._end(flow, time.monotonic() - start, *_failure(error.errno))

    def _send(self, flow: _Flow) -> None:
        if code := flow.connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise OSError(code, os.strerror(code))
        flow.unsent = flow.unsent[flow.connection.send(flow.unsent) :]
        if not flow.unsent:
            self._poll.modify(flow.connection.fileno(), select.EPOLLIN)

    def _receive(self, flow: _Flow, start: float) -> None:
        while data := flow.connection.recv(_READ):
            flow.received += len(data)
            if flow.body < 0:
                flow.answer += data
                self._read_head(flow)
        now = time.monotonic() - start
        if flow.body < 0 or (flow.length >= 0 and flow.received - flow.body < flow.length):
            self._end(flow, now, FAILED, _SHORT)
        elif 200 <= flow.code < 300:
            self._end(flow, now, COMPLETED, 0)
        else:
            self._end(flow, now, REJECTED if flow.code == 503 else FAILED, _STATUS)

    def _read_head(self, flow: _Flow) -> None:
        end = flow.answer.find(b"\r\n\r\n")
        if end < 0:
            if len(flow.answer) > _LONGEST_HEAD:
                raise OSError(errno.EPROTO, "no HTTP answer")
            return
        head = bytes(flow.answer[: end + 2])
        first = _HEAD.match(head)
        if first is None:
            raise OSError(errno.EPROTO, "no HTTP answer")
        flow.code, flow.body = int(first[1]), end + 4
        if found := _LENGTH.search(head):
            flow.length = int(found[1])
        if found := _SERVER.search(head):
            self._server[flow.number] = found[1].decode("latin-1").strip()
        flow.answer.clear()

    def _end(self, flow: _Flow, now: float, status: int, reason: int) -> None:
        number = flow.number
        self._fct[number] = now - self._arrivals[number]
        self._status[number], self._reason[number] = status, reason
        self._flows.pop(flow.connection.fileno(), None)
        flow.connection.close()
        if number < self._counted:
            self._left -= 1


def _failure(code: int | None) -> tuple[int, int]:
    """Status and reason of an error of the system."""
    if code == errno.ECONNREFUSED:
        return REJECTED, _REFUSED
    if code in (errno.ECONNRESET, errno.EPIPE, errno.ECONNABORTED):
        return FAILED, _RESET
    if code == errno.EPROTO:
        return FAILED, _SHORT
    if code == errno.ETIMEDOUT:
        return FAILED, _TIMEOUT
    return FAILED, _UNREACHABLE


def write_job(
    file: Path,
    address: tuple[str, int],
    arrivals: NDArray[np.float64],
    requests: Sequence[bytes],
    **options: float,
) -> None:
    """Write a job for another process; options are those of :class:`Generator` and ``limit`` of its ``run``."""
    np.save(file.with_suffix(".npy"), arrivals)
    text = {"address": list(address), "requests": [request.decode("latin-1") for request in requests], **options}
    file.write_text(json.dumps(text))


def read_outcome(file: Path) -> Outcome:
    """What another process measured on a job."""
    with np.load(file.with_suffix(".npz")) as stored:
        return Outcome(
            stored["fct"], stored["lag"], stored["status"], stored["reason"], stored["server"].tolist(),
            int(stored["begun"]),
        )  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """Run a job; returns the exit code."""
    file = Path(arguments[0])
    job: dict[str, Any] = json.loads(file.read_text())
    requests = [request.encode("latin-1") for request in job["requests"]]
    generator = Generator(
        (job["address"][0], job["address"][1]),
        np.load(file.with_suffix(".npy")),
        requests.__getitem__,
        counted=job["counted"],
        duration=job["duration"],
        timeout=job["timeout"],
    )
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    line = sys.stdin.readline()
    if not line:
        return 1  # whoever was to give the start is gone
    outcome = generator.run(float(line), job["limit"])
    np.savez(
        file.with_suffix(".npz"),
        fct=outcome.fct,
        lag=outcome.lag,
        status=outcome.status,
        reason=outcome.reason,
        server=np.array(outcome.server, dtype=np.str_),
        begun=outcome.begun,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
