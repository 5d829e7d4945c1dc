"""Flow-level discrete-event simulator: exact, compiled, batched over replicas."""

from .per_flow import FlowSimulation
from .simulation import Simulation, maglev_table_size

__all__ = ["FlowSimulation", "Simulation", "maglev_table_size"]
