"""The vector environments as batched TorchRL environments: one call of the simulator per step of all replicas.

TorchRL steps single environments one by one, in a loop or in processes, and its wrapper of Gymnasium's vector
environments knows nothing of balancers that are agents.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from ..errors import InvalidOptionError, LbgymError, MissingExtraError, UnsupportedSpaceError

try:
    import torch
    from torch import Tensor

    with warnings.catch_warnings():
        # TorchRL warns of its own classes while it is imported.
        warnings.simplefilter("ignore")
        from tensordict import TensorDict, TensorDictBase
        from torchrl.data import Bounded, Categorical, Composite, MultiCategorical, TensorSpec, Unbounded
        from torchrl.envs import EnvBase
except ModuleNotFoundError as error:
    raise MissingExtraError("torchrl", "torchrl", "TorchRL environments") from error

from ..env.multi_agent_vector import MultiLoadBalanceVectorEnv
from ..env.vector import LoadBalanceVectorEnv, ReplicaEnv

#: The group of agents, as TorchRL calls them, that the balancers are.
GROUP = "lb"


class _ReplicaEnv(EnvBase):
    """Base of the environments of one and of several balancers; see :class:`TorchRLEnv`."""

    env: ReplicaEnv

    def __init__(self, env: ReplicaEnv, *, device: torch.device | str = "cpu", **keys: Any) -> None:
        if keys:
            given = ", ".join(f"{name}={value!r}" for name, value in keys.items())
            raise InvalidOptionError(
                f"{type(self).__name__} takes a vector environment and a device, got {given}: keys such as "
                "observe_weights belong to the vector environment"
            )
        mode = env.metadata.get("autoreset_mode")
        if mode != AutoresetMode.DISABLED:
            raise LbgymError(
                f"{type(self).__name__} needs a vector environment with autoreset_mode DISABLED, since TorchRL resets "
                f"replicas itself; got {mode}"
            )
        super().__init__(device=torch.device(device), batch_size=torch.Size([env.num_envs]))
        self.env = env
        self._next_seeds: list[int | None] = [None] * env.num_envs

    def _set_seed(self, seed: int | None) -> None:
        # Each replica takes its seed at its next reset; replicas may reset at different times.
        self._next_seeds = [None if seed is None else int(seed) + i for i in range(self.env.num_envs)]

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDictBase:
        asked = None if tensordict is None else tensordict.get("_reset", None)
        mask = np.ones(self.env.num_envs, np.bool_)
        if asked is not None:
            mask = asked.reshape(self.env.num_envs).cpu().numpy().copy()
        options = dict(kwargs.get("options") or {}) | {"reset_mask": mask}
        observation, _ = self.env.reset(seed=self._next_seeds, options=options)
        self._next_seeds = [None if mask[i] else seed for i, seed in enumerate(self._next_seeds)]
        over = np.zeros(self.env.num_envs, np.bool_)
        return self._result(observation, over, over)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        action = tensordict.get(self.action_key).detach().cpu().numpy()
        observation, rewards, terminated, truncated, _ = self.env.step(action)
        result = self._result(observation, terminated, truncated)
        result.set(self.reward_key, self._tensor(rewards.astype(np.float32)).unsqueeze(-1))
        return result

    def _result(self, observation: Any, terminated: NDArray[np.bool_], truncated: NDArray[np.bool_]) -> TensorDictBase:
        """Return observations and ends in fresh tensors."""
        result = TensorDict(self._observed(observation), self.batch_size, device=self.device)
        for key, ended in (("terminated", terminated), ("truncated", truncated), ("done", terminated | truncated)):
            result.set(key, self._tensor(ended).unsqueeze(-1).clone())
        return result

    def _observed(self, observation: Any) -> dict[str, Any]:
        """Return the entries of a tensordict other than rewards and ends."""
        raise NotImplementedError

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def _tensors(self, observation: Any) -> dict[str, Any]:
        """An observation by the names that :meth:`_observation_specs` gives its parts."""
        parts = observation if isinstance(observation, dict) else {"observation": observation}
        return {name: self._tensor(part) for name, part in parts.items()}

    def _observation_specs(self, space: spaces.Space[Any], leading: torch.Size) -> dict[str, TensorSpec]:
        """Specs of an agent's observation with leading axes, its parts by name."""
        parts = space.spaces if isinstance(space, spaces.Dict) else {"observation": space}
        return {name: self._spec(part, leading) for name, part in parts.items()}

    def _spec(self, space: spaces.Space[Any], leading: torch.Size) -> TensorSpec:
        shape = torch.Size([*leading, *(space.shape or ())])
        if isinstance(space, spaces.Discrete):
            return Categorical(int(space.n), shape=shape, dtype=torch.int64, device=self.device)
        if isinstance(space, spaces.MultiDiscrete):
            return MultiCategorical(space.nvec.tolist(), shape=shape, dtype=torch.int64, device=self.device)
        if isinstance(space, spaces.MultiBinary):
            return Bounded(0, 1, shape, dtype=torch.int8, device=self.device, domain="discrete")
        assert isinstance(space, spaces.Box)
        if not (math.isfinite(space.low.min()) and math.isfinite(space.high.max())):
            return Unbounded(shape, device=self.device)
        low, high = (torch.from_numpy(bound.copy()).expand(shape).clone() for bound in (space.low, space.high))
        return Bounded(low, high, shape, dtype=torch.float32, device=self.device)

    def _done_spec(self) -> Composite:
        one = Categorical(2, shape=(*self.batch_size, 1), dtype=torch.bool, device=self.device)
        return Composite({key: one.clone() for key in ("done", "terminated", "truncated")}, shape=self.batch_size)

    def close(self, **kwargs: Any) -> None:
        """Stop the threads of the simulator."""
        if "env" in self.__dict__:
            self.env.close()
        super().close(**kwargs)


