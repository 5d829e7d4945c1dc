"""Live regions in a browser: :class:`Dashboard`, ``lbgym dashboard``. Read only.

One thread looks at the regions and makes one text of them several times a second; every browser gets the same text as
server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html).
"""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from importlib.resources import files
from typing import Any, Self

import numpy as np

from .. import checks
from ..errors import InvalidOptionError, MissingExtraError, RegionError
from ..http_server import HttpServer
from ..monitor import RegionMonitor, RegionView
from ..sharedmemory import region_names
from ..sharedmemory.system import path_of
from .metrics import CONTENT_TYPE, exposition

logger = logging.getLogger("lbgym")

#: Seconds of totals that a browser is given when it opens the page.
HISTORY = 300.0
#: Browsers at a time; each holds a thread.
MOST_CLIENTS = 32
#: Seconds between two looks for regions that are not there yet.
_LOOK = 1.0
#: Longest time between two looks at the regions, seconds.
_GLANCE = 0.05
#: Seconds of silence after which a browser is sent a comment, so that both ends notice when the other is gone.
_KEEP_ALIVE = 5.0

_PAGES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/dashboard.css": ("dashboard.css", "text/css; charset=utf-8"),
    "/dashboard.js": ("dashboard.js", "text/javascript; charset=utf-8"),
}


def plain(value: Any) -> Any:
    """A view, or a part of it, as JSON has it: arrays as lists; None for what is not finite."""
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, np.ndarray):
        if value.dtype.kind != "f":
            return value.tolist()
        # Six digits are more than a page shows, and a third of the text.
        return [float(f"{x:.6g}") if math.isfinite(x) else None for x in value.tolist()]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return list(value) if isinstance(value, tuple) else value


def totals(view: RegionView) -> dict[str, float | None] | None:
    """What a region does as a whole: ``new`` flows/s, ``open`` flows, ``fct`` (mean, s), ``lost`` flows so far.

    None while nothing is published.
    """
    seen = view.observation
    if seen is None or view.stale:
        return None
    servers = seen.servers
    return {
        "new": None if servers.new is None else round(float(servers.new.sum()), 3),
        "open": None if servers.open is None else float(servers.open.sum()),
        "fct": None if seen.mean_fct is None else round(seen.mean_fct, 6),
        "lost": float(servers.lost.sum()) + seen.unrouted,
    }


