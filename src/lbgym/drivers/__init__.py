"""Drivers connect data planes to shared memory: the loop and the parts they share, and the emulator."""

from .base import DriverError, ServerRow, Source
from .emulator import Emulator
from .loop import Publisher

__all__ = ["DriverError", "Emulator", "Publisher", "ServerRow", "Source"]
