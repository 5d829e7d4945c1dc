"""``lbgym dataplane haproxy`` as a process."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from lbgym.cli import main
from lbgym.dataplanes import SharedMemoryDataPlane
from lbgym.drivers import DriverError
from lbgym.drivers.check import check_driver
from lbgym.drivers.control import control
from lbgym.drivers.haproxy import HaproxyOptions, open_backends
from lbgym.sharedmemory import region_names
from tests.drivers.haproxy.balancer import Balancer
from tests.drivers.proxies import LONG, eventually

pytestmark = pytest.mark.haproxy

WEB = {"web": ["s1", "s2", "s3"]}


def test_held_to_the_contract_of_drivers(balancer: Balancer) -> None:
    balancer.configure(WEB, weights={"s1": 40, "s2": 20})
    balancer.start()
    name = f"haproxy-{os.getpid()}"
    command = ["--socket", balancer.socket, "--log", balancer.log, "--backend", "web", "--name", name]
    process = subprocess.Popen(
        [sys.executable, "-m", "lbgym", "dataplane", "haproxy", *command, "--publish-interval", "0.05"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line == (
            f"region {name}: backend web, 3 servers, weights by the runtime API, an observation every 0.05 s of "
            "n_flow_on, fct_mean, fct_p90, fct_std, fct_mean_decay, fct_p90_decay\n"
        ), process.communicate()[1]
        plane = SharedMemoryDataPlane(name, timeout=LONG)
        try:
            plane.reset()
            # An action moves the weights of a real HAProxy, and so its flows.
            plane.step(np.array([1.0, 1.0, 2.0]))
            eventually(lambda: balancer.weights() == {"s1": 1, "s2": 1, "s3": 2})
            served = [balancer.flow() for _ in range(40)]
            assert [served.count(server) for server in WEB["web"]] == [10, 10, 20]
            eventually(lambda: plane.step(np.array([1.0, 1.0, 2.0])).completed.tolist() == [10, 10, 20])
        finally:
            plane.close()
        control(name, {"op": "drain", "server": "s2"})
        states = {row["name"]: row["state"] for row in control(name, {"op": "list"})["servers"]}
        assert states == {"s1": "up", "s2": "draining", "s3": "up"}
        verdicts = check_driver(name, timeout=LONG, end=True)
        # HAProxy dispatches by weights alone: there is no index to check.
        assert {verdict.check for verdict in verdicts if verdict.passed is None} <= {"index"}
        assert not [str(verdict) for verdict in verdicts if verdict.passed is False]
        assert process.wait(LONG) == 0
        assert balancer.weights() == {"s1": 40, "s2": 20, "s3": 100}
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--socket", "{socket}", "--backend", "wbe"], "has no backend 'wbe'"),
        (["--socket", "/nowhere/s", "--backend", "web"], "there is no socket /nowhere/s"),
        (["--backend", "web"], "give socket, HAProxy's 'stats socket'"),
        (["--socket", "{socket}", "--backend", "web", "--backend", "api"], "give each backend a region of its own"),
        (["--socket", "{socket}", "--backend", "web", "--log", "/nowhere/log"], "cannot receive HAProxy's log"),
        (["--socket", "{socket}", "--backend", "web", "--publish-interval", "0"], "publish_interval must be"),
    ],
)
def test_bad_input_is_one_sentence(
    balancer: Balancer, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    balancer.configure(WEB)
    balancer.start()
    given = [argument.format(socket=balancer.socket) for argument in arguments]
    with pytest.raises(SystemExit) as ended:
        main(["dataplane", "haproxy", "--name", "none", *given])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
    assert balancer.weights() == {"s1": 100, "s2": 100, "s3": 100} and not list(region_names())


def test_full_disk(balancer: Balancer) -> None:
    """A log socket needs an inode."""
    if os.geteuid() != 0:
        pytest.skip("only root mounts a file system to fill")
    folder = balancer.folder / "full"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "nr_inodes=1", "none", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no right to mount")
    try:
        balancer.configure(WEB)
        balancer.start()
        options = HaproxyOptions(backends={"a": "web"}, socket=balancer.socket, log=str(folder / "log"))
        with pytest.raises(DriverError, match=r"cannot receive HAProxy's log at .*: No space left on device"):
            open_backends(options)
        assert balancer.weights() == {"s1": 100, "s2": 100, "s3": 100}
    finally:
        subprocess.run(["umount", str(folder)], check=True)
