"""A laboratory on one machine: real servers and clients around a real data plane, to measure policies on packets."""

from typing import TYPE_CHECKING

from .._lazy import _lazy_names

if TYPE_CHECKING:
    from .base import LabError
    from .config import Calibration, LabConfig, load_lab
    from .data_planes import DATA_PLANES, LabDataPlane, Place
    from .laboratory import Laboratory, laboratories, remove
    from .measure import compare_in, predict
    from .servers import SERVER_KINDS, Instance, ServerKind

__all__ = [
    "DATA_PLANES",
    "SERVER_KINDS",
    "Calibration",
    "Instance",
    "LabConfig",
    "LabDataPlane",
    "LabError",
    "Laboratory",
    "Place",
    "ServerKind",
    "compare_in",
    "laboratories",
    "load_lab",
    "predict",
    "remove",
]

# The load generator is a process of its own, and needs none of this.
__getattr__, __dir__ = _lazy_names(
    __name__,
    {
        "base": "LabError",
        "config": "Calibration LabConfig load_lab",
        "data_planes": "DATA_PLANES LabDataPlane Place",
        "laboratory": "Laboratory laboratories remove",
        "measure": "compare_in predict",
        "servers": "SERVER_KINDS Instance ServerKind",
    },
)
