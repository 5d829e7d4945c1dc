"""BenchMARL on the vector core of several balancers: a task, networks that share their weights, and one recipe.

BenchMARL steps PettingZoo environments one after the other. The task here, :class:`LoadBalanceTask`, hands it all
replicas as one batched environment (:class:`~lbgym.training.torchrl_env.MultiTorchRLEnv`). Every balancer runs the same
policy on its own observations; their common knowledge, the environment's state, only helps to train it.

One table, :data:`ALGORITHMS`, holds all that differs between the algorithms; the recipe, :func:`train_benchmarl`, is
the same for all.
"""

from .config import ALGORITHMS, WEIGHTS, Algorithm, BenchMARLConfig
from .model import LoadBalanceModel, LoadBalanceModelConfig
from .task import LoadBalanceTask, LoadBalanceTaskClass
from .train import BenchMARLResult, train_benchmarl

__all__ = [
    "ALGORITHMS",
    "WEIGHTS",
    "Algorithm",
    "BenchMARLConfig",
    "BenchMARLResult",
    "LoadBalanceModel",
    "LoadBalanceModelConfig",
    "LoadBalanceTask",
    "LoadBalanceTaskClass",
    "train_benchmarl",
]
