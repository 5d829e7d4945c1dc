"""The balancer core on raw sockets as a data plane: :class:`AfPacketBalancer`."""

from __future__ import annotations

import ctypes
import errno
import ipaddress
import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import InvalidOptionError
from ...sharedmemory import Publication, abi
from ..base import DriverError
from ..config import DataPlaneConfig
from ..pool import ServerPool
from ..xdp.configured import ConfiguredBalancer, InForce
from ..xdp.options import XdpOptions
from .core import MODES, SERVER, TCP, TOTALS, VIP, Core, CoreOptions, load_library

#: As ``lbgym_hop`` in ``afpacket.h``.
HOP = np.dtype([("ifindex", "u4"), ("mac", "u1", 6), ("own_mac", "u1", 6)])
_LINK_TOTALS = ("received", "sent", "failed", "too_large", "answered", "unlinked")
#: Longest wait for the thread that forwards packets, ns.
_PATIENCE = 1_000_000_000
#: Options of an XDP balancer that say nothing to this one.
_OF_XDP = {"attach": "auto", "keep": False, "pin": None, "object": None}


class AfPacketBalancer(ConfiguredBalancer):
    """An L4 balancer for TCP in a thread of this process, which needs raw sockets and a C compiler.

    Everything is checked before anything is changed. The VIPs must not be the kernel's, and it must not forward: both
    see every packet, and the balancer answers for the link-layer addresses of the VIPs itself.

    Args:
        config: the content of dataplane.toml.
        options: its table ``[driver]``; None: taken from ``config``.
        path: the file, for :meth:`reload`; None: there is none.

    Raises:
        InvalidOptionError, UnknownNameError: for a configuration that is not good.
        MissingExtraError: if pyroute2 is not installed.
        DriverError: if something is missing, or the kernel would handle the same packets; the message says what.
    """

    driver = "afpacket"

    def __init__(
        self, config: DataPlaneConfig, options: XdpOptions | None = None, path: str | os.PathLike[str] | None = None
    ) -> None:
        self._core: Core | None = None
        self._plane: int | None = None
        super().__init__(config, options, path)
        try:
            self._start(config)
        except BaseException:
            self.close()
            raise

    def _start(self, config: DataPlaneConfig) -> None:
        options = self.options
        for key, default in _OF_XDP.items():
            if getattr(options, key) != default:
                raise InvalidOptionError(f"{self._where}, [driver]: {key} is for lbgym dataplane xdp only")
        check_privileges()
        interfaces = [(self._neighbours.interface(name), name) for name in options.interfaces]
        vips = options.parsed_vips
        for vip in vips:
            _check_not_local(vip.address)
        for _, name in interfaces:
            for version in sorted({vip.address.version for vip in vips}):
                _check_no_forwarding(name, version)
        capacity = config.capacity or max(abi.DEFAULT_CAPACITY, len(config.servers))
        self._core = Core(
            CoreOptions(
                servers=capacity,
                flows=options.flows,
                syn_flows=options.syn_flows or 0,
                mode=options.mode,
                syn_timeout=options.syn_timeout,
                idle_timeout=options.idle_timeout,
                close_timeout=options.close_timeout,
                fct_sampling=options.fct_sampling,
                duration_sampling=options.duration_sampling,
            ),
            with_sockets(load_library()),
        )
        rows = np.zeros(len(vips), VIP)
        for row, vip in zip(rows, vips, strict=True):
            row["address"] = np.frombuffer(vip.address.packed.ljust(16, b"\0"), np.uint8)
            row["port"], row["protocol"], row["is_ipv6"] = vip.port, TCP, vip.address.version == 6
        self._core.set_vips(rows)
        self._plane = self._library.lbgym_afpacket_create(
            self._core.handle, MODES.index(options.mode), rows.ctypes.data, len(rows)
        )
        if not self._plane:
            raise DriverError("there is not enough memory for the buffers of raw sockets")
        for ifindex, name in interfaces:
            own_mac = self._neighbours.own_mac(ifindex)
            self._done("listen", f"packets of interface {name} cannot be had", ifindex, own_mac)
        self._generations = np.zeros(capacity, np.uint32)
        self._hop_rows: NDArray[Any] = np.zeros(0, HOP)
        self._pool = ServerPool(config, self._path, check=self._check_list)
        self._put_first_in_force()
        self._done("start", "no thread can be started")

    def _done(self, name: str, message: str, *arguments: Any) -> None:
        code = getattr(self._library, f"lbgym_afpacket_{name}")(self._plane, *arguments)
        if code == -errno.EPERM:
            raise DriverError(f"{message}: {os.strerror(-code)}; it needs CAP_NET_RAW")
        if code < 0:
            raise DriverError(f"{message}: {os.strerror(-code)}")

    @property
    def _library(self) -> ctypes.CDLL:
        return self.core.library

    @property
    def core(self) -> Core:
        """The core, to look at."""
        if self._core is None:
            raise DriverError("the afpacket balancer is closed")
        return self._core

    def _collect(self) -> None:
        if not self._library.lbgym_afpacket_collect(self._plane, _PATIENCE):
            raise DriverError("the thread that forwards packets does not answer")

    # Source

    def read(self, now: float) -> Publication:
        self._refresh()
        self._install()
        self._collect()
        pool = self._servers
        counters, features, totals = self.core.read(len(pool.slots))
        truth, age = pool.ground_truth()
        return Publication(
            timestamp=now,
            active=pool.slots.active,
            stats=features,
            started=counters["started"].astype(np.int64),
            completed=counters["completed"].astype(np.int64),
            rejected=counters["rejected"].astype(np.int64),
            failed=counters["failed"].astype(np.int64),
            ground_truth=truth,
            ground_truth_age=age,
            unrouted=int(totals["unrouted"]),
            fct_count=int(counters["fct_count"].sum()),
            fct_sum=float(counters["fct_sum"].sum()) * 1e-9,
        )

    def totals(self) -> dict[str, int]:
        """Events that are no server's, of the core and of the sockets."""
        self._collect()
        totals = self.core.read(1)[2]
        sockets = np.zeros(len(_LINK_TOTALS), np.uint64)
        self._library.lbgym_afpacket_read(self._plane, sockets.ctypes.data)
        return {name: int(totals[name]) for name in TOTALS.names or ()} | dict(
            zip(_LINK_TOTALS, map(int, sockets), strict=True)
        )

    def close(self) -> None:
        self._close_pool()
        if self._core is not None:
            if self._plane:
                self._library.lbgym_afpacket_destroy(self._plane)
                self._plane = None
            self._core.close()
            self._core = None

    # Balancer

    def _entries(self) -> list[int]:
        self._collect()
        entries: list[int] = self.core.read(len(self._servers.slots))[0]["entries"].tolist()
        return entries

    def _forget(self, row: int) -> None:
        self._generations[row] += 1

    def _put_in_force(self, wanted: InForce) -> None:
        n = len(wanted.weights)
        rows, hops = np.zeros(n, SERVER), np.zeros(n, HOP)
        for row, hop, reach in zip(rows, hops, wanted.reach, strict=True):
            if reach is None:
                continue
            row["address"] = np.frombuffer(reach.address.packed.ljust(16, b"\0"), np.uint8)
            row["port"], row["is_ipv6"], row["present"] = reach.port, reach.address.version == 6, 1
            if reach.mac is not None:
                row["reachable"] = 1
                hop["ifindex"] = reach.ifindex
                hop["mac"], hop["own_mac"] = np.frombuffer(reach.mac + reach.own_mac, np.uint8).reshape(2, 6)
        rows["via"], rows["generation"] = np.arange(n), self._generations[:n]
        rows["active"] = wanted.active & (rows["present"] == 1)
        rows["weight"], rows["safe_weight"] = wanted.weights, wanted.safe
        rows["cores"], rows["background"] = wanted.cores, wanted.background
        # Next hops first: no packet is sent to a server before it is known where that is.
        if hops.tobytes() != self._hop_rows.tobytes():
            self._library.lbgym_afpacket_set_hops(self._plane, hops.ctypes.data, n)
            self._hop_rows = hops
        self.core.install(self.options.rule, rows, self.options.balancers)


