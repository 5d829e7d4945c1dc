"""The observation of a balancer: the columns, and the reservoirs their statistics are drawn from."""

from .columns import (
    FEATURE_ALIASES,
    FEATURE_NAMES,
    GROUND_TRUTH_NAMES,
    NUM_FEATURES,
    NUM_GROUND_TRUTH,
    NUM_SERVICE,
    SERVICE_NAMES,
    STATISTICS,
    column_index,
)
from .reservoir import ReservoirSampler

__all__ = [
    "FEATURE_ALIASES",
    "FEATURE_NAMES",
    "GROUND_TRUTH_NAMES",
    "NUM_FEATURES",
    "NUM_GROUND_TRUTH",
    "NUM_SERVICE",
    "SERVICE_NAMES",
    "STATISTICS",
    "ReservoirSampler",
    "column_index",
]
