"""What an environment steps: the protocol, the simulator behind it, and a real data plane behind shared memory."""

from typing import TYPE_CHECKING, Any

from ..snapshot import Snapshot
from .base import DataPlane
from .simulated import RESET_OPTIONS, SimulatedDataPlane, scenario_with_options

if TYPE_CHECKING:
    from .live import SharedMemoryDataPlane

__all__ = [
    "RESET_OPTIONS",
    "DataPlane",
    "SharedMemoryDataPlane",
    "SimulatedDataPlane",
    "Snapshot",
    "scenario_with_options",
]


def __getattr__(name: str) -> Any:
    # Whoever simulates needs neither shared memory nor an operating system that has it.
    if name == "SharedMemoryDataPlane":
        from .live import SharedMemoryDataPlane

        return SharedMemoryDataPlane
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
