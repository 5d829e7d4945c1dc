"""Every balancer an agent: PettingZoo's checks, equality with the single environment, rewards, timing, live regions."""

from __future__ import annotations

import itertools
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lbgym
from lbgym import LoadBalanceEnv, MultiLoadBalanceEnv, MultiLoadBalanceVectorEnv
from lbgym.env.rewards import fairness
from lbgym.errors import (
    DataPlaneTimeout,
    InvalidActionError,
    InvalidOptionError,
    InvalidRewardError,
    RegionNotFoundError,
    ResetNeeded,
    UnknownNameError,
)
from lbgym.features import FEATURE_NAMES, GROUND_TRUTH_NAMES
from lbgym.scenarios import Event, Exponential, Scenario, ScenarioDistribution, Server, Uniform, Workload
from lbgym.sharedmemory import SharedMemoryRegion
from tests.dataplanes.puppet import puppet
from tests.drivers.emulated import emulator
from tests.sharedmemory.conftest import shm_dir as shm_dir
from tests.test_vector_env import equal, equal_infos

pettingzoo = pytest.importorskip("pettingzoo")

LAYOUTS = ["matrix", "flat", "dict"]
ACTIONS = ["discrete", "joint", "continuous", "normalized"]
MODES = ["NextStep", "SameStep", "Disabled"]
SHARINGS = ["mean", "field", "own", "difference"]
DURATION = FEATURE_NAMES.index("duration_mean_decay")


def small(balancers: int = 3, **changes: Any) -> Scenario:
    servers = (Server(cores=1), Server(cores=2), Server(cores=4, workers=4, backlog=4))
    workload = Workload(load=0.9, demand=Exponential(mean=0.02))
    return Scenario(name="small", servers=servers, workload=workload, balancers=balancers).with_changes(**changes)


def drawn(balancers: int = 3) -> ScenarioDistribution:
    return ScenarioDistribution(base=small(balancers), num_servers=Uniform(1, 5), load=Uniform(0.5, 0.9))


def make(**keys: Any) -> MultiLoadBalanceEnv:
    return MultiLoadBalanceEnv(**({"scenario": small(), "max_steps": 20} | keys))


def make_vector(num_envs: int, **keys: Any) -> MultiLoadBalanceVectorEnv:
    return MultiLoadBalanceVectorEnv(num_envs, **({"scenario": small(), "max_steps": 6} | keys))


def actions_of(env: MultiLoadBalanceEnv) -> dict[str, Any]:
    return {agent: env.action_space(agent).sample() for agent in env.agents}


def seed_actions(env: MultiLoadBalanceEnv, seed: int) -> None:
    for b, agent in enumerate(env.possible_agents):
        env.action_space(agent).seed(seed + b)


# PettingZoo's checks

#: What they say of the published spaces: warnings by form.
ZEROS = "Observation numpy array is all zeros."
KNOWN = {
    "matrix": {ZEROS},
    "flat": set(),
    "dict": {"Observation is not a NumPy array", "Observation space for each agent probably should be"},
    "discrete": {"Action space for each agent probably should be"},
    "raw": {"maximum observation space value is infinity"},
}


