"""The environment of one balancer: :class:`LoadBalanceEnv`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
from gymnasium.utils import seeding
from numpy.typing import NDArray

from ..errors import InvalidOptionError, InvalidRewardError, ResetNeeded, UnknownNameError
from ..scenarios import DISPATCH_RULES, Scenario, ScenarioDistribution, default_scenario, load_scenario
from ..snapshot import Snapshot
from .actions import make_action_codec
from .observations import ObservationLayout
from .rendering import RENDER_MODES, Viewer
from .rewards import make_reward

if TYPE_CHECKING:
    from ..dataplanes import SharedMemoryDataPlane


def whole(name: str, value: Any) -> int:
    """A count given by the user, at least 1."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise InvalidOptionError(f"{name} must be a whole number of at least 1, got {value!r}")
    return int(value)


class Setup:
    """The keys of an environment, checked, and what they stand for. Shared by the single and the vector form.

    Args:
        live: whether the data plane is a real one, with ``num_servers`` servers. The scenario then is what is known of
            its cluster, and None if nothing is.

    Attributes:
        source: the scenario of every episode, or the distribution that each draws its own from; None if nothing is
            known of a live cluster.
        scenario: the scenario, if there is one for all episodes.
        distribution: the distribution, if there is one.
        shape: a scenario as large as any that may be drawn; None as ``source``.
        horizon: seconds of an episode.

    Raises:
        UnknownNameError: for an unknown name of an action type, layout, reward, field, dispatch rule, render mode or
            scenario.
        InvalidOptionError: for a value out of its range.
    """

    def __init__(
        self,
        *,
        num_servers: int | None = None,
        action_type: str = "discrete",
        action_weights: Sequence[float] = (1.0, 1.5, 2.0),
        min_weight: float = 0.1,
        max_weight: float = 10.0,
        step_interval: float = 0.25,
        reward_type: str | Mapping[str, float] | Callable[[Snapshot], Any] = "jain",
        reward_field: str = "flow_duration_avg_decay",
        max_steps: int = 10_000,
        max_episode_steps: int | None = None,
        use_ground_truth: bool = False,
        observation: str = "matrix",
        normalize: bool = False,
        scenario: Scenario | ScenarioDistribution | str | PathLike[str] | None = None,
        dispatch: str | None = None,
        render_mode: str | None = None,
        live: bool = False,
    ) -> None:
        if num_servers is not None:
            num_servers = whole("num_servers", num_servers)
        self.source: Scenario | ScenarioDistribution | None = None
        if scenario is not None:
            self.source = load_scenario(scenario)
        elif not live:
            self.source = default_scenario(num_servers or 4)
        self.distribution = self.source if isinstance(self.source, ScenarioDistribution) else None
        self.scenario = None if isinstance(self.source, ScenarioDistribution) else self.source
        self.shape = self.scenario if self.distribution is None else self.distribution.reference
        if self.distribution is not None:
            if live:
                raise InvalidOptionError(
                    f"scenario {self.distribution.name!r} is a distribution, but the cluster of a live data plane is "
                    "not drawn; give the scenario that describes it, or none"
                )
            if num_servers is not None and num_servers < self.distribution.max_servers:
                raise InvalidOptionError(
                    f"num_servers={num_servers}, but distribution {self.distribution.name!r} draws up to "
                    f"{self.distribution.max_servers} servers; leave num_servers out, or give at least as many"
                )
        elif self.scenario is not None and num_servers not in (None, self.scenario.num_servers):
            raise InvalidOptionError(
                f"num_servers={num_servers}, but scenario {self.scenario.name!r} has {self.scenario.num_servers} "
                "servers; leave num_servers out, or give it no scenario"
            )
        if dispatch is not None and dispatch not in DISPATCH_RULES:
            raise UnknownNameError("dispatch rule", dispatch, DISPATCH_RULES)
        if dispatch is not None and live:
            raise InvalidOptionError(
                f"dispatch={dispatch!r} with shm_name: a live data plane is configured with its own dispatch rule"
            )
        if isinstance(step_interval, bool) or not isinstance(step_interval, (int, float, np.integer, np.floating)):
            raise InvalidOptionError(f"step_interval must be a number of seconds above 0, got {step_interval!r}")
        if not (math.isfinite(step_interval) and step_interval > 0.0):
            raise InvalidOptionError(f"step_interval must be finite and above 0 seconds, got {step_interval!r}")
        if render_mode is not None and render_mode not in RENDER_MODES:
            raise UnknownNameError("render mode", render_mode, RENDER_MODES)
        self.max_steps = whole("max_steps", max_steps)
        if max_episode_steps is not None:
            self.max_steps = min(self.max_steps, whole("max_episode_steps", max_episode_steps))
        if num_servers is None:
            assert self.shape is not None
            num_servers = self.shape.num_servers
        self.num_servers = num_servers
        self.dispatch = dispatch
        self.step_interval = float(step_interval)
        self.horizon = self.max_steps * self.step_interval
        self.render_mode = render_mode
        self.codec = make_action_codec(
            self.num_servers,
            action_type,
            action_weights=action_weights,
            min_weight=min_weight,
            max_weight=max_weight,
        )
        self.layout = ObservationLayout(
            self.num_servers, observation, normalize=normalize, use_ground_truth=use_ground_truth
        )
        self.reward = make_reward(reward_type, reward_field)
        if live and self.reward.needs_service:
            raise InvalidRewardError(
                f"reward_type={reward_type!r} looks at the FCT of every flow in a step, which a live data plane does "
                "not publish; use a fairness reward or a function of the Snapshot"
            )

    def viewer(self, scenario: Scenario | None) -> Viewer | None:
        """What draws ``scenario`` in the environment's render mode, if it has one."""
        if self.render_mode is None:
            return None
        return Viewer(self.render_mode, scenario, dispatch=self.dispatch)


