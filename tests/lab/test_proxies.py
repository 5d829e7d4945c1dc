"""Laboratories behind proxies: root, network namespaces, control groups, and the proxy itself."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lbgym.errors import PolicyError
from lbgym.features import FEATURE_NAMES
from lbgym.lab import Laboratory, compare_in
from lbgym.lab.data_planes import DATA_PLANES
from lbgym.recording import load_recording
from lbgym.scenarios import RULES
from tests.drivers.test_discovery import eventually
from tests.lab.test_laboratory import config, set_up

NAME = f"p{os.getpid()}"

pytestmark = pytest.mark.slow


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.lab(name)) for name in ("haproxy", "envoy")],
)
def lab(request: pytest.FixtureRequest) -> Iterator[Laboratory]:
    with set_up(config(NAME, data_plane=request.param, server_kind="nginx")) as made:
        yield made


def processes(part: str) -> dict[str, int]:
    """Programs that run on a file of the laboratory's, by name."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if any(f"lab/{NAME}/{part}".encode() in word for word in line):
            found[Path(line[0].decode()).name] = int(process.name)
    return found


def test_flows_go_through_the_proxy_by_the_weights(lab: Laboratory, tmp_path: Path) -> None:
    with lab.restored():
        measured = compare_in(
            lab, "round_robin+configured", 1, warmup=0.0, keep_flows=True, recordings=tmp_path, interval=0.1
        )
    (run,) = measured.runs
    assert run.flows is not None and len(run.flows["fct"]) > 100
    assert (run.flows["status"] == 0).all() and set(run.flows["server"]) == {0, 1}
    placed = np.bincount(run.flows["server"], minlength=2)
    assert abs(placed[1] - 2 * placed[0]) <= 3
    recorded = load_recording(tmp_path / "round_robin+configured-0.parquet")
    measured_features = [name for name in FEATURE_NAMES if name in recorded.real_features]
    assert measured_features == [name for name in FEATURE_NAMES if not name.startswith("duration_")]


def test_what_it_does_not_have_is_refused(lab: Laboratory) -> None:
    with pytest.raises(PolicyError, match="' does not have the dispatch rule 'marginal'; it has round_"):
        compare_in(lab, "marginal", 1)
    with pytest.raises(PolicyError, match=r"rule 'marginal'; it has .*; name one of them, as in 'sed\+adaptive'$"):
        compare_in(lab, "adaptive", 1)


def test_proxy_and_driver_end_together(lab: Laboratory) -> None:
    there = processes("balancer-0")
    driver = there.pop(next(name for name in there if name.startswith("python")))
    assert lab.config.data_plane in there
    os.kill(driver, signal.SIGKILL)
    eventually(lambda: not processes("balancer-0"), 60.0)
    if lab.config.data_plane == "haproxy":
        lab.start_balancers("wcmp", detached=True)
        file = (lab.folder / "balancer-0.cfg").read_text()
        assert "balance random(1)" in file and "weight 128\n" in file and "weight 256\n" in file
    else:
        lab.start_balancers("sed", detached=True)
        file = (lab.folder / "balancer-0.json").read_text()
        assert "LeastRequest" in file and "FULL_SCAN" not in file
        # With servers that are no slower than each other's double, LEAST_REQUEST follows the weights of the file.
        assert '"load_balancing_weight": 500' in (lab.folder / "balancer-0-servers.json").read_text()


def test_rules_are_lbgyms_own() -> None:
    for plane in DATA_PLANES.values():
        assert set(plane.rules) <= RULES.keys()
