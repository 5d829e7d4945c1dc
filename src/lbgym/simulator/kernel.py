"""The event loop of one replica, compiled.

A server is brought up to date only when somebody looks at it: when a flow is placed on it, when a rule reads its
counters, at an event and at the end of an interval. Between looks its flows finish in its own order of virtual time;
servers do not influence each other but through the dispatch of arrivals, so this is exact.
"""

from __future__ import annotations

import math

import numpy as np

from ..features.compile import compiled
from ..features.reservoir_kernel import RNG, reservoir_add, reservoir_features
from ..features.rng import next_exponential, next_u64, stream_seed, to_range
from .arrivals import begin_arrivals, next_arrival
from .dispatch import (
    better_of_two,
    dispatch_by_hash,
    dispatch_hash,
    flow_score,
    is_oracle,
    is_two_choice,
    keeps_scores,
    least_work,
    refresh_balancer,
    second_hash,
    usable_cores,
    uses_counters,
)
from .layout import (
    B_BACKGROUND,
    B_CORES,
    B_OPEN,
    B_SCORE,
    B_WEIGHT,
    COMPLETED,
    DONE,
    DOWN,
    DRAINING,
    EVENT_DOWN,
    EVENT_SPEED,
    EVENT_UP,
    EXTERNAL,
    F_ARRIVAL,
    F_BALANCER,
    F_DEMAND,
    F_FREE,
    F_HEAP,
    F_ID,
    F_WAIT,
    FAILED,
    GROW_FLOWS,
    GROW_LOG,
    L_ARRIVAL,
    L_BALANCER,
    L_DEMAND,
    L_FCT,
    L_ID,
    L_SERVER,
    L_STATUS,
    NUM_BF,
    ORACLE_LEAST_WORK,
    P_ALGORITHM,
    P_COST,
    P_LOG_DECAY,
    P_PACKET_WORK,
    P_PROBABILITY,
    P_RECORD,
    P_RESERVOIRS,
    P_RULE,
    P_SERVERS,
    P_SERVICE,
    P_TABLE_SIZE,
    P_TIMEOUT,
    PAUSED,
    R_ACTIVE,
    R_CHOICE,
    R_CLOCK,
    R_EVENT,
    R_FLOWS,
    R_INTERVAL_START,
    R_LOG_SLOWDOWN,
    R_LOGGED,
    R_LOST,
    R_NEXT_ARRIVAL,
    R_NEXT_DEMAND,
    R_NEXT_HASH,
    R_OPEN,
    R_QUEUE_INTEGRAL,
    R_RECORDED,
    R_RNG_ARRIVAL,
    R_RNG_DEMAND,
    R_RNG_HASH,
    R_RUNNING,
    R_SEQUENCE,
    R_SLOWDOWN,
    R_TARGET,
    R_UNROUTED,
    REJECTED,
    S_BUSY_BEFORE,
    S_BUSY_INTEGRAL,
    S_CLOCK,
    S_COMPLETED,
    S_FAILED,
    S_FCT_SUM,
    S_INVERSE_SPEED,
    S_LOST_TIME,
    S_PACE,
    S_PACKET,
    S_QUEUE_INTEGRAL,
    S_REJECTED,
    S_RNG_PACKET,
    S_SERVED,
    S_SPEED,
    S_STARTED,
    S_STATUS,
    S_VIRTUAL,
    S_WAIT_HEAD,
    S_WAITING,
    S_WORK_DONE,
    S_WORK_LEFT,
    UNROUTED,
    UP,
    V_BACKLOG,
    V_CORES,
    V_INVERSE_CORES,
    V_MEMORY,
    V_MEMORY_FLOW,
    V_MEMORY_IDLE,
    V_SPEED,
    V_WORKERS,
    WORK_PER_CALL,
)
from .tournament import first_due, first_least, first_minimum, renew

FCT, DURATION = 0, 1
_TINY = 1e-9
_ARRIVAL, _DEMAND, _HASH, _PACKET, _RESERVOIR = 1, 2, 3, 4, 5


@compiled(inline=True)
def _log_flow(pi, rf, ri, log, record, flow, arrival, fct, demand, server, balancer, status):
    if pi[P_SERVICE] == 1:
        log[ri[R_LOGGED]] = fct
        ri[R_LOGGED] += 1
        # The sum of logarithms as the logarithm of products, taken before they can overflow.
        product = rf[R_SLOWDOWN] * (max(fct, _TINY) / max(demand, _TINY))
        if product > 1e150 or product < 1e-150:
            rf[R_LOG_SLOWDOWN] += math.log(product)
            product = 1.0
        rf[R_SLOWDOWN] = product
    if pi[P_RECORD] == 1:
        row = record[ri[R_RECORDED]]
        row[L_ID] = flow
        row[L_ARRIVAL] = arrival
        row[L_FCT] = fct
        row[L_DEMAND] = demand
        row[L_SERVER] = server
        row[L_BALANCER] = balancer
        row[L_STATUS] = status
        ri[R_RECORDED] += 1


