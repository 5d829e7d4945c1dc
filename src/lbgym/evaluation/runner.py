"""One run: one contender, one seed, from an empty cluster to the last flow that counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ScenarioError
from ..policies import TrainedPolicy, WeightPolicy, load_policy, make_weight_policy
from ..scenarios import Scenario, ScenarioDistribution
from ..simulator import Simulation
from .contenders import Contender
from .results import COUNTS, Run, RunSettings, Series
from .statistics import fct_histogram, jain_index

QUANTILES = {"fct_p50": 0.5, "fct_p90": 0.9, "fct_p99": 0.99, "fct_p999": 0.999}

DEFAULT_INTERVAL = 0.25


class Controller:
    """What sets the weights of all balancers: a copy of the policy for each, on that balancer's own observation.

    Args:
        contender: who.
        scenario: what is simulated.
        seed: of the flows.
        num_servers: N, of which the scenario's servers are the first; None: the scenario's. Trained models see all of
            them with a mask, heuristics those that exist.
    """

    def __init__(self, contender: Contender, scenario: Scenario, seed: int, *, num_servers: int | None = None) -> None:
        n, m = num_servers or scenario.num_servers, scenario.balancers
        self._existing = scenario.num_servers
        self.dispatch = contender.dispatch or scenario.dispatch
        self.interval: float | None = None
        self._heuristics: list[WeightPolicy] = []
        self._models: list[TrainedPolicy] = []
        self._weights = np.ones((m, n))
        if contender.path is None:
            # The stream of a policy that draws differs between balancers and has nothing to do with the flows' seed.
            seeds = np.random.SeedSequence([seed, 0x706F6C69]).generate_state(m)
            name = contender.policy or "cores"
            self._heuristics = [make_weight_policy(name, scenario, int(s)) for s in seeds]
            return
        model = _loaded(contender.path)
        self.dispatch = contender.dispatch or model.dispatch or scenario.dispatch
        self.interval = model.step_interval
        self._layout, self._codec = model.codecs(n)
        self._models = [model.copy() for _ in range(m)]

    def reset(self) -> None:
        """Forget the former run."""
        policies: list[WeightPolicy | TrainedPolicy] = [*self._heuristics, *self._models]
        for policy in policies:
            policy.reset()

    def __call__(self, snapshot: Any) -> NDArray[np.float64]:
        """float64[1, m, N] from the batched snapshot of one replica."""
        active, truth = snapshot.active[0], snapshot.ground_truth[0]
        n = self._existing
        for b, heuristic in enumerate(self._heuristics):
            features = snapshot.stats[0, b]
            if heuristic.uses_ground_truth:
                features = np.concatenate([features, truth], axis=-1)
            self._weights[b, :n] = heuristic.weights(features[:n], active[:n])
        for b, model in enumerate(self._models):
            observation = self._layout.encode(snapshot.stats[0, b], truth, active)
            info = {
                "sequence_id": int(snapshot.sequence_id[0]),
                "timestamp": float(snapshot.timestamp[0]),
                "active_servers": active.copy(),
                "weights": self._weights[b].copy(),
            }
            self._weights[b] = self._codec.to_weights(model.act(observation, info))
        return self._weights[None]


@lru_cache(maxsize=16)
def _loaded(path: str) -> TrainedPolicy:
    return load_policy(path)


def scenario_of_seed(scenario: Scenario | ScenarioDistribution, seed: int, settings: RunSettings) -> Scenario:
    """The scenario that every contender meets on a seed: what a distribution draws for it."""
    if isinstance(scenario, ScenarioDistribution):
        return scenario.draw(seed, horizon=settings.duration + settings.drain)
    return scenario


def simulate(
    scenario: Scenario | ScenarioDistribution,
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
        contender: who.
        seed: of the flows.
        settings: how long.
        series: also record open flows and weights over time.
        stopped: asked at every control step; True ends the run.

    Returns:
        The run, or None if stopped.

    Raises:
        ScenarioError: if no flow counts.
    """
    room = scenario.max_servers if isinstance(scenario, ScenarioDistribution) else scenario.num_servers
    scenario = scenario_of_seed(scenario, seed, settings)
    servers = scenario.num_servers
    controller = Controller(contender, scenario, seed, num_servers=room)
    interval = settings.interval or controller.interval or DEFAULT_INTERVAL
    simulation = Simulation(
        scenario, 1, num_servers=room, dispatch=controller.dispatch, service=False, record_flows=True
    )
    controller.reset()
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
        weights = None
        if now >= steps * interval:
            weights = controller(snapshot)
            steps += 1
            if series and now < settings.duration:
                rows.append((now, snapshot, weights[0, 0].copy()))
        # Steps also end exactly at the warm-up and the end, so that contenders of any interval count the same flows.
        target = min([steps * interval, deadline, *(cut for cut in cuts if cut > now)])
        snapshot = simulation.step(weights, target - now)
        now = target
    flows = _counted(simulation, scenario, settings)
    cores = np.array([min(s.cores, s.workers or s.cores) for s in scenario.servers], dtype=np.float64)
    utilization = (busy[1] - busy[0]) / (cores * (settings.duration - settings.warmup))
    return Run(
        contender.label,
        seed,
        controller.dispatch,
        _measure(flows, utilization),
        np.append(utilization, np.full(room - servers, np.nan)),
        fct_histogram(flows["fct"]),
        _series(rows, servers) if series else None,
        flows if settings.keep_flows else None,
    )


def _counted(simulation: Simulation, scenario: Scenario, settings: RunSettings) -> dict[str, NDArray[Any]]:
    """The flows that count, ended or not, in order of arrival."""
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


def _measure(flows: dict[str, NDArray[Any]], utilization: NDArray[np.float64]) -> dict[str, float]:
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
    """Of the servers that exist."""
    snapshots = [row[1] for row in rows]
    active = np.array([s.active[0, :servers] for s in snapshots])
    weights = np.array([row[2][:servers] for row in rows])
    mean = np.where(active, weights, 0.0).sum(axis=1) / np.maximum(active.sum(axis=1), 1)
    open_flows = np.array([s.started[0] - s.completed[0] - s.rejected[0] - s.failed[0] for s in snapshots])
    return Series(
        time=np.array([row[0] for row in rows]),
        open_flows=open_flows[:, :servers].astype(np.float32),
        weights=(weights / np.where(mean > 0, mean, 1.0)[:, None]).astype(np.float32),
        active=active,
    )


def settings_for(
    scenario: Scenario | ScenarioDistribution,
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
    duration = scenario.duration if duration is None else duration
    if not (math.isfinite(duration) and duration > 0):
        raise ScenarioError(f"duration must be a finite number of seconds above 0, got {duration!r}")
    warmup = duration / 6 if warmup is None else warmup
    if not 0 <= warmup < duration:
        raise ScenarioError(f"warmup must be at least 0 and below the duration of {duration:g} s, got {warmup!r}")
    drain = scenario.reject_timeout if drain is None else drain
    if not (math.isfinite(drain) and drain >= 0):
        raise ScenarioError(f"drain must be a finite number of seconds of at least 0, got {drain!r}")
    if interval is not None and not (math.isfinite(interval) and interval > 0):
        raise ScenarioError(f"interval must be a finite number of seconds above 0, got {interval!r}")
    return RunSettings(float(duration), float(warmup), float(drain), interval, keep_flows)