def warnings_of(check: Callable[[], Any]) -> set[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check()
    return {str(w.message) for w in caught}


@pytest.mark.contract
@pytest.mark.parametrize(("observation", "action_type"), list(itertools.product(LAYOUTS, ACTIONS)))
def test_pettingzoo_checks(observation: str, action_type: str, capsys: pytest.CaptureFixture[str]) -> None:
    from pettingzoo.test import api_test, parallel_api_test, parallel_seed_test, seed_test
    from pettingzoo.utils import parallel_to_aec

    def build(normalize: bool = False) -> MultiLoadBalanceEnv:
        return make(observation=observation, action_type=action_type, normalize=normalize, max_steps=15)

    assert warnings_of(lambda: parallel_api_test(build(), num_cycles=40)) == set()
    assert warnings_of(lambda: parallel_seed_test(build)) == set()
    assert warnings_of(lambda: seed_test(lambda: parallel_to_aec(build()), num_cycles=40)) == set()
    for normalize in (False, True):
        said = warnings_of(lambda n=normalize: api_test(parallel_to_aec(build(n)), num_cycles=40))  # type: ignore[misc]
        known = KNOWN[observation] | KNOWN.get(action_type, set()) | (set() if normalize else KNOWN["raw"])
        assert [message for message in said if not any(part in message for part in known)] == []
    assert "Passed" in capsys.readouterr().out


@pytest.mark.contract
def test_pettingzoo_checks_of_asynchronous_balancers_and_state(capsys: pytest.CaptureFixture[str]) -> None:
    from pettingzoo.test import parallel_api_test, parallel_seed_test, state_test
    from pettingzoo.utils import parallel_to_aec

    def build() -> MultiLoadBalanceEnv:
        return make(
            action_offsets="random", action_delay={"low": 0.0, "high": 0.6}, normalize=True, reward_sharing="difference"
        )

    assert warnings_of(lambda: parallel_api_test(build(), num_cycles=40)) == set()
    assert warnings_of(lambda: parallel_seed_test(build)) == set()
    parallel = build()
    parallel.reset(seed=0)
    state_test(parallel_to_aec(build()), parallel)
    assert "Passed" in capsys.readouterr().out


@pytest.mark.contract
def test_render_modes(capsys: pytest.CaptureFixture[str]) -> None:
    from pettingzoo.test import render_test
    from pettingzoo.utils import parallel_to_aec

    render_test(lambda render_mode: parallel_to_aec(make(render_mode=render_mode)))
    assert "small" in capsys.readouterr().out
    assert make().render_mode is None


def test_picture_shows_everybodys_open_flows() -> None:
    env = make(render_mode="ansi", action_type="continuous", scenario=small(load=1.5))
    env.reset(seed=3)
    for _ in range(4):
        observation, *_ = env.step({a: np.full(3, 0.5 + b) for b, a in enumerate(env.agents)})
    total = sum(rows[:, 0] for rows in observation.values())
    rows = [line.split() for line in env.render().splitlines() if line[:6].strip().isdigit()]
    numbers = [[part for part in row if part.replace(".", "").isdigit()] for row in rows]
    assert [float(row[2]) for row in numbers] == total.tolist()
    assert {float(row[1]) for row in numbers} == {1.5}


@pytest.mark.contract
def test_registry() -> None:
    if not hasattr(pettingzoo, "make"):
        pytest.skip("this PettingZoo has no registry")
    env = pettingzoo.make("parallel", "lbgym/MultiLoadBalance-v0", num_balancers=3, max_cycles=2)
    assert isinstance(env, MultiLoadBalanceEnv) and env.max_num_agents == 3 and env.max_steps == 2


def test_without_pettingzoo(tmp_path: Path) -> None:
    """The array form works, the parallel form says what to install, and either can be imported."""
    script = """
import sys
sys.modules["pettingzoo"] = None
import lbgym
lbgym.MultiLoadBalanceVectorEnv(2).reset(seed=0)
try:
    lbgym.MultiLoadBalanceEnv()
except lbgym.errors.MissingExtraError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "MultiLoadBalanceEnv needs 'pettingzoo', which is not installed: pip install 'lbgym[marl]'\n"


# Episodes


def test_agents_and_the_end_of_an_episode() -> None:
    env = make(max_steps=3, num_balancers=4)
    assert env.possible_agents == ["lb_0", "lb_1", "lb_2", "lb_3"] and env.agents == []
    with pytest.raises(ResetNeeded):
        env.step({})
    observation, info = env.reset(seed=0)
    assert env.agents == env.possible_agents and env.num_agents == 4
    for k in range(3):
        agents = env.agents
        observation, reward, terminated, truncated, info = env.step(actions_of(env))
        for told in (observation, reward, terminated, truncated, info):
            assert list(told) == agents
        assert all(type(x) is float for x in reward.values())
        assert not any(terminated.values()) and set(truncated.values()) == {k == 2}
    assert env.agents == []
    for _ in range(2):
        assert env.step({}) == ({}, {}, {}, {}, {})
    with pytest.raises(ResetNeeded, match="reset"):
        env.step(dict.fromkeys(agents, (0, 0, 0)))
    assert env.state() in env.state_space
    env.reset()
    assert env.agents == env.possible_agents


def test_number_of_balancers() -> None:
    assert MultiLoadBalanceEnv().max_num_agents == 2
    assert MultiLoadBalanceEnv(scenario="marllb-large").max_num_agents == 6
    assert MultiLoadBalanceEnv(scenario="marllb-large", num_balancers=2).max_num_agents == 2
    assert MultiLoadBalanceEnv(num_servers=6, num_balancers=5).num_servers == 6
    env = make(num_balancers=2)
    observation, _ = env.reset(seed=0, options={"scenario": small(5, load=0.3)})
    assert list(observation) == ["lb_0", "lb_1"]
    assert env.scenario is not None and env.scenario.load == pytest.approx(0.9)


def test_spaces_belong_to_their_agents() -> None:
    env = make()
    for agent in env.possible_agents:
        assert env.action_space(agent) is env.action_space(agent)
        assert env.observation_space(agent) is env.observation_space(agent)
    assert env.action_space("lb_0") is not env.action_space("lb_1")
    with pytest.raises(UnknownNameError, match="lb_9"):
        env.action_space("lb_9")


def test_what_is_handed_out_is_fresh() -> None:
    env = make(observation="dict")
    first, info = env.reset(seed=0)
    kept = {agent: part["features"].copy() for agent, part in first.items()}
    for part in first.values():
        part["features"] += 7.0
        part["mask"][:] = 0
    info["lb_0"]["weights"][:] = 9.0
    assert info["lb_1"]["weights"].max() == 1.0
    state = env.state()
    state += 1.0
    second, _ = env.reset(seed=0)
    for agent in kept:
        np.testing.assert_array_equal(second[agent]["features"], kept[agent])
    env.step(actions_of(env))
    assert env.state() in env.state_space


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lb_1": None}, "lb_0, lb_1, lb_2, one each, got lb_0, lb_2"),
        ({"lb_1": [0, 1]}, r"lb_1.*\(3,\)"),
        ({"lb_2": [0, 1, 3]}, r"lb_2.*from 0 to 2, got 3"),
        ({"lb_2": [0.5, 1, 1]}, "lb_2.*whole numbers"),
        ({"lb_7": [0, 0, 0]}, "lb_7"),
    ],
    ids=["missing", "shape", "range", "type", "unknown"],
)
def test_bad_actions_change_nothing(changes: dict[str, Any], said: str) -> None:
    env, other = make(), make()
    env.reset(seed=1)
    other.reset(seed=1)
    good: dict[str, Any] = {agent: [0, 1, 2] for agent in env.agents}
    bad = {agent: action for agent, action in (good | changes).items() if action is not None}
    with pytest.raises(InvalidActionError, match=said):
        env.step(bad)
    equal(env.step(good), other.step(good))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"num_balancers": 0}, "num_balancers"),
        ({"reward_sharing": "fiel"}, "Did you mean 'field'"),
        ({"reward_sharing": "difference", "num_balancers": 1}, "at least 2 balancers"),
        ({"reward_sharing": "difference", "reward_type": "p99_fct"}, "p99_fct.*difference"),
        ({"reward_sharing": "difference", "reward_type": {"jain": 1.0, "open_flows": 0.1}}, "open_flows"),
        ({"reward_sharing": "difference", "reward_field": "cpu_usage"}, "cpu_usage"),
        ({"action_offsets": 0.25}, "below the step_interval of 0.25 s"),
        ({"action_offsets": [0.0, 0.1]}, "3 of them"),
        ({"action_offsets": "evn"}, "even"),
        ({"action_offsets": [0.0, -0.1, 0.0]}, "at least 0"),
        ({"action_delay": float("nan")}, "finite"),
        ({"action_delay": "late"}, "action_delay"),
        ({"action_delay": {"low": 0.1}}, "low.*high"),
        ({"action_delay": {"low": 0.2, "high": 0.1}}, "at most high"),
        ({"max_cycles": 10**400}, "max_cycles must be a whole number from 1 to"),
        ({"max_cycles": 5, "max_episode_steps": "x"}, "max_episode_steps must be a whole number"),
        ({"max_cycles": 5, "max_episode_steps": 0}, "max_episode_steps must be a whole number"),
        ({"shm_name": "x"}, "shm_names"),
        ({"shm_names": "x"}, "list"),
        ({"shm_names": []}, "list"),
        pytest.param({"shm_names": iter([])}, "list", id="iterator of none"),
        pytest.param({"shm_names": iter(["x", "y"]), "num_balancers": 3}, "2 regions", id="iterator of two"),
        ({"shm_names": ["x", "x"]}, "once"),
        ({"shm_names": ["x", "y"], "num_balancers": 3}, "2 regions"),
        ({"shm_names": ["x", "y"], "action_delay": 0.1}, "action_delay"),
        ({"observation": "matrx"}, "matrix"),
    ],
    ids=str,
)
def test_bad_keys(keys: dict[str, Any], said: str) -> None:
    with pytest.raises((InvalidOptionError, UnknownNameError, InvalidRewardError), match=said):
        make(**keys)


def test_bad_reset_leaves_the_episode_as_it_was() -> None:
    env, other = make(), make()
    for each in (env, other):
        each.reset(seed=5)
    for options in ({"laod": 0.5}, {"load": 0.5, "rate": 3.0}, {"scenario": "uniform"}):
        with pytest.raises(lbgym.errors.LbgymError):
            env.reset(options=options)
    with pytest.raises(InvalidOptionError, match="seed"):
        env.reset(seed=-1)
    good = {agent: [0, 1, 2] for agent in env.agents}
    equal(env.step(good), other.step(good))
    equal(env.reset(), other.reset())


# Against the single environment


@pytest.mark.parametrize("action_type", ACTIONS)
@pytest.mark.parametrize("sharing", ["mean", "field", "own"])
def test_one_balancer_is_the_single_environment(action_type: str, sharing: str) -> None:
    keys: dict[str, Any] = {"action_type": action_type, "observation": "dict", "use_ground_truth": True}
    keys |= {"scenario": small(1), "max_steps": 8, "reward_type": {"jain": 1.0, "p99_fct": 0.5, "gini:fct_mean": 0.1}}
    single, multi = LoadBalanceEnv(**keys), MultiLoadBalanceEnv(reward_sharing=sharing, **keys)
    single.action_space.seed(0)
    for seed in (11, None):
        equal([{"lb_0": part} for part in single.reset(seed=seed)], list(multi.reset(seed=seed)))
        for _ in range(8):
            action = single.action_space.sample()
            equal([{"lb_0": part} for part in single.step(action)], list(multi.step({"lb_0": action})))
    options = {"load": 0.4, "events": [Event(time=0.3, kind="drain", server=1)]}
    equal([{"lb_0": part} for part in single.reset(options=options)], list(multi.reset(options=options)))
    for _ in range(4):
        action = single.action_space.sample()
        equal([{"lb_0": part} for part in single.step(action)], list(multi.step({"lb_0": action})))


@pytest.mark.parametrize(
    "changes",
    [
        {"reward_type": "var", "reward_field": "busy_workers", "dispatch": "wcmp"},
        {"reward_type": lambda snapshot: -snapshot.stats[..., 0].sum(axis=-1, dtype=np.float64)},
        {"normalize": True, "step_interval": 1.0, "dispatch": "maglev", "observation": "flat"},
        {"scenario": drawn(1), "observation": "dict", "num_servers": 6},
    ],
    ids=["ground truth", "callable", "normalized", "distribution"],
)
def test_one_balancer_is_the_single_environment_also_with(changes: dict[str, Any]) -> None:
    keys = {"scenario": small(1), "max_steps": 8} | changes
    single, multi = LoadBalanceEnv(**keys), MultiLoadBalanceEnv(**keys)
    equal([{"lb_0": part} for part in single.reset(seed=2)], list(multi.reset(seed=2)))
    for _ in range(8):
        action = single.action_space.sample()
        equal([{"lb_0": part} for part in single.step(action)], list(multi.step({"lb_0": action})))


def test_equal_weights_for_all_are_what_the_single_environment_does() -> None:
    """It shows balancer 0 and gives its weights to every balancer."""
    single, multi = LoadBalanceEnv(scenario=small(3)), make(reward_sharing="own")
    single.reset(seed=4)
    multi.reset(seed=4)
    for _ in range(10):
        action = single.action_space.sample()
        one = single.step(action)
        many = multi.step(dict.fromkeys(multi.agents, action))
        equal(one[0], many[0]["lb_0"])
        assert one[1] == many[1]["lb_0"]


def test_each_sees_its_own_flows_only() -> None:
    vector = make_vector(2, num_balancers=4, scenario=small(load=1.3), max_steps=50)
    vector.action_space.seed(0)
    vector.reset(seed=6)
    differ = 0
    for _ in range(30):
        observation, *_ = vector.step(vector.action_space.sample())
        for replica in range(2):
            flows = vector._core.plane.simulation.open_flows(replica)
            for b in range(4):
                mine = flows["server"][flows["balancer"] == b]
                np.testing.assert_array_equal(observation[replica, b, :, 0], np.bincount(mine, minlength=3))
        differ += int((observation[:, 0] != observation[:, 1]).any())
    assert differ > 20


def test_own_weights_move_own_flows() -> None:
    env = make(dispatch="wcmp", action_type="continuous", min_weight=1e-6, num_balancers=2)
    env.reset(seed=0)
    for _ in range(8):
        observation, *_ = env.step({"lb_0": [1.0, 0.0, 0.0], "lb_1": [0.0, 0.0, 1.0]})
    assert observation["lb_0"][0, 0] > 0 and not observation["lb_0"][1:, 0].any()
    assert not observation["lb_1"][:2, 0].any() and observation["lb_1"][2, 0] > 0


# The vector form


def follow(vector: MultiLoadBalanceVectorEnv, keys: dict[str, Any], steps: int) -> int:
    """Single environments beside each replica, with PettingZoo's reset in the place of autoreset; ended episodes."""
    mode, r = vector.autoreset_mode.value, vector.num_envs
    singles = [MultiLoadBalanceEnv(**keys) for _ in range(r)]

    def rows(part: Any, i: int) -> Any:
        return {key: value[i] for key, value in part.items()} if isinstance(part, dict) else part[i]

    def same_observation(batch: Any, i: int, observation: dict[str, Any]) -> None:
        for b, agent in enumerate(singles[i].possible_agents):
            equal(rows(rows(batch, i), b), observation[agent])

    def same_info(batch: dict[str, Any], i: int, info: dict[str, Any]) -> None:
        for key in info["lb_0"]:
            assert batch[f"_{key}"][i]
            for b, agent in enumerate(singles[i].possible_agents):
                np.testing.assert_array_equal(batch[key][i, b], info[agent][key], err_msg=key)

    observation, info = vector.reset(seed=30)
    for i, single in enumerate(singles):
        expected = single.reset(seed=30 + i)
        same_observation(observation, i, expected[0])
        same_info(info, i, expected[1])
        np.testing.assert_array_equal(vector.state()[i], single.state())
    over, ended = np.zeros(r, bool), 0
    for k in range(steps):
        if k == 3:  # from here the replicas are out of step with each other
            some = np.arange(r) % 2 == 0
            vector.reset(seed=[50] * r, options={"reset_mask": some, "load": 0.5})
            for i in np.flatnonzero(some):
                singles[i].reset(seed=50, options={"load": 0.5})
            over &= ~some
        if mode == "Disabled" and over.any():
            vector.reset(options={"reset_mask": over})
            for i in np.flatnonzero(over):
                singles[i].reset()
            over[:] = False
        actions = vector.action_space.sample()
        observation, rewards, terminated, truncated, info = vector.step(actions)
        assert rewards.shape == (r, vector.num_balancers) and rewards.dtype == np.float64
        assert truncated.shape == terminated.shape == (r,) and not terminated.any()
        for i, single in enumerate(singles):
            if mode == "NextStep" and over[i]:
                expected = single.reset()
                same_observation(observation, i, expected[0])
                same_info(info, i, expected[1])
                assert not rewards[i].any() and not truncated[i]
            else:
                each = dict(zip(single.agents, actions[i], strict=True))
                expected_step = single.step(each)
                np.testing.assert_array_equal(rewards[i], list(expected_step[1].values()))
                assert truncated[i] == expected_step[3]["lb_0"]
                ended += truncated[i]
                if mode == "SameStep" and truncated[i]:
                    for b, agent in enumerate(single.possible_agents):
                        equal(rows(info["final_obs"][i], b), expected_step[0][agent])
                    same_info(info["final_info"], i, expected_step[4])
                    np.testing.assert_array_equal(info["final_state"][i], single.state())
                    assert info["_final_state"][i]
                    same_observation(observation, i, single.reset()[0])
                else:
                    same_observation(observation, i, expected_step[0])
                    same_info(info, i, expected_step[4])
            np.testing.assert_array_equal(vector.state()[i], single.state())
        over = truncated.copy()
    return ended


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "changes",
    [
        {"observation": "dict", "use_ground_truth": True},
        {"action_type": "normalized", "reward_sharing": "difference", "normalize": True},
        {"action_type": "joint", "observation": "flat", "action_offsets": "random", "reward_sharing": "field"},
        {"action_delay": {"low": 0.1, "high": 0.9}, "action_offsets": "even", "reward_sharing": "own"},
        {"scenario": drawn(), "num_balancers": 2, "observation": "dict", "action_offsets": "even"},
    ],
    ids=["dict", "difference", "random offsets", "drawn delays", "distribution"],
)
def test_replicas_equal_parallel_environments(mode: str, changes: dict[str, Any]) -> None:
    keys = {"scenario": small(), "max_steps": 6} | changes
    vector = MultiLoadBalanceVectorEnv(4, autoreset_mode=mode, **keys)
    vector.action_space.seed(1)
    assert follow(vector, keys, 20) >= 8


