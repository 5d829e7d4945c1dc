"""One run: one contender, one seed, from an empty cluster to the last flow that counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checks import seconds
from ..errors import ScenarioError
from ..policies import Agent, TrainedPolicy, load_policy, make_agent
from ..scenarios import RULES, AnyScenario, Scenario
from ..simulator import Simulation
from ..snapshot import DEFAULT_STEP_INTERVAL, Snapshot
from .contenders import Contender, check_background
from .results import COUNTS, Run, RunSettings, Series
from .statistics import fct_histogram, jain_index

QUANTILES = {"fct_p50": 0.5, "fct_p90": 0.9, "fct_p99": 0.99, "fct_p999": 0.999}


def agents_of(contender: Contender, scenario: Scenario, seed: int, *, num_servers: int | None = None) -> list[Agent]:
    """An agent for every balancer, each with a policy of its own.

    Args:
        contender: whose policy.
        scenario: what is simulated.
        seed: of the flows; the streams of policies that draw differ between seeds and balancers.
        num_servers: N, of which the scenario's servers are the first; None: the scenario's. Trained models see all
            of them with a mask, heuristics only those that exist.

    Raises:
        PolicyError: for a model that does not fit the scenario or its dispatch rule.
    """
    n, m = num_servers or scenario.num_servers, scenario.balancers
    if contender.path is not None:
        model = _loaded(contender.path)
        agent = Agent(model, n, scenario=scenario, name=contender.path)
        rule = dispatch_of(contender, scenario, [agent])
        if model.weights_alone:
            agent.fit(n, index=RULES[rule].takes_background)
        elif agent.codec is not None and agent.codec.sets_background:
            check_background(rule, contender.label)
        return [agent.copy() for _ in range(m)]
    # The stream of a policy that draws has nothing to do with the flows' seed.
    seeds = np.random.SeedSequence([seed, 0x706F6C69]).generate_state(m)
    name = contender.policy or "cores"
    return [make_agent(name, n, scenario=scenario, seed=int(s)) for s in seeds]


def dispatch_of(contender: Contender, scenario: Scenario, agents: Sequence[Agent]) -> str:
    """The dispatch rule that places a contender's flows."""
    return contender.dispatch or agents[0].dispatch or scenario.dispatch


