"""The loop that drivers share: grid, actions, leases, trouble, rows that come and go, control socket, the end."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from lbgym.drivers import DriverError, Publisher, ServerRow, Source
from lbgym.drivers.check import check_driver
from lbgym.drivers.config import ServerConfig
from lbgym.drivers.control import ControlServer, control, control_path
from lbgym.drivers.discovery import Slots
from lbgym.errors import InvalidOptionError, RegionExistsError, UnknownNameError
from lbgym.sharedmemory import ObservationBuffer, Publication, ServerState, SharedMemoryRegion, seqlock
from tests.drivers.emulated import emulator, following, running

INTERVAL = 0.02
NS = 1_000_000_000


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    seqlock.warm_up()


class Counting(Source):
    """Servers that each complete a flow per reading; what a test changes, it changes here."""

    driver = "counting"
    features = ("n_flow_on", "fct_mean")

    def __init__(self, names: str = "ab", capacity: int = 4) -> None:
        self.slots = Slots(capacity)
        self.slots.update(self.config(name) for name in names)
        self.flows = np.zeros(capacity, np.int64)
        self.open = np.zeros(capacity, np.int64)
        self.applied: list[tuple[float, list[float]]] = []
        self.trouble: Exception | None = None
        self.slow = 0.0
        self.closed = 0
        self.reloaded = 0

    def config(self, name: str) -> ServerConfig:
        return ServerConfig(name=name, address="127.0.0.1", weight=1.0)

    def servers(self) -> list[ServerRow]:
        return self.slots.rows

    def read(self, now: float) -> Publication:
        if self.trouble is not None:
            raise self.trouble
        time.sleep(self.slow)
        self.slots.release(self.open.tolist())
        n = len(self.slots)
        self.flows += 1
        stats = np.full((n, 11), 0.5, np.float32)
        stats[:, 0] = self.open[:n]
        active = np.array([row.state is ServerState.UP for row in self.slots.rows])
        zeros = np.zeros(n, np.int64)
        return Publication(
            timestamp=now,
            active=active,
            stats=stats,
            started=self.flows[:n] + self.open[:n],
            completed=self.flows[:n].copy(),
            rejected=zeros,
            failed=zeros,
        )

    def apply(self, weights: NDArray[np.float64], now: float) -> None:
        if self.trouble is not None:
            raise self.trouble
        self.applied.append((now, weights.tolist()))

    def add(self, server: str, *, address: str, port: int | None, weight: float, cores: int | None) -> None:
        self.slots.add(ServerConfig(name=server, address=address, port=port, weight=weight, cores=cores))

    def drain(self, server: str) -> None:
        self.slots.drain(server)

    def remove(self, server: str) -> None:
        self.slots.remove(server)

    def close(self) -> None:
        self.closed += 1


@contextmanager
def published(source: Source, **options: object) -> Iterator[tuple[Publisher, Iterator[ObservationBuffer]]]:
    keys = {"publish_interval": INTERVAL, **options}
    with (
        Publisher({"lb": source}, **keys) as publisher,  # type: ignore[arg-type]
        SharedMemoryRegion.attach("lb") as reader,
        running(publisher),
    ):
        yield publisher, following(reader)


def test_a_driver_passes_the_check() -> None:
    with published(Counting()):
        verdicts = check_driver("lb")
        assert not [verdict for verdict in verdicts if verdict.passed is False], "\n".join(map(str, verdicts))


def test_rows_names_and_features_are_published() -> None:
    with published(Counting()) as (publisher, source):
        seen = next(source)
        region = publisher.regions[0]
        assert region.real_features >= {"n_flow_on", "fct_mean"} and "fct_std" not in region.real_features
        with SharedMemoryRegion.attach("lb") as reader:
            assert reader.server_names[:2] == ("a", "b")
        assert seen.num_servers == 2 and seen.states[:2].tolist() == [ServerState.UP, ServerState.UP]
        assert seen.safe_weights[:2].tolist() == [1.0, 1.0]
        # Columns that are not real are zero, whatever the source says.
        assert not seen.stats[:2, 2:].any() and (seen.stats[:2, 1] == 0.5).all()
        assert not seen.has_ground_truth


def test_publications_that_are_late_are_left_out_and_counted() -> None:
    source = Counting()
    with Publisher({"lb": source}, publish_interval=INTERVAL) as publisher:
        source.slow = 2.5 * INTERVAL
        publisher.run(duration=40 * INTERVAL)
        assert publisher.slips > 10 and publisher.lost == pytest.approx(publisher.slips * INTERVAL)
        # None is published twice, and none is unaccounted for.
        assert publisher.observations + publisher.slips == 41
        seen = publisher.regions[0].new_buffer()
        with SharedMemoryRegion.attach("lb") as reader:
            assert reader.read_into(seen)
        assert seen.sequence_id == publisher.observations


def test_weights_are_applied_and_the_safe_ones_after_the_lease() -> None:
    source = Counting()
    with published(source) as (_, observations):
        next(observations)
        with SharedMemoryRegion.attach("lb") as agent:
            written = agent.write_action(sequence_id=5, weights=[3.0, 4.0], lease=0.3)
            seen = next(s for s in observations if s.applied_sequence_id == 5)
            assert source.applied[-1][1] == [3.0, 4.0]
            assert not seen.safe and seen.weights[:2].tolist() == [3.0, 4.0]
            seen = next(s for s in observations if s.safe)
            assert (seen.published_at - written) / NS >= 0.3
            assert source.applied[-1][1] == seen.weights[:2].tolist() == [1.0, 1.0]


class Indexed(Counting):
    """One that places flows by an index."""

    takes_index = True

    def apply_index(self, weights: NDArray[np.float64], index: NDArray[np.float64], now: float) -> None:
        self.applied.append((now, [weights.tolist(), index.tolist()]))  # type: ignore[arg-type]


def test_index_parameters_are_applied_and_go_with_their_action() -> None:
    source = Indexed()
    with published(source) as (_, observations), SharedMemoryRegion.attach("lb") as agent:
        next(observations)

        def after(number: int, index: list[list[float]] | None, lease: float = 60.0) -> object:
            while True:
                weights = [3.0, 4.0][: len(index or "ab")]
                written = agent.write_action(sequence_id=number, weights=weights, lease=lease, index=index)
                for seen in observations:
                    if seen.applied_sequence_id == number:
                        return source.applied[-1][1]
                    if seen.published_at > written + lease * NS:
                        # The driver was held up until it was over.
                        break

        assert after(5, [[1.5, 2.0], [4.0, 0.0]]) == [[3.0, 4.0], [[1.5, 2.0], [4.0, 0.0]]]
        # The same weights with another background load, then without any.
        assert after(6, [[1.5, 2.0], [4.0, 7.0]]) == [[3.0, 4.0], [[1.5, 2.0], [4.0, 7.0]]]
        assert after(7, None) == [3.0, 4.0]
        # Servers that the action says nothing of have their safe weight, one core, and no background load.
        assert after(8, [[1.5, 2.0]]) == [[3.0, 1.0], [[1.5, 2.0], [1.0, 0.0]]]
        after(9, [[1.5, 2.0], [4.0, 7.0]], lease=0.1)
        next(s for s in observations if s.safe)
        assert source.applied[-1][1] == [1.0, 1.0]


def test_a_data_plane_that_takes_weights_only_refuses_an_index() -> None:
    source = Counting()
    with published(source) as (_, observations), SharedMemoryRegion.attach("lb") as agent:
        next(observations)
        with pytest.raises(InvalidOptionError, match="'lb' does not dispatch by index"):
            agent.write_action(sequence_id=5, weights=[3.0, 4.0], index=[[1.0, 1.0], [1.0, 1.0]])
        assert next(observations).safe and [weights for _, weights in source.applied] == [[1.0, 1.0]]


def test_no_lease_is_longer_than_the_drivers() -> None:
    source = Counting()
    with published(source, lease=0.3) as (_, observations):
        next(observations)
        with SharedMemoryRegion.attach("lb") as agent:
            agent.write_action(sequence_id=5, weights=[3.0, 4.0], lease=float("inf"))
            next(s for s in observations if s.applied_sequence_id == 5 and not s.safe)
            next(s for s in observations if s.safe)
            assert source.applied[-1][1] == [1.0, 1.0]


@pytest.mark.parametrize("error", [DriverError("gone"), ConnectionRefusedError(111, "refused")])
def test_a_data_plane_that_does_not_answer_is_not_published(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    source = Counting()
    with published(source) as (publisher, observations):
        next(observations)
        source.trouble = error
        while not publisher.failures:
            time.sleep(0.001)
        with SharedMemoryRegion.attach("lb") as agent:
            latest = agent.latest
            agent.write_action(sequence_id=9, weights=[3.0, 4.0])
            time.sleep(10 * INTERVAL)
            assert agent.latest == latest and agent.heartbeat_age < 5.0 and agent.producer_alive
            before = len(source.applied)
            source.trouble = None
            # The first observation that says so is one of a data plane that has the weights.
            seen = next(s for s in observations if s.sequence_id > latest)
            assert seen.applied_sequence_id == 9 and [3.0, 4.0] in [w for _, w in source.applied[before:]]
    assert caplog.text.count("does not answer, nothing is published meanwhile") == 1


def test_counters_go_on_when_the_data_plane_begins_again() -> None:
    source = Counting()
    source.open[:2] = 3
    with published(source) as (_, observations):
        next(s for s in observations if s.counters[0, 1] > 5)
        source.flows[:] = 0
        source.open[:] = 0
        before = np.zeros((2, 4), np.int64)
        seen = None
        for seen in observations:
            now = seen.counters[:2].astype(np.int64)
            assert (now >= before).all()
            assert (now[:, 0] - now[:, 1:].sum(axis=1) == seen.stats[:2, 0]).all()
            before = now
            if now[0, 3]:
                break
        # Those that were open have failed.
        assert before[:, 3].tolist() == [3, 3]


def test_servers_are_added_drained_and_removed_while_it_runs(shm_dir: Path) -> None:
    source = Counting()
    with published(source) as (_, observations):
        assert stat.S_IMODE(os.lstat(control_path("lb")).st_mode) == 0o600
        listed = control("lb", {"op": "list"})
        assert (listed["driver"], [row["name"] for row in listed["servers"]]) == ("counting", ["a", "b"])
        control("lb", {"op": "add", "server": "c", "address": "10.0.0.3", "port": 80, "weight": 7})
        seen = next(s for s in observations if s.num_servers == 3)
        assert seen.safe_weights[:3].tolist() == seen.weights[:3].tolist() == [1.0, 1.0, 7.0]
        assert source.applied[-1][1] == [1.0, 1.0, 7.0]
        source.open[1] = 2
        control("lb", {"op": "remove", "server": "b"})
        seen = next(s for s in observations if not s.active[1])
        assert seen.states[1] == ServerState.DRAINING
        assert control("lb", {"op": "list"})["servers"][1]["state"] == "draining"
        source.open[1] = 0
        seen = next(s for s in observations if s.states[1] == ServerState.DOWN)
        with SharedMemoryRegion.attach("lb") as reader:
            assert reader.server_names[:3] == ("a", "", "c")
        # The row that is empty is taken again.
        control("lb", {"op": "add", "server": "d", "address": "10.0.0.4"})
        next(s for s in observations if s.active[1])
        assert [row["name"] for row in control("lb", {"op": "list"})["servers"]] == ["a", "d", "c"]
    assert not any(shm_dir.iterdir())


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"op": "explode"}, "unknown request 'explode'; there are list"),
        ({"op": "drain"}, "drain needs the name of a server"),
        ({"op": "drain", "server": "x"}, "there is no server 'x'; known: a, b"),
        ({"op": "undrain", "server": "a"}, "the counting driver cannot drain servers"),
        ({"op": "add", "server": "x"}, "add needs the address"),
        ({"op": "add", "server": "x", "address": "h", "port": 0}, "port must be a whole number from 1"),
        ({"op": "add", "server": "a", "address": "h"}, "there is a server 'a' already"),
        ({"op": "reload"}, "has no configuration file to reload"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(request_: dict[str, object], message: str) -> None:
    with published(Counting()):
        with pytest.raises(DriverError) as raised:
            control("lb", request_)
        assert message in str(raised.value)


def test_the_control_socket_survives_nonsense() -> None:
    with published(Counting()) as (_, observations):
        for data in (b"\xff\xfe\n", b"[1]\n", b"{}\n", b"no end", b""):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(control_path("lb")))
                client.sendall(data)
                if data.endswith(b"\n"):
                    assert "error" in json.loads(client.makefile().readline())
        held = [socket.socket(socket.AF_UNIX) for _ in range(40)]
        for client in held:
            # Those who connect and say nothing keep nobody else out.
            client.settimeout(20)
            client.connect(str(control_path("lb")))
            before = next(observations).sequence_id
        assert len(control("lb", {"op": "list"})["servers"]) == 2
        assert next(s for s in observations if s.sequence_id > before + 3)
        for client in held:
            client.close()


def test_a_list_of_all_servers_that_a_region_can_have(shm_dir: Path) -> None:
    # As long in JSON as 63 bytes can be.
    name = 31 * "é" + "x"
    rows = [{"slot": i, "name": name, "state": "draining", "weight": 1 / 3} for i in range(65_536)]
    answer = {"region": "lb", "driver": "counting", "done": "", "servers": rows}
    with closing(ControlServer("lb", lambda _: answer)) as server:
        end = threading.Event()

        def poll() -> None:
            while not end.wait(0.001):
                server.poll()

        thread = threading.Thread(target=poll)
        thread.start()
        try:
            assert control("lb", {"op": "list"}, timeout=60.0) == answer
        finally:
            end.set()
            thread.join()


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("nan"), float("inf"), 1e300])
def test_a_time_that_nobody_can_wait_is_refused(timeout: float) -> None:
    with (
        published(Counting()),
        pytest.raises(
            InvalidOptionError, match=r"timeout must be a finite number above 0 seconds and at most 86400, got "
        ),
    ):
        control("lb", {"op": "list"}, timeout=timeout)


def test_no_driver_is_said_so(shm_dir: Path) -> None:
    with pytest.raises(DriverError, match="no driver with a control socket runs for region 'lb'"):
        control("lb", {"op": "list"})


def test_the_end_leaves_the_safe_weights_in_force(shm_dir: Path) -> None:
    source = Counting()
    with Publisher({"lb": source}, publish_interval=INTERVAL) as publisher, SharedMemoryRegion.attach("lb") as agent:
        agent.write_action(sequence_id=1, weights=[3.0, 4.0], lease=float("inf"))
        publisher.run(duration=3 * INTERVAL)
        assert source.applied[-1][1] == [3.0, 4.0]
        publisher.close()
        publisher.close()
        assert source.applied[-1][1] == [1.0, 1.0] and source.closed == 1
        assert agent.closed_by_producer and not any(shm_dir.iterdir())


def test_what_it_refuses_leaves_nothing(shm_dir: Path) -> None:
    for keys in ({"publish_interval": 0}, {"clock_rate": "1"}, {"lease": -1.0}, {"capacity": 1}):
        with pytest.raises(InvalidOptionError):
            Publisher({"lb": Counting()}, **keys)  # type: ignore[arg-type]
    twice = Counting()
    twice.servers = lambda: [ServerRow("a"), ServerRow("a")]  # type: ignore[method-assign]
    with pytest.raises(InvalidOptionError, match="two servers of the name 'a'"):
        Publisher({"lb": twice})
    unknown = Counting()
    unknown.features = ("fct_meen",)
    with pytest.raises(UnknownNameError, match="Did you mean 'fct_mean'"):
        Publisher({"lb": unknown})
    with pytest.raises(InvalidOptionError):
        Publisher({})
    other = Counting()
    with Publisher({"taken": Counting()}), pytest.raises(RegionExistsError):
        Publisher({"lb": other, "taken": Counting()})
    assert other.closed == 1
    assert not any(shm_dir.iterdir())


DRIVER = """
import sys
import threading
from lbgym.drivers import Publisher
from tests.drivers.test_publisher import Counting

