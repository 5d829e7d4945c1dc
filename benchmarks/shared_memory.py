"""The live bridge: cost of reading and writing, promptness, drift: ``python -m benchmarks.shared_memory``.

Costs are those of one process with nobody else in the region; promptness is measured against the emulator in a process
of its own. The machine should do nothing else.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import which
from typing import Any

import numpy as np

import lbgym
from benchmarks.common import markdown, parser, report
from lbgym.sharedmemory import Publication, SharedMemoryRegion, get_include
from lbgym.snapshot import Snapshot

SERVERS = 64


def microseconds(call: Callable[[], Any], repeat: int, number: int = 200) -> float:
    """The median over ``repeat`` runs of ``number`` calls, per call."""
    times = []
    for _ in range(repeat):
        begin = time.perf_counter_ns()
        for _ in range(number):
            call()
        times.append((time.perf_counter_ns() - begin) / number)
    return float(np.median(times)) / 1000


def snapshot(servers: int) -> Snapshot:
    generator = np.random.default_rng(0)
    counts = np.arange(servers, dtype=np.int64)
    return Snapshot(
        sequence_id=0,
        timestamp=1.0,
        active=np.ones(servers, np.bool_),
        stats=generator.random((servers, 11), np.float32),
        ground_truth=generator.random((servers, 3), np.float32),
        started=counts,
        completed=counts,
        rejected=counts,
        failed=counts,
        unrouted=0,
        service=None,
    )


def costs(servers: int, repeat: int) -> dict[str, float]:
    """Microseconds per call, and those of a bare copy of as many bytes as an observation has."""
    shown, weights = snapshot(servers), np.random.default_rng(1).uniform(0.1, 10.0, servers)
    with SharedMemoryRegion.create(f"bench-{os.getpid()}", num_servers=servers) as producer:
        producer.publish(Publication.of(shown))
        agent = SharedMemoryRegion.attach(producer.name)
        buffer = agent.new_buffer()
        agent.write_action(sequence_id=1, weights=weights)
        source, target = np.zeros_like(buffer.words), np.zeros_like(buffer.words)
        result = {
            "bare copy": microseconds(lambda: np.copyto(target, source), repeat),
            "read_into": microseconds(lambda: agent.read_into(buffer), repeat),
            "read_observation": microseconds(agent.read_observation, repeat),
            "write_action": microseconds(lambda: agent.write_action(sequence_id=1, weights=weights), repeat),
            "publish": microseconds(lambda: producer.publish(Publication.of(shown)), repeat),
            "weights_in_force": microseconds(producer.weights_in_force, repeat),
        }
        agent.close()
    return result


@contextmanager
def emulator(name: str, interval: float) -> Iterator[None]:
    """The emulator in a process of its own, in real time, publishing every ``interval`` seconds."""
    command = [sys.executable, "-m", "lbgym", "dataplane", "emulate", "--name", name, "--scenario", "heterogeneous"]
    process = subprocess.Popen([*command, "--interval", str(interval)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline()
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def wake_ups(name: str, count: int) -> np.ndarray:
    """Seconds from the publication of each of ``count`` observations to the waiting agent having read it."""
    agent = SharedMemoryRegion.attach(name)
    buffer = agent.new_buffer()
    agent.read_into(buffer)
    delays = []
    for _ in range(count):
        agent.wait_observation(buffer.sequence_id, 10.0)
        agent.read_into(buffer)
        delays.append(time.monotonic_ns() - buffer.published_at)
    agent.close()
    return np.array(delays) / 1e9


def steps(name: str, interval: float, count: int) -> dict[str, Any]:
    """Seconds that ``count`` steps took in all, beyond its interval each, and how many deadlines were missed."""
    env = lbgym.LoadBalanceEnv(shm_name=name, step_interval=interval, action_type="continuous", shm_timeout=10.0)
    action = np.ones(env.num_servers, np.float32)
    env.reset()
    env.step(action)
    missed, ends = 0, [time.perf_counter()]
    for _ in range(count):
        info = env.step(action)[-1]
        missed += info["missed_observations"]
        ends.append(time.perf_counter())
    env.close()
    return {"total": ends[-1] - ends[0], "beyond": np.diff(ends) - interval, "missed": missed}


def c_publish(repeat: int) -> float | None:
    """Microseconds per publication of 64 servers by a C producer, best of the runs; None without a compiler."""
    compiler = which("cc")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "publish"
        source = Path(__file__).parent / "publish.c"
        subprocess.run([compiler, "-O2", "-std=c11", f"-I{get_include()}", source, "-o", program], check=True)
        runs = [subprocess.run([program, str(SERVERS)], check=True, capture_output=True) for _ in range(repeat)]
    return min(float(run.stdout) for run in runs) / 1000


def main() -> int:
    """Measure, print, and say by the exit code whether every target was reached."""
    options = parser(__doc__.splitlines()[0]).parse_args()
    repeat = 5 if options.quick else 51
    count = 100 if options.quick else 1000
    rows, data = [], {}
    for servers in (8, SERVERS, 1024):
        data[servers] = costs(servers, repeat)
        rows.append([servers, *data[servers].values()])
    table = markdown(rows, ["servers: microseconds per call", *data[SERVERS]])
    published_in_c = c_publish(3 if options.quick else 11)

    interval, name = 0.02, f"bench-{os.getpid()}"
    with emulator(name, interval):
        wakes = wake_ups(name, count)
        stepped = steps(name, interval, count)
    of = data[SERVERS]
    quantiles = markdown(
        [
            [what, *(1e6 * np.percentile(values, [50, 90, 99, 100]))]
            for what, values in (
                ("publication to agent awake with the observation", wakes),
                ("env.step beyond its interval", stepped["beyond"]),
            )
        ],
        ["microseconds", "median", "p90", "p99", "largest"],
    )
    drift = abs(stepped["total"] / (count * interval) - 1.0)
    targets = [
        ("read_into, us: 4 bare copies + 2", 4 * of["bare copy"] + 2, of["read_into"]),
        ("read_observation, us", 60.0, of["read_observation"]),
        ("write_action with alias table, us", 15.0, of["write_action"]),
        ("C publish, us", 1.0, published_in_c),
        ("publication to agent awake, p99, ms", 1.0, 1e3 * float(np.percentile(wakes, 99))),
        ("env.step beyond its interval, p99, ms", 2.0, 1e3 * float(np.percentile(stepped["beyond"], 99))),
        (f"{count} steps of 20 ms, deviation of the total, %", 0.1, 100 * drift),
    ]
    reached = [measured is None or measured <= limit for _, limit, measured in targets]
    verdict = markdown(
        [[*target, good] for target, good in zip(targets, reached, strict=True)],
        ["64 servers", "at most", "measured", "reached"],
    )
    text = f"{table}\n\n{quantiles}\n\n{verdict}\n\ndeadlines missed: {stepped['missed']} of {count}"
    measured = {"costs": data, "c_publish": published_in_c, "wakes": wakes, "steps": stepped}
    report("shared_memory", options, text, measured | {"targets": targets, "reached": all(reached)})
    return 0 if all(reached) or options.quick else 1


if __name__ == "__main__":
    sys.exit(main())
