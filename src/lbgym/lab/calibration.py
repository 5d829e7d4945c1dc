"""Measures what the simulator must know of a laboratory's servers: :func:`calibrate`."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import numpy as np

from .base import LabError
from .config import Calibration
from .flows import draw_flows
from .namespaces import inside

if TYPE_CHECKING:
    from .laboratory import Laboratory

#: Requests that are counted together, how many such counts there are of each of the two parts of a demand, and requests
#: of each server's latency.
REQUESTS, COUNTS, LATENCY_REQUESTS = 4, 7, 12
#: CPU seconds of a request that are long beside what is fixed.
_LONG = 0.02
#: Seconds without work between two requests, in which a quota is filled up and a connection ends.
_PAUSE = 0.02


def calibrate(lab: Laboratory) -> Calibration:
    """Measure demands and latency, one request at a time and without other load.

    Demands are CPU time as the control group of the largest server counts it: of requests of amount 0, which is
    ``fixed``, and of longer ones. The latency is the median over all servers of what requests from the scenario's own
    law of demands take longer than by demand and speed.

    Raises:
        LabError: if a request fails, or an amount makes no difference.
    """
    shares = lab.config.shares()
    largest = int(np.argmax(shares))
    amount = 1_000
    _cpu(lab, largest, 0, 3, 1)  # the first ones open files and compile
    # A median, since CPU time also passes while a neighbour on the same core holds up a request.
    fixed = _cpu(lab, largest, 0)
    while _cpu(lab, largest, amount, 2, 1) < _LONG + fixed:
        amount *= 4
        if amount > lab.most:
            raise LabError(f"requests to server {largest} do not demand more CPU time the larger they are")
    per_unit = (_cpu(lab, largest, amount) - fixed) / amount
    known = Calibration(per_unit=per_unit, fixed=fixed, latency=0.0)
    extra = np.concatenate([_latencies(lab, i, known) for i in range(len(shares))])
    return Calibration(per_unit=per_unit, fixed=fixed, latency=float(np.median(extra)))


def _cpu(lab: Laboratory, server: int, amount: int, requests: int = REQUESTS, counts: int = COUNTS) -> float:
    """CPU seconds of the server per request, the median of some counts."""
    counted = []
    for _ in range(counts):
        before = lab.used()[server]
        for _ in range(requests):
            _ask(lab, server, amount)
        counted.append(float(lab.used()[server] - before) / requests)
    return float(np.median(counted))


def _ask(lab: Laboratory, server: int, amount: int) -> None:
    with inside(lab.network.name("client")):
        connection = socket.create_connection(lab.server_addresses[server], timeout=60.0)
    with connection:
        connection.sendall(lab.request(amount))
        answer = b""
        while data := connection.recv(1 << 16):
            answer = answer or data
    if not answer.startswith((b"HTTP/1.0 2", b"HTTP/1.1 2")):
        raise LabError(f"server {server} answers a request of amount {amount} with {answer[:40]!r}")


def _latencies(lab: Laboratory, server: int, known: Calibration) -> np.ndarray:
    """Seconds by which requests take longer than by demand and speed."""
    scenario = lab.config.scenario
    horizon = 100.0 * LATENCY_REQUESTS / scenario.rate
    demands = draw_flows(scenario, 0, horizon, known, lab.most)["demand"]
    # Spread over the law of the demands, but for its longest, which would take all the time.
    demands = np.quantile(demands, (np.arange(LATENCY_REQUESTS) + 0.5) / LATENCY_REQUESTS)
    amounts = np.array([known.amount(float(demand), lab.most) for demand in demands])
    alone = (known.fixed + known.per_unit * amounts) / scenario.servers[server].speed
    arrivals = np.concatenate([[0.0], np.cumsum(1.5 * alone + _PAUSE)[:-1]])
    outcome, _, _ = lab.generate(
        {"arrival": arrivals, "amount": amounts},
        counted=len(arrivals),
        duration=0.0,
        limit=float(arrivals[-1] + alone[-1]) + scenario.reject_timeout,
        address=lab.server_addresses[server],
    )
    if outcome.status.any():
        raise LabError(f"server {server} failed a request while it was calibrated")
    return outcome.fct - alone
