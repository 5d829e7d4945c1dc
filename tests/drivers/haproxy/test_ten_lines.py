"""The first lines of docs/haproxy.md, from installed packages to a changed weight."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.drivers.haproxy.balancer import Balancer
from tests.drivers.proxies import LONG, Servers, eventually, free_ports
from tests.test_docs import ROOT, blocks

pytestmark = [pytest.mark.haproxy, pytest.mark.slow]


def test_ten_lines_lead_to_a_changed_weight(tmp_path: Path, servers: Servers) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed (make haproxy)")
    lines = blocks("haproxy", "sh")[0]
    assert len(lines.splitlines()) <= 10
    # What is installed already; and ports and names that nobody else has.
    lines = "\n".join(line for line in lines.splitlines() if not line.startswith(("sudo apt install", "pip install")))
    configuration = (ROOT / "deploy" / "haproxy.cfg").read_text()
    ports = dict(zip(("8001", "8002", "8003", "8080", "1514"), map(str, free_ports(5)), strict=True))
    names = ports | {"/tmp/haproxy.sock": str(tmp_path / "haproxy.sock"), "--name web": "--name web-ten"}
    names |= {"--shm web": "--shm web-ten", "inspect web": "inspect web-ten"}
    for old, new in names.items():
        lines, configuration = lines.replace(old, new), configuration.replace(old, new)
    (tmp_path / "deploy").mkdir()
    (tmp_path / "deploy" / "haproxy.cfg").write_text(configuration)
    command = tmp_path / "lbgym"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m lbgym "$@"\n')
    command.chmod(0o755)
    balancer = Balancer(servers)
    balancer.socket = names["/tmp/haproxy.sock"]
    shell = subprocess.Popen(
        ["bash", "-c", f"{lines}\nread"],
        cwd=tmp_path,
        env=os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert shell.stdout is not None
        shown = ""
        for line in shell.stdout:
            shown += line
            if line.startswith("web-3") and "started" in shown:
                break
        assert "region web-ten: backend web, 3 servers" in shown
        assert "haproxy" in shown and "not measured" in shown and all(f"web-{i}" in shown for i in (1, 2, 3))
        url = f"http://127.0.0.1:{ports['8080']}/"

        def changed() -> bool:
            subprocess.run(["curl", "-s", url], stdout=subprocess.DEVNULL, timeout=LONG, check=True)
            return set(balancer.weights().values()) != {100}

        eventually(changed)
    finally:
        for line in balancer._answers(balancer.socket, "show info").splitlines():
            if line.startswith("Pid: "):
                os.kill(int(line.removeprefix("Pid: ")), signal.SIGKILL)
        os.killpg(shell.pid, signal.SIGTERM)
        shell.communicate()
        balancer.close()
