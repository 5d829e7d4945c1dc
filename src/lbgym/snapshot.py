"""A balancer's view at one instant: the :class:`Snapshot` that data planes publish and the env layer reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .features.columns import SERVICE_NAMES

__all__ = ["COUNTER_NAMES", "DEFAULT_STEP_INTERVAL", "IntervalStatistics", "Snapshot"]

#: Counters of flows per server, in column order where they form an array.
COUNTER_NAMES = ("started", "completed", "rejected", "failed")

#: Seconds of the data plane's clock between two settings of the weights, where nothing else is asked for.
DEFAULT_STEP_INTERVAL = 0.25


@dataclass(slots=True, eq=False)
class IntervalStatistics:
    """Statistics of the flows that ended during one control interval, by name.

    A rejected, failed or unrouted flow counts as ``rejected``, with an FCT of the scenario's ``reject_timeout``. Where
    no flow ended, the FCT statistics are 0, as the features of an empty reservoir are, and :attr:`ended` is 0.

    Attributes:
        values: float64[..., 8], columns of ``SERVICE_NAMES``. The properties are float64[...].
    """

    values: NDArray[np.float64]

    def __getitem__(self, index: Any) -> IntervalStatistics:
        """The part of a batch at ``index`` of its leading axes."""
        return IntervalStatistics(self.values[index])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.values, dtype) if copy or dtype is not None else self.values

    @property
    def completed(self) -> Any:
        """Flows that completed."""
        return self._column("completed")

    @property
    def rejected(self) -> Any:
        """Flows that were rejected, failed or found no active server."""
        return self._column("rejected")

    @property
    def ended(self) -> Any:
        """Flows that ended in any way; those that the FCT statistics are of."""
        return self.completed + self.rejected

    @property
    def fct_mean(self) -> Any:
        """Mean FCT, seconds."""
        return self._column("fct_mean")

    @property
    def fct_p50(self) -> Any:
        """Median FCT, seconds."""
        return self._column("fct_p50")

    @property
    def fct_p90(self) -> Any:
        """90th percentile of the FCT, seconds."""
        return self._column("fct_p90")

    @property
    def fct_p99(self) -> Any:
        """99th percentile of the FCT, seconds."""
        return self._column("fct_p99")

    @property
    def log_slowdown(self) -> Any:
        """Mean of ln(FCT / demand)."""
        return self._column("log_slowdown")

    @property
    def open_flows(self) -> Any:
        """Flows in the system, mean over the interval's time."""
        return self._column("open_flows")

    def _column(self, name: str) -> Any:
        return self.values[..., SERVICE_NAMES.index(name)]


@dataclass(slots=True)
class Snapshot:
    """One balancer's observation at one instant, and the data plane's counters.

    Shapes are those of a single data plane; a batch of replicas carries leading axes (``...``) before each. Every
    consumer (observations, rewards, policies) works on the trailing axes and so on both.

    Attributes:
        sequence_id: int[...], grows by 1 per publication.
        timestamp: float[...], seconds on the data plane's clock.
        active: bool[..., N], servers that take new flows.
        stats: float32[..., N, 11], columns of ``lbgym.features.FEATURE_NAMES``; zero rows for inactive servers.
        ground_truth: float32[..., N, 3], columns of ``GROUND_TRUTH_NAMES``, or None where the data plane has none.
        started, completed, rejected, failed: int64[..., N], flows since reset, per server. ``rejected``: turned away
            by a full server; ``failed``: lost with a server that went down.
            started = completed + rejected + failed + open, always.
        unrouted: int64[...], flows that found no active server; ``interval`` counts them as rejected.
        interval: statistics of the flows that ended since the last snapshot, or None where the data plane has none.
    """

    sequence_id: Any
    timestamp: Any
    active: NDArray[np.bool_]
    stats: NDArray[np.float32]
    ground_truth: NDArray[np.float32] | None
    started: NDArray[np.int64]
    completed: NDArray[np.int64]
    rejected: NDArray[np.int64]
    failed: NDArray[np.int64]
    unrouted: Any
    interval: IntervalStatistics | None = None

    def part(self, index: Any) -> Snapshot:
        """The part of a batch at ``index`` of its leading axes."""
        truth, interval = self.ground_truth, self.interval
        return Snapshot(
            self.sequence_id[index],
            self.timestamp[index],
            self.active[index],
            self.stats[index],
            None if truth is None else truth[index],
            self.started[index],
            self.completed[index],
            self.rejected[index],
            self.failed[index],
            self.unrouted[index],
            None if interval is None else interval[index],
        )
