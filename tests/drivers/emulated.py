"""The emulator as a process, and the loop of a publisher in a thread, for tests."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from lbgym.drivers import Publisher
from lbgym.sharedmemory import ObservationBuffer, SharedMemoryRegion


@contextmanager
def emulator(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """``lbgym dataplane emulate`` with its first line read, which is its attribute ``ready``; killed in the end."""
    command = [sys.executable, "-m", "lbgym", "dataplane", "emulate", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("region"), process.communicate()
        process.ready = line  # type: ignore[attr-defined]
        yield process
    finally:
        process.kill()
        process.communicate()


@contextmanager
def running(publisher: Publisher) -> Iterator[None]:
    """The publisher's loop in a thread."""
    stop = threading.Event()
    thread = threading.Thread(target=publisher.run, args=(stop,))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def following(region: SharedMemoryRegion, timeout: float = 10.0) -> Iterator[ObservationBuffer]:
    """Observations as they come, some perhaps left out, until the producer closes the region; always one buffer."""
    buffer = region.new_buffer()
    limit = time.monotonic() + 3 * timeout
    while True:
        assert time.monotonic() < limit, "what was waited for does not come"
        more = region.wait_observation(buffer.sequence_id, timeout)
        if not more:
            assert region.closed_by_producer, f"nothing new within {timeout} s"
            return
        assert region.read_into(buffer)
        yield buffer