@compiled(inline=True)
def _count_open(rule, b, j, change, bf, bi, score, si):
    """Change balancer ``b``'s count of open flows on server ``j``, whose own is changed, and the score by them."""
    bi[b, j, B_OPEN] += change
    if keeps_scores(rule) and si[j, S_STATUS] == UP:
        held = bi[b, j, B_OPEN]
        if is_oracle(rule):
            b = 0
            held = si[j, S_SERVED] + si[j, S_WAITING]
        before = score[b, j]
        score[b, j] = flow_score(rule, score.shape[0], held, bf[b, j, B_SCORE], bf[b, j])
        if score.shape[1] > si.shape[0]:
            renew(score[b], si.shape[0], j, before)


@compiled(inline=True)
def _has_tree(rule, departure, si):
    """True if departures are found by the tree over them, not by a look at every server."""
    return departure.shape[0] > si.shape[0] and uses_counters(rule)


@compiled(inline=True)
def _sift_up(heap, flow_i, k, key, slot):
    while k > 0:
        parent = (k - 1) >> 1
        if heap[parent] <= key:
            break
        heap[k] = heap[parent]
        flow_i[k, F_HEAP] = flow_i[parent, F_HEAP]
        k = parent
    heap[k] = key
    flow_i[k, F_HEAP] = slot


@compiled(inline=True)
def _pop_root(heap, flow_i, n):
    """Remove the least of ``n`` keys."""
    key = heap[n - 1]
    slot = flow_i[n - 1, F_HEAP]
    n -= 1
    k = 0
    while True:
        child = 2 * k + 1
        if child >= n:
            break
        if child + 1 < n and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= key:
            break
        heap[k] = heap[child]
        flow_i[k, F_HEAP] = flow_i[child, F_HEAP]
        k = child
    heap[k] = key
    flow_i[k, F_HEAP] = slot


@compiled(inline=True)
def _schedule(j, server_f, sf, si, heap, departure):
    """The flows' pace and the time of the next departure, after the flows in service or the speed have changed."""
    n = si[j, S_SERVED]
    if n == 0:
        sf[j, S_PACE] = math.inf
        sf[j, S_VIRTUAL] = 0.0
        departure[j] = math.inf
        return
    # Seconds per core-second, the inverse of the rate: products where there would be divisions.
    pace = sf[j, S_INVERSE_SPEED]
    if n > server_f[j, V_CORES]:
        pace *= n * server_f[j, V_INVERSE_CORES]
    sf[j, S_PACE] = pace
    departure[j] = sf[j, S_CLOCK] + (heap[0] - sf[j, S_VIRTUAL]) * pace


@compiled(inline=True)
def _elapse(j, until, gained, cores, pf, pi, sf, si, flow_f, flow_i, values, sample_weights, meta, result):
    """Let time pass on a server while nothing arrives or departs: integrals, and the packets seen meanwhile.

    ``gained`` is the service that each flow under service receives until then, core-seconds.
    """
    elapsed = until - sf[j, S_CLOCK]
    n = si[j, S_SERVED]
    if n > 0 and elapsed > 0.0:
        work = gained * n
        sf[j, S_VIRTUAL] += gained
        sf[j, S_QUEUE_INTEGRAL] += elapsed * (n + si[j, S_WAITING])
        sf[j, S_BUSY_INTEGRAL] += elapsed * min(np.float64(n), cores)
        sf[j, S_WORK_DONE] += work
        sf[j, S_WORK_LEFT] -= work
        packet = sf[j, S_PACKET]
        if packet <= work:
            start = sf[j, S_CLOCK]
            while packet <= work:
                slot = flow_i[to_range(next_u64(si[j], S_RNG_PACKET), n), F_HEAP]
                b = flow_i[slot, F_BALANCER]
                now = start + packet * sf[j, S_PACE] / n
                reservoir_add(
                    values[b, j, DURATION],
                    sample_weights[b, j, DURATION],
                    meta[b, j, DURATION],
                    result[b, j, DURATION],
                    now - flow_f[slot, F_ARRIVAL],
                    now,
                    pf[P_PROBABILITY],
                    pi[P_ALGORITHM],
                    pf[P_LOG_DECAY],
                )
                packet += pf[P_PACKET_WORK] * next_exponential(si[j], S_RNG_PACKET)
        sf[j, S_PACKET] = packet - work
    sf[j, S_CLOCK] = until


