"""TCP connections through VPP while weights change: ``python -m benchmarks.vpp_connections``, as root.

As ``benchmarks.xdp_connections``, through the plugin of ``plugins/vpp``: in each mode and IP version, with one
worker and with two. VPP_PREFIX is where VPP is installed.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.common import parser, run_if_possible
from benchmarks.xdp_connections import UNUSUAL, WEIGHTS, Outcome, conclude, watch
from lbgym.drivers import DriverError
from lbgym.sharedmemory import SharedMemoryRegion, seqlock
from tests.vpp.vpp import balanced, missing

MODES = ("dsr", "gre", "ipip", "nat")


def measure(mode: str, *, ipv6: bool, connections: int, workers: int) -> Outcome:
    """Open ``connections``; raises DriverError if something is missing."""
    if reason := missing():
        raise DriverError(reason)
    name = f"vpp-connections-{os.getpid()}"
    seqlock.warm_up()
    with (
        tempfile.TemporaryDirectory() as folder,
        balanced(Path(folder), mode, len(WEIGHTS), workers=workers, queues=max(1, workers)) as (net, vpp),
    ):
        vpp.vip(name, mode, ipv6=ipv6, words="rule wcmp")

        def totals() -> Mapping[str, int]:
            (found,) = vpp.api.lbgym_vip_dump(name=name)
            return {key: getattr(found, key) for key in UNUSUAL}

        with SharedMemoryRegion.attach(name) as region:
            if not region.wait_observation(0, 20.0):
                raise DriverError("VPP publishes nothing")
            shown = f"{mode}, {workers} worker{'s' if workers != 1 else ''}"
            return watch(net, region, shown, totals, ipv6=ipv6, connections=connections)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--connections", type=int, default=None, help="in each mode and IP version (50,000)")
    options.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="threads beside the main one")
    options.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    given = options.parse_args(arguments)
    count = given.connections or (2_000 if given.quick else 50_000)
    outcomes = []
    for workers in given.workers:
        for mode in given.modes:
            for ipv6 in (False, True):
                outcomes.append(measure(mode, ipv6=ipv6, connections=count, workers=workers))
                print(f"{outcomes[-1]}", file=sys.stderr)
    return conclude("vpp_connections", given, outcomes)


if __name__ == "__main__":
    run_if_possible(main)
