"""Pages for a browser: :class:`Dashboard` shows live regions, the others are files of what was measured."""

from .comparison import comparison_report, save_report
from .dashboard import Dashboard
from .recording import recording_report, save_recording_report
from .suite import save_suite_report, suite_report

__all__ = [
    "Dashboard",
    "comparison_report",
    "recording_report",
    "save_recording_report",
    "save_report",
    "save_suite_report",
    "suite_report",
]
