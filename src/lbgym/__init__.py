"""lbgym: a reinforcement-learning environment for network load balancing.

Importing it registers ``lbgym/LoadBalance-v0`` and ``lbgym/FlowDispatch-v0`` with Gymnasium and costs no more than
NumPy and Gymnasium; the simulator, torch, Matplotlib and the rest come when they are first needed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import gymnasium

if TYPE_CHECKING:
    from .env import LoadBalanceEnv
    from .features import ReservoirSampler
    from .flow_dispatch_env import FlowDispatchEnv, FlowDispatchVectorEnv
    from .multi_agent_env import MultiLoadBalanceEnv
    from .multi_agent_vector_env import MultiLoadBalanceVectorEnv
    from .scenarios import Scenario, load_scenario, scenario_names
    from .sharedmemory import SharedMemoryRegion
    from .snapshot import Snapshot
    from .vector_env import LoadBalanceVectorEnv

__version__ = "0.1.0"

_HOMES = {
    "FlowDispatchEnv": "flow_dispatch_env",
    "FlowDispatchVectorEnv": "flow_dispatch_env",
    "LoadBalanceEnv": "env",
    "LoadBalanceVectorEnv": "vector_env",
    "MultiLoadBalanceEnv": "multi_agent_env",
    "MultiLoadBalanceVectorEnv": "multi_agent_vector_env",
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
    vector_entry_point="lbgym.vector_env:LoadBalanceVectorEnv",
)
gymnasium.register(
    id="lbgym/FlowDispatch-v0",
    entry_point="lbgym.flow_dispatch_env:FlowDispatchEnv",
    vector_entry_point="lbgym.flow_dispatch_env:FlowDispatchVectorEnv",
)
