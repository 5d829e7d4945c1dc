"""The balancer core in C from Python: :class:`Core`. Its functions are those of ``lbgym_core.h``."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import InvalidOptionError
from ...features import NUM_FEATURES
from ..base import DriverError
from .build import build_library

NO_SERVER = 0xFFFF
MODES = ("dsr", "gre", "ipip", "dnat")
PASS, SEND, REPLY, DROP, HANDOVER = range(5)
TCP, UDP = 6, 17

SERVER = np.dtype(
    [
        ("address", "u1", 16),
        ("port", ">u2"),
        *[(name, "u1") for name in ("is_ipv6", "present", "reachable", "active")],
        ("reserved", "u2"),
        ("via", "u4"),
        ("generation", "u4"),
        *[(name, "f8") for name in ("weight", "safe_weight", "cores", "background")],
    ]
)
VIP = np.dtype([("address", "u1", 16), ("port", ">u2"), ("protocol", "u1"), ("is_ipv6", "u1")])
COUNTER_NAMES = ("started", "completed", "rejected", "failed", "fct_count", "fct_sum", "entries", "open")
COUNTERS = np.dtype([(name, "u8") for name in COUNTER_NAMES])
TOTAL_NAMES = (
    "syn_open", "unrouted", "syn_limited", "table_full", "untracked", "adopted", "after_close", "reused", "conflicts",
    "icmp", "fragments", "malformed", "unreachable", "no_room", "bursts", "packets",
)  # fmt: skip
TOTALS = np.dtype([(name, "u8") for name in TOTAL_NAMES])


class Packet(ctypes.Structure):
    """A packet of a burst, ``lbgym_packet``."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        *[(name, ctypes.c_uint32) for name in ("length", "headroom", "link", "via")],
        *[(name, ctypes.c_uint16) for name in ("server", "vip")],
        *[(name, ctypes.c_uint8) for name in ("verdict", "partial")],
        ("reserved", ctypes.c_uint16),
    ]


class _Options(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_uint32) for name in ("workers", "servers", "flows", "syn_flows", "mode", "owners")],
        *[(name, ctypes.c_uint64) for name in ("seed", "syn_timeout", "idle_timeout", "udp_timeout", "close_timeout")],
        *[(name, ctypes.c_double) for name in ("fct_sampling", "duration_sampling")],
        ("source4", ctypes.c_uint8 * 4),
        ("source6", ctypes.c_uint8 * 16),
        ("reserved2", ctypes.c_uint32),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreOptions:
    """``lbgym_core_options``, whose comments say what each is; timeouts in seconds."""

    workers: int = 1
    servers: int = 64
    flows: int = 262_144
    syn_flows: int = 0
    mode: str = "dsr"
    owners: int = 0
    seed: int = 0
    syn_timeout: float = 10.0
    idle_timeout: float = 300.0
    udp_timeout: float = 30.0
    close_timeout: float = 10.0
    fct_sampling: float = 1.0
    duration_sampling: float = 1 / 64
    source4: bytes = bytes(4)
    source6: bytes = bytes(16)

    def _native(self) -> _Options:
        values = dataclasses.asdict(self)
        values["mode"] = MODES.index(self.mode)
        for name in ("syn_timeout", "idle_timeout", "udp_timeout", "close_timeout"):
            values[name] = round(values[name] * 1e9)
        values["source4"] = (ctypes.c_uint8 * 4)(*self.source4)
        values["source6"] = (ctypes.c_uint8 * 16)(*self.source6)
        return _Options(**values)


def load_library(flags: Sequence[str] = ()) -> ctypes.CDLL:
    """The compiled core, with the types of its functions."""
    return with_prototypes(build_library(flags))


