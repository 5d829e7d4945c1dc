"""The environments: one core over a data plane, seen as one balancer, many replicas, several agents or single flows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import _lazy_names

if TYPE_CHECKING:
    from .flow_dispatch import FlowDispatchEnv, FlowDispatchVectorEnv
    from .multi_agent import MultiLoadBalanceEnv
    from .multi_agent_vector import MultiLoadBalanceVectorEnv
    from .single import LoadBalanceEnv
    from .vector import LoadBalanceVectorEnv

__all__ = [
    "FlowDispatchEnv",
    "FlowDispatchVectorEnv",
    "LoadBalanceEnv",
    "LoadBalanceVectorEnv",
    "MultiLoadBalanceEnv",
    "MultiLoadBalanceVectorEnv",
]

__getattr__, __dir__ = _lazy_names(
    __name__,
    {
        "flow_dispatch": "FlowDispatchEnv FlowDispatchVectorEnv",
        "single": "LoadBalanceEnv",
        "vector": "LoadBalanceVectorEnv",
        "multi_agent": "MultiLoadBalanceEnv",
        "multi_agent_vector": "MultiLoadBalanceVectorEnv",
    },
)
