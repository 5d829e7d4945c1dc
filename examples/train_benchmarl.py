"""Train QMIX with BenchMARL on the moderate MARLLB testbed, then compare it with heuristics and random weights.

python examples/train_benchmarl.py [--algorithm qmix] [--seconds 90] [--seeds 10]
"""

from __future__ import annotations

import argparse

from rich import print

from lbgym.evaluation import compare
from lbgym.training import Progress
from lbgym.training.benchmarl import ALGORITHMS, BenchMARLConfig, train_benchmarl


def report(progress: Progress) -> None:
    print(
        f"{progress.fraction:4.0%}  {progress.step:>9,} steps  {progress.steps_per_second:6,.0f} steps/s  "
        f"mean reward {progress.reward:7.2f}",
        end="\r",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--algorithm", choices=sorted(ALGORITHMS), default="qmix", help="algorithm of BenchMARL")
    parser.add_argument("--seconds", type=float, default=90.0, help="training time")
    parser.add_argument("--seeds", type=int, default=10, help="runs of the comparison")
    args = parser.parse_args()

    config = BenchMARLConfig(algorithm=args.algorithm, total_steps=None, seconds=args.seconds)
    result = train_benchmarl(config, out="out/example", callback=report)
    print(f"\ncheckpoint: {result.checkpoint}")

    # both balancers run a copy of the policy, each on what it sees itself
    comparison = compare("marllb-moderate", f"sed+random,lsq,sed,{result.checkpoint}", seeds=args.seeds)
    print(comparison.table())
    print(comparison.versus_table(f"benchmarl-{args.algorithm}"))


if __name__ == "__main__":
    main()
