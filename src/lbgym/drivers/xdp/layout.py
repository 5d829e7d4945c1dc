"""The memory that the balancer in the kernel and its driver share: ``balancer.h`` as NumPy dtypes."""

from __future__ import annotations

import enum

import numpy as np

#: As in ``balancer.h``; a driver takes over the pinned maps of its own version only.
VERSION = 1
MAX_SERVERS = 1024
MAX_VIPS = 64
SLOTS = 128
NAME_SIZE = 64
#: Metrics of reservoirs.
FCT, DURATION = 0, 1

#: As in ``lbgym_dispatch.h``: entries of an index table per server.
INDEX_EXACT = 1024
INDEX_MOST = 1 << 20
INDEX_ENTRIES = 6144


class Mechanism(enum.IntEnum):
    """What the program does for a new flow."""

    NOBODY = 0
    ALIAS = 1
    LOOKUP = 2
    TURNS = 3
    INDEX = 4
    TWO_CHOICES = 5


TABLE = np.dtype([(name, "u4") for name in ("mechanism", "size", "rows", "fallback_size")])
SETTINGS = np.dtype(
    [
        *[(name, "u8") for name in ("version", "bank", "expires", "syn_flows")],
        *[(name, "u4") for name in ("mode", "capacity", "lookup_size", "fct_sampling", "duration_sampling", "flows")],
        ("tables", TABLE, 2),
    ],
    align=True,
)
TOTAL_NAMES = (
    "syn_open", "turn", "unrouted", "syn_limited", "table_full", "untracked", "adopted", "after_close", "reused",
    "conflicts", "icmp", "fragments", "options", "malformed", "unreachable", "orphaned",
)  # fmt: skip
TOTALS = np.dtype([(name, "u8") for name in TOTAL_NAMES])
COUNTERS = np.dtype(
    [
        *[(name, "u8") for name in ("started", "completed", "rejected", "failed", "fct_count", "fct_sum")],
        ("unused", "u8", 2),
    ]
)
SERVER = np.dtype(
    [
        ("address", "u1", 16),
        ("port", ">u2"),
        ("mac", "u1", 6),
        ("own_mac", "u1", 6),
        ("unused", "u2"),
        ("ifindex", "u4"),
        ("weight", "u4"),
        ("unused2", "u8", 3),
        ("name", f"S{NAME_SIZE}"),
    ],
    align=True,
)
ALIAS = np.dtype([("threshold", "u8"), ("stay", "u4"), ("other", "u4")])
VIP = np.dtype([("address", "u1", 16), ("port", ">u2"), ("unused", "u2"), ("is_ipv6", "u4"), ("hash", "u8")])
RESERVOIR = np.dtype([("accepted", "u8"), ("samples", "u8", SLOTS)])
SHARED = np.dtype(
    [
        ("settings", SETTINGS),
        ("unused", "u8", 5),
        ("totals", TOTALS),
        ("open_flows", "u8", MAX_SERVERS),
        ("entries", "u8", MAX_SERVERS),
        ("counters", COUNTERS, MAX_SERVERS),
        ("servers", SERVER, (2, MAX_SERVERS)),
        ("aliases", ALIAS, (2, MAX_SERVERS)),
        ("vip_table", VIP, MAX_VIPS),
        ("reservoirs", RESERVOIR, (MAX_SERVERS, 2)),
    ],
    align=True,
)
LOOKUP = np.dtype([("server", "u4"), ("fallback", "u4")])
FLOW_KEY = np.dtype([("client", "u1", 16), ("port", ">u2"), ("vip", "u2")])
FLOW = np.dtype(
    [
        *[(name, "u8") for name in ("word", "started", "last")],
        ("ifindex", "u4"),
        ("client_mac", "u1", 6),
        ("own_mac", "u1", 6),
    ]
)
COLLECTION = np.dtype([(name, "u8") for name in ("now", "syn_timeout", "idle_timeout", "close_timeout")])
