"""The port of the environments: the :class:`BatchedDataPlane` protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ..scenarios import AnyScenario, Scenario
from ..snapshot import Snapshot


@runtime_checkable
class BatchedDataPlane(Protocol):
    """R replicas of a cluster of N servers behind m balancers: takes weights, gives snapshots.

    Snapshots have the leading axis [R], and ``stats`` [R, m]. A data plane whose balancers do not share a clock and
    counters gives every field the axes [R, m].
    """

    num_replicas: int
    num_balancers: int
    num_servers: int

    @property
    def features(self) -> frozenset[str]:
        """The features that are measured; the columns of the others are 0 and mean nothing."""

    @property
    def has_ground_truth(self) -> bool:
        """True if snapshots have the servers' CPU use, memory use and busy workers."""

    @property
    def has_interval(self) -> bool:
        """True if snapshots have statistics of the flows that ended in the interval."""

    def no_index_reason(self, source: AnyScenario | None = None) -> str | None:
        """What stands against placing flows by an index, without which background loads have no effect; None: nothing.

        Args:
            source: of the episodes, as :meth:`source` returns it; None: that of no options.
        """

    @property
    def info(self) -> Mapping[str, NDArray[Any]]:
        """Facts about the last reset or step beyond the snapshot, each with leading axes [R, m]."""

    def source(self, options: Mapping[str, Any] | None = None) -> AnyScenario | None:
        """The scenario, or distribution, of an episode that begins with these ``options`` of a reset; None: unknown.

        Raises:
            LbgymError: for options that do not make sense here; nothing has changed then.
        """

    def reset(
        self,
        seeds: Sequence[int],
        mask: NDArray[np.bool_] | None = None,
        source: AnyScenario | None = None,
    ) -> Snapshot:
        """Begin episodes of the masked replicas (None: all); the rows of the others are those of the snapshot before.

        Args:
            seeds: one per replica, of its flows and of what it draws from ``source``.
            mask: bool[R].
            source: as :meth:`source` returns it; None: that of no options.
        """

    def step(
        self,
        weights: NDArray[np.float64],
        *,
        background: NDArray[np.float64] | None = None,
        delays: NDArray[np.float64] | None = None,
        seeds: Sequence[int] | None = None,
        reset: NDArray[np.bool_] | None = None,
    ) -> Snapshot:
        """Apply weights float64[R, m, N], let one control interval pass, observe.

        Args:
            weights: not kept: the caller may reuse the array.
            background: float64[R, m, N], background loads that go with the weights; None: 0.
            delays: float64[R, m], seconds until the weights come into force; None: 0.
            seeds: of the replicas in ``reset``.
            reset: bool[R], replicas that begin an episode instead.
        """

    def scenario_of(self, replica: int) -> Scenario | None:
        """The scenario of a replica's episode; None: unknown."""

    def initial_weights(self) -> NDArray[np.float64]:
        """The weights that an episode begins with, float64[R, m, N], after its reset."""

    def weights_in_force(self) -> NDArray[np.float64]:
        """The weights that place flows now, float64[R, m, N]."""

    def close(self) -> None:
        """Release what the data plane holds; idempotent."""
