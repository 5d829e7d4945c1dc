"""What the commands and the API of the plugin refuse: with an error of VPP's own kind and a sentence; VPP goes on."""

from __future__ import annotations

import os
import random
from typing import Any

import pytest

from lbgym.sharedmemory import SharedMemoryRegion
from tests.drivers.xdp.network import VIP4, network
from tests.vpp.vpp import Vpp, VppError, prepare

pytestmark = pytest.mark.vpp
NAME = f"vpp-refusals-{os.getpid()}"
INVALID_VALUE, NO_SUCH_ENTRY, VALUE_EXIST, NO_SUCH_INTERFACE = -7, -6, -81, -2

COMMANDS = {
    "lbgym": "",
    "lbgym vip": "",
    "lbgym vip add": "the name of the VIP is missing",
    f"lbgym vip add {'x' * 64} {VIP4} 80": "the name of the VIP has at most 63 characters",
    f"lbgym vip add a/b {VIP4} 80": "a/b",
    "lbgym vip add new": "the address of the VIP is missing",
    "lbgym vip add new 10.0.0.300 80": "must be an address of IPv4 or IPv6, got '10.0.0.300'",
    "lbgym vip add new 10.0.0.1/24 80": "must be an address of IPv4 or IPv6, got '10.0.0.1/24'",
    "lbgym vip add new 0.0.0.0 80": "a VIP needs a unicast address",
    "lbgym vip add new 239.1.1.1 80": "a VIP needs a unicast address",
    "lbgym vip add new ff02::1 80": "a VIP needs a unicast address",
    "lbgym vip add new 10.77.0.2 80": "cannot have the address of an interface of VPP",
    "lbgym vip add new 10.0.0.1": "the port of the VIP is missing",
    "lbgym vip add new 10.0.0.1 0": "must be a whole number from 1 to 65535, got '0'",
    "lbgym vip add new 10.0.0.1 65536": "must be a whole number from 1 to 65535, got '65536'",
    "lbgym vip add new 10.0.0.1 http": "must be a whole number from 1 to 65535, got 'http'",
    "lbgym vip add new 10.0.0.1 99999999999999999999": "must be a whole number from 1 to 65535",
    "lbgym vip add new 10.0.0.1 80 mode": "mode is missing",
    "lbgym vip add new 10.0.0.1 80 mode l3dsr": "mode must be dsr, gre, ipip or nat, got 'l3dsr'",
    "lbgym vip add new 10.0.0.1 80 rule best": "rule must be one of ecmp, wcmp, maglev",
    "lbgym vip add new 10.0.0.1 80 source nowhere": "source must be an address of IPv4 or IPv6, got 'nowhere'",
    "lbgym vip add new 10.0.0.1 80 servers 0": "servers must be a whole number from 1 to 4096, got '0'",
    "lbgym vip add new 10.0.0.1 80 servers 4097": "servers must be a whole number from 1 to 4096, got '4097'",
    "lbgym vip add new 10.0.0.1 80 flows 15": "flows must be a whole number from 16 to 67108864, got '15'",
    "lbgym vip add new 10.0.0.1 80 flows -1": "flows must be a whole number from 16 to 67108864, got '-1'",
    "lbgym vip add new 10.0.0.1 80 flows 16 syn-flows 17": "syn_flows must be from 0 to 16, got 17",
    "lbgym vip add new 10.0.0.1 80 balancers 0": "balancers must be a whole number from 1 to 65535, got '0'",
    "lbgym vip add new 10.0.0.1 80 interval 0": "interval must be a number from 0.001 to 86400, got '0'",
    "lbgym vip add new 10.0.0.1 80 interval nan": "interval must be a number from 0.001 to 86400, got 'nan'",
    "lbgym vip add new 10.0.0.1 80 idle-timeout inf": "idle-timeout must be a number from 0.001 to 1000000, got 'inf'",
    "lbgym vip add new 10.0.0.1 80 fct-sampling 1.5": "fct-sampling must be a number from 0 to 1, got '1.5'",
    "lbgym vip add new 10.0.0.1 80 permissions 0888": "permissions must be a whole number from 0 to 511, got '0888'",
    "lbgym vip add new 10.0.0.1 80 sideways": "unknown word 'sideways'",
    f"lbgym vip add {NAME} 10.0.0.1 80": f"there is a VIP '{NAME}' already",
    f"lbgym vip add new {VIP4} 8080": f"VIP '{NAME}' has the same address, port and protocol",
    f"lbgym vip add {NAME}-taken 10.0.0.1 80": "belongs to a live region",
    "lbgym vip del": "the name of the VIP is missing",
    "lbgym vip del nobody": "there is no VIP 'nobody'",
    f"lbgym vip del {NAME} now": "unknown word 'now'",
    "lbgym server add nobody new 10.77.2.9": "there is no VIP 'nobody'",
    f"lbgym server add {NAME} new": "the address of the server is missing",
    f"lbgym server add {NAME} {'x' * 64} 10.77.2.9": "the name of the server has at most 63 characters",
    f"lbgym server add {NAME} server-0 10.77.2.9": f"'{NAME}' has a server 'server-0' already",
    f"lbgym server add {NAME} new 10.77.2.1": "has the same address",
    f"lbgym server add {NAME} new {VIP4}": "has the address of the VIP itself",
    f"lbgym server add {NAME} new 255.255.255.255": "needs a unicast address",
    f"lbgym server add {NAME} new 10.77.2.9 weight -1": "weight must be a number from 0 to 1e+300, got '-1'",
    f"lbgym server add {NAME} new 10.77.2.9 weight inf": "weight must be a number from 0 to 1e+300, got 'inf'",
    f"lbgym server add {NAME} new 10.77.2.9 cores 0": "cores must be a number from 1 to 1048576, got '0'",
    f"lbgym server add {NAME} new 10.77.2.9 port": "port is missing",
    f"lbgym server add {NAME} new 10.77.2.9 color red": "unknown word 'color'",
    f"lbgym server add {NAME} two 10.77.2.2": "",
    f"lbgym server add {NAME} three 10.77.2.3": "no room for server 'three': all 2 rows",
    f"lbgym server add {NAME}-nat new 10.77.2.9": "needs a port, and an address of IPv4 as the VIP",
    f"lbgym server add {NAME}-nat new fd77::9 port 80": "needs a port, and an address of IPv4 as the VIP",
    f"lbgym server add {NAME}-nat2 new 10.77.2.1 port 80": f"of VIP '{NAME}-nat' has the same address",
    f"lbgym server add {NAME}-gre new 10.77.2.1": "need an outer source address of IPv4",
    f"lbgym server del {NAME} nobody": f"'{NAME}' has no server 'nobody'",
    f"lbgym server drain {NAME}": "the name of the server is missing",
    f"lbgym server undrain {NAME} nobody": f"'{NAME}' has no server 'nobody'",
    f"lbgym server weight {NAME} server-0 heavy": "weight must be a number from 0 to 1e+300, got 'heavy'",
    f"lbgym server weight {NAME} server-0": "weight is missing",
    "lbgym interface eth9": "there is no such interface",
    "lbgym interface host-eth0 enable": "unknown word 'enable'",
    "show lbgym everything": "unknown word 'everything'",
}


