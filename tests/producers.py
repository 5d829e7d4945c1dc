"""Producers of regions as processes of their own, which publish a simulation when they are told to.

They are forked from a warm process, and so begin at once; a kill is a real one.
"""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from lbgym.dataplanes import SimulatedDataPlane
from lbgym.scenarios import load_scenario
from lbgym.sharedmemory import Publication, SharedMemoryRegion, seqlock
from lbgym.sharedmemory.system import DIRECTORY_VARIABLE
from lbgym.snapshot import Snapshot

INTERVAL = 0.25

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.producers_warm"])


class Producer:
    """The test's end of a process that publishes region ``name``; a context manager that kills it.

    Args:
        name: of the region.
        servers: the first servers of the scenario "heterogeneous"; None: all 8.
        options: further ones of ``SharedMemoryRegion.create``.
    """

    def __init__(self, name: str, servers: int | None = None, seed: int = 1, **options: Any) -> None:
        self._connection, theirs = _context.Pipe()
        folder = os.environ[DIRECTORY_VARIABLE]
        options = {"publish_interval": INTERVAL, "driver": "test", **options}
        self.process = _context.Process(
            target=_produce, args=(theirs, folder, name, servers, seed, options), daemon=True
        )
        self.process.start()
        theirs.close()
        self.instance: int = self._connection.recv()

    def publish(self, count: int = 1, *, jump: float = 0.0, servers: int | None = None) -> list[Published]:
        """Simulate and publish ``count`` observations.

        Args:
            count: observations.
            jump: seconds by which the clock jumps before the first one.
            servers: how many to publish from now on.
        """
        return self._ask("publish", count, jump, servers)

    def run(self, pause: float) -> None:
        """Publish one observation after the other, ``pause`` seconds apart, until :meth:`halt`."""
        self._connection.send(("run", pause))

    def halt(self) -> list[Published]:
        """Stop that, and return what was published."""
        return self._ask("halt")

    def _ask(self, *command: Any) -> list[Published]:
        self._connection.send(command)
        return self._connection.recv()

    def end(self) -> None:
        """Have it close its region, and exit."""
        self._ask("end")
        self.process.join(30)
        assert self.process.exitcode == 0

    def kill(self) -> None:
        """SIGKILL; it is dead when this returns."""
        self.process.kill()
        self.process.join(30)

    def __enter__(self) -> Producer:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._connection.close()


class Published:
    """An observation as its producer knows it."""

    def __init__(
        self, region: SharedMemoryRegion, snapshot: Snapshot, sequence_id: int, fct: tuple[int, float]
    ) -> None:
        self.instance, self.sequence_id, self.snapshot = region.instance, sequence_id, snapshot
        self.weights = region.weights_in_force().copy()
        self.safe = region.safe_weights_in_force
        self.fct_count, self.fct_sum = fct


def _produce(
    connection: Connection, folder: str, name: str, servers: int | None, seed: int, options: dict[str, Any]
) -> None:
    os.environ[DIRECTORY_VARIABLE] = folder
    plane = SimulatedDataPlane(load_scenario("heterogeneous"), interval=INTERVAL)
    snapshot = plane.reset(seed)
    servers = servers or plane.num_servers
    region = SharedMemoryRegion.create(name, num_servers=servers, **options)
    weights, jumped, count = np.ones(plane.num_servers), 0.0, 0

    def publish() -> Published:
        nonlocal snapshot, count
        in_force = region.weights_in_force()
        weights[: min(servers, len(in_force))] = in_force[:servers]
        snapshot = plane.step(weights)
        count += 1
        shown = _first(snapshot, servers, jumped)
        fct = count, count * 0.5
        number = region.publish(Publication.of(shown, fct_count=fct[0], fct_sum=fct[1]))
        return Published(region, shown, number, fct)

    connection.send(region.instance)
    while True:
        match connection.recv():
            case ["publish", wanted, jump, number]:
                jumped += jump
                servers = number or servers
                connection.send([publish() for _ in range(wanted)])
            case ["run", pause]:
                published = []
                while not connection.poll(pause):
                    published.append(publish())
                assert connection.recv() == ("halt",)
                connection.send(published)
            case ["end"]:
                region.close()
                region.unlink()
                connection.send([])
                return


def _first(snapshot: Snapshot, n: int, jumped: float) -> Snapshot:
    assert snapshot.ground_truth is not None
    return Snapshot(
        sequence_id=snapshot.sequence_id,
        timestamp=snapshot.timestamp + jumped,
        active=snapshot.active[:n],
        stats=snapshot.stats[:n],
        ground_truth=snapshot.ground_truth[:n],
        started=snapshot.started[:n],
        completed=snapshot.completed[:n],
        rejected=snapshot.rejected[:n],
        failed=snapshot.failed[:n],
        unrouted=snapshot.unrouted,
        service=None,
    )


def warm_up() -> None:
    """Load what is compiled, in the process that others are forked from."""
    seqlock.warm_up()
    plane = SimulatedDataPlane(load_scenario("heterogeneous"), interval=INTERVAL)
    plane.reset(0)
    plane.step(np.ones(plane.num_servers))
    plane.close()
