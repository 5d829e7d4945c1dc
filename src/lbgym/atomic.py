"""Files that are either whole or not there: written beside their place under another name, then renamed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from .errors import FileWriteError, LbgymError


@contextmanager
def whole_file(path: Path, mode: int | None = None) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place if the block ends without an exception.

    Otherwise, the file that was there before stays as it is. The temporary path ends as ``path`` does, since some
    libraries choose the format by it.

    Args:
        path: of the file.
        mode: its permissions; None: those of any new file.

    Raises:
        FileWriteError: if the system refuses (no space, no permission, no such folder), with its reason.
    """
    with _named(path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
        os.close(handle)
    temporary = Path(name)
    try:
        with _named(path):
            yield temporary
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
            # mkstemp makes files private to the user; the result is as readable as any other new file
            temporary.chmod(0o666 & ~_umask() if mode is None else mode)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file through a stream; see :func:`whole_file`."""
    with whole_file(path) as temporary, temporary.open("wb") as stream:
        write(stream)


def check_writable(path: Path) -> None:
    """Find out before the work starts whether ``path`` can be written: make its folder and a file in it.

    Raises:
        FileWriteError: if not.
    """
    with _named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        with tempfile.TemporaryFile(dir=path.parent):
            pass


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn the system's errors into one sentence about ``path``."""
    try:
        yield
    except LbgymError:
        raise
    except OSError as error:
        raise FileWriteError(f"cannot write {path}: {error.strerror or error}") from error


def _umask() -> int:
    # reading the mask means setting it: to the strictest, as other threads may make files meanwhile
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
