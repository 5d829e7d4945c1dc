"""The vector environment against single environments, replica by replica and bit for bit."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv

from lbgym import FlowDispatchVectorEnv, LoadBalanceEnv, LoadBalanceVectorEnv, MultiLoadBalanceVectorEnv
from lbgym.errors import InvalidActionError, InvalidOptionError, ResetNeeded, UnknownNameError
from lbgym.scenarios import Scenario, Server, Workload

MODES = [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP, AutoresetMode.DISABLED]
LAYOUTS = ["matrix", "flat", "dict"]
ACTIONS = ["discrete", "joint", "continuous", "normalized"]

pytestmark = pytest.mark.contract


def keys_of(**changes: Any) -> dict[str, Any]:
    return {"num_servers": 3, "max_steps": 6, "scenario": small_scenario()} | changes


def small_scenario() -> Scenario:
    servers = (Server(cores=1), Server(cores=2), Server(cores=4, workers=4, backlog=4))
    return Scenario(name="small", servers=servers, workload=Workload(load=0.9))


def equal(a: Any, b: Any) -> None:
    """The same values of the same types, to the bit."""
    if isinstance(a, dict):
        assert isinstance(b, dict) and a.keys() == b.keys()
        for key in a:
            equal(a[key], b[key])
    elif isinstance(a, (tuple, list)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            equal(x, y)
    else:
        x, y = np.asarray(a), np.asarray(b)
        assert x.dtype == y.dtype and x.shape == y.shape
        if x.dtype == object and any(isinstance(value, (np.ndarray, dict)) for value in x.flat):
            equal(x.tolist(), y.tolist())
            return
        np.testing.assert_array_equal(x, y)


def equal_infos(native: dict[str, Any], reference: dict[str, Any]) -> None:
    """The same under the ``_key`` masks; a key only one side has must be masked out everywhere."""
    names = {name for name in (*native, *reference) if not name.startswith("_")}
    assert names, "infos must not be empty"
    for name in sorted(names):
        if name not in native or name not in reference:
            side = native if name in native else reference
            assert not side[f"_{name}"].any(), f"only one side has {name}"
            continue
        mask = native[f"_{name}"]
        assert mask.dtype == np.bool_
        np.testing.assert_array_equal(mask, reference[f"_{name}"], err_msg=name)
        if isinstance(native[name], dict):
            equal_infos(native[name], reference[name])
        elif name == "final_obs":
            assert native[name].dtype == object
            for i in range(len(mask)):
                if mask[i]:
                    equal(native[name][i], reference[name][i])
                else:
                    assert native[name][i] is None
        else:
            equal(native[name][mask], reference[name][mask])


def compare(keys: dict[str, Any], mode: AutoresetMode, *, steps: int, num_envs: int = 4, **native_keys: Any) -> int:
    """Run a native and a SyncVectorEnv side by side from one seed; returns how many episodes ended."""
    native = LoadBalanceVectorEnv(num_envs=num_envs, autoreset_mode=mode, **native_keys, **keys)
    reference = SyncVectorEnv([lambda: LoadBalanceEnv(**keys)] * num_envs, autoreset_mode=mode)
    assert native.single_observation_space == reference.single_observation_space
    assert native.single_action_space == reference.single_action_space
    assert native.observation_space == reference.observation_space
    assert native.action_space == reference.action_space
    native.action_space.seed(1)

    def reset(seed: Any, mask: np.ndarray | None = None) -> None:
        def options() -> dict[str, Any] | None:
            return None if mask is None else {"reset_mask": mask.copy()}

        results = native.reset(seed=seed, options=options()), reference.reset(seed=seed, options=options())
        equal(results[0][0], results[1][0])
        equal_infos(results[0][1], results[1][1])

    reset(21)
    ended = 0
    done = np.zeros(num_envs, bool)
    for k in range(steps):
        if mode == AutoresetMode.DISABLED and done.any():
            reset(None, done)
        if k == 2:
            # From here the replicas are out of step with each other.
            reset([77] * num_envs, np.arange(num_envs) % 2 == 0)
        action = native.action_space.sample()
        one, two = native.step(action), reference.step(action)
        for a, b in zip(one[:4], two[:4], strict=True):
            equal(a, b)
        equal_infos(one[4], two[4])
        done = one[2] | one[3]
        ended += int(done.sum())
    native.close()
    reference.close()
    return ended


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("observation", LAYOUTS)
def test_equal_to_single_environments_over_several_episodes(mode: AutoresetMode, observation: str) -> None:
    ended = compare(keys_of(observation=observation, use_ground_truth=True), mode, steps=24)
    assert ended >= 8


@pytest.mark.parametrize("action_type", ACTIONS)
@pytest.mark.parametrize("normalize", [False, True])
def test_equal_for_every_action(action_type: str, normalize: bool) -> None:
    compare(keys_of(action_type=action_type, normalize=normalize), AutoresetMode.SAME_STEP, steps=15)


@pytest.mark.parametrize(
    "changes",
    [
        {"reward_type": {"jain": 1.0, "p99_fct": 0.5, "gini:n_flow_on": 0.25}, "reward_field": "fct_mean"},
        {"reward_type": "var", "reward_field": "cpu_usage"},
        {"dispatch": "wcmp", "step_interval": 1.0},
        {"dispatch": "maglev"},
        {"scenario": "failure", "num_servers": None, "step_interval": 5.0},
        {"scenario": "marllb-moderate", "num_servers": None},
        {"scenario": None, "num_servers": 1},
        {"scenario": None, "num_servers": 40, "action_type": "normalized"},
    ],
    ids=str,
)
def test_equal_for_rewards_rules_and_scenarios(changes: dict[str, Any]) -> None:
    compare(keys_of(**changes), AutoresetMode.NEXT_STEP, steps=10, num_envs=3)


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_equal_when_options_end_with_their_episode(mode: AutoresetMode) -> None:
    native = LoadBalanceVectorEnv(num_envs=3, autoreset_mode=mode, **keys_of())
    reference = SyncVectorEnv([lambda: LoadBalanceEnv(**keys_of())] * 3, autoreset_mode=mode)
    options = {"load": 0.2}
    equal(native.reset(seed=4, options=options)[0], reference.reset(seed=4, options=options)[0])
    action = np.array([[0, 1, 2]] * 3)
    ended = 0
    for _ in range(20):
        one, two = native.step(action), reference.step(action)
        for a, b in zip(one[:4], two[:4], strict=True):
            equal(a, b)
        equal_infos(one[4], two[4])
        ended += int(one[3].sum())
    assert ended >= 6


@pytest.mark.parametrize("bad", [[1, 2, -3], [3, np.int64(4), "x"], [3, None, 1.5]], ids=str)
def test_a_refused_seed_changes_nothing(bad: Any) -> None:
    def rewards(refuse: bool) -> np.ndarray:
        env = LoadBalanceVectorEnv(num_envs=3, **keys_of())
        env.reset(seed=4)
        if refuse:
            with pytest.raises(ValueError, match="seed"):
                env.reset(seed=bad, options={"load": 0.2})
        return np.array([run_to_end(env, 1)[1] for _ in range(15)])

    np.testing.assert_array_equal(rewards(True), rewards(False))


def test_equal_with_a_callable_reward() -> None:
    def total(snapshot: Any) -> Any:
        return -snapshot.stats[..., 0].sum(axis=-1, dtype=np.float64)

    compare(keys_of(reward_type=total), AutoresetMode.NEXT_STEP, steps=10)


@pytest.mark.parametrize("mode", MODES)
def test_equal_on_two_threads(mode: AutoresetMode) -> None:
    compare(keys_of(), mode, steps=15, num_envs=5, num_threads=2)


def test_one_thread_or_two_is_the_same() -> None:
    def run(num_threads: int) -> list[Any]:
        env = LoadBalanceVectorEnv(num_envs=33, num_threads=num_threads, **keys_of(max_steps=9))
        env.action_space.seed(0)
        results: list[Any] = [env.reset(seed=5)]
        results += [env.step(env.action_space.sample()) for _ in range(30)]
        return results

    one, two = run(1), run(2)
    for a, b in zip(one, two, strict=True):
        equal(a[:-1], b[:-1])
        equal_infos(a[-1], b[-1])


def test_a_replica_does_not_depend_on_the_others() -> None:
    def rewards(seeds: list[int], which: int) -> list[float]:
        env = LoadBalanceVectorEnv(num_envs=len(seeds), **keys_of(max_steps=100))
        env.reset(seed=seeds)
        action = np.zeros(env.action_space.shape, np.int64)
        return [float(env.step(action)[1][which]) for _ in range(20)]

    assert rewards([1, 2, 3, 4], 2) == rewards([9, 3], 1)


# Autoreset


def run_to_end(env: VectorEnv[Any, Any, Any], steps: int) -> tuple[Any, ...]:
    action = np.zeros(env.action_space.shape, np.int64)
    for _ in range(steps):
        result = env.step(action)
    return result


def test_next_step_resets_on_the_step_after() -> None:
    env = LoadBalanceVectorEnv(num_envs=2, autoreset_mode="NextStep", **keys_of())
    env.reset(seed=0)
    _, _, terminated, truncated, info = run_to_end(env, 6)
    assert truncated.all() and not terminated.any()
    assert info["sequence_id"].min() > 1
    # The action of the resetting step is ignored; it may even be one that ``step`` would refuse.
    observation, reward, terminated, truncated, info = env.step(np.ones((2, 3), np.int64))
    np.testing.assert_array_equal(reward, 0.0)
    assert not truncated.any() and not terminated.any()
    np.testing.assert_array_equal(info["timestamp"], 0.0)
    assert observation in env.observation_space


def test_same_step_hands_over_the_final_observation_and_info() -> None:
    env = LoadBalanceVectorEnv(num_envs=3, autoreset_mode=AutoresetMode.SAME_STEP, **keys_of())
    env.reset(seed=0)
    *_, info = run_to_end(env, 5)
    assert "final_obs" not in info or not info["_final_obs"].any()
    observation, _, _, truncated, info = run_to_end(env, 1)
    assert truncated.all() and info["_final_obs"].all() and info["_final_info"].all()
    assert info["final_obs"].dtype == object
    for i in range(3):
        assert info["final_obs"][i] in env.single_observation_space
        assert not np.array_equal(info["final_obs"][i], observation[i])
    np.testing.assert_allclose(info["final_info"]["timestamp"], 1.5)
    np.testing.assert_array_equal(info["timestamp"], 0.0)
    assert not observation.any()


def test_disabled_needs_a_reset_of_the_ended_replicas() -> None:
    env = LoadBalanceVectorEnv(num_envs=2, autoreset_mode=AutoresetMode.DISABLED, **keys_of())
    env.reset(seed=0)
    *_, truncated, _ = run_to_end(env, 6)
    assert truncated.all()
    with pytest.raises(ResetNeeded):
        run_to_end(env, 1)
    env.reset(options={"reset_mask": np.array([True, False])})
    with pytest.raises(ResetNeeded):
        run_to_end(env, 1)
    env.reset(options={"reset_mask": np.array([False, True])})
    *_, truncated, _ = run_to_end(env, 1)
    assert not truncated.any()


def test_reset_mask_is_not_taken_from_the_caller_and_leaves_the_others() -> None:
    env = LoadBalanceVectorEnv(num_envs=3, autoreset_mode=AutoresetMode.DISABLED, **keys_of(max_steps=50))
    env.reset(seed=0)
    before, *_ = run_to_end(env, 5)
    mask = np.array([False, True, False])
    options = {"reset_mask": mask}
    observation, info = env.reset(seed=[4, 5, 6], options=options)
    assert options.keys() == {"reset_mask"} and options["reset_mask"] is mask
    np.testing.assert_array_equal(mask, [False, True, False])
    np.testing.assert_array_equal(observation[~mask], before[~mask])
    np.testing.assert_array_equal(info["_timestamp"], mask)
    single = LoadBalanceEnv(**keys_of(max_steps=50))
    expected, _ = single.reset(seed=5)
    np.testing.assert_array_equal(observation[1], expected)
    action = np.array([[0, 1, 2]] * 3)
    np.testing.assert_array_equal(env.step(action)[0][1], single.step(action[0])[0])


@pytest.mark.parametrize(
    "mask",
    [[True, False], np.array([1, 0]), np.array([True]), np.array([False, False]), np.array([[True, False]])],
    ids=repr,
)
def test_bad_reset_masks(mask: Any) -> None:
    env = LoadBalanceVectorEnv(num_envs=2, **keys_of())
    env.reset(seed=0)
    with pytest.raises((ValueError, TypeError), match="reset_mask"):
        env.reset(options={"reset_mask": mask})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("make", [LoadBalanceVectorEnv, MultiLoadBalanceVectorEnv, FlowDispatchVectorEnv])
def test_the_first_reset_is_of_every_replica(make: Any, mode: AutoresetMode) -> None:
    env = make(3, autoreset_mode=mode, scenario=small_scenario())
    with pytest.raises(ResetNeeded, match=r"first reset must be of every replica.*reset_mask"):
        env.reset(seed=0, options={"reset_mask": np.array([True, False, False])})
    env.reset(seed=0, options={"reset_mask": np.ones(3, np.bool_)})
    env.step(env.action_space.sample())


def test_reset_options_reach_the_replicas() -> None:
    env = LoadBalanceVectorEnv(num_envs=4, autoreset_mode=AutoresetMode.DISABLED, **keys_of(max_steps=1000))

    def completed(load: float, mask: np.ndarray | None = None) -> np.ndarray:
        options: dict[str, Any] = {"load": load}
        if mask is not None:
            options["reset_mask"] = mask
        env.reset(seed=[3] * 4, options=options)
        total = np.zeros(4)
        for _ in range(40):
            total += run_to_end(env, 1)[4]["completed"]
        return total

    low, high = completed(0.1), completed(0.8)
    assert (high > 3 * low).all()
    assert len(set(low)) == 1
    mixed = completed(0.1, np.array([True, False, False, False]))
    assert mixed[0] == low[0] and (mixed[1:] > 3 * low[0]).all()


# Construction


def test_make_vec() -> None:
    env = gymnasium.make_vec("lbgym:lbgym/LoadBalance-v0", num_envs=64, num_servers=4)
    assert isinstance(env.unwrapped, LoadBalanceVectorEnv)
    assert env.num_envs == 64
    assert env.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    assert env.unwrapped.autoreset_mode is AutoresetMode.NEXT_STEP
    assert env.spec is not None and env.spec.id == "lbgym/LoadBalance-v0"
    observation, info = env.reset(seed=0)
    assert observation.shape == (64, 4, 11) and observation in env.observation_space
    assert info["weights"].shape == (64, 4) and info["_weights"].all()
    for _ in range(3):
        observation, reward, terminated, truncated, _ = env.step(env.action_space.sample())
    assert observation in env.observation_space
    assert reward.shape == (64,) and reward.dtype == np.float64
    assert terminated.dtype == truncated.dtype == np.bool_
    env.close()


@pytest.mark.parametrize("mode", [*MODES, *(m.value for m in MODES)])
def test_autoreset_mode_is_per_instance(mode: AutoresetMode | str) -> None:
    shared = LoadBalanceEnv.metadata.copy()
    env = gymnasium.make_vec("lbgym:lbgym/LoadBalance-v0", num_envs=2, autoreset_mode=mode)
    assert env.unwrapped.autoreset_mode is AutoresetMode(mode)
    assert env.metadata["autoreset_mode"] is AutoresetMode(mode)
    other = LoadBalanceVectorEnv(num_envs=2)
    assert other.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    assert shared == LoadBalanceEnv.metadata
    assert LoadBalanceVectorEnv.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP) is AutoresetMode.NEXT_STEP


def test_sync_vectorization_still_works() -> None:
    env = gymnasium.make_vec("lbgym:lbgym/LoadBalance-v0", num_envs=2, vectorization_mode="sync", max_steps=5)
    assert isinstance(env.unwrapped, SyncVectorEnv)
    env.reset(seed=0)
    env.step(env.action_space.sample())


def test_max_episode_steps() -> None:
    env = LoadBalanceVectorEnv(num_envs=2, max_episode_steps=3, num_servers=3)
    env.reset(seed=0)
    assert not run_to_end(env, 2)[3].any()
    assert run_to_end(env, 1)[3].all()
    spec = gymnasium.spec("lbgym/LoadBalance-v0")
    spec.max_episode_steps = 4
    made = gymnasium.make_vec(spec, num_envs=2)
    made.reset(seed=0)
    assert not run_to_end(made, 3)[3].any()
    assert run_to_end(made, 1)[3].all()


def test_returned_arrays_are_fresh() -> None:
    env = LoadBalanceVectorEnv(num_envs=3, **keys_of(max_steps=100))
    first, info = env.reset(seed=0)
    kept = [(first, first.copy())]
    infos = [info]
    for _ in range(5):
        observation, reward, terminated, truncated, info = run_to_end(env, 1)
        kept += [(a, a.copy()) for a in (observation, reward, terminated, truncated)]
        infos.append(info)
    for array, copy in kept:
        np.testing.assert_array_equal(array, copy)
        array[...] = 1
    for a in infos:
        for b in infos:
            if a is not b:
                for name in a:
                    assert not np.shares_memory(a[name], b[name]), name
    fresh = LoadBalanceVectorEnv(num_envs=3, **keys_of(max_steps=100))
    fresh.reset(seed=0)
    run_to_end(fresh, 5)
    equal(run_to_end(env, 1)[0], run_to_end(fresh, 1)[0])


def test_seeds() -> None:
    env = LoadBalanceVectorEnv(num_envs=3, **keys_of())

    def first_rewards(seed: Any) -> np.ndarray:
        env.reset(seed=seed)
        return np.asarray(run_to_end(env, 3)[1])

    consecutive = first_rewards(10)
    np.testing.assert_array_equal(consecutive, first_rewards([10, 11, 12]))
    assert len(set(consecutive)) == 3
    assert not np.array_equal(first_rewards(None), first_rewards(None))
    np.testing.assert_array_equal(consecutive, first_rewards(np.int32(10)))
    np.testing.assert_array_equal(consecutive, first_rewards(np.array([10, 11, 12])))
    np.testing.assert_array_equal(consecutive, first_rewards(iter((10, 11, 12))))
    with pytest.raises(ValueError, match=r"3.*2|2.*3"):
        env.reset(seed=[1, 2])


@pytest.mark.parametrize("seed", [1.5, float("nan"), float("inf"), True, "3", b"345", object(), np.array(3), {0: 1}])
def test_what_is_no_seed(seed: Any) -> None:
    env = LoadBalanceVectorEnv(num_envs=3, **keys_of())
    for given in (seed, [1, seed, 2]):
        with pytest.raises(InvalidOptionError, match="seed must be"):
            env.reset(seed=given)


# Bad input


@pytest.mark.parametrize(
    ("action_type", "action"),
    [
        ("discrete", np.zeros((2, 2), int)),
        ("discrete", np.zeros(3, int)),
        ("discrete", np.array([[0, 0, 0], [0, 0, 3]])),
        ("discrete", np.array([[0, 0, 0], [0, -1, 0]])),
        ("discrete", np.full((2, 3), 0.5)),
        ("joint", np.array([0, 27])),
        ("joint", np.array([0])),
        ("continuous", np.array([[1, 1, 1], [1, np.nan, 1]])),
        ("normalized", np.array([[1, 1, 1], [1, np.inf, 1]])),
        ("normalized", np.zeros((2, 4))),
    ],
)
def test_invalid_actions(action_type: str, action: Any) -> None:
    env = LoadBalanceVectorEnv(num_envs=2, **keys_of(action_type=action_type))
    env.reset(seed=0)
    with pytest.raises(InvalidActionError):
        env.step(action)


def test_step_before_reset_and_wrong_arguments() -> None:
    env = LoadBalanceVectorEnv(num_envs=2, **keys_of())
    with pytest.raises(ResetNeeded):
        env.step(env.action_space.sample())
    with pytest.raises(ValueError, match="num_envs"):
        LoadBalanceVectorEnv(num_envs=0)
    with pytest.raises(ValueError, match="autoreset"):
        LoadBalanceVectorEnv(num_envs=2, autoreset_mode="sometimes")
    with pytest.raises(UnknownNameError, match="reward"):
        LoadBalanceVectorEnv(num_envs=2, reward_type="fair")
    with pytest.raises(ValueError, match="scenarios"):
        env.reset(options={"scenarios": "uniform"})


# Gymnasium's wrappers


@pytest.mark.parametrize("mode", MODES)
def test_record_episode_statistics(mode: AutoresetMode) -> None:
    keys = keys_of(autoreset_mode=mode)
    bare = LoadBalanceVectorEnv(num_envs=2, **keys)
    env = gymnasium.wrappers.vector.RecordEpisodeStatistics(LoadBalanceVectorEnv(num_envs=2, **keys))
    bare.reset(seed=3)
    env.reset(seed=3)
    total = np.zeros(2)
    for _ in range(6):
        total += run_to_end(bare, 1)[1]
        *_, info = run_to_end(env, 1)
    np.testing.assert_array_equal(info["_episode"], [True, True])
    np.testing.assert_array_equal(info["episode"]["l"], [6, 6])
    np.testing.assert_allclose(info["episode"]["r"], total)


def test_statistics_survive_a_partial_reset() -> None:
    env = gymnasium.wrappers.vector.RecordEpisodeStatistics(
        LoadBalanceVectorEnv(num_envs=2, autoreset_mode=AutoresetMode.DISABLED, **keys_of())
    )
    env.reset(seed=0)
    run_to_end(env, 4)
    env.reset(options={"reset_mask": np.array([True, False])})
    *_, info = run_to_end(env, 2)
    np.testing.assert_array_equal(info["_episode"], [False, True])
    assert info["episode"]["l"][1] == 6


def test_normalize_observation_and_friends() -> None:
    vector = gymnasium.wrappers.vector
    env: Any = LoadBalanceVectorEnv(num_envs=4, observation="flat", **keys_of())
    env = vector.NormalizeReward(vector.NormalizeObservation(vector.RecordEpisodeStatistics(env)))
    observation, _ = env.reset(seed=0)
    for _ in range(20):
        observation, reward, *_ = env.step(env.action_space.sample())
        assert np.isfinite(observation).all() and np.isfinite(reward).all()
    assert observation.shape == (4, 36)
    listed = vector.DictInfoToList(LoadBalanceVectorEnv(num_envs=2, **keys_of()))
    _, infos = listed.reset(seed=0)
    assert len(infos) == 2 and infos[0]["weights"].shape == (3,)


def test_render_gives_a_frame_per_replica() -> None:
    env = LoadBalanceVectorEnv(num_envs=2, render_mode="rgb_array", **keys_of())
    env.reset(seed=0)
    run_to_end(env, 1)
    frames = env.render()
    assert isinstance(frames, tuple) and len(frames) == 2
    assert all(frame.dtype == np.uint8 and frame.ndim == 3 for frame in frames)
