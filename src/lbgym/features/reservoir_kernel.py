"""Reservoir sampling compiled: a few nanoseconds per sample, features only for what changed.

One reservoir is a row of each of these arrays (any leading axes):

* ``values`` float64[K]: the samples;
* ``weights`` float64[K]: their decay weights, relative to the reservoir's reference time;
* ``meta`` int64[META_SIZE]: filled slots, samples accepted, whether one came since the last observation, random state;
* ``result`` float64[RESULT_SIZE]: mean, p90, std, mean_decay, p90_decay as last computed, and the reference time.

Decay weights are normalised by their sum, hence relative: without a new sample no feature changes, and no weight has to
be computed again as time goes by. A quantile is searched from where it was last time: passes over all slots without a
branch, of which a few suffice because an interval's samples move a quantile by a few places. That beats keeping the
slots in order, whose cost grows with every sample.
"""

from __future__ import annotations

import math

import numpy as np

from .compile import compiled
from .rng import next_u64, to_range, to_unit

FILLED, ACCEPTED, CHANGED, RNG, META_SIZE = 0, 1, 2, 3, 4
MEAN, P90, STD, MEAN_DECAY, P90_DECAY, REFERENCE, P90_FLOOR, RESULT_SIZE = 0, 1, 2, 3, 4, 5, 6, 7

OVERWRITE, UNIFORM = 0, 1

#: Weights are kept within exp(+-this) of the newest one's, so that none overflows.
_MAX_EXPONENT = 40.0
#: A search moves from sample to sample this often before it halves the range of values instead.
_MAX_MOVES = 8

#: The bits of an infinite float64.
_INFINITY = np.int64(0x7FF0000000000000)
_VECTOR = {"nsz", "reassoc", "contract"}


@compiled(inline=True)
def reservoir_add(values, weights, meta, result, value, time, probability, algorithm, log_decay):
    """Offer one sample; ``time`` must not be before the reservoir's newest sample."""
    if probability < 1.0 and to_unit(next_u64(meta, RNG)) > probability:
        return
    capacity = values.shape[0]
    filled = meta[FILLED]
    meta[ACCEPTED] += 1
    if filled < capacity:
        slot = filled
        meta[FILLED] = filled + 1
        if filled == 0:
            result[REFERENCE] = time
    elif algorithm == OVERWRITE:
        slot = to_range(next_u64(meta, RNG), capacity)
    else:
        slot = np.int64(next_u64(meta, RNG) % np.uint64(meta[ACCEPTED]))
        if slot >= capacity:
            return
    exponent = log_decay * (result[REFERENCE] - time)
    if exponent > _MAX_EXPONENT:
        _rebase(weights, meta[FILLED], math.exp(-exponent))
        result[REFERENCE] = time
        exponent = 0.0
    values[slot] = value
    weights[slot] = math.exp(exponent)
    meta[CHANGED] = 1


@compiled()
def _rebase(weights, n, factor):
    for k in range(n):
        weights[k] *= factor


@compiled(fastmath=_VECTOR)
def _moments(values, weights, n):
    """Mean, population standard deviation, sum of weights, weighted mean."""
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


@compiled(inline=True, fastmath=_VECTOR)
def _mass(bits, weights, n, x, weighted):
    """The weight (or number) of the samples below x, and of those at or below it."""
    below = 0.0
    upto = 0.0
    for k in range(n):
        w = weights[k] if weighted else 1.0
        below += w if bits[k] < x else 0.0
        upto += w if bits[k] <= x else 0.0
    return below, upto


@compiled(inline=True)
def _next_above(bits, n, x):
    """The least sample above x; ``_INFINITY`` if there is none."""
    low = _INFINITY
    for k in range(n):
        low = min(low, bits[k] if bits[k] > x else _INFINITY)
    return low


@compiled(inline=True)
def _next_below(bits, n, x):
    """The largest sample below x; -1 if there is none."""
    high = np.int64(-1)
    for k in range(n):
        high = max(high, bits[k] if bits[k] < x else np.int64(-1))
    return high


@compiled(inline=True)
def _quantile(bits, weights, n, target, x, weighted):
    """The least sample at or below which there is weight (or number) ``target``, and the weight there is.

    The search starts from x and goes from sample to sample; should it have far to go, it halves the range now and then.
    """
    low = np.int64(-1)
    high = _INFINITY
    moves = 0
    while True:
        below, upto = _mass(bits, weights, n, x, weighted)
        if below < target <= upto:
            return x, upto
        moves += 1
        if upto < target:
            low = x
            following = _next_above(bits, n, x)
            if following == _INFINITY:
                return x, upto
        else:
            high = x
            following = _next_below(bits, n, x)
            if following < 0:
                return x, upto
        if moves % _MAX_MOVES == 0:
            middle = low + ((high - low) >> 1)
            if low < middle < high:
                following = middle
        x = following


@compiled()
def reservoir_features(values, weights, meta, result):
    """Refresh ``result``; does nothing when no sample came since the last call."""
    if meta[CHANGED] == 0:
        return
    meta[CHANGED] = 0
    n = meta[FILLED]
    mean, std, weight, mean_decay = _moments(values, weights, n)
    # Floats of one sign are ordered as the integers of the same bits, on which a minimum is a vector instruction.
    bits = values.view(np.int64)
    found = result.view(np.int64)
    position = 0.9 * (n - 1)
    rank = int(position)
    x, upto = _quantile(bits, weights, n, rank + 1.0, found[P90_FLOOR], False)
    found[P90_FLOOR] = x
    found[P90] = _next_above(bits, n, x) if rank + 1 < n and upto < rank + 2.0 else x
    p90 = result[P90_FLOOR] + (position - rank) * (result[P90] - result[P90_FLOOR])
    # The slack decides exact ties (equal weights) for the lower sample, as exact arithmetic would.
    target = 0.9 * weight * (1.0 - 1e-12)
    found[P90_DECAY], upto = _quantile(bits, weights, n, target, found[P90_DECAY], True)
    result[MEAN] = mean
    result[P90] = p90
    result[STD] = std
    result[MEAN_DECAY] = mean_decay


@compiled()
def add_many(values, weights, meta, result, samples, times, probability, algorithm, log_decay):
    """Offer ``samples`` float64[n] at non-decreasing ``times`` float64[n] to one reservoir."""
    for i in range(samples.shape[0]):
        reservoir_add(values, weights, meta, result, samples[i], times[i], probability, algorithm, log_decay)
