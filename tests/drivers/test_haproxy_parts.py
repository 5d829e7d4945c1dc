"""The parts of the HAProxy driver that need no HAProxy."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lbgym.drivers import DriverError
from lbgym.drivers.haproxy import FlowLog, Haproxy, HaproxyOptions
from lbgym.drivers.haproxy.weights import percentage
from lbgym.drivers.proxy import FlowCounters, whole_weights
from lbgym.drivers.proxy.places import pair_names
from lbgym.errors import InvalidOptionError
from tests.drivers.proxies import eventually, free_ports

FLOATS = st.one_of(st.just(0.0), st.floats(1e-6, 1e6))


@given(hnp.arrays(np.float64, st.integers(1, 20), elements=FLOATS), st.sampled_from([2, 50, 100, 256, 1_000_000]))
def test_whole_weights_are_off_by_a_bounded_part(weights: np.ndarray, top: int) -> None:
    whole = whole_weights(weights, top)
    assert whole.min() >= 0 and whole.max() <= top
    np.testing.assert_array_equal(whole > 0, weights > 0.0)
    if (weights == np.round(weights)).all() and weights.max() <= top:
        np.testing.assert_array_equal(whole, weights)
    elif weights.any():
        assert whole.max() > top // 2
        shares = weights / weights.max()
        exact = top * shares
        # One in `top`, or more, of the greatest: within half a unit of the finest scale.
        seen = exact >= 1.0
        error = np.abs(whole[seen] / whole.max() / shares[seen] - 1.0)
        assert (error <= 0.5 / exact[seen].min() + 1e-9).all()
        assert (whole[(weights > 0.0) & ~seen] == 1).all() or exact[seen].min() < 1.5


def test_ratios_of_small_numbers_are_exact() -> None:
    assert whole_weights(np.array([0.1, 0.3]), 256).tolist() == [85, 255]
    assert whole_weights(np.array([1.0, 1.5, 2.0]), 256).tolist() == [128, 192, 256]
    assert whole_weights(np.array([1e-9, 1.5]), 256).tolist() == [1, 256]


@given(st.integers(1, 256), st.integers(0, 256))
def test_percentages_bring_the_weight_about(configured: int, weight: int) -> None:
    # HAProxy 2.6, server_parse_weight_change_request.
    got = min(256, configured * percentage(weight, configured) // 100)
    assert got == weight if configured <= 100 else weight <= got <= min(256.0, weight + configured / 100)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 3)), max_size=20))
def test_counters_never_go_back_whatever_is_read(looks: list[tuple[int, int, int]]) -> None:
    counters = FlowCounters()
    last = np.zeros(3, np.int64)
    for ended, is_open, failed in looks:
        counters.count(1, ended, failed)
        counters.update(np.array([0, is_open]))
        started, completed, lost = counters.values(2)
        assert started[1] == completed[1] + lost[1] + is_open and not (started[0] or completed[0] or lost[0])
        now = np.array([started[1], completed[1], lost[1]])
        assert (now >= last).all()
        last = now


def test_lost_lines_are_counted() -> None:
    (port,) = free_ports(1)
    log = FlowLog(("127.0.0.1", port)).share("web")
    with closing(log), closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sender:

        def send(line: str) -> None:
            sender.sendto(line.encode(), ("127.0.0.1", port))

        for number in (5, 6, 9):
            send(f"lbgym1 77 front {number} web s1 10 --")
        # Another process, with the header of RFC 3164, and threads that overtake each other.
        for number in (1, 0, 2):
            send(f"<134>Nov 28 12:00:00 haproxy[78]: lbgym1 78 front {number} web s2 +1500 CD")
        send("lbgym1 78 front 3 web <NOSRV> -1 SC")
        send("lbgym1 78 front 4 web s1 7 sD")
        send("lbgym1 78 front 5 web s1 60000 cD")
        send("a line of another program")
        # Anybody may write here.
        sender.sendto(b"lbgym1 78 front 9 api \xff 5 --", ("127.0.0.1", port))
        send(f"lbgym1 79 front 1 web s1 {'9' * 400} --")
        send(f"lbgym1 79 front {'9' * 5000} web s1 1 --"[:2000])
        send("lbgym1 78 front 6 web s2 1 sD")
        eventually(lambda: log.received == 11)
        assert log.lost == 4
        flows = log.take("web")
        assert list(zip(flows.servers, flows.seconds, strict=True)) == [("s1", 0.01)] * 3 + [("s2", 1.5)] * 3
        assert flows.ended == {"s1": 5, "s2": 4} and flows.failed == {"s1": 1, "s2": 1}
        assert not log.take("web").servers


@pytest.fixture
def impostor(tmp_path: Path) -> Iterator[tuple[str, list[bytes]]]:
    """A socket that answers 'show info' by the second item."""
    path, answers = str(tmp_path / "admin.sock"), [b""]
    with closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(path)
        listener.listen()

        def serve() -> None:
            client, _ = listener.accept()
            with client:
                client.recv(100)
                client.sendall(b"\n> ")
                client.recv(100)
                client.sendall(answers[0] + b"\n\n> ")

        thread = threading.Thread(target=serve)
        thread.start()
        yield path, answers
        thread.join()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"Name: HAProxy\nVersion: 1.8.30\nPid: 5\nCurrConns: 0", "HAProxy 1.8.30 is too old: 2.4 or newer is needed"),
        (b"Name: HAProxy\nVersion: 2.4.1\nPid: 5\nCurrConns: 0\nNbproc: 2", "runs with 'nbproc'"),
        (b"220 smtp.example.org", "this is no HAProxy: it answers 'show info' by '220 smtp.example.org'"),
    ],
)
def test_what_is_no_haproxy_of_today_is_refused(impostor: tuple[str, list[bytes]], answer: bytes, message: str) -> None:
    path, answers = impostor
    answers[0] = answer
    with pytest.raises(DriverError, match=message):
        Haproxy(path)


def test_places_that_nobody_is_at(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place, message in (
        (str(tmp_path / "none"), "there is no socket .*none: does HAProxy run, with 'stats socket"),
        (str(tmp_path / "file"), "nobody answers at .*file: is it the 'stats socket' of a HAProxy that runs"),
        (("127.0.0.1", free_ports(1)[0]), "nobody answers at 127.0.0.1:"),
    ):
        with pytest.raises(DriverError, match=message):
            Haproxy(place)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backends": {}}, "give a backend"),
        ({"backends": {"a": "web", "b": "web"}, "socket": "/x"}, "each backend has one region"),
        ({"backends": {"a": "we b"}, "socket": "/x"}, "letters, digits and -_.: only, got 'we b'"),
        ({"backends": {"a": "web"}}, "give socket, .*; or both agent_check and log"),
        ({"backends": {"a": "web"}, "agent_check": "9777"}, "give socket, .*; or both agent_check and log"),
        ({"backends": {"a": "web"}, "socket": "admin"}, "socket must be the path of a Unix socket .*, got 'admin'"),
        ({"backends": {"a": "web"}, "socket": "/x", "log": "1514"}, "log must be the path .*, got '1514'"),
        ({"backends": {"a": "web"}, "socket": "web:" + 5000 * "9"}, "socket must be the path of a Unix socket"),
        ({"backends": {"a": "web"}, "socket": "/x", "agent_check": "0"}, "agent_check must be"),
        ({"backends": {"a": "web"}, "socket": "/x", "agent_check": "/a/b:1"}, "agent_check must be a TCP port"),
        ({"backends": {"a": "web"}, "socket": "/x", "configured_weight": 257}, "configured_weight must be"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidOptionError, match=message):
        HaproxyOptions(**options)  # type: ignore[arg-type]


def test_names_and_backends_go_in_pairs() -> None:
    assert pair_names(["a", "b"], ["web", "api"], "backend") == {"a": "web", "b": "api"}
    for names in (["a"], ["a", "a"], []):
        with pytest.raises(InvalidOptionError, match="give each backend a region of its own: there are 2 backends"):
            pair_names(names, ["web", "api"], "backend")
