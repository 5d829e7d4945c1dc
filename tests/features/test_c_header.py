"""lbgym_features.h, compiled as C and as C++: the Python and Numba reservoirs again, slot by slot, by feature."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lbgym
from lbgym.features import FEATURE_NAMES, STATISTICS, ReservoirSampler

from .test_reservoir_kernel import CODES, CompiledReservoir

INCLUDE = Path(lbgym.__file__).parent / "include"
SHIM = Path(__file__).parent / "c_shim.c"
WARNINGS = ["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-Wconversion", "-Wshadow"]
STANDARDS = {"c": "-std=c11", "c++": "-std=c++17"}
COMPILERS = {"c": ("CC", "cc", "gcc", "clang"), "c++": ("CXX", "c++", "g++", "clang++")}
DEFAULT_CAPACITY = 128
#: What the shared libraries have room for; larger than the default, to be able to test larger reservoirs.
SLOTS = 1000
LARGEST = 2**64 - 1


def compiler(language: str) -> list[str]:
    """The command of the machine's compiler for ``language``; without one, skip, but fail in CI."""
    variable, *names = COMPILERS[language]
    if os.environ.get(variable):
        return shlex.split(os.environ[variable])
    for name in names:
        if shutil.which(name):
            return [name]
    message = f"no {language.upper()} compiler: none of {', '.join(names)} found, and {variable} is not set"
    if os.environ.get("CI", "").lower() in ("true", "1"):
        pytest.fail(message)
    pytest.skip(message)


