"""The law of demands from the spread of FCTs: :func:`estimate_demand`.

FCTs are not demands: a flow shares its server. So each law is simulated with the estimated cluster under the recorded
arrivals and weights, and of each kind the one whose FCT features come nearest to the recorded ones is taken. The kind
is that which makes the FCTs of single flows likeliest, or whose features are nearest where too few flows ended alone. A
law without a formula (``empirical``) takes its place if it makes flows likelier that it was not made of.

Every real flow also has a part that is the same for all, to connect and to parse, be it only a few percent, and a log
that rounds. An empirical law has room for both, and would always win by them; so the others are granted a fixed part,
too, and all are measured as the recording was.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ...errors import RecordingError
from ...scenarios import BoundedPareto, Demand, Deterministic, Exponential, Lognormal, Scenario
from .counts import Counts
from .empirical import FEWEST, Stopwatch, log_likelihood, resolution_of, simulated, single_flows, unfold
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
#: And by how much per flow, in nats: half of what tells an exponential law from the nearest lognormal one. Enough flows
#: show that any twin is not quite the cluster, which is no reason to give up a formula.
_LEAST_GAIN = 0.05
#: Fixed parts of the mean demand that laws are tried with that have demands near 0; others have a least one themselves.
_FIXED = tuple(np.linspace(0.0, 0.1, 11).tolist())
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
        fixed: part of the mean demand with which the law's likelihood is greatest if it is the same for every flow.
    """

    law: Demand
    errors: dict[str, float]
    likelihoods: dict[str, float] = field(default_factory=dict)
    singles: int = 0
    fixed: float = 0.0


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
    wanted = _spread(seen, 0.0)[:, :, enough]
    scores: dict[Demand, float] = {}

    def add(laws: Iterable[Demand]) -> None:
        new = [law for law in dict.fromkeys(laws) if law not in scores]
        demands = [quantiles(law, normal) for law in new]
        outcome = replay(twin, counts, demands, [0] * len(new), warmup, np.random.default_rng(instants))
        error = np.sqrt(((_spread(outcome, overhead)[:, :, enough] - wanted) ** 2).mean(axis=(0, 2)))
        scores.update(zip(new, error.tolist(), strict=True))

    grids = {kind: _grid(kind) for kind in kinds}
    add(_law(kind, value, mean) for kind in kinds for value in grids[kind])
    best = {kind: min(grids[kind], key=lambda value: scores[_law(kind, value, mean)]) for kind in kinds}
    finer = {kind: _between(grids[kind], best[kind]) for kind in kinds if len(grids[kind]) > 1}
    if finer:
        add(_law(kind, value, mean) for kind, values in finer.items() for value in values)
    laws = {
        kind: min((_law(kind, value, mean) for value in (*grids[kind], *finer.get(kind, ()))), key=scores.__getitem__)
        for kind in kinds
    }
    errors = {kind: scores[law] for kind, law in laws.items()}
    simple = [kind for kind in kinds if len(grids[kind]) == 1]
    if "empirical" not in asked:
        return DemandEstimate(laws[_nearest(errors, simple)], errors)
    singles, alone = _Singles(twin, counts, mean, overhead, warmup, instants), asked == ("empirical",)
    if not singles.enough:
        if alone:
            raise RecordingError(
                f"{counts.recording!r} shows the FCTs of {len(singles.all):,} single flows, those that ended alone "
                f"between two rows: an empirical law needs {math.ceil(FEWEST / (1.0 - _VALIDATION))}"
            )
        return DemandEstimate(laws[_nearest(errors, simple)], errors, singles=len(singles.all))
    fits = {
        kind: singles.judge(law, _FIXED if isinstance(law, (Exponential, Lognormal)) else (0.0,))
        for kind, law in laws.items()
    }
    # These laws were made of features, so that all single flows may judge them.
    chosen = max(fits, key=lambda kind: float(fits[kind].density.mean()))
    fits["empirical"] = singles.judge(singles.unfold(laws[chosen], early=True), (0.0,))
    last = {kind: fit.density[singles.first :] for kind, fit in fits.items()}
    gain = last["empirical"] - last[chosen]
    error = float(gain.std()) / math.sqrt(len(gain))
    better = gain.mean() > max(_LEAST_GAIN, _DEVIATIONS * error)
    likelihoods = {kind: float(density.mean()) for kind, density in last.items()}
    if better or alone:
        return DemandEstimate(singles.unfold(laws[chosen]), errors, likelihoods, len(singles.all))
    return DemandEstimate(laws[chosen], errors, likelihoods, len(singles.all), fits[chosen].fixed)


