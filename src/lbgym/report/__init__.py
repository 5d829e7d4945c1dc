"""Pages for a browser: :class:`Dashboard` shows live regions, :func:`comparison_report` a comparison."""

from .comparison import comparison_report, save_report
from .dashboard import Dashboard

__all__ = ["Dashboard", "comparison_report", "save_report"]
