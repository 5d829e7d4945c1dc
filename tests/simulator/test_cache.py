"""The kernel's cache on disk: it must notice a change in any file that is compiled into it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import lbgym
from lbgym.features.compile import _sources
from lbgym.simulator import kernel
from lbgym.simulator._cache import is_compiled

DIGEST = "from lbgym.features.compile import _sources; print(_sources({package!r}))"


def digest_of(folder: Path, package: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", DIGEST.format(package=package)],
        cwd=folder,
        env={"PYTHONPATH": str(folder)},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.decode().strip()


def test_the_digest_follows_every_source(tmp_path: Path) -> None:
    package = Path(lbgym.__file__).parent
    shutil.copytree(package, tmp_path / "lbgym", ignore=shutil.ignore_patterns("__pycache__"))
    packages = ("simulator", "sharedmemory")
    before = {name: digest_of(tmp_path, name) for name in packages}
    assert before == {name: _sources(name) for name in packages}
    assert _sources("features") == _sources("simulator") != _sources("sharedmemory")
    for name, of in (
        ("features/rng.py", {"simulator"}),
        ("simulator/dispatch.py", {"simulator"}),
        ("sharedmemory/seqlock.py", {"sharedmemory"}),
        ("features/compile.py", {"simulator", "sharedmemory"}),
    ):
        file = tmp_path / "lbgym" / name
        file.write_text(file.read_text() + "\n# changed\n")
        after = {package: digest_of(tmp_path, package) for package in packages}
        assert {package for package in packages if after[package] != before[package]} == of, name
        before = after


def test_numba_keeps_the_digest_as_its_stamp() -> None:
    """Uses what is private to Numba; should it move, this fails instead of the cache going stale unnoticed."""
    assert kernel.step_replicas._cache._cache_file._source_stamp == _sources("simulator")


def test_a_compiled_kernel_is_known_to_be_on_disk() -> None:
    lbgym.LoadBalanceEnv().reset(seed=0)
    assert is_compiled()
