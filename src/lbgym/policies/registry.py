"""Heuristics by name, and agents of heuristics and trained models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..errors import PolicyError, UnknownNameError
from ..scenarios.dispatch_rules import DISPATCH_RULES
from .agent import Agent, Policy
from .base import WeightPolicy
from .checkpoints import load_policy
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
from .pretrained import pretrained_file, pretrained_names
from .trained import TRAINED_SUFFIXES

if TYPE_CHECKING:
    from ..scenarios import Scenario

#: Makes a heuristic from a scenario (for what an operator would configure; some need none) and a seed.
WeightPolicyFactory = Callable[[Any, int | None], WeightPolicy]


@dataclass(frozen=True, slots=True)
class Heuristic:
    """An entry of the table of heuristics.

    Attributes:
        make: makes one.
        description: one line.
        source: where its formula is from.
        configured: whether it must know what an operator configures: cores, number of balancers.
        ground_truth: whether it reads the ground truth, which no balancer can see by itself.
        background: whether it sets background loads, which rules that count flows add to the own ones.
        tables: whether it sets tables of scores, for the rule ``table`` alone.
    """

    make: WeightPolicyFactory
    description: str
    source: str
    configured: bool = False
    ground_truth: bool = False
    background: bool = False
    tables: bool = False


#: Every heuristic by its name.
HEURISTICS: Mapping[str, Heuristic] = MappingProxyType(
    {
        "cores": Heuristic(
            lambda s, seed: StaticWeights(s.core_weights),
            "weights in proportion to the cores",
            "an operator's usual configuration",
            configured=True,
        ),
        "configured": Heuristic(
            lambda s, seed: StaticWeights(s.configured_weights),
            "weights as the scenario's servers state them, or else in proportion to the cores",
            "an operator who weighs servers by hand",
            configured=True,
        ),
        "uniform": Heuristic(lambda s, seed: UniformWeights(), "every server alike", "the default of most"),
        "random": Heuristic(
            lambda s, seed: RandomWeights(seed=seed),
            "new weights in [1, 2] at every step",
            "an untrained agent on the default actions",
        ),
        "awcmp": Heuristic(
            lambda s, seed: AdaptiveWeights(s.core_weights),
            "cores / (busy workers + 1)",
            "MARLLB (Yao et al., CIKM 2022), section 4",
            configured=True,
            ground_truth=True,
        ),
        "latency": Heuristic(lambda s, seed: LatencyWeights(), "inverse of the decayed mean FCT", "ours"),
        "core-latency": Heuristic(
            lambda s, seed: LatencyWeights(cores=s.core_weights),
            "cores over the decayed mean FCT: the capacity if a core is free",
            "ours, for marginal",
            configured=True,
        ),
        "peak-ewma": Heuristic(
            lambda s, seed: PeakEwmaWeights(),
            "inverse of a peak-sensitive moving average of the FCT",
            "Finagle, PeakEwma; tower, peak_ewma",
        ),
        "littles-law": Heuristic(
            lambda s, seed: LittlesLawWeights(s.core_weights, s.balancers),
            "capacity from open flows and FCT",
            "Little, Operations Research 9(3), 1961",
            configured=True,
        ),
        "aimd": Heuristic(
            lambda s, seed: AIMDWeights(),
            "additive increase, multiplicative decrease against 1.2 times the median FCT",
            "Chiu and Jain, 1989",
        ),
        "gradient2": Heuristic(
            lambda s, seed: Gradient2Weights(),
            "concurrency limits from the gradient of the FCT",
            "Netflix concurrency-limits, Gradient2Limit",
        ),
        "pid": Heuristic(
            lambda s, seed: PIDWeights(),
            "a PID controller that brings the FCTs together",
            "Dropbox's Robinhood, on what a balancer sees",
        ),
        "pid-cpu": Heuristic(
            lambda s, seed: PIDCPUWeights(),
            "a PID controller that brings the CPU use of the servers together",
            "Dropbox's Robinhood",
            ground_truth=True,
        ),
        "orca": Heuristic(
            lambda s, seed: OrcaWeights(),
            "flows per second over the CPU use",
            "gRPC's weighted_round_robin, gRFC A58",
            ground_truth=True,
        ),
        "knapsack": Heuristic(
            lambda s, seed: KnapsackWeights(),
            "the grid's weights of the least latency that fitted curves predict",
            "after KnapsackLB, arXiv 2404.17783",
        ),
        "slow-start": Heuristic(
            lambda s, seed: SlowStartWeights(StaticWeights(s.core_weights)),
            "cores, but little by little on servers that join; slow-start+POLICY does so with another policy",
            "Envoy, slow start",
            configured=True,
        ),
        "field": Heuristic(
            lambda s, seed: FieldWeights(StaticWeights(s.core_weights), s.balancers),
            "cores, and as background load what the other balancers hold by symmetry; field+POLICY with another policy",
            "ours: mean field",
            configured=True,
            background=True,
        ),
        "c3": Heuristic(
            lambda s, seed: C3Weights(s.core_weights, s.balancers),
            "cubic ranking of response time and queue",
            "C3 (Suresh et al., NSDI 2015); Elasticsearch, ResponseCollectorService",
            configured=True,
            tables=True,
        ),
        "hcl-local": Heuristic(
            lambda s, seed: HotColdWeights(),
            "least FCT among the servers of few open flows, else fewest open flows",
            "Prequal (Wydrowski et al., NSDI 2024), without probes",
            tables=True,
        ),
        "jiq-local": Heuristic(
            lambda s, seed: IdleQueueWeights(),
            "an idle server, else any",
            "join idle queue (Lu et al., 2011), without reports",
            tables=True,
        ),
        "never-queue": Heuristic(
            lambda s, seed: NeverQueueWeights(s.core_weights),
            "an idle server, else the shortest expected delay",
            "nq of IPVS",
            configured=True,
            tables=True,
        ),
    }
)

_SLOW_START, _FIELD = "slow-start", "field"


def weight_policy_names() -> dict[str, str]:
    """Name and one-line description of every heuristic."""
    return {
        name: entry.description + (", needs ground truth" if entry.ground_truth else "")
        for name, entry in HEURISTICS.items()
    }


def heuristic(name: str) -> tuple[str, Heuristic]:
    """The entry of a name, with the name as the table has it.

    Args:
        name: one of :data:`HEURISTICS`, or ``slow-start+`` or ``field+`` and one; underscores and hyphens are alike.

    Raises:
        UnknownNameError: for another name.
        PolicyError: for a wrapper of what it cannot wrap.
    """
    key = name.lower().replace("_", "-")
    wrapper, plus, inner = (part.strip() for part in key.partition("+"))
    if wrapper in (_SLOW_START, _FIELD) and plus:
        inner, entry = heuristic(inner)
        if entry.tables or (entry.background and wrapper == _FIELD):
            what = "tables of scores" if entry.tables else "background loads"
            raise PolicyError(f"{wrapper} is for policies that set weights, and {inner} sets {what}")
    if wrapper == _FIELD and plus:
        return f"{_FIELD}+{inner}", replace(
            entry,
            make=lambda s, seed: FieldWeights(entry.make(s, seed), s.balancers),
            description=f"{entry.description}; background load: what the other balancers hold by symmetry",
            source=f"{entry.source}; mean field",
            configured=True,
            background=True,
        )
    if wrapper == _SLOW_START and plus:
        return f"{_SLOW_START}+{inner}", replace(
            entry,
            make=lambda s, seed: SlowStartWeights(entry.make(s, seed)),
            description=f"{entry.description}; little by little on servers that join",
            source=f"{HEURISTICS[_SLOW_START].source}; {entry.source}",
        )
    if key not in HEURISTICS:
        rule = f"{name!r} is a dispatch rule, by which a data plane uses the weights that a policy sets"
        known = (*HEURISTICS, *pretrained_names())
        raise UnknownNameError("policy", name, known, note=rule if key in DISPATCH_RULES else "")
    return key, HEURISTICS[key]


def make_weight_policy(name: str, scenario: Scenario | None, seed: int | None = None) -> WeightPolicy:
    """A heuristic by name.

    Args:
        name: as :func:`heuristic` takes it.
        scenario: gives the cores and the number of balancers; None where nothing is known of the cluster.
        seed: of a heuristic that draws.

    Raises:
        UnknownNameError: for another name.
        PolicyError: for one that must know the cluster, without a scenario.
    """
    _, entry = heuristic(name)
    if scenario is None and entry.configured:
        raise PolicyError(f"policy {name!r} must know the cores of the servers: give it a scenario")
    return entry.make(scenario, seed)


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
        policy: name of a pretrained policy (``adaptive``) or a heuristic, file of a trained model (``.pt``, ``.zip``),
            or a policy.
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
        if policy.lower() in pretrained_names():
            policy = load_policy(pretrained_file(policy))
        elif policy.lower().endswith(TRAINED_SUFFIXES):
            policy = load_policy(policy)
        else:
            policy = make_weight_policy(policy, scenario, seed)
    return Agent(policy, num_servers, servers=servers, scenario=scenario, name=name)
