"""Training and suites on a Ray cluster of two nodes, one of which is killed."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ray")
pytest.importorskip("torch")

import ray
from ray import tune
from ray.cluster_utils import Cluster

from lbgym.errors import CheckpointError, LbgymError, UnknownNameError
from lbgym.evaluation import compare
from lbgym.evaluation.suite import run_suite
from lbgym.training import PPOConfig, Progress, read_checkpoint
from lbgym.training.cluster import ClusterError, pack, train_on_ray, unpack
from lbgym.training.recipes import make_config, read_config
from lbgym.training.tuning import parse_space, tune_recipe

from ..evaluation.suites import TINY

SMALL = PPOConfig(scenario="uniform", num_envs=8, num_steps=8, max_steps=64, total_steps=512, checkpoint_every=0.0)
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning:ray")]


def test_no_cluster_and_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.pt does not exist"):
        train_on_ray("ppo", SMALL, resume_from=tmp_path / "none.pt")
    with pytest.raises(ClusterError, match=r"cannot join the Ray cluster at 127\.0\.0\.1:1: nothing answers there"):
        train_on_ray("ppo", SMALL, address="127.0.0.1:1")
    with pytest.raises(ClusterError, match=r"cannot join the Ray cluster at 127\.0\.0\.1:1"):
        run_suite(TINY, "sed", tmp_path, seeds=1, backend="ray", address="127.0.0.1:1")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes: the head, which this process is on, has no CPUs, so that every training is on the other."""
    # Nothing scales it or forwards its logs, for which two processes would poll all the time.
    head = {"num_cpus": 0, "include_dashboard": False, "no_monitor": True, "include_log_monitor": False}
    made = Cluster(initialize_head=True, head_node_args=head)
    made.add_node(num_cpus=1)
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


