"""What a policy would have done: :class:`Shadow` collects its decisions beside the weights in force."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import __version__
from ..atomic import check_writable, whole_file, write_whole
from ..errors import InvalidOptionError, MissingExtraError
from ..features.columns import column_index

_OPEN, _FCT = column_index("n_flow_on"), column_index("fct_mean_decay")
#: Points of the report over time at most; then every other one goes.
_POINTS = 2000
#: Decisions that are written to a Parquet file at once.
_ROWS = 1024
FORMATS = (".json", ".parquet")


def shares(weights: NDArray[np.float64], active: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Weights over the sum of the active ones, float64[N]; 0 for inactive servers."""
    there = np.where(active, weights, 0.0)
    largest = there.max(initial=0.0)
    if largest <= 0.0:
        return np.zeros(len(there))
    there = there / largest
    result: NDArray[np.float64] = there / there.sum()
    return result


class _Server:
    """Sums over the decisions in which a server was active."""

    def __init__(self) -> None:
        self.count = 0
        self.sums = np.zeros(4)  # share, share in force, open flows, FCT
        self.least, self.most = np.inf, -np.inf

    def add(self, share: float, in_force: float, open_flows: float, fct: float) -> None:
        self.count += 1
        self.sums += (share, in_force, open_flows, fct)
        self.least, self.most = min(self.least, share), max(self.most, share)


class Shadow:
    """Collects decisions and reports them, in constant memory.

    Of two sets of weights the *moved* share is that of the new flows that would go to another server if every flow
    followed the weights: half the sum of the absolute differences of the servers' shares. Dispatch rules that also
    count open flows move less.

    Args:
        region, policy: for the report.
        out: a file of the report, ".json", or of every decision, ".parquet"; None: none.

    Raises:
        InvalidOptionError: for another suffix.
        FileWriteError: if the file cannot be written.
        MissingExtraError: a Parquet file without pyarrow.
    """

    def __init__(self, region: str, policy: str, out: str | None = None) -> None:
        self._region, self._policy = region, policy
        self._path = None if out is None else Path(out)
        self._servers: dict[str, _Server] = {}
        self._steps = self._fallback_steps = 0
        self._began = self._ended = 0.0
        self._moved_sum = self._moved_most = self._churn = 0.0
        self._before: dict[str, float] = {}
        self._series: list[tuple[float, float, dict[str, tuple[float, float]]]] = []
        self._stride = 1
        self._file: _ParquetFile | None = None
        if self._path is not None:
            if self._path.suffix not in FORMATS:
                raise InvalidOptionError(f"the shadow's file must end in {' or '.join(FORMATS)}, got {out!r}")
            check_writable(self._path)
            if self._path.suffix == ".parquet":
                self._file = _ParquetFile(self._path, region, policy)

    def add(
        self,
        timestamp: float,
        sequence_id: int,
        servers: Sequence[str],
        weights: NDArray[np.float64],
        in_force: NDArray[np.float64],
        active: NDArray[np.bool_],
        stats: NDArray[np.float32],
        *,
        safe: bool,
        fallback: bool,
    ) -> None:
        """Add a decision.

        Args:
            timestamp: of its observation, on the data plane's clock.
            sequence_id: of its observation.
            servers: their names, each once.
            weights: float[N], that the controller would have written.
            in_force: float[N], at the time.
            active: bool[N].
            stats: float32[N, 11].
            safe: whether those in force are the data plane's safe weights.
            fallback: whether the fallback decided.
        """
        wanted, now = shares(weights, active), shares(in_force, active)
        moved = float(np.abs(wanted - now).sum() / 2.0)
        if not self._steps:
            self._began = timestamp
        else:
            names = {*servers, *self._before}
            new = dict(zip(servers, wanted.tolist(), strict=True))
            self._churn += sum(abs(new.get(name, 0.0) - self._before.get(name, 0.0)) for name in names) / 2.0
        self._before = dict(zip(servers, wanted.tolist(), strict=True))
        self._ended = timestamp
        self._moved_sum += moved
        self._moved_most = max(self._moved_most, moved)
        self._fallback_steps += fallback
        for j, name in enumerate(servers):
            if active[j]:
                server = self._servers.setdefault(name, _Server())
                server.add(float(wanted[j]), float(now[j]), float(stats[j, _OPEN]), float(stats[j, _FCT]))
        if self._steps % self._stride == 0:
            pairs = zip(servers, zip(wanted.tolist(), now.tolist(), strict=True), strict=True)
            self._series.append((timestamp, moved, dict(pairs)))
            if len(self._series) > _POINTS:
                self._series, self._stride = self._series[::2], 2 * self._stride
        self._steps += 1
        if self._file is not None:
            self._file.add(
                {
                    "timestamp": timestamp,
                    "sequence_id": sequence_id,
                    "safe": bool(safe),
                    "fallback": fallback,
                    "moved": moved,
                    "servers": list(servers),
                    "active": active.tolist(),
                    "weights": weights.tolist(),
                    "in_force": in_force.tolist(),
                }
            )

    def summary(self) -> dict[str, Any]:
        """Steps and seconds; moved: mean and largest; churn: moved from one decision to the next, in the mean."""
        steps = max(self._steps, 1)
        return {
            "region": self._region,
            "policy": self._policy,
            "lbgym": __version__,
            "steps": self._steps,
            "seconds": self._ended - self._began,
            "fallback_steps": self._fallback_steps,
            "moved_mean": self._moved_sum / steps,
            "moved_max": self._moved_most,
            "churn_mean": self._churn / max(self._steps - 1, 1),
        }

    def servers(self) -> list[dict[str, Any]]:
        """Per server: mean, least and largest share of the weights, mean share in force, mean open flows and FCT."""
        rows = []
        for name, server in self._servers.items():
            share, in_force, open_flows, fct = (server.sums / server.count).tolist()
            rows.append(
                {
                    "server": name,
                    "share": share,
                    "share_low": server.least,
                    "share_high": server.most,
                    "in_force": in_force,
                    "open_flows": open_flows,
                    "fct_mean_decay": fct,
                }
            )
        return rows

    def report(self) -> dict[str, Any]:
        """The summary, the servers, and the shares over time."""
        names = list(self._servers)

        def over_time(which: int) -> dict[str, list[float]]:
            return {name: [row.get(name, (0.0, 0.0))[which] for _, _, row in self._series] for name in names}

        return {
            **self.summary(),
            "servers": self.servers(),
            "time": [time - self._began for time, _, _ in self._series],
            "moved": [moved for _, moved, _ in self._series],
            "share": over_time(0),
            "in_force": over_time(1),
        }

    def write(self) -> None:
        """Write the report as it is now, if the file is one of a report and there is a decision to report.

        Raises:
            FileWriteError: if it cannot be written.
        """
        if self._path is not None and self._path.suffix == ".json" and self._steps:
            text = json.dumps(self.report(), indent=1) + "\n"
            write_whole(self._path, lambda stream: stream.write(text.encode()))

    def close(self) -> None:
        """Finish the file; without a decision there is none. Idempotent.

        Raises:
            FileWriteError: if it cannot be written.
        """
        file, self._file = self._file, None
        if file is not None:
            file.close()
        self.write()


