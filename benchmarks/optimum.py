"""How far from the optimum are the dispatch rules? ``python -m benchmarks.optimum``.

Two or three servers under processor sharing, exponential demands, Poisson arrivals, one balancer: the best dispatcher
that knows all counts is the solution of a Markov decision process, found here by policy iteration (Howard, 1960) of
the average-cost problem with exact sparse solves. Counts are truncated; what that changes is found by solving a case of
the largest load again with a fifth less room. The cost is the mean number of flows held; by Little's law its ratio is
that of mean FCTs.

Also the other way round: the simulator, with every flow placed by the optimal table, has the optimum's mean FCT within
four standard errors. The exit code is 1 if a target is missed.

The pretrained policy, which has to estimate what the rules are told, is simulated beside ``oracle_whittle`` on the same
flows: its gap is the exact one of that rule times the ratio of the two mean FCTs.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import mean

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.linalg import splu

from benchmarks.common import markdown, parser, report
from lbgym.evaluation import compare
from lbgym.scenarios import Exponential, Scenario, Server, Workload
from lbgym.simulator import FlowSimulation, Simulation

_Float = NDArray[np.float64]
#: Cores and speeds per server.
CLUSTERS: tuple[tuple[tuple[int, ...], tuple[float, ...]], ...] = (
    ((1, 4), (1.0, 1.0)),
    ((1, 4), (1.0, 0.5)),
    ((4, 1), (0.5, 2.0)),
    ((2, 8), (1.5, 0.5)),
    ((4, 4), (0.4, 1.6)),
    ((1, 1), (1.0, 4.0)),
    ((2, 4), (1.0, 1.0)),
    ((1, 1), (1.0, 2.0)),
    ((1, 2), (2.0, 1.0)),
    ((2, 2), (1.0, 3.0)),
    ((1, 8), (2.0, 0.5)),
    ((8, 8), (0.5, 1.0)),
    ((4, 2), (0.25, 1.0)),
    ((1, 1), (1.0, 10.0)),
    ((2, 6), (0.5, 1.0)),
    ((3, 5), (1.2, 0.8)),
    ((1, 2, 4), (1.0, 1.0, 1.0)),
    ((2, 2, 2), (0.5, 1.0, 2.0)),
    ((1, 1, 1), (1.0, 1.0, 3.0)),
    ((8, 2, 1), (0.4, 1.0, 2.0)),
)
LOADS = (0.5, 0.8, 0.9)
#: Most flows per server, by the number of servers and the load.
MOST = {2: {0.5: 40, 0.8: 60, 0.9: 80}, 3: {0.5: 16, 0.8: 22, 0.9: 29}}
#: Mean demand of the simulated flows, core-seconds; in the process it is 1.
MEAN = 0.1


class Process:
    """The Markov decision process of a cluster: states are the counts (n_1, ..., n_N), 0 to ``most`` each."""

    def __init__(self, cores: Sequence[int], speeds: Sequence[float], load: float, most: int) -> None:
        self.cores, self.speeds = np.array(cores, float), np.array(speeds, float)
        self.capacity = float(self.cores @ self.speeds)
        self.rate = load * self.capacity
        n = len(cores)
        self.counts = np.indices((most + 1,) * n).reshape(n, -1)
        self.size = self.counts.shape[1]
        self._strides = [(most + 1) ** (n - 1 - j) for j in range(n)]
        self._full = self.counts == most
        states = np.arange(self.size)
        self._leaving = sparse.csr_matrix((self.size, self.size))
        for j in range(n):
            busy = self.counts[j] > 0
            rate = np.minimum(self.counts[j], self.cores[j]) * self.speeds[j]
            self._leaving += sparse.csr_matrix(
                (rate[busy], (states[busy], states[busy] - self._strides[j])), (self.size, self.size)
            )

    def routing(self, scores: _Float) -> _Float:
        """Shares [N, S] of the flows that go where, by the least of ``scores`` [N, S], ties as the data plane's.

        The first tied server from a uniformly drawn position on takes the flow.
        """
        n = len(scores)
        shown = np.where(self._full, np.inf, scores)
        best = (shown == shown.min(0)) & np.isfinite(shown)
        shares = np.zeros(shown.shape)
        for start in range(n):
            taken = np.zeros(self.size, bool)
            for k in range(n):
                j = (start + k) % n
                shares[j] += (best[j] & ~taken) / n
                taken |= best[j]
        return shares

    def evaluate(self, shares: _Float) -> tuple[float, _Float]:
        """Mean number of flows under ``shares``, and the relative values [S] of the states."""
        states = np.arange(self.size)
        moves = self._leaving.copy()
        for j, share in enumerate(shares):
            some = share > 0
            moves += sparse.csr_matrix(
                (self.rate * share[some], (states[some], states[some] + self._strides[j])), (self.size, self.size)
            )
        generator = (moves - sparse.diags(np.asarray(moves.sum(1)).ravel())).tocsc()
        # Q h = g - n with h(0) = 0: the first equation gives g.
        solve = splu(generator[1:, 1:], permc_spec="MMD_AT_PLUS_A")
        n = self.counts.sum(0).astype(float)
        by_cost, by_gain = solve.solve(-n[1:]), solve.solve(np.ones(self.size - 1))
        first = generator[0, 1:]
        gain = float((first @ by_cost)[0] / (1.0 - (first @ by_gain)[0]))
        return gain, np.concatenate([[0.0], by_cost + gain * by_gain])

    def optimum(self, shares: _Float) -> tuple[float, NDArray[np.int64]]:
        """Least mean number of flows, and the best server of each state, from the routing ``shares`` on."""
        best = np.zeros(self.size, np.int64)
        before = math.inf
        while True:
            gain, values = self.evaluate(shares)
            if before - gain <= 1e-10 * gain:
                return gain, best
            before = gain
            after = np.full(shares.shape, np.inf)
            for j, stride in enumerate(self._strides):
                room = np.flatnonzero(~self._full[j])
                after[j, room] = values[room + stride]
            best = after.argmin(0)
            chosen = (np.arange(len(after))[:, None] == best) & np.isfinite(after.min(0))
            shares = chosen.astype(float)

    def scores(self, index: Callable[[int, _Float], _Float]) -> _Float:
        """Scores [N, S] of an index by server and counts."""
        table = np.arange(self.counts.max() + 1.0)
        return np.array([index(j, table)[n] for j, n in enumerate(self.counts)])


def _delay(n: _Float, cores: float) -> _Float:
    return n * np.maximum(1.0, n / cores)


def whittle(cores: float, speed: float, rate: float, n: _Float) -> _Float:
    """Whittle's index by its definition, from the chains that accept up to n and up to n + 1 flows."""
    k = np.arange(1.0, len(n) + 2)
    weights = np.concatenate([[1.0], np.cumprod(rate / (speed * np.minimum(k, cores)))])
    total = np.cumsum(weights)
    held = np.cumsum(weights * np.arange(len(weights))) / total
    mu = speed * np.minimum(k, cores)
    ratio = rate / mu
    # x(n + 1) - x(n), without the difference of two numbers close to each other: constant from n = cores - 1 on.
    apart = total[1:] - ratio * total[:-1]
    apart = np.where(k > cores, apart[int(cores) - 1], apart)
    return ((k - held[:-1]) * total[:-1] / (mu * apart))[: len(n)]


