"""A hundred random steps: what an environment hands out and takes.

python examples/random_policy.py
"""

from __future__ import annotations

import gymnasium
import numpy as np


def main() -> None:
    env = gymnasium.make("lbgym:lbgym/LoadBalance-v0", num_servers=4)
    observation, info = env.reset(seed=0)
    env.action_space.seed(0)
    print("observation:", env.observation_space)
    print("action:     ", env.action_space)

    rewards = []
    for step in range(1, 101):
        observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
        rewards.append(float(reward))
        if step % 20 == 0:
            print(
                f"step {step:3}  reward {reward:.3f}  weights {np.round(info['weights'], 2)}  "
                f"open flows {observation[:, 0].astype(int)}  FCT mean {info['fct_mean']:.3f} s"
            )
        if terminated or truncated:
            observation, info = env.reset()
    env.close()
    print(f"mean reward of random weights: {np.mean(rewards):.3f}")


if __name__ == "__main__":
    main()