class _ParquetFile:
    """Rows in a file that takes its name when it is whole; unfinished it is beside, hidden. Without rows it is none."""

    def __init__(self, path: Path, region: str, policy: str) -> None:
        try:
            import pyarrow as pa
            from pyarrow import parquet
        except ImportError:
            raise MissingExtraError("pyarrow", "offline", "a Parquet file of a shadow run") from None
        item = pa.list_
        self._schema = pa.schema(
            [
                ("timestamp", pa.float64()),
                ("sequence_id", pa.int64()),
                ("safe", pa.bool_()),
                ("fallback", pa.bool_()),
                ("moved", pa.float64()),
                ("servers", item(pa.string())),
                ("active", item(pa.bool_())),
                ("weights", item(pa.float64())),
                ("in_force", item(pa.float64())),
            ],
            metadata={"lbgym.region": region, "lbgym.policy": policy},
        )
        self._path = path
        self._table, self._open_writer = pa.Table, parquet.ParquetWriter
        self._writer: Any = None
        self._opened = ExitStack()
        self._rows: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        if len(self._rows) >= _ROWS:
            self._flush()

    def _flush(self) -> None:
        rows, self._rows = self._rows, []
        try:
            if self._writer is None:
                temporary = self._opened.enter_context(whole_file(self._path))
                writer = self._open_writer(temporary, self._schema, compression="zstd")
                self._writer = self._opened.enter_context(writer)
            self._writer.write_table(self._table.from_pylist(rows, schema=self._schema))
        except Exception as error:
            # What is half written is of no use: whole_file removes it, and names the file in the error.
            self._opened.__exit__(type(error), error, error.__traceback__)
            raise

    def close(self) -> None:
        if self._rows:
            self._flush()
        self._opened.close()
