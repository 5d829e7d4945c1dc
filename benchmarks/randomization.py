"""The cost of drawing a scenario for every episode: ``python -m benchmarks.randomization``.

A redraw is a seed turned into a scenario and the scenario into the simulator's parameters, for one replica among R.
Episodes are of 256 steps, as in training; the share of resets is their time, redraws included, over the time of whole
episodes of all replicas.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from statistics import median

import numpy as np

from benchmarks.common import markdown, parser, report
from lbgym import LoadBalanceVectorEnv
from lbgym.scenarios import named_distribution
from lbgym.simulator import Simulation

STEPS = 256
REPLICAS = 256


def seconds(call: Callable[[int], object], calls: int) -> float:
    """Mean seconds of a call."""
    started = time.perf_counter()
    for i in range(calls):
        call(i)
    return (time.perf_counter() - started) / calls


def draws(name: str, calls: int) -> float:
    distribution = named_distribution(name)
    return seconds(lambda i: distribution.draw(i, horizon=STEPS * 0.25), calls)


def redraws(name: str, replicas: int, calls: int) -> float:
    """Seconds to put a drawn scenario into one of ``replicas``."""
    distribution = named_distribution(name)
    simulation = Simulation(distribution.reference, replicas)
    drawn = [distribution.draw(i, horizon=STEPS * 0.25) for i in range(64)]
    for i, scenario in enumerate(drawn):
        simulation.set_scenarios({i % replicas: scenario})
    return seconds(lambda i: simulation.set_scenarios({i % replicas: drawn[i % 64]}), calls)


def episodes(name: str, steps: int) -> tuple[float, float]:
    """Seconds of a reset of all replicas, and of ``STEPS`` of their steps, estimated from ``steps`` of them."""
    env = LoadBalanceVectorEnv(REPLICAS, scenario=name, max_steps=10**9, num_threads=1)
    # Events are drawn for the steps that are measured, not for all of the endless episode.
    env._core.plane.horizon = STEPS * 0.25
    env.action_space.seed(1)
    actions = env.action_space.sample()
    env.reset(seed=1)
    env.step(actions)
    reset = seconds(lambda i: env.reset(), 3)
    step = seconds(lambda i: env.step(actions), steps)
    env.close()
    return reset, step * STEPS


def main(argv: Sequence[str] | None = None) -> int:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--rounds", type=int, default=7)
    arguments = options.parse_args(argv)
    rounds, calls, steps = (3, 200, 10) if arguments.quick else (arguments.rounds, 2000, 64)

    name = "random-clusters"
    draw = median(draws(name, calls) for _ in range(rounds))
    few = median(redraws(name, 16, calls) for _ in range(rounds))
    many = median(redraws(name, 1024, calls) for _ in range(rounds))
    shares = {}
    for each in ("random-heterogeneous", name):
        rows = np.array([episodes(each, steps) for _ in range(rounds)])
        shares[each] = float(np.median(rows[:, 0] / rows.sum(axis=1)))
    rows = [
        (f"{name}: drawing a scenario, microseconds", 1e6 * draw, "below 500", draw < 5e-4),
        (f"{name}: setting it in one of 16 replicas, microseconds", 1e6 * few, "below 250", few < 2.5e-4),
        (f"{name}: setting it in one of 1,024 replicas, over that", many / few, "below 1.5", many / few < 1.5),
        *(
            (f"{each}: share of resets in episodes of {STEPS} steps, %", 100 * share, "below 5", share < 0.05)
            for each, share in shares.items()
        ),
    ]
    text = markdown(rows, ("measure", "median", "target", "reached"))
    data = {"draw": draw, "set_of_16": few, "set_of_1024": many, "reset_share": shares}
    report("randomization", arguments, text, data)
    return 0 if all(row[-1] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
