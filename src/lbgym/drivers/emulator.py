"""The simulator as a data plane behind shared memory, in real or scaled time: :class:`Emulator`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import checks
from ..errors import InvalidWeightsError
from ..scenarios import RULES, Scenario
from ..sharedmemory import Publication, ServerState, system
from ..simulator import Simulation
from ..simulator import layout as at
from .base import DriverError, ServerRow, Source
from .loop import Publisher

#: Simulated seconds between observations. A fifth of the environment's default step of 0.25 s, so that every deadline
#: of an agent that steps in multiples of it meets an observation taken at that very instant, a deadline missed by a
#: moment costs a fifth of a step, and balancers with clocks of 0.05 s to 1 s can be tried on one region.
PUBLISH_INTERVAL = 0.05

_STATES = {at.UP: ServerState.UP, at.DRAINING: ServerState.DRAINING, at.DOWN: ServerState.DOWN}


class Emulator(Publisher):
    """A simulated data plane that publishes and takes weights as a real one does; agents need not know.

    One region of shared memory per balancer: ``name`` for a scenario with one balancer, ``name_0`` to ``name_{m-1}``
    for one with m. Each shows its balancer's own view: features and counters are of the flows it placed. Timestamps are
    simulated seconds, from 0. All regions exist, and hold the observation of time 0, when the constructor returns; time
    begins to pass with :meth:`run`.

    Observations are taken on a grid of whole publish intervals and published when the clock, ``speedup`` simulated
    seconds per second, comes to them. An agent's weights are put in force when it writes them, at the simulated instant
    that the clock shows then; a lease that ends puts the safe weights in force in the same way.

    Simulated time passes in full and in order. If an observation is ready more than one interval late (a speedup that
    the machine cannot keep up with, a suspended process), the clock has stood still for that long: it goes on at the
    same rate from there, ``slips`` and ``lost`` count it, and a warning says so. Agents pace themselves by the
    timestamps, so it does not make them late.

    The flows are reproducible if the seed is, and if weights change at the same simulated instants. When agents act in
    real time is not reproducible.

    The servers are called server-0, server-1, ...; they can be drained and undrained while the emulator runs, but not
    added or removed: a scenario has a fixed cluster.

    Args:
        scenario: to simulate.
        name: of the region, or the prefix of several.
        speedup: simulated seconds per second, 1e-6 to 1e6.
        publish_interval: simulated seconds between observations.
        dispatch: overrides the scenario's dispatch rule.
        seed: of the flows, at least 0; None: one from the operating system.
        safe_weights: float[N] in force without an agent's; None: in proportion to the servers' cores, which an operator
            knows.
        capacity: servers each region has room for; None: 64, or the scenario's if that is more.
        mode: permissions of the regions.
        group: owning group of the regions, id or name; None: the process's.

    Attributes:
        seed: of the flows.

    Raises:
        RegionExistsError: if a name belongs to a live region or to a file that is no region; no region is left then.
        RegionError: for a bad name, or if there is no room or no right to create a region.
        UnknownNameError: for an unknown dispatch rule.
        InvalidOptionError, InvalidWeightsError: for a value out of its range.
    """

    def __init__(
        self,
        scenario: Scenario,
        name: str,
        *,
        speedup: float = 1.0,
        publish_interval: float = PUBLISH_INTERVAL,
        dispatch: str | None = None,
        seed: int | None = None,
        safe_weights: ArrayLike | None = None,
        capacity: int | None = None,
        mode: int = 0o600,
        group: int | str | None = None,
    ) -> None:
        self.speedup = checks.number("speedup", speedup, low=1e-6, high=1e6)
        checks.number("publish_interval", publish_interval, low=1e-6, high=86_400.0)
        if seed is None:
            seed = int(np.random.SeedSequence().generate_state(1, np.uint64)[0])
        self.scenario, self.seed = scenario, checks.whole("seed", seed, low=0)
        safe = np.asarray(scenario.core_weights if safe_weights is None else safe_weights, np.float64)
        if safe.shape != (scenario.num_servers,):
            raise InvalidWeightsError(
                f"safe_weights must be {scenario.num_servers} numbers, one per server, got {safe.size}"
            )
        m = scenario.balancers
        names = [name] if m == 1 else [f"{name}_{b}" for b in range(m)]
        for region_name in names:
            # A bad name is refused before the simulator is compiled for it.
            system.path_of(region_name)
        self._cluster = _Cluster(scenario, dispatch, self.seed)
        super().__init__(
            {name: _Balancer(self._cluster, b, safe) for b, name in enumerate(names)},
            publish_interval=publish_interval,
            clock_rate=self.speedup,
            skip_late=False,
            capacity=capacity,
            mode=mode,
            group=group,
        )

    @property
    def time(self) -> float:
        """Simulated seconds so far."""
        return self._cluster.time


class _Cluster:
    """The simulation that all balancers share, and what each of them counted."""

    def __init__(self, scenario: Scenario, dispatch: str | None, seed: int) -> None:
        m, n = scenario.balancers, scenario.num_servers
        self.num_balancers, self.num_servers = m, n
        # The snapshot counts for all balancers together; where there are several, the flows say whose they are.
        self.simulation = Simulation(scenario, dispatch=dispatch, service=m == 1, record_flows=m > 1)
        self.fct_count = np.zeros(m, np.int64)
        self.fct_sum = np.zeros(m)
        self._ended = np.zeros((3, m, n), np.int64)  # completed, rejected, failed
        self._unrouted = np.zeros(m, np.int64)
        # Compiled, or loaded from disk, before anybody sees a region.
        self.simulation.reset([seed])
        self.simulation.observe()
        self.batch = self.simulation.reset([seed])
        self._weights: NDArray[np.float64] = np.ones((1, m, n))
        self._background: NDArray[np.float64] = np.zeros((1, m, n))
        self._changed = False
        # Of the interval under way: parts and seconds simulated, CPU use times seconds.
        self._parts, self._elapsed, self._cpu = 0, 0.0, np.zeros(n)
        self._observed_at = math.nan
        #: Status of servers that were drained or undrained since the simulation last went on.
        self._requested: dict[int, int] = {}

    @property
    def time(self) -> float:
        """Simulated seconds so far."""
        return float(self.batch.timestamp[0])

    def status(self) -> list[int]:
        """Status of the servers, by ``lbgym.simulator.layout``."""
        status: list[int] = self.simulation.server_status().tolist()
        for server, requested in self._requested.items():
            status[server] = requested
        return status

    def drain(self, server: int) -> None:
        """Send a server no new flows from now on."""
        self.simulation.drain(server)
        self._requested[server] = at.DRAINING

    def undrain(self, server: int) -> None:
        """Send a drained server flows again."""
        self.simulation.undrain(server)
        self._requested[server] = at.UP

    @property
    def takes_index(self) -> bool:
        """True if the dispatch rule counts flows by a formula that takes a background load."""
        return RULES[self.simulation.dispatch].takes_background

    def set_weights(
        self, balancer: int, weights: NDArray[np.float64], background: NDArray[np.float64] | float, now: float
    ) -> None:
        """Dispatch a balancer's flows by ``weights`` and background loads from ``now`` on."""
        self.advance(now)
        self._weights[0, balancer], self._background[0, balancer] = weights, background
        self._changed = True

    def advance(self, to: float) -> None:
        """Simulate up to ``to`` seconds."""
        duration = to - self.time
        if duration <= 0.0:
            return
        background = self._background if self.takes_index else None
        batch = self.batch = self.simulation.step(
            self._weights if self._changed else None, duration, background=background
        )
        self._changed = False
        self._requested.clear()
        assert batch.ground_truth is not None
        self._parts += 1
        self._elapsed += duration
        self._cpu += duration * batch.ground_truth[0, :, 0]
        if batch.interval is not None:
            ended = batch.interval.ended[0]
            self.fct_count[0] += round(ended)
            self.fct_sum[0] += ended * batch.interval.fct_mean[0]
        else:
            self._count_flows()

    def _count_flows(self) -> None:
        """Count the flows that ended for each balancer."""
        flows = self.simulation.take_flows()
        balancer, status, m = flows["balancer"], flows["status"], self.num_balancers
        routed = status != at.UNROUTED
        np.add.at(self._ended, (status[routed], balancer[routed], flows["server"][routed]), 1)
        self._unrouted += np.bincount(balancer[~routed], minlength=m)
        self.fct_count += np.bincount(balancer, minlength=m)
        self.fct_sum += np.bincount(balancer, weights=flows["fct"], minlength=m)

    def observe(self, now: float) -> None:
        """Simulate up to ``now`` and hold what is observed then; the same for all balancers that ask."""
        if now == self._observed_at:
            return
        self.advance(now)
        self._observed_at = now
        batch = self.batch
        assert batch.ground_truth is not None
        self.ground_truth = batch.ground_truth[0]
        if self._parts > 1:
            # CPU use is a mean over the interval, which actions have cut in parts.
            self.ground_truth[:, 0] = np.where(batch.active[0], self._cpu / self._elapsed, 0.0)
        self._parts, self._elapsed = 0, 0.0
        self._cpu[:] = 0.0
        if self.num_balancers == 1:
            self.started, self.unrouted = batch.started, batch.unrouted
            self.ended = batch.completed, batch.rejected, batch.failed
        else:
            self.started, self.unrouted = self._open() + self._ended.sum(axis=0), self._unrouted
            self.ended = self._ended[0], self._ended[1], self._ended[2]

    def _open(self) -> NDArray[np.int64]:
        """Open flows of each balancer at each server, int64[m, N]."""
        batch = self.batch
        if batch.active.all():
            return batch.stats[0, :, :, 0].astype(np.int64)
        # Inactive servers have zero rows there, and flows if they are being drained.
        flows = self.simulation.open_flows()
        counts = np.zeros((self.num_balancers, self.num_servers), np.int64)
        np.add.at(counts, (flows["balancer"], flows["server"]), 1)
        return counts


