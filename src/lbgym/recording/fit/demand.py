"""The law of demands from the spread of FCTs: :func:`estimate_demand`.

FCTs are not demands: a flow shares its server. So each candidate is simulated with the estimated cluster under the
recorded arrivals and weights, and the one whose FCT features come nearest to the recorded ones is chosen.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...scenarios import BoundedPareto, Demand, Deterministic, Exponential, Lognormal, Scenario
from .counts import Counts
from .replay import Outcome, quantiles, recorded, replay

KINDS = ("deterministic", "exponential", "lognormal", "bounded_pareto")
#: A law without a parameter is chosen if its error exceeds the least one by no more than this.
TOLERANCE = 0.02
#: Fewest completed flows of a server that counts.
_FEWEST = 100
#: Most flows that are simulated per candidate, and seconds that warm up the reservoirs.
_FLOWS = 60_000
_WARMUP = 20.0
#: Keeps the logarithm of a spread of 0 finite.
_LEAST = 0.05
_CVS = (0.3, 0.5, 0.7, 0.85, 1.0, 1.25, 1.6, 2.0, 2.6, 3.4, 4.5, 6.0)
_ALPHAS = (1.05, 1.2, 1.35, 1.5, 1.75, 2.0, 2.5, 3.0)
#: Largest over least demand of a bounded Pareto law.
_SPAN = 1000.0


@dataclass(frozen=True, eq=False)
class DemandEstimate:
    """The chosen law.

    Attributes:
        law: with its parameters.
        errors: least error of every kind: root mean square, over the servers, of the relative differences of the
            coefficient of variation of the FCT and of its 90th percentile over its mean. Empty if it is assumed.
    """

    law: Demand
    errors: dict[str, float]


def estimate_demand(
    twin: Scenario, counts: Counts, mean: float, generator: np.random.Generator, kinds: Iterable[str] = KINDS
) -> DemandEstimate:
    """Choose among deterministic, exponential, lognormal and Pareto demands.

    Args:
        twin: the estimated cluster.
        counts: what is fitted.
        mean: of the demands, core-seconds.
        generator: of the simulated demands and instants.
        kinds: to choose from.
    """
    kinds = tuple(kinds)
    if counts.arrivals.sum() > _FLOWS:
        first = int(np.searchsorted(np.cumsum(counts.arrivals[::-1]), _FLOWS))
        counts = counts.part(slice(len(counts) - first, None))
    warmup = min(_WARMUP, counts.duration / 4.0)
    late = np.cumsum(counts.seconds) > warmup
    seen = recorded(counts.part(late))
    enough = counts.completed[late].sum(axis=0) >= _FEWEST
    if np.isnan(seen.fct_std).any() or np.isnan(seen.fct_p90).any() or not enough.any():
        return DemandEstimate(Exponential(mean=mean), {})
    normal = generator.standard_normal(int(counts.arrivals.sum()))
    instants = int(generator.integers(1 << 32))
    wanted = _spread(seen)[:, :, enough]
    scores: dict[Demand, float] = {}

    def add(laws: Iterable[Demand]) -> None:
        new = [law for law in dict.fromkeys(laws) if law not in scores]
        demands = [quantiles(law, normal) for law in new]
        outcome = replay(twin, counts, demands, [0] * len(new), warmup, np.random.default_rng(instants))
        error = np.sqrt(((_spread(outcome)[:, :, enough] - wanted) ** 2).mean(axis=(0, 2)))
        scores.update(zip(new, error.tolist(), strict=True))

    grids = {kind: _grid(kind) for kind in kinds}
    add(_law(kind, value, mean) for kind in kinds for value in grids[kind])
    best = {kind: min(grids[kind], key=lambda value: scores[_law(kind, value, mean)]) for kind in kinds}
    finer = {kind: _between(grids[kind], best[kind]) for kind in kinds if len(grids[kind]) > 1}
    if finer:
        add(_law(kind, value, mean) for kind, values in finer.items() for value in values)
    errors, laws = {}, {}
    for kind in kinds:
        laws[kind] = min(
            (_law(kind, value, mean) for value in (*grids[kind], *finer.get(kind, ()))), key=lambda law: scores[law]
        )
        errors[kind] = scores[laws[kind]]
    simple = [kind for kind in kinds if len(grids[kind]) == 1 and errors[kind] <= min(errors.values()) + TOLERANCE]
    chosen = min(simple or kinds, key=lambda kind: errors[kind])
    return DemandEstimate(laws[chosen], errors)


def _grid(kind: str) -> tuple[float, ...]:
    return {"lognormal": _CVS, "bounded_pareto": _ALPHAS}.get(kind, (0.0,))


def _between(grid: tuple[float, ...], best: float) -> tuple[float, ...]:
    """Values between the best one and its neighbours."""
    i = grid.index(best)
    around = [grid[j] for j in (i - 1, i + 1) if 0 <= j < len(grid)]
    return tuple(float(f"{best + (other - best) * part:.4g}") for other in around for part in (0.25, 0.5, 0.75))


def _law(kind: str, value: float, mean: float) -> Demand:
    if kind == "deterministic":
        return Deterministic(mean=mean)
    if kind == "exponential":
        return Exponential(mean=mean)
    if kind == "lognormal":
        return Lognormal(mean=mean, cv=value)
    least = mean / BoundedPareto(alpha=value, minimum=1.0, maximum=_SPAN).mean
    return BoundedPareto(alpha=value, minimum=least, maximum=least * _SPAN)


def _spread(outcome: Outcome) -> NDArray[np.float64]:
    """Logarithms of standard deviation and 90th percentile over the mean, float64[2, R, N]."""
    return np.log(_LEAST + np.stack([outcome.fct_std, outcome.fct_p90]) / outcome.fct_mean)
