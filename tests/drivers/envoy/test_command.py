"""``lbgym dataplane envoy`` as a process."""

from __future__ import annotations

import os

import numpy as np
import pytest

from lbgym.cli import main
from lbgym.drivers import DriverError
from lbgym.drivers.envoy import EnvoyOptions, open_clusters
from lbgym.sharedmemory import region_names
from tests.drivers.envoy.balancer import Balancer
from tests.drivers.proxies import command, hold_to_contract, small_disk

pytestmark = pytest.mark.envoy

WEB = {"web": ["s1", "s2", "s3"]}


@pytest.mark.parametrize("source", ["file", "ads"])
def test_held_to_the_contract_of_drivers(balancer: Balancer, source: str) -> None:
    balancer.configure(WEB, weights={"s1": 40, "s2": 20}, source=source, log="grpc")
    balancer.start()
    name, port = f"envoy-{os.getpid()}", str(balancer.driver_port)
    way = "the EDS file" if source == "file" else f"xDS on port {port}"
    line = (
        f"region {name}: cluster web, 3 servers, weights by {way}, an observation every 0.05 s of "
        "n_flow_on, fct_mean, fct_p90, fct_std, fct_mean_decay, fct_p90_decay\n"
    )
    options = ["--admin", balancer.admin, "--access-log", port, "--publish-interval", "0.05"]
    file = str(balancer.file())
    options += ["--eds-file", file] if source == "file" else ["--xds-port", port, "--servers", file]
    with command("envoy", "--cluster", "web", "--name", name, *options) as process:
        # An operator's drain outlives the driver.
        safe = {"s1": 40, "s2": 0, "s3": 100}
        hold_to_contract(process, name, line, balancer.weights, balancer.flow, safe)
    if source == "file":
        assert "lbgym" not in balancer.file().read_text()


FILE = ["--cluster", "web", "--eds-file", "{file}"]
DRIVEN = ["--admin", "{admin}", *FILE]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--admin", "{admin}", "--cluster", "wbe", "--eds-file", "{file}"],
            "has no cluster 'wbe'; it has driv",
        ),
        (["--admin", "/nowhere/s", *FILE], "there is no socket /nowhere/s"),
        (
            ["--admin", "http://127.0.0.1:1", *FILE],
            "nobody answers at 127.0.0.1:1",
        ),
        (["--admin", "https://a:1", *FILE], "admin must be http://HOST:PORT"),
        ([*FILE], "give admin, Envoy's admin interface"),
        (["--admin", "{admin}", "--cluster", "web"], "give --eds-file, the file that Envoy watches"),
        (
            ["--admin", "{admin}", "--cluster", "web", "--xds-port", "0"],
            "with --xds-port give the servers",
        ),
        (["--admin", "{admin}", "--cluster", "web", "--xds-port", "0", "--servers", "{file}"], "xds_port must be"),
        ([*DRIVEN, "--access-log", "0"], "must be a TCP port or ADDRESS:PORT, got '0'"),
        (
            [*DRIVEN, "--access-log", "/nowhere/log"],
            "cannot read Envoy's access log /nowhere/log: No such file",
        ),
        (
            [*DRIVEN, "--publish-interval", "0"],
            "publish_interval must be",
        ),
        (["--admin", "{admin}", "--cluster", "web", "--eds-file", "a", "--eds-file", "b"], "give one file per cluster"),
    ],
)
def test_bad_input_is_one_sentence(
    envoy: Balancer, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = envoy.file().read_text()
    given = [argument.format(admin=envoy.admin, file=envoy.file()) for argument in arguments]
    with pytest.raises(SystemExit) as ended:
        main(["dataplane", "envoy", "--name", "none", *given])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
    assert envoy.weights() == {"s1": 100, "s2": 100, "s3": 100} and not list(region_names())
    assert "lbgym" not in envoy.file().read_text() and before.count("100") == envoy.file().read_text().count("100")


def test_full_disk(balancer: Balancer) -> None:
    """Of the EDS file, which stays as it is."""
    with small_disk(balancer.folder / "full", "size=16k") as folder:
        balancer.at = folder
        balancer.configure(WEB)
        balancer.start()
        options = EnvoyOptions(clusters={"a": "web"}, files={"web": str(balancer.file())}, admin=(balancer.admin,))
        (source,) = open_clusters(options).values()
        try:
            source.apply(np.array([1.0, 2.0, 3.0]), 0.1)
            before = balancer.file().read_text()
            with (folder / "big").open("wb", buffering=0) as big, pytest.raises(OSError, match="No space left"):
                while True:
                    big.write(bytes(100))
            with pytest.raises(DriverError, match=r"cannot write .*web.json: No space left on device"):
                source.apply(np.array([3.0, 2.0, 1.0]), 0.2)
            assert balancer.file().read_text() == before and balancer.weights() == {"s1": 1, "s2": 2, "s3": 3}
            (folder / "big").unlink()
            source.read(0.3)
            assert balancer.weights() == {"s1": 3, "s2": 2, "s3": 1}
        finally:
            source.close()
            balancer.kill()
