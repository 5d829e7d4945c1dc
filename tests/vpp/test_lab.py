"""A laboratory behind VPP: ``lbgym lab run --data-plane vpp``."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest

from lbgym.lab import Laboratory, compare_in
from tests.lab.test_laboratory import config, set_up
from tests.vpp.vpp import BUILD

pytestmark = [pytest.mark.vpp, pytest.mark.lab("vpp")]
NAME = f"v{os.getpid()}"


@pytest.fixture(params=["dsr", "nat"])
def lab(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Laboratory]:
    monkeypatch.setenv("VPP_PLUGIN_BUILD", str(BUILD))
    with set_up(config(NAME, data_plane="vpp", server_kind="nginx", driver={"mode": request.param})) as made:
        yield made


def test_flows_go_through_vpp_by_the_weights(lab: Laboratory) -> None:
    with lab.restored():
        measured = compare_in(lab, "round_robin+configured", 1, warmup=0.0, keep_flows=True, interval=0.1)
        learned = compare_in(lab, "adaptive", 1, warmup=0.0, keep_flows=True, interval=0.1)
    (run,) = measured.runs
    assert run.flows is not None and len(run.flows["fct"]) > 100
    assert (run.flows["status"] == 0).all() and set(run.flows["server"]) == {0, 1}
    placed = np.bincount(run.flows["server"], minlength=2)
    assert abs(placed[1] - 2 * placed[0]) <= 3
    (run,) = learned.runs
    assert run.flows is not None and (run.flows["status"] == 0).all()
