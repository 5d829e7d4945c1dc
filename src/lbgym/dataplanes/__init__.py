"""The port of the environments: its protocol, the simulator behind it, and real data planes behind shared memory."""

from typing import TYPE_CHECKING

from .._lazy import _lazy_names
from ..snapshot import Snapshot
from .base import BatchedDataPlane
from .simulated import RESET_OPTIONS, SimulatedDataPlane, scenario_with_options

if TYPE_CHECKING:
    from .live import SharedMemoryDataPlane
    from .live_group import LiveDataPlanes

__all__ = [
    "RESET_OPTIONS",
    "BatchedDataPlane",
    "LiveDataPlanes",
    "SharedMemoryDataPlane",
    "SimulatedDataPlane",
    "Snapshot",
    "scenario_with_options",
]

# Whoever simulates needs neither shared memory nor an operating system that has it.
__getattr__, __dir__ = _lazy_names(__name__, {"live": "SharedMemoryDataPlane", "live_group": "LiveDataPlanes"})
