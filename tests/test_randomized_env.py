"""Environments whose episodes each draw their own scenario."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

from lbgym import LoadBalanceEnv, LoadBalanceVectorEnv
from lbgym.errors import InvalidOptionError, PolicyError, ScenarioError
from lbgym.evaluation import compare as compare_policies
from lbgym.evaluation import save
from lbgym.evaluation.runner import scenario_of_seed
from lbgym.policies import make_policy
from lbgym.scenarios import (
    DISPATCH_RULES,
    Choice,
    Event,
    LogUniform,
    RandomEvents,
    SamplingDistribution,
    Scenario,
    ScenarioDistribution,
    Server,
    ServerDistribution,
    Uniform,
    Variant,
    Workload,
    named_scenario,
)

from .test_vector_env import LAYOUTS, MODES, compare, equal

pytestmark = pytest.mark.contract


def distribution(**changes: Any) -> ScenarioDistribution:
    """All that may vary, of 2 to 5 servers; a few seconds are an episode."""
    parts: dict[str, Any] = {
        "base": Scenario(name="varied", servers=(Server(), Server(cores=2)), workload=Workload(load=0.8)),
        "num_servers": Uniform(2, 5),
        "server": ServerDistribution(cores=Choice((1, 2, 4)), speed=LogUniform(0.5, 2.0), workers=Choice((4, 8))),
        "load": Uniform(0.6, 1.1),
        "arrivals": (
            Variant(kind="poisson"),
            Variant(kind="on_off", parameters={"off_level": 0.4}),
            Variant(kind="sinusoidal"),
        ),
        "demand": (
            Variant(kind="exponential", parameters={"mean": LogUniform(0.02, 0.1)}),
            Variant(kind="hyperexponential"),
            Variant(kind="empirical", parameters={"values": Choice(((0.01, 0.1), (0.02, 0.05, 0.2)))}),
        ),
        "dispatch": Choice(("sed", "lsq", "p2c", "maglev", "wcmp")),
        "events": (
            RandomEvents(kind="down", every=5.0, duration=Uniform(0.5, 1.0)),
            RandomEvents(kind="speed", every=3.0, duration=1.0, value=Uniform(0.2, 0.6)),
        ),
        "sampling": SamplingDistribution(probability=Uniform(0.2, 1.0)),
    }
    return ScenarioDistribution(**(parts | changes))


def keys_of(**changes: Any) -> dict[str, Any]:
    return {"scenario": distribution(), "max_steps": 6} | changes


# Single and vector


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("observation", LAYOUTS)
def test_replicas_equal_single_environments(mode: AutoresetMode, observation: str) -> None:
    assert compare(keys_of(observation=observation, use_ground_truth=True), mode, steps=24) >= 8


def test_replicas_equal_single_environments_on_two_threads_and_with_room() -> None:
    keys = keys_of(num_servers=7, max_steps=9, reward_type="open_flows", action_type="continuous")
    assert compare(keys, AutoresetMode.NEXT_STEP, steps=40, num_envs=5, num_threads=2) >= 15


def test_a_seed_is_a_scenario_and_the_next_episode_another() -> None:
    env, other = LoadBalanceEnv(**keys_of()), LoadBalanceEnv(**keys_of())
    drawn = []
    for seed in (5, None, None, 5):
        observation, info = env.reset(seed=seed)
        same, told = other.reset(seed=seed)
        equal(observation, same)
        equal(info, told)
        drawn.append(env._core.plane.scenario_of(0))
    assert drawn[0] == drawn[3] and len({scenario.load for scenario in drawn[:3]}) == 3
    vector = LoadBalanceVectorEnv(20, **keys_of())
    _, info = vector.reset(seed=[5] * 10 + list(range(10)))
    assert len(np.unique(info["load"])) == 10


def test_only_replicas_that_begin_an_episode_get_another_scenario() -> None:
    env = LoadBalanceVectorEnv(4, autoreset_mode=AutoresetMode.DISABLED, **keys_of(max_steps=50))
    env.reset(seed=0)
    before = [env._core.plane.scenario_of(i) for i in range(4)]
    env.step(env.action_space.sample())
    _, info = env.reset(options={"reset_mask": np.array([False, True, False, False])})
    after = [env._core.plane.scenario_of(i) for i in range(4)]
    assert [a is b for a, b in zip(before, after, strict=True)] == [True, False, True, True]
    assert info["_load"].tolist() == [False, True, False, False] and info["load"][1] == after[1].load
    assert "load" not in env.step(env.action_space.sample())[4]


# Servers that an episode does not have


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rule", DISPATCH_RULES)
def test_absent_servers_are_inactive_and_get_no_flow(rule: str, seed: int) -> None:
    d = distribution(num_servers=Choice((2, 3)), events=())
    env = LoadBalanceEnv(
        scenario=d, num_servers=6, dispatch=rule, action_type="continuous", use_ground_truth=True, observation="dict"
    )
    observation, info = env.reset(seed=seed)
    scenario = env._core.plane.scenario_of(0)
    assert scenario is not None
    n = scenario.num_servers
    assert n in (2, 3)
    np.testing.assert_array_equal(info["server_cores"], [s.cores for s in scenario.servers] + [0] * (6 - n))
    np.testing.assert_array_equal(info["server_speeds"], [s.speed for s in scenario.servers] + [0.0] * (6 - n))
    assert (info["load"], info["rate"]) == (scenario.load, scenario.rate)
    exact = LoadBalanceEnv(scenario=scenario, dispatch=rule, action_type="continuous", use_ground_truth=True)
    same, _ = exact.reset(seed=seed)
    for _ in range(40):
        np.testing.assert_array_equal(observation["mask"], np.arange(6) < n)
        assert not observation["features"][n:].any()
        np.testing.assert_array_equal(observation["features"][:n], same)
        action = env.action_space.sample()
        # All the weight is on servers that do not exist.
        action[n:] = 10.0
        observation, reward, *_, info = env.step(action)
        same, expected, *_, told = exact.step(action[:n])
        assert reward == expected
        assert info["completed"] == told["completed"] and info["rejected"] == told["rejected"]
        assert not info["active"][n:].any() and info["active_servers"] == list(range(n))
    snapshot = env._core.snapshot
    assert snapshot is not None and snapshot.started[:n].all() and not snapshot.started[n:].any()


@pytest.mark.parametrize("mode", ["ansi", "rgb_array"])
def test_pictures_show_the_servers_that_exist(mode: str) -> None:
    if mode == "rgb_array":
        pytest.importorskip("PIL")
    env = LoadBalanceEnv(scenario=distribution(num_servers=Choice((2, 5))), render_mode=mode)
    shown = set()
    for seed in range(8):
        env.reset(seed=seed)
        env.step(env.action_space.sample())
        picture = env.render()
        assert len(env._core._viewers[mode, 0]._history[-1].active) == env._core.plane.scenario_of(0).num_servers
        shown.add(len(picture.splitlines()) if mode == "ansi" else picture.shape)
    assert len(shown) == (2 if mode == "ansi" else 1)


# The contract


@pytest.mark.parametrize("observation", LAYOUTS)
@pytest.mark.parametrize("name", ["random-clusters", "random-heterogeneous", "random-marllb"])
def test_gymnasium_check_env(name: str, observation: str, capsys: pytest.CaptureFixture[str]) -> None:
    env = gymnasium.make(
        "lbgym:lbgym/LoadBalance-v0", scenario=name, observation=observation, normalize=True, action_type="normalized"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env.unwrapped)
    assert env.unwrapped.scenario is None and env.unwrapped.distribution.name == name


def test_a_file_will_do(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('base = "uniform"\n[randomize]\nnum_servers = { kind = "uniform", low = 2, high = 6 }\n')
    env = LoadBalanceEnv(scenario=file)
    assert env.num_servers == 6 and env.reset(seed=1)[0].shape == (6, 11)


def test_options_of_reset() -> None:
    env = LoadBalanceEnv(**keys_of())
    _, info = env.reset(seed=1, options={"load": 0.25})
    assert info["load"] == pytest.approx(0.25)
    _, info = env.reset(options={"rate": 7.0})
    assert info["rate"] == 7.0
    events = [Event(time=0.01, kind="down", server=0)]
    _, info = env.reset(options={"events": events})
    assert env._core.plane.scenario_of(0).events == tuple(events)
    assert not env.step(env.action_space.sample())[4]["active"][0]
    # A scenario of fewer servers, another distribution; in the next episode the own one again.
    _, info = env.reset(options={"scenario": "uniform"})
    assert info["server_cores"].tolist() == [4, 4, 4, 4, 0]
    _, info = env.reset(options={"scenario": distribution(num_servers=5, load=0.5)})
    assert info["load"] == pytest.approx(0.5) and info["server_cores"].all()
    env.reset()
    assert env._core.plane.scenario_of(0).name == "varied"


@pytest.mark.parametrize("vector", [False, True])
def test_what_does_not_fit_is_refused_and_changes_nothing(vector: bool) -> None:
    def make() -> Any:
        return LoadBalanceVectorEnv(3, **keys_of()) if vector else LoadBalanceEnv(**keys_of())

    env, twin = make(), make()
    env.reset(seed=3)
    twin.reset(seed=3)
    for options in (
        {"scenario": "heterogeneous"},
        {"scenario": "random-clusters"},
        {"scenario": distribution(base=replace(distribution().base, balancers=2))},
    ):
        with pytest.raises(ScenarioError, match=r"servers|balancers"):
            env.reset(options=options)
    for _ in range(2):
        action = env.action_space.sample()
        equal(env.step(action)[:4], twin.step(action)[:4])
        equal(env.reset()[0], twin.reset()[0])


def test_bad_keys() -> None:
    with pytest.raises(InvalidOptionError, match="num_servers=4, but distribution 'varied' draws up to 5"):
        LoadBalanceEnv(**keys_of(num_servers=4))
    with pytest.raises(InvalidOptionError, match="live data plane is not drawn"):
        LoadBalanceEnv("lb0", **keys_of())


def test_several_balancers_are_told_the_same_facts() -> None:
    pytest.importorskip("lbgym.env.multi_agent_vector")
    from lbgym.env.multi_agent_vector import MultiLoadBalanceVectorEnv

    env = MultiLoadBalanceVectorEnv(3, num_balancers=2, autoreset_mode=AutoresetMode.NEXT_STEP, **keys_of(max_steps=3))
    observation, info = env.reset(seed=4)
    assert observation.shape == (3, 2, 5, 11) and info["load"].shape == (3, 2)
    for _ in range(3):
        env.step(env.action_space.sample())
    observation, *_, info = env.step(env.action_space.sample())
    scenarios = [env._core.plane.scenario_of(i) for i in range(3)]
    np.testing.assert_array_equal(info["load"][:, 1], [s.load for s in scenarios])
    assert all(s.balancers == 2 for s in scenarios)


# Evaluation and training


def test_every_contender_of_a_seed_meets_the_same_scenario_and_flows(tmp_path: Path) -> None:
    d = distribution(base=replace(distribution().base, duration=6.0), dispatch=None, load=Uniform(0.5, 0.7))
    done = compare_policies(d, "lsq,sed,sed+cores,sed+latency,oracle_sed", 4, processes=1, keep_flows=True)
    scenarios = [scenario_of_seed(d, seed, done.settings) for seed in done.seeds]
    assert len({s.load for s in scenarios}) == 4
    for i, seed in enumerate(done.seeds):
        runs = [done.runs_of(label)[i] for label in done.labels]
        n = scenarios[i].num_servers
        for run in runs:
            assert run.seed == seed and run.flows is not None and runs[0].flows is not None
            np.testing.assert_array_equal(run.flows["demand"], runs[0].flows["demand"])
            np.testing.assert_array_equal(run.flows["arrival"], runs[0].flows["arrival"])
            assert run.flows["server"].max() < n
            np.testing.assert_array_equal(np.isnan(run.utilization), np.arange(5) >= n)
        # The same as a comparison on that scenario alone.
        alone = compare_policies(scenarios[i], "sed", [seed], processes=1)
        assert alone.values("sed", "fct_mean")[0] == done.values("sed", "fct_mean")[i]
    data = done.to_dict()
    assert data["scenario"]["load"] is None and [x["seed"] for x in data["scenario"]["draws"]] == [0, 1, 2, 3]
    files = {file.name for file in save(done, tmp_path, plots=False)}
    assert "summary.json" in files


@pytest.mark.parametrize("recipe", ["ppo", "sb3"])
def test_a_short_training_on_a_distribution(recipe: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    d = distribution(base=replace(distribution().base, duration=4.0), load=Uniform(0.5, 0.7))
    keys: dict[str, Any] = {"scenario": d, "num_envs": 8, "num_steps": 8, "max_steps": 10, "total_steps": 512}
    if recipe == "ppo":
        from lbgym.training.ppo import PPOConfig, train_ppo

        result = train_ppo(PPOConfig(**keys), out=tmp_path)
        before = train_ppo(PPOConfig(**(keys | {"total_steps": 64})), out=None).policy.parameters
        after = result.policy.parameters
        assert any(not np.array_equal(before[k], after[k]) for k in after if "weight" in k)
    else:
        pytest.importorskip("stable_baselines3")
        from lbgym.training.sb3 import SB3Config, train_sb3

        result = train_sb3(SB3Config(**keys), out=tmp_path)
    assert result.checkpoint is not None and len(result.history) >= 8
    done = compare_policies(d, ["sed", f"agent={result.checkpoint}"], 2, processes=1)
    assert np.isfinite(done.values("agent", "fct_mean")).all()


def test_heuristics_that_know_the_cores_need_a_cluster() -> None:
    env = LoadBalanceEnv(**keys_of(action_type="continuous"))
    observation, info = env.reset(seed=1)
    env.step(make_policy("latency", env).act(observation, info))
    with pytest.raises(PolicyError, match="must know the cores of the servers"):
        make_policy("cores", env)


def test_named_scenarios_are_as_before() -> None:
    env = LoadBalanceEnv(scenario="uniform")
    assert env.scenario == named_scenario("uniform") and env.distribution is None
    assert "load" not in env.reset(seed=1)[1]
