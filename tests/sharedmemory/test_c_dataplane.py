"""examples/c_dataplane: built as its README says, and driven as a real data plane is."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from lbgym.drivers.check import check_driver
from lbgym.errors import RegionNotFoundError
from lbgym.sharedmemory import ObservationBuffer, SharedMemoryRegion, get_include, seqlock
from tests.dataplanes.puppet import puppet
from tests.features.test_c_header import WARNINGS, compiler
from tests.sharedmemory.native import run_compiler

EXAMPLE = Path(__file__).parents[2] / "examples" / "c_dataplane"
INTERVAL = 0.02
LONG = 20.0


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    """Its queues fill while the reader is compiled."""
    seqlock.warm_up()


@pytest.fixture(scope="session")
def program(tmp_path_factory) -> str:
    command = compiler("c")
    if shutil.which("make") is None:
        pytest.fail("no make") if os.environ.get("CI") else pytest.skip("no make")
    folder = tmp_path_factory.mktemp("c") / "c_dataplane"
    shutil.copytree(EXAMPLE, folder)
    (folder / "dataplane").unlink(missing_ok=True)
    flags = f"CFLAGS=-O2 {' '.join(WARNINGS)}"
    done = subprocess.run(
        ["make", "-C", folder, f"INCLUDE={get_include()}", f"CC={' '.join(command)}", flags],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return str(folder / "dataplane")


@contextmanager
def running(program: str, *options: str) -> Iterator[subprocess.Popen[str]]:
    """The program, once it has said that it publishes; killed at the end if it still runs."""
    command = [program, "--name", "r", "--interval", str(INTERVAL), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline().startswith("r: ")
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def next_observation(agent: SharedMemoryRegion, buffer: ObservationBuffer) -> None:
    assert agent.wait_observation(buffer.sequence_id, LONG)
    assert agent.read_into(buffer)


def until(agent: SharedMemoryRegion, buffer: ObservationBuffer, applied: int | None) -> None:
    """Read on until an action is in force, or none."""
    deadline = time.monotonic() + LONG
    while (None if buffer.safe else buffer.applied_sequence_id) != applied:
        assert time.monotonic() < deadline
        next_observation(agent, buffer)


def test_observations_move_and_add_up(program):
    with running(program, "--servers", "8", "--rate", "2000") as process:
        with SharedMemoryRegion.attach("r", live=True) as agent:
            assert (agent.driver, agent.producer_pid) == ("c_dataplane", process.pid)
            assert (agent.publish_interval, agent.clock_rate) == (INTERVAL, 1.0)
            buffer = agent.new_buffer()
            seen = []
            for _ in range(30):
                next_observation(agent, buffer)
                seen.append(buffer.snapshot())
                assert buffer.num_servers == 8 and buffer.safe and not buffer.has_ground_truth
                assert buffer.fct_count == seen[-1].completed.sum() + seen[-1].rejected.sum()
        for before, after in pairwise(seen):
            assert after.sequence_id > before.sequence_id
            intervals = (after.timestamp - before.timestamp) / INTERVAL
            assert intervals >= 1.0 - 1e-6 and abs(intervals - round(intervals)) < 1e-6
            assert (after.started >= before.started).all() and (after.completed >= before.completed).all()
            assert after.active.all()
            open_flows = after.started - after.completed - after.rejected - after.failed
            assert np.array_equal(after.stats[:, 0], open_flows)
        assert seen[-1].completed.min() > 0
        assert (seen[-1].stats[:, 1:] > 0.0).all()
        passed = seen[-1].timestamp - seen[0].timestamp
        flows = int((seen[-1].started - seen[0].started).sum())
        assert abs(flows - 2000 * passed) < 5.0 * np.sqrt(2000 * passed)


@pytest.mark.parametrize("rule", ["sed", "alias"])
def test_flows_go_where_the_weights_say(program, rule):
    with running(program, "--rule", rule, "--rate", "400") as process:
        with SharedMemoryRegion.attach("r", live=True) as agent:
            buffer = agent.new_buffer()
            next_observation(agent, buffer)
            # Twice as many flows as the servers can take: soon no queue is empty, and none is full for seconds.
            weights = np.array([1.0, 0.0, 3.0, 4.0])
            agent.write_action(sequence_id=17, weights=weights, lease=float("inf"))
            until(agent, buffer, 17)
            assert np.array_equal(buffer.weights[:4], weights)
            first = buffer.snapshot()

            def even() -> bool:
                """Open flows as the weights say; what came before the action has been served."""
                open_flows = buffer.stats[[0, 2, 3], 0]
                wanted = weights[[0, 2, 3]] / 8.0 * open_flows.sum()
                return bool(open_flows.sum() > 20.0 and (np.abs(open_flows - wanted) <= 3.0 * weights[[0, 2, 3]]).all())

            while buffer.timestamp < first.timestamp + 0.5 or (rule == "sed" and not even()):
                assert buffer.timestamp < first.timestamp + LONG
                next_observation(agent, buffer)
            started = (buffer.snapshot().started - first.started).astype(float)
            shares = weights / weights.sum()
            assert started[1] == 0.0
            if rule == "alias":
                error = np.sqrt(started.sum() * shares * (1.0 - shares))
                assert (np.abs(started - started.sum() * shares) <= 5.0 * error).all()
        assert process.poll() is None


def test_safe_weights_when_the_lease_is_over(program):
    with running(program, "--servers", "2"), SharedMemoryRegion.attach("r", live=True) as agent:
        buffer = agent.new_buffer()
        next_observation(agent, buffer)
        lease, number, written = 0.2, 2, 0
        deadline = time.monotonic() + LONG
        while buffer.safe or buffer.applied_sequence_id != number:
            assert time.monotonic() < deadline
            if time.monotonic_ns() >= written + lease * 1e9:
                # Another one for whoever was held up, here or there, until the lease was over.
                number += 1
                written = agent.write_action(sequence_id=number, weights=[5.0, 6.0], lease=lease)
            next_observation(agent, buffer)
        assert buffer.weights[:2].tolist() == [5.0, 6.0]
        until(agent, buffer, None)
        assert buffer.weights[:2].tolist() == buffer.safe_weights[:2].tolist() == [1.0, 1.0]
        assert buffer.published_at - written >= lease * 1e9
        assert buffer.applied_sequence_id == number


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_closes_and_removes_the_region(program, shm_dir, number):
    with running(program) as process, SharedMemoryRegion.attach("r", live=True) as agent:
        buffer = agent.new_buffer()
        next_observation(agent, buffer)
        process.send_signal(number)
        out, err = process.communicate(timeout=LONG)
        assert (process.returncode, err) == (0, "")
        assert "flows ended, mean FCT" in out
        assert agent.closed_by_producer and not agent.producer_alive
        assert not list(shm_dir.iterdir())


@pytest.mark.parametrize("options", [("--servers", "8"), ("--servers", "3", "--rule", "alias", "--rate", "500")])
def test_it_passes_the_check_of_drivers(program, shm_dir, options):
    with running(program, *options) as process:
        verdicts = check_driver("r", end=True)
        assert all(verdict.passed for verdict in verdicts), "\n".join(map(str, verdicts))
        assert process.wait(LONG) == 0
        assert not list(shm_dir.iterdir())


def test_ends_by_itself_and_tells_the_same_as_its_observations(program, shm_dir):
    for duration in (0.3, 3.0, LONG):
        with running(program, "--duration", str(duration)):
            try:
                agent = SharedMemoryRegion.attach("r", live=True)
            except RegionNotFoundError:
                # This process was held up for as long as the data plane lived.
                continue
            with agent:
                buffer = agent.new_buffer()
                while agent.wait_observation(buffer.sequence_id, LONG):
                    assert agent.read_into(buffer)
                assert agent.closed_by_producer
                agent.read_into(buffer)
                assert buffer.timestamp >= duration - INTERVAL - 1e-9
                break
    else:
        pytest.fail("it always ends before its time")
    assert not list(shm_dir.iterdir())


def test_a_name_of_a_live_one_is_refused_and_that_of_a_dead_one_taken(program, shm_dir):
    with running(program) as first:
        second = subprocess.run([program, "--name", "r"], capture_output=True, text=True, timeout=LONG)
        assert second.returncode == 1
        assert f"belongs to a live region (producer process {first.pid}," in second.stderr
        first.kill()
        first.wait()
        assert (shm_dir / "r").exists()
    with running(program), SharedMemoryRegion.attach("r", live=True) as agent:
        next_observation(agent, agent.new_buffer())


@pytest.mark.parametrize(
    "options", [["--servers", "0"], ["--interval", "0"], ["--rule", "best"], ["--rate", "-1"], ["--what"], ["more"]]
)
def test_bad_options(program, shm_dir, options):
    done = subprocess.run([program, *options], capture_output=True, text=True, timeout=LONG)
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage:" in done.stderr
    assert not list(shm_dir.iterdir())


SERVERS_OF_THE_DOCUMENT = """
#include <stdint.h>

