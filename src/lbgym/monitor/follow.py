"""Reading what is published under a name, whoever publishes it: :class:`Follower`."""

from __future__ import annotations

import logging
import time

from ..errors import RegionError, RegionNotFoundError
from ..sharedmemory import ObservationBuffer, SharedMemoryRegion, seqlock
from ..sharedmemory.abi import NUM_FRAMES

logger = logging.getLogger("lbgym")

#: Longest sleep before another look at who has the name while nothing is published, seconds.
_LOOK = 0.1
#: The same while something is, as when a region was removed under a live producer.
_LOOK_LIVE = 1.0


class Follower:
    """Reads the observations of a region, and of the regions that take its name after it. Only looks.

    The region is mapped without the right to write, so that nothing here can disturb a data plane or its agent.

    Attributes:
        region: the region that has the name, or had it last.
        buffer: the observation that was read last; another object after a restart.
        missed: observations that were published between the two read last, and overwritten before they were read.
        invalid: observations that no data plane may publish, so far; they count as missed, too.
        restarts: times that another region has taken the name.

    Args:
        name: of the region.

    Raises:
        RegionNotFoundError, RegionFormatError, RegionError: as :meth:`SharedMemoryRegion.attach`.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.missed = self.invalid = self.restarts = 0
        self._refused = ""
        seqlock.warm_up()
        self._take(SharedMemoryRegion.attach(name, read_only=True))

    def _take(self, region: SharedMemoryRegion) -> None:
        self.region = region
        self.buffer: ObservationBuffer = region.new_buffer()
        # The newest that was looked at, and that was read: another one if it was invalid.
        self._last = self._read = 0
        self._looked = time.monotonic()

    def skip(self) -> None:
        """Begin with the next observation instead of those that are there."""
        self._last = self._read = self.region.latest

    def wait(self, timeout: float) -> bool:
        """Sleep until there is an observation that was not read yet; false after ``timeout`` seconds."""
        now = time.monotonic()
        deadline = now + timeout
        # What is left in a region that is closed is read before another one is.
        if now - self._looked > _LOOK_LIVE and not self.region.closed_by_producer:
            self._looked = now
            self._follow()
        while True:
            left = deadline - time.monotonic()
            if self.region.wait_observation(self._last, min(max(left, 0.0), _LOOK)):
                return True
            if not self._follow():
                if left <= 0.0:
                    return False
                # Nobody is waited for in a region that is closed.
                if self.region.closed_by_producer:
                    time.sleep(min(left, _LOOK))

    def read(self) -> bool:
        """Read the next observation, in the order of publication; false if there is none yet."""
        region, last = self.region, self._last
        latest = region.latest
        if latest == last:
            return False
        # Back in time: a producer that counts anew.
        first = latest if latest < last else max(last + 1, latest - NUM_FRAMES + 1)
        for number in range(first, latest):
            try:
                if region.read_earlier(self.buffer, number):
                    return self._found()
            except RegionError:
                self._bad(number)
        return self._newest()

    def read_newest(self) -> bool:
        """Read the newest observation; false if it has been read."""
        return self.region.latest != self._last and self._newest()

    def _newest(self) -> bool:
        latest = self.region.latest
        try:
            return self.region.read_into(self.buffer) and self._found()
        except RegionError:
            self._bad(latest)
            self._last = latest
            return False

    def _found(self) -> bool:
        number = self.buffer.sequence_id
        self.missed = max(0, number - self._read - 1)
        self._last = self._read = number
        return True

    def _bad(self, number: int) -> None:
        self.invalid += 1
        if self.invalid == 1:
            logger.warning("region %r: observation %d is invalid", self.name, number)

    def _follow(self) -> bool:
        """Attach to the region that has taken the name; false if none has."""
        if not self.region.replaced:
            return False
        try:
            region = SharedMemoryRegion.attach(self.name, read_only=True)
        except RegionNotFoundError:
            return False
        except RegionError as error:
            if str(error) != self._refused:
                logger.warning("%s", error)
                self._refused = str(error)
            return False
        self.region.close()
        self._take(region)
        self.restarts += 1
        return True

    def close(self) -> None:
        """Detach; idempotent."""
        self.region.close()

    def __enter__(self) -> Follower:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
