"""Agents: from snapshots to weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lbgym import LoadBalanceEnv, Snapshot
from lbgym.dataplanes import SimulatedDataPlane
from lbgym.errors import PolicyError, UnknownNameError
from lbgym.evaluation.runner import decide
from lbgym.policies import Agent, LatencyWeights, Policy, RandomWeights, StaticWeights, WeightPolicy, make_agent
from lbgym.scenarios import load_scenario


def steps(agent: Agent, scenario: str = "uniform", count: int = 8, seed: int = 0) -> NDArray[np.float64]:
    """Weights [T, N] of an agent that drives a simulated data plane."""
    plane = SimulatedDataPlane(load_scenario(scenario))
    snapshot, weights = plane.reset([seed]), np.ones((1, 1, plane.num_servers))
    history = []
    agent.reset()
    for _ in range(count):
        weights = decide([agent], snapshot, weights)
        history.append(weights[0, 0])
        snapshot = plane.step(weights)
    plane.close()
    return np.array(history)


def snapshot_of(servers: int, **fields: Any) -> Snapshot:
    zeros = np.zeros(servers, np.int64)
    values: dict[str, Any] = {
        "sequence_id": 3, "timestamp": 1.5, "active": np.ones(servers, np.bool_),
        "stats": np.zeros((servers, 11), np.float32), "ground_truth": None,
        "started": zeros, "completed": zeros, "rejected": zeros, "failed": zeros, "unrouted": 0,
    }  # fmt: skip
    rest = {name: None for name in Snapshot.__slots__ if name not in values}
    return Snapshot(**values | rest | fields)


class Recorder:
    """A policy on observations that keeps what it was given."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, dict[str, Any]]] = []
        self.seeds: list[int | None] = []

    def reset(self, seed: int | None = None) -> None:
        self.seeds.append(seed)

    def act(self, observation: Any, info: dict[str, Any]) -> Any:
        self.seen.append((observation, info))
        return np.array([0, 1, 2, 0])

    def copy(self) -> Recorder:
        return Recorder()


def test_a_policy_gets_the_observation_and_the_info_of_its_environment() -> None:
    env = LoadBalanceEnv(observation="flat", normalize=True)
    policy = Recorder()
    agent = Agent(policy, layout=env.observation_layout, codec=env.action_codec)
    assert isinstance(agent, Policy) and agent.num_servers == 4
    rng = np.random.default_rng(0)
    seen = snapshot_of(4, stats=rng.random((4, 11)).astype(np.float32), active=np.array([True, False, True, True]))
    in_force = np.array([1.0, 2.0, 3.0, 4.0])
    weights = agent(seen, in_force, {"action_delay": 0.1, "weights": "the data plane's"})
    np.testing.assert_array_equal(weights, [1.0, 1.5, 2.0, 1.0])
    observation, info = policy.seen[0]
    np.testing.assert_array_equal(observation, env.observation_layout.encode(seen.stats, None, seen.active))
    assert (info["sequence_id"], info["timestamp"], info["action_delay"]) == (3, 1.5, 0.1)
    np.testing.assert_array_equal(info["weights"], in_force)
    assert info["weights"] is not in_force
    # In an environment it acts as the policy does.
    np.testing.assert_array_equal(agent.act(observation, info), [0, 1, 2, 0])


def test_a_seed_reaches_the_policy_only_if_given() -> None:
    policy = Recorder()
    env = LoadBalanceEnv()
    agent = Agent(policy, layout=env.observation_layout, codec=env.action_codec)
    agent.reset()
    agent.reset(7)
    assert policy.seeds == [None, None, 7]
    random = Agent(RandomWeights(seed=1), 4)
    random.reset(5)
    once = random(snapshot_of(4), np.ones(4))
    random.reset()
    assert not np.array_equal(random(snapshot_of(4), np.ones(4)), once)
    random.reset(5)
    assert np.array_equal(random(snapshot_of(4), np.ones(4)), once)


