"""``lbgym dashboard``: live regions in a browser."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ._signals import stop_on_signal


def dashboard(
    shm: Annotated[
        list[str] | None,
        typer.Option("--shm", help="Region to show; several: once each.", show_default="all, also later ones"),
    ] = None,
    port: Annotated[int, typer.Option(help="Port to listen on; 0: any free one.")] = 8080,
    host: Annotated[str, typer.Option(help="Address to listen on; one of this machine's own keeps it private.")] = (
        "127.0.0.1"
    ),
    rate: Annotated[float, typer.Option(min=0.1, max=30.0, help="Pictures per second.")] = 4.0,
) -> None:
    """Show live regions in a browser: load, weights, FCT, who publishes and who acts. Read-only.

    Prints the page's address; /metrics there is for Prometheus. A region that is not there yet is waited for, and a
    data plane or agent that restarts is followed. SIGTERM, SIGHUP or Ctrl-C end it with exit code 0.
    """
    from ..report import Dashboard

    with stop_on_signal(expected=True) as stop, Dashboard(shm or (), host, port, rate) as page:
        typer.echo(f"dashboard: {page.url}")
        sys.stdout.flush()
        stop.wait()
