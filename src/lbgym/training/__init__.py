"""Recipes that train policies: PPO and SAC-GRU in plain torch, and Stable-Baselines3 through a thin adapter.

Importing this package imports neither torch nor Stable-Baselines3; the names below load them when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .ppo import PPOConfig, PPOPolicy, TrainingResult, train_ppo
    from .runs import Progress, load_policy, read_checkpoint
    from .sac_gru import SACGRUConfig, SACGRUPolicy, SACGRUResult, train_sac_gru
    from .sb3 import SB3Config, SB3VecEnv, train_sb3
    from .sb3_policies import EquivariantExtractor, EquivariantPolicy, EquivariantQPolicy, EquivariantSACPolicy

_HOMES = {
    "PPOConfig": "ppo",
    "PPOPolicy": "ppo",
    "Progress": "runs",
    "TrainingResult": "ppo",
    "load_policy": "runs",
    "read_checkpoint": "runs",
    "train_ppo": "ppo",
    "SACGRUConfig": "sac_gru",
    "SACGRUPolicy": "sac_gru",
    "SACGRUResult": "sac_gru",
    "train_sac_gru": "sac_gru",
    "SB3Config": "sb3",
    "SB3VecEnv": "sb3",
    "train_sb3": "sb3",
    "EquivariantExtractor": "sb3_policies",
    "EquivariantPolicy": "sb3_policies",
    "EquivariantQPolicy": "sb3_policies",
    "EquivariantSACPolicy": "sb3_policies",
}

__all__ = [
    "EquivariantExtractor",
    "EquivariantPolicy",
    "EquivariantQPolicy",
    "EquivariantSACPolicy",
    "PPOConfig",
    "PPOPolicy",
    "Progress",
    "SACGRUConfig",
    "SACGRUPolicy",
    "SACGRUResult",
    "SB3Config",
    "SB3VecEnv",
    "TrainingResult",
    "load_policy",
    "read_checkpoint",
    "train_ppo",
    "train_sac_gru",
    "train_sb3",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
