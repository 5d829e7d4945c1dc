"""Every balancer an agent, in arrays: :class:`MultiLoadBalanceVectorEnv`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from ..errors import InvalidActionError, InvalidOptionError, InvalidRewardError, ResetNeeded, UnknownNameError
from ..features.columns import FEATURE_NAMES, GROUND_TRUTH_NAMES, NUM_FEATURES
from ..features.columns import column_index as feature_column
from ..scenarios import Scenario, ScenarioDistribution, default_scenario, load_scenario
from ..snapshot import Snapshot
from .observations import ObservationLayout
from .single import whole
from .vector import LoadBalanceVectorEnv

#: How the balancers' rewards come about.
REWARD_SHARINGS = ("mean", "field", "own", "difference")
OFFSETS = ("even", "random")

_Float = NDArray[np.float64]


class MultiLoadBalanceVectorEnv(LoadBalanceVectorEnv):
    """``num_envs`` replicas of m balancers, each of which observes its own flows and sets its own weights.

    The array form of :class:`~lbgym.MultiLoadBalanceEnv`, for trainers that batch: one kernel call steps all replicas
    on all cores. With R replicas, m balancers, N servers and C columns:

    * observations: those of :class:`~lbgym.LoadBalanceEnv` with two leading axes, float32[R, m, N, C] for "matrix";
    * actions: whatever :class:`~lbgym.LoadBalanceEnv` takes with two leading axes, int64[R, m, N] for "discrete",
      int64[R, m] for "joint", float[R, m, N] for the others;
    * rewards: float64[R, m]; ``terminated`` (never) and ``truncated``: bool[R], since all balancers of a replica
      end together;
    * :meth:`state`: float32[R, S] for centralised training;
    * ``info``: as :class:`~lbgym.LoadBalanceVectorEnv` with an axis of balancers, such as ``weights`` float64[R, m, N]
      and ``completed`` int64[R, m]. The FCT statistics are of all balancers' flows and the same for each. In SAME_STEP
      mode ``final_state`` float32[R, S] holds the last states of the episodes that ended. Where balancers do not act
      at once, ``weights_in_force`` float64[R, m, N] at the end of the step and ``action_delay`` float64[R, m], seconds
      from the observation to when the weights of this step's action come into force.

    Seeds, options of ``reset`` and autoreset are those of :class:`~lbgym.LoadBalanceVectorEnv`; ``single_*_space`` is
    that of one replica, ``agent_observation_space`` and ``agent_action_space`` of one balancer.

    **Rewards.** With the field of a fairness reward (say, flow duration) of server j at balancer b called l_bj:

    * "mean" (default): everybody gets the mean over the balancers of their own rewards F(l_b);
    * "field": everybody gets the reward G = F(mean over b of l_b) of the mean field;
    * "own": each gets F(l_b);
    * "difference": each gets G - G_b, where G_b is the reward of the mean over the *other* balancers' fields. It is the
      Wonderful Life Utility of Wolpert and Tumer (Advances in Complex Systems 4, 2001), with what balancer b *observes*
      taken out of the field: exact, and computed from what is known. It is not the world without b's actions: b's
      flows are still on the servers and in what the others observe, which only a second simulation could undo, and so
      G_b is not quite independent of what b does. Nor is it the Aristocrat Utility, which averages over the actions b
      might have taken. Service rewards count all flows together and leave nothing to take out, so they are refused.

    Service rewards and ground truth are of the cluster, so the first three sharings give everybody the same. A mean
    over balancers is one over those that have the server in service.

    **Asynchrony.** All balancers observe at the same instants, the ends of steps. The weights of the action that
    answers an observation come into force ``action_offsets`` (when the balancer acts) plus ``action_delay`` (until the
    data plane has it) seconds after it; until then, also across steps, the former ones hold. Weights that would come
    into force after newer ones are dropped. Both 0: everybody acts at once, at no cost. Flows, seeds and statistics do
    not change by it: drawn offsets and delays come from a generator of their own.

    Args:
        num_envs: replicas.
        num_balancers: m; None: the scenario's, or 2 without a scenario.
        reward_sharing: one of ``REWARD_SHARINGS``.
        action_offsets: seconds in [0, ``step_interval``): a number, one per balancer, "even" (b / m of the interval) or
            "random" (drawn uniformly for each balancer at the beginning of an episode).
        action_delay: seconds: a number, one per balancer, or ``{"low": ..., "high": ...}`` to draw uniformly for each
            balancer and step.
        autoreset_mode, num_threads: as :class:`~lbgym.LoadBalanceVectorEnv`.
        keys: those of :class:`~lbgym.LoadBalanceEnv`. A callable ``reward_type`` is given a batched snapshot and
            returns float[...] over its leading axes: [R, m] for each balancer's own view, [R] for the mean field.

    Raises:
        UnknownNameError, InvalidOptionError: as the single environment.
        InvalidRewardError: for a service or ground-truth reward with reward_sharing="difference".
    """

    def __init__(
        self,
        num_envs: int = 1,
        *,
        num_balancers: int | None = None,
        reward_sharing: str = "mean",
        action_offsets: float | Sequence[float] | str = 0.0,
        action_delay: float | Sequence[float] | Mapping[str, float] = 0.0,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        num_threads: int | None = None,
        **keys: Any,
    ) -> None:
        if reward_sharing not in REWARD_SHARINGS:
            raise UnknownNameError("reward sharing", reward_sharing, REWARD_SHARINGS)
        self.num_balancers = self._settle_balancers(num_balancers, keys)
        super().__init__(num_envs, autoreset_mode=autoreset_mode, num_threads=num_threads, **keys)
        r, m, n = self.num_envs, self.num_balancers, self.num_servers
        reward = self._setup.reward
        if reward_sharing == "difference":
            if m == 1:
                raise InvalidOptionError("reward_sharing='difference' needs at least 2 balancers, got 1")
            if reward.needs_service or reward.needs_ground_truth:
                raise InvalidRewardError(
                    f"reward {reward.description!r} with reward_sharing='difference': it looks at what is the same for "
                    "all balancers, so none makes a difference; use a fairness reward of a feature"
                )
        self.reward_sharing = reward_sharing
        self.agent_observation_space = self.single_observation_space
        self.agent_action_space = self.single_action_space
        self.single_observation_space = batch_space(self.agent_observation_space, m)
        self.single_action_space = batch_space(self.agent_action_space, m)
        self.observation_space = batch_space(self.single_observation_space, r)
        self.action_space = batch_space(self.single_action_space, r)
        self._state_layout = ObservationLayout(
            n, "matrix", normalize=self.observation_layout.normalize, use_ground_truth=self._has_ground_truth
        )
        #: Box(S,), the space of :meth:`state` of one replica.
        self.state_space = self._make_state_space()
        self._timing = _Timing(action_offsets, action_delay, r, m, self._setup.step_interval)
        self._delays: _Float = np.zeros((r, m))
        self._rewards = np.zeros((r, m))
        self._weights = np.ones((r, m, n))

    def _settle_balancers(self, num_balancers: int | None, keys: dict[str, Any]) -> int:
        """The number of balancers; gives the scenario in ``keys`` as many."""
        if num_balancers is not None:
            num_balancers = whole("num_balancers", num_balancers)
        if keys.get("scenario") is not None:
            scenario = load_scenario(keys["scenario"])
            num_balancers = num_balancers or scenario.balancers
        else:
            servers = keys.get("num_servers")
            scenario = default_scenario(4 if servers is None else whole("num_servers", servers))
            num_balancers = num_balancers or 2
        keys["scenario"] = _behind(scenario, num_balancers)
        return num_balancers

    # Centralised training

    @property
    def state_names(self) -> tuple[str, ...]:
        """What each of the S numbers of :meth:`state` is, such as "server_3/cpu_usage" or "lb_0/server_3/fct_mean"."""
        servers = [f"server_{j}" for j in range(self.num_servers)]
        truth = GROUND_TRUTH_NAMES if self._has_ground_truth else ()
        return (
            *(f"{server}/active" for server in servers),
            *(f"{server}/{name}" for server in servers for name in truth),
            *(f"lb_{b}/{s}/{name}" for b in range(self.num_balancers) for s in servers for name in FEATURE_NAMES),
        )

    def state(self) -> NDArray[np.float32]:
        """All that a central trainer may know of each replica now, float32[R, S], in a fresh array.

        For N servers: 0/1 whether each is in service; its CPU use, memory use and busy workers; then, balancer by
        balancer, the N x 11 features it observes. S = 4 N + 11 m N; :attr:`state_names` has them one by one. Values are
        flows and seconds, or with ``normalize`` on the scale of the observations.

        Raises:
            ResetNeeded: before the first reset.
        """
        if self._snapshot is None:
            raise ResetNeeded("call reset() before state(): there is nothing to know yet")
        view = self._snapshot
        everything = self._state_layout.encode(view.stats, view.ground_truth, view.active)
        return np.concatenate(
            [
                view.active.any(axis=1),
                everything[:, 0, :, NUM_FEATURES:].reshape(self.num_envs, -1),
                everything[..., :NUM_FEATURES].reshape(self.num_envs, -1),
            ],
            axis=-1,
            dtype=np.float32,
        )

    _has_ground_truth = True

    def _make_state_space(self) -> spaces.Box:
        matrix = self._state_layout.space
        assert isinstance(matrix, spaces.Box)
        features = np.tile(matrix.high[:, :NUM_FEATURES].ravel(), self.num_balancers)
        high = np.concatenate([np.ones(self.num_servers), matrix.high[:, NUM_FEATURES:].ravel(), features])
        return spaces.Box(np.zeros(len(high), np.float32), high.astype(np.float32), dtype=np.float32)

    # What differs from one balancer

    def _scenario_with(self, options: Mapping[str, Any]) -> Scenario | ScenarioDistribution | None:
        scenario = super()._scenario_with(options)
        assert scenario is not None
        return _behind(scenario, self.num_balancers)

    def _to_weights(self, actions: Any) -> _Float:
        r, m = self.num_envs, self.num_balancers
        try:
            array = np.asarray(actions)
        except (ValueError, TypeError) as error:
            raise InvalidActionError(f"actions must be an array, got {actions!r}") from error
        expected = (r, m, *(self.agent_action_space.shape or ()))
        if array.shape != expected:
            raise InvalidActionError(f"actions must have shape {expected}, got shape {array.shape}")
        weights = self.action_codec.to_weights(array.reshape(r * m, *expected[2:]), r * m)
        return weights.reshape(r, m, self.num_servers)

    def _draw_seeds(self, mask: NDArray[np.bool_]) -> list[int]:
        seeds = super()._draw_seeds(mask)
        self._timing.begin(mask, seeds)
        return seeds

    def _run(self, weights: _Float, **again: Any) -> Snapshot:
        interval = self._setup.step_interval
        if not self._timing.asynchronous:
            return self._simulation.step(weights, interval, **again)
        reset = again.get("reset")
        self._delays = self._timing.delays(self._all if reset is None else ~reset)
        return self._simulation.step(weights, interval, delays=self._delays, **again)

    def _begin(self, mask: NDArray[np.bool_]) -> None:
        super()._begin(mask)
        self._delays = np.where(mask[:, None], 0.0, self._delays)

    def _view(self, batch: Snapshot) -> Snapshot:
        """What each balancer sees: an axis of balancers after that of replicas everywhere."""
        m = self.num_balancers

        def each(part: Any) -> Any:
            return None if part is None else np.broadcast_to(part[:, None], (len(part), m, *part.shape[1:]))

        parts = {name: each(getattr(batch, name)) for name in Snapshot.__slots__ if name not in ("active", "stats")}
        return Snapshot(active=np.repeat(batch.active[:, None], m, axis=1), stats=batch.stats, **parts)

    def _reward(self, snapshot: Snapshot) -> _Float:
        return shared_rewards(self._setup.reward, snapshot, self.reward_sharing)

    def _info(self, snapshot: Snapshot, mask: NDArray[np.bool_]) -> dict[str, Any]:
        info = super()._info(snapshot, mask)
        if self._timing.asynchronous:
            info |= {"weights_in_force": self._simulation.weights_in_force(), "action_delay": self._delays.copy()}
            info |= {"_weights_in_force": mask.copy(), "_action_delay": mask.copy()}
        return info

    def _facts(self, mask: NDArray[np.bool_]) -> dict[str, Any]:
        facts = super()._facts(mask)
        m = self.num_balancers
        return {key: x if key.startswith("_") else np.repeat(x[:, None], m, axis=1) for key, x in facts.items()}

    def _reset_at_once(
        self, ended: NDArray[np.bool_], observation: Any, info: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        state = self.state()
        observation, info = super()._reset_at_once(ended, observation, info)
        return observation, info | {"final_state": state, "_final_state": ended.copy()}

    def _shown(self, snapshot: Snapshot, i: int) -> Snapshot:
        """The cluster as all balancers see it together: their open flows added up, their times averaged."""
        one = snapshot.part(slice(i, i + 1))
        field = mean_field(one).part(0)
        column = feature_column("n_flow_on")
        field.stats[:, column] = one.stats[0, ..., column].sum(axis=0)
        return field


def _behind(scenario: Scenario | ScenarioDistribution, num_balancers: int) -> Scenario | ScenarioDistribution:
    """The scenario with that many balancers; itself if it has them."""
    return scenario if scenario.balancers == num_balancers else scenario.with_changes(balancers=num_balancers)


# Rewards


def shared_rewards(reward: Callable[[Snapshot], Any], views: Snapshot, sharing: str) -> _Float:
    """Every balancer's reward, float64[R, m], from what each sees (a snapshot with leading axes [R, m])."""
    if sharing in ("mean", "own"):
        own = np.asarray(reward(views), np.float64)
        return own if sharing == "own" else np.repeat(own.mean(axis=1, keepdims=True), own.shape[1], axis=1)
    together = np.asarray(reward(mean_field(views)), np.float64)[:, None]
    if sharing == "field":
        return np.repeat(together, views.stats.shape[1], axis=1)
    return together - np.asarray(reward(_field_of_others(views)), np.float64)