def test_threads_do_not_matter() -> None:
    def run(num_threads: int) -> list[Any]:
        env = make_vector(9, num_threads=num_threads, action_delay={"low": 0.0, "high": 0.3}, reward_sharing="field")
        env.action_space.seed(0)
        return [env.reset(seed=5), *(env.step(env.action_space.sample()) for _ in range(15))]

    for a, b in zip(run(1), run(2), strict=True):
        equal(a[:-1], b[:-1])
        equal_infos(a[-1], b[-1])


def test_array_api() -> None:
    env = make_vector(5, action_type="continuous", num_balancers=2)
    assert env.observation_space.shape == (5, 2, 3, 11) and env.action_space.shape == (5, 2, 3)
    assert env.single_observation_space.shape == (2, 3, 11) and env.agent_action_space.shape == (3,)
    observation, info = env.reset(seed=0)
    assert observation in env.observation_space and observation.dtype == np.float32
    assert info["weights"].shape == (5, 2, 3) and info["_weights"].shape == (5,)
    observation, *_, info = env.step(env.action_space.sample())
    assert observation in env.observation_space and info["completed"].shape == (5, 2)
    for bad in (np.ones((5, 3)), np.ones((10, 3)), np.ones((2, 5, 3)), [[1.0], [2.0, 3.0]], None):
        with pytest.raises(InvalidActionError):
            env.step(bad)
    with pytest.raises(ResetNeeded):
        make_vector(2).state()


