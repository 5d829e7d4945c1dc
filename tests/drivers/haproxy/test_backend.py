"""A backend of a real HAProxy as a data plane."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager

import numpy as np
import pytest

from lbgym.drivers import DriverError
from lbgym.drivers.haproxy import FlowLog, Haproxy, HaproxyBackend, HaproxyOptions, open_backends
from lbgym.features import FEATURE_NAMES
from lbgym.sharedmemory import ServerState
from tests.drivers.haproxy.balancer import Balancer
from tests.drivers.proxies import Driven, answer, check_every_flow_is_counted_once, check_weights_move_flows, eventually

pytestmark = pytest.mark.haproxy

WEB = {"web": ["s1", "s2", "s3"]}


@contextmanager
def driving(balancer: Balancer, backend: str = "web", *, log: bool = False, start: bool = True) -> Iterator[Driven]:
    if start:
        balancer.start()
    options = HaproxyOptions(backends={"region": backend}, socket=balancer.socket, log=balancer.log if log else None)
    (source,) = open_backends(options).values()
    assert isinstance(source, HaproxyBackend)
    with closing(source):
        yield Driven(source)


def test_random_gets_great_weights(balancer: Balancer) -> None:
    balancer.configure(WEB, rule="random(1)")
    with driving(balancer) as driven:
        driven.read()
        assert balancer.weights("web") == {"s1": 100, "s2": 100, "s3": 100}
        driven.apply(1.0, 2.0, 0.0)
        assert balancer.weights("web") == {"s1": 128, "s2": 256, "s3": 0}


def test_weights_move_flows(balancer: Balancer) -> None:
    balancer.configure(WEB)
    with driving(balancer) as driven:
        check_weights_move_flows(driven, balancer, WEB["web"], 10, 0.01)
        # No weight for any server that takes flows: they go on all the same.
        balancer.ask("set server web/s3 state maint")
        driven.read()
        assert {balancer.flow() for _ in range(10)} == {"s1", "s2"}


def test_open_flows_and_failures(balancer: Balancer) -> None:
    balancer.configure(WEB)
    with driving(balancer) as driven, ExitStack() as flows:
        driven.apply(1.0, 0.0, 0.0)
        held = [flows.enter_context(balancer.open("hold")) for _ in range(7)]
        eventually(lambda: driven.read().stats[0, 0] == 7)
        assert {answer(client) for client in held} == {"s1"}
        assert driven.settled(7).completed.tolist() == [7, 0, 0]
        for _ in range(3):
            assert balancer.flow("break") == ""
        seen = driven.settled(10)
        assert seen.failed.tolist() == [3, 0, 0] and seen.completed.tolist() == [7, 0, 0]
        # A server that refuses: HAProxy tries it twice, but the flow counts once.
        balancer.servers.down("s2")
        driven.apply(0.0, 1.0, 0.0)
        assert balancer.flow() == ""
        balancer.servers.up("s2")
        seen = driven.settled(11)
        assert seen.started.tolist() == [10, 1, 0] and seen.failed.tolist() == [3, 1, 0]


def test_every_flow_is_counted_once(balancer: Balancer) -> None:
    balancer.configure(WEB)
    with driving(balancer) as driven:
        check_every_flow_is_counted_once(driven, balancer)


def test_flows_that_no_server_takes(balancer: Balancer) -> None:
    balancer.configure(WEB)
    with driving(balancer) as driven:
        balancer.flow()
        for name in WEB["web"]:
            balancer.ask(f"set server web/{name} state maint")
        assert balancer.flow() == "" and balancer.flow() == ""
        eventually(lambda: driven.read().unrouted == 2)
        assert not driven.read().active.any()


def test_flow_completion_times(balancer: Balancer) -> None:
    balancer.configure(WEB)
    with driving(balancer, log=True) as driven:
        assert driven.source.features == tuple(FEATURE_NAMES[:6])
        balancer.flow(0.2)
        balancer.flow("break")
        balancer.flow(0.05)
        eventually(lambda: driven.read().fct_count == 2)
        seen = driven.read()
        assert seen.fct_sum >= 0.25 and not seen.stats[:, 6:].any()
        assert seen.stats[0, 1] >= 0.2 and not seen.stats[1].any() and 0.05 <= seen.stats[2, 1] < seen.stats[0, 1]
        np.testing.assert_allclose(seen.fct_sum, seen.stats[:, 1].sum(), rtol=1e-5)


def test_states_and_drains(balancer: Balancer) -> None:
    balancer.configure(WEB, check=True, weights={"s3": 0})
    with driving(balancer) as driven:

        def states() -> list[ServerState]:
            seen = driven.read()
            rows = driven.source.servers()
            assert seen.active.tolist() == [row.state is ServerState.UP for row in rows]
            return [row.state for row in rows]

        up, draining, down = ServerState.UP, ServerState.DRAINING, ServerState.DOWN
        # A configured weight of 0 is an operator's drain, whatever an agent says.
        driven.apply(1.0, 1.0, 9.0)
        assert states() == [up, up, draining] and balancer.weights()["s3"] == 0
        # The agent's weight 0 is none.
        driven.apply(1.0, 0.0, 1.0)
        assert states() == [up, up, draining]
        driven.source.drain("s1")
        assert states() == [draining, up, draining]
        assert {balancer.flow() for _ in range(5)} == {"s2"}
        driven.source.undrain("s1")
        assert states() == [up, up, draining]
        balancer.ask("set server web/s2 state drain")
        assert states() == [up, draining, draining]
        balancer.ask("set server web/s2 state ready")
        balancer.servers.down("s2")
        eventually(lambda: states() == [up, down, draining])
        balancer.servers.up("s2")
        eventually(lambda: states() == [up, up, draining])
        with pytest.raises(DriverError, match="no server 's9'; known: s1, s2, s3"):
            driven.source.drain("s9")
        with pytest.raises(DriverError, match="reload HAProxy: the driver follows"):
            driven.source.add("s4", address="127.0.0.1", port=1, weight=1.0, cores=None)


def test_reloads_are_followed(balancer: Balancer) -> None:
    balancer.configure(WEB)
    with driving(balancer, log=True) as driven, ExitStack() as flows:
        driven.apply(1.0, 0.0, 0.0)
        old = [flows.enter_context(balancer.open("hold")) for _ in range(4)]
        eventually(lambda: driven.read().stats[0, 0] == 4)
        balancer.configure({"web": ["s1", "s3", "s2"]}, weights={"s2": 50})
        balancer.reload()
        # One look later the weights are back, in the rows there were.
        driven.read()
        assert balancer.weights() == {"s1": 1, "s3": 0, "s2": 0}
        assert [row.name for row in driven.source.servers()] == ["s1", "s2", "s3"]
        assert [row.weight for row in driven.source.servers()] == [100.0, 50.0, 100.0]
        new = [flows.enter_context(balancer.open("hold")) for _ in range(3)]
        eventually(lambda: driven.read().stats[0, 0] == 7)
        # Both processes finish theirs, and the old one ends.
        assert {answer(client) for client in old + new} == {"s1"}
        seen = driven.settled(7)
        assert seen.completed.tolist() == [7, 0, 0] and not seen.failed.any()
        eventually(lambda: (driven.read(), driven.source.processes)[1] == 1)
        eventually(lambda: driven.read().fct_count == 7)
        assert driven.source.lost_lines == 0


def test_drains_outlast_a_reload(balancer: Balancer) -> None:
    balancer.configure(WEB)
    with driving(balancer) as driven:

        def drained_after(reload: bool = True) -> list[str]:
            if reload:
                balancer.reload()
            driven.read()
            return [row.name for row in driven.source.servers() if row.state is ServerState.DRAINING]

        driven.source.drain("s1")
        driven.source.drain("s2")
        assert drained_after() == ["s1", "s2"] and {balancer.flow() for _ in range(5)} == {"s3"}
        # Whoever takes a server back, it is back.
        balancer.ask("set server web/s1 state ready")
        assert drained_after(reload=False) == ["s2"] and drained_after() == ["s2"]
        driven.source.undrain("s2")
        assert drained_after() == []


def test_a_reload_that_brings_an_odd_name(balancer: Balancer, caplog: pytest.LogCaptureFixture) -> None:
    long = "s2" * 32
    balancer.servers.ports[long] = balancer.servers.ports["s2"]
    balancer.configure({"web": ["s1"]})
    with driving(balancer) as driven:
        balancer.configure({"web": ["s1", long]})
        balancer.reload()
        for _ in range(3):
            driven.read()
        assert [row.name for row in driven.source.servers()] == ["s1"]
        driven.apply(7.0)
        assert balancer.weights()["s1"] == 7
    assert caplog.text.count(f"server web/{long} is left as it is: name must be at most 63 bytes") == 1
    with pytest.raises(DriverError, match=f"server web/{long}: name must be at most 63 bytes"):
        open_backends(HaproxyOptions(backends={"region": "web"}, socket=balancer.socket))


def test_servers_come_and_go_with_reloads(balancer: Balancer) -> None:
    balancer.configure({"web": ["s1", "s2"]})
    with driving(balancer) as driven, ExitStack() as flows:
        driven.apply(0.0, 1.0)
        held = flows.enter_context(balancer.open("hold"))
        eventually(lambda: driven.read().stats[1, 0] == 1)
        balancer.configure({"web": ["s1", "s3"]})
        balancer.reload()
        seen = driven.read()
        rows = driven.source.servers()
        assert [row.name for row in rows] == ["s1", "s2", "s3"] and rows[1].state is ServerState.DRAINING
        assert seen.stats[1, 0] == 1 and not seen.active[1]
        # The agent has said nothing of the newcomer: it has its configured weight.
        assert answer(held) == "s2"
        eventually(lambda: (driven.read(), driven.source.servers()[1].name)[1] == "")
        assert driven.read().completed[1] == 1
        driven.apply(1.0, 1.0, 3.0)
        assert balancer.weights() == {"s1": 1, "s3": 3}


def test_restart_fails_open_flows_and_sets_weights_again(balancer: Balancer) -> None:
    balancer.configure(WEB)
    with driving(balancer) as driven, ExitStack() as flows:
        driven.apply(3.0, 1.0, 0.0)
        balancer.flow()
        driven.apply(1.0, 0.0, 0.0)
        for _ in range(2):
            flows.enter_context(balancer.open("hold"))
        eventually(lambda: driven.read().stats[0, 0] == 2)
        before = driven.read()
        balancer.kill()
        with pytest.raises(DriverError, match=r"nobody answers|no socket"):
            driven.read()
        balancer.start()
        seen = driven.read()
        assert balancer.weights() == {"s1": 1, "s2": 0, "s3": 0}
        assert seen.started.sum() == before.started.sum() == 3
        assert seen.failed.tolist() == [2, 0, 0] and not seen.stats[:, 0].any()


def test_what_somebody_else_sets_is_set_back(balancer: Balancer) -> None:
    balancer.configure(WEB)
    with driving(balancer) as driven:
        driven.apply(1.0, 2.0, 3.0)
        balancer.ask("set server web/s1 weight 200")
        driven.read()
        assert balancer.weights() == {"s1": 1, "s2": 2, "s3": 3}
        balancer.flow()
        driven.settled(1)
        balancer.ask("clear counters all")
        balancer.flow()
        assert driven.settled(2).completed.sum() == 2


def test_several_backends_share_one_haproxy(balancer: Balancer) -> None:
    balancer.configure({"web": ["s1", "s2"], "api": ["s3", "s1"]})
    balancer.start()
    sources = open_backends(HaproxyOptions(backends={"a": "web", "b": "api"}, socket=balancer.socket, log=balancer.log))
    try:
        for source in sources.values():
            source.apply(np.array([1.0, 3.0]), 0.1)
        assert balancer.weights("web") == {"s1": 1, "s2": 3} and balancer.weights("api") == {"s3": 1, "s1": 3}
        balancer.reload()
        for source in sources.values():
            source.read(0.2)
        assert balancer.weights("web") == {"s1": 1, "s2": 3} and balancer.weights("api") == {"s3": 1, "s1": 3}
    finally:
        for source in sources.values():
            source.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"rule": "static-rr"},
            r"'balance static-rr', which does not follow weights .* roundrobin, leastconn or random",
        ),
        ({"rule": "first"}, "'balance first', which does not follow weights"),
        ({"rule": "source"}, "'balance source', which does not follow weights"),
        ({"level": "operator"}, "does not let weights be set .*: its socket needs 'level admin'"),
        ({"level": "user"}, "its socket needs 'level admin'"),
    ],
)
def test_what_cannot_be_driven_is_refused(balancer: Balancer, settings: dict[str, str], message: str) -> None:
    balancer.configure(WEB, weights={"s1": 7}, **settings)  # type: ignore[arg-type]
    with pytest.raises(DriverError, match=message), driving(balancer):
        pass
    assert balancer.weights() == {"s1": 7, "s2": 100, "s3": 100}


def test_consistent_hashes_follow_weights(balancer: Balancer) -> None:
    balancer.configure(WEB, rule="source", more="  hash-type consistent")
    with driving(balancer) as driven:
        driven.apply(5.0, 1.0, 0.0)
        assert balancer.weights() == {"s1": 5, "s2": 1, "s3": 0}


def test_refusals_change_nothing(balancer: Balancer) -> None:
    with pytest.raises(DriverError, match=f"there is no socket {balancer.socket}: does HAProxy run"):
        Haproxy(balancer.socket)
    balancer.configure(WEB)
    with driving(balancer) as driven:
        driven.apply(1.0, 2.0, 3.0)
        with pytest.raises(
            DriverError, match=f"another driver drives backend 'web' of the HAProxy at {balancer.socket}"
        ):
            open_backends(HaproxyOptions(backends={"b": "web"}, socket=balancer.socket))
        with pytest.raises(DriverError, match=f"HAProxy at {balancer.socket} has no backend 'wbe'"):
            open_backends(HaproxyOptions(backends={"b": "wbe"}, socket=balancer.socket))
        assert balancer.weights() == {"s1": 1, "s2": 2, "s3": 3}
    with pytest.raises(DriverError, match="server web/s1 asks no agent"):
        open_backends(
            HaproxyOptions(backends={"a": "web"}, socket=balancer.socket, agent_check=str(balancer.agent_port))
        )


def test_log_socket_in_a_path(balancer: Balancer) -> None:
    path = str(balancer.folder / "log.sock")
    balancer.configure(WEB, log=path)
    balancer.start()
    options = HaproxyOptions(backends={"a": "web"}, socket=balancer.socket, log=path)
    # That of a driver that was killed.
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as dead:
        dead.bind(path)
    (source,) = open_backends(options).values()
    with closing(source):
        with pytest.raises(DriverError, match=f"cannot receive HAProxy's log at {path}: Address already in use"):
            FlowLog(path)
        assert isinstance(source, HaproxyBackend)
        driven = Driven(source)
        balancer.flow(0.1)
        eventually(lambda: driven.read().fct_count == 1)
    assert not (balancer.folder / "log.sock").exists()
    with pytest.raises(DriverError, match="cannot receive HAProxy's log at /nowhere/log: No such file"):
        FlowLog("/nowhere/log")
