"""Dispatch rules: from weights, counters and a flow's hash to a server.

All randomness comes from the flow's hash, as in a stateless data plane, so that two runs in which the weights differ
still throw the same dice for every flow.
"""

from __future__ import annotations

import math

import numpy as np

from ..features.compile import compiled
from ..features.rng import low_unit, mix64, to_range
from .layout import (
    B_ALIAS,
    B_ALIAS_PROBABILITY,
    B_BACKGROUND,
    B_CORES,
    B_CURRENT,
    B_OPEN,
    B_SCORE,
    B_WEIGHT,
    ECMP,
    EXTERNAL,
    LSQ,
    MAGLEV,
    MARGINAL,
    NUM_BF,
    ORACLE_LEAST_WORK,
    ORACLE_LSQ,
    ORACLE_MARGINAL,
    ORACLE_WHITTLE,
    P2C,
    P2C_MARGINAL,
    R_ACTIVE,
    S_CLOCK,
    S_PACE,
    S_SERVED,
    S_SPEED,
    S_STATUS,
    S_WAITING,
    S_WORK_LEFT,
    SCORES_BEYOND_CORES,
    SED_SCALED,
    TABLE,
    UP,
    V_CORES,
    V_WORKERS,
    WCMP,
    WHITTLE,
)
from .tournament import rebuild

#: Arrival rate that Whittle's index is computed for: this part of the capacity of all servers, and at most so many
#: times the server's own.
WHITTLE_LOAD, WHITTLE_OVERLOAD = 0.8, 1.5

_DISPATCH = np.uint64(0xD1B54A32D192ED03)
_SECOND = np.uint64(0x8CB92BA72F3D8DD7)
_MAGLEV_OFFSET = np.uint64(0xA0761D6478BD642F)
_MAGLEV_SKIP = np.uint64(0xE7037ED1A0B428DB)


@compiled(inline=True)
def dispatch_hash(flow_hash):
    """The part of a flow's hash that chooses the server; independent of the part that chooses the balancer."""
    return mix64(np.uint64(flow_hash) ^ _DISPATCH)


@compiled(inline=True)
def second_hash(h):
    """Another one, for the second candidate."""
    return mix64(h ^ _SECOND)


@compiled(inline=True)
def marginal_cost(flows, cores):
    """Increase of the total delay by one more flow on a server of total speed 1 that holds ``flows``.

    The flows of a server of c cores that holds n take n max(1, n / c) times a flow's own time together, in units of
    1 / (speed of a core); this is the difference from n to n + 1, over c. ``flows`` need not be whole.
    """
    if flows + 1.0 <= cores:
        return cores
    if flows >= cores:
        return 2.0 * flows + 1.0
    return (flows + 1.0) * (flows + 1.0) - cores * flows


@compiled(inline=True)
def table_score(view, columns, flows):
    """The table in a balancer's ``view`` of a server at ``flows``: linear between entries, and beyond the last one."""
    q = min(np.int64(flows), columns - 2)
    score = view[NUM_BF + q]
    part = flows - q
    # Entries are taken as they are.
    if part == 0.0:
        return score
    following = view[NUM_BF + q + 1]
    if part == 1.0:
        return following
    if part > 1.0:
        return following + (part - 1.0) * (following - score)
    return score + part * (following - score)


@compiled(inline=True)
def whittle_columns(view):
    """Scores that a table by Whittle's index has, whatever there is room for."""
    return np.int64(view[B_CORES]) + SCORES_BEYOND_CORES


@compiled()
def fill_whittle(view, weight, total):
    """Fill a table with Whittle's index of a server of this ``weight`` among servers of ``total`` weight.

    To a server of c cores that may refuse flows, they come at rate a, and it accepts them while it holds fewer than k:
    g(k) flows in the mean, throughput x(k). W(n) = (g(n + 1) - g(n)) / (x(n + 1) - x(n)) is the charge for a refusal at
    which to accept with n flows is as good as not to (Whittle, 1988; for queues Argon et al., 2009).
    In units of a flow's own time, with the weights pi of the chain, their sum Z(n) up to n, and mu(n) = min(n, c):
        W(n) = (n + 1 - g(n)) Z(n) / (mu(n + 1) B(n)),    B(n) = Z(n + 1) - a / mu(n + 1) Z(n),
    where B is constant from n = c - 1 on. Which a is best is found in benchmarks/optimum.py.
    """
    cores = view[B_CORES]
    unit = cores / weight
    rate = min(WHITTLE_LOAD * total * unit, WHITTLE_OVERLOAD * cores)
    probability = 1.0
    z = 1.0
    held = 0.0
    b = 1.0
    for n in range(whittle_columns(view)):
        mu = min(n + 1.0, cores)
        following = probability * rate / mu
        if n < cores:
            b = z + following - rate / mu * z
        view[NUM_BF + n] = unit * ((n + 1.0) - held / z) * (z / (mu * b))
        probability = following
        z += probability
        held += (n + 1.0) * probability
        if z > 1e100:
            probability *= 1e-100
            z *= 1e-100
            held *= 1e-100
            b *= 1e-100


