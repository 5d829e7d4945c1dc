"""What the tests run: data planes and ``lbgym run`` in processes of their own, controllers in a thread."""

from __future__ import annotations

import argparse
import json
import os
import queue
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lbgym.controller import Controller, ControllerConfig, Outcome
from lbgym.policies import WeightPolicy
from lbgym.sharedmemory.system import DIRECTORY_VARIABLE
from tests.dataplanes import puppet
from tests.sharedmemory.nursery import Child, Nursery

INTERVAL = 0.04
#: Long enough for a busy machine; nothing waits for so long in vain.
PATIENCE = 30.0


def until(condition: Callable[[], Any], what: str = "it") -> Any:
    """The first truth of ``condition``."""
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited for {what} in vain"
        time.sleep(0.002)
    return found


# A data plane that does as it is told


def play_puppet(say: Callable[[Any], None], address: str, **options: Any) -> None:
    """The puppet of tests/dataplanes, in a fork: its commands come over a socket."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    sys.stdin, sys.stdout = connection.makefile("r"), connection.makefile("w")
    one = puppet._Puppet(argparse.Namespace(**options))
    one.publish()
    print("ready", flush=True)
    one.run()


class Strings:
    """The test's end of a puppet."""

    def __init__(self, child: Child, connection: socket.socket) -> None:
        self._child = child
        self._reading, self._writing = connection.makefile("r"), connection.makefile("w")
        connection.close()
        assert self._reading.readline() == "ready\n"

    def tell(self, **words: Any) -> Any:
        self._writing.write(json.dumps(words) + "\n")
        self._writing.flush()
        return json.loads(self._reading.readline())

    @property
    def weights(self) -> list[float]:
        """In force now."""
        return self.tell(weights=True)

    def kill(self) -> None:
        self._child.kill()

    def close(self) -> None:
        for file in (self._reading, self._writing):
            with suppress(OSError):  # of what it did not read any more
                file.close()


@contextmanager
def data_plane(nursery: Nursery, name: str = "lb0", **keys: Any) -> Iterator[Strings]:
    """A puppet that has published its first observation; killed in the end."""
    options = {
        "servers": 4, "period": 0.02, "rate": 1.0, "capacity": None, "ground_truth": True,
        "features": puppet.ALL_FEATURES, "name": name,
    } | keys  # fmt: skip
    with socket.socket(socket.AF_UNIX) as listening:
        address = tempfile.mktemp(prefix="socket-", dir=os.environ[DIRECTORY_VARIABLE])
        listening.bind(address)
        listening.listen()
        listening.settimeout(PATIENCE)
        with nursery.running(play_puppet, address=address, **options) as child:
            connection, _ = listening.accept()
            strings = Strings(child, connection)
            try:
                yield strings
            finally:
                strings.close()


# A policy that fails when it is told to, and a controller in a thread


class Fickle(WeightPolicy):
    """Gives ``wanted``, or fails in the way that ``mode`` says."""

    def __init__(self, wanted: list[float]) -> None:
        self.wanted, self.mode = wanted, "good"
        self.resets = self.calls = 0
        self.waiting, self.go = threading.Event(), threading.Event()

    def reset(self, seed: int | None = None) -> None:
        self.resets += 1

    def weights(self, features: NDArray[Any], active: NDArray[np.bool_]) -> NDArray[np.float64]:
        self.calls += 1
        wanted = np.ones(len(active))
        wanted[: len(self.wanted)] = self.wanted
        match self.mode:
            case "raises":
                raise RuntimeError("a fault of the policy")
            case "is no number":
                wanted[1] = np.nan
            case "is negative":
                wanted[1] = -1.0
            case "is all zero":
                wanted[:] = 0.0
            case "has another shape":
                wanted = np.ones(len(active) + 1)
            case "is late":
                time.sleep(1.5 * INTERVAL)
            case "waits":
                self.waiting.set()
                self.go.wait(PATIENCE)
        return wanted


class Running:
    """A controller in a thread."""

    def __init__(self, controller: Controller) -> None:
        self.controller = controller
        self.state, self.counts = controller.state, controller.state.counts
        self.outcome: Outcome | None = None
        self.error: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.outcome = self.controller.run(self._stop)
        except BaseException as error:
            self.error = error

    def until(self, condition: Callable[[], Any], what: str = "it") -> Any:
        """The first truth of ``condition``, while the controller runs."""

        def met() -> Any:
            if self.error is not None:
                raise self.error
            return condition()

        return until(met, what)

    def steps(self, more: int) -> None:
        """Wait for so many more steps."""
        goal = self.counts.steps + more
        self.until(lambda: self.counts.steps >= goal, f"{more} more steps")

    def join(self) -> Outcome | None:
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        if self.error is not None:
            raise self.error
        return self.outcome

    def stop(self) -> Outcome | None:
        self._stop.set()
        return self.join()


