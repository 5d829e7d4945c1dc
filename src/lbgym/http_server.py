"""An HTTP server in threads of this process: :class:`HttpServer`."""

from __future__ import annotations

import socket
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class HttpServer(ThreadingHTTPServer):
    """Listens on an address of IPv4 or IPv6; its threads end with the process.

    Args:
        host: address to listen on.
        port: to listen on; 0: any free one.
        handler: of requests.

    Attributes:
        url: of its root, with the host as given.

    Raises:
        OSError: if it cannot listen there.
    """

    daemon_threads = True

    def __init__(self, host: str, port: int, handler: type[BaseHTTPRequestHandler]) -> None:
        six = ":" in host
        self.address_family = socket.AF_INET6 if six else socket.AF_INET
        super().__init__((host, port), handler)
        self.url = f"http://[{host}]:{self.server_port}/" if six else f"http://{host}:{self.server_port}/"


__all__ = ["HttpServer"]
