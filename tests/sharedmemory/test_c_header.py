"""lbgym_shm.h, compiled as C and as C++, against SharedMemoryRegion: the same regions, rules and numbers both ways."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import signal
import stat
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from lbgym.errors import RegionBusyError, RegionError, RegionExistsError, RegionFormatError
from lbgym.sharedmemory import Layout, ObservationBuffer, Publication, SharedMemoryRegion, abi, region_names, seqlock
from lbgym.sharedmemory.system import DIRECTORY_VARIABLE
from lbgym.snapshot import Snapshot

from . import native
from .native import NativeError, NativeRegion
from .nursery import Nursery, create

#: Long enough for anything that happens at all, ns and s.
LONG_NS, LONG = 20_000_000_000, 20.0
BOTH = st.sampled_from(["c", "c++"])


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ctypes.CDLL]:
    """Built with every warning an error, and highly optimised."""
    return {language: native.build(language, tmp_path_factory.mktemp("shm")) for language in ("c", "c++")}


@pytest.fixture
def c(libraries: dict[str, ctypes.CDLL]) -> ctypes.CDLL:
    return libraries["c"]


@pytest.fixture(params=["c", "c++"])
def library(request: pytest.FixtureRequest, libraries: dict[str, ctypes.CDLL]) -> ctypes.CDLL:
    return libraries[request.param]


def refused(code: int, call: Callable[[], object]) -> str:
    """The message of the error that the call must end with."""
    with pytest.raises(NativeError) as caught:
        call()
    assert caught.value.code == code, str(caught.value)
    return str(caught.value)


def snapshot(n: int, seed: int = 0, truth: bool = True) -> Snapshot:
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 2**62, (4, n))
    return Snapshot(
        sequence_id=0,
        timestamp=float(rng.integers(0, 10**6)) / 8,
        active=rng.random(n) < 0.7,
        stats=rng.lognormal(0.0, 3.0, (n, 11)).astype(np.float32),
        ground_truth=rng.random((n, 3), np.float32) if truth else None,
        started=counts[0],
        completed=counts[1],
        rejected=counts[2],
        failed=counts[3],
        unrouted=int(rng.integers(0, 2**62)),
    )


def assert_same_rows(one: ObservationBuffer, other: ObservationBuffer, *, truth: bool = True) -> None:
    n = one.num_servers
    assert np.array_equal(one.words[1 : abi.FRAME.size // 8], other.words[1 : abi.FRAME.size // 8])
    for name in (
        "active",
        "stats",
        "counters",
        "weights",
        "safe_weights",
        "states",
        "ground_truth_age_ns",
        *(["ground_truth"] if truth else []),
    ):
        assert getattr(one, name)[:n].tobytes() == getattr(other, name)[:n].tobytes(), name


@pytest.mark.parametrize("language", ["c", "c++"])
def test_compiles_without_optimisation_and_without_a_warning(language: str, tmp_path: Path) -> None:
    done = native.run_compiler(language, "-O0", "-c", native.SHIM, "-o", tmp_path / "shim.o")
    assert (done.returncode, done.stderr) == (0, "")


ORDERS = {
    "first": '#include "lbgym_shm.h"\n#include <stdio.h>\n',
    "after another": '#include <stdio.h>\n#include "lbgym_shm.h"\n',
    "after the features": '#include "lbgym_features.h"\n#include "lbgym_shm.h"\n',
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("standard", ["-std=gnu11", "-std=gnu17"])
def test_may_be_included_anywhere(order: str, standard: str, tmp_path: Path) -> None:
    """And used, not only included: by the whole shim."""
    source = tmp_path / "order.c"
    source.write_text(ORDERS[order] + native.SHIM.read_text())
    done = native.run_compiler("c", standard, "-c", source, "-o", tmp_path / "order.o")
    assert (done.returncode, done.stderr) == (0, "")


def test_strict_c_says_in_one_sentence_that_it_must_come_first(tmp_path: Path) -> None:
    source = tmp_path / "late.c"
    source.write_text(ORDERS["after another"])
    done = native.run_compiler("c", "-c", source, "-o", tmp_path / "late.o")
    assert done.returncode != 0
    assert done.stderr.count("error") - done.stderr.count("#error") == 1, done.stderr
    assert "must be included before other headers, or with _GNU_SOURCE defined" in done.stderr
    done = native.run_compiler("c", "-D_GNU_SOURCE", "-c", source, "-o", tmp_path / "late.o")
    assert (done.returncode, done.stderr) == (0, "")
    source.write_text(ORDERS["after the features"])
    done = native.run_compiler("c", "-c", source, "-o", tmp_path / "late.o")
    assert (done.returncode, done.stderr) == (0, "")


@given(capacity=st.one_of(st.integers(1, 200), st.integers(1, abi.MAX_CAPACITY)), language=BOTH)
def test_layout(libraries: dict[str, ctypes.CDLL], language: str, capacity: int) -> None:
    library, layout = libraries[language], Layout(capacity)
    frame, action = np.zeros(9, np.uint64), np.zeros(5, np.uint64)
    library.frame_offsets(capacity, frame)
    library.action_offsets(capacity, action)
    assert frame.tolist() == [*layout.frame_sections.values(), layout.frame_size]
    private = layout.private
    assert action.tolist() == [*private.action_sections.values(), private.action_size]
    assert library.total_size(capacity) == layout.total_size


def test_retries_as_often(c: ctypes.CDLL) -> None:
    assert c.tries() == seqlock._TRIES


def test_every_code_has_a_sentence(c: ctypes.CDLL) -> None:
    texts = [c.code_text(code) for code in range(0, -13, -1)]
    assert len(set(texts)) == 13
    assert texts[0] == b"no error" and texts[-1] == b"unknown error"


# Observations


@pytest.mark.parametrize("capacity", [1, 3, 64, 1024])
def test_c_reads_what_python_publishes(library: ctypes.CDLL, capacity: int) -> None:
    with (
        SharedMemoryRegion.create("r", num_servers=capacity, capacity=capacity) as producer,
        NativeRegion.attach(library, "r") as reader,
        SharedMemoryRegion.attach("r") as other,
    ):
        assert reader.read_newest() == 0
        buffer = other.new_buffer()
        for number in range(1, 12):
            n = 1 + number * 7 % capacity
            shown = snapshot(n, number, truth=number % 2 == 0)
            assert producer.publish(Publication.of(shown, fct_count=number, fct_sum=number / 4)) == number
            assert reader.read_newest() == 1
            assert other.read_into(buffer)
            assert_same_rows(reader.observation(), buffer, truth=number % 2 == 0)
            assert reader.latest() == number
            for earlier in range(number + 2):
                found = other.read_earlier(buffer, earlier)
                assert reader.read_earlier(earlier) == found
                assert found == (max(1, number - 3) <= earlier <= number)
                if found:
                    assert reader.observation().sequence_id == earlier
                    assert_same_rows(reader.observation(), buffer, truth=earlier % 2 == 0)


@pytest.mark.parametrize("capacity", [1, 3, 64, 1024])
def test_python_reads_what_c_publishes(library: ctypes.CDLL, capacity: int) -> None:
    safe = np.arange(1.0, capacity + 1.0)
    with (
        NativeRegion.create(
            library,
            "r",
            capacity,
            capacity=capacity,
            interval=50_000_000,
            rate=20.0,
            safe_weights=safe,
            driver="höfler",
        ) as producer,
        SharedMemoryRegion.attach("r", live=True) as agent,
    ):
        assert (agent.version, agent.capacity) == ((abi.VERSION_MAJOR, abi.VERSION_MINOR), capacity)
        assert (agent.publish_interval, agent.clock_rate, agent.driver) == (0.05, 20.0, "höfler")
        assert agent.producer_pid == os.getpid()
        assert abs(agent.created_at - time.time()) < 60.0
        assert agent.heartbeat_age < 60.0
        buffer = agent.new_buffer()
        assert not agent.read_into(buffer)
        for number in range(1, 8):
            truth = number >= 4
            shown = snapshot(capacity, number, truth)
            for i in range(capacity):
                counters = [shown.started[i], shown.completed[i], shown.rejected[i], shown.failed[i]]
                row = shown.ground_truth[i] if truth else None
                producer.set_row(i, bool(shown.active[i]), shown.stats[i], counters, row)
            producer.set_totals(shown.unrouted, 3 * number, 5 * number)
            assert producer.publish(round(shown.timestamp * 1e9)) == 1
            assert agent.read_into(buffer)
            assert (buffer.sequence_id, buffer.fct_count, buffer.fct_sum_ns) == (number, 3 * number, 5 * number)
            read = buffer.snapshot()
            assert read.timestamp == shown.timestamp and read.unrouted == shown.unrouted
            assert np.array_equal(read.active, shown.active)
            assert np.array_equal(buffer.stats, shown.stats)
            assert (read.ground_truth is None) == (not truth)
            assert not truth or np.array_equal(read.ground_truth, shown.ground_truth)
            for name in abi.COUNTER_NAMES:
                assert np.array_equal(getattr(read, name), getattr(shown, name))
            assert np.array_equal(buffer.weights, safe) and np.array_equal(buffer.safe_weights, safe)
            assert buffer.safe and buffer.applied_sequence_id is None
            assert buffer.published_at <= time.monotonic_ns()


def test_what_was_set_stays_until_it_is_set_again(c: ctypes.CDLL) -> None:
    with NativeRegion.create(c, "r", 3) as producer, SharedMemoryRegion.attach("r") as agent:
        producer.set_row(2, True, np.arange(11), [9, 4, 3, 2], [0.5, 0.25, 7.0])
        producer.publish(1)
        producer.publish(2)
        buffer = agent.new_buffer()
        assert agent.read_into(buffer)
        assert buffer.timestamp_ns == 2
        assert buffer.active[:3].tolist() == [False, False, True]
        assert np.array_equal(buffer.stats[2], np.arange(11)) and not buffer.stats[:2].any()
        assert buffer.counters[2].tolist() == [9, 4, 3, 2]
        assert buffer.ground_truth[2].tolist() == [0.5, 0.25, 7.0]


def test_servers_leave_and_join(library: ctypes.CDLL) -> None:
    with (
        NativeRegion.create(library, "r", 3, capacity=8, safe_weights=[4.0, 5.0, 6.0]) as producer,
        SharedMemoryRegion.attach("r") as agent,
    ):
        buffer = agent.new_buffer()
        producer.set_row(2, True, np.ones(11), [1, 1, 1, 1], [1, 1, 1])
        producer.set_num_servers(2)
        producer.publish(1)
        assert agent.read_into(buffer) and buffer.num_servers == 2
        assert buffer.safe_weights[:2].tolist() == [4.0, 5.0]
        message = refused(native.OPTION, lambda: producer.set_active(2, True))
        assert "servers 0 to 1, got 2" in message
        producer.set_num_servers(5)
        producer.publish(2)
        assert agent.read_into(buffer) and buffer.num_servers == 5
        # Whoever joins is nobody that was there before.
        assert not buffer.active[2:5].any() and not buffer.stats[2:5].any() and not buffer.counters[2:5].any()
        assert not buffer.ground_truth[2:5].any()
        assert buffer.safe_weights[:5].tolist() == [4.0, 5.0, 1.0, 1.0, 1.0]
        assert "room for 1 to 8 servers, got 9" in refused(native.OPTION, lambda: producer.set_num_servers(9))
        assert "got 0" in refused(native.OPTION, lambda: producer.set_num_servers(0))


def test_no_safe_weight_left(library: ctypes.CDLL) -> None:
    with NativeRegion.create(library, "r", 3, safe_weights=[0.0, 0.0, 1.0]) as producer:
        producer.set_num_servers(2)
        assert producer.in_force().tolist() == [1.0, 1.0]


@given(value=st.floats(width=32), column=st.integers(0, 10), language=BOTH)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_features_that_no_reader_accepts_are_refused(
    libraries: dict[str, ctypes.CDLL], language: str, value: float, column: int
) -> None:
    stats = np.zeros(11, np.float32)
    stats[column] = value
    truth = np.full(3, value, np.float32)
    good = bool(np.isfinite(value)) and value >= 0.0
    with NativeRegion.create(libraries[language], "r", 2) as producer, SharedMemoryRegion.attach("r") as agent:
        producer.set_stats(1, np.ones(11, np.float32))
        if good:
            producer.set_stats(1, stats)
            producer.set_ground_truth(1, truth)
        else:
            message = refused(native.OPTION, lambda: producer.set_stats(1, stats))
            assert "features of server 1" in message
            assert "ground truth of server 0" in refused(native.OPTION, lambda: producer.set_ground_truth(0, truth))
        producer.publish(1)
        buffer = agent.new_buffer()
        assert agent.read_into(buffer)
        assert buffer.stats[1].tobytes() == (stats if good else np.ones(11, np.float32)).tobytes()
        producer.unlink_region()


def test_counters_and_times_beyond_int64_are_refused(c: ctypes.CDLL) -> None:
    with NativeRegion.create(c, "r", 1) as producer, SharedMemoryRegion.attach("r") as agent:
        good, bad = 2**63 - 1, 2**63
        for k in range(4):
            row = np.zeros(4, np.uint64)
            row[k] = bad
            refused(native.OPTION, lambda row=row: producer.set_counters(0, row))
        for k in range(3):
            totals = [bad if i == k else 0 for i in range(3)]
            refused(native.OPTION, lambda totals=totals: producer.set_totals(*totals))
        assert "below 2^63" in refused(native.OPTION, lambda: producer.publish(bad))
        assert producer.latest() == 0
        producer.set_counters(0, np.full(4, good, np.uint64))
        producer.set_totals(good, good, good)
        producer.publish(good)
        assert agent.read_into(agent.new_buffer())


# Actions


def test_c_puts_pythons_weights_in_force(library: ctypes.CDLL) -> None:
    with (
        NativeRegion.create(library, "r", 3, capacity=8, safe_weights=[7.0, 8.0, 9.0]) as producer,
        SharedMemoryRegion.attach("r") as agent,
    ):
        buffer = agent.new_buffer()
        assert producer.poll_action() == 0
        agent.write_action(sequence_id=0, weights=[1.0, 2.0, 3.0])
        assert producer.in_force().tolist() == [7.0, 8.0, 9.0]
        before = time.monotonic_ns()
        assert producer.poll_action() == 1
        assert producer.poll_action() == 0
        producer.publish(1)
        assert agent.read_into(buffer)
        assert buffer.weights[:3].tolist() == [1.0, 2.0, 3.0]
        assert buffer.safe_weights[:3].tolist() == [7.0, 8.0, 9.0]
        assert (buffer.safe, buffer.applied_sequence_id) == (False, 0)
        assert before <= buffer.applied_at <= time.monotonic_ns()
        # Fewer weights than servers, then more.
        agent.write_action(sequence_id=5, weights=[4.0])
        producer.poll_action()
        assert producer.in_force().tolist() == [4.0, 8.0, 9.0]
        agent.write_action(sequence_id=6, weights=[1.0, 2.0, 3.0, 4.0, 5.0])
        producer.poll_action()
        assert producer.in_force().tolist() == [1.0, 2.0, 3.0]
        producer.set_num_servers(4)
        producer.publish(2)
        assert agent.read_into(buffer)
        assert buffer.weights[:4].tolist() == [1.0, 2.0, 3.0, 4.0]
        assert buffer.applied_sequence_id == 6


def test_python_puts_cs_weights_in_force(library: ctypes.CDLL) -> None:
    with (
        SharedMemoryRegion.create("r", num_servers=3, safe_weights=[7.0, 8.0, 9.0]) as producer,
        NativeRegion.attach(library, "r") as agent,
    ):
        before = time.monotonic_ns()
        agent.write_action(11, np.array([1.0, 2.0, 3.0]), 3, 0)
        action = producer.read_action()
        assert (action.sequence_id, action.lease, action.num_servers) == (11, float("inf"), 3)
        assert before <= action.written_at <= time.monotonic_ns()
        assert producer.weights_in_force().tolist() == [1.0, 2.0, 3.0]
        producer.publish(Publication.of(snapshot(3)))
        assert agent.read_newest() == 1
        seen = agent.observation()
        assert (seen.applied_sequence_id, seen.safe) == (11, False)
        assert seen.weights[:3].tolist() == [1.0, 2.0, 3.0]
        agent.write_action(12, np.array([5.0, 6.0]), 2, 0)
        assert producer.weights_in_force().tolist() == [5.0, 6.0, 9.0]
        assert agent.agent_heartbeat_age() < 60e9
        assert producer.agent_heartbeat_age < 60.0


def expire(written_at: int, lease_ns: int) -> None:
    """Wait until a lease is over."""
    time.sleep(max(0, written_at + lease_ns - time.monotonic_ns()) / 1e9)
    assert time.monotonic_ns() >= written_at + lease_ns


def test_safe_weights_after_the_lease(library: ctypes.CDLL) -> None:
    lease = 50_000_000
    with NativeRegion.create(library, "r", 2, safe_weights=[7.0, 8.0]) as producer:
        assert producer.lease_left() == native.FOREVER
        with SharedMemoryRegion.attach("r") as agent:
            written = agent.write_action(sequence_id=1, weights=[1.0, 2.0], lease=3600.0)
            producer.poll_action()
            assert 0 < producer.lease_left() <= 3600 * 10**9
            written = agent.write_action(sequence_id=2, weights=[1.0, 2.0], lease=lease / 1e9)
            expire(written, lease)
            assert producer.poll_action() == 1
            assert producer.in_force().tolist() == [7.0, 8.0] and producer.safe()
            assert producer.poll_action() == 0
            assert producer.lease_left() == native.FOREVER
            # An action that is over when it is found is none that was ever applied.
            producer.publish(1)
            buffer = agent.new_buffer()
            assert agent.read_into(buffer) and (buffer.safe, buffer.applied_sequence_id) == (True, 1)
            agent.write_action(sequence_id=3, weights=[3.0, 4.0], lease=float("inf"))
            assert producer.poll_action() == 1 and producer.lease_left() == native.FOREVER
            assert producer.in_force().tolist() == [3.0, 4.0] and not producer.safe()


def test_a_lease_ends_while_the_weights_are_in_force(c: ctypes.CDLL) -> None:
    lease = 200_000_000
    with NativeRegion.create(c, "r", 2) as producer, SharedMemoryRegion.attach("r") as agent:
        written = agent.write_action(sequence_id=2, weights=[1.0, 2.0], lease=lease / 1e9)
        producer.poll_action()
        in_time = time.monotonic_ns() < written + lease
        assert not in_time or not producer.safe()
        expire(written, lease)
        assert producer.lease_left() in (0, native.FOREVER)
        assert producer.poll_action() == int(in_time)
        assert producer.safe() and producer.in_force().tolist() == [1.0, 1.0]


def test_c_renews_its_lease(library: ctypes.CDLL) -> None:
    lease = 50_000_000
    with SharedMemoryRegion.create("r", num_servers=2) as producer, NativeRegion.attach(library, "r") as agent:
        assert "no action of this agent to renew" in refused(native.ROLE, agent.renew)
        agent.write_action(9, np.array([1.0, 2.0]), 2, lease)
        first = producer.read_action()
        expire(first.written_at, lease)
        assert producer.weights_in_force().tolist() == [1.0, 1.0]
        agent.renew()
        second = producer.read_action()
        assert second.written_at >= first.written_at + lease
        assert (second.sequence_id, second.lease) == (9, lease / 1e9)
        for name in ("weights", "threshold", "alias"):
            assert np.array_equal(getattr(first, name), getattr(second, name))


def test_weights_for_servers_that_left(library: ctypes.CDLL) -> None:
    """As in Python: nothing of the action is left, so the safe weights are in force."""
    with NativeRegion.create(library, "r", 3) as producer, SharedMemoryRegion.attach("r") as agent:
        agent.write_action(sequence_id=1, weights=[0.0, 0.0, 1.0], lease=float("inf"))
        producer.poll_action()
        assert producer.in_force().tolist() == [0.0, 0.0, 1.0]
        producer.set_num_servers(2)
        assert producer.in_force().tolist() == [1.0, 1.0] and producer.safe()
        producer.set_num_servers(3)
        producer.poll_action()
        assert producer.in_force().tolist() == [0.0, 0.0, 1.0] and not producer.safe()


def test_safe_weights_change(c: ctypes.CDLL) -> None:
    with NativeRegion.create(c, "r", 2) as producer:
        producer.set_safe_weights(np.array([2.0, 0.0]), 2)
        assert producer.in_force().tolist() == [2.0, 0.0]
        for bad in ([0.0, 0.0], [-1.0, 1.0], [np.nan, 1.0], [np.inf, 1.0], [1.0], [1.0, 1.0, 1.0]):
            refused(native.WEIGHTS, lambda bad=bad: producer.set_safe_weights(np.array(bad), len(bad)))
        assert producer.in_force().tolist() == [2.0, 0.0]


WEIGHTS = st.lists(
    st.one_of(
        st.floats(0.0, 1e3),
        st.sampled_from([0.0, -0.0, 1.0, 1.0 / 3.0, 5e-324, 2.2e-308, 1.7976931348623157e308]),
        st.floats(0.0, allow_infinity=False, allow_nan=False),
    ),
    min_size=1,
    max_size=80,
)


@given(weights=WEIGHTS, language=BOTH)
@settings(max_examples=300)
def test_alias_tables_are_the_same_bit_for_bit(
    libraries: dict[str, ctypes.CDLL], language: str, weights: list[float]
) -> None:
    weights = np.array(weights)
    assume(weights.max() > 0.0)
    n = len(weights)
    ours, theirs = np.zeros((2, 2, n), np.uint32)
    seqlock.alias_table(weights, theirs[0], theirs[1], np.zeros(n, np.int64), np.zeros(n))
    libraries[language].alias_table(weights, n, ours[0], ours[1], np.zeros(n, np.uint32), np.zeros(n))
    assert np.array_equal(ours, theirs)


@given(weights=st.lists(st.one_of(st.floats(), st.floats(0.0, 1.0)), min_size=1, max_size=9), language=BOTH)
def test_the_same_weights_are_refused(libraries: dict[str, ctypes.CDLL], language: str, weights: list[float]) -> None:
    weights = np.array(weights)
    good = bool(np.isfinite(weights).all() and (weights >= 0.0).all())
    assert libraries[language].largest(weights, len(weights)) == (max(0.0, *weights, 0.0) if good else -1.0)


def test_refused_actions_write_nothing(library: ctypes.CDLL) -> None:
    with (
        SharedMemoryRegion.create("r", num_servers=2, capacity=4) as producer,
        NativeRegion.attach(library, "r") as agent,
    ):
        for bad in ([0.0, 0.0], [-1.0, 1.0], [np.nan, 1.0], [1.0, np.inf], [], [1.0] * 5):
            weights = np.array(bad, np.float64)
            refused(native.WEIGHTS, lambda w=weights: agent.write_action(1, w, len(w), 0))
        refused(native.OPTION, lambda: agent.write_action(2**63, np.ones(2), 2, 0))
        refused(native.OPTION, lambda: agent.write_action(1, np.ones(2), 2, 2**63))
        assert producer.read_action() is None


# The alias table in use


def shares(weights: np.ndarray) -> np.ndarray:
    return weights / weights.sum()


def hashes(n: int) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 2**64, n, np.uint64)


def test_picks_are_those_of_the_documented_rule(library: ctypes.CDLL) -> None:
    rng = np.random.default_rng(3)
    for n in (1, 2, 7, 64):
        weights = rng.lognormal(0.0, 2.0, n)
        with NativeRegion.create(library, "r", n) as producer, SharedMemoryRegion.attach("r") as agent:
            for i in range(n):
                producer.set_active(i, True)
            agent.write_action(sequence_id=1, weights=weights)
            producer.poll_action()
            action = producer.weights()
            some = hashes(5000)
            high, low = some >> np.uint64(32), some & np.uint64(0xFFFFFFFF)
            bucket = (high * np.uint64(n) >> np.uint64(32)).astype(np.int64)
            expected = np.where(low < action.threshold[bucket], bucket, action.alias[bucket])
            assert np.array_equal(producer.picks(some), expected)
            producer.unlink_region()


@pytest.mark.parametrize("given_weights", [3, 8, 0], ids=["fewer", "more", "none"])
def test_table_of_weights_that_are_not_the_agents_alone(library: ctypes.CDLL, given_weights: int) -> None:
    """Servers that the agent does not know, or that do not exist: the table is for what is in force."""
    with (
        NativeRegion.create(library, "r", 5, safe_weights=[1.0, 2.0, 3.0, 4.0, 5.0]) as producer,
        SharedMemoryRegion.attach("r") as agent,
    ):
        if given_weights:
            agent.write_action(sequence_id=1, weights=np.arange(9.0, 9.0 - given_weights, -1.0))
        producer.poll_action()
        threshold, alias = np.zeros((2, 5), np.uint32)
        producer.table(threshold, alias)
        kept = np.where(alias == np.arange(5), 1.0, threshold / 2.0**32)
        chance = kept / 5
        np.add.at(chance, alias, (1.0 - kept) / 5)
        np.testing.assert_allclose(chance, shares(producer.in_force()), atol=1e-9)


@pytest.mark.parametrize("down", [1, 12, 15], ids=["one down", "most down", "one up"])
def test_inactive_servers_are_passed_over_in_proportion(library: ctypes.CDLL, down: int) -> None:
    weights = np.linspace(1.0, 4.0, 16)
    with NativeRegion.create(library, "r", 16) as producer, SharedMemoryRegion.attach("r") as agent:
        active = np.arange(16) >= down
        # Nearly all weight is on servers that are down.
        weights[~active] *= 50.0
        for i in range(16):
            producer.set_active(i, bool(active[i]))
        agent.write_action(sequence_id=1, weights=weights)
        producer.poll_action()
        some = hashes(40_000)
        picked = producer.picks(some)
        assert active[picked].all()
        expected = shares(weights * active)
        found = np.bincount(picked, minlength=16) / len(some)
        error = np.sqrt(expected * (1.0 - expected) / len(some))
        assert (np.abs(found - expected) <= 4.0 * error).all()
        assert np.array_equal(producer.picks(some), picked)


def test_picks_without_weight_or_server(c: ctypes.CDLL) -> None:
    with NativeRegion.create(c, "r", 3, safe_weights=[0.0, 1.0, 0.0]) as producer:
        some = hashes(3000)
        assert set(producer.picks(some)) == {native.NO_SERVER}
        producer.set_active(0, True)
        producer.set_active(2, True)
        # Nobody who is active has weight: evenly.
        counts = np.bincount(producer.picks(some), minlength=3)
        assert counts[1] == 0 and abs(counts[0] - 1500) < 4 * np.sqrt(750)
        producer.set_active(1, True)
        assert set(producer.picks(some)) == {1}
        with SharedMemoryRegion.attach("r") as agent:
            agent.write_action(sequence_id=1, weights=[1.7e308] * 3)
            producer.poll_action()
            producer.set_active(1, False)
            assert set(producer.picks(some)) == {0, 2}
        with NativeRegion.attach(c, "r") as reader:
            assert set(reader.picks(some[:9])) == {native.NO_SERVER}


# Roles


def test_a_live_region_is_not_replaced(library: ctypes.CDLL) -> None:
    with SharedMemoryRegion.create("r", num_servers=1) as producer:
        producer.publish(Publication.of(snapshot(1)))
        message = refused(native.EXISTS, lambda: NativeRegion.create(library, "r"))
        assert f"a live region (producer process {os.getpid()}, 1 observations)" in message
        assert producer.producer_alive and not producer.replaced
    with (
        NativeRegion.create(library, "r") as producer,
        pytest.raises(RegionExistsError, match=f"live region .producer process {os.getpid()}"),
    ):
        SharedMemoryRegion.create("r", num_servers=1)
        assert producer.producer_alive() == 1 and not producer.replaced()
        refused(native.EXISTS, lambda: NativeRegion.create(library, "r"))


@pytest.mark.parametrize("name", ["r", "other"])
def test_a_file_that_is_no_region_is_not_replaced(library: ctypes.CDLL, shm_dir: Path, name: str) -> None:
    (shm_dir / name).write_text("precious")
    if name == "r":
        message = refused(native.EXISTS, lambda: NativeRegion.create(library, "r"))
        assert "is no region that this program can use: it has 8 bytes" in message
        assert "remove that file or use another name" in message
    else:
        NativeRegion.create(library, "r").close()
    assert (shm_dir / name).read_text() == "precious"


def test_c_replaces_a_killed_python_producer(library: ctypes.CDLL, nursery: Nursery) -> None:
    child = nursery.fork(create, name="r", capacity=9)
    child.hear()
    with SharedMemoryRegion.attach("r", live=True) as waiting:
        refused(native.EXISTS, lambda: NativeRegion.create(library, "r"))
        child.kill()
        assert not waiting.producer_alive
        returned: list[bool] = []
        waiter = threading.Thread(target=lambda: returned.append(waiting.wait_observation(0, LONG)))
        waiter.start()
        until_asleep(waiting._words, abi.HEADER.offset("observation_waiters"))
        with NativeRegion.create(library, "r", 3) as producer:
            waiter.join(LONG / 2)
            assert returned == [False]
            assert waiting.closed_by_producer and waiting.replaced and not waiting.producer_alive
            with SharedMemoryRegion.attach("r", live=True) as agent:
                assert agent.instance != waiting.instance and agent.capacity == 64
            assert producer.producer_alive() == 1


def test_python_replaces_a_killed_c_producer(library: ctypes.CDLL, nursery: Nursery) -> None:
    child = nursery.fork(native.produce, name="r", file=library._name)
    assert child.hear() == "published"
    with NativeRegion.attach(library, "r") as waiting:
        assert waiting.producer_alive() == 1
        with pytest.raises(RegionExistsError, match=f"live region .producer process {child.pid}"):
            SharedMemoryRegion.create("r", num_servers=2)
        child.kill()
        assert waiting.producer_alive() == 0
        # What it published can still be read.
        assert waiting.read_newest() == 1 and waiting.observation().timestamp_ns == 7
        returned: list[int] = []
        waiter = threading.Thread(target=lambda: returned.append(waiting.wait_observation(1, LONG_NS)))
        waiter.start()
        until_asleep(header(waiting), abi.HEADER.offset("observation_waiters"))
        with SharedMemoryRegion.create("r", num_servers=2) as producer:
            waiter.join(LONG / 2)
            assert returned == [0]
            assert waiting.is_retired() and waiting.replaced()
            producer.publish(Publication.of(snapshot(2)))
            with NativeRegion.attach(library, "r") as agent:
                assert agent.read_newest() == 1
            # The old one does not remove the new one's name.
            waiting.unlink_region()
            assert not producer.replaced and producer.path.exists()


def test_c_replaces_a_killed_c_producer(library: ctypes.CDLL, nursery: Nursery) -> None:
    child = nursery.fork(native.produce, name="r", file=library._name)
    child.hear()
    refused(native.EXISTS, lambda: NativeRegion.create(library, "r"))
    child.kill()
    with NativeRegion.create(library, "r", 3) as producer, SharedMemoryRegion.attach("r", live=True) as agent:
        producer.publish(1)
        assert agent.read_into(agent.new_buffer())


def test_c_dies_in_the_middle_of_a_frame(library: ctypes.CDLL) -> None:
    """What a lock that a dead writer left odd does to readers, and to the writer's next frame in that place."""
    with NativeRegion.create(library, "r", 2) as producer, SharedMemoryRegion.attach("r") as agent:
        buffer = agent.new_buffer()
        with NativeRegion.attach(library, "r") as reader:
            for number in range(1, 4):
                producer.publish(number)
            words = header(producer)
            lock = (abi.HEADER.size + 3 * producer.layout.frame_size) // 8
            words[lock] |= np.uint64(1)
            assert "written to faster than it can be read" in refused(native.BUSY, reader.read_newest)
            with pytest.raises(RegionBusyError):
                agent.read_into(buffer)
            assert reader.read_earlier(3) == 0 and reader.read_earlier(2) == 1
            for number in range(4, 8):
                producer.publish(number)
            assert reader.read_newest() == 1 and reader.observation().sequence_id == 7
            assert int(words[lock]) % 2 == 0


