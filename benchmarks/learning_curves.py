"""Learning curves of every recipe, and its policies beside heuristics: ``python -m benchmarks.learning_curves``.

Every algorithm trains with several seeds, each for the number of environment steps that :data:`RUNS` has for it, so
that what comes out does not depend on how busy the machine is. Each run is a process of its own and leaves two files in
``OUT/runs``: its history and its policy. Runs whose history is there are not repeated, so the benchmark can be stopped
and started again, and the frameworks that do not fit into one virtual environment train one after the other::

    python -m benchmarks.learning_curves --out out/curves --train-only  # in each environment
    python -m benchmarks.learning_curves --out out/curves --evaluate-only

The policies act without RLlib and BenchMARL, which the evaluation therefore does not need. All meet the same flows as
the heuristics. ± is a 95 % interval: of an algorithm over its training seeds, each the mean over the flow seeds; of a
heuristic over the flow seeds. Two differ clearly when their intervals do not overlap.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import markdown, parser, report
from lbgym.errors import LbgymError, UnknownNameError
from lbgym.evaluation import Comparison, Contender, Interval, compare, mean_interval
from lbgym.evaluation.contenders import parse_contender
from lbgym.evaluation.runner import agents_of, decide, dispatch_of
from lbgym.scenarios import load_scenario
from lbgym.simulator import Simulation
from lbgym.snapshot import DEFAULT_STEP_INTERVAL
from lbgym.training.config import TrainingConfig
from lbgym.training.recipes import recipe_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lbgym.scenarios import Scenario

SINGLE, SEVERAL = "heterogeneous", "marllb-moderate"
EQUIVARIANT = {"network": "equivariant"}
#: Speeds and background loads relative to what is configured, for algorithms with continuous actions.
INDEX = {
    "action_type": "index",
    "dispatch": "marginal",
    "learning_rate": 1e-3,
    # The speeds are known here: much noise in them costs more than there is to gain.
    "env_kwargs": {"observe_configured": True, "observe_background": True, "min_weight": 0.8, "max_weight": 1.25},
}
#: The same for algorithms that choose: weights times the configured ones, under a rule that counts for the others.
RELATIVE = {
    "dispatch": "sed_scaled",
    "env_kwargs": {"relative_to_configured": True, "observe_configured": True, "action_weights": [1.0, 1.2]},
}


@dataclass(frozen=True)
class Training:
    """The settings of an algorithm here.

    Attributes:
        recipe: a name of :data:`lbgym.training.recipes.RECIPES`.
        scenario: what on.
        steps: the budget, environment steps of all replicas together; of several balancers one step is one of all.
        changes: fields of the recipe's configuration.
    """

    recipe: str
    scenario: str
    steps: int
    changes: Mapping[str, Any] = field(default_factory=dict)


#: The algorithms by name, each with what it trains on in a minute or two of one core.
RUNS = {
    "ppo": Training("ppo", SINGLE, 500_000),
    "sac-gru": Training("sac-gru", SINGLE, 80_000),
    "sb3-ppo": Training("sb3-ppo", SINGLE, 300_000, EQUIVARIANT),
    "sb3-ppo-mlp": Training("sb3-ppo", SINGLE, 400_000),
    "sb3-a2c": Training("sb3-a2c", SINGLE, 300_000, EQUIVARIANT),
    "sb3-dqn": Training("sb3-dqn", SINGLE, 100_000, EQUIVARIANT),
    "sb3-sac": Training("sb3-sac", SINGLE, 40_000, EQUIVARIANT),
    "sb3-td3": Training("sb3-td3", SINGLE, 100_000),
    "sb3-recurrent-ppo": Training("sb3-recurrent-ppo", SINGLE, 150_000),
    "rllib-ppo": Training("rllib-ppo", SINGLE, 200_000, EQUIVARIANT),
    "rllib-dqn": Training("rllib-dqn", SINGLE, 100_000, EQUIVARIANT),
    "rllib-sac": Training("rllib-sac", SINGLE, 40_000, EQUIVARIANT),
    "rllib-impala": Training("rllib-impala", SINGLE, 150_000, EQUIVARIANT),
    "rllib-appo": Training("rllib-appo", SINGLE, 150_000, EQUIVARIANT),
    "benchmarl-qmix": Training("benchmarl-qmix", SEVERAL, 600_000),
    "benchmarl-vdn": Training("benchmarl-vdn", SEVERAL, 600_000),
    "benchmarl-mappo": Training("benchmarl-mappo", SEVERAL, 300_000),
    "benchmarl-maddpg": Training("benchmarl-maddpg", SEVERAL, 150_000),
    "benchmarl-isac": Training("benchmarl-isac", SEVERAL, 300_000),
    "benchmarl-qmix-relative": Training("benchmarl-qmix", SEVERAL, 300_000, RELATIVE),
    "benchmarl-mappo-index": Training("benchmarl-mappo", SEVERAL, 300_000, INDEX),
    # With the recipe's own step size, temperature and discount its critics lead it astray in some seeds.
    "benchmarl-isac-index": Training(
        "benchmarl-isac",
        SEVERAL,
        100_000,
        INDEX | {"learning_rate": 5e-4, "gamma": 0.9, "options": {"alpha_init": 0.05}},
    ),
}
#: What a module of recipes needs beyond the package.
FRAMEWORKS = {"ppo": "torch", "sac_gru": "torch", "sb3": "stable_baselines3", "rllib": "ray", "benchmarl": "benchmarl"}

#: Who else meets the flows: the first is what every algorithm must be better than, the last knows the true speeds.
RANDOM, LSQ, SED, ORACLE = "sed+random", "lsq", "sed", "oracle_sed"
REFERENCES = (RANDOM, LSQ, SED, "sed+latency", ORACLE)
#: Flows that no training sees: its own seeds are drawn from all 32-bit numbers.
FLOW_SEEDS = 10_000

# Colours after Okabe and Ito, distinct for the colour-blind, one per framework.
_COLOURS = {"ppo": "#009e73", "sac_gru": "#009e73", "sb3": "#0072b2", "rllib": "#d55e00", "benchmarl": "#cc79a7"}
_TEXT, _QUIET = "#333333", "#cfcfcf"
COLUMNS = 4


# Training


@dataclass(frozen=True)
class Run:
    """One training, done or not."""

    name: str
    seed: int
    steps: int
    folder: Path

    @property
    def training(self) -> Training:
        return RUNS[self.name]

    @property
    def stem(self) -> str:
        return f"{self.name}-{self.seed}"

    @property
    def result(self) -> Path:
        """Its history; a run is done when this is there."""
        return self.folder / f"{self.stem}.json"

    @property
    def checkpoint(self) -> Path:
        """Its policy."""
        return self.folder / f"{self.stem}{recipe_of(self.training.recipe).suffix}"

    def read(self) -> dict[str, Any]:
        """What :func:`train_one` wrote.

        Raises:
            LbgymError: if it trained for another number of steps.
        """
        saved: dict[str, Any] = json.loads(self.result.read_text())
        if saved["budget"] != self.steps:
            raise LbgymError(
                f"{self.result} has a run of {saved['budget']:,} steps, but {self.name} is to train for "
                f"{self.steps:,}: use another folder for --out"
            )
        return saved


def train_one(run: Run, scratch: Path) -> None:
    """Train in this process and in the folder ``scratch``; what is whole then takes its place, the history last."""
    from lbgym.atomic import write_whole
    from lbgym.training.recipes import make_config, train

    training = run.training
    changes = {"scenario": training.scenario, "total_steps": run.steps, "seed": run.seed, **training.changes}
    # other runs have the other cores
    keys = {**training.changes.get("env_kwargs", {}), "num_threads": 1}
    changes |= {"env_kwargs": keys, "torch_threads": 1, "checkpoint_every": math.inf}
    config = make_config(training.recipe, changes)
    started = time.perf_counter()
    result = train(training.recipe, config, out=scratch / run.checkpoint.name)
    total = time.perf_counter() - started
    assert result.checkpoint is not None
    os.replace(result.checkpoint, run.checkpoint)
    # An update without a reward adds its steps to those of the next.
    reported = [p for p in result.history if math.isfinite(p.reward)]
    history = [(p.step, round(p.seconds, 3), float(f"{p.reward:.5g}")) for p in reported]
    saved = {
        "name": run.name,
        "recipe": training.recipe,
        "scenario": training.scenario,
        "changes": dict(training.changes),
        "seed": run.seed,
        "budget": run.steps,
        "reward": config.reward_type,
        "total_seconds": total,
        "history": history,
    }
    write_whole(run.result, lambda stream: stream.write(json.dumps(saved).encode()))


def train_all(runs: Sequence[Run], jobs: int) -> list[Run]:
    """Train those that are not done, some at a time; those that failed, of which it is said why."""
    missing = []
    for run in runs:
        if run.result.is_file():
            run.read()
        else:
            missing.append(run)
    say(f"{len(runs) - len(missing)} runs are done, {len(missing)} to go")
    if not missing:
        return []
    missing[0].folder.mkdir(parents=True, exist_ok=True)
    # compiles the simulator once, before every process would
    Simulation(load_scenario(SINGLE)).close()
    failed = []
    with ThreadPoolExecutor(jobs) as pool:
        futures: dict[Future[subprocess.CompletedProcess[str]], Run] = {
            pool.submit(in_process, run): run for run in missing
        }
        try:
            for count, future in enumerate(as_completed(futures), 1):
                run, done = futures[future], future.result()
                head = f"[{count}/{len(missing)}] {run.name}, seed {run.seed}"
                if done.returncode == 0:
                    say(f"{head}: {run.read()['total_seconds']:.0f} s")
                    continue
                failed.append(run)
                tail = (done.stdout + done.stderr).splitlines()[-12:] or ["(it said nothing)"]
                say("\n    ".join([f"{head} failed with exit code {done.returncode}; its last lines:", *tail]))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


def in_process(run: Run) -> subprocess.CompletedProcess[str]:
    """Train in a process of its own, with one thread."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    # frameworks leave buffers and states of their own beside the policy, of hundreds of megabytes
    with tempfile.TemporaryDirectory(dir=run.folder, prefix=".") as scratch:
        what = (run.name, str(run.seed), str(run.steps), scratch)
        return subprocess.run(
            [sys.executable, "-m", "benchmarks.learning_curves", "--out", str(run.folder.parent), "--run", *what],
            env=os.environ | threads,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
        )