@contextmanager
def controlling(own: WeightPolicy | None = None, **keys: Any) -> Iterator[Running]:
    """A running controller of region lb0, with hardly any limits unless told otherwise; stopped in the end.

    Args:
        own: decides instead of the policy of the configuration.
        keys: of the configuration.
    """
    free: dict[str, Any] = {
        "policy": "policy", "shm": "lb0", "step_interval": INTERVAL, "timeout": 0.3, "lease": 0.5, "floor": 0.01,
        "rate_limit": float("inf"),
    }  # fmt: skip
    running = Running(Controller(ControllerConfig(**(free | keys)), policy=own))
    try:
        yield running
    finally:
        running._stop.set()
        running._thread.join(PATIENCE)


def play_deaf(say: Callable[[Any], None], name: str) -> None:
    """What ``lbgym run`` does, with a policy that hears of signals and goes on nevertheless."""
    from lbgym.cli._signals import stop_on_signal

    class Deaf(Fickle):
        def weights(self, features: NDArray[Any], active: NDArray[np.bool_]) -> NDArray[np.float64]:
            while True:
                with suppress(BaseException):
                    say("busy")
                    time.sleep(PATIENCE)

    with stop_on_signal(expected=True, patience=False) as stop:
        controller = Controller(ControllerConfig(policy="deaf", shm=name), policy=Deaf([]))
        stop.then = controller.interrupt
        controller.run(stop)


# The command


def play_command(say: Callable[[Any], None], arguments: list[str], log: str, environment: dict[str, str]) -> None:
    """``lbgym run`` in a fork, with a file (a FIFO) as its standard error."""
    descriptor = os.open(log, os.O_WRONLY)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    os.environ.update(environment)
    from lbgym.cli import main

    try:
        main(["run", *arguments])
    except SystemExit as end:
        os._exit(int(end.code or 0))


class Log:
    """Lines of a command as they come: one JSON object each, and nothing else."""

    def __init__(self, path: str) -> None:
        self.lines: list[dict[str, Any]] = []
        self._queue: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, args=(path,), daemon=True)
        self._reader.start()

    def _read(self, path: str) -> None:
        with open(path) as file:
            for line in file:
                self._queue.put(line)
        self._queue.put(None)

    def _next(self) -> dict[str, Any] | None:
        line = self._queue.get(timeout=PATIENCE)
        if line is None:
            self._queue.put(None)
            return None
        entry: dict[str, Any] = json.loads(line)
        assert {"time", "level", "event", "region"} <= entry.keys()
        self.lines.append(entry)
        return entry

    def wait_for(self, event: str) -> dict[str, Any]:
        """The next line of an event."""
        while (entry := self._next()) is not None:
            if entry["event"] == event:
                return entry
        raise AssertionError(f"it ended without {event}: {self.lines}")

    def finish(self) -> list[dict[str, Any]]:
        """All lines, when it has ended."""
        while self._next() is not None:
            pass
        return self.lines


class Command(Log):
    """``lbgym run`` in a process of its own."""

    def __init__(self, nursery: Nursery, arguments: tuple[object, ...], environment: dict[str, str]) -> None:
        path = tempfile.mktemp(prefix="log-", dir=os.environ[DIRECTORY_VARIABLE])
        os.mkfifo(path)
        self.child = nursery.fork(
            play_command, arguments=[str(a) for a in arguments], log=path, environment=environment
        )
        super().__init__(path)

    def signal(self, number: int) -> None:
        self.child.signal(number)

    def end(self) -> int:
        """The exit code; its lines are all read then."""
        code = self.child.end()
        self.finish()
        return code


@contextmanager
def command(nursery: Nursery, *arguments: object, **environment: str) -> Iterator[Command]:
    """A command that is killed in the end, if it still runs."""
    one = Command(nursery, arguments, environment)
    try:
        yield one
    finally:
        if one.child._code is None:
            one.signal(signal.SIGCONT)
            one.signal(signal.SIGKILL)
        one.end()
