"""A policy in the shadow of whoever drives the region, and one that goes a part of the way."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from lbgym.controller import Controller, ControllerConfig
from lbgym.controller.shadow import Shadow, shares
from lbgym.errors import FileWriteError, InvalidOptionError, PolicyError, RegionNotFoundError
from lbgym.sharedmemory import SharedMemoryRegion
from tests.controller.running import Fickle, command, controlling, data_plane, until
from tests.sharedmemory.nursery import Nursery

SAFE = [1.0, 2.0, 3.0, 4.0]
WANTED = [1.0, 3.0, 2.0, 2.0]


def add(shadow: Shadow, k: int, weights: list[float], in_force: list[float], active: list[bool] | None = None) -> None:
    stats = np.zeros((len(weights), 11), np.float32)
    stats[:, 0], stats[:, 4] = k, 0.1
    there = np.array(active or [True] * len(weights))
    names = [f"s{j}" for j in range(len(weights))]
    shadow.add(100.0 + k, k, names, np.array(weights), np.array(in_force), there, stats, safe=k == 0, fallback=k == 1)


def test_what_would_have_moved(tmp_path: Path) -> None:
    shadow = Shadow("lb0", "mine", str(tmp_path / "shadow.json"))
    add(shadow, 0, [3.0, 1.0], [1.0, 1.0])
    add(shadow, 1, [1.0, 1.0], [5.0, 5.0])
    add(shadow, 2, [1.0, 7.0], [1.0, 1.0], [True, False])
    summary = shadow.summary()
    assert summary["steps"] == 3 and summary["seconds"] == 2.0 and summary["fallback_steps"] == 1
    assert summary["moved_max"] == 0.25 and summary["moved_mean"] == pytest.approx(0.25 / 3)
    assert summary["churn_mean"] == pytest.approx((0.25 + 0.5) / 2)
    first, second = shadow.servers()
    assert first["share"] == pytest.approx((0.75 + 0.5 + 1.0) / 3) and first["share_low"] == 0.5
    # A server counts while it is active.
    assert second["share"] == pytest.approx((0.25 + 0.5) / 2) and second["open_flows"] == 0.5
    shadow.close()
    report = json.loads((tmp_path / "shadow.json").read_text())
    assert report["time"] == [0.0, 1.0, 2.0] and report["share"]["s0"] == [0.75, 0.5, 1.0]
    assert report["in_force"]["s1"] == [0.5, 0.5, 0.0] and report["policy"] == "mine"


def test_a_long_shadow_is_thinned_and_whole_in_parquet(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "shadow.parquet"
    shadow = Shadow("lb0", "mine", str(path))
    for k in range(5000):
        add(shadow, k, [1.0, 1.0 + k], [1.0, 1.0])
    assert not path.exists()
    report = shadow.report()
    assert 1000 <= len(report["time"]) <= 2001 and set(np.diff(report["time"])) == {4.0}
    shadow.close()
    table = parquet.read_table(path)
    assert table.num_rows == 5000 and table.column("weights")[4999].as_py() == [1.0, 5000.0]
    assert table.column("servers")[0].as_py() == ["s0", "s1"] and [f.name for f in tmp_path.iterdir()] == [path.name]


def test_shares_of_odd_weights() -> None:
    assert shares(np.array([1e308, 1e308]), np.array([True, True])).tolist() == [0.5, 0.5]
    assert shares(np.array([0.0, 3.0]), np.array([True, False])).tolist() == [0.0, 0.0]


def test_files_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(InvalidOptionError, match=r"must end in \.json or \.parquet, got .*shadow\.csv"):
        Shadow("lb0", "mine", str(tmp_path / "shadow.csv"))
    with pytest.raises(InvalidOptionError, match="out is the file of a shadow, and this is none"):
        Controller(ControllerConfig(policy="uniform", shm="lb0", out="shadow.json"))


@pytest.mark.parametrize("name", ["shadow.json", "shadow.parquet"])
def test_what_it_has_seen_is_kept_after_an_error(nursery: Nursery, tmp_path: Path, name: str) -> None:
    class OnLoad(Fickle):
        uses_features = ("n_flow_on",)

    out = tmp_path / name
    config = {"shadow": True, "out": str(out)}
    with controlling(OnLoad(WANTED), **config) as running:
        with data_plane(nursery):
            running.steps(3)
        with data_plane(nursery, features=["fct_mean"]), pytest.raises(PolicyError, match="needs n_flow_on"):
            running.join()
    assert [file.name for file in tmp_path.iterdir()] == [name]
    if out.suffix == ".json":
        steps = json.loads(out.read_text())["steps"]
    else:
        steps = pytest.importorskip("pyarrow.parquet").read_table(out).num_rows
    assert steps == running.counts.steps >= 3


@pytest.mark.parametrize("name", ["shadow.json", "shadow.parquet"])
def test_a_shadow_that_has_seen_nothing_leaves_no_file(shm_dir: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "files" / name
    config = ControllerConfig(policy="uniform", shm="lb0", attach_timeout=0.0, shadow=True, out=str(out))
    with pytest.raises(RegionNotFoundError):
        Controller(config).run()
    assert list(out.parent.iterdir()) == []


def test_a_parquet_file_that_fails_midway_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    shadow = Shadow("lb0", "mine", str(tmp_path / "shadow.parquet"))
    for k in range(1100):
        add(shadow, k, [1.0, 1.0], [1.0, 1.0])

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(parquet.ParquetWriter, "write_table", full)
    with pytest.raises(FileWriteError, match=r"cannot write .*shadow\.parquet: No space left on device"):
        shadow.close()
    shadow.close()
    assert list(tmp_path.iterdir()) == []


def test_a_tenth_of_the_way(nursery: Nursery) -> None:
    with data_plane(nursery) as strings, controlling(Fickle(WANTED), share=0.1) as running:
        running.steps(3)
        safe, wanted = np.array(SAFE), np.array(WANTED)
        now = np.array(strings.weights)
        step = running.state.step
        assert step is not None and step.proposed is not None and step.proposed.tolist() == WANTED
        share = now / now.sum()
        moved = np.abs(share - safe / safe.sum()).sum() / 2.0
        assert moved == pytest.approx(0.1 * np.abs(wanted / wanted.sum() - safe / safe.sum()).sum() / 2.0)
        assert running.state.share == 0.1


def test_the_share_grows(nursery: Nursery) -> None:
    with data_plane(nursery), controlling(Fickle(WANTED), share=0.5, ramp=0.4) as running:
        running.steps(1)
        shares_seen = []
        while not shares_seen or shares_seen[-1] < 0.5:
            running.steps(1)
            shares_seen.append(running.state.share)
        assert shares_seen == sorted(shares_seen) and shares_seen[0] < 0.5


def test_a_shadow_on_the_command_line_beside_another_agent(nursery: Nursery, tmp_path: Path) -> None:
    out = tmp_path / "shadow.json"
    with data_plane(nursery), controlling(Fickle(WANTED)) as real:
        real.steps(1)
        arguments = ["--policy", "uniform", "--shm", "lb0", "--shadow", "--out", out, "--step-interval", 0.04]
        with command(nursery, *arguments, "--log-level", "debug", COLUMNS="120") as shadow:
            shadow.wait_for("attached")
            shadow.wait_for("step")
            real.steps(5)
            shadow.signal(signal.SIGUSR1)
            event = shadow.wait_for("shadow")
            assert event["policy"] == "uniform" and event["steps"] > 0
            report = until(lambda: out.exists() and json.loads(out.read_text()))
            assert report["region"] == "lb0"
            with SharedMemoryRegion.attach("lb0", read_only=True) as region:
                assert region.agent_pid == os.getpid()
        del report
    assert real.state.counts.steps > 5


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    from lbgym.cli.run import _show

    shadow = Shadow("lb0", "mine")
    _show(shadow)
    assert capsys.readouterr().out == "mine in the shadow of region lb0: no decisions\n"
    add(shadow, 0, [3.0, 1.0], [1.0, 1.0])
    add(shadow, 1, [3.0, 1.0], [1.0, 1.0])
    _show(shadow)
    out = capsys.readouterr().out
    assert "mine in the shadow of region lb0: 2 decisions in 1 s, 1 of them by the fallback." in out
    assert "25.0 % in the mean" in out and "s0" in out and "75.0 to 75.0" in out
