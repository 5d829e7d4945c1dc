"""The live bridge: a binary interface in shared memory between data planes and agents."""

from .abi import Layout
from .buffers import Action, ObservationBuffer
from .region import DEFAULT_LEASE, SharedMemoryRegion, region_names

__all__ = ["DEFAULT_LEASE", "Action", "Layout", "ObservationBuffer", "SharedMemoryRegion", "region_names"]
