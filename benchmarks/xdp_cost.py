"""Cost of a packet in the XDP balancer: ``python -m benchmarks.xdp_cost``, as root.

By BPF_PROG_TEST_RUN, on one core, without a network: ns per packet, and as a ratio to what every balancer must do at
least (parse, find the VIP, write the MAC addresses, send). All of a round follow each other; ratios are medians over
rounds.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median

import numpy as np

from benchmarks.common import markdown, parser, report
from lbgym.drivers import DriverError
from lbgym.drivers.xdp import build_object, libbpf
from lbgym.drivers.xdp.plane import Sizes, XdpPlane
from tests.drivers.xdp.packets import ACK, SYN, VIP4, install, tcp4

#: Servers of the index table, entries of the flow table, and flows that begin before all are forgotten again.
SERVERS, FLOWS, BATCH = 64, 1 << 18, 4_000
#: Times the bare packet that each may take.
LIMITS = {"existing flow": 3.5, "with sampling": 4.5, "new flow, alias table": 25.0, "new flow, index of 64": 32.0}
#: Instructions that the verifier may look at, by clang 14 of Debian 12.
LIMIT_VERIFIED = 60_000


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser(__doc__.splitlines()[0])
    given = options.parse_args(arguments)
    rounds, hot, batches = (3, 20_000, 5) if given.quick else (9, 500_000, 50)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    sizes = Sizes(SERVERS, FLOWS, FLOWS)
    plane = XdpPlane.load(sizes, build_object(benchmark=True), ("bounce", "fresh"))
    plane.set_vips([VIP4])
    plane.keep_alive(86_400.0)
    established, syn = tcp4(0x0B000001, 4000, VIP4, ACK, 2), tcp4(0x0B000001, 4000, VIP4, SYN, 1)

    def runs(program: str, packet: bytes, repeat: int) -> float:
        run = libbpf.PacketRun(plane.program(program))
        code, _ = run(packet, repeat)
        assert code == 3, code
        return run.duration

    def known(sampling: float) -> float:
        plane.set_sampling(sampling, sampling)
        runs("balancer", syn, 1)
        runs("balancer", established, 1)
        return runs("balancer", established, hot)

    def new(rule: str) -> float:
        plane.set_sampling(0.0, 0.0)
        install(plane, rule, np.random.default_rng(0).uniform(0.5, 4.0, SERVERS))
        took = 0.0
        for _ in range(batches):
            # Servers hold some 60 flows each at the end of a batch, as real ones may.
            plane.collect(syn_timeout=0, idle_timeout=0, close_timeout=0, now=time.monotonic_ns() + 10**12)
            assert plane.flow_count() == 0
            took += runs("fresh", syn, BATCH)
            assert plane.flow_count() == BATCH
        return took / batches

    measured: dict[str, Callable[[], float]] = {
        "bare packet": lambda: runs("bounce", established, hot),
        "existing flow": lambda: known(0.0),
        "with sampling": lambda: known(1 / 64),
        "new flow, alias table": lambda: new("wcmp"),
        "new flow, index of 64": lambda: new("sed"),
    }
    install(plane, "wcmp", np.ones(SERVERS))
    times: dict[str, list[float]] = {name: [] for name in measured}
    for _ in range(rounds):
        for name, measure in measured.items():
            times[name].append(measure())
    verified = libbpf.program_info(plane.program())[1]
    plane.close()
    bare = times["bare packet"]
    ratios = {name: median(a / b for a, b in zip(took, bare, strict=True)) for name, took in times.items()}
    text = markdown(
        [(name, min(took), median(took), ratios[name], LIMITS.get(name)) for name, took in times.items()],
        ("ns per packet", "least", "median", "x bare packet", "at most"),
    )
    text += f"\n\n{verified:,} instructions verified (at most {LIMIT_VERIFIED:,})"
    reached = verified <= LIMIT_VERIFIED and all(ratios[name] <= limit for name, limit in LIMITS.items())
    data = {"ns_per_packet": times, "ratios": ratios, "limits": LIMITS, "verified_instructions": verified}
    report("xdp_cost", given, text, data | {"reached": reached})
    return 0 if reached or given.quick else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except DriverError as error:
        sys.exit(f"not measured: {error}")
