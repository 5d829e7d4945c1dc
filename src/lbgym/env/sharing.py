"""Rewards of several balancers, from what each of them sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..snapshot import Snapshot

#: How balancers share rewards; see :class:`~lbgym.MultiLoadBalanceVectorEnv`.
REWARD_SHARINGS = ("mean", "field", "own", "difference")

_Float = NDArray[np.float64]


def shared_rewards(reward: Callable[[Snapshot], Any], views: Snapshot, sharing: str) -> _Float:
    """Every balancer's reward, float64[R, m], from what each sees (a snapshot with leading axes [R, m])."""
    if sharing in ("mean", "own"):
        own = np.asarray(reward(views), np.float64)
        return own if sharing == "own" else np.repeat(own.mean(axis=1, keepdims=True), own.shape[1], axis=1)
    together = np.asarray(reward(mean_field(views)), np.float64)[:, None]
    if sharing == "field":
        return np.repeat(together, views.stats.shape[1], axis=1)
    return together - np.asarray(reward(_field_of_others(views)), np.float64)


def mean_field(views: Snapshot) -> Snapshot:
    """The mean of what the balancers see (leading axes [R, m]), with leading axis [R]; the rest is of balancer 0."""
    count = views.active.sum(axis=1)
    field = views.part((slice(None), 0))
    field.stats = views.stats.sum(axis=1, dtype=np.float64) / np.maximum(count, 1)[..., None]
    field.active = count > 0
    return field


def _field_of_others(views: Snapshot) -> Snapshot:
    """For each balancer the mean of what the others see, with leading axes [R, m]."""
    count = _sum_of_others(views.active.astype(np.int64))
    others = views.part(...)
    others.stats = _sum_of_others(views.stats.astype(np.float64)) / np.maximum(count, 1)[..., None]
    others.active = count > 0
    return others


def _sum_of_others(parts: NDArray[Any]) -> NDArray[Any]:
    """Over axis 1, the sum without each entry; added up from both ends, since differences of sums can fall below 0."""
    before, after = np.zeros_like(parts), np.zeros_like(parts)
    np.cumsum(parts[:, :-1], axis=1, out=before[:, 1:])
    np.cumsum(parts[:, :0:-1], axis=1, out=after[:, -2::-1])
    return before + after
