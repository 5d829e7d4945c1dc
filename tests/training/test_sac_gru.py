"""SAC-GRU: its losses against plain definitions and against the released MARLLB loss, its replay, its runs."""

from __future__ import annotations

import copy
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lbgym import LoadBalanceEnv
from lbgym.errors import CheckpointError, DivergedError, LbgymError
from lbgym.policies import load_policy, read_checkpoint

torch = pytest.importorskip("torch")

from lbgym.policies.inputs import server_inputs  # noqa: E402
from lbgym.training import sac_gru  # noqa: E402
from lbgym.training.runs import Progress  # noqa: E402
from lbgym.training.sac_gru import Batch, Replay, SACGRUAgent, SACGRUConfig, train_sac_gru  # noqa: E402

SMALL = SACGRUConfig(
    scenario="uniform",
    num_envs=4,
    num_steps=8,
    max_steps=16,
    total_steps=4 * 8 * 4,
    hidden=8,
    replay=16,
    warmup=1,
    batch_size=4,
    sequence_length=4,
    burn_in=2,
    updates=2,
)


def networks_in(saved: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The parameters of actor, critics and scales in a checkpoint."""
    return saved["network"]["parameters"] | saved["trainer"]["agent"]


def example(n: int = 3, k: int = 4, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits and utilities [B, N, K], and a mask that leaves one server out."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(batch, n, k, generator=generator, dtype=torch.float64, requires_grad=True)
    q = torch.randn(batch, n, k, generator=generator, dtype=torch.float64)
    active = torch.ones(batch, n, dtype=torch.bool)
    active[0, 1] = False
    return logits, q, active


def gradient(loss: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, logits)[0]


# Losses


def test_the_factored_expectations_are_those_over_all_joint_actions() -> None:
    logits, q, active = example()
    alpha = 0.3
    p, log_p = logits.softmax(-1).detach().numpy(), logits.log_softmax(-1).detach().numpy()
    values = np.zeros(2)
    for b in range(2):
        servers = np.flatnonzero(active[b].numpy())
        for joint in itertools.product(range(4), repeat=len(servers)):
            chance = math.prod(p[b, i, a] for i, a in zip(servers, joint, strict=True))
            value = np.mean([float(q[b, i, a]) for i, a in zip(servers, joint, strict=True)])
            entropy = -np.mean([log_p[b, i, a] for i, a in zip(servers, joint, strict=True)])
            values[b] += chance * (value + alpha * entropy)
    assert np.allclose(sac_gru.soft_value(logits, q, alpha, active).detach().numpy(), values)
    assert np.isclose(sac_gru.actor_loss(logits, q, alpha, active).item(), -values.mean())


def test_the_value_of_an_action_is_the_mean_of_its_servers_utilities() -> None:
    _, q, active = example()
    choices = torch.tensor([[0, 1, 2], [3, 2, 1]])
    expected = [(q[0, 0, 0] + q[0, 2, 2]) / 2, (q[1, 0, 3] + q[1, 1, 2] + q[1, 2, 1]) / 3]
    assert torch.allclose(sac_gru.action_value(q, choices, active), torch.stack(expected))


def test_the_actors_gradient_points_to_higher_q() -> None:
    logits, q, active = example()
    alpha = 0.1
    ours = gradient(sac_gru.actor_loss(logits, q, alpha, active), logits)
    without = gradient(sac_gru.actor_loss(logits, torch.zeros_like(q), alpha, active), logits)
    assert not torch.allclose(ours, without, atol=1e-3)
    # the part of Q alone is the gradient of -E[Q], server by server: p (E[q] - q) / (active servers, batch)
    p = logits.softmax(-1).detach()
    mean = (p * q).sum(-1, keepdim=True)
    count = active.sum(-1).view(2, 1, 1) * 2
    assert torch.allclose(ours - without, p * (mean - q) / count * active.unsqueeze(-1))

    def expected_q(logits: torch.Tensor) -> float:
        return sac_gru.soft_value(logits, q, 0.0, active).mean().item()

    assert expected_q(logits - 0.1 * (ours - without)) > expected_q(logits) + 1e-3
    assert torch.equal(ours[0, 1], torch.zeros(4, dtype=torch.float64))  # the inactive server's


def released_loss(logits: torch.Tensor, q: torch.Tensor, alpha: float, drawn: torch.Tensor) -> torch.Tensor:
    """What the released MARLLB agent minimises: one drawn action in place of the expectation."""
    log_p = logits.log_softmax(-1).gather(-1, drawn.unsqueeze(-1)).squeeze(-1)
    return (alpha * log_p - q.gather(-1, drawn.unsqueeze(-1)).squeeze(-1)).mean()


def test_a_drawn_action_in_place_of_the_expectation_tells_the_actor_nothing_of_q() -> None:
    logits, q, active = example(n=2, batch=1)
    active[:] = True
    alpha = 0.1
    expected = torch.zeros_like(logits)
    for joint in itertools.product(range(4), repeat=2):
        drawn = torch.tensor([joint])
        with_q = gradient(released_loss(logits, q, alpha, drawn), logits)
        without = gradient(released_loss(logits, torch.zeros_like(q), alpha, drawn), logits)
        # not even that of a single draw
        assert torch.equal(with_q, without)
        chance = logits.softmax(-1).detach().gather(-1, drawn.unsqueeze(-1)).prod()
        expected += chance * with_q
    assert torch.allclose(expected, torch.zeros_like(expected), atol=1e-12)
    assert gradient(sac_gru.actor_loss(logits, q, alpha, active), logits).abs().max() > 0.01


# Replay


def filled(episodes: int, steps: int, num_envs: int = 2) -> Replay:
    """A replay whose inputs are 100 * episode + step, choices and rewards the step."""
    replay = Replay(4, 6, num_envs, num_servers=1, features=1)
    active = torch.ones(num_envs, 1, dtype=torch.bool)

    def inputs(episode: int, t: int) -> torch.Tensor:
        return (100.0 * (num_envs * episode + torch.arange(num_envs)) + t).view(num_envs, 1, 1)

    for episode in range(episodes):
        replay.begin(inputs(episode, 0), active)
        for t in range(6 if episode < episodes - 1 else steps):
            replay.add(torch.full((num_envs, 1), t), torch.full((num_envs,), float(t)), inputs(episode, t + 1), active)
    return replay


def test_sequences_stay_within_their_episode() -> None:
    replay = filled(episodes=2, steps=4)
    assert replay.filled.tolist() == [6, 6, 4, 4]
    batch = replay.sample(500, 3, 2, torch.Generator().manual_seed(0))
    assert batch.inputs.shape == (500, 2 + 3 + 1, 1, 1)
    episode, step = batch.inputs[..., 0, 0] // 100, batch.inputs[..., 0, 0] % 100
    assert bool((episode == episode[:, :1]).all())
    assert episode[:, 0].unique().tolist() == [0, 1, 2, 3]
    begins = step[:, 2]
    # steps 2 and 3 begin sequences with two steps before them, and those of the first two begin at 0
    assert begins.unique().tolist() == [0, 2, 3]
    assert begins[episode[:, 0] >= 2].unique().tolist() == [0]
    assert torch.equal(batch.first, begins == 0)
    later = ~batch.first
    assert torch.equal(step[later], begins[later, None] + torch.arange(-2, 4))
    # the choice and reward of a step lie between the observations before and after it
    assert torch.equal(batch.choices[..., 0], step[:, 2:-1].long())
    assert torch.equal(batch.rewards, step[:, 2:-1])


def test_the_newest_episodes_overwrite_the_oldest() -> None:
    replay = filled(episodes=3, steps=3)
    episode = replay.sample(200, 2, 0, torch.Generator().manual_seed(0)).inputs[:, 0, 0, 0] // 100
    assert episode.unique().tolist() == [2, 3, 4, 5]


# Learning


def agent_of(**changes: Any) -> SACGRUAgent:
    config = replace(SMALL, **changes)
    env = config.make_env()
    env.close()
    return SACGRUAgent(env, config)


def puzzle(agent: SACGRUAgent, count: int, steps: int, *, seed: int) -> tuple[Batch, torch.Tensor]:
    """Sequences in which a server's input tells the level that is rewarded, of three.

    The target [B, N] holds for the whole sequence and is shown at its first step only: it must be remembered.
    """
    generator = torch.Generator().manual_seed(seed)
    n, burn_in = agent.num_servers, agent.config.burn_in
    target = torch.randint(3, (count, n), generator=generator)
    inputs = torch.zeros(count, burn_in + steps + 1, n, agent.features)
    inputs[:, burn_in, :, 0] = target - 1.0
    choices = torch.randint(3, (count, steps, n), generator=generator)
    rewards = (choices == target.unsqueeze(1)).float().mean(-1) * n
    active = torch.ones(inputs.shape[:-1], dtype=torch.bool)
    return Batch(inputs, active, choices, rewards, torch.zeros(count, dtype=torch.bool)), target


def test_updates_learn_each_servers_best_level_from_one_reward_and_remember_it() -> None:
    keys = {"hidden": 32, "learning_rate": 3e-3, "temperature_rate": 0.0, "gamma": 0.5}
    agent = agent_of(action_weights=(1.0, 2.0, 3.0), **keys)
    for seed in range(400):
        losses = agent.learn(puzzle(agent, 32, 4, seed=seed)[0])
    assert torch.isfinite(losses).all()
    batch, target = puzzle(agent, 64, 4, seed=1000)
    with torch.no_grad():
        scaled = agent.networks.moments.scale(batch.inputs, batch.active)
        logits, _ = agent.networks.actor.forward_sequence(scaled, batch.active)
    right = (logits.argmax(-1) == target.unsqueeze(1)).float().mean((0, 2))
    # before it is shown there is nothing to know
    assert float(right[: SMALL.burn_in].max()) < 0.6
    assert float(right[SMALL.burn_in :].min()) > 0.9


def test_what_stands_before_an_episode_has_no_influence() -> None:
    generator = torch.Generator().manual_seed(0)
    results = []
    for junk, first in ((0.0, True), (5.0, True), (5.0, False)):
        agent = agent_of()
        batch, _ = puzzle(agent, 4, 4, seed=0)
        inputs = batch.inputs.clone()
        inputs[:, : SMALL.burn_in] = junk
        generator.manual_seed(0)
        results.append(agent.learn(replace(batch, inputs=inputs, first=torch.full((4,), first))))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[1], results[2])


def test_the_temperature_is_steered_to_the_target_entropy() -> None:
    for target, falls in ((0.01, True), (0.999, False)):
        agent = agent_of(target_entropy=target, learning_rate=0.0)
        with torch.no_grad():
            agent.networks.actor.head.bias.copy_(torch.arange(6.0))
        batch, _ = puzzle(agent, 4, 4, seed=0)
        before = agent.networks.log_alpha.item()
        agent.learn(batch)
        assert (agent.networks.log_alpha.item() < before) is falls


# Runs


@pytest.mark.parametrize("action_type", ["discrete", "joint"])
def test_training_moves_every_parameter_and_keeps_losses_finite(action_type: str, tmp_path: Path) -> None:
    config = replace(SMALL, action_type=action_type, action_weights=(1.0, 2.0, 4.0))
    history: list[Progress] = []
    result = train_sac_gru(config, out=tmp_path, callback=history.append)
    assert result.checkpoint == tmp_path / "sac-gru.pt"
    assert [p.step for p in history] == [32, 64, 96, 128]
    assert history[-1].fraction == 1.0
    assert all(math.isfinite(x) for p in history for x in p.losses.values())
    assert all(math.isfinite(p.reward) and p.fct_mean > 0 for p in history)
    before = dict(agent_of(action_type=action_type, action_weights=(1.0, 2.0, 4.0)).networks.named_parameters())
    after = networks_in(read_checkpoint(tmp_path / "sac-gru.pt"))
    assert [name for name, value in before.items() if torch.equal(value, after[name])] == []


def test_the_same_seed_trains_the_same_policy() -> None:
    one, two = train_sac_gru(SMALL).policy, train_sac_gru(SMALL).policy
    other = train_sac_gru(replace(SMALL, seed=2)).policy
    pairs = list(zip(*(p.parameters.values() for p in (one, two, other)), strict=True))
    assert all(np.array_equal(a, b) for a, b, _ in pairs)
    assert not any(np.array_equal(a, c) for a, _, c in pairs if a.ndim > 1)


def test_a_resumed_run_goes_on_from_the_checkpoint(tmp_path: Path) -> None:
    train_sac_gru(SMALL, out=tmp_path, callback=lambda progress: progress.step == 64)
    half = read_checkpoint(tmp_path / "sac-gru.pt")
    assert half["step"] == 64
    # as long as the replay is being filled again, nothing is learnt
    waiting = train_sac_gru(replace(SMALL, warmup=1000), resume_from=tmp_path / "sac-gru.pt", out=tmp_path / "same.pt")
    assert [p.step for p in waiting.history] == [96, 128]
    same = read_checkpoint(tmp_path / "same.pt")
    assert all(torch.equal(value, networks_in(same)[name]) for name, value in networks_in(half).items())
    resumed = train_sac_gru(resume_from=tmp_path / "sac-gru.pt", out=tmp_path / "on.pt")
    assert [p.step for p in resumed.history] == [96, 128]
    on = read_checkpoint(tmp_path / "on.pt")
    name = "actor.gru.weight_hh_l0"
    assert not torch.equal(networks_in(half)[name], networks_in(on)[name])
    counts = [saved["trainer"]["optimisers"]["actor"]["state"][0]["step"] for saved in (half, on)]
    assert counts[1] > counts[0] > 0
    # scales are kept
    assert torch.equal(networks_in(half)["moments.mean"], networks_in(on)["moments.mean"])


def test_critics_that_diverged_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(agent: SACGRUAgent) -> dict[str, float]:
        if agent.step > 32:
            next(agent.networks.critics.parameters()).data.fill_(math.nan)
        return dict.fromkeys(sac_gru.LOSSES, 0.0)

    monkeypatch.setattr(SACGRUAgent, "update", diverge)
    with pytest.raises(DivergedError, match="the training has diverged by step 64: the network's critics"):
        train_sac_gru(SMALL, out=tmp_path)
    # the last round before it
    saved = read_checkpoint(tmp_path / "sac-gru.pt")
    assert saved["step"] == 32
    assert all(bool(value.isfinite().all()) for value in saved["trainer"]["agent"].values())


def test_interrupting_saves_the_last_whole_round(tmp_path: Path) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.step == 64:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_sac_gru(SMALL, out=tmp_path, callback=interrupt)
    assert read_checkpoint(tmp_path / "sac-gru.pt")["step"] == 64
    assert [p.name for p in tmp_path.iterdir()] == ["sac-gru.pt"]


def test_tensorboard_files_are_written_beside_the_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    train_sac_gru(replace(SMALL, total_steps=32), out=tmp_path / "agent.pt", tensorboard=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["agent.pt", "tensorboard"]


# Checkpoints and policies


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "agent.pt"
    # fast enough that the policy is not the same everywhere
    assert train_sac_gru(replace(SMALL, learning_rate=0.03, total_steps=512), out=out).checkpoint == out
    return out


def play(policy: Any, steps: int = 8, *, seed: int = 3, **keys: Any) -> list[np.ndarray]:
    env = LoadBalanceEnv(**policy.env_kwargs, **keys)
    observation, info = env.reset(seed=seed)
    policy.reset()
    actions = []
    for _ in range(steps):
        action = policy.act(observation, info)
        assert env.action_space.contains(action)
        actions.append(np.asarray(action))
        observation, _, _, _, info = env.step(action)
    env.close()
    return actions


def logits_of(policy: Any, observations: np.ndarray) -> np.ndarray:
    """Logits after a sequence of flat observations [T, N (1 + F)], from the policy's present memory."""
    weights = np.ones(4)
    for observation in observations[:-1]:
        policy.act(observation, {"weights": weights})
    inputs, active = server_inputs(observations[-1:], policy.features)
    logits: np.ndarray = policy._network(inputs, active, policy._memory)[0]
    return logits


def some_observations(seed: int, steps: int = 4) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.concatenate([np.ones((steps, 4)), rng.random((steps, 48))], axis=-1).astype(np.float32)


def test_a_checkpoint_reloads_to_the_same_actions(trained: Path) -> None:
    one, two = load_policy(trained), load_policy(trained).copy()
    assert isinstance(one, sac_gru.SACGRUPolicy)
    assert one.step == 512
    assert one.env_kwargs["action_weights"] == SMALL.action_weights
    expected = play(one, scenario="uniform")
    for policy in (two, two.copy(), copy.copy(one)):
        assert all(np.array_equal(a, b) for a, b in zip(expected, play(policy, scenario="uniform"), strict=True))


def test_a_policy_serves_another_number_of_servers(trained: Path) -> None:
    assert all(action.shape == (11,) for action in play(load_policy(trained), num_servers=11))


def test_the_memory_is_that_of_an_episode_and_of_a_copy(trained: Path) -> None:
    policy = load_policy(trained)
    seen, other = some_observations(0), some_observations(1)
    first = logits_of(policy, seen)
    # it remembers, ...
    assert not np.allclose(logits_of(policy, seen), first, atol=1e-6)
    # ... until the episode ends, ...
    policy.reset()
    assert np.array_equal(logits_of(policy, seen), first)
    # ... and a copy has a memory of its own
    policy.reset()
    twin = copy.copy(policy)
    for mine, its in zip(seen[:-1], other[:-1], strict=True):
        policy.act(mine, {"weights": np.ones(4)})
        twin.act(its, {"weights": np.ones(4)})
    assert np.array_equal(logits_of(policy, seen[-1:]), first)
    assert not np.array_equal(logits_of(twin, seen[-1:]), first)


def test_a_batch_of_observations_gets_the_same_memory_as_each_alone(trained: Path) -> None:
    policy = load_policy(trained)
    batch = np.stack([some_observations(seed) for seed in range(3)])
    policy.reset()
    for t in range(4):
        actions = policy.act(batch[:, t], {"weights": np.ones((3, 4))})
    memory = policy._memory
    for i in range(3):
        policy.reset()
        for t in range(4):
            alone = policy.act(batch[i, t], {"weights": np.ones(4)})
        assert np.array_equal(alone, actions[i])
        assert np.allclose(policy._memory[0], memory[i], atol=1e-5)


def test_drawn_actions_follow_the_seed(trained: Path) -> None:
    one, two, three = (
        play(load_policy(trained, deterministic=False, seed=seed), scenario="uniform") for seed in (1, 1, 2)
    )
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(one, three, strict=True))


