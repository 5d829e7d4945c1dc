"""Actions of type index, weights relative to what is configured, and observations of what the operator knows."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.utils import seeding
from numpy.typing import NDArray

from lbgym import LoadBalanceEnv, LoadBalanceVectorEnv, MultiLoadBalanceEnv, MultiLoadBalanceVectorEnv
from lbgym.env.actions import MAX_BACKGROUND, make_action_codec
from lbgym.env.observations import ObservationLayout
from lbgym.errors import InvalidActionError, InvalidOptionError, LbgymError, PolicyError, ScenarioError
from lbgym.policies import Agent
from lbgym.policies.action_kind import ActionKind
from lbgym.policies.checkpoints import _split
from lbgym.policies.trained import TrainedPolicy
from lbgym.scenarios import (
    Choice,
    Configured,
    Event,
    Exponential,
    Scenario,
    ScenarioDistribution,
    Server,
    ServerDistribution,
    Uniform,
    Workload,
    from_toml,
    to_toml,
)
from lbgym.sharedmemory import Publication, SharedMemoryRegion
from lbgym.simulator import Simulation
from tests.dataplanes.puppet import snapshot
from tests.sharedmemory.conftest import shm_dir
from tests.simulator import test_index as model
from tests.simulator.running import by_id

__all__ = ["shm_dir"]

SERVERS = (Server(cores=4, weight=3.0), Server(cores=2), Server(cores=8, workers=6), Server())
SCENARIO = Scenario(
    name="four", servers=SERVERS, workload=Workload(load=0.8, demand=Exponential(mean=0.1)), balancers=2
)
WEIGHTS = np.array([3.0, 2.0, 8.0, 1.0])
CORES = np.array([4.0, 2.0, 6.0, 1.0])
KEYS: dict[str, Any] = {"scenario": SCENARIO, "action_type": "index", "dispatch": "marginal"}
PRIOR = np.tile(np.array([0.0, -1.0], np.float32), (4, 1))


def distribution() -> ScenarioDistribution:
    base = SCENARIO.with_changes(servers=SERVERS + SERVERS[:2])
    server = ServerDistribution(cores=Choice((1, 2, 8)), weight=Uniform(0.5, 9.0))
    return ScenarioDistribution(base=base, num_servers=Choice((3, 4, 6)), server=server)


def test_the_space_and_its_corners() -> None:
    codec = make_action_codec(4, "index")
    codec.configured = Configured.of(SCENARIO, 4)
    assert codec.space == spaces.Box(-1.0, 1.0, (4, 2), np.float32)
    np.testing.assert_allclose(codec.to_weights(PRIOR), WEIGHTS)
    np.testing.assert_array_equal(codec.to_background(PRIOR), 0.0)
    most = np.full((4, 2), 7.0)  # clipped
    np.testing.assert_allclose(codec.to_weights(most), 10.0 * WEIGHTS)
    np.testing.assert_allclose(codec.to_background(most), MAX_BACKGROUND * CORES)
    np.testing.assert_allclose(codec.to_background(np.zeros((4, 2))), 2.0 * CORES)
    batch = np.random.default_rng(1).uniform(-1, 1, (5, 4, 2))
    codec.configured = Configured.stack([codec.configured] * 5)
    for i in range(5):
        np.testing.assert_array_equal(codec.to_weights(batch, 5)[i], codec.to_weights(batch[i]))
        np.testing.assert_array_equal(codec.to_background(batch, 5)[i], codec.to_background(batch[i]))


@pytest.mark.parametrize("kind", ["index", "normalized"])
def test_encode_is_the_inverse(kind: str) -> None:
    codec = make_action_codec(4, kind, relative_to_configured=True)
    codec.configured = Configured.of(SCENARIO, 4)
    weights = WEIGHTS * [0.3, 1.0, 4.0, 1.0]
    action = codec.encode(weights)
    assert codec.space.contains(action)
    np.testing.assert_allclose(codec.to_weights(action), weights, rtol=1e-6)
    if kind == "index":
        np.testing.assert_array_equal(codec.to_background(action), 0.0)


@pytest.mark.parametrize("action", [np.zeros(4), np.zeros((2, 4)), np.full((4, 2), np.nan), "x"])
def test_what_is_no_index_action(action: Any) -> None:
    env = LoadBalanceEnv(**KEYS)
    env.reset(seed=1)
    with pytest.raises(InvalidActionError):
        env.step(action)


def test_the_prior_is_marginal_with_the_configured_weights() -> None:
    one = LoadBalanceEnv(**KEYS)
    other = LoadBalanceEnv(scenario=SCENARIO, action_type="continuous", dispatch="marginal")
    one.reset(seed=3)
    other.reset(seed=3)
    for _ in range(20):
        a = one.step(PRIOR)
        b = other.step(WEIGHTS)
        np.testing.assert_array_equal(a[0], b[0])
        np.testing.assert_array_equal(a[4]["background"], 0.0)
        assert a[1] == b[1]
        assert "background" not in b[4]


def test_a_background_load_moves_flows_away() -> None:
    env = LoadBalanceEnv(**KEYS)
    held = []
    for load in (-1.0, 1.0):
        env.reset(seed=3)
        action = PRIOR.copy()
        action[2, 1] = load
        seen = []
        for _ in range(80):
            observation, _, _, _, info = env.step(action)
            seen.append(observation[2, 0])
        held.append(np.mean(seen[10:]))
    assert info["background"].tolist() == pytest.approx([0.0, 0.0, 48.0, 0.0])
    assert held[1] < 0.6 * held[0]


def test_the_vector_environment_is_the_single_one() -> None:
    keys = KEYS | {
        "scenario": distribution(), "observe_configured": True, "observe_background": True, "observe_weights": True,
        "max_steps": 5,
    }  # fmt: skip
    vector = LoadBalanceVectorEnv(3, **keys)
    singles = [LoadBalanceEnv(**keys) for _ in range(3)]
    seen, _ = vector.reset(seed=7)
    for i, env in enumerate(singles):
        np.testing.assert_array_equal(seen[i], env.reset(seed=7 + i)[0])
    rng = np.random.default_rng(0)
    for step in range(14):
        actions = rng.uniform(-1, 1, (3, 6, 2)).astype(np.float32)
        seen, reward, _, truncated, info = vector.step(actions)
        for i, env in enumerate(singles):
            if step % 6 == 5:
                np.testing.assert_array_equal(seen[i], env.reset()[0])
                continue
            single = env.step(actions[i])
            np.testing.assert_array_equal(seen[i], single[0])
            assert (reward[i], truncated[i]) == (single[1], single[3])
            np.testing.assert_array_equal(info["background"][i], single[4]["background"])


def test_every_balancer_has_its_own_background_load() -> None:
    keys = KEYS | {"observe_configured": True, "observe_background": True, "action_delay": 0.1}
    vector = MultiLoadBalanceVectorEnv(1, **keys)
    parallel = MultiLoadBalanceEnv(**keys)
    seen, _ = vector.reset(seed=[5])
    observations, _ = parallel.reset(seed=5)
    rng = np.random.default_rng(0)
    for _ in range(6):
        actions = rng.uniform(-1, 1, (1, 2, 4, 2)).astype(np.float32)
        seen, reward, *_, info = vector.step(actions)
        observations, rewards, _, _, infos = parallel.step({f"lb_{b}": actions[0, b] for b in range(2)})
        for b in range(2):
            np.testing.assert_array_equal(seen[0, b], observations[f"lb_{b}"])
            np.testing.assert_array_equal(info["background"][0, b], infos[f"lb_{b}"]["background"])
            assert reward[0, b] == rewards[f"lb_{b}"]
    plane: Any = parallel._core.plane
    np.testing.assert_array_equal(plane.simulation.background_in_force(), info["background"])
    assert not np.array_equal(info["background"][0, 0], info["background"][0, 1])


def test_what_the_operator_knows_is_shown() -> None:
    env = LoadBalanceEnv(**KEYS, observe_configured=True, normalize=True, observation="dict")
    observation, _ = env.reset(seed=1)
    assert env.feature_columns[-3:] == ("configured_weight", "cores", "balancers")
    assert env.observation_space.contains(observation)
    logs = np.log(WEIGHTS)
    np.testing.assert_allclose(observation["features"][:, -3], logs - logs.mean(), atol=1e-6)
    np.testing.assert_allclose(observation["features"][:, -2], np.log(CORES), rtol=1e-6)
    np.testing.assert_allclose(observation["features"][:, -1], np.log(2.0), rtol=1e-6)
    env.step(PRIOR)
    features, active = env.observation_layout.decode(observation)
    assert features.shape == (4, 11) and active.all()


def test_the_published_spaces_stay_as_they_are() -> None:
    assert LoadBalanceEnv(scenario=SCENARIO).observation_space.shape == (4, 11)
    plain, more = ObservationLayout(4), ObservationLayout(4, observe_weights=True, observe_background=True)
    assert more.columns[: len(plain.columns)] == plain.columns
    assert more.columns[len(plain.columns) :] == ("weight", "background")
    assert Scenario(name="x", servers=(Server(cores=3),), workload=SCENARIO.workload).configured_weights == (3.0,)


def test_a_configured_weight_is_kept_in_files_and_changes_no_flow() -> None:
    again = from_toml(to_toml(SCENARIO))
    assert again == SCENARIO
    assert SCENARIO.configured_weights == tuple(WEIGHTS)
    assert SCENARIO.core_weights == (4.0, 2.0, 8.0, 1.0)
    with pytest.raises(ScenarioError, match=r"Server\.weight"):
        Server(weight=0.0)


@pytest.mark.parametrize("rule", ["wcmp", "maglev", "oracle_sed", "table"])
def test_rules_without_a_background_load_refuse_index_actions(rule: str) -> None:
    with pytest.raises(InvalidOptionError, match=f"action_type 'index'.*dispatch rule is '{rule}'"):
        LoadBalanceEnv(**KEYS | {"dispatch": rule})


def test_every_rule_that_may_be_drawn_must_take_a_background_load() -> None:
    base = SCENARIO.with_changes(dispatch="marginal")
    keys = KEYS | {"dispatch": None}
    for rules in (Choice(("ecmp",)), Choice(("marginal", "ecmp")), "ecmp"):
        mixed = ScenarioDistribution(base=base, dispatch=rules)
        with pytest.raises(InvalidOptionError, match=r"action_type 'index'.*dispatch rule (is|may be) 'ecmp'"):
            LoadBalanceEnv(**keys | {"scenario": mixed})
        # A rule of the environment's own takes the place of those that are drawn.
        LoadBalanceEnv(**KEYS | {"scenario": mixed}).reset(seed=0)
    never = ScenarioDistribution(base=base, dispatch=Choice(("ecmp", "sed", "marginal"), (0.0, 0.5, 0.5)))
    LoadBalanceEnv(**keys | {"scenario": never}).reset(seed=0)


@pytest.mark.parametrize("make", [LoadBalanceEnv, LoadBalanceVectorEnv, MultiLoadBalanceEnv, MultiLoadBalanceVectorEnv])
def test_a_rule_of_a_reset_must_take_a_background_load(make: Any) -> None:
    base = SCENARIO.with_changes(dispatch="marginal")
    env, twin = (make(**KEYS | {"dispatch": None, "scenario": base}) for _ in range(2))
    for each in (env, twin):
        each.reset(seed=4)
    for other in (
        base.with_changes(dispatch="ecmp"),
        ScenarioDistribution(base=base, dispatch=Choice(("lsq", "wcmp"))),
    ):
        with pytest.raises(InvalidOptionError, match=r"action_type 'index'.*'(ecmp|wcmp)'"):
            env.reset(seed=9, options={"scenario": other})
    observations = [each.reset(options={"scenario": base.with_changes(dispatch="sed")})[0] for each in (env, twin)]
    np.testing.assert_equal(*observations)


@pytest.mark.parametrize(
    ("action_type", "action", "factors"),
    [
        ("normalized", np.zeros(4, np.float32), 1.0),
        ("discrete", np.array([0, 2, 1, 0]), [0.5, 2.0, 1.0, 0.5]),
        ("joint", 9 * 2 + 3 * 1, [0.5, 2.0, 1.0, 0.5]),
    ],
)
def test_weights_may_be_made_relative(action_type: str, action: Any, factors: Any) -> None:
    keys: dict[str, Any] = {
        "scenario": SCENARIO, "action_type": action_type, "action_weights": [0.5, 1.0, 2.0],
        "relative_to_configured": True,
    }  # fmt: skip
    env = LoadBalanceEnv(**keys)
    env.reset(seed=0)
    *_, info = env.step(action)
    np.testing.assert_allclose(info["weights"], WEIGHTS * factors)
    np.testing.assert_array_equal(env.action_codec.encode(info["weights"]), action)
    several = MultiLoadBalanceVectorEnv(3, **keys)
    several.reset(seed=0)
    *_, info = several.step(np.broadcast_to(action, (3, 2, *np.shape(action))))
    np.testing.assert_allclose(info["weights"], np.broadcast_to(WEIGHTS * factors, (3, 2, 4)))
    batch = info["weights"].reshape(6, 4)
    assert np.array_equal(several.action_codec.encode(batch), np.broadcast_to(action, (6, *np.shape(action))))


def test_weights_that_are_given_as_they_are_are_not_made_relative() -> None:
    with pytest.raises(InvalidOptionError, match=r"'normalized', 'discrete' or 'joint'.*got 'continuous'"):
        LoadBalanceEnv(action_type="continuous", relative_to_configured=True)


def test_every_agent_places_its_flows_by_the_rule_of_one_balancer() -> None:
    """Agents that act alike are copies of one balancer: each goes by its own open flows, by a loop in plain Python."""
    seconds, background = 10.0, np.array([0.0, 0.4, 2.5, 7.7, 0.25])
    some = model.scenario(3).with_events([Event(time=seconds, kind="rate", value=0.0)])
    env = MultiLoadBalanceEnv(scenario=some, action_type="index", max_steps=round(seconds / 0.25))
    configured, cores = np.array(some.configured_weights), np.array([server.cores for server in some.servers])
    speeds = np.log10(model.WEIGHTS / configured)
    action = np.stack([speeds, 2.0 * np.log1p(background / cores) / np.log1p(MAX_BACKGROUND) - 1.0], axis=1)
    env.reset(seed=11)
    seen = []
    while env.agents:
        observations, *_, infos = env.step(dict.fromkeys(env.agents, action))
        seen.append([observation[:, 0] for observation in observations.values()])
    np.testing.assert_allclose(infos["lb_2"]["weights"], model.WEIGHTS)
    np.testing.assert_allclose(infos["lb_2"]["background"], background, atol=1e-12)

    # The same arrivals, whatever placed them.
    sim = Simulation(some, record_flows=True)
    sim.reset([int(seeding.np_random(11)[0].integers(1 << 63))])
    sim.step(np.broadcast_to(model.WEIGHTS, (1, 3, 5)).copy(), 1000.0)
    flows = by_id(sim.take_flows())
    chosen, fct = model.plain_loop(flows, lambda q, j: model.marginal(q + background[j], j))
    assert len(chosen) > 500
    for step, open_flows in enumerate(seen, 1):
        now = 0.25 * step
        inside = (flows["arrival"] <= now) & (now < flows["arrival"] + fct)
        expected = np.zeros((3, 5))
        np.add.at(expected, (flows["balancer"][inside], np.array(chosen)[inside]), 1.0)
        np.testing.assert_array_equal(open_flows, expected)


class Fixed(TrainedPolicy):
    """A trained policy that always takes the same action and keeps what it was shown."""

    def __init__(self, action: NDArray[np.float32], keys: dict[str, Any]) -> None:
        super().__init__(None, keys)
        self.action, self.shown = action, []  # type: ignore[var-annotated]

    def reset(self, seed: int | None = None) -> None:
        self.shown = []

    def act(self, observation: Any, info: dict[str, Any]) -> Any:
        self.shown.append(observation)
        return self.action

    def copy(self) -> Fixed:
        return Fixed(self.action, self.env_kwargs)


def test_an_agent_sees_and_sets_what_the_environment_does() -> None:
    shown = {
        "action_type": "index", "observe_weights": True, "observe_background": True, "observe_configured": True,
        "observation": "flat", "normalize": True,
    }  # fmt: skip
    action = np.random.default_rng(3).uniform(-1, 1, (4, 2)).astype(np.float32)
    sections = _split(shown | {"dispatch": "marginal"})
    policy = Fixed(action, sections["observation"] | sections["action"] | sections["environment"])
    agent = Agent(policy, 4, scenario=SCENARIO)
    assert agent.dispatch == "marginal"
    env = LoadBalanceEnv(**KEYS | shown)
    observation, _ = env.reset(seed=1)
    observations = [observation]
    sim = Simulation(SCENARIO, dispatch="marginal")
    now, weights = sim.reset([int(np.random.default_rng(0).integers(2))]), np.ones(4)
    core: Any = env._core
    for _ in range(4):
        # The agent gets the environment's own snapshots.
        given = agent(core.snapshot, weights)
        observation, *_, info = env.step(action)
        observations.append(observation)
        weights = given
        np.testing.assert_array_equal(given, info["weights"])
        np.testing.assert_array_equal(agent.background, info["background"])
    for mine, theirs in zip(policy.shown, observations, strict=False):
        np.testing.assert_array_equal(mine, theirs)
    index = agent.index(weights)
    assert index is not None
    np.testing.assert_allclose(index, np.stack([weights / CORES, info["background"]], axis=1))
    with pytest.raises(PolicyError, match="takes weights only"):
        agent.fit(4, index=False)
    assert now.active.all()


def test_only_recipes_of_two_numbers_per_server_take_it() -> None:
    assert ActionKind.of(make_action_codec(4, "index").space, 4) == ActionKind(0, False, numbers=2)
    pytest.importorskip("torch")
    from lbgym.training import SACGRUConfig

    with pytest.raises(LbgymError, match="instead of 'index'"):
        SACGRUConfig(action_type="index")
    pytest.importorskip("stable_baselines3")
    from lbgym.training.sb3 import SB3Config

    with pytest.raises(LbgymError, match="cannot take action_type 'index'"):
        SB3Config(algorithm="ppo", action_type="index")


class Publisher:
    """A live data plane on a thread that keeps the parameters it was given."""

    def __init__(self, **options: Any) -> None:
        self.region = SharedMemoryRegion.create("lb0", num_servers=4, publish_interval=0.02, **options)
        self.given: list[tuple[list[float], list[list[float]] | None]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._publish)

    def _publish(self) -> None:
        for tick in range(1, 100_000):
            weights = self.region.weights_in_force().tolist()
            index = self.region.index_in_force
            self.given.append((weights, None if index is None else index.tolist()))
            self.region.publish(Publication.of(snapshot(tick, 0.02 * tick, np.ones(4, np.bool_), False)))
            if self._over.wait(0.02):
                return

    def __enter__(self) -> Publisher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self.region.unlink()
        self.region.close()


@pytest.mark.usefixtures("shm_dir")
def test_a_live_data_plane_gets_speeds_and_background_loads() -> None:
    keys: dict[str, Any] = {"scenario": SCENARIO.with_changes(balancers=1), "action_type": "index"}
    with Publisher(takes_index=True) as producer:
        env = LoadBalanceEnv("lb0", **keys, step_interval=0.04, observe_configured=True)
        env.reset()
        action = np.random.default_rng(3).uniform(-1, 1, (4, 2)).astype(np.float32)
        *_, info = env.step(action)
        env.close()
        weights, index = producer.given[-1]
        np.testing.assert_allclose(weights, info["weights"])
        np.testing.assert_allclose(index, np.stack([info["weights"] / CORES, info["background"]], axis=1))


@pytest.mark.usefixtures("shm_dir")
def test_a_live_data_plane_without_an_index_refuses_it() -> None:
    with (
        Publisher(),
        pytest.raises(InvalidOptionError, match=r"action_type 'index'.*region 'lb0' takes weights only"),
    ):
        LoadBalanceEnv("lb0", action_type="index", step_interval=0.04)
