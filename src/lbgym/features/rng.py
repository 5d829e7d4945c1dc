"""SplitMix64 (Steele, Lea and Flood, 2014): one 64-bit word of state per stream, kept in int64 arrays."""

from __future__ import annotations

import math

import numpy as np

from .compile import compiled

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)
_S27, _S30, _S31, _S32, _S11 = (np.uint64(s) for s in (27, 30, 31, 32, 11))
_LOW32 = np.uint64(0xFFFFFFFF)
_ONE = np.uint64(1)
_TO_UNIT = 2.0**-53


@compiled(inline=True)
def mix64(x):
    """The finaliser: a bijection of uint64 in which every input bit flips half of the output bits."""
    x = np.uint64(x)
    x = (x ^ (x >> _S30)) * _MIX1
    x = (x ^ (x >> _S27)) * _MIX2
    return x ^ (x >> _S31)


@compiled()
def stream_seed(seed, kind, index):
    """The first state (int64) of the ``index``-th stream of a ``kind`` under ``seed``."""
    return np.int64(mix64(mix64(mix64(np.uint64(seed) + _GOLDEN) + np.uint64(kind)) + np.uint64(index)))


@compiled(inline=True)
def next_u64(states, i):
    """The next uint64 of stream ``states[i]``."""
    x = np.uint64(states[i]) + _GOLDEN
    states[i] = np.int64(x)
    return mix64(x)


@compiled(inline=True)
def to_unit(x):
    """uint64 to a float64 in (0, 1]."""
    return np.float64((x >> _S11) + _ONE) * _TO_UNIT


@compiled(inline=True)
def to_range(x, n):
    """uint64 to an index in [0, n), n below 2**31, from its high 32 bits (Lemire's multiply and shift)."""
    return np.int64(((x >> _S32) * np.uint64(n)) >> _S32)


@compiled(inline=True)
def low_unit(x):
    """The low 32 bits of a uint64 as a float64 in [0, 1), independent of ``to_range``."""
    return np.float64(x & _LOW32) * 2.0**-32


def _exponential_layers() -> tuple[np.ndarray, np.ndarray]:
    """Right ends and heights of 256 layers of equal area under exp(-x), the first with the tail beyond ``_TAIL``."""
    area = math.exp(-_TAIL) * (_TAIL + 1.0)
    ends = [area * math.exp(_TAIL), _TAIL]
    while len(ends) < 256:
        ends.append(-math.log(area / ends[-1] + math.exp(-ends[-1])))
    ends.append(0.0)
    return np.array(ends), np.exp(-np.array(ends))


_TAIL = 7.697117470131050
_ENDS, _HEIGHTS = _exponential_layers()
_LAYER = np.uint64(0xFF)


@compiled(inline=True)
def next_exponential(states, i):
    """A unit exponential from stream ``states[i]``, by the ziggurat method (Marsaglia and Tsang, 2000)."""
    x = next_u64(states, i)
    layer = np.int64(x & _LAYER)
    value = to_unit(x) * _ENDS[layer]
    if value < _ENDS[layer + 1]:
        return value
    return _exponential_at_edge(states, i, layer, value)


@compiled()
def _exponential_at_edge(states, i, layer, value):
    """The one case in a hundred in which the layer alone does not decide."""
    while True:
        if layer == 0:
            return _TAIL - math.log(to_unit(next_u64(states, i)))
        height = _HEIGHTS[layer] + to_unit(next_u64(states, i)) * (_HEIGHTS[layer + 1] - _HEIGHTS[layer])
        if height < math.exp(-value):
            return value
        x = next_u64(states, i)
        layer = np.int64(x & _LAYER)
        value = to_unit(x) * _ENDS[layer]
        if value < _ENDS[layer + 1]:
            return value
