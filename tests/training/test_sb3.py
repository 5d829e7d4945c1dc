"""The adapter to Stable-Baselines3, and PPO through it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from lbgym import LoadBalanceEnv, LoadBalanceVectorEnv
from lbgym.errors import CheckpointError, DivergedError, LbgymError
from lbgym.policies import load_policy

pytest.importorskip("stable_baselines3")

from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecMonitor, VecNormalize

from lbgym.training.recipes import config_of
from lbgym.training.runs import Progress
from lbgym.training.sb3 import SB3Config, SB3VecEnv, train_sb3

SMALL = SB3Config(num_envs=8, num_steps=8, max_steps=16, total_steps=256, minibatches=2, hidden=8, epochs=2)


def vector_env(num_envs: int = 3, **keys: object) -> LoadBalanceVectorEnv:
    keys = {"num_servers": 4, "max_steps": 5, "autoreset_mode": AutoresetMode.SAME_STEP} | keys
    return LoadBalanceVectorEnv(num_envs, **keys)


@pytest.fixture
def env() -> Iterator[SB3VecEnv]:
    adapter = SB3VecEnv(vector_env())
    yield adapter
    adapter.close()


def actions_of(env: SB3VecEnv) -> np.ndarray:
    return np.stack([env.action_space.sample() for _ in range(env.num_envs)])


@pytest.mark.parametrize("layout", ["matrix", "flat", "dict"])
def test_terminal_observations_are_those_of_single_environments(layout: str) -> None:
    adapter = SB3VecEnv(vector_env(observation=layout))
    singles = [LoadBalanceEnv(num_servers=4, max_steps=5, observation=layout) for _ in range(3)]
    adapter.seed(7)
    batch = adapter.reset()
    for i, single in enumerate(singles):
        assert_same(single.reset(seed=7 + i)[0], batch, i)
    adapter.action_space.seed(0)
    for step in range(12):
        actions = actions_of(adapter)
        batch, rewards, dones, infos = adapter.step(actions)
        assert rewards.dtype == np.float32
        assert dones.tolist() == [step % 5 == 4] * 3
        for i, single in enumerate(singles):
            observation, reward, _, truncated, _ = single.step(actions[i])
            assert rewards[i] == np.float32(reward)
            if truncated:
                assert infos[i]["TimeLimit.truncated"] is True
                assert_same(observation, infos[i]["terminal_observation"])
                observation, _ = single.reset()
            else:
                assert infos[i] == {}
            assert_same(observation, batch, i)
    adapter.close()


def assert_same(single: object, batch: object, i: int | None = None) -> None:
    if isinstance(single, dict):
        assert isinstance(batch, dict)
        for key, part in single.items():
            assert np.array_equal(part, batch[key] if i is None else batch[key][i])
    else:
        assert np.array_equal(single, batch if i is None else batch[i])  # type: ignore[arg-type,index]


@pytest.mark.parametrize("action_type", ["discrete", "joint", "continuous", "normalized"])
@pytest.mark.parametrize(("layout", "policy"), [("flat", "MlpPolicy"), ("dict", "MultiInputPolicy")])
def test_ppo_learns_on_every_form(action_type: str, layout: str, policy: str) -> None:
    env = VecMonitor(
        SB3VecEnv(vector_env(8, action_type=action_type, observation=layout, normalize=True, max_steps=50))
    )
    model = PPO(policy, env, n_steps=64, batch_size=128, n_epochs=1, device="cpu", seed=0)
    model.learn(512)
    assert model.num_timesteps == 512
    assert [e["l"] for e in model.ep_info_buffer] == [50] * 8
    env.close()


def test_ppo_learns_two_thousand_steps_under_normalisation() -> None:
    env = VecNormalize(VecMonitor(SB3VecEnv(vector_env(16, observation="flat", max_steps=60))))
    model = PPO("MlpPolicy", env, n_steps=32, batch_size=128, device="cpu", seed=0).learn(2000)
    action, _ = model.predict(env.reset())
    assert action.shape == (16, 4)
    env.close()


def test_seeds_and_options_reach_the_next_reset(env: SB3VecEnv) -> None:
    def play() -> np.ndarray:
        env.reset()
        return np.stack([env.step(np.zeros((3, 4), np.int64))[0] for _ in range(3)])

    env.seed(5)
    one = play()
    env.seed(5)
    assert np.array_equal(one, play())
    assert not np.array_equal(one, play())
    env.seed(5)
    env.set_options({"load": 0.1})
    assert play()[..., 0].sum() < 0.5 * one[..., 0].sum()
    env.set_options([{"load": 0.1}, {"load": 0.2}, {}])
    with pytest.raises(LbgymError, match="the same options"):
        env.reset()


def test_attributes_and_methods_are_those_of_the_vector_environment(env: SB3VecEnv) -> None:
    assert env.get_attr("max_steps") == [5, 5, 5]
    assert env.get_attr("max_steps", indices=[0, 2]) == [5, 5]
    assert env.get_attr("max_steps", indices=1) == [5]
    with pytest.raises(AttributeError):
        env.get_attr("nothing")
    assert not env.has_attr("nothing")
    env.set_attr("label", 2)
    assert env.get_attr("label") == [2, 2, 2]
    with pytest.raises(LbgymError, match=r"'label' can be set for all 3 of them, not for 1"):
        env.set_attr("label", 3, indices=0)
    env.reset()
    assert env.env_method("render", indices=[0, 1]) == [None, None]
    assert env.env_is_wrapped(gymnasium.Wrapper) == [False] * 3


def test_frames() -> None:
    env = SB3VecEnv(vector_env(2, render_mode="rgb_array"))
    env.reset()
    frames = env.get_images()
    assert len(frames) == 2
    assert env.render().ndim == 3
    env.close()


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED])
def test_another_autoreset_mode_is_refused(mode: AutoresetMode) -> None:
    with pytest.raises(LbgymError, match="SAME_STEP, got"):
        SB3VecEnv(vector_env(autoreset_mode=mode))


def test_a_trained_model_is_saved_with_the_keys_of_its_environment(tmp_path: Path) -> None:
    history: list[Progress] = []
    result = train_sb3(SMALL, out=tmp_path, callback=history.append)
    assert result.checkpoint == tmp_path / "sb3-ppo.zip"
    assert [p.step for p in history] == [64, 128, 192, 256]
    assert all(math.isfinite(p.reward) for p in history)
    assert config_of(tmp_path / "sb3-ppo.zip") == SMALL
    policy = load_policy(tmp_path / "sb3-ppo.zip")
    assert policy.env_kwargs["observation"] == "flat"
    assert policy.env_kwargs["normalize"] is True
    assert policy.env_kwargs["action_type"] == "normalized"
    env = LoadBalanceEnv(scenario="heterogeneous", **policy.env_kwargs)
    observation, info = env.reset(seed=0)
    action = policy.act(observation, info)
    assert np.array_equal(action, result.model.predict(observation, deterministic=True)[0])
    env.step(action)


def test_resuming_goes_on_counting(tmp_path: Path) -> None:
    train_sb3(SMALL, out=tmp_path / "agent.zip", callback=lambda progress: progress.step == 128)
    saved = PPO.load(tmp_path / "agent.zip")
    assert saved.num_timesteps == 128
    resumed = train_sb3(SMALL, out=tmp_path / "agent.zip", resume_from=tmp_path / "agent.zip")
    assert resumed.model.num_timesteps == 256
    assert [p.step for p in resumed.history] == [192, 256]
    assert resumed.history[0].seconds > saved.lbgym_seconds
    again = train_sb3(SMALL, resume_from=tmp_path / "agent.zip")
    assert again.history == []


def test_a_model_of_another_shape_is_refused_with_both_shapes(tmp_path: Path) -> None:
    train_sb3(replace(SMALL, total_steps=64), out=tmp_path)
    with pytest.raises(CheckpointError, match=r"observations Box.*\(96,\).* but .* Box.*\(48,\)"):
        train_sb3(replace(SMALL, scenario="uniform"), resume_from=tmp_path / "sb3-ppo.zip")
    with pytest.raises(CheckpointError, match="does not exist"):
        train_sb3(SMALL, resume_from=tmp_path / "none.zip")
    (tmp_path / "text.zip").write_text("hello")
    with pytest.raises(CheckpointError, match="is not a model that can be read"):
        config_of(tmp_path / "text.zip")


def test_a_model_that_diverged_is_never_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(model: PPO) -> None:
        model.policy.log_std.data.fill_(math.nan)

    train_sb3(SMALL, out=tmp_path)
    before = (tmp_path / "sb3-ppo.zip").read_bytes()
    monkeypatch.setattr(PPO, "train", diverge)
    for total in (384, 320):
        # before the environment sees it; after the last update there is nobody but who saves it
        with pytest.raises(DivergedError, match="the training has diverged by step 320: the network's log_std is not"):
            train_sb3(replace(SMALL, total_steps=total), resume_from=tmp_path / "sb3-ppo.zip", out=tmp_path)
        assert (tmp_path / "sb3-ppo.zip").read_bytes() == before


def test_interrupting_saves_the_model(tmp_path: Path) -> None:
    def interrupt(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_sb3(SMALL, out=tmp_path, callback=interrupt)
    assert [p.name for p in tmp_path.iterdir()] == ["sb3-ppo.zip"]
    assert PPO.load(tmp_path / "sb3-ppo.zip").num_timesteps == 64
