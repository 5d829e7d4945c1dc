"""The servers of a configured driver: file, health, ground truth and reload together, with real servers behind them."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from lbgym.cli.dataplane import _loaded
from lbgym.drivers import DriverError
from lbgym.drivers.config import load_config
from lbgym.drivers.pool import ServerPool
from lbgym.errors import InvalidOptionError, UnknownNameError
from lbgym.sharedmemory import ServerState
from tests.drivers.test_discovery import eventually
from tests.drivers.test_health import answer, web

HEAD = 'name = "edge"\ncapacity = 3\n[health]\ninterval = 0.02\ntimeout = 5.0\n'
SERVER = (
    '[[servers]]\nname = "{0}"\naddress = "127.0.0.1"\nport = {1}\nground_truth = {{ port = {1}, path = "/agent" }}\n'
)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[Path, int, signal.Signals]]:
    answer(tmp_path, cpu_usage=0.5, memory_usage=0.25, busy_workers=3)
    with web(tmp_path) as (process, port):
        yield tmp_path / "dataplane.toml", port, process  # type: ignore[misc]


def states(pool: ServerPool, flows: tuple[int, ...] = ()) -> list[tuple[str, ServerState]]:
    pool.refresh(flows)
    return [(row.name, row.state) for row in pool.servers()]


def test_a_pool_follows_its_file_and_its_servers(site: tuple[Path, int, object]) -> None:
    file, port, process = site
    file.write_text(HEAD + SERVER.format("a", port) + SERVER.format("b", port))
    pool = ServerPool(load_config(file), file)
    try:
        assert [name for name, _ in states(pool)] == ["a", "b"]
        eventually(lambda: states(pool) == [("a", ServerState.UP), ("b", ServerState.UP)])
        eventually(lambda: np.isfinite(pool.ground_truth()[1]).all())
        assert pool.ground_truth()[0].tolist() == [[0.5, 0.25, 3.0]] * 2

        file.write_text(
            HEAD + SERVER.format("c", port) + SERVER.format("a", port).replace("port", "weight = 3\nport", 1)
        )
        assert pool.reload() == "added c; changed a; removing b"
        assert states(pool, (1, 1, 0))[1] == ("b", ServerState.DRAINING)
        assert pool.servers()[0].weight == 3.0
        # Its row is free once its flows have ended, and takes who comes next.
        assert states(pool, (1, 0, 0))[1] == ("", ServerState.DOWN)
        assert np.isinf(pool.ground_truth()[1][1])
        pool.add("d", address="127.0.0.1", port=port, weight=1.0, cores=None)
        assert [name for name, _ in states(pool)] == ["a", "d", "c"]
        with pytest.raises(DriverError, match="no room for server 'e'"):
            pool.add("e", address="127.0.0.1", port=port, weight=1.0, cores=None)

        before = pool.servers()
        for bad in ("name = ", HEAD + SERVER.format("a", 0)):
            file.write_text(bad)
            with pytest.raises(InvalidOptionError, match=str(file)):
                pool.reload()
            assert [row.name for row in pool.servers()] == [row.name for row in before]

        process.send_signal(signal.SIGKILL)  # type: ignore[attr-defined]
        eventually(lambda: {state for _, state in states(pool)} == {ServerState.DOWN})
    finally:
        pool.close()
        pool.close()


def test_what_needs_a_restart_is_said(site: tuple[Path, int, object]) -> None:
    file, port, _ = site
    file.write_text(HEAD + SERVER.format("a", port))
    pool = ServerPool(load_config(file), file)
    try:
        file.write_text("publish_interval = 1.0\n" + HEAD + SERVER.format("a", port))
        assert pool.reload() == "nothing has changed; restart the driver for publish_interval"
        assert pool.reload() == "nothing has changed; restart the driver for publish_interval"
    finally:
        pool.close()
    with closing(ServerPool(load_config(file))) as pool, pytest.raises(DriverError, match="no configuration file"):
        pool.reload()


@pytest.mark.parametrize(("given", "later"), [(None, "; restart the driver for name"), ("mine", "")])
def test_a_name_of_the_command_line_stays(tmp_path: Path, given: str | None, later: str) -> None:
    file = tmp_path / "dataplane.toml"
    text = 'name = "{}"\n[[servers]]\nname = "a"\naddress = "h"\n'
    file.write_text(text.format("edge"))
    with closing(ServerPool(_loaded(file, given), file)) as pool:
        assert pool.reload() == "nothing has changed"
        file.write_text(text.format("other"))
        assert pool.reload() == "nothing has changed" + later
    file.write_text("renamed = true\n" + text.format("edge"))
    with pytest.raises(UnknownNameError, match="unknown key 'renamed'"):
        load_config(file)


def test_servers_are_found_while_it_runs(site: tuple[Path, int, object], tmp_path: Path) -> None:
    file, port, _ = site
    found = tmp_path / "servers.toml"
    found.write_text(SERVER.format("a", port))
    file.write_text(f'name = "edge"\n[discovery]\nkind = "file"\npath = "{found}"\ninterval = 0.02\n')
    pool = ServerPool(load_config(file), file)
    try:
        eventually(lambda: states(pool) == [("a", ServerState.UP)])
        found.write_text(SERVER.format("b", port))
        eventually(lambda: [name for name, _ in states(pool, (1,))] == ["a", "b"])
        assert states(pool, (1, 0))[0] == ("a", ServerState.DRAINING)
    finally:
        pool.close()


def found_in(folder: Path, *names: str) -> Path:
    """A list to discover, and the configuration that does."""
    new, found, file = folder / "servers.new", folder / "servers.toml", folder / "dataplane.toml"
    new.write_text("".join(f'[[servers]]\nname = "{name}"\naddress = "h-{name}"\n' for name in names))
    new.rename(found)
    discovery = f'[discovery]\nkind = "file"\npath = "{found}"\ninterval = 0.01\n'
    file.write_text(f'name = "edge"\ncapacity = 2\n{discovery}')
    return file


def test_a_server_that_was_found_waits_for_room(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    up, draining, down = ServerState.UP, ServerState.DRAINING, ServerState.DOWN
    with closing(ServerPool(load_config(found_in(tmp_path, "a", "b")))) as pool:
        eventually(lambda: states(pool, (1, 1)) == [("a", up), ("b", up)])
        found_in(tmp_path, "c", "a", "d")
        eventually(lambda: states(pool, (1, 1)) == [("a", up), ("b", draining)])
        assert [states(pool, (1, 1)) for _ in range(3)] == 3 * [[("a", up), ("b", draining)]]
        assert (
            caplog.text.count("no room for 2 servers, the first of them 'c': all 2 rows are taken, 1 of them by") == 1
        )
        # The last flow of "b" has ended, and its row is given to the first that waits for one.
        assert states(pool, (1, 0)) == [("a", up), ("", down)]
        assert states(pool, (1, 0)) == [("a", up), ("c", up)]
        # What an operator does meanwhile stays.
        pool.remove("a")
        assert states(pool, (1, 0)) == [("a", draining), ("c", up)]
        assert states(pool, (0, 0)) == [("", down), ("c", up)]
        assert states(pool, (0, 0)) == states(pool, (0, 0)) == [("d", up), ("c", up)]
        assert caplog.text.count("no room") == 1
        # Another list does not wait for what was left of the last one.
        found_in(tmp_path, "c", "d", "e")
        eventually(lambda: states(pool) and caplog.text.count("no room") == 2)
        found_in(tmp_path, "c")
        eventually(lambda: states(pool, (0, 0)) == [("", down), ("c", up)])
        assert states(pool) == [("", down), ("c", up)]


def test_servers_found_by_dns_have_the_checks_of_the_file(site: tuple[Path, int, object]) -> None:
    file, port, process = site
    file.write_text(
        HEAD
        + '[ground_truth]\naddress = "127.0.0.1"\npath = "/agent"\n'
        + f"port = {port}\n"
        + f'[discovery]\nkind = "dns"\nhost = "127.0.0.1"\nport = {port}\ninterval = 0.02\n'
    )
    name = f"127.0.0.1:{port}"
    with closing(ServerPool(load_config(file), file)) as pool:
        eventually(lambda: states(pool) == [(name, ServerState.UP)])
        eventually(lambda: np.isfinite(pool.ground_truth()[1]).all())
        assert pool.ground_truth()[0].tolist() == [[0.5, 0.25, 3.0]]
        file.write_text(file.read_text().replace("timeout = 5.0", "timeout = 4.0"))
        assert pool.reload() == "nothing has changed; restart the driver for health"
        process.send_signal(signal.SIGKILL)  # type: ignore[attr-defined]
        eventually(lambda: states(pool) == [(name, ServerState.DOWN)])
