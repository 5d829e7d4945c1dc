"""Flow-level discrete-event simulator: exact, compiled, batched over replicas."""

from .simulation import Simulation, maglev_table_size

__all__ = ["Simulation", "maglev_table_size"]
