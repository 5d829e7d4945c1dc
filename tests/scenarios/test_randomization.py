"""Distributions of scenarios: what they draw is valid, within its ranges and distributed as stated."""

from __future__ import annotations

import math
import pickle
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from scipy import stats

from lbgym.errors import LbgymError, ScenarioError, UnknownNameError
from lbgym.scenarios import (
    DISPATCH_RULES,
    BoundedPareto,
    Choice,
    Event,
    Exponential,
    Hyperexponential,
    Lognormal,
    LogUniform,
    RandomEvents,
    SamplingDistribution,
    Scenario,
    ScenarioDistribution,
    Server,
    ServerDistribution,
    Trace,
    Uniform,
    Variant,
    Workload,
    distribution_names,
    fixed_scenario,
    from_toml,
    load_scenario,
    named_distribution,
    named_scenario,
    to_toml,
)

from .strategies import junk, scenarios

BASE = Scenario(name="base", servers=(Server(), Server(cores=2)), workload=Workload(load=0.5))


def ranges(values: st.SearchStrategy[Any], *, log: bool = True) -> st.SearchStrategy[Any]:
    """A value, or a range of such values."""
    pair = st.tuples(values, values).map(sorted)
    kinds = [
        values,
        pair.map(lambda p: Uniform(*p)),
        st.lists(values, min_size=1, max_size=3).map(lambda v: Choice(tuple(v))),
        st.tuples(values, values, st.integers(1, 9)).map(lambda t: Choice(t[:2], (t[2] / 10, 1 - t[2] / 10))),
    ]
    if log:
        kinds.append(pair.map(lambda p: LogUniform(*p)))
    return st.one_of(kinds)


small = st.floats(0.1, 10)
share = st.floats(1e-3, 1)
SMALL = ranges(small)
FROM_0_TO_1 = ranges(st.floats(0, 1), log=False)


def variants(kind: str, **parameters: st.SearchStrategy[Any]) -> st.SearchStrategy[Variant]:
    return st.fixed_dictionaries({}, optional=parameters).map(lambda p: Variant(kind=kind, parameters=p))


def ends_of_paretos(low: float) -> dict[str, Any]:
    return {"minimum": Uniform(low, 2 * low), "maximum": LogUniform(3 * low, 30 * low)}


ARRIVALS = st.one_of(
    st.just(Variant(kind="poisson")),
    variants("on_off", on=SMALL, off=SMALL, off_level=FROM_0_TO_1),
    variants("sinusoidal", amplitude=FROM_0_TO_1, phase=ranges(st.floats(-10, 10), log=False)),
    variants("modulated_poisson", levels=st.just(Choice(((1.0, 2.0), (0.5, 4.0))))),
)
DEMANDS = st.one_of(
    variants("exponential", mean=SMALL),
    variants("lognormal", mean=SMALL, cv=SMALL),
    variants("hyperexponential", means=st.just(Choice(((0.1, 0.2), (0.05, 1.0))))),
    share.map(lambda low: Variant(kind="bounded_pareto", parameters=ends_of_paretos(low))),
)
EVERY, LASTING = ranges(st.floats(30, 1e4)), ranges(st.floats(0.1, 100))
EVENTS = st.one_of(
    st.builds(RandomEvents, kind=st.sampled_from(("down", "drain")), every=EVERY, duration=LASTING),
    st.builds(RandomEvents, kind=st.sampled_from(("speed", "rate")), every=EVERY, duration=LASTING, value=SMALL),
)
SERVER = st.builds(
    ServerDistribution,
    cores=st.none() | ranges(st.integers(1, 64)),
    speed=st.none() | SMALL,
    workers=st.none() | ranges(st.integers(1, 64)),
    backlog=st.none() | ranges(st.integers(0, 64), log=False),
)
SAMPLING = st.builds(
    SamplingDistribution,
    probability=st.none() | ranges(share),
    algorithm=st.none() | st.just(Choice(("overwrite", "uniform"))),
)
RULES = st.sampled_from(DISPATCH_RULES)


def distribution(quantity: dict[str, Any], **parts: Any) -> ScenarioDistribution:
    try:
        return ScenarioDistribution(**parts, **quantity)
    except ScenarioError as error:
        # Parts that are good each by itself may make too many flows, or too few for their shape, together.
        if "flows/s" in str(error) or "from one flow to the next" in str(error):
            reject()
        raise


