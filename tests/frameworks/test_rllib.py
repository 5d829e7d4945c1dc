"""RLlib's algorithms: what they learn is exported as it is, and goes on where it stopped."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

pytest.importorskip("ray.rllib")

import ray
import torch
from ray.rllib.core import Columns
from ray.rllib.core.rl_module.rl_module import RLModule

from lbgym.env.observations import ObservationLayout
from lbgym.errors import CheckpointError, InvalidOptionError, LbgymError, UnknownNameError, UnsupportedSpaceError
from lbgym.evaluation import compare
from lbgym.training import load_policy, read_checkpoint
from lbgym.training.recipes import algo_of, config_of, make_config
from lbgym.training.rllib import ALGORITHMS, RLlibConfig, RLlibResult, train_rllib
from lbgym.training.rllib import train as recipe
from lbgym.training.rllib.environment import RLlibMultiAgentEnv, RLlibVectorEnv
from lbgym.training.rllib.modules import SACModule
from lbgym.training.runs import Progress

pytestmark = [
    # each env runner registers its environment with Gymnasium under the same name, once more in the same process
    pytest.mark.filterwarnings(
        r"ignore:.*Overriding environment rllib-(single|multi)-agent-env-v0 already in registry\.:UserWarning"
    ),
]

#: What makes a training of each algorithm short.
SMALL: dict[str, Any] = {"num_envs": 8, "max_steps": 16, "hidden": 8, "total_steps": 128}
SHORT: dict[str, dict[str, Any]] = {
    "ppo": {"num_steps": 8, "minibatches": 2, "epochs": 2},
    "dqn": {
        "scenario": "uniform",
        "options": {"num_steps_sampled_before_learning_starts": 32, "target_network_update_freq": 32},
    },
    "sac": {"options": {"num_steps_sampled_before_learning_starts": 32}},
    "impala": {"total_steps": 512},
    "appo": {"total_steps": 512},
}


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """One Ray for all tests, which trainings find and leave running."""
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def config(algorithm: str = "ppo", **changes: Any) -> RLlibConfig:
    return RLlibConfig(algorithm=algorithm, **SMALL | SHORT[algorithm] | changes)


def actor(path: Path | None) -> dict[str, torch.Tensor]:
    assert path is not None
    parameters: dict[str, torch.Tensor] = read_checkpoint(path)["network"]["parameters"]
    return parameters


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> bool:
    return any(not torch.equal(value, after[name]) for name, value in before.items())


def saved_module(path: Path, name: str) -> Any:
    """RLlib's own module, as RLlib saved it beside a checkpoint."""
    folder = path.with_suffix(".rllib") / read_checkpoint(path)["trainer"]["state"]
    return RLModule.from_checkpoint(folder / "learner_group" / "learner" / "rl_module" / name)


def actions_of(module: Any, seen: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        out = module.forward_inference({Columns.OBS: seen})
        if Columns.ACTIONS in out:
            return out[Columns.ACTIONS].numpy()
        distribution = module.get_inference_action_dist_cls().from_logits(out[Columns.ACTION_DIST_INPUTS])
        return np.asarray(distribution.to_deterministic().sample().numpy())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "changes"),
    [
        ("ppo", {"action_type": "discrete"}),
        ("ppo", {"network": "equivariant"}),
        ("ppo", {"multi_agent": True, "scenario": "marllb-moderate", "num_envs": 2, "total_steps": 32}),
        ("dqn", {}),
        ("dqn", {"network": "equivariant"}),
        ("sac", {}),
        ("sac", {"network": "equivariant"}),
        ("impala", {}),
        ("appo", {}),
    ],
    ids=[
        "ppo-discrete",
        "ppo",
        "ppo-multi-agent",
        "dqn",
        "dqn-equivariant",
        "sac",
        "sac-equivariant",
        "impala",
        "appo",
    ],
)
def test_learns_is_exported_and_goes_on(algorithm: str, changes: dict[str, Any], tmp_path: Path) -> None:
    short = config(algorithm, **changes)
    first = train_rllib(short, out=tmp_path)
    path = first.checkpoint
    assert path == tmp_path / f"rllib-{algorithm}.pt"
    assert algo_of(path) == f"rllib-{algorithm}"
    last = first.history[-1]
    assert last.step >= (short.total_steps or 0)
    assert np.isfinite([last.reward, last.fct_mean]).all()
    assert last.losses["value"] > 0.0
    before = actor(path)

    # the plain policy acts as RLlib's own module does
    policy = load_policy(path)
    module = saved_module(path, "balancer" if short.multi_agent else "default_policy")
    rng = np.random.default_rng(1)
    n = saved_servers(path)
    flat = np.concatenate([np.ones((32, n)), rng.random((32, n * policy.features))], -1).astype(np.float32)
    weights = rng.uniform(0.2, 5.0, (32, n))
    own = actions_of(module, torch.from_numpy(flat))
    assert np.allclose(policy.act(flat, {"weights": weights}), own, atol=1e-5)

    compared = compare(short.scenario, f"lsq,{path}", 2, duration=5.0, warmup=1.0, processes=1)
    assert all(np.isfinite(compared.values(label, "fct_mean")).all() for label in compared.labels)

    # a resumed training goes on from there
    more = replace(config_of(path, f"rllib-{algorithm}"), total_steps=2 * last.step)
    second = train_rllib(more, out=tmp_path, resume_from=path)
    assert second.history[0].step > last.step
    assert second.history[0].seconds > last.seconds
    assert second.history[-1].step >= 2 * last.step
    assert moved(before, actor(second.checkpoint))
    assert len(list(path.with_suffix(".rllib").iterdir())) == 1


