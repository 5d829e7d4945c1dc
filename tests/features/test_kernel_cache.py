"""The cache of compiled functions: it notices every change, and where it cannot be used only time is lost."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import pytest
from numba.core.caching import UserProvidedCacheLocator

import lbgym
from lbgym.features import rng
from lbgym.features.kernel_cache import is_compiled, is_kept, source_stamp, sources_of
from lbgym.sharedmemory import seqlock
from lbgym.simulator import kernel, per_flow_kernel
from tests.forked import Template

PACKAGE = Path(lbgym.__file__).parent

#: A kernel that takes a second to compile: says whether it was loaded from disk.
PROGRAM = """
from lbgym.features import rng
assert int(rng.stream_seed(1, 2, 3)) == {expected}
print(sum(rng.stream_seed._cache_hits.values()))
"""
#: In a process that has Numba already, which reads the environment when it is imported, and a limit in bytes per file.
PREPARE = """
import resource, sys
from numba.core import config
sys.path.insert(0, {path!r})
config.reload_config()
limit = {limit}
if limit is not None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
"""
WARNING = "cannot keep compiled functions on disk"


@pytest.fixture(scope="module")
def expected() -> int:
    return int(rng.stream_seed(1, 2, 3))


@pytest.fixture(scope="module")
def numba() -> Iterator[Template]:
    """Gives processes that have compiled something, and imported nothing of ours."""
    with Template(["numpy", "numba"], "import numba; numba.njit(lambda x: x + 1)(1)") as template:
        yield template


@pytest.fixture
def copy_of_package(tmp_path: Path) -> Iterator[Path]:
    """A folder with a copy of the package in which nothing can be written: not even root can, where a file is."""
    shutil.copytree(PACKAGE, tmp_path / "lbgym", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in [tmp_path / "lbgym", *(tmp_path / "lbgym").rglob("*")]:
        if folder.is_dir():
            (folder / "__pycache__").write_text("")
    yield tmp_path


def environment(variables: dict[str, str]) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name not in ("NUMBA_CACHE_DIR", "HOME")}
    return inherited | {"HOME": "/proc/x", "PYTHONDONTWRITEBYTECODE": "1"} | variables


def run(arguments: list[str], path: Path = PACKAGE.parent, **variables: str) -> list[str]:
    """Standard output and standard error of a process that must succeed."""
    done = subprocess.run(
        [sys.executable, *arguments],
        env=environment({"PYTHONPATH": str(path)} | variables),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [done.stdout.strip(), done.stderr]


class Runner(Protocol):
    """Runs a program in a process of its own and returns what it wrote to standard output and standard error."""

    def __call__(
        self, program: str, path: Path = PACKAGE.parent, limit: int | None = None, **variables: str
    ) -> list[str]: ...


@pytest.fixture
def forked(numba: Template) -> Runner:
    """A runner; ``limit``: bytes per file that the program writes."""

    def run_forked(program: str, path: Path = PACKAGE.parent, limit: int | None = None, **variables: str) -> list[str]:
        program = PREPARE.format(path=str(path), limit=limit) + program
        done = numba.run(["-c", program], env=environment(variables))
        assert done.returncode == 0, done.stderr
        return [done.stdout.strip(), done.stderr]

    return run_forked


class Loaded(Protocol):
    """How often a process found the kernel on disk, and what it said."""

    def __call__(self, path: Path = PACKAGE.parent, limit: int | None = None, **variables: str) -> tuple[int, str]: ...


@pytest.fixture
def loaded(forked: Runner, expected: int) -> Loaded:
    def load(path: Path = PACKAGE.parent, limit: int | None = None, **variables: str) -> tuple[int, str]:
        out, error = forked(PROGRAM.format(expected=expected), path, limit, **variables)
        return int(out), error

    return load


def test_kept_from_process_to_process(tmp_path: Path, expected: int) -> None:
    program = PROGRAM.format(expected=expected)
    assert run(["-c", program], NUMBA_CACHE_DIR=str(tmp_path)) == ["0", ""]
    assert run(["-c", program], NUMBA_CACHE_DIR=str(tmp_path)) == ["1", ""]


def test_no_place_to_write(copy_of_package: Path, loaded: Loaded) -> None:
    for variables in ({}, {"NUMBA_CACHE_DIR": "/proc/x"}):
        hits, error = loaded(path=copy_of_package, **variables)
        assert hits == 0
        assert error.count("\n") == 1 and WARNING in error and "NUMBA_CACHE_DIR" in error


def test_nothing_is_said_where_nothing_is_compiled(copy_of_package: Path) -> None:
    _, error = run(["-m", "lbgym", "shm", "ls"], path=copy_of_package, LBGYM_SHM_DIR=str(copy_of_package))
    assert error == ""


@pytest.mark.slow
def test_a_simulation_without_a_place_to_write(copy_of_package: Path) -> None:
    # Without arrivals, flows and the tables of its rules, which are most of what there is to compile.
    source = copy_of_package / "lbgym" / "simulator" / "kernel.py"
    text = source.read_text()
    for call, instead in (
        (r"status\[r\] = _run\(.*\)", "status[r] = DONE"),
        (r"    _set_weights\(P, S, r, b, .*\)", "    pass"),
        (r"\n    _refresh_active\([^()]*\)", ""),
        (r"\n    begin_arrivals\(P.*\)", ""),
        (r"\n    next_arrival\(P.*\)", ""),
    ):
        text, found = re.subn(call, instead, text)
        assert found, call
    source.write_text(text)
    out, error = run(["-c", "import lbgym; print(lbgym.LoadBalanceEnv().reset(seed=1)[0].shape)"], path=copy_of_package)
    assert out == "(4, 11)"
    assert "in every process" in error and error.count(WARNING) == 1 and "Traceback" not in error


def damage(folder: Path, pattern: str, content: bytes | None) -> None:
    """Replace files by ``content``; None: flip a bit in the last quarter, where the machine code is."""
    files = list(folder.rglob(pattern))
    assert files
    for file in files:
        old = bytearray(file.read_bytes())
        old[-len(old) // 4] ^= 0x10
        file.write_bytes(bytes(old) if content is None else content)


@pytest.mark.parametrize(
    ("pattern", "content"),
    [
        ("*.nbi", b""),
        ("*.nbi", b"\0" * 100),
        ("*.nbi", b"\x80\x05\x95"),
        ("*.nbc", b""),
        ("*.nbc", b"\0" * 100),
        ("*.nbc", None),
    ],
    ids=["empty index", "index of zeros", "truncated index", "empty data", "data of zeros", "a flipped bit"],
)
def test_a_damaged_entry_is_a_miss_and_mended(
    tmp_path: Path, loaded: Loaded, pattern: str, content: bytes | None
) -> None:
    loaded(NUMBA_CACHE_DIR=str(tmp_path))
    damage(tmp_path, pattern, content)
    assert loaded(NUMBA_CACHE_DIR=str(tmp_path)) == (0, "")
    assert loaded(NUMBA_CACHE_DIR=str(tmp_path)) == (1, "")


def test_a_lost_data_file_is_a_miss(tmp_path: Path, loaded: Loaded) -> None:
    loaded(NUMBA_CACHE_DIR=str(tmp_path))
    for file in tmp_path.rglob("*.nbc"):
        file.unlink()
    assert loaded(NUMBA_CACHE_DIR=str(tmp_path)) == (0, "")
    assert loaded(NUMBA_CACHE_DIR=str(tmp_path)) == (1, "")


def test_the_data_of_another_function_is_a_miss(tmp_path: Path, loaded: Loaded) -> None:
    """Two processes that save different forms of one function at the same time may give both the same number."""
    loaded(NUMBA_CACHE_DIR=str(tmp_path))
    mine, *others = sorted(tmp_path.rglob("*.nbc"), key=lambda file: "stream_seed" not in file.name)
    assert "stream_seed" in mine.name and others
    shutil.copyfile(others[0], mine)
    assert loaded(NUMBA_CACHE_DIR=str(tmp_path)) == (0, "")


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_FSIZE")
def test_a_failed_save_is_one_warning(tmp_path: Path, loaded: Loaded) -> None:
    hits, error = loaded(limit=512, NUMBA_CACHE_DIR=str(tmp_path))
    assert hits == 0
    assert error.count("\n") == 1 and WARNING in error and "File too large" in error
    assert not list(tmp_path.rglob("*.nbc"))
    assert loaded(NUMBA_CACHE_DIR=str(tmp_path)) == (0, "")


def test_a_full_disk(tmp_path: Path, loaded: Loaded) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("cannot mount a file system")
    try:
        hits, error = loaded(NUMBA_CACHE_DIR=str(tmp_path))
        assert hits == 0
        assert error.count("\n") == 1 and WARNING in error
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.slow
def test_the_command_line_goes_on_after_a_damaged_index(tmp_path: Path) -> None:
    lbgym.LoadBalanceEnv().reset(seed=0)
    for function in (kernel.step_replicas, rng.mix64):  # what this process compiled, where a copy of it looks
        folder = UserProvidedCacheLocator.get_suitable_cache_subpath(function.py_func.__code__.co_filename)
        shutil.copytree(function._cache.cache_path, tmp_path / folder, ignore=shutil.ignore_patterns("*.pyc"))
    damage(tmp_path, "kernel.step_replicas-*.nbi", b"")
    command = ["-m", "lbgym", "compare", "-p", "lsq", "--seeds", "1", "--duration", "1", "--processes", "1"]
    out, error = run(command, NUMBA_CACHE_DIR=str(tmp_path))
    assert "lsq" in out and "Aborted" not in out + error
    assert "compiling" in error  # the entry was a miss


# What a kernel is compiled from


def test_sources_follow_the_imports() -> None:
    def names(module: object) -> set[str]:
        file = Path(str(module.__file__)).resolve()  # type: ignore[attr-defined]
        return {str(path.relative_to(PACKAGE.resolve())) for path in sources_of(file)}

    assert names(kernel) >= {
        "simulator/kernel.py",
        "simulator/arrivals.py",
        "simulator/dispatch.py",
        "simulator/layout.py",
        "features/columns.py",
        "features/compile.py",
        "features/reservoir_kernel.py",
        "features/rng.py",
    }
    assert names(per_flow_kernel) > names(kernel)
    assert "sharedmemory/abi.py" in names(seqlock) and "simulator/kernel.py" not in names(seqlock)


def test_every_constant_and_function_a_kernel_uses_is_of_one_of_its_sources() -> None:
    """Compiled code can only hold what is in the globals of its module."""
    for module in (kernel, per_flow_kernel, seqlock):
        sources = sources_of(Path(module.__file__).resolve())
        for value in vars(module).values():
            of = getattr(value, "__module__", None)
            if isinstance(of, str) and of.startswith("lbgym."):
                assert Path(sys.modules[of].__file__ or "").resolve() in sources, value


@pytest.mark.parametrize("place", ["features/rng.py", "elsewhere/deep/rng.py", "rng.py"])
def test_a_change_in_anything_compiled_in_is_noticed(tmp_path: Path, place: str, forked: Runner) -> None:
    """Whatever the folders are called: no name of one is known to the cache."""
    root = tmp_path / "lbgym"
    for name in ("features/__init__.py", "features/compile.py", "features/kernel_cache.py", "__init__.py", "errors.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("" if name.endswith("__init__.py") else (PACKAGE / name).read_text())
    constant, function = root / place, root / "any" / "where.py"
    for file in (constant, function):
        file.parent.mkdir(parents=True, exist_ok=True)
    module = "lbgym." + place.removesuffix(".py").replace("/", ".")
    constant.write_text("NUMBER = 1\n")
    function.write_text(
        f"from lbgym.features.compile import compiled\nfrom {module} import NUMBER\n"
        "@compiled()\ndef number():\n    return NUMBER\n"
    )
    program = "from lbgym.any.where import number; print(number(), sum(number._cache_hits.values()))"
    cache = str(tmp_path / "cache")
    assert forked(program, tmp_path, NUMBA_CACHE_DIR=cache) == ["1 0", ""]
    assert forked(program, tmp_path, NUMBA_CACHE_DIR=cache) == ["1 1", ""]
    constant.write_text("NUMBER = 2\n")
    # Python's own bytecode is told from the source by whole seconds.
    os.utime(constant, (time.time() + 2.0, time.time() + 2.0))
    assert forked(program, tmp_path, NUMBA_CACHE_DIR=cache) == ["2 0", ""]


def test_numba_keeps_the_stamp() -> None:
    """Uses what is private to Numba; should it move, this fails instead of the cache going stale unnoticed."""
    lbgym.LoadBalanceEnv().reset(seed=0)
    index = kernel.step_replicas._cache._cache_file
    index._load_index()
    assert index._source_stamp == source_stamp(Path(kernel.__file__).resolve())
    assert is_compiled(kernel.step_replicas) and is_kept(kernel.step_replicas)


# Without a compiler

EVERY_MODULE = """
import importlib, pkgutil, lbgym
optional = {"torch", "ray", "torchrl", "benchmarl", "stable_baselines3", "pettingzoo", "tensordict", "sb3_contrib",
            "matplotlib", "typer", "rich", "pyarrow", "optuna"}