def check_seed(seed: Any) -> None:
    """Refuse what cannot be a seed, in the words of this package."""
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0):
        raise InvalidOptionError(f"seed must be a whole number of at least 0, or None, got {seed!r}")


class LoadBalanceEnv(gymnasium.Env[Any, Any]):
    """Set the weights of N servers once per interval; the data plane places every flow by them.

    **Observation**: per server 11 features (``lbgym.features.FEATURE_NAMES``: open flows; mean, 90th percentile,
    standard deviation, decayed mean and decayed 90th percentile of flow completion time and of flow duration,
    seconds), with ``use_ground_truth`` 3 more (CPU use, memory use, busy workers). Layouts: see
    :class:`~lbgym.env.observations.ObservationLayout`.

    **Action**: "discrete" ``MultiDiscrete([K] * N)`` into ``action_weights``; "joint" ``Discrete(K ** N)``, at most
    4,096; "continuous" ``Box(min_weight, max_weight, (N,))``; "normalized" ``Box(-1, 1, (N,))``, mapped by logarithm.
    Continuous actions are clipped to their bounds; anything else that does not fit is an error.

    **Reward**: ``reward_type`` of ``reward_field`` over the active servers (:mod:`lbgym.rewards`): a name, a mapping
    of names to weights, or a function of the :class:`~lbgym.Snapshot`.

    **End**: balancing load never ends by itself, so ``terminated`` is always False; ``truncated`` after ``max_steps``
    steps.

    **Info**: ``sequence_id``, ``timestamp`` (s), ``active_servers`` bool[N], ``weights`` float64[N], and of the flows
    that ended during the step ``completed``, ``rejected`` (or failed), ``fct_mean``, ``fct_p50``, ``fct_p90``,
    ``fct_p99`` (s; a rejected flow counts with the scenario's ``reject_timeout``).

    On a scenario with several balancers the environment sees balancer 0, and its weights go to all.

    **Domain randomisation**: with a distribution (:class:`~lbgym.scenarios.ScenarioDistribution`) as its scenario,
    every episode draws its own from the episode's seed: servers, load, workload, dispatch rule, events. N is the
    largest number of servers; those an episode does not have are inactive from the start: mask 0, zero rows, no flows,
    no part in the reward, whatever their weights. ``reset`` then tells also ``server_cores`` int64[N] and
    ``server_speeds`` float64[N], 0 where there is no server, ``load`` and ``rate`` (flows/s).

    **Live**: with ``shm_name`` the environment drives the data plane that publishes in that region of shared memory, in
    real time. It attaches at construction. A step writes the weights and waits for the observation one interval on;
    ``info`` then also has what :class:`~lbgym.dataplanes.SharedMemoryDataPlane` tells (which action the observation
    reflects and how long that took, missed deadlines, restarts). ``reset`` begins an episode and changes nothing. The
    FCT quantiles of a step are unknown, and so are rewards made of them.

    Args:
        num_servers: N of the built-in scenario, 4 by default; with a scenario, its number of servers; with a
            distribution, the largest number it draws, or more. Live: as many as the data plane has, or more, so that
            others can join.
        action_type: "discrete", "joint", "continuous" or "normalized".
        action_weights: the K levels of a discrete action.
        min_weight: least weight of a continuous action.
        max_weight: largest weight of a continuous action.
        step_interval: seconds of data-plane time per step.
        reward_type: name, mapping or callable.
        reward_field: the feature or ground-truth column that fairness rewards compare.
        max_steps: steps per episode.
        max_episode_steps: the same by Gymnasium's name; the smaller one counts.
        use_ground_truth: append the 3 columns that only the servers themselves know.
        observation: "matrix", "flat" or "dict".
        normalize: map every feature to [0, 1] by a fixed logarithmic scale.
        scenario: a Scenario or a distribution of them, the name of one, or the path of a TOML file; None: alternating
            servers of 2 and 4 cores.
            Live: what is known of the cluster, for policies and pictures; None: nothing.
        dispatch: dispatch rule instead of the scenario's.
        shm_name: region of shared memory of a live data plane; None: simulate.
        shm_timeout: seconds to wait for that region, and for an observation after its deadline.
        render_mode: "human", "ansi" or "rgb_array".

    Raises:
        UnknownNameError: for an unknown name, with the nearest known one.
        InvalidOptionError: for a value out of its range.
        RegionNotFoundError, RegionBusyError, DataPlaneTimeout: if there is no such live data plane, if it has an agent,
            or if it publishes nothing.
    """

    metadata = {"render_modes": list(RENDER_MODES), "render_fps": 4}  # noqa: RUF012 - Gymnasium's own declaration

    def __init__(
        self,
        *,
        num_servers: int | None = None,
        action_type: str = "discrete",
        action_weights: Sequence[float] = (1.0, 1.5, 2.0),
        min_weight: float = 0.1,
        max_weight: float = 10.0,
        step_interval: float = 0.25,
        reward_type: str | Mapping[str, float] | Callable[[Snapshot], Any] = "jain",
        reward_field: str = "flow_duration_avg_decay",
        max_steps: int = 10_000,
        max_episode_steps: int | None = None,
        use_ground_truth: bool = False,
        observation: str = "matrix",
        normalize: bool = False,
        scenario: Scenario | ScenarioDistribution | str | PathLike[str] | None = None,
        dispatch: str | None = None,
        shm_name: str | None = None,
        shm_timeout: float = 2.0,
        render_mode: str | None = None,
    ) -> None:
        from ..dataplanes import DataPlane, SimulatedDataPlane

        live: SharedMemoryDataPlane | None = None
        if shm_name is not None:
            from ..dataplanes import SharedMemoryDataPlane

            live = SharedMemoryDataPlane(shm_name, interval=step_interval, timeout=shm_timeout, num_servers=num_servers)
            num_servers = live.num_servers
        make = functools.partial(
            Setup,
            num_servers=num_servers,
            action_type=action_type,
            action_weights=action_weights,
            min_weight=min_weight,
            max_weight=max_weight,
            step_interval=step_interval,
            reward_type=reward_type,
            reward_field=reward_field,
            max_steps=max_steps,
            max_episode_steps=max_episode_steps,
            use_ground_truth=use_ground_truth,
            observation=observation,
            normalize=normalize,
            scenario=scenario,
            dispatch=dispatch,
            render_mode=render_mode,
            live=live is not None,
        )
        self._data_plane: DataPlane
        if live is None:
            setup = make()
            assert setup.source is not None
            self._data_plane = SimulatedDataPlane(
                setup.source,
                dispatch=setup.dispatch,
                interval=setup.step_interval,
                num_servers=setup.num_servers,
                horizon=setup.horizon,
            )
        else:
            try:
                setup = make()
                if not live.has_ground_truth and (use_ground_truth or setup.reward.needs_ground_truth):
                    raise InvalidOptionError(
                        f"use_ground_truth={use_ground_truth}, reward_field={reward_field!r}, but the data plane of "
                        f"region {shm_name!r} knows nothing of its servers' CPU, memory or workers"
                    )
            except BaseException:
                live.close()
                raise
            self._data_plane = live
        self.scenario = setup.scenario
        self.distribution = setup.distribution
        self.num_servers = setup.num_servers
        self.max_steps = setup.max_steps
        self.render_mode = setup.render_mode
        self.action_codec = setup.codec
        self.observation_layout = setup.layout
        self.feature_columns = setup.layout.columns
        self.observation_space = setup.layout.space
        self.action_space = setup.codec.space
        self._viewer: Viewer | None = None
        self._setup = setup
        self._snapshot: Snapshot | None = None
        self._weights = np.ones(self.num_servers)
        self._last_reward: float | None = None
        self._steps = 0
        self._over = True

    def reset(self, *, seed: int | None = None, options: Mapping[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode: empty servers, unit weights.

        Args:
            seed: of this and all following episodes; None: go on with the present generator.
            options: for this episode only: ``scenario``, ``load`` or ``rate``, ``events``
                (:func:`lbgym.dataplanes.scenario_with_options`).

        Raises:
            UnknownNameError, InvalidOptionError, ScenarioError: for options that make no sense; the episode under way
                is left as it was.
        """
        check_seed(seed)
        generator = self.np_random if seed is None else seeding.np_random(seed)[0]
        state = generator.bit_generator.state
        try:
            self._snapshot = self._data_plane.reset(int(generator.integers(1 << 63)), dict(options or {}))
        except Exception:
            generator.bit_generator.state = state
            raise
        self.np_random = generator
        if seed is not None:
            self._np_random_seed = int(seed)
        self._weights = self._data_plane.info.get("weights_in_force", np.ones(self.num_servers))
        self._last_reward = None
        self._steps = 0
        self._over = False
        self._viewer = self._setup.viewer(self._data_plane.scenario or self.scenario)
        if self.render_mode == "human":
            self.render()
        info = self._info(self._snapshot)
        if self.distribution is not None:
            assert self._data_plane.scenario is not None
            info |= scenario_facts(self._data_plane.scenario, self.num_servers)
        return self._observation(self._snapshot), info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Set the weights of ``action``, let one interval pass, observe.

        Raises:
            InvalidActionError: for an action that does not fit; nothing has happened then.
            ResetNeeded: before ``reset`` or after the end of an episode.
        """
        if self._over:
            when = "call reset() before step()" if self._snapshot is None else "the episode is over: call reset()"
            raise ResetNeeded(when)
        self._weights = self.action_codec.to_weights(action)
        snapshot = self._snapshot = self._data_plane.step(self._weights)
        self._steps += 1
        reward = self._last_reward = float(self._setup.reward(snapshot))
        self._over = self._steps >= self.max_steps
        if self.render_mode == "human":
            self.render()
        return self._observation(snapshot), reward, False, self._over, self._info(snapshot)

    def render(self) -> Any:
        """The last snapshot in the render mode: a string, uint8[H, W, 3], or None for "human" and no mode.

        Raises:
            ResetNeeded: before the first reset.
        """
        if self._snapshot is None:
            raise ResetNeeded("call reset() before render(): there is nothing to see yet")
        if self._viewer is None:
            return None
        return self._viewer.render(self._snapshot, weights=self._weights, reward=self._last_reward, step=self._steps)

    def close(self) -> None:
        """Close the data plane; idempotent."""
        self._data_plane.close()

    def _observation(self, snapshot: Snapshot) -> Any:
        return self.observation_layout.encode(snapshot.stats, snapshot.ground_truth, snapshot.active)

    def _info(self, snapshot: Snapshot) -> dict[str, Any]:
        info: dict[str, Any] = {
            "sequence_id": snapshot.sequence_id,
            "timestamp": snapshot.timestamp,
            "active_servers": snapshot.active.copy(),
            "weights": self._weights.copy(),
        }
        if snapshot.service is not None:
            completed, rejected, mean, p50, p90, p99 = snapshot.service.tolist()[:6]
            info["completed"] = int(completed)
            info["rejected"] = int(rejected)
            info["fct_mean"], info["fct_p50"], info["fct_p90"], info["fct_p99"] = mean, p50, p90, p99
        info.update(self._data_plane.info)
        return info


def scenario_facts(scenario: Scenario, num_servers: int) -> dict[str, Any]:
    """What ``info`` tells of a scenario that was drawn.

    ``server_cores`` int64[N] and ``server_speeds`` float64[N], 0 where no server exists; ``load`` and
    ``rate`` (flows/s).
    """
    cores, speeds = np.zeros(num_servers, np.int64), np.zeros(num_servers)
    cores[: scenario.num_servers] = [server.cores for server in scenario.servers]
    speeds[: scenario.num_servers] = [server.speed for server in scenario.servers]
    return {"server_cores": cores, "server_speeds": speeds, "load": scenario.load, "rate": scenario.rate}


def batch_info(snapshot: Snapshot, weights: NDArray[np.float64], mask: NDArray[np.bool_]) -> dict[str, Any]:
    """What :class:`LoadBalanceEnv` tells in ``info``, of a batch: arrays, and a ``_key`` mask of who tells it."""
    info: dict[str, Any] = {
        "sequence_id": snapshot.sequence_id.copy(),
        "timestamp": snapshot.timestamp.copy(),
        "active_servers": snapshot.active.copy(),
        "weights": weights.copy(),
    }
    if snapshot.service is not None:
        info["completed"] = snapshot.service[..., 0].astype(np.int64)
        info["rejected"] = snapshot.service[..., 1].astype(np.int64)
        for i, name in enumerate(("fct_mean", "fct_p50", "fct_p90", "fct_p99")):
            info[name] = snapshot.service[..., 2 + i].copy()
    for name in tuple(info):
        info[f"_{name}"] = mask.copy()
    return info
