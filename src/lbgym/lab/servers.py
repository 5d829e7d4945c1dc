"""The servers of a laboratory, by kind: :class:`ServerKind` and its registry."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from .. import checks

#: Header of an answer with the name of the server that gave it.
HEADER = "X-Server"
PORT = 80
#: Workers and backlog of a server of which the scenario states none.
WORKERS, BACKLOG = 64, 511
_USER = "www-data"


@dataclass(frozen=True, slots=True)
class Instance:
    """One server.

    Attributes:
        name: that it answers with.
        folder: of its own, for configuration, logs and content.
        workers: requests served at once.
        backlog: connections that wait beyond them.
        cores: CPUs that it can use at once.
    """

    name: str
    folder: Path
    workers: int
    backlog: int
    cores: int


class ServerKind(Protocol):
    """A kind of server whose requests demand a chosen amount of work.

    Attributes:
        unit: what an amount counts, for people.
        most: largest amount of a request.
        status: path of a page with the number of busy workers.
    """

    unit: str
    most: int
    status: str

    def missing(self) -> str:
        """A sentence on what must be installed; empty if nothing."""

    def prepare(self, server: Instance) -> list[str]:
        """Write its configuration and content; returns the command that runs it in the foreground."""

    def request(self, amount: int) -> bytes:
        """An HTTP request for so much work, on a connection of its own."""


#: Loops until the process has used so many microseconds of CPU time more. A fixed number of iterations, as MARLLB's
#: servers have, takes up to twice the CPU time while neighbours are busy, on the same host or in its caches.
_WORK = """<?php
function used() {
    $usage = getrusage();
    return 1000000 * ($usage['ru_utime.tv_sec'] + $usage['ru_stime.tv_sec'])
        + $usage['ru_utime.tv_usec'] + $usage['ru_stime.tv_usec'];
}
$x = 0;
for ($end = used() + (int) ($_GET['n'] ?? 0); used() < $end; ) {
    for ($i = 0; $i < 1000; $i++) { $x = ($x * 31 + $i) & 0xffff; }
}
echo $x, "\\n";
"""


class ApachePhp:
    """Apache with mpm_prefork and PHP, as MARLLB's servers: a loop that uses so much CPU time.

    All workers are started at the beginning, since Apache else adds one per second when the load rises.
    """

    unit = "microseconds of CPU time"
    most = 1 << 40
    status = "/server-status?auto"
    _modules = Path("/usr/lib/apache2/modules")

    def _php(self) -> Path | None:
        return next(iter(sorted(self._modules.glob("libphp*.so"))), None)

    def missing(self) -> str:
        if shutil.which("apache2") is None or not (self._modules / "mod_mpm_prefork.so").exists():
            return "no Apache here: install apache2 and libapache2-mod-php"
        return "" if self._php() else "Apache has no PHP here: install libapache2-mod-php"

    def prepare(self, server: Instance) -> list[str]:
        folder, workers = server.folder, server.workers
        content = folder / "www"
        content.mkdir(exist_ok=True)
        (content / "work.php").write_text(_WORK)
        modules = {
            "mpm_prefork_module": "mod_mpm_prefork.so",
            "authz_core_module": "mod_authz_core.so",
            "headers_module": "mod_headers.so",
            "mime_module": "mod_mime.so",
            "status_module": "mod_status.so",
            "php_module": self._php(),
        }
        lines = [
            f'ServerRoot "{folder}"',
            f'DefaultRuntimeDir "{folder}"',
            f'PidFile "{folder}/pid"',
            f'ErrorLog "{folder}/error.log"',
            f'DocumentRoot "{content}"',
            f"ServerName {server.name}",
            f"Listen 0.0.0.0:{PORT}",
            f"ListenBacklog {server.backlog}",
            *(f"LoadModule {name} {self._modules / str(file)}" for name, file in modules.items()),
            "TypesConfig /dev/null",
            f"User {_USER}",
            f"Group {_USER}",
            "KeepAlive Off",
            "Timeout 600",
            *(f"{key} {workers}" for key in ("ServerLimit", "MaxRequestWorkers", "StartServers")),
            f"MinSpareServers {workers}",
            f"MaxSpareServers {workers + 1}",
            "MaxConnectionsPerChild 0",
            f'Header always set {HEADER} "{server.name}"',
            r'<FilesMatch "\.php$">',
            "SetHandler application/x-httpd-php",
            "</FilesMatch>",
            "php_admin_value max_execution_time 0",
            "<Location /server-status>",
            "SetHandler server-status",
            "</Location>",
        ]
        file = folder / "apache.conf"
        file.write_text("\n".join(lines) + "\n")
        return ["apache2", "-D", "FOREGROUND", "-f", str(file)]

    def request(self, amount: int) -> bytes:
        return f"GET /work.php?n={amount} HTTP/1.0\r\nHost: lab\r\n\r\n".encode()


class Nginx:
    """NGINX and one large file, of which a request asks for so many bytes."""

    unit = "bytes of a file"
    most = 1 << 30
    status = "/status"

    def missing(self) -> str:
        return "" if shutil.which("nginx") else "no NGINX here: install nginx-light"

    def prepare(self, server: Instance) -> list[str]:
        folder = server.folder
        content = folder / "www"
        content.mkdir(exist_ok=True)
        with (content / "file").open("wb") as stream:
            stream.truncate(self.most)  # sparse: it takes no room
        temporary = "".join(
            f"{key}_temp_path {folder}/{key};" for key in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        file = folder / "nginx.conf"
        # More connections than it accepts at once wait in its backlog; every worker process is one core's.
        file.write_text(
            f"user {_USER}; daemon off; pid {folder}/pid; error_log {folder}/error.log;\n"
            f"worker_processes {server.cores}; worker_rlimit_nofile 8192;\n"
            "events { worker_connections 4096; }\n"
            f"http {{ access_log off; keepalive_timeout 0; sendfile off; {temporary}\n"
            f"server {{ listen 0.0.0.0:{PORT} backlog={server.backlog}; root {content};\n"
            f'add_header {HEADER} "{server.name}" always;\n'
            f"location = {self.status} {{ stub_status; }} }} }}\n"
        )
        return ["nginx", "-c", str(file), "-e", f"{folder}/error.log"]

    def request(self, amount: int) -> bytes:
        # A range has at least one byte.
        last = max(0, min(amount, self.most) - 1)
        return f"GET /file HTTP/1.0\r\nHost: lab\r\nRange: bytes=0-{last}\r\n\r\n".encode()


#: Every kind of server by its name.
SERVER_KINDS: Mapping[str, ServerKind] = MappingProxyType({"apache-php": ApachePhp(), "nginx": Nginx()})


def server_kind(name: str) -> ServerKind:
    """A kind of server by its name.

    Raises:
        UnknownNameError: for another name.
    """
    return SERVER_KINDS[checks.choice("kind of server", name, SERVER_KINDS)]


def open_to_workers(folder: Path) -> None:
    """Let a server's workers, who are not root, read its folder whatever the umask."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    os.chmod(folder.parent, 0o755)