class Reloading(Counting):
    def reload(self):
        self.slots.update([self.config("a"), self.config("b"), self.config("new")])
        return "added new"

kind = Reloading if sys.argv[1] == "reloading" else Counting
with Publisher({"lb": kind()}, publish_interval=0.02) as publisher:
    publisher.serve()
print("ended in order", flush=True)
"""


@pytest.mark.parametrize("kind", ["plain", "reloading"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_end_a_driver_or_reload_it(kind: str, number: signal.Signals, shm_dir: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", DRIVER, kind], stdout=subprocess.PIPE, text=True) as process:
        try:
            region = SharedMemoryRegion.attach("lb", timeout=60.0, live=True)
            source = following(region)
            next(s for s in source if s.sequence_id > 2)
            process.send_signal(number)
            if kind == "reloading" and number == signal.SIGHUP:
                next(s for s in source if s.num_servers == 3)
                assert region.server_names[2] == "new"
                process.send_signal(signal.SIGTERM)
            out, _ = process.communicate(timeout=20)
            assert (process.returncode, out) == (0, "ended in order\n")
            assert region.closed_by_producer and not any(shm_dir.iterdir())
            region.close()
        finally:
            process.kill()


def test_a_driver_that_was_killed_is_replaced_with_its_socket(shm_dir: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", DRIVER, "plain"], stdout=subprocess.PIPE, text=True) as process:
        with SharedMemoryRegion.attach("lb", timeout=60.0, live=True) as region:
            # The region is there before the socket, which is there before the driver runs.
            next(s for s in following(region) if s.sequence_id > 2)
        control("lb", {"op": "list"}, timeout=20.0)
        process.kill()
        process.wait()
    assert control_path("lb").exists()
    with pytest.raises(DriverError, match="no driver with a control socket"):
        control("lb", {"op": "list"})
    with published(Counting("xyz")):
        assert len(control("lb", {"op": "list"})["servers"]) == 3


def lbgym(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "lbgym", *arguments], capture_output=True, text=True, timeout=60)


def test_the_emulator_drains_and_undrains_by_the_command_line() -> None:
    with (
        emulator("--name", "lb", "--scenario", "uniform", "--publish-interval", INTERVAL),
        SharedMemoryRegion.attach("lb") as reader,
    ):
        source = following(reader, timeout=40.0)
        assert reader.server_names[:2] == ("server-0", "server-1")
        done = lbgym("dataplane", "ctl", "lb", "drain", "server-1")
        assert (done.returncode, done.stdout) == (0, "lb: drain server-1\n"), done.stderr
        seen = next(s for s in source if not s.active[1])
        assert seen.states[1] == ServerState.DRAINING and not seen.stats[1].any()
        started = int(seen.counters[1, 0])
        later = seen.sequence_id + 10
        seen = next(s for s in source if s.sequence_id > later)
        assert seen.counters[1, 0] == started and seen.counters[0, 0] > 0
        control("lb", {"op": "undrain", "server": "server-1"})
        seen = next(s for s in source if s.active[1] and s.counters[1, 0] > started)
        assert seen.states[1] == ServerState.UP
        for request, message in (
            (("remove", "server-1"), "the emulator cannot remove 'server-1': a scenario has a fixed cluster"),
            (("add", "x", "--address", "h"), "the emulator cannot add 'x'"),
            (("undrain", "server-0"), "server 'server-0' is up, not draining"),
            (("drain", "nobody"), "there is no server 'nobody'"),
            (("drain",), "drain needs the name of a server"),
        ):
            done = lbgym("dataplane", "ctl", "lb", *request)
            assert done.returncode == 2 and done.stderr.startswith("lbgym: error: ") and message in done.stderr
            assert len(done.stderr.splitlines()) == 1
        done = lbgym("dataplane", "ctl", "lb", "list")
        assert done.stdout.splitlines()[0].split() == ["0", "server-0", "up", "weight", "4"]
        done = lbgym("dataplane", "check", "lb")
        assert done.returncode == 0, done.stdout
