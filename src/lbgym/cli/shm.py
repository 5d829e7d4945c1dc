"""``lbgym shm``: look at regions of shared memory, record them, remove what is left over."""

from __future__ import annotations

import json
import math
import signal
import stat
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..env.rendering import _seconds as seconds
from ..env.rendering import _short as short
from ..errors import LbgymError, RegionError
from ..features.columns import FEATURE_NAMES, GROUND_TRUTH_NAMES
from ..snapshot import COUNTER_NAMES
from ._console import results_console

if TYPE_CHECKING:
    from ..recording import Summary
    from ..sharedmemory import Action, ObservationBuffer, SharedMemoryRegion

_NS = 1_000_000_000
#: Columns of ``inspect`` that stay together.
_GROUPS: tuple[dict[str, str], ...] = (
    {"n_flow_on": "open", "weight": "weight", "safe_weight": "safe"}
    | {"cpu_usage": "CPU", "memory_usage": "memory", "busy_workers": "busy"},
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
    {name: name for name in COUNTER_NAMES},
)
_COLORS = {"alive": "green", "dead": "red", "closed": "yellow", "none": "dim"}

Name = Annotated[str, typer.Argument(help="Name of the region.")]


def ls(
    every: Annotated[bool, typer.Option("--all", "-a", help="Also files that are no regions.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the regions of shared memory; of those that cannot be read, why."""
    from ..sharedmemory.system import directory

    folder = directory()
    try:
        rows = list(_rows(folder, every))
    except OSError as error:
        raise RegionError(f"cannot look for regions in {folder}: {error.strerror}") from error
    if as_json:
        _print_json(rows)
        return
    if not rows:
        typer.echo(f"no regions in {folder}")
        return
    console = results_console()
    for line in _listing(rows, console.width):
        console.print(line, soft_wrap=True)


def inspect(
    name: Name,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Print all that a region says: header, newest observation, action, who lives."""
    from ..sharedmemory import SharedMemoryRegion

    with SharedMemoryRegion.attach(name, read_only=True) as region:
        document = _document(region)
    if as_json:
        _print_json(document)
    else:
        _show(document)


def watch(
    name: Name,
    rate: Annotated[float, typer.Option(min=0.1, max=30.0, help="Pictures per second.")] = 4.0,
    once: Annotated[bool, typer.Option("--once", help="Print one picture and exit.")] = False,
) -> None:
    """Watch a region live: load, weights, FCT, who acts and who lives. Only looks; q or Ctrl-C ends it."""
    from ._watch import View, show_live

    console = results_console()
    try:
        with View(name) as view:
            if console.is_terminal and not once:
                show_live(view, console, rate)
                return
            view.look_twice()
            console.print(view.picture(console))
            while not once:
                sys.stdout.flush()
                view.look_until(time.monotonic() + 1.0 / rate)
                console.print(view.picture(console))
    except KeyboardInterrupt:
        # How one leaves, as top.
        pass


def record(
    name: Name,
    out: Annotated[Path, typer.Argument(help="The Parquet file to write.")],
    duration: Annotated[
        float | None, typer.Option(help="Seconds to record.", show_default="until it is stopped")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Observations to record.", show_default="until it is stopped")
    ] = None,
    interval: Annotated[
        float | None,
        typer.Option(help="Seconds between observations, on the data plane's clock.", show_default="every observation"),
    ] = None,
    minari: Annotated[
        str | None, typer.Option(metavar="DATASET_ID", help="Also write a Minari dataset, such as balancers/lb0-v0.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Record observations and the weights in force, for offline training. Only looks.

    Ctrl-C or SIGTERM ends the recording and finishes the file, exit code 0; a second one leaves it unfinished.
    """
    from .. import recording

    if minari is not None:
        recording.check_dataset_id(minari)
    with _stop_signals() as stop, _Progress(name, quiet=quiet) as progress:
        summary = recording.record(
            name,
            out,
            duration=duration,
            steps=steps,
            interval=interval,
            overwrite=overwrite,
            stop=stop.is_set,
            progress=progress,
        )
    typer.echo(f"wrote {out}: {_words(summary)}")
    if minari is not None:
        dataset = recording.to_minari(out, minari)
        typer.echo(f"wrote Minari dataset {minari}: {dataset.total_steps:,} steps, {dataset.total_episodes:,} episodes")


def rm(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Names of regions.")],
    force: Annotated[
        bool, typer.Option("--force", "-f", help="Also a region that is in use, or that this version cannot read.")
    ] = False,
) -> None:
    """Remove regions whose producer is gone. Never removes a file that is no region."""
    from ..sharedmemory import remove_region

    refused = False
    for name in names:
        try:
            remove_region(name, force=force)
        except LbgymError as error:
            print(f"lbgym: error: {error}", file=sys.stderr)
            refused = True
        else:
            typer.echo(f"removed {name}")
    if refused:
        raise typer.Exit(2)


def include() -> None:
    """Print the folder of the C headers, as for cc -I"$(lbgym shm include)"."""
    from ..sharedmemory import get_include

    typer.echo(get_include())


# Listing


def _rows(folder: Path, every: bool) -> Iterator[dict[str, Any]]:
    """What there is to say of each file that is a region, or may be one."""
    from ..sharedmemory.system import path_of

    for path in sorted(folder.iterdir()):
        try:
            path_of(path.name)
            status = path.lstat()
        except (RegionError, OSError):
            continue
        if not stat.S_ISREG(status.st_mode):
            continue
        try:
            begins_as_one = _begins_as_region(path)
        except PermissionError:
            # It may be one.
            begins_as_one = True
        except OSError:
            continue
        if begins_as_one or every:
            yield _row(path.name, status.st_size)


def _begins_as_region(path: Path) -> bool:
    from ..sharedmemory.abi import MAGIC

    with path.open("rb") as file:
        return file.read(8) == MAGIC.to_bytes(8, "little")


def _row(name: str, size: int) -> dict[str, Any]:
    from ..sharedmemory import SharedMemoryRegion

    row: dict[str, Any] = dict.fromkeys(
        ("name", "driver", "active", "servers", "capacity", "age", "observations", "producer", "agent", "version")
    )
    row |= {"name": name, "size": size, "problem": None}
    try:
        with SharedMemoryRegion.attach(name, read_only=True) as region:
            row |= {
                "driver": region.driver,
                "capacity": region.capacity,
                "observations": region.latest,
                "producer": producer_state(region),
                "agent": agent_state(region),
                "version": ".".join(map(str, region.version)),
            }
            buffer = region.new_buffer()
            if region.read_into(buffer):
                servers = buffer.num_servers
                row |= {"servers": servers, "active": int(buffer.active[:servers].sum())}
                row["age"] = _since(buffer.published_at)
    except LbgymError as error:
        row["problem"] = str(error)
    return row


def _listing(rows: list[dict[str, Any]], width: int) -> Iterator[Any]:
    """A line per region, with the columns that there is room for; what is wrong stands where the rest would."""
    from rich.text import Text

    def cells(row: dict[str, Any]) -> dict[str, str]:
        seen = row["servers"] is not None
        return {
            "region": row["name"],
            "driver": row["driver"],
            "servers": f"{row['active']}/{row['servers']}" if seen else "-",
            "room": f"{row['capacity']:,}",
            "age": age(row["age"]) if seen else "-",
            "observed": f"{row['observations']:,}",
            "producer": row["producer"],
            "agent": row["agent"],
            "version": row["version"],
            "size": f"{row['size'] / 1024:,.0f} KiB",
        }

    readable = [cells(row) for row in rows if row["version"] is not None]
    titles = ["region", "driver", "servers", "room", "age", "observed", "producer", "agent", "version", "size"]
    sizes = {title: max([len(title), *(len(row[title]) for row in readable)]) for title in titles}
    sizes["region"] = max([len("region"), *(len(row["name"]) for row in rows)])
    for title in ("size", "version", "room", "driver"):
        if sum(sizes[title] + 2 for title in titles) - 2 > width:
            titles.remove(title)
    left = ("region", "driver", "producer", "agent")

    def aligned(title: str, text: str) -> str:
        return text.ljust(sizes[title]) if title in left else text.rjust(sizes[title])

    yield Text("  ".join(aligned(title, title) for title in titles).rstrip(), "dim")
    for row in rows:
        line = Text.assemble((row["name"].ljust(sizes["region"]), "bold"))
        if row["version"] is not None:
            known = cells(row)
            for title in titles[1:]:
                line.append("  ")
                line.append(aligned(title, known[title]), _COLORS.get(known[title]))
            line.rstrip()
            yield line
            line = Text(" " * sizes["region"])
        if row["problem"]:
            # It says already which file it is.
            yield line.append(f"  {row['problem'].partition(': ')[2] or row['problem']}", "red")


def producer_state(region: SharedMemoryRegion) -> str:
    """Alive, closed or dead."""
    if region.closed_by_producer:
        return "closed"
    return "alive" if region.producer_alive else "dead"


def agent_state(region: SharedMemoryRegion) -> str:
    """Alive, dead or none."""
    if region.agent_alive:
        return "alive"
    return "none" if region.agent_pid is None else "dead"


# Inspecting


def _document(region: SharedMemoryRegion) -> dict[str, Any]:
    """All that a region says, to be written as JSON."""
    from ..sharedmemory import seqlock

    # What is read here belongs together, and so is to be read at once.
    seqlock.warm_up()
    status = region.path.stat()
    header = region._header().copy()
    problems = []
    buffer = region.new_buffer()
    observation = action = None
    try:
        observation = _observation(buffer) if region.read_into(buffer) else None
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
        "observation": observation,
        "action": action,
        "problems": problems,
    }


def _plain(value: Any) -> Any:
    value = value.item()
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _observation(buffer: ObservationBuffer) -> dict[str, Any]:
    n = buffer.num_servers
    servers = []
    for i in range(n):
        server: dict[str, Any] = {"id": i, "active": bool(buffer.active[i])}
        server |= dict(zip(FEATURE_NAMES, buffer.stats[i].tolist(), strict=True))
        if buffer.has_ground_truth:
            server |= dict(zip(GROUND_TRUTH_NAMES, buffer.ground_truth[i].tolist(), strict=True))
        server |= dict(zip(COUNTER_NAMES, buffer.counters[i].tolist(), strict=True))
        server |= {"weight": float(buffer.weights[i]), "safe_weight": float(buffer.safe_weights[i])}
        servers.append(server)
    return {
        "sequence_id": buffer.sequence_id,
        "timestamp": buffer.timestamp,
        "age": _since(buffer.published_at),
        "applied_sequence_id": buffer.applied_sequence_id,
        "applied_age": None if buffer.applied_at is None else _since(buffer.applied_at),
        "safe_weights_in_force": buffer.safe,
        "unrouted": buffer.unrouted,
        "fct_count": buffer.fct_count,
        "fct_sum": buffer.fct_sum_ns / _NS,
        "servers": servers,
    }


def _action(action: Action) -> dict[str, Any]:
    n, passed = action.num_servers, _since(action.written_at)
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
    console.print(f"[bold]{document['name']}[/bold]  {escape(header['driver'])}", soft_wrap=True)
    facts = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    facts.add_row(
        "file", f"{document['path']}, {document['size']:,} bytes, {document['mode']}, user {document['user']}, "
        f"group {document['group']}",
    )  # fmt: skip
    facts.add_row(
        "binary interface",
        f"{header['version_major']}.{header['version_minor']}, room for {header['capacity']:,} servers, "
        f"{header['num_frames']} frames of {header['frame_size']:,} bytes, {header['num_actions']} actions of "
        f"{header['action_size']:,} bytes",
    )
    rate = header["clock_rate"]
    of = "" if rate == 1.0 else f" on its clock, which runs {rate:g} times as fast"
    facts.add_row("plan", f"an observation every {seconds(header['publish_interval'] / _NS)}{of}")
    facts.add_row(
        "producer",
        f"{_colored(producer['state'])}, process {producer['pid']}, created {age(producer['up'])} ago, last heard "
        f"{age(producer['heartbeat_age'])} ago; instance {header['instance']}",
    )
    who = "" if agent["pid"] is None else f", process {agent['pid']}, last heard {age(agent['heartbeat_age'])} ago"
    facts.add_row("agent", _colored(agent["state"]) + who)
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
    """All that is known of each server, in as few tables as the width allows."""
    from rich import box
    from rich.table import Table

    ids = [f"{server['id']}" if server["active"] else f"out {server['id']}" for server in servers]
    first = max(map(len, ["server", *ids]))
    tables: list[list[tuple[str, list[str]]]] = []
    for titles in _GROUPS:
        group = [
            (title, [_cell(name, server[name]) for server in servers])
            for name, title in titles.items()
            if servers and name in servers[0]
        ]
        both = [*(tables[-1] if tables else []), *group]
        # A column is set off by a space on either side and one between.
        if tables and first + sum(max(map(len, [title, *cells])) + 3 for title, cells in both) <= width:
            tables[-1] = both
        else:
            tables.append(group)
    for columns in tables:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for title in ("server", *(title for title, _ in columns)):
            table.add_column(title, justify="right", no_wrap=True)
        for i, name in enumerate(ids):
            cells = [cells[i] for _, cells in columns]
            table.add_row(name, *cells, style=None if servers[i]["active"] else "dim")
        yield ""
        yield table


def _cell(name: str, value: Any) -> str:
    if name in COUNTER_NAMES:
        return f"{value:,}"
    if name.endswith("_usage"):
        return f"{value:.0%}"
    return seconds(value) if name.startswith(("fct", "duration")) else short(value)


# Words


def age(value: float) -> str:
    """How long ago, or for how long, in a few characters."""
    if not math.isfinite(value):
        return "never"
    if value < 1e-3:
        return f"{value * 1e3:.2f} ms"
    if value < 600.0:
        return seconds(value)
    unit, length = ("min", 60.0) if value < 6000.0 else ("h", 3600.0) if value < 360_000.0 else ("d", 86_400.0)
    return f"{value / length:.3g} {unit}"


def lease(whole: float, left: float) -> str:
    """How long weights are still good."""
    if math.isinf(whole):
        return "good for ever"
    return f"lease {left:.1f} of {whole:.3g} s left" if left > 0.0 else f"lease of {whole:.3g} s over"


def clock(rate: float) -> str:
    """How fast the data plane's clock is, if not as everybody's."""
    return "" if rate == 1.0 else f" x{rate:g}"


def _colored(state: str) -> str:
    return f"[{_COLORS[state]}]{state}[/]"


def _since(instant: int) -> float:
    return max(0, time.monotonic_ns() - instant) / _NS


def _print_json(document: Any) -> None:
    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, list):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    typer.echo(json.dumps(finite(document), indent=1, allow_nan=False))


# Recording


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; the second one interrupts at once."""
    stop = threading.Event()

    def handle(_number: int, _frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Progress:
    """A line on standard error that says what has been recorded so far."""

    def __init__(self, name: str, *, quiet: bool) -> None:
        from rich.console import Console
        from rich.live import Live

        console = Console(stderr=True, highlight=False)
        self._name, self._quiet = name, quiet or not console.is_terminal
        self._live = Live(console=console, transient=True, refresh_per_second=4)

    def __enter__(self) -> _Progress:
        if not self._quiet:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def __call__(self, summary: Summary) -> None:
        if not self._quiet:
            from rich.text import Text

            self._live.update(Text(f"recording {self._name}: {_words(summary)}; Ctrl-C ends it"))


def _words(summary: Summary) -> str:
    rows = summary.observations
    parts = [f"{rows:,} observation{'s' * (rows != 1)} in {summary.seconds:.1f} s", f"{summary.missed:,} missed"]
    if summary.invalid:
        parts.append(f"{summary.invalid:,} invalid")
    if summary.restarts:
        parts.append(f"{summary.restarts:,} restart{'s' * (summary.restarts != 1)} of the producer")
    return ", ".join(parts)
