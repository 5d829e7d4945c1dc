"""Train Stable-Baselines3's PPO on a live data plane and say how many deadlines it missed.

    python examples/live_training.py                      # on an emulator at twenty times real time
    python examples/live_training.py --shm marllb_lb0     # on a data plane that is there

Needs ``pip install 'lbgym[sb3]'``. PPO learns between rollouts, and the data plane does not wait for it: the deadlines
that pass meanwhile are missed, which the environment counts in ``info``.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback

import lbgym
from lbgym.errors import LbgymError


@contextmanager
def emulator(name: str, scenario: str, speedup: float) -> Iterator[None]:
    """A simulated data plane in a process of its own; ends with the block."""
    command = [sys.executable, "-m", "lbgym", "dataplane", "emulate", "--name", name, "--scenario", scenario]
    process = subprocess.Popen([*command, "--speedup", str(speedup)], stdout=subprocess.PIPE, text=True)
    try:
        if process.stdout is None or not process.stdout.readline():
            sys.exit("the emulator did not start")
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


class Punctuality(BaseCallback):
    """Remembers what every step's info says of time."""

    def __init__(self) -> None:
        super().__init__()
        self.missed: list[int] = []
        self.overruns: list[float] = []
        self.delays: list[float] = []
        self.timestamps: list[float] = []

    def _on_step(self) -> bool:
        info: dict[str, Any] = self.locals["infos"][0]
        self.missed.append(info["missed_observations"])
        self.overruns.append(info["overrun"])
        self.delays.append(info["action_delay"])
        self.timestamps.append(info["timestamp"])
        return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shm", help="region of a data plane; without it, an emulator is started")
    parser.add_argument("--scenario", default="heterogeneous", help="what the emulator simulates")
    parser.add_argument("--speedup", type=float, default=20.0, help="of the emulator's clock")
    parser.add_argument("--steps", type=int, default=2000, help="steps to train")
    options = parser.parse_args()
    try:
        if options.shm is not None:
            train(options.shm, options.steps)
            return
        name = f"live-training-{os.getpid()}"
        with emulator(name, options.scenario, options.speedup):
            train(name, options.steps)
    except LbgymError as error:
        sys.exit(f"{error}")


def train(name: str, steps: int) -> None:
    env = lbgym.LoadBalanceEnv(
        shm_name=name, action_type="normalized", observation="flat", normalize=True, reward_type="max", shm_timeout=5.0
    )
    model = PPO("MlpPolicy", env, n_steps=256, batch_size=64, n_epochs=4, seed=0, device="cpu")
    punctuality = Punctuality()
    model.learn(steps, callback=punctuality)
    env.close()

    # From the first observation on, which is that of the first step.
    missed, late = sum(punctuality.missed[1:]), sum(overrun > 0.0 for overrun in punctuality.overruns[1:])
    passed = (punctuality.timestamps[-1] - punctuality.timestamps[0]) / 0.25
    print(f"{len(punctuality.missed) - 1:,} steps in {passed:,.0f} intervals of the data plane's clock")
    print(f"{missed:,} deadlines missed; at {late:,} steps the agent came too late")
    delays = np.array(punctuality.delays[1:])
    print(
        f"actions in force after {1e3 * np.nanmedian(delays):.2f} ms (median) of the data plane's clock; "
        f"{np.isnan(delays).sum():,} not yet when observed"
    )


if __name__ == "__main__":
    main()
