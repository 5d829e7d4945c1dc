"""The live path against the plain simulator: ``python -m benchmarks.live_equals_simulated``.

The same scenario, policy and flows (common random numbers), once in `LoadBalanceEnv` on the simulator and once in
`LoadBalanceEnv` on shared memory, behind which the emulator runs in a process of its own. The two are not the same
run: a live action comes in force a moment after the observation it answers, and an overloaded machine makes the agent
miss deadlines. What they must share is what they measure.

Per seed the mean FCT of the flows that ended after the warm-up, and each feature's mean over time and servers, are
compared by the paired difference, live minus simulated. None of the Student-t intervals, at 99 % over all comparisons
together (Bonferroni), may exclude 0; and, so that a wide interval cannot pass for agreement, each interval's farther
end must be within a tolerance of the simulated mean.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from gymnasium.utils import seeding

import lbgym
from benchmarks.common import markdown, parser, report
from lbgym.evaluation.statistics import Interval, mean_interval
from lbgym.features import FEATURE_NAMES
from lbgym.policies import make_policy

INTERVAL = 0.25
CONFIDENCE = 0.99
METRICS = ("FCT", *FEATURE_NAMES)
#: Of the simulated mean, for the FCT and for a feature. Reservoirs of slow servers hold samples of many seconds, so
#: that a run has few independent ones.
TOLERANCES = 0.02, 0.15


@dataclass(frozen=True)
class Setting:
    """Scenario, seconds of data-plane time, of which ``warmup`` do not count, and live seconds per second."""

    scenario: str = "heterogeneous"
    duration: float = 240.0
    warmup: float = 20.0
    speedup: float = 60.0


@dataclass(frozen=True)
class Episode:
    """Means of one run, and the pace of a live one."""

    means: np.ndarray
    steps: int
    missed: int = 0
    delay: float = 0.0
    slips: int = 0


def episode(env: lbgym.LoadBalanceEnv, policy_name: str, seed: int, setting: Setting) -> Episode:
    """Run a policy until the data plane's clock shows ``duration``."""
    policy = make_policy(policy_name, env)
    observation, info = env.reset(seed=seed)
    policy.reset()
    ended = fct = 0.0
    rows, missed, delays = [], 0, []
    steps = 0
    while info["timestamp"] < setting.duration - INTERVAL / 2:
        observation, _, _, _, info = env.step(policy.act(observation, info))
        missed += info.get("missed_observations", 0)
        steps += 1
        if info["timestamp"] > setting.warmup + INTERVAL / 2:
            count = info["completed"] + info["rejected"]
            if count:
                ended += count
                fct += count * info["fct_mean"]
            rows.append(observation.mean(axis=0, dtype=np.float64))
            delays.append(info.get("action_delay", 0.0))
    means = np.array([fct / ended, *np.mean(rows, axis=0)])
    return Episode(means, steps, missed, float(np.nanmean(delays)))


def keys(setting: Setting) -> dict[str, Any]:
    return {
        "scenario": setting.scenario,
        "action_type": "continuous",
        "step_interval": INTERVAL,
        "max_steps": 10**9,
    }


def simulated(policy: str, seed: int, setting: Setting) -> Episode:
    env = lbgym.LoadBalanceEnv(**keys(setting))
    try:
        return episode(env, policy, seed, setting)
    finally:
        env.close()


def flow_seed(seed: int) -> int:
    """The seed that the environment's first reset draws for its flows from ``seed``."""
    return int(seeding.np_random(seed)[0].integers(1 << 63))


