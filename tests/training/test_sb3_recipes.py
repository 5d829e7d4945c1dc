"""Every algorithm of Stable-Baselines3 through the one recipe."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lbgym import LoadBalanceEnv
from lbgym.errors import CheckpointError, LbgymError, UnknownNameError, UnsupportedSpaceError
from lbgym.policies import load_policy

pytest.importorskip("stable_baselines3")
pytest.importorskip("sb3_contrib")

import torch

from lbgym.training.recipes import config_of
from lbgym.training.sb3 import ALGORITHMS, SB3Config, SB3Result, replay_file, train_sb3

OFF_POLICY = ("dqn", "sac", "td3")
FORMS = [(name, policy) for name, kind in ALGORITHMS.items() for policy in kind.networks]


def small(algorithm: str, policy: str = "mlp", **changes: Any) -> SB3Config:
    """A training of 256 steps on 4 servers."""
    options: dict[str, Any] = {}
    if algorithm in OFF_POLICY:
        options = {"buffer_size": 512, "learning_starts": 32, "batch_size": 16}
    if algorithm == "dqn":
        options["target_update_interval"] = 16
    keys: dict[str, Any] = {"algorithm": algorithm, "network": policy, "options": options, "scenario": "uniform"}
    keys |= {"num_envs": 8, "max_steps": 16, "total_steps": 256, "hidden": 8, "epochs": 2, "minibatches": 2}
    keys |= {"num_steps": 4 if algorithm in OFF_POLICY else 8}
    return SB3Config(**keys | changes)


def parameters(result: SB3Result) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in result.model.policy.named_parameters()}


@pytest.mark.parametrize(("algorithm", "policy"), FORMS)
def test_training_moves_the_parameters_and_the_file_acts_alike(algorithm: str, policy: str, tmp_path: Path) -> None:
    config = small(algorithm, policy)
    untrained = parameters(train_sb3(replace(config, total_steps=0)))
    result = train_sb3(config, out=tmp_path)
    assert result.checkpoint == tmp_path / f"sb3-{algorithm}.zip"
    assert [name for name, value in parameters(result).items() if torch.equal(value, untrained[name])] == []
    assert result.history[-1].step == result.model.num_timesteps == 256
    assert result.history[-1].fraction == 1.0
    assert {"value"} <= set(result.history[-1].losses) <= {"policy", "value", "kl", "clipped", "temperature"}
    assert config_of(result.checkpoint) == config

    loaded = load_policy(result.checkpoint)
    assert loaded.env_kwargs["action_type"] == ALGORITHMS[algorithm].action_types[0]
    env = LoadBalanceEnv(scenario="uniform", **loaded.env_kwargs)
    observation, info = env.reset(seed=0)
    loaded.reset()
    state, start = None, np.ones(1, bool)
    for _ in range(4):
        expected, state = result.model.predict(observation, state=state, episode_start=start, deterministic=True)
        action = loaded.act(observation, info)
        assert np.array_equal(action, expected)
        observation, _, _, _, info = env.step(action)
        start = np.zeros(1, bool)
    env.close()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_resuming_goes_on(algorithm: str, tmp_path: Path) -> None:
    config = small(algorithm)
    first = train_sb3(config, out=tmp_path, callback=lambda progress: progress.step == 128)
    assert first.checkpoint is not None
    assert first.model.num_timesteps == 128
    changed = replace(config, learning_rate=2e-3, total_steps=192)
    resumed = train_sb3(changed, resume_from=first.checkpoint)
    assert resumed.history[0].step > 128
    assert resumed.model.num_timesteps == 192
    assert resumed.history[-1].seconds > first.history[-1].seconds
    assert resumed.model.lr_schedule(0.5) == 2e-3
    # the scale of the rewards has been learnt from all steps so far
    scale = resumed.model.get_env().ret_rms
    assert scale.count > 192
    before, after = parameters(first), parameters(resumed)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    unchanged = train_sb3(replace(config, total_steps=128), resume_from=first.checkpoint)
    assert all(torch.equal(before[name], value) for name, value in parameters(unchanged).items())


@pytest.mark.parametrize("algorithm", OFF_POLICY)
def test_the_replay_buffer_is_kept_or_filled_anew(algorithm: str, tmp_path: Path) -> None:
    config = small(algorithm, total_steps=128)
    first = train_sb3(config, out=tmp_path / "agent.zip")
    assert first.checkpoint is not None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["agent.replay.pkl", "agent.zip"]
    assert first.model.replay_buffer.pos == 128 // 8

    more = replace(config, total_steps=192)
    kept = train_sb3(more, resume_from=first.checkpoint)
    assert kept.model.replay_buffer.pos == 192 // 8
    assert np.array_equal(kept.model.replay_buffer.rewards[:16], first.model.replay_buffer.rewards[:16])
    assert kept.model.learning_starts == 32
    # the buffer of 8 replicas does not serve 4
    assert train_sb3(replace(more, num_envs=4), resume_from=first.checkpoint).model.replay_buffer.pos == 64 // 4

    replay_file(first.checkpoint).unlink()
    anew = train_sb3(more, resume_from=first.checkpoint)
    assert anew.model.replay_buffer.pos == 64 // 8
    assert anew.model.learning_starts == 128 + 32


def test_a_checkpoint_in_between_has_no_replay_buffer(tmp_path: Path) -> None:
    seen: list[list[str]] = []

    def look(progress: object) -> None:
        seen.append(sorted(p.name for p in tmp_path.iterdir()))

    (tmp_path / "sb3-sac.replay.pkl").write_text("of another training")
    train_sb3(small("sac", checkpoint_every=0.0), out=tmp_path, callback=look)
    assert seen[-1] == ["sb3-sac.zip"]
    assert replay_file(tmp_path / "sb3-sac.zip").is_file()


def test_exploration_follows_the_time_budget() -> None:
    seconds = iter(range(1000))
    result = train_sb3(small("dqn", total_steps=None, seconds=1000.0), callback=lambda progress: next(seconds) == 7)
    # the eighth rollout of a training that is to last a thousand seconds
    assert result.model._total_timesteps > 10 * result.model.num_timesteps
    assert result.model._total_timesteps < 2**40


@pytest.mark.parametrize("algorithm", OFF_POLICY)
def test_gradient_steps_follow_the_transitions(algorithm: str) -> None:
    kind = ALGORITHMS[algorithm]
    for num_envs in (32, 256):
        config = small(algorithm, num_envs=num_envs, total_steps=0, options={"buffer_size": 1024})
        model = train_sb3(config).model
        assert (model.train_freq.frequency, model.gradient_steps) == (4, num_envs * 4 // 32)
    assert SB3Config(algorithm=algorithm).num_envs == kind.num_envs == 64


def test_observations_as_dictionaries() -> None:
    for algorithm in ("ppo", "sac", "recurrent-ppo"):
        result = train_sb3(small(algorithm, env_kwargs={"observation": "dict"}, total_steps=64))
        assert result.model.num_timesteps == 64


@pytest.mark.parametrize(
    ("algorithm", "action_type", "fits"),
    [
        ("dqn", "discrete", "DQN .* 'discrete': use action_type 'joint', with few enough action_weights"),
        ("dqn", "normalized", "DQN .* 'normalized': use action_type 'joint'"),
        ("sac", "discrete", "SAC .* 'discrete': use action_type 'normalized'"),
        ("td3", "joint", "TD3 .* 'joint': use action_type 'normalized'"),
    ],
)
def test_actions_that_do_not_fit_are_refused_with_those_that_do(algorithm: str, action_type: str, fits: str) -> None:
    with pytest.raises(UnsupportedSpaceError, match=fits):
        SB3Config(algorithm=algorithm, action_type=action_type)


def test_too_many_joint_actions_are_refused() -> None:
    with pytest.raises(LbgymError, match=r"3 \*\* 8 actions .* allowed: 4,096"):
        train_sb3(SB3Config(algorithm="dqn", env_kwargs={"action_weights": [1.0, 2.0, 4.0]}))


def test_what_a_configuration_cannot_have() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'sac'"):
        SB3Config(algorithm="sacc")
    with pytest.raises(UnknownNameError, match="unknown network 'mpl'"):
        SB3Config(network="mpl")
    with pytest.raises(LbgymError, match="no network 'equivariant' for 'td3', only for ppo, a2c, dqn, sac"):
        SB3Config(algorithm="td3", network="equivariant")
    with pytest.raises(LbgymError, match=r"num_envs \* num_steps = 1 \* 1 is a minibatch of one sample"):
        SB3Config(num_envs=1, num_steps=1)
    assert SB3Config(num_envs=1, num_steps=1, options={"normalize_advantage": False}).num_steps == 1
    with pytest.raises(UnknownNameError, match="Did you mean 'buffer_size'"):
        train_sb3(small("sac", options={"bufer_size": 3}))
    # a field of the configuration sets it
    with pytest.raises(UnknownNameError, match="unknown option 'gamma'"):
        train_sb3(small("ppo", options={"gamma": 0.9}))


def test_a_checkpoint_that_does_not_fit_is_refused_with_both(tmp_path: Path) -> None:
    path = train_sb3(small("ppo", total_steps=64), out=tmp_path).checkpoint
    assert path is not None
    for algorithm in ("a2c", "sac"):
        with pytest.raises(CheckpointError, match=f"trained with algorithm 'ppo', not '{algorithm}'"):
            train_sb3(small(algorithm), resume_from=path)
    with pytest.raises(CheckpointError, match="network 'mlp', but the configuration has 'equivariant'"):
        train_sb3(small("ppo", "equivariant"), resume_from=path)
    with pytest.raises(CheckpointError, match="hidden 8, but the configuration has 16"):
        train_sb3(small("ppo", hidden=16), resume_from=path)
    with pytest.raises(CheckpointError, match=r"observations Box.*\(48,\).* but .* Box.*\(96,\)"):
        train_sb3(small("ppo", scenario="heterogeneous"), resume_from=path)
    with pytest.raises(CheckpointError, match="MultiDiscrete"):
        train_sb3(small("ppo", action_type="discrete"), resume_from=path)


def lbgym(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    from lbgym.cli import main

    with pytest.raises(SystemExit) as exit_:
        main([str(a) for a in arguments])
    captured = capsys.readouterr()
    assert isinstance(exit_.value.code, int | None)
    return exit_.value.code or 0, captured.out, captured.err


def test_the_command_line_trains_resumes_and_refuses(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("typer")
    common = ("train", "--num-envs", 8, "--scenario", "uniform", "--no-tensorboard", "--json", "--out", tmp_path)
    for algorithm in ALGORITHMS:
        code, out, err = lbgym(capsys, *common, "--algo", f"sb3-{algorithm}", "--steps", 64)
        assert code == 0, err
        assert json.loads(out)["checkpoint"] == str(tmp_path / f"sb3-{algorithm}.zip")
    again = ("train", "--resume", tmp_path / "sb3-sac.zip", "--no-tensorboard", "--json", "--steps", 96)
    code, out, err = lbgym(capsys, *again, "--algo", "sb3-sac")
    assert (code, json.loads(out)["steps"]) == (0, 96)

    for arguments, message in (
        ((*again, "--algo", "sb3-td3"), "was trained by recipe 'sb3-sac', not by 'sb3-td3'"),
        ((*again, "--algo", "sb3-sac", "--network", "equivariant"), "network 'mlp', but the configuration has"),
        ((*common, "--algo", "sb3-dqn", "--action-type", "discrete"), "use action_type 'joint'"),
        ((*common, "--algo", "ppo", "--network", "mlp"), "only the sb3-, rllib- and benchmarl- recipes"),
    ):
        code, _, err = lbgym(capsys, *arguments)
        assert code == 2
        assert message in " ".join(err.replace("│", " ").split())


def test_compare_takes_what_every_algorithm_wrote(tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    from lbgym.evaluation import compare

    paths = [train_sb3(small(algorithm, total_steps=64), out=tmp_path).checkpoint for algorithm in ALGORITHMS]
    comparison = compare("uniform", [str(p) for p in paths], 1, duration=3.0, warmup=1.0, processes=1)
    means = [comparison.values(label, "fct_mean")[0] for label in comparison.labels]
    assert len(means) == len(ALGORITHMS)
    assert np.isfinite(means).all()
    # they do not act alike
    assert len(set(means)) > 1


def test_without_sb3_contrib_the_others_work_and_the_extra_is_named() -> None:
    code = (
        "import sys\n"
        "sys.modules['sb3_contrib'] = None\n"
        "from lbgym.errors import MissingExtraError\n"
        "from lbgym.training.sb3 import ALGORITHMS\n"
        "ALGORITHMS['td3'].load()\n"
        "try:\n    ALGORITHMS['recurrent-ppo'].load()\n"
        "except MissingExtraError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == (
        "training with RecurrentPPO needs 'sb3_contrib', which is not installed: pip install 'lbgym[sb3]'"
    )
