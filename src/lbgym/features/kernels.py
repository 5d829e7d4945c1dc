"""Reservoir sampling compiled: a few nanoseconds per sample, features only for what changed.

One reservoir is a row of each of these arrays (any leading axes):

* ``values`` float64[K]: the samples;
* ``weights`` float64[K]: decay weight relative to the reservoir's reference time. A slot overwritten since the last
  observation is *dirty* and holds its sample's time instead, so that the exponential is paid once per observation;
* ``index`` int16[3, K]: the slots in ascending order of value; the dirty slots; a flag per slot (1: dirty);
* ``meta`` int64[META_SIZE]: filled slots, samples accepted, dirty slots, slots in ascending order, random state;
* ``result`` float64[6]: mean, p90, std, mean_decay, p90_decay as last computed, and the reference time.

Decay weights are normalised by their sum, hence relative: without a new sample no feature changes, and no weight has to
be computed again as time goes by.
"""

from __future__ import annotations

import math

import numpy as np

from .compile import compiled
from .rng import next_u64, to_range, to_unit

ORDER, DIRTY, FLAG = 0, 1, 2
FILLED, ACCEPTED, NUM_DIRTY, NUM_ORDERED, RNG, META_SIZE = 0, 1, 2, 3, 4, 5
MEAN, P90, STD, MEAN_DECAY, P90_DECAY, REFERENCE, RESULT_SIZE = 0, 1, 2, 3, 4, 5, 6

OVERWRITE, UNIFORM = 0, 1

#: Weights are kept within exp(+-this) of the newest one's, so that none overflows.
_MAX_EXPONENT = 40.0


@compiled(inline=True)
def reservoir_add(values, weights, index, meta, value, time, probability, algorithm):
    """Offer one sample; ``time`` must not be before the reservoir's newest sample."""
    if probability < 1.0 and to_unit(next_u64(meta, RNG)) > probability:
        return
    capacity = values.shape[0]
    filled = meta[FILLED]
    meta[ACCEPTED] += 1
    if filled < capacity:
        slot = filled
        meta[FILLED] = filled + 1
    elif algorithm == OVERWRITE:
        slot = to_range(next_u64(meta, RNG), capacity)
    else:
        slot = np.int64(next_u64(meta, RNG) % np.uint64(meta[ACCEPTED]))
        if slot >= capacity:
            return
    values[slot] = value
    weights[slot] = time
    if index[FLAG, slot] == 0:
        index[FLAG, slot] = 1
        index[DIRTY, meta[NUM_DIRTY]] = slot
        meta[NUM_DIRTY] += 1


@compiled(fastmath={"reassoc", "nsz", "contract"})
def _sums(values, weights, n):
    total = 0.0
    weight = 0.0
    weighted = 0.0
    for k in range(n):
        total += values[k]
        weight += weights[k]
        weighted += weights[k] * values[k]
    mean = total / n
    square = 0.0
    for k in range(n):
        square += (values[k] - mean) * (values[k] - mean)
    return mean, math.sqrt(square / n), weight, weighted / weight


@compiled(allocates=True)
def _sort_dirty(values, dirty, num_dirty):
    slots = dirty[:num_dirty].copy()
    ascending = np.argsort(values[slots])
    for i in range(num_dirty):
        dirty[i] = slots[ascending[i]]


@compiled()
def _restore_order(values, index, meta):
    """Bring the dirty slots to their places in the ascending order, in one pass over the others."""
    num_dirty = meta[NUM_DIRTY]
    dirty = index[DIRTY]
    order = index[ORDER]
    # Sorting few dirty slots by insertion is cheap; after a burst all slots are dirty and heads for quadratic time.
    if num_dirty <= 24:
        for i in range(1, num_dirty):
            slot = dirty[i]
            value = values[slot]
            k = i - 1
            while k >= 0 and values[dirty[k]] > value:
                dirty[k + 1] = dirty[k]
                k -= 1
            dirty[k + 1] = slot
    else:
        _sort_dirty(values, dirty, num_dirty)
    kept = 0
    flag = index[FLAG]
    for k in range(meta[NUM_ORDERED]):
        slot = order[k]
        order[kept] = slot
        kept += 1 - flag[slot]
    # Merge from the back: nothing kept is overwritten before it has moved.
    k = kept - 1
    d = num_dirty - 1
    out = kept + num_dirty - 1
    while d >= 0:
        slot = dirty[d]
        value = values[slot]
        while k >= 0 and values[order[k]] > value:
            order[out] = order[k]
            out -= 1
            k -= 1
        order[out] = slot
        out -= 1
        d -= 1
        flag[slot] = 0
    meta[NUM_ORDERED] = kept + num_dirty


@compiled()
def reservoir_features(values, weights, index, meta, result, log_decay):
    """Refresh ``result``; does nothing when no sample came since the last call."""
    num_dirty = meta[NUM_DIRTY]
    if num_dirty == 0:
        return
    n = meta[FILLED]
    newest = -math.inf
    for i in range(num_dirty):
        newest = max(newest, weights[index[DIRTY, i]])
    if meta[NUM_ORDERED] == 0:
        result[REFERENCE] = newest
    elif -log_decay * (newest - result[REFERENCE]) > _MAX_EXPONENT:
        factor = math.exp(log_decay * (newest - result[REFERENCE]))
        for k in range(n):
            if index[FLAG, k] == 0:
                weights[k] *= factor
        result[REFERENCE] = newest
    for i in range(num_dirty):
        slot = index[DIRTY, i]
        weights[slot] = math.exp(log_decay * (result[REFERENCE] - weights[slot]))
    _restore_order(values, index, meta)
    meta[NUM_DIRTY] = 0

    mean, std, weight, mean_decay = _sums(values, weights, n)
    order = index[ORDER]
    position = 0.9 * (n - 1)
    low = int(position)
    p90 = values[order[low]]
    if low + 1 < n:
        p90 += (position - low) * (values[order[low + 1]] - p90)
    # Smallest value with at least 90 % of the weight at or below it. The slack decides exact ties as NumPy does.
    above = 0.1 * weight * (1.0 + 1e-12)
    k = n - 1
    tail = weights[order[k]]
    while tail <= above and k > 0:
        k -= 1
        tail += weights[order[k]]
    result[MEAN] = mean
    result[P90] = p90
    result[STD] = std
    result[MEAN_DECAY] = mean_decay
    result[P90_DECAY] = values[order[k]]


@compiled()
def add_many(values, weights, index, meta, samples, times, probability, algorithm):
    """Offer ``samples`` float64[n] at non-decreasing ``times`` float64[n] to one reservoir."""
    for i in range(samples.shape[0]):
        reservoir_add(values, weights, index, meta, samples[i], times[i], probability, algorithm)