def test_one_agent_whatever_its_language(library: ctypes.CDLL) -> None:
    with (
        SharedMemoryRegion.create("r", num_servers=1),
        SharedMemoryRegion.attach("r") as one,
        NativeRegion.attach(library, "r") as two,
    ):
        assert two.agent_alive() == 0
        one.lock_agent()
        assert two.agent_alive() == 1
        message = refused(native.BUSY, lambda: two.write_action(1, np.ones(1), 1, 0))
        assert f"driven by another agent (process {os.getpid()})" in message
        one.unlock_agent()
        two.lock_agent()
        assert one.agent_alive and two.agent_alive() == 1 and one.agent_pid == os.getpid()
        with pytest.raises(RegionBusyError):
            one.write_action(sequence_id=1, weights=[1.0])
        two.unlock_agent()
        one.write_action(sequence_id=1, weights=[1.0])
        one.close()
        two.write_action(2, np.ones(1), 1, 0)


def test_the_lock_of_a_killed_agent_is_free(library: ctypes.CDLL, nursery: Nursery) -> None:
    with SharedMemoryRegion.create("r", num_servers=1) as producer:
        child = nursery.fork(native.drive, name="r", file=library._name)
        assert child.hear() == "written"
        assert producer.agent_alive and producer.agent_pid == child.pid
        child.kill()
        assert not producer.agent_alive
        assert producer.weights_in_force().tolist() == [2.0]
        with SharedMemoryRegion.attach("r") as agent:
            agent.lock_agent()


