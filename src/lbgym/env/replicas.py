"""Seeds, masks and final observations of vector environments: :class:`Replicas` and :class:`ReplicaVectorEnv`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium import Space
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from ..checks import items, whole
from ..errors import InvalidOptionError, ResetNeeded, UnknownNameError
from .options import checked_seed

#: Most replicas of a vector environment.
MAX_REPLICAS = 10_000_000


class Replicas:
    """Seeds, masks and final observations of ``num_envs`` replicas in any of Gymnasium's autoreset modes.

    Replica i has a generator of its own that gives the seed of each of its episodes, like a single environment's.

    Args:
        num_envs: replicas.
        autoreset_mode: an ``AutoresetMode`` or the value of one.

    Raises:
        InvalidOptionError: unless ``num_envs`` is a whole number from 1 to ``MAX_REPLICAS``.
        UnknownNameError: for another mode.
    """

    metadata: dict[str, Any]
    observation_space: Space[Any]
    action_space: Space[Any]
    single_observation_space: Space[Any]
    single_action_space: Space[Any]

    def __init__(self, num_envs: int, autoreset_mode: AutoresetMode | str) -> None:
        self.num_envs = whole("num_envs", num_envs, high=MAX_REPLICAS)
        try:
            self.autoreset_mode = AutoresetMode(autoreset_mode)
        except ValueError:
            modes = [mode.value for mode in AutoresetMode]
            raise UnknownNameError("autoreset mode", autoreset_mode, modes) from None
        self.metadata = type(self).metadata | {"autoreset_mode": self.autoreset_mode}
        # Replicas whose episode has ended, or has not begun.
        self._over = np.ones(self.num_envs, np.bool_)
        self._all = np.ones(self.num_envs, np.bool_)
        self._generators: list[np.random.Generator | None] = [None] * self.num_envs

    def _set_spaces(self, observation: Space[Any], action: Space[Any]) -> None:
        """Set the spaces, from those of one replica."""
        self.single_observation_space, self.single_action_space = observation, action
        self.observation_space = batch_space(observation, self.num_envs)
        self.action_space = batch_space(action, self.num_envs)

    def _split(self, options: Mapping[str, Any] | None, *, first: bool) -> tuple[NDArray[np.bool_], dict[str, Any]]:
        """The replicas that a reset with these ``options`` is for, and the other options.

        Raises:
            InvalidOptionError: for a bad mask.
            ResetNeeded: if it is the ``first`` reset, and not of every replica.
        """
        rest = dict(options or {})
        mask = rest.pop("reset_mask", None)
        if mask is None:
            return np.ones(self.num_envs, np.bool_), rest
        if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_ or mask.shape != (self.num_envs,):
            raise InvalidOptionError(
                f"the option reset_mask must be a NumPy array of {self.num_envs} booleans, got {mask!r}"
            )
        if not mask.any():
            raise InvalidOptionError("the option reset_mask must mark at least one replica, got none")
        if first and not mask.all():
            raise ResetNeeded("the first reset must be of every replica, got a reset_mask that leaves some out")
        return mask.copy(), rest

    def _seeds(self, seed: int | Sequence[int | None] | None) -> Sequence[int | None]:
        """A checked seed per replica."""
        if seed is None:
            return [None] * self.num_envs
        if isinstance(seed, (int, np.integer)):
            first = whole("seed", seed, low=0)
            return [first + i for i in range(self.num_envs)]
        seeds = items("seed", seed, "whole numbers, one per replica, or one for all of them")
        if len(seeds) != self.num_envs:
            raise InvalidOptionError(f"reset takes {self.num_envs} seeds, one per replica, got {len(seeds)}")
        return [checked_seed(each) for each in seeds]

    def _seed(self, mask: NDArray[np.bool_], seeds: Sequence[int | None]) -> None:
        """Give the masked replicas new generators, where they have a seed or never had one."""
        for i in np.flatnonzero(mask).tolist():
            if seeds[i] is not None or self._generators[i] is None:
                self._generators[i] = seeding.np_random(seeds[i])[0]

    def _draw_seeds(self, mask: NDArray[np.bool_]) -> list[int]:
        """The seed of the next episode of each masked replica."""
        seeds = [0] * self.num_envs
        for i in np.flatnonzero(mask).tolist():
            generator = self._generators[i]
            assert generator is not None
            seeds[i] = int(generator.integers(1 << 63))
        return seeds

    def _to_reset(self) -> NDArray[np.bool_] | None:
        """The replicas that this step must reset, if any.

        Raises:
            ResetNeeded: the mode is not NEXT_STEP, and some episodes are over.
        """
        if not self._over.any():
            return None
        if self.autoreset_mode != AutoresetMode.NEXT_STEP:
            ended = np.flatnonzero(self._over)
            raise ResetNeeded(
                f"{len(ended)} replicas have ended or were never reset (the first is {ended[0]}); "
                'call reset(options={"reset_mask": ...}) with them marked'
            )
        return self._over.copy()

    def _final(self, ended: NDArray[np.bool_], observation: Any, info: dict[str, Any]) -> dict[str, Any]:
        """The ``info`` keys of SAME_STEP that describe the ``ended`` episodes."""
        final = np.full(self.num_envs, None, dtype=object)
        for i in np.flatnonzero(ended):
            final[i] = (
                {key: part[i] for key, part in observation.items()} if isinstance(observation, dict) else observation[i]
            )
        final_info = {
            key: (value & ended if value.dtype == np.bool_ and key.startswith("_") else value)
            for key, value in info.items()
        }
        return {
            "final_obs": final,
            "_final_obs": ended.copy(),
            "final_info": final_info,
            "_final_info": ended.copy(),
        }


def with_masks(info: dict[str, Any], mask: NDArray[np.bool_]) -> dict[str, Any]:
    """``info`` of a batch and, for each ``key``, a mask ``_key`` of the replicas that have it."""
    return info | {f"_{key}": mask.copy() for key in info}


class ReplicaVectorEnv(Replicas, VectorEnv[Any, Any, Any]):
    """:class:`Replicas` as a Gymnasium vector environment."""
