"""SAC-GRU as an agent in a loop of the user's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from lbgym import FlowDispatchEnv, LoadBalanceEnv, LoadBalanceVectorEnv
from lbgym.errors import CheckpointError, InvalidOptionError, UnsupportedSpaceError
from lbgym.policies import load_policy, read_checkpoint

torch = pytest.importorskip("torch")

from lbgym.training.sac_gru import SACGRUAgent, SACGRUConfig, train_sac_gru  # noqa: E402

SMALL: dict[str, Any] = {"hidden": 8, "warmup": 1, "batch_size": 4, "sequence_length": 4, "burn_in": 2, "replay": 16}


def loop(env: Any, agent: SACGRUAgent, steps: int, *, with_info: bool = False) -> list[float]:
    observation, info = env.reset(seed=0)
    rewards = []
    for _ in range(steps):
        action = agent.get_action(observation, info if with_info else None)
        following, reward, terminated, truncated, info = env.step(action)
        done = terminated | truncated
        agent.store_transition(observation, action, reward, following, done, info if with_info else None)
        agent.update()
        rewards.append(float(np.mean(reward)))
        observation = following
        if np.all(done):
            observation, info = env.reset()
    return rewards


@pytest.mark.parametrize("action_type", ["discrete", "joint"])
@pytest.mark.parametrize("layout", ["matrix", "flat", "dict"])
@pytest.mark.parametrize("replicas", [None, 3])
def test_any_form_of_environment(replicas: int | None, layout: str, action_type: str, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"observation": layout, "action_type": action_type, "max_steps": 16}
    if replicas is None:
        env: Any = LoadBalanceEnv(**keys)
    else:
        env = LoadBalanceVectorEnv(replicas, autoreset_mode="Disabled", **keys)
    agent = SACGRUAgent(env, **SMALL)
    before = [p.clone() for p in agent.networks.actor.parameters()]
    loop(env, agent, 24)
    assert agent.step == 24 * (replicas or 1)
    assert not any(torch.equal(p, q) for p, q in zip(before, agent.networks.actor.parameters(), strict=True))
    agent.save(tmp_path / "agent.pt")
    # what is saved acts in the environments that it names, and goes on learning
    policy = load_policy(tmp_path / "agent.pt")
    acting = LoadBalanceEnv(**policy.env_kwargs)
    observation, info = acting.reset(seed=1)
    assert acting.action_space.contains(policy.act(observation, info))
    twin = SACGRUAgent.load(tmp_path / "agent.pt", env)
    assert twin.step == agent.step
    assert all(torch.equal(p, q) for p, q in zip(agent.networks.parameters(), twin.networks.parameters(), strict=True))
    loop(env, twin, 18)


def test_without_info_the_weights_in_force_are_those_of_the_actions() -> None:
    runs = []
    for with_info in (False, True):
        env = LoadBalanceVectorEnv(3, autoreset_mode="Disabled", max_steps=16)
        agent = SACGRUAgent(env, **SMALL)
        runs.append((loop(env, agent, 24, with_info=with_info), [p.clone() for p in agent.networks.parameters()]))
        env.close()
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(p, q) for p, q in zip(runs[0][1], runs[1][1], strict=True))


def test_a_loop_equals_the_recipe(tmp_path: Path) -> None:
    config = SACGRUConfig(
        scenario="uniform", num_envs=4, num_steps=4, max_steps=16, total_steps=4 * 48, updates=2, **SMALL
    )
    train_sac_gru(config, out=tmp_path / "recipe.pt")
    env = config.make_env()
    agent = SACGRUAgent(env, config)
    step = 0
    for episode in range(3):
        seeds = np.random.SeedSequence([config.seed, episode]).generate_state(4)
        observation, info = env.reset(seed=[int(s) for s in seeds])
        agent.begin(observation, info)
        for _ in range(16):
            # an episode of the recipe begins before the update that follows its end
            if step and step % 4 == 0:
                agent.update()
            action = agent.get_action(observation)
            following, reward, _, truncated, info = env.step(action)
            agent.store_transition(observation, action, reward, following, truncated)
            observation, step = following, step + 1
    seeds = np.random.SeedSequence([config.seed, 3]).generate_state(4)
    agent.begin(*env.reset(seed=[int(s) for s in seeds]))
    agent.update()
    env.close()
    saved = read_checkpoint(tmp_path / "recipe.pt")
    trained = saved["network"]["parameters"] | saved["trainer"]["agent"]
    assert trained.keys() == agent.networks.state_dict().keys()
    assert all(torch.equal(value, trained[name]) for name, value in agent.networks.state_dict().items())


def test_episodes_may_end_at_different_steps() -> None:
    space = LoadBalanceEnv(observation="flat")
    agent = SACGRUAgent(
        (space.observation_space, space.action_space), action_weights=(1.0, 1.5, 2.0), max_steps=8, sequence_length=4,
        hidden=8, replay=16, num_envs=2,
    )  # fmt: skip
    # spaces are those of one environment
    assert agent.num_envs == 1
    observation, _ = space.reset(seed=0)
    for step in range(20):
        action = agent.get_action(observation)
        observation_before, observation = observation, space.step(action)[0]
        agent.store_transition(observation_before, action, 0.0, observation, step == 4)
    # 5 steps, then 15 in pieces of 8
    assert agent.replay.filled.tolist()[:3] == [5, 8, 7]


def episodes(mode: str, layout: str, *, with_info: bool) -> list[tuple[Any, ...]]:
    """What an agent keeps of two episodes of each replica, the first of which begins before the others'."""
    env = LoadBalanceVectorEnv(3, autoreset_mode=mode, max_steps=8, observation=layout)
    agent = SACGRUAgent(env, **SMALL)
    script = np.random.default_rng(0).integers(0, 3, (20, *env.action_space.shape[1:])) * np.ones((3, 1, 1), np.int64)
    env.reset(seed=0)
    for _ in range(3):
        env.step(env.action_space.sample() * 0)
    observation, info = env.reset(options={"reset_mask": np.array([False, True, False])})
    agent.begin(observation, info)
    steps, over = np.zeros(3, np.int64), np.zeros(3, np.bool_)
    for _ in range(24):
        agent.get_action(observation, info if with_info else None)
        action = script[np.arange(3), np.minimum(steps, 19)]
        following, reward, terminated, truncated, info = env.step(action)
        done = terminated | truncated
        needed = with_info or (mode == "SameStep" and done.any())
        agent.store_transition(observation, action, reward, following, done, info if needed else None)
        steps += ~over
        over = done if mode == "NextStep" else over
        observation = following
        if mode == "Disabled" and done.any():
            observation, info = env.reset(options={"reset_mask": done})
    env.close()
    replay, filled = agent.replay, agent.replay.filled.tolist()
    assert agent.step == steps.sum()
    return [
        (replay.inputs[row, : filled[row] + 1], replay.choices[row, : filled[row]], replay.rewards[row, : filled[row]])
        for row in range(6)
    ]


