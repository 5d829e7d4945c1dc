"""Standard output that says so when it cannot be written, and that can print any text."""

from __future__ import annotations

import codecs
import io
import os
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

#: ``filename`` of an OSError from writing to standard output.
STANDARD_OUTPUT = "<stdout>"

#: In place of characters that we print and ASCII does not have; as wide as they are, so that tables stay straight.
_PLAIN = {
    **dict.fromkeys("┌┐└┘├┤┬┴┼╭╮╯╰", "+"),
    **dict.fromkeys("─━═╌╶╴", "-"),
    **dict.fromkeys("│┃║", "|"),
    "±": "~",
    "−": "-",
    "×": "x",
    "µ": "u",
    "…": ".",
    "²": "2",
    "Σ": "S",
    "█": "#",
}


@contextmanager
def standard_streams() -> Iterator[None]:
    """Streams that a command can rely on, whatever the process was started with.

    * A stream that is missing, as after ``>&-``, gets a stand-in: the next file that is opened would otherwise have
      its number, and what is printed. Writing to that of standard output fails as it would without one; errors go
      nowhere.
    * An OSError in writing to standard output has :data:`STANDARD_OUTPUT` as its filename. The text that it was about
      is dropped, or Python would try again, and complain, as it exits.
    * Text that the encoding does not have is printed as well as it can be: never a reason to lose a result.
    """
    before = sys.stdin, sys.stdout, sys.stderr
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115
    if sys.stdout is None:
        # Open for reading only, so that writing fails with EBADF.
        sys.stdout = _wrapped(os.open(os.devnull, os.O_RDONLY), "utf-8", False)
    elif sys.stdout is sys.__stdout__ and isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.flush()
        sys.stdout = _wrapped(sys.stdout.fileno(), sys.stdout.encoding, sys.stdout.line_buffering)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    try:
        yield
    finally:
        sys.stdin, sys.stdout, sys.stderr = before


def _wrapped(descriptor: int, encoding: str, line_buffering: bool) -> io.TextIOWrapper:
    codecs.register_error("lbgym.plain", _plain)
    raw = _Output(descriptor, "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding, errors="lbgym.plain", line_buffering=line_buffering, write_through=False
    )


class _Output(io.FileIO):
    """A file that names standard output when it cannot be written, and takes everything from then on."""

    _broken = False

    def write(self, data: Any, /) -> int:
        if self._broken:
            return memoryview(data).nbytes
        try:
            return super().write(data)
        except OSError as error:
            self._broken = True
            if isinstance(error, BrokenPipeError):
                raise
            raise OSError(error.errno, error.strerror, STANDARD_OUTPUT) from None


def _plain(error: UnicodeError) -> tuple[str | bytes, int]:
    """Handler of encoding errors: the nearest text that can be printed; bytes of file names as they are."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    if 0xDC80 <= ord(character) <= 0xDCFF:
        return bytes([ord(character) - 0xDC00]), error.start + 1
    text = _PLAIN.get(character) or unicodedata.normalize("NFKD", character)
    return "".join(c for c in text if ord(c) < 128) or "?", error.start + 1
