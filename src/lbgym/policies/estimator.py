"""The acting network of :func:`lbgym.training.train_cma_es`: estimates of every server's speed and of its load.

It computes in closed form what can be derived, and learns what cannot. The closed form:

* A flow that finds a core free takes its demand over the core's speed. So the logarithms of the FCTs, relative to the
  servers' mean, are those of the speeds, with noise of variance cv^2 / n for n flows. They are shrunk towards what is
  configured as far as that noise explains their spread (empirical Bayes; B. Efron and C. Morris, JASA 68, 1973): where
  the configuration is right, its weights stay in force.
* By symmetry each of the other m - 1 balancers holds at a server what this one does in the mean, which is the server's
  background load.

Time constants, shrinkage and gains are learned, and so is a small network whose outputs are added. It shares its
parameters over the servers and sees the others through the mean and the maximum of its hidden units, so that servers
that are permuted have their actions permuted, and any number of them will do.

Everything takes leading axes, also the parameters: a population of them acts in one pass.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CheckpointError
from ..features.columns import column_index

Array = NDArray[Any]

#: Learned constants: the values that training begins with, and the standard deviation of its first steps. The values
#: are rounded from earlier searches, the last one that of version 3 of ``adaptive``, and from experiments with several
#: balancers and with unknown speeds. Times are logarithms of seconds.
CONSTANTS: dict[str, tuple[float, float]] = {
    # The estimate of the speed: weights of the logarithms of the FCT's statistics.
    "fct_decay": (0.87, 0.2),
    "fct_mean": (-0.24, 0.2),
    "fct_p90": (0.13, 0.2),
    "duration": (-0.03, 0.2),
    "congestion": (0.48, 0.2),
    "log_smoothing": (2.1, 0.5),
    # Shrinkage: the flows that an estimate remembers, the noise of one, the prior variance.
    "log_memory": (5.0, 0.5),
    "log_noise": (-2.1, 0.7),
    "log_variance": (-3.4, 0.7),
    # The exponent of the estimate.
    "gain": (0.89, 0.2),
    "gain_load": (-0.22, 0.3),
    "gain_balancers": (-0.04, 0.1),
    # The background load that stands for the other balancers: shares by a long memory, at the level of a shorter one.
    "log_slow": (2.5, 0.5),
    "log_fast": (0.1, 0.5),
    "log_long": (3.6, 0.5),
    "log_field": (-0.09, 0.2),
    "field_load": (0.16, 0.3),
    "field_balancers": (0.0, 0.1),
    "log_sampling": (-0.3, 0.7),
    "surge": (0.45, 0.2),
    "log_linear": (0.8, 0.5),
    "linear_load": (-0.35, 0.5),
    "linear_balancers": (-0.42, 0.3),
    # Flows taken off every server's background load near saturation, from so many flows per core on.
    "relief": (1.0, 0.2),
    "relief_from": (0.8, 0.1),
    # The background load of every server, per core.
    "rest": (-3.4, 0.7),
    "rest_load": (0.64, 0.5),
}

#: What the residual network reads of every server.
INPUTS = (
    "speed", "prior", "deviation", "shrinkage", "own_load", "trend", "cores", "load", "balancers", "field", "spread",
    "evidence", "news",
)  # fmt: skip

#: Samples of a reservoir: no estimate is of more flows.
_RESERVOIR = 128.0
_LEAST = 1e-9
#: The range of weights over the configured ones, by logarithm: that of the action type "index" by default.
LARGEST_CHANGE = math.log(10.0)
#: The variance of the prior counts as this many servers.
_PRIOR_SERVERS = 2.0
#: Flows. Half a flow less takes the 1 of marginal's 2 n + 1 away.
_MOST_RELIEF = 0.5
#: The prior variance of a server's share of the flows over what capacities let one expect.
_FIELD_VARIANCE = 0.01

#: Features without which there is no estimate; durations have little weight in it, and none where they are 0.
NEEDED = ("n_flow_on", "fct_mean_decay", "fct_mean", "fct_p90_decay", "fct_std")
#: Columns that are read: the flows, what the speed is estimated from, and the spread.
_COLUMNS = np.array([column_index(name) for name in (*NEEDED[:-1], "duration_mean_decay", NEEDED[-1])], np.intp)


def initial_parameters(hidden: int, seed: int = 0) -> dict[str, Array]:
    """Constants [K] at their initial values, and a residual network of this width whose outputs are 0.

    Args:
        hidden: H, hidden units; 0: no network.
        seed: of the input weights.
    """
    parameters: dict[str, Array] = {"constants": np.array([value for value, _ in CONSTANTS.values()])}
    if hidden:
        rng = np.random.default_rng(seed)
        parameters["encoder.weight"] = rng.normal(0.0, 1.0 / math.sqrt(len(INPUTS)), (len(INPUTS), hidden))
        parameters["encoder.bias"] = np.zeros(hidden)
        parameters["head.weight"] = np.zeros((3 * hidden, 2))
        parameters["head.bias"] = np.zeros(2)
    return parameters


class IndexEstimator:
    """Speeds and background loads of N servers, step by step.

    Args:
        parameters: ``constants`` [..., K], and of the residual network ``encoder.weight`` [..., I, H],
            ``encoder.bias`` [..., H], ``head.weight`` [..., 3 H, 2], ``head.bias`` [..., 2], without which there is
            none. Leading axes are those of the inputs, or broadcast to them.
        step_interval: seconds between two steps.

    Raises:
        CheckpointError: for parameters of another version of this class.
    """

    def __init__(self, parameters: Mapping[str, Array], step_interval: float) -> None:
        values = np.asarray(parameters["constants"], np.float64)
        if values.shape[-1] != len(CONSTANTS):
            raise CheckpointError(
                f"this lbgym's estimator has {len(CONSTANTS)} constants, and these parameters are of another version's "
                f"with {values.shape[-1]}: train them again"
            )
        # One for all servers of what it is for; a population's have the axes of its candidates.
        self._c: dict[str, Any] = {
            name: values[..., i, None] if values.ndim > 1 else float(values[i]) for i, name in enumerate(CONSTANTS)
        }
        self._step = step_interval
        self._keep = {
            name: np.exp(-step_interval * np.exp(-self._c[f"log_{name}"]))
            for name in ("smoothing", "memory", "slow", "fast")
        }
        self._memory, self._sampling = np.exp(self._c["log_long"]), np.exp(self._c["log_sampling"])
        self._noise = np.exp(self._c["log_noise"])
        self._prior_excess = _PRIOR_SERVERS * np.exp(self._c["log_variance"])
        self._of_logs = np.stack([-self._c[name] for name in ("fct_decay", "fct_mean", "fct_p90", "duration")])
        self._given: _Given | None = None
        self._given_key: tuple[bytes, ...] = ()
        self._network = {name: np.asarray(value, np.float64) for name, value in parameters.items() if "." in name}
        self.reset()

    def reset(self) -> None:
        """Forget the flows seen."""
        self._slow: Array | None = None

    def copy(self) -> IndexEstimator:
        """An independent one with the same parameters that has seen nothing."""
        twin = copy.copy(self)
        twin.reset()
        return twin

    def __call__(
        self, stats: Array, active: Array, weights: Array, cores: Array, balancers: Array
    ) -> tuple[Array, Array]:
        """Decide for what a balancer sees.

        Args:
            stats: [..., N, 11], columns of ``FEATURE_NAMES``.
            active: bool[..., N].
            weights: [..., N], logarithms of the configured weights on any scale.
            cores: [..., N], logarithms of the cores.
            balancers: [..., 1], logarithm of the number of balancers.

        Returns:
            The logarithm of the weight over the configured one on any scale, and the background load per core at least
            0, both float64[..., N]; 0 where inactive.
        """
        c, keep, given = self._c, self._keep, self._given_by(active, weights, cores, balancers)
        balancers = given.log_balancers
        columns = stats.transpose(-1, *range(stats.ndim - 1)).take(_COLUMNS, 0).astype(np.float64)
        flows, fct = columns[0], columns[1]
        known = given.active & (fct > 0.0)
        if self._slow is None or self._slow.shape != active.shape:
            self._slow, self._fast, self._long, self._log_speed, self._evidence = np.zeros((5, *active.shape))
            self._age = 0.0
        self._age += self._step
        self._slow = flows + keep["slow"] * (self._slow - flows)

        # Where the cluster stands: flows per core of all balancers, by symmetry.
        own_load = given.per_core * self._slow
        mine = given.sum(self._slow)
        crowding = given.balancers * mine / given.total_size
        load = crowding / (1.0 + crowding)
        busy = load - 0.5

        # Speeds from FCTs, relative to the servers' mean. Known servers keep their place among all: those that are not
        # known are where they are configured.
        timed = columns[1:5]
        sees = known & (timed > 0.0)
        logs = np.log(timed if _all(sees) else np.where(sees, timed, 1.0))
        of_logs = self._of_logs
        if of_logs.ndim == 1:
            of_logs = of_logs.reshape(-1, *(1,) * active.ndim)
        gain = c["gain"] + c["gain_load"] * busy + c["gain_balancers"] * balancers
        sample = gain * (np.add.reduce(of_logs * logs) + c["congestion"] * np.log1p(own_load))
        every = _all(known)
        if every:
            known_count: Any = float(active.shape[-1])
            sample -= _total(sample) / known_count
        else:
            known_count = np.maximum(_total(known), 1.0)
            shift = _total(np.where(known, given.prior - sample, 0.0)) / known_count
            sample = np.where(known, sample + shift, given.prior)
        smoothing = keep["smoothing"]
        if not _all(self._evidence):
            # The first sample is taken as it is.
            smoothing = np.where(self._evidence > 0.0, smoothing, 0.0)
        news = smoothing * (sample - self._log_speed)
        self._log_speed = sample - news
        rate = self._slow / np.maximum(fct, _LEAST)
        spread = columns[5] / np.maximum(columns[2], _LEAST)
        if not every:
            rate, spread = np.where(known, rate, 0.0), np.where(known, spread, 0.0)
        self._evidence = keep["memory"] * self._evidence + self._step * rate
        spread = _total(spread) / known_count
        noise = self._noise * (spread * spread + 0.01) * (1.0 / (self._evidence + 0.1) + 1.0 / _RESERVOIR)
        deviation = given.centred(self._log_speed - given.prior)
        excess = deviation * deviation - noise
        excess = _total(excess if every else np.where(known, excess, 0.0))
        variance = (_within(excess, 0.0, math.inf) + self._prior_excess) / (known_count + _PRIOR_SERVERS)
        shrinkage = variance / (variance + noise)
        log_weight = speed = given.prior + shrinkage * deviation

        # What the others hold, per core.
        news = given.masked(_within(news, -2.0, 2.0))
        field: Any = 0.0
        background: Any = np.exp(c["rest"] + c["rest_load"] * busy)
        if given.several:
            worth = given.size * np.exp(_within(log_weight, -3.0, 3.0))
            field = self._field(flows, fct, worth, shrinkage * news, mine, busy, balancers, given)
            # Far from 0 the rule's scores are straight lines: an offset by the capacities makes them so, and changes
            # no order.
            offset = c["log_linear"] + c["linear_load"] * busy + c["linear_balancers"] * (balancers - 1.0)
            background = background + field + given.others_share * worth * np.exp(offset)
            # The 1 of marginal's 2 n + 1 keeps small servers emptier than large ones. Near saturation, and blind to
            # what the others send there, it is better to load all alike.
            relief = _within(c["relief"] * (crowding - c["relief_from"]), 0.0, _MOST_RELIEF)
            background = np.maximum(background - relief * given.per_size, 0.0)
        else:
            background = background + given.zeros

        if self._network:
            self._fast = flows + keep["fast"] * (self._fast - flows)
            inputs = np.empty((*active.shape, len(INPUTS)))
            for i, value in enumerate(
                (
                    speed, given.prior, deviation, shrinkage, np.log1p(own_load),
                    np.log((self._fast + 0.5) / (self._slow + 0.5)), cores, load, balancers, np.log1p(field), spread,
                    0.3 * np.log(self._evidence + 0.1), news,
                )
            ):  # fmt: skip
                inputs[..., i] = value
            more = self._residual(inputs, given)
            log_weight = log_weight + more[..., 0]
            background = background * np.exp(_within(more[..., 1], -3.0, 3.0))
        # The weight is cores times the speed per core; what is configured is taken out again.
        return given.centred(log_weight - given.prior), given.masked(background)

    def _field(
        self,
        flows: Array,
        fct: Array,
        worth: Array,
        news: Array,
        level: Array,
        busy: Array,
        balancers: Array,
        given: _Given,
    ) -> Array:
        """What the other balancers hold of every server, per core.

        A balancer's own flows in the long run stand for theirs. What their spread over the servers owes to chance, by
        Poisson's law, is shrunk towards what capacities let one expect.
        """
        c = self._c
        # A mean, until it remembers as much as it should.
        memory = _within(self._memory, 0.0, self._age)
        long = self._long = flows + np.exp(-self._step / memory) * (self._long - flows)
        total = given.sum(long) + _LEAST
        expected = (total / (_total(worth) + _LEAST)) * worth + _LEAST
        apart = given.masked(long / expected - 1.0)
        seconds = given.sum(fct) / given.count
        chance = (self._sampling * (seconds / (seconds + memory)) + _LEAST) / expected
        excess = _within(given.sum(apart * apart - chance), 0.0, math.inf)
        variance = (excess + _PRIOR_SERVERS * _FIELD_VARIANCE) / (given.count + _PRIOR_SERVERS)
        mine = expected + expected * apart * variance / (variance + chance)
        factor = c["log_field"] + c["field_load"] * busy + c["field_balancers"] * (balancers - 1.0)
        field: Array = (
            given.others_per_core * mine * np.exp(factor + np.log(level / total + _LEAST) - c["surge"] * news)
        )
        return field

    def _given_by(self, active: Array, weights: Array, cores: Array, balancers: Array) -> _Given:
        """What follows from these alone, which rarely change."""
        key = tuple(values.tobytes() for values in (active, weights, cores, balancers))
        if self._given is None or self._given_key != key or self._given.active.shape != active.shape:
            self._given, self._given_key = _Given(active, weights, cores, balancers), key
        return self._given

    def _residual(self, inputs: Array, given: _Given) -> Array:
        """The network's outputs [..., N, 2] for inputs [..., N, I]."""
        p = self._network
        h = np.tanh(inputs @ p["encoder.weight"] + p["encoder.bias"][..., None, :])
        if given.all:
            most = h.max(-2)
        else:
            # Outputs do not depend on servers that are not there: -1 is below every hidden unit.
            most = np.where(given.active[..., None], h, -1.0).max(-2)
            h *= given.active[..., None]
        size, head = p["encoder.weight"].shape[-1], p["head.weight"]
        pooled = np.concatenate([h.sum(-2) / given.count, most], axis=-1)
        context = pooled[..., None, :] @ head[..., size:, :]
        more: Array = h @ head[..., :size, :] + (context + p["head.bias"][..., None, :])
        return more


