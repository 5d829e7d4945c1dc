"""Drivers with one defect each, as roles of the nursery, and the check that each must fail."""

from __future__ import annotations

import math
import signal
import time

import numpy as np

from lbgym.sharedmemory import Publication, ServerState, SharedMemoryRegion, abi, seqlock
from tests.sharedmemory.nursery import Say

INTERVAL = 0.02
NS = 1_000_000_000
SERVERS = 3

#: Defect, and the check that must fail; "": none.
DEFECTS = {
    "none": "",
    "stops publishing": "publications",
    "leaves ids out": "sequence",
    "has no heartbeat": "heartbeat",
    "drifts": "grid",
    "has a clock that runs twice as fast": "grid",
    "begins its counters again": "counters",
    "loses flows": "flows",
    "ends flows that never began": "flows",
    "publishes NaN": "features",
    "publishes negative features": "features",
    "fills a column that is not real": "features",
    "shows inactive servers": "inactive",
    "gives a name twice": "servers",
    "says down of a server that takes flows": "servers",
    "publishes a CPU use of 150 %": "ground truth",
    "hears no agent": "action",
    "says an id and has other weights": "action",
    "dies of a NaN": "bad actions",
    "takes index parameters": "",
    "takes index parameters and heeds none": "index",
    "takes up a bad index": "bad actions",
    "knows no leases": "lease",
    "ignores SIGTERM": "end",
    "leaves its file": "end",
}


def publish(say: Say, name: str, defect: str) -> None:
    """A driver of three servers with a defect."""
    features = frozenset(abi_features()) - ({"fct_std"} if defect == "fills a column that is not real" else set())
    region = SharedMemoryRegion.create(
        name,
        num_servers=SERVERS,
        publish_interval=INTERVAL,
        driver="broken",
        features=features,
        takes_index="index" in defect,
    )
    ended: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: None if defect == "ignores SIGTERM" else ended.append(number))
    for server in range(SERVERS):
        server_name = "same" if defect == "gives a name twice" else f"server-{server}"
        state = ServerState.DRAINING if server == SERVERS - 1 else ServerState.UP
        if defect == "says down of a server that takes flows" and server == 0:
            state = ServerState.DOWN
        region.set_server(server, name=server_name, state=state)
    period = INTERVAL * 1.3 if defect == "drifts" else INTERVAL
    begun, count = time.monotonic(), 0
    # Publications in which server 0 took no flows.
    shunned = 0
    while not ended:
        if defect != "hears no agent":
            region.weights_in_force()
        if defect == "knows no leases" and region._action_known:
            region._lease_end = math.inf
        if defect == "dies of a NaN" and spoilt(region):
            return
        if defect == "leaves ids out" and count % 5 == 4:
            region._sequence_id += 1
        if defect == "says an id and has other weights" and not region.safe_weights_in_force:
            region._in_force[0] = 77.0
        if defect == "takes up a bad index" and (number := bad_index(region)):
            region._applied = number, time.monotonic_ns()
        index = region.index_in_force
        shunned += index is not None and index[0, 1] > 1e3 and not defect.endswith("heeds none")
        if not (defect == "stops publishing" and count > 3):
            region.publish(observation(region, count, period, defect, shunned))
        poke(region, defect)
        count += 1
        while (left := begun + count * period - time.monotonic()) > 0 and not ended:
            region.wait_action(left)
            if defect != "hears no agent":
                region.weights_in_force()
                if defect == "knows no leases" and region._action_known:
                    region._lease_end = math.inf
            if left > 0.001:
                time.sleep(0.001)
    if defect != "leaves its file":
        region.unlink()
    region.close()


def abi_features() -> tuple[str, ...]:
    from lbgym.features import FEATURE_NAMES, GROUND_TRUTH_NAMES

    return (*FEATURE_NAMES, *GROUND_TRUTH_NAMES)


def observation(region: SharedMemoryRegion, count: int, period: float, defect: str, shunned: int = 0) -> Publication:
    """Its observation number ``count``; two servers take flows."""
    active = np.array([True, True, False])
    stats = np.zeros((SERVERS, 11), np.float32)
    stats[:2] = 0.5
    stats[:2, 0] = 2.0
    if "fct_std" not in region.real_features and defect != "fills a column that is not real":
        stats[:, 3] = 0.0
    if defect == "shows inactive servers":
        stats[2, 1] = 0.25
    number = count % 10 if defect == "begins its counters again" else count
    completed = np.array([3 * (number - shunned), 2 * number, 5], np.int64)
    started = completed + np.array([2, 2, 1])
    if defect == "loses flows":
        started[1] += 1
    if defect == "ends flows that never began":
        completed[2] = 7
    cpu = 1.5 if defect == "publishes a CPU use of 150 %" else 0.5
    rate = 2.0 if defect == "has a clock that runs twice as fast" else 1.0
    return Publication(
        timestamp=count * period * rate,
        active=active,
        stats=stats,
        started=started,
        completed=completed,
        rejected=np.zeros(SERVERS, np.int64),
        failed=np.zeros(SERVERS, np.int64),
        ground_truth=np.full((SERVERS, 3), cpu, np.float32),
        ground_truth_age=np.zeros(SERVERS),
    )


def poke(region: SharedMemoryRegion, defect: str) -> None:
    """Write what the region's own checks refuse."""
    layout = region.layout
    words = region._words
    assert words is not None
    slot = region.latest % abi.NUM_FRAMES
    first = layout.frames_offset + slot * layout.frame_size
    if defect in ("publishes NaN", "publishes negative features"):
        at = (first + layout.frame_sections["stats"]) // 8
        words[at : at + 1].view(np.float32)[1] = np.nan if defect == "publishes NaN" else -1.0
    elif defect == "has no heartbeat":
        seqlock.store_word(words, seqlock.HEARTBEAT, 1)


def newest_action(region: SharedMemoryRegion) -> tuple[int, np.ndarray]:
    """How many actions were written, and the words of the newest, unchecked."""
    layout, words = region.layout, region._words
    assert words is not None
    count = int(seqlock.load_word(words, seqlock.ACTION_COUNT))
    at = layout.actions_offset + count % abi.NUM_ACTIONS * layout.action_size
    return count, words[at // 8 :][: layout.action_size // 8]


def spoilt(region: SharedMemoryRegion) -> bool:
    """The newest action begins with a NaN."""
    count, action = newest_action(region)
    weights = action.view(np.float64)[region.layout.action_sections["weights"] // 8 :]
    return bool(count and np.isnan(weights[0]))


def bad_index(region: SharedMemoryRegion) -> int:
    """The sequence id of the newest action if its index parameters are NaN; else 0."""
    count, action = newest_action(region)
    head = action[: abi.ACTION.size // 8].view(abi.ACTION.dtype)[0]
    index = action.view(np.float64)[region.layout.action_sections["index"] // 8 :]
    return int(head["sequence_id"]) if count and head["flags"] & abi.FLAG_INDEX and np.isnan(index[0]) else 0
