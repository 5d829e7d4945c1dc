"""Rewards: fairness metrics over any field of the servers, and quality-of-service statistics.

A reward is a function of a snapshot. Fairness metrics look at one column (``reward_field``) of the servers that are in
service; service rewards look at the flows that ended during the step. Either kind has a name; names can be summed with
weights; a callable can take the place of a name. Every function works on trailing axes, so that a batch
of snapshots gives a batch of rewards with the same bits as one snapshot at a time.

``reward_table()`` returns the registry as Markdown: definition, source, effect of larger loads, and corner cases.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..checks import number
from ..errors import InvalidRewardError, UnknownNameError
from ..features.columns import FEATURE_ALIASES, FEATURE_NAMES, GROUND_TRUTH_NAMES, NUM_FEATURES, SERVICE_NAMES
from ..features.columns import column_index as _column_index
from ..snapshot import IntervalStatistics, Snapshot

#: Keeps logarithms and quotients finite, in the unit of the field (seconds, flows) or its square.
EPSILON: Final = 1e-6

# Added to counts and denominators that may be 0. It vanishes in the rounding of anything larger than 1e-284, so it
# changes no result; it only gives 0 / 0 the value wanted there.
_TINY: Final = 1e-300
_ZERO: Final = np.float64(0.0)
_ONE: Final = np.float64(1.0)

#: Beyond this a load given to :func:`fairness` counts as this much, so that squares stay finite.
LARGEST_LOAD: Final = 1e100

_Float = NDArray[np.float64]
_Bool = NDArray[np.bool_]


# Fairness metrics: loads over the trailing axis, of which only the active ones count. A snapshot's columns are
# float32, whose squares and fourth powers are finite in float64.


def _masked(loads: NDArray[Any], active: _Bool) -> _Float:
    """Loads in float64 with 0 for inactive servers."""
    return np.where(active, loads, _ZERO)


def _count(active: _Bool) -> Any:
    """Active servers, or a tiny number where there are none, so that 0 / count is 0."""
    return np.add.reduce(active, -1, np.float64, initial=_TINY)


def _sum(x: _Float) -> Any:
    return np.add.reduce(x, -1)


def _largest(loads: NDArray[Any], active: _Bool) -> Any:
    return np.maximum.reduce(loads, -1, np.float64, initial=_ZERO, where=active)


def _smallest(loads: NDArray[Any], active: _Bool) -> Any:
    """Infinite where no server is active."""
    return np.minimum.reduce(loads, -1, np.float64, initial=np.inf, where=active)


def _variance(loads: NDArray[Any], active: _Bool) -> Any:
    """Population variance, in two passes: the textbook difference of moments cancels, and may come out negative."""
    x = _masked(loads, active)
    n = _count(active)
    deviation = (x.T - (_sum(x) / n).T).T * active
    return _sum(deviation * deviation) / n


def _jain(loads: NDArray[Any], active: _Bool) -> Any:
    x = _masked(loads, active)
    total = _sum(x)
    return (total * total + _TINY) / (_count(active) * _sum(x * x) + _TINY)


def _var(loads: NDArray[Any], active: _Bool) -> Any:
    return 0.0 - _variance(loads, active)


def _var_exp(loads: NDArray[Any], active: _Bool, k: float) -> Any:
    return np.exp(-k * _variance(loads, active))


def _var_log(loads: NDArray[Any], active: _Bool) -> Any:
    return -np.log(_variance(loads, active) + EPSILON)


def _max(loads: NDArray[Any], active: _Bool) -> Any:
    return 0.0 - _largest(loads, active)


def _max_exp(loads: NDArray[Any], active: _Bool, k: float) -> Any:
    return np.exp(-k * _largest(loads, active))


def _max_log(loads: NDArray[Any], active: _Bool) -> Any:
    return -np.log(_largest(loads, active) + EPSILON)


def _min_max(loads: NDArray[Any], active: _Bool) -> Any:
    largest = _largest(loads, active)
    smallest = np.minimum(_smallest(loads, active), largest)
    return np.maximum(smallest / (largest + _TINY), largest == 0.0)


def _product(loads: NDArray[Any], active: _Bool) -> Any:
    largest = _largest(loads, active)
    ratio = _masked(loads, active).T / (largest + _TINY).T
    return np.maximum(np.multiply.reduce(ratio.T, -1, initial=_ONE, where=active), largest == 0.0)


def _product_raw(loads: NDArray[Any], active: _Bool) -> Any:
    # Through logarithms: the product of a few dozen large loads overflows before the quotient is taken.
    x = np.where(active, loads, _ONE)
    with np.errstate(divide="ignore"):
        logarithm = _sum(np.log(x)) - np.log(_largest(loads, active) + EPSILON)
    return np.exp(np.minimum(logarithm, 700.0)) * (_count(active) >= 1.0)


def _cv(loads: NDArray[Any], active: _Bool) -> Any:
    mean = _sum(_masked(loads, active)) / _count(active)
    return 0.0 - np.sqrt(_variance(loads, active)) / (mean + _TINY)


def _range(loads: NDArray[Any], active: _Bool) -> Any:
    largest = _largest(loads, active)
    return np.minimum(_smallest(loads, active), largest) - largest


def _gini(loads: NDArray[Any], active: _Bool) -> Any:
    # Inactive servers are the first zeros of the sorted row; n shifts the ranks to those of the active ones.
    x = np.sort(_masked(loads, active), axis=-1)
    n = _count(active)
    spread = _sum(x * np.add.outer(n, _centred_ranks(x.shape[-1])))
    return 0.0 - np.maximum(spread, 0.0) / (n * _sum(x) + _TINY)


@functools.lru_cache(maxsize=64)
def _centred_ranks(width: int) -> _Float:
    """2 i - 2 width - 1 for i = 1..width: with n = width added, 2 i - n - 1."""
    ranks: _Float = 2.0 * np.arange(1, width + 1, dtype=np.float64) - (2.0 * width + 1.0)
    ranks.setflags(write=False)
    return ranks


# Service rewards: of the flows that ended during the step; 0 where none did


def _cost(column: int, interval: IntervalStatistics) -> Any:
    """Minus a statistic."""
    return 0.0 - interval.values[..., column]


def _rejected_share(interval: IntervalStatistics) -> Any:
    return 0.0 - interval.rejected / (interval.ended + _TINY)


def _cost_of(name: str) -> Callable[[IntervalStatistics], Any]:
    return functools.partial(_cost, SERVICE_NAMES.index(name))


# The registry


@dataclass(frozen=True, slots=True)
class RewardInfo:
    """A named reward; one row of the table.

    Attributes:
        name: as given to ``reward_type``.
        kind: "fairness" (over the servers' ``reward_field``) or "service" (of the flows that ended in the step).
        function: ``(loads float[..., N], active bool[..., N]) -> float64[...]`` or, for a service reward,
            ``(interval: IntervalStatistics) -> float64[...]``.
        definition: one line; l are the loads of the n active servers.
        source: the publication it comes from.
        scale: "none" if multiplying every load by a constant changes nothing, else the effect of a larger load.
        empty, single, zeros: value with no active server, with one of load l, and with every load 0. For service
            rewards ``empty`` is the value of a step in which no flow ended; the others do not apply.
    """

    name: str
    kind: str
    function: Callable[..., Any]
    definition: str
    source: str
    scale: str
    empty: str
    single: str = "-"
    zeros: str = "-"


_MARLLB = "Yao, Ding, Clausen, CIKM 2022 (MARLLB)"
_LOG0 = f"{-math.log(EPSILON):.4g}"

_ROWS = (
    RewardInfo(
        "jain", "fairness", _jain, "(sum l)^2 / (n sum l^2), in [1/n, 1]",
        "Jain, Chiu, Hawe, DEC-TR-301, 1984", "none", "1", "1", "1",
    ),
    RewardInfo(
        "var", "fairness", _var, "-Var(l), population variance",
        _MARLLB + ", its default", "worse in proportion to its square", "0", "0", "0",
    ),
    RewardInfo(
        "var_exp", "fairness", _var_exp, "exp(-k Var(l)), k = 1",
        _MARLLB + ", there k = 1e4", "worse", "1", "1", "1",
    ),
    RewardInfo(
        "var_log", "fairness", _var_log, f"-ln(Var(l) + {EPSILON:g})",
        _MARLLB + ", there without epsilon", "worse", _LOG0, _LOG0, _LOG0,
    ),
    RewardInfo(
        "max", "fairness", _max, "-max l, the makespan",
        "Graham, Bell Syst. Tech. J. 45, 1966", "worse", "0", "-l", "0",
    ),
    RewardInfo(
        "max_exp", "fairness", _max_exp, "exp(-k max l), k = 1",
        _MARLLB + ", there k = 1e4", "worse", "1", "exp(-k l)", "1",
    ),
    RewardInfo(
        "max_log", "fairness", _max_log, f"-ln(max l + {EPSILON:g})",
        _MARLLB, "worse", _LOG0, f"-ln(l + {EPSILON:g})", _LOG0,
    ),
    RewardInfo(
        "min_max", "fairness", _min_max, "min l / max l, in [0, 1]",
        "descriptive statistics", "none", "1", "1", "1",
    ),
    RewardInfo(
        "product", "fairness", _product, "product of l / max l, in [0, 1]; vanishes as n grows",
        _MARLLB + ", eq. 4 read as n quotients", "none", "1", "1", "1",
    ),
    RewardInfo(
        "product_raw", "fairness", _product_raw, f"(product of l) / (max l + {EPSILON:g})",
        _MARLLB + ", eq. 4 and 6 as printed", "better: rewards overload, for study only",
        "0", f"l / (l + {EPSILON:g})", "0",
    ),
    RewardInfo(
        "cv", "fairness", _cv, "-std(l) / mean(l), in [-sqrt(n - 1), 0]; jain = 1 / (1 + cv^2)",
        "Pearson, Phil. Trans. R. Soc. A 187, 1896", "none", "0", "0", "0",
    ),
    RewardInfo(
        "range", "fairness", _range, "-(max l - min l)",
        "descriptive statistics", "worse in proportion", "0", "0", "0",
    ),
    RewardInfo(
        "gini", "fairness", _gini, "-sum |l_i - l_j| / (2 n^2 mean l), in [-(n - 1) / n, 0]",
        "Gini, Variabilita e mutabilita, 1912", "none", "0", "0", "0",
    ),
    RewardInfo(
        "mean_fct", "service", _cost_of("fct_mean"), "-mean FCT, s",
        "Dukkipati, McKeown, CCR 36, 2006", "worse", "0",
    ),
    RewardInfo(
        "p99_fct", "service", _cost_of("fct_p99"), "-99th percentile of the FCT, s",
        "Dean, Barroso, CACM 56, 2013", "worse", "0",
    ),
    RewardInfo(
        "slowdown", "service", _cost_of("log_slowdown"), "-mean ln(FCT / demand)",
        "Harchol-Balter, Crovella, Murta, JPDC 59, 1999", "worse", "0",
    ),
    RewardInfo(
        "rejected", "service", _rejected_share, "-(rejected and failed flows / flows that ended), in [-1, 0]",
        "Erlang, 1917: the blocking probability", "worse", "0",
    ),
    RewardInfo(
        "open_flows", "service", _cost_of("open_flows"), "-flows in the system, mean over the step's time",
        "Little, Oper. Res. 9, 1961: in proportion to the mean FCT", "worse", "0",
    ),
)  # fmt: skip

#: Every named reward.
REWARDS: Mapping[str, RewardInfo] = MappingProxyType({row.name: row for row in _ROWS})
FAIRNESS_REWARDS = tuple(row.name for row in _ROWS if row.kind == "fairness")
SERVICE_REWARDS = tuple(row.name for row in _ROWS if row.kind == "service")

RewardFunction = Callable[[Snapshot], Any]
RewardType = str | Mapping[str, float] | RewardFunction


def reward_table(kinds: Iterable[str] = ("fairness", "service")) -> str:
    """The registry as Markdown tables, one per kind."""
    parts = []
    for kind in kinds:
        rows = [row for row in _ROWS if row.kind == kind]
        if kind == "fairness":
            head = ["name", "definition", "larger load", "no server", "one server", "all zeros", "source"]
            body = [[f"`{r.name}`", r.definition, r.scale, r.empty, r.single, r.zeros, r.source] for r in rows]
        else:
            head = ["name", "definition", "larger load", "no flow ended", "source"]
            body = [[f"`{r.name}`", r.definition, r.scale, r.empty, r.source] for r in rows]
        lines = [head, ["---"] * len(head), *body]
        # A bar would end the cell.
        parts.append("\n".join("| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines))
    return "\n\n".join(parts) + "\n"


def fairness(name: str, loads: ArrayLike, active: ArrayLike | None = None, *, k: float = 1.0) -> _Float:
    """A fairness metric of loads.

    Args:
        name: one of ``FAIRNESS_REWARDS``.
        loads: float[..., N], finite and not negative where active; beyond ``LARGEST_LOAD`` they count as that.
        active: bool[..., N], the servers that take part; all if None.
        k: rate of ``var_exp`` and ``max_exp``, per unit of the load squared and per unit of the load.

    Returns:
        float64[...]; finite.

    Raises:
        UnknownNameError: if there is no such fairness metric.
        ValueError: for loads that are negative or not finite, and for mismatched shapes.
    """
    if name not in FAIRNESS_REWARDS:
        raise UnknownNameError("fairness metric", name, FAIRNESS_REWARDS)
    values = np.asarray(loads, dtype=np.float64)
    if values.ndim == 0:
        raise ValueError("loads must be an array over servers, got a single number")
    mask = np.ones(values.shape, bool) if active is None else np.asarray(active, dtype=bool)
    if mask.shape != values.shape:
        raise ValueError(f"loads of shape {values.shape} need an active mask of that shape, got {mask.shape}")
    if not (np.isfinite(values) | ~mask).all() or (values < 0).any(where=mask):
        wrong = values[mask & ~(np.isfinite(values) & (values >= 0))]
        raise ValueError(f"loads must be finite and not negative, got {', '.join(f'{v:g}' for v in wrong[:5])}")
    values = np.minimum(np.where(mask, values, _ZERO), LARGEST_LOAD)
    return np.asarray(_bind(REWARDS[name], k)(values, mask), dtype=np.float64)


def _bind(info: RewardInfo, k: float) -> Callable[..., Any]:
    """The function, with ``k`` bound if it has such a parameter."""
    if "k" not in inspect.signature(info.function).parameters:
        return info.function
    return functools.partial(info.function, k=k)


# A reward of an environment


class Reward:
    """A reward of snapshots: ``reward(snapshot) -> float64[...]``.

    The result has the leading axes of the snapshot: a scalar for one, ``[R]`` for a batch of R replicas. Make one with
    :func:`make_reward`; it may itself be given as ``reward_type``.

    Attributes:
        description: name and field, as in "jain:duration_mean_decay".
        needs_ground_truth, needs_service: whether the data plane must provide ground truth, and statistics of the
            flows that ended.
        fields: features it looks at; of a user's own function nothing is known.
    """

    def __init__(
        self,
        function: RewardFunction,
        description: str,
        *,
        needs_ground_truth: bool = False,
        needs_service: bool = False,
        fields: frozenset[str] = frozenset(),
    ) -> None:
        self._function, self.fields = function, fields
        self.description = description
        self.needs_ground_truth = needs_ground_truth
        self.needs_service = needs_service

    def __call__(self, snapshot: Snapshot) -> Any:
        """The reward of a snapshot.

        Raises:
            InvalidRewardError: if the data plane has no ground truth or service statistics and the reward needs them,
                or if a user's function does not return finite numbers of the right shape.
        """
        if self.needs_ground_truth and snapshot.ground_truth is None:
            raise InvalidRewardError(
                f"reward {self.description!r} needs ground truth, which this data plane does not publish; "
                f"use a field that a balancer observes: {', '.join(FEATURE_NAMES)}"
            )
        if self.needs_service and snapshot.interval is None:
            raise InvalidRewardError(
                f"reward {self.description!r} needs statistics of the flows that ended, which this data plane does "
                f"not have; use a fairness reward: {', '.join(FAIRNESS_REWARDS)}"
            )
        return self._function(snapshot)

    def __repr__(self) -> str:
        return f"Reward({self.description!r})"


def make_reward(
    reward_type: RewardType = "jain", reward_field: str = "flow_duration_avg_decay", *, k: float = 1.0
) -> Reward:
    """Make a reward from a name, a weighted sum of names, or a function.

    Args:
        reward_type: a name of ``REWARDS``; a mapping of names to weights, such as ``{"jain": 1.0, "p99_fct": 0.1,
            "jain:n_flow_on": 0.5}``, where ``name:field`` overrides ``reward_field``; or a callable that takes a
            snapshot and returns float[...] over its leading axes (a number for an environment, ``[R]`` for a vector
            environment of R replicas).
        reward_field: feature or ground-truth field that fairness metrics compare, or an alias.
        k: rate of ``var_exp`` and ``max_exp``.

    Returns:
        A callable of snapshots, which raises if the data plane lacks what it needs.

    Raises:
        UnknownNameError: for an unknown reward or field.
        InvalidRewardError: for an empty mapping, a weight that is not a finite number, a field for a service
            reward, a ``k`` that is not a positive number, or a ``reward_type`` of another type.
    """
    k = number("k", k, above=0.0, error=InvalidRewardError)
    _column(reward_field)  # A misspelt field is an error even if no term uses it.
    if isinstance(reward_type, str):
        return _term(reward_type, reward_field, k)
    if isinstance(reward_type, Mapping):
        return _weighted_sum(reward_type, reward_field, k)
    if isinstance(reward_type, Reward):
        return reward_type
    if callable(reward_type):
        name = getattr(reward_type, "__qualname__", None) or type(reward_type).__name__
        return Reward(functools.partial(_checked, reward_type, name), name)
    raise InvalidRewardError(
        f"reward_type must be a name, a mapping of names to weights, or a callable, got {type(reward_type).__name__}"
    )


def _column(field: str) -> int:
    try:
        return _column_index(field)
    except UnknownNameError:
        known = (*FEATURE_NAMES, *GROUND_TRUTH_NAMES, *FEATURE_ALIASES)
        raise UnknownNameError("reward field", field, known, where="reward_field") from None


def _term(name: str, reward_field: str, k: float) -> Reward:
    """A named reward; ``name`` may carry a field of its own."""
    base, colon, own_field = name.partition(":")
    info = REWARDS.get(base)
    if info is None:
        raise UnknownNameError("reward", base, REWARDS, where="reward_type")
    function = _bind(info, k)
    if info.kind == "service":
        if colon:
            raise InvalidRewardError(
                f"reward {name!r}: {base!r} is computed from the flows that ended and takes no field; "
                f"rewards of a field: {', '.join(FAIRNESS_REWARDS)}"
            )
        return Reward(functools.partial(_of_interval, function), base, needs_service=True)
    field = own_field if colon else reward_field
    column = _column(field)
    description = f"{base}:{FEATURE_ALIASES.get(field, field)}"
    if column < NUM_FEATURES:
        return Reward(
            functools.partial(_of_feature, function, column), description, fields=frozenset({FEATURE_NAMES[column]})
        )
    of_truth = functools.partial(_of_ground_truth, function, column - NUM_FEATURES)
    return Reward(of_truth, description, needs_ground_truth=True)


def _weighted_sum(weights: Mapping[str, float], reward_field: str, k: float) -> Reward:
    if not weights:
        raise InvalidRewardError(f"a mapping of rewards to weights needs at least one entry of {', '.join(REWARDS)}")
    terms = []
    for name, weight in weights.items():
        if not isinstance(name, str):
            raise UnknownNameError("reward", name, REWARDS, where="reward_type")
        factor = number(f"the weight of reward {name!r}", weight, error=InvalidRewardError)
        terms.append((factor, _term(name, reward_field, k)))
    return Reward(
        functools.partial(_sum_of, terms),
        " + ".join(f"{weight:g} {reward.description}" for weight, reward in terms),
        needs_ground_truth=any(reward.needs_ground_truth for _, reward in terms),
        needs_service=any(reward.needs_service for _, reward in terms),
        fields=frozenset().union(*(reward.fields for _, reward in terms)),
    )


# Bound with functools.partial and no closures, so that rewards, and environments with them, can be pickled.


def _of_feature(function: Callable[..., Any], column: int, snapshot: Snapshot) -> Any:
    return function(snapshot.stats[..., column], snapshot.active)


def _of_ground_truth(function: Callable[..., Any], column: int, snapshot: Snapshot) -> Any:
    assert snapshot.ground_truth is not None  # checked by Reward.__call__
    return function(snapshot.ground_truth[..., column], snapshot.active)


def _of_interval(function: Callable[..., Any], snapshot: Snapshot) -> Any:
    return function(snapshot.interval)


def _sum_of(terms: Sequence[tuple[float, Reward]], snapshot: Snapshot) -> Any:
    weight, reward = terms[0]
    total = weight * reward(snapshot)
    for weight, reward in terms[1:]:
        total = total + weight * reward(snapshot)
    return total


def _checked(function: RewardFunction, name: str, snapshot: Snapshot) -> Any:
    """A user's reward, checked."""
    result = function(snapshot)
    try:
        value = np.asarray(result, dtype=np.float64)
    except (TypeError, ValueError):
        raise InvalidRewardError(f"reward function {name} must return numbers, got {result!r}") from None
    expected = snapshot.active.shape[:-1]
    if value.shape != expected:
        wanted = f"one per replica, shape {expected}" if expected else "a single number"
        raise InvalidRewardError(f"reward function {name} must return {wanted}, got shape {value.shape}")
    if not np.isfinite(value).all():
        raise InvalidRewardError(f"reward function {name} must return finite numbers, got {result!r}")
    return value if expected else value[()]
