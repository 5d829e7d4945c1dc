"""Connections through HAProxy while weights move: ``python -m benchmarks.haproxy_connections``.

50,000 connections over 8 servers by roundrobin, random weights every 250 ms by the driver: none may fail, and each
server's share of new connections must be within 3 standard deviations of that by the rounded weights (binomial:
roundrobin itself spreads less). Then ten reloads under load: none may fail, and the driver's first look at a new
process must bring the weights back.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import closing
from signal import SIGUSR2
from typing import Any

from benchmarks.common import parser
from benchmarks.proxy_connections import INTERVAL, NAMES, Run, conclude, moving
from lbgym.drivers.haproxy import HaproxyBackend, HaproxyOptions, open_backends
from tests.drivers.haproxy.balancer import Balancer, missing
from tests.drivers.proxies import Servers


def reloading(run: Run, balancer: Balancer, source: HaproxyBackend, connections: int, reloads: int) -> dict[str, Any]:
    """Reloads under load; weights stay as they are."""
    wanted = run.move()
    # However fast it is, the load lasts until the last reload.
    process = run.loaded(connections, endless=True)
    began = time.monotonic()
    looks: list[int] = []
    while len(looks) < reloads:
        before = source.process
        assert balancer.master is not None
        balancer.master.send_signal(SIGUSR2)
        # Until the driver has seen the new process: how many looks until its weights are those wanted?
        while source.process == before:
            time.sleep(INTERVAL)
            run.look()
        looks.append(run.await_weights(wanted))
        time.sleep(INTERVAL)
        run.look()
    served, failed = run.enough(process)
    return {
        "phase": "reloads", "connections": served + failed, "failed": failed, "seconds": time.monotonic() - began,
        "reloads under load": len(looks), "further looks until weights are back": max(looks),
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
            rows = [moving(run, many), reloading(run, balancer, source, more, reloads)]
            lost = source.lost_lines
    finally:
        balancer.close()
        servers.close()
    for row in rows:
        row["log lines lost"] = lost
    return conclude("haproxy_connections", given, rows)


if __name__ == "__main__":
    sys.exit(main())
