"""The simulator against closed forms: ``python -m benchmarks.exactness``.

Every statistical check passes within four standard errors. Standard errors come from independent replicas, each run
past its transient before it is measured, so no assumption about correlation in time is made. The exit code is 1 if a
check fails.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from benchmarks.common import markdown, number, parser, report
from lbgym.scenarios import (
    DISPATCH_RULES,
    BoundedPareto,
    Deterministic,
    Event,
    Exponential,
    Hyperexponential,
    Lognormal,
    Scenario,
    Server,
    Workload,
)
from lbgym.simulator import Simulation

LIMIT = 4.0
#: The probability of a standard normal beyond four standard errors on either side.
TAIL = 2.0 * stats.norm.sf(LIMIT)
#: Relative error allowed where theory gives an identity and only rounding is left.
ROUNDING = 1e-9


@dataclass
class Check:
    """One comparison. ``z`` is in standard errors, or the error over its limit times ``LIMIT`` for an identity."""

    name: str
    expected: float
    measured: float
    z: float
    flows: int

    @property
    def passed(self) -> bool:
        return bool(abs(self.z) <= LIMIT)


def from_replicas(name: str, expected: float, top: NDArray, bottom: NDArray, flows: int) -> Check:
    """A ratio of sums over replicas; the error by the delta method, the tail by Student's t."""
    top, bottom = np.asarray(top, dtype=np.float64), np.asarray(bottom, dtype=np.float64)
    measured = top.sum() / bottom.sum()
    error = np.std(top - measured * bottom, ddof=1) * math.sqrt(len(top)) / bottom.sum()
    t = (measured - expected) / error
    return Check(name, expected, measured, normal_equivalent(t, len(top) - 1), flows)


def normal_equivalent(t: float, degrees: int) -> float:
    """The normal deviate as unlikely as Student's ``t``."""
    return math.copysign(-stats.norm.ppf(stats.t.sf(abs(t), degrees)), t)


def identity(name: str, expected: float, measured: float, flows: int, limit: float = ROUNDING) -> Check:
    error = abs(measured - expected) / max(abs(expected), abs(measured), 1e-300)
    return Check(name, expected, measured, LIMIT * error / limit, flows)


def bounded(name: str, measured: float, limit: float, flows: int) -> Check:
    """A quantity from 0 to ``limit``."""
    z = LIMIT * measured / limit if limit > 0 else (math.inf if measured > 0 else 0.0)
    return Check(f"{name} (at most {limit:g})", 0.0, measured, z, flows)


def chi_square(name: str, counts: NDArray, shares: NDArray, flows: int) -> Check:
    """Counts against probabilities; impossible cells must be empty."""
    counts, shares = np.asarray(counts, dtype=np.float64), np.asarray(shares, dtype=np.float64)
    shares = shares / shares.sum()
    if counts[shares == 0].any():
        return Check(name, 0.0, float(counts[shares == 0].sum()), math.inf, flows)
    possible = shares > 0
    degrees = int(possible.sum()) - 1
    if degrees == 0:
        return Check(name, 0.0, 0.0, 0.0, flows)
    expected = counts.sum() * shares[possible]
    statistic = float(((counts[possible] - expected) ** 2 / expected).sum())
    z = float(stats.norm.isf(max(stats.chi2.sf(statistic, degrees), 1e-300)))
    return Check(name, float(degrees), statistic, max(z, 0.0), flows)


@dataclass
class Window:
    """What happened between two instants, per replica [R] or per replica and server [R, N]."""

    duration: float
    delta: dict[str, NDArray]
    started: NDArray
    completed: NDArray
    rejected: NDArray

    @property
    def flows(self) -> int:
        return int(self.started.sum())


def weights_of(sim: Simulation, weights: Sequence[float] | None) -> NDArray | None:
    if weights is None:
        return None
    shape = (sim.num_replicas, sim.num_balancers, sim.num_servers)
    return np.broadcast_to(np.asarray(weights, dtype=np.float64), shape).copy()


