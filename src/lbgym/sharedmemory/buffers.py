"""Private copies of a region's contents: :class:`ObservationBuffer`, :class:`Action`; and :class:`Publication`."""

from __future__ import annotations

from dataclasses import dataclass
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
_NAMES_VERSION = _word(abi.FRAME, "names_version")
_ACTION_SEQUENCE_ID = _word(abi.ACTION, "sequence_id")
_ACTION_WRITTEN_AT = _word(abi.ACTION, "written_at")
_ACTION_LEASE = _word(abi.ACTION, "lease")
_ACTION_COUNTS = _word(abi.ACTION, "num_servers")
_LOW32 = 0xFFFFFFFF


@dataclass(slots=True)
class Publication:
    """An observation that a data plane publishes.

    Attributes:
        timestamp: seconds on the data plane's clock.
        active: bool[n], servers that take new flows.
        stats: float32[n, 11]; columns of ``lbgym.features.FEATURE_NAMES``.
        started, completed, rejected, failed: int[n], flows since the producer started.
        ground_truth: float32[n, 3]; columns of ``lbgym.features.GROUND_TRUTH_NAMES``; None: not measured.
        ground_truth_age: float[n], seconds since it was measured, NaN where unknown; None: all unknown.
        unrouted: flows that found no active server, since the producer started.
        fct_count: flows that ended since the producer started and whose FCT is known.
        fct_sum: seconds, the sum of those FCTs.
    """

    timestamp: float
    active: NDArray[np.bool_]
    stats: NDArray[np.float32]
    started: NDArray[np.int64]
    completed: NDArray[np.int64]
    rejected: NDArray[np.int64]
    failed: NDArray[np.int64]
    ground_truth: NDArray[np.float32] | None = None
    ground_truth_age: NDArray[np.float64] | None = None
    unrouted: int = 0
    fct_count: int = 0
    fct_sum: float = 0.0

    @classmethod
    def of(cls, snapshot: Snapshot, *, fct_count: int = 0, fct_sum: float = 0.0) -> Publication:
        """Publish a simulated snapshot, whose ground truth is that of this very instant."""
        truth = snapshot.ground_truth
        return cls(
            timestamp=float(snapshot.timestamp),
            active=snapshot.active,
            stats=snapshot.stats,
            started=snapshot.started,
            completed=snapshot.completed,
            rejected=snapshot.rejected,
            failed=snapshot.failed,
            ground_truth=truth,
            ground_truth_age=None if truth is None else np.zeros(len(truth)),
            unrouted=int(snapshot.unrouted),
            fct_count=fct_count,
            fct_sum=fct_sum,
        )


