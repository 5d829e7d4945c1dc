"""The environment of one balancer: :class:`LoadBalanceEnv`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any

import gymnasium
import numpy as np
from gymnasium.utils import seeding

from ..errors import InvalidOptionError, ResetNeeded
from ..scenarios import AnyScenario
from ..snapshot import DEFAULT_STEP_INTERVAL, Snapshot
from .core import CoreView, EnvCore, live_plane, simulated_plane
from .options import EnvOptions, checked_seed
from .rendering import RENDER_MODES
from .views import OneView


class LoadBalanceEnv(CoreView, gymnasium.Env[Any, Any]):
    """Set the weights of N servers once per interval; the data plane places every flow by them.

    >>> env = LoadBalanceEnv(scenario="heterogeneous", action_type="continuous")
    >>> observation, info = env.reset(seed=0)
    >>> observation, reward, terminated, truncated, info = env.step(env.scenario.core_weights)
    >>> observation.shape, round(reward, 3), info["active_servers"]
    ((8, 11), 0.684, [0, 1, 2, 3, 4, 5, 6, 7])

    **Observation**: per server 11 features (``lbgym.features.FEATURE_NAMES``: open flows; mean, 90th percentile,
    standard deviation, decayed mean and decayed 90th percentile of flow completion time and of flow duration,
    seconds), with ``use_ground_truth`` 3 more (CPU use, memory use, busy workers), with ``observe_weights`` one
    more (its weight). Layouts: see :class:`~lbgym.env.observations.ObservationLayout`.

    **Action**: "discrete" ``MultiDiscrete([K] * N)`` into ``action_weights``; "joint" ``Discrete(K ** N)``, at most
    4,096; "continuous" ``Box(min_weight, max_weight, (N,))``; "normalized" ``Box(-1, 1, (N,))``, mapped by logarithm;
    "index" ``Box(-1, 1, (N, 2))``, a weight and a background load per server, relative to what is configured
    (:class:`~lbgym.env.actions.IndexActions`), for dispatch rules that count flows.
    Continuous actions are clipped to their bounds; anything else that does not fit is an error.

    **Reward**: ``reward_type`` of ``reward_field`` over the active servers (:mod:`lbgym.rewards`): a name, a mapping
    of names to weights, or a function of the :class:`~lbgym.Snapshot`.

    **End**: balancing load never ends by itself, so ``terminated`` is always False; ``truncated`` after ``max_steps``
    steps.

    **Info**: ``sequence_id``, ``timestamp`` (s), ``active`` bool[N] and ``active_servers`` (their ids, a list),
    ``weights`` float64[N], with index actions ``background`` float64[N] (flows), and of the flows that ended during
    the step ``completed``, ``rejected`` (or failed), ``fct_mean``, ``fct_p50``, ``fct_p90``, ``fct_p99`` (s; a rejected
    flow counts with the scenario's ``reject_timeout``; 0 if no flow ended); with ``features``, ``absent_features``
    names those that are not shown.

    On a scenario with several balancers the environment sees balancer 0, and its weights go to all.

    **Domain randomisation**: with a distribution (:class:`~lbgym.scenarios.ScenarioDistribution`) as its scenario,
    every episode draws its own from the episode's seed: servers, load, workload, dispatch rule, events. N is the
    largest number of servers; those an episode does not have are inactive from the start: mask 0, zero rows, no flows,
    no part in the reward, whatever their weights. The ``info`` of ``reset`` then has ``server_cores``
    int64[N] and ``server_speeds`` float64[N], 0 where there is no server, ``load`` and ``rate`` (flows/s).

    **Live**: with ``shm_name`` the environment drives the data plane that publishes in that region of shared memory, in
    real time. It attaches at construction. A step writes the weights and waits for the observation one interval on;
    ``info`` then also has the keys of :class:`~lbgym.dataplanes.SharedMemoryDataPlane` (which action the observation
    reflects and how long that took, missed deadlines, restarts). ``reset`` begins an episode and changes nothing. The
    FCT quantiles of a step are unknown, and rewards of them are refused, as are rewards and observations of features
    that the data plane does not measure (``features``). A live environment cannot be copied or pickled; a simulated one
    can, and its copy continues bit for bit.

    Args:
        shm_name: region of shared memory of a live data plane; None: simulate.
        num_servers: N of the built-in scenario, 4 by default; with a scenario, its number of servers; with a
            distribution, the largest number it draws, or more. Live: as many as the data plane has, or more, so that
            others can join.
        action_type: "discrete", "joint", "continuous", "normalized" or "index".
        action_weights: the K levels of a discrete action.
        min_weight: least weight of a continuous action.
        max_weight: largest weight of a continuous action.
        relative_to_configured: weights of "normalized", "discrete" and "joint" are times the configured ones
            (:attr:`~lbgym.scenarios.Scenario.configured_weights`), as those of "index" always are.
        step_interval: seconds of data-plane time per step.
        reward_type: name, mapping or callable.
        reward_field: the feature or ground-truth column that fairness rewards compare.
        max_steps: steps per episode.
        max_episode_steps: the same by Gymnasium's name; the smaller one counts.
        use_ground_truth: append the 3 columns that only the servers themselves know.
        observe_weights: append a column ``weight``, the logarithm of the server's weight, ``info["weights"]``, relative
            to the active servers' geometric mean; 0 for inactive servers.
        observe_background: append a column ``background``, log(1 + background load), ``info["background"]``.
        observe_configured: append what the operator knows: ``configured_weight`` (as ``weight``), ``cores`` and
            ``balancers`` (logarithms); 0 for inactive servers.
        observation: "matrix", "flat" or "dict".
        features: of the 11 features, those to show; the columns of the others stay 0. Data planes that do not measure
            all of them are refused unless these are left out: train with the same ones. None: all.
        normalize: map every feature to [0, 1] by a fixed logarithmic scale; the weights stay as they are.
        scenario: a Scenario or a distribution of them, the name of one, or the path of a TOML file; None: alternating
            servers of 2 and 4 cores.
            Live: a description of the cluster, for policies and pictures; None: unknown.
        dispatch: dispatch rule instead of the scenario's.
        shm_timeout: seconds to wait for that region, and for an observation after its deadline.
        render_mode: "human", "ansi" or "rgb_array".

    Raises:
        UnknownNameError: for an unknown name, with the nearest known one.
        InvalidOptionError: for a value out of its range.
        InvalidRewardError: for a reward that the data plane does not publish the statistics for.
        RegionNotFoundError, RegionBusyError, DataPlaneTimeout: if there is no such live data plane, if it has an agent,
            or if it publishes nothing.
    """

    metadata = {"render_modes": list(RENDER_MODES), "render_fps": 4}  # noqa: RUF012 - Gymnasium's own declaration

    def __init__(
        self,
        shm_name: str | None = None,
        num_servers: int | None = None,
        *,
        action_type: str = "discrete",
        action_weights: Sequence[float] = (1.0, 1.5, 2.0),
        min_weight: float = 0.1,
        max_weight: float = 10.0,
        step_interval: float = DEFAULT_STEP_INTERVAL,
        reward_type: str | Mapping[str, float] | Callable[[Snapshot], Any] = "jain",
        reward_field: str = "flow_duration_avg_decay",
        max_steps: int = 10_000,
        max_episode_steps: int | None = None,
        use_ground_truth: bool = False,
        relative_to_configured: bool = False,
        observe_weights: bool = False,
        observe_background: bool = False,
        observe_configured: bool = False,
        observation: str = "matrix",
        features: Sequence[str] | None = None,
        normalize: bool = False,
        scenario: AnyScenario | str | PathLike[str] | None = None,
        dispatch: str | None = None,
        shm_timeout: float = 2.0,
        render_mode: str | None = None,
    ) -> None:
        if shm_name is not None and not isinstance(shm_name, str):
            raise InvalidOptionError(
                f"shm_name must be the name of a region of shared memory, or None to simulate, got {shm_name!r}; "
                "a number of servers goes by name: num_servers=4"
            )
        options = EnvOptions(
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
            relative_to_configured=relative_to_configured,
            observe_weights=observe_weights,
            observe_background=observe_background,
            observe_configured=observe_configured,
            observation=observation,
            features=features,
            normalize=normalize,
            scenario=scenario,
            dispatch=dispatch,
            render_mode=render_mode,
        )
        plane = simulated_plane(options) if shm_name is None else live_plane(options, [shm_name], shm_timeout)
        self._core = EnvCore(options, plane, OneView())
        self.render_mode = options.render_mode
        self.observation_space = self._core.layout.space
        self.action_space = self._core.codec.space

    def reset(self, *, seed: int | None = None, options: Mapping[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode: empty servers, unit weights.

        Args:
            seed: of this and all following episodes; None: continue with the present generator.
            options: for this episode only: ``scenario``, ``load`` or ``rate``, ``events``
                (:func:`lbgym.dataplanes.scenario_with_options`).

        Raises:
            UnknownNameError, InvalidOptionError, ScenarioError: for options that make no sense; the episode under way
                is left as it was.
        """
        seed = checked_seed(seed)
        core = self._core
        source = core.source_with(options)
        if seed is not None:
            self.np_random = seeding.np_random(seed)[0]
            self._np_random_seed = seed
        core.begin(_ALL, [int(self.np_random.integers(1 << 63))], source)
        if self.render_mode == "human":
            core.draw()
        return core.observation(), core.info() | core.facts(_ALL)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Set the weights of ``action``, let one interval pass, observe.

        Raises:
            InvalidActionError: for an action that does not fit; nothing has happened then.
            ResetNeeded: before ``reset`` or after the end of an episode.
        """
        core = self._core
        if core.over[0]:
            when = "call reset() before step()" if core.snapshot is None else "the episode is over: call reset()"
            raise ResetNeeded(when)
        core.step(core.codec.to_weights(action), core.codec.to_background(action))
        if self.render_mode == "human":
            core.draw()
        return core.observation(), float(core.rewards), False, bool(core.over[0]), core.info()

    def render(self) -> Any:
        """The last snapshot in the render mode: a string, uint8[H, W, 3], or None for "human" and no mode.

        Raises:
            ResetNeeded: before the first reset.
        """
        return self._core.draw()

    def render_as(self, mode: str) -> Any:
        """The last snapshot in another mode than the environment was made with, as Gym before 0.26 allows.

        Raises:
            UnknownNameError: for another mode than "human", "ansi" or "rgb_array".
            ResetNeeded: before the first reset.
        """
        return self._core.draw(mode=mode)

    def close(self) -> None:
        """Close the data plane; idempotent."""
        self._core.close()


_ALL = np.ones(1, np.bool_)
_ALL.setflags(write=False)