def measure(
    scenario: Scenario,
    flows: int,
    *,
    replicas: int = 64,
    warm_up: float,
    seed: int,
    weights: Sequence[float] | None = None,
    threads: int = 2,
) -> Window:
    """Run replicas of a scenario over ``flows`` flows in all after ``warm_up`` seconds."""
    sim = Simulation(scenario, replicas, reservoirs=False, service=False, num_threads=threads)
    sim.reset(np.arange(replicas) + 1_000_003 * seed)
    duration = flows / scenario.rate / replicas
    before = sim.step(weights_of(sim, weights), warm_up)
    start = {k: np.array(v, dtype=np.float64) for k, v in sim.integrals().items()}
    counts = [np.array(x) for x in (before.started, before.completed, before.rejected)]
    after = sim.step(None, duration)
    end = sim.integrals()
    return Window(
        duration,
        {k: end[k] - v for k, v in start.items()},
        after.started - counts[0],
        after.completed - counts[1],
        after.rejected - counts[2],
    )


def recorded(
    scenario: Scenario,
    flows: int,
    *,
    replicas: int = 32,
    warm_up: float,
    seed: int,
    weights: Sequence[float] | None = None,
    threads: int = 2,
) -> list[dict[str, NDArray]]:
    """As :func:`measure`, but the flows themselves, a dict of arrays per replica."""
    sim = Simulation(scenario, replicas, reservoirs=False, service=False, record_flows=True, num_threads=threads)
    sim.reset(np.arange(replicas) + 1_000_003 * seed)
    sim.step(weights_of(sim, weights), warm_up)
    for replica in range(replicas):
        sim.take_flows(replica)
    sim.step(None, flows / scenario.rate / replicas)
    return [sim.take_flows(replica) for replica in range(replicas)]


def cluster(load: float, *servers: Server, demand: Any = None, **changes: Any) -> Scenario:
    demand = Exponential(mean=1.0) if demand is None else demand
    base = {"name": "closed-form", "servers": servers, "dispatch": "ecmp"}
    return Scenario(workload=Workload(load=load, demand=demand), **(base | changes))


def erlang_b(servers: int, offered: float) -> float:
    blocked = 1.0
    for k in range(1, servers + 1):
        blocked = offered * blocked / (k + offered * blocked)
    return blocked


def erlang_c(servers: int, offered: float) -> float:
    blocked = erlang_b(servers, offered)
    return blocked / (1.0 - offered / servers * (1.0 - blocked))


# Closed forms


def processor_sharing(flows: int, seed: int = 1) -> list[Check]:
    """M/M/1-PS: E[T] = E[S] / (1 - rho), E[n] = rho / (1 - rho), busy share rho."""
    checks = []
    for load in (0.5, 0.8):
        window = measure(cluster(load, Server()), flows, warm_up=1000.0, seed=seed)
        q, b = window.delta["queue"][:, 0], window.delta["busy"][:, 0]
        t, n = window.delta["fct_sum"][:, 0], window.completed[:, 0]
        time = np.full(len(q), window.duration)
        name = f"M/M/1-PS, load {load:g}:"
        checks += [
            from_replicas(f"{name} mean FCT", 1 / (1 - load), t, n, window.flows),
            from_replicas(f"{name} mean flows", load / (1 - load), q, time, window.flows),
            from_replicas(f"{name} busy share", load, b, time, window.flows),
        ]
    return checks


def several_cores(flows: int, seed: int = 2) -> list[Check]:
    """PS on 4 cores of speed 2: as many flows as in M/M/4, each at one core's speed at most."""
    load, cores, speed = 0.8, 4, 2.0
    window = measure(cluster(load, Server(cores=cores, speed=speed)), flows, warm_up=500.0, seed=seed)
    mean = (1.0 + erlang_c(cores, load * cores) / (cores * (1 - load))) / speed
    t, n = window.delta["fct_sum"][:, 0], window.completed[:, 0]
    return [from_replicas("M/M-PS on 4 cores: mean FCT", mean, t, n, window.flows)]


