"""End-to-end training of QMIX and MAPPO in BenchMARL, steps per second: ``python -m benchmarks.marl_training``.

The same algorithm, network, scenario and learning per step, once over the batched environment of the recipe and once on
BenchMARL's own path for PettingZoo: ``MultiLoadBalanceEnv`` in TorchRL's ``PettingZooWrapper``, eight of them in a
``SerialEnv``. A step is one of a whole replica, in which all its balancers act; collection and learning are counted.
Both are measured in turns, so that what else the machine does meets both; steps per second of processor time, all
threads together, hardly depend on it.

The networks of both paths observe the same but for the weights in force, which PettingZoo's path leaves out.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from benchmarks.common import markdown, parser, report
from benchmarks.env_speed import cluster
from benchmarks.multi_agent_speed import FLOWS, SERIAL_TRAINER, SERVERS
from lbgym import MultiLoadBalanceEnv
from lbgym.training import benchmarl as recipe
from lbgym.training.benchmarl import BenchMARLConfig, train_benchmarl

# isort: split
from torchrl.envs import EnvBase, PettingZooWrapper

LEAST = 20.0
SERIAL_ENVS = 8


class SerialTask(recipe.LoadBalanceTaskClass):
    """The same task by BenchMARL's path for PettingZoo, one environment after the other."""

    def get_env_fun(
        self, num_envs: int, continuous_actions: bool, seed: int | None, device: Any
    ) -> Callable[[], EnvBase]:
        keys = dict(self.config)
        for name in ("reward_loc", "reward_scale", "num_threads"):
            keys.pop(name, None)

        def make() -> EnvBase:
            env = MultiLoadBalanceEnv(**keys)
            return PettingZooWrapper(
                env, group_map={"lb": env.possible_agents}, categorical_actions=True, return_state=True, seed=seed
            )

        return make

    def max_steps(self, env: EnvBase) -> int:
        return int(self.config["max_steps"])

    def observation_spec(self, env: EnvBase) -> Any:
        spec = env.observation_spec.clone()
        for key in list(spec["lb"].keys()):
            if key != "observation":
                del spec["lb"][key]
        del spec["state"]
        return spec


def batched(algorithm: str, scenario: str | None, **changes: Any) -> BenchMARLConfig:
    """The recipe's defaults; without a scenario on the cluster of the benchmarks of environments."""
    changes |= {"scenario": cluster(SERVERS, FLOWS), "num_balancers": 2} if scenario is None else {"scenario": scenario}
    return BenchMARLConfig(algorithm=algorithm, observe_weights=False, total_steps=None, seconds=3600.0, **changes)


def serial(config: BenchMARLConfig) -> BenchMARLConfig:
    """As much learning per step with eight environments: minibatches of the same size, as many per step."""
    share = config.num_envs // SERIAL_ENVS
    if recipe.ALGORITHMS[config.algorithm].on_policy:
        # the rollout is as long as the batched path's, over fewer environments
        return replace(config, num_envs=SERIAL_ENVS, num_steps=config.num_steps * share)
    steps = config.num_steps * share // config.optimizer_steps
    return replace(config, num_envs=SERIAL_ENVS, num_steps=steps, optimizer_steps=1)


def steps_per_second(config: BenchMARLConfig, seconds: float, updates: int, *, one_by_one: bool) -> tuple[float, float]:
    """Of a training after its first update, in which buffers are made: by the clock, and by the processor's time.

    It ends with the first update after ``seconds``, but not before there were ``updates`` more than the first.
    """
    reports = []

    def stop(progress: Any) -> bool:
        reports.append((progress.step, progress.seconds, time.process_time()))
        return len(reports) > updates and progress.seconds - reports[0][1] >= seconds

    task = recipe.LoadBalanceTaskClass
    recipe.LoadBalanceTaskClass = SerialTask if one_by_one else task
    try:
        with warnings.catch_warnings():
            # TorchRL is tested with an older PettingZoo
            warnings.filterwarnings("ignore", message="PettingZoo in TorchRL is tested")
            train_benchmarl(config, callback=stop)
    finally:
        recipe.LoadBalanceTaskClass = task
    steps, clock, processor = (last - first for first, last in zip(reports[0], reports[-1], strict=True))
    return steps / clock, steps / processor


def by_clock(speeds: Sequence[tuple[float, float]]) -> float:
    return median(clock for clock, _ in speeds)


def main(argv: Sequence[str] | None = None) -> int:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--seconds", type=float, default=10.0, help="of each measurement, at least")
    options.add_argument("--scenario", default=None, help="name or file; 8 servers and 25 flows per step otherwise")
    arguments = options.parse_args(argv)
    rounds, seconds = (1, 1.0) if arguments.quick else (arguments.rounds, arguments.seconds)
    changes: dict[str, Any] = {"num_envs": 32, "num_steps": 4} if arguments.quick else {}
    measured: dict[str, list[tuple[float, float]]] = {}
    for algorithm in ("qmix", "mappo"):
        config = batched(algorithm, arguments.scenario, **changes)
        few = serial(config)
        for _ in range(rounds):
            for name, of, one_by_one in (
                (f"{algorithm}, batched, {config.num_envs} replicas", config, False),
                (f"{algorithm}, one by one, {SERIAL_ENVS} environments", few, True),
            ):
                speed = steps_per_second(of, seconds, 1 if one_by_one else 2, one_by_one=one_by_one)
                measured.setdefault(name, []).append(speed)
    targets = []
    for algorithm in ("qmix", "mappo"):
        fast, slow = (speeds for name, speeds in measured.items() if name.startswith(f"{algorithm}, "))
        targets += [
            (f"{algorithm}, batched: times one by one", LEAST, by_clock(fast) / by_clock(slow)),
            (f"{algorithm}, batched: times {SERIAL_TRAINER:.0f} steps/s", LEAST, by_clock(fast) / SERIAL_TRAINER),
        ]
    rows = [
        (name, by_clock(speeds), max(clock for clock, _ in speeds), median(processor for _, processor in speeds))
        for name, speeds in measured.items()
    ]
    text = markdown(rows, ("steps/s over all replicas, learning included", "median", "best", "per processor second"))
    text += "\n\n" + markdown(
        [(name, least, value, value >= least) for name, least, value in targets],
        ("target", "at least", "measured", "reached"),
    )
    report("marl_training", arguments, text, {"steps_per_second": measured})
    return 0 if all(value >= least for _, least, value in targets) else 1


if __name__ == "__main__":
    sys.exit(main())
