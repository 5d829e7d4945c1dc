"""BenchMARL: the scenarios as its tasks, and the recipe for its algorithms."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if find_spec("benchmarl") is None:
    pytest.skip("needs benchmarl", allow_module_level=True)

import torch

from lbgym import LoadBalanceEnv
from lbgym.errors import (
    CheckpointError,
    InvalidOptionError,
    LbgymError,
    PolicyError,
    UnknownNameError,
    UnsupportedSpaceError,
)
from lbgym.evaluation import compare
from lbgym.policies import make_agent
from lbgym.scenarios import scenario_names
from lbgym.training import load_policy, read_checkpoint
from lbgym.training.benchmarl import ALGORITHMS, WEIGHTS, BenchMARLConfig, LoadBalanceTask, train_benchmarl
from lbgym.training.benchmarl import train as recipe
from lbgym.training.recipes import config_of
from lbgym.training.runs import Progress

# isort: split
from benchmarl.environments import task_config_registry
from tensordict import TensorDict
from torchrl.envs.utils import ExplorationType, check_env_specs, set_exploration_type

SMALL = {
    "num_envs": 4,
    "num_steps": 8,
    "max_steps": 16,
    "total_steps": 96,
    "minibatches": 2,
    "hidden": 8,
    "epochs": 2,
    "batch_size": 16,
    "optimizer_steps": 2,
    "env_kwargs": {"num_threads": 1},
}
TRAINED = ("qmix", "vdn", "maddpg", "mappo", "isac")
#: Speeds and background loads relative to what is configured, which is shown as well.
INDEX: dict[str, Any] = {
    "action_type": "index",
    "dispatch": "marginal",
    "env_kwargs": {"num_threads": 1, "observe_configured": True, "observe_background": True},
}


def small(**changes: Any) -> BenchMARLConfig:
    return BenchMARLConfig(**SMALL | changes)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each of some algorithms."""
    folder = tmp_path_factory.mktemp("benchmarl")
    found = {}
    for algorithm in TRAINED:
        path = train_benchmarl(small(algorithm=algorithm), out=folder).checkpoint
        assert path is not None
        found[algorithm] = path
    return found


@pytest.mark.parametrize("algorithm", TRAINED)
def test_a_checkpoint_acts_without_benchmarl(algorithm: str, checkpoints: dict[str, Path]) -> None:
    path = checkpoints[algorithm]
    assert path.name == f"benchmarl-{algorithm}.pt"
    policy = load_policy(path)
    assert policy.algo == f"benchmarl-{algorithm}"
    assert policy.step == 96
    env = LoadBalanceEnv(scenario="marllb-moderate", **policy.env_kwargs)
    observation, info = env.reset(seed=1)
    for _ in range(3):
        action = policy.act(observation, info)
        assert env.action_space.contains(action)
        observation, *_, info = env.step(action)
    comparison = compare("marllb-moderate", f"lsq,{path}", seeds=2, duration=5.0, processes=1)
    assert len(comparison.contenders) == 2


