"""Names and states of servers, for people and for metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ..errors import RegionError
from ..sharedmemory import ServerState, SharedMemoryRegion

#: Every state, in the words of commands and metrics, by value.
STATE_NAMES = tuple(state.name.lower() for state in sorted(ServerState))


def server_labels(names: Sequence[str], count: int) -> tuple[str, ...]:
    """A unique label for each of the first ``count`` servers: its name, or its index where it has none.

    Servers that share a name, or whose name is the index of an unnamed one, have ``name#index``.
    """
    return _labels(tuple(names), count)


# The controller asks in every step, and names hardly ever change.
@lru_cache(maxsize=16)
def _labels(names: tuple[str, ...], count: int) -> tuple[str, ...]:
    labels = [(names[i] if i < len(names) else "") or str(i) for i in range(count)]
    times = Counter(labels)
    unique = tuple(
        f"{label}#{i}" if times[label] > 1 and i < len(names) and names[i] else label for i, label in enumerate(labels)
    )
    return unique if len(set(unique)) == count else tuple(map(str, range(count)))


def region_labels(region: SharedMemoryRegion, count: int) -> tuple[str, ...]:
    """:func:`server_labels` of a region; indices where its names cannot be read."""
    try:
        names: Sequence[str] = region.server_names
    except RegionError:
        names = ()
    return server_labels(names, count)


def state_names(states: NDArray[np.uint8]) -> tuple[str, ...]:
    """``unknown``, ``up``, ``draining`` or ``down`` for each of uint8[N] states."""
    return tuple(STATE_NAMES[state] if state < len(STATE_NAMES) else STATE_NAMES[0] for state in states.tolist())
