"""Flows per second of the kernel beside SimPy and Ciw: ``python -m benchmarks.speed``.

The reference workload: one balancer, 8 processor-sharing servers of one core, load 0.8, exponential demands of mean
0.1 core-seconds, uniform dispatch (ecmp). SimPy and Ciw appear twice: in the style of their documentation, to which
the targets refer, and stripped to what is fastest. Their runs are of 60,000 flows each; Ciw keeps a record of every
visit and slows down as a run grows, so the length matters. All runs of a round follow each other in one process on one
core, and the rounds alternate, so that a change of the machine's speed meets everybody. Ratios are medians over rounds.
"""

from __future__ import annotations

import heapq
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import simpy

from benchmarks.common import markdown, parser, report
from lbgym.scenarios import Exponential, Scenario, Server, Workload
from lbgym.simulator import Simulation

SERVERS, LOAD, MEAN = 8, 0.8, 0.1
RATE = SERVERS * LOAD / MEAN
#: M/M/1-PS: the mean FCT every simulator must find.
MEAN_FCT = MEAN / (1 - LOAD)
#: Flows between two observations, when there are observations.
INTERVAL = 160


@dataclass
class Run:
    """Flows and seconds of one run."""

    flows: int
    seconds: float
    mean_fct: float

    @property
    def speed(self) -> float:
        return self.flows / self.seconds


def reference() -> Scenario:
    workload = Workload(rate=RATE, demand=Exponential(mean=MEAN))
    return Scenario(name="reference", servers=(Server(),) * SERVERS, workload=workload, dispatch="ecmp")


