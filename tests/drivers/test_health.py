"""Health checks and ground truth, against real servers that are killed for real."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep

import numpy as np
import pytest

from lbgym.drivers.config import GroundTruthAgent, HealthCheck, ServerConfig
from lbgym.drivers.ground_truth import GroundTruth
from lbgym.drivers.health import HealthChecks
from tests.drivers.proxies import free_ports
from tests.drivers.test_discovery import eventually

#: Serves the files of a folder; its standard output has the port.
WEB = """
import functools, http.server, sys
handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=sys.argv[1])
server = http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


@contextmanager
def web(folder: Path, port: int = 0) -> Iterator[tuple[subprocess.Popen[str], int]]:
    command = [sys.executable, "-c", WEB, str(folder), str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


def server(port: int, **health: object) -> ServerConfig:
    keys = {"interval": 0.02, "timeout": 5.0, **health}
    return ServerConfig(name="s", address="127.0.0.1", port=port, health=HealthCheck(**keys))  # type: ignore[arg-type]


@pytest.fixture
def health() -> Iterator[HealthChecks]:
    checks = HealthChecks()
    yield checks
    checks.close()
    checks.close()


@pytest.mark.parametrize("kind", ["tcp", "http"])
def test_a_server_that_is_killed_goes_down_and_comes_back(health: HealthChecks, kind: str, tmp_path: Path) -> None:
    # While nobody listens there, no other process is given the port.
    (port,) = free_ports(1)
    with web(tmp_path, port) as (process, _):
        health.watch([server(port, kind=kind)])
        assert set(health.healthy) == {"s"}
        eventually(lambda: health.healthy["s"] is True)
        process.send_signal(signal.SIGKILL)
        process.wait()
        eventually(lambda: health.healthy["s"] is False)
    with web(tmp_path, port):
        eventually(lambda: health.healthy["s"] is True)


def test_a_server_that_hangs_goes_down(health: HealthChecks, tmp_path: Path) -> None:
    with web(tmp_path) as (process, port):
        health.watch([server(port, kind="http", timeout=0.3)])
        eventually(lambda: health.healthy["s"] is True)
        process.send_signal(signal.SIGSTOP)
        # Connections are still accepted, by the kernel.
        eventually(lambda: health.healthy["s"] is False)
        process.send_signal(signal.SIGCONT)
        eventually(lambda: health.healthy["s"] is True)


def test_the_status_decides(health: HealthChecks, tmp_path: Path) -> None:
    with web(tmp_path) as (_, port):
        health.watch([server(port, kind="http", path="/health")])
        eventually(lambda: health.healthy["s"] is False)
        (tmp_path / "health").write_text("fine")
        eventually(lambda: health.healthy["s"] is True)


def test_rise_and_fall_count_checks_in_a_row() -> None:
    from threading import Lock

    from lbgym.drivers.health import _Judge

    judge = _Judge(server(1, rise=2, fall=3), Lock())
    seen = []
    # The first check decides alone; then three failures in a row, then two successes in a row.
    for passed in (True, False, False, True, False, False, False, True, False, True, True):
        judge._count(passed, "")
        seen.append(judge.healthy)
    assert seen == [True, True, True, True, True, True, False, False, False, False, True]


def test_what_is_known_survives_a_new_list(health: HealthChecks, tmp_path: Path) -> None:
    with web(tmp_path) as (_, port):
        first = server(port)
        health.watch([first])
        eventually(lambda: health.healthy["s"] is True)
        other = ServerConfig(name="t", address="127.0.0.1", port=port)
        health.watch([first, other])
        assert health.healthy == {"s": True}  # t has no check
        health.watch([server(port, kind="http")])
        # Another check begins anew; it may be answered by now.
        assert health.healthy["s"] in (None, True)


@pytest.fixture
def truth() -> Iterator[GroundTruth]:
    polls = GroundTruth()
    yield polls
    polls.close()


def answer(folder: Path, **values: object) -> None:
    part = folder / "part"
    part.write_text(json.dumps(values))
    part.rename(folder / "agent")


def agent_of(port: int) -> ServerConfig:
    agent = GroundTruthAgent(port=port, path="/agent", interval=0.02, timeout=5.0)
    return ServerConfig(name="s", address="127.0.0.1", ground_truth=agent)


def test_ground_truth_is_as_old_as_its_last_answer(truth: GroundTruth, tmp_path: Path) -> None:
    answer(tmp_path, cpu_usage=0.5, memory_usage=0.25, busy_workers=3)
    with web(tmp_path) as (process, port):
        truth.watch([agent_of(port)])
        eventually(lambda: np.isfinite(truth.values(["s"])[1][0]))
        values, age = truth.values(["s", "nobody"])
        np.testing.assert_array_equal(values[0], np.float32([0.5, 0.25, 3.0]))
        assert np.isnan(values[1]).all() and age[1] == np.inf
        process.kill()
        process.wait()
        # The last answer goes on growing old; nothing takes its place.
        begun = monotonic()
        sleep(0.5)
        values, age = truth.values(["s"])
        assert age[0] >= monotonic() - begun - 0.1
        np.testing.assert_array_equal(values[0], np.float32([0.5, 0.25, 3.0]))


def test_the_same_measurement_again_is_not_younger(truth: GroundTruth, tmp_path: Path) -> None:
    answer(tmp_path, cpu_usage=0.5, memory_usage=0.25, busy_workers=3, time=1000.0)
    with web(tmp_path) as (_, port):
        truth.watch([agent_of(port)])
        eventually(lambda: np.isfinite(truth.values(["s"])[1][0]))
        sleep(0.5)
        before = truth.values(["s"])[1][0]
        assert before >= 0.5
        answer(tmp_path, cpu_usage=0.75, memory_usage=0.25, busy_workers=3, time=1001.0)
        eventually(lambda: truth.values(["s"])[0][0, 0] == 0.75)
        assert truth.values(["s"])[1][0] < before + 20.0


def test_what_an_agent_cannot_measure_is_not_known(truth: GroundTruth, tmp_path: Path) -> None:
    answer(tmp_path, cpu_usage=0.5, memory_usage=None)
    with web(tmp_path) as (_, port):
        truth.watch([agent_of(port)])
        eventually(lambda: np.isfinite(truth.values(["s"])[1][0]))
        values = truth.values(["s"])[0][0]
        assert values[0] == 0.5 and np.isnan(values[1:]).all()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a JSON object"),
        ('{"cpu_usage": 50}', "cpu_usage of the agent must be a finite number from 0 to 1, got 50"),
        ('{"cpu_usage": "0.5"}', "cpu_usage of the agent must be"),
        ('{"busy_workers": -1}', "busy_workers of the agent must be"),
        ('{"busy_workers": NaN}', "busy_workers of the agent must be"),
        ('{"busy_workers": Infinity}', "busy_workers of the agent must be"),
        ('{"busy_workers": 1%s}' % ("0" * 400), "busy_workers of the agent must be"),
        ('{"time": "now"}', "time of the agent must be a finite number of seconds, got 'now'"),
    ],
)
def test_nonsense_of_an_agent_is_no_ground_truth(
    truth: GroundTruth, tmp_path: Path, body: str, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "agent").write_text(body)
    with web(tmp_path) as (_, port):
        truth.watch([agent_of(port)])
        eventually(lambda: "no ground truth of server 's'" in caplog.text)
        assert message in caplog.text
        assert truth.values(["s"])[1][0] == np.inf
        # It is asked again and again.
        answer(tmp_path, busy_workers=3)
        eventually(lambda: truth.values(["s"])[0][0, 2] == 3.0)
