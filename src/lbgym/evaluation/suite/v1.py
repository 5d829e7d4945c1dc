"""Protocol v1: 32 scenarios in six families, 20 seeds. Fixed: what would change results belongs into a v2."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from ...scenarios import (
    BoundedPareto,
    Event,
    Exponential,
    Lognormal,
    Scenario,
    Server,
    Workload,
    named_scenario,
    servers_of,
)
from .protocol import Case, Protocol

#: Eight speeds, 0.4 to 2.2, in an order that does not rise.
_SPEEDS = (0.4, 1.5, 0.8, 2.2, 0.6, 1.8, 1.0, 1.2)

#: Rates that the authors of MARLLB measured at, flows per second (CIKM 2022, tables 3 to 7).
_MODERATE_RATES = (518.8, 690.9, 696.5, 796.3)
_LARGE_RATES = (398.5, 419.3)


@cache
def protocol_v1() -> Protocol:
    """The protocol, made when it is first asked for."""
    return Protocol(
        version="v1",
        cases=(
            *_known_cores(),
            *_unknown_speeds(),
            *_several_balancers(),
            *_changing_load(),
            *_demands(),
            *_changing_servers(),
        ),
    )


def _named(scenario: str, family: str, *, name: str | None = None, duration: float = 180.0, **changes: float) -> Case:
    """A built-in scenario, at another duration, load or rate."""
    changed = named_scenario(scenario).with_changes(duration=duration, **changes)
    return Case(scenario=replace(changed, name=name or scenario), family=family)


def _case(
    name: str,
    family: str,
    servers: tuple[Server, ...],
    workload: Workload,
    *,
    balancers: int = 1,
    events: tuple[Event, ...] = (),
    duration: float = 180.0,
) -> Case:
    scenario = Scenario(
        name=name, servers=servers, workload=workload, balancers=balancers, events=events, duration=duration
    )
    return Case(scenario=scenario, family=family)


def _exponential(load: float) -> Workload:
    return Workload(demand=Exponential(mean=0.1), load=load)


def _mixed_speeds(count: int, cores: tuple[int, ...]) -> tuple[Server, ...]:
    return tuple(Server(cores=cores[i // len(_SPEEDS) % len(cores)], speed=_SPEEDS[i % 8]) for i in range(count))


def _known_cores() -> tuple[Case, ...]:
    """Every core alike: what an operator configures is right."""
    family = "known cores"
    uneven = servers_of((6, Server(cores=2)), (1, Server(cores=32)))
    small_and_large = servers_of((10, Server(cores=1)), (10, Server(cores=4)))
    four_sizes = tuple(Server(cores=(1, 2, 4, 8)[i % 4]) for i in range(64))
    many = tuple(Server(cores=(2, 4)[i % 2]) for i in range(256))
    return (
        _named("uniform", family),
        _case("cores-1-4", family, small_and_large, _exponential(0.9)),
        _case("one-large", family, uneven, Workload(demand=Lognormal(mean=0.1, cv=1.5), load=0.8)),
        _case("cores-64", family, four_sizes, _exponential(0.85), duration=120.0),
        _case("cores-256", family, many, _exponential(0.9), duration=60.0),
    )


def _unknown_speeds() -> tuple[Case, ...]:
    """Cores of different speeds that the operator does not know."""
    family = "unknown speeds"
    straggler = (*servers_of((11, Server(cores=4))), Server(cores=4, speed=0.2))
    lognormal = Workload(demand=Lognormal(mean=0.1, cv=2.0), load=0.85)
    return (
        _named("heterogeneous", family),
        _case("speeds-16", family, _mixed_speeds(16, (2,)), _exponential(0.9)),
        _case("speeds-32", family, _mixed_speeds(32, (4,)), _exponential(0.9)),
        _case("speeds-64", family, _mixed_speeds(64, (2, 4)), lognormal, duration=120.0),
        _case("straggler", family, straggler, _exponential(0.7)),
    )


def _several_balancers() -> tuple[Case, ...]:
    """Balancers that do not see each other's flows; both testbeds of MARLLB at the rates it was measured at."""
    family = "several balancers"
    small_and_large = servers_of((10, Server(cores=1)), (10, Server(cores=4)))
    large = servers_of((12, Server(cores=4)), (12, Server(cores=8)))
    return (
        *(_named("marllb-moderate", family, name=f"marllb-moderate-{r:g}", rate=r) for r in _MODERATE_RATES),
        *(_named("marllb-large", family, name=f"marllb-large-{r:g}", rate=r) for r in _LARGE_RATES),
        _case("cores-1-4-by-6", family, small_and_large, _exponential(0.9), balancers=6),
        _case("speeds-32-by-4", family, _mixed_speeds(32, (4,)), _exponential(0.9), balancers=4),
        _case("cores-4-8-by-8", family, large, _exponential(0.85), balancers=8),
    )


def _changing_load() -> tuple[Case, ...]:
    """Arrivals that swing, jump and burst, up to more than the servers can take."""
    family = "changing load"
    return (
        # Three days of a minute each.
        _named("diurnal", family, duration=200.0),
        _named("bursty", family),
        _named("modulated", family, duration=240.0),
        # At the scenario's own load more than 1 % of the flows are rejected, and p99 is the same for all.
        _named("flash-crowd", family, load=0.42),
        _named("prequal-ramp", family),
    )


def _demands() -> tuple[Case, ...]:
    """Few flows with most of the work, servers that serve in order, flows of seconds."""
    family = "demands"
    in_order = tuple(Server(cores=2, workers=2, speed=_SPEEDS[i]) for i in range(8))
    single = tuple(Server(workers=1, speed=_SPEEDS[i % 8]) for i in range(20))
    pareto = Workload(demand=BoundedPareto(alpha=1.5, minimum=0.03, maximum=5.0), load=0.75)
    return (
        _named("heavy-tailed", family, duration=240.0),
        _case("fifo-8", family, in_order, Workload(demand=Lognormal(mean=0.1, cv=1.5), load=0.8)),
        _case("fifo-20-by-2", family, single, pareto, balancers=2),
        _named("llm-serving", family, duration=240.0),
    )


def _changing_servers() -> tuple[Case, ...]:
    """Servers that slow down, fail, drain and come back."""
    family = "changing servers"
    # One after another is drained for 6 s, as in a rolling update.
    rolling = tuple(
        Event(time=15.0 + 10 * i + after, kind=kind, server=i)  # type: ignore[arg-type]
        for i in range(16)
        for after, kind in ((0.0, "drain"), (6.0, "up"))
    )
    # Three at a time at less than a third of their speed, and two that crash.
    slow = tuple(
        Event(time=12.0 + 4 * k + after, kind="speed", server=(11 * k) % 32, value=value)
        for k in range(38)
        for after, value in ((0.0, 0.3), (12.0, 1.0))
    )
    crashes = tuple(
        Event(time=time + after, kind=kind, server=server)  # type: ignore[arg-type]
        for server, time in ((5, 50.0), (18, 110.0))
        for after, kind in ((0.0, "down"), (15.0, "up"))
    )
    return (
        # Two whole cycles.
        _named("noisy-neighbour", family, duration=170.0),
        _named("failure", family),
        _case(
            "rolling-drain", family, servers_of((16, Server(cores=4))), _exponential(0.75), balancers=2, events=rolling
        ),
        _case(
            "brownouts-32-by-4",
            family,
            servers_of((32, Server(cores=4))),
            _exponential(0.75),
            balancers=4,
            events=slow + crashes,
        ),
    )