@pytest.mark.parametrize("name", ["latency", "littles-law", "random", "awcmp"])
def test_copies_are_independent(name: str) -> None:
    scenario = load_scenario("uniform")
    agent = make_agent(name, scenario.num_servers, scenario=scenario, seed=3)
    twin = agent.copy()
    assert twin.policy is not agent.policy
    expected = steps(make_agent(name, scenario.num_servers, scenario=scenario, seed=3))
    np.testing.assert_array_equal(steps(agent), expected)
    # What the agent saw and drew did not change its twin.
    np.testing.assert_array_equal(steps(twin), expected)


def test_servers_beyond_those_of_the_policy_keep_their_weights() -> None:
    agent = Agent(StaticWeights([3.0, 1.0]), 4, servers=2)
    np.testing.assert_array_equal(agent(snapshot_of(4), np.array([1.0, 1.0, 5.0, 7.0])), [3.0, 1.0, 5.0, 7.0])


def test_an_agent_is_fitted_to_the_servers_of_its_data_plane() -> None:
    agent = make_agent("latency")
    with pytest.raises(PolicyError, match=r"'latency' does not know the number of servers: call fit\(\)"):
        agent(snapshot_of(3), np.ones(3))
    for servers in (3, 5):
        agent.fit(servers)
        assert agent(snapshot_of(servers), np.ones(servers)).shape == (servers,)
    env = LoadBalanceEnv()
    with pytest.raises(PolicyError, match="is for 4 servers, the data plane has 5"):
        LatencyWeights().for_env(env).fit(5)


def test_ground_truth_must_be_there() -> None:
    scenario = load_scenario("uniform")
    agent = make_agent("awcmp", scenario=scenario)
    with pytest.raises(PolicyError, match=r"'awcmp' needs the ground truth.*does not publish"):
        agent.fit(scenario.num_servers, ground_truth=False)
    agent.fit(scenario.num_servers)
    with pytest.raises(PolicyError, match="'awcmp' needs the ground truth, and this observation has none"):
        agent(snapshot_of(scenario.num_servers), np.ones(scenario.num_servers))


def test_policies_by_name() -> None:
    with pytest.raises(UnknownNameError, match="'sed' is a dispatch rule, by which a data plane uses the weights"):
        make_agent("sed")
    with pytest.raises(UnknownNameError, match="Did you mean 'latency'"):
        make_agent("latencies")
    with pytest.raises(PolicyError, match="must know the cores"):
        make_agent("cores", 4)
    with pytest.raises(PolicyError, match=r"no trained model at 'missing\.pt'"):
        make_agent("missing.pt", 4)
    agent = make_agent("uniform", 4, name="plain")
    assert (agent.name, agent.dispatch, agent.step_interval) == ("plain", None, None)


def test_a_heuristic_outside_an_environment_has_no_actions() -> None:
    with pytest.raises(PolicyError, match="no observation layout and action codec"):
        make_agent("uniform", 4).act(np.zeros((4, 11)), {})


def test_a_trained_agent_does_in_a_data_plane_what_it_does_in_its_environment(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from lbgym.training import PPOConfig, train_ppo

    config = PPOConfig(scenario="uniform", total_steps=64, num_envs=4, num_steps=16, replicas_per_seed=2)
    path = train_ppo(config, out=tmp_path).checkpoint
    assert path is not None
    agent = make_agent(str(path), name="ppo")
    assert agent.step_interval == 0.25 and agent.servers is None
    env = LoadBalanceEnv(**agent.policy.env_kwargs, scenario="uniform")  # type: ignore[union-attr]
    agent.fit(env.num_servers)
    observation, info = env.reset(seed=4)
    # The environment draws the flows' seed from its own generator.
    seed = int(np.random.Generator(np.random.PCG64(4)).integers(1 << 63))
    expected = []
    for _ in range(8):
        observation, _, _, _, info = env.step(agent.act(observation, info))
        expected.append(info["weights"])
    np.testing.assert_array_equal(steps(agent, seed=seed), expected)


class Short(WeightPolicy):
    def weights(self, features: NDArray[Any], active: NDArray[np.bool_]) -> NDArray[np.float64]:
        return np.ones(len(active) - 1)


def test_weights_of_a_wrong_shape_are_refused() -> None:
    with pytest.raises(PolicyError, match=r"'Short' must return one number for each of 4 servers, got shape \(3,\)"):
        Agent(Short(), 4)(snapshot_of(4), np.ones(4))
