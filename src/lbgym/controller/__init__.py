"""The agent in production: drives a live data plane by a policy, within bounds, with logs and metrics."""

from typing import TYPE_CHECKING, Any

from .config import ControllerConfig, config_from
from .envelope import SafetyEnvelope

if TYPE_CHECKING:
    from .control import Controller, Outcome

__all__ = ["Controller", "ControllerConfig", "Outcome", "SafetyEnvelope", "config_from"]


def __getattr__(name: str) -> Any:
    # Reading a configuration should not load the compiled protocol.
    if name in ("Controller", "Outcome"):
        from . import control

        return getattr(control, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
