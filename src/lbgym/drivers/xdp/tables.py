"""From a dispatch rule and weights to the tables that the balancer in the kernel looks up.

With the same hash, tables and counts the program chooses the server that ``lbgym.simulator`` does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...features.compile import compiled
from ...scenarios import DISPATCH_RULES
from ...simulator import layout as at
from ...simulator import maglev_table_size
from ...simulator.dispatch import build_alias, build_maglev, dispatch_by_hash, fill_whittle, flow_score
from .layout import ALIAS, INDEX_ENTRIES, INDEX_EXACT, Mechanism

#: Rules by what the program does for them. A rule that has to see more than a balancer can is none of them.
MECHANISMS = {
    "ecmp": Mechanism.LOOKUP,
    "wcmp": Mechanism.ALIAS,
    "maglev": Mechanism.LOOKUP,
    "round_robin": Mechanism.TURNS,
    "lsq": Mechanism.INDEX,
    "sed": Mechanism.INDEX,
    "sed_scaled": Mechanism.INDEX,
    "marginal": Mechanism.INDEX,
    "whittle": Mechanism.INDEX,
    "table": Mechanism.INDEX,
    "p2c": Mechanism.TWO_CHOICES,
    "p2c_sed": Mechanism.TWO_CHOICES,
    "p2c_marginal": Mechanism.TWO_CHOICES,
}
#: Most turns of round robin before it begins again.
TURNS = 16_384


def _index_grid() -> NDArray[np.float64]:
    """The number of open flows that each entry of an index table is for; the least, where it is for several."""
    grid = [np.arange(INDEX_EXACT)]
    half = INDEX_EXACT // 2
    grid += [(half + np.arange(half)) << shift for shift in range(1, (INDEX_ENTRIES - INDEX_EXACT) // half + 1)]
    return np.concatenate(grid).astype(np.float64)


#: float64[INDEX_ENTRIES]
INDEX_GRID = _index_grid()


@dataclass(frozen=True, slots=True)
class DispatchTable:
    """What one half of the tables holds.

    Attributes:
        mechanism: what the program does.
        size: entries of the alias table, or of ``servers``.
        rows: servers there are.
        aliases: ``ALIAS``[size], for ``ALIAS``.
        servers: uint32[size], for the mechanisms that look one up, and the candidates of two choices.
        index: float64[INDEX_ENTRIES, rows], for the mechanisms that count.
    """

    mechanism: Mechanism
    size: int
    rows: int
    aliases: NDArray[Any] | None = None
    servers: NDArray[np.uint32] = field(default_factory=lambda: np.zeros(0, np.uint32))
    index: NDArray[np.float64] | None = None


@dataclass(frozen=True, slots=True)
class IndexInputs:
    """What scores depend on beside the weights.

    Attributes:
        cores: float64[N], usable cores, at least 1; None: 1.
        background: float64[N], flows of others at a server, which count as if they were the balancer's own; None: 0.
        balancers: m of ``sed_scaled``.
        scores: float64[N, Q], scores by open flows of rule ``table``, which go on by their last difference; None: 0, 1.
    """

    cores: NDArray[np.float64] | None = None
    background: NDArray[np.float64] | None = None
    balancers: int = 1
    scores: NDArray[np.float64] | None = None


def dispatch_table(
    rule: str, weights: NDArray[np.float64], active: NDArray[np.bool_], inputs: IndexInputs | None = None
) -> DispatchTable:
    """The tables of a rule.

    Args:
        rule: of ``MECHANISMS``.
        weights: float64[N], at least 0.
        active: bool[N], servers that take flows.
        inputs: for rules that count flows; None: all of them have their defaults.
    """
    n, mechanism = len(weights), MECHANISMS[rule]
    servers = np.flatnonzero(active).astype(np.uint32)
    count = len(servers)
    if count == 0:
        return DispatchTable(Mechanism.NOBODY, 0, n)
    if mechanism is Mechanism.ALIAS:
        aliases = alias_table(weights, servers)
        return DispatchTable(mechanism, count, n, aliases)
    if rule == "maglev":
        servers = maglev_table(weights, servers)
    elif mechanism is Mechanism.TURNS:
        servers = turns(weights, servers)
    if mechanism not in (Mechanism.INDEX, Mechanism.TWO_CHOICES):
        return DispatchTable(mechanism, len(servers), n, servers=servers)
    scores = index_table(rule, weights, active, inputs or IndexInputs())
    return DispatchTable(mechanism, count, n, servers=servers, index=scores)


def alias_table(weights: NDArray[np.float64], servers: NDArray[np.uint32]) -> NDArray[Any]:
    """Vose's alias table over ``servers``, ``ALIAS``[len(servers)]."""
    count = len(servers)
    bf, bi = _views(weights)
    build_alias(0, servers.astype(np.int32), count, bf, bi)
    table = np.zeros(count, ALIAS)
    # The low 32 bits of a hash are below the probability times 2**32 if they are below it rounded up.
    table["threshold"] = np.ceil(np.minimum(bf[0, :count, at.B_ALIAS_PROBABILITY], 1.0) * 2.0**32)
    table["stay"], table["other"] = servers, servers[bi[0, :count, at.B_ALIAS]]
    return table


