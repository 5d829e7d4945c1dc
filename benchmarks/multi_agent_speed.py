"""Steps per second of the multi-agent environments: ``python -m benchmarks.multi_agent_speed``.

A step here is a whole ``step`` of all balancers of a replica: actions decoded, flows simulated, observations, rewards
and infos made. The parallel form is driven as trainers drive PettingZoo environments: a loop over environments, a
dictionary of actions for each, a reset at the end of an episode.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from statistics import median
from typing import Any

import lbgym
from benchmarks.common import markdown, parser, report
from benchmarks.env_speed import cluster, seconds_per_call

#: Frames per second of BenchMARL's MAPPO and QMIX over its serial PettingZoo path on this kind of machine; a trainer
#: of 20 times that must not wait for its environment.
SERIAL_TRAINER = 365.0
SERVERS, FLOWS, EPISODE = 8, 25.0, 200


def keys(balancers: int, **changes: Any) -> dict[str, Any]:
    return {"scenario": cluster(SERVERS, FLOWS), "num_balancers": balancers, "max_steps": EPISODE} | changes


def one_by_one(balancers: int, environments: int, calls: int, rounds: int, **changes: Any) -> list[float]:
    """Steps per second of PettingZoo's parallel form, over all environments of a loop."""
    envs = [lbgym.MultiLoadBalanceEnv(**keys(balancers, **changes)) for _ in range(environments)]
    for seed, env in enumerate(envs):
        env.reset(seed=seed)
    actions = [{agent: env.action_space(agent).sample() for agent in env.agents} for env in envs]

    def step_all(_: int) -> None:
        for env, action in zip(envs, actions, strict=True):
            env.step(action)
            if not env.agents:
                env.reset()

    times = seconds_per_call(step_all, calls, rounds)
    for env in envs:
        env.close()
    return [environments / each for each in times]


def in_arrays(
    balancers: int, replicas: int, calls: int, rounds: int, *, threads: int = 1, state: bool = False, **changes: Any
) -> list[float]:
    """Steps per second of the vector form, over all replicas."""
    env = lbgym.MultiLoadBalanceVectorEnv(replicas, num_threads=threads, **keys(balancers, **changes))
    env.action_space.seed(1)
    actions = [env.action_space.sample() for _ in range(8)]
    env.reset(seed=1)

    def step(i: int) -> None:
        env.step(actions[i % 8])
        if state:
            env.state()

    times = seconds_per_call(step, calls, rounds)
    env.close()
    return [replicas / each for each in times]


def of_one_agent(replicas: int, calls: int, rounds: int) -> list[float]:
    """Steps per second of the vector environment of one balancer."""
    scenario = cluster(SERVERS, FLOWS)
    env = lbgym.LoadBalanceVectorEnv(replicas, num_threads=1, scenario=scenario, max_steps=EPISODE)
    env.action_space.seed(1)
    actions = [env.action_space.sample() for _ in range(8)]
    env.reset(seed=1)
    times = seconds_per_call(lambda i: env.step(actions[i % 8]), calls, rounds)
    env.close()
    return [replicas / each for each in times]


def main(argv: Sequence[str] | None = None) -> int:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--rounds", type=int, default=7)
    arguments = options.parse_args(argv)
    quick = arguments.quick
    rounds = 3 if quick else arguments.rounds
    calls = 10 if quick else 60
    delay = {"low": 0.0, "high": 0.2}
    measured = {}
    for m in (2, 6):
        measured |= {
            f"{m} balancers, parallel form, 1 environment": one_by_one(m, 1, 32 * calls, rounds),
            f"{m} balancers, parallel form, a loop over 64": one_by_one(m, 64, max(calls // 4, 2), rounds),
            f"{m} balancers, vector form, 64 replicas": in_arrays(m, 64, 2 * calls, rounds),
            f"{m} balancers, vector form, 256 replicas": in_arrays(m, 256, calls, rounds),
            f"{m} balancers, vector form, 256 replicas, 2 threads": in_arrays(m, 256, calls, rounds, threads=2),
            f"{m} balancers, vector form, 256 replicas, and state()": in_arrays(m, 256, calls, rounds, state=True),
            f"{m} balancers, vector form, 256 replicas, difference rewards": in_arrays(
                m, 256, calls, rounds, reward_sharing="difference"
            ),
            f"{m} balancers, vector form, 256 replicas, at even offsets": in_arrays(
                m, 256, calls, rounds, action_offsets="even"
            ),
            f"{m} balancers, vector form, 256 replicas, drawn delays": in_arrays(
                m, 256, calls, rounds, action_delay=delay
            ),
        }
    measured["1 balancer, vector form, 256 replicas"] = in_arrays(1, 256, calls, rounds)
    measured["LoadBalanceVectorEnv, 256 replicas"] = of_one_agent(256, calls, rounds)

    def speed(name: str) -> float:
        return median(measured[name])

    loop, batch = "2 balancers, parallel form, a loop over 64", "2 balancers, vector form, 64 replicas"
    targets = [
        (f"{batch}: times {SERIAL_TRAINER:.0f} steps/s", 100.0, speed(batch) / SERIAL_TRAINER),
        (f"{batch}: times the loop over as many", 4.0, speed(batch) / speed(loop)),
        (f"{loop}: times {SERIAL_TRAINER:.0f} steps/s", 20.0, speed(loop) / SERIAL_TRAINER),
    ]
    rows = [(name, median(speeds), max(speeds)) for name, speeds in measured.items()]
    text = markdown(rows, ("steps/s over all replicas, one thread unless given", "median", "best"))
    text += "\n\n" + markdown(
        [(name, least, value, value >= least) for name, least, value in targets],
        ("target", "at least", "measured", "reached"),
    )
    report("multi_agent_speed", arguments, text, {"steps_per_second": measured})
    return 0 if all(value >= least for _, least, value in targets) else 1


if __name__ == "__main__":
    sys.exit(main())
