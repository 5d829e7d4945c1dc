"""Arrivals, demands and hashes: functions of the seed and the scenario only, never of the actions."""

from __future__ import annotations

import math

import numpy as np

from ..features.compile import compiled
from ..features.rng import next_exponential, next_u64, to_range, to_unit
from .layout import (
    BOUNDED_PARETO,
    DETERMINISTIC,
    EMPIRICAL,
    EXPONENTIAL,
    HYPEREXPONENTIAL,
    MODULATED,
    P_AMPLITUDE,
    P_ARRIVALS,
    P_DEMAND,
    P_FIXED_SOJOURNS,
    P_NUM_LEVELS,
    P_OMEGA,
    P_PHASE,
    P_RATE,
    P_TABLE_LENGTH,
    P_TABLE_START,
    P_TRACE_PERIOD,
    P_TRACE_RANDOM,
    P_TRACE_REPEAT,
    POISSON,
    R_ANCHOR_TIME,
    R_ANCHOR_TRACE,
    R_FACTOR,
    R_MOD_STATE,
    R_MOD_UNTIL,
    R_NEXT_ARRIVAL,
    R_NEXT_DEMAND,
    R_NEXT_HASH,
    R_RATE_EVENT,
    R_RNG_ARRIVAL,
    R_RNG_DEMAND,
    R_RNG_HASH,
    R_TRACE_BASE,
    R_TRACE_POSITION,
    SINUSOIDAL,
    TRACE,
)


@compiled()
def _pick(cumulative, u):
    """Index of the first entry of a cumulative law that reaches u in (0, 1]; the last one if rounding left it below."""
    last = cumulative.shape[0] - 1
    for i in range(last):
        if u <= cumulative[i]:
            return i
    return last


@compiled(inline=True)
def _draw_demand(pi, demand, table, ri):
    kind = pi[P_DEMAND]
    if kind == EXPONENTIAL:
        return demand[0] * next_exponential(ri, R_RNG_DEMAND)
    if kind == DETERMINISTIC:
        return demand[0]
    if kind == EMPIRICAL:
        return table[pi[P_TABLE_START] + to_range(next_u64(ri, R_RNG_DEMAND), pi[P_TABLE_LENGTH]), 1]
    u = to_unit(next_u64(ri, R_RNG_DEMAND))
    if kind == BOUNDED_PARETO:
        # demand: 1 / alpha, minimum, maximum, 1 - (minimum / maximum) ** alpha. Inversion; u = 1 gives the minimum.
        return min(demand[2], demand[1] * (1.0 - (1.0 - u) * demand[3]) ** -demand[0])
    if kind == HYPEREXPONENTIAL:
        # demand: k, cumulative probabilities, means
        k = int(demand[0])
        branch = _pick(demand[1 : 1 + k], u)
        return demand[1 + k + branch] * next_exponential(ri, R_RNG_DEMAND)
    # Lognormal by Box and Muller; demand: location, scale
    angle = 2.0 * math.pi * to_unit(next_u64(ri, R_RNG_DEMAND))
    return math.exp(demand[0] + demand[1] * math.sqrt(-2.0 * math.log(u)) * math.cos(angle))


@compiled()
def _enter_level(pi, levels, rf, ri, now, state, first):
    """Begin a visit to a modulating state; a fixed first visit is cut to its uniformly distributed rest."""
    ri[R_MOD_STATE] = state
    sojourn = levels[state, 1]
    if pi[P_FIXED_SOJOURNS] == 0:
        sojourn *= next_exponential(ri, R_RNG_ARRIVAL)
    elif first:
        sojourn *= to_unit(next_u64(ri, R_RNG_ARRIVAL))
    rf[R_MOD_UNTIL] = now + sojourn


@compiled()
def begin_arrivals(pf, pi, levels, first_level, rate_events, table, rf, ri):
    """Prepare the arrival process at time 0."""
    rf[R_NEXT_ARRIVAL] = 0.0
    rf[R_FACTOR] = 1.0
    rf[R_MOD_UNTIL] = math.inf
    ri[R_RATE_EVENT] = 0
    if pi[P_ARRIVALS] == MODULATED:
        n = pi[P_NUM_LEVELS]
        state = _pick(first_level[:n], to_unit(next_u64(ri, R_RNG_ARRIVAL)))
        _enter_level(pi, levels, rf, ri, 0.0, state, True)
    elif pi[P_ARRIVALS] == TRACE:
        rf[R_ANCHOR_TIME] = 0.0
        rf[R_TRACE_BASE] = 0.0
        ri[R_TRACE_POSITION] = 0
        rf[R_ANCHOR_TRACE] = 0.0
        if pi[P_TRACE_RANDOM] == 1:
            position = to_range(next_u64(ri, R_RNG_ARRIVAL), pi[P_TABLE_LENGTH])
            ri[R_TRACE_POSITION] = position
            rf[R_ANCHOR_TRACE] = table[pi[P_TABLE_START] + position, 0]


