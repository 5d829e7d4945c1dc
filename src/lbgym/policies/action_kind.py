"""Environment actions from one choice per server: :class:`ActionKind`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeGuard

import gymnasium
import numpy as np
from numpy.typing import NDArray

from ..errors import LbgymError


@dataclass(frozen=True)
class ActionKind:
    """The kind of action that an environment takes, as one choice per server.

    Attributes:
        choices: weights to choose from per server; 0 for continuous actions in [-1, 1].
        joint: whether the choices are numbered together, the last server's varying fastest.
        numbers: continuous numbers per server: 1, or 2 for actions of type "index".
    """

    choices: int
    joint: bool
    numbers: int = 1

    @classmethod
    def of(cls, space: gymnasium.Space[Any], num_servers: int) -> ActionKind:
        """The kind of a single environment's action space.

        Raises:
            LbgymError: for a space that these networks cannot act in.
        """
        if is_normalized(space):
            return cls(0, False)
        if _is_unit_box(space) and len(space.shape) == 2:
            return cls(0, False, numbers=space.shape[1])
        if isinstance(space, gymnasium.spaces.Box):
            raise LbgymError(f'these networks act in [-1, 1]: use action_type="normalized" instead of {space}')
        if isinstance(space, gymnasium.spaces.MultiDiscrete):
            return cls(int(space.nvec[0]), False)
        if isinstance(space, gymnasium.spaces.Discrete):
            return cls(round(float(space.n) ** (1 / num_servers)), True)
        raise LbgymError(f"these networks know Box(-1, 1), MultiDiscrete and Discrete action spaces, got {space}")

    def actor_arguments(self, features: int, hidden: int) -> dict[str, Any]:
        """Keywords of the :class:`~lbgym.policies.networks.FlatServerNetwork` for these actions."""
        return {
            "features": features,
            "hidden": hidden,
            "outputs": self.choices or self.numbers,
            "joint": self.joint,
            "centered": not self.choices,
        }

    def encode(self, choice: NDArray[Any]) -> Any:
        """Environment actions of choices [B, N], or of numbers [B, N, 2]."""
        if not self.choices:
            return np.clip(choice, -1.0, 1.0).astype(np.float32)
        if not self.joint:
            return choice.astype(np.int64)
        return choice.astype(np.int64) @ (self.choices ** np.arange(choice.shape[-1])[::-1])


def is_normalized(space: gymnasium.Space[Any]) -> bool:
    """True if actions are of type "normalized": logarithms of weights, of which only the differences matter."""
    return _is_unit_box(space) and len(space.shape) == 1


def _is_unit_box(space: gymnasium.Space[Any]) -> TypeGuard[gymnasium.spaces.Box]:
    return isinstance(space, gymnasium.spaces.Box) and bool(np.all(space.low == -1) and np.all(space.high == 1))
