"""What a region does for a data plane, an agent and an onlooker."""

from __future__ import annotations

import gc
import grp
import math
import os
import signal
import stat
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.stats import chisquare

from lbgym.errors import (
    DataPlaneTimeout,
    InvalidOptionError,
    InvalidWeightsError,
    RegionBusyError,
    RegionError,
    RegionFormatError,
    RegionNotFoundError,
)
from lbgym.features import FEATURE_ALIASES, FEATURE_NAMES
from lbgym.sharedmemory import DEFAULT_LEASE, Publication, ServerState, SharedMemoryRegion, abi, region_names, system
from lbgym.snapshot import IntervalStatistics, Snapshot
from tests.privileges import needs_others
from tests.sharedmemory import nursery as roles
from tests.sharedmemory.nursery import Nursery

_NS = 1_000_000_000
_LONG = 60.0
"""Seconds of a wait that ends at once if all is well."""


def snapshot(n: int, timestamp: float = 0.0) -> Snapshot:
    """Of n active servers, every number another one."""
    rows = np.arange(n, dtype=np.int64)
    stats = (100 * rows[:, None] + np.arange(11)).astype(np.float32)
    return Snapshot(0, timestamp, np.ones(n, np.bool_), stats, None, 4 * rows, rows, rows + 1, rows + 2, 5, None)


def action_count(region: SharedMemoryRegion) -> int:
    return int(region._header()["action_count"])


# Observations

FLOATS = np.array([0.0, -0.0, 1e-45, 1.2e-38, 1e-6, 0.1, 1.0, 1e6, 3e38, np.finfo(np.float32).max], np.float32)
COUNTS = np.array([0, 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1])


@given(
    capacity=st.integers(1, 1024),
    share=st.floats(0.0, 1.0),
    seed=st.integers(0, 2**32),
    nanoseconds=st.integers(0, 2**52),
    truth=st.booleans(),
    counts=st.tuples(*[st.sampled_from(COUNTS.tolist())] * 2),
)
@example(capacity=1024, share=1.0, seed=0, nanoseconds=0, truth=True, counts=(0, 0))
@example(capacity=1, share=0.0, seed=0, nanoseconds=2**52, truth=False, counts=(1, 2**63 - 1))
def test_every_snapshot_comes_back_as_it_was(
    capacity: int, share: float, seed: int, nanoseconds: int, truth: bool, counts: tuple[int, int]
) -> None:
    random = np.random.default_rng(seed)
    n = max(1, round(share * capacity))
    active = random.random(n) < 0.8
    stats = np.where(active[:, None], random.choice(FLOATS, (n, 11)), np.float32(0.0))
    safe_weights = random.choice([0.0, 5e-324, 1.0, 1e300, np.finfo(np.float64).max], n)
    safe_weights[0] = 1e-300
    given_ = Snapshot(
        sequence_id=99,
        timestamp=nanoseconds / _NS,
        active=active,
        stats=stats,
        ground_truth=random.choice(FLOATS, (n, 3)) if truth else None,
        started=random.choice(COUNTS, n),
        completed=random.choice(COUNTS, n),
        rejected=random.choice(COUNTS, n),
        failed=random.choice(COUNTS, n),
        unrouted=counts[0],
        interval=IntervalStatistics(np.zeros(8)),
    )
    with (
        SharedMemoryRegion.create("lb0", num_servers=n, capacity=capacity, safe_weights=safe_weights) as producer,
        SharedMemoryRegion.attach("lb0") as agent,
    ):
        # What was there before leaves no trace.
        producer.publish(Publication.of(snapshot(capacity)))
        producer.publish(Publication.of(replace(snapshot(n), ground_truth=np.ones((n, 3), np.float32))))
        producer.set_safe_weights(safe_weights)
        assert producer.publish(Publication.of(given_, fct_count=counts[1], fct_sum=nanoseconds / _NS)) == 3
        buffer = agent.new_buffer()
        for read in (agent.read_into(buffer), agent.read_earlier(buffer, 3)):
            assert read
            got = buffer.snapshot()
            assert (got.sequence_id, got.timestamp, got.unrouted) == (3, given_.timestamp, counts[0])
            assert (buffer.timestamp_ns, buffer.num_servers, buffer.fct_count) == (nanoseconds, n, counts[1])
            assert abs(buffer.fct_sum_ns - nanoseconds) <= 1
            assert got.interval is None
            for name in ("active", "stats", "ground_truth", "started", "completed", "rejected", "failed"):
                before, after = getattr(given_, name), getattr(got, name)
                if before is None:
                    assert after is None
                else:
                    assert (after.dtype, after.shape) == (before.dtype, before.shape)
                    assert after.tobytes() == before.tobytes()
            assert buffer.weights[:n].tobytes() == buffer.safe_weights[:n].tobytes() == safe_weights.tobytes()
            assert buffer.safe and buffer.applied_sequence_id is None and buffer.applied_at is None
            assert 0 <= time.monotonic_ns() - buffer.published_at < 3600 * _NS


def test_a_snapshot_has_as_many_rows_as_are_asked_for() -> None:
    with SharedMemoryRegion.create("lb0", num_servers=3, capacity=4) as region:
        shown = replace(snapshot(3), ground_truth=np.ones((3, 3), np.float32), active=np.array([True, False, True]))
        region.publish(Publication.of(shown))
        buffer = region.new_buffer()
        assert region.read_into(buffer)
        more = buffer.snapshot(6)
        assert more.active.tolist() == [True, False, True, False, False, False]
        assert more.stats[:, 1].tolist() == [1.0, 0.0, 201.0, 0.0, 0.0, 0.0]
        assert more.completed.tolist() == [0, 1, 2, 0, 0, 0]
        assert more.ground_truth is not None and more.ground_truth[:, 0].tolist() == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
        fewer = buffer.snapshot(2)
        assert fewer.active.tolist() == [True, False] and fewer.started.tolist() == [0, 4]
        # Rows are the snapshot's own.
        fewer.stats[:] = 7.0
        assert buffer.stats[0, 1] == 1.0