@compiled(inline=True)
def flow_score(rule, balancers, held, weight, view):
    """A server's index: the score that every rule which counts flows minimises.

    Tables of scores by the flows ``held``, written as formulas where there is one. ``view`` is the balancer's view of
    the server.
    """
    if rule == SED_SCALED:
        held *= balancers
    flows = held + view[B_BACKGROUND]
    if rule == TABLE:
        return table_score(view, view.shape[0] - NUM_BF, flows)
    if rule == LSQ or rule == P2C or rule == ORACLE_LSQ:
        return flows
    if weight <= 0.0:
        return math.inf
    if rule == MARGINAL or rule == P2C_MARGINAL or rule == ORACLE_MARGINAL:
        return marginal_cost(flows, view[B_CORES]) / weight
    if rule == WHITTLE or rule == ORACLE_WHITTLE:
        return table_score(view, whittle_columns(view), flows)
    return (flows + 1.0) / weight


@compiled(allocates=True)
def build_alias(b, active, num_active, bf, bi):
    """Vose's alias table (1991) over the active servers of balancer ``b``."""
    stack = np.empty((2, num_active), np.int64)
    total = 0.0
    for k in range(num_active):
        total += bf[b, active[k], B_WEIGHT]
    small = 0
    large = 0
    for k in range(num_active):
        share = bf[b, active[k], B_WEIGHT] * num_active / total if total > 0.0 else 1.0
        bf[b, k, B_ALIAS_PROBABILITY] = share
        bi[b, k, B_ALIAS] = k
        if share < 1.0:
            stack[0, small] = k
            small += 1
        else:
            stack[1, large] = k
            large += 1
    while small > 0 and large > 0:
        small -= 1
        low = stack[0, small]
        high = stack[1, large - 1]
        bi[b, low, B_ALIAS] = high
        bf[b, high, B_ALIAS_PROBABILITY] -= 1.0 - bf[b, low, B_ALIAS_PROBABILITY]
        if bf[b, high, B_ALIAS_PROBABILITY] < 1.0:
            large -= 1
            stack[0, small] = high
            small += 1
    # What is left on either stack is 1 but for rounding.
    for k in range(small):
        bf[b, stack[0, k], B_ALIAS_PROBABILITY] = 1.0
    for k in range(large):
        bf[b, stack[1, k], B_ALIAS_PROBABILITY] = 1.0


@compiled(allocates=True)
def build_maglev(b, size, active, num_active, bf, maglev):
    """Weighted Maglev table of a prime ``size`` (Eisenbud et al., NSDI 2016, section 3.4).

    Every server walks its own permutation of the table, offset + i * skip mod size. In each round it earns its weight
    over the largest one, and takes its next free entry whenever it has earned a whole turn.
    """
    position = np.zeros(num_active, np.int64)
    skip = np.zeros(num_active, np.int64)
    credit = np.zeros(num_active)
    turn = np.zeros(num_active)
    heaviest = 0.0
    for k in range(num_active):
        heaviest = max(heaviest, bf[b, active[k], B_WEIGHT])
    for k in range(num_active):
        name = mix64(np.uint64(active[k]) + np.uint64(1))
        position[k] = np.int64(mix64(name ^ _MAGLEV_OFFSET) % np.uint64(size))
        skip[k] = np.int64(mix64(name ^ _MAGLEV_SKIP) % np.uint64(size - 1)) + 1
        turn[k] = bf[b, active[k], B_WEIGHT] / heaviest if heaviest > 0.0 else 1.0
    table = maglev[b, :size]
    table[:] = -1
    taken = 0
    while taken < size:
        for k in range(num_active):
            credit[k] += turn[k]
            if credit[k] < 1.0:
                continue
            credit[k] -= 1.0
            while table[position[k]] >= 0:
                position[k] = (position[k] + skip[k]) % size
            table[position[k]] = active[k]
            taken += 1
            if taken == size:
                break


@compiled()
def refresh_balancer(b, rule, table_size, ri, active, bf, bi, score, maglev, sf, si):
    """Rebuild what the rule needs after balancer ``b``'s weights, the active servers or their speeds have changed."""
    num_active = ri[R_ACTIVE]
    balancers = score.shape[0]
    n = si.shape[0]
    if keeps_scores(rule):
        oracle = is_oracle(rule)
        all_zero = not oracle
        for j in range(n):
            all_zero = all_zero and (si[j, S_STATUS] != UP or bf[b, j, B_WEIGHT] <= 0.0)
        fill = rule == WHITTLE or rule == ORACLE_WHITTLE
        total = 0.0
        for k in range(num_active if fill else 0):
            j = active[k]
            if oracle:
                total += sf[j, S_SPEED] * bf[b, j, B_CORES]
            else:
                total += 1.0 if all_zero else bf[b, j, B_WEIGHT]
        for j in range(n):
            weight = 1.0 if all_zero else bf[b, j, B_WEIGHT]
            held = bi[b, j, B_OPEN]
            if oracle:
                weight = sf[j, S_SPEED] * bf[b, j, B_CORES]
                held = si[j, S_SERVED] + si[j, S_WAITING]
            # Inactive servers have an infinite score.
            bf[b, j, B_SCORE] = weight if si[j, S_STATUS] == UP else 0.0
            if fill and si[j, S_STATUS] == UP and weight > 0.0:
                fill_whittle(bf[b, j], weight, total)
            if si[j, S_STATUS] == UP:
                score[b, j] = flow_score(rule, balancers, held, weight, bf[b, j])
            else:
                score[b, j] = math.inf
        if score.shape[1] > n:
            rebuild(score[b], n)
    elif rule == WCMP:
        build_alias(b, active, num_active, bf, bi)
    elif rule == MAGLEV and num_active > 0:
        build_maglev(b, table_size, active, num_active, bf, maglev)


