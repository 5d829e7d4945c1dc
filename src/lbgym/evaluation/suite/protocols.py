"""Protocols by name."""

from __future__ import annotations

from collections.abc import Callable

from ...errors import UnknownNameError
from .protocol import Protocol
from .v1 import protocol_v1

_PROTOCOLS: dict[str, Callable[[], Protocol]] = {"v1": protocol_v1}


def protocol_names() -> tuple[str, ...]:
    """Names of the protocols, the newest last."""
    return tuple(_PROTOCOLS)


def protocol_of(name: str = "v1") -> Protocol:
    """The protocol of that name.

    Raises:
        UnknownNameError: there is none.
    """
    if name not in _PROTOCOLS:
        raise UnknownNameError("protocol", name, _PROTOCOLS)
    return _PROTOCOLS[name]()