def run_kernel(flows: int, seed: int, *, reservoirs: bool, interval: int, replicas: int = 1, threads: int = 1) -> Run:
    """``flows`` in all, an observation drawn every ``interval`` flows of each replica."""
    sim = Simulation(reference(), replicas, reservoirs=reservoirs, service=True, num_threads=threads)
    sim.reset(list(range(seed, seed + replicas)))
    step = interval / RATE
    # The first steps find the arrays too small for their flows; what is timed is the steady state.
    before = sim.step(None, step)
    started = time.perf_counter()
    for _ in range(max(flows // (interval * replicas), 1)):
        snapshot = sim.step(None, step)
    seconds = time.perf_counter() - started
    done = int(snapshot.completed.sum())
    fct = float(sim.integrals()["fct_sum"].sum()) / done
    sim.close()
    return Run(done - int(before.completed.sum()), seconds, fct)


class ProcessServer:
    """Processor sharing in SimPy's own style: a process that is interrupted whenever a flow arrives."""

    def __init__(self, env: simpy.Environment) -> None:
        self.env = env
        self.heap: list[tuple[float, int, simpy.Event]] = []
        self.virtual = self.changed = 0.0
        self.started = 0
        self.process = env.process(self._run())

    def serve(self, demand: float) -> simpy.Event:
        """An event that succeeds when ``demand`` core-seconds have been served."""
        self._advance()
        done = self.env.event()
        self.started += 1
        heapq.heappush(self.heap, (self.virtual + demand, self.started, done))
        self.process.interrupt()
        return done

    def _advance(self) -> None:
        if self.heap:
            self.virtual += (self.env.now - self.changed) / len(self.heap)
        self.changed = self.env.now

    def _run(self) -> Iterator[simpy.Event]:
        while True:
            try:
                if self.heap:
                    yield self.env.timeout(max(0.0, (self.heap[0][0] - self.virtual) * len(self.heap)))
                    self._advance()
                    self.virtual, _, done = heapq.heappop(self.heap)
                    done.succeed()
                else:
                    yield self.env.event()
            except simpy.Interrupt:
                pass


def run_simpy(flows: int, seed: int) -> Run:
    """As SimPy's documentation writes such models: a process for every flow, one for every server."""
    draw = random.Random(seed)
    env = simpy.Environment()
    servers = [ProcessServer(env) for _ in range(SERVERS)]
    fct: list[float] = []

    def flow(server: ProcessServer, demand: float) -> Iterator[simpy.Event]:
        arrival = env.now
        yield server.serve(demand)
        fct.append(env.now - arrival)

    def source() -> Iterator[simpy.Event]:
        for _ in range(flows):
            yield env.timeout(draw.expovariate(RATE))
            env.process(flow(draw.choice(servers), draw.expovariate(1 / MEAN)))

    env.process(source())
    started = time.perf_counter()
    env.run()
    np.percentile(fct, (50, 90, 99))
    return Run(len(fct), time.perf_counter() - started, sum(fct) / len(fct))


class CallbackServer:
    """The same with nothing of SimPy but its event queue: callbacks, and departures that are void by their number."""

    def __init__(self, env: simpy.Environment, fct: list[float]) -> None:
        self.env, self.fct = env, fct
        self.heap: list[tuple[float, float]] = []
        self.virtual = self.changed = 0.0
        self.version = 0

    def _advance(self) -> None:
        if self.heap:
            self.virtual += (self.env.now - self.changed) / len(self.heap)
        self.changed = self.env.now

    def arrive(self, demand: float) -> None:
        self._advance()
        heapq.heappush(self.heap, (self.virtual + demand, self.env.now))
        self._plan()

    def _plan(self) -> None:
        self.version += 1
        if self.heap:
            delay = max(0.0, (self.heap[0][0] - self.virtual) * len(self.heap))
            self.env.timeout(delay, self.version).callbacks.append(self._depart)

    def _depart(self, event: simpy.Event) -> None:
        if event.value == self.version:
            self._advance()
            self.virtual, arrival = heapq.heappop(self.heap)
            self.fct.append(self.env.now - arrival)
            self._plan()


def run_callbacks(flows: int, seed: int) -> Run:
    """SimPy stripped to what is fastest: no process but the source, random numbers drawn ahead and not timed."""
    rng = np.random.default_rng(seed)
    gaps = rng.exponential(1 / RATE, flows).tolist()
    demands = rng.exponential(MEAN, flows).tolist()
    chosen = rng.integers(SERVERS, size=flows).tolist()
    env = simpy.Environment()
    fct: list[float] = []
    servers = [CallbackServer(env, fct) for _ in range(SERVERS)]

    def source() -> Iterator[simpy.Event]:
        for gap, demand, server in zip(gaps, demands, chosen, strict=True):
            yield env.timeout(gap)
            servers[server].arrive(demand)

    env.process(source())
    started = time.perf_counter()
    env.run()
    np.percentile(fct, (50, 90, 99))
    return Run(len(fct), time.perf_counter() - started, sum(fct) / len(fct))


def run_ciw(flows: int, seed: int, *, dispatch: bool) -> Run:
    """Ciw's processor-sharing nodes behind a node that dispatches, or each with its own part of the arrivals."""
    import ciw

    each = [ciw.dists.Exponential(1 / MEAN)] * SERVERS
    nodes = [ciw.PSNode] * SERVERS
    if dispatch:
        size = SERVERS + 1
        arrivals = [ciw.dists.Exponential(RATE), *[None] * SERVERS]
        each = [ciw.dists.Deterministic(0.0), *each]
        nodes = [ciw.Node, *nodes]
        routing = [[0.0, *[1 / SERVERS] * SERVERS], *[[0.0] * size for _ in range(SERVERS)]]
    else:
        size = SERVERS
        arrivals = [ciw.dists.Exponential(RATE / SERVERS)] * SERVERS
        routing = [[0.0] * size for _ in range(size)]
    network = ciw.create_network(
        arrival_distributions=arrivals,
        service_distributions=each,
        number_of_servers=[float("inf")] * size,
        routing=routing,
    )
    ciw.seed(seed)
    simulation = ciw.Simulation(network, node_class=nodes)
    started = time.perf_counter()
    simulation.simulate_until_max_customers(flows, method="Finish")
    seconds = time.perf_counter() - started
    records = simulation.get_all_records()
    fct = [r.exit_date - r.arrival_date for r in records if not dispatch or r.node > 1]
    return Run(len(fct), seconds, sum(fct) / len(fct))


BARE = "lbgym, FCT statistics"
FULL = f"lbgym, reservoirs, observed every {INTERVAL} flows"
SIMPY, SIMPY_LEAN = "SimPy, a process per flow", "SimPy, callbacks only"
CIW, CIW_LEAN = "Ciw, a node that dispatches", "Ciw, arrivals split beforehand"


def main(argv: Sequence[str] | None = None) -> int:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--rounds", type=int, default=7)
    arguments = options.parse_args(argv)
    scale, rounds = (0.1, 2) if arguments.quick else (1.0, arguments.rounds)

    def size(flows: int) -> int:
        return int(flows * scale)

    runs: dict[str, Callable[[int], Run]] = {
        BARE: lambda s: run_kernel(size(8_000_000), s, reservoirs=False, interval=16_000),
        FULL: lambda s: run_kernel(size(4_000_000), s, reservoirs=True, interval=INTERVAL),
        SIMPY: lambda s: run_simpy(size(60_000), s),
        SIMPY_LEAN: lambda s: run_callbacks(size(60_000), s),
        CIW: lambda s: run_ciw(size(60_000), s, dispatch=True),
        CIW_LEAN: lambda s: run_ciw(size(60_000), s, dispatch=False),
    }
    threads: dict[str, Callable[[int], Run]] = {
        f"{replicas} replicas, {n} thread{'s' if n > 1 else ''}, {what}": (
            lambda s, n=n, replicas=replicas, reservoirs=reservoirs, interval=interval, flows=flows: run_kernel(
                size(flows), s, reservoirs=reservoirs, interval=interval, replicas=replicas, threads=n
            )
        )
        for what, reservoirs, interval, replicas, flows in (
            ("FCT statistics", False, 4_000, 64, 24_000_000),
            ("reservoirs", True, 160, 256, 8_000_000),
        )
        for n in (1, 2)
    }
    run_kernel(1000, 0, reservoirs=True, interval=INTERVAL)
    affinity = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else None
    results: dict[str, list[Run]] = {name: [] for name in (*runs, *threads)}
    for i in range(rounds):
        if affinity is not None:
            os.sched_setaffinity(0, {min(affinity)})
        for name, run in runs.items():
            results[name].append(run(i + 1))
        if affinity is not None:
            os.sched_setaffinity(0, affinity)
        for name, run in threads.items():
            results[name].append(run(i + 1))

    def ratio(one: str, other: str) -> float:
        return median(a.speed / b.speed for a, b in zip(results[one], results[other], strict=True))

    rows = [
        (
            name,
            round(median(r.speed for r in each)),
            round(max(r.speed for r in each)),
            each[0].flows,
            ratio(name, SIMPY),
            ratio(name, CIW),
            sum(r.mean_fct * r.flows for r in each) / sum(r.flows for r in each),
        )
        for name, each in results.items()
    ]
    header = ("one core, unless threads are given", "flows/s, median", "best", "flows a run", "x SimPy", "x Ciw")
    text = markdown(rows, (*header, f"mean FCT, s ({MEAN_FCT:g} in theory)"))
    one, two = list(threads)[:2], list(threads)[2:]
    targets = [
        (f"{BARE}: times SimPy", 80.0, ratio(BARE, SIMPY)),
        (f"{BARE}: times Ciw", 600.0, ratio(BARE, CIW)),
        (f"{FULL}: times SimPy", 30.0, ratio(FULL, SIMPY)),
        ("two threads over one, FCT statistics", 1.8, ratio(one[1], one[0])),
        ("two threads over one, reservoirs", 1.8, ratio(two[1], two[0])),
    ]
    text += "\n\n" + markdown([(n, w, r, r >= w) for n, w, r in targets], ("target", "at least", "measured", "reached"))
    data = {
        "runs": {name: [vars(run) for run in each] for name, each in results.items()},
        "targets": [{"name": n, "at_least": w, "measured": r, "reached": r >= w} for n, w, r in targets],
    }
    report("speed", arguments, text, data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
