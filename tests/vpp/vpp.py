"""VPP with the plugin, in the namespace of a network's balancer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from lbgym.drivers.afpacket.build import compiler
from tests.drivers.xdp.network import PORT, VIP4, VIP6, Network, network

#: Where VPP is installed, and where ``make vpp-plugin`` has put the plugin.
PREFIX = os.environ.get("VPP_PREFIX", "")
BUILD = Path(os.environ.get("VPP_PLUGIN_BUILD", Path(__file__).parents[2] / "out" / "vpp"))
_HERE = Path(__file__).parent
_PLUGINS = ("af_packet", "lb", "ping")
Reply = Any


def missing() -> str:
    """Why these tests cannot run here; empty if they can."""
    if not PREFIX:
        return "no VPP here: make test-vpp VPP_PREFIX=..."
    if not Path(PREFIX, "bin", "vpp").exists():
        return f"there is no VPP in {PREFIX}"
    if not plugin_folder().is_dir():
        return f"there is no plugin in {BUILD}: make vpp-plugin VPP_PREFIX={PREFIX}"
    if os.geteuid():
        return "namespaces are for root"
    try:
        import vpp_papi  # noqa: F401
    except ImportError:
        return "no vpp_papi here: pip install 'lbgym[vpp]'"
    return ""


def plugin_folder() -> Path:
    return BUILD / "lib" / "vpp_plugins"


@cache
def _unpinned(folder: Path) -> Path:
    """A library with which more threads than processors can run."""
    out = folder / "threads.so"
    subprocess.run([*compiler(), "-O2", "-shared", "-fPIC", "-o", out, _HERE / "threads.c"], check=True)
    return out


class VppError(Exception):
    """What VPP says of a command that it refuses."""


class Vpp:
    """One VPP with an interface ``host-eth0``.

    Args:
        net: whose balancer it is.
        folder: for its files.
        workers: threads beside the main one.
        offload: whether segments and checksums are left to devices.
        queues: of the interface, over which the kernel spreads flows.
    """

    def __init__(self, net: Network, folder: Path, *, workers: int = 0, offload: bool = True, queues: int = 1) -> None:
        self.net, self.folder, self.workers = net, folder, workers
        self.offload, self.queues = offload, queues
        self.process: subprocess.Popen[str] | None = None
        #: Of the network, by name.
        self.servers: dict[str, subprocess.Popen[str]] = {}
        self._client: Any = None

    @property
    def version(self) -> str:
        return str(self.api.show_version().version)

    @property
    def api(self) -> Any:
        """Functions of the binary API, by the names of its messages."""
        return self._client.api

    def start(self) -> None:
        self.folder.mkdir(exist_ok=True)
        config = self.folder / "startup.conf"
        plugins = " ".join(f"plugin {name}_plugin.so {{ enable }}" for name in (*_PLUGINS, "lbgym"))
        installed = next(Path(PREFIX).glob("lib/**/vpp_plugins"))
        config.write_text(
            f"unix {{ nodaemon nosyslog runtime-dir {self.folder} cli-listen {self.folder}/cli.sock "
            f"log {self.folder}/vpp.log poll-sleep-usec 100 }}\n"
            f"api-segment {{ prefix {self.net.name('vpp')} }}\n"
            f"socksvr {{ socket-name {self.folder}/api.sock }}\n"
            f"statseg {{ socket-name {self.folder}/stats.sock size 32m }}\n"
            f"memory {{ main-heap-size 512M }}\nbuffers {{ page-size default buffers-per-numa 16384 }}\n"
            f"cpu {{ workers {self.workers} }}\n"
            f"plugins {{ path {installed}:{plugin_folder()} plugin default {{ disable }} {plugins} }}\n"
        )
        command = [Path(PREFIX, "bin", "vpp"), "-c", config]
        options: dict[str, Any] = {}
        processors = os.cpu_count() or 1
        if self.workers + 1 > processors:
            online = self.folder / "online"
            online.write_text(f"0-{self.workers}\n")
            mount = f'mount --bind {online} /sys/devices/system/cpu/online && exec "$@"'
            command = ["unshare", "--mount", "sh", "-c", mount, "sh", *command]
            options["env"] = {**os.environ, "LD_PRELOAD": str(_unpinned(self.folder))}
        self.process = self.net.start("balancer", *command, **options)
        self._connect()
        self.set_up()

    def _connect(self) -> None:
        from vpp_papi import VPPApiClient

        files = [*map(str, Path(PREFIX, "share", "vpp", "api").glob("**/*.json"))]
        files += [*map(str, BUILD.glob("**/lbgym.api.json"))][:1]
        self._client = VPPApiClient(
            apifiles=files, server_address=str(self.folder / "api.sock"), read_timeout=20, use_socket=True
        )
        until = time.monotonic() + 60.0
        assert self.process is not None
        while True:
            assert self.process.poll() is None, f"{self.process.communicate()} {(self.folder / 'vpp.log').read_text()}"
            try:
                self._client.connect("lbgym-tests")
                return
            except Exception:
                # It leaves the socket open then.
                if self._client.transport.socket is not None:
                    self._client.transport.socket.close()
                assert time.monotonic() < until, (self.folder / "vpp.log").read_text()
                time.sleep(0.05)

    def set_up(self) -> None:
        offload = "" if self.offload else " cksum-gso-disable"
        self.cli(f"create host-interface name eth0 num-rx-queues {self.queues}{offload}")
        self.cli("set interface state host-eth0 up")
        for address in ("10.77.0.2/16", "fd77::2/64"):
            self.cli(f"set interface ip address host-eth0 {address}")
        for subnet in ("10.78.0.0/16", "fd78::/64"):
            self.cli(f"ip route add {subnet} via host-eth0")

    def cli(self, command: str) -> str:
        """What a command prints.

        Raises:
            VppError: with what it says, if it is refused.
        """
        reply = self.api.cli_inband(cmd=command)
        if reply.retval != 0:
            raise VppError(reply.reply)
        return str(reply.reply)

    def stats(self, name: str) -> int:
        """A number of the stats segment."""
        from vpp_papi.vpp_stats import VPPStats

        segment = VPPStats(str(self.folder / "stats.sock"))
        try:
            found = segment.dump(segment.ls([f"^{name}$"]))
            assert found, f"no {name} in the stats segment"
            return int(found[name])
        finally:
            segment.disconnect()

    def vip(self, name: str, mode: str, *, ipv6: bool = False, words: str = "", servers: Sequence[str] = ()) -> None:
        """Add a VIP, and servers of the network, with further words of the command."""
        source = " source 10.77.0.2 source fd77::2" if mode in ("gre", "ipip") else ""
        vip = VIP6 if ipv6 else VIP4
        self.cli(f"lbgym vip add {name} {vip} {PORT} mode {mode} interval 0.05{source} {words}")
        if mode == "nat":
            self.cli("lbgym interface host-eth0")
        for server in servers or self.net.servers:
            self.add(name, server, ipv6=ipv6, words=f"port {PORT}" if mode == "nat" else "")

    def add(self, vip: str, server: str, *, ipv6: bool = False, words: str = "") -> None:
        number = int(server.rpartition("-")[2]) + 1
        address = f"fd77::1:{number}" if ipv6 else f"10.77.2.{number}"
        self.cli(f"lbgym server add {vip} {server} {address} {words}")

    def kill(self) -> None:
        """As a crash would."""
        self._disconnect()
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def stop(self) -> int:
        """As an operator would; returns the exit code."""
        assert self.process is not None
        self._disconnect()
        self.process.terminate()
        return self.process.wait(30)

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def _disconnect(self) -> None:
        if self._client is not None and self._client.transport is not None:
            self._client.disconnect()
        self._client = None


def prepare(net: Network, mode: str) -> None:
    """Give the balancer's interface to VPP, and have clients and servers send what is for it there."""
    net.run("balancer", "ip", "addr", "flush", "dev", "eth0")
    net.run("balancer", "sysctl", "-qw", "net.ipv6.conf.eth0.disable_ipv6=1")
    for vip, router in ((f"{VIP4}/32", "10.77.0.2"), (f"{VIP6}/128", "fd77::2")):
        net.run("client", "ip", "route", "add", vip, "via", router, "dev", "eth0")
    if mode in ("gre", "ipip"):
        for server in net.servers:
            process = net.start(server, sys.executable, "-I", _HERE / "decapsulate.py")
            assert process.stdout is not None and process.stdout.readline() == "ready\n"


@contextmanager
def balanced(folder: Path, mode: str, servers: int = 3, **options: Any) -> Iterator[tuple[Network, Vpp]]:
    """A network of clients and servers, and VPP between them."""
    with network(servers, dnat=mode == "nat", xdp=False) as net:
        prepare(net, mode)
        vpp = Vpp(net, folder / "vpp", **options)
        vpp.servers = {server: net.serve(server) for server in net.servers}
        try:
            vpp.start()
            yield net, vpp
        finally:
            vpp.kill()
            shutil.rmtree(folder / "vpp", ignore_errors=True)


def vpp_lb_toml(file: Path, name: str, servers: Sequence[str], driver: Mapping[str, Any]) -> None:
    """A configuration of ``lbgym dataplane vpp-lb`` for servers of a network."""
    lines = [f'name = "{name}"', "publish_interval = 0.05", "[driver]"]
    lines += [f"{key} = {json.dumps(value)}" for key, value in driver.items()]
    for server in servers:
        number = int(server.rpartition("-")[2]) + 1
        lines += ["[[servers]]", f'name = "{server}"', f'address = "10.77.2.{number}"']
        lines += ["ground_truth = { interval = 0.05 }"]
    file.write_text("\n".join(lines) + "\n")