for module in pkgutil.walk_packages(lbgym.__path__, "lbgym."):
    if module.name.endswith("__main__"):
        continue
    try:
        importlib.import_module(module.name)
    except ImportError as error:
        assert (error.name or "").partition(".")[0] in optional, error
"""


@pytest.mark.slow
def test_every_module_imports_with_the_compiler_disabled() -> None:
    run(["-c", EVERY_MODULE], NUMBA_DISABLE_JIT="1")


def test_shared_memory_says_that_it_needs_the_compiler() -> None:
    program = (
        "from lbgym.errors import LbgymError; from lbgym.sharedmemory import seqlock\n"
        "try:\n    seqlock.warm_up()\nexcept LbgymError as error:\n    print(error)"
    )
    assert run(["-c", program], NUMBA_DISABLE_JIT="1")[0] == (
        "shared memory needs compiled code: unset NUMBA_DISABLE_JIT"
    )


SIMULATE = """
import pickle, sys, warnings
import numpy as np
from lbgym.scenarios import *
from lbgym.simulator import FlowSimulation, Simulation, kernel

warnings.simplefilter("error")
assert hasattr(kernel.step_replicas, "py_func") == (sys.argv[1] == "compiled")
servers = (Server(cores=1, workers=2, backlog=2), Server(cores=2, speed=0.5), Server(cores=4))
events = (Event(time=0.6, kind="down", server=1), Event(time=1.0, kind="up", server=1),
          Event(time=0.8, kind="speed", server=0, value=0.5), Event(time=0.9, kind="rate", value=2.0),
          Event(time=1.2, kind="drain", server=2))
