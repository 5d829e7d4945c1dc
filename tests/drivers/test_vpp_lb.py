"""What the driver of VPP's stock load balancer refuses before it has found a VPP; the rest needs one: tests/vpp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbgym.drivers.config import load_config
from lbgym.drivers.proxy.weights import whole_weights
from lbgym.drivers.vpp_lb import MAX_WEIGHT, VppLb, VppLbOptions
from lbgym.errors import InvalidOptionError, UnknownNameError
from tests.vpp.vpp import vpp_lb_toml


@pytest.mark.parametrize(
    ("driver", "error", "message"),
    [
        ({}, InvalidOptionError, "'vip' is missing"),
        ({"vip": "10.0.0.1/8"}, InvalidOptionError, "vip must be a prefix such as 10.0.0.100/32, got '10.0.0.1/8'"),
        ({"vip": "10.0.0.1", "port": 0}, InvalidOptionError, "port must be"),
        ({"vip": "10.0.0.1", "port": 65_536}, InvalidOptionError, "port must be"),
        ({"vip": "10.0.0.1", "protocol": "sctp"}, UnknownNameError, "sctp"),
        ({"vip": "10.0.0.1", "sockets": "/x"}, UnknownNameError, "sockets"),
        ({"vip": "10.0.0.1", "api_files": "/nowhere"}, InvalidOptionError, r"no \*.api.json in api_files, '/nowhere'"),
    ],
)
def test_bad_options_are_refused(driver: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    pytest.importorskip("vpp_papi")
    file = tmp_path / "dataplane.toml"
    vpp_lb_toml(file, "lb", ["server-0"], driver)
    with pytest.raises(error, match=message):
        VppLb(load_config(file), file)


def test_servers_need_an_agent_that_counts_and_an_address(tmp_path: Path) -> None:
    file = tmp_path / "dataplane.toml"
    vpp_lb_toml(file, "lb", ["server-0"], {"vip": "10.0.0.1"})
    text = file.read_text()
    for before, after, message in [
        ("ground_truth", "# ", "server 'server-0' needs ground_truth, as VPP's lb counts no flows by server"),
        ("10.77.2.1", "example.org", "address of server 'server-0' must be an IP address, got 'example.org'"),
    ]:
        file.write_text(text.replace(before, after))
        with pytest.raises(InvalidOptionError, match=message):
            VppLb(load_config(file), file)


def test_a_vip_is_named_as_vpp_names_it() -> None:
    assert VppLbOptions(vip="10.0.0.1").key == {"pfx": "10.0.0.1/32", "protocol": 255, "port": 0}
    assert VppLbOptions(vip="fd00::1/128", port=53, protocol="udp").key == {
        "pfx": "fd00::1/128", "protocol": 17, "port": 53,
    }  # fmt: skip


@given(st.lists(st.floats(0.0, 1e6), min_size=1, max_size=20))
def test_weights_become_whole_numbers_up_to_100(weights: list[float]) -> None:
    exact = np.array(weights)
    whole = whole_weights(exact, MAX_WEIGHT)
    assert ((whole >= 0) & (whole <= MAX_WEIGHT)).all() and ((whole == 0) == (exact == 0.0)).all()
    if exact.any() and not (exact == np.round(exact)).all():
        share = exact / exact.max()
        large = share >= 0.1
        # As docs/vpp.md says: off by at most 5 % at a tenth of the greatest.
        error = np.abs(whole[large] / whole.max() / share[large] - 1.0)
        assert (error <= 0.5 / (MAX_WEIGHT // 2 + 1) / share[large] + 1e-9).all()
