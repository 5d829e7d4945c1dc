"""Workloads as plain data: laws of demand, arrival processes, traces."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..errors import ScenarioError
from ._validation import (
    MAX_CHANGES,
    MAX_RATE,
    MIN_DEMAND,
    MIN_MEAN_DEMAND,
    MIN_SOJOURN,
    TRACE_LIMIT,
    _boolean,
    _instance,
    _integer,
    _items,
    _number,
    _numbers,
    _set,
    _shown,
    _text,
)

# Demands: service time of a flow on one core of speed 1, in core-seconds


@dataclass(frozen=True, kw_only=True)
class Deterministic:
    """Every flow demands ``mean`` core-seconds."""

    mean: float = 0.1

    def __post_init__(self) -> None:
        _set(self, mean=_number(self.mean, "Deterministic.mean"))


@dataclass(frozen=True, kw_only=True)
class Exponential:
    """Exponential demands of the given mean, core-seconds."""

    mean: float = 0.1

    def __post_init__(self) -> None:
        _set(self, mean=_number(self.mean, "Exponential.mean"))


@dataclass(frozen=True, kw_only=True)
class Lognormal:
    """Lognormal demands with a mean (core-seconds) and a coefficient of variation (std / mean)."""

    mean: float = 0.1
    cv: float = 2.0

    def __post_init__(self) -> None:
        _set(self, mean=_number(self.mean, "Lognormal.mean"), cv=_number(self.cv, "Lognormal.cv", high=1e6))


@dataclass(frozen=True, kw_only=True)
class BoundedPareto:
    """Pareto of index ``alpha`` truncated to [``minimum``, ``maximum``] core-seconds."""

    alpha: float = 1.5
    minimum: float = 0.01
    maximum: float = 10.0

    def __post_init__(self) -> None:
        _set(
            self,
            alpha=_number(self.alpha, "BoundedPareto.alpha"),
            minimum=_number(self.minimum, "BoundedPareto.minimum"),
            maximum=_number(self.maximum, "BoundedPareto.maximum"),
        )
        if not self.minimum < self.maximum <= 1e12 * self.minimum:
            raise ScenarioError(
                f"BoundedPareto.maximum must be above minimum ({self.minimum:g}) and at most 1e12 times it, "
                f"got {self.maximum:g}"
            )

    @property
    def mean(self) -> float:
        # The usual powers of minimum and maximum overflow for large alpha; powers of their ratio do not.
        excess, log_ratio = self.alpha - 1, math.log(self.maximum / self.minimum)
        integral = log_ratio if excess == 0 else -math.expm1(-excess * log_ratio) / excess
        return self.minimum * self.alpha * integral / -math.expm1(-self.alpha * log_ratio)


@dataclass(frozen=True, kw_only=True)
class Hyperexponential:
    """A mixture of exponentials: with probability ``probabilities[i]`` exponential of mean ``means[i]``."""

    probabilities: tuple[float, ...] = (0.9, 0.1)
    means: tuple[float, ...] = (0.05, 0.55)

    def __post_init__(self) -> None:
        p = _numbers(self.probabilities, "Hyperexponential.probabilities", strict=False, high=1.0)
        m = _numbers(self.means, "Hyperexponential.means")
        if not p or len(p) != len(m):
            raise ScenarioError(
                f"Hyperexponential needs as many probabilities as means and at least one, got {len(p)} and {len(m)}"
            )
        if not math.isclose(sum(p), 1.0, rel_tol=1e-9):
            raise ScenarioError(f"Hyperexponential.probabilities must sum to 1, got {sum(p)!r}")
        _set(self, probabilities=p, means=m)

    @property
    def mean(self) -> float:
        return sum(p * m for p, m in zip(self.probabilities, self.means, strict=True))


@dataclass(frozen=True, kw_only=True)
class Empirical:
    """Demands drawn uniformly, with replacement, from measured ``values`` (core-seconds)."""

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        values = _numbers(self.values, "Empirical.values", strict=False, high=TRACE_LIMIT)
        if not values or not any(values):
            raise ScenarioError("Empirical.values needs at least one value above 0")
        _set(self, values=values)

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))


Demand = Deterministic | Exponential | Lognormal | BoundedPareto | Hyperexponential | Empirical
#: By the names they have in files.
DEMAND_KINDS: dict[str, type] = {
    "deterministic": Deterministic,
    "exponential": Exponential,
    "lognormal": Lognormal,
    "bounded_pareto": BoundedPareto,
    "hyperexponential": Hyperexponential,
    "empirical": Empirical,
}


# Arrivals: the shape in time; the mean rate belongs to the workload


@dataclass(frozen=True, kw_only=True)
class Poisson:
    """Poisson arrivals."""


@dataclass(frozen=True, kw_only=True)
class ModulatedPoisson:
    """Markov-modulated Poisson arrivals.

    In state i the rate is proportional to ``levels[i]`` (scaled so that the long-run mean is the workload's rate); a
    visit lasts ``sojourns[i]`` seconds in the mean, exponential, or exactly with ``fixed_sojourns``. The next state is
    drawn from row i of ``transitions``; None: the states in turn. The first state is drawn from the stationary law.
    """

    levels: tuple[float, ...] = (0.5, 2.0)
    sojourns: tuple[float, ...] = (10.0, 5.0)
    transitions: tuple[tuple[float, ...], ...] | None = None
    fixed_sojourns: bool = False

    def __post_init__(self) -> None:
        levels = _numbers(self.levels, "ModulatedPoisson.levels", strict=False)
        given_sojourns = _items(self.sojourns, "ModulatedPoisson.sojourns")
        sojourns = tuple(
            _number(x, f"ModulatedPoisson.sojourns[{i}]", low=MIN_SOJOURN, strict=False)
            for i, x in enumerate(given_sojourns)
        )
        n = len(levels)
        if n < 2 or len(sojourns) != n or not any(levels):
            raise ScenarioError(
                "ModulatedPoisson needs at least two levels, one of them above 0, and a sojourn for each, "
                f"got {n} levels and {len(sojourns)} sojourns"
            )
        if self.transitions is None:
            rows = tuple(tuple(float(j == (i + 1) % n) for j in range(n)) for i in range(n))
        else:
            name = "ModulatedPoisson.transitions"
            given = _items(self.transitions, name, "rows of probabilities")
            rows = tuple(_numbers(row, f"{name}[{i}]", strict=False, high=1.0) for i, row in enumerate(given))
        if len(rows) != n or any(len(row) != n or not math.isclose(sum(row), 1.0, rel_tol=1e-9) for row in rows):
            raise ScenarioError(f"ModulatedPoisson.transitions must be {n} rows of {n} probabilities that sum to 1")
        # Closed groups of states would each have a long-run mean of their own, or none, depending on the first state.
        reached = np.eye(n, dtype=np.bool_) | (np.asarray(rows) > 0)
        for _ in range(n.bit_length()):
            reached = reached @ reached
        if not reached.all(axis=0).any():
            raise ScenarioError("ModulatedPoisson.transitions must have a state that every state leads to, got none")
        fixed = _boolean(self.fixed_sojourns, "ModulatedPoisson.fixed_sojourns")
        _set(self, levels=levels, sojourns=sojourns, transitions=rows, fixed_sojourns=fixed)
        mean = float(self.stationary() @ np.asarray(levels))
        if not 0 < mean < math.inf:
            raise ScenarioError(
                f"ModulatedPoisson.levels must have a finite long-run mean above 0, got {mean:g}: "
                "no state with a level above 0 is visited in the long run"
            )

    def stationary(self) -> np.ndarray:
        """Long-run share of time in each state."""
        assert self.transitions is not None
        p = np.asarray(self.transitions)
        n = len(p)
        visits = np.linalg.lstsq(np.vstack([p.T - np.eye(n), np.ones(n)]), np.append(np.zeros(n), 1.0), rcond=None)[0]
        # Solving leaves rounding noise instead of zeros at states that are never revisited.
        share = np.where(visits > 1e-12, visits, 0.0) * (np.asarray(self.sojourns) / max(self.sojourns))
        with np.errstate(invalid="ignore"):
            return share / share.sum()


@dataclass(frozen=True, kw_only=True)
class OnOff:
    """Bursts: rate in proportion to 1 for ``on`` seconds, to ``off_level`` for ``off`` seconds, and so on.

    The long-run mean is the workload's rate. Durations are exact, or exponential with ``random``.
    """

    on: float = 1.0
    off: float = 4.0
    off_level: float = 0.0
    random: bool = False

    def __post_init__(self) -> None:
        _set(
            self,
            on=_number(self.on, "OnOff.on", low=MIN_SOJOURN, strict=False),
            off=_number(self.off, "OnOff.off", low=MIN_SOJOURN, strict=False),
            off_level=_number(self.off_level, "OnOff.off_level", strict=False, high=1.0),
            random=_boolean(self.random, "OnOff.random"),
        )


@dataclass(frozen=True, kw_only=True)
class Sinusoidal:
    """Poisson arrivals of rate ``r * (1 + amplitude * sin(2 pi t / period + phase))``: a day in short."""

    amplitude: float = 0.5
    period: float = 60.0
    phase: float = 0.0

    def __post_init__(self) -> None:
        _set(
            self,
            amplitude=_number(self.amplitude, "Sinusoidal.amplitude", strict=False, high=1.0),
            period=_number(self.period, "Sinusoidal.period"),
            phase=_number(self.phase, "Sinusoidal.phase", low=-math.inf),
        )


@dataclass(frozen=True, eq=False)
class Trace:
    """Arrivals and demands read from a file or given as arrays; times in seconds from the first flow.

    ``times`` is non-decreasing and starts at 0 or later; ``demands`` are core-seconds; both are copied. With ``repeat``
    the trace begins again one mean inter-arrival time after its last flow; otherwise arrivals end with it.
    With ``random_start`` each seed begins at another flow. ``skipped`` counts the lines a reader left out.

    ``origin`` holds the path and the options that :func:`~lbgym.scenarios.read_trace` was called with, so that a
    scenario can name its trace in a file; it is None for arrays and for copies made with ``dataclasses.replace``.
    """

    times: np.ndarray
    demands: np.ndarray
    source: str = "arrays"
    repeat: bool = True
    random_start: bool = False
    skipped: int = 0
    origin: Mapping[str, Any] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        _text(self.source, "Trace.source")
        try:
            # A copy: the arrays are made read-only below, which must not happen to the caller's.
            times = np.array(self.times, dtype=np.float64)
            demands = np.array(self.demands, dtype=np.float64)
        except (TypeError, ValueError, OverflowError) as error:
            raise ScenarioError(f"trace {self.source}: times and demands must be arrays of numbers: {error}") from None
        if times.ndim != 1 or times.shape != demands.shape or len(times) == 0:
            raise ScenarioError(
                f"trace {self.source}: times and demands must be equally long and not empty, "
                f"got shapes {times.shape} and {demands.shape}"
            )
        for name, values in (("times", times), ("demands", demands)):
            wrong = ~((values >= 0) & (values <= TRACE_LIMIT))
            if wrong.any():
                raise ScenarioError(
                    f"trace {self.source}: {name} must be from 0 to {TRACE_LIMIT:g}, got {values[wrong][0]} "
                    f"for flow {int(np.argmax(wrong))}"
                )
        tiny = (demands > 0) & (demands < MIN_DEMAND)
        if tiny.any():
            raise ScenarioError(
                f"trace {self.source}: demands must be 0 or at least {MIN_DEMAND:g} core-seconds, got "
                f"{demands[tiny][0]:g} for flow {int(np.argmax(tiny))}"
            )
        if (np.diff(times) < 0).any():
            first = int(np.argmax(np.diff(times) < 0)) + 1
            raise ScenarioError(
                f"trace {self.source}: times must not decrease; flow {first} is before flow {first - 1}"
            )
        times.setflags(write=False)
        demands.setflags(write=False)
        _set(
            self,
            times=times,
            demands=demands,
            repeat=_boolean(self.repeat, "Trace.repeat"),
            random_start=_boolean(self.random_start, "Trace.random_start"),
            skipped=_integer(self.skipped, "Trace.skipped", low=0),
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Trace:
        # Nobody can change it, and it may be large.
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for array in (self.times, self.demands):
            array.setflags(write=False)  # pickle does not keep this

    @property
    def period(self) -> float:
        """Seconds until the trace repeats: its span and one mean inter-arrival time."""
        span = float(self.times[-1])
        return span + (span / (len(self.times) - 1) if len(self.times) > 1 and span > 0 else 1.0)

    @property
    def rate(self) -> float:
        """Mean flows per second."""
        return len(self.times) / self.period

    @property
    def mean(self) -> float:
        """Mean demand, core-seconds."""
        return float(self.demands.mean())

    def scaled(self, *, speedup: float = 1.0, scale: float = 1.0) -> Trace:
        """The trace with times divided by ``speedup`` and demands multiplied by ``scale``."""
        speedup, scale = _number(speedup, "trace speedup"), _number(scale, "trace scale")
        with np.errstate(over="ignore"):
            return replace(self, times=self.times / speedup, demands=self.demands * scale)


Arrivals = Poisson | ModulatedPoisson | OnOff | Sinusoidal
#: By the names they have in files.
ARRIVAL_KINDS: dict[str, type] = {
    "poisson": Poisson,
    "modulated_poisson": ModulatedPoisson,
    "on_off": OnOff,
    "sinusoidal": Sinusoidal,
}


def _changes_per_second(arrivals: Arrivals) -> float:
    """Changes of the modulating state, in the mean."""
    if isinstance(arrivals, OnOff):
        return 2.0 / (arrivals.on + arrivals.off)
    if isinstance(arrivals, ModulatedPoisson):
        return float(arrivals.stationary() @ (1.0 / np.asarray(arrivals.sojourns)))
    return 0.0


def _changes_per_flow(arrivals: Arrivals, rate: float) -> float:
    """Changes of state, or thinned arrivals of a sinusoid, from one flow to the next where they are the most."""
    if not isinstance(arrivals, Sinusoidal):
        return _changes_per_second(arrivals) / rate
    peak, trough = 1.0 + arrivals.amplitude, 1.0 - arrivals.amplitude
    # Around a trough of rate 0 a flow takes t with 1 = rate * w**2 * t**3 / 6 (w: angular frequency).
    longest = math.cbrt(6.0) * math.cbrt(rate * arrivals.period / (2.0 * math.pi)) ** 2
    return peak * longest if trough <= 0.0 else min(peak * longest, peak / trough)


def check_pace(
    where: str, rates: Iterable[float], shapes: Iterable[Arrivals], factors: Iterable[float], silence: float
) -> None:
    """Refuse what would keep the simulator at work for ever on the way to one flow.

    Args:
        where: for the message.
        rates: mean flows per second, the extremes.
        shapes: of the arrivals.
        factors: of rate events.
        silence: the longest time without arrivals between two rate events, seconds.
    """
    shapes, paces = tuple(shapes), [rate * f for rate in rates for f in (1.0, *factors) if f > 0.0]
    if max(paces) > MAX_RATE:
        raise ScenarioError(
            f"{where}: the arrival rate, rate events included, must be at most {MAX_RATE:g} flows/s, got {max(paces):g}"
        )
    changes = max(
        (max(_changes_per_flow(s, p) for p in (min(paces), max(paces))) for s in shapes),
        default=0.0,
    )
    changes = max(changes, silence * max(map(_changes_per_second, shapes), default=0.0))
    if not changes <= MAX_CHANGES:
        raise ScenarioError(
            f"{where}: the arrivals may change their rate {changes:.3g} times from one flow to the next; at most "
            f"{MAX_CHANGES:g} are allowed: use longer sojourns, a shorter period or a higher rate"
        )


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The arriving flows: their rate and the demand of each.

    Attributes:
        arrivals: their shape in time. A trace replaces both ``arrivals`` and ``demand``.
        demand: the law of service demands.
        rate: mean flows per second. Give ``rate`` or ``load``, not both; a trace needs neither (its own rate holds).
        load: offered work as a fraction of the cluster's capacity.
        trace: recorded flows; ``rate`` or ``load`` then set the replay speed.
    """

    arrivals: Arrivals = field(default_factory=Poisson)
    demand: Demand = field(default_factory=Exponential)
    rate: float | None = None
    load: float | None = None
    trace: Trace | None = None

    def __post_init__(self) -> None:
        _instance(self.arrivals, Arrivals, "Workload.arrivals", "arrivals such as Poisson()")
        _instance(self.demand, Demand, "Workload.demand", "a demand such as Exponential(mean=0.1)")
        _instance(self.trace, Trace | None, "Workload.trace", "a Trace or None")
        if self.rate is not None and self.load is not None:
            raise ScenarioError(
                f"Workload takes rate or load, not both; got rate={_shown(self.rate)} and load={_shown(self.load)}"
            )
        if self.rate is None and self.load is None and self.trace is None:
            raise ScenarioError("Workload needs rate (flows per second), load (fraction of capacity) or a trace")
        for name in ("rate", "load"):
            if getattr(self, name) is not None:
                _set(self, **{name: _number(getattr(self, name), f"Workload.{name}")})
        if 0.0 < self.mean_demand < MIN_MEAN_DEMAND:
            raise ScenarioError(
                f"the mean demand of a workload must be 0 or at least {MIN_MEAN_DEMAND:g} core-seconds, got "
                f"{self.mean_demand:g}"
            )

    @property
    def mean_demand(self) -> float:
        """Mean core-seconds of a flow."""
        return self.trace.mean if self.trace is not None else self.demand.mean