trace = Trace(np.arange(100) * 0.02, np.linspace(0.0, 0.2, 100))
workloads = {
    "exponential": Workload(load=0.9),
    "pareto": Workload(demand=BoundedPareto(), arrivals=OnOff(on=0.2, off=0.3, random=True), load=0.9),
    "lognormal": Workload(demand=Lognormal(), arrivals=Sinusoidal(amplitude=0.9, period=1.0), load=0.9),
    "mixture": Workload(demand=Hyperexponential(), arrivals=ModulatedPoisson(), load=0.9),
    "measured": Workload(demand=Empirical(values=(0.0, 0.1, 0.4)), rate=20.0),
    "trace": Workload(trace=trace),
}
found = {}
for name, workload in workloads.items():
    for rule in DISPATCH_RULES if name == "exponential" else ("sed",):
        sampling = Sampling(capacity=16, probability=0.8, algorithm="uniform" if name == "pareto" else "overwrite")
        scenario = Scenario(servers=servers, workload=workload, events=events, balancers=2, sampling=sampling)
        simulation = Simulation(scenario, dispatch=rule, record_flows=True)
        simulation.reset([5])
        snapshots = [simulation.step(np.full((1, 2, 3), [1.0, k, 0.5]), 0.5) for k in range(4)]
        intervals = [np.asarray(s.interval) for s in snapshots]
        found[name, rule] = simulation.take_flows(), [s.stats for s in snapshots], intervals
