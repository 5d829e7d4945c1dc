"""An agent on a server that answers with its ground truth: :class:`ServerAgent`, ``lbgym server-agent``.

CPU and memory use are measured by psutil, busy workers read from the status page of Apache (``mod_status``) or NGINX
(``stub_status``) on the same machine.
"""

from __future__ import annotations

import http.client
import json
import logging
import re
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler
from typing import Any, Self
from urllib.parse import urlsplit

from .. import checks
from ..errors import InvalidOptionError, MissingExtraError
from ..http_server import HttpServer
from .base import DriverError

logger = logging.getLogger("lbgym")

#: Bytes of a status page that are read.
_LONGEST = 1 << 16
#: `Busy workers` of Apache's machine-readable page, `Active connections` and `Waiting` of NGINX's.
_APACHE = re.compile(rb"^BusyWorkers: (\d+)\s*$", re.MULTILINE)
_NGINX = re.compile(rb"^Active connections: (\d+)\b.*?\bWaiting: (\d+)\b", re.MULTILINE | re.DOTALL)


def busy_workers(page: bytes) -> int:
    """Workers that serve a request, from a status page; NGINX counts connections, of which those that wait are idle.

    Raises:
        DriverError: if it is neither of Apache (its URL must end in ``?auto``) nor of NGINX.
    """
    if found := _APACHE.search(page):
        return int(found[1])
    if found := _NGINX.search(page):
        return max(0, int(found[1]) - int(found[2]))
    raise DriverError(
        "the status page is neither Apache's machine-readable one (server-status?auto) nor NGINX's (stub_status)"
    )


def _check_status(url: str) -> None:
    """Refuse a URL that no HTTP client can ask, of whatever server.

    Raises:
        InvalidOptionError: with the URL.
    """
    try:
        parts = urlsplit(url)
        # A bad port is found out where it is read.
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        good = False
    if not good or "@" in parts.netloc or " " in url or not (url.isascii() and url.isprintable()):
        raise InvalidOptionError(
            f"status must be the http URL of a status page, such as http://localhost/server-status?auto, got {url!r}"
        )
    checks.host("the host of status", parts.hostname)


class ServerAgent:
    """Measures in the background, and answers each GET with the last measurement as JSON.

    What cannot be measured is null: busy workers without a status page, or while it does not answer.

    Args:
        host: address to listen on.
        port: to listen on; 0: any free one.
        status: URL of the status page; None: there is none.
        interval: seconds between measurements; CPU use is the mean over one.

    Attributes:
        port: that it listens on.
        url: that it answers at.

    Raises:
        MissingExtraError: if psutil is not installed.
        InvalidOptionError: for a value out of its range.
        DriverError: if it cannot listen there.
    """

    def __init__(
        self, host: str = "0.0.0.0", port: int = 9101, status: str | None = None, interval: float = 0.2
    ) -> None:
        try:
            import psutil
        except ImportError:
            raise MissingExtraError("psutil", "server-agent", "lbgym server-agent") from None
        self._psutil: Any = psutil
        checks.host("host", host)
        self._interval = checks.seconds("interval", interval, low=0.01, high=3600.0)
        if status is not None:
            _check_status(status)
        self._status = status
        self._silent = False
        self._end = threading.Event()
        self._busy_ticks = self._cpu_ticks()
        self._answer = json.dumps(self._measure()).encode()
        try:
            self._server = HttpServer(host, checks.whole("port", port, low=0, high=65_535), self._handler())
        except OSError as error:
            raise DriverError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error
        self.port, self.url = int(self._server.server_port), self._server.url
        self._threads = [
            threading.Thread(target=self._run, name="lbgym-server-agent", daemon=True),
            threading.Thread(
                target=self._server.serve_forever, args=(0.05,), name="lbgym-server-agent-http", daemon=True
            ),
        ]
        for thread in self._threads:
            thread.start()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        agent = self

        class Handler(BaseHTTPRequestHandler):
            timeout = 5.0

            def do_GET(self) -> None:
                body = agent._answer
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        return Handler

    def _run(self) -> None:
        due = time.monotonic() + self._interval
        while not self._end.wait(max(0.0, due - time.monotonic())):
            self._answer = json.dumps(self._measure()).encode()
            due = max(due + self._interval, time.monotonic())

    def _cpu_ticks(self) -> tuple[float, float]:
        """Busy and all CPU time of this machine so far, seconds."""
        times = self._psutil.cpu_times()
        total = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
        return total - times.idle - getattr(times, "iowait", 0.0), total

    def _measure(self) -> dict[str, float | int | None]:
        before, now = self._busy_ticks, self._cpu_ticks()
        passed = now[1] - before[1]
        cpu = None
        # The kernel counts in hundredths of a second; over fewer than two there is nothing to divide by.
        if passed > 0.0:
            cpu = min(1.0, max(0.0, (now[0] - before[0]) / passed))
            self._busy_ticks = now
        return {
            "cpu_usage": cpu,
            "memory_usage": min(1.0, self._psutil.virtual_memory().percent / 100.0),
            "busy_workers": self._busy(),
            "time": time.time(),
        }

    def _busy(self) -> int | None:
        if self._status is None:
            return None
        try:
            with urllib.request.urlopen(self._status, timeout=max(0.1, self._interval)) as page:
                count = busy_workers(page.read(_LONGEST))
        except (OSError, http.client.HTTPException, ValueError, DriverError) as error:
            if not self._silent:
                logger.warning("no busy workers from %s: %s", self._status, error)
            self._silent = True
            return None
        self._silent = False
        return count

    def close(self) -> None:
        """End threads and socket. Idempotent."""
        if not self._end.is_set():
            self._end.set()
            self._server.shutdown()
            self._server.server_close()
            for thread in self._threads:
                thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
