"""The twin under what a recording saw: its arrivals and the weights in force, with demands of a law: :func:`replay`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...features.columns import FEATURE_NAMES
from ...scenarios import (
    BoundedPareto,
    Demand,
    Deterministic,
    Empirical,
    Exponential,
    Lognormal,
    Scenario,
    Trace,
    Workload,
)
from ...simulator import Simulation
from ...snapshot import Snapshot
from .counts import Counts

MEAN, P90, STD = (FEATURE_NAMES.index(name) for name in ("fct_mean", "fct_p90", "fct_std"))
#: Seconds between two looks at the features, at least; weights change when they did.
_LOOK = 0.25


@dataclass(frozen=True, eq=False)
class Outcome:
    """What is seen of the servers, recorded or predicted by R replicas: float64[R, N] each.

    Attributes:
        fct_mean: exact mean FCT of the completed flows, seconds.
        fct_p90, fct_std: means over time of the features, seconds; NaN where the data plane does not measure them.
        open_flows: mean over time.
        share: of the flows that were sent there.
    """

    fct_mean: NDArray[np.float64]
    fct_p90: NDArray[np.float64]
    fct_std: NDArray[np.float64]
    open_flows: NDArray[np.float64]
    share: NDArray[np.float64]


def recorded(counts: Counts) -> Outcome:
    """What the recording itself saw, R = 1."""
    recording, rows = counts.recording, counts.rows
    active = recording.active[rows]
    seen = np.maximum(active.sum(axis=0), 1)
    stats = {}
    for name, column in (("fct_p90", P90), ("fct_std", STD)):
        mean = recording.stats[rows, :, column].sum(axis=0, dtype=np.float64) / seen
        stats[name] = (mean if name in recording.real_features else np.full(len(mean), np.nan))[None]
    started = counts.started.sum(axis=0)
    return Outcome(
        fct_mean=counts.mean_fct[None],
        open_flows=counts.mean_open[None],
        share=(started / max(started.sum(), 1))[None],
        **stats,
    )


def replay(
    twin: Scenario,
    counts: Counts,
    demands: Sequence[NDArray[np.float64]],
    seeds: Sequence[int],
    warmup: float,
    generator: np.random.Generator,
) -> Outcome:
    """Simulate the twin under the arrivals and the weights of a recording.

    Args:
        twin: its servers, dispatch rule and sampling.
        counts: the intervals.
        demands: per replica, of each flow; their number is that of the arrivals.
        seeds: per replica, of the flows' hashes and the reservoirs.
        warmup: seconds at the beginning that do not count.
        generator: of the arrivals' instants within their intervals, the same for all replicas.
    """
    simulation = _simulation(twin, counts, demands, seeds, generator)
    stats, looks = np.zeros((2, len(demands), twin.num_servers)), 0
    before: tuple[dict[str, NDArray[np.float64]], NDArray[np.int64], NDArray[np.int64]] | None = None
    for clock, snapshot in _steps(simulation, counts):
        if clock < warmup:
            continue
        if before is None:
            before = simulation.integrals(), snapshot.completed, snapshot.started
        else:
            stats += np.stack([snapshot.stats[:, 0, :, P90], snapshot.stats[:, 0, :, STD]])
            looks += 1
    assert before is not None
    after = simulation.integrals()
    simulation.close()
    change = {key: after[key] - before[0][key] for key in ("fct_sum", "queue", "clock")}
    completed, started = snapshot.completed - before[1], snapshot.started - before[2]
    with np.errstate(invalid="ignore", divide="ignore"):
        fct = np.where(completed > 0, change["fct_sum"] / completed, np.nan)
    return Outcome(
        fct_mean=fct,
        fct_p90=stats[0] / max(looks, 1),
        fct_std=stats[1] / max(looks, 1),
        open_flows=change["queue"] / change["clock"][:, None],
        share=started / np.maximum(started.sum(axis=1, keepdims=True), 1),
    )


def replay_flows(twin: Scenario, counts: Counts, demands: NDArray[np.float64], seed: int) -> dict[str, NDArray[Any]]:
    """The flows that end when the twin is simulated so, as ``Simulation.take_flows`` has them.

    Args:
        twin: its servers, dispatch rule and sampling.
        counts: the intervals.
        demands: of each flow.
        seed: of the flows' hashes and instants.
    """
    simulation = _simulation(twin, counts, [demands], [seed], np.random.default_rng(seed), record_flows=True)
    for _ in _steps(simulation, counts):
        pass
    flows = simulation.take_flows()
    simulation.close()
    return flows


def _simulation(
    twin: Scenario,
    counts: Counts,
    demands: Sequence[NDArray[np.float64]],
    seeds: Sequence[int],
    generator: np.random.Generator,
    *,
    record_flows: bool = False,
) -> Simulation:
    """The twin at time 0, with the recorded arrivals as its trace."""
    ends = np.cumsum(counts.seconds)
    interval = np.repeat(np.arange(len(counts)), counts.arrivals)
    times = np.sort(ends[interval] - generator.random(len(interval)) * counts.seconds[interval])
    scenarios = [
        replace(twin, workload=Workload(trace=Trace(times=times, demands=each, repeat=False)), events=())
        for each in demands
    ]
    simulation = Simulation(scenarios[0], len(demands), service=False, record_flows=record_flows)
    simulation.set_scenarios(dict(enumerate(scenarios)))
    simulation.reset(seeds)
    return simulation


def _steps(simulation: Simulation, counts: Counts) -> Iterator[tuple[float, Snapshot]]:
    """Simulate under the recorded weights: the time and the snapshot at every look."""
    recording = counts.recording
    weights = np.where(recording.active[counts.rows], recording.weights[counts.rows], 0.0)
    # An interval in which no server is active has no weights of its own.
    weights[~weights.any(axis=1)] = 1.0
    changes = np.ones(len(counts), bool)
    changes[1:] = (np.diff(weights, axis=0) != 0.0).any(axis=1)
    ends = np.cumsum(counts.seconds)
    clock, first = 0.0, 0
    for k in range(len(counts)):
        due = k + 1 == len(counts) or changes[k + 1] or ends[k] - clock >= _LOOK - 1e-9
        if not due:
            continue
        shape = (simulation.num_replicas, 1, weights.shape[1])
        given = np.broadcast_to(weights[first], shape) if changes[first] else None
        snapshot = simulation.step(given, float(ends[k] - clock))
        clock, first = float(ends[k]), k + 1
        yield clock, snapshot


def quantiles(demand: Demand, normal: NDArray[np.float64]) -> NDArray[np.float64]:
    """Demands of a law from standard normal numbers, each by its own quantile: the same numbers, comparable flows."""
    match demand:
        case Deterministic():
            return np.full(len(normal), demand.mean)
        case Lognormal():
            variance = math.log1p(demand.cv**2)
            result: NDArray[np.float64] = demand.mean * np.exp(math.sqrt(variance) * normal - variance / 2.0)
            return result
        case Exponential():
            return -demand.mean * np.log(_above(normal))
        case BoundedPareto():
            tail = 1.0 - (demand.minimum / demand.maximum) ** demand.alpha
            pareto: NDArray[np.float64] = demand.minimum * (1.0 - (1.0 - _above(normal)) * tail) ** (
                -1.0 / demand.alpha
            )
            return pareto
        case Empirical():
            values = np.sort(np.asarray(demand.values))
            below = 1.0 - _above(normal)
            return values[np.minimum((below * len(values)).astype(int), len(values) - 1)]
        case _:
            raise TypeError(f"no quantiles of {demand!r}")


def _above(normal: NDArray[np.float64]) -> NDArray[np.float64]:
    """Probability that a standard normal number is larger than each."""
    return np.array([0.5 * math.erfc(x / math.sqrt(2.0)) for x in normal.tolist()])
