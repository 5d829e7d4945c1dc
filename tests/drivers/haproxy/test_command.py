"""``lbgym dataplane haproxy`` as a process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lbgym.cli import main
from lbgym.drivers import DriverError
from lbgym.drivers.haproxy import HaproxyOptions, open_backends
from lbgym.sharedmemory import region_names
from tests.drivers.haproxy.balancer import Balancer
from tests.drivers.proxies import command, hold_to_contract, small_disk

pytestmark = pytest.mark.haproxy

WEB = {"web": ["s1", "s2", "s3"]}


def test_held_to_the_contract_of_drivers(balancer: Balancer) -> None:
    balancer.configure(WEB, weights={"s1": 40, "s2": 20})
    balancer.start()
    name = f"haproxy-{os.getpid()}"
    line = (
        f"region {name}: backend web, 3 servers, weights by the runtime API, an observation every 0.05 s of "
        "n_flow_on, fct_mean, fct_p90, fct_std, fct_mean_decay, fct_p90_decay\n"
    )
    options = ["--socket", balancer.socket, "--log", balancer.log, "--publish-interval", "0.05"]
    with command("haproxy", "--backend", "web", "--name", name, *options) as process:
        safe = {"s1": 40, "s2": 20, "s3": 100}
        hold_to_contract(process, name, line, balancer.weights, balancer.flow, safe)


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


def test_a_socket_that_is_somebody_elses(balancer: Balancer) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root becomes somebody else")
    balancer.configure(WEB)
    balancer.start()
    os.chown(balancer.socket, 0, 0)
    script = (
        "import os, sys\n"
        "from lbgym.drivers import DriverError\n"
        "from lbgym.drivers.haproxy import Haproxy\n"
        "os.setuid(65534)\n"
        "try: Haproxy(sys.argv[1])\n"
        "except DriverError as error: print(error)\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", script, balancer.socket], stdout=subprocess.PIPE, text=True, check=True
    )
    wanted = f"no right to use HAProxy's socket {balancer.socket}: let this user in by its 'mode', 'user' or 'group'\n"
    assert said.stdout == wanted


def test_full_disk(balancer: Balancer) -> None:
    """A log socket needs an inode."""
    balancer.configure(WEB)
    balancer.start()
    with small_disk(balancer.folder / "full", "nr_inodes=1") as folder:
        options = HaproxyOptions(backends={"a": "web"}, socket=balancer.socket, log=str(folder / "log"))
        with pytest.raises(DriverError, match=r"cannot receive HAProxy's log at .*: No space left on device"):
            open_backends(options)
        assert balancer.weights() == {"s1": 100, "s2": 100, "s3": 100}
