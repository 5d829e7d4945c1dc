"""Balancers in front of the same servers as BenchMARL's task."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from gymnasium.spaces.utils import flatten_space

from ...errors import InvalidOptionError, MissingExtraError

try:
    with warnings.catch_warnings():
        # TorchRL and its dependencies warn of their own classes while they are imported.
        warnings.simplefilter("ignore")
        import benchmarl.environments as environments
        import torch
        from benchmarl.environments import Task, TaskClass
        from tensordict import TensorDictBase
        from torchrl.data import Composite
        from torchrl.envs import EnvBase, RewardScaling, Transform
except ModuleNotFoundError as error:
    raise MissingExtraError("benchmarl", "benchmarl", "training with BenchMARL") from error

from ...env.multi_agent_vector import MultiLoadBalanceVectorEnv
from ..torchrl_env import GROUP, MultiTorchRLEnv
from .config import WEIGHTS


class _VectorActionEnv(MultiTorchRLEnv):
    """Takes actions of several numbers per server as BenchMARL has them: a vector per balancer, server by server."""

    def __init__(self, env: MultiLoadBalanceVectorEnv, **keys: Any) -> None:
        super().__init__(env, **keys)
        space = env.agent_action_space
        self._columns = space.shape or ()
        if len(self._columns) > 1:
            agents = torch.Size([*self.batch_size, env.num_balancers])
            actions = Composite({"action": self._spec(flatten_space(space), agents)}, shape=agents)
            self.action_spec = Composite({GROUP: actions}, shape=self.batch_size)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        if len(self._columns) > 1:
            action = tensordict.get((GROUP, "action")).unflatten(-1, self._columns)
            tensordict = tensordict.clone(recurse=False).set((GROUP, "action"), action)
        return super()._step(tensordict)


class LoadBalanceTaskClass(TaskClass):
    """Balancers in front of the same servers, for BenchMARL: a group of agents "lb" and a state for central critics.

    Its ``config`` has the keys of :class:`lbgym.MultiLoadBalanceVectorEnv`, ``scenario`` being the task's unless given,
    and of its own ``reward_loc`` and
    ``reward_scale``: BenchMARL is given ``reward_scale * reward + reward_loc`` (default 0 and 1).

    Observations are "flat", normalised and show the weights in force unless given, rewards "open_flows". Without an
    ``action_type``, algorithms with continuous actions get "normalized" and those with discrete ones "joint", with the
    weights of ``WEIGHTS``.
    """

    def get_env_fun(
        self, num_envs: int, continuous_actions: bool, seed: int | None, device: Any
    ) -> Callable[[], EnvBase]:
        """Return a function that makes the environment of ``num_envs`` replicas."""
        shown = {"observation": "flat", "normalize": True, "observe_weights": True}
        keys = shown | {"reward_type": "open_flows"} | self.config
        if "sees_weights" in keys:
            raise InvalidOptionError(
                f"sees_weights={keys['sees_weights']!r} is now called observe_weights, a key of the environment"
            )
        for name in ("reward_loc", "reward_scale"):
            keys.pop(name, None)
        keys.setdefault("scenario", self.name.lower().replace("_", "-"))
        keys.setdefault("action_type", "normalized" if continuous_actions else "joint")
        keys = WEIGHTS.get(keys["action_type"], {}) | keys

        def make() -> EnvBase:
            vector = MultiLoadBalanceVectorEnv(num_envs, autoreset_mode="Disabled", **keys)
            env = _VectorActionEnv(vector, device=device)
            env.set_seed(seed)
            return env

        return make

    def supports_continuous_actions(self) -> bool:
        return self.config.get("action_type", "normalized") in ("normalized", "continuous", "index")

    def supports_discrete_actions(self) -> bool:
        return self.config.get("action_type", "joint") == "joint"

    def max_steps(self, env: EnvBase) -> int:
        return int(env.env.max_steps)

    def has_render(self, env: EnvBase) -> bool:
        return False

    def group_map(self, env: EnvBase) -> dict[str, list[str]]:
        return dict(env.group_map)

    def observation_spec(self, env: EnvBase) -> Composite:
        return Composite({GROUP: _of_one(env.observation_spec, env)[GROUP]})

    def state_spec(self, env: EnvBase) -> Composite | None:
        return Composite({"state": _of_one(env.observation_spec, env)["state"]})

    def action_spec(self, env: EnvBase) -> Composite:
        return _of_one(env.full_action_spec, env)

    def action_mask_spec(self, env: EnvBase) -> Composite | None:
        return None

    def info_spec(self, env: EnvBase) -> Composite | None:
        return None

    def get_env_transforms(self, env: EnvBase) -> list[Transform]:
        """The scaling of the rewards, if any."""
        loc, scale = self.config.get("reward_loc", 0.0), self.config.get("reward_scale", 1.0)
        if (loc, scale) == (0.0, 1.0):
            return []
        return [RewardScaling(loc=loc, scale=scale, in_keys=[(GROUP, "reward")])]

    @staticmethod
    def env_name() -> str:
        return "lbgym"


def _of_one(spec: Composite, env: EnvBase) -> Composite:
    """The spec of one replica."""
    return spec[(0,) * len(env.batch_size)].clone()


class LoadBalanceTask(Task):
    """The built-in scenarios as BenchMARL's tasks: ``LoadBalanceTask.MARLLB_MODERATE.get_task({"num_balancers": 3})``.

    Importing this module puts them in BenchMARL's registry, as "lbgym/marllb_moderate" and so on.
    """

    MARLLB_MODERATE = None
    MARLLB_LARGE = None
    UNIFORM = None
    HETEROGENEOUS = None
    NOISY_NEIGHBOUR = None
    PREQUAL_RAMP = None
    FAILURE = None
    DIURNAL = None
    BURSTY = None
    MODULATED = None
    FLASH_CROWD = None
    HEAVY_TAILED = None
    OVERLOAD = None
    FLEET = None
    PARK = None
    LLM_SERVING = None
    SAMPLE_TRACE = None

    @staticmethod
    def associated_class() -> type[TaskClass]:
        return LoadBalanceTaskClass

    def get_task(self, config: dict[str, Any] | None = None) -> TaskClass:
        """The task with these keys of the environment; None: the defaults."""
        return LoadBalanceTaskClass(self.name, dict(config or {}))


if LoadBalanceTask not in environments.tasks:
    environments.tasks.append(LoadBalanceTask)
    environments.task_config_registry.update(
        {f"lbgym/{name.lower()}": task for name, task in LoadBalanceTask.__members__.items()}
    )
