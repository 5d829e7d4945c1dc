"""What drivers of proxies share: rows, counters and FCTs by server, whole weights, processes that come and go."""

from .counters import FlowCounters
from .places import Place, parse_place, shown
from .processes import Followed, Process
from .source import ProxySource
from .times import FctStatistics, FlowTimes, Log
from .weights import whole_weights

__all__ = [
    "FctStatistics",
    "FlowCounters",
    "FlowTimes",
    "Followed",
    "Log",
    "Place",
    "Process",
    "ProxySource",
    "parse_place",
    "shown",
    "whole_weights",
]
