"""Real TCP through VPP: connections, weights, offloads, threads, agents and restarts."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lbgym import LoadBalanceEnv
from lbgym.drivers.check import check_driver
from lbgym.lab.namespaces import inside
from lbgym.sharedmemory import ServerState, SharedMemoryRegion
from tests.drivers.test_discovery import eventually
from tests.drivers.xdp.network import PORT, VIP4, VIP6, Network, balance, newest, outcome
from tests.plugins.test_afpacket import transfer
from tests.vpp.vpp import Vpp, balanced

pytestmark = pytest.mark.vpp
MODES = ("dsr", "gre", "ipip", "nat")


@pytest.fixture
def name() -> str:
    return f"vpp-test-{os.getpid()}"


def check_balance(net: Network, vpp: Vpp, name: str, mode: str, *, ipv6: bool) -> None:
    vpp.vip(name, mode, ipv6=ipv6, words="rule wcmp duration-sampling 1")
    with SharedMemoryRegion.attach(name) as region:
        eventually(lambda: bool(newest(region).active[:3].all()))
        seen = balance(net, region, VIP6 if ipv6 else VIP4, 500)
        assert seen.counters[:3, 1].sum() == 1000 and not seen.counters[:3, 2:].any()


@pytest.mark.parametrize("ipv6", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_connections_are_balanced(mode: str, ipv6: bool, name: str, tmp_path: Path) -> None:
    with balanced(tmp_path, mode) as (net, vpp):
        check_balance(net, vpp, name, mode, ipv6=ipv6)
        shown = vpp.cli("show lbgym verbose")
        assert f"{name}: {VIP6 if ipv6 else VIP4} TCP port {PORT}, {mode}, wcmp, weights of the agent" in shown
        (of_vip,) = vpp.api.lbgym_vip_dump(name=name)
        assert (of_vip.rule, of_vip.servers, of_vip.has_agent) == ("wcmp", 3, True)
        assert (of_vip.unrouted, of_vip.untracked, of_vip.adopted, of_vip.unreachable) == (0, 0, 0, 0)
        rows = vpp.api.lbgym_server_dump(vip=name)
        assert [row.name for row in rows] == net.servers and sum(row.started for row in rows) == 1000
        assert [row.weight for row in rows] == [1.0, 2.0, 7.0] and rows[0].fct_mean > 0.0
        assert sum(row.completed for row in rows) == 1000 and not any(row.open_flows for row in rows)
        assert vpp.stats(f"/lbgym/{name}/server-0/started") == rows[0].started


@pytest.mark.parametrize(("mode", "ipv6"), [("dsr", False), ("gre", True), ("nat", False), ("nat", True)])
def test_two_workers_balance_together(mode: str, ipv6: bool, name: str, tmp_path: Path) -> None:
    with balanced(tmp_path, mode, workers=2, queues=2) as (net, vpp):
        check_balance(net, vpp, name, mode, ipv6=ipv6)
        runtime = vpp.cli("show runtime")
        node = "lbgym6" if ipv6 else "lbgym4"
        if mode == "nat":
            node += "-return"
            assert re.search(rf"[1-9]\d* +{node[:6]}\S* +packets handed over", vpp.cli("show errors"))
        assert len(re.findall(rf"^{node} +\w+ +\d+ +[1-9]", runtime, re.MULTILINE)) == 2, runtime


@pytest.mark.parametrize("mode", ["dsr", "nat"])
@pytest.mark.parametrize("offload", [True, False])
def test_megabytes_arrive_whole_with_offloads_and_without(mode: str, offload: bool, name: str, tmp_path: Path) -> None:
    with balanced(tmp_path, mode, offload=offload) as (net, vpp):
        if not offload:
            # What is left to devices then is nobody's work.
            for part in ("client", *net.servers):
                net.run(part, "ethtool", "-K", "eth0", "tx", "off", "tso", "off")
        vpp.vip(name, mode, words="rule wcmp")
        for process in vpp.servers.values():
            process.kill()
            process.wait()
        transfer(net, VIP4)


def test_the_contract_and_agents(name: str, tmp_path: Path) -> None:
    with balanced(tmp_path, "dsr") as (net, vpp):
        vpp.vip(name, "dsr", words="rule sed duration-sampling 1")
        load = net.clients(1_000_000, lanes=4, pause=0.005)
        eventually(lambda: sum(row.open_flows for row in vpp.api.lbgym_server_dump(vip=name)) > 0)
        assert [str(verdict) for verdict in check_driver(name) if verdict.passed is False] == []
        env = LoadBalanceEnv(shm_name=name)
        env.reset(seed=0)
        for _ in range(3):
            observation, *_ = env.step(env.action_space.sample())
        assert np.asarray(observation["n_flow_on"] if isinstance(observation, dict) else observation).any()
        env.close()
        run = subprocess.run(
            [sys.executable, "-m", "lbgym", "run", "--policy", "adaptive", "--shm", name, "--steps", "5"],
            capture_output=True, text=True,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        load.terminate()
        answered, failed, moved = outcome(load)
        assert (failed, moved) == ([], 0) and len(answered) == 3


AGENT = """
import sys, time
from lbgym.sharedmemory import SharedMemoryRegion
with SharedMemoryRegion.attach(sys.argv[1]) as region:
    for turn in range(1, 1000):
        region.write_action(sequence_id=turn, weights=[0.0, 0.0, 1.0], lease=1.0)
        if turn == 1:
            print("ready", flush=True)
        time.sleep(0.2)