@pytest.fixture(scope="module")
def vpp(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from tests.vpp.vpp import missing

    if reason := missing():
        pytest.skip(reason)
    patch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("vpp")
    (folder / "shm").mkdir()
    patch.setenv("LBGYM_SHM_DIR", str(folder / "shm"))
    with network(1, xdp=False) as net:
        prepare(net, "dsr")
        one = Vpp(net, folder / "vpp")
        try:
            one.start()
            one.vip(NAME, "dsr", words="servers 2")
            one.cli(f"lbgym vip add {NAME}-nat 10.77.1.101 80 mode nat")
            one.cli(f"lbgym server add {NAME}-nat server-0 10.77.2.1 port 80")
            one.cli(f"lbgym vip add {NAME}-nat2 10.77.1.102 80 mode nat")
            one.cli(f"lbgym vip add {NAME}-gre 10.77.1.103 80 mode gre")
            with SharedMemoryRegion.create(f"{NAME}-taken", num_servers=1):
                yield one
        finally:
            one.kill()
            patch.undo()


@pytest.fixture(autouse=True)
def _lives(vpp: Vpp) -> Any:
    yield
    assert vpp.alive() and vpp.version


# Names of tests may not differ between the processes that run them.
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.replace(NAME, "NAME"))
def test_commands(vpp: Vpp, command: str) -> None:
    if not COMMANDS[command] and command.startswith("lbgym server"):
        vpp.cli(command)
        return
    before = vpp.cli("show lbgym")
    with pytest.raises(VppError) as refused:
        vpp.cli(command)
    assert COMMANDS[command] in str(refused.value) and "\n" not in str(refused.value).strip()
    assert _without_counts(vpp.cli("show lbgym")) == _without_counts(before)


