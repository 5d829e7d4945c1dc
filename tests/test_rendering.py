"""What the terminal table and the dashboard show."""

from __future__ import annotations

import dataclasses
import io
import re
import sys
from typing import Any

import numpy as np
import pytest

from lbgym.env.rendering import HISTORY, Frame, Viewer, render_ansi, render_rgb, show
from lbgym.errors import MissingExtraError, UnknownNameError
from lbgym.formatting import seconds, short
from lbgym.scenarios import Scenario, Server, Workload
from lbgym.snapshot import IntervalStatistics, Snapshot


def make_snapshot(n: int = 4, step: int = 1, *, truth: bool = True, service: bool = True, down: Any = ()) -> Snapshot:
    rng = np.random.default_rng(step)
    active = np.ones(n, bool)
    active[list(down)] = False
    stats = np.zeros((n, 11), np.float32)
    stats[:, 0] = rng.integers(1, 20, n) * active
    stats[:, 4] = rng.random(n) * active
    started = np.arange(1, n + 1) * 10 * step
    zeros = np.zeros(n, np.int64)
    return Snapshot(
        sequence_id=step,
        timestamp=0.25 * step,
        active=active,
        stats=stats,
        ground_truth=np.stack([rng.random(n), rng.random(n), rng.integers(0, 9, n)], -1).astype(np.float32)
        if truth
        else None,
        started=started,
        completed=started,
        rejected=zeros + 1,
        failed=zeros,
        unrouted=2,
        interval=IntervalStatistics(np.array([30, 1, 0.125, 0.1, 0.5, 2.5, 1.0, 9.0])) if service else None,
    )


def make_scenario(n: int = 4) -> Scenario:
    return Scenario(
        name="testbed", servers=tuple(Server(cores=1 + j % 3) for j in range(n)), workload=Workload(load=0.5)
    )


def make_frame(n: int = 4, **changes: Any) -> Frame:
    viewer = Viewer("ansi", make_scenario(n))
    frame = viewer.frame(make_snapshot(n), weights=np.linspace(1, 2, n), reward=0.5, step=1)
    return dataclasses.replace(frame, **changes)


def server_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if re.match(r" +\d+  ", line)]


def test_table_shows_every_server_and_the_totals() -> None:
    text = render_ansi(make_frame(4, open_flows=np.array([5.0, 10.0, 0.0, 20.0])))
    assert text.endswith("\n")
    assert "testbed  sed  step 1  t 0.25 s  reward +0.5000" in text
    assert "completed 100  rejected 6" in text
    assert "mean 125 ms, p99 2.5 s" in text
    lines = server_lines(text)
    assert len(lines) == 4
    for line, weight, flows in zip(lines, ("1", "1.33", "1.67", "2"), ("5", "10", "0", "20"), strict=True):
        assert f" {weight} " in line and f" {flows} " in line + " "


def test_columns_are_aligned() -> None:
    n = 12
    frame = make_frame(
        n,
        weights=np.geomspace(1e-4, 1e7, n),
        open_flows=np.geomspace(1, 123_456_789, n).round(),
        fct=np.geomspace(1e-7, 1e5, n),
        duration=np.zeros(n),
        cpu=np.linspace(0, 1, n),
    )
    head, *lines = [line for line in render_ansi(frame).splitlines() if line][2:]
    assert len(lines) == n
    for title in ("open flows", "new flows", "CPU"):
        left = head.index(title)
        assert all(line[left - 2 : left] == "  " for line in lines), title
        assert all(line[left : left + 7].strip() for line in lines), title


@pytest.mark.parametrize("value", [0.0, 1e-9, 0.00123, 0.9999, 0.99951, 59.97, 999.96, 1e4, 1e12, 1e30])
def test_numbers_keep_to_their_columns(value: float) -> None:
    from lbgym.env.rendering import _short_signed

    assert len(seconds(value)) <= 9
    assert len(short(value)) <= 7
    assert len(_short_signed(-value)) <= 9


