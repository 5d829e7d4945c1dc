"""``lbgym shm rm``."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ...errors import LbgymError


def rm(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Names of regions.")],
    force: Annotated[
        bool, typer.Option("--force", "-f", help="Also a region that is in use, or that this version cannot read.")
    ] = False,
) -> None:
    """Remove regions whose producer is gone. Never removes a file that is no region."""
    from ...sharedmemory import remove_region

    refused = False
    for name in names:
        try:
            remove_region(name, force=force)
        except LbgymError as error:
            print(f"lbgym: error: {error}", file=sys.stderr)
            refused = True
        else:
            typer.echo(f"removed {name}")
    if refused:
        raise typer.Exit(2)
