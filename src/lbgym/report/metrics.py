"""The regions' metrics for Prometheus, from the data planes' side: there whether an agent runs or not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import MissingExtraError
from ..monitor import STATE_NAMES, RegionView

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

#: Content type of the text below.
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def exposition(views: Sequence[RegionView]) -> bytes:
    """The views in Prometheus' text format.

    Raises:
        MissingExtraError: without prometheus-client.
    """
    try:
        from prometheus_client import CollectorRegistry, generate_latest
    except ImportError:
        raise MissingExtraError("prometheus_client", "run", "metrics of regions") from None
    registry = CollectorRegistry()
    registry.register(_Views(views))
    return generate_latest(registry)


class _Views:
    def __init__(self, views: Sequence[RegionView]) -> None:
        self._views = views

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        families: dict[str, Any] = {}

        def add(kind: type, name: str, text: str, value: float | None, **labels: str) -> None:
            """A sample; what is unknown has none."""
            if value is None or not math.isfinite(value):
                return
            if name not in families:
                families[name] = kind(name, text, labels=list(labels))
            families[name].add_metric(list(labels.values()), float(value))

        for view in self._views:
            region = view.name
            add(
                GaugeMetricFamily,
                "lbgym_region_producer_up",
                "1 while the data plane publishes.",
                view.producer == "alive" and view.silent is None,
                region=region,
            )
            add(
                GaugeMetricFamily,
                "lbgym_region_agent_up",
                "1 while an agent is attached.",
                view.agent == "alive",
                region=region,
            )
            seen = view.observation
            if seen is None or view.stale:
                # Values of a data plane that has ended would look like those of one that lives.
                continue
            add(
                GaugeMetricFamily,
                "lbgym_region_safe_weights",
                "1 while the safe weights are in force.",
                seen.safe,
                region=region,
            )
            add(
                CounterMetricFamily,
                "lbgym_region_unrouted_flows",
                "Flows that found no server.",
                seen.unrouted,
                region=region,
            )
            servers = seen.servers
            for j, server in enumerate(servers.labels):
                of = {"region": region, "server": server}
                for kind, name, text, values in (
                    (GaugeMetricFamily, "active", "1: the server takes new flows.", servers.active),
                    (GaugeMetricFamily, "weight", "Weight in force.", servers.weights),
                    (GaugeMetricFamily, "open_flows", "Open flows.", servers.open),
                    (GaugeMetricFamily, "fct_seconds", "Mean FCT, recent flows counting more.", servers.fct),
                    (GaugeMetricFamily, "fct_p90_seconds", "90th percentile of the FCT, likewise.", servers.fct_p90),
                    (GaugeMetricFamily, "cpu_usage", "CPU use, 0 to 1.", servers.cpu),
                    (CounterMetricFamily, "completed_flows", "Flows that ended.", servers.completed),
                    (CounterMetricFamily, "lost_flows", "Flows that failed or were refused.", servers.lost),
                ):
                    add(kind, f"lbgym_region_server_{name}", text, None if values is None else values[j], **of)
                for state in STATE_NAMES:
                    add(
                        GaugeMetricFamily,
                        "lbgym_region_server_state",
                        "1: the server is in this state.",
                        servers.states[j] == state,
                        **of,
                        state=state,
                    )
        yield from families.values()
