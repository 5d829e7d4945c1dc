"""The controller's counts and state, and their page for Prometheus."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..features.columns import FEATURE_NAMES
from ..metrics_page import MetricsPage
from ..monitor import STATE_NAMES, state_names
from .envelope import LIMITS

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

_LATENCIES = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_DELAYS = (0.00002, 0.0001, 0.0005, 0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


@dataclass(slots=True)
class Counts:
    """Counts since the controller started; they never decrease.

    Attributes:
        steps: actions written (by a shadow: decided).
        timeouts: observations that did not come in time.
        invalid: observations that break the rules of the binary interface.
        missed: deadlines that passed without an observation of their own.
        errors: of the policy: exceptions, and actions of a wrong shape or not finite.
        overruns: decisions of the policy that took longer than an interval.
        restarts: producers that took over.
        jumps: of the data plane's clock or sequence.
        fallback_steps: steps decided by the fallback.
        held_steps: steps that kept the weights in force because the policy failed.
        fallbacks: times that the fallback took over.
        interventions: steps in which the envelope held the proposal back, by limit.
    """

    steps: int = 0
    timeouts: int = 0
    invalid: int = 0
    missed: int = 0
    errors: int = 0
    overruns: int = 0
    restarts: int = 0
    jumps: int = 0
    fallback_steps: int = 0
    held_steps: int = 0
    fallbacks: int = 0
    interventions: dict[str, int] = field(default_factory=lambda: dict.fromkeys(LIMITS, 0))


@dataclass(frozen=True, slots=True)
class Step:
    """The last step: observation, proposal and result.

    Attributes:
        proposed: float64[N], by the policy or the fallback; None in a step that held.
        weights: float64[N], after the envelope.
        in_force: float64[N], as reported by the data plane with the observation.
        active: bool[N].
        stats: float32[N, 11].
        safe: whether the data plane's safe weights were in force.
        servers: a unique label per server: its name, or its index where it has none.
        states: uint8[N], of :class:`~lbgym.sharedmemory.ServerState`.
        real: the features that this data plane measures.
    """

    proposed: NDArray[np.float64] | None
    weights: NDArray[np.float64]
    in_force: NDArray[np.float64]
    active: NDArray[np.bool_]
    stats: NDArray[np.float32]
    safe: bool
    servers: tuple[str, ...]
    states: NDArray[np.uint8]
    real: frozenset[str]


@dataclass(slots=True)
class State:
    """The controller's state for the metrics; written by the controller's thread, read by the server's.

    Attributes:
        version, policy, region: identify the controller.
        counts: so far.
        step: the last one, None before the first.
        observed_at: ns of the monotonic clock when the newest observation was published; 0 before the first.
        lease: seconds that weights stay good.
        fallback: whether the fallback decides.
        connected: whether it is attached to a region.
        share: part of the way from the safe weights to the policy's that the weights go.
        safe_slot: whether the controller itself has put the safe weights in force, to compare with.
        rolled_back: whether the rollback rule has handed back to the safe weights.
        evidence: of the rollback rule, by metric; an alarm needs twice the reciprocal of its probability.
    """

    version: str
    policy: str
    region: str
    counts: Counts = field(default_factory=Counts)
    step: Step | None = None
    observed_at: int = 0
    lease: float = 0.0
    fallback: bool = False
    connected: bool = False
    share: float = 1.0
    safe_slot: bool = False
    rolled_back: bool = False
    evidence: dict[str, float] = field(default_factory=dict)


_COUNTERS = {
    "steps": ("lbgym_steps", "Actions written."),
    "timeouts": ("lbgym_observation_timeouts", "Observations that did not come in time."),
    "invalid": ("lbgym_invalid_observations", "Observations that break the rules of the binary interface."),
    "missed": ("lbgym_missed_observations", "Deadlines that passed without an observation of their own."),
    "errors": ("lbgym_policy_errors", "Exceptions of the policy, and actions of a wrong shape or not finite."),
    "overruns": ("lbgym_policy_overruns", "Decisions of the policy that took longer than an interval."),
    "restarts": ("lbgym_producer_restarts", "Producers that took over."),
    "jumps": ("lbgym_clock_jumps", "Jumps of the data plane's clock or sequence."),
    "fallback_steps": ("lbgym_fallback_steps", "Steps decided by the fallback."),
    "held_steps": ("lbgym_held_steps", "Steps that kept the weights in force because the policy failed."),
    "fallbacks": ("lbgym_fallbacks", "Times that the fallback took over."),
}


class Metrics(MetricsPage):
    """Prometheus metrics of one controller.

    Args:
        state: everything but the histograms.
        port, address: of the page.

    Raises:
        MissingExtraError, InvalidOptionError: as :class:`~lbgym.metrics_page.MetricsPage`.
    """

    def __init__(self, state: State, port: int, address: str) -> None:
        super().__init__(port, address)
        from prometheus_client import Histogram

        self.latency = Histogram(
            "lbgym_step_latency_seconds",
            "Seconds from the publication of an observation to the writing of the action that follows from it.",
            buckets=_LATENCIES,
            registry=self.registry,
        )
        self.delay = Histogram(
            "lbgym_action_delay_seconds",
            "Seconds of the data plane's clock from the writing of an action until it is in force.",
            buckets=_DELAYS,
            registry=self.registry,
        )
        self.registry.register(_Collector(state))


class _Collector:
    """All metrics but the histograms, made on request: updating a thousand gauges per step would cost milliseconds."""

    def __init__(self, state: State) -> None:
        self._state = state

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily

        state = self._state
        identity = {"version": state.version, "policy": state.policy, "region": state.region}
        yield InfoMetricFamily("lbgym_controller", "Version, policy and region of the controller.", identity)
        for name, (metric, text) in _COUNTERS.items():
            yield CounterMetricFamily(metric, text, getattr(state.counts, name))
        interventions: Any = CounterMetricFamily(
            "lbgym_envelope_interventions", "Steps in which the envelope held the proposal back.", labels=["limit"]
        )
        for limit, count in state.counts.interventions.items():
            interventions.add_metric([limit], count)
        yield interventions
        yield GaugeMetricFamily("lbgym_connected", "1 while attached to a region.", state.connected)
        yield GaugeMetricFamily("lbgym_fallback_active", "1 while the fallback decides.", state.fallback)
        yield GaugeMetricFamily("lbgym_lease_seconds", "Seconds that weights stay good.", state.lease)
        yield GaugeMetricFamily(
            "lbgym_policy_share", "Part of the way from the safe weights to the policy's.", state.share
        )
        if state.evidence:
            yield GaugeMetricFamily(
                "lbgym_rolled_back", "1: the rollback rule has handed back to the safe weights.", state.rolled_back
            )
            yield GaugeMetricFamily(
                "lbgym_safe_slot", "1: the safe weights are in force to compare with.", state.safe_slot
            )
            evidence: Any = GaugeMetricFamily(
                "lbgym_rollback_evidence", "Evidence that the policy is worse than allowed.", labels=["metric"]
            )
            for metric, value in state.evidence.items():
                evidence.add_metric([metric], value)
            yield evidence
        if state.observed_at:
            age = max(0, time.monotonic_ns() - state.observed_at) / 1e9
            yield GaugeMetricFamily("lbgym_observation_age_seconds", "Age of the newest observation.", age)
        if state.step is not None:
            yield from self._of_servers(state.step)

    def _of_servers(self, step: Step) -> Iterator[Metric]:
        from prometheus_client.core import GaugeMetricFamily

        yield GaugeMetricFamily("lbgym_safe_weights_in_force", "1: the data plane's safe weights.", step.safe)
        rows = {
            "lbgym_weight_proposed": ("Weight that the policy or the fallback proposed.", step.proposed),
            "lbgym_weight_written": ("Weight after the envelope.", step.weights),
            "lbgym_weight_in_force": ("Weight in force when the observation was taken.", step.in_force),
            "lbgym_server_active": ("1: the server takes new flows.", step.active),
        }
        for name, (text, values) in rows.items():
            if values is not None:
                gauge: Any = GaugeMetricFamily(name, text, labels=["server"])
                for server, value in zip(step.servers, values.tolist(), strict=True):
                    gauge.add_metric([server], value)
                yield gauge
        # Every state of every server, so that no series comes or goes when a server changes its state.
        states: Any = GaugeMetricFamily(
            "lbgym_server_state", "1: the server is in this state.", labels=["server", "state"]
        )
        for server, current in zip(step.servers, state_names(step.states), strict=True):
            for state in STATE_NAMES:
                states.add_metric([server, state], state == current)
        yield states
        features: Any = GaugeMetricFamily(
            "lbgym_feature",
            "Features of the last observation, those that the data plane measures.",
            labels=["server", "feature"],
        )
        measured = [(j, name) for j, name in enumerate(FEATURE_NAMES) if name in step.real]
        for server, row in zip(step.servers, step.stats.tolist(), strict=True):
            for j, name in measured:
                features.add_metric([server, name], row[j])
        yield features