distributions = st.builds(
    distribution,
    base=scenarios(),
    num_servers=st.none() | ranges(st.integers(1, 9)),
    server=SERVER,
    quantity=st.fixed_dictionaries({})
    | st.fixed_dictionaries({"load": SMALL})
    | st.fixed_dictionaries({"rate": SMALL}),
    arrivals=st.lists(ARRIVALS, max_size=2),
    demand=st.lists(DEMANDS, max_size=2),
    dispatch=st.none() | RULES | st.tuples(RULES, RULES).map(Choice),
    events=st.lists(EVENTS, max_size=2),
    sampling=SAMPLING,
)


def inside(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, (Uniform, LogUniform)):
        return bool(wanted.low <= value <= wanted.high)
    return value in (wanted.values if isinstance(wanted, Choice) else (wanted,))


def check_draw(d: ScenarioDistribution, s: Scenario) -> None:
    """Valid, by the constructors of all its parts, and within the ranges."""
    assert replace(s, servers=[replace(x) for x in s.servers], events=[replace(x) for x in s.events]) == s
    assert s.workload == replace(s.workload) and s.sampling == replace(s.sampling)
    assert d.min_servers <= s.num_servers <= d.max_servers
    assert d.num_servers is None or inside(s.num_servers, d.num_servers)
    for j, server in enumerate(s.servers):
        base, drawn = d.base.servers[j % d.base.num_servers], d.server.ranges()
        for item in fields(Server):
            value = getattr(server, item.name)
            assert type(value) in (int, float, type(None))
            assert inside(value, drawn[item.name]) if item.name in drawn else value == getattr(base, item.name)
    for name in ("load", "rate"):
        if getattr(d, name) is not None:
            assert inside(getattr(s.workload, name), getattr(d, name))
    for name, variants in (("arrivals", d.arrivals), ("demand", d.demand)):
        part = getattr(s.workload, name)
        kind = {"BoundedPareto": "bounded_pareto", "OnOff": "on_off", "ModulatedPoisson": "modulated_poisson"}.get(
            type(part).__name__, type(part).__name__.lower()
        )
        mine = [v.parameters for v in variants if v.kind == kind]
        assert (
            any(all(inside(getattr(part, k), r) for k, r in p.items()) for p in mine)
            if variants
            else part == getattr(d.base.workload, name)
        )
    assert s.dispatch == d.base.dispatch if d.dispatch is None else inside(s.dispatch, d.dispatch)
    for name, wanted in d.sampling.ranges().items():
        assert inside(getattr(s.sampling, name), wanted)
    for name in ("name", "description", "balancers", "reject_timeout", "duration"):
        assert getattr(s, name) == getattr(d.base, name)


@given(distributions, st.integers(0, 2**63))
@settings(max_examples=100)
def test_what_is_drawn_is_valid_and_within_its_ranges(distribution: ScenarioDistribution, seed: int) -> None:
    drawn = distribution.draw(seed, horizon=200.0)
    check_draw(distribution, drawn)
    assert distribution.draw(seed, horizon=200.0) == drawn
    check_draw(distribution, distribution.sample(np.random.default_rng(seed), horizon=50.0))


@given(distributions)
@settings(max_examples=50)
def test_every_distribution_survives_a_file_and_a_process(distribution: ScenarioDistribution) -> None:
    assert from_toml(to_toml(distribution)) == distribution
    assert pickle.loads(pickle.dumps(distribution)) == distribution


@pytest.mark.parametrize("name", distribution_names())
def test_built_in_distributions(name: str) -> None:
    distribution = load_scenario(name)
    assert isinstance(distribution, ScenarioDistribution) and distribution is named_distribution(name)
    assert distribution.name == name and distribution.description
    for seed in range(20):
        drawn = distribution.draw(seed)
        check_draw(distribution, drawn)
        assert from_toml(to_toml(drawn)) == drawn
        assert 0.4 < drawn.load < 1.0
    assert distribution.reference.num_servers == distribution.max_servers


