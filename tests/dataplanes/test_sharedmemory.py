"""A live data plane: pacing, faults of the producer and of the agent, what the environment tells of them."""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
import pytest

import lbgym
from lbgym.dataplanes import BatchedDataPlane, LiveDataPlanes, SharedMemoryDataPlane
from lbgym.env.observations import relative_weights
from lbgym.errors import (
    DataPlaneTimeout,
    InvalidOptionError,
    InvalidRewardError,
    InvalidWeightsError,
    PolicyError,
    RegionBusyError,
    RegionFormatError,
    RegionNotFoundError,
    UnknownNameError,
)
from lbgym.policies import make_policy
from lbgym.scenarios import Workload, default_scenario
from lbgym.sharedmemory import Publication, SharedMemoryRegion
from tests.dataplanes.puppet import START, Puppet, features, puppet, snapshot

INTERVAL = 0.04


def test_it_is_a_data_plane() -> None:
    with puppet("lb0") as _:
        plane = SharedMemoryDataPlane("lb0", interval=INTERVAL)
        assert plane.num_servers == 4
        plane.close()
        group = LiveDataPlanes(["lb0"], interval=INTERVAL)
        assert isinstance(group, BatchedDataPlane)
        assert (group.num_replicas, group.num_balancers, group.num_servers) == (1, 1, 4)
        assert group.source() is group.scenario_of(0) is None
        group.close()


def test_an_observation_is_what_was_published() -> None:
    with puppet("lb0", servers=3) as _:
        plane = SharedMemoryDataPlane("lb0", interval=INTERVAL)
        seen = plane.reset()
        for _ in range(3):
            tick = seen.sequence_id
            np.testing.assert_array_equal(seen.stats, features(tick, 3))
            assert seen.timestamp == pytest.approx(START + tick * 0.02, abs=1e-9)
            assert seen.completed.tolist() == [tick] * 3
            assert seen.started.tolist() == [2 * tick] * 3
            assert seen.active.all() and seen.ground_truth is not None
            before, seen = seen, plane.step(np.ones(3))
            steps = seen.sequence_id - before.sequence_id
            assert plane.info["completed"] == 3 * steps
            assert plane.info["rejected"] == 0
            assert plane.info["fct_mean"] == pytest.approx(0.25)
        plane.close()


def test_mean_fct_is_zero_where_no_flow_ended() -> None:
    """As in a simulation, where it is 0 as well: not a NaN, which would spread."""
    idle = snapshot(0, 0.0, np.ones(4, np.bool_), False)
    over = threading.Event()

    def publish(region: SharedMemoryRegion) -> None:
        for tick in range(1, 10_000):
            region.publish(Publication.of(replace(idle, timestamp=0.02 * tick)))
            if over.wait(0.02):
                return

    with SharedMemoryRegion.create("lb0", num_servers=4, publish_interval=0.02) as region:
        producer = threading.Thread(target=publish, args=(region,))
        producer.start()
        try:
            env = lbgym.LoadBalanceEnv(shm_name="lb0", step_interval=INTERVAL)
            infos = [env.reset()[1], *(env.step(env.action_space.sample())[4] for _ in range(3))]
            env.close()
        finally:
            over.set()
            producer.join()
    assert [(info["completed"], info["rejected"], info["fct_mean"]) for info in infos] == [(0, 0, 0.0)] * 4
    simulated = lbgym.LoadBalanceEnv(scenario=replace(default_scenario(4), workload=Workload(rate=1e-9)))
    simulated.reset(seed=1)
    assert simulated.step(simulated.action_space.sample())[4]["fct_mean"] == 0.0


@pytest.mark.parametrize("period", [0.02, 0.04, 0.03], ids=["divisor", "equal", "neither"])
def test_deadlines_do_not_drift(period: float) -> None:
    """Every observation is the first one on or after its deadline, and the deadlines are whole intervals apart."""
    with puppet("lb0", period=period) as _:
        plane = SharedMemoryDataPlane("lb0", interval=INTERVAL)
        first = plane.reset().timestamp
        deadline = first
        late = 0
        for _ in range(25):
            seen = plane.step(np.ones(4)).timestamp
            deadline += INTERVAL * (1 + plane.info["missed_observations"])
            # A quarter of a publication may be missing, because timers jitter.
            assert -0.25 * period - 1e-9 <= seen - deadline
            late += not plane.info["missed_observations"] and seen - deadline >= period
        # Whoever is held up until the next publication sees that one: on a busy machine now and then, not as a rule.
        assert late <= 12
        assert deadline - first == pytest.approx(round((deadline - first) / INTERVAL) * INTERVAL)
        plane.close()


