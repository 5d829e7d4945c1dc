"""Cost of a packet in the XDP balancer: ``python -m benchmarks.xdp_cost``, as root.

By BPF_PROG_TEST_RUN, on one core, without a network: ns per packet, and as a ratio to what every balancer must do at
least (parse, find the VIP, write the MAC addresses, send). All of a round follow each other; ratios are medians over
rounds. Then the same with live frames, which go through a veth pair to a program that drops them: sender, balancer and
sink share the machine, so the figures say how fast it all is together.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median

import numpy as np

from benchmarks.common import markdown, parser, report, run_if_possible
from lbgym.drivers.xdp import build_object, libbpf
from lbgym.drivers.xdp.plane import Sizes, XdpPlane
from lbgym.lab.namespaces import Network, inside
from tests.drivers.xdp.packets import ACK, SYN, VIP4, install, tcp4

#: Servers of the index table, entries of the flow table, and flows that begin before all are forgotten again.
SERVERS, FLOWS, BATCH = 64, 1 << 18, 4_000
#: Times the bare packet that each may take.
LIMITS = {"existing flow": 3.5, "with sampling": 4.5, "new flow, alias table": 25.0, "new flow, index of 64": 32.0}
#: Frames of a live run, which leave room in the flow table; of a batch; and the flag that makes a run one.
FRAMES, FRAME_BATCH, LIVE_FRAMES = 200_000, 64, 1 << 1
#: Instructions that the verifier may look at, by clang 14 of Debian 12.
LIMIT_VERIFIED = 60_000


@contextmanager
def veth_pair() -> Iterator[tuple[str, int, int]]:
    """A namespace with a veth pair, which the thread enters: its name, and the interfaces' numbers."""
    net = Network(f"lbc{os.getpid()}-")
    name = net.name("pair")
    net.ip("netns", "add", name)
    try:
        net.ip("link", "add", "v0", "type", "veth", "peer", "v1", part="pair")
        for device in ("v0", "v1"):
            net.ip("link", "set", device, "up", part="pair")
        with inside(name):
            yield name, socket.if_nametoindex("v0"), socket.if_nametoindex("v1")
    finally:
        net.remove()


def received(namespace: str) -> int:
    """Frames that have come to the far end of a pair."""
    shown = subprocess.run(
        ["ip", "-n", namespace, "-json", "-stats", "link", "show", "v1"], capture_output=True, text=True, check=True
    )
    return int(json.loads(shown.stdout)[0]["stats64"]["rx"]["packets"])


def send_live(program: int, packet: bytes, ifindex: int) -> float:
    """Have a program handle frames that come in by an interface, and send them; seconds that it took."""
    # struct xdp_md: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex.
    context = np.array([0, len(packet), 0, ifindex, 0, 0], np.uint32)
    data = ctypes.create_string_buffer(packet, len(packet))
    options = libbpf._RunOptions(
        sz=ctypes.sizeof(libbpf._RunOptions), data_in=ctypes.addressof(data), data_size_in=len(packet),
        ctx_in=context.ctypes.data, ctx_size_in=context.nbytes, repeat=FRAMES, flags=LIVE_FRAMES,
        batch_size=FRAME_BATCH,
    )  # fmt: skip
    begun = time.perf_counter()
    libbpf._checked(libbpf.library().bpf_prog_test_run_opts(program, ctypes.byref(options)), "live frames")
    return time.perf_counter() - begun


