"""A tournament tree over the servers' keys: the first of the least, and the first of those that are due, compiled.

Keys are floats of at least 0, so that their bits, as integers, are in the same order. A row has N keys. From a number
of servers on at which it pays they are filled up to whole blocks of ``BLOCK`` with infinity, and 2 P nodes follow: P is
a power of two, at least the number of blocks, node P + i the least key of block i, node k the lesser of nodes 2 k and
2 k + 1. A key's change costs a look at its block and at most log2(P) comparisons.
"""

from __future__ import annotations

import math

import numpy as np

from ..features.compile import compiled

_BITS = 4
#: Servers whose keys are compared one by one, several at a time.
BLOCK = 1 << _BITS
#: Servers from which on a tree is faster than a look at every key.
TREE_FROM = 96


def row_size(servers: int) -> int:
    """Size of a row of keys with its tree, if it has one."""
    if servers < TREE_FROM:
        return servers
    blocks = -(-servers // BLOCK)
    return blocks * BLOCK + (2 << (blocks - 1).bit_length())


@compiled(inline=True)
def _end(n):
    """Where the nodes begin: behind whole blocks."""
    return ((n + BLOCK - 1) >> _BITS) << _BITS


@compiled()
def _minimum(scores, n):
    """The least of ``n`` scores of at least 0: compared as integers of the same bits, several at a time."""
    bits = scores.view(np.int64)
    low = bits[0]
    for j in range(1, n):
        low = min(low, bits[j])
    return low


@compiled(inline=True)
def first_minimum(scores, n, start):
    """Index of the least of the first ``n`` scores, ties to the first from ``start`` on, cyclically."""
    low = _minimum(scores, n)
    bits = scores.view(np.int64)
    for j in range(start, n):
        if bits[j] == low:
            return j
    for j in range(start):
        if bits[j] == low:
            return j
    return start


@compiled(inline=True)
def _least_of_block(bits, block):
    first = block << _BITS
    low = bits[first]
    for j in range(BLOCK):
        low = min(low, bits[first + j])
    return low


@compiled()
def renew(keys, n, j, before):
    """Make good the nodes after key ``j`` of ``n``, which was ``before``, has changed."""
    bits = keys.view(np.int64)
    nodes = bits[_end(n) :]
    block = j >> _BITS
    k = (nodes.shape[0] >> 1) + block
    low = bits[j]
    if low >= nodes[k]:
        if before > keys[_end(n) + k]:
            # It was not the least, and is not now.
            return
        low = _least_of_block(bits, block)
    # As far up as the change is felt.
    while nodes[k] != low:
        nodes[k] = low
        low = min(low, nodes[k ^ 1])
        k >>= 1
        if k == 0:
            return


@compiled()
def rebuild(keys, n):
    """Make all nodes of ``n`` keys anew."""
    keys[n:] = math.inf
    bits = keys.view(np.int64)
    nodes = bits[_end(n) :]
    p = nodes.shape[0] >> 1
    for block in range((n + BLOCK - 1) >> _BITS):
        nodes[p + block] = _least_of_block(bits, block)
    for i in range(1, p):
        k = p - i
        nodes[k] = min(nodes[2 * k], nodes[2 * k + 1])


@compiled()
def first_least(keys, n, start):
    """As :func:`first_minimum`, by the nodes."""
    bits = keys.view(np.int64)
    nodes = bits[_end(n) :]
    p = nodes.shape[0] >> 1
    low = nodes[1]
    block = start >> _BITS
    k = p + block
    if nodes[k] == low:
        for j in range(start, (block + 1) << _BITS):
            if bits[j] == low:
                return j
    # Up to where a sibling to the right has it, or to the root: then it is before ``start``.
    while k > 1:
        if k & 1 == 0 and nodes[k + 1] == low:
            k += 1
            break
        k >>= 1
    while k < p:
        k *= 2
        if nodes[k] != low:
            k += 1
    j = (k - p) << _BITS
    while bits[j] != low:
        j += 1
    return j


@compiled()
def first_due(keys, n, now):
    """Index of the first key of at most ``now``, by the nodes; -1: there is none."""
    nodes = keys[_end(n) :]
    p = nodes.shape[0] >> 1
    if not nodes[1] <= now:
        return np.int64(-1)
    k = 1
    while k < p:
        k *= 2
        if not nodes[k] <= now:
            k += 1
    j = np.int64(k - p) << _BITS
    while not keys[j] <= now:
        j += 1
    return j
