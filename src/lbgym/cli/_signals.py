"""SIGINT, SIGTERM and SIGHUP: every command ends in order on all three, as on Ctrl-C.

``main`` runs every command under :func:`interruptible`: the first signal raises :class:`Interrupted` wherever the main
thread is. A command with a loop that can end by itself uses :func:`stop_on_signal` inside it: the first signal only
sets an event, the second raises :class:`Interrupted`. One more signal ends the process at once in either case.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

#: Signals that ask a process to end.
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

#: A signal that follows another within so many seconds is the same request: ``timeout``, ``make`` and service managers
#: signal a process and then its whole group, and Ctrl-C in a terminal reaches both a wrapper and the command.
SAME_REQUEST = 1.0

_Handler = Callable[[int, FrameType | None], None]


class Interrupted(KeyboardInterrupt):
    """A signal asked the process to end; whatever handles Ctrl-C handles it.

    Attributes:
        signum: the signal.
        exit_code: 128 + ``signum``, as a shell reports it; 0 if a signal is how the command is meant to end.
    """

    def __init__(self, signum: int, exit_code: int | None = None) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum
        self.exit_code = 128 + signum if exit_code is None else exit_code


class Stop(threading.Event):
    """An event that a signal handler may set.

    ``threading.Event.set`` may not be called there: it takes a lock that the interrupted ``wait`` may hold.

    Attributes:
        signum: the signal that set it; None if none did.
        raises: the first signal also raises :class:`Interrupted`; True for as long as nothing looks at the event.
        then: called by the handler of the first signal, to wake up what waits for something else.
    """

    def __init__(self) -> None:
        super().__init__()
        self.signum: int | None = None
        self.raises = False
        self.then: Callable[[], None] | None = None
        self._stopped = False
        self._gate = threading.Lock()
        self._gate.acquire()

    def set(self) -> None:
        if not self._stopped:
            self._stopped = True
            self._gate.release()

    def clear(self) -> None:
        raise NotImplementedError("a request to stop cannot be withdrawn")

    def is_set(self) -> bool:
        return self._stopped

    def wait(self, timeout: float | None = None) -> bool:
        if not self._stopped and self._gate.acquire(timeout=-1 if timeout is None else max(0.0, timeout)):
            self._gate.release()  # for whoever else waits
        return self._stopped


@contextmanager
def interruptible() -> Iterator[None]:
    """The first signal raises :class:`Interrupted` in the main thread; the second ends the process at once."""

    def interrupt(number: int, _frame: FrameType | None) -> None:
        _install(_AtOnce())
        raise Interrupted(number)

    before = _install(interrupt)
    try:
        yield
    finally:
        _restore(before)


@contextmanager
def stop_on_signal(*, expected: bool = False, patience: bool = True) -> Iterator[Stop]:
    """The first signal sets an event, the second raises :class:`Interrupted`, the third ends the process at once.

    Args:
        expected: a signal is how the command is meant to end: exit code 0 if the first one raises.
        patience: False: the second signal ends the process at once, where code of the user's may swallow exceptions.
    """
    stop = Stop()
    first = 0.0

    def handle(number: int, _frame: FrameType | None) -> None:
        nonlocal first
        if not stop.is_set():
            first = time.monotonic()
            stop.signum = number
            stop.set()
            if stop.raises:
                _install(_AtOnce())
                raise Interrupted(number, 0 if expected else None)
            if stop.then is not None:
                stop.then()
        elif time.monotonic() - first > SAME_REQUEST:
            if not patience:
                os._exit(128 + number)
            _install(_AtOnce())
            raise Interrupted(number)

    before = _install(handle)
    try:
        yield stop
    finally:
        # Once Interrupted is on its way, the next signal ends the process, whatever it is busy with.
        if not isinstance(signal.getsignal(signal.SIGTERM), _AtOnce):
            _restore(before)


class _AtOnce:
    """Ends the process at once, but not for the signal that was just handled."""

    def __init__(self) -> None:
        self._since = time.monotonic()

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if time.monotonic() - self._since > SAME_REQUEST:
            os._exit(128 + number)


def _install(handler: _Handler) -> dict[signal.Signals, signal._HANDLER]:
    """Install a handler and return the former ones; nothing outside the main thread, where Python allows none."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    # A process that was started with SIGHUP ignored, as by nohup, goes on ignoring it.
    wanted = [n for n in ENDING if n is not signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in wanted}


def _restore(handlers: dict[signal.Signals, signal._HANDLER]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
