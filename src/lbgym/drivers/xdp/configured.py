"""What balancers of packets have in common, in the kernel or not: :class:`ConfiguredBalancer`."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...errors import InvalidOptionError
from ...scenarios import RULES
from ..base import DriverError, ServerRow, Source
from ..config import DataPlaneConfig, ServerConfig, load_config
from ..discovery import Slot
from ..pool import ServerPool
from .neighbours import Neighbours, NextHop
from .options import XdpOptions, check_config, check_servers, parse_options
from .plane import Address, Reach

#: Seconds between looks at the link-layer addresses of servers.
_HOUSEKEEPING = 1.0
#: Most cores that an agent may take a server for.
_MAX_CORES = 4096.0
#: Longest wait at the start for the link-layer addresses of servers, seconds. Those found later are up later.
_FIRST_LOOK = 0.5


@dataclass(frozen=True, slots=True)
class InForce:
    """What a balancer is to dispatch by, by row.

    Attributes:
        weights, safe: float64[N], an agent's and the configured ones.
        active: bool[N], servers that take flows.
        cores, background: float64[N], of the rules that look at them.
        reach: how each server is reached; None: nobody has the row.
    """

    weights: NDArray[np.float64]
    safe: NDArray[np.float64]
    active: NDArray[np.bool_]
    cores: NDArray[np.float64]
    background: NDArray[np.float64]
    reach: tuple[Reach | None, ...]

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for what is equal."""
        arrays = (self.weights, self.safe, self.active, self.cores, self.background)
        return *(array.tobytes() for array in arrays), *self.reach


