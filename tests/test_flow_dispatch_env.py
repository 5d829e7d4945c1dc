"""One decision per flow: the contract, the simulator it must equal, and laws that hold exactly."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils import seeding
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from lbgym import FlowDispatchEnv, FlowDispatchVectorEnv
from lbgym.env.flow_dispatch import FLOW_FIELDS, SERVER_FIELDS
from lbgym.errors import InvalidActionError, InvalidOptionError, ResetNeeded, ScenarioError, UnknownNameError
from lbgym.scenarios import (
    DISPATCH_RULES,
    Choice,
    Deterministic,
    Event,
    Exponential,
    RandomEvents,
    Scenario,
    ScenarioDistribution,
    Server,
    Trace,
    Uniform,
    Variant,
    Workload,
    named_scenario,
)
from lbgym.simulator import FlowSimulation, Simulation
from tests.simulator.running import by_id
from tests.test_vector_env import equal, equal_infos

ID = "lbgym/FlowDispatch-v0"
MODES = [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP, AutoresetMode.DISABLED]
LAYOUTS = ["flat", "matrix", "dict"]
EVERYTHING: dict[str, Any] = {"server_fields": SERVER_FIELDS, "flow_fields": FLOW_FIELDS}


def small_scenario(**changes: Any) -> Scenario:
    """Every kind of server and event, rejections included."""
    servers = (Server(workers=1), Server(cores=2), Server(cores=2, workers=2, backlog=1), Server(speed=2.0, backlog=0))
    events = (
        Event(time=0.4, kind="down", server=1),
        Event(time=0.9, kind="up", server=1),
        Event(time=0.6, kind="drain", server=0),
        Event(time=1.1, kind="up", server=0),
        Event(time=0.7, kind="speed", server=2, value=0.5),
    )
    defaults = {"name": "small", "servers": servers, "workload": Workload(load=0.9), "events": events}
    return Scenario(**(defaults | {"reject_timeout": 3.0} | changes))


def trace_of(count: int, *, demand: float = 0.3, **changes: Any) -> Scenario:
    trace = Trace(times=0.1 * np.arange(1, count + 1), demands=np.full(count, demand), repeat=False)
    return Scenario(servers=changes.pop("servers", (Server(workers=1),) * 2), workload=Workload(trace=trace), **changes)


def episode_seed(seed: int) -> int:
    """The seed that an environment draws for the first episode after ``reset(seed=seed)``."""
    return int(seeding.np_random(seed)[0].integers(1 << 63))


def flows_of(simulation: FlowSimulation | Simulation, replica: int = 0) -> dict[str, np.ndarray]:
    """All flows that came, those still open with an FCT of NaN."""
    ended, still = simulation.take_flows(replica), simulation.open_flows(replica)
    still["fct"] = np.full(len(still["flow_id"]), np.nan)
    names = ("flow_id", "arrival", "demand", "server", "fct")
    return by_id({name: np.concatenate([ended[name], still[name]]) for name in names})


# The contract


@pytest.mark.contract
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("observation", LAYOUTS)
def test_gymnasium_check_env(observation: str, normalize: bool, capsys: pytest.CaptureFixture[str]) -> None:
    env = gymnasium.make(ID, observation=observation, normalize=normalize, **EVERYTHING)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(env.unwrapped)
    unexpected = [str(w.message) for w in caught if "maximum value is infinity" not in str(w.message)]
    assert unexpected == []
    assert normalize == (not caught)


@pytest.mark.contract
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "keys",
    [
        {"observation": "flat", "max_steps": 6},
        {"observation": "matrix", "max_steps": 9, "normalize": True, **EVERYTHING},
        {"observation": "dict", "max_steps": 7, "reward_scale": 0.1, "reject_cost": 1.0, **EVERYTHING},
        {"scenario": None, "max_steps": 5},
        {"max_steps": 6, "drain": True},
        {"scenario": trace_of(4), "max_steps": 6, "observation": "dict"},
        {"scenario": small_scenario(balancers=3), "max_steps": 20, **EVERYTHING},
    ],
    ids=["flat", "matrix", "dict", "park", "drains", "terminates", "balancers"],
)
def test_vector_equals_single_environments(mode: AutoresetMode, keys: dict[str, Any]) -> None:
    keys = {"scenario": small_scenario()} | keys
    num_envs = 4
    native = FlowDispatchVectorEnv(num_envs, autoreset_mode=mode, **keys)
    reference = SyncVectorEnv([lambda: FlowDispatchEnv(**keys)] * num_envs, autoreset_mode=mode)
    assert native.single_observation_space == reference.single_observation_space
    assert native.observation_space == reference.observation_space
    assert native.action_space == reference.action_space
    native.action_space.seed(1)

    def reset(seed: Any, mask: np.ndarray | None = None, **options: Any) -> None:
        def given() -> dict[str, Any]:
            return options | ({} if mask is None else {"reset_mask": mask.copy()})

        one, two = native.reset(seed=seed, options=given()), reference.reset(seed=seed, options=given())
        equal(one[0], two[0])
        equal_infos(one[1], two[1])

    reset(21)
    ended, done = 0, np.zeros(num_envs, bool)
    for k in range(40):
        if mode == AutoresetMode.DISABLED and done.any():
            reset(None, done)
        if k == 2:
            # From here the replicas are out of step with each other, and some in another scenario for an episode.
            reset([77] * num_envs, np.arange(num_envs) % 2 == 0, load=0.5)
        actions = native.action_space.sample()
        one, two = native.step(actions), reference.step(actions)
        for a, b in zip(one[:4], two[:4], strict=True):
            equal(a, b)
        equal_infos(one[4], two[4])
        assert native.observation_space.contains(one[0])
        done = one[2] | one[3]
        ended += int(done.sum())
    assert ended >= 4
    native.close()
    reference.close()


@pytest.mark.contract
def test_registered_for_make_and_make_vec() -> None:
    env = gymnasium.make(ID, max_episode_steps=7)
    assert isinstance(env.unwrapped, FlowDispatchEnv)
    assert env.unwrapped.scenario == named_scenario("park")
    assert env.action_space == gymnasium.spaces.Discrete(10)
    vector = gymnasium.make_vec(ID, num_envs=3, max_steps=5, autoreset_mode="SameStep")
    assert isinstance(vector, FlowDispatchVectorEnv)
    assert vector.autoreset_mode == vector.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    vector.close()


def test_threads_change_nothing() -> None:
    def run(threads: int) -> list[Any]:
        env = FlowDispatchVectorEnv(9, num_threads=threads, max_steps=20, scenario=small_scenario(), **EVERYTHING)
        env.action_space.seed(3)
        out: list[Any] = [env.reset(seed=1)]
        out += [env.step(env.action_space.sample()) for _ in range(50)]
        env.close()
        return out

    equal(run(1), run(3))


def test_same_seed_same_bits_and_episodes_differ() -> None:
    env = FlowDispatchEnv(max_steps=5)
    first, info = env.reset(seed=3)
    second, _ = env.reset()
    again, info_again = env.reset(seed=3)
    equal(first, again)
    equal(info, info_again)
    equal(second, env.reset()[0])
    assert not np.array_equal(first, second)


def test_returned_arrays_are_fresh() -> None:
    env = FlowDispatchVectorEnv(2, observation="dict", **EVERYTHING)
    kept = [env.reset(seed=1), *(env.step([0, 1]) for _ in range(4))]
    copies = [
        ({k: v.copy() for k, v in result[0].items()}, {k: v.copy() for k, v in result[-1].items()}) for result in kept
    ]
    env.step([1, 1])
    for result, (observation, info) in zip(kept, copies, strict=True):
        equal(result[0], observation)
        equal(result[-1], info)


# Observations


def test_the_default_observation_is_parks() -> None:
    env = FlowDispatchEnv()
    assert env.observation_space == gymnasium.spaces.Box(0.0, np.inf, (11,), np.float32)
    observation, info = env.reset(seed=1)
    assert not observation[:10].any()
    before, demand = info["timestamp"], observation[10]
    assert demand >= 0.1  # core-seconds; 100 in Park's units of 1 ms
    observation, _, _, _, info = env.step(4)
    left = max(0.0, demand - 0.55 * (info["timestamp"] - before))
    np.testing.assert_allclose(observation[:10], np.where(np.arange(10) == 4, left, 0.0), rtol=1e-5)


def test_layouts_hold_the_same_numbers() -> None:
    runs = {}
    for layout in LAYOUTS:
        env = FlowDispatchEnv(scenario=small_scenario(), observation=layout, **EVERYTHING)
        env.reset(seed=5)
        for k in range(12):
            runs[layout], *_ = env.step(k % 4)
    flat, matrix, parts = runs["flat"], runs["matrix"], runs["dict"]
    np.testing.assert_array_equal(flat[:16].reshape(4, 4), parts["features"])
    np.testing.assert_array_equal(flat[16:], parts["flow"])
    np.testing.assert_array_equal(matrix[:, :4], parts["features"])
    np.testing.assert_array_equal(matrix[:, 4:], np.tile(parts["flow"], (4, 1)))
    np.testing.assert_array_equal(parts["mask"], parts["features"][:, 3])
    assert parts["features"][:, :3].any(axis=0).all()


def test_normalized_values_are_the_stated_logarithms() -> None:
    plain, scaled = (
        FlowDispatchEnv(scenario=small_scenario(), observation="dict", normalize=n, **EVERYTHING) for n in (False, True)
    )
    plain.reset(seed=2)
    scaled.reset(seed=2)
    for k in range(15):
        a, b = plain.step(k % 4)[0], scaled.step(k % 4)[0]
    time = np.log1p(a["features"][:, :2] / 1e-3) / math.log1p(1e5)
    np.testing.assert_allclose(b["features"][:, :2], time, rtol=1e-5)
    np.testing.assert_allclose(b["features"][:, 2], np.log1p(a["features"][:, 2]) / math.log1p(1e4), rtol=1e-5)
    np.testing.assert_array_equal(b["features"][:, 3], a["features"][:, 3])
    np.testing.assert_allclose(b["flow"], np.log1p(a["flow"] / 1e-3) / math.log1p(1e5), rtol=1e-5)


def test_what_a_balancer_can_know_needs_no_oracle() -> None:
    env = FlowDispatchEnv(scenario=trace_of(8, demand=1.0), server_fields=("open_flows", "active"), flow_fields=())
    assert env.observation_space.shape == (4,)
    env.reset(seed=1)
    for k in range(3):
        observation, *_ = env.step(0)
        np.testing.assert_array_equal(observation, [k + 1, 1, 0, 1])


def test_open_flows_are_those_of_the_balancer_whose_flow_waits() -> None:
    scenario = Scenario(servers=(Server(),) * 2, balancers=2, workload=Workload(demand=Deterministic(mean=50), rate=20))
    simulation = FlowSimulation(scenario, record_flows=True)
    seen = [simulation.begin([1]).servers[0, 0, 2]]
    seen += [simulation.decide([0]).servers[0, 0, 2] for _ in range(30)]
    _, flows = Simulation(scenario, record_flows=True), simulation.open_flows()
    order = np.argsort(flows["flow_id"])
    whose = flows["balancer"][order]
    assert set(whose) == {0, 1}
    assert seen[:-1] == [int((whose[:k] == b).sum()) for k, b in enumerate(whose)]


# The same as the simulator, flow by flow


@pytest.mark.parametrize("rule", DISPATCH_RULES)
def test_a_dispatch_rule_replayed_from_outside_gives_the_same_fcts(rule: str) -> None:
    """Bit for bit: a stop at every arrival leaves no trace, on processor-sharing servers as on FIFO ones."""
    for scenario in (small_scenario(), named_scenario("park"), named_scenario("heterogeneous")):
        simulation = Simulation(scenario, dispatch=rule, reservoirs=False, record_flows=True)
        simulation.reset([9])
        simulation.step(None, 600 / scenario.rate)
        expected = flows_of(simulation)
        outside = FlowSimulation(scenario, record_flows=True)
        decision = outside.begin([9])
        for k, server in enumerate(expected["server"]):
            assert decision.timestamp[0] == expected["arrival"][k]
            assert decision.flow[0, 0] == expected["demand"][k]
            # A flow that found no active server is not placed, whatever is chosen.
            decision = outside.decide([max(server, 0)])
        got = flows_of(outside)
        n = len(expected["server"])
        assert n > 400
        np.testing.assert_array_equal(got["server"][:n], expected["server"])
        both = ~np.isnan(expected["fct"])
        np.testing.assert_array_equal(got["fct"][:n][both], expected["fct"][both])
        # What had not ended at the horizon of the one may have ended before the last arrival of the other.
        assert both.sum() > 0.5 * n


Policy = Callable[[np.ndarray, np.random.Generator], int]


@pytest.mark.parametrize(
    ("policy", "steps"),
    [
        pytest.param(lambda work, rng: int(rng.integers(10)), 2000, id="random"),
        pytest.param(lambda work, rng: int((work / RATES).argmin()), 2000, id="least-delay"),
        pytest.param(lambda work, rng: 0, 300, id="all-to-the-slowest"),
    ],
)
def test_parks_workload_against_an_independent_simulation(policy: Policy, steps: int) -> None:
    """FIFO by Lindley's recursion, in plain Python: the same work, flows in the system and rewards."""
    scenario = named_scenario("park")
    flows = FlowSimulation(scenario, record_flows=True)
    env = FlowDispatchEnv(max_steps=steps, server_fields=("work", "open_flows"))
    observation, info = env.reset(seed=4)
    decision = flows.begin([episode_seed(4)])
    rng = np.random.default_rng(1)
    free = np.zeros(10)  # when each server will have finished all it has
    finishes: list[tuple[float, int]] = []
    for _ in range(steps):
        now, demand = float(decision.timestamp[0]), float(decision.flow[0, 0])
        assert info["timestamp"] == now
        work = np.maximum(free - now, 0.0) * RATES
        held = np.zeros(10)
        for finish, server in finishes:
            held[server] += finish > now
        rows = observation[:20].reshape(10, 2)
        np.testing.assert_allclose(rows[:, 0], work, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(rows[:, 1], held)
        assert observation[20] == np.float32(demand)
        j = policy(work, rng)
        free[j] = max(free[j], now) + demand / RATES[j]
        finishes = [(finish, server) for finish, server in finishes if finish > now]
        finishes.append((free[j], j))
        observation, reward, _, _, info = env.step(j)
        decision = flows.decide([j])
        then = float(decision.timestamp[0])
        area = sum(min(finish, then) - now for finish, _ in finishes)
        assert reward == pytest.approx(-area, rel=1e-9, abs=1e-9)


RATES = 0.15 + 0.1 * np.arange(10)


def test_the_park_scenario_has_parks_load() -> None:
    scenario = named_scenario("park")
    assert scenario.load == pytest.approx(300 / 55 / 6.0, rel=1e-5)
    np.testing.assert_allclose([s.capacity for s in scenario.servers], RATES)
    assert all(s.workers == 1 and s.backlog is None for s in scenario.servers)
    decision = (simulation := FlowSimulation(scenario, 256)).begin(range(256))
    demands, gaps = [decision.flow[:, 0]], [decision.flow[:, 1]]
    for _ in range(200):
        decision = simulation.decide(np.zeros(256, np.int64))
        demands.append(decision.flow[:, 0])
        gaps.append(decision.flow[:, 1])
    sizes, n = np.concatenate(demands), 256 * 201
    # Pareto of index 1.5 from 0.1: P(D > x) = (0.1 / x) ** 1.5.
    for x in (0.2, 1.0, 5.0):
        p = (0.1 / x) ** 1.5
        assert abs((sizes > x).mean() - p) < 4 * math.sqrt(p * (1 - p) / n)
    assert sizes.min() >= 0.1
    assert abs(np.concatenate(gaps).mean() - 0.055) < 4 * 0.055 / math.sqrt(n)


# Laws


@pytest.mark.parametrize("demand", [Exponential(mean=0.1), Deterministic(mean=0.1)], ids=["exponential", "fixed"])
def test_random_split_is_pollaczek_and_khinchine(demand: Exponential | Deterministic) -> None:
    speeds, rate, replicas = np.array([1.0, 1.5, 2.0]), 20.0, 64
    scenario = Scenario(
        servers=tuple(Server(workers=1, speed=s) for s in speeds), workload=Workload(demand=demand, rate=rate)
    )
    env = FlowDispatchVectorEnv(replicas, scenario=scenario, max_steps=10**9)
    env.reset(seed=1)
    rng = np.random.default_rng(2)
    for _ in range(500):
        info = env.step(rng.integers(3, size=replicas))[4]
    started, area = info["timestamp"], np.zeros(replicas)
    for _ in range(4000):
        _, rewards, _, _, info = env.step(rng.integers(3, size=replicas))
        area -= rewards
    service = 0.1 / speeds
    second = service**2 * (2.0 if isinstance(demand, Exponential) else 1.0)
    share = rate / 3
    expected = (share * (service + share * second / (2 * (1 - share * service)))).sum()
    means = area / (info["timestamp"] - started)
    assert abs(means.mean() - expected) < 4 * means.std(ddof=1) / math.sqrt(replicas)


def test_rewards_sum_to_the_time_that_flows_spend_in_the_system() -> None:
    """Little's law as an identity: the integral of the flows there is the sum of their times there."""
    scenario = small_scenario()
    flows = FlowSimulation(scenario, record_flows=True)
    env = FlowDispatchEnv(scenario=scenario, max_steps=10**6, reject_cost=0.0, reward_scale=2.0)
    env.reset(seed=8)
    flows.begin([episode_seed(8)])
    rng, total = np.random.default_rng(3), 0.0
    for _ in range(800):
        j = int(rng.integers(4))
        _, reward, _, _, info = env.step(j)
        flows.decide([j])
        total += reward
    ended, still = flows.take_flows(), flows.open_flows()
    spent = ended["fct"][ended["status"] == 0].sum() + (info["timestamp"] - still["arrival"]).sum()
    assert set(ended["status"]) >= {0, 1, 3}
    failed = ended["status"] == 2  # lost on the way, at the time of the event that took the server down
    spent += (0.4 - ended["arrival"][failed]).sum()
    assert total == pytest.approx(-2.0 * spent, rel=1e-9)
    assert info["completed"] == (ended["status"] == 0).sum()
    assert info["rejected"] == (ended["status"] != 0).sum()
    assert info["fct_mean"] == pytest.approx(ended["fct"].mean(), rel=1e-9)


def test_quantiles_of_an_episode() -> None:
    scenario = small_scenario()
    flows = FlowSimulation(scenario, record_flows=True)
    env = FlowDispatchEnv(scenario=scenario, max_steps=300)
    env.reset(seed=8)
    flows.begin([episode_seed(8)])
    for k in range(300):
        *_, truncated, info = env.step(k % 4)
        flows.decide([k % 4])
        assert truncated == (info["fct_p99"] > 0.0) == (k == 299)
    expected = np.percentile(flows.take_flows()["fct"], [50, 90, 99])
    np.testing.assert_allclose([info["fct_p50"], info["fct_p90"], info["fct_p99"]], expected, rtol=1e-12)


def test_info_has_the_same_keys_and_types_at_every_step() -> None:
    for limit in ("max_steps", "max_episode_steps"):
        env: Any = gymnasium.make(ID, render_mode=None, **{limit: 60})
        _, info = env.reset(seed=3)
        keys, types = list(info), [type(value) for value in info.values()]
        for k in range(60):
            *_, truncated, info = env.step(9)
            assert truncated == (k == 59)
            assert list(info) == keys
            assert [type(value) for value in info.values()] == types
        # Also where the wrapper of max_episode_steps ends an episode that the environment would go on with.
        assert 0.0 < info["fct_p50"] <= info["fct_p90"] <= info["fct_p99"]


def test_quantiles_are_those_of_the_episode_whatever_ends_it() -> None:
    scenario = small_scenario()
    env = gymnasium.make(ID, scenario=scenario, max_episode_steps=300)
    for seed, steps in ((8, 300), (9, 300), (10, 120)):
        _, info = env.reset(seed=seed)
        assert info["fct_p50"] == info["fct_p99"] == 0.0
        for k in range(steps):
            *_, info = env.step(k % 4)
        alone = FlowDispatchEnv(scenario=scenario, max_steps=steps)
        alone.reset(seed=seed)
        for k in range(steps):
            *_, wanted = alone.step(k % 4)
        for name in ("fct_mean", "fct_p50", "fct_p90", "fct_p99"):
            assert info[name] == wanted[name] > 0.0


def test_render_as_text_or_not_at_all() -> None:
    env = gymnasium.make(ID, render_mode="ansi")
    env.reset(seed=1)
    env.step(4)
    text = env.render()
    assert isinstance(text, str)
    assert len(text.splitlines()) == 12
    assert float(text.splitlines()[6].split()[1]) > 0.0  # the work of server 4
    plain = FlowDispatchEnv()
    with pytest.warns(UserWarning, match='needs render_mode="ansi"'):
        assert plain.render() is None
    for make in (FlowDispatchEnv, FlowDispatchVectorEnv):
        with pytest.raises((UnknownNameError, InvalidOptionError), match="human"):
            make(render_mode="human")
    assert FlowDispatchVectorEnv(2, render_mode=None).num_envs == 2


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("steps", [None, 0, 5])
def test_a_copy_continues_bit_for_bit(how: Callable[[Any], Any], steps: int | None) -> None:
    keys: dict[str, Any] = {"scenario": small_scenario(), "max_steps": 8, **EVERYTHING}
    for env, action in ((FlowDispatchEnv(**keys), 1), (FlowDispatchVectorEnv(3, num_threads=2, **keys), [0, 1, 2])):
        if steps is not None:
            env.reset(seed=4)
            for _ in range(steps):
                env.step(action)
        twin = how(env)
        if steps is None:
            equal(env.reset(seed=2), twin.reset(seed=2))
        for _ in range(8 - (steps or 0)):
            equal(env.step(action), twin.step(action))
        equal(env.reset(), twin.reset())
        equal(env.step(action), twin.step(action))
        env.close()
        twin.close()


# Lost flows, servers down, ends


def test_an_episode_that_drains_ends_as_parks_does() -> None:
    """After ``max_steps`` flows nothing comes: the rewards sum to minus the FCTs of exactly these flows, by Lindley."""
    scenario = named_scenario("park")
    env = FlowDispatchEnv(max_steps=200, drain=True, reward_scale=1000.0)
    env.reset(seed=4)
    flows = FlowSimulation(scenario)
    decision = flows.begin([episode_seed(4)])
    rng = np.random.default_rng(1)
    free, total, expected = np.zeros(10), 0.0, 0.0
    for k in range(200):
        j, now = int(rng.integers(10)), float(decision.timestamp[0])
        free[j] = max(free[j], now) + float(decision.flow[0, 0]) / RATES[j]
        expected += free[j] - now
        decision = flows.decide([j])
        _, reward, terminated, truncated, info = env.step(j)
        assert (terminated, truncated) == (k == 199, False)
        total += float(reward)
    assert total == pytest.approx(-1000.0 * expected, rel=1e-9)
    assert info["timestamp"] == pytest.approx(free.max(), rel=1e-12)
    assert (info["completed"], info["fct_mean"]) == (200, pytest.approx(expected / 200, rel=1e-9))


def test_a_rejected_flow_costs_what_is_stated_and_never_pays() -> None:
    scenario = trace_of(5, demand=10.0, servers=(Server(workers=1, backlog=0), Server(workers=1)), reject_timeout=4.0)
    for reject_cost, cost in ((None, 4.0), (0.0, 0.0), (1.5, 1.5)):
        env = FlowDispatchEnv(scenario=scenario, reject_cost=reject_cost)
        env.reset(seed=1)
        assert env.step(0)[1] == pytest.approx(-0.1)
        _, reward, _, _, info = env.step(0)
        assert reward == pytest.approx(-0.1 - cost)
        assert (info["completed"], info["rejected"], info["fct_mean"]) == (0, 1, 4.0)


def test_a_server_that_is_down_shows_zeros_and_loses_what_is_sent_there() -> None:
    events = (Event(time=0.15, kind="down", server=0), Event(time=0.35, kind="up", server=0))
    env = FlowDispatchEnv(
        scenario=trace_of(6, demand=1.0, events=events, reject_timeout=7.0), observation="dict", **EVERYTHING
    )
    env.reset(seed=1)
    np.testing.assert_array_equal(env.action_masks(), [True, True])
    observation, reward, _, _, info = env.step(0)  # fails at 0.15, after 0.05 s
    assert reward == pytest.approx(-0.05 - 7.0)
    np.testing.assert_array_equal(observation["mask"], [0, 1])
    np.testing.assert_array_equal(observation["features"][0], [0, 0, 0, 0])
    np.testing.assert_array_equal(env.action_masks(), [False, True])
    assert info["active"].tolist() == [False, True] and info["active_servers"] == [1]
    _, reward, _, _, info = env.step(0)
    assert reward == pytest.approx(-7.0)
    assert info["rejected"] == 2
    observation, reward, _, _, info = env.step(1)
    assert reward == pytest.approx(-0.1)
    np.testing.assert_array_equal(observation["mask"], [1, 1])
    assert info["rejected"] == 2


def test_without_an_active_server_every_flow_is_asked_for_and_lost() -> None:
    events = tuple(Event(time=0.05, kind="down", server=j) for j in range(2))
    env = FlowDispatchEnv(scenario=trace_of(6, events=events, reject_timeout=2.0))
    env.reset(seed=1)
    np.testing.assert_array_equal(env.action_masks(), [True, True])
    rewards = [env.step(0)[1] for _ in range(6)]
    assert rewards == pytest.approx([-2.0] * 6)


def test_departures_are_seen_while_every_server_is_draining() -> None:
    events = tuple(Event(time=0.15, kind="drain", server=j) for j in range(2))
    env = FlowDispatchEnv(scenario=trace_of(6, demand=0.12, events=events), reject_cost=0.0)
    env.reset(seed=1)
    env.step(0)
    assert env.step(0)[1] == pytest.approx(-0.02)
    assert env.step(0)[4]["completed"] == 1


def test_the_end_of_the_flows_terminates_and_counts_what_is_left() -> None:
    env = FlowDispatchEnv(scenario=trace_of(3, demand=2.0))
    env.reset(seed=1)
    results = [env.step(0) for _ in range(3)]
    assert [r[2] for r in results] == [False, False, True]
    assert not any(r[3] for r in results)
    # FIFO: the three end at 2.1, 4.1 and 6.1 seconds.
    observation, _, _, _, info = results[-1]
    assert sum(r[1] for r in results) == pytest.approx(-(2.0 + 3.9 + 5.8))
    assert info["timestamp"] == pytest.approx(6.1)
    assert (info["completed"], info["fct_mean"]) == (3, pytest.approx(11.7 / 3))
    assert not observation.any()
    with pytest.raises(ResetNeeded, match="the episode is over"):
        env.step(0)
    env.reset()
    assert not env.step(0)[2]


def test_options_hold_for_one_episode() -> None:
    env = FlowDispatchEnv(max_steps=200)

    def time_of_200_flows(options: dict[str, Any] | None) -> float:
        env.reset(seed=1, options=options)
        return [env.step(9)[4]["timestamp"] for _ in range(200)][-1]

    usual = time_of_200_flows(None)
    assert time_of_200_flows({"rate": 2 * env.scenario.rate}) == pytest.approx(usual / 2)
    assert time_of_200_flows(None) == usual
    with pytest.raises(UnknownNameError, match="unknown option of reset"):
        env.reset(options={"rates": 1.0})


# Refusals


@pytest.mark.parametrize("action", [-1, 10, 1.0, [1], None, "one", True], ids=repr)
def test_an_invalid_action_is_refused_and_nothing_has_happened(action: Any) -> None:
    one, two = FlowDispatchEnv(), FlowDispatchEnv()
    one.reset(seed=1)
    two.reset(seed=1)
    with pytest.raises(InvalidActionError, match="an action must"):
        one.step(action)
    equal(one.step(3), two.step(3))
    assert one.step(np.int32(2))[0].shape == (11,)


def test_invalid_actions_of_a_batch_are_refused_before_anybody_begins_again() -> None:
    one, two = (FlowDispatchVectorEnv(2, max_steps=1) for _ in range(2))
    for env in (one, two):
        env.reset(seed=1)
        env.step([0, 0])
    for actions in ([0, 10], [0], [0, 0.5], [[0, 0]], [-1, 0]):
        with pytest.raises(InvalidActionError, match="action"):
            one.step(actions)
    equal(one.step([0, 0]), two.step([0, 0]))


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({"observation": "graph"}, UnknownNameError, "unknown observation layout 'graph'"),
        ({"server_fields": ("works",)}, UnknownNameError, "unknown field 'works' in server_fields.*'work'"),
        ({"server_fields": "work"}, InvalidOptionError, "server_fields must be a list of names"),
        ({"server_fields": ("work", "work")}, InvalidOptionError, "each field once"),
        ({"server_fields": (), "flow_fields": ()}, InvalidOptionError, "nothing to observe"),
        ({"max_steps": 0}, InvalidOptionError, "max_steps must be a whole number"),
        ({"max_steps": 10**400}, InvalidOptionError, "max_steps must be a whole number from 1 to"),
        ({"reward_scale": math.inf}, InvalidOptionError, "reward_scale must be a finite number"),
        ({"reject_cost": -1.0}, InvalidOptionError, "reject_cost must be a finite number of at least 0"),
        ({"reject_cost": "much"}, InvalidOptionError, "reject_cost must be a finite number"),
        ({"drain": 1}, InvalidOptionError, "drain must be true or false, got 1"),
        ({"normalize": "false"}, InvalidOptionError, "normalize must be true or false, got 'false'"),
        ({"scenario": "parks"}, UnknownNameError, "Did you mean 'park'"),
    ],
    ids=str,
)
def test_bad_keys(keys: dict[str, Any], error: type[Exception], message: str) -> None:
    for make in (FlowDispatchEnv, FlowDispatchVectorEnv):
        with pytest.raises(error, match=message):
            make(**keys)


