"""A real HAProxy, as an ordinary user on loopback ports."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import cache
from pathlib import Path

from lbgym.drivers.haproxy import LOG_FORMAT
from tests.drivers.proxies import Client, Servers, eventually, free_ports, ordinary


@cache
def missing() -> str:
    """Why HAProxy cannot run here; empty if it can."""
    return "" if shutil.which("haproxy") else "haproxy is not installed (make haproxy)"


class Balancer(Client):
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
                    # HAProxy that is held up for 50 ms takes it for a failure of the server's: once is not enough.
                    line += " check inter 50ms rise 1 fall 2"
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
        # One that has only just started, or reloaded, would take the signal for nothing.
        eventually(lambda: self._answers(self._master_socket, "show proc"))
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

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self.folder)