def improved(cores: float, speed: float, rate: float, n: _Float) -> _Float:
    """One step of policy improvement from a static split: the relative value of one more flow on a server.

    D(n) = sum over k > n of (k - g) pi(k) / (mu(n + 1) pi(n + 1)) of its birth-death chain with its share of arrivals.
    """
    k = np.arange(2000.0)
    mu = speed * np.minimum(k[1:], cores)
    if rate <= 0.0:
        return (n + 1) / (speed * np.minimum(n + 1, cores))
    logs = np.concatenate([[0.0], np.cumsum(np.log(rate / mu))])
    pi = np.exp(logs - logs.max())
    pi /= pi.sum()
    tail = np.cumsum(((k - k @ pi) * pi)[::-1])[::-1]
    at = n.astype(int)
    return tail[at + 1] / (mu[at] * pi[at + 1])


def best_split(process: Process) -> _Float:
    """Rates of the static split of least mean number of flows: equal marginal costs, by bisection."""

    def mean_flows(rate: float, j: int) -> float:
        k = np.arange(2000.0)
        mu = process.speeds[j] * np.minimum(k[1:], process.cores[j])
        logs = np.concatenate([[0.0], np.cumsum(np.log(max(rate, 1e-12) / mu))])
        pi = np.exp(logs - logs.max())
        return float(k @ pi / pi.sum())

    def rate_at(price: float, j: int) -> float:
        full = process.cores[j] * process.speeds[j]
        low, high, step = 0.0, 0.995 * full, 1e-5 * full
        for _ in range(40):
            middle = (low + high) / 2
            slope = (mean_flows(middle + step, j) - mean_flows(max(middle - step, 0.0), j)) / (2 * step)
            low, high = (middle, high) if slope < price else (low, middle)
        return low

    servers = range(len(process.cores))
    low, high = math.log(1e-3), math.log(1e5)
    for _ in range(40):
        middle = (low + high) / 2
        total = sum(rate_at(math.exp(middle), j) for j in servers)
        low, high = (middle, high) if total < process.rate else (low, middle)
    rates = np.array([rate_at(math.exp(high), j) for j in servers])
    return rates * process.rate / rates.sum()


