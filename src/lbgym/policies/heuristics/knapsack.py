"""Weights by a grid search over fitted curves of latency: :class:`KnapsackWeights`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...checks import number, seconds, whole
from ...errors import PolicyError
from ...snapshot import DEFAULT_STEP_INTERVAL
from ..base import WeightPolicy, check_features
from ._estimates import FCT, FCT_NAME, SPREAD, steps_in


class KnapsackWeights(WeightPolicy):
    """Weights from a grid that minimise the mean latency which fitted curves predict, as in KnapsackLB.

    KnapsackLB (arXiv 2404.17783) measures each server's latency at several weights, fits a curve l_j(w) and chooses one
    weight of a grid per server by an integer programme, so that the weights sum to 1. Here the curves are straight
    lines, l_j(w) = a_j + b_j w with a_j, b_j at least 0, fitted by least squares with exponential forgetting to the
    decayed mean FCTs under the weights that were in force, and the objective is ours: the FCT of the mean flow,
    sum_j w_j l_j(w_j). It is convex, so that handing out the grid's units one by one, each to the server where it costs
    least, is optimal (B. Fox, "Discrete optimization via marginal analysis", 1966).

    Every weight is shifted up and down in turn by ``probe``, since a line cannot be fitted to one point, and each fit
    gets a point more, at the origin: as long as there is little other evidence, weights move towards equal latencies.
    A choice is within a factor of ``reach`` of the former one, since the latencies of an overloaded server come late.
    Flows must follow the weights alone: use it with ``wcmp`` or another rule that counts nothing.

    Args:
        levels: units of the grid per mean weight.
        period: seconds between two choices, also of a probe.
        probe: relative size of the probes.
        reach: factor by which a weight may change at once, above 1.
        caution: weight of the point at the origin, in periods of evidence, at least 0.
        memory: share of the evidence that a period keeps, in [0, 1).
        step_interval: seconds between two steps.
    """

    uses_features: tuple[str, ...] = (FCT_NAME,)

    def __init__(
        self,
        levels: int = 20,
        period: float = 5.0,
        probe: float = 0.2,
        reach: float = 1.3,
        caution: float = 20.0,
        memory: float = 0.9,
        step_interval: float = DEFAULT_STEP_INTERVAL,
    ) -> None:
        self._levels = whole("levels", levels, error=PolicyError)
        self._probe = number("probe", probe, above=0.0, high=0.9, error=PolicyError)
        self._caution = number("caution", caution, low=0.0, error=PolicyError)
        self._reach = number("reach", reach, above=1.0, error=PolicyError)
        self._memory = number("memory", memory, low=0.0, high=0.999, error=PolicyError)
        step = seconds("step_interval", step_interval, error=PolicyError)
        self._period = steps_in(seconds("period", period, error=PolicyError), step)
        self.reset()

    def reset(self, seed: int | None = None) -> None:
        """Forget the curves."""
        self._steps = 0
        self._chosen: NDArray[np.float64] | None = None

    def weights(self, features: NDArray[Any], active: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Shapes as in :meth:`WeightPolicy.weights`."""
        fct = check_features(self, features, active)[..., FCT]
        if self._chosen is None or self._chosen.shape != active.shape:
            self._steps, self._chosen = 0, np.ones(active.shape)
            # Sums of 1, w, w^2, l, w l, the recent ones counting more.
            self._sums = np.zeros((5, *active.shape))
        if self._steps and self._steps % self._period == 0:
            used, known = self._probed(self._steps - 1), (fct > 0) & active
            news = np.stack([np.ones(active.shape), used, used**2, fct, used * fct])
            self._sums = np.where(known, self._memory * self._sums + news, self._sums)
            prior = np.reshape([self._caution, 0.0, 0.0, 0.0, 0.0], (5,) + (1,) * active.ndim)
            base, slope = fitted_lines(self._sums + prior)
            for place in np.ndindex(active.shape[:-1]):
                usable = known[place]
                if usable.any():
                    self._chosen[place][usable] = grid_weights(
                        base[place][usable],
                        slope[place][usable],
                        self._levels,
                        self._chosen[place][usable],
                        self._reach,
                    )
                self._chosen[place][~usable] = 1.0
        weights = self._probed(self._steps)
        self._steps += 1
        return weights

    def _probed(self, step: int) -> NDArray[np.float64]:
        """The chosen weights, every other server's shifted up and the others' down, turn about."""
        assert self._chosen is not None
        turn = step // self._period + np.arange(self._chosen.shape[-1])
        return self._chosen * np.where(turn % 2, 1 + self._probe, 1 - self._probe)


def fitted_lines(sums: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Least-squares lines a + b w with a and b of at least 0, from the sums of 1, w, w^2, l and w l: (a, b).

    One point, or points of the same w, give no slope: b = 0.
    """
    count, w, ww, l, wl = sums  # noqa: E741 - the formula's name
    count = np.maximum(count, 1e-12)
    spread = ww - w * w / count
    slope = np.where(spread > 1e-9 * ww, (wl - w * l / count) / np.where(spread > 0, spread, 1.0), 0.0)
    slope = np.clip(slope, 0.0, None)
    base = (l - slope * w) / count
    # Through the origin where the best line would start below it.
    through = wl / np.where(ww > 0, ww, 1.0)
    return np.maximum(base, 0.0), np.where(base < 0, through, slope)


def grid_weights(
    base: NDArray[np.float64],
    slope: NDArray[np.float64],
    levels: int,
    former: NDArray[np.float64] | None = None,
    reach: float = SPREAD,
) -> NDArray[np.float64]:
    """Weights of mean 1, whole multiples of 1/levels, that minimise sum_j w_j (base_j + slope_j w_j).

    Args:
        base: float64[N], of at least 0.
        slope: float64[N], of at least 0.
        levels: units per mean weight.
        former: float64[N], weights of any scale; each new one is within a factor of ``reach`` of it, rounded outwards
            to the grid. None: equal ones.
        reach: above 1.

    Returns:
        float64[N], each also within ``SPREAD`` of the mean.
    """
    n = len(base)
    near = np.ones(n) if former is None else former / former.mean()
    least = np.clip(np.floor(levels * near / reach), max(1, round(levels / SPREAD)), None)
    most = np.clip(np.ceil(levels * near * reach), least + 1, round(levels * SPREAD))
    # What the k-th unit adds to the sum: base / levels + slope ((k / levels)^2 - ((k - 1) / levels)^2), rising in k.
    k = np.arange(1, int(most.max()) + 1)
    added = base[:, None] / levels + slope[:, None] * (2 * k - 1) / levels**2
    added = np.where(k <= least[:, None], -np.inf, np.where(k > most[:, None], np.inf, added))
    units = np.argsort(added, axis=None, kind="stable")[: n * levels]
    return np.bincount(units // len(k), minlength=n) / levels
