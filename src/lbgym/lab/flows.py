"""The flows of a laboratory: those that the simulator draws of the same scenario and seed."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..scenarios import Scenario
from ..simulator import Simulation
from .config import Calibration


def draw_flows(
    scenario: Scenario, seed: int, horizon: float, calibration: Calibration, most: int
) -> dict[str, NDArray[Any]]:
    """Flows as the simulator has them, in order of arrival.

    Args:
        scenario: whose workload.
        seed: of the flows.
        horizon: seconds; flows that arrive before it.
        calibration: turns demands into amounts.
        most: largest amount of a request.

    Returns:
        ``arrival`` float64[n], seconds; ``demand`` float64[n], core-seconds; ``amount`` int64[n] of the requests.
    """
    simulation = Simulation(scenario, 1, reservoirs=False, service=False, record_flows=True)
    simulation.reset([seed])
    # Arrivals and demands do not depend on what becomes of the flows.
    simulation.step(None, horizon)
    ended, still = simulation.take_flows(), simulation.open_flows()
    simulation.close()
    order = np.argsort(np.concatenate([ended["flow_id"], still["flow_id"]]))
    flows = {name: np.concatenate([ended[name], still[name]])[order] for name in ("arrival", "demand")}
    amounts = [calibration.amount(demand, most) for demand in flows["demand"].tolist()]
    return flows | {"amount": np.array(amounts, np.int64)}