@compiled(inline=True)
def _release(j, slot, sf, si, flow_i):
    """Give a flow's slot back."""
    free = flow_i.shape[0] - si[j, S_SERVED] - si[j, S_WAITING]
    flow_i[free, F_FREE] = slot


@compiled(inline=True)
def _sample_fct(b, j, fct, now, pf, pi, values, sample_weights, meta, result):
    if pi[P_RESERVOIRS] == 1:
        reservoir_add(
            values[b, j, FCT],
            sample_weights[b, j, FCT],
            meta[b, j, FCT],
            result[b, j, FCT],
            fct,
            now,
            pf[P_PROBABILITY],
            pi[P_ALGORITHM],
            pf[P_LOG_DECAY],
        )


@compiled(inline=True)
def _depart(
    j, until, rule, pf, pi, server_f, rf, ri, sf, si, departure, heap, flow_f, flow_i, bf, bi, score,
    values, sample_weights, meta, result, log, record,
):  # fmt: skip
    """Every departure from server ``j`` up to ``until``, in order; its clock stops at the last one."""
    cores = server_f[j, V_CORES]
    before = departure[j]
    while departure[j] <= until:
        now = departure[j]
        gained = heap[j, 0] - sf[j, S_VIRTUAL]
        _elapse(j, now, gained, cores, pf, pi, sf, si, flow_f[j], flow_i[j], values, sample_weights, meta, result)
        slot = flow_i[j, 0, F_HEAP]
        sf[j, S_VIRTUAL] = heap[j, 0]
        _pop_root(heap[j], flow_i[j], si[j, S_SERVED])
        _release(j, slot, sf, si, flow_i[j])
        si[j, S_SERVED] -= 1
        si[j, S_COMPLETED] += 1
        ri[R_OPEN] -= 1
        b = np.int64(flow_i[j, slot, F_BALANCER])
        arrival = flow_f[j, slot, F_ARRIVAL]
        fct = now - arrival
        sf[j, S_FCT_SUM] += fct
        _count_open(rule, b, j, -1, bf, bi, score, si)
        _sample_fct(b, j, fct, now, pf, pi, values, sample_weights, meta, result)
        _log_flow(
            pi, rf, ri, log, record, flow_f[j, slot, F_ID], arrival, fct, flow_f[j, slot, F_DEMAND], j, b, COMPLETED
        )
        if si[j, S_WAITING] > 0:
            head = si[j, S_WAIT_HEAD]
            following = flow_i[j, head, F_WAIT]
            si[j, S_WAIT_HEAD] = head + 1 if head + 1 < flow_i.shape[1] else 0
            si[j, S_WAITING] -= 1
            if si[j, S_SERVED] == 0:
                sf[j, S_VIRTUAL] = 0.0
            key = sf[j, S_VIRTUAL] + flow_f[j, following, F_DEMAND]
            _sift_up(heap[j], flow_i[j], si[j, S_SERVED], key, following)
            si[j, S_SERVED] += 1
        elif si[j, S_SERVED] == 0:
            sf[j, S_WORK_LEFT] = 0.0
        _schedule(j, server_f, sf, si, heap[j], departure)
    if _has_tree(rule, departure, si):
        renew(departure, si.shape[0], j, before)


@compiled(inline=True)
def _place(
    b, j, now, demand, rule, pf, pi, server_f, server_i, rf, ri, sf, si, departure, heap, flow_f, flow_i, bf, bi, score,
    values, sample_weights, meta, result, log, record,
):  # fmt: skip
    """Give a flow of balancer ``b`` to server ``j``, whose departures up to ``now`` are done."""
    cores = server_f[j, V_CORES]
    gained = (now - sf[j, S_CLOCK]) / sf[j, S_PACE]
    _elapse(j, now, gained, cores, pf, pi, sf, si, flow_f[j], flow_i[j], values, sample_weights, meta, result)
    flow = np.float64(ri[R_FLOWS])
    si[j, S_STARTED] += 1
    served = si[j, S_SERVED]
    waiting = si[j, S_WAITING]
    serve = served < server_i[j, V_WORKERS]
    if not serve and waiting >= server_i[j, V_BACKLOG]:
        si[j, S_REJECTED] += 1
        ri[R_LOST] += 1
        _sample_fct(b, j, pf[P_TIMEOUT], now, pf, pi, values, sample_weights, meta, result)
        _log_flow(pi, rf, ri, log, record, flow, now, pf[P_TIMEOUT], demand, j, b, REJECTED)
        return
    capacity = flow_i.shape[1]
    slot = flow_i[j, capacity - served - waiting - 1, F_FREE]
    flow_f[j, slot, F_ARRIVAL] = now
    flow_f[j, slot, F_DEMAND] = demand
    flow_f[j, slot, F_ID] = flow
    flow_i[j, slot, F_BALANCER] = b
    ri[R_OPEN] += 1
    sf[j, S_WORK_LEFT] += demand
    if serve:
        _sift_up(heap[j], flow_i[j], served, sf[j, S_VIRTUAL] + demand, slot)
        si[j, S_SERVED] = served + 1
        before = departure[j]
        _schedule(j, server_f, sf, si, heap[j], departure)
        if _has_tree(rule, departure, si):
            renew(departure, si.shape[0], j, before)
    else:
        position = si[j, S_WAIT_HEAD] + waiting
        flow_i[j, position if position < capacity else position - capacity, F_WAIT] = slot
        si[j, S_WAITING] = waiting + 1
    _count_open(rule, b, j, 1, bf, bi, score, si)


