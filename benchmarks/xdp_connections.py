"""TCP connections through the XDP balancer while weights change: ``python -m benchmarks.xdp_connections``, as root.

Real ones, in network namespaces, for direct server return and DNAT, IPv4 and IPv6: clients keep 256 connections open,
each of which sends three lines with pauses, while an agent gives other weights every 250 ms. What must hold: no
connection fails; no packet of an established connection comes to another server, which would answer with a RST; the
balancer counts every connection once, and no open flow in the end; and the servers of new connections follow the
weights.

For the last, a connection counts if it was begun while certain weights were in force: after an observation that says
so, and before the next weights were written. The number that a server should have of them is the sum of its shares, and
its standard deviation that of as many independent draws.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import markdown, parser, report, run_if_possible
from lbgym.drivers.xdp import detach
from lbgym.drivers.xdp.options import default_pin_folder
from lbgym.drivers.xdp.plane import XdpPlane
from lbgym.sharedmemory import SharedMemoryRegion, seqlock
from tests.drivers.xdp.network import (
    PORT,
    VIP4,
    VIP6,
    Network,
    dataplane_toml,
    driver,
    network,
    newest,
    whole_outcome,
)

MODES = ("dsr", "dnat")
WEIGHTS = np.array([1.0, 2.0, 4.0, 0.5])
CHANGE = 0.25
#: Longest wait for the last flows to end, seconds; those of which the balancer has not seen the end stay for longer.
PATIENCE = 20.0
#: Events of a balancer that must not be.
UNUSUAL = ("untracked", "adopted", "syn_limited", "table_full", "unrouted", "conflicts", "reused")


@dataclass(frozen=True)
class Outcome:
    """Of the connections of one run.

    Attributes:
        mode: of the balancer.
        ipv6: or IPv4.
        connections: that were opened.
        seconds: that took.
        changes: of weights meanwhile.
        failed: connections that failed.
        moved: connections that were answered by two servers.
        strays: RSTs that servers sent for connections of other servers.
        late: RSTs that servers sent for connections of their own that had ended, as for a FIN that came twice.
        counted: flows that the balancer counted.
        still_open: open flows in the end.
        untracked: packets without a flow, flows first seen in the middle, and SYNs that were refused.
        placed: int64[servers], connections that were begun while certain weights were in force, by server.
        expected: float64[servers], of them by the weights.
        deviation: float64[servers], standard deviations.
    """

    mode: str
    ipv6: bool
    connections: int
    seconds: float
    changes: int
    failed: int
    moved: int
    strays: int
    late: int
    counted: int
    still_open: int
    untracked: int
    placed: NDArray[np.int64]
    expected: NDArray[np.float64]
    deviation: NDArray[np.float64]

    @property
    def z(self) -> float:
        """Largest deviation of a server's connections from the weights, in standard deviations."""
        return float(np.abs((self.placed - self.expected) / self.deviation).max())

    @property
    def whole(self) -> bool:
        """True if all holds but the split, which is random."""
        lost = self.failed, self.moved, self.strays, self.still_open, self.untracked
        return not any(lost) and self.counted == self.connections


def measure(
    mode: str, *, ipv6: bool, connections: int, lanes: int = 256, pause: float = 0.05, change: float = CHANGE
) -> Outcome:
    """Open ``connections``; raises DriverError if something is missing."""
    name = f"xdp-connections-{os.getpid()}"
    seqlock.warm_up()
    with tempfile.TemporaryDirectory() as folder, network(len(WEIGHTS), dnat=mode == "dnat") as net:
        for server in net.servers:
            net.serve(server)
        host = VIP6 if ipv6 else VIP4
        keys = {"vips": [f"[{host}]:{PORT}" if ipv6 else f"{host}:{PORT}"], "mode": mode, "rule": "wcmp"}
        file = dataplane_toml(Path(folder, "dataplane.toml"), name, net.servers, ipv6=ipv6, driver=keys)

        def totals() -> Mapping[str, int]:
            plane = XdpPlane.take_over(default_pin_folder(name))
            found = plane.shared["totals"].copy()
            plane.close()
            return {key: int(found[key]) for key in UNUSUAL}

        try:
            with driver(net, "--config", file), SharedMemoryRegion.attach(name) as region:
                return watch(
                    net,
                    region,
                    mode,
                    totals,
                    ipv6=ipv6,
                    connections=connections,
                    lanes=lanes,
                    pause=pause,
                    change=change,
                )
        finally:
            detach(name)


