"""The server of xDS, to Envoys, to gRPC's own clients, and to clients that misbehave."""

from __future__ import annotations

import json
import logging
import os
import queue
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest

from lbgym.drivers import DriverError, Publisher
from lbgym.drivers.envoy import EnvoyOptions, XdsServer, open_clusters
from lbgym.drivers.metrics import DriverMetrics
from tests.chance import as_likely
from tests.drivers.envoy.balancer import ASSIGNMENT, Balancer, place
from tests.drivers.proxies import LONG, Driven, Servers, applied, eventually, free_ports

grpc = pytest.importorskip("grpc")
discovery = pytest.importorskip("envoy.service.discovery.v3.discovery_pb2")


REFUSED = 'lbgym_driver_refused_updates_total{region="a"} '


def assignment(weights: dict[str, int], ports: dict[str, int]) -> dict[str, Any]:
    entries = [
        {"endpoint": {"hostname": name, "address": place(ports[name])}, "load_balancing_weight": weight}
        for name, weight in weights.items()
    ]
    return {"cluster_name": "web", "endpoints": [{"lb_endpoints": entries}]}


class Stream:
    """A client of ADS that says what it is told to."""

    def __init__(self, channel: Any, node: str) -> None:
        self.node, self._requests = node, queue.Queue[Any]()
        call = channel.stream_stream(
            "/envoy.service.discovery.v3.AggregatedDiscoveryService/StreamAggregatedResources",
            request_serializer=discovery.DiscoveryRequest.SerializeToString,
            response_deserializer=discovery.DiscoveryResponse.FromString,
        )
        self._responses = call(iter(self._requests.get, None), timeout=LONG)
        self.last: Any = None

    def ask(self, kind: str, *names: str, nonce: str = "", error: str = "", code: int = 0) -> None:
        request = discovery.DiscoveryRequest(type_url=kind, resource_names=names, response_nonce=nonce)
        request.node.id = self.node
        if error or code:
            request.error_detail.message, request.error_detail.code = error, code
        self._requests.put(request)

    def answer(self, error: str = "") -> None:
        """Acknowledge the last response, or refuse it."""
        self.ask(ASSIGNMENT, "web", nonce=self.last.nonce, error=error)

    def weights(self) -> list[int]:
        """Of the next response."""
        from envoy.config.endpoint.v3.endpoint_pb2 import ClusterLoadAssignment

        self.last = next(self._responses)
        found = []
        for resource in self.last.resources:
            message = ClusterLoadAssignment()
            assert resource.Unpack(message)
            entries = [entry for group in message.endpoints for entry in group.lb_endpoints]
            found += [entry.load_balancing_weight.value for entry in entries]
        return found

    def close(self) -> None:
        self._requests.put(None)
        self._responses.cancel()