@compiled()
def _refresh_active(rule, table_size, ri, sf, si, active, bf, bi, score, maglev):
    n = si.shape[0]
    count = 0
    for j in range(n):
        if si[j, S_STATUS] == UP:
            active[count] = j
            count += 1
    ri[R_ACTIVE] = count
    for b in range(score.shape[0]):
        refresh_balancer(b, rule, table_size, ri, active, bf, bi, score, maglev, sf, si)


@compiled()
def _fail_flow(
    j,
    slot,
    now,
    rule,
    pf,
    pi,
    rf,
    ri,
    sf,
    si,
    flow_f,
    flow_i,
    bf,
    bi,
    score,
    values,
    sample_weights,
    meta,
    result,
    log,
    record,
):
    b = np.int64(flow_i[j, slot, F_BALANCER])
    arrival = flow_f[j, slot, F_ARRIVAL]
    si[j, S_FAILED] += 1
    ri[R_LOST] += 1
    ri[R_OPEN] -= 1
    sf[j, S_LOST_TIME] += now - arrival
    _count_open(rule, b, j, -1, bf, bi, score, si)
    _sample_fct(b, j, pf[P_TIMEOUT], now, pf, pi, values, sample_weights, meta, result)
    _log_flow(
        pi, rf, ri, log, record, flow_f[j, slot, F_ID], arrival, pf[P_TIMEOUT], flow_f[j, slot, F_DEMAND], j, b, FAILED
    )


@compiled()
def _fail_flows(
    j,
    now,
    rule,
    pf,
    pi,
    rf,
    ri,
    sf,
    si,
    flow_f,
    flow_i,
    bf,
    bi,
    score,
    values,
    sample_weights,
    meta,
    result,
    log,
    record,
):
    """Lose every flow that server ``j`` holds."""
    capacity = flow_i.shape[1]
    for k in range(si[j, S_SERVED]):
        slot = flow_i[j, k, F_HEAP]
        _fail_flow(
            j, slot, now, rule, pf, pi, rf, ri, sf, si, flow_f, flow_i, bf, bi, score,
            values, sample_weights, meta, result, log, record,
        )  # fmt: skip
    for k in range(si[j, S_WAITING]):
        slot = flow_i[j, (si[j, S_WAIT_HEAD] + k) % capacity, F_WAIT]
        _fail_flow(
            j, slot, now, rule, pf, pi, rf, ri, sf, si, flow_f, flow_i, bf, bi, score,
            values, sample_weights, meta, result, log, record,
        )  # fmt: skip
    si[j, S_SERVED] = 0
    si[j, S_WAITING] = 0
    si[j, S_WAIT_HEAD] = 0
    sf[j, S_WORK_LEFT] = 0.0
    for k in range(capacity):
        flow_i[j, k, F_FREE] = capacity - 1 - k


@compiled()
def _apply_event(
    event, now, rule, pf, pi, server_f, rf, ri, sf, si, departure, active, heap, flow_f, flow_i, bf, bi, score, maglev,
    values, sample_weights, meta, result, log, record,
):  # fmt: skip
    kind = int(event[1])
    j = int(event[2])
    if kind == EVENT_SPEED:
        sf[j, S_SPEED] = server_f[j, V_SPEED] * event[3]
        sf[j, S_INVERSE_SPEED] = 1.0 / sf[j, S_SPEED]
        if is_oracle(rule):
            refresh_balancer(0, rule, pi[P_TABLE_SIZE], ri, active, bf, bi, score, maglev, sf, si)
    else:
        if kind == EVENT_DOWN:
            si[j, S_STATUS] = DOWN
            _fail_flows(
                j, now, rule, pf, pi, rf, ri, sf, si, flow_f, flow_i, bf, bi, score,
                values, sample_weights, meta, result, log, record,
            )  # fmt: skip
        elif kind == EVENT_UP:
            si[j, S_STATUS] = UP
        elif si[j, S_STATUS] == UP:
            si[j, S_STATUS] = DRAINING
        _refresh_active(rule, pi[P_TABLE_SIZE], ri, sf, si, active, bf, bi, score, maglev)
    before = departure[j]
    _schedule(j, server_f, sf, si, heap[j], departure)
    if _has_tree(rule, departure, si):
        renew(departure, si.shape[0], j, before)


