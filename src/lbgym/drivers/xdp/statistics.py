"""From the samples that the program took to features: :class:`SampleStatistics`."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ...features import STATISTICS
from ...features.compile import compiled
from ...features.reservoir_kernel import CHANGED, FILLED, META_SIZE, RESULT_SIZE, reservoir_features
from .layout import SLOTS

#: Weight of a sample per second of its age, as everywhere in lbgym.
_LOG_DECAY = math.log(0.9)
#: A sample's time is in units of 2**20 ns.
_TICK = 2.0**20 * 1e-9


class SampleStatistics:
    """The five statistics of each reservoir, computed again only where samples have come.

    Args:
        servers: rows there is room for.
    """

    def __init__(self, servers: int) -> None:
        self._values, self._weights = np.zeros(SLOTS), np.zeros(SLOTS)
        self._meta = np.zeros(META_SIZE, np.int64)
        self._seen = np.zeros((servers, 2), np.uint64)
        self._results = np.zeros((servers, 2, RESULT_SIZE))

    def refresh(self, accepted: NDArray[np.uint64], samples: NDArray[np.uint64]) -> NDArray[np.float32]:
        """Statistics of FCTs, then of durations, float32[N, 10] in seconds; 0 where there is no sample.

        Args:
            accepted: uint64[N, 2], samples taken so far.
            samples: uint64[N, 2, SLOTS], as ``balancer.h`` has them.
        """
        n = len(accepted)
        _refresh(accepted, samples, self._seen, self._values, self._weights, self._meta, self._results)
        count = len(STATISTICS)
        return self._results[:n, :, :count].reshape(n, 2 * count).astype(np.float32)

    def forget(self, row: int) -> None:
        """A row belongs to another server from now on."""
        self._seen[row], self._results[row] = 0, 0.0


@compiled()
def _refresh(accepted, samples, seen, values, weights, meta, results):  # type: ignore[no-untyped-def]
    for i in range(accepted.shape[0]):
        for metric in range(2):
            if accepted[i, metric] == seen[i, metric]:
                continue
            words = samples[i, metric]
            newest = np.int64(-1)
            filled = 0
            for word in words:
                # A slot may be promised to a packet that has not written it yet.
                if word != 0:
                    newest = max(newest, np.int64(word >> np.uint64(32)))
                    filled += 1
            if filled == 0:
                continue
            seen[i, metric] = accepted[i, metric]
            filled = 0
            for word in words:
                if word != 0:
                    values[filled] = np.float64(word & np.uint64(0xFFFFFFFF)) * 1e-6
                    age = np.float64(newest - np.int64(word >> np.uint64(32))) * _TICK
                    weights[filled] = math.exp(_LOG_DECAY * age)
                    filled += 1
            meta[FILLED] = filled
            meta[CHANGED] = 1
            reservoir_features(values, weights, meta, results[i, metric])
