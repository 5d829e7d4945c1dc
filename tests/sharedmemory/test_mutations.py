"""Region files that are damaged, cut off or forged: attach refuses them, or what is read is in its range.

Files are changed before they are attached to, never while they are mapped: one that somebody truncates then ends its
readers with SIGBUS, which no reader can prevent.
"""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lbgym.errors import RegionBusyError, RegionError, RegionFormatError
from lbgym.features import FEATURE_NAMES
from lbgym.sharedmemory import Action, ObservationBuffer, Publication, ServerState, SharedMemoryRegion, abi
from lbgym.sharedmemory.system import path_of
from lbgym.snapshot import Snapshot
from tests.sharedmemory.nursery import Nursery, Say

MUTANTS = 10_000  # for each of four seeds
CAPACITY = 3
INT64_END = 1 << 63
OUTCOMES = (
    "refused", "read", "nothing there", "RegionFormatError", "RegionBusyError", "earlier ones refused", "actions read",
    "actions refused", "names read", "names refused",
)  # fmt: skip

WORDS = np.array(
    [
        0, 1, 2, 3, 4, 5, 63, 64, 65, 255, 256, 1024, 4096, 65_536, 65_537, (1 << 31) - 1, 1 << 31, (1 << 32) - 1,
        1 << 32, INT64_END - 1, INT64_END, (1 << 64) - 1, (1 << 64) - 64,
        *np.array([1.0, -1.0, -0.0, math.nan, math.inf, -math.inf, 1e308, -1e308, 5e-324, 1e-6, 1e6]).view(np.uint64),
    ],
    np.uint64,
)  # fmt: skip
HALVES = np.array(
    [
        0, 1, 2, 3, 4, 5, 63, 64, 65, 128, 704, 1024, 65_536, 65_537, (1 << 31) - 1, 1 << 31, (1 << 32) - 1,
        (1 << 32) - 64,
        *np.array([1.0, -1.0, -0.0, math.nan, math.inf, -math.inf, 3e38, -3e38, 1e-45], np.float32).view(np.uint32),
    ],
    np.uint32,
)  # fmt: skip


def snapshot(n: int) -> Snapshot:
    rows = np.arange(n, dtype=np.int64)
    stats = rows[:, None] + np.arange(11, dtype=np.float32) / 16
    return Snapshot(0, 1.5, rows != 1, stats.astype(np.float32), stats[:, :3].astype(np.float32), *[rows] * 4, 9, None)


def good_image() -> bytes:
    """A region file with a ring that has gone round and two actions."""
    with SharedMemoryRegion.create("good", num_servers=CAPACITY, capacity=CAPACITY, driver="test") as region:
        agent = SharedMemoryRegion.attach("good")
        for number in range(1, 7):
            agent.write_action(sequence_id=number, weights=np.arange(1.0, 4.0))
            region.weights_in_force()
            region.set_server(number % CAPACITY, name=f"server {number}", state=ServerState.UP)
            region.publish(Publication.of(snapshot(CAPACITY - number % 2), fct_count=3, fct_sum=0.5))
        agent.close()
        return region.path.read_bytes()


LAYOUT = abi.Layout(CAPACITY)
#: Fields of the header that say where things are.
SIZES = (
    "total_size", "num_frames", "frames_offset", "frame_size", "actions_offset", "action_size", "num_actions",
    "names_offset", "names_size",
)  # fmt: skip
#: First byte and size of what a mutation hits.
AREAS = {
    "header": (0, abi.HEADER.size),
    "newest frame": (LAYOUT.frames_offset + 6 % abi.NUM_FRAMES * LAYOUT.frame_size, LAYOUT.frame_size),
    "newest action": (LAYOUT.actions_offset, LAYOUT.action_size),
    "anywhere": (0, LAYOUT.total_size),
}


