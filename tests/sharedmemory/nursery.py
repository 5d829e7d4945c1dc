"""A warm process that forks others: ``python -m tests.sharedmemory.nursery``.

A fork is a process of its own, that can be killed like any other, and begins a hundred times faster than a new
interpreter. It plays a role, which is a function of a module such as those below; what it has to say comes back as
lines of JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from lbgym.errors import LbgymError
from lbgym.sharedmemory import Action, ObservationBuffer, Publication, SharedMemoryRegion, seqlock
from lbgym.sharedmemory.system import DIRECTORY_VARIABLE
from lbgym.snapshot import Snapshot

#: Servers of the payloads; so many that most of a writer's time goes into writing.
SERVERS = 512
_CELLS = np.arange(SERVERS * 11, dtype=np.float32).reshape(SERVERS, 11)
_ROWS = np.arange(SERVERS, dtype=np.int64)
_NONE = np.zeros(SERVERS, np.int64)

Say = Callable[[Any], None]


def payload(number: int) -> Snapshot:
    """The observation of a sequence id, with another number of servers than the one before."""
    n = SERVERS - number % 2
    shift = number % 65_536
    rows = _ROWS[:n] + number
    stats = _CELLS[:n] + np.float32(shift)
    return Snapshot(
        number, number / 1024, rows % 3 > 0, stats, stats[:, 3:6], 3 * rows, rows, rows, _NONE[:n], number * 7, None
    )


def assert_whole(buffer: ObservationBuffer) -> None:
    """The buffer holds what belongs to its sequence id, and nothing of another."""
    number, n = buffer.sequence_id, buffer.num_servers
    expected = payload(number)
    assert n == SERVERS - number % 2
    assert buffer.timestamp_ns == round(number / 1024 * 1e9)
    assert buffer.unrouted == number * 7 and buffer.fct_count == number * 5
    assert np.array_equal(buffer.active[:n], expected.active)
    assert np.array_equal(buffer.stats[:n], expected.stats)
    assert buffer.ground_truth is not None and np.array_equal(buffer.ground_truth[:n], expected.stats[:, 3:6])
    counters = np.stack((expected.started, expected.completed, expected.rejected, expected.failed), axis=1)
    assert np.array_equal(buffer.counters[:n], counters)


def action_weights(number: int) -> np.ndarray:
    """The weights of an action's sequence id."""
    return 1.0 + (_ROWS[: SERVERS - number % 2] * 7 + number) % 1009


def probabilities(threshold: np.ndarray, alias: np.ndarray) -> np.ndarray:
    """What an alias table gives each server."""
    n = len(threshold)
    kept = np.where(alias == np.arange(n), 1.0, threshold / 2**32)
    return (kept + np.bincount(alias, 1.0 - kept, n)) / n


def assert_whole_action(action: Action) -> None:
    """The action holds the weights of its sequence id and the alias table of these weights."""
    n, number = action.num_servers, action.sequence_id
    weights = action_weights(number)
    assert n == len(weights)
    assert np.array_equal(action.weights[:n], weights)
    shares = probabilities(action.threshold[:n], action.alias[:n])
    assert np.abs(shares - weights / weights.sum()).max() < 1e-9


# The roles


def publish(say: Say, name: str) -> None:
    """A producer at full speed."""
    region = SharedMemoryRegion.create(name, num_servers=SERVERS, publish_interval=1e-4)
    number = 0
    while True:
        number += 1
        region.weights_in_force()
        region.publish(Publication.of(payload(number), fct_count=number * 5))


def act(say: Say, name: str, lease: float) -> None:
    """An agent at full speed."""
    region = SharedMemoryRegion.attach(name)
    region.lock_agent()
    number = 0
    while True:
        number += 1
        region.write_action(sequence_id=number, weights=action_weights(number), lease=lease)


def serve(say: Say, name: str, period: float) -> None:
    """A producer that publishes every ``period`` seconds, by a clock that all who take over share.

    It does not outlive its parent, which may be killed, too.
    """
    parent = os.getppid()
    region = SharedMemoryRegion.create(name, num_servers=SERVERS, publish_interval=period)
    number = 0
    while os.getppid() == parent:
        number += 1
        region.weights_in_force()
        region.publish(Publication.of(replace(payload(number), timestamp=time.monotonic()), fct_count=number * 5))
        region.wait_action(period)


def create(say: Say, name: str, **options: Any) -> None:
    """A producer that creates a region and says its instance."""
    region = SharedMemoryRegion.create(name, **{"num_servers": 2, **options})
    say(region.instance)
    signal.pause()


def race(say: Say, name: str, at: int) -> None:
    """A producer that tries the same at an instant of the monotonic clock."""
    while time.monotonic_ns() < at:
        pass
    region = said(lambda: SharedMemoryRegion.create(name, num_servers=2))
    say(region.instance if isinstance(region, SharedMemoryRegion) else region)
    signal.pause()


def publish_now_and_then(say: Say, name: str, count: int, pause: float) -> None:
    """A producer of ``count`` observations, for an agent that it waits for, that then closes its region."""
    with SharedMemoryRegion.create(name, num_servers=SERVERS) as region:
        say("created")
        while not region.agent_alive:
            time.sleep(0.001)
        for number in range(1, count + 1):
            time.sleep(pause)
            region.publish(Publication.of(payload(number), fct_count=number * 5))
        time.sleep(pause)


