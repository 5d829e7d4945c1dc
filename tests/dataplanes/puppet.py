"""A data plane in a process of its own that does as it is told: ``python -m tests.dataplanes.puppet NAME ...``.

It publishes one recognisable observation per period: tick k has features ``(k % 1000) + server / 64``, so that a reader
can tell what it has. Commands come as lines of JSON on standard input and are answered by a line each.
"""

from __future__ import annotations

import argparse
import atexit
import json
import select
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np

from lbgym.features import FEATURE_NAMES, GROUND_TRUTH_NAMES
from lbgym.sharedmemory import Publication, SharedMemoryRegion, seqlock
from lbgym.snapshot import Snapshot
from tests.forked import Process, Template

ALL_FEATURES = (*FEATURE_NAMES, *GROUND_TRUTH_NAMES)
#: The data plane's clock at tick 0, seconds.
START = 100.0


def features(tick: int, num_servers: int) -> np.ndarray:
    """float32[num_servers, 11] of a tick."""
    rows = tick % 1000 + np.arange(num_servers) / 64
    return np.repeat(rows[:, None], 11, axis=1).astype(np.float32)


def snapshot(tick: int, timestamp: float, active: np.ndarray, ground_truth: bool) -> Snapshot:
    n = len(active)
    counts = np.full(n, tick, np.int64)
    truth = np.full((n, 3), 0.5, np.float32) if ground_truth else None
    return Snapshot(0, timestamp, active, features(tick, n), truth, 2 * counts, counts, counts * 0, counts * 0, 0, None)


class _Puppet:
    def __init__(self, options: argparse.Namespace) -> None:
        self.period = options.period
        self.ground_truth = options.ground_truth
        self.active = np.ones(options.servers, np.bool_)
        self.region = SharedMemoryRegion.create(
            options.name, num_servers=options.servers, capacity=options.capacity, publish_interval=options.period,
            clock_rate=options.rate, safe_weights=np.arange(1, options.servers + 1), driver="puppet",
            features=options.features,
        )  # fmt: skip
        self.rate = options.rate
        self.offset = START
        self.tick = 0
        self.silent_until = 0.0
        self.begin = time.monotonic()

    def publish(self) -> None:
        self.tick += 1
        self.region.weights_in_force()
        timestamp = self.tick * self.period + self.offset
        shown = snapshot(self.tick, timestamp, self.active, self.ground_truth)
        self.region.publish(Publication.of(shown, fct_count=2 * self.tick, fct_sum=0.5 * self.tick))

    def command(self, words: dict[str, Any]) -> Any:
        match words:
            case {"silence": seconds}:
                self.silent_until = time.monotonic() + seconds
            case {"jump": seconds}:
                self.offset += seconds
            case {"sequence": number}:
                self.region._sequence_id = number
            case {"active": flags}:
                self.active = np.array(flags, np.bool_)
            case {"weights": _}:
                return self.region.weights_in_force().tolist()
            case {"poison": _}:
                self.region._buffer.stats[0, 0] = np.nan
                seqlock.publish_frame(
                    self.region._words, self.region._frames, self.region._frame_sections, self.region._buffer.words,
                    self.region._sequence_id + 1, time.monotonic_ns(),
                )  # fmt: skip
                self.region._sequence_id += 1
            case {"close": _}:
                self.region.unlink()
                self.region.close()
                print("true", flush=True)
                sys.exit(0)
        return True

    def run(self) -> None:
        while True:
            due = self.begin + (self.tick + 1) * self.period / self.rate
            while (left := due - time.monotonic()) > 0:
                ready, _, _ = select.select([sys.stdin], [], [], min(left, 0.001))
                if ready:
                    line = sys.stdin.readline()
                    if not line:
                        return
                    print(json.dumps(self.command(json.loads(line))), flush=True)
                self.region.weights_in_force()
            if time.monotonic() < self.silent_until:
                # The clock goes on, only nothing is published.
                self.tick += 1
                continue
            self.publish()


class Puppet:
    """The test's end of the strings."""

    def __init__(self, process: Process) -> None:
        self.process = process

    def tell(self, **words: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def puppet(
    name: str,
    *,
    servers: int = 4,
    period: float = 0.02,
    rate: float = 1.0,
    capacity: int | None = None,
    ground_truth: bool = True,
) -> Iterator[Puppet]:
    """A puppet that has published its first observation; killed in the end."""
    command = ["-m", "tests.dataplanes.puppet", name, f"--servers={servers}", f"--period={period}"]
    command += [f"--rate={rate}"] + ([f"--capacity={capacity}"] if capacity else [])
    command += ["--ground-truth"] if ground_truth else []
    process = _template().start(command)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield Puppet(process)
    finally:
        process.send_signal(signal.SIGCONT)
        process.close()


@cache
def _template() -> Template:
    template = Template(["numpy"], "from lbgym.sharedmemory import seqlock; seqlock.warm_up()")
    atexit.register(template.close)
    return template


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("--servers", type=int, default=4)
    parser.add_argument("--capacity", type=int)
    parser.add_argument("--period", type=float, default=0.02)
    parser.add_argument("--rate", type=float, default=1.0)
    parser.add_argument("--ground-truth", action="store_true")
    parser.set_defaults(features=ALL_FEATURES)
    seqlock.warm_up()
    one = _Puppet(parser.parse_args())
    one.publish()
    print("ready", flush=True)
    one.run()


if __name__ == "__main__":
    main()
