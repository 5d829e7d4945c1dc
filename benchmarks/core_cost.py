"""Cost of a packet in the balancer core: ``python -m benchmarks.core_cost``, beside the XDP program's as root.

ns per packet on one core of the machine, of bursts whose packets are in its cache; existing flows in random order, new
ones each of another client. The program in the kernel runs by BPF_PROG_TEST_RUN in the same rounds, with one packet
again and again, so that its existing flow is a single one. Ratios are medians over rounds.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import markdown, parser, report, run_if_possible
from lbgym.drivers import DriverError
from lbgym.drivers.afpacket.core import SEND, Packet, load_library
from lbgym.drivers.xdp import build_object, libbpf
from lbgym.drivers.xdp.plane import Sizes, Vip, XdpPlane
from tests.drivers.xdp.packets import install, tcp4
from tests.plugins.packets import ACK, CLIENT, PORT, SYN, VIP4, Bench, packet4, servers

#: Packets per call, and packets per measurement.
BURST, PACKETS = 256, 16_384
#: Packets of a round that begin flows, before all are forgotten again.
BATCH = 4_000
SERVERS = (4, 64, 1024)
FLOWS = (1, 1_000, 10_000, 100_000, 1_000_000)
#: Times an existing flow of the core that each may take, and times the XDP program.
LIMIT_XDP = 2.0
LIMIT_FLOWS = 25.0


class Burst:
    """Packets from changing clients, through a core."""

    def __init__(self, bench: Bench, flags: int) -> None:
        self._bench = bench
        self._frames = np.tile(np.frombuffer(packet4(CLIENT, 4000, flags), np.uint8), (PACKETS, 1))
        self._packets = (Packet * PACKETS)()
        for i, packet in enumerate(self._packets):
            packet.data, packet.length = self._frames.ctypes.data + 40 * i, 40
        self._run = bench.core.library.lbgym_worker_run
        self._worker = bench.core.worker()

    def cost(self, clients: NDArray[np.uint32]) -> float:
        """Ns per packet of these clients."""
        n = len(clients)
        self._frames[:n, 12:16] = clients.astype(">u4").view(np.uint8).reshape(n, 4)
        took = 0
        for first in range(0, n, BURST):
            at = ctypes.byref(self._packets, first * ctypes.sizeof(Packet))
            count = min(BURST, n - first)
            begun = time.perf_counter_ns()
            self._run(self._worker, at, count, self._bench.now)
            took += time.perf_counter_ns() - begun
            assert self._packets[first].verdict == SEND
        return took / n


def existing(library: ctypes.CDLL, flows: int) -> Callable[[], float]:
    """Measures packets of so many flows, in random order."""
    bench = Bench(library, flows=max(2 * flows, 1024), syn_flows=max(2 * flows, 1024), duration_sampling=1 / 64)
    bench.core.install("wcmp", servers(np.ones(64)))
    syn, ack = Burst(bench, SYN), Burst(bench, ACK)
    clients = (CLIENT + np.arange(flows)).astype(np.uint32)
    for burst in (syn, ack):
        for first in range(0, flows, PACKETS):
            burst.cost(clients[first : first + PACKETS])
    rng = np.random.default_rng(0)
    return lambda: ack.cost(rng.choice(clients, PACKETS))


def new(library: ctypes.CDLL, rule: str, count: int) -> Callable[[], float]:
    """Measures packets that each begin a flow."""
    bench = Bench(library, servers=max(count, 64), flows=1 << 18, syn_flows=1 << 18)
    bench.core.install(rule, servers(np.random.default_rng(0).uniform(0.5, 4.0, count)))
    syn = Burst(bench, SYN)
    state = {"next": 1 << 24}

    def measure() -> float:
        bench.forget_all()
        begun = state["next"]
        state["next"] += BATCH
        return syn.cost(np.arange(begun, begun + BATCH, dtype=np.uint32))

    return measure


class Kernel:
    """The same by the XDP program."""

    def __init__(self) -> None:
        self.plane = XdpPlane.load(Sizes(max(SERVERS), 1 << 18, 1 << 18), build_object(benchmark=True), ("fresh",))
        self.vip = Vip(VIP4, PORT)
        self.plane.set_vips([self.vip])
        self.plane.keep_alive(86_400.0)

    def _run(self, program: str, packet: bytes, repeat: int) -> float:
        run = libbpf.PacketRun(self.plane.program(program))
        code, _ = run(packet, repeat)
        assert code == 3, code
        return run.duration

    def existing(self) -> float:
        install(self.plane, "wcmp", np.ones(64))
        self.plane.set_sampling(1 / 64, 1 / 64)
        self._run("balancer", tcp4(CLIENT, 4000, self.vip, SYN, 1), 1)
        established = tcp4(CLIENT, 4000, self.vip, ACK, 2)
        self._run("balancer", established, 1)
        return self._run("balancer", established, 20_000)

    def new(self, rule: str, count: int) -> Callable[[], float]:
        def measure() -> float:
            self.plane.set_sampling(0.0, 0.0)
            install(self.plane, rule, np.random.default_rng(0).uniform(0.5, 4.0, count))
            self.plane.collect(syn_timeout=0, idle_timeout=0, close_timeout=0, now=time.monotonic_ns() + 10**12)
            return self._run("fresh", tcp4(CLIENT, 4000, self.vip, SYN, 1), BATCH)

        return measure


def main(arguments: Sequence[str] | None = None) -> int:
    given = parser(__doc__.splitlines()[0]).parse_args(arguments)
    rounds = 3 if given.quick else 9
    counts, flows = (SERVERS[:2], FLOWS[:3]) if given.quick else (SERVERS, FLOWS)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    library = load_library()
    try:
        kernel: Kernel | None = Kernel()
        absent = ""
    except DriverError as error:
        kernel, absent = None, f"\n\nwithout the XDP program: {error}"
    rows: dict[str, tuple[Callable[[], float], Callable[[], float] | None]] = {}
    for number in flows:
        label = "existing flow, hot" if number == 1 else f"existing flow of {number:,}"
        rows[label] = existing(library, number), kernel.existing if kernel is not None and number == 1 else None
    for rule, what in (("wcmp", "alias table"), ("sed", "index")):
        for count in counts:
            by_kernel = kernel.new(rule, count) if kernel is not None else None
            rows[f"new flow, {what} of {count}"] = new(library, rule, count), by_kernel
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in rows}
    for _ in range(rounds):
        for name, measures in rows.items():
            for measure, took in zip(measures, times[name], strict=True):
                if measure is not None:
                    took.append(measure())
    hot = times["existing flow, hot"][0]
    table: list[tuple[Any, ...]] = []
    reached = True
    for name, (ours, theirs) in times.items():
        to_hot = median(a / b for a, b in zip(ours, hot, strict=True))
        to_kernel = median(a / b for a, b in zip(ours, theirs, strict=True)) if theirs else None
        reached = reached and (to_kernel is None or to_kernel <= LIMIT_XDP)
        reached = reached and (not name.startswith("existing") or to_hot <= LIMIT_FLOWS)
        table.append((name, min(ours), median(ours), to_hot, median(theirs) if theirs else None, to_kernel))
    head = ("ns per packet", "least", "median", "x hot flow", "XDP, median", "x XDP")
    text = markdown(table, head) + absent
    text += f"\n\nat most {LIMIT_XDP:g} times the XDP program, existing flows at most {LIMIT_FLOWS:g} times a hot one"
    report("core_cost", given, text, {"ns_per_packet": times, "reached": reached})
    return 0 if reached or given.quick else 1


if __name__ == "__main__":
    run_if_possible(main)
