"""A server of xDS, state of the world: :class:`XdsServer`, and a cluster's servers by it: :class:`XdsDelivery`."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import logging
import socket
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import MissingExtraError
from ..background import BackgroundLoop
from ..base import DriverError
from ..proxy import shown
from ..sharing import Shared
from .access_log import LogService
from .delivery import Delivery

logger = logging.getLogger("lbgym")

_TYPES = "type.googleapis.com/envoy.config."
EDS = f"{_TYPES}endpoint.v3.ClusterLoadAssignment"
CDS = f"{_TYPES}cluster.v3.Cluster"
LDS = f"{_TYPES}listener.v3.Listener"
#: Types for which asking for nothing means asking for all.
_WILDCARD = (CDS, LDS)
_SERVICES = "envoy.service."
#: Methods by service, with the one type that they are of; None: of all.
_METHODS = {
    f"{_SERVICES}discovery.v3.AggregatedDiscoveryService": ("StreamAggregatedResources", None),
    f"{_SERVICES}endpoint.v3.EndpointDiscoveryService": ("StreamEndpoints", EDS),
    f"{_SERVICES}cluster.v3.ClusterDiscoveryService": ("StreamClusters", CDS),
    f"{_SERVICES}listener.v3.ListenerDiscoveryService": ("StreamListeners", LDS),
}
#: Seconds to wait for the start and the end of the server.
_TIMEOUT = 5.0


@dataclass(slots=True)
class _Subscription:
    """What a client has asked for of one type.

    Attributes:
        names: of resources; empty: all, where the type has that.
        nonce: of the last response.
        version: sent last; 0: none yet.
        waiting: it has not been answered by the client.
        due: the client has asked for something else since.
        refusal: what the client has against it; empty if nothing.
        refused: the client had something against the last one that it has answered.
    """

    names: tuple[str, ...] = ()
    nonce: str = ""
    version: int = 0
    waiting: bool = False
    due: bool = True
    refusal: str = ""
    refused: bool = False


@dataclass(slots=True, eq=False)
class _Client:
    """A stream.

    Attributes:
        name: of the client's node, with its kind.
        grpc: it is a client of gRPC's own, not an Envoy.
        subscriptions: by type.
        changed: there may be something to send.
        ended: there are no more requests.
    """

    name: str = "?"
    grpc: bool = False
    subscriptions: dict[str, _Subscription] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    ended: bool = False


class XdsServer(Shared):
    """Serves the endpoints of clusters to Envoys, and all that gRPC's own clients need, in a thread of its own.

    EDS, over ADS or its own service, carries the weights. LDS, with the route, and CDS are for gRPC's clients:
    ``xds:///NAME`` leads to cluster NAME. They know no weights of endpoints, but of localities, so each server is a
    locality to them.

    Args:
        place: host and TCP port to listen on.
        log: an access log service to offer there, too; None: none.
        xds: False: offer the log alone.
        expected: endpoints that will be published; who asks for them earlier gets its answer then.

    Raises:
        MissingExtraError: without grpcio or xds-protos.
        DriverError: if it cannot listen there.
    """

    def __init__(
        self,
        place: tuple[str, int],
        log: LogService | None = None,
        *,
        xds: bool = True,
        expected: Iterable[str] = (),
    ) -> None:
        try:
            import grpc
            from envoy.service.discovery.v3 import discovery_pb2
        except ImportError as error:
            raise MissingExtraError(error.name or "grpc", "envoy", "Envoy's xDS or gRPC access log") from None
        self._messages = discovery_pb2
        self.place = place
        self._changed = threading.Condition()
        #: By type: version, and resources by name, as messages for Envoy and for gRPC's clients.
        self._versions: dict[str, int] = dict.fromkeys((EDS, CDS, LDS), 1)
        self._resources: dict[str, dict[str, tuple[Any, Any]]] = {kind: {} for kind in self._versions}
        self._clients: set[_Client] = set()
        self._expected, self._unknown = frozenset(expected), set[str]()
        #: By type and name of the resource: how often a client has refused it.
        self._refusals: Counter[tuple[str, str]] = Counter()
        _check_free(place)
        handlers = [self._handler(grpc, service, *method) for service, method in _METHODS.items()] if xds else []
        if log is not None:
            handlers.append(_log_handler(grpc, log))
        self._loop = BackgroundLoop("lbgym-xds")
        try:
            self._server = self._loop.run(_start(place, handlers), _TIMEOUT)
        except BaseException:
            self._loop.close()
            raise

    def _handler(self, grpc: Any, service: str, method: str, kind: str | None) -> Any:
        async def serve(requests: AsyncIterator[Any], context: Any) -> None:
            await self._serve(requests, context, kind)

        return grpc.method_handlers_generic_handler(
            service,
            {
                method: grpc.stream_stream_rpc_method_handler(
                    serve,
                    request_deserializer=self._messages.DiscoveryRequest.FromString,
                    response_serializer=self._messages.DiscoveryResponse.SerializeToString,
                )
            },
        )

    # From the driver's thread

    def publish(self, assignment: Mapping[str, Any], cluster: str) -> None:
        """Serve endpoints, a ClusterLoadAssignment in JSON's form, from now on.

        Args:
            assignment: the endpoints.
            cluster: name of the cluster, as gRPC's clients know it.
        """
        from envoy.config.endpoint.v3.endpoint_pb2 import ClusterLoadAssignment

        resource = assignment["cluster_name"]
        endpoints = _message(ClusterLoadAssignment, assignment), _message(ClusterLoadAssignment, _by_server(assignment))
        resources = {EDS: {resource: endpoints}, **_for_grpc(cluster, resource)}
        self._loop.call(lambda: self._set(resources))

    def subscribers(self, resource: str) -> list[tuple[str, str]]:
        """Each client of some endpoints, and what it has against those served last; empty if nothing."""
        with self._changed:
            return sorted((client.name, subscription.refusal) for client, subscription in self._subscriptions(resource))

    def refusals(self, resources: Mapping[str, str]) -> int:
        """How often clients have refused resources, each given by its type."""
        with self._changed:
            return sum(self._refusals[kind, name] for kind, name in resources.items())

    def settled(self, resource: str) -> bool:
        """True if all clients of some endpoints have answered to those served last."""
        with self._changed:
            return all(
                not subscription.waiting and subscription.version == self._versions[EDS]
                for _, subscription in self._subscriptions(resource)
            )

    def await_change(self, timeout: float) -> None:
        """Wait until a client answers."""
        with self._changed:
            self._changed.wait(timeout)

    def flush(self) -> None:
        """Until everything that was published before is on its way."""

        async def nothing() -> None:
            pass

        self._loop.run(nothing(), _TIMEOUT)

    def _subscriptions(self, resource: str) -> list[tuple[_Client, _Subscription]]:
        return [
            (client, subscription)
            for client in self._clients
            if (subscription := client.subscriptions.get(EDS)) is not None and resource in subscription.names
        ]

    # In the server's thread

    def _set(self, resources: Mapping[str, Mapping[str, tuple[Any, Any]]]) -> None:
        with self._changed:
            for kind, some in resources.items():
                if any(self._resources[kind].get(name) != values for name, values in some.items()):
                    self._resources[kind].update(some)
                    self._versions[kind] += 1
        for client in self._clients:
            client.changed.set()

    async def _serve(self, requests: AsyncIterator[Any], context: Any, kind: str | None) -> None:
        client = _Client()
        with self._changed:
            self._clients.add(client)
        reader = asyncio.create_task(self._read(requests, client, kind))
        try:
            while not client.ended:
                for response in self._due(client):
                    await context.write(response)
                await client.changed.wait()
                client.changed.clear()
        finally:
            reader.cancel()
            with self._changed:
                self._clients.discard(client)
                self._changed.notify_all()

    async def _read(self, requests: AsyncIterator[Any], client: _Client, kind: str | None) -> None:
        try:
            async for request in requests:
                self._take(client, request, kind or request.type_url)
                client.changed.set()
        except asyncio.CancelledError:
            raise
        except Exception as error:
            # A client that goes as it likes must not end the others.
            logger.debug("xDS client %s: %s", client.name, error)
        finally:
            client.ended = True
            client.changed.set()

    def _take(self, client: _Client, request: Any, kind: str) -> None:
        if request.node.id or request.node.user_agent_name:
            client.grpc = request.node.user_agent_name.startswith("gRPC")
            client.name = f"{'gRPC client' if client.grpc else 'Envoy'} {request.node.id!r}"
        if kind not in self._versions:
            return
        with self._changed:
            subscription = client.subscriptions.get(kind)
            names = tuple(request.resource_names)
            if subscription is None:
                subscription = client.subscriptions[kind] = _Subscription(names)
            elif request.response_nonce != subscription.nonce:
                # It has crossed our last response, to which there will be an answer.
                return
            else:
                subscription.waiting = False
                subscription.refusal = _refusal(request)
                if subscription.refusal:
                    self._refusals.update((kind, name) for name in subscription.names or self._resources[kind])
                subscription.due |= set(names) != set(subscription.names)
                subscription.names = names
            before, subscription.refused = subscription.refused, bool(subscription.refusal)
            self._changed.notify_all()
        if subscription.refused and not before:
            logger.error("%s refuses %s: %s", client.name, kind.rpartition(".")[2], _sentence(subscription.refusal))
        if kind == EDS:
            for name in set(names) - set(self._resources[EDS]) - self._expected - self._unknown:
                self._unknown.add(name)
                logger.warning("%s asks for the servers of cluster %r, which are not served here", client.name, name)

    def _due(self, client: _Client) -> list[Any]:
        responses = []
        with self._changed:
            for kind, subscription in client.subscriptions.items():
                version = self._versions[kind]
                # One after the other: what a client has not answered yet is not overtaken.
                if not subscription.due and (subscription.waiting or subscription.version == version):
                    continue
                mine = self._resources[kind]
                names = subscription.names or (tuple(mine) if kind in _WILDCARD else ())
                if kind == EDS and not self._expected.isdisjoint(names) and mine.keys().isdisjoint(names):
                    # An Envoy that is told of no servers refuses flows; one that is told nothing yet waits.
                    continue
                response = self._messages.DiscoveryResponse(
                    version_info=str(version), type_url=kind, nonce=f"{version}-{time.monotonic_ns()}"
                )
                for name in names:
                    # Listeners and clusters of gRPC's are of no use to an Envoy, which has its own.
                    if name in mine and (kind == EDS or client.grpc):
                        response.resources.add().Pack(mine[name][client.grpc])
                subscription.nonce, subscription.version = response.nonce, version
                subscription.waiting, subscription.due, subscription.refusal = True, False, ""
                responses.append(response)
        return responses

    # The end

    def _stop(self) -> None:
        if self._loop.closed:
            return
        with contextlib.suppress(TimeoutError):
            self._loop.run(self._server.stop(0.1), _TIMEOUT)
        self._loop.close()


async def _start(place: tuple[str, int], handlers: list[Any]) -> Any:
    import grpc

    # Two drivers must not share a port, as gRPC would have it.
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers(tuple(handlers))
    try:
        server.add_insecure_port(shown(place))
    except RuntimeError as error:
        raise DriverError(f"cannot serve Envoy at {shown(place)}: {_sentence(str(error))}") from None
    await server.start()
    return server


def _check_free(place: tuple[str, int]) -> None:
    """Say in the system's words why a port cannot be listened on; gRPC only says that it cannot."""
    with socket.socket(socket.AF_INET6 if ":" in place[0] else socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
            probe.listen()
        except OSError as error:
            raise DriverError(f"cannot serve Envoy at {shown(place)}: {error.strerror or error}") from error


def _log_handler(grpc: Any, log: LogService) -> Any:
    from envoy.service.accesslog.v3 import als_pb2

    return grpc.method_handlers_generic_handler(
        f"{_SERVICES}accesslog.v3.AccessLogService",
        {
            "StreamAccessLogs": grpc.stream_unary_rpc_method_handler(
                log.stream,
                request_deserializer=als_pb2.StreamAccessLogsMessage.FromString,
                response_serializer=als_pb2.StreamAccessLogsResponse.SerializeToString,
            )
        },
    )


def _refusal(request: Any) -> str:
    """What a client has against the response that it answers; empty if nothing."""
    if not request.HasField("error_detail"):
        return ""
    return request.error_detail.message or f"it gives no reason (code {request.error_detail.code})"


def _sentence(text: str) -> str:
    return " ".join(text.split())


def _message(kind: Any, value: Mapping[str, Any]) -> Any:
    """A message from JSON's form.

    Raises:
        DriverError: if it has none.
    """
    from google.protobuf import json_format

    try:
        return json_format.ParseDict(dict(value), kind(), ignore_unknown_fields=True)
    except (json_format.ParseError, TypeError) as error:
        raise DriverError(f"cluster {value.get('cluster_name')!r}: {_sentence(str(error))}") from None


def _by_server(assignment: Mapping[str, Any]) -> dict[str, Any]:
    """The same endpoints, each a locality of its own, whose weight is that of the endpoint."""
    groups = []
    for group in assignment["endpoints"]:
        for entry in group["lb_endpoints"]:
            entry = copy.deepcopy(entry)
            place = entry["endpoint"].get("hostname") or str(entry["endpoint"]["address"])
            locality = {**group.get("locality", {}), "sub_zone": place}
            weight = entry["load_balancing_weight"]
            groups.append({"locality": locality, "load_balancing_weight": weight, "lb_endpoints": [entry]})
    return {"cluster_name": assignment["cluster_name"], "endpoints": groups}


def _for_grpc(cluster: str, resource: str) -> dict[str, dict[str, tuple[Any, Any]]]:
    """A cluster, and the listener with a route that leads to it."""
    from envoy.config.cluster.v3.cluster_pb2 import Cluster

    # Imported for what a listener of gRPC's holds.
    from envoy.config.listener.v3.listener_pb2 import Listener
    from envoy.extensions.filters.http.router.v3 import router_pb2  # noqa: F401
    from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2  # noqa: F401

    source = {"ads": {}, "resource_api_version": "V3"}
    found = _message(
        Cluster,
        {
            "name": cluster,
            "type": "EDS",
            "eds_cluster_config": {"eds_config": source, "service_name": resource},
            "lb_policy": "ROUND_ROBIN",
        },
    )
    extensions = "type.googleapis.com/envoy.extensions.filters"
    listener = _message(
        Listener,
        {
            "name": cluster,
            "api_listener": {
                "api_listener": {
                    "@type": f"{extensions}.network.http_connection_manager.v3.HttpConnectionManager",
                    "route_config": {
                        "name": cluster,
                        "virtual_hosts": [
                            {
                                "name": cluster,
                                "domains": ["*"],
                                "routes": [{"match": {"prefix": ""}, "route": {"cluster": cluster}}],
                            }
                        ],
                    },
                    "http_filters": [
                        {"name": "router", "typed_config": {"@type": f"{extensions}.http.router.v3.Router"}}
                    ],
                }
            },
        },
    )
    return {CDS: {cluster: (found, found)}, LDS: {cluster: (listener, listener)}}


class XdsDelivery(Delivery):
    """The servers of a cluster by xDS; the file that has them is only read.

    Args:
        file: with the servers.
        resource: name of the cluster's endpoints.
        server: of xDS, shared.
        cluster: its name.
    """

    way = "xDS"

    def __init__(self, file: str | Path, resource: str, server: XdsServer, cluster: str) -> None:
        super().__init__(file, resource)
        self._server, self._cluster = server.share(), cluster
        self._delivered: dict[str, Any] | None = None

    def deliver(self, weights: Mapping[str, int]) -> bool:
        value = self.assignment.delivered(weights, self.removed)
        if value == self._delivered:
            return False
        self._server.publish(value, self._cluster)
        self._server.flush()
        self._delivered = value
        return True

    @property
    def subscribers(self) -> int:
        """Clients that have asked for the servers."""
        return len(self._server.subscribers(self.assignment.resource))

    def refusal(self) -> str:
        refusals = self._server.subscribers(self.assignment.resource)
        return "; ".join(f"{name} refuses them: {_sentence(text)}" for name, text in refusals if text)

    @property
    def refusals(self) -> int:
        return self._server.refusals({EDS: self.assignment.resource, CDS: self._cluster, LDS: self._cluster})

    def await_answers(self, timeout: float) -> None:
        until = time.monotonic() + timeout
        while not self._server.settled(self.assignment.resource) and (left := until - time.monotonic()) > 0.0:
            self._server.await_change(left)

    def close(self) -> None:
        self._server.close()


__all__ = ["XdsDelivery", "XdsServer"]
