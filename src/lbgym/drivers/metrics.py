"""What happens to a driver, for Prometheus: :class:`DriverMetrics`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..metrics_page import MetricsPage
from .base import Source
from .loop import Publisher

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

_COUNTERS = {
    "failures": ("lbgym_driver_failures", "Times that the data plane did not answer, or did not take weights."),
    "slips": ("lbgym_driver_late_publications", "Publications that were more than an interval late."),
}
#: What sources count, by the names of ``Source.counts``.
_OF_A_SOURCE = {
    "lost_log_lines": ("lbgym_driver_lost_log_lines", "Log lines of the data plane that have not come."),
    "refused_updates": ("lbgym_driver_refused_updates", "Servers and weights that a client of xDS has refused (NACK)."),
}


class DriverMetrics(MetricsPage):
    """Prometheus metrics of a driver; what it observes of its data planes is on the page of ``lbgym dashboard``.

    Args:
        publisher: the driver's loop.
        sources: its data planes, by region.
        port, address: of the page.

    Raises:
        MissingExtraError, InvalidOptionError: as :class:`~lbgym.metrics_page.MetricsPage`.
    """

    def __init__(self, publisher: Publisher, sources: Mapping[str, Source], port: int, address: str) -> None:
        super().__init__(port, address)
        self.registry.register(_Collector(publisher, sources))


class _Collector:
    def __init__(self, publisher: Publisher, sources: Mapping[str, Source]) -> None:
        self._publisher, self._sources = publisher, dict(sources)

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily

        for name, (metric, text) in _COUNTERS.items():
            yield CounterMetricFamily(metric, text, getattr(self._publisher, name))
        counts = {region: source.counts() for region, source in self._sources.items()}
        for name, (metric, text) in _OF_A_SOURCE.items():
            family: Any = CounterMetricFamily(metric, text, labels=["region"])
            for region, of in counts.items():
                if name in of:
                    family.add_metric([region], of[name])
            yield family


__all__ = ["DriverMetrics"]
