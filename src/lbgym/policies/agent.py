"""The agent: a policy with its observation layout and action codec, from snapshots to weights."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ..env.actions import ActionCodec
from ..env.info import step_info
from ..env.observations import ObservationLayout
from ..errors import PolicyError
from ..features.columns import FEATURE_NAMES, GROUND_TRUTH_NAMES
from ..scenarios import Configured
from ..snapshot import Snapshot
from .trained import TrainedPolicy

if TYPE_CHECKING:
    from ..scenarios import Scenario
    from .base import WeightPolicy


@runtime_checkable
class Policy(Protocol):
    """Maps observations to actions.

    Observations and actions are those of the environment that the policy was made for; ``info`` is that environment's.
    """

    def reset(self, seed: int | None = None) -> None:
        """Forget the episode so far; call it at the start of every episode.

        Args:
            seed: restart the stream of a policy that draws its actions; None: leave the seed as it is.
        """

    def act(self, observation: Any, info: dict[str, Any]) -> Any:
        """The action for one observation."""

    def copy(self) -> Policy:
        """An independent policy with the same parameters: acting with one does not change the other."""


class Agent:
    """A policy with its observation layout and action codec.

    Evaluation, the controller and any other driver of a data plane call it with snapshots and get weights:

        agent = make_agent("latency", num_servers=4)
        weights = agent(snapshot, weights)

    A :class:`~lbgym.policies.WeightPolicy` reads the features and sets the weights as they are. A trained policy gets
    the observations, and gives the actions, of the environment that it was trained on.

    In an environment, with the environment's layout and codec, an agent is a :class:`Policy` itself: :meth:`act`. The
    codec scales a heuristic's weights into the range of the action space before it takes the nearest action, since only
    their ratios matter to a dispatch rule; ratios beyond that range are cut off.

    Args:
        policy: sets the weights.
        num_servers: N of the data plane, as by :meth:`fit`; None: as ``layout`` has, or call :meth:`fit` later.
        layout: observations of the environment to act in; None: the trained policy's.
        codec: actions of the environment to act in; None: the trained policy's.
        servers: servers that the policy is made for, the first of the data plane's; None: a trained policy's own, or
            any number.
        scenario: what the operator states of the cluster, for a trained policy that is shown it or acts relative to it;
            None: nothing is known.
        name: in logs and errors; None: the class of the policy.

    Attributes:
        policy: as given.
        layout: the observation layout; None for a heuristic outside an environment.
        codec: the action codec; None likewise.
        name: as given.
        servers: number of servers that the policy is made for; None: any.
        num_servers: N of the data plane that it is fitted to; None before :meth:`fit`.
        uses_ground_truth: whether the policy reads the ground truth.
        uses_features: the features that the policy reads.
        background: background loads that go with the weights of the last call, float64[N]; None: the policy sets none.
        tables: tables of scores that go with them, float64[N, Q]; None likewise.
        weights_only: whether the background loads that the policy sets are left out, as the data plane has no index.

    Raises:
        PolicyError: if the policy does not fit so many servers, or needs ground truth that ``layout`` does not show.
    """

    def __init__(
        self,
        policy: Policy | WeightPolicy,
        num_servers: int | None = None,
        *,
        layout: ObservationLayout | None = None,
        codec: ActionCodec | None = None,
        servers: int | None = None,
        scenario: Scenario | None = None,
        name: str | None = None,
    ) -> None:
        self.layout, self.codec = layout, codec
        self.background: NDArray[np.float64] | None = None
        self.tables: NDArray[np.float64] | None = None
        self.weights_only = False
        self._scenario = scenario
        self.name = type(policy).__name__ if name is None else name
        self.servers = servers
        self.num_servers: int | None = None
        self._set_policy(policy)
        if self._trained is not None:
            self.servers = self._trained.num_servers or servers
            self.uses_ground_truth = self._trained.uses_ground_truth
            self.uses_features = self._trained.uses_features
        elif self._heuristic is not None:
            self.uses_ground_truth = self._heuristic.uses_ground_truth
            self.uses_features = self._heuristic.uses_features
        else:
            self.uses_ground_truth = layout is not None and layout.use_ground_truth
            self.uses_features = () if layout is None else layout.features
        if layout is not None and self.uses_ground_truth and not layout.use_ground_truth:
            raise PolicyError(
                f"{self.name} needs the ground truth ({', '.join(GROUND_TRUTH_NAMES)}), which the environment does not "
                "show: make it with use_ground_truth=True"
            )
        if layout is not None and (absent := [name for name in self.uses_features if name not in layout.features]):
            raise PolicyError(
                f"{self.name} needs {', '.join(absent)}, which the environment does not show: it has features="
                f"{list(layout.features)}"
            )
        if layout is not None and self._heuristic is not None:
            more = "tables of scores" if self._heuristic.sets_tables else "background loads"
            if self._heuristic.sets_tables or self._heuristic.sets_background:
                raise PolicyError(
                    f"{self.name} sets {more}, which a heuristic cannot in an environment: evaluate it with "
                    "lbgym.evaluation.compare"
                )
        if num_servers is None and layout is not None:
            num_servers = layout.num_servers
        if num_servers is not None:
            self.fit(num_servers)

    @property
    def reads_configured(self) -> bool:
        """True if a trained policy is shown what an operator configures, or acts relative to it."""
        if self._trained is None or self.layout is None or self.codec is None:
            return False
        return self.layout.observe_configured or self.codec.needs_configured

    @property
    def dispatch(self) -> str | None:
        """The dispatch rule that the policy was trained with, if other than the scenario's own."""
        return None if self._trained is None else self._trained.dispatch

    @property
    def step_interval(self) -> float | None:
        """Seconds per step that the policy was trained with, if recorded."""
        return None if self._trained is None else self._trained.step_interval

    def fit(
        self,
        num_servers: int,
        *,
        features: Collection[str] = FEATURE_NAMES,
        ground_truth: bool = True,
        index: bool = True,
        tables: bool = True,
    ) -> None:
        """Decide for the servers of a data plane from now on, and forget the episode so far.

        Args:
            num_servers: N of the data plane.
            features: those that the data plane measures, and perhaps other columns.
            ground_truth: whether the data plane publishes it.
            index: whether the data plane dispatches by an index. A trained policy whose weights make sense by
                themselves then sets these alone: :attr:`weights_only`.
            tables: whether it takes tables of scores.

        Raises:
            PolicyError: if the policy does not fit so many servers, or needs features, ground truth or an index and
                there are none.
        """
        self.check_features(features)
        if self.uses_ground_truth and not ground_truth:
            raise PolicyError(
                f"policy {self.name!r} needs the ground truth ({', '.join(GROUND_TRUTH_NAMES)}), which the data plane "
                "does not publish"
            )
        if self._trained is not None:
            layout, self.codec = self._trained.codecs(num_servers)
            # What it can do without is 0, whatever the data plane has there.
            self.layout = layout.without([name for name in layout.features if name not in features])
            self.layout.configured = self.codec.configured = Configured.of(self._scenario, num_servers)
        elif self.layout is not None and self.layout.num_servers != num_servers:
            raise PolicyError(
                f"the layout of agent {self.name!r} is for {self.layout.num_servers} servers, the data plane has "
                f"{num_servers}"
            )
        self.weights_only = False
        if self.codec is not None and self.codec.sets_background and not index:
            self.weights_only = self._trained is not None and self._trained.weights_alone
            if not self.weights_only:
                raise PolicyError(
                    f"policy {self.name!r} sets background loads (action_type 'index'), but the data plane takes "
                    "weights only"
                )
        if self._heuristic is not None and self._heuristic.sets_background and not index:
            raise PolicyError(f"policy {self.name!r} sets background loads, but the data plane takes weights only")
        if self._heuristic is not None and self._heuristic.sets_tables and not tables:
            raise PolicyError(f"policy {self.name!r} sets tables of scores, which the data plane does not take")
        self.num_servers = num_servers
        self.reset()

    def check_features(self, features: Collection[str]) -> None:
        """Refuse a data plane that does not measure what the policy reads.

        Args:
            features: those that it measures, and perhaps other columns.

        Raises:
            PolicyError: naming the others.
        """
        if absent := [name for name in self.uses_features if name not in features]:
            measured = [name for name in FEATURE_NAMES if name in features]
            raise PolicyError(
                f"policy {self.name!r} needs {', '.join(absent)}, which the data plane does not measure; take a policy "
                f"that needs only {', '.join(measured) or 'nothing'}, such as one trained with features={measured}"
            )

    def reset(self, seed: int | None = None) -> None:
        """Begin an episode: forget the last one, and restart the stream of drawn actions from ``seed`` if given."""
        self.background = self.tables = None
        # A policy of the user's own that never draws need not take a seed.
        if seed is None:
            self.policy.reset()
        else:
            self.policy.reset(seed)

    def copy(self) -> Agent:
        """An independent agent with the same parameters, for another balancer."""
        twin = copy.copy(self)
        twin._set_policy(self.policy.copy())
        return twin

    def _set_policy(self, policy: Policy | WeightPolicy) -> None:
        """Keep a policy by the way it acts: on observations, or on features."""
        self.policy = policy
        acts = callable(getattr(policy, "act", None))
        self._policy = cast(Policy, policy) if acts else None
        self._heuristic = None if acts else cast("WeightPolicy", policy)
        self._trained = policy if isinstance(policy, TrainedPolicy) else None

    def act(self, observation: Any, info: dict[str, Any]) -> Any:
        """The action for one observation of the agent's environment, or a batch of actions for a batch.

        Raises:
            PolicyError: for a heuristic without layout and codec.
        """
        if self._policy is not None:
            return self._policy.act(observation, info)
        if self.layout is None or self.codec is None or self._heuristic is None:
            raise PolicyError(f"agent {self.name!r} has no observation layout and action codec: make it with for_env")
        features, active = self.layout.decode(observation)
        return self.codec.encode(self._heuristic.weights(features, active))

    def __call__(
        self, snapshot: Snapshot, weights: NDArray[np.float64], info: Mapping[str, Any] | None = None
    ) -> NDArray[np.float64]:
        """Weights for what a balancer sees.

        Args:
            snapshot: of N servers.
            weights: float64[N], in force.
            info: what the data plane reports beside the snapshot; a policy on observations gets it, too.

        Returns:
            float64[N], finite and at least 0; servers beyond those that the policy is made for keep their weights.

        Raises:
            LbgymError: for an action or weights of a wrong shape or type, not finite, or negative.
            PolicyError: without ground truth that the policy needs, or before :meth:`fit`.
        """
        if self.num_servers is None:
            raise PolicyError(f"agent {self.name!r} does not know the number of servers: call fit() first")
        if self._heuristic is not None:
            return self._weights_of(self._heuristic, snapshot, weights)
        assert self._policy is not None
        if self.layout is None or self.codec is None:
            raise PolicyError(
                f"policy {self.name!r} records no environment: give its agent an observation layout and an action codec"
            )
        observation = self.layout.encode(
            snapshot.stats, snapshot.ground_truth, snapshot.active, weights, self.background
        )
        action = self._policy.act(observation, {**(info or {}), **step_info(snapshot, weights)})
        self.background = None if self.weights_only else self.codec.to_background(action)
        return self.codec.to_weights(action)

    def index(self, weights: NDArray[np.float64]) -> NDArray[np.float64] | None:
        """What goes with float64[N] weights to a live data plane that dispatches by index, float64[N, 2].

        Each server's speed per core and background load; None if the policy sets no background loads.
        """
        if self.background is None:
            return None
        return Configured.of(self._scenario, len(weights)).index(weights, self.background)

    def _weights_of(
        self, heuristic: WeightPolicy, snapshot: Snapshot, weights: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        features, n = snapshot.stats, self.servers or len(snapshot.active)
        if heuristic.uses_ground_truth:
            if snapshot.ground_truth is None:
                raise PolicyError(f"policy {self.name!r} needs the ground truth, and this observation has none")
            features = np.concatenate([features, snapshot.ground_truth], axis=-1)
        active = snapshot.active[:n]
        proposed = np.asarray(heuristic.weights(features[:n], active))
        if proposed.shape != active.shape or proposed.dtype.kind not in "fiu":
            raise PolicyError(
                f"policy {self.name!r} must return one number for each of {len(active)} servers, got shape "
                f"{proposed.shape} of {proposed.dtype}"
            )
        proposed = proposed.astype(np.float64)
        good = np.isfinite(proposed).all() and (proposed >= 0.0).all()
        if not good or (active.any() and not proposed[active].any()):
            raise PolicyError(
                f"policy {self.name!r} must return finite weights of at least 0, not 0 for all active servers, got "
                f"{proposed.tolist()}"
            )
        beyond = len(snapshot.active) - n
        self.background, self.tables = (
            part if part is None or beyond <= 0 else np.concatenate([part, np.zeros((beyond, *part.shape[1:]))])
            for part in (heuristic.background, heuristic.tables)
        )
        return proposed if beyond <= 0 else np.concatenate([proposed, weights[n:]])