class ObservationBuffer:
    """Memory for one observation, with NumPy views of its sections.

    Attributes:
        capacity: room for this many servers.
        words: uint64[], all of it.
        active: bool[capacity].
        stats: float32[capacity, 11]; columns of ``lbgym.features.FEATURE_NAMES``.
        ground_truth: float32[capacity, 3]; only if ``has_ground_truth``.
        counters: uint64[capacity, 4]; columns of ``lbgym.sharedmemory.abi.COUNTER_NAMES``.
        weights: float64[capacity], in force in the data plane.
        safe_weights: float64[capacity].
        states: uint8[capacity], of :class:`~lbgym.sharedmemory.ServerState`; all ``UNKNOWN`` in regions of 1.0.
        ground_truth_age_ns: uint64[capacity], or ``lbgym.sharedmemory.abi.AGE_UNKNOWN``.

    The first ``num_servers`` rows count, the others hold what was there before.
    """

    def __init__(self, layout: abi.Layout) -> None:
        layout = layout.private
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
        self.states: NDArray[np.uint8] = views["states"]
        self.ground_truth_age_ns: NDArray[np.uint64] = views["ground_truth_age"]

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
    def ground_truth_age(self) -> NDArray[np.float64]:
        """Seconds from each server's measurement to the publication, float64[capacity]; NaN where unknown."""
        ages = self.ground_truth_age_ns
        return np.where((ages != abi.AGE_UNKNOWN) & self.has_ground_truth, ages / _NS, np.nan)

    @property
    def names_version(self) -> int:
        """Version of the names that belong to these servers (``SharedMemoryRegion.names_version``); 0: unnamed."""
        return self._integers[_NAMES_VERSION]

    @property
    def safe(self) -> bool:
        """True if the safe weights were in force."""
        return bool(self.flags & abi.FLAG_SAFE)

    @property
    def applied_sequence_id(self) -> int | None:
        """Of the last action that was put in force; None if none was."""
        return self._integers[_APPLIED_SEQUENCE_ID] if self.flags & abi.FLAG_APPLIED else None

    @property
    def applied_at(self) -> int | None:
        """Time when it came into force, ns of the monotonic clock."""
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

    def fill(self, shown: Publication) -> None:
        """Copy an observation. A negative counter becomes one that no reader accepts.

        Raises:
            ValueError, TypeError, OverflowError: for arrays of other shapes or types, and numbers that do not fit.
        """
        n = shown.active.shape[0]
        _check("active", shown.active, (n,))
        _check("stats", shown.stats, (n, self.stats.shape[1]))
        self.active[:n] = shown.active
        self.stats[:n] = shown.stats
        flags = 0
        self.ground_truth_age_ns[:n] = abi.AGE_UNKNOWN
        if shown.ground_truth is not None:
            _check("ground_truth", shown.ground_truth, (n, self.ground_truth.shape[1]))
            self.ground_truth[:n] = shown.ground_truth
            flags = abi.FLAG_GROUND_TRUTH
            if shown.ground_truth_age is not None:
                self._fill_ages(np.asarray(shown.ground_truth_age, np.float64), n)
        for column, name in enumerate(abi.COUNTER_NAMES):
            counts = getattr(shown, name)
            _check(name, counts, (n,))
            self.counters[:n, column] = counts
        words = self._integers
        words[_TIMESTAMP] = _whole("timestamp in ns", round(float(shown.timestamp) * _NS))
        words[_COUNTS] = n | flags << 32
        words[_UNROUTED] = _whole("unrouted", int(shown.unrouted))
        words[_FCT_COUNT] = _whole("fct_count", int(shown.fct_count))
        words[_FCT_SUM] = _whole("fct_sum in ns", int(shown.fct_sum * _NS))

    def _fill_ages(self, ages: NDArray[np.float64], n: int) -> None:
        _check("ground_truth_age", ages, (n,))
        known = ~np.isnan(ages)
        nanoseconds = np.rint(ages[known] * _NS)
        if not ((nanoseconds >= 0.0) & (nanoseconds < float(1 << 63))).all():
            raise ValueError(f"ground_truth_age must be seconds of at least 0, or NaN where unknown, got {ages}")
        self.ground_truth_age_ns[:n][known] = nanoseconds.astype(np.uint64)

    def set_names_version(self, version: int) -> None:
        """Note the version of the names that belong to these servers."""
        self._integers[_NAMES_VERSION] = version

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
            of h are below ``threshold[i]``, else ``alias[i]`` is taken. A probability of 1 has ``alias[i] == i``.
        index: float64[capacity, 2], speed per core and background load (flows), only if ``has_index``.

    The first ``num_servers`` entries count.
    """

    def __init__(self, layout: abi.Layout) -> None:
        layout = layout.private
        capacity, sections = layout.capacity, layout.action_sections
        self.words: NDArray[np.uint64] = np.zeros(layout.action_size // 8, np.uint64)
        self._integers = memoryview(self.words)  # type: ignore[arg-type]
        self.weights = self.words.view(np.float64)[sections["weights"] // 8 :][:capacity]
        halves = self.words.view(np.uint32)
        self.threshold = halves[sections["threshold"] // 4 :][:capacity]
        self.alias = halves[sections["alias"] // 4 :][:capacity]
        self.index = self.words.view(np.float64)[sections["index"] // 8 :][: 2 * capacity].reshape(capacity, 2)

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

    @property
    def has_index(self) -> bool:
        """True if the agent gave index parameters besides the weights."""
        return bool((self._integers[_ACTION_COUNTS] >> 32) & abi.FLAG_INDEX)
