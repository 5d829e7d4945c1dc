"""Recipes that train policies: in plain torch, and with Stable-Baselines3, RLlib, BenchMARL and TorchRL.

:data:`RECIPES` has them by name and :func:`train` runs any of them; :func:`train_on_ray` does so on a cluster, and
:func:`tune_recipe` searches for settings. Importing this package imports no framework; the names below load what they
need when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..policies.checkpoints import load_policy, read_checkpoint
    from ..policies.neural import ExportedPolicy, PPOPolicy, SACGRUPolicy
    from ..ray_cluster import ClusterError
    from .benchmarl import BenchMARLConfig, BenchMARLResult, LoadBalanceTask, train_benchmarl
    from .cluster import ClusterResult, train_on_ray
    from .config import TrainingConfig
    from .networks import FlatServerNetwork
    from .ppo import PPOConfig, PPOResult, train_ppo
    from .recipes import RECIPES, TrainingResult, algo_of, make_config, read_config, to_toml, train
    from .rllib import RLlibConfig, RLlibResult, train_rllib
    from .runs import Progress
    from .sac_gru import SACGRUAgent, SACGRUConfig, SACGRUResult, train_sac_gru
    from .sb3 import SB3Config, SB3Result, SB3VecEnv, train_sb3
    from .sb3_policies import EquivariantExtractor, EquivariantPolicy, EquivariantQPolicy, EquivariantSACPolicy
    from .torchrl_env import MultiTorchRLEnv, TorchRLEnv
    from .tuning import TuningResult, parse_space, tune_recipe

_HOMES = {
    "BenchMARLConfig": "benchmarl",
    "BenchMARLResult": "benchmarl",
    "LoadBalanceTask": "benchmarl",
    "train_benchmarl": "benchmarl",
    "ClusterError": ".ray_cluster",
    "ClusterResult": "cluster",
    "train_on_ray": "cluster",
    "TrainingConfig": "config",
    "ExportedPolicy": ".policies.neural",
    "FlatServerNetwork": "networks",
    "PPOConfig": "ppo",
    "PPOPolicy": ".policies.neural",
    "PPOResult": "ppo",
    "train_ppo": "ppo",
    "RECIPES": "recipes",
    "TrainingResult": "recipes",
    "algo_of": "recipes",
    "make_config": "recipes",
    "read_config": "recipes",
    "to_toml": "recipes",
    "train": "recipes",
    "RLlibConfig": "rllib",
    "RLlibResult": "rllib",
    "train_rllib": "rllib",
    "Progress": "runs",
    "load_policy": ".policies.checkpoints",
    "read_checkpoint": ".policies.checkpoints",
    "SACGRUAgent": "sac_gru",
    "SACGRUConfig": "sac_gru",
    "SACGRUPolicy": ".policies.neural",
    "SACGRUResult": "sac_gru",
    "train_sac_gru": "sac_gru",
    "SB3Config": "sb3",
    "SB3Result": "sb3",
    "SB3VecEnv": "sb3",
    "train_sb3": "sb3",
    "EquivariantExtractor": "sb3_policies",
    "EquivariantPolicy": "sb3_policies",
    "EquivariantQPolicy": "sb3_policies",
    "EquivariantSACPolicy": "sb3_policies",
    "TorchRLEnv": "torchrl_env",
    "MultiTorchRLEnv": "torchrl_env",
    "TuningResult": "tuning",
    "parse_space": "tuning",
    "tune_recipe": "tuning",
}

__all__ = [
    "RECIPES",
    "BenchMARLConfig",
    "BenchMARLResult",
    "ClusterError",
    "ClusterResult",
    "EquivariantExtractor",
    "EquivariantPolicy",
    "EquivariantQPolicy",
    "EquivariantSACPolicy",
    "ExportedPolicy",
    "FlatServerNetwork",
    "LoadBalanceTask",
    "MultiTorchRLEnv",
    "PPOConfig",
    "PPOPolicy",
    "PPOResult",
    "Progress",
    "RLlibConfig",
    "RLlibResult",
    "SACGRUAgent",
    "SACGRUConfig",
    "SACGRUPolicy",
    "SACGRUResult",
    "SB3Config",
    "SB3Result",
    "SB3VecEnv",
    "TorchRLEnv",
    "TrainingConfig",
    "TrainingResult",
    "TuningResult",
    "algo_of",
    "load_policy",
    "make_config",
    "parse_space",
    "read_checkpoint",
    "read_config",
    "to_toml",
    "train",
    "train_benchmarl",
    "train_on_ray",
    "train_ppo",
    "train_rllib",
    "train_sac_gru",
    "train_sb3",
    "tune_recipe",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
