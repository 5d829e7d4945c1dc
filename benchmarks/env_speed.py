"""Steps per second of the environments, how they scale, and their memory: ``python -m benchmarks.env_speed``.

A step here is a whole ``step``: the action decoded, the flows simulated, the observation, the reward and the info made.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import gymnasium

import lbgym
from benchmarks.common import markdown, parser, report
from lbgym.scenarios import Exponential, Scenario, Server, Workload

INTERVAL = 0.25
BLUE, ORANGE, GREEN, GREY = "#1f5fa8", "#d1680e", "#2c8a4b", "#6b6b6b"


def cluster(servers: int, flows: float) -> Scenario:
    """Servers of one core at load 0.8 and ``flows`` flows a step in the mean."""
    rate = flows / INTERVAL
    workload = Workload(rate=rate, demand=Exponential(mean=0.8 * servers / rate))
    return Scenario(name=f"{servers} servers, {flows:g} flows a step", servers=(Server(),) * servers, workload=workload)


def keys(servers: int, flows: float) -> dict[str, Any]:
    return {"scenario": cluster(servers, flows), "step_interval": INTERVAL, "max_steps": 10**9}


def seconds_per_call(call: Callable[[int], Any], calls: int, rounds: int) -> list[float]:
    """Mean seconds of a call, once per round."""
    for i in range(calls // 10 + 1):
        call(i)
    out = []
    for _ in range(rounds):
        started = time.perf_counter()
        for i in range(calls):
            call(i)
        out.append((time.perf_counter() - started) / calls)
    return out


def single(servers: int, flows: float, steps: int, rounds: int) -> list[float]:
    """Seconds per step of one environment."""
    env = lbgym.LoadBalanceEnv(**keys(servers, flows))
    env.action_space.seed(1)
    actions = [env.action_space.sample() for _ in range(64)]
    env.reset(seed=1)
    times = seconds_per_call(lambda i: env.step(actions[i % 64]), steps, rounds)
    env.close()
    return times


def vector(
    replicas: int, servers: int, flows: float, steps: int, rounds: int, *, threads: int = 1, native: bool = True
) -> list[float]:
    """Steps per second over all replicas, once per round."""
    if native:
        env: Any = lbgym.LoadBalanceVectorEnv(replicas, num_threads=threads, **keys(servers, flows))
    else:
        env = gymnasium.vector.SyncVectorEnv(
            [lambda: lbgym.LoadBalanceEnv(**keys(servers, flows)) for _ in range(replicas)]
        )
    env.action_space.seed(1)
    actions = [env.action_space.sample() for _ in range(16)]
    env.reset(seed=1)
    times = seconds_per_call(lambda i: env.step(actions[i % 16]), steps, rounds)
    env.close()
    return [replicas / each for each in times]


def resident_mb() -> float:
    """Resident memory of this process; 0 without /proc."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def memory(steps: int) -> tuple[list[int], list[float]]:
    """Resident memory, MB, over ``steps`` steps of one environment with an episode every 10,000."""
    env = lbgym.LoadBalanceEnv(num_servers=4, step_interval=0.05)
    env.action_space.seed(1)
    env.reset(seed=1)
    every = max(steps // 200, 1)
    at, used = [], []
    for i in range(steps):
        *_, truncated, _ = env.step(env.action_space.sample())
        if truncated:
            env.reset()
        if i % every == 0:
            at.append(i)
            used.append(resident_mb())
    env.close()
    return at, used


def scaling(steps: int, rounds: int, quick: bool) -> dict[str, list[dict[str, float]]]:
    """Steps per second over replicas, servers and flows, each with the rest at 256 replicas, N=8, 25 flows."""
    curves: dict[str, list[dict[str, float]]] = {"replicas": [], "sync": [], "servers": [], "flows": []}

    def add(curve: str, x: float, replicas: int, servers: int, flows: float, native: bool = True) -> None:
        point = {"x": x}
        for threads in (1, 2) if native else (1,):
            calls = max(int(steps / replicas * 8 / servers * 25 / max(flows, 10)), 5)
            if not native:
                calls = max(calls // 4, 3)
            speeds = vector(replicas, servers, flows, calls, rounds, threads=threads, native=native)
            point[f"{threads} thread" + "s" * (threads > 1)] = median(speeds)
        curves[curve].append(point)

    for replicas in (1, 16, 256) if quick else (1, 4, 16, 64, 256, 1024):
        add("replicas", replicas, replicas, 8, 25)
    for replicas in (1, 16) if quick else (1, 4, 16, 64, 256):
        add("sync", replicas, replicas, 8, 25, native=False)
    for servers in (2, 32) if quick else (2, 4, 8, 16, 32, 64, 128, 256):
        add("servers", servers, 256, servers, 25)
    for flows in (5, 100) if quick else (5, 10, 25, 50, 100, 200, 400):
        add("flows", flows, 256, 8, flows)
    return curves


def plot_scaling(curves: dict[str, list[dict[str, float]]], file: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    figure = Figure(figsize=(11.0, 3.8), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    panels = (
        ("replicas", "replicas (N = 8, 25 flows a step)"),
        ("servers", "servers N (256 replicas, 25 flows a step)"),
        ("flows", "flows a step (256 replicas, N = 8)"),
    )
    for axis, (name, label) in zip(axes, panels, strict=True):
        x = [point["x"] for point in curves[name]]
        for series, colour, marker in (("2 threads", BLUE, "o"), ("1 thread", ORANGE, "s")):
            axis.plot(x, [p[series] for p in curves[name]], marker + "-", color=colour, ms=5, label=f"native, {series}")
        if name == "replicas":
            sync = curves["sync"]
            axis.plot(
                [p["x"] for p in sync], [p["1 thread"] for p in sync], "^--", color=GREY, ms=5, label="SyncVectorEnv"
            )
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(x)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
        axis.set_xlabel(label)
        axis.grid(True, which="major", color="0.9", lw=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("steps per second, all replicas")
    axes[0].legend(frameon=False, fontsize=9)
    figure.suptitle("LoadBalanceVectorEnv: whole steps per second", fontsize=11)
    figure.savefig(file, dpi=150)


def plot_memory(at: list[int], used: list[float], file: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(6.5, 3.2), layout="constrained")
    axis = figure.subplots()
    axis.plot(at, used, color=BLUE, lw=1.8)
    axis.set_ylim(0, 1.25 * max(used))
    axis.set_xlim(0, at[-1])
    axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
    axis.set_xlabel("steps of one environment")
    axis.set_ylabel("resident memory, MB")
    axis.grid(True, color="0.9", lw=0.8)
    axis.spines[["top", "right"]].set_visible(False)
    half = len(used) // 2
    axis.set_title(f"second half: {used[half]:.1f} MB to {used[-1]:.1f} MB", fontsize=10)
    figure.savefig(file, dpi=150)


def main(argv: Sequence[str] | None = None) -> int:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--memory-steps", type=int, default=1_000_000)
    arguments = options.parse_args(argv)
    quick = arguments.quick
    rounds = 3 if quick else arguments.rounds
    small = single(4, 25, 500 if quick else 4000, rounds)
    large = single(64, 400, 100 if quick else 800, rounds)
    many = vector(256, 8, 25, 10 if quick else 60, rounds, threads=2)
    sync = vector(64, 8, 25, 3 if quick else 30, rounds, native=False)
    at, used = memory(20_000 if quick else arguments.memory_steps)
    growth = used[-1] - used[len(used) // 2]

    step = "env.step, microseconds"
    speed = "steps/s"
    rows = [
        (f"{step}: N=4, 25 flows", 1e6 * median(small), 1e6 * min(small), "below 50", median(small) < 5e-5),
        (f"{step}: N=64, 400 flows", 1e6 * median(large), 1e6 * min(large), "below 400", median(large) < 4e-4),
        (f"{speed}: 256 replicas, N=8, 25 flows, 2 threads", median(many), max(many), "120,000", median(many) >= 1.2e5),
        (f"{speed}: SyncVectorEnv of 64, N=8, 25 flows", median(sync), max(sync), "", ""),
        (f"memory, MB more after the second {at[-1] // 2:,} steps", growth, growth, "below 1", growth < 1.0),
    ]
    curves = scaling(20_000 if quick else 60_000, 1 if quick else 3, quick)
    text = markdown(rows, ("measure", "median", "best", "target", "reached"))
    text += "\n\n" + markdown(
        [
            (name, *(point.get(key) for key in ("x", "1 thread", "2 threads")))
            for name, curve in curves.items()
            for point in curve
        ],
        ("steps/s over", "x", "1 thread", "2 threads"),
    )
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        plot_scaling(curves, arguments.out / "env_speed_scaling.png")
        plot_memory(at, used, arguments.out / "env_speed_memory.png")
    data = {
        "seconds_per_step": {"N=4, 25 flows": small, "N=64, 400 flows": large},
        "steps_per_second": {"vector 256": many, "SyncVectorEnv 64": sync},
        "memory": {"steps": at, "resident_mb": used},
        "scaling": curves,
    }
    report("env_speed", arguments, text, data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
