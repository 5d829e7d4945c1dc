"""The driver of VPP's stock load balancer without a VPP: what it refuses, and servers that do not report.

The rest needs one: tests/vpp.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbgym.drivers import DriverError, Publisher, vpp_lb
from lbgym.drivers.config import load_config
from lbgym.drivers.proxy.weights import whole_weights
from lbgym.drivers.vpp_lb import MAX_WEIGHT, VppLb, VppLbOptions
from lbgym.errors import InvalidOptionError, UnknownNameError
from lbgym.sharedmemory import ServerState
from tests.drivers.test_discovery import eventually
from tests.drivers.test_health import web
from tests.vpp.vpp import vpp_lb_toml


@pytest.mark.parametrize(
    ("driver", "error", "message"),
    [
        ({}, InvalidOptionError, "'vip' is missing"),
        ({"vip": "10.0.0.1/8"}, InvalidOptionError, "vip must be a prefix such as 10.0.0.100/32, got '10.0.0.1/8'"),
        ({"vip": "10.0.0.1", "port": 0}, InvalidOptionError, "port must be"),
        ({"vip": "10.0.0.1", "port": 65_536}, InvalidOptionError, "port must be"),
        ({"vip": "10.0.0.1", "protocol": "sctp"}, UnknownNameError, "sctp"),
        ({"vip": "10.0.0.1", "sockets": "/x"}, UnknownNameError, "sockets"),
        ({"vip": "10.0.0.1", "api_files": "/nowhere"}, InvalidOptionError, r"no \*.api.json in api_files, '/nowhere'"),
    ],
)
def test_bad_options_are_refused(driver: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    pytest.importorskip("vpp_papi")
    file = tmp_path / "dataplane.toml"
    vpp_lb_toml(file, "lb", ["server-0"], driver)
    with pytest.raises(error, match=message):
        VppLb(load_config(file), file)


def test_servers_need_an_agent_that_counts_and_an_address(tmp_path: Path) -> None:
    file = tmp_path / "dataplane.toml"
    vpp_lb_toml(file, "lb", ["server-0"], {"vip": "10.0.0.1"})
    text = file.read_text()
    for before, after, message in [
        ("ground_truth", "# ", "server 'server-0' needs ground_truth, as VPP's lb counts no flows by server"),
        ("10.77.2.1", "example.org", "address of server 'server-0' must be an IP address, got 'example.org'"),
    ]:
        file.write_text(text.replace(before, after))
        with pytest.raises(InvalidOptionError, match=message):
            VppLb(load_config(file), file)


def test_a_vip_is_named_as_vpp_names_it() -> None:
    assert VppLbOptions(vip="10.0.0.1").key == {"pfx": "10.0.0.1/32", "protocol": 255, "port": 0}
    assert VppLbOptions(vip="fd00::1/128", port=53, protocol="udp").key == {
        "pfx": "fd00::1/128", "protocol": 17, "port": 53,
    }  # fmt: skip


@given(st.lists(st.floats(0.0, 1e6), min_size=1, max_size=20))
def test_weights_become_whole_numbers_up_to_100(weights: list[float]) -> None:
    exact = np.array(weights)
    whole = whole_weights(exact, MAX_WEIGHT)
    assert ((whole >= 0) & (whole <= MAX_WEIGHT)).all() and ((whole == 0) == (exact == 0.0)).all()
    if exact.any() and not (exact == np.round(exact)).all():
        share = exact / exact.max()
        large = share >= 0.1
        # As docs/vpp.md says: off by at most 5 % at a tenth of the greatest.
        error = np.abs(whole[large] / whole.max() / share[large] - 1.0)
        assert (error <= 0.5 / (MAX_WEIGHT // 2 + 1) / share[large] + 1e-9).all()


class Vpp:
    """Answers as VPP's API does; ``weights`` are those of its servers, by address."""

    def __init__(self) -> None:
        self.weights: dict[str, int] = {}

    def VPPApiClient(self, **_: object) -> Any:
        return SimpleNamespace(api=self, connect=lambda _: None, disconnect=lambda: None)

    def show_version(self) -> Any:
        return SimpleNamespace(version="26.10")

    def lb_as_v2_dump(self, **_: object) -> list[Any]:
        vip = SimpleNamespace(pfx="10.0.0.100/32", protocol=6, port=80)
        return [SimpleNamespace(app_srv=a, weight=w, flags=1, vip=vip) for a, w in self.weights.items()]

    def lb_as_set_weight(self, as_address: str, weight: int, **_: object) -> Any:
        self.weights[as_address] = weight
        return SimpleNamespace(retval=0)