def test_the_dictionary_has_every_feature_by_name() -> None:
    with (
        SharedMemoryRegion.create("lb0", num_servers=3, safe_weights=[1.0, 2.0, 4.0]) as producer,
        SharedMemoryRegion.attach("lb0") as agent,
    ):
        producer.publish(Publication.of(replace(snapshot(3, 12.5), active=np.array([True, False, True]))))
        agent.write_action(sequence_id=41, weights=[8.0, 8.0, 16.0])
        seen = agent.read_observation()
        assert seen.pop("age") >= 0.0
        assert list(seen) == ["sequence_id", "timestamp", "active_servers", "server_stats", "applied_sequence_id"]
        assert (seen["sequence_id"], seen["timestamp"], seen["applied_sequence_id"]) == (1, 12.5, None)
        assert seen["active_servers"] == [0, 2] == list(seen["server_stats"])
        for server, row in seen["server_stats"].items():
            assert tuple(row)[:11] == FEATURE_NAMES
            assert [row[name] for name in FEATURE_NAMES] == [100.0 * server + column for column in range(11)]
            assert tuple(row["reservoir_features"]) == FEATURE_NAMES[1:]
            assert row["reservoir_features"] == {name: row[name] for name in FEATURE_NAMES[1:]}
            assert list(row)[11:] == ["weight", "reservoir_features"]
        assert [row["weight"] for row in seen["server_stats"].values()] == [1.0, 4.0]
        producer.weights_in_force()
        producer.publish(Publication.of(snapshot(3)))
        seen = agent.read_observation()
        assert seen["applied_sequence_id"] == 41
        assert [row["weight"] for row in seen["server_stats"].values()] == [8.0, 8.0, 16.0]


def test_features_are_found_by_their_aliases() -> None:
    with SharedMemoryRegion.create("lb0", num_servers=1) as region:
        region.publish(Publication.of(snapshot(1)))
        row = region.read_observation()["server_stats"][0]
        for alias, name in FEATURE_ALIASES.items():
            assert row[alias] == row[name] == FEATURE_NAMES.index(name)
            assert row["reservoir_features"][alias] == row.get(alias) == row[name] and alias in row
        assert isinstance(row["flow_duration_avg_decay"], float)
        assert list(row) == [*FEATURE_NAMES, "weight", "reservoir_features"]
        for unknown in ("flow_duration", "fct_avg_", "n_flow"):
            assert unknown not in row and row.get(unknown, 7) == 7
            with pytest.raises(KeyError, match=unknown):
                row[unknown]
        with pytest.raises(KeyError):
            row["reservoir_features"]["n_flow_on"]


def test_actions_are_written_by_position_too() -> None:
    with SharedMemoryRegion.create("lb0", num_servers=2) as region:
        region.write_action(5, [1.0, 3.0])
        assert region.weights_in_force().tolist() == [1.0, 3.0]
        action = region.read_action()
        assert action is not None and (action.sequence_id, action.lease) == (5, DEFAULT_LEASE)
        for lease in (0.0, -1.0, math.nan, True, "1", np.complex64(2 + 1j)):
            with pytest.raises(InvalidOptionError, match="lease must be a number above 0 seconds, got"):
                region.write_action(5, [1.0, 3.0], lease)  # type: ignore[arg-type]


def test_before_the_first_observation() -> None:
    with SharedMemoryRegion.create("lb0", num_servers=1) as producer, SharedMemoryRegion.attach("lb0") as agent:
        assert agent.latest == 0
        buffer = agent.new_buffer()
        assert not agent.read_into(buffer)
        for number in (-1, 0, 1, 2**63, 2**64):
            assert not agent.read_earlier(buffer, number)
        assert not agent.wait_observation(0, 0.0)
        with pytest.raises(DataPlaneTimeout, match=r"region 'lb0': nothing has been published yet, waited 0\.01 s"):
            agent.read_observation(timeout=0.01)
        assert producer.read_action() is None


def test_the_ring_keeps_the_last_ones() -> None:
    with SharedMemoryRegion.create("lb0", num_servers=2) as producer, SharedMemoryRegion.attach("lb0") as agent:
        buffer = agent.new_buffer()
        for number in range(1, 12):
            assert producer.publish(Publication.of(snapshot(2, float(number)))) == number == agent.latest
            for earlier in range(1, number + 2):
                there = number - abi.NUM_FRAMES < earlier <= number
                assert agent.read_earlier(buffer, earlier) == there
                if there:
                    assert (buffer.sequence_id, buffer.timestamp) == (earlier, float(earlier))


def test_reading_allocates_nothing() -> None:
    with SharedMemoryRegion.create("lb0", num_servers=64) as region:
        region.publish(Publication.of(snapshot(64)))
        buffer = region.new_buffer()
        address = buffer.words.ctypes.data
        for _ in range(10):
            region.read_into(buffer)
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            for _ in range(1000):
                region.read_into(buffer)
            after, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        # The status that the kernel returns is an object of Python for a moment, and a measurement of coverage has
        # some; a copy of the observation, or what a thousand reads leave behind, would be more.
        assert after - before < 1000 and peak - before < buffer.words.nbytes / 2
        assert buffer.words.ctypes.data == address


def test_a_buffer_is_private() -> None:
    with SharedMemoryRegion.create("lb0", num_servers=2) as region:
        region.publish(Publication.of(snapshot(2, 1.0)))
        buffer = region.new_buffer()
        region.read_into(buffer)
        for _ in range(8):
            region.publish(Publication.of(replace(snapshot(2, 2.0), stats=np.zeros((2, 11), np.float32))))
        assert buffer.timestamp == 1.0 and buffer.stats[1, 10] == 110.0
        assert not np.shares_memory(buffer.words, region._words)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"stats": np.full((2, 11), np.nan, np.float32)}, "not finite"),
        ({"stats": np.full((2, 11), np.inf, np.float32)}, "not finite"),
        ({"stats": np.full((2, 11), -1.0, np.float32)}, "negative"),
        ({"stats": np.ones((3, 11), np.float32)}, r"stats must have shape \(2, 11\), got \(3, 11\)"),
        ({"stats": np.ones(11, np.float32)}, r"stats must have shape \(2, 11\), got \(11,\)"),
        ({"ground_truth": np.full((2, 3), np.nan, np.float32)}, "not finite"),
        ({"ground_truth": np.ones((2, 4), np.float32)}, r"ground_truth must have shape \(2, 3\)"),
        ({"completed": np.array([1, -1])}, "negative"),
        ({"started": np.array(1)}, r"started must have shape \(2,\), got \(\)"),
        ({"failed": np.array([1, 2, 3])}, r"failed must have shape \(2,\)"),
        ({"active": np.ones((2, 1), np.bool_)}, r"active must have shape \(2,\), got \(2, 1\)"),
        ({"active": np.ones(0, np.bool_)}, "room for 1 to 4 servers, got 0"),
        ({"active": np.ones(5, np.bool_)}, "room for 1 to 4 servers, got 5"),
        ({"timestamp": -1.0}, "timestamp in ns must be from 0 to"),
        ({"timestamp": math.nan}, "NaN"),
        ({"timestamp": math.inf}, "infinity"),
        ({"timestamp": 1e10}, "timestamp in ns must be from 0 to"),
        ({"unrouted": -1}, "unrouted must be from 0 to"),
        ({"fct_count": -1}, "fct_count must be from 0 to"),
        ({"fct_count": 1 << 63}, "fct_count must be from 0 to"),
        ({"fct_sum": -1.0}, "fct_sum in ns must be from 0 to"),
        ({"fct_sum": math.nan}, "NaN"),
    ],
)
def test_no_bad_observation_is_published(change: dict[str, Any], sentence: str) -> None:
    options = {key: change[key] for key in change if key.startswith("fct")}
    bad = replace(snapshot(2), **{key: change[key] for key in change if key not in options})
    with SharedMemoryRegion.create("lb0", num_servers=2, capacity=4) as region:
        region.publish(Publication.of(snapshot(2, 1.0)))
        with pytest.raises(InvalidOptionError, match=sentence) as failure:
            region.publish(Publication.of(bad, **options))
        assert "region 'lb0'" in str(failure.value)
        assert region.latest == 1
        assert region.publish(Publication.of(snapshot(2, 2.0))) == 2
        assert region.read_observation()["timestamp"] == 2.0


