"""The agent in production: drives a live data plane by a policy, within bounds, with logs and metrics."""

from typing import TYPE_CHECKING

from .._lazy import _lazy_names
from .config import ControllerConfig, config_from
from .envelope import SafetyEnvelope

if TYPE_CHECKING:
    from .control import Controller, Outcome

__all__ = ["Controller", "ControllerConfig", "Outcome", "SafetyEnvelope", "config_from"]

# Reading a configuration should not load the compiled protocol.
__getattr__, __dir__ = _lazy_names(__name__, {"control": "Controller Outcome"})
