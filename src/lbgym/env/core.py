"""The core of the environments of weights: :class:`EnvCore`, and what its views have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium.envs.registration import EnvSpec
from numpy.typing import NDArray

from ..errors import InvalidOptionError, InvalidRewardError, ResetNeeded
from ..features.columns import FEATURE_NAMES
from ..scenarios import AnyScenario, Configured, Scenario, ScenarioDistribution, default_scenario
from ..snapshot import Snapshot
from .actions import ActionCodec
from .info import scenario_facts, step_info
from .observations import ObservationLayout
from .options import EnvOptions
from .rendering import Viewer
from .timing import ActionTiming
from .views import View

if TYPE_CHECKING:
    from ..dataplanes import BatchedDataPlane

#: Servers of the scenario of an environment that is given none.
DEFAULT_SERVERS = 4


class EnvCore:
    """Episodes of R replicas with m balancers on a data plane; the environments are views of it.

    Weights, rewards and snapshots have the leading axes of the view. A step is :meth:`step`, after which
    :attr:`rewards`, :attr:`over`, :meth:`observation` and :meth:`info` hold its results.

    Args:
        options: the keys.
        plane: what is stepped; closed if the options do not fit it.
        view: what is shown.
        reward: of the view's snapshots; None: ``options.reward``.
        timing: when weights come into force; None: at once.

    Attributes:
        codec, layout: of one balancer.
        snapshot: the last one; None before the first episode.
        weights: float64[..., N], set by the last action; after a reset those in force.
        background: float64[..., N], background loads set by the last action; None with actions that set none.
        rewards: float64[...], of the last step.
        over: bool[R], whether the episode has ended, or none has begun.

    Raises:
        InvalidOptionError, InvalidRewardError: if the data plane lacks what the options ask for.
    """

    def __init__(
        self,
        options: EnvOptions,
        plane: BatchedDataPlane,
        view: View,
        *,
        reward: Callable[[Snapshot], Any] | None = None,
        timing: ActionTiming | None = None,
    ) -> None:
        self.options, self.plane, self.view = options, plane, view
        try:
            self.codec = options.codec(plane.num_servers)
            self.layout = options.layout(plane.num_servers)
            _check_capabilities(options, plane, self.codec, self.layout)
        except BaseException:
            plane.close()
            raise
        sets_background = self.codec.sets_background
        self._configured: list[Configured] = []
        self.source = plane.source()
        self.snapshot: Snapshot | None = None
        self.weights: NDArray[np.float64] = np.ones((*view.shape, plane.num_servers))
        self.background: NDArray[np.float64] | None = np.zeros(self.weights.shape) if sets_background else None
        self.rewards: Any = np.zeros(view.shape)
        # Steps so far, and how many there were when each episode began.
        self._clock = 0
        self._began = np.zeros(plane.num_replicas, np.int64)
        self._next_end = 0
        self.over = np.ones(plane.num_replicas, np.bool_)
        self._reward = options.reward if reward is None else reward
        self._timing = timing if timing is not None and timing.asynchronous else None
        self._delays = np.zeros((plane.num_replicas, plane.num_balancers))
        self._batch = np.ones((plane.num_replicas, plane.num_balancers, plane.num_servers))
        self._viewers: dict[tuple[str, int], Viewer] = {}

    @property
    def steps(self) -> NDArray[np.int64]:
        """int64[R], steps of the episodes under way."""
        return self._clock - self._began

    def source_with(self, options: Mapping[str, Any] | None) -> AnyScenario | None:
        """The scenario, or distribution, of episodes that begin with these ``options`` of a reset; None: unknown.

        Raises:
            LbgymError: as the data plane's ``source``.
            InvalidOptionError: also if actions set background loads and a dispatch rule of theirs does not heed them.
        """
        source = self.plane.source(options)
        _check_index(self.plane, self.codec, source)
        return source

    def begin(self, mask: NDArray[np.bool_], seeds: Sequence[int], source: AnyScenario | None = None) -> None:
        """Begin episodes of the masked replicas.

        Args:
            mask: bool[R].
            seeds: one per replica.
            source: as :meth:`source_with` returns it; None: the environment's own.
        """
        if self._timing is not None:
            self._timing.begin(mask, seeds)
        self.snapshot = self.view.snapshot(self.plane.reset(seeds, mask, source))
        self._begun(mask)

    def step(
        self,
        weights: NDArray[np.float64],
        background: NDArray[np.float64] | None = None,
        *,
        seeds: Sequence[int] | None = None,
        reset: NDArray[np.bool_] | None = None,
    ) -> None:
        """Set weights float64[..., N], let one interval pass, observe.

        Args:
            weights: kept as they are.
            background: float64[..., N], background loads, if actions set any; kept as they are.
            seeds: of the replicas in ``reset``.
            reset: bool[R], replicas that begin an episode instead, with reward 0.
        """
        delays = None
        if self._timing is not None:
            if reset is not None and seeds is not None:
                self._timing.begin(reset, seeds)
            delays = self._delays = self._timing.delays(reset)
        self._batch[...] = self.view.spread(weights)
        self.weights = weights
        if background is None:
            batch = self.plane.step(self._batch, delays=delays, seeds=seeds, reset=reset)
        else:
            self.background = background
            loads = np.broadcast_to(self.view.spread(background), self._batch.shape)
            batch = self.plane.step(self._batch, background=loads, delays=delays, seeds=seeds, reset=reset)
        snapshot = self.snapshot = self.view.snapshot(batch)
        self._clock += 1
        self.rewards = self._reward(snapshot)
        if reset is not None:
            self._begun(reset)
        if self._clock >= self._next_end:
            self.over = self.steps >= self.options.max_steps

    def _begun(self, mask: NDArray[np.bool_]) -> None:
        self._began[mask] = self._clock
        self._next_end = int(self._began.min()) + self.options.max_steps
        self.over = self.over & ~mask
        self._delays = np.where(mask[:, None], 0.0, self._delays)
        if self.codec.needs_configured or self.layout.observe_configured:
            self._configure(mask)
        initial = self.view.of(self.plane.initial_weights())
        if self.background is not None:
            self.background = np.where(mask.reshape(-1, *(1,) * len(self.view.shape)), 0.0, self.background).reshape(
                self.background.shape
            )
        if self.view.shape:
            self.weights = np.where(mask.reshape(-1, *(1,) * len(self.view.shape)), initial, self.weights)
            self.rewards = np.array(self.rewards, np.float64)
            self.rewards[mask] = 0.0
        else:
            self.weights, self.rewards = initial, 0.0
        self._viewers = {}

    def _configure(self, mask: NDArray[np.bool_]) -> None:
        """Hand codec and layout what the operators of the masked replicas' clusters state."""
        plane = self.plane
        if not self._configured:
            self._configured = [Configured.of(None, plane.num_servers, plane.num_balancers)] * plane.num_replicas
        for i in np.flatnonzero(mask).tolist():
            self._configured[i] = Configured.of(plane.scenario_of(i), plane.num_servers, plane.num_balancers)
        if not self.view.shape:
            self.codec.configured = self.layout.configured = self._configured[0]
            return
        each = self.view.shape[1] if len(self.view.shape) > 1 else 1
        rows = Configured.stack([part for part in self._configured for _ in range(each)])
        # The codec takes actions one below the other, the layout snapshots with the axes of the view.
        self.codec.configured = rows
        shape = self.view.shape
        self.layout.configured = Configured(
            rows.weights.reshape(*shape, -1), rows.cores.reshape(*shape, -1), rows.balancers.reshape(shape)
        )

    def observation(self) -> Any:
        """The present observation, in fresh arrays."""
        snapshot = self.snapshot
        assert snapshot is not None
        return self.layout.encode(snapshot.stats, snapshot.ground_truth, snapshot.active, self.weights, self.background)

    def info(self) -> dict[str, Any]:
        """The present ``info``, in fresh arrays with the leading axes of the view."""
        assert self.snapshot is not None
        info = step_info(self.snapshot, self.weights)
        if self.background is not None:
            info["background"] = self.background.copy()
        if self.layout.absent and not self.view.shape:
            info["absent_features"] = self.layout.absent
        if self._timing is not None:
            info["weights_in_force"] = self.view.of(self.plane.weights_in_force())
            info["action_delay"] = self.view.of(self._delays)
        if self.plane.info:
            info |= {key: self.view.of(values) for key, values in self.plane.info.items()}
        return info

    def facts(self, mask: NDArray[np.bool_]) -> dict[str, Any]:
        """Facts about the scenarios that the masked replicas' episodes have drawn; none if nothing is drawn."""
        if self.source is None or not self.source.varies:
            return {}
        each = {}
        for i in np.flatnonzero(mask).tolist():
            scenario = self.plane.scenario_of(i)
            assert scenario is not None
            each[i] = scenario_facts(scenario, self.plane.num_servers)
        return self.view.facts(each)

    def draw(self, replica: int = 0, mode: str | None = None) -> Any:
        """A picture of a replica: a string, uint8[H, W, 3], or None for "human" and without a mode.

        Args:
            replica: which.
            mode: a render mode; None: that of the options.

        Raises:
            ResetNeeded: before the first reset.
        """
        if self.snapshot is None:
            raise ResetNeeded("call reset() before render(): there is nothing to see yet")
        mode = self.options.render_mode if mode is None else mode
        if mode is None:
            return None
        viewer = self._viewers.get((mode, replica))
        if viewer is None:
            scenario = self.plane.scenario_of(replica)
            viewer = self._viewers[mode, replica] = Viewer(mode, scenario, dispatch=self.options.dispatch)
        r, steps = self.plane.num_replicas, int(self.steps[replica])
        return viewer.render(
            self.view.shown(self.snapshot, replica),
            weights=self.weights.reshape(r, -1, self.plane.num_servers)[replica].mean(axis=0),
            reward=float(np.reshape(self.rewards, (r, -1))[replica].mean()) if steps else None,
            step=steps,
        )

    def close(self) -> None:
        """Close the data plane; idempotent."""
        self.plane.close()