def watch(
    net: Network,
    region: SharedMemoryRegion,
    mode: str,
    totals: Callable[[], Mapping[str, int]],
    *,
    ipv6: bool,
    connections: int,
    lanes: int = 256,
    pause: float = 0.05,
    change: float = CHANGE,
) -> Outcome:
    """Open ``connections`` through a balancer that is at work.

    Args:
        net: with servers that answer.
        region: of the balancer.
        mode: to call it in the outcome.
        totals: the balancer's events, ``UNUSUAL``, in the end.
        ipv6: or IPv4.
        connections: in all.
        lanes: at the same time.
        pause: of each of three lines, seconds.
        change: seconds between changes of weights.
    """
    host = VIP6 if ipv6 else VIP4
    net.watch_resets()
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder, "connections")
        begun = time.monotonic()
        clients = net.clients(
            connections, host=host, lanes=lanes, lines=3, pause=pause, sources=net.sources(ipv6=ipv6),
            record=str(record),
        )  # fmt: skip
        periods: list[tuple[NDArray[np.float64], int, int]] = []
        turn = 0
        while clients.poll() is None:
            turn += 1
            weights = np.roll(WEIGHTS, turn)
            due = time.monotonic() + change
            region.write_action(sequence_id=turn, weights=weights, lease=60.0)
            while (seen := newest(region)).applied_sequence_id != turn:
                pass
            since = seen.published_at
            time.sleep(max(0.0, due - time.monotonic()))
            periods.append((weights, since, time.monotonic_ns()))
        seconds = time.monotonic() - begun
        told = whole_outcome(clients)
        until = time.monotonic() + PATIENCE
        while (seen := newest(region)).stats[:, 0].any() and time.monotonic() < until:
            pass
        rows = connections_of(record, told["names"], net.servers)
    placed, expected, deviation = split(rows, periods)
    strays, late = resets_of(net.resets(), rows, net.sources(ipv6=ipv6))
    return Outcome(
        mode, ipv6, connections, seconds, len(periods), len(told["failed"]), told["moved"], strays, late,
        int(seen.counters[:, 0].sum()), int(seen.stats[:, 0].sum()), sum(totals().values()), placed, expected,
        deviation,
    )  # fmt: skip


def connections_of(record: Path, names: Sequence[str], servers: Sequence[str]) -> NDArray[np.int64]:
    """Connections that clients recorded, int64[K, 5]: number, when each was begun and open, server or -1, own port."""
    rows = np.fromfile(record, np.int64).reshape(-1, 5)
    rows[:, 3] = np.array([*(servers.index(name) for name in names), -1])[rows[:, 3]]
    return rows


def resets_of(
    resets: Sequence[tuple[int, str, int]], rows: NDArray[np.int64], sources: Sequence[str]
) -> tuple[int, int]:
    """RSTs for connections of other servers, and of the own."""
    strays = late = 0
    for server, client, port in resets:
        of_client = rows[:, 0] % len(sources) == sources.index(client)
        own = server in rows[of_client & (rows[:, 4] == port), 3]
        strays, late = strays + (not own), late + own
    return strays, late


def split(
    rows: NDArray[np.int64], periods: Sequence[tuple[NDArray[np.float64], int, int]]
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Connections by server, what the weights say, and its standard deviation.

    Args:
        rows: as :func:`connections_of` has them.
        periods: weights, and from when to when they were certainly in force.
    """
    _, begun, up, server, _ = rows[rows[:, 3] >= 0].T
    n = len(WEIGHTS)
    placed, expected, variance = np.zeros(n, np.int64), np.zeros(n), np.zeros(n)
    for weights, since, until in periods:
        counts = np.bincount(server[(begun >= since) & (up <= until)], minlength=n)
        share = weights / weights.sum()
        placed += counts
        expected += counts.sum() * share
        variance += counts.sum() * share * (1.0 - share)
    return placed, expected, np.sqrt(variance)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--connections", type=int, default=None, help="in each mode and IP version (50,000)")
    given = options.parse_args(arguments)
    count = given.connections or (2_000 if given.quick else 50_000)
    outcomes = []
    for mode in MODES:
        for ipv6 in (False, True):
            outcomes.append(measure(mode, ipv6=ipv6, connections=count))
            print(f"{mode}, IPv{6 if ipv6 else 4}: {outcomes[-1]}", file=sys.stderr)
    return conclude("xdp_connections", given, outcomes)


def conclude(benchmark: str, given: argparse.Namespace, outcomes: Sequence[Outcome]) -> int:
    """Report outcomes; returns the exit code."""
    text = markdown(
        [
            (
                f"{o.mode}, IPv{6 if o.ipv6 else 4}", o.connections, o.seconds, o.changes, o.failed, o.moved, o.strays,
                o.late, o.still_open, int(o.placed.sum()), o.z,
            )
            for o in outcomes
        ],
        (
            "mode", "connections", "seconds", "changes", "failed", "moved", "stray RSTs", "late RSTs",
            "open flows left", "split of", "largest z",
        ),
    )  # fmt: skip
    reached = all(outcome.whole and outcome.z <= 3.0 for outcome in outcomes)
    data = [
        {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in vars(outcome).items()}
        for outcome in outcomes
    ]
    report(benchmark, given, text, {"outcomes": data, "reached": reached})
    return 0 if reached or given.quick else 1


if __name__ == "__main__":
    run_if_possible(main)
