"""Named scenarios. Demands are in core-seconds; rates follow from the load where none is given."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from statistics import NormalDist

from ..errors import UnknownNameError
from ._validation import _integer
from .model import MAX_SERVERS, Event, Scenario, Server, servers_of
from .randomization import (
    Choice,
    LogUniform,
    RandomEvents,
    ScenarioDistribution,
    ServerDistribution,
    Uniform,
    Variant,
)
from .traces import DECODE_RATE, PREFILL_RATE, read_trace
from .workload import (
    BoundedPareto,
    Empirical,
    Exponential,
    Hyperexponential,
    Lognormal,
    ModulatedPoisson,
    OnOff,
    Sinusoidal,
    Trace,
    Workload,
)

#: Speed of one CPU (a hyper-thread) of the MARLLB testbed: core-seconds of demand it serves per second. The one
#: constant of ``marllb-large`` that is fitted, by a benchmark, to the published mean FCT of LSQ at 398.5 flows/s.
MARLLB_CPU_SPEED = 0.722
#: Apache of the MARLLB testbed: 32 processes and a TCP backlog of 128.
MARLLB_WORKERS = 32
MARLLB_BACKLOG = 128

#: A trace of 5,000 synthetic flows that the package ships; see :mod:`lbgym.scenarios.sample`.
SAMPLE_TRACE = Path(__file__).parent / "data" / "sample_trace.csv.gz"

# Scheduled events are written out to this time, seconds: longer than the longest default episode (10,000 steps).
_HORIZON = 3600.0

_BUILDERS: dict[str, Callable[[], Scenario]] = {}
_DISTRIBUTIONS: dict[str, Callable[[], ScenarioDistribution]] = {}


def scenario_names() -> tuple[str, ...]:
    """Names of the built-in scenarios, the plainest first."""
    return tuple(_BUILDERS)


def named_scenario(name: str) -> Scenario:
    """The built-in scenario of that name.

    Raises:
        UnknownNameError: if the name is unknown; the message lists the known ones.
    """
    if name not in _BUILDERS:
        raise UnknownNameError("scenario", name, _BUILDERS)
    return replace(_BUILDERS[name](), name=name)


def distribution_names() -> tuple[str, ...]:
    """Names of the built-in distributions of scenarios, the plainest first."""
    return tuple(_DISTRIBUTIONS)


@lru_cache(maxsize=32)
def named_distribution(name: str) -> ScenarioDistribution:
    """The built-in distribution of scenarios of that name.

    Raises:
        UnknownNameError: if the name is unknown; the message lists the known ones.
    """
    if name not in _DISTRIBUTIONS:
        raise UnknownNameError("distribution", name, _DISTRIBUTIONS)
    distribution = _DISTRIBUTIONS[name]()
    return replace(distribution, base=replace(distribution.base, name=name))


def default_scenario(num_servers: int = 4) -> Scenario:
    """Servers of 2 and 4 cores in turn, exponential demands of 0.1 core-seconds, load 0.8: some 6 flows a step each.

    Raises:
        ScenarioError: ``num_servers`` is no whole number from 1 to ``MAX_SERVERS``.
    """
    num_servers = _integer(num_servers, "num_servers", low=1, high=MAX_SERVERS)
    return Scenario(
        name=f"default-{num_servers}",
        description=f"{num_servers} servers of 2 and 4 cores in turn, Poisson arrivals at load 0.8.",
        servers=tuple(Server(cores=4 if i % 2 else 2) for i in range(num_servers)),
        workload=Workload(demand=Exponential(mean=0.1), load=0.8),
    )


def _named(name: str) -> Callable[[Callable[[], Scenario]], Callable[[], Scenario]]:
    def register(builder: Callable[[], Scenario]) -> Callable[[], Scenario]:
        _BUILDERS[name] = builder
        return builder

    return register


@_named("uniform")
def uniform() -> Scenario:
    """The plainest cluster: where equal weights are right and only counting flows helps."""
    return Scenario(
        description="4 equal servers of 4 cores, exponential demands of 0.1 s, load 0.8: equal weights are right.",
        servers=servers_of((4, Server(cores=4))),
        workload=Workload(demand=Exponential(mean=0.1), load=0.8),
    )


@_named("heterogeneous")
def heterogeneous() -> Scenario:
    """Two sizes of server and, within a size, throttled and fast ones that the operator's core counts do not show."""
    return Scenario(
        description=(
            "8 servers of 2 or 4 cores at speeds of 0.25 to 2 that the operator does not know, exponential "
            "demands of 0.1 s, load 0.8: weights from cores help, true weights help more."
        ),
        servers=(
            Server(cores=2, speed=0.25),
            Server(cores=2, speed=0.5),
            Server(cores=2, speed=1.5),
            Server(cores=2, speed=2.0),
            Server(cores=4, speed=0.25),
            Server(cores=4, speed=0.25),
            Server(cores=4, speed=1.5),
            Server(cores=4, speed=2.0),
        ),
        workload=Workload(demand=Exponential(mean=0.1), load=0.8),
    )


