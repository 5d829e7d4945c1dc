"""lbgym: a reinforcement-learning environment for network load balancing.

Importing it registers ``lbgym/LoadBalance-v0`` and ``lbgym/FlowDispatch-v0`` with Gymnasium and costs no more than
NumPy and Gymnasium; the simulator, torch, Matplotlib and the rest come when they are first needed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import gymnasium

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

_HOMES = {
    "FlowDispatchEnv": "env",
    "FlowDispatchVectorEnv": "env",
    "LoadBalanceEnv": "env",
    "LoadBalanceVectorEnv": "env",
    "MultiLoadBalanceEnv": "env",
    "MultiLoadBalanceVectorEnv": "env",
    "ReservoirSampler": "features",
    "Scenario": "scenarios",
    "SharedMemoryRegion": "sharedmemory",
    "Snapshot": "snapshot",
    "load_scenario": "scenarios",
    "scenario_names": "scenarios",
}

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


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


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