def indices(process: Process) -> dict[str, Callable[[int, _Float], _Float]]:
    """The index of each rule, by server and counts."""
    cores, speeds = process.cores, process.speeds
    split = best_split(process)
    # As in lbgym.simulator.dispatch: neither the load nor anything else is estimated.
    rates = [min(0.8 * process.capacity, 1.5 * c * s) for c, s in zip(cores, speeds, strict=True)]

    def marginal(j: int, n: _Float) -> _Float:
        return (_delay(n + 1, cores[j]) - _delay(n, cores[j])) / speeds[j]

    def ospi(j: int, n: _Float) -> _Float:
        return improved(cores[j], speeds[j], split[j], n)

    return {
        "lsq": lambda j, n: n,
        "sed": lambda j, n: (n + 1) / (cores[j] * speeds[j]),
        "marginal": marginal,
        "ospi": ospi,
        "marginal and ospi": lambda j, n: (marginal(j, n) + ospi(j, n)) / 2,
        "whittle": lambda j, n: whittle(cores[j], speeds[j], rates[j], n),
    }


@dataclass
class Case:
    """A cluster at a load: the optimum, and how much more each rule holds, as a fraction."""

    cores: tuple[int, ...]
    speeds: tuple[float, ...]
    load: float
    optimum: float
    gaps: dict[str, float]


def solve(cores: tuple[int, ...], speeds: tuple[float, ...], load: float, most: int) -> tuple[Case, NDArray[np.int64]]:
    """The case, and the best server of each state."""
    process = Process(cores, speeds, load, most)
    shares = {name: process.routing(process.scores(index)) for name, index in indices(process).items()}
    held = {name: process.evaluate(each)[0] for name, each in shares.items()}
    least, best = process.optimum(shares["whittle"])
    return Case(cores, speeds, load, least, {name: each / least - 1.0 for name, each in held.items()}), best


def scenario_of(cores: Sequence[int], speeds: Sequence[float], load: float, dispatch: str = "lsq") -> Scenario:
    """The cluster to simulate."""
    servers = tuple(Server(cores=c, speed=s) for c, s in zip(cores, speeds, strict=True))
    workload = Workload(load=load, demand=Exponential(mean=MEAN))
    return Scenario(name="optimum", servers=servers, workload=workload, dispatch=dispatch)


def simulate_table(case: Case, best: NDArray[np.int64], most: int, replicas: int, flows: int) -> tuple[float, float]:
    """Mean FCT, seconds, of flows placed by the optimal table, and its standard error; the first tenth is left out."""
    scenario = scenario_of(case.cores, case.speeds, case.load)
    table = best.reshape((most + 1,) * len(case.cores))
    simulation = FlowSimulation(scenario, replicas)
    seen = simulation.begin(list(range(replicas)))
    for i in range(flows):
        if i == flows // 10:
            start = seen.flow_seconds.copy(), seen.timestamp.copy()
        # One balancer: its own open flows are all.
        counts = np.minimum(seen.servers[..., 2].astype(np.int64), most)
        seen = simulation.decide(table[tuple(counts.T)])
    held = (seen.flow_seconds - start[0]) / (seen.timestamp - start[1])
    fct = held / scenario.rate
    return float(fct.mean()), float(fct.std(ddof=1) / math.sqrt(replicas))


def simulate_rule(case: Case, rule: str, replicas: int, seconds: float) -> tuple[float, float]:
    """The same of the simulator's own rule, with true speeds."""
    scenario = scenario_of(case.cores, case.speeds, case.load, rule)
    simulation = Simulation(scenario, replicas, reservoirs=False, service=False)
    simulation.reset(list(range(replicas)))
    weights = np.array(case.cores) * np.array(case.speeds)
    simulation.step(np.broadcast_to(weights, (replicas, 1, len(weights))), seconds / 10)
    before = simulation.integrals()["queue"].sum(1)
    simulation.step(None, seconds)
    fct = (simulation.integrals()["queue"].sum(1) - before) / seconds / scenario.rate
    return float(fct.mean()), float(fct.std(ddof=1) / math.sqrt(replicas))


def pretrained_gaps(case: Case, seeds: int, seconds: float) -> dict[str, tuple[float, float]]:
    """How much more ``adaptive`` holds than the optimum, as a fraction, and its standard error, by what it is told.

    Args:
        case: cluster and load.
        seeds: of flows.
        seconds: of each, of which the first sixth does not count.
    """
    cores = scenario_of(case.cores, case.speeds, case.load)
    servers = tuple(replace(server, weight=server.cores * server.speed) for server in cores.servers)

    def fct_means(scenario: Scenario, contender: str) -> _Float:
        return compare(scenario, contender, seeds, duration=seconds, processes=1).values(contender, "fct_mean")

    # The oracle reads no weights.
    known, exact, gaps = fct_means(cores, "oracle_whittle"), 1.0 + case.gaps["whittle"], {}
    for told, scenario in (("capacities", replace(cores, servers=servers)), ("cores", cores)):
        ratios = exact * fct_means(scenario, "adaptive") / known
        gaps[f"adaptive, {told} told"] = float(ratios.mean() - 1.0), float(ratios.std(ddof=1) / math.sqrt(seeds))
    return gaps