def test_time_is_scaled_by_the_clock_rate() -> None:
    with puppet("lb0", period=0.2, rate=10.0) as _:
        plane = SharedMemoryDataPlane("lb0", interval=0.4)
        first = plane.reset().timestamp
        took = []
        for _ in range(10):
            begin = time.monotonic()
            last = plane.step(np.ones(4)).timestamp
            took.append(time.monotonic() - begin)
        assert last - first >= 10 * 0.4 - 0.06
        # A step is 0.4 s of the data plane's clock; in real time each would be, too, were it not scaled.
        assert min(took) < 0.2
        plane.close()


def test_info_says_which_action_is_reflected() -> None:
    with puppet("lb0") as strings:
        plane = SharedMemoryDataPlane("lb0", interval=INTERVAL)
        plane.reset()
        assert plane.info["applied_sequence_id"] == -1
        assert plane.info["safe_weights"]
        np.testing.assert_array_equal(plane.info["weights_in_force"], [1, 2, 3, 4])
        ids = []
        for k in range(5):
            weights = np.array([1.0, 2.0, 0.0, k + 0.5])
            for _ in range(100):
                begin = time.monotonic()
                plane.step(weights)
                ids.append(plane.info["action_sequence_id"])
                if plane.info["applied_sequence_id"] == ids[-1]:
                    break
                # The data plane was held up, and had looked for an action before.
                assert plane.info["applied_sequence_id"] == ids[-1] - 1
            else:
                raise AssertionError("no action is ever in force")
            assert 0.0 <= plane.info["action_delay"] < time.monotonic() - begin
            assert not plane.info["safe_weights"]
            np.testing.assert_array_equal(plane.info["weights_in_force"], weights)
            assert strings.tell(weights=True) == weights.tolist()
        assert ids == list(range(ids[0], ids[0] + len(ids)))
        plane.close()
        # The next agent's actions go on from there, so that nobody takes an old one for its own.
        plane = SharedMemoryDataPlane("lb0", interval=INTERVAL)
        plane.reset()
        assert plane.info["applied_sequence_id"] == ids[-1]
        plane.step(np.ones(4))
        assert plane.info["action_sequence_id"] == ids[-1] + 1
        plane.close()


def test_a_lease_that_ends_puts_the_safe_weights_in_force() -> None:
    lease = 0.1

    def given(plane: SharedMemoryDataPlane, strings: Puppet) -> Any:
        """What is in force after a step, told before the lease is over."""
        for _ in range(100):
            begin = time.monotonic()
            plane.step(np.array([5.0, 5.0, 1.0, 1.0]))
            told = strings.tell(weights=True)
            if time.monotonic() < begin + lease:
                return told
        raise AssertionError(f"no step takes less than {lease} s")

    with puppet("lb0") as strings:
        plane = SharedMemoryDataPlane("lb0", interval=INTERVAL, lease=lease)
        plane.reset()
        assert given(plane, strings) == [5.0, 5.0, 1.0, 1.0]
        time.sleep(lease)
        assert strings.tell(weights=True) == [1.0, 2.0, 3.0, 4.0]
        assert given(plane, strings) == [5.0, 5.0, 1.0, 1.0]
        plane.withdraw()
        assert strings.tell(weights=True) == [1.0, 2.0, 3.0, 4.0]
        plane.close()


def test_a_slow_agent_is_told_what_it_missed() -> None:
    with puppet("lb0") as _:
        plane = SharedMemoryDataPlane("lb0", interval=INTERVAL)
        first = plane.reset()
        deadline = first.timestamp
        time.sleep(10.5 * INTERVAL)
        seen = plane.step(np.ones(4))
        missed = plane.info["missed_observations"]
        assert missed >= 10
        assert plane.info["overrun"] >= 9 * INTERVAL
        assert seen.timestamp >= deadline + (1 + missed) * INTERVAL - 0.005
        # What it then sees is not what lay there meanwhile, but reflects its action: this one, or, of a data plane that
        # was held up as well, the next.
        while plane.info["applied_sequence_id"] != plane.info["action_sequence_id"]:
            assert plane.info["action_sequence_id"] < 100
            seen = plane.step(np.ones(4))
        steps = 0
        for _ in range(5):
            last = plane.step(np.ones(4))
            steps += 1 + plane.info["missed_observations"]
        assert abs((last.timestamp - seen.timestamp) - steps * INTERVAL) < 0.02 + 0.01
        plane.close()


