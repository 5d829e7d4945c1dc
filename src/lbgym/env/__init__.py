"""The environments: one core over a data plane, seen as one balancer, many replicas, several agents or single flows."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .flow_dispatch import FlowDispatchEnv, FlowDispatchVectorEnv
    from .multi_agent import MultiLoadBalanceEnv
    from .multi_agent_vector import MultiLoadBalanceVectorEnv
    from .single import LoadBalanceEnv
    from .vector import LoadBalanceVectorEnv

_HOMES = {
    "FlowDispatchEnv": "flow_dispatch",
    "FlowDispatchVectorEnv": "flow_dispatch",
    "LoadBalanceEnv": "single",
    "LoadBalanceVectorEnv": "vector",
    "MultiLoadBalanceEnv": "multi_agent",
    "MultiLoadBalanceVectorEnv": "multi_agent_vector",
}

__all__ = [
    "FlowDispatchEnv",
    "FlowDispatchVectorEnv",
    "LoadBalanceEnv",
    "LoadBalanceVectorEnv",
    "MultiLoadBalanceEnv",
    "MultiLoadBalanceVectorEnv",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
