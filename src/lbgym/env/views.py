"""Views of a batched data plane: one balancer, balancer 0 of every replica, or every balancer.

A view says which leading axes an environment's weights, rewards and snapshots have.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..features.columns import column_index
from ..snapshot import IntervalStatistics, Snapshot
from .sharing import mean_field


class View(ABC):
    """A view of R replicas with m balancers.

    Attributes:
        shape: the leading axes.
    """

    shape: tuple[int, ...]

    @abstractmethod
    def snapshot(self, batch: Snapshot) -> Snapshot:
        """The data plane's snapshot, as this view shows it."""

    @abstractmethod
    def of(self, values: NDArray[Any]) -> Any:
        """The part of values [R, m, ...] that this view shows."""

    @abstractmethod
    def spread(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """Weights [*shape, N] in a form that broadcasts to [R, m, N]."""

    @abstractmethod
    def facts(self, each: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
        """Facts by replica, as arrays with the leading axes of the view; 0 for replicas without any."""

    @abstractmethod
    def shown(self, snapshot: Snapshot, replica: int) -> Snapshot:
        """The snapshot that a picture of a replica shows, without leading axes."""


def _shared(batch: Snapshot) -> bool:
    """True if the balancers share a clock and counters, so that only ``stats`` has their axis."""
    return batch.active.ndim == batch.stats.ndim - 2


class OneView(View):
    """Balancer 0 of the only replica: no leading axes."""

    shape = ()

    def snapshot(self, batch: Snapshot) -> Snapshot:
        at: Any = 0 if _shared(batch) else (0, 0)
        truth, interval = batch.ground_truth, batch.interval
        return Snapshot(
            int(batch.sequence_id[at]),
            float(batch.timestamp[at]),
            batch.active[at],
            batch.stats[0, 0],
            None if truth is None else truth[at],
            batch.started[at],
            batch.completed[at],
            batch.rejected[at],
            batch.failed[at],
            int(batch.unrouted[at]),
            None if interval is None else IntervalStatistics(interval.values[at]),
        )

    def of(self, values: NDArray[Any]) -> Any:
        value = values[0, 0]
        return value.copy() if isinstance(value, np.ndarray) else value.item()

    def spread(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        return weights

    def facts(self, each: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
        return dict(each[0])

    def shown(self, snapshot: Snapshot, replica: int) -> Snapshot:
        return snapshot


class ReplicasView(View):
    """Balancer 0 of every replica: leading axis [R]."""

    def __init__(self, num_replicas: int) -> None:
        self.shape = (num_replicas,)

    def snapshot(self, batch: Snapshot) -> Snapshot:
        if not _shared(batch):
            return batch.part((slice(None), 0))
        batch.stats = batch.stats[:, 0]
        return batch

    def of(self, values: NDArray[Any]) -> Any:
        return values[:, 0].copy()

    def spread(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        return weights[:, None]

    def facts(self, each: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for name, first in next(iter(each.values())).items():
            values = merged[name] = np.zeros((self.shape[0], *np.shape(first)), np.asarray(first).dtype)
            for replica, facts in each.items():
                values[replica] = facts[name]
        return merged

    def shown(self, snapshot: Snapshot, replica: int) -> Snapshot:
        return snapshot.part(replica)


class BalancersView(ReplicasView):
    """Every balancer of every replica: leading axes [R, m]."""

    def __init__(self, num_replicas: int, num_balancers: int) -> None:
        self.shape = (num_replicas, num_balancers)

    def snapshot(self, batch: Snapshot) -> Snapshot:
        if not _shared(batch):
            return batch
        m = self.shape[1]

        def each(part: NDArray[Any]) -> NDArray[Any]:
            return np.broadcast_to(part[:, None], (len(part), m, *part.shape[1:]))

        truth, interval = batch.ground_truth, batch.interval
        return Snapshot(
            each(batch.sequence_id),
            each(batch.timestamp),
            np.repeat(batch.active[:, None], m, axis=1),
            batch.stats,
            None if truth is None else each(truth),
            each(batch.started),
            each(batch.completed),
            each(batch.rejected),
            each(batch.failed),
            each(batch.unrouted),
            None if interval is None else IntervalStatistics(each(interval.values)),
        )

    def of(self, values: NDArray[Any]) -> Any:
        return values.copy()

    def spread(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        return weights

    def facts(self, each: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
        merged = super().facts(each)
        return {name: np.repeat(values[:, None], self.shape[1], axis=1) for name, values in merged.items()}

    def shown(self, snapshot: Snapshot, replica: int) -> Snapshot:
        """The cluster as all balancers see it together: their open flows added up, their times averaged."""
        one = snapshot.part(slice(replica, replica + 1))
        field = mean_field(one).part(0)
        column = column_index("n_flow_on")
        field.stats[:, column] = one.stats[0, ..., column].sum(axis=0)
        return field
