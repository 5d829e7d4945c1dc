"""The emulator: its clock, its flows, actions and leases, several balancers, how it starts and ends."""

from __future__ import annotations

import logging
import math
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lbgym import LoadBalanceEnv
from lbgym.controller import Controller, ControllerConfig
from lbgym.drivers import Emulator
from lbgym.drivers import emulator as emulator_module
from lbgym.errors import InvalidOptionError, InvalidWeightsError, PolicyError, RegionExistsError
from lbgym.policies import FieldWeights, make_weight_policy
from lbgym.scenarios import Event, Exponential, Scenario, Server, Workload, load_scenario
from lbgym.sharedmemory import SharedMemoryRegion, abi, seqlock
from lbgym.simulator import Simulation
from tests.drivers.emulated import emulator, following, running

#: Exact in binary, so that sums of it are, too.
INTERVAL = 0.125
NS = 1_000_000_000
COMPLETED, REJECTED, FAILED = 1, 2, 3


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    """What a test reads with is compiled before what it reads from begins."""
    seqlock.warm_up()
    plain = Simulation(load_scenario("uniform"))
    plain.reset([0])
    plain.observe()


def eventful(balancers: int) -> Scenario:
    """Flows are rejected, fail with their server, find none, and stay on one that is drained."""
    events = [Event(time=2.0, kind="down", server=server) for server in range(3)]
    events += [Event(time=2.3, kind="up", server=server) for server in range(3)]
    events += [Event(time=4.0, kind="drain", server=2), Event(time=5.0, kind="up", server=2)]
    return Scenario(
        servers=(Server(cores=2, workers=2, backlog=2), Server(cores=1, workers=2, backlog=1), Server(cores=4)),
        workload=Workload(load=0.9, demand=Exponential(mean=0.2)),
        balancers=balancers,
        events=tuple(events),
        reject_timeout=3.0,
    )


@pytest.mark.parametrize("balancers", [1, 3])
def test_undriven_it_is_the_simulator_bit_for_bit(balancers: int, shm_dir: Path) -> None:
    scenario = eventful(balancers)
    n = scenario.num_servers
    plain = Simulation(scenario, record_flows=True)
    expected = plain.reset([7])
    weights = np.broadcast_to(scenario.core_weights, (1, balancers, n))
    fct_count, fct_sum = np.zeros(balancers), np.zeros(balancers)
    drained = 0
    with Emulator(scenario, "lb", seed=7, speedup=1000.0, publish_interval=INTERVAL) as emulated:
        names = ["lb"] if balancers == 1 else ["lb_0", "lb_1", "lb_2"]
        assert [region.name for region in emulated.regions] == names
        regions = [SharedMemoryRegion.attach(name) for name in names]
        for tick in range(65):
            if tick:
                emulated.run(duration=INTERVAL)
                expected = plain.step(weights, INTERVAL)
                ended = plain.take_flows()
                fct_count += np.bincount(ended["balancer"], minlength=balancers)
                fct_sum += np.bincount(ended["balancer"], ended["fct"], minlength=balancers)
            still = plain.open_flows()
            totals, unrouted = np.zeros((4, n)), 0
            for b, region in enumerate(regions):
                seen = region.new_buffer()
                assert region.read_into(seen)
                assert (seen.sequence_id, seen.timestamp_ns) == (tick + 1, tick * INTERVAL * NS)
                assert (seen.num_servers, seen.safe, seen.applied_sequence_id) == (n, True, None)
                np.testing.assert_array_equal(seen.weights[:n], scenario.core_weights)
                np.testing.assert_array_equal(seen.stats[:n], expected.stats[0, b])
                np.testing.assert_array_equal(seen.ground_truth[:n], expected.ground_truth[0])
                np.testing.assert_array_equal(seen.active[:n], expected.active[0])
                assert seen.fct_count == fct_count[b]
                assert seen.fct_sum_ns == pytest.approx(NS * fct_sum[b], rel=1e-9, abs=1.0)
                counters = seen.counters[:n].T.astype(int)
                is_open = np.bincount(still["server"][still["balancer"] == b], minlength=n)
                np.testing.assert_array_equal(counters[0], counters[1:].sum(axis=0) + is_open)
                drained += int(is_open[~seen.active[:n]].sum())
                totals += counters
                unrouted += seen.unrouted
            for mine, theirs in zip(
                totals, (expected.started, expected.completed, expected.rejected, expected.failed), strict=True
            ):
                np.testing.assert_array_equal(mine, theirs[0])
            assert unrouted == expected.unrouted[0]
        # All that can happen to a flow did.
        assert (totals[1:].sum(axis=1) > 0).all() and unrouted > 0 and drained > 0
    assert not any(shm_dir.iterdir())


