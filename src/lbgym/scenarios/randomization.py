"""Domain randomisation: distributions of scenarios, from which every episode draws one.

Everything here is plain data, as in :mod:`lbgym.scenarios.model`: ranges that a number is drawn from, and classes that
have such ranges where a scenario has values. Nothing is drawn but by :meth:`ScenarioDistribution.sample`, a pure
function of a generator, so that the same seed is the same scenario everywhere.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from ..errors import ScenarioError, UnknownNameError
from ._validation import _instance, _integer, _items, _number, _numbers, _set, _shown, _text
from .dispatch_rules import DISPATCH_RULES
from .model import MAX_SERVERS, Event, Sampling, Scenario, Server
from .workload import ARRIVAL_KINDS, DEMAND_KINDS, check_pace

#: Events are drawn up to this time, seconds, by default: longer than the longest default episode.
HORIZON = 3600.0
#: Most occurrences of random events in a draw, in the mean.
MAX_OCCURRENCES = 100_000
#: Most draws of random events, also of those that hit what is still hit: some ten seconds' work.
MAX_DRAWS = 10_000_000
#: Kinds of events that begin at random and end after a while.
RANDOM_EVENT_KINDS = ("speed", "down", "drain", "rate")
_EVENT = Event(time=0.0, kind="rate", value=1.0)
# Keeps the stream of a seed's scenario apart from whatever else is drawn from that seed.
_STREAM = 0x7363656E


# Ranges


@dataclass(frozen=True)
class Uniform:
    """A number drawn uniformly from [``low``, ``high``]; where a whole number is needed, each of them alike."""

    low: float
    high: float

    def __post_init__(self) -> None:
        _check_ends(self, -math.inf)


@dataclass(frozen=True)
class LogUniform:
    """A number above 0 whose logarithm is uniform on [log ``low``, log ``high``].

    Where a whole number is needed, k has a probability in proportion to log((k + 1) / k).
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        _check_ends(self, 0.0)


@dataclass(frozen=True)
class Choice:
    """One of some ``values``, each with its probability; None: all alike."""

    values: tuple[Any, ...]
    probabilities: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        values = tuple(map(_frozen, _items(self.values, "Choice.values", "values")))
        if not values:
            raise ScenarioError("Choice.values must hold at least one value, got none")
        _set(self, values=values, probabilities=_probabilities(self.probabilities, len(values), "Choice"))


#: A parameter of a distribution: a range, or a value that does not vary.
Range = Uniform | LogUniform | Choice
RANGE_KINDS: dict[str, type] = {"uniform": Uniform, "log_uniform": LogUniform, "choice": Choice}


def _check_ends(ends: Uniform | LogUniform, above: float) -> None:
    name = type(ends).__name__
    for side in ("low", "high"):
        end = _frozen(getattr(ends, side))
        _number(end, f"{name}.{side}", low=above)
        _set(ends, **{side: end})
    # A difference that overflows could not be drawn from.
    if not ends.low <= ends.high or not math.isfinite(float(ends.high) - float(ends.low)):
        raise ScenarioError(
            f"{name}.high must be at least low and at a finite distance from it, got {_shown(ends.low)} to "
            f"{_shown(ends.high)}"
        )


