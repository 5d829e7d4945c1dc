"""What these tests need: skipped with the reason where it is missing, but not in CI."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.drivers.haproxy.balancer import Balancer, missing
from tests.drivers.proxies import Servers, servers
from tests.privileges import skip_if
from tests.sharedmemory.conftest import nursery, shm_dir

__all__ = ["nursery", "servers", "shm_dir"]


@pytest.fixture(autouse=True)
def _needs_haproxy(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("haproxy") is not None:
        skip_if(missing(), "the tests of HAProxy")


@pytest.fixture
def balancer(_needs_haproxy: None, servers: Servers) -> Iterator[Balancer]:
    """Not started yet."""
    made = Balancer(servers)
    yield made
    made.close()
