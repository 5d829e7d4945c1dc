"""Comparisons on real flows: :func:`compare_in`, with the results of :func:`lbgym.evaluation.compare`."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..controller import ControllerConfig
from ..errors import PolicyError, ScenarioError
from ..evaluation import Comparison, Contender, Run, RunSettings, Series, compare, parse_contenders
from ..evaluation.comparison import ProgressCallback, assemble, baseline_of, seed_numbers
from ..evaluation.runner import agents_of, dispatch_of, flow_metrics, settings_for, time_series
from ..evaluation.statistics import fct_histogram
from ..monitor import Follower
from ..policies import Agent
from ..scenarios import RULES
from ..snapshot import DEFAULT_STEP_INTERVAL
from .flows import draw_flows
from .laboratory import Laboratory

logger = logging.getLogger("lbgym")

#: Called ten times a second: contender, seed, seconds into the run, and its planned length.
Watch = Callable[[str, int, float, float], None]


def compare_in(
    lab: Laboratory,
    contenders: str | Iterable[str | Contender],
    seeds: int | Sequence[int] = 10,
    *,
    duration: float | None = None,
    warmup: float | None = None,
    drain: float | None = None,
    interval: float | None = None,
    baseline: str | None = None,
    keep_flows: bool = False,
    recordings: Path | None = None,
    progress: ProgressCallback | None = None,
    watch: Watch | None = None,
) -> Comparison:
    """Run every contender on the same flows in a laboratory that is up.

    The flows of a seed are those that the simulator has for it. A contender's dispatch rule places them; its weights
    are set by :class:`~lbgym.controller.Controller` on each balancer's region, without bounds. Every run begins with an
    empty data plane. Which flows count, and how, is as in :func:`lbgym.evaluation.compare`; an FCT runs from the flow's
    scheduled time, on the client's clock.

    Args:
        lab: to run in.
        contenders: as there, and so the arguments that follow.
        seeds: how many, or which.
        duration: seconds.
        warmup: seconds at the start whose flows do not count.
        drain: seconds after the duration to wait for flows.
        interval: seconds between two changes of weights.
        baseline: label that the others are compared with.
        keep_flows: keep every flow.
        progress: called after every run.
        recordings: folder for a recording of every balancer in every run; None: none.
        watch: called ten times a second.

    Raises:
        UnknownNameError, PolicyError, ScenarioError: as there; PolicyError also for a dispatch rule that the data plane
            does not have.
        LabError: if a part of the laboratory fails.
    """
    scenario = lab.config.scenario
    chosen = parse_contenders(contenders)
    base = baseline_of(chosen, baseline)
    numbers = seed_numbers(seeds)
    settings = settings_for(scenario, duration, warmup, drain, interval, keep_flows)
    for contender in chosen:
        _check(lab, contender)
    results: dict[tuple[str, int], Run] = {}
    with _quiet(logging.getLogger("lbgym.controller")):
        for seed in numbers:
            for contender in chosen:
                run = measure(
                    lab, contender, seed, settings, series=seed == numbers[0], recordings=recordings, watch=watch
                )
                results[run.label, run.seed] = run
                if progress is not None:
                    progress(len(results), len(numbers) * len(chosen), run)
    return assemble(scenario, chosen, numbers, base, settings, results)


@contextmanager
def _quiet(noisy: logging.Logger) -> Iterator[None]:
    """Leave out what an agent says of every run, and say once what holds for all of a policy's runs."""
    said: set[str] = set()

    def is_news(record: logging.LogRecord) -> bool:
        if getattr(record, "event", "") != "weights_only":
            return True
        text = record.getMessage()
        known = text in said
        said.add(text)
        return not known

    before = noisy.level
    noisy.setLevel(logging.WARNING)
    noisy.addFilter(is_news)
    try:
        yield
    finally:
        noisy.removeFilter(is_news)
        noisy.setLevel(before)


def predict(
    lab: Laboratory, contenders: Sequence[Contender], seeds: Sequence[int], settings: RunSettings, **options: Any
) -> Comparison:
    """The same comparison in simulation, with the laboratory's latency added to the FCT of every flow.

    Options are those of :func:`lbgym.evaluation.compare`.
    """
    calibration = lab.config.calibration
    latency = 0.0 if calibration is None else calibration.latency
    simulated = compare(
        lab.config.scenario, contenders, seeds, duration=settings.duration, warmup=settings.warmup,
        drain=settings.drain, interval=settings.interval, **options,
    )  # fmt: skip
    return replace(simulated, runs=tuple(_later(run, latency) for run in simulated.runs))


