"""Regions of a test have a directory of their own."""

from tests.sharedmemory.conftest import shm_dir

__all__ = ["shm_dir"]
