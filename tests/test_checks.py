"""One rule per kind of value: NumPy's scalars are as good as Python's, booleans and complex numbers are no numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lbgym import checks
from lbgym.errors import InvalidOptionError, ScenarioError
from lbgym.features import ReservoirSampler
from lbgym.scenarios import Server, default_scenario
from lbgym.simulator import Simulation


@pytest.mark.parametrize("value", [np.complex64(2 + 1j), 2 + 0j, True, np.bool_(True), "2", None, np.nan, np.inf])
def test_what_is_no_number(value: Any) -> None:
    for check in (checks.number, checks.whole, checks.seconds):
        with pytest.raises(InvalidOptionError, match="x must be a"):
            check("x", value)
    with pytest.raises(ScenarioError):
        Server(speed=value)
    with pytest.raises(ValueError, match="decay must be"):
        ReservoirSampler(decay=value)


@pytest.mark.parametrize("kind", [int, np.int64, np.uint8])
def test_counts_of_any_whole_type(kind: Any) -> None:
    simulation = Simulation(default_scenario(2), kind(3), num_threads=kind(2), num_servers=kind(4))
    assert (simulation.num_replicas, simulation.num_threads, simulation.num_servers) == (3, 2, 4)
    assert type(checks.whole("x", kind(3))) is int


@pytest.mark.parametrize("name", ["num_replicas", "num_threads", "num_servers"])
@pytest.mark.parametrize("value", [0, 1.0, True, "1", 1j])
def test_counts_that_are_none(name: str, value: Any) -> None:
    with pytest.raises(ScenarioError, match=f"{name} must be a whole number"):
        Simulation(default_scenario(1), **{name: value})


@pytest.mark.parametrize("name", ["reservoirs", "service", "record_flows"])
def test_what_is_neither_true_nor_false(name: str) -> None:
    with pytest.raises(ScenarioError, match=f"{name} must be true or false, got 'false'"):
        Simulation(default_scenario(1), **{name: "false"})
    assert type(checks.boolean("x", np.True_)) is bool


def test_the_words() -> None:
    for keys, words in (
        ({"low": 1, "high": 65_536}, "a finite number from 1 to 65536, got 0"),
        ({"above": 0.0, "high": 1.0}, "a finite number above 0 and at most 1, got 0"),
        ({"low": 0.5, "unit": "seconds"}, "a finite number of at least 0.5 seconds, got 0"),
    ):
        with pytest.raises(InvalidOptionError, match=f"^x must be {words}$"):
            checks.number("x", 0, **keys)  # type: ignore[arg-type]
    with pytest.raises(InvalidOptionError, match=r"got 10{99}\.\.\. \(401 characters\)"):
        checks.number("x", 10**400)


def test_hosts() -> None:
    for value in ("localhost", "a.b.", "münchen.de", "a" * 63, "10.0.0.1", "::1", "fe80::1%eth0", "my_host"):
        assert checks.host("x", value) == value
    for value in ("a..b", "ä..b", ".a", "a" * 64, "ä" * 63, "a\0b", "\udcff", 7, None):
        with pytest.raises(InvalidOptionError, match=r"x must be an IP address or a host name, .* 63 characters, got "):
            checks.host("x", value)