def _frozen(value: Any) -> Any:
    """Lists as tuples, which nobody can change afterwards, and NumPy's numbers as Python's."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_frozen, value))
    return value.item() if isinstance(value, np.generic) else value


def _probabilities(values: Any, count: int, name: str) -> tuple[float, ...] | None:
    if values is None:
        return None
    p = _numbers(values, f"{name}.probabilities", strict=False, high=1.0)
    if len(p) != count or not math.isclose(sum(p), 1.0, rel_tol=1e-9):
        raise ScenarioError(f"{name}.probabilities must be {count} numbers that sum to 1, got {_shown(p)}")
    return p


def _extremes(value: Any) -> tuple[Any, ...]:
    """Values between which, or of which, everything is that may be drawn."""
    if isinstance(value, (Uniform, LogUniform)):
        return (value.low, value.high)
    if isinstance(value, Choice):
        numbers = [v for v in value.values if isinstance(v, (int, float)) and not isinstance(v, bool)]
        return (min(numbers), max(numbers)) if len(numbers) == len(value.values) else value.values
    return (value,)


def _check_whole(value: Any, name: str, *, low: int, high: int) -> None:
    """Refuse a range, or a value, that is not of whole numbers."""
    for each in value.values if isinstance(value, Choice) else _extremes(value):
        _integer(each, name, low=low, high=high)


def _pick(probabilities: Sequence[float] | None, count: int, rng: np.random.Generator) -> int:
    """An index below ``count``, drawn with these probabilities."""
    u = rng.random()
    if probabilities is None:
        return min(int(u * count), count - 1)
    last = 0
    for i, p in enumerate(probabilities):
        if p > 0.0:
            last = i
            u -= p
            if u < 0.0:
                break
    return last


def _draw(value: Any, rng: np.random.Generator, *, whole: bool = False) -> Any:
    """A draw of a range, or a value that does not vary.

    In plain Python, since one number costs NumPy more than the arithmetic.
    """
    if isinstance(value, Choice):
        return value.values[_pick(value.probabilities, len(value.values), rng)]
    if not isinstance(value, (Uniform, LogUniform)):
        return value
    low, high = value.low, value.high
    if isinstance(value, Uniform):
        drawn = low + rng.random() * (high - low + (1 if whole else 0))
    else:
        start = math.log(low)
        drawn = math.exp(start + rng.random() * (math.log(high + 1 if whole else high) - start))
    if whole:
        return min(max(int(drawn), int(low)), int(high))
    return min(max(drawn, float(low)), float(high))


def _copied(instance: Any, values: Mapping[str, Any]) -> Any:
    """A copy with other values that need no second check: what a range may draw was checked when it was given."""
    copy = object.__new__(type(instance))
    copy.__dict__.update(instance.__dict__)
    copy.__dict__.update(values)
    return copy


# What varies


@dataclass(frozen=True, kw_only=True)
class ServerDistribution:
    """Attributes drawn for each server by itself; None: as in the base scenario.

    Attributes:
        cores, speed, workers, backlog, memory_mb, memory_idle_mb, memory_per_flow_mb, weight: as of
            :class:`~lbgym.scenarios.Server`, each a value or a range.
    """

    cores: int | Range | None = None
    speed: float | Range | None = None
    workers: int | Range | None = None
    backlog: int | Range | None = None
    memory_mb: float | Range | None = None
    memory_idle_mb: float | Range | None = None
    memory_per_flow_mb: float | Range | None = None
    weight: float | Range | None = None

    def __post_init__(self) -> None:
        for name, value in self.ranges().items():
            if name in _WHOLE:
                _check_whole(value, f"Server.{name}", low=_WHOLE[name], high=2**31 - 1)
            for extreme in _extremes(value):
                replace(Server(), **{name: extreme})

    def ranges(self) -> dict[str, Any]:
        """The attributes of a server that vary, with their ranges."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}

    def sample(self, rng: np.random.Generator, base: Sequence[Server]) -> tuple[Server, ...]:
        """The servers ``base``, with what varies drawn for each."""
        ranges = self.ranges()
        if not ranges:
            return tuple(base)
        items = [(name, value, int if name in _WHOLE else float) for name, value in ranges.items()]
        return tuple(
            _copied(server, {name: kind(_draw(value, rng, whole=kind is int)) for name, value, kind in items})
            for server in base
        )

    def extremes(self, server: Server) -> tuple[Server, Server]:
        """The servers of the least and of the largest capacity that one like ``server`` may become."""
        ranges = {name: value for name, value in self.ranges().items() if name in ("cores", "speed", "workers")}
        low = {name: _extremes(value)[0] for name, value in ranges.items()}
        high = {name: _extremes(value)[-1] for name, value in ranges.items()}
        return replace(server, **low), replace(server, **high)


