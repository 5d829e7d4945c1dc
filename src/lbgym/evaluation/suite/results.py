"""Results of a suite, a JSON file per contender: :class:`SuiteResult`."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...atomic import whole_file
from ...errors import ResultError, UnknownNameError
from ...policies import heuristic
from ...policies.pretrained import card, pretrained_file, pretrained_names
from ...scenarios import RULES
from ..contenders import Contender
from ..results import Run
from ..runner import agents_of
from .protocol import Protocol

#: Version of the files.
FORMAT = 1

#: Metrics and counts of a run that a file keeps.
KEPT = ("fct_mean", "fct_p99", "rejected_share", "flows")

#: Knowledge of a contender beyond what a balancer sees, from the least to the most.
KNOWLEDGE = ("nothing", "configured", "ground truth", "oracle")


@dataclass(frozen=True, slots=True)
class Entry:
    """A measured contender.

    Attributes:
        label: its name in tables.
        dispatch: dispatch rule; None: a trained model's own, else the scenario's.
        policy: name of a heuristic; None: a trained model.
        model: file name of a trained model.
        sha256: of that file.
        knows: one of ``KNOWLEDGE``: nothing but its own observations, what an operator configures, the servers' ground
            truth, or what only an oracle can.
    """

    label: str
    dispatch: str | None
    policy: str | None
    model: str | None
    sha256: str | None
    knows: str

    @classmethod
    def of(cls, contender: Contender, protocol: Protocol) -> Entry:
        """The entry of a contender.

        Raises:
            PolicyError: for a model that does not fit the protocol's scenarios.
        """
        model = digest = None
        if contender.path is not None:
            path = Path(contender.path)
            model, digest = path.name, hashlib.sha256(path.read_bytes()).hexdigest()
        truth = configured = False
        for case in protocol.cases:
            # What is wrong with a policy is said at once, not by the first run that gets to it.
            agent = agents_of(contender, case.scenario, 0)[0]
            truth |= agent.uses_ground_truth
            configured |= agent.reads_configured
        knows = _knows(contender, ground_truth=truth, configured=configured)
        return cls(contender.label, contender.dispatch, contender.policy, model, digest, knows)

    @property
    def file_name(self) -> str:
        """The name of its file."""
        return re.sub(r"[^A-Za-z0-9._+-]+", "_", self.label) + ".json"

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {name: getattr(self, name) for name in self.__slots__}

    def contender(self, model: Path | None = None) -> Contender:
        """The contender, to run it again.

        Args:
            model: the trained model, if it is one; None: a pretrained one.

        Raises:
            ResultError: without the model, or with another one than that which was measured.
        """
        if self.sha256 is None:
            return Contender(self.label, self.dispatch, self.policy)
        if model is None:
            model = next((pretrained_file(name) for name in pretrained_names() if card(name).file == self.model), None)
        if model is None:
            raise ResultError(f"{self.label!r} is the trained model {self.model}: give its file")
        found = hashlib.sha256(model.read_bytes()).hexdigest()
        if found != self.sha256:
            raise ResultError(
                f"{self.label!r} was measured with a model of SHA-256 {self.sha256[:12]}..., and that of "
                f"{str(model)!r} is {found[:12]}..."
            )
        return Contender(self.label, self.dispatch, None, str(model.resolve()))


def _knows(contender: Contender, *, ground_truth: bool, configured: bool) -> str:
    rule = None if contender.dispatch is None else RULES[contender.dispatch]
    entry = None if contender.policy is None else heuristic(contender.policy)[1]
    if rule is not None and rule.oracle:
        return "oracle"
    if rule is not None and not rule.weighted and not (entry is not None and (entry.tables or entry.background)):
        return "nothing"
    if ground_truth:
        return "ground truth"
    return "configured" if configured or (entry is not None and entry.configured) else "nothing"


@dataclass(frozen=True)
class SuiteResult:
    """The results of a contender in the runs of a protocol.

    Attributes:
        protocol: version of the protocol.
        protocol_hash: its hash.
        entry: who was measured.
        seeds: of the flows.
        runs: by case, by name in ``KEPT``, one value per seed.
        versions: of lbgym and of what its figures depend on.
    """

    protocol: str
    protocol_hash: str
    entry: Entry
    seeds: tuple[int, ...]
    runs: Mapping[str, Mapping[str, tuple[float, ...]]]
    versions: Mapping[str, str]

    @property
    def label(self) -> str:
        return self.entry.label

    def values(self, metric: str, cases: tuple[str, ...] | None = None) -> NDArray[np.float64]:
        """A metric of every run: float64[seeds, cases].

        Raises:
            UnknownNameError: for a metric that is not kept.
        """
        if metric not in KEPT:
            raise UnknownNameError("metric", metric, KEPT)
        names = tuple(self.runs) if cases is None else cases
        return np.array([self.runs[name][metric] for name in names], dtype=np.float64).T

    def is_complete(self, protocol: Protocol) -> bool:
        """True if it is of a protocol and has every run of it."""
        return (
            self.protocol_hash == protocol.hash
            and self.seeds == protocol.seeds
            and set(self.runs) == set(protocol.names)
        )

    def save(self, path: Path) -> None:
        """Write the file: whole, or not there.

        Raises:
            FileWriteError: if the system refuses.
        """
        head = {
            "format": FORMAT,
            "protocol": self.protocol,
            "protocol_hash": self.protocol_hash,
            "contender": self.entry.to_dict(),
            "versions": dict(self.versions),
            "seeds": list(self.seeds),
        }
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
        cases = [
            f"  {json.dumps(case)}: "
            + json.dumps({name: [_short(x) for x in values] for name, values in table.items()}, allow_nan=False)
            for case, table in self.runs.items()
        ]
        lines.append('"runs": {\n' + ",\n".join(cases) + "\n }")
        with whole_file(path) as temporary:
            temporary.write_text("{\n " + ",\n ".join(lines) + "\n}\n", encoding="utf-8")


def _short(value: float) -> float | int:
    """Counts, and shares of 0, without a decimal point."""
    return int(value) if value == int(value) else value


def kept(run: Run) -> dict[str, float]:
    """The metrics and counts of a run that a file keeps."""
    return {name: run.metrics[name] for name in KEPT}


def read_result(path: Path) -> SuiteResult:
    """Read a contender's file.

    Raises:
        ResultError: for a file that is none, of another format, or damaged.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ResultError(f"{str(path)!r} is no result of a suite: {error}") from None
    if not isinstance(document, dict) or "protocol_hash" not in document:
        raise ResultError(f"{str(path)!r} is no result of a suite: it has no key 'protocol_hash'")
    if document.get("format") != FORMAT:
        raise ResultError(f"{str(path)!r} has format {document.get('format')!r}, and this lbgym reads format {FORMAT}")
    try:
        seeds = tuple(int(seed) for seed in document["seeds"])
        runs = {
            str(case): {name: tuple(float(x) for x in table[name]) for name in KEPT}
            for case, table in document["runs"].items()
        }
        result = SuiteResult(
            str(document["protocol"]),
            str(document["protocol_hash"]),
            Entry(**document["contender"]),
            seeds,
            runs,
            dict(document["versions"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ResultError(f"{str(path)!r} is a damaged result of a suite: {type(error).__name__}: {error}") from None
    for case, table in runs.items():
        for name, values in table.items():
            if len(values) != len(seeds) or not all(math.isfinite(x) and x >= 0 for x in values):
                raise ResultError(
                    f"{str(path)!r} is a damaged result of a suite: {name} of {case!r} must be {len(seeds)} finite "
                    "numbers of at least 0"
                )
    return result