# Waiting


def test_a_publication_wakes_all_who_wait(nursery: Nursery) -> None:
    with (
        SharedMemoryRegion.create("lb0", num_servers=1) as region,
        nursery.running(roles.wait, name="lb0") as one,
        nursery.running(roles.wait, name="lb0") as other,
    ):
        for child in (one, other):
            assert child.hear() == "waiting"
            while Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] != "S":
                time.sleep(0.001)
        assert region._header()["observation_waiters"] == 1
        began = time.monotonic()
        region.publish(Publication.of(snapshot(1)))
        assert region._header()["observation_waiters"] == 0
        assert one.hear() is True and other.hear() is True
        assert region._header()["observation_waiters"] == 0
        # A wake that was lost would show after their 30 s.
        assert time.monotonic() - began < 25.0


def test_an_action_wakes_the_producer(nursery: Nursery) -> None:
    with SharedMemoryRegion.create("lb0", num_servers=1, capacity=roles.SERVERS) as region:
        assert not region.wait_action(0.0)
        with nursery.running(roles.drive, name="lb0", lease=_LONG, pause=0.02):
            for _ in range(10):
                began = time.monotonic()
                assert region.wait_action(_LONG)
                assert time.monotonic() - began < _LONG / 2
                region.weights_in_force()
                assert not region.safe_weights_in_force


def test_who_may_only_read_can_wait() -> None:
    with (
        SharedMemoryRegion.create("lb0", num_servers=1, publish_interval=0.001) as producer,
        SharedMemoryRegion.attach("lb0", read_only=True) as onlooker,
    ):
        assert not onlooker.wait_observation(0, 0.01)
        producer.publish(Publication.of(snapshot(1)))
        assert onlooker.wait_observation(0, _LONG)
        assert not producer._header()["observation_waiters"]


def test_waits_without_end_and_without_sense() -> None:
    with SharedMemoryRegion.create("lb0", num_servers=1) as region:
        region.publish(Publication.of(snapshot(1)))
        assert region.wait_observation(0, math.inf)
        assert not region.wait_observation(1, -1.0)
        for timeout in (math.nan, None, "1", True):
            for call in (lambda t: region.wait_observation(1, t), region.wait_action):
                with pytest.raises(InvalidOptionError, match="timeout must be a number of seconds, got"):
                    call(timeout)
            with pytest.raises(InvalidOptionError, match="timeout must be a number of seconds, got"):
                SharedMemoryRegion.attach("lb1", timeout=timeout)


def test_a_signal_ends_a_wait() -> None:
    """Python's handlers run while a process waits, and may raise, as Ctrl-C does."""

    class Rung(Exception):
        pass

    def ring(*_: Any) -> None:
        raise Rung

    before = signal.signal(signal.SIGALRM, ring)
    try:
        with SharedMemoryRegion.create("lb0", num_servers=1) as region:
            for wait in (lambda: region.wait_observation(0, math.inf), lambda: region.wait_action(math.inf)):
                with pytest.raises(Rung):
                    # Inside, as it may ring before the wait begins.
                    signal.setitimer(signal.ITIMER_REAL, 0.02)
                    wait()
    finally:
        signal.signal(signal.SIGALRM, before)


# Actions


def test_an_action_is_what_was_written() -> None:
    with SharedMemoryRegion.create("lb0", num_servers=3) as producer, SharedMemoryRegion.attach("lb0") as agent:
        assert agent.agent_pid is None and agent.agent_heartbeat_age == math.inf and not agent.agent_alive
        for number, weights in enumerate(
            ([1, 2, 3], (0.5, 0.0, 1e300), np.arange(6.0)[::2], np.ones(3, np.float32), np.ones(64)), start=1
        ):
            before = time.monotonic_ns()
            written = agent.write_action(sequence_id=number - 1, weights=weights)
            assert before <= written <= time.monotonic_ns()
            for region in (producer, agent):
                action = region.read_action()
                assert action is not None
                assert (action.sequence_id, action.written_at) == (number - 1, written)
                assert (action.lease, action.lease_ns) == (DEFAULT_LEASE, DEFAULT_LEASE * _NS)
                assert action.num_servers == len(weights)
                assert action.weights[: len(weights)].tolist() == np.asarray(weights, np.float64).tolist()
            assert action_count(producer) == number
        assert agent.agent_pid == os.getpid() and agent.agent_alive and producer.agent_alive
        assert 0.0 <= producer.agent_heartbeat_age < 3600.0
        agent.write_action(sequence_id=2**63 - 1, weights=[1.0], lease=math.inf)
        action = producer.read_action()
        assert action is not None and action.sequence_id == 2**63 - 1
        assert action.lease == math.inf and action.lease_ns == 0
        agent.write_action(sequence_id=np.int32(7), weights=[1.0], lease=1e-30)
        action = producer.read_action()
        assert action is not None and (action.sequence_id, action.lease_ns) == (7, 1)


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        ([], r"weights must be 1 to 4 numbers, one per server, got shape \(0,\)"),
        ([1.0] * 5, r"weights must be 1 to 4 numbers, one per server, got shape \(5,\)"),
        ([[1.0, 2.0]], r"got shape \(1, 2\)"),
        (2.0, "got shape"),
        ([1.0, math.nan], "weights must be finite numbers of at least 0, got .*nan"),
        ([1.0, math.inf], "weights must be finite numbers of at least 0, got .*inf"),
        ([1.0, -1e-300], "weights must be finite numbers of at least 0, got"),
        ([0.0, 0.0], "one of weights must be above 0, got"),
        ([0.0, -0.0], "one of weights must be above 0, got"),
        ("many", "weights must be numbers, one per server, got 'many'"),
        ([[1.0], [1.0, 2.0]], "weights must be numbers, one per server"),
        (None, "weights must be|got shape"),
    ],
)
def test_no_bad_weights_are_written(weights: Any, sentence: str) -> None:
    with (
        SharedMemoryRegion.create("lb0", num_servers=2, capacity=4) as producer,
        SharedMemoryRegion.attach("lb0") as agent,
    ):
        agent.write_action(sequence_id=1, weights=[1.0, 3.0])
        with pytest.raises(InvalidWeightsError, match=sentence):
            agent.write_action(sequence_id=2, weights=weights)
        assert action_count(producer) == 1
        assert producer.weights_in_force().tolist() == [1.0, 3.0]


