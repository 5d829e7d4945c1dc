"""The rollback rule: how seldom it is wrong, how soon it is right, and what ``lbgym run`` makes of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest

from lbgym.controller import Controller, ControllerConfig
from lbgym.controller.rollback import CYCLE, Alarm, RollbackGuard
from lbgym.errors import InvalidOptionError, PolicyError
from lbgym.scenarios import Event, Exponential, Lognormal, ModulatedPoisson, Scenario, Server, Workload, to_toml
from lbgym.sharedmemory import SharedMemoryRegion
from lbgym.simulator import Simulation
from tests.controller.running import PATIENCE, Fickle, controlling, data_plane, until
from tests.drivers.emulated import emulator
from tests.sharedmemory.nursery import Nursery

STEP, SLOT = 1.0, 6.0
NO_STATS = np.zeros((2, 11), np.float32)


def guarded(
    scenario: Scenario, safe: np.ndarray, policy: np.ndarray, replicas: int, seconds: float, **keys: Any
) -> tuple[list[Alarm | None], list[RollbackGuard]]:
    """Simulated clusters under a guard each: its first alarm."""
    guards = [RollbackGuard(**{"slot": SLOT, "metric": "fct_mean", "seed": r} | keys) for r in range(replicas)]
    simulation = Simulation(scenario, replicas)
    before = simulation.reset(range(replicas))
    alarms: list[Alarm | None] = [None] * replicas
    for _ in range(round(seconds / STEP)):
        now = before.timestamp
        slots = [guard.safe_now(float(now[r])) for r, guard in enumerate(guards)]
        weights = np.stack([safe if slot else policy for slot in slots])[:, None, :]
        after = simulation.step(weights, STEP)
        assert after.interval is not None
        lost = (after.rejected + after.failed - before.rejected - before.failed).sum(axis=-1)
        finished = (after.completed - before.completed).astype(np.float64)
        for r, guard in enumerate(guards):
            if alarms[r] is None:
                alarms[r] = guard.observe(
                    float(after.timestamp[r]), slots[r], int(finished[r].sum()), int(lost[r]),
                    float(after.interval.fct_mean[r]), after.stats[r, 0], finished[r],
                )  # fmt: skip
        before = after
    return alarms, guards


#: Two servers that flows are sent to in proportion to the weights, under bursts.
BURSTS = Scenario(
    servers=(Server(), Server()),
    dispatch="wcmp",
    workload=Workload(
        load=0.6,
        demand=Lognormal(mean=0.05, cv=1.5),
        arrivals=ModulatedPoisson(levels=(0.5, 1.5), sojourns=(20.0, 20.0)),
    ),
)


def test_a_policy_that_is_no_worse_is_left_alone() -> None:
    # The bound 1 is the hardest: the policy is the safe weights, and just as good. One in five may be wrong.
    even = np.ones(2)
    alarms, guards = guarded(BURSTS, even, even, 48, 32 * CYCLE * SLOT, bound=1.0, metric="fct_p90", alarm=0.2)
    assert min(guard.cycles for guard, alarm in zip(guards, alarms, strict=True) if alarm is None) >= 28
    # 48 chances of at most 0.2: 17 or more are less likely than 1 in 100; half of the chance is that of failures.
    assert sum(alarm is not None for alarm in alarms) <= 16


def test_a_worse_policy_is_found_and_a_slightly_worse_one_is_allowed() -> None:
    unlike = Scenario(
        servers=(Server(), Server(speed=0.25)),
        dispatch="wcmp",
        workload=Workload(load=0.25, demand=Exponential(mean=0.05)),
    )
    safe, bad = np.array([4.0, 1.0]), np.array([1.0, 1.5])
    alarms, _ = guarded(unlike, safe, bad, 16, 40 * CYCLE * 12.0, bound=1.2, slot=12.0)
    found = [alarm for alarm in alarms if alarm is not None]
    assert len(found) >= 14
    for alarm in found:
        assert alarm.metric == "fct_mean" and alarm.policy > 1.2 * alarm.safe and alarm.evidence >= 200.0
    assert "under the safe weights" in str(found[0])
    alarms, _ = guarded(unlike, safe, np.array([4.0, 1.1]), 16, 40 * CYCLE * SLOT, bound=2.0)
    assert alarms == [None] * 16


def test_failures_are_found_within_seconds() -> None:
    # A server that breaks and is still sent half of the flows: its few workers are soon full.
    broken = Scenario(
        servers=(Server(cores=4), Server(workers=2, backlog=2)),
        dispatch="wcmp",
        workload=Workload(rate=20.0, demand=Exponential(mean=0.02)),
        events=(Event(time=100.0, kind="speed", server=1, value=0.02),),
        reject_timeout=5.0,
    )
    alarms, _ = guarded(broken, np.array([9.0, 1.0]), np.ones(2), 8, 160.0, bound=1e6)
    assert all(alarm is not None and alarm.metric == "failures" for alarm in alarms)
    assert max(alarm.seconds for alarm in alarms if alarm is not None) < 100.0 + 3 * SLOT
    assert "failed under the policy" in str(alarms[0])


def test_failures_under_both_are_no_reason() -> None:
    # One in ten flows fails whatever the weights are; a chance of 0.2 of an alarm at most, by either test.
    generator = np.random.default_rng(3)
    alarms = 0
    for seed in range(24):
        guard, alarm = RollbackGuard(1e6, "fct_mean", 0.02, 5.0, 0.2, seed=seed), None
        for k in range(1000):
            time = 0.25 * k
            safe = guard.safe_now(time)
            lost = int(generator.binomial(40, 0.1))
            alarm = alarm or guard.observe(time + 0.25, safe, 40 - lost, lost, 0.1, NO_STATS)
        alarms += alarm is not None
    assert alarms <= 9


@pytest.mark.parametrize("seed", range(3))
def test_each_cycle_has_one_safe_slot_and_they_take_every_place(seed: int) -> None:
    guard = RollbackGuard(1.2, "fct_mean", slot=4.0, seed=seed)
    safe = []
    for k in range(4 * CYCLE * 40 + 5):
        safe.append(guard.safe_now(float(k)))
        guard.observe(float(k + 1), safe[-1], 50, 0, 0.1, NO_STATS)
    # One slot at first, after the step that only began; then cycle after cycle.
    assert all(safe[:5])
    cycles = np.array(safe[5 : 5 + 4 * CYCLE * 40]).reshape(-1, CYCLE, 4)
    assert (cycles.all(axis=2).sum(axis=1) == 1).all() and (cycles.any(axis=2).sum(axis=1) == 1).all()
    places = cycles.any(axis=2).argmax(axis=1)
    assert set(places.tolist()) == set(range(CYCLE))
    assert guard.cycles == 40 and guard.wealth < 1.0


def test_slots_with_few_flows_do_not_count() -> None:
    guard = RollbackGuard(1.2, "fct_mean", slot=4.0, seed=0)
    for k in range(200):
        guard.observe(float(k + 1), guard.safe_now(float(k)), 5, 0, 0.1, NO_STATS)
    assert guard.cycles == 0


def test_slots_are_longer_than_steps() -> None:
    with pytest.raises(InvalidOptionError, match=r"rollback_slot must be at least 4 steps of 0\.25 s, got 0\.5"):
        Controller(ControllerConfig(policy="uniform", shm="lb0", rollback=1.2, rollback_slot=0.5))
    # A shadow has nothing to roll back, whatever the file says.
    Controller(ControllerConfig(policy="uniform", shm="lb0", rollback=1.2, rollback_slot=0.5, shadow=True))


@pytest.mark.parametrize(
    ("metric", "feature", "measured"),
    [("fct_p90", "fct_p90_decay", ["n_flow_on", "fct_mean"]), ("fct_mean", "fct_mean", ["n_flow_on", "fct_p90_decay"])],
)
def test_it_is_refused_where_no_fct_is_measured(
    nursery: Nursery, metric: str, feature: str, measured: list[str]
) -> None:
    message = f"the rollback rule by '{metric}' needs {feature}, which the data plane does not measure; .* n_flow_on"
    rule = {"rollback": 1.2, "rollback_metric": metric}
    with (
        data_plane(nursery, features=measured),
        controlling(Fickle([]), **rule) as running,
        pytest.raises(PolicyError, match=message),
    ):
        running.join()
    with controlling(Fickle([4.0, 3.0, 2.0, 1.0]), lease=60.0, **rule) as running:
        with data_plane(nursery, features=[feature]):
            running.steps(2)
        # With more servers it is refused as well, and left to its safe weights at once.
        with data_plane(nursery, features=measured, servers=5) as less:
            with pytest.raises(PolicyError, match=message):
                running.join()
            until(lambda: less.weights == [1.0, 2.0, 3.0, 4.0, 5.0])


def test_a_server_breaks_and_the_safe_weights_are_in_force(shm_dir: Path, tmp_path: Path) -> None:
    """Real processes: the emulator, a policy that keeps sending flows to the broken server, and the rule."""
    broken = Scenario(
        name="broken",
        servers=(Server(cores=4), Server(workers=2, backlog=2)),
        dispatch="wcmp",
        workload=Workload(rate=40.0, demand=Exponential(mean=0.02)),
        events=(Event(time=60.0, kind="speed", server=1, value=0.02),),
        reject_timeout=5.0,
    )
    (tmp_path / "broken.toml").write_text(to_toml(broken))
    with emulator("--name", "lb0", "--scenario", tmp_path / "broken.toml", "--speedup", 20, "--safe-weights", "9,1"):
        options = [
            "--policy", "uniform", "--shm", "lb0", "--rollback", 3, "--rollback-slot", 5, "--step-interval", 0.5,
            "--rate-limit", "inf", "--steps", 2000, "--metrics-port", 0,
        ]  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, "-m", "lbgym", "run", *map(str, options)], stderr=subprocess.PIPE, text=True
        )
        try:
            assert process.stderr is not None
            url, events = "", {}
            for line in process.stderr:
                entry = json.loads(line)
                events[entry["event"]] = entry
                url = entry.get("url", url)
                if entry["event"] == "rollback":
                    break
            assert "rollback" in events, events
            # The metrics stay for a while, and say so.
            with urlopen(url, timeout=PATIENCE) as page:
                assert "lbgym_rolled_back 1.0" in page.read().decode()
            with SharedMemoryRegion.attach("lb0", read_only=True) as region:
                until(lambda: region.read_observation()["applied_sequence_id"] is None)
            process.terminate()
            assert process.wait(PATIENCE) == 4
        finally:
            process.kill()
            process.communicate()
    event = events["rollback"]
    assert event["level"] == "error" and event["metric"] == "failures" and event["policy"] > event["safe"]
    assert "the data plane's safe weights are in force" in event["message"]
