"""The simulator's memory: arrays with the replica axis first, and the names of their columns.

Integer columns of int64 arrays also hold the 64-bit state of random streams.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..features.columns import NUM_FEATURES, NUM_GROUND_TRUTH, NUM_SERVICE
from ..features.reservoir_kernel import META_SIZE, RESULT_SIZE
from .tournament import row_size

# Dispatch rules, in the order of lbgym.scenarios.DISPATCH_RULES.
(
    ECMP,
    WCMP,
    MAGLEV,
    ROUND_ROBIN,
    LSQ,
    SED,
    SED_SCALED,
    MARGINAL,
    WHITTLE,
    TABLE,
    P2C,
    P2C_SED,
    P2C_MARGINAL,
    ORACLE_LSQ,
    ORACLE_SED,
    ORACLE_MARGINAL,
    ORACLE_WHITTLE,
    ORACLE_LEAST_WORK,
    EXTERNAL,  # whoever calls the kernel; not a rule of a scenario
) = range(19)

POISSON, MODULATED, SINUSOIDAL, TRACE = range(4)
DETERMINISTIC, EXPONENTIAL, LOGNORMAL, BOUNDED_PARETO, HYPEREXPONENTIAL, EMPIRICAL = range(6)
EVENT_SPEED, EVENT_DOWN, EVENT_UP, EVENT_DRAIN = range(4)
UP, DRAINING, DOWN = range(3)
COMPLETED, REJECTED, FAILED, UNROUTED = range(4)

# What a call of the kernel ends with: the interval is over; an array must grow before it can go on; or it has worked
# long enough for one call (or not begun), so that the caller can look for a signal such as Ctrl-C and call again.
DONE, GROW_FLOWS, GROW_LOG, PAUSED = range(4)
#: The work of one call, in units of about a nanosecond: short for a person, long beside the cost of a call.
WORK_PER_CALL = 1 << 24

# Parameters of a replica, float64.
(
    P_RATE,
    P_TIMEOUT,
    P_PACKET_WORK,  # mean core-seconds of service between two packets of a flow; inf: none
    P_PROBABILITY,
    P_LOG_DECAY,
    P_AMPLITUDE,
    P_OMEGA,
    P_PHASE,
    P_TRACE_PERIOD,
    NUM_PF,
) = range(10)
# Parameters of a replica, int64.
(
    P_RULE,
    P_ARRIVALS,
    P_DEMAND,
    P_NUM_LEVELS,
    P_FIXED_SOJOURNS,
    P_TABLE_START,
    P_TABLE_LENGTH,
    P_TRACE_REPEAT,
    P_TRACE_RANDOM,
    P_ALGORITHM,
    P_RESERVOIRS,
    P_SERVICE,
    P_RECORD,
    P_TABLE_SIZE,  # Maglev: entries in use, a prime
    P_SERVERS,  # servers that exist: the first ones of N
    P_COST,  # of a flow, in the units of WORK_PER_CALL
    NUM_PI,
) = range(17)
# Parameters of a server.
V_CORES, V_INVERSE_CORES, V_SPEED, V_MEMORY, V_MEMORY_IDLE, V_MEMORY_FLOW, NUM_VF = range(7)
V_WORKERS, V_BACKLOG, NUM_VI = range(3)

# State of a replica, float64.
(
    R_CLOCK,
    R_NEXT_ARRIVAL,
    R_NEXT_DEMAND,
    R_MOD_UNTIL,  # when the modulating state changes
    R_FACTOR,  # arrival rate over the workload's, from rate events
    R_ANCHOR_TIME,  # trace replay: clock and trace time at the last change of rate
    R_ANCHOR_TRACE,
    R_TRACE_BASE,  # trace time of the current repetition's start
    R_TARGET,  # end of the interval under way
    R_INTERVAL_START,
    R_LOG_SLOWDOWN,  # sum of the logarithms of slowdowns,
    R_SLOWDOWN,  # and the product of those not in it yet
    R_QUEUE_INTEGRAL,  # at the start of the interval
    NUM_RF,
) = range(14)
# State of a replica, int64.
(
    R_RNG_ARRIVAL,
    R_RNG_DEMAND,
    R_RNG_HASH,
    R_NEXT_HASH,
    R_MOD_STATE,
    R_RATE_EVENT,
    R_EVENT,
    R_TRACE_POSITION,
    R_FLOWS,
    R_OPEN,
    R_UNROUTED,
    R_LOGGED,
    R_RECORDED,
    R_LOST,  # rejected, failed and unrouted flows in the interval
    R_SEQUENCE,
    R_ACTIVE,
    R_RUNNING,
    R_CHOICE,  # 1 + the server chosen from outside for the next flow; 0: not chosen yet
    NUM_RI,
) = range(19)
# State of a server, float64.
(
    S_CLOCK,
    S_VIRTUAL,  # service each flow under service has received since the server was last idle
    S_PACE,  # seconds in which it grows by 1 now
    S_SPEED,
    S_INVERSE_SPEED,
    S_PACKET,  # aggregate service until the next packet
    S_QUEUE_INTEGRAL,
    S_BUSY_INTEGRAL,
    S_WORK_LEFT,
    S_WORK_DONE,
    S_FCT_SUM,
    S_LOST_TIME,
    S_BUSY_BEFORE,
    NUM_SF,
) = range(14)
# State of a server, int64.
(
    S_SERVED,
    S_WAITING,
    S_WAIT_HEAD,
    S_STATUS,
    S_STARTED,
    S_COMPLETED,
    S_REJECTED,
    S_FAILED,
    S_RNG_PACKET,
    NUM_SI,
) = range(10)
# A flow's slot, float64 and int32. Heap position k and the k-th free or waiting slot share the rows.
F_ARRIVAL, F_DEMAND, F_ID, NUM_FF = range(4)
F_BALANCER, F_HEAP, F_FREE, F_WAIT, NUM_FI = range(5)
# A balancer's view of a server. The columns from NUM_BF on are its table of scores: see NUM_SCORES.
(
    B_WEIGHT,
    B_BACKGROUND,  # flows that others are believed to hold there
    B_SCORE,  # the weight that scores are computed with
    B_CORES,  # cores that scores are computed with
    B_CURRENT,
    B_ALIAS_PROBABILITY,
    NUM_BF,
) = range(7)
#: Least number of scores in a table, and scores beyond a server's cores of those that are made here.
NUM_SCORES, SCORES_BEYOND_CORES = 2, 48
B_OPEN, B_ALIAS, NUM_BI = range(3)
# A recorded flow.
(
    L_ID,
    L_ARRIVAL,
    L_FCT,
    L_DEMAND,
    L_SERVER,
    L_BALANCER,
    L_STATUS,
    NUM_RECORD,
) = range(8)


class Parameters(NamedTuple):
    """Arrays that stay constant during an episode. R replicas, N servers; other axes as wide as any replica needs."""

    pf: NDArray[np.float64]  # [R, NUM_PF]
    pi: NDArray[np.int64]  # [R, NUM_PI]
    server_f: NDArray[np.float64]  # [R, N, NUM_VF]
    server_i: NDArray[np.int64]  # [R, N, NUM_VI]
    demand: NDArray[np.float64]  # [R, D]
    levels: NDArray[np.float64]  # [R, L, 2 + L]: level, mean sojourn, cumulative transition row
    first_level: NDArray[np.float64]  # [R, L] cumulative stationary law
    rate_events: NDArray[np.float64]  # [R, E, 2]: time, factor; ends with time inf
    events: NDArray[np.float64]  # [R, E, 4]: time, kind, server, value; ends with time inf
    table: NDArray[np.float64]  # [T, 2]: trace times and demands, empirical demands


#: What fills a replica's part of an array beyond what its scenario needs, where that is not 0.
PADDING = {"server_f": 1.0, "first_level": 1.0, "rate_events": np.inf, "events": np.inf}


class State(NamedTuple):
    """Arrays that change. C: flow slots per server; m balancers; K reservoir slots; M Maglev entries; L log entries."""

    rf: NDArray[np.float64]  # [R, NUM_RF]
    ri: NDArray[np.int64]  # [R, NUM_RI]
    sf: NDArray[np.float64]  # [R, N, NUM_SF]
    si: NDArray[np.int64]  # [R, N, NUM_SI]
    departure: NDArray[np.float64]  # [R, N +] time of the next departure; N +: and a tree, see tournament.py
    active: NDArray[np.int32]  # [R, N] the active servers first
    heap: NDArray[np.float64]  # [R, N, C] virtual finish times
    flow_f: NDArray[np.float64]  # [R, N, C, NUM_FF]
    flow_i: NDArray[np.int32]  # [R, N, C, NUM_FI]
    bf: NDArray[np.float64]  # [R, m, N, NUM_BF + Q], Q scores
    bi: NDArray[np.int64]  # [R, m, N, NUM_BI]
    score: NDArray[np.float64]  # [R, m, N +]
    maglev: NDArray[np.int32]  # [R, m, M]
    values: NDArray[np.float64]  # [R, m, N, 2, K]
    sample_weights: NDArray[np.float64]  # [R, m, N, 2, K] of the samples in values, relative
    meta: NDArray[np.int64]  # [R, m, N, 2, META_SIZE]
    result: NDArray[np.float64]  # [R, m, N, 2, RESULT_SIZE]
    log: NDArray[np.float64]  # [R, L] FCTs that ended in the interval
    record: NDArray[np.float64]  # [R, L, NUM_RECORD]


class Output(NamedTuple):
    """Fresh arrays for an observation, returned as a snapshot."""

    sequence_id: NDArray[np.int64]  # [R]
    timestamp: NDArray[np.float64]  # [R]
    active: NDArray[np.bool_]  # [R, N]
    stats: NDArray[np.float32]  # [R, m, N, NUM_FEATURES]
    ground_truth: NDArray[np.float32]  # [R, N, NUM_GROUND_TRUTH]
    counts: NDArray[np.int64]  # [4, R, N] started, completed, rejected, failed
    unrouted: NDArray[np.int64]  # [R]
    service: NDArray[np.float64]  # [R, NUM_SERVICE]


def allocate_parameters(replicas: int, servers: int) -> Parameters:
    """Parameters as narrow as they can be; :func:`widened` makes room."""
    r = replicas
    return Parameters(
        pf=np.zeros((r, NUM_PF)),
        pi=np.zeros((r, NUM_PI), np.int64),
        server_f=np.ones((r, servers, NUM_VF)),
        server_i=np.zeros((r, servers, NUM_VI), np.int64),
        demand=np.zeros((r, 1)),
        levels=np.zeros((r, 1, 3)),
        first_level=np.ones((r, 1)),
        rate_events=np.full((r, 1, 2), np.inf),
        events=np.full((r, 1, 4), np.inf),
        table=np.zeros((1, 2)),
    )


def widened(parameters: Parameters, rows: dict[str, NDArray[Any]]) -> Parameters:
    """The same parameters with room for the ``rows`` of one replica, by the arrays' names."""
    changes: dict[str, NDArray[Any]] = {}
    for name, row in rows.items():
        array = getattr(parameters, name)
        if any(have < need for have, need in zip(array.shape[1:], row.shape, strict=True)):
            shape = np.maximum(array.shape[1:], row.shape)
            bigger = np.full((len(array), *shape), PADDING.get(name, 0.0), array.dtype)
            bigger[tuple(slice(size) for size in array.shape)] = array
            changes[name] = bigger
    return parameters._replace(**changes) if changes else parameters


