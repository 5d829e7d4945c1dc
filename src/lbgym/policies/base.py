"""What a policy is, and how one that thinks in weights is fitted to an environment."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ..env.actions import ActionCodec
from ..env.observations import ObservationLayout
from ..errors import PolicyError
from ..features.columns import GROUND_TRUTH_NAMES, NUM_FEATURES, NUM_GROUND_TRUTH


@runtime_checkable
class Policy(Protocol):
    """Maps observations to actions.

    The observation and the action are those of the environment the policy was made for; ``info`` is that environment's.
    """

    def reset(self) -> None:
        """Forget what was seen; call it at the start of every episode."""

    def act(self, observation: Any, info: dict[str, Any]) -> Any:
        """The action for one observation."""


class WeightPolicy(ABC):
    """A policy that thinks in weights over features and leaves observation layouts and action types to others.

    Arrays may carry leading axes (``...``: replicas, balancers); each index along them is a policy of its own.

    Attributes:
        uses_ground_truth: whether :meth:`weights` needs the three ground-truth columns.
    """

    uses_ground_truth: ClassVar[bool] = False

    def reset(self) -> None:  # noqa: B027 - most heuristics remember nothing
        """Forget what was seen."""

    @abstractmethod
    def weights(self, features: NDArray[Any], active: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Weights of the servers.

        Args:
            features: float[..., N, 11], or [..., N, 14] with the ground truth, in natural units (not normalized).
            active: bool[..., N], servers that take new flows.

        Returns:
            float64[..., N], finite and above 0. Only their ratios matter to a dispatch rule.
        """

    def for_env(self, env: Any) -> EnvPolicy:
        """This policy for an environment's own observations and actions.

        Args:
            env: a :class:`lbgym.LoadBalanceEnv` or :class:`lbgym.LoadBalanceVectorEnv`, wrapped or not. Wrappers that
                change observations or actions are not undone.

        Raises:
            PolicyError: if the policy needs ground truth and the environment does not show it.
        """
        base = env.unwrapped
        return EnvPolicy(self, base.observation_layout, base.action_codec)


class EnvPolicy:
    """A :class:`WeightPolicy` behind an observation layout and an action codec: a :class:`Policy`.

    Only the ratios of weights matter to a dispatch rule, so the codec scales them into the range of the action space
    before it takes the nearest action; ratios beyond that range are cut off.
    """

    def __init__(self, policy: WeightPolicy, layout: ObservationLayout, codec: ActionCodec) -> None:
        if policy.uses_ground_truth and not layout.use_ground_truth:
            raise PolicyError(
                f"{type(policy).__name__} needs the ground truth ({', '.join(GROUND_TRUTH_NAMES)}), which the "
                "environment does not show: make it with use_ground_truth=True"
            )
        self.policy, self.layout, self.codec = policy, layout, codec

    def reset(self) -> None:
        """Forget what was seen."""
        self.policy.reset()

    def act(self, observation: Any, info: dict[str, Any]) -> Any:
        """The action whose weights are nearest to the policy's."""
        features, active = self.layout.decode(observation)
        return self.codec.encode(self.policy.weights(features, active))


def check_features(policy: WeightPolicy, features: NDArray[Any], active: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Features as float64, or :class:`PolicyError` if their shape is not one the policy can read."""
    features = np.asarray(features, dtype=np.float64)
    widths = (
        (NUM_FEATURES + NUM_GROUND_TRUTH,)
        if policy.uses_ground_truth
        else (NUM_FEATURES, NUM_FEATURES + NUM_GROUND_TRUTH)
    )
    if features.ndim < 2 or features.shape[-1] not in widths or features.shape[:-1] != np.shape(active):
        allowed = " or ".join(str(width) for width in widths)
        raise PolicyError(
            f"{type(policy).__name__} takes features [..., N, {allowed}] and active [..., N], "
            f"got shapes {features.shape} and {np.shape(active)}"
        )
    return features