def say(line: str) -> None:
    """News of a long run, away from the tables."""
    print(line, file=sys.stderr, flush=True)


# Evaluation


def evaluate(scenario: str, runs: Sequence[Run], flow_seeds: int, duration: float | None) -> Comparison:
    """The heuristics and the policies of all runs on the same flows."""
    contenders = [parse_contender(name) for name in REFERENCES]
    contenders += [Contender(run.stem, path=str(run.checkpoint.resolve())) for run in runs]
    seeds = range(FLOW_SEEDS, FLOW_SEEDS + flow_seeds)
    say(f"{len(contenders)} contenders on {scenario}, {flow_seeds} flow seeds")
    return compare(scenario, contenders, seeds, duration=duration, baseline=RANDOM)


METRICS = ("fct_mean", "fct_p99")


@dataclass(frozen=True)
class Standing:
    """An algorithm or heuristic among the others: an interval of each metric."""

    name: str
    intervals: dict[str, Interval]
    steps: int | None = None
    minutes: float | None = None

    def below(self, other: Standing, metric: str) -> bool:
        """Return whether it has less of a metric, with disjoint intervals."""
        return self.intervals[metric].high < other.intervals[metric].low

    def apart(self, other: Standing, metric: str) -> bool:
        return self.below(other, metric) or other.below(self, metric)


