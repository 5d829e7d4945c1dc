"""Connections through HAProxy while weights move: ``python -m benchmarks.haproxy_connections``.

50,000 connections over 8 servers by roundrobin, random weights every 250 ms by the driver: none may fail, and each
server's share of new connections must be within 3 standard deviations of that by the rounded weights (binomial:
roundrobin itself spreads less). Then ten reloads under load: none may fail, and the driver's first look at a new
process must bring the weights back.
"""

from __future__ import annotations

import inspect
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from signal import SIGUSR2
from typing import Any

import numpy as np

from benchmarks.common import markdown, parser, report
from lbgym.drivers.haproxy import HaproxyBackend, HaproxyOptions, open_backends
from tests.drivers.haproxy.balancer import Balancer, missing
from tests.drivers.proxies import Servers

NAMES = [f"s{i}" for i in range(8)]
INTERVAL = 0.25
THREADS = 8


def load(port: int, connections: int, clients: int) -> None:
    """Open connections one after the other in each of some threads; print how many were served and how many not."""
    counts = [0, 0]
    lock = threading.Lock()

    def client(share: int) -> None:
        served = 0
        for _ in range(share):
            try:
                with socket.create_connection(("127.0.0.1", port), 30.0) as connection:
                    connection.sendall(b"0\n")
                    served += connection.recv(100) != b""
            except OSError:
                pass
        with lock:
            counts[0] += served
            counts[1] += share - served

    threads = [threading.Thread(target=client, args=(connections // clients,)) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(*counts)


class Run:
    """Load from another process, and a driver that moves weights meanwhile."""

    def __init__(self, balancer: Balancer, source: HaproxyBackend, seed: int) -> None:
        self.balancer, self.source = balancer, source
        self._random = np.random.default_rng(seed)
        self._began = time.monotonic()
        self.looks = 0

    def look(self) -> np.ndarray:
        """Read, and return the flows that each server was sent so far."""
        self.looks += 1
        return self.source.read(time.monotonic() - self._began).started

    def move(self) -> np.ndarray:
        """Set new weights, and return the whole ones that HAProxy has."""
        self.source.apply(self._random.uniform(0.1, 1.0, len(NAMES)), time.monotonic() - self._began)
        weights = self.balancer.weights()
        return np.array([weights[name] for name in NAMES], np.float64)

    def loaded(self, connections: int) -> subprocess.Popen[str]:
        # A process without our imports, which take seconds.
        code = (
            f"import socket, threading\n{inspect.getsource(load)}\nload({self.balancer.port}, {connections}, {THREADS})"
        )
        return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def counts_of(process: subprocess.Popen[str]) -> tuple[int, int]:
    served, failed = map(int, process.communicate()[0].split())
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


def reloading(run: Run, connections: int, reloads: int) -> dict[str, Any]:
    """Reloads under load; weights stay as they are."""
    wanted = run.move()
    process = run.loaded(connections)
    began = time.monotonic()
    looks, done = [], 0
    while process.poll() is None:
        if done < reloads:
            before = run.source.process
            assert run.balancer.master is not None
            run.balancer.master.send_signal(SIGUSR2)
            done += 1
            # Until the driver has seen the new process: how many looks until its weights are those wanted?
            while run.source.process == before:
                time.sleep(INTERVAL)
                run.look()
            needed = 0
            while not np.array_equal([run.balancer.weights()[name] for name in NAMES], wanted):
                time.sleep(INTERVAL)
                run.look()
                needed += 1
            looks.append(needed)
        time.sleep(INTERVAL)
        run.look()
    served, failed = counts_of(process)
    return {
        "phase": "reloads", "connections": served + failed, "failed": failed, "seconds": time.monotonic() - began,
        "reloads under load": done, "further looks until weights are back": max(looks),
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser(__doc__.splitlines()[0])
    given = options.parse_args(arguments)
    if missing():
        print(missing(), file=sys.stderr)
        return 2
    many, more, reloads = (2_000, 1_000, 2) if given.quick else (50_000, 40_000, 10)
    servers = Servers(NAMES)
    balancer = Balancer(servers)
    try:
        balancer.configure({"web": NAMES})
        balancer.start()
        (source,) = open_backends(
            HaproxyOptions(backends={"benchmark": "web"}, socket=balancer.socket, log=balancer.log)
        ).values()
        with closing(source):
            assert isinstance(source, HaproxyBackend)
            run = Run(balancer, source, seed=1)
            rows = [moving(run, many), reloading(run, more, reloads)]
            lost = source.lost_lines
    finally:
        balancer.close()
        servers.close()
    for row in rows:
        row["log lines lost"] = lost
    keys = list(dict.fromkeys(key for row in rows for key in row))
    text = markdown([[row.get(key) for key in keys] for row in rows], keys)
    good = all(row["failed"] == 0 for row in rows) and rows[0]["standard deviations"] <= 3.0
    good &= rows[1]["reloads under load"] == reloads and rows[1]["further looks until weights are back"] == 0
    report("haproxy_connections", given, text, {"phases": rows, "reached": bool(good)})
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