def test_seeds_draw_different_scenarios_and_a_generator_goes_on() -> None:
    distribution = named_distribution("random-clusters")
    assert len({distribution.draw(seed).load for seed in range(50)}) == 50
    rng = np.random.default_rng(3)
    first, second = distribution.sample(rng), distribution.sample(rng)
    rng = np.random.default_rng(3)
    assert first != second and distribution.sample(rng) == first and distribution.sample(rng) == second


# Distributed as stated


def drawn(count: int, value: Callable[[Scenario], Any], **parts: Any) -> list[Any]:
    distribution = ScenarioDistribution(base=BASE, **parts)
    return [value(distribution.draw(seed)) for seed in range(count)]


def same_counts(values: list[Any], expected: dict[Any, float]) -> None:
    counts = Counter(values)
    assert counts.keys() <= expected.keys()
    shares = np.array(list(expected.values())) / sum(expected.values())
    assert stats.chisquare([counts[k] for k in expected], shares * len(values)).pvalue > 1e-4


def test_numbers_are_uniform_or_log_uniform() -> None:
    loads = drawn(2000, lambda s: s.workload.load, load=Uniform(0.5, 0.9))
    assert stats.kstest(loads, stats.uniform(0.5, 0.4).cdf).pvalue > 1e-4
    speeds = [
        x
        for row in drawn(
            1000,
            lambda s: [x.speed for x in s.servers],
            server=ServerDistribution(speed=LogUniform(0.25, 4.0)),
        )
        for x in row
    ]
    assert stats.kstest(speeds, stats.loguniform(0.25, 4.0).cdf).pvalue > 1e-4
    rates = drawn(500, lambda s: s.rate, rate=LogUniform(1.0, 100.0), load=None)
    assert stats.kstest(rates, stats.loguniform(1.0, 100.0).cdf).pvalue > 1e-4


def test_whole_numbers_and_choices() -> None:
    same_counts(drawn(2000, lambda s: s.num_servers, num_servers=Uniform(3, 9)), dict.fromkeys(range(3, 10), 1.0))
    law = {k: math.log((k + 1) / k) for k in range(2, 9)}
    same_counts(drawn(2000, lambda s: s.num_servers, num_servers=LogUniform(2, 8)), law)
    choice = Choice((2, 4, 8), (0.5, 0.3, 0.2))
    cores = drawn(1000, lambda s: [x.cores for x in s.servers], server=ServerDistribution(cores=choice))
    same_counts([c for row in cores for c in row], {2: 0.5, 4: 0.3, 8: 0.2})
    # Servers of a draw are independent of each other.
    pairs = tuple(zip(choice.values, choice.probabilities or (), strict=True))
    same_counts([tuple(row) for row in cores], {(a, b): p * q for a, p in pairs for b, q in pairs})
    rules = drawn(900, lambda s: s.dispatch, dispatch=Choice(("sed", "lsq", "ecmp")))
    same_counts(rules, dict.fromkeys(("sed", "lsq", "ecmp"), 1.0))


def test_kinds_of_arrivals_and_demand() -> None:
    variants = (
        Variant(kind="exponential", parameters={"mean": LogUniform(0.1, 1.0)}, probability=0.7),
        Variant(kind="lognormal", parameters={"cv": Uniform(1.0, 3.0)}, probability=0.3),
    )
    demands = drawn(2000, lambda s: s.workload.demand, demand=variants)
    same_counts([type(x) for x in demands], {Exponential: 0.7, Lognormal: 0.3})
    means = [x.mean for x in demands if isinstance(x, Exponential)]
    assert stats.kstest(means, stats.loguniform(0.1, 1.0).cdf).pvalue > 1e-4
    cvs = [x.cv for x in demands if isinstance(x, Lognormal)]
    assert stats.kstest(cvs, stats.uniform(1.0, 2.0).cdf).pvalue > 1e-4
    same_counts(
        drawn(
            600,
            lambda s: type(s.workload.arrivals).__name__,
            arrivals=[Variant(kind="poisson"), Variant(kind="on_off")],
        ),
        {"Poisson": 1.0, "OnOff": 1.0},
    )


def test_a_probability_of_zero_is_never_drawn() -> None:
    loads = drawn(300, lambda s: s.workload.load, load=Choice((0.1, 0.2, 0.3), (0.0, 1.0, 0.0)))
    assert set(loads) == {0.2}


