"""PPO: its parts against plain definitions, its runs against each other."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lbgym import LoadBalanceEnv
from lbgym.errors import CheckpointError, DivergedError, FileWriteError, LbgymError, PolicyError
from lbgym.evaluation import compare
from lbgym.policies import load_policy, read_checkpoint
from lbgym.scenarios import Exponential, Scenario, Server, Workload

torch = pytest.importorskip("torch")

from lbgym.training import networks, ppo, runs  # noqa: E402
from lbgym.training.ppo import PPOConfig, train_ppo  # noqa: E402
from lbgym.training.runs import Progress  # noqa: E402

SMALL = PPOConfig(
    num_envs=8, replicas_per_seed=2, num_steps=8, max_steps=16, total_steps=8 * 8 * 4, hidden=8, minibatches=2, epochs=2
)


def parameters(path: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(path)["network"]["parameters"]


# The parts


def test_gae_is_the_sum_of_discounted_errors() -> None:
    rng = np.random.default_rng(0)
    steps, replicas, gamma, lam = 7, 3, 0.9, 0.8
    rewards, values, next_values = rng.normal(size=(3, steps, replicas))
    terminated = rng.random((steps, replicas)) < 0.15
    ended = terminated | (rng.random((steps, replicas)) < 0.2)
    assert ended.any()
    assert (ended & ~terminated).any()

    expected = np.zeros((steps, replicas))
    for r in range(replicas):
        for t in range(steps):
            weight = 1.0
            for later in range(t, steps):
                future = 0.0 if terminated[later, r] else gamma * next_values[later, r]
                expected[t, r] += weight * (rewards[later, r] + future - values[later, r])
                if ended[later, r]:
                    break
                weight *= gamma * lam

    tensors = [torch.from_numpy(x) for x in (rewards, values, next_values, terminated, ended)]
    assert np.allclose(ppo.gae(*tensors, gamma, lam).numpy(), expected)


def test_truncation_bootstraps_the_last_observation_of_the_episode() -> None:
    trainer = ppo._Trainer(replace(SMALL, num_steps=20, max_steps=16))
    trainer.reset_env(None)
    seen = []
    step = trainer.env.step

    def recorded(actions: object) -> object:
        result = step(actions)
        seen.append(result)
        return result

    trainer.env.step = recorded  # type: ignore[method-assign]
    rollout = trainer.collect()
    assert rollout.ended.sum(1).tolist() == [0] * 15 + [8] + [0] * 4
    assert not rollout.terminated.any()

    # play the same observations through an encoder of its own; the 16th is the last of its episode
    encoder = ppo.Encoder(trainer.features, SMALL.memory)
    encoder.average = rollout.inputs[0, :, :, trainer.features :].numpy().copy()
    for observation, *_ in seen[:16]:
        inputs, active = map(torch.from_numpy, encoder(observation))
    with torch.no_grad():
        last = trainer.network.value(inputs, active)
    assert torch.allclose(rollout.next_values[15], last)
    # the next episode's first value is another one
    assert not torch.allclose(rollout.next_values[15], rollout.values[16])
    assert torch.equal(rollout.next_values[:15], rollout.values[1:16])
    assert torch.equal(rollout.next_values[16:-1], rollout.values[17:])
    # and its first observation is that of empty servers
    counts = rollout.inputs[16, :, :, 0]
    assert torch.equal(counts, torch.zeros_like(counts))
    trainer.env.close()


def network(choices: int, features: int = 5) -> networks.ServerNetwork:
    torch.manual_seed(0)
    net = networks.ServerNetwork(features, 16, choices)
    with torch.no_grad():
        net.head.weight.normal_()
        net.moments.mean.normal_()
        net.moments.var.uniform_(0.5, 2.0)
    return net


@pytest.mark.parametrize("choices", [0, 3])
def test_the_network_is_equivariant_to_the_order_of_servers(choices: int) -> None:
    net = network(choices)
    x = torch.randn(4, 6, 5)
    active = torch.ones(4, 6, dtype=torch.bool)
    active[1, 2] = active[2, :5] = False
    order = torch.randperm(6)
    out, value = net(net.scale(x, active), active)
    permuted, same = net(net.scale(x[:, order], active[:, order]), active[:, order])
    assert torch.allclose(out[:, order], permuted, atol=1e-5)
    assert torch.allclose(value, same, atol=1e-5)
    assert out.std() > 0.1


@pytest.mark.parametrize("choices", [0, 3])
def test_inactive_servers_change_nothing(choices: int) -> None:
    net = network(choices)
    x = torch.randn(4, 6, 5)
    active = torch.ones(4, 6, dtype=torch.bool)
    active[:, 4:] = False
    out, value = net(net.scale(x, active), active)
    other = x.clone()
    other[:, 4:] += 3
    assert torch.equal(net(net.scale(other, active), active)[1], value)
    fewer = active[:, :4]
    alone, alone_value = net(net.scale(x[:, :4], fewer), fewer)
    assert torch.allclose(out[:, :4], alone, atol=1e-5)
    assert torch.allclose(value, alone_value, atol=1e-5)
    choice = net.sample(out, active, None)
    log_p, entropy = net.log_prob(out, active, choice)
    fewer_log_p, fewer_entropy = net.log_prob(alone, fewer, choice[:, :4])
    assert torch.allclose(log_p, fewer_log_p, atol=1e-5)
    assert torch.allclose(entropy, fewer_entropy, atol=1e-5)


def test_log_probabilities_are_those_of_torch() -> None:
    active = torch.ones(4, 6, dtype=torch.bool)
    out = torch.randn(4, 6)
    net = network(0)
    choice = net.sample(out, active, None)
    normal = torch.distributions.Normal(out, net.log_std.exp())
    log_p, entropy = net.log_prob(out, active, choice)
    assert torch.allclose(log_p, normal.log_prob(choice).sum(-1))
    assert torch.allclose(entropy, normal.entropy().sum(-1))

    out = torch.randn(4, 6, 3)
    net = network(3)
    choice = net.sample(out, active, None)
    categorical = torch.distributions.Categorical(logits=out)
    log_p, entropy = net.log_prob(out, active, choice)
    assert torch.allclose(log_p, categorical.log_prob(choice).sum(-1))
    assert torch.allclose(entropy, categorical.entropy().sum(-1))


def test_moments_are_those_of_all_rows() -> None:
    rows = torch.randn(1000, 3) * torch.tensor([1.0, 5.0, 0.1]) + torch.tensor([0.0, -3.0, 2.0])
    moments = networks.Moments(3)
    for part in rows.split([1, 99, 400, 500]):
        moments.update(part)
    assert torch.allclose(moments.mean, rows.mean(0), atol=1e-5)
    assert torch.allclose(moments.std, rows.std(0, unbiased=False), rtol=1e-3)


def test_memory_is_an_exponential_average_that_starts_with_the_episode() -> None:
    rng = np.random.default_rng(0)
    observations = np.concatenate([np.ones((5, 2, 3)), rng.random((5, 2, 6))], axis=-1)
    encoder = ppo.Encoder(2, 0.75)
    for t in range(5):
        fresh = np.array([False, True]) if t == 3 else None
        inputs, active = encoder(observations[t], fresh)
    now = observations[:, :, 3:].reshape(5, 2, 3, 2)
    average = now[0].copy()
    for t in range(1, 5):
        if t == 3:
            average[1] = now[3, 1]
        average = 0.75 * average + 0.25 * now[t]
    assert active.all()
    assert np.allclose(inputs[..., :2], now[4], atol=1e-6)
    assert np.allclose(inputs[..., 2:], average, atol=1e-6)


# Runs


@pytest.mark.parametrize("action_type", ["normalized", "discrete", "joint", "index"])
def test_training_moves_every_parameter_and_keeps_losses_finite(action_type: str, tmp_path: Path) -> None:
    config = replace(SMALL, scenario="uniform", action_type=action_type, entropy_coefficient=0.01)
    history: list[Progress] = []
    result = train_ppo(config, out=tmp_path, callback=history.append)
    assert result.checkpoint == tmp_path / "ppo.pt"
    assert [p.step for p in history] == [64, 128, 192, 256]
    assert history[-1].fraction == 1.0
    assert all(math.isfinite(x) for p in history for x in p.losses.values())
    assert all(math.isfinite(p.reward) and p.fct_mean > 0 for p in history)
    untrained = ppo._Trainer(config)
    before = dict(untrained.network.named_parameters())
    untrained.env.close()
    after = parameters(tmp_path / "ppo.pt")
    still = [name for name, value in before.items() if torch.equal(value, after[name])]
    # categorical actions have no standard deviation
    assert still == ([] if action_type in ("normalized", "index") else ["log_std"])


def test_value_clipping_and_the_limit_on_kl_train_too() -> None:
    result = train_ppo(replace(SMALL, clip_value=True, target_kl=1e-9, normalize_advantage=False, anneal_lr=False))
    assert all(math.isfinite(x) for p in result.history for x in p.losses.values())


def test_training_improves_the_reward() -> None:
    config = replace(
        SMALL,
        scenario="heterogeneous",
        num_envs=64,
        num_steps=16,
        max_steps=64,
        total_steps=64 * 16 * 60,
        replicas_per_seed=4,
        epochs=4,
        hidden=16,
    )
    history = train_ppo(config).history
    first, last = (np.mean([p.fct_mean for p in part]) for part in (history[4:8], history[-4:]))
    assert last < 0.85 * first


def test_the_same_seed_trains_the_same_policy(tmp_path: Path) -> None:
    one, two = train_ppo(SMALL).policy, train_ppo(SMALL).policy
    other = train_ppo(replace(SMALL, seed=2)).policy
    pairs = list(zip(*(p.parameters.values() for p in (one, two, other)), strict=True))
    assert all(np.array_equal(a, b) for a, b, _ in pairs)
    assert not any(np.array_equal(a, c) for a, _, c in pairs if a.ndim > 1)


def test_a_resumed_run_ends_like_an_uninterrupted_one(tmp_path: Path) -> None:
    train_ppo(SMALL, out=tmp_path / "whole.pt")
    # two rollouts of 8 steps are one episode
    train_ppo(SMALL, out=tmp_path / "half.pt", callback=lambda progress: progress.step == 128)
    half = read_checkpoint(tmp_path / "half.pt")
    assert half["step"] == 128
    resumed = train_ppo(resume_from=tmp_path / "half.pt", out=tmp_path / "resumed.pt")
    assert [p.step for p in resumed.history] == [192, 256]
    whole, again = (read_checkpoint(tmp_path / name) for name in ("whole.pt", "resumed.pt"))
    assert again["step"] == whole["step"]
    assert again["trainer"]["optimiser"]["param_groups"] == whole["trainer"]["optimiser"]["param_groups"]
    for name, value in whole["network"]["parameters"].items():
        assert torch.equal(value, again["network"]["parameters"][name]), name


def test_a_time_budget_ends_the_run_and_carries_over(tmp_path: Path) -> None:
    config = replace(SMALL, total_steps=None, seconds=0.3)
    first = train_ppo(config, out=tmp_path).history
    assert first[-1].seconds >= 0.3
    assert first[-1].fraction == 1.0
    assert train_ppo(resume_from=tmp_path / "ppo.pt").history == []


def test_interrupting_saves_the_last_whole_update(tmp_path: Path) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.step == 128:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_ppo(SMALL, out=tmp_path, callback=interrupt)
    assert read_checkpoint(tmp_path / "ppo.pt")["step"] == 128
    assert [p.name for p in tmp_path.iterdir()] == ["ppo.pt"]


def test_tensorboard_files_are_written_beside_the_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    train_ppo(replace(SMALL, total_steps=64), out=tmp_path / "agent.pt", tensorboard=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["agent.pt", "tensorboard"]
    assert list((tmp_path / "tensorboard").iterdir())


def test_torch_keeps_its_threads() -> None:
    before = torch.get_num_threads()
    train_ppo(replace(SMALL, total_steps=64, torch_threads=before + 1))
    assert torch.get_num_threads() == before


# Checkpoints and policies


@pytest.fixture(scope="module", params=["normalized", "discrete", "joint"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ppo.PPOResult:
    out = tmp_path_factory.mktemp("trained") / "agent.pt"
    return train_ppo(replace(SMALL, scenario="uniform", action_type=request.param), out=out)


def play(policy: object, steps: int = 5, **keys: object) -> list[np.ndarray]:
    env = LoadBalanceEnv(**policy.env_kwargs, **keys)  # type: ignore[attr-defined]
    observation, info = env.reset(seed=3)
    policy.reset()  # type: ignore[attr-defined]
    actions = []
    for _ in range(steps):
        action = policy.act(observation, info)  # type: ignore[attr-defined]
        assert env.action_space.contains(action)
        actions.append(np.asarray(action))
        observation, _, _, _, info = env.step(action)
    env.close()
    return actions


def test_it_learns_to_set_weights_and_background_loads(tmp_path: Path) -> None:
    """One fast and three slow servers, which only the action can say: the fast one's weight rises, the others' fall."""
    slow = Server(cores=2, speed=0.5)
    scenario = Scenario(
        name="odd", servers=(Server(cores=2, speed=2.0), slow, slow, slow),
        workload=Workload(load=0.8, demand=Exponential(mean=0.1)), dispatch="marginal",
    )  # fmt: skip
    config = PPOConfig(
        scenario=scenario, action_type="index", env_kwargs={"observe_configured": True}, num_envs=32, num_steps=16,
        max_steps=64, total_steps=32 * 16 * 60, hidden=16, replicas_per_seed=4, learning_rate=3e-3, anneal_lr=False,
    )  # fmt: skip
    result = train_ppo(config, out=tmp_path / "index.pt")
    first, last = (np.mean([p.fct_mean for p in part]) for part in (result.history[2:8], result.history[-6:]))
    assert last < 0.9 * first
    pytest.importorskip("scipy")
    with pytest.raises(PolicyError, match="sets background loads, and the dispatch rule 'wcmp' counts no flows"):
        compare(scenario, f"wcmp+{tmp_path / 'index.pt'}", seeds=2, duration=5.0)
    policy = load_policy(tmp_path / "index.pt")
    assert policy.env_kwargs["observe_configured"] and policy.kind.numbers == 2  # type: ignore[attr-defined]
    env = LoadBalanceEnv(scenario=scenario, **policy.env_kwargs)
    observation, info = env.reset(seed=1)
    for _ in range(40):
        action = policy.act(observation, info)
        assert action.shape == (4, 2) and env.action_space.contains(action)
        observation, _, _, _, info = env.step(action)
    assert info["weights"][0] > 1.5 * info["weights"][1:].max()


def test_a_checkpoint_reloads_to_the_same_actions(trained: ppo.PPOResult) -> None:
    assert trained.checkpoint is not None
    loaded = load_policy(trained.checkpoint)
    assert loaded.step == 256
    expected = play(trained.policy, scenario="uniform")
    for policy in (loaded, loaded.copy(), copy.copy(loaded)):
        for a, b in zip(expected, play(policy, scenario="uniform"), strict=True):
            assert np.array_equal(a, b)


def test_a_policy_serves_another_number_of_servers(trained: ppo.PPOResult) -> None:
    servers = 6 if trained.policy.kind.joint else 11
    for action in play(trained.policy, num_servers=servers):
        assert action.shape == (() if trained.policy.kind.joint else (servers,))


def test_drawn_actions_follow_the_seed(trained: ppo.PPOResult) -> None:
    assert trained.checkpoint is not None
    one, two, three = (
        play(load_policy(trained.checkpoint, deterministic=False, seed=seed), scenario="uniform") for seed in (1, 1, 2)
    )
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(one, three, strict=True))


def test_a_batch_of_observations_gets_the_same_actions_as_each_alone() -> None:
    policy = train_ppo(replace(SMALL, total_steps=64)).policy
    rng = np.random.default_rng(0)
    observations = np.concatenate([np.ones((3, 8)), rng.random((3, 96))], axis=-1).astype(np.float32)
    weights = rng.uniform(0.5, 2.0, (3, 8))
    policy.reset()
    batch = policy.act(observations, {"weights": weights})
    for i in range(3):
        policy.reset()
        assert np.allclose(policy.act(observations[i], {"weights": weights[i]}), batch[i], atol=1e-6)


def test_copies_of_a_policy_do_not_share_their_memory() -> None:
    policy = train_ppo(replace(SMALL, total_steps=64)).policy
    rng = np.random.default_rng(0)
    one, other = (np.concatenate([np.ones(8), rng.random(96)]).astype(np.float32) for _ in range(2))
    info = {"weights": np.ones(8)}
    policy.reset()
    policy.act(one, info)
    expected = policy.act(one, info)
    policy.reset()
    twin = copy.copy(policy)
    policy.act(one, info)
    twin.act(other, info)
    assert np.array_equal(policy.act(one, info), expected)


def test_act_refuses_an_observation_of_another_width() -> None:
    policy = train_ppo(replace(SMALL, total_steps=64)).policy
    with pytest.raises(
        CheckpointError, match=r"13 numbers per server; for 8 servers it takes shape \(104,\), got \(120,\)"
    ):
        policy.act(np.zeros(120, np.float32), {"weights": np.ones(8)})


def test_a_checkpoint_of_another_shape_is_refused_with_both_shapes(tmp_path: Path) -> None:
    train_ppo(replace(SMALL, total_steps=64), out=tmp_path)
    path = tmp_path / "ppo.pt"
    with pytest.raises(CheckpointError, match=r"features=12 .*\(104,\).* needs features=15 .*\(128,\)"):
        train_ppo(replace(SMALL, env_kwargs={"use_ground_truth": True}), resume_from=path)
    with pytest.raises(CheckpointError, match=r"choices=0 .*Box.* needs choices=3 .*MultiDiscrete"):
        train_ppo(replace(SMALL, action_type="discrete"), resume_from=path)
    with pytest.raises(CheckpointError, match=r"hidden=8.* needs hidden=16"):
        train_ppo(replace(SMALL, hidden=16), resume_from=path)


def test_files_that_are_no_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        load_policy(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(CheckpointError, match="cannot be read: it is damaged"):
        load_policy(tmp_path / "text.pt")
    torch.save({"weights": 1}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="is not an lbgym checkpoint: its format is None"):
        load_policy(tmp_path / "other.pt")
    train_ppo(replace(SMALL, total_steps=64), out=tmp_path)
    state = read_checkpoint(tmp_path / "ppo.pt") | {"version": 99, "lbgym": "9.9"}
    torch.save(state, tmp_path / "newer.pt")
    with pytest.raises(CheckpointError, match=r"format version 99, written by lbgym 9\.9; this lbgym reads version 1"):
        load_policy(tmp_path / "newer.pt")


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "file"
    runs.write_whole(path, lambda stream: stream.write(b"old"))

    def fail(stream: object) -> None:
        stream.write(b"ne")  # type: ignore[attr-defined]
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        runs.write_whole(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"total_steps": None}, "needs total_steps, seconds or both"),
        ({"num_envs": 0}, "num_envs must be a whole number of at least 1, got 0"),
        ({"num_envs": 9}, "num_envs must be a multiple of replicas_per_seed=2, got 9"),
        ({"minibatches": 1000}, r"minibatches must be at most num_envs \* num_steps = 64, got 1000"),
        ({"minibatches": 64}, r"minibatches=64 leaves a minibatch of one sample of num_envs \* num_steps = 8 \* 8"),
        ({"minibatches": 22}, "minibatches=22 leaves a minibatch of one sample"),
    ],
)
def test_configurations_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LbgymError, match=message):
        replace(SMALL, **changes)


def test_raw_continuous_actions_are_refused() -> None:
    with pytest.raises(LbgymError, match='use action_type="normalized"'):
        train_ppo(replace(SMALL, action_type="continuous"))


def test_a_full_disk_is_a_warning_in_between_and_an_error_at_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import resource

    config = replace(SMALL, checkpoint_every=0.0)
    train_ppo(replace(config, total_steps=64), out=tmp_path / "agent.pt")
    former = (tmp_path / "agent.pt").read_bytes()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # the system refuses files beyond a limit as it does those beyond the disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
    try:
        with pytest.raises(FileWriteError, match=r"cannot write .*agent\.pt: File too large"):
            train_ppo(config, out=tmp_path / "agent.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "no checkpoint at step" in caplog.text
    assert (tmp_path / "agent.pt").read_bytes() == former
    assert [path.name for path in tmp_path.iterdir()] == ["agent.pt"]


def test_minibatches_of_one_sample_are_for_advantages_as_they_are(tmp_path: Path) -> None:
    config = replace(SMALL, num_steps=1, minibatches=8, normalize_advantage=False)
    train_ppo(replace(config, total_steps=32), out=tmp_path)
    assert all(bool(value.isfinite().all()) for value in parameters(tmp_path / "ppo.pt").values())


def test_a_state_that_diverged_is_never_saved(tmp_path: Path) -> None:
    path = tmp_path / "ppo.pt"
    with pytest.raises(DivergedError, match=r"the training has diverged by step 128: the network's .* is not finite"):
        train_ppo(replace(SMALL, learning_rate=1e10), out=path)
    # the last update before it, which learns no more than the scale of the features
    assert read_checkpoint(path)["step"] == 64
    assert all(bool(value.isfinite().all()) for value in parameters(path).values())

    before = path.read_bytes()
    saved = read_checkpoint(path)
    saved["network"]["parameters"]["head.bias"] = torch.tensor([torch.nan])
    with pytest.raises(DivergedError):
        runs.write_torch(path, saved)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    # a file of a version that did save such a state
    torch.save(saved, tmp_path / "older.pt")
    with pytest.raises(DivergedError, match="has diverged by step 64"):
        train_ppo(resume_from=tmp_path / "older.pt")


def test_an_interrupt_before_the_first_update_leaves_the_former_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "agent.pt").write_text("former")

    def interrupt(self: ppo._Trainer) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ppo._Trainer, "collect", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_ppo(SMALL, out=tmp_path / "agent.pt")
    assert (tmp_path / "agent.pt").read_text() == "former"
