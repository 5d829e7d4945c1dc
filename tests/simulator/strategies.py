"""Hypothesis strategies: anything a scenario's constructor accepts, at sizes a test can run."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from lbgym.scenarios import (
    DISPATCH_RULES,
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
)

MEANS = st.floats(0.01, 1.0)


def servers() -> st.SearchStrategy[Server]:
    return st.builds(
        Server,
        cores=st.integers(1, 8),
        speed=st.floats(0.1, 4.0),
        workers=st.none() | st.integers(1, 12),
        backlog=st.none() | st.integers(0, 12),
    )


@st.composite
def hyperexponentials(draw) -> Hyperexponential:
    shares = draw(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=4))
    means = draw(st.lists(MEANS, min_size=len(shares), max_size=len(shares)))
    return Hyperexponential(probabilities=tuple(np.array(shares) / sum(shares)), means=tuple(means))


def demands() -> st.SearchStrategy:
    return st.one_of(
        st.builds(Deterministic, mean=MEANS),
        st.builds(Exponential, mean=MEANS),
        st.builds(Lognormal, mean=MEANS, cv=st.floats(0.01, 5.0)),
        st.builds(
            BoundedPareto, alpha=st.floats(0.3, 3.0), minimum=st.floats(0.001, 0.1), maximum=st.floats(0.2, 20.0)
        ),
        hyperexponentials(),
        st.builds(Empirical, values=st.lists(st.just(0.0) | MEANS, max_size=5).map(lambda v: (*v, 0.1))),
    )


@st.composite
def modulated(draw) -> ModulatedPoisson:
    n = draw(st.integers(2, 4))
    levels = draw(st.lists(st.just(0.0) | st.floats(0.1, 5.0), min_size=n - 1, max_size=n - 1))
    rows = None
    if draw(st.booleans()):
        # Every row can reach every state, so that the chain has one stationary law.
        raw = np.array(draw(st.lists(st.lists(st.floats(0.05, 1.0), min_size=n, max_size=n), min_size=n, max_size=n)))
        rows = tuple(map(tuple, raw / raw.sum(axis=1, keepdims=True)))
    return ModulatedPoisson(
        levels=(*levels, 1.0),
        sojourns=tuple(draw(st.lists(st.floats(0.05, 3.0), min_size=n, max_size=n))),
        transitions=rows,
        fixed_sojourns=draw(st.booleans()),
    )


def arrivals() -> st.SearchStrategy:
    return st.one_of(
        st.builds(Poisson),
        modulated(),
        st.builds(
            OnOff,
            on=st.floats(0.05, 2.0),
            off=st.floats(0.05, 2.0),
            off_level=st.just(0.0) | st.floats(0.0, 1.0),
            random=st.booleans(),
        ),
        st.builds(Sinusoidal, amplitude=st.floats(0.0, 1.0), period=st.floats(0.1, 20.0), phase=st.floats(-10.0, 10.0)),
    )


@st.composite
def traces(draw) -> Trace:
    # Whole gaps make flows coincide; zero demands end where they begin.
    gaps = draw(st.lists(st.just(0.0) | st.floats(0.001, 0.3), min_size=1, max_size=60))
    values = draw(st.lists(st.just(0.0) | st.floats(0.001, 1.0), min_size=len(gaps), max_size=len(gaps)))
    return Trace(
        times=np.cumsum(gaps), demands=np.array(values), repeat=draw(st.booleans()), random_start=draw(st.booleans())
    )


@st.composite
def workloads(draw) -> Workload:
    if draw(st.integers(0, 3)) == 0:
        trace = draw(traces())
        rate = draw(st.none() | st.floats(1.0, 100.0))
        return Workload(trace=trace, rate=rate)
    law, shape = draw(demands()), draw(arrivals())
    if draw(st.booleans()):
        return Workload(arrivals=shape, demand=law, rate=draw(st.floats(1.0, 100.0)))
    return Workload(arrivals=shape, demand=law, load=draw(st.floats(0.05, 2.0)))


@st.composite
def events(draw, num_servers: int) -> Event:
    kind = draw(st.sampled_from(["rate", "speed", "down", "up", "drain"]))
    time = draw(st.just(0.0) | st.floats(0.0, 4.0))
    if kind == "rate":
        return Event(time=time, kind=kind, value=draw(st.just(0.0) | st.floats(0.1, 3.0)))
    value = draw(st.floats(0.1, 3.0)) if kind == "speed" else None
    return Event(time=time, kind=kind, server=draw(st.integers(0, num_servers - 1)), value=value)


def samplings() -> st.SearchStrategy[Sampling]:
    return st.builds(
        Sampling,
        capacity=st.integers(1, 40),
        probability=st.just(1.0) | st.floats(0.05, 1.0),
        algorithm=st.sampled_from(["overwrite", "uniform"]),
        decay=st.sampled_from([0.9, 1.0, 0.1]),
        packets_per_flow=st.just(0.0) | st.floats(0.1, 10.0),
    )


@st.composite
def scenarios(draw, max_rate: float = 300.0) -> Scenario:
    cluster = tuple(draw(st.lists(servers(), min_size=1, max_size=6)))
    workload = draw(workloads())
    scenario = Scenario(
        name="drawn",
        servers=cluster,
        workload=workload,
        balancers=draw(st.integers(1, 4)),
        dispatch=draw(st.sampled_from(DISPATCH_RULES)),
        events=tuple(draw(st.lists(events(len(cluster)), max_size=6))),
        reject_timeout=draw(st.floats(0.1, 40.0)),
        sampling=draw(samplings()),
    )
    if scenario.rate > max_rate:
        scenario = scenario.with_changes(rate=max_rate)
    return scenario


@st.composite
def weights(draw, replicas: int, balancers: int, num_servers: int) -> np.ndarray:
    """float64[R, m, N]: anything that is finite and not negative; all zeros too."""
    flat = st.lists(
        st.sampled_from([0.0, 1.0]) | st.floats(0.01, 100.0),
        min_size=num_servers,
        max_size=num_servers,
    )
    rows = [draw(flat) for _ in range(min(replicas * balancers, 3))]
    wanted = [rows[i % len(rows)] for i in range(replicas * balancers)]
    return np.array(wanted).reshape(replicas, balancers, num_servers)
