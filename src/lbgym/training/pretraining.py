"""What the policy ``adaptive`` is trained on, and how a population of candidates is measured on it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..env.actions import MAX_BACKGROUND
from ..policies.estimator import LARGEST_CHANGE, IndexEstimator
from ..scenarios import (
    AnyScenario,
    Choice,
    Configured,
    Exponential,
    LogUniform,
    RandomEvents,
    Scenario,
    ScenarioDistribution,
    Server,
    ServerDistribution,
    Uniform,
    Variant,
    Workload,
    servers_of,
)
from ..simulator import Simulation
from ..snapshot import DEFAULT_STEP_INTERVAL

_ARRIVALS = (
    Variant(kind="poisson", probability=0.5),
    Variant(
        kind="on_off",
        parameters={
            "on": LogUniform(1.0, 6.0),
            "off": LogUniform(3.0, 20.0),
            "off_level": Uniform(0.2, 0.8),
            "random": Choice((False, True)),
        },
        probability=0.2,
    ),
    Variant(
        kind="sinusoidal",
        parameters={
            "amplitude": Uniform(0.1, 0.4),
            "period": LogUniform(20.0, 120.0),
            "phase": Uniform(-math.pi, math.pi),
        },
        probability=0.2,
    ),
    Variant(kind="modulated_poisson", parameters={"levels": (0.6, 1.4), "sojourns": (8.0, 8.0)}, probability=0.1),
)
_DEMANDS = (
    Variant(kind="exponential", parameters={"mean": LogUniform(0.04, 0.2)}, probability=0.4),
    Variant(kind="lognormal", parameters={"mean": LogUniform(0.04, 0.2), "cv": Uniform(0.5, 3.0)}, probability=0.3),
    Variant(
        kind="bounded_pareto",
        parameters={"alpha": Uniform(1.2, 1.9), "minimum": LogUniform(0.01, 0.05), "maximum": LogUniform(3.0, 20.0)},
        probability=0.15,
    ),
    Variant(kind="hyperexponential", parameters={"probabilities": (0.9, 0.1), "means": (0.05, 0.55)}, probability=0.1),
    Variant(kind="deterministic", parameters={"mean": LogUniform(0.04, 0.2)}, probability=0.05),
)
_BROWNOUTS = RandomEvents(
    kind="speed", every=LogUniform(60.0, 1000.0), duration=Uniform(5.0, 25.0), value=Uniform(0.2, 0.8)
)
_CRASHES = RandomEvents(kind="down", every=LogUniform(600.0, 6000.0), duration=Uniform(5.0, 15.0))
_DRAINS = RandomEvents(kind="drain", every=LogUniform(100.0, 2000.0), duration=Uniform(4.0, 15.0))
_FLASH_CROWDS = RandomEvents(
    kind="rate", every=LogUniform(30.0, 200.0), duration=Uniform(3.0, 10.0), value=Uniform(1.1, 1.6)
)
_SIZES = Choice((1, 2, 4, 8, 16), (0.2, 0.3, 0.3, 0.15, 0.05))


def _family(name: str, description: str, server: ServerDistribution, **others: Any) -> ScenarioDistribution:
    base = Scenario(
        name=f"pretraining-{name}",
        description=description,
        servers=servers_of((16, Server(cores=4))),
        workload=Workload(demand=Exponential(mean=0.1), load=0.8),
        dispatch="marginal",
        duration=60.0,
    )
    keys: dict[str, Any] = {"load": Uniform(0.4, 0.95), "arrivals": _ARRIVALS, "demand": _DEMANDS}
    return ScenarioDistribution(base=base, num_servers=Uniform(2, 16), server=server, **(keys | others))


#: Kinds of clusters, and the share of the training that each has.
FAMILIES: tuple[tuple[ScenarioDistribution, float], ...] = (
    (_family("known", "every core alike, as configured", ServerDistribution(cores=_SIZES)), 0.25),
    (
        _family(
            "unknown",
            "cores of speeds that the operator does not know",
            ServerDistribution(cores=_SIZES, speed=LogUniform(0.25, 2.5)),
        ),
        0.3,
    ),
    (
        _family(
            "misconfigured",
            "weights that have nothing to do with the servers",
            ServerDistribution(cores=_SIZES, speed=LogUniform(0.5, 2.0), weight=LogUniform(1.0, 8.0)),
        ),
        0.1,
    ),
    (
        _family(
            "changing",
            "servers that slow down, fail, drain and come back, and flash crowds",
            ServerDistribution(cores=Choice((2, 4, 8)), speed=LogUniform(0.8, 1.25)),
            load=Uniform(0.4, 0.8),
            events=(_BROWNOUTS, _CRASHES, _DRAINS, _FLASH_CROWDS),
        ),
        0.2,
    ),
    (
        _family(
            "in-order",
            "a flow per worker at once, and a queue",
            ServerDistribution(cores=Choice((1, 2)), workers=Choice((1, 2)), speed=LogUniform(0.5, 2.0)),
            load=Uniform(0.4, 0.85),
        ),
        0.15,
    ),
)


#: Share of the scenarios, of whatever family, whose configured weights are nearly right.
WELL_CONFIGURED = 0.15


@dataclass(frozen=True)
class Shape:
    """Scenarios that are simulated together.

    Attributes:
        balancers: of each.
        servers: most of them; the least is 2.
        count: scenarios per generation.
        delay: largest delay of an action, seconds.
    """

    balancers: int
    servers: int
    count: int
    delay: float = 0.0


#: The shapes of a generation, and of the scenarios that training does not see.
SHAPES = (
    Shape(1, 16, 4),
    Shape(1, 64, 1),
    Shape(2, 16, 1),
    Shape(4, 32, 2, delay=0.4),
    Shape(8, 64, 1),
)
VALIDATION = (Shape(1, 16, 8), Shape(1, 64, 2), Shape(2, 16, 3), Shape(4, 32, 3), Shape(8, 64, 1))


def _well_configured(scenario: Scenario, rng: np.random.Generator) -> Scenario:
    """The scenario with weights that its operator has measured, with an error of some 20 %."""
    errors = np.exp(0.2 * rng.normal(size=scenario.num_servers))
    servers = [
        replace(server, weight=float(server.capacity * error))
        for server, error in zip(scenario.servers, errors, strict=True)
    ]
    return replace(scenario, servers=tuple(servers))


def draw_scenarios(shape: Shape, rng: np.random.Generator, base: AnyScenario | None = None) -> list[Scenario]:
    """Scenarios of a shape.

    Args:
        shape: of the scenarios.
        rng: where everything that is drawn comes from.
        base: what to train on, with its own balancers; None: ``FAMILIES``.
    """
    drawn = []
    for _ in range(shape.count):
        if base is not None:
            drawn.append(base.draw(int(rng.integers(2**31)), horizon=600.0))
            continue
        family = FAMILIES[rng.choice(len(FAMILIES), p=[share for _, share in FAMILIES])][0]
        # A shape of many servers is for clusters of many, and no balancer has less than a server.
        least = shape.servers // 2 if shape.servers > 32 else max(2, min(shape.balancers, 8))
        sized = family.with_changes(balancers=shape.balancers, num_servers=Uniform(least, shape.servers))
        scenario = sized.draw(int(rng.integers(2**31)), horizon=200.0)
        drawn.append(_well_configured(scenario, rng) if rng.random() < WELL_CONFIGURED else scenario)
    return drawn


@dataclass(frozen=True)
class Score:
    """How candidates did on scenarios, float64[P, S] each: logarithms of the mean and of the p99 FCT over SED's.

    ``seconds``: the mean FCT of all flows.
    """

    fct_mean: NDArray[np.float64]
    fct_p99: NDArray[np.float64]
    seconds: float = math.nan

    def total(self, penalty: float) -> NDArray[np.float64]:
        """What is minimised, float64[P]: the sum of both in the mean over scenarios.

        Args:
            penalty: what is above 0, hence worse than SED, counts so many times more.
        """
        both = self.fct_mean + self.fct_p99
        worse = np.maximum(self.fct_mean, 0.0) + np.maximum(self.fct_p99, 0.0)
        total: NDArray[np.float64] = (both + penalty * worse).mean(axis=1)
        return total


def measure(
    parameters: Mapping[str, NDArray[np.float64]],
    scenarios: Sequence[Scenario],
    seeds: Sequence[int],
    *,
    servers: int,
    duration: float,
    warmup: float,
    delay: float = 0.0,
    dispatch: str = "marginal",
    num_threads: int | None = None,
) -> Score:
    """Run every candidate, and SED with the configured weights, on every scenario, on the same flows.

    Args:
        parameters: of :class:`IndexEstimator`, each with a leading axis [P].
        scenarios: S of the same number of balancers.
        seeds: of their flows.
        servers: room for servers.
        duration: seconds.
        warmup: seconds whose flows do not count.
        delay: largest delay of an action, seconds, drawn anew for every step and balancer.
        dispatch: the candidates' dispatch rule.
        num_threads: of the simulator.
    """
    p, s, m, n = len(parameters["constants"]), len(scenarios), scenarios[0].balancers, servers
    every = [replace(scenario, dispatch=dispatch) for scenario in scenarios]
    baseline = [replace(scenario, dispatch="sed") for scenario in scenarios]
    simulation = Simulation(
        every[0].reference, (p + 1) * s, num_servers=n, service=False, record_flows=True, num_threads=num_threads
    )
    simulation.set_scenarios(dict(enumerate(every * p + baseline)))
    configured = Configured.stack([Configured.of(scenario, n) for scenario in scenarios])
    # [P, S, m, N]
    weights, cores = (np.broadcast_to(x[None, :, None], (p, s, m, n)) for x in (configured.weights, configured.cores))
    estimator = IndexEstimator(
        {name: value.reshape(p, 1, 1, *value.shape[1:]) for name, value in parameters.items()}, DEFAULT_STEP_INTERVAL
    )
    log_weights, log_cores, log_m = np.log(weights), np.log(cores), np.full((1, 1, 1, 1), math.log(m))
    rng = np.random.default_rng(list(seeds))
    snapshot = simulation.reset([*seeds] * (p + 1))
    proposed, loads = np.empty((2, p + 1, s, m, n))
    proposed[p], loads[p] = weights[0], 0.0
    kept: list[list[NDArray[np.float64]]] = [[] for _ in range((p + 1) * s)]
    steps = round(duration / DEFAULT_STEP_INTERVAL)
    try:
        for step in range(steps):
            active = np.broadcast_to(snapshot.active.reshape(p + 1, s, 1, n)[:p], (p, s, m, n))
            stats = snapshot.stats.reshape(p + 1, s, m, n, -1)[:p]
            change, background = estimator(stats, active, log_weights, log_cores, log_m)
            proposed[:p] = weights * np.exp(np.clip(change, -LARGEST_CHANGE, LARGEST_CHANGE))
            loads[:p] = cores * np.minimum(background, MAX_BACKGROUND)
            delays = np.tile(rng.uniform(0.0, delay, (s, m)), (p + 1, 1)) if delay > 0.0 else None
            snapshot = simulation.step(
                proposed.reshape(-1, m, n), DEFAULT_STEP_INTERVAL, background=loads.reshape(-1, m, n), delays=delays
            )
            if step % 20 == 19 or step == steps - 1:
                for replica, parts in enumerate(kept):
                    flows = simulation.take_flows(replica)
                    parts.append(flows["fct"][flows["arrival"] >= warmup])
        now = steps * DEFAULT_STEP_INTERVAL
        for replica, parts in enumerate(kept):
            arrivals = simulation.open_flows(replica)["arrival"]
            parts.append(now - arrivals[arrivals >= warmup])
    finally:
        simulation.close()
    # Where no flow came, nobody is better than anybody else.
    fct = [np.concatenate(parts) if sum(map(len, parts)) else np.ones(1) for parts in kept]
    means = np.log(np.array([values.mean() for values in fct])).reshape(p + 1, s)
    tails = np.log(np.array([np.quantile(values, 0.99) for values in fct])).reshape(p + 1, s)
    return Score(means[:p] - means[p], tails[:p] - tails[p], float(np.concatenate(fct[: p * s]).mean()))
