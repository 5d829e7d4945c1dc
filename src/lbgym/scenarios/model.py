"""Scenarios as plain data: servers, workload, events, and how a balancer samples.

Nothing here simulates. Every class validates itself on construction and raises :class:`ScenarioError` with the
value, what is allowed and where.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np

from ..errors import ScenarioError, UnknownNameError

#: Dispatch rules: how the data plane places one flow, given the balancer's weights and its own counters.
DISPATCH_RULES = (
    "ecmp",
    "wcmp",
    "maglev",
    "round_robin",
    "lsq",
    "sed",
    "sed_scaled",
    "p2c",
    "p2c_sed",
    "oracle_lsq",
    "oracle_sed",
    "oracle_least_work",
)
EVENT_KINDS = ("rate", "speed", "down", "up", "drain")
MAX_SERVERS = 65_536
#: The simulator counts cores, workers and places in the backlog in 32 bits.
MAX_COUNT = 2**31 - 1
#: Largest time (s) and demand (core-seconds) in a trace, so that sums over it stay finite.
TRACE_LIMIT = 1e15


def _shown(value: Any) -> str:
    """``repr`` for an error message: short, and safe for integers that Python refuses to print."""
    try:
        text = repr(value)
    except ValueError:
        return f"{type(value).__name__} of too many digits to print"
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"


def _number(value: Any, name: str, *, low: float = 0.0, strict: bool = True, high: float = math.inf) -> float:
    """``value`` as a finite float above ``low`` (or equal, unless strict) and at most ``high``."""
    bound = f" {'above' if strict else 'at least'} {low:g}" if low > -math.inf else ""
    bound += f" and at most {high:g}" if high < math.inf else ""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise ScenarioError(f"{name} must be a number{bound}, got {_shown(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or number < low or (strict and number == low) or number > high:
        raise ScenarioError(f"{name} must be a finite number{bound}, got {_shown(value)}")
    return number


def _items(values: Any, name: str, what: str = "numbers") -> tuple[Any, ...]:
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise ScenarioError(f"{name} must be a list of {what}, got {_shown(values)}")
    return tuple(values)


def _numbers(values: Any, name: str, *, strict: bool = True, high: float = math.inf) -> tuple[float, ...]:
    return tuple(_number(x, f"{name}[{i}]", strict=strict, high=high) for i, x in enumerate(_items(values, name)))


def _integer(value: Any, name: str, *, low: int, high: int = MAX_COUNT) -> int:
    bound = f"at least {low}" if high == MAX_COUNT else f"from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ScenarioError(f"{name} must be a whole number {bound}, got {_shown(value)}")
    if not low <= value <= high:
        raise ScenarioError(f"{name} must be {bound if value < low else f'from {low} to {high}'}, got {_shown(value)}")
    return int(value)


def _boolean(value: Any, name: str) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise ScenarioError(f"{name} must be true or false, got {_shown(value)}")
    return bool(value)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ScenarioError(f"{name} must be text, got {_shown(value)}")
    return value


def _instance(value: Any, kinds: Any, name: str, allowed: str) -> None:
    if not isinstance(value, kinds):
        raise ScenarioError(f"{name} must be {allowed}, got {_shown(value)}")


def _set(instance: object, **values: Any) -> None:
    """Assign normalised values on a frozen dataclass."""
    for name, value in values.items():
        object.__setattr__(instance, name, value)


# Servers


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server under limited processor sharing.

    Of the flows it holds, at most ``workers`` are served at once, each at ``speed * min(1, cores / served)``; further
    flows wait first-in first-out in a backlog of ``backlog`` places; beyond that a flow is rejected.

    Attributes:
        cores: CPU cores, at least 1.
        speed: core-seconds of demand one core serves per second, above 0.
        workers: flows served at once; None: unlimited (plain processor sharing).
        backlog: places to wait once every worker is busy; None: unlimited. Without a limit on workers nothing waits.
        memory_mb, memory_idle_mb, memory_per_flow_mb: the linear model of ground-truth memory use:
            (idle + per_flow * flows) / memory, at most 1.
    """

    cores: int = 1
    speed: float = 1.0
    workers: int | None = None
    backlog: int | None = None
    memory_mb: float = 4096.0
    memory_idle_mb: float = 512.0
    memory_per_flow_mb: float = 16.0

    def __post_init__(self) -> None:
        _set(
            self,
            cores=_integer(self.cores, "Server.cores", low=1),
            speed=_number(self.speed, "Server.speed"),
            memory_mb=_number(self.memory_mb, "Server.memory_mb"),
            memory_idle_mb=_number(self.memory_idle_mb, "Server.memory_idle_mb", strict=False),
            memory_per_flow_mb=_number(self.memory_per_flow_mb, "Server.memory_per_flow_mb", strict=False),
        )
        if self.workers is not None:
            _set(self, workers=_integer(self.workers, "Server.workers", low=1))
        if self.backlog is not None:
            _set(self, backlog=_integer(self.backlog, "Server.backlog", low=0))

    @property
    def capacity(self) -> float:
        """Core-seconds of demand served per second when every core is busy (workers may limit it)."""
        usable = self.cores if self.workers is None else min(self.cores, self.workers)
        return usable * self.speed


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
        sojourns = _numbers(self.sojourns, "ModulatedPoisson.sojourns")
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
            on=_number(self.on, "OnOff.on"),
            off=_number(self.off, "OnOff.off"),
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


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What arrives: flows per second and the demand of each.

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

    @property
    def mean_demand(self) -> float:
        """Mean core-seconds of a flow."""
        return self.trace.mean if self.trace is not None else self.demand.mean


