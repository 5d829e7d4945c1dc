"""The protocol, compiled: sequence locks around copies between a region and private buffers.

A region, a frame and an action are arrays of uint64 words here, and every struct and section begins on a word. Payloads
are copied without atomicity; a copy is valid if its lock was even before it and is the same after it. The
fences are those of Boehm, "Can seqlocks get along with programming language memory models?" (MSPC 2012), so this holds
on weakly ordered machines, too.

Every function returns at once, whatever the region contains.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from ..features.compile import compiled_only as compiled
from . import abi

OK, NOTHING, BUSY, INVALID = 0, 1, 2, 3

#: Failed copies before a reader gives up; each takes longer than a writer needs for its next frame.
_TRIES = 1000


def _word(struct: abi.Struct, field: str) -> int:
    offset = struct.offset(field)
    assert offset % 8 == 0
    return offset // 8


LATEST = _word(abi.HEADER, "latest")
HEARTBEAT = _word(abi.HEADER, "heartbeat")
#: Two 32-bit fields in one word: the event counter (low) and the waiters' flag (high).
_OBSERVATION_EVENT = _word(abi.HEADER, "observation_event")
ACTION_COUNT = _word(abi.HEADER, "action_count")
AGENT_HEARTBEAT = _word(abi.HEADER, "agent_heartbeat")
_ACTION_EVENT = _word(abi.HEADER, "action_event")
NAMES_VERSION = _word(abi.HEADER, "names_version")

_LOCK = _word(abi.FRAME, "lock")
_SEQUENCE_ID = _word(abi.FRAME, "sequence_id")
_PUBLISHED_AT = _word(abi.FRAME, "published_at")
_FRAME_COUNTS = _word(abi.FRAME, "num_servers")
_FRAME_HEAD = abi.FRAME.size // 8

_WRITTEN_AT = _word(abi.ACTION, "written_at")
_LEASE = _word(abi.ACTION, "lease")
_ACTION_COUNTS = _word(abi.ACTION, "num_servers")
_ACTION_HEAD = abi.ACTION.size // 8

_VERSION = _word(abi.NAMES, "version")
_NAMES_COUNT = _word(abi.NAMES, "num_servers")
_NAMES_HEAD = abi.NAMES.size // 8
_NAME_WORDS = abi.NAME_SIZE // 8

_LOW32 = np.uint64(0xFFFFFFFF)
_ONE = np.uint64(1)
_FLOATS = abi.FRAME_SECTIONS[1].columns
_TRUTHS = abi.FRAME_SECTIONS[2].columns
_COUNTERS = abi.FRAME_SECTIONS[3].columns
_HAS_TRUTH = np.uint64(abi.FLAG_GROUND_TRUTH)
_HAS_INDEX = np.uint64(abi.FLAG_INDEX)
_LAST_STATE = np.uint8(max(abi.ServerState))
_UNKNOWN = np.uint8(abi.ServerState.UNKNOWN)
_AGE_UNKNOWN = np.uint64(abi.AGE_UNKNOWN)
_INT64_END = np.uint64(1 << 63)
_LARGEST32 = np.finfo(np.float32).max
_LARGEST64 = np.finfo(np.float64).max

# Plans: int64[5], where the frames, actions or tables of names of a region are, in words, how many there are, for how
# many servers, and how many sections each has. Private copies have all sections, at the same places.
_FIRST, _STRIDE, _COUNT, _CAPACITY, _SECTIONS = 0, 1, 2, 3, 4
_FRAME_SECTIONS_1_0 = sum(section.since == 0 for section in abi.FRAME_SECTIONS)
_STATES, _AGES = _FRAME_SECTIONS_1_0, _FRAME_SECTIONS_1_0 + 1
_INDEX = len(abi.ACTION_SECTIONS) - 1


@intrinsic
def _acquire_fence(typing_context):
    def generate(context, builder, signature, arguments):
        builder.fence("acquire")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def _release_fence(typing_context):
    def generate(context, builder, signature, arguments):
        builder.fence("release")
        return context.get_dummy_value()

    return types.void(), generate


def _pointer(context, builder, array_type, array, index):
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [index])


@intrinsic
def _load(typing_context, array, index):
    """An acquire load of a word."""

    def generate(context, builder, signature, arguments):
        pointer = _pointer(context, builder, signature.args[0], *arguments)
        return builder.load_atomic(pointer, "acquire", 8)

    return types.uint64(array, types.int64), generate


@intrinsic
def _store(typing_context, array, index, value):
    """A release store of a word."""

    def generate(context, builder, signature, arguments):
        pointer = _pointer(context, builder, signature.args[0], *arguments[:2])
        builder.store_atomic(arguments[2], pointer, "release", 8)
        return context.get_dummy_value()

    return types.void(array, types.int64, types.uint64), generate


@intrinsic
def _bump_and_take(typing_context, array, index):
    """Add 1 to the low half of a word, set its high half to 0, and return what the high half was."""

    def generate(context, builder, signature, arguments):
        half = ir.IntType(32)
        pointer = builder.bitcast(_pointer(context, builder, signature.args[0], *arguments), half.as_pointer())
        builder.atomic_rmw("add", pointer, ir.Constant(half, 1), "seq_cst")
        flag = builder.gep(pointer, [ir.Constant(ir.IntType(64), 1)])
        taken = builder.atomic_rmw("xchg", flag, ir.Constant(half, 0), "seq_cst")
        return builder.zext(taken, ir.IntType(64))

    return types.uint64(array, types.int64), generate


@compiled(inline=True)
def _copy(source, at, target, to, count):
    for k in range(count):
        target[to + k] = source[at + k]


@compiled(inline=True)
def _begin_write(words, at):
    """Make the lock at ``words[at]`` odd, even if a dead writer left it odd, and return the even value to end with.

    The value changes either way, so a reader that is copying notices.
    """
    lock = _load(words, at)
    odd = (lock + _ONE) | _ONE
    _store(words, at, odd)
    _release_fence()
    return odd + _ONE


@compiled(inline=True)
def _words(num_servers, size):
    """Words that hold ``num_servers`` entries of ``size`` bytes."""
    return (num_servers * size + 7) // 8


@compiled(inline=True)
def _copy_frame(source, at, target, to, sections, n, present):
    """The sections of a frame for n servers, of which the first ``present`` are in the region."""
    _copy(source, at + sections[0], target, to + sections[0], _words(n, 1))
    _copy(source, at + sections[1], target, to + sections[1], _words(n, 4 * _FLOATS))
    _copy(source, at + sections[2], target, to + sections[2], _words(n, 4 * _TRUTHS))
    _copy(source, at + sections[3], target, to + sections[3], n * _COUNTERS)
    _copy(source, at + sections[4], target, to + sections[4], n)
    _copy(source, at + sections[5], target, to + sections[5], n)
    if present > _FRAME_SECTIONS_1_0:
        _copy(source, at + sections[_STATES], target, to + sections[_STATES], _words(n, 1))
        _copy(source, at + sections[_AGES], target, to + sections[_AGES], n)


@compiled(inline=True)
def _complete_frame(frame, sections, n, present):
    """Fill in what an older region lacks, and map states of later versions to unknown."""
    states = frame.view(np.uint8)
    first = sections[_STATES] * 8
    if present <= _FRAME_SECTIONS_1_0:
        for i in range(n):
            states[first + i] = _UNKNOWN
            frame[sections[_AGES] + i] = _AGE_UNKNOWN
    else:
        for i in range(n):
            if states[first + i] > _LAST_STATE:
                states[first + i] = _UNKNOWN


@compiled(inline=True)
def _copy_action(source, at, target, to, sections, n, present):
    """The sections of an action, as those of a frame."""
    _copy(source, at + sections[0], target, to + sections[0], n)
    _copy(source, at + sections[1], target, to + sections[1], _words(n, 4))
    _copy(source, at + sections[2], target, to + sections[2], _words(n, 4))
    if present > _INDEX:
        _copy(source, at + sections[_INDEX], target, to + sections[_INDEX], 2 * n)


@compiled(inline=True)
def _in_range(values, first, count, high):
    """True if all are from 0 to ``high``; False for NaN."""
    good = True
    for k in range(first, first + count):
        good &= (values[k] >= 0.0) & (values[k] <= high)
    return good


@compiled(inline=True)
def _is_valid(frame, sections, n):
    """True if a private copy is a valid observation."""
    bytes_, floats, doubles = frame.view(np.uint8), frame.view(np.float32), frame.view(np.float64)
    good = True
    first = sections[0] * 8
    for k in range(first, first + n):
        good &= bytes_[k] <= 1
    good &= _in_range(floats, sections[1] * 2, n * _FLOATS, _LARGEST32)
    if (frame[_FRAME_COUNTS] >> np.uint64(32)) & _HAS_TRUTH:
        good &= _in_range(floats, sections[2] * 2, n * _TRUTHS, _LARGEST32)
    # Counters, times and ids must fit int64, NumPy's default.
    top = np.uint64(0)
    for k in range(sections[3], sections[3] + n * _COUNTERS):
        top |= frame[k]
    for k in range(_FRAME_COUNTS + 1, _FRAME_COUNTS + 5):
        top |= frame[k]
    for k in range(_SEQUENCE_ID, _FRAME_COUNTS):
        top |= frame[k]
    good &= top < _INT64_END
    good &= _in_range(doubles, sections[4], n, _LARGEST64)
    good &= _in_range(doubles, sections[5], n, _LARGEST64)
    for k in range(sections[_AGES], sections[_AGES] + n):
        good &= (frame[k] < _INT64_END) | (frame[k] == _AGE_UNKNOWN)
    return good


@compiled()
def read_frame(words, plan, sections, frame):
    """Copy the newest observation into ``frame``; OK, NOTHING published yet, BUSY or INVALID.

    Args:
        words: uint64[], the region.
        plan: int64[5] of the frames.
        sections: int64[8], words from the beginning of a frame to each section.
        frame: uint64[frame words], the copy.
    """
    found = BUSY
    for _ in range(_TRIES):
        latest = _load(words, LATEST)
        if latest == 0:
            return NOTHING
        at = plan[_FIRST] + np.int64(latest & np.uint64(plan[_COUNT] - 1)) * plan[_STRIDE]
        lock = _load(words, at + _LOCK)
        if lock & _ONE:
            continue
        _copy(words, at, frame, 0, _FRAME_HEAD)
        n = np.int64(frame[_FRAME_COUNTS] & _LOW32)
        fits = n <= plan[_CAPACITY]
        if fits:
            _copy_frame(words, at, frame, 0, sections, n, plan[_SECTIONS])
        _acquire_fence()
        if _load(words, at + _LOCK) != lock:
            continue
        if fits:
            _complete_frame(frame, sections, n, plan[_SECTIONS])
        if fits and frame[_SEQUENCE_ID] == latest and _is_valid(frame, sections, n):
            return OK
        # The ring may have wrapped since ``latest`` was read; if not, the region itself is invalid.
        if _load(words, LATEST) == latest:
            return INVALID
        found = INVALID
    return found


@compiled()
def read_earlier_frame(words, plan, sections, frame, sequence_id):
    """Copy observation ``sequence_id`` (1 or more) into ``frame``; OK, INVALID, or NOTHING if it has left the ring."""
    slot = np.int64(np.uint64(sequence_id) & np.uint64(plan[_COUNT] - 1))
    at = plan[_FIRST] + slot * plan[_STRIDE]
    lock = _load(words, at + _LOCK)
    if lock & _ONE:
        return NOTHING
    _copy(words, at, frame, 0, _FRAME_HEAD)
    n = np.int64(frame[_FRAME_COUNTS] & _LOW32)
    fits = n <= plan[_CAPACITY]
    if fits:
        _copy_frame(words, at, frame, 0, sections, n, plan[_SECTIONS])
    _acquire_fence()
    if _load(words, at + _LOCK) != lock or frame[_SEQUENCE_ID] != np.uint64(sequence_id):
        return NOTHING
    if fits:
        _complete_frame(frame, sections, n, plan[_SECTIONS])
    return OK if fits and _is_valid(frame, sections, n) else INVALID


@compiled()
def frame_is_valid(sections, frame):
    """True if a frame may be published."""
    return _is_valid(frame, sections, np.int64(frame[_FRAME_COUNTS] & _LOW32))


@compiled()
def publish_frame(words, plan, sections, frame, sequence_id, now):
    """Write ``frame`` as observation ``sequence_id`` (1 or more); true if a waiter must be woken."""
    slot = np.int64(np.uint64(sequence_id) & np.uint64(plan[_COUNT] - 1))
    at = plan[_FIRST] + slot * plan[_STRIDE]
    n = np.int64(frame[_FRAME_COUNTS] & _LOW32)
    frame[_SEQUENCE_ID] = np.uint64(sequence_id)
    frame[_PUBLISHED_AT] = np.uint64(now)
    even = _begin_write(words, at + _LOCK)
    _copy(frame, 1, words, at + 1, _FRAME_HEAD - 1)
    _copy_frame(frame, 0, words, at, sections, n, plan[_SECTIONS])
    _store(words, at + _LOCK, even)
    _store(words, HEARTBEAT, np.uint64(now))
    _store(words, LATEST, np.uint64(sequence_id))
    return _bump_and_take(words, _OBSERVATION_EVENT) != 0


@compiled()
def alias_table(weights, threshold, alias, stack, share):
    """Vose's alias table (IEEE TSE 17(9), 1991) for float64[n] weights, at least 0 and not all 0.

    Bucket i is kept with probability ``threshold[i] / 2**32`` (and always if ``alias[i]`` is i), else ``alias[i]`` is
    taken.

    Args:
        weights: float64[n]; n below 2**32.
        threshold: uint32[n], filled.
        alias: uint32[n], filled.
        stack: int64[n], scratch: servers below their share from the front, those above it from the back.
        share: float64[n], scratch.
    """
    n = weights.shape[0]
    largest = 0.0
    for i in range(n):
        largest = max(largest, weights[i])
    # Divided by the largest first, so that no sum overflows.
    total = 0.0
    for i in range(n):
        share[i] = weights[i] / largest
        total += share[i]
    small, large = 0, n
    for i in range(n):
        share[i] = share[i] * n / total
        if share[i] < 1.0:
            stack[small] = i
            small += 1
        else:
            large -= 1
            stack[large] = i
    while small > 0 and large < n:
        small -= 1
        i = stack[small]
        j = stack[large]
        threshold[i] = np.uint32(min(share[i] * 4294967296.0, 4294967295.0))
        alias[i] = np.uint32(j)
        share[j] = (share[j] + share[i]) - 1.0
        if share[j] < 1.0:
            large += 1
            stack[small] = j
            small += 1
    # The rest have exactly their share, but for rounding.
    while large < n:
        i = stack[large]
        threshold[i] = np.uint32(0xFFFFFFFF)
        alias[i] = np.uint32(i)
        large += 1
    best = np.argmax(weights)
    while small > 0:
        small -= 1
        i = stack[small]
        threshold[i] = np.uint32(0xFFFFFFFF if weights[i] > 0.0 else 0)
        alias[i] = np.uint32(i if weights[i] > 0.0 else best)


@compiled(inline=True)
def _largest_good(weights):
    """The largest weight; -1 if one is negative, infinite or NaN."""
    largest = 0.0
    good = True
    for i in range(weights.shape[0]):
        good &= (weights[i] >= 0.0) & (weights[i] <= _LARGEST64)
        largest = max(largest, weights[i])
    return largest if good else -1.0


@compiled(inline=True)
def _is_index(doubles, sections, n):
    """True if index parameters are valid: finite, at least 0, and a speed above 0 wherever there is a weight."""
    first = sections[_INDEX]
    good = _in_range(doubles, first, 2 * n, _LARGEST64)
    for i in range(n):
        good &= (doubles[first + 2 * i] > 0.0) | (doubles[sections[0] + i] == 0.0)
    return good


@compiled()
def write_action(words, plan, sections, weights, index, sequence_id, lease, now, threshold, alias, stack, share):
    """Write weights and their alias table as the newest action, and index parameters, float64[n, 2], unless n is 0.

    Returns -1 for weights that are not all finite and at least 0, or all 0; nothing has been written then. Else 1 if
    a waiter must be woken, 0 if not.
    """
    if _largest_good(weights) <= 0.0:
        return -1
    n = weights.shape[0]
    alias_table(weights, threshold, alias, stack, share)
    count = _load(words, ACTION_COUNT) + _ONE
    at = plan[_FIRST] + np.int64(count & np.uint64(plan[_COUNT] - 1)) * plan[_STRIDE]
    even = _begin_write(words, at + _LOCK)
    words[at + _SEQUENCE_ID] = np.uint64(sequence_id)
    words[at + _WRITTEN_AT] = np.uint64(now)
    words[at + _LEASE] = np.uint64(lease)
    words[at + _ACTION_COUNTS] = np.uint64(n) | ((_HAS_INDEX if index.shape[0] > 0 else np.uint64(0)) << np.uint64(32))
    doubles = words.view(np.float64)
    halves = words.view(np.uint32)
    for i in range(n):
        doubles[at + sections[0] + i] = weights[i]
        halves[2 * (at + sections[1]) + i] = threshold[i]
        halves[2 * (at + sections[2]) + i] = alias[i]
    for i in range(index.shape[0]):
        doubles[at + sections[_INDEX] + 2 * i] = index[i, 0]
        doubles[at + sections[_INDEX] + 2 * i + 1] = index[i, 1]
    _store(words, at + _LOCK, even)
    _store(words, AGENT_HEARTBEAT, np.uint64(now))
    _store(words, ACTION_COUNT, count)
    return 1 if _bump_and_take(words, _ACTION_EVENT) else 0


@compiled()
def read_action(words, plan, sections, action, known):
    """Copy the newest action into ``action``, unless it is the ``known``-th; its number, or minus a status.

    A number is ``action_count`` at the time, at least 1; 0 means nothing newer than ``known``.
    """
    doubles, halves = action.view(np.float64), action.view(np.uint32)
    for _ in range(_TRIES):
        count = _load(words, ACTION_COUNT)
        if count == np.uint64(known) or count == 0:
            return np.int64(0)
        at = plan[_FIRST] + np.int64(count & np.uint64(plan[_COUNT] - 1)) * plan[_STRIDE]
        lock = _load(words, at + _LOCK)
        if lock & _ONE:
            continue
        _copy(words, at, action, 0, _ACTION_HEAD)
        n = np.int64(action[_ACTION_COUNTS] & _LOW32)
        fits = 0 < n <= plan[_CAPACITY]
        if fits:
            _copy_action(words, at, action, 0, sections, n, plan[_SECTIONS])
        _acquire_fence()
        if _load(words, at + _LOCK) != lock:
            continue
        top = count
        for k in range(_SEQUENCE_ID, _ACTION_COUNTS):
            top |= action[k]
        if not fits or top >= _INT64_END:
            return np.int64(-INVALID)
        first = sections[0]
        if _largest_good(doubles[first : first + n]) <= 0.0:
            return np.int64(-INVALID)
        farthest = np.uint32(0)
        for i in range(n):
            farthest = max(farthest, halves[2 * sections[2] + i])
        if farthest >= n:
            return np.int64(-INVALID)
        if plan[_SECTIONS] <= _INDEX:
            # These bytes were reserved in 1.0.
            action[_ACTION_COUNTS] = np.uint64(n)
        elif (action[_ACTION_COUNTS] >> np.uint64(32)) & _HAS_INDEX and not _is_index(doubles, sections, n):
            return np.int64(-INVALID)
        return np.int64(count)
    return np.int64(-BUSY)


@compiled()
def write_names(words, plan, table):
    """Write a table of names as the next version, which is returned."""
    version = _load(words, NAMES_VERSION) + _ONE
    at = plan[_FIRST] + np.int64(version & _ONE) * plan[_STRIDE]
    even = _begin_write(words, at + _LOCK)
    table[_VERSION] = version
    n = np.int64(table[_NAMES_COUNT] & _LOW32)
    _copy(table, 1, words, at + 1, _NAMES_HEAD - 1 + n * _NAME_WORDS)
    _store(words, at + _LOCK, even)
    _store(words, NAMES_VERSION, version)
    return np.int64(version)


@compiled()
def read_names(words, plan, table):
    """Copy the newest names into ``table``; OK, NOTHING yet, BUSY or INVALID."""
    for _ in range(_TRIES):
        version = _load(words, NAMES_VERSION)
        if version == 0:
            return NOTHING
        at = plan[_FIRST] + np.int64(version & _ONE) * plan[_STRIDE]
        lock = _load(words, at + _LOCK)
        if lock & _ONE:
            continue
        _copy(words, at, table, 0, _NAMES_HEAD)
        n = np.int64(table[_NAMES_COUNT] & _LOW32)
        fits = n <= plan[_CAPACITY]
        if fits:
            _copy(words, at + _NAMES_HEAD, table, _NAMES_HEAD, n * _NAME_WORDS)
        _acquire_fence()
        if _load(words, at + _LOCK) != lock:
            continue
        if fits and table[_VERSION] == version:
            return OK
        if _load(words, NAMES_VERSION) == version:
            return INVALID
    return BUSY


@compiled()
def raise_flag(words, event):
    """Announce a waiter for ``words[event]``'s low half, and return that half."""
    return _raise(words, event)