#: Attributes of a server that are whole numbers, and the least of each.
_WHOLE = {"cores": 1, "workers": 1, "backlog": 0}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A kind of arrivals or of demand that an episode may have.

    Attributes:
        kind: of arrivals (``poisson``, ``modulated_poisson``, ``on_off``, ``sinusoidal``) or of demand
            (``deterministic``, ``exponential``, ``lognormal``, ``bounded_pareto``, ``hyperexponential``,
            ``empirical``).
        parameters: of that kind, by name; each a value or a range that is drawn once per episode.
        probability: of this kind among the others; None for all of them: all alike.
    """

    kind: str
    parameters: Mapping[str, Any] = field(default_factory=dict, hash=False)
    probability: float | None = None

    def __post_init__(self) -> None:
        kinds = ARRIVAL_KINDS | DEMAND_KINDS
        if _text(self.kind, "Variant.kind") not in kinds:
            raise UnknownNameError("kind of arrivals or demand", self.kind, kinds)
        _instance(self.parameters, Mapping, "Variant.parameters", "a mapping of names to values or ranges")
        known = [f.name for f in fields(kinds[self.kind])]
        for name in self.parameters:
            if name not in known:
                raise UnknownNameError("key", name, known, where=f"the {self.kind!r} variant")
        if self.probability is not None:
            _set(self, probability=_number(self.probability, "Variant.probability", strict=False, high=1.0))
        _set(self, parameters={name: _frozen(value) for name, value in self.parameters.items()})
        for _ in self.extremes():
            pass

    def sample(self, rng: np.random.Generator) -> Any:
        """Arrivals or a demand."""
        return self._made({name: _draw(value, rng) for name, value in self.parameters.items()})

    def extremes(self) -> Iterator[Any]:
        """Instances with every combination of the ends of the ranges.

        What a kind demands of several numbers at once (the ends of a bounded Pareto) defines a convex set, so that what
        holds at the ends holds between them.
        """
        for values in itertools.product(*map(_extremes, self.parameters.values())):
            yield self._made(dict(zip(self.parameters, values, strict=True)))

    def _made(self, values: dict[str, Any]) -> Any:
        return (ARRIVAL_KINDS | DEMAND_KINDS)[self.kind](**values)


@dataclass(frozen=True, kw_only=True)
class RandomEvents:
    """Events at random times, each of which ends after a while.

    A server that is well is hit after an exponential time of mean ``every``, alike and independently of the others; so
    is the arrival rate ("rate"). What is hit is not hit again by the same kind before the end; "down" and "drain" count
    as one kind.

    Attributes:
        kind: "speed" (a noisy neighbour: the server's speed is ``value`` times its own), "down" (a failure), "drain",
            or "rate" (a flash crowd: the arrival rate is ``value`` times the workload's).
        every: seconds, drawn once per episode.
        duration: seconds, drawn for every occurrence.
        value: drawn for every occurrence; None for "down" and "drain".
    """

    kind: Literal["speed", "down", "drain", "rate"]
    every: float | Range
    duration: float | Range
    value: float | Range | None = None

    def __post_init__(self) -> None:
        if _text(self.kind, "RandomEvents.kind") not in RANDOM_EVENT_KINDS:
            raise UnknownNameError("kind of random event", self.kind, RANDOM_EVENT_KINDS)
        for name in ("every", "duration"):
            for extreme in _extremes(getattr(self, name)):
                _number(extreme, f"RandomEvents.{name}", high=1e12)
        for extreme in _extremes(self.value):
            Event(time=0.0, kind=self.kind, server=None if self.kind == "rate" else 0, value=extreme)

    @property
    def longest(self) -> float:
        """The longest ``duration`` that may be drawn, seconds."""
        return float(max(_extremes(self.duration)))


@dataclass(frozen=True, kw_only=True)
class SamplingDistribution:
    """The sampling of balancers, drawn once per episode; None: as in the base scenario.

    Attributes:
        probability, decay, packets_per_flow, algorithm: as of :class:`~lbgym.scenarios.Sampling`, each a value or a
            range. The capacity is the shape of the simulator's memory and cannot vary.
    """

    probability: float | Range | None = None
    decay: float | Range | None = None
    packets_per_flow: float | Range | None = None
    algorithm: str | Choice | None = None

    def __post_init__(self) -> None:
        for name, value in self.ranges().items():
            for extreme in _extremes(value):
                replace(Sampling(), **{name: extreme})

    def ranges(self) -> dict[str, Any]:
        """The attributes of a sampling that vary, with their ranges."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}


@dataclass(frozen=True, kw_only=True)
class ScenarioDistribution:
    """Scenarios drawn afresh for every episode: a base scenario, and what varies about it.

    What is left None, or empty, is as in the base. The number of balancers and the capacity of the reservoirs are
    shapes of the simulator's memory and cannot vary.

    Attributes:
        base: has the name, the description, and whatever does not vary.
        num_servers: of the cluster, a whole number or a range of them. Server j is like server j of the base, whose
            servers come in turn again where it has fewer.
        server: what is drawn for each server.
        load: offered work over the capacity of the cluster that was drawn.
        rate: flows per second, instead of a load.
        arrivals: kinds of arrivals, of which an episode has one.
        demand: kinds of demand, of which an episode has one.
        dispatch: a dispatch rule or a choice of them.
        events: at random times, beside those of the base (without those that name a server that was not drawn).
        sampling: what is drawn of the balancers' sampling.

    Raises:
        ScenarioError: if anything that could be drawn would not be a valid scenario.
    """

    base: Scenario
    num_servers: int | Range | None = None
    server: ServerDistribution = field(default_factory=ServerDistribution)
    load: float | Range | None = None
    rate: float | Range | None = None
    arrivals: tuple[Variant, ...] = ()
    demand: tuple[Variant, ...] = ()
    dispatch: str | Choice | None = None
    events: tuple[RandomEvents, ...] = ()
    sampling: SamplingDistribution = field(default_factory=SamplingDistribution)

    def __post_init__(self) -> None:
        _instance(self.base, Scenario, "ScenarioDistribution.base", "a Scenario")
        where = f"distribution {self.base.name!r}"
        _instance(self.server, ServerDistribution, f"{where}: server", "a ServerDistribution")
        _instance(self.sampling, SamplingDistribution, f"{where}: sampling", "a SamplingDistribution")
        if self.num_servers is not None:
            _check_whole(self.num_servers, f"{where}: num_servers", low=1, high=MAX_SERVERS)
        if self.load is not None and self.rate is not None:
            raise ScenarioError(
                f"{where} takes rate or load, not both; got rate={_shown(self.rate)} and load={_shown(self.load)}"
            )
        for name in ("load", "rate"):
            for extreme in _extremes(getattr(self, name)):
                if extreme is not None:
                    _number(extreme, f"{where}: {name}")
        for name, kinds in (("arrivals", ARRIVAL_KINDS), ("demand", DEMAND_KINDS)):
            variants = _items(getattr(self, name), f"{where}: {name}", "variants")
            for i, variant in enumerate(variants):
                _instance(variant, Variant, f"{where}: {name}[{i}]", "a Variant")
                if variant.kind not in kinds:
                    raise UnknownNameError(f"kind of {name}", variant.kind, kinds, where=where)
            given = [v.probability for v in variants if v.probability is not None]
            if given and (len(given) < len(variants) or not math.isclose(sum(given), 1.0, rel_tol=1e-9)):
                raise ScenarioError(
                    f"{where}: the probabilities of {name} must sum to 1, or none of them be given, got "
                    f"{_shown([v.probability for v in variants])}"
                )
            if variants and self.base.workload.trace is not None:
                raise ScenarioError(f"{where}: a trace replaces arrivals and demand; {name} cannot vary")
            _set(self, **{name: variants})
        for rule in _extremes(self.dispatch):
            if rule is not None and _text(rule, f"{where}: dispatch") not in DISPATCH_RULES:
                raise UnknownNameError("dispatch rule", rule, DISPATCH_RULES, where=where)
        events = _items(self.events, f"{where}: events", "random events")
        for i, event in enumerate(events):
            _instance(event, RandomEvents, f"{where}: events[{i}]", "RandomEvents")
        _set(self, events=events)
        self._check_rates(where)
        self._check_events(where)
        # Not a draw, but environments are built on it.
        _instance(self.reference, Scenario, f"{where}: reference", "a Scenario")

    def _check_rates(self, where: str) -> None:
        """Refuse what may draw an arrival rate that no scenario can have."""
        servers = [self.server.extremes(server) for server in self._cluster(self.max_servers)]
        low = sum(server.capacity for server, _ in servers[: self.min_servers])
        high = sum(server.capacity for _, server in servers)
        if not math.isfinite(high):
            raise ScenarioError(f"{where}: the largest capacity of the cluster must be finite, got {high:g}")
        workload = self.base.workload
        loads = _extremes(self.load if self.load is not None else None if self.rate is not None else workload.load)
        if loads[0] is not None:
            means = [m.mean for v in self.demand for m in v.extremes()] or [workload.mean_demand]
            if min(means) <= 0.0:
                raise ScenarioError(f"{where}: every demand of the trace is 0, so load cannot set its rate")
            rates = [min(loads) * low / max(means), max(loads) * high / min(means)]
        else:
            rates = list(_extremes(self.rate if self.rate is not None else self.base.rate))
        if not (min(rates) > 0.0 and max(rates) < math.inf):
            raise ScenarioError(
                f"{where}: the arrival rate must be finite and above 0, but may be from {min(rates):g} to "
                f"{max(rates):g}"
            )
        shapes = [shape for v in self.arrivals for shape in v.extremes()] or [workload.arrivals]
        bursts = [event for event in self.events if event.kind == "rate"]
        factors = [e.value for e in self.base.events if e.kind == "rate" and e.value is not None]
        factors += [float(value) for event in bursts for value in _extremes(event.value)]
        silences = [e.longest for e in bursts if min(_extremes(e.value)) == 0.0]
        check_pace(where, rates, shapes if workload.trace is None else [], factors, max(silences, default=0.0))

    def _check_events(self, where: str) -> None:
        count = sum(
            (1 if e.kind == "rate" else self.max_servers)
            * HORIZON
            / (float(min(_extremes(e.every))) + float(min(_extremes(e.duration))))
            for e in self.events
        )
        if count > MAX_OCCURRENCES:
            raise ScenarioError(
                f"{where}: events may occur {count:.3g} times in {HORIZON:g} s; at most {MAX_OCCURRENCES:,} are allowed"
            )
        self._check_draws(where, sum(self._rate_of(e, float(min(_extremes(e.every)))) for e in self.events), HORIZON)

    def _rate_of(self, event: RandomEvents, every: float) -> float:
        """Draws of one kind of event per second, including those without effect."""
        return (1 if event.kind == "rate" else self.max_servers) / every

    @staticmethod
    def _check_draws(where: str, rate: float, horizon: float) -> None:
        if not rate * horizon <= MAX_DRAWS:
            raise ScenarioError(
                f"{where}: events would be drawn {rate * horizon:.3g} times in {horizon:g} s, most of them while the "
                f"last one lasts; at most {MAX_DRAWS:,} draws are allowed: raise `every`, or shorten the episode"
            )

    # What does not vary

    @property
    def name(self) -> str:
        return self.base.name

    @property
    def description(self) -> str:
        return self.base.description

    @property
    def balancers(self) -> int:
        return self.base.balancers

    @property
    def duration(self) -> float:
        return self.base.duration

    @property
    def reject_timeout(self) -> float:
        return self.base.reject_timeout

    @property
    def min_servers(self) -> int:
        """Servers of the smallest cluster."""
        return self.base.num_servers if self.num_servers is None else int(min(_extremes(self.num_servers)))

    @property
    def max_servers(self) -> int:
        """Servers of the largest cluster: the N of an environment's observations and actions."""
        return self.base.num_servers if self.num_servers is None else int(max(_extremes(self.num_servers)))

    @property
    def dispatch_rules(self) -> tuple[str, ...]:
        """Every dispatch rule that may be drawn."""
        rule = self.dispatch
        if isinstance(rule, Choice):
            chances = rule.probabilities or (1.0,) * len(rule.values)
            return tuple(name for name, chance in zip(rule.values, chances, strict=True) if chance > 0.0)
        return (self.base.dispatch if rule is None else rule,)

    @cached_property
    def reference(self) -> Scenario:
        """The base with the largest number of servers: not a draw, but of the shape that holds every draw."""
        return replace(self.base, servers=self._cluster(self.max_servers), events=self._kept(self.max_servers))

    def _cluster(self, count: int) -> tuple[Server, ...]:
        servers = self.base.servers
        return tuple(servers[j % len(servers)] for j in range(count))

    def _kept(self, count: int) -> tuple[Event, ...]:
        """The base's events but those of servers that a cluster of ``count`` does not have."""
        return tuple(event for event in self.base.events if event.server is None or event.server < count)

    def with_changes(self, **changes: Any) -> ScenarioDistribution:
        """A copy with other values; ``load=`` replaces a rate, and ``rate=`` a load.

        What cannot vary (``name``, ``description``, ``balancers``, ``reject_timeout``, ``duration``, ``workload``,
        ``servers``) is changed in the base.

        Raises:
            UnknownNameError: a keyword that is no attribute of a distribution, nor of a scenario.
            ScenarioError: a value that the distribution cannot have.
        """
        own = [item.name for item in fields(self)]
        fixed = [item.name for item in fields(self.base) if item.name not in own]
        for name in changes:
            if name not in own and name not in fixed:
                raise UnknownNameError("distribution key", name, (*own, *fixed))
        of_base = {name: changes.pop(name) for name in fixed if name in changes}
        if of_base:
            changes["base"] = changes.get("base", self.base).with_changes(**of_base)
        if changes.keys() & {"load", "rate"}:
            changes = {"load": None, "rate": None} | changes
        return replace(self, **changes)

    def with_events(self, events: Iterable[Event]) -> ScenarioDistribution:
        """A copy in which these events take the place of the base's and of the random ones."""
        return replace(self, base=self.base.with_events(events), events=())

    # Draws

    @property
    def varies(self) -> bool:
        """True: a scenario is drawn for every episode."""
        return True

    def draw(self, seed: int, *, horizon: float = HORIZON) -> Scenario:
        """The scenario of a seed: always the same, whoever asks and on whatever machine.

        Args:
            seed: a whole number of at least 0.
            horizon: as of :meth:`sample`; a shorter one leaves out later events and changes nothing else.
        """
        return self.sample(np.random.default_rng([seed, _STREAM]), horizon=horizon)

    def sample(self, rng: np.random.Generator, *, horizon: float = HORIZON) -> Scenario:
        """A scenario drawn from ``rng``.

        Args:
            rng: where everything that is drawn comes from.
            horizon: seconds up to which random events begin.
        """
        base = self.base
        count = self.max_servers if self.num_servers is None else _draw(self.num_servers, rng, whole=True)
        servers = self.server.sample(rng, self._cluster(count))
        workload: dict[str, Any] = {}
        for name, variants in (("arrivals", self.arrivals), ("demand", self.demand)):
            if variants:
                probabilities = [v.probability for v in variants if v.probability is not None] or None
                workload[name] = variants[_pick(probabilities, len(variants), rng)].sample(rng)
        if self.load is not None or self.rate is not None:
            name = "load" if self.load is not None else "rate"
            workload |= {"load": None, "rate": None, name: _draw(getattr(self, name), rng)}
        changes: dict[str, Any] = {"servers": servers}
        if workload:
            changes["workload"] = replace(base.workload, **workload)
        if self.dispatch is not None:
            changes["dispatch"] = _draw(self.dispatch, rng)
        sampling = self.sampling.ranges()
        if sampling:
            changes["sampling"] = replace(base.sampling, **{k: _draw(value, rng) for k, value in sampling.items()})
        if self.events or base.events:
            # The last draws, and in order of time, so that a shorter horizon changes nothing before it.
            changes["events"] = (*self._kept(count), *self._occurrences(rng, count, horizon))
        return replace(base, **changes)

    def _occurrences(self, rng: np.random.Generator, count: int, horizon: float) -> Iterator[Event]:
        """Random events and their ends: the superposition of one Poisson process per kind, thinned by what lasts."""
        if not self.events:
            return
        rates = [(1 if e.kind == "rate" else count) / _draw(e.every, rng) for e in self.events]
        total = math.fsum(rates)
        self._check_draws(f"distribution {self.name!r}", total, horizon)
        shares = [rate / total for rate in rates]
        until: dict[tuple[str, int | None], float] = {}
        now = 0.0
        while True:
            now += float(rng.exponential(1.0 / total))
            if now > horizon:
                return
            spec = self.events[_pick(shares, len(shares), rng)]
            server = None if spec.kind == "rate" else _pick(None, count, rng)
            end = now + float(_draw(spec.duration, rng))
            value = None if spec.value is None else float(_draw(spec.value, rng))
            hit = ("status" if spec.kind in ("down", "drain") else spec.kind, server)
            if now < until.get(hit, 0.0):
                continue
            until[hit] = end
            begin = {"time": now, "kind": spec.kind, "server": server, "value": value}
            yield _copied(_EVENT, begin)
            yield _copied(_EVENT, begin | {"time": end} | ({"kind": "up"} if value is None else {"value": 1.0}))


#: A scenario, or a distribution of them: what an environment, a comparison or a training may run on.
AnyScenario = Scenario | ScenarioDistribution
