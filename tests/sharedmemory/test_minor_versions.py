"""Binary interface 1.1: what it adds, in both languages; and 1.0 regions and readers beside it."""

from __future__ import annotations

import ctypes
import math
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from lbgym.errors import InvalidOptionError, RegionBusyError, RegionFormatError, UnknownNameError
from lbgym.features import FEATURE_NAMES, GROUND_TRUTH_NAMES
from lbgym.sharedmemory import Publication, ServerState, SharedMemoryRegion, abi
from tests.sharedmemory import native
from tests.sharedmemory.native import NativeError, NativeRegion

HERE = Path(__file__).parent
#: A region that lbgym wrote when the version was 1.0: three servers, six observations and actions.
REGION_1_0 = HERE / "region_1_0.bin"
EVERY = frozenset((*FEATURE_NAMES, *GROUND_TRUTH_NAMES))


@pytest.fixture(scope="module", params=["c", "c++"])
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return native.build(request.param, tmp_path_factory.mktemp("shm"))


@pytest.fixture(scope="module")
def reader_1_0(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program that reads as version 1.0 does."""
    program = tmp_path_factory.mktemp("old") / "reader"
    done = native.run_compiler("c", "-O1", HERE / "reader_1_0.c", "-o", program)
    assert (done.returncode, done.stderr) == (0, "")
    return program


def publication(n: int, timestamp: float = 1.0, **more: object) -> Publication:
    rows = np.arange(n, dtype=np.int64)
    stats = (100 * rows[:, None] + np.arange(11)).astype(np.float32)
    return Publication(timestamp, np.ones(n, np.bool_), stats, 3 * rows, rows, rows, rows, **more)  # type: ignore[arg-type]


# Older regions, older readers


def test_python_reads_a_region_of_version_1_0(shm_dir: Path) -> None:
    (shm_dir / "old").write_bytes(REGION_1_0.read_bytes())
    with SharedMemoryRegion.attach("old") as region:
        assert region.version == (1, 0) and region.layout == abi.Layout(3, 0)
        assert region.real_features == EVERY and not region.takes_index
        assert region.names_version == 0 and region.server_names == ("", "", "")
        buffer = region.new_buffer()
        # Left from a region of this version; nothing of it may stay.
        buffer.states[:], buffer.ground_truth_age_ns[:] = ServerState.DOWN, 5
        for number in range(3, 7):
            assert region.read_earlier(buffer, number) and buffer.timestamp == float(number)
            assert buffer.stats[2, :3].tolist() == [200.0 + number, 201.0 + number, 202.0 + number]
        assert region.read_into(buffer) and buffer.sequence_id == 6 and buffer.names_version == 0
        assert buffer.weights.tolist() == [6.0, 2.0, 3.0] and buffer.safe_weights.tolist() == [1.0, 2.0, 4.0]
        assert buffer.states.tolist() == [ServerState.UNKNOWN] * 3
        assert buffer.has_ground_truth and np.isnan(buffer.ground_truth_age).all()
        action = region.read_action()
        assert action is not None and (action.sequence_id, action.has_index) == (6, False)
        region.write_action(7, [3.0, 1.0, 2.0])
        action = region.read_action()
        assert action is not None and action.weights.tolist() == [3.0, 1.0, 2.0]
        with pytest.raises(InvalidOptionError, match="'old' does not dispatch by index"):
            region.write_action(8, [1.0], index=[[1.0, 0.0]])
    # Its producer is gone, and so the name is free.
    with SharedMemoryRegion.create("old", num_servers=1) as region:
        assert region.version == (1, abi.VERSION_MINOR)


def test_c_reads_a_region_of_version_1_0(library: ctypes.CDLL, shm_dir: Path) -> None:
    (shm_dir / "old").write_bytes(REGION_1_0.read_bytes())
    with NativeRegion.attach(library, "old") as region, SharedMemoryRegion.attach("old") as twin:
        buffer = twin.new_buffer()
        assert region.read_newest() == 1 and twin.read_into(buffer)
        seen = region.observation()
        assert np.array_equal(seen.words[1:], buffer.words[1:])
        assert seen.states.tolist() == [0, 0, 0] and np.isnan(seen.ground_truth_age).all()
        assert all(region.is_real(column) for column in (0, 10, 16, 18))
        assert region.read_names() == 0 and region.server_name(1) == b""
        region.write_action(7, np.array([3.0, 1.0, 2.0]), 3, 0)
        action = twin.read_action()
        assert action is not None and (action.sequence_id, action.has_index) == (7, False)
        index = np.ones((3, 2))
        with pytest.raises(NativeError, match="does not dispatch by index"):
            region.write_index(8, np.ones(3), index.ctypes.data, 3, 0)


def test_a_region_of_version_1_0_that_is_too_small_is_refused(library: ctypes.CDLL, shm_dir: Path) -> None:
    image = bytearray(REGION_1_0.read_bytes())
    at = abi.HEADER.offset("frame_size")
    image[at : at + 4] = (abi.Layout(3, 0).frame_size - 64).to_bytes(4, "little")
    (shm_dir / "old").write_bytes(image)
    with pytest.raises(RegionFormatError, match="contradict each other"):
        SharedMemoryRegion.attach("old")
    with pytest.raises(NativeError, match="contradict each other"):
        NativeRegion.attach(library, "old")
    # The same sizes are too small for a region that says it is of this version.
    image = bytearray(REGION_1_0.read_bytes())
    image[10:12] = (1).to_bytes(2, "little")
    (shm_dir / "old").write_bytes(image)
    with pytest.raises(RegionFormatError, match="contradict each other"):
        SharedMemoryRegion.attach("old")


def read_by_1_0(reader: Path, path: Path) -> list[float]:
    done = subprocess.run([reader, path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
    return [float(number) for number in done.stdout.split()]


@pytest.mark.parametrize("takes_index", [False, True])
def test_a_reader_of_version_1_0_reads_what_both_languages_publish(
    library: ctypes.CDLL, reader_1_0: Path, shm_dir: Path, takes_index: bool
) -> None:
    assert read_by_1_0(reader_1_0, REGION_1_0)[:3] == [6.0, 3.0, 1.0]
    expected = [1, 2, 1, 1, 0, 5, 5, 1, 101, 3, 6, 6]
    with SharedMemoryRegion.create("r", num_servers=2, safe_weights=[5.0, 6.0], takes_index=takes_index) as region:
        region.set_server(1, name="web-1", state=ServerState.UP)
        region.publish(publication(2))
        assert read_by_1_0(reader_1_0, region.path) == expected
    with NativeRegion.create(library, "c", 2, safe_weights=[5.0, 6.0], takes_index=takes_index) as producer:
        producer.set_server_name(1, b"web-1")
        shown = publication(2)
        for i in range(2):
            producer.set_row(i, True, shown.stats[i], [3 * i, i, i, i])
        producer.publish(1)
        assert read_by_1_0(reader_1_0, shm_dir / "c") == expected


# Names and states


def test_names_and_states_come_with_the_next_observation(library: ctypes.CDLL) -> None:
    with (
        SharedMemoryRegion.create("r", num_servers=2, capacity=4) as producer,
        SharedMemoryRegion.attach("r") as reader,
        NativeRegion.attach(library, "r") as c,
    ):
        buffer = reader.new_buffer()
        producer.publish(publication(2))
        assert reader.names_version == 0 and reader.server_names == ("",) * 4 and c.read_names() == 0
        long = "ü" * 31 + "x"
        producer.set_server(0, name=long, state=ServerState.UP)
        producer.set_server(1, state=ServerState.DOWN)
        assert reader.names_version == 0
        producer.publish(publication(2))
        assert reader.read_into(buffer) and buffer.names_version == reader.names_version == 1
        assert reader.server_names == (long, "") and buffer.states[:2].tolist() == [ServerState.UP, ServerState.DOWN]
        assert c.read_newest() == 1 and c.read_names() == 1 and c.read_names() == 1
        assert (c.server_name(0).decode(), c.server_name(1), c.server_name(9)) == (long, b"", b"")
        # Stays; and the same name once more is no change.
        producer.set_server(0, name=long)
        producer.publish(publication(2))
        assert reader.names_version == 1 and reader.read_into(buffer) and buffer.states[0] == ServerState.UP
        # Joins, is named before its first observation, and leaves again.
        producer.set_server(2, name="10.0.0.3:80", state=ServerState.DRAINING)
        producer.publish(publication(3))
        assert reader.read_into(buffer) and buffer.states[:3].tolist() == [1, 3, 2]
        assert reader.server_names == (long, "", "10.0.0.3:80") and c.read_names() == 1
        assert c.server_name(2) == b"10.0.0.3:80"
        producer.publish(publication(1))
        producer.publish(publication(3))
        assert reader.read_into(buffer) and buffer.states[:3].tolist() == [1, 0, 0]
        assert reader.server_names == (long, "", "")


def test_python_reads_the_names_and_states_that_c_sets(library: ctypes.CDLL) -> None:
    with NativeRegion.create(library, "r", 3, capacity=8) as producer, SharedMemoryRegion.attach("r") as reader:
        buffer = reader.new_buffer()
        producer.set_server_name(2, "höfler:443".encode())
        producer.set_server_state(0, ServerState.DRAINING)
        producer.publish(1)
        assert reader.read_into(buffer) and buffer.states[:3].tolist() == [2, 0, 0]
        assert reader.server_names == ("", "", "höfler:443") and buffer.names_version == 1
        producer.set_num_servers(2)
        producer.set_num_servers(4)
        producer.publish(2)
        assert reader.read_into(buffer) and reader.server_names == ("",) * 4 and buffer.names_version == 2
        for bad in (b"x" * 64, b"a\nb", b"\x7f"):
            with pytest.raises(NativeError, match="at most 63 bytes of printable text"):
                producer.set_server_name(0, bad)
        with pytest.raises(NativeError, match="must be from 0 to 3, got 4"):
            producer.set_server_state(0, 4)
        for call in (lambda: producer.set_server_name(4, b"a"), lambda: producer.set_server_state(4, 1)):
            with pytest.raises(NativeError, match="servers 0 to 3, got 4"):
                call()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"index": 4}, "index must be a whole number from 0 to 3, got 4"),
        ({"index": 0, "name": "x" * 64}, "at most 63 bytes of printable text"),
        ({"index": 0, "name": "a\nb"}, "printable text"),
        ({"index": 0, "name": 7}, "printable text, got 7"),
        ({"index": 0, "name": "fine", "state": 9}, "state must be a ServerState, got 9"),
    ],
)
def test_servers_that_are_refused_change_nothing(arguments: dict[str, object], sentence: str) -> None:
    with SharedMemoryRegion.create("r", num_servers=2, capacity=4) as region:
        with pytest.raises(InvalidOptionError, match=sentence):
            region.set_server(**arguments)  # type: ignore[arg-type]
        region.publish(publication(2))
        assert region.names_version == 0


def test_a_dead_producer_leaves_the_names_before(library: ctypes.CDLL) -> None:
    """Names are in two tables: one that a dead producer left half-written is not the newest."""
    with SharedMemoryRegion.create("r", num_servers=1) as producer, SharedMemoryRegion.attach("r") as reader:
        for name in ("a", "b"):
            producer.set_server(0, name=name)
            producer.publish(publication(1))
        at = (producer.layout.names_offset + producer.layout.names_size) // 8
        producer._words[at] |= np.uint64(1)
        with NativeRegion.attach(library, "r") as c:
            assert reader.server_names == ("b",) and c.read_names() == 1 and c.server_name(0) == b"b"
            producer.set_server(0, name="c")
            producer.publish(publication(1))
            assert reader.server_names == ("c",) and int(producer._words[at]) % 2 == 0
            # A lock that stays odd makes both give up instead of waiting.
            producer.set_server(0, name="d")
            producer.publish(publication(1))
            producer._words[producer.layout.names_offset // 8] |= np.uint64(1)
            with pytest.raises(RegionBusyError, match="names change faster"):
                _ = reader.server_names
            with pytest.raises(NativeError, match="names change faster"):
                c.read_names()


def test_names_that_nobody_may_publish(library: ctypes.CDLL) -> None:
    with SharedMemoryRegion.create("r", num_servers=1, capacity=2) as producer:
        producer.set_server(0, name="a")
        producer.publish(publication(1))
        at = producer.layout.names_offset + producer.layout.names_size
        words = producer._words.view(np.uint8)
        words[at + 64 : at + 128] = np.frombuffer(b"\x1b[2J\xff" + b"x" * 59, np.uint8)
        with SharedMemoryRegion.attach("r") as reader, NativeRegion.attach(library, "r") as c:
            assert reader.server_names == ("?[2J\ufffd" + "x" * 59,)
            assert c.read_names() == 1 and len(c.server_name(0)) == 63
        words[at + 16] = 3
        with SharedMemoryRegion.attach("r") as reader, NativeRegion.attach(library, "r") as c:
            with pytest.raises(RegionFormatError, match="names that no data plane may publish"):
                _ = reader.server_names
            with pytest.raises(NativeError, match="names that no data plane may publish"):
                c.read_names()


def test_states_of_a_later_version_are_unknown(library: ctypes.CDLL) -> None:
    with SharedMemoryRegion.create("r", num_servers=1) as producer, SharedMemoryRegion.attach("r") as reader:
        producer.publish(publication(1))
        layout = producer.layout
        producer._words.view(np.uint8)[layout.frames_offset + layout.frame_size + layout.frame_sections["states"]] = 9
        buffer = reader.new_buffer()
        assert reader.read_into(buffer) and buffer.states[0] == ServerState.UNKNOWN
        with NativeRegion.attach(library, "r") as c:
            assert c.read_newest() == 1 and c.observation().states[0] == ServerState.UNKNOWN


# Ground truth and features


def test_the_age_of_ground_truth(library: ctypes.CDLL) -> None:
    truth = np.ones((3, 3), np.float32)
    with SharedMemoryRegion.create("r", num_servers=3) as producer, NativeRegion.attach(library, "r") as c:
        buffer = producer.new_buffer()
        for ages, seen in (
            (np.array([0.0, 1.5, np.nan]), [0.0, 1.5, math.nan]),
            (None, [math.nan] * 3),
        ):
            producer.publish(publication(3, ground_truth=truth, ground_truth_age=ages))
            assert producer.read_into(buffer) and c.read_newest() == 1
            for read in (buffer, c.observation()):
                assert np.array_equal(read.ground_truth_age[:3], seen, equal_nan=True)
        producer.publish(publication(3))
        assert producer.read_into(buffer) and np.isnan(buffer.ground_truth_age).all()
        for bad in ([-1.0, 0.0, 0.0], [math.inf, 0.0, 0.0], [1e12, 0.0, 0.0], [0.0]):
            with pytest.raises(InvalidOptionError, match="ground_truth_age must"):
                producer.publish(publication(3, ground_truth=truth, ground_truth_age=np.array(bad)))
    with NativeRegion.create(library, "c", 2) as producer, SharedMemoryRegion.attach("c") as reader:
        buffer = reader.new_buffer()
        measured = time.monotonic_ns()
        for i in range(2):
            producer.set_ground_truth(i, np.ones(3, np.float32))
        producer.set_ground_truth_time(1, measured)
        producer.publish(1)
        assert reader.read_into(buffer)
        assert math.isnan(buffer.ground_truth_age[0])
        assert int(buffer.ground_truth_age_ns[1]) == buffer.published_at - measured
        # One that is still to come, by another clock, is new; and set again its age is unknown again.
        producer.set_ground_truth_time(1, 2 * time.monotonic_ns())
        producer.publish(2)
        assert reader.read_into(buffer) and buffer.ground_truth_age[1] == 0.0
        producer.set_ground_truth(1, np.ones(3, np.float32))
        producer.publish(3)
        assert reader.read_into(buffer) and math.isnan(buffer.ground_truth_age[1])


def test_which_features_are_real(library: ctypes.CDLL) -> None:
    names = ["n_flow_on", "flow_duration_avg_decay", "cpu_usage"]
    real = {"n_flow_on", "duration_mean_decay", "cpu_usage"}
    with (
        SharedMemoryRegion.create("r", num_servers=1, features=names) as producer,
        SharedMemoryRegion.attach("r") as reader,
        NativeRegion.attach(library, "r") as c,
    ):
        assert producer.real_features == reader.real_features == real
        columns = [*range(11), *(abi.GROUND_TRUTH_BIT + i for i in range(3))]
        assert [c.is_real(k) for k in columns] == [name in real for name in (*FEATURE_NAMES, *GROUND_TRUTH_NAMES)]
        assert not c.is_real(40)
    with SharedMemoryRegion.create("r", num_servers=1, features=[]) as producer:
        assert producer.real_features == frozenset()
    with NativeRegion.create(library, "r", features=1 | 1 << 17), SharedMemoryRegion.attach("r") as reader:
        assert reader.real_features == {"n_flow_on", "memory_usage"}
    with pytest.raises(UnknownNameError, match="fct_men"):
        SharedMemoryRegion.create("r", num_servers=1, features=["fct_men"])
    with pytest.raises(InvalidOptionError, match="several names, got the text 'n_flow_on'"):
        SharedMemoryRegion.create("r", num_servers=1, features="n_flow_on")


# Index parameters


def test_index_parameters_reach_a_data_plane_that_takes_them(library: ctypes.CDLL) -> None:
    index = np.array([[1.0, 0.5], [2.0, 0.0], [0.0, 3.0]])
    weights = np.array([1.0, 2.0, 0.0])
    with (
        SharedMemoryRegion.create("r", num_servers=2, capacity=4, takes_index=True) as producer,
        SharedMemoryRegion.attach("r") as agent,
        NativeRegion.attach(library, "r") as c,
    ):
        assert agent.takes_index and producer.index_in_force is None
        agent.write_action(1, weights, index=index)
        assert producer.weights_in_force().tolist() == [1.0, 2.0]
        assert producer.index_in_force is not None and producer.index_in_force.tolist() == index[:2].tolist()
        agent.write_action(2, weights)
        producer.weights_in_force()
        assert producer.index_in_force is None
        for bad in (index[:2], -index, index * math.nan, index * [0.0, 1.0], "x"):
            with pytest.raises(InvalidOptionError, match="index must"):
                agent.write_action(3, weights, index=bad)  # type: ignore[arg-type]
        agent.unlock_agent()
        c.write_index(4, weights, index.ctypes.data, 3, 0)
        c.renew()
        producer.weights_in_force()
        assert producer.index_in_force is not None and producer.index_in_force.tolist() == index[:2].tolist()
        slow = index * [0.0, 1.0]
        with pytest.raises(NativeError, match="a speed above 0 where the weight is"):
            c.write_index(5, weights, slow.ctypes.data, 3, 0)
        # An index that nobody may write makes the whole action one that is ignored.
        at = producer.layout.actions_offset + producer.layout.action_sections["index"]
        producer._words.view(np.float64)[at // 8] = -1.0
        with pytest.raises(RegionFormatError, match="no agent may write"):
            producer.read_action()
    with NativeRegion.create(library, "c", 3, takes_index=True) as producer, SharedMemoryRegion.attach("c") as agent:
        agent.write_action(1, weights, index=index)
        producer.poll_action()
        action = producer.weights()
        assert action.has_index and action.index[:3].tolist() == index.tolist()
        in_force = np.zeros((3, 2))
        assert library.index_in_force(producer.at, in_force) == 3 and in_force.tolist() == index.tolist()
        agent.write_action(2, weights)
        producer.poll_action()
        assert not producer.weights().has_index and not library.index_in_force(producer.at, in_force)
        # Of two servers that an action is about, and not beyond its lease.
        agent.write_action(3, weights[:2], index=index[:2], lease=math.inf)
        producer.poll_action()
        assert library.index_in_force(producer.at, in_force) == 2
        agent.write_action(4, weights, index=index, lease=1e-9)
        producer.poll_action()
        assert library.safe(producer.at) and not library.index_in_force(producer.at, in_force)