@_named("noisy-neighbour")
def noisy_neighbour() -> Scenario:
    """Servers that lose half their speed for 30 of every 75 seconds, as under MARLLB's colocated batch job."""
    noisy = {1: 15.0, 4: 50.0}
    events = [
        Event(time=start + 75 * k + after, kind="speed", server=server, value=value)
        for server, start in noisy.items()
        for k in range(int(_HORIZON // 75))
        for after, value in ((0.0, 0.5), (30.0, 1.0))
    ]
    return Scenario(
        description=(
            "6 equal servers of 4 cores, load 0.75; two of them run at half speed for 30 s of every 75 s, in "
            "turn: weights must follow."
        ),
        servers=servers_of((6, Server(cores=4))),
        workload=Workload(demand=Exponential(mean=0.1), load=0.75),
        events=tuple(events),
        duration=150.0,
    )


@_named("failure")
def failure() -> Scenario:
    """Every minute one server crashes and comes back, and another is drained and comes back."""
    events = []
    for minute in range(int(_HORIZON // 60)):
        crashed, drained = (2 * minute) % 6, (2 * minute + 1) % 6
        events += [
            Event(time=60.0 * minute + 15, kind="down", server=crashed),
            Event(time=60.0 * minute + 25, kind="up", server=crashed),
            Event(time=60.0 * minute + 35, kind="drain", server=drained),
            Event(time=60.0 * minute + 45, kind="up", server=drained),
        ]
    return Scenario(
        description=(
            "6 equal servers of 4 cores, load 0.7; each minute one goes down for 10 s and loses its flows, "
            "another is drained for 10 s: the rest must carry a load of 0.84."
        ),
        servers=servers_of((6, Server(cores=4))),
        workload=Workload(demand=Exponential(mean=0.1), load=0.7),
        events=tuple(events),
        duration=60.0,
    )


@_named("diurnal")
def diurnal() -> Scenario:
    """A day in a minute: what is right at night is too little at noon."""
    return Scenario(
        description=(
            "3 servers of 2 and 3 of 4 cores; the load swings between 0.3 and 0.96 once a minute: a day in short."
        ),
        servers=servers_of((3, Server(cores=2)), (3, Server(cores=4))),
        workload=Workload(
            arrivals=Sinusoidal(amplitude=0.525, period=60.0, phase=-math.pi / 2),
            demand=Exponential(mean=0.1),
            load=0.63,
        ),
        duration=120.0,
    )


@_named("bursty")
def bursty() -> Scenario:
    """Bursts beyond the capacity, which queues must absorb."""
    return Scenario(
        description=(
            "3 servers of 2 and 3 of 4 cores; bursts of 2 s at load 1.18 with 6 s at 0.47 between them, in the "
            "mean: queues build up and drain."
        ),
        servers=servers_of((3, Server(cores=2)), (3, Server(cores=4))),
        workload=Workload(
            arrivals=OnOff(on=2.0, off=6.0, off_level=0.4, random=True), demand=Exponential(mean=0.1), load=0.65
        ),
    )


@_named("modulated")
def modulated() -> Scenario:
    """Load that jumps between levels at random times."""
    return Scenario(
        description=(
            "3 servers of 2 and 3 of 4 cores; the load stays some 10 s at 0.4, 0.7 or 0.95, then jumps to another "
            "of them."
        ),
        servers=servers_of((3, Server(cores=2)), (3, Server(cores=4))),
        workload=Workload(
            arrivals=ModulatedPoisson(
                levels=(0.4, 0.7, 0.95),
                sojourns=(10.0, 10.0, 10.0),
                transitions=((0.0, 0.5, 0.5), (0.5, 0.0, 0.5), (0.5, 0.5, 0.0)),
            ),
            demand=Exponential(mean=0.1),
            load=(0.4 + 0.7 + 0.95) / 3,
        ),
        duration=120.0,
    )


@_named("flash-crowd")
def flash_crowd() -> Scenario:
    """A sudden doubling of the traffic; servers have limited workers and backlogs, so some flows are rejected."""
    events = [
        Event(time=60.0 * minute + after, kind="rate", value=value)
        for minute in range(int(_HORIZON // 60))
        for after, value in ((20.0, 2.5), (30.0, 1.0))
    ]
    return Scenario(
        description=(
            "3 servers of 2 and 3 of 4 cores, load 0.5; for 10 s of each minute 2.5 times the traffic comes: "
            "backlogs fill up and flows are rejected."
        ),
        servers=servers_of((3, Server(cores=2, workers=16, backlog=32)), (3, Server(cores=4, workers=16, backlog=32))),
        workload=Workload(demand=Exponential(mean=0.1), load=0.5),
        events=tuple(events),
        reject_timeout=10.0,
    )


@_named("heavy-tailed")
def heavy_tailed() -> Scenario:
    """Few flows carry most of the work; counting flows says little about it."""
    return Scenario(
        description=(
            "3 servers of 2 and 3 of 4 cores, load 0.7, bounded Pareto demands of 25 ms to 25 s: few flows carry "
            "most of the work."
        ),
        servers=servers_of((3, Server(cores=2)), (3, Server(cores=4))),
        workload=Workload(demand=BoundedPareto(alpha=1.3, minimum=0.025, maximum=25.0), load=0.7),
        duration=120.0,
    )


@_named("overload")
def overload() -> Scenario:
    """More than the cluster can serve: who is rejected, and how long do the others wait?"""
    return Scenario(
        description=(
            "2 servers of 2 and 2 of 4 cores with 8 workers and a backlog of 16 each, load 1.2: a sixth of the "
            "work must be rejected."
        ),
        servers=servers_of((2, Server(cores=2, workers=8, backlog=16)), (2, Server(cores=4, workers=8, backlog=16))),
        workload=Workload(demand=Lognormal(mean=0.1, cv=1.5), load=1.2),
        reject_timeout=5.0,
    )


@_named("fleet")
def fleet() -> Scenario:
    """A larger cluster behind four balancers, each of which sees a quarter of the flows."""
    return Scenario(
        description=(
            "64 servers of 2 to 8 cores at speeds of 0.75 to 1.25 behind 4 balancers, lognormal demands of 0.1 s, "
            "load 0.85: partial views at scale."
        ),
        servers=tuple(Server(cores=(2, 4, 4, 8)[i % 4], speed=(0.75, 1.0, 1.25)[i % 3]) for i in range(64)),
        workload=Workload(demand=Lognormal(mean=0.1, cv=1.5), load=0.85),
        balancers=4,
    )


@_named("marllb-moderate")
def marllb_moderate() -> Scenario:
    """The smaller testbed of MARLLB (Yao et al., CIKM 2022, table 1).

    The replayed Wikipedia requests are not published. In their place stands a mixture of 60 % static files (2.5 ms) and
    40 % wiki pages (55 ms), near the FCTs the paper measured at low load; with it the paper's rates of 518.8 to
    796.3 flows/s are loads of 0.61 to 0.94.
    """
    return Scenario(
        description=(
            "2 balancers, 4 servers of 2 and 3 of 4 CPUs, 696.5 flows/s of static files and wiki pages: the "
            "moderate MARLLB testbed with a stand-in for its Wikipedia replay."
        ),
        servers=servers_of(
            (4, Server(cores=2, workers=MARLLB_WORKERS, backlog=MARLLB_BACKLOG)),
            (3, Server(cores=4, workers=MARLLB_WORKERS, backlog=MARLLB_BACKLOG)),
        ),
        workload=Workload(demand=Hyperexponential(probabilities=(0.6, 0.4), means=(0.0025, 0.055)), rate=696.5),
        balancers=2,
    )


@_named("marllb-large")
def marllb_large() -> Scenario:
    """The larger testbed of MARLLB (Yao et al., CIKM 2022, tables 1 and 7)."""
    small = Server(cores=4, speed=MARLLB_CPU_SPEED, workers=MARLLB_WORKERS, backlog=MARLLB_BACKLOG)
    return Scenario(
        description=(
            "6 balancers, 12 servers of 4 and 12 of 8 CPUs, exponential demands of 0.2 s, 398.5 flows/s: the "
            "large MARLLB testbed."
        ),
        servers=servers_of((12, small), (12, replace(small, cores=8))),
        workload=Workload(demand=Exponential(mean=0.2), rate=398.5),
        balancers=6,
    )


@_named("park")
def park() -> Scenario:
    """The workload of Park's ``load_balance`` environment (Mao et al., NeurIPS 2019), one of its time units as 1 ms.

    There, and so here but for the unit: 10 servers that serve one job at a time at rates 0.15 to 1.05 in equal steps,
    interarrival times of mean 55, Pareto sizes of index 1.5 and scale 100 and so of mean 300: a load of
    300 / (55 * 6) = 0.909. Park also rounds times and sizes down to whole units, which changes them by less than 1 %;
    here they are left as drawn. The largest demand there can be is out of reach of the random numbers.
    """
    return Scenario(
        description=(
            "10 FIFO servers of speeds 0.15 to 1.05 with one worker each, Pareto(1.5) demands of at least 0.1 s, "
            "load 0.91: the workload of Park's load_balance, its time unit as 1 ms."
        ),
        servers=tuple(Server(workers=1, speed=(15 + 10 * i) / 100) for i in range(10)),
        workload=Workload(demand=BoundedPareto(alpha=1.5, minimum=0.1, maximum=1e11), rate=1000 / 55),
    )


def _token_demand(context: tuple[float, float], generated: tuple[float, float], levels: int = 32) -> Empirical:
    """Demands of requests whose token counts are independent lognormals of the given (median, sigma).

    Equally likely levels of each stand for its law, so no random numbers are involved.
    """
    normal = NormalDist()
    scores = [normal.inv_cdf((i + 0.5) / levels) for i in range(levels)]
    read = [context[0] * math.exp(context[1] * z) / PREFILL_RATE for z in scores]
    write = [generated[0] * math.exp(generated[1] * z) / DECODE_RATE for z in scores]
    return Empirical(values=tuple(a + b for a in read for b in write))


@_named("llm-serving")
def llm_serving() -> Scenario:
    """Inference of a language model on accelerators that batch requests.

    A core is a lane of the batch: up to 32 requests are served at full speed (reading ``PREFILL_RATE`` and writing
    ``DECODE_RATE`` tokens per second each), up to 128 at once with the speed shared.
    """
    newer = Server(cores=32, workers=128, backlog=256)
    return Scenario(
        description=(
            "8 accelerators that batch requests, half of them older and slower than the operator knows, prompts "
            "read at 10,000 and answers written at 80 tokens/s: flows of seconds, load 0.8."
        ),
        servers=servers_of((4, newer), (4, replace(newer, speed=0.6))),
        workload=Workload(demand=_token_demand(context=(800.0, 0.8), generated=(150.0, 0.8)), load=0.8),
        duration=120.0,
    )


@lru_cache(maxsize=1)
def _sample() -> Trace:
    return read_trace(SAMPLE_TRACE, "csv")


@_named("sample-trace")
def sample_trace() -> Scenario:
    """A trace replayed, without a file of one's own."""
    return Scenario(
        description=(
            "The trace of 5,000 synthetic flows that comes with the package, replayed on 2 servers "
            "of 2 and 2 of 4 cores at load 0.8."
        ),
        servers=servers_of((2, Server(cores=2)), (2, Server(cores=4))),
        workload=Workload(trace=_sample(), load=0.8),
    )


def _distribution(name: str) -> Callable[[Callable[[], ScenarioDistribution]], Callable[[], ScenarioDistribution]]:
    def register(builder: Callable[[], ScenarioDistribution]) -> Callable[[], ScenarioDistribution]:
        _DISTRIBUTIONS[name] = builder
        return builder

    return register


@_distribution("random-heterogeneous")
def random_heterogeneous() -> ScenarioDistribution:
    """``heterogeneous`` with other servers and another load in every episode: nothing to learn by heart."""
    base = heterogeneous()
    return ScenarioDistribution(
        base=replace(
            base,
            description=(
                "8 servers of 2 or 4 cores at speeds of 0.25 to 2 and a load of 0.6 to 0.9, drawn for each episode: "
                "the cluster 'heterogeneous' is one such draw."
            ),
        ),
        server=ServerDistribution(cores=Choice((2, 4)), speed=LogUniform(0.25, 2.0)),
        load=Uniform(0.6, 0.9),
    )


@_distribution("random-clusters")
def random_clusters() -> ScenarioDistribution:
    """Clusters of many sizes and workloads, in which some servers slow down or fail now and then."""
    return ScenarioDistribution(
        base=Scenario(
            description=(
                "4 to 16 servers of 2 to 8 cores at speeds of 0.5 to 2, a load of 0.5 to 0.95, steady, bursty or "
                "swinging arrivals of light- to heavy-tailed demands, noisy neighbours and failures: one policy for "
                "all of it."
            ),
            servers=servers_of((16, Server(cores=4))),
            workload=Workload(demand=Exponential(mean=0.1), load=0.8),
        ),
        num_servers=Uniform(4, 16),
        server=ServerDistribution(cores=Choice((2, 4, 8), (0.4, 0.4, 0.2)), speed=LogUniform(0.5, 2.0)),
        load=Uniform(0.5, 0.95),
        arrivals=(
            Variant(kind="poisson", probability=0.5),
            Variant(
                kind="on_off",
                parameters={
                    "on": LogUniform(1.0, 4.0),
                    "off": LogUniform(4.0, 16.0),
                    "off_level": Uniform(0.3, 0.8),
                    "random": True,
                },
                probability=0.25,
            ),
            Variant(
                kind="sinusoidal",
                parameters={
                    "amplitude": Uniform(0.1, 0.4),
                    "period": LogUniform(20.0, 120.0),
                    "phase": Uniform(-math.pi, math.pi),
                },
                probability=0.25,
            ),
        ),
        demand=(
            Variant(kind="exponential", parameters={"mean": LogUniform(0.05, 0.2)}, probability=0.4),
            Variant(
                kind="lognormal",
                parameters={"mean": LogUniform(0.05, 0.2), "cv": Uniform(1.0, 3.0)},
                probability=0.4,
            ),
            Variant(
                kind="bounded_pareto",
                parameters={"alpha": Uniform(1.2, 1.8), "minimum": LogUniform(0.02, 0.05), "maximum": 20.0},
                probability=0.2,
            ),
        ),
        events=(
            RandomEvents(
                kind="speed",
                every=LogUniform(100.0, 1000.0),
                duration=Uniform(10.0, 30.0),
                value=Uniform(0.4, 0.8),
            ),
            RandomEvents(kind="down", every=LogUniform(500.0, 5000.0), duration=Uniform(5.0, 15.0)),
        ),
    )


@_distribution("random-marllb")
def random_marllb() -> ScenarioDistribution:
    """``marllb-moderate`` over the range of rates that its authors measured."""
    base = marllb_moderate()
    return ScenarioDistribution(
        base=replace(
            base,
            description=(
                "The moderate MARLLB testbed at 518.8 to 796.3 flows/s, drawn for each episode: loads of 0.61 to 0.94."
            ),
        ),
        rate=Uniform(518.8, 796.3),
    )