def _check_capabilities(
    options: EnvOptions, plane: BatchedDataPlane, codec: ActionCodec, layout: ObservationLayout
) -> None:
    """Refuse what the data plane does not provide, before an episode begins."""
    missing = [name for name in layout.features if name not in plane.features]
    if missing:
        raise InvalidOptionError(
            f"this data plane does not measure {', '.join(missing)}; leave the columns out by features="
            f"{[name for name in layout.features if name in plane.features]}, and train agents for it likewise"
        )
    _check_index(plane, codec)
    reward = options.reward
    if absent := sorted(reward.fields - plane.features):
        raise InvalidRewardError(
            f"reward {reward.description!r} looks at {', '.join(absent)}, which this data plane does not measure; give "
            f"as reward_field one of {', '.join(name for name in FEATURE_NAMES if name in plane.features)}"
        )
    if (options.use_ground_truth or reward.needs_ground_truth) and not plane.has_ground_truth:
        raise InvalidOptionError(
            f"use_ground_truth={options.use_ground_truth}, reward {reward.description!r}: this data plane does not "
            "publish its servers' CPU, memory and workers"
        )
    if reward.needs_service and not plane.has_interval:
        raise InvalidRewardError(
            f"reward {reward.description!r} looks at the FCT of every flow in a step, which this data plane does not "
            "publish; use a fairness reward or a function of the Snapshot"
        )


