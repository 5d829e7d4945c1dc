"""Weights by HAProxy's agent-checks, with and without its socket."""

from __future__ import annotations

import socket
from contextlib import closing

import numpy as np
import pytest

from lbgym.drivers import DriverError
from lbgym.drivers.haproxy import AgentCheck, AgentCheckedBackend, FlowLog, HaproxyOptions, open_backends
from lbgym.sharedmemory import ServerState
from tests.drivers.haproxy.balancer import Balancer
from tests.drivers.proxies import LONG, eventually, free_ports

WEB = {"web": ["s1", "s2", "s3"]}


def ask(agent: AgentCheck, question: bytes) -> str:
    with closing(socket.create_connection(agent.place, LONG)) as client:
        client.sendall(question)
        return client.makefile().read()


def test_answers() -> None:
    agent = AgentCheck(("127.0.0.1", 0)).share()
    try:
        agent.answer("web", {"s1": (75, 100), "s2": (3, 1), "s3": (0, 100), "s4": (5, 0)})
        agent.answer("api", {"s1": (100, 256)})
        assert [ask(agent, f"web/s{i}\n".encode()) for i in range(1, 6)] == ["75%\n", "300%\n", "0%\n", "0%\n", ""]
        # The least percentage of 256 that makes 100 of it or more.
        assert ask(agent, b"api/s1\n") == "40%\n"
        agent.drain("web", "s1")
        assert ask(agent, b"web/s1\n") == "drain\n"
        agent.undrain("web", "s1")
        assert ask(agent, b"web/s1\n") == "ready 75%\n" and ask(agent, b"web/s2\n") == "300%\n"
        agent.answer("web", {"s2": (1, 1)})
        assert ask(agent, b"web/s1\n") == "" and ask(agent, b"web/s2\n") == "100%\n"
        # Whatever else is asked gets no answer, and harms nobody.
        assert [ask(agent, question) for question in (b"\n", b"web\n", b"\xff/\xfe\n", b"x" * 5000 + b"\n")] == [""] * 4
        with pytest.raises(
            DriverError, match=f"cannot answer agent-checks at 127.0.0.1:{agent.place[1]}: Address already"
        ):
            AgentCheck(agent.place)
    finally:
        agent.close()


@pytest.mark.haproxy
def test_weights_by_agent_checks_survive_a_reload(balancer: Balancer) -> None:
    # Without level admin: the socket is only read.
    balancer.configure(WEB, agents=True, level="user", weights={"s2": 1, "s3": 50})
    balancer.start()
    options = HaproxyOptions(backends={"a": "web"}, socket=balancer.socket, agent_check=str(balancer.agent_port))
    (source,) = open_backends(options).values()
    with closing(source):
        source.read(0.1)
        source.apply(np.array([1.0, 2.0, 7.0]), 0.1)
        eventually(lambda: balancer.weights() == {"s1": 1, "s2": 2, "s3": 7})
        balancer.reload()
        source.read(0.2)
        eventually(lambda: balancer.weights() == {"s1": 1, "s2": 2, "s3": 7})
        source.drain("s3")
        eventually(lambda: (source.read(0.3), source.servers()[2].state)[1] is ServerState.DRAINING)
        eventually(lambda: {balancer.flow() for _ in range(5)} <= {"s1", "s2"})
        source.undrain("s3")
        eventually(lambda: "s3" in {balancer.flow() for _ in range(5)})
        # At the end the servers hear of the configured weights before the agent falls silent.
        source.apply(np.array([100.0, 1.0, 50.0]), 0.4)
    assert balancer.weights() == {"s1": 100, "s2": 1, "s3": 50}


@pytest.mark.haproxy
def test_no_socket_at_all(balancer: Balancer) -> None:
    balancer.configure(WEB, agents=True)
    balancer.start()
    options = HaproxyOptions(backends={"a": "web"}, log=balancer.log, agent_check=str(balancer.agent_port))
    (source,) = open_backends(options).values()
    with closing(source):
        assert "n_flow_on" not in source.features and "fct_mean" in source.features
        assert [row.name for row in source.servers()] == ["s1", "s2", "s3"]
        seen = source.read(0.1)
        assert seen.active.all()
        source.apply(np.array([0.0, 0.5, 1.5]), 0.2)
        eventually(lambda: balancer.weights()["s1"] == 0)
        eventually(lambda: abs(balancer.weights()["s3"] / balancer.weights()["s2"] - 3.0) < 0.1)
        balancer.reload()
        eventually(lambda: balancer.weights()["s1"] == 0)
        served = [balancer.flow(0.01) for _ in range(8)]
        eventually(lambda: source.read(0.3).started.sum() == 8)
        seen = source.read(0.4)
        assert seen.completed.tolist() == [served.count(name) for name in WEB["web"]] and seen.fct_count == 8
        assert seen.stats[2, 1] >= 0.01 and not seen.stats[:, 0].any()
        source.drain("s2")
        source.read(0.5)
        assert source.servers()[1].state is ServerState.DRAINING
        # Nobody asks any more: nobody balances.
        balancer.kill()
        eventually(lambda: not source.read(0.6).active.any())


def test_strangers_take_no_rows(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    agent, log = AgentCheck(("127.0.0.1", 0)), FlowLog(("127.0.0.1", free_ports(1)[0]))
    with closing(agent.share()), closing(log.share("web")):
        agent.asked("web")
        for _ in range(2):
            assert [ask(agent, f"web/s{i}\n".encode()) for i in (1, 2)] == ["", ""]
        with closing(AgentCheckedBackend("web", log=log, agent=agent, capacity=3)) as source:
            for name in ("x" * 64, "\x01", "", "s3", "s4", "s5"):
                ask(agent, f"web/{name}\n".encode())
            ask(agent, b"other/s1\n")
            for _ in range(3):
                source.read(0.1)
            assert [row.name for row in source.servers()] == ["s1", "s2", "s3"]
            source.apply(np.array([1.0, 2.0, 3.0]), 0.2)
            assert ask(agent, b"web/s3\n") == "3%\n" and ask(agent, b"web/s4\n") == ""
            assert set(agent.asked("other")) == set()
            assert caplog.text.count("no room for server 's4'") == 1
            assert caplog.text.count("that cannot be: name must be at most 63 bytes") == 1
            # Who has not asked for long makes room.
            monkeypatch.setattr("lbgym.drivers.haproxy.fleet._GONE", -1.0)
            monkeypatch.setattr("lbgym.drivers.haproxy.fleet._GONE_INTERVALS", 0.0)
            source.read(0.3)
            monkeypatch.undo()
            assert {row.name for row in source.servers()} == {""}
            ask(agent, b"web/s4\n")
            source.read(0.4)
            assert [row.name for row in source.servers()] == ["s4", "", ""]


@pytest.mark.haproxy
def test_servers_that_do_not_ask(balancer: Balancer) -> None:
    options = HaproxyOptions(backends={"a": "web"}, log=balancer.log, agent_check=str(balancer.agent_port))
    with pytest.raises(DriverError, match=r"no server of backend 'web' has asked the agent within 0.1 s"):
        open_backends(options, wait=0.1)
