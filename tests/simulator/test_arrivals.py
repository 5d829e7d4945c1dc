"""Arrival processes and demand laws against what they say they are."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from lbgym.errors import ScenarioError
from lbgym.scenarios import (
    BoundedPareto,
    Deterministic,
    Empirical,
    Event,
    Exponential,
    Hyperexponential,
    Lognormal,
    ModulatedPoisson,
    OnOff,
    Poisson,
    Scenario,
    Server,
    Sinusoidal,
    Trace,
    Workload,
)

from .running import INSTANT, run_flows, trace_scenario

#: A fixed seed either passes or not; this is what an unlucky one is allowed.
CHANCE = 1e-4


def arrivals(shape, rate: float, duration: float, *events: Event, seed: int = 1) -> np.ndarray:
    workload = Workload(arrivals=shape, demand=INSTANT, rate=rate)
    scenario = Scenario(name="arrivals", servers=(Server(),), workload=workload, events=events)
    _, flows = run_flows(scenario, duration, seed=seed, reservoirs=False, service=False)
    assert (np.diff(flows["arrival"]) >= 0).all()
    return flows["arrival"]


def demands(law, count: int = 20_000, seed: int = 1) -> np.ndarray:
    workload = Workload(demand=law, rate=1.0)
    scenario = Scenario(name="demands", servers=(Server(speed=1e6),), workload=workload)
    _, flows = run_flows(scenario, count * 1.0, seed=seed, reservoirs=False, service=False)
    return flows["demand"]


def test_poisson():
    rate, duration = 40.0, 500.0
    times = arrivals(Poisson(), rate, duration)
    gaps = np.diff(times, prepend=0.0)
    assert stats.kstest(gaps, stats.expon(scale=1 / rate).cdf).pvalue > CHANCE
    assert stats.poisson(rate * duration).sf(len(times)) > CHANCE
    assert stats.poisson(rate * duration).cdf(len(times)) > CHANCE
    # Counts of disjoint intervals are independent Poisson variables: variance over mean is 1.
    counts = np.histogram(times, bins=int(duration), range=(0, duration))[0]
    dispersion = (len(counts) - 1) * counts.var(ddof=1) / counts.mean()
    assert CHANCE < stats.chi2(len(counts) - 1).cdf(dispersion) < 1 - CHANCE


@pytest.mark.parametrize("amplitude", [0.3, 1.0])
def test_sinusoid_follows_its_intensity(amplitude):
    rate, period, phase = 50.0, 8.0, 1.0
    times = arrivals(Sinusoidal(amplitude=amplitude, period=period, phase=phase), rate, 100 * period)
    bins = 20
    edges = np.linspace(0, period, bins + 1)
    omega = 2 * math.pi / period
    total = rate * (edges + amplitude / omega * (math.cos(phase) - np.cos(omega * edges + phase)))
    expected = 100 * np.diff(total)
    observed = np.histogram(np.mod(times, period), edges)[0]
    # Poisson counts, the total included: one degree of freedom per bin.
    statistic = ((observed - expected) ** 2 / expected).sum()
    assert CHANCE < stats.chi2(bins).cdf(statistic) < 1 - CHANCE


@pytest.mark.parametrize("fixed", [False, True])
def test_modulated_poisson_keeps_its_mean_rate(fixed):
    shape = ModulatedPoisson(
        levels=(0.2, 1.0, 4.0),
        sojourns=(1.0, 2.0, 0.5),
        transitions=((0.0, 0.5, 0.5), (0.7, 0.0, 0.3), (0.5, 0.5, 0.0)),
        fixed_sojourns=fixed,
    )
    rate, duration, batches = 20.0, 200.0, 40
    counts = np.array([len(arrivals(shape, rate, duration, seed=seed)) for seed in range(batches)])
    t = (counts.mean() - rate * duration) / (counts.std(ddof=1) / math.sqrt(batches))
    assert abs(t) < stats.t(batches - 1).isf(CHANCE)
    # More variable than Poisson by far.
    assert counts.var(ddof=1) > 1.5 * counts.mean()


def test_modulated_poisson_is_stationary_from_the_start():
    """The first state is drawn from the stationary law: the first second is as busy as any other."""
    shape = ModulatedPoisson(levels=(0.1, 5.0), sojourns=(6.0, 2.0))
    rate, runs = 10.0, 600
    counts = np.array([len(arrivals(shape, rate, 1.0, seed=seed)) for seed in range(runs)])
    t = (counts.mean() - rate) / (counts.std(ddof=1) / math.sqrt(runs))
    assert abs(t) < 4


@pytest.mark.parametrize("stays", [((1.0, 0.0), (0.0, 1.0)), ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.3, 0.3, 0.4))])
def test_states_that_never_meet_are_refused(stays):
    """A start in a closed group of level 0 would wait for a flow for ever."""
    levels = (0.0, 1.0, 2.0)[: len(stays)]
    with pytest.raises(ScenarioError, match="every state leads to"):
        ModulatedPoisson(levels=levels, sojourns=(1.0,) * len(levels), transitions=stays)


def test_a_state_that_is_left_for_good():
    shape = ModulatedPoisson(levels=(0.0, 1.0), sojourns=(5.0, 1.0), transitions=((0.5, 0.5), (0.0, 1.0)))
    assert len(arrivals(shape, 10.0, 1000.0)) == pytest.approx(10_000, rel=0.05)


def test_levels_show_in_the_gaps():
    """Two far levels with long visits: gaps are a mixture of two exponentials, weighted by flows."""
    levels, sojourns, rate = (0.2, 2.0), (50.0, 50.0), 10.0
    times = arrivals(ModulatedPoisson(levels=levels, sojourns=sojourns), rate, 20_000.0)
    rates = np.array(levels) * rate / 1.1
    share = rates / rates.sum()

    def law(x):
        return 1 - sum(p * np.exp(-r * x) for p, r in zip(share, rates, strict=True))

    # How long each level lasted is random too, so the gaps are compared loosely.
    assert stats.kstest(np.diff(times), law).statistic < 0.03


def test_bursts_are_on_and_off():
    on, off, rate = 1.0, 4.0, 10.0
    times = arrivals(OnOff(on=on, off=off), rate, 500.0)
    # All flows lie in an arc of length `on` of the cycle, evenly, whatever its start.
    phase = np.sort(np.mod(times, on + off))
    gaps = np.diff(np.append(phase, phase[0] + on + off))
    assert gaps.max() > off
    start = phase[(int(np.argmax(gaps)) + 1) % len(phase)]
    inside = np.mod(phase - start, on + off)
    assert inside.max() < on
    assert stats.kstest(inside, stats.uniform(0, on).cdf).pvalue > CHANCE
    assert abs(len(times) - rate * 500.0) < 4 * math.sqrt(rate * 500.0)


def test_bursts_start_at_a_random_point_of_the_cycle():
    firsts = [arrivals(OnOff(on=1.0, off=4.0), 40.0, 20.0, seed=seed)[0] for seed in range(200)]
    # One cycle in five begins inside a burst, and the rest waits up to four seconds, uniformly.
    waited = np.array([first for first in firsts if first > 0.3])
    assert 0.6 < len(waited) / len(firsts) < 0.9
    assert waited.max() > 3.5
    assert stats.kstest(waited, stats.uniform(0.3, 3.7).cdf).pvalue > CHANCE


def test_an_off_level_above_zero():
    on, off, level, rate = 1.0, 3.0, 0.25, 20.0
    times = arrivals(OnOff(on=on, off=off, off_level=level), rate, 2000.0)
    high = rate * (on + off) / (on + level * off)
    phase = np.histogram(np.mod(times, on + off), bins=40, range=(0, on + off))[0] / 2000.0 * 40
    assert np.median(np.sort(phase)[-8:]) == pytest.approx(high, rel=0.1)
    assert np.median(phase) == pytest.approx(level * high, rel=0.1)


def test_random_bursts_keep_their_mean_rate():
    rate, duration, runs = 10.0, 300.0, 40
    counts = np.array([len(arrivals(OnOff(random=True), rate, duration, seed=seed)) for seed in range(runs)])
    t = (counts.mean() - rate * duration) / (counts.std(ddof=1) / math.sqrt(runs))
    assert abs(t) < 4
    assert counts.var(ddof=1) > 2 * counts.mean()


@pytest.mark.parametrize(
    "shape",
    [Poisson(), Sinusoidal(amplitude=0.8, period=1.0), OnOff(on=0.2, off=0.2), ModulatedPoisson(sojourns=(0.3, 0.2))],
    ids=lambda shape: type(shape).__name__,
)
def test_rate_events(shape):
    """Twice the rate, none, and the plain rate again."""
    rate, part = 100.0, 50.0
    events = (
        Event(time=part, kind="rate", value=2.0),
        Event(time=2 * part, kind="rate", value=0.0),
        Event(time=3 * part, kind="rate", value=1.0),
    )
    counts = np.histogram(arrivals(shape, rate, 4 * part, *events), bins=4, range=(0, 4 * part))[0]
    assert counts[2] == 0
    assert counts[[0, 1, 3]] == pytest.approx(rate * part * np.array([1, 2, 1]), rel=0.12)


@pytest.mark.parametrize(
    "shape", [Poisson(), ModulatedPoisson(), OnOff(), Sinusoidal()], ids=lambda s: type(s).__name__
)
def test_a_rate_of_zero_to_the_end(shape):
    times = arrivals(shape, 50.0, 1e9, Event(time=20.0, kind="rate", value=0.0))
    assert len(times) > 0
    assert times.max() <= 20.0


def bounded_pareto_law(law: BoundedPareto):
    def cdf(x):
        x = np.clip(x, law.minimum, law.maximum)
        return (1 - (law.minimum / x) ** law.alpha) / (1 - (law.minimum / law.maximum) ** law.alpha)

    return cdf


MIXTURE = Hyperexponential(probabilities=(0.6, 0.0, 0.4), means=(0.05, 7.0, 0.5))
LOGNORMAL = Lognormal(mean=0.2, cv=1.7)
_SIGMA = math.sqrt(math.log(1 + LOGNORMAL.cv**2))
LAWS = {
    "exponential": (Exponential(mean=0.3), stats.expon(scale=0.3).cdf),
    "lognormal": (LOGNORMAL, stats.lognorm(_SIGMA, scale=0.2 * math.exp(-(_SIGMA**2) / 2)).cdf),
    "Pareto 1.5": (BoundedPareto(), bounded_pareto_law(BoundedPareto())),
    "Pareto 1": (BoundedPareto(alpha=1.0), bounded_pareto_law(BoundedPareto(alpha=1.0))),
    "Pareto 0.5": (BoundedPareto(alpha=0.5), bounded_pareto_law(BoundedPareto(alpha=0.5))),
    "hyperexponential": (MIXTURE, lambda x: 1 - 0.6 * np.exp(-x / 0.05) - 0.4 * np.exp(-x / 0.5)),
}


@pytest.mark.parametrize("name", LAWS)
def test_demand_law(name):
    law, cdf = LAWS[name]
    drawn = demands(law)
    assert (drawn > 0).all()
    assert stats.kstest(drawn, cdf).pvalue > CHANCE
    # The stated mean is the law's mean, by its own distribution function.
    x = np.linspace(0, drawn.max() * 30, 2_000_001)
    assert np.trapezoid(1 - cdf(x), x) == pytest.approx(law.mean, rel=1e-3)


def test_deterministic_demand():
    np.testing.assert_array_equal(demands(Deterministic(mean=0.37), 100), 0.37)


def test_empirical_demand():
    values = (0.1, 0.2, 0.2, 0.7)
    drawn = demands(Empirical(values=values))
    observed = [(drawn == value).sum() for value in (0.1, 0.2, 0.7)]
    assert sum(observed) == len(drawn)
    assert stats.chisquare(observed, len(drawn) * np.array([0.25, 0.5, 0.25])).pvalue > CHANCE


def test_demands_are_independent_of_arrivals():
    workload = Workload(demand=Exponential(mean=1.0), rate=10.0)
    scenario = Scenario(name="both", servers=(Server(cores=64, speed=100.0),), workload=workload)
    _, flows = run_flows(scenario, 2000.0)
    gaps = np.diff(flows["arrival"])
    for shifted in (flows["demand"][1:], flows["demand"][:-1]):
        assert stats.spearmanr(gaps, shifted).pvalue > CHANCE
    assert stats.spearmanr(flows["demand"][1:], flows["demand"][:-1]).pvalue > CHANCE


def test_seeds_give_unrelated_flows():
    one, two = (arrivals(Poisson(), 50.0, 200.0, seed=seed) for seed in (1, 2))
    gaps = [np.diff(times)[:9000] for times in (one, two)]
    assert stats.spearmanr(*gaps).pvalue > CHANCE
    far = arrivals(Poisson(), 50.0, 200.0, seed=1 + 2**63)
    assert not np.array_equal(one[:10], far[:10])


# Traces

TIMES = np.array([0.0, 0.1, 0.1, 0.35, 1.0, 1.7])
DEMANDS = np.array([0.01, 0.02, 0.0, 0.03, 0.04, 0.05])


def test_trace_times_are_exact():
    scenario = trace_scenario(TIMES, DEMANDS, Server(cores=64))
    _, flows = run_flows(scenario, 100.0)
    np.testing.assert_array_equal(flows["arrival"], TIMES)
    np.testing.assert_array_equal(flows["demand"], DEMANDS)
    np.testing.assert_array_equal(flows["fct"] >= 0, True)


def test_a_trace_may_begin_late():
    _, flows = run_flows(trace_scenario(TIMES + 5.0, DEMANDS, Server(cores=64)), 100.0)
    np.testing.assert_array_equal(flows["arrival"], TIMES + 5.0)


def test_trace_repeats_one_gap_after_its_end():
    scenario = trace_scenario(TIMES, DEMANDS, Server(cores=64), repeat=True)
    _, flows = run_flows(scenario, 1000.0)
    period = scenario.workload.trace.period
    assert period == pytest.approx(1.7 + 1.7 / 5)
    assert len(flows["arrival"]) > 450 * 6
    rounds = np.arange(len(flows["arrival"])) // 6
    expected = TIMES[np.arange(len(rounds)) % 6] + rounds * period
    np.testing.assert_allclose(flows["arrival"], expected, rtol=1e-12)
    np.testing.assert_array_equal(flows["demand"], DEMANDS[np.arange(len(rounds)) % 6])


def test_a_rate_or_load_sets_the_speed_of_the_replay():
    trace = Trace(times=TIMES, demands=DEMANDS, repeat=False)
    for workload, factor in (
        (Workload(trace=trace, rate=3 * trace.rate), 3.0),
        (Workload(trace=trace, load=0.5), 0.5 / (trace.rate * trace.mean)),
    ):
        scenario = Scenario(name="trace", servers=(Server(),), workload=workload)
        _, flows = run_flows(scenario, 1000.0)
        np.testing.assert_allclose(flows["arrival"], TIMES / factor, rtol=1e-12)
        np.testing.assert_array_equal(flows["demand"], DEMANDS)


def test_random_start_goes_round_the_trace():
    trace = Trace(times=TIMES, demands=DEMANDS, random_start=True)
    scenario = Scenario(name="trace", servers=(Server(cores=64),), workload=Workload(trace=trace))
    started = []
    for seed in range(60):
        _, flows = run_flows(scenario, 50.0, seed=seed)
        first = int(np.flatnonzero(flows["demand"][0] == DEMANDS)[0])
        started.append(first)
        n = len(flows["demand"])
        np.testing.assert_array_equal(flows["demand"], DEMANDS[(first + np.arange(n)) % 6])
        expected = TIMES[(first + np.arange(n)) % 6] + (first + np.arange(n)) // 6 * trace.period - TIMES[first]
        np.testing.assert_allclose(flows["arrival"], expected, atol=1e-9)
    assert set(started) == set(range(6))


def test_rate_events_change_the_speed_of_the_replay():
    events = (Event(time=0.2, kind="rate", value=0.0), Event(time=1.2, kind="rate", value=2.0))
    _, flows = run_flows(trace_scenario(TIMES, DEMANDS, Server(cores=64), events=events), 100.0)
    # Held for a second after 0.2 s, then twice as fast.
    expected = np.where(TIMES <= 0.2, TIMES, 1.2 + (TIMES - 0.2) / 2)
    np.testing.assert_allclose(flows["arrival"], expected, rtol=1e-12)


def test_a_trace_of_one_flow():
    _, flows = run_flows(trace_scenario([0.0], [0.5], Server(), repeat=True), 10.25)
    np.testing.assert_allclose(flows["arrival"], np.arange(10))
