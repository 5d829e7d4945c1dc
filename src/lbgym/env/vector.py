"""Many environments in one: :class:`LoadBalanceVectorEnv`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from numpy.typing import NDArray

from ..errors import InvalidOptionError, ResetNeeded
from .core import CoreView, EnvCore, simulated_plane
from .options import EnvOptions
from .replicas import Replicas, with_masks
from .single import LoadBalanceEnv
from .views import ReplicasView


class ReplicaEnv(CoreView, Replicas):
    """Reset, step and autoreset of replicas on a core, in arrays."""

    render_mode: str | None = None
    closed = False

    def __init__(self, num_envs: int, autoreset_mode: AutoresetMode | str) -> None:
        Replicas.__init__(self, num_envs, autoreset_mode)

    def _options(self, keys: Mapping[str, Any], live: str) -> EnvOptions:
        """Check the keys of :class:`LoadBalanceEnv`.

        Args:
            keys: the keys.
            live: the environment to use for a live data plane instead, for the message.
        """
        if keys.get("shm_name") is not None:
            raise InvalidOptionError(
                f"shm_name={keys['shm_name']!r}: a region is one data plane, not {self.num_envs} replicas; {live}"
            )
        return EnvOptions(**{key: value for key, value in keys.items() if key not in ("shm_name", "shm_timeout")})

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin episodes: all, or those marked in ``options["reset_mask"]`` (bool[num_envs], at least one).

        The other options are those of :meth:`LoadBalanceEnv.reset <lbgym.LoadBalanceEnv.reset>` and hold for the
        episodes that begin here. ``options`` is not changed.

        Raises:
            InvalidOptionError: for a bad mask or seeds, and as the single environment.
            ResetNeeded: if it is the first reset, and the mask leaves replicas out.
        """
        core = self._core
        mask, rest = self._split(options, first=core.snapshot is None)
        seeds = self._seeds(seed)
        source = core.source_with(rest)
        self._seed(mask, seeds)
        core.begin(mask, self._draw_seeds(mask), source)
        self._over = core.over
        self._show()
        return core.observation(), with_masks(core.info() | core.facts(mask), mask)

    def step(
        self, actions: Any
    ) -> tuple[Any, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """One interval of every replica.

        Raises:
            InvalidActionError: for actions that do not fit; nothing has happened then.
            ResetNeeded: before ``reset``; in DISABLED mode also while the episode of a replica is over.
        """
        core = self._core
        if core.snapshot is None:
            raise ResetNeeded("call reset() before step()")
        weights, background = self._to_weights(actions)
        again = self._to_reset()
        core.step(weights, background, seeds=None if again is None else self._draw_seeds(again), reset=again)
        truncated = core.over
        self._over = truncated
        rewards = np.array(core.rewards, np.float64)
        observation, info = core.observation(), with_masks(core.info(), self._all)
        if again is not None:
            info |= with_masks(core.facts(again), again)
        if self.autoreset_mode == AutoresetMode.SAME_STEP and truncated.any():
            final = self._final(truncated, observation, info)
            core.begin(truncated, self._draw_seeds(truncated))
            self._over = core.over
            info = with_masks(core.info(), self._all) | with_masks(core.facts(truncated), truncated) | final
            observation = core.observation()
        self._show()
        return observation, rewards, np.zeros(self.num_envs, np.bool_), truncated.copy(), info

    @abstractmethod
    def _to_weights(self, actions: Any) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        """The weights of checked actions, float64[..., N], and the background loads, if they set any."""

    def render(self) -> tuple[Any, ...] | None:
        """A frame per replica, as of the single environment; "human" shows replica 0 and returns None."""
        if self.render_mode in (None, "human"):
            self._core.draw()
            return None
        return tuple(self._core.draw(i) for i in range(self.num_envs))

    def _show(self) -> None:
        if self.render_mode == "human":
            self._core.draw()

    def close(self, **kwargs: Any) -> None:
        """Stop the threads; idempotent."""
        self.closed = True
        # Gymnasium before 1.4 closes whatever it collects, also what a refused argument left half made.
        if hasattr(self, "_core"):
            self._core.close()


class LoadBalanceVectorEnv(ReplicaEnv, VectorEnv[Any, Any, Any]):
    """``num_envs`` replicas of :class:`~lbgym.LoadBalanceEnv` in one kernel call per step, on all cores.

    Equal, replica by replica and bit for bit, to single environments with the same seeds: ``reset(seed=s)`` seeds
    replica i with s + i, or takes a seed per replica. Observations, actions, rewards and ends are those of the single
    environment with a leading axis; ``info`` holds arrays (``active_servers`` an object array of lists) and, for each
    ``key``, a mask ``_key`` of the replicas that have it. With a distribution of scenarios each replica draws its own
    at each of its resets.

    Args:
        num_envs: replicas.
        autoreset_mode: NEXT_STEP (a replica whose episode has ended is reset by the next step, which ignores its
            action and rewards it with 0), SAME_STEP (at once; the last observation and info are in
            ``info["final_obs"]`` and ``info["final_info"]``) or DISABLED
            (``reset(options={"reset_mask": bool[num_envs]})``).
        num_threads: threads that share the replicas; None: one per core, fewer where there is little to share. Results
            do not depend on it.
        keys: those of :class:`~lbgym.LoadBalanceEnv`. A callable ``reward_type`` is given the batched snapshot and
            returns float[num_envs].

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
        options = self._options(keys, 'with vectorization_mode="sync" each LoadBalanceEnv can have one of its own')
        plane = simulated_plane(options, self.num_envs, num_threads=num_threads)
        core = self._core = EnvCore(options, plane, ReplicasView(self.num_envs))
        self.render_mode = options.render_mode
        self._set_spaces(core.layout.space, core.codec.space)

    def _to_weights(self, actions: Any) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        codec = self._core.codec
        return codec.to_weights(actions, self.num_envs), codec.to_background(actions, self.num_envs)