FOUR_LAWS = {
    "deterministic": Deterministic(mean=1.0),
    "exponential": Exponential(mean=1.0),
    "hyperexponential": Hyperexponential(probabilities=(0.9, 0.1), means=(0.5, 5.5)),
    "lognormal, cv 2": Lognormal(mean=1.0, cv=2.0),
}
_pareto = BoundedPareto(alpha=1.5, minimum=1.0, maximum=100.0)
FIVE_LAWS = FOUR_LAWS | {
    "bounded Pareto": BoundedPareto(alpha=1.5, minimum=1.0 / _pareto.mean, maximum=100.0 / _pareto.mean)
}


def insensitivity(flows: int, seed: int = 3) -> list[Check]:
    """M/G/1-PS: E[T] = E[S] / (1 - rho) whatever the law, and E[T | S = x] = x / (1 - rho) for small and large x."""
    load = 0.7
    checks = []
    for i, (name, law) in enumerate(FIVE_LAWS.items()):
        runs = recorded(cluster(load, Server(), demand=law), flows, warm_up=2000.0, seed=100 * seed + i)
        total = sum(len(run["fct"]) for run in runs)
        ones = np.array([len(run["fct"]) for run in runs])
        fct = np.array([run["fct"].sum() for run in runs])
        checks.append(from_replicas(f"M/G/1-PS, {name}: mean FCT", 1 / (1 - load), fct, ones, total))
        if name != "deterministic":
            border = float(np.median(np.concatenate([run["demand"] for run in runs])))
            for size, chosen in (("smaller", lambda d, b=border: d <= b), ("larger", lambda d, b=border: d > b)):
                top = np.array([run["fct"][chosen(run["demand"])].sum() for run in runs])
                bottom = np.array([run["demand"][chosen(run["demand"])].sum() for run in runs])
                checks.append(
                    from_replicas(f"M/G/1-PS, {name}: FCT / demand, {size} half", 1 / (1 - load), top, bottom, total)
                )
    return checks


def first_in_first_out(flows: int, seed: int = 4) -> list[Check]:
    """M/M/4 by workers = cores: probability and mean of the wait (Erlang C)."""
    cores, load = 4, 0.8
    runs = recorded(cluster(load, Server(cores=cores, workers=cores)), flows, warm_up=500.0, seed=seed)
    total = sum(len(run["fct"]) for run in runs)
    ones = np.array([len(run["fct"]) for run in runs])
    wait = [run["fct"] - run["demand"] for run in runs]
    late = erlang_c(cores, load * cores)
    waited = np.array([(w > 1e-9).sum() for w in wait])
    sums = np.array([w.sum() for w in wait])
    return [
        from_replicas("M/M/4: share of flows that wait", late, waited, ones, total),
        from_replicas("M/M/4: mean wait", late / (cores * (1 - load)), sums, ones, total),
        from_replicas("M/M/4: mean wait of those that wait", 1 / (cores * (1 - load)), sums, waited, total),
    ]


def blocking(flows: int, seed: int = 5) -> list[Check]:
    """M/M/4/10 by workers = cores and a backlog of 6; M/G/4/4 (Erlang B holds for every law)."""
    cores, places, offered = 4, 10, 3.6
    scenario = cluster(offered / cores, Server(cores=cores, workers=cores, backlog=places - cores))
    window = measure(scenario, flows, warm_up=500.0, seed=seed)
    levels = [offered**n / math.factorial(min(n, cores)) / cores ** max(n - cores, 0) for n in range(places + 1)]
    law = np.array(levels) / sum(levels)
    time = np.full(len(window.started), window.duration)
    checks = [
        from_replicas("M/M/4/10: share rejected", law[-1], window.rejected[:, 0], window.started[:, 0], window.flows),
        from_replicas(
            "M/M/4/10: mean flows", float(law @ np.arange(places + 1)), window.delta["queue"][:, 0], time, window.flows
        ),
    ]
    loss = cluster(offered / cores, Server(cores=cores, workers=cores, backlog=0), demand=FOUR_LAWS["lognormal, cv 2"])
    window = measure(loss, flows, warm_up=500.0, seed=seed + 1)
    share = erlang_b(cores, offered)
    checks.append(
        from_replicas("M/G/4/4: share rejected", share, window.rejected[:, 0], window.started[:, 0], window.flows)
    )
    return checks