@intrinsic
def _raise(typing_context, array, index):
    def generate(context, builder, signature, arguments):
        half = ir.IntType(32)
        pointer = builder.bitcast(_pointer(context, builder, signature.args[0], *arguments), half.as_pointer())
        flag = builder.gep(pointer, [ir.Constant(ir.IntType(64), 1)])
        builder.atomic_rmw("xchg", flag, ir.Constant(half, 1), "seq_cst")
        value = builder.load_atomic(pointer, "seq_cst", 4)
        return builder.zext(value, ir.IntType(64))

    return types.uint64(array, types.int64), generate


@compiled()
def load_word(words, at):
    """Load a word; earlier writes are then visible, too."""
    return _load(words, at)


@compiled()
def store_word(words, at, value):
    """Store a word; whoever sees it sees earlier writes, too."""
    _store(words, at, np.uint64(value))


def warm_up() -> None:
    """Compile everything, or load it from disk, so that no first call is slow."""
    layout = abi.Layout(1)
    words = np.zeros(layout.total_size // 8, np.uint64)
    frame = np.zeros(layout.frame_size // 8, np.uint64)
    frame[_FRAME_COUNTS] = 1
    private = layout.private
    frames = np.array([layout.frames_offset // 8, frame.shape[0], abi.NUM_FRAMES, 1, len(layout.frame_sections)])
    frame_sections = np.array(list(private.frame_sections.values())) // 8
    actions = np.array(
        [layout.actions_offset // 8, layout.action_size // 8, abi.NUM_ACTIONS, 1, len(layout.action_sections)]
    )
    action_sections = np.array(list(private.action_sections.values())) // 8
    names = np.array([layout.names_offset // 8, layout.names_size // 8, abi.NUM_NAMES, 1, 1])
    table = np.zeros(layout.names_size // 8, np.uint64)
    halves = np.zeros(1, np.uint32)
    frame_is_valid(frame_sections, frame)
    publish_frame(words, frames, frame_sections, frame, 1, 1)
    read_frame(words, frames, frame_sections, frame)
    read_earlier_frame(words, frames, frame_sections, frame, 1)
    write_action(
        words, actions, action_sections, np.ones(1), np.ones((0, 2)), 1, 1, 1, halves, halves, np.zeros(1, np.int64),
        np.ones(1),
    )  # fmt: skip
    read_action(words, actions, action_sections, np.zeros(private.action_size // 8, np.uint64), 0)
    write_names(words, names, table)
    read_names(words, names, table)
    raise_flag(words, LATEST)
    store_word(words, HEARTBEAT, 1)
    load_word(words, LATEST)