class _Balancer(Source):
    """One balancer's view of the simulated cluster."""

    driver = "emulator"

    def __init__(self, cluster: _Cluster, balancer: int, safe_weights: NDArray[np.float64]) -> None:
        self._cluster, self._balancer, self.takes_index = cluster, balancer, cluster.takes_index
        self._names = [f"server-{i}" for i in range(cluster.num_servers)]
        self._weights = safe_weights.tolist()

    def servers(self) -> Sequence[ServerRow]:
        status = self._cluster.status()
        return [
            ServerRow(name, weight, _STATES[is_])
            for name, weight, is_ in zip(self._names, self._weights, status, strict=True)
        ]

    def read(self, now: float) -> Publication:
        cluster, b = self._cluster, self._balancer
        cluster.observe(now)
        completed, rejected, failed = cluster.ended
        return Publication(
            timestamp=now,
            active=cluster.batch.active[0],
            stats=cluster.batch.stats[0, b],
            started=cluster.started[b],
            completed=completed[b],
            rejected=rejected[b],
            failed=failed[b],
            ground_truth=cluster.ground_truth,
            ground_truth_age=np.zeros(cluster.num_servers),
            unrouted=int(cluster.unrouted[b]),
            fct_count=int(cluster.fct_count[b]),
            fct_sum=float(cluster.fct_sum[b]),
        )

    def apply(self, weights: NDArray[np.float64], now: float) -> None:
        self._cluster.set_weights(self._balancer, weights, 0.0, now)

    def apply_index(self, weights: NDArray[np.float64], index: NDArray[np.float64], now: float) -> None:
        self._cluster.set_weights(self._balancer, weights, index[:, 1], now)

    def add(self, server: str, **_: Any) -> None:
        raise DriverError(f"the emulator cannot add {server!r}: a scenario has a fixed cluster; emulate a larger one")

    def remove(self, server: str) -> None:
        raise DriverError(f"the emulator cannot remove {server!r}: a scenario has a fixed cluster; drain the server")

    def drain(self, server: str) -> None:
        self._cluster.drain(self._index(server, at.UP))

    def undrain(self, server: str) -> None:
        self._cluster.undrain(self._index(server, at.DRAINING))

    def _index(self, server: str, status: int) -> int:
        """The index of a server that has a status."""
        if server not in self._names:
            raise DriverError(f"there is no server {server!r}; there are {', '.join(self._names)}")
        index = self._names.index(server)
        found = self._cluster.status()[index]
        if found != status:
            raise DriverError(f"server {server!r} is {_STATES[found].name.lower()}, not {_STATES[status].name.lower()}")
        return index

    def close(self) -> None:
        self._cluster.simulation.close()
