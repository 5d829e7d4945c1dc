"""Files of a comparison, each written whole or not at all."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..atomic import whole_file
from .results import COUNTS, METRICS, Comparison


def save(comparison: Comparison, folder: str | Path, *, plots: bool = True) -> list[Path]:
    """Write a comparison into a folder, created if need be, each file whole or not at all.

    ``results.parquet`` (``results.csv`` without pyarrow): one row per run; ``flows.parquet``: one row per flow, if
    flows were kept; ``summary.json``; ``fct_distribution.png`` and ``load_and_weights.png``.

    Returns:
        The files, in the order they were written.

    Raises:
        FileWriteError: if a file cannot be written.
        MissingExtraError: if plots are wanted and Matplotlib is not installed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = [_save_rows(results_columns(comparison), folder / "results")]
    if comparison.settings.keep_flows:
        files.append(_save_rows(flow_columns(comparison), folder / "flows"))
    with whole_file(folder / "summary.json") as path:
        path.write_text(json.dumps(comparison.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    files.append(folder / "summary.json")
    if plots:
        from . import plots as draw

        figures: dict[str, Callable[[Comparison], Any]] = {
            "fct_distribution.png": draw.fct_distribution,
            "load_and_weights.png": draw.load_and_weights,
        }
        for name, figure in figures.items():
            with whole_file(folder / name) as path:
                figure(comparison).savefig(path, dpi=150)
            files.append(folder / name)
    return files


def results_columns(comparison: Comparison) -> dict[str, list[Any]]:
    """One row per run: contender, seed, dispatch rule, metrics, counts, each server's utilization."""
    runs = comparison.runs
    columns: dict[str, list[Any]] = {
        "contender": [run.label for run in runs],
        "seed": [run.seed for run in runs],
        "dispatch": [run.dispatch for run in runs],
    }
    columns |= {name: [run.metrics[name] for run in runs] for name in METRICS}
    columns |= {name: [run.metrics[name] for run in runs] for name in COUNTS}
    for j in range(len(runs[0].utilization)):
        columns[f"utilization_{j}"] = [float(run.utilization[j]) for run in runs]
    return columns


def flow_columns(comparison: Comparison) -> dict[str, Any]:
    """One row per flow that counts, of every run that kept its flows."""
    kept = [run for run in comparison.runs if run.flows is not None]
    lengths = [len(run.flows["fct"]) for run in kept if run.flows is not None]
    columns: dict[str, Any] = {
        "contender": np.repeat(np.array([run.label for run in kept], dtype=object), lengths),
        "seed": np.repeat(np.array([run.seed for run in kept], dtype=np.int64), lengths),
    }
    for name in ("flow_id", "arrival", "fct", "demand", "server", "balancer", "status"):
        columns[name] = np.concatenate([run.flows[name] for run in kept if run.flows is not None])
    return columns


def _save_rows(columns: dict[str, Any], base: Path) -> Path:
    """``base.parquet``, or ``base.csv`` without pyarrow."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        target = base.with_suffix(".csv")
        with whole_file(target) as path, path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(columns)
            # repr of a float is the shortest text that reads back as the same number.
            writer.writerows(zip(*columns.values(), strict=True))
        return target
    target = base.with_suffix(".parquet")
    with whole_file(target) as path:
        parquet.write_table(pyarrow.table(columns), path)
    return target
