"""Every balancer an agent, in PettingZoo's parallel form: :class:`MultiLoadBalanceEnv`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from ..errors import InvalidActionError, InvalidOptionError, MissingExtraError, ResetNeeded, UnknownNameError
from ..scenarios import Scenario
from ..snapshot import Snapshot
from .multi_agent_vector import MultiLoadBalanceVectorEnv
from .single import LoadBalanceEnv, check_seed

if TYPE_CHECKING:
    from pettingzoo import ParallelEnv

    from ..dataplanes import SharedMemoryDataPlane

    _Parallel = ParallelEnv[str, Any, Any]
else:
    try:
        from pettingzoo import ParallelEnv as _Parallel
    except ImportError:
        # The constructor says what is missing, so that the class can be imported and its documentation read without.
        _Parallel = None

ID = "lbgym/MultiLoadBalance-v0"


class MultiLoadBalanceEnv(_Parallel or object):  # type: ignore[misc]
    """Several balancers in front of the same servers, each an agent: ``lb_0`` to ``lb_{m-1}``.

    Each observes the flows it placed itself, and its weights place those that come to it. Observations, actions, info,
    seeds, options of ``reset`` and the end of an episode are those of :class:`~lbgym.LoadBalanceEnv`; sharing of
    rewards, the state for centralised training and asynchronous balancers those of
    :class:`~lbgym.MultiLoadBalanceVectorEnv`, whose view with one replica this is. With one balancer it is
    :class:`~lbgym.LoadBalanceEnv`, bit for bit.

    **End**: ``truncated`` for all agents after ``max_steps`` steps; ``agents`` is empty then.

    **Info** of each agent: as :class:`~lbgym.LoadBalanceEnv`; of the flows that ended during the step, the statistics
    are of all balancers' flows. Where balancers do not act at once, also ``weights_in_force`` float64[N] at the end of
    the step and ``action_delay``, seconds from the observation to when the weights of this step's action come in force.

    **State**: :meth:`state` float32[S], :attr:`state_space`, :attr:`state_names`.

    **Live**: with ``shm_names``, a region of shared memory per balancer, in real time. A step writes everybody's
    weights, then waits for everybody's observation one interval on; ``info`` has what
    :class:`~lbgym.dataplanes.SharedMemoryDataPlane` tells of each.

    Args:
        num_balancers: m; None: the scenario's, or 2 without a scenario. Live: as many as there are regions.
        reward_sharing: "mean", "field", "own" or "difference".
        action_offsets: seconds in [0, ``step_interval``) between the observation and when a balancer acts: a number,
            one per balancer, "even" or "random".
        action_delay: seconds until the data plane has its weights: a number, one per balancer, or
            ``{"low": ..., "high": ...}``.
        shm_names: regions of shared memory, one per balancer; None: simulate.
        shm_timeout: seconds to wait for each region, and for observations after their deadline.
        max_cycles: ``max_steps`` by PettingZoo's name; the smaller one counts.
        keys: those of :class:`~lbgym.LoadBalanceEnv` but ``shm_name``. A callable ``reward_type`` is given a batched
            snapshot, as by :class:`~lbgym.MultiLoadBalanceVectorEnv` with one replica.

    Attributes:
        agents: of the episode under way.
        possible_agents: all of them.

    Raises:
        MissingExtraError: without PettingZoo.
        UnknownNameError, InvalidOptionError, InvalidRewardError: as :class:`~lbgym.MultiLoadBalanceVectorEnv`.
        RegionNotFoundError, RegionBusyError, DataPlaneTimeout: as :class:`~lbgym.LoadBalanceEnv`, for any of the
            regions; all are released then.
    """

    metadata = LoadBalanceEnv.metadata | {
        "name": "lbgym_multi_load_balance_v0",
        "is_parallelizable": True,
    }

    def __init__(
        self,
        *,
        num_balancers: int | None = None,
        reward_sharing: str = "mean",
        action_offsets: float | Sequence[float] | str = 0.0,
        action_delay: float | Sequence[float] | Mapping[str, float] = 0.0,
        shm_names: Sequence[str] | None = None,
        shm_timeout: float = 2.0,
        max_cycles: int | None = None,
        **keys: Any,
    ) -> None:
        if _Parallel is None:
            raise MissingExtraError("pettingzoo", "marl", "MultiLoadBalanceEnv")
        if "shm_name" in keys:
            raise InvalidOptionError(
                f"shm_name={keys['shm_name']!r}: every balancer has a region of its own; give shm_names a list of them"
            )
        if max_cycles is not None:
            keys["max_episode_steps"] = min(max_cycles, keys.get("max_episode_steps") or max_cycles)
        keys |= {"num_balancers": num_balancers, "reward_sharing": reward_sharing}
        keys |= {"action_offsets": action_offsets, "action_delay": action_delay}
        core: MultiLoadBalanceVectorEnv
        if shm_names is None:
            core = MultiLoadBalanceVectorEnv(1, autoreset_mode=AutoresetMode.DISABLED, **keys)
        else:
            core = _LiveVectorEnv(shm_names, shm_timeout, **keys)
        self._core = core
        self.scenario = core.scenario
        self.distribution = core.distribution
        self.num_servers = core.num_servers
        self.num_balancers = core.num_balancers
        self.max_steps = core.max_steps
        self.render_mode = core.render_mode
        self.reward_sharing = core.reward_sharing
        self.action_codec = core.action_codec
        self.observation_layout = core.observation_layout
        self.feature_columns = core.feature_columns
        self.state_space = core.state_space
        self.possible_agents = [f"lb_{b}" for b in range(self.num_balancers)]
        self.agents: list[str] = []
        # A space of each agent's own, so that seeding one does not reseed the others.
        self.observation_spaces = {agent: core.observation_layout.space for agent in self.possible_agents}
        self.action_spaces = {agent: core.action_codec.space for agent in self.possible_agents}

    def observation_space(self, agent: str) -> spaces.Space[Any]:
        """The observation space of an agent, always the same object."""
        return self._of(self.observation_spaces, agent)

    def action_space(self, agent: str) -> spaces.Space[Any]:
        """The action space of an agent, always the same object."""
        return self._of(self.action_spaces, agent)

    def _of(self, table: Mapping[str, spaces.Space[Any]], agent: str) -> spaces.Space[Any]:
        if agent not in table:
            raise UnknownNameError("agent", agent, self.possible_agents)
        return table[agent]

    @property
    def state_names(self) -> tuple[str, ...]:
        """What each of the numbers of :meth:`state` is."""
        return self._core.state_names

    def state(self) -> NDArray[np.float32]:
        """All that a central trainer may know, float32[S]; see :meth:`lbgym.MultiLoadBalanceVectorEnv.state`.

        Raises:
            ResetNeeded: before the first reset.
        """
        return self._core.state()[0]

    def reset(
        self, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        """Begin an episode of all agents, as :meth:`lbgym.LoadBalanceEnv.reset`.

        Args:
            seed: of this and all following episodes; None: go on with the present generator.
            options: for this episode only: ``scenario``, ``load`` or ``rate``, ``events``. Another scenario gets as
                many balancers as there are agents.

        Raises:
            UnknownNameError, InvalidOptionError, ScenarioError: for options that make no sense; the episode under way
                is left as it was.
        """
        check_seed(seed)
        # PettingZoo's own checks pass an option of this name to see that options are taken.
        rest = {key: value for key, value in (options or {}).items() if key != "options"}
        observation, info = self._core.reset(seed=seed, options=rest)
        self.agents = self.possible_agents[:]
        return self._each(observation), self._infos(info)

    def step(
        self, actions: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, float], dict[str, bool], dict[str, bool], dict[str, dict[str, Any]]]:
        """Set the weights of every agent's action, let one interval pass, observe.

        Args:
            actions: one for each of ``agents``.

        Raises:
            InvalidActionError: for an action that does not fit or a missing one; nothing has happened then.
            ResetNeeded: before ``reset`` or after the end of an episode.
        """
        if not self.agents:
            raise ResetNeeded("no agent is left, or there were none yet: call reset() before step()")
        if actions.keys() != self.observation_spaces.keys():
            raise InvalidActionError(
                f"actions must be those of {', '.join(self.agents)}, one each, got {', '.join(actions) or 'none'}"
            )
        weights = np.empty((1, self.num_balancers, self.num_servers))
        for b, agent in enumerate(self.agents):
            try:
                weights[0, b] = self.action_codec.to_weights(actions[agent])
            except InvalidActionError as error:
                raise InvalidActionError(f"{agent}: {error}") from None
        observation, rewards, _, truncated, info = self._core._step(weights)
        agents, over = self.agents, bool(truncated[0])
        if over:
            self.agents = []
        return (
            self._each(observation),
            dict(zip(agents, rewards[0].tolist(), strict=True)),
            dict.fromkeys(agents, False),
            dict.fromkeys(agents, over),
            self._infos(info),
        )

    def render(self) -> Any:
        """The cluster as all balancers see it together: open flows added up, times and weights averaged.

        A string, uint8[H, W, 3], or None for "human" and no mode.

        Raises:
            ResetNeeded: before the first reset.
        """
        frames = self._core.render()
        return None if frames is None else frames[0]

    def close(self) -> None:
        """Release threads and regions; idempotent."""
        self._core.close()

    def _each(self, observation: Any) -> dict[str, Any]:
        """Agent by agent, from a batch of one replica."""
        if isinstance(observation, dict):
            return {
                agent: {key: part[0, b].copy() for key, part in observation.items()}
                for b, agent in enumerate(self.possible_agents)
            }
        return {agent: observation[0, b].copy() for b, agent in enumerate(self.possible_agents)}

    def _infos(self, info: dict[str, Any]) -> dict[str, dict[str, Any]]:
        told = {key: value[0] for key, value in info.items() if not key.startswith("_")}
        rows = {key: list(value) if value.ndim > 1 else value.tolist() for key, value in told.items()}
        return {agent: {key: row[b] for key, row in rows.items()} for b, agent in enumerate(self.possible_agents)}


class _LiveVectorEnv(MultiLoadBalanceVectorEnv):
    """One replica whose balancers are live data planes."""

    def __init__(self, names: Sequence[str], timeout: float, **keys: Any) -> None:
        if isinstance(names, str) or not names or not all(isinstance(name, str) for name in names):
            raise InvalidOptionError(f"shm_names must be a list of names of regions, one per balancer, got {names!r}")
        if len(set(names)) < len(names):
            raise InvalidOptionError(f"shm_names must name each region once, got {list(names)!r}")
        if keys["num_balancers"] not in (None, len(names)):
            raise InvalidOptionError(f"num_balancers={keys['num_balancers']}, but shm_names has {len(names)} regions")
        for key in ("action_offsets", "action_delay"):
            if not isinstance(keys[key], (int, float)) or keys[key] != 0:
                raise InvalidOptionError(f"{key}={keys[key]!r} with shm_names: a live data plane has its own delays")
        interval = keys.get("step_interval", 0.25)
        self._planes = _Planes(names, interval, timeout, keys.get("num_servers"))
        self._has_ground_truth = self._planes.have_ground_truth
        try:
            keys["num_servers"] = self._planes.num_servers
            super().__init__(1, autoreset_mode=AutoresetMode.DISABLED, live=True, **keys)
            if not self._has_ground_truth and (keys.get("use_ground_truth") or self._setup.reward.needs_ground_truth):
                raise InvalidOptionError(
                    f"use_ground_truth={keys.get('use_ground_truth', False)}, reward "
                    f"{self._setup.reward.description!r}, but not every data plane of {', '.join(names)} knows its "
                    "servers' CPU, memory and workers"
                )
        except BaseException:
            self._planes.close()
            raise

    def _settle_balancers(self, num_balancers: int | None, keys: dict[str, Any]) -> int:
        return self._planes.num_balancers

    def _make_simulation(self, num_threads: int | None) -> Any:
        self._planes.scenario = self.scenario
        return self._planes

    def _scenario_with(self, options: Mapping[str, Any]) -> Scenario | None:
        for key in options:
            raise UnknownNameError("option of reset", key, (), "live regions")
        return self.scenario

    def _begin(self, mask: NDArray[np.bool_]) -> None:
        super()._begin(mask)
        self._weights = self._planes.weights_in_force()

    def _view(self, batch: Snapshot) -> Snapshot:
        return batch

    def _info(self, snapshot: Snapshot, mask: NDArray[np.bool_]) -> dict[str, Any]:
        info = super()._info(snapshot, mask)
        for key, value in self._planes.info.items():
            info |= {key: value, f"_{key}": mask.copy()}
        return info


class _Planes:
    """Live data planes, one per balancer, stepped together as one replica."""

    def __init__(self, names: Sequence[str], interval: float, timeout: float, num_servers: int | None) -> None:
        from ..dataplanes import SharedMemoryDataPlane

        self.num_balancers = len(names)
        self.scenario: Scenario | None = None
        self._planes: list[SharedMemoryDataPlane] = []
        try:
            for name in names:
                self._planes.append(
                    SharedMemoryDataPlane(name, interval=interval, timeout=timeout, num_servers=num_servers)
                )
            counts = [plane.num_servers for plane in self._planes]
            if len(set(counts)) > 1:
                raise InvalidOptionError(
                    f"the regions {', '.join(names)} have {', '.join(map(str, counts))} servers; "
                    "say with num_servers how many to act for"
                )
        except BaseException:
            self.close()
            raise
        self.num_servers = counts[0]

    @property
    def have_ground_truth(self) -> bool:
        return all(plane.has_ground_truth for plane in self._planes)

    @property
    def info(self) -> dict[str, Any]:
        """What each tells of the last reset or step, in arrays [1, m, ...]."""
        infos = [plane.info for plane in self._planes]
        return {key: np.array([[info[key] for info in infos]]) for key in infos[0]}

    def scenario_of(self, _replica: int) -> Scenario | None:
        return self.scenario

    def weights_in_force(self) -> NDArray[np.float64]:
        return np.array([[plane.info["weights_in_force"] for plane in self._planes]])

    def reset(self, _seeds: Sequence[int], _mask: NDArray[np.bool_]) -> Snapshot:
        newest = [plane.region.latest for plane in self._planes]
        return self._together([plane.reset(after=after) for plane, after in zip(self._planes, newest, strict=True)])

    def step(self, weights: NDArray[np.float64], _duration: float) -> Snapshot:
        """Write everybody's weights, then wait for everybody, also when one of them has nothing to show."""
        for plane, row in zip(self._planes, weights[0], strict=True):
            plane.begin_step(row)
        snapshots: list[Snapshot] = []
        failures: list[Exception] = []
        for plane in self._planes:
            try:
                snapshots.append(plane.end_step())
            except Exception as error:
                failures.append(error)
        if failures:
            raise failures[0]
        return self._together(snapshots)

    def close(self) -> None:
        for plane in self._planes:
            plane.close()

    def _together(self, snapshots: list[Snapshot]) -> Snapshot:
        """A batch of one replica. As in a simulation, the counters are of all balancers' flows."""
        m = len(snapshots)

        def each(name: str) -> Any:
            return np.array([[getattr(snapshot, name) for snapshot in snapshots]])

        def total(name: str) -> Any:
            return np.repeat(each(name).sum(axis=1, keepdims=True), m, axis=1)

        known = all(snapshot.ground_truth is not None for snapshot in snapshots)
        return Snapshot(
            sequence_id=each("sequence_id"),
            timestamp=each("timestamp"),
            active=each("active"),
            stats=each("stats"),
            ground_truth=each("ground_truth") if known else None,
            started=total("started"),
            completed=total("completed"),
            rejected=total("rejected"),
            failed=total("failed"),
            unrouted=total("unrouted"),
            service=None,
        )


def _register() -> None:
    """Make ``pettingzoo.make("parallel", ID)`` find it, where PettingZoo (1.27) has a registry."""
    try:
        from pettingzoo import parallel_registry, register
    except ImportError:
        return
    if ID not in parallel_registry:
        register("parallel", ID, entry_point=MultiLoadBalanceEnv)


_register()

__all__ = ["MultiLoadBalanceEnv"]
