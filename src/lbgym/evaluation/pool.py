"""Runs spread over the cores of this machine, whatever they are for."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..errors import ScenarioError, WorkerLostError
from ..scenarios import AnyScenario
from ..simulator import Simulation
from .contenders import Contender
from .results import Run, RunSettings
from .runner import scenario_of_seed, simulate

#: A scenario and how it is run.
Setting = tuple[AnyScenario, RunSettings]


@dataclass(frozen=True, slots=True)
class Job:
    """A run to make.

    Attributes:
        setting: index of what is simulated.
        contender: whose policy.
        seed: of the flows.
        series: also record open flows and weights over time.
    """

    setting: int
    contender: Contender
    seed: int
    series: bool = False


def run_jobs(
    settings: Sequence[Setting], jobs: Sequence[Job], processes: int | None = None
) -> Iterator[tuple[Job, Run]]:
    """Make runs; with more than one process they come in the order in which they end.

    Args:
        settings: what the jobs refer to; each process gets them once.
        jobs: in the order in which they are begun.
        processes: None: one per core; 1: this one.

    Raises:
        WorkerLostError: if one of the other processes was killed.
        KeyboardInterrupt: passed on once the other processes have ended.
    """
    processes = _processes(processes, len(jobs))
    return _run_here(settings, jobs) if processes == 1 else _run_in_pool(settings, jobs, processes)


def _processes(processes: int | None, jobs: int) -> int:
    if processes is None:
        processes = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if processes < 1:
        raise ScenarioError(f"processes must be at least 1, got {processes!r}")
    return max(1, min(processes, jobs))


def _run_here(settings: Sequence[Setting], jobs: Iterable[Job]) -> Iterator[tuple[Job, Run]]:
    for job in jobs:
        run = simulate_job(settings, job)
        assert run is not None
        yield job, run


def simulate_job(settings: Sequence[Setting], job: Job, **options: Any) -> Run | None:
    """The run of a job; options as of :func:`lbgym.evaluation.simulate`."""
    scenario, how = settings[job.setting]
    return simulate(scenario, job.contender, job.seed, how, series=job.series, **options)


def _run_in_pool(settings: Sequence[Setting], jobs: Sequence[Job], processes: int) -> Iterator[tuple[Job, Run]]:
    # Compiles the kernel if need be, once and with a message, before every process would.
    scenario, how = settings[jobs[0].setting]
    Simulation(scenario_of_seed(scenario, jobs[0].seed, how)).close()
    # Fresh processes: a fork would inherit locks of Numba's and torch's threads.
    context = multiprocessing.get_context("spawn")
    with _interrupts_held_back():
        # multiprocessing's resource tracker, which starts here, ignores the other two by itself.
        stop = context.Event()
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(processes, context, _begin, (settings, stop))
    running: dict[Future[Run | None], Job] = {}
    lost = False
    try:
        left = iter(jobs)
        # A few jobs in advance: the executor's bookkeeping for all of them would take longer than many a run.
        with _interrupts_held_back(), _single_threaded_children():
            running = {pool.submit(_job, job): job for job in itertools.islice(left, 2 * processes)}
        while running:
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            with _interrupts_held_back(), _single_threaded_children():
                running |= {pool.submit(_job, job): job for job in itertools.islice(left, len(done))}
            for future in done:
                job, run = running.pop(future), future.result()
                if run is not None:
                    yield job, run
    except BrokenProcessPool:
        # One that was killed in the middle may have held a lock that the others, and the event, wait for; and they
        # ignore the SIGTERM by which the executor would end them.
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        lost = True
        raise WorkerLostError(
            f"one of the {processes} processes that make the runs was killed, perhaps because memory ran out; fewer of "
            "them take less"
        ) from None
    finally:
        # Also on Ctrl-C or an error: running jobs see the event at their next control step.
        if not lost:
            stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


#: Signals that ask a process to end.
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Start processes with these signals blocked: if a whole group is signalled, this process stops the others."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _single_threaded_children() -> Iterator[None]:
    """Limit BLAS and torch to one thread per process: there is a process per core."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    missing = [name for name in names if name not in os.environ]
    os.environ.update(dict.fromkeys(missing, "1"))
    try:
        yield
    finally:
        for name in missing:
            del os.environ[name]


# Arguments of this process.
_shared: tuple[Sequence[Setting], Any] | None = None


def _begin(settings: Sequence[Setting], stop: Any) -> None:
    global _shared
    for number in _ENDING:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _shared = settings, stop


def _end_with_parent() -> None:
    """End when the parent process is gone, however it ended."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _job(job: Job) -> Run | None:
    assert _shared is not None
    settings, stop = _shared
    return simulate_job(settings, job, stopped=stop.is_set)
