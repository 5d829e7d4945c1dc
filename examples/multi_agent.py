"""Two balancers, an agent each, in PettingZoo's parallel form: what each sees, what it is worth to act together.

python examples/multi_agent.py
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lbgym import MultiLoadBalanceEnv

STEPS = 200


def mean_fct(name: str, weights_of: Any, **keys: Any) -> None:
    """Print the mean FCT of an episode in which agent b sets the weights ``weights_of(b, observation)``."""
    env = MultiLoadBalanceEnv(scenario="marllb-moderate", action_type="continuous", max_steps=STEPS, **keys)
    observations, infos = env.reset(seed=0)
    seconds = flows = rewarded = 0.0
    while env.agents:
        actions = {agent: weights_of(b, observations[agent]) for b, agent in enumerate(env.agents)}
        observations, rewards, _, _, infos = env.step(actions)
        # The FCT statistics are of all balancers' flows: any agent's info has them.
        info = infos["lb_0"]
        ended = info["completed"] + info["rejected"]
        seconds += ended * info["fct_mean"]
        flows += ended
        rewarded += sum(rewards.values()) / len(rewards)
    env.close()
    print(f"{name:<48} mean FCT {1e3 * seconds / flows:6.1f} ms   mean reward {rewarded / STEPS:.4f}")


def main() -> None:
    env = MultiLoadBalanceEnv(scenario="marllb-moderate", observation="dict")
    observations, _ = env.reset(seed=0)
    for b, agent in enumerate(env.agents):
        env.action_space(agent).seed(b)
    for _ in range(20):
        observations, rewards, *_ = env.step({agent: env.action_space(agent).sample() for agent in env.agents})
    for agent in env.agents:
        print(
            f"{agent} has open flows {observations[agent]['features'][:, 0].astype(int)}, reward {rewards[agent]:.3f}"
        )
    print(f"the state for centralised training has {len(env.state())} numbers, the last is {env.state_names[-1]}")
    env.close()

    equal = np.ones(7)
    cores = np.array([2.0, 2, 2, 2, 4, 4, 4])
    rng = np.random.default_rng(0)
    mean_fct("equal weights", lambda b, observation: equal)
    mean_fct("weights by cores", lambda b, observation: cores)
    mean_fct("weights by cores at lb_0 alone", lambda b, observation: equal if b else cores)
    mean_fct("random weights", lambda b, observation: rng.uniform(1.0, 4.0, 7))

    def by_latency(b: int, observation: np.ndarray) -> np.ndarray:
        """Less to a server the longer its flows last (column 9: the decayed mean of their durations)."""
        return 1.0 / np.maximum(observation[:, 9], 0.02)

    mean_fct("by latency, both at once", by_latency)
    mean_fct("by latency, half a step apart", by_latency, action_offsets="even")
    mean_fct("by latency, up to 0.5 s late", by_latency, action_delay={"low": 0.1, "high": 0.5})


if __name__ == "__main__":
    main()