# State


@pytest.mark.parametrize("normalize", [False, True])
def test_state_holds_what_its_names_say(normalize: bool) -> None:
    events = (Event(time=0.6, kind="down", server=1),)
    env = make(scenario=small(events=events), normalize=normalize, use_ground_truth=True, observation="dict")
    with pytest.raises(ResetNeeded):
        env.state()
    env.reset(seed=8)
    assert env.state_space.shape == (len(env.state_names),) == (4 * 3 + 3 * 3 * 11,)
    for _ in range(5):
        observation, *_ = env.step(actions_of(env))
        state = env.state()
        assert state in env.state_space and state.dtype == np.float32
        named = dict(zip(env.state_names, state.tolist(), strict=True))
        assert len(named) == len(state)
        for j in range(3):
            assert named.pop(f"server_{j}/active") == observation["lb_0"]["mask"][j]
            for i, name in enumerate(GROUND_TRUTH_NAMES):
                assert named.pop(f"server_{j}/{name}") == observation["lb_1"]["features"][j, 11 + i]
            for agent, (i, name) in itertools.product(env.agents, enumerate(FEATURE_NAMES)):
                assert named.pop(f"{agent}/server_{j}/{name}") == observation[agent]["features"][j, i]
        assert not named
    assert not observation["lb_0"]["mask"].all()


