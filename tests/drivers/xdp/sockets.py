"""A TCP server and clients in one thread each, for thousands of connections: run as a script, standard library only.

``sockets.py serve NAME PORT`` answers every line, a pause in seconds, after that pause with its name.

``sockets.py connect JSON`` keeps connections open in some lanes, one after another in each, and prints as JSON how
often each server answered, failures, and connections in which not one server answered all lines. Keys of the object:
those of :func:`connect`. SIGTERM ends it with the next answers.
"""

from __future__ import annotations

import array
import collections
import heapq
import json
import resource
import select
import signal
import socket
import struct
import sys
import time
from typing import Any

#: Seconds after which a connection has failed.
PATIENCE = 20.0
_IP_BIND_ADDRESS_NO_PORT = 24
_RESET_AT_CLOSE = struct.pack("ii", 1, 0)


def serve(name: str, port: int) -> None:
    answer = name.encode() + b"\n"
    listener = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
    listener.setblocking(False)
    poll = select.epoll()
    poll.register(listener, select.EPOLLIN)
    clients: dict[int, socket.socket] = {}
    due: list[tuple[float, int, socket.socket]] = []

    def send(client: socket.socket) -> None:
        try:
            client.send(answer)
        except OSError:
            drop(client)

    def drop(client: socket.socket) -> None:
        clients.pop(client.fileno(), None)
        client.close()

    print("ready", flush=True)
    count = 0
    while True:
        for number, _ in poll.poll(max(0.0, due[0][0] - time.monotonic()) if due else None):
            if number == listener.fileno():
                for _ in range(64):
                    try:
                        client, _address = listener.accept()
                    except OSError:
                        break
                    client.setblocking(False)
                    clients[client.fileno()] = client
                    poll.register(client, select.EPOLLIN)
                continue
            client = clients[number]
            try:
                # Clients wait for the answer before they send another line.
                line = client.recv(64)
            except OSError:
                line = b""
            if not line:
                drop(client)
            elif pause := float(line):
                count += 1
                heapq.heappush(due, (time.monotonic() + pause, count, client))
            else:
                send(client)
        while due and due[0][0] <= time.monotonic():
            client = heapq.heappop(due)[2]
            if client.fileno() >= 0:
                send(client)


class _Connection:
    __slots__ = ("begun", "left", "moved", "name", "number", "port", "socket", "up")

    def __init__(self, number: int, lines: int) -> None:
        self.number, self.left = number, lines
        self.socket: socket.socket | None = None
        self.name, self.moved, self.port = b"", False, 0
        self.begun = self.up = time.monotonic_ns()


def connect(
    host: str,
    port: int,
    connections: int,
    lanes: int = 8,
    lines: int = 2,
    pause: float = 0.0,
    sources: list[str] | None = None,
    first_port: int = 0,
    reset: bool = False,
    record: str = "",
) -> dict[str, Any]:
    """Open connections and return what came of them.

    Args:
        host: of the service.
        port: of the service.
        connections: in all.
        lanes: at the same time.
        lines: that each waits for.
        pause: of each line, seconds.
        sources: own addresses, in turn; None: the kernel's choice.
        first_port: own port of the first connection, and so on; 0: the kernel's choice.
        reset: close by RST, which leaves no TIME_WAIT.
        record: file for five int64 per connection: its number, when it was begun and was open, ns of the monotonic
            clock, the place of its server's name in ``names``, -1 if it failed, and its own port.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    question = f"{pause}\n".encode()
    poll = select.epoll()
    open_: dict[int, _Connection] = {}
    answered: collections.Counter[bytes] = collections.Counter()
    names: dict[bytes, int] = {}
    failed: list[str] = []
    rows = array.array("q")
    begun = moved = 0
    ending = False

    def begin() -> None:
        nonlocal begun
        connection = _Connection(begun, lines)
        begun += 1
        made = connection.socket = socket.socket(family, socket.SOCK_STREAM)
        made.setblocking(False)
        if reset:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_AT_CLOSE)
        if sources or first_port:
            own = first_port + connection.number if first_port else 0
            if own:
                made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            else:
                made.setsockopt(socket.IPPROTO_IP, _IP_BIND_ADDRESS_NO_PORT, 1)
            made.bind((sources[connection.number % len(sources)] if sources else "", own))
        open_[made.fileno()] = connection
        poll.register(made, select.EPOLLOUT)
        connection.begun = time.monotonic_ns()
        made.connect_ex((host, port))

    def end(connection: _Connection, problem: str = "") -> None:
        nonlocal moved
        assert connection.socket is not None
        del open_[connection.socket.fileno()]
        connection.socket.close()
        place = -1 if problem else names.setdefault(connection.name, len(names))
        rows.extend((connection.number, connection.begun, connection.up, place, connection.port))
        if problem:
            failed.append(f"{connection.name.decode()}: {problem}" if connection.name else problem)
        else:
            moved += connection.moved
            answered[connection.name] += 1

    def proceed(connection: _Connection, events: int) -> None:
        assert connection.socket is not None
        try:
            if events & select.EPOLLOUT and connection.left == lines and not connection.name:
                if error := connection.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                    raise OSError(error, "refused")
                connection.up, connection.port = time.monotonic_ns(), connection.socket.getsockname()[1]
                connection.socket.send(question)
                poll.modify(connection.socket, select.EPOLLIN)
                return
            name = connection.socket.recv(64)
            if not name:
                raise OSError("closed early")
            connection.moved |= connection.name not in (b"", name)
            connection.name = name
            connection.left -= 1
            if connection.left and not ending:
                connection.socket.send(question)
            else:
                end(connection)
        except OSError as error:
            end(connection, repr(error))

    def stop(*_: object) -> None:
        nonlocal connections, ending
        connections, ending = 0, True

    signal.signal(signal.SIGTERM, stop)
    looked = time.monotonic()
    while open_ or begun < connections:
        while len(open_) < lanes and begun < connections:
            begin()
        for number, events in poll.poll(1.0):
            proceed(open_[number], events)
        if time.monotonic() - looked > 1.0:
            looked = time.monotonic()
            limit = time.monotonic_ns() - (PATIENCE + lines * pause) * 1e9
            for connection in [one for one in open_.values() if one.begun < limit]:
                end(connection, "timeout")
    if record:
        with open(record, "wb") as file:
            rows.tofile(file)
    shown = {name.decode().strip(): count for name, count in answered.items()}
    return {"answered": shown, "failed": failed, "moved": moved, "names": [name.decode().strip() for name in names]}


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    if sys.argv[1] == "serve":
        serve(sys.argv[2], int(sys.argv[3]))
    else:
        print(json.dumps(connect(**json.loads(sys.argv[2]))), flush=True)
