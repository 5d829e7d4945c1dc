"""The balancer in the kernel: its program, maps and attachments, :class:`XdpPlane`."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import ipaddress
import mmap
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ...features.rng import mix64
from ...sharedmemory import seqlock
from ...simulator import maglev_table_size
from ..base import DriverError
from . import layout, libbpf
from .build import build_object, object_digest
from .tables import TURNS, DispatchTable

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_MAPS = ("shared", "lookups", "indices", "flows", "vips", "backends", "replies")
_PROGRAMS = ("balancer", "collect")
_NS = 1_000_000_000
#: A packet that is under way when the tables are flipped is through after that long, seconds.
_GRACE = 0.001
#: Word of ``shared`` that says which half of the tables is in force.
_BANK = layout.SETTINGS.fields["bank"][1] // 8  # type: ignore[index]
_EXPIRES = layout.SETTINGS.fields["expires"][1] // 8  # type: ignore[index]
_CAPABILITIES = {12: "CAP_NET_ADMIN", 38: "CAP_PERFMON", 39: "CAP_BPF"}
_CAP_SYS_ADMIN = 21


@dataclass(frozen=True, slots=True)
class Sizes:
    """Room in the maps of a balancer.

    Attributes:
        servers: rows, at most ``MAX_SERVERS``.
        flows: entries of the flow table, those of flows that have ended included.
        syn_flows: most of them that may be of flows of which only a SYN was seen.
        dnat: translate addresses, and see both directions; else only MAC addresses change.
    """

    servers: int = 64
    flows: int = 262_144
    syn_flows: int = 65_536
    dnat: bool = False

    @property
    def lookups(self) -> int:
        """Entries of a lookup table."""
        return max(maglev_table_size(self.servers), TURNS)


@dataclass(frozen=True, slots=True)
class Reach:
    """How a server is reached.

    Attributes:
        name: of the server.
        address, port: of the service there; DNAT writes them into packets.
        mac: of the server, or of the router to it; None: unknown, packets to it are dropped.
        own_mac: of the interface ``ifindex``.
    """

    name: str
    address: Address
    port: int
    mac: bytes | None = None
    own_mac: bytes = bytes(6)
    ifindex: int = 0


@dataclass(frozen=True, slots=True)
class Vip:
    """Address and TCP port that clients connect to."""

    address: Address
    port: int

    def __str__(self) -> str:
        host = f"[{self.address}]" if self.address.version == 6 else str(self.address)
        return f"{host}:{self.port}"

    @property
    def service(self) -> int:
        """The word that begins the hash of its flows: the same on every balancer."""
        raw = _wire(self.address)
        words = [int.from_bytes(raw[i : i + 8], "little") for i in (0, 8)]
        h = 0
        for word in (*words, self.port << 8 | 6):
            h = int(mix64(np.uint64(h ^ word)))
        return h


def _wire(address: Address) -> bytes:
    """As the program has it: 16 bytes, of which IPv4 fills the first four."""
    return address.packed.ljust(16, b"\0")


def missing_privileges() -> list[str]:
    """Capabilities that this process would need and has not."""
    with open("/proc/self/status") as file:
        effective = next(int(line.split()[1], 16) for line in file if line.startswith("CapEff"))
    if effective >> _CAP_SYS_ADMIN & 1:
        return [] if effective >> 12 & 1 else ["CAP_NET_ADMIN"]
    return [name for bit, name in _CAPABILITIES.items() if not effective >> bit & 1]


class XdpPlane:
    """Program and maps of one balancer. Its numbers are views of the kernel's memory.

    Make one by :meth:`load` or, where another process has left one pinned, by :meth:`take_over`.

    Attributes:
        shared: the record of ``layout.SHARED``.
        sizes: of its maps.
    """

    def __init__(self, maps: Mapping[str, int], programs: Mapping[str, int], keep: Any = None) -> None:
        self._maps, self._programs, self._keep = dict(maps), dict(programs), keep
        self._links: dict[int, int] = {}
        self._memory: list[mmap.mmap] = []
        self._pinned: Path | None = None
        self._flipped = 0.0
        words = self._view(self._maps["shared"], layout.SHARED.itemsize)
        self._words = words.view(np.uint64)
        self.shared: Any = words[: layout.SHARED.itemsize].view(layout.SHARED)[0]
        settings = self.shared["settings"]
        if settings["version"] not in (0, layout.VERSION):
            raise DriverError(f"the balancer is of version {settings['version']}, this driver of {layout.VERSION}")
        self.sizes = Sizes(
            int(settings["capacity"]), int(settings["flows"]), int(settings["syn_flows"]), bool(settings["mode"])
        )
        if settings["version"]:
            self._map_tables()

    @classmethod
    def load(cls, sizes: Sizes, content: bytes | None = None, programs: Sequence[str] = ("pass",)) -> Self:
        """Load the program and make its maps.

        Args:
            sizes: of the maps.
            content: the object; None: from the cache, or built by clang.
            programs: of the object to keep, beyond those of a balancer.

        Raises:
            DriverError: if something is missing: the message says what.
        """
        check_privileges()
        if content is None:
            content = build_object()
        made = libbpf.Object(content)
        try:
            if made.value_size(".bss") != _page(layout.SHARED.itemsize) and (
                made.value_size(".bss") != layout.SHARED.itemsize
            ):
                raise DriverError(
                    f"the XDP object was built for another version of lbgym: its state has {made.value_size('.bss')} "
                    f"bytes, not {layout.SHARED.itemsize}"
                )
            entries = {
                "lookups": 2 * sizes.lookups,
                "indices": 2 * sizes.servers * layout.INDEX_ENTRIES,
                "flows": sizes.flows,
                "vips": 2 * layout.MAX_VIPS,
                "backends": sizes.servers * 2 if sizes.dnat else 1,
                "replies": sizes.flows if sizes.dnat else 1,
            }
            for name, count in entries.items():
                made.set_entries(name, count)
            try:
                made.load()
            except OSError as error:
                raise _not_loaded(error) from error
            maps = {name: os.dup(made.map_fd(".bss" if name == "shared" else name)) for name in _MAPS}
            loaded = {name: os.dup(made.program_fd(name)) for name in (*_PROGRAMS, *programs)}
        finally:
            made.close()
        plane = cls(maps, loaded)
        settings = plane.shared["settings"]
        settings["capacity"], settings["lookup_size"] = sizes.servers, sizes.lookups
        settings["flows"], settings["syn_flows"], settings["mode"] = sizes.flows, sizes.syn_flows, int(sizes.dnat)
        settings["version"] = layout.VERSION
        plane.sizes = sizes
        plane._map_tables()
        return plane

    @classmethod
    def take_over(cls, folder: Path) -> Self:
        """Open what :meth:`pin` left behind: program, tables, flows and counters go on as they are.

        Raises:
            DriverError: if there is something else.
        """
        check_privileges()
        digest = folder / f"version-{object_digest()[:16]}"
        if not digest.exists():
            raise DriverError(
                f"{folder} holds a balancer of another version of lbgym, which this one cannot take over; remove it "
                "by lbgym dataplane xdp --detach, which also ends its flows"
            )
        try:
            maps = {name: libbpf.opened(str(folder / name)) for name in _MAPS}
            programs = {name: libbpf.opened(str(folder / name)) for name in _PROGRAMS}
            plane = cls(maps, programs)
            for path in folder.glob("link-*"):
                plane._links[int(path.name.partition("-")[2])] = libbpf.opened(str(path))
        except OSError as error:
            raise DriverError(f"the balancer pinned in {folder} cannot be taken over: {error.strerror}") from error
        plane._pinned = folder
        return plane

    def _view(self, fd: int, size: int) -> NDArray[np.uint8]:
        memory = mmap.mmap(fd, _page(size), mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._memory.append(memory)
        return np.frombuffer(memory, np.uint8)

    def _map_tables(self) -> None:
        lookups, servers = int(self.shared["settings"]["lookup_size"]), self.sizes.servers
        size = 2 * lookups * layout.LOOKUP.itemsize
        self._lookups = self._view(self._maps["lookups"], size)[:size].view(layout.LOOKUP).reshape(2, lookups)
        size = 2 * servers * layout.INDEX_ENTRIES * 8
        self._indices = self._view(self._maps["indices"], size)[:size].view(np.float64)
        self._indices = self._indices.reshape(2, layout.INDEX_ENTRIES, servers)

    # Tables

    @property
    def bank(self) -> int:
        """The half of the tables that is in force."""
        return int(self.shared["settings"]["bank"]) & 1

    def install(self, table: DispatchTable, fallback: NDArray[np.uint32], reach: Sequence[Reach | None]) -> None:
        """Fill the other half of the tables and put it in force: new flows see all of it or nothing.

        Args:
            table: of the dispatch rule.
            fallback: uint32[F], servers by hash, for what has no flow; empty: there is no server.
            reach: how each server is reached, by row; None: there is none in that row.
        """
        wait = self._flipped + _GRACE - time.monotonic()
        if wait > 0.0:
            time.sleep(wait)
        bank = 1 - self.bank
        half = self.shared["settings"]["tables"][bank]
        half["mechanism"], half["size"], half["rows"] = int(table.mechanism), table.size, table.rows
        half["fallback_size"] = len(fallback)
        if table.aliases is not None:
            self.shared["aliases"][bank][: len(table.aliases)] = table.aliases
        self._lookups[bank]["server"][: len(table.servers)] = table.servers
        self._lookups[bank]["fallback"][: len(fallback)] = fallback
        if table.index is not None:
            self._indices[bank][:, : table.rows] = table.index
        servers = np.zeros(len(reach), layout.SERVER)
        for row, server in zip(servers, reach, strict=True):
            if server is not None:
                row["name"] = server.name.encode()
                row["address"] = np.frombuffer(_wire(server.address), np.uint8)
                row["port"] = server.port
                if server.mac is not None:
                    row["mac"], row["own_mac"] = np.frombuffer(server.mac + server.own_mac, np.uint8).reshape(2, 6)
                    row["ifindex"] = server.ifindex
        self.shared["servers"][bank][: len(reach)] = servers
        self.shared["servers"][bank][len(reach) :]["ifindex"] = 0
        seqlock.store_word(self._words, _BANK, bank)
        self._flipped = time.monotonic()
        if self.sizes.dnat:
            self._set_backends(reach)

    def _set_backends(self, reach: Sequence[Reach | None]) -> None:
        fd = self._maps["backends"]
        wanted = {_key(s.address, s.port).tobytes(): i for i, s in enumerate(reach) if s is not None}
        for key in list(libbpf.keys(fd, layout.FLOW_KEY)):
            if key.tobytes() not in wanted:
                libbpf.delete(fd, key)
        for raw, row in wanted.items():
            libbpf.update(fd, np.frombuffer(raw, layout.FLOW_KEY), np.array(row, np.uint32))

    def servers(self) -> list[Reach | None]:
        """How servers are reached, by row, as it is in force."""
        rows = int(self.shared["settings"]["tables"][self.bank]["rows"])
        return [_reach(row) for row in self.shared["servers"][self.bank][:rows]]

    def set_vips(self, vips: Sequence[Vip]) -> None:
        """Take packets to these addresses and ports. Every VIP keeps its index for as long as the program lives."""
        table, fd = self.shared["vip_table"], self._maps["vips"]
        known = self.vips()
        for index, vip in enumerate(vips):
            if index >= len(known):
                row = table[index]
                row["address"] = np.frombuffer(_wire(vip.address), np.uint8)
                row["port"], row["is_ipv6"], row["hash"] = vip.port, vip.address.version == 6, vip.service
            elif known[index] != vip:
                raise DriverError(
                    f"the balancer that is taken over has the VIPs {', '.join(map(str, known))}, not "
                    f"{', '.join(map(str, vips))}: more can be added at the end, and none changed"
                )
            libbpf.update(fd, _key(vip.address, vip.port), np.array(index, np.uint32))
            libbpf.update(fd, _key(vip.address, 0), np.array(0xFFFFFFFF, np.uint32))
        if len(known) > len(vips):
            raise DriverError(
                f"the balancer that is taken over has more VIPs: {', '.join(map(str, known[len(vips) :]))}; detach it "
                "to have fewer"
            )

    def vips(self) -> list[Vip]:
        """The VIPs it has."""
        rows = self.shared["vip_table"]
        return [
            Vip(_address(row["address"].tobytes(), bool(row["is_ipv6"])), int(row["port"]))
            for row in rows[rows["port"] > 0]
        ]

    def set_sampling(self, fct: float, duration: float) -> None:
        """Probabilities to take a sample, 0 to 1."""
        settings = self.shared["settings"]
        settings["fct_sampling"], settings["duration_sampling"] = (round(p * 0xFFFFFFFF) for p in (fct, duration))

    def keep_alive(self, seconds: float) -> None:
        """Have the program place new flows by the configured weights if this is not called again in time."""
        expires = time.monotonic_ns() + round(min(seconds, 1e9) * _NS)
        seqlock.store_word(self._words, _EXPIRES, expires)

    def collect(self, *, syn_timeout: float, idle_timeout: float, close_timeout: float, now: int | None = None) -> None:
        """Forget flows without a packet for so many seconds: those of only a SYN, open ones, and ended ones.

        Args:
            syn_timeout: of flows of which only a SYN was seen; they have failed.
            idle_timeout: of other open flows; they have failed.
            close_timeout: of flows that have ended, whose last packets still go to their server.
            now: ns of the monotonic clock; None: now.
        """
        context = np.zeros((), layout.COLLECTION)
        context["now"] = time.monotonic_ns() if now is None else now
        for name, seconds in (("syn", syn_timeout), ("idle", idle_timeout), ("close", close_timeout)):
            context[f"{name}_timeout"] = round(seconds * _NS)
        libbpf.run(self._programs["collect"], context)

    def flow_count(self) -> int:
        """Entries of the flow table."""
        return int(self.shared["entries"].sum())

    def flow(self, vip: int, client: Address, port: int) -> Any:
        """The entry of a flow, a record of ``layout.FLOW``; None if there is none."""
        key, value = _key(client, port, vip), np.zeros((), layout.FLOW)
        return value[()] if libbpf.lookup(self._maps["flows"], key, value) else None

    # Interfaces

    def program(self, name: str = "balancer") -> int:
        """A descriptor of a program: "balancer", "collect", and those that :meth:`load` was asked for."""
        return self._programs[name]

    @property
    def attached(self) -> tuple[int, ...]:
        """Interfaces that it is attached to."""
        return tuple(self._links)

    def detach_from(self, ifindex: int) -> None:
        """Leave one interface, which may be gone already."""
        libbpf.detach(self._links.pop(ifindex))
        if self._pinned is not None:
            (self._pinned / f"link-{ifindex}").unlink(missing_ok=True)

    def attach(self, ifindex: int, name: str, mode: str = "auto") -> str:
        """Attach to an interface of this network namespace; returns "native" or "generic".

        Args:
            ifindex: of the interface.
            name: of it, for messages.
            mode: "native", "generic", or "auto": native where the driver of the interface can.

        Raises:
            DriverError: if it cannot, or has an XDP program already.
        """
        flags = {"native": libbpf.DRIVER_MODE, "generic": libbpf.GENERIC_MODE}
        modes = ("native", "generic") if mode == "auto" else (mode,)
        for chosen in modes:
            try:
                self._links[ifindex] = libbpf.attach(self._programs["balancer"], ifindex, flags[chosen])
            except OSError as error:
                if error.errno in (errno.EBUSY, errno.EEXIST):
                    raise DriverError(
                        f"interface {name} already has an XDP program; detach it first (ip link set dev {name} xdp "
                        "off, or lbgym dataplane xdp --detach)"
                    ) from error
                if chosen == modes[-1]:
                    raise DriverError(
                        f"interface {name} does not take an XDP program in {chosen} mode: {error.strerror}"
                    ) from error
            else:
                if self._pinned is not None:
                    libbpf.pin(self._links[ifindex], str(self._pinned / f"link-{ifindex}"))
                return chosen
        raise AssertionError(mode)

    def pin(self, folder: Path) -> None:
        """Have program, maps and attachments outlive this process, in a folder of a BPF file system.

        Raises:
            DriverError: if it cannot be made there.
        """
        made = False
        try:
            mount_bpf(folder)
            folder.mkdir(mode=0o700, parents=True)
            made = True
            for name, fd in self._maps.items():
                libbpf.pin(fd, str(folder / name))
            for name in _PROGRAMS:
                libbpf.pin(self._programs[name], str(folder / name))
            for ifindex, fd in self._links.items():
                libbpf.pin(fd, str(folder / f"link-{ifindex}"))
            # Last, as the sign that nothing is missing.
            (folder / f"version-{object_digest()[:16]}").mkdir()
        except OSError as error:
            if made:
                unpin(folder)
            raise DriverError(f"the balancer cannot be pinned in {folder}: {error.strerror or error}") from error
        self._pinned = folder

    def detach(self) -> None:
        """Detach from all interfaces and forget what is pinned. Idempotent."""
        if self._pinned is not None:
            unpin(self._pinned)
            self._pinned = None
        while self._links:
            libbpf.detach(self._links.popitem()[1])

    def close(self) -> None:
        """Close this process's descriptors: what is not pinned ends. Idempotent.

        The arrays may not be used afterwards.
        """
        for fd in (*self._links.values(), *self._maps.values(), *self._programs.values()):
            os.close(fd)
        self._links, self._maps, self._programs = {}, {}, {}
        self.shared = None
        for name in ("_words", "_lookups", "_indices"):
            self.__dict__.pop(name, None)
        for memory in self._memory:
            # Where somebody still holds an array, the memory goes with it.
            with contextlib.suppress(BufferError):
                memory.close()
        self._memory = []


def _page(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def _address(raw: bytes, is_ipv6: bool) -> Address:
    return ipaddress.IPv6Address(raw) if is_ipv6 else ipaddress.IPv4Address(raw[:4])


def _key(address: Address, port: int, vip: int = 0) -> NDArray[Any]:
    key = np.zeros((), layout.FLOW_KEY)
    key["client"] = np.frombuffer(_wire(address), np.uint8)
    key["port"], key["vip"] = port, vip
    return key


def _reach(row: Any) -> Reach | None:
    if not row["name"]:
        return None
    raw = row["address"].tobytes()
    # An IPv6 address of a server whose last twelve bytes are zeros would be multicast, loopback or a router's.
    address = _address(raw, any(raw[4:]))
    reach = Reach(row["name"].decode(), address, int(row["port"]))
    if not row["ifindex"]:
        return reach
    return replace(reach, mac=row["mac"].tobytes(), own_mac=row["own_mac"].tobytes(), ifindex=int(row["ifindex"]))


def check_privileges() -> None:
    """Raise DriverError, with the capabilities that are missing."""
    if missing := missing_privileges():
        raise DriverError(
            f"an XDP balancer needs {', '.join(missing)}, which this process has not: run it as root, or give its "
            "service CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON"
        )


def _not_loaded(error: OSError) -> DriverError:
    log = libbpf.log()
    if error.errno == errno.ENOSYS:
        return DriverError("this kernel has no BPF (CONFIG_BPF_SYSCALL)")
    if error.errno == errno.EPERM:
        return DriverError(
            "this kernel does not let this process load BPF programs; it may be a container without the right, or one "
            "in a user namespace of its own"
        )
    if error.errno == errno.ENOMEM:
        return DriverError("there is not enough memory for the maps: choose a smaller flow table or fewer servers")
    last = [line for line in log.splitlines() if line and not line.startswith(("processed", "--", "libbpf: failed"))]
    reason = last[-1].strip() if last else error.strerror
    return DriverError(f"kernel {os.uname().release} refuses the XDP program, which needs 5.18 or newer: {reason}")


def mount_bpf(folder: Path) -> None:
    """Mount a BPF file system at /sys/fs/bpf if ``folder`` is to be there and it is not; raises OSError."""
    root = Path("/sys/fs/bpf")
    if not folder.is_relative_to(root) or os.path.ismount(root):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"bpf", bytes(root), b"bpf", 0, b"mode=0700") != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"no BPF file system can be mounted at {root}: {os.strerror(number)}")


def unpin(folder: Path) -> None:
    """Detach the program that is pinned in a folder from its interfaces, and forget what is pinned there."""
    # Links first: without them no packet meets tables that are half gone.
    for path in list(folder.glob("link-*")):
        libbpf.detach(libbpf.opened(str(path)))
        path.unlink()
    for path in list(folder.iterdir()):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()
