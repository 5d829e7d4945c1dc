"""Heuristics that set tables of scores by the balancer's own open flows, for the dispatch rule ``table``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...checks import number, whole
from ...errors import PolicyError
from ..base import WeightPolicy, check_features
from ._estimates import FCT, FCT_NAME, LEAST_FCT, OPEN_FLOWS, OPEN_FLOWS_NAME, News, RunningSum, mean_of
from .static import StaticWeights, UniformWeights

#: Scores of a table; beyond, the last difference goes on.
WIDTH = 64
_COUNTS = np.arange(WIDTH, dtype=np.float64)


class NeverQueueWeights(WeightPolicy):
    """An idle server first, else SED: ``nq`` of IPVS (Linux, net/netfilter/ipvs/ip_vs_nq.c).

    Idle is a server without a flow of this balancer.

    Args:
        weights: of the servers, such as their cores.
    """

    sets_tables = True

    def __init__(self, weights: Sequence[float] | NDArray[Any]) -> None:
        self._weights = StaticWeights(weights)

    def weights(self, features: NDArray[Any], active: NDArray[np.bool_]) -> NDArray[np.float64]:
        """The given weights; shapes as in :meth:`WeightPolicy.weights`. The score is 0 at 0 flows, else (q + 1) / w."""
        weights = self._weights.weights(features, active)
        self.tables = np.where(_COUNTS > 0, (_COUNTS + 1) / weights[..., None], 0.0)
        return weights


class IdleQueueWeights(WeightPolicy):
    """Join the idle queue, on what a balancer sees: an idle server, else any.

    JIQ (Y. Lu et al., Performance Evaluation 68(11), 2011) has servers report to a balancer that they are idle. Here
    idle is a server without a flow of this balancer; of several, and where there is none, the flow's hash chooses.
    """

    sets_tables = True

    def weights(self, features: NDArray[Any], active: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Ones; shapes as in :meth:`WeightPolicy.weights`. The score is 0 at 0 flows, else 1."""
        check_features(self, features, active)
        self.tables = np.broadcast_to(np.minimum(_COUNTS, 1.0), (*active.shape, WIDTH)).copy()
        return np.ones(active.shape)


