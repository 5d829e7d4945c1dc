"""The XDP balancer as a data plane: :class:`XdpBalancer`."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...errors import InvalidOptionError
from ...features import NUM_FEATURES
from ...scenarios import RULES
from ...sharedmemory import Publication, abi
from ..base import DriverError, ServerRow, Source
from ..config import DataPlaneConfig, ServerConfig, load_config
from ..discovery import Slot
from ..pool import ServerPool
from .layout import MAX_SERVERS
from .neighbours import Neighbours, NextHop
from .options import XdpOptions, check_config, check_servers, default_pin_folder, parse_options
from .plane import Address, Reach, Sizes, XdpPlane, check_privileges, mount_bpf, unpin
from .statistics import SampleStatistics
from .tables import IndexInputs, dispatch_table, maglev_table

logger = logging.getLogger("lbgym")

#: Seconds between collections of flows, and between looks at the link-layer addresses of servers.
_HOUSEKEEPING = 1.0
#: Most cores that an agent may take a server for.
_MAX_CORES = 4096.0
#: Longest wait at the start for the link-layer addresses of servers, seconds. Those found later are up later.
_FIRST_LOOK = 0.5


class XdpBalancer(Source):
    """An L4 balancer for TCP in this kernel.

    Everything is checked before anything is changed, and taken back if the constructor raises. Where an earlier driver
    left its balancer at work (it was killed, or had ``keep``), this one takes it over: flows, counters and the rows of
    servers go on.

    Args:
        config: the content of dataplane.toml.
        options: its table ``[driver]``; None: taken from ``config``.
        path: the file, for :meth:`reload`; None: there is none.

    Raises:
        InvalidOptionError, UnknownNameError: for a configuration that is not good.
        MissingExtraError: if pyroute2 is not installed.
        DriverError: if something is missing, an interface is not there or has another program, or another driver runs
            this balancer; the message says what.
    """

    driver = "xdp"

    def __init__(
        self, config: DataPlaneConfig, options: XdpOptions | None = None, path: str | os.PathLike[str] | None = None
    ) -> None:
        self._where = "the configuration" if path is None else str(path)
        self._path = path
        self.options = options or parse_options(config.driver, f"{self._where}, [driver]")
        check_config(config, self.options, self._where)
        self._folder = self.options.pin_folder(config.name)
        self._plane: XdpPlane | None = None
        self._pool: ServerPool | None = None
        self._lock = -1
        self._house_at = 0.0
        self.takes_index = RULES[self.options.rule].takes_background
        self._weights, self._index = np.zeros(0), np.zeros((0, 2))
        self._installed: tuple[object, ...] = ()
        self._hops: dict[Address, NextHop | None] = {}
        self._neighbours = Neighbours()
        try:
            self._start(config)
        except BaseException:
            self._close(detach=self._lock >= 0)
            raise

    def _start(self, config: DataPlaneConfig) -> None:
        options = self.options
        check_privileges()
        interfaces = {self._neighbours.interface(name): name for name in options.interfaces}
        capacity = config.capacity or max(abi.DEFAULT_CAPACITY, len(config.servers))
        syn_flows = options.syn_flows or max(1, options.flows // 4)
        sizes = Sizes(min(capacity, MAX_SERVERS), options.flows, syn_flows, options.mode == "dnat")
        before: list[ServerConfig | None] = []
        if self._folder.is_dir():
            self._take_lock()
            plane = XdpPlane.take_over(self._folder)
            # From here on it belongs to this driver; a refusal leaves it at work.
            try:
                before = self._seated(plane, sizes, config)
                plane.set_vips(options.parsed_vips)
            except BaseException:
                plane.close()
                os.close(self._lock)
                self._lock = -1
                raise
            logger.info("taking over the balancer pinned in %s, with %d flows", self._folder, plane.flow_count())
        else:
            content = None if options.object is None else _read(options.object)
            plane = XdpPlane.load(sizes, content)
            plane.set_vips(options.parsed_vips)
        self._plane = plane
        plane.shared["settings"]["syn_flows"] = syn_flows
        plane.set_sampling(options.fct_sampling, options.duration_sampling)
        self._pool = ServerPool(config, self._path, before)
        self._statistics = SampleStatistics(sizes.servers)
        plane.keep_alive(options.orphan_timeout)
        self._refresh()
        until = time.monotonic() + _FIRST_LOOK
        while any(self._hop(slot) is None for slot in self._pool.slots) and time.monotonic() < until:
            time.sleep(_FIRST_LOOK / 20)
            self._house_at = 0.0
            self._refresh()
        self._weights = self._safe_weights()
        self._install()
        if self._lock < 0:
            plane.pin(self._folder)
            self._take_lock()
        for ifindex in plane.attached:
            if ifindex not in interfaces:
                plane.detach_from(ifindex)
        for ifindex, name in interfaces.items():
            if ifindex not in plane.attached:
                mode = plane.attach(ifindex, name, options.attach)
                logger.info("attached to %s in %s mode", name, mode)

    def _take_lock(self) -> None:
        lock = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            raise DriverError(f"another driver runs the balancer pinned in {self._folder}") from None
        self._lock = lock

    def _seated(self, plane: XdpPlane, sizes: Sizes, config: DataPlaneConfig) -> list[ServerConfig | None]:
        """The servers of the balancer that is taken over, by row."""
        for key, what in (("servers", "rows"), ("flows", "flows"), ("dnat", "mode dnat")):
            have, want = getattr(plane.sizes, key), getattr(sizes, key)
            if have != want:
                raise DriverError(
                    f"the balancer pinned in {self._folder} was loaded with other sizes ({what}: {have}, not {want}); "
                    "remove it by lbgym dataplane xdp --detach, which also ends its flows"
                )
        wanted = {server.name: server for server in config.servers}
        seats: list[ServerConfig | None] = []
        for reach in plane.servers():
            if reach is None:
                seats.append(None)
                continue
            server = ServerConfig(name=reach.name, address=str(reach.address), port=reach.port or None)
            if reach.name in wanted:
                _same_place(server, wanted[reach.name], self._where)
            seats.append(server)
        return seats

    # Source

    def servers(self) -> Sequence[ServerRow]:
        return self._running[1].servers()

    def read(self, now: float) -> Publication:
        plane, pool = self._running
        self._refresh()
        self._install()
        plane.keep_alive(self.options.orphan_timeout)
        n = len(pool.slots)
        counters = plane.shared["counters"][:n]
        # Ends first: a flow that begins and ends meanwhile must not have ended before it began.
        completed, rejected, failed = (counters[name].astype(np.int64) for name in ("completed", "rejected", "failed"))
        fct_count, fct_sum = int(counters["fct_count"].sum()), float(counters["fct_sum"].sum()) * 1e-9
        started = counters["started"].astype(np.int64)
        stats = np.zeros((n, NUM_FEATURES), np.float32)
        stats[:, 0] = started - completed - rejected - failed
        reservoirs = plane.shared["reservoirs"][:n]
        stats[:, 1:] = self._statistics.refresh(reservoirs["accepted"].copy(), reservoirs["samples"].copy())
        truth, age = pool.ground_truth()
        return Publication(
            timestamp=now,
            active=self._active(),
            stats=stats,
            started=started,
            completed=completed,
            rejected=rejected,
            failed=failed,
            ground_truth=truth,
            ground_truth_age=age,
            unrouted=int(plane.shared["totals"]["unrouted"]),
            fct_count=fct_count,
            fct_sum=fct_sum,
        )

    def apply(self, weights: NDArray[np.float64], now: float) -> None:
        self._weights, self._index = weights.copy(), np.zeros((0, 2))
        self._install()

    def apply_index(self, weights: NDArray[np.float64], index: NDArray[np.float64], now: float) -> None:
        self._weights, self._index = weights.copy(), index.copy()
        self._install()

    def add(self, server: str, *, address: str, port: int | None, weight: float, cores: int | None) -> None:
        pool = self._running[1]
        new = ServerConfig(name=server, address=address, port=port, weight=weight, cores=cores)
        present = [slot.server for slot in pool.slots]
        check_servers([*(known for known in present if known.name != server), new], self.options, "add")
        for known in present:
            if known.name == server:
                _same_place(known, new, "add")
        pool.add(server, address=address, port=port, weight=weight, cores=cores)
        self._house_at = 0.0
        self._refresh()
        self._install()

    def drain(self, server: str) -> None:
        self._running[1].drain(server)
        self._install()

    def undrain(self, server: str) -> None:
        self._running[1].undrain(server)
        self._install()

    def remove(self, server: str) -> None:
        self._running[1].remove(server)
        self._install()

    def reload(self) -> str:
        pool = self._running[1]
        if self._path is None:
            return pool.reload()
        config = load_config(self._path)
        check_config(config, self.options, str(self._path))
        known = {slot.server.name: slot.server for slot in pool.slots}
        for server in config.servers:
            if server.name in known:
                _same_place(known[server.name], server, str(self._path))
        # An address that moved to another name is still taken while the first server has flows.
        leaving = [server for name, server in known.items() if all(name != new.name for new in config.servers)]
        check_servers([*config.servers, *leaving], self.options, str(self._path))
        changes = pool.reload()
        self._house_at = 0.0
        self._refresh()
        self._install()
        return changes

    @property
    def reloads(self) -> bool:
        return self._path is not None

    @property
    def plane(self) -> XdpPlane:
        """Program and maps, to look at."""
        return self._running[0]

    def close(self) -> None:
        self._close(detach=not self.options.keep)

    def _close(self, *, detach: bool) -> None:
        if self._pool is not None:
            self._pool.close()
            self._pool = None
        self._neighbours.close()
        if self._plane is not None:
            if detach:
                self._plane.detach()
            self._plane.close()
            self._plane = None
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    # Between source and plane

    @property
    def _running(self) -> tuple[XdpPlane, ServerPool]:
        if self._plane is None or self._pool is None:
            raise DriverError("the XDP balancer is closed")
        return self._plane, self._pool

    def _refresh(self) -> None:
        """Find out how servers are, and from time to time where; collect flows."""
        plane, pool = self._running
        now = time.monotonic()
        if now >= self._house_at:
            self._house_at = now + _HOUSEKEEPING
            options = self.options
            plane.collect(
                syn_timeout=options.syn_timeout,
                idle_timeout=options.idle_timeout,
                close_timeout=options.close_timeout,
            )
            found = self._neighbours.find(address for slot in pool.slots if (address := _address_of(slot)) is not None)
            for address, hop in found.items():
                # What was known goes on being used while the kernel asks again.
                self._hops[address] = hop or self._hops.get(address)
        for slot in pool.refresh(plane.shared["entries"][: len(pool.slots)].astype(np.int64).tolist()):
            plane.shared["reservoirs"][slot.index]["accepted"] = 0
            plane.shared["reservoirs"][slot.index]["samples"] = 0
            self._statistics.forget(slot.index)
        for slot in pool.slots:
            if self._hop(slot) is None:
                slot.healthy = False

    def _hop(self, slot: Slot) -> NextHop | None:
        address = _address_of(slot)
        return None if address is None else self._hops.get(address)

    def _active(self) -> NDArray[np.bool_]:
        pool = self._running[1]
        active = np.zeros(len(pool.slots), np.bool_)
        for slot in pool.slots:
            active[slot.index] = slot.active
        return active

    def _safe_weights(self) -> NDArray[np.float64]:
        return np.array([row.weight for row in self._running[1].servers()])

    def _cores(self, n: int) -> NDArray[np.float64]:
        """Configured cores of the servers; where there are none, what the agent takes them for, or 1."""
        cores = np.ones(n)
        known = min(n, len(self._index))
        speeds = self._index[:known, 0]
        np.divide(self._weights[:known], speeds, out=cores[:known], where=speeds > 0.0)
        cores = np.clip(np.rint(cores), 1.0, _MAX_CORES)
        for slot in self._running[1].slots:
            if slot.server.cores is not None:
                cores[slot.index] = slot.server.cores
        return cores

    def _install(self) -> None:
        """Put weights and servers as they are now in force, if anything has changed."""
        plane, pool = self._running
        safe, active = self._safe_weights(), self._active()
        n = len(active)
        weights = safe.copy()
        known = min(n, len(self._weights))
        weights[:known] = self._weights[:known]
        cores, background = self._cores(n), np.zeros(n)
        background[: len(self._index)] = self._index[:n, 1]
        reach: list[Reach | None] = [None] * n
        for slot in pool.slots:
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
        parts = (weights, safe, active, cores, background)
        state = (*(part.tobytes() for part in parts), *reach)
        if state == self._installed:
            return
        servers = np.flatnonzero(active).astype(np.uint32)
        inputs = IndexInputs(cores, background, self.options.balancers)
        table = dispatch_table(self.options.rule, weights, active, inputs)
        plane.install(table, maglev_table(safe, servers) if len(servers) else servers, reach)
        self._installed = state


def detach(name: str, options: XdpOptions | None = None) -> bool:
    """Remove a balancer that a driver left at work; returns whether there was one.

    Args:
        name: of its region.
        options: say where it is pinned; None: at the customary place.

    Raises:
        DriverError: if its driver runs, or it cannot be removed.
    """
    where = default_pin_folder(name) if options is None else options.pin_folder(name)
    try:
        mount_bpf(where)
        if not where.is_dir():
            return False
        lock = os.open(where, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DriverError(f"the driver of the balancer pinned in {where} runs; end it first") from None
        else:
            unpin(where)
        finally:
            os.close(lock)
    except OSError as error:
        raise DriverError(f"the balancer pinned in {where} cannot be removed: {error.strerror or error}") from error
    return True


def _address_of(slot: Slot) -> Address | None:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(slot.server.address)
    return None


def _same_place(before: ServerConfig, after: ServerConfig, where: str) -> None:
    """A server that moves is another one: its flows would be sent where nobody knows them."""
    if ipaddress.ip_address(before.address) != ipaddress.ip_address(after.address) or before.port != after.port:
        raise InvalidOptionError(
            f"{where}: server {after.name!r} has the address {before.address} port {before.port} and cannot get "
            f"{after.address} port {after.port} while it is known; give the new one another name"
        )


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DriverError(f"the XDP object {path} cannot be read: {error.strerror}") from error
