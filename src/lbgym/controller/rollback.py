"""The rule that hands back to the safe weights when the policy is worse: :class:`RollbackGuard`.

Traffic changes by the hour, so the policy is not compared with what the safe weights did yesterday: the guard puts the
safe weights in force now and then and compares with those times (a switchback experiment). Time is cut in slots, and
``CYCLE`` slots make a cycle: one of them, drawn at random, has the safe weights, the others the policy's. The first
half of a slot does not count, as its flows met the queues that the slot before has left.

**FCT.** After each cycle it is known whether the median FCT of the policy's slots exceeds ``bound`` times that of the
safe slot. If the policy is no worse than the bound allows, that happens with probability 1/2 at most, whatever the
distribution of FCTs and however the load drifts, since the order was drawn at random. A bet on it that is fair at 1/2,
the wealth

    W = mean over λ of Π (1 + λ s),   s = 1 if it happened, else -1

is then a nonnegative supermartingale, and by Ville's inequality the probability that it *ever* reaches 1/α is at most
α, however long the controller runs and however often one looks (Shafer et al., Test martingales, 2011).

**Failures.** They cannot wait for cycles. Each step of the policy's slots has a share x of failed and rejected flows
among those that ended. If its expectation, whatever has happened before, is at most m, the share under the safe weights
plus the allowed excess, then Π (1 + λ (x - m)) with 0 <= λ < 1/m is a supermartingale as well (Waudby-Smith and Ramdas,
Estimating means of bounded random variables by betting, 2024). It begins anew when it falls below 1/2, so that a long
good time cannot hide a bad one; to allow for that, the k-th such beginning must reach k (k + 1) / α, whose reciprocals
sum to α. m is measured in the safe slots, the first of which comes before the first cycle.

Each test has half of the false-alarm probability.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import PolicyError
from ..features.columns import FEATURE_NAMES, column_index

#: Slots of a cycle; even, so that the median of the policy's is that of an odd number, and the chance exactly 1/2.
CYCLE = 4
#: Metrics, and the feature that a data plane measures where it measures the metric.
_FEATURES = {"fct_mean": "fct_mean", "fct_p90": "fct_p90_decay"}
METRICS = tuple(_FEATURES)
#: Share of a slot at its beginning that does not count.
_SETTLE = 0.5
#: Fewest completed flows of a slot that says something.
_FEWEST = 20
#: Bets of the tests.
_LAMBDAS = np.array([0.25, 0.5, 0.75, 0.95])
_FAILURE_LAMBDAS = np.array([0.1, 0.3, 0.6, 0.9])
_P90 = column_index(_FEATURES["fct_p90"])


@dataclass(frozen=True, slots=True)
class Alarm:
    """Evidence that the policy is worse than allowed.

    Attributes:
        metric: "fct_mean", "fct_p90" or "failures".
        policy: what it was under the policy: median over the last cycles' slots, or the share of failed flows.
        safe: the same under the safe weights.
        evidence: the wealth of the bet; its reciprocal bounds the probability of such a wealth without a reason.
        seconds: of the data plane's clock since the guard began.
    """

    metric: str
    policy: float
    safe: float
    evidence: float
    seconds: float

    def __str__(self) -> str:
        if self.metric == "failures":
            return (
                f"{100 * self.policy:.3g} % of the flows failed under the policy, "
                f"{100 * self.safe:.3g} % under the safe weights"
            )
        return f"{self.metric} of {self.policy:.4g} s under the policy, {self.safe:.4g} s under the safe weights"


class RollbackGuard:
    """Says when the safe weights are due, and when the policy is worse than allowed.

    Args:
        bound: largest FCT under the policy over that under the safe weights, at least 1.
        metric: "fct_mean", of the flows that end in a slot, or "fct_p90", the decayed feature, by completed flows.
        failures: largest excess of the share of failed and rejected flows.
        slot: seconds of the data plane's clock.
        alarm: probability of a false alarm, ever.
        seed: of the order of slots; None: from the operating system.

    Attributes:
        cycles: that counted so far.
        wealth: of the bet on the FCT.
        failure_wealth: of the bet on failures, over what an alarm needs times 1/α.
    """

    def __init__(
        self,
        bound: float,
        metric: str = "fct_p90",
        failures: float = 0.01,
        slot: float = 15.0,
        alarm: float = 0.01,
        seed: int | None = None,
    ) -> None:
        self._bound, self._metric, self._excess, self._slot = bound, metric, failures, slot
        self._needed = 2.0 / alarm
        self._generator = np.random.default_rng(seed)
        self._began: float | None = None
        self.cycles = 0
        self._log_wealth = np.zeros(len(_LAMBDAS))
        self.wealth = 1.0
        self._failure_log = np.zeros(len(_FAILURE_LAMBDAS))
        self._attempts = 1
        self.failure_wealth = 1.0
        self._lost = {True: 0.0, False: 0.0}
        self._ended = {True: 0.0, False: 0.0}
        self._run = [0.0, 0.0]  # lost and ended flows since the bet on failures began
        self._history: list[tuple[float, float]] = []
        self.restart()

    def restart(self) -> None:
        """Begin a new cycle with the next step, as when the clock jumped or another producer took over."""
        self._start: float | None = None
        # One slot under the safe weights before the first cycle, until its failures are known.
        self._first = self._ended[True] < _FEWEST
        self._new_cycle()

    def check_features(self, features: Collection[str]) -> None:
        """Refuse a data plane that does not measure what the rule compares.

        Args:
            features: those that it measures, and perhaps other columns.

        Raises:
            PolicyError: naming the one that is missing.
        """
        needed = _FEATURES[self._metric]
        if needed not in features:
            measured = ", ".join(name for name in FEATURE_NAMES if name in features)
            raise PolicyError(
                f"the rollback rule by {self._metric!r} needs {needed}, which the data plane does not measure; leave "
                f"rollback out where it measures only {measured or 'nothing'}"
            )

    def _new_cycle(self) -> None:
        self._safe_slot = int(self._generator.integers(CYCLE))
        self._sums = np.zeros((CYCLE, 2))  # of FCT times flows, and of flows

    def _position(self, timestamp: float) -> float:
        """Slots since the cycle began."""
        return 0.0 if self._start is None else (timestamp - self._start) / self._slot

    def safe_now(self, timestamp: float) -> bool:
        """True if the safe weights are due from ``timestamp`` on."""
        return self._first or int(self._position(timestamp) + 1e-9) == self._safe_slot

    def observe(
        self,
        timestamp: float,
        safe: bool,
        completed: int,
        lost: int,
        fct_mean: float,
        stats: NDArray[np.float32],
        finished: NDArray[np.float64] | None = None,
    ) -> Alarm | None:
        """Take a step into account.

        Args:
            timestamp: at its end, seconds.
            safe: whether the safe weights were in force in it.
            completed: flows that completed in it.
            lost: flows that failed or were rejected in it.
            fct_mean: of those that completed, seconds; 0 if unknown.
            stats: float32[N, 11], at its end.
            finished: float64[N], flows that completed at each server; None: weigh them alike.

        Returns:
            The alarm, if this step makes it.
        """
        if self._began is None:
            self._began = timestamp
        if self._start is None:
            self._start = timestamp
            return None
        position = self._position(timestamp)
        if self._first:
            self._count_failures(timestamp, safe, completed, lost)
            if position >= 1.0 - 1e-9 and self._ended[True] >= _FEWEST:
                self._first, self._start = False, timestamp
            return None
        slot = min(math.ceil(position - 1e-9) - 1, CYCLE - 1)
        if slot >= 0 and position - slot > _SETTLE and (slot == self._safe_slot) == safe and completed > 0:
            value = fct_mean if self._metric == "fct_mean" else _p90(stats, finished)
            if value > 0.0:
                self._sums[slot] += (value * completed, completed)
        alarm = self._count_failures(timestamp, safe, completed, lost)
        if position >= CYCLE - 1e-9:
            alarm = self._close_cycle(timestamp) or alarm
        return alarm

    def _close_cycle(self, timestamp: float) -> Alarm | None:
        sums, safe_slot = self._sums, self._safe_slot
        self._start = timestamp
        self._new_cycle()
        if sums[:, 1].min() < _FEWEST:
            return None
        means = sums[:, 0] / sums[:, 1]
        safe, policy = float(means[safe_slot]), float(np.median(np.delete(means, safe_slot)))
        self._history = [*self._history[-7:], (policy, safe)]
        self.cycles += 1
        happened = policy > self._bound * safe
        self._log_wealth += np.log1p(_LAMBDAS if happened else -_LAMBDAS)
        self.wealth = _mean_exp(self._log_wealth)
        if self.wealth < self._needed:
            return None
        policies, safes = (float(np.median(column)) for column in zip(*self._history, strict=True))
        return Alarm(self._metric, policies, safes, self.wealth, timestamp - (self._began or 0.0))

    def _count_failures(self, timestamp: float, safe: bool, completed: int, lost: int) -> Alarm | None:
        ended = completed + lost
        if ended <= 0:
            return None
        self._lost[safe] += lost
        self._ended[safe] += ended
        if safe:
            return None
        # One more that failed, so that few flows without a failure are no proof that there is none.
        base = (self._lost[True] + 1.0) / (self._ended[True] + 1.0)
        allowed = min(max(base + self._excess, 1e-6), 1.0 - 1e-6)
        self._run[0] += lost
        self._run[1] += ended
        self._failure_log += np.log1p(_FAILURE_LAMBDAS / allowed * (lost / ended - allowed))
        wealth = _mean_exp(self._failure_log)
        attempts = self._attempts * (self._attempts + 1)
        self.failure_wealth = wealth / attempts
        if self.failure_wealth >= self._needed:
            share = self._run[0] / self._run[1]
            return Alarm(
                "failures",
                share,
                self._lost[True] / max(self._ended[True], 1.0),
                self.failure_wealth,
                timestamp - (self._began or 0.0),
            )
        if wealth < 0.5:
            self._failure_log[:] = 0.0
            self._attempts += 1
            self._run = [0.0, 0.0]
        return None


def _mean_exp(logs: NDArray[np.float64]) -> float:
    """Mean of the exponentials."""
    return float(np.exp(np.clip(logs, -700.0, 700.0)).mean())


def _p90(stats: NDArray[np.float32], finished: NDArray[np.float64] | None) -> float:
    """The servers' decayed 90th percentiles, by the flows that completed at each."""
    values = stats[:, _P90].astype(np.float64)
    weights = (values > 0.0) if finished is None else np.where(values > 0.0, finished, 0.0)
    total = float(weights.sum())
    return float(values @ weights / total) if total > 0.0 else 0.0