# Random events


def occurrences(scenario: Scenario, kinds: tuple[str, ...]) -> dict[int | None, list[tuple[float, float]]]:
    """Begin and end of every occurrence, by server; checks that one ends before the next begins."""
    found: dict[int | None, list[tuple[float, float]]] = {}
    begun: dict[int | None, float] = {}
    for event in scenario.events:
        if event.kind not in kinds:
            continue
        ends = event.kind == "up" or (event.kind in ("speed", "rate") and event.value == 1.0)
        if ends:
            found.setdefault(event.server, []).append((begun.pop(event.server), event.time))
        else:
            assert event.server not in begun
            begun[event.server] = event.time
    assert not begun
    return found


def test_events_come_as_often_and_last_as_long_as_stated() -> None:
    events = (
        RandomEvents(kind="down", every=50.0, duration=Uniform(5.0, 15.0)),
        RandomEvents(kind="speed", every=100.0, duration=20.0, value=Uniform(0.4, 0.8)),
        RandomEvents(kind="rate", every=200.0, duration=30.0, value=2.0),
    )
    distribution = ScenarioDistribution(base=BASE, num_servers=4, events=events)
    scenarios = [distribution.draw(seed) for seed in range(30)]
    for kinds, cycle, servers in ((("down", "up"), 60.0, 4), (("speed",), 120.0, 4), (("rate",), 230.0, 1)):
        found = [occurrences(s, kinds) for s in scenarios]
        every = [pair for each in found for pairs in each.values() for pair in pairs]
        expected = 30 * servers * 3600.0 / cycle
        assert len(every) == pytest.approx(expected, abs=4 * math.sqrt(expected))
        # From the end of one to the beginning of the next a server waits exponentially.
        gaps = [b[0] - a[1] for each in found for pairs in each.values() for a, b in pairwise(pairs)]
        mean = {"down": 50.0, "speed": 100.0, "rate": 200.0}[kinds[0]]
        assert stats.kstest(gaps, stats.expon(scale=mean).cdf).pvalue > 1e-4
        if kinds[0] == "down":
            assert stats.kstest([b - a for a, b in every], stats.uniform(5.0, 10.0).cdf).pvalue > 1e-4
    values = [e.value for s in scenarios for e in s.events if e.kind == "speed" and e.value != 1.0]
    assert stats.kstest(values, stats.uniform(0.4, 0.4).cdf).pvalue > 1e-4


def test_failures_and_drains_of_a_server_do_not_overlap() -> None:
    events = (
        RandomEvents(kind="down", every=20.0, duration=LogUniform(1.0, 100.0)),
        RandomEvents(kind="drain", every=20.0, duration=30.0),
    )
    distribution = ScenarioDistribution(base=BASE, events=events)
    for seed in range(20):
        assert occurrences(distribution.draw(seed), ("down", "drain", "up"))


@pytest.mark.parametrize("horizon", [0.0, 30.0, 600.0])
def test_a_shorter_horizon_leaves_out_later_events_and_changes_nothing_else(horizon: float) -> None:
    distribution = named_distribution("random-clusters")
    for seed in range(20):
        whole, part = distribution.draw(seed), distribution.draw(seed, horizon=horizon)
        assert replace(whole, events=()) == replace(part, events=())
        assert [e for e in part.events if e.time <= horizon] == [e for e in whole.events if e.time <= horizon]
        begun = [e.time for e in part.events if e.kind == "down" or (e.kind == "speed" and e.value != 1.0)]
        assert all(time <= horizon for time in begun)


def test_events_of_the_base_stay_for_the_servers_that_are_drawn() -> None:
    events = (Event(time=1.0, kind="down", server=1), Event(time=2.0, kind="rate", value=2.0))
    distribution = ScenarioDistribution(base=replace(BASE, events=events), num_servers=Choice((1, 2)))
    kept = {distribution.draw(seed).num_servers: distribution.draw(seed).events for seed in range(30)}
    assert kept == {1: events[1:], 2: events}
    assert replace(distribution, num_servers=1).reference.events == events[1:]


