"""The controller against data planes in processes of their own: what it writes, and what it does when things fail."""

from __future__ import annotations

import logging
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lbgym.controller import Controller, ControllerConfig, Outcome
from lbgym.controller.logs import JsonFormatter
from lbgym.controller.metrics import Metrics, State, Step
from lbgym.errors import (
    InvalidOptionError,
    MissingExtraError,
    PolicyError,
    RegionBusyError,
    RegionNotFoundError,
    UnknownNameError,
)
from lbgym.features import FEATURE_NAMES
from lbgym.policies import Agent, load_policy, make_agent
from lbgym.scenarios import named_scenario
from lbgym.sharedmemory import ServerState, SharedMemoryRegion
from tests.controller.running import INTERVAL, PATIENCE, Fickle, Running, controlling, data_plane, until
from tests.dataplanes.puppet import features, snapshot
from tests.drivers.emulated import emulator
from tests.sharedmemory.nursery import Nursery

#: The puppet's, of four servers.
SAFE = [1.0, 2.0, 3.0, 4.0]
WANTED = [1.0, 1.5, 2.0, 0.5]
EQUAL = [1.0, 1.0, 1.0, 1.0]


def page(running: Running) -> dict[tuple[str, ...], float]:
    """The metrics as a scraper sees them: by name, and values of the labels in order of their names."""
    parser = pytest.importorskip("prometheus_client.parser")
    metrics = running.until(lambda: running.controller.metrics)
    with urllib.request.urlopen(metrics.url, timeout=10) as answer:
        families = list(parser.text_string_to_metric_families(answer.read().decode()))
    samples = (sample for family in families for sample in family.samples)
    return {(s.name, *(s.labels[label] for label in sorted(s.labels))): s.value for s in samples}


def test_it_puts_the_policys_weights_in_force_renews_the_lease_and_withdraws(nursery: Nursery) -> None:
    with data_plane(nursery) as strings, controlling(Fickle(WANTED)) as running:
        running.steps(3)
        assert strings.weights == WANTED
        # Several leases later they still are.
        running.steps(25)
        assert strings.weights == WANTED
        with SharedMemoryRegion.attach("lb0", read_only=True) as region:
            first = region.read_observation()["applied_sequence_id"]
            running.steps(3)
            assert region.read_observation()["applied_sequence_id"] > first
        assert running.stop() is Outcome.STOPPED
        assert strings.weights == SAFE
        assert running.counts.errors == running.counts.timeouts == running.counts.fallbacks == 0


def test_metrics_say_what_is_seen_and_done(nursery: Nursery) -> None:
    with (
        data_plane(nursery, servers=4) as strings,
        controlling(Fickle([1.0, 100.0, 1.0, 1.0]), metrics_port=0, max_ratio=10.0) as running,
    ):
        strings.tell(active=[True, True, True, False])
        running.steps(4)
        running.until(lambda: running.state.step is not None and not running.state.step.active[3])
        shown = page(running)
        assert shown["lbgym_steps_total",] >= 4
        assert shown["lbgym_step_latency_seconds_count",] >= 3
        assert shown["lbgym_action_delay_seconds_count",] >= 3
        assert shown["lbgym_controller_info", "policy", "lb0", running.state.version] == 1
        assert [shown["lbgym_weight_proposed", str(i)] for i in range(4)] == [1.0, 100.0, 1.0, 1.0]
        assert shown["lbgym_weight_written", "1"] == pytest.approx(10.0 * shown["lbgym_weight_written", "0"])
        assert shown["lbgym_weight_in_force", "1"] > 1.0
        assert [shown["lbgym_server_active", str(i)] for i in range(4)] == [1, 1, 1, 0]
        assert shown["lbgym_envelope_interventions_total", "max_ratio"] >= 4
        assert shown["lbgym_envelope_interventions_total", "rate_limit"] == 0
        for name in FEATURE_NAMES:
            assert shown["lbgym_feature", name, "1"] % 1 == features(0, 4)[1, 0] % 1
            assert shown["lbgym_feature", name, "3"] == 0.0
        assert shown["lbgym_lease_seconds",] == 0.5
        assert 0.0 <= shown["lbgym_observation_age_seconds",] < 0.5
        assert shown["lbgym_connected",] == 1 and shown["lbgym_fallback_active",] == 0
        # A second one in the same process has its own.
        with data_plane(nursery, "lb1", servers=2), controlling(Fickle([]), shm="lb1", metrics_port=0) as other:
            other.steps(1)
            assert ("lbgym_weight_written", "2") not in page(other)
            assert page(running)["lbgym_controller_info", "policy", "lb0", running.state.version] == 1


