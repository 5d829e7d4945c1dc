"""What the benchmarks of connections through a proxy share: load, and a driver that moves weights meanwhile."""

from __future__ import annotations

import argparse
import inspect
import socket
import subprocess
import sys
import threading
import time
from typing import Any, Protocol

import numpy as np

from benchmarks.common import markdown, report
from lbgym.drivers.proxy import ProxySource

NAMES = [f"s{i}" for i in range(8)]
INTERVAL = 0.25
THREADS = 8


def load(port: int, connections: int, clients: int) -> None:
    """Open connections one after the other in each of some threads; print how many were served and how many not.

    There are at least so many of them, and they go on until standard input ends.
    """
    counts = [0, 0]
    lock = threading.Lock()
    ended = threading.Event()

    def client(share: int) -> None:
        served = done = 0
        while done < share or not ended.is_set():
            done += 1
            try:
                with socket.create_connection(("127.0.0.1", port), 30.0) as connection:
                    connection.sendall(b"0\n")
                    served += connection.recv(100) != b""
            except OSError:
                pass
        with lock:
            counts[0] += served
            counts[1] += done - served

    threads = [threading.Thread(target=client, args=(connections // clients,)) for _ in range(clients)]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    ended.set()
    for thread in threads:
        thread.join()
    print(*counts)


class Balancer(Protocol):
    """A proxy on a port of 127.0.0.1."""

    port: int

    def weights(self) -> dict[str, int]: ...


class Run:
    """Load from another process, and a driver that moves weights meanwhile."""

    def __init__(self, balancer: Balancer, source: ProxySource, seed: int) -> None:
        self.balancer, self.source = balancer, source
        self._random = np.random.default_rng(seed)
        self._began = time.monotonic()
        self.looks = 0

    def look(self) -> np.ndarray:
        """Read, and return the flows that each server was sent so far."""
        self.looks += 1
        return self.source.read(time.monotonic() - self._began).started

    def move(self) -> np.ndarray:
        """Set new weights, and return the whole ones that the proxy has."""
        self.source.apply(self._random.uniform(0.1, 1.0, len(NAMES)), time.monotonic() - self._began)
        weights = self.balancer.weights()
        return np.array([weights[name] for name in NAMES], np.float64)

    def await_weights(self, wanted: np.ndarray) -> int:
        """Look until the proxy has these weights; returns how many looks it took."""
        begun = self.looks
        while not np.array_equal([self.balancer.weights()[name] for name in NAMES], wanted):
            time.sleep(INTERVAL)
            self.look()
        return self.looks - begun

    def loaded(self, connections: int, *, endless: bool = False) -> subprocess.Popen[str]:
        """Begin to open connections; ``endless``: more of them, until :meth:`enough`."""
        # A process without our imports, which take seconds.
        call = f"load({self.balancer.port}, {connections}, {THREADS})"
        code = f"import socket, sys, threading\n{inspect.getsource(load)}\n{call}"
        source = subprocess.PIPE if endless else subprocess.DEVNULL
        return subprocess.Popen([sys.executable, "-c", code], stdin=source, stdout=subprocess.PIPE, text=True)

    def enough(self, process: subprocess.Popen[str]) -> tuple[int, int]:
        """End an endless load, and look until it has ended; returns the connections served and failed."""
        assert process.stdin is not None
        process.stdin.close()
        while process.poll() is None:
            time.sleep(INTERVAL)
            self.look()
        return counts_of(process)


def counts_of(process: subprocess.Popen[str]) -> tuple[int, int]:
    assert process.stdout is not None
    served, failed = map(int, process.stdout.read().split())
    process.wait()
    return served, failed


def moving(run: Run, connections: int) -> dict[str, Any]:
    """Weights that move at every interval."""
    expected, variance, observed, moves = np.zeros(len(NAMES)), np.zeros(len(NAMES)), np.zeros(len(NAMES)), 0
    began = time.monotonic()
    shares, before = run.move(), run.look()
    process = run.loaded(connections)
    while process.poll() is None:
        time.sleep(INTERVAL)
        # Of flows between two looks, so that it is known by which weights they went.
        sent = run.look() - before
        share = shares / shares.sum()
        observed += sent
        expected += sent.sum() * share
        variance += sent.sum() * share * (1.0 - share)
        shares, before, moves = run.move(), run.look(), moves + 1
    served, failed = counts_of(process)
    deviation = np.abs(observed - expected) / np.sqrt(np.maximum(variance, 1.0))
    seconds = time.monotonic() - began
    return {
        "phase": "weights move", "connections": served + failed, "failed": failed, "seconds": seconds,
        "moves": moves, "attributed": int(observed.sum()), "standard deviations": float(deviation.max()),
    }  # fmt: skip


def conclude(name: str, given: argparse.Namespace, rows: list[dict[str, Any]]) -> int:
    """Report the phases; returns the exit code: 0 if all is as it must be."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    text = markdown([[row.get(key) for key in keys] for row in rows], keys)
    good = all(row["failed"] == 0 for row in rows)
    good &= all(row.get("standard deviations", 0.0) <= 3.0 for row in rows)
    good &= all(row.get("further looks until weights are back", 0) == 0 for row in rows)
    report(name, given, text, {"phases": rows, "reached": bool(good)})
    return 0 if good else 1
