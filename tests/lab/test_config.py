"""Configurations of laboratories, without root."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from lbgym.controller.logs import log_event
from lbgym.errors import InvalidOptionError, ScenarioError, UnknownNameError
from lbgym.lab import Calibration, LabConfig, Laboratory, load_lab, remove, twin_of, with_servers
from lbgym.lab.base import LabError
from lbgym.lab.config import small_scenario, write_lab
from lbgym.lab.flows import draw_flows
from lbgym.lab.measure import _quiet
from lbgym.scenarios import Event, Exponential, Scenario, Server, Workload, from_toml
from lbgym.simulator import Simulation
from tests.test_cli import in_process

SCENARIO = """
[scenario]
[[scenario.servers]]
count = 2
speed = 0.2
[scenario.workload]
rate = 30.0
demand = { kind = "exponential", mean = 0.005 }
"""


def refused(tmp_path: Path, text: str) -> str:
    file = tmp_path / "lab.toml"
    file.write_text(text)
    with pytest.raises((InvalidOptionError, UnknownNameError, ScenarioError)) as error:
        load_lab(file)
    assert "\n" not in str(error.value)
    return str(error.value).replace(str(file), "lab.toml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nmae = 'x'", "unknown key 'nmae' in lab.toml. Did you mean 'name'?"),
        ("data_plane = 'xpd'", "unknown data plane 'xpd' in lab.toml. Did you mean 'xdp'?"),
        ("server_kind = 'iis'", "unknown kind of server 'iis' in lab.toml. Known: apache-php, nginx."),
        ("name = 'a/b'", "lab.toml: the name of a laboratory must be 1 to 32 letters"),
        ("name = 7", "lab.toml: the name of a laboratory must be 1 to 32 letters"),
        ("period = 0.1", "lab.toml: period must be a finite number from 0.001 to 0.01 seconds, got 0.1"),
        ("driver = 3", "lab.toml: driver must be a table, got 3"),
        ("[driver]\nmdoe = 'dsr'", "unknown key 'mdoe' in lab.toml, [driver]. Did you mean 'mode'?"),
        ("[driver]\nrule = 'sed'", "unknown key 'rule' in lab.toml, [driver]."),
        ("[driver]\nmode = 'tunnel'", "unknown mode 'tunnel'"),
        (
            "data_plane = 'haproxy'\n[driver]\nmode = 'dsr'",
            "lab.toml, [driver]: the data plane 'haproxy' takes no options, got 'mode'",
        ),
        (
            "data_plane = 'vpp'\n[driver]\nmdoe = 'nat'",
            "unknown key 'mdoe' in lab.toml, [driver]. Did you mean 'mode'?",
        ),
        ("data_plane = 'vpp'\n[driver]\nmode = 'dnat'", "unknown mode 'dnat'"),
        ("data_plane = 'vpp'\n[driver]\nflows = 3", "flows must be a whole number from 16"),
        ("scenario = 'nowhere'", "unknown scenario 'nowhere'"),
        ("scenario = 3", "lab.toml: scenario must be a name, a path or a table, got 3"),
        (SCENARIO.replace("mean", "maen"), "unknown key 'maen' in lab.toml, [scenario]"),
        (SCENARIO.replace("0.2", "0.05"), "server 0 has a share of 0.05 cores, and at a period of 10 ms the least"),
        (SCENARIO.replace("0.2", "2.0"), "server 0 has a core of speed 2"),
        (SCENARIO.replace("speed = 0.2", "speed = 0.2\ncores = 2"), "give it one core of speed 0.4, or speed 1"),
        (
            SCENARIO + "[[scenario.events]]\ntime = 1.0\nkind = 'down'\nserver = 0\n",
            "has an event 'down' at 1 s; in a laboratory only the arrival rate changes",
        ),
        ("[calibration]\nper_unit = 1e-8", "lab.toml, [calibration]: the key 'fixed' is missing"),
        (
            "[calibration]\nper_unit = 0\nfixed = 0\nlatency = 0",
            "lab.toml, [calibration]: per_unit must be a finite number above 0 core-seconds, got 0",
        ),
    ],
)
def test_bad_input_is_refused_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    assert message in refused(tmp_path, text)


def test_shares_beyond_the_machine_are_refused() -> None:
    cores = os.cpu_count() or 1
    with pytest.raises(InvalidOptionError, match=rf"add up to {cores + 1} cores, and this machine has {cores}"):
        LabConfig(scenario=small_scenario().with_changes(servers=[Server(cores=1)] * (cores + 1)))


def test_translating_balancers_have_to_be_alone() -> None:
    with pytest.raises(InvalidOptionError, match="mode 'dnat' needs one balancer"):
        LabConfig(scenario=small_scenario().with_changes(balancers=2), driver={"mode": "dnat"})


def test_without_root_or_a_package_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    for arguments in (("up", "x"), ("down", "x"), ("run", "-p", "lsq", "-n", "1")):
        code, out, err = in_process(capsys, "lab", *arguments)
        assert code == 2 and out == ""
        assert err.endswith("which needs root: run it by sudo\n") and err.count("\n") == 1
    with pytest.raises(LabError, match="needs root"):
        remove("x")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, *a, **k: None if name == "ip" else which(name, *a, **k))
    with pytest.raises(LabError, match=r"no ip.* here: install .*iproute2"):
        Laboratory(LabConfig(name="x")).up()
    monkeypatch.setattr(shutil, "which", lambda name, *a, **k: None if name == "apache2" else f"/usr/bin/{name}")
    monkeypatch.setattr("lbgym.lab.laboratory.missing_controllers", lambda: "")
    with pytest.raises(LabError, match="no Apache here: install apache2 and libapache2-mod-php"):
        Laboratory(LabConfig(name="x")).up()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "nobody"), "laboratory 'nobody' is not up; give --config or --scenario for one that is not"),
        (("twin", "--load", "0.5", "--rate", "3"), "give --load or --rate, not both; got 0.5 and 3.0"),
        (("twin", "--servers", "0.2,x"), "must be numbers of cores separated by commas, such as 0.15,0.3"),
        (("twin", "--servers", "0.2,-1"), "share must be a finite number above 0 cores, got -1.0"),
        (("twin", "--servers", "1.5"), "a share above 1 must be a whole number of cores, got 1.5"),
        (("down", "a", "--all"), "give a name or --all, not both; got 'a'"),
        (("run", "--policies", "sde"), "unknown contender 'sde'"),
    ],
)
def test_bad_options_are_refused(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str) -> None:
    code, out, err = in_process(capsys, "lab", *arguments)
    assert code == 2 and out == "" and message in err and err.count("\n") == 1


def test_a_configuration_reads_back_as_written(tmp_path: Path) -> None:
    known = Calibration(per_unit=1e-8, fixed=5e-4, latency=-2e-3)
    config = LabConfig(
        name="a-b", server_kind="nginx", period=0.005, driver={"mode": "dnat"}, calibration=known,
        scenario=with_servers(small_scenario(), "0.2,0.4,1"),
    )  # fmt: skip
    write_lab(config, tmp_path / "scenario.toml", tmp_path / "lab.toml")
    assert load_lab(tmp_path / "lab.toml") == config
    assert [server.weight for server in config.scenario.servers] == [1.0, 2.0, 5.0]


def test_options_go_before_the_file(tmp_path: Path) -> None:
    file = tmp_path / "lab.toml"
    file.write_text("name = 'a'\n" + SCENARIO)
    config = load_lab(file, name="b", server_kind="nginx", data_plane=None)
    assert (config.name, config.server_kind, config.data_plane) == ("b", "nginx", "xdp")
    assert config.shares() == [0.2, 0.2] and config.scenario.rate == 30.0


def test_the_twin_is_the_scenario(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = in_process(capsys, "lab", "twin", "--servers", "0.2,0.4", "--load", "0.5", "--balancers", "2")
    assert code == 0
    twin = from_toml(out)
    assert isinstance(twin, Scenario)
    assert [server.capacity for server in twin.servers] == [0.2, 0.4]
    assert (twin.load, twin.balancers) == (pytest.approx(0.5), 2)
    config = LabConfig(name="edge")
    twin = from_toml(twin_of(config))
    assert isinstance(twin, Scenario) and twin.name == "edge-twin"
    assert twin.servers == config.scenario.servers and twin.workload == config.scenario.workload


def test_flows_are_those_of_the_simulator() -> None:
    scenario = Scenario(
        servers=(Server(speed=0.3), Server(speed=0.2)),
        workload=Workload(rate=50.0, demand=Exponential(mean=0.004)),
        events=(Event(time=5.0, kind="rate", value=2.0),),
    )
    known = Calibration(per_unit=1e-8, fixed=5e-4, latency=0.0)
    flows = draw_flows(scenario, 7, 10.0, known, 1 << 40)
    simulation = Simulation(scenario, record_flows=True, dispatch="round_robin")
    simulation.reset([7])
    simulation.step(np.ones((1, 1, 2)), 12.0)
    reference = simulation.take_flows()
    order = np.argsort(reference["flow_id"])
    n = len(flows["arrival"])
    assert 600 < n < 900 and flows["arrival"][-1] < 10.0
    for name in ("arrival", "demand"):
        assert np.array_equal(flows[name], reference[name][order][:n])
    demanded = known.fixed + known.per_unit * flows["amount"]
    assert np.allclose(demanded, np.maximum(flows["demand"], known.fixed), atol=known.per_unit)


def test_amounts_stay_within_what_a_server_can_do() -> None:
    known = Calibration(per_unit=1e-3, fixed=0.01, latency=0.0)
    assert [known.amount(demand, 100) for demand in (0.0, 0.01, 0.015, 5.0)] == [0, 0, 5, 100]


def test_what_holds_for_every_run_of_a_policy_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    agents = logging.getLogger("lbgym.controller")
    for _ in range(2):
        with _quiet(agents):
            for run in range(3):
                for region in ("lab_0", "lab_1"):
                    log_event(logging.INFO, "attached", region, "attached")
                    for policy in ("adaptive", "learned"):
                        log_event(logging.WARNING, "weights_only", region, f"{policy}: takes weights only")
                log_event(logging.WARNING, "timeout", "lab_0", f"no observation in run {run}")
    said = [record.message for record in caplog.records]
    once = ["adaptive: takes weights only", "learned: takes weights only"]
    assert sorted(said) == sorted(2 * [*once, *(f"no observation in run {run}" for run in range(3))])
