"""``lbgym shm inspect``."""

from __future__ import annotations

import math
import stat
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...errors import RegionError
from ...features.columns import FEATURE_NAMES, GROUND_TRUTH_NAMES
from ...formatting import age, seconds, short, shortened
from .._console import heading, print_json, results_console
from .._words import lease, since, state
from ._arguments import Name

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ...sharedmemory import Action, ObservationBuffer, SharedMemoryRegion

_NS = 1_000_000_000
#: Columns of ``inspect`` that stay together.
_GROUPS: tuple[dict[str, str], ...] = (
    {"state": "state", "n_flow_on": "open", "weight": "weight", "safe_weight": "safe"}
    | {"cpu_usage": "CPU", "memory_usage": "memory", "busy_workers": "busy", "ground_truth_age": "measured"},
    *(
        {
            f"{metric}_mean": f"{title} mean",
            f"{metric}_p90": "p90",
            f"{metric}_std": "std",
            f"{metric}_mean_decay": "decayed mean",
            f"{metric}_p90_decay": "p90",
        }
        for metric, title in (("fct", "FCT"), ("duration", "duration"))
    ),
)


def inspect(
    name: Name,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Print everything in a region: header, newest observation and action, producer and agent."""
    from ...sharedmemory import SharedMemoryRegion

    with SharedMemoryRegion.attach(name, read_only=True) as region:
        document = _document(region)
    if as_json:
        print_json(document)
    else:
        _show(document)


def _document(region: SharedMemoryRegion) -> dict[str, Any]:
    """The contents of a region, for JSON."""
    from ...monitor import agent_state, producer_state
    from ...sharedmemory import seqlock

    # Compiled beforehand, so that what belongs together is read at once.
    seqlock.warm_up()
    status = region.path.stat()
    header = region._header().copy()
    problems = []
    buffer = region.new_buffer()
    observation = action = None
    try:
        observation = _observation(region, buffer) if region.read_into(buffer) else None
    except RegionError as error:
        problems.append(str(error))
    try:
        found = region.read_action()
        action = None if found is None else _action(found)
    except RegionError as error:
        problems.append(str(error))
    return {
        "name": region.name,
        "path": str(region.path),
        "size": status.st_size,
        "mode": stat.filemode(status.st_mode),
        "user": status.st_uid,
        "group": status.st_gid,
        "header": {field: _plain(header[field]) for field in header.dtype.names}
        | {"magic": int(header["magic"]).to_bytes(8, "little").decode("ascii"), "driver": region.driver},
        "producer": {
            "state": producer_state(region),
            "pid": region.producer_pid,
            "heartbeat_age": region.heartbeat_age,
            "up": time.time() - region.created_at,
        },
        "agent": {
            "state": agent_state(region),
            "pid": region.agent_pid,
            "heartbeat_age": region.agent_heartbeat_age,
        },
        "real_features": [name for name in (*FEATURE_NAMES, *GROUND_TRUTH_NAMES) if name in region.real_features],
        "observation": observation,
        "action": action,
        "problems": problems,
    }


def _plain(value: Any) -> Any:
    value = value.item()
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _observation(region: SharedMemoryRegion, buffer: ObservationBuffer) -> dict[str, Any]:
    """The newest observation; what this data plane does not measure is None."""
    from ...monitor import state_names
    from ...snapshot import COUNTER_NAMES

    def measured(names: tuple[str, ...], values: NDArray[np.float32]) -> dict[str, float | None]:
        pairs = zip(names, values.tolist(), strict=True)
        return {name: value if name in region.real_features else None for name, value in pairs}

    n = buffer.num_servers
    try:
        names = region.server_names
    except RegionError:
        # The observation is worth having without them.
        names = ("",) * n
    states, ages = state_names(buffer.states[:n]), buffer.ground_truth_age[:n].tolist()
    known = [math.isfinite(age) for age in ages]
    servers = []
    for i in range(n):
        server: dict[str, Any] = {"id": i, "name": names[i] if i < len(names) else "", "state": states[i]}
        server |= {"active": bool(buffer.active[i])}
        server |= measured(FEATURE_NAMES, buffer.stats[i])
        if buffer.has_ground_truth:
            server |= measured(GROUND_TRUTH_NAMES, buffer.ground_truth[i])
            if any(known) and not known[i]:
                # A data plane that publishes ages has none for servers that were not measured.
                server |= dict.fromkeys(GROUND_TRUTH_NAMES)
            server["ground_truth_age"] = ages[i] if known[i] else None
        server |= dict(zip(COUNTER_NAMES, buffer.counters[i].tolist(), strict=True))
        server |= {"weight": float(buffer.weights[i]), "safe_weight": float(buffer.safe_weights[i])}
        servers.append(server)
    return {
        "sequence_id": buffer.sequence_id,
        "timestamp": buffer.timestamp,
        "age": since(buffer.published_at),
        "applied_sequence_id": buffer.applied_sequence_id,
        "applied_age": None if buffer.applied_at is None else since(buffer.applied_at),
        "safe_weights_in_force": buffer.safe,
        "unrouted": buffer.unrouted,
        "fct_count": buffer.fct_count,
        "fct_sum": buffer.fct_sum_ns / _NS,
        "servers": servers,
    }


def _action(action: Action) -> dict[str, Any]:
    n, passed = action.num_servers, since(action.written_at)
    return {
        "sequence_id": action.sequence_id,
        "age": passed,
        "lease": action.lease,
        "lease_left": max(0.0, action.lease - passed),
        "weights": action.weights[:n].tolist(),
        "threshold": action.threshold[:n].tolist(),
        "alias": action.alias[:n].tolist(),
    }


def _show(document: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    console = results_console()
    header, producer, agent = document["header"], document["producer"], document["agent"]
    observation, action = document["observation"], document["action"]
    console.print(heading(document["name"], f"  {header['driver']}"), soft_wrap=True)
    facts = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    facts.add_row(
        "file", f"{escape(document['path'])}, {document['size']:,} bytes, {document['mode']}, user {document['user']}, "
        f"group {document['group']}",
    )  # fmt: skip
    facts.add_row(
        "binary interface",
        f"{header['version_major']}.{header['version_minor']}, room for {header['capacity']:,} servers, "
        f"{header['num_frames']} frames of {header['frame_size']:,} bytes, {header['num_actions']} actions of "
        f"{header['action_size']:,} bytes",
    )
    absent = [name for name in (*FEATURE_NAMES, *GROUND_TRUTH_NAMES) if name not in document["real_features"]]
    if absent:
        facts.add_row("not measured", ", ".join(absent))
    rate = header["clock_rate"]
    of = "" if rate == 1.0 else f" on its clock, which runs {rate:g} times as fast"
    facts.add_row("plan", f"an observation every {seconds(header['publish_interval'] / _NS)}{of}")
    facts.add_row(
        "producer",
        f"{state(producer['state'])}, process {producer['pid']}, created {age(producer['up'])} ago, last heard "
        f"{age(producer['heartbeat_age'])} ago; instance {header['instance']}",
    )
    who = "" if agent["pid"] is None else f", process {agent['pid']}, last heard {age(agent['heartbeat_age'])} ago"
    facts.add_row("agent", state(agent["state"]) + who)
    if action is None:
        facts.add_row("action", "none")
    else:
        facts.add_row(
            "action",
            f"{action['sequence_id']:,}, {age(action['age'])} old, for {len(action['weights'])} servers; "
            + lease(action["lease"], action["lease_left"]),
        )
    if observation is None:
        facts.add_row("observation", "none")
    else:
        facts.add_row(
            "observation",
            f"{observation['sequence_id']:,}, {age(observation['age'])} old, the data plane's clock shows "
            f"{observation['timestamp']:,.3f} s",
        )
        applied = observation["applied_sequence_id"]
        safe = "the safe weights" if observation["safe_weights_in_force"] else f"those of action {applied}"
        since = "" if applied is None else f"; action {applied} was applied {age(observation['applied_age'])} ago"
        facts.add_row("weights in force", safe + since)
        ended = observation["fct_count"]
        mean = f", mean FCT {seconds(observation['fct_sum'] / ended)}" if ended else ""
        facts.add_row("flows", f"{ended:,} ended{mean}; {observation['unrouted']:,} found no server")
    for problem in document["problems"]:
        facts.add_row("problem", f"[red]{escape(problem)}[/red]")
    console.print(facts)
    if observation is None:
        return
    for table in _tables(observation["servers"], console.width):
        console.print(table)


def _tables(servers: list[dict[str, Any]], width: int) -> Iterator[Any]:
    """All columns of the servers, in as few tables as the width allows."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from ...monitor import server_labels
    from ...snapshot import COUNTER_NAMES

    named = any(server["name"] for server in servers)
    labels = [
        shortened(label, max(12, width // 5))
        for label in server_labels([server["name"] for server in servers], len(servers))
    ]
    first = max(map(len, ["server", *labels]))
    tables: list[list[tuple[str, list[str]]]] = []
    for titles in (*_GROUPS, {name: name for name in COUNTER_NAMES}):
        group = [
            (title, [_cell(name, server) for server in servers])
            for name, title in titles.items()
            if servers
            and name in servers[0]
            and (name != "ground_truth_age" or any(server[name] is not None for server in servers))
        ]
        both = [*(tables[-1] if tables else []), *group]
        # A column is set off by a space on either side and one between.
        if tables and first + sum(max(map(len, [title, *cells])) + 3 for title, cells in both) <= width:
            tables[-1] = both
        else:
            tables.append(group)
    for columns in tables:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        table.add_column("server", justify="left" if named else "right", no_wrap=True)
        for title, _ in columns:
            table.add_column(title, justify="left" if title == "state" else "right", no_wrap=True)
        for i, label in enumerate(labels):
            cells = [cells[i] for _, cells in columns]
            table.add_row(Text(label), *cells, style=None if servers[i]["active"] else "dim")
        yield ""
        yield table


def _cell(name: str, server: dict[str, Any]) -> str:
    value = server[name]
    if value is None:
        return "-"
    if name == "state":
        return f"{value}, out" if value == "unknown" and not server["active"] else str(value)
    if name == "ground_truth_age":
        return f"{age(value)} ago" if value >= 1e-3 else "now"
    if isinstance(value, int):
        return f"{value:,}"
    if name.endswith("_usage"):
        return f"{value:.0%}"
    return seconds(value) if name.startswith(("fct", "duration")) else short(value)