# Events


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happens at ``time`` seconds.

    ``kind``: "rate" (the arrival rate becomes ``value`` times the workload's), "speed" (the server's speed becomes
    ``value`` times its configured one), "down" (the server's flows fail and it takes no more), "up", "drain" (it
    finishes what it has and takes no more).
    """

    time: float
    kind: Literal["rate", "speed", "down", "up", "drain"]
    server: int | None = None
    value: float | None = None

    def __post_init__(self) -> None:
        _set(self, time=_number(self.time, "Event.time", strict=False))
        if _text(self.kind, "Event.kind") not in EVENT_KINDS:
            raise UnknownNameError("event kind", self.kind, EVENT_KINDS)
        if (self.kind == "rate") != (self.server is None):
            raise ScenarioError(
                f"a {self.kind!r} event {'takes no' if self.kind == 'rate' else 'needs a'} server, "
                f"got {_shown(self.server)}"
            )
        if self.server is not None:
            _set(self, server=_integer(self.server, "Event.server", low=0))
        if (self.kind in ("rate", "speed")) != (self.value is not None):
            raise ScenarioError(
                f"a {self.kind!r} event {'needs a' if self.kind in ('rate', 'speed') else 'takes no'} value, "
                f"got {_shown(self.value)}"
            )
        if self.value is not None:
            _set(self, value=_number(self.value, "Event.value", strict=self.kind == "speed"))


# How a balancer samples


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Reservoirs of a balancer, two per server: FCT and flow duration.

    Attributes:
        capacity: samples kept.
        probability: chance that an event is sampled at all.
        algorithm: "overwrite" (a uniformly random slot: exponential forgetting) or "uniform" (Algorithm R of Vitter:
            uniform over all history, never forgets).
        decay: weight of a sample per second of its age in the ``*_decay`` features.
        packets_per_flow: flow-duration samples per flow in the mean. Packets come as service progresses (a response is
            acknowledged while it is sent): a Poisson process in the service a flow has received, so larger
            flows are sampled more often. 0: no duration samples.
    """

    capacity: int = 128
    probability: float = 1.0
    algorithm: Literal["overwrite", "uniform"] = "overwrite"
    decay: float = 0.9
    packets_per_flow: float = 2.0

    def __post_init__(self) -> None:
        _set(
            self,
            capacity=_integer(self.capacity, "Sampling.capacity", low=1, high=32_767),
            probability=_number(self.probability, "Sampling.probability", high=1.0),
            decay=_number(self.decay, "Sampling.decay", high=1.0),
            packets_per_flow=_number(self.packets_per_flow, "Sampling.packets_per_flow", strict=False),
        )
        if _text(self.algorithm, "Sampling.algorithm") not in ("overwrite", "uniform"):
            raise UnknownNameError("sampling algorithm", self.algorithm, ("overwrite", "uniform"))