def test_an_agent_that_is_suspended_goes_on() -> None:
    """SIGSTOP of a whole process is in tests/controller; here the thread that steps sleeps in the middle of a step."""
    with puppet("lb0") as strings:
        plane = SharedMemoryDataPlane("lb0", interval=INTERVAL)
        plane.reset()
        strings.send(signal.SIGSTOP)
        threading.Timer(10 * INTERVAL, strings.send, [signal.SIGCONT]).start()
        seen = plane.step(np.ones(4))
        # The puppet catches up with its clock, so what comes first is an old observation, and none is invented.
        assert seen.sequence_id > 1
        assert plane.step(np.ones(4)).timestamp > seen.timestamp
        plane.close()


def test_a_late_data_plane_is_counted_and_the_grid_stays() -> None:
    with puppet("lb0") as strings:
        plane = SharedMemoryDataPlane("lb0", interval=INTERVAL)
        first = plane.reset().timestamp
        begin = time.monotonic()
        # Before the silence, as it takes a moment to say so, and the agent is to be in time.
        plane.begin_step(np.ones(4))
        strings.tell(silence=5 * INTERVAL)
        seen = plane.end_step().timestamp
        missed = plane.info["missed_observations"]
        assert 3 <= missed <= (time.monotonic() - begin) / INTERVAL + 1
        assert plane.info["overrun"] == 0.0
        assert abs(seen - first - (1 + missed) * INTERVAL) < 0.02 + 0.006
        plane.close()


def test_silence_is_an_error_that_says_who_is_silent_and_since_when() -> None:
    with puppet("lb0") as strings:
        plane = SharedMemoryDataPlane("lb0", interval=INTERVAL, timeout=0.5)
        plane.reset()
        strings.tell(silence=600.0)
        with pytest.raises(DataPlaneTimeout, match=r"'lb0'.*number \d+, [\d.]+ s old.*lives, last heard") as raised:
            plane.step(np.ones(4))
        assert str(strings.process.pid) in str(raised.value)
        strings.tell(silence=0.0)
        # And it goes on as soon as the data plane does.
        assert plane.step(np.ones(4)).active.all()
        assert plane.info["missed_observations"] > 0
        plane.close()


def test_a_dead_producer_is_an_error_and_its_successor_is_followed(caplog: pytest.LogCaptureFixture) -> None:
    env_keys = {"shm_name": "lb0", "step_interval": INTERVAL, "shm_timeout": 0.3, "action_type": "continuous"}
    with puppet("lb0", servers=4) as first:
        env = lbgym.LoadBalanceEnv(**env_keys)
        env.reset()
        env.step(np.full(4, 2.0))
        first.kill()
        with pytest.raises(DataPlaneTimeout, match="is gone"):
            env.step(np.full(4, 2.0))
    # Another capacity and a clock that begins anew.
    with caplog.at_level(logging.WARNING, "lbgym"), puppet("lb0", servers=4, capacity=128) as second:
        observation, _, _, _, info = env.step(np.full(4, 3.0))
        assert info["producer_restarted"]
        assert "new producer" in caplog.text
        assert observation[0, 0] == info["sequence_id"] % 1000
        assert info["completed"] == 4 * info["sequence_id"]
        _, _, _, _, info = env.step(np.full(4, 3.0))
        assert not info["producer_restarted"]
        assert second.tell(weights=True) == [3.0] * 4
        # One that ends in order is followed just so.
        second.tell(close=True)
        with puppet("lb0", servers=4, capacity=4):
            _, _, _, _, info = env.step(np.full(4, 1.5))
            assert info["producer_restarted"]
        env.close()


def test_a_successor_that_is_silent_at_first_is_told_of_later() -> None:
    with puppet("lb0") as first:
        plane = SharedMemoryDataPlane("lb0", interval=INTERVAL, timeout=1.0)
        plane.reset()
        first.kill()
    with SharedMemoryRegion.create("lb0", num_servers=4, publish_interval=0.02) as second:
        with pytest.raises(DataPlaneTimeout, match="there is none"):
            plane.step(np.ones(4))
        shown = Publication.of(snapshot(1, 3.0, np.ones(4, np.bool_), False))
        threading.Timer(0.05, second.publish, [shown]).start()
        seen = plane.step(np.ones(4))
        assert (seen.sequence_id, seen.timestamp) == (1, 3.0)
        assert plane.info["producer_restarted"]
        assert (plane.info["missed_observations"], plane.info["overrun"]) == (0, 0.0)
        plane.close()