def test_reset_comes_first() -> None:
    env, vector = FlowDispatchEnv(), FlowDispatchVectorEnv(2)
    for call in (
        lambda: env.step(0),
        env.action_masks,
        lambda: vector.step([0, 0]),
        lambda: vector.reset(options={"reset_mask": np.array([True, False])}),
    ):
        with pytest.raises(ResetNeeded):
            call()
    with pytest.raises(InvalidOptionError, match="seed must be"):
        env.reset(seed=-1)
    with pytest.raises(InvalidOptionError, match="2 seeds"):
        vector.reset(seed=[1])
    with pytest.raises(InvalidOptionError, match="num_envs"):
        FlowDispatchVectorEnv(0)
    with pytest.raises(UnknownNameError, match="autoreset mode"):
        FlowDispatchVectorEnv(1, autoreset_mode="never")
    with pytest.raises(ResetNeeded, match="begin"):
        FlowSimulation(small_scenario()).decide([0])
    with pytest.raises(ScenarioError, match="seeds"):
        FlowSimulation(small_scenario()).begin([0, 1])


def test_disabled_needs_a_reset_of_the_ended_replicas() -> None:
    env = FlowDispatchVectorEnv(2, autoreset_mode="Disabled", max_steps=2)
    env.reset(seed=1)
    env.step([0, 0])
    env.step([0, 0])
    with pytest.raises(ResetNeeded, match="2 replicas have ended"):
        env.step([0, 0])


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_a_distribution_of_scenarios_is_drawn_per_episode(mode: AutoresetMode) -> None:
    base = Scenario(servers=(Server(workers=1),) * 2, workload=Workload(load=0.7))
    source = ScenarioDistribution(base=base, num_servers=Uniform(1, 4), load=Uniform(0.3, 0.9))
    keys: dict[str, Any] = {"scenario": source, "max_steps": 4, "observation": "dict"}
    native = FlowDispatchVectorEnv(5, autoreset_mode=mode, **keys)
    reference = SyncVectorEnv([lambda: FlowDispatchEnv(**keys)] * 5, autoreset_mode=mode)
    assert native.single_action_space.n == 4
    equal(native.reset(seed=3)[0], reference.reset(seed=3)[0])
    sizes = set()
    for k in range(25):
        one, two = (env.step(np.full(5, k % 2)) for env in (native, reference))
        for a, b in zip(one[:4], two[:4], strict=True):
            equal(a, b)
        equal_infos(one[4], two[4])
        sizes |= set(one[0]["mask"].sum(axis=1).tolist())
    assert sizes == {1, 2, 3, 4}
    with pytest.raises(ScenarioError, match="room for 4"):
        native.reset(options={"scenario": "park"})
    native.close()
    reference.close()


