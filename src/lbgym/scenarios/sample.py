"""Make the sample trace that the package ships: ``python -m lbgym.scenarios.sample FILE``."""

from __future__ import annotations

import math
import random
import sys
from statistics import NormalDist

import numpy as np

from .traces import write_trace
from .workload import Trace

NUM_FLOWS = 5_000


def make_sample_trace(seed: int = 2026) -> Trace:
    """``NUM_FLOWS`` synthetic flows in about 46 seconds.

    Arrivals are Poisson, 100 flows/s in the mean: a wave of 40 % over 25 s and, at 30 s, a burst of 2 s at twice the
    rate. Of the flows, 70 % are small (lognormal, mean 33 ms) and 30 % large (lognormal, mean 250 ms). Rounded to 10
    microseconds.
    """
    # Only random() of this generator promises the same numbers in every version of Python.
    uniform, normal = random.Random(seed).random, NormalDist()
    time = 0.0
    times: list[float] = []
    demands: list[float] = []
    while len(times) < NUM_FLOWS:
        time -= math.log(1 - uniform()) / 280
        burst = 2.0 if 30 <= time < 32 else 1.0
        if uniform() * 280 >= 100 * burst * (1 + 0.4 * math.sin(2 * math.pi * time / 25)):
            continue
        mean, sigma = (0.033, 0.6) if uniform() < 0.7 else (0.25, 1.0)
        z = normal.inv_cdf(1 - uniform())
        times.append(round(time, 5))
        demands.append(max(round(mean * math.exp(sigma * z - sigma**2 / 2), 5), 1e-5))
    return Trace(np.array(times), np.array(demands), source="sample")


if __name__ == "__main__":
    write_trace(make_sample_trace(), sys.argv[1])
