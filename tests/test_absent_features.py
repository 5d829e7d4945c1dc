"""Features that a data plane does not measure: shown as absent, and refused to whoever reads them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import lbgym
from lbgym.controller import Controller, ControllerConfig
from lbgym.drivers import Publisher, ServerRow, Source
from lbgym.env.observations import ObservationLayout
from lbgym.errors import InvalidOptionError, InvalidRewardError, PolicyError, UnknownNameError
from lbgym.features import FEATURE_NAMES
from lbgym.policies import HEURISTICS, Agent, LatencyWeights, WeightPolicy, make_agent, make_weight_policy
from lbgym.scenarios import Scenario, load_scenario
from lbgym.sharedmemory import Publication, SharedMemoryRegion
from lbgym.snapshot import Snapshot
from tests.drivers.test_discovery import eventually
from tests.sharedmemory.conftest import shm_dir

__all__ = ["shm_dir"]

FCT = ("n_flow_on", "fct_mean", "fct_p90", "fct_std", "fct_mean_decay", "fct_p90_decay")


class Still(Source):
    """Two servers of which only a part is measured."""

    driver = "still"

    def __init__(self, features: tuple[str, ...] = FCT) -> None:
        self.features = features

    def servers(self) -> list[ServerRow]:
        return [ServerRow("a"), ServerRow("b")]

    def read(self, now: float) -> Publication:
        none = np.zeros(2, np.int64)
        stats = np.tile(np.arange(11, dtype=np.float32) * np.float32(0.1), (2, 1))
        stats[:, 0] = 0.0
        return Publication(now, np.ones(2, np.bool_), stats, none, none, none, none)

    def apply(self, weights: np.ndarray, now: float) -> None:
        pass


@pytest.fixture
def publisher(shm_dir: Path) -> Iterator[Publisher]:
    with Publisher({"still": Still()}, publish_interval=0.05) as made:
        yield made


@pytest.mark.parametrize("name", HEURISTICS)
def test_heuristics_read_what_they_declare(name: str) -> None:
    scenario = load_scenario("heterogeneous")
    policy = make_weight_policy(name, scenario, seed=1)
    random = np.random.default_rng(1)
    n, width = scenario.num_servers, 14 if policy.uses_ground_truth else 11
    unread = [i for i, feature in enumerate(FEATURE_NAMES) if feature not in policy.uses_features]
    twins = policy.copy(), policy.copy()
    for _ in range(8):
        features = random.uniform(0.1, 3.0, (n, width))
        features[:, 0] = random.integers(0, 9, n)
        other = features.copy()
        other[:, unread] = random.uniform(0.1, 3.0, (n, len(unread)))
        active = np.ones(n, np.bool_)
        results = [twin.weights(values, active) for twin, values in zip(twins, (features, other), strict=True)]
        np.testing.assert_array_equal(*results)
        np.testing.assert_array_equal(twins[0].background, twins[1].background)
        np.testing.assert_array_equal(twins[0].tables, twins[1].tables)
    assert set(policy.uses_features) <= set(FEATURE_NAMES)


def test_observations_leave_absent_features_out() -> None:
    stats, active = np.ones((2, 11), np.float32), np.ones(2, np.bool_)
    layout = ObservationLayout(2, features=["fct_mean", "n_flow_on", "flow_duration_avg"])
    assert layout.features == ("n_flow_on", "fct_mean", "duration_mean") and len(layout.absent) == 8
    np.testing.assert_array_equal(layout.encode(stats, None, active)[0], [1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0])
    assert layout.space == ObservationLayout(2).space and stats.all()
    with pytest.raises(UnknownNameError, match="fct_maen"):
        ObservationLayout(2, features=["fct_maen"])
    for features in ([], "n_flow_on"):
        with pytest.raises(InvalidOptionError, match="features must"):
            ObservationLayout(2, features=features)


def test_simulated_environment_shows_what_is_asked_for() -> None:
    keys = {"scenario": "heterogeneous", "reward_field": "n_flow_on"}
    whole, part = lbgym.LoadBalanceEnv(**keys), lbgym.LoadBalanceEnv(**keys, features=FCT)
    whole.reset(seed=1), part.reset(seed=1)
    for _ in range(4):
        seen, _, _, _, info = whole.step(whole.action_space.sample() * 0)
        shown, _, _, _, shown_info = part.step(part.action_space.sample() * 0)
        np.testing.assert_array_equal(shown[:, :6], seen[:, :6])
        assert not shown[:, 6:].any() and seen[:, 6:].any()
    assert "absent_features" not in info and shown_info["absent_features"] == FEATURE_NAMES[6:]


def test_live_environment_needs_what_is_measured(publisher: Publisher) -> None:
    with pytest.raises(InvalidOptionError, match=r"not measure duration_mean, .*; leave the columns out by features="):
        lbgym.LoadBalanceEnv("still", reward_field="n_flow_on")
    with pytest.raises(InvalidRewardError, match="looks at duration_mean_decay, which this data plane"):
        lbgym.LoadBalanceEnv("still", features=FCT)
    with pytest.raises(InvalidRewardError, match="looks at duration_p90"):
        lbgym.LoadBalanceEnv("still", features=FCT, reward_type={"jain:n_flow_on": 1.0, "max:duration_p90": 1.0})
    # Nothing stays attached.
    env = lbgym.LoadBalanceEnv("still", features=FCT, reward_field="n_flow_on")
    assert env.observation_layout.absent == FEATURE_NAMES[6:]
    with pytest.raises(PolicyError, match="LatencyWeights needs fct_mean_decay, which the environment does not show"):
        LatencyWeights().for_env(lbgym.LoadBalanceEnv(num_servers=2, features=["n_flow_on"]))
    env.close()


def test_policies_are_refused_at_attach(publisher: Publisher, tmp_path: Path) -> None:
    class Durations(WeightPolicy):
        uses_features = ("duration_mean",)

        def weights(self, features: np.ndarray, active: np.ndarray) -> np.ndarray:
            return 1.0 / (1.0 + features[..., 6])

    message = "needs duration_mean, which the data plane does not measure; take a policy that needs only n_flow_on"
    with pytest.raises(PolicyError, match=message):
        Controller(ControllerConfig(shm="still", policy="latency"), policy=Durations()).run()
    with pytest.raises(PolicyError, match=message):
        Agent(Durations()).fit(2, features=FCT)
    make_agent("latency", num_servers=2).fit(2, features=FCT)


def test_adaptive_does_without_durations() -> None:
    scenario = load_scenario("heterogeneous")
    assert isinstance(scenario, Scenario)
    agent = make_agent("adaptive", scenario=scenario)
    with pytest.raises(PolicyError, match=r"needs fct_mean, .*which the data plane does not measure"):
        agent.fit(8, features=["n_flow_on"])
    agent.fit(8, features=FCT, index=False)
    random = np.random.default_rng(0)
    stats = random.uniform(0.1, 1.0, (2, 8, 11)).astype(np.float32)
    # What is in columns that are not measured makes no difference.
    stats[1, :, :6] = stats[0, :, :6]
    found = []
    for each in stats:
        agent.reset()
        none = np.zeros(8, np.int64)
        found.append(agent(Snapshot(1, 0.0, np.ones(8, np.bool_), each, None, none, none, none, none, 0), np.ones(8)))
    np.testing.assert_array_equal(*found)
    assert np.ptp(found[0]) > 0.1


def test_driver_that_measures_less_is_left_to_its_safe_weights(shm_dir: Path) -> None:
    class Durations(LatencyWeights):
        uses_features = ("duration_mean",)

    first, second = Still(FEATURE_NAMES), Still()
    driven, over = threading.Event(), threading.Event()

    def drive() -> None:
        with Publisher({"still": first}, publish_interval=0.05) as publisher:
            while not publisher.regions[0].agent_alive:
                publisher.run(duration=0.05)
            publisher.run(duration=0.5)
        driven.set()
        with Publisher({"still": second}, publish_interval=0.05) as publisher:
            publisher.run(over)

    thread = threading.Thread(target=drive)
    thread.start()
    try:
        config = ControllerConfig(shm="still", policy="latency", attach_timeout=60.0)
        with pytest.raises(PolicyError, match="needs duration_mean, which the data plane does not measure"):
            Controller(config, policy=Durations()).run()
        assert driven.is_set()
        with SharedMemoryRegion.attach("still", read_only=True) as region:
            buffer = region.new_buffer()
            eventually(lambda: region.read_into(buffer) and buffer.safe)
    finally:
        over.set()
        thread.join()


def test_agents_trained_without_them_are_taken(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from lbgym.training import PPOConfig, train_ppo

    common = {"total_steps": 64, "num_envs": 4, "num_steps": 4, "max_steps": 8, "scenario": "heterogeneous"}
    for name, keys, needs in (("part", {"features": list(FCT)}, FCT), ("whole", {}, FEATURE_NAMES)):
        train_ppo(PPOConfig(**common, env_kwargs=keys), out=tmp_path / f"{name}.pt")
        agent = make_agent(str(tmp_path / f"{name}.pt"))
        assert agent.uses_features == needs
        if needs == FCT:
            agent.fit(8, features=FCT)
        else:
            with pytest.raises(PolicyError, match=r"needs duration_mean, .* trained with features="):
                agent.fit(8, features=FCT)
