"""Scenarios as TOML files.

A file holds the attributes of :class:`Scenario` under their names::

    base = "heterogeneous"         # optional: start from a built-in scenario
    dispatch = "p2c"

    [[servers]]                    # replaces the servers of the base
    count = 4
    cores = 2

    [workload]                     # merged with that of the base
    load = 0.7
    arrivals = { kind = "on_off", on = 1.0, off = 4.0 }
    demand = { kind = "exponential", mean = 0.1 }
    # or: trace = { path = "requests.csv.gz", format = "csv", speedup = 2.0 }

    [[events]]                     # replaces the events of the base
    time = 20.0
    kind = "speed"
    server = 1
    value = 0.5

    [sampling]                     # merged with that of the base
    capacity = 64

With a table ``randomize`` the file is a :class:`ScenarioDistribution`, from which every episode draws a scenario; all
else in it is the base. Where a range is meant, a plain value is one that does not vary::

    [randomize]                    # merged with that of a base that is a distribution
    num_servers = { kind = "uniform", low = 4, high = 16 }
    load = { kind = "uniform", low = 0.5, high = 0.95 }            # or rate
    dispatch = { kind = "choice", values = ["sed", "lsq"], probabilities = [0.8, 0.2] }

    [randomize.server]             # drawn for each server
    cores = { kind = "choice", values = [2, 4, 8] }
    speed = { kind = "log_uniform", low = 0.25, high = 2.0 }

    [[randomize.demand]]           # an episode has one of these; likewise [[randomize.arrivals]]
    kind = "lognormal"
    probability = 1.0
    mean = 0.1
    cv = { kind = "uniform", low = 1.0, high = 3.0 }

    [[randomize.events]]           # at random times: speed, down, drain, rate
    kind = "down"
    every = 600.0                  # seconds in the mean until a server is hit
    duration = { kind = "uniform", low = 5.0, high = 15.0 }

    [randomize.sampling]
    probability = { kind = "log_uniform", low = 0.05, high = 1.0 }
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from ..errors import ScenarioError, TraceError, UnknownNameError
from ._validation import _integer, _shown
from .library import default_scenario, distribution_names, named_distribution, named_scenario, scenario_names
from .model import MAX_SERVERS, Event, Sampling, Scenario, Server
from .randomization import (
    RANGE_KINDS,
    AnyScenario,
    RandomEvents,
    SamplingDistribution,
    ScenarioDistribution,
    ServerDistribution,
    Variant,
    _frozen,
)
from .traces import TRACE_OPTIONS, expand_path, read_trace
from .workload import ARRIVAL_KINDS, DEMAND_KINDS, Trace, Workload

_SCALARS = ("name", "description", "balancers", "dispatch", "reject_timeout", "duration")
# Parts of [randomize] that are a single value or range.
_RANGES = ("num_servers", "load", "rate", "dispatch")
_PARTS: dict[str, type] = {"server": ServerDistribution, "sampling": SamplingDistribution}


def load_scenario(
    scenario: AnyScenario | str | os.PathLike[str],
) -> AnyScenario:
    """A scenario, or a distribution of scenarios, from itself, the name of a built-in one, or the path of a TOML file.

    Text that ends in ".toml", holds a path separator or is the path of an existing file is a path; a name wins over a
    file of that name. ``default-N`` is the default scenario of N servers.

    Raises:
        UnknownNameError: no such built-in scenario, or an unknown name or key in the file.
        ScenarioError: the file cannot be read or describes no valid scenario.
        TraceError: the file's trace cannot be read.
    """
    if isinstance(scenario, (Scenario, ScenarioDistribution)):
        return scenario
    if not isinstance(scenario, (str, os.PathLike)):
        raise ScenarioError(
            f"a scenario must be a Scenario, the name of one or the path of a TOML file, got {_shown(scenario)}"
        )
    if isinstance(scenario, str):
        if scenario in scenario_names():
            return named_scenario(scenario)
        if scenario in distribution_names():
            return named_distribution(scenario)
        default = re.fullmatch(r"default-([1-9]\d{0,5})", scenario)
        if default:
            return default_scenario(int(default[1]))
        looks_like_path = scenario.endswith(".toml") or os.sep in scenario or os.path.isfile(scenario)
        if not looks_like_path:
            raise UnknownNameError("scenario", scenario, (*scenario_names(), *distribution_names(), "default-4"))
    return read_scenario(scenario)


def fixed_scenario(scenario: AnyScenario | str | os.PathLike[str]) -> Scenario:
    """As :func:`load_scenario`, where there is one cluster and nothing to draw another one for.

    Raises:
        ScenarioError: also for a distribution.
    """
    loaded = load_scenario(scenario)
    if not isinstance(loaded, Scenario):
        raise ScenarioError(
            f"{loaded.name!r} is a distribution of scenarios, and here is one cluster; draw a scenario from it "
            f"(`lbgym describe {loaded.name} --draw SEED --toml`, ScenarioDistribution.draw), or give another"
        )
    return loaded


def read_scenario(path: str | os.PathLike[str]) -> AnyScenario:
    """The scenario, or distribution, in a TOML file; the paths of traces in it are relative to the file.

    Raises: as :func:`load_scenario`.
    """
    file = expand_path(path, ScenarioError)
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise ScenarioError(f"no such scenario file: {file}") from error
    except UnicodeDecodeError as error:
        raise ScenarioError(f"scenario file {file} is not UTF-8 text: {error}") from error
    except (OSError, ValueError) as error:
        raise ScenarioError(f"cannot read scenario file {file}: {error}") from error
    return from_toml(text, source=str(file), folder=file.parent, name=file.stem)


def from_toml(
    text: str, *, source: str = "TOML text", folder: str | os.PathLike[str] = ".", name: str = "custom"
) -> AnyScenario:
    """The scenario that TOML text describes; with a table ``randomize`` a distribution of scenarios.

    Args:
        text: the TOML.
        source: where it comes from, for error messages.
        folder: what the paths of traces are relative to.
        name: the scenario's name if the text gives none.

    Raises: as :func:`load_scenario`.
    """
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ScenarioError(f"{source} is not valid TOML: {error}") from error
    return from_tables(data, source=source, folder=folder, name=name)


def from_tables(
    data: Mapping[str, Any], *, source: str, folder: str | os.PathLike[str] = ".", name: str = "custom"
) -> AnyScenario:
    """The scenario, or distribution, of TOML that has been read, such as a table of a larger file.

    Arguments and errors are those of :func:`from_toml`.
    """
    _check_keys(data, ("base", "servers", "workload", "events", "sampling", "randomize", *_SCALARS), source)
    changes: dict[str, Any] = {key: data[key] for key in _SCALARS if key in data}
    changes.setdefault("name", name)

    base: Scenario | None = None
    former: ScenarioDistribution | None = None
    if "base" in data:
        if not isinstance(data["base"], str):
            raise ScenarioError(f"{source}: base must be the name of a scenario, got {_shown(data['base'])}")
        if data["base"] in distribution_names():
            former = named_distribution(data["base"])
            base = former.base
        elif data["base"] in scenario_names():
            base = named_scenario(data["base"])
        else:
            names = (*scenario_names(), *distribution_names())
            raise UnknownNameError("base scenario", data["base"], names, where=source)
        changes.setdefault("description", f"The scenario {base.name!r} with changes.")
    for key in ("servers", "workload"):
        if base is None and key not in data:
            raise ScenarioError(f"{source}: {key!r} is missing; give it, or a base scenario that has it")

    if "servers" in data:
        groups = _tables(data["servers"], "servers", source)
        changes["servers"] = tuple(server for table, where in groups for server in _servers(table, where))
    if "events" in data:
        changes["events"] = tuple(
            _build(Event, table, where) for table, where in _tables(data["events"], "events", source)
        )
    if "sampling" in data:
        where = f"{source}, [sampling]"
        table = _table(data["sampling"], where)
        changes["sampling"] = _build(Sampling, table, where, base=base.sampling if base else None)
    if "workload" in data:
        changes["workload"] = _workload(data["workload"], f"{source}, [workload]", folder, base)
    with _placed(source):
        scenario = replace(base, **changes) if base else Scenario(**changes)
    if "randomize" not in data and former is None:
        return scenario
    return _randomized(data.get("randomize", {}), source, scenario, former)


@contextmanager
def _placed(where: str) -> Iterator[None]:
    """Say where in the file an error is."""
    try:
        yield
    except UnknownNameError as error:
        raise UnknownNameError(error.kind, error.name, error.known, where=where) from None
    except ScenarioError as error:
        raise ScenarioError(f"{where}: {error}") from None


def _randomized(value: Any, source: str, base: Scenario, former: ScenarioDistribution | None) -> ScenarioDistribution:
    """The distribution of a table ``randomize``; what it does not have is as in ``former``."""
    where = f"{source}, [randomize]"
    table = _table(value, where)
    if "balancers" in table:
        raise ScenarioError(
            f"{where}: balancers cannot vary, since their number is the shape of the simulator's memory"
        )
    _check_keys(table, (*_RANGES, *_PARTS, "arrivals", "demand", "events"), where)
    changes: dict[str, Any] = {key: _range(table[key], key, where) for key in _RANGES if key in table}
    for key, cls in _PARTS.items():
        if key in table:
            place = f"{source}, [randomize.{key}]"
            part = _table(table[key], place)
            if key == "sampling" and "capacity" in part:
                raise ScenarioError(
                    f"{place}: capacity cannot vary, since it is the shape of the simulator's memory; the whole "
                    "file's is under [sampling]"
                )
            ranges = {name: _range(item, name, place) for name, item in part.items()}
            changes[key] = _build(cls, ranges, place, base=None if former is None else getattr(former, key))
    for key, kinds in (("arrivals", ARRIVAL_KINDS), ("demand", DEMAND_KINDS)):
        if key in table:
            tables = _tables(table[key], f"randomize.{key}", source)
            changes[key] = tuple(_variant(item, kinds, key, place) for item, place in tables)
    if "events" in table:
        changes["events"] = tuple(
            _build(
                RandomEvents, {name: _range(x, name, place) if name != "kind" else x for name, x in item.items()}, place
            )
            for item, place in _tables(table["events"], "randomize.events", source)
        )
    with _placed(where):
        if former is None:
            return ScenarioDistribution(base=base, **changes)
        return former.with_changes(base=base, **changes)


def _range(value: Any, key: str, where: str) -> Any:
    return _kind(value, RANGE_KINDS, key, where) if isinstance(value, dict) else _frozen(value)


def _variant(table: dict[str, Any], kinds: Mapping[str, type], what: str, where: str) -> Variant:
    kind = table.get("kind")
    if not isinstance(kind, str):
        raise ScenarioError(f"{where}: 'kind' must be one of {', '.join(kinds)}, got {_shown(kind)}")
    if kind not in kinds:
        raise UnknownNameError(f"kind of {what}", kind, kinds, where=where)
    _check_keys(table, ("kind", "probability", *(item.name for item in fields(kinds[kind]))), where)
    ranges = {key: _range(item, key, where) for key, item in table.items() if key not in ("kind", "probability")}
    with _placed(where):
        return Variant(kind=kind, parameters=ranges, probability=table.get("probability"))


def _check_keys(table: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    known = tuple(known)
    for key in table:
        if key not in known:
            raise UnknownNameError("key", key, known, where=where)


def _table(value: Any, where: str, example: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ScenarioError(f"{where} must be a table{example}, got {_shown(value)}")
    return value


def _tables(value: Any, key: str, source: str) -> list[tuple[dict[str, Any], str]]:
    """The tables of an array of tables, each with its place in the file."""
    if not isinstance(value, list):
        raise ScenarioError(f"{source}: {key} must be an array of tables, [[{key}]], got {_shown(value)}")
    places = [f"{source}, [[{key}]] number {i}" for i in range(1, len(value) + 1)]
    return [(_table(item, where), where) for item, where in zip(value, places, strict=True)]


def _build(cls: type, table: Mapping[str, Any], where: str, *, base: Any = None) -> Any:
    """An instance of a dataclass from the keys of a table, the others from ``base`` or the defaults."""
    items = [item for item in fields(cls) if item.init]
    _check_keys(table, (item.name for item in items), where)
    for item in items:
        if base is None and item.name not in table and item.default is MISSING and item.default_factory is MISSING:
            raise ScenarioError(f"{where}: {item.name!r} is missing")
    try:
        return cls(**table) if base is None else replace(base, **table)
    except UnknownNameError as error:
        raise UnknownNameError(error.kind, error.name, error.known, where=where) from None
    except ScenarioError as error:
        raise ScenarioError(f"{where}: {error}") from None


def _servers(table: dict[str, Any], where: str) -> list[Server]:
    _check_keys(table, ("count", *(item.name for item in fields(Server))), where)
    try:
        count = _integer(table.get("count", 1), "count", low=1, high=MAX_SERVERS)
    except ScenarioError as error:
        raise ScenarioError(f"{where}: {error}") from None
    return [_build(Server, {key: value for key, value in table.items() if key != "count"}, where)] * count


def _kind(value: Any, kinds: Mapping[str, type], what: str, where: str) -> Any:
    where = f"{where} {what}"
    table = _table(value, where, f' such as {{ kind = "{next(iter(kinds))}" }}')
    if "kind" not in table:
        raise ScenarioError(f"{where}: 'kind' is missing; known: {', '.join(kinds)}")
    if not isinstance(table["kind"], str):
        raise ScenarioError(f"{where}: kind must be text, got {_shown(table['kind'])}")
    if table["kind"] not in kinds:
        raise UnknownNameError(f"kind of {what}", table["kind"], kinds, where=where)
    cls = kinds[table["kind"]]
    # 'kind' counts among the known keys, so that a mistyped one is not the nearest to nothing.
    _check_keys(table, ("kind", *(item.name for item in fields(cls))), where)
    return _build(cls, {key: item for key, item in table.items() if key != "kind"}, where)


def _workload(value: Any, where: str, folder: str | os.PathLike[str], base: Scenario | None) -> Workload:
    table = dict(_table(value, where))
    _check_keys(table, (item.name for item in fields(Workload)), where)
    if "trace" in table and ("arrivals" in table or "demand" in table):
        raise ScenarioError(f"{where}: a trace replaces arrivals and demand; give either the trace or those")
    if "arrivals" in table:
        table["arrivals"] = _kind(table["arrivals"], ARRIVAL_KINDS, "arrivals", where)
    if "demand" in table:
        table["demand"] = _kind(table["demand"], DEMAND_KINDS, "demand", where)
    workload = base.workload if base else None
    if "trace" in table:
        table["trace"] = _trace(table["trace"], f"{where} trace", folder)
        workload = None  # the trace brings its own rate, whatever that of the base
    elif workload is not None:
        if "rate" in table or "load" in table:
            table = {"rate": None, "load": None} | table
        if "arrivals" in table or "demand" in table:
            table["trace"] = None
    return _build(Workload, table, where, base=workload)


def _trace(value: Any, where: str, folder: str | os.PathLike[str]) -> Trace:
    table = _table(value, where, ' such as { path = "requests.csv" }')
    _check_keys(table, ("path", *TRACE_OPTIONS), where)
    options = dict(table)
    path = options.pop("path", None)
    if not isinstance(path, str):
        raise ScenarioError(f"{where}: 'path' must be the path of a trace file, got {_shown(path)}")
    try:
        return read_trace(Path(folder) / expand_path(path, TraceError), **options)
    except UnknownNameError as error:
        raise UnknownNameError(error.kind, error.name, error.known, where=where) from None
    except ScenarioError as error:
        raise ScenarioError(f"{where}: {error}") from None


def to_toml(scenario: AnyScenario) -> str:
    """A scenario, or a distribution of them, as TOML text, from which :func:`from_toml` makes an equal one.

    A trace is written as the absolute path of its file and the options it was read with.

    Raises:
        ScenarioError: the trace did not come from a file, or a text cannot be written as UTF-8.
    """
    if isinstance(scenario, ScenarioDistribution):
        return to_toml(scenario.base) + "\n".join(_randomize_lines(scenario)) + "\n"
    lines = [f"{key} = {_value(getattr(scenario, key))}" for key in _SCALARS]
    for server, group in groupby(scenario.servers):
        lines += ["", "[[servers]]", f"count = {len(list(group))}", *_pairs(server)]
    workload = scenario.workload
    lines += ["", "[workload]"]
    for key, number in (("rate", workload.rate), ("load", workload.load)):
        if number is not None:
            lines.append(f"{key} = {_value(number)}")
    if workload.trace is None:
        lines.append(f"arrivals = {_inline(workload.arrivals, ARRIVAL_KINDS)}")
        lines.append(f"demand = {_inline(workload.demand, DEMAND_KINDS)}")
    else:
        if workload.trace.origin is None:
            raise ScenarioError(
                f"scenario {scenario.name!r} cannot be written as TOML: its trace ({workload.trace.source}) is not as "
                "read from a file. Write the flows with write_trace and read them with read_trace"
            )
        repeated = {"repeat": workload.trace.repeat, "random_start": workload.trace.random_start}
        pairs = ", ".join(f"{key} = {_value(item)}" for key, item in (dict(workload.trace.origin) | repeated).items())
        lines.append(f"trace = {{ {pairs} }}")
    for event in scenario.events:
        lines += ["", "[[events]]", *_pairs(event)]
    lines += ["", "[sampling]", *_pairs(scenario.sampling)]
    text = "\n".join(lines) + "\n"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ScenarioError(f"scenario {scenario.name!r} cannot be written as TOML: {error}") from error
    return text


def _randomize_lines(distribution: ScenarioDistribution) -> list[str]:
    ranges = [(key, getattr(distribution, key)) for key in _RANGES]
    lines = ["", "[randomize]", *(f"{key} = {_range_value(x)}" for key, x in ranges if x is not None)]
    for key in _PARTS:
        part = getattr(distribution, key).ranges()
        if part:
            lines += ["", f"[randomize.{key}]", *(f"{name} = {_range_value(x)}" for name, x in part.items())]
    for key in ("arrivals", "demand"):
        for variant in getattr(distribution, key):
            lines += ["", f"[[randomize.{key}]]", f"kind = {_value(variant.kind)}"]
            if variant.probability is not None:
                lines.append(f"probability = {_value(variant.probability)}")
            lines += [f"{name} = {_range_value(x)}" for name, x in variant.parameters.items()]
    for event in distribution.events:
        lines += ["", "[[randomize.events]]", f"kind = {_value(event.kind)}"]
        others = [(name, getattr(event, name)) for name in ("every", "duration", "value")]
        lines += [f"{name} = {_range_value(x)}" for name, x in others if x is not None]
    return lines


def _range_value(value: Any) -> str:
    return _inline(value, RANGE_KINDS) if isinstance(value, tuple(RANGE_KINDS.values())) else _value(value)


def _pairs(instance: Any) -> list[str]:
    # TOML has no null: a key left out is None, for each of these classes.
    values = [(item.name, getattr(instance, item.name)) for item in fields(instance)]
    return [f"{name} = {_value(value)}" for name, value in values if value is not None]


def _inline(instance: Any, kinds: Mapping[str, type]) -> str:
    kind = next(name for name, cls in kinds.items() if isinstance(instance, cls))
    return f"{{ {', '.join([f'kind = {_value(kind)}', *_pairs(instance)])} }}"


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for DEL, which TOML wants escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_value, value))}]"
    return repr(value)