def _check_index(plane: BatchedDataPlane, codec: ActionCodec, source: AnyScenario | None = None) -> None:
    """Refuse background loads in episodes of ``source`` (None: the data plane's own) that may not heed them."""
    if codec.sets_background and (reason := plane.no_index_reason(source)) is not None:
        raise InvalidOptionError(
            f"action_type 'index' sets background loads, and this data plane does not place flows by an index: {reason}"
        )


def simulated_plane(
    options: EnvOptions, num_replicas: int = 1, *, num_balancers: int | None = None, num_threads: int | None = 1
) -> BatchedDataPlane:
    """A simulator of the options' scenario, or of the built-in one for their number of servers.

    Args:
        options: the keys.
        num_replicas: R.
        num_balancers: m; None: the scenario's.
        num_threads: as :class:`~lbgym.dataplanes.SimulatedDataPlane`.
    """
    from ..dataplanes import SimulatedDataPlane

    return SimulatedDataPlane(
        options.source or default_scenario(options.num_servers or DEFAULT_SERVERS),
        num_replicas,
        num_balancers=num_balancers,
        num_servers=options.num_servers,
        dispatch=options.dispatch,
        interval=options.step_interval,
        horizon=options.horizon,
        num_threads=num_threads,
    )


def live_plane(options: EnvOptions, names: Sequence[str], timeout: float) -> BatchedDataPlane:
    """The data planes that publish in these regions, one per balancer.

    Raises:
        InvalidOptionError: with a dispatch rule, and as :class:`~lbgym.dataplanes.LiveDataPlanes`.
    """
    if options.dispatch is not None:
        raise InvalidOptionError(
            f"dispatch={options.dispatch!r} with shm_name: a live data plane is configured with its own dispatch rule"
        )
    from ..dataplanes import LiveDataPlanes

    return LiveDataPlanes(
        names,
        interval=options.step_interval,
        timeout=timeout,
        num_servers=options.num_servers,
        scenario=options.source,
    )


