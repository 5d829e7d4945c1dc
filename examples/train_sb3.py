"""Train an algorithm of Stable-Baselines3 on the heterogeneous cluster, then compare it with heuristics.

python examples/train_sb3.py [--algo ppo] [--network equivariant] [--seconds 60] [--seeds 10]
"""

from __future__ import annotations

import argparse

from rich import print

from lbgym.evaluation import compare
from lbgym.training import Progress, SB3Config, train_sb3
from lbgym.training.sb3 import ALGORITHMS


def report(progress: Progress) -> None:
    print(
        f"{progress.fraction:4.0%}  {progress.step:>9,} steps  {progress.steps_per_second:6,.0f} steps/s  "
        f"reward {progress.reward:.3f}",
        end="\r",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--algo", choices=sorted(ALGORITHMS), default="ppo", help="the algorithm")
    parser.add_argument("--network", choices=("mlp", "equivariant"), default="mlp", help="the network")
    parser.add_argument("--seconds", type=float, default=60.0, help="training time")
    parser.add_argument("--seeds", type=int, default=10, help="runs of the comparison")
    args = parser.parse_args()

    config = SB3Config(
        algorithm=args.algo, network=args.network, scenario="heterogeneous", total_steps=None, seconds=args.seconds
    )
    result = train_sb3(config, out=f"out/example/sb3-{args.algo}.zip", callback=report)
    print(f"\ncheckpoint: {result.checkpoint}")

    comparison = compare("heterogeneous", f"lsq,sed,{result.checkpoint}", seeds=args.seeds)
    print(comparison.table())
    print(comparison.versus_table(f"sb3-{args.algo}"))


if __name__ == "__main__":
    main()