@pytest.mark.parametrize(("command", "value"), [("jump", -5.0), ("jump", 1e4), ("sequence", 0)])
def test_jumps_are_noted_and_survived(command: str, value: float) -> None:
    with puppet("lb0") as strings:
        plane = SharedMemoryDataPlane("lb0", interval=INTERVAL, timeout=0.5)
        plane.reset()
        for _ in range(5):
            plane.step(np.ones(4))
            assert not plane.info["clock_jumped"]
        strings.tell(**{command: value})
        noted = []
        for _ in range(4):
            plane.step(np.ones(4))
            noted.append(plane.info["clock_jumped"])
            # As many as there were steps in what the clock jumped by would be more than a hundred.
            assert plane.info["missed_observations"] < 100
        assert noted.count(True) == 1
        plane.close()


def test_servers_join_and_leave(caplog: pytest.LogCaptureFixture) -> None:
    with puppet("lb0", servers=3) as strings:
        env = lbgym.LoadBalanceEnv(
            shm_name="lb0", step_interval=INTERVAL, num_servers=4, observation="dict", action_type="continuous"
        )
        observation, info = env.reset()
        assert observation["mask"].tolist() == [1, 1, 1, 0]
        assert not observation["features"][3].any()
        strings.tell(active=[True, False, True, True])
        for _ in range(2):
            observation, _, _, _, info = env.step(np.ones(4))
        assert observation["mask"].tolist() == [1, 0, 1, 1]
        assert not observation["features"][1].any() and observation["features"][3].all()
        assert info["active"].tolist() == [True, False, True, True]
        assert info["active_servers"] == [0, 2, 3]
        strings.tell(active=[True] * 6)
        with caplog.at_level(logging.WARNING, "lbgym"):
            for _ in range(2):
                observation, *_ = env.step(np.full(4, 2.0))
        assert "now has 6 servers" in caplog.text
        assert observation["features"].shape == (4, 11)
        assert strings.tell(weights=True) == [2.0, 2.0, 2.0, 2.0, 1.0, 1.0]
        env.close()


def test_a_data_plane_that_publishes_nonsense_is_an_error() -> None:
    with puppet("lb0", period=0.2) as strings:
        plane = SharedMemoryDataPlane("lb0", interval=0.2)
        plane.reset()
        # So that no good one takes its place before it is looked at.
        strings.tell(silence=600.0)
        strings.tell(poison=True)
        with pytest.raises(RegionFormatError, match="lb0"):
            plane.step(np.ones(4))
        plane.close()


def test_an_action_that_no_agent_may_write_keeps_nobody_out() -> None:
    with puppet("lb0") as strings:
        region = SharedMemoryRegion.attach("lb0")
        region.write_action(sequence_id=7, weights=np.ones(4))
        at = region.layout.actions_offset + region.layout.action_size + region.layout.action_sections["weights"]
        with region.path.open("r+b") as file:
            file.seek(at)
            file.write(np.full(4, np.nan).tobytes())
        with pytest.raises(RegionFormatError):
            region.read_action()
        region.close()
        plane = SharedMemoryDataPlane("lb0", interval=INTERVAL)
        plane.reset()
        plane.step(np.full(4, 2.0))
        assert strings.tell(weights=True) == [2.0] * 4
        plane.close()


def test_one_agent_per_region() -> None:
    with puppet("lb0") as _:
        first = lbgym.LoadBalanceEnv(shm_name="lb0", step_interval=INTERVAL)
        with pytest.raises(RegionBusyError, match="another agent"):
            lbgym.LoadBalanceEnv(shm_name="lb0", step_interval=INTERVAL)
        first.close()
        first.close()
        second = lbgym.LoadBalanceEnv(shm_name="lb0", step_interval=INTERVAL)
        second.reset()
        second.close()


def test_the_gymnasium_environment() -> None:
    with puppet("lb0") as _:
        env = gymnasium.make(
            "lbgym:lbgym/LoadBalance-v0", shm_name="lb0", step_interval=INTERVAL, max_steps=4, render_mode="ansi"
        )
        for _ in range(2):
            observation, info = env.reset(seed=1)
            assert observation in env.observation_space
            truncated = False
            while not truncated:
                observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
                assert observation in env.observation_space
                assert math.isfinite(reward) and not terminated
            assert "live" in env.render()
        np.testing.assert_array_equal(info["weights_in_force"], info["weights"])
        env.close()


