"""Cores, speeds and the fixed overhead from the rate at which servers complete flows: :func:`estimate_cluster`.

A processor-sharing server of c cores that each serve μ flows per second completes flows at the rate μ min(n, c) while n
are open: work done over the time busy, whatever the law of demands, the dispatch rule and the load. So

    μ = completed / ∫ min(n, c) dt

needs neither a model of arrivals nor a steady state. Where every flow also spends a fixed time o outside the server (on
the network, in a handshake), some of the n are there, and the rate is the throughput of a closed network of n flows
over a delay o and the server (Norton's theorem for queueing networks; Chandy, Herzog and Woo, 1975):

    r(n) = G(n - 1) / G(n),   G(n) = Σ_k o^k / k! · Π_{i=1..n-k} 1 / (μ min(i, c))

The shape of r over n tells cores from speed, and speed from overhead. They are chosen by the likelihood of the
completions at every n as a Poisson process of rate r(n), which is exact for exponential demands; for others, that of a
processor-sharing server depends on the mean alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ...errors import RecordingError
from .counts import BLOCKS, Levels

#: Cores that an estimate chooses from.
CORES = (*range(1, 17), 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128)
#: An overhead must raise the log-likelihood by this to be believed.
EVIDENCE = 10.0
#: Fewest completed flows from which the speed of a server is estimated.
FEWEST = 10
RESAMPLES = 400

#: Overheads that are tried, times μ.
_DELAYS = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True, eq=False)
class ClusterEstimate:
    """Estimated servers; intervals are at 95 %, by a bootstrap of blocks of time.

    Attributes:
        cores: int64[N].
        rates: float64[N], flows per second that one core completes: its speed over the mean demand.
        samples: float64[resamples, N], of the rates.
        overhead, overhead_low, overhead_high: seconds of each flow's FCT that no server works on; the interval is that
            of the profile likelihood.
        busy: float64[N], mean share of the cores at work.
        completed: int64[N].
    """

    cores: NDArray[np.int64]
    rates: NDArray[np.float64]
    samples: NDArray[np.float64]
    overhead: float
    overhead_low: float
    overhead_high: float
    busy: NDArray[np.float64]
    completed: NDArray[np.int64]

    @property
    def capacity(self) -> float:
        """Flows per second that all cores complete together."""
        return float(self.cores @ self.rates)


def estimate_cluster(levels: Levels, cores: Sequence[int] | None, generator: np.random.Generator) -> ClusterEstimate:
    """Estimate every server, and the overhead that they share.

    Cores that are not given are estimated first, as if there was no overhead: both bend the same curve.

    Args:
        levels: of the recording.
        cores: of each server; None: estimated.
        generator: of the bootstrap.

    Raises:
        RecordingError: if a server completed too few flows.
    """
    completed = levels.done.sum(axis=1)
    n = len(completed)
    if completed.min() < FEWEST:
        server = int(completed.argmin())
        raise RecordingError(
            f"server {server} completed {int(completed[server])} flows in the part of the recording that is fitted, "
            f"and its speed needs at least {FEWEST}; record for longer"
        )
    chosen = [_cores(levels.pairs[j], levels.done[j]) for j in range(n)] if cores is None else list(cores)
    overhead, low, high = _overhead(levels, chosen)
    rates = np.zeros(n)
    shapes = np.zeros((n, levels.done.shape[1]))
    for j, c in enumerate(chosen):
        delay = 0.0
        # The delay in service times depends on the rate, which depends on the delay.
        for _ in range(20 if overhead else 1):
            rates[j], _ = _likelihood(levels.pairs[j], levels.done[j], c, delay)
            delay = float(f"{rates[j] * overhead:.4g}")
        shapes[j] = throughput(c, delay, levels.done.shape[1])
    served = np.einsum("bsl,sl->bs", levels.time, shapes)
    drawn = generator.integers(BLOCKS, size=(RESAMPLES, BLOCKS))
    with np.errstate(divide="ignore", invalid="ignore"):
        samples = levels.completed[drawn].sum(axis=1) / served[drawn].sum(axis=1)
    samples = np.where(np.isfinite(samples), samples, rates)
    busy = served.sum(axis=0) / levels.time.sum(axis=(0, 2)) / chosen
    return ClusterEstimate(np.array(chosen), rates, samples, overhead, low, high, busy, completed.astype(np.int64))


def _cores(pairs: NDArray[np.float64], done: NDArray[np.float64]) -> int:
    """The likeliest number of cores; of those that are about as likely, the least."""
    chosen, best = CORES[0], -np.inf
    # A server that was never seen with so many flows cannot show that it has more cores.
    most = int(np.flatnonzero(pairs.sum(axis=0) > 0)[-1])
    for c in CORES:
        _, score = _likelihood(pairs, done, c, 0.0)
        if score > best + 1.92:
            chosen, best = c, score
        if c >= most:
            break
    return chosen


def _overhead(levels: Levels, cores: Sequence[int]) -> tuple[float, float, float]:
    """The overhead of all servers, seconds, with the interval in which the log-likelihood falls by 1.92."""
    found = [[_likelihood(levels.pairs[j], levels.done[j], c, delay) for delay in _DELAYS] for j, c in enumerate(cores)]
    rates, scores = (np.array([[pair[k] for pair in row] for row in found]) for k in (0, 1))
    values = np.array(_DELAYS) / rates
    grid = np.linspace(0.0, values[:, -1].min(), 600)
    total = np.sum([np.interp(grid, values[j], scores[j]) for j in range(len(cores))], axis=0)
    best = int(total.argmax())
    inside = np.flatnonzero(total >= total[best] - 1.92)
    high = float(grid[inside[-1]])
    if total[best] < total[0] + EVIDENCE:
        return 0.0, 0.0, high
    return float(grid[best]), float(grid[inside[0]]), high


def _likelihood(pairs: NDArray[np.float64], done: NDArray[np.float64], cores: int, delay: float) -> tuple[float, float]:
    """The likeliest rate of a core, and its log-likelihood but for a constant."""
    expected = pairs @ throughput(cores, delay, len(done))
    rate = float(done.sum() / expected.sum())
    there = (done > 0) & (expected > 0)
    return rate, float(done[there] @ np.log(expected[there]) + done.sum() * np.log(rate))


@lru_cache(maxsize=4096)
def throughput(cores: int, delay: float, levels: int) -> NDArray[np.float64]:
    """Throughput with 0 to ``levels`` - 1 flows open, float64[levels], over that of one busy core.

    Args:
        cores: of the server.
        delay: fixed time outside the server, in mean service times of a core.
        levels: flows open, and one more.
    """
    n = np.arange(levels, dtype=np.float64)
    if delay == 0.0:
        result = np.minimum(n, cores)
    else:
        # Logarithms of delay^k / k! and of the product of 1 / min(i, c).
        with np.errstate(divide="ignore"):
            outside = np.concatenate([[0.0], np.cumsum(np.log(delay) - np.log(n[1:]))])
            inside = np.concatenate([[0.0], np.cumsum(-np.log(np.minimum(n[1:], cores)))])
        g = np.array([np.logaddexp.reduce(outside[: k + 1] + inside[k::-1]) for k in range(levels)])
        result = np.concatenate([[0.0], np.exp(g[:-1] - g[1:])])
    result.setflags(write=False)
    return result