@pytest.mark.parametrize("forget", [True, False], ids=["forgets", "keeps"])
def test_a_child_that_forgets_keeps_no_locks(c: ctypes.CDLL, nursery: Nursery, forget: bool) -> None:
    parent = nursery.fork(native.leave_a_child, name="r", file=c._name, forget=forget)
    child = parent.hear()
    try:
        with SharedMemoryRegion.attach("r") as region:
            # What the child does is nothing to the parent.
            assert region.producer_alive and region.agent_alive and not region.closed_by_producer
            parent.kill()
            assert (region.producer_alive, region.agent_alive) == (not forget, not forget)
            if forget:
                NativeRegion.create(c, "r").close()
            else:
                refused(native.EXISTS, lambda: NativeRegion.create(c, "r"))
    finally:
        os.kill(child, signal.SIGKILL)


def test_sides_do_not_do_each_others_work(library: ctypes.CDLL) -> None:
    with NativeRegion.create(library, "r", 1) as producer, NativeRegion.attach(library, "r") as agent:
        for call in (
            lambda: agent.publish(1),
            lambda: agent.heartbeat(),
            lambda: agent.poll_action(),
            lambda: agent.wait_action(0),
            lambda: agent.set_num_servers(1),
            lambda: agent.set_active(0, True),
            lambda: agent.set_safe_weights(np.ones(1), 1),
        ):
            assert "only its creator is its producer" in refused(native.ROLE, call)
        refused(native.ROLE, producer.read_newest)
        refused(native.ROLE, lambda: producer.read_earlier(1))
        refused(native.ROLE, producer.lock_agent)