def mean_field(views: Snapshot) -> Snapshot:
    """The mean of what the balancers see (leading axes [R, m]), with leading axis [R]; the rest is of balancer 0."""
    count = views.active.sum(axis=1)
    field = views.part((slice(None), 0))
    field.stats = views.stats.sum(axis=1, dtype=np.float64) / np.maximum(count, 1)[..., None]
    field.active = count > 0
    return field


def _field_of_others(views: Snapshot) -> Snapshot:
    """For each balancer the mean of what the others see, with leading axes [R, m]."""
    count = _sum_of_others(views.active.astype(np.int64))
    others = views.part(...)
    others.stats = _sum_of_others(views.stats.astype(np.float64)) / np.maximum(count, 1)[..., None]
    others.active = count > 0
    return others


def _sum_of_others(parts: NDArray[Any]) -> NDArray[Any]:
    """Over axis 1, the sum without each entry; added up from both ends, since differences of sums can fall below 0."""
    before, after = np.zeros_like(parts), np.zeros_like(parts)
    np.cumsum(parts[:, :-1], axis=1, out=before[:, 1:])
    np.cumsum(parts[:, :0:-1], axis=1, out=after[:, -2::-1])
    return before + after


# Asynchrony


class _Timing:
    """How long after an observation the weights that answer it come into force.

    Args:
        offsets, delay: as the environment takes them.
        num_envs: R.
        num_balancers: m.
        interval: seconds per step.

    Attributes:
        asynchronous: whether that is ever anything but 0.
    """

    def __init__(
        self,
        offsets: float | Sequence[float] | str,
        delay: float | Sequence[float] | Mapping[str, float],
        num_envs: int,
        num_balancers: int,
        interval: float,
    ) -> None:
        self._shape = num_envs, num_balancers
        self._interval = interval
        self._random = False
        if isinstance(offsets, str):
            if offsets not in OFFSETS:
                raise UnknownNameError("value of action_offsets", offsets, OFFSETS)
            self._random = offsets == "random"
            row = np.arange(num_balancers) * (interval / num_balancers) * (not self._random)
        else:
            row = _seconds("action_offsets", offsets, num_balancers)
            if not row.max() < interval:
                raise InvalidOptionError(
                    f"action_offsets must be below the step_interval of {interval:g} s, got {offsets!r}; "
                    "an action_delay may be longer"
                )
        self._offsets = np.tile(row, (num_envs, 1))
        if isinstance(delay, Mapping):
            if set(delay) != {"low", "high"}:
                raise InvalidOptionError(f'action_delay takes the keys "low" and "high", got {dict(delay)!r}')
            self._low, self._high = (_seconds(f"action_delay {key}", delay[key], 1)[0] for key in ("low", "high"))
            if self._low > self._high:
                raise InvalidOptionError(f"action_delay low must be at most high, got {dict(delay)!r}")
            self._delay = np.full(num_balancers, self._low)
        else:
            self._delay = _seconds("action_delay", delay, num_balancers)
            self._low = self._high = 0.0
        self._drawn = self._low < self._high
        self.asynchronous = bool(self._random or self._drawn or self._offsets.any() or self._delay.any())
        self._generators: list[np.random.Generator | None] = [None] * num_envs

    def begin(self, mask: NDArray[np.bool_], seeds: Sequence[int]) -> None:
        """Begin episodes of the masked replicas, with the seeds of their flows."""
        if not (self._random or self._drawn):
            return
        for i in np.flatnonzero(mask).tolist():
            # Other words than the simulator's, so that timing and flows are independent.
            generator = self._generators[i] = np.random.default_rng([seeds[i], 0xA5])
            if self._random:
                self._offsets[i] = generator.uniform(0.0, self._interval, self._shape[1])

    def delays(self, mask: NDArray[np.bool_]) -> _Float:
        """Float64[R, m] seconds for this step; draws for the masked replicas only."""
        delays = self._offsets + self._delay
        if self._drawn:
            for i in np.flatnonzero(mask).tolist():
                generator = self._generators[i]
                assert generator is not None
                delays[i] = self._offsets[i] + generator.uniform(self._low, self._high, self._shape[1])
        return delays


def _seconds(name: str, value: Any, count: int) -> _Float:
    """Float64[count] from a number or one per balancer."""
    try:
        array = np.asarray(value, np.float64) if not isinstance(value, (str, bool)) else None
    except (TypeError, ValueError):
        array = None
    if array is None or array.shape not in ((), (count,)):
        many = f" or {count} of them, one per balancer" if count > 1 else ""
        raise InvalidOptionError(f"{name} must be a number of seconds{many}, got {value!r}")
    if not all(math.isfinite(x) and x >= 0.0 for x in array.ravel().tolist()):
        raise InvalidOptionError(f"{name} must be finite and at least 0 seconds, got {value!r}")
    return np.broadcast_to(array, count).copy()


__all__ = ["REWARD_SHARINGS", "MultiLoadBalanceVectorEnv", "mean_field", "shared_rewards"]