# Refused


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Uniform(2, 1), "Uniform.high must be at least low"),
        (lambda: Uniform(-1e308, 1e308), "finite distance"),
        (lambda: Uniform("a", 1), "Uniform.low must be a finite number"),
        (lambda: Uniform(math.nan, 1), "Uniform.low must be a finite number"),
        (lambda: LogUniform(0, 1), "LogUniform.low must be a finite number above 0"),
        (lambda: Choice(()), "at least one value"),
        (lambda: Choice((1, 2), (0.5, 0.6)), "2 numbers that sum to 1"),
        (lambda: Choice((1, 2), (1.0,)), "2 numbers that sum to 1"),
        (lambda: ServerDistribution(cores=Uniform(0, 4)), "Server.cores must be a whole number of at least 1, got 0"),
        (lambda: ServerDistribution(cores=Uniform(1.5, 4)), "Server.cores must be a whole number"),
        (lambda: ServerDistribution(cores=Choice((1, 2.5, 4))), "Server.cores must be a whole number"),
        (lambda: ServerDistribution(speed=Uniform(0.0, 1.0)), "Server.speed"),
        (lambda: ServerDistribution(speed=Choice((1.0, "fast"))), "Server.speed"),
        (lambda: Variant(kind="poison"), "Did you mean 'poisson'"),
        (lambda: Variant(kind="lognormal", parameters={"vc": 1.0}), "unknown key 'vc'"),
        (lambda: Variant(kind="lognormal", parameters={"cv": Uniform(0.0, 1.0)}), "Lognormal.cv"),
        (
            lambda: Variant(
                kind="bounded_pareto", parameters={"minimum": Uniform(0.1, 5.0), "maximum": Uniform(4.0, 9.0)}
            ),
            "BoundedPareto.maximum must be above minimum",
        ),
        (lambda: RandomEvents(kind="up", every=1.0, duration=1.0), "unknown kind of random event 'up'"),
        (lambda: RandomEvents(kind="down", every=0.0, duration=1.0), "RandomEvents.every"),
        (lambda: RandomEvents(kind="down", every=1.0, duration=1.0, value=2.0), "takes no value"),
        (lambda: RandomEvents(kind="speed", every=1.0, duration=1.0), "needs a value"),
        (lambda: RandomEvents(kind="speed", every=1.0, duration=1.0, value=Uniform(0.0, 1.0)), "Event.value"),
        (lambda: SamplingDistribution(probability=Uniform(0.5, 1.5)), "Sampling.probability"),
        (lambda: SamplingDistribution(algorithm=Choice(("overwrite", "reservoir"))), "unknown sampling algorithm"),
        (
            lambda: ScenarioDistribution(base=BASE, num_servers=Uniform(0, 3)),
            "num_servers must be a whole number from 1 to 65536, got 0",
        ),
        (
            lambda: ScenarioDistribution(base=BASE, num_servers=Uniform(1, 10**6)),
            "num_servers must be a whole number from 1 to 65536, got 1000000",
        ),
        (lambda: ScenarioDistribution(base=BASE, load=0.5, rate=3.0), "takes rate or load, not both"),
        (lambda: ScenarioDistribution(base=BASE, load=Uniform(0.0, 1.0)), "load must be a finite number above 0"),
        (lambda: ScenarioDistribution(base=BASE, load=Choice(("high",))), "load must be a finite number"),
        (lambda: ScenarioDistribution(base=BASE, dispatch=Choice(("sed", "least"))), "unknown dispatch rule 'least'"),
        (lambda: ScenarioDistribution(base=BASE, dispatch=3), "dispatch must be text"),
        (lambda: ScenarioDistribution(base=BASE, demand=[Variant(kind="poisson")]), "unknown kind of demand"),
        (lambda: ScenarioDistribution(base=BASE, demand=[Exponential()]), "must be a Variant"),
        (
            lambda: ScenarioDistribution(base=BASE, demand=[Variant(kind="exponential", probability=0.5)]),
            "probabilities of demand must sum to 1",
        ),
        (
            lambda: ScenarioDistribution(
                base=BASE,
                arrivals=[Variant(kind="poisson", probability=1.0), Variant(kind="on_off")],
            ),
            "or none of them be given",
        ),
        (
            lambda: ScenarioDistribution(base=named_scenario("sample-trace"), demand=[Variant(kind="exponential")]),
            "a trace replaces arrivals and demand",
        ),
        (
            lambda: ScenarioDistribution(base=BASE, server=ServerDistribution(speed=Uniform(1e307, 1e308))),
            "arrival rate must be finite|capacity of the cluster must be finite",
        ),
        (
            lambda: ScenarioDistribution(
                base=replace(BASE, workload=Workload(trace=Trace(times=np.arange(3.0), demands=np.zeros(3)))), load=0.5
            ),
            "every demand of the trace is 0",
        ),
        (
            lambda: ScenarioDistribution(
                base=replace(BASE, servers=(Server(speed=1e308),), workload=Workload(load=1e-9)),
                num_servers=9,
                server=ServerDistribution(speed=1.0),
            ),
            "arrival rate, rate events included, must be at most",
        ),
        (
            lambda: ScenarioDistribution(
                base=BASE, events=[RandomEvents(kind="down", every=Uniform(1e-6, 1.0), duration=1e-6)]
            ),
            "at most 100,000 are allowed",
        ),
        (
            lambda: ScenarioDistribution(base=BASE, events=[RandomEvents(kind="down", every=1e-6, duration=1e3)]),
            "drawn 7.2e\\+09 times in 3600 s.*raise `every`",
        ),
        (
            lambda: ScenarioDistribution(
                base=BASE, events=[RandomEvents(kind="rate", every=100.0, duration=10.0, value=Uniform(1.0, 1e12))]
            ),
            "rate events included, must be at most 1e\\+08",
        ),
        (
            lambda: ScenarioDistribution(base=BASE, rate=LogUniform(1e-9, 1.0), arrivals=[Variant(kind="on_off")]),
            "change their rate 4e\\+08 times from one flow to the next",
        ),
    ],
)
def test_what_could_draw_nonsense_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(LbgymError, match=message):
        make()