def _total(values: Array) -> Any:
    """Sum over the servers [..., N]: [..., 1], or a number where there is no other axis. Numbers take less time."""
    return np.add.reduce(values) if values.ndim == 1 else np.add.reduce(values, -1, keepdims=True)


def _all(values: Array) -> bool:
    """None is 0."""
    return np.count_nonzero(values) == values.size


def _within(values: Any, low: float, high: float) -> Any:
    # What np.clip and NumPy's functions of single numbers take longer for.
    return min(max(values, low), high) if isinstance(values, float) else np.minimum(np.maximum(values, low), high)


class _Given:
    """What follows from what is configured and which servers are active."""

    def __init__(self, active: Array, weights: Array, cores: Array, balancers: Array) -> None:
        self.active, self.all = active, _all(active)
        self.zeros = np.zeros(active.shape)
        self.count = np.maximum(_total(active), 1.0)
        self.log_balancers: Any = float(balancers[0]) if balancers.shape == (1,) else balancers
        self.prior = self.centred(weights - cores)
        self.size = np.where(active, np.exp(cores), 0.0)
        self.total_size = np.maximum(_total(self.size), _LEAST)
        self.balancers = np.exp(self.log_balancers)
        self.several = bool(np.any(self.balancers > 1.0))
        self.per_size = 1.0 / np.where(active, self.size, 1.0)
        self.per_core = self.balancers * self.per_size
        self.others_per_core = (self.balancers - 1.0) * self.per_size
        self.others_share = self.others_per_core / self.balancers

    def masked(self, values: Array) -> Array:
        """0 where inactive."""
        return values if self.all else np.where(self.active, values, 0.0)

    def sum(self, values: Array) -> Any:
        """Sum over the active servers, as :func:`_total`."""
        return _total(self.masked(values))

    def centred(self, values: Array) -> Array:
        """Less the mean over the active servers; 0 where inactive."""
        return self.masked(values - self.sum(values) / self.count)