@pytest.mark.parametrize(
    ("algorithm", "network", "changes"),
    [
        *((algorithm, network, {}) for network in ("equivariant", "mlp") for algorithm in TRAINED),
        *((algorithm, "equivariant", INDEX) for algorithm in ("mappo", "isac", "maddpg")),
        ("mappo", "mlp", INDEX),
    ],
)
def test_learning_moves_the_policy_that_is_saved(
    algorithm: str, network: str, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(algorithm=algorithm, network=network, **changes)
    experiments = []
    make = recipe._experiment

    def remember(*arguments: Any) -> Any:
        experiments.append(make(*arguments))
        before.extend(p.detach().clone() for p in experiments[-1].losses["lb"].parameters())
        return experiments[-1]

    before: list[torch.Tensor] = []
    monkeypatch.setattr(recipe, "_experiment", remember)
    result = train_benchmarl(config, out=tmp_path)
    (experiment,) = experiments
    after = list(experiment.losses["lb"].parameters())
    moved = [not torch.equal(p, q) for p, q in zip(after, before, strict=True) if p.requires_grad]
    assert moved
    # of a head that begins at 0 the layer before gets no gradient, and inactive servers there are none
    assert np.mean(moved) > 0.8

    # what is loaded acts as BenchMARL's policy in the environment itself
    vector = config.make_env()
    observation, info = vector.reset(seed=3)
    torch.manual_seed(0)
    for _ in range(3):
        observation, *_, info = vector.step(vector.action_space.sample())
    rows, weights = observation.reshape(8, -1), info["weights"].reshape(8, -1)
    seen = torch.from_numpy(observation)
    told = TensorDict({"lb": TensorDict({"observation": seen}, [4, 2])}, [4])
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        wanted = experiment.algorithm.get_policy_for_loss("lb")(told)["lb", "action"].numpy()
    got = load_policy(result.checkpoint).act(rows, {"weights": weights})
    assert np.shape(got)[1:] == vector.agent_action_space.shape
    assert np.allclose(np.asarray(got).reshape(wanted.shape), np.clip(wanted, -1, None), atol=1e-5)
    # and goes on in its environment
    vector.step(np.reshape(got, vector.action_space.shape))
    vector.close()


@pytest.mark.parametrize("algorithm", TRAINED)
def test_goes_on_where_it_stopped(algorithm: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    path = checkpoints[algorithm]
    config = config_of(path, f"benchmarl-{algorithm}")
    assert config == small(algorithm=algorithm)
    again = train_benchmarl(replace(config, total_steps=160), out=tmp_path, resume_from=path)
    assert [p.step for p in again.history] == [128, 160]
    before, after = read_checkpoint(path), read_checkpoint(again.checkpoint)
    assert after["seconds"] > before["seconds"]
    assert after["trainer"]["scaling"] == before["trainer"]["scaling"]
    name = next(iter(before["trainer"]["optimizers"]))
    steps = [float(saved["trainer"]["optimizers"][name]["state"][0]["step"]) for saved in (before, after)]
    assert steps[1] == pytest.approx(steps[0] * 5 / 3)
    # nothing is left of the budget: the checkpoint is written again as it was
    same = train_benchmarl(config, out=tmp_path / "same", resume_from=path)
    assert same.history == []
    kept = read_checkpoint(same.checkpoint)["network"]["parameters"]
    for key, value in before["network"]["parameters"].items():
        assert torch.equal(kept[key], value)


@pytest.mark.parametrize("algorithm", ["qmix", "mappo", "isac", "maddpg"])
def test_permuted_servers_get_permuted_weights(algorithm: str, checkpoints: dict[str, Path]) -> None:
    policy = load_policy(checkpoints[algorithm])
    env = LoadBalanceEnv(scenario="marllb-moderate", **policy.env_kwargs)
    n, rng = env.num_servers, np.random.default_rng(0)
    columns = policy.features
    observation = rng.random(n * (1 + columns), np.float32)
    observation[:n] = 1.0
    weights = rng.uniform(0.5, 2.0, n)
    order = rng.permutation(n)
    moved = np.concatenate([observation[:n][order], observation[n:].reshape(n, columns)[order].ravel()])

    def act(flat: Any, in_force: Any) -> Any:
        return env.action_codec.to_weights(policy.act(flat, {"weights": in_force}))

    assert np.allclose(act(moved, weights[order]), act(observation, weights)[order], rtol=1e-4)


@pytest.fixture(scope="module")
def by_index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of MAPPO that sets speeds and background loads."""
    path = train_benchmarl(small(algorithm="mappo", **INDEX), out=tmp_path_factory.mktemp("index")).checkpoint
    assert path is not None
    return path


def test_agents_that_set_background_loads_begin_near_the_rule(by_index: Path) -> None:
    policy = load_policy(by_index)
    assert policy.num_servers is None and policy.dispatch == "marginal"
    env = LoadBalanceEnv(scenario="marllb-moderate", **policy.env_kwargs)
    observation, info = env.reset(seed=1)
    twin = policy.copy()
    for _ in range(3):
        action = policy.act(observation, info)
        assert action.shape == (7, 2) and env.action_space.contains(action)
        assert np.array_equal(action, twin.act(observation, info))
        observation, *_, info = env.step(action)
    cores = np.array(env.scenario.configured_weights)
    relative = info["weights"] / cores
    assert np.allclose(relative / relative.mean(), 1.0, atol=0.1)
    loads = info["background"] / cores
    assert loads.min() > 0.1 and loads.max() < 0.6


def test_agents_that_set_background_loads_compare_under_their_rule(by_index: Path) -> None:
    comparison = compare("marllb-moderate", f"sed,{by_index}", seeds=2, duration=5.0, processes=1)
    assert np.isfinite(comparison.values("benchmarl-mappo", "fct_mean")).all()
    with pytest.raises(PolicyError, match="sets background loads, and the dispatch rule 'wcmp' counts no flows"):
        compare("marllb-moderate", f"wcmp+{by_index}", seeds=2, duration=5.0)
    agent = make_agent(str(by_index))
    with pytest.raises(PolicyError, match=r"'index'.*the data plane takes weights only"):
        agent.fit(7, index=False)


def test_goes_on_with_background_loads_alone(by_index: Path, tmp_path: Path) -> None:
    config = config_of(by_index, "benchmarl-mappo")
    assert config == small(algorithm="mappo", **INDEX)
    again = train_benchmarl(replace(config, total_steps=128), out=tmp_path, resume_from=by_index)
    assert [p.step for p in again.history] == [128]
    with pytest.raises(CheckpointError, match="has numbers=2, but the environment to train on needs numbers=1"):
        train_benchmarl(replace(config, action_type="normalized"), resume_from=by_index)


def test_joint_choices_relative_to_what_is_configured(tmp_path: Path) -> None:
    relative = {"relative_to_configured": True, "action_weights": [1.0, 1.5], "num_threads": 1}
    path = train_benchmarl(small(env_kwargs=relative, dispatch="sed_scaled"), out=tmp_path).checkpoint
    policy = load_policy(str(path))
    env = LoadBalanceEnv(scenario="marllb-moderate", **policy.env_kwargs)
    observation, info = env.reset(seed=1)
    *_, info = env.step(policy.act(observation, info))
    ratios = info["weights"] / np.array(env.scenario.configured_weights)
    assert set(np.round(ratios, 9)) <= {1.0, 1.5}


@pytest.mark.parametrize(
    ("algorithm", "action_type"), [("iql", "joint"), ("ippo", "joint"), ("masac", "normalized"), ("masac", "joint")]
)
def test_the_other_algorithms(algorithm: str, action_type: str) -> None:
    result = train_benchmarl(small(algorithm=algorithm, action_type=action_type))
    assert result.checkpoint is None
    assert result.policy.algo == f"benchmarl-{algorithm}"
    assert len(result.history) == 3


def test_progress_and_ends(tmp_path: Path) -> None:
    heard: list[Progress] = []

    def stop_at_64(progress: Progress) -> bool:
        heard.append(progress)
        return progress.step >= 64

    result = train_benchmarl(small(), out=tmp_path / "some.pt", callback=stop_at_64, tensorboard=True)
    assert heard == result.history
    assert [p.step for p in heard] == [32, 64]
    assert all(p.reward < 0 and p.steps_per_second > 0 and 0 < p.fraction < 1 for p in heard)
    assert all(np.isfinite(p.losses["value"]) for p in heard)
    assert result.policy.step == 64
    assert sorted(p.name for p in tmp_path.iterdir()) == ["some.pt", "tensorboard"]
    by_time = train_benchmarl(small(total_steps=None, seconds=0.05))
    assert by_time.history[-1].fraction == 1.0


def test_exploration_falls_with_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    class Watch(recipe._Watch):
        def explore(self) -> None:
            super().explore()
            found.append(float(self.experiment.explores()[0].eps))

    monkeypatch.setattr(recipe, "_Watch", Watch)
    train_benchmarl(small(total_steps=128, exploration=0.5))
    assert found == pytest.approx([1.0, 0.55, 0.1, 0.1, 0.1])


def test_an_interrupt_saves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_benchmarl(small(), out=tmp_path, callback=interrupt)
    assert load_policy(tmp_path / "benchmarl-qmix.pt").step == 32
    told = capsys.readouterr()
    assert told.out == told.err == ""


def test_refuses_what_does_not_fit(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    qmix = checkpoints["qmix"]
    for changes, said in (
        ({"algorithm": "vdn"}, "trained with algorithm 'qmix', not 'vdn'"),
        ({"network": "mlp"}, "network 'equivariant', but the configuration has 'mlp'"),
        ({"hidden": 16}, "hidden 8, but the configuration has 16"),
        ({"observe_weights": False}, "observe_weights True"),
        ({"num_balancers": 3}, "2 balancers, but the environment to train on has 3"),
        ({"scenario": None, "num_servers": 5}, "num_servers=7, but the environment to train on needs num_servers=5"),
        ({"env_kwargs": {"action_weights": [1.0, 1.5, 2.0]}}, "choices=2"),
        ({"options": {"mixing_embed_dim": 8}}, "other options"),
    ):
        with pytest.raises(CheckpointError, match=said):
            train_benchmarl(small(**changes), resume_from=qmix, out=tmp_path)
    with pytest.raises(CheckpointError, match="'benchmarl-qmix', not by 'benchmarl-vdn'"):
        config_of(qmix, "benchmarl-vdn")
    assert not list(tmp_path.iterdir())


def test_refuses_configurations_that_make_no_sense() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'qmix'"):
        BenchMARLConfig(algorithm="qmx")
    with pytest.raises(UnsupportedSpaceError, match=r"use action_type 'joint'.*'mappo'"):
        BenchMARLConfig(algorithm="qmix", action_type="normalized")
    with pytest.raises(UnsupportedSpaceError, match=r"QMIX.*cannot take action_type 'index': use action_type 'joint'"):
        BenchMARLConfig(algorithm="qmix", action_type="index")
    with pytest.raises(UnsupportedSpaceError, match=r"use action_type 'normalized' or 'index'$"):
        BenchMARLConfig(algorithm="maddpg", action_type="discrete")
    with pytest.raises(UnknownNameError, match="network"):
        BenchMARLConfig(network="gnn")
    with pytest.raises(InvalidOptionError, match="sees_weights in BenchMARLConfig is now called observe_weights"):
        BenchMARLConfig(sees_weights=True)
    with pytest.raises(InvalidOptionError, match=r"observe_weights=True in BenchMARLConfig.env_kwargs"):
        BenchMARLConfig(env_kwargs={"observe_weights": True})
    with pytest.raises(UnknownNameError, match="reward sharing"):
        BenchMARLConfig(reward_sharing="all")
    with pytest.raises(InvalidOptionError, match="exploration must be a finite number above 0 and at most 1"):
        BenchMARLConfig(exploration=0.0)
    with pytest.raises(LbgymError, match="batch_size must be a whole number"):
        BenchMARLConfig(batch_size=0)
    with pytest.raises(UnknownNameError, match="Did you mean 'mixing_embed_dim'"):
        train_benchmarl(small(options={"mixing_embed": 8}))
    with pytest.raises(UnknownNameError, match="option 'lr'"):
        train_benchmarl(small(options={"lr": 1e-3}))


def test_algorithms_have_the_defaults_of_the_table() -> None:
    for name, kind in ALGORITHMS.items():
        config = BenchMARLConfig(algorithm=name)
        assert config.action_type == kind.action_types[0]
        assert (config.num_steps, config.learning_rate) == (kind.num_steps, kind.learning_rate)
        assert config.env_kwargs == WEIGHTS[config.action_type]
    # keys of several balancers are none of one that acts alone
    config = BenchMARLConfig(env_kwargs={"action_delay": 0.1})
    assert "action_delay" in config.environment_kwargs()
    assert "action_delay" not in config.observation_kwargs()


def test_tasks() -> None:
    task = LoadBalanceTask.MARLLB_MODERATE.get_task({"num_balancers": 3, "max_steps": 5})
    assert task_config_registry["lbgym/marllb_moderate"] is LoadBalanceTask.MARLLB_MODERATE
    assert {name.lower().replace("_", "-") for name in LoadBalanceTask.__members__} == set(scenario_names())
    for continuous in (True, False):
        env = task.get_env_fun(2, continuous, 0, "cpu")()
        check_env_specs(env)
        assert env.batch_size == (2,)
        assert task.max_steps(env) == 5
        assert task.group_map(env) == {"lb": ["lb_0", "lb_1", "lb_2"]}
        assert task.observation_spec(env)["lb", "observation"].shape == (3, 91)
        assert task.state_spec(env)["state"].shape == env.observation_spec["state"].shape[1:]
        assert task.action_spec(env)["lb", "action"].shape == ((3, 7) if continuous else (3,))
        env.close()
    assert (task.supports_continuous_actions(), task.supports_discrete_actions()) == (True, True)
    pairs = LoadBalanceTask.MARLLB_MODERATE.get_task({"action_type": "index"})
    assert (pairs.supports_continuous_actions(), pairs.supports_discrete_actions()) == (True, False)
    env = pairs.get_env_fun(2, True, 0, "cpu")()
    check_env_specs(env)
    # a vector per balancer, server by server
    assert pairs.action_spec(env)["lb", "action"].shape == (2, 14)
    env.close()
    joint = LoadBalanceTask.UNIFORM.get_task({"action_type": "joint"})
    assert (joint.supports_continuous_actions(), joint.supports_discrete_actions()) == (False, True)