int server_is_up(uint32_t server) { return server != 1; }

void server_features(uint32_t server, float *stats)
{
    for (int i = 0; i < 11; i++) {
        stats[i] = (float)server + (float)i / 16;
    }
}

void server_flows(uint32_t server, uint64_t *started, uint64_t *completed, uint64_t *rejected, uint64_t *failed)
{
    *started = server + 4;
    *completed = server + 3;
    *rejected = server + 2;
    *failed = server + 1;
}
"""


@pytest.mark.parametrize("language", ["c", "c++"])
def test_the_thirty_lines_of_the_document(tmp_path, language):
    text = (EXAMPLE.parents[1] / "docs" / "shared-memory.md").read_text()
    program = text.split("```c\n")[1].split("```")[0]
    lines = [line for line in program[program.index("int main") :].splitlines() if line]
    assert len(lines) <= 31
    if language == "c++":
        program = program.replace("extern ", 'extern "C" ')
    (tmp_path / "dataplane.c").write_text(program)
    (tmp_path / "servers.c").write_text(SERVERS_OF_THE_DOCUMENT)
    done = run_compiler(language, "-O2", "-c", tmp_path / "dataplane.c", "-o", tmp_path / "dataplane.o")
    assert (done.returncode, done.stderr) == (0, "")
    command = [*compiler("c"), str(tmp_path / "servers.c"), str(tmp_path / "dataplane.o"), "-o", str(tmp_path / "it")]
    subprocess.run(command, check=True, timeout=120)
    with subprocess.Popen([str(tmp_path / "it")]) as process:
        try:
            with SharedMemoryRegion.attach("marllb_lb0", timeout=LONG, live=True) as agent:
                buffer = agent.new_buffer()
                agent.write_action(sequence_id=8, weights=[1.0, 2.0, 3.0, 4.0])
                until(agent, buffer, 8)
                assert buffer.weights[:4].tolist() == [1.0, 2.0, 3.0, 4.0]
                assert buffer.active[:4].tolist() == [True, False, True, True]
                assert np.array_equal(buffer.stats[:4], np.arange(4)[:, None] + np.arange(11) / 16)
                assert buffer.counters[2].tolist() == [6, 5, 4, 3]
                first = buffer.timestamp
                next_observation(agent, buffer)
                assert buffer.timestamp > first
        finally:
            process.kill()


#: The puppet's feature of server i is that of server 0 plus i / 64.
DECISION_OF_THE_DOCUMENT = """
#include <lbgym_shm.h>