@pytest.mark.parametrize(
    "options",
    [
        {"sequence_id": -1}, {"sequence_id": 1 << 63}, {"sequence_id": 1.0}, {"sequence_id": True},
        {"sequence_id": "1"}, {"sequence_id": None}, {"lease": 0.0}, {"lease": -1.0}, {"lease": math.nan},
        {"lease": "5"}, {"lease": None},
    ],
)  # fmt: skip
def test_no_bad_ids_and_leases_are_written(options: dict[str, Any]) -> None:
    (name, value), *_ = options.items()
    with SharedMemoryRegion.create("lb0", num_servers=1) as region:
        with pytest.raises(InvalidOptionError, match=f"{name} must be .*, got {value!r}"):
            region.write_action(**{"sequence_id": 1, "weights": [1.0], **options})
        assert action_count(region) == 0


# The alias table


def table_of(weights: Any) -> tuple[np.ndarray, np.ndarray]:
    """Threshold and alias that the agent publishes with these weights."""
    weights = np.asarray(weights, np.float64)
    with SharedMemoryRegion.create("lb0", num_servers=1, capacity=max(64, len(weights))) as region:
        region.write_action(sequence_id=1, weights=weights)
        action = region.read_action()
        assert action is not None
        return action.threshold[: len(weights)].copy(), action.alias[: len(weights)].copy()


def shares_of(threshold: np.ndarray, alias: np.ndarray) -> list[Fraction]:
    """What the table gives each server, exactly."""
    n = len(threshold)
    shares = [0] * n
    for i, (kept, other) in enumerate(zip(threshold.tolist(), alias.tolist(), strict=True)):
        shares[i] += 2**32 if other == i else kept
        shares[other] += 0 if other == i else 2**32 - kept
    return [Fraction(share, n * 2**32) for share in shares]


def assert_right_table(weights: np.ndarray) -> None:
    n = len(weights)
    threshold, alias = table_of(weights)
    assert alias.max() < n
    shares = shares_of(threshold, alias)
    assert sum(shares) == 1
    exact = [Fraction(weight) for weight in weights.tolist()]
    total = sum(exact)
    # Each of n buckets, which have 1/n each, rounds to 32 bits; and the computation rounds to 53.
    tolerance = Fraction(1, 2**32) + Fraction(n, 2**50)
    for weight, share in zip(exact, shares, strict=True):
        assert abs(share - weight / total) <= tolerance
        if weight == 0:
            assert share == 0


WEIGHTS = st.one_of(
    st.floats(0.0, 10.0),
    st.sampled_from([0.0, 5e-324, 1e-300, 1e-9, 1.0, 1.0 + 2**-52, 1e9, 1e300, float(np.finfo(np.float64).max)]),
)


@given(st.lists(WEIGHTS, min_size=1, max_size=64).filter(any))
def test_the_alias_table_gives_every_server_its_share(weights: list[float]) -> None:
    assert_right_table(np.array(weights))


@pytest.mark.parametrize(
    "weights",
    [
        [1.0],
        [1e-300],
        [float(np.finfo(np.float64).max)] * 3,
        [5e-324] * 7,
        [1.0] * 1024,
        [1e-300, 1e300],
        [1e300, 1e-300, 1e300],
        [0.0, 0.0, 1.0],
        [1.0] + [0.0] * 1023,
        [0.1] * 10,
        [1.0 / 3.0] * 3 + [2.0 / 3.0],
        *[np.random.default_rng(seed).uniform(0.1, 10.0, 1024).tolist() for seed in range(3)],
        *[np.random.default_rng(seed).pareto(0.3, 1000).tolist() for seed in range(3)],
    ],
    ids=lambda weights: f"{len(weights)}-{weights[0]:.3g}-{max(weights):.3g}",
)
def test_alias_tables_of_odd_weights(weights: list[float]) -> None:
    assert_right_table(np.array(weights))


