"""The reservoirs in C: nanoseconds per sample, microseconds per observation: ``python -m benchmarks.c_features``.

Needs a C compiler (``CC``, or cc, gcc or clang). A sample is compared with what it cannot do without: copying its 16
bytes to a slot of the same memory, the slots being random and known beforehand. Features are compared with NumPy on the
same samples. All of a round follow each other in one process; ratios are medians over rounds.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np

import lbgym
from benchmarks.common import markdown, parser, report
from lbgym.features import ReservoirSampler

CAPACITY = 128
SERVERS = 64
#: Samples and slots that are prepared, and gone through again and again: few enough to stay in the cache.
PREPARED = 4096

#: ns per sample in the packet path, times the bare copy, and how much faster than NumPy the features must be.
LIMIT_NS, LIMIT_RATIO, LIMIT_FEATURES_US, LIMIT_NUMPY = 5.0, 8.0, 5.0, 20.0

OVERWRITE, UNIFORM = 0, 1

SOURCE = f"""
#include "lbgym_features.h"

static lbgym_server servers[{SERVERS}];

void prepare(double probability, int algorithm)
{{
    for (size_t i = 0; i < {SERVERS}; i++) {{
        lbgym_server_init(&servers[i], i, {CAPACITY}, probability, (lbgym_algorithm)algorithm);
    }}
}}

void copy_one(const uint64_t *values, const uint16_t *slots, size_t n)
{{
    for (size_t i = 0; i < n; i++) {{
        lbgym_sample *slot = &servers[0].fct.slots[slots[i % {PREPARED}]];
        slot->value_ns = values[i % {PREPARED}];
        slot->time_ns = i;
    }}
}}

void copy_all(const uint64_t *values, const uint16_t *slots, size_t n)
{{
    for (size_t i = 0; i < n; i++) {{
        lbgym_sample *slot = &servers[values[i % {PREPARED}] % {SERVERS}].fct.slots[slots[i % {PREPARED}]];
        slot->value_ns = values[i % {PREPARED}];
        slot->time_ns = i;
    }}
}}

void add_one(const uint64_t *values, const uint16_t *slots, size_t n)
{{
    (void)slots;
    for (size_t i = 0; i < n; i++) {{
        lbgym_reservoir_add(&servers[0].fct, values[i % {PREPARED}], i);
    }}
}}

void add_all(const uint64_t *values, const uint16_t *slots, size_t n)
{{
    (void)slots;
    for (size_t i = 0; i < n; i++) {{
        lbgym_reservoir_add(&servers[values[i % {PREPARED}] % {SERVERS}].fct, values[i % {PREPARED}], i);
    }}
}}