def power_of_two(flows: int, seed: int = 6, servers: int = 4000, replicas: int = 8) -> list[Check]:
    """p2c on many servers: the share with at least k flows is rho ** (2 ** k - 1) (Mitzenmacher; Vvedenskaya et al.).

    The law is exact for infinitely many servers; its error falls as 1 / servers, far below the standard error here.
    """
    load = 0.7
    scenario = cluster(load, *[Server()] * servers, dispatch="p2c")
    sim = Simulation(scenario, replicas, reservoirs=False, service=False, num_threads=2)
    sim.reset(np.arange(replicas) + 1_000_003 * seed)
    sim.step(None, 60.0)
    start = sim.integrals()["queue"].sum(axis=1)
    started = int(sim.observe().started.sum())
    depth, steps = 4, max(int(flows / scenario.rate / replicas), 8)
    tails = np.zeros((replicas, depth))
    for _ in range(steps):
        open_flows = sim.step(None, 1.0).stats[:, 0, :, 0]
        for k in range(depth):
            tails[:, k] += (open_flows > k).mean(axis=1)
    mean = (sim.integrals()["queue"].sum(axis=1) - start) / servers
    total = int(sim.observe().started.sum()) - started
    time = np.full(replicas, float(steps))
    law = [load ** (2**k - 1) for k in range(1, 12)]
    checks = [from_replicas(f"p2c, {servers} servers: mean flows per server", sum(law), mean, time, total)]
    for k in range(depth):
        name = f"p2c, {servers} servers: share with at least {k + 1}"
        checks.append(from_replicas(name, law[k], tails[:, k], time, total))
    return checks


# Identities


FAILURE, RETURN = 300.0, 400.0
SHARES = (1.0, 3.0, 2.0, 1.0, 3.0)


def busy_cluster(*events: Event) -> Scenario:
    """Unlike servers, two balancers, a speed that changes, a server that fails: what the identities must survive."""
    servers = (
        Server(cores=1),
        Server(cores=4, speed=1.5),
        Server(cores=2, workers=2),
        Server(cores=2, workers=8, backlog=4, speed=0.5),
        Server(cores=1, workers=1, backlog=0, speed=3.0),
    )
    events = (
        Event(time=100.0, kind="speed", server=1, value=0.5),
        Event(time=FAILURE, kind="down", server=2),
        Event(time=RETURN, kind="up", server=2),
        *events,
    )
    return cluster(0.5, *servers, dispatch="wcmp", balancers=2, events=events)