"""


def test_safe_weights_follow_an_agent_that_is_killed(name: str, tmp_path: Path) -> None:
    with balanced(tmp_path, "nat") as (net, vpp):
        vpp.vip(name, "nat", words="rule wcmp")
        vpp.cli(f"lbgym server weight {name} server-2 0")
        agent = subprocess.Popen([sys.executable, "-c", AGENT, name], stdout=subprocess.PIPE, text=True)
        assert agent.stdout is not None and agent.stdout.readline() == "ready\n"
        with SharedMemoryRegion.attach(name) as region:
            load = net.clients(1_000_000, lanes=8, pause=0.01)

            def taken() -> list[int]:
                before = newest(region).counters[:3, 0].astype(int)
                time.sleep(0.3)
                return list(newest(region).counters[:3, 0].astype(int) - before)

            eventually(lambda: (new := taken())[2] > 0 and not any(new[:2]))
            agent.kill()
            agent.communicate()
            # No packet is needed for that.
            eventually(lambda: newest(region).weights[:3].tolist() == [1.0, 1.0, 0.0])
            eventually(lambda: (new := taken())[2] == 0 and all(new[:2]))
            load.terminate()
            _, failed, moved = outcome(load)
            assert (failed, moved) == ([], 0)


def test_weights_end_with_the_lease_where_no_packet_comes(name: str, tmp_path: Path) -> None:
    with balanced(tmp_path, "dsr") as (_, vpp):
        vpp.vip(name, "dsr")
        with SharedMemoryRegion.attach(name) as region:
            region.write_action(sequence_id=1, weights=[1.0, 2.0, 3.0], lease=0.3)
            eventually(lambda: newest(region).weights[:3].tolist() == [1.0, 2.0, 3.0])
            eventually(lambda: newest(region).weights[:3].tolist() == [1.0, 1.0, 1.0])
            first, then = newest(region), newest(region)
            assert then.sequence_id == first.sequence_id + 1


def test_vpp_is_killed_and_comes_back(name: str, tmp_path: Path) -> None:
    with balanced(tmp_path, "dsr") as (net, vpp):
        vpp.vip(name, "dsr", words="rule wcmp")
        agent = subprocess.Popen(
            [sys.executable, "-m", "lbgym", "run", "--policy", "adaptive", "--shm", name, "--steps", "1000000"],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            eventually(lambda: bool(vpp.api.lbgym_vip_dump(name=name)[0].has_agent))
            before = SharedMemoryRegion.attach(name)
            vpp.kill()
            eventually(lambda: not before.producer_alive)
            vpp.start()
            vpp.vip(name, "dsr", words="rule wcmp")
            with SharedMemoryRegion.attach(name) as region:
                answered, failed, moved = outcome(net.clients(100))
                assert (failed, moved, len(answered)) == ([], 0, 3)
                eventually(lambda: newest(region).counters[:3, 1].sum() == 100)
            before.close()
            # The agent has followed.
            eventually(lambda: bool(vpp.api.lbgym_vip_dump(name=name)[0].has_agent))
            assert vpp.stop() == 0
            assert not (Path(os.environ["LBGYM_SHM_DIR"]) / name).exists()
        finally:
            agent.kill()
            agent.communicate()


def test_servers_come_drain_and_go_under_load(name: str, tmp_path: Path) -> None:
    with balanced(tmp_path, "nat") as (net, vpp):
        vpp.vip(name, "nat", words="rule lsq close-timeout 0.5", servers=net.servers[:2])
        with SharedMemoryRegion.attach(name) as region:

            def states() -> list[str]:
                seen = newest(region)
                return [ServerState(row).name for row in seen.states[: seen.num_servers]]

            def taken() -> list[int]:
                before = newest(region).counters[:3, 0].astype(int)
                time.sleep(0.3)
                return list(newest(region).counters[:3, 0].astype(int) - before)

            held = net.clients(20, lanes=20, lines=60, pause=0.1)
            eventually(lambda: newest(region).stats[:, 0].sum() == 20)
            load = net.clients(1_000_000, lanes=2)
            vpp.cli(f"lbgym server drain {name} server-0")
            assert states() == ["DRAINING", "UP"]
            eventually(lambda: (new := taken())[0] == 0 and new[1] > 0)
            vpp.add(name, "server-2", words=f"port {PORT}")
            assert states() == ["DRAINING", "UP", "UP"]
            eventually(lambda: taken()[2] > 0)
            vpp.cli(f"lbgym server undrain {name} server-0")
            eventually(lambda: taken()[0] > 0)
            vpp.cli(f"lbgym server del {name} server-1")
            assert states() == ["UP", "DRAINING", "UP"]
            eventually(lambda: (new := taken())[1] == 0 and new[0] > 0)
            answered, failed, moved = outcome(held)
            assert (failed, moved, sum(answered.values())) == ([], 0, 20) and answered["server-1"] > 0
            # With its last flow it has left, and its row is free.
            eventually(lambda: states() == ["UP", "DOWN", "UP"])
            assert [row.name for row in vpp.api.lbgym_server_dump(vip=name)] == ["server-0", "server-2"]
            vpp.add(name, "server-1", words=f"port {PORT}")
            eventually(lambda: taken()[1] > 0)
            load.terminate()
            _, failed, moved = outcome(load)
            assert (failed, moved) == ([], 0)
            vpp.cli(f"lbgym vip del {name}")
        assert vpp.cli("show lbgym") == "" and not vpp.api.lbgym_vip_dump(name="")
        with pytest.raises(AssertionError):
            vpp.stats(f"/lbgym/{name}/server-0/started")


def test_two_vips_two_agents(name: str, tmp_path: Path) -> None:
    with balanced(tmp_path, "dsr") as (net, vpp):
        vpp.vip(f"{name}-4", "dsr", words="rule wcmp")
        vpp.vip(f"{name}-6", "dsr", ipv6=True, words="rule wcmp")
        # One more of the first one's address, whose port nobody listens on.
        vpp.cli(f"lbgym vip add {name}-other {VIP4} 9 mode dsr")
        vpp.add(f"{name}-other", "server-0")
        first, second = SharedMemoryRegion.attach(f"{name}-4"), SharedMemoryRegion.attach(f"{name}-6")
        with first, second:
            first.write_action(sequence_id=1, weights=[1.0, 0.0, 0.0], lease=60.0)
            second.write_action(sequence_id=1, weights=[0.0, 0.0, 1.0], lease=60.0)
            for region in (first, second):
                eventually(lambda region=region: newest(region).applied_sequence_id == 1)
            assert outcome(net.clients(50)) == ({"server-0": 50}, [], 0)
            assert outcome(net.clients(50, host=VIP6)) == ({"server-2": 50}, [], 0)
            assert newest(first).counters[:3, 0].sum() == newest(second).counters[:3, 0].sum() == 50
        _, failed, _ = outcome(net.clients(2, port=9))
        assert len(failed) == 2
        eventually(lambda: vpp.api.lbgym_server_dump(vip=f"{name}-other")[0].started == 2)
        # The VIP itself answers.
        with inside(net.name("client")), socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as ping:
            ping.settimeout(10.0)
            ping.sendto(bytes.fromhex("0800f7fd00010001"), (VIP4, 0))
            answer = ping.recv(64)
            assert answer[12:16] == socket.inet_aton(VIP4) and answer[20] == 0
