"""``benchmarks/live_equals_simulated.py`` with two short episodes; the full size is run there."""

from __future__ import annotations

import numpy as np

from benchmarks.live_equals_simulated import METRICS, Setting, compare, simulated

SETTING = Setting(duration=36.0, warmup=10.0, speedup=40.0)
#: Of the simulated means: flows are the same in both, reservoirs hold few samples in so short a time.
TOLERANCES = np.where(np.isin(METRICS, ("FCT", "n_flow_on")), 0.1, 0.3)


def test_live_equals_simulated() -> None:
    seeds = range(2)
    results, pace = compare(["latency"], seeds, SETTING)
    plain = np.array([result.simulated.mean for result in results])
    live = np.array([result.live.mean for result in results])
    assert (np.abs(live / plain - 1) < TOLERANCES).all(), dict(zip(METRICS, live / plain, strict=True))
    # Agents that miss deadlines step less often, and none is unaccounted for.
    steps = pace["latency"]["steps"] + pace["latency"]["missed"]
    assert 0.5 < steps / (len(seeds) * SETTING.duration / 0.25) < 1.1
    # Weights that do not follow the servers would be noticed.
    deaf = np.mean([simulated("uniform", seed, SETTING).means for seed in seeds], axis=0)
    assert np.abs(deaf / live - 1)[0] > 2 * TOLERANCES[0]
