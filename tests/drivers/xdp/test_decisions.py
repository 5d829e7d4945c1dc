"""The program chooses the server that the simulator does, given the same hash, tables and counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lbgym.drivers.xdp.layout import INDEX_ENTRIES, INDEX_MOST
from lbgym.drivers.xdp.plane import Vip
from lbgym.drivers.xdp.tables import INDEX_GRID, MECHANISMS, TURNS, IndexInputs, dispatch_table
from lbgym.features.compile import compiled
from lbgym.features.rng import to_range
from lbgym.scenarios import DISPATCH_RULES, RULES
from lbgym.simulator import layout as at
from lbgym.simulator import maglev_table_size
from lbgym.simulator.dispatch import dispatch_by_hash, dispatch_hash, flow_score, refresh_balancer, second_hash
from tests.drivers.xdp.conftest import Load
from tests.drivers.xdp.packets import SYN, VIP4, flow_hashes, install, open_flows, runner, server_of, tcp4

pytestmark = pytest.mark.xdp

DECISIONS = 100_000
N = 13


@compiled(allocates=True)
def least(rule, two_choices, balancers, h, q, rows, active, bf):  # type: ignore[no-untyped-def]
    """The choice of the rules that count, at the present open flows q."""
    n = len(q)
    values = np.empty(n)
    for j in range(n):
        values[j] = flow_score(rule, balancers, q[j], bf[0, j, at.B_WEIGHT], bf[0, j]) if active[j] else np.inf
    if two_choices:
        one, two = to_range(h, len(rows)), to_range(second_hash(h), len(rows) - 1)
        first, second = rows[one], rows[two + (two >= one)]
        return second if values[second] < values[first] else first
    best = start = to_range(h, n)
    for k in range(n):
        j = (start + k) % n
        if values[j] < values[best]:
            best = j
    return best


class Simulated:
    """The simulator's own functions for a rule, on one balancer; background loads are for rules that take them."""

    def __init__(self, rule: str, weights: NDArray[np.float64], active: NDArray[np.bool_], inputs: IndexInputs) -> None:
        n = len(weights)
        self.rule, self.active = rule, active
        self.number, self.balancers = DISPATCH_RULES.index(rule), inputs.balancers
        self.ri = np.zeros(at.NUM_RI, np.int64)
        self.rows = np.flatnonzero(active).astype(np.int32)
        self.ri[at.R_ACTIVE] = len(self.rows)
        tables = np.zeros((n, at.SCORES_BEYOND_CORES + 16)) if inputs.scores is None else inputs.scores
        self.bf, self.bi = np.zeros((1, n, at.NUM_BF + tables.shape[1])), np.zeros((1, n, at.NUM_BI), np.int64)
        self.bf[0, :, at.B_WEIGHT], self.bf[0, :, at.NUM_BF :] = weights, tables
        if inputs.cores is not None and inputs.background is not None:
            self.bf[0, :, at.B_CORES], self.bf[0, :, at.B_BACKGROUND] = inputs.cores, inputs.background
        self.size = maglev_table_size(n)
        self.maglev = np.zeros((1, self.size), np.int32)
        sf, si = np.ones((n, at.NUM_SF)), np.zeros((n, at.NUM_SI), np.int64)
        si[:, at.S_STATUS] = np.where(active, at.UP, at.DOWN)
        refresh_balancer(
            0, self.number, self.size, self.ri, self.rows, self.bf, self.bi, np.zeros((1, n)), self.maglev, sf, si
        )

    def choose(self, flow_hash: np.uint64, q: NDArray[np.int64]) -> int:
        h = np.uint64(dispatch_hash(flow_hash))
        if RULES[self.rule].mechanism not in ("index", "two_choices"):
            return int(
                dispatch_by_hash(0, self.number, self.size, h, self.ri, self.rows, self.bf, self.bi, self.maglev)
            )
        two = RULES[self.rule].mechanism == "two_choices"
        return int(least(self.number, two, self.balancers, h, q, self.rows, self.active, self.bf))


def entry_of(q: Any) -> Any:
    """The number of open flows that q shares an entry with."""
    return INDEX_GRID[np.searchsorted(INDEX_GRID, np.minimum(q, INDEX_MOST - 1), side="right") - 1].astype(np.int64)


