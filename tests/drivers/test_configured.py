"""Servers that a balancer of packets finds while it runs, held to what a reload is held to. No privileges needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from lbgym.drivers.config import load_config
from lbgym.drivers.pool import ServerPool
from tests.drivers.test_discovery import eventually, replace

pytest.importorskip("pyroute2", reason="the balancers ask the kernel for link-layer addresses")

from lbgym.drivers.xdp.configured import ConfiguredBalancer, InForce

HEAD = """
name = "edge"
[discovery]
kind = "file"
path = "{}"
interval = 0.01
[driver]
vips = ["10.0.0.100:80"]
interfaces = ["lo"]
mode = "dnat"
"""


class Balancer(ConfiguredBalancer):
    """One that balances nothing; ``entries`` are those of its flow table."""

    driver = "stub"

    def __init__(self, path: Path) -> None:
        config = load_config(path)
        super().__init__(config, None, path)
        self.entries: list[int] = []
        self.reach: dict[str, str] = {}
        self._pool = ServerPool(config, path, check=self._check_list)

    def look(self) -> dict[str, str]:
        """Where the flows of each server go."""
        self._refresh()
        self._install()
        return self.reach

    def close(self) -> None:
        self._close_pool()

    def _entries(self) -> list[int]:
        return self.entries

    def _forget(self, row: int) -> None:
        pass

    def _put_in_force(self, wanted: InForce) -> None:
        self.reach = {reach.name: f"{reach.address}:{reach.port}" for reach in wanted.reach if reach is not None}


def listed(**places: str) -> str:
    """Servers by name and their ADDRESS or ADDRESS:PORT."""
    text = ""
    for name, place in places.items():
        address, _, port = place.partition(":")
        text += f'[[servers]]\nname = "{name}"\naddress = "{address}"\n' + (f"port = {port}\n" if port else "")
    return text


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[Balancer, Path]]:
    file, found = tmp_path / "dataplane.toml", tmp_path / "servers.toml"
    file.write_text(HEAD.format(found))
    found.write_text(listed(a="127.9.9.1:80", b="127.9.9.2:80"))
    with closing(Balancer(file)) as balancer:
        eventually(lambda: len(balancer.look()) == 2)
        yield balancer, found


@pytest.mark.parametrize(
    ("servers", "message"),
    [
        ({"a": "127.9.9.7:80", "b": "127.9.9.2:80"}, "server 'a' has the address 127.9.9.1 port 80 and cannot get"),
        (
            {"a": "127.9.9.1:81", "b": "127.9.9.2:80"},
            "cannot get 127.9.9.1 port 81 while it is known; give the new one",
        ),
        ({"a": "127.9.9.1:80", "c": "10.0.0.100:80"}, "the address of server 'c', 10.0.0.100, is a VIP's"),
        ({"c": "127.9.9.3:80", "d": "127.9.9.3:80"}, "servers 'c' and 'd' have the same address, 127.9.9.3 port 80"),
        ({"a": "host.example:80"}, "the address of server 'a' must be an IP address, got 'host.example'"),
        ({"c": "127.9.9.3"}, "server 'c' needs a port for mode dnat"),
    ],
)
def test_a_list_that_a_reload_would_refuse_changes_nothing(
    site: tuple[Balancer, Path], servers: dict[str, str], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    balancer, found = site
    before = balancer.look()
    replace(found, listed(**servers))
    eventually(lambda: balancer.look() and message in caplog.text)
    assert [balancer.look() for _ in range(3)] == 3 * [before]
    assert caplog.text.count("the servers stay as they are") == 1 and f"discovery: {found}: " in caplog.text
    replace(found, listed(a="127.9.9.1:80", b="127.9.9.2:80", e="127.9.9.5:80"))
    eventually(lambda: balancer.look() == {**before, "e": "127.9.9.5:80"})


def test_an_address_is_free_when_its_last_flow_has_ended(
    site: tuple[Balancer, Path], caplog: pytest.LogCaptureFixture
) -> None:
    balancer, found = site
    balancer.entries = [1, 1]
    replace(found, listed(a="127.9.9.1:80"))
    eventually(lambda: balancer.look() and balancer.servers()[1].state.name == "DRAINING")
    replace(found, listed(a="127.9.9.1:80", c="127.9.9.2:80"))
    eventually(lambda: balancer.look() and "servers 'c' and 'b' have the same address" in caplog.text)
    assert balancer.look() == {"a": "127.9.9.1:80", "b": "127.9.9.2:80"}
    balancer.entries = [1, 0]
    eventually(lambda: balancer.look() == {"a": "127.9.9.1:80", "c": "127.9.9.2:80"})
