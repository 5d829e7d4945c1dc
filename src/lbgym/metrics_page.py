"""The page that Prometheus reads a process' metrics from: :class:`MetricsPage`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import checks
from .errors import InvalidOptionError, MissingExtraError

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry


class MetricsPage:
    """Serves a registry of its own over HTTP, in threads of its own.

    Args:
        port: 0: any free one.
        address: to serve on.

    Attributes:
        registry: of the metrics.
        url: of the page.

    Raises:
        MissingExtraError: without prometheus-client.
        InvalidOptionError: if the address cannot be served on, as when the port is taken.
    """

    def __init__(self, port: int, address: str) -> None:
        try:
            from prometheus_client import CollectorRegistry, start_http_server
        except ImportError:
            raise MissingExtraError("prometheus_client", "run", "--metrics-port") from None
        checks.host("--metrics-address", address)
        self.registry: CollectorRegistry = CollectorRegistry()
        try:
            self._server, self._thread = start_http_server(port, address, self.registry)
        except OSError as error:
            raise InvalidOptionError(
                f"cannot serve metrics on {address} port {port}: {error.strerror or error}; choose another "
                "--metrics-port or --metrics-address"
            ) from None
        host = f"[{address}]" if ":" in address else address
        self.url = f"http://{host}:{self._server.server_port}/metrics"

    def close(self) -> None:
        """Stop serving; idempotent."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


__all__ = ["MetricsPage"]
