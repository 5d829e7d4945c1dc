"""Policies: heuristics that set weights by rule, trained models, and the agents that make weights of snapshots."""

from __future__ import annotations

from .agent import Agent, Policy
from .base import WeightPolicy
from .checkpoints import load_policy, read_checkpoint
from .heuristics import (
    AdaptiveWeights,
    AIMDWeights,
    C3Weights,
    FieldWeights,
    Gradient2Weights,
    HotColdWeights,
    IdleQueueWeights,
    KnapsackWeights,
    LatencyWeights,
    LittlesLawWeights,
    NeverQueueWeights,
    OrcaWeights,
    PeakEwmaWeights,
    PIDCPUWeights,
    PIDWeights,
    RandomWeights,
    SlowStartWeights,
    StaticWeights,
    UniformWeights,
)
from .registry import HEURISTICS, Heuristic, heuristic, make_agent, make_policy, make_weight_policy, weight_policy_names
from .sb3 import SB3Policy
from .trained import TRAINED_SUFFIXES, TrainedPolicy

__all__ = [
    "HEURISTICS",
    "TRAINED_SUFFIXES",
    "AIMDWeights",
    "AdaptiveWeights",
    "Agent",
    "C3Weights",
    "FieldWeights",
    "Gradient2Weights",
    "Heuristic",
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
    "Policy",
    "RandomWeights",
    "SB3Policy",
    "SlowStartWeights",
    "StaticWeights",
    "TrainedPolicy",
    "UniformWeights",
    "WeightPolicy",
    "heuristic",
    "load_policy",
    "make_agent",
    "make_policy",
    "make_weight_policy",
    "read_checkpoint",
    "weight_policy_names",
]
