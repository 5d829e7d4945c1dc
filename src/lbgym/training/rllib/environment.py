"""The environments for RLlib's env runners, with scaled rewards.

RLlib does not scale rewards. Here they are divided by one number, the same in all env runners, so that a node that
joins late or a training that resumes learns from the same rewards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from ...checks import whole
from ...errors import MissingExtraError

try:
    from ray.rllib.callbacks.callbacks import RLlibCallback
    from ray.rllib.env.wrappers.pettingzoo_env import ParallelPettingZooEnv
except ModuleNotFoundError as error:
    raise MissingExtraError("ray", "rllib", "training with RLlib") from error

from ...env.multi_agent import MultiLoadBalanceEnv
from ...env.multi_agent_vector import MultiLoadBalanceVectorEnv
from ...env.vector import LoadBalanceVectorEnv

#: Names of the sums of :class:`Statistics`.
STATISTICS = ("steps", "reward", "flows", "fct")


class Statistics:
    """Sums over the steps since the last :meth:`take`.

    The ``steps`` of all replicas, their unscaled ``reward`` (the mean over the balancers where they are agents), the
    ``flows`` that ended, and their completion times ``fct``, seconds.
    """

    def __init__(self) -> None:
        self._sums = dict.fromkeys(STATISTICS, 0.0)

    def add(self, rewards: NDArray[Any], completed: NDArray[Any], fct_mean: NDArray[Any]) -> None:
        """Add steps: their rewards, the flows that ended in each, and the mean completion time of those, seconds."""
        self._sums["steps"] += rewards.size
        self._sums["reward"] += float(rewards.sum())
        self._sums["flows"] += float(completed.sum())
        # The mean of no flows is NaN.
        self._sums["fct"] += float(np.where(completed > 0, fct_mean * completed, 0.0).sum())

    def take(self) -> dict[str, float]:
        """Return the sums and reset them to 0."""
        taken, self._sums = self._sums, dict.fromkeys(STATISTICS, 0.0)
        return taken


class RLlibVectorEnv(LoadBalanceVectorEnv):
    """The native vector environment for ``gym_env_vectorize_mode="vector_entry_point"``.

    Observations are flat, with the weights in force unless ``observe_weights`` is False. Infos are empty, since RLlib
    would make a dictionary per replica and step of them; what matters is in ``statistics``.

    Args:
        num_envs: replicas.
        reward_scale: divisor of the rewards.
        keys: those of :class:`~lbgym.LoadBalanceVectorEnv`.
    """

    def __init__(self, num_envs: int = 1, *, reward_scale: float = 1.0, **keys: Any) -> None:
        shown: dict[str, Any] = {"observe_weights": True} | keys | {"observation": "flat"}
        super().__init__(num_envs, **shown)
        self.reward_scale = reward_scale
        self.statistics = Statistics()
        # Compile the simulator before the clock of the training starts.
        self.reset(seed=0)
        super().step(self.action_space.sample())

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Reset as the vector environment does; a whole number seeds replica i with ``seed * num_envs + i``.

        RLlib's env runners get consecutive seeds, whose replicas would otherwise share most of theirs.
        """
        if isinstance(seed, (int, np.integer)):
            first = whole("seed", seed, low=0) * self.num_envs
            seed = [first + i for i in range(self.num_envs)]
        return super().reset(seed=seed, options=options)[0], {}

    def step(
        self, actions: Any
    ) -> tuple[Any, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """Step as the vector environment does, with scaled rewards and an empty info."""
        observation, rewards, terminated, truncated, info = super().step(actions)
        # A replica that this call reset has not taken a step.
        stepped = self._core.steps > 0
        self.statistics.add(rewards[stepped], info["completed"][stepped], info["fct_mean"][stepped])
        return observation, rewards / self.reward_scale, terminated, truncated, {}


class RLlibMultiAgentEnv(ParallelPettingZooEnv):
    """Every balancer an agent, as an RLlib ``MultiAgentEnv`` of one replica; otherwise as :class:`RLlibVectorEnv`.

    Args:
        keys: those of :class:`~lbgym.MultiLoadBalanceEnv`, and ``reward_scale``.
        worker_index: that of the env runner, which spreads the seeds.
    """

    def __init__(self, keys: Mapping[str, Any], worker_index: int = 0) -> None:
        shown = {"observe_weights": True} | dict(keys) | {"observation": "flat"}
        shown.pop("reward_scale", None)
        env = MultiLoadBalanceEnv(**shown)
        # The base class resets it.
        super().__init__(env)
        self.env, self.worker_index = env, worker_index
        self.reward_scale = float(keys.get("reward_scale", 1.0))
        self.statistics = Statistics()
        # RLlib wants the balancers' names in a fixed order
        self.agents = self.possible_agents = list(env.possible_agents)
        self.observation_spaces = {agent: env.observation_space(agent) for agent in self.agents}
        self.action_spaces = {agent: env.action_space(agent) for agent in self.agents}
        self.observation_space = spaces.Dict(self.observation_spaces)
        self.action_space = spaces.Dict(self.action_spaces)
        env.step({agent: env.action_space(agent).sample() for agent in self.agents})

    def reset(self, *, seed: int | None = None, options: Mapping[str, Any] | None = None) -> tuple[Any, Any]:
        """Begin an episode; every env runner derives a seed of its own from ``seed``."""
        if seed is not None:
            seed = whole("seed", seed, low=0) * 1_000 + self.worker_index
        observations, _ = self.env.reset(seed=seed, options=options)
        return observations, {agent: {} for agent in observations}

    def step(self, action_dict: Mapping[str, Any]) -> tuple[Any, Any, Any, Any, Any]:
        """Step one interval, with scaled rewards and empty infos."""
        observations, rewards, terminated, truncated, infos = self.env.step(action_dict)
        # Every balancer's info counts the flows of all of them.
        first = next(iter(infos.values()))
        reward = np.mean(list(rewards.values()))
        self.statistics.add(np.asarray(reward), np.asarray(first["completed"]), np.asarray(first["fct_mean"]))
        scaled = {agent: reward / self.reward_scale for agent, reward in rewards.items()}
        terminated["__all__"], truncated["__all__"] = all(terminated.values()), all(truncated.values())
        return observations, scaled, terminated, truncated, {agent: {} for agent in observations}


class StatisticsCallback(RLlibCallback):
    """Adds the statistics of the environments to the metrics of their env runner, under "lbgym"."""

    def on_sample_end(self, *, env_runner: Any = None, metrics_logger: Any = None, **kwargs: Any) -> None:
        """Called by an env runner after it has sampled."""
        env = env_runner.env.unwrapped
        replicas = [part.unwrapped for part in env.envs] if hasattr(env, "envs") else [env]
        taken = [part.statistics.take() for part in replicas]
        for name in STATISTICS:
            metrics_logger.log_value(("lbgym", name), sum(part[name] for part in taken), reduce="sum")


def make_vector_env(keys: Mapping[str, Any]) -> RLlibVectorEnv:
    """Make a single-agent environment, for RLlib's registry; ``num_envs`` is among the keys."""
    return RLlibVectorEnv(**keys)


def make_multi_agent_env(keys: Mapping[str, Any]) -> RLlibMultiAgentEnv:
    """Make a multi-agent environment, for RLlib's registry; the keys are an ``EnvContext``."""
    return RLlibMultiAgentEnv(keys, int(getattr(keys, "worker_index", 0) or 0))


def measure_reward_scale(keys: Mapping[str, Any], gamma: float, seed: int, *, multi_agent: bool = False) -> float:
    """Measure the standard deviation of discounted returns under equal weights, where policies begin; 1 if it is 0.

    Args:
        keys: of the environment.
        gamma: discount per step.
        seed: of the episodes.
        multi_agent: every balancer is an agent.
    """
    kind = MultiLoadBalanceVectorEnv if multi_agent else LoadBalanceVectorEnv
    env = kind(16, **keys)
    try:
        env.reset(seed=seed)
        balancers = env.num_balancers if isinstance(env, MultiLoadBalanceVectorEnv) else 1
        equal = env.action_codec.encode(np.ones((env.num_envs * balancers, env.num_servers)))
        actions = np.asarray(equal).reshape(env.action_space.shape or ())
        total = np.zeros(())
        returns = []
        for _ in range(min(256, keys["max_steps"])):
            _, rewards, _, _, _ = env.step(actions)
            total = gamma * total + rewards
            returns.append(total)
    finally:
        env.close()
    scale = float(np.std(returns))
    return scale if np.isfinite(scale) and scale > 0.0 else 1.0
