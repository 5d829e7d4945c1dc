"""No value that a scenario may have keeps the simulator at work for ever, and Ctrl-C ends what takes long."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lbgym.errors import ResetNeeded, ScenarioError, TraceError
from lbgym.scenarios import (
    Empirical,
    Event,
    Exponential,
    ModulatedPoisson,
    OnOff,
    RandomEvents,
    Sampling,
    Scenario,
    ScenarioDistribution,
    Server,
    Sinusoidal,
    Trace,
    Workload,
    load_scenario,
    named_scenario,
)
from lbgym.simulator import Simulation
from lbgym.simulator import layout as at

HEAD = 'dispatch = "lsq"\n[[servers]]\ncores = 1\n'
FILES = {
    "packets": ('base = "heterogeneous"\n[sampling]\npackets_per_flow = 1e12\n', "packets_per_flow must be .* 10000"),
    "denormal": (
        HEAD + '[workload]\ntrace = { path = "denormal.csv" }\n',
        "must be 0 or at least 1e-09 core-seconds, got 4.9",
    ),
    "fast": (
        HEAD + "speed = 1e300\n[workload]\nload = 0.5\ndemand = { kind = 'exponential', mean = 0.1 }\n",
        r"at most 1e\+08 flows/s, got 5e\+300",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_never_ended(tmp_path: Path, name: str) -> None:
    text, message = FILES[name]
    (tmp_path / "denormal.csv").write_text("time,demand\n0,5e-324\n1,5e-324\n2,5e-324\n")
    (tmp_path / "scenario.toml").write_text(text)
    with pytest.raises((ScenarioError, TraceError), match=message):
        load_scenario(tmp_path / "scenario.toml")


def scenario(workload: Workload, **keys: Any) -> Scenario:
    return Scenario(servers=(Server(),), workload=workload, **keys)


RATE = Event(time=1.0, kind="rate", value=1e9)
OFF, ON = Event(time=1.0, kind="rate", value=0.0), Event(time=1e9, kind="rate", value=1.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: scenario(Workload(rate=1e9)), r"at most 1e\+08 flows/s, got 1e\+09"),
        (lambda: scenario(Workload(rate=10.0), events=(RATE,)), "rate events included"),
        (lambda: scenario(Workload(trace=Trace(np.array([0.0, 1e-300]), np.ones(2)))), "at most"),
        (lambda: scenario(Workload(demand=Exponential(mean=1e-300), rate=1.0)), "mean demand"),
        (lambda: scenario(Workload(demand=Empirical(values=(1e-300,)), rate=1.0)), "mean demand"),
        (lambda: ModulatedPoisson(sojourns=(1e-300, 1.0)), r"sojourns\[0\] must be .* at least 1e-06"),
        (lambda: OnOff(on=1e-300), "OnOff.on must be .* at least 1e-06"),
        (lambda: scenario(Workload(arrivals=OnOff(), rate=1e-12)), "from one flow to the next"),
        (lambda: scenario(Workload(arrivals=ModulatedPoisson(), rate=1e-12)), "from one flow to the next"),
        (lambda: scenario(Workload(arrivals=OnOff(), rate=1.0), events=(OFF, ON)), "4e\\+08 times"),
        (lambda: scenario(Workload(arrivals=Sinusoidal(amplitude=1.0, period=1e300), rate=1.0)), "shorter period"),
        (lambda: Sampling(packets_per_flow=10_001), "packets_per_flow"),
    ],
)
def test_what_would_never_end_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ScenarioError, match=message):
        make()


def test_the_extremes_that_are_allowed_end() -> None:
    for workload, events in (
        (Workload(demand=Exponential(mean=1e-12), rate=1e6), ()),
        (Workload(arrivals=OnOff(on=1e-6, off=1e-6), rate=1.0), ()),
        (Workload(arrivals=Sinusoidal(amplitude=1.0, period=1e6), rate=100.0), ()),
        (Workload(arrivals=OnOff(), rate=1e-6), (Event(time=0.5, kind="rate", value=0.0),)),
    ):
        simulation = Simulation(scenario(workload, events=events, sampling=Sampling(packets_per_flow=100.0)))
        simulation.reset([1])
        assert simulation.step(None, 0.25).timestamp == 0.25


def test_draws_of_events_are_bounded_by_the_horizon() -> None:
    often = RandomEvents(kind="down", every=1.0, duration=1e6)
    distribution = ScenarioDistribution(base=named_scenario("uniform"), events=[often])
    distribution.draw(1)
    with pytest.raises(ScenarioError, match="shorten the episode"):
        distribution.draw(1, horizon=1e12)


LONG = """
import signal, sys
from lbgym.errors import ResetNeeded
from lbgym.scenarios import default_scenario
from lbgym.simulator import Simulation
simulation = Simulation(default_scenario(4), 4, num_threads=int(sys.argv[1]), service=False)
simulation.reset(range(4))
simulation.step(None, 1.0)
# Whoever started the tests in the background has had them ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    print("ready", flush=True)
    simulation.step(None, 1e9)
except KeyboardInterrupt:
    pass
try:
    simulation.step(None, 1.0)
except ResetNeeded:
    simulation.reset(range(4))
    print(simulation.step(None, 1.0).started.tolist(), flush=True)
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_a_long_step_ends_with_ctrl_c(threads: int) -> None:
    process = subprocess.Popen([sys.executable, "-c", LONG, str(threads)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(0.5)  # until it is in the kernel
    process.send_signal(signal.SIGINT)
    try:
        out, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    simulation = Simulation(load_scenario("default-4").reference, 4)
    simulation.reset(range(4))
    assert process.returncode == 0 and out == f"{simulation.step(None, 1.0).started.tolist()}\n"


@pytest.mark.parametrize("dispatch", ["sed", "wcmp", "p2c"])
def test_a_step_of_many_calls_is_the_same_as_one_of_one(dispatch: str) -> None:
    """The kernel returns after a stretch of work, so that signals are seen; what it finds does not change."""
    found = []
    for cost in (1, at.WORK_PER_CALL // 7, at.WORK_PER_CALL):
        simulation = Simulation(named_scenario("noisy-neighbour"), 3, dispatch=dispatch, record_flows=True)
        simulation._parameters.pi[:, at.P_COST] = cost
        simulation.reset([1, 2, 3])
        simulation.step(np.full((3, 1, 6), 2.0), 10.0)
        found.append([simulation.step(None, 20.0).stats, *(simulation.take_flows(r)["fct"] for r in range(3))])
    for other in found[1:]:
        assert [array.tobytes() for array in found[0]] == [array.tobytes() for array in other]


def test_an_interrupted_simulation_wants_a_reset() -> None:
    simulation = Simulation(named_scenario("uniform"))
    simulation.reset([1])

    def fails(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulation.run_parts(fails)
    with pytest.raises(ResetNeeded, match="interrupted"):
        simulation.step(None, 1.0)
