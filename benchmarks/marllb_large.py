"""The large MARLLB testbed beside its published table: ``python -m benchmarks.marllb_large``.

One constant is fitted, the speed of a CPU, so that the mean FCT of LSQ at 398.5 flows/s is the published one; every
other figure follows. A run is what the testbed ran: 30,000 requests from an empty cluster, and the mean over those that
completed (Yao et al., CIKM 2022, table 7, 5 runs; the released scripts clip runs at 30,000 requests and leave failed
requests out of every statistic).

A CPU of the testbed is a hyper-thread: two that are busy on one core do not do twice the work of one. The second table
asks what that would explain: the same fit with three effective cores for every four CPUs.

ECMP of the testbed looks up a table of 64 entries for 24 servers, so 16 servers have 3 entries and 8 have 2. Which
ones is not known: here they are drawn anew for every run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import markdown, parser, report
from lbgym.scenarios import MARLLB_CPU_SPEED, Event, Scenario, load_scenario
from lbgym.simulator import Simulation

FLOWS = 30_000
RATES = (398.5, 419.3)
FITTED, FITTED_RATE = "LSQ", 398.5
#: Mean FCT and its standard deviation over runs, ms.
PUBLISHED = {
    "ECMP": ((5907.2, 550.1), (7841.1, 484.7)),
    "WCMP": ((629.9, 25.0), (1027.5, 65.5)),
    "LSQ": ((332.7, 1.6), (420.2, 2.0)),
    "SED": ((338.6, 0.7), (410.3, 2.3)),
}
#: Our name, the row of the published table, the dispatch rule, whether it knows the CPUs.
METHODS = (
    ("ECMP", "ECMP", "ecmp", False),
    ("ECMP, 64 entries", "ECMP", "wcmp", False),
    ("WCMP", "WCMP", "wcmp", True),
    ("LSQ", "LSQ", "lsq", False),
    ("SED", "SED", "sed", True),
)


def cluster(speed: float, rate: float, flows: int, share: float = 1.0) -> Scenario:
    """The testbed with a share of its CPUs, of some speed; arrivals end after about ``flows`` flows."""
    scenario = load_scenario("marllb-large")
    servers = tuple(replace(server, speed=speed, cores=round(share * server.cores)) for server in scenario.servers)
    return scenario.with_changes(servers=servers, rate=rate, events=(Event(time=flows / rate, kind="rate", value=0.0),))


def weights_of(method: str, scenario: Scenario, runs: int) -> NDArray[np.float64]:
    """Weights of every run and balancer, [R, m, N]."""
    n, m = scenario.num_servers, scenario.balancers
    if method == "ECMP, 64 entries":
        entries = np.arange(64) % n
        counts = np.bincount(entries, minlength=n).astype(float)
        drawn = [np.random.default_rng(seed).permutation(counts) for seed in range(runs)]
        return np.repeat(np.array(drawn)[:, None, :], m, axis=1)
    known = next(known for name, _, _, known in METHODS if name == method)
    return np.broadcast_to(scenario.core_weights if known else np.ones(n), (runs, m, n)).copy()


def run(method: str, speed: float, rate: float, runs: int, flows: int, share: float = 1.0) -> tuple[list[float], float]:
    """Mean FCT of the completed flows of each run, ms, and the share of flows that were not completed."""
    rule = next(rule for name, _, rule, _ in METHODS if name == method)
    scenario = cluster(speed, rate, flows, share)
    sim = Simulation(scenario, runs, dispatch=rule, reservoirs=False, service=False, num_threads=None)
    sim.reset(list(range(runs)))
    snapshot = sim.step(weights_of(method, scenario, runs), flows / rate + 1e4)
    completed = snapshot.completed.sum(axis=1)
    means = 1e3 * sim.integrals()["fct_sum"].sum(axis=1) / completed
    sim.close()
    return means.tolist(), 1.0 - float(completed.sum() / snapshot.started.sum())


def fitted_speed(runs: int, flows: int, share: float = 1.0) -> float:
    """Bisection: with the same flows throughout, the mean FCT of LSQ falls as the speed grows."""
    target = PUBLISHED[FITTED][RATES.index(FITTED_RATE)][0]
    low, high = 0.5, 2.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        if fmean(run(FITTED, middle, FITTED_RATE, runs, flows, share)[0]) > target:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def compared(runs: int, flows: int, share: float) -> tuple[str, dict[str, Any]]:
    """Fit, run every method at both rates, and set them beside the published table: as text and as data."""
    speed = fitted_speed(runs, flows, share)
    rows, results = [], []
    for name, row, _, _ in METHODS:
        cells = [name]
        for i, rate in enumerate(RATES):
            published, deviation = PUBLISHED[row][i]
            means, lost = run(name, speed, rate, runs, flows, share)
            mean, spread = fmean(means), float(np.std(means, ddof=1))
            cells += [f"{published:.1f} ±{deviation:.1f}", f"{mean:.1f} ±{spread:.1f}", f"{mean / published:.2f}"]
            cells.append(f"{100 * lost:.2g} %")
            facts = {"method": name, "rate": rate, "published_ms": published, "mean_ms": mean, "lost": lost}
            results.append(facts | {"run_means_ms": means})
        rows.append(cells)
    header = ["mean FCT, ms"]
    for rate in RATES:
        header += [f"published, {rate}/s", f"lbgym, {rate}/s", "ratio", "rejected"]
    loads = ", ".join(f"{cluster(speed, rate, flows, share).load:.3f} at {rate}/s" for rate in RATES)
    text = f"{share:g} cores per CPU; fitted speed of a core {speed:.4f}; load {loads}.\n\n" + markdown(rows, header)
    return text, {"cores_per_cpu": share, "speed": speed, "results": results}


def main(argv: Sequence[str] | None = None) -> int:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--runs", type=int, default=20)
    arguments = options.parse_args(argv)
    runs, flows = (4, 6_000) if arguments.quick else (arguments.runs, FLOWS)
    plain, plain_data = compared(runs, flows, 1.0)
    shared, shared_data = compared(runs, flows, 0.75)
    text = f"{plain}\n\n{shared}\n\n{runs} runs of {flows:,} flows each; ± is the standard deviation over runs. "
    text += f"Fitted: mean FCT of {FITTED} at {FITTED_RATE} flows/s. The scenario has a speed of {MARLLB_CPU_SPEED:g}."
    report("marllb_large", arguments, text, {"fits": [plain_data, shared_data]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