def test_index_actions_set_background_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an environment and of ``lbgym run``; they end with their action."""
    scenario = load_scenario("uniform").with_changes(dispatch="marginal", balancers=1)
    cores = np.array([server.cores for server in scenario.servers])
    with (
        Emulator(scenario, "lb", seed=7, speedup=20.0) as emulated,
        running(emulated),
        SharedMemoryRegion.attach("lb") as reader,
    ):
        simulation = emulated._cluster.simulation
        env = LoadBalanceEnv("lb", scenario=scenario, action_type="index", step_interval=0.25)
        env.reset()
        action = np.random.default_rng(3).uniform(-1, 1, env.action_space.shape).astype(np.float32)
        *_, info = env.step(action)
        while info["applied_sequence_id"] != info["action_sequence_id"]:
            # The emulator was held up, and had looked for an action before.
            assert info["action_sequence_id"] < 100
            *_, info = env.step(action)
        np.testing.assert_array_equal(simulation.weights_in_force()[0, 0], info["weights"])
        np.testing.assert_array_equal(simulation.background_in_force()[0, 0], info["background"])
        env.close()
        seen = following(reader)
        with SharedMemoryRegion.attach("lb") as agent:
            agent.write_action(sequence_id=1000, weights=cores)
            next(s for s in seen if not simulation.background_in_force().any())
            agent.write_action(sequence_id=1001, weights=cores, index=np.ones((len(cores), 2)), lease=2.0)
            next(s for s in seen if (simulation.background_in_force() == 1.0).all())
            next(s for s in seen if s.safe and not simulation.background_in_force().any())
        policy = FieldWeights(make_weight_policy("cores", scenario), num_balancers=3)
        loads: list[float] = []
        apply_index = emulator_module._Balancer.apply_index
        monkeypatch.setattr(
            emulator_module._Balancer,
            "apply_index",
            lambda self, weights, index, now: (loads.append(index[:, 1].max()), apply_index(self, weights, index, now)),
        )
        Controller(ControllerConfig(shm="lb", policy="field", steps=8), policy=policy).run()
        assert max(loads) > 0.0


def test_an_emulator_without_an_index_refuses_background_loads() -> None:
    scenario = load_scenario("uniform").with_changes(dispatch="wcmp", balancers=1)
    with (
        Emulator(scenario, "lb", seed=7, speedup=20.0) as emulated,
        running(emulated),
        SharedMemoryRegion.attach("lb") as reader,
    ):
        with pytest.raises(InvalidOptionError, match="region 'lb' takes weights only"):
            LoadBalanceEnv("lb", action_type="index", step_interval=0.25)
        policy = FieldWeights(make_weight_policy("cores", scenario), num_balancers=3)
        with pytest.raises(PolicyError, match="takes weights only"):
            Controller(ControllerConfig(shm="lb", policy="field"), policy=policy).run()
        # No action was written, and the region is free.
        assert not reader.agent_alive and reader.read_action() is None
        assert next(following(reader)).safe


def test_actions_cut_an_interval_and_change_nothing_but_weights() -> None:
    """Under a dispatch rule that ignores weights, an agent that writes all the time leaves everything as it is."""
    scenario = eventful(1).with_changes(dispatch="lsq")
    plain = Simulation(scenario)
    plain.reset([7])
    done = threading.Event()

    def write() -> None:
        with SharedMemoryRegion.attach("lb") as agent:
            rng = np.random.default_rng(1)
            for number in range(1, 1_000_000):
                agent.write_action(sequence_id=number, weights=rng.uniform(0.5, 2.0, 3))
                if done.wait(0.001):
                    return

    with Emulator(scenario, "lb", seed=7, speedup=8.0, publish_interval=INTERVAL) as emulated:
        writer = threading.Thread(target=write)
        writer.start()
        seen = emulated.regions[0].new_buffer()

        def stops() -> int:
            """Of the simulator, beyond those for observations that are due."""
            return int(emulated._cluster.batch.sequence_id[0]) - emulated.observations

        try:
            # On a busy machine the agent comes to write less often.
            while emulated.observations <= 40 or stops() < 80:
                assert emulated.observations < 4_000
                emulated.run(duration=INTERVAL)
                expected = plain.step(None, INTERVAL)
                with SharedMemoryRegion.attach("lb") as reader:
                    assert reader.read_into(seen)
                assert seen.timestamp == expected.timestamp[0]
                # Sums over parts of an interval are rounded otherwise.
                np.testing.assert_allclose(seen.stats[:3], expected.stats[0, 0], rtol=1e-5)
                np.testing.assert_allclose(seen.ground_truth[:3], expected.ground_truth[0], rtol=1e-5, atol=1e-6)
                np.testing.assert_array_equal(seen.counters[:3, COMPLETED], expected.completed[0])
                np.testing.assert_array_equal(seen.counters[:3, FAILED], expected.failed[0])
        finally:
            done.set()
            writer.join()


def test_the_clock_is_paced_and_its_grid_exact(shm_dir: Path) -> None:
    with emulator(
        "--name", "lb", "--speedup", 10, "--publish-interval", INTERVAL, "--duration", 10, "--seed", 5
    ) as process:
        assert process.ready.startswith("region lb: 8 servers, scenario heterogeneous,")
        assert process.ready.endswith("10 times real time, seed 5\n")
        region = SharedMemoryRegion.attach("lb")
        assert (region.clock_rate, region.publish_interval, region.driver) == (10.0, INTERVAL, "emulator")
        assert region.producer_pid == process.pid
        first, seen = None, 0
        for buffer in following(region):
            assert buffer.timestamp_ns == (buffer.sequence_id - 1) * INTERVAL * NS
            seen += 1
            # The first observation waits for the emulator to be run.
            if first is None and buffer.sequence_id > 1:
                first = buffer.timestamp_ns, buffer.published_at
        assert first is not None
        assert process.wait(10) == 0
        # The last observation stays readable to whoever is attached.
        assert buffer.sequence_id == region.latest == 1 + 10 / INTERVAL
        assert seen > 20
        simulated, real = (buffer.timestamp_ns - first[0]) / NS, (buffer.published_at - first[1]) / NS
        # Never ahead of the clock, but for one interval that is caught up with; behind it only on a busy machine.
        assert simulated <= 10 * real + INTERVAL
        assert simulated >= 2 * real
        assert not any(shm_dir.iterdir())
        region.close()


def test_actions_are_in_force_when_written_and_leases_end(tmp_path: Path) -> None:
    file = tmp_path / "two.toml"
    file.write_text(
        'dispatch = "wcmp"\n[[servers]]\ncount = 2\ncores = 8\n[workload]\nrate = 2000\n'
        'demand = { kind = "exponential", mean = 0.001 }\n'
    )
    arguments = ("--name", "lb", "--scenario", file, "--speedup", 4, "--publish-interval", 1, "--safe-weights", "0,3")
    with emulator(*arguments) as process, SharedMemoryRegion.attach("lb") as agent:
        source = following(agent)
        seen = next(source)
        while seen.sequence_id < 2:
            seen = next(source)
        assert seen.weights[:2].tolist() == seen.safe_weights[:2].tolist() == [0.0, 3.0]
        assert seen.counters[0, 0] == 0 and seen.safe
        # When its clock showed 0, by the publication that was least late.
        origin = seen.published_at / NS - seen.timestamp / 4
        # In the middle of an interval.
        time.sleep(max(0.0, 0.125 - (time.monotonic_ns() - seen.published_at) / NS))
        written = agent.write_action(sequence_id=41, weights=[1.0, 0.0], lease=math.inf)
        while seen.applied_sequence_id != 41:
            before, since = seen.counters[:2, 0].astype(int), seen.timestamp
            seen = next(source)
            origin = min(origin, seen.published_at / NS - seen.timestamp / 4)
        assert not seen.safe and seen.weights[:2].tolist() == [1.0, 0.0]
        assert seen.applied_at is not None and written <= seen.applied_at < seen.published_at
        flows = seen.counters[:2, 0].astype(int) - before
        share = (seen.timestamp - 4 * (seen.applied_at / NS - origin)) / (seen.timestamp - since)
        assert 0.0 < share < 1.0
        assert flows[0] / flows.sum() == pytest.approx(share, abs=0.1)
        before = seen.counters[:2, 0].astype(int)
        flows = next(source).counters[:2, 0].astype(int) - before
        assert flows[0] > 1500 and flows[1] == 0

        written = agent.write_action(sequence_id=42, weights=[1.0, 0.0], lease=0.4)
        while not seen.safe:
            seen = next(source)
        assert 0.4 <= (seen.published_at - written) / NS < 10.0
        assert seen.weights[:2].tolist() == [0.0, 3.0] and seen.applied_sequence_id == 42
        before = seen.counters[0, 0]
        assert next(source).counters[0, 0] == before
        assert process.poll() is None


def suspend(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)


def processor_time(pid: int) -> float:
    """Seconds a process has computed so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("scenario", ["heterogeneous", "marllb-moderate"])
