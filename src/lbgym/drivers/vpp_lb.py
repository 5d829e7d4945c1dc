"""The stock load balancer of an unmodified VPP as a data plane: :class:`VppLb`."""

from __future__ import annotations

import contextlib
import ipaddress
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import checks
from ..errors import InvalidOptionError, MissingExtraError
from ..features import GROUND_TRUTH_NAMES, NUM_FEATURES
from ..sharedmemory import Publication
from .base import DriverError, ServerRow, Source
from .config import DataPlaneConfig, ServerConfig, load_config, parse_table
from .pool import ServerPool
from .proxy.weights import whole_weights

#: Largest weight that the plugin knows.
MAX_WEIGHT = 100
PROTOCOLS = {"tcp": 6, "udp": 17}
_ANY = 255
#: Flag of a server that is not leaving.
_USED = 1
#: Messages of the plugin that the driver needs; the second has come with VPP 26.10.
_MESSAGES = ("lb_as_v2_dump", "lb_as_set_weight")
_BUSY = GROUND_TRUTH_NAMES.index("busy_workers")
#: Polls of a server's agent without an answer after which its last one is no measurement any more.
_STALE = 3.0
#: Seconds to wait for VPP.
_PATIENCE = 5
#: Longest wait at the start for the first reports of the servers' agents, seconds.
_FIRST_REPORTS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class VppLbOptions:
    """Table ``[driver]`` of dataplane.toml.

    Attributes:
        vip: prefix of the VIP as VPP has it, such as "10.0.0.100/32".
        port: of the VIP; None: all ports.
        protocol: "tcp" or "udp", with ``port``.
        socket: of VPP's binary API (``socksvr`` in startup.conf).
        api_files: folder with VPP's ``*.api.json``; None: where VPP installs them.
    """

    vip: str
    port: int | None = None
    protocol: str = "tcp"
    socket: str = "/run/vpp/api.sock"
    api_files: str | None = None

    def __post_init__(self) -> None:
        checks.text("vip", self.vip)
        try:
            object.__setattr__(self, "vip", str(ipaddress.ip_network(self.vip)))
        except ValueError as error:
            raise InvalidOptionError(f"vip must be a prefix such as 10.0.0.100/32, got {self.vip!r}: {error}") from None
        if self.port is not None:
            checks.whole("port", self.port, high=65_535)
        checks.choice("protocol", self.protocol, tuple(PROTOCOLS))
        checks.text("socket", self.socket)
        if self.api_files is not None:
            checks.text("api_files", self.api_files)

    @property
    def key(self) -> dict[str, Any]:
        """Fields by which VPP's messages name the VIP."""
        if self.port is None:
            return {"pfx": self.vip, "protocol": _ANY, "port": 0}
        return {"pfx": self.vip, "protocol": PROTOCOLS[self.protocol], "port": self.port}


