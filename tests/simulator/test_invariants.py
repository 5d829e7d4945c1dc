"""What holds for every scenario: no flow lost, no NaN, nothing negative, the same bits for the same seed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lbgym.errors import ScenarioError
from lbgym.features import FEATURE_NAMES, SERVICE_NAMES
from lbgym.scenarios import DISPATCH_RULES, Exponential, Scenario, Server, Workload
from lbgym.simulator import Simulation
from lbgym.snapshot import Snapshot

from .running import COMPLETED, FAILED, REJECTED, UNROUTED, broadcast, merged, run_flows, trace_scenario
from .strategies import scenarios, weights

ARRAYS = (
    "sequence_id",
    "timestamp",
    "active",
    "stats",
    "ground_truth",
    "started",
    "completed",
    "rejected",
    "failed",
    "unrouted",
    "interval",
)


def fingerprint(snapshot: Snapshot) -> bytes:
    return b"".join(np.ascontiguousarray(getattr(snapshot, name)).tobytes() for name in ARRAYS)


def check(sim: Simulation, snapshot: Snapshot) -> None:
    """Everything a snapshot promises by itself."""
    r, m, n = sim.num_replicas, sim.num_balancers, sim.num_servers
    assert snapshot.stats.shape == (r, m, n, len(FEATURE_NAMES))
    assert snapshot.stats.dtype == np.float32
    assert snapshot.ground_truth.shape == (r, n, 3)
    assert snapshot.interval.values.shape == (r, len(SERVICE_NAMES))
    for name in ARRAYS:
        array = np.asarray(getattr(snapshot, name))
        assert np.isfinite(array).all(), name
        if name != "interval":
            assert (array >= 0).all(), name
    assert (np.delete(snapshot.interval.values, SERVICE_NAMES.index("log_slowdown"), axis=-1) >= 0).all()
    assert (snapshot.ground_truth[..., :2] <= 1).all()
    inactive = ~snapshot.active
    assert not snapshot.ground_truth[inactive].any()
    assert not snapshot.stats.transpose(0, 2, 1, 3)[inactive].any()
    integrals = sim.integrals()
    np.testing.assert_array_equal(
        snapshot.started, snapshot.completed + snapshot.rejected + snapshot.failed + integrals["open"]
    )
    # Balancers count their own flows; together they count all that are open on active servers.
    own = snapshot.stats[..., 0].sum(axis=1)
    np.testing.assert_array_equal(own, np.where(snapshot.active, integrals["open"], 0))
    assert all((value >= 0).all() for value in integrals.values())
    law = integrals["fct_sum"] + integrals["lost_time"] + integrals["age_sum"]
    np.testing.assert_allclose(integrals["queue"], law, rtol=1e-9, atol=1e-9)
    median, p90, p99 = (snapshot.interval.values[:, SERVICE_NAMES.index(f"fct_p{p}")] for p in (50, 90, 99))
    assert (median <= p90).all()
    assert (p90 <= p99).all()


@settings(max_examples=150)
@given(data=st.data())
def test_no_flow_is_lost(data):
    scenario = data.draw(scenarios())
    replicas = data.draw(st.integers(1, 3))
    sim = Simulation(scenario, replicas, record_flows=True)
    snapshot = sim.reset([data.draw(st.integers(0, 2**63)) + r for r in range(replicas)])
    check(sim, snapshot)
    assert not snapshot.started.any()
    parts: list[list[dict[str, NDArray]]] = [[] for _ in range(replicas)]
    clock = 0.0
    for _ in range(4):
        chosen = data.draw(st.none() | weights(replicas, scenario.balancers, scenario.num_servers))
        duration = data.draw(st.sampled_from([0.0, 0.25, 1.0, 2.0]))
        before = snapshot
        snapshot = sim.step(chosen, duration)
        clock += duration
        check(sim, snapshot)
        np.testing.assert_allclose(snapshot.timestamp, clock)
        np.testing.assert_array_equal(snapshot.sequence_id, before.sequence_id + 1)
        for name in ("started", "completed", "rejected", "failed", "unrouted"):
            assert (getattr(snapshot, name) >= getattr(before, name)).all()
        ended = [sim.take_flows(r) for r in range(replicas)]
        for r in range(replicas):
            parts[r].append(ended[r])
            check_service(scenario, snapshot, r, ended[r], duration)
    for r in range(replicas):
        flows = merged(parts[r])
        for status, counts in ((COMPLETED, "completed"), (REJECTED, "rejected"), (FAILED, "failed")):
            servers = flows["server"][flows["status"] == status]
            counted = np.bincount(servers, minlength=scenario.num_servers)
            np.testing.assert_array_equal(getattr(snapshot, counts)[r], counted)
        assert snapshot.unrouted[r] == (flows["status"] == UNROUTED).sum()
        np.testing.assert_array_equal(flows["server"] == -1, flows["status"] == UNROUTED)
        assert (flows["fct"] >= 0).all()
        np.testing.assert_array_equal(flows["fct"][flows["status"] != COMPLETED], scenario.reject_timeout)
        # Ended and open flows together are numbered without a gap.
        ids = np.sort(np.concatenate([flows["flow_id"], sim.open_flows(r)["flow_id"]]))
        np.testing.assert_array_equal(ids, np.arange(snapshot.started[r].sum() + snapshot.unrouted[r]))


def check_service(scenario: Scenario, snapshot: Snapshot, r: int, flows: dict[str, NDArray], duration: float) -> None:
    """``interval`` against the flows of the interval, by NumPy."""
    service = dict(zip(SERVICE_NAMES, snapshot.interval.values[r], strict=True))
    fct = flows["fct"]
    assert service["completed"] == (flows["status"] == COMPLETED).sum()
    assert service["rejected"] == (flows["status"] != COMPLETED).sum()
    if len(fct) == 0:
        assert service["fct_mean"] == service["fct_p50"] == service["fct_p99"] == service["log_slowdown"] == 0.0
        return
    np.testing.assert_allclose(service["fct_mean"], fct.mean(), rtol=1e-12)
    for p in (50, 90, 99):
        np.testing.assert_allclose(service[f"fct_p{p}"], np.percentile(fct, p), rtol=1e-12)
    if (flows["demand"] > 0).all() and (fct > 1e-9).all():
        np.testing.assert_allclose(service["log_slowdown"], np.log(fct / flows["demand"]).mean(), rtol=1e-9, atol=1e-9)


@settings(max_examples=40)
@given(scenario=scenarios(), seed=st.integers(0, 2**63), data=st.data())
def test_same_bits_on_one_thread_and_on_several(scenario, seed, data):
    replicas = 5
    chosen = data.draw(weights(replicas, scenario.balancers, scenario.num_servers))
    prints = []
    for threads in (1, 2, 5, 1):
        sim = Simulation(scenario, replicas, num_threads=threads)
        snapshots = [sim.reset([seed + r for r in range(replicas)])]
        snapshots += [sim.step(chosen, 0.5) for _ in range(3)]
        prints.append([fingerprint(snapshot) for snapshot in snapshots])
        sim.close()
    assert prints[0] == prints[1] == prints[2] == prints[3]


@settings(max_examples=40)
@given(scenario=scenarios(), seed=st.integers(0, 2**63), data=st.data())
def test_a_replica_does_not_feel_the_others(scenario, seed, data):
    """Each replica of a batch is the single simulation with its seed and weights."""
    replicas = 3
    chosen = data.draw(weights(replicas, scenario.balancers, scenario.num_servers))
    batch = Simulation(scenario, replicas)
    batch.reset([seed + r for r in range(replicas)])
    together = [batch.step(chosen, 0.7) for _ in range(3)]
    for r in range(replicas):
        single = Simulation(scenario)
        single.reset([seed + r])
        for snapshot in together:
            alone = single.step(chosen[r : r + 1], 0.7)
            for name in ARRAYS:
                np.testing.assert_array_equal(getattr(alone, name)[0], getattr(snapshot, name)[r], err_msg=name)


@settings(max_examples=40)
@given(scenario=scenarios(), seed=st.integers(0, 2**63), data=st.data())
def test_the_flows_do_not_depend_on_the_actions(scenario, seed, data):
    """Arrivals, demands and balancers by flow are the same under any rule, any weights and any steps."""
    flows = []
    for rule in (scenario.dispatch, data.draw(st.sampled_from(DISPATCH_RULES))):
        sim = Simulation(scenario, dispatch=rule, record_flows=True)
        sim.reset([seed])
        for _ in range(data.draw(st.integers(1, 4))):
            sim.step(data.draw(weights(1, scenario.balancers, scenario.num_servers)), 0.5)
        names = ("flow_id", "arrival", "demand", "balancer")
        flows.append(merged([{name: part[name] for name in names} for part in (sim.take_flows(), sim.open_flows())]))
    common = min(len(part["flow_id"]) for part in flows)
    for name in flows[0]:
        np.testing.assert_array_equal(flows[0][name][:common], flows[1][name][:common], err_msg=name)


@settings(max_examples=30)
@given(scenario=scenarios(), seed=st.integers(0, 2**63))
def test_the_steps_do_not_matter(scenario, seed):
    """Four short steps or one long one: the same flows with the same ends, to rounding."""
    runs = []
    for steps in (1, 4):
        sim = Simulation(scenario, record_flows=True)
        sim.reset([seed])
        for _ in range(steps):
            snapshot = sim.step(None, 4.0 / steps)
        runs.append((snapshot, merged([sim.take_flows()])))
    (one, flows), (four, others) = runs
    np.testing.assert_array_equal(one.started, four.started)
    common, left, right = np.intersect1d(flows["flow_id"], others["flow_id"], return_indices=True)
    # A departure within rounding of the last instant may fall on either side of it.
    assert len(common) >= max(len(flows["flow_id"]), len(others["flow_id"])) - 2
    np.testing.assert_array_equal(flows["server"][left], others["server"][right])
    np.testing.assert_allclose(flows["fct"][left], others["fct"][right], rtol=1e-9, atol=1e-9)


@settings(max_examples=30)
@given(scenario=scenarios(), seed=st.integers(0, 2**63), data=st.data())
def test_reset_leaves_nothing_behind(scenario, seed, data):
    chosen = data.draw(weights(2, scenario.balancers, scenario.num_servers))
    used, fresh = Simulation(scenario, 2), Simulation(scenario, 2)
    used.reset([seed + 7, seed + 8])
    used.step(chosen, 3.0)
    prints = []
    for sim in (used, fresh):
        snapshots = [sim.reset([seed, seed + 1])]
        snapshots += [sim.step(chosen, 1.0) for _ in range(2)]
        prints.append([fingerprint(snapshot) for snapshot in snapshots])
    assert prints[0] == prints[1]


def test_a_masked_reset_leaves_the_others_alone():
    scenario = Scenario(name="mask", servers=(Server(), Server()), workload=Workload(load=0.8))
    masked, plain = Simulation(scenario, 3), Simulation(scenario, 3)
    for sim in (masked, plain):
        sim.reset([1, 2, 3])
        sim.step(None, 5.0)
    masked.reset([0, 9, 0], mask=np.array([False, True, False]))
    after, without = masked.step(None, 5.0), plain.step(None, 5.0)
    single = Simulation(scenario)
    single.reset([9])
    alone = single.step(None, 5.0)
    for name in ARRAYS:
        if name != "sequence_id":
            for r in (0, 2):
                np.testing.assert_array_equal(getattr(after, name)[r], getattr(without, name)[r], err_msg=name)
        np.testing.assert_array_equal(getattr(after, name)[1], getattr(alone, name)[0], err_msg=name)


def test_snapshots_are_the_callers_own():
    scenario = Scenario(name="own", servers=(Server(), Server()), workload=Workload(load=0.8))
    sim = Simulation(scenario)
    sim.reset([1])
    first = sim.step(None, 5.0)
    kept = fingerprint(first)
    second = sim.step(None, 5.0)
    assert fingerprint(first) == kept
    for name in ARRAYS:
        np.asarray(getattr(second, name))[...] = 0
    other = Simulation(scenario)
    other.reset([1])
    other.step(None, 5.0)
    other.step(None, 5.0)
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(sim.step(None, 5.0), name), getattr(other.step(None, 5.0), name))


def test_parts_can_be_left_out():
    """Without reservoirs and service the flows are the same; only their statistics are missing."""
    scenario = Scenario(name="parts", servers=(Server(), Server(workers=1, backlog=1)), workload=Workload(load=0.9))
    full, flows = run_flows(scenario, 50.0)
    bare, same = run_flows(scenario, 50.0, reservoirs=False, service=False)
    for name in flows:
        np.testing.assert_array_equal(flows[name], same[name])
    snapshot = bare.observe()
    assert snapshot.interval is None
    np.testing.assert_array_equal(snapshot.stats[..., 0], full.observe().stats[..., 0])
    assert not snapshot.stats[..., 1:].any()


# Growth and size


def processor_sharing_ends(demands: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ends of flows that all begin at 0 on one core: the k-th smallest leaves when all have had its demand."""
    order = np.argsort(demands)
    steps = np.diff(demands[order], prepend=0.0) * np.arange(len(demands), 0, -1)
    ends = np.empty(len(demands))
    ends[order] = np.cumsum(steps)
    return ends


