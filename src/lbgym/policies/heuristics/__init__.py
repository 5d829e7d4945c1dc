"""Weights by rule, a file per kind; :mod:`lbgym.policies.registry` has them by name with the source of each."""

from __future__ import annotations

from .feedback import AIMDWeights, Gradient2Weights, PIDWeights
from .field import FieldWeights
from .ground_truth import AdaptiveWeights, OrcaWeights, PIDCPUWeights
from .knapsack import KnapsackWeights
from .latency import LatencyWeights, PeakEwmaWeights
from .littles_law import LittlesLawWeights
from .slow_start import SlowStartWeights
from .static import RandomWeights, StaticWeights, UniformWeights
from .tables import C3Weights, HotColdWeights, IdleQueueWeights, NeverQueueWeights

__all__ = [
    "AIMDWeights",
    "AdaptiveWeights",
    "C3Weights",
    "FieldWeights",
    "Gradient2Weights",
    "HotColdWeights",
    "IdleQueueWeights",
    "KnapsackWeights",
    "LatencyWeights",
    "LittlesLawWeights",
    "NeverQueueWeights",
    "OrcaWeights",
    "PIDCPUWeights",
    "PIDWeights",
    "PeakEwmaWeights",
    "RandomWeights",
    "SlowStartWeights",
    "StaticWeights",
    "UniformWeights",
]
