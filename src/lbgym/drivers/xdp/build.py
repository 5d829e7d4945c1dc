"""From ``balancer.bpf.c`` to an object that the kernel loads: :func:`build_object`, at first use, kept in a cache."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from ..base import DriverError
from ..compiled import kept_file

_HERE = Path(__file__).parent
_INCLUDE = _HERE.parents[1] / "include"
_SOURCES = (
    _HERE / "balancer.bpf.c",
    _HERE / "flows.bpf.h",
    _HERE / "dispatch.bpf.h",
    _HERE / "balancer.h",
    *(_INCLUDE / f"lbgym_{name}.h" for name in ("checksum", "dispatch", "tcp")),
)
_PACKAGES = "clang, llvm and libbpf-dev"
# The newest of these instructions, atomic ones, are of version 3.
_FLAGS = ("-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror", "-mcpu=v3")


def object_digest() -> str:
    """What the object depends on: its sources and how they are compiled."""
    digest = hashlib.sha256(repr((_FLAGS, sys.byteorder)).encode())
    for path in _SOURCES:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def build_object(*, benchmark: bool = False) -> bytes:
    """The compiled program, from the cache or by clang.

    Args:
        benchmark: with the programs that the benchmark compares it with; compiled every time.

    Raises:
        DriverError: if it has to be compiled, and clang or a header is missing, or does not compile it.
    """
    if benchmark:
        return _compile("-DBENCHMARK")
    return kept_file(f"xdp-{object_digest()[:32]}.o", _compile)[0]


def _compile(*flags: str) -> bytes:
    clang = shutil.which(os.environ.get("CLANG", "clang"))
    if clang is None:
        raise DriverError(
            f"the XDP program has to be compiled once, and there is no clang: install {_PACKAGES}, or build the object "
            "elsewhere (lbgym dataplane xdp --build FILE) and give it as --object"
        )
    system = f"/usr/include/{platform.machine()}-linux-gnu"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "balancer.bpf.o")
        command = [
            clang, *_FLAGS, *flags, "-target", "bpfel" if sys.byteorder == "little" else "bpfeb", f"-I{_INCLUDE}",
            *([f"-I{system}"] if os.path.isdir(system) else []), f"-ffile-prefix-map={_HERE}=.", "-c",
            str(_SOURCES[0]), "-o", str(out),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if "error:" in line] or done.stderr.splitlines()
            raise DriverError(
                f"clang does not compile the XDP program ({lines[0] if lines else 'no message'}); it needs {_PACKAGES}"
            )
        strip = shutil.which("llvm-strip")
        if strip is not None:
            # The kernel needs the BTF, and not the debug information it was made from.
            subprocess.run([strip, "-g", str(out)], check=False, capture_output=True)
        return out.read_bytes()
