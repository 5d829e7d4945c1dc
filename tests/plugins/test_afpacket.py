"""Real TCP through the core on raw sockets, in network namespaces, by ``lbgym dataplane afpacket``."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from lbgym.drivers import DriverError
from lbgym.drivers.afpacket import AfPacketBalancer
from lbgym.drivers.afpacket.source import check_privileges
from lbgym.drivers.check import check_driver
from lbgym.drivers.config import load_config
from lbgym.drivers.control import control
from lbgym.errors import InvalidOptionError
from lbgym.lab.namespaces import inside, missing_tools
from lbgym.sharedmemory import ServerState, SharedMemoryRegion
from tests.drivers.test_discovery import eventually
from tests.drivers.xdp.network import (
    PORT,
    VIP4,
    VIP6,
    Network,
    balance,
    dataplane_toml,
    driver,
    network,
    newest,
    outcome,
)  # fmt: skip
from tests.privileges import skip_if

pytestmark = pytest.mark.slow


def missing() -> str:
    """Why there can be no such network here; empty if there can."""
    try:
        check_privileges()
    except DriverError as error:
        return str(error)
    return "namespaces are for root" if os.geteuid() else missing_tools()


@pytest.fixture(autouse=True)
def _needs_namespaces(library: object) -> None:
    skip_if(missing(), "the balancer on raw sockets")


@pytest.fixture
def name() -> str:
    return f"afpacket-test-{os.getpid()}"


@pytest.mark.parametrize(("mode", "ipv6"), [("dsr", True), ("dnat", False)])
def test_connections_are_balanced_and_the_contract_is_kept(mode: str, ipv6: bool, name: str, tmp_path: Path) -> None:
    with network(3, dnat=mode == "dnat", xdp=False) as net:
        servers = [net.serve(server) for server in net.servers]
        host = VIP6 if ipv6 else VIP4
        vip = f"[{host}]:{PORT}" if ipv6 else f"{host}:{PORT}"
        keys = {"vips": [vip], "mode": mode, "rule": "wcmp", "duration_sampling": 1.0}
        file = dataplane_toml(tmp_path / "dataplane.toml", name, net.servers, ipv6=ipv6, driver=keys)
        with driver(net, "--config", file, kind="afpacket") as process, SharedMemoryRegion.attach(name) as region:
            assert balance(net, region, host, 500).counters[:3, 1].sum() == 1000
            region.unlock_agent()
            clients = net.clients(100_000, host=host, lanes=1)
            verdicts = check_driver(name)
            assert [str(verdict) for verdict in verdicts if verdict.passed is False] == []
            clients.kill()
            for server in servers:
                server.kill()
                server.wait()
            transfer(net, host)
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0


#: Takes many bytes, of which the kernel makes segments that a device would cut, and returns as many.
TAKER = """
import socket, sys
with socket.create_server((sys.argv[1], int(sys.argv[2])), family=socket.AF_INET6, dualstack_ipv6=True) as listener:
    print("ready", flush=True)
    while True:
        connection, _ = listener.accept()
        taken = b"".join(iter(lambda: connection.recv(1 << 16), b""))
        connection.sendall(taken)
        connection.close()
"""
GIVER = """
import os, socket, sys
given = os.urandom(4 << 20)
with socket.create_connection((sys.argv[1], int(sys.argv[2])), 20) as connection:
    connection.sendall(given)
    connection.shutdown(socket.SHUT_WR)
    assert b"".join(iter(lambda: connection.recv(1 << 16), b"")) == given
