"""Hypothesis strategies of valid scenarios without a trace."""

from __future__ import annotations

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
    Workload,
)

positive = st.floats(1e-6, 1e6)
means = st.floats(1e-3, 1e3)
levels = st.integers(1, 64)
sojourns = st.floats(0.1, 1e4)

servers = st.builds(
    Server,
    cores=levels,
    speed=st.floats(0.01, 100),
    workers=st.none() | levels,
    backlog=st.none() | st.integers(0, 500),
    memory_mb=positive,
    memory_idle_mb=st.floats(0, 1e6),
    memory_per_flow_mb=st.floats(0, 1e6),
)


@st.composite
def hyperexponentials(draw: st.DrawFn) -> Hyperexponential:
    shares = draw(st.lists(st.integers(1, 100), min_size=1, max_size=5))
    values = draw(st.lists(means, min_size=len(shares), max_size=len(shares)))
    return Hyperexponential(probabilities=tuple(s / sum(shares) for s in shares), means=tuple(values))


@st.composite
def modulated(draw: st.DrawFn) -> ModulatedPoisson:
    n = draw(st.integers(2, 4))
    counts = st.lists(st.integers(1, 9), min_size=n, max_size=n)
    rows = draw(st.none() | st.lists(counts, min_size=n, max_size=n))
    return ModulatedPoisson(
        levels=tuple(draw(st.lists(st.floats(0.01, 10), min_size=n, max_size=n))),
        sojourns=tuple(draw(st.lists(sojourns, min_size=n, max_size=n))),
        transitions=rows and tuple(tuple(x / sum(row) for x in row) for row in rows),
        fixed_sojourns=draw(st.booleans()),
    )


bounded = st.builds(
    lambda alpha, low, ratio: BoundedPareto(alpha=alpha, minimum=low, maximum=low * ratio),
    st.floats(0.1, 50),
    st.floats(1e-3, 10),
    st.floats(1.01, 1e6),
)
demands = st.one_of(
    st.builds(Deterministic, mean=means),
    st.builds(Exponential, mean=means),
    st.builds(Lognormal, mean=means, cv=st.floats(0.01, 100)),
    bounded,
    hyperexponentials(),
    st.builds(Empirical, values=st.lists(means, min_size=1, max_size=5).map(tuple)),
)
arrivals = st.one_of(
    st.just(Poisson()),
    modulated(),
    st.builds(OnOff, on=sojourns, off=sojourns, off_level=st.floats(0, 1), random=st.booleans()),
    st.builds(Sinusoidal, amplitude=st.floats(0, 1), period=sojourns, phase=st.floats(-10, 10)),
)


def events(num_servers: int) -> st.SearchStrategy[Event]:
    times, index = st.floats(0, 1e6), st.integers(0, num_servers - 1)
    return st.one_of(
        st.builds(Event, time=times, kind=st.just("rate"), value=st.just(0.0) | st.floats(0.1, 10)),
        st.builds(Event, time=times, kind=st.just("speed"), server=index, value=positive),
        st.builds(Event, time=times, kind=st.sampled_from(("down", "up", "drain")), server=index),
    )


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    cluster = draw(st.lists(servers, min_size=1, max_size=5))
    text = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
    law, quantity, amount = draw(demands), draw(st.sampled_from(("rate", "load"))), draw(st.floats(1e-3, 1e6))
    if quantity == "load":
        # No more flows per second than a scenario may have, whatever the events.
        amount = min(amount, 1e6 * law.mean / sum(server.capacity for server in cluster))
        amount = max(amount, 1e-3 * law.mean / sum(server.capacity for server in cluster))
    return Scenario(
        name=draw(text),
        description=draw(text),
        servers=tuple(cluster),
        workload=Workload(arrivals=draw(arrivals), demand=law, **{quantity: amount}),
        balancers=draw(st.integers(1, 1024)),
        dispatch=draw(st.sampled_from(DISPATCH_RULES)),
        events=tuple(draw(st.lists(events(len(cluster)), max_size=4))),
        reject_timeout=draw(positive),
        duration=draw(positive),
        sampling=Sampling(
            capacity=draw(st.integers(1, 32_767)),
            probability=draw(st.floats(1e-6, 1)),
            algorithm=draw(st.sampled_from(("overwrite", "uniform"))),
            decay=draw(st.floats(1e-6, 1)),
            packets_per_flow=draw(st.floats(0, 100)),
        ),
    )


# What a TOML file or a caller may hold instead of what is asked for.
junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=3)
    | st.sampled_from([10**400, float("nan"), -1, 0, 1, 2, "poisson", "rate", "down", "lsq"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
