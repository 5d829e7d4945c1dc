"""Decisions per second of FlowDispatch-v0 on Park's workload: ``python -m benchmarks.flow_dispatch``.

A decision here is a whole ``step``: the action checked, the flows simulated to the next arrival, the observation, the
reward and the info made, finished episodes reset; Park's observation, reward and 1,000 flows an episode. Servers are
drawn beforehand, each in proportion to its rate, which keeps every queue stable (a uniform split would not); with a
policy that looks, the time includes a vectorised least-delay rule in NumPy. All of it on one core, except where threads
are given. Park's own environment makes 9,000 to 14,000 decisions per second on such a core, which is what the target of
50 times as many refers to. The exit code is 1 if a full run misses it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np

import lbgym
from benchmarks.common import markdown, parser, report
from lbgym.scenarios import named_scenario

PARK = 14_000
TARGET = 50 * PARK
#: Replicas at which the target must be reached: enough to hide Python, few enough for a core's own cache.
REPLICAS = 256
RATES = np.array([server.capacity for server in named_scenario("park").servers])


def single(decisions: int, rounds: int) -> list[float]:
    """Decisions per second of one environment, once per round."""
    env = lbgym.FlowDispatchEnv()
    servers = np.random.default_rng(1).choice(len(RATES), p=RATES / RATES.sum(), size=4096).tolist()
    env.reset(seed=1)
    out = []
    for _ in range(rounds):
        started = time.perf_counter()
        for k in range(decisions):
            *_, truncated, _ = env.step(servers[k % 4096])
            if truncated:
                env.reset()
        out.append(decisions / (time.perf_counter() - started))
    env.close()
    return out


def vector(replicas: int, decisions: int, rounds: int, *, threads: int = 1, looks: bool = False) -> list[float]:
    """Decisions per second over all replicas, once per round."""
    env = lbgym.FlowDispatchVectorEnv(replicas, num_threads=threads)
    drawn = np.random.default_rng(1).choice(len(RATES), p=RATES / RATES.sum(), size=(64, replicas))
    scale = (1 / RATES).astype(np.float32)

    def act(k: int, observation: Any) -> Any:
        return (observation[:, :-1] * scale).argmin(axis=1) if looks else drawn[k % 64]

    observation, _ = env.reset(seed=1)
    steps = max(decisions // replicas, 20)
    out = []
    # The first round finds the arrays too small for the longest queues; what is timed is the steady state.
    for _ in range(rounds + 1):
        started = time.perf_counter()
        for k in range(steps):
            observation, *_ = env.step(act(k, observation))
        out.append(steps * replicas / (time.perf_counter() - started))
    env.close()
    return out[1:]


def on_one_core(measure: Callable[[], list[float]]) -> list[float]:
    """``measure`` with this process kept on one core, where the system can."""
    if not hasattr(os, "sched_setaffinity"):
        return measure()
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        return measure()
    finally:
        os.sched_setaffinity(0, cores)


def main(argv: Sequence[str] | None = None) -> int:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--rounds", type=int, default=7)
    arguments = options.parse_args(argv)
    quick = arguments.quick
    rounds = 3 if quick else arguments.rounds
    decisions = 100_000 if quick else 300_000
    results = {"single": on_one_core(lambda: single(decisions // 100, rounds))}
    for replicas in (16, 256) if quick else (16, 64, 256, 1024, 4096):
        results[f"{replicas} replicas"] = on_one_core(lambda n=replicas: vector(n, decisions, rounds))
    looking = f"{REPLICAS} replicas and a policy that looks"
    results[looking] = on_one_core(lambda: vector(REPLICAS, decisions, rounds, looks=True))
    results["2048 replicas, 2 threads"] = vector(2048, decisions, rounds, threads=2)

    reached = median(results[f"{REPLICAS} replicas"]) >= TARGET
    rows = [
        (
            name,
            round(median(speeds)),
            round(max(speeds)),
            median(speeds) / PARK,
            TARGET if name == f"{REPLICAS} replicas" else "",
            reached if name == f"{REPLICAS} replicas" else "",
        )
        for name, speeds in results.items()
    ]
    header = ("one core, unless threads are given", "decisions/s, median", "best", "x Park", "target", "reached")
    report("flow_dispatch", arguments, markdown(rows, header), {"decisions_per_second": results, "target": TARGET})
    return 0 if quick or reached else 1


if __name__ == "__main__":
    sys.exit(main())
