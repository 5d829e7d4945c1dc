"""The control socket of a running driver: ``lbgym dataplane ctl``.

A Unix socket beside the region, for its owner alone (mode 0600). A request and its answer are one line of JSON each.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import selectors
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .. import checks
from ..errors import LbgymError
from ..sharedmemory import system
from .base import DriverError

logger = logging.getLogger("lbgym")

#: Bytes of a request.
_LONGEST = 1 << 20
#: Bytes of a path that a socket can have (sun_path without its terminating zero).
_PATH = 107
#: Most that :func:`control` waits, seconds.
_DAY = 86_400.0
#: Connections served at once; more wait in the backlog.
_CLIENTS = 16

Handler = Callable[[Mapping[str, Any]], Mapping[str, Any]]


def control_path(name: str) -> Path:
    """The socket of a region's driver.

    Raises:
        RegionError: for a name that no region can have.
    """
    path = system.path_of(name)
    return path.with_name(f"{path.name}.ctl")


class ControlServer:
    """The driver's end: answers requests when :meth:`poll` is called, and never waits for a client.

    Only the producer of a region, whose lock it holds, makes one: a socket that is there already is a dead driver's.

    Args:
        name: of the region.
        handler: answers a request; an LbgymError it raises becomes the answer's ``error``.

    Raises:
        DriverError: if the socket cannot be made.
    """

    def __init__(self, name: str, handler: Handler) -> None:
        self.path = control_path(name)
        self._handler = handler
        self._clients: dict[socket.socket, bytearray] = {}
        if len(os.fsencode(self.path)) > _PATH:
            raise DriverError(
                f"no control socket for region {name!r}: the path {self.path} has more than {_PATH} bytes"
            )
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # The mode is that of the socket's inode, so that the file never shows with another one.
            os.fchmod(self._listener.fileno(), 0o600)
            self.path.unlink(missing_ok=True)
            self._listener.bind(str(self.path))
            self._listener.listen()
            self._listener.setblocking(False)
            status = os.lstat(self.path)
        except OSError as error:
            self._listener.close()
            raise DriverError(f"cannot make the control socket {self.path}: {error.strerror}") from error
        self._identity = status.st_dev, status.st_ino
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)

    def poll(self) -> None:
        """Answer what has come since the last call."""
        for key, _ in self._selector.select(0):
            if key.fileobj is self._listener:
                self._accept()
            else:
                assert isinstance(key.fileobj, socket.socket)
                self._read(key.fileobj)

    def _accept(self) -> None:
        if len(self._clients) >= _CLIENTS:
            self._drop(next(iter(self._clients)))
        with contextlib.suppress(OSError):
            client, _ = self._listener.accept()
            client.setblocking(False)
            self._clients[client] = bytearray()
            self._selector.register(client, selectors.EVENT_READ)

    def _read(self, client: socket.socket) -> None:
        buffer = self._clients[client]
        try:
            part = client.recv(65_536)
        except OSError:
            part = b""
        buffer += part
        if b"\n" in buffer:
            answer = json.dumps(self._answer(bytes(buffer).partition(b"\n")[0])).encode() + b"\n"
            with contextlib.suppress(OSError):
                # A client reads its answer at once; one that does not is cut off.
                client.settimeout(1.0)
                client.sendall(answer)
        elif part and len(buffer) <= _LONGEST:
            return
        self._drop(client)

    def _answer(self, line: bytes) -> Mapping[str, Any]:
        try:
            request = json.loads(line)
            if not isinstance(request, dict):
                raise ValueError("no object")
        except (ValueError, RecursionError):
            return {"error": "a request is one JSON object on a line"}
        try:
            return self._handler(request)
        except LbgymError as error:
            return {"error": str(error)}

    def _drop(self, client: socket.socket) -> None:
        self._selector.unregister(client)
        del self._clients[client]
        client.close()

    def close(self) -> None:
        """Close and remove the socket, unless another driver has taken its place. Idempotent."""
        for client in list(self._clients):
            self._drop(client)
        if self._listener.fileno() < 0:
            return
        self._selector.close()
        self._listener.close()
        with contextlib.suppress(OSError):
            status = os.lstat(self.path)
            if (status.st_dev, status.st_ino) == self._identity:
                self.path.unlink()


def control(name: str, request: Mapping[str, Any], timeout: float = 10.0) -> dict[str, Any]:
    """Ask the driver of region ``name`` and return its answer.

    Args:
        name: of the region.
        request: ``op`` ("list", "add", "drain", "undrain", "remove", "reload") and what it needs.
        timeout: seconds to wait for the answer, above 0 and at most 86,400.

    Raises:
        InvalidOptionError: for another timeout.
        DriverError: if there is no driver with a control socket, it does not answer in time, or it refuses.
    """
    checks.seconds("timeout", timeout, high=_DAY)
    path = control_path(name)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(timeout)
        try:
            client.connect(str(path))
            client.sendall(json.dumps(dict(request)).encode() + b"\n")
            data = bytearray()
            # A list of servers is as long as there are servers.
            while not data.endswith(b"\n"):
                part = client.recv(65_536)
                if not part:
                    break
                data += part
        except (FileNotFoundError, ConnectionRefusedError):
            raise DriverError(f"no driver with a control socket runs for region {name!r} ({path})") from None
        except TimeoutError:
            raise DriverError(f"the driver of region {name!r} did not answer within {timeout:g} s") from None
        except OSError as error:
            raise DriverError(f"cannot use the control socket {path}: {error.strerror or error}") from error
    try:
        answer = json.loads(data)
    except ValueError:
        raise DriverError(f"the driver of region {name!r} ended before it answered") from None
    if "error" in answer:
        raise DriverError(str(answer["error"]))
    return dict(answer)
