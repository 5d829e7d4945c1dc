from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest

from lbgym import LoadBalanceEnv, LoadBalanceVectorEnv
from lbgym.errors import PolicyError, UnknownNameError
from lbgym.policies import HEURISTICS, LatencyWeights, Policy, StaticWeights, make_policy, make_weight_policy

LAYOUTS = ("matrix", "flat", "dict")
ACTIONS = ("discrete", "joint", "continuous", "normalized")


@pytest.mark.parametrize("name", [name for name, e in HEURISTICS.items() if not (e.tables or e.background)])
@pytest.mark.parametrize("action_type", ACTIONS)
@pytest.mark.parametrize("observation", LAYOUTS)
@pytest.mark.parametrize("normalize", [False, True])
def test_every_heuristic_acts_in_every_environment(
    name: str, action_type: str, observation: str, normalize: bool
) -> None:
    env = LoadBalanceEnv(action_type=action_type, observation=observation, normalize=normalize, use_ground_truth=True)
    policy = make_policy(name, env, seed=0)
    assert isinstance(policy, Policy)
    seen, info = env.reset(seed=1)
    policy.reset()
    for _ in range(5):
        action = policy.act(seen, info)
        assert env.action_space.contains(action)
        seen, _, _, _, info = env.step(action)
        assert (info["weights"] > 0).all()


@pytest.mark.parametrize("observation", LAYOUTS)
@pytest.mark.parametrize("normalize", [False, True])
def test_the_layout_does_not_change_what_a_policy_does(observation: str, normalize: bool) -> None:
    keys: dict[str, Any] = {"scenario": "heterogeneous", "action_type": "continuous"}
    plain = LoadBalanceEnv(**keys)
    other = LoadBalanceEnv(**keys, observation=observation, normalize=normalize)
    histories = []
    for env in (plain, other):
        policy = LatencyWeights().for_env(env)
        seen, info = env.reset(seed=3)
        policy.reset()
        history = []
        for _ in range(40):
            seen, _, _, _, info = env.step(policy.act(seen, info))
            history.append(info["weights"])
        histories.append(np.array(history))
    # normalisation is float32 and logarithmic: a few parts in a hundred thousand
    assert histories[1][:10] == pytest.approx(histories[0][:10], rel=1e-3)


@pytest.mark.parametrize("action_type", ["continuous", "normalized"])
def test_weights_arrive_as_they_were_meant(action_type: str) -> None:
    env = LoadBalanceEnv(action_type=action_type)
    seen, info = env.reset(seed=0)
    meant = np.array([1.0, 2.0, 3.0, 0.5])
    _, _, _, _, info = env.step(StaticWeights(meant).for_env(env).act(seen, info))
    assert info["weights"] / info["weights"][0] == pytest.approx(meant, rel=1e-5)


def test_a_vector_environment_has_a_policy_per_replica() -> None:
    keys: dict[str, Any] = {"scenario": "heterogeneous", "action_type": "continuous", "observation": "flat"}
    vector = LoadBalanceVectorEnv(num_envs=3, **keys)
    policy = LatencyWeights().for_env(vector)
    seen, info = vector.reset(seed=[5, 6, 7])
    for _ in range(10):
        seen, _, _, _, info = vector.step(policy.act(seen, info))
    env = LoadBalanceEnv(**keys)
    single = LatencyWeights().for_env(env)
    one, told = env.reset(seed=6)
    for _ in range(10):
        one, _, _, _, told = env.step(single.act(one, told))
    assert np.array_equal(info["weights"][1], told["weights"])


def test_wrapped_environments_are_unwrapped() -> None:
    env = gymnasium.make("lbgym/LoadBalance-v0", action_type="continuous")
    policy = make_policy("cores", env)
    seen, info = env.reset(seed=0)
    assert env.action_space.contains(policy.act(seen, info))


def test_ground_truth_must_be_shown() -> None:
    env = LoadBalanceEnv()
    with pytest.raises(PolicyError, match=r"busy_workers.*use_ground_truth=True"):
        make_policy("awcmp", env)
    with pytest.raises(UnknownNameError, match="unknown policy 'nope'"):
        make_policy("nope", env)


def test_adaptive_weights_read_the_busy_workers_of_the_environment() -> None:
    env = LoadBalanceEnv(use_ground_truth=True, action_type="continuous", min_weight=1e-3, max_weight=100.0)
    policy = make_policy("awcmp", env)
    seen, info = env.reset(seed=0)
    for _ in range(8):
        seen, _, _, _, info = env.step(policy.act(seen, info))
    busy = seen[:, -1]
    assert busy.max() > 0
    expected = make_weight_policy("awcmp", env.scenario).weights(seen, info["active"])
    _, _, _, _, info = env.step(policy.act(seen, info))
    assert info["weights"] == pytest.approx(expected, rel=1e-6)
