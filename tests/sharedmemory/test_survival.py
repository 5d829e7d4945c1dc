"""What regions survive: kills, races, full disks, foreign files. All with real processes."""

from __future__ import annotations

import errno
import math
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lbgym.errors import (
    DataPlaneTimeout,
    InvalidOptionError,
    RegionBusyError,
    RegionError,
    RegionExistsError,
    RegionFormatError,
    RegionNotFoundError,
)
from lbgym.sharedmemory import Publication, SharedMemoryRegion, region_names
from lbgym.snapshot import Snapshot
from tests.privileges import needs_others
from tests.sharedmemory import nursery as roles
from tests.sharedmemory.kills import attach_to, kill_agents, kill_producers, step_through_kills
from tests.sharedmemory.nursery import Nursery, assert_whole

#: Of producers and of agents, each.
KILLS = 500


# Kills


@pytest.mark.slow
def test_producers_are_killed_at_any_instant(nursery: Nursery) -> None:
    """What can be read after a kill is whole, and the next producer starts at once and is found."""
    tally = kill_producers(nursery, KILLS, seed=1)
    # The kills did hit producers in the middle of a frame, and before the first.
    assert tally["half_written"] > 0 and tally["unpublished"] > 0 and tally["reads"] > KILLS


@pytest.mark.slow
def test_agents_are_killed_at_any_instant(nursery: Nursery) -> None:
    """Actions are whole, the safe weights are in force when the lease ends, the next agent starts at once."""
    tally = kill_agents(nursery, KILLS, seed=2)
    assert tally["half_written"] > 0 and tally["reads"] > KILLS


def test_an_agent_steps_on_while_its_producers_are_killed(nursery: Nursery) -> None:
    tally = step_through_kills(nursery, 10, seed=3)
    assert tally["steps"] > 0 and tally["restarts_followed"] > 0


def test_a_region_of_a_producer_killed_before_it_published(nursery: Nursery) -> None:
    victim = nursery.fork(roles.create, name="lb0")
    victim.hear()
    victim.kill()
    with SharedMemoryRegion.attach("lb0") as region:
        assert not region.producer_alive and not region.closed_by_producer
        with pytest.raises(DataPlaneTimeout, match="nothing has been published yet"):
            region.read_observation()
    with pytest.raises(RegionNotFoundError, match=rf"the producer of region 'lb0' \(process {victim.pid}\) is gone"):
        SharedMemoryRegion.attach("lb0", live=True)


def test_an_agent_that_sleeps_outlives_producers(nursery: Nursery) -> None:
    """A killed producer wakes nobody; the waits end in time, and the next producer's region is another."""
    first = nursery.fork(roles.create, name="lb0")
    region = attach_to("lb0", first)
    region.lock_agent()
    first.kill()
    assert not region.wait_observation(0, 0.01)
    assert not region.producer_alive and not region.closed_by_producer and not region.replaced
    with nursery.running(roles.create, name="lb0") as second:
        after = attach_to("lb0", second)
        # The agent's lock on the old region is none on the new one.
        after.lock_agent()
        assert region.replaced and region.closed_by_producer and not region.producer_alive
        assert not after.replaced and after.producer_alive
        assert region.instance != after.instance
        # Whoever waits at the old one is not held up.
        began = time.monotonic()
        assert not region.wait_observation(0, 60.0)
        assert time.monotonic() - began < 30.0
        after.close()
    region.close()


def test_a_child_of_a_killed_producer_does_not_keep_its_region(nursery: Nursery) -> None:
    producer = nursery.fork(roles.leave_a_child, name="lb0")
    instance, child = producer.hear()
    try:
        producer.kill()
        os.kill(child, 0)
        with SharedMemoryRegion.create("lb0", num_servers=1) as region:
            assert region.instance != instance
            assert region.producer_alive
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_closed_producer_lets_a_waiting_agent_go(nursery: Nursery) -> None:
    with nursery.running(roles.publish_now_and_then, name="lb0", count=3, pause=0.02) as producer:
        assert producer.hear() == "created"
        region = SharedMemoryRegion.attach("lb0", live=True)
        region.lock_agent()
        buffer = region.new_buffer()
        seen: list[int] = []
        while region.wait_observation(seen[-1] if seen else 0, 60.0):
            assert region.read_into(buffer)
            assert_whole(buffer)
            seen.append(buffer.sequence_id)
        assert seen[-1] == 3 and seen == sorted(set(seen))
        assert region.closed_by_producer and not region.producer_alive
        with pytest.raises(RegionNotFoundError, match="no region 'lb0'"):
            SharedMemoryRegion.attach("lb0")
        region.close()


