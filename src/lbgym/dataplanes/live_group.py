"""Live data planes, one per balancer, as one replica: :class:`LiveDataPlanes`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checks import items, shown
from ..errors import InvalidOptionError, UnknownNameError
from ..features.columns import FEATURE_NAMES
from ..scenarios import AnyScenario, Configured, Scenario
from ..snapshot import DEFAULT_STEP_INTERVAL, Snapshot
from .live import SharedMemoryDataPlane


class LiveDataPlanes:
    """Live data planes in front of the same servers, one per balancer: a :class:`~lbgym.dataplanes.BatchedDataPlane`.

    It has one replica, and every field of its snapshots has the leading axes [1, m]: the data planes do not share a
    clock. The counters are of all balancers' flows, as in a simulation.

    Args:
        names: regions of shared memory, one per balancer.
        interval: seconds of the data planes' clocks per step.
        timeout: seconds (real time) to wait for each region, and for observations after their deadline.
        num_servers: N, at least as many as each has now; None: as many as they have.
        scenario: description of the cluster; None: unknown.

    Raises:
        InvalidOptionError: for bad or repeated names, data planes with different numbers of servers, a scenario with
            another number, or a distribution.
        RegionNotFoundError, RegionBusyError, DataPlaneTimeout: as :class:`~lbgym.dataplanes.SharedMemoryDataPlane`,
            for any of the regions; all are released then.
    """

    num_replicas = 1
    has_interval = False

    def __init__(
        self,
        names: Sequence[str],
        *,
        interval: float = DEFAULT_STEP_INTERVAL,
        timeout: float = 2.0,
        num_servers: int | None = None,
        scenario: AnyScenario | None = None,
    ) -> None:
        kind = "names of regions, one per balancer"
        names = items("shm_names", names, kind)
        if not names or not all(isinstance(name, str) for name in names):
            raise InvalidOptionError(f"shm_names must be a list of {kind}, got {shown(list(names))}")
        if len(set(names)) < len(names):
            raise InvalidOptionError(f"shm_names must name each region once, got {list(names)!r}")
        if scenario is not None and scenario.varies:
            raise InvalidOptionError(
                f"scenario {scenario.name!r} is a distribution, but the cluster of a live data plane is not drawn; "
                "give the scenario that describes it, or none"
            )
        self.num_balancers = len(names)
        self._scenario = None if scenario is None else scenario.reference
        self._planes: list[SharedMemoryDataPlane] = []
        try:
            for name in names:
                self._planes.append(
                    SharedMemoryDataPlane(name, interval=interval, timeout=timeout, num_servers=num_servers)
                )
            counts = [plane.num_servers for plane in self._planes]
            if len(set(counts)) > 1:
                raise InvalidOptionError(
                    f"the regions {', '.join(names)} have {', '.join(map(str, counts))} servers; "
                    "say with num_servers how many to act for"
                )
            if scenario is not None and scenario.max_servers != counts[0]:
                raise InvalidOptionError(
                    f"num_servers={counts[0]}, but scenario {scenario.name!r} has {scenario.max_servers} servers; "
                    "give the scenario that describes the cluster, or none"
                )
        except BaseException:
            self.close()
            raise
        self.num_servers = counts[0]

    @property
    def features(self) -> frozenset[str]:
        """The features that every data plane measures."""
        return frozenset(FEATURE_NAMES).intersection(*(plane.region.real_features for plane in self._planes))

    @property
    def has_ground_truth(self) -> bool:
        """True if the last observation of each had CPU use, memory use and busy workers."""
        return all(plane.has_ground_truth for plane in self._planes)

    def no_index_reason(self, source: AnyScenario | None = None) -> str | None:
        """Names the regions that take no index parameters of an agent; None: every one takes them."""
        names = ", ".join(repr(plane.name) for plane in self._planes if not plane.region.takes_index)
        return f"region {names} takes weights only" if names else None

    @property
    def info(self) -> Mapping[str, NDArray[Any]]:
        """``SharedMemoryDataPlane.info`` of each, in arrays with leading axes [1, m]."""
        infos = [plane.info for plane in self._planes]
        return {key: np.array([[info[key] for info in infos]]) for key in infos[0]}

    def source(self, options: Mapping[str, Any] | None = None) -> Scenario | None:
        """The description of the cluster.

        Raises:
            UnknownNameError: for any option.
        """
        for key in options or ():
            names = ", ".join(repr(plane.name) for plane in self._planes)
            kind = "the live region" if self.num_balancers == 1 else "the live regions"
            raise UnknownNameError("option of reset", key, (), f"{kind} {names}")
        return self._scenario

    def reset(
        self,
        seeds: Sequence[int],
        mask: NDArray[np.bool_] | None = None,
        source: AnyScenario | None = None,
    ) -> Snapshot:
        """Begin an episode with the next observations; the data planes go on as they are.

        Seeds have no effect.

        Raises:
            DataPlaneTimeout: if one of them publishes nothing in time.
        """
        newest = [plane.region.latest for plane in self._planes]
        return self._together([plane.reset(after=after) for plane, after in zip(self._planes, newest, strict=True)])

    def step(
        self,
        weights: NDArray[np.float64],
        *,
        background: NDArray[np.float64] | None = None,
        delays: NDArray[np.float64] | None = None,
        seeds: Sequence[int] | None = None,
        reset: NDArray[np.bool_] | None = None,
    ) -> Snapshot:
        """Write everybody's weights, then wait for everybody's observation, even if one of them times out.

        Raises:
            InvalidOptionError: for ``delays``: a live data plane has its own.
            InvalidWeightsError, DataPlaneTimeout, RegionFormatError: as
                :meth:`SharedMemoryDataPlane.step <lbgym.dataplanes.SharedMemoryDataPlane.step>`, the first of them.
        """
        if delays is not None:
            raise InvalidOptionError(f"delays={delays.tolist()} for live data planes: they have their own delays")
        if reset is not None and reset.any():
            return self.reset(seeds or (), reset)
        index = None
        if background is not None:
            index = Configured.of(self._scenario, self.num_servers).index(weights[0], background[0])
        for b, plane in enumerate(self._planes):
            plane.begin_step(weights[0, b], index=None if index is None else index[b])
        snapshots: list[Snapshot] = []
        failures: list[Exception] = []
        for plane in self._planes:
            try:
                snapshots.append(plane.end_step())
            except Exception as error:
                failures.append(error)
        if failures:
            raise failures[0]
        return self._together(snapshots)

    def scenario_of(self, replica: int) -> Scenario | None:
        """The description of the cluster; None: unknown."""
        return self._scenario

    def initial_weights(self) -> NDArray[np.float64]:
        """The weights in force: an episode changes none."""
        return self.weights_in_force()

    def weights_in_force(self) -> NDArray[np.float64]:
        """The weights in force at the last observations, as the data planes state them, float64[1, m, N]."""
        return np.array([[plane.info["weights_in_force"] for plane in self._planes]])

    def close(self) -> None:
        """Let other agents have the regions; idempotent."""
        for plane in self._planes:
            plane.close()

    def _together(self, snapshots: list[Snapshot]) -> Snapshot:
        """A batch of one replica."""
        m = len(snapshots)

        def each(name: str) -> Any:
            return np.array([[getattr(snapshot, name) for snapshot in snapshots]])

        def total(name: str) -> Any:
            return np.repeat(each(name).sum(axis=1, keepdims=True), m, axis=1)

        known = all(snapshot.ground_truth is not None for snapshot in snapshots)
        return Snapshot(
            sequence_id=each("sequence_id"),
            timestamp=each("timestamp"),
            active=each("active"),
            stats=each("stats"),
            ground_truth=each("ground_truth") if known else None,
            started=total("started"),
            completed=total("completed"),
            rejected=total("rejected"),
            failed=total("failed"),
            unrouted=total("unrouted"),
        )
