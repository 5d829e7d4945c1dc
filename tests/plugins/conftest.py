"""The core, compiled once; skipped with the reason where there is no C compiler, but not in CI."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lbgym.drivers import DriverError
from lbgym.drivers.afpacket.build import compiler
from lbgym.drivers.afpacket.core import load_library
from tests.plugins.packets import Bench
from tests.privileges import skip_if


@pytest.fixture(scope="session")
def library() -> ctypes.CDLL:
    try:
        compiler()
    except DriverError as error:
        skip_if(str(error), "the tests of the core")
    return load_library()


@pytest.fixture
def bench(library: ctypes.CDLL) -> Iterator[Callable[..., Bench]]:
    """Makes cores and frees them."""
    made: list[Bench] = []

    def make(**options: Any) -> Bench:
        made.append(Bench(library, **options))
        return made[-1]

    yield make
    for one in made:
        one.core.close()