def saved_servers(path: Path) -> int:
    return int(read_checkpoint(path)["shapes"]["num_servers"])


def test_a_lost_env_runner_is_started_again_and_the_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Any] = []
    build = recipe._Run._build

    def keeping(self: Any, keys: Any) -> Any:
        built.append(build(self, keys))
        return built[-1]

    monkeypatch.setattr(recipe._Run, "_build", keeping)

    def lose_one(progress: Progress) -> bool:
        if progress.step and len(killed) == 0:
            killed.append(progress.step)
            ray.kill(built[0].env_runner_group._worker_manager.actors()[1], no_restart=False)
        return bool(killed) and progress.step >= killed[0] + 256

    killed: list[int] = []
    result = train_rllib(config(env_runners=1, total_steps=None, seconds=120.0), callback=lose_one)
    assert killed
    assert result.history[-1].step >= killed[0] + 256


def test_a_training_stops_when_told_and_is_saved_when_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def interrupt(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_rllib(config(), out="some.pt", callback=interrupt)
    assert load_policy("some.pt").step == 64
    assert train_rllib(config(), resume_from="some.pt").policy.step == 128
    steps = config().num_envs * config().num_steps
    result = train_rllib(config(total_steps=None, seconds=600.0, checkpoint_every=0.0), callback=lambda progress: True)
    assert (len(result.history), result.checkpoint, result.policy.step) == (1, None, steps)
    assert ray.is_initialized()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RLlibResult:
    return train_rllib(config(total_steps=64), out=tmp_path_factory.mktemp("trained"), tensorboard=True)


def test_a_checkpoint_that_does_not_fit_is_refused_with_both(trained: RLlibResult, tmp_path: Path) -> None:
    path = trained.checkpoint
    assert path is not None
    assert (path.parent / "tensorboard").is_dir()
    with pytest.raises(CheckpointError, match="trained with algorithm 'ppo', not 'sac'"):
        train_rllib(config("sac"), resume_from=path)
    with pytest.raises(CheckpointError, match="trained by recipe 'rllib-ppo', not by 'rllib-appo'"):
        config_of(path, "rllib-appo")
    with pytest.raises(CheckpointError, match="network 'mlp', but the configuration has 'equivariant'"):
        train_rllib(config(network="equivariant"), resume_from=path)
    with pytest.raises(CheckpointError, match="hidden 8, but the configuration has 16"):
        train_rllib(config(hidden=16), resume_from=path)
    with pytest.raises(CheckpointError, match=r"choices=0, .* needs choices=3"):
        train_rllib(config(action_type="discrete"), resume_from=path)
    with pytest.raises(CheckpointError, match=r"num_servers=8, .* needs num_servers=4"):
        train_rllib(config(scenario="uniform"), resume_from=path)
    alone = shutil.copy(path, tmp_path)
    with pytest.raises(CheckpointError, match=r"the state of its training, .*rllib-ppo\.rllib.*, is missing"):
        train_rllib(config(), resume_from=alone)


@pytest.mark.parametrize(
    ("algorithm", "action_type", "fits"),
    [
        ("dqn", "discrete", "DQN .* 'discrete': use action_type 'joint', with few enough action_weights"),
        ("sac", "discrete", "SAC .* 'discrete': use action_type 'normalized'"),
        ("ppo", "continuous", "PPO .* 'continuous': use action_type 'normalized' or 'discrete' or 'joint'"),
    ],
)
def test_actions_that_do_not_fit_are_refused_with_those_that_do(algorithm: str, action_type: str, fits: str) -> None:
    with pytest.raises(UnsupportedSpaceError, match=fits):
        RLlibConfig(algorithm=algorithm, action_type=action_type)


def test_what_a_configuration_cannot_have() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'appo'"):
        RLlibConfig(algorithm="apo")
    with pytest.raises(UnknownNameError, match="unknown network 'mpl'"):
        RLlibConfig(network="mpl")
    with pytest.raises(LbgymError, match="multi_agent=True is for ppo, impala, appo, not for 'dqn'"):
        RLlibConfig(algorithm="dqn", multi_agent=True)
    with pytest.raises(LbgymError, match="env_runners must be at least 1, got 0"):
        RLlibConfig(algorithm="impala", env_runners=0)
    with pytest.raises(LbgymError, match="multiple of env_runners=3, got 64"):
        RLlibConfig(env_runners=3)
    with pytest.raises(UnknownNameError, match="Did you mean 'clip_param'"):
        train_rllib(config(options={"clip_parm": 0.1}))
    # fields of the configuration set them, or another network would be needed
    for name in ("gamma", "lr", "model"):
        with pytest.raises(UnknownNameError, match=f"unknown option '{name}'"):
            train_rllib(config(options={name: 0.9}))
    with pytest.raises(LbgymError, match=r"3 \*\* 8 actions .* allowed: 4,096"):
        train_rllib(RLlibConfig(algorithm="dqn", env_kwargs={"action_weights": [1.0, 2.0, 4.0]}))
    with pytest.raises(InvalidOptionError, match="env_runners=64 need a CPU each, but the Ray cluster has 2"):
        train_rllib(RLlibConfig(env_runners=64))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_is_a_recipe(algorithm: str) -> None:
    made = make_config(f"rllib-{algorithm}", {"num_envs": 16})
    assert isinstance(made, RLlibConfig)
    assert (made.algorithm, made.num_envs, made.autoreset_mode.value) == (algorithm, 16, "NextStep")


def test_rewards_are_scaled_and_told_as_they_are() -> None:
    keys = {"scenario": "uniform", "action_type": "normalized", "reward_type": "open_flows", "max_steps": 4}
    plain, scaled = RLlibVectorEnv(2, **keys), RLlibVectorEnv(2, reward_scale=10.0, **keys)
    for env in (plain, scaled):
        observation, _ = env.reset(seed=3)
        assert env.observation_space.contains(observation)
        env.statistics.take()
    action = plain.action_space.sample()
    for _ in range(5):
        observation, rewards, _, _, info = plain.step(action)
        assert observation in plain.observation_space
        assert np.allclose(scaled.step(action)[1], rewards / 10.0)
        assert info == {}
    # the fifth step begins the next episodes
    told = scaled.statistics.take()
    assert told["steps"] == 8
    assert told == plain.statistics.take()
    assert scaled.statistics.take()["steps"] == 0
    for env in (plain, scaled):
        env.close()


def test_what_all_means_of_sac_share_is_taken_out_but_not_what_all_deviations_share() -> None:
    network = {"features": 12, "hidden": 8, "outputs": 1, "centered": True}
    critic = {"features": 13, "hidden": 8, "value": True}
    module = SACModule(
        observation_space=ObservationLayout(4, "flat", observe_weights=True).space,
        action_space=gymnasium.spaces.Box(-1, 1, (4,)),
        model_config={"network": "equivariant", "actor": network, "critic": critic, "log_std": -2.0, "twin_q": True}
        | {"spread": network | {"centered": False}},
    )
    for head in (module.pi.mean.head, module.pi.spread.head):
        torch.nn.init.constant_(head.bias, 1.0)
    means, log_std = module.pi(torch.ones(3, 52)).detach().split(4, -1)
    assert torch.allclose(means, torch.zeros(3, 4), atol=1e-5)
    assert torch.allclose(log_std, torch.full((3, 4), -1.0), atol=0.1)


def test_balancers_are_agents() -> None:
    env = RLlibMultiAgentEnv({"scenario": "marllb-moderate", "max_steps": 3, "reward_scale": 2.0}, worker_index=1)
    observations, infos = env.reset(seed=1)
    assert observations.keys() == infos.keys() == set(env.agents)
    assert all(env.observation_spaces[agent].contains(seen) for agent, seen in observations.items())
    for _ in range(3):
        _, rewards, terminated, truncated, _ = env.step({a: env.action_spaces[a].sample() for a in env.agents})
    assert rewards.keys() == observations.keys()
    assert (terminated["__all__"], truncated["__all__"]) == (False, True)
    env.close()
