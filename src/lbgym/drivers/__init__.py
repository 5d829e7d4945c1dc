"""What connects a data plane to shared memory: so far the emulator, a simulated one in real time."""

from .emulator import Emulator

__all__ = ["Emulator"]
