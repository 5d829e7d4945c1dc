"""What tests of real proxies share: servers behind them, and a driver's source with a clock."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager

import numpy as np

from lbgym.drivers.proxy import ProxySource
from lbgym.sharedmemory import Publication

#: Seconds until which what must happen has happened on any machine.
LONG = 60.0


def free_ports(count: int) -> list[int]:
    """TCP ports of 127.0.0.1 that nobody has."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports: list[int] = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def eventually(condition: Callable[[], object], timeout: float = LONG) -> None:
    until = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < until, "what was waited for does not come"
        time.sleep(0.01)


def ordinary() -> dict[str, object]:
    """Arguments of ``subprocess`` that make a process of root's one of nobody's."""
    return {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 else {}


class Servers:
    """TCP servers in a thread. A client sends ``SECONDS`` and a line feed, and gets the server's name that much later;
    instead of seconds, ``break`` has the server reset the connection."""

    def __init__(self, names: Sequence[str]) -> None:
        self.ports: dict[str, int] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._servers: dict[str, asyncio.Server] = {}
        for name in names:
            self.up(name)

    def up(self, name: str) -> None:
        """Listen, on the same port as before."""

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                line = await reader.readline()
                if line == b"break\n":
                    connection = writer.get_extra_info("socket")
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    writer.transport.abort()
                    return
                await asyncio.sleep(float(line or 0))
                writer.write(name.encode())
                await writer.drain()
            except (OSError, ValueError):
                pass
            finally:
                writer.close()

        start = asyncio.start_server(serve, "127.0.0.1", self.ports.get(name, 0), backlog=1024)
        server = self._servers[name] = asyncio.run_coroutine_threadsafe(start, self._loop).result(LONG)
        self.ports[name] = server.sockets[0].getsockname()[1]

    def down(self, name: str) -> None:
        """Refuse connections; those that are open go on."""
        self._loop.call_soon_threadsafe(self._servers.pop(name).close)

    def close(self) -> None:
        for name in list(self._servers):
            self.down(name)

        async def cancel() -> None:
            for task in asyncio.all_tasks():
                if task is not asyncio.current_task():
                    task.cancel()

        asyncio.run_coroutine_threadsafe(cancel(), self._loop).result(LONG)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(LONG)
        self._loop.close()


class Driven:
    """A source with a clock."""

    def __init__(self, source: ProxySource) -> None:
        self.source, self.now = source, 0.0

    def read(self) -> Publication:
        self.now += 0.2
        seen = self.source.read(self.now)
        ended = seen.completed + seen.rejected + seen.failed
        np.testing.assert_array_equal(seen.started - ended, seen.stats[:, 0].astype(int))
        return seen

    def apply(self, *weights: float) -> None:
        self.now += 0.01
        self.source.apply(np.array(weights), self.now)

    def settled(self, started: int) -> Publication:
        """Once so many flows have been counted and none is open."""
        seen = self.read()

        def done() -> bool:
            nonlocal seen
            seen = self.read()
            return seen.started.sum() >= started and not seen.stats[:, 0].any()

        eventually(done)
        return seen


def answer(client: socket.socket) -> str:
    """Of the server that has the flow, which is over then."""
    with client:
        return client.recv(100).decode()


class Client:
    """Of a proxy that listens on a port of 127.0.0.1."""

    port: int

    def flow(self, work: object = 0) -> str:
        """The name of the server that took a flow; empty if it failed."""
        with self.open(work) as client:
            try:
                return client.recv(100).decode()
            except OSError:
                return ""

    @contextmanager
    def open(self, work: object = 0) -> Iterator[socket.socket]:
        """A flow that has begun."""
        with closing(socket.create_connection(("127.0.0.1", self.port), LONG)) as client:
            client.sendall(f"{work}\n".encode())
            yield client
