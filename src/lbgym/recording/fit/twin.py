"""A scenario from a recording: :func:`fit_recording`."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ... import __version__, checks
from ...atomic import write_whole
from ...errors import InvalidOptionError, RecordingError
from ...scenarios import DISPATCH_RULES, Exponential, Scenario, Server, Workload, to_toml
from ..offline import Recording, load_recording
from .arrivals import ArrivalEstimate, estimate_arrivals
from .cluster import CORES, ClusterEstimate, estimate_cluster
from .counts import Counts
from .demand import KINDS, DemandEstimate, estimate_demand
from .dispatch import DispatchEstimate, estimate_dispatch
from .replay import Outcome, quantiles, recorded, replay

#: Shortest recording that can be fitted, seconds.
SHORTEST = 10.0
#: Most seconds before the held-out part that fill the twin's servers and reservoirs.
_WARMUP = 60.0
#: Replicas that predict the held-out part.
_REPLICAS = 8
#: A server whose speed differs by so many standard errors between the halves of a recording has changed.
_DRIFT = 4.0
#: Rows should follow each other faster than this part of a mean FCT for cores to be told from speed.
_COARSE = 1.5

#: Columns of the comparison with the held-out part.
MEASURES = {
    "fct_mean": "mean FCT, s",
    "fct_p90": "p90 of FCT, s",
    "open_flows": "open flows",
    "share": "share of flows",
}


@dataclass(frozen=True, slots=True)
class FittedServer:
    """An estimated server; intervals are at 95 %.

    Attributes:
        name: of the data plane, or its index.
        cores: given or estimated.
        speed, speed_low, speed_high: of a core, by the fit's convention.
        rate: flows per second that one core completes.
        busy: mean share of its cores at work.
        completed: flows.
    """

    name: str
    cores: int
    speed: float
    speed_low: float
    speed_high: float
    rate: float
    busy: float
    completed: int


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A measure of a server in the held-out part, predicted and recorded.

    Attributes:
        server: its name; "all" for the cluster.
        measure: one of ``MEASURES``.
        predicted: mean of the twin's replicas.
        low, high: the least and the largest of them.
        recorded: NaN where the data plane does not measure it.
    """

    server: str
    measure: str
    predicted: float
    low: float
    high: float
    recorded: float

    @property
    def error(self) -> float:
        """Relative."""
        return self.predicted / self.recorded - 1.0 if self.recorded else math.nan


@dataclass(frozen=True, eq=False)
class Fit:
    """A twin of a recorded cluster, and what is known of it.

    Attributes:
        scenario: the twin.
        source: of the recording, for people.
        servers: estimated.
        cores_from: "given" or "estimated".
        convention: fixes the unit of speed, which no recording shows.
        mean_demand: core-seconds of a flow, by the convention.
        demand: estimated law.
        arrivals: estimated.
        dispatch: estimated rule; None if it was given.
        overhead, overhead_low, overhead_high: seconds of each FCT that no server works on. A scenario has no such time,
            so the twin's FCTs are shorter by it; ``held_out`` adds it.
        seconds, held_out_seconds: length of the part that is fitted, and of the other.
        held_out: how the twin predicts the other part.
        warnings: sentences on what the recording does not show, or the twin does not have.
    """

    scenario: Scenario
    source: str
    servers: tuple[FittedServer, ...]
    cores_from: str
    convention: str
    mean_demand: float
    demand: DemandEstimate
    arrivals: ArrivalEstimate
    dispatch: DispatchEstimate | None
    overhead: float
    overhead_low: float
    overhead_high: float
    seconds: float
    held_out_seconds: float
    held_out: tuple[HeldOut, ...]
    warnings: tuple[str, ...] = field(default=())

    def to_toml(self) -> str:
        """The scenario as TOML, with comments on where it is from."""
        lines = [
            f"Fitted by lbgym {__version__} to {self.seconds:.0f} s of {self.source}; held out: "
            f"{self.held_out_seconds:.0f} s.",
            f"Only ratios of demand to speed are identified; {self.convention}.",
            *(
                f"{server.name}: {server.cores} core{'s' * (server.cores != 1)} ({self.cores_from}), "
                f"speed {server.speed:.4g} "
                f"({server.speed_low:.4g} to {server.speed_high:.4g}), {100 * server.busy:.0f} % busy"
                for server in self.servers
            ),
        ]
        if self.overhead:
            lines.append(
                f"Of each FCT, {self.overhead:.4g} s are spent outside the servers, which this scenario lacks."
            )
        lines += self.warnings
        comments = "".join(f"# {''.join(c if c.isprintable() else '?' for c in line)}\n" for line in lines)
        return f"{comments}\n{to_toml(self.scenario)}"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`to_toml` to a file, whole or not at all.

        Raises:
            FileWriteError: if it cannot be written.
        """
        text = self.to_toml()
        write_whole(Path(path), lambda stream: stream.write(text.encode()))

    def to_dict(self) -> dict[str, Any]:
        """Everything but the scenario, of JSON's types."""
        arrivals = self.arrivals
        return {
            "source": self.source,
            "seconds": self.seconds,
            "held_out_seconds": self.held_out_seconds,
            "convention": self.convention,
            "mean_demand": self.mean_demand,
            "cores_from": self.cores_from,
            "servers": [
                {name: getattr(server, name) for name in FittedServer.__dataclass_fields__} for server in self.servers
            ],
            "demand": {
                "law": _named(self.demand.law),
                "errors": self.demand.errors,
                "likelihoods": self.demand.likelihoods,
                "singles": self.demand.singles,
                "fixed": self.demand.fixed,
            },
            "arrivals": {
                "process": _named(arrivals.process),
                "rate": arrivals.rate,
                "rate_low": arrivals.rate_low,
                "rate_high": arrivals.rate_high,
                "dispersion": {f"{window:g}": value for window, value in arrivals.dispersion.items()},
                "bic": arrivals.bic,
                "times": arrivals.times.tolist(),
                "rates": arrivals.rates.tolist(),
            },
            "dispatch": {
                "rule": self.scenario.dispatch,
                "flows": 0 if self.dispatch is None else self.dispatch.flows,
                "scores": {} if self.dispatch is None else self.dispatch.scores,
            },
            "overhead": {"value": self.overhead, "low": self.overhead_low, "high": self.overhead_high},
            "held_out": [
                {name: getattr(row, name) for name in HeldOut.__dataclass_fields__} | {"error": row.error}
                for row in self.held_out
            ],
            "warnings": list(self.warnings),
        }


