"""From the C sources of the balancer core to a shared library: :func:`build_library`, at first use, kept in a cache."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..base import DriverError
from ..compiled import kept_file

_INCLUDE = Path(__file__).parents[2] / "include"
_SOURCES = ("afpacket.c", "core.c", "parse.c", "tables.c", "worker.c")
_FLAGS = ("-std=c11", "-ffp-contract=off", "-D_GNU_SOURCE", "-O3", "-g", "-fPIC")


def source_folder() -> Path:
    """Where the sources are: in an installed package beside this file, in a checkout in plugins/."""
    installed = Path(__file__).parent / "balancer-core"
    return installed if installed.is_dir() else Path(__file__).parents[4] / "plugins" / "balancer-core"


def library_digest(flags: Sequence[str] = ()) -> str:
    """What the library depends on: its sources and how they are compiled."""
    folder = source_folder()
    digest = hashlib.sha256(repr((_FLAGS, tuple(flags), platform.machine(), os.environ.get("CC"))).encode())
    for path in sorted([*folder.glob("*.[ch]"), *_INCLUDE.glob("*.h")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def build_library(flags: Sequence[str] = ()) -> ctypes.CDLL:
    """The core and the raw sockets around it, loaded.

    Args:
        flags: further ones of the compiler.

    Raises:
        DriverError: if it has to be compiled, and there is no C compiler, or it does not compile it.
    """
    content, kept = kept_file(f"core-{library_digest(flags)[:32]}.so", lambda: compile_library(flags))
    if kept is not None:
        return ctypes.CDLL(str(kept))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "core.so")
        path.write_bytes(content)
        return ctypes.CDLL(str(path))


def compile_library(flags: Sequence[str] = ()) -> bytes:
    """The content of the shared library."""
    command = compiler()
    folder = source_folder()
    with tempfile.TemporaryDirectory() as out:
        path = Path(out, "core.so")
        sources = [str(folder / name) for name in _SOURCES]
        done = subprocess.run(
            [
                *command, *_FLAGS, *flags, f"-I{_INCLUDE}", f"-ffile-prefix-map={folder}=.", "-shared", "-o", str(path),
                *sources, "-lm", "-lpthread",
            ],
            capture_output=True,
            text=True,
        )  # fmt: skip
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
            raise DriverError(f"{command[0]} does not compile the balancer: {lines[0] if lines else 'no message'}")
        return path.read_bytes()


def compiler() -> list[str]:
    """The command of the C compiler: ``$CC``, or the first that there is of cc, gcc and clang.

    Raises:
        DriverError: if there is none.
    """
    if chosen := os.environ.get("CC"):
        return shlex.split(chosen)
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return [name]
    raise DriverError("the balancer has to be compiled once, and there is no C compiler: install gcc, or set CC")
