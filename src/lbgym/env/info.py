"""The ``info`` of a step: one builder for one environment and for many."""

from __future__ import annotations

from itertools import repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..scenarios import Scenario
from ..snapshot import Snapshot


def step_info(snapshot: Snapshot, weights: NDArray[np.float64]) -> dict[str, Any]:
    """The ``info`` that :class:`~lbgym.LoadBalanceEnv` documents, with the leading axes of the snapshot.

    Args:
        snapshot: of one balancer, or a batch.
        weights: float64[..., N], set by the last action.
    """
    active, interval = snapshot.active, snapshot.interval
    info: dict[str, Any] = {
        "sequence_id": snapshot.sequence_id,
        "timestamp": snapshot.timestamp,
        "active": active.copy(),
        "active_servers": active_ids(active),
        "weights": weights.copy(),
    }
    if active.ndim > 1:
        for name in ("sequence_id", "timestamp"):
            info[name] = info[name].copy()
        if interval is not None:
            for name in ("completed", "rejected"):
                info[name] = getattr(interval, name).astype(np.int64)
            for name in ("fct_mean", "fct_p50", "fct_p90", "fct_p99"):
                info[name] = getattr(interval, name).copy()
    elif interval is not None:
        # The same, without the cost of arrays of one number: this is on the path of every single step.
        completed, rejected, *fct = interval.values.tolist()[:6]
        info["completed"] = int(completed)
        info["rejected"] = int(rejected)
        info["fct_mean"], info["fct_p50"], info["fct_p90"], info["fct_p99"] = fct
    return info


def active_ids(active: NDArray[np.bool_]) -> Any:
    """The ids of the active servers, a list of int; of a batch bool[..., N] an object array [...] of such lists."""
    if active.ndim == 1:
        return active.nonzero()[0].tolist()
    rows = active.reshape(-1, active.shape[-1])
    if (rows == rows[0]).all():
        # The usual case, several times as fast. Every replica gets a list of its own.
        ids = rows[0].nonzero()[0].tolist()
        lists = list(map(list.copy, repeat(ids, len(rows))))
    else:
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