void decide(const lbgym_shm_observation *observation, double *weights, uint32_t n);

void decide(const lbgym_shm_observation *observation, double *weights, uint32_t n)
{
    const float *stats = observation->stats;
    for (uint32_t i = 0; i < n; i++) {
        weights[i] = 1.0 + 64.0 * (double)(stats[i * LBGYM_SHM_NUM_FEATURES] - stats[0]);
    }
}
"""


@pytest.mark.parametrize("language", ["c", "c++"])
def test_the_agent_of_the_document(tmp_path: Path, language: str) -> None:
    text = (EXAMPLE.parents[1] / "docs" / "shared-memory.md").read_text()
    program = text.split("## An agent in C")[1].split("```c\n")[1].split("```")[0]
    sources = {"agent.c": program, "decision.c": DECISION_OF_THE_DOCUMENT}
    for name, source in sources.items():
        (tmp_path / name).write_text(source)
        done = run_compiler(language, "-O2", "-c", tmp_path / name, "-o", tmp_path / f"{name}.o")
        assert (done.returncode, done.stderr) == (0, "")
    objects = [str(tmp_path / f"{name}.o") for name in sources]
    subprocess.run([*compiler(language), *objects, "-o", str(tmp_path / "agent")], check=True, timeout=120)
    with (
        puppet("marllb_lb0", servers=5) as strings,
        SharedMemoryRegion.attach("marllb_lb0") as onlooker,
        subprocess.Popen([str(tmp_path / "agent")], stderr=subprocess.PIPE, text=True) as process,
    ):
        try:
            buffer = onlooker.new_buffer()
            deadline = time.monotonic() + LONG
            while buffer.safe or (buffer.applied_sequence_id or 0) < 3:
                assert time.monotonic() < deadline and process.poll() is None
                next_observation(onlooker, buffer)
            assert buffer.weights[:5].tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]
            assert onlooker.agent_alive
            # It ends in order with the data plane.
            strings.tell(close=True)
            _, errors = process.communicate(timeout=LONG)
            assert (process.returncode, errors) == (0, "")
        finally:
            process.kill()