# Rewards


def metric(loads: np.ndarray, active: np.ndarray) -> float:
    return float(fairness("jain", loads, active) + 0.5 * fairness("var", loads, active))


@pytest.mark.parametrize("sharing", SHARINGS)
def test_rewards_by_hand(sharing: str) -> None:
    """From the observations alone, with a server that goes down on the way."""
    events = (Event(time=1.1, kind="drain", server=0),)
    env = make(
        scenario=small(4, events=events),
        observation="dict",
        reward_sharing=sharing,
        reward_type={"jain": 1, "var": 0.5},
    )
    env.reset(seed=9)
    seen = set()
    for _ in range(10):
        observation, rewards, *_ = env.step(actions_of(env))
        fields = np.array([part["features"][:, DURATION] for part in observation.values()], np.float64)
        active = observation["lb_0"]["mask"].astype(bool)
        own = [metric(field, active) for field in fields]
        together = metric(fields.mean(axis=0), active)
        expected = {
            "own": own,
            "mean": [np.mean(own)] * 4,
            "field": [together] * 4,
            "difference": [together - metric(np.delete(fields, b, axis=0).mean(axis=0), active) for b in range(4)],
        }[sharing]
        np.testing.assert_allclose(list(rewards.values()), expected, rtol=1e-12, atol=1e-12)
        seen.update(rewards.values())
        if sharing in ("mean", "field"):
            assert len(set(rewards.values())) == 1
    assert len(seen) >= 10 and not active.all()


