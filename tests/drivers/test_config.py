"""dataplane.toml: what it may say, and that a refusal names file and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from lbgym.drivers.config import GroundTruthAgent, HealthCheck, load_config, read_servers
from lbgym.errors import LbgymError

WHOLE = """
name = "edge"
publish_interval = 0.1
lease = 30
capacity = 8
mode = "660"
group = "root"

[health]
kind = "http"
path = "/health"
rise = 1

[ground_truth]
port = 9200

[driver]
socket = "/run/haproxy.sock"

[[servers]]
name = "web-1"
address = "10.0.0.1"
port = 80
cores = 4

[[servers]]
name = "web-2"
address = "10.0.0.2"
port = 80
weight = 2.5
health = { fall = 5 }
ground_truth = false

[[servers]]
name = "web-3"
address = "10.0.0.3"
port = 80
health = false
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "dataplane.toml"
    path.write_text(text)
    return path


def test_a_whole_file(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, WHOLE))
    assert (config.name, config.publish_interval, config.lease, config.capacity) == ("edge", 0.1, 30, 8)
    assert (config.mode, config.group, config.driver) == (0o660, "root", {"socket": "/run/haproxy.sock"})
    first, second, third = config.servers
    # What all servers share, unless they say otherwise.
    assert first.health == HealthCheck(kind="http", path="/health", rise=1)
    assert second.health == HealthCheck(kind="http", path="/health", rise=1, fall=5)
    assert third.health is None
    assert first.ground_truth == third.ground_truth == GroundTruthAgent(port=9200)
    assert second.ground_truth is None
    assert [server.safe_weight for server in config.servers] == [4.0, 2.5, 1.0]


def test_checks_are_on_where_a_table_says_so(tmp_path: Path) -> None:
    server = '[[servers]]\nname = "a"\naddress = "h"\nport = 1\n'
    (plain,) = read_servers(written(tmp_path, server))
    assert plain.health is None and plain.ground_truth is None
    (by_true,) = read_servers(written(tmp_path, server + "health = true\n"))
    (by_table,) = read_servers(written(tmp_path, "[health]\n" + server))
    assert by_true.health == by_table.health == HealthCheck()


SERVER = '[[servers]]\nname = "a"\naddress = "h"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = ", "is not valid TOML"),
        (SERVER, "the key 'name' is missing"),
        ('name = "r"\n', "there are no servers"),
        ('name = "r"\nintervall = 1\n' + SERVER, "unknown key 'intervall'"),
        ('name = "r"\npublish_interval = 0\n' + SERVER, "publish_interval must be a finite number"),
        ('name = "r"\npublish_interval = "1"\n' + SERVER, "publish_interval must be a finite number"),
        ('name = "r"\nlease = -1\n' + SERVER, "lease must be"),
        ('name = "r"\nmode = "999"\n' + SERVER, "mode must be octal permissions"),
        ('name = "r"\ncapacity = 0\n' + SERVER, "capacity must be a whole number from 1"),
        ('name = "r"\nservers = 3\n', "servers must be tables"),
        ('name = "r"\n[[servers]]\nname = "a"\n', "[[servers]] 1 (a): the key 'address' is missing"),
        ('name = "r"\n' + SERVER + "prot = 1\n", "unknown key 'prot' in"),
        ('name = "r"\n' + SERVER + "port = 70000\n", "[[servers]] 1 (a): port must be a whole number from 1 to 65535"),
        ('name = "r"\n' + SERVER + "weight = -1\n", "weight must be"),
        ('name = "r"\n' + SERVER + "weight = nan\n", "weight must be"),
        ('name = "r"\n' + SERVER + "health = true\n", "a health check needs a port"),
        ('name = "r"\n' + SERVER + 'health = { kind = "icmp" }\n', "unknown health check 'icmp' in"),
        ('name = "r"\n' + SERVER + 'port = 1\nhealth = { path = "x" }\n', "path must be a text that begins with '/'"),
        ('name = "r"\n' + SERVER + "port = 1\nhealth = { rise = 0 }\n", "(a), health: rise must be"),
        ('name = "r"\n' + SERVER + "ground_truth = { port = 0 }\n", "(a), ground_truth: port must be"),
        ('name = "r"\n' + SERVER + SERVER, "[[servers]] 2 (a): there is another server of this name"),
        ('name = "r"\n[discovery]\nkind = "dns"\nhost = "h"\n', "discovery by dns needs the key 'port'"),
        (
            'name = "r"\n[discovery]\nkind = "dns"\nhost = "a..b"\nport = 80\n',
            "[discovery]: host must be an IP address",
        ),
        ('name = "r"\ndriver = 1\n' + SERVER, "driver must be a table"),
        ('name = "r"\n' + SERVER + f"weight = {10**400}\n", "servers.weight must be a whole number of 64 bits, got 10"),
        (
            'name = "r"\nmode = 0x' + "f" * 5000 + "\n" + SERVER,
            "mode must be a whole number of 64 bits, got int of too",
        ),
    ],
)
def test_a_refusal_names_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(LbgymError) as raised:
        load_config(path)
    assert message in str(raised.value) and str(path) in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1 or "TOML" in message
