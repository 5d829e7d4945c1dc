"""Recordings as arrays, as transitions for offline training, and as Minari datasets."""

from __future__ import annotations

import copy
import json
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..env.actions import ActionCodec, make_action_codec
from ..env.observations import ObservationLayout
from ..env.rewards import Reward, RewardType, make_reward
from ..errors import InvalidOptionError, InvalidRewardError, MissingExtraError, RecordingError, UnknownNameError
from ..features.columns import FEATURE_NAMES, GROUND_TRUTH_NAMES
from ..sharedmemory.abi import COUNTER_NAMES
from ..snapshot import Snapshot
from .recorder import METADATA_KEY, part_of, recording_schema, require_pyarrow, segments_of, upgraded

_NS = 1_000_000_000

#: Units of a transition.
STEPS = ("observation", "action")

#: An interval between two rows of more than this, in planned intervals, is a gap.
LONGEST_STEP = 2.0


@dataclass(frozen=True, eq=False)
class Transitions:
    """M transitions, in order, for offline training.

    Attributes:
        observations, next_observations: [M, ...] in the layout asked for; of "dict" a dictionary of arrays.
        actions: [M, ...], in the action space asked for.
        rewards: float64[M], of the next observation.
        terminated: bool[M], all false: balancing load never ends by itself.
        truncated: bool[M], true at the end of an episode, where the recording has a gap.
        weights: float64[M, N], which the actions encode.
        episodes: int64[M], the number of the episode, from 0.
        rows, next_rows: int64[M], rows of the observation and of the next one in the recording.
        layout: of the observations, with their space.
        codec: from weights to actions, with their space.
    """

    observations: Any
    actions: NDArray[Any]
    rewards: NDArray[np.float64]
    next_observations: Any
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    weights: NDArray[np.float64]
    episodes: NDArray[np.int64]
    rows: NDArray[np.int64]
    next_rows: NDArray[np.int64]
    layout: ObservationLayout
    codec: ActionCodec

    def __len__(self) -> int:
        return len(self.rewards)


