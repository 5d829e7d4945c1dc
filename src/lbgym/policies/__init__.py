"""Policies: heuristics that set weights by rule, and trained models."""

from __future__ import annotations

from .base import EnvPolicy, Policy, WeightPolicy
from .heuristics import (
    AdaptiveWeights,
    LatencyWeights,
    LittlesLawWeights,
    RandomWeights,
    StaticWeights,
    UniformWeights,
)
from .registry import make_policy, make_weight_policy, weight_policy_names
from .trained import TRAINED_SUFFIXES, SB3Policy, TrainedPolicy, load_policy

__all__ = [
    "TRAINED_SUFFIXES",
    "AdaptiveWeights",
    "EnvPolicy",
    "LatencyWeights",
    "LittlesLawWeights",
    "Policy",
    "RandomWeights",
    "SB3Policy",
    "StaticWeights",
    "TrainedPolicy",
    "UniformWeights",
    "WeightPolicy",
    "load_policy",
    "make_policy",
    "make_weight_policy",
    "weight_policy_names",
]
