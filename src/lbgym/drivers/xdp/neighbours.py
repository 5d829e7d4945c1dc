"""Interfaces, routes and link-layer addresses, from the kernel: :class:`Neighbours`."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ...errors import MissingExtraError
from ..base import DriverError
from .plane import Address

#: States of a neighbour whose link-layer address is good, or was until something contradicts it.
_KNOWN = 0x02 | 0x04 | 0x08 | 0x10 | 0x40 | 0x80
#: A datagram that nobody waits for has the kernel resolve a neighbour.
_DISCARD = 9


@dataclass(frozen=True, slots=True)
class NextHop:
    """Where packets to an address go.

    Attributes:
        mac: of the address or of the router to it.
        own_mac: of the interface.
        ifindex: of the interface.
    """

    mac: bytes
    own_mac: bytes
    ifindex: int


class Neighbours:
    """Looks into the tables of the network namespace that it is made in.

    Raises:
        MissingExtraError: if pyroute2 is not installed.
        DriverError: if the kernel does not answer.
    """

    def __init__(self) -> None:
        try:
            from pyroute2 import IPRoute
        except ImportError:
            raise MissingExtraError("pyroute2", "xdp", "an XDP balancer") from None
        self._route: Any = IPRoute()
        self._sockets = {
            family: socket.socket(family, socket.SOCK_DGRAM) for family in (socket.AF_INET, socket.AF_INET6)
        }
        for sender in self._sockets.values():
            sender.setblocking(False)

    def interface(self, name: str) -> int:
        """The index of an interface.

        Raises:
            DriverError: if there is none of this name, or it is no Ethernet interface.
        """
        links = {link.get_attr("IFLA_IFNAME"): link for link in self._dump("get_links")}
        if name not in links:
            raise DriverError(f"there is no interface {name!r}; there are {', '.join(sorted(links)) or 'none'}")
        if links[name]["ifi_type"] != 1:
            raise DriverError(f"interface {name!r} is no Ethernet interface")
        return int(links[name]["index"])

    def own_mac(self, ifindex: int) -> bytes:
        """The link-layer address of an interface, 6 bytes."""
        addresses = {link["index"]: _bytes(link.get_attr("IFLA_ADDRESS")) for link in self._dump("get_links")}
        return addresses.get(ifindex) or bytes(6)

    def find(self, addresses: Iterable[Address]) -> dict[Address, NextHop | None]:
        """The next hop to each address; None where there is no route, or its link-layer address is not known (yet)."""
        macs = {
            (entry["ifindex"], entry.get_attr("NDA_DST")): _bytes(entry.get_attr("NDA_LLADDR"))
            for entry in self._dump("get_neighbours")
            if entry["state"] & _KNOWN
        }
        own = {link["index"]: _bytes(link.get_attr("IFLA_ADDRESS")) for link in self._dump("get_links")}
        found: dict[Address, NextHop | None] = {}
        for address in set(addresses):
            found[address] = None
            hop = self._hop(address)
            if hop is None:
                continue
            ifindex, to = hop
            mac = macs.get((ifindex, str(to)))
            if mac is not None and ifindex in own:
                found[address] = NextHop(mac, own[ifindex] or bytes(6), ifindex)
            else:
                self._resolve(to, ifindex)
        return found

    def _hop(self, address: Address) -> tuple[int, Address] | None:
        """Interface and address of the next hop; None without a route, and to this machine itself."""
        try:
            routes = list(self._route.route("get", dst=str(address), family=_family(address)))
        except Exception as error:
            if getattr(error, "code", None) is None and not isinstance(error, OSError):
                raise
            return None  # no route
        if not routes or routes[0]["type"] != 1:  # unicast
            return None
        gateway = routes[0].get_attr("RTA_GATEWAY")
        return int(routes[0].get_attr("RTA_OIF")), ipaddress.ip_address(gateway) if gateway else address

    def _resolve(self, address: Address, ifindex: int) -> None:
        # No route, no neighbour or a full queue: it is tried again.
        with contextlib.suppress(OSError):
            if address.version == 6:
                self._sockets[socket.AF_INET6].sendto(b"", (str(address), _DISCARD, 0, ifindex))
            else:
                self._sockets[socket.AF_INET].sendto(b"", (str(address), _DISCARD))

    def _dump(self, what: str) -> list[Any]:
        try:
            return list(getattr(self._route, what)())
        except OSError as error:
            raise DriverError(f"the kernel does not answer to netlink: {error}") from error

    def close(self) -> None:
        """Close the sockets. Idempotent."""
        self._route.close()
        for sender in self._sockets.values():
            sender.close()


def _family(address: Address) -> int:
    return socket.AF_INET6 if address.version == 6 else socket.AF_INET


def _bytes(mac: str | None) -> bytes | None:
    raw = bytes.fromhex(mac.replace(":", "")) if mac else b""
    return raw if len(raw) == 6 else None
