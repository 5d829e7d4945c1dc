"""What tests of real proxies share: servers behind them, and a driver's source with a clock."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest

from lbgym.dataplanes import SharedMemoryDataPlane
from lbgym.drivers import DriverError
from lbgym.drivers.check import check_driver
from lbgym.drivers.control import control
from lbgym.drivers.proxy import ProxySource
from lbgym.sharedmemory import Publication
from tests.test_docs import ROOT, blocks

#: Seconds until which what must happen has happened on any machine.
LONG = 60.0


#: Names in the kernel, one for each port that this process has been given.
_reserved: list[socket.socket] = []


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody has or gets before this process ends, for TCP and UDP.

    They are bound to later, by other programs, too. So they are none that the kernel gives to whoever asks for any,
    and the tests of other processes, which choose here as well, leave them alone.
    """
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    given_away = range(low, high + 1)
    candidates = [port for port in range(10_000, 61_000) if port not in given_away] or list(given_away)
    first = random.Random().randrange(len(candidates))
    ports: list[int] = []
    for port in candidates[first:] + candidates[:first]:
        if len(ports) == count:
            break
        if _reserve(port) and all(_is_free(kind, port) for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM)):
            ports.append(port)
    if len(ports) < count:
        raise RuntimeError(f"{count} free ports are needed, and there are {len(ports)}")
    return ports


def _reserve(port: int) -> bool:
    """Make the port this process's until its end; false if another one has it."""
    name = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        name.bind(f"\0lbgym-test-port-{port}")
    except OSError:
        name.close()
        return False
    _reserved.append(name)
    return True


def _is_free(kind: socket.SocketKind, port: int) -> bool:
    with socket.socket(socket.AF_INET, kind) as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def eventually(condition: Callable[[], object], timeout: float = LONG) -> None:
    until = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < until, "what was waited for does not come"
        time.sleep(0.01)