# What may be shown of a server, and of the flow that waits, when a decision is asked for.
Q_WORK, Q_DELAY, Q_OPEN, Q_ACTIVE, NUM_Q = range(5)
Q_DEMAND, Q_GAP, NUM_QF = range(3)


class Decision(NamedTuple):
    """The state at the arrival of a flow, for the policy that chooses its server."""

    waiting: NDArray[np.bool_]  # [R] False: every flow there was to come has come, and ended
    timestamp: NDArray[np.float64]  # [R] seconds: the flow's arrival; if none waits, when the last flow ended
    servers: NDArray[np.float64]  # [R, N, NUM_Q] zero rows for inactive servers
    flow: NDArray[np.float64]  # [R, NUM_QF]
    flow_seconds: NDArray[np.float64]  # [R] integral of the flows in the system since reset
    ended: NDArray[np.int64]  # [R, 2] flows completed, and rejected, failed or unrouted, since reset
    fct_sum: NDArray[np.float64]  # [R] seconds, over completed flows


def allocate_decision(replicas: int, servers: int) -> Decision:
    """Uninitialised arrays; the kernel writes every element."""
    return Decision(
        waiting=np.empty(replicas, np.bool_),
        timestamp=np.empty(replicas),
        servers=np.empty((replicas, servers, NUM_Q)),
        flow=np.empty((replicas, NUM_QF)),
        flow_seconds=np.empty(replicas),
        ended=np.empty((replicas, 2), np.int64),
        fct_sum=np.empty(replicas),
    )


