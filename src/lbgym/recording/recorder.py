"""Record the observations of a data plane: :func:`record`, and the Parquet files it writes.

A recording in progress is a folder beside the file it will become, ``NAME.parquet.part``, with segments that are each a
whole Parquet file. A recorder that is killed loses the rows after the last segment, at most half a minute; the rest
is read by :func:`lbgym.recording.load_recording` (or anything that reads a folder of Parquet files) and merged
into one file by :func:`finish_recording`. A recorder that is stopped merges them itself; the file appears when whole.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .. import checks
from ..errors import MissingExtraError, RecordingError, RegionError
from ..features.columns import FEATURE_NAMES, GROUND_TRUTH_NAMES
from ..monitor import Follower
from ..sharedmemory import SharedMemoryRegion, abi

if TYPE_CHECKING:
    import pyarrow

logger = logging.getLogger("lbgym")

#: Key of a recording's description (JSON) in the metadata of its files.
METADATA_KEY = b"lbgym.recording"
#: 2: names_version, states, ground_truth_age, and the names themselves in the description.
FORMAT = 2

#: A segment is closed after so many seconds, rows or bytes of memory.
SEGMENT_SECONDS = 30.0
SEGMENT_ROWS = 2048
SEGMENT_BYTES = 16 << 20
#: Bytes of a row group of a finished file, in memory.
ROW_GROUP_BYTES = 32 << 20

#: An observation is taken for a deadline if no more than this part of a publication is missing: timers jitter.
_SLACK = 0.25
_NS = 1_000_000_000
_POLL = 0.1
_HEAD = abi.FRAME.size // 8


@dataclass(slots=True)
class Summary:
    """Progress of a recording.

    Attributes:
        path: the file.
        observations: rows.
        missed: rows that are missing between them.
        invalid: observations that break the binary interface and were left out.
        restarts: times that another producer took over.
        seconds: since the recording began.
    """

    path: Path
    observations: int = 0
    missed: int = 0
    invalid: int = 0
    restarts: int = 0
    seconds: float = 0.0


def recording_schema() -> pyarrow.Schema:
    """The columns of a recording, each with its description.

    A row is an observation. Columns have the names and units of the binary interface: a number is a number, values per
    server are a list with ``num_servers`` entries; features, ground truth and counters have a
    column per name. Two columns are the recorder's own: ``instance``, a number that identifies the producer,
    and ``missed``, the rows missing before this one. The servers' names are in the description of their producer, by
    ``names_version``.
    """
    pa = require_pyarrow()

    def column(name: str, type_: Any, doc: str, nullable: bool = False) -> Any:
        return pa.field(name, type_, nullable=nullable, metadata={"description": doc})

    def per_server(name: str, type_: Any, doc: str, nullable: bool = False) -> Any:
        return column(name, pa.list_(pa.field("item", type_, nullable=False)), doc, nullable)

    heads = {field.name: field.doc for field in abi.FRAME.fields}
    sections = {section.name: section.doc for section in abi.FRAME_SECTIONS}
    none = "; null: none yet"
    return pa.schema(
        [
            column("instance", pa.int64(), "number that identifies the producer"),
            column("sequence_id", pa.int64(), heads["sequence_id"]),
            column("missed", pa.int64(), "rows missing between the previous one and this"),
            column("timestamp", pa.int64(), heads["timestamp"]),
            column("published_at", pa.int64(), heads["published_at"]),
            column("applied_sequence_id", pa.int64(), heads["applied_sequence_id"] + none, True),
            column("applied_at", pa.int64(), heads["applied_at"] + none, True),
            column("safe", pa.bool_(), "true if the safe weights are in force"),
            column("num_servers", pa.int32(), heads["num_servers"]),
            column("names_version", pa.int64(), "key of the servers' names in the producer's description; 0: unnamed"),
            column("unrouted", pa.int64(), heads["unrouted"]),
            column("fct_count", pa.int64(), heads["fct_count"]),
            column("fct_sum", pa.int64(), heads["fct_sum"]),
            per_server("active", pa.bool_(), "true if the server takes new flows"),
            *(per_server(name, pa.float32(), "feature: flows or seconds") for name in FEATURE_NAMES),
            *(per_server(name, pa.float32(), "ground truth; null: unknown", True) for name in GROUND_TRUTH_NAMES),
            per_server("states", pa.uint8(), sections["states"]),
            per_server("ground_truth_age", pa.int64(), "ns from the measurement to published_at; -1: unknown", True),
            *(per_server(name, pa.int64(), "flows since the producer started") for name in abi.COUNTER_NAMES),
            per_server("weights", pa.float64(), sections["weights"]),
            per_server("safe_weights", pa.float64(), sections["safe_weights"]),
        ]
    )


def record(
    name: str,
    path: str | os.PathLike[str],
    *,
    duration: float | None = None,
    steps: int | None = None,
    interval: float | None = None,
    overwrite: bool = False,
    stop: Callable[[], bool] | None = None,
    progress: Callable[[Summary], None] | None = None,
) -> Summary:
    """Record the observations of a region, also across restarts of its producer, until stopped.

    The region is opened read-only. After an exception or an interrupt, the folder ``path`` + ".part" keeps everything
    recorded so far.

    Args:
        name: of the region, which must exist.
        path: of the Parquet file; it appears when whole.
        duration: seconds to record; None: until ``steps`` or ``stop``.
        steps: observations to record.
        interval: seconds of the data plane's clock; the first observation of each interval is recorded. None: every
            observation.
        overwrite: replace an existing file or unfinished recording.
        stop: called at least ten times a second; returning true ends the recording.
        progress: called about ten times a second with a summary.

    Raises:
        RegionNotFoundError, RegionFormatError, RegionError: if the region does not exist or cannot be read.
        RecordingError: if the file exists or cannot be written.
        InvalidOptionError: for a value out of range.
        MissingExtraError: without pyarrow.
    """
    require_pyarrow()
    duration = None if duration is None else checks.seconds("duration", duration)
    interval = None if interval is None else checks.seconds("interval", interval)
    steps = None if steps is None else checks.whole("steps", steps)
    path = Path(path)
    summary = Summary(path)
    with Follower(name) as follower, _Segments(path, name, interval, overwrite) as segments:
        follower.skip()
        began = time.monotonic()
        sieve = _Sieve(interval)
        segments.begin(follower.region)
        reported, gone = -math.inf, False
        while steps is None or summary.observations < steps:
            now = time.monotonic()
            summary.seconds = now - began
            left = math.inf if duration is None else duration - summary.seconds
            if left <= 0.0 or (stop is not None and stop()):
                break
            if progress is not None and now - reported >= _POLL:
                reported = now
                progress(summary)
            segments.tick(now)
            if not follower.wait(min(left, _POLL)):
                if not gone and not follower.region.producer_alive:
                    gone = True
                    pid = follower.region.producer_pid
                    logger.warning("the producer of region %r (process %d) is gone; waiting for a new one", name, pid)
                continue
            if follower.restarts != summary.restarts:
                region = follower.region
                logger.warning("region %r has a new producer (process %d); recording it", name, region.producer_pid)
                summary.restarts, gone = follower.restarts, False
                segments.begin(region)
                sieve = _Sieve(interval)
            if not follower.read():
                summary.invalid = follower.invalid
                continue
            summary.invalid = follower.invalid
            missed = sieve.missed_before(follower)
            if missed is not None:
                segments.add(follower, missed)
                summary.observations += 1
                summary.missed += missed
        summary.seconds = time.monotonic() - began
        segments.finish()
    return summary


class _Sieve:
    """Selects observations of one producer: all, or the first at or after each deadline of a grid."""

    def __init__(self, interval: float | None) -> None:
        self._interval = None if interval is None else max(1, round(interval * _NS))
        self._deadline: int | None = None
        self._published_at = 0

    def missed_before(self, follower: Follower) -> int | None:
        """Rows missing before the last observation read; None if that is not recorded."""
        interval, buffer, region = self._interval, follower.buffer, follower.region
        if interval is None:
            return follower.missed
        now = buffer.timestamp_ns
        missed = 0
        if self._deadline is not None and now >= self._deadline - interval:
            slack = round(_SLACK * min(interval, region.publish_interval * _NS))
            if now < self._deadline - slack:
                return None
            # The smaller of both clocks' counts: if the data plane's clock jumped, nothing is missing.
            skipped = (now + slack - self._deadline) // interval
            elapsed = int((buffer.published_at - self._published_at) * region.clock_rate)
            missed = max(0, min(skipped, elapsed // interval))
            self._deadline += (skipped + 1) * interval
        else:
            self._deadline = now + interval
        self._published_at = buffer.published_at
        return missed


class _Segments:
    """The folder of a recording in progress."""

    def __init__(self, path: Path, name: str, interval: float | None, overwrite: bool) -> None:
        from .. import __version__

        self.path, self.folder = path, part_of(path)
        self._description: dict[str, Any] = {
            "format": FORMAT,
            "lbgym": __version__,
            "region": name,
            "interval": interval,
            "started_at": time.time(),
            # CLOCK_REALTIME minus CLOCK_MONOTONIC at the start.
            "realtime_offset": time.time_ns() - time.monotonic_ns(),
            "producers": [],
        }
        self._rows: list[NDArray[np.uint64]] = []
        self._missed: list[int] = []
        self._count = 0
        self._opened = math.inf
        self._layout: abi.Layout | None = None
        self._instance = 0
        self._pending: Future[None] | None = None
        if not overwrite and path.exists():
            raise RecordingError(f"{path} exists already; remove it, or choose another name")
        if path.is_dir():
            raise RecordingError(f"{path} is a folder")
        try:
            self._lock = _make_folder(self.folder, overwrite)
        except FileExistsError:
            raise RecordingError(
                f"{self.folder} belongs to a recorder that still runs or was killed; read it with load_recording, "
                f"merge it with lbgym.recording.finish_recording({str(path)!r}), or remove it"
            ) from None
        except OSError as error:
            raise RecordingError(f"cannot record to {path}: {error.strerror or error}") from error
        # Segments are written in the background, so that no observation is missed meanwhile.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="lbgym-recorder")

    def begin(self, region: SharedMemoryRegion) -> None:
        """Start on the observations of a new producer."""
        self.flush()
        # Observations are copied in the layout of this version, whatever the region's is.
        self._layout, self._instance = region.layout.private, region.instance
        self._limit = max(1, min(SEGMENT_ROWS, SEGMENT_BYTES // region.layout.frame_size))
        self._description["producers"].append(
            {
                "instance": region.instance,
                "driver": region.driver,
                "version": list(region.version),
                "pid": region.producer_pid,
                "created_at": region.created_at,
                "capacity": region.capacity,
                "publish_interval": region.publish_interval,
                "clock_rate": region.clock_rate,
                # Ground truth is added once there is some: a driver says which it could publish.
                "real_features": [name for name in FEATURE_NAMES if name in region.real_features],
                # By names_version, each a list of the servers' names.
                "names": {},
            }
        )

    def add(self, follower: Follower, missed: int) -> None:
        """Add a copy of the last observation read."""
        self._note_names(follower)
        self._note_ground_truth(follower)
        if not self._rows:
            self._opened = time.monotonic()
        self._rows.append(follower.buffer.words.copy())
        self._missed.append(missed)
        if len(self._rows) >= self._limit:
            self.flush()

    def _note_names(self, follower: Follower) -> None:
        """Store the names of a version not seen before.

        Names that changed again since the observation was published are lost: its servers count as unnamed.
        """
        region, version = follower.region, follower.buffer.names_version
        names: dict[str, list[str]] = self._description["producers"][-1]["names"]
        if version == 0 or str(version) in names:
            return
        try:
            found = list(region.server_names)
        except RegionError as error:
            logger.warning("%s; recording them as unnamed", error)
            names[str(version)] = []
        else:
            names[str(version)] = found if region.names_version == version else []

    def _note_ground_truth(self, follower: Follower) -> None:
        """Call ground truth real with the first observation that has it."""
        real: list[str] = self._description["producers"][-1]["real_features"]
        if follower.buffer.has_ground_truth and not any(name in GROUND_TRUTH_NAMES for name in real):
            real += [name for name in GROUND_TRUTH_NAMES if name in follower.region.real_features]

    def tick(self, now: float) -> None:
        """Close a segment that is due, and raise an error from writing the previous one."""
        if now - self._opened >= SEGMENT_SECONDS:
            self.flush()
        elif self._pending is not None and self._pending.done():
            self._wait()

    def flush(self) -> None:
        """Write the rows since the last segment as a new segment, in the background."""
        self._wait()
        if not self._rows:
            return
        assert self._layout is not None
        description = json.dumps(self._description)
        target = self.folder / f"{self._count:06}.parquet"
        arguments = (target, self._rows, self._missed, self._layout, self._instance, description)
        self._pending = self._writer.submit(_write_segment, *arguments)
        self._rows, self._missed, self._opened = [], [], math.inf
        self._count += 1

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except OSError as error:
            before = "; earlier segments are intact" if segments_of(self.folder) else ""
            raise RecordingError(f"cannot write to {self.folder}: {error.strerror or error}{before}") from error

    def finish(self) -> None:
        """Merge the segments into one file."""
        self.flush()
        self._wait()
        _merge(self.folder, self.path, json.dumps(self._description))

    def __enter__(self) -> _Segments:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is not None and not issubclass(kind, RecordingError):
                self.flush()
                self._wait()
                logger.warning("the recording so far is in %s", self.folder)
        finally:
            self._writer.shutdown()
            if self.folder.is_dir() and not segments_of(self.folder):
                shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self._lock)


def finish_recording(path: str | os.PathLike[str]) -> Path:
    """Merge the folder of a recorder that was killed into one file.

    Args:
        path: of the intended file, or of the folder.

    Returns:
        The file's path.

    Raises:
        RecordingError: if the folder does not exist or a recorder is using it, or if the file exists already.
        MissingExtraError: without pyarrow.
    """
    require_pyarrow()
    path = Path(path)
    target = path.with_suffix("") if path.suffix == ".part" else path
    folder = part_of(target)
    if not folder.is_dir():
        raise RecordingError(f"there is no unfinished recording {folder}")
    if target.exists():
        raise RecordingError(f"{target} exists already; move it away first")
    lock = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RecordingError(f"a recorder is using {folder}; stop it, and it will finish the file") from None
        _merge(folder, target, None)
    finally:
        os.close(lock)
    return target


def part_of(path: Path) -> Path:
    """The folder of a recording in progress."""
    return path.with_name(path.name + ".part")


def segments_of(folder: Path) -> list[Path]:
    """The segments in a folder, in order; those being written have other names."""
    return sorted(file for file in folder.glob("*.parquet") if not file.name.startswith("."))


def _make_folder(folder: Path, overwrite: bool) -> int:
    """Make a new folder and return a descriptor that holds its lock."""
    if overwrite and folder.is_dir():
        lock = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(folder) from None
        finally:
            os.close(lock)
        shutil.rmtree(folder)
    folder.mkdir()
    lock = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return lock


def _write_segment(
    target: Path,
    rows: list[NDArray[np.uint64]],
    missed: list[int],
    layout: abi.Layout,
    instance: int,
    description: str,
) -> None:
    from pyarrow import parquet

    table = _table(np.stack(rows), np.array(missed, np.int64), layout, instance)
    temporary = target.with_name(f".{target.name}")
    parquet.write_table(_described(table, description), temporary, compression="zstd")
    os.replace(temporary, target)


def _described(table: Any, description: str) -> Any:
    return table.replace_schema_metadata({METADATA_KEY: description.encode()})


def _table(frames: NDArray[np.uint64], missed: NDArray[np.int64], layout: abi.Layout, instance: int) -> Any:
    """Copies of frames, uint64[rows, words], as an Arrow table."""
    pa = require_pyarrow()
    count, capacity = len(frames), layout.capacity
    heads = np.ascontiguousarray(frames[:, :_HEAD]).view(abi.FRAME.dtype)[:, 0]
    servers = heads["num_servers"].astype(np.int32)
    known = np.arange(capacity) < servers[:, None]
    flags = heads["flags"]
    applied = (flags & abi.FLAG_APPLIED) != 0
    truth = (flags & abi.FLAG_GROUND_TRUTH) != 0
    memory = frames.view(np.uint8)
    sections = {}
    for section in abi.FRAME_SECTIONS:
        first = layout.frame_sections[section.name]
        dtype = np.dtype(abi.Field(section.name, section.type, "").dtype)
        part = np.ascontiguousarray(memory[:, first : first + dtype.itemsize * section.columns * capacity])
        sections[section.name] = part.view(dtype).reshape(count, capacity, section.columns)

    def lists(name: str, j: int, type_: Any, there: NDArray[np.bool_] | None = None) -> Any:
        lengths = servers if there is None else np.where(there, servers, 0)
        mask = known if there is None else known & there[:, None]
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int32)
        values = pa.array(sections[name][:, :, j][mask].astype(type_.value_type.to_pandas_dtype()))
        return pa.ListArray.from_arrays(offsets, values, type=type_, mask=None if there is None else pa.array(~there))

    schema = recording_schema()
    columns: dict[str, Any] = {
        "instance": np.full(count, instance, np.int64),
        "missed": missed,
        "safe": (flags & abi.FLAG_SAFE) != 0,
        "num_servers": servers,
        "applied_sequence_id": pa.array(heads["applied_sequence_id"].astype(np.int64), mask=~applied),
        "applied_at": pa.array(heads["applied_at"].astype(np.int64), mask=~applied),
    }
    for name in ("sequence_id", "timestamp", "published_at", "names_version", "unrouted", "fct_count", "fct_sum"):
        columns[name] = heads[name].astype(np.int64)
    for of, names, there in (
        ("stats", FEATURE_NAMES, None),
        ("ground_truth", GROUND_TRUTH_NAMES, truth),
        ("states", ("states",), None),
        ("ground_truth_age", ("ground_truth_age",), truth),
        ("counters", abi.COUNTER_NAMES, None),
        ("active", ("active",), None),
        ("weights", ("weights",), None),
        ("safe_weights", ("safe_weights",), None),
    ):
        for j, name in enumerate(names):
            columns[name] = lists(of, j, schema.field(name).type, there)
    return pa.table([columns[name] for name in schema.names], schema=schema)


def _merge(folder: Path, target: Path, description: str | None) -> None:
    """Merge all segments into one file and remove the folder."""
    pa = require_pyarrow()
    from pyarrow import parquet

    files = segments_of(folder)
    if description is None:
        if not files:
            raise RecordingError(f"{folder} is empty")
        # The newest one knows all producers.
        description = parquet.read_schema(files[-1]).metadata[METADATA_KEY].decode()
    schema = recording_schema().with_metadata({METADATA_KEY: description.encode()})
    temporary = folder / ".whole.parquet"
    try:
        with parquet.ParquetWriter(temporary, schema, compression="zstd") as writer:
            group: list[Any] = []
            for file in files:
                group.append(upgraded(parquet.read_table(file)).replace_schema_metadata(schema.metadata))
                if sum(table.nbytes for table in group) >= ROW_GROUP_BYTES:
                    writer.write_table(pa.concat_tables(group).combine_chunks())
                    group = []
            if group:
                writer.write_table(pa.concat_tables(group).combine_chunks())
        os.replace(temporary, target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RecordingError(
            f"cannot write {target}: {error.strerror or error}; the recording is in {folder}"
        ) from error
    shutil.rmtree(folder)


def upgraded(table: pyarrow.Table) -> pyarrow.Table:
    """Convert a table of an older format to this one: servers unnamed, states and ages unknown."""
    pa = require_pyarrow()
    if "names_version" in table.schema.names or "num_servers" not in table.schema.names:
        return table
    schema = recording_schema()
    servers = table.column("num_servers").to_numpy()
    offsets = np.concatenate([[0], np.cumsum(servers, dtype=np.int64)]).astype(np.int32)
    states = pa.ListArray.from_arrays(offsets, pa.array(np.zeros(offsets[-1], np.uint8)), schema.field("states").type)
    new = {
        "names_version": pa.array(np.zeros(len(servers), np.int64)),
        "states": states,
        "ground_truth_age": pa.nulls(len(servers), schema.field("ground_truth_age").type),
    }
    for name, values in new.items():
        table = table.append_column(schema.field(name), values)
    return table.select(schema.names) if set(schema.names) <= set(table.schema.names) else table


def require_pyarrow() -> ModuleType:
    """Import pyarrow.

    Raises:
        MissingExtraError: without it.
    """
    try:
        import pyarrow
    except ImportError:
        raise MissingExtraError("pyarrow", "offline", "a recording") from None
    return pyarrow