# The scenario


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Cluster, workload, balancers, dispatch rule and events under one name.

    Attributes:
        name, description: for people.
        servers: the cluster, at least one server.
        workload: what arrives.
        balancers: load balancers; each flow belongs to the one its hash selects.
        dispatch: the default dispatch rule (``DISPATCH_RULES``).
        events: what happens when, in any order.
        reject_timeout: FCT, in seconds, that a rejected or failed flow counts with.
        sampling: the balancers' reservoirs.
        duration: seconds that an evaluation of the scenario lasts unless told otherwise.
    """

    name: str = "custom"
    description: str = ""
    servers: tuple[Server, ...]
    workload: Workload
    balancers: int = 1
    dispatch: str = "sed"
    events: tuple[Event, ...] = ()
    reject_timeout: float = 40.0
    sampling: Sampling = field(default_factory=Sampling)
    duration: float = 60.0

    def __post_init__(self) -> None:
        _text(self.name, "Scenario.name")
        _text(self.description, f"scenario {self.name!r}: description")
        servers = _items(self.servers, f"scenario {self.name!r}: servers", "servers")
        for i, server in enumerate(servers):
            _instance(server, Server, f"scenario {self.name!r}: servers[{i}]", "a Server")
        _instance(self.workload, Workload, f"scenario {self.name!r}: workload", "a Workload")
        _instance(self.sampling, Sampling, f"scenario {self.name!r}: sampling", "a Sampling")
        if not 1 <= len(servers) <= MAX_SERVERS:
            raise ScenarioError(f"scenario {self.name!r}: servers must be 1 to {MAX_SERVERS}, got {len(servers)}")
        if _text(self.dispatch, f"scenario {self.name!r}: dispatch") not in DISPATCH_RULES:
            raise UnknownNameError("dispatch rule", self.dispatch, DISPATCH_RULES, where=f"scenario {self.name!r}")
        events = _items(self.events, f"scenario {self.name!r}: events", "events")
        for i, event in enumerate(events):
            _instance(event, Event, f"scenario {self.name!r}: events[{i}]", "an Event")
        events = tuple(sorted(events, key=lambda e: e.time))
        for event in events:
            if event.server is not None and event.server >= len(servers):
                raise ScenarioError(
                    f"scenario {self.name!r}: event at {event.time} s names server {event.server}; "
                    f"allowed: 0 to {len(servers) - 1}"
                )
        _set(
            self,
            servers=servers,
            events=events,
            balancers=_integer(self.balancers, f"scenario {self.name!r}: balancers", low=1, high=1024),
            reject_timeout=_number(self.reject_timeout, f"scenario {self.name!r}: reject_timeout"),
            duration=_number(self.duration, f"scenario {self.name!r}: duration"),
        )
        if self.workload.load is not None and self.workload.mean_demand == 0:
            raise ScenarioError(f"scenario {self.name!r}: every demand of the trace is 0, so load cannot set its rate")
        if not 0 < self.rate < math.inf:
            raise ScenarioError(
                f"scenario {self.name!r}: the arrival rate must be finite and above 0, got {self.rate:g}"
            )

    @property
    def reference(self) -> Scenario:
        """Itself: a scenario is a distribution of one (:class:`~lbgym.scenarios.ScenarioDistribution`)."""
        return self

    @property
    def min_servers(self) -> int:
        return self.num_servers

    @property
    def max_servers(self) -> int:
        return self.num_servers

    def draw(self, seed: int, *, horizon: float = 0.0) -> Scenario:
        """Itself, whatever the seed and the horizon."""
        return self

    @property
    def num_servers(self) -> int:
        return len(self.servers)

    @property
    def capacity(self) -> float:
        """Core-seconds per second of the whole cluster."""
        return sum(server.capacity for server in self.servers)

    @property
    def rate(self) -> float:
        """Mean flows per second, from the workload's rate, load or trace."""
        workload = self.workload
        if workload.rate is not None:
            return workload.rate
        if workload.load is not None:
            return workload.load * self.capacity / workload.mean_demand
        assert workload.trace is not None
        return workload.trace.rate

    @property
    def load(self) -> float:
        """Offered work as a fraction of the cluster's capacity."""
        return self.rate * self.workload.mean_demand / self.capacity

    @property
    def core_weights(self) -> tuple[float, ...]:
        """What an operator knows of the servers: weights in proportion to their cores."""
        return tuple(float(server.cores) for server in self.servers)

    def with_changes(self, **changes: Any) -> Scenario:
        """A copy with other values; also takes ``load=``, ``rate=`` for the workload.

        Raises:
            UnknownNameError: a keyword that is no attribute of a scenario.
            ScenarioError: a value that the scenario cannot have.
        """
        known = [item.name for item in fields(self)] + ["load", "rate"]
        for name in changes:
            if name not in known:
                raise UnknownNameError("scenario key", name, known)
        workload = {k: changes.pop(k) for k in ("load", "rate") if k in changes}
        if workload:
            base = changes.get("workload", self.workload)
            _instance(base, Workload, f"scenario {self.name!r}: workload", "a Workload")
            changes["workload"] = replace(base, **({"load": None, "rate": None} | workload))
        return replace(self, **changes)


def servers_of(*groups: tuple[int, Server] | Server) -> tuple[Server, ...]:
    """Flatten ``(count, server)`` groups: ``servers_of((4, Server(cores=2)), (3, Server(cores=4)))``."""
    flat: list[Server] = []
    for group in groups:
        count, server = group if isinstance(group, Sequence) else (1, group)
        flat.extend([server] * _integer(count, "the count of a group of servers", low=0, high=MAX_SERVERS))
    return tuple(flat)
