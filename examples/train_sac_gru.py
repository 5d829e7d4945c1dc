"""Train SAC-GRU on the heterogeneous cluster, then compare it with heuristics and random weights on the same flows.

python examples/train_sac_gru.py [--seconds 120] [--seeds 10]
"""

from __future__ import annotations

import argparse

from rich import print

from lbgym.evaluation import compare
from lbgym.training import Progress, SACGRUConfig, train_sac_gru


def report(progress: Progress) -> None:
    print(
        f"{progress.fraction:4.0%}  {progress.step:>9,} steps  {progress.steps_per_second:6,.0f} steps/s  "
        f"mean FCT {progress.fct_mean:.3f} s  entropy {progress.losses['entropy']:.2f}",
        end="\r",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0, help="training time")
    parser.add_argument("--seeds", type=int, default=10, help="runs of the comparison")
    args = parser.parse_args()

    config = SACGRUConfig(scenario="heterogeneous", total_steps=None, seconds=args.seconds)
    result = train_sac_gru(config, out="out/example/sac-gru.pt", callback=report)
    print(f"\ncheckpoint: {result.checkpoint}")

    comparison = compare("heterogeneous", f"sed+random,lsq,sed,{result.checkpoint}", seeds=args.seeds)
    print(comparison.table())
    print(comparison.versus_table("sac-gru"))


if __name__ == "__main__":
    main()
