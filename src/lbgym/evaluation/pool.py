"""Runs spread over the cores of this machine, whatever they are for."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
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
    # Fresh processes: a fork would inherit locks of Numba's and torch's threads. A pipe each and a flag without a lock,
    # since a process can be killed at any instant: half a result in a common queue, or a lock that it held, would keep
    # the others and this one waiting for ever.
    context = multiprocessing.get_context("spawn")
    stop = context.RawValue("b", 0)
    workers: dict[Connection, Any] = {}
    under_way: dict[Connection, deque[Job]] = {}
    left = iter(jobs)
    lost = False

    def give(worker: Connection) -> None:
        for job in itertools.islice(left, 1):
            under_way[worker].append(job)
            with _lost_if_killed(processes):
                worker.send(job)

    try:
        with _interrupts_held_back(), _single_threaded_children():
            for _ in range(processes):
                here, there = context.Pipe()
                process = context.Process(target=_work, args=(settings, stop, there))
                process.start()
                there.close()
                workers[here], under_way[here] = process, deque()
        threading.Thread(target=_end_together, args=(list(workers.values()), stop), daemon=True).start()
        # One job in advance, so that no process waits for this one.
        for _ in range(2):
            for worker in workers:
                give(worker)
        while any(under_way.values()):
            for ready in wait([worker for worker in workers if under_way[worker]]):
                assert isinstance(ready, Connection)
                with _lost_if_killed(processes):
                    run = ready.recv()
                job = under_way[ready].popleft()
                give(ready)
                if isinstance(run, BaseException):
                    raise run
                if run is not None:
                    yield job, run
    except WorkerLostError:
        lost = True
        raise
    finally:
        # Also on Ctrl-C or an error: running jobs see the flag at their next control step.
        stop.value = 1
        for worker, process in workers.items():
            worker.close()
            if lost:
                process.kill()
        for process in workers.values():
            process.join()


def _end_together(processes: Sequence[Any], stop: Any) -> None:
    """Kill all processes when one has been: who waits for half of another one's result would not notice."""
    wait([process.sentinel for process in processes])
    if not stop.value:
        for process in processes:
            process.kill()


@contextmanager
def _lost_if_killed(processes: int) -> Iterator[None]:
    """Turn the end of a pipe, also in the middle of a result, into an error that says what happened."""
    try:
        yield
    except (EOFError, OSError):
        raise WorkerLostError(
            f"one of the {processes} processes that make the runs was killed, perhaps because memory ran out; fewer of "
            "them take less"
        ) from None


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


def _work(settings: Sequence[Setting], stop: Any, jobs: Connection) -> None:
    """Make the runs that the parent process asks for, until it closes its end."""
    for number in _ENDING:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, OSError), jobs:
        while True:
            job = jobs.recv()
            try:
                answer: Run | BaseException | None = simulate_job(settings, job, stopped=lambda: bool(stop.value))
            except Exception as error:
                error.add_note(f"in another process:\n{traceback.format_exc()}")
                answer = error
            try:
                jobs.send(answer)
            except (pickle.PicklingError, AttributeError, TypeError):
                jobs.send(RuntimeError(f"cannot be sent from another process: {answer!r}"))


def _end_with_parent() -> None:
    """End when the parent process is gone, however it ended."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
