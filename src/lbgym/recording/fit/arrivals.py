"""Arrivals from the counts of a recording, as the process of a workload: :func:`estimate_arrivals`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...scenarios import Arrivals, ModulatedPoisson, Poisson, Sinusoidal

#: Windows that the dispersion is measured in, seconds.
WINDOWS = (0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
#: Windows of the rate over time.
_RATES = 30
#: Bins of the likelihood at most.
_BINS = 4000
#: Shortest bin, in mean times between flows; shorter ones tell no more.
_LEAST_FLOWS = 1.0
_ITERATIONS = 60
#: A process must have a BIC less by this than Poisson arrivals to be chosen.
EVIDENCE = 10.0
#: Periods that are tried for a sinusoid.
_PERIODS = 240


@dataclass(frozen=True, eq=False)
class ArrivalEstimate:
    """Estimated arrivals.

    Attributes:
        process: its shape in time, the one of least BIC; Poisson arrivals unless another is better by ``EVIDENCE``.
        rate, rate_low, rate_high: flows per second, with the 95 % interval of a bootstrap of blocks of time.
        dispersion: index of dispersion of counts (variance over mean) by window in seconds; 1 for Poisson arrivals.
        bic: Bayesian information criterion of each kind of process, less that of the chosen one.
        times, rates: float64[W], the rate over time: windows' starts, seconds from the first row, and flows per second.
    """

    process: Arrivals
    rate: float
    rate_low: float
    rate_high: float
    dispersion: dict[float, float]
    bic: dict[str, float]
    times: NDArray[np.float64]
    rates: NDArray[np.float64]


def estimate_arrivals(
    seconds: NDArray[np.float64], arrivals: NDArray[np.int64], generator: np.random.Generator
) -> ArrivalEstimate:
    """Estimate a process from the flows that arrived in consecutive intervals.

    The likelihood is that of the counts in bins of equal length, Poisson given the rate. Candidates: Poisson arrivals
    (1 parameter), a sinusoidal rate (4), and a rate with two states (4), by the EM algorithm of hidden Markov models.

    Args:
        seconds: float64[K], lengths of the intervals; gaps between them are left out.
        arrivals: int64[K].
        generator: of the bootstrap.
    """
    total, duration = int(arrivals.sum()), float(seconds.sum())
    rate = total / duration
    width = max(float(np.median(seconds)), duration / _BINS, _LEAST_FLOWS / max(rate, 1e-300))
    counts, width = _binned(seconds, arrivals, width)
    mean = counts.mean()
    candidates: dict[str, tuple[Arrivals, float, int]] = {
        "poisson": (Poisson(), _poisson_likelihood(counts, np.full(len(counts), mean)), 1)
    }
    if len(counts) >= 40 and total >= 100:
        candidates["sinusoidal"] = (*_sinusoid(counts, width), 4)
        states = _two_states(counts, width)
        if states is not None:
            candidates["modulated_poisson"] = (*states, 4)
    bic = {name: k * math.log(len(counts)) - 2.0 * score for name, (_, score, k) in candidates.items()}
    chosen = min(bic, key=lambda name: bic[name] + (0.0 if name == "poisson" else EVIDENCE))
    per_window = max(1, len(counts) // _RATES)
    windows = len(counts) // per_window
    rates: NDArray[np.float64] = counts[: windows * per_window].reshape(windows, -1).mean(axis=1) / width
    drawn = rates[generator.integers(windows, size=(400, windows))].mean(axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return ArrivalEstimate(
        process=candidates[chosen][0],
        rate=rate,
        rate_low=float(min(low, rate)),
        rate_high=float(max(high, rate)),
        dispersion=_dispersion(seconds, arrivals),
        bic={name: value - bic[chosen] for name, value in bic.items()},
        times=(per_window * width) * np.arange(windows, dtype=np.float64),
        rates=rates,
    )


def _binned(
    seconds: NDArray[np.float64], arrivals: NDArray[np.int64], width: float
) -> tuple[NDArray[np.float64], float]:
    """Flows in bins of about ``width``, whole intervals where those are alike; a shared one is split by its parts."""
    usual = float(np.median(seconds))
    width = max(1, round(width / usual)) * usual
    ends = np.concatenate([[0.0], np.cumsum(seconds)])
    edges = width * np.arange(int(ends[-1] / width + 1e-6) + 1)
    return np.diff(np.interp(edges, ends, np.concatenate([[0.0], np.cumsum(arrivals)]))), width


def _dispersion(seconds: NDArray[np.float64], arrivals: NDArray[np.int64]) -> dict[float, float]:
    found = {}
    for window in WINDOWS:
        if 0.99 * float(np.median(seconds)) <= window <= seconds.sum() / 20:
            counts, _ = _binned(seconds, arrivals, window)
            if counts.mean() > 0.0:
                found[window] = float(counts.var(ddof=1) / counts.mean())
    return found


def _poisson_likelihood(counts: NDArray[np.float64], mean: NDArray[np.float64]) -> float:
    """But for a term of the counts alone."""
    safe = np.maximum(mean, 1e-12)
    return float((counts * np.log(safe) - safe).sum())


def _sinusoid(counts: NDArray[np.float64], width: float) -> tuple[Sinusoidal, float]:
    """The sinusoid of least squares, and its likelihood."""
    n = len(counts)
    middle = (np.arange(n) + 0.5) * width
    mean = counts.mean()
    best: tuple[float, float, float, float] = (-math.inf, 0.0, n * width, 0.0)
    for period in np.geomspace(8.0 * width, 2.0 * n * width, _PERIODS):
        wave = 2.0 * np.pi * middle / period
        columns = np.stack([np.ones(n), np.sin(wave), np.cos(wave)], axis=1)
        level, sine, cosine = np.linalg.lstsq(columns, counts, rcond=None)[0].tolist()
        if level <= 0.0:
            continue
        amplitude, phase = min(math.hypot(sine, cosine) / level, 1.0), math.atan2(cosine, sine)
        score = _poisson_likelihood(counts, level * (1.0 + amplitude * np.sin(wave + phase)))
        if abs(level - mean) < 0.5 * mean and score > best[0]:
            best = score, amplitude, float(period), phase
    score, amplitude, period, phase = best
    return Sinusoidal(amplitude=amplitude, period=period, phase=phase), score


def _two_states(counts: NDArray[np.float64], width: float) -> tuple[ModulatedPoisson, float] | None:
    """The two-state process by EM (Baum and Welch), and its likelihood; None where it comes to one state."""
    smooth = np.convolve(counts, np.ones(9) / 9.0, mode="same")
    levels = np.maximum(np.quantile(smooth, [0.2, 0.8]), 1e-3)
    move = np.array([[0.95, 0.05], [0.05, 0.95]])
    start, score = np.array([0.5, 0.5]), -math.inf
    for _ in range(_ITERATIONS):
        emission = counts[:, None] * np.log(levels) - levels
        highest = emission.max(axis=1, keepdims=True)
        likely = np.exp(emission - highest)
        inside, between, log_scale = _forward_backward(likely, move, start)
        new = log_scale + float(highest.sum())
        total = inside.sum(axis=0)
        if total.min() < 2.0:
            return None
        levels = np.maximum((inside * counts[:, None]).sum(axis=0) / total, 1e-6)
        move = between / between.sum(axis=1, keepdims=True)
        start = inside[0]
        if new - score < 1e-3:
            score = new
            break
        score = new
    leave = np.array([move[0, 1], move[1, 0]])
    if not (leave > 0.0).all() or abs(levels[1] - levels[0]) < 1e-6:
        return None
    # Rates over their mean: the workload has the mean.
    share = leave[::-1] / leave.sum()
    relative = levels / float(share @ levels)
    shape = ModulatedPoisson(
        levels=tuple(round(x, 6) for x in relative.tolist()),
        sojourns=tuple(float(f"{width / x:.6g}") for x in leave.tolist()),
    )
    return shape, score


def _forward_backward(
    likely: NDArray[np.float64], move: NDArray[np.float64], start: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """State probabilities [bins, 2], expected moves [2, 2], and the log-likelihood."""
    (stay0, go0), (go1, stay1) = move.tolist()
    a0, a1 = start.tolist()
    rows, forward, scales = likely.tolist(), [], []
    for k, (e0, e1) in enumerate(rows):
        if k:
            a0, a1 = a0 * stay0 + a1 * go1, a0 * go0 + a1 * stay1
        a0, a1 = a0 * e0, a1 * e1
        scale = a0 + a1
        a0, a1 = a0 / scale, a1 / scale
        forward.append((a0, a1))
        scales.append(scale)
    backward = [(1.0, 1.0)]
    b0 = b1 = 1.0
    for k in range(len(rows) - 1, 0, -1):
        (e0, e1), scale = rows[k], scales[k]
        b0, b1 = b0 * e0 / scale, b1 * e1 / scale
        b0, b1 = stay0 * b0 + go0 * b1, go1 * b0 + stay1 * b1
        backward.append((b0, b1))
    alpha, beta = np.array(forward), np.array(backward[::-1])
    ahead = likely[1:] * beta[1:] / np.array(scales)[1:, None]
    between = (alpha[:-1, :, None] * move[None] * ahead[:, None, :]).sum(axis=0)
    return alpha * beta, between, float(np.log(scales).sum())
