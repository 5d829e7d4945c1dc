"""The environment's contract: Gymnasium's and Stable-Baselines3's checks, bad input, and that actions matter."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env

import lbgym
from lbgym import FlowDispatchEnv, LoadBalanceEnv, MultiLoadBalanceEnv
from lbgym.env.wrappers import LegacyGymWrapper
from lbgym.errors import (
    InvalidActionError,
    InvalidOptionError,
    LbgymError,
    RegionNotFoundError,
    ResetNeeded,
    UnknownNameError,
)
from lbgym.features import FEATURE_NAMES, GROUND_TRUTH_NAMES
from lbgym.scenarios import Deterministic, Event, Scenario, Server, Workload, servers_of

ID = "lbgym:lbgym/LoadBalance-v0"
LAYOUTS = ["matrix", "flat", "dict"]
ACTIONS = ["discrete", "joint", "continuous", "normalized"]
COMBINATIONS = list(itertools.product(LAYOUTS, ACTIONS, [False, True], [False, True]))

BOOLEANS = [
    "use_ground_truth",
    "relative_to_configured",
    "observe_weights",
    "observe_background",
    "observe_configured",
    "normalize",
]
WORDS = ["false", 0, None]

# What the published spaces are known for; the normalized forms are free of it.
INFINITE = "maximum value is infinity"
ASYMMETRIC = "symmetric and normalized"
UNFLATTENED = "unconventional shape"

pytestmark = pytest.mark.contract


def warnings_of(check: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check()
    return [str(w.message) for w in caught]


def unexpected(messages: list[str], known: set[str]) -> list[str]:
    return [m for m in messages if not any(k in m for k in known)]


def known_warnings(action_type: str, normalize: bool) -> set[str]:
    return (set() if normalize else {INFINITE}) | ({ASYMMETRIC} if action_type == "continuous" else set())


# The checkers


@pytest.mark.parametrize(("observation", "action_type", "truth", "normalize"), COMBINATIONS)
def test_gymnasium_check_env(
    observation: str, action_type: str, truth: bool, normalize: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    env = gymnasium.make(
        ID, observation=observation, action_type=action_type, use_ground_truth=truth, normalize=normalize
    )
    messages = warnings_of(lambda: check_env(env.unwrapped))
    known = known_warnings(action_type, normalize)
    assert unexpected(messages, known) == []
    for part in known:  # the list of the known ones does not outlive them
        assert any(part in m for m in messages), part


@pytest.mark.parametrize(("observation", "action_type", "truth", "normalize"), COMBINATIONS)
def test_stable_baselines3_check_env(observation: str, action_type: str, truth: bool, normalize: bool) -> None:
    pytest.importorskip("stable_baselines3")
    from stable_baselines3.common.env_checker import check_env as sb3_check_env

    env = LoadBalanceEnv(observation=observation, action_type=action_type, use_ground_truth=truth, normalize=normalize)
    known = {ASYMMETRIC} if action_type == "continuous" else set()
    known |= set() if observation == "flat" else {UNFLATTENED}
    assert unexpected(warnings_of(lambda: sb3_check_env(env, warn=True, skip_render_check=True)), known) == []


@pytest.mark.parametrize("observation", LAYOUTS)
def test_observation_spaces(observation: str) -> None:
    n = 5
    for truth in (False, True):
        columns = len(FEATURE_NAMES) + (len(GROUND_TRUTH_NAMES) if truth else 0)
        for normalize in (False, True):
            env = LoadBalanceEnv(num_servers=n, observation=observation, use_ground_truth=truth, normalize=normalize)
            space = env.observation_space
            if observation == "dict":
                assert isinstance(space, spaces.Dict) and set(space.spaces) == {"features", "mask"}
                assert space["mask"].shape == (n,)
                box = space["features"]
                assert box.shape == (n, columns)
            else:
                box = space
                assert box.shape == ((n, columns) if observation == "matrix" else (n + n * columns,))
            assert isinstance(box, spaces.Box) and box.dtype == np.float32
            assert (box.low == 0).all()
            if normalize:
                assert (box.high == 1).all()
            assert len(env.feature_columns) == columns
            first, _ = env.reset(seed=0)
            assert first in space


def test_action_spaces() -> None:
    assert LoadBalanceEnv().action_space == spaces.MultiDiscrete([3] * 4)
    assert LoadBalanceEnv(action_weights=(1, 2), num_servers=6).action_space == spaces.MultiDiscrete([2] * 6)
    assert LoadBalanceEnv(action_type="joint").action_space == spaces.Discrete(81)
    continuous = LoadBalanceEnv(action_type="continuous", min_weight=0.5, max_weight=4).action_space
    assert continuous == spaces.Box(0.5, 4, (4,), np.float32)
    assert LoadBalanceEnv(action_type="normalized").action_space == spaces.Box(-1, 1, (4,), np.float32)


def test_layouts_hold_the_same_numbers() -> None:
    def run(layout: str) -> Any:
        env = LoadBalanceEnv(observation=layout, use_ground_truth=True)
        env.reset(seed=9)
        for _ in range(8):
            observation = env.step(np.array([0, 1, 2, 1]))[0]
        return observation

    matrix, flat, both = run("matrix"), run("flat"), run("dict")
    np.testing.assert_array_equal(both["features"], matrix)
    np.testing.assert_array_equal(flat[:4], both["mask"])
    np.testing.assert_array_equal(flat[4:], matrix.ravel())
    np.testing.assert_array_equal(both["mask"], 1)


def test_normalized_features_keep_the_order() -> None:
    plain, scaled = LoadBalanceEnv(), LoadBalanceEnv(normalize=True)
    plain.reset(seed=2)
    scaled.reset(seed=2)
    pairs = []
    for _ in range(30):
        pairs.append((plain.step([0, 1, 2, 0])[0].ravel(), scaled.step([0, 1, 2, 0])[0].ravel()))
    raw, mapped = (np.array(x) for x in zip(*pairs, strict=True))
    assert mapped.min() >= 0 and mapped.max() <= 1 and mapped.max() > 0.05
    raw, mapped = raw.reshape(-1, 4, 11), mapped.reshape(-1, 4, 11)
    for column in range(11):
        order = np.argsort(raw[..., column].ravel(), kind="stable")
        assert (np.diff(mapped[..., column].ravel()[order]) >= 0).all()
        np.testing.assert_array_equal(raw[..., column] == 0, mapped[..., column] == 0)


# The published sample code


def test_published_sample_through_gymnasium() -> None:
    env = LoadBalanceEnv(num_servers=4)
    obs, _info = env.reset()
    assert obs.shape == (4, 11)
    assert (obs >= 0).all() and np.isfinite(obs).all()
    for _ in range(100):
        obs, reward, terminated, truncated, info = env.step(env.action_space.sample())
        assert obs.shape == (4, 11)
        assert (obs >= 0).all() and np.isfinite(obs).all()
        assert isinstance(reward, float) and math.isfinite(reward)
        if terminated or truncated:
            obs, info = env.reset()
        assert isinstance(info, dict)
    env.close()


def test_published_sample_through_the_old_interface() -> None:
    env = LegacyGymWrapper(LoadBalanceEnv(num_servers=4))
    obs = env.reset()
    assert obs.shape == (4, 11)
    total = 0.0
    for _ in range(100):
        obs, reward, done, info = env.step(env.action_space.sample())
        assert (obs >= 0).all() and np.isfinite(obs).all()
        total += reward
        if done:
            obs = env.reset()
        assert "active_servers" in info
    assert math.isfinite(total)
    env.close()


def test_published_sample_trains() -> None:
    stable_baselines3 = pytest.importorskip("stable_baselines3")
    env = LoadBalanceEnv(num_servers=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = stable_baselines3.PPO("MlpPolicy", env, n_steps=64, batch_size=64, n_epochs=1, device="cpu")
        model.learn(total_timesteps=128)
    obs, _ = env.reset()
    action, _ = model.predict(obs)
    assert action in env.action_space


# Bad input


@pytest.mark.parametrize(
    ("action_type", "action", "message"),
    [
        ("discrete", [0, 0, 0], "4"),
        ("discrete", [0, 0, 0, 0, 0], "4"),
        ("discrete", [[0, 0, 0, 0]], "4"),
        ("discrete", 1, "4"),
        ("discrete", [0, 0, 0, 3], "3"),
        ("discrete", [0, -1, 0, 0], "-1"),
        ("discrete", [0.5, 0, 0, 0], None),
        ("discrete", [math.nan, 0, 0, 0], None),
        ("discrete", "abcd", None),
        ("discrete", None, None),
        ("joint", 81, "81"),
        ("joint", -1, "-1"),
        ("joint", 1.5, None),
        ("joint", [0, 0], None),
        ("continuous", [1.0, 1.0, 1.0], "4"),
        ("continuous", [1.0, math.nan, 1.0, 1.0], "finite"),
        ("continuous", [1.0, math.inf, 1.0, 1.0], "finite"),
        ("continuous", [1.0, -math.inf, 1.0, 1.0], "finite"),
        ("continuous", ["a", "b", "c", "d"], None),
        ("normalized", [[0.0] * 4], "4"),
        ("normalized", [0.0, math.nan, 0.0, 0.0], "finite"),
        ("normalized", None, None),
    ],
)
def test_invalid_actions(action_type: str, action: Any, message: str | None) -> None:
    env = LoadBalanceEnv(action_type=action_type)
    env.reset(seed=0)
    good = env.action_space.sample()
    with pytest.raises(InvalidActionError, match=message) as caught:
        env.step(action)
    assert isinstance(caught.value, ValueError)
    # A refused action leaves the environment as it was.
    other = LoadBalanceEnv(action_type=action_type)
    other.reset(seed=0)
    np.testing.assert_array_equal(env.step(good)[0], other.step(good)[0])


def test_continuous_actions_are_clipped_to_their_bounds_and_nothing_else_is() -> None:
    env = LoadBalanceEnv(action_type="continuous", min_weight=0.5, max_weight=2.0)
    env.reset(seed=0)
    *_, info = env.step(np.array([0.0, 100.0, -3.0, 1.25]))
    np.testing.assert_array_equal(info["weights"], [0.5, 2.0, 0.5, 1.25])
    env = LoadBalanceEnv(action_type="normalized", min_weight=0.1, max_weight=10.0)
    env.reset(seed=0)
    *_, info = env.step(np.array([-1.0, 0.0, 1.0, 7.0]))
    np.testing.assert_allclose(info["weights"], [0.1, 1.0, 10.0, 10.0], rtol=1e-6)


def test_weights_of_discrete_actions() -> None:
    env = LoadBalanceEnv()
    env.reset(seed=0)
    np.testing.assert_array_equal(env.step([0, 1, 2, 0])[4]["weights"], [1.0, 1.5, 2.0, 1.0])
    joint = LoadBalanceEnv(action_type="joint")
    joint.reset(seed=0)
    np.testing.assert_array_equal(joint.step(0 * 27 + 1 * 9 + 2 * 3 + 0)[4]["weights"], [1.0, 1.5, 2.0, 1.0])


def test_step_before_reset() -> None:
    env = LoadBalanceEnv()
    with pytest.raises(ResetNeeded, match="reset"):
        env.step(env.action_space.sample())
    with pytest.raises(gymnasium.error.ResetNeeded):
        LoadBalanceEnv(render_mode="ansi").render()


def test_step_after_the_end() -> None:
    env = LoadBalanceEnv(max_steps=3)
    env.reset(seed=0)
    for k in range(3):
        _, _, terminated, truncated, _ = env.step(np.zeros(4, int))
        assert terminated is False and truncated is (k == 2)
    with pytest.raises(ResetNeeded, match="reset"):
        env.step(np.zeros(4, int))
    env.reset()
    assert env.step(np.zeros(4, int))[3] is False


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({"action_type": "discreet"}, UnknownNameError, "discrete"),
        ({"observation": "matrx"}, UnknownNameError, "matrix"),
        ({"reward_type": "jian"}, UnknownNameError, "jain"),
        ({"reward_field": "flow_duration"}, UnknownNameError, "n_flow_on"),
        ({"dispatch": "sde"}, UnknownNameError, "sed"),
        ({"render_mode": "rgb"}, UnknownNameError, "rgb_array"),
        ({"scenario": "hetrogeneous"}, ValueError, "heterogeneous"),
        ({"num_servers": 0}, ValueError, "num_servers|servers"),
        ({"num_servers": 2.5}, ValueError, "num_servers|servers"),
        ({"num_servers": 5, "scenario": "marllb-moderate"}, ValueError, r"5.*7|7.*5"),
        ({"action_type": "joint", "num_servers": 8}, ValueError, "4,?096"),
        ({"action_weights": ()}, ValueError, "action_weights"),
        ({"action_weights": (1.0, -1.0)}, ValueError, "action_weights"),
        ({"action_weights": (1.0, math.nan)}, ValueError, "action_weights"),
        ({"min_weight": 0.0, "action_type": "normalized"}, ValueError, "min_weight"),
        ({"min_weight": 2.0, "max_weight": 1.0, "action_type": "continuous"}, ValueError, "min_weight|max_weight"),
        ({"max_weight": math.inf, "action_type": "continuous"}, ValueError, "max_weight"),
        ({"step_interval": 0.0}, ValueError, "step_interval"),
        ({"step_interval": math.nan}, ValueError, "step_interval"),
        ({"max_steps": 0}, ValueError, "max_steps"),
        ({"max_steps": 1.5}, ValueError, "max_steps"),
        (
            {"max_steps": 10**400},
            InvalidOptionError,
            r"max_steps must be a whole number from 1 to \d+, got 10{99}\.\.\.",
        ),
        ({"max_episode_steps": 10**400}, InvalidOptionError, "max_episode_steps must be a whole number from 1 to"),
        ({"reward_field": []}, UnknownNameError, r"unknown reward field \[\] in reward_field"),
        ({"reward_field": None}, UnknownNameError, "unknown reward field None in reward_field"),
        ({"features": [[1]]}, UnknownNameError, r"unknown feature \[1\]"),
        *(({key: value}, InvalidOptionError, f"{key} must be true or false") for key in BOOLEANS for value in WORDS),
    ],
    ids=str,
)
def test_bad_constructor_arguments(keys: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        LoadBalanceEnv(**keys)
    assert isinstance(caught.value, LbgymError)


def test_unknown_constructor_key() -> None:
    with pytest.raises(TypeError, match="num_server"):
        LoadBalanceEnv(num_server=4)  # type: ignore[call-arg]
    with pytest.raises(InvalidOptionError, match=r"shm_name.*got 4.*num_servers=4"):
        LoadBalanceEnv(4)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lod": 0.5}, "lod"),
        ({"load": -0.5}, "load"),
        ({"load": math.nan}, "load"),
        ({"rate": "fast"}, "rate"),
        ({"load": 0.5, "rate": 10.0}, "load|rate"),
        ({"scenario": "no-such"}, "no-such"),
        ({"scenario": "marllb-moderate"}, "servers"),
        ({"events": [Event(time=1.0, kind="down", server=9)]}, "9"),
        ({"events": "down"}, "events|Event"),
        ({"events": ["down"]}, "the option events must be a list of lbgym.scenarios.Event, got"),
        ({"events": np.array(1.0)}, "the option events must be a list of lbgym.scenarios.Event, got"),
    ],
    ids=str,
)
def test_bad_reset_options(options: dict[str, Any], message: str) -> None:
    env = LoadBalanceEnv()
    env.reset(seed=0)
    with pytest.raises(ValueError, match=message) as caught:
        env.reset(seed=0, options=options)
    assert isinstance(caught.value, LbgymError)


# Registration and rendering


def test_make_from_the_module_string() -> None:
    env = gymnasium.make(ID, num_servers=6, action_type="continuous")
    assert isinstance(env.unwrapped, LoadBalanceEnv)
    assert env.action_space.shape == (6,)
    env.reset(seed=0)
    env.step(env.action_space.sample())
    assert env.spec is not None and "lbgym/LoadBalance-v0" in env.spec.to_json()
    again = gymnasium.make(gymnasium.envs.registration.EnvSpec.from_json(env.spec.to_json()))
    assert again.action_space == env.action_space


@pytest.mark.parametrize("mode", ["ansi", "rgb_array", "human"])
def test_render_modes(mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    env = gymnasium.make(ID, render_mode=mode)
    env.reset(seed=0)
    first = env.render()
    env.step(env.action_space.sample())
    second = env.render()
    if mode == "ansi":
        assert isinstance(first, str) and isinstance(second, str) and first != second
        assert "step 1" in second and "0.25 s" in second
    elif mode == "rgb_array":
        assert second.dtype == np.uint8 and second.shape[2] == 3
        assert (first != second).any()
    else:
        assert first is None and second is None
        assert "step 1" in capsys.readouterr().out
    env.close()


def test_no_render_mode() -> None:
    env = LoadBalanceEnv()
    env.reset(seed=0)
    assert env.render_mode is None
    assert env.render() is None


@pytest.mark.filterwarnings("ignore")
def test_record_video(tmp_path: Path) -> None:
    pytest.importorskip("moviepy")
    env = gymnasium.wrappers.RecordVideo(
        gymnasium.make(ID, render_mode="rgb_array", max_steps=4), str(tmp_path), disable_logger=True
    )
    env.reset(seed=0)
    truncated = False
    while not truncated:
        *_, truncated, _ = env.step(env.action_space.sample())
    env.close()
    videos = list(tmp_path.glob("*.mp4"))
    assert len(videos) == 1 and videos[0].stat().st_size > 1000


# Determinism and freshness


def rollout(env: LoadBalanceEnv, seed: int | None, steps: int = 25) -> tuple[list[Any], list[float], list[dict]]:
    observation, info = env.reset(seed=seed)
    observations, rewards, infos = [observation], [], [info]
    rng = np.random.default_rng(0)
    for _ in range(steps):
        observation, reward, _, _, info = env.step(rng.integers(0, 3, env.scenario.num_servers))
        observations.append(observation)
        rewards.append(reward)
        infos.append(info)
    return observations, rewards, infos


def test_same_seed_same_bits() -> None:
    env = LoadBalanceEnv()
    one, two = rollout(env, 5), rollout(env, 5)
    three = rollout(LoadBalanceEnv(), 5)
    np.testing.assert_array_equal(one[0], two[0])
    np.testing.assert_array_equal(one[0], three[0])
    assert one[1] == two[1] == three[1]
    for a, b in zip(one[2], three[2], strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])
    assert rollout(env, 6)[1] != one[1]


@pytest.mark.parametrize("kind", [np.int64, np.uint8])
@pytest.mark.parametrize("make", [LoadBalanceEnv, MultiLoadBalanceEnv, FlowDispatchEnv])
def test_a_seed_may_be_of_any_whole_type(make: Callable[[], Any], kind: Any) -> None:
    env = make()

    def first(seed: Any) -> Any:
        observation = env.reset(seed=seed)[0]
        return observation["lb_0"] if isinstance(observation, dict) else observation

    np.testing.assert_array_equal(first(kind(3)), first(3))
    for wrong in (3.0, np.float64(3), -1, True, "3", [3]):
        with pytest.raises(InvalidOptionError, match="seed must be a whole number of at least 0"):
            env.reset(seed=wrong)


def test_episodes_without_a_seed_differ_but_follow_from_the_first() -> None:
    def three_episodes() -> list[list[float]]:
        env = LoadBalanceEnv()
        return [rollout(env, seed)[1] for seed in (1, None, None)]

    episodes = three_episodes()
    assert episodes == three_episodes()
    assert episodes[0] != episodes[1] != episodes[2]


def test_the_global_generator_is_left_alone() -> None:
    np.random.seed(0)
    state = np.random.get_state()[1].copy()
    rollout(LoadBalanceEnv(), None)
    np.testing.assert_array_equal(np.random.get_state()[1], state)


@pytest.mark.parametrize("observation", LAYOUTS)
def test_returned_arrays_are_fresh(observation: str) -> None:
    env = LoadBalanceEnv(observation=observation)
    reference = rollout(LoadBalanceEnv(observation=observation), 0)

    def arrays(value: Any) -> list[np.ndarray]:
        values = value.values() if isinstance(value, dict) else [value]
        return [v for v in values if isinstance(v, np.ndarray)]

    observation_, info = env.reset(seed=0)
    seen = arrays(observation_) + arrays(info)
    rng = np.random.default_rng(0)
    for k in range(25):
        for array in seen:
            array[...] = 0
        observation_, reward, _, _, info = env.step(rng.integers(0, 3, 4))
        assert reward == reference[1][k]
        seen += arrays(observation_) + arrays(info)
    for a, b in itertools.combinations(seen, 2):
        assert not np.shares_memory(a, b)


# Info and the course of an episode


INFO_KEYS = {
    "sequence_id",
    "timestamp",
    "active",
    "active_servers",
    "weights",
    "completed",
    "rejected",
    "fct_mean",
    "fct_p50",
    "fct_p90",
    "fct_p99",
}


def test_info() -> None:
    env = LoadBalanceEnv()
    _, info = env.reset(seed=0)
    assert set(info) >= INFO_KEYS
    assert info["timestamp"] == 0.0
    assert info["active_servers"] == [0, 1, 2, 3]
    previous = info
    # No flow has ended yet.
    assert info["completed"] == info["rejected"] == 0
    assert info["fct_mean"] == info["fct_p50"] == info["fct_p90"] == info["fct_p99"] == 0.0
    completed = 0
    for k in range(40):
        *_, info = env.step([0, 1, 2, 2])
        assert set(info) == set(previous)
        assert info["sequence_id"] == previous["sequence_id"] + 1
        assert info["timestamp"] == pytest.approx(0.25 * (k + 1))
        assert info["active"].dtype == bool and info["active"].shape == (4,)
        assert info["weights"].dtype == np.float64
        fcts = [info[name] for name in ("fct_mean", "fct_p50", "fct_p90", "fct_p99")]
        if info["completed"]:
            assert 0 < fcts[1] <= fcts[2] <= fcts[3]
        else:
            assert fcts == [0.0] * 4
        assert info["rejected"] == 0
        completed += int(info["completed"])
        previous = info
    assert completed > 20


def test_rejected_flows_are_counted_with_the_timeout() -> None:
    full = Scenario(
        servers=(Server(workers=1, backlog=0),) * 2,
        workload=Workload(load=5.0, demand=Deterministic(mean=0.5)),
        reject_timeout=40.0,
    )
    env = LoadBalanceEnv(scenario=full, reward_type="rejected")
    env.reset(seed=0)
    rejected = 0
    for _ in range(20):
        _, reward, _, _, info = env.step([0, 0])
        rejected += int(info["rejected"])
        if info["rejected"]:
            assert info["fct_p99"] > 10
            assert reward == pytest.approx(-info["rejected"] / (info["rejected"] + info["completed"]))
    assert rejected > 20


def test_truncation_at_max_steps() -> None:
    env = LoadBalanceEnv(max_steps=7)
    endless = LoadBalanceEnv(max_steps=2**63 - 1)
    endless.reset()
    assert endless.step(np.zeros(4, int))[3] is False
    for _ in range(2):
        env.reset()
        ends = [env.step(np.zeros(4, int))[2:4] for _ in range(7)]
        assert ends == [(False, False)] * 6 + [(False, True)]


def test_defaults_are_the_published_ones() -> None:
    env = LoadBalanceEnv()
    assert env.scenario.num_servers == 4
    assert env.observation_space.shape == (4, 11)
    env.reset(seed=0)
    assert env.step([0, 0, 0, 0])[4]["timestamp"] == pytest.approx(0.25)
    assert LoadBalanceEnv(scenario="marllb-moderate").observation_space.shape == (7, 11)


# Options of reset


def flows_in(env: LoadBalanceEnv, seconds: float, **options: Any) -> int:
    env.reset(seed=3, options=options or None)
    return sum(int(env.step([0] * env.scenario.num_servers)[4]["completed"]) for _ in range(int(seconds / 0.25)))


def test_load_and_rate_options() -> None:
    env = LoadBalanceEnv()
    usual = flows_in(env, 30)
    assert flows_in(env, 30, load=0.05) < usual / 3
    assert flows_in(env, 30, rate=10.0) == pytest.approx(300, rel=0.25)
    with_default = LoadBalanceEnv()
    assert usual == flows_in(with_default, 30)


@pytest.mark.parametrize("of", [iter, np.array, lambda items: (item for item in items)], ids=["iter", "array", "yield"])
def test_lists_may_be_anything_that_holds_some(of: Callable[[list[Any]], Any]) -> None:
    env = LoadBalanceEnv(action_weights=of([1.0, 4.0]), features=of(["n_flow_on", "fct_mean"]))
    assert env.action_codec.to_weights([0, 1, 1, 0]).tolist() == [1.0, 4.0, 4.0, 1.0]
    assert env.observation_layout.features == ("n_flow_on", "fct_mean")
    env.reset(seed=0, options={"events": of([Event(time=0.5, kind="down", server=2)])})
    assert [env.step([0] * 4)[4]["active_servers"] for _ in range(3)][-1] == [0, 1, 3]
    flows = FlowDispatchEnv(server_fields=of(["work", "active"]))
    flows.reset(seed=0, options={"events": of([Event(time=0.0, kind="drain", server=1)])})
    assert 1 not in flows.step(0)[4]["active_servers"]


def test_options_hold_for_one_episode() -> None:
    env = LoadBalanceEnv()
    usual = flows_in(env, 10)
    flows_in(env, 10, load=0.05)
    assert flows_in(env, 10) == usual


def test_scenario_option() -> None:
    env = LoadBalanceEnv()
    slow = Scenario(
        name="slow",
        servers=servers_of((4, Server(speed=0.1))),
        workload=Workload(rate=1.0, demand=Deterministic(mean=0.1)),
    )
    env.reset(seed=0, options={"scenario": slow})
    fcts = [env.step([0] * 4)[4] for _ in range(200)]
    # A tenth of a core-second at a tenth of the speed.
    assert min(info["fct_mean"] for info in fcts if info["completed"]) > 0.9


def test_events_option() -> None:
    env = LoadBalanceEnv(max_steps=40)
    events = [Event(time=2.0, kind="down", server=1), Event(time=6.0, kind="up", server=1)]
    env.reset(seed=0, options={"events": events})
    states = []
    for _ in range(40):
        observation, _, _, _, info = env.step([0] * 4)
        states.append(bool(info["active"][1]))
        assert info["active_servers"] == ([0, 1, 2, 3] if states[-1] else [0, 2, 3])
        if not states[-1]:
            np.testing.assert_array_equal(observation[1], 0.0)
    assert states[:7] == [True] * 7 and not any(states[8:23]) and all(states[24:])


# Servers out of service


@pytest.mark.parametrize("kind", ["down", "drain"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inactive_servers_have_zero_rows_no_new_flows_and_no_say_in_the_reward(layout: str, kind: str) -> None:
    scenario = Scenario(
        servers=servers_of((3, Server())),
        workload=Workload(load=0.5),
        events=(Event(time=1.0, kind=kind, server=2),),  # type: ignore[arg-type]
    )
    env = LoadBalanceEnv(scenario=scenario, observation=layout, reward_type=number_of_servers)
    env.reset(seed=0)
    rewards = []
    for k in range(60):
        observation, reward, _, _, info = env.step([2, 2, 2])
        rewards.append(reward)
        if k < 5:
            continue
        assert info["active_servers"] == [0, 1] and info["active"].tolist() == [True, True, False]
        if layout == "dict":
            mask, features = observation["mask"], observation["features"]
        elif layout == "flat":
            mask, features = observation[:3], observation[3:].reshape(3, 11)
        else:
            mask, features = info["active"], observation
        np.testing.assert_array_equal(mask, [1, 1, 0])
        np.testing.assert_array_equal(features[2], 0.0)
        assert features[:2].any()
    assert rewards[0] == 3 and rewards[-1] == 2


def number_of_servers(snapshot: Any) -> Any:
    return snapshot.active.sum(axis=-1)


def test_no_server_left() -> None:
    scenario = Scenario(
        servers=servers_of((2, Server())),
        workload=Workload(load=0.5),
        events=tuple(Event(time=0.5, kind="down", server=j) for j in range(2)),
    )
    env = LoadBalanceEnv(scenario=scenario)
    env.reset(seed=0)
    for _ in range(20):
        observation, reward, terminated, _, info = env.step([0, 0])
        assert math.isfinite(reward) and not terminated
    assert not observation.any() and info["active_servers"] == [] and not info["active"].any()
    assert info["rejected"] > 0 and info["completed"] == 0


# Actions matter


def shares(dispatch: str, weights: list[float], seed: int = 1, steps: int = 200) -> tuple[np.ndarray, float]:
    """Time-mean share of open flows per server, and the mean reward, under constant weights."""
    scenario = Scenario(
        servers=servers_of((4, Server(cores=2, speed=2.0))),
        workload=Workload(rate=40.0, demand=Deterministic(mean=0.1)),
    )
    env = LoadBalanceEnv(scenario=scenario, dispatch=dispatch, action_type="continuous")
    env.reset(seed=seed)
    open_flows, rewards = np.zeros(4), []
    for _ in range(steps):
        observation, reward, *_ = env.step(np.array(weights))
        open_flows += observation[:, 0]
        rewards.append(reward)
    return open_flows / open_flows.sum(), float(np.mean(rewards))


@pytest.mark.parametrize("dispatch", ["wcmp", "sed", "maglev", "round_robin", "p2c_sed", "sed_scaled"])
def test_moving_weight_to_a_server_moves_flows_to_it(dispatch: str) -> None:
    even, _ = shares(dispatch, [1, 1, 1, 1])
    some, _ = shares(dispatch, [2, 1, 1, 1])
    most, _ = shares(dispatch, [8, 1, 1, 1])
    assert even[0] == pytest.approx(0.25, abs=0.1)
    assert some[0] > even[0] + 0.03
    assert most[0] > some[0] + 0.1


def test_flows_are_split_in_proportion_to_the_weights() -> None:
    env = LoadBalanceEnv(
        scenario=Scenario(
            servers=servers_of((4, Server(cores=64))),
            workload=Workload(rate=400.0, demand=Deterministic(mean=0.1)),
        ),
        dispatch="wcmp",
        action_type="continuous",
    )
    env.reset(seed=0)
    # Far from saturation every flow lasts 0.1 s, so open flows are in proportion to arrivals.
    total = np.zeros(4)
    for _ in range(400):
        total += env.step(np.array([1.0, 2.0, 3.0, 4.0]))[0][:, 0]
    np.testing.assert_allclose(total / total.sum(), [0.1, 0.2, 0.3, 0.4], atol=0.015)


@pytest.mark.parametrize("dispatch", ["wcmp", "sed"])
def test_two_weight_vectors_give_different_rewards_on_the_same_flows(dispatch: str) -> None:
    scenario = Scenario(
        servers=(Server(cores=1), Server(cores=1), Server(cores=4), Server(cores=4)), workload=Workload(load=0.8)
    )
    rewards = []
    for weights in ([1, 1, 1, 1], [1, 1, 4, 4], [1, 1, 4, 4]):
        env = LoadBalanceEnv(scenario=scenario, dispatch=dispatch, action_type="continuous", reward_type="mean_fct")
        env.reset(seed=7)
        total = 0.0
        for _ in range(200):
            _, reward, *_ = env.step(np.array(weights, float))
            total += reward
        rewards.append(total)
    assert rewards[0] != rewards[1] and rewards[1] == rewards[2]
    assert rewards[1] > rewards[0]  # weights that follow the cores serve the same flows sooner


def test_weights_do_not_matter_to_rules_without_weights() -> None:
    one, two = shares("lsq", [1, 1, 1, 1]), shares("lsq", [10, 1, 1, 1])
    np.testing.assert_array_equal(one[0], two[0])
    assert one[1] == two[1]


# Several balancers


def test_the_weights_go_to_every_balancer() -> None:
    env = LoadBalanceEnv(scenario="marllb-moderate", action_type="continuous", use_ground_truth=True)

    def busy_share(weights: list[float]) -> float:
        env.reset(seed=0)
        busy = sum(env.step(np.array(weights))[0][:, -1].astype(float) for _ in range(20))
        return float(busy[0] / busy.sum())

    assert busy_share([1.0] * 7) < 0.3
    # Had only one of the two balancers moved, the others' flows would still be spread.
    assert busy_share([10.0] + [0.1] * 6) > 0.9


def test_public_names() -> None:
    assert {"LoadBalanceEnv", "LoadBalanceVectorEnv"} <= set(lbgym.__all__)
    assert lbgym.__version__


def test_called_by_position_as_published() -> None:
    """``LoadBalanceEnv(shm_name, num_servers)``."""
    env = LoadBalanceEnv(None, 6)
    assert env.num_servers == 6
    with pytest.raises(RegionNotFoundError, match="marllb_lb0"):
        LoadBalanceEnv("marllb_lb0", 4, shm_timeout=0.01)


def test_loops_over_active_servers_as_published() -> None:
    scenario = Scenario(
        servers=servers_of((3, Server())),
        workload=Workload(load=0.5),
        events=(Event(time=0.1, kind="down", server=1),),
    )
    env = LoadBalanceEnv(scenario=scenario)
    observation, _ = env.reset(seed=0)
    for _ in range(20):
        observation, *_, info = env.step([0, 0, 0])
    assert info["active_servers"] == [0, 2] and info["active"].tolist() == [True, False, True]
    assert sum(observation[server, 0] for server in info["active_servers"]) == observation[:, 0].sum()


def test_limit_is_in_the_spec() -> None:
    """``TimeAwareObservation`` and its kin read it there."""
    env = gymnasium.make(ID, max_steps=5)
    assert env.spec is not None and env.spec.max_episode_steps == 5
    assert not isinstance(env.env, gymnasium.wrappers.TimeLimit) and not isinstance(env, gymnasium.wrappers.TimeLimit)
    aware = gymnasium.wrappers.TimeAwareObservation(env, flatten=False, normalize_time=True)
    aware.reset(seed=0)
    times = [aware.step(aware.action_space.sample())[0]["time"].item() for _ in range(5)]
    assert times == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    # The smaller of both limits counts, and a specification made of it gives the same limit.
    assert gymnasium.make(ID, max_steps=5, max_episode_steps=3).spec.max_episode_steps == 3  # type: ignore[union-attr]
    both = gymnasium.make(ID, max_steps=5, max_episode_steps=9)
    assert both.unwrapped.spec is not None and both.unwrapped.spec.max_episode_steps == 5
    again = gymnasium.make(gymnasium.envs.registration.EnvSpec.from_json(env.spec.to_json()))
    for each in (env, again):
        each.reset(seed=0)
        assert [each.step(each.action_space.sample())[3] for _ in range(5)] == [False] * 4 + [True]
    vector = gymnasium.make_vec(ID, num_envs=2, vectorization_mode="vector_entry_point", max_steps=7)
    assert vector.spec is not None and vector.spec.max_episode_steps == 7
    vector.close()
    assert LoadBalanceEnv().spec is None


def test_frames_are_stacked_by_stable_baselines3() -> None:
    """Its VecFrameStack takes only Box spaces; the layout "flat" holds the same numbers as "dict" in one."""
    pytest.importorskip("stable_baselines3")
    from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack

    stacked = VecFrameStack(DummyVecEnv([lambda: LoadBalanceEnv(observation="flat")]), 3)
    plain = LoadBalanceEnv(observation="flat")
    stacked.seed(4)
    stacked.reset()
    seen = [plain.reset(seed=4)[0]]
    for _ in range(4):
        rows, *_ = stacked.step(np.array([[0, 1, 2, 0]]))
        seen.append(plain.step([0, 1, 2, 0])[0])
    np.testing.assert_array_equal(rows[0], np.concatenate(seen[-3:]))


def test_example_of_the_docstring() -> None:
    import doctest

    import lbgym.env.single

    results = doctest.testmod(lbgym.env.single)
    assert results.attempted >= 4 and results.failed == 0
