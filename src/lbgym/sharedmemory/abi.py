"""The binary interface: one table of fields, from which everything else follows.

A region is a header, a ring of observation frames (data plane to agent), a double-buffered action (agent to data
plane) and a double-buffered table of the servers' names. The NumPy dtypes and :class:`Layout` below,
``lbgym/include/lbgym_shm.h`` and the tables of ``docs/shared-memory.md`` are generated from these tuples
(``python -m lbgym.sharedmemory.generate``).

Versions: a new minor version may give a meaning to reserved bytes of a struct (0 means that the feature is absent), set
a new flag, append sections to a frame or an action, or add tables behind the actions. What older readers know stays
where it is, and readers accept older regions, which lack what came later. Any other change is a new major version,
which readers refuse.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import cache, cached_property

import numpy as np

from ..features.columns import FEATURE_NAMES, GROUND_TRUTH_NAMES
from ..snapshot import COUNTER_NAMES as COUNTER_NAMES  # columns of the section ``counters``

#: "LBGYMSHM" read as a little-endian integer.
MAGIC = int.from_bytes(b"LBGYMSHM", "little")
VERSION_MAJOR = 1
VERSION_MINOR = 1

NUM_FRAMES = 4
NUM_ACTIONS = 2
NUM_NAMES = 2
DEFAULT_CAPACITY = 64
MAX_CAPACITY = 65_536
#: Structs and sections begin on cache lines of this many bytes.
LINE = 64

#: Bytes of a server's name, padded with zeros; the last one is always 0.
NAME_SIZE = 64

#: States of a region.
STATE_RUNNING = 1
STATE_CLOSED = 2


class ServerState(IntEnum):
    """A server's health as the data plane reports it; :attr:`UNKNOWN` if it does not."""

    UNKNOWN = 0
    UP = 1
    #: Finishes its flows and takes no new ones.
    DRAINING = 2
    DOWN = 3


#: Age of ground truth that is not known, ns.
AGE_UNKNOWN = (1 << 64) - 1

#: Flags of a frame.
FLAG_GROUND_TRUTH = 1  # the section ground_truth is filled
FLAG_APPLIED = 2  # an action has been applied since the producer started; applied_* say which and when
FLAG_SAFE = 4  # the safe weights are in force: no action yet, or the lease of the last one is over

#: Flag of a region: its data plane dispatches by index parameters, and actions have the section ``index``.
OPTION_INDEX = 1
#: Flag of an action: the section ``index`` is filled.
FLAG_INDEX = 1

#: First bit of the ground-truth columns in the header's ``features``; those of the features begin at 0.
GROUND_TRUTH_BIT = 16

#: Bytes of the file that are locked (open file description locks) by whoever has the role.
PRODUCER_LOCK = 0
AGENT_LOCK = 1

_TYPES = {"u8": "u1", "u16": "<u2", "u32": "<u4", "u64": "<u8", "f32": "<f4", "f64": "<f8", "char": "S"}
_SIZES = {"u8": 1, "u16": 2, "u32": 4, "u64": 8, "f32": 4, "f64": 8, "char": 1}


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a struct; ``count`` above 1 is an array (for "char" the length of a zero-padded string)."""

    name: str
    type: str
    doc: str
    count: int = 1

    @property
    def size(self) -> int:
        """Bytes."""
        return _SIZES[self.type] * self.count

    @property
    def dtype(self) -> str:
        """NumPy's name of the type."""
        return f"S{self.count}" if self.type == "char" else _TYPES[self.type]


@dataclass(frozen=True, slots=True)
class Section:
    """An array in a frame, an action or a table of names with ``columns`` values of one type per server.

    Regions of a minor version below ``since`` do not have it; those without the ``option`` (a flag of the header)
    neither.
    """

    name: str
    type: str
    doc: str
    columns: int = 1
    since: int = 0
    option: int = 0

    def size(self, capacity: int) -> int:
        """Bytes, up to the next cache line."""
        return _lines(_SIZES[self.type] * self.columns * capacity)


@dataclass(frozen=True, slots=True, eq=False)
class Struct:
    """Fields in order, naturally aligned without gaps, padded with reserved bytes to ``size``."""

    name: str
    doc: str
    size: int
    fields: tuple[Field, ...]

    def offset(self, name: str) -> int:
        """Of a field, bytes from the beginning of the struct."""
        return int(self.dtype.fields[name][1])  # type: ignore[index]

    @property
    def dtype(self) -> np.dtype[np.void]:
        """As a NumPy structured type."""
        return _struct_dtype(self)


