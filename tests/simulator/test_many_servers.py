"""Any number of servers: the trees that find departures and servers change nothing but the time it takes."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lbgym.scenarios import RULES, Event, Exponential, Lognormal, Scenario, Server, Workload
from lbgym.simulator import FlowSimulation, Simulation, tournament

COUNTING = [name for name, rule in RULES.items() if rule.mechanism == "index"]
KINDS = (
    Server(),
    Server(cores=2, speed=1.5),
    Server(cores=4, workers=6, backlog=3),
    Server(cores=2, workers=2),
    Server(speed=0.4),
    Server(cores=3, workers=3, backlog=0),
)


def cluster(n: int, *, balancers: int = 1, dispatch: str = "sed", events: tuple[Event, ...] = ()) -> Scenario:
    workload = Workload(load=0.9, demand=Lognormal(mean=0.1, cv=1.5))
    servers = tuple(KINDS[i % len(KINDS)] for i in range(n))
    return Scenario(
        name="many", servers=servers, workload=workload, balancers=balancers, dispatch=dispatch, events=events
    )


def life(n: int) -> tuple[Event, ...]:
    rng = np.random.default_rng(n)
    events: list[Event] = []
    for time in np.linspace(0.1, 1.6, 16).tolist():
        one, two, three = rng.integers(n, size=3).tolist()
        events += [
            Event(time=time, kind="down", server=one),
            Event(time=time + 0.3, kind="up", server=one),
            Event(time=time, kind="drain", server=two),
            Event(time=time + 0.2, kind="up", server=two),
            Event(time=time, kind="speed", server=three, value=float(rng.choice([0.3, 1.0, 2.5]))),
        ]
    events += [Event(time=1.7, kind="down", server=j) for j in range(n)]
    return (*events, *(Event(time=1.75, kind="up", server=j) for j in range(n)))


def bits(scenario: Scenario, num_servers: int | None = None) -> list[bytes]:
    """Everything that can be seen of a run whose weights change and are 0 for some or all servers."""
    sim = Simulation(scenario, 2, num_servers=num_servers, record_flows=True)
    sim.reset([5, 6])
    rng = np.random.default_rng(3)
    shape = (2, scenario.balancers, sim.num_servers)
    seen = []
    for k in range(4):
        weights = rng.choice([0.0, 0.5, 1.0, 3.3], size=shape) * (k != 2)
        snapshot = sim.step(weights, 0.5)
        assert snapshot.interval is not None
        seen += [snapshot.stats.tobytes(), snapshot.interval.values.tobytes(), snapshot.completed.tobytes()]
    for r in range(2):
        seen += [column.tobytes() for column in sim.take_flows(r).values()]
    return seen


@pytest.mark.parametrize("n", [33, 150])
@pytest.mark.parametrize("balancers", [1, 6])
@pytest.mark.parametrize("rule", COUNTING)
def test_a_tree_changes_no_bit(rule: str, balancers: int, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scenario = cluster(n, balancers=balancers, dispatch=rule, events=life(n))
    monkeypatch.setattr(tournament, "TREE_FROM", n + 1)
    scanned = bits(scenario)
    monkeypatch.setattr(tournament, "TREE_FROM", 2)
    assert bits(scenario) == scanned


def test_a_small_scenario_in_a_large_room() -> None:
    scenario = cluster(5, balancers=2)

    def places(room: int | None) -> bytes:
        sim = Simulation(scenario, num_servers=room, record_flows=True)
        sim.reset([5])
        sim.step(None, 10.0)
        return sim.take_flows()["server"].tobytes()

    assert tournament.row_size(300) > 300
    assert places(None) == places(300)


def test_decisions_per_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever chooses the servers finds the same cluster with and without a tree."""
    ends = []
    for least in (1000, 2):
        monkeypatch.setattr(tournament, "TREE_FROM", least)
        sim = FlowSimulation(cluster(50), record_flows=True)
        sim.begin([1])
        for i in range(500):
            seen = sim.decide([i * 7 % 50], final=np.array([i == 499]))
        ends.append([seen.timestamp.tobytes(), *(column.tobytes() for column in sim.take_flows().values())])
    assert ends[0] == ends[1]