def test_metrics_and_logs_name_the_servers(shm_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "lbgym.controller")
    with (
        emulator("--name", "lb0", "--scenario", "heterogeneous", "--seed", "1", "--publish-interval", INTERVAL),
        controlling(Fickle([1.0] * 8), metrics_port=0, lease=60.0, timeout=30.0) as running,
    ):
        running.steps(2)
        shown = page(running)
        names = [f"server-{i}" for i in range(8)]
        assert [shown["lbgym_weight_written", name] for name in names] == [1.0] * 8
        assert shown["lbgym_feature", "n_flow_on", "server-3"] >= 0.0
        states = {key[1:]: value for key, value in shown.items() if key[0] == "lbgym_server_state"}
        assert len(states) == 8 * 4
        assert all(value == (state == "up") for (_, state), value in states.items())
        assert ("lbgym_weight_written", "0") not in shown
    fields = {record.event: record.fields for record in caplog.records if hasattr(record, "event")}
    assert fields["attached"]["names"] == fields["step"]["servers"] == tuple(names)


def test_metrics_leave_out_what_is_not_measured() -> None:
    pytest.importorskip("prometheus_client")
    state = State("0", "uniform", "lb0")
    state.step = Step(
        None, np.ones(2), np.ones(2), np.ones(2, np.bool_), np.ones((2, 11), np.float32), False, ("web", "1"),
        np.array([ServerState.DRAINING, ServerState.UNKNOWN], np.uint8), frozenset(("fct_mean",)),
    )  # fmt: skip
    metrics = Metrics(state, 0, "127.0.0.1")
    try:
        read = metrics.registry.get_sample_value
        assert read("lbgym_feature", {"server": "web", "feature": "fct_mean"}) == 1.0
        assert read("lbgym_feature", {"server": "web", "feature": "n_flow_on"}) is None
        assert read("lbgym_server_state", {"server": "web", "state": "draining"}) == 1.0
        assert read("lbgym_server_state", {"server": "1", "state": "unknown"}) == 1.0
        assert read("lbgym_server_state", {"server": "1", "state": "up"}) == 0.0
    finally:
        metrics.close()


@pytest.mark.parametrize("mode", ["is no number", "is negative", "is all zero", "has another shape"])
def test_what_no_weights_are_is_an_error_of_the_policy(mode: str) -> None:
    policy = Fickle(WANTED)
    agent = Agent(policy, name="fickle")
    agent.fit(4, ground_truth=False)
    seen = snapshot(1, 0.0, np.ones(4, np.bool_), False)
    assert agent(seen, np.ones(4), {}).tolist() == WANTED
    policy.mode = mode
    with pytest.raises(PolicyError, match="policy 'fickle' must return"):
        agent(seen, np.ones(4), {})


