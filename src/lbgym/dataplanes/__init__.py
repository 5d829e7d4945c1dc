"""What an environment steps: the protocol, and the simulator behind it."""

from ..snapshot import Snapshot
from .base import DataPlane
from .simulated import RESET_OPTIONS, SimulatedDataPlane, scenario_with_options

__all__ = ["RESET_OPTIONS", "DataPlane", "SimulatedDataPlane", "Snapshot", "scenario_with_options"]
