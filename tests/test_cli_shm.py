"""``lbgym shm`` on regions of producers that are processes of their own."""

from __future__ import annotations

import codecs
import fcntl
import hashlib
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lbgym.features import FEATURE_NAMES, GROUND_TRUTH_NAMES
from lbgym.monitor import server_labels
from lbgym.sharedmemory import Publication, ServerState, SharedMemoryRegion, abi
from tests.drivers.emulated import emulator, following
from tests.privileges import needs_others
from tests.producers import Producer
from tests.sharedmemory.conftest import shm_dir
from tests.test_cli import in_process

__all__ = ["shm_dir"]

Capture = pytest.CaptureFixture[str]


def shm(capsys: Capture, *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    return in_process(capsys, "shm", *arguments)


def refused(capsys: Capture, *arguments: object) -> str:
    """The one line of a command that is refused."""
    code, out, err = shm(capsys, *arguments)
    assert (code, out) == (2, "") and err.startswith("lbgym: error: ") and len(err.splitlines()) == 1, err
    return err


def listed(capsys: Capture, *arguments: object) -> dict[str, dict[str, Any]]:
    code, out, _ = shm(capsys, "ls", "--json", *arguments)
    assert code == 0
    return {row["name"]: row for row in json.loads(out)}


def damaged(folder: Path, name: str, of: str, field: str, value: int) -> None:
    """A copy of a region with another value in its header."""
    data = bytearray((folder / of).read_bytes())
    dtype = abi.HEADER.dtype[field]
    offset = abi.HEADER.offset(field)
    data[offset : offset + dtype.itemsize] = np.array(value, dtype).tobytes()
    (folder / name).write_bytes(data)


@contextmanager
def without_privileges() -> Iterator[None]:
    """As another user than root, if this is root."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65_534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")


# ls


def test_ls_of_every_kind_of_region(capsys: Capture, shm_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = shm(capsys, "ls")
    assert (code, out) == (0, f"no regions in {shm_dir}\n")
    assert listed(capsys) == {}
    with Producer("alive", servers=5) as producer, Producer("dead") as other:
        producer.publish(7)
        other.publish()
        other.kill()
        agent = SharedMemoryRegion.attach("alive")
        agent.write_action(sequence_id=0, weights=np.ones(5))
        SharedMemoryRegion.create("closed", num_servers=2, driver="xdp").close()
        damaged(shm_dir, "later", "dead", "version_major", 2)
        damaged(shm_dir, "newer", "dead", "version_minor", 7)
        damaged(shm_dir, "corrupt", "dead", "capacity", 0)
        (shm_dir / "short").write_bytes((shm_dir / "dead").read_bytes()[:5000])
        (shm_dir / "foreign").write_bytes(b"something else" * 100)
        (shm_dir / "bad name").write_bytes((shm_dir / "dead").read_bytes())
        (shm_dir / "folder").mkdir()
        (shm_dir / "link").symlink_to("alive")
        rows = listed(capsys)
        assert set(rows) == {"alive", "dead", "closed", "later", "newer", "corrupt", "short"}
        alive = rows["alive"]
        assert {key: alive[key] for key in ("driver", "active", "servers", "capacity", "observations", "version")} == {
            "driver": "test", "active": 5, "servers": 5, "capacity": 64, "observations": 7, "version": "1.1",
        }  # fmt: skip
        assert (alive["producer"], alive["agent"], alive["problem"]) == ("alive", "alive", None)
        assert 0.0 <= alive["age"] < 60.0 and alive["size"] == agent.layout.total_size
        assert (rows["dead"]["producer"], rows["dead"]["agent"]) == ("dead", "none")
        assert (rows["closed"]["producer"], rows["closed"]["observations"], rows["closed"]["age"]) == (
            "closed",
            0,
            None,
        )
        assert rows["newer"]["version"] == "1.7" and rows["newer"]["observations"] == 1
        assert "version 2.1 of the binary interface" in rows["later"]["problem"]
        assert "capacity is 0" in rows["corrupt"]["problem"] and "the file has 5,000" in rows["short"]["problem"]
        assert "it begins with b'somethin'" in listed(capsys, "--all")["foreign"]["problem"]
        agent.close()
        assert listed(capsys)["alive"]["agent"] == "dead"
        for columns in (120, 60):
            monkeypatch.setenv("COLUMNS", str(columns))
            code, out, _ = shm(capsys, "ls")
            assert code == 0
            head, *body = out.splitlines()
            lines = {line.split()[0]: line for line in body if not line.startswith(" ")}
            assert list(lines) == sorted(rows) and len(body) == 7
            assert len(head) <= columns and len(lines["alive"]) <= columns
            assert "version 2.1 of the binary interface" in lines["later"]
            words = dict(zip(head.split(), re.sub(r" (m?s|KiB)\b", r"\1", lines["alive"]).split(), strict=True))
            assert words["observed"] == "7" and words["agent"] == "dead" and words["servers"] == "5/5"
            assert ("room" in words) == (columns == 120)


@needs_others
def test_ls_says_what_it_may_not_read(capsys: Capture, shm_dir: Path) -> None:
    shm_dir.chmod(0o755)
    with Producer("ours") as producer, Producer("theirs"):
        producer.publish()
        listed(capsys)  # nothing is to be imported without privileges
        (shm_dir / "ours").chmod(0o644)
        (shm_dir / "theirs").chmod(0o000)
        with without_privileges():
            rows = listed(capsys)
            assert (
                "no permission for region 'theirs'" in rows["theirs"]["problem"] and rows["theirs"]["version"] is None
            )
            assert rows["ours"]["problem"] is None and rows["ours"]["producer"] == "alive"
            assert "no permission for region 'theirs'" in refused(capsys, "inspect", "theirs")
            assert "cannot remove region 'theirs'" in refused(capsys, "rm", "theirs")
        shm_dir.chmod(0o700)
        if os.geteuid() == 0:
            with without_privileges():
                assert "cannot look for regions in" in refused(capsys, "ls")


def test_ls_without_the_folder(capsys: Capture, shm_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LBGYM_SHM_DIR", str(shm_dir / "none"))
    assert "No such file or directory" in refused(capsys, "ls")


# inspect


def test_inspect_tells_everything(capsys: Capture) -> None:
    with Producer("lb0", capacity=10, publish_interval=0.5, clock_rate=4.0) as producer:
        with SharedMemoryRegion.attach("lb0") as agent:
            document = json.loads(shm(capsys, "inspect", "lb0", "--json")[1])
            assert document["observation"] is None and document["action"] is None
            assert "none" in shm(capsys, "inspect", "lb0")[1]
            agent.write_action(sequence_id=41, weights=[1, 2, 3, 4, 5, 6, 7, 8], lease=60.0)
            (published,) = producer.publish()
            document = json.loads(shm(capsys, "inspect", "lb0", "--json")[1])
            code, text, _ = shm(capsys, "inspect", "lb0")
        header, snapshot = document["header"], published.snapshot
        assert header["capacity"] == 10 and header["clock_rate"] == 4.0 and header["publish_interval"] == 500_000_000
        assert header["magic"] == "LBGYMSHM" and header["instance"] == producer.instance and header["driver"] == "test"
        assert set(header) == set(abi.HEADER.dtype.names or ())
        assert document["producer"]["state"] == document["agent"]["state"] == "alive"
        assert document["producer"]["pid"] == producer.process.pid and document["agent"]["pid"] == os.getpid()
        observation = document["observation"]
        assert observation["sequence_id"] == 1 and observation["timestamp"] == snapshot.timestamp
        assert observation["applied_sequence_id"] == 41 and observation["safe_weights_in_force"] is False
        assert (observation["fct_count"], observation["fct_sum"]) == (published.fct_count, published.fct_sum)
        assert [server["id"] for server in observation["servers"]] == list(range(8))
        for k, server in enumerate(observation["servers"]):
            assert server["active"] is True and server["weight"] == k + 1 and server["safe_weight"] == 1.0
            assert [server[name] for name in FEATURE_NAMES] == snapshot.stats[k].tolist()
            assert snapshot.ground_truth is not None
            assert [server[name] for name in GROUND_TRUTH_NAMES] == snapshot.ground_truth[k].tolist()
            assert server["started"] == snapshot.started[k] and server["failed"] == snapshot.failed[k]
        action = document["action"]
        assert action["sequence_id"] == 41 and action["weights"] == [1, 2, 3, 4, 5, 6, 7, 8] and action["lease"] == 60.0
        assert 0.0 < action["lease_left"] < 60.0 and len(action["alias"]) == len(action["threshold"]) == 8
        assert document["problems"] == []
        assert code == 0 and "those of action 41" in text and "runs 4 times as fast" in text
        assert "…" not in text and max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("columns", ["80", "200"])
def test_inspect_fits_the_terminal(columns: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    with Producer("lb0") as producer:
        producer.publish(4)
        _, text, _ = shm(capsys, "inspect", "lb0")
    assert "…" not in text and max(map(len, text.splitlines())) <= int(columns)
    headings = [line for line in text.splitlines() if line.startswith("server ")]
    assert len(headings) == (4 if columns == "80" else 2)
    words = " ".join(headings).split()
    for title in ("open", "weight", "safe", "CPU", "FCT", "duration", "started", "failed"):
        assert title in words


def test_inspect_of_what_cannot_be_read(capsys: Capture, shm_dir: Path) -> None:
    assert "there is no region 'none'" in refused(capsys, "inspect", "none")
    assert "letters, digits" in refused(capsys, "inspect", "../x")
    (shm_dir / "text").write_text("no region, but long enough" * 20)
    assert "is no region that this lbgym can use" in refused(capsys, "inspect", "text")
    with Producer("lb0") as producer, SharedMemoryRegion.attach("lb0") as region:
        region.write_action(sequence_id=1, weights=np.ones(8), lease=float("inf"))
        producer.publish()
        layout = region.layout
        with (shm_dir / "lb0").open("r+b") as file:
            file.seek(layout.frames_offset + layout.frame_size + layout.frame_sections["stats"])
            file.write(np.float32(-1).tobytes())
        document = json.loads(shm(capsys, "inspect", "lb0", "--json")[1])
        assert document["observation"] is None and "no data plane may publish" in document["problems"][0]
        assert document["action"]["lease"] is None and document["action"]["lease_left"] is None  # for ever
        code, text, _ = shm(capsys, "inspect", "lb0")
        assert code == 0 and "no data plane may publish" in text and "good for ever" in text
        assert "no data plane may publish" in listed(capsys)["lb0"]["problem"]


def test_servers_have_their_names_and_states(capsys: Capture, shm_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with emulator("--name", "em", "--scenario", "heterogeneous", "--seed", "1"):
        assert in_process(capsys, "dataplane", "ctl", "em", "drain", "server-2")[0] == 0
        with SharedMemoryRegion.attach("em") as region:
            shown = next(buffer for buffer in following(region) if buffer.states[2] == ServerState.DRAINING)
            assert not shown.active[2]
        servers = json.loads(shm(capsys, "inspect", "em", "--json")[1])["observation"]["servers"]
        assert [server["name"] for server in servers] == [f"server-{j}" for j in range(8)]
        assert [server["state"] for server in servers] == ["up", "up", "draining", *["up"] * 5]
        assert all(server["ground_truth_age"] == 0.0 for server in servers)
        for columns in (80, 120):
            monkeypatch.setenv("COLUMNS", str(columns))
            _, text, _ = shm(capsys, "inspect", "em")
            assert re.search(r"server-2 +draining ", text) and re.search(r"server-3 +up ", text)
            _, text, _ = shm(capsys, "watch", "em", "--once")
            assert re.search(r"server-2 +draining .*out of service", text) and re.search(r"server-3 +up ", text)
            assert max(map(len, text.splitlines())) <= columns
        monkeypatch.setenv("COLUMNS", "50")
        _, text, _ = shm(capsys, "watch", "em", "--once")
        assert "server-2" in text and "draining" not in text


def test_what_is_not_measured_is_absent(capsys: Capture, shm_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    n, long = 3, "a-server-with-a-name.that-is-long.eu-west.example.com:8080"
    with SharedMemoryRegion.create("lb0", num_servers=n, features=["fct_mean_decay", "cpu_usage"]) as region:
        zeros = np.zeros(n, np.int64)
        region.set_server(0, name=long, state=ServerState.DOWN)
        stats = np.zeros((n, 11), np.float32)
        stats[1, FEATURE_NAMES.index("fct_mean_decay")] = 0.25
        truth = np.full((n, 3), 0.5, np.float32)
        active, ages = np.array([False, True, True]), np.array([2.0, 1.5, np.nan])
        region.publish(Publication(1.0, active, stats, zeros, zeros, zeros, zeros, truth, ground_truth_age=ages))
        document = json.loads(shm(capsys, "inspect", "lb0", "--json")[1])
        assert document["real_features"] == ["fct_mean_decay", "cpu_usage"]
        first, second, third = document["observation"]["servers"]
        assert (first["name"], first["state"], second["name"], second["state"]) == (long, "down", "", "unknown")
        assert (second["n_flow_on"], second["memory_usage"], second["fct_mean_decay"]) == (None, None, 0.25)
        assert (second["cpu_usage"], second["ground_truth_age"]) == (0.5, 1.5)
        assert (third["cpu_usage"], third["ground_truth_age"]) == (None, None)
        _, text, _ = shm(capsys, "inspect", "lb0")
        assert "not measured" in text and "1.5 s ago" in text and "a-server-wi" in text and "com:8080" in text
        assert long not in text and max(map(len, text.splitlines())) <= 120
        for columns in (80, 160):
            monkeypatch.setenv("COLUMNS", str(columns))
            _, text, _ = shm(capsys, "watch", "lb0", "--once")
            assert "- open" in text and max(map(len, text.splitlines())) <= columns
            rows = {line.split()[0]: line.split() for line in text.splitlines()[-3:]}
            assert rows["1"][:3] == ["1", "unknown", "-"] and "250" in rows["1"] and "down" in text
        assert rows["1"].count("-") == 5 and rows["2"].count("-") == 7 and "50%" in rows["1"]


def test_nothing_is_named_in_a_region_of_version_1_0(capsys: Capture, shm_dir: Path) -> None:
    (shm_dir / "old").write_bytes((Path(__file__).parent / "sharedmemory" / "region_1_0.bin").read_bytes())
    document = json.loads(shm(capsys, "inspect", "old", "--json")[1])
    assert [(s["name"], s["state"], s["ground_truth_age"]) for s in document["observation"]["servers"]] == [
        ("", "unknown", None)
    ] * 3
    assert document["observation"]["servers"][2]["cpu_usage"] == 1.5  # of unknown age, but measured
    _, text, _ = shm(capsys, "watch", "old", "--once")
    assert [line.split()[0] for line in text.splitlines()[-3:]] == ["0", "1", "2"] and "unknown" not in text
    _, text, _ = shm(capsys, "inspect", "old")
    assert re.search(r"\n +1 +unknown, out ", text) and "not measured" not in text


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        ([], ("0", "1", "2")),
        (["a", "", "c"], ("a", "1", "c")),
        (["a", "a", ""], ("a#0", "a#1", "2")),
        (["2", "", ""], ("2#0", "1", "2")),
        (["a", "a", "a#0"], ("0", "1", "2")),
    ],
)
def test_labels_are_unique(names: list[str], labels: tuple[str, ...]) -> None:
    assert server_labels(names, 3) == labels


# watch


#: Standard input becomes the controlling terminal, so that keys become signals.
_ON_A_TERMINAL = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from lbgym.cli import main
main(sys.argv[1:])
"""


class Terminal:
    """A process on a terminal of its own, and what it shows there."""

    def __init__(self, *arguments: object, columns: int = 80, lines: int = 24, stdout: Any = None) -> None:
        self._leader, self._follower = pty.openpty()
        fcntl.ioctl(self._follower, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.before = termios.tcgetattr(self._follower)
        environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _ON_A_TERMINAL, *map(str, arguments)],
            stdin=self._follower,
            stdout=self._follower if stdout is None else stdout,
            stderr=self._follower,
            env=environment | {"TERM": "xterm-256color", "LANG": "C.UTF-8"},
            start_new_session=True,
        )
        self.shown = ""
        # Unbuffered (PYTHONUNBUFFERED), Python loses the rest of what it was writing when a signal came.
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        os.close(self._leader)
        os.close(self._follower)

    def wait_for(self, pattern: str, found: Callable[[re.Match[str]], bool] = lambda match: True) -> re.Match[str]:
        """Wait until something is shown after what was waited for last; colours do not count."""
        deadline = time.monotonic() + 60
        while True:
            for match in re.finditer(pattern, self.shown):
                if found(match):
                    self.shown = self.shown[match.end() :]
                    return match
            assert time.monotonic() < deadline, f"no {pattern!r} in\n{self.shown[-3000:]}"
            assert self.process.poll() is None, f"it has ended ({self.process.returncode}): {self.shown[-3000:]}"
            if select.select([self._leader], [], [], 1.0)[0]:
                self._read()

    def _read(self) -> None:
        chunk = self._decode(os.read(self._leader, 1 << 16))
        self.shown = re.sub(r"\x1b\[[0-9;]*m", "", self.shown + chunk)

    def type(self, keys: str) -> None:
        os.write(self._leader, keys.encode())

    def end(self) -> int:
        """Wait for its end; returns the exit code and checks that the terminal is as it was."""
        deadline = time.monotonic() + 30
        while self.process.poll() is None or select.select([self._leader], [], [], 0.0)[0]:
            assert time.monotonic() < deadline, "it does not end"
            if select.select([self._leader], [], [], 0.1)[0]:
                self._read()
        assert termios.tcgetattr(self._follower) == self.before
        return self.process.returncode