def test_a_balancer_that_sees_what_the_others_see_makes_no_difference() -> None:
    """Two equal views: taking either out of the mean leaves it as it is."""
    from lbgym.env.rewards import make_reward
    from lbgym.env.sharing import shared_rewards

    env = make_vector(2, num_balancers=2)
    env.reset(seed=0)
    env.step(env.action_space.sample())
    views = env._core.snapshot
    assert views is not None
    views.stats[:, 1] = views.stats[:, 0]
    rewards = shared_rewards(make_reward("jain"), views, "difference")
    np.testing.assert_array_equal(rewards, 0.0)


@pytest.mark.parametrize("sharing", ["mean", "field", "own"])
def test_service_rewards_are_the_clusters(sharing: str) -> None:
    env = make(reward_type="mean_fct", reward_sharing=sharing)
    env.reset(seed=3)
    for _ in range(5):
        _, rewards, _, _, infos = env.step(actions_of(env))
        assert len({info["fct_mean"] for info in infos.values()}) == 1
        np.testing.assert_allclose(list(rewards.values()), -infos["lb_0"]["fct_mean"], rtol=1e-12)
    assert infos["lb_0"]["fct_mean"] > 0.0


@pytest.mark.parametrize(("sharing", "shape"), [("own", (2, 3)), ("mean", (2, 3)), ("field", (2,))])
def test_callable_rewards_get_batches(sharing: str, shape: tuple[int, ...]) -> None:
    shapes = []

    def reward(snapshot: lbgym.Snapshot) -> Any:
        shapes.append(snapshot.active.shape[:-1])
        return -snapshot.stats[..., 0].sum(axis=-1)

    env = make_vector(2, reward_type=reward, reward_sharing=sharing)
    env.reset(seed=0)
    observation, rewards, *_ = env.step(env.action_space.sample())
    assert shapes == [shape]
    flows = observation[..., 0].sum(axis=-1)
    if sharing != "own":
        flows = np.repeat(flows.mean(axis=1, keepdims=True), 3, axis=1)
    np.testing.assert_allclose(rewards, -flows)


# Asynchrony


def test_no_offset_and_no_delay_is_synchronous() -> None:
    plain = make()
    others = [
        make(action_offsets=[0.0, 0.0, 0.0], action_delay=0),
        make(action_delay={"low": 0.0, "high": 0.0}),
        make(action_offsets=np.zeros(3), action_delay=[0, 0, 0]),
    ]
    for env in (plain, *others):
        env.reset(seed=12)
    seed_actions(plain, 0)
    for _ in range(15):
        actions = actions_of(plain)
        expected = plain.step(actions)
        for env in others:
            equal(env.step(actions), expected)