class ConfiguredBalancer(Source):
    """Servers of a file, their health and next hops, and an agent's weights, put in force in a balancer of packets.

    A balancer makes its ``_pool``, which checks what it finds by :meth:`_check_list`, calls
    :meth:`_put_first_in_force`, and implements the methods that raise here.

    Args:
        config: the content of dataplane.toml.
        options: its table ``[driver]``; None: taken from ``config``.
        path: the file, for :meth:`reload`; None: there is none.

    Raises:
        InvalidOptionError, UnknownNameError: for a configuration that is not good.
        MissingExtraError: if pyroute2 is not installed.
    """

    def __init__(
        self, config: DataPlaneConfig, options: XdpOptions | None = None, path: str | os.PathLike[str] | None = None
    ) -> None:
        self._where = "the configuration" if path is None else str(path)
        self._path = path
        self.options = options or parse_options(config.driver, f"{self._where}, [driver]")
        check_config(config, self.options, self._where)
        self._pool: ServerPool | None = None
        self._house_at = 0.0
        self.takes_index = RULES[self.options.rule].takes_background
        self._weights, self._index = np.zeros(0), np.zeros((0, 2))
        self._installed: tuple[object, ...] = ()
        self._hops: dict[Address, NextHop | None] = {}
        self._neighbours = Neighbours()

    # Of the balancer

    def _keep_house(self) -> None:
        """What is to be done every second."""

    def _entries(self) -> list[int]:
        """Entries of the flow table, by row: a server that left keeps its row until there are none."""
        raise NotImplementedError

    def _forget(self, row: int) -> None:
        """The row will belong to another server."""
        raise NotImplementedError

    def _put_in_force(self, wanted: InForce) -> None:
        """New flows are placed by this from now on."""
        raise NotImplementedError

    # Source

    def servers(self) -> Sequence[ServerRow]:
        return self._servers.servers()

    def apply(self, weights: NDArray[np.float64], now: float) -> None:
        self._weights, self._index = weights.copy(), np.zeros((0, 2))
        self._install()

    def apply_index(self, weights: NDArray[np.float64], index: NDArray[np.float64], now: float) -> None:
        self._weights, self._index = weights.copy(), index.copy()
        self._install()

    def add(self, server: str, *, address: str, port: int | None, weight: float, cores: int | None) -> None:
        pool = self._servers
        new = ServerConfig(name=server, address=address, port=port, weight=weight, cores=cores)
        present = [slot.server for slot in pool.slots]
        check_servers([*(known for known in present if known.name != server), new], self.options, "add")
        for known in present:
            if known.name == server:
                check_same_place(known, new, "add")
        pool.add(server, address=address, port=port, weight=weight, cores=cores)
        self._house_at = 0.0
        self._refresh()
        self._install()

    def drain(self, server: str) -> None:
        self._servers.drain(server)
        self._install()

    def undrain(self, server: str) -> None:
        self._servers.undrain(server)
        self._install()

    def remove(self, server: str) -> None:
        self._servers.remove(server)
        self._install()

    def reload(self) -> str:
        pool = self._servers
        if self._path is None:
            return pool.reload()
        config = load_config(self._path)
        check_config(config, self.options, str(self._path))
        self._check_list(config.servers, str(self._path))
        changes = pool.reload()
        self._house_at = 0.0
        self._refresh()
        self._install()
        return changes

    @property
    def reloads(self) -> bool:
        return self._path is not None

    # Between source and balancer

    @property
    def _servers(self) -> ServerPool:
        if self._pool is None:
            raise DriverError(f"the {self.driver} balancer is closed")
        return self._pool

    def _check_list(self, servers: Sequence[ServerConfig], where: str) -> None:
        """Refuse a list of servers that cannot follow those there are; raises InvalidOptionError."""
        known = {slot.server.name: slot.server for slot in self._servers.slots}
        # An address that moved to another name is still taken while the first server has flows.
        names = {server.name for server in servers}
        leaving = [server for name, server in known.items() if name not in names]
        check_servers([*servers, *leaving], self.options, where)
        for server in servers:
            if server.name in known:
                check_same_place(known[server.name], server, where)

    def _close_pool(self) -> None:
        if self._pool is not None:
            self._pool.close()
            self._pool = None
        self._neighbours.close()

    def _put_first_in_force(self) -> None:
        """By the configured weights; link-layer addresses are waited for, for a moment."""
        self._refresh()
        until = time.monotonic() + _FIRST_LOOK
        while any(self._hop(slot) is None for slot in self._servers.slots) and time.monotonic() < until:
            time.sleep(_FIRST_LOOK / 20)
            self._house_at = 0.0
            self._refresh()
        self._weights = self._safe_weights()
        self._install()

    def _refresh(self) -> None:
        """Find out how servers are, and from time to time where."""
        pool = self._servers
        now = time.monotonic()
        if now >= self._house_at:
            self._house_at = now + _HOUSEKEEPING
            self._keep_house()
            found = self._neighbours.find(address for slot in pool.slots if (address := _address_of(slot)) is not None)
            for address, hop in found.items():
                # What was known goes on being used while the kernel asks again.
                self._hops[address] = hop or self._hops.get(address)
        for slot in pool.refresh(self._entries()[: len(pool.slots)]):
            self._forget(slot.index)
        for slot in pool.slots:
            if self._hop(slot) is None:
                slot.healthy = False

    def _hop(self, slot: Slot) -> NextHop | None:
        address = _address_of(slot)
        return None if address is None else self._hops.get(address)

    def _safe_weights(self) -> NDArray[np.float64]:
        return np.array([row.weight for row in self._servers.servers()])

    def _cores(self, n: int) -> NDArray[np.float64]:
        """Configured cores of the servers; where there are none, what the agent takes them for, or 1."""
        cores = np.ones(n)
        known = min(n, len(self._index))
        speeds = self._index[:known, 0]
        np.divide(self._weights[:known], speeds, out=cores[:known], where=speeds > 0.0)
        cores = np.clip(np.rint(cores), 1.0, _MAX_CORES)
        for slot in self._servers.slots:
            if slot.server.cores is not None:
                cores[slot.index] = slot.server.cores
        return cores

    def _install(self) -> None:
        """Put weights and servers as they are now in force, if anything has changed."""
        safe, active = self._safe_weights(), self._servers.slots.active
        n = len(active)
        weights = safe.copy()
        known = min(n, len(self._weights))
        weights[:known] = self._weights[:known]
        cores, background = self._cores(n), np.zeros(n)
        background[: len(self._index)] = self._index[:n, 1]
        reach: list[Reach | None] = [None] * n
        for slot in self._servers.slots:
            address, hop = _address_of(slot), self._hop(slot)
            if address is not None:
                reach[slot.index] = Reach(
                    slot.server.name,
                    address,
                    slot.server.port or 0,
                    hop.mac if hop else None,
                    hop.own_mac if hop else bytes(6),
                    hop.ifindex if hop else 0,
                )
        wanted = InForce(weights, safe, active, cores, background, tuple(reach))
        if wanted.key != self._installed:
            self._put_in_force(wanted)
            self._installed = wanted.key


def _address_of(slot: Slot) -> Address | None:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(slot.server.address)
    return None


def check_same_place(before: ServerConfig, after: ServerConfig, where: str) -> None:
    """A server that moves is another one: its flows would be sent where nobody knows them."""
    if ipaddress.ip_address(before.address) != ipaddress.ip_address(after.address) or before.port != after.port:
        raise InvalidOptionError(
            f"{where}: server {after.name!r} has the address {before.address} port {before.port} and cannot get "
            f"{after.address} port {after.port} while it is known; give the new one another name"
        )
