"""The servers of a driver: :class:`Slots`, the stable rows of a region, and sources of lists of servers."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .. import checks
from ..sharedmemory import ServerState
from .base import TAKES_FLOWS, DriverError, ServerRow
from .config import ServerConfig, read_servers

logger = logging.getLogger("lbgym")

Find = Callable[[], Iterable[ServerConfig]]


@dataclass(frozen=True, slots=True)
class Changes:
    """Names of servers that a new list added to, changed in, or removed from the slots."""

    added: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.added or self.changed or self.removed)

    def __str__(self) -> str:
        parts = [
            f"{verb} {', '.join(names)}"
            for verb, names in (("added", self.added), ("changed", self.changed), ("removing", self.removed))
            if names
        ]
        return "; ".join(parts) or "nothing has changed"


@dataclass(slots=True)
class Slot:
    """A server and its place.

    Attributes:
        index: the row, which the server keeps for as long as it is known.
        server: its configuration.
        healthy: by its health checks; None: not checked (yet).
        drained: an operator sends it no new flows.
        removed: it has left the list and only finishes its flows: a tombstone.
    """

    index: int
    server: ServerConfig
    healthy: bool | None = None
    drained: bool = False
    removed: bool = False

    @property
    def state(self) -> ServerState:
        """As it is published."""
        if self.drained or self.removed:
            return ServerState.DRAINING
        if self.healthy is None:
            return ServerState.UNKNOWN if self.server.health is not None else ServerState.UP
        return ServerState.UP if self.healthy else ServerState.DOWN

    @property
    def active(self) -> bool:
        """True if it takes new flows."""
        return self.state in TAKES_FLOWS


class Slots:
    """Rows of a region by server: stable while servers come, drain and go.

    A server keeps its row for as long as it is known. One that is removed leaves a tombstone, which takes no new flows,
    until its open flows have ended (:meth:`release`); only then is the row given to another server. A server that
    returns before gets its row back.

    Args:
        capacity: rows there are.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = checks.whole("capacity", capacity)
        # A region has one row at least, also before the first server is found.
        self._rows: list[Slot | None] = [None]
        self._by_name: dict[str, Slot] = {}

    def __len__(self) -> int:
        """Rows in use so far, at least 1; never shrinks."""
        return len(self._rows)

    def __iter__(self) -> Iterator[Slot]:
        """The servers that are known, tombstones included, by row."""
        return iter([slot for slot in self._rows if slot is not None])

    def __getitem__(self, name: str) -> Slot:
        """A server's slot.

        Raises:
            DriverError: if there is no such server.
        """
        try:
            return self._by_name[name]
        except KeyError:
            known = ", ".join(slot.server.name for slot in self._rows if slot is not None) or "none"
            raise DriverError(f"there is no server {name!r}; known: {known}") from None

    @property
    def rows(self) -> list[ServerRow]:
        """For ``Source.servers``."""
        return [
            ServerRow("", 0.0, ServerState.DOWN)
            if slot is None
            else ServerRow(slot.server.name, slot.server.safe_weight, slot.state)
            for slot in self._rows
        ]

    @property
    def active(self) -> NDArray[np.bool_]:
        """bool[N], by row: it has a server that takes new flows."""
        return np.array([slot is not None and slot.active for slot in self._rows], np.bool_)

    def seat(self, servers: Sequence[ServerConfig | None]) -> None:
        """Begin with the rows of a driver that ran before, as servers that are being removed; add them to keep them."""
        self._rows = [None if server is None else Slot(i, server, removed=True) for i, server in enumerate(servers)]
        self._rows = self._rows or [None]
        self._by_name = {slot.server.name: slot for slot in self}

    def add(self, server: ServerConfig) -> Slot:
        """Give a server the first free row, or its own back.

        Raises:
            DriverError: if it is there already, or if no row is free.
        """
        slot = self._by_name.get(server.name)
        if slot is not None:
            if not slot.removed:
                raise DriverError(f"there is a server {server.name!r} already")
            slot.server, slot.removed, slot.drained = server, False, False
            return slot
        free = next((i for i, row in enumerate(self._rows) if row is None), len(self._rows))
        if free >= self.capacity:
            leaving = sum(slot.removed for slot in self._by_name.values())
            raise DriverError(
                f"no room for server {server.name!r}: all {self.capacity} rows are taken, {leaving} of them by servers "
                "that are being removed and still have flows; start the driver with a larger capacity"
            )
        slot = Slot(free, server)
        if free == len(self._rows):
            self._rows.append(slot)
        else:
            self._rows[free] = slot
        self._by_name[server.name] = slot
        return slot

    def drain(self, name: str) -> Slot:
        """Send a server no new flows.

        Raises:
            DriverError: if there is no such server.
        """
        slot = self[name]
        slot.drained = True
        return slot

    def undrain(self, name: str) -> Slot:
        """Send a drained server flows again.

        Raises:
            DriverError: if there is no such server, or it is not drained.
        """
        slot = self[name]
        if slot.removed or not slot.drained:
            raise DriverError(f"server {name!r} is {'being removed' if slot.removed else 'not drained'}")
        slot.drained = False
        return slot

    def remove(self, name: str) -> Slot:
        """Drain a server, to forget it when its flows have ended.

        Raises:
            DriverError: if there is no such server.
        """
        slot = self[name]
        slot.removed = True
        return slot

    def release(self, open_flows: Sequence[int]) -> list[Slot]:
        """Free the rows of removed servers without open flows and return them. ``open_flows``: by row."""
        freed = [slot for slot in self if slot.removed and open_flows[slot.index] == 0]
        for slot in freed:
            self._rows[slot.index] = None
            del self._by_name[slot.server.name]
        return freed

    def split(self, servers: Iterable[ServerConfig]) -> tuple[list[ServerConfig], list[ServerConfig]]:
        """Those of ``servers`` that are known or find a free row, in their order, and those that find none."""
        free = self.capacity - len(self._by_name)
        fitting: list[ServerConfig] = []
        others: list[ServerConfig] = []
        for server in servers:
            is_new = server.name not in self._by_name
            (others if is_new and free <= 0 else fitting).append(server)
            free -= is_new
        return fitting, others

    def update(self, servers: Iterable[ServerConfig]) -> Changes:
        """Make ``servers`` the list of servers: add, change and remove as needed.

        Raises:
            DriverError: if there are two of one name, or not enough free rows; nothing has changed then.
        """
        wanted: dict[str, ServerConfig] = {}
        for server in servers:
            if server.name in wanted:
                raise DriverError(f"there are two servers of the name {server.name!r}")
            wanted[server.name] = server
        new = [name for name in wanted if name not in self._by_name]
        free = self.capacity - len(self._by_name)
        if len(new) > free:
            leaving = sum(slot.removed or slot.server.name not in wanted for slot in self._by_name.values())
            raise DriverError(
                f"no room for {len(new)} new servers: {free} of {self.capacity} rows are free, {leaving} are of "
                "servers that leave when their flows have ended; start the driver with a larger capacity"
            )
        removed = [name for name, slot in self._by_name.items() if name not in wanted and not slot.removed]
        added, changed = [], []
        for name in removed:
            self.remove(name)
        for name, server in wanted.items():
            slot = self._by_name.get(name)
            if slot is None or slot.removed:
                self.add(server)
                added.append(name)
            elif slot.server != server:
                if slot.server.health != server.health:
                    slot.healthy = None
                slot.server = server
                changed.append(name)
        return Changes(tuple(added), tuple(changed), tuple(removed))


