"""Run contenders on the same flows in several processes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ..checks import items, whole
from ..errors import ScenarioError, UnknownNameError
from ..scenarios import AnyScenario, Scenario, load_scenario
from .contenders import Contender, parse_contenders
from .pool import Job, run_jobs
from .results import Comparison, Conditions, Run, RunSettings
from .runner import agents_of, scenario_of_seed, settings_for

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
    baseline = baseline_of(chosen, baseline)
    numbers = seed_numbers(seeds)
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
    jobs = [Job(0, contender, seed, series=seed == numbers[0]) for seed in numbers for contender in chosen]
    results: dict[tuple[str, int], Run] = {}
    for _, run in run_jobs([(source, settings)], jobs, processes):
        results[run.label, run.seed] = run
        if progress is not None:
            progress(len(results), len(jobs), run)
    return assemble(source, chosen, numbers, baseline, settings, results)


def assemble(
    source: AnyScenario,
    contenders: Sequence[Contender],
    seeds: tuple[int, ...],
    baseline: str,
    settings: RunSettings,
    results: Mapping[tuple[str, int], Run],
) -> Comparison:
    """A comparison of runs that have been made, by label and seed."""
    trace = source.reference.workload.trace
    return Comparison(
        scenario=source.name,
        balancers=source.balancers,
        conditions=tuple(_conditions(scenario_of_seed(source, seed, settings)) for seed in seeds),
        contenders=tuple(contenders),
        seeds=seeds,
        baseline=baseline,
        settings=settings,
        runs=tuple(results[contender.label, seed] for contender in contenders for seed in seeds),
        trace=None if trace is None else trace.source,
        drawn=source.varies,
    )


def _conditions(scenario: Scenario) -> Conditions:
    return Conditions(scenario.num_servers, scenario.capacity, scenario.rate, scenario.load)


def baseline_of(contenders: Sequence[Contender], baseline: str | None) -> str:
    """The label of the baseline; None: the first contender.

    Raises:
        UnknownNameError: if no contender has it.
    """
    labels = [contender.label for contender in contenders]
    if baseline is not None and baseline not in labels:
        raise UnknownNameError("baseline", baseline, labels)
    return labels[0] if baseline is None else baseline


def seed_numbers(seeds: int | Sequence[int]) -> tuple[int, ...]:
    """Seeds: 0, 1, ... for a number of them, or those given.

    Raises:
        ScenarioError: for none, one that is there twice, one below 0, or what is no whole number.
    """
    if isinstance(seeds, (int, np.integer)):
        return tuple(range(whole("the number of seeds", seeds, high=1_000_000, error=ScenarioError)))
    given = items("seeds", seeds, "whole numbers", error=ScenarioError)
    numbers = tuple(whole("each of the seeds", seed, low=0, error=ScenarioError) for seed in given)
    if not numbers or len(set(numbers)) < len(numbers):
        raise ScenarioError(
            f"seeds must be a number of at least 1, or different whole numbers of at least 0, got {seeds!r}"
        )
    return numbers
