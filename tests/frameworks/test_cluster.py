"""Training on a Ray cluster of two nodes, one of which is killed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

ray = pytest.importorskip("ray")
pytest.importorskip("torch")

from ray.cluster_utils import Cluster

from lbgym.errors import CheckpointError, UnknownNameError
from lbgym.evaluation import compare
from lbgym.training import PPOConfig, Progress, read_checkpoint
from lbgym.training.cluster import ClusterError, pack, train_on_ray, unpack

SMALL = PPOConfig(scenario="uniform", num_envs=8, num_steps=8, max_steps=64, total_steps=512, checkpoint_every=0.0)
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning:ray")]


def test_no_cluster_and_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.pt does not exist"):
        train_on_ray("ppo", SMALL, resume_from=tmp_path / "none.pt")
    with pytest.raises(ClusterError, match=r"cannot join the Ray cluster at 127\.0\.0\.1:1: nothing answers there"):
        train_on_ray("ppo", SMALL, address="127.0.0.1:1")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes: the head, which this process is on, has no CPUs, so that every training is on the other."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    made.add_node(num_cpus=1)
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


def test_a_killed_node_costs_the_steps_since_the_checkpoint(
    cluster: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (first,) = cluster.worker_nodes
    killed: list[int] = []

    def callback(progress: Progress) -> None:
        if not killed and progress.step >= 2_000:
            killed.append(progress.step)
            cluster.add_node(num_cpus=1)
            cluster.remove_node(first, allow_graceful=False)

    config = replace(SMALL, total_steps=20_000)
    with caplog.at_level(logging.WARNING, "lbgym"):
        result = train_on_ray("ppo", config, out=tmp_path, callback=callback)
    assert killed
    assert result.restarts == 1
    assert "lost with its node" in caplog.text
    steps = [progress.step for progress in result.history]
    # every step once and in order, though some were made twice
    assert steps == sorted(set(steps))
    assert steps[-1] >= config.total_steps
    # it did not begin again: the first progress after the loss is that of a checkpoint's next update
    assert "from the checkpoint of step" in caplog.text
    assert read_checkpoint(tmp_path / "ppo.pt")["step"] == steps[-1]
    compare("uniform", f"lsq,{result.checkpoint}", seeds=2, duration=5.0)


def test_it_is_what_it_would_be_here(cluster: Any, tmp_path: Path) -> None:
    """Same seed, same parameters: on a node of a cluster or in this process."""
    from lbgym.training import train_ppo

    here = train_ppo(SMALL, out=None).policy.network.state_dict()
    there = train_on_ray("ppo", SMALL, out=tmp_path / "agent.pt", tensorboard=True)
    assert there.checkpoint == tmp_path / "agent.pt"
    saved = read_checkpoint(tmp_path / "agent.pt")["network"]
    assert all((saved[name] == part).all() for name, part in here.items())
    assert list((tmp_path / "tensorboard").iterdir())
    more = train_on_ray("ppo", replace(SMALL, total_steps=1024), out=tmp_path, resume_from=tmp_path / "agent.pt")
    assert [progress.step for progress in more.history][0] == 512 + 64


def test_what_the_recipe_refuses_comes_back_as_it_is(cluster: Any) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'jain'") as raised:
        train_on_ray("ppo", replace(SMALL, reward_type="jane"))
    assert "Traceback" not in str(raised.value)


def test_a_callback_stops_it(cluster: Any) -> None:
    result = train_on_ray("ppo", replace(SMALL, total_steps=10**9), callback=lambda progress: progress.step >= 256)
    assert 256 <= result.history[-1].step < 10**6
    assert result.checkpoint is None


def test_packing_takes_what_belongs_to_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "sb3-sac.zip").write_text("model")
    (tmp_path / "a" / "sb3-sac.replay.pkl").write_text("replay")
    (tmp_path / "a" / "sb3-sac.state").mkdir()
    (tmp_path / "a" / "sb3-sac.state" / "x").write_text("state")
    (tmp_path / "a" / "other.zip").write_text("other")
    packed = pack(tmp_path / "a" / "sb3-sac.zip", "agent.zip")
    for _ in range(2):
        unpack(packed, tmp_path / "b")
    assert sorted(p.relative_to(tmp_path / "b").as_posix() for p in (tmp_path / "b").rglob("*")) == [
        "agent.replay.pkl",
        "agent.state",
        "agent.state/x",
        "agent.zip",
    ]
