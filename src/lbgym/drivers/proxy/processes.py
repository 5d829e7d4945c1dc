"""Processes of a proxy that restarts and reloads: :class:`Followed`."""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable
from typing import Generic, Protocol, TypeVar

from ..base import DriverError
from ..sharing import Shared
from .places import Place, shown

logger = logging.getLogger("lbgym")


class Connection(Protocol):
    """To a process."""

    def close(self) -> None:
        """Close it. Idempotent."""


class Process:
    """A process of a proxy.

    Attributes:
        connection: to it; as long as it lasts, a process that is stopping can be asked.
        identity: differs from that of every other process.
        version: as it says it.
        stopping: it takes no new flows.
        idle: it has no flows.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.identity: Hashable = None
        self.version = ""
        self.stopping = self.idle = False

    def look(self) -> None:
        """Ask how it is.

        Raises:
            DriverError: if it does not answer.
        """
        raise NotImplementedError

    def adopt(self, again: Process) -> None:
        """Go on by a new connection to the same process."""
        self.connection.close()
        self.connection = again.connection
        self.stopping, self.idle = again.stopping, again.idle


P = TypeVar("P", bound=Process)


class Followed(Shared, Generic[P]):
    """A proxy, followed through restarts and reloads; shared by the backends that are driven.

    While it reloads there are two processes or more: one that takes new flows, and those that only finish theirs. They
    are reached by the connections that were made before.

    Args:
        place: where its processes are reached.

    Attributes:
        processes: those that are followed, oldest first; the last takes new flows.

    Raises:
        DriverError: if it does not answer, or is too old.
    """

    #: As it is written.
    proxy = ""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.processes: list[P] = []
        self._looked_at = math.nan
        self._connect()

    @property
    def newest(self) -> P:
        """The process that takes new flows.

        Raises:
            DriverError: if none does.
        """
        if not self.processes:
            raise DriverError(f"no process of {self.proxy} answers at {shown(self.place)}")
        return self.processes[-1]

    def _open(self) -> P:
        """A process that has just been connected to, not looked at yet.

        Raises:
            DriverError: if nobody answers.
        """
        raise NotImplementedError

    def _look_at(self, process: P) -> None:
        process.look()

    def _opened(self) -> P:
        process = self._open()
        try:
            process.look()
        except BaseException:
            process.connection.close()
            raise
        return process

    def _connect(self) -> None:
        process = self._opened()
        same = next((other for other in self.processes if other.identity == process.identity), None)
        if same is not None:
            # Only the connection was lost.
            same.adopt(process)
        else:
            self.processes.append(process)

    def look(self, now: float) -> None:
        """Find out which processes there are; once for each ``now``.

        Raises:
            DriverError: if no process takes new flows; those that are finishing are known.
        """
        if now == self._looked_at:
            return
        for process in self.processes[:]:
            # Everything that it did has been counted at the last look.
            if process.stopping and process.idle:
                self._forget(process)
                continue
            try:
                self._look_at(process)
            except DriverError as error:
                logger.debug("%s", error)
                self._lose(process)
        if not self.processes or self.newest.stopping:
            before = {process.identity for process in self.processes}
            self._connect()
            if self.newest.identity in before and self.newest.stopping:
                raise DriverError(
                    f"{self.proxy} at {shown(self.place)} is stopping, and no other process has taken over"
                )
            logger.info("following another process of %s %s", self.proxy, self.newest.version)
        self._looked_at = now

    def _lose(self, process: P) -> None:
        """Look for a process that has closed its connection: it may have done so only for being idle."""
        try:
            again = self._opened()
        except DriverError:
            self._forget(process)
            return
        if again.identity != process.identity:
            again.connection.close()
            self._forget(process)
            return
        process.adopt(again)

    def _forget(self, process: P) -> None:
        process.connection.close()
        self.processes.remove(process)

    def _stop(self) -> None:
        for process in self.processes:
            process.connection.close()