@pytest.mark.slow
@pytest.mark.parametrize("rule", MECHANISMS)
def test_the_same_server_as_the_simulator(load: Load, rule: str) -> None:
    rng = np.random.default_rng(7)
    active = np.ones(N, np.bool_)
    active[[2, 7]] = False
    # Whole weights repeat under round robin, and give ties under SED.
    weights = rng.integers(1, 6, N).astype(np.float64) if rule == "round_robin" else rng.choice([0.5, 1.0, 1.7, 3.0], N)
    plane = load(flows=DECISIONS + 1000, syn_flows=DECISIONS + 1000)
    plane.set_vips([VIP4])
    inputs = IndexInputs(
        cores=rng.integers(1, 17, N).astype(np.float64),
        background=rng.choice([0.0, 0.25, 1.0, 3.7, 40.0], N),
        balancers=3,
        scores=np.sort(rng.integers(0, 30, (N, 70)), axis=1).astype(np.float64) if rule == "table" else None,
    )
    install(plane, rule, weights, active, inputs=inputs)
    simulated = Simulated(rule, weights, active, inputs)
    clients = rng.integers(0x0B000000, 0xDF000000, DECISIONS, np.uint32)
    ports = rng.integers(1024, 65536, DECISIONS).astype(np.uint16)
    hashes = flow_hashes(VIP4, clients, ports)
    run, held = runner(plane), plane.shared["open_flows"]
    q = np.zeros(N, np.int64)
    counted = q.copy()
    differ = 0
    for i in range(DECISIONS):
        if i % 100 == 0:
            # Counts of any size, also where entries of the table are shared (then compared by the shared value).
            q = rng.choice(INDEX_GRID.astype(np.int64), N) if i % 200 else rng.integers(0, 5, N)
            held[:N] = q
            counted = entry_of(q)
        chosen = server_of(run(tcp4(int(clients[i]), int(ports[i]), VIP4, SYN, i + 1)))
        differ += chosen != simulated.choose(hashes[i], counted)
        q[chosen] += 1
        counted[chosen] = entry_of(q[chosen])
    assert differ == 0
    assert plane.shared["totals"]["table_full"] == 0


def test_entries_of_an_index_table(load: Load) -> None:
    """Every number of open flows has the entry of the greatest number that is not above it."""
    assert len(INDEX_GRID) == INDEX_ENTRIES and (np.diff(INDEX_GRID) > 0).all()
    plane = load()
    plane.set_vips([VIP4])
    run, held = runner(plane), plane.shared["open_flows"]
    rng = np.random.default_rng(1)
    client = 0x0B000000
    table = dispatch_table("lsq", np.ones(2), np.ones(2, np.bool_))
    assert table.index is not None
    numbers = {int(n) for n in 2.0 ** rng.uniform(9, 21, 200)} | {1023, 1024, 1025, 2047, 2048, INDEX_MOST, 1 << 40}
    for number in sorted(numbers):
        entry = int(np.searchsorted(INDEX_GRID, number, side="right")) - 1
        # Server 0 has exactly that entry's score less a little, or more: which is chosen shows the entry.
        for shift, expected in ((0.5, 1), (-0.5, 0)):
            install(plane, "lsq", np.ones(2))
            bank = plane.bank
            plane._indices[bank, :, 0] = 1e9
            plane._indices[bank, :, 1] = INDEX_GRID[entry]
            plane._indices[bank, entry, 0] = INDEX_GRID[entry] + shift
            held[0], held[1] = number, 0
            client += 1
            assert server_of(run(tcp4(client, 4000, VIP4, SYN, 1))) == expected, number


@pytest.mark.parametrize("rule", MECHANISMS)
def test_weight_zero_takes_no_flow_and_all_zero_is_all_alike(load: Load, rule: str) -> None:
    plane = load()
    plane.set_vips([VIP4])
    run = runner(plane)

    def taken(weights: list[float], seed: int) -> set[int]:
        install(plane, rule, np.array(weights))
        plane.shared["open_flows"][:] = 0
        return {server_of(run(tcp4(0x0B000000 + seed + i, 4000, VIP4, SYN, 1))) for i in range(300)}

    zero = taken([1.0, 0.0, 2.0], 0)
    # ECMP and LSQ do not look at weights; two choices may both be of weight 0, but here are one at most.
    assert zero == ({0, 1, 2} if rule in ("ecmp", "lsq", "table", "p2c") else {0, 2})
    assert taken([0.0, 0.0, 0.0], 1000) == {0, 1, 2}


def test_alias_split_follows_the_weights(load: Load) -> None:
    weights = np.array([0.1, 5.0, 0.0, 1.3, 2.2])
    plane = load(flows=20_000, syn_flows=20_000)
    plane.set_vips([VIP4])
    install(plane, "wcmp", weights)
    run, n = runner(plane), 15_000
    rng = np.random.default_rng(3)
    for client, port in zip(rng.integers(1 << 28, 1 << 31, n), rng.integers(1024, 65536, n), strict=True):
        run(tcp4(int(client), int(port), VIP4, SYN, 1))
    share = weights / weights.sum()
    assert (np.abs(np.array(open_flows(plane)) - n * share) <= 4 * np.sqrt(n * share * (1 - share))).all()


def test_round_robin_of_weights_that_never_repeat_goes_on_near_to_its_shares() -> None:
    weights = np.array([1.0, np.sqrt(2.0), np.pi])
    table = dispatch_table("round_robin", weights, np.ones(3, np.bool_))
    assert 3 <= table.size <= TURNS
    share = np.bincount(table.servers, minlength=3) / table.size
    assert np.abs(share - weights / weights.sum()).max() < 1e-3


def test_hashes_of_vips_differ_by_address_and_port() -> None:
    vips = [VIP4, Vip(VIP4.address, 443), Vip(VIP4.address + 1, 80)]
    assert len({vip.service for vip in vips}) == 3