def live_frames(plane: XdpPlane, rounds: int) -> dict[str, tuple[list[float], float]]:
    """Million frames per second through a veth pair, by round, and the least share of them that arrived."""
    syn, established = tcp4(0x0B000001, 4000, VIP4, SYN, 1), tcp4(0x0B000001, 4000, VIP4, ACK, 2)
    found: dict[str, tuple[list[float], float]] = {}
    with veth_pair() as (namespace, near, far):
        link = libbpf.attach(plane.program("sink"), far, libbpf.DRIVER_MODE)
        for _ in range(rounds):
            for what, program, rule in (
                ("bare packet", "bounce", "wcmp"),
                ("existing flow", "balancer", "wcmp"),
                ("with sampling", "balancer", "wcmp"),
                ("new flow, alias table", "fresh", "wcmp"),
                ("new flow, index of 64", "fresh", "sed"),
            ):
                install(plane, rule, np.random.default_rng(0).uniform(0.5, 4.0, SERVERS))
                plane.shared["servers"]["ifindex"][:, :SERVERS] = near
                plane.set_sampling(*(2 * [1 / 64 if what == "with sampling" else 0.0]))
                plane.collect(syn_timeout=0, idle_timeout=0, close_timeout=0, now=time.monotonic_ns() + 10**12)
                if program == "balancer":
                    for packet in (syn, established):
                        libbpf.PacketRun(plane.program("balancer"))(packet)
                before = received(namespace)
                took = send_live(plane.program(program), established if program != "fresh" else syn, near)
                arrived = (received(namespace) - before) / FRAMES
                rates, least = found.get(what, ([], 1.0))
                found[what] = [*rates, FRAMES / took / 1e6], min(least, arrived)
        os.close(link)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser(__doc__.splitlines()[0])
    given = options.parse_args(arguments)
    rounds, hot, batches = (3, 20_000, 5) if given.quick else (9, 500_000, 50)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    sizes = Sizes(SERVERS, FLOWS, FLOWS)
    plane = XdpPlane.load(sizes, build_object(benchmark=True), ("bounce", "fresh", "sink"))
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

    def new(rule: str, held: int = 0) -> float:
        """Servers hold so many flows each, give or take a tenth, beside those that begin."""
        plane.set_sampling(0.0, 0.0)
        others = (held * np.random.default_rng(1).normal(1.0, 0.1, SERVERS)).astype(np.uint64)
        install(plane, rule, np.random.default_rng(0).uniform(0.5, 4.0, SERVERS))
        took = 0.0
        for _ in range(batches):
            # Servers hold some 60 flows each at the end of a batch, as real ones may.
            plane.collect(syn_timeout=0, idle_timeout=0, close_timeout=0, now=time.monotonic_ns() + 10**12)
            assert plane.flow_count() == 0
            plane.shared["open_flows"][:SERVERS] = others
            took += runs("fresh", syn, BATCH)
            assert plane.flow_count() == BATCH
        plane.collect(syn_timeout=0, idle_timeout=0, close_timeout=0, now=time.monotonic_ns() + 10**12)
        plane.shared["open_flows"][:SERVERS] = 0
        return took / batches

    measured: dict[str, Callable[[], float]] = {
        "bare packet": lambda: runs("bounce", established, hot),
        "existing flow": lambda: known(0.0),
        "with sampling": lambda: known(1 / 64),
        "new flow, alias table": lambda: new("wcmp"),
        "new flow, index of 64": lambda: new("sed"),
        "the same, 3,000 open flows each": lambda: new("sed", 3_000),
    }
    install(plane, "wcmp", np.ones(SERVERS))
    times: dict[str, list[float]] = {name: [] for name in measured}
    for _ in range(rounds):
        for name, measure in measured.items():
            times[name].append(measure())
    verified = libbpf.program_info(plane.program())[1]
    live = live_frames(plane, rounds)
    plane.close()
    bare = times["bare packet"]
    ratios = {name: median(a / b for a, b in zip(took, bare, strict=True)) for name, took in times.items()}
    text = markdown(
        [(name, min(took), median(took), ratios[name], LIMITS.get(name)) for name, took in times.items()],
        ("ns per packet", "least", "median", "x bare packet", "at most"),
    )
    text += "\n\n" + markdown(
        [(name, max(rates), median(rates), arrived) for name, (rates, arrived) in live.items()],
        ("live frames, millions per second", "most", "median", "arrived"),
    )
    text += f"\n\n{verified:,} instructions verified (at most {LIMIT_VERIFIED:,})"
    reached = verified <= LIMIT_VERIFIED and all(ratios[name] <= limit for name, limit in LIMITS.items())
    data = {"ns_per_packet": times, "ratios": ratios, "limits": LIMITS, "verified_instructions": verified, "live": live}
    report("xdp_cost", given, text, data | {"reached": reached})
    return 0 if reached or given.quick else 1


if __name__ == "__main__":
    run_if_possible(main)
