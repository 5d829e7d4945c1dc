"""How fast the default trainer steps, and how soon its policy beats LSQ: ``python -m benchmarks.trainer_speed``.

* Speed: steps per second of ``train_ppo(PPOConfig())`` on ``heterogeneous``, simulation and learning together, beside
  Stable-Baselines3's PPO (recipe "sb3-ppo") with dense layers and with the same kind of network, and beside the
  environment on its own, whose speed no trainer can reach. The rounds alternate between them, so that a change of the
  machine's speed meets everybody. What comes first in a run does not count.
* Time to beat LSQ: for each training seed the policy is kept every few seconds of a training of a minute. Afterwards
  each of these meets LSQ on the same flows, none of which it was trained on. What counts is the first training time
  from which on p99 of the FCT, as a mean over the flow seeds, is below LSQ's in this and all later policies.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import markdown, parser, report
from benchmarks.env_speed import seconds_per_call
from lbgym.evaluation import Contender, compare
from lbgym.training import PPOConfig, Progress, read_checkpoint, train_ppo
from lbgym.training.recipes import make_config, train

SCENARIO = "heterogeneous"
#: Steps per second of the default trainer on two cores, and seconds of training after which it beats LSQ.
SPEED, SECONDS = 30_000, 60.0
#: What is timed: a label, a recipe and fields of its configuration.
TRAINERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ppo": ("ppo", {}),
    "sb3-ppo, dense layers": ("sb3-ppo", {}),
    "sb3-ppo, equivariant": ("sb3-ppo", {"network": "equivariant"}),
}
ALONE = "environment alone, random actions"
#: Flows that no training sees: its own seeds are drawn from all 32-bit numbers.
FLOW_SEEDS = 10_000


def speeds(trainer: str, seconds: float, warmup: float) -> list[float]:
    """Steps per second of every update that ends after the warm-up, in a training of at least so many seconds."""
    algo, changes = TRAINERS[trainer]
    history: list[Progress] = []

    def enough(progress: Progress) -> bool:
        history.append(progress)
        return progress.seconds >= seconds and len(history) >= 3

    train(algo, make_config(algo, {"scenario": SCENARIO, "total_steps": 10**9, **changes}), callback=enough)
    # Stable-Baselines3 reports its first rollout before it has learnt anything.
    return [p.steps_per_second for p in history[1:] if p.seconds > warmup]


def environment_speed(calls: int) -> list[float]:
    """Steps per second of the environment that PPO trains in, with random actions, once per round."""
    config = PPOConfig(scenario=SCENARIO, max_steps=10**9)
    env = config.make_env()
    env.action_space.seed(1)
    actions = [env.action_space.sample() for _ in range(16)]
    env.reset(seed=1)
    times = seconds_per_call(lambda i: env.step(actions[i % 16]), calls, rounds=3)
    env.close()
    return [config.num_envs / each for each in times]


@dataclass(frozen=True)
class Snapshot:
    """A policy in the middle of its training."""

    seed: int
    seconds: float
    step: int
    path: Path

    @property
    def label(self) -> str:
        return f"{self.seed}/{self.seconds:.1f} s"


def snapshots(seed: int, seconds: float, every: float, folder: Path) -> list[Snapshot]:
    """Train with a seed for so many seconds; the policies along the way and the last one."""
    current = folder / f"{seed}.pt"
    kept: list[Path] = []
    last = -1

    def keep(progress: Progress) -> None:
        # The trainer has just written its checkpoint if it is another file now: a second name keeps it for nothing.
        nonlocal last
        if current.is_file() and current.stat().st_ino != last:
            last = current.stat().st_ino
            kept.append(folder / f"{seed}-{len(kept)}.pt")
            os.link(current, kept[-1])

    config = PPOConfig(scenario=SCENARIO, seed=seed, total_steps=None, seconds=seconds, checkpoint_every=every)
    train_ppo(config, out=current, callback=keep)
    states = [(read_checkpoint(path), path) for path in [*kept, current]]
    return [Snapshot(seed, state["seconds"], state["step"], path) for state, path in states]


def first_for_good(times: Sequence[float], below: Sequence[bool]) -> float:
    """The first time from which on all are below; infinity if the last is not."""
    first = math.inf
    for time, good in zip(reversed(times), reversed(below), strict=True):
        if not good:
            break
        first = time
    return first


def time_to_beat(
    seeds: int, seconds: float, every: float, flow_seeds: int, duration: float | None
) -> tuple[list[tuple[Any, ...]], list[dict[str, Any]], dict[str, Any]]:
    """A row per training seed, every snapshot's p99, and LSQ's own."""
    rows, data = [], []
    with tempfile.TemporaryDirectory() as folder:
        runs = {seed: snapshots(seed, seconds, every, Path(folder)) for seed in range(1, seeds + 1)}
        contenders = [Contender("lsq", "lsq", "cores")]
        contenders += [Contender(s.label, path=str(s.path)) for run in runs.values() for s in run]
        comparison = compare(
            SCENARIO,
            contenders,
            range(FLOW_SEEDS, FLOW_SEEDS + flow_seeds),
            duration=duration,
            baseline="lsq",
            # not worth a process of its own, which would take longer to start
            processes=1 if len(contenders) * flow_seeds < 20 else None,
        )
    lsq = comparison.interval("lsq", "fct_p99")
    for seed, run in runs.items():
        times = [s.seconds for s in run]
        p99 = [comparison.interval(s.label, "fct_p99").mean for s in run]
        paired = [comparison.difference(s.label, "fct_p99").absolute for s in run]
        below = first_for_good(times, [d.mean < 0 for d in paired])
        surely = first_for_good(times, [d.high < 0 for d in paired])
        last = comparison.difference(run[-1].label, "fct_p99").relative
        rows.append((str(seed), below, surely, run[-1].step, 1e3 * p99[-1], f"{last.mean:+.1f} ±{last.half_width:.1f}"))
        data.append({"seed": seed, "seconds": times, "steps": [s.step for s in run], "p99": p99, "below_from": below})
    return rows, data, lsq.to_dict()


def main(argv: Sequence[str] | None = None) -> int:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--rounds", type=int, default=3, help="trainings of each trainer that are timed")
    options.add_argument("--seconds", type=float, default=20.0, help="seconds of each of them")
    options.add_argument("--seeds", type=int, default=5, help="trainings whose policies meet LSQ")
    options.add_argument("--flow-seeds", type=int, default=10, help="runs of each such meeting")
    arguments = options.parse_args(argv)
    quick = arguments.quick
    rounds, seconds, warmup = (1, 1.5, 0.5) if quick else (arguments.rounds, arguments.seconds, 3.0)
    seeds, training, every = (1, 3.0, 1.0) if quick else (arguments.seeds, SECONDS, 5.0)
    flow_seeds, duration = (2, 10.0) if quick else (arguments.flow_seeds, None)

    # Loads torch, Stable-Baselines3 and the compiled simulator, which is no part of any trainer's time.
    for trainer in TRAINERS:
        speeds(trainer, 0.0, 0.0)
    measured: dict[str, list[list[float]]] = {trainer: [] for trainer in [*TRAINERS, ALONE]}
    for _ in range(rounds):
        for trainer in TRAINERS:
            measured[trainer].append(speeds(trainer, seconds, warmup))
        measured[ALONE].append(environment_speed(16 if quick else 256))

    def ratio(trainer: str) -> float:
        pairs = zip(measured["ppo"], measured[trainer], strict=True)
        return median(median(ours) / median(theirs) for ours, theirs in pairs)

    overall = {trainer: median(speed for run in runs for speed in run) for trainer, runs in measured.items()}
    text = markdown(
        [(name, speed, max(median(run) for run in measured[name]), ratio(name)) for name, speed in overall.items()],
        ("trainer, learning included", "steps/s, median", "best round", "ppo over it"),
    )
    rows, data, lsq = time_to_beat(seeds, training, every, flow_seeds, duration)
    text += (
        f"\n\nPPO for {training:g} s on {SCENARIO}, a policy kept every {every:g} s, {flow_seeds} flow seeds; "
        f"p99 of LSQ {1e3 * lsq['mean']:,.0f} ms\n\n"
    )
    header = (
        "training seed",
        "below LSQ from, s",
        "interval below, s",
        "steps",
        "p99 at the end, ms",
        "against LSQ, %",
    )
    text += markdown([[never(value) for value in row] for row in rows], header)
    times = [row[1] for row in rows]
    text += "\n\n" + markdown(
        [
            ("steps/s of ppo, at least", SPEED, overall["ppo"], overall["ppo"] >= SPEED),
            ("seconds to beat LSQ, median over seeds, below", SECONDS, never(median(times)), median(times) < SECONDS),
        ],
        ("target", "target", "measured", "reached"),
    )
    results = {"steps_per_second": measured, "lsq_p99": lsq, "snapshots": data, "seconds_to_beat_lsq": median(times)}
    report("trainer_speed", arguments, text, results)
    return 0 if overall["ppo"] >= SPEED and median(times) < SECONDS else 1


def never(value: Any) -> Any:
    """What a table shows of a time that did not come."""
    return "never" if isinstance(value, float) and math.isinf(value) else value


if __name__ == "__main__":
    sys.exit(main())