def test_a_suspended_agent_loses_its_weights_and_takes_them_back(nursery: Nursery) -> None:
    safe_weights = np.full(roles.SERVERS, 2.0)
    with (
        SharedMemoryRegion.create("lb0", num_servers=roles.SERVERS, safe_weights=safe_weights) as region,
        nursery.running(roles.drive, name="lb0", lease=0.05, pause=0.005) as agent,
    ):
        assert agent.hear() == "driving"
        assert region.wait_action(20.0)
        agent.signal(signal.SIGSTOP)
        while not region.safe_weights_in_force or region.wait_action(0.0):
            region.weights_in_force()
        assert region.weights_in_force().tolist() == safe_weights.tolist()
        # It holds the region all the same: it may come back.
        assert region.agent_alive
        second = SharedMemoryRegion.attach("lb0")
        with pytest.raises(RegionBusyError, match=str(agent.pid)):
            second.lock_agent()
        second.close()
        agent.signal(signal.SIGCONT)
        # Its first action then may be one that it began before, with a lease that is over.
        end = time.monotonic() + 20.0
        while region.safe_weights_in_force and time.monotonic() < end:
            region.wait_action(0.01)
            weights = region.weights_in_force()
        assert not region.safe_weights_in_force and weights.tolist() != safe_weights.tolist()


# Roles that are taken


def test_a_second_agent_is_refused_and_takes_over(nursery: Nursery) -> None:
    with SharedMemoryRegion.create("lb0", num_servers=2, capacity=roles.SERVERS) as region:
        second = SharedMemoryRegion.attach("lb0")
        with nursery.running(roles.drive, name="lb0", lease=60.0, pause=0.01) as first:
            assert first.hear() == "driving"
            assert region.wait_action(20.0)
            sentence = rf"region 'lb0' is driven by another agent \(process {first.pid}\); stop it first"
            with pytest.raises(RegionBusyError, match=sentence):
                second.lock_agent()
            count = int(region._header()["action_count"])
            with pytest.raises(RegionBusyError, match=sentence):
                second.write_action(sequence_id=1, weights=[1.0, 2.0])
            assert second.agent_alive and region.agent_pid == first.pid
            # Anybody may look, though.
            assert second.read_action() is not None
            assert count > 0
        second.write_action(sequence_id=77, weights=[1.0, 2.0])
        assert region.agent_pid == os.getpid()
        assert region.weights_in_force().tolist() == [1.0, 2.0]
        second.close()
        assert not region.agent_alive


def test_a_name_belongs_to_a_live_producer(nursery: Nursery, shm_dir: Path) -> None:
    producer = nursery.fork(roles.create, name="lb0")
    instance = producer.hear()
    sentence = rf"the name 'lb0' belongs to a live region \(producer process {producer.pid}, 0 observations\)"
    for _ in range(3):
        with pytest.raises(RegionExistsError, match=sentence):
            SharedMemoryRegion.create("lb0", num_servers=2)
    region = SharedMemoryRegion.attach("lb0")
    assert region.instance == instance and region.producer_alive and not region.replaced
    region.close()
    producer.signal(signal.SIGSTOP)
    with pytest.raises(RegionExistsError, match=sentence):
        SharedMemoryRegion.create("lb0", num_servers=2)
    producer.kill()
    with SharedMemoryRegion.create("lb0", num_servers=2) as region:
        assert region.instance != instance
        assert [path.name for path in shm_dir.iterdir()] == ["lb0"]


@pytest.mark.parametrize("racers", [2, 4])
@pytest.mark.parametrize("before", ["nothing", "dead"])
def test_of_producers_that_start_at_once_exactly_one_wins(
    nursery: Nursery, shm_dir: Path, racers: int, before: str
) -> None:
    for _ in range(40):
        if before == "dead":
            last = nursery.fork(roles.create, name="lb0")
            last.hear()
            last.kill()
        else:
            (shm_dir / "lb0").unlink(missing_ok=True)
        at = time.monotonic_ns() + racers * 4_000_000
        children = [nursery.fork(roles.race, name="lb0", at=at) for _ in range(racers)]
        heard = [child.hear() for child in children]
        winners = [index for index, word in enumerate(heard) if isinstance(word, int)]
        assert len(winners) == 1, heard
        winner = children[winners[0]]
        for word in heard:
            assert word == heard[winners[0]] or (
                word[0] == "RegionExistsError" and f"live region (producer process {winner.pid}" in word[1]
            )
        region = SharedMemoryRegion.attach("lb0")
        assert region.instance == heard[winners[0]]
        assert region.producer_alive and region.producer_pid == winner.pid
        region.close()
        for child in children:
            child.kill()
        assert [path.name for path in shm_dir.iterdir()] == ["lb0"]


