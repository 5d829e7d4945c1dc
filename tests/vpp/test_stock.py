"""``lbgym dataplane vpp-lb``: the weights of the load balancer that VPP itself brings."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lbgym.drivers import DriverError
from lbgym.drivers.check import check_driver
from lbgym.drivers.config import load_config
from lbgym.drivers.control import control
from lbgym.drivers.vpp_lb import VppLb
from lbgym.errors import InvalidOptionError
from lbgym.sharedmemory import SharedMemoryRegion
from tests.drivers.test_discovery import eventually
from tests.drivers.xdp.network import PORT, VIP4, newest, outcome
from tests.vpp.vpp import PREFIX, Vpp, balanced, vpp_lb_toml

pytestmark = pytest.mark.vpp

#: A status page as Apache's, by which its first argument are the busy workers.
STATUS = """
import http.server, sys
class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(f"BusyWorkers: {sys.argv[1]}\\nIdleWorkers: 1\\n".encode())
    def log_message(self, *arguments):
        pass
server = http.server.HTTPServer(("127.0.0.1", 8000), Page)
print("ready", flush=True)
server.serve_forever()
"""


def weights(vpp: Vpp) -> dict[str, int]:
    rows = vpp.api.lb_as_v2_dump(pfx="::/0", protocol=255, port=0)
    return {str(row.app_srv): int(row.weight) for row in rows if row.flags & 1}


def test_weights_open_flows_and_refusals(tmp_path: Path) -> None:
    name = f"vpp-lb-{os.getpid()}"
    with balanced(tmp_path, "gre", offload=False) as (net, vpp):
        # It encapsulates checksums as they are.
        net.run("client", "ethtool", "-K", "eth0", "tx", "off", "tso", "off")
        vpp.cli("lb conf ip4-src-address 10.77.0.2")
        vpp.cli(f"lb vip {VIP4}/32 protocol tcp port {PORT} encap gre4 new_len 1024")
        for i, server in enumerate(net.servers):
            vpp.cli(f"lb as {VIP4}/32 protocol tcp port {PORT} 10.77.2.{i + 1}")
            for command in (
                (sys.executable, "-c", STATUS, i),
                (sys.executable, "-m", "lbgym", "server-agent", "--status", "http://127.0.0.1:8000/server-status?auto"),
            ):
                process = net.start(server, *command)
                assert process.stdout is not None and process.stdout.readline()
        driver: dict[str, Any] = {
            "vip": f"{VIP4}/32", "port": PORT, "socket": str(vpp.folder / "api.sock"),
            "api_files": str(Path(PREFIX, "share", "vpp", "api")),
        }  # fmt: skip
        file = tmp_path / "dataplane.toml"
        vpp_lb_toml(file, name, net.servers, driver)
        if tuple(map(int, vpp.version[:5].split("."))) < (26, 10):
            with pytest.raises(DriverError, match=r"its plugin lb, and VPP 26\.10 or newer"):
                VppLb(load_config(file), file)
            return
        check_refusals(file)
        vpp_lb_toml(file, name, net.servers, driver)
        process = net.start("client", sys.executable, "-m", "lbgym", "dataplane", "vpp-lb", "--config", file)
        assert process.stdout is not None
        line = process.stdout.readline()
        assert f"{VIP4}/32 of VPP {vpp.version}, 3 servers, weights from 0 to 100" in line, process.communicate()[1]
        with SharedMemoryRegion.attach(name) as region:
            assert "n_flow_on" in region.real_features and "busy_workers" in region.real_features
            assert not any(name.startswith(("fct_", "duration_")) for name in region.real_features)
            eventually(lambda: newest(region).stats[:3, 0].tolist() == [0.0, 1.0, 2.0])
            region.write_action(sequence_id=1, weights=[1.0, 2.0, 7.0], lease=60.0)
            eventually(lambda: newest(region).applied_sequence_id == 1)
            assert list(weights(vpp).values()) == [1, 2, 7]
            region.write_action(sequence_id=2, weights=[0.1, 0.25, 1.0], lease=60.0)
            eventually(lambda: list(weights(vpp).values()) == [10, 25, 100])
            answered, failed, moved = outcome(net.clients(600))
            assert (failed, moved) == ([], 0)
            placed = np.array([answered[server] for server in net.servers])
            share = np.array([10.0, 25.0, 100.0]) / 135.0
            # Buckets are off by one, flows by chance: 5 standard deviations, as their ports are others in every run.
            assert (np.abs(placed - 600 * share) <= 5 * np.sqrt(600 * share * (1 - share)) + 1).all()
            control(name, {"op": "drain", "server": "server-2"})
            assert weights(vpp)["10.77.2.3"] == 0
            control(name, {"op": "undrain", "server": "server-2"})
            region.unlock_agent()
            verdicts = check_driver(name)
            assert [str(verdict) for verdict in verdicts if verdict.passed is False] == []
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
            assert list(weights(vpp).values()) == [1, 1, 1]


def check_refusals(file: Path) -> None:
    config = load_config(file)

    def refuse(error: type[Exception], message: str, servers: Any = config.servers, **driver: Any) -> None:
        changed = dataclasses.replace(config, servers=servers, driver={**config.driver, **driver})
        with pytest.raises(error, match=message):
            VppLb(changed, file)

    refuse(DriverError, "VPP does not answer at /nowhere/api.sock", socket="/nowhere/api.sock")
    refuse(InvalidOptionError, r"there is no \*\.api\.json in api_files, '/nowhere'", api_files="/nowhere")
    refuse(
        DriverError, r"VIP 10\.0\.0\.9/32 of VPP has no server 10\.77\.2\.1 \('server-0'\); it has none", vip="10.0.0.9"
    )
    refuse(DriverError, "has no server 10.77.2.1", port=PORT + 1)
    refuse(DriverError, "of VPP has a server 10.77.2.3 that", servers=config.servers[:2])
