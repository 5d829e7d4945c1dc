"""The parts of the Envoy driver that need no Envoy."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbgym.drivers import DriverError
from lbgym.drivers.envoy import Envoy, EnvoyOptions, LogFile
from lbgym.drivers.envoy.admin import EnvoyProcess, Host
from lbgym.drivers.envoy.delivery import EdsFile
from lbgym.drivers.envoy.endpoints import MAX_WEIGHT, Assignment, read_assignment
from lbgym.drivers.proxy import FlowCounters
from lbgym.drivers.proxy.counters import ProcessFlows
from lbgym.errors import InvalidOptionError
from tests.drivers.proxies import eventually

TYPE = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"


def entry(name: str, port: int, **more: Any) -> dict[str, Any]:
    place = {"socket_address": {"address": "10.0.0.1", "port_value": port}}
    return {"endpoint": {"hostname": name, "address": place}, **more}


def document(*entries: dict[str, Any], **group: Any) -> dict[str, Any]:
    return {"resources": [{"@type": TYPE, "cluster_name": "web", "endpoints": [{"lb_endpoints": [*entries], **group}]}]}


@given(
    st.dictionaries(
        st.sampled_from("abcdef"),
        st.tuples(st.integers(1, 2**32 - 1), st.sampled_from(["UNKNOWN", "HEALTHY", "DRAINING", "UNHEALTHY"])),
        min_size=1,
    ),
    st.data(),
)
def test_what_a_killed_driver_leaves_says_what_its_operator_had(
    servers: dict[str, tuple[int, str]], data: st.DataObject
) -> None:
    entries = [
        entry(name, port, load_balancing_weight=weight, health_status=status, metadata={"filter_metadata": {"x": {}}})
        for port, (name, (weight, status)) in enumerate(servers.items(), 1)
    ]
    assignment = Assignment("web", document(*entries)["resources"][0], "here")
    weights = {name: data.draw(st.integers(0, MAX_WEIGHT)) for name in servers}
    gone = assignment.endpoints.pop(min(servers)) if data.draw(st.booleans()) else None
    delivered = assignment.delivered(weights, {gone.name: gone} if gone else {})
    sent = {each["endpoint"]["hostname"]: each for group in delivered["endpoints"] for each in group["lb_endpoints"]}
    assert sent.keys() == servers.keys()
    for name, each in sent.items():
        removed = gone is not None and name == gone.name
        assert each["load_balancing_weight"] == max(1, 1 if removed else weights[name])
        drained = removed or servers[name][1] == "DRAINING" or (weights[name] == 0 and servers[name][1] != "UNHEALTHY")
        assert (each.get("health_status") == "DRAINING") == drained
    after = Assignment("web", delivered, "there")
    assert after.endpoints == assignment.endpoints
    # With its operator's own weights, nothing is marked.
    own = assignment.delivered({name: int(each.weight) for name, each in assignment.endpoints.items()}, {})
    assert "lbgym" not in json.dumps(own)


def test_files_in_the_forms_that_envoy_reads(tmp_path: Path) -> None:
    yaml = tmp_path / "web.yaml"
    yaml.write_text(
        """
        resources:
          - "@type": type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment
            clusterName: web
            endpoints:
              - locality: {zone: a}
                lbEndpoints:
                  - {endpoint: {address: {socketAddress: {address: "::1", portValue: 80}}}, loadBalancingWeight: 7}
              - locality: {zone: b}
                lbEndpoints: [{endpoint: {hostname: p, address: {pipe: {path: /s}}}, healthStatus: DRAINING}]
        """
    )
    found = read_assignment(yaml, "web").endpoints
    assert [(each.name, each.key, each.weight, each.draining, each.group) for each in found.values()] == [
        ("[::1]:80", "[::1]:80", 7.0, False, 0),
        ("p", "/s", 1.0, True, 1),
    ]
    toml = tmp_path / "web.toml"
    toml.write_text('[[servers]]\nname = "a"\naddress = "::1"\nport = 80\ncores = 4\n')
    (found_one,) = read_assignment(toml, "web").endpoints.values()
    assert (found_one.name, found_one.key, found_one.weight) == ("a", "[::1]:80", 4.0)
    with pytest.raises(DriverError, match=r"must end in \.json or \.yaml"):
        EdsFile(toml, "web")
    delivered = read_assignment(yaml, "web").delivered({"[::1]:80": 3, "p": 0}, {})
    assert [group["locality"] for group in delivered["endpoints"]] == [{"zone": "a"}, {"zone": "b"}]
    # What is written in place of YAML is JSON, which is YAML, too.
    file = EdsFile(yaml, "web")
    assert file.deliver({"[::1]:80": 3, "p": 2}) and not file.deliver({"[::1]:80": 3, "p": 2})
    assert not file.poll() and read_assignment(yaml, "web").endpoints["[::1]:80"].weight == 7.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "neither JSON nor YAML"),
        ("[1]", "must be an object with 'resources'"),
        (json.dumps({"resources": []}), "must have the endpoints of cluster 'web' alone, has those of none"),
        (json.dumps({"resources": [{"cluster_name": "api"}]}), "alone, has those of 'api'"),
        (json.dumps({"resources": [{"cluster_name": "web"}]}), "cluster 'web' has no endpoints"),
        (json.dumps({"resources": [{"cluster_name": "web", "endpoints": 1}]}), "endpoints must be a list"),
        (json.dumps(document(entry("a", 1), priority=1)), "there are endpoints of priority 1"),
        (json.dumps(document(entry("a", 1), entry("a", 2))), "there are two endpoints of the name 'a'"),
        (json.dumps(document(entry("a", 1), entry("b", 1))), "'a' and 'b' have the same address"),
        (json.dumps(document(entry("a" * 64, 1))), "name must be at most 63 bytes"),
        (json.dumps(document({"endpoint": {"hostname": "a"}})), "endpoint 1: must be an object, got None"),
        (json.dumps(document({"endpoint": {"address": {}}})), "its address must be a socket_address"),
        (json.dumps(document(entry("a", 1, load_balancing_weight="x"))), "load_balancing_weight must be a number"),
        (json.dumps(document(3)), "endpoint 1: must be an object, got 3"),  # type: ignore[arg-type]
    ],
)
def test_files_that_are_no_good(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "web.json").write_text(text)
    with pytest.raises(DriverError, match=message) as refused:
        read_assignment(tmp_path / "web.json", "web")
    assert "\n" not in str(refused.value)


def test_files_of_servers_that_are_no_good(tmp_path: Path) -> None:
    with pytest.raises(DriverError, match=r"cannot read .*none.json: No such file"):
        read_assignment(tmp_path / "none.json", "web")
    (tmp_path / "a.toml").write_text('[[servers]]\nname = "a"\naddress = "example.org"\nport = 1\n')
    with pytest.raises(DriverError, match="server 'a' needs an IP address, since EDS takes no host names"):
        read_assignment(tmp_path / "a.toml", "web")
    (tmp_path / "a.toml").write_text('[[server]]\nname = "a"\n')
    with pytest.raises(DriverError, match="unknown key 'server'"):
        read_assignment(tmp_path / "a.toml", "web")


def test_log_files_are_followed(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    path.write_text("lbgym1 web 10.0.0.1:1 1 -\n")
    log = LogFile(str(path)).share("web")
    with closing(log):
        # What was there before is not of this driver's time.
        with path.open("a", errors="surrogateescape") as stream:
            stream.write("something else\nlbgym1 web 10.0.0.1:1 20 -\nlbgym1 web 10.0.0.1:2 30 DC\nlbgym1 api x 1 -\n")
            stream.write("x lbgym1 web 10.0.0.1:2 3 UF,URX\nlbgym1 web - 0 UH\nlbgym1 web 10.0.0.1:1 4")
            stream.flush()
            eventually(lambda: log.received == 5)
            # What Envoy does not write.
            stream.write(f"\nlbgym1 api \udcff 5 -\nlbgym1 web 10.0.0.1:1 {'9' * 400} -\nlbgym1 web 10.0.0.1:1 4")
            stream.flush()
            stream.write("0 -\n")
        eventually(lambda: log.received == 7)
        flows = log.take("web")
        assert list(zip(flows.servers, flows.seconds, strict=True)) == [
            ("10.0.0.1:1", 0.02),
            ("10.0.0.1:2", 0.03),
            ("10.0.0.1:1", 0.04),
        ]
        assert flows.ended == {"10.0.0.1:1": 2, "10.0.0.1:2": 2} and flows.failed == {"10.0.0.1:2": 1}
        path.rename(tmp_path / "access.log.1")
        path.write_text("lbgym1 web 10.0.0.1:1 1 -\n")
        eventually(lambda: log.received == 8)
        path.write_text("")
        eventually(lambda: log._stream is not None and log._stream.tell() == 0)
        path.write_text("lbgym1 web a 1 -\n")
        eventually(lambda: log.received == 9)


class Worker:
    """A thread of Envoy that forwards flows, asked between any two of its steps as if it were Envoy's admin interface.

    Attributes:
        begun, ended: flows.
    """

    def __init__(self, draw: Callable[[Sequence[str]], str]) -> None:
        self._draw = draw
        self.begun = self.ended = 0
        self._counted = {"rq_total": 0, "rq_active": 0, "rq_pending_active": 0}
        #: A flow has got its connection, and is still among those that wait for one.
        self._twice = False
        self.now = self._twice_since = 0.0

    def step(self) -> None:
        counted = self._counted
        if self._twice:
            counted["rq_pending_active"] -= 1
            self._twice = False
            return
        possible = ["begin"]
        possible += ["connect"] * (counted["rq_pending_active"] > 0) + ["end"] * (counted["rq_active"] > 0)
        match self._draw(possible):
            case "begin":
                self.begun += 1
                counted["rq_pending_active"] += 1
            case "connect":
                counted["rq_total"] += 1
                counted["rq_active"] += 1
                self._twice, self._twice_since = True, self.now
            case "end":
                self.ended += 1
                counted["rq_active"] -= 1

    def go_on(self) -> None:
        while self._draw(["rest", "step"]) == "step":
            self.step()

    def rest(self) -> None:
        """Do nothing unless told to."""
        self._draw = lambda possible: "rest" if "rest" in possible else possible[-1]

    def finish(self) -> None:
        """Have all flows ended."""
        while self._twice or self._counted["rq_pending_active"] or self._counted["rq_active"]:
            self.step()

    def get(self, path: str) -> Any:
        if self._twice and self.now - self._twice_since >= 0.1:
            # This takes it microseconds, and milliseconds where other threads are given their turn.
            self.step()
        values = []
        for name in self._counted:
            self.go_on()
            values.append({"name": name, "value": str(self._counted[name])})
        address = entry("s1", 80)["endpoint"]["address"]
        return {"cluster_statuses": [{"name": "web", "host_statuses": [{"address": address, "stats": values}]}]}

    def statistics(self, pattern: str) -> dict[str, int]:
        return {}

    def close(self) -> None:
        pass


@given(st.data())
def test_every_flow_is_counted_once(data: st.DataObject) -> None:
    worker = Worker(lambda possible: data.draw(st.sampled_from(possible)))
    process = EnvoyProcess(worker, "/nowhere", {"web"}, clock=lambda: worker.now)
    process.identity = 1
    seen, counters = ProcessFlows[Host](), FlowCounters()

    def look() -> tuple[int, int, int]:
        process.look()
        ((_, host),) = process.clusters["web"].items()
        counters.count(0, *seen.more(host))
        counters.update(np.array([host.open]))
        started, completed, failed = (int(value[0]) for value in counters.values(1))
        assert not failed and started - completed == counters.open[0]
        return started, completed, host.open

    for _ in range(data.draw(st.integers(1, 6))):
        worker.go_on()
        started, completed, _ = look()
        assert started <= worker.begun and completed <= worker.ended
        worker.now += data.draw(st.sampled_from([0.001, 0.05, 0.25]))
    worker.rest()
    look()
    worker.now += 0.25
    # Flows that wait are open, too.
    assert look() == (worker.begun, worker.ended, worker.begun - worker.ended)
    worker.finish()
    assert look() == (worker.begun, worker.begun, 0)


class Impostor(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    answer = b""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.answer)))
        self.end_headers()
        self.wfile.write(self.answer)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def impostor() -> Iterator[tuple[type[Impostor], tuple[str, int]]]:
    """An HTTP server that answers everything by the same."""

    class Mine(Impostor):
        pass

    with HTTPServer(("127.0.0.1", 0), Mine) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield Mine, ("127.0.0.1", server.server_port)
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"<html>", "this is no admin interface of Envoy at .*: it answers /server_info by 200 and b'<html>'"),
        (b"{}", "this is no Envoy at"),
        (
            b'{"version": "abc/1.18.3/Clean", "command_line_options": {}}',
            r"Envoy 1\.18\.3 is too old: 1\.30 or newer is needed",
        ),
    ],
)
def test_what_is_no_envoy_of_today_is_refused(
    impostor: tuple[type[Impostor], tuple[str, int]], answer: bytes, message: str
) -> None:
    handler, place = impostor
    handler.answer = answer
    with pytest.raises(DriverError, match=message):
        Envoy(place)


FILES = {"web": "/x.json"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clusters": {}, "files": {}}, "give a cluster and the name of its region"),
        ({"clusters": {"a": "web", "b": "web"}, "files": FILES}, "each cluster has one region"),
        ({"clusters": {"a": "web"}, "files": {}}, "give each cluster a file of its own"),
        ({"clusters": {"a": "web", "b": "api"}, "files": {"web": "/x", "api": "/x"}}, "give each cluster a file"),
        ({"clusters": {"a": "web"}, "files": FILES}, "give admin, Envoy's admin interface"),
        ({"clusters": {"a": "web"}, "files": FILES, "admin": ("9901",)}, "admin must be the path of a Unix socket"),
        ({"clusters": {"a": "web"}, "files": FILES, "admin": ("/a", "/a")}, "give each admin interface once"),
        ({"clusters": {"a": "web"}, "files": FILES, "admin": ("http://h:1/", "h:1")}, "give each admin interface once"),
        ({"clusters": {"a": "web"}, "files": FILES, "xds": "/a:1"}, "xds_port must be a TCP port"),
        (
            {"clusters": {"a": "web"}, "files": FILES, "xds": "1", "access_log": "x"},
            "access_log, unless it is a path .* must be a TCP port",
        ),
        ({"clusters": {"a": "web"}, "files": FILES, "xds": "1", "capacity": 0}, "capacity must be"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOptionError, match=message):
        EnvoyOptions(**options)