# Files and file systems


@pytest.fixture
def small_disk(shm_dir: Path) -> Iterator[Path]:
    """A file system of 256 KiB, where regions are made."""
    folder = shm_dir / "small"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(folder)], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("only who may mount can have a small file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_file_system(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LBGYM_SHM_DIR", str(small_disk))
    free = os.statvfs(small_disk).f_bfree
    with pytest.raises(RegionError, match=r"cannot create region 'lb0' in .*: there is no room for its [\d,]+ bytes"):
        SharedMemoryRegion.create("lb0", num_servers=1024)
    assert not list(small_disk.iterdir())
    assert os.statvfs(small_disk).f_bfree == free
    with SharedMemoryRegion.create("lb0", num_servers=300) as region:
        # Others fill the rest; what the region needs it has already.
        with pytest.raises(OSError) as failure, open(small_disk / "filler", "wb", buffering=0) as filler:
            while True:
                filler.write(b"x" * 4096)
        assert failure.value.errno == errno.ENOSPC
        with pytest.raises(RegionError, match="no room"):
            SharedMemoryRegion.create("lb1", num_servers=1)
        agent = SharedMemoryRegion.attach("lb0")
        for number in range(1, 6):
            agent.write_action(sequence_id=number, weights=np.ones(300))
            region.publish(Publication.of(small_payload(300)))
        assert agent.latest == 5
        agent.close()
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


def small_payload(n: int) -> Snapshot:
    counts = np.zeros(n, np.int64)
    stats = np.zeros((n, 11), np.float32)
    return Snapshot(0, 0.0, np.ones(n, np.bool_), stats, None, counts, counts, counts, counts, 0, None)


def test_a_limit_on_file_sizes(nursery: Nursery, shm_dir: Path) -> None:
    with nursery.running(roles.limited, name="lb0", size=4096) as child:
        error, sentence = child.hear()
    assert error == "RegionError"
    assert "cannot create region 'lb0'" in sentence and "no room" in sentence
    assert not list(shm_dir.iterdir())


@needs_others
def test_no_permission(nursery: Nursery, shm_dir: Path) -> None:
    shm_dir.chmod(0o755)
    with (
        SharedMemoryRegion.create("secret", num_servers=1, mode=0o000),
        SharedMemoryRegion.create("public", num_servers=1, mode=0o444),
    ):
        if os.geteuid() != 0:
            shm_dir.chmod(0o555)
        with nursery.running(roles.as_nobody, names=["secret", "public"], new="mine") as child:
            secret, secret_to_write, public, public_to_write, mine = (child.hear() for _ in range(5))
        for error, sentence in (secret, secret_to_write):
            assert error == "RegionError"
            assert "no permission for region 'secret'" in sentence and "mode ----------" in sentence
        # Who may only read it is attached read-only, unless it must write.
        assert public is True
        assert public_to_write[0] == "RegionError" and "mode -r--r--r--" in public_to_write[1]
        assert mine == ["RegionError", f"cannot create region 'mine' in {shm_dir}: permission denied"]
        shm_dir.chmod(0o000 if os.geteuid() != 0 else 0o700)
        with nursery.running(roles.as_nobody, names=["public"], new="mine") as child:
            error, sentence = child.hear()
        assert error == "RegionError" and f"{shm_dir} cannot be searched" in sentence
        shm_dir.chmod(0o700)


@needs_others
def test_a_dead_region_of_somebody_else(nursery: Nursery, shm_dir: Path) -> None:
    """A region that may be written to, but not removed, is not replaced, and the reason is said."""
    with nursery.running(roles.create, name="lb0", mode=0o666):
        attach = SharedMemoryRegion.attach("lb0", timeout=20.0)
        attach.close()
    shm_dir.chmod(0o755 if os.geteuid() == 0 else 0o555)
    with nursery.running(roles.as_nobody, names=[], new="lb0") as child:
        error, sentence = child.hear()
    assert error == "RegionError"
    assert "'lb0'" in sentence and "denied" in sentence
    assert SharedMemoryRegion.attach("lb0").path.exists()
    shm_dir.chmod(0o700)


FOREIGN = ("directory", "fifo", "socket", "symlink", "loop", "dangling", "empty", "text", "short", "long")