def _without_counts(shown: str) -> list[str]:
    return [line.partition(", weights of")[0] for line in shown.splitlines()]


def message(reply: Any, code: int) -> str:
    assert reply.retval == code, reply
    return str(reply.message)


def vip_add(vpp: Vpp, **fields: Any) -> Any:
    return vpp.api.lbgym_vip_add(**{"name": "new", "address": "10.0.0.1", "port": 80, **DEFAULTS, **fields})


DEFAULTS: dict[str, Any] = {
    "protocol": 6, "mode": 0, "rule": "sed", "balancers": 1, "servers": 64, "flows": 1024, "syn_flows": 0,
    "permissions": 0o600, "interval": 0.2, "syn_timeout": 10.0, "idle_timeout": 300.0, "udp_timeout": 30.0,
    "close_timeout": 10.0, "fct_sampling": 1.0, "duration_sampling": 0.1, "source4": "0.0.0.0", "source6": "::",
}  # fmt: skip


def test_messages(vpp: Vpp) -> None:
    nan = float("nan")
    for fields, sentence in [
        ({"name": ""}, "names must have 1 to 63 characters"),
        ({"name": "a/b"}, "a/b"),
        ({"port": 0}, "must have a port and the protocol TCP (6) or UDP (17)"),
        ({"protocol": 47}, "must have a port and the protocol TCP (6) or UDP (17)"),
        ({"rule": "best"}, "there is no such dispatch rule"),
        ({"balancers": 0}, "there is no dispatch rule 5 for 0 balancers"),
        ({"servers": 0}, "servers must be from 1 to 4096, got 0"),
        ({"servers": 5000}, "servers must be from 1 to 4096, got 5000"),
        ({"flows": 4_000_000_000}, "flows must be from 16 to 67108864, got 4000000000"),
        ({"syn_flows": 1025}, "syn_flows must be from 0 to 1024, got 1025"),
        ({"permissions": 0o1777}, "mode must be permissions from 0 to 0777"),
        ({"interval": -1.0}, "publish_interval_ns must be from 1,000 to a day, got 0"),
        ({"interval": nan}, "publish_interval_ns must be from 1,000 to a day, got 0"),
        ({"interval": 1e9}, "publish_interval_ns must be from 1,000 to a day"),
        ({"syn_timeout": 0.0}, "syn_timeout must be from 1 to"),
        ({"idle_timeout": nan}, "idle_timeout must be from 1 to"),
        ({"udp_timeout": -5.0}, "udp_timeout must be from 1 to"),
        ({"close_timeout": 1e300}, "close_timeout must be from 1 to"),
        ({"fct_sampling": 2.0}, "fct_sampling must be from 0 to 1, got 2"),
        ({"duration_sampling": nan}, "duration_sampling must be from 0 to 1, got nan"),
    ]:
        assert sentence in message(vip_add(vpp, **fields), INVALID_VALUE)
    assert "already" in message(vip_add(vpp, name=NAME), VALUE_EXIST)
    assert "live region" in message(vip_add(vpp, name=f"{NAME}-taken"), VALUE_EXIST)
    assert "unicast" in message(vip_add(vpp, address="0.0.0.0"), -58)
    assert "interface of VPP" in message(vip_add(vpp, address="10.77.0.2"), -105)
    assert "no VIP 'nobody'" in message(vpp.api.lbgym_vip_del(name="nobody"), NO_SUCH_ENTRY)
    server = {"vip": NAME, "name": "new", "address": "10.77.2.9", "port": 0, "weight": 1.0, "cores": 1.0}
    for fields, code, sentence in [
        ({"vip": "nobody"}, NO_SUCH_ENTRY, "no VIP 'nobody'"),
        ({"name": ""}, INVALID_VALUE, "names must have"),
        ({"name": "two words"}, INVALID_VALUE, "printable characters"),
        ({"weight": nan}, INVALID_VALUE, "weight of server 'new' must be finite"),
        ({"weight": -1.0}, INVALID_VALUE, "weight of server 'new' must be finite"),
        ({"cores": nan}, INVALID_VALUE, "cores of server 'new' must be from 1"),
        ({"address": "::"}, INVALID_VALUE, "unicast address"),
        ({"name": "server-0"}, VALUE_EXIST, "already"),
    ]:
        assert sentence in message(vpp.api.lbgym_server_add(**{**server, **fields}), code)
    change = {"vip": NAME, "name": "server-0", "weight": 1.0, "drained": False}
    assert "finite" in message(vpp.api.lbgym_server_set(**{**change, "weight": nan}), INVALID_VALUE)
    assert "no server" in message(vpp.api.lbgym_server_set(**{**change, "name": "nobody"}), NO_SUCH_ENTRY)
    assert "no server" in message(vpp.api.lbgym_server_del(vip=NAME, name="nobody"), NO_SUCH_ENTRY)
    for number in (77, 0xFFFFFFFF):
        reply = vpp.api.lbgym_interface_enable_disable(sw_if_index=number, enable=True)
        assert "there is no interface" in message(reply, NO_SUCH_INTERFACE)
    assert vpp.api.lbgym_vip_dump(name="nobody") == [] and vpp.api.lbgym_server_dump(vip="nobody") == []


