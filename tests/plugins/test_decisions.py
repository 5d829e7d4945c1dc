"""The core chooses the server that the simulator does, given the same hash, weights and counts."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from lbgym.drivers.afpacket.core import SEND, Packet
from lbgym.drivers.xdp.plane import Vip
from lbgym.drivers.xdp.tables import INDEX_GRID
from lbgym.features.compile import compiled
from lbgym.features.rng import to_range
from lbgym.scenarios import DISPATCH_RULES, RULES
from lbgym.simulator import layout as at
from lbgym.simulator import maglev_table_size
from lbgym.simulator.dispatch import (
    build_alias,
    build_maglev,
    dispatch_by_hash,
    dispatch_hash,
    fill_whittle,
    flow_score,
    second_hash,
)
from tests.drivers.xdp.packets import flow_hashes
from tests.plugins.packets import CLIENT, PORT, SYN, VIP4, Bench, packet4, servers

DECISIONS, BATCH = 100_000, 100
N = 13
NAMES = tuple(name for name, rule in RULES.items() if not rule.oracle and name != "table")
#: Most cores that a server of these tests has.
CORES = 8


@compiled(allocates=True)
def expected(rule, two, balancers, table_size, hashes, starts, ri, rows, weights, bf, bi, maglev, grid):  # type: ignore[no-untyped-def]
    """The simulator's decisions, one after the other; ``starts`` are the servers' open flows before each batch."""
    n = weights.shape[0]
    taken = np.empty(hashes.shape[0], np.int64)
    q = np.zeros(n, np.int64)
    scores = np.empty(n)
    batch = hashes.shape[0] // starts.shape[0]
    for i in range(hashes.shape[0]):
        if i % batch == 0:
            q[:] = starts[i // batch]
        h = dispatch_hash(hashes[i])
        if rule < at.LSQ:
            chosen = dispatch_by_hash(0, rule, table_size, h, ri, rows, bf, bi, maglev)
        else:
            for j in range(n):
                # Many flows share an entry of an index table with their neighbours.
                held = grid[np.searchsorted(grid, min(q[j], (1 << 20) - 1), side="right") - 1]
                scores[j] = flow_score(rule, balancers, held, weights[j], bf[0, j])
            if two:
                one = to_range(h, rows.shape[0])
                other = to_range(second_hash(h), rows.shape[0] - 1)
                first, second = rows[one], rows[other + (1 if other >= one else 0)]
                chosen = np.int64(second if scores[second] < scores[first] else first)
            else:
                start = to_range(h, n)
                chosen = np.int64(-1)
                for k in range(n):
                    j = (start + k) % n
                    if (rows == j).any() and (chosen < 0 or scores[j] < scores[chosen]):
                        chosen = np.int64(j)
        taken[i] = chosen
        q[chosen] += 1
    return taken


def simulated(
    rule: str,
    hashes: NDArray[np.uint64],
    starts: NDArray[np.int64],
    weights: NDArray[np.float64],
    active: NDArray[np.bool_],
    cores: NDArray[np.float64],
    background: NDArray[np.float64],
    balancers: int,
) -> NDArray[np.int64]:
    n = len(weights)
    rows = np.flatnonzero(active).astype(np.int32)
    ri = np.zeros(at.NUM_RI, np.int64)
    ri[at.R_ACTIVE] = len(rows)
    bf, bi = np.zeros((1, n, at.NUM_BF + at.SCORES_BEYOND_CORES + CORES)), np.zeros((1, n, at.NUM_BI), np.int64)
    bf[0, :, at.B_WEIGHT], bf[0, :, at.B_CORES], bf[0, :, at.B_BACKGROUND] = weights, cores, background
    size = maglev_table_size(n)
    maglev = np.zeros((1, size), np.int32)
    build_alias(0, rows, len(rows), bf, bi)
    build_maglev(0, size, rows, len(rows), bf, maglev)
    two = RULES[rule].mechanism == "two_choices"
    if not two and not weights[active].any():
        weights = np.ones(n)
    if rule == "whittle":
        for j in rows[weights[rows] > 0.0]:
            fill_whittle(bf[0, j], weights[j], weights[rows].sum())
    number = DISPATCH_RULES.index(rule)
    grid = INDEX_GRID.astype(np.int64)
    return np.asarray(expected(number, two, balancers, size, hashes, starts, ri, rows, weights, bf, bi, maglev, grid))


def decide(
    bench: Bench, clients: NDArray[np.uint32], ports: NDArray[np.uint16], starts: NDArray[np.int64]
) -> list[int]:
    """The core's decisions for a SYN of each client, in batches that begin with these open flows."""
    n, count, room = starts.shape[1], len(clients), 40
    frames = np.tile(np.frombuffer(packet4(CLIENT, 1, SYN), np.uint8), (count, 1))
    frames[:, 12:16] = clients.astype(">u4").view(np.uint8).reshape(count, 4)
    frames[:, 20:22] = ports.astype(">u2").view(np.uint8).reshape(count, 2)
    frames[:, 24:28] = np.arange(count, dtype=">u4").view(np.uint8).reshape(count, 4)
    packets = (Packet * count)()
    for i, packet in enumerate(packets):
        packet.data, packet.length = frames.ctypes.data + i * room, room
    batch = count // len(starts)
    for i, start in enumerate(starts):
        bench.core.open_flows[:n] = start
        first = ctypes.byref(packets, i * batch * ctypes.sizeof(Packet))
        bench.core.library.lbgym_worker_run(bench.core.worker(), first, batch, bench.now)
    assert {packet.verdict for packet in packets} == {SEND}
    return [packet.server for packet in packets]