@contextmanager
def serving(expected: Sequence[str] = ()) -> Iterator[tuple[XdsServer, Any]]:
    (port,) = free_ports(1)
    with (
        closing(XdsServer(("127.0.0.1", port), expected=expected).share()) as server,
        grpc.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        yield server, channel


def test_state_of_the_world(caplog: pytest.LogCaptureFixture) -> None:
    ports = {"a": 1, "b": 2}
    with serving() as (server, channel):
        server.publish(assignment({"a": 1, "b": 2}, ports), "web")
        with closing(Stream(channel, "one")) as one, closing(Stream(channel, "two")) as two:
            for stream in (one, two):
                stream.ask(ASSIGNMENT, "web")
                assert stream.weights() == [1, 2]
            assert server.subscribers("web") == [("Envoy 'one'", ""), ("Envoy 'two'", "")]
            assert not server.settled("web")
            one.answer()
            two.answer()
            eventually(lambda: server.settled("web"))
            # What a client has not answered yet is not overtaken; it gets the newest then.
            server.publish(assignment({"a": 3, "b": 4}, ports), "web")
            assert one.weights() == [3, 4]
            for weight in (5, 6, 7):
                server.publish(assignment({"a": weight, "b": 1}, ports), "web")
            one.ask(ASSIGNMENT, "web", nonce="long past")
            server.flush()
            one.answer()
            assert one.weights() == [7, 1]
            one.answer()
            assert two.weights() == [3, 4]
            with caplog.at_level(logging.ERROR, "lbgym"):
                two.answer("b has\n  no such weight")
                assert two.weights() == [7, 1]
            assert [record.message for record in caplog.records] == [
                "Envoy 'two' refuses ClusterLoadAssignment: b has no such weight"
            ]
            # A refusal is of what was sent, which is not sent again by itself.
            two.answer("nor this")
            eventually(lambda: server.subscribers("web") == [("Envoy 'one'", ""), ("Envoy 'two'", "nor this")])
            # Once is enough.
            assert "nor this" not in caplog.text
            # The same again is nothing new.
            server.publish(assignment({"a": 7, "b": 1}, ports), "web")
            assert server.settled("web")
            # Other names are another question.
            one.ask(ASSIGNMENT, "api", nonce=one.last.nonce)
            assert one.weights() == []
            assert "asks for the servers of cluster 'api', which are not served here" in caplog.text
        eventually(lambda: not server.subscribers("web"))


def test_who_asks_early_gets_its_answer_in_time(caplog: pytest.LogCaptureFixture) -> None:
    with serving(["web"]) as (server, channel), closing(Stream(channel, "one")) as one:
        one.ask(ASSIGNMENT, "web")
        eventually(lambda: server.subscribers("web"))
        server.publish(assignment({"a": 1}, {"a": 1}), "web")
        # An answer without servers would have an Envoy refuse its flows.
        assert one.weights() == [1]
    assert not caplog.records


def test_a_refusal_is_no_weight_in_force(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    file = tmp_path / "servers.toml"
    file.write_text('[[servers]]\nname = "a"\naddress = "127.0.0.1"\nport = 1\nweight = 2.5\n')
    options = EnvoyOptions(clusters={"a": "web"}, files={"web": str(file)}, xds=str(port))
    (source,) = open_clusters(options).values()
    with closing(source), grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        assert source.features == () and [row.weight for row in source.servers()] == [2.5]
        with closing(Stream(channel, "one")) as one:
            one.ask(ASSIGNMENT, "web")
            assert one.weights() == [1_000_000]
            one.answer("no")
            driven = Driven(source)
            eventually(lambda: source._delivery.refusal())
            with pytest.raises(DriverError, match=r"cluster 'web' by xDS: Envoy 'one' refuses them: no"):
                driven.read()
            # What was refused is not sent again, but the next weights are.
            driven.apply(3.0)
            assert one.weights() == [3]
            one.answer()
            eventually(lambda: not source._delivery.refusal())
            assert driven.read().active.tolist() == [True]


def test_refusals_are_counted(tmp_path: Path, shm_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of servers that a client of gRPC has not taken, with a reason or without one."""
    pytest.importorskip("prometheus_client")
    (port,) = free_ports(1)
    file = tmp_path / "servers.toml"
    file.write_text('[[servers]]\nname = "a"\naddress = "127.0.0.1"\nport = 1\n')
    sources = open_clusters(EnvoyOptions(clusters={"a": "web"}, files={"web": str(file)}, xds=str(port)))
    with (
        Publisher(sources) as publisher,
        closing(DriverMetrics(publisher, sources, 0, "127.0.0.1")) as metrics,
        grpc.insecure_channel(f"127.0.0.1:{port}") as channel,
        closing(Stream(channel, "one")) as one,
    ):

        def counted() -> float | None:
            with urlopen(metrics.url, timeout=LONG) as page:
                (line,) = (line for line in page.read().decode().splitlines() if line.startswith(REFUSED))
            return float(line.removeprefix(REFUSED))

        one.ask(ASSIGNMENT, "web")
        assert one.weights() == [1] and counted() == 0.0
        one.answer("no such port")
        eventually(lambda: counted() == 1.0)
        assert [record.message for record in caplog.records if "refuses" in record.message] == [
            "Envoy 'one' refuses ClusterLoadAssignment: no such port"
        ]
        one.ask(ASSIGNMENT, "web", nonce=one.last.nonce, code=3)
        eventually(lambda: counted() == 2.0)
        with pytest.raises(DriverError, match=r"Envoy 'one' refuses them: it gives no reason \(code 3\)"):
            sources["a"].read(0.1)
        one.answer()
        eventually(lambda: not sources["a"]._delivery.refusal())
        assert sources["a"].read(0.2).active.tolist() == [True] and counted() == 2.0


@pytest.mark.envoy
def test_several_envoys_at_once(servers: Servers, balancer: Balancer) -> None:
    """They share the servers; flows of both count."""
    other = Balancer(servers)
    try:
        # It does not reach the driver yet.
        assert other.driver_port != balancer.driver_port
        for each in (balancer, other):
            each.configure({"web": ["s1", "s2"]}, source="eds", log="grpc")
            each.start()
        options = EnvoyOptions(
            clusters={"a": "web"},
            files={"web": str(balancer.file())},
            admin=(balancer.admin, other.admin),
            xds=str(balancer.driver_port),
            access_log=str(balancer.driver_port),
        )
        (source,) = open_clusters(options).values()
        with closing(source):
            driven = Driven(source)
            with pytest.raises(DriverError, match=f"the Envoy at {other.admin} has not taken the servers"):
                source.apply(np.array([3.0, 1.0]), 0.01)
            balancer.servers.relay(other.driver_port, balancer.driver_port)
            driven.apply(3.0, 1.0)
            for each in (balancer, other):
                assert each.weights() == {"s1": 3, "s2": 1}
                assert sorted(each.flow() for _ in range(8)) == ["s1"] * 6 + ["s2"] * 2
            assert driven.settled(16).completed.tolist() == [12, 4]
            eventually(lambda: driven.read().fct_count == 16)
    finally:
        other.close()


@pytest.mark.envoy
def test_log_entries_that_are_lost_are_counted(balancer: Balancer) -> None:
    balancer.configure({"web": ["s1"]}, log="grpc")
    balancer.start()
    options = EnvoyOptions(
        clusters={"a": "web"},
        files={"web": str(balancer.file())},
        admin=(balancer.admin,),
        access_log=str(free_ports(1)[0]),
    )

    (source,) = open_clusters(options).values()
    with closing(source):
        driven = Driven(source)
        # Nobody is where it sends its log to.
        for _ in range(5):
            balancer.flow()
        eventually(lambda: (driven.read(), source.lost_lines)[1] == 5)
        assert driven.read().completed.tolist() == [5]


CLIENT = """
import sys, time, grpc
channel = grpc.insecure_channel("xds:///web")
call = channel.unary_unary("/test/Name", request_serializer=None, response_deserializer=None)
for line in sys.stdin:
    names = [call(b"", timeout=30.0, wait_for_ready=True).decode() for _ in range(int(line))]
    print(" ".join(names), flush=True)
"""


def test_grpc_clients_follow(tmp_path: Path) -> None:
    """gRPC's own resolver of xds:/// finds the servers here, and picks them by their weights."""
    from concurrent.futures import ThreadPoolExecutor

    def backend(name: str) -> tuple[Any, int]:
        server = grpc.server(ThreadPoolExecutor(1))
        handler = grpc.unary_unary_rpc_method_handler(lambda *_: name.encode())
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", {"Name": handler}),))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        return server, port

    backends = {name: backend(name) for name in ("g1", "g2", "g3")}
    (port,) = free_ports(1)
    file = tmp_path / "servers.toml"
    file.write_text(
        "\n".join(
            f'[[servers]]\nname = "{name}"\naddress = "127.0.0.1"\nport = {at}' for name, (_, at) in backends.items()
        )
    )
    bootstrap = {
        "xds_servers": [
            {
                "server_uri": f"127.0.0.1:{port}",
                "channel_creds": [{"type": "insecure"}],
                "server_features": ["xds_v3"],
            }
        ],
        "node": {"id": "client-1"},
    }
    (source,) = open_clusters(EnvoyOptions(clusters={"a": "web"}, files={"web": str(file)}, xds=str(port))).values()
    client = subprocess.Popen(
        [sys.executable, "-c", CLIENT],
        env=os.environ | {"GRPC_XDS_BOOTSTRAP_CONFIG": json.dumps(bootstrap)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def calls(count: int) -> list[str]:
        assert client.stdin is not None and client.stdout is not None
        client.stdin.write(f"{count}\n")
        client.stdin.flush()
        return client.stdout.readline().split()

    try:
        with closing(source):
            names = calls(60)
            # It draws localities at random or in turn, depending on its version.
            assert set(names) == {"g1", "g2", "g3"} and as_likely([names.count(name) for name in backends], [1 / 3] * 3)
            applied(source, 0.0, 0.0, 5.0)
            eventually(lambda: set(calls(10)) == {"g3"})
            applied(source, 1.0, 3.0, 0.0, now=0.2)
            eventually(lambda: set(calls(20)) == {"g1", "g2"})
            names = calls(800)
            assert as_likely([names.count(name) for name in backends], [0.25, 0.75, 0.0])
    finally:
        client.kill()
        client.communicate()
        for server, _ in backends.values():
            server.stop(None)


@pytest.mark.envoy
def test_envoy_refuses_and_says_why(balancer: Balancer, caplog: pytest.LogCaptureFixture) -> None:
    balancer.configure({"web": ["s1", "s2"]}, source="ads")
    balancer.start()
    document = json.loads(balancer.file().read_text())
    good = balancer.file().read_text()
    entries = document["resources"][0]["endpoints"][0]["lb_endpoints"]
    entries[1]["endpoint"]["address"]["socket_address"]["port_value"] = 70_000
    options = EnvoyOptions(
        clusters={"a": "web"},
        files={"web": str(balancer.file())},
        admin=(balancer.admin,),
        xds=str(balancer.driver_port),
    )
    (source,) = open_clusters(options).values()
    with closing(source):
        driven = Driven(source)
        driven.apply(1.0, 2.0)
        balancer.file().write_text(json.dumps(document))
        with pytest.raises(DriverError, match=r"by xDS: Envoy 'envoy-test' refuses them: .*PortValue") as refused:
            driven.read()
        assert "\n" not in str(refused.value) and balancer.weights() == {"s1": 1, "s2": 2}
        assert sum("refuses ClusterLoadAssignment" in record.message for record in caplog.records) == 1
        balancer.file().write_text(good)
        driven.read()
        driven.apply(3.0, 1.0)
        assert balancer.weights() == {"s1": 3, "s2": 1}
