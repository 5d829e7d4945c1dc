"""The servers of a driver that is configured by a file: :class:`ServerPool`."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ..errors import LbgymError
from ..sharedmemory import abi
from .base import DriverError, ServerRow
from .config import DataPlaneConfig, DiscoverySource, ServerConfig, load_config
from .discovery import Changes, Discovery, Slot, Slots, in_dns, in_file
from .ground_truth import GroundTruth
from .health import HealthChecks

logger = logging.getLogger("lbgym")


class ServerPool:
    """Slots, health checks, ground truth and discovery together, for the :class:`Source` of a real data plane.

    A source delegates to it: ``servers``, ``add``, ``drain``, ``undrain``, ``remove`` and ``reload`` are those of a
    source, and :meth:`refresh` belongs at the beginning of every ``read``.

    Args:
        config: the content of dataplane.toml.
        path: its file, for :meth:`reload`.
        before: servers, by row, of a driver that ran before on a data plane that has gone on. They keep their rows;
            those that the configuration no longer has are being removed.
        check: is called with each list that was found and where, and refuses it by an
            :class:`~lbgym.errors.LbgymError`; None: all are taken.
    """

    def __init__(
        self,
        config: DataPlaneConfig,
        path: str | os.PathLike[str] | None = None,
        before: Sequence[ServerConfig | None] = (),
        check: Callable[[Sequence[ServerConfig], str], None] | None = None,
    ) -> None:
        self.config, self._path, self._check = config, path, check
        capacity = config.capacity or max(abi.DEFAULT_CAPACITY, len(config.servers))
        self.slots = Slots(capacity)
        self.slots.seat(before)
        self.slots.update(config.servers)
        self._health, self._truth = HealthChecks(), GroundTruth()
        self._discovery: Discovery | None = None
        if config.discovery is not None:
            self._discovery = _discovery(config.discovery, config)
        # A list that was found and has not been taken over, or what is left of it.
        self._found: Sequence[ServerConfig] = ()
        self._partly = self._warned = False
        self._watch()

    def _watch(self) -> None:
        servers = [slot.server for slot in self.slots]
        self._health.watch(servers)
        self._truth.watch(servers)

    def servers(self) -> list[ServerRow]:
        """The rows, for ``Source.servers``."""
        return self.slots.rows

    def refresh(self, open_flows: Sequence[int]) -> list[Slot]:
        """Take in what was found out since the last call; returns the slots of servers that have left for good.

        Args:
            open_flows: by row, of the data plane; missing rows count 0.
        """
        changed = self._discovery is not None and self._take_over(self._discovery.poll())
        flows = [*open_flows, *[0] * (len(self.slots) - len(open_flows))]
        freed = self.slots.release(flows)
        if changed or freed:
            self._watch()
        healthy = self._health.healthy
        for slot in self.slots:
            slot.healthy = healthy.get(slot.server.name)
        return freed

    def _take_over(self, found: Sequence[ServerConfig] | None) -> bool:
        """Make ``found``, or what is left of the last list, the servers; what finds no row is left for later calls.

        Returns:
            True if anything has changed.
        """
        if found is not None:
            self._found, self._partly, self._warned = found, False, False
        wanted = self._found
        if not wanted:
            return False
        if self._partly:
            # The rest of the list comes to what there is: an operator may have changed that.
            names = {server.name for server in wanted}
            there = (slot.server for slot in self.slots if not slot.removed)
            wanted = [*(server for server in there if server.name not in names), *wanted]
        try:
            if self._check is not None:
                assert self.config.discovery is not None
                self._check(wanted, self.config.discovery.where)
            fitting, others = self.slots.split(wanted)
            changes = self.slots.update(fitting)
        except LbgymError as error:
            self._warn(f"{error}; the servers stay as they are")
            return False
        self._found, self._partly = others, True
        if others:
            leaving = sum(slot.removed for slot in self.slots)
            self._warn(
                f"no room for {len(others)} servers, the first of them {others[0].name!r}: all {self.slots.capacity} "
                f"rows are taken, {leaving} of them by servers that are being removed and still have flows; those that "
                "are left out are added when rows become free"
            )
        return bool(changes)

    def _warn(self, message: str) -> None:
        """Once for each list that was found."""
        if not self._warned:
            logger.warning("discovery: %s", message)
        self._warned = True

    def ground_truth(self) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """By row: float32[N, 3], NaN where unknown, and age float[N], seconds, inf where unknown."""
        return self._truth.values([row.name for row in self.slots.rows])

    def add(self, server: str, *, address: str, port: int | None, weight: float, cores: int | None) -> None:
        """Add a server with the checks of the configuration.

        Raises:
            DriverError: if there is no room.
            InvalidOptionError: for a bad value.
        """
        health, truth = self.config.health, self.config.ground_truth
        if health is not None and health.port is None and port is None:
            health = None
        self.slots.add(
            ServerConfig(
                name=server, address=address, port=port, weight=weight, cores=cores, health=health, ground_truth=truth
            )
        )
        self._watch()

    def drain(self, server: str) -> None:
        """Send a server no new flows."""
        self.slots.drain(server)

    def undrain(self, server: str) -> None:
        """Send a drained server flows again."""
        self.slots.undrain(server)

    def remove(self, server: str) -> None:
        """Drain a server and forget it when its flows have ended."""
        self.slots.remove(server)

    def reload(self) -> str:
        """Read the file again and add, change and remove servers; a line on what changed.

        Raises:
            DriverError: if there is no file, or no room for all servers; nothing has changed then.
            InvalidOptionError: if the file is not good; nothing has changed then.
        """
        if self._path is None:
            raise DriverError("there is no configuration file to reload")
        config = load_config(self._path)
        fixed = ["name", "publish_interval", "lease", "capacity", "mode", "group", "discovery", "driver"]
        if self.config.renamed:
            fixed.remove("name")
        if self._discovery is not None:
            fixed += ["health", "ground_truth"]
        different = [key for key in fixed if getattr(config, key) != getattr(self.config, key)]
        changes = self.slots.update(config.servers) if self._discovery is None else Changes()
        self._watch()
        if self._discovery is None:
            self.config = replace(self.config, health=config.health, ground_truth=config.ground_truth)
        later = f"; restart the driver for {', '.join(different)}" if different else ""
        return f"{changes}{later}"

    def close(self) -> None:
        """End checks, polls and discovery. Idempotent."""
        self._health.close()
        self._truth.close()
        if self._discovery is not None:
            self._discovery.close()


def _discovery(source: DiscoverySource, config: DataPlaneConfig) -> Discovery:
    if source.kind == "file":
        assert source.path is not None
        return Discovery(in_file(source.path), source.interval)
    assert source.host is not None and source.port is not None
    template = ServerConfig(
        name="template",
        address=source.host,
        port=source.port,
        health=config.health,
        ground_truth=config.ground_truth,
    )
    return Discovery(in_dns(source.host, source.port, template), source.interval)
