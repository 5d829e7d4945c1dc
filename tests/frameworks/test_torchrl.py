"""The vector environments as TorchRL's: its own checks, equality with what they wrap, networks and losses on them."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

if find_spec("torchrl") is None:
    pytest.skip("needs torchrl", allow_module_level=True)

import torch

from lbgym import LoadBalanceVectorEnv, MultiLoadBalanceVectorEnv
from lbgym.env.observations import relative_weights
from lbgym.errors import InvalidOptionError, LbgymError, UnsupportedSpaceError
from lbgym.training.networks import FlatServerNetwork
from lbgym.training.torchrl_env import MultiTorchRLEnv, TorchRLEnv

# isort: split
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule, TensorDictSequential
from torchrl.envs.utils import check_env_specs
from torchrl.modules import ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

ACTION_TYPES = ("discrete", "joint", "continuous", "normalized")
KEYS = {"num_servers": 4, "max_steps": 5, "autoreset_mode": "Disabled"}


def single(num_envs: int = 3, **keys: Any) -> TorchRLEnv:
    return TorchRLEnv(LoadBalanceVectorEnv(num_envs, **KEYS | keys))


def multi(num_envs: int = 3, **keys: Any) -> MultiTorchRLEnv:
    return MultiTorchRLEnv(MultiLoadBalanceVectorEnv(num_envs, **KEYS | keys))


@pytest.mark.parametrize("make", [single, multi])
@pytest.mark.parametrize("action_type", ACTION_TYPES)
@pytest.mark.parametrize(
    "keys",
    [
        {"observation": "flat", "normalize": True, "observe_weights": True},
        {"observation": "flat", "normalize": True},
        {"observation": "matrix"},
        {"observation": "dict", "use_ground_truth": True},
    ],
    ids=["weights", "flat", "matrix", "dict"],
)
def test_torchrls_own_check(make: Any, action_type: str, keys: dict[str, Any]) -> None:
    env = make(action_type=action_type, **keys)
    check_env_specs(env)
    env.close()


@pytest.mark.parametrize("key", ["observe_weights", "sees_weights"])
def test_keys_of_the_vector_environment_are_refused(key: str) -> None:
    for kind, make in ((TorchRLEnv, LoadBalanceVectorEnv), (MultiTorchRLEnv, MultiLoadBalanceVectorEnv)):
        with pytest.raises(InvalidOptionError, match=f"{kind.__name__} takes .* got {key}=True: keys such as"):
            kind(make(2, **KEYS), **{key: True})


@pytest.mark.parametrize("layout", ["flat", "matrix", "dict"])
@pytest.mark.parametrize("action_type", ACTION_TYPES)
def test_equals_the_vector_environment(layout: str, action_type: str) -> None:
    keys = KEYS | {"observation": layout, "action_type": action_type}
    for env, vector in (
        (single(**keys), LoadBalanceVectorEnv(3, **keys)),
        (multi(**keys), MultiLoadBalanceVectorEnv(3, **keys)),
    ):
        group = "lb" if isinstance(env, MultiTorchRLEnv) else ()
        env.set_seed(7)
        rollout = env.rollout(12, break_when_any_done=False)
        observation, _ = vector.reset(seed=7)
        for t in range(12):
            now, after = rollout[:, t], rollout[:, t]["next"]
            assert_same(now[group] if group else now, observation)
            if isinstance(vector, MultiLoadBalanceVectorEnv):
                assert torch.equal(now["state"], torch.from_numpy(vector.state()))
            action = (now[group] if group else now)["action"].numpy()
            observation, rewards, terminated, truncated, _ = vector.step(action)
            assert_same(after[group] if group else after, observation)
            if isinstance(vector, MultiLoadBalanceVectorEnv):
                assert torch.equal(after["state"], torch.from_numpy(vector.state()))
            reward = (after[group] if group else after)["reward"]
            assert np.array_equal(reward.squeeze(-1).numpy(), rewards.astype(np.float32))
            assert np.array_equal(after["truncated"].squeeze(-1).numpy(), truncated)
            assert np.array_equal(after["terminated"].squeeze(-1).numpy(), terminated)
            assert torch.equal(after["done"], after["truncated"])
            assert bool(truncated.all()) == (t % 5 == 4)
            if truncated.any():
                observation, _ = vector.reset(options={"reset_mask": truncated})
        env.close()
        vector.close()


def assert_same(told: TensorDict, observation: Any) -> None:
    parts = observation if isinstance(observation, dict) else {"observation": observation}
    for name, part in parts.items():
        assert np.array_equal(told[name].numpy(), part)


def test_weights_in_force_are_observed() -> None:
    env = multi(observe_weights=True, observation="flat", action_type="normalized")
    plain = MultiLoadBalanceVectorEnv(3, observation="flat", action_type="normalized", **KEYS)
    env.set_seed(1)
    plain.reset(seed=1)
    told = env.reset()
    assert not told["lb", "observation"][..., 4:].unflatten(-1, (4, 12))[..., -1].any()
    action = env.full_action_spec.rand()
    told = env.step(told.update(action))["next"]
    observation, *_, info = plain.step(action["lb", "action"].numpy())
    told_of = told["lb", "observation"][..., 4:].unflatten(-1, (4, 12))
    assert torch.equal(told_of[..., :-1].flatten(-2), torch.from_numpy(observation[..., 4:]))
    seen = told_of[..., -1]
    assert np.array_equal(seen.numpy(), relative_weights(info["weights"], info["active"]))
    log_weights = torch.from_numpy(np.log(info["weights"])).float()
    assert torch.allclose(seen, log_weights - log_weights.mean(-1, keepdim=True), atol=1e-5)


def test_seeds() -> None:
    env = single(4, action_type="joint")

    def rollout(seed: int | None) -> TensorDict:
        if seed is not None:
            env.set_seed(seed)
        torch.manual_seed(0)
        return env.rollout(7, break_when_any_done=False)

    first, other, goes_on, again = rollout(3), rollout(4), rollout(None), rollout(3)
    assert (first == again).all()
    assert not (first["observation"] == other["observation"]).all()
    assert not (other["observation"] == goes_on["observation"]).all()
    # replica i has seed s + i
    assert torch.equal(first["observation"][1, 0], other["observation"][0, 0])


def test_resets_only_the_marked_replicas() -> None:
    env = single(3)
    env.set_seed(1)
    now = env.rollout(3, auto_cast_to_device=True)[:, -1]["next"]
    mask = torch.tensor([[False], [True], [False]])
    again = env.reset(now.clone().set("_reset", mask))
    assert torch.equal(again["observation"][[0, 2]], now["observation"][[0, 2]])
    assert not torch.equal(again["observation"][1], now["observation"][1])
    # two steps later the replicas that went on are over, and only those
    for _ in range(2):
        after = env.step(env.rand_action(again))["next"]
    assert after["truncated"].squeeze(-1).tolist() == [True, False, True]


def test_options_of_reset() -> None:
    env = single(2, reward_type="open_flows")
    slow = env.rollout(4, auto_reset=False, tensordict=env.reset(options={"rate": 1.0}))
    fast = env.rollout(4, auto_reset=False, tensordict=env.reset(options={"rate": 400.0}))
    assert float(slow["next", "reward"].mean()) > float(fast["next", "reward"].mean())


def test_tensors_are_fresh() -> None:
    env = multi(observation="flat")
    before = env.reset()
    copies = before.clone()
    env.rollout(4)
    assert (before == copies).all()


def test_what_it_does_not_take() -> None:
    with pytest.raises(LbgymError, match="autoreset_mode DISABLED"):
        single(autoreset_mode="NextStep")
    with pytest.raises(UnsupportedSpaceError, match="MultiTorchRLEnv"):
        TorchRLEnv(MultiLoadBalanceVectorEnv(2, **KEYS))


def test_a_network_over_servers_acts_in_it() -> None:
    env = multi(observation="flat", normalize=True, action_type="joint", action_weights=[1.0, 2.0])
    values = TensorDictModule(FlatServerNetwork(11, 8, 2, joint=True), [("lb", "observation")], [("lb", "values")])
    greedy = TensorDictModule(lambda values: values.argmax(-1), [("lb", "values")], [("lb", "action")])
    rollout = env.rollout(4, TensorDictSequential(values, greedy))
    assert rollout["lb", "values"].shape == (3, 4, 2, 16)
    assert torch.equal(rollout["lb", "action"], rollout["lb", "values"].argmax(-1))


def test_the_network_works_under_vmap_and_with_any_leading_axes() -> None:
    network = FlatServerNetwork(3, 8, 2)
    flat = torch.rand(5, 2, 6, 16)
    flat[..., :4] = torch.rand(5, 2, 6, 4) > 0.3
    out = network(flat)
    assert out.shape == (5, 2, 6, 8)
    assert torch.allclose(torch.vmap(network)(flat), out, atol=1e-6)
    assert torch.allclose(network(flat[0, 0, 0]), out[0, 0, 0], atol=1e-6)
    assert not out.unflatten(-1, (4, 2))[flat[..., :4] == 0].any()


def test_ppo_of_torchrl_learns_in_it() -> None:
    torch.manual_seed(0)
    env = single(8, observe_weights=True, observation="flat", normalize=True, action_type="normalized", max_steps=8)
    heads = torch.nn.Sequential(FlatServerNetwork(12, 16, 1), torch.nn.Linear(4, 8), NormalParamExtractor())
    actor = ProbabilisticActor(
        TensorDictModule(heads, ["observation"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        spec=env.action_spec,
        distribution_class=TanhNormal,
        return_log_prob=True,
    )
    critic = ValueOperator(FlatServerNetwork(12, 16, value=True), ["observation"])
    advantage = GAE(gamma=0.95, lmbda=0.9, value_network=critic)
    loss = ClipPPOLoss(actor, critic)
    before = [p.detach().clone() for p in loss.parameters()]
    optimizer = torch.optim.Adam(loss.parameters(), 1e-3)
    for _ in range(3):
        with torch.no_grad():
            batch = env.rollout(8, actor, break_when_any_done=False)
        advantage(batch)
        losses = loss(batch.reshape(-1))
        sum(losses[name] for name in ("loss_objective", "loss_critic", "loss_entropy")).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.isfinite(p).all() for p in loss.parameters())
    assert all(not torch.equal(p, q) for p, q in zip(loss.parameters(), before, strict=True))
