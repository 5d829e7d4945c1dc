"""Flows per second of the simulator by the number of servers: ``python -m benchmarks.many_servers``.

Servers of two cores, load 0.8, exponential demands, one balancer, FCT statistics, one core, dispatch rules that count
flows; seconds are the thread's own. Rounds alternate between the sizes, so that a change of the machine's speed meets
them all; ratios are medians over rounds.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from statistics import median

from benchmarks.common import markdown, parser, report
from lbgym.scenarios import Exponential, Scenario, Server, Workload
from lbgym.simulator import Simulation

SIZES = (8, 64, 256, 1024, 4096)
RULES = ("sed", "lsq", "marginal", "oracle_marginal")
LOAD, MEAN, CORES = 0.8, 0.1, 2
#: Least flows/s over those at 8 servers, under sed.
TARGETS = {1024: 1 / 2, 4096: 1 / 3}


def speed(servers: int, rule: str, flows: int, seed: int) -> float:
    """Flows per second of about ``flows`` flows, with all arrays as large as they need to be."""
    workload = Workload(load=LOAD, demand=Exponential(mean=MEAN))
    scenario = Scenario(name="many", servers=(Server(cores=CORES),) * servers, workload=workload, dispatch=rule)
    simulation = Simulation(scenario, reservoirs=False)
    simulation.reset([seed])
    seconds = flows / scenario.rate
    before = int(simulation.step(None, seconds).completed.sum())
    started = time.thread_time()
    after = int(simulation.step(None, seconds).completed.sum())
    return (after - before) / (time.thread_time() - started)


def main(argv: Sequence[str] | None = None) -> int:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--flows", type=int, default=200_000)
    arguments = options.parse_args(argv)
    rounds, flows = (2, arguments.flows // 4) if arguments.quick else (arguments.rounds, arguments.flows)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    speeds: dict[str, dict[int, list[float]]] = {rule: {size: [] for size in SIZES} for rule in RULES}
    for i in range(rounds):
        for rule in RULES:
            for size in SIZES:
                speeds[rule][size].append(speed(size, rule, flows, i))

    def ratio(rule: str, size: int) -> float:
        pairs = zip(speeds[rule][size], speeds[rule][SIZES[0]], strict=True)
        return median(many / few for many, few in pairs)

    rows = [
        (rule, size, round(median(each[size])), ratio(rule, size)) for rule, each in speeds.items() for size in SIZES
    ]
    text = markdown(rows, ("rule", "servers", "flows/s, median", f"over that at {SIZES[0]}"))
    targets = [(f"sed, {size} servers over {SIZES[0]}", least, ratio("sed", size)) for size, least in TARGETS.items()]
    text += "\n\n" + markdown([(n, w, r, r >= w) for n, w, r in targets], ("target", "at least", "measured", "reached"))
    data = {
        "speeds": {rule: {str(size): runs for size, runs in each.items()} for rule, each in speeds.items()},
        "targets": [{"name": n, "at_least": w, "measured": r, "reached": r >= w} for n, w, r in targets],
    }
    report("many_servers", arguments, text, data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
