"""Torn reads, of which there must be none: ``python -m benchmarks.tearing``.

A writer in C at full speed, readers in C and in Python, which know from the sequence id what every byte must be: 10^8
copies of observations and actions. Without the check of the sequence lock, which is compiled out for that, the same
readers must find torn ones, or they would not see any. Needs a C compiler (``CC``, or cc, gcc or clang).
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import markdown, parser, report
from lbgym.errors import RegionBusyError, RegionFormatError
from lbgym.sharedmemory import Action, ObservationBuffer, SharedMemoryRegion, abi, get_include, seqlock
from lbgym.sharedmemory.system import DIRECTORY_VARIABLE

SOURCE = Path(__file__).parents[1] / "tests" / "sharedmemory" / "tearing.c"
OBSERVATIONS, ACTIONS = "observations", "actions"
#: Seconds for one reader.
LIMIT = 3600.0
#: Shares of the reads: what, servers. A copy for 1,024 servers takes a hundred times as long as one for 4.
SHARES = (
    (OBSERVATIONS, 4, 0.5),
    (OBSERVATIONS, 64, 0.25),
    (OBSERVATIONS, 1024, 0.005),
    (ACTIONS, 4, 0.145),
    (ACTIONS, 64, 0.095),
    (ACTIONS, 1024, 0.005),
)


def build(command: Sequence[str], folder: Path, *, unsafe: bool = False) -> str:
    """The program, with the check of the sequence lock or without."""
    program = folder / f"tearing{'_unsafe' * unsafe}"
    define = ["-DLBGYM_SHM_UNSAFE_NO_LOCK"] if unsafe else []
    warnings = ["-Wall", "-Wextra", "-Werror"]
    subprocess.run(
        [*command, "-std=c11", "-O3", *warnings, *define, f"-I{get_include()}", SOURCE, "-o", program], check=True
    )
    return str(program)


def _counts(n: int, number: int, columns: int, factor: int) -> np.ndarray:
    return number * factor + np.arange(n * columns).reshape(n, columns)


def servers_of(number: int, servers: int) -> int:
    """As tearing.c has it, and what follows."""
    return max(servers - number % 4, 1)


def observation_is_whole(buffer: ObservationBuffer, servers: int) -> bool:
    number, n = buffer.sequence_id, servers_of(buffer.sequence_id, servers)
    i = np.arange(n)
    return (
        buffer.num_servers == n
        and buffer.flags == abi.FLAG_GROUND_TRUTH | abi.FLAG_SAFE
        and buffer.timestamp_ns == number * 1000
        and (buffer.unrouted, buffer.fct_count, buffer.fct_sum_ns) == (number * 3, number * 5, number * 7)
        and np.array_equal(buffer.active[:n], (number + i) & 1)
        and np.array_equal(buffer.stats[:n], _counts(n, number, 11, 31) & 0xFFFFFF)
        and np.array_equal(buffer.ground_truth[:n], _counts(n, number, 3, 37) & 0xFFFFFF)
        and np.array_equal(buffer.counters[:n], _counts(n, number, 4, 41))
        and np.array_equal(buffer.weights[:n], 1 + (number * 13 + 7 * i & 0x3FF))
        and np.array_equal(buffer.safe_weights[:n], 2000 + (number * 17 + i & 0x3FF))
    )


def action_is_whole(action: Action, servers: int) -> bool:
    number, n = action.sequence_id, servers_of(action.sequence_id, servers)
    weights = 1.0 + (number * 13 + 7 * np.arange(n) & 0x3FF)
    threshold, alias = np.zeros((2, n), np.uint32)
    seqlock.alias_table(weights, threshold, alias, np.zeros(n, np.int64), np.zeros(n))
    return (
        action.num_servers == n
        and action.lease_ns == number + 1
        and np.array_equal(action.weights[:n], weights)
        and np.array_equal(action.threshold[:n], threshold)
        and np.array_equal(action.alias[:n], alias)
    )


@contextmanager
def writer(program: str, what: str, servers: int, cpu: int | None = None) -> Iterator[SharedMemoryRegion]:
    """Somebody in C who writes at full speed; the region, attached or created here."""
    name = f"tearing-{os.getpid()}-{what}-{servers}"
    created = SharedMemoryRegion.create(name, num_servers=servers, capacity=servers) if what == ACTIONS else None
    command = [program, f"write-{what}", name, str(servers), *([] if created else [str(servers)])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        if process.stdout.readline() != b"ready\n":
            raise RuntimeError(f"{shlex.join(command)} ended")
        if cpu is not None:
            os.sched_setaffinity(process.pid, [cpu])
        with created or SharedMemoryRegion.attach(name) as region:
            yield region
    finally:
        process.kill()
        process.communicate()
        if created is None:
            with SharedMemoryRegion.attach(name) as region:
                region.unlink()


def read_in_c(
    program: str, region: SharedMemoryRegion, what: str, reads: int, seconds: float, cpu: int | None = None
) -> subprocess.Popen[bytes]:
    """Begin to read."""
    command = [program, f"read-{what}", region.name, str(region.capacity), str(reads), str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    if cpu is not None:
        os.sched_setaffinity(process.pid, [cpu])
    return process


def result(process: subprocess.Popen[bytes]) -> dict[str, int]:
    """What a reader in C found, when it has ended."""
    out, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"the reader ended with {process.returncode}")
    return json.loads(out)


def read_in_python(region: SharedMemoryRegion, what: str, reads: int, seconds: float) -> dict[str, int]:
    """So many copies, of which 20 are of something new, as in C."""
    found = dict.fromkeys(("reads", "distinct", "torn", "refused", "busy"), 0)
    end = time.monotonic() + seconds
    buffer, last = region.new_buffer(), 0
    while (found["reads"] < reads or found["distinct"] < 20) and time.monotonic() < end:
        try:
            if what == OBSERVATIONS:
                region.read_into(buffer)
                number, whole = buffer.sequence_id, observation_is_whole(buffer, region.capacity)
            else:
                action = region.read_action()
                assert action is not None
                number, whole = action.sequence_id, action_is_whole(action, region.capacity)
        except RegionBusyError:
            found["busy"] += 1
            continue
        except RegionFormatError:
            found["reads"] += 1
            found["refused"] += 1
            continue
        found["reads"] += 1
        found["distinct"] += number != last
        found["torn"] += not whole
        last = number
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and say by the exit code whether there was nothing torn, and torn ones without the check."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--reads", type=float, default=1e8, help="copies in all")
    arguments = options.parse_args(argv)
    total = 1e6 if arguments.quick else arguments.reads
    command = shlex.split(os.environ.get("CC", ""))
    command = command or [name for name in ("cc", "gcc", "clang") if shutil.which(name)][:1]
    if not command:
        sys.exit("benchmarks.tearing needs a C compiler: set CC, or install cc, gcc or clang")
    rows: list[dict[str, Any]] = []

    def note(what: str, servers: int, reader: str, begin: float, found: dict[str, int]) -> None:
        rows.append({"what": what, "servers": servers, "reader": reader} | found | {"s": time.perf_counter() - begin})

    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory(dir="/dev/shm") as regions:
        os.environ[DIRECTORY_VARIABLE] = regions
        program = build(command, Path(folder))
        unsafe = build(command, Path(folder), unsafe=True)
        seqlock.warm_up()
        for what, servers, share in SHARES:
            with writer(program, what, servers) as region:
                begin = time.perf_counter()
                found = result(read_in_c(program, region, what, int(np.ceil(share * total)), LIMIT))
                note(what, servers, "C", begin, found)
                begin = time.perf_counter()
                note(what, servers, "Python", begin, read_in_python(region, what, int(1e-4 * total), LIMIT))
                begin = time.perf_counter()
                found = result(read_in_c(unsafe, region, what, 10**12, LIMIT))
                note(what, servers, "C, no check", begin, found)
    checked = [row for row in rows if row["reader"] != "C, no check"]
    reads = sum(row["reads"] for row in checked)
    torn = sum(row["torn"] + row["refused"] for row in checked)
    seen = [row["torn"] > 0 for row in rows if row["reader"] == "C, no check"]
    header = ("what", "servers", "reader", "reads", "distinct", "torn", "refused", "busy", "s")
    text = markdown([[row[key] for key in header] for row in rows], header)
    targets = [
        ("copies read", f"{total:,.0f}", reads, reads >= total),
        ("torn or refused", "0", torn, torn == 0),
        ("found torn ones without the check", "all", f"{sum(seen)} of {len(seen)}", all(seen)),
    ]
    text += "\n\n" + markdown(targets, ("target", "wanted", "measured", "reached"))
    reached = all(target[-1] for target in targets)
    report("tearing", arguments, text, {"runs": rows, "reads": reads, "torn": torn, "reached": reached})
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
