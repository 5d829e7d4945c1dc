"""The check suite: good drivers pass it, and each defect fails the check that is about it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest

from lbgym.drivers import check
from lbgym.drivers.check import CHECKS, check_driver
from lbgym.errors import InvalidOptionError
from lbgym.sharedmemory import SharedMemoryRegion, seqlock
from tests.drivers.broken import DEFECTS, publish
from tests.drivers.emulated import emulator
from tests.sharedmemory.nursery import Nursery


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    seqlock.warm_up()


@pytest.mark.parametrize("defect", DEFECTS)
def test_each_defect_fails_its_check(defect: str, nursery: Nursery, shm_dir: Path) -> None:
    with nursery.running(publish, name="lb", defect=defect) as child:
        if defect == "has no heartbeat":
            # On a machine that is up for a moment, the beginning of its clock is not long ago.
            time.sleep(max(0.0, 1.5 - time.monotonic()))
        verdicts = check_driver("lb", timeout=3.0, end=True)
        failed = [verdict.check for verdict in verdicts if verdict.passed is False]
        if defect in ("dies of a NaN", "hears no agent"):
            # Whatever is to be seen of it afterwards fails, too.
            failed = failed[:1]
        assert failed == ([DEFECTS[defect]] if DEFECTS[defect] else []), "\n".join(map(str, verdicts))
        if not failed:
            assert [verdict.check for verdict in verdicts] == list(CHECKS)
            assert all(verdict.passed for verdict in verdicts)
            assert child.end() == 0 and not any(shm_dir.iterdir())


@pytest.mark.parametrize("period", [0.5, 0.8, 0.93, 1.0, 1.07, 1.3, 1.5, 2.4])
def test_late_observations_do_not_hide_the_interval(period: float) -> None:
    rng, count = np.random.default_rng(7), 24
    for _ in range(100):
        # Of a driver that was held up twice, and leaves out what would be later than the next.
        lateness = 0.03 * rng.random(count)
        lateness[rng.choice(count, 2, replace=False)] = 5.0 * rng.random(2)
        due, times = 0.0, []
        for late in lateness:
            due += period
            times.append(due + late)
            due += late // period * period
        best, fit, fit_of_interval = check._best_period(np.array(times) - times[0])
        if period == 1.0:
            assert fit < fit_of_interval + 0.2 or abs(best - 1.0) <= 0.05
        else:
            assert fit > max(0.7, fit_of_interval + 0.2) and abs(best - 1.0) > 0.05


def test_a_long_look_finds_the_period_as_well() -> None:
    """One that is between two that are tried, too."""
    best, fit, fit_of_interval = check._best_period(1.0705 * np.arange(20_000))
    assert abs(best - 1.0705) < 2e-3 and fit > 0.95 > 0.7 > fit_of_interval
    assert check._best_period(np.arange(20_000) + 0.0)[2] > 0.999


def test_every_check_can_fail() -> None:
    assert {"region", *DEFECTS.values()} - {""} == set(CHECKS)


@pytest.mark.parametrize(("scenario", "rule"), [("heterogeneous", "marginal"), ("marllb-moderate", "wcmp")])
def test_the_emulator_passes(scenario: str, rule: str, shm_dir: Path) -> None:
    with emulator("--name", "lb", "--scenario", scenario, "--dispatch", rule) as process:
        verdicts = check_driver("lb" if scenario == "heterogeneous" else "lb_0", end=True)
        assert all(verdict.passed for verdict in verdicts), "\n".join(map(str, verdicts))
        by_index = next(verdict.detail for verdict in verdicts if verdict.check == "index")
        assert by_index.startswith("none of" if rule == "marginal" else "none: the data plane takes weights only")
        assert not by_index.startswith("none of 0 flows")
        assert process.wait(20) == 0
        assert not any(shm_dir.iterdir())


def test_the_command_prints_a_line_per_check(
    nursery: Nursery, capsys: pytest.CaptureFixture[str], shm_dir: Path
) -> None:
    with nursery.running(publish, name="lb", defect="shows inactive servers"):
        SharedMemoryRegion.attach("lb", timeout=20.0, live=True).close()
        assert check.main(["lb", "--only-look"]) == 1
        out = capsys.readouterr().out.splitlines()
        assert len(out) == len(CHECKS)
        assert [line.split()[0] for line in out if " inactive " in line[:20]] == ["FAILED"]
        assert sum(line.startswith("skipped") for line in out) == 5
    # A region whose driver was killed is none to check.
    assert check.main(["lb", "--timeout", "0.1"]) == 1
    assert "is gone" in capsys.readouterr().out
    with pytest.raises(SystemExit) as raised:
        check.main(["lb", "--observations", "1"])
    assert raised.value.code == 2


def test_a_region_that_is_driven_is_only_looked_at(nursery: Nursery) -> None:
    with (
        nursery.running(publish, name="lb", defect="none"),
        SharedMemoryRegion.attach("lb", timeout=20.0, live=True) as agent,
    ):
        agent.lock_agent()
        verdicts = {verdict.check: verdict for verdict in check_driver("lb")}
        assert verdicts["action"].passed is None
        assert f"driven by another agent (process {os.getpid()})" in verdicts["action"].detail
        assert verdicts["flows"].passed


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(InvalidOptionError, match="observations must be a whole number from 8"):
        check_driver("lb", observations=2)
