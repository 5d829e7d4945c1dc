"""Calls to the operating system: files in shared memory, locks that die with their holder, futexes (Linux)."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import re
import struct
import sys
from functools import cache
from pathlib import Path

from ..errors import RegionError

#: Environment variable that names another directory for regions, such as a tmpfs that containers share.
DIRECTORY_VARIABLE = "LBGYM_SHM_DIR"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_FUTEX_WAIT, _FUTEX_WAKE = 0, 1
#: Seconds; an infinite wait would not fit the system's clock.
_LONGEST_WAIT = 1e6
_SYS_FUTEX = {"x86_64": 202, "aarch64": 98, "riscv64": 98, "loongarch64": 98}.get(platform.machine())
# short type, short whence, off_t start, off_t length, pid_t pid, padding
_FLOCK = struct.Struct("hhqqi4x")


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


@cache
def _syscall() -> ctypes._NamedFuncPointer:
    function = ctypes.CDLL(None, use_errno=True).syscall
    function.restype = ctypes.c_long
    return function


def directory() -> Path:
    """The folder of regions: /dev/shm, or that of the environment variable ``LBGYM_SHM_DIR``."""
    return Path(os.environ.get(DIRECTORY_VARIABLE) or "/dev/shm")


def path_of(name: str) -> Path:
    """The file of a region.

    Raises:
        RegionError: unless the name is a plain file name of letters, digits, dot, hyphen and underscore.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RegionError(
            "the name of a region has 1 to 200 letters, digits, '.', '-' or '_' and begins with a letter or digit, "
            f"got {name!r}"
        )
    return directory() / name


def require_linux() -> None:
    """Raise RegionError on systems without futexes or open file description locks."""
    if not sys.platform.startswith("linux") or _SYS_FUTEX is None:
        raise RegionError(
            f"shared memory regions need Linux on x86-64 or arm64, this is {sys.platform} on {platform.machine()}"
        )


class Futex:
    """A 32-bit word in shared memory that processes wait on.

    Args:
        address: of the word.
    """

    def __init__(self, address: int) -> None:
        self._address = ctypes.c_void_p(address)
        self._call = _syscall()
        self._number = ctypes.c_long(_SYS_FUTEX or 0)
        self._timeout = _Timespec()
        self._timeout_pointer = ctypes.byref(self._timeout)

    def wait(self, value: int, timeout: float) -> None:
        """Sleep while the word is ``value``, at most ``timeout`` seconds; may wake early, as at a signal."""
        nanoseconds = max(0, int(min(timeout, _LONGEST_WAIT) * 1e9))
        self._timeout.seconds, self._timeout.nanoseconds = divmod(nanoseconds, 1_000_000_000)
        self._call(
            self._number, self._address, ctypes.c_int(_FUTEX_WAIT), ctypes.c_uint32(value), self._timeout_pointer,
            None, ctypes.c_int(0),
        )  # fmt: skip

    def wake(self) -> None:
        """Wake all waiters."""
        self._call(
            self._number, self._address, ctypes.c_int(_FUTEX_WAKE), ctypes.c_int(0x7FFFFFFF), None, None,
            ctypes.c_int(0),
        )  # fmt: skip


def try_lock(descriptor: int, byte: int) -> bool:
    """Take the lock at a byte of a file for this open file description; false if another holds it.

    The kernel drops it when the last copy of the descriptor is closed, however the process ends.
    """
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def unlock(descriptor: int, byte: int) -> None:
    """Release a lock."""
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, byte, 1, 0))


def is_locked(descriptor: int, byte: int) -> bool:
    """True if another open file description holds the lock at a byte."""
    answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def unnamed_file(folder: Path, size: int, mode: int, group: int) -> int:
    """Open a new file of ``size`` bytes without a name, so that nothing is left behind if the process dies now.

    Raises:
        OSError: from the system; ENOSPC if there is no room for all of it.
    """
    descriptor = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        # Reserved now: a write to a page that a full file system cannot provide would kill the process later.
        os.posix_fallocate(descriptor, 0, size)
        if group >= 0:
            os.fchown(descriptor, -1, group)
        os.fchmod(descriptor, mode)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def give_name(descriptor: int, path: Path) -> None:
    """Link an unnamed file to a path.

    Raises:
        FileExistsError: if the path exists.
    """
    # linkat with AT_SYMLINK_FOLLOW; os.link without a descriptor would call link, which does not follow.
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.link(f"/proc/self/fd/{descriptor}", path.name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=True)
    finally:
        os.close(folder)
