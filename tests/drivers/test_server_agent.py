"""The agent on a server: what it measures, and a driver's poll of it."""

from __future__ import annotations

import json
import re
import signal
import socketserver
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from lbgym.drivers import DriverError
from lbgym.drivers.config import GroundTruthAgent, ServerConfig
from lbgym.drivers.ground_truth import GroundTruth
from lbgym.drivers.server_agent import ServerAgent, busy_workers
from lbgym.errors import InvalidOptionError
from tests.drivers.test_discovery import eventually
from tests.drivers.test_health import web

psutil = pytest.importorskip("psutil")

APACHE = b"ServerVersion: Apache/2.4\nTotal Accesses: 7\nBusyWorkers: 5\nIdleWorkers: 27\nScoreboard: W__\n"
NGINX = (
    b"Active connections: 9 \nserver accepts handled requests\n 9 9 31 \nReading: 0 Writing: 3 Waiting: 6 \n"
)  # fmt: skip


def asked(agent: ServerAgent) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{agent.port}/", timeout=5) as answer:
        return dict(json.load(answer))


def test_busy_workers_of_status_pages() -> None:
    assert busy_workers(APACHE) == 5
    assert busy_workers(NGINX) == 3
    for page in (b"", b"<html>Apache Status</html>", b"BusyWorkers: many"):
        with pytest.raises(DriverError, match=r"neither Apache's .*\?auto"):
            busy_workers(page)


def test_a_driver_collects_what_the_agent_measures(tmp_path: Path) -> None:
    page = tmp_path / "status"
    page.write_bytes(APACHE)
    with (
        web(tmp_path) as (process, port),
        ServerAgent("127.0.0.1", 0, f"http://127.0.0.1:{port}/status", 0.05) as agent,
    ):
        truth = GroundTruth()
        try:
            poll = GroundTruthAgent(port=agent.port, interval=0.05, timeout=5.0)
            truth.watch([ServerConfig(name="s", address="127.0.0.1", ground_truth=poll)])
            eventually(lambda: np.isfinite(truth.values(["s"])[0]).all())
            values, age = truth.values(["s"])
            assert 0.0 <= values[0, 0] <= 1.0 and age[0] < 60.0
            assert abs(values[0, 1] - psutil.virtual_memory().percent / 100) < 0.1
            assert values[0, 2] == 5.0
            page.write_bytes(NGINX)
            eventually(lambda: truth.values(["s"])[0][0, 2] == 3.0)
            # What is not known any more is not made up.
            process.kill()
            eventually(lambda: np.isnan(truth.values(["s"])[0][0, 2]))
        finally:
            truth.close()


@contextmanager
def speaking(words: list[bytes]) -> Iterator[int]:
    """Answers whatever it is asked by ``words[0]``; yields its port."""

    class Speaker(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.rfile.readline()
            self.wfile.write(words[0])

    with socketserver.TCPServer(("127.0.0.1", 0), Speaker) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    "odd",
    [
        b"garbage\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: http://localhost:abc/\r\n\r\n",
    ],
)
def test_an_odd_status_page_is_none_and_is_asked_again(odd: bytes, caplog: pytest.LogCaptureFixture) -> None:
    words = [odd]
    with speaking(words) as port, ServerAgent("127.0.0.1", 0, f"http://127.0.0.1:{port}/", 0.05) as agent:
        first = asked(agent)
        assert first["busy_workers"] is None and "no busy workers from" in caplog.text
        eventually(lambda: asked(agent)["time"] > first["time"])
        words[0] = b"HTTP/1.0 200 OK\r\n\r\n" + APACHE
        eventually(lambda: asked(agent)["busy_workers"] == 5)


@pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="this machine has no IPv6")
def test_it_answers_by_ipv6() -> None:
    with ServerAgent("::1", 0) as agent:
        assert agent.url == f"http://[::1]:{agent.port}/"
        with urllib.request.urlopen(agent.url, timeout=5) as answer:
            assert json.load(answer)["time"] > 0.0


def test_a_busy_machine_shows() -> None:
    with ServerAgent("127.0.0.1", 0, None, 0.1) as agent:
        assert asked(agent)["busy_workers"] is None
        begun = time.process_time()
        while time.process_time() - begun < 0.5:
            pass
        assert (asked(agent)["cpu_usage"] or 0.0) >= 0.5 / psutil.cpu_count() - 0.2


def test_bad_options() -> None:
    for options, message in (
        ({"port": 70_000}, "port must be a whole number from 0 to 65535"),
        ({"host": "ä..x"}, "host must be an IP address or a host name, .* got 'ä..x'"),
        ({"status": "http://a..b/"}, "the host of status must be an IP address or a host name, .* got 'a..b'"),
        ({"interval": 0.0}, "interval must be a finite number"),
        ({"status": "server-status"}, "status must be the http URL"),
        ({"status": "http:///server-status"}, "status must be the http URL"),
        ({"status": "http://localhost:abc/"}, "status must be the http URL .*, got 'http://localhost:abc/'"),
        ({"status": "http://a b/"}, "status must be the http URL .*, got 'http://a b/'"),
        ({"status": "http://[::1/"}, "status must be the http URL"),
        ({"status": "http://me:secret@localhost/"}, "status must be the http URL"),
    ):
        with pytest.raises(InvalidOptionError, match=message):
            ServerAgent(**{"host": "127.0.0.1", "port": 0, **options})  # type: ignore[arg-type]
    with ServerAgent("127.0.0.1", 0) as agent, pytest.raises(DriverError, match=f"cannot listen on .* {agent.port}"):
        ServerAgent("127.0.0.1", agent.port)


def test_the_command_answers_and_ends() -> None:
    command = [sys.executable, "-m", "lbgym", "server-agent", "--host", "127.0.0.1", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        found = re.search(r"http://127.0.0.1:\d+/", process.stdout.readline())
        assert found is not None
        with urllib.request.urlopen(found[0], timeout=5) as answer:
            assert set(json.load(answer)) == {"cpu_usage", "memory_usage", "busy_workers", "time"}
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
