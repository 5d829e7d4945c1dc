"""Copies of environments, deep or pickled, continue bit for bit; a live environment refuses in its own words."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from lbgym import (
    FlowDispatchEnv,
    FlowDispatchVectorEnv,
    LoadBalanceEnv,
    LoadBalanceVectorEnv,
    MultiLoadBalanceEnv,
    MultiLoadBalanceVectorEnv,
)
from lbgym.errors import LbgymError
from lbgym.wrappers import DelayedAction, LegacyGymWrapper, MultiDiscreteToDiscrete, SmoothWeights, StripGroundTruth
from tests.dataplanes.puppet import puppet
from tests.sharedmemory.conftest import shm_dir as shm_dir
from tests.test_vector_env import equal

Make = Callable[[], Any]

pytestmark = pytest.mark.contract


def pickled(env: Any) -> Any:
    return pickle.loads(pickle.dumps(env))


WAYS = pytest.mark.parametrize("way", [copy.deepcopy, pickled])

EVERY_REWARD = {"jain": 1.0, "var_exp:n_flow_on": 0.5, "max:cpu_usage": 0.1, "p99_fct": 0.1, "rejected": 1.0}


def balance(**keys: Any) -> LoadBalanceEnv:
    return LoadBalanceEnv(**({"max_steps": 7} | keys))


def open_flows(snapshot: Any) -> Any:
    return -snapshot.stats[..., 0].sum(axis=-1, dtype=np.float64)


ENVIRONMENTS: dict[str, Make] = {
    "single": balance,
    "all rewards": lambda: balance(reward_type=EVERY_REWARD, use_ground_truth=True, observation="dict"),
    "a function": lambda: balance(reward_type=open_flows, action_type="joint"),
    "drawn": lambda: balance(scenario="random-clusters", action_type="normalized", observation="flat", normalize=True),
    "several balancers": lambda: balance(scenario="marllb-moderate", action_type="continuous"),
    "made": lambda: gymnasium.make("lbgym:lbgym/LoadBalance-v0", max_steps=7),
    "wrapped": lambda: gymnasium.wrappers.FrameStackObservation(
        gymnasium.make("lbgym:lbgym/LoadBalance-v0", max_steps=7, max_episode_steps=5), 3
    ),
    "discrete": lambda: MultiDiscreteToDiscrete(balance()),
    "smooth": lambda: SmoothWeights(balance(action_type="continuous"), 0.3),
    "delayed": lambda: DelayedAction(balance(), (0, 3)),
    "stripped": lambda: StripGroundTruth(balance(use_ground_truth=True)),
    "picture": lambda: balance(render_mode="ansi"),
    "flow": lambda: FlowDispatchEnv(max_steps=9),
    "vector": lambda: LoadBalanceVectorEnv(5, max_steps=4),
    "same step, threads": lambda: LoadBalanceVectorEnv(5, autoreset_mode="SameStep", max_steps=4, num_threads=2),
    "drawn vector": lambda: LoadBalanceVectorEnv(3, scenario="random-marllb", max_steps=4),
    "made vector": lambda: gymnasium.make_vec(
        "lbgym:lbgym/LoadBalance-v0", num_envs=3, vectorization_mode="vector_entry_point", max_steps=4
    ),
    "sync vector": lambda: gymnasium.vector.SyncVectorEnv([balance, balance]),
    "flow vector": lambda: FlowDispatchVectorEnv(3, max_steps=6),
    "balancers vector": lambda: MultiLoadBalanceVectorEnv(
        3, max_steps=4, action_offsets="random", action_delay={"low": 0.0, "high": 0.6}, reward_sharing="difference"
    ),
}


def episode(env: Any, actions: list[Any], reset: bool = False, **keys: Any) -> list[Any]:
    out: list[Any] = [env.reset(**keys)] if reset else []
    over = False
    for action in actions:
        if over:
            out.append(env.reset())
        out.append(env.step(action))
        over = isinstance(out[-1][3], bool) and (out[-1][2] or out[-1][3])
    return out


@WAYS
@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_copies_continue_bit_for_bit(name: str, way: Callable[[Any], Any]) -> None:
    env = ENVIRONMENTS[name]()
    env.action_space.seed(1)
    actions = [env.action_space.sample() for _ in range(24)]
    fresh = way(env)
    begun = episode(env, actions[:3], reset=True, seed=5)
    equal(episode(fresh, actions[:3], reset=True, seed=5), begun)
    within = way(env)
    assert within is not env
    # The copy goes on after the original, so that whatever they shared would show.
    rest = episode(env, actions[3:])
    copied = episode(within, actions[3:])
    equal(copied, rest)
    if env.render_mode == "ansi":
        assert within.render() == env.render()
    # Spaces are drawn from alike, too.
    np.testing.assert_array_equal(way(env).action_space.sample(), env.action_space.sample())
    for each in (env, fresh, within):
        each.close()


@WAYS
def test_copies_of_parallel_environments(way: Callable[[Any], Any]) -> None:
    pytest.importorskip("pettingzoo")
    env = MultiLoadBalanceEnv(num_balancers=3, max_steps=6, action_delay={"low": 0.0, "high": 0.4})
    rng = np.random.default_rng(0)
    fresh = way(env)
    equal(fresh.reset(seed=2), env.reset(seed=2))
    twin = None
    for k in range(14):
        if not env.agents:
            equal(twin.reset(), env.reset())  # type: ignore[union-attr]
        actions = {agent: rng.integers(0, 3, 4) for agent in env.agents}
        expected = env.step(actions)
        if twin is not None:
            equal(twin.step(actions), expected)
            np.testing.assert_array_equal(twin.state(), env.state())
        if k == 2:
            twin = way(env)
            assert twin.agents == env.agents and twin.state_names == env.state_names


@WAYS
def test_copies_of_the_old_interface(way: Callable[[Any], Any]) -> None:
    env = LegacyGymWrapper(balance())
    env.seed(3)
    twin = way(env)
    equal(twin.reset(), env.reset())
    equal(list(twin.step([0, 1, 2, 0])), list(env.step([0, 1, 2, 0])))


@WAYS
@pytest.mark.parametrize("several", [False, True])
def test_live_environments_refuse(several: bool, way: Callable[[Any], Any], shm_dir: Path) -> None:
    if several:
        pytest.importorskip("pettingzoo")
    with puppet("lb0"):
        env: Any = MultiLoadBalanceEnv(shm_names=["lb0"]) if several else LoadBalanceEnv("lb0")
        with pytest.raises(TypeError, match=r"live data plane of region 'lb0' cannot be copied or pickled") as caught:
            way(env)
        assert isinstance(caught.value, LbgymError)
        # The refusal leaves the environment as it was.
        env.reset()
        env.close()