def first_in_first_out_ends(arrival: NDArray, demand: NDArray, cores: int) -> NDArray[np.float64]:
    """Kiefer and Wolfowitz: each flow takes the core that is free first."""
    free = np.zeros(cores)
    ends = np.empty(len(arrival))
    for i in range(len(arrival)):
        k = int(np.argmin(free))
        free[k] = max(free[k], arrival[i]) + demand[i]
        ends[i] = free[k]
    return ends


def test_thousands_of_open_flows_under_processor_sharing():
    rng = np.random.default_rng(1)
    demand = rng.exponential(size=5000)
    sim, flows = run_flows(trace_scenario(np.zeros(5000), demand, Server()), 1e5)
    np.testing.assert_allclose(flows["fct"], processor_sharing_ends(demand), rtol=1e-9)
    np.testing.assert_allclose(sim.integrals()["work"], demand.sum(), rtol=1e-9)


@pytest.mark.parametrize("cores", [1, 4])
def test_an_overloaded_queue_grows_and_stays_exact(cores):
    """Three times overloaded: the ring of waiting flows grows again and again while its head moves on."""
    workload = Workload(load=3.0, demand=Exponential(mean=0.1))
    scenario = Scenario(name="overload", servers=(Server(cores=cores, workers=cores),), workload=workload)
    duration = 5000 / scenario.rate
    sim = Simulation(scenario, record_flows=True)
    sim.reset([3])
    for _ in range(7):
        sim.step(None, duration / 7)
    assert sim.integrals()["open"][0, 0] > 3000
    parts = [sim.take_flows()]
    sim.step(None, 6 * duration)
    flows = merged([*parts, sim.take_flows()])
    whole = np.arange(4500)
    np.testing.assert_array_equal(flows["flow_id"][whole], whole)
    ends = first_in_first_out_ends(flows["arrival"], flows["demand"], cores)
    np.testing.assert_allclose((flows["arrival"] + flows["fct"])[whole], ends[whole], rtol=1e-9)


