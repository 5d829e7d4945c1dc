"""A core that publishes itself, in C: driven through shared memory as any data plane."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lbgym.drivers import DriverError
from lbgym.drivers.afpacket.build import compiler
from lbgym.drivers.check import check_driver
from lbgym.sharedmemory import ObservationBuffer, ServerState, SharedMemoryRegion
from tests.chance import as_likely
from tests.drivers.test_discovery import eventually
from tests.plugins.test_sanitizers import FLAGS, HERE, SOURCES, include_flags, unavailable
from tests.sharedmemory.conftest import shm_dir

__all__ = ["shm_dir"]


@pytest.fixture
def publisher(tmp_path: Path, shm_dir: Path) -> Iterator[subprocess.Popen[str]]:
    try:
        command = compiler()
    except DriverError as error:
        unavailable(str(error))
    program = tmp_path / "publisher"
    subprocess.run(
        [*command, *FLAGS, *include_flags(), "-o", program, HERE / "publisher.c", *SOURCES, "-lm", "-lpthread"],
        check=True,
    )
    process = subprocess.Popen([program, "core"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.communicate()


def newest(region: SharedMemoryRegion) -> ObservationBuffer:
    buffer = region.new_buffer()
    seen = buffer.sequence_id if region.read_into(buffer) else 0
    assert region.wait_observation(seen, 10.0)
    assert region.read_into(buffer)
    return buffer


def test_weights_observations_and_the_contract(publisher: subprocess.Popen[str]) -> None:
    with SharedMemoryRegion.attach("core", timeout=10.0) as region:
        newest(region)  # Names come with the first observation.
        assert region.server_names == ("one", "two", "three", "four")
        region.write_action(sequence_id=1, weights=[5.0, 1.0, 0.0, 9.0], lease=60.0)
        eventually(lambda: newest(region).applied_sequence_id == 1)
        before = newest(region).counters[:4, 0].astype(int)
        eventually(lambda: int(newest(region).counters[:4, 0].sum() - before.sum()) > 500)
        seen = newest(region)
        placed = seen.counters[:4, 0].astype(int) - before
        assert as_likely(placed, [5 / 6, 1 / 6, 0.0, 0.0])
        # The fourth is drained: it takes nothing, whatever its weight.
        assert list(seen.states[:4]) == [ServerState.UP] * 3 + [ServerState.DRAINING]
        assert seen.stats[:4, 0].sum() == 20 and seen.safe_weights[:4].tolist() == [1.0, 2.0, 3.0, 4.0]
        region.unlock_agent()
        verdicts = check_driver("core", end=True)
        assert [str(verdict) for verdict in verdicts if verdict.passed is False] == []
    assert publisher.wait(10) == 0
