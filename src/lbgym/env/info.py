"""The ``info`` of a step: one builder for one environment and for many."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..features.columns import SERVICE_NAMES
from ..scenarios import Scenario
from ..snapshot import IntervalStatistics, Snapshot

_FCT_NAMES = ("fct_mean", "fct_p50", "fct_p90", "fct_p99")


def step_info(snapshot: Snapshot, weights: NDArray[np.float64]) -> dict[str, Any]:
    """What :class:`~lbgym.LoadBalanceEnv` documents as ``info``, with the leading axes of the snapshot.

    Args:
        snapshot: of one balancer, or a batch.
        weights: float64[..., N], set by the last action.
    """
    one = snapshot.active.ndim == 1
    info: dict[str, Any] = {
        "sequence_id": snapshot.sequence_id if one else snapshot.sequence_id.copy(),
        "timestamp": snapshot.timestamp if one else snapshot.timestamp.copy(),
        "active": snapshot.active.copy(),
        "active_servers": active_ids(snapshot.active),
        "weights": weights.copy(),
    }
    if snapshot.interval is not None:
        info |= _of_one(snapshot.interval) if one else _of_many(snapshot.interval)
    return info


def _of_one(interval: IntervalStatistics) -> dict[str, Any]:
    # The same as below, without the cost of arrays of one number: this is on the path of every single step.
    named = dict(zip(SERVICE_NAMES, interval.values.tolist(), strict=True))
    info: dict[str, Any] = {"completed": int(named["completed"]), "rejected": int(named["rejected"])}
    known = info["completed"] or info["rejected"]
    for name in _FCT_NAMES:
        info[name] = named[name] if known else math.nan
    return info


def _of_many(interval: IntervalStatistics) -> dict[str, Any]:
    counts = {name: getattr(interval, name).astype(np.int64) for name in ("completed", "rejected")}
    return counts | {name: getattr(interval, name) for name in _FCT_NAMES}


def active_ids(active: NDArray[np.bool_]) -> Any:
    """The ids of the active servers, a list of int; of a batch bool[..., N] an object array [...] of such lists."""
    if active.ndim == 1:
        return active.nonzero()[0].tolist()
    rows = active.reshape(-1, active.shape[-1])
    ids = rows.nonzero()[1].tolist()
    ends = np.count_nonzero(rows, axis=1).cumsum().tolist()
    lists = [ids[first:last] for first, last in zip([0, *ends], ends, strict=False)]
    return np.fromiter(lists, dtype=object, count=len(lists)).reshape(active.shape[:-1])


def scenario_facts(scenario: Scenario, num_servers: int) -> dict[str, Any]:
    """Facts about a drawn scenario, for the ``info`` of a reset.

    ``server_cores`` int64[N] and ``server_speeds`` float64[N], 0 where no server exists; ``load`` and
    ``rate`` (flows/s).
    """
    cores, speeds = np.zeros(num_servers, np.int64), np.zeros(num_servers)
    cores[: scenario.num_servers] = [server.cores for server in scenario.servers]
    speeds[: scenario.num_servers] = [server.speed for server in scenario.servers]
    return {"server_cores": cores, "server_speeds": speeds, "load": scenario.load, "rate": scenario.rate}