def _later(run: Run, latency: float) -> Run:
    metrics = {name: value + latency if name.startswith("fct_") else value for name, value in run.metrics.items()}
    return replace(run, metrics=metrics)


def _check(lab: Laboratory, contender: Contender) -> None:
    agents = agents_of(contender, lab.config.scenario, 0)
    rule = dispatch_of(contender, lab.config.scenario, agents)
    if rule not in lab.rules:
        weighted = next((name for name in ("sed", *lab.rules) if name in lab.rules and RULES[name].weighted), None)
        brought = contender.dispatch is None and weighted is not None
        hint = f"; name one of them, as in '{weighted}+{contender.label}'" if brought else ""
        raise PolicyError(
            f"contender {contender.label!r}: the data plane {lab.config.data_plane!r} does not have the dispatch rule "
            f"{rule!r}; it has {', '.join(lab.rules)}{hint}"
        )
    if agents[0].uses_ground_truth:
        raise PolicyError(
            f"contender {contender.label!r} needs the ground truth, which a laboratory's balancers do not collect"
        )


def measure(
    lab: Laboratory,
    contender: Contender,
    seed: int,
    settings: RunSettings,
    *,
    series: bool = False,
    recordings: Path | None = None,
    watch: Watch | None = None,
) -> Run:
    """One run: one contender on the flows of one seed.

    Raises:
        ScenarioError: if no flow counts.
        LabError: if a part of the laboratory fails.
    """
    scenario, calibration = lab.config.scenario, lab.config.calibration
    assert calibration is not None  # of every laboratory that is up
    horizon = settings.duration + settings.drain
    flows = draw_flows(scenario, seed, horizon, calibration, lab.most)
    counted = int(np.searchsorted(flows["arrival"], settings.duration))
    agents = agents_of(contender, scenario, seed)
    rule = dispatch_of(contender, scenario, agents)
    interval = settings.interval or agents[0].step_interval or DEFAULT_STEP_INTERVAL
    marks = _Marks(lab, settings)
    with ExitStack() as stack:
        stack.callback(lab.stop_balancers)
        lab.start_balancers(rule)
        helpers = _Helpers()
        stack.callback(helpers.stop)
        sampler = _Sampler(lab.regions, interval, helpers.stopping) if series else None
        if sampler is not None:
            helpers.start("series", sampler.run)
        if recordings is not None:
            recordings.mkdir(parents=True, exist_ok=True)
            for i, region in enumerate(lab.regions):
                balancer = f"-{i}" if len(lab.regions) > 1 else ""
                file = recordings / f"{contender.label.replace('/', '_')}-{seed}{balancer}.parquet"
                helpers.start("recording", _recorder(region, file, helpers.stopping))
        if RULES[rule].weighted:
            folder = lab.folder / "scenario.toml"
            for region, agent in zip(lab.regions, agents, strict=True):
                helpers.start("agent", _agent(region, agent, interval, folder, helpers.stopping))

        def look(seconds: float) -> None:
            helpers.check()
            marks.look(seconds)
            if watch is not None:
                watch(contender.label, seed, seconds, settings.duration)

        # An agent's first weights are in force by then.
        outcome, start, _ = lab.generate(
            flows, counted=counted, duration=settings.duration, limit=horizon, delay=2 * interval + 0.2, stopped=look
        )
        helpers.check()
    utilization = marks.utilization()
    kept = _counted(lab, flows, outcome, counted, settings)
    late = float(np.quantile(outcome.lag[: outcome.begun], 0.99)) if outcome.begun else 0.0
    if late > 0.005:
        logger.warning(
            "%s, seed %d: the load generator began 1 %% of the flows more than %.3g ms late", contender.label, seed,
            1e3 * late,
        )  # fmt: skip
    return Run(
        contender.label,
        seed,
        rule,
        flow_metrics(kept, utilization),
        utilization,
        fct_histogram(kept["fct"]),
        sampler.series(start, settings.duration) if sampler is not None else None,
        kept if settings.keep_flows else None,
    )


