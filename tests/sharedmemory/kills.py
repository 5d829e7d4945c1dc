"""Kills at random instants, and what must hold after each; for the tests and for ``benchmarks/survival.py``."""

from __future__ import annotations

import gc
import os
import random as random_numbers
import signal
import time
from collections import Counter

import numpy as np

from lbgym.dataplanes import SharedMemoryDataPlane
from lbgym.errors import DataPlaneTimeout, RegionNotFoundError
from lbgym.sharedmemory import Action, Publication, SharedMemoryRegion, abi
from lbgym.sharedmemory.system import path_of
from tests.sharedmemory import nursery as roles
from tests.sharedmemory.nursery import Child, Nursery, Say, assert_whole, assert_whole_action, payload

#: Seconds; of the agents that are killed.
LEASE = 0.004
#: Seconds, on the data plane's clock and real, between the steps of an agent whose producers are killed.
STEP = 0.02
_NS = 1_000_000_000


def attach_to(name: str, child: Child) -> SharedMemoryRegion:
    """The region of a child that may just be creating it."""
    while True:
        region = SharedMemoryRegion.attach(name, timeout=20.0, live=True)
        if region.producer_pid == child.pid:
            return region
        region.close()


def _locks_left_odd(region: SharedMemoryRegion, first: int, size: int, count: int) -> int:
    """How many sequence locks of the region's frames or actions say that somebody is writing."""
    words = np.fromfile(region.path, "<u8")
    return int((words[[(first + i * size) // 8 for i in range(count)]] % 2).sum())


def kill_producers(nursery: Nursery, kills: int, seed: int) -> Counter[str]:
    """Kill producers that publish at full speed; this process is the agent.

    What can be read after a kill is whole, and the next producer starts at once and is found.
    """
    random = np.random.default_rng(seed)
    tally: Counter[str] = Counter(half_written=0, unpublished=0)
    folder = path_of("lb0").parent
    # What earlier tests have left to the collector may have files open.
    gc.collect()
    descriptors = len(os.listdir("/proc/self/fd"))
    for kill in range(kills):
        victim = nursery.fork(roles.publish, name="lb0")
        if kill % 4 == 0:
            # Also while it replaces the region of the one before.
            time.sleep(random.uniform(0.0, 0.006))
            victim.kill()
            tally["kills"] += 1
            try:
                region = SharedMemoryRegion.attach("lb0")
            except RegionNotFoundError:
                tally["unpublished"] += 1
                continue
            buffer = region.new_buffer()
        else:
            region = attach_to("lb0", victim)
            assert region.wait_observation(0, 20.0)
            buffer = region.new_buffer()
            end = time.monotonic() + random.uniform(0.0, 0.003)
            while time.monotonic() < end:
                assert region.read_into(buffer)
                assert_whole(buffer)
                tally["reads"] += 1
            victim.kill()
            tally["kills"] += 1
        assert not region.producer_alive
        newest = region.latest
        assert not region.wait_observation(newest, 0.0)
        if region.read_into(buffer):
            assert buffer.sequence_id == newest
            assert_whole(buffer)
        else:
            assert newest == 0
            tally["unpublished"] += 1
        # In its ring, too, is nothing that is not whole. One slot may have been overwritten by half.
        found = set()
        for number in range(max(1, newest - abi.NUM_FRAMES + 1), newest + 2):
            if region.read_earlier(buffer, number):
                assert buffer.sequence_id == number
                assert_whole(buffer)
                found.add(number)
        assert found >= set(range(max(1, newest - abi.NUM_FRAMES + 2), newest + 1))
        layout = region.layout
        tally["half_written"] += _locks_left_odd(region, layout.frames_offset, layout.frame_size, abi.NUM_FRAMES)
        region.close()
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert [path.name for path in folder.iterdir()] in ([], ["lb0"])
    with SharedMemoryRegion.create("lb0", num_servers=1):
        pass
    assert not list(folder.iterdir())
    return tally


def _assert_in_force(region: SharedMemoryRegion, safe_weights: np.ndarray) -> bool:
    """Whether an agent's weights are in force, which they are as long as its lease lasts, and not longer."""
    before = time.monotonic_ns()
    weights = region.weights_in_force()
    after = time.monotonic_ns()
    newest = region._action
    assert newest is not None
    end = newest.written_at + newest.lease_ns
    if region.safe_weights_in_force:
        assert after >= end
        assert np.array_equal(weights, safe_weights)
        return False
    assert before < end
    expected = roles.action_weights(newest.sequence_id)
    assert np.array_equal(weights[: len(expected)], expected)
    assert np.array_equal(weights[len(expected) :], safe_weights[len(expected) :])
    return True


def kill_agents(nursery: Nursery, kills: int, seed: int) -> Counter[str]:
    """Kill agents that write at full speed; this process is the producer.

    Actions are whole, the safe weights are in force when the lease ends, the next agent starts at once.
    """
    random = np.random.default_rng(seed)
    tally: Counter[str] = Counter(half_written=0)
    safe_weights = np.full(roles.SERVERS, 3.0)
    with SharedMemoryRegion.create("lb0", num_servers=roles.SERVERS, safe_weights=safe_weights) as region:
        action, layout = Action(region.layout), region.layout
        for kill in range(kills):
            victim = nursery.fork(roles.act, name="lb0", lease=LEASE)
            if kill % 4 == 0:
                time.sleep(random.uniform(0.0, 0.006))
            else:
                assert region.wait_action(20.0)
                assert region.agent_pid == victim.pid
                end = time.monotonic() + random.uniform(0.0, 0.003)
                while time.monotonic() < end:
                    tally["reads"] += _assert_in_force(region, safe_weights)
            victim.kill()
            tally["kills"] += 1
            assert not region.agent_alive
            if region._read_action(action, 0):
                assert_whole_action(action)
                while _assert_in_force(region, safe_weights):
                    assert time.monotonic_ns() < action.written_at + 10 * _NS
            assert region.safe_weights_in_force
            tally["half_written"] += _locks_left_odd(region, layout.actions_offset, layout.action_size, abi.NUM_ACTIONS)
        # And the producer goes on.
        region.publish(Publication.of(payload(2)))
    return tally


def serve_and_be_killed(say: Say, name: str, seed: int, life: float) -> None:
    """One producer after the other, each killed after about ``life`` seconds, until there is a file "stop"."""
    random = random_numbers.Random(seed)
    victims = 0
    while not path_of("stop").exists():
        child = os.fork()
        if child == 0:
            roles.serve(say, name, STEP / 4)
        time.sleep(random.expovariate(1.0 / life))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        victims += 1
        path_of("victims").write_text(str(victims))


def step_through_kills(nursery: Nursery, kills: int, seed: int) -> Counter[str]:
    """Step a live data plane whose producers are killed all the time; each step goes through or says why not."""
    tally: Counter[str] = Counter(kills=0)
    victims = path_of("victims")
    path_of("stop").unlink(missing_ok=True)
    with nursery.running(serve_and_be_killed, name="lb0", seed=seed, life=0.1) as keeper:
        plane = SharedMemoryDataPlane("lb0", interval=STEP, timeout=1.0, num_servers=roles.SERVERS)
        weights = np.ones(roles.SERVERS)

        def killed() -> int:
            # Being written at this moment, it may be empty.
            return int(victims.read_text() or 0) if victims.exists() else 0

        first, patience = killed(), time.monotonic() + 60.0
        # On a busy machine producers may be killed one after the other before they have published.
        while tally["kills"] < kills or (not tally["restarts_followed"] and time.monotonic() < patience):
            try:
                seen = plane.step(weights)
            except DataPlaneTimeout as error:
                assert "region 'lb0': no new observation within" in str(error)
                tally["timeouts"] += 1
            else:
                expected = payload(seen.sequence_id)
                n = len(expected.active)
                assert np.array_equal(seen.active[:n], expected.active)
                assert np.array_equal(seen.stats[:n][expected.active], expected.stats[expected.active])
                tally["steps"] += 1
                tally["restarts_followed"] += plane.info["producer_restarted"]
            tally["kills"] = max(tally["kills"], killed() - first)
        plane.close()
        path_of("stop").touch()
        assert keeper.end() == 0
    return tally
