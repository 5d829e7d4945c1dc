"""Contenders on the same flows: run in several processes, summarised with confidence intervals."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ScenarioError, UnknownNameError
from ..scenarios import Scenario, ScenarioDistribution, load_scenario
from ..simulator import Simulation
from .contenders import Contender, parse_contenders
from .runner import COUNTS, METRICS, Run, RunSettings, agents_of, scenario_of_seed, settings_for, simulate
from .statistics import HISTOGRAM_EDGES, Difference, Interval, mean_interval, paired_difference

if TYPE_CHECKING:
    from rich.table import Table

logger = logging.getLogger("lbgym")

#: Called after every run: runs done, runs in all, and the run.
ProgressCallback = Callable[[int, int, Run], None]


@dataclass(frozen=True)
class Comparison:
    """Contenders, seeds and the runs of every contender on every seed.

    Attributes:
        scenario: what was simulated, or what each seed's scenario was drawn from.
        contenders: in the order they were given.
        seeds: in order; the same seed is the same flows for every contender.
        baseline: label of the contender the others are compared with.
        settings: duration, warm-up and the like.
        runs: of each contender in turn, in the order of the seeds.
    """

    scenario: Scenario | ScenarioDistribution
    contenders: tuple[Contender, ...]
    seeds: tuple[int, ...]
    baseline: str
    settings: RunSettings
    runs: tuple[Run, ...] = field(repr=False)

    @property
    def labels(self) -> list[str]:
        """The contenders' names."""
        return [contender.label for contender in self.contenders]

    @cached_property
    def scenarios(self) -> tuple[Scenario, ...]:
        """What was simulated, seed by seed."""
        return tuple(scenario_of_seed(self.scenario, seed, self.settings) for seed in self.seeds)

    def runs_of(self, label: str) -> list[Run]:
        """A contender's runs, in the order of the seeds.

        Raises:
            UnknownNameError: for a label that did not take part.
        """
        if label not in self._by_label:
            raise UnknownNameError("contender", label, self.labels)
        return self._by_label[label]

    @cached_property
    def _by_label(self) -> dict[str, list[Run]]:
        return {label: [run for run in self.runs if run.label == label] for label in self.labels}

    def values(self, label: str, metric: str) -> NDArray[np.float64]:
        """A metric or count of a contender, one value per seed.

        Raises:
            UnknownNameError: for a label or metric that there is not.
        """
        if metric not in METRICS and metric not in COUNTS:
            raise UnknownNameError("metric", metric, (*METRICS, *COUNTS))
        return np.array([run.metrics[metric] for run in self.runs_of(label)])

    def interval(self, label: str, metric: str) -> Interval:
        """Mean over the seeds of a metric, with its 95 % confidence interval."""
        return mean_interval(self.values(label, metric))

    def difference(self, label: str, metric: str, baseline: str | None = None) -> Difference:
        """Difference from the baseline (or another contender), paired by seed, with its 95 % confidence interval."""
        return paired_difference(self.values(label, metric), self.values(baseline or self.baseline, metric))

    def fct_ccdf(self, label: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Of the flows of all seeds: FCTs (s) and the share of flows that took longer, to 1 % of the FCT."""
        counts = np.sum([run.histogram for run in self.runs_of(label)], axis=0)
        longer = 1 - np.cumsum(counts)[:-1] / counts.sum()
        return HISTOGRAM_EDGES, longer

    def to_dict(self) -> dict[str, Any]:
        """Everything but flows and time series, as plain data; None for what is not known.

        Of a distribution the scenario's values are None where it draws them, and those of the seeds are in ``draws``.
        """
        from .. import __version__

        if isinstance(self.scenario, ScenarioDistribution):
            names = ("servers", "capacity", "rate", "load")
            scenario = _scenario_dict(self.scenario.base) | dict.fromkeys(names)
            scenario["draws"] = [
                {"seed": seed, **{name: value for name, value in _scenario_dict(s).items() if name in names}}
                for seed, s in zip(self.seeds, self.scenarios, strict=True)
            ]
        else:
            scenario = _scenario_dict(self.scenario)
        return {
            "lbgym": __version__,
            "scenario": scenario,
            "settings": {
                "duration": self.settings.duration,
                "warmup": self.settings.warmup,
                "drain": self.settings.drain,
                "interval": self.settings.interval,
                "confidence": 0.95,
            },
            "seeds": list(self.seeds),
            "baseline": self.baseline,
            "contenders": [self._contender_dict(contender) for contender in self.contenders],
        }

    def _contender_dict(self, contender: Contender) -> dict[str, Any]:
        label = contender.label
        runs = self.runs_of(label)
        return {
            "label": label,
            "dispatch": ", ".join(dict.fromkeys(run.dispatch for run in runs)),
            "policy": contender.path or contender.policy,
            "metrics": {name: self.interval(label, name).to_dict() for name in METRICS},
            "versus_baseline": {name: self.difference(label, name).to_dict() for name in METRICS},
            "runs": [{"seed": run.seed, **_plain(run.metrics)} for run in runs],
        }

    def table(self, *, stacked: bool = False) -> Table:
        """A Rich table of every metric: mean over the seeds ± half width of its 95 % confidence interval.

        Some 105 columns wide with names of usual length, some 75 with ``stacked`` cells of two lines.
        """
        from .tables import metrics_table

        return metrics_table(self, stacked=stacked)

    def difference_table(self, *, stacked: bool = False) -> Table:
        """A Rich table of the paired differences from the baseline ± half widths of their 95 % intervals."""
        from .tables import difference_table

        return difference_table(self, stacked=stacked)

    def versus_table(self, label: str, *, stacked: bool = False) -> Table:
        """The other way round: the paired differences of one contender from each of the others."""
        from .tables import versus_table

        return versus_table(self, label, stacked=stacked)

    def verdict(self, label: str, metrics: Sequence[str] = ("fct_mean", "fct_p99")) -> str:
        """In words: than which contenders this one has less of every metric, as far as the 95 % intervals tell."""
        from .tables import HEADINGS

        names = " and ".join(HEADINGS[metric] for metric in metrics)
        others = [other for other in self.labels if other != label]
        better, rest = [], []
        for other in others:
            differences = {m: self.difference(label, m, other).relative for m in metrics}
            if all(d.high < 0 for d in differences.values()):
                better.append(other)
            else:
                shown = (f"{HEADINGS[m]} {d.mean:+.1f} ±{d.half_width:.1f} %" for m, d in differences.items())
                rest.append(f"{other} ({', '.join(shown)})")
        parts = []
        if better:
            parts.append(f"{label} has a lower {names} FCT than {', '.join(better)}: every 95 % interval is below 0.")
        if rest:
            parts.append(f"{label} is not shown to have a lower {names} FCT than {', '.join(rest)}.")
        return " ".join(parts)

    def save(self, folder: str | Path, *, plots: bool = True) -> list[Path]:
        """Write everything into a folder, made if need be; each file is whole or not there.

        ``results.parquet`` (``results.csv`` without pyarrow): one row per run; ``flows.parquet``: one row per flow, if
        flows were kept; ``summary.json``; ``fct_distribution.png`` and ``load_and_weights.png``.

        Returns:
            The files, in the order they were written.

        Raises:
            MissingExtraError: if plots are wanted and Matplotlib is not installed.
        """
        from .files import save

        return save(self, Path(folder), plots)


def _scenario_dict(scenario: Scenario) -> dict[str, Any]:
    return {
        "name": scenario.name,
        "servers": scenario.num_servers,
        "balancers": scenario.balancers,
        "capacity": scenario.capacity,
        "rate": scenario.rate,
        "load": scenario.load,
        "trace": None if scenario.workload.trace is None else scenario.workload.trace.source,
    }


def _plain(metrics: dict[str, float]) -> dict[str, float | int | None]:
    return {
        name: int(value) if name in COUNTS else value if np.isfinite(value) else None for name, value in metrics.items()
    }


def compare(
    scenario: str | Path | Scenario | ScenarioDistribution,
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
        ScenarioError: for a duration, warm-up or number of seeds that makes no sense, or if no flow counts.
        KeyboardInterrupt: passed on once the other processes have ended.
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
        # What is wrong with a policy is said at once, not by the first process that gets to it.
        agents_of(contender, source.reference, 0)
    load = max(scenario_of_seed(source, seed, settings).load for seed in numbers)
    if load >= 1:
        logger.warning(
            "scenario %r offers %.2f times the capacity of its servers: queues grow as long as the run lasts",
            source.name,
            load,
        )
    # Seed by seed, so that the time that is left can be told from the time that passed.
    jobs = [(contender, seed) for seed in numbers for contender in chosen]
    processes = _processes(processes, len(jobs))
    results: dict[tuple[str, int], Run] = {}
    run_all = _run_here if processes == 1 else _run_in_pool
    for run in run_all(source, settings, jobs, numbers[0], processes):
        results[run.label, run.seed] = run
        if progress is not None:
            progress(len(results), len(jobs), run)
    runs = tuple(results[label, seed] for label in labels for seed in numbers)
    return Comparison(source, tuple(chosen), numbers, baseline, settings, runs)


def _seeds(seeds: int | Sequence[int]) -> tuple[int, ...]:
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
    scenario: Scenario | ScenarioDistribution, settings: RunSettings, jobs: _Jobs, first_seed: int, processes: int
) -> Iterator[Run]:
    for contender, seed in jobs:
        run = simulate(scenario, contender, seed, settings, series=seed == first_seed)
        assert run is not None
        yield run


def _run_in_pool(
    scenario: Scenario | ScenarioDistribution, settings: RunSettings, jobs: _Jobs, first_seed: int, processes: int
) -> Iterator[Run]:
    # Compiles the kernel if need be, once and with a message, before every process would.
    Simulation(scenario_of_seed(scenario, first_seed, settings)).close()
    # Fresh processes: a fork would inherit locks of Numba's and torch's threads.
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    pool = ProcessPoolExecutor(processes, context, _begin, (scenario, settings, stop))
    try:
        with _interrupts_held_back(), _single_threaded_children():
            futures = [pool.submit(_job, contender, seed, seed == first_seed) for contender, seed in jobs]
        for future in as_completed(futures):
            run = future.result()
            if run is not None:
                yield run
    finally:
        # Also on Ctrl-C or an error: running jobs see the event at their next control step.
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Start processes with SIGINT blocked: Ctrl-C reaches a whole terminal, and it is this process that tells them."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _single_threaded_children() -> Iterator[None]:
    """One process per core leaves no core for a second thread of BLAS or torch."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    missing = [name for name in names if name not in os.environ]
    os.environ.update(dict.fromkeys(missing, "1"))
    try:
        yield
    finally:
        for name in missing:
            del os.environ[name]


# What a process was started with.
_shared: tuple[Scenario | ScenarioDistribution, RunSettings, Any] | None = None


def _begin(scenario: Scenario | ScenarioDistribution, settings: RunSettings, stop: Any) -> None:
    global _shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _shared = scenario, settings, stop


def _job(contender: Contender, seed: int, series: bool) -> Run | None:
    assert _shared is not None
    scenario, settings, stop = _shared
    return simulate(scenario, contender, seed, settings, series=series, stopped=stop.is_set)