@given(st.dictionaries(st.sampled_from([f.name for f in fields(ScenarioDistribution)]), junk))
def test_junk_is_refused_in_our_own_words(values: dict[str, Any]) -> None:
    try:
        distribution = ScenarioDistribution(**({"base": BASE} | values))
    except LbgymError:
        return
    check_draw(distribution, distribution.draw(0))


@given(st.sampled_from((Uniform, LogUniform, Choice)), junk, junk)
def test_junk_ranges_are_refused_in_our_own_words(cls: type, first: Any, second: Any) -> None:
    try:
        made = cls(first, second)
    except LbgymError:
        return
    assert made == cls(*(getattr(made, item.name) for item in fields(cls)))


def test_changes() -> None:
    distribution = named_distribution("random-clusters")
    assert distribution.with_changes(rate=50.0).draw(1).rate == 50.0
    assert distribution.with_changes(load=0.3).draw(1).load == pytest.approx(0.3)
    changed = distribution.with_changes(balancers=3, name="mine", num_servers=2)
    assert (changed.balancers, changed.name, changed.max_servers) == (3, "mine", 2)
    assert changed.draw(1).balancers == 3
    with pytest.raises(UnknownNameError, match="Did you mean 'num_servers'"):
        distribution.with_changes(num_server=3)


def test_a_fixed_scenario_is_asked_for_where_there_is_one_cluster() -> None:
    assert fixed_scenario("uniform") == named_scenario("uniform")
    with pytest.raises(ScenarioError, match="'random-clusters' is a distribution"):
        fixed_scenario("random-clusters")


# Files

