"""Policies that set weights from features: :class:`WeightPolicy`."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ..errors import PolicyError
from ..features.columns import NUM_FEATURES, NUM_GROUND_TRUTH
from .agent import Agent


class WeightPolicy(ABC):
    """A policy that sets weights from features; an :class:`Agent` deals with observation layouts and action types.

    Arrays may carry leading axes (``...``: replicas, balancers); each index along them is a policy of its own.

    Attributes:
        uses_ground_truth: whether :meth:`weights` needs the three ground-truth columns.
        uses_features: the features that :meth:`weights` reads. It acts on no data plane that does not measure them all:
            those columns are 0 there and mean nothing.
        sets_background: whether it sets background loads besides weights.
        sets_tables: whether it sets tables of scores, for the rule ``table``, which reads no weights.
        background: float64[..., N], flows that others are believed to hold at a server, as of the last call of
            :meth:`weights`; None: it sets none.
        tables: float64[..., N, Q], scores by the balancer's own open flows, likewise.
    """

    uses_ground_truth: bool = False
    uses_features: tuple[str, ...] = ()
    sets_background: bool = False
    sets_tables: bool = False
    background: NDArray[np.float64] | None = None
    tables: NDArray[np.float64] | None = None

    def reset(self, seed: int | None = None) -> None:  # noqa: B027 - most heuristics remember nothing
        """Forget the episode so far; a heuristic that draws restarts its stream from ``seed`` if given."""

    def copy(self) -> Self:
        """An independent policy in the same state."""
        return copy.deepcopy(self)

    @abstractmethod
    def weights(self, features: NDArray[Any], active: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Weights of the servers.

        Args:
            features: float[..., N, 11], or [..., N, 14] with the ground truth, in natural units (not normalized).
            active: bool[..., N], servers that take new flows.

        Returns:
            float64[..., N], finite and above 0. Only their ratios matter to a dispatch rule.
        """

    def for_env(self, env: Any) -> Agent:
        """An agent that acts by this policy on an environment's own observations, in its own actions.

        Args:
            env: a :class:`lbgym.LoadBalanceEnv` or :class:`lbgym.LoadBalanceVectorEnv`, wrapped or not. Wrappers that
                change observations or actions are not undone.

        Raises:
            PolicyError: if the policy needs ground truth and the environment does not show it.
        """
        base = env.unwrapped
        return Agent(self, layout=base.observation_layout, codec=base.action_codec)


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
