"""Regions of a test have a directory of their own; its processes are forked from a warm one."""

from tests.sharedmemory.conftest import nursery, shm_dir

__all__ = ["nursery", "shm_dir"]
