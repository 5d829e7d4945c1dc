"""The first lines of docs/envoy.md, from installed packages to a changed weight."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lbgym.lab.data_planes import find_envoy
from tests.drivers.proxies import eventually, fetch, free_ports, ten_lines

pytestmark = [pytest.mark.envoy, pytest.mark.slow]


def test_ten_lines_lead_to_a_changed_weight(tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed (make haproxy)")
    names = dict(zip(("8001", "8002", "8003", "8080", "9901", "18000"), map(str, free_ports(6)), strict=True))
    names["/tmp/envoy-web.json"] = str(tmp_path / "envoy-web.json")
    # Another Envoy of this machine may share memory for hot restarts.
    (tmp_path / "envoy").write_text(f'#!/bin/sh\nexec {find_envoy()} --disable-hot-restart --concurrency 1 "$@"\n')
    (tmp_path / "envoy").chmod(0o755)
    with ten_lines("envoy", tmp_path, ["envoy.yaml", "envoy-web.json"], names) as shown:
        assert "region web-ten: cluster web, 3 servers" in shown
        assert "envoy" in shown and "not measured" in shown and all(f"web-{i}" in shown for i in (1, 2, 3))

        def changed() -> bool:
            fetch(f"http://127.0.0.1:{names['8080']}/")
            return '"lbgym"' in Path(names["/tmp/envoy-web.json"]).read_text()

        eventually(changed)