def test_neither_idleness_nor_nonsense_burns_a_core(scenario: str) -> None:
    with emulator("--name", "lb", "--scenario", scenario) as process:
        name = "lb" if scenario == "heterogeneous" else "lb_0"
        with SharedMemoryRegion.attach(name) as agent:
            before = processor_time(process.pid)
            time.sleep(0.5)
            assert processor_time(process.pid) - before < 0.25
            # Stopped, so that it cannot read the action before it is spoilt.
            suspend(process)
            agent.write_action(sequence_id=1, weights=np.ones(agent.capacity))
            layout = agent.layout
            at = layout.actions_offset + 1 % abi.NUM_ACTIONS * layout.action_size + layout.action_sections["weights"]
            agent._words[at // 8] = np.uint64(0x7FF8000000000000)  # a NaN
            process.send_signal(signal.SIGCONT)
            source = following(agent)
            seen = next(source)
            before, end = processor_time(process.pid), time.monotonic() + 0.5
            while time.monotonic() < end:
                seen = next(source)
            assert processor_time(process.pid) - before < 0.25
            # Not to be read is as not to be there.
            assert seen.safe and np.isfinite(seen.weights[: seen.num_servers]).all()
            agent.write_action(sequence_id=2, weights=np.full(agent.capacity, 2.0))
            while seen.applied_sequence_id != 2:
                seen = next(source)
            assert (seen.weights[: seen.num_servers] == 2.0).all()


def test_balancers_are_driven_apart(tmp_path: Path) -> None:
    file = tmp_path / "two.toml"
    file.write_text(
        'dispatch = "wcmp"\nbalancers = 2\n[[servers]]\ncount = 3\ncores = 8\n[workload]\nrate = 2000\n'
        'demand = { kind = "exponential", mean = 0.001 }\n'
    )
    with emulator("--name", "lb", "--scenario", file, "--speedup", 20, "--publish-interval", 0.5) as process:
        assert process.ready.startswith("regions lb_0, lb_1: 3 servers,")
        agents = [SharedMemoryRegion.attach(f"lb_{b}") for b in range(2)]
        counts = []
        for b, agent in enumerate(agents):
            agent.write_action(sequence_id=b + 1, weights=np.eye(3)[b])
            source = following(agent)
            seen = next(source)
            while seen.applied_sequence_id != b + 1:
                seen = next(source)
            assert seen.weights[:3].tolist() == np.eye(3)[b].tolist()
            before, since = seen.counters[:3, 0].astype(int), seen.timestamp
            while seen.timestamp < since + 2.0:
                seen = next(source)
            counts.append((seen.counters[:3, 0].astype(int) - before) / (seen.timestamp - since))
            agent.close()
        # Each has half of the flows, and places them where its own agent wants them.
        np.testing.assert_allclose(counts, [[1000, 0, 0], [0, 1000, 0]], rtol=0.15)


def test_too_fast_it_falls_behind_says_so_and_leaves_nothing_out() -> None:
    records: list[logging.LogRecord] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    logger = logging.getLogger("lbgym")
    handler = Keep()
    logger.addHandler(handler)
    try:
        with Emulator(load_scenario("uniform"), "lb", speedup=1e6, seed=1) as emulated:
            begun = time.monotonic()
            emulated.run(duration=25.0)
            took = time.monotonic() - begun
            assert emulated.observations == 501 == emulated.regions[0].latest
            assert emulated.time == pytest.approx(25.0)
            assert emulated.slips > 100
            assert 0.0 < emulated.lost <= took
    finally:
        logger.removeHandler(handler)
    (record,) = records
    assert "does not keep up with an observation every 0.05 s at 1e+06 times real time" in record.getMessage()


def test_suspended_its_clock_stands_still(shm_dir: Path) -> None:
    with emulator("--name", "lb", "--publish-interval", 0.02) as process, SharedMemoryRegion.attach("lb") as region:
        source = following(region)
        seen = next(source)
        while seen.sequence_id < 3:
            seen = next(source)
        suspend(process)
        region.read_into(seen)
        before, published = seen.timestamp, seen.published_at
        time.sleep(0.5)
        process.send_signal(signal.SIGCONT)
        while seen.timestamp < before + 0.2:
            seen = next(source)
            assert seen.timestamp_ns == (seen.sequence_id - 1) * NS // 50
            # Half a second has gone by in which nothing happened, and it is not made up for.
            assert seen.timestamp - before <= (seen.published_at - published) / NS - 0.4
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=10)
        assert "does not keep up" in errors and "of them late" in errors
        assert process.returncode == 0 and not any(shm_dir.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_and_removes_its_regions(shm_dir: Path, number: signal.Signals) -> None:
    with emulator("--name", "lb", "--scenario", "marllb-moderate") as process:
        assert {path.name for path in shm_dir.iterdir()} == {"lb_0", "lb_1", "lb_0.ctl", "lb_1.ctl"}
        region = SharedMemoryRegion.attach("lb_0")
        process.send_signal(number)
        out, errors = process.communicate(timeout=10)
        assert (process.returncode, out) == (0, "")
        assert errors.startswith("lbgym: ") and "emulated" in errors
        assert not any(shm_dir.iterdir())
        assert region.closed_by_producer
        region.close()


def test_killed_it_does_not_block_its_successor() -> None:
    with emulator("--name", "lb", "--capacity", 100, "--mode", "640") as process:
        region = SharedMemoryRegion.attach("lb", live=True)
        assert region.capacity == 100 and region.path.stat().st_mode & 0o777 == 0o640
        process.kill()
        process.wait()
        assert not region.producer_alive and region.path.exists()
    with emulator("--name", "lb"), SharedMemoryRegion.attach("lb", live=True) as after:
        assert after.capacity == 64
        assert region.closed_by_producer and region.replaced
    region.close()


@pytest.fixture
def _logging() -> Iterator[None]:
    """The command line sets up logging for its process."""
    logger = logging.getLogger("lbgym")
    before = logger.handlers[:], logger.propagate, logger.level
    yield
    logger.handlers[:], logger.propagate, level = before
    logger.setLevel(level)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--scenario", "heterogenous"), "unknown scenario 'heterogenous'. Did you mean 'heterogeneous'"),
        (("--speedup", "0"), "speedup must be a finite number from 1e-06 to 1e+06, got 0.0"),
        (("--speedup", "nan"), "speedup must be"),
        (("--interval", "0.1"), "--interval is now --publish-interval"),
        (("--publish-interval", "0"), "publish_interval must be a finite number from"),
        (("--duration", "-1"), "duration must be a finite number from"),
        (("--dispatch", "sedd"), "unknown dispatch rule 'sedd'. Did you mean 'sed'"),
        (("--safe-weights", "1,x"), "--safe-weights takes numbers"),
        (("--safe-weights", "1,2"), "safe_weights must be 8 numbers"),
        (("--capacity", "7"), "capacity must be a whole number from 8"),
        (("--mode", "rw"), "--mode takes octal permissions"),
        (("--mode", "1777"), "--mode takes octal permissions from 0 to 777"),
        (("--name", "a/b"), "the name of a region"),
        (("--name", "taken"), "the name 'taken' belongs to a live region"),
        (("--name", "text"), "the name 'text' is taken"),
        (("--name", "half", "--scenario", "marllb-moderate"), "the name 'half_1' belongs to a live region"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
@pytest.mark.usefixtures("_logging")
def test_what_it_refuses_is_one_line_and_exit_code_2(
    arguments: tuple[str, ...], message: str, shm_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lbgym.cli import main

    (shm_dir / "text").write_text("text")
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    with (
        SharedMemoryRegion.create("taken", num_servers=1),
        SharedMemoryRegion.create("half_1", num_servers=1),
        pytest.raises(SystemExit) as raised,
    ):
        main(["dataplane", "emulate", *(() if "--name" in arguments else ("--name", "lb")), *arguments])
    out, errors = capsys.readouterr()
    if "--duration" not in arguments:
        assert out == ""
    assert raised.value.code == 2
    assert errors.startswith("lbgym: error: ") and message in errors and len(errors.splitlines()) == 1
    # What it had made until then is gone, and nothing else is.
    assert {path.name for path in shm_dir.iterdir()} == {"text"}
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)] == handlers


def test_the_class_refuses_what_the_command_cannot_be_told(shm_dir: Path) -> None:
    scenario = load_scenario("uniform")
    for keys in (
        {"seed": -1},
        {"seed": 1.5},
        {"seed": True},
        {"speedup": "2"},
        {"speedup": np.complex64(2 + 1j)},
        {"publish_interval": None},
    ):
        with pytest.raises(InvalidOptionError):
            Emulator(scenario, "lb", **keys)  # type: ignore[arg-type]
    with pytest.raises(InvalidWeightsError):
        Emulator(scenario, "lb", safe_weights=[1.0, 2.0, 3.0, -1.0])
    with Emulator(scenario, "lb") as emulated:
        assert emulated.seed >= 0
        with pytest.raises(RegionExistsError):
            Emulator(scenario, "lb")
        emulated.close()
        emulated.close()
    assert not any(shm_dir.iterdir())