def decide(agents: Sequence[Agent], snapshot: Snapshot, weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """New weights of every balancer, each from its own observation.

    Args:
        agents: one per balancer.
        snapshot: a batch of one replica, ``stats`` float32[1, m, N, 11].
        weights: in force, float64[1, m, N].

    Returns:
        float64[1, m, N].
    """
    now = snapshot.part(0)
    now = replace(now, sequence_id=int(now.sequence_id), timestamp=float(now.timestamp))
    return np.stack([agent(replace(now, stats=now.stats[b]), weights[0, b]) for b, agent in enumerate(agents)])[None]


def beside_weights(agents: Sequence[Agent]) -> dict[str, Any]:
    """What agents set beside the weights that :func:`decide` returned, as keywords of ``Simulation.step``.

    ``background`` loads float64[1, m, N] and ``tables`` of scores float64[1, m, N, Q], where they set any.
    """
    parts = {"background": [a.background for a in agents], "tables": [a.tables for a in agents]}
    return {
        name: np.stack(rows)[None]
        for name, values in parts.items()
        if len(rows := [row for row in values if row is not None])
    }


@lru_cache(maxsize=16)
def _loaded(path: str) -> TrainedPolicy:
    return load_policy(path)


def scenario_of_seed(scenario: AnyScenario, seed: int, settings: RunSettings) -> Scenario:
    """Return the scenario of a seed, the same for every contender."""
    return scenario.draw(seed, horizon=settings.duration + settings.drain)


def simulate(
    scenario: AnyScenario,
    contender: Contender,
    seed: int,
    settings: RunSettings,
    *,
    series: bool = False,
    stopped: Callable[[], bool] | None = None,
) -> Run | None:
    """Run one contender on the flows of one seed.

    The flows that count arrive from ``warmup`` to ``duration``. Each is followed to its end: past ``duration`` arrivals
    and control go on until the last of them has ended, for at most ``drain`` seconds. One that is still open then
    counts with its age. Rejected, failed and unrouted flows count with the scenario's ``reject_timeout``.

    Args:
        scenario: what to simulate; every contender sees the same flows for the same seed, and of a distribution the
            same scenario.
        contender: whose policy and dispatch rule.
        seed: of the flows.
        settings: durations and control interval.
        series: also record open flows and weights over time.
        stopped: asked at every control step; True ends the run.

    Returns:
        The run, or None if stopped.

    Raises:
        ScenarioError: if no flow counts.
    """
    room = scenario.max_servers
    scenario = scenario_of_seed(scenario, seed, settings)
    servers = scenario.num_servers
    agents = agents_of(contender, scenario, seed, num_servers=room)
    dispatch = dispatch_of(contender, scenario, agents)
    interval = settings.interval or agents[0].step_interval or DEFAULT_STEP_INTERVAL
    simulation = Simulation(scenario, 1, num_servers=room, dispatch=dispatch, service=False, record_flows=True)
    in_force = np.ones((1, scenario.balancers, room))
    snapshot = simulation.reset([seed])
    busy: list[NDArray[np.float64]] = []
    cuts = [settings.warmup, settings.duration]
    steps, now, rows = 0, 0.0, []
    deadline = settings.duration + settings.drain
    while True:
        if stopped is not None and stopped():
            return None
        while len(busy) < 2 and now >= cuts[len(busy)]:
            busy.append(simulation.integrals()["busy"][0, :servers])
        if now >= settings.duration and (
            now >= deadline or not (simulation.open_flows()["arrival"] < settings.duration).any()
        ):
            break
        weights, others = None, {}
        if now >= steps * interval:
            weights = in_force = decide(agents, snapshot, in_force)
            others = beside_weights(agents)
            steps += 1
            if series and now < settings.duration:
                rows.append((now, snapshot, weights[0, 0].copy()))
        # Steps also end exactly at the warm-up and the end, so that contenders of any interval count the same flows.
        target = min([steps * interval, deadline, *(cut for cut in cuts if cut > now)])
        snapshot = simulation.step(weights, target - now, **others)
        now = target
    flows = _counted(simulation, scenario, settings)
    cores = np.array([min(s.cores, s.workers or s.cores) for s in scenario.servers], dtype=np.float64)
    utilization = (busy[1] - busy[0]) / (cores * (settings.duration - settings.warmup))
    return Run(
        contender.label,
        seed,
        dispatch,
        flow_metrics(flows, utilization),
        np.append(utilization, np.full(room - servers, np.nan)),
        fct_histogram(flows["fct"]),
        _series(rows, servers) if series else None,
        flows if settings.keep_flows else None,
    )


def _counted(simulation: Simulation, scenario: Scenario, settings: RunSettings) -> dict[str, NDArray[Any]]:
    """The flows that count, finished or not, in order of arrival."""
    ended, still = simulation.take_flows(), simulation.open_flows()
    clock = float(simulation.integrals()["clock"][0])
    still |= {"fct": clock - still["arrival"], "status": np.full(len(still["arrival"]), 4)}
    flows = {name: np.concatenate([ended[name], still[name]]) for name in ended}
    counts = (flows["arrival"] >= settings.warmup) & (flows["arrival"] < settings.duration)
    order = np.flatnonzero(counts)[np.argsort(flows["flow_id"][counts])]
    if not len(order):
        raise ScenarioError(
            f"no flow of scenario {scenario.name!r} arrives between the end of the warm-up at {settings.warmup:g} s "
            f"and the end at {settings.duration:g} s: its rate is {scenario.rate:g} flows per second"
        )
    return {name: values[order] for name, values in flows.items()}


def flow_metrics(flows: Mapping[str, NDArray[Any]], utilization: NDArray[np.float64]) -> dict[str, float]:
    """``METRICS`` and ``COUNTS`` of the flows that count (see ``Run.flows``) and of the servers' utilizations."""
    fct, status = flows["fct"], flows["status"]
    count = np.bincount(status, minlength=5)
    quantiles = np.quantile(fct, list(QUANTILES.values()))
    return {
        "fct_mean": float(fct.mean()),
        **{name: float(q) for name, q in zip(QUANTILES, quantiles, strict=True)},
        "jain": jain_index(utilization),
        "rejected_share": float(count[1:4].sum() / len(fct)),
        "flows": len(fct),
        **{name: int(c) for name, c in zip(COUNTS[1:], count, strict=True)},
    }


def _series(rows: list[tuple[float, Any, NDArray[np.float64]]], servers: int) -> Series:
    """Open flows and weights over time, of the servers that exist."""
    snapshots = [row[1] for row in rows]
    open_flows = np.array([s.started[0] - s.completed[0] - s.rejected[0] - s.failed[0] for s in snapshots])
    return time_series(
        np.array([row[0] for row in rows]),
        open_flows[:, :servers],
        np.array([row[2][:servers] for row in rows]),
        np.array([s.active[0, :servers] for s in snapshots]),
    )


def time_series(
    time: NDArray[np.float64], open_flows: NDArray[Any], weights: NDArray[np.float64], active: NDArray[np.bool_]
) -> Series:
    """A series of open flows [T, N], and of weights [T, N] made relative to the mean over active servers."""
    mean = np.where(active, weights, 0.0).sum(axis=1) / np.maximum(active.sum(axis=1), 1)
    return Series(
        time=time,
        open_flows=open_flows.astype(np.float32),
        weights=(weights / np.where(mean > 0, mean, 1.0)[:, None]).astype(np.float32),
        active=active,
    )


def settings_for(
    scenario: AnyScenario,
    duration: float | None,
    warmup: float | None,
    drain: float | None,
    interval: float | None,
    keep_flows: bool,
) -> RunSettings:
    """Settings with the defaults of a scenario filled in, checked.

    Raises:
        ScenarioError: naming the value and what is allowed.
    """
    duration = seconds("duration", scenario.duration if duration is None else duration, error=ScenarioError)
    warmup = seconds("warmup", duration / 6 if warmup is None else warmup, low=0.0, error=ScenarioError)
    if not warmup < duration:
        raise ScenarioError(f"warmup must be at least 0 and below the duration of {duration:g} s, got {warmup!r}")
    drain = seconds("drain", scenario.reject_timeout if drain is None else drain, low=0.0, error=ScenarioError)
    if interval is not None:
        interval = seconds("interval", interval, error=ScenarioError)
    return RunSettings(duration, warmup, drain, interval, keep_flows)
