"""What the parts of a laboratory share: :class:`LabError`, names, the right to make one."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence

from ..errors import InvalidOptionError, LbgymError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")


class LabError(LbgymError, RuntimeError):
    """A laboratory that cannot be set up, used or removed; the message says why."""


def check_name(name: str) -> str:
    """The name of a laboratory, which becomes a part of file and namespace names.

    Raises:
        InvalidOptionError: unless it is 1 to 32 letters, digits, hyphens and underscores.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidOptionError(
            "the name of a laboratory must be 1 to 32 letters, digits, '-' and '_', a letter or digit first, "
            f"got {name!r}"
        )
    return name


def check_root() -> None:
    """Refuse without root.

    Raises:
        LabError: in one sentence.
    """
    if os.geteuid() != 0:
        raise LabError("a laboratory makes network namespaces and control groups, which needs root: run it by sudo")


def run_tool(command: Sequence[str]) -> str:
    """The output of a command.

    Raises:
        LabError: if it fails, with what it said.
    """
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise LabError(f"{' '.join(command)}: {said[-1]}")
    return done.stdout
