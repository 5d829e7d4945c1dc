"""What the XDP driver says where something is missing; each in a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lbgym.drivers import DriverError
from lbgym.drivers.xdp import build, libbpf

ARGUMENTS = ("--name", "edge", "--vip", "10.0.0.100:80", "--server", "a=10.0.0.1:80", "--interface", "lo")


def xdp(*prefix: str, arguments: tuple[str, ...] = ARGUMENTS, **environment: str) -> str:
    """The one line of a driver that is refused."""
    command = [*prefix, sys.executable, "-m", "lbgym", "dataplane", "xdp", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert (done.returncode, done.stdout) == (2, "") or done.returncode == 1, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


def test_no_clang_and_no_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CLANG", "clang-that-is-not-there")
    with pytest.raises(DriverError, match=r"there is no clang: install clang, .*--build FILE.*--object"):
        build.build_object()


def test_libbpf_is_missing_or_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, **_: object) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    for load, message in (
        (missing, "libbpf.so.1 is not installed: install libbpf1"),
        (lambda *_, **__: object(), "libbpf.so.1 has no libbpf_set_print: version 1.0 or newer is needed"),
    ):
        monkeypatch.setattr(libbpf.ctypes, "CDLL", load)
        with pytest.raises(DriverError, match=message):
            libbpf.library.__wrapped__()


@pytest.mark.skipif(shutil.which("clang") is None, reason="no clang here")
def test_the_object_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    content = build.build_object()
    assert [path.read_bytes() for path in (tmp_path / "lbgym").iterdir()] == [content]
    monkeypatch.setenv("CLANG", "clang-that-is-not-there")
    assert build.build_object() == content
    # A home that cannot be written costs time only.
    monkeypatch.delenv("CLANG")
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert build.build_object() == content


def test_capabilities_are_named() -> None:
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("no setpriv, or not root")
    said = xdp("setpriv", "--bounding-set=-perfmon,-sys_admin", "--inh-caps=-perfmon,-sys_admin")
    assert "an XDP balancer needs CAP_PERFMON, which this process has not" in said


def test_options_that_do_not_go_together() -> None:
    assert "give --config, or --name, --vip, --server and --interface" in xdp(arguments=())
    # The file has them: they are not silently left aside.
    both = ("--config", "dataplane.toml", "--rule", "lsq", "--capacity", "8")
    assert "--rule, --capacity: set these in the file of --config" in xdp(arguments=both)
    assert "give --vip, --interface, or --config" in xdp(arguments=("--name", "edge", "--server", "a=10.0.0.1:80"))
