"""What an environment steps: the protocol, the simulator behind it, and a real data plane behind shared memory."""

from ..snapshot import Snapshot
from .base import DataPlane
from .sharedmemory import SharedMemoryDataPlane
from .simulated import RESET_OPTIONS, SimulatedDataPlane, scenario_with_options

__all__ = [
    "RESET_OPTIONS",
    "DataPlane",
    "SharedMemoryDataPlane",
    "SimulatedDataPlane",
    "Snapshot",
    "scenario_with_options",
]