@contextmanager
def emulator(name: str, seed: int, setting: Setting) -> Iterator[list[int]]:
    """The emulator as a process; its late observations are in the list at the end."""
    command = [sys.executable, "-m", "lbgym", "dataplane", "emulate", "--name", name, "--scenario", setting.scenario]
    command += ["--speedup", str(setting.speedup), "--seed", str(seed)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    slips: list[int] = []
    try:
        assert process.stdout is not None
        if not process.stdout.readline().startswith("region "):
            raise RuntimeError(f"the emulator did not start: {process.communicate()[1]}")
        yield slips
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
        found = re.search(r"(\d+) of them late", errors)
        if process.returncode != 0 or found is None:
            raise RuntimeError(f"the emulator ended with code {process.returncode}: {errors}")
        slips.append(int(found[1]))
    finally:
        process.kill()
        process.communicate()


def live(policy: str, seed: int, setting: Setting) -> Episode:
    name = f"lbgym-bench-{os.getpid()}"
    with emulator(name, flow_seed(seed), setting) as slips:
        env = lbgym.LoadBalanceEnv(shm_name=name, **keys(setting))
        try:
            run = episode(env, policy, seed, setting)
        finally:
            env.close()
    return Episode(run.means, run.steps, run.missed, run.delay, slips[0])


@dataclass(frozen=True)
class Agreement:
    """Of one metric under one policy, over seeds."""

    policy: str
    metric: str
    simulated: Interval
    live: Interval
    difference: Interval
    tolerance: float

    @property
    def farther(self) -> float:
        """Of the ends of the difference's interval, over the simulated mean."""
        return max(abs(self.difference.low), abs(self.difference.high)) / abs(self.simulated.mean)

    @property
    def passed(self) -> bool:
        return not self.difference.excludes_zero and self.farther <= self.tolerance


def compare(policies: list[str], seeds: range, setting: Setting) -> tuple[list[Agreement], dict[str, Any]]:
    """All metrics under all policies, and the pace of the live runs."""
    confidence = 1 - (1 - CONFIDENCE) / (len(policies) * len(METRICS))
    results, pace = [], {}
    for policy in policies:
        plain = [simulated(policy, seed, setting) for seed in seeds]
        real = [live(policy, seed, setting) for seed in seeds]
        a, b = np.array([run.means for run in plain]), np.array([run.means for run in real])
        for i, metric in enumerate(METRICS):
            results.append(
                Agreement(
                    policy,
                    metric,
                    mean_interval(a[:, i]),
                    mean_interval(b[:, i]),
                    mean_interval(b[:, i] - a[:, i], confidence),
                    TOLERANCES[min(i, 1)],
                )
            )
        pace[policy] = {
            "steps": sum(run.steps for run in real),
            "missed": sum(run.missed for run in real),
            "slips": sum(run.slips for run in real),
            "action_delay": float(np.mean([run.delay for run in real])),
        }
    return results, pace


def main() -> int:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--scenario", default=Setting.scenario, help="name or TOML path; one balancer")
    options.add_argument("--policies", default="latency,littles-law", help="heuristics, separated by commas")
    options.add_argument("--seeds", type=int, default=20)
    options.add_argument("--speedup", type=float, default=Setting.speedup)
    options.add_argument("--duration", type=float, default=Setting.duration, help="seconds of data-plane time per run")
    chosen = options.parse_args()
    setting = Setting(chosen.scenario, chosen.duration, Setting.warmup, chosen.speedup)
    seeds = range(chosen.seeds)
    if chosen.quick:
        seeds, setting = range(3), Setting(chosen.scenario, 40.0, 10.0, chosen.speedup)
    begun = time.monotonic()
    results, pace = compare(chosen.policies.split(","), seeds, setting)
    rows = [
        [
            f"{r.policy}: {r.metric}",
            r.simulated.mean,
            r.simulated.half_width,
            r.live.mean,
            r.live.half_width,
            100 * r.difference.mean / r.simulated.mean,
            100 * r.difference.half_width / r.simulated.mean,
            r.passed,
        ]
        for r in results
    ]
    header = ["mean of", "simulated", "±", "live", "±", "difference %", "±", "agree"]
    lines = [
        f"{setting.scenario}, {len(seeds)} seeds, {setting.duration:g} s each ({setting.warmup:g} s warm-up), steps of "
        f"{INTERVAL:g} s, speedup {setting.speedup:g}; means over seeds ± 95 %, paired differences ± 99 % over all "
        f"{len(results)} together; to agree, they include 0 and end within {100 * TOLERANCES[0]:g} % (FCT) or "
        f"{100 * TOLERANCES[1]:g} %",
        "",
        markdown(rows, header),
        "",
        *(
            f"{policy}: {p['steps']:,} live steps, {p['missed']} deadlines missed, {p['slips']} observations late, "
            f"mean action delay {1e3 * p['action_delay']:.3g} ms of simulated time"
            for policy, p in pace.items()
        ),
        f"{time.monotonic() - begun:.0f} s in all",
    ]
    data = {
        "setting": asdict(setting) | {"seeds": len(seeds), "tolerances": TOLERANCES},
        "pace": pace,
        "results": [
            {
                "policy": r.policy,
                "metric": r.metric,
                "simulated": r.simulated.to_dict(),
                "live": r.live.to_dict(),
                "difference": r.difference.to_dict(),
                "passed": r.passed,
            }
            for r in results
        ],
    }
    report("live_equals_simulated", chosen, "\n".join(lines), data)
    # Three seeds show that it runs, no more.
    return 0 if chosen.quick or all(r.passed for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