@pytest.mark.parametrize("kind", FOREIGN)
def test_something_else_has_the_name(shm_dir: Path, kind: str) -> None:
    """It is refused at once, and stays as it is."""
    path = shm_dir / "lb0"
    with SharedMemoryRegion.create("real", num_servers=1) as real:
        region = real.path.read_bytes()
        match kind:
            case "directory":
                path.mkdir()
            case "fifo":
                os.mkfifo(path)
            case "socket":
                with socket.socket(socket.AF_UNIX) as server:
                    server.bind(str(path))
            case "symlink":
                path.symlink_to(real.path)
            case "loop":
                path.symlink_to(path)
            case "dangling":
                path.symlink_to(shm_dir / "nowhere")
            case "empty":
                path.touch()
            case "text":
                path.write_text("weights = 1, 2\n" * 1000)
            case "short":
                path.write_bytes(region[:-64])
            case "long":
                path.write_bytes(region + bytes(64))
        before = path.lstat()
        for read_only in (None, True, False):
            with pytest.raises(RegionFormatError, match="is no region"):
                SharedMemoryRegion.attach("lb0", read_only=read_only)
        with pytest.raises(RegionExistsError, match=r"the name 'lb0' is taken: .* remove that file or"):
            SharedMemoryRegion.create("lb0", num_servers=1)
        assert path.lstat().st_ino == before.st_ino and path.lstat().st_size == before.st_size
        assert real.path.exists()
        # What begins like a region is listed, so that it can be removed.
        assert list(region_names()) == (["lb0", "real"] if kind in ("short", "long") else ["real"])


def test_the_directory_is_none(shm_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (shm_dir / "file").touch()
    monkeypatch.setenv("LBGYM_SHM_DIR", str(shm_dir / "file"))
    for call in (SharedMemoryRegion.attach, lambda name: SharedMemoryRegion.create(name, num_servers=1)):
        with pytest.raises(RegionError, match=r"'lb0'.*Not a directory"):
            call("lb0")
    monkeypatch.setenv("LBGYM_SHM_DIR", str(shm_dir / "nowhere"))
    with pytest.raises(RegionNotFoundError, match=r"there is no region 'lb0' in .*nowhere"):
        SharedMemoryRegion.attach("lb0")
    with pytest.raises(RegionError, match=r"cannot create region 'lb0' in .*nowhere: No such file or directory"):
        SharedMemoryRegion.create("lb0", num_servers=1)
    assert list(region_names()) == []


# Producers that behave strangely


def test_sequence_and_time_jump_back() -> None:
    """A producer of another kind may restart its counting in place: it is seen, not waited for."""
    with SharedMemoryRegion.create("lb0", num_servers=2) as producer:
        agent = SharedMemoryRegion.attach("lb0")
        buffer = agent.new_buffer()
        for timestamp in (10.0, 11.0, 12.0):
            shown = small_payload(2)
            shown.timestamp = timestamp
            producer.publish(Publication.of(shown))
        assert agent.read_into(buffer) and (buffer.sequence_id, buffer.timestamp) == (3, 12.0)
        producer._sequence_id = 0
        shown.timestamp = 1.5
        producer.publish(Publication.of(shown))
        assert agent.wait_observation(buffer.sequence_id, 0.0)
        assert agent.read_into(buffer) and (buffer.sequence_id, buffer.timestamp) == (1, 1.5)
        # The ring holds number 2 and 3 of before; nobody can tell them from those to come but by their time.
        assert agent.read_earlier(buffer, 3) and buffer.timestamp == 12.0
        producer._sequence_id = 1 << 62
        producer.publish(Publication.of(shown))
        assert agent.read_into(buffer) and buffer.sequence_id == (1 << 62) + 1
        agent.close()


@pytest.mark.parametrize(("first", "second"), [(8, 1024), (1024, 8)])
def test_a_restart_with_another_capacity(nursery: Nursery, first: int, second: int) -> None:
    before = nursery.fork(roles.create, name="lb0", capacity=first)
    old = attach_to("lb0", before)
    buffer = old.new_buffer()
    before.kill()
    with SharedMemoryRegion.create("lb0", num_servers=2, capacity=second, publish_interval=0.5) as producer:
        producer.publish(Publication.of(small_payload(min(second, 100))))
        assert old.replaced and old.capacity == first
        new = SharedMemoryRegion.attach("lb0")
        assert new.capacity == second
        with pytest.raises(InvalidOptionError, match=f"made for {first} servers, region 'lb0' has room for {second}"):
            new.read_into(buffer)
        with pytest.raises(InvalidOptionError, match=f"made for {first} servers"):
            new.read_earlier(buffer, 1)
        assert new.read_into(new.new_buffer())
        assert math.isclose(new.publish_interval, 0.5)
        new.close()
    old.close()
