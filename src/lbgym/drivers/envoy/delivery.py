"""How a cluster's servers and weights reach Envoy: :class:`Delivery`, and by a watched file :class:`EdsFile`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...atomic import whole_file
from ...errors import FileWriteError
from ..base import DriverError
from .endpoints import TYPE, Endpoint, read_assignment


class Delivery:
    """The servers of a cluster, from a file, and where they go with the weights in force.

    Args:
        file: with the servers; it is followed.
        resource: name of the cluster's endpoints.

    Attributes:
        assignment: the servers.
        removed: servers that only finish their flows, by name.

    Raises:
        DriverError: if it cannot be read.
    """

    #: As people call it.
    way = ""

    def __init__(self, file: str | Path, resource: str) -> None:
        self.file = Path(file)
        self.assignment = read_assignment(self.file, resource)
        self.removed: dict[str, Endpoint] = {}
        self._seen = _signature(self.file)

    def poll(self) -> bool:
        """Take over the file if somebody else has changed it; true then. One that is no good changes nothing.

        Raises:
            DriverError: for one that is no good.
        """
        signature = _signature(self.file)
        if signature == self._seen:
            return False
        before, self.assignment = self.assignment, read_assignment(self.file, self.assignment.resource)
        self._seen = signature
        self.again()
        self.removed |= {
            name: endpoint for name, endpoint in before.endpoints.items() if name not in self.assignment.endpoints
        }
        return True

    def drop(self, name: str) -> None:
        """A server that was removed has finished its flows."""
        self.removed.pop(name, None)

    def deliver(self, weights: Mapping[str, int]) -> bool:
        """Have Envoy get these weights, by name; true if it has others so far.

        Raises:
            DriverError: if they cannot be sent.
        """
        raise NotImplementedError

    def again(self) -> None:
        """Send at the next delivery whatever has been sent before."""

    def refusal(self) -> str:
        """What a client of the cluster has against what was delivered last; empty if nothing is known."""
        return ""

    @property
    def refusals(self) -> int | None:
        """How often a client of the cluster has refused what was delivered; None if that is not known."""
        return None

    def await_answers(self, timeout: float) -> None:
        """Wait for clients to take what was delivered last, where they say so."""

    def close(self) -> None:
        """End. Idempotent."""


def _signature(file: Path) -> tuple[int, ...] | None:
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class EdsFile(Delivery):
    """A file of EDS that Envoy watches, written whole and then renamed, which is what Envoy looks for.

    Weights and states that are not the operator's own are marked in the metadata of the endpoint, so that a driver that
    comes after one that was killed knows better.
    """

    way = "the EDS file"

    def __init__(self, file: str | Path, resource: str) -> None:
        super().__init__(file, resource)
        if self.file.suffix not in (".json", ".yaml", ".yml"):
            raise DriverError(f"{file}: a file of EDS that is written here must end in .json or .yaml")
        # Envoy watches the name that it was given, not where a symbolic link leads.
        self._mode = os.stat(self.file).st_mode & 0o777
        self._delivered: dict[str, Any] | None = None
        folder = self.file.parent
        if not os.access(folder, os.W_OK | os.X_OK):
            raise DriverError(f"cannot write {file}: no right to make files in {folder}, as a rename needs")

    def deliver(self, weights: Mapping[str, int]) -> bool:
        value = self.assignment.delivered(weights, self.removed)
        if value == self._delivered and self._seen == _signature(self.file):
            return False
        document = {"resources": [{"@type": TYPE, **value}]}
        try:
            with whole_file(self.file, mode=self._mode) as temporary:
                temporary.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
        except FileWriteError as error:
            raise DriverError(str(error)) from error
        self._seen = _signature(self.file)
        self._delivered = value
        return True

    def again(self) -> None:
        self._delivered = None


__all__ = ["Delivery", "EdsFile"]