def check_clean(terminal: Terminal) -> None:
    """The alternate screen was left, the cursor is back, and nothing was said."""
    assert "\x1b[?1049l" in terminal.shown and "Traceback" not in terminal.shown
    assert "\x1b[?25h" in terminal.shown


def test_watch_follows_death_and_restart(shm_dir: Path) -> None:
    with Producer("lb0") as producer, Terminal("shm", "watch", "lb0", "--rate", 20) as terminal:
        terminal.wait_for(r"\x1b\[\?1049h")
        terminal.wait_for("producer alive  process")
        terminal.wait_for("observed nothing yet")
        producer.run(0.02)
        terminal.wait_for("8 of 8 servers active")
        terminal.wait_for("agent    none")
        terminal.wait_for("weights  safe weights in force")
        terminal.wait_for(r"([\d.]+)/s new", lambda match: float(match[1]) > 0.0)
        terminal.wait_for(r"\n +7 +\d+ █* +1\.00 █+")
        agent = SharedMemoryRegion.attach("lb0")
        agent.write_action(sequence_id=7, weights=np.arange(1, 9), lease=60.0)
        terminal.wait_for(rf"agent    alive  process {os.getpid()}  action 7, .* old, lease \d+\.\d of 60 s left")
        terminal.wait_for(r"weights  of action 7, in force [\d.]+ m?s after it was written")
        terminal.wait_for(r"\n +7 +\d+ █* +8\.00 █+")
        agent.close()
        terminal.wait_for("agent    dead")
        os.kill(producer.process.pid or 0, signal.SIGSTOP)
        terminal.wait_for(r"silent for [\d.]+ s, last sign of life [\d.]+ s ago")
        os.kill(producer.process.pid or 0, signal.SIGCONT)
        terminal.wait_for(r"producer alive  process \d+  up")
        producer.kill()
        terminal.wait_for(r"producer dead  process \d+  last heard .* ago, waiting")
        with Producer("lb0", servers=3, driver="second", clock_rate=20.0) as second:
            second.publish(3)
            terminal.wait_for("lb0  second x20  3 of 3 servers active")
            terminal.wait_for(rf"producer alive  process {second.process.pid}  restarts 1")
            terminal.wait_for(r"observed 3  ")
            second.end()
            terminal.wait_for("producer closed")
        terminal.type("\x03")
        assert terminal.end() == 0
        check_clean(terminal)


