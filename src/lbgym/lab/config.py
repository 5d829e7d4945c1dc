"""The configuration of a laboratory, also as a TOML file: :class:`LabConfig`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from .. import checks
from ..errors import InvalidOptionError, LbgymError, UnknownNameError
from ..scenarios import Exponential, Scenario, Server, Workload, fixed_scenario, from_tables, servers_of, to_toml
from ..toml_files import read_toml
from .base import check_name
from .cgroups import MIN_QUOTA
from .data_planes import DATA_PLANES, data_plane
from .servers import server_kind

#: Longest period of a quota, seconds: a longer one stops a server for so long that its FCTs are no longer those of
#: processor sharing.
MAX_PERIOD = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What was measured of the servers once, one request at a time.

    Attributes:
        per_unit: core-seconds per unit of a request's amount.
        fixed: core-seconds of a request of amount 0; part of its demand.
        latency: seconds by which a request alone on a server takes longer than its demand over the server's speed;
            below 0 where the period of the quotas lets it begin faster.
    """

    per_unit: float
    fixed: float
    latency: float

    def __post_init__(self) -> None:
        checks.number("per_unit", self.per_unit, above=0.0, unit="core-seconds")
        checks.number("fixed", self.fixed, low=0.0, unit="core-seconds")
        checks.number("latency", self.latency, low=-1.0, high=1.0, unit="seconds")

    def amount(self, demand: float, most: int) -> int:
        """The amount of a request with this demand, core-seconds; 0 below ``fixed``."""
        return min(most, max(0, round((demand - self.fixed) / self.per_unit)))