@pytest.mark.parametrize("with_info", [True, False])
@pytest.mark.parametrize("layout", ["matrix", "dict"])
@pytest.mark.parametrize("mode", ["SameStep", "NextStep"])
def test_environments_that_reset_themselves_give_the_same_episodes(mode: str, layout: str, with_info: bool) -> None:
    wanted = episodes("Disabled", layout, with_info=with_info)
    assert [len(choices) for _, choices, _ in wanted] == [5, 8, 5, 8, 8, 8]
    for got, expected in zip(episodes(mode, layout, with_info=with_info), wanted, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_the_last_observations_of_same_step_mode_are_in_the_info() -> None:
    env = LoadBalanceVectorEnv(2, autoreset_mode="SameStep", max_steps=1)
    agent = SACGRUAgent(env, **SMALL | {"sequence_length": 1})
    observation, _ = env.reset(seed=0)
    action = agent.get_action(observation)
    following, reward, _, truncated, _ = env.step(action)
    with pytest.raises(InvalidOptionError, match="final_obs"):
        agent.store_transition(observation, action, reward, following, truncated)
    env.close()


def test_it_learns_which_server_is_fast() -> None:
    """Two levels, and a reward that is the share of weight on the first of two servers."""
    env = LoadBalanceVectorEnv(8, num_servers=2, autoreset_mode="Disabled", max_steps=16, action_weights=(1.0, 8.0))
    agent = SACGRUAgent(
        env, hidden=16, warmup=4, batch_size=16, sequence_length=4, burn_in=0, replay=64, gamma=0.1,
        target_entropy=0.05, learning_rate=5e-3, temperature_rate=5e-2,
    )  # fmt: skip
    observation, info = env.reset(seed=0)
    chosen = []
    for _ in range(160):
        action = agent.get_action(observation)
        following, _, _, truncated, info = env.step(action)
        weights = info["weights"]
        agent.store_transition(observation, action, weights.sum(-1), following, truncated)
        agent.update()
        chosen.append(action.mean())
        observation = env.reset()[0] if truncated.all() else following
    env.close()
    assert np.mean(chosen[:8]) < 0.65
    assert np.mean(chosen[-16:]) > 0.8


def test_environments_that_it_cannot_act_in(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedSpaceError, match='use action_type="discrete"'):
        SACGRUAgent(LoadBalanceEnv(action_type="normalized"))
    with pytest.raises(UnsupportedSpaceError, match="which FlowDispatchEnv does not take"):
        SACGRUAgent(FlowDispatchEnv())
    with pytest.raises(UnsupportedSpaceError, match="a wrapper changes the observations"):
        SACGRUAgent(gymnasium.wrappers.FlattenObservation(LoadBalanceEnv()))
    SACGRUAgent(LoadBalanceEnv(), **SMALL).save(tmp_path / "agent.pt")
    with pytest.raises(CheckpointError, match=r"trained with normalize=False, but the environment has True"):
        SACGRUAgent.load(tmp_path / "agent.pt", LoadBalanceEnv(normalize=True))
    config = replace(SACGRUConfig(), hidden=16)
    with pytest.raises(CheckpointError, match=r"(?s)hidden=8 .* needs hidden=16"):
        SACGRUAgent(LoadBalanceEnv(), config).restore(torch.load(tmp_path / "agent.pt"), "agent.pt")