# Every command against every signal is in test_cli_train.py, without Ray; a process here costs half a minute.
@pytest.mark.parametrize(("work", "number"), [("train", signal.SIGTERM), ("tune", signal.SIGHUP)])
def test_a_signal_ends_the_command_in_order(cluster: Any, work: str, number: signal.Signals, tmp_path: Path) -> None:
    """Ray puts a handler of its own in place of ours, which would end the process without saving anything."""
    settings = ["--set", "num_steps=8", "--set", "max_steps=64", "--set", "checkpoint_every=0.0"]
    arguments = ["--scenario", "uniform", "--set", "num_envs=8", *settings, "--seconds", "1000", "--out", str(tmp_path)]
    if work == "train":
        # With a Ray of its own.
        arguments += ["--backend", "ray", "--no-tensorboard"]
    else:
        arguments += ["--address", cluster.address, "--param", "learning_rate=loguniform(1e-4, 1e-3)", "--trials", "1"]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    process = subprocess.Popen(
        [sys.executable, "-m", "lbgym", work, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 300
        # Of an iteration of 64 steps after the first ones: those have been reported by then, which Ray does meanwhile.
        while not any(read_checkpoint(file)["step"] >= 640 for file in tmp_path.rglob("ppo.pt")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "there is no checkpoint"
            time.sleep(0.2)
        process.send_signal(number)
        _, err = process.communicate(timeout=180)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 128 + number, err
    assert "Traceback" not in err
    assert read_checkpoint(tmp_path / "ppo.pt")["step"] > 0


def test_a_killed_node_costs_the_steps_since_the_checkpoint(
    cluster: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (first,) = cluster.worker_nodes
    killed: list[int] = []

    def callback(progress: Progress) -> None:
        if not killed and progress.step >= 2_000:
            killed.append(progress.step)
            # In this order: the training would go on while a node starts, and might be over before the loss.
            cluster.remove_node(first, allow_graceful=False)
            cluster.add_node(num_cpus=1)

    config = replace(SMALL, total_steps=8_000)
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

    here = train_ppo(SMALL, out=None).policy.parameters
    there = train_on_ray("ppo", SMALL, out=tmp_path / "agent.pt", tensorboard=True)
    assert there.checkpoint == tmp_path / "agent.pt"
    saved = read_checkpoint(tmp_path / "agent.pt")["network"]["parameters"]
    assert all(np.array_equal(saved[name], part) for name, part in here.items())
    assert list((tmp_path / "tensorboard").iterdir())
    more = train_on_ray("ppo", replace(SMALL, total_steps=1024), out=tmp_path, resume_from=tmp_path / "agent.pt")
    assert more.history[0].step == 512 + 64


def test_what_the_recipe_refuses_comes_back_as_it_is(cluster: Any) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'jain'") as raised:
        train_on_ray("ppo", replace(SMALL, reward_type="jane"))
    assert "Traceback" not in str(raised.value)


def test_a_callback_stops_it(cluster: Any) -> None:
    result = train_on_ray("ppo", replace(SMALL, total_steps=10**9), callback=lambda progress: progress.step >= 256)
    assert 256 <= result.history[-1].step < 10**6
    assert result.checkpoint is None


def test_a_suite_on_a_cluster_is_what_it_would_be_here(cluster: Any, tmp_path: Path) -> None:
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


def test_a_search_survives_the_loss_of_a_node(cluster: Any, tmp_path: Path) -> None:
    (first,) = cluster.worker_nodes
    cluster.add_node(num_cpus=1)
    killed: list[int] = []

    def callback(last: list[Any]) -> None:
        percents = [result.get("percent", 0) for result in last]
        if not killed and len(percents) == 2 and min(percents) >= 20:
            killed.append(min(percents))
            cluster.remove_node(first, allow_graceful=False)

    config = replace(SMALL, total_steps=6_000)
    space = parse_space({"learning_rate": "loguniform(1e-3, 1e-2)", "hidden": "choice(8, 16)"})
    result = tune_recipe("ppo", config, space, trials=2, out=tmp_path, early_stopping=False, callback=callback)
    assert killed
    assert [one.fraction for one in result.trials] == [1.0, 1.0]
    assert [one.error for one in result.trials] == ["", ""]
    assert result.trials[0].metric >= result.trials[1].metric
    algo, values = read_config(result.file)
    assert make_config(algo or "", values) == result.config == replace(config, **result.trials[0].settings)
    assert read_checkpoint(result.checkpoint)["config"]["learning_rate"] == result.trials[0].settings["learning_rate"]
    assert result.checkpoint == tmp_path / "ppo.pt"


def test_the_poor_trials_are_stopped_and_failed_ones_named(cluster: Any, tmp_path: Path) -> None:
    config = replace(SMALL, total_steps=3_000)
    space = {"num_envs": tune.grid_search([8, 7])}  # 7 is no multiple of replicas_per_seed
    result = tune_recipe("ppo", config, space, trials=1, out=tmp_path, metric="fct_mean")
    assert result.config.num_envs == 8
    good, failed = result.trials
    assert good.metric > 0
    assert "num_envs must be a multiple of replicas_per_seed=4, got 7" in failed.error
    # what is refused once is not tried again
    assert not list(tmp_path.rglob("error.txt"))
    with pytest.raises(ClusterError, match=r"none of 1 trials reached a checkpoint.*multiple of replicas_per_seed"):
        tune_recipe("ppo", config, {"num_envs": tune.grid_search([7])}, trials=1, out=tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.1", "write a distribution, such as"),
        ("loguniform(0, 1)", "takes 2 numbers, low < high, above 0"),
        ("uniform(2, 1)", "takes 2 numbers, low < high"),
        ("choice()", "give at least one value"),
        ("chioce(1)", "Did you mean 'choice'?"),
        ("choice(x)", "write a distribution"),
        ("__import__('os').system('true')", "write a distribution"),
    ],
)
def test_a_space_that_is_none(text: str, message: str) -> None:
    with pytest.raises(LbgymError, match=re.escape(message)):
        parse_space({"gamma": text})


def test_what_a_search_refuses(tmp_path: Path) -> None:
    space = parse_space({"gamma": "uniform(0.9, 0.99)"})
    with pytest.raises(UnknownNameError, match=r"unknown setting 'gama'.*Did you mean 'gamma'"):
        tune_recipe("ppo", SMALL, {"gama": space["gamma"]}, out=tmp_path)
    with pytest.raises(UnknownNameError, match="unknown metric 'fct'"):
        tune_recipe("ppo", SMALL, space, out=tmp_path, metric="fct")
    with pytest.raises(LbgymError, match="trials must be at least 1, got 0"):
        tune_recipe("ppo", SMALL, space, out=tmp_path, trials=0)
    with pytest.raises(LbgymError, match="nothing to tune"):
        tune_recipe("ppo", SMALL, {}, out=tmp_path)


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
