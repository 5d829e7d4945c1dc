"""Ground truth from agents on the servers: :class:`GroundTruth`.

An agent answers a GET with a JSON object of ``cpu_usage`` and ``memory_usage`` (0 to 1), ``busy_workers`` (at least 0)
and optionally ``time`` (seconds since 1970 of the measurement, by the server's clock). A value it cannot measure is
null or left out.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import checks
from ..features import GROUND_TRUTH_NAMES, NUM_GROUND_TRUTH
from .base import DriverError
from .config import GroundTruthAgent, ServerConfig
from .probes import Probes, http_get

logger = logging.getLogger("lbgym")

#: Most that each column can be.
_MOST = {"cpu_usage": 1.0, "memory_usage": 1.0, "busy_workers": 1e9}


class GroundTruth:
    """Polls agents in the background. It never makes a value up: without an answer the last one grows old."""

    def __init__(self) -> None:
        self._probes = Probes("lbgym-ground-truth")
        self._lock = threading.Lock()
        self._polls: dict[str, _Poll] = {}

    def watch(self, servers: Iterable[ServerConfig]) -> None:
        """Poll the agents of these servers; those without one are left alone."""
        wanted = {server.name: server for server in servers if server.ground_truth is not None}
        with self._lock:
            polls = {}
            for name, server in wanted.items():
                poll = self._polls.get(name)
                polls[name] = poll if poll is not None and poll.is_for(server) else _Poll(server, self._lock)
            self._polls = polls
        self._probes.set_targets({poll: (poll.ask, poll.agent.interval) for poll in polls.values()})

    def values(self, names: Sequence[str]) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """Ground truth by name, float32[n, 3] (NaN: unknown), and its age, float64[n] in seconds (inf: unknown)."""
        truth = np.full((len(names), NUM_GROUND_TRUTH), np.nan, np.float32)
        age = np.full(len(names), np.inf)
        now = time.monotonic()
        with self._lock:
            for i, name in enumerate(names):
                poll = self._polls.get(name)
                if poll is not None and poll.values is not None:
                    truth[i] = poll.values
                    age[i] = now - poll.measured_at
        return truth, age

    def close(self) -> None:
        """End the polls. Idempotent."""
        self._probes.close()


class _Poll:
    """Polls one agent and keeps its last answer."""

    def __init__(self, server: ServerConfig, lock: threading.Lock) -> None:
        assert server.ground_truth is not None
        self.agent: GroundTruthAgent = server.ground_truth
        self.values: list[float] | None = None
        self.measured_at = 0.0  # seconds of the monotonic clock
        self._server, self._lock = server, lock
        self._last_time = -math.inf
        self._silent = False

    def is_for(self, server: ServerConfig) -> bool:
        return (self._server.address, self.agent) == (server.address, server.ground_truth)

    async def ask(self) -> None:
        agent = self.agent
        address = agent.address or self._server.address
        asked = time.monotonic()
        try:
            status, body = await http_get(address, agent.port, agent.path, agent.timeout)
            if status != 200:
                raise DriverError(f"http://{address}:{agent.port}{agent.path}: status {status}")
            values, measured = _read(body)
        except DriverError as error:
            if not self._silent:
                logger.warning("no ground truth of server %r: %s", self._server.name, error)
            self._silent = True
            return
        self._silent = False
        with self._lock:
            # The server's clock need not agree with ours. But an answer with the same time as the last one is the same
            # measurement, and not a new one; it was made before it was asked for.
            if measured is None or measured != self._last_time:
                self.values, self.measured_at = values, asked
                self._last_time = -math.inf if measured is None else measured


def _read(body: bytes) -> tuple[list[float], float | None]:
    """The columns of an answer, NaN where it has none, and its time."""
    try:
        answer: Any = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise DriverError(f"the answer of the agent is not JSON: {error}") from None
    if not isinstance(answer, dict):
        raise DriverError("the answer of the agent is not a JSON object")
    values = []
    for name in GROUND_TRUTH_NAMES:
        value = answer.get(name)
        if value is not None:
            value = checks.number(f"{name} of the agent", value, low=0.0, high=_MOST[name], error=DriverError)
        values.append(math.nan if value is None else value)
    measured = answer.get("time")
    if measured is not None:
        measured = checks.number("time of the agent", measured, unit="seconds", error=DriverError)
    return values, measured
