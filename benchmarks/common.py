"""What every benchmark shares: its options, the machine it ran on, a Markdown table, a JSON file."""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

import numpy as np


def parser(description: str) -> argparse.ArgumentParser:
    """The options all benchmarks take."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument("--quick", action="store_true", help="small sizes, to see that it runs; not for figures")
    options.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options.add_argument("--out", type=Path, default=None, help="folder for JSON and PNG files")
    return options


def machine() -> dict[str, Any]:
    """Processor, cores this process may use, system and versions."""
    cpu = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = {}
    for package in ("numpy", "numba", "gymnasium", "simpy", "ciw"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {"cpu": cpu, "cores": cores, "system": platform.system(), "python": platform.python_version()} | versions


def describe_run() -> str:
    """One line: where and when this ran."""
    facts = machine()
    cores = facts.pop("cores")
    head = f"{facts.pop('cpu')}, {cores} core{'s' if cores != 1 else ''}, {facts.pop('system')}"
    return f"{head}; " + ", ".join(f"{k} {v}" for k, v in facts.items()) + f"; {datetime.date.today().isoformat()}"


def number(value: Any, digits: int = 4) -> str:
    """A number as a reader wants it: few digits, thousands separated."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "NO"
    if isinstance(value, (int, np.integer)):
        return f"{value:,}"
    if isinstance(value, (float, np.floating)):
        if value != 0 and abs(value) < 1e-3:
            return f"{value:.2e}"
        if abs(value) >= 1e4:
            return f"{value:,.0f}"
        return f"{value:.{digits}g}"
    return str(value)


def markdown(rows: Iterable[Sequence[Any]], header: Sequence[str]) -> str:
    """A Markdown table, columns aligned for people who read it in a terminal."""
    cells = [list(header), *[[number(value) for value in row] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    right = [i > 0 for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True))
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True)) + "|"
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])


def jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(v) for v in value]
    if isinstance(value, np.ndarray):
        return jsonable(value.tolist())
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def run_if_possible(main: Callable[[], int]) -> NoReturn:
    """Run a benchmark that needs rights or tools which are not everywhere; where it cannot, say why."""
    from lbgym.drivers import DriverError

    try:
        sys.exit(main())
    except DriverError as error:
        sys.exit(f"not measured: {error}")


def report(name: str, options: argparse.Namespace, text: str, data: dict[str, Any]) -> None:
    """Print the result and, with ``--out``, write it to ``OUT/NAME.json`` and ``OUT/NAME.md``."""
    data = {
        "benchmark": name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "quick": options.quick,
    } | data
    document = json.dumps(jsonable(data), indent=2)
    text = f"{text}\n\n{describe_run()}" + ("; quick run, not for figures" if options.quick else "")
    sys.stdout.write((document if options.json else text) + "\n")
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"{name}.json").write_text(document + "\n")
        (options.out / f"{name}.md").write_text(text + "\n")
