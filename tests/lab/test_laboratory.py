"""Laboratories of real servers behind a real balancer: root, network namespaces, control groups."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet

from lbgym.lab import Calibration, LabConfig, Laboratory, compare_in, predict, remove
from lbgym.lab.base import LabError
from lbgym.lab.flows import draw_flows
from lbgym.lab.laboratory import ROOT
from lbgym.lab.prediction import fidelity_table, kendall_tau
from lbgym.recording import load_recording
from lbgym.scenarios import Exponential, Scenario, Server, Workload
from lbgym.sharedmemory import SharedMemoryRegion, region_names
from tests.drivers.test_discovery import eventually
from tests.test_cli import in_process

pytestmark = [pytest.mark.lab, pytest.mark.slow]

NAME = f"t{os.getpid()}"
#: What requests take is measured where a test looks at it; elsewhere this is near enough.
KNOWN = Calibration(per_unit=1e-6, fixed=5e-4, latency=0.0)


def config(name: str, **changes: object) -> LabConfig:
    scenario = Scenario(
        name="two",
        servers=(Server(speed=0.2, workers=4, backlog=64, weight=1.0), Server(speed=0.4, workers=4, weight=2.0)),
        workload=Workload(rate=60.0, demand=Exponential(mean=0.002)),
        duration=3.0,
        reject_timeout=20.0,
    )
    return LabConfig(**{"name": name, "scenario": scenario, "calibration": KNOWN, **changes})  # type: ignore[arg-type]


def left(name: str) -> list[str]:
    """Whatever there is of a laboratory."""
    looks = re.compile(rf"{name}|lbgym\.{name}\..*|lab-{name}-\d+([.-].*)?")
    folders = (ROOT, Path("/run/netns"), Path("/sys/fs/bpf/lbgym"), Path("/dev/shm"))
    found = [str(p) for folder in folders if folder.is_dir() for p in folder.iterdir() if looks.fullmatch(p.name)]
    groups = [path for path in Path("/sys/fs/cgroup").glob(f"**/lbgym-lab/{name}")]
    processes = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"lab/{name}/".encode() in (process / "cmdline").read_bytes() and int(process.name) != os.getpid():
                processes.append(process.name)
        except OSError:
            continue
    return found + [str(path) for path in groups] + processes


def removed(name: str) -> bool:
    """The watchdog may have it in hand still."""
    try:
        remove(name)
    except LabError as error:
        assert "is in use by process" in str(error)
        return False
    return True


@contextmanager
def set_up(wanted: LabConfig) -> Iterator[Laboratory]:
    """A laboratory of which nothing is left afterwards."""
    made = Laboratory(wanted)
    try:
        made.up()
        yield made
    finally:
        made.close()
        remove(wanted.name)
        assert left(wanted.name) == []


@pytest.fixture(scope="module")
def lab() -> Iterator[Laboratory]:
    """Two Apache servers that answer through the balancer, calibrated."""
    with set_up(config(NAME, calibration=None, driver={"mode": "dnat"})) as made:
        yield made


def test_flows_are_real_and_those_of_the_simulator(lab: Laboratory, tmp_path: Path) -> None:
    known = lab.config.calibration
    # A microsecond that the server was asked for is one that its control group was charged, on a busy machine, too.
    assert known is not None and 0.85e-6 < known.per_unit < 1.15e-6 and known.fixed > 0.0
    with lab.restored():
        measured = compare_in(
            lab, "round_robin+configured,lsq", 1, warmup=0.0, keep_flows=True, recordings=tmp_path, interval=0.1
        )
    drawn = draw_flows(lab.config.scenario, 0, 3.0, known, lab.most)
    for run in measured.runs:
        assert run.flows is not None and run.series is not None
        assert len(run.flows["fct"]) == len(drawn["arrival"]) > 100
        for key in ("arrival", "demand"):
            assert np.array_equal(run.flows[key], drawn[key])
        assert (run.flows["status"] == 0).all() and run.metrics["completed"] == len(drawn["arrival"])
        assert (run.flows["fct"] > 0.0).all() and np.isfinite(run.utilization).all()
        recorded = load_recording(tmp_path / f"{run.label}-0.parquet")
        assert (recorded.num_servers == 2).all()
    by_turns, by_queue = measured.runs
    placed = np.bincount(by_turns.flows["server"], minlength=2)  # type: ignore[index]
    # Weights 1 and 2, by turns; a connection is a flow for the balancer, so that nobody else's disturb the turns.
    assert abs(placed[1] - 2 * placed[0]) <= 3
    series = by_turns.series
    assert series is not None and np.allclose(series.weights[-1], [2 / 3, 4 / 3])
    assert set(by_queue.flows["server"]) == {0, 1}  # type: ignore[index]
    predicted = predict(lab, measured.contenders, measured.seeds, measured.settings, processes=1)
    assert predicted.values("lsq", "flows") == measured.values("lsq", "flows")
    assert -1.0 <= kendall_tau(predicted, measured) <= 1.0
    assert [row[0].text for row in fidelity_table(predicted, measured).rows] == measured.labels


def test_a_name_is_used_once(lab: Laboratory, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (("down", NAME), ("run", NAME, "-p", "lsq", "-n", "1")):
        code, _, err = in_process(capsys, "lab", *arguments)
        assert code == 2 and f"laboratory '{NAME}' is in use by process {os.getpid()}" in err
    lab.close()
    with pytest.raises(LabError, match=f"laboratory '{NAME}' is up: end it by lbgym lab down {NAME}"):
        Laboratory(config(NAME)).up()
    with pytest.raises(LabError, match="laboratory 'nobody' is not up"):
        Laboratory.attach("nobody")


def test_another_laboratory_beside_it_changes_nothing(
    lab: Laboratory, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    lab.close()
    other = f"{NAME}-0"  # whose names begin as the first one's do
    file, out = tmp_path / "lab.toml", tmp_path / "out"
    file.write_text(
        f"name = '{other}'\nserver_kind = 'nginx'\n[calibration]\nper_unit = 1e-9\nfixed = 1e-4\nlatency = 0.0\n"
        "[scenario]\nduration = 2.0\nbalancers = 2\nreject_timeout = 10.0\n"
        "[[scenario.servers]]\ncount = 2\nspeed = 0.2\n"
        "[scenario.workload]\nrate = 50.0\ndemand = { kind = 'exponential', mean = 0.001 }\n"
    )
    try:
        code, text, err = in_process(capsys, "lab", "up", "--config", file)
        assert (code, err) == (0, "") and f"region lab-{other}-1" in text
        code, text, _ = in_process(capsys, "lab", "status", "--json")
        both = {document["name"]: document for document in json.loads(text)}
        assert {NAME, other} <= both.keys()
        assert all(both[name]["regions"].values() for name in (NAME, other))
        assert all(server["busy_workers"] is not None for name in (NAME, other) for server in both[name]["servers"])
        code, text, err = in_process(
            capsys,
            "lab",
            "run",
            other,
            "-p",
            "lsq",
            "-n",
            1,
            "--out",
            out,
            "--no-plots",
            "--json",
            "--load",
            0.3,
            "--report",
            tmp_path / "lab.html",
        )
        assert code == 0, err
        assert "on real nginx servers behind xdp" in (tmp_path / "lab.html").read_text()
        document = json.loads(text)
        assert document["contenders"][0]["runs"][0]["rejected_share"] == 0.0
        flows = parquet.read_table(out / "flows.parquet").to_pydict()
        assert set(flows["server"]) == {0, 1} and set(flows["status"]) == {0} and set(flows["balancer"]) == {-1}
        # ECMP: each balancer has flows of its own.
        for i in range(2):
            recorded = load_recording(out / "recordings" / f"lsq-0-{i}.parquet")
            assert (recorded.num_servers == 2).all()
        # After the run its balancers are at work again, as before it.
        for name in (f"lab-{other}-0", f"lab-{other}-1"):
            SharedMemoryRegion.attach(name, live=True, read_only=True).close()
    finally:
        code, text, _ = in_process(capsys, "lab", "down", other)
    assert (code, text) == (0, f"removed laboratory {other}\n") and left(other) == []
    with Laboratory.attach(NAME) as again:
        assert all(again.status()["regions"].values()) and f"lab-{NAME}-0" in set(region_names())
        assert all(server["busy_workers"] is not None for server in again.status()["servers"])


@pytest.mark.parametrize("watched", [True, False], ids=["watchdog", "down"])
def test_killed_in_the_middle_nothing_is_left(watched: bool, tmp_path: Path) -> None:
    name = f"{NAME}-killed"
    file = tmp_path / "lab.toml"
    file.write_text(
        f"name = '{name}'\nserver_kind = 'nginx'\n[calibration]\nper_unit = 1e-9\nfixed = 1e-4\nlatency = 0.0\n"
        "[scenario]\nduration = 600.0\n[[scenario.servers]]\nspeed = 0.2\n"
        "[scenario.workload]\nrate = 5.0\ndemand = { kind = 'exponential', mean = 0.001 }\n"
    )
    command = [sys.executable, "-m", "lbgym", "lab", "run", "-c", str(file), "-p", "lsq", "-n", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        under_way = ROOT / name / "load.json"
        eventually(lambda: under_way.exists() or process.poll() is not None, 120.0)
        assert process.poll() is None, process.communicate()[1]
        if not watched:
            for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
                if Path(f"/proc/{child}/comm").read_text().strip() == "sh":
                    os.kill(int(child), signal.SIGKILL)
        process.kill()
        process.wait()
        if watched:
            eventually(lambda: left(name) == [], 60.0)
        else:
            assert left(name) != []
    finally:
        process.kill()
        process.communicate()
        eventually(lambda: removed(name), 60.0)
    # Those that were killed may take a moment to end.
    eventually(lambda: left(name) == [], 60.0)


def test_a_server_that_does_not_start_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"{NAME}-bad"
    broken = config(name, server_kind="nginx")
    made = Laboratory(broken)
    prepare = type(made._kind).prepare

    def with_a_mistake(self: object, server: object) -> list[str]:
        command = prepare(self, server)  # type: ignore[arg-type]
        Path(command[2]).write_text("events {} nonsense;\n")
        return command

    monkeypatch.setattr(type(made._kind), "prepare", with_a_mistake)
    with pytest.raises(LabError, match=r"server-0 \(nginx\) does not answer: .*nonsense"):
        made.up()
    assert left(name) == []