def _counted(
    lab: Laboratory, flows: dict[str, NDArray[Any]], outcome: Any, counted: int, settings: RunSettings
) -> dict[str, NDArray[Any]]:
    """The flows that count, as ``Run.flows`` has them."""
    first = int(np.searchsorted(flows["arrival"], settings.warmup))
    if first == counted:
        raise ScenarioError(
            f"no flow of scenario {lab.config.scenario.name!r} arrives between the end of the warm-up at "
            f"{settings.warmup:g} s and the end at {settings.duration:g} s"
        )
    which = slice(first, counted)
    fct, status = outcome.fct[which].copy(), outcome.status[which]
    fct[(status == 1) | (status == 2)] = lab.config.scenario.reject_timeout
    known = {name: i for i, name in enumerate(lab.server_names)}
    several = len(lab.regions) > 1
    return {
        "flow_id": np.arange(first, counted),
        "arrival": flows["arrival"][which],
        "fct": fct,
        "demand": flows["demand"][which],
        "server": np.array([known.get(name, -1) for name in outcome.server[which]], np.int64),
        # Which of several balancers had a flow is the network's secret.
        "balancer": np.full(counted - first, -1 if several else 0),
        "status": status.astype(np.int64),
    }


class _Marks:
    """CPU time of the servers at the end of the warm-up and of the run."""

    def __init__(self, lab: Laboratory, settings: RunSettings) -> None:
        self._lab = lab
        self._cuts = [settings.warmup, settings.duration]
        self._seen: list[tuple[float, NDArray[np.float64]]] = []

    def look(self, seconds: float) -> None:
        if len(self._seen) < 2 and seconds >= self._cuts[len(self._seen)]:
            self._seen.append((seconds, self._lab.used()))

    def utilization(self) -> NDArray[np.float64]:
        shares = np.array(self._lab.config.shares())
        if not self._seen:
            return np.full(len(shares), math.nan)
        began, before = self._seen[0]
        # A run whose flows ended on the dot has no look at the end of its duration.
        ended, after = self._seen[1] if len(self._seen) > 1 else (self._cuts[1], self._lab.used())
        return (after - before) / (shares * max(ended - began, 1e-9))


class _Helpers:
    """Threads beside the load: agents, recordings, series."""

    def __init__(self) -> None:
        self.stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self._failures: list[BaseException] = []

    def start(self, what: str, work: Callable[[], object]) -> None:
        def guarded() -> None:
            try:
                work()
            except BaseException as error:
                self._failures.append(error)

        thread = threading.Thread(target=guarded, name=f"lbgym-lab-{what}", daemon=True)
        thread.start()
        self._threads.append(thread)

    def check(self) -> None:
        """Raise what a thread raised."""
        if self._failures:
            raise self._failures[0]

    def stop(self) -> None:
        self.stopping.set()
        for thread in self._threads:
            thread.join()


def _agent(region: str, agent: Agent, interval: float, scenario: Path, stop: threading.Event) -> Callable[[], object]:
    """A controller that puts the policy's weights in force as they are, as a simulated run does."""
    from ..controller import Controller

    config = ControllerConfig(
        policy=agent.name, shm=region, scenario=str(scenario), step_interval=interval, attach_timeout=10.0,
        floor=1e-6, max_ratio=math.inf, rate_limit=math.inf, log_level="warning",
    )  # fmt: skip

    def work() -> None:
        Controller(config, policy=agent.policy).run(stop)

    return work


def _recorder(region: str, file: Path, stop: threading.Event) -> Callable[[], object]:
    from ..recording import record

    return lambda: record(region, file, overwrite=True, stop=stop.is_set)


class _Sampler:
    """Open flows in the servers and weights of balancer 0, by the regions' observations."""

    def __init__(self, regions: Sequence[str], interval: float, stop: threading.Event) -> None:
        self._regions, self._interval, self._stop = regions, interval, stop
        self._rows: list[tuple[float, NDArray[Any], NDArray[Any], NDArray[Any]]] = []

    def run(self) -> None:
        due = 0.0
        with ExitStack() as stack:
            first, *others = [stack.enter_context(Follower(region)) for region in self._regions]
            while not self._stop.is_set():
                if not (first.wait(0.1) and first.read_newest()):
                    continue
                buffer, n = first.buffer, first.buffer.num_servers
                at = buffer.published_at * 1e-9
                if at < due:
                    continue
                due = at + self._interval
                open_flows = buffer.stats[:n, 0].copy()
                for other in others:
                    other.read_newest()
                    open_flows += other.buffer.stats[:n, 0]
                self._rows.append((at, open_flows, buffer.weights[:n].copy(), buffer.active[:n].copy()))

    def series(self, start: float, duration: float) -> Series | None:
        """The samples from time 0 to ``duration``; None without any."""
        rows = [row for row in self._rows if start <= row[0] < start + duration]
        if not rows:
            return None
        time, *columns = (np.array(column) for column in zip(*rows, strict=True))
        return time_series(time - start, *columns)