def allocate_state(
    replicas: int,
    servers: int,
    balancers: int,
    *,
    flows: int,
    reservoir: int,
    maglev: int,
    log: int,
    record: int,
) -> State:
    """Zeroed state; ``flows`` slots per server, 0 or 1 where a part is not in use."""
    r, n, m = replicas, servers, balancers
    row = row_size(n)
    kept = n if reservoir else 0
    return State(
        rf=np.zeros((r, NUM_RF)),
        ri=np.zeros((r, NUM_RI), np.int64),
        sf=np.zeros((r, n, NUM_SF)),
        si=np.zeros((r, n, NUM_SI), np.int64),
        departure=np.full((r, row), np.inf),
        active=np.zeros((r, n), np.int32),
        heap=np.zeros((r, n, flows)),
        flow_f=np.zeros((r, n, flows, NUM_FF)),
        flow_i=np.zeros((r, n, flows, NUM_FI), np.int32),
        bf=np.zeros((r, m, n, NUM_BF + NUM_SCORES)),
        bi=np.zeros((r, m, n, NUM_BI), np.int64),
        score=np.zeros((r, m, row)),
        maglev=np.zeros((r, m, maglev), np.int32),
        values=np.zeros((r, m, kept, 2, reservoir)),
        sample_weights=np.zeros((r, m, kept, 2, reservoir)),
        meta=np.zeros((r, m, kept, 2, META_SIZE), np.int64),
        result=np.zeros((r, m, kept, 2, RESULT_SIZE)),
        log=np.zeros((r, log)),
        record=np.zeros((r, record, NUM_RECORD)),
    )


