"""A real HAProxy, as an ordinary user on loopback ports, and servers behind it."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path

from lbgym.drivers.haproxy import LOG_FORMAT

#: Seconds until which what must happen has happened on any machine.
LONG = 60.0


@cache
def missing() -> str:
    """Why HAProxy cannot run here; empty if it can."""
    return "" if shutil.which("haproxy") else "haproxy is not installed (make haproxy)"


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


class Balancer:
    """HAProxy in master-worker mode in a folder of its own; ``configure`` and ``reload`` change it.

    Attributes:
        socket: path of its stats socket.
        log: HOST:PORT that it logs to.
        agent_port: that its servers' agent-checks ask, with ``agents``.
        master: the process that takes signals; None: not started.
    """

    def __init__(self, servers: Servers) -> None:
        self.servers = servers
        # Not pytest's folder, which is for its user alone.
        self.folder = Path(tempfile.mkdtemp(prefix="lbgym-haproxy-"))
        self.folder.chmod(0o777)
        self.socket, self._master_socket = str(self.folder / "admin.sock"), str(self.folder / "master.sock")
        self.port, log, self.agent_port = free_ports(3)
        self.log = f"127.0.0.1:{log}"
        self.master: subprocess.Popen[str] | None = None

    def configure(
        self,
        backends: Mapping[str, Sequence[str]],
        *,
        rule: str = "roundrobin",
        weights: Mapping[str, int] | None = None,
        check: bool = False,
        agents: bool = False,
        level: str = "admin",
        log: str | None = None,
        more: str = "",
        ports: Mapping[str, int] | None = None,
    ) -> None:
        """Write the configuration: every frontend's port follows the first one's."""
        lines = [
            "global",
            f"  stats socket {self.socket} mode 600 level {level} expose-fd listeners",
            "  hard-stop-after 30s",
            f"  log {log or self.log} format raw local0",
            "defaults",
            "  mode tcp",
            "  log global",
            "  timeout connect 1s",
            "  timeout client 60s",
            "  timeout server 60s",
            "  timeout queue 60s",
            "  retries 1",
        ]
        for i, (backend, names) in enumerate(backends.items()):
            if i == 0:
                lines += [
                    f"frontend front-{backend}",
                    f"  bind 127.0.0.1:{self.port}",
                    f'  log-format "{LOG_FORMAT}"',
                    f"  default_backend {backend}",
                ]
            lines += [f"backend {backend}", f"  balance {rule}"]
            for name in names:
                port = (ports or {}).get(name, self.servers.ports.get(name))
                line = f"  server {name} 127.0.0.1:{port} weight {(weights or {}).get(name, 100)}"
                if check:
                    line += " check inter 50ms rise 1 fall 1"
                if agents:
                    line += (
                        f" agent-check agent-addr 127.0.0.1 agent-port {self.agent_port} agent-inter 100ms"
                        f' agent-send "{backend}/{name}\\n"'
                    )
                lines.append(line)
            if more:
                lines.append(more)
        (self.folder / "haproxy.cfg").write_text("\n".join(lines) + "\n")

    def start(self) -> None:
        self.master = subprocess.Popen(
            ["haproxy", "-W", "-S", self._master_socket, "-f", "haproxy.cfg"],
            cwd=self.folder,
            stderr=subprocess.DEVNULL,
            text=True,
            **ordinary(),
        )  # type: ignore[call-overload]
        # A master that is not ready yet would take SIGUSR2 for nothing.
        eventually(lambda: self._answers(self._master_socket, "show proc"))
        eventually(lambda: self._answers(self.socket, "show info"))

    def _answers(self, place: str, command: str) -> str:
        try:
            return self.ask(command, place)
        except OSError:
            return ""

    def reload(self) -> None:
        """As ``systemctl reload``: returns when another process has taken over."""
        before = self.ask("show info").partition("Pid: ")[2].split()[0]
        assert self.master is not None
        self.master.send_signal(signal.SIGUSR2)
        eventually(
            lambda: "Pid: " in (found := self._answers(self.socket, "show info")) and f"Pid: {before}\n" not in found
        )

    def kill(self) -> None:
        """Kill all processes for real."""
        if self.master is not None:
            subprocess.run(["pkill", "-KILL", "-P", str(self.master.pid)], check=False)
            self.master.kill()
            self.master.wait()
            self.master = None

    def ask(self, command: str, place: str | None = None) -> str:
        """One command of the runtime API."""
        with closing(socket.socket(socket.AF_UNIX)) as client:
            client.settimeout(5.0)
            client.connect(place or self.socket)
            client.sendall(command.encode() + b"\n")
            answer = b""
            # The master goes on to the next command after an empty line.
            while not answer.endswith(b"\n\n") and (part := client.recv(1 << 16)):
                answer += part
        return answer.decode()

    def weights(self, backend: str = "web") -> dict[str, int]:
        """As HAProxy has them."""
        rows = [line.split() for line in self.ask(f"show servers state {backend}").splitlines()[2:] if line]
        return {row[3]: int(row[7]) for row in rows}

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

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self.folder)