@pytest.mark.parametrize("n", [1, 2, 3, 64, 1000])
def test_draws_by_the_alias_table_are_as_the_weights_say(n: int) -> None:
    random = np.random.default_rng(n)
    weights = random.uniform(0.1, 10.0, n)
    weights[2::5] = 0.0
    threshold, alias = table_of(weights)
    hashes = random.integers(0, 2**64, 1_000_000, np.uint64)
    bucket = ((hashes >> np.uint64(32)) * np.uint64(n) >> np.uint64(32)).astype(np.int64)
    low = (hashes & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    server = np.where(low < threshold[bucket], bucket, alias[bucket])
    drawn = np.bincount(server, minlength=n)
    possible = weights > 0.0
    assert not drawn[~possible].any()
    if n > 1:
        expected = weights[possible] / weights.sum() * len(hashes)
        assert chisquare(drawn[possible], expected).pvalue > 1e-3


# Weights in force


def read(region: SharedMemoryRegion) -> tuple[list[float], bool, int | None]:
    """Of the newest observation: weights in force, whether they are the safe ones, id of the last action in force."""
    buffer = region.new_buffer()
    assert region.read_into(buffer)
    return buffer.weights[: buffer.num_servers].tolist(), buffer.safe, buffer.applied_sequence_id


def test_a_lease_that_ends_puts_the_safe_weights_in_force() -> None:
    with (
        SharedMemoryRegion.create("lb0", num_servers=2, safe_weights=[1.0, 2.0]) as producer,
        SharedMemoryRegion.attach("lb0") as agent,
    ):
        assert producer.weights_in_force().tolist() == [1.0, 2.0] and producer.safe_weights_in_force
        producer.publish(Publication.of(snapshot(2)))
        assert read(agent) == ([1.0, 2.0], True, None)
        written = agent.write_action(sequence_id=5, weights=[3.0, 4.0], lease=0.05)
        found = producer.weights_in_force().tolist()
        producer.publish(Publication.of(snapshot(2)))
        if time.monotonic_ns() < written + 0.05 * _NS:
            assert found == [3.0, 4.0] and not producer.safe_weights_in_force
            assert read(agent) == ([3.0, 4.0], False, 5)
        # A second before the end and at the end: exactly then, by the monotonic clock.
        while True:
            before = time.monotonic_ns()
            found = producer.weights_in_force().tolist()
            after = time.monotonic_ns()
            if found == [1.0, 2.0]:
                break
            assert before < written + 0.05 * _NS and not producer.safe_weights_in_force
        assert after >= written + 0.05 * _NS and producer.safe_weights_in_force
        producer.publish(Publication.of(snapshot(2)))
        weights, safe, applied = read(agent)
        assert (weights, safe) == ([1.0, 2.0], True) and applied in (5, None)
        assert agent.read_observation()["applied_sequence_id"] is None
        # The next action is in force again, and an endless lease does not end.
        agent.write_action(sequence_id=6, weights=[5.0, 6.0], lease=math.inf)
        assert producer.weights_in_force().tolist() == [5.0, 6.0]
        producer.publish(Publication.of(snapshot(2)))
        assert read(agent) == ([5.0, 6.0], False, 6)


def test_an_action_whose_lease_is_over_never_comes_in_force() -> None:
    with SharedMemoryRegion.create("lb0", num_servers=1, safe_weights=[9.0]) as region:
        region.write_action(sequence_id=1, weights=[2.0], lease=1e-9)
        assert region.weights_in_force().tolist() == [9.0]
        region.publish(Publication.of(snapshot(1)))
        assert read(region) == ([9.0], True, None)


def test_a_lease_that_begins_in_the_future_begins_now() -> None:
    """As that of an agent in another time namespace: it must end all the same."""
    with SharedMemoryRegion.create("lb0", num_servers=1, safe_weights=[9.0]) as region:
        region.write_action(sequence_id=1, weights=[2.0], lease=0.02)
        at = abi.Layout(region.capacity).actions_offset + abi.Layout(region.capacity).action_size
        region._words[(at + abi.ACTION.offset("written_at")) // 8] = time.monotonic_ns() + 3600 * _NS
        began = time.monotonic_ns()
        while region.weights_in_force().tolist() == [2.0]:
            assert time.monotonic_ns() - began < 30 * _NS
        assert region.safe_weights_in_force and time.monotonic_ns() - began >= 0.02 * _NS


def test_applied_says_when() -> None:
    with SharedMemoryRegion.create("lb0", num_servers=1) as region:
        written = region.write_action(sequence_id=3, weights=[2.0])
        region.publish(Publication.of(snapshot(1)))
        assert read(region) == ([1.0], True, None)  # nobody has looked for an action yet
        region.weights_in_force()
        looked = time.monotonic_ns()
        region.publish(Publication.of(snapshot(1)))
        buffer = region.new_buffer()
        region.read_into(buffer)
        applied = buffer.applied_at
        assert applied is not None and written <= applied <= looked
        region.weights_in_force()
        region.publish(Publication.of(snapshot(1)))
        region.read_into(buffer)
        assert buffer.applied_at == applied


def test_safe_weights_can_be_changed() -> None:
    with SharedMemoryRegion.create("lb0", num_servers=2) as region:
        assert region.weights_in_force().tolist() == [1.0, 1.0]
        region.set_safe_weights([3.0, 0.0])
        assert region.weights_in_force().tolist() == [3.0, 0.0]
        region.write_action(sequence_id=1, weights=[7.0])
        # Of servers that the agent gave none, the safe weights hold.
        assert region.weights_in_force().tolist() == [7.0, 0.0]
        region.set_safe_weights([3.0, 5.0])
        assert region.weights_in_force().tolist() == [7.0, 5.0]
        region.publish(Publication.of(snapshot(2)))
        buffer = region.new_buffer()
        region.read_into(buffer)
        assert buffer.safe_weights[:2].tolist() == [3.0, 5.0]
        for bad in ([1.0], [1.0, 2.0, 3.0], [1.0, -1.0], [0.0, 0.0], [1.0, math.nan], "ab", [[1.0, 1.0]]):
            with pytest.raises(InvalidWeightsError, match="safe_weights"):
                region.set_safe_weights(bad)
        assert region.weights_in_force().tolist() == [7.0, 5.0]


def test_servers_join_and_leave() -> None:
    with (
        SharedMemoryRegion.create("lb0", num_servers=2, capacity=5, safe_weights=[2.0, 3.0]) as producer,
        SharedMemoryRegion.attach("lb0") as agent,
    ):
        producer.publish(Publication.of(snapshot(4)))
        assert read(agent) == ([2.0, 3.0, 1.0, 1.0], True, None)
        agent.write_action(sequence_id=1, weights=[5.0, 6.0, 7.0])
        assert producer.weights_in_force().tolist() == [5.0, 6.0, 7.0, 1.0]
        producer.publish(Publication.of(snapshot(5)))
        assert read(agent) == ([5.0, 6.0, 7.0, 1.0, 1.0], False, 1)
        producer.publish(Publication.of(snapshot(1)))
        assert read(agent) == ([5.0], False, 1)
        agent.write_action(sequence_id=2, weights=[1.0, 2.0, 3.0, 4.0, 5.0])
        assert producer.weights_in_force().tolist() == [1.0]
        producer.publish(Publication.of(snapshot(3)))
        assert read(agent) == ([1.0, 2.0, 3.0], False, 2)
        buffer = agent.new_buffer()
        agent.read_into(buffer)
        assert buffer.safe_weights[:3].tolist() == [2.0, 1.0, 1.0]
        assert agent.read_observation()["active_servers"] == [0, 1, 2]


def test_weights_in_force_are_never_all_0() -> None:
    """When those leave that were to take the flows."""
    with SharedMemoryRegion.create("lb0", num_servers=3, safe_weights=[0.0, 4.0, 5.0]) as region:
        region.write_action(sequence_id=1, weights=[0.0, 0.0, 2.0])
        assert region.weights_in_force().tolist() == [0.0, 0.0, 2.0]
        region.publish(Publication.of(snapshot(2)))
        assert read(region) == ([0.0, 4.0], True, 1)
        for _ in range(2):
            assert region.weights_in_force().tolist() == [0.0, 4.0] and region.safe_weights_in_force
        region.publish(Publication.of(snapshot(1)))
        assert read(region) == ([1.0], True, 1)
        region.write_action(sequence_id=2, weights=[3.0])
        assert region.weights_in_force().tolist() == [3.0] and not region.safe_weights_in_force


# Names, files, roles


@pytest.mark.parametrize(
    "name",
    [
        "", ".", "..", ".hidden", "-x", "_x", "a/b", "/a", "a b", "a\n", "a\0", "ä", "a" * 201, "a*", None, 3,
        Path("a"), b"a",
    ],
    ids=repr,
)  # fmt: skip
def test_names_that_are_refused(name: Any, shm_dir: Path) -> None:
    for call in (SharedMemoryRegion.attach, lambda name: SharedMemoryRegion.create(name, num_servers=1)):
        with pytest.raises(RegionError, match="the name of a region has 1 to 200 letters, digits"):
            call(name)
    assert not list(shm_dir.iterdir())


@pytest.mark.parametrize("name", ["a", "0", "marllb_lb0", "A.b-c_9", "a" * 200])
def test_names_that_are_good(name: str, shm_dir: Path) -> None:
    with SharedMemoryRegion.create(name, num_servers=1) as region:
        assert (region.name, region.path) == (name, shm_dir / name)
        assert list(region_names()) == [name]


def test_where_regions_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LBGYM_SHM_DIR")
    assert system.path_of("lb0") == Path("/dev/shm/lb0")


def test_what_a_region_says_about_itself() -> None:
    before = time.time()
    with SharedMemoryRegion.create(
        "lb0", num_servers=3, publish_interval=0.2, clock_rate=20.0, driver="emulator ü"
    ) as producer:
        assert not producer.read_only and producer.is_producer
        with SharedMemoryRegion.attach("lb0") as agent:
            assert not agent.is_producer
            for region in (producer, agent):
                assert region.version == (abi.VERSION_MAJOR, abi.VERSION_MINOR)
                assert region.capacity == region.layout.capacity == abi.DEFAULT_CAPACITY
                assert (region.publish_interval, region.clock_rate, region.driver) == (0.2, 20.0, "emulator ü")
                assert region.producer_pid == os.getpid() and region.producer_alive
                assert before - 1.0 <= region.created_at <= time.time() + 1.0
                assert not region.closed_by_producer and not region.replaced and not region.closed
            assert producer.instance == agent.instance
            assert repr(producer) == "<SharedMemoryRegion 'lb0', capacity 64, producer>"
            assert repr(agent) == "<SharedMemoryRegion 'lb0', capacity 64, reader>"
            agent.lock_agent()
            agent.lock_agent()
            assert repr(agent) == "<SharedMemoryRegion 'lb0', capacity 64, agent>"
            # Half of the clock's time: also a machine that has just booted was up then.
            past = time.monotonic_ns() // 2
            producer._words[abi.HEADER.offset("heartbeat") // 8] = past
            assert past <= agent.heartbeat_age * _NS + 1.0
            beat = time.monotonic_ns()
            producer.heartbeat()
            assert agent.heartbeat_age * _NS <= time.monotonic_ns() - beat + 1.0
            # A beat that is still to come, by the clock of another time namespace.
            producer._words[abi.HEADER.offset("heartbeat") // 8] = 2 * time.monotonic_ns()
            assert agent.heartbeat_age == 0.0
    assert SharedMemoryRegion.create("big", num_servers=100).capacity == 100


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_servers": 0}, "num_servers must be a whole number from 1 to 65536, got 0"),
        ({"num_servers": 65_537}, "num_servers must be a whole number from 1 to 65536, got 65537"),
        ({"num_servers": 2.0}, "num_servers must be a whole number"),
        ({"num_servers": True}, "num_servers must be a whole number"),
        ({"num_servers": 4, "capacity": 3}, "capacity must be a whole number from 4 to 65536, got 3"),
        ({"capacity": 65_537}, "capacity must be a whole number from 1 to 65536, got 65537"),
        ({"publish_interval": 0.0}, "publish_interval must be a finite number from 1e-06 to 86400 seconds, got 0"),
        ({"publish_interval": math.nan}, "publish_interval must be"),
        ({"publish_interval": "1"}, "publish_interval must be"),
        ({"publish_interval": np.complex64(2 + 1j)}, "publish_interval must be"),
        ({"clock_rate": 0.0}, "clock_rate must be a finite number from 1e-06 to 1e[+]06, got 0"),
        ({"clock_rate": math.inf}, "clock_rate must be"),
        ({"driver": "x" * 25}, "driver must be at most 24 bytes of printable text"),
        ({"driver": "ü" * 13}, "driver must be at most 24 bytes"),
        ({"driver": "a\0b"}, "driver must be"),
        ({"driver": "\x1b[2J"}, "driver must be"),
        ({"driver": "\ud800"}, "driver must be"),
        ({"mode": 0o1000}, "mode must be permissions from 0 to 0o777, got 512"),
        ({"mode": -1}, "mode must be"),
        ({"mode": "rw"}, "mode must be"),
        ({"group": "no such group"}, "there is no group 'no such group' on this machine"),
        ({"group": -1}, "group must be a whole number"),
        ({"group": 1.5}, "group must be a whole number"),
        ({"safe_weights": [1.0, 1.0]}, "safe_weights must be 1 numbers, one per server, got 2"),
        ({"safe_weights": [0.0]}, "one of safe_weights must be above 0"),
        ({"safe_weights": [-1.0]}, "safe_weights must be finite numbers of at least 0"),
        ({"safe_weights": [math.inf]}, "safe_weights must be finite numbers of at least 0"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], sentence: str, shm_dir: Path) -> None:
    with pytest.raises((InvalidOptionError, InvalidWeightsError), match=sentence):
        SharedMemoryRegion.create("lb0", **{"num_servers": 1, **options})
    assert not list(shm_dir.iterdir())


@needs_others
def test_mode_and_group() -> None:
    before = os.umask(0o077)
    try:
        with SharedMemoryRegion.create("lb0", num_servers=1) as region:
            assert stat.S_IMODE(region.path.stat().st_mode) == 0o600
            assert region.path.stat().st_gid == os.getegid()
        for group in {os.getegid(), *os.getgroups()} | ({12_345} if os.geteuid() == 0 else set()):
            with SharedMemoryRegion.create("lb0", num_servers=1, mode=0o660, group=group) as region:
                status = region.path.stat()
                assert (stat.S_IMODE(status.st_mode), status.st_gid) == (0o660, group)
        name = grp.getgrgid(os.getegid()).gr_name
        with SharedMemoryRegion.create("lb0", num_servers=1, group=name) as region:
            assert region.path.stat().st_gid == os.getegid()
    finally:
        os.umask(before)


def test_who_may_only_read() -> None:
    with (
        SharedMemoryRegion.create("lb0", num_servers=2) as producer,
        SharedMemoryRegion.attach("lb0", read_only=True) as onlooker,
    ):
        producer.publish(Publication.of(snapshot(2)))
        producer.write_action(sequence_id=1, weights=[1.0, 2.0])
        assert onlooker.read_only and onlooker.producer_alive and onlooker.agent_alive
        assert onlooker.read_observation()["sequence_id"] == 1
        action = onlooker.read_action()
        assert action is not None and action.sequence_id == 1
        for call in (onlooker.lock_agent, lambda: onlooker.write_action(sequence_id=1, weights=[1.0])):
            with pytest.raises(RegionError, match="region 'lb0' was attached read-only; an agent must be allowed"):
                call()


PRODUCERS_CALLS: dict[str, Callable[[SharedMemoryRegion], Any]] = {
    "publish": lambda region: region.publish(Publication.of(snapshot(1))),
    "heartbeat": lambda region: region.heartbeat(),
    "set_safe_weights": lambda region: region.set_safe_weights([1.0]),
    "weights_in_force": lambda region: region.weights_in_force(),
    "wait_action": lambda region: region.wait_action(0.0),
}
CALLS: dict[str, Callable[[SharedMemoryRegion], Any]] = {
    "latest": lambda region: region.latest,
    "heartbeat_age": lambda region: region.heartbeat_age,
    "agent_heartbeat_age": lambda region: region.agent_heartbeat_age,
    "agent_pid": lambda region: region.agent_pid,
    "agent_alive": lambda region: region.agent_alive,
    "producer_alive": lambda region: region.producer_alive,
    "read_into": lambda region: region.read_into(region.new_buffer()),
    "read_earlier": lambda region: region.read_earlier(region.new_buffer(), 1),
    "read_observation": lambda region: region.read_observation(),
    "wait_observation": lambda region: region.wait_observation(0, 0.0),
    "lock_agent": lambda region: region.lock_agent(),
    "write_action": lambda region: region.write_action(sequence_id=1, weights=[1.0]),
    "read_action": lambda region: region.read_action(),
}


@pytest.mark.parametrize("call", PRODUCERS_CALLS)
def test_only_its_creator_is_the_producer(call: str) -> None:
    with SharedMemoryRegion.create("lb0", num_servers=1) as producer, SharedMemoryRegion.attach("lb0") as agent:
        with pytest.raises(RegionError, match="region 'lb0' was attached; only its creator is its producer"):
            PRODUCERS_CALLS[call](agent)
        assert producer.latest == 0


@pytest.mark.parametrize("call", [*CALLS, *PRODUCERS_CALLS])
def test_nothing_works_after_close(call: str) -> None:
    producer = SharedMemoryRegion.create("lb0", num_servers=1)
    producer.publish(Publication.of(snapshot(1)))
    agent = SharedMemoryRegion.attach("lb0")
    agent.lock_agent()
    buffer = agent.new_buffer()
    agent.read_into(buffer)
    for region in (agent, producer):
        region.close()
        region.close()
        assert region.closed and repr(region) == "<SharedMemoryRegion 'lb0', capacity 64, closed>"
    assert producer.closed_by_producer
    for region in (producer, *([agent] if call in CALLS else [])):
        with pytest.raises(RegionError, match="region 'lb0' is closed"):
            {**CALLS, **PRODUCERS_CALLS}[call](region)
    # What was read stays.
    assert buffer.stats[0].tolist() == list(range(11))
    assert producer.path.exists()
    producer.unlink()
    assert not producer.path.exists()
    producer.unlink()


def test_context_managers(shm_dir: Path) -> None:
    with SharedMemoryRegion.create("lb0", num_servers=1) as producer:
        with SharedMemoryRegion.attach("lb0") as agent:
            agent.lock_agent()
        assert agent.closed and producer.path.exists() and not producer.agent_alive
        onlooker = SharedMemoryRegion.attach("lb0")
    assert producer.closed and not list(shm_dir.iterdir())
    # Who is attached stays so, and is told.
    assert onlooker.closed_by_producer and not onlooker.producer_alive and not onlooker.replaced
    assert not onlooker.wait_observation(0, _LONG)
    onlooker.close()
    with pytest.raises(KeyError), SharedMemoryRegion.create("lb0", num_servers=1) as producer:
        raise KeyError
    assert producer.closed and not list(shm_dir.iterdir())
    # Closed by hand, the name stays, and the next one replaces it.
    with SharedMemoryRegion.create("lb0", num_servers=1) as producer:
        producer.close()
    assert [path.name for path in shm_dir.iterdir()] == ["lb0"]
    with pytest.raises(RegionNotFoundError, match=rf"the producer of region 'lb0' \(process {os.getpid()}\) is gone"):
        SharedMemoryRegion.attach("lb0", live=True)
    with SharedMemoryRegion.create("lb0", num_servers=1) as after:
        assert after.instance != producer.instance


def test_no_descriptor_and_no_mapping_is_left(shm_dir: Path) -> None:
    (shm_dir / "garbage").write_bytes(bytes(4096))

    def open_files() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), Path("/proc/self/maps").read_text().count(str(shm_dir))

    # What earlier tests have left to the collector may have files open.
    gc.collect()
    before = open_files()
    for _ in range(1000):
        with SharedMemoryRegion.create("lb0", num_servers=1, capacity=1) as producer:
            with SharedMemoryRegion.attach("lb0") as agent:
                agent.write_action(sequence_id=1, weights=[1.0])
                producer.publish(Publication.of(snapshot(1)))
                agent.read_observation()
            with pytest.raises(RegionError):
                SharedMemoryRegion.create("garbage", num_servers=1, capacity=1)
            with pytest.raises(RegionFormatError):
                SharedMemoryRegion.attach("garbage")
    assert open_files() == before
    assert [path.name for path in shm_dir.iterdir()] == ["garbage"]


def test_unlink_removes_no_other_regions_file() -> None:
    first = SharedMemoryRegion.create("lb0", num_servers=1)
    os.unlink(first.path)
    with SharedMemoryRegion.create("lb0", num_servers=1) as second:
        assert first.replaced and not second.replaced
        with first:
            first.unlink()
        assert first.closed
        first.unlink()
        assert second.path.exists() and second.producer_alive
        with SharedMemoryRegion.attach("lb0") as agent:
            assert agent.instance == second.instance
            agent.unlink()
        assert not second.path.exists()
        second.unlink()
        # And no file that is no region.
        second.path.touch()
        second.unlink()
        assert second.path.exists()


def test_a_region_that_is_there_later(nursery: Nursery) -> None:
    with pytest.raises(RegionNotFoundError, match=r"there is no region 'lb0' in .* after 0\.02 s"):
        SharedMemoryRegion.attach("lb0", timeout=0.02)
    with (
        nursery.running(roles.create, name="lb0") as child,
        SharedMemoryRegion.attach("lb0", timeout=_LONG, live=True) as region,
    ):
        assert region.instance == child.hear() and region.producer_pid == child.pid


def test_one_agent_per_region() -> None:
    with (
        SharedMemoryRegion.create("lb0", num_servers=1) as producer,
        SharedMemoryRegion.attach("lb0") as first,
        SharedMemoryRegion.attach("lb0") as second,
    ):
        first.lock_agent()
        assert producer.agent_pid == os.getpid() and second.agent_alive
        with pytest.raises(RegionBusyError, match=rf"driven by another agent \(process {os.getpid()}\)"):
            second.lock_agent()
        with pytest.raises(RegionBusyError):
            producer.write_action(sequence_id=1, weights=[1.0])
        first.unlock_agent()
        first.unlock_agent()
        assert not first.agent_alive
        second.lock_agent()
        assert first.agent_alive


def test_a_forked_child_has_no_part_in_it(nursery: Nursery) -> None:
    with nursery.running(roles.use_in_a_child, name="lb0") as child:
        for _ in range(2):
            closed, (error, sentence) = child.hear()
            assert closed and error == "RegionError"
            assert sentence == "region 'lb0' was opened before this process was forked; open it here"
        # The parent's locks are the parent's; they outlive a child that closes its own copies.
        assert child.hear()[0] == "RegionBusyError"
        assert child.hear() == [True, True, True]


def test_names_of_regions(shm_dir: Path) -> None:
    assert list(region_names()) == []
    (shm_dir / "text").write_text("no region")
    (shm_dir / "folder").mkdir()
    with SharedMemoryRegion.create("b", num_servers=1), SharedMemoryRegion.create("a", num_servers=1):
        assert list(region_names()) == ["a", "b"]
    assert list(region_names()) == []


# Versions


def as_minor(image: bytes, minor: int, extra: int, unknown: int = 0xA5) -> bytes:
    """A region as a later minor version may make it: all structs longer, and something in what was reserved.

    ``unknown`` is the value of every byte that this version does not know.
    """
    header = np.frombuffer(image, abi.HEADER.dtype, 1).copy()
    old = header[0].copy()
    layout = abi.Layout(int(old["capacity"]))
    header["version_minor"] = minor
    header["header_size"] = abi.HEADER.size + extra
    header["frames_offset"] = abi.HEADER.size + 2 * extra
    header["frame_size"] = layout.frame_size + extra
    frames_end = int(header["frames_offset"][0]) + abi.NUM_FRAMES * int(header["frame_size"][0])
    header["actions_offset"] = frames_end + extra
    header["action_size"] = layout.action_size + 3 * extra
    total = int(header["actions_offset"][0]) + abi.NUM_ACTIONS * int(header["action_size"][0]) + extra
    header["names_offset"] = total
    header["names_size"] = layout.names_size + 2 * extra
    total += abi.NUM_NAMES * int(header["names_size"][0]) + extra
    header["total_size"] = total
    result = np.full(total, unknown, np.uint8)
    # The gaps of the header's type are what is reserved; they keep their strange bytes.
    named = np.frombuffer(header.tobytes(), np.uint8)
    known = np.zeros(abi.HEADER.size, np.bool_)
    for name in abi.HEADER.dtype.names or ():
        kind, offset = abi.HEADER.dtype.fields[name][:2]
        known[offset : offset + kind.itemsize] = True
    result[: abi.HEADER.size][known] = named[known]
    for offset, size, count in (
        ("frames_offset", "frame_size", abi.NUM_FRAMES),
        ("actions_offset", "action_size", abi.NUM_ACTIONS),
        ("names_offset", "names_size", abi.NUM_NAMES),
    ):
        for slot in range(count):
            source = int(old[offset]) + slot * int(old[size])
            target = int(header[offset][0]) + slot * int(header[size][0])
            result[target : target + int(old[size])] = np.frombuffer(image, np.uint8)[source : source + int(old[size])]
    return result.tobytes()


@pytest.mark.parametrize(("minor", "extra"), [(2, 0), (7, 64), (65_535, 4096)])
def test_other_minor_versions_are_used(minor: int, extra: int, shm_dir: Path) -> None:
    with SharedMemoryRegion.create("old", num_servers=3) as producer:
        producer.set_server(1, name="10.0.0.7:80", state=ServerState.DRAINING)
        for number in range(1, 7):
            producer.publish(
                Publication.of(replace(snapshot(3, float(number)), ground_truth=np.ones((3, 3), np.float32)))
            )
        producer.write_action(sequence_id=8, weights=[1.0, 2.0, 3.0])
        image = producer.path.read_bytes()
    changed = as_minor(image, minor, extra)
    (shm_dir / "new").write_bytes(changed)
    with SharedMemoryRegion.attach("new") as agent:
        assert agent.version == (1, minor) and agent.capacity == 64
        buffer = agent.new_buffer()
        assert agent.read_into(buffer) and (buffer.sequence_id, buffer.timestamp) == (6, 6.0)
        assert buffer.stats[:3].tolist() == snapshot(3).stats.tolist()
        assert agent.server_names == ("", "10.0.0.7:80", "") and buffer.states[:3].tolist() == [0, 2, 0]
        for number in range(3, 7):
            assert agent.read_earlier(buffer, number) and buffer.timestamp == float(number)
        action = agent.read_action()
        assert action is not None and action.weights[:3].tolist() == [1.0, 2.0, 3.0]
        for number in range(9, 12):
            agent.write_action(sequence_id=number, weights=[3.0, 1.0, 1.0])
            action = agent.read_action()
            assert action is not None and action.sequence_id == number
    # Bytes that this version does not know are as they were.
    after = np.fromfile(shm_dir / "new", np.uint8)
    # Known ones, such as a heartbeat, may have the same value by chance, so two images tell which is which.
    unknown = np.frombuffer(changed, np.uint8) != np.frombuffer(as_minor(image, minor, extra, 0x5A), np.uint8)
    assert unknown.any() and (after[unknown] == 0xA5).all()
    # It is dead, and so may be replaced.
    with SharedMemoryRegion.create("new", num_servers=1) as region:
        assert region.version == (abi.VERSION_MAJOR, abi.VERSION_MINOR)


@pytest.mark.parametrize("major", [0, 2, 65_535])
def test_other_major_versions_are_refused(major: int, shm_dir: Path) -> None:
    with SharedMemoryRegion.create("old", num_servers=1) as producer:
        image = bytearray(producer.path.read_bytes())
    at = abi.HEADER.offset("version_major")
    image[at : at + 2] = major.to_bytes(2, "little")
    (shm_dir / "new").write_bytes(image)
    with pytest.raises(
        RegionFormatError, match=rf"version {major}\.{abi.VERSION_MINOR} of the binary interface, this is 1"
    ):
        SharedMemoryRegion.attach("new", timeout=_LONG)
    assert list(region_names()) == ["new"]


def test_a_drivers_name_shows_no_control_characters(shm_dir: Path) -> None:
    with SharedMemoryRegion.create("old", num_servers=1, driver="evil") as producer:
        image = bytearray(producer.path.read_bytes())
    at = abi.HEADER.offset("driver")
    image[at : at + 8] = b"\x1b[2J\xff\n\0x"
    (shm_dir / "new").write_bytes(image)
    with SharedMemoryRegion.attach("new") as region:
        assert region.driver == "?[2J\ufffd??x"