class VppLb(Source):
    """A VIP of VPP's ``lb`` plugin, whose servers' weights an agent sets.

    VPP counts no flows by server, and knows nothing of their lengths. Open flows are the busy workers that the agents
    on the servers report (``lbgym server-agent --status``), also those of other balancers' flows; flows that begin and
    end between two reports are not counted. FCTs and durations are not measured. The constructor waits for the first
    reports.

    A server that takes no flows need not report; its flows stay as they were. Those of a removed one that does not
    report have failed, as nobody can say when they end.

    Args:
        config: the content of dataplane.toml. Its servers are those of the VIP, by address, each with ``ground_truth``.
        path: the file, for :meth:`reload`.

    Raises:
        InvalidOptionError, UnknownNameError: for a configuration that is not good.
        MissingExtraError: if vpp_papi is not installed.
        DriverError: if VPP cannot be reached, is older than 26.10, has no such VIP, or other servers; or if an agent
            does not report.
    """

    driver = "vpp-lb"
    features = ("n_flow_on",)

    def __init__(self, config: DataPlaneConfig, path: str | os.PathLike[str] | None = None) -> None:
        self._where = str(path) if path is not None else "the configuration"
        self.options: VppLbOptions = parse_table(VppLbOptions, dict(config.driver), f"{self._where}, [driver]")
        _check(config, self._where)
        self._api = _Api(self.options)
        self._path = path
        self._pool: ServerPool | None = None
        self._installed: Mapping[str, int] = {}
        try:
            self._check_servers(config)
            self._pool = ServerPool(config, path)
            n = len(self._servers.slots)
            self._weights = np.array([row.weight for row in self._servers.slots.rows])
            self._open, self._ended, self._lost = (np.zeros(n, np.int64) for _ in range(3))
            self._take_first()
        except BaseException:
            self.close()
            raise

    @property
    def _servers(self) -> ServerPool:
        if self._pool is None:
            raise DriverError("the driver of VPP's lb is closed")
        return self._pool

    @property
    def version(self) -> str:
        """Of VPP."""
        return self._api.version

    def servers(self) -> list[ServerRow]:
        return self._servers.servers()

    def read(self, now: float) -> Publication:
        pool = self._servers
        truth, age = self._take()
        self._install()
        n, active = len(pool.slots), pool.slots.active
        stats = np.zeros((n, NUM_FEATURES), np.float32)
        stats[:, 0] = self._open
        stats[~active] = 0.0
        zeros = np.zeros(n, np.int64)
        return Publication(
            timestamp=now,
            active=active,
            stats=stats,
            started=self._ended + self._lost + self._open,
            completed=self._ended.copy(),
            rejected=zeros,
            failed=self._lost.copy(),
            ground_truth=truth,
            ground_truth_age=age,
        )

    def apply(self, weights: NDArray[np.float64], now: float) -> None:
        self._weights = weights.copy()
        self._install()

    def drain(self, server: str) -> None:
        self._servers.drain(server)
        self._install()

    def undrain(self, server: str) -> None:
        self._servers.undrain(server)
        self._install()

    def add(self, server: str, **_: object) -> None:
        raise DriverError(f"add {server!r} to the VIP by VPP's command 'lb as', and to the file, and reload the driver")

    def remove(self, server: str) -> None:
        raise DriverError(
            f"remove {server!r} by VPP's command 'lb as ... del', and from the file, and reload the driver"
        )

    def reload(self) -> str:
        if self._path is not None:
            config = load_config(self._path)
            _check(config, self._where)
            self._check_servers(config)
        changes = self._servers.reload()
        self._grow(len(self._servers.slots))
        self._install()
        return changes

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()
            self._pool = None
        self._api.close()

    def _grow(self, n: int) -> None:
        more = np.zeros(max(0, n - len(self._open)), np.int64)
        self._open, self._ended, self._lost = (
            np.concatenate([counts, more]) for counts in (self._open, self._ended, self._lost)
        )

    def _take_first(self) -> None:
        """Agents are asked in the background, and nothing can be published before all have answered."""
        until = time.monotonic() + _FIRST_REPORTS
        while True:
            try:
                self._take()
                return
            except DriverError:
                if time.monotonic() >= until:
                    raise
            time.sleep(0.02)

    def _take(self) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """Count the flows that have begun and ended since the last reports; returns these as ground truth and age.

        Raises:
            DriverError: if a server that takes flows does not report.
        """
        pool = self._servers
        pool.refresh(self._open.tolist())
        self._grow(len(pool.slots))
        truth, age = pool.ground_truth()
        silent = []
        for slot in pool.slots:
            row, agent = slot.index, slot.server.ground_truth
            assert agent is not None
            busy = float(truth[row, _BUSY])
            if not math.isnan(busy) and age[row] <= _STALE * (agent.interval + agent.timeout):
                now = round(busy)
                self._ended[row] += max(0, int(self._open[row]) - now)
                self._open[row] = now
            elif slot.removed:
                # It would keep its row for ever.
                self._lost[row] += self._open[row]
                self._open[row] = 0
            elif slot.active:
                silent.append(slot.server.name)
        if silent:
            raise DriverError(
                f"the agent on server {silent[0]!r} reports no busy workers: run 'lbgym server-agent --status' there"
            )
        return truth, age

    def _check_servers(self, config: DataPlaneConfig) -> None:
        """VPP must have the same servers, no more, as it would go on sending those flows by their old weights."""
        known = self._api.weights()
        for server in config.servers:
            if _address(server) not in known:
                shown = ", ".join(sorted(known)) or "none"
                raise DriverError(
                    f"VIP {self.options.vip} of VPP has no server {server.address} ({server.name!r}); it has {shown}"
                )
        for address in set(known) - {_address(server) for server in config.servers}:
            raise DriverError(f"VIP {self.options.vip} of VPP has a server {address} that {self._where} has not")

    def _install(self) -> None:
        """Have the weights in force that were applied, wherever VPP has others."""
        pool = self._servers
        active = pool.slots.active
        weights = np.array([row.weight for row in pool.slots.rows])
        known = min(len(weights), len(self._weights))
        weights[:known] = self._weights[:known]
        weights[~active] = 0.0
        if not weights.any():
            weights[active] = 1.0
        whole = whole_weights(weights, MAX_WEIGHT).tolist()
        # One that comes back under another name has the address of what it leaves behind.
        slots = sorted(pool.slots, key=lambda slot: not slot.removed)
        wanted = {_address(slot.server): whole[slot.index] for slot in slots}
        found = self._api.weights()
        for address, weight in wanted.items():
            if address in found and found[address] != weight:
                self._api.set_weight(address, weight)