class SpecWithLimit:
    """Lets ``spec.max_episode_steps`` state the limit that an environment keeps by itself, ``max_steps``.

    Wrappers such as ``TimeAwareObservation`` read it there. ``gymnasium.make`` adds its own ``TimeLimit`` only where it
    is given ``max_episode_steps``.
    """

    max_steps: int
    _spec: EnvSpec | None = None

    @property
    def spec(self) -> EnvSpec | None:
        """The specification that ``gymnasium.make`` used; None for an environment made without it."""
        return self._spec

    @spec.setter
    def spec(self, spec: EnvSpec | None) -> None:
        if spec is not None and (spec.max_episode_steps is None or spec.max_episode_steps > self.max_steps):
            spec = replace(spec, max_episode_steps=self.max_steps)
        self._spec = spec


class CoreView(SpecWithLimit):
    """Public attributes that all environments of weights share."""

    _core: EnvCore

    @property
    def scenario(self) -> Scenario | None:
        """The scenario of all episodes; None with a distribution, or if nothing is known of a live cluster."""
        source = self._core.source
        return None if source is None or source.varies else source.reference

    @property
    def distribution(self) -> ScenarioDistribution | None:
        """The distribution that each episode draws its scenario from, if there is one."""
        return self._core.source if isinstance(self._core.source, ScenarioDistribution) else None

    @property
    def num_servers(self) -> int:
        """N."""
        return self._core.plane.num_servers

    @property
    def max_steps(self) -> int:  # type: ignore[override]
        """Steps per episode."""
        return self._core.options.max_steps

    @property
    def step_interval(self) -> float:
        """Seconds of data-plane time per step."""
        return self._core.options.step_interval

    @property
    def action_codec(self) -> ActionCodec:
        """From actions to weights, and back."""
        return self._core.codec

    @property
    def observation_layout(self) -> ObservationLayout:
        """From snapshots to observations, and back."""
        return self._core.layout

    @property
    def feature_columns(self) -> tuple[str, ...]:
        """Names of the columns of an observation."""
        return self._core.layout.columns
