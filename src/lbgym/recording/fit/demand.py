"""The law of demands from the spread of FCTs: :func:`estimate_demand`.

FCTs are not demands: a flow shares its server. So each law is simulated with the estimated cluster under the recorded
arrivals and weights, and the one whose FCT features come nearest to the recorded ones is chosen. A law without a
formula (``empirical``) takes its place if it makes the FCTs of single flows likelier that it was not made of.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from ...errors import RecordingError
from ...scenarios import BoundedPareto, Demand, Deterministic, Exponential, Lognormal, Scenario
from ...scenarios.workload import DEMAND_KINDS
from .counts import Counts
from .empirical import FEWEST, log_likelihood, simulated_singles, single_flows, unfold
from .replay import Outcome, quantiles, recorded, replay

KINDS = ("deterministic", "exponential", "lognormal", "bounded_pareto", "empirical")
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
#: The part of the time, at its end, that an empirical law is not made of but judged by; simulations of each law there;
#: and standard errors by which it must be likelier.
_VALIDATION, _DRAWS, _DEVIATIONS = 0.25, 3, 3.0
_FEWEST_HELD_OUT = 50
#: Largest over least demand of a bounded Pareto law.
_SPAN = 1000.0


@dataclass(frozen=True, eq=False)
class DemandEstimate:
    """The chosen law.

    Attributes:
        law: with its parameters.
        errors: least error of every kind: root mean square, over the servers, of the relative differences of the
            coefficient of variation of the FCT and of its 90th percentile over its mean. Empty if it is assumed.
        likelihoods: of every kind, mean log-density of single flows' FCTs in the last part of what is fitted, by the
            law from the rest (``empirical``) or from all. Empty where too few flows ended alone between two rows.
        singles: such flows.
    """

    law: Demand
    errors: dict[str, float]
    likelihoods: dict[str, float] = field(default_factory=dict)
    singles: int = 0


def estimate_demand(
    twin: Scenario,
    counts: Counts,
    mean: float,
    generator: np.random.Generator,
    kinds: Iterable[str] = KINDS,
    *,
    overhead: float = 0.0,
) -> DemandEstimate:
    """Choose among deterministic, exponential, lognormal, Pareto and empirical demands.

    Args:
        twin: the estimated cluster.
        counts: what is fitted.
        mean: of the demands, core-seconds.
        generator: of the simulated demands and instants.
        kinds: to choose from.
        overhead: seconds of each FCT that no server works on.

    Raises:
        RecordingError: if an empirical law is asked for, and too few flows ended alone between two rows.
    """
    asked = tuple(kinds)
    # The others are where an empirical law begins.
    kinds = tuple(kind for kind in asked if kind != "empirical") or KINDS[:-1]
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
    found = DemandEstimate(laws[chosen], errors)
    if "empirical" not in asked:
        return found
    return _with_empirical(found, twin, counts, laws, warmup, instants, overhead, alone=len(asked) == 1)


def _with_empirical(
    found: DemandEstimate,
    twin: Scenario,
    counts: Counts,
    laws: Mapping[str, Demand],
    warmup: float,
    seed: int,
    overhead: float,
    *,
    alone: bool,
) -> DemandEstimate:
    """The empirical law instead, if flows that no law was made of are likelier by it, or if it is asked for alone."""
    rates = np.array([server.speed for server in twin.servers]) / found.law.mean
    parts = np.cumsum(counts.seconds) <= (1.0 - _VALIDATION) * counts.duration
    fitted, last = counts.part(parts), counts.part(~parts)
    singles, others = single_flows(counts, rates, overhead), single_flows(last, rates, overhead)
    if len(singles) - len(others) < FEWEST or len(others) < _FEWEST_HELD_OUT:
        if alone:
            raise RecordingError(
                f"{counts.recording!r} shows the FCTs of {len(singles):,} single flows, those that ended alone between "
                f"two rows: an empirical law needs {math.ceil(FEWEST / (1.0 - _VALIDATION))}"
            )
        return replace(found, singles=len(singles))
    candidates = dict(laws)
    candidates["empirical"] = unfold(twin, fitted, found.law, single_flows(fitted, rates, overhead), warmup, seed)
    flows, densities = int(counts.arrivals.sum()), {}
    for kind, law in candidates.items():
        simulated = [
            simulated_singles(twin, counts, law, generator.standard_normal(flows), fitted.duration, draw)
            for draw, generator in enumerate(map(np.random.default_rng, range(_DRAWS)))
        ]
        densities[kind] = log_likelihood(others, np.concatenate(simulated))
    gain = densities["empirical"] - densities[_kind(found.law)]
    better = gain.mean() > _DEVIATIONS * gain.std() / math.sqrt(len(gain))
    likelihoods = {kind: float(density.mean()) for kind, density in densities.items()}
    law = unfold(twin, counts, found.law, singles, warmup, seed) if better or alone else found.law
    return DemandEstimate(law, found.errors, likelihoods, len(singles))


def _kind(law: Demand) -> str:
    return next(name for name, kind in DEMAND_KINDS.items() if isinstance(law, kind))


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
