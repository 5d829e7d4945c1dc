"""The servers once more, in SimPy, as an oracle for the kernel.

Nothing here knows the kernel. The model is naive on purpose: every change of a server walks over all the flows it
serves and takes the work done since the last change off each one. No virtual time, no heap of its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import simpy
from numpy.typing import NDArray
from simpy.events import NORMAL, URGENT

COMPLETED, REJECTED, FAILED, UNROUTED = 0, 1, 2, 3


@dataclass
class Job:
    """A flow inside a server; ``remaining`` in core-seconds."""

    index: int
    balancer: int
    arrival: float
    remaining: float


@dataclass
class Result:
    """One entry per flow: seconds (NaN unless completed) and one of the four statuses."""

    fct: NDArray[np.float64]
    status: NDArray[np.int64]


def _at(env: simpy.Environment, delay: float, priority: int, action: Callable[[], None]) -> None:
    event = simpy.Event(env)
    event._ok, event._value = True, None
    event.callbacks.append(lambda _: action())
    env.schedule(event, priority=priority, delay=delay)


class LimitedProcessorSharing:
    """At most ``workers`` flows at ``speed * min(1, cores / served)`` each, the rest in a queue of ``backlog``."""

    def __init__(
        self,
        env: simpy.Environment,
        result: Result,
        cores: int,
        speed: float,
        workers: int | None,
        backlog: int | None,
        leave: Callable[[Job], None],
    ) -> None:
        self.env, self.result, self.leave = env, result, leave
        self.cores, self.configured_speed, self.speed = cores, speed, speed
        self.workers = np.inf if workers is None else workers
        self.backlog = np.inf if backlog is None else backlog
        self.active = True
        self.serving: list[Job] = []
        self.waiting: deque[Job] = deque()
        self.changed_at = 0.0
        self.version = 0
        self.queue_integral = 0.0
        self.busy_integral = 0.0
        self.work = 0.0

    def __len__(self) -> int:
        return len(self.serving) + len(self.waiting)

    @property
    def remaining_work(self) -> float:
        """Core-seconds still to serve, as of now."""
        self._advance()
        return sum(job.remaining for job in self.serving) + sum(job.remaining for job in self.waiting)

    def arrive(self, job: Job) -> bool:
        self._advance()
        if len(self.serving) < self.workers:
            self.serving.append(job)
        elif len(self.waiting) < self.backlog:
            self.waiting.append(job)
        else:
            self.result.status[job.index] = REJECTED
            return False
        self._plan()
        return True

    def set_speed(self, factor: float) -> None:
        self._advance()
        self.speed = factor * self.configured_speed
        self._plan()

    def fail(self) -> None:
        self._advance()
        lost = [*self.serving, *self.waiting]
        self.serving.clear()
        self.waiting.clear()
        self.active = False
        for job in lost:
            self.result.status[job.index] = FAILED
            self.leave(job)
        self._plan()

    def _rate(self) -> float:
        return self.speed * min(1.0, self.cores / len(self.serving)) if self.serving else 0.0

    def _advance(self) -> None:
        elapsed = self.env.now - self.changed_at
        self.changed_at = self.env.now
        done = elapsed * self._rate()
        for job in self.serving:
            job.remaining = max(job.remaining - done, 0.0)
        self.queue_integral += elapsed * len(self)
        self.busy_integral += elapsed * min(self.cores, len(self.serving))
        self.work += done * len(self.serving)

    def _plan(self) -> None:
        self.version += 1
        if self.serving:
            version = self.version
            delay = min(job.remaining for job in self.serving) / self._rate()
            _at(self.env, delay, URGENT, lambda: self._complete(version))

    def _complete(self, version: int) -> None:
        if version != self.version:
            return
        self._advance()
        job = min(self.serving, key=lambda job: job.remaining)
        self.serving.remove(job)
        if self.waiting:
            self.serving.append(self.waiting.popleft())
        self.result.status[job.index] = COMPLETED
        self.result.fct[job.index] = self.env.now - job.arrival
        self.leave(job)
        self._plan()


@dataclass
class Replay:
    """Flows with a known server, replayed. ``before(self, index)`` sees the state each flow finds.

    Attributes:
        arrival, demand, balancer, server: one entry per flow, in order of arrival; ``server`` -1: unrouted.
        servers: objects with ``cores``, ``speed``, ``workers``, ``backlog``.
        events: objects with ``time``, ``kind``, ``server``, ``value``; "rate" events are already in the flow list.
        own: int[m, N], open flows each balancer has in each server.
    """

    arrival: NDArray[np.float64]
    demand: NDArray[np.float64]
    balancer: NDArray[np.int64]
    server: NDArray[np.int64]
    servers: Sequence
    events: Sequence = ()
    before: Callable[[Replay, int], None] | None = None
    own: NDArray[np.int64] = field(init=False)
    models: list[LimitedProcessorSharing] = field(init=False)

    def run(self, until: float | None = None) -> Result:
        env = simpy.Environment()
        flows = len(self.arrival)
        result = Result(np.full(flows, np.nan), np.full(flows, -1, dtype=np.int64))
        self.own = np.zeros((int(self.balancer.max(initial=0)) + 1, len(self.servers)), dtype=np.int64)
        self.models = [
            LimitedProcessorSharing(env, result, s.cores, s.speed, s.workers, s.backlog, self._leave)
            for s in self.servers
        ]
        for event in self.events:
            if event.kind != "rate":
                _at(env, event.time, URGENT, lambda event=event: self._apply(event))
        env.process(self._arrivals(env, result))
        env.run(until)
        return result

    @property
    def active(self) -> NDArray[np.bool_]:
        return np.array([model.active for model in self.models])

    @property
    def total(self) -> NDArray[np.int64]:
        return np.array([len(model) for model in self.models])

    def _arrivals(self, env: simpy.Environment, result: Result):
        for i, time in enumerate(self.arrival):
            wait = simpy.Event(env)
            wait._ok, wait._value = True, None
            env.schedule(wait, priority=NORMAL, delay=max(time - env.now, 0.0))
            yield wait
            if self.before is not None:
                self.before(self, i)
            j = self.server[i]
            if j < 0:
                result.status[i] = UNROUTED
                continue
            job = Job(i, self.balancer[i], time, self.demand[i])
            if self.models[j].arrive(job):
                self.own[job.balancer, j] += 1
                # _leave needs the server a job is in; the flow list has it.

    def _leave(self, job: Job) -> None:
        self.own[job.balancer, self.server[job.index]] -= 1

    def _apply(self, event) -> None:
        model = self.models[event.server]
        if event.kind == "speed":
            model.set_speed(event.value)
        elif event.kind == "down":
            model.fail()
        else:
            model.active = event.kind == "up"
