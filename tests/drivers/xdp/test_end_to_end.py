"""Real TCP through the driver, in network namespaces."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks import xdp_changes
from lbgym.drivers import DriverError
from lbgym.drivers.check import check_driver
from lbgym.drivers.control import control
from lbgym.drivers.xdp import XdpOptions, detach
from lbgym.drivers.xdp.options import default_pin_folder
from lbgym.drivers.xdp.plane import XdpPlane
from lbgym.drivers.xdp.tables import IndexInputs, index_table
from lbgym.lab.namespaces import missing_tools
from lbgym.sharedmemory import ServerState, SharedMemoryRegion
from tests.chance import as_likely
from tests.drivers.test_discovery import eventually
from tests.drivers.xdp.network import (
    PORT,
    VIP4,
    VIP6,
    Network,
    balance,
    dataplane_toml,
    driver,
    has_program,
    network,
    newest,
    outcome,
)  # fmt: skip
from tests.privileges import skip_if

pytestmark = [pytest.mark.xdp, pytest.mark.slow]


@pytest.fixture(autouse=True)
def _needs_namespaces(_needs_xdp: None) -> None:
    skip_if(missing_tools(), "the tests of XDP")


@pytest.fixture
def name() -> Iterator[str]:
    """Of a region; nothing is left pinned under it."""
    chosen = f"xdp-test-{os.getpid()}"
    yield chosen
    detach(chosen)


def refused(net: Network, message: str, *arguments: object) -> None:
    """The driver ends before it is ready, with a message."""
    with pytest.raises(DriverError, match=message), driver(net, *arguments):
        pass


@pytest.mark.parametrize("ipv6", [False, True], ids=["ipv4", "ipv6"])
@pytest.mark.parametrize("mode", ["dsr", "dnat"])
def test_connections_are_balanced_while_weights_change(mode: str, ipv6: bool, name: str, tmp_path: Path) -> None:
    with network(3, dnat=mode == "dnat") as net:
        for server in net.servers:
            net.serve(server)
        vip = f"[{VIP6}]:{PORT}" if ipv6 else f"{VIP4}:{PORT}"
        keys = {"vips": [vip], "mode": mode, "rule": "wcmp", "duration_sampling": 1.0}
        file = dataplane_toml(tmp_path / "dataplane.toml", name, net.servers, ipv6=ipv6, driver=keys)
        host = VIP6 if ipv6 else VIP4
        with driver(net, "--config", file) as process, SharedMemoryRegion.attach(name) as region:
            assert balance(net, region, host, 1000).fct_sum_ns > 1000 * 20_000_000
            assert has_program(net)
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0
        assert not has_program(net) and not XdpOptions(vips=(vip,), interfaces=("-",)).pin_folder(name).exists()


def test_the_driver_keeps_the_contract(name: str, tmp_path: Path) -> None:
    with network(2) as net:
        for server in net.servers:
            net.serve(server)
        keys = {"rule": "marginal"}
        file = dataplane_toml(
            tmp_path / "dataplane.toml", name, net.servers, head="[health]\ninterval = 0.1", driver=keys
        )
        # The second server has cores by its configuration; the first has those that the agent says.
        file.write_text(file.read_text() + "cores = 4\n")
        with driver(net, "--config", file):
            with SharedMemoryRegion.attach(name) as agent:
                eventually(lambda: (newest(agent).states[:2] == ServerState.UP).all())
                weights, background = np.array([3.0, 2.0]), np.array([0.25, 5.0])
                index = np.stack([weights / [3.0, 1.0], background], axis=1)
                agent.write_action(sequence_id=1, weights=weights, index=index, lease=60.0)
                eventually(lambda: newest(agent).applied_sequence_id == 1)
                plane = XdpPlane.take_over(default_pin_folder(name))
                inputs = IndexInputs(cores=np.array([3.0, 4.0]), background=background)
                expected = index_table("marginal", weights, np.ones(2, np.bool_), inputs)
                np.testing.assert_array_equal(plane._indices[plane.bank][:, :2], expected)
                plane.close()
            clients = net.clients(100_000, lanes=2)
            verdicts = check_driver(name, end=True)
            assert [str(verdict) for verdict in verdicts if not verdict.passed] == []
            by_index = next(verdict.detail for verdict in verdicts if verdict.check == "index")
            assert not by_index.startswith("none of 0 flows")
            clients.kill()


def test_servers_come_and_go_under_load(name: str, tmp_path: Path) -> None:
    with network(4) as net:
        processes = {server: net.serve(server) for server in net.servers}
        file = dataplane_toml(
            tmp_path / "dataplane.toml", name, net.servers[:3], head="[health]\ninterval = 0.05\nfall = 2\nrise = 1"
        )
        with driver(net, "--config", file) as process, SharedMemoryRegion.attach(name) as region:

            def states() -> list[str]:
                seen = newest(region)
                return [ServerState(row).name for row in seen.states[: seen.num_servers]]

            def check_taken(taking: list[int], out: list[int]) -> None:
                """From now on some servers take flows, and some none; clients may be slow to begin any."""
                before = newest(region).counters[:4, 0].astype(int)

                def all_do() -> bool:
                    time.sleep(0.3)
                    taken = newest(region).counters[:4, 0].astype(int) - before
                    assert not taken[out].any(), taken
                    return bool((taken[taking] > 0).all())

                eventually(all_do)

            eventually(lambda: states() == ["UP"] * 3)
            # Connections that are held meanwhile stay where they are.
            held = net.clients(30, lanes=30, lines=1 << 20, pause=0.1)
            eventually(lambda: newest(region).stats[:, 0].sum() == 30)
            load = net.clients(100_000, lanes=4)

            control(name, {"op": "drain", "server": "server-0"})
            assert states()[0] == "DRAINING"
            check_taken([1, 2], [0])

            for server, address, message in (
                ("server-9", "10.77.2.3", "servers 'server-2' and 'server-9' have the same address, 10.77.2.3"),
                ("server-9", VIP4, f"the address of server 'server-9', {VIP4}, is a VIP's"),
                ("server-2", "10.77.2.9", "server 'server-2' has the address 10.77.2.3 port 8080 and cannot get"),
            ):
                with pytest.raises(DriverError, match=message):
                    control(name, {"op": "add", "server": server, "address": address, "port": PORT})
            control(name, {"op": "add", "server": "server-3", "address": "10.77.2.4", "port": PORT, "weight": 1.0})
            eventually(lambda: states() == ["DRAINING", "UP", "UP", "UP"])
            # It has no flows yet, and the others those that are held.
            check_taken([3], [0])

            control(name, {"op": "remove", "server": "server-1"})
            check_taken([3], [0, 1])
            control(name, {"op": "undrain", "server": "server-0"})

            # A file that leaves out server-2: SIGHUP removes it, adds server-1 again, and keeps server-0.
            dataplane_toml(file, name, ["server-0", "server-1"], head="[health]\ninterval = 0.05\nfall = 2\nrise = 1")
            process.send_signal(signal.SIGHUP)
            eventually(lambda: states() == ["UP", "UP", "DRAINING", "DRAINING"])
            processes["server-1"].kill()
            processes["server-1"].wait()  # Until then its socket takes connections still.
            eventually(lambda: states() == ["UP", "DOWN", "DRAINING", "DRAINING"])
            check_taken([0], [1, 2, 3])
            load.kill()
            held.terminate()
            answered, failed, moved = outcome(held)
            # Those at the server that was killed could not end well, and they alone.
            assert moved == 0 and len(failed) <= 11 and sum(answered.values()) + len(failed) == 30
            assert answered["server-1"] == 0 and answered["server-0"] >= 9 and answered["server-2"] >= 9


def test_traffic_survives_the_driver_and_the_next_one_takes_over(name: str, tmp_path: Path) -> None:
    with network(2) as net:
        for server in net.servers:
            net.serve(server)
        file = dataplane_toml(tmp_path / "dataplane.toml", name, net.servers, driver={"orphan_timeout": 0.5})
        with driver(net, "--config", file) as process:
            refused(net, f"another driver runs the balancer pinned in .*{name}", "--config", file)
            with pytest.raises(DriverError, match="runs; end it first"):
                detach(name)
            held = net.clients(10, lanes=10, lines=30, pause=0.1)
            load = net.clients(1500, lanes=4, pause=0.001)
            with SharedMemoryRegion.attach(name) as region:
                eventually(lambda: int(newest(region).counters[:, 0].sum()) > 100)
            process.kill()
            process.wait()
        assert has_program(net)
        time.sleep(1.0)
        # In another order, and with one more: rows stay.
        dataplane_toml(file, name, ["server-1", "server-0"], driver={"orphan_timeout": 0.5})
        with driver(net, "--config", file) as process, SharedMemoryRegion.attach(name) as region:
            eventually(lambda: region.server_names == ("server-0", "server-1") and bool(newest(region)))
            assert int(newest(region).counters[:, 0].sum()) > 100
            for clients, count in ((load, 1500), (held, 10)):
                answered, failed, moved = outcome(clients)
                assert (sum(answered.values()), failed, moved) == (count, [], 0)
            eventually(lambda: not newest(region).stats[:, 0].any())
            assert int(newest(region).counters[:, 0].sum()) == 1510
            process.kill()
            process.wait()
        # Other sizes cannot be taken over, and what is there stays at work.
        dataplane_toml(file, name, net.servers, driver={"flows": 1024})
        refused(net, r"loaded with other sizes \(flows: 262144, not 1024\)", "--config", file)
        assert outcome(net.clients(20))[1] == []
        assert detach(name) and not has_program(net) and not detach(name)


def test_the_safe_weights_follow_an_agent_that_is_killed() -> None:
    """``benchmarks/xdp_changes.py``, in small; servers and drivers that come and go are above."""
    rows = xdp_changes.agent_is_killed(lanes=4)
    assert xdp_changes.check(rows), rows


def test_maglev_moves_few_who_need_not_move() -> None:
    rows = xdp_changes.maglev_moves_few(400, 4)
    assert xdp_changes.check(rows), rows


def test_bad_input_attaches_nothing(name: str, tmp_path: Path) -> None:
    with network(2) as net:
        file = tmp_path / "dataplane.toml"
        cases = [
            ({"interfaces": ["eth9"]}, "there is no interface 'eth9'; there are eth0, lo"),
            ({"interfaces": ["lo"]}, "interface 'lo' is no Ethernet interface"),
            ({"object": "/nowhere.o"}, "the XDP object /nowhere.o cannot be read: No such file"),
        ]
        for keys, message in cases:
            dataplane_toml(file, name, net.servers, driver=keys)
            refused(net, message, "--config", file)
            assert not has_program(net)
        net.run("balancer", "ip", "link", "add", "v0", "type", "veth", "peer", "v1")
        dataplane_toml(file, name, net.servers, driver={"interfaces": ["v0"]})
        with driver(net, "--config", file):
            other = dataplane_toml(tmp_path / "2.toml", f"{name}-2", net.servers, driver={"interfaces": ["eth0", "v0"]})
            refused(net, "interface v0 already has an XDP program; detach it first", "--config", other)
            assert not has_program(net)


def test_options_instead_of_a_file(name: str) -> None:
    with network(2, dnat=True) as net:
        for server in net.servers:
            net.serve(server)
        servers = [f"--server=server-{i}=10.77.2.{i + 1}:{PORT},weight={i + 1}" for i in range(2)]
        options = ("--name", name, "--vip", f"{VIP4}:80", *servers, "--interface", "eth0", "--mode", "dnat")
        with driver(net, *options, "--rule", "maglev") as process, SharedMemoryRegion.attach(name) as region:
            answered, failed, _ = outcome(net.clients(600, port=80))
            assert failed == [] and sum(answered.values()) == 600
            assert as_likely([answered[server] for server in net.servers], [1 / 3, 2 / 3])
            assert region.publish_interval == 0.2 and newest(region).safe_weights[:2].tolist() == [1.0, 2.0]
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0