def standings(comparison: Comparison, runs: Sequence[Run]) -> dict[str, Standing]:
    """The heuristics, then the algorithms."""
    found = {
        name: Standing(name, {metric: comparison.interval(name, metric) for metric in METRICS}) for name in REFERENCES
    }
    for name in dict.fromkeys(run.name for run in runs):
        own = [run for run in runs if run.name == name]
        # every training seed is one value: the mean over the same flows
        values = {m: [float(comparison.values(run.stem, m).mean()) for run in own] for m in METRICS}
        last = [run.read() for run in own]
        found[name] = Standing(
            name,
            {metric: mean_interval(each) for metric, each in values.items()},
            max(saved["history"][-1][0] for saved in last),
            float(np.mean([saved["history"][-1][1] for saved in last])) / 60,
        )
    return found


def table(found: Mapping[str, Standing]) -> str:
    """Best p99 first."""
    rows = []
    for one in sorted(found.values(), key=lambda s: s.intervals["fct_p99"].mean):
        trained = one.name not in REFERENCES
        cells: list[Any] = [one.name if trained else f"*{one.name}*", one.steps, one.minutes and f"{one.minutes:.1f}"]
        for metric in METRICS:
            interval = one.intervals[metric]
            cells.append(milliseconds(interval))
            cells.append(f"{100 * interval.mean / found[RANDOM].intervals[metric].mean:.1f}")
        apart = all(one.apart(found[RANDOM], metric) for metric in METRICS)
        cells.append("" if not trained else "yes" if apart else "no")
        cells += [beaten(one, found, metric) if trained else "" for metric in METRICS]
        rows.append(cells)
    header = ["", "steps", "minutes", "mean, ms", "of random's, %", "p99, ms", "of random's, %"]
    return markdown(rows, [*header, "apart from random", "lower mean than", "lower p99 than"])


