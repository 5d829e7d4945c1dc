"""Where a balancer of a laboratory stands: :class:`Place`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..scenarios import Scenario
from .namespaces import Network

VIP, VIP_PORT = "10.77.1.100", 80


@dataclass(frozen=True, slots=True)
class Place:
    """Where one balancer of a laboratory stands.

    Attributes:
        network: of the laboratory.
        part: of the network that the balancer has for itself, with one interface eth0.
        region: name of its region.
        servers: name, address and port of each.
        scenario: what is balanced.
        options: table ``[driver]`` of the configuration.
        publish_interval: seconds.
        folder: for its configuration.
    """

    network: Network
    part: str
    region: str
    servers: Sequence[tuple[str, str, int]]
    scenario: Scenario
    options: Mapping[str, Any]
    publish_interval: float
    folder: Path