@pytest.mark.parametrize(
    ("columns", "lines", "how", "code"),
    [(80, 24, "q", 0), (160, 50, "SIGINT", 0), (40, 10, "SIGTERM", 143), (80, 24, "SIGHUP", 129)],
)
def test_watch_fits_many_servers_and_leaves_the_terminal_clean(columns: int, lines: int, how: str, code: int) -> None:
    n = 300
    with SharedMemoryRegion.create("lb0", num_servers=n) as region:
        with Producer("lb1") as producer:
            snapshot = producer.publish(8)[-1].snapshot
        for number in range(2):
            more: dict[str, Any] = {
                name: np.resize(getattr(snapshot, name), n) * (number + 1)
                for name in ("started", "completed", "rejected", "failed")
            }
            stats = np.resize(snapshot.stats, (n, 11))
            stats[:, 0] = np.arange(n) % 7
            stats[250, 0] = 99.0
            more |= {"active": np.arange(n) != 250, "stats": stats, "ground_truth": None, "timestamp": 0.25 + number}
            region.publish(Publication.of(replace(snapshot, **more)))
        with Terminal("shm", "watch", "lb0", columns=columns, lines=lines) as terminal:
            terminal.wait_for("299 of 300 serv")
            terminal.wait_for(r"250 +99 █+ +out of service" if columns > 40 else " 250 +99")
            if lines >= 24:
                terminal.wait_for("the largest of each")
            screen = terminal.wait_for(r"299 of 300 serv(?s:.*?)\x1b\[H")[0]
            rows = screen.removesuffix("\x1b[H").split("\n")
            assert len(rows) <= lines and max(len(row.rstrip("\r")) for row in rows) <= columns
            terminal.type("x\x1b[A")  # means nothing, and is not shown
            terminal.wait_for("299 of 300 serv")
            if how == "q":
                terminal.type("q")
            else:
                terminal.process.send_signal(getattr(signal, how))
            assert terminal.end() == code
            check_clean(terminal)
            assert "x\x1b[A" not in terminal.shown


