"""What these tests need: skipped with the reason where it is missing, but not in CI."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# Or else gRPC, once it has been used here, has a say in every process that a later test forks.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

from tests.drivers.envoy.balancer import Balancer, missing
from tests.drivers.proxies import Servers, servers
from tests.privileges import skip_if
from tests.sharedmemory.conftest import nursery, shm_dir

__all__ = ["nursery", "servers", "shm_dir"]


@pytest.fixture(autouse=True)
def _needs_envoy(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("envoy") is not None:
        skip_if(missing(), "the tests of Envoy")


@pytest.fixture
def balancer(_needs_envoy: None, servers: Servers) -> Iterator[Balancer]:
    """Not started yet."""
    made = Balancer(servers)
    yield made
    made.close()


@pytest.fixture(scope="module")
def envoy(servers: Servers) -> Iterator[Balancer]:
    """One that runs, with a cluster that nobody drives."""
    made = Balancer(servers)
    made.configure({"web": ["s1", "s2", "s3"]})
    made.start()
    yield made
    made.close()
