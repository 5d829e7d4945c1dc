"""Recordings of producers that are processes of their own: what was published is what is read back."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lbgym import LoadBalanceEnv
from lbgym.env.observations import ObservationLayout, relative_weights
from lbgym.env.rewards import make_reward
from lbgym.errors import (
    InvalidOptionError,
    InvalidRewardError,
    MissingExtraError,
    RecordingError,
    RegionNotFoundError,
    UnknownNameError,
)
from lbgym.features import FEATURE_NAMES, GROUND_TRUTH_NAMES
from lbgym.monitor import Follower
from lbgym.recording import (
    Recording,
    Summary,
    finish_recording,
    load_recording,
    record,
    recording_schema,
    to_minari,
)
from lbgym.sharedmemory import Publication, ServerState, SharedMemoryRegion
from lbgym.snapshot import Snapshot
from tests.producers import INTERVAL, Producer, Published
from tests.sharedmemory.conftest import shm_dir

pa = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402

__all__ = ["shm_dir"]

#: Segments of such a region have few rows, since they are as large as others.
LARGE = 16_384


def recorded(path: Path, script: Callable[[Summary], Iterator[None]], **options: Any) -> Summary:
    """Record region "lb0" while a script goes on by one step between every two looks of the recorder at the region."""
    summary = Summary(path)
    steps: list[Iterator[None]] = []

    def show(current: Summary) -> None:
        if not steps:
            steps.append(script(current))

    def stop() -> bool:
        return bool(steps) and next(steps[0], "over") == "over"

    summary = record("lb0", path, progress=show, stop=stop, **options)
    return summary


def until(summary: Summary, observations: int) -> Iterator[None]:
    """Let the recorder go on until it has so many."""
    deadline = time.monotonic() + 30
    while summary.observations < observations:
        assert time.monotonic() < deadline, f"{summary} does not come to {observations}"
        yield


def check_rows(recording: Recording, rows: list[Published]) -> None:
    """The recording has these observations, to the bit."""
    assert recording.sequence_id.tolist() == [row.sequence_id for row in rows]
    assert recording.instance.tolist() == [row.instance for row in rows]
    assert recording.num_servers.tolist() == [len(row.weights) for row in rows]
    for k, row in enumerate(rows):
        n, snapshot = len(row.weights), row.snapshot
        assert recording.timestamp[k] == snapshot.timestamp
        assert np.array_equal(recording.active[k, :n], snapshot.active)
        assert np.array_equal(recording.stats[k, :n], snapshot.stats)
        assert recording.ground_truth is not None
        assert np.array_equal(recording.ground_truth[k, :n], snapshot.ground_truth)
        for name in ("started", "completed", "rejected", "failed"):
            assert np.array_equal(getattr(recording, name)[k, :n], getattr(snapshot, name)), name
        assert recording.unrouted[k] == snapshot.unrouted
        assert np.array_equal(recording.weights[k, :n], row.weights)
        assert recording.safe[k] == row.safe
        assert recording.fct_count[k] == row.fct_count and recording.fct_sum[k] == round(row.fct_sum * 1e9)
        assert not recording.active[k, n:].any() and not recording.stats[k, n:].any()
        assert not recording.weights[k, n:].any() and not recording.started[k, n:].any()


@pytest.fixture
def driven(tmp_path: Path) -> tuple[Recording, list[Published], list[np.ndarray]]:
    """Twelve observations of a producer, an agent that acts on each, and the weights it chose there."""
    rows: list[Published] = []
    chosen = []
    generator = np.random.default_rng(0)
    with Producer("lb0") as producer, SharedMemoryRegion.attach("lb0") as agent:

        def script(summary: Summary) -> Iterator[None]:
            for k in range(12):
                rows.extend(producer.publish())
                yield from until(summary, k + 1)
                chosen.append(generator.choice([1.0, 1.5, 2.0], 8))
                agent.write_action(sequence_id=100 + k, weights=chosen[-1])

        recorded(tmp_path / "out.parquet", script)
    return load_recording(tmp_path / "out.parquet"), rows, chosen


def test_what_is_published_is_recorded(driven: tuple[Recording, list[Published], list[np.ndarray]]) -> None:
    recording, rows, chosen = driven
    check_rows(recording, rows)
    assert not recording.missed.any() and recording.episodes == (range(12),)
    # No action was in force at the first observation; then always the one that was chosen at the one before.
    assert recording.applied_sequence_id.tolist() == [-1, *range(100, 111)]
    assert recording.safe.tolist() == [True, *[False] * 11]
    assert np.array_equal(recording.weights[1:], chosen[:-1])
    assert (np.diff(recording.published_at) > 0).all() and recording.applied_at[0] == -1
    assert (recording.applied_at[1:] > recording.published_at[:-1]).all()
    assert (recording.applied_at[1:] < recording.published_at[1:]).all()
    assert (recording.safe_weights == 1.0).all()


def test_the_file_says_what_it_is(driven: object, tmp_path: Path) -> None:
    import json

    import lbgym

    assert [path.name for path in tmp_path.iterdir()] == ["out.parquet"]
    schema = parquet.read_schema(tmp_path / "out.parquet")
    assert schema.remove_metadata() == recording_schema().remove_metadata()
    assert all(field.metadata[b"description"] for field in schema)
    metadata = json.loads(schema.metadata[b"lbgym.recording"])
    (producer,) = metadata["producers"]
    assert metadata["lbgym"] == lbgym.__version__ and metadata["region"] == "lb0" and metadata["interval"] is None
    assert producer["driver"] == "test" and producer["publish_interval"] == INTERVAL and producer["capacity"] == 64
    now = time.time()
    assert now - 600 < metadata["started_at"] <= now
    # Any reader of Parquet has the features by name, a list per row.
    table = parquet.read_table(tmp_path / "out.parquet", columns=["fct_mean", "cpu_usage", "started"])
    assert [len(row) for row in table["fct_mean"].to_pylist()] == [8] * 12


def test_transitions_are_what_the_environment_would_have_given(
    driven: tuple[Recording, list[Published], list[np.ndarray]],
) -> None:
    recording, rows, chosen = driven
    mapping = {"jain": 1.0, "var:n_flow_on": 0.01}
    for reward_type in ("product", mapping, lambda snapshot: float(snapshot.stats[:, 1].max())):
        reward = make_reward(reward_type)
        steps = recording.transitions(reward_type=reward_type)
        assert steps.rewards.tolist() == [float(reward(row.snapshot)) for row in rows[1:]]
    for form in ("matrix", "flat", "dict"):
        for normalize in (False, True):
            layout = ObservationLayout(8, form, normalize=normalize, use_ground_truth=True)
            steps = recording.transitions(observation=form, normalize=normalize, use_ground_truth=True)
            for k in range(11):
                for found, row in ((steps.observations, rows[k]), (steps.next_observations, rows[k + 1])):
                    snapshot = row.snapshot
                    expected = layout.encode(snapshot.stats, snapshot.ground_truth, snapshot.active)
                    if form == "dict":
                        assert all(np.array_equal(found[key][k], expected[key]) for key in expected)
                        assert layout.space.contains({key: found[key][k] for key in expected})
                    else:
                        assert np.array_equal(found[k], expected) and layout.space.contains(found[k])
    assert steps.rows.tolist() == list(range(11)) and steps.next_rows.tolist() == list(range(1, 12))
    assert not steps.terminated.any() and steps.truncated.tolist() == [False] * 10 + [True]
    assert len(steps) == 11 and np.array_equal(steps.weights, chosen[:-1])


@pytest.mark.parametrize("action_type", ["continuous", "normalized", "discrete"])
def test_actions_are_in_the_environments_space(
    action_type: str, driven: tuple[Recording, list[Published], list[np.ndarray]]
) -> None:
    recording, _, chosen = driven
    steps = recording.transitions(action_type=action_type)
    env = LoadBalanceEnv(num_servers=8, action_type=action_type)
    assert steps.codec.space == env.action_space
    for action, weights in zip(steps.actions, chosen[:-1], strict=True):
        assert env.action_space.contains(action)
        assert env.action_codec.to_weights(action) == pytest.approx(weights, rel=1e-6)
    env.close()


def test_the_ring_makes_up_for_a_late_recorder(tmp_path: Path) -> None:
    rows: list[Published] = []
    with Producer("lb0") as producer:

        def script(summary: Summary) -> Iterator[None]:
            for size in (1, 3, 2, 4, 7, 3, 5):
                rows.append(producer.publish(size))  # type: ignore[arg-type]
                yield from until(summary, summary.observations + min(size, 4))

        summary = recorded(tmp_path / "out.parquet", script)
    assert (summary.observations, summary.missed) == (21, 4)
    recording = load_recording(tmp_path / "out.parquet")
    check_rows(recording, [row for batch in rows for row in batch[-4:]])  # type: ignore[index]
    # Three of the seven and one of the five were overwritten before the recorder looked.
    assert np.flatnonzero(recording.missed).tolist() == [10, 17] and recording.missed[[10, 17]].tolist() == [3, 1]
    assert recording.episodes == (range(10), range(10, 17), range(17, 21))
    steps = recording.transitions()
    assert steps.episodes.tolist() == [0] * 9 + [1] * 6 + [2] * 3
    assert np.flatnonzero(steps.truncated).tolist() == [8, 14, 17]
    assert steps.rows.tolist() == [*range(9), *range(10, 16), *range(17, 20)]


def test_restarts_are_followed_and_split_episodes(tmp_path: Path) -> None:
    rows: list[Published] = []
    kept: list[Producer] = []

    def script(summary: Summary) -> Iterator[None]:
        def publish(count: int, **options: Any) -> Iterator[None]:
            for k in range(count):
                rows.extend(kept[-1].publish(**(options if k == 0 else {})))
                yield from until(summary, len(rows))

        yield from publish(4)
        kept[-1].kill()
        yield
        yield
        kept.append(Producer("lb0", servers=6, capacity=100, seed=2))
        yield from publish(3)
        yield from publish(3, servers=7)  # a server joins
        yield from publish(3, jump=-1.0)  # the clock goes back, then ahead
        yield from publish(3, jump=7200.0)
        kept[-1].end()
        yield
        kept.append(Producer("lb0", seed=3))
        kept[-1].publish(6)  # of which the ring keeps four
        rows.extend(kept[-1].publish(2))
        yield from until(summary, len(rows) + 2)
        yield from publish(0)

    with Producer("lb0") as first:
        kept.append(first)
        try:
            summary = recorded(tmp_path / "out.parquet", script)
        finally:
            for producer in kept:
                producer.kill()
    recording = load_recording(tmp_path / "out.parquet")
    assert (summary.observations, summary.restarts, summary.missed) == (20, 2, 4)
    check_rows(Recording(**{key: _without(value, [16, 17]) for key, value in vars(recording).items()}), rows)
    assert recording.episodes == (range(4), range(4, 7), range(7, 10), range(10, 13), range(13, 16), range(16, 20))
    assert recording.missed.tolist() == [0] * 16 + [4, 0, 0, 0]
    assert [p["capacity"] for p in recording.metadata["producers"]] == [64, 100, 64]
    # All are of one size: servers that were not there are inactive, and their weights do not count.
    steps = recording.transitions(observation="dict")
    assert steps.observations["mask"].shape == (14, 8) and steps.observations["mask"][3].tolist() == [1] * 6 + [0] * 2
    assert steps.actions[3].tolist() == [1.0] * 8


def test_names_and_states_that_change(tmp_path: Path) -> None:
    with SharedMemoryRegion.create("lb0", num_servers=3, features=["n_flow_on", "cpu_usage"]) as region:
        with Producer("lb1", servers=3) as producer:
            (published,) = producer.publish()
        shown = Publication.of(published.snapshot, fct_count=1, fct_sum=0.5)

        def script(summary: Summary) -> Iterator[None]:
            region.publish(shown)
            yield from until(summary, 1)
            region.set_server(0, name="web-ä", state=ServerState.UP)
            region.set_server(2, name="web-c", state=ServerState.DRAINING)
            region.publish(replace(shown, ground_truth_age=np.array([0.5, np.nan, 0.0])))
            yield from until(summary, 2)
            region.set_server(2, name="web-d", state=ServerState.DOWN)
            region.publish(replace(shown, ground_truth=None, ground_truth_age=None))
            yield from until(summary, 3)
            # A server leaves, and its index with its name; another one takes it.
            region.publish(Publication.of(_of_two(published.snapshot)))
            yield from until(summary, 4)

        recorded(tmp_path / "out.parquet", script)
    recording = load_recording(tmp_path / "out.parquet")
    assert [recording.server_names(row) for row in range(4)] == [
        ("", "", ""),
        ("web-ä", "", "web-c"),
        ("web-ä", "", "web-d"),
        ("web-ä", "", ""),
    ]
    assert recording.server_names() == ("web-ä", "", "")
    assert recording.states.tolist() == [[0, 0, 0], [1, 0, 2], [1, 0, 3], [1, 0, 0]]
    ages = recording.ground_truth_age
    assert np.isnan(ages[[2, 3]][:, 1:]).all() and ages[1, 0] == 0.5 and ages[1, 2] == 0.0 and np.isnan(ages[1, 1])
    assert recording.real_features == {"n_flow_on", "cpu_usage"}
    assert recording.metadata["format"] == 2


@pytest.mark.parametrize("published", [False, True])
def test_ground_truth_is_real_once_there_is_some(published: bool, tmp_path: Path) -> None:
    """A driver declares what it could publish, before it has asked any server."""
    with SharedMemoryRegion.create("lb0", num_servers=3) as region:
        with Producer("lb1", servers=3) as producer:
            (row,) = producer.publish()
        without = replace(Publication.of(row.snapshot), ground_truth=None, ground_truth_age=None)

        def script(summary: Summary) -> Iterator[None]:
            for count, shown in enumerate((without, Publication.of(row.snapshot) if published else without), 1):
                region.publish(shown)
                yield from until(summary, count)

        recorded(tmp_path / "out.parquet", script)
    real = load_recording(tmp_path / "out.parquet").real_features
    assert real == {*FEATURE_NAMES, *(GROUND_TRUTH_NAMES if published else ())}


def _of_two(snapshot: Snapshot) -> Snapshot:
    names = ("active", "stats", "started", "completed", "rejected", "failed")
    return replace(snapshot, ground_truth=None, **{name: getattr(snapshot, name)[:2] for name in names})


def test_a_recording_of_format_1_still_loads(
    driven: tuple[Recording, list[Published], list[np.ndarray]], tmp_path: Path
) -> None:
    import json

    recording, rows, _ = driven
    table = parquet.read_table(tmp_path / "out.parquet")
    metadata = json.loads(table.schema.metadata[b"lbgym.recording"]) | {"format": 1}
    for producer in metadata["producers"]:
        del producer["names"], producer["real_features"]
    old = table.drop_columns(["names_version", "states", "ground_truth_age"])
    old = old.replace_schema_metadata({b"lbgym.recording": json.dumps(metadata).encode()})
    # As a file, and as what a recorder left that was killed.
    folder = tmp_path / "killed.parquet.part"
    folder.mkdir()
    parquet.write_table(old.slice(0, 5), folder / "000000.parquet")
    parquet.write_table(old.slice(5), folder / "000001.parquet")
    parquet.write_table(old, tmp_path / "old.parquet")
    loads = [load_recording(tmp_path / "old.parquet"), load_recording(folder)]
    for loaded in [*loads, load_recording(finish_recording(tmp_path / "killed.parquet"))]:
        check_rows(loaded, rows)
        assert loaded.server_names() == ("",) * 8 and not loaded.states.any()
        assert np.isnan(loaded.ground_truth_age).all() and loaded.real_features == recording.real_features


def test_a_region_of_version_1_0_is_recorded_unnamed(tmp_path: Path, shm_dir: Path) -> None:
    image = (Path(__file__).parent / "sharedmemory" / "region_1_0.bin").read_bytes()
    (shm_dir / "lb0").write_bytes(image)
    # Its producer is gone; the last of its observations is made to come once more.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Follower, "skip", lambda self: None)
        assert record("lb0", tmp_path / "out.parquet", steps=2).observations == 2
    recording = load_recording(tmp_path / "out.parquet")
    assert recording.timestamp.tolist() == recording.sequence_id.tolist() and (recording.sequence_id >= 3).all()
    assert recording.stats[-1, 2, 1] == 201.0 + recording.sequence_id[-1]
    assert recording.server_names() == ("", "", "") and not recording.states.any()
    assert recording.metadata["producers"][0]["version"] == [1, 0] and len(recording.real_features) == 14


def _without(value: Any, rows: list[int]) -> Any:
    return np.delete(value, rows, axis=0) if isinstance(value, np.ndarray) else value


def test_one_observation_per_interval(tmp_path: Path) -> None:
    rows: list[Published] = []
    with Producer("lb0") as producer:

        def script(summary: Summary) -> Iterator[None]:
            for k in range(22):
                rows.extend(producer.publish(jump=1.0 if k == 9 else 3600.0 if k == 17 else 0.0))
                yield

        recorded(tmp_path / "out.parquet", script, interval=0.5)
    recording = load_recording(tmp_path / "out.parquet")
    # Observations every 0.25 s: every other one, and the first after a deadline that nothing met; deadlines stay where
    # they were.
    expected = [0, 2, 4, 6, 8, 9, 10, 12, 14, 16, 17, 18, 20]
    check_rows(recording, [rows[k] for k in expected])
    assert recording.metadata["interval"] == 0.5
    # The clock of the simulation was not the one on the wall, and so nothing was missing by that one.
    assert not recording.missed.any()
    assert recording.episodes == (range(5), range(5, 10), range(10, 13))


def test_deadlines_that_nothing_met_are_missing(tmp_path: Path) -> None:
    # A clock so fast that by the one on the wall there was time for all of them.
    with Producer("lb0", clock_rate=1e6) as producer:

        def script(summary: Summary) -> Iterator[None]:
            for k in range(8):
                producer.publish(jump=2.0 if k == 4 else 0.0)
                yield

        summary = recorded(tmp_path / "out.parquet", script, interval=0.5)
    recording = load_recording(tmp_path / "out.parquet")
    # Deadlines at 1.25, 1.75, 2.25 and 2.75 s.
    assert recording.timestamp.tolist() == [0.25, 0.75, 3.25, 3.75]
    assert recording.missed.tolist() == [0, 0, 4, 0] and summary.missed == 4
    assert recording.episodes == (range(2), range(2, 4))


def test_steps_of_an_agent_that_acts_now_and_then(tmp_path: Path) -> None:
    rows: list[Published] = []
    with Producer("lb0") as producer, SharedMemoryRegion.attach("lb0") as agent:

        def script(summary: Summary) -> Iterator[None]:
            for k in range(24):
                rows.extend(producer.publish())
                yield from until(summary, k + 1)
                if k in (3, 7, 10, 13, 18, 21):
                    # That of 13 is over before the next observation.
                    lease = 1e-9 if k == 13 else 60.0
                    agent.write_action(sequence_id=k, weights=np.arange(1, 9) + k / 10, lease=lease)

        recorded(tmp_path / "out.parquet", script)
    recording = load_recording(tmp_path / "out.parquet")
    steps = recording.transitions(step="action")
    # From 10 to 13 the weights of 10; at 14 the safe ones, and so until 18: the steps from there are left out.
    assert steps.rows.tolist() == [3, 7, 18] and steps.next_rows.tolist() == [7, 10, 21]
    assert np.array_equal(steps.weights, [np.arange(1, 9) + k / 10 for k in (3, 7, 18)])
    assert steps.truncated.tolist() == [False, True, True] and steps.episodes.tolist() == [0, 0, 1]
    jain = make_reward("jain")
    assert steps.rewards.tolist() == [float(jain(rows[k].snapshot)) for k in (7, 10, 21)]
    assert np.array_equal(steps.observations[2], rows[18].snapshot.stats)
    assert len(recording.transitions()) == 23


def test_an_observation_that_no_data_plane_may_publish_is_left_out(tmp_path: Path, shm_dir: Path) -> None:
    with Producer("lb0") as producer, SharedMemoryRegion.attach("lb0") as region:
        layout = region.layout

        def script(summary: Summary) -> Iterator[None]:
            producer.publish()
            yield from until(summary, 1)
            (published,) = producer.publish()
            frame = layout.frames_offset + published.sequence_id % 4 * layout.frame_size
            with (shm_dir / "lb0").open("r+b") as file:
                file.seek(frame + layout.frame_sections["stats"])
                file.write(np.float32(np.nan).tobytes())
            while not summary.invalid:
                yield
            producer.publish()
            yield from until(summary, 2)

        summary = recorded(tmp_path / "out.parquet", script)
    assert (summary.observations, summary.missed, summary.invalid) == (2, 1, 1)
    assert load_recording(tmp_path / "out.parquet").sequence_id.tolist() == [1, 3]


def test_a_killed_recorder_leaves_what_it_wrote(tmp_path: Path) -> None:
    out, part = tmp_path / "out.parquet", tmp_path / "out.parquet.part"
    with Producer("lb0", capacity=LARGE) as producer:
        command = [sys.executable, "-m", "lbgym", "shm", "record", "lb0", str(out)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as recorder:
            deadline = time.monotonic() + 60
            rows: dict[int, Published] = {}
            while not part.is_dir() or len(list(part.glob("[0-9]*.parquet"))) < 3:
                assert time.monotonic() < deadline and recorder.poll() is None
                rows |= {row.sequence_id: row for row in producer.publish()}
                time.sleep(0.002)
            with pytest.raises(RecordingError, match="a recorder is using"):
                finish_recording(out)
            with pytest.raises(RecordingError, match=r"still runs or was killed.*finish_recording\("):
                record("lb0", out)
            recorder.kill()
            recorder.wait()
    assert not out.exists()
    (part / ".000009.parquet").write_bytes(b"PAR1 and no more")  # what it was writing
    left = load_recording(part)
    assert len(left) >= 20
    check_rows(left, [rows[number] for number in left.sequence_id.tolist()])
    assert left.missed[1:].tolist() == (np.diff(left.sequence_id) - 1).tolist()
    with pytest.raises(RecordingError, match=r"finish_recording\("):
        load_recording(out)
    assert finish_recording(out) == out and not part.exists()
    whole = load_recording(out)
    assert np.array_equal(whole.stats, left.stats) and whole.metadata == left.metadata
    with pytest.raises(RecordingError, match="there is no unfinished recording"):
        finish_recording(out)


def test_a_fault_leaves_what_was_recorded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Producer("lb0") as producer:

        def script(summary: Summary) -> Iterator[None]:
            producer.publish(3)
            yield from until(summary, 3)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            recorded(tmp_path / "out.parquet", script)
    assert "the recording so far is in" in caplog.text and "out.parquet.part" in caplog.text
    assert len(load_recording(tmp_path / "out.parquet.part")) == 3
    assert finish_recording(tmp_path / "out.parquet.part") == tmp_path / "out.parquet"
    assert len(load_recording(tmp_path / "out.parquet")) == 3


def test_many_segments_become_few_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lbgym.recording import recorder

    monkeypatch.setattr(recorder, "SEGMENT_ROWS", 5)
    sizes = []
    for limit in (1 << 20, 1):
        monkeypatch.setattr(recorder, "ROW_GROUP_BYTES", limit)
        rows: list[Published] = []
        with Producer("lb0") as producer:

            def script(summary: Summary, producer: Producer = producer, rows: list[Published] = rows) -> Iterator[None]:
                for _ in range(8):
                    rows.extend(producer.publish(3))
                    yield from until(summary, len(rows))

            recorded(tmp_path / "out.parquet", script, overwrite=True)
        sizes.append(parquet.ParquetFile(tmp_path / "out.parquet").num_row_groups)
        check_rows(load_recording(tmp_path / "out.parquet"), rows)
    assert sizes == [1, 5]


def test_a_file_is_not_replaced_unless_told_to(tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    out.write_text("precious")
    with Producer("lb0") as producer:
        with pytest.raises(RecordingError, match="exists already"):
            record("lb0", out)
        assert out.read_text() == "precious" and [path.name for path in tmp_path.iterdir()] == ["out.parquet"]
        (tmp_path / "out.parquet.part").mkdir()  # of a recorder that was killed early

        def script(summary: Summary) -> Iterator[None]:
            producer.publish()
            yield from until(summary, 1)

        recorded(out, script, overwrite=True)
        assert len(load_recording(out)) == 1 and [path.name for path in tmp_path.iterdir()] == ["out.parquet"]
        # Not even then what another recorder writes to.
        part = tmp_path / "out.parquet.part"
        part.mkdir()
        descriptor = os.open(part, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(RecordingError, match="still runs"):
            record("lb0", out, overwrite=True)
        os.close(descriptor)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"duration": 0}, InvalidOptionError, "duration must be a finite number above 0 seconds, got 0"),
        ({"duration": float("nan")}, InvalidOptionError, "duration must be"),
        ({"interval": -1}, InvalidOptionError, "interval must be a finite number above 0 seconds, got -1"),
        ({"interval": "fast"}, InvalidOptionError, "got 'fast'"),
        ({"steps": 0}, InvalidOptionError, "steps must be a whole number of at least 1, got 0"),
        ({"steps": 1.5}, InvalidOptionError, "steps must be a whole number"),
        ({}, RegionNotFoundError, "there is no region 'lb0'"),
    ],
    ids=str,
)
def test_options_are_checked(options: dict[str, Any], error: type, message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        record("lb0", tmp_path / "out.parquet", **options)
    assert not any(tmp_path.iterdir())


def test_it_lasts_as_long_as_asked(tmp_path: Path) -> None:
    with Producer("lb0") as producer:
        producer.publish()  # before the recording
        began = time.monotonic()
        summary = record("lb0", tmp_path / "out.parquet", duration=0.3)
        assert 0.3 <= summary.seconds <= time.monotonic() - began and summary.observations == 0
        recording = load_recording(tmp_path / "out.parquet")
        assert len(recording) == 0 and recording.episodes == () and recording.stats.shape == (0, 0, 11)
        with pytest.raises(RecordingError, match="no two consecutive rows"):
            recording.transitions()
        producer.run(0.01)
        summary = record("lb0", tmp_path / "more.parquet", steps=4)
        assert summary.observations == 4 == len(load_recording(tmp_path / "more.parquet"))


@pytest.mark.parametrize("layout", ["matrix", "flat", "dict"])
def test_transitions_show_the_weights_in_force(
    driven: tuple[Recording, list[Published], list[np.ndarray]], layout: str
) -> None:
    recording, _, _ = driven
    plain = recording.transitions(observation=layout)
    steps = recording.transitions(observation=layout, observe_weights=True)
    n = recording.active.shape[1]

    def rows_of(observations: Any) -> Any:
        if layout == "dict":
            return observations["features"]
        return observations[:, n:].reshape(len(observations), n, -1) if layout == "flat" else observations

    for seen, without, rows in (
        (steps.observations, plain.observations, steps.rows),
        (steps.next_observations, plain.next_observations, steps.next_rows),
    ):
        matrix = rows_of(seen)
        assert np.array_equal(matrix[..., :-1], rows_of(without))
        assert np.array_equal(matrix[..., -1], relative_weights(recording.weights[rows], recording.active[rows]))
    # The weights differ, so this is no column of zeros.
    assert np.ptp(rows_of(steps.next_observations)[..., -1]) > 0.1
    first = {key: part[0] for key, part in steps.observations.items()} if layout == "dict" else steps.observations[0]
    assert steps.layout.space.contains(first)


def test_what_is_no_recording_is_refused(driven: tuple[Recording, object, object], tmp_path: Path) -> None:
    out, bad = tmp_path / "out.parquet", tmp_path / "bad.parquet"
    table = parquet.read_table(out)

    def refused(path: Path = bad) -> str:
        with pytest.raises(RecordingError) as caught:
            load_recording(path)
        return str(caught.value)

    assert "there is no recording" in refused(tmp_path / "none.parquet")
    (tmp_path / "folder").mkdir()
    assert "there is no recording in" in refused(tmp_path / "folder")
    bad.write_bytes(out.read_bytes()[:-7])
    assert "cannot be read as Parquet" in refused()
    parquet.write_table(pa.table({"a": [1]}), bad)
    assert "is not a recording of lbgym" in refused()
    parquet.write_table(table.drop_columns(["weights"]), bad)
    assert "no column 'weights'" in refused()
    at = table.schema.get_field_index("fct_std")
    longer = pa.array([[0.0] * 9] * 12, table.schema.field(at).type)
    parquet.write_table(table.set_column(at, table.schema.field(at), longer), bad)
    assert "the lengths of column 'fct_std' differ from num_servers" in refused()


def test_rewards_and_names_that_there_are_not(driven: tuple[Recording, object, object]) -> None:
    recording = driven[0]
    with pytest.raises(InvalidRewardError, match="which a recording lacks"):
        recording.transitions(reward_type="p99_fct")
    with pytest.raises(UnknownNameError, match=r"unknown step 'actions'\. Did you mean 'action'"):
        recording.transitions(step="actions")
    for keys in ({"reward_field": "fct"}, {"observation": "map"}, {"action_type": "box"}, {"reward_type": "jane"}):
        with pytest.raises(UnknownNameError):
            recording.transitions(**keys)
    with pytest.raises(InvalidOptionError, match="joint"):
        recording.transitions(action_type="joint")
    assert repr(recording) == "<Recording of 'lb0', 12 observations of 8 servers>"
    assert recording.snapshots.stats.shape == (12, 8, len(FEATURE_NAMES))


def test_inactive_servers_are_zero_whatever_was_published(tmp_path: Path) -> None:
    from dataclasses import replace

    with Producer("lb1") as producer:
        snapshot = producer.publish()[0].snapshot
    active = np.array([True] * 7 + [False])
    with SharedMemoryRegion.create("lb0", num_servers=8) as region:

        def script(summary: Summary) -> Iterator[None]:
            for k in range(3):
                region.weights_in_force()
                stats = snapshot.stats + np.float32(1)
                region.publish(
                    Publication.of(replace(snapshot, active=active, stats=stats, ground_truth=None, timestamp=0.25 * k))
                )
                yield from until(summary, k + 1)

        recorded(tmp_path / "out.parquet", script)
    recording = load_recording(tmp_path / "out.parquet")
    assert not recording.stats[:, 7].any() and recording.stats[:, :7].all() and recording.ground_truth is None
    with pytest.raises(InvalidOptionError, match="use_ground_truth=True"):
        recording.transitions(use_ground_truth=True)
    with pytest.raises(InvalidRewardError, match="needs ground truth"):
        recording.transitions(reward_field="cpu_usage")


# Minari


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("minari")
    pytest.importorskip("h5py")
    pytest.importorskip("PIL")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "minari"


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"observation": "flat", "normalize": True, "action_type": "discrete", "reward_type": "max"},
        {"observation": "dict", "use_ground_truth": True, "action_type": "normalized", "reward_type": {"jain": 2.0}},
        {"step": "action", "action_type": "continuous", "min_weight": 0.5, "max_weight": 4.0},
    ],
    ids=lambda keys: "-".join(map(str, keys.values())) or "defaults",
)
def test_a_minari_dataset_reads_back_equal(
    keys: dict[str, Any], driven: tuple[Recording, list[Published], object], datasets: Path
) -> None:
    import minari

    recording, rows, _ = driven
    to_minari(recording, "balancers/lb0-v0", author="us", algorithm_name="random", **keys)
    dataset = minari.load_dataset("balancers/lb0-v0")
    steps = recording.transitions(**keys)
    assert (dataset.total_episodes, dataset.total_steps) == (1, len(steps))
    assert dataset.observation_space == steps.layout.space and dataset.action_space == steps.codec.space
    (episode,) = dataset.iterate_episodes()
    for now, following in ((steps.observations, steps.next_observations),):
        for key in now if isinstance(now, dict) else [None]:
            found = episode.observations if key is None else episode.observations[key]
            first, then = (now, following) if key is None else (now[key], following[key])
            assert found.dtype == first.dtype
            assert np.array_equal(found[:-1], first) and np.array_equal(found[1:], then)
    assert episode.actions.dtype == steps.actions.dtype and np.array_equal(episode.actions, steps.actions)
    assert np.array_equal(episode.rewards, steps.rewards) and np.array_equal(episode.truncations, steps.truncated)
    assert not episode.terminations.any()
    seen = [*steps.rows.tolist(), int(steps.next_rows[-1])]
    assert episode.infos["sequence_id"].tolist() == [rows[k].sequence_id for k in seen]
    assert episode.infos["applied_sequence_id"].tolist() == recording.applied_sequence_id[seen].tolist()
    assert np.array_equal(episode.infos["active"], recording.active[seen])
    assert dataset.storage.metadata["algorithm_name"] == "random"
    assert "region 'lb0', published by test" in dataset.storage.metadata["description"]
    env = dataset.recover_environment(eval_env=True)
    assert env.observation_space == dataset.observation_space and env.action_space == dataset.action_space
    env.close()
    # The registry of environments is as it was.
    import gymnasium

    assert not gymnasium.spec("lbgym/LoadBalance-v0").kwargs


def test_a_minari_dataset_of_several_episodes_from_a_file(tmp_path: Path, datasets: Path) -> None:
    import minari

    with Producer("lb0") as producer:

        def script(summary: Summary) -> Iterator[None]:
            for k in range(9):
                producer.publish(jump=60.0 if k in (3, 7) else 0.0)
                yield from until(summary, k + 1)

        recorded(tmp_path / "out.parquet", script)
    to_minari(tmp_path / "out.parquet", "lb0-v1", reward_type=lambda snapshot: -float(snapshot.stats[:, 0].sum()))
    dataset = minari.load_dataset("lb0-v1")
    recording = load_recording(tmp_path / "out.parquet")
    assert [len(episode) for episode in dataset.iterate_episodes()] == [2, 3, 1]
    rewards = np.concatenate([episode.rewards for episode in dataset.iterate_episodes()])
    assert rewards.tolist() == (-recording.stats[[1, 2, 4, 5, 6, 8], :, 0].sum(axis=1)).tolist()
    assert "lb0-v1" in minari.list_local_datasets()


def test_minari_datasets_that_cannot_be(driven: tuple[Recording, object, object], datasets: Path) -> None:
    recording = driven[0]
    for name in ("lb0", "lb0-v", "lb 0-v1", "", "../x-v1"):
        with pytest.raises(InvalidOptionError, match="a Minari dataset is named like"):
            to_minari(recording, name)
    to_minari(recording, "lb0-v0")
    with pytest.raises(RecordingError, match="the Minari dataset 'lb0-v0' exists"):
        to_minari(recording, "lb0-v0")
    # A failure leaves nothing that would block the next try.
    with pytest.raises(UnknownNameError):
        to_minari(recording, "lb1-v0", reward_type="jane")
    to_minari(recording, "lb1-v0")


@pytest.mark.parametrize("module", ["pyarrow", "minari", "h5py", "PIL"])
def test_what_to_install(module: str, driven: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("minari")
    monkeypatch.setitem(sys.modules, module, None)
    calls: list[Callable[[], Any]] = [lambda: to_minari(tmp_path / "out.parquet", "lb0-v0")]
    if module == "pyarrow":
        calls = [
            lambda: record("lb0", tmp_path / "more.parquet"),
            lambda: load_recording(tmp_path / "out.parquet"),
            lambda: finish_recording(tmp_path / "out.parquet"),
        ]
    for call in calls:
        with pytest.raises(MissingExtraError, match=rf"needs '{module}'.*lbgym\[offline\]"):
            call()


def test_no_room_is_said_in_one_sentence(tmp_path: Path) -> None:
    script = (
        "import resource, sys\nfrom lbgym.cli import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\nmain(sys.argv[1:])"
    )
    with Producer("lb0") as producer:
        producer.run(0.005)
        command = [sys.executable, "-c", script, "shm", "record", "lb0", str(tmp_path / "out.parquet"), "--steps", "40"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "cannot write to" in done.stderr and "File too large" in done.stderr
    assert not any(tmp_path.iterdir())
