"""lbgym: a reinforcement-learning environment for network load balancing.

Importing it registers ``lbgym/LoadBalance-v0`` and ``lbgym/FlowDispatch-v0`` with Gymnasium and costs no more than
NumPy and Gymnasium; the simulator, torch, Matplotlib and the rest come when they are first needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import gymnasium

from ._lazy import _lazy_names

if TYPE_CHECKING:
    from .env import (
        FlowDispatchEnv,
        FlowDispatchVectorEnv,
        LoadBalanceEnv,
        LoadBalanceVectorEnv,
        MultiLoadBalanceEnv,
        MultiLoadBalanceVectorEnv,
    )
    from .features import ReservoirSampler
    from .scenarios import Scenario, load_scenario, scenario_names
    from .sharedmemory import SharedMemoryRegion
    from .snapshot import Snapshot

__version__ = "0.1.0"

__all__ = [
    "FlowDispatchEnv",
    "FlowDispatchVectorEnv",
    "LoadBalanceEnv",
    "LoadBalanceVectorEnv",
    "MultiLoadBalanceEnv",
    "MultiLoadBalanceVectorEnv",
    "ReservoirSampler",
    "Scenario",
    "SharedMemoryRegion",
    "Snapshot",
    "__version__",
    "load_scenario",
    "scenario_names",
]

__getattr__, __dir__ = _lazy_names(
    __name__,
    {
        "env": (
            "FlowDispatchEnv FlowDispatchVectorEnv LoadBalanceEnv LoadBalanceVectorEnv MultiLoadBalanceEnv "
            "MultiLoadBalanceVectorEnv"
        ),
        "features": "ReservoirSampler",
        "scenarios": "Scenario load_scenario scenario_names",
        "sharedmemory": "SharedMemoryRegion",
        "snapshot": "Snapshot",
    },
)

gymnasium.register(
    id="lbgym/LoadBalance-v0",
    entry_point="lbgym.env:LoadBalanceEnv",
    vector_entry_point="lbgym.env:LoadBalanceVectorEnv",
)
gymnasium.register(
    id="lbgym/FlowDispatch-v0",
    entry_point="lbgym.env:FlowDispatchEnv",
    vector_entry_point="lbgym.env:FlowDispatchVectorEnv",
)