def main(argv: Sequence[str] | None = None) -> int:
    options = parser(__doc__.splitlines()[0])
    arguments = options.parse_args(argv)
    clusters = CLUSTERS[:3] if arguments.quick else CLUSTERS
    replicas, flows = (8, 4_000) if arguments.quick else (32, 30_000)
    seeds, seconds = (4, 60.0) if arguments.quick else (10, 200.0)
    cases, tables, worst_error = [], [], 0.0
    for cores, speeds in clusters:
        for load in LOADS:
            case, best = solve(cores, speeds, load, MOST[len(cores)][load])
            for name, (gap, error) in pretrained_gaps(case, seeds, seconds).items():
                case.gaps[name] = gap
                worst_error = max(worst_error, error)
            cases.append(case)
            tables.append(best)
    names = list(cases[0].gaps)
    rows: list[tuple[object, ...]] = [
        (
            "; ".join(", ".join(map(str, part)) for part in (case.cores, case.speeds)),
            case.load,
            round(case.optimum, 3),
            *(f"{100 * case.gaps[name]:+.2f}" for name in names),
        )
        for case in cases
    ]
    for what, of in (("mean", mean), ("worst", max)):
        rows.append((what, "", "", *(f"{100 * of([case.gaps[name] for case in cases]):+.2f}" for name in names)))
    header = ("cores; speeds", "load", "optimal flows", *(f"{name}, %" for name in names))
    text = markdown(rows, header)
    text += f"\n\nStandard error of a gap of adaptive: at most {100 * worst_error:.2f} percentage points."

    errors = []
    for size in sorted({len(case.cores) for case in cases}):
        case = max((c for c in cases if len(c.cores) == size), key=lambda c: c.load)
        fewer = solve(case.cores, case.speeds, case.load, MOST[size][case.load] * 4 // 5)[0]
        errors.append((size, case.load, fewer.optimum / case.optimum - 1.0))
        errors[-1] += (max(abs(gap - case.gaps[name]) for name, gap in fewer.gaps.items()),)
    rows = [(size, load, f"{100 * one:.4f}", f"{100 * other:.4f}") for size, load, one, other in errors]
    text += "\n\n" + markdown(rows, ("servers", "load", "a fifth less room: optimum, %", "gaps, percentage points"))
    simulated = []
    for i in range(0, len(cases), 3 if arguments.quick else 7):
        case = cases[i]
        exact = case.optimum / (case.load * float(np.dot(case.cores, case.speeds))) * MEAN
        most = MOST[len(case.cores)][case.load]
        for what, (measured, error), expected in (
            ("the optimal table", simulate_table(case, tables[i], most, replicas, flows), exact),
            (
                "oracle_whittle",
                simulate_rule(case, "oracle_whittle", replicas, flows / 10),
                exact * (1 + case.gaps["whittle"]),
            ),
            ("marginal", simulate_rule(case, "marginal", replicas, flows / 10), exact * (1 + case.gaps["marginal"])),
        ):
            simulated.append((what, case, expected, measured, error))
    rows = [
        (
            what,
            str(case.cores),
            str(case.speeds),
            case.load,
            1e3 * expected,
            1e3 * measured,
            (measured - expected) / error,
        )
        for what, case, expected, measured, error in simulated
    ]
    text += "\n\n" + markdown(rows, ("simulated", "cores", "speeds", "load", "exact, ms", "ms", "standard errors off"))
    gaps = [case.gaps["whittle"] for case in cases]
    farthest = max(abs(measured - expected) / error for _, _, expected, measured, error in simulated)
    targets = [
        ("whittle above the optimum in the mean, %", 1.5, 100 * mean(gaps)),
        ("whittle above the optimum at worst, %", 3.0, 100 * max(gaps)),
        ("simulated mean FCT, standard errors off", 4.0, farthest),
        ("truncation: change of a gap by a fifth less room, %", 0.1, 100 * max(error[3] for error in errors)),
    ]
    text += "\n\n" + markdown([(n, w, r, r <= w) for n, w, r in targets], ("target", "at most", "measured", "reached"))
    data = {
        "cases": [vars(case) for case in cases],
        "targets": [{"name": n, "at_most": w, "measured": r, "reached": r <= w} for n, w, r in targets],
    }
    report("optimum", arguments, text, data)
    return 0 if all(r <= w for _, w, r in targets) else 1


if __name__ == "__main__":
    sys.exit(main())
