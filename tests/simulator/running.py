"""Short ways to run a scenario in a test."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lbgym.scenarios import Deterministic, Event, Scenario, Server, Trace, Workload
from lbgym.simulator import Simulation

COMPLETED, REJECTED, FAILED, UNROUTED = range(4)
#: A demand too small to keep a server busy while the next flow arrives.
INSTANT = Deterministic(mean=1e-12)


def broadcast(sim: Simulation, weights: ArrayLike | None) -> NDArray[np.float64] | None:
    if weights is None:
        return None
    return np.broadcast_to(weights, (sim.num_replicas, sim.num_balancers, sim.num_servers)).astype(np.float64)


def by_id(flows: dict[str, NDArray]) -> dict[str, NDArray]:
    order = np.argsort(flows["flow_id"])
    return {name: column[order] for name, column in flows.items()}


def merged(parts: Sequence[dict[str, NDArray]]) -> dict[str, NDArray]:
    return by_id({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


def run_flows(
    scenario: Scenario, duration: float, *, seed: int = 1, weights: ArrayLike | None = None, **keys
) -> tuple[Simulation, dict[str, NDArray]]:
    """The simulation after ``duration`` seconds and the flows that ended, in order of arrival."""
    sim = Simulation(scenario, record_flows=True, **keys)
    sim.reset([seed])
    sim.step(broadcast(sim, weights), duration)
    return sim, by_id(sim.take_flows())


def drained(scenario: Scenario, stop: float, *, patience: float = 1e6, **keys) -> tuple[Simulation, dict[str, NDArray]]:
    """All the flows of the first ``stop`` seconds: then arrivals cease and the servers empty."""
    workload = scenario.workload
    if workload.trace is not None:
        patience += workload.trace.period
    scenario = scenario.with_changes(events=(*scenario.events, Event(time=stop, kind="rate", value=0.0)))
    sim, flows = run_flows(scenario, stop + patience, **keys)
    assert not sim.integrals()["open"].any()
    np.testing.assert_array_equal(flows["flow_id"], np.arange(len(flows["flow_id"])))
    return sim, flows


def trace_scenario(times: ArrayLike, demands: ArrayLike, *servers: Server, repeat: bool = False, **changes) -> Scenario:
    """A scenario that replays the given flows once."""
    trace = Trace(times=np.asarray(times, float), demands=np.asarray(demands, float), repeat=repeat)
    return Scenario(name="trace", servers=servers or (Server(),), workload=Workload(trace=trace), **changes)
