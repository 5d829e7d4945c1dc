"""Worker threads that share a call with its calling thread."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

#: Seconds for which the caller looks again and again whether the others are done, before it sleeps.
_PATIENCE = 0.002


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _current_core() -> Callable[[], int] | None:
    """A function that returns the calling thread's core; None where the system has none."""
    if not hasattr(os, "sched_setaffinity"):
        return None
    try:
        return ctypes.CDLL(None).sched_getcpu
    except (OSError, AttributeError):
        return None


class Workers:
    """``count`` threads besides the calling one, started when first needed.

    On Linux they are kept off the caller's core. A thread that the system wakes there waits behind the caller until the
    next tick, 4 ms on many kernels, while another core is idle: longer than a whole step of a vector environment.

    Threads belong to the process: a copy, by ``copy.deepcopy`` or ``pickle``, starts its own when it first needs them.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._pool: ThreadPoolExecutor | None = None
        self._process = 0
        self._threads: list[int] = []
        self._placed: tuple[int, int] = (-1, 0)
        self._core = _current_core()

    def __reduce__(self) -> tuple[type[Workers], tuple[int]]:
        return Workers, (self._count,)

    def run(self, work: Callable[[], None]) -> None:
        """Call ``work`` on every thread, the calling one included, and wait for all."""
        # A forked child inherits the object but not its threads.
        if self._pool is None or self._process != os.getpid():
            self._process = os.getpid()
            self._threads = []
            self._pool = ThreadPoolExecutor(
                self._count,
                thread_name_prefix="lbgym",
                initializer=lambda: self._threads.append(threading.get_native_id()),
            )
        self._keep_off_this_core()
        try:
            jobs = [self._pool.submit(work) for _ in range(self._count)]
            work()
            # What is left takes less than a part of the work; to be woken takes longer where the system is slow at it.
            patience = time.perf_counter() + _PATIENCE
            while not all(job.done() for job in jobs) and time.perf_counter() < patience:
                time.sleep(0)
            wait(jobs)
        except BaseException:
            # After an exception nobody may go on writing to the arrays: neither a job that Ctrl-C has kept from being
            # known here. So the threads end, and others begin when they are needed.
            self.close()
            raise
        for job in jobs:
            job.result()

    def _keep_off_this_core(self) -> None:
        if self._core is None:
            return
        place = (self._core(), len(self._threads))
        if place == self._placed:
            return
        self._placed = place
        elsewhere = os.sched_getaffinity(0) - {place[0]}
        if elsewhere:
            for thread in self._threads:
                os.sched_setaffinity(thread, elsewhere)

    def close(self) -> None:
        """End the threads; idempotent."""
        if self._pool is not None and self._process == os.getpid():
            self._pool.shutdown(cancel_futures=True)
        self._pool = None
