"""Recipes that train policies: in plain torch, and with Stable-Baselines3, RLlib, BenchMARL and TorchRL.

:data:`RECIPES` has them by name and :func:`train` runs any of them; :func:`train_on_ray` does so on a cluster, and
:func:`tune_recipe` searches for settings. Importing this package imports no framework; the names below load what they
need when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import _lazy_names

if TYPE_CHECKING:
    from ..policies.checkpoints import load_policy, read_checkpoint
    from ..policies.neural import ExportedPolicy, PPOPolicy, SACGRUPolicy
    from ..ray_cluster import ClusterError
    from .benchmarl import BenchMARLConfig, BenchMARLResult, LoadBalanceTask, train_benchmarl
    from .cluster import ClusterResult, train_on_ray
    from .cma_es import CMAESConfig, CMAESResult, train_cma_es
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

__all__ = [
    "RECIPES",
    "BenchMARLConfig",
    "BenchMARLResult",
    "CMAESConfig",
    "CMAESResult",
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
    "train_cma_es",
    "train_on_ray",
    "train_ppo",
    "train_rllib",
    "train_sac_gru",
    "train_sb3",
    "tune_recipe",
]

__getattr__, __dir__ = _lazy_names(
    __name__,
    {
        "benchmarl": "BenchMARLConfig BenchMARLResult LoadBalanceTask train_benchmarl",
        "cma_es": "CMAESConfig CMAESResult train_cma_es",
        "cluster": "ClusterError ClusterResult train_on_ray",
        "config": "TrainingConfig",
        ".policies.neural": "ExportedPolicy PPOPolicy SACGRUPolicy",
        "networks": "FlatServerNetwork",
        "ppo": "PPOConfig PPOResult train_ppo",
        "recipes": "RECIPES TrainingResult algo_of make_config read_config to_toml train",
        "rllib": "RLlibConfig RLlibResult train_rllib",
        "runs": "Progress",
        ".policies.checkpoints": "load_policy read_checkpoint",
        "sac_gru": "SACGRUAgent SACGRUConfig SACGRUResult train_sac_gru",
        "sb3": "SB3Config SB3Result SB3VecEnv train_sb3",
        "sb3_policies": "EquivariantExtractor EquivariantPolicy EquivariantQPolicy EquivariantSACPolicy",
        "torchrl_env": "TorchRLEnv MultiTorchRLEnv",
        "tuning": "TuningResult parse_space tune_recipe",
    },
)