@compiled()
def _next_of_trace(pf, pi, rate_events, table, rf, ri):
    position = ri[R_TRACE_POSITION]
    length = pi[P_TABLE_LENGTH]
    if position == length:
        if pi[P_TRACE_REPEAT] == 0:
            rf[R_NEXT_ARRIVAL] = math.inf
            return
        rf[R_TRACE_BASE] += pf[P_TRACE_PERIOD]
        position = 0
    entry = table[pi[P_TABLE_START] + position]
    time = rf[R_TRACE_BASE] + entry[0]
    # A rate event changes the speed of the replay; between events times are exact, not sums of gaps.
    while True:
        change = rate_events[ri[R_RATE_EVENT], 0]
        factor = rf[R_FACTOR]
        arrival = math.inf
        if factor > 0.0:
            arrival = rf[R_ANCHOR_TIME] + (time - rf[R_ANCHOR_TRACE]) / factor
        if arrival <= change:
            break
        rf[R_ANCHOR_TRACE] += (change - rf[R_ANCHOR_TIME]) * factor
        rf[R_ANCHOR_TIME] = change
        rf[R_FACTOR] = rate_events[ri[R_RATE_EVENT], 1]
        ri[R_RATE_EVENT] += 1
    rf[R_NEXT_ARRIVAL] = arrival
    rf[R_NEXT_DEMAND] = entry[1]
    ri[R_TRACE_POSITION] = position + 1


@compiled()
def _next_modulated(pf, pi, levels, rate_events, rf, ri):
    """A unit exponential is spent at the current rate across changes of level and rate events: exact, no waste.

    A sinusoid is thinned (Lewis and Shedler, 1979) from its peak rate.
    """
    now = rf[R_NEXT_ARRIVAL]
    sinusoidal = pi[P_ARRIVALS] == SINUSOIDAL
    amplitude = pf[P_AMPLITUDE] if sinusoidal else 0.0
    left = next_exponential(ri, R_RNG_ARRIVAL)
    while True:
        rate = pf[P_RATE] * rf[R_FACTOR] * (1.0 + amplitude)
        if pi[P_ARRIVALS] == MODULATED:
            rate *= levels[ri[R_MOD_STATE], 0]
        change = rate_events[ri[R_RATE_EVENT], 0]
        end = min(change, rf[R_MOD_UNTIL])
        if rate > 0.0 and now + left / rate <= end:
            now += left / rate
            if not sinusoidal:
                break
            intensity = 1.0 + amplitude * math.sin(pf[P_OMEGA] * now + pf[P_PHASE])
            if to_unit(next_u64(ri, R_RNG_ARRIVAL)) * (1.0 + amplitude) <= intensity:
                break
            left = next_exponential(ri, R_RNG_ARRIVAL)
            continue
        # Nothing will ever arrive: no end to wait for, or a last rate event of 0 while levels go on changing.
        if end == math.inf or (rf[R_FACTOR] == 0.0 and change == math.inf):
            now = math.inf
            break
        left -= rate * (end - now)
        now = end
        if end == change:
            rf[R_FACTOR] = rate_events[ri[R_RATE_EVENT], 1]
            ri[R_RATE_EVENT] += 1
        else:
            state = ri[R_MOD_STATE]
            n = pi[P_NUM_LEVELS]
            following = _pick(levels[state, 2 : 2 + n], to_unit(next_u64(ri, R_RNG_ARRIVAL)))
            _enter_level(pi, levels, rf, ri, now, following, False)
    rf[R_NEXT_ARRIVAL] = now


@compiled(inline=True)
def next_arrival(pf, pi, demand, levels, rate_events, table, rf, ri):
    """Draw the next flow: its arrival time, demand and hash."""
    ri[R_NEXT_HASH] = np.int64(next_u64(ri, R_RNG_HASH))
    if pi[P_ARRIVALS] == TRACE:
        _next_of_trace(pf, pi, rate_events, table, rf, ri)
        return
    if pi[P_ARRIVALS] == POISSON and rate_events[ri[R_RATE_EVENT], 0] == math.inf and rf[R_FACTOR] > 0.0:
        rf[R_NEXT_ARRIVAL] += next_exponential(ri, R_RNG_ARRIVAL) / (pf[P_RATE] * rf[R_FACTOR])
    else:
        _next_modulated(pf, pi, levels, rate_events, rf, ri)
    rf[R_NEXT_DEMAND] = _draw_demand(pi, demand, table, ri)