def littles_law(flows: int, seed: int = 7) -> list[Check]:
    """Per server: the time integral of the queue is the time all flows spent there, summed another way.

    Once from the kernel's own sums, and once from the flows one by one: the same seed is run on until every flow that
    was open at the instant has ended.
    """
    scenario = busy_cluster()
    duration = flows / scenario.rate
    sim = Simulation(scenario, 1, reservoirs=False, service=False, record_flows=True)
    sim.reset([seed])
    sim.step(weights_of(sim, SHARES), duration)
    at = {k: np.array(v[0]) for k, v in sim.integrals().items()}
    clock = float(at["clock"])
    sums = at["fct_sum"] + at["age_sum"] + at["lost_time"]
    total = int(sim.observe().started.sum())
    parts = [sim.take_flows(0)]
    while sum(int((part["flow_id"] < total).sum()) for part in parts) < total:
        sim.step(None, duration / 50)
        parts.append(sim.take_flows(0))
    run = {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
    end = run["arrival"] + np.select([run["status"] == 0, run["status"] == 2], [run["fct"], FAILURE - run["arrival"]])
    spent = np.minimum(end, clock) - run["arrival"]
    checks = []
    for j in range(scenario.num_servers):
        name = f"Little's law, server {j}: queue integral"
        here = math.fsum(spent[(run["server"] == j) & (run["flow_id"] < total)])
        checks.append(identity(f"{name}, kernel's sums", sums[j], at["queue"][j], total))
        checks.append(identity(f"{name}, flow by flow", here, at["queue"][j], total))
    return checks


def work_conservation(flows: int, seed: int = 8) -> list[Check]:
    """Arrivals stop and the servers empty: work served is the demand of the flows, busy time is work over speed."""
    stop = flows / busy_cluster().rate
    scenario = busy_cluster(Event(time=stop, kind="rate", value=0.0))
    sim = Simulation(scenario, 1, reservoirs=False, service=False, record_flows=True)
    sim.reset([seed])
    snapshot = sim.step(weights_of(sim, SHARES), stop + 1e4)
    total = {k: np.array(v[0]) for k, v in sim.integrals().items()}
    run = sim.take_flows(0)
    started = int(snapshot.started.sum())
    checks = []
    for j, server in enumerate(scenario.servers):
        demand = math.fsum(run["demand"][(run["server"] == j) & (run["status"] == 0)])
        work = float(total["work"][j])
        # Server 2 has also worked on flows that failed; server 1 has had two speeds.
        if j != 2:
            checks.append(identity(f"work conservation, server {j}: work served", demand, work, started))
        if j != 1:
            busy = float(total["busy"][j])
            checks.append(identity(f"work conservation, server {j}: busy cores", work / server.speed, busy, started))
        limit = server.capacity * float(total["clock"])
        within = demand * (1 - ROUNDING) <= work <= limit
        checks.append(
            Check(f"work conservation, server {j}: within capacity", limit, work, 0.0 if within else math.inf, started)
        )
    return checks


# Dispatch

SPLIT_WEIGHTS = (1.0, 4.0, 3.0, 0.5, 4.0, 0.0, 1.5)


def idle_cluster(dispatch: str, rate: float = 1.0, **changes: Any) -> Scenario:
    """Seven servers that are idle whenever a flow arrives, of different speeds for the oracles."""
    servers = [
        Server(cores=c, speed=s)
        for c, s in zip((1, 2, 1, 4, 2, 1, 2), (1.0, 0.75, 3.0, 1.0, 0.5, 2.0, 2.0), strict=True)
    ]
    workload = Workload(rate=rate, demand=Deterministic(mean=1e-12))
    return Scenario(name="idle", servers=tuple(servers), workload=workload, dispatch=dispatch, **changes)


def idle_shares(dispatch: str, weights: NDArray, servers: Sequence[Server]) -> NDArray:
    """The share of flows each idle server takes, by the definition of the rule."""
    power = np.array([server.capacity for server in servers])
    cores = np.array([server.cores for server in servers])
    if dispatch in ("wcmp", "round_robin", "maglev"):
        shares = weights
    elif dispatch in ("sed", "sed_scaled"):
        shares = scan_shares(weights == weights.max())
    elif dispatch in ("marginal", "whittle"):
        # A flow takes one core.
        shares = scan_shares(weights / cores == (weights / cores).max())
    elif dispatch in ("oracle_sed", "oracle_least_work"):
        shares = scan_shares(power == power.max())
    elif dispatch in ("oracle_marginal", "oracle_whittle"):
        shares = scan_shares(power / cores == (power / cores).max())
    elif dispatch in ("p2c_sed", "p2c_marginal"):
        # Of a pair the larger weight wins; equal weights share it.
        each = weights / cores if dispatch == "p2c_marginal" else weights
        shares = np.array([sum(0.5 * (w == v) + (w > v) for v in np.delete(each, i)) for i, w in enumerate(each)])
    else:
        shares = np.ones(len(servers))
    return shares / shares.sum()


def scan_shares(best: NDArray) -> NDArray:
    """How often a scan from a uniformly random start meets each of the ``best`` servers first."""
    shares = np.zeros(len(best))
    for start in range(len(best)):
        shares[(start + int(np.argmax(np.roll(best, -start)))) % len(best)] += 1
    return shares


def placed(scenario: Scenario, flows: int, seed: int, weights: Sequence[float]) -> NDArray:
    """Flows each server got, int[N]."""
    sim = Simulation(scenario, 1, reservoirs=False, service=False)
    sim.reset([seed])
    return sim.step(weights_of(sim, weights), flows / scenario.rate).started[0].copy()


def splits(flows: int, seed: int = 9) -> list[Check]:
    """Each rule's split over idle servers, chi-square; round robin closer than chance."""
    checks = []
    for rule in DISPATCH_RULES:
        if rule in ("maglev", "round_robin"):
            continue
        scenario = idle_cluster(rule)
        # A weight of zero takes no flows where weights are shares; the other rules get weights above zero.
        weights = np.array(SPLIT_WEIGHTS)
        if rule != "wcmp":
            weights[weights == 0] = 0.25
        counts = placed(scenario, flows, seed, weights)
        shares = idle_shares(rule, weights, scenario.servers)
        checks.append(chi_square(f"split of {rule} (chi-square)", counts, shares, int(counts.sum())))
    weights = np.array(SPLIT_WEIGHTS)
    counts = placed(idle_cluster("round_robin"), flows, seed, weights)
    total = int(counts.sum())
    furthest = float(np.abs(counts - total * weights / weights.sum()).max())
    checks.append(bounded("split of round_robin: furthest from its share, flows", furthest, 2.0, total))
    return checks


def maglev(flows: int, seed: int = 10, servers: int = 50) -> list[Check]:
    """Maglev: shares to two entries of a table with 100 per server; little moves with one server (NSDI 2016)."""
    workload = Workload(rate=1.0, demand=Deterministic(mean=1e-12))
    scenario = Scenario(name="maglev", servers=(Server(),) * servers, workload=workload, dispatch="maglev")

    def where(weights: NDArray, *events: Event) -> NDArray:
        changed = scenario.with_changes(events=events)
        sim = Simulation(changed, 1, reservoirs=False, service=False, record_flows=True)
        sim.reset([seed])
        sim.step(weights_of(sim, weights), float(flows))
        run = sim.take_flows(0)
        return run["server"][np.argsort(run["flow_id"])]

    even, uneven = np.ones(servers), np.linspace(1.0, 4.0, servers)
    before = where(even)
    total = len(before)
    checks = []
    for name, weights, chosen in (("even", even, before), ("uneven", uneven, where(uneven))):
        share = weights / weights.sum()
        error = np.sqrt(share * (1 - share) / total)
        # Beyond chance, what is left is the table's own unevenness.
        excess = np.abs(np.bincount(chosen, minlength=servers) / total - share) - LIMIT * error
        entries = max(float(excess.max()), 0.0) * 100 * servers
        checks.append(bounded(f"maglev, {name} weights: worst share off by, table entries", entries, 2.0, total))
    lost = servers // 3
    after = where(even, Event(time=0.0, kind="drain", server=lost))
    moved = float(np.mean((before != after)[before != lost]))
    checks.append(bounded("maglev, a server leaves: share of the others' flows that move", moved, 0.05, total))
    checks.append(bounded("maglev, a server leaves: flows it still gets", float((after == lost).sum()), 0.0, total))
    heavier = even.copy()
    heavier[lost] = 1.5
    after = where(heavier)
    moved = float(np.mean((before != after) & (after != lost)))
    checks.append(bounded("maglev, a weight grows: share of flows that move elsewhere", moved, 0.05, total))
    return checks


SUITES: tuple[tuple[Callable[[int], list[Check]], float], ...] = (
    (processor_sharing, 1.0),
    (several_cores, 1.0),
    (insensitivity, 1.0),
    (first_in_first_out, 1.0),
    (blocking, 1.0),
    (power_of_two, 2.0),
    (littles_law, 1.0),
    (work_conservation, 1.0),
    (splits, 1.0),
    (maglev, 1.0),
)


def main(argv: Sequence[str] | None = None) -> int:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--flows", type=int, default=1_200_000, help="flows per run")
    arguments = options.parse_args(argv)
    flows = 60_000 if arguments.quick else arguments.flows
    checks = [check for suite, factor in SUITES for check in suite(int(factor * flows))]
    failed = [check for check in checks if not check.passed]
    rows = [(c.name, number(c.expected, 6), number(c.measured, 6), f"{c.z:+.2f}", c.flows, c.passed) for c in checks]
    text = markdown(rows, ("check", "expected", "measured", "z", "flows", "passed"))
    text += f"\n\n{len(checks) - len(failed)} of {len(checks)} passed; |z| at most {LIMIT:g}."
    report("exactness", arguments, text, {"checks": [asdict(c) | {"passed": c.passed} for c in checks]})
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
