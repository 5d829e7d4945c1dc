"""The connection to a Ray cluster, for training and for evaluation."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import LbgymError, MissingExtraError

try:
    import ray
except ModuleNotFoundError as error:
    raise MissingExtraError("ray", "rllib", "work on a Ray cluster") from error

#: Seconds that a cluster has to answer.
PATIENCE = 10.0


class ClusterError(LbgymError, RuntimeError):
    """A Ray cluster that cannot be joined, or that lost a training more often than it may be restarted."""


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Connect to Ray, through the process's own connection if it has one, else through one that ends with the block.

    Args:
        address: of a cluster, such as "auto", "10.0.0.1:6379" or "ray://10.0.0.1:10001"; None: that of the environment
            variable RAY_ADDRESS, else a local Ray that is started here.

    Raises:
        ClusterError: if there is no cluster at that address.
    """
    if ray.is_initialized():
        yield
        return
    # Without an address Ray would join whatever cluster was last started on this machine
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    _check_answers(address)
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM) if in_main else None
    try:
        # Without this Ray starts workers with a copy of the current folder where it finds a uv environment
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        logging.getLogger("ray").setLevel(logging.ERROR)
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            include_dashboard=False if address == "local" else None,
        )
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise ClusterError(f"cannot join the Ray cluster at {address}: {error}") from None
    finally:
        # Ray's own handler would end the process without saving anything.
        if handler is not None:
            signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Ray itself takes minutes to find out that nothing listens at an address.

    Raises:
        ClusterError: if nothing does.
    """
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if not colon or not port.isdecimal():
        # "auto", "local": Ray finds the address itself.
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE).close()
    except (OSError, OverflowError, ValueError) as error:
        raise ClusterError(f"cannot join the Ray cluster at {address}: nothing answers there ({error})") from None
