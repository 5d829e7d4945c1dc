"""Repeat a part of a result and compare it bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...errors import InvalidOptionError, ResultError
from ..pool import Job, run_jobs
from .protocol import Protocol
from .results import KEPT, SuiteResult, kept
from .run import versions


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A figure that came out otherwise."""

    case: str
    seed: int
    metric: str
    recorded: float
    repeated: float

    def __str__(self) -> str:
        return f"{self.case}, seed {self.seed}: {self.metric} is {self.repeated!r}, recorded was {self.recorded!r}"


@dataclass(frozen=True, slots=True)
class Verification:
    """The outcome of a verification.

    Attributes:
        runs: how many were repeated.
        mismatches: figures that differ, in the order of the cases.
        versions: that differ from those of the result: name, then recorded and present one.
    """

    runs: int
    mismatches: tuple[Mismatch, ...]
    versions: dict[str, tuple[str, str]]


def verify_result(
    result: SuiteResult,
    protocol: Protocol,
    *,
    runs: int | None = None,
    draw: int = 0,
    model: Path | None = None,
    processes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """Repeat some of a result's runs and compare what was kept of them, bit for bit.

    Args:
        result: of a suite.
        protocol: that it is of.
        runs: how many, spread evenly over the cases; None: one per case.
        draw: seed of the draw of the runs.
        model: the trained model's file, if it is one.
        processes: None: one per core.
        progress: called after every run with the runs done and all.

    Raises:
        ResultError: for a result of another protocol, or another model than that which was measured.
        InvalidOptionError: for a number of runs that the result does not have.
    """
    if result.protocol_hash != protocol.hash:
        raise ResultError(
            f"the result of {result.label!r} is of protocol {result.protocol} with hash "
            f"{result.protocol_hash[:12]}..., and this lbgym's {protocol.version} has {protocol.hash[:12]}..."
        )
    cases, most = len(protocol.cases), len(protocol.cases) * len(result.seeds)
    runs = min(cases, most) if runs is None else runs
    if not 1 <= runs <= most:
        raise InvalidOptionError(f"runs must be from 1 to the result's {most}, got {runs!r}")
    contender = result.entry.contender(model)
    rng = np.random.default_rng(draw)
    # The seeds of every case in a random order, and the cases, too, if not each of them gets its turn.
    seeds = [rng.permutation(len(result.seeds)) for _ in range(cases)]
    turns = rng.permutation(cases)
    jobs = [
        Job(int(turns[k % cases]), contender, result.seeds[seeds[turns[k % cases]][k // cases]]) for k in range(runs)
    ]
    settings = [(case.scenario, case.settings) for case in protocol.cases]
    found: dict[tuple[str, int], dict[str, float]] = {}
    for job, run in run_jobs(settings, jobs, processes):
        found[protocol.cases[job.setting].name, job.seed] = kept(run)
        if progress is not None:
            progress(len(found), len(jobs))
    mismatches = [
        Mismatch(case, seed, metric, result.runs[case][metric][place], found[case, seed][metric])
        for case in protocol.names
        for place, seed in enumerate(result.seeds)
        if (case, seed) in found
        for metric in KEPT
        if result.runs[case][metric][place] != found[case, seed][metric]
    ]
    present = versions()
    names = sorted(set(present) | set(result.versions))
    pairs = {name: (result.versions.get(name, "none"), present.get(name, "none")) for name in names}
    return Verification(
        len(jobs), tuple(mismatches), {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    )
