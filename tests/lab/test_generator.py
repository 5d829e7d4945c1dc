"""The load generator against a server in this process, without root."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from lbgym.lab.generator import (
    COMPLETED,
    FAILED,
    OPEN,
    REASONS,
    REJECTED,
    Generator,
    Outcome,
    read_outcome,
    write_job,
)

#: What the server does with each request, by its path.
ANSWERS = {
    "ok": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-Server: a server\r\n\r\nhello",
    "unbounded": b"HTTP/1.1 206 Partial Content\r\nX-Server: b\r\n\r\n" + bytes(200_000),
    "busy": b"HTTP/1.1 503 Service Unavailable\r\nX-Server: c\r\n\r\n",
    "missing": b"HTTP/1.1 404 Not Found\r\n\r\n",
    "short": b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhello",
    "nothing": b"",
    "nonsense": b"SSH-2.0-OpenSSH\r\n\r\n",
}


class Server:
    """Answers by path; ``slow`` after 0.3 s, ``reset`` by a reset, ``never`` not at all."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.address: tuple[str, int] = self._listener.getsockname()
        self.times: list[float] = []
        self._held: list[socket.socket] = []
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.times.append(time.monotonic())
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        what = connection.recv(4096).split()[1].decode().strip("/")
        if what == "never":
            self._held.append(connection)
            return
        with connection:
            if what == "reset":
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
                return
            if what == "slow":
                time.sleep(0.3)
            connection.sendall(ANSWERS.get(what, ANSWERS["ok"]))

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()
        for connection in self._held:
            connection.close()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


def request(path: str) -> bytes:
    return f"GET /{path} HTTP/1.0\r\n\r\n".encode()


def generate(
    address: tuple[str, int],
    arrivals: list[float],
    path: str | Callable[[int], str],
    *,
    late: float = 0.0,
    duration: float = 0.0,
    counted: int | None = None,
    timeout: float = 20.0,
    limit: float = 60.0,
) -> Outcome:
    made = Generator(
        address,
        np.array(arrivals),
        lambda i: request(path if isinstance(path, str) else path(i)),
        counted=len(arrivals) if counted is None else counted,
        duration=duration,
        timeout=timeout,
    )
    return made.run(time.monotonic() - late, limit)


def test_flows_begin_at_their_times_whatever_became_of_those_before(server: Server) -> None:
    arrivals = np.linspace(0.0, 0.2, 41)
    start = time.monotonic()
    outcome = generate(server.address, arrivals.tolist(), "slow")
    assert (outcome.status == COMPLETED).all() and outcome.begun == 41
    assert set(outcome.server) == {"a server"}
    # None before its time, all before the first answer: the load is open.
    assert (np.array(server.times) >= start + arrivals).all()
    assert server.times[-1] - start < 0.2 + outcome.fct.max() and (outcome.lag >= 0.0).all()
    assert (outcome.fct >= 0.3).all()


def test_fct_counts_from_the_scheduled_time(server: Server) -> None:
    # Time 0 is long past, as for a generator that could not keep up.
    outcome = generate(server.address, [0.0, 0.5, 2.1], "ok", late=2.0)
    assert (outcome.status == COMPLETED).all()
    assert outcome.fct[0] >= outcome.lag[0] >= 2.0 and outcome.fct[1] >= outcome.lag[1] >= 1.5
    assert outcome.fct[2] < 1.5  # it was not yet due


@pytest.mark.parametrize(
    ("path", "status", "reason"),
    [
        ("ok", COMPLETED, ""),
        ("unbounded", COMPLETED, ""),
        ("busy", REJECTED, "status of the answer"),
        ("missing", FAILED, "status of the answer"),
        ("short", FAILED, "answer cut short"),
        ("nothing", FAILED, "answer cut short"),
        ("nonsense", FAILED, "answer cut short"),
        ("reset", FAILED, "reset"),
    ],
)
def test_ends_of_flows(server: Server, path: str, status: int, reason: str) -> None:
    outcome = generate(server.address, [0.0, 0.01], path)
    assert outcome.status.tolist() == [status, status]
    assert [REASONS[r] for r in outcome.reason] == [reason, reason]
    assert (outcome.fct > 0.0).all()


def test_flows_without_an_answer_are_given_up_and_others_are_not(server: Server) -> None:
    outcome = generate(server.address, [0.0, 0.05, 0.1], lambda i: ("never", "ok", "never")[i], timeout=0.4)
    assert outcome.status.tolist() == [FAILED, COMPLETED, FAILED]
    assert REASONS[outcome.reason[0]] == "no answer in time" and (outcome.fct[[0, 2]] >= 0.4).all()


def test_refused_connections_are_counted(server: Server) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = closed.getsockname()
    outcome = generate(address, [0.0, 0.0], "ok")
    assert outcome.status.tolist() == [REJECTED, REJECTED]
    assert [REASONS[r] for r in outcome.reason] == ["refused", "refused"]


def test_load_goes_on_until_the_last_counted_flow_has_ended(server: Server) -> None:
    # The first flow takes 0.3 s; those that are due meanwhile begin, those after it do not.
    arrivals = [0.0, 0.02, 0.04, 30.0]
    outcome = generate(server.address, arrivals, lambda i: "slow" if i == 0 else "ok", counted=1, duration=0.01)
    assert outcome.begun == 3 and outcome.status[:3].tolist() == [COMPLETED] * 3
    assert outcome.status[3] == OPEN and np.isnan(outcome.lag[3])


def test_the_limit_leaves_flows_open_with_their_age(server: Server) -> None:
    outcome = generate(server.address, [0.0, 0.2], "never", limit=0.4)
    assert outcome.status.tolist() == [OPEN, OPEN]
    assert outcome.fct[0] >= 0.4 and 0.2 <= outcome.fct[1] < outcome.fct[0]


def test_a_process_of_its_own(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "load.json"
    arrivals = np.array([0.0, 0.1, 0.2])
    write_job(
        file, server.address, arrivals, [request("ok")] * 3, counted=3, duration=0.0, timeout=20.0, limit=60.0
    )  # fmt: skip
    assert json.loads(file.read_text())["counted"] == 3
    command = [sys.executable, "-m", "lbgym.lab.generator", str(file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        start = time.monotonic() + 0.1
        process.stdin.write(f"{start!r}\n")
        process.stdin.close()
        assert process.wait() == 0
    outcome = read_outcome(file)
    assert outcome.status.tolist() == [COMPLETED] * 3 and outcome.server == ["a server"] * 3
    assert (np.array(server.times) >= start + arrivals).all()


def test_a_process_whose_parent_is_gone_ends(tmp_path: Path) -> None:
    file = tmp_path / "load.json"
    write_job(file, ("127.0.0.1", 1), np.zeros(1), [b"-"], counted=1, duration=0.0, timeout=1.0, limit=1.0)
    done = subprocess.run(
        [sys.executable, "-m", "lbgym.lab.generator", str(file)], stdin=subprocess.DEVNULL, capture_output=True
    )
    assert done.returncode == 1 and not file.with_suffix(".npz").exists()