def test_watch_once_and_into_a_pipe(capsys: Capture, shm_dir: Path) -> None:
    with Producer("lb0") as producer:
        producer.publish(2)
        code, out, _ = shm(capsys, "watch", "lb0", "--once")
        assert code == 0 and "\x1b" not in out and "observed 2  " in out
        assert [line.split()[0] for line in out.splitlines()[-8:]] == [str(j) for j in range(8)]
        producer.run(0.02)
        _, out, _ = shm(capsys, "watch", "lb0", "--once")
        assert re.search(r"flows    [\d.]+/s new", out)
        command = f"{sys.executable} -m lbgym shm watch lb0 --rate 20 | grep -m 6 observed"
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
        numbers = [int(line.split()[1].replace(",", "")) for line in done.stdout.splitlines()]
        # A producer that is held up for a moment has nothing new for a picture or two.
        assert len(numbers) == 6 and numbers == sorted(numbers) and numbers[0] < numbers[-1] and done.stderr == ""
    assert "there is no region 'none'" in refused(capsys, "watch", "none")
    code, _, err = shm(capsys, "watch", "lb0", "--rate", "0")
    assert code == 2 and "rate" in err


def test_looking_writes_nothing(capsys: Capture, shm_dir: Path, tmp_path: Path) -> None:
    with Producer("lb0") as producer:
        producer.publish(3)

        def digest() -> str:
            return hashlib.sha256((shm_dir / "lb0").read_bytes()).hexdigest()

        before = digest()
        shm(capsys, "ls")
        shm(capsys, "inspect", "lb0")
        shm(capsys, "watch", "lb0", "--once")
        assert shm(capsys, "record", "lb0", tmp_path / "out.parquet", "--duration", "0.3")[0] == 0
        assert digest() == before
        # Nor does it take the agent's place.
        with SharedMemoryRegion.attach("lb0") as agent, Terminal("shm", "watch", "lb0") as terminal:
            terminal.wait_for("observed 3  ")
            agent.lock_agent()
            terminal.wait_for("agent    alive")


