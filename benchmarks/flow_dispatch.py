"""Decisions per second of FlowDispatch-v0 on Park's workload: ``python -m benchmarks.flow_dispatch``.

A decision here is a whole ``step``: the action checked, the flows simulated to the next arrival, the observation, the
reward and the info made, finished episodes reset; Park's observation, reward and 1,000 flows an episode. Servers are
drawn beforehand, each in proportion to its rate, which keeps every queue stable (a uniform split would not); with a
policy that looks, the time includes a vectorised least-delay rule in NumPy. All of it on one core, except where threads
are given. Park's own environment makes 9,000 to 14,000 decisions per second on such a core, which is what the target of
50 times as many refers to. It is held against decisions per second of processor time, which other processes on the core
do not use up (though they empty its caches); on a quiet machine that is the time on the wall. The exit code is 1 if a
full run misses it.
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


Speeds = list[tuple[float, float]]


def speeds(run: Callable[[], int], rounds: int) -> Speeds:
    """Decisions per second of processor time and of time on the wall, once per round of ``run``.

    The first round, not in the result, finds the arrays too small for the longest queues.
    """
    out = []
    for _ in range(rounds + 1):
        wall, processor = time.perf_counter(), time.process_time()
        decisions = run()
        out.append((decisions / (time.process_time() - processor), decisions / (time.perf_counter() - wall)))
    return out[1:]


def single(decisions: int, rounds: int) -> Speeds:
    """One environment."""
    env = lbgym.FlowDispatchEnv()
    servers = np.random.default_rng(1).choice(len(RATES), p=RATES / RATES.sum(), size=4096).tolist()
    env.reset(seed=1)

    def run() -> int:
        for k in range(decisions):
            *_, truncated, _ = env.step(servers[k % 4096])
            if truncated:
                env.reset()
        return decisions

    out = speeds(run, rounds)
    env.close()
    return out


def vector(replicas: int, decisions: int, rounds: int, *, threads: int = 1, looks: bool = False) -> Speeds:
    """All replicas together."""
    env = lbgym.FlowDispatchVectorEnv(replicas, num_threads=threads)
    drawn = np.random.default_rng(1).choice(len(RATES), p=RATES / RATES.sum(), size=(64, replicas))
    scale = (1 / RATES).astype(np.float32)

    def act(k: int, observation: Any) -> Any:
        return (observation[:, :-1] * scale).argmin(axis=1) if looks else drawn[k % 64]

    observation, _ = env.reset(seed=1)
    steps = max(decisions // replicas, 20)

    def run() -> int:
        nonlocal observation
        for k in range(steps):
            observation, *_ = env.step(act(k, observation))
        return steps * replicas

    out = speeds(run, rounds)
    env.close()
    return out


def on_one_core(measure: Callable[[], Speeds]) -> Speeds:
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

    held = f"{REPLICAS} replicas"
    rows = []
    for name, each in results.items():
        # Several threads use several seconds of processor time in one.
        one = "threads" not in name
        processor, wall = median(a for a, _ in each), median(b for _, b in each)
        speed = processor if one else wall
        rows.append(
            (
                name,
                round(processor) if one else "",
                round(wall),
                round(max(b for _, b in each)),
                speed / PARK,
                TARGET if name == held else "",
                speed >= TARGET if name == held else "",
            )
        )
    reached = median(a for a, _ in results[held]) >= TARGET
    header = ("decisions/s: one core, unless threads are given", "processor", "wall", "best", "x Park")
    text = markdown(rows, (*header, "target", "reached"))
    data = {
        "per_second_of_processor_time": {name: [a for a, _ in each] for name, each in results.items()},
        "per_second": {name: [b for _, b in each] for name, each in results.items()},
        "target": TARGET,
    }
    report("flow_dispatch", arguments, text, data)
    return 0 if quick or reached else 1


if __name__ == "__main__":
    sys.exit(main())
