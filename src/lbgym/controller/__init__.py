"""The agent in production: a loop that drives a live data plane by a policy, within bounds, and says what it does."""

from typing import TYPE_CHECKING, Any

from .config import ControllerConfig, config_from
from .envelope import SafetyEnvelope

if TYPE_CHECKING:
    from .control import Controller, Outcome

__all__ = ["Controller", "ControllerConfig", "Outcome", "SafetyEnvelope", "config_from"]


def __getattr__(name: str) -> Any:
    # The command line reads configurations also where it drives nothing; the compiled protocol can wait.
    if name in ("Controller", "Outcome"):
        from . import control

        return getattr(control, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
