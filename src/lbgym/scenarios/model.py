"""Scenarios as plain data: servers, workload, events, and how a balancer samples.

Nothing here simulates. Every class validates itself on construction and raises :class:`ScenarioError` with the
value, what is allowed and where.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Any, Literal

from ..errors import ScenarioError, UnknownNameError
from ._validation import MAX_PACKETS, _instance, _integer, _items, _number, _set, _shown, _text
from .dispatch_rules import DISPATCH_RULES
from .workload import Workload, check_pace

EVENT_KINDS = ("rate", "speed", "down", "up", "drain")
MAX_SERVERS = 65_536
MAX_BALANCERS = 1024


# Servers


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server under limited processor sharing.

    Of the flows it holds, at most ``workers`` are served at once, each at ``speed * min(1, cores / served)``; further
    flows wait first-in first-out in a backlog of ``backlog`` places; beyond that a flow is rejected.

    Attributes:
        cores: CPU cores, at least 1.
        speed: core-seconds of demand one core serves per second, above 0.
        workers: flows served at once; None: unlimited (plain processor sharing).
        backlog: places to wait once every worker is busy; None: unlimited. Without a limit on workers nothing waits.
        weight: as its operator configures it, right or wrong, above 0; None: its cores. Only agents that are shown it,
            or whose actions are relative to it, depend on it.
        memory_mb, memory_idle_mb, memory_per_flow_mb: the linear model of ground-truth memory use:
            (idle + per_flow * flows) / memory, at most 1.
    """

    cores: int = 1
    speed: float = 1.0
    workers: int | None = None
    backlog: int | None = None
    weight: float | None = None
    memory_mb: float = 4096.0
    memory_idle_mb: float = 512.0
    memory_per_flow_mb: float = 16.0

    def __post_init__(self) -> None:
        _set(
            self,
            cores=_integer(self.cores, "Server.cores", low=1),
            speed=_number(self.speed, "Server.speed"),
            memory_mb=_number(self.memory_mb, "Server.memory_mb"),
            memory_idle_mb=_number(self.memory_idle_mb, "Server.memory_idle_mb", strict=False),
            memory_per_flow_mb=_number(self.memory_per_flow_mb, "Server.memory_per_flow_mb", strict=False),
        )
        if self.workers is not None:
            _set(self, workers=_integer(self.workers, "Server.workers", low=1))
        if self.backlog is not None:
            _set(self, backlog=_integer(self.backlog, "Server.backlog", low=0))
        if self.weight is not None:
            _set(self, weight=_number(self.weight, "Server.weight"))

    @property
    def usable_cores(self) -> int:
        """Cores that can be busy at once: no more than it has workers."""
        return self.cores if self.workers is None else min(self.cores, self.workers)

    @property
    def capacity(self) -> float:
        """Core-seconds of demand served per second when every usable core is busy."""
        return self.usable_cores * self.speed


