"""VPP is in no package registry: where it is not installed, these tests are skipped, also in CI."""

from __future__ import annotations

import pytest

from tests.sharedmemory.conftest import shm_dir
from tests.vpp.vpp import missing

__all__ = ["shm_dir"]


@pytest.fixture(autouse=True)
def _needs_vpp(shm_dir: object) -> None:
    if reason := missing():
        pytest.skip(reason)