def ordinary() -> dict[str, object]:
    """Arguments of ``subprocess`` that make a process of root's one of nobody's."""
    return {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 else {}


class Servers:
    """TCP servers in a thread. A client sends ``SECONDS`` and a line feed, and gets the server's name that much later;
    instead of seconds, ``hold`` has the server wait for another line, and ``break`` has it reset the connection."""

    def __init__(self, names: Sequence[str]) -> None:
        self.ports = dict(zip(names, free_ports(len(names)), strict=True))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._servers: dict[str, asyncio.Server] = {}
        for name in names:
            self.up(name)

    def up(self, name: str) -> None:
        """Listen, on the same port as before."""

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                line = await reader.readline()
                if line == b"break\n":
                    connection = writer.get_extra_info("socket")
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    writer.transport.abort()
                    return
                if line == b"hold\n":
                    await reader.readline()
                else:
                    await asyncio.sleep(float(line or 0))
                writer.write(name.encode())
                await writer.drain()
            except (OSError, ValueError):
                pass
            finally:
                writer.close()

        start = asyncio.start_server(serve, "127.0.0.1", self.ports[name], backlog=1024)
        self._servers[name] = asyncio.run_coroutine_threadsafe(start, self._loop).result(LONG)

    def down(self, name: str) -> None:
        """Refuse connections; those that are open go on."""
        self._loop.call_soon_threadsafe(self._servers.pop(name).close)

    def relay(self, port: int, to: int) -> None:
        """Have connections to a port go on to another one, until the end."""

        async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                while data := await reader.read(1 << 16):
                    writer.write(data)
                    await writer.drain()
            except OSError:
                pass
            finally:
                writer.close()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                there, back = await asyncio.open_connection("127.0.0.1", to)
            except OSError:
                writer.close()
                return
            await asyncio.gather(copy(reader, back), copy(there, writer))

        start = asyncio.start_server(serve, "127.0.0.1", port)
        self._servers[f"relay {port}"] = asyncio.run_coroutine_threadsafe(start, self._loop).result(LONG)

    def close(self) -> None:
        for name in list(self._servers):
            self.down(name)

        async def cancel() -> None:
            for task in asyncio.all_tasks():
                if task is not asyncio.current_task():
                    task.cancel()

        asyncio.run_coroutine_threadsafe(cancel(), self._loop).result(LONG)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(LONG)
        self._loop.close()


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    made = Servers(["s1", "s2", "s3"])
    yield made
    made.close()


def applied(source: ProxySource, *weights: float, now: float = 0.1) -> None:
    """Put weights in force; a proxy that is slow to take them is asked again, as the publisher does."""
    until = time.monotonic() + LONG
    while True:
        try:
            return source.apply(np.array(weights), now)
        except DriverError:
            if time.monotonic() >= until:
                raise
            time.sleep(0.01)


class Driven:
    """A source with a clock."""

    def __init__(self, source: ProxySource) -> None:
        self.source, self.now = source, 0.0

    def read(self) -> Publication:
        self.now += 0.2
        seen = self.source.read(self.now)
        ended = seen.completed + seen.rejected + seen.failed
        np.testing.assert_array_equal(seen.started - ended, seen.stats[:, 0].astype(int))
        return seen

    def apply(self, *weights: float) -> None:
        self.now += 0.01
        applied(self.source, *weights, now=self.now)

    def settled(self, started: int) -> Publication:
        """Once so many flows have been counted and none is open."""
        seen = self.read()

        def done() -> bool:
            nonlocal seen
            seen = self.read()
            return seen.started.sum() >= started and not seen.stats[:, 0].any()

        eventually(done)
        return seen


def answer(client: socket.socket) -> str:
    """Of the server that holds the flow, which is over then."""
    with client:
        client.sendall(b"\n")
        return client.recv(100).decode()


class Client:
    """Of a proxy that listens on a port of 127.0.0.1."""

    port: int

    def weights(self) -> dict[str, int]:
        """The servers' whole weights, as the proxy has them."""
        raise NotImplementedError

    def flow(self, work: object = 0) -> str:
        """The name of the server that took a flow; empty if it failed."""
        with self.open(work) as client:
            try:
                return client.recv(100).decode()
            except OSError:
                return ""

    @contextmanager
    def open(self, work: object = 0) -> Iterator[socket.socket]:
        """A flow that has begun."""
        with closing(socket.create_connection(("127.0.0.1", self.port), LONG)) as client:
            client.sendall(f"{work}\n".encode())
            yield client


@contextmanager
def small_disk(folder: Path, options: str) -> Iterator[Path]:
    """A file system of its own, of which there is soon no more."""
    if os.geteuid() != 0:
        pytest.skip("only root mounts a file system to fill")
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no right to mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def command(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """``lbgym dataplane ARGUMENTS`` as a process."""
    process = subprocess.Popen(
        [sys.executable, "-m", "lbgym", "dataplane", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def hold_to_contract(
    process: subprocess.Popen[str],
    region: str,
    line: str,
    weights: Callable[[], dict[str, int]],
    flow: Callable[[], str],
    safe: dict[str, int],
) -> None:
    """Drive the servers s1, s2 and s3 of a command that has just been started, and hold it to the contract of drivers.

    Args:
        process: the command.
        region: its region.
        line: that it prints.
        weights: that the proxy has.
        flow: sends a flow through it, and returns the server's name.
        safe: weights at the end, that of s2 but for its drain.
    """
    assert process.stdout is not None
    assert process.stdout.readline() == line, process.communicate()[1]
    plane = SharedMemoryDataPlane(region, timeout=LONG)
    try:
        plane.reset()
        # An action moves the weights of a real proxy, and so its flows.
        plane.step(np.array([1.0, 1.0, 2.0]))
        eventually(lambda: weights() == {"s1": 1, "s2": 1, "s3": 2})
        served = [flow() for _ in range(40)]
        assert [served.count(server) for server in ("s1", "s2", "s3")] == [10, 10, 20]
        eventually(lambda: plane.step(np.array([1.0, 1.0, 2.0])).completed.tolist() == [10, 10, 20])
    finally:
        plane.close()
    control(region, {"op": "drain", "server": "s2"})
    states = {row["name"]: row["state"] for row in control(region, {"op": "list"})["servers"]}
    assert states == {"s1": "up", "s2": "draining", "s3": "up"}
    verdicts = check_driver(region, timeout=LONG, end=True)
    # A proxy dispatches by weights alone: there is no index to check.
    assert {verdict.check for verdict in verdicts if verdict.passed is None} <= {"index"}
    assert not [str(verdict) for verdict in verdicts if verdict.passed is False]
    assert process.wait(LONG) == 0
    assert weights() == safe


@contextmanager
def ten_lines(page: str, folder: Path, files: Sequence[str], names: Mapping[str, str]) -> Iterator[str]:
    """The first lines of a page, from installed packages on; yields what they have shown by then.

    Args:
        page: of the documentation.
        folder: to run them in.
        files: of deploy/ that they use.
        names: ports, paths and names in lines and files that others may have, and what to use instead.
    """
    lines = blocks(page, "sh")[0]
    assert len(lines.splitlines()) <= 10
    lines = "\n".join(line for line in lines.splitlines() if not line.startswith(("sudo apt install", "pip install")))
    names = {**names, "--name web": "--name web-ten", "--shm web": "--shm web-ten", "inspect web": "inspect web-ten"}

    def renamed(text: str) -> str:
        for old, new in names.items():
            text = text.replace(old, new)
        return text

    (folder / "deploy").mkdir()
    for file in files:
        (folder / "deploy" / file).write_text(renamed((ROOT / "deploy" / file).read_text()))
    program = folder / "lbgym"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m lbgym "$@"\n')
    program.chmod(0o755)
    shell = subprocess.Popen(
        ["bash", "-c", f"{renamed(lines)}\nread"],
        cwd=folder,
        env=os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert shell.stdout is not None
        shown = ""
        for line in shell.stdout:
            shown += line
            if line.startswith("web-3") and "started" in shown:
                break
        yield shown
    finally:
        os.killpg(shell.pid, signal.SIGTERM)
        shell.communicate()


def fetch(url: str) -> None:
    subprocess.run(["curl", "-s", url], stdout=subprocess.DEVNULL, timeout=LONG, check=True)


def check_weights_move_flows(driven: Driven, balancer: Client, servers: Sequence[str], rounds: int, off: float) -> None:
    """A new data plane of three servers, by a rule that takes them in turn; the third has all flows afterwards.

    Args:
        driven: which nothing has been done with.
        balancer: its proxy.
        servers: their names.
        rounds: of eight flows.
        off: how far weights may be off.
    """
    assert [row.name for row in driven.source.servers()] == list(servers)
    assert [row.weight for row in driven.source.servers()] == [100.0, 100.0, 100.0]
    driven.apply(1.0, 2.0, 5.0)
    assert balancer.weights() == dict(zip(servers, (1, 2, 5), strict=True))
    took = [balancer.flow() for _ in range(8 * rounds)]
    expected = [rounds, 2 * rounds, 5 * rounds]
    assert [took.count(name) for name in servers] == expected
    seen = driven.settled(8 * rounds)
    assert seen.started.tolist() == seen.completed.tolist() == expected
    driven.apply(0.1, 0.25, 0.3)
    shares = np.array(list(balancer.weights().values())) / np.array([0.1, 0.25, 0.3])
    assert shares.max() / shares.min() - 1.0 < off
    driven.apply(0.0, 0.0, 3.7)
    assert {balancer.flow() for _ in range(5)} == {servers[2]}


def check_every_flow_is_counted_once(driven: Driven, balancer: Client) -> None:
    """Whatever a flow is doing at the moment when the proxy is asked.

    Args:
        driven: which no flow has gone through.
        balancer: its proxy.
    """
    flows, begun = 500, 0

    def send() -> None:
        nonlocal begun
        while begun < flows:
            begun += 1
            balancer.flow()

    thread = threading.Thread(target=send)
    thread.start()
    while thread.is_alive():
        seen = driven.read()
        assert seen.started.sum() <= begun
    thread.join()
    seen = driven.settled(flows)
    assert seen.started.sum() == seen.completed.sum() == flows
