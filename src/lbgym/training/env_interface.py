"""The environment as an agent in the user's own loop sees it: :class:`EnvInterface`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium import Env, Space, spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from numpy.typing import NDArray

from ..env.actions import ActionCodec, DiscreteActions, JointActions, make_action_codec
from ..env.observations import ObservationLayout, relative_weights
from ..errors import UnsupportedSpaceError
from ..features import FEATURE_NAMES


@dataclass(frozen=True)
class EnvInterface:
    """The layout, actions and replicas of an environment with discrete actions.

    Attributes:
        codec: from actions to weights.
        layout: of the observations.
        num_envs: replicas; None: a single environment.
        max_steps: steps of an episode; None: unknown.
        step_interval: seconds of a step; None: unknown.
        autoreset: mode of the replicas; DISABLED: the loop resets them.
    """

    codec: ActionCodec
    layout: ObservationLayout
    num_envs: int | None = None
    max_steps: int | None = None
    step_interval: float | None = None
    autoreset: AutoresetMode = AutoresetMode.DISABLED

    @classmethod
    def of(
        cls, env: Env[Any, Any] | VectorEnv[Any, Any, Any] | tuple[Space[Any], Space[Any]], levels: Sequence[float]
    ) -> EnvInterface:
        """The interface of an environment, or of the spaces of one, an observation space and an action space.

        Args:
            env: the environment, wrapped or not, or its spaces.
            levels: ``action_weights``, which spaces do not show.

        Raises:
            UnsupportedSpaceError: if it is not an lbgym environment that sets weights by discrete actions.
        """
        if isinstance(env, tuple):
            return cls._of_spaces(*env, levels)
        bare: Any = env.unwrapped
        codec, layout = getattr(bare, "action_codec", None), getattr(bare, "observation_layout", None)
        action = getattr(bare, "single_action_space", env.action_space)
        if not isinstance(codec, ActionCodec) or not isinstance(layout, ObservationLayout):
            raise UnsupportedSpaceError(
                f"the agent sets the weights of servers, which {type(bare).__name__} does not take: use a "
                "LoadBalanceEnv or a LoadBalanceVectorEnv, or give the pair of spaces of one balancer"
            )
        _check_discrete(action)
        observed = getattr(env, "single_observation_space", env.observation_space)
        if observed != layout.space:
            raise UnsupportedSpaceError(
                f"a wrapper changes the observations: the agent takes {layout.space}, got {observed}"
            )
        if not isinstance(env, VectorEnv):
            return cls(codec, layout, None, bare.max_steps, bare.step_interval)
        mode = AutoresetMode(env.metadata["autoreset_mode"])
        return cls(codec, layout, env.num_envs, bare.max_steps, bare.step_interval, mode)

    @classmethod
    def _of_spaces(cls, observed: Space[Any], action: Space[Any], levels: Sequence[float]) -> EnvInterface:
        matrix = observed["features"] if isinstance(observed, spaces.Dict) else observed
        _check_discrete(action)
        shape = matrix.shape or ()
        if len(shape) == 2:
            n = shape[0]
        elif isinstance(action, spaces.MultiDiscrete):
            n = len(action.nvec)
        else:
            n = round(math.log(float(action.n)) / math.log(len(levels)))  # type: ignore[attr-defined]
        name = "dict" if matrix is not observed else "matrix" if len(shape) == 2 else "flat"
        columns = shape[-1] if len(shape) == 2 else shape[0] // n - 1
        kind = "discrete" if isinstance(action, spaces.MultiDiscrete) else "joint"
        codec = make_action_codec(n, kind, action_weights=levels)
        # The first feature, a count, has an upper bound only if it is normalised; weights have no lower one.
        high, low = np.ravel(getattr(matrix, "high", np.inf)), np.ravel(getattr(matrix, "low", 0.0))
        layout = ObservationLayout(
            n,
            name,
            normalize=bool(high[-columns:][0] <= 1.0),
            use_ground_truth=columns > len(FEATURE_NAMES) + 1,
            observe_weights=bool(low[-1] < 0.0),
        )
        if layout.space != observed or codec.space != action:
            raise UnsupportedSpaceError(
                f"not the spaces of a LoadBalanceEnv with action_weights {tuple(levels)}: {observed} and {action}"
            )
        return cls(codec, layout)

    @property
    def levels(self) -> tuple[float, ...]:
        """``action_weights``: the levels that each server's weight is chosen from."""
        assert isinstance(self.codec, DiscreteActions | JointActions)
        return tuple(self.codec.levels.tolist())

    @property
    def action_type(self) -> str:
        """The ``action_type``, "discrete" or "joint"."""
        return "discrete" if isinstance(self.codec.space, spaces.MultiDiscrete) else "joint"

    def flat(self, observation: Any, weights: NDArray[Any] | None = None) -> NDArray[np.float32]:
        """Observations in any layout -> flat ones, float32[R, N (1 + C)]: mask, then features.

        With weights [R, N] each server's features end with its own, as with ``observe_weights=True``.
        """
        n, rows = self.layout.num_servers, self.num_envs or 1
        mask: Any
        features: Any
        if self.layout.observation == "flat":
            mask, features = np.split(np.reshape(observation, (rows, -1)), [n], axis=-1)
        elif self.layout.observation == "dict":
            mask, features = observation["mask"], observation["features"]
        else:
            # Rows of inactive servers are zero, as are those of idle ones.
            mask, features = np.ones((rows, n)), observation
        mask, features = np.reshape(mask, (rows, n)), np.reshape(features, (rows, n, -1))
        if weights is not None:
            features = np.concatenate([features, relative_weights(weights, mask > 0)[..., None]], -1)
        return np.concatenate([mask, features.reshape(rows, -1)], -1, dtype=np.float32)

    def before_reset(self, observation: Any, final: NDArray[Any], ended: NDArray[np.bool_]) -> Any:
        """Put the last observations of ended episodes, ``final_obs``, in place of the first ones of the next."""
        if isinstance(observation, dict):
            return {
                key: np.stack([final[i][key] if ended[i] else part[i] for i in range(len(ended))])
                for key, part in observation.items()
            }
        return np.stack([final[i] if ended[i] else observation[i] for i in range(len(ended))])

    def weights(self, actions: Any) -> NDArray[np.float64]:
        """Weights float64[R, N] of an action, or of one per replica."""
        return self.codec.to_weights(actions, self.num_envs).reshape(self.num_envs or 1, -1)


def _check_discrete(action: Space[Any]) -> None:
    if not isinstance(action, (spaces.MultiDiscrete, spaces.Discrete)):
        raise UnsupportedSpaceError(
            f'the agent chooses among levels of weights: use action_type="discrete" or "joint" instead of {action}'
        )
