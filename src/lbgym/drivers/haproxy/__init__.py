"""HAProxy as a data plane: ``lbgym dataplane haproxy``."""

from .agent_check import AgentCheck
from .fleet import AgentCheckedBackend
from .logs import LOG_FORMAT, FlowLog
from .options import HaproxyOptions, open_backends
from .runtime import Haproxy
from .source import HaproxyBackend

__all__ = [
    "LOG_FORMAT",
    "AgentCheck",
    "AgentCheckedBackend",
    "FlowLog",
    "Haproxy",
    "HaproxyBackend",
    "HaproxyOptions",
    "open_backends",
]
