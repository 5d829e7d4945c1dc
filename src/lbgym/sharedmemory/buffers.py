"""Private copies of what is in a region: :class:`ObservationBuffer` and :class:`Action`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..snapshot import Snapshot
from . import abi

_NS = 1_000_000_000


def _word(struct: abi.Struct, field: str) -> int:
    return struct.offset(field) // 8


_SEQUENCE_ID = _word(abi.FRAME, "sequence_id")
_TIMESTAMP = _word(abi.FRAME, "timestamp")
_PUBLISHED_AT = _word(abi.FRAME, "published_at")
_APPLIED_SEQUENCE_ID = _word(abi.FRAME, "applied_sequence_id")
_APPLIED_AT = _word(abi.FRAME, "applied_at")
_COUNTS = _word(abi.FRAME, "num_servers")
_UNROUTED = _word(abi.FRAME, "unrouted")
_FCT_COUNT = _word(abi.FRAME, "fct_count")
_FCT_SUM = _word(abi.FRAME, "fct_sum")
_ACTION_SEQUENCE_ID = _word(abi.ACTION, "sequence_id")
_ACTION_WRITTEN_AT = _word(abi.ACTION, "written_at")
_ACTION_LEASE = _word(abi.ACTION, "lease")
_ACTION_COUNTS = _word(abi.ACTION, "num_servers")
_LOW32 = 0xFFFFFFFF


class ObservationBuffer:
    """Memory for one observation, with NumPy views of its sections.

    Attributes:
        capacity: servers there is room for.
        words: uint64[], all of it.
        active: bool[capacity].
        stats: float32[capacity, 11]; columns of ``lbgym.features.FEATURE_NAMES``.
        ground_truth: float32[capacity, 3]; only if ``has_ground_truth``.
        counters: uint64[capacity, 4]; columns of ``lbgym.sharedmemory.abi.COUNTER_NAMES``.
        weights: float64[capacity], in force in the data plane.
        safe_weights: float64[capacity].

    The first ``num_servers`` rows count, the others hold what was there before.
    """

    def __init__(self, layout: abi.Layout) -> None:
        self.capacity = capacity = layout.capacity
        self.words: NDArray[np.uint64] = np.zeros(layout.frame_size // 8, np.uint64)
        self._integers = memoryview(self.words)  # type: ignore[arg-type]
        memory = self.words.view(np.uint8)
        views = {}
        for section in abi.FRAME_SECTIONS:
            first = layout.frame_sections[section.name]
            dtype = abi.Field(section.name, section.type, "").dtype
            size = np.dtype(dtype).itemsize * section.columns * capacity
            view = memory[first : first + size].view(dtype)
            views[section.name] = view.reshape(capacity, section.columns) if section.columns > 1 else view
        self.active: NDArray[np.bool_] = views["active"].view(np.bool_)
        self.stats: NDArray[np.float32] = views["stats"]
        self.ground_truth: NDArray[np.float32] = views["ground_truth"]
        self.counters: NDArray[np.uint64] = views["counters"]
        self.weights: NDArray[np.float64] = views["weights"]
        self.safe_weights: NDArray[np.float64] = views["safe_weights"]

    @property
    def sequence_id(self) -> int:
        return self._integers[_SEQUENCE_ID]

    @property
    def timestamp_ns(self) -> int:
        """On the data plane's clock."""
        return self._integers[_TIMESTAMP]

    @property
    def timestamp(self) -> float:
        """Seconds on the data plane's clock."""
        return self._integers[_TIMESTAMP] / _NS

    @property
    def published_at(self) -> int:
        """Ns of the monotonic clock."""
        return self._integers[_PUBLISHED_AT]

    @property
    def num_servers(self) -> int:
        return self._integers[_COUNTS] & _LOW32

    @property
    def flags(self) -> int:
        return self._integers[_COUNTS] >> 32

    @property
    def has_ground_truth(self) -> bool:
        return bool(self.flags & abi.FLAG_GROUND_TRUTH)

    @property
    def safe(self) -> bool:
        """Whether the safe weights were in force."""
        return bool(self.flags & abi.FLAG_SAFE)

    @property
    def applied_sequence_id(self) -> int | None:
        """Of the last action that was put in force; None if none was."""
        return self._integers[_APPLIED_SEQUENCE_ID] if self.flags & abi.FLAG_APPLIED else None

    @property
    def applied_at(self) -> int | None:
        """When that was, ns of the monotonic clock."""
        return self._integers[_APPLIED_AT] if self.flags & abi.FLAG_APPLIED else None

    @property
    def fct_count(self) -> int:
        """Flows that ended so far."""
        return self._integers[_FCT_COUNT]

    @property
    def fct_sum_ns(self) -> int:
        """Ns, the sum of their FCTs."""
        return self._integers[_FCT_SUM]

    @property
    def unrouted(self) -> int:
        """Flows that found no active server so far."""
        return self._integers[_UNROUTED]

    def snapshot(self, num_servers: int | None = None) -> Snapshot:
        """As a :class:`~lbgym.Snapshot` with arrays of its own.

        Args:
            num_servers: rows it shall have: servers that the data plane does not know are inactive, and those beyond
                are left out. None: as many as the data plane knows.
        """
        known = self.num_servers
        n = known if num_servers is None else num_servers
        active = self.active[:n].copy()
        stats = self.stats[:n].copy()
        ground_truth = self.ground_truth[:n].copy() if self.has_ground_truth else None
        counters = self.counters[:n].T.astype(np.int64)
        if n > len(active) or n > known:
            active, stats, counters = _rows(active, n, known), _rows(stats, n, known), _rows(counters.T, n, known).T
            ground_truth = None if ground_truth is None else _rows(ground_truth, n, known)
        # The contract has zero rows for inactive servers, whatever a data plane may publish there.
        stats[~active] = 0.0
        started, completed, rejected, failed = counters
        return Snapshot(
            sequence_id=self.sequence_id,
            timestamp=self.timestamp,
            active=active,
            stats=stats,
            ground_truth=ground_truth,
            started=started,
            completed=completed,
            rejected=rejected,
            failed=failed,
            unrouted=self.unrouted,
        )

    def fill(self, snapshot: Snapshot, fct_count: int, fct_sum: int) -> None:
        """Take a snapshot's arrays over; ``fct_sum`` in ns. A negative counter becomes one that no reader accepts.

        Raises:
            ValueError, TypeError, OverflowError: for arrays of other shapes or types, and numbers that do not fit.
        """
        n = snapshot.active.shape[0]
        truth = snapshot.ground_truth
        _check("active", snapshot.active, (n,))
        _check("stats", snapshot.stats, (n, self.stats.shape[1]))
        for name in abi.COUNTER_NAMES:
            _check(name, getattr(snapshot, name), (n,))
        self.active[:n] = snapshot.active
        self.stats[:n] = snapshot.stats
        flags = 0
        if truth is not None:
            _check("ground_truth", truth, (n, self.ground_truth.shape[1]))
            self.ground_truth[:n] = truth
            flags = abi.FLAG_GROUND_TRUTH
        counters = self.counters
        counters[:n, 0] = snapshot.started
        counters[:n, 1] = snapshot.completed
        counters[:n, 2] = snapshot.rejected
        counters[:n, 3] = snapshot.failed
        words = self._integers
        words[_TIMESTAMP] = _whole("timestamp in ns", round(float(snapshot.timestamp) * _NS))
        words[_COUNTS] = n | flags << 32
        words[_UNROUTED] = _whole("unrouted", int(snapshot.unrouted))
        words[_FCT_COUNT] = _whole("fct_count", fct_count)
        words[_FCT_SUM] = _whole("fct_sum in ns", fct_sum)

    def set_applied(self, applied: tuple[int, int] | None, safe: bool) -> None:
        """Note the sequence id of the action in force and since when (ns); and whether the safe weights are instead."""
        words = self._integers
        flags = abi.FLAG_SAFE if safe else 0
        if applied is not None:
            flags |= abi.FLAG_APPLIED
            words[_APPLIED_SEQUENCE_ID], words[_APPLIED_AT] = applied
        words[_COUNTS] |= flags << 32


