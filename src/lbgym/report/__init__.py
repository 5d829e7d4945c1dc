"""Pages for a browser: :class:`Dashboard` shows live regions."""

from .dashboard import Dashboard

__all__ = ["Dashboard"]
