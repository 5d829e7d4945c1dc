"""Regions of a test have a directory of their own."""

from tests.sharedmemory.conftest import nursery, shm_dir

__all__ = ["nursery", "shm_dir"]