def _named(instance: Any) -> dict[str, Any]:
    return {"kind": type(instance).__name__, **instance.__dict__}


def fit_recording(
    recording: Recording | str | os.PathLike[str],
    *,
    cores: Sequence[int] | int | str | None = None,
    dispatch: str | None = None,
    demand: str | None = None,
    mean_demand: float | None = None,
    hold_out: float = 0.25,
    name: str = "twin",
    seed: int = 0,
) -> Fit:
    """Estimate the scenario that a recording is of.

    The recording must be of a balancer that has the servers for itself. Speeds come from the flows completed and the
    time that cores were busy; cores, if they are not given, and a fixed overhead of each flow from how the rate of
    completions grows with the open flows (see ``lbgym.recording.fit.cluster``); the law of demands from the spread of
    FCTs, by simulation; arrivals and the dispatch rule from the counts.

    No recording shows the unit of demand and speed, only their ratio. By convention the mean core of the cluster has
    speed 1, unless ``mean_demand`` is given.

    Args:
        recording: the recording or its path.
        cores: of each server, or of every one; "weights": the safe weights are the cores; None: estimated.
        dispatch: rule of the data plane; None: estimated.
        demand: "deterministic", "exponential", "lognormal", "bounded_pareto", "empirical"; None: the best.
        mean_demand: core-seconds of a flow, in the mean.
        hold_out: share of the time, at the end, that the twin is tested on; 0: none.
        name: of the scenario.
        seed: of the bootstrap and the simulations.

    Raises:
        RecordingError: if the recording is too short, or a server has too few flows.
        InvalidOptionError, UnknownNameError: for a value out of its range.
    """
    hold_out = checks.number("hold_out", hold_out, low=0.0, high=0.9)
    if dispatch is not None:
        checks.choice("dispatch rule", dispatch, DISPATCH_RULES)
    if demand is not None:
        checks.choice("demand", demand, KINDS)
    if mean_demand is not None:
        checks.number("mean_demand", mean_demand, low=1e-9, high=1e9)
    generator = np.random.default_rng(checks.whole("seed", seed, low=0))
    if not isinstance(recording, Recording):
        recording = load_recording(recording)
    counts = Counts.of(recording)
    elapsed = np.cumsum(counts.seconds)
    fitted = counts.part(elapsed <= (1.0 - hold_out) * elapsed[-1] + 1e-9)
    if not len(fitted) or fitted.duration < SHORTEST:
        raise RecordingError(
            f"{recording!r} has {fitted.duration:.3g} s to fit besides those held out; it needs {SHORTEST:g} s, and "
            "minutes for speeds within a few percent"
        )
    warnings: list[str] = []
    known = _cores_of(recording, cores)
    if known is None and float(np.median(fitted.seconds)) > _COARSE * _overall_fct(fitted):
        known = _cores_of(recording, "weights", strict=False)
        warnings.append(
            f"Rows are {float(np.median(fitted.seconds)):.3g} s apart, and the mean FCT is {_overall_fct(fitted):.3g} "
            f"s: cores cannot be told from speed; assumed {_listed(known or ())}. Give the cores."
        )
    cluster = estimate_cluster(fitted.levels(), known, generator)
    demand_scale = cluster.cores.sum() / cluster.capacity if mean_demand is None else mean_demand
    servers = _servers(recording, cluster, mean_demand)
    warnings += _what_is_missing(recording, fitted, cluster, known is not None)
    arrivals = estimate_arrivals(fitted.seconds, fitted.arrivals, generator)
    rule = estimate_dispatch(fitted) if dispatch is None else None
    if rule is not None and not rule.scores:
        warnings.append(
            f"Only {rule.flows} flows show how the data plane dispatches: {rule.rule!r} is assumed; give the rule."
        )
    chosen = dispatch or (rule.rule if rule is not None else "sed")
    weights = recording.safe_weights[-1]
    scenario = Scenario(
        name=name,
        description=f"Fitted to a recording of region {recording.metadata['region']!r}.",
        servers=tuple(
            Server(
                cores=server.cores,
                speed=float(f"{server.speed:.6g}"),
                weight=float(weights[j]) if 0.0 < weights[j] != server.cores else None,
            )
            for j, server in enumerate(servers)
        ),
        workload=Workload(
            arrivals=arrivals.process, demand=Exponential(mean=demand_scale), rate=float(f"{arrivals.rate:.6g}")
        ),
        dispatch=chosen,
    )
    law = estimate_demand(
        scenario, fitted, demand_scale, generator, KINDS if demand is None else (demand,), overhead=cluster.overhead
    )
    if not law.errors:
        warnings.append(
            "The law of demands cannot be estimated: too few flows, or no FCT is measured; assumed exponential."
        )
    scenario = scenario.with_changes(
        workload=Workload(arrivals=arrivals.process, demand=law.law, rate=scenario.workload.rate)
    )
    rest = float(elapsed[-1] - fitted.duration)
    return Fit(
        scenario=scenario,
        source=f"{len(recording):,} observations of region {recording.metadata['region']!r}",
        servers=servers,
        cores_from="estimated" if known is None else "given",
        convention=(
            "the mean core of the cluster has speed 1" if mean_demand is None else f"the mean demand is {mean_demand:g}"
        ),
        mean_demand=float(demand_scale),
        demand=law,
        arrivals=arrivals,
        dispatch=rule,
        overhead=cluster.overhead,
        overhead_low=cluster.overhead_low,
        overhead_high=cluster.overhead_high,
        seconds=fitted.duration,
        held_out_seconds=rest,
        held_out=_predicted(scenario, counts, fitted, servers, cluster.overhead, generator) if rest > 0.0 else (),
        warnings=tuple(warnings),
    )


