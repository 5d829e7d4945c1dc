"""Heuristics by name, and agents of heuristics and trained models."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import PolicyError, UnknownNameError
from .agent import Agent, Policy
from .base import WeightPolicy
from .checkpoints import load_policy
from .heuristics import (
    AdaptiveWeights,
    LatencyWeights,
    LittlesLawWeights,
    RandomWeights,
    StaticWeights,
    UniformWeights,
)
from .trained import TRAINED_SUFFIXES

if TYPE_CHECKING:
    from ..scenarios import Scenario

#: Makes a heuristic from a scenario (for what an operator would configure; some need none) and a seed.
WeightPolicyFactory = Callable[[Any, int | None], WeightPolicy]

_FACTORIES: dict[str, tuple[WeightPolicyFactory, str]] = {
    "cores": (lambda s, seed: StaticWeights(s.core_weights), "weights in proportion to the cores"),
    "uniform": (lambda s, seed: UniformWeights(), "every server alike"),
    "random": (lambda s, seed: RandomWeights(seed=seed), "new weights in [1, 2] at every step"),
    "awcmp": (lambda s, seed: AdaptiveWeights(s.core_weights), "cores / (busy workers + 1), needs ground truth"),
    "latency": (lambda s, seed: LatencyWeights(), "inverse of the decayed mean FCT"),
    "littles-law": (lambda s, seed: LittlesLawWeights(s.core_weights, s.balancers), "capacity from open flows and FCT"),
}

#: Those that need no scenario.
_BLIND = ("uniform", "random", "latency")


def weight_policy_names() -> dict[str, str]:
    """Name and one-line description of every heuristic."""
    return {name: text for name, (_, text) in _FACTORIES.items()}


def make_weight_policy(name: str, scenario: Scenario | None, seed: int | None = None) -> WeightPolicy:
    """A heuristic by name.

    Args:
        name: one of :func:`weight_policy_names`; underscores and hyphens are alike.
        scenario: gives the cores and the number of balancers; None where nothing is known of the cluster.
        seed: of a heuristic that draws.

    Raises:
        UnknownNameError: for another name.
        PolicyError: for one that must know the cluster, without a scenario.
    """
    key = name.lower().replace("_", "-")
    factory = _FACTORIES.get(key)
    if factory is None:
        raise UnknownNameError("policy", name, _FACTORIES)
    if scenario is None and key not in _BLIND:
        raise PolicyError(f"policy {name!r} must know the cores of the servers: give it a scenario")
    return factory[0](scenario, seed)


def make_policy(name: str, env: Any, seed: int | None = None) -> Agent:
    """A heuristic by name, fitted to an environment: ``make_policy("latency", env).act(observation, info)``.

    Raises:
        UnknownNameError: for an unknown name.
        PolicyError: if it needs ground truth and the environment does not show it.
    """
    return make_weight_policy(name, env.unwrapped.scenario, seed).for_env(env)


def make_agent(
    policy: str | Policy | WeightPolicy,
    num_servers: int | None = None,
    *,
    scenario: Scenario | None = None,
    seed: int | None = None,
    name: str | None = None,
) -> Agent:
    """An agent of a heuristic or a trained model.

    Args:
        policy: name of a heuristic, file of a trained model (``.pt``, ``.zip``), or a policy.
        num_servers: N of the data plane; None: call :meth:`Agent.fit` once it is known.
        scenario: what is known of the cluster; None: nothing.
        seed: of a heuristic that draws.
        name: in logs and errors; None: ``policy`` as written.

    Raises:
        PolicyError: for a missing or bad file, a heuristic that must know the cluster without a scenario, or a policy
            that does not fit so many servers.
        UnknownNameError: for an unknown heuristic.
        MissingExtraError: without torch or Stable-Baselines3.
    """
    servers = None if scenario is None else scenario.num_servers
    if isinstance(policy, str):
        name = name or policy
        trained = policy.lower().endswith(TRAINED_SUFFIXES)
        policy = load_policy(policy) if trained else make_weight_policy(policy, scenario, seed)
    return Agent(policy, num_servers, servers=servers, scenario=scenario, name=name)
