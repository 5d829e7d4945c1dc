"""A suite on the nodes of a Ray cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")

from lbgym.evaluation.suite import run_suite
from lbgym.ray_cluster import ClusterError

from ..evaluation.suites import TINY
from .test_cluster import cluster  # noqa: F401 - a fixture

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning:ray")]


def test_a_cluster_that_does_not_answer_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"cannot join the Ray cluster at 127\.0\.0\.1:1"):
        run_suite(TINY, "sed", tmp_path, seeds=1, backend="ray", address="127.0.0.1:1")


def test_a_suite_on_a_cluster_is_what_it_would_be_here(cluster: Any, tmp_path: Path) -> None:  # noqa: F811
    made: list[int] = []
    there = tmp_path / "there"
    run_suite(TINY, "sed+latency,c3", there, backend="ray", seeds=2, progress=lambda done, *_: made.append(done))
    assert made == list(range(1, 19))
    here = tmp_path / "here"
    run_suite(TINY, "sed+latency,c3", here, seeds=2, processes=1)
    for name in ("sed+latency.json", "c3.json", "lsq.json"):
        assert (there / name).read_bytes() == (here / name).read_bytes()
    # The rest is made where there is room: a result that was begun on a cluster is finished here.
    run_suite(TINY, "sed+latency,c3", there, processes=1)
    run_suite(TINY, "sed+latency,c3", here, backend="ray")
    assert (there / "c3.json").read_bytes() == (here / "c3.json").read_bytes()
