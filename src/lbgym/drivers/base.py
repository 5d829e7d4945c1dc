"""The data plane behind a driver: :class:`Source`, and what it hands to the publisher loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import LbgymError
from ..features import FEATURE_NAMES
from ..sharedmemory import Publication, ServerState

#: States in which a server takes new flows: one that is not checked (yet) does.
TAKES_FLOWS = (ServerState.UNKNOWN, ServerState.UP)


class DriverError(LbgymError, RuntimeError):
    """A data plane that cannot be read, driven or changed at the moment; the message says why."""


@dataclass(frozen=True, slots=True)
class ServerRow:
    """One row of a region.

    Attributes:
        name: unique among the rows; empty for a row that belongs to no server.
        weight: in force without an agent's, at least 0.
        state: of the server.
    """

    name: str
    weight: float = 1.0
    state: ServerState = ServerState.UP


class Source:
    """Base class of data planes: what :class:`~lbgym.drivers.Publisher` reads, drives and changes.

    Implement :meth:`servers`, :meth:`read` and :meth:`apply`, and :meth:`close` if there is something to release. The
    publisher calls all methods from one thread, so a source needs no lock for its own state. It owns everything else:
    the region, the grid of publications, the heartbeat, the agent's leases, the safe weights, the control socket and
    the end. A source for a balancer with an API::

        class Balancer(Source):
            driver = "example"
            features = ("n_flow_on", "fct_mean")

            def servers(self):
                return [ServerRow(name, weight) for name, weight in self.api.pool()]

            def read(self, now):
                active, stats, started, completed, rejected, failed = self.api.statistics()
                return Publication(now, active, stats, started, completed, rejected, failed)

            def apply(self, weights, now):
                self.api.set_weights(weights)

        Publisher({"marllb_lb0": Balancer()}, publish_interval=0.25).serve()

    Row i of :meth:`servers`, of every array of a ``Publication`` and of the weights is the same server. A server keeps
    its row for as long as it is known; :class:`~lbgym.drivers.Slots` keeps such a table. There may be more rows later,
    never fewer.

    :meth:`read` and :meth:`apply` raise :class:`DriverError` (or OSError) when the data plane does not answer. The
    publisher then publishes nothing, says so and tries again: an observation is never made up, and none says that
    weights are in force that were not applied.

    Attributes:
        driver: kind of data plane, at most 24 bytes; for people.
        features: the columns that this data plane measures. The others are published as zeros and marked as not real.
        takes_index: True if flows are placed by an index, so that an agent may give speeds and background loads, too:
            :meth:`apply_index`.
    """

    driver: str = ""
    features: tuple[str, ...] = FEATURE_NAMES
    takes_index: bool = False

    def servers(self) -> Sequence[ServerRow]:
        """The rows as they are now. Called before every publication, so it must not block."""
        raise NotImplementedError

    def read(self, now: float) -> Publication:
        """Observe.

        Flows are counted from the driver's start, and ``started = completed + rejected + failed + open`` must hold in
        every row: a driver that cannot read its counters at one instant derives the open flows from the others. A
        counter that a restarted data plane begins again at 0 goes on in the region; flows that were open are failed.

        Args:
            now: seconds on the publisher's clock, which begins at 0; becomes the timestamp.

        Raises:
            DriverError: if the data plane does not answer.
        """
        raise NotImplementedError

    def apply(self, weights: NDArray[np.float64], now: float) -> None:
        """Dispatch by ``weights``, float64[N] of at least 0 and not all 0, from ``now`` on; without background loads.

        Raises:
            DriverError: if the data plane does not take them.
        """
        raise NotImplementedError

    def apply_index(self, weights: NDArray[np.float64], index: NDArray[np.float64], now: float) -> None:
        """:meth:`apply` for an action with index parameters, where ``takes_index`` is true.

        The weights are the servers' whole speeds. Where the data plane does not know a server's cores, its weight
        divided by its speed per core are what the agent takes them for.

        Args:
            weights: as :meth:`apply` has them.
            index: float64[N, 2], speed per core, above 0 where the weight is, and background load in flows, at least 0:
                flows of others at the server, which count as if they were the balancer's own.
            now: as :meth:`apply` has it.

        Raises:
            DriverError: as :meth:`apply`.
        """
        raise NotImplementedError

    def add(self, server: str, *, address: str, port: int | None, weight: float, cores: int | None) -> None:
        """Add a server, or take one back that is being removed.

        Raises:
            DriverError: if this data plane cannot.
        """
        raise DriverError(f"the {self.driver or 'data plane'} driver cannot add servers while it runs")

    def drain(self, server: str) -> None:
        """Send a server no new flows; those it has go on.

        Raises:
            DriverError: if this data plane cannot, or knows no such server.
        """
        raise DriverError(f"the {self.driver or 'data plane'} driver cannot drain servers")

    def undrain(self, server: str) -> None:
        """Send a drained server flows again.

        Raises:
            DriverError: if this data plane cannot, or knows no such server.
        """
        raise DriverError(f"the {self.driver or 'data plane'} driver cannot drain servers")

    def remove(self, server: str) -> None:
        """Drain a server and forget it once it has no flows.

        Raises:
            DriverError: if this data plane cannot, or knows no such server.
        """
        raise DriverError(f"the {self.driver or 'data plane'} driver cannot remove servers while it runs")

    def reload(self) -> str:
        """Read the configuration again (SIGHUP, ``lbgym dataplane ctl NAME reload``); returns a line on what changed.

        Raises:
            DriverError: if there is none.
            InvalidOptionError: if it is not good; nothing has changed then.
        """
        raise DriverError(f"the {self.driver or 'data plane'} driver has no configuration file to reload")

    def counts(self) -> Mapping[str, int]:
        """What happened since the driver started, for its metrics; called from any thread.

        Returns:
            ``lost_log_lines`` and ``refused_updates``, where this data plane has such a thing.
        """
        return {}

    @property
    def reloads(self) -> bool:
        """True if SIGHUP reads a configuration again; otherwise it ends the driver."""
        return type(self).reload is not Source.reload

    def close(self) -> None:
        """Release the data plane. Idempotent."""
