"""``lbgym shm ls`` and ``include``."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from ...errors import LbgymError, RegionError
from ...formatting import age
from .._console import print_json, results_console
from .._words import STATE_STYLES, since


def ls(
    every: Annotated[bool, typer.Option("--all", "-a", help="Also files that are no regions.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the regions of shared memory; of those that cannot be read, why."""
    from ...sharedmemory.system import directory

    folder = directory()
    try:
        rows = list(_rows(folder, every))
    except OSError as error:
        raise RegionError(f"cannot look for regions in {folder}: {error.strerror}") from error
    if as_json:
        print_json(rows)
        return
    if not rows:
        typer.echo(f"no regions in {folder}")
        return
    console = results_console()
    for line in _listing(rows, console.width):
        console.print(line, soft_wrap=True)


def include() -> None:
    """Print the folder of the C headers, as for cc -I"$(lbgym shm include)"."""
    from ...sharedmemory import get_include

    typer.echo(get_include())


def _rows(folder: Path, every: bool) -> Iterator[dict[str, Any]]:
    """Describe each file that is a region, or may be one."""
    from ...sharedmemory.system import path_of

    for path in sorted(folder.iterdir()):
        try:
            path_of(path.name)
            status = path.lstat()
        except (RegionError, OSError):
            continue
        if not stat.S_ISREG(status.st_mode):
            continue
        try:
            begins_as_one = begins_as_region(path)
        except PermissionError:
            # It may be one.
            begins_as_one = True
        except OSError:
            continue
        if begins_as_one or every:
            yield _row(path.name, status.st_size)


def begins_as_region(path: Path) -> bool:
    """True if a file begins as a region does."""
    from ...sharedmemory.abi import MAGIC

    with path.open("rb") as file:
        return file.read(8) == MAGIC.to_bytes(8, "little")


def _row(name: str, size: int) -> dict[str, Any]:
    from ...monitor import agent_state, producer_state
    from ...sharedmemory import SharedMemoryRegion

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
                row["age"] = since(buffer.published_at)
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
                line.append(aligned(title, known[title]), STATE_STYLES.get(known[title]))
            line.rstrip()
            yield line
            line = Text(" " * sizes["region"])
        if row["problem"]:
            # It says already which file it is.
            yield line.append(f"  {row['problem'].partition(': ')[2] or row['problem']}", "red")
