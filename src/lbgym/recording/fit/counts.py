"""What a recording counted: :class:`Counts`, the rows of a recording as flows that start, end and stay."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ...errors import RecordingError
from ..offline import Recording

#: Levels that are told apart; a server that has more flows open than this is busy for sure.
_MOST_LEVELS = 256
#: Parts of the time that the bootstrap draws from.
BLOCKS = 40


@dataclass(frozen=True, eq=False)
class Counts:
    """K intervals between consecutive rows of a recording, of N servers.

    Open flows are counted from the counters, which also hold for servers that are being drained.

    Attributes:
        rows: int64[K], the row of the recording at the end of each interval.
        seconds: float64[K], lengths on the data plane's clock.
        before: int64[K, N], flows open at the start.
        started, completed, lost: int64[K, N], flows in the interval; lost: rejected and failed.
        unrouted: int64[K].
    """

    recording: Recording
    rows: NDArray[np.int64]
    seconds: NDArray[np.float64]
    before: NDArray[np.int64]
    started: NDArray[np.int64]
    completed: NDArray[np.int64]
    lost: NDArray[np.int64]
    unrouted: NDArray[np.int64]

    @classmethod
    def of(cls, recording: Recording) -> Counts:
        """All intervals of a recording that no gap interrupts.

        Raises:
            RecordingError: if there is none, or its counters fall.
        """
        rows = [np.arange(episode.start + 1, episode.stop) for episode in recording.episodes]
        if not rows:
            raise RecordingError(f"{recording!r} has no two consecutive observations")
        after = np.concatenate(rows)
        lost = recording.rejected + recording.failed
        open_flows = recording.started - recording.completed - lost

        def change(counter: NDArray[np.int64]) -> NDArray[np.int64]:
            difference: NDArray[np.int64] = counter[after] - counter[after - 1]
            return difference

        counts = cls(
            recording,
            after,
            recording.timestamp[after] - recording.timestamp[after - 1],
            open_flows[after - 1],
            change(recording.started),
            change(recording.completed),
            change(lost),
            change(recording.unrouted),
        )
        for name in ("before", "started", "completed", "lost", "unrouted"):
            least = int(getattr(counts, name).min())
            if least < 0:
                raise RecordingError(f"the counters of {recording!r} contradict each other: {name} flows of {least}")
        return counts

    def __len__(self) -> int:
        return len(self.rows)

    def part(self, which: slice | NDArray[np.bool_]) -> Counts:
        """The intervals selected."""
        names = ("rows", "seconds", "before", "started", "completed", "lost", "unrouted")
        return Counts(self.recording, *(getattr(self, name)[which] for name in names))

    @property
    def duration(self) -> float:
        """Seconds in all."""
        return float(self.seconds.sum())

    @cached_property
    def arrivals(self) -> NDArray[np.int64]:
        """Flows that arrived in each interval, int64[K]."""
        total: NDArray[np.int64] = self.started.sum(axis=1) + self.unrouted
        return total

    @property
    def after(self) -> NDArray[np.int64]:
        """Flows open at the end of each interval, int64[K, N]."""
        return self.before + self.started - self.completed - self.lost

    @property
    def mean_open(self) -> NDArray[np.float64]:
        """Open flows, mean over time, float64[N]."""
        mean: NDArray[np.float64] = (self.seconds @ (self.before + self.after)) / 2.0 / self.duration
        return mean

    @property
    def mean_fct(self) -> NDArray[np.float64]:
        """Mean FCT of the flows of each server by Little's law, float64[N], seconds; NaN without a flow."""
        with np.errstate(invalid="ignore", divide="ignore"):
            fct: NDArray[np.float64] = self.mean_open * self.duration / self.completed.sum(axis=0)
        return np.where(self.completed.sum(axis=0) > 0, fct, np.nan)

    def levels(self) -> Levels:
        """The time spent, and the flows completed, at every number of open flows."""
        k, n = self.started.shape
        highest = min(int(max(self.before.max(initial=0), self.after.max(initial=0))) + 1, _MOST_LEVELS)
        block = np.broadcast_to((np.minimum(np.arange(k) * BLOCKS // k, BLOCKS - 1))[:, None], (k, n))
        server = np.broadcast_to(np.arange(n), (k, n))
        half = np.broadcast_to(self.seconds[:, None] / 2.0, (k, n))
        first, last = np.minimum(self.before, highest - 1), np.minimum(self.after, highest - 1)
        time, pairs = np.zeros((BLOCKS, n, highest)), np.zeros((n, highest, highest))
        done, began = np.zeros((n, highest)), np.zeros((BLOCKS, n))
        for level in (first, last):
            np.add.at(time, (block, server, level), half)
            np.add.at(pairs, (server, first, level), half)
        np.add.at(done, (server, first), self.completed)
        np.add.at(began, (block, server), self.completed)
        return Levels(time, pairs, done, began)


@dataclass(frozen=True, eq=False)
class Levels:
    """Time and completions by the number of open flows; the last level stands for all above it, too.

    What is open between two rows is not known: half of an interval counts for the level at either end.

    Attributes:
        time: float64[blocks, N, L], seconds with l flows open.
        pairs: float64[N, L, L], seconds with l flows open in intervals that began with k: [k, l].
        done: float64[N, L], flows that completed in intervals that began with so many open.
        completed: float64[blocks, N].
    """

    time: NDArray[np.float64]
    pairs: NDArray[np.float64]
    done: NDArray[np.float64]
    completed: NDArray[np.float64]
