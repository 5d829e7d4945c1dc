"""Options of ``lbgym`` itself."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated

import typer


def installed(module: str) -> bool:
    """True if a module of an extra can be imported."""
    try:
        return find_spec(module) is not None
    except ImportError:
        return False


def _show_version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        typer.echo(f"lbgym {__version__}")
        raise typer.Exit


def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """A reinforcement-learning environment for network load balancing."""