def test_what_the_api_adds_it_removes(vpp: Vpp) -> None:
    for _ in range(3):
        assert message(vip_add(vpp, rule="", mode=1, source4="10.77.0.2"), 0) == ""
        add = vpp.api.lbgym_server_add
        reply = add(vip="new", name="one", address="10.77.2.1", port=0, weight=2.5, cores=4.0)
        assert message(reply, 0) == "" and reply.row == 0
        assert message(vpp.api.lbgym_server_set(vip="new", name="one", weight=3.5, drained=True), 0) == ""
        (one,) = vpp.api.lbgym_server_dump(vip="new")
        assert (one.weight, one.configured_weight, one.cores, one.drained) == (3.5, 3.5, 4.0, True)
        (of_vip,) = vpp.api.lbgym_vip_dump(name="new")
        assert (str(of_vip.address), of_vip.port, of_vip.rule, of_vip.servers) == ("10.0.0.1", 80, "sed", 1)
        assert message(vpp.api.lbgym_vip_del(name="new"), 0) == ""


def test_random_words(vpp: Vpp) -> None:
    random.seed(1)
    words = [*{word for command in COMMANDS for word in command.split()}, "'", "%s%n", "-", "\\", "#", "{", "0x", "\t"]
    for _ in range(300):
        command = " ".join(["lbgym", *random.choices(words, k=random.randrange(8))])
        if " del " in f"{command} " or "interface" in command:
            continue
        try:
            vpp.cli(command)
        except VppError:
            continue
        # It was good by chance.
        for one in vpp.api.lbgym_vip_dump(name=""):
            if not one.name.startswith(NAME):
                vpp.cli(f"lbgym vip del {one.name}")
