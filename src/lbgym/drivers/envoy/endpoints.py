"""The servers of a cluster as EDS states them: :class:`Assignment`."""

from __future__ import annotations

import copy
import ipaddress
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import LbgymError, MissingExtraError
from ..base import DriverError
from ..config import ServerConfig, read_servers

#: What a ClusterLoadAssignment is called in a file.
TYPE = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"
#: Largest weight; far below 2^32 - 1, which is Envoy's bound on the sum of a locality's.
MAX_WEIGHT = 1_000_000
#: Metadata of an endpoint whose weight or state is another than its operator's.
_MARK = "lbgym"
#: States of EDS in which a server takes no flows, and its connections go on.
DRAINING = "DRAINING"
_DOWN = ("UNHEALTHY", "TIMEOUT")


@dataclass(slots=True)
class Endpoint:
    """A server.

    Attributes:
        name: its ``hostname``, or else its address.
        key: its address as Envoy shows it.
        weight: its operator's, at least 0.
        status: its operator's ``health_status``.
        group: index of its locality.
        entry: as it is written.
    """

    name: str
    key: str
    weight: float
    status: str = "UNKNOWN"
    group: int = 0
    entry: dict[str, Any] = field(default_factory=dict)

    @property
    def draining(self) -> bool:
        """True if its operator sends it no new flows."""
        return self.status == DRAINING

    @property
    def down(self) -> bool:
        """True if its operator says that it is."""
        return self.status in _DOWN

    @property
    def server(self) -> ServerConfig:
        """As the rows have it."""
        return ServerConfig(name=self.name, address=self.key, weight=self.weight)


class Assignment:
    """The endpoints of one cluster, with everything else that its operator has written of them.

    Args:
        resource: name of the ClusterLoadAssignment.
        value: in JSON's form.
        where: for messages.

    Attributes:
        endpoints: by name.

    Raises:
        DriverError: for what cannot be driven.
    """

    def __init__(self, resource: str, value: Mapping[str, Any], where: str) -> None:
        self.resource = resource
        self._where = where
        self._template = copy.deepcopy(dict(value))
        self._groups = [_snake(group) for group in self._template.pop("endpoints", ())] or [{}]
        self.endpoints: dict[str, Endpoint] = {}
        for i, group in enumerate(self._groups):
            if group.get("priority", 0):
                raise DriverError(
                    f"{where}: there are endpoints of priority {group['priority']}, which take flows only when others "
                    "fail; the driver takes those of priority 0 alone"
                )
            for number, entry in enumerate(group.pop("lb_endpoints", ()), 1):
                endpoint = _endpoint(entry, i, f"{where}, endpoint {number}")
                if endpoint is not None:
                    self._put(endpoint)

    def _put(self, endpoint: Endpoint) -> None:
        same = next((other for other in self.endpoints.values() if other.key == endpoint.key), None)
        if endpoint.name in self.endpoints or same is not None:
            raise DriverError(
                f"{self._where}: there are two endpoints of the name {endpoint.name!r}"
                if same is None or same.name == endpoint.name
                else f"{self._where}: {same.name!r} and {endpoint.name!r} have the same address {endpoint.key}"
            )
        try:
            endpoint.server  # noqa: B018
        except LbgymError as error:
            raise DriverError(f"{self._where}: {error}") from None
        self.endpoints[endpoint.name] = endpoint

    def add(self, name: str, address: str, port: int | None, weight: float) -> None:
        """Add an endpoint.

        Raises:
            DriverError: for an address or name that another has, or that is no IP address.
        """
        if port is None:
            raise DriverError(f"server {name!r} needs a port")
        self._put(_made(name, address, port, weight))

    def delivered(self, weights: Mapping[str, int], removed: Mapping[str, Endpoint]) -> dict[str, Any]:
        """What Envoy is to get: a ClusterLoadAssignment in JSON's form.

        Args:
            weights: by name; a server of weight 0 is drained.
            removed: servers that only finish their flows.
        """
        groups = [copy.deepcopy(group) | {"lb_endpoints": []} for group in self._groups]
        for endpoint in self.endpoints.values():
            weight = weights.get(endpoint.name, 0)
            status = DRAINING if weight == 0 and not endpoint.down else endpoint.status
            entry = copy.deepcopy(endpoint.entry) | {"load_balancing_weight": max(1, weight)}
            if status != "UNKNOWN":
                entry["health_status"] = status
            if weight != endpoint.weight or status != endpoint.status:
                _mark(entry, {"weight": endpoint.weight, "health_status": endpoint.status})
            groups[endpoint.group]["lb_endpoints"].append(entry)
        for endpoint in removed.values():
            if endpoint.name not in self.endpoints:
                entry = copy.deepcopy(endpoint.entry) | {"load_balancing_weight": 1, "health_status": DRAINING}
                _mark(entry, {"removed": True})
                groups[min(endpoint.group, len(groups) - 1)]["lb_endpoints"].append(entry)
        return {**self._template, "cluster_name": self.resource, "endpoints": groups}


