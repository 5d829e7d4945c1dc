"""Draws of a distribution of scenarios as arrays, to describe and plot it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .randomization import AnyScenario
from .workload import ARRIVAL_KINDS, DEMAND_KINDS

#: The quantiles that :meth:`Draws.summary` gives.
QUANTILES = {"least": 0.0, "p10": 0.1, "median": 0.5, "p90": 0.9, "most": 1.0}


@dataclass(frozen=True, slots=True)
class Draws:
    """Scenarios drawn from a distribution with the seeds 0, 1, ...; one entry per draw unless noted.

    Attributes:
        servers: int64[D].
        capacity: float64[D], core-seconds per second.
        load: float64[D].
        rate: float64[D], flows per second.
        mean_demand: float64[D], core-seconds.
        speeds: float64[sum of servers], of every server of every draw.
        cores: int64[sum of servers], of the same.
        arrivals, demand: the kind of each draw, "trace" for a trace.
        events: int64[D], that begin within the scenario's duration: failures, slow-downs, bursts, and their ends.
    """

    servers: NDArray[np.int64]
    capacity: NDArray[np.float64]
    load: NDArray[np.float64]
    rate: NDArray[np.float64]
    mean_demand: NDArray[np.float64]
    speeds: NDArray[np.float64]
    cores: NDArray[np.int64]
    arrivals: tuple[str, ...]
    demand: tuple[str, ...]
    events: NDArray[np.int64]

    def summary(self) -> dict[str, dict[str, float]]:
        """Quantiles of the attributes with one number per draw, by attribute and quantile."""
        names = ("servers", "capacity", "load", "rate", "mean_demand", "events")
        return {
            name: {label: float(np.quantile(getattr(self, name), q)) for label, q in QUANTILES.items()}
            for name in names
        }


def draw_many(distribution: AnyScenario, count: int) -> Draws:
    """``count`` draws of at least 1, with the seeds 0, 1, ..."""
    duration = distribution.duration
    drawn = [distribution.draw(seed, horizon=duration) for seed in range(count)]
    every = [server for scenario in drawn for server in scenario.servers]
    traced = distribution.reference.workload.trace is not None

    def kinds(part: str, table: dict[str, type]) -> tuple[str, ...]:
        names = {cls: name for name, cls in table.items()}
        return tuple("trace" if traced else names[type(getattr(s.workload, part))] for s in drawn)

    def column(values: Any, dtype: Any = np.float64) -> NDArray[Any]:
        return np.array(list(values), dtype)

    return Draws(
        servers=column((s.num_servers for s in drawn), np.int64),
        capacity=column(s.capacity for s in drawn),
        load=column(s.load for s in drawn),
        rate=column(s.rate for s in drawn),
        mean_demand=column(s.workload.mean_demand for s in drawn),
        speeds=column(server.speed for server in every),
        cores=column((server.cores for server in every), np.int64),
        arrivals=kinds("arrivals", ARRIVAL_KINDS),
        demand=kinds("demand", DEMAND_KINDS),
        events=column((sum(event.time <= duration for event in s.events) for s in drawn), np.int64),
    )