flows = FlowSimulation(Scenario(servers=servers, workload=workloads["exponential"], events=events))
flows.begin([1])
found["per flow"] = [flows.decide([k % 3]) for k in range(60)]
sys.stdout.write(pickle.dumps(found).hex())
"""


def test_the_same_simulation_with_the_compiler_disabled() -> None:
    compiled = pickle.loads(bytes.fromhex(run(["-c", SIMULATE, "compiled"])[0]))
    plain = pickle.loads(bytes.fromhex(run(["-c", SIMULATE, "plain"], NUMBA_DISABLE_JIT="1")[0]))
    assert compiled.keys() == plain.keys()
    for one, other in zip(compiled.pop("per flow"), plain.pop("per flow"), strict=True):
        assert [array.tobytes() for array in one] == [array.tobytes() for array in other]
    for key, (flows, stats, services) in compiled.items():
        assert len(flows["fct"]) > 20
        for name, column in flows.items():
            assert column.tobytes() == plain[key][0][name].tobytes(), (key, name)
        # Vector instructions add up the samples of a reservoir in another order.
        np.testing.assert_allclose(stats, plain[key][1], rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(services, plain[key][2], rtol=1e-12)


def test_the_message_names_no_numba_internals(copy_of_package: Path, loaded: Loaded) -> None:
    _, error = loaded(path=copy_of_package)
    assert not re.search(r"locator|RuntimeError|Traceback", error)
