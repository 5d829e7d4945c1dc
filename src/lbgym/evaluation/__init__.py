"""Compare policies on the same flows: runs in several processes, statistics, tables, plots, files."""

from __future__ import annotations

from .comparison import compare
from .contenders import SHORTHANDS, WEIGHTED_RULES, Contender, parse_contender, parse_contenders
from .files import save
from .results import COUNTS, METRICS, Comparison, Conditions, Run, RunSettings, Series
from .runner import simulate
from .statistics import Difference, Interval, jain_index, mean_interval, paired_difference
from .tables import Cell, Table, Verdict

__all__ = [
    "COUNTS",
    "METRICS",
    "SHORTHANDS",
    "WEIGHTED_RULES",
    "Cell",
    "Comparison",
    "Conditions",
    "Contender",
    "Difference",
    "Interval",
    "Run",
    "RunSettings",
    "Series",
    "Table",
    "Verdict",
    "compare",
    "jain_index",
    "mean_interval",
    "paired_difference",
    "parse_contender",
    "parse_contenders",
    "save",
    "simulate",
]