def eventful(**changes: Any) -> ScenarioDistribution:
    """Some seconds between flows, and events of every kind."""
    servers = (Server(workers=1),) * 4
    base = Scenario(servers=servers, workload=Workload(rate=0.1, demand=Exponential(mean=8.0)), reject_timeout=3.0)
    events = (
        RandomEvents(kind="down", every=100.0, duration=100.0),
        RandomEvents(kind="speed", every=300.0, duration=Uniform(10.0, 500.0), value=0.5),
        RandomEvents(kind="rate", every=500.0, duration=200.0, value=Choice((0.0, 3.0))),
    )
    return ScenarioDistribution(**({"base": base, "events": events} | changes))


@pytest.mark.parametrize(
    ("source", "end"),
    [
        (eventful(), 1e5),
        # Gaps between flows longer than what is drawn at first.
        (eventful(rate=2e-4, events=(RandomEvents(kind="down", every=2e3, duration=2e3),)), 2e7),
        (eventful(arrivals=(Variant(kind="on_off", parameters={"on": 500.0, "off": 5e3, "random": False}),)), 1e5),
    ],
    ids=["often", "rarely", "in bursts"],
)
def test_random_events_go_on_for_the_whole_episode(source: ScenarioDistribution, end: float) -> None:
    keys: dict[str, Any] = {"scenario": source, "max_steps": 1500, **EVERYTHING}
    env = FlowDispatchEnv(**keys)
    vector = FlowDispatchVectorEnv(2, **keys)
    observation, info = env.reset(seed=5)
    batch, _ = vector.reset(seed=[5, 6])
    seed = episode_seed(5)
    simulation = FlowSimulation(source.draw(seed, horizon=end))
    decision = simulation.begin([seed])
    short = FlowSimulation(source.draw(seed, horizon=3600.0))
    early = short.begin([seed])
    inactive = []
    for k in range(1500):
        assert info["timestamp"] == decision.timestamp[0]
        equal(observation, batch[0])
        equal(observation, env.observation_layout.encode(decision)[0])
        if info["timestamp"] < 3600.0:
            # As when no later events were drawn at all.
            equal(observation, env.observation_layout.encode(early)[0])
            early = short.decide([k % 4])
        if info["timestamp"] > 3600.0:
            inactive.append(4 - len(info["active_servers"]))
        if k == 700:
            env = copy.deepcopy(env)
        observation, _, terminated, truncated, info = env.step(k % 4)
        batch = vector.step([k % 4, 0])[0]
        decision = simulation.decide([k % 4])
    assert truncated and not terminated and 10_000.0 < info["timestamp"] < end
    # Half of the time of each server; without further events nobody fails any more.
    assert np.mean(inactive[len(inactive) // 2 :]) == pytest.approx(2.0, abs=0.5)


def test_spec_states_the_limit_that_the_environment_keeps() -> None:
    env = gymnasium.make(ID, max_steps=5)
    assert env.spec is not None and env.spec.max_episode_steps == 5
    aware = gymnasium.wrappers.TimeAwareObservation(env, flatten=True, normalize_time=True)
    aware.reset(seed=0)
    assert [aware.step(0)[0][-1] for _ in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    vector = gymnasium.make_vec(ID, num_envs=2, vectorization_mode="vector_entry_point", max_steps=7)
    assert vector.spec is not None and vector.spec.max_episode_steps == 7
    vector.close()


@pytest.mark.parametrize("observation", LAYOUTS)
def test_active_servers_are_listed_for_each_replica(observation: str) -> None:
    env = FlowDispatchVectorEnv(3, scenario=small_scenario(), observation=observation)
    _, info = env.reset(seed=1)
    seen = set()
    for k in range(300):
        assert [list(np.flatnonzero(row)) for row in info["active"]] == info["active_servers"].tolist()
        assert info["active_servers"].shape == (3,) and info["_active_servers"].all()
        np.testing.assert_array_equal(info["active"], env.action_masks())
        seen |= {tuple(ids) for ids in info["active_servers"]}
        # Nobody else's list changes with this one.
        info["active_servers"][0].clear()
        *_, info = env.step([k % 4] * 3)
    assert len(seen) > 1
    env.close()


@pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning")
@pytest.mark.filterwarnings("ignore:`.*` is set to None:UserWarning")
def test_minari_collects_episodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("minari")
    pytest.importorskip("jax", reason="Minari's DataCollector needs it")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    from minari import DataCollector

    env = DataCollector(gymnasium.make(ID, max_steps=6))
    rewards = []
    for seed in (1, 2):
        env.reset(seed=seed)
        rewards.append([float(env.step(k)[1]) for k in range(6)])
    data = env.create_dataset("tests/flows-v0")
    env.close()
    # Minari leaves its temporary folder to the garbage collector.
    del env
    gc.collect()
    assert data.total_episodes == 2 and data.total_steps == 12
    for episode, expected in zip(data.iterate_episodes(), rewards, strict=True):
        np.testing.assert_allclose(episode.rewards, expected)
        np.testing.assert_array_equal(episode.actions, range(6))
        assert episode.observations.shape == (7, 11) and episode.truncations.tolist() == [False] * 5 + [True]
