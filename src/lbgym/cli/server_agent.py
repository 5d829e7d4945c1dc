"""``lbgym server-agent``: answer with this server's ground truth."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ._signals import stop_on_signal


def server_agent(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "0.0.0.0",
    port: Annotated[int, typer.Option(help="Port to listen on; 0: any free one.")] = 9101,
    status: Annotated[
        str | None,
        typer.Option(
            help="Status page: of Apache (.../server-status?auto) or NGINX (stub_status).", show_default="none"
        ),
    ] = None,
    interval: Annotated[float, typer.Option(help="Seconds between measurements.")] = 0.2,
) -> None:
    """Answer with CPU use, memory use and busy workers of this server, for drivers that collect ground truth.

    Prints one line as soon as it answers. SIGTERM, SIGHUP or Ctrl-C end it with exit code 0. A driver asks it where its
    dataplane.toml has ground_truth = { port = 9101 }.
    """
    from ..drivers.server_agent import ServerAgent

    with stop_on_signal(expected=True) as stop, ServerAgent(host, port, status, interval) as agent:
        typer.echo(f"ground truth of this server: {agent.url}")
        sys.stdout.flush()
        stop.wait()
