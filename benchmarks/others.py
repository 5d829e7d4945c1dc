"""Can a balancer know what the others hold? A regression of their flows at a server on what it sees there.

python -m benchmarks.others

Under the policy ``adaptive``, on the suite's scenarios of several balancers whose servers stay as they are. Everything
is taken relative to its mean at the server, which a balancer can learn; R2 is the part of the remaining variance that
is explained. The rest is for an oracle alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import common
from lbgym.env.actions import MAX_BACKGROUND
from lbgym.evaluation.suite import protocol_of
from lbgym.features import FEATURE_NAMES
from lbgym.policies import load_policy
from lbgym.policies.estimator import LARGEST_CHANGE, IndexEstimator
from lbgym.policies.neural import EstimatorPolicy
from lbgym.policies.pretrained import pretrained_file
from lbgym.scenarios import Configured, Scenario
from lbgym.simulator import Simulation
from lbgym.snapshot import DEFAULT_STEP_INTERVAL

Array = NDArray[Any]
#: Seconds of the own flows' moving averages.
MEMORIES = (0.5, 2.0, 8.0, 30.0)


def observed(scenario: Scenario, seeds: Sequence[int], steps: int) -> Array:
    """Features [T, S, m, N, 11] that balancers under ``adaptive`` see, of these flow seeds."""
    policy = load_policy(pretrained_file("adaptive"))
    assert isinstance(policy, EstimatorPolicy)
    n, m, s = scenario.num_servers, scenario.balancers, len(seeds)
    ruled = replace(scenario, dispatch="marginal")
    configured = Configured.of(ruled, n)
    weights, cores = (np.broadcast_to(x, (s, m, n)).astype(float) for x in (configured.weights, configured.cores))
    estimator = IndexEstimator(policy.parameters, DEFAULT_STEP_INTERVAL)
    simulation = Simulation(ruled, s, num_servers=n, service=False, num_threads=1)
    seen = []
    try:
        snapshot = simulation.reset(list(seeds))
        for _ in range(steps):
            stats = snapshot.stats.reshape(s, m, n, -1)
            seen.append(stats.astype(float))
            active = np.broadcast_to(snapshot.active.reshape(s, 1, n), (s, m, n))
            change, load = estimator(stats, active, np.log(weights), np.log(cores), np.full((1, 1, 1), math.log(m)))
            snapshot = simulation.step(
                weights * np.exp(np.clip(change, -LARGEST_CHANGE, LARGEST_CHANGE)),
                DEFAULT_STEP_INTERVAL,
                background=cores * np.minimum(load, MAX_BACKGROUND),
            )
    finally:
        simulation.close()
    return np.array(seen)


def average(values: Array, memory: float) -> Array:
    """The exponential moving average along the first axis."""
    keep = math.exp(-DEFAULT_STEP_INTERVAL / memory)
    result, last = np.empty_like(values), values[0]
    for step, value in enumerate(values):
        result[step] = last = value + keep * (last - value)
    return result


def explained(target: Array, inputs: Sequence[Array]) -> float:
    """R2 of a linear regression."""
    columns = np.stack(inputs, axis=1)
    solution = np.linalg.lstsq(columns, target, rcond=None)[0]
    return float(1.0 - np.square(target - columns @ solution).mean() / np.square(target).mean())


def row(scenario: Scenario, seeds: Sequence[int], steps: int) -> list[Any]:
    """The table's row of a scenario."""
    seen = observed(scenario, seeds, steps)
    warm = steps // 4

    def apart(values: Array) -> Array:
        part = values[warm:]
        return (part - part.mean(axis=(0, 1, 2), keepdims=True)).ravel()

    column = {name: i for i, name in enumerate(FEATURE_NAMES)}
    flows = seen[..., column["n_flow_on"]]
    others = flows.sum(axis=2, keepdims=True) - flows
    fct = np.log(np.maximum(seen[..., column["fct_mean_decay"]], 1e-3))
    fct -= fct.mean(axis=-1, keepdims=True)
    ages = flows * seen[..., column["duration_mean_decay"]]
    target = apart(others)
    own = [apart(flows), *(apart(average(flows, memory)) for memory in MEMORIES)]
    latency = [apart(fct * others.mean(axis=(0, 1, 2))), apart(ages)]
    return [
        scenario.name,
        scenario.balancers,
        float(others.mean()),
        float(target.std()),
        explained(target, own[:1]),
        explained(target, own),
        explained(target, own + latency),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    given = common.parser(__doc__.splitlines()[0]).parse_args(arguments)
    cases = [case.scenario for case in protocol_of("v1").cases]
    chosen = [scenario for scenario in cases if scenario.balancers > 1 and not scenario.events]
    if given.quick:
        chosen = chosen[:1]
    rows = [row(scenario, (11, 12), 80 if given.quick else 480) for scenario in chosen]
    headings = ["scenario", "balancers", "others' flows", "deviation", "R2 of own flows", "and their past", "and times"]
    common.report("others", given, common.markdown(rows, headings), {"columns": headings, "rows": rows})


if __name__ == "__main__":
    main()
