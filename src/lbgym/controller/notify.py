"""Notify a service manager by the protocol of systemd's ``sd_notify``."""

from __future__ import annotations

import contextlib
import os
import socket


class Notifier:
    """Sends states to the socket of ``$NOTIFY_SOCKET``; does nothing without one.

    Args:
        address: of the socket, an absolute path or, with a leading "@", an abstract name; None: ``$NOTIFY_SOCKET``.
    """

    def __init__(self, address: str | None = None) -> None:
        address = os.environ.get("NOTIFY_SOCKET", "") if address is None else address
        self._socket: socket.socket | None = None
        if address[:1] in ("/", "@"):
            self._address = "\0" + address[1:] if address[0] == "@" else address
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)

    def notify(self, *states: str) -> None:
        """Send states such as ``READY=1``; a manager that does not listen is no error."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.sendto("\n".join(states).encode(), self._address)

    def close(self) -> None:
        """Idempotent."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