def test_offsets_and_delays_change_neither_flows_nor_what_is_known_at_first() -> None:
    plain, late = make(dispatch="ecmp"), make(dispatch="ecmp", action_offsets="random", action_delay=0.1)
    first, second = plain.reset(seed=12), late.reset(seed=12)
    equal(first[0], second[0])
    for _ in range(10):  # ecmp has no ear for weights, so nothing at all may differ
        actions = actions_of(plain)
        expected, got = plain.step(actions), late.step(actions)
        equal(got[:4], expected[:4])
        for agent in plain.agents:
            equal({key: got[4][agent][key] for key in expected[4][agent]}, expected[4][agent])


def test_weights_come_into_force_when_they_should() -> None:
    keys: dict[str, Any] = {"scenario": small(2, load=0.5), "dispatch": "wcmp", "action_type": "continuous"}
    keys |= {"min_weight": 1e-9, "max_steps": 50}
    env = MultiLoadBalanceEnv(action_offsets=[0.05, 0.2], action_delay=[0.1, 0.15], **keys)
    # The flows themselves, beside what the environment shows.
    from lbgym.simulator import Simulation

    recorder = Simulation(env.scenario, dispatch="wcmp", record_flows=True)  # type: ignore[arg-type]
    env._core.plane.simulation = recorder
    env.reset(seed=1)
    left, right = np.array([1.0, 0.0, 0.0]), np.array([0.0, 0.0, 1.0])
    for k in range(20):
        weights = left if k % 2 else right
        *_, infos = env.step({"lb_0": weights, "lb_1": weights})
        assert infos["lb_0"]["action_delay"] == pytest.approx(0.15)
        assert infos["lb_1"]["action_delay"] == pytest.approx(0.35)
        # lb_0's weights come into force in their own step, lb_1's in the next one.
        np.testing.assert_array_equal(infos["lb_0"]["weights_in_force"], infos["lb_0"]["weights"])
        if k:
            assert infos["lb_1"]["weights_in_force"].argmax() == (0 if (k - 1) % 2 else 2)
    ended, still = recorder.take_flows(), recorder.open_flows()
    arrival, server, balancer = (np.concatenate([ended[k], still[k]]) for k in ("arrival", "server", "balancer"))
    for b, delay in ((0, 0.15), (1, 0.35)):
        mine = (balancer == b) & (arrival > delay)
        assert mine.sum() > 50
        turn = ((arrival[mine] - delay) // 0.25).astype(int) % 2
        np.testing.assert_array_equal(server[mine], np.where(turn, 0, 2))


def test_drawn_offsets_last_an_episode_and_drawn_delays_a_step() -> None:
    def delays(**keys: Any) -> np.ndarray:
        env = make(**keys)
        episodes = []
        for seed in (1, None, 1):
            env.reset(seed=seed)
            steps = [env.step(actions_of(env))[4] for _ in range(4)]
            episodes.append([[info[agent]["action_delay"] for agent in env.agents] for info in steps])
        return np.array(episodes)

    offsets = delays(action_offsets="random")
    np.testing.assert_array_equal(offsets, np.repeat(offsets[:, :1], 4, axis=1))
    np.testing.assert_array_equal(offsets[0], offsets[2])
    assert len(np.unique(offsets[:2])) == 6 and offsets.min() >= 0.0 and offsets.max() < 0.25
    drawn = delays(action_delay={"low": 0.2, "high": 0.3})
    np.testing.assert_array_equal(drawn[0], drawn[2])
    assert len(np.unique(drawn[:2])) == 24 and drawn.min() >= 0.2 and drawn.max() <= 0.3
    np.testing.assert_allclose(delays(action_offsets="even")[0, 0], [0.0, 0.25 / 3, 0.5 / 3])


def test_statistics_cover_the_whole_step() -> None:
    """All flows of an episode are told of, whatever came into force on the way."""
    env = make(action_offsets="even", action_delay={"low": 0.0, "high": 0.2}, num_balancers=2, max_steps=200)
    env.reset(seed=0)
    told = 0
    for _ in range(50):
        *_, infos = env.step(actions_of(env))
        told += infos["lb_0"]["completed"] + infos["lb_0"]["rejected"]
    snapshot = env._core.snapshot
    assert snapshot is not None and told > 500
    assert told == (snapshot.completed + snapshot.rejected)[0, 0].sum()


# Live regions


def test_live_balancers(shm_dir: Path) -> None:
    with emulator("--name", "live", "--scenario", "marllb-moderate", "--speedup", 2, "--seed", 1):
        names = ["live_0", "live_1"]
        env = MultiLoadBalanceEnv(shm_names=names, action_type="continuous", observation="dict", shm_timeout=20.0)
        assert env.possible_agents == ["lb_0", "lb_1"] and env.num_servers == 7 and env.scenario is None
        observation, infos = env.reset()
        assert abs(infos["lb_0"]["timestamp"] - infos["lb_1"]["timestamp"]) <= 0.25
        np.testing.assert_array_equal(infos["lb_0"]["weights"], [2, 2, 2, 2, 4, 4, 4])  # safe weights: cores
        begin = {agent: infos[agent]["timestamp"] for agent in env.agents}
        for k in range(8):
            weights = {agent: np.arange(1.0, 8.0) + b + k / 8 for b, agent in enumerate(env.agents)}
            observation, rewards, _, truncated, infos = env.step(weights)
            for agent in env.agents:
                np.testing.assert_array_equal(infos[agent]["weights"], weights[agent])
                assert observation[agent] in env.observation_space(agent)
                passed = infos[agent]["timestamp"] - begin[agent]
                assert passed >= 0.25 * (k + 1) - 1e-9 and passed / 0.05 == pytest.approx(round(passed / 0.05))
            assert len(set(rewards.values())) == 1 and not any(truncated.values())
            if not infos["lb_0"]["missed_observations"] and not infos["lb_1"]["missed_observations"]:
                for agent in env.agents:
                    np.testing.assert_array_equal(infos[agent]["weights_in_force"], weights[agent])
        assert (observation["lb_0"]["features"] != observation["lb_1"]["features"]).any()
        assert env.state() in env.state_space and env.state_space.shape == (4 * 7 + 2 * 7 * 11,)
        with pytest.raises(UnknownNameError, match="load"):
            env.reset(options={"load": 0.5})
        env.close()
        env.close()
        MultiLoadBalanceEnv(shm_names=names, num_servers=9, shm_timeout=20.0).close()
        with pytest.raises(RegionNotFoundError, match="live_7"):
            MultiLoadBalanceEnv(shm_names=["live_0", "live_7"], shm_timeout=0.1)
        MultiLoadBalanceEnv(shm_names=names, shm_timeout=20.0).close()  # nobody holds live_0 any more


def test_everybodys_weights_are_written_before_anybody_is_waited_for(shm_dir: Path) -> None:
    with puppet("one", period=0.05) as one, puppet("two", period=0.05) as two:
        env = MultiLoadBalanceEnv(shm_names=["one", "two"], action_type="continuous", shm_timeout=0.3)
        env.reset()
        one.tell(silence=1.5)
        with pytest.raises(DataPlaneTimeout, match="'one'"):
            env.step({"lb_0": [1.0, 2.0, 3.0, 4.0], "lb_1": [4.0, 3.0, 2.0, 1.0]})
        assert one.tell(weights=0) == [1.0, 2.0, 3.0, 4.0]
        assert two.tell(weights=0) == [4.0, 3.0, 2.0, 1.0]
        assert SharedMemoryRegion.attach("one").wait_observation(0, 0.0)
        for _ in range(40):
            try:
                *_, infos = env.step(dict.fromkeys(env.agents, [1.0] * 4))
            except DataPlaneTimeout:
                continue
            if infos["lb_0"]["applied_sequence_id"] == infos["lb_0"]["action_sequence_id"]:
                break
        assert infos["lb_0"]["applied_sequence_id"] == infos["lb_0"]["action_sequence_id"]
        two.kill()
        with pytest.raises(DataPlaneTimeout, match="'two'"):
            for _ in range(3):
                env.step(dict.fromkeys(env.agents, [1.0] * 4))
        env.close()


def test_live_regions_of_different_sizes_and_without_ground_truth(shm_dir: Path) -> None:
    with puppet("one", servers=3, ground_truth=False), puppet("two", servers=4):
        with pytest.raises(InvalidOptionError, match="3, 4 servers"):
            MultiLoadBalanceEnv(shm_names=["one", "two"])
        with pytest.raises(InvalidOptionError, match="does not publish its servers"):
            MultiLoadBalanceEnv(shm_names=["one", "two"], num_servers=4, use_ground_truth=True)
        with pytest.raises(InvalidRewardError):
            MultiLoadBalanceEnv(shm_names=["one", "two"], num_servers=4, reward_type="p99_fct")
        env = MultiLoadBalanceEnv(
            shm_names=["one", "two"], num_servers=4, observation="dict", reward_sharing="field", reward_type="var",
            reward_field="n_flow_on", step_interval=0.05,
        )  # fmt: skip
        env.reset()
        observation, rewards, *_ = env.step(dict.fromkeys(env.agents, (0, 1, 2, 0)))
        assert env.state().shape == env.state_space.shape == (4 + 2 * 4 * 11,) == (len(env.state_names),)
        # The fourth server is balancer 1's alone: its mean is over who has it.
        masks = np.array([observation[agent]["mask"] for agent in env.agents], bool)
        np.testing.assert_array_equal(masks, [[True, True, True, False], [True] * 4])
        flows = np.array([observation[agent]["features"][:, 0] for agent in env.agents], np.float64)
        field = flows.sum(axis=0) / masks.sum(axis=0)
        assert rewards["lb_0"] == rewards["lb_1"] == pytest.approx(-field.var())
        env.close()
