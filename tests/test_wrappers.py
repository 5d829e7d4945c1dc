"""Wrappers: what reaches the environment below, and what comes back."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env

from lbgym import LoadBalanceEnv
from lbgym.env.wrappers import (
    DelayedAction,
    LegacyGymWrapper,
    MultiDiscreteToDiscrete,
    SmoothWeights,
    StripGroundTruth,
)
from lbgym.errors import (
    InvalidActionError,
    InvalidOptionError,
    LbgymError,
    ResetNeeded,
    UnknownNameError,
    UnsupportedSpaceError,
)
from lbgym.features import FEATURE_NAMES, GROUND_TRUTH_NAMES


class Echo(gymnasium.Env[np.ndarray, Any]):
    """An environment that keeps the actions it was given and ends after 12 steps, in either way."""

    def __init__(self, action_space: spaces.Space[Any], *, terminate: bool = False) -> None:
        self.action_space = action_space
        self.observation_space = spaces.Box(0, 100, (1,), np.float32)
        self.actions: list[Any] = []
        self.seeds: list[int | None] = []
        self.terminate = terminate

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.actions.clear()
        self.seeds.append(seed)
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> Any:
        self.actions.append(action)
        over = len(self.actions) >= 12
        observation = np.full(1, len(self.actions), np.float32)
        return observation, 1.0, over and self.terminate, over and not self.terminate, {}


def check(env: gymnasium.Env[Any, Any]) -> None:
    """Gymnasium's checker, which always warns that a wrapper is no bare environment."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*different from the unwrapped version")
        warnings.filterwarnings("ignore", message=".*alternative render modes")
        warnings.filterwarnings("ignore", message=".*maximum value is infinity")
        warnings.filterwarnings("ignore", message=".*symmetric and normalized")
        check_env(env)


def load_balance(**keys: Any) -> LoadBalanceEnv:
    return LoadBalanceEnv(**({"num_servers": 3, "max_steps": 50} | keys))


# MultiDiscreteToDiscrete


def test_every_combination_once() -> None:
    echo = Echo(spaces.MultiDiscrete([2, 3, 4], start=[0, 5, -1]))
    env = MultiDiscreteToDiscrete(echo)
    assert env.action_space == spaces.Discrete(24)
    seen = set()
    for index in range(24):
        action = env.action(index)
        assert action in echo.action_space
        assert env.reverse_action(action) == index
        seen.add(tuple(action.tolist()))
    assert len(seen) == 24
    assert env.action(1).tolist() == [0, 5, 0]


def test_joint_actions_agree_with_the_environments_own() -> None:
    wrapped = MultiDiscreteToDiscrete(load_balance(action_type="discrete"))
    joint = load_balance(action_type="joint")
    assert wrapped.action_space == joint.action_space
    codec = wrapped.get_wrapper_attr("action_codec")
    for index in range(27):
        np.testing.assert_array_equal(codec.to_weights(wrapped.action(index)), joint.action_codec.to_weights(index))


@pytest.mark.parametrize("action", [24, -1, 1.5, "a", [1, 2], None])
def test_joint_action_out_of_range(action: Any) -> None:
    env = MultiDiscreteToDiscrete(Echo(spaces.MultiDiscrete([2, 3, 4])))
    env.reset()
    with pytest.raises(InvalidActionError, match=r"0\.\.23"):
        env.step(action)


def test_too_many_combinations_and_other_spaces() -> None:
    with pytest.raises(UnsupportedSpaceError, match=r"6,561 combinations.*max_actions=4,096"):
        MultiDiscreteToDiscrete(Echo(spaces.MultiDiscrete([3] * 8)))
    assert MultiDiscreteToDiscrete(Echo(spaces.MultiDiscrete([3] * 8)), max_actions=10_000).action_space.n == 6561
    for limit in ("x", 0, 1.5, None):
        with pytest.raises(InvalidOptionError, match="max_actions must be a whole number of at least 1"):
            MultiDiscreteToDiscrete(Echo(spaces.MultiDiscrete([3, 3])), max_actions=limit)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedSpaceError, match="Box"):
        MultiDiscreteToDiscrete(Echo(spaces.Box(-1, 1, (2,))))


# SmoothWeights


def test_smoothing_is_exponential() -> None:
    echo = Echo(spaces.Box(-1, 1, (2,), np.float32))
    env = SmoothWeights(echo, rate=0.25)
    env.reset()
    env.step(np.array([1.0, -1.0]))
    for _ in range(8):
        env.step(np.array([0.0, 0.0]))
    expected = 0.75 ** np.arange(9)
    np.testing.assert_allclose(np.array(echo.actions)[:, 0], expected, rtol=1e-6)
    np.testing.assert_allclose(np.array(echo.actions)[:, 1], -expected, rtol=1e-6)
    assert all(a in echo.action_space for a in echo.actions)