def small_scenario() -> Scenario:
    """Four servers of 0.15 and 0.3 cores, which a machine of two cores carries, at load 0.7."""
    slow = Server(speed=0.15, weight=1.0, workers=32, backlog=128)
    fast = replace(slow, speed=0.3, weight=2.0)
    return Scenario(
        name="lab",
        description="Four servers of a laboratory on one machine of two cores.",
        servers=servers_of((2, slow), (2, fast)),
        workload=Workload(load=0.7, demand=Exponential(mean=0.03)),
        reject_timeout=20.0,
        duration=60.0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LabConfig:
    """Servers, load and data plane of a laboratory.

    Attributes:
        name: unique on the machine while the laboratory is up.
        scenario: cluster, workload and balancers. ``cores * speed`` of a server is its share of the machine's CPUs. A
            server has one core, or any number of speed 1: a request runs in one thread, which no quota makes slower
            than that.
        data_plane: kind of balancer.
        server_kind: kind of server.
        period: seconds between refills of a server's quota, at most 0.01.
        publish_interval: seconds between observations of the balancers.
        driver: keys of the data plane's driver, table ``[driver]``.
        calibration: measured earlier; None: measured when the laboratory is set up.

    Raises:
        InvalidOptionError: for a value out of range, a server that a quota cannot make, or shares beyond the machine.
        UnknownNameError: for an unknown data plane or kind of server.
    """

    name: str = "lab"
    scenario: Scenario = field(default_factory=small_scenario)
    data_plane: str = "xdp"
    server_kind: str = "apache-php"
    period: float = MAX_PERIOD
    publish_interval: float = 0.05
    driver: Mapping[str, Any] = field(default_factory=dict)
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        check_name(self.name)
        checks.instance("scenario", self.scenario, Scenario, "a Scenario")
        plane = data_plane(self.data_plane)
        server_kind(self.server_kind)
        checks.number("period", self.period, low=MIN_QUOTA, high=MAX_PERIOD, unit="seconds")
        checks.number("publish_interval", self.publish_interval, low=0.01, high=10.0, unit="seconds")
        checks.instance("driver", self.driver, Mapping, "a table")
        checks.instance("calibration", self.calibration, Calibration | None, "a Calibration or None")
        self._check_servers()
        plane.check(self.driver, self.scenario, "driver")

    def _check_servers(self) -> None:
        scenario = self.scenario
        for i, server in enumerate(scenario.servers):
            share = server.cores * server.speed
            if server.cores > 1 and server.speed != 1.0:
                raise InvalidOptionError(
                    f"server {i} has {server.cores} cores of speed {server.speed:g}, but a quota does not slow a "
                    f"single request down: give it one core of speed {share:g}, or speed 1"
                )
            if server.cores == 1 and server.speed > 1.0:
                raise InvalidOptionError(
                    f"server {i} has a core of speed {server.speed:g}, and this machine's have speed 1 by definition"
                )
            if share * self.period < MIN_QUOTA:
                raise InvalidOptionError(
                    f"server {i} has a share of {share:g} cores, and at a period of {1e3 * self.period:g} ms the least "
                    f"that the kernel takes is {MIN_QUOTA / self.period:g}"
                )
        cores, wanted = os.cpu_count() or 1, sum(server.cores * server.speed for server in scenario.servers)
        if wanted > cores:
            raise InvalidOptionError(
                f"the shares of the {scenario.num_servers} servers add up to {wanted:g} cores, and this machine has "
                f"{cores}"
            )
        for event in scenario.events:
            if event.kind != "rate":
                raise InvalidOptionError(
                    f"scenario {scenario.name!r} has an event {event.kind!r} at {event.time:g} s; in a laboratory only "
                    "the arrival rate changes"
                )

    def shares(self) -> list[float]:
        """CPUs of each server."""
        return [server.cores * server.speed for server in self.scenario.servers]


_KEYS = [item.name for item in fields(LabConfig)]
#: Those of them that are no single values.
_TABLES = ("scenario", "driver", "calibration")


def load_lab(path: str | os.PathLike[str] | None = None, **changes: Any) -> LabConfig:
    """The configuration of a TOML file; its keys are the attributes of :class:`LabConfig`::

        name = "small"
        scenario = "twin.toml"      # a name, a path relative to this file, or the scenario itself, a table

        [driver]
        mode = "dnat"

    Args:
        path: of the file; None: defaults.
        changes: attributes to have in place of the file's; None is the same as leaving one out.

    Raises:
        InvalidOptionError, UnknownNameError: with the file and the key.
        ScenarioError, TraceError: for the scenario.
    """
    values: dict[str, Any] = {}
    where = ""
    if path is not None:
        file, values = read_toml(path)
        where = str(file)
        for key in values:
            if key not in _KEYS:
                raise UnknownNameError("key", key, _KEYS, where=where)
        if "scenario" in values:
            values["scenario"] = _scenario(values["scenario"], file)
        if "calibration" in values:
            values["calibration"] = _calibration(values["calibration"], f"{where}, [calibration]")
    values |= {key: value for key, value in changes.items() if value is not None}
    driver, plane = values.get("driver"), DATA_PLANES.get(str(values.get("data_plane", "xdp")))
    if path is not None and isinstance(driver, dict) and plane is not None:
        # Here, where the table's place is known.
        plane.check(driver, values.get("scenario", small_scenario()), f"{where}, [driver]")
    try:
        return LabConfig(**values)
    except UnknownNameError as error:
        raise UnknownNameError(error.kind, error.name, error.known, where=where) from None
    except InvalidOptionError as error:
        raise InvalidOptionError(f"{where}: {error}" if where else str(error)) from None


def _scenario(value: Any, file: Path) -> Scenario:
    if isinstance(value, dict):
        made = from_tables(value, source=f"{file}, [scenario]", folder=file.parent, name=file.stem)
        return fixed_scenario(made)
    if not isinstance(value, str):
        raise InvalidOptionError(f"{file}: scenario must be a name, a path or a table, got {checks.shown(value)}")
    beside = file.parent / value
    return fixed_scenario(beside if beside.is_file() else value)


def _calibration(value: Any, where: str) -> Calibration:
    known = [item.name for item in fields(Calibration)]
    if not isinstance(value, dict):
        raise InvalidOptionError(f"{where} must be a table, got {checks.shown(value)}")
    for key in value:
        if key not in known:
            raise UnknownNameError("key", key, known, where=where)
    for key in known:
        if key not in value:
            raise InvalidOptionError(f"{where}: the key {key!r} is missing")
    try:
        return Calibration(**value)
    except LbgymError as error:
        raise InvalidOptionError(f"{where}: {error}") from None


def with_servers(scenario: Scenario, shares: str) -> Scenario:
    """The scenario on servers of other shares.

    Args:
        scenario: gives workers and backlog, by its first server.
        shares: CPUs of each, separated by commas; also their configured weights, the least being 1.

    Raises:
        InvalidOptionError: for what is no number above 0.
    """
    try:
        given = [float(part) for part in shares.split(",")]
    except ValueError:
        raise InvalidOptionError(
            f"the servers' shares must be numbers of cores separated by commas, such as 0.15,0.3, got {shares!r}"
        ) from None
    numbers = [checks.number("share", share, above=0.0, unit="cores") for share in given]
    least, first = min(numbers), scenario.servers[0]
    servers = tuple(
        replace(first, cores=max(1, int(x)), speed=1.0 if x >= 1.0 else x, weight=x / least) for x in numbers
    )
    for number, server in zip(numbers, servers, strict=True):
        if server.capacity != number:
            raise InvalidOptionError(f"a share above 1 must be a whole number of cores, got {number:g}")
    return scenario.with_changes(servers=servers)


def twin_of(config: LabConfig) -> str:
    """The scenario that simulates a laboratory, as TOML."""
    known = config.calibration
    latency = "" if known is None else f" There, a request takes {1e3 * known.latency:.3g} ms more."
    description = f"The simulated twin of laboratory {config.name}.{latency}"
    return to_toml(config.scenario.with_changes(name=f"{config.name}-twin", description=description))


def write_lab(config: LabConfig, scenario_file: Path, file: Path) -> None:
    """Write a configuration that :func:`load_lab` reads, its scenario in a file of its own."""
    scenario_file.write_text(to_toml(config.scenario))
    lines = [f"{key} = {json.dumps(getattr(config, key))}" for key in _KEYS if key not in _TABLES]
    lines.append(f"scenario = {json.dumps(scenario_file.name)}")
    for key, table in (("driver", config.driver), ("calibration", config.calibration)):
        if table:
            items = table if isinstance(table, Mapping) else asdict(table)
            lines += ["", f"[{key}]", *(f"{name} = {json.dumps(value)}" for name, value in items.items())]
    file.write_text("\n".join(lines) + "\n")
