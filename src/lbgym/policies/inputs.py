"""Turn observations and the weights in force into what the networks of :mod:`lbgym.policies.networks` read."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import MissingExtraError

try:
    import torch
    from torch import Tensor
except ModuleNotFoundError as error:
    raise MissingExtraError("torch", "train", "a policy in plain torch") from error


def server_inputs(observation: Any, weights: Any, features: int) -> tuple[Tensor, Tensor]:
    """Flat observations [B, N (1 + F)] and weights in force [B, N] -> inputs [B, N, F + 1] and active bool[B, N].

    Per server: the F features, and the logarithm of its weight relative to the active servers' geometric mean, since
    dispatch rules know no other scale. Without it a policy could not tell a slow server from one that was given too
    much.
    """
    flat = torch.from_numpy(np.ascontiguousarray(observation, dtype=np.float32))
    n = flat.shape[-1] // (1 + features)
    active = flat[:, :n] > 0.5
    log_w = torch.from_numpy(np.asarray(weights, dtype=np.float32)).clamp(min=1e-6).log_()
    mask = active.to(log_w.dtype)
    log_w = (log_w - (log_w * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)) * mask
    return torch.cat([flat[:, n:].reshape(-1, n, features), log_w.unsqueeze(-1)], -1), active


def with_weights(flat: Tensor, weights: Any, features: int) -> Tensor:
    """Flat observations [B, N (1 + F)] and weights in force [B, N] -> [B, N (2 + F)], still flat: mask, then features.

    The feature added to each server is that of :func:`server_inputs`.
    """
    inputs, active = server_inputs(flat.numpy(), weights, features)
    return torch.cat([active.to(inputs.dtype), inputs.flatten(1)], -1)


class Encoder:
    """Turn flat observations and the weights in force into the network's inputs, with a short memory.

    Per server: the inputs of :func:`server_inputs` and their exponential moving average, since one observation of a
    queue is mostly noise.

    Args:
        features: F, features per server in the observation.
        memory: share of the moving average that a step keeps, in [0, 1).
    """

    def __init__(self, features: int, memory: float) -> None:
        self.features, self.memory = features, memory
        self.average: Tensor | None = None

    @property
    def size(self) -> int:
        """Inputs per server."""
        return 2 * (self.features + 1)

    def reset(self) -> None:
        """Forget the moving average."""
        self.average = None

    def __call__(self, observation: Any, weights: Any, fresh: NDArray[np.bool_] | None = None) -> tuple[Tensor, Tensor]:
        """Observations [B, N (1 + F)] and weights [B, N] -> inputs [B, N, 2 (F + 1)] and active [B, N].

        Rows of ``fresh`` bool[B] begin an episode; None: none does, except after :meth:`reset`.
        """
        now, active = server_inputs(observation, weights, self.features)
        if self.average is None or self.average.shape != now.shape:
            self.average = now.clone()
        else:
            if fresh is not None:
                self.average[torch.from_numpy(fresh)] = now[torch.from_numpy(fresh)]
            self.average.lerp_(now, 1 - self.memory)
        return torch.cat([now, self.average], -1), active
