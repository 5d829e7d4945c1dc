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
#: are rounded from a first search of 72 generations, which began with those of ``marginal+field+core-latency``. Times
#: are logarithms of seconds.
CONSTANTS: dict[str, tuple[float, float]] = {
    # The estimate of the speed: weights of the logarithms of the FCT's statistics.
    "fct_decay": (1.0, 0.2),
    "fct_mean": (0.1, 0.2),
    "fct_p90": (0.05, 0.2),
    "duration": (0.0, 0.2),
    "congestion": (0.3, 0.2),
    "log_smoothing": (1.6, 0.5),
    # Shrinkage: the flows that an estimate remembers, the noise of one, the prior variance.
    "log_memory": (4.0, 0.5),
    "log_noise": (-1.2, 0.7),
    "log_variance": (-4.5, 0.7),
    # The exponent of the estimate.
    "gain": (0.65, 0.2),
    "gain_load": (0.2, 0.3),
    "gain_balancers": (0.0, 0.1),
    # The background load that stands for the other balancers.
    "log_slow": (2.0, 0.5),
    "log_fast": (0.0, 0.5),
    "fast_share": (0.45, 0.3),
    "log_field": (0.1, 0.3),
    "field_load": (0.6, 0.3),
    "field_balancers": (-0.1, 0.2),
    "pooling": (-0.5, 1.0),
    "pooling_evidence": (0.0, 0.3),
    "surge": (0.0, 0.2),
    # The background load of every server, per core.
    "rest": (-3.5, 0.7),
    "rest_load": (0.3, 0.5),
    "rest_balancers": (0.0, 0.5),
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

_FLOWS, _FCT_DECAY, _FCT_MEAN, _FCT_P90, _FCT_STD, _DURATION = (
    column_index(name)
    for name in ("n_flow_on", "fct_mean_decay", "fct_mean", "fct_p90_decay", "fct_std", "duration_mean_decay")
)


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
        self._c = {name: values[..., i] for i, name in enumerate(CONSTANTS)}
        self._step = step_interval
        self._keep = {
            name: np.exp(-step_interval * np.exp(-self._c[f"log_{name}"]))
            for name in ("smoothing", "memory", "slow", "fast")
        }
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
        c = {name: value[..., None] if value.ndim else value for name, value in self._c.items()}
        keep = {name: value[..., None] if value.ndim else value for name, value in self._keep.items()}
        stats = np.asarray(stats, np.float64)
        mask = active.astype(np.float64)
        count = np.maximum(mask.sum(-1, keepdims=True), 1.0)

        def mean(values: Array) -> Array:
            return (values * mask).sum(-1, keepdims=True) / count

        flows, fct = stats[..., _FLOWS], stats[..., _FCT_DECAY]
        known = active & (fct > 0.0)
        if self._slow is None or self._slow.shape != active.shape:
            self._slow, self._fast, self._log_speed, self._evidence = np.zeros((4, *active.shape))
        self._slow = keep["slow"] * self._slow + (1.0 - keep["slow"]) * flows
        self._fast = keep["fast"] * self._fast + (1.0 - keep["fast"]) * flows

        # Where the cluster stands: flows per core of all balancers, by symmetry.
        count_of = np.exp(balancers)
        size = np.exp(cores) * mask
        total_size = np.maximum(size.sum(-1, keepdims=True), _LEAST)
        held = count_of * self._slow
        own_load = held / np.where(size > 0.0, size, 1.0)
        load = (held * mask).sum(-1, keepdims=True) / total_size
        load = load / (1.0 + load)

        # Speeds from FCTs, relative to the servers' mean.
        known_count = np.maximum(known.sum(-1, keepdims=True), 1.0)

        def relative(values: Array) -> Array:
            logs = np.log(np.maximum(np.where(known & (values > 0.0), values, 1.0), _LEAST))
            return np.where(known, logs - np.where(known, logs, 0.0).sum(-1, keepdims=True) / known_count, 0.0)

        sample = -c["fct_decay"] * relative(fct)
        for name, column in (("fct_mean", _FCT_MEAN), ("fct_p90", _FCT_P90), ("duration", _DURATION)):
            sample -= c[name] * relative(stats[..., column])
        sample += c["congestion"] * relative(1.0 + own_load)
        prior = np.where(active, weights - cores, 0.0)
        prior = np.where(active, prior - mean(prior), 0.0)
        # Known servers keep their place among all: those that are not known are where they are configured.
        sample += np.where(known, prior, 0.0).sum(-1, keepdims=True) / known_count
        sample = np.where(known, sample, prior)
        self._log_speed = np.where(
            self._evidence > 0.0, keep["smoothing"] * self._log_speed + (1.0 - keep["smoothing"]) * sample, sample
        )
        rate = np.where(known, self._slow / np.maximum(fct, _LEAST), 0.0)
        self._evidence = keep["memory"] * self._evidence + self._step * rate
        cv = np.where(known, stats[..., _FCT_STD] / np.maximum(stats[..., _FCT_MEAN], _LEAST), 0.0)
        spread = cv.sum(-1, keepdims=True) / known_count
        noise = np.exp(c["log_noise"]) * (spread * spread + 0.01) * (1.0 / (self._evidence + 0.1) + 1.0 / _RESERVOIR)
        deviation = np.where(active, self._log_speed - prior, 0.0)
        deviation = np.where(active, deviation - mean(deviation), 0.0)
        excess = np.where(known, deviation * deviation - noise, 0.0).sum(-1, keepdims=True)
        variance = (np.maximum(excess, 0.0) + _PRIOR_SERVERS * np.exp(c["log_variance"])) / (
            known.sum(-1, keepdims=True) + _PRIOR_SERVERS
        )
        shrinkage = variance / (variance + noise)
        speed = prior + shrinkage * deviation
        gain = c["gain"] + c["gain_load"] * (load - 0.5) + c["gain_balancers"] * balancers
        log_weight = gain * speed

        # What the others hold, per core.
        mine = np.maximum(self._slow + c["fast_share"] * (self._fast - self._slow), 0.0)
        seen = np.log(self._evidence + 0.1)
        share = 1.0 / (1.0 + np.exp(-c["pooling"] - c["pooling_evidence"] * seen))
        worth = size * np.exp(np.clip(log_weight, -3.0, 3.0))
        expected = (mine * mask).sum(-1, keepdims=True) * worth / np.maximum(worth.sum(-1, keepdims=True), _LEAST)
        others = (1.0 - share) * mine + share * expected
        news = np.where(active, np.clip(sample - self._log_speed, -2.0, 2.0), 0.0)
        factor = np.exp(-c["surge"] * news) * np.exp(
            c["log_field"] + c["field_load"] * (load - 0.5) + c["field_balancers"] * (balancers - 1.0)
        )
        field = (count_of - 1.0) * factor * others / np.where(size > 0.0, size, 1.0)
        rest = np.exp(c["rest"] + c["rest_load"] * (load - 0.5) + c["rest_balancers"] * balancers)
        background = field + rest

        if self._network:
            trend = np.log((self._fast + 0.5) / (self._slow + 0.5))
            shape = active.shape
            inputs = np.stack(
                [
                    speed, prior, deviation, shrinkage, np.log1p(own_load), trend,
                    *(np.broadcast_to(x, shape) for x in (cores, load, balancers)), np.log1p(field),
                    np.broadcast_to(spread, shape), 0.3 * seen, news,
                ],
                axis=-1,
            )  # fmt: skip
            more = self._residual(inputs, mask, count)
            log_weight = log_weight + more[..., 0]
            background = background * np.exp(np.clip(more[..., 1], -3.0, 3.0))
        # The weight is cores times the speed per core; what is configured is taken out again.
        change = np.where(active, log_weight - prior, 0.0)
        return np.where(active, change - mean(change), 0.0), np.where(active, background, 0.0)

    def _residual(self, inputs: Array, mask: Array, count: Array) -> Array:
        """The network's outputs [..., N, 2] for inputs [..., N, I]."""
        p = self._network
        # Outputs do not depend on servers that are not there: -1 is below every hidden unit.
        h = np.tanh(inputs @ p["encoder.weight"] + p["encoder.bias"][..., None, :])
        most = np.where(mask[..., None] > 0.0, h, -1.0).max(-2)
        h *= mask[..., None]
        size, head = p["encoder.weight"].shape[-1], p["head.weight"]
        context = np.concatenate([h.sum(-2) / count, most], axis=-1)[..., None, :] @ head[..., size:, :]
        more: Array = h @ head[..., :size, :] + context + p["head.bias"][..., None, :]
        return more