def run_compiler(language: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [*compiler(language), "-x", language, STANDARDS[language], f"-I{INCLUDE}", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def build(language: str, folder: Path, slots: int | None) -> ctypes.CDLL:
    file = folder / f"features_{language.replace('+', 'p')}_{slots}.so"
    define = [f"-DLBGYM_RESERVOIR_SLOTS={slots}"] if slots else []
    done = run_compiler(language, "-O2", "-shared", "-fPIC", *define, "-o", file, SHIM, "-lm")
    assert done.returncode == 0, done.stderr
    library = ctypes.CDLL(str(file))
    u64, size, pointer, words, floats = (
        ctypes.c_uint64,
        ctypes.c_size_t,
        ctypes.c_void_p,
        np.ctypeslib.ndpointer(np.uint64, flags="C"),
        np.ctypeslib.ndpointer(np.float32, flags="C"),
    )
    for name, result, arguments in (
        ("reservoir_size", size, []),
        ("server_size", size, []),
        ("scratch_size", size, []),
        ("server_reservoir", size, [ctypes.c_int]),
        ("reservoir_init", ctypes.c_bool, [pointer, u64, size, ctypes.c_double, ctypes.c_int]),
        ("reservoir_add", None, [pointer, words, words, size]),
        ("reservoir_samples", size, [pointer, words, words]),
        ("reservoir_random", u64, [pointer]),
        ("reservoir_features", None, [pointer, ctypes.c_double, pointer, floats]),
        ("sample_features", None, [words, size, ctypes.c_double, pointer, floats]),
        ("server_init", ctypes.c_bool, [pointer, u64, size, ctypes.c_double, ctypes.c_int]),
        ("server_flow_opened", None, [pointer]),
        ("server_packet", None, [pointer, u64, u64]),
        ("server_flow_closed", None, [pointer, u64, u64]),
        ("server_open_flows", ctypes.c_int64, [pointer]),
        ("server_stats", None, [pointer, ctypes.c_double, pointer, floats]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


@pytest.fixture(scope="session")
def c(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build("c", tmp_path_factory.mktemp("c"), SLOTS)


@pytest.fixture(scope="session", params=["c", "c++"])
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if request.param == "c":
        return request.getfixturevalue("c")
    return build("c++", tmp_path_factory.mktemp("cpp"), SLOTS)


class Scratch:
    """Scratch memory for n samples, with a guard behind it."""

    GUARD = b"\xa5" * 64

    def __init__(self, library, n):
        self.size = n * library.scratch_size()
        self.buffer = ctypes.create_string_buffer(bytes(self.size) + self.GUARD, self.size + len(self.GUARD))

    def __enter__(self):
        return self.buffer

    def __exit__(self, *_):
        assert self.buffer.raw[self.size :] == self.GUARD, "written beyond the scratch memory"


class CReservoir:
    """One lbgym_reservoir, in memory that was full of something else."""

    def __init__(self, library, capacity=128, seed=0, *, probability=1.0, algorithm="overwrite"):
        self.library, self.capacity = library, capacity
        size = library.reservoir_size()
        self.memory = ctypes.create_string_buffer(b"\xa5" * size, size)
        code = CODES.get(algorithm, algorithm)
        self.accepted = library.reservoir_init(self.memory, seed, capacity, probability, code)

    def add(self, values, times):
        values, times = (np.ascontiguousarray(x, np.uint64) for x in (values, times))
        self.library.reservoir_add(self.memory, values, times, len(values))

    def samples(self):
        """Values and times in ns, uint64[n] each."""
        values, times = np.zeros((2, SLOTS), np.uint64)
        n = self.library.reservoir_samples(self.memory, values, times)
        return values[:n], times[:n]

    def features(self, decay=0.9):
        out = np.full(len(STATISTICS) + 1, np.nan, np.float32)
        with Scratch(self.library, len(self.samples()[0])) as scratch:
            self.library.reservoir_features(self.memory, decay, scratch, out)
        assert np.isnan(out[-1])
        return out[:-1]


class CServer:
    def __init__(self, library, capacity=128, seed=0):
        self.library, self.capacity = library, capacity
        self.memory = ctypes.create_string_buffer(b"\xa5" * library.server_size(), library.server_size())
        assert library.server_init(self.memory, seed, capacity, 1.0, CODES["overwrite"])
        at = ctypes.addressof(self.memory)
        self.random = [library.reservoir_random(at + library.server_reservoir(i)) for i in (0, 1)]

    def opened(self):
        self.library.server_flow_opened(self.memory)

    def packet(self, opened, now):
        self.library.server_packet(self.memory, opened, now)

    def closed(self, opened, now):
        self.library.server_flow_closed(self.memory, opened, now)

    def stats(self, decay=0.9):
        out = np.full(len(FEATURE_NAMES) + 1, np.nan, np.float32)
        with Scratch(self.library, self.capacity) as scratch:
            self.library.server_stats(self.memory, decay, scratch, out)
        assert np.isnan(out[-1])
        return out[:-1]


def seconds(ns: np.ndarray) -> np.ndarray:
    return np.asarray(ns, np.uint64).astype(np.float64) * 1e-9


def assert_same(features: np.ndarray, expected: np.ndarray, scale: float) -> None:
    """Equal to float32 rounding; a deviation around a large mean is good to the mean's own rounding in Python."""
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, np.float32(expected), rtol=2.0**-22, atol=1e-12 * scale)


def exact(values: np.ndarray, times: np.ndarray, decay: float) -> np.ndarray:
    """The statistics of whole ns, with ages from exact differences."""
    weights = np.array([decay ** (1e-9 * (int(max(times)) - int(t))) for t in times])
    least = int(min(values))
    excess = np.array([1e-9 * (int(v) - least) for v in values])
    order = np.argsort(values, kind="stable")
    below = np.cumsum(weights[order])
    first = int(np.argmax(below >= 0.9 * below[-1] * (1.0 - 1e-12)))
    from_least = (
        excess.mean(),
        np.percentile(excess, 90),
        excess.std(),
        (weights * excess).sum() / weights.sum(),
        excess[order[first]],
    )
    return np.array(from_least) + 1e-9 * least * np.array([1.0, 1.0, 0.0, 1.0, 1.0])


def stream(kind: str, n: int) -> tuple[np.ndarray, np.ndarray]:
    """``n`` values and non-decreasing times, uint64 ns."""
    rng = np.random.default_rng(n)
    values = rng.lognormal(-2.0, 1.0, n) * 1e9
    gaps = rng.exponential(0.2e9, n)
    if kind == "equal values":
        values[:] = 123_456_789
    elif kind == "few values":
        values = rng.integers(1, 4, n) * 5e7
    elif kind == "one time":
        gaps[:] = 0.0
    elif kind == "long silences":
        # Whole days or nothing, whose difference no rounding of the time in seconds can touch.
        gaps = rng.choice([0, 86_400_000_000_000], n, p=[0.95, 0.05])
    return values.astype(np.uint64), np.cumsum(gaps.astype(np.uint64), dtype=np.uint64)


def fill(sampler: ReservoirSampler, values: np.ndarray, times: np.ndarray) -> None:
    for value, time in zip(seconds(values).tolist(), seconds(times).tolist(), strict=True):
        sampler.add(value, time)


@pytest.mark.parametrize("language", ["c", "c++"])
@pytest.mark.parametrize("level", ["-O0", "-O2"])
def test_compiles_without_a_warning(language: str, level: str, tmp_path: Path) -> None:
    done = run_compiler(language, *WARNINGS, level, "-c", SHIM, "-o", tmp_path / "shim.o")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="needs -mgeneral-regs-only")
def test_packet_path_needs_no_floating_point(tmp_path: Path) -> None:
    """Compiled for a place without floating-point registers, such as a kernel."""

    def compiles(body: str) -> bool:
        file = tmp_path / "packet.c"
        file.write_text(f'#include "lbgym_features.h"\nvoid f(lbgym_server *s, uint64_t a, uint64_t b)\n{{ {body} }}\n')
        return run_compiler("c", "-O0", "-mgeneral-regs-only", "-c", file, "-o", tmp_path / "o").returncode == 0

    if compiles("s->fct.filled = (uint32_t)(1.5 * (double)(a + b));") or not compiles(
        "s->open_flows = (int64_t)(a + b);"
    ):
        pytest.skip("this compiler has no -mgeneral-regs-only that refuses floating point")
    assert compiles("lbgym_reservoir_add(&s->fct, a, b);")
    assert compiles("lbgym_server_flow_opened(s); lbgym_server_packet(s, a, b); lbgym_server_flow_closed(s, a, b);")


@pytest.mark.parametrize("algorithm", ["overwrite", "uniform"])
@pytest.mark.parametrize("probability", [1.0, 0.3])
@pytest.mark.parametrize("capacity", [1, 2, 7, 128, 1000])
@pytest.mark.parametrize("kind", ["plain", "equal values", "few values", "one time", "long silences"])
def test_agrees_with_python_and_numba(
    c: ctypes.CDLL, kind: str, capacity: int, probability: float, algorithm: int
) -> None:
    """Observed when the reservoir is tiny, half full, about full, and long after."""
    keys = {"capacity": capacity, "seed": 2**64 - capacity, "probability": probability, "algorithm": algorithm}
    sampler, native = ReservoirSampler(**keys), CReservoir(c, **keys)
    compiled = {decay: CompiledReservoir(**keys, decay=decay) for decay in (0.9, 0.5, 1.0)}
    values, times = stream(kind, 4 * capacity + 60)
    for part in np.split(np.arange(len(values)), [1, 2, 5, 11, 11 + capacity // 2, 30 + capacity]):
        fill(sampler, values[part], times[part])
        native.add(values[part], times[part])
        held, held_times = map(seconds, native.samples())
        np.testing.assert_array_equal(held, sampler.values)
        np.testing.assert_array_equal(held_times, sampler.times)
        for decay, numba in compiled.items():
            numba.add(seconds(values[part]), seconds(times[part]))
            np.testing.assert_array_equal(held, numba.held)
            sampler.decay = decay
            features = native.features(decay)
            scale = held.max(initial=0.0)
            assert_same(features, sampler.get_feature_vector(), scale)
            assert_same(features, numba.features(), scale)


GAPS = st.one_of(st.just(0), st.integers(1, 10**10), st.integers(10**10, 10**15))


@given(
    bursts=st.lists(st.lists(st.tuples(st.integers(0, 10**18), GAPS), max_size=40), max_size=6),
    capacity=st.sampled_from([1, 2, 7, 40]),
    seed=st.integers(0, 2**64 - 1),
    probability=st.one_of(st.sampled_from([1.0, 0.3, 2.0**-60]), st.floats(1e-3, 1.0)),
    algorithm=st.sampled_from(["overwrite", "uniform"]),
    decay=st.sampled_from([0.9, 0.5, 1.0, 1e-3]),
)
def test_agrees_with_python_and_numba_on_any_stream(
    library: ctypes.CDLL, bursts: list[Any], decay: float, **keys: Any
) -> None:
    sampler, compiled = ReservoirSampler(**keys, decay=decay), CompiledReservoir(**keys, decay=decay)
    native = CReservoir(library, **keys)
    now = 0
    for burst in bursts:
        times = [now := now + gap for _, gap in burst]
        values = [value for value, _ in burst]
        native.add(values, times)
        fill(sampler, values, times)
        compiled.add(seconds(values), seconds(times))
        held, held_times = map(seconds, native.samples())
        np.testing.assert_array_equal(held, sampler.values)
        np.testing.assert_array_equal(held, compiled.held)
        np.testing.assert_array_equal(held_times, sampler.times)
        scale = held.max(initial=0.0)
        assert_same(native.features(decay), sampler.get_feature_vector(), scale)
        assert_same(native.features(decay), compiled.features(), scale)


@given(seed=st.integers(0, 2**64 - 1), off=st.integers(-2, 2))
def test_takes_the_decisions_of_a_probability_at_its_very_edge(c: ctypes.CDLL, seed: int, off: int) -> None:
    """The probability that the first random number just reaches, and its neighbours on either side."""
    first = (ReservoirSampler(seed=seed)._next() >> 11) + 1
    probability = min(max(first + off, 1), 2**53 - 1) * 2.0**-53
    sampler, native = (
        ReservoirSampler(seed=seed, probability=probability),
        CReservoir(c, seed=seed, probability=probability),
    )
    values, times = np.arange(1, 41, dtype=np.uint64), np.zeros(40, np.uint64)
    fill(sampler, values[:1], times[:1])
    native.add(values[:1], times[:1])
    assert len(native.samples()[0]) == len(sampler)
    fill(sampler, values[1:], times[1:])
    native.add(values[1:], times[1:])
    np.testing.assert_array_equal(seconds(native.samples()[0]), sampler.values)


ANY = st.one_of(
    st.integers(0, LARGEST),
    st.sampled_from([0, 1, 2**53 + 1, 2**63 - 1, 2**63, 2**63 + 1, LARGEST - 1, LARGEST]),
    st.integers(10**18, 10**18 + 10**10),
)


@given(
    samples=st.lists(st.tuples(ANY, ANY), min_size=1, max_size=60),
    capacity=st.integers(1, 50),
    decay=st.sampled_from([0.9, 0.5, 1.0, 1e-300]),
    algorithm=st.sampled_from(["overwrite", "uniform"]),
)
def test_any_numbers_make_finite_features(
    library: ctypes.CDLL, samples: list[Any], capacity: int, decay: float, algorithm: int
) -> None:
    """Time that goes backwards or jumps by centuries, values beyond 2^63."""
    native = CReservoir(library, capacity, seed=5, algorithm=algorithm)
    native.add(*zip(*samples, strict=True))
    values, times = native.samples()
    features = native.features(decay)
    assert np.isfinite(features).all()
    np.testing.assert_allclose(features, exact(values, times, decay), rtol=1e-6)


@pytest.mark.parametrize("decay", [0.0, -1.0, math.nan, math.inf, -math.inf, 1.5])
def test_a_decay_outside_its_range_counts_as_its_nearest_end(c: ctypes.CDLL, decay: float) -> None:
    native = CReservoir(c, 16)
    native.add([10**9, 2 * 10**9, 6 * 10**9], [0, 0, 10**12])
    features = native.features(decay)
    assert features[3] == pytest.approx(6.0 if decay <= 0.0 else 3.0)
    assert np.isfinite(features).all()


def test_deviation_survives_a_large_mean(c: ctypes.CDLL) -> None:
    """A few ns around a day."""
    values = np.uint64(86_400_000_000_000) + np.array([1, 2, 3, 4, 5], np.uint64)
    native = CReservoir(c, 16)
    native.add(values, np.zeros(5))
    assert native.features()[2] == pytest.approx(1e-9 * math.sqrt(2.0), rel=1e-6)
    equal = CReservoir(c, 16)
    equal.add(np.full(11, 123_456_789_012_345), np.arange(11))
    assert equal.features()[2] == 0.0


def test_ages_of_a_unix_clock_are_exact(c: ctypes.CDLL) -> None:
    """Two samples 100 ns apart, 56 years after 1970, where a float64 of seconds knows 238 ns."""
    now = 1_767_225_600_000_000_000
    native = CReservoir(c, 2)
    native.add([0, 10**9], [now, now + 100])
    assert native.features(1e-300)[3] == pytest.approx(1.0 / (1.0 + 1e-300**1e-7), rel=1e-6)


@pytest.mark.parametrize("n", [*range(1, 25), 127, 128, 999, 1000])
def test_percentiles_of_every_small_size(c: ctypes.CDLL, n: int) -> None:
    """Equal weights with a decay of 1, where the weighted percentile is decided by ties."""
    values = np.random.default_rng(n).permutation(n).astype(np.uint64) * np.uint64(10**9)
    native = CReservoir(c, SLOTS)
    native.add(values, np.zeros(n))
    features = native.features(1.0)
    assert features[1] == np.float32(np.percentile(np.arange(n), 90))
    assert features[4] == -(-9 * n // 10) - 1


def test_empty_is_zero(library: ctypes.CDLL) -> None:
    np.testing.assert_array_equal(CReservoir(library).features(), 0.0)
    np.testing.assert_array_equal(CServer(library).stats(), 0.0)


@pytest.mark.parametrize(
    "keys",
    [
        {"capacity": 0},
        {"capacity": SLOTS + 1},
        {"capacity": 2**16 + 1},
        {"probability": 0.0},
        {"probability": -0.5},
        {"probability": 1.1},
        {"probability": math.nan},
        {"algorithm": 2},
        {"algorithm": -1},
    ],
)
def test_refused_arguments_make_a_reservoir_that_takes_nothing(library: ctypes.CDLL, keys: dict[str, Any]) -> None:
    native = CReservoir(library, **keys)
    assert native.accepted is False
    native.add(np.arange(100), np.arange(100))
    assert len(native.samples()[0]) == 0
    np.testing.assert_array_equal(native.features(), 0.0)
    assert CReservoir(library).accepted is True


@pytest.mark.parametrize("slots", ["0", "32768"])
def test_room_outside_the_limits_does_not_compile(slots: int, tmp_path: Path) -> None:
    done = run_compiler("c", f"-DLBGYM_RESERVOIR_SLOTS={slots}", "-c", SHIM, "-o", tmp_path / "shim.o")
    assert done.returncode != 0
    assert "LBGYM_RESERVOIR_SLOTS must be from 1 to 32767" in done.stderr


def test_default_capacity(tmp_path: Path) -> None:
    library = build("c", tmp_path, None)
    assert library.reservoir_size() == 32 + 16 * DEFAULT_CAPACITY
    assert CReservoir(library, DEFAULT_CAPACITY).accepted
    assert not CReservoir(library, DEFAULT_CAPACITY + 1).accepted


def test_c_and_cpp_share_memory(c: ctypes.CDLL, tmp_path: Path) -> None:
    """A reservoir written by the one is read by the other."""
    cpp = build("c++", tmp_path, SLOTS)
    reservoirs = [CReservoir(each, 100, seed=3, probability=0.7) for each in (c, cpp)]
    for each in reservoirs:
        each.add(*stream("plain", 600))
    assert reservoirs[0].memory.raw == reservoirs[1].memory.raw


def test_a_copy_is_complete(c: ctypes.CDLL) -> None:
    """The features of a copy, after the worker went on."""
    original, copy = CReservoir(c, 50, seed=1), CReservoir(c, 50)
    original.add(*stream("plain", 200))
    before = original.features()
    ctypes.memmove(copy.memory, original.memory, c.reservoir_size())
    original.add(*stream("equal values", 300))
    np.testing.assert_array_equal(copy.features(), before)
    assert not np.array_equal(original.features(), before)


def test_samples_of_several_workers_make_one_statistic(c: ctypes.CDLL) -> None:
    values, times = stream("plain", 2500)
    out = np.zeros(5, np.float32)
    with Scratch(c, 2500) as scratch:
        c.sample_features(np.column_stack([values, times]).ravel(), 2500, 0.9, scratch, out)
    np.testing.assert_allclose(out, exact(values, times, 0.9), rtol=1e-6)


def test_columns_of_a_server(library: ctypes.CDLL) -> None:
    server = CServer(library, capacity=8, seed=11)
    fct, duration = (ReservoirSampler(8, random) for random in server.random)
    clock = np.random.default_rng(5).integers(10**6, 10**9, 60).tolist()
    now = 10**12
    for step in clock:
        opened, now = now, now + step
        server.opened()
        server.opened()
        server.packet(opened, now)
        duration.add(1e-9 * step, 1e-9 * now)
        server.closed(opened, now + 3 * step)
        fct.add(4e-9 * step, 1e-9 * (now + 3 * step))
        now += 3 * step
    expected = {"n_flow_on": float(len(clock))}
    for prefix, sampler in (("fct", fct), ("duration", duration)):
        expected |= {f"{prefix}_{name}": value for name, value in sampler.get_features().items()}
    assert len(set(expected.values())) == len(FEATURE_NAMES)
    np.testing.assert_allclose(server.stats(), [expected[name] for name in FEATURE_NAMES], rtol=1e-6)


def test_open_flows_are_never_below_zero(library: ctypes.CDLL) -> None:
    server = CServer(library)
    server.closed(0, 1)
    assert library.server_open_flows(server.memory) == 0
    server.opened()
    server.opened()
    assert library.server_open_flows(server.memory) == 2
    for _ in range(3):
        server.closed(0, 1)
    assert library.server_open_flows(server.memory) == 0


def test_a_clock_that_goes_backwards_makes_no_centuries(library: ctypes.CDLL) -> None:
    server = CServer(library)
    server.opened()
    server.packet(10**9, 10**9 - 1)
    server.closed(10**9, 10**9 - 1)
    np.testing.assert_array_equal(server.stats(), 0.0)


def test_no_two_reservoirs_of_neighbouring_servers_share_a_random_sequence(c: ctypes.CDLL) -> None:
    seeds = [*range(200), *range(2**64 - 200, 2**64)]
    random = [word for seed in seeds for word in CServer(c, seed=seed).random]
    assert len(set(random)) == 2 * len(seeds)
    # No sequence is a neighbour's a few draws later either.
    step = 0x9E3779B97F4A7C15
    assert len({(word + k * step) % 2**64 for word in random for k in range(50)}) == 50 * len(random)


@pytest.mark.parametrize(("ci", "outcome"), [("true", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_only_ci_insists_on_a_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ci: str | None, outcome: type[BaseException]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CI", ci)
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(outcome, match="no C compiler"):
        compiler("c")