def with_prototypes(library: ctypes.CDLL) -> ctypes.CDLL:
    """``library``, whose functions now know their types."""
    at, u32, u64, text = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_char_p
    functions: dict[str, tuple[Any, list[Any]]] = {
        "lbgym_rule_named": (ctypes.c_int, [text]),
        "lbgym_core_create": (at, [ctypes.POINTER(_Options), text, ctypes.c_size_t]),
        "lbgym_core_destroy": (None, [at]),
        "lbgym_core_message": (text, [at]),
        "lbgym_core_worker": (at, [at, u32]),
        "lbgym_core_set_vips": (ctypes.c_int, [at, at, u32]),
        "lbgym_core_install": (ctypes.c_int, [at, ctypes.c_int, u32, at, u32]),
        "lbgym_worker_run": (None, [at, at, u32, u64]),
        "lbgym_worker_tick": (u32, [at, u64, u32]),
        "lbgym_core_ask": (None, [at]),
        "lbgym_core_answered": (ctypes.c_bool, [at]),
        "lbgym_core_read": (None, [at, u32, at, at]),
        "lbgym_core_read_totals": (None, [at, at]),
        "lbgym_core_open_flows": (at, [at]),
    }
    for name, (result, arguments) in functions.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class Core:
    """One service: VIPs, servers and a dispatch rule. Methods are for one thread; workers may run on others.

    Raises:
        InvalidOptionError: for an option out of its range, or if there is not enough memory.
        DriverError: if the core cannot be compiled.
    """

    def __init__(self, options: CoreOptions, library: ctypes.CDLL | None = None) -> None:
        self.options = options
        self.library = load_library() if library is None else library
        message = ctypes.create_string_buffer(512)
        self.handle = self.library.lbgym_core_create(ctypes.byref(options._native()), message, len(message))
        if not self.handle:
            raise InvalidOptionError(message.value.decode())
        at = self.library.lbgym_core_open_flows(self.handle)
        #: uint64[servers], open flows by row as they are now.
        self.open_flows = np.ctypeslib.as_array(ctypes.cast(at, ctypes.POINTER(ctypes.c_uint64)), (options.servers,))

    def worker(self, number: int = 0) -> int:
        """The address of a worker."""
        return int(self.library.lbgym_core_worker(self.handle, number))

    def set_vips(self, vips: NDArray[Any]) -> None:
        """Take packets to these, ``VIP``[n]: those there are, and further ones at the end."""
        self._call("lbgym_core_set_vips", vips.ctypes.data, len(vips))

    def install(self, rule: str, servers: NDArray[Any], balancers: int = 1) -> None:
        """Put servers, ``SERVER``[N], and their weights in force."""
        number = self.library.lbgym_rule_named(rule.encode())
        self._call("lbgym_core_install", number, balancers, servers.ctypes.data, len(servers))

    def _call(self, name: str, *arguments: Any) -> None:
        if getattr(self.library, name)(self.handle, *arguments) < 0:
            raise InvalidOptionError(self.library.lbgym_core_message(self.handle).decode())

    def ask(self) -> None:
        """Have every worker copy what it has counted at its next tick."""
        self.library.lbgym_core_ask(self.handle)

    @property
    def answered(self) -> bool:
        """True if all workers have, so that :meth:`read` may be called."""
        return bool(self.library.lbgym_core_answered(self.handle))

    def read(self, servers: int) -> tuple[NDArray[Any], NDArray[np.float32], Any]:
        """What workers had counted when they were asked: ``COUNTERS``[N], features float32[N, 11], ``TOTALS``.

        Raises:
            DriverError: if a worker has not answered yet.
        """
        if not self.answered:
            raise DriverError("a worker of the balancer does not answer")
        counters, features = np.zeros(servers, COUNTERS), np.zeros((servers, NUM_FEATURES), np.float32)
        totals = np.zeros((), TOTALS)
        for row in range(servers):
            self.library.lbgym_core_read(self.handle, row, counters[row:].ctypes.data, features[row:].ctypes.data)
        self.library.lbgym_core_read_totals(self.handle, totals.ctypes.data)
        return counters, features, totals

    def close(self) -> None:
        """Free it; no worker may run any more. Idempotent."""
        if self.handle:
            self.open_flows = np.zeros(0, np.uint64)
            self.library.lbgym_core_destroy(self.handle)
            self.handle = None
