"""Every class refuses what it cannot mean, and its means are those of its law."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import integrate, linalg, stats

from lbgym.errors import LbgymError, ScenarioError, UnknownNameError
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
    Sampling,
    Scenario,
    Server,
    Sinusoidal,
    Trace,
    Workload,
    servers_of,
)

from .strategies import bounded, junk, modulated, scenarios

CLASSES = (
    Server,
    Deterministic,
    Exponential,
    Lognormal,
    BoundedPareto,
    Hyperexponential,
    Empirical,
    Poisson,
    ModulatedPoisson,
    OnOff,
    Sinusoidal,
    Trace,
    Workload,
    Event,
    Sampling,
    Scenario,
)
WORKLOAD = Workload(load=0.5)


def two_servers(**changes: object) -> Scenario:
    return Scenario(**({"name": "two", "servers": (Server(), Server(cores=3)), "workload": WORKLOAD} | changes))


# Means


@given(bounded)
@example(BoundedPareto(alpha=1.0, minimum=0.01, maximum=10.0))
@example(BoundedPareto(alpha=1.0 + 1e-13, minimum=0.01, maximum=10.0))
@example(BoundedPareto(alpha=0.5, minimum=0.01, maximum=10.0))
@example(BoundedPareto(alpha=50.0, minimum=0.01, maximum=1e4))
def test_bounded_pareto_mean_is_the_integral_of_its_quantiles(demand: BoundedPareto) -> None:
    a, low, ratio = demand.alpha, demand.minimum, demand.minimum / demand.maximum
    # E[X] = low + integral of P(X > x), over log x
    survival = lambda y: (math.exp(-a * y) - ratio**a) / (1 - ratio**a) * math.exp(y)  # noqa: E731
    integral = integrate.quad(survival, 0, -math.log(ratio), limit=500, epsabs=0, epsrel=1e-10)[0]
    assert demand.mean == pytest.approx(low * (1 + integral), rel=1e-6)


def test_bounded_pareto_mean_stays_finite_for_an_index_whose_powers_overflow() -> None:
    assert BoundedPareto(alpha=2000.0, minimum=0.01, maximum=10.0).mean == pytest.approx(0.01 * 2000 / 1999)


def test_hyperexponential_and_empirical_means() -> None:
    demand = Hyperexponential(probabilities=(0.25, 0.75), means=(4.0, 2.0))
    density = lambda x: 0.25 * stats.expon.pdf(x, scale=4) + 0.75 * stats.expon.pdf(x, scale=2)  # noqa: E731
    assert demand.mean == pytest.approx(integrate.quad(lambda x: x * density(x), 0, np.inf)[0])
    assert Empirical(values=(1.0, 2.0, 6.0)).mean == 3.0


def test_the_mean_of_the_plain_laws_is_the_one_given() -> None:
    for law in (Deterministic, Exponential, Lognormal):
        assert law(mean=0.3).mean == 0.3


# Arrivals


@given(modulated())
def test_stationary_law_is_that_of_the_generator_of_the_chain(arrivals: ModulatedPoisson) -> None:
    leave = 1 / np.array(arrivals.sojourns)
    generator = leave[:, None] * (np.array(arrivals.transitions) - np.eye(len(leave)))
    expected = linalg.null_space(generator.T)[:, 0]
    np.testing.assert_allclose(arrivals.stationary(), expected / expected.sum(), rtol=1e-7)


def test_states_in_turn_are_held_in_proportion_to_their_sojourns() -> None:
    np.testing.assert_allclose(
        ModulatedPoisson(levels=(1, 2, 3), sojourns=(1, 2, 5)).stationary(), [1 / 8, 2 / 8, 5 / 8]
    )


def test_transient_states_have_no_share() -> None:
    arrivals = ModulatedPoisson(levels=(5, 1, 2), sojourns=(9, 1, 1), transitions=((0, 0.5, 0.5), (0, 0, 1), (0, 1, 0)))
    np.testing.assert_array_equal(arrivals.stationary()[0], 0.0)
    np.testing.assert_allclose(arrivals.stationary()[1:], 0.5)


def test_a_chain_that_ends_in_silence_is_refused() -> None:
    with pytest.raises(ScenarioError, match=r"levels must have a finite long-run mean above 0, got 0"):
        ModulatedPoisson(levels=(0.0, 1.0), sojourns=(1.0, 1.0), transitions=((1, 0), (1, 0)))


# Traces


def test_a_trace_copies_its_arrays_and_protects_the_copy() -> None:
    times, demands = np.array([0.0, 1.0, 3.0]), np.array([1.0, 2.0, 3.0])
    trace = Trace(times, demands)
    times[1] = 2.0
    assert trace.times[1] == 1.0
    with pytest.raises(ValueError, match="read-only"):
        trace.times[0] = 5.0


def test_a_trace_repeats_one_mean_gap_after_its_last_flow() -> None:
    trace = Trace(np.array([0.0, 1.0, 3.0]), np.array([1.0, 2.0, 3.0]))
    assert trace.period == 4.5
    assert trace.rate == pytest.approx(3 / 4.5)
    assert trace.mean == 2.0
    assert Trace(np.array([0.0]), np.array([1.0])).period == 1.0


def test_scaling_a_trace() -> None:
    trace = Trace(np.array([0.0, 1.0, 3.0]), np.array([1.0, 2.0, 3.0]), repeat=False).scaled(speedup=2, scale=0.5)
    np.testing.assert_array_equal(trace.times, [0, 0.5, 1.5])
    np.testing.assert_array_equal(trace.demands, [0.5, 1, 1.5])
    assert not trace.repeat
    with pytest.raises(ScenarioError, match=r"trace speedup must be a finite number above 0, got 0"):
        trace.scaled(speedup=0)


@pytest.mark.parametrize(
    ("times", "demands", "sentence"),
    [
        ([], [], r"trace x: times and demands must be equally long and not empty, got shapes \(0,\) and \(0,\)"),
        ([0, 1], [1], r"equally long and not empty, got shapes \(2,\) and \(1,\)"),
        ([0, -1], [1, 1], r"times must be from 0 to 1e\+15, got -1.0 for flow 1"),
        ([0, 1], [1, np.nan], r"demands must be from 0 to 1e\+15, got nan for flow 1"),
        ([0, 2, 1], [1, 1, 1], r"times must not decrease; flow 2 is before flow 1"),
        ([10**400], [1], r"trace x: times and demands must be arrays of numbers: int too large to convert"),
        (["a"], [1], r"trace x: times and demands must be arrays of numbers: could not convert"),
        ([[0]], [[1]], r"got shapes \(1, 1\) and \(1, 1\)"),
    ],
)
def test_wrong_arrays_of_a_trace(times: list, demands: list, sentence: str) -> None:
    with pytest.raises(ScenarioError, match=sentence):
        Trace(times, demands, source="x")


# Scenario


def test_rate_and_load_follow_from_each_other() -> None:
    scenario = two_servers(workload=Workload(demand=Exponential(mean=0.5), load=0.75))
    assert scenario.capacity == 4.0
    assert scenario.rate == pytest.approx(6.0)
    assert two_servers(workload=Workload(demand=Exponential(mean=0.5), rate=6)).load == pytest.approx(0.75)


def test_capacity_counts_speed_and_the_limit_of_workers() -> None:
    assert Server(cores=4, speed=1.5).capacity == 6.0
    assert Server(cores=4, speed=1.5, workers=2).capacity == 3.0
    assert two_servers().core_weights == (1.0, 3.0)


def test_a_trace_has_its_own_rate_until_one_is_given() -> None:
    trace = Trace(np.array([0.0, 1.0, 2.0]), np.array([1.0, 2.0, 3.0]))
    assert two_servers(workload=Workload(trace=trace)).rate == pytest.approx(1.0)
    assert two_servers(workload=Workload(trace=trace)).load == pytest.approx(0.5)
    assert two_servers(workload=Workload(trace=trace, load=0.9)).rate == pytest.approx(1.8)
    assert two_servers(workload=Workload(trace=trace, rate=7)).rate == 7.0


def test_events_are_put_in_order_of_time() -> None:
    late, early = Event(time=5, kind="up", server=0), Event(time=1, kind="down", server=0)
    assert two_servers(events=[late, early]).events == (early, late)


def test_with_changes() -> None:
    scenario = two_servers()
    changed = scenario.with_changes(rate=9, dispatch="lsq")
    assert (changed.workload.rate, changed.workload.load, changed.dispatch) == (9.0, None, "lsq")
    assert changed.with_changes(load=0.2).workload == replace(WORKLOAD, load=0.2)
    assert scenario == two_servers()
    with pytest.raises(UnknownNameError, match=r"unknown scenario key 'balancer'.*Did you mean 'balancers'\?"):
        scenario.with_changes(balancer=2)
    with pytest.raises(ScenarioError, match="rate or load, not both"):
        scenario.with_changes(load=0.5, rate=10)


def test_servers_of_groups() -> None:
    assert servers_of((2, Server()), Server(cores=2)) == (Server(), Server(), Server(cores=2))
    with pytest.raises(
        ScenarioError, match=r"count of a group of servers must be a whole number from 0 to 65536, got 10000000000"
    ):
        servers_of((10**10, Server()))


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: Server(cores=0), "Server.cores must be a whole number of at least 1, got 0"),
        (lambda: Server(cores=2.0), "Server.cores must be a whole number of at least 1, got 2.0"),
        (lambda: Server(cores=True), "Server.cores must be a whole number of at least 1, got True"),
        (lambda: Server(workers=2**31), "Server.workers must be a whole number from 1 to 2147483647, got 2147483648"),
        (lambda: Server(speed="fast"), "Server.speed must be a finite number above 0, got 'fast'"),
        (lambda: Server(speed=math.inf), "Server.speed must be a finite number above 0, got inf"),
        (lambda: Server(speed=10**400), r"Server.speed must be a finite number above 0, got 10{99}\.\.\. \(401 char"),
        (lambda: Exponential(mean=-1), "Exponential.mean must be a finite number above 0, got -1"),
        (lambda: Lognormal(cv=0), "Lognormal.cv must be a finite number above 0 and at most 1e"),
        (lambda: BoundedPareto(minimum=2, maximum=1), r"maximum must be above minimum \(2\) .* got 1"),
        (lambda: Hyperexponential(probabilities=0.5), "probabilities must be a list of numbers, got 0.5"),
        (lambda: Hyperexponential(probabilities="ab"), "probabilities must be a list of numbers, got 'ab'"),
        (lambda: Hyperexponential(probabilities=(1,)), "as many probabilities as means .* got 1 and 2"),
        (lambda: Hyperexponential(probabilities=(0.5, 0.4)), "probabilities must sum to 1, got 0.9"),
        (lambda: Hyperexponential(means=(1, 0)), r"Hyperexponential.means\[1\] must be a finite number above 0, got 0"),
        (lambda: Empirical(values=(0, 0)), "Empirical.values needs at least one value above 0"),
        (lambda: ModulatedPoisson(levels=(1,)), "at least two levels.* got 1 levels and 2 sojourns"),
        (lambda: ModulatedPoisson(transitions=((1, 0),)), "transitions must be 2 rows of 2 probabilities"),
        (lambda: ModulatedPoisson(transitions=3), "transitions must be a list of rows of probabilities, got 3"),
        (lambda: ModulatedPoisson(fixed_sojourns=1), "fixed_sojourns must be true or false, got 1"),
        (lambda: OnOff(off_level=1.5), "OnOff.off_level must be a finite number from 0 to 1, got 1.5"),
        (lambda: OnOff(random="yes"), "OnOff.random must be true or false, got 'yes'"),
        (lambda: Sinusoidal(phase=math.nan), "Sinusoidal.phase must be a finite number, got nan"),
        (lambda: Workload(), "needs rate .*, load .* or a trace"),
        (lambda: Workload(rate=1, load=1), "rate or load, not both; got rate=1 and load=1"),
        (lambda: Workload(arrivals="poisson", load=1), r"Workload.arrivals must be arrivals such as Poisson\(\)"),
        (lambda: Workload(demand=0.1, load=1), r"Workload.demand must be a demand such as Exponential.*got 0.1"),
        (lambda: Workload(trace="x.csv"), "Workload.trace must be a Trace or None, got 'x.csv'"),
        (lambda: Event(time=-1, kind="up", server=0), "Event.time must be a finite number of at least 0, got -1"),
        (lambda: Event(time=1, kind="fail", server=0), r"unknown event kind 'fail'\. .*Known: down, drain, rate"),
        (lambda: Event(time=1, kind="rate", server=0, value=1), "a 'rate' event takes no server, got 0"),
        (lambda: Event(time=1, kind="down"), "a 'down' event needs a server, got None"),
        (lambda: Event(time=1, kind="speed", server=0), "a 'speed' event needs a value, got None"),
        (lambda: Event(time=1, kind="up", server=0, value=1), "a 'up' event takes no value, got 1"),
        (lambda: Event(time=1, kind="speed", server=0, value=0), "Event.value must be a finite number above 0, got 0"),
        (lambda: Sampling(capacity=0), "Sampling.capacity must be a whole number from 1 to 32767, got 0"),
        (lambda: Sampling(algorithm="overwite"), "unknown sampling algorithm 'overwite'. Did you mean 'overwrite'"),
        (lambda: two_servers(servers=()), "scenario 'two': servers must be 1 to 65536, got 0"),
        (lambda: two_servers(servers=4), "scenario 'two': servers must be a list of servers, got 4"),
        (lambda: two_servers(servers=[2]), r"scenario 'two': servers\[0\] must be a Server, got 2"),
        (lambda: two_servers(name=3), "Scenario.name must be text, got 3"),
        (lambda: two_servers(workload=0.5), "scenario 'two': workload must be a Workload, got 0.5"),
        (lambda: two_servers(sampling={}), "scenario 'two': sampling must be a Sampling, got {}"),
        (lambda: two_servers(events=[1]), r"scenario 'two': events\[0\] must be an Event, got 1"),
        (lambda: two_servers(dispatch="sd"), "unknown dispatch rule 'sd' in scenario 'two'. Did you mean 'sed'"),
        (lambda: two_servers(balancers=0), "scenario 'two': balancers must be a whole number from 1 to 1024, got 0"),
        (
            lambda: two_servers(events=(Event(time=3, kind="down", server=2),)),
            "event at 3.0 s names server 2; allowed: 0 to 1",
        ),
        (
            lambda: two_servers(servers=(Server(speed=1e308, cores=9),)),
            "scenario 'two': the arrival rate must be finite and above 0, got inf",
        ),
        (
            lambda: two_servers(workload=Workload(trace=Trace(np.zeros(2), np.zeros(2)), load=0.5)),
            "every demand of the trace is 0, so load cannot set its rate",
        ),
    ],
)
def test_what_is_refused_and_how(build: object, sentence: str) -> None:
    with pytest.raises(LbgymError, match=sentence) as caught:
        build()  # type: ignore[operator]
    assert isinstance(caught.value, ValueError)


def test_a_number_python_refuses_to_print_is_still_refused_by_a_sentence() -> None:
    huge = 10**5000
    with pytest.raises(
        ScenarioError, match=r"Server.cores must be a whole number from 1 to 2147483647, got int of too many digits"
    ):
        Server(cores=huge)
    with pytest.raises(ScenarioError, match=r"Event.kind must be text, got int of too many digits"):
        Event(time=1, kind=huge)
    with pytest.raises(ScenarioError, match="not both; got rate=int of too many digits"):
        Workload(rate=huge, load=1)


@given(scenarios())
def test_a_scenario_is_hashable_and_has_a_finite_rate(scenario: Scenario) -> None:
    assert hash(scenario) == hash(replace(scenario))
    assert 0 < scenario.rate < math.inf
    assert scenario.rate * scenario.workload.mean_demand / scenario.capacity == pytest.approx(scenario.load)


@given(st.data())
def test_junk_is_refused_by_an_error_of_ours(data: st.DataObject) -> None:
    cls = data.draw(st.sampled_from(CLASSES))
    names = [item.name for item in fields(cls) if item.init]
    values = data.draw(st.fixed_dictionaries({name: junk for name in names}))
    try:
        instance = cls(**values)
    except LbgymError as error:
        assert str(error)
    else:
        mean = getattr(instance, "mean", 1.0)
        assert mean >= 0
