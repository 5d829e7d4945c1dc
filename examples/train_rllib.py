"""Train with an algorithm of RLlib on the heterogeneous cluster, then compare it with heuristics on the same flows.

python examples/train_rllib.py [--algo ppo] [--seconds 90] [--seeds 10]
"""

from __future__ import annotations

import argparse

from rich import print

from lbgym.evaluation import compare
from lbgym.training import Progress
from lbgym.training.rllib import ALGORITHMS, RLlibConfig, train_rllib


def report(progress: Progress) -> None:
    print(
        f"{progress.fraction:4.0%}  {progress.step:>9,} steps  {progress.steps_per_second:6,.0f} steps/s  "
        f"reward {progress.reward:8.2f}  mean FCT {progress.fct_mean:.3f} s",
        end="\r",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--algo", choices=list(ALGORITHMS), default="ppo", help="algorithm of RLlib")
    parser.add_argument("--seconds", type=float, default=90.0, help="training time")
    parser.add_argument("--seeds", type=int, default=10, help="runs of the comparison")
    args = parser.parse_args()

    config = RLlibConfig(algorithm=args.algo, scenario="heterogeneous", total_steps=None, seconds=args.seconds)
    result = train_rllib(config, out="out/example", callback=report)
    print(f"\ncheckpoint: {result.checkpoint}")

    comparison = compare("heterogeneous", f"sed+random,lsq,sed,{result.checkpoint}", seeds=args.seeds)
    print(comparison.table())
    print(comparison.versus_table(f"rllib-{args.algo}"))


if __name__ == "__main__":
    main()