@pytest.fixture
def vpp(monkeypatch: pytest.MonkeyPatch) -> Vpp:
    fake = Vpp()
    monkeypatch.setitem(sys.modules, "vpp_papi", fake)  # type: ignore[arg-type]
    return fake


def report(folder: Path, name: str, busy: int | None) -> None:
    """What the agent of a server says from now on; None: it measures nothing."""
    new = folder / f"{name}.new"
    new.write_text(json.dumps({"cpu_usage": 0.5, "memory_usage": 0.5, "busy_workers": busy}))
    new.rename(folder / name)


def configure(vpp: Vpp, folder: Path, port: int, *names: str) -> Path:
    """The servers of VPP, and the file with the same; all agents are one web server."""
    vpp.weights = {f"10.0.0.{name[-1]}": vpp.weights.get(f"10.0.0.{name[-1]}", 1) for name in names}
    lines = ['name = "lb"', "[driver]", 'vip = "10.0.0.100/32"', "port = 80"]
    for name in names:
        agent = f'{{ address = "127.0.0.1", port = {port}, path = "/{name}", interval = 0.02, timeout = 5.0 }}'
        lines += ["[[servers]]", f'name = "{name}"', f'address = "10.0.0.{name[-1]}"', f"ground_truth = {agent}"]
    file = folder / "dataplane.toml"
    file.write_text("\n".join(lines) + "\n")
    return file


def silent(balancer: VppLb) -> str | None:
    """The server because of which nothing is published."""
    try:
        balancer.read(0.0)
    except DriverError as error:
        assert "reports no busy workers: run 'lbgym server-agent --status' there" in str(error)
        return str(error).split("'")[1]
    return None


def once_read(balancer: VppLb, condition: Callable[[Any], object]) -> Any:
    """The first observation that is as it should be."""

    def look() -> Any:
        reading = balancer.read(0.0)
        assert (reading.started - reading.completed - reading.failed >= 0).all()
        return reading if condition(reading) else None

    return eventually(look)


@contextmanager
def two_servers(vpp: Vpp, folder: Path, first: int = 1) -> Iterator[tuple[VppLb, int]]:
    """A balancer over s1, which has ``first`` flows, and s2, which has 2, and the port of their agents."""
    report(folder, "s1", first)
    report(folder, "s2", 2)
    with web(folder) as (_, port):
        file = configure(vpp, folder, port, "s1", "s2")
        with closing(VppLb(load_config(file), file)) as balancer:
            yield balancer, port


