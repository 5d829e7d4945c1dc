"""Protocols as data: scenarios, seeds, windows; results with the same hash are of the same protocol."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cached_property
from typing import Any

from ...errors import ScenarioError, UnknownNameError
from ...scenarios import Scenario, Trace
from ..results import RunSettings


@dataclass(frozen=True, kw_only=True)
class Case:
    """A scenario of a suite.

    Attributes:
        scenario: what is simulated, for its duration; its name is the case's.
        family: what it is an example of.
        warmup: seconds at the start whose flows do not count.
    """

    scenario: Scenario
    family: str
    warmup: float = 20.0

    @property
    def name(self) -> str:
        return self.scenario.name

    @property
    def settings(self) -> RunSettings:
        """Settings of its runs: flows are followed to their end, as in :func:`lbgym.evaluation.compare`."""
        return RunSettings(self.scenario.duration, self.warmup, self.scenario.reject_timeout)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """A fixed set of scenarios and seeds, by which contenders are measured.

    Attributes:
        version: its name, such as "v1". Anything that changes results needs another one.
        cases: what is run.
        seeds: of the flows, the same for every case and contender.
        baseline: the contender that scores are relative to.
    """

    version: str
    cases: tuple[Case, ...]
    seeds: tuple[int, ...] = tuple(range(20))
    baseline: str = "lsq"

    def __post_init__(self) -> None:
        names = [case.name for case in self.cases]
        twice = sorted({name for name in names if names.count(name) > 1})
        if not names or twice:
            raise ScenarioError(
                f"protocol {self.version!r} needs cases of different names, got {', '.join(twice) or 'none'}"
                + (" twice" if twice else "")
            )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ScenarioError(
                f"protocol {self.version!r} needs different seeds of at least 0, got {list(self.seeds)}"
            )
        for case in self.cases:
            if not 0 <= case.warmup < case.scenario.duration:
                raise ScenarioError(
                    f"case {case.name!r}: warmup must be at least 0 and below the duration of "
                    f"{case.scenario.duration:g} s, got {case.warmup!r}"
                )

    @property
    def names(self) -> tuple[str, ...]:
        """The cases' names, in order."""
        return tuple(case.name for case in self.cases)

    @property
    def families(self) -> tuple[str, ...]:
        """The families, in the order of their first case."""
        return tuple(dict.fromkeys(case.family for case in self.cases))

    def case(self, name: str) -> Case:
        """The case of that name.

        Raises:
            UnknownNameError: there is none.
        """
        for case in self.cases:
            if case.name == name:
                return case
        raise UnknownNameError("scenario", name, self.names, where=f"protocol {self.version!r}")

    @cached_property
    def hash(self) -> str:
        """SHA-256 of everything that results depend on, 64 hexadecimal digits.

        Descriptions are left out, and so is every field at its default value: a new key of scenarios that changes
        nothing by itself changes no hash.
        """
        document = {
            "version": self.version,
            "seeds": self.seeds,
            "baseline": self.baseline,
            "cases": [[case.name, case.family, _number(case.warmup), _plain(case.scenario)] for case in self.cases],
        }
        text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Any) -> Any:
    """Plain data of a scenario, for the hash."""
    if isinstance(value, Trace):
        raise ScenarioError("a protocol cannot hold a trace: its hash would not cover the flows")
    if is_dataclass(value):
        kept = {item.name: getattr(value, item.name) for item in fields(value) if item.name != "description"}
        changed = {name: item for name, item in kept.items() if item != _default(value, name)}
        return [type(value).__name__, {name: _plain(item) for name, item in changed.items()}]
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return _number(value)
    return value


def _number(value: float) -> str:
    # Twelve digits: the C libraries of two machines may differ in the last ones of a computed demand.
    return f"{value:.12g}" if math.isfinite(value) else repr(value)


def _default(instance: Any, name: str) -> Any:
    item: Field[Any] = next(item for item in fields(instance) if item.name == name)
    if item.default is not MISSING:
        return item.default
    return item.default_factory() if item.default_factory is not MISSING else MISSING