def drive(say: Say, name: str, lease: float, pause: float) -> None:
    """An agent that says when it is one, and then writes an action now and then."""
    region = SharedMemoryRegion.attach(name)
    region.lock_agent()
    say("driving")
    number = 0
    while True:
        number += 1
        region.write_action(sequence_id=number, weights=action_weights(number), lease=lease)
        time.sleep(pause)


def wait(say: Say, name: str) -> None:
    """Somebody who sleeps until there is an observation."""
    region = SharedMemoryRegion.attach(name)
    say("waiting")
    say(region.wait_observation(region.latest, 30.0))


def leave_a_child(say: Say, name: str) -> None:
    """A producer with a child that does nothing, and lives on when the producer is killed."""
    region = SharedMemoryRegion.create(name, num_servers=1)
    child = os.fork()
    if child == 0:
        signal.pause()
    say([region.instance, child])
    signal.pause()


def use_in_a_child(say: Say, name: str) -> None:
    """A process that uses a parent's regions, and closes them, in a child."""
    producer = SharedMemoryRegion.create(name, num_servers=1)
    agent = SharedMemoryRegion.attach(name)
    agent.lock_agent()
    child = os.fork()
    if child == 0:
        for region in (producer, agent):
            with region:
                say([region.closed, said(region.read_observation)])
        say(said(lambda: SharedMemoryRegion.attach(name).lock_agent()))
        os._exit(0)
    os.waitpid(child, 0)
    say([producer.producer_alive, agent.agent_alive, SharedMemoryRegion.attach(name).producer_alive])


def limited(say: Say, name: str, size: int) -> None:
    """Somebody who may not write files of more than ``size`` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    say(said(lambda: SharedMemoryRegion.create(name, num_servers=1)))


def as_nobody(say: Say, names: list[str], new: str) -> None:
    """Somebody without privileges, who tries to attach to and to create regions."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65_534)
        os.setuid(65_534)
    for name in names:
        for read_only in (None, False):
            region = said(partial(SharedMemoryRegion.attach, name, read_only=read_only))
            say(region.read_only if isinstance(region, SharedMemoryRegion) else region)
    say(said(lambda: SharedMemoryRegion.create(new, num_servers=1)))


def said(call: Callable[[], Any]) -> Any:
    """What a call returns, or the error as ``[name, sentence]``."""
    try:
        return call()
    except LbgymError as error:
        return [type(error).__name__, str(error)]


class Child:
    """A forked process, as the test has it."""

    def __init__(self, nursery: Nursery, pid: int) -> None:
        self._nursery, self.pid = nursery, pid
        self._code: int | None = None

    def hear(self) -> Any:
        """The next thing it says; waits for it."""
        said = self._nursery.command("hear", self.pid)
        assert said is not None, f"process {self.pid} ended without a word: {self.end()}"
        return said[0]

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def end(self) -> int:
        """Wait for its end and return its exit code: 0 if its role is over, or minus the signal that killed it."""
        if self._code is None:
            self._code = int(self._nursery.command("end", self.pid))
        return self._code

    def kill(self) -> None:
        """Kill it; when this returns it is dead, and the kernel has dropped its locks."""
        if self._code is None:
            self.signal(signal.SIGKILL)
        code = self.end()
        assert code == -signal.SIGKILL, f"it had ended before with code {code}; see standard error"


class Nursery:
    """The test's end of the warm process."""

    def __init__(self) -> None:
        # Who forks has one thread.
        environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )
        assert self.command("ready")

    def command(self, *words: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def fork(self, role: Callable[..., None], **options: Any) -> Child:
        """A process that plays a role, in the test's directory of regions."""
        folder = os.environ[DIRECTORY_VARIABLE]
        return Child(self, self.command("fork", role.__module__, role.__name__, folder, options))

    @contextmanager
    def running(self, role: Callable[..., None], **options: Any) -> Iterator[Child]:
        """The same, killed at the end of the block if it is not at its end before."""
        child = self.fork(role, **options)
        try:
            yield child
        finally:
            if child._code is None:
                child.signal(signal.SIGKILL)
            child.end()

    def close(self) -> None:
        """End it, and every process that it forked."""
        self._process.communicate()


def _play(module: str, role: str, folder: str, options: dict[str, Any], pipe: int) -> None:
    """In the child; does not return."""
    code = 1
    try:
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, 0)
        os.dup2(nothing, 1)
        os.environ[DIRECTORY_VARIABLE] = folder

        def say(thing: Any) -> None:
            os.write(pipe, json.dumps(thing).encode() + b"\n")

        getattr(importlib.import_module(module), role)(say, **options)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def main() -> None:
    seqlock.warm_up()
    pipes: dict[int, Any] = {}
    for line in sys.stdin:
        match json.loads(line):
            case ["ready"]:
                answer: Any = True
            case ["fork", module, role, folder, options]:
                reading, writing = os.pipe()
                answer = os.fork()
                if answer == 0:
                    _play(module, role, folder, options, writing)
                os.close(writing)
                pipes[answer] = os.fdopen(reading, "rb")
            case ["hear", pid]:
                heard = pipes[pid].readline()
                answer = [json.loads(heard)] if heard else None
            case ["end", pid]:
                answer = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                pipes.pop(pid).close()
            case _:
                raise ValueError(line)
        os.write(1, json.dumps(answer).encode() + b"\n")
    for pid in pipes:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    # The module of the roles, once and for all children.
    importlib.import_module("tests.sharedmemory.nursery")
    main()
