"""The core under AddressSanitizer, UndefinedBehaviorSanitizer, ThreadSanitizer and libFuzzer."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from lbgym.drivers import DriverError
from lbgym.drivers.afpacket.build import compiler, source_folder
from lbgym.sharedmemory import get_include
from tests.privileges import skip_if

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
SOURCES = [source_folder() / f"{name}.c" for name in ("core", "parse", "tables", "worker")]
FLAGS = ["-std=c11", "-ffp-contract=off", "-D_GNU_SOURCE", "-O1", "-g", "-fno-omit-frame-pointer", "-Wall", "-Werror"]


def include_flags() -> list[str]:
    """Where the headers are."""
    return [f"-I{source_folder()}", f"-I{get_include()}"]


def unavailable(reason: str) -> None:
    skip_if(reason, "the core under its sanitizers")


def build(command: list[str], name: str, folder: Path, *sanitizers: str, more: Sequence[Path] = ()) -> Path:
    """A program of this folder with the core and ``more``; skipped where there is no such sanitizer, but not in CI."""
    out = folder / name
    flags = [f"-fsanitize={','.join(sanitizers)}", "-fno-sanitize-recover=all"]
    done = subprocess.run(
        [*command, *FLAGS, *flags, *include_flags(), "-o", str(out),
         str(HERE / f"{name}.c"), *map(str, [*SOURCES, *more]), "-lm", "-lpthread"],
        capture_output=True,
        text=True,
    )  # fmt: skip
    if done.returncode != 0:
        assert "sanitize" in done.stderr or "cannot find" in done.stderr, done.stderr
        unavailable(f"{command[0]} has no {' and '.join(sanitizers)} sanitizer here: {done.stderr.splitlines()[0]}")
    return out


@pytest.fixture(scope="module")
def cc() -> list[str]:
    try:
        return compiler()
    except DriverError as error:
        unavailable(str(error))
        raise


def run(program: Path, *arguments: object) -> None:
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, timeout=300, env=environment)
    if "unexpected memory mapping" in done.stderr:
        # Older sanitizers do not know kernels with many bits of randomised addresses.
        done = subprocess.run(
            ["setarch", "-R", program, *map(str, arguments)], capture_output=True, text=True, timeout=300,
            env=environment,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


def test_random_traffic_reads_and_writes_what_is_its_own(cc: list[str], tmp_path: Path) -> None:
    run(build(cc, "traffic", tmp_path, "address", "undefined"), 1, 800)


def test_workers_and_publisher_do_not_race(cc: list[str], tmp_path: Path) -> None:
    run(build(cc, "threads", tmp_path, "thread"), 80)


def test_the_parser_takes_whatever_comes(tmp_path: Path) -> None:
    clang = shutil.which("clang")
    if clang is None:
        unavailable("no clang for libFuzzer")
    assert clang is not None
    program = build([clang], "fuzz", tmp_path, "fuzzer", "address", "undefined")
    found = tmp_path / "found"
    found.mkdir()
    # What was found is kept for this run only; the corpus has a packet of every kind.
    run(program, "-runs=12000", "-seed=1", "-max_len=256", f"-artifact_prefix={tmp_path}/", found, CORPUS)