def beaten(one: Standing, found: Mapping[str, Standing], metric: str) -> str:
    """The heuristics that an algorithm has less than, with intervals apart."""
    return ", ".join(name for name in REFERENCES[1:] if one.below(found[name], metric))


def paired_with_sed(comparison: Comparison, runs: Sequence[Run]) -> str:
    """Mean FCTs against SED's on the same flows, which tell more than two intervals that overlap."""
    sed = comparison.values(SED, "fct_mean")
    parts = []
    for name in dict.fromkeys(run.name for run in runs):
        own = [comparison.values(run.stem, "fct_mean") for run in runs if run.name == name]
        over = mean_interval([100.0 * (float((values / sed).mean()) - 1.0) for values in own])
        half = "" if math.isnan(over.half_width) else f" ±{over.half_width:.2f}"
        parts.append(f"{name} {over.mean:+.2f}{half}")
    return f"Mean FCT over SED's on the same flows, %, over the training seeds: {'; '.join(parts)}."


def milliseconds(interval: Interval) -> str:
    decimals = 0 if interval.mean >= 1 else 1
    if math.isnan(interval.half_width):
        return f"{1e3 * interval.mean:,.{decimals}f}"
    return f"{1e3 * interval.mean:,.{decimals}f} ±{1e3 * interval.half_width:,.{decimals}f}"


def verdict(found: Mapping[str, Standing]) -> str:
    """Name the winners."""
    trained = [one for one in found.values() if one.name not in REFERENCES]
    parts = []
    for metric, title in (("fct_mean", "mean"), ("fct_p99", "p99")):
        best = min(trained, key=lambda s: s.intervals[metric].mean)
        against = [name for name in (LSQ, SED, ORACLE) if best.below(found[name], metric)]
        level = [one.name for one in trained if one is not best and not best.below(one, metric)]
        part = (
            f"Lowest {title}: {best.name}, below {', '.join(against) if against else 'none of lsq, sed and oracle_sed'}"
        )
        parts.append(part + (f"; no clear difference from: {', '.join(level)}." if level else "."))
    worse = [one.name for one in trained if not all(one.apart(found[RANDOM], metric) for metric in METRICS)]
    parts.append(
        f"No clear difference from random weights: {', '.join(worse)}." if worse else "All differ from random."
    )
    return " ".join(parts)


# Curves


