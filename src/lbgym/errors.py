"""The exceptions lbgym raises.

Each derives from the built-in or Gymnasium exception a caller would expect, so ``except ValueError`` keeps working.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

import gymnasium

__all__ = [
    "CheckpointError",
    "DataPlaneTimeout",
    "DivergedError",
    "FileWriteError",
    "InvalidActionError",
    "InvalidOptionError",
    "InvalidRewardError",
    "InvalidWeightsError",
    "LbgymError",
    "LiveCopyError",
    "MissingExtraError",
    "PolicyError",
    "RecordingError",
    "RegionBusyError",
    "RegionError",
    "RegionExistsError",
    "RegionFormatError",
    "RegionNotFoundError",
    "ResetNeeded",
    "ResultError",
    "ScenarioError",
    "TraceError",
    "UnknownNameError",
    "UnsupportedSpaceError",
    "WorkerLostError",
]


class LbgymError(Exception):
    """Base class of every exception lbgym raises on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions come back from worker processes by pickle, and some constructors take more than the message.
        return _restored, (type(self), self.args, self.__dict__)


def _restored(kind: type[LbgymError], args: tuple[Any, ...], state: dict[str, Any]) -> LbgymError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


class UnknownNameError(LbgymError, ValueError):
    """A name (feature, reward, dispatch rule, scenario, policy, key) that lbgym does not know."""

    def __init__(self, kind: str, name: object, known: Iterable[str], where: str = "", note: str = "") -> None:
        self.kind, self.name, self.known, self.note = kind, name, sorted(known), note
        near = difflib.get_close_matches(str(name), self.known, n=1, cutoff=0.5)
        hint = f" {note}." if note else f" Did you mean {near[0]!r}?" if near else ""
        place = f" in {where}" if where else ""
        super().__init__(f"unknown {kind} {name!r}{place}.{hint} Known: {', '.join(self.known)}.")


class InvalidActionError(LbgymError, ValueError):
    """An action of the wrong shape or type, not finite, or with an index out of range."""


class InvalidWeightsError(LbgymError, ValueError):
    """Weights of the wrong shape, not finite or negative."""


class InvalidRewardError(LbgymError, ValueError):
    """A reward that cannot be computed as asked for, or a reward function that returned no finite number."""


class UnsupportedSpaceError(LbgymError, TypeError):
    """An environment whose observation or action space a wrapper cannot work on."""


class PolicyError(LbgymError, ValueError):
    """A policy or trained model that cannot do what it is asked for, such as one made for another number of servers."""


class ScenarioError(LbgymError, ValueError):
    """A scenario, workload or event that cannot be simulated as stated."""


class TraceError(LbgymError, ValueError):
    """A trace file that cannot be read; the message names the file and, where there is one, the line."""


class ResultError(LbgymError, ValueError):
    """A result of a suite that cannot be read, is of another protocol or contender, or is being written elsewhere."""


class ResetNeeded(LbgymError, gymnasium.error.ResetNeeded):
    """``step`` or ``render`` before ``reset``, or ``step`` after the end of an episode."""


class CheckpointError(PolicyError):
    """A checkpoint that cannot be read, or that does not fit the environment; the message gives both shapes."""


class DivergedError(LbgymError, FloatingPointError):
    """A training whose networks hold numbers that are not finite any more; no such state is saved."""


class FileWriteError(LbgymError, OSError):
    """A file that cannot be written; the message gives the system's reason. The file that was there is untouched."""


class MissingExtraError(LbgymError, ImportError):
    """An optional dependency is not installed; the message names the extra to install."""

    def __init__(self, module: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs {module!r}, which is not installed: pip install 'lbgym[{extra}]'", name=module
        )


class WorkerLostError(LbgymError, RuntimeError):
    """A process that did a part of the work was killed."""


class RegionError(LbgymError):
    """A region of shared memory that cannot be made or used as asked for."""


class RegionExistsError(RegionError, FileExistsError):
    """The name is taken: by a region whose producer lives, or by a file that is no region."""


class RegionNotFoundError(RegionError, FileNotFoundError):
    """There is no region of this name."""


class RegionFormatError(RegionError, ValueError):
    """A file that is no region, a region of another version, or one with contents that no producer may write."""


class RegionBusyError(RegionError, BlockingIOError):
    """Another process has the role that was asked for: there is one producer and one agent per region."""


class RecordingError(LbgymError, ValueError):
    """A recording that cannot be written or read, or not made into what was asked for."""


class DataPlaneTimeout(LbgymError, TimeoutError):
    """A live data plane published nothing new in time."""


class LiveCopyError(LbgymError, TypeError):
    """A live data plane, or an environment on one, cannot be copied or pickled."""


class InvalidOptionError(LbgymError, ValueError):
    """A key of an environment, or an option of ``reset``, with a value it cannot have."""
