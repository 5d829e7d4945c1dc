"""The live bridge: a binary interface in shared memory between data planes and agents."""

from pathlib import Path

from .abi import Layout
from .buffers import Action, ObservationBuffer
from .region import DEFAULT_LEASE, SharedMemoryRegion, region_names

__all__ = [
    "DEFAULT_LEASE",
    "Action",
    "Layout",
    "ObservationBuffer",
    "SharedMemoryRegion",
    "get_include",
    "region_names",
]


def get_include() -> str:
    """The folder of ``lbgym_shm.h`` and ``lbgym_features.h``, for a C compiler's ``-I``."""
    return str(Path(__file__).parents[1] / "include")