def test_a_server_that_does_not_report_can_be_drained_and_removed(vpp: Vpp, tmp_path: Path) -> None:
    with two_servers(vpp, tmp_path) as (balancer, port):
        assert balancer.read(0.0).stats[:, 0].tolist() == [1.0, 2.0]
        report(tmp_path, "s2", None)
        eventually(lambda: silent(balancer) == "s2")
        balancer.drain("s2")
        # Nothing is known to have begun or ended there; the others go on.
        report(tmp_path, "s1", 4)
        reading = once_read(balancer, lambda reading: reading.stats[0, 0] == 4.0)
        assert reading.active.tolist() == [True, False] and reading.stats[1, 0] == 0.0
        assert (reading.started[1], reading.completed[1], reading.failed[1]) == (2, 0, 0)
        balancer.undrain("s2")
        assert silent(balancer) == "s2"

        configure(vpp, tmp_path, port, "s1")
        assert balancer.reload() == "removing s2"
        eventually(lambda: balancer.read(0.0) and balancer.servers()[1].name == "")
        reading = balancer.read(0.0)
        assert (reading.started[1], reading.completed[1], reading.failed[1]) == (2, 0, 2)
        # Its row is another's now, and counts on.
        report(tmp_path, "s3", 5)
        configure(vpp, tmp_path, port, "s1", "s3")
        assert balancer.reload() == "added s3"
        assert balancer.servers()[1].name == "s3"
        eventually(lambda: silent(balancer) is None)
        reading = balancer.read(0.0)
        assert (reading.started[1], reading.completed[1], reading.failed[1]) == (7, 0, 2)


def test_a_removed_server_that_reports_finishes_its_flows(vpp: Vpp, tmp_path: Path) -> None:
    with two_servers(vpp, tmp_path) as (balancer, port):
        configure(vpp, tmp_path, port, "s1")
        assert balancer.reload() == "removing s2"
        report(tmp_path, "s2", 1)
        reading = once_read(balancer, lambda reading: reading.completed[1] == 1)
        assert balancer.servers()[1].name == "s2"
        report(tmp_path, "s2", 0)
        reading = once_read(balancer, lambda _: balancer.servers()[1].name == "")
        assert (reading.started[1], reading.completed[1], reading.failed[1]) == (2, 2, 0)


def test_a_server_that_is_renamed_keeps_its_flows_coming(vpp: Vpp, tmp_path: Path) -> None:
    report(tmp_path, "t2", 2)
    with two_servers(vpp, tmp_path, first=0) as (balancer, port):
        configure(vpp, tmp_path, port, "s2")
        assert balancer.reload() == "removing s1"
        once_read(balancer, lambda _: balancer.servers()[0].name == "")
        configure(vpp, tmp_path, port, "t2")
        assert balancer.reload() == "added t2; removing s2"
        eventually(lambda: silent(balancer) is None)
        assert [row.name for row in balancer.servers()] == ["t2", "s2"]
        assert vpp.weights["10.0.0.2"] > 0


def test_a_server_that_is_down_need_not_report(vpp: Vpp, tmp_path: Path) -> None:
    report(tmp_path, "s1", 1)
    with web(tmp_path) as (_, port):
        file = configure(vpp, tmp_path, port, "s1", "s2")
        # Nobody listens at its port, and it has no page for its agent.
        down = 'address = "127.0.0.2"\nhealth = { port = 1, interval = 0.02, timeout = 5.0 }'
        file.write_text(file.read_text().replace('address = "10.0.0.2"', down))
        vpp.weights = {"10.0.0.1": 1, "127.0.0.2": 1}
        with closing(VppLb(load_config(file), file)) as balancer:
            assert [row.state for row in balancer.servers()] == [ServerState.UP, ServerState.DOWN]
            reading = balancer.read(0.0)
            assert reading.active.tolist() == [True, False]
            assert (reading.started.tolist(), reading.stats[:, 0].tolist()) == ([1, 0], [1.0, 0.0])


def test_it_waits_for_the_first_reports(vpp: Vpp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report(tmp_path, "s1", 1)
    report(tmp_path, "s2", None)
    with web(tmp_path) as (_, port):
        file = configure(vpp, tmp_path, port, "s1", "s2")
        monkeypatch.setattr(vpp_lb, "_FIRST_REPORTS", 0.1)
        with pytest.raises(DriverError, match=r"the agent on server 's\d' reports no busy workers"):
            VppLb(load_config(file), file)
        monkeypatch.setattr(vpp_lb, "_FIRST_REPORTS", 60.0)
        report(tmp_path, "s2", 2)
        # The publisher reads at once.
        with Publisher({"lb": VppLb(load_config(file), file)}) as publisher:
            assert publisher.observations == 1