def maglev_table(weights: NDArray[np.float64], servers: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Weighted Maglev table over ``servers``, uint32[a prime that depends on the number of ``weights``]."""
    size = maglev_table_size(len(weights))
    bf, _ = _views(weights)
    table = np.zeros((1, size), np.int32)
    build_maglev(0, size, servers.astype(np.int32), len(servers), bf, table)
    return table[0].astype(np.uint32)


def turns(weights: NDArray[np.float64], servers: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The order of smooth weighted round robin, from its beginning to where it is most nearly back there."""
    bf, bi = _views(weights)
    ri = np.zeros(at.NUM_RI, np.int64)
    ri[at.R_ACTIVE] = len(servers)
    taken, unrest = np.zeros(TURNS, np.uint32), np.zeros(TURNS)
    _take_turns(ri, servers.astype(np.int32), bf, bi, np.zeros((1, 1), np.int32), taken, unrest)
    total = weights[servers].sum() or len(servers)
    period = int(np.argmax(unrest <= unrest[len(servers) - 1 :].min() + 1e-9 * total)) + 1
    return taken[:period]


@compiled()
def _take_turns(ri, active, bf, bi, maglev, taken, unrest):  # type: ignore[no-untyped-def]
    for i in range(taken.shape[0]):
        taken[i] = dispatch_by_hash(0, at.ROUND_ROBIN, 0, np.uint64(0), ri, active, bf, bi, maglev)
        for j in range(bf.shape[1]):
            unrest[i] += abs(bf[0, j, at.B_CURRENT])


def index_table(
    rule: str, weights: NDArray[np.float64], active: NDArray[np.bool_], inputs: IndexInputs
) -> NDArray[np.float64]:
    """Scores by entry and server, float64[INDEX_ENTRIES, N]; infinite where a server takes no flows."""
    n = len(weights)
    cores = np.ones(n) if inputs.cores is None else inputs.cores
    given = np.tile([0.0, 1.0], (n, 1)) if inputs.scores is None else inputs.scores
    # Whittle's index is a table, too, and needs room for it.
    columns = at.SCORES_BEYOND_CORES + int(cores.max()) if rule == "whittle" else given.shape[1]
    view = np.zeros((n, at.NUM_BF + columns))
    view[:, at.B_CORES] = cores
    view[:, at.B_BACKGROUND] = 0.0 if inputs.background is None else inputs.background
    if rule == "table":
        view[:, at.NUM_BF :] = given
    if MECHANISMS[rule] is Mechanism.INDEX and not weights[active].any():
        weights = np.ones(n)
    scores = np.empty((INDEX_ENTRIES, n))
    _fill_scores(DISPATCH_RULES.index(rule), inputs.balancers, INDEX_GRID, weights, active, view, scores)
    return scores


@compiled()
def _fill_scores(rule, balancers, grid, weights, active, view, scores):  # type: ignore[no-untyped-def]
    total = 0.0
    for j in range(weights.shape[0]):
        if active[j]:
            total += weights[j]
    for j in range(weights.shape[0]):
        if not active[j]:
            scores[:, j] = np.inf
            continue
        if rule == at.WHITTLE and weights[j] > 0.0:
            fill_whittle(view[j], weights[j], total)
        for i in range(grid.shape[0]):
            scores[i, j] = flow_score(rule, balancers, grid[i], weights[j], view[j])


def _views(weights: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """A balancer's view of its servers, as the simulator keeps it."""
    bf = np.zeros((1, len(weights), at.NUM_BF))
    bf[0, :, at.B_WEIGHT] = weights
    return bf, np.zeros((1, len(weights), at.NUM_BI), np.int64)
