"""What a balancer sees at one instant: the :class:`Snapshot` that data planes publish and the env layer reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Counters of flows per server, in column order where they form an array.
COUNTER_NAMES = ("started", "completed", "rejected", "failed")


@dataclass(slots=True)
class Snapshot:
    """What one balancer sees at one instant, and what the data plane counted.

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
        unrouted: int64[...], flows that found no active server; they count as rejected in ``service``.
        service: float64[..., 8], statistics of the interval (``SERVICE_NAMES``), or None where the data plane has none.
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
    service: NDArray[np.float64] | None

    def part(self, index: Any) -> Snapshot:
        """The part of a batch at ``index`` of its leading axes."""
        parts: Any = {name: getattr(self, name) for name in Snapshot.__slots__}
        chosen: Any = {name: None if part is None else part[index] for name, part in parts.items()}
        return Snapshot(**chosen)
