"""Servers, agent and driver that come and go under load: ``python -m benchmarks.xdp_changes``, as root.

Real TCP connections through the XDP balancer, in network namespaces: some are held all the time, others come and go.

* Servers are drained, added, removed and killed. After the change no connection is begun there; those of the other
  servers stay where they are; the first observation after it has the right mask.
* The agent is killed: the safe weights come in force when its lease ends.
* The driver is killed: connections go on, later by the configured weights, and the next driver continues with the same
  counts.
* Under ``maglev`` a server is drained while the same clients connect again from the same ports: who does not have to
  move stays, but for what Maglev's tables move besides (Eisenbud et al., NSDI 2016, section 3.4).
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import markdown, parser, report, run_if_possible
from benchmarks.xdp_connections import connections_of
from lbgym.drivers import DriverError
from lbgym.drivers.control import control
from lbgym.drivers.xdp import detach
from lbgym.drivers.xdp.options import default_pin_folder
from lbgym.drivers.xdp.plane import XdpPlane
from lbgym.drivers.xdp.tables import maglev_table
from lbgym.sharedmemory import ObservationBuffer, SharedMemoryRegion, seqlock
from tests.drivers.xdp.network import PORT, VIP4, Network, dataplane_toml, driver, network, newest, whole_outcome

#: Seconds for which a test waits for what must come.
PATIENCE = 30.0
LEASE = 1.0
HEALTH = "[health]\ninterval = 0.05\nfall = 2\nrise = 1"

#: What was measured, its value, and what it must be: a number, or at most a number.
Row = tuple[str, float, str]


def check(rows: Sequence[Row]) -> bool:
    """True if everything is as it must be."""
    return all(_fits(value, wanted) for _, value, wanted in rows)


def _fits(value: float, wanted: str) -> bool:
    if not wanted:
        return True
    sign, _, number = wanted.rpartition(" ")
    return value <= float(number) if sign == "at most" else value > float(number) if sign else value == float(number)


class Laboratory:
    """A network with a driver in it, and clients that record what becomes of them."""

    def __init__(self, net: Network, name: str, folder: Path) -> None:
        self.net, self.name, self.folder = net, name, folder

    def config(self, servers: Sequence[str], **keys: Any) -> Path:
        file = self.folder / "dataplane.toml"
        return dataplane_toml(file, self.name, servers, head=HEALTH, driver={"vips": [f"{VIP4}:{PORT}"], **keys})

    @contextmanager
    def load(
        self, label: str, *, ends: bool = False, **keys: Any
    ) -> Iterator[Callable[[], tuple[NDArray[np.int64], dict[str, Any]]]]:
        """Clients at work; the function ends them, or waits for their end, and returns connections and outcome."""
        record = self.folder / label
        process = self.net.clients(keys.pop("connections", 1 << 30), record=str(record), **keys)

        def end() -> tuple[NDArray[np.int64], dict[str, Any]]:
            # One that ends by itself would be killed by a signal that meets it on its way out.
            if not ends:
                process.send_signal(signal.SIGTERM)
            told = dict(whole_outcome(process))
            return connections_of(record, told["names"], self.net.servers), told

        try:
            yield end
        finally:
            process.kill()


@contextmanager
def laboratory(servers: int) -> Iterator[Laboratory]:
    name = f"xdp-changes-{os.getpid()}"
    seqlock.warm_up()
    with tempfile.TemporaryDirectory() as folder, network(servers) as net:
        try:
            yield Laboratory(net, name, Path(folder))
        finally:
            detach(name)


def wait(
    region: SharedMemoryRegion, condition: Callable[[ObservationBuffer], Any], what: str
) -> tuple[ObservationBuffer, int]:
    """The first observation from now on that fulfils a condition, and how many did not."""
    until, count = time.monotonic() + PATIENCE, 0
    while not condition(seen := newest(region)):
        count += 1
        if time.monotonic() > until:
            raise DriverError(f"waited in vain for {what}")
    return seen, count


def servers_come_and_go(pause: float = 0.5, lanes: int = 64, held: int = 200) -> list[Row]:
    """Drain, add, remove and kill servers under load.

    Args:
        pause: seconds between changes.
        lanes: connections at the same time that come and go.
        held: connections that last.
    """
    rows: list[Row] = []
    with laboratory(5) as lab:
        net, name = lab.net, lab.name
        processes = {server: net.serve(server) for server in net.servers}
        with (
            driver(net, "--config", lab.config(net.servers[:4])),
            SharedMemoryRegion.attach(name) as region,
            lab.load("held", connections=held, lanes=held, lines=1 << 20, pause=0.1, sources=None) as end_held,
        ):
            wait(region, lambda seen: seen.stats[:, 0].sum() == held and seen.active[:4].all(), "connections")
            with lab.load("load", lanes=lanes, pause=0.01, sources=net.sources(ipv6=False)) as end:
                time.sleep(pause)
                changed: dict[str, int] = {}

                def change(op: str, server: str, **keys: Any) -> None:
                    control(name, {"op": op, "server": server, **keys})
                    changed[op] = time.monotonic_ns()
                    active = op == "add"
                    _, late = wait(region, lambda seen: seen.active[net.servers.index(server)] == active, op)
                    rows.append((f"{op}: observations with the old mask", late, "0"))
                    time.sleep(pause)

                change("drain", "server-0")
                change("add", "server-4", address="10.77.2.5", port=PORT, weight=1.0)
                change("remove", "server-1")
                killed = time.monotonic_ns()
                processes["server-2"].kill()
                seen, _ = wait(region, lambda seen: not seen.active[2], "the health check")
                changed["kill"] = seen.published_at
                rows.append(("kill: seconds until the health check has it out", (seen.published_at - killed) / 1e9, ""))
                time.sleep(pause)
                before = newest(region)
                time.sleep(pause)
                placed = newest(region).counters[:5, 0].astype(int) - before.counters[:5, 0].astype(int)
                connections, told = end()
            held_rows, held_told = end_held()
            seen, _ = wait(region, lambda seen: not seen.stats[:, 0].any(), "the end of all flows")
            rows.append(("open flows in the end", float(seen.stats[:, 0].sum()), "0"))
        begun, server = connections[:, 1], connections[:, 3]
        for op, row in (("drain", 0), ("remove", 1), ("kill", 2)):
            late = int(((server == row) & (begun > changed[op])).sum())
            rows.append((f"{op}: connections begun there afterwards", late, "0"))
        rows.append(("add: connections begun there afterwards", int((server == 4).sum()), "above 0"))
        rows.append(("flows placed in the end at servers that are out", int(placed[:3].sum()), "0"))
        failed = (server < 0) & ((begun > changed["kill"]) | (connections[:, 2] < killed - 10**9))
        rows.append(("connections in all", len(connections), ""))
        rows.append(("failed, of the server killed before the health check had it out", int((server < 0).sum()), ""))
        rows.append(("failed, others", int(failed.sum()), "0"))
        others = [problem for problem in held_told["failed"] if not problem.startswith("server-2")]
        rows.append(("held connections of other servers that failed", len(others), "0"))
        rows.append(("connections that moved", told["moved"] + held_told["moved"], "0"))
        assert len(held_rows) == held
    return rows


def agent_is_killed(lanes: int = 32) -> list[Row]:
    """Kill the agent under load."""
    with laboratory(2) as lab:
        for server in lab.net.servers:
            lab.net.serve(server)
        with (
            driver(lab.net, "--config", lab.config(lab.net.servers, rule="wcmp")),
            SharedMemoryRegion.attach(lab.name) as region,
            lab.load("load", lanes=lanes, pause=0.01, sources=lab.net.sources(ipv6=False)) as end,
        ):
            agent = os.fork()
            if not agent:
                with SharedMemoryRegion.attach(lab.name) as mine:
                    number = 0
                    while True:
                        number += 1
                        mine.write_action(sequence_id=number, weights=[1.0, 9.0], lease=LEASE)
                        time.sleep(LEASE / 10)
            try:
                wait(region, lambda seen: not seen.safe, "the agent")
                time.sleep(LEASE)
                os.kill(agent, signal.SIGKILL)
                killed = time.monotonic_ns()
            finally:
                os.kill(agent, signal.SIGKILL)
                os.waitpid(agent, 0)
            seen, _ = wait(region, lambda seen: seen.safe, "the safe weights")
            safe = (seen.published_at - killed) / 1e9
            before = seen.counters[:2, 0].astype(int)
            time.sleep(LEASE)
            placed = newest(region).counters[:2, 0].astype(int) - before
            connections, told = end()
    share = placed[0] / max(1, placed.sum())
    return [
        ("agent killed: seconds until the safe weights are in force", safe, ""),
        ("agent killed: standard deviations of the split afterwards", abs(share - 0.5) * 2 * placed.sum() ** 0.5,
         "at most 5"),
        ("agent killed: connections", len(connections), "above 0"),
        ("agent killed: failed or moved", len(told["failed"]) + told["moved"], "0"),
    ]  # fmt: skip


def driver_is_killed(gap: float = 2.0, lanes: int = 32) -> list[Row]:
    """Kill the driver under load, and start it again after ``gap`` seconds."""
    with laboratory(2) as lab:
        for server in lab.net.servers:
            lab.net.serve(server)
        file = lab.config(lab.net.servers, orphan_timeout=gap / 4)
        with ExitStack() as clients:
            with driver(lab.net, "--config", file) as process, SharedMemoryRegion.attach(lab.name) as region:
                end_held = clients.enter_context(lab.load("held", connections=50, lanes=50, lines=1 << 20, pause=0.1))
                end = clients.enter_context(
                    lab.load("load", lanes=lanes, pause=0.01, sources=lab.net.sources(ipv6=False)[1:])
                )
                wait(region, lambda seen: seen.counters[:, 0].sum() > 100, "connections")
                time.sleep(gap / 2)
                last = int(newest(region).counters[:, 0].sum())
                process.kill()
                process.wait()
            time.sleep(gap)
            plane = XdpPlane.take_over(default_pin_folder(lab.name))
            meanwhile = int(plane.shared["counters"]["started"].sum())
            orphaned = int(plane.shared["totals"]["orphaned"])
            plane.close()
            with driver(lab.net, "--config", file), SharedMemoryRegion.attach(lab.name) as region:
                first = int(newest(region).counters[:, 0].sum())
                time.sleep(gap / 2)
                connections, told = end()
                _, held = end_held()
                seen, _ = wait(region, lambda seen: not seen.stats[:, 0].any(), "the end of all flows")
                started = int(seen.counters[:, 0].sum())
    return [
        ("driver killed: flows placed without it", meanwhile - last, "above 0"),
        ("driver killed: of them by the configured weights, after the timeout", orphaned, "above 0"),
        ("driver killed: counts that the next one lacks", max(0, meanwhile - first), "0"),
        ("driver killed: connections less flows counted", len(connections) + 50 - started, "0"),
        ("driver killed: failed or moved", sum(len(one["failed"]) + one["moved"] for one in (told, held)), "0"),
    ]


def maglev_moves_few(connections: int = 4_000, servers: int = 8) -> list[Row]:
    """Drain one of ``servers`` while the same clients connect again."""
    with laboratory(servers) as lab:
        for server in lab.net.servers:
            lab.net.serve(server)
        keys = {"lanes": 64, "lines": 1, "first_port": 10_000, "reset": True, "connections": connections}

        def placed(label: str) -> NDArray[np.int64]:
            with lab.load(label, ends=True, **keys) as end:
                until = time.monotonic() + PATIENCE
                while newest(region).stats[:, 0].any() or newest(region).fct_count < seen[0] + connections:
                    if time.monotonic() > until:
                        raise DriverError("the connections do not end")
                seen[0] += connections
                rows, told = end()
                if told["failed"]:
                    raise DriverError(f"{len(told['failed'])} connections failed: {told['failed'][0]}")
            return rows[np.argsort(rows[:, 0]), 3]

        file = lab.config(lab.net.servers, rule="maglev", close_timeout=0.5)
        with driver(lab.net, "--config", file), SharedMemoryRegion.attach(lab.name) as region:
            seen = [0]
            wait(region, lambda seen: seen.active[:servers].all(), "servers")
            before = placed("before")
            control(lab.name, {"op": "drain", "server": f"server-{servers - 1}"})
            after = placed("after")
            control(lab.name, {"op": "undrain", "server": f"server-{servers - 1}"})
            again = placed("again")
    stays = before != servers - 1
    every = np.arange(servers, dtype=np.uint32)
    table, less = maglev_table(np.ones(servers), every), maglev_table(np.ones(servers), every[:-1])
    kept = table != servers - 1
    expected = float((table != less)[kept].mean())
    moved, count = int((before != after)[stays].sum()), int(stays.sum())
    z = abs(moved - count * expected) / max(1.0, (count * expected * (1 - expected)) ** 0.5)
    return [
        (f"maglev: share at the server that leaves, of {servers}", float((~stays).mean()), ""),
        ("maglev: share of the others that its table moves", expected, ""),
        ("maglev: share of the others that moved", moved / count, ""),
        ("maglev: standard deviations between the two", z, "at most 5"),
        ("maglev: connections that are elsewhere when it is back", int((before != again).sum()), "0"),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser(__doc__.splitlines()[0])
    given = options.parse_args(arguments)
    if given.quick:
        rows = [*servers_come_and_go(0.2, 16, 40), *agent_is_killed(8), *driver_is_killed(1.0, 8)]
        rows += maglev_moves_few(500)
    else:
        rows = [*servers_come_and_go(2.0), *agent_is_killed(), *driver_is_killed(), *maglev_moves_few(20_000)]
    text = markdown(rows, ("what", "measured", "must be"))
    reached = check(rows)
    report("xdp_changes", given, text, {"rows": rows, "reached": reached})
    return 0 if reached or given.quick else 1


if __name__ == "__main__":
    run_if_possible(main)