@cache
def _struct_dtype(struct: Struct) -> np.dtype[np.void]:
    names, formats, offsets, at = [], [], [], 0
    for field in struct.fields:
        if at % _SIZES[field.type]:
            raise ValueError(f"{struct.name}.{field.name} at byte {at} is not aligned to {_SIZES[field.type]}")
        if not field.name.startswith("reserved"):
            names.append(field.name)
            formats.append(field.dtype if field.count == 1 or field.type == "char" else (field.dtype, (field.count,)))
            offsets.append(at)
        at += field.size
    if at != struct.size:
        raise ValueError(f"the fields of {struct.name} fill {at} bytes of {struct.size}")
    return np.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": struct.size})


HEADER = Struct(
    "header",
    "At the beginning of the region. Line 1 and 2 never change after creation; line 3 is written by the producer, line "
    "4 by the agent.",
    256,
    (
        Field("magic", "u64", 'the bytes "LBGYMSHM"'),
        Field("version_major", "u16", "other values are refused"),
        Field("version_minor", "u16", "other values are read"),
        Field("header_size", "u32", "bytes of this struct"),
        Field("total_size", "u64", "bytes of the region"),
        Field("capacity", "u32", "servers there is room for"),
        Field("num_frames", "u32", "observation frames in the ring, a power of two"),
        Field("frames_offset", "u32", "bytes from the beginning of the region to the first frame"),
        Field("frame_size", "u32", "bytes from one frame to the next"),
        Field("actions_offset", "u32", "bytes from the beginning of the region to the first action"),
        Field("action_size", "u32", "bytes from one action to the next"),
        Field("num_actions", "u32", "2"),
        Field(
            "names_offset", "u32", "bytes from the beginning of the region to the first table of names; 0: none (1.0)"
        ),
        Field("names_size", "u32", "bytes from one table of names to the next; there are 2"),
        Field("options", "u32", "1 the data plane understands the section index of actions, which is there"),
        Field("instance", "u64", "a random number, another one for each creation"),
        Field("created_at", "u64", "ns of CLOCK_REALTIME"),
        Field("publish_interval", "u64", "ns on the data plane's clock between observations, as planned"),
        Field("clock_rate", "f64", "seconds of the data plane's clock per second; 1 unless time is scaled"),
        Field("producer_pid", "u32", "process that created the region, in its own namespace"),
        Field("features", "u32", "real columns: bit i feature i, bit 16 + i ground truth i; in 1.0 all of them are"),
        Field("driver", "char", "what kind of data plane this is, UTF-8 padded with zeros; for people", 24),
        Field("latest", "u64", "sequence id of the newest observation; 0: none yet"),
        Field("heartbeat", "u64", "ns of CLOCK_MONOTONIC at the producer's last sign of life"),
        Field("observation_event", "u32", "grows with every observation; the futex that agents wait on"),
        Field("observation_waiters", "u32", "set by whoever is about to wait, cleared by the producer that wakes them"),
        Field("state", "u32", "1 running, 2 closed or replaced by another region of the same name"),
        Field("reserved_0", "u8", "0", 4),
        Field(
            "names_version", "u64", "changes of names so far; the newest are in table names_version % 2; 0: none yet"
        ),
        Field("reserved_1", "u8", "0", 24),
        Field("action_count", "u64", "actions written so far; the newest is in slot action_count % 2"),
        Field("agent_heartbeat", "u64", "ns of CLOCK_MONOTONIC at the agent's last sign of life"),
        Field("action_event", "u32", "grows with every action; the futex that a producer may wait on"),
        Field("action_waiters", "u32", "set by whoever is about to wait, cleared by the agent that wakes them"),
        Field("agent_pid", "u32", "process that wrote last, in its own namespace; 0: none yet"),
        Field("reserved_2", "u8", "0", 36),
    ),
)

FRAME = Struct(
    "frame",
    "An observation; its sections follow. Frame ``sequence_id % num_frames`` of the ring.",
    128,
    (
        Field("lock", "u64", "sequence lock: odd while the producer writes"),
        Field("sequence_id", "u64", "1, 2, 3, ..."),
        Field("timestamp", "u64", "ns on the data plane's clock"),
        Field("published_at", "u64", "ns of CLOCK_MONOTONIC"),
        Field("applied_sequence_id", "u64", "sequence id of the last action that was put in force"),
        Field("applied_at", "u64", "ns of CLOCK_MONOTONIC when that was"),
        Field("num_servers", "u32", "servers known to the data plane, at most the capacity"),
        Field("flags", "u32", "1 ground truth is there, 2 an action has been applied, 4 safe weights are in force"),
        Field("unrouted", "u64", "flows that found no active server, since the producer started"),
        Field("fct_count", "u64", "flows that ended since the producer started, as far as it knows their FCT"),
        Field("fct_sum", "u64", "ns, sum of those FCTs; a rejected flow counts with the data plane's timeout"),
        Field("names_version", "u64", "of the names that belong to these servers; 0: none yet"),
        Field("reserved_0", "u8", "0", 40),
    ),
)