def smoothed(run: Run, steps: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean reward per step about each of ``steps``: over the training from 1/1.2 to 1.2 times as many."""
    history = np.array(run.read()["history"])
    at = np.concatenate([[0.0], history[:, 0]])
    # An update's reward is the mean over the steps since the last: its running sum gives any window's mean.
    total = np.concatenate([[0.0], np.cumsum(history[:, 2] * np.diff(at))])
    low, high = steps / 1.2, np.minimum(steps * 1.2, at[-1])
    return (np.interp(high, at, total) - np.interp(low, at, total)) / (high - low)


def reference_reward(scenario: Scenario, name: str, seeds: int = 10) -> float:
    """Reward per step of a heuristic in episodes such as those of the training."""
    steps = TrainingConfig().max_steps
    rewards = []
    for seed in range(seeds):
        contender = parse_contender(name)
        agents = agents_of(contender, scenario, seed)
        dispatch = dispatch_of(contender, scenario, agents)
        simulation = Simulation(scenario, 1, dispatch=dispatch, service=False)
        weights = np.ones((1, scenario.balancers, scenario.num_servers))
        snapshot = simulation.reset([seed])
        for _ in range(steps):
            weights = decide(agents, snapshot, weights)
            snapshot = simulation.step(weights, DEFAULT_STEP_INTERVAL)
        totals = simulation.integrals()
        rewards.append(-float(totals["queue"].sum() / totals["clock"][0]))
        simulation.close()
    return float(np.mean(rewards))


def plot(scenario: str, runs: Sequence[Run], axis: str, file: Path) -> None:
    """One panel per algorithm: its mean over the seeds with the 95 % interval, the others in grey, the heuristics."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    names = list(dict.fromkeys(run.name for run in runs))
    loaded = load_scenario(scenario)
    heuristics = {name: reference_reward(loaded, name) for name in (RANDOM, SED, ORACLE)}
    curves = {name: curve([run for run in runs if run.name == name], axis) for name in names}
    columns = min(COLUMNS, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(2.9 * columns + 0.6, 2.3 * rows + 0.9), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes, name in zip(grid.flat, names, strict=False):
        for other in names:
            axes.plot(curves[other].at, curves[other].mean, color=_QUIET, linewidth=0.8, zorder=1)
        for label, reward in heuristics.items():
            axes.axhline(reward, color="black", linewidth=0.9, linestyle=_HEURISTIC_LINES[label], zorder=2)
        colour = _COLOURS[recipe_of(RUNS[name].recipe).module]
        own = curves[name]
        axes.fill_between(own.at, own.low, own.high, color=colour, alpha=0.25, linewidth=0, zorder=3)
        axes.plot(own.at, own.mean, color=colour, linewidth=1.8, zorder=4)
        axes.set_title(name, loc="left", fontsize=10, color=_TEXT)
        dress(axes, axis)
    for axes in list(grid.flat)[len(names) :]:
        axes.remove()
    for column in range(columns):
        lowest = (len(names) - 1 - column) // columns
        grid[lowest, column].xaxis.set_tick_params(labelbottom=True)
    worst = min(float(curves[name].mean.min()) for name in names)
    best = max(float(curves[name].mean.max()) for name in names)
    limits = 1.15 * min(worst, *heuristics.values()), 0.87 * max(best, *heuristics.values())
    # the worst have hundreds of times the open flows of the best
    grid[0, 0].set_yscale("symlog", linthresh=min(1.0, -limits[1]))
    grid[0, 0].set_ylim(*limits)
    ticks = [-x * 10.0**power for power in range(-1, 6) for x in (1, 2, 5) if limits[0] < -x * 10.0**power < limits[1]]
    grid[0, 0].set_yticks(ticks, labels=[f"−{-tick:g}" for tick in ticks])
    grid[0, 0].yaxis.set_minor_locator(NullLocator())
    figure.supxlabel("environment steps" if axis == "steps" else "seconds of training", fontsize=10, color=_TEXT)
    figure.supylabel("reward per step (−open flows)", fontsize=10, color=_TEXT)
    seeds = len({run.seed for run in runs})
    figure.suptitle(
        f"{scenario}: mean of {seeds} training seed{'s' * (seeds > 1)} with its 95 % interval",
        x=0.01,
        ha="left",
        fontsize=11,
        color=_TEXT,
    )
    lines = grid[0, 0].lines[len(names) : len(names) + len(heuristics)]
    figure.legend(lines, list(heuristics), loc="outside upper right", ncols=3, frameon=False, fontsize=9)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)


_HEURISTIC_LINES: dict[str, Any] = {RANDOM: (0, (1, 1.5)), SED: (0, (5, 2)), ORACLE: "-"}


@dataclass(frozen=True)
class Curve:
    """Mean over the seeds and its interval, along steps or seconds."""

    at: NDArray[np.float64]
    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


def curve(runs: Sequence[Run], axis: str) -> Curve:
    """The curve of one algorithm."""
    histories = [np.array(run.read()["history"]) for run in runs]
    last = min(history[-1, 0] for history in histories)
    # nothing is learnt before
    first = max(last / 100, *(history[0, 0] for history in histories))
    steps = np.geomspace(first, last, 80)
    rewards = [smoothed(run, steps) for run in runs]
    intervals = [mean_interval(column) for column in np.transpose(rewards)]
    mean = np.array([interval.mean for interval in intervals])
    # one seed has no interval
    half = np.nan_to_num([interval.half_width for interval in intervals])
    at = steps
    if axis == "seconds":
        at = np.mean([np.interp(steps, history[:, 0], history[:, 1]) for history in histories], axis=0)
    return Curve(at, mean, mean - half, mean + half)


def dress(axes: Axes, axis: str) -> None:
    axes.set_xscale("log")
    axes.grid(True, which="major", color="#ececec", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.tick_params(which="both", colors=_TEXT, labelsize=8)
    axes.xaxis.set_major_formatter(_short if axis == "steps" else lambda x, _: f"{x:g}")


def _short(x: float, _: Any = None) -> str:
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if x >= size:
            return f"{x / size:g}{unit}"
    return f"{x:g}"


# The command


def budget_of(name: str, scale: float) -> int:
    return max(1, round(RUNS[name].steps * scale))


def trainable(name: str) -> bool:
    return find_spec(FRAMEWORKS[recipe_of(RUNS[name].recipe).module]) is not None


def names_in(text: str) -> list[str]:
    """Algorithms separated by commas.

    Raises:
        UnknownNameError: for an unknown one.
    """
    chosen = [part.strip() for part in text.split(",") if part.strip()]
    for name in chosen:
        if name not in RUNS:
            raise UnknownNameError("algorithm", name, RUNS)
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--algos", default=None, help="names separated by commas; default: all that can be trained")
    options.add_argument("--seeds", type=int, default=5, help="trainings of each algorithm")
    options.add_argument("--jobs", type=int, default=2, help="trainings at the same time, one thread each")
    options.add_argument("--steps-scale", type=float, default=1.0, help="times the budget of every algorithm")
    options.add_argument("--flow-seeds", type=int, default=10, help="runs of every policy in the evaluation")
    options.add_argument("--axis", choices=("steps", "seconds"), default="steps", help="what the curves are over")
    only = options.add_mutually_exclusive_group()
    only.add_argument("--train-only", action="store_true", help="no evaluation")
    only.add_argument("--evaluate-only", action="store_true", help="no training: what is in the folder")
    only.add_argument("--run", nargs=4, default=None, help=argparse.SUPPRESS)
    arguments = options.parse_args(argv)
    try:
        if arguments.out is None and arguments.quick:
            with tempfile.TemporaryDirectory() as folder:
                return run_all(arguments, Path(folder))
        return run_all(arguments, arguments.out or Path("out/learning-curves"))
    except LbgymError as error:
        say(str(error))
        return 2


def run_all(arguments: argparse.Namespace, out: Path) -> int:
    """What the options ask for, in a folder; the exit code."""
    folder = out / "runs"
    if arguments.run is not None:
        name, seed, steps, scratch = arguments.run
        train_one(Run(name, int(seed), int(steps), folder), Path(scratch))
        return 0
    seeds, scale, flow_seeds, duration = arguments.seeds, arguments.steps_scale, arguments.flow_seeds, None
    algos = list(RUNS) if arguments.algos is None else names_in(arguments.algos)
    if arguments.quick:
        seeds, scale, flow_seeds, duration = 2, 0.005, 2, 5.0
        algos = ["ppo", "sac-gru"] if arguments.algos is None else algos
    runs = [Run(name, seed, budget_of(name, scale), folder) for name in algos for seed in range(1, seeds + 1)]
    failed: list[Run] = []
    if not arguments.evaluate_only:
        absent = [name for name in algos if not trainable(name)]
        if absent and arguments.algos is not None:
            raise LbgymError(f"cannot train {', '.join(absent)} here: the framework is not installed")
        if absent:
            say(f"left out, since the framework is not installed: {', '.join(absent)}")
        failed = train_all([run for run in runs if run.name not in absent], arguments.jobs)
    if arguments.train_only:
        return 1 if failed else 0
    done = [run for run in runs if run.result.is_file()]
    if not done:
        raise LbgymError(f"there is no finished run in {folder}: train first")
    text, results = [], {}
    for scenario in dict.fromkeys(run.training.scenario for run in done):
        own = [run for run in done if run.training.scenario == scenario]
        comparison = evaluate(scenario, own, flow_seeds, duration)
        found = standings(comparison, own)
        trained = max(len([run for run in own if run.name == name]) for name in {run.name for run in own})
        picture = out / f"learning_curves_{scenario}.png"
        plot(scenario, own, arguments.axis, picture)
        text += [
            f"## {scenario}",
            f"{trained} training seed{'s' * (trained > 1)}, {flow_seeds} flow seeds; heuristics in italics.",
            table(found),
            verdict(found),
            paired_with_sed(comparison, own),
            f"![Learning curves on {scenario}]({picture.name})",
        ]
        results[scenario] = {
            name: {
                "steps": one.steps,
                "minutes": one.minutes,
                **{metric: interval.to_dict() for metric, interval in one.intervals.items()},
            }
            for name, one in found.items()
        }
    arguments.out = out
    report("learning_curves", arguments, "\n\n".join(text), {"standings": results})
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