@pytest.mark.parametrize("layout", ["matrix", "dict"])
def test_the_environment_shows_the_weights_in_force(layout: str) -> None:
    with puppet("lb0") as _:
        env = lbgym.LoadBalanceEnv(
            shm_name="lb0",
            step_interval=INTERVAL,
            action_type="continuous",
            observation=layout,
            observe_weights=True,
        )
        assert env.feature_columns[-1] == "weight"

        def shown(observation: Any) -> Any:
            return (observation["features"] if layout == "dict" else observation)[:, -1]

        observation, info = env.reset()
        # The safe weights of the data plane, before any action.
        np.testing.assert_array_equal(info["weights"], [1, 2, 3, 4])
        for weights in ([1.0, 2.0, 4.0, 8.0], [3.0, 1.0, 1.0, 1.0]):
            assert np.array_equal(shown(observation), relative_weights(info["weights"], info["active"]))
            observation, _, _, _, info = env.step(np.array(weights, np.float32))
            np.testing.assert_array_equal(info["weights_in_force"], weights)
            assert observation in env.observation_space
        assert np.array_equal(shown(observation), relative_weights(info["weights"], info["active"]))
        assert np.ptp(shown(observation)) > 1.0
        env.close()


def test_what_is_known_of_the_cluster_serves_policies() -> None:
    with puppet("lb0", servers=8) as _:
        env = lbgym.LoadBalanceEnv(shm_name="lb0", step_interval=INTERVAL, action_type="continuous")
        with pytest.raises(PolicyError, match=r"cores.*scenario"):
            make_policy("cores", env)
        observation, info = env.reset()
        env.step(make_policy("latency", env).act(observation, info))
        env.close()
        env = lbgym.LoadBalanceEnv(
            shm_name="lb0", step_interval=INTERVAL, action_type="continuous", scenario="heterogeneous"
        )
        observation, info = env.reset()
        _, _, _, _, info = env.step(make_policy("cores", env).act(observation, info))
        assert len(set(info["weights_in_force"].tolist())) > 1
        env.close()


def test_bad_keys() -> None:
    with pytest.raises(RegionNotFoundError, match=r"no region 'nobody'.*0\.05 s"):
        lbgym.LoadBalanceEnv(shm_name="nobody", shm_timeout=0.05)
    with pytest.raises(InvalidOptionError, match="timeout"):
        lbgym.LoadBalanceEnv(shm_name="lb0", shm_timeout=0)
    with pytest.raises(InvalidOptionError, match="interval"):
        lbgym.LoadBalanceEnv(shm_name="lb0", step_interval=-1)
    with pytest.raises(InvalidOptionError, match="one data plane"):
        lbgym.LoadBalanceVectorEnv(4, shm_name="lb0")
    with puppet("lb0", ground_truth=False) as _:
        for keys, error in (
            ({"use_ground_truth": True}, InvalidOptionError),
            ({"reward_field": "cpu_usage"}, InvalidOptionError),
            ({"reward_type": "p99_fct"}, InvalidRewardError),
            ({"dispatch": "lsq"}, InvalidOptionError),
            ({"num_servers": 3}, InvalidOptionError),
            ({"num_servers": 65}, InvalidOptionError),
            ({"scenario": "heterogeneous"}, InvalidOptionError),
            ({"reward_type": "no such"}, UnknownNameError),
        ):
            with pytest.raises(error):
                lbgym.LoadBalanceEnv(shm_name="lb0", **keys)
        # None of them kept the region.
        env = lbgym.LoadBalanceEnv(shm_name="lb0", step_interval=INTERVAL)
        with pytest.raises(UnknownNameError, match="load"):
            env.reset(options={"load": 0.5})
        env.close()
        plane = SharedMemoryDataPlane("lb0", interval=INTERVAL)
        plane.reset()
        for weights in (np.ones(3), np.zeros(4), np.array([1.0, -1.0, 1.0, 1.0]), np.array([1.0, np.nan, 1.0, 1.0])):
            with pytest.raises(InvalidWeightsError):
                plane.step(weights)
        plane.step(np.ones(4))
        plane.close()


def test_a_region_without_an_observation_is_waited_for_then_refused() -> None:
    with SharedMemoryRegion.create("lb0", num_servers=2):
        with pytest.raises(DataPlaneTimeout, match=r"there is none.*lives"):
            SharedMemoryDataPlane("lb0", timeout=0.1)
        # And nothing keeps the next agent out.
        with pytest.raises(DataPlaneTimeout):
            SharedMemoryDataPlane("lb0", timeout=0.1)
