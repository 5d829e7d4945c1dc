"""No torn observation or action, whoever reads, under a writer in C at full speed; and the test would see one."""

from __future__ import annotations

import os

import pytest

from benchmarks import tearing
from tests.features.test_c_header import compiler

#: What, servers, copies by the reader in C: more than a million in all.
CASES = [
    pytest.param(tearing.OBSERVATIONS, 4, 500_000, id="observations of 4 servers"),
    pytest.param(tearing.OBSERVATIONS, 64, 300_000, id="observations of 64 servers"),
    pytest.param(tearing.OBSERVATIONS, 1024, 5_000, id="observations of 1024 servers"),
    pytest.param(tearing.ACTIONS, 4, 100_000, id="actions for 4 servers"),
    pytest.param(tearing.ACTIONS, 64, 200_000, id="actions for 64 servers"),
    pytest.param(tearing.ACTIONS, 1024, 5_000, id="actions for 1024 servers"),
]
#: For a machine that does much else.
SECONDS = 120.0


@pytest.fixture(scope="session")
def program(tmp_path_factory) -> str:
    return tearing.build(compiler("c"), tmp_path_factory.mktemp("tearing"))


@pytest.fixture(scope="session")
def unsafe(tmp_path_factory) -> str:
    """Without the check of the sequence lock."""
    return tearing.build(compiler("c"), tmp_path_factory.mktemp("tearing"), unsafe=True)


@pytest.mark.parametrize(("what", "servers", "reads"), CASES)
def test_nothing_is_torn(program, what, servers, reads):
    with tearing.writer(program, what, servers) as region:
        process = tearing.read_in_c(program, region, what, reads, SECONDS)
        in_python = tearing.read_in_python(region, what, 500, SECONDS)
        in_c = tearing.result(process)
    assert in_c["reads"] >= reads and in_python["reads"] >= 500
    for found in (in_c, in_python):
        assert (found["torn"], found["refused"]) == (0, 0), found
    # The writer was at work.
    assert in_c["distinct"] >= 20 and in_python["distinct"] >= 20


@pytest.mark.parametrize(("what", "servers", "reads"), CASES)
def test_without_the_check_torn_ones_are_found(program, unsafe, what, servers, reads):
    """Writer and reader take turns on one core, so that the reader is interrupted in the middle of copies."""
    cpu = min(os.sched_getaffinity(0))
    with tearing.writer(program, what, servers, cpu) as region:
        found = tearing.result(tearing.read_in_c(unsafe, region, what, 10**12, SECONDS, cpu))
    assert found["torn"] > 0, found
