"""Sockets by which proxies are reached, and the lock of the one driver that may drive what is behind them."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

from ... import checks
from ...errors import InvalidOptionError
from ..base import DriverError
from ..config import parse_port_number

#: The path of a Unix socket, or host and port.
Place = str | tuple[str, int]


def parse_place(text: str, what: str) -> Place:
    """The path of a Unix socket, or host and port: ``/PATH``, ``unix:PATH``, ``HOST:PORT`` or ``[IPV6]:PORT``.

    Raises:
        InvalidOptionError: for anything else.
    """
    if text.startswith("unix:") or "/" in text:
        path = text.removeprefix("unix:")
        if path and path.isprintable() and len(path.encode()) <= 107:
            return path
    else:
        host, _, port = text.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        number = parse_port_number(port)
        if host and number is not None:
            return checks.host(f"the host of {what}", host), number
    raise InvalidOptionError(
        f"{what} must be the path of a Unix socket with a '/' in it, of at most 107 bytes, or HOST:PORT, got {text!r}"
    )


def parse_port(text: str, what: str) -> tuple[str, int]:
    """An address to listen on: ``[ADDRESS:]PORT``, by default of 127.0.0.1.

    Raises:
        InvalidOptionError: for anything else.
    """
    try:
        place = parse_place(text if ":" in text else f"127.0.0.1:{text}", what)
    except InvalidOptionError:
        place = ""
    if isinstance(place, str):
        raise InvalidOptionError(f"{what} must be a TCP port or ADDRESS:PORT, got {text!r}")
    return place


def shown(place: Place) -> str:
    """A place as it is written on a command line."""
    if isinstance(place, str):
        return place
    return f"[{place[0]}]:{place[1]}" if ":" in place[0] else f"{place[0]}:{place[1]}"


def canonical(place: Place) -> str:
    """The same text for the same place."""
    return str(Path(place).resolve()) if isinstance(place, str) else shown(place)


def claim(driver: str, what: str, refusal: str) -> socket.socket:
    """A lock that ends with this process: an abstract Unix socket, which needs no file.

    Args:
        driver: kind of data plane.
        what: is claimed.
        refusal: message of the error.

    Raises:
        DriverError: if another driver has it.
    """
    lock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        lock.bind(f"\0lbgym-{driver} ".encode() + what.encode()[-90:])
    except OSError:
        lock.close()
        raise DriverError(refusal) from None
    return lock


def pair_names(names: Sequence[str], backends: Sequence[str], what: str) -> dict[str, str]:
    """Backends, in the proxy's own word ``what``, by the names of their regions.

    Raises:
        InvalidOptionError: unless there are as many names, all different, as backends.
    """
    if len(names) != len(backends) or len(set(names)) < len(names):
        raise InvalidOptionError(
            f"give each {what} a region of its own: there are {len(backends)} {what}s ({', '.join(backends) or '-'}) "
            f"and {len(set(names))} names ({', '.join(names) or '-'})"
        )
    return dict(zip(names, backends, strict=True))


def check_pairs(backends: Mapping[str, str], what: str) -> None:
    """Refuse no backend at all, and two regions of one.

    Raises:
        InvalidOptionError: with the names.
    """
    if not backends:
        raise InvalidOptionError(f"give a {what} and the name of its region")
    if len(set(backends.values())) < len(backends):
        raise InvalidOptionError(f"each {what} has one region, got {', '.join(backends.values())}")
