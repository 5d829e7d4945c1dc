"""CPU shares by control groups, version 1 or 2: :class:`CpuGroup`."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from itertools import pairwise
from pathlib import Path

from .base import LabError
from .namespaces import wait_until_dead

#: The least quota that the kernel takes, seconds per period.
MIN_QUOTA = 0.001
#: Largest weight beside other groups: that a quota is to be had, whoever else is busy on the machine.
_MOST_SHARES, _MOST_WEIGHT = 262_144, 10_000
_JOIN = 'me=$1; shift; while [ "$1" != -- ]; do echo $me > "$1"; shift; done; shift; exec "$@"'


def _mounts() -> tuple[bool, Path | None, Path | None]:
    """The version 2, and the folders of the controllers cpu and cpuacct (the same one in version 2)."""
    first: dict[str, Path] = {}
    second: Path | None = None
    for line in Path("/proc/mounts").read_text().splitlines():
        _, folder, kind, options, *_ = line.split()
        if kind == "cgroup":
            first |= {name: Path(folder) for name in ("cpu", "cpuacct") if name in options.split(",")}
        elif kind == "cgroup2":
            with contextlib.suppress(OSError):
                if "cpu" in (Path(folder) / "cgroup.controllers").read_text().split():
                    second = Path(folder)
    return (True, second, second) if second is not None else (False, first.get("cpu"), first.get("cpuacct"))


def missing_controllers() -> str:
    """A sentence if CPU time cannot be limited here; empty if it can."""
    _, cpu, accounting = _mounts()
    if cpu is None or accounting is None:
        return "no control groups with the controllers cpu and cpuacct are mounted (/sys/fs/cgroup)"
    return "" if os.access(cpu, os.W_OK) else f"the control groups in {cpu} are read-only, as in a container"


class CpuGroup:
    """A control group whose processes get a share of the CPUs.

    Args:
        path: below the root of the hierarchy, such as "lbgym-lab/NAME/server-0".

    Raises:
        LabError: if there are no control groups.
    """

    def __init__(self, path: str) -> None:
        self._unified, cpu, accounting = _mounts()
        if cpu is None or accounting is None:
            raise LabError(missing_controllers())
        self._path = path
        self._root = cpu
        self._cpu, self._accounting = cpu / path, accounting / path

    @property
    def _folders(self) -> list[Path]:
        # Where both controllers are mounted together, their folders are links to one.
        return list({folder.resolve(): folder for folder in (self._cpu, self._accounting)}.values())

    def create(self) -> None:
        """Make the group and those above it, without a quota, each with the largest weight."""
        try:
            for folder in self._folders:
                folder.mkdir(parents=True, exist_ok=True)
            parts = Path(self._path).parts
            above = [self._root.joinpath(*parts[:i]) for i in range(len(parts) + 1)]
            for parent, child in pairwise(above):
                if self._unified:
                    (parent / "cgroup.subtree_control").write_text("+cpu")
                    (child / "cpu.weight").write_text(str(_MOST_WEIGHT))
                else:
                    (child / "cpu.shares").write_text(str(_MOST_SHARES))
        except OSError as error:
            raise LabError(f"cannot make the control group {self._cpu}: {error.strerror}") from error

    def limit(self, share: float | None, period: float) -> None:
        """Allow ``share`` CPU seconds per second, metered every ``period`` seconds; None: no limit.

        Raises:
            LabError: if the kernel refuses.
        """
        length = round(period * 1e6)
        quota = None if share is None else round(share * length)
        try:
            if self._unified:
                (self._cpu / "cpu.max").write_text(f"{'max' if quota is None else quota} {length}")
            else:
                (self._cpu / "cpu.cfs_quota_us").write_text("-1")
                (self._cpu / "cpu.cfs_period_us").write_text(str(length))
                (self._cpu / "cpu.cfs_quota_us").write_text(str(-1 if quota is None else quota))
        except OSError as error:
            raise LabError(f"the kernel takes no quota of {share:g} CPUs in {self._cpu}: {error.strerror}") from error

    def command(self, *arguments: str) -> list[str]:
        """A command as run in the group."""
        files = [str(folder / "cgroup.procs") for folder in self._folders]
        return ["sh", "-c", _JOIN, "sh", "0", *files, "--", *arguments]

    @property
    def used(self) -> float:
        """CPU seconds that its processes have used."""
        if self._unified:
            for line in (self._cpu / "cpu.stat").read_text().splitlines():
                key, _, value = line.partition(" ")
                if key == "usage_usec":
                    return int(value) * 1e-6
            raise LabError(f"{self._cpu}/cpu.stat has no usage_usec")
        return int((self._accounting / "cpuacct.usage").read_text()) * 1e-9

    @property
    def processes(self) -> list[int]:
        """Ids of the processes in the group and in those below it."""
        found: set[int] = set()
        for folder in self._folders:
            for file in folder.rglob("cgroup.procs"):
                with contextlib.suppress(OSError):
                    found |= {int(pid) for pid in file.read_text().split()}
        return sorted(found - {os.getpid()})

    def remove(self) -> bool:
        """Kill its processes and those of the groups below it, and remove all; returns if there was anything.

        Raises:
            LabError: if a process does not end.
        """
        there = [folder for folder in self._folders if folder.is_dir()]
        if not there:
            return False
        for _ in range(50):
            pids = self.processes
            if not pids:
                break
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            wait_until_dead(pids)
        for folder in there:
            below = sorted((path for path in folder.rglob("*") if path.is_dir()), key=lambda p: -len(p.parts))
            for path in (*below, folder):
                _remove_folder(path)
            with contextlib.suppress(OSError):
                # Another laboratory may be in it.
                folder.parent.rmdir()
        return True


def _remove_folder(folder: Path) -> None:
    deadline = time.monotonic() + 10.0
    while True:
        try:
            folder.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError as error:
            # A process that has just ended may still be counted.
            if time.monotonic() > deadline:
                raise LabError(f"cannot remove the control group {folder}: {error.strerror}") from error
            time.sleep(0.01)
