"""``lbgym dashboard``: what it serves, to whom, and what a browser makes of it."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lbgym.errors import InvalidOptionError, RegionError
from lbgym.report import Dashboard
from lbgym.report.dashboard import MOST_CLIENTS, plain
from lbgym.sharedmemory import SharedMemoryRegion
from tests.producers import Producer
from tests.report.conftest import Open
from tests.test_cli import in_process

#: Seconds after which a picture that never comes is a failure.
PATIENCE = 60.0


def ask(page: Dashboard, method: str = "GET", path: str = "/", **headers: str) -> tuple[int, bytes, dict[str, str]]:
    host, port = page.url.removeprefix("http://").rstrip("/").rsplit(":", 1)
    with closing(http.client.HTTPConnection(host.strip("[]"), int(port), timeout=PATIENCE)) as connection:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read(), dict(answer.headers)


@contextmanager
def events(page: Dashboard) -> Iterator[Iterator[tuple[str, Any]]]:
    """The events of a browser that has just connected: their names and data."""
    host, port = page.url.removeprefix("http://").rstrip("/").rsplit(":", 1)
    with closing(http.client.HTTPConnection(host, int(port), timeout=PATIENCE)) as connection:
        connection.request("GET", "/events")
        answer = connection.getresponse()
        assert answer.status == 200 and answer.headers["Content-Type"] == "text/event-stream"

        def each() -> Iterator[tuple[str, Any]]:
            name = "message"
            while raw := answer.readline():
                line = raw.decode().rstrip("\n")
                if line.startswith("event: "):
                    name = line.removeprefix("event: ")
                elif line.startswith("data: "):
                    assert answer.readline() == b"\n"
                    yield name, json.loads(line.removeprefix("data: "))
                    name = "message"

        yield each()


def until(stream: Iterator[tuple[str, Any]], wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The first picture that is as wanted."""
    return next(data for name, data in stream if name == "message" and wanted(data))


def region_of(picture: dict[str, Any], name: str) -> dict[str, Any]:
    return next((region for region in picture["regions"] if region["name"] == name), {"observation": None})


def test_a_picture_has_what_the_data_plane_has_published(shm_dir: Path) -> None:
    with Producer("lb0") as producer, Dashboard(["lb0"], port=0, rate=20) as page, events(page) as stream:
        published = producer.publish(3)[-1]
        picture = until(stream, lambda data: (region_of(data, "lb0")["observation"] or {}).get("sequence_id") == 3)
        region = region_of(picture, "lb0")
        assert (region["producer"], region["agent"], region["driver"]) == ("alive", "none", "test")
        servers = region["observation"]["servers"]
        np.testing.assert_array_equal(servers["open"], published.snapshot.stats[:, 0])
        np.testing.assert_array_equal(servers["weights"], published.weights)
        np.testing.assert_array_equal(servers["completed"], published.snapshot.completed)
        assert servers["active"] == published.snapshot.active.tolist()


def test_a_browser_that_comes_later_gets_what_has_been(shm_dir: Path) -> None:
    with Producer("lb0") as producer, Dashboard(["lb0"], port=0, rate=20) as page:
        producer.run(0.05)
        with events(page) as stream:
            picture = until(stream, lambda data: "lb0" in data["totals"])
            opened = region_of(picture, "lb0")["observation"]["servers"]["open"]
            assert picture["totals"]["lb0"]["open"] == sum(opened)
        with events(page) as stream:
            name, past = next(stream)
            assert name == "past" and any("lb0" in entry["totals"] for entry in past)
            times = [entry["time"] for entry in past]
            assert times == sorted(times)