# Events


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happens at ``time`` seconds.

    ``kind``: "rate" (the arrival rate becomes ``value`` times the workload's), "speed" (the server's speed becomes
    ``value`` times its configured one), "down" (the server's flows fail and it takes no more), "up", "drain" (it
    finishes what it has and takes no more).
    """

    time: float
    kind: Literal["rate", "speed", "down", "up", "drain"]
    server: int | None = None
    value: float | None = None

    def __post_init__(self) -> None:
        _set(self, time=_number(self.time, "Event.time", strict=False))
        if _text(self.kind, "Event.kind") not in EVENT_KINDS:
            raise UnknownNameError("event kind", self.kind, EVENT_KINDS)
        if (self.kind == "rate") != (self.server is None):
            raise ScenarioError(
                f"a {self.kind!r} event {'takes no' if self.kind == 'rate' else 'needs a'} server, "
                f"got {_shown(self.server)}"
            )
        if self.server is not None:
            _set(self, server=_integer(self.server, "Event.server", low=0))
        if (self.kind in ("rate", "speed")) != (self.value is not None):
            raise ScenarioError(
                f"a {self.kind!r} event {'needs a' if self.kind in ('rate', 'speed') else 'takes no'} value, "
                f"got {_shown(self.value)}"
            )
        if self.value is not None:
            _set(self, value=_number(self.value, "Event.value", strict=self.kind == "speed"))


# How a balancer samples


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Reservoirs of a balancer, two per server: FCT and flow duration.

    Attributes:
        capacity: samples kept.
        probability: chance that an event is sampled at all.
        algorithm: "overwrite" (a uniformly random slot: exponential forgetting) or "uniform" (Algorithm R of Vitter:
            uniform over all history, never forgets).
        decay: weight of a sample per second of its age in the ``*_decay`` features.
        packets_per_flow: flow-duration samples per flow in the mean, at most 10,000. Packets come as service progresses
            (a response is acknowledged while it is sent): a Poisson process in the service a flow has received, so
            larger flows are sampled more often. 0: no duration samples.
    """

    capacity: int = 128
    probability: float = 1.0
    algorithm: Literal["overwrite", "uniform"] = "overwrite"
    decay: float = 0.9
    packets_per_flow: float = 2.0

    def __post_init__(self) -> None:
        _set(
            self,
            capacity=_integer(self.capacity, "Sampling.capacity", low=1, high=32_767),
            probability=_number(self.probability, "Sampling.probability", high=1.0),
            decay=_number(self.decay, "Sampling.decay", high=1.0),
            packets_per_flow=_number(
                self.packets_per_flow, "Sampling.packets_per_flow", strict=False, high=MAX_PACKETS
            ),
        )
        if _text(self.algorithm, "Sampling.algorithm") not in ("overwrite", "uniform"):
            raise UnknownNameError("sampling algorithm", self.algorithm, ("overwrite", "uniform"))


