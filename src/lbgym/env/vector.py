"""Many environments in one: :class:`LoadBalanceVectorEnv`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from ..errors import InvalidOptionError, ResetNeeded
from ..scenarios import Scenario, ScenarioDistribution
from ..snapshot import Snapshot
from .rendering import Viewer
from .replicas import ReplicaVectorEnv
from .single import LoadBalanceEnv, Setup, batch_info, scenario_facts

if TYPE_CHECKING:
    from ..simulator import Simulation


class LoadBalanceVectorEnv(ReplicaVectorEnv):
    """``num_envs`` replicas of :class:`~lbgym.LoadBalanceEnv` in one kernel call per step, on all cores.

    Equal, replica by replica and bit for bit, to single environments with the same seeds: ``reset(seed=s)`` seeds
    replica i with s + i, or takes a seed per replica. Observations, actions, rewards and ends are those of the single
    environment with a leading axis; ``info`` holds arrays and, for each ``key``, a mask ``_key`` of the replicas that
    tell it. With a distribution of scenarios each replica draws its own at each of its resets.

    Args:
        num_envs: replicas.
        autoreset_mode: NEXT_STEP (a replica whose episode has ended is reset by the next step, which ignores its
            action and
            rewards it with 0), SAME_STEP (at once; the last observation and info are in ``info["final_obs"]`` and
            ``info["final_info"]``) or DISABLED (``reset(options={"reset_mask": bool[num_envs]})``).
        num_threads: threads that share the replicas; None: one per core, fewer where there is little to share. Results
            do not depend on it.
        keys: those of :class:`~lbgym.LoadBalanceEnv`. A callable ``reward_type`` is given the batched snapshot and
            returns
            float[num_envs].

    Raises:
        UnknownNameError, InvalidOptionError: as the single environment.
    """

    # ``make_vec`` wants the mode in here, too; each instance has its own.
    metadata: dict[str, Any] = LoadBalanceEnv.metadata | {"autoreset_mode": AutoresetMode.NEXT_STEP}

    def __init__(
        self,
        num_envs: int = 1,
        *,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        num_threads: int | None = None,
        **keys: Any,
    ) -> None:
        super().__init__(num_envs, autoreset_mode)
        if keys.get("shm_name") is not None:
            raise InvalidOptionError(
                f"shm_name={keys['shm_name']!r}: a region is one data plane, not {num_envs} replicas; with "
                'vectorization_mode="sync" each LoadBalanceEnv can have one of its own'
            )
        setup = Setup(**{key: value for key, value in keys.items() if key not in ("shm_name", "shm_timeout")})
        self.scenario = setup.scenario
        self.distribution = setup.distribution
        self.num_servers = setup.num_servers
        self.max_steps = setup.max_steps
        self.render_mode = setup.render_mode
        self.action_codec = setup.codec
        self.observation_layout = setup.layout
        self.feature_columns = setup.layout.columns
        self.single_observation_space = setup.layout.space
        self.single_action_space = setup.codec.space
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._setup = setup
        self._simulation = self._make_simulation(num_threads)
        self._viewers: list[Viewer] = []
        self._snapshot: Snapshot | None = None
        self._rewards: NDArray[np.float64] = np.zeros(self.num_envs)
        self._weights = np.ones((self.num_envs, self.num_servers))
        self._steps = np.zeros(self.num_envs, np.int64)

    def _make_simulation(self, num_threads: int | None) -> Simulation:
        from ..simulator import Simulation

        setup = self._setup
        assert setup.shape is not None  # only a live environment may have none
        return Simulation(
            setup.shape,
            self.num_envs,
            num_servers=setup.num_servers,
            dispatch=setup.dispatch,
            num_threads=num_threads,
        )

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin episodes: all, or those marked in ``options["reset_mask"]`` (bool[num_envs], at least one).

        The other options are those of :meth:`LoadBalanceEnv.reset <lbgym.LoadBalanceEnv.reset>` and hold for the
        episodes that begin here. Nothing is taken out of ``options``.

        Raises:
            InvalidOptionError: for a bad mask or seeds, and as the single environment.
        """
        mask, rest = self._split(options)
        seeds = self._seeds(seed)
        source = self._scenario_with(rest)
        self._restore(mask, source)
        self._seed(mask, seeds)
        self._snapshot = self._view(self._simulation.reset(self._draw_episodes(mask, source), mask))
        self._begin(mask)
        if self._setup.render_mode == "human":
            self.render()
        return self._observation(self._snapshot), self._info(self._snapshot, mask) | self._facts(mask)

    def step(
        self, actions: Any
    ) -> tuple[Any, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """One interval of every replica.

        Raises:
            InvalidActionError: for actions that do not fit; nothing has happened then.
            ResetNeeded: before ``reset``; in DISABLED mode also while the episode of a replica is over.
        """
        if self._snapshot is None:
            raise ResetNeeded("call reset() before step()")
        return self._step(self._to_weights(actions))

    def _step(
        self, weights: NDArray[np.float64]
    ) -> tuple[Any, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        again = self._to_reset()
        self._weights = weights
        if again is None:
            snapshot = self._view(self._run(weights))
        else:
            self._restore(again, self._setup.source)
            seeds = self._draw_episodes(again, self._setup.source)
            snapshot = self._view(self._run(weights, seeds=seeds, reset=again))
        self._snapshot = snapshot
        self._steps += 1
        rewards = np.array(self._reward(snapshot), np.float64)
        if again is not None:
            self._begin(again)
            rewards[again] = 0.0
        self._rewards = rewards
        truncated = self._steps >= self.max_steps
        self._over = truncated.copy()
        observation = self._observation(snapshot)
        info = self._info(snapshot, self._all)
        if again is not None:
            info |= self._facts(again)
        if self.autoreset_mode == AutoresetMode.SAME_STEP and truncated.any():
            observation, info = self._reset_at_once(truncated, observation, info)
        if self._setup.render_mode == "human":
            self.render()
        return observation, rewards.copy(), np.zeros(self.num_envs, np.bool_), truncated, info

    def _reset_at_once(
        self, ended: NDArray[np.bool_], observation: Any, info: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        final = self._final(ended, observation, info)
        self._restore(ended, self._setup.source)
        self._snapshot = self._view(self._simulation.reset(self._draw_episodes(ended, self._setup.source), ended))
        self._begin(ended)
        return self._observation(self._snapshot), self._info(self._snapshot, self._all) | self._facts(ended) | final

    def render(self) -> tuple[Any, ...] | None:
        """A frame per replica, as of the single environment; "human" shows replica 0 and returns None."""
        if self._snapshot is None:
            raise ResetNeeded("call reset() before render(): there is nothing to see yet")
        if self._setup.render_mode is None:
            return None
        human = self._setup.render_mode == "human"
        if not self._viewers:
            shown = range(1 if human else self.num_envs)
            self._viewers = [v for i in shown if (v := self._setup.viewer(self._simulation.scenario_of(i)))]
        frames = tuple(
            viewer.render(
                self._shown(self._snapshot, i),
                weights=self._weights[i].reshape(-1, self.num_servers).mean(axis=0),
                reward=float(self._rewards[i].mean()) if self._steps[i] else None,
                step=int(self._steps[i]),
            )
            for i, viewer in enumerate(self._viewers)
        )
        return None if human else frames

    def close_extras(self, **kwargs: Any) -> None:
        """Stop the threads."""
        # Gymnasium before 1.4 closes whatever it collects, also what a refused argument left half made.
        if hasattr(self, "_simulation"):
            self._simulation.close()

    def _draw_episodes(self, mask: NDArray[np.bool_], source: Any) -> list[int]:
        """The seeds of the masked replicas' next episodes, to which each gets its scenario if ``source`` varies."""
        seeds = self._draw_seeds(mask)
        if isinstance(source, ScenarioDistribution):
            # Replicas that share a seed share the scenario.
            chosen = np.flatnonzero(mask).tolist()
            drawn = {s: source.draw(s, horizon=self._setup.horizon) for s in {seeds[i] for i in chosen}}
            self._simulation.set_scenarios({i: drawn[seeds[i]] for i in chosen})
        return seeds

    def _facts(self, mask: NDArray[np.bool_]) -> dict[str, Any]:
        """What ``info`` tells of the scenarios that the masked replicas' episodes began with."""
        if self.distribution is None:
            return {}
        chosen = np.flatnonzero(mask).tolist()
        told = {i: scenario_facts(self._simulation.scenario_of(i), self.num_servers) for i in chosen}
        info: dict[str, Any] = {}
        for name, first in next(iter(told.values())).items():
            values = np.zeros((self.num_envs, *np.shape(first)), np.asarray(first).dtype)
            for i, facts in told.items():
                values[i] = facts[name]
            info |= {name: values, f"_{name}": mask.copy()}
        return info

    def _restore(self, mask: NDArray[np.bool_], scenario: Any) -> None:
        """Give the masked replicas ``scenario`` where they run another, or see that all a distribution draws fits."""
        if isinstance(scenario, ScenarioDistribution):
            self._simulation.check(scenario.reference)
            return
        other = [bool(m) and self._simulation.scenario_of(i) is not scenario for i, m in enumerate(mask.tolist())]
        if any(other):
            self._simulation.set_scenario(scenario, np.array(other))

    def _begin(self, mask: NDArray[np.bool_]) -> None:
        self._steps[mask] = 0
        self._over[mask] = False
        self._weights = self._weights.copy()
        self._weights[mask] = 1.0
        self._rewards = self._rewards.copy()
        self._rewards[mask] = 0.0
        self._viewers = []

    # What differs where each balancer has an agent of its own.

    def _scenario_with(self, options: Mapping[str, Any]) -> Scenario | ScenarioDistribution | None:
        """The scenario, or distribution, of episodes that begin with these ``options``."""
        from ..dataplanes import scenario_with_options

        assert self._setup.source is not None
        return scenario_with_options(self._setup.source, options)

    def _to_weights(self, actions: Any) -> NDArray[np.float64]:
        return self.action_codec.to_weights(actions, self.num_envs)

    def _run(self, weights: NDArray[np.float64], **again: Any) -> Snapshot:
        """One interval; ``again``: the replicas that begin again instead, as :class:`Simulation` takes them."""
        batch = np.broadcast_to(weights[:, None], (self.num_envs, self._simulation.num_balancers, self.num_servers))
        return self._simulation.step(batch, self._setup.step_interval, **again)

    def _view(self, batch: Snapshot) -> Snapshot:
        """Balancer 0's part of the batch."""
        batch.stats = batch.stats[:, 0]
        return batch

    def _observation(self, snapshot: Snapshot) -> Any:
        return self.observation_layout.encode(snapshot.stats, snapshot.ground_truth, snapshot.active)

    def _reward(self, snapshot: Snapshot) -> Any:
        return self._setup.reward(snapshot)

    def _info(self, snapshot: Snapshot, mask: NDArray[np.bool_]) -> dict[str, Any]:
        return batch_info(snapshot, self._weights, mask)

    def _shown(self, snapshot: Snapshot, i: int) -> Snapshot:
        """What a picture of replica ``i`` shows."""
        return snapshot.part(i)
