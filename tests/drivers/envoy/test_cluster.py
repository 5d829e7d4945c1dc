"""A cluster of a real Envoy as a data plane."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager

import numpy as np
import pytest

from lbgym.drivers import DriverError
from lbgym.drivers.envoy import EnvoyOptions, open_clusters
from lbgym.features import FEATURE_NAMES
from lbgym.sharedmemory import ServerState
from tests.drivers.envoy.balancer import Balancer, write
from tests.drivers.proxies import (
    Driven,
    answer,
    applied,
    check_every_flow_is_counted_once,
    check_weights_move_flows,
    eventually,
    free_ports,
)

pytestmark = pytest.mark.envoy

WEB = {"web": ["s1", "s2", "s3"]}


def options(balancer: Balancer, *clusters: str, xds: bool = False, log: str | None = None) -> EnvoyOptions:
    names = clusters or ("web",)
    return EnvoyOptions(
        clusters={f"region-{name}": name for name in names},
        files={name: str(balancer.file(name)) for name in names},
        admin=(balancer.admin,),
        xds=str(balancer.driver_port) if xds else None,
        access_log=log,
    )


@contextmanager
def driving(balancer: Balancer, *, xds: bool = False, log: str | None = None, start: bool = True) -> Iterator[Driven]:
    if start:
        balancer.start()
    (source,) = open_clusters(options(balancer, xds=xds, log=log)).values()
    with closing(source):
        yield Driven(source)


@pytest.mark.parametrize("source", ["file", "eds", "ads"])
def test_weights_move_flows(balancer: Balancer, source: str) -> None:
    balancer.configure(WEB, source=source)
    with driving(balancer, xds=source != "file") as driven:
        check_weights_move_flows(driven, balancer, WEB["web"], 5, 1e-5)
        # No weight for any server that takes flows: they go on all the same.
        driven.source.drain("s3")
        assert {balancer.flow() for _ in range(10)} == {"s1", "s2"}
        # What is served is read, not written.
        assert ("lbgym" in balancer.file().read_text()) == (source == "file")


def test_open_flows_and_failures(balancer: Balancer) -> None:
    balancer.configure(WEB)
    with driving(balancer) as driven, ExitStack() as flows:
        driven.apply(1.0, 0.0, 0.0)
        held = [flows.enter_context(balancer.open("hold")) for _ in range(7)]
        eventually(lambda: driven.read().stats[0, 0] == 7)
        assert {answer(client) for client in held} == {"s1"}
        assert driven.settled(7).completed.tolist() == [7, 0, 0]
        # A server that refuses.
        balancer.servers.down("s2")
        driven.apply(0.0, 1.0, 0.0)
        assert balancer.flow() == "" and balancer.flow() == ""
        balancer.servers.up("s2")
        seen = driven.settled(9)
        assert seen.started.tolist() == [7, 2, 0] and seen.failed.tolist() == [0, 2, 0]
        assert not seen.unrouted


def test_every_flow_is_counted_once(balancer: Balancer) -> None:
    balancer.configure(WEB)
    with driving(balancer) as driven:
        check_every_flow_is_counted_once(driven, balancer)


@pytest.mark.parametrize("kind", ["file", "grpc"])
def test_flow_completion_times(balancer: Balancer, kind: str) -> None:
    balancer.configure(WEB, log=kind)
    with driving(balancer, log=balancer.log if kind == "file" else str(balancer.driver_port)) as driven:
        assert driven.source.features == tuple(FEATURE_NAMES[:6])
        took = {balancer.flow(0.2): 0.2, balancer.flow(0.05): 0.05}
        assert balancer.flow("break") == ""
        eventually(lambda: driven.read().fct_count == 2)
        seen = driven.read()
        assert seen.fct_sum >= 0.25 and not seen.stats[:, 6:].any()
        names = [row.name for row in driven.source.servers()]
        for row, name in enumerate(names):
            expected = took.get(name)
            assert seen.stats[row, 1] >= expected if expected else not seen.stats[row].any()
        np.testing.assert_allclose(seen.fct_sum, seen.stats[:, 1].sum(), rtol=1e-5)
        assert driven.source.lost_lines == 0
        if kind == "file":
            # A rotation.
            (balancer.folder / "access.log").rename(balancer.folder / "access.log.1")
            balancer.ask("/reopen_logs", "POST")
            balancer.flow()
            eventually(lambda: driven.read().fct_count == 3)


def test_requests_of_http(balancer: Balancer) -> None:
    """A request is a flow, whatever connections it shares."""
    import asyncio

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readline():
            while (await reader.readline()).strip():
                pass
            status = b"503 Not Now" if b"/bad" in head else b"200 OK"
            writer.write(b"HTTP/1.1 " + status + b"\r\nContent-Length: 2\r\n\r\nok")
        writer.close()

    balancer.configure(WEB, http=True, log="grpc")
    loop = balancer.servers._loop
    server = asyncio.run_coroutine_threadsafe(asyncio.start_server(serve, "127.0.0.1", 0), loop).result()
    port = server.sockets[0].getsockname()[1]
    ports, balancer.servers.ports = balancer.servers.ports, {"s1": port}
    try:
        balancer.write_servers(["s1"])
        with (
            driving(balancer, log=str(balancer.driver_port)) as driven,
            closing(socket.create_connection(("127.0.0.1", balancer.port))) as client,
        ):
            for path in ("good", "bad", "good"):
                client.sendall(f"GET /{path} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
                assert b"HTTP/1.1" in client.recv(1000)
            seen = driven.settled(3)
            assert seen.completed.tolist() == [2] and seen.failed.tolist() == [1]
            eventually(lambda: driven.read().fct_count == 3)
    finally:
        balancer.servers.ports = ports
        loop.call_soon_threadsafe(server.close)


def test_states_and_drains(balancer: Balancer) -> None:
    balancer.configure(WEB, check=True)
    with driving(balancer) as driven:

        def states() -> list[ServerState]:
            seen = driven.read()
            rows = driven.source.servers()
            assert seen.active.tolist() == [row.state is ServerState.UP for row in rows]
            return [row.state for row in rows]

        up, draining, down = ServerState.UP, ServerState.DRAINING, ServerState.DOWN
        eventually(lambda: states() == [up, up, up])
        driven.apply(1.0, 0.0, 1.0)
        # The agent's weight 0 is no drain of an operator's.
        assert states() == [up, up, up] and balancer.weights()["s2"] == 0
        driven.source.drain("s1")
        assert states() == [draining, up, up]
        assert {balancer.flow() for _ in range(5)} == {"s3"}
        driven.source.undrain("s1")
        assert states() == [up, up, up] and balancer.weights() == {"s1": 1, "s2": 0, "s3": 1}
        balancer.servers.down("s3")
        eventually(lambda: states() == [up, up, down])
        assert {balancer.flow() for _ in range(5)} == {"s1"}
        balancer.servers.down("s1")
        balancer.servers.down("s2")
        eventually(lambda: states() == [down, down, down])
        assert balancer.flow() == "" and balancer.flow() == ""
        eventually(lambda: driven.read().unrouted == 2)
        for name in WEB["web"]:
            balancer.servers.up(name)
        eventually(lambda: states() == [up, up, up])
        with pytest.raises(DriverError, match="no server 's9'; known: s1, s2, s3"):
            driven.source.drain("s9")


def test_a_server_that_its_operator_has_down_stays_so_after_a_drain(balancer: Balancer) -> None:
    balancer.configure({"web": ["s1"]})
    balancer.write_servers(["s1", "s2"], health_status="UNHEALTHY")
    with driving(balancer) as driven:
        assert not driven.read().active.any()
        for _ in range(2):
            driven.source.drain("s2")
        assert driven.source.servers()[1].state is ServerState.DRAINING
        driven.source.undrain("s2")
        assert not driven.read().active.any() and driven.source.servers()[1].state is ServerState.DOWN
    assert balancer.file().read_text().count("UNHEALTHY") == 2


@pytest.mark.parametrize("source", ["file", "ads"])
def test_servers_come_and_go(balancer: Balancer, source: str) -> None:
    balancer.configure({"web": ["s1", "s2"]}, source=source)
    with driving(balancer, xds=source == "ads") as driven, ExitStack() as flows:
        driven.apply(0.0, 1.0)
        held = flows.enter_context(balancer.open("hold"))
        eventually(lambda: driven.read().stats[1, 0] == 1)
        driven.source.add("s3", address="127.0.0.1", port=balancer.servers.ports["s3"], weight=2.0, cores=None)
        driven.source.remove("s2")
        seen = driven.read()
        rows = driven.source.servers()
        assert [row.name for row in rows] == ["s1", "s2", "s3"] and rows[1].state is ServerState.DRAINING
        assert seen.stats[1, 0] == 1 and seen.active.tolist() == [True, False, True]
        # The agent has said nothing of the newcomer: it has its configured weight.
        assert balancer.weights() == {"s1": 0, "s2": 0, "s3": 2}
        assert answer(held) == "s2"
        eventually(lambda: (driven.read(), driven.source.servers()[1].name)[1] == "")
        assert driven.read().completed[1] == 1 and set(balancer.weights()) == {"s1", "s3"}
        # The file is the operator's, who may change it.
        balancer.write_servers(["s1", "s2"], weights={"s2": 7})
        driven.read()
        assert set(balancer.weights()) == {"s1", "s2"}
        assert {row.name: row.weight for row in driven.source.servers()}["s2"] == 7.0
        for wrong, message in (
            ({"address": "example.org", "port": 1}, "needs an IP address"),
            ({"address": "127.0.0.1", "port": None}, "needs a port"),
            ({"address": "127.0.0.1", "port": balancer.servers.ports["s1"]}, "have the same address"),
        ):
            with pytest.raises(DriverError, match=message):
                driven.source.add("s9", **wrong, weight=1.0, cores=None)


def test_hot_restarts_are_followed(balancer: Balancer) -> None:
    balancer.configure(WEB, log="grpc")
    with driving(balancer, log=str(balancer.driver_port)) as driven, ExitStack() as flows:
        driven.apply(1.0, 0.0, 0.0)
        old = [flows.enter_context(balancer.open("hold")) for _ in range(4)]
        eventually(lambda: driven.read().stats[0, 0] == 4)
        balancer.start("--parent-shutdown-time-s", "30")
        # The new process has read the weights from the file.
        driven.read()
        assert balancer.weights() == {"s1": 1, "s2": 0, "s3": 0} and driven.source.processes == 2
        new = [flows.enter_context(balancer.open("hold")) for _ in range(3)]
        eventually(lambda: driven.read().stats[0, 0] == 7)
        assert {answer(client) for client in old + new} == {"s1"}
        seen = driven.settled(7)
        assert seen.completed.tolist() == [7, 0, 0] and not seen.failed.any()
        eventually(lambda: (driven.read(), driven.source.processes)[1] == 1)
        eventually(lambda: driven.read().fct_count == 7)


def test_restart_fails_open_flows(balancer: Balancer) -> None:
    balancer.configure(WEB, source="ads")
    with driving(balancer, xds=True) as driven, ExitStack() as flows:
        driven.apply(3.0, 1.0, 0.0)
        balancer.flow()
        driven.apply(1.0, 0.0, 0.0)
        for _ in range(2):
            flows.enter_context(balancer.open("hold"))
        eventually(lambda: driven.read().stats[0, 0] == 2)
        balancer.kill()
        with pytest.raises(DriverError, match=r"nobody answers|no socket"):
            driven.read()
        balancer.start()
        seen = driven.read()
        assert balancer.weights() == {"s1": 1, "s2": 0, "s3": 0}
        assert seen.started.sum() == 3 and seen.failed.tolist() == [2, 0, 0] and not seen.stats[:, 0].any()


def test_what_somebody_else_writes_is_set_back(balancer: Balancer) -> None:
    balancer.configure(WEB, weights={"s1": 50})
    with driving(balancer) as driven:
        driven.apply(1.0, 0.0, 3.0)
        balancer.write_servers(WEB["web"], weights={"s1": 70, "s2": 30})
        driven.read()
        assert balancer.weights() == {"s1": 1, "s2": 0, "s3": 3}
        assert [row.weight for row in driven.source.servers()] == [70.0, 30.0, 100.0]
        balancer.flow()
        driven.settled(1)
        left = balancer.file().read_text()
    # One that was killed leaves weights that are not its operator's.
    write(balancer.file(), json.loads(left))
    assert json.loads(left)["resources"][0]["endpoints"][0]["lb_endpoints"][1]["health_status"] == "DRAINING"
    with driving(balancer, start=False) as driven:
        assert [row.weight for row in driven.source.servers()] == [70.0, 30.0, 100.0]
        driven.apply(70.0, 30.0, 100.0)
        assert balancer.weights() == {"s1": 70, "s2": 30, "s3": 100} and "lbgym" not in balancer.file().read_text()


def test_several_clusters_share_one_envoy(balancer: Balancer) -> None:
    balancer.configure({"web": ["s1", "s2"], "api": ["s3", "s1"]}, source="ads")
    balancer.start()
    sources = open_clusters(options(balancer, "web", "api", xds=True))
    try:
        for source in sources.values():
            applied(source, 1.0, 3.0)
        assert balancer.weights("web") == {"s1": 1, "s2": 3} and balancer.weights("api") == {"s3": 1, "s1": 3}
    finally:
        for source in sources.values():
            source.close()


@pytest.mark.parametrize(
    ("cluster", "message"),
    [
        ({"lb_policy": "RANDOM"}, "has the load balancing policy RANDOM, which does not follow"),
        ({"lb_subset_config": {"fallback_policy": "ANY_ENDPOINT"}}, "has the load balancing policy subset"),
        ({"type": "STATIC", "eds_cluster_config": None}, "has type STATIC: weights can be set"),
    ],
)
def test_what_cannot_be_driven_is_refused(balancer: Balancer, cluster: dict[str, object], message: str) -> None:
    balancer.configure(WEB, cluster=cluster)
    before = balancer.file().read_text()
    with pytest.raises(DriverError, match=message), driving(balancer):
        pass
    assert balancer.file().read_text() == before


def test_refusals_change_nothing(balancer: Balancer) -> None:
    with pytest.raises(DriverError, match=f"there is no socket {balancer.admin}: does Envoy run"):
        open_clusters(options(balancer))
    balancer.configure(WEB)
    with driving(balancer) as driven:
        driven.apply(1.0, 2.0, 3.0)
        with pytest.raises(DriverError, match="another driver drives cluster 'web' by "):
            open_clusters(options(balancer))
        with pytest.raises(DriverError, match="has no cluster 'wbe'; it has driver, web"):
            open_clusters(options(balancer, "wbe"))
        with pytest.raises(DriverError, match=r"reads its servers from .*, not by xDS"):
            open_clusters(options(balancer, xds=True))
        other = EnvoyOptions(clusters={"a": "web"}, files={"web": "/etc/hosts"}, admin=(balancer.admin,))
        with pytest.raises(DriverError, match=r"reads its servers from .*, not from /etc/hosts"):
            open_clusters(other)
        # Envoy refuses what it is told, and goes on as before; the driver says so and tries again.
        wrong = balancer.folder / "wrong"
        wrong.write_text("{")
        wrong.rename(balancer.file())
        with pytest.raises(DriverError, match="neither JSON nor YAML"):
            driven.read()
        assert balancer.weights() == {"s1": 1, "s2": 2, "s3": 3}
        balancer.write_servers(WEB["web"])
        driven.read()
        assert balancer.weights() == {"s1": 1, "s2": 2, "s3": 3}


def test_ports_in_use_and_envoys_that_do_not_come(balancer: Balancer) -> None:
    balancer.configure(WEB, source="ads")
    balancer.start()
    message = f"cannot serve Envoy at 127.0.0.1:{balancer.driver_port}: Address already in use"
    with (
        closing(socket.create_server(("127.0.0.1", balancer.driver_port))),
        pytest.raises(DriverError, match=message),
    ):
        open_clusters(options(balancer, xds=True))
    elsewhere = EnvoyOptions(
        clusters={"a": "web"}, files={"web": str(balancer.file())}, admin=(balancer.admin,), xds=str(free_ports(1)[0])
    )
    with pytest.raises(DriverError, match=r"no Envoy has asked for the servers of cluster 'web' within 0\.1 s"):
        open_clusters(elsewhere, wait=0.1)
