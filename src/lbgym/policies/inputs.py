"""Turn observations into what the networks of :mod:`lbgym.policies.networks` read."""

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


def server_inputs(observation: Any, features: int) -> tuple[Tensor, Tensor]:
    """Flat observations [B, N (1 + F)] -> inputs per server [B, N, F] and active bool[B, N]."""
    flat = torch.from_numpy(np.ascontiguousarray(observation, dtype=np.float32))
    n = flat.shape[-1] // (1 + features)
    return flat[:, n:].reshape(-1, n, features), flat[:, :n] > 0.5


def with_weights(observation: Any, weights: Any, features: int) -> NDArray[np.float32]:
    """Flat observations [B, N (1 + F)] and weights in force [B, N] -> [B, N (2 + F)], as with ``observe_weights=True``.

    For policies from before environments had that key: their actions must not change, so the logarithm is torch's,
    whose last bit may be another than that of :func:`lbgym.env.observations.relative_weights`.
    """
    rows, active = server_inputs(observation, features)
    log_w = torch.from_numpy(np.asarray(weights, dtype=np.float32)).clamp(min=1e-6).log_()
    mask = active.to(log_w.dtype)
    log_w = (log_w - (log_w * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)) * mask
    flat: NDArray[np.float32] = torch.cat([mask, torch.cat([rows, log_w.unsqueeze(-1)], -1).flatten(1)], -1).numpy()
    return flat


class Encoder:
    """Turn flat observations into the network's inputs, with a short memory.

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
        return 2 * self.features

    def reset(self) -> None:
        """Forget the moving average."""
        self.average = None

    def __call__(self, observation: Any, fresh: NDArray[np.bool_] | None = None) -> tuple[Tensor, Tensor]:
        """Observations [B, N (1 + F)] -> inputs [B, N, 2 F] and active [B, N].

        Rows of ``fresh`` bool[B] begin an episode; None: none does, except after :meth:`reset`.
        """
        now, active = server_inputs(observation, self.features)
        if self.average is None or self.average.shape != now.shape:
            self.average = now.clone()
        else:
            if fresh is not None:
                self.average[torch.from_numpy(fresh)] = now[torch.from_numpy(fresh)]
            self.average.lerp_(now, 1 - self.memory)
        return torch.cat([now, self.average], -1), active
