"""The port of the environments: its protocol, the simulator behind it, and real data planes behind shared memory."""

from typing import TYPE_CHECKING, Any

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


def __getattr__(name: str) -> Any:
    # Whoever simulates needs neither shared memory nor an operating system that has it.
    if name == "SharedMemoryDataPlane":
        from .live import SharedMemoryDataPlane

        return SharedMemoryDataPlane
    if name == "LiveDataPlanes":
        from .live_group import LiveDataPlanes

        return LiveDataPlanes
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