def _nearest(errors: Mapping[str, float], simple: Sequence[str]) -> str:
    """The kind of the least error, or a simple one whose error is hardly greater."""
    near = [kind for kind in simple if errors[kind] <= min(errors.values()) + TOLERANCE]
    return min(near or errors, key=lambda kind: errors[kind])


@dataclass(frozen=True, eq=False)
class _Judged:
    """A law by single flows: the fixed part that suits the earlier ones best, and log-densities of all."""

    fixed: float
    density: NDArray[np.float64]


class _Singles:
    """Recorded flows that ended alone between two rows: what tells laws from each other that features do not.

    Args:
        twin: the estimated cluster.
        counts: what is fitted.
        mean: of the demands, core-seconds.
        overhead: seconds of each FCT that no server works on.
        warmup: seconds at the beginning whose simulated flows do not count.
        seed: of the simulations that a law is made with.

    Attributes:
        all: float64[S], their FCTs in mean service times of their servers.
        first: index of the first that an empirical law is judged by, instead of made of.
        enough: there are as many as an empirical law needs, and to judge it by.
    """

    def __init__(self, twin: Scenario, counts: Counts, mean: float, overhead: float, warmup: float, seed: int) -> None:
        self._twin, self._counts, self._warmup, self._seed = twin, counts, warmup, seed
        self._early = counts.part(np.cumsum(counts.seconds) <= (1.0 - _VALIDATION) * counts.duration)
        seconds, servers = single_flows(counts)
        self._stopwatch = Stopwatch(overhead, resolution_of(seconds))
        self.all = seconds * np.array([server.speed for server in twin.servers])[servers] / mean
        self.first = len(single_flows(self._early)[0])
        self.enough = self.first >= FEWEST and len(self.all) - self.first >= _FEWEST_HELD_OUT

    def unfold(self, start: Demand, *, early: bool = False) -> Demand:
        """The empirical law, of the earlier flows or of all."""
        counts, singles = (self._early, self.all[: self.first]) if early else (self._counts, self.all)
        return unfold(self._twin, counts, start, singles, self._stopwatch, self._warmup, self._seed)

    def judge(self, law: Demand, fixed: Iterable[float]) -> _Judged:
        """Simulate a law, with the fixed part among those given that suits the earlier flows best."""
        flows, tried = int(self._counts.arrivals.sum()), tuple(fixed)
        draws = [
            simulated(self._twin, self._counts, law, generator.standard_normal(flows), self._warmup, draw)
            for draw, generator in enumerate(map(np.random.default_rng, range(_DRAWS)))
        ]

        def density(singles: NDArray[np.float64], part: float) -> NDArray[np.float64]:
            return log_likelihood(singles, np.concatenate([each.singles(self._stopwatch, part) for each in draws]))

        likely = [float(density(self.all[: self.first], part).mean()) for part in tried]
        part = tried[int(np.argmax(likely))]
        return _Judged(part, density(self.all, part))


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


def _spread(outcome: Outcome, overhead: float) -> NDArray[np.float64]:
    """Logarithms of standard deviation and 90th percentile over the mean, float64[2, R, N].

    Args:
        outcome: recorded or simulated.
        overhead: seconds that each FCT is longer.
    """
    mean = outcome.fct_mean + overhead
    return np.log(_LEAST + np.stack([outcome.fct_std, outcome.fct_p90 + overhead]) / mean)