def _check(config: DataPlaneConfig, where: str) -> None:
    if config.discovery is not None:
        raise InvalidOptionError(
            f"{where}: the servers of VPP's lb are those of VPP: give [[servers]], not [discovery]"
        )
    for server in config.servers:
        if server.ground_truth is None:
            raise InvalidOptionError(
                f"{where}: server {server.name!r} needs ground_truth, as VPP's lb counts no flows by server"
            )
        try:
            ipaddress.ip_address(server.address)
        except ValueError:
            raise InvalidOptionError(
                f"{where}: the address of server {server.name!r} must be an IP address, got {server.address!r}"
            ) from None


def _address(server: ServerConfig) -> str:
    return str(ipaddress.ip_address(server.address))


class _Api:
    """VPP's binary API, connected anew after VPP has gone."""

    def __init__(self, options: VppLbOptions) -> None:
        try:
            import vpp_papi
        except ImportError:
            raise MissingExtraError("vpp_papi", "vpp", "a driver of VPP") from None
        self._papi: Any = vpp_papi
        self._options = options
        self._client: Any = None
        self.version = ""
        self._connect()

    def _connect(self) -> None:
        options = self._options
        files = None
        if options.api_files is not None:
            files = [str(path) for path in sorted(Path(options.api_files).glob("**/*.api.json"))]
            if not files:
                raise InvalidOptionError(f"there is no *.api.json in api_files, {options.api_files!r}")
        try:
            client = self._papi.VPPApiClient(
                apifiles=files, server_address=options.socket, read_timeout=_PATIENCE, async_thread=False
            )
        except Exception as error:
            raise DriverError(f"VPP's API definitions cannot be read: {_said(error)}; give api_files") from None
        try:
            client.connect("lbgym")
        except Exception as error:
            # It leaves its socket open then.
            with contextlib.suppress(Exception):
                client.transport.socket.close()
            raise DriverError(f"VPP does not answer at {options.socket}: {_said(error)}") from None
        self._client = client
        self.version = str(client.api.show_version().version)
        missing = [name for name in _MESSAGES if not hasattr(client.api, name)]
        if missing:
            self.close()
            raise DriverError(
                f"VPP {self.version} at {options.socket} does not know {', '.join(missing)}: it needs its plugin lb, "
                "and VPP 26.10 or newer"
            )

    def _call(self, name: str, **fields: Any) -> Any:
        if self._client is None:
            self._connect()
        try:
            return getattr(self._client.api, name)(**fields)
        except Exception as error:
            self.close()
            raise DriverError(f"VPP does not answer at {self._options.socket}: {_said(error)}") from None

    def weights(self) -> dict[str, int]:
        """By address of the VIP's servers, without those that are leaving."""
        wanted = self._options.key
        # VPP's own filter knows no VIPs of IPv4.
        rows = self._call("lb_as_v2_dump", pfx="::/0", protocol=_ANY, port=0)
        return {
            str(row.app_srv): int(row.weight)
            for row in rows
            if row.flags & _USED
            and {"pfx": str(row.vip.pfx), "protocol": int(row.vip.protocol), "port": int(row.vip.port)} == wanted
        }

    def set_weight(self, address: str, weight: int) -> None:
        reply = self._call("lb_as_set_weight", as_address=address, weight=weight, is_flush=False, **self._options.key)
        if reply.retval != 0:
            raise DriverError(f"VPP refuses the weight {weight} of server {address}: error {reply.retval}")

    def close(self) -> None:
        """Idempotent."""
        if self._client is not None:
            with contextlib.suppress(Exception):
                self._client.disconnect()
            self._client = None


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__


__all__ = ["MAX_WEIGHT", "VppLb", "VppLbOptions"]
