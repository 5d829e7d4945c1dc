"""Flow-level discrete-event simulator: exact, compiled, batched over replicas."""

from .parameters import maglev_table_size
from .per_flow import FlowSimulation
from .simulation import Simulation

__all__ = ["FlowSimulation", "Simulation", "maglev_table_size"]