@pytest.mark.parametrize("rule", NAMES)
def test_the_same_server_as_the_simulator(bench: Callable[..., Bench], rule: str) -> None:
    rng = np.random.default_rng(7)
    active = np.ones(N, np.bool_)
    active[[2, 7]] = False
    # Whole weights repeat under round robin, and give ties under SED.
    weights = rng.integers(1, 6, N).astype(np.float64) if rule == "round_robin" else rng.choice([0.5, 1.0, 1.7, 3.0], N)
    cores = rng.integers(1, CORES + 1, N).astype(np.float64)
    background = rng.choice([0.0, 0.0, 2.0, 3.75], N)
    clients = rng.integers(0x0B000000, 0xDF000000, DECISIONS, np.uint32)
    ports = rng.integers(1024, 65536, DECISIONS).astype(np.uint16)
    starts = rng.integers(0, 12, (DECISIONS // BATCH, N))
    # Counts of any size, also where entries of the table are shared.
    starts[::3] = rng.choice(INDEX_GRID.astype(np.int64), (len(starts[::3]), N))
    one = bench(flows=DECISIONS + 1000, syn_flows=DECISIONS + 1000, servers=20)
    rows = servers(weights, active, cores=cores, background=background)
    one.core.install(rule, rows, 3)
    chosen = decide(one, clients, ports, starts)
    hashes = flow_hashes(Vip(VIP4, PORT), clients, ports)
    wanted = simulated(rule, hashes, starts, weights, active, cores, background, 3)
    assert int((np.array(chosen) != wanted).sum()) == 0


@pytest.mark.parametrize("rule", NAMES)
@pytest.mark.parametrize("weights", [[1.0, 0.0, 2.0], [0.0, 0.0, 0.0]], ids=["one zero", "all zero"])
def test_weights_of_zero(bench: Callable[..., Bench], rule: str, weights: list[float]) -> None:
    one = bench()
    one.core.install(rule, servers(weights))
    rng = np.random.default_rng(3)
    clients = rng.integers(0x0B000000, 0xDF000000, 600, np.uint32)
    ports = rng.integers(1024, 65536, 600).astype(np.uint16)
    chosen = decide(one, clients, ports, np.zeros((1, 3), np.int64))
    wanted = simulated(
        rule,
        flow_hashes(Vip(VIP4, PORT), clients, ports),
        np.zeros((1, 3), np.int64),
        np.array(weights),
        np.ones(3, np.bool_),
        np.ones(3),
        np.zeros(3),
        1,
    )
    assert chosen == wanted.tolist()
    assert set(chosen) == {0, 1, 2} if not any(weights) or rule in ("ecmp", "lsq", "p2c") else set(chosen) == {0, 2}


def test_every_rule_has_its_number(library: ctypes.CDLL) -> None:
    assert [library.lbgym_rule_named(name.encode()) for name in NAMES] == list(range(len(NAMES)))
    assert library.lbgym_rule_named(b"table") == library.lbgym_rule_named(b"SED") == -1
