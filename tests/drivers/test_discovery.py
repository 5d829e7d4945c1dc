"""Slots: rows that stay, drains that finish, tombstones; and where lists of servers come from."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from time import monotonic, sleep

import pytest
from hypothesis import HealthCheck as Slow
from hypothesis import given, settings
from hypothesis import strategies as st

from lbgym.drivers import DriverError
from lbgym.drivers.config import HealthCheck, ServerConfig
from lbgym.drivers.discovery import Discovery, Slots, in_dns, in_file
from lbgym.sharedmemory import ServerState


def server(name: str, weight: float = 1.0) -> ServerConfig:
    return ServerConfig(name=name, address="127.0.0.1", port=80, weight=weight)


def states(slots: Slots) -> list[str]:
    return [f"{row.name}:{row.state.name.lower()}" if row.name else "" for row in slots.rows]


def test_a_row_is_reused_only_when_it_is_empty() -> None:
    slots = Slots(3)
    slots.update([server("a"), server("b"), server("c")])
    slots.remove("b")
    assert states(slots) == ["a:up", "b:draining", "c:up"]
    with pytest.raises(
        DriverError, match=r"no room for server 'd': all 3 rows are taken, 1 of them by servers that are"
    ):
        slots.add(server("d"))
    assert slots.release([5, 2, 7]) == []
    assert [slot.server.name for slot in slots.release([5, 0, 7])] == ["b"]
    assert states(slots) == ["a:up", "", "c:up"]
    assert slots.rows[1].weight == 0.0 and len(slots) == 3
    assert slots.add(server("d")).index == 1


def test_a_server_that_returns_in_time_gets_its_row_back() -> None:
    slots = Slots(2)
    slots.update([server("a"), server("b")])
    slots.update([server("b")])
    assert states(slots) == ["a:draining", "b:up"]
    assert slots.update([server("b"), server("a", 3.0)]).added == ("a",)
    assert states(slots) == ["a:up", "b:up"] and slots.rows[0].weight == 3.0


def test_a_drained_server_stays_until_it_is_removed() -> None:
    slots = Slots(2)
    slots.update([server("a"), server("b")])
    slots.drain("a")
    assert slots.release([0, 0]) == [] and states(slots) == ["a:draining", "b:up"]
    slots.update([server("a", 2.0), server("b")])
    assert states(slots)[0] == "a:draining"
    slots.undrain("a")
    assert states(slots)[0] == "a:up"
    with pytest.raises(DriverError, match="server 'a' is not drained"):
        slots.undrain("a")
    with pytest.raises(DriverError, match="there is no server 'x'; known: a, b"):
        slots.drain("x")


def test_states_follow_health() -> None:
    slots = Slots(1)
    checked = ServerConfig(name="a", address="h", port=1, health=HealthCheck())
    slot = slots.add(checked)
    assert (slot.state, slot.active) == (ServerState.UNKNOWN, True)
    slot.healthy = False
    assert (slot.state, slot.active) == (ServerState.DOWN, False)
    slot.healthy = True
    assert slot.state == ServerState.UP
    slot.drained = True
    assert (slot.state, slot.active) == (ServerState.DRAINING, False)


def test_a_list_that_does_not_fit_changes_nothing() -> None:
    slots = Slots(2)
    slots.update([server("a")])
    with pytest.raises(
        DriverError, match="no room for 2 new servers: 1 of 2 rows are free, 1 are of servers that leave"
    ):
        slots.update([server("b"), server("c")])
    with pytest.raises(DriverError, match="two servers of the name 'b'"):
        slots.update([server("b"), server("b")])
    assert states(slots) == ["a:up"]


def test_a_list_is_split_where_there_is_no_room() -> None:
    slots = Slots(3)
    slots.update([server("a"), server("b")])
    slots.remove("b")
    wanted = [server(name) for name in "cdbea"]
    fitting, others = slots.split(wanted)
    assert ["".join(s.name for s in part) for part in (fitting, others)] == ["cba", "de"]
    assert slots.update(fitting).added == ("c", "b")


@settings(max_examples=60, deadline=None, suppress_health_check=[Slow.too_slow])
@given(
    st.lists(
        st.tuples(st.sets(st.sampled_from("abcdefgh"), max_size=4), st.sets(st.integers(0, 5))), min_size=1, max_size=12
    )
)
def test_whatever_comes_and_goes_rows_stay(rounds: list[tuple[set[str], set[int]]]) -> None:
    slots = Slots(6)
    rows: dict[str, int] = {}
    for wanted, busy in rounds:
        try:
            slots.update(server(name) for name in sorted(wanted))
        except DriverError:
            continue
        # Everybody who is wanted is there, in the row it had, and nobody shares one.
        now = {slot.server.name: slot.index for slot in slots}
        assert wanted <= set(now) and len(set(now.values())) == len(now) <= 6
        assert all(rows[name] == index for name, index in now.items() if name in rows)
        flows = [int(i in busy) for i in range(len(slots))]
        freed = slots.release(flows)
        assert {slot.server.name for slot in freed} == {
            name for name, index in now.items() if name not in wanted and not flows[index]
        }
        rows = {slot.server.name: slot.index for slot in slots}


def eventually(condition: Callable[[], object], seconds: float = 20.0) -> object:
    deadline = monotonic() + seconds
    while not (value := condition()):
        assert monotonic() < deadline, "what was waited for does not come"
        sleep(0.005)
    return value


def replace(file: Path, text: str) -> None:
    """At once, so that nobody finds it empty."""
    new = file.with_suffix(".new")
    new.write_text(text)
    new.rename(file)


def test_discovery_keeps_what_it_found_when_a_search_fails(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "servers.toml"
    text = '[[servers]]\nname = "{}"\naddress = "h"\n'
    file.write_text(text.format("a"))
    discovery = Discovery(in_file(file), 0.01)
    try:
        found = eventually(discovery.poll)
        assert [s.name for s in found] == ["a"]  # type: ignore[attr-defined]
        replace(file, "[[servers")
        eventually(lambda: "not valid TOML" in caplog.text)
        file.write_text("")
        sleep(0.05)
        assert discovery.poll() is None
        # One warning, not one per search.
        assert caplog.text.count("the servers stay as they are") == 1
        file.write_text(text.format("a") + text.format("b"))
        found = eventually(discovery.poll)
        assert [s.name for s in found] == ["a", "b"]  # type: ignore[attr-defined]
    finally:
        discovery.close()


def test_discovery_by_a_function_of_ones_own() -> None:
    called = threading.Event()

    def find() -> list[ServerConfig]:
        called.set()
        return [server("mine")]

    with closing(Discovery(find, 100.0)) as discovery:
        assert called.wait(20)
        assert [s.name for s in eventually(discovery.poll)] == ["mine"]  # type: ignore[attr-defined]


def test_discovery_by_dns_finds_an_address() -> None:
    found = in_dns("localhost", 8080)()
    assert {s.name for s in found} & {"127.0.0.1:8080", "[::1]:8080"}
    assert all(s.port == 8080 for s in found)
    with pytest.raises(DriverError, match="cannot be resolved"):
        in_dns("no-such-host.invalid", 80)()