#: CRC-32 of where 20,000 flows went before there were tables and trees: rule, balancers, servers.
BEFORE = {
    ("lsq", 1, 8): 58602155,
    ("lsq", 6, 300): 2170515332,
    ("sed", 1, 8): 2285185887,
    ("sed", 6, 300): 4175623347,
    ("sed_scaled", 1, 8): 2285185887,
    ("sed_scaled", 6, 300): 163735911,
    ("p2c", 1, 8): 937364124,
    ("p2c", 6, 300): 118394931,
    ("p2c_sed", 1, 8): 3046961858,
    ("p2c_sed", 6, 300): 2188346996,
    ("oracle_lsq", 1, 8): 58602155,
    ("oracle_lsq", 6, 300): 2439334052,
    ("oracle_sed", 1, 8): 3189572382,
    ("oracle_sed", 6, 300): 515395702,
    ("oracle_least_work", 1, 8): 3022885801,
    ("oracle_least_work", 6, 300): 2164660165,
}


@pytest.mark.parametrize(("rule", "balancers", "n"), BEFORE)
def test_flows_go_where_they_went_before_there_were_trees(rule: str, balancers: int, n: int) -> None:
    servers = tuple(Server(cores=1 + j % 3, speed=1.0 + 0.25 * (j % 5)) for j in range(n))
    workload = Workload(load=0.9, demand=Exponential(mean=0.1))
    scenario = Scenario(name="before", servers=servers, workload=workload, balancers=balancers, dispatch=rule)
    sim = Simulation(scenario, record_flows=True)
    sim.reset([7])
    weights = np.broadcast_to([1.0 + j % 3 for j in range(n)], (1, balancers, n))
    sim.step(weights, 20_000 / scenario.rate)
    flows = sim.take_flows()
    order = np.argsort(flows["flow_id"])
    assert zlib.crc32(flows["server"][order].astype("<i8").tobytes()) == BEFORE[rule, balancers, n]


@settings(max_examples=200)
@given(data=st.data())
def test_a_tree_finds_what_a_look_at_every_key_finds(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 200))
    # Few values, so that most of them are equal.
    values = st.sampled_from([0.0, 0.5, 1.0, 7.0, float("inf")])
    blocks = -(-n // tournament.BLOCK)
    keys = np.full(blocks * tournament.BLOCK + (2 << (blocks - 1).bit_length()), np.inf)
    keys[:n] = data.draw(st.lists(values, min_size=n, max_size=n))
    tournament.rebuild(keys, n)
    for _ in range(data.draw(st.integers(1, 20))):
        j = data.draw(st.integers(0, n - 1))
        before = keys[j]
        keys[j] = data.draw(values)
        tournament.renew(keys, n, j, before)
        start = data.draw(st.integers(0, n - 1))
        cyclic = (start + np.arange(n)) % n
        expected = cyclic[np.argmin(keys[cyclic])]
        assert tournament.first_least(keys, n, start) == expected == tournament.first_minimum(keys[:n].copy(), n, start)
        now = data.draw(values.filter(np.isfinite))
        due = np.flatnonzero(keys[:n] <= now)
        assert tournament.first_due(keys, n, now) == (due[0] if len(due) else -1)


@pytest.mark.parametrize("n", [1, 95, 96, 97, 1000, 65_536])
def test_a_row_has_room_for_its_tree(n: int) -> None:
    size = tournament.row_size(n)
    if n < tournament.TREE_FROM:
        assert size == n
        return
    blocks = -(-n // tournament.BLOCK)
    leaves = (size - blocks * tournament.BLOCK) // 2
    assert leaves >= blocks
    assert leaves & (leaves - 1) == 0
    assert size < 1.5 * n + 2 * tournament.BLOCK
