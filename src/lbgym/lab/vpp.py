"""VPP with the plugin of ``plugins/vpp`` as a data plane of a laboratory: :class:`VppDataPlane`."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import checks
from ..errors import InvalidOptionError, UnknownNameError
from ..scenarios import Scenario
from .base import LabError, run_tool
from .place import VIP, VIP_PORT, Place

#: Options of ``[driver]``.
_KEYS = ("mode", "flows")
_MODES = ("dsr", "nat")
_PLUGIN = "lbgym_plugin.so"


def find_vpp() -> tuple[Path | None, Path | None]:
    """VPP's program, and the folder with the plugin: in $VPP_PREFIX, or where VPP is installed, or None.

    A plugin that was not installed is where ``$VPP_PLUGIN_BUILD/lib/vpp_plugins`` says.
    """
    prefix = os.environ.get("VPP_PREFIX")
    found = shutil.which("vpp", path=None if prefix is None else str(Path(prefix, "bin")))
    if found is None:
        return None, None
    program = Path(found)
    build = os.environ.get("VPP_PLUGIN_BUILD")
    folders = [] if build is None else [Path(build, "lib", "vpp_plugins")]
    folders += sorted(program.parents[1].glob("lib*/**/vpp_plugins"))
    return program, next((folder for folder in folders if (folder / _PLUGIN).exists()), None)


class VppDataPlane:
    """A VIP of the plugin in a VPP of its own, which has the balancer's interface for itself."""

    @property
    def rules(self) -> Sequence[str]:
        from ..drivers.xdp.options import RULES

        return RULES

    def check(self, options: Mapping[str, Any], scenario: Scenario, where: str) -> None:
        for key in options:
            if key not in _KEYS:
                raise UnknownNameError("key", key, _KEYS, where=where)
        checks.choice("mode", options.get("mode", "dsr"), _MODES)
        checks.whole("flows", options.get("flows", 65_536), low=16, high=1 << 26)
        if options.get("mode") == "nat" and scenario.balancers > 1:
            raise InvalidOptionError(
                f"{where}: mode 'nat' needs one balancer, through which the servers answer, got {scenario.balancers}"
            )

    def missing(self) -> str:
        program, plugins = find_vpp()
        if program is None:
            return "no vpp here: install VPP, or give its prefix in VPP_PREFIX"
        return "" if plugins is not None else f"{program} has no {_PLUGIN}: make vpp-plugin, docs/vpp.md"

    def translates(self, options: Mapping[str, Any]) -> bool:
        return options.get("mode") == "nat"

    def prepare(self, place: Place) -> None:
        # VPP takes the address over, and the kernel no longer answers for it.
        (link,) = json.loads(run_tool(["ip", "-n", place.network.name(place.part), "-j", "-4", "addr", "show", "eth0"]))
        (address,) = link["addr_info"]
        self._file(place, "address").write_text(f"{address['local']}/{address['prefixlen']}")

    @staticmethod
    def _file(place: Place, ending: str) -> Path:
        return place.folder / f"{place.part}.{ending}"

    def command(self, place: Place, rule: str) -> list[str]:
        program, plugins = find_vpp()
        if program is None or plugins is None:
            raise LabError(self.missing())
        own, sampling = sorted(program.parents[1].glob("lib*/**/vpp_plugins")), place.scenario.sampling
        commands, config = self._file(place, "vpp"), self._file(place, "conf")
        commands.write_text("\n".join(self._commands(place, rule, sampling.probability)) + "\n")
        config.write_text(
            f"unix {{ nodaemon exec {commands} log {self._file(place, 'vpp.log')} poll-sleep-usec 100 "
            f"runtime-dir {place.folder} cli-listen {self._file(place, 'cli')} }}\n"
            f"api-segment {{ prefix {place.region} }}\n"
            f"statseg {{ socket-name {self._file(place, 'stats')} size 32m }}\n"
            "memory { main-heap-size 256M }\nbuffers { page-size default buffers-per-numa 16384 }\n"
            f"plugins {{ path {':'.join(map(str, [*own, plugins]))} plugin default {{ disable }} "
            "plugin af_packet_plugin.so { enable } plugin lbgym_plugin.so { enable } }\n"
        )
        script = f"ip addr flush dev eth0; ip addr flush dev lo; exec {shlex.join([str(program), '-c', str(config)])}"
        return ["sh", "-c", script]

    def _commands(self, place: Place, rule: str, sampling: float) -> list[str]:
        mode, balancers = place.options.get("mode", "dsr"), place.scenario.balancers
        # Not the kernel's, which would take the packets for its own; the same at each start, as others remember it.
        number = int(place.part.rpartition("-")[2])
        lines = [
            f"create host-interface name eth0 hw-addr 02:fe:6c:62:{number >> 8:02x}:{number & 0xFF:02x}",
            "set interface state host-eth0 up",
            f"set interface ip address host-eth0 {self._file(place, 'address').read_text()}",
            "ip route add 10.78.0.0/16 via host-eth0",
            f"lbgym vip add {place.region} {VIP} {VIP_PORT} mode {mode} rule {rule} balancers {balancers} "
            f"servers {max(64, len(place.servers))} flows {place.options.get('flows', 65_536)} "
            f"interval {place.publish_interval} fct-sampling {sampling} duration-sampling {sampling}",
        ]
        if mode == "nat":
            lines.append("lbgym interface host-eth0")
        for (name, address, port), weight in zip(place.servers, place.scenario.configured_weights, strict=True):
            words = f" port {port}" if mode == "nat" else ""
            lines.append(f"lbgym server add {place.region} {name} {address} weight {weight}{words}")
        return lines

    def clear(self, region: str) -> None:
        # A VPP that was killed leaves the segments of its API.
        for segment in ("global_vm", "vpe-api"):
            Path(f"/dev/shm/{region}-{segment}").unlink(missing_ok=True)


__all__ = ["VppDataPlane", "find_vpp"]