HEAD = "[[servers]]\ncores = 2\n[workload]\nload = 0.5\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("randomize = 3", r"\[randomize\] must be a table"),
        ("[randomize]\nloads = 0.3", r"unknown key 'loads' in F, \[randomize\]. Did you mean 'load'"),
        ("[randomize]\nbalancers = 3", "balancers cannot vary"),
        ("[randomize.sampling]\ncapacity = 3", r"F, \[randomize.sampling\]: capacity cannot vary"),
        ("[randomize]\nload = { low = 1, high = 2 }", r"\[randomize\] load: 'kind' is missing"),
        ('[randomize]\nload = { kind = "uniformly", low = 1, high = 2 }', "Did you mean 'uniform'"),
        ('[randomize]\nload = { kind = "uniform", low = 1 }', r"F, \[randomize\] load: 'high' is missing"),
        ('[randomize]\nload = { kind = "uniform", low = 1, hihg = 2 }', "unknown key 'hihg'"),
        ('[randomize]\nload = { kind = "uniform", low = 3, high = 2 }', r"F, \[randomize\] load: Uniform.high"),
        ("[randomize]\nload = [1, 2]", r"F, \[randomize\]: .*load must be a finite number"),
        ('[randomize]\nnum_servers = "many"', r"F, \[randomize\]: .*num_servers must be a whole number"),
        ("[randomize.server]\nspeeds = 1.0", r"unknown key 'speeds' in F, \[randomize.server\]"),
        ("[randomize.server]\ncores = 0.5", r"F, \[randomize.server\]: Server.cores"),
        ("[randomize.demand]\nkind = 'exponential'", r"demand must be an array of tables, \[\[randomize.demand\]\]"),
        ("[[randomize.demand]]\nmean = 0.1", r"\[\[randomize.demand\]\] number 1: 'kind' must be one of"),
        ("[[randomize.demand]]\nkind = 'expo'", "unknown kind of demand 'expo'"),
        ("[[randomize.demand]]\nkind = 'exponential'\nmeen = 2", "Did you mean 'mean'"),
        (
            "[[randomize.demand]]\nkind = 'exponential'\nmean = -2",
            r"\[\[randomize.demand\]\] number 1: Exponential.mean",
        ),
        ("[[randomize.events]]\nkind = 'down'\nevery = 3", "number 1: 'duration' is missing"),
        ("[[randomize.events]]\nkind = 'sown'\nevery = 3\nduration = 1", "Did you mean 'down'"),
        ("[randomize]\nload = 1.0\nrate = 2.0", "rate or load, not both"),
    ],
)
def test_errors_name_file_and_key(text: str, message: str) -> None:
    text = text + "\n" + HEAD if text.startswith("randomize") else HEAD + text
    with pytest.raises(LbgymError, match=message) as caught:
        from_toml(text, source="F")
    assert "F" in str(caught.value)


def test_a_file_of_a_distribution(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        HEAD
        + """
        [randomize]
        num_servers = { kind = "uniform", low = 2, high = 5 }
        [randomize.server]
        workers = 8
        speed = { kind = "choice", values = [0.5, 1.0] }
        [[randomize.demand]]
        kind = "hyperexponential"
        means = { kind = "choice", values = [[0.1, 0.2], [0.3, 0.4]] }
        """,
        encoding="utf-8",
    )
    read = load_scenario(file)
    expected = ScenarioDistribution(
        base=Scenario(name="mine", servers=(Server(cores=2),), workload=Workload(load=0.5)),
        num_servers=Uniform(2, 5),
        server=ServerDistribution(workers=8, speed=Choice((0.5, 1.0))),
        demand=(Variant(kind="hyperexponential", parameters={"means": Choice(((0.1, 0.2), (0.3, 0.4)))}),),
    )
    assert read == expected
    demand = expected.draw(1).workload.demand
    assert isinstance(demand, Hyperexponential) and demand.means in ((0.1, 0.2), (0.3, 0.4))


def test_a_distribution_as_the_base_of_another() -> None:
    base = named_distribution("random-clusters")
    read = from_toml(
        'base = "random-clusters"\nname = "mine"\nduration = 9.0\n[randomize]\nrate = 50.0\n'
        "[randomize.server]\nworkers = 4\n[randomize.sampling]\nprobability = 0.5"
    )
    assert isinstance(read, ScenarioDistribution)
    assert (read.rate, read.load, read.duration) == (50.0, None, 9.0)
    assert read.server == replace(base.server, workers=4) and read.events == base.events
    assert isinstance(read.demand[2].sample(np.random.default_rng(0)), BoundedPareto)
    assert from_toml('base = "random-marllb"\nname = "random-marllb"\ndescription = "x"') == replace(
        named_distribution("random-marllb"), base=replace(named_distribution("random-marllb").base, description="x")
    )
    with pytest.raises(UnknownNameError, match="Did you mean 'random-clusters'"):
        from_toml('base = "random-cluster"')