def test_compare_accepts_it(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("scipy")
    pytest.importorskip("typer")
    from lbgym.cli import main

    with pytest.raises(SystemExit) as exit_:
        main(["compare", "--scenario", "uniform", "--policies", f"lsq,{trained}", "--seeds", "2", "--duration", "5"])
    assert not exit_.value.code
    assert "agent" in capsys.readouterr().out


def test_the_command_line_trains_it_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("typer")
    pytest.importorskip("rich")
    from lbgym.cli import main

    def train(*arguments: object) -> Any:
        with pytest.raises(SystemExit) as exit_:
            main(["train", "--algo", "sac-gru", "--no-tensorboard", "--json", *map(str, arguments)])
        assert not exit_.value.code
        return json.loads(capsys.readouterr().out)

    first = train("--scenario", "uniform", "--num-envs", 4, "--steps", 64, "--out", tmp_path)
    assert first["checkpoint"] == str(tmp_path / "sac-gru.pt")
    assert train("--resume", tmp_path / "sac-gru.pt", "--steps", 96)["steps"] == 96


def test_a_checkpoint_of_another_shape_is_refused_with_both_shapes(trained: Path) -> None:
    with pytest.raises(CheckpointError, match=r"features=12 .*\(52,\).* needs features=15 .*\(64,\)"):
        train_sac_gru(replace(SMALL, env_kwargs={"use_ground_truth": True}), resume_from=trained)
    with pytest.raises(CheckpointError, match=r"choices=6 .*MultiDiscrete.* needs choices=2 .*MultiDiscrete"):
        train_sac_gru(replace(SMALL, action_weights=(1.0, 2.0)), resume_from=trained)
    with pytest.raises(CheckpointError, match=r"hidden=8.* needs hidden=16"):
        train_sac_gru(replace(SMALL, hidden=16), resume_from=trained)


def test_checkpoints_of_other_recipes_and_versions_are_refused(trained: Path, tmp_path: Path) -> None:
    from lbgym.training.recipes import config_of

    with pytest.raises(CheckpointError, match="was trained by recipe 'sac-gru', not by 'ppo'"):
        config_of(trained, "ppo")
    state = read_checkpoint(trained)
    torch.save(state | {"version": 99, "lbgym": "9.9"}, tmp_path / "newer.pt")
    with pytest.raises(CheckpointError, match=r"format version 99, written by lbgym 9\.9; this lbgym reads version 1"):
        load_policy(tmp_path / "newer.pt")
    torch.save({"format": "other"}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="is not an lbgym checkpoint: its format is other"):
        load_policy(tmp_path / "other.pt")


def test_act_refuses_an_observation_of_another_width(trained: Path) -> None:
    with pytest.raises(CheckpointError, match=r"13 numbers per server; for 4 servers it takes shape \(52,\)"):
        load_policy(trained).act(np.zeros(60, np.float32), {"weights": np.ones(4)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"total_steps": None}, "needs total_steps, seconds or both"),
        ({"num_envs": 0}, "num_envs must be a whole number of at least 1, got 0"),
        ({"burn_in": -1}, "burn_in must be a whole number of at least 0, got -1"),
        ({"sequence_length": 17}, "sequence_length must be at most max_steps=16, got 17"),
        ({"action_type": "normalized"}, 'use action_type="discrete" or "joint" instead of \'normalized\''),
        ({"env_kwargs": {"action_type": "continuous"}}, "instead of 'continuous'"),
        ({"replay": 7}, r"replay must be at least 2 \* num_envs = 8 episodes, got 7"),
    ],
)
def test_configurations_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LbgymError, match=message):
        replace(SMALL, **changes)
