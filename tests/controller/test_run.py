"""``lbgym run`` in a process of its own: signals, kills, leases, exit codes, service managers."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lbgym.sharedmemory import SharedMemoryRegion
from tests.controller.running import INTERVAL, PATIENCE, command, data_plane, play_deaf, until
from tests.sharedmemory.nursery import Nursery

SAFE = [1.0, 2.0, 3.0, 4.0]
EQUAL = [1.0, 1.0, 1.0, 1.0]
#: Equal weights, so that they differ from the safe ones.
BASIC = ("--policy", "uniform", "--shm", "lb0", "--step-interval", INTERVAL, "--timeout", 0.3, "--rate-limit", "inf")


def test_sigterm_gives_the_weights_up_and_the_service_manager_is_told(nursery: Nursery) -> None:
    address = f"lbgym-test-{os.getpid()}-{time.monotonic_ns()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, data_plane(nursery) as strings:
        manager.bind("\0" + address)
        manager.settimeout(PATIENCE)
        with command(nursery, *BASIC, "--log-level", "debug", NOTIFY_SOCKET=f"@{address}") as run:
            assert run.wait_for("attached")["servers"] == 4
            assert manager.recv(4096).decode().splitlines()[0] == "READY=1"
            assert manager.recv(4096) == b"WATCHDOG=1"
            first, second = run.wait_for("step"), run.wait_for("step")
            assert second["sequence_id"] > first["sequence_id"] and second["weights"] == EQUAL
            until(lambda: strings.weights == EQUAL, "the policy's weights")
            # They are good for five seconds, but are not when it has ended.
            run.signal(signal.SIGTERM)
            assert run.end() == 0
            assert strings.weights == SAFE
            assert run.lines[-1]["event"] == "stopped" and run.lines[-1]["reason"] == "stopped"
            assert run.lines[-2]["event"] == "summary" and run.lines[-2]["steps"] >= 2
            told = [manager.recv(4096)]
            while told[-1] != b"STOPPING=1":
                told.append(manager.recv(4096))
            assert set(told) == {b"WATCHDOG=1", b"STOPPING=1"}
        with SharedMemoryRegion.attach("lb0", read_only=True) as region:
            assert not region.agent_alive


def test_after_a_kill_the_lease_ends_and_another_controller_takes_over(nursery: Nursery) -> None:
    lease = 0.5
    with (
        data_plane(nursery) as strings,
        command(nursery, *BASIC, "--lease", lease, "--log-level", "debug") as first,
    ):
        first.wait_for("step")
        with command(nursery, *BASIC) as second:
            assert second.end() == 2
            (line,) = second.lines
            assert re.search(rf"driven by another agent \(process {first.child.pid}\); stop it first", line["message"])
            assert line["level"] == "error"
        until(lambda: strings.weights == EQUAL, "the policy's weights")
        first.child.kill()
        killed = time.monotonic()
        until(lambda: strings.weights == SAFE, "the safe weights")
        # Without its option the lease would be one of five seconds.
        assert time.monotonic() - killed < 4.0
        with command(nursery, *BASIC, "--lease", lease, "--log-level", "debug") as third:
            third.wait_for("step")
            until(lambda: strings.weights == EQUAL, "the policy's weights")
            third.signal(signal.SIGINT)
            assert third.end() == 0 and strings.weights == SAFE


def test_a_controller_that_is_suspended_goes_on_and_says_what_it_missed(nursery: Nursery) -> None:
    with data_plane(nursery) as strings, command(nursery, *BASIC, "--lease", 0.35, "--log-level", "debug") as run:
        run.wait_for("step")
        run.signal(signal.SIGSTOP)
        time.sleep(10 * INTERVAL)
        assert strings.weights == SAFE
        run.signal(signal.SIGCONT)
        assert run.wait_for("missed")["missed"] >= 8
        run.wait_for("step")
        run.wait_for("step")
        until(lambda: strings.weights == EQUAL, "the policy's weights")
        run.signal(signal.SIGTERM)
        assert run.end() == 0
        (summary,) = [line for line in run.lines if line["event"] == "summary"]
        assert summary["missed"] >= 8 and summary["timeouts"] == 0


def test_silence_and_its_exit_code(nursery: Nursery) -> None:
    with data_plane(nursery) as strings, command(nursery, *BASIC, "--timeout", 0.1, "--max-timeouts", 3) as run:
        run.wait_for("attached")
        strings.tell(silence=60.0)
        assert run.wait_for("timeout")["level"] == "warning"
        assert run.end() == 3
        assert run.lines[-1]["reason"] == "silent"
        assert [line["event"] for line in run.lines].count("timeout") == 1
        assert strings.weights == SAFE


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("waiting_for", ["region", "observation"])
def test_a_signal_cuts_every_wait_short(nursery: Nursery, waiting_for: str, number: signal.Signals) -> None:
    with command(nursery, *BASIC, "--timeout", 600, "--log-level", "debug") as run:
        assert "no region 'lb0'" in run.wait_for("waiting")["message"]
        if waiting_for == "region":
            run.signal(number)
            assert run.end() == 0
            return
        with data_plane(nursery) as strings:
            run.wait_for("step")
            strings.tell(silence=600.0)
            time.sleep(2 * INTERVAL)
            until(lambda: strings.weights == EQUAL, "the policy's weights")
            run.signal(number)
            assert run.end() == 0
            assert strings.weights == SAFE


def test_a_second_signal_ends_it_at_once(nursery: Nursery) -> None:
    with data_plane(nursery), nursery.running(play_deaf, name="lb0") as deaf:
        assert deaf.hear() == "busy"
        deaf.signal(signal.SIGTERM)
        assert deaf.hear() == "busy"
        # One at the same time is the same request, as when a whole process group is signalled.
        time.sleep(1.1)
        deaf.signal(signal.SIGTERM)
        assert deaf.end() == 128 + signal.SIGTERM


def test_a_signal_that_comes_twice_at_once_gives_the_weights_up(nursery: Nursery) -> None:
    with data_plane(nursery) as strings, command(nursery, *BASIC) as run:
        run.wait_for("attached")
        for _ in range(2):
            run.signal(signal.SIGTERM)
        assert run.end() == 0
        assert strings.weights == SAFE


def test_the_emulator_is_driven(tmp_path: Path) -> None:
    """The two commands as users have them, and a configuration file under the options."""
    (tmp_path / "controller.toml").write_text(
        'policy = "littles-law"\nscenario = "heterogeneous"\nlog_format = "text"\nsteps = 100_000\n'
    )
    lbgym = [sys.executable, "-m", "lbgym"]
    arguments = ["--name", "lb0", "--scenario", "heterogeneous", "--speedup", "10", "--seed", "1"]
    emulator = subprocess.Popen([*lbgym, "dataplane", "emulate", *arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert emulator.stdout is not None and "8 servers" in emulator.stdout.readline()
        options = ["--shm", "lb0", "--config", str(tmp_path / "controller.toml"), "--steps", "20"]
        done = subprocess.run([*lbgym, "run", *options], capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0 and done.stdout == ""
        assert re.search(r'attached .*policy="littles-law".*driver="emulator".*clock_rate=10', done.stderr)
        assert re.search(r"summary .*steps=20 timeouts=0", done.stderr)
    finally:
        emulator.terminate()
        assert emulator.wait(PATIENCE) == 0
        assert emulator.stdout is not None
        emulator.stdout.close()


# Errors of the user, without a data plane


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What it says before it ends with code 2."""
    from lbgym.cli import main

    with pytest.raises(SystemExit) as end:
        main(["run", *map(str, arguments)])
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
    return captured.err


def test_errors_are_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "'policy' is missing: give --policy" in refused(capsys, "--shm", "lb0")
    assert "step_interval must be a number above 0" in refused(
        capsys, "-p", "uniform", "--shm", "lb0", "--step-interval", 0
    )
    assert "Did you mean 'latency'" in refused(capsys, "-p", "latncy", "--shm", "lb0")
    assert "no trained model at 'model.zip'" in refused(capsys, "-p", "model.zip", "--shm", "lb0")
    assert "no region 'lb0'" in refused(capsys, "-p", "uniform", "--shm", "lb0", "--attach-timeout", 0)
    path = tmp_path / "controller.toml"
    path.write_text("flor = 0.5")
    assert f"unknown key 'flor' in {path}. Did you mean 'floor'" in refused(capsys, "--config", path)
    assert json.loads(refused(capsys, "-p", "uniform", "--shm", "a/b"))["event"] == "error"
