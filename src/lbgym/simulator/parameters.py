"""A scenario as the kernel's parameters."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ScenarioError
from ..scenarios import DISPATCH_RULES, model
from ..scenarios import workload as laws
from . import layout as at
from .tournament import TREE_FROM

_EVENT_KINDS = {"speed": at.EVENT_SPEED, "down": at.EVENT_DOWN, "up": at.EVENT_UP, "drain": at.EVENT_DRAIN}


def _next_prime(n: int) -> int:
    while any(n % d == 0 for d in range(2, math.isqrt(n) + 1)):
        n += 1
    return n


@lru_cache(maxsize=1024)
def maglev_table_size(num_servers: int) -> int:
    """The least prime with at least 100 entries per server: no server is more than about 1 % off its share."""
    return _next_prime(max(100 * num_servers, 101))


def _demand_row(demand: laws.Demand) -> tuple[int, list[float]]:
    match demand:
        case laws.Deterministic():
            return at.DETERMINISTIC, [demand.mean]
        case laws.Exponential():
            return at.EXPONENTIAL, [demand.mean]
        case laws.Lognormal():
            variance = math.log1p(demand.cv**2)
            return at.LOGNORMAL, [math.log(demand.mean) - variance / 2, math.sqrt(variance)]
        case laws.BoundedPareto():
            tail = 1.0 - (demand.minimum / demand.maximum) ** demand.alpha
            return at.BOUNDED_PARETO, [1.0 / demand.alpha, demand.minimum, demand.maximum, tail]
        case laws.Hyperexponential():
            cumulative = np.cumsum(demand.probabilities).tolist()
            return at.HYPEREXPONENTIAL, [float(len(cumulative)), *cumulative, *demand.means]
        case laws.Empirical():
            return at.EMPIRICAL, [0.0]


def _modulation(arrivals: laws.Arrivals) -> tuple[NDArray[np.float64], NDArray[np.float64], bool]:
    """Levels [L, 2 + L], cumulative stationary law [L], fixed sojourns; levels scaled to a long-run mean of 1."""
    if isinstance(arrivals, laws.OnOff):
        arrivals = laws.ModulatedPoisson(
            levels=(1.0, arrivals.off_level), sojourns=(arrivals.on, arrivals.off), fixed_sojourns=not arrivals.random
        )
    if not isinstance(arrivals, laws.ModulatedPoisson):
        return np.zeros((1, 3)), np.ones(1), False
    stationary = arrivals.stationary()
    mean = float(stationary @ np.asarray(arrivals.levels))
    if mean <= 0.0:
        raise ScenarioError("ModulatedPoisson: the states that recur have level 0, so no flow would ever arrive")
    rows = np.column_stack(
        [
            np.asarray(arrivals.levels) / mean,
            np.asarray(arrivals.sojourns),
            np.cumsum(np.asarray(arrivals.transitions), axis=1),
        ]
    )
    return rows, np.cumsum(stationary), arrivals.fixed_sojourns


def scenario_rows(
    scenario: model.Scenario, dispatch: str, reservoirs: bool, service: bool, record: bool
) -> tuple[dict[str, NDArray[Any]], NDArray[np.float64] | None]:
    """One scenario's row of every parameter array, and its trace or measured demands for the table."""
    workload, sampling = scenario.workload, scenario.sampling
    pf, pi = np.zeros(at.NUM_PF), np.zeros(at.NUM_PI, np.int64)
    pf[at.P_RATE] = scenario.rate
    pf[at.P_TIMEOUT] = scenario.reject_timeout
    packets = sampling.packets_per_flow
    pf[at.P_PACKET_WORK] = workload.mean_demand / packets if packets > 0 and workload.mean_demand > 0 else math.inf
    pf[at.P_PROBABILITY] = sampling.probability
    pf[at.P_LOG_DECAY] = math.log(sampling.decay)
    pi[at.P_RULE] = DISPATCH_RULES.index(dispatch)
    pi[at.P_ALGORITHM] = int(sampling.algorithm == "uniform")
    pi[at.P_RESERVOIRS], pi[at.P_SERVICE], pi[at.P_RECORD] = reservoirs, service, record
    pi[at.P_TABLE_SIZE] = maglev_table_size(scenario.num_servers)
    pi[at.P_SERVERS] = scenario.num_servers
    scanned = scenario.num_servers if scenario.num_servers < TREE_FROM else 2 * TREE_FROM
    pi[at.P_COST] = 64 + scanned + int(32 * packets)

    demand_kind, demand = _demand_row(workload.demand)
    levels, first_level, fixed = _modulation(workload.arrivals)
    entries: NDArray[np.float64] | None = None
    if workload.trace is not None:
        trace = workload.trace
        trace = (
            replace(trace, times=trace.times / (scenario.rate / trace.rate)) if scenario.rate != trace.rate else trace
        )
        entries = np.column_stack([trace.times, trace.demands])
        pi[at.P_ARRIVALS] = at.TRACE
        pf[at.P_TRACE_PERIOD] = trace.period
        pi[at.P_TRACE_REPEAT], pi[at.P_TRACE_RANDOM] = trace.repeat, trace.random_start
    else:
        if isinstance(workload.arrivals, laws.Sinusoidal):
            pi[at.P_ARRIVALS] = at.SINUSOIDAL
            pf[at.P_AMPLITUDE] = workload.arrivals.amplitude
            pf[at.P_OMEGA] = 2.0 * math.pi / workload.arrivals.period
            pf[at.P_PHASE] = workload.arrivals.phase
        elif isinstance(workload.arrivals, (laws.ModulatedPoisson, laws.OnOff)):
            pi[at.P_ARRIVALS] = at.MODULATED
            pi[at.P_NUM_LEVELS] = len(levels)
            pi[at.P_FIXED_SOJOURNS] = fixed
        pi[at.P_DEMAND] = demand_kind
        if isinstance(workload.demand, laws.Empirical):
            entries = np.column_stack([np.zeros(len(workload.demand.values)), workload.demand.values])

    rates = [[e.time, e.value] for e in scenario.events if e.kind == "rate"]
    others = [[e.time, _EVENT_KINDS[e.kind], e.server, e.value or 0.0] for e in scenario.events if e.kind != "rate"]
    unlimited = 1 << 60
    rows: dict[str, NDArray[Any]] = {
        "pf": pf,
        "pi": pi,
        "server_f": np.array(
            [
                [s.cores, 1.0 / s.cores, s.speed, s.memory_mb, s.memory_idle_mb, s.memory_per_flow_mb]
                for s in scenario.servers
            ],
            np.float64,
        ),
        "server_i": np.array(
            [
                [unlimited if s.workers is None else s.workers, unlimited if s.backlog is None else s.backlog]
                for s in scenario.servers
            ],
            np.int64,
        ),
        "demand": np.array(demand),
        "levels": levels,
        "first_level": first_level,
        "rate_events": np.array([*rates, [math.inf, 0.0]]),
        "events": np.array([*others, [math.inf] * 4]),
    }
    return rows, entries
