"""The command line under way, for reports that say how they were made."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

_given: ContextVar[tuple[str, ...]] = ContextVar("given", default=())


@contextmanager
def running(arguments: Sequence[str]) -> Iterator[None]:
    """Note the arguments for :func:`command_line`."""
    token = _given.set(tuple(arguments))
    try:
        yield
    finally:
        _given.reset(token)


def command_line() -> str:
    """The command as a shell takes it."""
    return shlex.join(["lbgym", *_given.get()])
