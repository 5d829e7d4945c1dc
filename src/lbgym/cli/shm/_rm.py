"""``lbgym shm rm``."""

from __future__ import annotations

import os
import stat
import sys
from typing import Annotated

import typer

from ...errors import LbgymError, RegionBusyError, RegionError, RegionFormatError, RegionNotFoundError
from ._ls import begins_as_region


def rm(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Names of regions.")],
    force: Annotated[
        bool, typer.Option("--force", "-f", help="Also a region that is in use, or that this version cannot read.")
    ] = False,
) -> None:
    """Remove regions whose producer is gone. Never removes a file that is no region."""
    refused = False
    for name in names:
        try:
            _remove(name, force)
        except LbgymError as error:
            print(f"lbgym: error: {error}", file=sys.stderr)
            refused = True
        else:
            typer.echo(f"removed {name}")
    if refused:
        raise typer.Exit(2)


def _remove(name: str, force: bool) -> None:
    """Unlink a region whose producer's lock is free, and hold that lock meanwhile, so that nobody replaces it."""
    from ...sharedmemory import SharedMemoryRegion, abi, system

    path = system.path_of(name)
    try:
        if not stat.S_ISREG(path.lstat().st_mode) or not begins_as_region(path):
            raise RegionFormatError(f"{path} is no region, and is not removed")
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        raise RegionNotFoundError(f"there is no region {name!r} in {path.parent}") from None
    except OSError as error:
        raise RegionError(f"cannot remove region {name!r} from {path.parent}: {error.strerror}") from error
    try:
        if not force:
            try:
                with SharedMemoryRegion.attach(name, read_only=True) as region:
                    pid = region.producer_pid
            except RegionFormatError as error:
                raise RegionFormatError(f"{error}; whether it is in use cannot be told, --force removes it") from None
            if not system.try_lock(descriptor, abi.PRODUCER_LOCK):
                raise RegionBusyError(
                    f"region {name!r} has a live producer (process {pid}); stop that one, or take the region from it "
                    "with --force"
                )
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            path.unlink()
    except OSError as error:
        if isinstance(error, LbgymError):
            raise
        raise RegionError(f"cannot remove region {name!r} from {path.parent}: {error.strerror}") from error
    finally:
        os.close(descriptor)
