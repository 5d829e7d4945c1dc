"""Regions of a test have a directory of their own."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lbgym.sharedmemory.system import DIRECTORY_VARIABLE
from tests.sharedmemory.nursery import Nursery


@pytest.fixture(autouse=True)
def shm_dir(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A fresh directory on tmpfs, which child processes look for regions in, too."""
    folder = Path(tempfile.mkdtemp(prefix="lbgym-test-", dir="/dev/shm"))
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(folder))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """A warm process that forks others."""
    warm = Nursery()
    yield warm
    warm.close()