@compiled(inline=True)
def dispatch_by_hash(b, rule, table_size, h, ri, active, bf, bi, maglev):
    """The server chosen by the rules that look at no counter."""
    num_active = ri[R_ACTIVE]
    if rule == ECMP:
        return np.int64(active[to_range(h, num_active)])
    if rule == WCMP:
        k = to_range(h, num_active)
        if low_unit(h) >= bf[b, k, B_ALIAS_PROBABILITY]:
            k = bi[b, k, B_ALIAS]
        return np.int64(active[k])
    if rule == MAGLEV:
        return np.int64(maglev[b, to_range(h, table_size)])
    # Smooth weighted round robin: everyone earns its weight, the richest serves and pays the total.
    total = 0.0
    best = np.int64(active[0])
    for k in range(num_active):
        j = active[k]
        weight = bf[b, j, B_WEIGHT]
        total += weight
        bf[b, j, B_CURRENT] += weight
        if bf[b, j, B_CURRENT] > bf[b, best, B_CURRENT]:
            best = np.int64(j)
    if total <= 0.0:
        # Every active weight is zero: plain round robin.
        for k in range(num_active):
            bf[b, active[k], B_CURRENT] += 1.0
            if bf[b, active[k], B_CURRENT] > bf[b, best, B_CURRENT]:
                best = np.int64(active[k])
        total = np.float64(num_active)
    bf[b, best, B_CURRENT] -= total
    return best


@compiled(inline=True)
def better_of_two(b, rule, balancers, one, two, bf, bi):
    """Power of two choices: the first candidate unless the second is strictly better."""
    first = flow_score(rule, balancers, bi[b, one, B_OPEN], bf[b, one, B_WEIGHT], bf[b, one])
    second = flow_score(rule, balancers, bi[b, two, B_OPEN], bf[b, two, B_WEIGHT], bf[b, two])
    return two if second < first else one


@compiled(inline=True)
def unfinished_work(j, now, sf, si):
    """Core-seconds that the flows on server ``j``, last looked at before ``now``, still demand."""
    return max(0.0, sf[j, S_WORK_LEFT] - si[j, S_SERVED] * (now - sf[j, S_CLOCK]) / sf[j, S_PACE])


@compiled(inline=True)
def usable_cores(j, server_f, server_i):
    """Cores of server ``j`` that can be busy at once: no more than it has workers."""
    return min(server_f[j, V_CORES], np.float64(server_i[j, V_WORKERS]))


@compiled(inline=True)
def present_capacity(j, server_f, server_i, sf):
    """Core-seconds per second of server ``j`` at its present speed with every core busy."""
    return sf[j, S_SPEED] * usable_cores(j, server_f, server_i)


@compiled()
def least_work(start, now, demand, ri, active, server_f, server_i, sf, si):
    """The server that would be done first with its work and the flow; ties to the first from ``start`` on."""
    num_active = ri[R_ACTIVE]
    best = np.int64(active[start])
    low = math.inf
    for i in range(num_active):
        k = start + i
        if k >= num_active:
            k -= num_active
        j = active[k]
        score = (unfinished_work(j, now, sf, si) + demand) / present_capacity(j, server_f, server_i, sf)
        if score < low:
            low = score
            best = np.int64(j)
    return best


@compiled(inline=True)
def uses_counters(rule):
    """True if every server must be brought up to date before a flow is placed."""
    return keeps_scores(rule) or rule == ORACLE_LEAST_WORK or rule == EXTERNAL


@compiled(inline=True)
def is_oracle(rule):
    """True if the rule uses information that no balancer has."""
    return ORACLE_LSQ <= rule <= ORACLE_LEAST_WORK


@compiled(inline=True)
def is_two_choice(rule):
    """True if the rule compares two candidates."""
    return P2C <= rule <= P2C_MARGINAL


@compiled(inline=True)
def keeps_scores(rule):
    """True if the rule's scores are kept up to date for every server: an oracle's in the row of balancer 0."""
    return LSQ <= rule <= TABLE or ORACLE_LSQ <= rule <= ORACLE_WHITTLE