def mutant(random: np.random.Generator, good: np.ndarray) -> np.ndarray:
    """A damaged copy of a region file, uint8[]."""
    image = good.copy()
    first, size = list(AREAS.values())[random.choice(4, p=[0.35, 0.3, 0.15, 0.2])]
    area = image[first : first + size]
    match int(random.integers(8)):
        case 0:
            at = random.integers(0, size, random.integers(1, 9))
            area[at] = random.integers(0, 256, len(at))
        case 1:
            at = random.integers(0, size // 8, random.integers(1, 4))
            area.view(np.uint64)[at] = random.choice(WORDS, len(at))
        case 2:
            at = random.integers(0, size // 4, random.integers(1, 4))
            area.view(np.uint32)[at] = random.choice(HALVES, len(at))
        case 3:
            image = image[: random.integers(0, len(image))]
        case 4:
            tail = random.integers(0, 2, 64 * random.integers(1, 80), np.uint8) * random.integers(
                0, 256, dtype=np.uint8
            )
            image = np.concatenate([image, tail])
            if random.random() < 0.5:
                set_header(image, total_size=len(image))
        case 5:
            length = int(random.integers(1, 65)) * 8
            source, target = random.integers(0, (len(image) - length) // 8, 2) * 8
            image[target : target + length] = good[source : source + length].copy()
        case 6:
            image[8 if random.random() < 0.7 else 0 :][: random.integers(1, len(image))] = random.integers(0, 256)
        case _:
            image = forged(random, good)
    return image


def forged(random: np.random.Generator, good: np.ndarray) -> np.ndarray:
    """A file with a header that agrees with itself, or nearly, around contents that mean nothing."""
    capacity = int(random.integers(1, 9))
    layout = abi.Layout(capacity)
    num_frames, num_actions = (int(1 << random.integers(1, 6)) for _ in range(2))
    frame_size = layout.frame_size + 64 * int(random.integers(0, 3))
    action_size = layout.action_size + 64 * int(random.integers(0, 3))
    names_size = layout.names_size + 64 * int(random.integers(0, 3))
    needed = abi.HEADER.size + num_frames * frame_size + num_actions * action_size + abi.NUM_NAMES * names_size
    # The last table of names ends with a page, so that who reads beyond it is killed.
    total = -(-needed // 4096) * 4096
    frames_offset = abi.HEADER.size + 64 * int(random.integers(0, (total - needed) // 64 + 1))
    sizes = {
        "capacity": capacity,
        "num_frames": num_frames,
        "num_actions": num_actions,
        "frames_offset": frames_offset,
        "frame_size": frame_size,
        "actions_offset": total - num_actions * action_size - abi.NUM_NAMES * names_size,
        "action_size": action_size,
        "names_offset": total - abi.NUM_NAMES * names_size,
        "names_size": names_size,
        "total_size": total,
    }
    for name in sizes:
        if random.random() < 0.04:
            sizes[name] = max(0, sizes[name] + int(random.choice([-64, -1, 1, 64])))
    image = np.zeros(total, np.uint8)
    image[: abi.HEADER.size] = good[: abi.HEADER.size]
    set_header(image, **sizes)
    image[abi.HEADER.size :] = random.choice([0, 0, 0, 1, 63, 64, 127, 255], total - abi.HEADER.size)
    words = image.view(np.uint64)
    latest = int(random.integers(0, 70))
    set_header(image, latest=latest, action_count=int(random.integers(0, 70)), names_version=int(random.integers(0, 4)))
    for slot in range(num_frames):
        at = (frames_offset + slot * frame_size) // 8
        if at + 8 < len(words):
            # A frame that may be read: the lock is even, and the id, the number of servers and the times are good.
            words[at : at + 16] = 0
            words[at + 1] = latest if latest % num_frames == slot else slot
            words[at + 6] = random.integers(0, capacity + 2)
    return image


def set_header(image: np.ndarray, **values: Any) -> None:
    header = image[: abi.HEADER.size].view(abi.HEADER.dtype)
    for name, value in values.items():
        header[name] = value


# What is sane


def assert_sane_buffer(buffer: ObservationBuffer) -> None:
    n = buffer.num_servers
    assert 0 <= n <= buffer.capacity
    assert buffer.active.view(np.uint8)[:n].max(initial=0) <= 1
    floats = [buffer.stats[:n], buffer.weights[:n], buffer.safe_weights[:n]]
    if buffer.has_ground_truth:
        floats.append(buffer.ground_truth[:n])
    assert buffer.states[:n].max(initial=0) <= max(ServerState)
    ages = buffer.ground_truth_age[:n]
    assert (np.isnan(ages) | ((ages >= 0.0) & (ages < INT64_END / 1e9 + 1.0))).all()
    for values in floats:
        assert np.isfinite(values).all() and values.min(initial=0.0) >= 0.0
    assert buffer.counters[:n].max(initial=0) < INT64_END
    for count in (
        buffer.sequence_id, buffer.timestamp_ns, buffer.published_at, buffer.applied_sequence_id or 0,
        buffer.applied_at or 0, buffer.unrouted, buffer.fct_count, buffer.fct_sum_ns,
    ):  # fmt: skip
        assert 0 <= count < INT64_END


def assert_sane_action(action: Action) -> None:
    n = action.num_servers
    assert 1 <= n <= len(action.weights)
    weights = action.weights[:n]
    assert np.isfinite(weights).all() and weights.min() >= 0.0 and weights.max() > 0.0
    assert action.alias[:n].max() < n
    assert 0 <= action.sequence_id < INT64_END and 0 <= action.written_at < INT64_END
    expected = action.lease_ns / 1e9 if action.lease_ns else math.inf
    assert action.lease == pytest.approx(expected, rel=1e-15) and action.lease > 0.0


def assert_sane_snapshot(shown: Snapshot, n: int) -> None:
    assert shown.active.shape == (n,) and shown.stats.shape == (n, 11)
    assert shown.stats.dtype == np.float32 and np.isfinite(shown.stats).all()
    assert not shown.stats[~shown.active].any()
    for counts in (shown.started, shown.completed, shown.rejected, shown.failed):
        assert counts.shape == (n,) and counts.dtype == np.int64 and counts.min(initial=0) >= 0


def assert_sane_dictionary(shown: dict, buffer: ObservationBuffer) -> None:
    assert shown["sequence_id"] == buffer.sequence_id and shown["age"] >= 0.0
    active = np.flatnonzero(buffer.active[: buffer.num_servers]).tolist()
    assert shown["active_servers"] == list(shown["server_stats"]) == active
    for row in shown["server_stats"].values():
        assert all(0.0 <= row[name] < math.inf for name in (*FEATURE_NAMES, "weight"))


def assert_sane_places(region: SharedMemoryRegion, image: np.ndarray) -> None:
    """Nothing that is read or written lies beyond the file or in something else."""
    fields = image[: abi.HEADER.size].view(abi.HEADER.dtype)[0]
    header = {name: int(fields[name]) for name in SIZES}
    layout = region.layout
    assert header["total_size"] == len(image)
    if region.version[1] > 0:
        assert header["names_size"] >= layout.names_size
        assert header["names_offset"] >= header["actions_offset"] + header["num_actions"] * header["action_size"]
        assert header["names_offset"] + abi.NUM_NAMES * header["names_size"] <= len(image)
    assert header["frame_size"] >= layout.frame_size and header["action_size"] >= layout.action_size
    frames_end = header["frames_offset"] + header["num_frames"] * header["frame_size"]
    actions_end = header["actions_offset"] + header["num_actions"] * header["action_size"]
    assert abi.HEADER.size <= header["frames_offset"]
    assert frames_end <= header["actions_offset"] and actions_end <= len(image)


def examine(region: SharedMemoryRegion, image: np.ndarray, tally: dict[str, int], write: bool) -> None:
    """Use everything an agent or an onlooker may use."""
    assert_sane_places(region, image)
    assert 1 <= region.capacity <= abi.MAX_CAPACITY and region.version[0] == abi.VERSION_MAJOR
    assert 0.0 < region.publish_interval <= 86_400.0 and 1e-6 <= region.clock_rate <= 1e6
    assert region.driver.isprintable() and len(repr(region)) < 400
    assert region.heartbeat_age >= 0.0 and region.agent_heartbeat_age >= 0.0 and region.latest >= 0
    assert not region.producer_alive and not region.agent_alive and not region.replaced
    buffer = region.new_buffer()
    try:
        if region.read_into(buffer):
            tally["read"] += 1
            assert_sane_buffer(buffer)
            assert_sane_snapshot(buffer.snapshot(), buffer.num_servers)
            assert_sane_snapshot(buffer.snapshot(5), 5)
            assert_sane_dictionary(region.read_observation(), buffer)
        else:
            assert region.latest == 0
            tally["nothing there"] += 1
    except (RegionFormatError, RegionBusyError) as error:
        tally[type(error).__name__] += 1
    for number in (0, 1, 5, 6, region.latest):
        try:
            if region.read_earlier(buffer, number):
                assert buffer.sequence_id == number > 0
                assert_sane_buffer(buffer)
        except RegionFormatError:
            tally["earlier ones refused"] += 1
    region.wait_observation(region.latest, 0.0)
    try:
        names = region.server_names
        assert len(names) <= region.capacity and all(name.isprintable() and len(name) <= 64 for name in names)
        tally["names read"] += 1
    except (RegionFormatError, RegionBusyError):
        tally["names refused"] += 1
    try:
        action = region.read_action()
        if action is not None:
            assert_sane_action(action)
            tally["actions read"] += 1
    except (RegionFormatError, RegionBusyError):
        tally["actions refused"] += 1
    if write and not region.read_only:
        examine_writing(region, image)


def examine_writing(region: SharedMemoryRegion, image: np.ndarray) -> None:
    """An agent may write, but only to its line of the header and its slots."""
    weights = np.arange(1.0, 1.0 + region.capacity)
    region.write_action(sequence_id=8, weights=weights)
    try:
        action = region.read_action()
        assert action is None or action.weights.tolist() == weights.tolist()
    except RegionFormatError as error:
        assert "no agent may write" in str(error)  # a count of actions that has run out
    header = image[: abi.HEADER.size].view(abi.HEADER.dtype)[0]
    after = np.fromfile(region.path, np.uint8)
    allowed = np.zeros(len(after), np.bool_)
    allowed[abi.HEADER.offset("observation_waiters") :][:4] = True
    allowed[abi.HEADER.offset("action_count") : abi.HEADER.size] = True
    size = int(header["action_size"])
    for slot in range(int(header["num_actions"])):
        allowed[int(header["actions_offset"]) + slot * size :][: region.layout.action_size] = True
    assert not ((after != image) & ~allowed).any()


def examine_mutants(say: Say, seed: int, count: int) -> None:
    """In a process of its own, which a crash or a hang ends."""
    random = np.random.default_rng(seed)
    good = np.frombuffer(good_image(), np.uint8)
    tally = dict.fromkeys(OUTCOMES, 0)
    with (
        open(path_of("mutant"), "w+b", buffering=0) as file,
        open(path_of("progress"), "wb", buffering=0) as progress,
    ):
        for number in range(count):
            os.pwrite(progress.fileno(), f"{number:10}".encode(), 0)
            # A hang is one at this mutant, however long all of them take.
            signal.alarm(60)
            image = mutant(random, good)
            file.truncate(0)
            os.pwrite(file.fileno(), image, 0)
            try:
                region = SharedMemoryRegion.attach("mutant", read_only=(None, True)[number % 2])
            except RegionFormatError as error:
                assert len(str(error)) > 40
                tally["refused"] += 1
                continue
            examine(region, image, tally, number % 8 == 0)
            region.close()
    say(tally)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_mutants_are_refused_or_sane(nursery: Nursery, shm_dir: Path, seed: int) -> None:
    with nursery.running(examine_mutants, seed=seed, count=MUTANTS) as child:
        try:
            tally = child.hear()
        except AssertionError as error:
            at = (shm_dir / "progress").read_text().strip()
            raise AssertionError(f"mutant {at} of seed {seed}; -11 is a crash, -14 a hang: {error}") from None
    # All outcomes did occur, the important ones often.
    assert min(tally.values()) >= 10, tally
    assert min(tally[often] for often in ("refused", "read", "RegionFormatError", "actions refused")) > 500, tally


@pytest.mark.slow
def test_a_producer_takes_no_mutant_of_an_action() -> None:
    """Whatever an agent writes, the weights in force can be dispatched by, and the producer goes on publishing."""
    random = np.random.default_rng(4)
    safe = taken = 0
    with SharedMemoryRegion.create("lb0", num_servers=CAPACITY, capacity=CAPACITY) as region:
        agent = SharedMemoryRegion.attach("lb0")
        agent.write_action(sequence_id=1, weights=[1.0, 2.0, 3.0], lease=math.inf)
        agent.write_action(sequence_id=2, weights=[1.0, 2.0, 3.0], lease=math.inf)
        good = region.path.read_bytes()
        first = abi.HEADER.offset("action_count")
        area = LAYOUT.total_size - LAYOUT.actions_offset
        with open(region.path, "r+b", buffering=0) as file:
            for number in range(3000):
                words = np.frombuffer(good, np.uint64)[LAYOUT.actions_offset // 8 :].copy()
                at = random.integers(0, area // 16, random.integers(1, 4))
                words[at] = random.choice(WORDS, len(at))
                os.pwrite(file.fileno(), words, LAYOUT.actions_offset)
                count = number + 2 if random.random() < 0.9 else int(random.choice(WORDS))
                os.pwrite(file.fileno(), (count - count % 2).to_bytes(8, "little"), first)
                n = CAPACITY - number % 2
                weights = region.weights_in_force()
                assert np.isfinite(weights).all() and weights.min() >= 0.0 and weights.max() > 0.0
                region.publish(Publication.of(snapshot(n)))
                weights = region.weights_in_force()
                assert weights.shape == (n,)
                assert np.isfinite(weights).all() and weights.min() >= 0.0 and weights.max() > 0.0
                assert agent.read_observation()["sequence_id"] == number + 1
                safe += region.safe_weights_in_force
                taken += not region.safe_weights_in_force
        agent.close()
    assert safe > 300 and taken > 300


# That bad values are seen


def _put(offset: int, *values: Any, dtype: Any) -> Callable[[bytearray], None]:
    data = np.array(values, dtype).tobytes()

    def put(image: bytearray) -> None:
        image[offset : offset + len(data)] = data

    return put


_FRAME = AREAS["newest frame"][0]
_ACTION = AREAS["newest action"][0]
_IN_FRAME = {name: _FRAME + offset for name, offset in LAYOUT.frame_sections.items()}
_IN_ACTION = {name: _ACTION + offset for name, offset in LAYOUT.action_sections.items()}
_TOO_MANY = CAPACITY + 1

BAD_FRAMES = {
    "stats NaN": _put(_IN_FRAME["stats"] + 4 * 32, math.nan, dtype="f4"),
    "stats below 0": _put(_IN_FRAME["stats"], -1.0, dtype="f4"),
    "stats infinite": _put(_IN_FRAME["stats"] + 4 * 10, math.inf, dtype="f4"),
    "ground truth NaN": _put(_IN_FRAME["ground_truth"] + 4 * 8, math.nan, dtype="f4"),
    "ground truth below 0": _put(_IN_FRAME["ground_truth"], -0.5, dtype="f4"),
    "active 2": _put(_IN_FRAME["active"] + 2, 2, dtype="u1"),
    "counter": _put(_IN_FRAME["counters"] + 8 * 11, INT64_END, dtype="u8"),
    "weight NaN": _put(_IN_FRAME["weights"] + 16, math.nan, dtype="f8"),
    "weight below 0": _put(_IN_FRAME["weights"], -1e-300, dtype="f8"),
    "safe weight infinite": _put(_IN_FRAME["safe_weights"] + 16, math.inf, dtype="f8"),
    "servers": _put(_FRAME + abi.FRAME.offset("num_servers"), _TOO_MANY, dtype="u4"),
    "all servers": _put(_FRAME + abi.FRAME.offset("num_servers"), 0xFFFFFFFF, dtype="u4"),
    **{
        name: _put(_FRAME + abi.FRAME.offset(name), INT64_END, dtype="u8")
        for name in (
            "timestamp", "published_at", "applied_sequence_id", "applied_at", "unrouted", "fct_count", "fct_sum",
        )
    },
    "another sequence id": _put(_FRAME + abi.FRAME.offset("sequence_id"), 10, dtype="u8"),
    "another newest": _put(abi.HEADER.offset("latest"), 10, dtype="u8"),
}  # fmt: skip

BAD_ACTIONS = {
    "weight NaN": _put(_IN_ACTION["weights"] + 16, math.nan, dtype="f8"),
    "weight below 0": _put(_IN_ACTION["weights"], -1.0, dtype="f8"),
    "weight infinite": _put(_IN_ACTION["weights"] + 8, math.inf, dtype="f8"),
    "weights 0": _put(_IN_ACTION["weights"], 0.0, 0.0, 0.0, dtype="f8"),
    "alias": _put(_IN_ACTION["alias"] + 8, CAPACITY, dtype="u4"),
    "no servers": _put(_ACTION + abi.ACTION.offset("num_servers"), 0, dtype="u4"),
    "servers": _put(_ACTION + abi.ACTION.offset("num_servers"), _TOO_MANY, dtype="u4"),
    **{
        name: _put(_ACTION + abi.ACTION.offset(name), INT64_END, dtype="u8")
        for name in ("sequence_id", "written_at", "lease")
    },
    "count": _put(abi.HEADER.offset("action_count"), (1 << 64) - 2, dtype="u8"),
}


def _attach(change: Callable[[bytearray], None] | None) -> SharedMemoryRegion:
    image = bytearray(good_image())
    if change is not None:
        change(image)
    path_of("mutant").write_bytes(image)
    return SharedMemoryRegion.attach("mutant")


def test_the_undamaged_file_is_sane() -> None:
    region = _attach(None)
    buffer = region.new_buffer()
    assert region.read_into(buffer) and buffer.sequence_id == 6 and buffer.num_servers == CAPACITY
    assert buffer.has_ground_truth and buffer.applied_sequence_id == 6
    assert_sane_buffer(buffer)
    action = region.read_action()
    assert action is not None and action.sequence_id == 6
    assert_sane_action(action)
    region.close()


@pytest.mark.parametrize("bad", BAD_FRAMES)
def test_a_bad_observation_is_refused(bad: str) -> None:
    region = _attach(BAD_FRAMES[bad])
    with pytest.raises(RegionFormatError, match="region 'mutant' holds an observation that no data plane may publish"):
        region.read_into(region.new_buffer())
    with pytest.raises(RegionFormatError):
        region.read_observation()
    # The one before is as good as it was.
    buffer = region.new_buffer()
    assert region.read_earlier(buffer, 5)
    assert_sane_buffer(buffer)
    region.close()


@pytest.mark.parametrize("bad", BAD_ACTIONS)
def test_a_bad_action_is_refused(bad: str) -> None:
    region = _attach(BAD_ACTIONS[bad])
    with pytest.raises(RegionFormatError, match="region 'mutant' holds an action that no agent may write"):
        region.read_action()
    region.close()


@pytest.mark.parametrize("structs", ["frame", "action"])
def test_a_lock_that_is_held_for_ever_holds_nobody_up(structs: str) -> None:
    region = _attach(_put(_FRAME if structs == "frame" else _ACTION, 5, dtype="u8"))
    with pytest.raises(RegionBusyError):
        region.read_into(region.new_buffer()) if structs == "frame" else region.read_action()
    region.close()


def test_the_checks_see_bad_values() -> None:
    """Without the region's own validation the checks above would fail."""
    for bad in BAD_FRAMES:
        image = bytearray(good_image())
        BAD_FRAMES[bad](image)
        buffer = ObservationBuffer(LAYOUT)
        buffer.words[:] = np.frombuffer(image, np.uint64)[_FRAME // 8 :][: len(buffer.words)]
        if "another" not in bad:
            with pytest.raises(AssertionError):
                assert_sane_buffer(buffer)
    for bad in BAD_ACTIONS:
        image = bytearray(good_image())
        BAD_ACTIONS[bad](image)
        action = Action(LAYOUT)
        action.words[:] = np.frombuffer(image, np.uint64)[_ACTION // 8 :][: len(action.words)]
        if bad not in ("count", "lease"):
            with pytest.raises(AssertionError):
                assert_sane_action(action)


BAD_HEADERS = {
    "magic": ({"magic": 1}, "begins with"),
    "major": ({"version_major": 2}, r"version 2\.1 of the binary interface, this is 1"),
    "older major": ({"version_major": 0, "version_minor": 7}, r"version 0\.7"),
    "total size": ({"total_size": LAYOUT.total_size + 64}, "its header says .* bytes, the file has"),
    "no capacity": ({"capacity": 0}, "its capacity is 0"),
    "capacity": ({"capacity": 65_537}, "its capacity is 65537, allowed are 1 to 65536"),
    "more servers": ({"capacity": 64}, "contradict"),
    "header size": ({"header_size": 192}, "contradict"),
    "frames overlap header": ({"frames_offset": 192}, "contradict"),
    "frames overlap actions": ({"frames_offset": 320}, "contradict"),
    "frames": ({"num_frames": 3}, "contradict"),
    "many frames": ({"num_frames": 2048}, "contradict"),
    "one frame": ({"num_frames": 1}, "contradict"),
    "no frames": ({"num_frames": 0}, "contradict"),
    "frame size": ({"frame_size": LAYOUT.frame_size - 64}, "contradict"),
    "unaligned": ({"frame_size": LAYOUT.frame_size + 8}, "contradict"),
    "actions beyond the end": ({"actions_offset": LAYOUT.actions_offset + 64}, "contradict"),
    "action size": ({"action_size": LAYOUT.action_size - 64}, "contradict"),
    "actions": ({"num_actions": 4}, "contradict"),
    "clock NaN": ({"clock_rate": math.nan}, "its clock rate is nan"),
    "clock stands": ({"clock_rate": 0.0}, "its clock rate is 0.0"),
    "no interval": ({"publish_interval": 0}, "its publish interval is 0 ns"),
    "interval": ({"publish_interval": 1 << 63}, "its publish interval is"),
}


@pytest.mark.parametrize("bad", BAD_HEADERS)
def test_a_bad_header_is_refused(bad: str) -> None:
    changes, sentence = BAD_HEADERS[bad]
    image = np.frombuffer(good_image(), np.uint8).copy()
    set_header(image, **changes)
    path_of("mutant").write_bytes(image.tobytes())
    with pytest.raises(RegionFormatError, match=f"mutant is no region that this lbgym can use: .*{sentence}"):
        SharedMemoryRegion.attach("mutant")
    # Nor is it replaced: it may be a newer version's.
    with pytest.raises(RegionError, match="the name 'mutant' is taken"):
        SharedMemoryRegion.create("mutant", num_servers=1)