FRAME_SECTIONS = (
    Section("active", "u8", "1: the server takes new flows, 0: it does not"),
    Section("stats", "f32", f"features: {', '.join(FEATURE_NAMES)}; zero for inactive servers", len(FEATURE_NAMES)),
    Section("ground_truth", "f32", f"{', '.join(GROUND_TRUTH_NAMES)}; if the flag says so", len(GROUND_TRUTH_NAMES)),
    Section("counters", "u64", f"flows {', '.join(COUNTER_NAMES)}, since the producer started", len(COUNTER_NAMES)),
    Section("weights", "f64", "the weights in force"),
    Section("safe_weights", "f64", "the weights that come in force when no agent's are"),
    Section("states", "u8", "0 unknown, 1 up, 2 draining, 3 down; higher values are read as 0", since=1),
    Section(
        "ground_truth_age", "u64", "ns from the measurement to published_at, below 2^63; 2^64 - 1: unknown", since=1
    ),
)

ACTION = Struct(
    "action",
    "Weights for the servers; its sections follow.",
    64,
    (
        Field("lock", "u64", "sequence lock: odd while the agent writes"),
        Field("sequence_id", "u64", "the agent's number of this action; comes back as applied_sequence_id"),
        Field("written_at", "u64", "ns of CLOCK_MONOTONIC"),
        Field("lease", "u64", "ns after written_at for which the weights are good; 0: for ever"),
        Field("num_servers", "u32", "weights given; further servers have their safe weights"),
        Field("flags", "u32", "1 the section index is filled"),
        Field("reserved_0", "u8", "0", 24),
    ),
)

ACTION_SECTIONS = (
    Section("weights", "f64", "at least 0, not all 0"),
    Section("threshold", "u32", "alias table: 2**32 times the probability to keep the bucket"),
    Section("alias", "u32", "alias table: the server to take otherwise"),
    Section(
        "index",
        "f64",
        "speed per core (above 0, of a server whose weight is) and background load (flows), for dispatch by index",
        2,
        since=1,
        option=OPTION_INDEX,
    ),
)

NAMES = Struct(
    "names",
    "The names of all servers; its section follows.",
    64,
    (
        Field("lock", "u64", "sequence lock: odd while the producer writes"),
        Field("version", "u64", "1, 2, 3, ..."),
        Field("num_servers", "u32", "rows that count: the most servers there have been"),
        Field("reserved_0", "u8", "0", 44),
    ),
)

NAMES_SECTIONS = (
    Section("names", "u8", "UTF-8 padded with zeros, at most 63 bytes; empty: unnamed", NAME_SIZE, since=1),
)


def _lines(size: int) -> int:
    return -(-size // LINE) * LINE


def _section_offsets(head: int, sections: tuple[Section, ...], layout: Layout) -> tuple[dict[str, int], int]:
    offsets, at = {}, head
    for section in sections:
        if section.since <= layout.minor and not section.option & ~layout.options:
            offsets[section.name] = at
            at += section.size(layout.capacity)
    return offsets, at


@dataclass(frozen=True)
class Layout:
    """The offsets and sizes of a region for ``capacity`` servers, in bytes.

    Args:
        capacity: servers.
        minor: of the version.
        options: flags of the header, ``OPTION_*``.
    """

    capacity: int
    minor: int = VERSION_MINOR
    options: int = 0

    @property
    def private(self) -> Layout:
        """Of private copies, which have room for every section there is; those that both have are at the same place."""
        return Layout(self.capacity, VERSION_MINOR, OPTION_INDEX)

    @cached_property
    def frame_sections(self) -> dict[str, int]:
        """Offsets in a frame."""
        return _section_offsets(FRAME.size, FRAME_SECTIONS, self)[0]

    @cached_property
    def action_sections(self) -> dict[str, int]:
        """Offsets in an action."""
        return _section_offsets(ACTION.size, ACTION_SECTIONS, self)[0]

    @cached_property
    def frame_size(self) -> int:
        return _section_offsets(FRAME.size, FRAME_SECTIONS, self)[1]

    @cached_property
    def action_size(self) -> int:
        return _section_offsets(ACTION.size, ACTION_SECTIONS, self)[1]

    @cached_property
    def names_size(self) -> int:
        """0 where regions have no names."""
        return _section_offsets(NAMES.size, NAMES_SECTIONS, self)[1] if self.minor >= NAMES_SECTIONS[0].since else 0

    @property
    def frames_offset(self) -> int:
        return HEADER.size

    @cached_property
    def actions_offset(self) -> int:
        return self.frames_offset + NUM_FRAMES * self.frame_size

    @cached_property
    def names_offset(self) -> int:
        """0 where regions have no names."""
        return self.actions_offset + NUM_ACTIONS * self.action_size if self.names_size else 0

    @cached_property
    def total_size(self) -> int:
        return self.actions_offset + NUM_ACTIONS * self.action_size + NUM_NAMES * self.names_size
