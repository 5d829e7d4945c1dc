"""Recordings of simulated data planes at full speed: the emulator and the recorder in one thread, without waiting."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lbgym.drivers.emulator import Emulator
from lbgym.monitor import Follower
from lbgym.recording import Recording, load_recording
from lbgym.recording.recorder import _Segments
from lbgym.scenarios import Scenario
from lbgym.sharedmemory import SharedMemoryRegion


def record_at_full_speed(
    scenario: Scenario,
    path: Path,
    seconds: float,
    *,
    interval: float = 0.1,
    seed: int = 0,
    weights: Callable[[float], np.ndarray] | None = None,
) -> Recording:
    """Every observation of the emulated scenario.

    Args:
        scenario: to emulate.
        path: of the recording.
        seconds: simulated.
        interval: between observations.
        seed: of the flows.
        weights: an agent's, by the time; None: no agent.
    """
    # Other processes record as well, and not all in a folder of their own.
    name = f"fitted-{os.getpid()}"
    with (
        Emulator(scenario, name, speedup=1e6, seed=seed, publish_interval=interval) as emulator,
        Follower(name) as follower,
        _Segments(path, name, None, True) as segments,
        SharedMemoryRegion.attach(name) as agent,
    ):
        follower.skip()
        segments.begin(follower.region)
        for k in range(round(seconds / interval)):
            if weights is not None:
                agent.write_action(sequence_id=k, weights=weights(k * interval), lease=float("inf"))
            emulator.run(duration=interval)
            while follower.read():
                segments.add(follower, follower.missed)
        segments.finish()
    return load_recording(path)