"""


def transfer(net: Network, host: str) -> None:
    """With segments and checksums left to devices, and with neither."""
    for server in net.servers:
        process = net.start(server, sys.executable, "-I", "-c", TAKER, "::", PORT)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    net.run("client", sys.executable, "-I", "-c", GIVER, host, PORT)
    for part in ("client", *net.servers):
        net.run(part, "ethtool", "-K", "eth0", "tx", "off", "tso", "off")
    net.run("client", sys.executable, "-I", "-c", GIVER, host, PORT)


def test_servers_come_and_go_under_load(name: str, tmp_path: Path) -> None:
    with network(3, xdp=False) as net:
        processes = {server: net.serve(server) for server in net.servers}
        health = "[health]\ninterval = 0.05\nfall = 2\nrise = 1"
        file = dataplane_toml(tmp_path / "dataplane.toml", name, net.servers[:2], head=health)
        with driver(net, "--config", file, kind="afpacket") as process, SharedMemoryRegion.attach(name) as region:

            def states() -> list[str]:
                seen = newest(region)
                return [ServerState(row).name for row in seen.states[: seen.num_servers]]

            def taken(seconds: float = 0.3) -> list[int]:
                before = newest(region).counters[:3, 0].astype(int)
                time.sleep(seconds)
                return list(newest(region).counters[:3, 0].astype(int) - before)

            eventually(lambda: states() == ["UP"] * 2)
            # Connections that are held meanwhile stay where they are.
            held = net.clients(20, lanes=20, lines=30, pause=0.1)
            eventually(lambda: newest(region).stats[:, 0].sum() == 20)
            load = net.clients(100_000, lanes=2)
            control(name, {"op": "drain", "server": "server-0"})
            assert states()[0] == "DRAINING"
            eventually(lambda: (new := taken())[0] == 0 and new[1] > 0)
            control(name, {"op": "add", "server": "server-2", "address": "10.77.2.3", "port": PORT, "weight": 1.0})
            eventually(lambda: states() == ["DRAINING", "UP", "UP"])
            eventually(lambda: taken()[2] > 0)
            control(name, {"op": "undrain", "server": "server-0"})
            # A file without server-1 and server-2: SIGHUP removes them.
            dataplane_toml(file, name, ["server-0"], head=health)
            process.send_signal(signal.SIGHUP)
            eventually(lambda: states() == ["UP", "DRAINING", "DRAINING"])
            eventually(lambda: (new := taken())[0] > 0 and not any(new[1:]))
            processes["server-2"].kill()
            load.kill()
            answered, failed, moved = outcome(held)
            assert (failed, moved, sum(answered.values())) == ([], 0, 20)


def test_bad_input_forwards_nothing(name: str, tmp_path: Path) -> None:
    with network(1, xdp=False) as net, inside(net.name("balancer")):
        file = tmp_path / "dataplane.toml"
        cases: list[tuple[dict[str, object], type[Exception], str]] = [
            ({"interfaces": ["eth9"]}, DriverError, "there is no interface 'eth9'; there are eth0, lo"),
            ({"interfaces": ["lo"]}, DriverError, "interface 'lo' is no Ethernet interface"),
            ({"vips": ["10.77.0.2:80"]}, DriverError, "the VIP 10.77.0.2 is an address of this machine, whose kernel"),
            ({"keep": True}, InvalidOptionError, "keep is for lbgym dataplane xdp only"),
            ({"attach": "generic"}, InvalidOptionError, "attach is for lbgym dataplane xdp only"),
        ]
        for keys, error, message in cases:
            config = load_config(dataplane_toml(file, name, net.servers, driver=keys))
            with pytest.raises(error, match=message):
                AfPacketBalancer(config, None, file)
        config = load_config(dataplane_toml(file, name, net.servers))
        net.run("balancer", "sysctl", "-qw", "net.ipv4.conf.eth0.forwarding=1")
        with pytest.raises(DriverError, match=r"set net\.ipv4\.conf\.eth0\.forwarding=0"):
            AfPacketBalancer(config, None, file)
        net.run("balancer", "sysctl", "-qw", "net.ipv4.conf.eth0.forwarding=0")
        balancer = AfPacketBalancer(config, None, file)
        assert balancer.totals()["failed"] == 0
        balancer.close()
        balancer.close()
        with pytest.raises(DriverError, match="the afpacket balancer is closed"):
            balancer.totals()