@compiled()
def _run(P, S, r, pause):
    """Simulate replica ``r`` until its target time.

    Returns DONE, which array must grow before it can go on, or PAUSED when it has worked for long.

    With ``pause`` the servers are left as they were last looked at, so that a stop on the way changes no bit. Under
    the rule EXTERNAL it also stops, and is DONE, at a flow whose server has not been chosen yet.
    """
    pf, pi, server_f, server_i = P.pf[r], P.pi[r], P.server_f[r], P.server_i[r]
    demand_law, levels, rate_events, events, table = P.demand[r], P.levels[r], P.rate_events[r], P.events[r], P.table
    rf, ri, sf, si = S.rf[r], S.ri[r], S.sf[r], S.si[r]
    departure, active, heap, flow_f, flow_i = S.departure[r], S.active[r], S.heap[r], S.flow_f[r], S.flow_i[r]
    bf, bi, score, maglev = S.bf[r], S.bi[r], S.score[r], S.maglev[r]
    values, sample_weights, meta, result = S.values[r], S.sample_weights[r], S.meta[r], S.result[r]
    log, record = S.log[r], S.record[r]
    n = pi[P_SERVERS]
    room = si.shape[0]
    balancers = score.shape[0]
    rule = pi[P_RULE]
    table_size = pi[P_TABLE_SIZE]
    counters = uses_counters(rule)
    tree = _has_tree(rule, departure, si)
    two_choice = is_two_choice(rule)
    external = rule == EXTERNAL
    target = rf[R_TARGET]
    capacity = flow_i.shape[1]
    # Per pass at most every open flow and the arrival can end.
    logged = log.shape[0] - 1 if pi[P_SERVICE] == 1 else np.int64(1) << 62
    recorded = record.shape[0] - 1 if pi[P_RECORD] == 1 else np.int64(1) << 62
    enough = ri[R_FLOWS] + max(np.int64(1), WORK_PER_CALL // pi[P_COST])
    fullest = 0
    for j in range(n):
        fullest = max(fullest, si[j, S_SERVED] + si[j, S_WAITING])
    while True:
        if fullest >= capacity:
            return GROW_FLOWS
        if ri[R_LOGGED] + ri[R_OPEN] > logged or ri[R_RECORDED] + ri[R_OPEN] > recorded:
            return GROW_LOG
        if ri[R_FLOWS] >= enough:
            return PAUSED
        now = rf[R_NEXT_ARRIVAL]
        arrival = True
        if events[ri[R_EVENT], 0] <= now:
            now = events[ri[R_EVENT], 0]
            arrival = False
        over = now > target
        if over:
            if pause:
                return DONE
            now = target
            arrival = False

        # Who must have let its flows depart by now: the candidates of a flow, or every server.
        candidates = n
        first = np.int64(-1)
        second = np.int64(0)
        b = 0
        h = np.uint64(0)
        if arrival:
            flow_hash = np.uint64(ri[R_NEXT_HASH])
            b = to_range(flow_hash, balancers)
            h = dispatch_hash(flow_hash)
            if ri[R_ACTIVE] == 0:
                candidates = n if external else 0
            elif two_choice:
                candidates = min(np.int64(2), ri[R_ACTIVE])
                one = to_range(h, ri[R_ACTIVE])
                first = np.int64(active[one])
                if candidates == 2:
                    two = to_range(second_hash(h), ri[R_ACTIVE] - 1)
                    second = np.int64(active[two + 1 if two >= one else two])
            elif not counters:
                candidates = 1
                first = dispatch_by_hash(b, rule, table_size, h, ri, active, bf, bi, maglev)
        everyone = candidates == n and (counters or not arrival)
        i = 0
        while i < candidates:
            # The next one that is due, in the order of the servers with and without a tree.
            if tree:
                k = first_due(departure, room, now)
                if k < 0:
                    break
            elif everyone:
                while i < n and not departure[i] <= now:
                    i += 1
                if i == n:
                    break
                k = np.int64(i)
                i += 1
            else:
                k = first if i == 0 else second
                i += 1
                if not departure[k] <= now:
                    continue
            _depart(
                k, now, rule, pf, pi, server_f, rf, ri, sf, si, departure, heap, flow_f, flow_i, bf, bi, score,
                values, sample_weights, meta, result, log, record,
            )  # fmt: skip

        if not arrival:
            for i in range(n):
                gained = (now - sf[i, S_CLOCK]) / sf[i, S_PACE]
                _elapse(
                    i, now, gained, server_f[i, V_CORES], pf, pi, sf, si, flow_f[i], flow_i[i], values, sample_weights,
                    meta, result,
                )  # fmt: skip
            if over:
                return DONE
            _apply_event(
                events[ri[R_EVENT]], now, rule, pf, pi, server_f, rf, ri, sf, si, departure, active, heap, flow_f,
                flow_i, bf, bi, score, maglev, values, sample_weights, meta, result, log, record,
            )  # fmt: skip
            ri[R_EVENT] += 1
            continue

        demand = rf[R_NEXT_DEMAND]
        # -1: there is no server for it.
        j = first
        if counters:
            if candidates > 0:
                if external:
                    if ri[R_CHOICE] == 0:
                        return DONE
                    j = ri[R_CHOICE] - 1
                    ri[R_CHOICE] = 0
                    if si[j, S_STATUS] != UP:
                        j = np.int64(-1)
                elif rule == ORACLE_LEAST_WORK:
                    start = to_range(h, ri[R_ACTIVE])
                    j = least_work(start, now, demand, ri, active, server_f, server_i, sf, si)
                else:
                    row = b
                    start = to_range(h, n)
                    if is_oracle(rule):
                        row = 0
                        start = np.int64(active[to_range(h, ri[R_ACTIVE])])
                    j = first_least(score[row], room, start) if tree else first_minimum(score[row], n, start)
        elif candidates == 2:
            j = better_of_two(b, rule, balancers, first, second, bf, bi)
        if j >= 0:
            _place(
                b, j, now, demand, rule, pf, pi, server_f, server_i, rf, ri, sf, si, departure, heap, flow_f, flow_i,
                bf, bi, score, values, sample_weights, meta, result, log, record,
            )  # fmt: skip
            fullest = max(fullest, si[j, S_SERVED] + si[j, S_WAITING])
        else:
            ri[R_UNROUTED] += 1
            ri[R_LOST] += 1
            _log_flow(pi, rf, ri, log, record, np.float64(ri[R_FLOWS]), now, pf[P_TIMEOUT], demand, -1, b, UNROUTED)
        ri[R_FLOWS] += 1
        next_arrival(pf, pi, demand_law, levels, rate_events, table, rf, ri)


@compiled()
def _set_weights(P, S, r, b, weights):
    """Hand a balancer its weights; rebuilds its table only when they have changed.

    ``weights`` [1, N], or with the background load [2, N], or with a table of scores, too [2 + Q, N].
    """
    pi, bf = P.pi[r], S.bf[r]
    changed = False
    rows = weights.shape[0]
    for j in range(weights.shape[1]):
        background = weights[1, j] if rows > 1 else 0.0
        if bf[b, j, B_WEIGHT] != weights[0, j] or bf[b, j, B_BACKGROUND] != background:
            bf[b, j, B_WEIGHT] = weights[0, j]
            bf[b, j, B_BACKGROUND] = background
            changed = True
        for q in range(2, rows):
            if bf[b, j, NUM_BF + q - 2] != weights[q, j]:
                bf[b, j, NUM_BF + q - 2] = weights[q, j]
                changed = True
    if changed:
        refresh_balancer(
            b,
            pi[P_RULE],
            pi[P_TABLE_SIZE],
            S.ri[r],
            S.active[r],
            bf,
            S.bi[r],
            S.score[r],
            S.maglev[r],
            S.sf[r],
            S.si[r],
        )


@compiled()
def _next_change(due, until):
    """The earliest time ``due`` [m, Q] before ``until``, its balancer and place; ``until`` and -1: there is none."""
    b = -1
    q = -1
    for k in range(due.shape[0]):
        for i in range(due.shape[1]):
            if due[k, i] < until:
                until = due[k, i]
                b = k
                q = i
    return until, b, q


@compiled()
def _select(values, low, high, k):
    """Hoare's quickselect: afterwards values[k] is in its ascending place among values[low:high + 1]."""
    while low < high:
        middle = (low + high) >> 1
        a, b, c = values[low], values[middle], values[high]
        pivot = max(min(a, b), min(max(a, b), c))
        i = low
        j = high
        while i <= j:
            while values[i] < pivot:
                i += 1
            while values[j] > pivot:
                j -= 1
            if i <= j:
                values[i], values[j] = values[j], values[i]
                i += 1
                j -= 1
        if k <= j:
            high = j
        elif k >= i:
            low = i
        else:
            return


@compiled()
def _percentile(values, n, end, q):
    """NumPy's default (linear) percentile ``q`` of the first ``n`` values, which it partly sorts.

    values[end] and all beyond are known to be in place or above: the larger percentile found before.
    """
    position = q * (n - 1)
    low = int(position)
    _select(values, 0, end, low)
    if low + 1 >= n:
        return values[low], low
    following = values[low + 1]
    for k in range(low + 2, min(end + 1, n)):
        following = min(following, values[k])
    return values[low] + (position - low) * (following - values[low]), low


@compiled()
def _observe(P, S, out, r):
    """Write what the balancers of replica ``r`` see now, and begin its next interval."""
    pi = P.pi[r]
    rf, ri, sf, si = S.rf[r], S.ri[r], S.sf[r], S.si[r]
    n = si.shape[0]
    ri[R_SEQUENCE] += 1
    out.sequence_id[r] = ri[R_SEQUENCE]
    out.timestamp[r] = rf[R_CLOCK]
    out.unrouted[r] = ri[R_UNROUTED]
    elapsed = rf[R_CLOCK] - rf[R_INTERVAL_START]
    queue = 0.0
    for j in range(n):
        out.active[r, j] = si[j, S_STATUS] == UP
        out.counts[0, r, j] = si[j, S_STARTED]
        out.counts[1, r, j] = si[j, S_COMPLETED]
        out.counts[2, r, j] = si[j, S_REJECTED]
        out.counts[3, r, j] = si[j, S_FAILED]
        queue += sf[j, S_QUEUE_INTEGRAL]
        cores = P.server_f[r, j, V_CORES]
        held = si[j, S_SERVED] + si[j, S_WAITING]
        if elapsed > 0.0:
            busy = (sf[j, S_BUSY_INTEGRAL] - sf[j, S_BUSY_BEFORE]) / (elapsed * cores)
        else:
            busy = min(np.float64(si[j, S_SERVED]), cores) / cores
        sf[j, S_BUSY_BEFORE] = sf[j, S_BUSY_INTEGRAL]
        memory = P.server_f[r, j, V_MEMORY_IDLE] + held * P.server_f[r, j, V_MEMORY_FLOW]
        if si[j, S_STATUS] == UP:
            out.ground_truth[r, j, 0] = min(1.0, max(0.0, busy))
            out.ground_truth[r, j, 1] = min(1.0, memory / P.server_f[r, j, V_MEMORY])
            out.ground_truth[r, j, 2] = si[j, S_SERVED]
        else:
            out.ground_truth[r, j, :] = 0.0
    for b in range(S.score.shape[1]):
        for j in range(n):
            row = out.stats[r, b, j]
            row[:] = 0.0
            if si[j, S_STATUS] != UP:
                continue
            row[0] = S.bi[r, b, j, B_OPEN]
            if pi[P_RESERVOIRS] == 1:
                for metric in range(2):
                    result = S.result[r, b, j, metric]
                    reservoir_features(
                        S.values[r, b, j, metric],
                        S.sample_weights[r, b, j, metric],
                        S.meta[r, b, j, metric],
                        result,
                    )
                    for k in range(5):
                        row[1 + 5 * metric + k] = result[k]
    service = out.service[r]
    service[:] = 0.0
    count = ri[R_LOGGED]
    if count > 0:
        fcts = S.log[r]
        total = 0.0
        for k in range(count):
            total += fcts[k]
        service[0] = count - ri[R_LOST]
        service[1] = ri[R_LOST]
        service[2] = total / count
        service[5], end = _percentile(fcts, count, count - 1, 0.99)
        service[4], end = _percentile(fcts, count, end, 0.9)
        service[3], end = _percentile(fcts, count, end, 0.5)
        service[6] = (rf[R_LOG_SLOWDOWN] + math.log(rf[R_SLOWDOWN])) / count
    if elapsed > 0.0:
        service[7] = (queue - rf[R_QUEUE_INTEGRAL]) / elapsed
    rf[R_QUEUE_INTEGRAL] = queue
    rf[R_LOG_SLOWDOWN] = 0.0
    rf[R_SLOWDOWN] = 1.0
    rf[R_INTERVAL_START] = rf[R_CLOCK]
    ri[R_LOGGED] = 0
    ri[R_LOST] = 0


@compiled()
def reset_replica(P, S, r, seed):
    """Empty servers at time 0, unit weights, every random stream from ``seed``.

    Nobody looks at what the servers beyond those that exist hold but at their status, which is down for good.
    """
    rf, ri, sf, si = S.rf[r], S.ri[r], S.sf[r], S.si[r]
    rf[:] = 0.0
    rf[R_SLOWDOWN] = 1.0
    ri[:] = 0
    sf[:] = 0.0
    si[:] = 0
    S.departure[r] = math.inf
    S.meta[r] = 0
    S.result[r] = 0.0
    S.bi[r] = 0
    S.bf[r] = 0.0
    n = P.pi[r, P_SERVERS]
    balancers = S.score.shape[1]
    capacity = S.flow_i.shape[2]
    si[n:, S_STATUS] = DOWN
    ri[R_RNG_ARRIVAL] = stream_seed(seed, _ARRIVAL, 0)
    ri[R_RNG_DEMAND] = stream_seed(seed, _DEMAND, 0)
    ri[R_RNG_HASH] = stream_seed(seed, _HASH, 0)
    for j in range(n):
        sf[j, S_SPEED] = P.server_f[r, j, V_SPEED]
        sf[j, S_INVERSE_SPEED] = 1.0 / sf[j, S_SPEED]
        sf[j, S_PACE] = math.inf
        si[j, S_RNG_PACKET] = stream_seed(seed, _PACKET, j)
        sf[j, S_PACKET] = math.inf
        if P.pi[r, P_RESERVOIRS] == 1 and P.pf[r, P_PACKET_WORK] < math.inf:
            sf[j, S_PACKET] = P.pf[r, P_PACKET_WORK] * next_exponential(si[j], S_RNG_PACKET)
        for k in range(capacity):
            S.flow_i[r, j, k, F_FREE] = capacity - 1 - k
        for b in range(balancers):
            S.bf[r, b, j, B_WEIGHT] = 1.0
            S.bf[r, b, j, B_CORES] = usable_cores(j, P.server_f[r], P.server_i[r])
            for q in range(S.bf.shape[3] - NUM_BF):
                S.bf[r, b, j, NUM_BF + q] = q
            if P.pi[r, P_RESERVOIRS] == 1:
                for metric in range(2):
                    S.meta[r, b, j, metric, RNG] = stream_seed(seed, _RESERVOIR, (b * n + j) * 2 + metric)
    _refresh_active(
        P.pi[r, P_RULE], P.pi[r, P_TABLE_SIZE], ri, sf, si, S.active[r], S.bf[r], S.bi[r], S.score[r], S.maglev[r]
    )
    begin_arrivals(P.pf[r], P.pi[r], P.levels[r], P.first_level[r], P.rate_events[r], P.table, rf, ri)
    next_arrival(P.pf[r], P.pi[r], P.demand[r], P.levels[r], P.rate_events[r], P.table, rf, ri)


@compiled()
def step_replicas(P, S, out, weights, due, queued, duration, first, last, status):
    """One interval of replicas ``first`` to ``last``: weights, ``duration`` seconds, observation.

    ``weights`` is [R, m, rows, N] as for :func:`_set_weights`, or has no replica to keep the present ones. ``queued``
    [R, m, Q, 2, N] come into force at the times ``due`` [R, m, Q] on the way; the entries used are set to infinity; no
    replica: none are queued. A replica
    whose ``status`` is DONE is left alone; one whose status is not DONE afterwards needs a larger array or another
    call, and the next call goes on where it stopped.
    """
    work = 0
    for r in range(first, last):
        if status[r] == DONE:
            continue
        if work >= WORK_PER_CALL:
            break
        work -= S.ri[r, R_FLOWS] * P.pi[r, P_COST]
        end = S.rf[r, R_CLOCK] + duration
        if S.ri[r, R_RUNNING] == 0:
            if weights.shape[0] > 0:
                for b in range(weights.shape[1]):
                    _set_weights(P, S, r, b, weights[r, b])
            S.ri[r, R_RUNNING] = 1
        # One call of _run for stops and for the end: it is most of the kernel, and each call is compiled anew.
        while True:
            target, b, q = end, -1, -1
            if due.shape[0] > 0:
                target, b, q = _next_change(due[r], end)
            if b < 0 or target > S.rf[r, R_CLOCK]:
                S.rf[r, R_TARGET] = target
                status[r] = _run(P, S, r, b >= 0)
                if b < 0 or status[r] != DONE:
                    break
            _set_weights(P, S, r, b, queued[r, b, q])
            due[r, b, q] = math.inf
        work += S.ri[r, R_FLOWS] * P.pi[r, P_COST]
        if status[r] == DONE:
            S.ri[r, R_RUNNING] = 0
            S.rf[r, R_CLOCK] = S.rf[r, R_TARGET]
            _observe(P, S, out, r)


@compiled()
def reset_replicas(P, S, out, seeds, chosen):
    """Reset and observe the ``chosen`` replicas; the others' part of ``out`` is left unwritten."""
    for r in range(seeds.shape[0]):
        if chosen[r]:
            reset_replica(P, S, r, seeds[r])
            _observe(P, S, out, r)