def test_smoothing_forgets_at_reset_and_rate_one_changes_nothing() -> None:
    echo = Echo(spaces.Box(-1, 1, (1,), np.float32))
    env = SmoothWeights(echo, rate=0.5)
    for _ in range(2):
        env.reset()
        env.step(np.array([0.8], np.float32))
        assert echo.actions[0] == pytest.approx(0.8)
    direct = SmoothWeights(echo, rate=1.0)
    direct.reset()
    asked = np.random.default_rng(0).uniform(-1, 1, (10, 1)).astype(np.float32)
    for action in asked:
        direct.step(action)
    np.testing.assert_array_equal(echo.actions, asked)


def test_smoothing_clips_first() -> None:
    echo = Echo(spaces.Box(0.1, 10, (1,), np.float32))
    env = SmoothWeights(echo, rate=0.5)
    env.reset()
    env.step(np.array([1e9]))
    env.step(np.array([0.1]))
    assert echo.actions[0] == pytest.approx(10) and echo.actions[1] == pytest.approx(5.05)


@pytest.mark.parametrize("action", [[np.nan, 0.0], [np.inf, 0.0], [0.0], [[0.0, 0.0]], "ab", None])
def test_smoothing_refuses_what_the_environment_would(action: Any) -> None:
    env = SmoothWeights(Echo(spaces.Box(-1, 1, (2,), np.float32)))
    env.reset()
    with pytest.raises(InvalidActionError, match="action must"):
        env.step(action)


def test_smoothing_needs_a_box_and_a_rate() -> None:
    with pytest.raises(UnsupportedSpaceError, match="MultiDiscrete"):
        SmoothWeights(Echo(spaces.MultiDiscrete([3, 3])))
    for rate in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="rate"):
            SmoothWeights(Echo(spaces.Box(-1, 1, (2,))), rate)


def test_smoothed_weights_move_gradually() -> None:
    env = SmoothWeights(load_balance(action_type="normalized"), rate=0.5)
    env.reset(seed=1)
    weights = []
    for k in range(6):
        *_, info = env.step(np.full(3, -1.0 if k == 0 else 1.0, np.float32))
        weights.append(info["weights"][0])
    np.testing.assert_allclose(np.log10(weights), 1 - 2 * 0.5 ** np.arange(6), atol=1e-5)


# DelayedAction


@pytest.mark.parametrize("delay", [0, 1, 3])
def test_fixed_delay(delay: int) -> None:
    echo = Echo(spaces.Discrete(100))
    env = DelayedAction(echo, delay, initial_action=99)
    env.reset()
    infos = [env.step(k)[4] for k in range(10)]
    assert echo.actions == [99] * delay + list(range(10 - delay))
    assert [i["action_delay"] for i in infos] == [-1] * delay + [delay] * (10 - delay)


def test_random_delay_never_goes_back_and_stays_in_its_range() -> None:
    echo = Echo(spaces.Discrete(10_000))
    env = DelayedAction(echo, (1, 4), initial_action=9_999)
    env.reset(seed=3)
    delays = []
    for k in range(2_000):
        delays.append(env.step(k)[4]["action_delay"])
        if k >= 4:
            assert echo.actions[-1] == k - delays[-1]
    applied = echo.actions[4:]
    assert all(a <= b for a, b in itertools.pairwise(applied))
    assert set(delays[4:]) == {1, 2, 3, 4}
    assert len(set(applied)) < len(applied)  # some were overtaken, so others held for longer


def test_random_delay_follows_the_seed() -> None:
    def delays(seed: int | None) -> list[int]:
        env.reset(seed=seed)
        return [env.step(0)[4]["action_delay"] for _ in range(40)]

    env = DelayedAction(Echo(spaces.Discrete(2)), (0, 5))
    first = delays(7)
    assert delays(7) == first
    assert delays(None) != first
    assert delays(8) != first


def test_delay_leaves_the_flows_alone() -> None:
    # The same seed gives the same flows with and without the wrapper, in this episode and in the next.
    def completed(env: gymnasium.Env[Any, Any]) -> list[int]:
        counts = []
        for seed in (5, None):
            env.reset(seed=seed)
            counts += [int(np.sum(env.step(np.zeros(3, np.int64))[4]["completed"])) for _ in range(20)]
        return counts

    assert completed(load_balance()) == completed(DelayedAction(load_balance(), (1, 3)))