class Dashboard:
    """Serves a page that shows live regions, until it is closed.

    It only reads, answers GET and HEAD alone, and needs nothing from the network. ``/metrics`` has the same for
    Prometheus. A region that is not there, or whose producer restarts, is waited for.

    Args:
        names: of the regions; none: all that there are, also those that appear later.
        host: address to listen on. One other than this machine's own shows the regions to whoever can reach it.
        port: to listen on; 0: any free one.
        rate: pictures per second.

    Attributes:
        url: of the page.

    Raises:
        InvalidOptionError: for a value out of its range, or if it cannot listen there.
        RegionError: for a name that no region can have.
    """

    def __init__(self, names: Sequence[str] = (), host: str = "127.0.0.1", port: int = 8080, rate: float = 4.0) -> None:
        self._period = 1.0 / checks.number("rate", rate, low=0.1, high=30.0, unit="pictures per second")
        self._names = tuple(dict.fromkeys(names))
        for name in self._names:
            path_of(name)
        self._monitors: dict[str, RegionMonitor] = {}
        self._absent: dict[str, str] = {}
        self._looked = -math.inf
        self._past: deque[dict[str, Any]] = deque()
        self._turn = threading.Condition()
        self._end = False
        self._number = 0
        self._text = b""
        self._views: list[RegionView] = []
        self._clients = 0
        package = files(__package__) / "page"
        self._pages = {path: ((package / file).read_bytes(), kind) for path, (file, kind) in _PAGES.items()}
        checks.host("host", host)
        try:
            self._server = _Server(host, checks.whole("port", port, low=0, high=65_535), self._handler())
        except OSError as error:
            raise InvalidOptionError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error
        self.url = self._server.url
        self._local = _is_loopback(host)
        self._threads = [
            threading.Thread(target=self._watch, name="lbgym-dashboard", daemon=True),
            threading.Thread(target=self._server.serve_forever, args=(0.05,), name="lbgym-dashboard-http", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    # Looking

    def _watch(self) -> None:
        due = time.monotonic()
        while not self._end:
            # A picture that is late does not have others hurry after it.
            due = max(due + self._period, time.monotonic())
            try:
                self._picture()
                while not self._end and (left := due - time.monotonic()) > 0.0:
                    with self._turn:
                        self._turn.wait_for(lambda: self._end, min(left, _GLANCE))
                    self._glance()
            except Exception:
                # The page must not freeze unnoticed; the next look may succeed.
                logger.exception("the dashboard could not look at the regions")
                with self._turn:
                    self._turn.wait_for(lambda: self._end, self._period)
        for monitor in self._monitors.values():
            monitor.close()

    def _glance(self) -> None:
        """Read what is new, so that no action is overlooked between two pictures."""
        for name, monitor in list(self._monitors.items()):
            try:
                monitor.look()
            except (RegionError, OSError) as error:
                self._monitors.pop(name).close()
                self._absent[name] = str(error)
                logger.warning("region %r: %s", name, error)

    def _picture(self) -> None:
        self._attach()
        self._glance()
        now = time.time()
        self._views = [monitor.view() for monitor in self._monitors.values()]
        sums = {view.name: total for view in self._views if (total := totals(view)) is not None}
        event = b""
        if self._clients:
            regions = [plain(view) | {"stale": view.stale} for view in self._views]
            picture = {"time": now, "regions": regions, "absent": self._absent, "totals": sums}
            event = f"data: {json.dumps(picture, allow_nan=False)}\n\n".encode()
        with self._turn:
            self._past.append({"time": now, "totals": sums})
            while now - self._past[0]["time"] > HISTORY:
                self._past.popleft()
            self._number += 1
            self._text = event
            self._turn.notify_all()

    def _attach(self) -> None:
        """Attach to the regions that are there now."""
        if time.monotonic() - self._looked < _LOOK:
            return
        self._looked = time.monotonic()
        try:
            names = self._names or tuple(region_names())
        except OSError as error:
            logger.warning("cannot look for regions: %s", error)
            return
        for name in names:
            if name in self._monitors:
                continue
            try:
                self._monitors[name] = RegionMonitor(name)
                self._absent.pop(name, None)
            except RegionError as error:
                if self._absent.get(name) != str(error):
                    logger.warning("waiting for region %r: %s", name, error)
                self._absent[name] = str(error)
        if not self._names:
            # Without a list of names, a region that was removed is no longer there to be waited for.
            for name in set(self._monitors) - set(names):
                self._monitors.pop(name).close()
            self._absent = {name: why for name, why in self._absent.items() if name in names}

    # Answering

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        dashboard = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 30.0

            def do_GET(self) -> None:
                self._answer(body=True)

            def do_HEAD(self) -> None:
                self._answer(body=False)

            def _answer(self, body: bool) -> None:
                if dashboard._local and not _is_loopback(_host_of(self.headers.get("Host", ""))):
                    # A page from elsewhere whose name was made to lead here (DNS rebinding).
                    self.send_error(HTTPStatus.FORBIDDEN, "this dashboard is for this machine only")
                    return
                path = self.path.split("?", 1)[0]
                if path == "/events":
                    self._events(body)
                elif path == "/metrics":
                    self._metrics(body)
                elif path in dashboard._pages:
                    content, kind = dashboard._pages[path]
                    self._head(kind, ("Content-Length", str(len(content))))
                    if body:
                        self.wfile.write(content)
                else:
                    self.send_error(HTTPStatus.NOT_FOUND)

            def _events(self, body: bool) -> None:
                with dashboard._turn:
                    full = dashboard._clients >= MOST_CLIENTS
                    dashboard._clients += not full
                if full:
                    self.send_error(HTTPStatus.SERVICE_UNAVAILABLE, f"{MOST_CLIENTS} browsers are connected")
                    return
                try:
                    self.close_connection = True
                    self._head("text/event-stream", ("Connection", "close"))
                    if body:
                        dashboard._send_all(self.wfile)
                except OSError:
                    pass  # the browser has gone
                finally:
                    with dashboard._turn:
                        dashboard._clients -= 1

            def _metrics(self, body: bool) -> None:
                try:
                    content = exposition(dashboard._views)
                except MissingExtraError as error:
                    self.send_error(HTTPStatus.NOT_IMPLEMENTED, explain=str(error))
                    return
                self._head(CONTENT_TYPE, ("Content-Length", str(len(content))))
                if body:
                    self.wfile.write(content)

            def _head(self, kind: str, *more: tuple[str, str]) -> None:
                self.send_response(HTTPStatus.OK)
                for name, value in (("Content-Type", kind), *_SAFE, *more):
                    self.send_header(name, value)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        return Handler

    def _send_all(self, out: Any) -> None:
        """Send what has been, and then each picture; a slow browser gets fewer of them."""
        with self._turn:
            past = list(self._past)
        sent = 0
        out.write(f"event: past\ndata: {json.dumps(past, allow_nan=False)}\n\n".encode())

        def fresher() -> bool:
            # There is no text of a picture that was made when nobody looked.
            return self._end or (self._number != sent and bool(self._text))

        while not self._end:
            with self._turn:
                fresh = self._turn.wait_for(fresher, _KEEP_ALIVE)
                sent, text = self._number, self._text
            if not self._end:
                out.write(text if fresh else b": still here\n\n")
                out.flush()

    def close(self) -> None:
        """End threads, connections and socket. Idempotent."""
        if self._end:
            return
        with self._turn:
            self._end = True
            self._turn.notify_all()
        self._server.shutdown()
        self._server.server_close()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Server(HttpServer):
    # A browser that is slow to go must not delay the end.
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.debug("a browser's connection broke", exc_info=True)


#: The page's own files alone, in no other page's frame, and never from a cache.
_SAFE = (
    ("Content-Security-Policy", "default-src 'self'; img-src data:; frame-ancestors 'none'"),
    ("X-Content-Type-Options", "nosniff"),
    ("Cache-Control", "no-store"),
)


def _host_of(header: str) -> str:
    """The host of a ``Host`` header, without port and brackets."""
    if header.startswith("["):
        return header[1:].split("]", 1)[0]
    return header.rsplit(":", 1)[0] if ":" in header else header


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