def _whole(name: str, value: int) -> int:
    if not 0 <= value < 1 << 63:
        raise ValueError(f"{name} must be from 0 to 2**63 - 1, got {value}")
    return value


def _check(name: str, array: NDArray[Any], shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {array.shape}")


def _rows(array: NDArray[Any], n: int, known: int) -> NDArray[Any]:
    """The first ``known`` rows of an array, and rows of zeros up to n."""
    rows = np.zeros((n, *array.shape[1:]), array.dtype)
    rows[: min(n, known)] = array[: min(n, known)]
    return rows


class Action:
    """Weights that an agent wrote, with their alias table.

    Attributes:
        words: uint64[], all of it.
        weights: float64[capacity].
        threshold, alias: uint32[capacity]; of a 64-bit hash h, ``i = (h >> 32) * n >> 32`` is kept if the low 32 bits
            of h are below ``threshold[i]``, else ``alias[i]`` is taken.

    The first ``num_servers`` entries count.
    """

    def __init__(self, layout: abi.Layout) -> None:
        capacity, sections = layout.capacity, layout.action_sections
        self.words: NDArray[np.uint64] = np.zeros(layout.action_size // 8, np.uint64)
        self._integers = memoryview(self.words)  # type: ignore[arg-type]
        self.weights = self.words.view(np.float64)[sections["weights"] // 8 :][:capacity]
        halves = self.words.view(np.uint32)
        self.threshold = halves[sections["threshold"] // 4 :][:capacity]
        self.alias = halves[sections["alias"] // 4 :][:capacity]

    @property
    def sequence_id(self) -> int:
        return self._integers[_ACTION_SEQUENCE_ID]

    @property
    def written_at(self) -> int:
        """Ns of the monotonic clock."""
        return self._integers[_ACTION_WRITTEN_AT]

    @property
    def lease_ns(self) -> int:
        """Ns after ``written_at`` for which the weights are good; 0: for ever."""
        return self._integers[_ACTION_LEASE]

    @property
    def lease(self) -> float:
        """The same in seconds; infinite if for ever."""
        return self.lease_ns / _NS or float("inf")

    @property
    def num_servers(self) -> int:
        return self._integers[_ACTION_COUNTS] & _LOW32

    def is_good(self, now: int) -> bool:
        """Whether the lease lasts at ``now`` (ns of the monotonic clock)."""
        lease = self.lease_ns
        return lease == 0 or now - self.written_at < lease