def test_bars_are_proportional() -> None:
    text = render_ansi(make_frame(3, weights=np.array([1.0, 2.0, 4.0]), cpu=None, open_flows=np.zeros(3)))
    blocks = [line[8:26].count("█") + ("▌" in line[8:26]) * 0.5 for line in server_lines(text)]
    assert blocks == [2.5, 5, 10]


def test_servers_out_of_service_say_so() -> None:
    frame = make_frame(4, active=np.array([True, False, True, True]), open_flows=np.array([1.0, 7.0, 2.0, 3.0]))
    lines = server_lines(render_ansi(frame))
    assert [j for j, line in enumerate(lines) if "out of service" in line] == [1]
    assert "7 open flows" in lines[1]


def test_colour_only_where_asked() -> None:
    frame = make_frame(4)
    assert "\x1b" not in render_ansi(frame)
    coloured = render_ansi(frame, color=True)
    assert "\x1b[" in coloured
    plain = re.sub(r" *\n", "\n", re.sub(r"\x1b\[\d+m", "", coloured))
    assert plain == render_ansi(frame)


def test_ascii_bars() -> None:
    text = render_ansi(make_frame(4), unicode=False)
    assert text.isascii() and "#" in text


def test_large_clusters_are_summarised() -> None:
    active = np.ones(100, bool)
    active[90] = False
    text = render_ansi(make_frame(100, active=active), max_rows=10)
    assert len(server_lines(text)) == 10
    assert "90 more servers" in text and "1 out of service" in text


def test_before_the_first_step() -> None:
    frame = make_frame(2, reward=None, fct_mean=None, fct_p99=None, new_flows=np.zeros(2, int), cpu=None)
    assert "reward -" in render_ansi(frame)
    assert render_rgb(frame).shape == (540, 960, 3)


def test_new_flows_are_those_since_the_frame_before() -> None:
    viewer = Viewer("ansi", make_scenario())
    viewer.render(make_snapshot(step=1), weights=np.ones(4), reward=None, step=1)
    second = make_snapshot(step=1)
    second.started = second.started + np.array([0, 1, 2, 5])
    frame = viewer.frame(second, weights=np.ones(4), reward=0.0, step=2)
    np.testing.assert_array_equal(frame.new_flows, [0, 1, 2, 5])
    np.testing.assert_allclose(frame.new_flow_share, [0, 0.125, 0.25, 0.625])
    # The same step drawn again shows the same, and a reset starts over.
    first = viewer.render(second, weights=np.ones(4), reward=0.0, step=2)
    assert viewer.render(second, weights=np.ones(4), reward=0.0, step=2) == first
    viewer.reset()
    np.testing.assert_array_equal(
        viewer.frame(second, weights=np.ones(4), reward=0.0, step=0).new_flows, second.started
    )


def test_frames_do_not_share_the_snapshots_arrays() -> None:
    snapshot, weights = make_snapshot(), np.ones(4)
    frame = Viewer("ansi", make_scenario()).frame(snapshot, weights=weights, reward=0.0, step=1)
    before = render_ansi(frame)
    snapshot.stats[:] = 99
    snapshot.started += 50
    assert snapshot.ground_truth is not None
    snapshot.ground_truth[:] = 0
    weights[:] = 7
    assert render_ansi(frame) == before