def test_actions_under_way_are_lost_at_reset_and_are_copies() -> None:
    echo = Echo(spaces.Box(-1, 1, (1,), np.float32))
    env = DelayedAction(echo, 2)
    env.reset()
    action = np.array([0.5], np.float32)
    env.step(action)
    action[:] = -0.5
    env.step(action)
    env.step(action)
    assert echo.actions[2] == pytest.approx(0.5)
    env.reset()
    env.step(action)
    assert echo.actions[0] == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        (spaces.MultiDiscrete([3, 3]), [0, 0]),
        (spaces.MultiDiscrete([3, 3], start=[1, 1]), [1, 1]),
        (spaces.Discrete(9), 0),
        (spaces.Box(-1, 1, (2,), np.float32), [0, 0]),
        (spaces.Box(0.1, 10, (2,), np.float32), [1, 1]),
        (spaces.Box(2, 10, (2,), np.float32), [2, 2]),
    ],
)
def test_until_the_first_action_arrives_weights_are_equal(space: spaces.Space[Any], expected: Any) -> None:
    echo = Echo(space)
    env = DelayedAction(echo, 1)
    env.reset()
    env.step(space.sample())
    np.testing.assert_array_equal(echo.actions[0], expected)
    assert echo.actions[0] in space


@pytest.mark.parametrize(
    ("space", "wrong"),
    [
        (spaces.Discrete(3), 3),
        (spaces.Discrete(3), 0.5),
        (spaces.Discrete(3), None),
        (spaces.Discrete(3), 1.0),
        (spaces.Discrete(3), np.array([1])),
        (spaces.Discrete(3), True),
        (spaces.Discrete(3), "1"),
        (spaces.MultiDiscrete([3, 3]), [True, False]),
        (spaces.MultiDiscrete([3, 3]), [[0], [1, 2]]),
        (spaces.Box(-1, 1, (2,)), ["0", "1"]),
        (spaces.MultiDiscrete([3, 3]), [0, 3]),
        (spaces.MultiDiscrete([3, 3]), np.array([0])),
        (spaces.Box(-1, 1, (2,)), [np.nan, 0]),
        (spaces.Box(-1, 1, (2,)), [0.0]),
    ],
)
def test_a_delayed_action_is_refused_when_it_is_given(space: spaces.Space[Any], wrong: Any) -> None:
    env = DelayedAction(Echo(space), 5)
    env.reset()
    with pytest.raises(InvalidActionError, match="action must"):
        env.step(wrong)


def test_delay_arguments() -> None:
    for delay in (-1, (2, 1), (-1, 3), 1.5, True, (0.5, 1)):
        with pytest.raises(ValueError, match="delay"):
            DelayedAction(Echo(spaces.Discrete(2)), delay)  # type: ignore[arg-type]
    for action in (5, 1.0, True, [[0], [0, 1]]):
        with pytest.raises(InvalidActionError, match="initial_action"):
            DelayedAction(Echo(spaces.Discrete(2)), 1, initial_action=action)
    for space, fits in (
        (spaces.Box(-1, 1, (2,)), np.zeros(2, np.float32)),
        (spaces.Tuple([spaces.Discrete(2)] * 2), (0, 1)),
    ):
        env = DelayedAction(Echo(space), 1, initial_action=fits)
        env.reset()
        env.step(fits)
    with pytest.raises(UnsupportedSpaceError, match="initial_action"):
        DelayedAction(Echo(spaces.Text(3)), 1)
    with pytest.raises(ResetNeeded, match="reset"):
        DelayedAction(Echo(spaces.Discrete(2)), 1).step(0)


@pytest.mark.parametrize("action_type", ["discrete", "joint", "continuous", "index"])
def test_what_a_delay_takes_the_environment_takes(action_type: str) -> None:
    keys: dict[str, Any] = {"action_type": action_type, "dispatch": "marginal"}
    bare, env = load_balance(**keys), DelayedAction(load_balance(**keys), 0)
    given = [1, 1.0, True, np.int32(2), np.array(1), np.array([1]), [0, 1, 2], (0, 1, 2), [0.0, 1.0, 2.0], "012", None]
    given += [
        np.zeros((3, 2)),
        np.zeros((3, 2), bool),
        np.zeros(3, bool),
        ["0", "1", "2"],
        [[0, 1], [2]],
        [0, 1, np.nan],
    ]

    def taken(env: gymnasium.Env[Any, Any], action: Any) -> bool:
        env.reset(seed=0)
        try:
            env.step(action)
        except InvalidActionError:
            return False
        return True

    assert [taken(env, action) for action in given] == [taken(bare, action) for action in given]


