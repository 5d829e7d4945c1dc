"""Connections through Envoy while weights move: ``python -m benchmarks.envoy_connections``.

50,000 connections over 8 servers by ROUND_ROBIN, random weights every 250 ms by the driver, through a watched file and
by xDS: none may fail, and each server's share of new connections must be within 3 standard deviations of that by the
rounded weights (binomial: round robin itself spreads less). Then hot restarts under load: none may fail, and the
driver's first look at a new process must find the weights there.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import closing
from typing import Any

from benchmarks.common import parser
from benchmarks.proxy_connections import INTERVAL, NAMES, Run, conclude, moving
from lbgym.drivers.envoy import EnvoyCluster, EnvoyOptions, open_clusters
from tests.drivers.envoy.balancer import Balancer, missing
from tests.drivers.proxies import Servers


def restarting(run: Run, balancer: Balancer, source: EnvoyCluster, connections: int, restarts: int) -> dict[str, Any]:
    """Hot restarts under load; weights stay as they are."""
    wanted = run.move()
    # However fast it is, the load lasts until the last restart.
    process = run.loaded(connections, endless=True)
    began = time.monotonic()
    looks: list[int] = []
    while len(looks) < restarts:
        balancer.start("--drain-time-s", "1", "--parent-shutdown-time-s", "5")
        run.look()
        looks.append(run.await_weights(wanted))
        # The one before last must have gone, or the next has nobody to take over from.
        while source.processes > 1:
            time.sleep(INTERVAL)
            run.look()
    served, failed = run.enough(process)
    return {
        "phase": "hot restarts", "connections": served + failed, "failed": failed, "seconds": time.monotonic() - began,
        "restarts under load": len(looks), "further looks until weights are back": max(looks),
    }  # fmt: skip


def phases(source: str, connections: int, more: int, restarts: int, policy: str) -> list[dict[str, Any]]:
    servers = Servers(NAMES)
    balancer = Balancer(servers)
    try:
        balancer.configure({"web": NAMES}, source=source, log="grpc", cluster={"lb_policy": policy})
        balancer.start()
        port = str(balancer.driver_port)
        options = EnvoyOptions(
            clusters={"benchmark": "web"},
            files={"web": str(balancer.file())},
            admin=(balancer.admin,),
            xds=None if source == "file" else port,
            access_log=port,
        )
        (cluster,) = open_clusters(options).values()
        with closing(cluster):
            run = Run(balancer, cluster, seed=1)
            rows = [moving(run, connections)]
            if restarts:
                rows.append(restarting(run, balancer, cluster, more, restarts))
            lost = cluster.lost_lines
    finally:
        balancer.close()
        servers.close()
    return [{"by": f"{policy}, {source}", **row, "log entries lost": lost} for row in rows]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser(__doc__.splitlines()[0])
    given = options.parse_args(arguments)
    if missing():
        print(missing(), file=sys.stderr)
        return 2
    many, more, restarts = (2_000, 1_000, 1) if given.quick else (50_000, 20_000, 3)
    rows = phases("file", many, more, restarts, "ROUND_ROBIN") + phases("ads", many, 0, 0, "ROUND_ROBIN")
    return conclude("envoy_connections", given, rows)


if __name__ == "__main__":
    sys.exit(main())