@pytest.mark.parametrize(
    ("n", "size"),
    [
        *((n, (960, 540)) for n in (1, 8, 17, 18, 1000)),
        *((n, size) for n in (4, 64) for size in ((320, 180), (641, 777), (1920, 400))),
    ],
)
def test_dashboard_of_any_cluster_and_size(n: int, size: tuple[int, int]) -> None:
    viewer = Viewer("rgb_array", make_scenario(n), size=size)
    for step in range(3):
        image = viewer.render(
            make_snapshot(n, step, down=[n // 2] if step == 2 else []),
            weights=np.ones(n),
            reward=None if step == 0 else 0.1 * step,
            step=step,
        )
    assert isinstance(image, np.ndarray)
    assert image.dtype == np.uint8 and image.shape == (size[1], size[0], 3)
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 50


def test_dashboard_shows_the_weights() -> None:
    # Blue pixels are weight bars and nothing else once there is no FCT curve.
    def blue(weights: list[float]) -> int:
        frame = make_frame(4, weights=np.array(weights), fct_mean=None, fct_p99=None)
        image = render_rgb(frame).astype(int)
        return int(((image - [0x58, 0xA6, 0xFF] == 0).all(axis=-1)).sum())

    even, uneven = blue([1, 1, 1, 1]), blue([2, 1, 1, 1])
    assert uneven == pytest.approx(even * 5 / 8, rel=0.05)


def test_dashboard_marks_servers_out_of_service() -> None:
    up = render_rgb(make_frame(4))
    down = render_rgb(make_frame(4, active=np.array([True, True, False, True])))
    changed = (up != down).any(axis=(1, 2))
    rows = np.flatnonzero(changed)
    assert len(rows) and rows.max() - rows.min() < 60  # one row of the panel only


def test_history_draws_curves_and_is_bounded() -> None:
    frames = [make_frame(4, step=k, reward=float(np.sin(k)), fct_mean=0.1, fct_p99=0.2) for k in range(HISTORY + 50)]
    last = frames[-1]
    alone = render_rgb(last)
    curves = render_rgb(last, history=frames)
    assert (alone[392:] != curves[392:]).any()
    np.testing.assert_array_equal(curves, render_rgb(last, history=frames[-HISTORY:]))
    viewer = Viewer("rgb_array", make_scenario())
    for k in range(HISTORY + 5):
        viewer._history.append(frames[k])
    assert len(viewer._history) == HISTORY


def test_extreme_numbers_can_be_drawn() -> None:
    for value in (0.0, 1e-30, 1e30):
        full = np.full(4, value)
        frame = make_frame(
            4, weights=full, open_flows=full, fct=full, duration=full, fct_mean=value, fct_p99=value, reward=-value
        )
        assert "testbed" in render_ansi(frame)
        render_rgb(frame, history=[frame, dataclasses.replace(frame, reward=value), frame])


def test_too_small_a_picture() -> None:
    with pytest.raises(ValueError, match="320 x 180 pixels, got 100 x 100"):
        render_rgb(make_frame(), 100, 100)


def test_unknown_mode() -> None:
    with pytest.raises(UnknownNameError, match="render mode 'rgb'"):
        Viewer("rgb")


def test_pillow_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtraError, match=r"rgb_array.*'PIL'.*lbgym\["):
        render_rgb(make_frame())
    assert render_ansi(make_frame())


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_human_draws_in_place_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = Terminal()
    viewer = Viewer("human", make_scenario(), stream=out)
    for step in (1, 2):
        assert viewer.render(make_snapshot(step=step), weights=np.ones(4), reward=0.0, step=step) is None
    text = out.getvalue()
    assert text.count("\x1b[H") == 2 and text.count("\x1b[J") == 2
    assert "\x1b[32m" in text or "\x1b[31m" in text or "\x1b[33m" in text
    monkeypatch.setenv("NO_COLOR", "1")
    plain = Terminal()
    show(make_frame(), plain)
    assert not re.search(r"\x1b\[\d+m", plain.getvalue())


def test_human_in_a_pipe_is_plain_and_in_its_encoding(capsys: pytest.CaptureFixture[str]) -> None:
    show(make_frame())
    assert "\x1b" not in capsys.readouterr().out
    raw = io.BytesIO()
    ascii_stream = io.TextIOWrapper(raw, encoding="ascii")
    show(make_frame(), ascii_stream)
    assert b"testbed" in raw.getvalue() and b"#" in raw.getvalue()


def test_data_planes_without_scenario_ground_truth_or_statistics() -> None:
    viewer = Viewer("ansi")
    text = viewer.render(make_snapshot(truth=False, service=False), weights=np.ones(4), reward=1.0, step=1)
    assert isinstance(text, str)
    assert "live data plane" in text and "CPU" not in text and "p99" not in text
    frame = viewer.frame(make_snapshot(truth=False, service=False), weights=np.ones(4), reward=1.0, step=1)
    assert render_rgb(frame).shape == (540, 960, 3)
