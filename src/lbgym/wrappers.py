"""Wrappers by the import path of the documentation; they live in :mod:`lbgym.env.wrappers`."""

from .env.wrappers import DelayedAction, LegacyGymWrapper, MultiDiscreteToDiscrete, SmoothWeights, StripGroundTruth

__all__ = ["DelayedAction", "LegacyGymWrapper", "MultiDiscreteToDiscrete", "SmoothWeights", "StripGroundTruth"]
