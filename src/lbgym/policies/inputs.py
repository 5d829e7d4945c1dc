"""Turn observations into what networks read, in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def server_inputs(flat: Any, features: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Flat observations [..., N (1 + F)] -> inputs per server [..., N, F] and active bool[..., N]."""
    flat = np.ascontiguousarray(flat, np.float32)
    n = flat.shape[-1] // (1 + features)
    return flat[..., n:].reshape(*flat.shape[:-1], n, features), flat[..., :n] > 0.5


def with_weights(flat: Any, weights: Any, features: int) -> NDArray[np.float32]:
    """Flat observations [B, N (1 + F)] and weights in force [B, N] -> [B, N (2 + F)], as with ``observe_weights=True``.

    For policies from before environments had that key.
    """
    rows, active = server_inputs(flat, features)
    mask = active.astype(np.float32)
    log_w = np.log(np.maximum(np.asarray(weights, np.float32), np.float32(1e-6)))
    log_w = (log_w - (log_w * mask).sum(-1, keepdims=True) / np.maximum(mask.sum(-1, keepdims=True), 1)) * mask
    inputs = np.concatenate([rows, log_w[..., None]], -1)
    return np.concatenate([mask, inputs.reshape(len(inputs), -1)], -1)


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
        self.average: NDArray[np.float32] | None = None

    @property
    def size(self) -> int:
        """Inputs per server."""
        return 2 * self.features

    def reset(self) -> None:
        """Forget the moving average."""
        self.average = None

    def __call__(
        self, observation: Any, fresh: NDArray[np.bool_] | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Observations [B, N (1 + F)] -> inputs [B, N, 2 F] and active [B, N].

        Rows of ``fresh`` bool[B] begin an episode; None: none does, except after :meth:`reset`.
        """
        now, active = server_inputs(observation, self.features)
        if self.average is None or self.average.shape != now.shape:
            self.average = now.copy()
        else:
            if fresh is not None:
                self.average[fresh] = now[fresh]
            self.average += np.float32(1 - self.memory) * (now - self.average)
        return np.concatenate([now, self.average], -1), active
