"""Networks of namespaces on one machine: :class:`Network`."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from .base import LabError, run_tool

#: Programs that a network is made with, by the Debian package that has them.
TOOLS = {"ip": "iproute2", "ethtool": "ethtool", "nsenter": "util-linux", "setpriv": "util-linux", "sysctl": "procps"}
_FOLDER = Path("/run/netns")
_FABRIC = "fabric"


def missing_tools() -> str:
    """A sentence on the programs that are not installed; empty if all are."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    packages = sorted({TOOLS[tool] for tool in missing})
    return f"no {', '.join(missing)} here: install {', '.join(packages)}" if missing else ""


@contextmanager
def inside(namespace: str) -> Iterator[None]:
    """Have this thread in a network namespace; its other threads stay where they are.

    Raises:
        LabError: if the kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/thread-self/ns/net") as before, open(_FOLDER / namespace) as other:
        if libc.setns(other.fileno(), 0) != 0:
            raise LabError(f"cannot enter network namespace {namespace}: {os.strerror(ctypes.get_errno())}")
        try:
            yield
        finally:
            if libc.setns(before.fileno(), 0) != 0:
                raise LabError(f"cannot leave network namespace {namespace}: {os.strerror(ctypes.get_errno())}")


class Network:
    """Parts on one link: each in a namespace of its own, with an interface eth0 at a bridge in another namespace.

    It is connected to nothing else, so several networks can have the same addresses.

    Args:
        prefix: of all namespaces; no other network's may begin with it.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self._ports: dict[str, str] = {}

    def name(self, part: str) -> str:
        """The namespace of a part; ``fabric`` has the bridge."""
        return self.prefix + part

    def port(self, part: str) -> str:
        """The interface of the fabric that a part's eth0 is connected to."""
        return self._ports[part]

    def create(self, addresses: Mapping[str, Sequence[str]]) -> None:
        """Make all parts.

        Args:
            addresses: of each part's eth0, with prefix lengths, IPv4 and IPv6.

        Raises:
            LabError: if one cannot be made, also because it is there.
        """
        for part in (_FABRIC, *addresses):
            self.ip("netns", "add", self.name(part))
            self.ip("link", "set", "lo", "up", part=part)
            self.sysctl(part, **{"net.ipv4.conf.all.rp_filter": 0, "net.ipv4.conf.default.rp_filter": 0})
        self.ip("link", "add", "bridge0", "type", "bridge", part=_FABRIC)
        self.ip("link", "set", "bridge0", "up", part=_FABRIC)
        for i, (part, own) in enumerate(addresses.items()):
            port = self._ports[part] = f"p{i}"
            ends = ("netns", self.name(part), "type", "veth", "peer", port, "netns", self.name(_FABRIC))
            self.ip("link", "add", "eth0", *ends)
            self.ip("link", "set", port, "master", "bridge0", "up", part=_FABRIC)
            self.ip("link", "set", "eth0", "up", part=part)
            for address in own:
                self.add_address(part, address, "eth0")

    def ip(self, *arguments: str, part: str | None = None) -> str:
        """Run ``ip``, in the namespace of a part if given; raises LabError if it fails."""
        where = () if part is None else ("-n", self.name(part))
        return run_tool(["ip", *where, *arguments])

    def add_address(self, part: str, address: str, device: str) -> None:
        """Give an interface an address with its prefix length."""
        # An IPv6 address is of no use for a second or more while it may be taken by another.
        now = ("nodad",) if ":" in address else ()
        self.ip("addr", "add", address, "dev", device, *now, part=part)

    def sysctl(self, part: str, **values: int) -> None:
        """Set kernel parameters of a part's namespace."""
        run_tool(self.command(part, "sysctl", "-qw", *(f"{key}={value}" for key, value in values.items())))

    def hold_vip(self, part: str, vip: str) -> None:
        """Have a server accept packets for an address that it does not answer ARP for, as direct return needs."""
        self.sysctl(part, **{"net.ipv4.conf.all.arp_ignore": 1, "net.ipv4.conf.all.arp_announce": 2})
        self.add_address(part, vip, "lo")

    def command(self, part: str, *arguments: str) -> list[str]:
        """A command as run in the namespace of a part; unlike ``ip netns exec``, it leaves /sys as it is."""
        return ["nsenter", f"--net={_FOLDER / self.name(part)}", *arguments]

    def remove(self) -> bool:
        """Kill what runs in it and remove it, also what an earlier process has left; returns if there was anything."""
        names = [path.name for path in _FOLDER.glob(f"{self.prefix}*")] if _FOLDER.is_dir() else []
        for name in names:
            found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
            for pid in found.stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)
        left = [name for name in names if (_FOLDER / name).exists()]
        if left:
            raise LabError(f"cannot remove the network namespaces {', '.join(left)}")
        return bool(names)


def wait_until_dead(pids: Sequence[int], seconds: float = 10.0) -> None:
    """Wait until processes that were killed are gone, or are zombies that wait for their parent."""
    deadline = time.monotonic() + seconds
    while any(map(_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
