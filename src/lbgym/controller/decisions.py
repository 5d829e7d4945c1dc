"""From a snapshot to proposed weights, by whichever kind of policy: :class:`Decider`."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from ..errors import PolicyError
from ..features.columns import GROUND_TRUTH_NAMES, NUM_FEATURES, NUM_GROUND_TRUTH
from ..policies import TRAINED_SUFFIXES, TrainedPolicy, WeightPolicy, load_policy, make_weight_policy
from ..scenarios import Scenario
from ..snapshot import Snapshot


class Decider:
    """A heuristic or a trained model, fitted to the servers of a data plane.

    Args:
        policy: what decides.
        name: what it is called in logs and metrics.
        scenario: what is known of the cluster, None: nothing.

    Attributes:
        servers: N that it is bound to, because it was trained for so many or the cluster has them; None: any.
        step_interval: seconds per step that it was trained with, if recorded.
    """

    def __init__(self, policy: WeightPolicy | TrainedPolicy, name: str, scenario: Scenario | None = None) -> None:
        self.name = name
        self._policy = policy
        self.servers = None if scenario is None else scenario.num_servers
        self.step_interval: float | None = None
        self.uses_ground_truth = False
        if isinstance(policy, TrainedPolicy):
            self.servers = _trained_for(policy) or self.servers
            self.step_interval = policy.step_interval
            self.uses_ground_truth = bool(policy.env_kwargs.get("use_ground_truth", False))
        else:
            self.uses_ground_truth = policy.uses_ground_truth
        self._num_servers = 0

    @classmethod
    def named(cls, policy: str, scenario: Scenario | None = None) -> Decider:
        """The trained model of a file (``.pt``, ``.zip``), or the heuristic of a name.

        Raises:
            PolicyError: for a missing or bad file, or a heuristic that must know the cluster and no scenario.
            UnknownNameError: for another name.
            MissingExtraError: without torch or Stable-Baselines3.
        """
        if policy.lower().endswith(TRAINED_SUFFIXES):
            return cls(load_policy(policy), policy, scenario)
        return cls.heuristic(policy, scenario)

    @classmethod
    def heuristic(cls, name: str, scenario: Scenario | None = None) -> Decider:
        """The heuristic of a name.

        Raises:
            PolicyError: for one that must know the cluster, without a scenario.
            UnknownNameError: for another name.
        """
        return cls(make_weight_policy(name, scenario), name, scenario)

    def fit(self, num_servers: int, *, ground_truth: bool) -> None:
        """Make it decide for so many servers, and forget what it saw.

        Raises:
            PolicyError: if it was trained for others, or needs the ground truth and there is none.
        """
        if self.uses_ground_truth and not ground_truth:
            raise PolicyError(
                f"policy {self.name!r} needs the ground truth ({', '.join(GROUND_TRUTH_NAMES)}), which the data plane "
                "does not publish"
            )
        self._num_servers = num_servers
        if isinstance(self._policy, TrainedPolicy):
            self._layout, self._codec = self._policy.codecs(num_servers)
        self.reset()

    def reset(self) -> None:
        """Forget what was seen."""
        self._policy.reset()

    def __call__(self, snapshot: Snapshot, weights: NDArray[np.float64], info: dict[str, Any]) -> NDArray[np.float64]:
        """The weights it proposes, float64[N].

        Args:
            snapshot: of N servers.
            weights: float64[N], in force.
            info: what the data plane tells beyond the snapshot.

        Raises:
            LbgymError: for an action or weights of the wrong shape or type, not finite, or negative.
            Exception: whatever the policy raises.
        """
        policy = self._policy
        if isinstance(policy, TrainedPolicy):
            observation = self._layout.encode(snapshot.stats, snapshot.ground_truth, snapshot.active)
            about = {
                **info,
                "sequence_id": snapshot.sequence_id,
                "timestamp": snapshot.timestamp,
                "active": snapshot.active.copy(),
                "active_servers": snapshot.active.nonzero()[0].tolist(),
                "weights": weights.copy(),
            }
            return self._codec.to_weights(policy.act(observation, about))
        features = snapshot.stats
        if policy.uses_ground_truth:
            if snapshot.ground_truth is None:
                raise PolicyError(f"policy {self.name!r} needs the ground truth, and this observation has none")
            features = np.concatenate([features, snapshot.ground_truth], axis=-1)
        proposed = np.asarray(policy.weights(features, snapshot.active))
        if proposed.shape != (self._num_servers,) or proposed.dtype.kind not in "fiu":
            raise PolicyError(
                f"policy {self.name!r} must return one number for each of {self._num_servers} servers, got shape "
                f"{proposed.shape} of {proposed.dtype}"
            )
        proposed = proposed.astype(np.float64)
        good = np.isfinite(proposed).all() and (proposed >= 0.0).all()
        if not good or (snapshot.active.any() and not proposed[snapshot.active].any()):
            raise PolicyError(
                f"policy {self.name!r} must return finite weights of at least 0, not 0 for all active servers, got "
                f"{proposed.tolist()}"
            )
        return proposed


def _trained_for(policy: TrainedPolicy) -> int | None:
    """Servers that a model's observation space is for; None: any number."""
    if policy.spaces is None:
        return None
    space: Any = policy.spaces[0]
    if isinstance(space, gymnasium.spaces.Dict):
        space = space["features"]
    shape: tuple[int, ...] = space.shape
    if len(shape) == 2:
        return shape[0]
    # One 0 or 1 and a row of features for each.
    truths = NUM_GROUND_TRUTH if policy.env_kwargs.get("use_ground_truth", False) else 0
    return shape[0] // (1 + NUM_FEATURES + truths)
