"""Observations with the weights in force: the layout, all environments, agents, wrappers and recordings' spaces."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from lbgym import LoadBalanceEnv, LoadBalanceVectorEnv, MultiLoadBalanceEnv, MultiLoadBalanceVectorEnv
from lbgym.env.observations import LAYOUTS, ObservationLayout, relative_weights
from lbgym.env.wrappers import StripGroundTruth
from lbgym.errors import InvalidOptionError
from lbgym.policies import Agent, make_policy
from lbgym.snapshot import Snapshot


def rows_of(observation: Any, num_servers: int, layout: str) -> np.ndarray:
    """Rows [..., N, C] of an observation."""
    if layout == "dict":
        return np.asarray(observation["features"])
    if layout == "flat":
        return observation[..., num_servers:].reshape(*observation.shape[:-1], num_servers, -1)
    return np.asarray(observation)


@settings(max_examples=60, deadline=None)
@given(
    layout=st.sampled_from(LAYOUTS),
    normalize=st.booleans(),
    truth=st.booleans(),
    active=st.lists(st.booleans(), min_size=1, max_size=9).filter(any),
    seed=st.integers(0, 1000),
)
def test_a_row_ends_with_the_weight_and_is_otherwise_as_without(
    layout: str, normalize: bool, truth: bool, active: list[bool], seed: int
) -> None:
    rng, mask, n = np.random.default_rng(seed), np.array(active), len(active)
    stats = (rng.uniform(0.1, 50.0, (n, 11)) * mask[:, None]).astype(np.float32)
    known = (rng.uniform(0.1, 1.0, (n, 3)) * mask[:, None]).astype(np.float32)
    weights = rng.uniform(0.0, 10.0, n) * rng.integers(0, 2, n)
    keys: dict[str, Any] = {"normalize": normalize, "use_ground_truth": truth}
    plain, shown = ObservationLayout(n, layout, **keys), ObservationLayout(n, layout, **keys, observe_weights=True)
    assert shown.columns == (*plain.columns, "weight")
    without = plain.encode(stats, known, mask)
    observation = shown.encode(stats, known, mask, weights)
    assert shown.space.contains(observation)
    rows = rows_of(observation, n, layout)
    assert np.array_equal(rows[:, :-1], rows_of(without, n, layout))
    logs = np.log(np.maximum(weights[mask], 1e-6))
    np.testing.assert_allclose(rows[mask, -1], logs - logs.mean(), atol=1e-5)
    assert not rows[~mask].any()
    for got, wanted in zip(shown.decode(observation), plain.decode(without), strict=True):
        assert np.array_equal(got, wanted)
    # One in a batch is as one alone, whatever the memory order.
    batch = np.asfortranarray(np.stack([weights[::-1], weights]))
    assert np.array_equal(relative_weights(batch, np.stack([mask, mask]))[1], rows[:, -1])


def test_a_matrix_tells_inactive_servers_by_their_features_alone() -> None:
    layout = ObservationLayout(3, "matrix", observe_weights=True)
    stats = np.zeros((3, 11), np.float32)
    stats[0] = 1.0
    observation = layout.encode(stats, None, np.ones(3, bool), np.array([1.0, 4.0, 2.0]))
    assert observation[1, -1] > 0.0
    features, active = layout.decode(observation)
    assert active.tolist() == [True, False, False] and features.shape == (3, 11)


def test_weights_must_be_given_and_the_bounds_say_that_they_are_signed() -> None:
    layout = ObservationLayout(2, "flat", normalize=True, observe_weights=True)
    with pytest.raises(InvalidOptionError, match="no weights in force"):
        layout.encode(np.zeros((2, 11), np.float32), None, np.ones(2, bool))
    space = layout.space
    assert isinstance(space, spaces.Box)
    low, high = space.low[2:].reshape(2, 12), space.high[2:].reshape(2, 12)
    assert not low[:, :-1].any() and (high[:, :-1] == 1.0).all()
    assert (low[:, -1] == -np.inf).all() and (high[:, -1] == np.inf).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("normalize", [False, True])
def test_all_environments_show_the_same(layout: str, normalize: bool) -> None:
    keys: dict[str, Any] = {"num_servers": 4, "action_type": "continuous", "observation": layout, "max_steps": 4}
    keys |= {"normalize": normalize, "observe_weights": True, "use_ground_truth": True}
    rng = np.random.default_rng(1)
    actions = rng.uniform(0.2, 5.0, (4, 2, 2, 4)).astype(np.float32)
    every = [
        (LoadBalanceEnv(**keys), ()),
        (LoadBalanceVectorEnv(2, **keys), (2,)),
        (MultiLoadBalanceVectorEnv(2, num_balancers=2, **keys), (2, 2)),
    ]
    for env, leading in every:
        assert env.feature_columns[-1] == "weight"
        observation, info = env.reset(seed=3)  # type: ignore[attr-defined]
        for t in range(4):
            assert np.array_equal(
                rows_of(observation, 4, layout)[..., -1], relative_weights(info["weights"], info["active"])
            )
            action = actions[t][(0,) * (2 - len(leading))] if leading != (2,) else actions[t][:, 0]
            observation, _, _, _, info = env.step(action)  # type: ignore[attr-defined]
            np.testing.assert_array_equal(info["weights"], action)
        env.close()
    one, many = MultiLoadBalanceEnv(num_balancers=2, **keys), MultiLoadBalanceVectorEnv(1, num_balancers=2, **keys)
    one.reset(seed=3)
    many.reset(seed=3)
    seen, _, _, _, infos = one.step({agent: actions[0, 0, b] for b, agent in enumerate(one.possible_agents)})
    for b, agent in enumerate(one.possible_agents):
        assert one.observation_space(agent).contains(seen[agent])
        rows = rows_of(seen[agent], 4, layout)
        assert np.array_equal(rows[:, -1], relative_weights(infos[agent]["weights"], infos[agent]["active"]))
        assert np.array_equal(infos[agent]["weights"], actions[0, 0, b])
    one.close()
    many.close()


class Recorder:
    """A policy that keeps what it is shown and sets weights of its own."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def reset(self, seed: int | None = None) -> None:
        self.rng = np.random.default_rng(0)

    def act(self, observation: Any, info: dict[str, Any]) -> Any:
        self.seen.append(observation)
        return self.rng.uniform(0.2, 5.0, 4).astype(np.float32)

    def copy(self) -> Recorder:
        return Recorder()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_agent_on_snapshots_shows_its_policy_what_the_environment_shows(layout: str) -> None:
    env = LoadBalanceEnv(
        num_servers=4, action_type="continuous", observation=layout, normalize=True, observe_weights=True
    )
    recorder = Recorder()
    agent = Agent(recorder, layout=env.observation_layout, codec=env.action_codec)
    observation, info = env.reset(seed=1)
    for _ in range(5):
        snapshot = env._core.snapshot
        assert isinstance(snapshot, Snapshot)
        weights = agent(snapshot, info["weights"])
        np.testing.assert_equal(recorder.seen[-1], observation)
        observation, _, _, _, info = env.step(weights)
    env.close()


def test_heuristics_and_wrappers_work_with_the_column() -> None:
    keys: dict[str, Any] = {"num_servers": 4, "action_type": "continuous", "use_ground_truth": True}
    plain, shown = LoadBalanceEnv(**keys), LoadBalanceEnv(**keys, observe_weights=True)
    policies = [make_policy("latency", env) for env in (plain, shown)]
    (one, info), (two, _) = plain.reset(seed=2), shown.reset(seed=2)
    for _ in range(4):
        actions = [policy.act(seen, info) for policy, seen in zip(policies, (one, two), strict=True)]
        assert np.array_equal(*actions)
        one, two = plain.step(actions[0])[0], shown.step(actions[1])[0]
        assert np.array_equal(one, two[:, :-1])
    stripped = StripGroundTruth(shown)
    observation, info = stripped.reset(seed=2)
    stripped.step(np.array([1.0, 2.0, 3.0, 4.0], np.float32))
    observation = stripped.step(np.array([1.0, 2.0, 3.0, 4.0], np.float32))[0]
    assert observation.shape == (4, 12) and stripped.observation_space.contains(observation)
    assert (np.diff(observation[:, -1]) > 0).all()