class Discovery:
    """Looks for servers in the background, since names and files may take long to answer.

    A search that fails, or finds nothing, changes nothing: the servers found before stay.

    Args:
        find: returns the servers there are now: :func:`in_file`, :func:`in_dns`, or a function of your own.
        interval: seconds between searches.
    """

    def __init__(self, find: Find, interval: float) -> None:
        self._find = find
        self._interval = checks.seconds("interval", interval)
        self._found: tuple[ServerConfig, ...] | None = None
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._failing = False
        self._last: tuple[ServerConfig, ...] = ()
        self._thread = threading.Thread(target=self._run, name="lbgym-discovery", daemon=True)
        self._thread.start()

    def poll(self) -> tuple[ServerConfig, ...] | None:
        """The servers, if the list has changed since the last call; else None. Does not wait."""
        with self._lock:
            found, self._found = self._found, None
        return found

    def _run(self) -> None:
        while True:
            try:
                found = tuple(self._find())
                if not found:
                    raise DriverError("no server was found")
            except Exception as error:
                # Whatever a function of the user's raises: those found before stay.
                if not self._failing:
                    logger.warning("discovery: %s; the servers stay as they are", error)
                self._failing = True
            else:
                self._failing = False
                if found != self._last:
                    self._last = found
                    with self._lock:
                        self._found = found
            if self._end.wait(self._interval):
                return

    def close(self) -> None:
        """End the searches; one that is under way ends by itself. Idempotent."""
        self._end.set()


def in_file(path: str | Path) -> Find:
    """Servers of a TOML file: its ``[[servers]]``, as in dataplane.toml."""
    return lambda: read_servers(path)


def in_dns(host: str, port: int, template: ServerConfig | None = None) -> Find:
    """Servers of a DNS name: one per address, named ADDRESS:PORT.

    Args:
        host: name that is resolved at every search.
        port: of all servers.
        template: its weight, cores and checks are those of all servers; None: the defaults.
    """

    def find() -> list[ServerConfig]:
        try:
            answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise DriverError(f"{host} cannot be resolved: {error.strerror or error}") from error
        addresses = sorted({str(answer[4][0]) for answer in answers})
        names = {address: f"[{address}]:{port}" if ":" in address else f"{address}:{port}" for address in addresses}
        base = template or ServerConfig(name="template", address=host, port=port)
        return [replace(base, name=name, address=address, port=port) for address, name in names.items()]

    return find