def test_it_waits_for_regions_and_follows_restarts(shm_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Dashboard(["lb0"], port=0, rate=20) as page, events(page) as stream:
        picture = until(stream, lambda data: "lb0" in data["absent"])
        assert not picture["regions"] and "there is no region 'lb0'" in picture["absent"]["lb0"]
        assert "waiting for region 'lb0'" in caplog.text
        with Producer("lb0") as first:
            first.publish(1)
            until(stream, lambda data: region_of(data, "lb0")["observation"] is not None)
            first.kill()
            until(stream, lambda data: region_of(data, "lb0")["producer"] == "dead")
        with Producer("lb0") as second:
            second.publish(1)
            picture = until(stream, lambda data: region_of(data, "lb0").get("restarts") == 1)
            assert region_of(picture, "lb0")["producer"] == "alive"
            with SharedMemoryRegion.attach("lb0") as agent:
                agent.write_action(1, np.ones(8), lease=5.0)
                picture = until(stream, lambda data: region_of(data, "lb0")["agent"] == "alive")
                assert region_of(picture, "lb0")["action"]["lease"] == 5.0


def test_without_names_it_shows_whatever_there_is(shm_dir: Path) -> None:
    with Producer("a"), Dashboard(port=0, rate=20) as page, events(page) as stream:
        until(stream, lambda data: [region["name"] for region in data["regions"]] == ["a"])
        with Producer("b") as b:
            until(stream, lambda data: {region["name"] for region in data["regions"]} == {"a", "b"})
            b.end()
        until(stream, lambda data: [region["name"] for region in data["regions"]] == ["a"])


def test_it_only_answers_reads_of_its_own_pages(shm_dir: Path) -> None:
    with Dashboard(["lb0"], port=0) as page:
        status, body, headers = ask(page)
        assert status == 200 and b"<title>lbgym dashboard</title>" in body
        assert headers["Content-Security-Policy"].startswith("default-src 'self'")
        assert ask(page, "HEAD")[:2] == (200, b"")
        assert [ask(page, path=path)[0] for path in ("/nothing", "/../pyproject.toml", "/dashboard.py")] == [404] * 3
        assert ask(page, "POST")[0] == 501
        # Another site's page whose name leads to 127.0.0.1.
        assert ask(page, Host="evil.example")[0] == 403
        assert ask(page, Host="localhost:1234")[0] == 200


def test_so_many_browsers_and_no_more(shm_dir: Path) -> None:
    with Dashboard(["lb0"], port=0, rate=20) as page:
        open_ones = [events(page) for _ in range(MOST_CLIENTS)]
        for one in open_ones:
            next(one.__enter__())
        assert ask(page, path="/events")[0] == 503
        assert ask(page)[0] == 200
        for one in open_ones:
            one.__exit__(None, None, None)


def test_json_has_no_nan() -> None:
    text = json.dumps(plain({"a": 1}) | {"b": plain(np.array([np.nan, np.inf, 1.23456789]))}, allow_nan=False)
    assert json.loads(text) == {"a": 1, "b": [None, None, 1.23457]}


def test_what_cannot_be_served_is_refused_in_a_sentence(capsys: pytest.CaptureFixture[str], shm_dir: Path) -> None:
    with Dashboard(["lb0"], port=0) as page:
        port = int(page.url.rstrip("/").rsplit(":", 1)[1])
        with pytest.raises(InvalidOptionError, match=rf"cannot listen on 127\.0\.0\.1 port {port}: Address already"):
            Dashboard(["lb0"], port=port)
    with pytest.raises(InvalidOptionError, match=r"port must be a whole number from 0 to 65,?535, got 70000"):
        Dashboard(port=70000)
    for host in ("ä..x", "a" * 80):
        with pytest.raises(InvalidOptionError, match=f"host must be an IP address or a host name, .* got '{host}'"):
            Dashboard(host=host, port=0)
    with pytest.raises(InvalidOptionError, match="rate must be"):
        Dashboard(port=0, rate=0.0)
    with pytest.raises(RegionError):
        Dashboard(["a/b"], port=0)
    code, out, err = in_process(capsys, "dashboard", "--shm", "a/b")
    assert (code, out) == (2, "") and err.startswith("lbgym: error: ") and len(err.splitlines()) == 1


def test_the_command_says_where_and_ends_on_sigterm(shm_dir: Path) -> None:
    command = [sys.executable, "-m", "lbgym", "dashboard", "--shm", "lb0", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("dashboard: http://127.0.0.1:")
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0


def test_a_browser_begins_with_what_is_alive(shm_dir: Path, open_page: Open) -> None:
    with Producer("a") as dead, Producer("b") as live, Dashboard(port=0, rate=20) as page:
        dead.publish(1)
        dead.kill()
        live.run(0.05)
        with open_page(page.url, 900) as shown:
            from playwright.sync_api import expect

            expect.set_options(timeout=1000 * PATIENCE)
            expect(shown.locator("h2:visible")).to_contain_text("b")
            expect(shown.get_by_role("button", name="a", exact=True)).to_have_class("dead")
            # Whoever wants to see the dead one does.
            shown.get_by_role("button", name="a", exact=True).click()
            expect(shown.locator(".producer:visible")).to_contain_text("dead")
            live.run(0.2)
            expect(shown.locator("h2:visible")).to_contain_text("a")


@pytest.mark.parametrize(("width", "dark"), [(1300, False), (400, True)])
def test_a_browser_shows_it(shm_dir: Path, open_page: Open, width: int, dark: bool) -> None:
    with Producer("lb0") as producer, Dashboard(["lb0", "lb1"], port=0, rate=20) as page:
        producer.publish(2)
        with open_page(page.url, width, dark=dark) as shown:
            shown.wait_for_selector("tbody tr")
            assert shown.locator("tbody tr").count() == 8
            from playwright.sync_api import expect

            expect.set_options(timeout=1000 * PATIENCE)
            names = shown.locator("tbody td.label")
            assert names.all_inner_texts() == [str(j) for j in range(8)]
            # Nothing but the table is wider than the window.
            assert shown.evaluate("document.documentElement.scrollWidth") <= width
            shown.get_by_role("button", name="open flows").click()
            shown.wait_for_selector("th[aria-sort=descending]")
            counts = [float(text) for text in shown.locator("tbody td.open").all_inner_texts()]
            assert counts == sorted(counts, reverse=True) and len(set(counts)) > 1
            shown.get_by_placeholder("Filter servers").fill("3")
            expect(shown.locator("tbody tr")).to_have_count(1)
            shown.get_by_placeholder("Filter servers").fill("")
            producer.publish(1)
            producer.kill()
            expect(shown.locator(".producer")).to_contain_text("dead")
            with Producer("lb0") as again:
                again.run(0.05)
                expect(shown.locator(".producer")).to_contain_text("alive")
                expect(shown.locator(".producer")).to_contain_text("restarted 1 ×")
            shown.get_by_role("button", name="lb1").click()
            expect(shown.get_by_text("there is no region 'lb1'")).to_be_visible()
            expect(shown.locator("table:visible")).to_have_count(0)
            shown.get_by_role("button", name="lb0").click()
