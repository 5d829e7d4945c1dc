"""The networks over servers, in each form: permuted servers permute the outputs, inactive ones do not exist."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode

from lbgym import LoadBalanceEnv, LoadBalanceVectorEnv
from lbgym.errors import LbgymError
from lbgym.policies import load_policy

torch = pytest.importorskip("torch")

from lbgym.training.networks import EquivariantNetwork, FlatServerNetwork, RecurrentNetwork  # noqa: E402

FEATURES, HIDDEN, OUTPUTS = 5, 16, 3
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def randomised(module: Any) -> Any:
    """With every parameter drawn anew: large enough weights and small offsets, so that inputs decide."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = parameter.shape[1] ** -0.5 if parameter.dim() == 2 else 0.01
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return module


def servers(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [..., N, F] and a mask with some servers inactive, never all."""
    generator = torch.Generator().manual_seed(len(shape))
    x = torch.randn(*shape, FEATURES, generator=generator)
    active = torch.rand(*shape, generator=generator) < 0.7
    active[..., 0] = True
    return x, active


def run(network: Any, x: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
    """Outputs of x [B, T, N, F], 0 where inactive; without a memory each step is on its own."""
    out = network.forward_sequence(x, active)[0] if isinstance(network, RecurrentNetwork) else network(x, active)
    return out * active.unsqueeze(-1)


@pytest.fixture(params=[EquivariantNetwork, RecurrentNetwork], ids=["plain", "recurrent"])
def network(request: pytest.FixtureRequest) -> Any:
    return randomised(request.param(FEATURES, HIDDEN, OUTPUTS)).requires_grad_(False)


@pytest.mark.parametrize("n", [4, 8, 64])
def test_the_same_weights_serve_any_number_in_any_order(network: Any, n: int) -> None:
    x, active = servers(3, 6, n)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    out = run(network, x, active)
    permuted = run(network, x[:, :, order], active[:, :, order])
    assert torch.allclose(out[:, :, order], permuted, **CLOSE)
    assert not torch.allclose(out, permuted, **CLOSE)


def test_inactive_servers_have_no_influence(network: Any) -> None:
    x, active = servers(3, 6, 8)
    active[:, :, 5:] = False
    out = run(network, x, active)
    changed = torch.where(active.unsqueeze(-1), x, x + 100.0)
    assert torch.equal(run(network, changed, active), out)
    assert torch.allclose(run(network, x[:, :, :5], active[:, :, :5]), out[:, :, :5], **CLOSE)
    # and active ones have
    changed[:, :, 0] += 1.0
    assert not torch.allclose(run(network, changed, active)[:, :, 1:], out[:, :, 1:], **CLOSE)


def test_the_memory_carries_over_and_belongs_to_its_server() -> None:
    network = randomised(RecurrentNetwork(FEATURES, HIDDEN, OUTPUTS)).requires_grad_(False)
    x, active = servers(2, 6, 4)
    whole, last = network.forward_sequence(x, active)
    _, middle = network.forward_sequence(x[:, :2], active[:, :2])
    rest, after = network.forward_sequence(x[:, 2:], active[:, 2:], middle)
    assert torch.allclose(rest, whole[:, 2:], **CLOSE)
    assert torch.allclose(after, last, **CLOSE)
    assert not torch.allclose(network.forward_sequence(x[:, 2:], active[:, 2:])[0], rest, **CLOSE)
    order = torch.tensor([2, 0, 3, 1])
    permuted, _ = network.forward_sequence(x[:, 2:, order], active[:, 2:, order], middle[:, order])
    assert torch.allclose(rest[:, :, order], permuted, **CLOSE)


def test_every_parameter_learns(network: Any) -> None:
    network.requires_grad_(True)
    x, active = servers(3, 6, 8)
    run(network, x, active).square().sum().backward()
    assert [name for name, p in network.named_parameters() if not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("outputs", [1, 2])
def test_centered_outputs_differ_as_before_and_have_no_mean(outputs: int) -> None:
    x, active = servers(32, 8)
    flat = torch.cat([active.float(), x.flatten(-2)], -1)
    plain = randomised(FlatServerNetwork(FEATURES, HIDDEN, outputs)).requires_grad_(False)
    centered = FlatServerNetwork(FEATURES, HIDDEN, outputs, centered=True).requires_grad_(False)
    centered.load_state_dict(plain.state_dict())
    before, after = (network(flat).unflatten(-1, (8, outputs)) for network in (plain, centered))
    means = before[..., 0].sum(-1, keepdim=True) / active.sum(-1, keepdim=True)
    assert means.abs().max() > 0.1
    assert torch.allclose(after[..., 0], (before[..., 0] - means) * active, **CLOSE)
    # such as standard deviations
    assert torch.equal(after[..., 1:], before[..., 1:])


# Stable-Baselines3


def observations(layout: str, n: int, active: np.ndarray, features: np.ndarray) -> Any:
    """An observation as the environment lays it out, except that inactive servers may have features."""
    if layout == "dict":
        return {"features": features, "mask": active.astype(np.int8)}
    if layout == "flat":
        return np.concatenate([active, features.reshape(*active.shape[:-1], -1)], -1).astype(np.float32)
    # there is no mask but rows of zeros
    return features * active[..., None]


def make_policy(kind: str, layout: str, action_type: str, n: int) -> Any:
    policies = pytest.importorskip("lbgym.training.sb3_policies", exc_type=ImportError)
    env = LoadBalanceEnv(num_servers=n, observation=layout, normalize=True, action_type=action_type)
    made = getattr(policies, kind)(
        env.observation_space, env.action_space, lambda _: 1e-3, features_extractor_kwargs={"hidden": HIDDEN}
    )
    env.close()
    return made


def choices(action: np.ndarray, action_type: str, n: int) -> np.ndarray:
    """One choice per server [B, N], whatever the form of the action."""
    if action_type != "joint":
        return action
    return action[:, None] // 3 ** np.arange(n)[::-1] % 3


SB3_FORMS = [
    ("EquivariantQPolicy", "flat", "joint"),
    ("EquivariantPolicy", "flat", "joint"),
    ("EquivariantPolicy", "flat", "discrete"),
    ("EquivariantPolicy", "dict", "discrete"),
    ("EquivariantPolicy", "matrix", "discrete"),
    ("EquivariantPolicy", "flat", "normalized"),
    ("EquivariantSACPolicy", "flat", "normalized"),
    ("EquivariantSACPolicy", "dict", "normalized"),
]


@pytest.mark.parametrize(("kind", "layout", "action_type"), SB3_FORMS)
def test_policies_of_stable_baselines3_are_equivariant(kind: str, layout: str, action_type: str) -> None:
    small, large = 4, 5 if action_type == "joint" else 64
    policy = randomised(make_policy(kind, layout, action_type, small))
    for n in (small, large):
        other = make_policy(kind, layout, action_type, n)
        other.load_state_dict(policy.state_dict())
        rng = np.random.default_rng(n)
        features = rng.normal(size=(32, n, 11)).astype(np.float32)
        active = rng.random((32, n)) < 0.8
        active[:, 0] = True
        order = rng.permutation(n)

        def act(active: np.ndarray, features: np.ndarray, *, n: int = n, policy: Any = other) -> np.ndarray:
            action, _ = policy.predict(observations(layout, n, active, features), deterministic=True)
            return choices(action, action_type, n) * active

        actions = act(active, features)
        assert np.allclose(actions[:, order], act(active[:, order], features[:, order]), rtol=1e-4, atol=1e-4)
        assert len(np.unique(actions[active])) > 1
        assert np.array_equal(actions, act(active, np.where(active[..., None], features, 0.7)))
        assert not np.array_equal(actions, act(active, np.where(active[..., None], 0.7, features)))


@pytest.mark.parametrize("kind", ["EquivariantPolicy", "EquivariantSACPolicy"])
def test_actions_that_are_logarithms_are_centered_in_stable_baselines3(kind: str) -> None:
    # a large offset of all actions would otherwise have them all cut off at the same bound
    rng = np.random.default_rng(0)
    active = np.ones((16, 6), bool)
    active[:, 4:] = False
    seen = observations("flat", 6, active, rng.random((16, 6, 11)))
    for action_type in ("normalized", "continuous"):
        policy = randomised(make_policy(kind, "flat", action_type, 6))
        head = policy.action_net.head if kind == "EquivariantPolicy" else policy.actor.mu.head
        told = []
        for offset in (0.0, 50.0):
            torch.nn.init.constant_(head.head.bias, offset)
            told.append(policy.predict(seen, deterministic=True)[0][:, :4])
        if action_type == "normalized":
            assert np.allclose(told[0], told[1], atol=1e-4)
            assert np.ptp(told[1], axis=1).min() > 0
        else:
            # these are weights themselves
            assert np.ptp(told[1]) == 0


def test_critics_of_stable_baselines3_see_servers_with_their_actions() -> None:
    policy = randomised(make_policy("EquivariantSACPolicy", "flat", "normalized", 6))
    rng = np.random.default_rng(0)
    features, actions = rng.random((8, 6, 11)), rng.uniform(-1, 1, (8, 6))
    active = np.ones((8, 6), bool)
    active[:, 4] = False
    order = np.array([3, 4, 0, 5, 2, 1])

    def q(active: np.ndarray, features: np.ndarray, actions: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            flat = torch.from_numpy(observations("flat", 6, active, features))
            return torch.cat(policy.critic(flat, torch.from_numpy(actions).float())).numpy()

    here = q(active, features, actions)
    assert np.allclose(here, q(active[:, order], features[:, order], actions[:, order]), **CLOSE)
    assert not np.allclose(here, q(active, features, actions[:, order]), **CLOSE)
    without = actions.copy()
    without[:, 4] = 1.0
    assert np.array_equal(here, q(active, features, without))


@pytest.mark.parametrize(
    ("algorithm", "kind", "action_type", "keys"),
    [
        ("PPO", "EquivariantPolicy", "discrete", {"n_steps": 8, "batch_size": 16, "n_epochs": 1}),
        ("A2C", "EquivariantPolicy", "normalized", {"n_steps": 8}),
        ("SAC", "EquivariantSACPolicy", "normalized", {"learning_starts": 16, "batch_size": 16}),
        ("DQN", "EquivariantQPolicy", "joint", {"learning_starts": 16, "batch_size": 16, "target_update_interval": 8}),
    ],
)
def test_algorithms_of_stable_baselines3_train_them(
    algorithm: str, kind: str, action_type: str, keys: dict[str, Any], tmp_path: Path
) -> None:
    sb3 = pytest.importorskip("stable_baselines3")
    from lbgym.training import SB3VecEnv, sb3_policies

    vector = LoadBalanceVectorEnv(
        4,
        scenario="uniform",
        observation="flat",
        normalize=True,
        action_type=action_type,
        autoreset_mode=AutoresetMode.SAME_STEP,
    )
    policy_kwargs = {"features_extractor_kwargs": {"hidden": HIDDEN}}
    model = getattr(sb3, algorithm)(
        getattr(sb3_policies, kind), SB3VecEnv(vector), seed=0, device="cpu", policy_kwargs=policy_kwargs, **keys
    )
    before = {name: value.clone() for name, value in model.policy.named_parameters()}
    model.learn(96)
    vector.close()
    assert [name for name, value in model.policy.named_parameters() if torch.equal(value, before[name])] == []
    model.save(tmp_path / "model.zip")
    loaded = load_policy(tmp_path / "model.zip")
    loaded.reset()
    env = LoadBalanceEnv(**loaded.env_kwargs, scenario="uniform")
    observation, info = env.reset(seed=1)
    assert np.allclose(loaded.act(observation, info), model.predict(observation, deterministic=True)[0])
    env.close()


def test_servers_are_counted_from_the_spaces() -> None:
    policies = pytest.importorskip("lbgym.training.sb3_policies", exc_type=ImportError)
    flat = spaces.Box(0.0, 1.0, (60,))
    # 60 numbers are 5 servers without the ground truth or 4 with it
    assert policies.servers_of(flat, spaces.MultiDiscrete([3] * 5)) == 5
    assert policies.servers_of(flat, spaces.Discrete(3**4)) == 4
    assert policies.servers_of(flat) == 5
    for space in (spaces.Box(0.0, 1.0, (61,)), spaces.Discrete(3)):
        with pytest.raises(LbgymError, match="need the spaces of an lbgym environment"):
            policies.servers_of(space)


def test_what_would_break_the_symmetry_is_refused() -> None:
    policies = pytest.importorskip("lbgym.training.sb3_policies", exc_type=ImportError)
    arguments = (spaces.Box(0.0, 1.0, (4, 11)), spaces.Box(-1.0, 1.0, (4,)), lambda _: 1e-3)
    with pytest.raises(LbgymError, match=r"not by net_arch=\[64\]"):
        policies.EquivariantPolicy(*arguments, net_arch=[64])
    with pytest.raises(LbgymError, match="use_sde=True"):
        policies.EquivariantSACPolicy(*arguments, use_sde=True)