void features(const lbgym_sample *samples, size_t n, float *out)
{{
    lbgym_weighted_sample scratch[{CAPACITY}];
    for (size_t i = 0; i < n; i++) {{
        lbgym_sample_features(samples + i % {SERVERS} * {CAPACITY}, {CAPACITY}, LBGYM_DECAY, scratch, out);
    }}
}}
"""


def library(folder: Path) -> ctypes.CDLL:
    command = shlex.split(os.environ.get("CC", ""))
    command = command or [name for name in ("cc", "gcc", "clang") if shutil.which(name)][:1]
    if not command:
        sys.exit("benchmarks.c_features needs a C compiler: set CC, or install cc, gcc or clang")
    source, shared = folder / "c_features.c", folder / "c_features.so"
    source.write_text(SOURCE)
    include = Path(lbgym.__file__).parent / "include"
    subprocess.run(
        [*command, "-std=c11", "-O2", "-shared", "-fPIC", f"-I{include}", "-o", shared, source, "-lm"], check=True
    )
    loaded = ctypes.CDLL(str(shared))
    words, slots, floats = (np.ctypeslib.ndpointer(t, flags="C") for t in (np.uint64, np.uint16, np.float32))
    loaded.prepare.argtypes = [ctypes.c_double, ctypes.c_int]
    for name in ("copy_one", "copy_all", "add_one", "add_all"):
        getattr(loaded, name).argtypes = [words, slots, ctypes.c_size_t]
    loaded.features.argtypes = [words, ctypes.c_size_t, floats]
    for name in ("prepare", "copy_one", "copy_all", "add_one", "add_all", "features"):
        getattr(loaded, name).restype = None
    return loaded


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def adding(c: ctypes.CDLL, samples: int, rounds: int) -> dict[str, list[float]]:
    """Nanoseconds per sample, once per round: two bare copies, then what is compared with the one or the other."""
    rng = np.random.default_rng(1)
    values = rng.integers(0, 2**34, PREPARED, dtype=np.uint64)
    slots = rng.integers(0, CAPACITY, PREPARED, dtype=np.uint16)
    kinds = (
        ("bare copy, one reservoir", c.copy_one, 1.0, OVERWRITE),
        (f"bare copy, {SERVERS} servers", c.copy_all, 1.0, OVERWRITE),
        ("add, one reservoir", c.add_one, 1.0, OVERWRITE),
        (f"add, {SERVERS} servers", c.add_all, 1.0, OVERWRITE),
        ("add, one reservoir, probability 0.05", c.add_one, 0.05, OVERWRITE),
        ("add, one reservoir, uniform", c.add_one, 1.0, UNIFORM),
    )
    times: dict[str, list[float]] = {name: [] for name, *_ in kinds}
    for _ in range(rounds):
        for name, function, probability, algorithm in kinds:
            c.prepare(probability, algorithm)
            # Fills the reservoirs, which is not what is timed.
            function(values, slots, 100 * CAPACITY * SERVERS)
            times[name].append(1e9 * seconds(partial(function, values, slots, samples)) / samples)
    return times


def observing(c: ctypes.CDLL, calls: int, rounds: int) -> dict[str, list[float]]:
    """Microseconds per observation of a full reservoir, once per round."""
    rng = np.random.default_rng(2)
    values = (1e9 * rng.lognormal(-2.0, 1.0, (SERVERS, CAPACITY))).astype(np.uint64)
    times = rng.integers(0, 10 * 10**9, (SERVERS, CAPACITY), dtype=np.uint64)
    usual = np.stack([values, times], axis=-1)
    # The largest samples are so old that they weigh nothing: the search for the weighted percentile passes them all.
    worst = np.stack([values, np.uint64(10**18) - values * np.uint64(1000)], axis=-1)
    samplers = []
    for server in usual:
        sampler = ReservoirSampler(CAPACITY)
        for value, at in server.tolist():
            sampler.add(1e-9 * value, 1e-9 * at)
        samplers.append(sampler)
    out = np.zeros(5, np.float32)
    c.features(usual, 1, out)
    np.testing.assert_allclose(out, samplers[0].get_feature_vector(), rtol=1e-6)
    numpy_calls = max(calls // 100, SERVERS)

    def with_numpy() -> None:
        for i in range(numpy_calls):
            samplers[i % SERVERS].get_feature_vector()

    found: dict[str, list[float]] = {"features": [], "features, worst case": [], "NumPy": []}
    for _ in range(rounds):
        found["features"].append(1e6 * seconds(lambda: c.features(usual, calls, out)) / calls)
        found["features, worst case"].append(1e6 * seconds(lambda: c.features(worst, calls, out)) / calls)
        found["NumPy"].append(1e6 * seconds(with_numpy) / numpy_calls)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--rounds", type=int, default=15)
    arguments = options.parse_args(argv)
    rounds = 5 if arguments.quick else arguments.rounds
    with tempfile.TemporaryDirectory() as folder:
        c = library(Path(folder))
        adds = adding(c, 200_000 if arguments.quick else 5_000_000, rounds)
        observations = observing(c, 2_000 if arguments.quick else 50_000, rounds)

    def ratio(times: dict[str, list[float]], one: str, other: str) -> float:
        return median(a / b for a, b in zip(times[one], times[other], strict=True))

    bare = {name: f"bare copy, {name.split(', ')[1]}" for name in adds}
    text = markdown(
        [(name, median(each), min(each), ratio(adds, name, bare[name])) for name, each in adds.items()],
        ("ns per sample", "median", "best", "x bare copy"),
    )
    text += "\n\n" + markdown(
        [(name, median(each), min(each), ratio(observations, "NumPy", name)) for name, each in observations.items()],
        (f"us per observation of {CAPACITY} samples", "median", "best", "x as fast as NumPy"),
    )
    one, many = "add, one reservoir", f"add, {SERVERS} servers"
    targets = [
        (f"{one}, ns", "at most", LIMIT_NS, median(adds[one])),
        (f"{one}: times the bare copy", "at most", LIMIT_RATIO, ratio(adds, one, bare[one])),
        (f"{many}: times the bare copy", "at most", LIMIT_RATIO, ratio(adds, many, bare[many])),
        ("features, us", "at most", LIMIT_FEATURES_US, median(observations["features"])),
        ("features: times as fast as NumPy", "at least", LIMIT_NUMPY, ratio(observations, "NumPy", "features")),
    ]
    reached = [found <= limit if way == "at most" else found >= limit for _, way, limit, found in targets]
    text += "\n\n" + markdown(
        [(n, f"{way} {limit:g}", found, ok) for (n, way, limit, found), ok in zip(targets, reached, strict=True)],
        ("target", "wanted", "measured", "reached"),
    )
    data = {
        "ns_per_sample": adds,
        "us_per_observation": observations,
        "targets": [
            {"name": name, way.replace(" ", "_"): limit, "measured": found, "reached": ok}
            for (name, way, limit, found), ok in zip(targets, reached, strict=True)
        ],
    }
    report("c_features", arguments, text, data)
    return 0 if all(reached) else 1


if __name__ == "__main__":
    sys.exit(main())