def with_sockets(library: ctypes.CDLL) -> ctypes.CDLL:
    """``library``, whose functions of ``afpacket.h`` now know their types."""
    at, u32 = ctypes.c_void_p, ctypes.c_uint32
    functions: dict[str, tuple[Any, list[Any]]] = {
        "create": (at, [at, u32, at, u32]),
        "listen": (ctypes.c_int, [at, u32, ctypes.c_char_p]),
        "start": (ctypes.c_int, [at]),
        "set_hops": (None, [at, at, u32]),
        "collect": (ctypes.c_bool, [at, ctypes.c_uint64]),
        "read": (None, [at, at]),
        "destroy": (None, [at]),
    }
    for name, (result, arguments) in functions.items():
        function = getattr(library, f"lbgym_afpacket_{name}")
        function.restype, function.argtypes = result, arguments
    return library


def check_privileges() -> None:
    """Raise DriverError if this process may not open raw sockets."""
    try:
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0).close()
    except PermissionError:
        raise DriverError(
            "a balancer on raw sockets needs CAP_NET_RAW, which this process has not: run it as root, or give its "
            "service that capability"
        ) from None


def _check_not_local(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((str(address), 0))
        except OSError:
            return
    raise DriverError(
        f"the VIP {address} is an address of this machine, whose kernel would refuse its connections: remove it from "
        "its interface; the balancer itself answers for it"
    )


def _check_no_forwarding(interface: str, version: int) -> None:
    family = "ipv6" if version == 6 else "ipv4"
    try:
        forwards = Path(f"/proc/sys/net/{family}/conf/{interface}/forwarding").read_text().strip() != "0"
    except OSError:
        return
    if forwards:
        raise DriverError(
            f"the kernel forwards packets of {family.replace('ip', 'IP')} from interface {interface}, and would send "
            f"them a second time: set net.{family}.conf.{interface}.forwarding=0"
        )
