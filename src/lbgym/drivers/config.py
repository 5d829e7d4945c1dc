"""``dataplane.toml``: :class:`DataPlaneConfig`, what a driver is to publish and which servers stand behind it."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from .. import checks
from ..errors import InvalidOptionError, LbgymError, UnknownNameError
from ..toml_files import read_toml

HEALTH_KINDS = ("tcp", "http")


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthCheck:
    """A health check of a server, as HAProxy's ``inter``, ``rise`` and ``fall`` have it.

    Attributes:
        kind: "tcp": a connection is accepted; "http": a GET is answered with a status from 200 to 399.
        port: None: the server's.
        path: of the GET.
        interval: seconds from the end of one check to the beginning of the next.
        timeout: seconds after which a check has failed.
        rise: checks in a row that must pass before a server that is down is up.
        fall: checks in a row that must fail before a server that is up is down. The first check decides alone.
    """

    kind: str = "tcp"
    port: int | None = None
    path: str = "/"
    interval: float = 2.0
    timeout: float = 1.0
    rise: int = 2
    fall: int = 3

    def __post_init__(self) -> None:
        checks.choice("health check", self.kind, HEALTH_KINDS)
        _port(self.port)
        if not isinstance(self.path, str) or not self.path.startswith("/") or not self.path.isprintable():
            raise InvalidOptionError(f"path must be a text that begins with '/', got {self.path!r}")
        if not self.path.isascii() or " " in self.path:
            raise InvalidOptionError(f"path must be ASCII without blanks (percent-encode them), got {self.path!r}")
        checks.number("interval", self.interval, low=0.01, high=3600.0, unit="seconds")
        checks.number("timeout", self.timeout, low=0.001, high=3600.0, unit="seconds")
        checks.whole("rise", self.rise, high=1000)
        checks.whole("fall", self.fall, high=1000)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroundTruthAgent:
    """An agent on a server that answers with its CPU use, memory use and busy workers.

    Attributes:
        address: None: the server's.
        port: of the agent.
        path: of the GET.
        interval: seconds between polls.
        timeout: seconds after which a poll has failed.
    """

    address: str | None = None
    port: int = 9101
    path: str = "/"
    interval: float = 1.0
    timeout: float = 1.0

    def __post_init__(self) -> None:
        if self.address is not None:
            _text("address", self.address)
        _port(self.port)
        if not isinstance(self.path, str) or not self.path.startswith("/") or not self.path.isascii():
            raise InvalidOptionError(f"path must be an ASCII text that begins with '/', got {self.path!r}")
        checks.number("interval", self.interval, low=0.01, high=3600.0, unit="seconds")
        checks.number("timeout", self.timeout, low=0.001, high=3600.0, unit="seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """A server as an operator states it.

    Attributes:
        name: unique; at most 63 bytes of printable text.
        address: host name or IP address.
        port: of the service; None where the data plane needs none.
        weight: relative speed, at least 0; None: ``cores``, or 1 without them.
        cores: None: unknown.
        health: None: not checked, always up.
        ground_truth: None: no agent.
    """

    name: str
    address: str
    port: int | None = None
    weight: float | None = None
    cores: int | None = None
    health: HealthCheck | None = None
    ground_truth: GroundTruthAgent | None = None

    def __post_init__(self) -> None:
        _text("name", self.name)
        if len(self.name.encode()) > 63:
            raise InvalidOptionError(f"name must be at most 63 bytes, got {self.name!r}")
        _text("address", self.address)
        _port(self.port)
        if self.weight is not None:
            checks.number("weight", self.weight, low=0.0)
        if self.cores is not None:
            checks.whole("cores", self.cores, high=1 << 20)
        if self.health is not None and self.health.port is None and self.port is None:
            raise InvalidOptionError("a health check needs a port: give the server's or the check's")

    @property
    def safe_weight(self) -> float:
        """In force without an agent's."""
        return float(self.weight if self.weight is not None else self.cores or 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class DiscoverySource:
    """A source of servers while the driver runs, instead of ``[[servers]]``.

    Attributes:
        kind: "dns" or "file".
        host, port: of "dns": every address of the host is a server.
        path: of "file": a TOML file with ``[[servers]]``.
        interval: seconds between searches.
    """

    kind: str
    host: str | None = None
    port: int | None = None
    path: str | None = None
    interval: float = 5.0

    def __post_init__(self) -> None:
        checks.choice("kind of discovery", self.kind, ("dns", "file"))
        needed = ("host", "port") if self.kind == "dns" else ("path",)
        for key in needed:
            if getattr(self, key) is None:
                raise InvalidOptionError(f"discovery by {self.kind} needs the key {key!r}")
        for key in ("host", "path"):
            if getattr(self, key) is not None:
                _text(key, getattr(self, key))
        if self.host is not None:
            checks.host("host", self.host)
        _port(self.port)
        checks.number("interval", self.interval, low=0.01, high=86_400.0, unit="seconds")

    @property
    def where(self) -> str:
        """For messages: the host or the file."""
        return str(self.host if self.kind == "dns" else self.path)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataPlaneConfig:
    """The content of dataplane.toml.

    Attributes:
        name: of the region.
        servers: those there are at the start.
        publish_interval: seconds between publications.
        lease: longest time in seconds that an agent's weights are honoured without a new action.
        capacity: servers there is room for; None: 64, or as many as there are if that is more.
        mode: permissions of the region.
        group: owning group of the region; None: the process's.
        discovery: None: the servers are those of the file.
        health, ground_truth: of servers found by DNS or added while the driver runs; None: not checked, no agent.
        driver: keys of the driver itself, table ``[driver]``, which checks them.
        renamed: the region has another name than the file says, which stays in force; no key of the file.
    """

    name: str
    servers: tuple[ServerConfig, ...] = ()
    publish_interval: float = 0.2
    lease: float = math.inf
    capacity: int | None = None
    mode: int = 0o600
    group: str | None = None
    discovery: DiscoverySource | None = None
    health: HealthCheck | None = None
    ground_truth: GroundTruthAgent | None = None
    driver: Mapping[str, Any]
    renamed: bool = False

    def __post_init__(self) -> None:
        checks.number("publish_interval", self.publish_interval, low=0.001, high=86_400.0, unit="seconds")
        if self.lease != math.inf:
            checks.seconds("lease", self.lease)
        if self.capacity is not None:
            checks.whole("capacity", self.capacity, low=max(1, len(self.servers)), high=65_536)


def load_config(path: str | os.PathLike[str]) -> DataPlaneConfig:
    """Read dataplane.toml. ``[health]`` and ``[ground_truth]`` are the defaults of all servers.

    Raises:
        InvalidOptionError: for a file that cannot be read, and a key that is missing or has a bad value; the message
            names file and key.
        UnknownNameError: for a key that does not exist.
    """
    file, values = read_toml(path)
    here = str(file)
    health = _optional(HealthCheck, values.pop("health", None), f"{here}, [health]", None)
    truth = _optional(GroundTruthAgent, values.pop("ground_truth", None), f"{here}, [ground_truth]", None)
    servers = _servers(values.pop("servers", []), here, health, truth)
    driver = values.pop("driver", {})
    if not isinstance(driver, dict):
        raise InvalidOptionError(f"{here}: driver must be a table, got {driver!r}")
    discovery = values.pop("discovery", None)
    if discovery is not None:
        discovery = parse_table(DiscoverySource, discovery, f"{here}, [discovery]")
    elif not servers:
        raise InvalidOptionError(f"{here}: there are no servers: give [[servers]] or [discovery]")
    if "mode" in values:
        values["mode"] = _mode(values["mode"], here)
    known = [field.name for field in fields(DataPlaneConfig) if field.name != "renamed"]
    for key in values:
        if key not in known:
            raise UnknownNameError("key", key, known, where=here)
    for key in ("name", "group"):
        try:
            _text(key, values.get(key, "-"))
        except InvalidOptionError as error:
            raise InvalidOptionError(f"{here}: {error}") from None
    if "name" not in values:
        raise InvalidOptionError(f"{here}: the key 'name' is missing: the name of the region")
    common: dict[str, Any] = {
        "health": None if health is None else parse_table(HealthCheck, health, f"{here}, [health]"),
        "ground_truth": None if truth is None else parse_table(GroundTruthAgent, truth, f"{here}, [ground_truth]"),
    }
    return _in(here, lambda: DataPlaneConfig(servers=servers, driver=driver, discovery=discovery, **common, **values))


def read_servers(path: str | os.PathLike[str]) -> tuple[ServerConfig, ...]:
    """The ``[[servers]]`` of a TOML file with nothing else but ``[health]`` and ``[ground_truth]``.

    Raises:
        InvalidOptionError, UnknownNameError: as :func:`load_config`.
    """
    file, values = read_toml(path)
    here = str(file)
    health = _optional(HealthCheck, values.pop("health", None), f"{here}, [health]", None)
    truth = _optional(GroundTruthAgent, values.pop("ground_truth", None), f"{here}, [ground_truth]", None)
    servers = _servers(values.pop("servers", []), here, health, truth)
    for key in values:
        raise UnknownNameError("key", key, ("servers", "health", "ground_truth"), where=here)
    return servers


def parse_server(text: str) -> ServerConfig:
    """A server as on a command line: NAME=ADDRESS[:PORT], then any of weight, cores and health, separated by commas.

    Raises:
        InvalidOptionError, UnknownNameError: with the text.
    """
    where = f"server {text!r}"
    place, *rest = text.split(",")
    name, equals, address = place.partition("=")
    if not equals or not name or not address:
        raise InvalidOptionError(f"{where}: must begin with NAME=ADDRESS or NAME=ADDRESS:PORT")
    values: dict[str, Any] = {"name": name, "address": address}
    # In brackets an IPv6 address, which without them has no port.
    brackets = re.fullmatch(r"\[([^\[\]]*)\](?::(.*))?", address)
    host, port = brackets.groups() if brackets else (address, None)
    if not brackets and address.count(":") == 1:
        host, _, port = address.partition(":")
    values["address"] = host
    if port is not None:
        values["port"] = parse_port_number(port)
        if values["port"] is None:
            raise InvalidOptionError(f"{where}: the port must be a whole number from 1 to 65535, got {port!r}")
    kinds: dict[str, Callable[[str], Any]] = {
        "weight": float,
        "cores": int,
        "health": lambda kind: HealthCheck(kind=kind),
    }
    for part in rest:
        key, _, value = part.partition("=")
        if key not in kinds:
            raise UnknownNameError("key", key, kinds, where=where)
        try:
            values[key] = kinds[key](value)
        except LbgymError:
            raise
        except ValueError:
            raise InvalidOptionError(f"{where}: {key} must be a number, got {value!r}") from None
    return _in(where, lambda: ServerConfig(**values))


def parse_port_number(text: str) -> int | None:
    """A TCP port in ASCII digits; None for anything else."""
    # Other digits are no numbers to int(), nor are thousands of them.
    if not re.fullmatch("[0-9]{1,5}", text) or not 0 < int(text) < 65_536:
        return None
    return int(text)


def _servers(
    values: Any, here: str, health: dict[str, Any] | None, truth: dict[str, Any] | None
) -> tuple[ServerConfig, ...]:
    if not isinstance(values, list):
        raise InvalidOptionError(f"{here}: servers must be tables, [[servers]], got {values!r}")
    servers: list[ServerConfig] = []
    for number, value in enumerate(values, 1):
        where = f"{here}, [[servers]] {number}"
        if not isinstance(value, dict):
            raise InvalidOptionError(f"{where}: must be a table, got {value!r}")
        if isinstance(value.get("name"), str):
            where += f" ({value['name']})"
        value = dict(value)
        for key, kind, common in (("health", HealthCheck, health), ("ground_truth", GroundTruthAgent, truth)):
            given = _optional(kind, value.pop(key, None), f"{where}, {key}", common)
            value[key] = None if given is None else parse_table(kind, given, f"{where}, {key}")
        server = parse_table(ServerConfig, value, where)
        if any(server.name == other.name for other in servers):
            raise InvalidOptionError(f"{where}: there is another server of this name; names must be unique")
        servers.append(server)
    return tuple(servers)


def _optional(kind: type, value: Any, where: str, common: dict[str, Any] | None) -> dict[str, Any] | None:
    """An optional table over the keys that all servers share; ``true`` stands for those, None for no table."""
    if value is None:
        return common
    if value is False:
        return None
    if value is True:
        return common or {}
    if not isinstance(value, dict):
        raise InvalidOptionError(f"{where}: must be a table, true or false, got {value!r}")
    merged = {**(common or {}), **value}
    parse_table(kind, merged, where)
    return merged


def parse_table(kind: type, value: Any, where: str) -> Any:
    """A dataclass from a table of a file.

    Raises:
        InvalidOptionError: for a key that is missing or has a bad value; the message begins with ``where``.
        UnknownNameError: for a key that does not exist.
    """
    if not isinstance(value, dict):
        raise InvalidOptionError(f"{where}: must be a table, got {value!r}")
    keys = {field.name: field for field in fields(kind)}
    for key in value:
        if key not in keys:
            raise UnknownNameError("key", key, keys, where=where)
    for key, field in keys.items():
        if key not in value and field.default is MISSING:
            raise InvalidOptionError(f"{where}: the key {key!r} is missing")
    return _in(where, lambda: kind(**value))


def _in(where: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except UnknownNameError as error:
        raise UnknownNameError(error.kind, error.name, error.known, where=where) from None
    except LbgymError as error:
        raise InvalidOptionError(f"{where}: {error}") from None


def _mode(value: Any, here: str) -> int:
    """Permissions are octal as a text ("660") and, as TOML has octal numbers, as a number (0o660)."""
    try:
        mode = int(value, 8) if isinstance(value, str) else value
    except ValueError:
        mode = None
    if not isinstance(mode, int) or isinstance(mode, bool) or not 0 <= mode <= 0o777:
        raise InvalidOptionError(f'{here}: mode must be octal permissions such as "660", got {value!r}')
    return mode


def _text(name: str, value: Any) -> None:
    if not isinstance(value, str) or not value or not value.isprintable():
        raise InvalidOptionError(f"{name} must be a printable text that is not empty, got {value!r}")


def _port(value: Any) -> None:
    if value is not None:
        checks.whole("port", value, low=1, high=65_535)