def _cores_of(
    recording: Recording, cores: Sequence[int] | int | str | None, *, strict: bool = True
) -> list[int] | None:
    """Cores that are given, checked; None if they are to be estimated."""
    n = recording.active.shape[1]
    if cores is None:
        return None
    if isinstance(cores, str):
        if cores != "weights":
            raise InvalidOptionError(f"cores must be whole numbers or 'weights', got {cores!r}")
        weights = recording.safe_weights[-1]
        whole = np.maximum(np.rint(weights), 1.0)
        if (whole != weights).any():
            if not strict:
                return [1] * n
            raise InvalidOptionError(
                f"the safe weights {_listed(weights)} are no numbers of cores: give the cores of each server"
            )
        return [int(x) for x in whole]
    given = [cores] * n if isinstance(cores, int) else list(cores)
    if len(given) != n:
        raise InvalidOptionError(f"cores must be {n} numbers, one per server, got {len(given)}")
    return [checks.whole("cores", c, high=max(CORES)) for c in given]


def _overall_fct(counts: Counts) -> float:
    """Mean FCT of all servers, seconds."""
    return float(counts.mean_open.sum() * counts.duration / max(counts.completed.sum(), 1))


def _listed(values: Any) -> str:
    return ", ".join(f"{x:g}" for x in values)


