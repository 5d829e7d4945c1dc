"""Compare policies on the same flows: runs in several processes, statistics, tables, plots, files."""

from __future__ import annotations

from ..scenarios import WEIGHTED_RULES
from .comparison import Comparison, compare
from .contenders import SHORTHANDS, Contender, parse_contender, parse_contenders
from .runner import COUNTS, METRICS, Run, RunSettings, Series, simulate
from .statistics import Difference, Interval, jain_index, mean_interval, paired_difference

__all__ = [
    "COUNTS",
    "METRICS",
    "SHORTHANDS",
    "WEIGHTED_RULES",
    "Comparison",
    "Contender",
    "Difference",
    "Interval",
    "Run",
    "RunSettings",
    "Series",
    "compare",
    "jain_index",
    "mean_interval",
    "paired_difference",
    "parse_contender",
    "parse_contenders",
    "simulate",
]