class HotColdWeights(WeightPolicy):
    """Prequal's hot-cold lexicographic rule, on what a balancer sees.

    Prequal (B. Wydrowski et al., NSDI 2024) probes servers for their requests in flight and latency. A server is hot if
    its requests in flight are above a quantile of all; among cold servers the one with the least latency is chosen,
    if all are hot the one with the fewest requests in flight. Here the balancer's own open flows stand for the requests
    in flight, the decayed mean FCT for the latency, and every server is looked at: no probes, hence "local".

    Prequal takes the latency of requests that met about as many others. So here the FCT is scaled by (q + 1) / (n + 1),
    n the moving average of the open flows and q their present number; without that the fastest servers fill up to the
    limit, and raise it. A server from which no flow has come back yet counts with the mean latency of the others.

    Args:
        quantile: of the open flows; 2 ** -0.25 in the paper.
        smoothing: share of the former mean of n that a step keeps, in [0, 1); the default forgets as the FCT does.
    """

    uses_features: tuple[str, ...] = (OPEN_FLOWS_NAME, FCT_NAME)

    sets_tables = True

    def __init__(self, quantile: float = 2**-0.25, smoothing: float = 0.9**0.25) -> None:
        self._quantile = number("quantile", quantile, low=0.0, high=1.0, error=PolicyError)
        self._flows = RunningSum(smoothing)

    def reset(self, seed: int | None = None) -> None:
        """Forget the flows seen."""
        self._flows.reset()

    def weights(self, features: NDArray[Any], active: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Ones; shapes as in :meth:`WeightPolicy.weights`.

        The score is below 1 and in proportion to the latency at cold counts, and 1 + q at hot ones.
        """
        features = check_features(self, features, active)
        fct, flows = features[..., FCT], features[..., OPEN_FLOWS]
        past, total = self._flows(flows)
        known = (fct > 0) & active
        latency = np.where(known, fct, mean_of(fct, known)) / (past / total + 1)
        cold = latency[..., None] * (_COUNTS + 1)
        greatest = cold.max(axis=(-2, -1), keepdims=True)
        cold = cold / np.where(greatest > 0, greatest, 1.0)
        limit = _quantile(flows, active, self._quantile)
        # The last columns are hot whatever the counts are: tables go on by their last difference.
        hot = (limit[..., None] < _COUNTS) | (_COUNTS >= WIDTH - 2)
        self.tables = np.where(hot, 1.0 + _COUNTS, cold)
        return np.ones(active.shape)


class C3Weights(WeightPolicy):
    """The cubic ranking of C3 (L. Suresh et al., NSDI 2015), as in Elasticsearch's ``ResponseCollectorService``.

    A server's score is R - S + q³ S with q = 1 + m n + Q: R the moving average of the response times, S that of the
    service times (1 / μ in the paper), n the balancer's open flows there, m the number of balancers ("clients", whose
    flows are taken to be as many), Q the moving average of the queue that servers report.

    A balancer sees no service times and no queues. Here R is the moving average of the decayed mean FCT over steps in
    which a flow came back; S is that of the FCT over the flows that share a core, max(1, m n / cores); Q is the moving
    average of m n. A server from which no flow has come back yet counts with the mean times of the others.

    Args:
        cores: of each server, which an operator knows; None: one each.
        num_balancers: m.
        smoothing: weight of a new sample, in (0, 1]; 0.3 in Elasticsearch.
    """

    uses_features: tuple[str, ...] = (OPEN_FLOWS_NAME, FCT_NAME)

    sets_tables = True

    def __init__(self, cores: Sequence[float] | None = None, num_balancers: int = 1, smoothing: float = 0.3) -> None:
        self._cores = StaticWeights(cores) if cores is not None else UniformWeights()
        self._balancers = whole("num_balancers", num_balancers, error=PolicyError)
        self._smoothing = number("smoothing", smoothing, above=0.0, high=1.0, error=PolicyError)
        self._news = News()
        self.reset()

    def reset(self, seed: int | None = None) -> None:
        """Forget the averages."""
        self._news.reset()
        self._response: NDArray[np.float64] | None = None

    def weights(self, features: NDArray[Any], active: NDArray[np.bool_]) -> NDArray[np.float64]:
        """The cores; shapes as in :meth:`WeightPolicy.weights`."""
        features = check_features(self, features, active)
        cores = self._cores.weights(features, active)
        fct, flows = features[..., FCT], self._balancers * features[..., OPEN_FLOWS]
        if self._response is None or self._response.shape != active.shape:
            self._response, self._service, self._queue = np.zeros((3, *active.shape))
        news = self._news(fct) & (fct > 0)
        for average, sample in ((self._response, fct), (self._service, fct / np.maximum(1.0, flows / cores))):
            kept = np.where(average > 0, 1 - self._smoothing, 0.0)
            average[...] = np.where(news, kept * average + (1 - kept) * sample, average)
        self._queue += self._smoothing * (flows - self._queue)
        known = (self._response > 0) & active
        response, service = (
            np.where(known, np.maximum(average, LEAST_FCT), np.maximum(mean_of(average, known), LEAST_FCT))[..., None]
            for average in (self._response, self._service)
        )
        queue = 1 + self._balancers * _COUNTS + self._queue[..., None]
        # R - S is at least 0 but for unlike samples, and scores must not be negative.
        scores = np.maximum(response - service, 0.0) + queue**3 * service
        self.tables = scores
        return cores


def _quantile(values: NDArray[np.float64], known: NDArray[np.bool_], part: float) -> NDArray[np.float64]:
    """The least known value that this part of the known ones does not exceed, along the last axis, which is kept."""
    count = known.sum(axis=-1, keepdims=True)
    ordered = np.sort(np.where(known, values, np.inf), axis=-1)
    place = np.clip(np.ceil(part * count).astype(np.int64) - 1, 0, np.maximum(count - 1, 0))
    return np.where(count > 0, np.take_along_axis(ordered, place, axis=-1), 0.0)
