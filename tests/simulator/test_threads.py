"""The threads beside the caller: they all work, away from its core, and a forked child gets its own."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable

import pytest

from lbgym.simulator.threads import Workers, available_cores


def threads_that_work(workers: Workers, count: int) -> set[int]:
    """Which threads a job runs on; none leaves before all have come."""
    seen: set[int] = set()
    together = threading.Barrier(count, timeout=30)

    def work() -> None:
        seen.add(threading.get_native_id())
        together.wait()

    workers.run(work)
    return seen


@pytest.mark.parametrize("count", [1, 3])
def test_every_thread_works_and_the_caller_too(count: int) -> None:
    workers = Workers(count)
    for _ in range(3):
        seen = threads_that_work(workers, count + 1)
        assert len(seen) == count + 1
        assert threading.get_native_id() in seen
    workers.close()
    workers.close()


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity") or available_cores() < 2, reason="needs two cores and Linux")
def test_the_others_are_kept_off_the_callers_core() -> None:
    allowed = os.sched_getaffinity(0)
    workers = Workers(1)
    for _ in range(2):  # a thread is placed once it has said who it is
        (other,) = threads_that_work(workers, 2) - {threading.get_native_id()}
    assert len(os.sched_getaffinity(other)) == len(allowed) - 1
    assert os.sched_getaffinity(0) == allowed
    workers.close()


def test_what_fails_there_fails_here() -> None:
    workers = Workers(1)
    caller = threading.get_native_id()

    def work() -> None:
        if threading.get_native_id() != caller:
            raise ZeroDivisionError("there")

    with pytest.raises(ZeroDivisionError, match="there"):
        workers.run(work)
    workers.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_starts_its_own_threads() -> None:
    workers = Workers(1)
    threads_that_work(workers, 2)
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    child = context.Process(target=lambda: answers.put(len(threads_that_work(workers, 2))))
    child.start()
    child.join(30)
    assert child.exitcode == 0 and answers.get() == 2
    workers.close()


def test_ctrl_c_while_jobs_are_handed_out_leaves_none_at_work() -> None:
    """One that was handed out, and is not known for it, went on writing to arrays that the next reset began to use."""
    workers = Workers(1)
    workers.run(lambda: None)
    pool = workers._pool
    assert pool is not None
    submit = pool.submit

    begun = threading.Event()

    def interrupted(work: Callable[[], None]) -> None:
        submit(work)
        assert begun.wait(30)
        raise KeyboardInterrupt

    pool.submit = interrupted  # type: ignore[method-assign, assignment]
    ended = []

    def work() -> None:
        begun.set()
        time.sleep(0.2)
        ended.append(threading.get_ident())

    with pytest.raises(KeyboardInterrupt):
        workers.run(work)
    assert len(ended) == 1 and ended[0] != threading.get_ident()
    workers.run(work)
    assert len(ended) == 3
    workers.close()