# record


def test_record_a_number_of_observations(capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("minari")
    from lbgym.recording import load_recording

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    out = tmp_path / "out.parquet"
    with Producer("lb0") as producer:
        producer.run(0.01)
        code, text, err = shm(capsys, "record", "lb0", out, "--steps", 6, "--minari", "tests/lb0-v0")
        rows = {row.sequence_id: row for row in producer.halt()}
        assert code == 0 and err == ""
        assert re.search(rf"^wrote {out}: 6 observations in [\d.]+ s, \d+ missed\n", text)
        recording = load_recording(out)
        for k, number in enumerate(recording.sequence_id.tolist()):
            assert np.array_equal(recording.stats[k], rows[number].snapshot.stats)
        import minari

        steps = recording.transitions()
        assert f"wrote Minari dataset tests/lb0-v0: {len(steps)} steps" in text
        assert minari.load_dataset("tests/lb0-v0").total_steps == len(steps)
        # What cannot be written is refused before anything is recorded.
        assert "exists already" in refused(capsys, "record", "lb0", out, "--steps", 1)
        more = tmp_path / "more.parquet"
        assert "exists already in" in refused(capsys, "record", "lb0", more, "--minari", "tests/lb0-v0")
        assert "a Minari dataset is named like" in refused(capsys, "record", "lb0", more, "--minari", "lb0")
        assert "No such file or directory" in refused(capsys, "record", "lb0", tmp_path / "no" / "out.parquet")
        assert "interval must be" in refused(capsys, "record", "lb0", more, "--sample-interval", "0")
        assert not more.exists()
        producer.run(0.01)
        code, text, _ = shm(
            capsys, "record", "lb0", out, "--steps", 2, "--overwrite", "--report", tmp_path / "page.html"
        )
        assert code == 0 and "2 observations in" in text and "<figure" in (tmp_path / "page.html").read_text()
    assert "there is no region 'none'" in refused(capsys, "record", "none", tmp_path / "none.parquet")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_record_until_it_is_stopped(number: signal.Signals, tmp_path: Path) -> None:
    from lbgym.recording import load_recording

    out = tmp_path / "out.parquet"
    with Producer("lb0") as producer:
        producer.run(0.01)
        with Terminal("shm", "record", "lb0", out, columns=120, stdout=subprocess.PIPE) as terminal:
            terminal.wait_for(r"recording lb0: (\d+) observations", lambda match: int(match[1]) >= 10)
            producer.kill()
            terminal.wait_for(rf"the producer of region 'lb0' \(process {producer.process.pid}\) is gone; waiting")
            with Producer("lb0") as second:
                second.run(0.01)
                terminal.wait_for(r"has a new producer \(process \d+\); recording it")
                terminal.wait_for(r"1 restart of the producer")
                terminal.process.send_signal(number)
                assert terminal.end() == 0
            assert terminal.process.stdout is not None
            said = terminal.process.stdout.read().decode()
    found = re.fullmatch(
        rf"wrote {out}: (\d+) observations in [\d.]+ s, (\d+) missed, 1 restart of the producer\n", said
    )
    assert found, said
    recording = load_recording(out)
    assert len(recording) == int(found[1]) and recording.missed.sum() == int(found[2])
    assert len(np.unique(recording.instance)) == 2 and len(recording.episodes) >= 2
    assert [path.name for path in tmp_path.iterdir()] == ["out.parquet"]


# rm, include


def test_rm_removes_what_is_dead(capsys: Capture, shm_dir: Path) -> None:
    with Producer("alive") as producer, Producer("dead") as other:
        other.kill()
        SharedMemoryRegion.create("closed", num_servers=2).close()
        assert f"region 'alive' has a live producer (process {producer.process.pid})" in refused(capsys, "rm", "alive")
        code, out, err = shm(capsys, "rm", "dead", "alive", "none", "closed")
        assert code == 2 and out == "removed dead\nremoved closed\n"
        assert "'alive' has a live producer" in err and "there is no region 'none'" in err
        assert len(err.splitlines()) == 2
        assert [path.name for path in shm_dir.iterdir()] == ["alive"]
        producer.publish()  # it was not disturbed
        assert listed(capsys)["alive"]["producer"] == "alive"
        assert shm(capsys, "rm", "--force", "alive") == (0, "removed alive\n", "")
        assert not any(shm_dir.iterdir())
        producer.publish()
        # The name is free for another one.
        SharedMemoryRegion.create("alive", num_servers=2).close()


def test_rm_keeps_what_is_no_region(capsys: Capture, shm_dir: Path) -> None:
    with Producer("dead") as other:
        other.kill()
    (shm_dir / "text").write_text("precious")
    (shm_dir / "empty").touch()
    (shm_dir / "folder").mkdir()
    (shm_dir / "link").symlink_to("dead")
    os.mkfifo(shm_dir / "pipe")
    for name in ("text", "empty", "folder", "link", "pipe"):
        for options in ((), ("--force",)):
            assert "is no region, and is not removed" in refused(capsys, "rm", name, *options)
    assert "letters, digits" in refused(capsys, "rm", "--force", "../text")
    damaged(shm_dir, "later", "dead", "version_major", 9)
    message = refused(capsys, "rm", "later")
    assert "version 9.1" in message and "it may be in use; --force removes it" in message
    assert shm(capsys, "rm", "later", "--force") == (0, "removed later\n", "")
    assert len(list(shm_dir.iterdir())) == 6


def test_include(capsys: Capture) -> None:
    code, out, _ = shm(capsys, "include")
    assert code == 0 and (Path(out.strip()) / "lbgym_features.h").is_file()


def test_help_names_the_commands(capsys: Capture) -> None:
    code, out, _ = shm(capsys, "--help")
    assert code == 0
    assert all(name in out for name in ("ls", "inspect", "watch", "record", "rm", "include"))
