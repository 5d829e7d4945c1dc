"""The first lines of docs/haproxy.md, from installed packages to a changed weight."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

from tests.drivers.haproxy.balancer import Balancer
from tests.drivers.proxies import Servers, eventually, fetch, free_ports, ten_lines

pytestmark = [pytest.mark.haproxy, pytest.mark.slow]


def test_ten_lines_lead_to_a_changed_weight(tmp_path: Path, servers: Servers) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed (make haproxy)")
    names = dict(zip(("8001", "8002", "8003", "8080", "1514"), map(str, free_ports(5)), strict=True))
    names["/tmp/haproxy.sock"] = str(tmp_path / "haproxy.sock")
    balancer = Balancer(servers)
    balancer.socket = names["/tmp/haproxy.sock"]
    try:
        with ten_lines("haproxy", tmp_path, ["haproxy.cfg"], names) as shown:
            assert "region web-ten: backend web, 3 servers" in shown
            assert "haproxy" in shown and "not measured" in shown and all(f"web-{i}" in shown for i in (1, 2, 3))

            def changed() -> bool:
                fetch(f"http://127.0.0.1:{names['8080']}/")
                return set(balancer.weights().values()) != {100}

            eventually(changed)
    finally:
        for line in balancer._answers(balancer.socket, "show info").splitlines():
            if line.startswith("Pid: "):
                os.kill(int(line.removeprefix("Pid: ")), signal.SIGKILL)
        balancer.close()