def test_a_policy_that_fails_gives_way_to_the_fallback_and_comes_back(
    nursery: Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    policy = Fickle(WANTED)
    caplog.set_level(logging.INFO, "lbgym")
    keys: dict[str, Any] = {"fallback_after": 2, "trial_steps": 2, "metrics_port": 0}
    with data_plane(nursery) as strings, controlling(policy, **keys) as running:
        for number, failure in enumerate(("raises", "is no number", "is late"), 1):
            running.steps(2)
            counts, before, resets = running.counts, replace(running.counts), policy.resets
            policy.mode = failure
            running.until(lambda: running.state.fallback, "the fallback")
            running.steps(2)
            assert strings.weights == EQUAL, failure
            assert counts.fallbacks == number and counts.fallback_steps > before.fallback_steps
            late = failure == "is late"
            assert counts.overruns >= before.overruns + 2 * late
            assert counts.errors >= before.errors + 2 * (not late)
            # The step that failed first held what was in force; a late action is still an action.
            assert counts.held_steps <= before.held_steps + (not late)
            shown = page(running)
            assert shown["lbgym_fallback_active",] == 1 and shown["lbgym_fallbacks_total",] == number
            failed = "overruns" if late else "errors"
            assert shown[f"lbgym_policy_{failed}_total",] >= getattr(before, failed) + 2
            # The policy is tried, fails, rests, and the fallback stays.
            calls = policy.calls
            running.until(lambda calls=calls: policy.calls >= calls + 2, "two trials")
            assert running.state.fallback and strings.weights == EQUAL
            policy.mode = "good"
            running.until(lambda: not running.state.fallback, "the policy to come back")
            running.steps(2)
            assert strings.weights == WANTED
            assert page(running)["lbgym_fallback_active",] == 0
            # What it remembered when it failed is gone.
            assert policy.resets > resets
    events = [getattr(record, "event", None) for record in caplog.records]
    for event in ("policy_error", "policy_overrun", "fallback", "policy_back", "summary", "stopped"):
        assert event in events
    assert events.index("policy_error") < events.index("fallback") < events.index("policy_back")


def test_a_failed_trial_is_followed_by_a_rest_and_delays_no_weights(nursery: Nursery) -> None:
    policy = Fickle(WANTED)
    keys: dict[str, Any] = {"fallback_after": 1, "trial_steps": 3, "fallback": "random"}
    with data_plane(nursery) as strings, controlling(policy, **keys) as running:
        running.steps(1)
        policy.mode = "raises"
        running.until(lambda: running.counts.fallback_steps >= 1)
        calls, resets, steps = policy.calls, policy.resets, running.counts.fallback_steps
        running.steps(12)
        # One in four steps, and each with a policy that remembers nothing of the one before.
        tried = policy.calls - calls
        assert 2 <= tried <= (running.counts.fallback_steps - steps) // 4 + 1
        assert abs(policy.resets - resets - tried) <= 1
        policy.mode = "waits"
        assert policy.waiting.wait(PATIENCE)
        assert running.state.step is not None
        assert strings.weights == running.state.step.weights.tolist()
        policy.go.set()


def test_one_failure_holds_the_weights_and_a_policy_may_not_come_back(nursery: Nursery) -> None:
    policy = Fickle(WANTED)
    with data_plane(nursery) as strings, controlling(policy, fallback_after=3, trial_steps=1, recover=False) as running:
        running.steps(2)
        policy.mode = "raises"
        running.until(lambda: running.counts.errors >= 1)
        assert strings.weights == WANTED
        running.until(lambda: running.state.fallback)
        policy.mode = "good"
        calls = policy.calls
        running.steps(8)
        assert running.state.fallback and policy.calls == calls and strings.weights == EQUAL


def test_silence_ends_the_lease_and_the_fallback_begins_after_it(nursery: Nursery) -> None:
    with (
        data_plane(nursery) as strings,
        controlling(Fickle(WANTED), metrics_port=0, timeout=0.1, lease=0.2, fallback_after=2, trial_steps=4) as running,
    ):
        running.steps(3)
        strings.tell(silence=600.0)
        running.until(lambda: running.counts.timeouts >= 3, "timeouts")
        # Nothing was decided, nothing written: the lease is over.
        assert strings.weights == SAFE
        steps = running.counts.steps
        shown = page(running)
        assert shown["lbgym_observation_timeouts_total",] >= 3
        assert shown["lbgym_observation_age_seconds",] >= 0.2
        assert shown["lbgym_steps_total",] == running.counts.steps == steps
        strings.tell(silence=0.0)
        running.until(lambda: running.state.fallback, "the first observation")
        running.until(lambda: running.counts.steps > steps)
        running.until(lambda: not running.state.fallback, "the policy to come back")
        assert 4 <= running.counts.fallback_steps <= running.counts.steps - steps + 1
        running.steps(2)
        assert strings.weights == WANTED
        assert page(running)["lbgym_fallback_active",] == 0


def test_a_single_timeout_is_no_reason_for_the_fallback(nursery: Nursery) -> None:
    with data_plane(nursery) as strings, controlling(Fickle(WANTED), timeout=0.1, fallback_after=50) as running:
        running.steps(2)
        strings.tell(silence=0.3)
        running.until(lambda: running.counts.timeouts >= 1)
        running.steps(3)
        assert running.counts.fallbacks == 0 and strings.weights == WANTED


def test_it_gives_up_if_told_so(nursery: Nursery) -> None:
    with data_plane(nursery) as strings, controlling(Fickle(WANTED), timeout=0.05, max_timeouts=2) as running:
        running.steps(1)
        strings.kill()
        assert running.join() is Outcome.SILENT
        assert running.counts.timeouts == 2


def test_a_producer_that_is_killed_and_started_again_is_followed(nursery: Nursery) -> None:
    policy = Fickle(WANTED)
    with data_plane(nursery) as first, controlling(policy, timeout=0.1, fallback_after=10**6) as running:
        running.steps(2)
        resets = policy.resets
        first.kill()
        running.until(lambda: running.counts.timeouts >= 1)
        with data_plane(nursery) as second:
            running.until(lambda: running.counts.restarts == 1)
            running.steps(2)
            assert second.weights == WANTED and policy.resets == resets + 1
            second.kill()
        # With more room, and more servers.
        with data_plane(nursery, capacity=128, servers=6) as third:
            running.until(lambda: running.counts.restarts == 2)
            running.steps(2)
            assert third.weights == [*WANTED, 1.0, 1.0] and running.counts.errors == 0


def test_nothing_is_written_for_a_producer_of_whom_nothing_was_seen(nursery: Nursery) -> None:
    with controlling(Fickle(WANTED), timeout=0.1) as running:
        with data_plane(nursery):
            running.steps(2)
        running.until(lambda: running.counts.timeouts >= 1)
        with SharedMemoryRegion.create("lb0", num_servers=4, safe_weights=SAFE) as region:
            running.until(lambda: region.agent_alive, "the controller to follow")
            timeouts = running.counts.timeouts
            running.until(lambda: running.counts.timeouts >= timeouts + 2)
            assert region.read_action() is None and region.weights_in_force().tolist() == SAFE


def test_nonsense_is_counted_and_outlived(nursery: Nursery) -> None:
    # The puppet wakes nobody for it.
    with (
        data_plane(nursery, period=0.25) as strings,
        controlling(Fickle(WANTED), step_interval=0.25, lease=1) as running,
    ):
        running.steps(1)
        # Once more, as long as a good one takes its place before it is looked at.
        running.until(lambda: strings.tell(poison=True) and running.counts.invalid >= 1)
        running.steps(2)
        assert strings.weights == WANTED


def test_servers_join_and_leave(nursery: Nursery) -> None:
    policy = Fickle([3.0, 1.0])
    with data_plane(nursery, servers=2) as strings, controlling(policy) as running:
        running.steps(2)
        assert strings.weights == [3.0, 1.0]
        policy.wanted = [3.0, 1.0, 2.0, 1.5]
        strings.tell(active=[True] * 4)
        running.until(lambda: running.state.step is not None and len(running.state.step.weights) == 4)
        running.steps(2)
        assert strings.weights == [3.0, 1.0, 2.0, 1.5]
        strings.tell(active=[True, False, True, True])
        running.until(lambda: running.state.step is not None and not running.state.step.active[1])
        running.steps(2)
        # The one that left has the mean, in case it comes back.
        assert strings.weights == pytest.approx([3.0, 6.5 / 3, 2.0, 1.5])


def test_a_data_plane_that_publishes_less_often_than_a_step_is_no_outage(
    nursery: Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    policy = Fickle(WANTED)
    with data_plane(nursery, period=0.1) as strings, controlling(policy, fallback_after=1, trial_steps=1) as running:
        running.steps(1)
        resets = policy.resets
        policy.mode = "raises"
        running.until(lambda: running.state.fallback)
        policy.mode = "good"
        running.until(lambda: not running.state.fallback, "the policy to come back")
        running.steps(2)
        assert strings.weights == WANTED and running.counts.missed >= 2
        # What it remembered when it failed was forgotten before the trial.
        assert policy.resets > resets
    assert "publishes every 0.1 s, which is longer than a step of 0.04 s" in caplog.text


def test_weights_move_at_the_limit(nursery: Nursery) -> None:
    # The safe weights' relative ones are 0.4 to 1.6; per step of 0.04 s a tenth of a factor 2 per second.
    policy = Fickle([4.0, 3.0, 2.0, 1.0])
    keys: dict[str, Any] = {"rate_limit": 2.0, "log_level": "debug"}
    with data_plane(nursery) as strings, controlling(policy, **keys) as running:
        running.steps(2)
        moved = np.array(strings.weights)
        change = moved / moved.mean() / (np.array(SAFE) / 2.5)
        # No more than the few steps so far allow, which is far from the factor 4 that is wanted.
        assert 1.0 < change.max() <= 2.0 ** ((running.counts.steps + 1) * 2 * INTERVAL)
        assert running.counts.interventions["rate_limit"] >= 2


def test_the_fallback_is_within_the_envelope_too(nursery: Nursery) -> None:
    policy = Fickle(WANTED)
    policy.mode = "raises"
    with data_plane(nursery) as strings, controlling(policy, rate_limit=1.0, fallback_after=1) as running:
        running.until(lambda: running.counts.fallback_steps >= 2)
        assert strings.weights == pytest.approx([0.4, 0.8, 1.2, 1.6])


def test_a_shadow_writes_nothing_and_holds_no_lock(nursery: Nursery, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "lbgym")
    with data_plane(nursery) as strings, controlling(Fickle(WANTED), shadow=True) as dry:
        dry.steps(3)
        assert strings.weights == SAFE
        mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("/lb0")]
        assert mapped and all(line.split()[1] == "r--s" for line in mapped)
        with SharedMemoryRegion.attach("lb0", read_only=True) as region:
            assert not region.agent_alive and region.read_action() is None
        with controlling(Fickle(WANTED[::-1])) as real:
            real.steps(3)
            dry.steps(3)
            assert strings.weights == WANTED[::-1]
            dry.stop()
            assert strings.weights == WANTED[::-1]
    steps = [record for record in caplog.records if getattr(record, "event", "") == "step"]
    fields: Any = steps[0].fields  # type: ignore[attr-defined]
    assert fields["weights"].tolist() == WANTED and fields["in_force"].tolist() == SAFE
    assert '"weights": [1.0, 1.5, 2.0, 0.5]' in JsonFormatter().format(steps[0])


def test_it_waits_for_the_region(nursery: Nursery, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lbgym")
    with controlling(Fickle(WANTED)) as running:
        until(lambda: any(getattr(record, "event", "") == "waiting" for record in caplog.records))
        assert "no region 'lb0'" in caplog.text
        with data_plane(nursery) as strings:
            running.steps(2)
            assert strings.weights == WANTED
    with pytest.raises(RegionNotFoundError, match="no region 'nobody'"):
        Controller(ControllerConfig(policy="uniform", shm="nobody", attach_timeout=0.05)).run()


def test_two_controllers(nursery: Nursery) -> None:
    with data_plane(nursery), controlling(Fickle(WANTED)) as running:
        running.steps(1)
        with pytest.raises(RegionBusyError, match="driven by another agent"):
            Controller(ControllerConfig(policy="uniform", shm="lb0")).run()
        running.steps(1)


def test_what_cannot_be_is_said_at_once(nursery: Nursery) -> None:
    with data_plane(nursery, ground_truth=False):
        for keys, error, message in (
            ({"policy": "awcmp", "scenario": "uniform"}, PolicyError, r"'awcmp' needs the ground truth.*not publish"),
            ({"lease": 0.2}, InvalidOptionError, r"lease must be more than 2\.25 s.*got 0\.2"),
            ({"scenario": "heterogeneous", "policy": "cores", "timeout": 0.2}, None, ""),
        ):
            config = ControllerConfig(**({"policy": "uniform", "shm": "lb0", "steps": 1} | keys))
            if error is None:
                # Eight servers are known of, the data plane has four of them.
                assert Controller(config).run() is Outcome.FINISHED
                continue
            with pytest.raises(error, match=message):
                Controller(config).run()
    with data_plane(nursery, servers=9):
        config = ControllerConfig(policy="cores", shm="lb0", scenario="heterogeneous")
        with pytest.raises(PolicyError, match=r"'cores' is for 8 servers.*'lb0' has 9"):
            Controller(config).run()
        with controlling(Fickle([]), metrics_port=0) as running:
            running.steps(1)
            assert running.controller.metrics is not None
            port = int(running.controller.metrics.url.split(":")[2].split("/")[0])
            with pytest.raises(InvalidOptionError, match=rf"cannot serve metrics on 127\.0\.0\.1 port {port}"):
                Controller(ControllerConfig(policy="uniform", shm="lb0", metrics_port=port)).run()
    for address in ("ä..x", "a" * 80):
        with pytest.raises(InvalidOptionError, match=f"--metrics-address must be an IP address .* got '{address}'"):
            Controller(ControllerConfig(policy="uniform", shm="lb0", metrics_port=0, metrics_address=address)).run()
    with pytest.raises(PolicyError, match="cores"):
        Controller(ControllerConfig(policy="uniform", fallback="cores", shm="lb0"))
    with pytest.raises(UnknownNameError, match="model"):
        Controller(ControllerConfig(policy="uniform", fallback="model.zip", shm="lb0"))


def test_time_may_be_scaled(nursery: Nursery) -> None:
    policy = Fickle(WANTED)
    # A step takes 0.04 s of real time, which is what a lease and a late decision are measured by.
    keys: dict[str, Any] = {"step_interval": 10 * INTERVAL, "lease": 0.5, "timeout": 0.4}
    with data_plane(nursery, period=5 * INTERVAL, rate=10.0) as strings, controlling(policy, **keys) as running:
        running.steps(3)
        assert strings.weights == WANTED
        policy.mode = "is late"
        running.until(lambda: running.counts.overruns >= 1)


def test_metrics_need_their_extra(nursery: Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "prometheus_client", None)
    with pytest.raises(MissingExtraError, match=r"lbgym\[run\]"):
        Controller(ControllerConfig(policy="uniform", shm="lb0", metrics_port=0)).run()
    with data_plane(nursery):
        assert Controller(ControllerConfig(policy="uniform", shm="lb0", steps=1)).run() is Outcome.FINISHED


@pytest.mark.parametrize("kind", ["zip", "pt"])
def test_trained_models_drive(nursery: Nursery, kind: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    path = tmp_path / f"model.{kind}"
    if kind == "zip":
        sb3 = pytest.importorskip("stable_baselines3")
        from lbgym import LoadBalanceEnv

        keys = {"observation": "flat", "normalize": True, "action_type": "normalized", "step_interval": INTERVAL}
        model = sb3.PPO(
            "MlpPolicy", LoadBalanceEnv(**keys), n_steps=8, batch_size=8, device="cpu",
            policy_kwargs={"net_arch": [8]}, seed=0,
        )  # fmt: skip
        model.learn(8)
        model.lbgym_env_kwargs = keys
        model.save(path)
    else:
        from lbgym.training import PPOConfig, train_ppo

        config = PPOConfig(scenario="uniform", total_steps=64, num_envs=4, num_steps=16, replicas_per_seed=2)
        saved = train_ppo(config, out=path).checkpoint
        assert saved == path
    with (
        data_plane(nursery, servers=4) as strings,
        controlling(policy=str(path), step_interval=None, lease=None) as running,
    ):
        running.steps(3)
        step = running.state.step
        assert step is not None and step.proposed is not None and running.counts.errors == 0
        layout, codec = load_policy(path).codecs(4)
        if kind == "zip":
            action, _ = model.predict(layout.encode(step.stats, None, step.active), deterministic=True)
            np.testing.assert_array_equal(step.proposed, codec.to_weights(action))
        else:
            assert step.proposed.shape == (4,)
        assert running.state.policy == str(path)
        assert strings.weights != SAFE
    with data_plane(nursery, servers=5):
        controller = Controller(ControllerConfig(policy=str(path), shm="lb0", steps=1))
        if kind == "zip":
            with pytest.raises(PolicyError, match=r"model\.zip' is for 4 servers.*has 5"):
                controller.run()
        else:
            assert controller.run() is Outcome.FINISHED


def test_keyboard_interrupt_withdraws_the_weights_and_closes_everything(nursery: Nursery) -> None:
    class Interrupted(Fickle):
        def weights(self, features: NDArray[Any], active: NDArray[np.bool_]) -> NDArray[np.float64]:
            if self.calls == 5:
                raise KeyboardInterrupt
            return super().weights(features, active)

    # A lease that outlasts the test: only a withdrawal brings the safe weights back.
    with data_plane(nursery) as strings, controlling(Interrupted(WANTED), lease=60.0) as running:
        with pytest.raises(KeyboardInterrupt):
            running.join()
        assert running.counts.steps >= 3 and not running.state.connected
        until(lambda: strings.weights == SAFE, "the safe weights")
        # The region is free for the next agent.
        assert Controller(ControllerConfig(policy="uniform", shm="lb0", steps=1)).run() is Outcome.FINISHED


def test_adaptive_on_a_data_plane_that_takes_weights_only(nursery: Nursery, caplog: pytest.LogCaptureFixture) -> None:
    """It sets estimated capacities, says so, and other policies of background loads are refused."""
    with data_plane(nursery) as strings, controlling(policy="adaptive") as running:
        running.steps(3)
        assert min(strings.weights) > 0 and strings.weights != SAFE
        assert running.state.counts.errors == 0
        with pytest.raises(PolicyError, match="'field' sets background loads, but the data plane takes weights only"):
            make_agent("field", 4, scenario=named_scenario("uniform")).fit(4, index=False)
    assert [r.levelname for r in caplog.records if getattr(r, "event", None) == "weights_only"] == ["WARNING"]
