"""Configurations of the XDP driver: refused in a sentence, before anything is loaded. No privileges needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lbgym.drivers.config import ServerConfig, load_config, parse_server
from lbgym.drivers.xdp import XdpOptions
from lbgym.drivers.xdp.options import check_config, parse_options
from lbgym.errors import InvalidOptionError, LbgymError, UnknownNameError

GOOD: dict[str, Any] = {"vips": ["10.0.0.100:80"], "interfaces": ["eth0"]}
SERVERS = [{"name": "a", "address": "10.0.0.1", "port": 80}, {"name": "b", "address": "10.0.0.2", "port": 80}]


def configured(folder: Path, driver: dict[str, Any], servers: list[dict[str, Any]], head: str = "") -> XdpOptions:
    file = folder / "dataplane.toml"
    lines = ['name = "edge"', head, "[driver]", *(f"{key} = {json.dumps(value)}" for key, value in driver.items())]
    for server in servers:
        lines += ["[[servers]]", *(f"{key} = {json.dumps(value)}" for key, value in server.items())]
    file.write_text("\n".join(lines))
    config = load_config(file)
    options = parse_options(config.driver, f"{file}, [driver]")
    check_config(config, options, str(file))
    return options


def test_a_good_one(tmp_path: Path) -> None:
    options = configured(tmp_path, {**GOOD, "vips": ["10.0.0.100:80", "[fd00::100]:443"]}, SERVERS)
    assert [str(vip) for vip in options.parsed_vips] == ["10.0.0.100:80", "[fd00::100]:443"]
    assert str(options.pin_folder("edge.1")) == "/sys/fs/bpf/lbgym/edge_1"


@pytest.mark.parametrize(
    ("driver", "message"),
    [
        ({"interfaces": ["eth0"]}, r"\[driver\]: the key 'vips' is missing"),
        ({**GOOD, "vips": []}, "vips must not be empty"),
        ({**GOOD, "vips": ["10.0.0.100"]}, "a VIP must be an IP address and a port"),
        ({**GOOD, "vips": ["web.example:80"]}, "a VIP must be an IP address and a port"),
        ({**GOOD, "vips": ["10.0.0.100:0"]}, "a VIP must be an IP address and a port"),
        ({**GOOD, "vips": ["10.0.0.100:80", "10.0.0.100:80"]}, "'10.0.0.100:80' is there twice"),
        ({**GOOD, "vips": ["[fd00::1]:80", "[fd00:0::1]:80"]}, r"\[fd00::1\]:80 is there twice"),
        ({**GOOD, "interfaces": ["eth0", "eth0"]}, "interfaces: 'eth0' is there twice"),
        ({**GOOD, "vip": "10.0.0.100:80"}, r"unknown key 'vip' in .*\[driver\]\. Did you mean 'vips'"),
        ({**GOOD, "rule": "oracle_sed"}, "unknown dispatch rule of an XDP balancer 'oracle_sed'"),
        ({**GOOD, "rule": "table"}, "unknown dispatch rule of an XDP balancer 'table'"),
        ({**GOOD, "mode": "nat"}, "unknown mode 'nat'.* Did you mean 'dnat'"),
        ({**GOOD, "flows": 3}, "flows must be a whole number from 16 to 16777216"),
        ({**GOOD, "syn_flows": 1 << 20}, "syn_flows must be a whole number from 1 to 262144"),
        ({**GOOD, "duration_sampling": 2}, "duration_sampling must be a finite number from 0 to 1"),
        ({**GOOD, "pin": "here"}, "pin must be an absolute path without dots"),
        ({**GOOD, "vips": ["[fd00::100]:80"], "mode": "dnat"}, r"the VIP \[fd00::100\]:80 is of IPv6 and server 'a'"),
        ({**GOOD, "vips": ["10.0.0.1:443"]}, "the address of server 'a', 10.0.0.1, is a VIP's"),
    ],
)
def test_a_bad_table(tmp_path: Path, driver: dict[str, Any], message: str) -> None:
    with pytest.raises((InvalidOptionError, UnknownNameError), match=message):
        configured(tmp_path, driver, SERVERS)


@pytest.mark.parametrize(
    ("servers", "driver", "message"),
    [
        ([*SERVERS, {"name": "c", "address": "10.0.0.1", "port": 81}], {}, "servers 'a' and 'c' have the same address"),
        (
            [*SERVERS, {"name": "c", "address": "10.0.0.1", "port": 80}],
            {"mode": "dnat"},
            "servers 'a' and 'c' have the same address, 10.0.0.1 port 80",
        ),
        ([{"name": "a", "address": "web"}], {}, "the address of server 'a' must be an IP address, got 'web'"),
        ([{"name": "a", "address": "10.0.0.1"}], {"mode": "dnat"}, "server 'a' needs a port for mode dnat"),
    ],
)
def test_bad_servers(tmp_path: Path, servers: list[dict[str, Any]], driver: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOptionError, match=message):
        configured(tmp_path, {**GOOD, **driver}, servers)


def test_two_ports_of_one_address_are_two_servers_behind_dnat(tmp_path: Path) -> None:
    configured(tmp_path, {**GOOD, "mode": "dnat"}, [*SERVERS, {"name": "c", "address": "10.0.0.1", "port": 81}])


def test_more_servers_than_there_is_room_for(tmp_path: Path) -> None:
    many = [{"name": f"s{i}", "address": f"10.1.{i // 250}.{i % 250 + 1}"} for i in range(1025)]
    with pytest.raises(InvalidOptionError, match="there are 1025 servers, and room for 1024"):
        configured(tmp_path, GOOD, many)
    with pytest.raises(InvalidOptionError, match="capacity must be a whole number from 2"):
        configured(tmp_path, GOOD, SERVERS, "capacity = 1")
    with pytest.raises(InvalidOptionError, match="an XDP balancer has room for 1024 servers, got 2000"):
        configured(tmp_path, GOOD, SERVERS, "capacity = 2000")


def test_servers_of_a_command_line() -> None:
    assert parse_server("a=10.0.0.1:80,weight=2.5,cores=4") == ServerConfig(
        name="a", address="10.0.0.1", port=80, weight=2.5, cores=4
    )
    assert parse_server("a=[fd00::1]:80").address == "fd00::1"
    assert (parse_server("a=fd00::1").address, parse_server("a=fd00::1").port) == ("fd00::1", None)
    assert (parse_server("a=[::1]").address, parse_server("a=[::1]").port) == ("::1", None)
    health = parse_server("a=10.0.0.1:80,health=http").health
    assert health is not None and health.kind == "http"
    for text, message in (
        ("10.0.0.1:80", "must begin with NAME=ADDRESS"),
        ("a=10.0.0.1:http", "the port must be a whole number from 1 to 65535, got 'http'"),
        ("a=10.0.0.1:0", "the port must be a whole number from 1 to 65535, got '0'"),
        ("a=10.0.0.1:²", "the port must be a whole number from 1 to 65535, got '²'"),
        ("a=10.0.0.1:" + 5000 * "9", "the port must be a whole number from 1 to 65535"),
        ("a=[::1]:", "the port must be a whole number from 1 to 65535, got ''"),
        ("a=10.0.0.1:80,weight=much", "weight must be a number, got 'much'"),
        ("a=10.0.0.1:80,wieght=1", "unknown key 'wieght'.* Did you mean 'weight'"),
        ("a=10.0.0.1,health=tcp", "a health check needs a port"),
        ("a=10.0.0.1:80,health=icmp", "unknown health check 'icmp'"),
    ):
        with pytest.raises(LbgymError, match=message):
            parse_server(text)
