"""A live region over time, as plain data, for ``lbgym shm watch``, dashboards and metrics. Read only."""

from .follow import Follower
from .region import (
    ActionView,
    Delay,
    ObservationView,
    RegionMonitor,
    RegionView,
    ServerColumns,
    agent_state,
    producer_state,
)
from .servers import STATE_NAMES, region_labels, server_labels, state_names

__all__ = [
    "STATE_NAMES",
    "ActionView",
    "Delay",
    "Follower",
    "ObservationView",
    "RegionMonitor",
    "RegionView",
    "ServerColumns",
    "agent_state",
    "producer_state",
    "region_labels",
    "server_labels",
    "state_names",
]
