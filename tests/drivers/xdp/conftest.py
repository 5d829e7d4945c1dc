"""What these tests need, and a balancer for each: skipped with the reason where it is missing, but not in CI."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest

from lbgym.drivers import DriverError
from lbgym.drivers.xdp.plane import Sizes, XdpPlane
from tests.privileges import skip_if
from tests.sharedmemory.conftest import nursery, shm_dir

__all__ = ["nursery", "shm_dir"]


@cache
def missing() -> str:
    """Why no balancer can be loaded here; empty if one can."""
    try:
        XdpPlane.load(Sizes(servers=2, flows=16, syn_flows=16)).close()
    except DriverError as error:
        return str(error)
    return ""


@pytest.fixture(autouse=True)
def _needs_xdp(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("xdp") is not None:
        skip_if(missing(), "the tests of XDP")


Load = Callable[..., XdpPlane]


@pytest.fixture
def load(_needs_xdp: None) -> Iterator[Load]:
    """Loads balancers, without a network, and closes them."""
    loaded: list[XdpPlane] = []

    def make(**sizes: object) -> XdpPlane:
        loaded.append(XdpPlane.load(Sizes(**{"servers": 64, "flows": 4096, "syn_flows": 4096, **sizes})))  # type: ignore[arg-type]
        loaded[-1].keep_alive(3600.0)
        return loaded[-1]

    yield make
    for plane in loaded:
        plane.close()
