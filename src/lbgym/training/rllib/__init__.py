"""RLlib's algorithms, in this process or with env runners on a Ray cluster: one recipe for all of them.

One table, :data:`ALGORITHMS`, holds all that differs between the algorithms; the recipe, :func:`train_rllib`, is the
same for all. Env runners step the native vector environment; the networks are in plain torch, so that a trained policy
acts without Ray.
"""

from .config import ALGORITHMS, Algorithm, RLlibConfig
from .train import RLlibResult, train_rllib

__all__ = ["ALGORITHMS", "Algorithm", "RLlibConfig", "RLlibResult", "train_rllib"]
