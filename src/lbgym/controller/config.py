"""The configuration of a controller, also as a TOML file: :class:`ControllerConfig`."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

from .. import checks
from ..errors import InvalidOptionError, UnknownNameError
from ..toml_files import read_toml
from .envelope import SafetyEnvelope
from .logs import LOG_FORMATS, LOG_LEVELS
from .rollback import METRICS

_ENVELOPE = SafetyEnvelope()


def _key(
    doc: str,
    kind: type,
    default: Any = MISSING,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    above: bool = False,
    choices: tuple[str, ...] = (),
) -> Any:
    """A field whose values are of ``kind``, from ``low`` (or ``above`` it) to ``high`` or one of ``choices``.

    With the default None it may also be None: not given.
    """
    metadata = {"doc": doc, "kind": kind, "low": low, "high": high, "above": above, "choices": choices}
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerConfig:
    """The configuration of a controller; its fields are the keys of the TOML file and the options of ``lbgym run``.

    Times are seconds of real time, except ``step_interval``, ``rate_limit`` and ``smoothing``, which are on the data
    plane's clock; the two differ only where time is scaled. ``help_of`` describes a key.

    Raises:
        InvalidOptionError: for a value of a wrong type or out of range.
    """

    policy: str = _key("Trained model (.pt, .zip) or name of a heuristic.", str)
    shm: str = _key("Name of the region.", str)
    step_interval: float | None = _key(
        "Seconds of the data plane's clock per step; default: what the policy was trained with, or else 0.25.",
        float, None, low=0.0, high=3600.0, above=True,
    )  # fmt: skip
    scenario: str | None = _key(
        "What is known of the cluster, for heuristics that need the cores: name of a scenario or path of a TOML file.",
        str, None,
    )  # fmt: skip
    lease: float | None = _key(
        "Seconds that weights stay good without another step, more than a step and the timeout; default: 5, or twice "
        "that if it is more.",
        float, None, low=0.0, above=True,
    )  # fmt: skip
    timeout: float = _key(
        "Seconds to wait for an observation after it is due.", float, 2.0, low=0.0, high=3600.0, above=True
    )
    attach_timeout: float = _key(
        "Seconds to wait for the region and its producer at the start; inf: for ever.", float, math.inf, low=0.0
    )
    max_timeouts: int = _key(
        "Timeouts in a row after which to give up (exit code 3); 0: never.", int, 0, low=0, high=1e9
    )
    fallback: str = _key("Heuristic that decides while the policy is not trusted.", str, "uniform")
    fallback_after: int = _key(
        "Failures of the policy, or timeouts, in a row after which the fallback decides.", int, 3, low=1, high=1e9
    )
    trial_steps: int = _key(
        "Good steps in a row, observed in time, after which the policy decides again.", int, 20, low=1, high=1e9
    )
    recover: bool = _key("Try a policy that failed again; false: the fallback decides until the end.", bool, True)
    floor: float = _key(
        "Least weight of an active server, over the mean of the active ones.",
        float, _ENVELOPE.floor, low=1e-6, high=1.0,
    )  # fmt: skip
    max_ratio: float = _key(
        "Largest weight over the least of active servers; inf: no bound.",
        float, _ENVELOPE.max_ratio, low=1.0,
    )  # fmt: skip
    rate_limit: float = _key(
        "Largest factor per second by which an active server's share of the weights may grow or shrink; inf: no limit.",
        float, _ENVELOPE.rate_limit, low=1.0,
    )  # fmt: skip
    smoothing: float = _key(
        "Time constant, seconds, with which weights follow the policy; 0: at once.",
        float, _ENVELOPE.smoothing, low=0.0, high=3600.0,
    )  # fmt: skip
    metrics_port: int | None = _key(
        "Port of the Prometheus metrics, 0: any free one; default: no metrics.", int, None, low=0, high=65_535
    )
    metrics_address: str = _key("Address that the metrics are served on.", str, "127.0.0.1")
    log_format: str = _key("Log lines.", str, "json", choices=LOG_FORMATS)
    log_level: str = _key("Least level that is logged; every step is at debug.", str, "info", choices=LOG_LEVELS)
    summary_interval: float = _key(
        "Seconds between summaries in the log.", float, 60.0, low=0.0, high=86_400.0, above=True
    )
    duration: float | None = _key("Seconds after which to end; default: never.", float, None, low=0.0, above=True)
    steps: int | None = _key("Steps after which to end; default: never.", int, None, low=1, high=1e18)
    shadow: bool = _key(
        "Decide and record, and change nothing: no lock, no weights written; a report at the end and on SIGUSR1.",
        bool, False,
    )  # fmt: skip
    out: str | None = _key(
        "File of a shadow: its report (.json) or every decision (.parquet); default: no file.", str, None
    )
    share: float = _key(
        "Part of the way from the data plane's safe weights to the policy's that the weights go: no more than this "
        "share of the flows is moved.",
        float, 1.0, low=0.0, high=1.0, above=True,
    )  # fmt: skip
    ramp: float = _key(
        "Seconds in which the share grows to its value from 0, at a steady rate; 0: at once.",
        float, 0.0, low=0.0, high=1e9,
    )  # fmt: skip
    rollback: float | None = _key(
        "Largest FCT over that under the safe weights, which are in force for a quarter of the time to compare with; "
        "if it is more, hand back and end (exit code 4); default: no such rule.",
        float, None, low=1.0, high=1e6,
    )  # fmt: skip
    rollback_metric: str = _key("FCT that the rule compares.", str, "fct_p90", choices=METRICS)
    rollback_failures: float = _key(
        "Largest excess of the share of failed and rejected flows over that under the safe weights.",
        float, 0.01, low=0.0, high=1.0, above=True,
    )  # fmt: skip
    rollback_slot: float = _key(
        "Seconds of the data plane's clock until safe and policy's weights may take turns.",
        float, 15.0, low=0.0, high=86_400.0, above=True,
    )  # fmt: skip
    rollback_alarm: float = _key(
        "Probability that the rule ever hands back though the policy is no worse than allowed.",
        float, 0.01, low=1e-9, high=0.5,
    )  # fmt: skip

    def __post_init__(self) -> None:
        for key in fields(self):
            object.__setattr__(self, key.name, _checked(key, getattr(self, key.name)))

    @property
    def envelope(self) -> SafetyEnvelope:
        """The bounds on the weights."""
        return SafetyEnvelope(self.floor, self.max_ratio, self.rate_limit, self.smoothing)


#: Keys of older files.
_RENAMED = {"interval": "step_interval", "dry_run": "shadow"}
KEYS: dict[str, Field[Any]] = {key.name: key for key in fields(ControllerConfig)}


def help_of(key: str) -> str:
    """Describe a key of :class:`ControllerConfig`, for help and documentation."""
    default, allowed = KEYS[key].default, KEYS[key].metadata
    text: str = allowed["doc"][:-1]
    if allowed["choices"]:
        text += f": {', '.join(allowed['choices'])}"
    if default is not None and default is not MISSING:
        text += f"; default: {str(default).lower()}"
    return f"{text}."


def config_from(values: Mapping[str, Any], path: str | os.PathLike[str] | None = None) -> ControllerConfig:
    """The configuration of a TOML file, with ``values`` over it.

    Args:
        values: keys of :class:`ControllerConfig`; None is the same as leaving a key out.
        path: of the file; None: no file.

    Raises:
        UnknownNameError: for an unknown key.
        InvalidOptionError: if the file cannot be read, a value is invalid, or ``policy`` or ``shm`` is missing.
    """
    known = {} if path is None else read_keys(path)
    for name, value in values.items():
        if name not in KEYS:
            raise UnknownNameError("key", name, KEYS)
        if value is not None:
            known[name] = value
    for name in ("policy", "shm"):
        if name not in known:
            place = "" if path is None else f", nor is it in {os.fspath(path)}"
            raise InvalidOptionError(f"{name!r} is missing: give --{name}{place}")
    # A file may keep an address ready for a port.
    if values.get("metrics_address") is not None and "metrics_port" not in known:
        raise InvalidOptionError(f"metrics_address {values['metrics_address']!r} needs metrics_port, too")
    return ControllerConfig(**known)


def read_keys(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The keys of a TOML file, checked.

    Raises:
        UnknownNameError: for an unknown key.
        InvalidOptionError: if the file cannot be read or a value is invalid.
    """
    file, values = read_toml(path)
    checked = {}
    for name, value in values.items():
        if name in _RENAMED:
            raise InvalidOptionError(f"{file}: the key {name!r} is now {_RENAMED[name]!r}")
        if name not in KEYS:
            raise UnknownNameError("key", name, KEYS, where=str(file))
        try:
            checked[name] = _checked(KEYS[name], value)
        except InvalidOptionError as error:
            raise InvalidOptionError(f"{file}: {error}") from None
    return checked


def _checked(key: Field[Any], value: Any) -> Any:
    """Check a key's value and convert it to the key's type."""
    if value is None and key.default is None:
        return None
    allowed = key.metadata
    kind, low, high = allowed["kind"], allowed["low"], allowed["high"]
    if kind is bool:
        return checks.boolean(key.name, value)
    if kind is str:
        if not isinstance(value, str) or not value:
            raise InvalidOptionError(f"{key.name} must be a text that is not empty, got {checks.shown(value)}")
        if allowed["choices"] and value not in allowed["choices"]:
            raise UnknownNameError(key.name, value, allowed["choices"])
        return value
    if kind is int:
        return checks.whole(key.name, value, low=int(low), high=int(high))
    bounds = {"above": low} if allowed["above"] else {"low": low}
    return checks.number(key.name, value, **bounds, high=None if high == math.inf else high, finite=False)
