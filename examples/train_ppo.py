"""Train PPO on the heterogeneous cluster for a minute, then compare it with heuristics on the same flows.

python examples/train_ppo.py [--seconds 60] [--seeds 10]
"""

from __future__ import annotations

import argparse

from rich import print

from lbgym.evaluation import compare
from lbgym.training import PPOConfig, Progress, train_ppo


def report(progress: Progress) -> None:
    print(
        f"{progress.fraction:4.0%}  {progress.step:>9,} steps  {progress.steps_per_second:6,.0f} steps/s  "
        f"mean FCT {progress.fct_mean:.3f} s",
        end="\r",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="training time")
    parser.add_argument("--seeds", type=int, default=10, help="runs of the comparison")
    args = parser.parse_args()

    config = PPOConfig(scenario="heterogeneous", total_steps=None, seconds=args.seconds)
    result = train_ppo(config, out="out/example/ppo.pt", callback=report)
    print(f"\ncheckpoint: {result.checkpoint}")

    comparison = compare("heterogeneous", f"lsq,ecmp,wcmp-uniform,sed,{result.checkpoint}", seeds=args.seeds)
    print(comparison.table())
    print(comparison.versus_table("ppo"))


if __name__ == "__main__":
    main()