class TorchRLEnv(_ReplicaEnv):
    """A :class:`lbgym.LoadBalanceVectorEnv` as a TorchRL environment with batch size [R].

    Keys, for R replicas and N servers: ``observation`` (of the layout "dict": ``features`` and ``mask``), ``action``,
    ``reward`` float32[R, 1], and ``done``, ``terminated`` (never) and ``truncated``, bool[R, 1]. Actions have the
    shapes of the vector environment: "discrete" is ``MultiCategorical`` int64[R, N], "joint" ``Categorical`` int64[R],
    "index" ``Bounded`` float32[R, N, 2], the others ``Bounded`` float32[R, N].

    ``set_seed(s)`` seeds replica i with s + i at its next reset. Replicas marked in ``_reset`` start again, the others
    go on; ``reset(options=...)`` takes the options of :meth:`lbgym.LoadBalanceEnv.reset`.

    Args:
        env: made with ``autoreset_mode=AutoresetMode.DISABLED``, best with ``observe_weights=True``; it is
            closed with this one.
        device: of all tensors; the simulator runs on the CPU.

    Raises:
        LbgymError: for another autoreset mode.
        InvalidOptionError: for a key of the vector environment.
        UnsupportedSpaceError: for an environment with several balancers.
    """

    def __init__(self, env: LoadBalanceVectorEnv, *, device: torch.device | str = "cpu", **keys: Any) -> None:
        if not isinstance(env, LoadBalanceVectorEnv):
            raise UnsupportedSpaceError(
                "TorchRLEnv takes a LoadBalanceVectorEnv; for a MultiLoadBalanceVectorEnv use MultiTorchRLEnv"
            )
        super().__init__(env, device=device, **keys)
        r = self.batch_size
        self.observation_spec = Composite(self._observation_specs(env.single_observation_space, r), shape=r)
        self.action_spec = self._spec(env.single_action_space, r)
        self.reward_spec = Unbounded((*r, 1), device=self.device)
        self.done_spec = self._done_spec()

    def _observed(self, observation: Any) -> dict[str, Any]:
        return self._tensors(observation)


class MultiTorchRLEnv(_ReplicaEnv):
    """A :class:`lbgym.MultiLoadBalanceVectorEnv` as a TorchRL environment with batch size [R], its balancers a group.

    Keys, for R replicas, m balancers and N servers: ``("lb", "observation")`` [R, m, ...] (of the layout "dict":
    ``features`` and ``mask``), ``("lb", "action")``, ``("lb", "reward")`` float32[R, m, 1], ``state`` float32[R, S] for
    centralised training, and for all balancers of a replica together ``done``, ``terminated`` (never) and
    ``truncated``, bool[R, 1]. The rest is as of :class:`TorchRLEnv`, with an axis of balancers.

    Args:
        env: made with ``autoreset_mode=AutoresetMode.DISABLED``, best with ``observe_weights=True``; it is
            closed with this one.
        device: of all tensors; the simulator runs on the CPU.

    Attributes:
        group_map: the group's name and its agents.

    Raises:
        LbgymError: for another autoreset mode.
        InvalidOptionError: for a key of the vector environment.
    """

    env: MultiLoadBalanceVectorEnv

    def __init__(self, env: MultiLoadBalanceVectorEnv, *, device: torch.device | str = "cpu", **keys: Any) -> None:
        super().__init__(env, device=device, **keys)
        self.group_map = {GROUP: [f"lb_{b}" for b in range(env.num_balancers)]}
        r = self.batch_size
        agents = torch.Size([*r, env.num_balancers])
        observations = Composite(self._observation_specs(env.agent_observation_space, agents), shape=agents)
        actions = Composite({"action": self._spec(env.agent_action_space, agents)}, shape=agents)
        rewards = Composite({"reward": Unbounded((*agents, 1), device=self.device)}, shape=agents)
        self.observation_spec = Composite({GROUP: observations, "state": self._spec(env.state_space, r)}, shape=r)
        self.action_spec = Composite({GROUP: actions}, shape=r)
        self.reward_spec = Composite({GROUP: rewards}, shape=r)
        self.done_spec = self._done_spec()

    def _observed(self, observation: Any) -> dict[str, Any]:
        agents = TensorDict(self._tensors(observation), (*self.batch_size, self.env.num_balancers), device=self.device)
        return {GROUP: agents, "state": self._tensor(self.env.state())}
