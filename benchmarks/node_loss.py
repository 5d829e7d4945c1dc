"""What a Ray cluster costs a training, and what the loss of its node does: ``python -m benchmarks.node_loss``.

Two nodes of one machine, made by Ray's own test utility; the trainer's node is killed in the middle. Ray finds out, the
training goes on in a new process on the other node from the last checkpoint, and this measures how long that takes.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace

import ray
from ray.cluster_utils import Cluster

from benchmarks.common import markdown, parser, report
from lbgym.training import PPOConfig, Progress, train_on_ray, train_ppo


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--seconds", type=float, default=30.0, help="training time of each run")
    options.add_argument("--checkpoint-every", type=float, default=5.0, help="seconds between checkpoints")
    args = options.parse_args()
    seconds = 6.0 if args.quick else args.seconds
    config = PPOConfig(total_steps=None, seconds=seconds, checkpoint_every=args.checkpoint_every)
    if args.quick:
        config = replace(config, num_envs=16, checkpoint_every=1.0)
    logging.getLogger("ray").setLevel(logging.ERROR)

    here = train_ppo(config)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        there = train_on_ray("ppo", config)

        (doomed,) = cluster.worker_nodes
        cluster.add_node(num_cpus=1)
        seen: list[tuple[float, int]] = []
        killed: list[float] = []

        def callback(progress: Progress) -> None:
            seen.append((time.perf_counter(), progress.step))
            if not killed and progress.seconds >= seconds / 2:
                cluster.remove_node(doomed, allow_graceful=False)
                killed.append(time.perf_counter())

        survived = train_on_ray("ppo", config, callback=callback)
    finally:
        ray.shutdown()
        cluster.shutdown()

    lost_at = max(i for i in range(1, len(seen)) if seen[i][1] <= seen[i - 1][1])
    silence = seen[lost_at][0] - seen[lost_at - 1][0]
    again = seen[lost_at - 1][1] - seen[lost_at][1]
    rows = [
        ["in this process", here.history[-1].step / here.history[-1].seconds, None, None],
        ["on a node of the cluster", there.history[-1].step / there.history[-1].seconds, None, None],
        ["on a node that is killed in the middle", None, silence, again],
    ]
    text = markdown(rows, ["training", "steps/s", "seconds until it goes on", "steps made again"])
    text += f"\n\nA checkpoint every {config.checkpoint_every:g} s; {survived.restarts} restart."
    report("node_loss", args, text, {"rows": rows})


if __name__ == "__main__":
    main()