def allocate_output(replicas: int, servers: int, balancers: int) -> Output:
    """Uninitialised output arrays; the kernel writes every element."""
    return Output(
        sequence_id=np.empty(replicas, np.int64),
        timestamp=np.empty(replicas),
        active=np.empty((replicas, servers), np.bool_),
        stats=np.empty((replicas, balancers, servers, NUM_FEATURES), np.float32),
        ground_truth=np.empty((replicas, servers, NUM_GROUND_TRUTH), np.float32),
        counts=np.empty((4, replicas, servers), np.int64),
        unrouted=np.empty(replicas, np.int64),
        service=np.empty((replicas, NUM_SERVICE)),
    )


def grown(state: State, *, flows: int | None = None, log: int | None = None, record: int | None = None) -> State:
    """The same state with more flow slots or log entries."""
    changes: dict[str, NDArray[Any]] = {}
    if flows is not None:
        old = state.heap.shape[2]
        for name in ("heap", "flow_f", "flow_i"):
            array = getattr(state, name)
            bigger = np.zeros((*array.shape[:2], flows, *array.shape[3:]), array.dtype)
            bigger[:, :, :old] = array
            changes[name] = bigger
        # The first C - (flows held) entries of the free list are valid; the new slots go below them.
        bigger = changes["flow_i"]
        held = state.si[..., S_SERVED] + state.si[..., S_WAITING]
        for r, n in np.ndindex(*held.shape):
            free = state.flow_i[r, n, : old - held[r, n], F_FREE]
            bigger[r, n, : flows - old, F_FREE] = np.arange(old, flows)
            bigger[r, n, flows - old : flows - old + len(free), F_FREE] = free
            # The ring of waiting slots is unrolled, since it wraps at the capacity.
            ring = state.flow_i[r, n, :, F_WAIT]
            bigger[r, n, :old, F_WAIT] = np.roll(ring, -state.si[r, n, S_WAIT_HEAD])
        state.si[..., S_WAIT_HEAD] = 0
    for name, size in (("log", log), ("record", record)):
        if size is not None:
            array = getattr(state, name)
            bigger = np.zeros((array.shape[0], size, *array.shape[2:]))
            bigger[:, : array.shape[1]] = array
            changes[name] = bigger
    return state._replace(**changes)
