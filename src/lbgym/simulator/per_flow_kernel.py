"""The event loop cut at arrivals, compiled: a flow waits until a caller has chosen its server."""

from __future__ import annotations

import math

import numpy as np

from ..features.compile import compiled
from ..features.rng import to_range
from .dispatch import present_capacity, unfinished_work
from .kernel import _percentile, _run, reset_replica
from .layout import (
    B_OPEN,
    DONE,
    Q_ACTIVE,
    Q_DELAY,
    Q_DEMAND,
    Q_GAP,
    Q_OPEN,
    Q_WORK,
    R_CHOICE,
    R_CLOCK,
    R_LOGGED,
    R_NEXT_ARRIVAL,
    R_NEXT_DEMAND,
    R_NEXT_HASH,
    R_RUNNING,
    R_TARGET,
    R_UNROUTED,
    S_CLOCK,
    S_COMPLETED,
    S_FAILED,
    S_FCT_SUM,
    S_QUEUE_INTEGRAL,
    S_REJECTED,
    S_SERVED,
    S_STATUS,
    S_WAITING,
    UP,
)

#: Later than anything that happens, and earlier than what never does.
_FOREVER = float(np.finfo(np.float64).max)


@compiled()
def _last_departure(departure):
    """The latest of the servers' next departures; below 0: every server is empty."""
    last = -1.0
    for j in range(departure.shape[0]):
        if departure[j] < math.inf:
            last = max(last, departure[j])
    return last


@compiled()
def _ask(P, S, out, r):
    """Write what may be known when the next flow of replica ``r`` arrives. Changes no server."""
    rf, ri, sf, si = S.rf[r], S.ri[r], S.sf[r], S.si[r]
    server_f, server_i = P.server_f[r], P.server_i[r]
    n = si.shape[0]
    now = rf[R_NEXT_ARRIVAL]
    waiting = now < math.inf
    if not waiting:
        now = rf[R_CLOCK]
        for j in range(n):
            now = max(now, sf[j, S_CLOCK])
    b = to_range(np.uint64(ri[R_NEXT_HASH]), S.score.shape[1])
    flow_seconds = 0.0
    fct_sum = 0.0
    completed = 0
    lost = ri[R_UNROUTED]
    for j in range(n):
        held = si[j, S_SERVED] + si[j, S_WAITING]
        flow_seconds += sf[j, S_QUEUE_INTEGRAL] + held * (now - sf[j, S_CLOCK])
        fct_sum += sf[j, S_FCT_SUM]
        completed += si[j, S_COMPLETED]
        lost += si[j, S_REJECTED] + si[j, S_FAILED]
        row = out.servers[r, j]
        if si[j, S_STATUS] == UP:
            row[Q_WORK] = unfinished_work(j, now, sf, si)
            row[Q_DELAY] = row[Q_WORK] / present_capacity(j, server_f, server_i, sf)
            row[Q_OPEN] = S.bi[r, b, j, B_OPEN]
            row[Q_ACTIVE] = 1.0
        else:
            row[:] = 0.0
    out.waiting[r] = waiting
    out.timestamp[r] = now
    out.flow[r, Q_DEMAND] = rf[R_NEXT_DEMAND] if waiting else 0.0
    out.flow[r, Q_GAP] = now - rf[R_CLOCK]
    out.flow_seconds[r] = flow_seconds
    out.ended[r, 0] = completed
    out.ended[r, 1] = lost
    out.fct_sum[r] = fct_sum
    rf[R_CLOCK] = now


@compiled()
def decide_replicas(P, S, out, choices, seeds, begin, final, first, last, status):
    """Place the waiting flow of replicas ``first`` to ``last`` and run to the next one.

    ``choices`` int64[R]: its server. Replicas marked in ``begin`` are reset from ``seeds`` instead; no flow comes after
    that of a replica marked in ``final``. A replica whose ``status`` is DONE is left alone; one whose status is not
    DONE afterwards needs a larger array, and the next call goes on where it stopped.
    """
    for r in range(first, last):
        if status[r] == DONE:
            continue
        ri = S.ri[r]
        if ri[R_RUNNING] == 0:
            if begin[r]:
                reset_replica(P, S, r, seeds[r])
            else:
                ri[R_CHOICE] = choices[r] + 1
            ri[R_RUNNING] = 1
        # Once no flow is to come, every server finishes what it holds.
        target = _FOREVER
        while target >= 0.0:
            S.rf[r, R_TARGET] = target
            status[r] = _run(P, S, r, target == _FOREVER)
            if status[r] == DONE and final[r] and not begin[r]:
                S.rf[r, R_NEXT_ARRIVAL] = math.inf
            if status[r] != DONE or S.rf[r, R_NEXT_ARRIVAL] < math.inf:
                break
            target = _last_departure(S.departure[r, : S.si.shape[1]])
        if status[r] == DONE:
            ri[R_RUNNING] = 0
            _ask(P, S, out, r)


@compiled()
def fct_quantiles(S, chosen, out):
    """p50, p90 and p99 of the FCTs of the flows that have ended in each ``chosen`` replica, to float64[R, 3]."""
    for r in range(chosen.shape[0]):
        count = S.ri[r, R_LOGGED]
        if chosen[r] and count > 0:
            fcts = S.log[r]
            out[r, 2], end = _percentile(fcts, count, count - 1, 0.99)
            out[r, 1], end = _percentile(fcts, count, end, 0.9)
            out[r, 0], end = _percentile(fcts, count, end, 0.5)
