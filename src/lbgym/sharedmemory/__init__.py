"""The live bridge: a binary interface in shared memory between data planes and agents."""

from pathlib import Path

from .abi import Layout, ServerState
from .agent import DEFAULT_LEASE
from .buffers import Action, ObservationBuffer, Publication
from .names import SharedMemoryRegion, region_names, remove_region

__all__ = [
    "DEFAULT_LEASE",
    "Action",
    "Layout",
    "ObservationBuffer",
    "Publication",
    "ServerState",
    "SharedMemoryRegion",
    "get_include",
    "region_names",
    "remove_region",
]


def get_include() -> str:
    """Return the folder of ``lbgym_shm.h`` and ``lbgym_features.h``, for a C compiler's ``-I``."""
    return str(Path(__file__).parents[1] / "include")