# The scenario


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Cluster, workload, balancers, dispatch rule and events under one name.

    Attributes:
        name, description: for people.
        servers: the cluster, at least one server.
        workload: what arrives.
        balancers: load balancers; each flow belongs to the one its hash selects.
        dispatch: the default dispatch rule (``DISPATCH_RULES``).
        events: what happens when, in any order.
        reject_timeout: FCT, in seconds, that a rejected or failed flow counts with.
        sampling: the balancers' reservoirs.
        duration: seconds that an evaluation of the scenario lasts by default.
    """

    name: str = "custom"
    description: str = ""
    servers: tuple[Server, ...]
    workload: Workload
    balancers: int = 1
    dispatch: str = "sed"
    events: tuple[Event, ...] = ()
    reject_timeout: float = 40.0
    sampling: Sampling = field(default_factory=Sampling)
    duration: float = 60.0

    def __post_init__(self) -> None:
        _text(self.name, "Scenario.name")
        _text(self.description, f"scenario {self.name!r}: description")
        servers = _items(self.servers, f"scenario {self.name!r}: servers", "servers")
        for i, server in enumerate(servers):
            _instance(server, Server, f"scenario {self.name!r}: servers[{i}]", "a Server")
        _instance(self.workload, Workload, f"scenario {self.name!r}: workload", "a Workload")
        _instance(self.sampling, Sampling, f"scenario {self.name!r}: sampling", "a Sampling")
        if not 1 <= len(servers) <= MAX_SERVERS:
            raise ScenarioError(f"scenario {self.name!r}: servers must be 1 to {MAX_SERVERS}, got {len(servers)}")
        if _text(self.dispatch, f"scenario {self.name!r}: dispatch") not in DISPATCH_RULES:
            raise UnknownNameError("dispatch rule", self.dispatch, DISPATCH_RULES, where=f"scenario {self.name!r}")
        events = _items(self.events, f"scenario {self.name!r}: events", "events")
        for i, event in enumerate(events):
            _instance(event, Event, f"scenario {self.name!r}: events[{i}]", "an Event")
        events = tuple(sorted(events, key=lambda e: e.time))
        for event in events:
            if event.server is not None and event.server >= len(servers):
                raise ScenarioError(
                    f"scenario {self.name!r}: event at {event.time} s names server {event.server}; "
                    f"allowed: 0 to {len(servers) - 1}"
                )
        _set(
            self,
            servers=servers,
            events=events,
            balancers=_integer(self.balancers, f"scenario {self.name!r}: balancers", low=1, high=MAX_BALANCERS),
            reject_timeout=_number(self.reject_timeout, f"scenario {self.name!r}: reject_timeout"),
            duration=_number(self.duration, f"scenario {self.name!r}: duration"),
        )
        if self.workload.load is not None and self.workload.mean_demand == 0:
            raise ScenarioError(f"scenario {self.name!r}: every demand of the trace is 0, so load cannot set its rate")
        if not 0 < self.rate < math.inf:
            raise ScenarioError(
                f"scenario {self.name!r}: the arrival rate must be finite and above 0, got {self.rate:g}"
            )
        changes = [event for event in self.events if event.kind == "rate"]
        check_pace(
            f"scenario {self.name!r}",
            [self.rate],
            [self.workload.arrivals] if self.workload.trace is None else [],
            [event.value or 0.0 for event in changes],
            max((after.time - event.time for event, after in pairwise(changes) if event.value == 0.0), default=0.0),
        )

    @property
    def reference(self) -> Scenario:
        """Itself: a scenario is a distribution of one (:class:`~lbgym.scenarios.ScenarioDistribution`)."""
        return self

    @property
    def min_servers(self) -> int:
        return self.num_servers

    @property
    def max_servers(self) -> int:
        return self.num_servers

    @property
    def dispatch_rules(self) -> tuple[str, ...]:
        """Its dispatch rule, alone."""
        return (self.dispatch,)

    @property
    def varies(self) -> bool:
        """False: nothing is drawn."""
        return False

    def draw(self, seed: int, *, horizon: float = 0.0) -> Scenario:
        """Itself, whatever the seed and the horizon."""
        return self

    def with_events(self, events: Iterable[Event]) -> Scenario:
        """A copy with these events, and no other ones."""
        return replace(self, events=tuple(events))

    @property
    def num_servers(self) -> int:
        return len(self.servers)

    @property
    def capacity(self) -> float:
        """Core-seconds per second of the whole cluster."""
        return sum(server.capacity for server in self.servers)

    @property
    def rate(self) -> float:
        """Mean flows per second, from the workload's rate, load or trace."""
        workload = self.workload
        if workload.rate is not None:
            return workload.rate
        if workload.load is not None:
            return workload.load * self.capacity / workload.mean_demand
        assert workload.trace is not None
        return workload.trace.rate

    @property
    def load(self) -> float:
        """Offered work as a fraction of the cluster's capacity."""
        return self.rate * self.workload.mean_demand / self.capacity

    @property
    def core_weights(self) -> tuple[float, ...]:
        """Weights in proportion to the servers' cores, which an operator knows."""
        return tuple(float(server.cores) for server in self.servers)

    @property
    def configured_weights(self) -> tuple[float, ...]:
        """The weights that the operator has configured: the cores where no other is stated."""
        return tuple(float(server.cores) if server.weight is None else server.weight for server in self.servers)

    def with_changes(self, **changes: Any) -> Scenario:
        """A copy with other values; also takes ``load=``, ``rate=`` for the workload.

        Raises:
            UnknownNameError: a keyword that is no attribute of a scenario.
            ScenarioError: a value that the scenario cannot have.
        """
        known = [item.name for item in fields(self)] + ["load", "rate"]
        for name in changes:
            if name not in known:
                raise UnknownNameError("scenario key", name, known)
        workload = {k: changes.pop(k) for k in ("load", "rate") if k in changes}
        if workload:
            base = changes.get("workload", self.workload)
            _instance(base, Workload, f"scenario {self.name!r}: workload", "a Workload")
            changes["workload"] = replace(base, **({"load": None, "rate": None} | workload))
        return replace(self, **changes)


def servers_of(*groups: tuple[int, Server] | Server) -> tuple[Server, ...]:
    """Flatten ``(count, server)`` groups: ``servers_of((4, Server(cores=2)), (3, Server(cores=4)))``."""
    flat: list[Server] = []
    for group in groups:
        count, server = group if isinstance(group, Sequence) else (1, group)
        flat.extend([server] * _integer(count, "the count of a group of servers", low=0, high=MAX_SERVERS))
    return tuple(flat)
