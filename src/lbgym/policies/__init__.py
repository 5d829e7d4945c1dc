"""Policies: heuristics that set weights by rule, trained models, and the agents that make weights of snapshots."""

from __future__ import annotations

from .agent import Agent, Policy
from .base import WeightPolicy
from .checkpoints import load_policy, read_checkpoint
from .heuristics import (
    AdaptiveWeights,
    LatencyWeights,
    LittlesLawWeights,
    RandomWeights,
    StaticWeights,
    UniformWeights,
)
from .registry import make_agent, make_policy, make_weight_policy, weight_policy_names
from .sb3 import SB3Policy
from .trained import TRAINED_SUFFIXES, TrainedPolicy

__all__ = [
    "TRAINED_SUFFIXES",
    "AdaptiveWeights",
    "Agent",
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
    "make_agent",
    "make_policy",
    "make_weight_policy",
    "read_checkpoint",
    "weight_policy_names",
]