@pytest.mark.parametrize("make", [lambda env: DelayedAction(env, 3), SmoothWeights])
def test_a_refused_reset_forgets_nothing(make: Callable[[gymnasium.Env[Any, Any]], gymnasium.Env[Any, Any]]) -> None:
    def weights(refused: list[dict[str, Any]]) -> list[np.ndarray]:
        env = make(load_balance(action_type="normalized"))
        env.reset(seed=2)
        seen = [env.step(np.full(3, 0.5, np.float32))[4]["weights"] for _ in range(3)]
        for keys in refused:
            with pytest.raises(InvalidOptionError):
                env.reset(**keys)
        return seen + [env.step(np.array([-1, 0, 1], np.float32))[4]["weights"] for _ in range(5)]

    bad: list[dict[str, Any]] = [
        {"seed": -1},
        {"seed": 1.5},
        {"options": {"events": 5}},
        {"seed": 1, "options": {"events": 5}},
    ]
    np.testing.assert_array_equal(weights(bad), weights([]))


# StripGroundTruth


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("observation", ["matrix", "flat", "dict"])
def test_stripped_is_what_the_balancer_sees(observation: str, normalize: bool) -> None:
    keys: dict[str, Any] = {"observation": observation, "normalize": normalize}
    plain = load_balance(**keys)
    env = StripGroundTruth(load_balance(use_ground_truth=True, **keys))
    assert env.observation_space == plain.observation_space
    action = np.array([0, 1, 2])
    pairs = [(env.reset(seed=4), plain.reset(seed=4))]
    for _ in range(10):
        step, expected = env.step(action), plain.step(action)
        assert step[1] == expected[1]
        pairs.append(((step[0], step[4]), (expected[0], expected[4])))
    for (stripped, info), (expected, _) in pairs:
        assert stripped in env.observation_space
        if observation == "dict":
            assert stripped.keys() == expected.keys()
            for key in stripped:
                np.testing.assert_array_equal(stripped[key], expected[key])
        else:
            np.testing.assert_array_equal(stripped, expected)
        assert info["ground_truth"].shape == (3, len(GROUND_TRUTH_NAMES))
    assert any(info["ground_truth"].any() for (_, info), _ in pairs)


def test_stripped_truth_is_the_truth() -> None:
    bare = load_balance(use_ground_truth=True)
    env = StripGroundTruth(load_balance(use_ground_truth=True))
    bare.reset(seed=1)
    env.reset(seed=1)
    for _ in range(5):
        full = bare.step(np.zeros(3, np.int64))[0]
        info = env.step(np.zeros(3, np.int64))[4]
    np.testing.assert_array_equal(info["ground_truth"], full[:, len(FEATURE_NAMES) :])


def test_nothing_to_strip() -> None:
    with pytest.raises(UnsupportedSpaceError, match="use_ground_truth=True"):
        StripGroundTruth(load_balance())
    with pytest.raises(UnsupportedSpaceError, match="lbgym environment"):
        StripGroundTruth(Echo(spaces.Discrete(2)))
    stacked = gymnasium.wrappers.FrameStackObservation(load_balance(use_ground_truth=True), 2)
    with pytest.raises(UnsupportedSpaceError, match="before wrappers that change the observation") as caught:
        StripGroundTruth(stacked)
    assert isinstance(caught.value, LbgymError)


@pytest.mark.parametrize("observation", ["matrix", "flat", "dict"])
def test_what_is_stripped_has_no_name_and_no_second_time(observation: str) -> None:
    env = StripGroundTruth(load_balance(num_servers=5, use_ground_truth=True, observation=observation))
    assert env.get_wrapper_attr("feature_columns") == FEATURE_NAMES
    assert gymnasium.wrappers.TimeLimit(env, 5).get_wrapper_attr("feature_columns") == FEATURE_NAMES
    with pytest.raises(UnsupportedSpaceError, match="use_ground_truth=True"):
        StripGroundTruth(env)


@pytest.mark.parametrize("observation", ["matrix", "dict"])
def test_another_order_of_as_many_numbers_is_not_stripped(observation: str) -> None:
    # Of dictionaries Gymnasium puts the features first and the mask last.
    bare = load_balance(num_servers=15, use_ground_truth=True, observation=observation)
    with pytest.raises(UnsupportedSpaceError, match="before wrappers that change the observation"):
        StripGroundTruth(gymnasium.wrappers.FlattenObservation(bare))


# LegacyGymWrapper