def _mark(entry: dict[str, Any], what: dict[str, Any]) -> None:
    entry.setdefault("metadata", {}).setdefault("filter_metadata", {})[_MARK] = what


def address_key(address: Mapping[str, Any]) -> str:
    """An address in JSON's form as Envoy's log shows it; empty if it is of another kind."""
    pipe, place = address.get("pipe"), address.get("socket_address")
    if isinstance(pipe, Mapping):
        return str(pipe.get("path", ""))
    if not isinstance(place, Mapping) or "port_value" not in place:
        return ""
    return place_key(str(place.get("address", "")), int(place["port_value"]))


def place_key(address: str, port: int) -> str:
    """The same of an IP address and a port."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


#: Names of the fields that are read, in the other form that JSON may have them in.
_CAMEL = {
    "clusterName": "cluster_name",
    "lbEndpoints": "lb_endpoints",
    "loadBalancingWeight": "load_balancing_weight",
    "healthStatus": "health_status",
    "socketAddress": "socket_address",
    "portValue": "port_value",
    "filterMetadata": "filter_metadata",
}


def _snake(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise DriverError(f"must be an object, got {value!r}")
    return {_CAMEL.get(str(key), str(key)): inner for key, inner in value.items()}


def _endpoint(value: Any, group: int, where: str) -> Endpoint | None:
    """None for one that a driver that was killed was removing."""
    try:
        entry = _snake(value)
        inner = entry["endpoint"] = _snake(entry.get("endpoint"))
        address = inner["address"] = _snake(inner.get("address"))
        if "socket_address" in address:
            address["socket_address"] = _snake(address["socket_address"])
        key = address_key(address)
        if not key:
            raise DriverError("its address must be a socket_address with a port_value, or a pipe")
        metadata = _snake(entry.get("metadata") or {})
        others = dict(metadata.get("filter_metadata") or {})
        mark = others.pop(_MARK, {})
        entry.pop("metadata", None)
        if others or len(metadata) > 1:
            entry["metadata"] = metadata | {"filter_metadata": others}
        weight = mark.get("weight", entry.pop("load_balancing_weight", None) or 1)
        status = mark.get("health_status", entry.pop("health_status", "UNKNOWN"))
        for key_of_ours in ("load_balancing_weight", "health_status"):
            entry.pop(key_of_ours, None)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise DriverError(f"load_balancing_weight must be a number, got {weight!r}")
        if mark.get("removed"):
            return None
        name = str(inner.get("hostname") or key)
        return Endpoint(name, key, float(weight), str(status), group, entry)
    except (DriverError, TypeError, ValueError, AttributeError) as error:
        raise DriverError(f"{where}: {error}") from None


def _made(name: str, address: str, port: int, weight: float) -> Endpoint:
    try:
        ipaddress.ip_address(address)
    except ValueError:
        raise DriverError(
            f"server {name!r} needs an IP address, since EDS takes no host names, got {address!r}"
        ) from None
    place = {"socket_address": {"address": address, "port_value": port}}
    return Endpoint(name, place_key(address, port), weight, entry={"endpoint": {"hostname": name, "address": place}})


def read_document(path: str | Path) -> Any:
    """What a file of JSON or YAML says.

    Raises:
        DriverError: if it cannot be read.
        MissingExtraError: if it is not JSON and no YAML can be read.
    """
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, ValueError) as error:
        raise DriverError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        import yaml
    except ImportError:
        raise MissingExtraError("yaml", "envoy", f"{path}, which is no JSON,") from None
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise DriverError(f"{path}: neither JSON nor YAML: {str(error).splitlines()[0]}") from None


def read_assignment(path: str | Path, resource: str) -> Assignment:
    """The endpoints of a cluster in a file: Envoy's own of EDS, in JSON or YAML, or ``[[servers]]`` in TOML.

    Raises:
        DriverError: if it has none, or cannot be read.
    """
    if str(path).endswith(".toml"):
        assignment = Assignment(resource, {}, str(path))
        try:
            servers = read_servers(path)
        except LbgymError as error:
            raise DriverError(str(error)) from None
        for server in servers:
            assignment.add(server.name, server.address, server.port, server.safe_weight)
    else:
        document = read_document(path)
        if not isinstance(document, dict) or not isinstance(document.get("resources"), list):
            raise DriverError(f"{path}: must be an object with 'resources', as EDS in a file is")
        found = [_snake(value) for value in document["resources"] if isinstance(value, dict)]
        names = [str(value.get("cluster_name", "")) for value in found]
        if names != [resource]:
            raise DriverError(
                f"{path}: must have the endpoints of cluster {resource!r} alone, has those of "
                f"{', '.join(map(repr, names)) or 'none'}"
            )
        if not isinstance(found[0].get("endpoints", []), list):
            raise DriverError(f"{path}: endpoints must be a list")
        assignment = Assignment(resource, found[0], str(path))
    if not assignment.endpoints:
        raise DriverError(f"{path}: cluster {resource!r} has no endpoints")
    return assignment


__all__ = ["Assignment", "Endpoint", "address_key", "place_key", "read_assignment"]
