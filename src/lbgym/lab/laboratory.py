"""A laboratory on this machine: :class:`Laboratory`."""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ..drivers.control import control_path
from ..drivers.server_agent import busy_workers
from ..errors import InvalidOptionError, LbgymError
from ..sharedmemory import SharedMemoryRegion, region_names, remove_region
from . import generator
from .base import LabError, check_name, check_root
from .calibration import calibrate
from .cgroups import CpuGroup, missing_controllers
from .config import LabConfig, load_lab, write_lab
from .data_planes import LabDataPlane, data_plane
from .generator import Outcome
from .namespaces import Network, inside, missing_tools
from .place import VIP, VIP_PORT, Place
from .servers import BACKLOG, PORT, WORKERS, Instance, open_to_workers, server_kind

#: Where laboratories keep what belongs to them: on a machine that has just started, none is there.
ROOT = Path("/run/lbgym/lab")
_GROUPS = "lbgym-lab"
_CLIENT = "client"
#: Seconds to wait for servers and drivers.
_PATIENCE = 60.0


class Laboratory:
    """Clients, balancers and servers in network namespaces of this machine.

    A laboratory is up from :meth:`up` until :meth:`down`, whoever calls them: :meth:`attach` opens one that is up. What
    belongs to it is found by its name: namespaces, control groups with all processes in them, a folder below
    ``/run/lbgym/lab``, regions. So :meth:`down` also removes what is left of one whose process was killed.

    As long as it is open, nobody else can use it.

    Args:
        config: of the laboratory.

    Attributes:
        config: as given; with the calibration once it is up.
        regions: names of the balancers' regions.
    """

    def __init__(self, config: LabConfig) -> None:
        self.config = config
        name = config.name
        self.folder = ROOT / name
        self.network = Network(f"lbgym.{name}.")
        self._plane = data_plane(config.data_plane)
        self._kind = server_kind(config.server_kind)
        self.regions = tuple(f"lab-{name}-{i}" for i in range(config.scenario.balancers))
        self.server_names = tuple(f"server-{i}" for i in range(config.scenario.num_servers))
        self._groups = {name: CpuGroup(f"{_GROUPS}/{config.name}/{name}") for name in self.server_names}
        self._control = CpuGroup(f"{_GROUPS}/{config.name}/control")
        self._drivers: list[subprocess.Popen[bytes]] = []
        self._lock = -1

    @classmethod
    def attach(cls, name: str, *, shared: bool = False) -> Self:
        """Open a laboratory that is up.

        Args:
            name: of it.
            shared: only to look at it, while another process may use it.

        Raises:
            LabError: if it is not up, or another process uses it.
        """
        check_root()
        check_name(name)
        lock = -1 if shared else _locked(name)
        try:
            if not (ROOT / name / "up").exists():
                left = " completely; lbgym lab down removes what there is" if (ROOT / name).is_dir() else ""
                raise LabError(f"laboratory {name!r} is not up{left}")
            made = cls(load_lab(ROOT / name / "lab.toml"))
        except BaseException:
            if lock >= 0:
                os.close(lock)
            raise
        made._lock = lock
        return made

    def close(self) -> None:
        """Let others use it; idempotent."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Up and down

    def up(self) -> None:
        """Set it up, removing what one of this name that was killed has left, and calibrate it if need be.

        If this process is killed meanwhile, another one removes what there is. Afterwards nothing depends on it.

        Raises:
            LabError: if something is missing or the name is in use; nothing is left then.
            DriverError: from the data plane's driver.
        """
        check_root()
        for reason in (missing_tools(), missing_controllers(), self._kind.missing(), self._plane.missing()):
            if reason:
                raise LabError(reason)
        self._lock = _locked(self.config.name)
        try:
            if (self.folder / "up").exists() and self._alive():
                raise LabError(f"laboratory {self.config.name!r} is up: end it by lbgym lab down {self.config.name}")
            self._remove()
            with self.guarded():
                try:
                    self._set_up()
                except BaseException:
                    self._remove()
                    raise
        except BaseException:
            self.close()
            raise

    def _set_up(self) -> None:
        self.folder.mkdir(parents=True, mode=0o755)
        balancers = [f"balancer-{i}" for i in range(len(self.regions))]
        addresses = {_CLIENT: ["10.78.0.1/16"]}
        addresses |= {part: [f"{self._balancer_address(i)}/16"] for i, part in enumerate(balancers)}
        addresses |= {name: [f"{address}/16"] for name, address, _ in self._servers()}
        self.network.create(addresses)
        self._route(balancers)
        for i, name in enumerate(self.server_names):
            self._start_server(i, name)
        self._control.create()
        for name, address, _ in self._servers():
            self._await_server(name, address)
        for group, share in zip(self._groups.values(), self.config.shares(), strict=True):
            group.limit(share, self.config.period)
        for i in range(len(self.regions)):
            self._plane.prepare(self._place(i))
        if self.config.calibration is None:
            self.config = replace(self.config, calibration=calibrate(self))
        write_lab(self.config, self.folder / "scenario.toml", self.folder / "lab.toml")
        self.start_balancers(self._idle_rule, detached=True)
        (self.folder / "up").touch()

    def _route(self, balancers: Sequence[str]) -> None:
        net = self.network
        translates = self._plane.translates(self.config.driver)
        net.sysctl(_CLIENT, **{"net.ipv4.fib_multipath_hash_policy": 1})
        run = net.command(_CLIENT, "sysctl", "-qw", "net.ipv4.ip_local_port_range=2000 65535")
        subprocess.run(run, check=True, capture_output=True)
        net.ip("route", "add", "10.77.0.0/16", "dev", "eth0", part=_CLIENT)
        hops = [["nexthop", "via", self._balancer_address(i), "dev", "eth0"] for i in range(len(balancers))]
        # ECMP over the balancers, by the hash of addresses and ports.
        net.ip("route", "add", f"{VIP}/32", *(word for hop in hops for word in hop), part=_CLIENT)
        for part in balancers:
            net.ip("route", "add", "10.78.0.0/16", "dev", "eth0", part=part)
            net.add_address(part, f"{VIP}/32", "lo")
            # Or else servers would learn that they need not answer through it.
            redirects = {f"net.ipv4.conf.{device}.send_redirects": 0 for device in ("all", "eth0")}
            net.sysctl(part, **{"net.ipv4.ip_forward": 1} | redirects)
        for part in self.server_names:
            via = ["via", self._balancer_address(0)] if translates else []
            net.ip("route", "add", "10.78.0.0/16", *via, "dev", "eth0", part=part)
            net.sysctl(part, **{"net.core.somaxconn": 4096})
            if not translates:
                net.hold_vip(part, f"{VIP}/32")

    @staticmethod
    def _balancer_address(i: int) -> str:
        return f"10.77.{4 + i // 250}.{i % 250 + 2}"

    def _servers(self) -> list[tuple[str, str, int]]:
        return [(name, f"10.77.{16 + i // 250}.{i % 250 + 1}", PORT) for i, name in enumerate(self.server_names)]

    def _start_server(self, i: int, name: str) -> None:
        stated = self.config.scenario.servers[i]
        folder = self.folder / name
        folder.mkdir()
        workers = WORKERS if stated.workers is None else stated.workers
        backlog = BACKLOG if stated.backlog is None else stated.backlog
        command = self._kind.prepare(Instance(name, folder, workers, backlog, stated.cores))
        open_to_workers(folder)
        group = self._groups[name]
        group.create()
        self._detach(name, command, group, folder / "output.log")

    def _await_server(self, name: str, address: str) -> None:
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                with self._connection(address) as connection:
                    connection.request("GET", self._kind.status)
                    connection.getresponse().read()
                return
            except OSError as error:
                if not self._groups[name].processes or time.monotonic() > deadline:
                    logs = [self.folder / name / log for log in ("output.log", "error.log")]
                    said = next((line for log in logs if (line := _last_line(log))), str(error))
                    raise LabError(f"{name} ({self.config.server_kind}) does not answer: {said}") from None
                time.sleep(0.02)

    @contextmanager
    def _connection(self, address: str) -> Iterator[http.client.HTTPConnection]:
        """To a server, from the clients' namespace: a socket stays in the namespace in which it was made."""
        connection = http.client.HTTPConnection(address, PORT, timeout=5.0)
        with inside(self.network.name(_CLIENT)):
            connection.connect()
        try:
            yield connection
        finally:
            connection.close()

    def _detach(self, part: str, command: Sequence[str], group: CpuGroup, log: Path) -> None:
        """Have a command run in a part of the network and a control group, whatever becomes of this process."""
        # It is in its group by the time that this returns.
        whole = self.network.command(part, *group.command("setsid", "--fork", *command))
        with log.open("ab") as stream:
            subprocess.run(whole, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, cwd="/", check=True)

    def _spawn(
        self, part: str, command: Sequence[str], group: CpuGroup, log: Path, **streams: int
    ) -> subprocess.Popen[bytes]:
        """Run a command in a part of the network and a control group; it dies with this process."""
        whole = ["setpriv", "--pdeathsig", "KILL", *self.network.command(part, *group.command(*command))]
        with log.open("ab") as stream:
            all_streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": stream, "stderr": stream} | streams
            return subprocess.Popen(whole, start_new_session=True, cwd="/", **all_streams)

    def _place(self, i: int) -> Place:
        config = self.config
        return Place(
            self.network, f"balancer-{i}", self.regions[i], self._servers(), config.scenario, config.driver,
            config.publish_interval, self.folder,
        )  # fmt: skip

    @property
    def _idle_rule(self) -> str:
        """Dispatch rule outside of runs: the scenario's, where the data plane has it."""
        rule = self.config.scenario.dispatch
        return rule if rule in self.rules else self.rules[0]

    @property
    def rules(self) -> Sequence[str]:
        """Dispatch rules that the data plane has."""
        return self._plane.rules

    def start_balancers(self, rule: str, *, detached: bool = False) -> None:
        """Start the drivers of all balancers, their flows, counters and samples empty.

        Args:
            rule: dispatch rule.
            detached: let them go on after this process; else they end with it, however it ends.

        Raises:
            LabError: if one ends or does not publish in time, with what it said.
        """
        self.stop_balancers()
        for i in range(len(self.regions)):
            place = self._place(i)
            log = self.folder / f"{place.part}.log"
            log.unlink(missing_ok=True)
            command = ["nice", "-n", "-10", *self._plane.command(place, rule)]
            if detached:
                self._detach(place.part, command, self._control, log)
            else:
                self._drivers.append(self._spawn(place.part, command, self._control, log))
        deadline = time.monotonic() + _PATIENCE
        for i, region in enumerate(self.regions):
            while True:
                with contextlib.suppress(LbgymError):
                    SharedMemoryRegion.attach(region, live=True, read_only=True).close()
                    break
                running = len(self._control.processes) if detached else [p.poll() for p in self._drivers].count(None)
                if running < len(self.regions) or time.monotonic() > deadline:
                    said = _last_line(self.folder / f"balancer-{i}.log") or "nothing"
                    raise LabError(f"the driver of balancer {i} ({self.config.data_plane}) does not start: {said}")
                time.sleep(0.02)

    def stop_balancers(self) -> None:
        """End the drivers, also those that another process started."""
        for process in self._drivers:
            process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + _PATIENCE
        for process in self._drivers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, deadline - time.monotonic()))
        self._drivers.clear()
        others = self._control.processes
        for pid in others:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        while self._control.processes:
            if time.monotonic() > deadline:
                for pid in self._control.processes:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        for region in self.regions:
            self._plane.clear(region)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Within the block: if this process is killed, another one removes the laboratory."""
        # It waits for the end of this process, or of the block, at the other end of a pipe.
        script = 'read line || exec "$@" 2>/dev/null'
        command = [sys.executable, "-m", "lbgym", "lab", "down", self.config.name]
        watchdog = subprocess.Popen(
            ["sh", "-c", script, "sh", *command],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True, cwd="/",
        )  # fmt: skip
        assert watchdog.stdin is not None
        try:
            yield
        finally:
            with contextlib.suppress(BrokenPipeError):
                watchdog.stdin.write(b"\n")
                watchdog.stdin.close()
            watchdog.wait()

    @contextmanager
    def temporarily(self) -> Iterator[None]:
        """Have it up within the block, and removed after it, however this process ends."""
        with self.guarded():
            self.up()
            try:
                yield
            finally:
                self.down()

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Start the balancers anew after the block, as they are outside of runs."""
        try:
            yield
        finally:
            self.start_balancers(self._idle_rule, detached=True)

    def down(self) -> None:
        """Remove it."""
        self._remove()
        self.close()

    def _alive(self) -> bool:
        return any(group.processes for group in self._groups.values())

    def _remove(self) -> bool:
        for process in self._drivers:
            process.kill()
            process.wait()
        self._drivers.clear()
        return _remove_all(self.config.name, self.regions, self._plane)

    # Use

    def generate(
        self,
        flows: dict[str, NDArray[Any]],
        *,
        counted: int,
        duration: float,
        limit: float,
        address: tuple[str, int] = (VIP, VIP_PORT),
        delay: float = 0.2,
        stopped: Any = None,
    ) -> tuple[Outcome, float, NDArray[np.float64]]:
        """Have the clients generate flows.

        Args:
            flows: ``arrival`` float64[n], seconds, and ``amount`` int64[n].
            counted: flows that are followed to their end, the first ones.
            duration: seconds during which flows are begun in any case.
            limit: seconds after which it ends at the latest.
            address: to connect to.
            delay: seconds from the readiness of the generator to its time 0.
            stopped: called ten times a second with the seconds since time 0.

        Returns:
            The outcome; time 0 in seconds of the monotonic clock; and each server's CPU seconds from then to the end.

        Raises:
            LabError: if the generator fails.
        """
        file = self.folder / "load.json"
        requests = [self._kind.request(int(amount)) for amount in flows["amount"]]
        timeout = self.config.scenario.reject_timeout
        generator.write_job(
            file, address, flows["arrival"], requests, counted=counted, duration=duration, timeout=timeout, limit=limit
        )
        log = self.folder / "load.log"
        log.unlink(missing_ok=True)
        command = ["nice", "-n", "-15", sys.executable, "-m", "lbgym.lab.generator", str(file)]
        process = self._spawn(_CLIENT, command, self._control, log, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdin is not None and process.stdout is not None
        try:
            if process.stdout.readline() != b"ready\n":
                process.wait()
                raise LabError(f"the load generator does not start: {_last_line(log)}")
            start = time.monotonic() + delay
            process.stdin.write(f"{start!r}\n".encode())
            process.stdin.close()
            before = self.used()
            while True:
                try:
                    process.wait(0.1)
                    break
                except subprocess.TimeoutExpired:
                    if stopped is not None:
                        stopped(time.monotonic() - start)
            if process.returncode != 0:
                raise LabError(f"the load generator failed: {_last_line(log)}")
            return generator.read_outcome(file), start, self.used() - before
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            process.stdout.close()
            if not process.stdin.closed:
                process.stdin.close()

    def used(self) -> NDArray[np.float64]:
        """CPU seconds that each server has used, float64[N]."""
        return np.array([self._groups[name].used for name in self.server_names])

    @property
    def server_addresses(self) -> list[tuple[str, int]]:
        """Where each server can be reached without a balancer."""
        return [(address, port) for _, address, port in self._servers()]

    def request(self, amount: int) -> bytes:
        """A request for so much work."""
        return self._kind.request(amount)

    @property
    def most(self) -> int:
        """Largest amount of a request."""
        return self._kind.most

    def status(self) -> dict[str, Any]:
        """The parts and how they are, as plain data."""
        live = set(region_names())
        servers = []
        for i, (name, address, _) in enumerate(self._servers()):
            busy: int | None = None
            with contextlib.suppress(OSError, LbgymError), self._connection(address) as connection:
                connection.request("GET", self._kind.status)
                busy = busy_workers(connection.getresponse().read())
            servers.append(
                {
                    "name": name,
                    "address": address,
                    "share": self.config.shares()[i],
                    "processes": len(self._groups[name].processes),
                    "cpu_seconds": self._groups[name].used,
                    "busy_workers": busy,
                }
            )
        calibration = self.config.calibration
        return {
            "name": self.config.name,
            "scenario": self.config.scenario.name,
            "data_plane": self.config.data_plane,
            "server_kind": self.config.server_kind,
            "vip": f"{VIP}:{VIP_PORT}",
            "client_namespace": self.network.name(_CLIENT),
            "regions": {region: region in live for region in self.regions},
            "servers": servers,
            "calibration": None
            if calibration is None
            else {
                "per_unit": calibration.per_unit,
                "fixed": calibration.fixed,
                "latency": calibration.latency,
                "unit": self._kind.unit,
            },
        }


def laboratories() -> list[str]:
    """Names of the laboratories that are up, or of which something is left."""
    return sorted(path.name for path in ROOT.iterdir() if path.is_dir()) if ROOT.is_dir() else []


def remove(name: str) -> bool:
    """Remove a laboratory, or what is left of one whose process was killed; returns if there was anything.

    Raises:
        LabError: if a process uses it.
    """
    check_root()
    lock = _locked(check_name(name))
    try:
        try:
            return Laboratory(load_lab(ROOT / name / "lab.toml"))._remove()
        except InvalidOptionError:
            # Killed before the file was written, which is before there are drivers.
            return _remove_all(name, (), None)
    finally:
        os.close(lock)


def _remove_all(name: str, regions: Sequence[str], plane: LabDataPlane | None) -> bool:
    found = CpuGroup(f"{_GROUPS}/{name}").remove()
    found |= Network(f"lbgym.{name}.").remove()
    for region in regions:
        if plane is not None:
            plane.clear(region)
        with contextlib.suppress(FileNotFoundError):
            remove_region(region)
            found = True
        control_path(region).unlink(missing_ok=True)
    folder = ROOT / name
    found |= folder.is_dir()
    shutil.rmtree(folder, ignore_errors=True)
    return found


def _locked(name: str) -> int:
    """A lock on a name, held until its descriptor is closed."""
    ROOT.mkdir(parents=True, exist_ok=True)
    file = ROOT / f".{name}.lock"
    handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(handle, 32).decode() or "unknown"
        os.close(handle)
        raise LabError(f"laboratory {name!r} is in use by process {owner}") from None
    os.ftruncate(handle, 0)
    os.pwrite(handle, str(os.getpid()).encode(), 0)
    return handle


def _last_line(file: Path) -> str:
    with contextlib.suppress(OSError):
        lines = [line for line in file.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1].removeprefix("lbgym: error: ") if lines else ""
    return ""
