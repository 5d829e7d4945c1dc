"""Places of sockets as they are written on command lines."""

from __future__ import annotations

import pytest

from lbgym.drivers.envoy.admin import parse_admin
from lbgym.drivers.proxy.places import parse_place, parse_port
from lbgym.errors import InvalidOptionError


def test_places() -> None:
    assert parse_place("unix:x", "socket") == "x"
    assert parse_place("[fd00::1]:80", "socket") == ("fd00::1", 80)
    assert parse_place("münchen.de:80", "socket") == ("münchen.de", 80)
    assert parse_port("80", "port") == ("127.0.0.1", 80)
    assert parse_admin("http://localhost:9901/") == ("localhost", 9901)


@pytest.mark.parametrize("host", ["ä..b", "a..b", ".", "a" * 80])
def test_hosts_that_nobody_can_have(host: str) -> None:
    with pytest.raises(InvalidOptionError, match=f"^the host of socket must be .* got '{host}'$"):
        parse_place(f"{host}:80", "socket")
    with pytest.raises(InvalidOptionError, match=f"^agent_check must be a TCP port or ADDRESS:PORT, got '{host}:80'$"):
        parse_port(f"{host}:80", "agent_check")
    with pytest.raises(InvalidOptionError, match=f"^the host of admin must be .* got '{host}'$"):
        parse_admin(f"http://{host}:9901")