@dataclass(frozen=True, eq=False)
class Recording:
    """T observations of a data plane, in the order of publication. N is the largest number of servers among them.

    In rows with fewer servers the others are inactive and zero everywhere.

    Attributes:
        metadata: about the recorder and the producers it recorded.
        instance: int64[T], identifies the producer.
        sequence_id: int64[T].
        missed: int64[T], rows missing before this one.
        timestamp: float64[T], seconds on the data plane's clock.
        published_at: int64[T], ns of the recording machine's monotonic clock.
        applied_sequence_id: int64[T], of the action in force; -1 before the first.
        applied_at: int64[T], ns of the monotonic clock when it came into force; -1 before the first.
        safe: bool[T], true if the safe weights were in force instead.
        num_servers: int64[T], known to the data plane.
        names_version: int64[T], identifies the names among those of one producer; see :meth:`server_names`.
        unrouted: int64[T], flows that found no active server, since the producer started.
        fct_count, fct_sum: int64[T], flows of known FCT since the producer started, and the sum of their FCTs in ns.
        active: bool[T, N].
        stats: float32[T, N, 11], columns of ``lbgym.features.FEATURE_NAMES``; zero rows for inactive servers.
        states: uint8[T, N], of :class:`~lbgym.sharedmemory.ServerState`.
        ground_truth: float32[T, N, 3], or None if a row lacks it.
        ground_truth_age: float64[T, N], seconds from the measurement to the publication; NaN where unknown.
        started, completed, rejected, failed: int64[T, N], flows since the producer started.
        weights: float64[T, N], in force.
        safe_weights: float64[T, N].
    """

    metadata: dict[str, Any]
    instance: NDArray[np.int64]
    sequence_id: NDArray[np.int64]
    missed: NDArray[np.int64]
    timestamp: NDArray[np.float64]
    published_at: NDArray[np.int64]
    applied_sequence_id: NDArray[np.int64]
    applied_at: NDArray[np.int64]
    safe: NDArray[np.bool_]
    num_servers: NDArray[np.int64]
    names_version: NDArray[np.int64]
    unrouted: NDArray[np.int64]
    fct_count: NDArray[np.int64]
    fct_sum: NDArray[np.int64]
    active: NDArray[np.bool_]
    stats: NDArray[np.float32]
    states: NDArray[np.uint8]
    ground_truth: NDArray[np.float32] | None
    ground_truth_age: NDArray[np.float64]
    started: NDArray[np.int64]
    completed: NDArray[np.int64]
    rejected: NDArray[np.int64]
    failed: NDArray[np.int64]
    weights: NDArray[np.float64]
    safe_weights: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.instance)

    def __repr__(self) -> str:
        servers = self.active.shape[1]
        return f"<Recording of {self.metadata['region']!r}, {len(self):,} observations of {servers} servers>"

    def server_names(self, row: int = -1) -> tuple[str, ...]:
        """The names of the N servers in a row, by default the last one; "" for servers without a name.

        Names belong to a row: a server that leaves may have its index taken by another.
        """
        n, known = self.active.shape[1], int(self.num_servers[row])
        instance, version = int(self.instance[row]), str(self.names_version[row])
        for producer in self.metadata["producers"]:
            if producer["instance"] == instance:
                names = producer.get("names", {}).get(version, [])[:known]
                return (*names, *[""] * (n - len(names)))
        return ("",) * n

    @property
    def real_features(self) -> frozenset[str]:
        """Features and ground truth that every producer measured; the other columns are meaningless zeros."""
        every = (*FEATURE_NAMES, *GROUND_TRUTH_NAMES)
        return frozenset(every).intersection(*(p.get("real_features", every) for p in self.metadata["producers"]))

    @property
    def snapshots(self) -> Snapshot:
        """All observations as one batch: a :class:`~lbgym.Snapshot` with a leading axis of T."""
        return self._snapshot(slice(None))

    def _snapshot(self, rows: Any) -> Snapshot:
        return Snapshot(
            sequence_id=self.sequence_id[rows],
            timestamp=self.timestamp[rows],
            active=self.active[rows],
            stats=self.stats[rows],
            ground_truth=None if self.ground_truth is None else self.ground_truth[rows],
            started=self.started[rows],
            completed=self.completed[rows],
            rejected=self.rejected[rows],
            failed=self.failed[rows],
            unrouted=self.unrouted[rows],
        )

    @cached_property
    def episodes(self) -> tuple[range, ...]:
        """Rows that follow each other without a gap, at least two each.

        A gap is a new producer, missed observations, a jump of the data plane's clock or sequence, more than two
        intervals without an observation, another number of servers.
        """
        if len(self) < 2:
            return ()
        step = np.diff(self.timestamp)
        gap = (
            (np.diff(self.instance) != 0)
            | (self.missed[1:] > 0)
            | (np.diff(self.sequence_id) <= 0)
            | (np.diff(self.num_servers) != 0)
            | (step <= 0.0)
            | (step > LONGEST_STEP * self._intervals()[1:])
        )
        edges = [0, *(np.flatnonzero(gap) + 1).tolist(), len(self)]
        return tuple(range(first, stop) for first, stop in pairwise(edges) if stop - first > 1)

    def _intervals(self) -> NDArray[np.float64]:
        """Planned seconds between a row and the previous one, float64[T]."""
        asked = self.metadata["interval"] or 0.0
        planned = {p["instance"]: max(p["publish_interval"], asked) for p in self.metadata["producers"]}
        found, where = np.unique(self.instance, return_inverse=True)
        return np.array([planned.get(instance, np.inf) for instance in found.tolist()])[where]

    def rewards(self, reward_type: RewardType = "jain", reward_field: str = "flow_duration_avg_decay") -> Any:
        """The reward of every observation, float64[T]; arguments and errors as in :class:`~lbgym.LoadBalanceEnv`."""
        reward = make_reward(reward_type, reward_field)
        if reward.needs_service:
            raise InvalidRewardError(
                f"reward_type={reward_type!r} needs the FCT of every flow in a step, which a recording lacks; "
                "use a fairness reward or a function of the Snapshot"
            )
        if isinstance(reward_type, (str, Mapping, Reward)):
            return np.asarray(reward(self.snapshots), np.float64)
        # A user's function takes one snapshot at a time, as in the environment.
        return np.array([float(reward(self._snapshot(row))) for row in range(len(self))], np.float64)

    def transitions(
        self,
        *,
        reward_type: RewardType = "jain",
        reward_field: str = "flow_duration_avg_decay",
        observation: str = "matrix",
        normalize: bool = False,
        use_ground_truth: bool = False,
        observe_weights: bool = False,
        action_type: str = "continuous",
        action_weights: Sequence[float] = (1.0, 1.5, 2.0),
        min_weight: float = 0.1,
        max_weight: float = 10.0,
        step: str = "observation",
    ) -> Transitions:
        """Steps of all episodes: observation, action, reward, next observation.

        The keys are those of :class:`~lbgym.LoadBalanceEnv`, so that a policy trained on the result fits an environment
        made with them. The action of a step is the weights in force at the observation after its first, which an agent
        chose on the first. They are encoded as the nearest action; weights are relative, so those out of the action's
        range are scaled into it.

        Args:
            step: "observation": from each observation to the next; "action": from each observation that an agent acted
                on to the next such, for agents that act less often than the data plane publishes. Steps during which
                its weights went out of force are left out.
            reward_type: name, mapping or callable; of the next observation.
            reward_field: the column that fairness rewards compare.
            observation: "matrix", "flat" or "dict".
            normalize: map every feature to [0, 1].
            use_ground_truth: append the 3 columns that only the servers themselves know.
            observe_weights: append a column of the weights in force.
            action_type: "continuous", "normalized", "discrete" or "joint".
            action_weights: the levels of a discrete action.
            min_weight: least weight of a continuous action.
            max_weight: largest weight of a continuous action.

        Raises:
            UnknownNameError, InvalidOptionError, InvalidRewardError: as the environment.
            RecordingError: if no two observations are consecutive.
        """
        n = self.active.shape[1]
        layout = ObservationLayout(
            n,
            observation,
            normalize=normalize,
            use_ground_truth=use_ground_truth,
            observe_weights=observe_weights,
        )
        codec = make_action_codec(
            n, action_type, action_weights=action_weights, min_weight=min_weight, max_weight=max_weight
        )
        if step not in STEPS:
            raise UnknownNameError("step", step, STEPS)
        runs = [np.arange(episode.start, episode.stop) for episode in self.episodes]
        if step == "action":
            runs = [run for rows in runs for run in self._acted_on(rows)]
        if not runs:
            raise RecordingError(f"{self!r} has no two consecutive rows in steps of an {step}")
        rows = np.concatenate([run[:-1] for run in runs])
        next_rows = np.concatenate([run[1:] for run in runs])
        lengths = [len(run) - 1 for run in runs]
        truncated = np.zeros(len(rows), bool)
        truncated[np.cumsum(lengths) - 1] = True
        observations = layout.encode(self.stats, self.ground_truth, self.active, self.weights)
        weights = self.weights[rows + 1]
        # Servers unknown to the data plane have no weight and must not affect the range of the others.
        unknown = np.arange(n) >= self.num_servers[rows, None]
        return Transitions(
            observations=_at(observations, rows),
            actions=codec.encode(np.where(unknown, 1.0, weights)),
            rewards=self.rewards(reward_type, reward_field)[next_rows],
            next_observations=_at(observations, next_rows),
            terminated=np.zeros(len(rows), bool),
            truncated=truncated,
            weights=weights,
            episodes=np.repeat(np.arange(len(lengths)), lengths),
            rows=rows,
            next_rows=next_rows,
            layout=layout,
            codec=codec,
        )

    def _acted_on(self, rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Runs of at least two rows after each of which a new action came into force and lasted until the next."""
        acted = rows[:-1][np.diff(self.applied_sequence_id[rows]) != 0]
        # Rows under safe weights after an acted-on row, up to and including the next.
        safe = np.concatenate([[0], np.cumsum(self.safe)])
        broken = safe[acted[1:] + 1] - safe[acted[:-1] + 1] > 0
        return [run for run in np.split(acted, np.flatnonzero(broken) + 1) if len(run) > 1]


def _at(observations: Any, rows: Any) -> Any:
    if isinstance(observations, dict):
        return {key: values[rows] for key, values in observations.items()}
    return observations[rows]


def load_recording(path: str | os.PathLike[str]) -> Recording:
    """Read a recording, or the folder of an unfinished one.

    Raises:
        RecordingError: if it is not a recording; the message says why.
        MissingExtraError: without pyarrow.
    """
    pa = require_pyarrow()
    from pyarrow import parquet

    path = Path(path)
    if path.is_dir():
        files = segments_of(path)
        if not files:
            raise RecordingError(f"there is no recording in {path}")
    elif path.exists():
        files = [path]
    elif part_of(path).is_dir():
        raise RecordingError(
            f"{path} does not exist, but the unfinished recording {part_of(path)} does; load that, or merge it with "
            f"lbgym.recording.finish_recording({str(path)!r})"
        )
    else:
        raise RecordingError(f"there is no recording {path}")
    try:
        tables = [upgraded(parquet.read_table(file)) for file in files]
    except (OSError, pa.ArrowException) as error:
        raise RecordingError(f"{path} cannot be read as Parquet: {error}") from error
    # The newest segment knows all producers.
    description = (tables[-1].schema.metadata or {}).get(METADATA_KEY)
    if description is None:
        raise RecordingError(f"{path} is not a recording of lbgym: its metadata lack {METADATA_KEY.decode()!r}")
    metadata = json.loads(description)
    schema = recording_schema()
    for table in tables:
        for field in schema:
            if field.name not in table.schema.names or table.schema.field(field.name).type != field.type:
                found = metadata.get("format")
                raise RecordingError(f"{path} has format {found!r} and no column {field.name!r} of {field.type}")
    table = pa.concat_tables([table.select(schema.names).replace_schema_metadata(None) for table in tables])
    return _recording(path, table, metadata)


def _recording(path: Path, table: Any, metadata: dict[str, Any]) -> Recording:
    servers = _numbers(table, "num_servers").astype(np.int64)
    n = int(servers.max(initial=0))
    known = np.arange(n) < servers[:, None]

    def per_server(names: tuple[str, ...], dtype: Any) -> Any:
        out = np.zeros((len(servers), n, len(names)), dtype)
        for j, name in enumerate(names):
            column = table.column(name)
            there = np.asarray(column.is_valid().to_numpy())
            values = _flat(column)
            if len(values) != int(servers[there].sum()):
                raise RecordingError(f"{path}: the lengths of column {name!r} differ from num_servers")
            out[..., j][known & there[:, None]] = values
        return out

    active = per_server(("active",), bool)[..., 0]
    stats = per_server(FEATURE_NAMES, np.float32)
    # Rows of inactive servers are zero by contract, whatever the data plane publishes there.
    stats[~active] = 0.0
    truth = None
    if not any(table.column(name).null_count for name in GROUND_TRUTH_NAMES):
        truth = per_server(GROUND_TRUTH_NAMES, np.float32)
    ages = per_server(("ground_truth_age",), np.int64)[..., 0]
    measured = np.asarray(table.column("ground_truth_age").is_valid().to_numpy())[:, None] & known & (ages >= 0)
    counters = per_server(COUNTER_NAMES, np.int64)
    return Recording(
        metadata=metadata,
        instance=_numbers(table, "instance"),
        sequence_id=_numbers(table, "sequence_id"),
        missed=_numbers(table, "missed"),
        timestamp=_numbers(table, "timestamp") / _NS,
        published_at=_numbers(table, "published_at"),
        applied_sequence_id=_numbers(table, "applied_sequence_id"),
        applied_at=_numbers(table, "applied_at"),
        safe=table.column("safe").to_numpy(),
        num_servers=servers,
        names_version=_numbers(table, "names_version"),
        unrouted=_numbers(table, "unrouted"),
        fct_count=_numbers(table, "fct_count"),
        fct_sum=_numbers(table, "fct_sum"),
        active=active,
        stats=stats,
        states=per_server(("states",), np.uint8)[..., 0],
        ground_truth=truth,
        ground_truth_age=np.where(measured, ages / _NS, np.nan),
        started=counters[..., 0],
        completed=counters[..., 1],
        rejected=counters[..., 2],
        failed=counters[..., 3],
        weights=per_server(("weights",), np.float64)[..., 0],
        safe_weights=per_server(("safe_weights",), np.float64)[..., 0],
    )


def _numbers(table: Any, name: str) -> NDArray[np.int64]:
    """A column; -1 for null."""
    return np.asarray(table.column(name).fill_null(-1).to_numpy())


def _flat(column: Any) -> NDArray[Any]:
    """All values of a column of lists, one after the other."""
    parts = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    return np.concatenate(parts) if parts else np.zeros(0)


def to_minari(
    recording: Recording | str | os.PathLike[str],
    dataset_id: str,
    *,
    algorithm_name: str | None = None,
    author: str | set[str] | None = None,
    author_email: str | set[str] | None = None,
    code_permalink: str | None = None,
    description: str | None = None,
    **keys: Any,
) -> Any:
    """Write a recording as a Minari dataset, which ``minari.load_dataset(dataset_id)`` then reads.

    Its steps and episodes are those of :meth:`Recording.transitions`. ``infos`` has, per observation, ``sequence_id``,
    ``timestamp`` (s), ``active``, ``applied_sequence_id`` and ``safe_weights`` as in the environment's. Its
    evaluation environment (``dataset.recover_environment(eval_env=True)``) is the simulator with the same keys, unless
    the reward is a function.

    Args:
        recording: the recording or its path.
        dataset_id: such as "balancers/lb0-v0"; no dataset of that name may exist.
        algorithm_name: the policy that set the weights.
        author: of the dataset.
        author_email: of the author.
        code_permalink: link to the code that made it.
        description: None: the region recorded and the reward.
        **keys: those of :meth:`Recording.transitions`.

    Returns:
        The ``minari.MinariDataset``.

    Raises:
        RecordingError: if the dataset exists, or there is no transition to write.
        InvalidOptionError: for an invalid dataset id.
        MissingExtraError: without minari, h5py or Pillow.
    """
    folder = check_dataset_id(dataset_id)
    import minari
    from minari.data_collector import EpisodeBuffer

    if not isinstance(recording, Recording):
        recording = load_recording(recording)
    steps = recording.transitions(**keys)
    buffers = []
    for episode in range(steps.episodes[-1] + 1):
        mine = np.flatnonzero(steps.episodes == episode)
        rows = np.append(steps.rows[mine], steps.next_rows[mine[-1]])
        infos = {
            "sequence_id": recording.sequence_id[rows],
            "timestamp": recording.timestamp[rows],
            "active": recording.active[rows],
            "applied_sequence_id": recording.applied_sequence_id[rows],
            "safe_weights": recording.safe[rows],
        }
        buffers.append(
            EpisodeBuffer(
                observations=_appended(_at(steps.observations, mine), _at(steps.next_observations, mine[-1:])),
                actions=steps.actions[mine],
                rewards=steps.rewards[mine],
                terminations=steps.terminated[mine],
                truncations=steps.truncated[mine],
                infos=infos,
            )
        )
    reward = keys.get("reward_type", "jain")
    if description is None:
        producers = sorted({producer["driver"] or "an unnamed driver" for producer in recording.metadata["producers"]})
        reward_name = make_reward(reward, keys.get("reward_field", "flow_duration_avg_decay")).description
        description = (
            f"{len(recording):,} observations of region {recording.metadata['region']!r}, published by "
            f"{', '.join(producers)}; reward {reward_name}"
        )
    try:
        # Minari warns of every missing description, which matters only when publishing a dataset.
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            return minari.create_dataset_from_buffers(
                dataset_id,
                buffers,
                eval_env=_simulator(recording, steps, keys) if isinstance(reward, (str, Mapping)) else None,
                observation_space=steps.layout.space,
                action_space=steps.codec.space,
                algorithm_name=algorithm_name,
                author=author,
                author_email=author_email,
                code_permalink=code_permalink,
                description=description,
                requirements=["lbgym"],
            )
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _appended(observations: Any, last: Any) -> Any:
    if isinstance(observations, dict):
        return {key: np.concatenate([values, last[key]]) for key, values in observations.items()}
    return np.concatenate([observations, last])


def check_dataset_id(dataset_id: str) -> Path:
    """Refuse a dataset id that :func:`to_minari` cannot write, before there is anything to write.

    Returns:
        The folder of the dataset.

    Raises:
        InvalidOptionError, RecordingError, MissingExtraError: as :func:`to_minari`.
    """
    # Minari's HDF5 storage imports Pillow without declaring it.
    for module in ("minari", "h5py", "PIL"):
        try:
            __import__(module)
        except ImportError:
            raise MissingExtraError(module, "offline", "a Minari dataset") from None
    from minari.dataset.minari_dataset import parse_dataset_id
    from minari.storage.datasets_root_dir import get_dataset_path

    try:
        parse_dataset_id(dataset_id)
    except (ValueError, TypeError):
        raise InvalidOptionError(
            f"a Minari dataset is named like balancers/lb0-v0: letters, digits, '-', '_', and a version; got "
            f"{dataset_id!r}"
        ) from None
    folder: Path = get_dataset_path(dataset_id)
    if folder.exists():
        raise RecordingError(
            f"the Minari dataset {dataset_id!r} exists already in {folder}; use another name or version"
        )
    return folder


def _simulator(recording: Recording, steps: Transitions, keys: dict[str, Any]) -> Any:
    """The simulated environment with the same spaces and reward, as a specification."""
    import gymnasium

    times = recording.timestamp
    spec = copy.deepcopy(gymnasium.spec("lbgym/LoadBalance-v0"))
    spec.kwargs = {
        "num_servers": steps.layout.num_servers,
        "step_interval": float(np.median(times[steps.next_rows] - times[steps.rows])),
        "action_type": "continuous",
    } | {key: value for key, value in keys.items() if key != "step"}
    return spec
