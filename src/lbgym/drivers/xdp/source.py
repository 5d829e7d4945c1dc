"""The XDP balancer as a data plane: :class:`XdpBalancer`."""

from __future__ import annotations

import fcntl
import logging
import os
from pathlib import Path

import numpy as np

from ...features import NUM_FEATURES
from ...sharedmemory import Publication, abi
from ..base import DriverError
from ..config import DataPlaneConfig, ServerConfig
from ..pool import ServerPool
from .configured import ConfiguredBalancer, InForce, check_same_place
from .layout import MAX_SERVERS
from .options import XdpOptions, default_pin_folder
from .plane import Sizes, XdpPlane, check_privileges, mount_bpf, unpin
from .statistics import SampleStatistics
from .tables import IndexInputs, dispatch_table, maglev_table

logger = logging.getLogger("lbgym")


class XdpBalancer(ConfiguredBalancer):
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
        super().__init__(config, options, path)
        self._folder = self.options.pin_folder(config.name)
        self._plane: XdpPlane | None = None
        self._lock = -1
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
        self._pool = ServerPool(config, self._path, before, self._check_list)
        self._statistics = SampleStatistics(sizes.servers)
        plane.keep_alive(options.orphan_timeout)
        self._put_first_in_force()
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
                check_same_place(server, wanted[reach.name], self._where)
            seats.append(server)
        return seats

    # Source

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
            active=pool.slots.active,
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

    @property
    def plane(self) -> XdpPlane:
        """Program and maps, to look at."""
        return self._running[0]

    def close(self) -> None:
        self._close(detach=not self.options.keep)

    def _close(self, *, detach: bool) -> None:
        self._close_pool()
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
        if self._plane is None:
            raise DriverError("the XDP balancer is closed")
        return self._plane, self._servers

    def _keep_house(self) -> None:
        options = self.options
        self._running[0].collect(
            syn_timeout=options.syn_timeout, idle_timeout=options.idle_timeout, close_timeout=options.close_timeout
        )

    def _entries(self) -> list[int]:
        entries: list[int] = self._running[0].shared["entries"].astype(np.int64).tolist()
        return entries

    def _forget(self, row: int) -> None:
        plane = self._running[0]
        plane.shared["reservoirs"][row]["accepted"] = 0
        plane.shared["reservoirs"][row]["samples"] = 0
        self._statistics.forget(row)

    def _put_in_force(self, wanted: InForce) -> None:
        servers = np.flatnonzero(wanted.active).astype(np.uint32)
        inputs = IndexInputs(wanted.cores, wanted.background, self.options.balancers)
        table = dispatch_table(self.options.rule, wanted.weights, wanted.active, inputs)
        fallback = maglev_table(wanted.safe, servers) if len(servers) else servers
        self._running[0].install(table, fallback, wanted.reach)


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


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DriverError(f"the XDP object {path} cannot be read: {error.strerror}") from error