def test_a_closed_region_refuses_everything(library: ctypes.CDLL) -> None:
    producer = NativeRegion.create(library, "r", 1)
    agent = NativeRegion.attach(library, "r")
    with SharedMemoryRegion.attach("r") as other:
        producer.close()
        assert other.closed_by_producer and not other.producer_alive
    assert agent.producer_alive() == 0 and agent.is_retired()
    assert agent.wait_observation(0, LONG_NS) == 0
    agent.close()
    for region in (producer, agent):
        region.close()
        assert region.latest() == 0 and region.is_retired()
        assert region.heartbeat_age() == region.agent_heartbeat_age() == native.FOREVER
        for call in (
            region.read_newest,
            region.producer_alive,
            region.agent_alive,
            region.lock_agent,
            region.renew,
            region.poll_action,
            region.heartbeat,
            partial(region.publish, 1),
            partial(region.wait_observation, 0, 0),
            partial(region.wait_action, 0),
            partial(region.write_action, 1, np.ones(1), 1, 0),
            partial(region.set_active, 0, True),
        ):
            assert "is closed" in refused(native.ROLE, call)
        assert region.picks(hashes(1)).tolist() == [native.NO_SERVER]


# Waking


def header(region: NativeRegion) -> np.ndarray:
    """The words of a mapping."""
    words = (ctypes.c_uint64 * (region.layout.total_size // 8)).from_address(region.mapping())
    return np.ctypeslib.as_array(words)


def until_asleep(words: np.ndarray, waiters: int) -> None:
    """Until somebody has said that it is about to wait."""
    flags = words.view(np.uint32)
    deadline = time.monotonic() + LONG
    while not flags[waiters // 4]:
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def woken(wait: Callable[[], object], words: np.ndarray, waiters: str, wake: Callable[[], object]) -> object:
    """What ``wait`` returns when ``wake`` is called after it went to sleep; long before its own timeout."""
    returned: list[object] = []
    words.view(np.uint32)[abi.HEADER.offset(waiters) // 4] = 0
    thread = threading.Thread(target=lambda: returned.append(wait()))
    thread.start()
    until_asleep(words, abi.HEADER.offset(waiters))
    # After the flag comes the system call; one that came too late would find that the event has changed.
    wake()
    thread.join(LONG / 2)
    assert returned, "not woken"
    return returned[0]


def test_python_wakes_c(library: ctypes.CDLL) -> None:
    with SharedMemoryRegion.create("r", num_servers=1) as producer, NativeRegion.attach(library, "r") as agent:
        words = header(agent)
        for _ in range(20):
            wait = lambda: agent.wait_observation(agent.latest(), LONG_NS)  # noqa: E731
            assert woken(wait, words, "observation_waiters", lambda: producer.publish(Publication.of(snapshot(1)))) == 1
        assert agent.wait_observation(agent.latest(), 1000) == 0
        assert agent.wait_observation(0, 0) == 1
        assert woken(wait, words, "observation_waiters", producer.close) == 0
    with NativeRegion.create(library, "r", 1) as producer, SharedMemoryRegion.attach("r") as agent:
        for number in range(20):
            write = lambda: agent.write_action(sequence_id=number, weights=[1.0])  # noqa: B023, E731
            assert woken(lambda: producer.wait_action(LONG_NS), header(producer), "action_waiters", write) == 1
            assert producer.wait_action(0) == 1
            producer.poll_action()
            assert producer.wait_action(0) == 0


def test_c_wakes_python(library: ctypes.CDLL) -> None:
    with NativeRegion.create(library, "r", 1) as producer, SharedMemoryRegion.attach("r") as agent:
        words = header(producer)
        for number in range(20):
            wait = lambda: agent.wait_observation(agent.latest, LONG)  # noqa: E731
            assert woken(wait, words, "observation_waiters", lambda: producer.publish(number)) is True  # noqa: B023
        assert woken(wait, words, "observation_waiters", producer.close) is False
        producer.unlink_region()
    with SharedMemoryRegion.create("r", num_servers=1) as producer, NativeRegion.attach(library, "r") as agent:
        words = header(agent)
        for number in range(20):
            write = lambda: agent.write_action(number, np.ones(1), 1, 0)  # noqa: B023, E731
            assert woken(lambda: producer.wait_action(LONG), words, "action_waiters", write) is True
            producer.weights_in_force()


def test_an_action_that_cannot_be_read_is_as_none_and_wakes_once(library: ctypes.CDLL) -> None:
    with (
        NativeRegion.create(library, "r", 2, safe_weights=[5.0, 6.0]) as producer,
        SharedMemoryRegion.attach("r") as agent,
    ):
        agent.write_action(sequence_id=1, weights=[1.0, 2.0])
        producer.poll_action()
        agent.write_action(sequence_id=2, weights=[3.0, 4.0])
        layout, words = producer.layout, header(producer)
        first = layout.actions_offset + layout.action_sections["weights"]
        for slot in range(2):
            words.view(np.float64)[(first + slot * layout.action_size) // 8] = -1.0
        assert producer.wait_action(0) == 1
        assert producer.poll_action() == 1
        assert producer.safe() and producer.in_force().tolist() == [5.0, 6.0]
        assert producer.wait_action(0) == 0
        agent.write_action(sequence_id=3, weights=[3.0, 4.0])
        assert producer.wait_action(0) == 1 and producer.poll_action() == 1
        assert producer.in_force().tolist() == [3.0, 4.0]


def test_a_signal_ends_a_wait(library: ctypes.CDLL) -> None:
    """So that a program may look at what its handler noted."""
    with NativeRegion.create(library, "r", 1) as producer:
        words = header(producer)
        noted: list[int] = []
        before = signal.signal(signal.SIGUSR1, lambda number, frame: noted.append(number))
        try:
            main = threading.main_thread().ident
            assert main is not None

            def interrupt() -> None:
                until_asleep(words, abi.HEADER.offset("action_waiters"))
                while not noted and not done.is_set():
                    signal.pthread_kill(main, signal.SIGUSR1)
                    time.sleep(0.001)

            done = threading.Event()
            thread = threading.Thread(target=interrupt)
            thread.start()
            begin = time.monotonic()
            assert producer.wait_action(LONG_NS) == 0
            assert time.monotonic() - begin < LONG / 2
            done.set()
            thread.join()
        finally:
            signal.signal(signal.SIGUSR1, before)


def test_who_may_only_read_waits_by_looking(library: ctypes.CDLL) -> None:
    with (
        SharedMemoryRegion.create("r", num_servers=1, publish_interval=0.001) as producer,
        NativeRegion.attach(library, "r", native.READ_ONLY) as reader,
    ):
        assert reader.read_only()
        returned: list[int] = []
        thread = threading.Thread(target=lambda: returned.append(reader.wait_observation(0, LONG_NS)))
        thread.start()
        producer.publish(Publication.of(snapshot(1)))
        thread.join(LONG / 2)
        assert returned == [1] and reader.read_newest() == 1
        assert reader.wait_observation(1, 3_000_000) == 0
        assert "read only" in refused(native.PERMISSION, reader.lock_agent)
        assert "read only" in refused(native.PERMISSION, lambda: reader.write_action(1, np.ones(1), 1, 0))


# Files


def test_the_file(library: ctypes.CDLL, shm_dir: Path) -> None:
    with NativeRegion.create(library, "r", 2, mode=0o640, gid=os.getegid(), capacity=1024) as producer:
        status = (shm_dir / "r").stat()
        assert stat.S_IMODE(status.st_mode) == 0o640 and status.st_gid == os.getegid()
        assert status.st_size == Layout(1024).total_size
        # All of it is there already.
        assert status.st_blocks * 512 >= status.st_size
        assert [path.name for path in shm_dir.iterdir()] == ["r"]
        producer.unlink_region()
        producer.unlink_region()
        assert not list(shm_dir.iterdir())
        producer.publish(1)


def test_default_mode(c: ctypes.CDLL, shm_dir: Path) -> None:
    old = os.umask(0)
    try:
        with NativeRegion.create(c, "r"):
            assert stat.S_IMODE((shm_dir / "r").stat().st_mode) == 0o600
    finally:
        os.umask(old)


@pytest.mark.parametrize("name", ["", ".", "..", ".r", "-r", "a/b", "a b", "ä", "x" * 201])
def test_bad_names(library: ctypes.CDLL, name: str) -> None:
    for opening in (NativeRegion.create, NativeRegion.attach):
        message = refused(native.NAME, lambda opening=opening: opening(library, name))
        assert "1 to 200 letters, digits" in message
    with pytest.raises(RegionError):
        SharedMemoryRegion.attach(name)


def test_the_longest_name(library: ctypes.CDLL) -> None:
    name = "X" + "y.-_" * 49 + "987"
    with NativeRegion.create(library, name), SharedMemoryRegion.attach(name, live=True) as region:
        assert region.name == region.path.name == name
        assert list(region_names()) == [name]


def test_where_regions_are(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DIRECTORY_VARIABLE, "")
    name = f"lbgym-test-{os.getpid()}-{os.urandom(8).hex()}"
    with NativeRegion.create(library, name) as producer:
        try:
            assert (Path("/dev/shm") / name).is_file()
        finally:
            producer.unlink_region()
    monkeypatch.setenv(DIRECTORY_VARIABLE, "/" + "d" * 4200)
    assert "LBGYM_SHM_DIR is longer than" in refused(native.NAME, lambda: NativeRegion.attach(library, "r"))
    monkeypatch.setenv(DIRECTORY_VARIABLE, "/nowhere")
    refused(native.NOT_FOUND, lambda: NativeRegion.attach(library, "r"))
    assert "No such file" in refused(native.SYSTEM, lambda: NativeRegion.create(library, "r"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_servers": 0}, "num_servers must be from 1 to 65536, got 0"),
        ({"num_servers": 65_537}, "num_servers must be from 1 to 65536, got 65537"),
        ({"num_servers": 9, "capacity": 8}, "capacity must be from 9 to 65536, got 8"),
        ({"capacity": 65_537}, "capacity must be from 4 to 65536, got 65537"),
        ({"interval": 999}, "publish_interval_ns must be from 1,000 to a day, got 999"),
        ({"interval": 86_400 * 10**9 + 1}, "publish_interval_ns"),
        ({"rate": 0.0}, "clock_rate must be from 1e-06 to 1e\\+06, got 0"),
        ({"rate": float("nan")}, "clock_rate"),
        ({"driver": "x" * 25}, "at most 24 bytes"),
        ({"driver": "a\nb"}, "printable"),
        ({"mode": 0o1000}, "mode must be permissions from 0 to 0777, got 01000"),
    ],
)
def test_options_out_of_range(c: ctypes.CDLL, shm_dir: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(NativeError, match=message) as caught:
        NativeRegion.create(c, "r", **options)
    assert caught.value.code == native.OPTION
    assert not list(shm_dir.iterdir())


@pytest.mark.parametrize("weights", [[0.0] * 4, [1.0, 1.0, 1.0, -1.0], [1.0, float("nan"), 1.0, 1.0]])
def test_safe_weights_out_of_range(c: ctypes.CDLL, weights: list[float]) -> None:
    refused(native.WEIGHTS, lambda: NativeRegion.create(c, "r", safe_weights=weights))


def test_no_room(c: ctypes.CDLL, shm_dir: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        message = refused(native.NO_ROOM, lambda: NativeRegion.create(c, "r"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert f"no room for its {Layout(64).total_size} bytes" in message
    assert not list(shm_dir.iterdir())


def test_no_descriptor_and_no_mapping_is_left(c: ctypes.CDLL, shm_dir: Path) -> None:
    """Whatever way creating and attaching end."""

    def held() -> tuple[int, int]:
        maps = Path("/proc/self/maps").read_text().count(str(shm_dir))
        return len(os.listdir("/proc/self/fd")), maps

    (shm_dir / "bad").write_bytes(bytes(300))
    # What earlier tests have left to the collector may have files open.
    gc.collect()
    before = held()
    with NativeRegion.create(c, "r"):
        refused(native.EXISTS, lambda: NativeRegion.create(c, "r"))
        refused(native.EXISTS, lambda: NativeRegion.create(c, "bad"))
        refused(native.FORMAT, lambda: NativeRegion.attach(c, "bad"))
        refused(native.NOT_FOUND, lambda: NativeRegion.attach(c, "none"))
        NativeRegion.attach(c, "r").close()
        assert held()[0] == before[0] + 1
    NativeRegion.create(c, "r").close()
    assert held() == before


@pytest.mark.parametrize("kind", ["directory", "link", "fifo", "empty"])
def test_no_regular_file(library: ctypes.CDLL, shm_dir: Path, kind: str) -> None:
    path = shm_dir / "r"
    if kind == "directory":
        path.mkdir()
    elif kind == "link":
        path.symlink_to("/etc/passwd")
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.touch()
    for access in (native.ANY, native.READ_WRITE, native.READ_ONLY):
        message = refused(native.FORMAT, lambda access=access: NativeRegion.attach(library, "r", access))
        assert ("it has 0 bytes" if kind == "empty" else "it is no regular file") in message
    refused(native.EXISTS, lambda: NativeRegion.create(library, "r"))


def first_words(sentence: str) -> list[str]:
    """Of what is wrong with a file."""
    return sentence.split(": ", 1)[1].split()[:3]


FIELDS = [name for name in abi.HEADER.dtype.names if name not in ("driver", "clock_rate")]
NUMBERS = st.one_of(
    st.integers(0, 70),
    st.sampled_from(
        [1, 2, 3, 4, 8, 64, 128, 1024, 2048, 65_536, 65_537, 2**31, 2**32 - 64, 2**32 - 1, 2**63, 2**64 - 1]
    ),
    st.integers(0, 2**64 - 1),
)


@given(
    changes=st.dictionaries(st.sampled_from(FIELDS), NUMBERS, max_size=3),
    scales=st.dictionaries(st.sampled_from(FIELDS), st.sampled_from([-64, -1, 1, 64, 128]), max_size=2),
    rate=st.one_of(st.just(1.0), st.floats()),
    length=st.one_of(st.just(0), st.integers(-300, 300), st.sampled_from([-64, 64, -20_000])),
    language=BOTH,
)
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_refuses_the_headers_that_python_refuses(
    libraries: dict[str, ctypes.CDLL],
    shm_dir: Path,
    language: str,
    changes: dict[str, int],
    scales: dict[str, int],
    rate: float,
    length: int,
) -> None:
    """And names the same fault."""
    with SharedMemoryRegion.create("r", num_servers=5, capacity=6) as producer:
        producer.publish(Publication.of(snapshot(5)))
        data = bytearray(producer.path.read_bytes())
    head = np.frombuffer(data, abi.HEADER.dtype, 1)
    for name, value in changes.items():
        head[name] = value & (2 ** (8 * head[name].dtype.itemsize) - 1)
    for name, step in scales.items():
        head[name] += np.array(step).astype(head[name].dtype)
    head["clock_rate"] = rate
    del head
    data = bytes(data) + bytes(length) if length > 0 else bytes(data)[: len(data) + length]
    if length > 0 and not changes:
        # A larger file with a header that says so is good.
        data = data[:16] + len(data).to_bytes(8, "little") + data[24:]
    (shm_dir / "changed").write_bytes(data)
    try:
        SharedMemoryRegion.attach("changed").close()
        reason = None
    except RegionFormatError as error:
        reason = str(error)
    try:
        with NativeRegion.attach(libraries[language], "changed") as region:
            assert reason is None, reason
            assert region.read_newest() in (0, 1)
    except NativeError as error:
        if error.code == native.FORMAT and "holds an observation" in str(error):
            assert reason is None
        else:
            assert (reason is None, error.code) == (False, native.FORMAT), (reason, str(error))
            assert first_words(str(error)) == first_words(reason)


def test_versions(library: ctypes.CDLL, shm_dir: Path) -> None:
    with SharedMemoryRegion.create("r", num_servers=1) as producer:
        producer.publish(Publication.of(snapshot(1)))
        data = bytearray(producer.path.read_bytes())
    data[10:12] = (77).to_bytes(2, "little")
    (shm_dir / "minor").write_bytes(data)
    with NativeRegion.attach(library, "minor") as reader:
        assert reader.read_newest() == 1
    data[8:10] = (2).to_bytes(2, "little")
    (shm_dir / "major").write_bytes(data)
    message = refused(native.FORMAT, lambda: NativeRegion.attach(library, "major"))
    assert "it has version 2.77 of the binary interface, this is 1" in message


def test_a_later_minor_version_may_have_more_of_everything(library: ctypes.CDLL, shm_dir: Path) -> None:
    """Larger structs and sections behind those that are known: what is known stays where it is."""
    with SharedMemoryRegion.create("r", num_servers=3, capacity=3) as producer:
        for number in range(1, 4):
            producer.publish(Publication.of(snapshot(3, number)))
        with SharedMemoryRegion.attach("r") as agent:
            agent.write_action(sequence_id=5, weights=[1.0, 2.0, 3.0])
            buffer = agent.new_buffer()
            assert agent.read_into(buffer)
        data, layout = producer.path.read_bytes(), producer.layout
    frames = [data[256 + i * layout.frame_size :][: layout.frame_size] + bytes(192) for i in range(4)]
    begin = layout.actions_offset
    actions = [data[begin + i * layout.action_size :][: layout.action_size] + bytes(64) for i in range(2)]
    head = np.frombuffer(bytearray(data[:256]), abi.HEADER.dtype)[0]
    head["version_minor"], head["header_size"] = 3, 320
    head["frames_offset"], head["frame_size"] = 384, layout.frame_size + 192
    head["actions_offset"] = 384 + 4 * (layout.frame_size + 192) + 64
    head["action_size"] = layout.action_size + 64
    begin = layout.names_offset
    names = [data[begin + i * layout.names_size :][: layout.names_size] + bytes(64) for i in range(2)]
    head["names_offset"] = head["actions_offset"] + 2 * head["action_size"]
    head["names_size"] = layout.names_size + 64
    wide = head.tobytes() + b"\xaa" * 128 + b"".join(frames) + b"\xaa" * 64 + b"".join(actions) + b"".join(names)
    wide = wide[:16] + len(wide).to_bytes(8, "little") + wide[24:]
    (shm_dir / "wide").write_bytes(wide)
    with NativeRegion.attach(library, "wide") as reader:
        assert reader.read_newest() == 1
        assert_same_rows(reader.observation(), buffer)
        reader.write_action(6, np.ones(3), 3, 0)
    after = (shm_dir / "wide").read_bytes()
    assert after[256:384] == b"\xaa" * 128 and after.count(b"\xaa" * 64) == 3


@given(
    places=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 2**64 - 1)), min_size=1, max_size=8),
    language=BOTH,
)
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_reads_the_contents_that_python_reads(
    libraries: dict[str, ctypes.CDLL], language: str, places: list[tuple[int, int]]
) -> None:
    """Words of frames and of what the producer and the agent say, changed at random."""
    with SharedMemoryRegion.create("r", num_servers=5, capacity=6) as producer:
        layout = producer.layout
        for number in range(3):
            producer.publish(Publication.of(snapshot(5, number)))
        with SharedMemoryRegion.attach("r") as agent, NativeRegion.attach(libraries[language], "r") as other:
            agent.write_action(sequence_id=1, weights=np.arange(1.0, 6.0))
            words = producer._words
            newest = (layout.frames_offset + 3 * layout.frame_size) // 8
            size = layout.frame_size // 8
            for place, value in places:
                # The newest frame's head, its body, or the line of the producer.
                at = [newest + place % 16, newest + place % size, 16 + place % 3][place % 3]
                words[at] = value
            buffer = agent.new_buffer()
            try:
                expected = int(agent.read_into(buffer))
            except RegionFormatError:
                expected = native.FORMAT
            except RegionBusyError:
                expected = native.BUSY
            try:
                found = other.read_newest()
            except NativeError as error:
                found = error.code
            assert found == expected
            if found == 1:
                assert_same_rows(other.observation(), buffer, truth=buffer.has_ground_truth)


@given(
    places=st.lists(st.tuples(st.integers(0, 10**6), st.one_of(NUMBERS)), min_size=1, max_size=6),
    language=BOTH,
)
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_takes_the_actions_that_python_takes(
    libraries: dict[str, ctypes.CDLL], language: str, places: list[tuple[int, int]]
) -> None:
    """The same file for a producer of either language, but for its lock."""
    with (
        NativeRegion.create(libraries[language], "c", 5, capacity=6) as one,
        SharedMemoryRegion.create("p", num_servers=5, capacity=6) as two,
    ):
        layout = two.layout
        for name in ("c", "p"):
            with SharedMemoryRegion.attach(name) as agent:
                agent.write_action(sequence_id=1, weights=np.arange(1.0, 6.0), lease=float("inf"))
        slot = (layout.actions_offset + layout.action_size) // 8
        for words in (header(one), two._words):
            words[slot + 2] = 1
            for place, value in places:
                at = [slot + place % 5, slot + place % (layout.action_size // 8), 24][place % 3]
                words[at] = value
        one.poll_action()
        expected = two.weights_in_force()
        assert one.in_force().tobytes() == expected.tobytes()
        assert one.safe() == two.safe_weights_in_force
        one.unlink_region()
