"""Every balancer an agent, in PettingZoo's parallel form: :class:`MultiLoadBalanceEnv`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium import spaces
from gymnasium.utils import seeding
from numpy.typing import NDArray

from ..errors import InvalidActionError, InvalidOptionError, MissingExtraError, ResetNeeded, UnknownNameError
from .balancers import CentralState, balancers_core
from .core import CoreView
from .options import EnvOptions, checked_seed, steps_of
from .single import LoadBalanceEnv

if TYPE_CHECKING:
    from pettingzoo import ParallelEnv

    _Parallel = ParallelEnv[str, Any, Any]
else:
    try:
        from pettingzoo import ParallelEnv as _Parallel
    except ImportError:
        # The constructor says what is missing, so that the class can be imported and its documentation read without.
        _Parallel = None

ID = "lbgym/MultiLoadBalance-v0"


class MultiLoadBalanceEnv(CoreView, _Parallel or object):  # type: ignore[misc]
    """Several balancers in front of the same servers, each an agent: ``lb_0`` to ``lb_{m-1}``.

    Each observes the flows it placed itself, and its weights place those that come to it. Observations, actions and
    info are those of :class:`~lbgym.LoadBalanceEnv`; sharing of rewards, the state for centralised training and
    asynchronous balancers those of :class:`~lbgym.MultiLoadBalanceVectorEnv`, of which this is a view of one replica.
    With one balancer it is :class:`~lbgym.LoadBalanceEnv`, bit for bit.

    **End**: ``truncated`` for all agents after ``max_steps`` steps; ``agents`` is empty then.

    **Info** of each agent: as :class:`~lbgym.LoadBalanceEnv`; of the flows that ended during the step, the statistics
    are of all balancers' flows. Where balancers do not act at once, also ``weights_in_force`` float64[N] at the end of
    the step and ``action_delay``, seconds from the observation until this step's weights come into force.

    **State**: :meth:`state` float32[S], :attr:`state_space`, :attr:`state_names`.

    **Live**: with ``shm_names``, a region of shared memory per balancer, in real time. A step writes everybody's
    weights, then waits for everybody's observation one interval later; ``info`` has the keys of
    :class:`~lbgym.dataplanes.SharedMemoryDataPlane` for each.

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
            keys["max_episode_steps"] = steps_of(max_cycles, keys.get("max_episode_steps"), name="max_cycles")
        options = EnvOptions(**keys)
        core = self._core = balancers_core(
            options,
            1,
            num_balancers=num_balancers,
            reward_sharing=reward_sharing,
            action_offsets=action_offsets,
            action_delay=action_delay,
            num_threads=1,
            shm_names=shm_names,
            shm_timeout=shm_timeout,
        )
        self.render_mode = options.render_mode
        self.num_balancers = core.plane.num_balancers
        self.reward_sharing = reward_sharing
        self._state = CentralState(core)
        self.state_space = self._state.space
        self._generator: np.random.Generator | None = None
        self.possible_agents = [f"lb_{b}" for b in range(self.num_balancers)]
        self.agents: list[str] = []
        # A space of each agent's own, so that seeding one does not reseed the others.
        self.observation_spaces = {agent: core.layout.space for agent in self.possible_agents}
        self.action_spaces = {agent: core.codec.space for agent in self.possible_agents}

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
        """Names of the S numbers of :meth:`state`."""
        return self._state.names

    def state(self) -> NDArray[np.float32]:
        """All that a central trainer may know, float32[S]; see :meth:`lbgym.MultiLoadBalanceVectorEnv.state`.

        Raises:
            ResetNeeded: before the first reset.
        """
        return self._state.of(self._core.snapshot)[0]

    def reset(
        self, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        """Begin an episode of all agents, as :meth:`lbgym.LoadBalanceEnv.reset`.

        Args:
            seed: of this and all following episodes; None: continue with the present generator.
            options: for this episode only: ``scenario``, ``load`` or ``rate``, ``events``. Another scenario gets as
                many balancers as there are agents.

        Raises:
            UnknownNameError, InvalidOptionError, ScenarioError: for options that make no sense; the episode under way
                is left as it was.
        """
        seed = checked_seed(seed)
        core = self._core
        # PettingZoo's own checks pass an option of this name to see that options are taken.
        source = core.source_with({key: value for key, value in (options or {}).items() if key != "options"})
        if seed is not None or self._generator is None:
            self._generator = seeding.np_random(seed)[0]
        core.begin(_ALL, [int(self._generator.integers(1 << 63))], source)
        if self.render_mode == "human":
            core.draw()
        self.agents = self.possible_agents[:]
        return self._each(core.observation()), self._infos(core.info() | core.facts(_ALL))

    def step(
        self, actions: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, float], dict[str, bool], dict[str, bool], dict[str, dict[str, Any]]]:
        """Set the weights of every agent's action, let one interval pass, observe.

        Args:
            actions: one for each of ``agents``. After the end of an episode there are none, and an empty dictionary
                gets empty dictionaries, as PettingZoo has it.

        Raises:
            InvalidActionError: for an action that does not fit or a missing one; nothing has happened then.
            ResetNeeded: before ``reset``, or for actions after the end of an episode.
        """
        core = self._core
        if not self.agents:
            if core.snapshot is not None and not actions:
                return {}, {}, {}, {}, {}
            raise ResetNeeded("no agent is left, or there were none yet: call reset() before step()")
        if actions.keys() != self.observation_spaces.keys():
            raise InvalidActionError(
                f"actions must be those of {', '.join(self.agents)}, one each, got {', '.join(actions) or 'none'}"
            )
        codec = self.action_codec
        weights = np.empty((1, self.num_balancers, self.num_servers))
        background = np.empty_like(weights) if codec.sets_background else None
        for b, agent in enumerate(self.agents):
            try:
                weights[0, b] = codec.to_weights(actions[agent])
                if background is not None:
                    background[0, b] = codec.to_background(actions[agent])
            except InvalidActionError as error:
                raise InvalidActionError(f"{agent}: {error}") from None
        core.step(weights, background)
        if self.render_mode == "human":
            core.draw()
        agents, over = self.agents, bool(core.over[0])
        if over:
            self.agents = []
        return (
            self._each(core.observation()),
            dict(zip(agents, core.rewards[0].tolist(), strict=True)),
            dict.fromkeys(agents, False),
            dict.fromkeys(agents, over),
            self._infos(core.info()),
        )

    def render(self) -> Any:
        """The cluster as all balancers see it together: open flows added up, times and weights averaged.

        A string, uint8[H, W, 3], or None for "human" and no mode.

        Raises:
            ResetNeeded: before the first reset.
        """
        return self._core.draw()

    def close(self) -> None:
        """Release the simulator or the regions; idempotent."""
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
        """Agent by agent, from a batch of one replica."""
        rows = {key: list(value[0]) if value.ndim > 2 else value[0].tolist() for key, value in info.items()}
        return {agent: {key: row[b] for key, row in rows.items()} for b, agent in enumerate(self.possible_agents)}


_ALL = np.ones(1, np.bool_)
_ALL.setflags(write=False)


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
