"""``lbgym shm``: look at regions of shared memory, record them, remove what is left over."""

from ._inspect import inspect
from ._ls import include, ls
from ._record import record
from ._report import report
from ._rm import rm
from ._watch import watch

__all__ = ["include", "inspect", "ls", "record", "report", "rm", "watch"]