def test_growth_in_one_replica_leaves_the_others_as_they_are():
    quiet = Scenario(name="quiet", servers=(Server(workers=1),), workload=Workload(load=0.7))
    busy = quiet.with_changes(load=5.0)
    sim = Simulation(quiet, 2)
    sim.set_scenario(busy, np.array([False, True]))
    sim.reset([4, 4])
    alone = Simulation(quiet)
    alone.reset([4])
    for _ in range(10):
        both, one = sim.step(None, 30.0), alone.step(None, 30.0)
        for name in ARRAYS:
            np.testing.assert_array_equal(getattr(both, name)[0], getattr(one, name)[0], err_msg=name)
    assert both.started[1] - both.completed[1] > 2000


@pytest.mark.parametrize("rule", DISPATCH_RULES)
def test_a_thousand_servers(rule):
    servers = tuple(Server(cores=1 + j % 4) for j in range(1024))
    workload = Workload(load=0.7, demand=Exponential(mean=1.0))
    scenario = Scenario(name="large", servers=servers, workload=workload, dispatch=rule, balancers=2)
    sim = Simulation(scenario, 1)
    sim.reset([1])
    wanted = broadcast(sim, scenario.core_weights)
    for _ in range(3):
        snapshot = sim.step(wanted, 2.0)
        check(sim, snapshot)
    assert snapshot.started.sum() > 9000
    # By expected delay a flow prefers a big busy server to an idle small one.
    assert (snapshot.started > 0).mean() > 0.7


def test_a_reset_without_its_seeds_is_refused_before_anything_runs():
    sim = Simulation(Scenario(servers=(Server(),), workload=Workload(load=0.5)), 2)
    before = sim.reset([1, 2]).sequence_id.tolist()
    for seeds in (None, [1]):
        with pytest.raises(ScenarioError, match="2 seeds"):
            sim.step(None, 1.0, seeds=seeds, reset=np.array([True, False]))
    assert sim.observe().sequence_id.tolist() == [n + 1 for n in before]
    assert sim.integrals()["clock"].tolist() == [0.0, 0.0]