def _servers(recording: Recording, cluster: ClusterEstimate, mean_demand: float | None) -> tuple[FittedServer, ...]:
    """Speeds by the convention, with intervals."""
    cores = cluster.cores
    if mean_demand is None:
        scale, scales = cores.sum() / cluster.capacity, cores.sum() / (cluster.samples @ cores)
    else:
        scale, scales = mean_demand, np.full(len(cluster.samples), mean_demand)
    speeds = cluster.rates * scale
    low, high = np.quantile(cluster.samples * scales[:, None], [0.025, 0.975], axis=0)
    return tuple(
        FittedServer(
            name=name or f"server {j}",
            cores=int(cores[j]),
            speed=float(speeds[j]),
            speed_low=float(low[j]),
            speed_high=float(high[j]),
            rate=float(cluster.rates[j]),
            busy=float(cluster.busy[j]),
            completed=int(cluster.completed[j]),
        )
        for j, name in enumerate(recording.server_names())
    )


def _what_is_missing(recording: Recording, fitted: Counts, cluster: ClusterEstimate, cores_given: bool) -> list[str]:
    """Sentences on what the recording does not show, or the twin does not have."""
    found = []
    names = [name or f"server {j}" for j, name in enumerate(recording.server_names())]
    lost, ended = int(fitted.lost.sum()), int((fitted.lost + fitted.completed).sum())
    if lost > 0.001 * ended:
        found.append(f"{lost:,} of {ended:,} flows were rejected or failed; the twin has no limits and rejects none.")
    middle = len(fitted) // 2
    halves = [fitted.part(slice(None, middle)), fitted.part(slice(middle, None))]
    if min(half.completed.sum(axis=0).min() for half in halves) >= 50:
        cores = cluster.cores.tolist()
        first, second = (estimate_cluster(half.levels(), cores, np.random.default_rng(0)) for half in halves)
        change = np.abs(np.log(second.rates / first.rates))
        error = np.hypot(*(np.log(half.samples / half.rates).std(axis=0) for half in (first, second)))
        for j in np.flatnonzero((change > _DRIFT * error) & (change > 0.1)):
            times = second.rates[j] / first.rates[j]
            found.append(f"{names[j]} changed its speed: {times:.2f} times as fast in the second half.")
    always = [names[j] for j in np.flatnonzero(cluster.busy > 0.98)]
    if always and not cores_given:
        found.append(f"{', '.join(always)}: always busy, so that cores cannot be told from speed; give the cores.")
    few = [names[j] for j in np.flatnonzero(cluster.completed < 200)]
    if few:
        found.append(f"{', '.join(few)}: fewer than 200 flows, so that the speed is uncertain.")
    return found


def _predicted(
    scenario: Scenario,
    counts: Counts,
    fitted: Counts,
    servers: Sequence[FittedServer],
    overhead: float,
    generator: np.random.Generator,
) -> tuple[HeldOut, ...]:
    """The held-out part as the twin predicts it, under the recorded arrivals and weights."""
    warmup = min(_WARMUP, fitted.duration / 2.0)
    behind = fitted.duration - np.cumsum(fitted.seconds) < warmup
    lead = fitted.part(behind)
    span = counts.part(slice(len(fitted) - len(lead), None))
    flows = int(span.arrivals.sum())
    demand = scenario.workload.demand
    demands = [quantiles(demand, generator.standard_normal(flows)) for _ in range(_REPLICAS)]
    outcome = replay(scenario, span, demands, range(_REPLICAS), lead.duration, generator)
    seen = recorded(counts.part(slice(len(fitted), None)))
    rows = []
    for measure in MEASURES:
        predicted, found = _with_all(outcome, measure, overhead), _with_all(seen, measure, 0.0)
        for j, server in enumerate([*(server.name for server in servers), "all"]):
            if measure == "share" and server == "all":
                continue
            values = predicted[:, j]
            rows.append(
                HeldOut(
                    server, measure, float(values.mean()), float(values.min()), float(values.max()), float(found[0, j])
                )
            )
    return tuple(rows)


def _with_all(outcome: Outcome, measure: str, overhead: float) -> NDArray[np.float64]:
    """A measure of every server and of the cluster, float64[R, N + 1], with the time outside the servers."""
    values: NDArray[np.float64] = getattr(outcome, measure)
    share = outcome.share / outcome.share.sum(axis=1, keepdims=True)
    if measure.startswith("fct"):
        values = values + overhead
        whole = np.nansum(values * share, axis=1)
        if np.isnan(values).all():
            whole = np.full(len(values), np.nan)
    else:
        if measure == "open_flows" and overhead:
            # Little's law: what is outside is as much longer open.
            values = values * (1.0 + overhead / np.maximum(outcome.fct_mean, 1e-300))
        whole = values.sum(axis=1)
    return np.concatenate([values, whole[:, None]], axis=1)
