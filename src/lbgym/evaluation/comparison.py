"""Run contenders on the same flows in several processes."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..checks import whole
from ..errors import ScenarioError, UnknownNameError, WorkerLostError
from ..scenarios import AnyScenario, Scenario, load_scenario
from ..simulator import Simulation
from .contenders import Contender, parse_contenders
from .results import Comparison, Conditions, Run, RunSettings
from .runner import agents_of, scenario_of_seed, settings_for, simulate

logger = logging.getLogger("lbgym")

#: Called after every run: runs done, runs in all, and the run.
ProgressCallback = Callable[[int, int, Run], None]


def compare(
    scenario: str | Path | AnyScenario,
    contenders: str | Iterable[str | Contender],
    seeds: int | Sequence[int] = 10,
    *,
    duration: float | None = None,
    warmup: float | None = None,
    drain: float | None = None,
    interval: float | None = None,
    baseline: str | None = None,
    processes: int | None = None,
    keep_flows: bool = False,
    progress: ProgressCallback | None = None,
) -> Comparison:
    """Run every contender on the same flows and compare them.

    The flows that count arrive from ``warmup`` to ``duration`` seconds. Each is followed to its end, with arrivals and
    control going on past ``duration`` for at most ``drain`` seconds; a flow still open then counts with its age.
    Rejected, failed and unrouted flows count with the scenario's ``reject_timeout``, so no contender gains by losing
    its slowest flows.

    The Jain index is that of the servers' utilizations: busy time of the usable cores from the warm-up to ``duration``.

    Args:
        scenario: a name, a TOML path, a Scenario, or a distribution, from which each seed draws its own, the same for
            every contender.
        contenders: as :func:`lbgym.evaluation.parse_contender` reads them, in a list or separated by commas.
        seeds: how many (0, 1, ...), or which.
        duration: seconds; None: the scenario's.
        warmup: seconds at the start whose flows do not count; None: a sixth of the duration.
        drain: None: the scenario's ``reject_timeout``, so that a flow cut off never counts less than a rejected one.
        interval: seconds between two changes of weights; None: what a trained model was trained with, else 0.25.
        baseline: label that the others are compared with; None: the first contender.
        processes: None: one per core. 1 runs in this process; with more, a script that calls this needs the usual
            ``if __name__ == "__main__":``, since the others start afresh.
        keep_flows: keep every flow (``Run.flows``).
        progress: called in this process after every run.

    Raises:
        UnknownNameError: for an unknown scenario, rule, policy or baseline.
        PolicyError: for a model that does not fit the scenario.
        ScenarioError: for a duration, warm-up or number of seeds out of range, or if no flow counts.
        WorkerLostError: if one of the other processes was killed.
        KeyboardInterrupt: once the other processes have ended.
    """
    source = load_scenario(scenario)
    chosen = parse_contenders(contenders)
    labels = [contender.label for contender in chosen]
    baseline = labels[0] if baseline is None else baseline
    if baseline not in labels:
        raise UnknownNameError("baseline", baseline, labels)
    numbers = _seeds(seeds)
    settings = settings_for(source, duration, warmup, drain, interval, keep_flows)
    for contender in chosen:
        # Report a bad policy at once, not from a process.
        agents_of(contender, source.reference, 0)
    conditions = tuple(_conditions(scenario_of_seed(source, seed, settings)) for seed in numbers)
    load = max(condition.load or 0.0 for condition in conditions)
    if load >= 1:
        logger.warning(
            "scenario %r offers %.2f times the capacity of its servers: queues grow as long as the run lasts",
            source.name,
            load,
        )
    # Seed by seed, so that the time left can be estimated.
    jobs = [(contender, seed) for seed in numbers for contender in chosen]
    processes = _processes(processes, len(jobs))
    results: dict[tuple[str, int], Run] = {}
    run_all = _run_here if processes == 1 else _run_in_pool
    for run in run_all(source, settings, jobs, numbers[0], processes):
        results[run.label, run.seed] = run
        if progress is not None:
            progress(len(results), len(jobs), run)
    runs = tuple(results[label, seed] for label in labels for seed in numbers)
    trace = source.reference.workload.trace
    return Comparison(
        scenario=source.name,
        balancers=source.balancers,
        conditions=conditions,
        contenders=tuple(chosen),
        seeds=numbers,
        baseline=baseline,
        settings=settings,
        runs=runs,
        trace=None if trace is None else trace.source,
        drawn=source.varies,
    )


def _conditions(scenario: Scenario) -> Conditions:
    return Conditions(scenario.num_servers, scenario.capacity, scenario.rate, scenario.load)


def _seeds(seeds: int | Sequence[int]) -> tuple[int, ...]:
    if isinstance(seeds, int):
        whole("the number of seeds", seeds, high=1_000_000, error=ScenarioError)
    numbers = tuple(range(seeds)) if isinstance(seeds, int) else tuple(int(seed) for seed in seeds)
    if not numbers or len(set(numbers)) < len(numbers) or min(numbers) < 0:
        raise ScenarioError(
            f"seeds must be a number of at least 1, or different whole numbers of at least 0, got {seeds!r}"
        )
    return numbers


def _processes(processes: int | None, jobs: int) -> int:
    if processes is None:
        processes = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if processes < 1:
        raise ScenarioError(f"processes must be at least 1, got {processes!r}")
    return min(processes, jobs)


_Jobs = Sequence[tuple[Contender, int]]


def _run_here(
    scenario: AnyScenario, settings: RunSettings, jobs: _Jobs, first_seed: int, processes: int
) -> Iterator[Run]:
    for contender, seed in jobs:
        run = simulate(scenario, contender, seed, settings, series=seed == first_seed)
        assert run is not None
        yield run


def _run_in_pool(
    scenario: AnyScenario, settings: RunSettings, jobs: _Jobs, first_seed: int, processes: int
) -> Iterator[Run]:
    # Compiles the kernel if need be, once and with a message, before every process would.
    Simulation(scenario_of_seed(scenario, first_seed, settings)).close()
    # Fresh processes: a fork would inherit locks of Numba's and torch's threads.
    context = multiprocessing.get_context("spawn")
    with _interrupts_held_back():
        # multiprocessing's resource tracker, which starts here, ignores the other two by itself.
        stop = context.Event()
    pool = ProcessPoolExecutor(processes, context, _begin, (scenario, settings, stop))
    try:
        left = iter(jobs)
        # A few jobs in advance: the executor's bookkeeping for all of them would take longer than many a run.
        with _interrupts_held_back(), _single_threaded_children():
            running = {_submit(pool, job, first_seed) for job in itertools.islice(left, 2 * processes)}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            with _interrupts_held_back(), _single_threaded_children():
                running |= {_submit(pool, job, first_seed) for job in itertools.islice(left, len(done))}
            for future in done:
                run = future.result()
                if run is not None:
                    yield run
    except BrokenProcessPool:
        raise WorkerLostError(
            f"one of the {processes} processes of the comparison was killed, perhaps because memory ran out; fewer of "
            "them take less"
        ) from None
    finally:
        # Also on Ctrl-C or an error: running jobs see the event at their next control step.
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, job: tuple[Contender, int], first_seed: int) -> Future[Run | None]:
    contender, seed = job
    return pool.submit(_job, contender, seed, seed == first_seed)


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
_shared: tuple[AnyScenario, RunSettings, Any] | None = None


def _begin(scenario: AnyScenario, settings: RunSettings, stop: Any) -> None:
    global _shared
    for number in _ENDING:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _shared = scenario, settings, stop


def _end_with_parent() -> None:
    """End when the parent process is gone, however it ended."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _job(contender: Contender, seed: int, series: bool) -> Run | None:
    assert _shared is not None
    scenario, settings, stop = _shared
    return simulate(scenario, contender, seed, settings, series=series, stopped=stop.is_set)
