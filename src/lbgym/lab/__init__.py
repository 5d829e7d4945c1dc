"""A laboratory on one machine: real servers and clients around a real data plane, to measure policies on packets."""

from typing import TYPE_CHECKING

from .._lazy import _lazy_names

if TYPE_CHECKING:
    from .base import LabError
    from .config import Calibration, LabConfig, load_lab, twin_of, with_servers
    from .data_planes import DATA_PLANES, LabDataPlane
    from .laboratory import Laboratory, laboratories, remove
    from .measure import compare_in, predict
    from .place import Place
    from .prediction import Fidelity, fidelity, fidelity_table, kendall_tau, swapped_pairs
    from .servers import SERVER_KINDS, Instance, ServerKind

__all__ = [
    "DATA_PLANES",
    "SERVER_KINDS",
    "Calibration",
    "Fidelity",
    "Instance",
    "LabConfig",
    "LabDataPlane",
    "LabError",
    "Laboratory",
    "Place",
    "ServerKind",
    "compare_in",
    "fidelity",
    "fidelity_table",
    "kendall_tau",
    "laboratories",
    "load_lab",
    "predict",
    "remove",
    "swapped_pairs",
    "twin_of",
    "with_servers",
]

# The load generator is a process of its own, and needs none of this.
__getattr__, __dir__ = _lazy_names(
    __name__,
    {
        "base": "LabError",
        "config": "Calibration LabConfig load_lab twin_of with_servers",
        "data_planes": "DATA_PLANES LabDataPlane",
        "place": "Place",
        "prediction": "Fidelity fidelity fidelity_table kendall_tau swapped_pairs",
        "laboratory": "Laboratory laboratories remove",
        "measure": "compare_in predict",
        "servers": "SERVER_KINDS Instance ServerKind",
    },
)