def test_old_interface() -> None:
    env = LegacyGymWrapper(load_balance(max_steps=5))
    observation = env.reset()
    assert isinstance(observation, np.ndarray) and observation.shape == (3, 11)
    for k in range(5):
        observation, reward, done, info = env.step(env.action_space.sample())
        assert isinstance(reward, float) and done is (k == 4)
        assert ("TimeLimit.truncated" in info) is done
    assert info["TimeLimit.truncated"] is True
    assert env.observation_space.contains(observation)
    assert env.metadata["render_modes"] and env.num_servers == 3
    assert isinstance(env.unwrapped, LoadBalanceEnv)
    env.close()


def test_old_seeds() -> None:
    env = LegacyGymWrapper(load_balance())
    assert env.seed(np.uint8(4)) == [4]  # type: ignore[arg-type]
    for seed in (-1, 1.5, "x"):
        with pytest.raises(InvalidOptionError, match="seed must be a whole number of at least 0"):
            env.seed(seed)  # type: ignore[arg-type]


def test_termination_is_no_time_limit() -> None:
    env = LegacyGymWrapper(Echo(spaces.Discrete(2), terminate=True))
    env.reset()
    done = False
    while not done:
        _, _, done, info = env.step(0)
    assert info["TimeLimit.truncated"] is False


def test_old_seeding() -> None:
    echo = Echo(spaces.Discrete(2))
    env = LegacyGymWrapper(echo)
    assert env.seed(11) == [11]
    env.reset()
    env.reset()
    env.reset(seed=12)
    assert echo.seeds == [11, None, 12]
    (drawn,) = env.seed()
    observation, info = env.reset(return_info=True)
    assert echo.seeds[-1] == drawn and info == {} and observation.shape == (1,)

    balanced = LegacyGymWrapper(load_balance())

    def run() -> np.ndarray:
        balanced.seed(3)
        balanced.reset()
        return balanced.step(np.array([1, 0, 2]))[0]

    np.testing.assert_array_equal(run(), run())


def test_old_render_and_context() -> None:
    with LegacyGymWrapper(load_balance(render_mode="ansi")) as env:
        env.reset()
        assert "server" in env.render() and env.render(mode="ansi") == env.render()
        with pytest.raises(UnknownNameError, match="humn"):
            env.render(mode="humn")
        with pytest.raises(AttributeError):
            env.no_such_attribute  # noqa: B018
    assert not isinstance(env, gymnasium.Env)
    other = LegacyGymWrapper(Echo(spaces.Discrete(2)))
    other.reset()
    with pytest.raises(ValueError, match=r"mode='human'.*render_mode=None"):
        other.render(mode="human")


def test_old_render_without_a_mode_at_construction(capsys: pytest.CaptureFixture[str]) -> None:
    env = LegacyGymWrapper(gymnasium.make("lbgym:lbgym/LoadBalance-v0"))
    env.reset()
    assert env.render() is None and capsys.readouterr().out == ""
    for step in range(3):
        assert env.render(mode="human") is None
        assert f"step {step} " in capsys.readouterr().out
        assert f"step {step} " in env.render(mode="ansi")
        env.step(env.action_space.sample())
    env.close()


# All of them


@pytest.mark.parametrize(
    ("wrap", "keys"),
    [
        (MultiDiscreteToDiscrete, {}),
        (lambda e: SmoothWeights(e, 0.3), {"action_type": "continuous"}),
        (lambda e: SmoothWeights(e, 0.3), {"action_type": "normalized", "normalize": True}),
        (lambda e: DelayedAction(e, 2), {}),
        (lambda e: DelayedAction(e, (0, 2)), {"action_type": "normalized"}),
        (lambda e: DelayedAction(e, (1, 2)), {"action_type": "joint"}),
        (StripGroundTruth, {"use_ground_truth": True}),
        (StripGroundTruth, {"use_ground_truth": True, "observation": "flat"}),
        (StripGroundTruth, {"use_ground_truth": True, "observation": "dict"}),
    ],
)
def test_gymnasium_checks_them(wrap: Any, keys: dict[str, Any]) -> None:
    check(wrap(load_balance(**keys)))


def test_they_stack_and_can_be_made_again_from_the_spec() -> None:
    env = gymnasium.make("lbgym:lbgym/LoadBalance-v0", action_type="normalized", use_ground_truth=True, max_steps=20)
    env = SmoothWeights(DelayedAction(StripGroundTruth(env), (1, 2)), 0.5)
    assert env.spec is not None
    again = gymnasium.make(env.spec)
    for one in (env, again):
        one.action_space.seed(0)
    results = [one.reset(seed=2)[0] for one in (env, again)]
    for _ in range(10):
        np.testing.assert_array_equal(*results)
        results = [one.step(one.action_space.sample())[0] for one in (env, again)]
    np.testing.assert_array_equal(*results)
