"""Metrics of regions, and the alerts and pictures that are made of them."""

from __future__ import annotations

import http.client
import json
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from lbgym.monitor import RegionMonitor
from lbgym.report import Dashboard
from lbgym.report.metrics import CONTENT_TYPE, exposition
from tests.privileges import skip_if
from tests.producers import Producer

pytest.importorskip("prometheus_client")

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"


def samples(text: bytes) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """As Prometheus' own parser reads it."""
    from prometheus_client.parser import text_string_to_metric_families

    found = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found
            found[key] = sample.value
    return found


def test_metrics_are_what_the_data_plane_has_published(shm_dir: Path) -> None:
    with Producer("lb0") as producer, RegionMonitor("lb0") as monitor:
        published = producer.publish(2)[-1].snapshot
        monitor.look()
        found = samples(exposition([monitor.view()]))
        assert found["lbgym_region_producer_up", frozenset({("region", "lb0")})] == 1.0
        assert found["lbgym_region_agent_up", frozenset({("region", "lb0")})] == 0.0
        for j in range(8):
            labels = frozenset({("region", "lb0"), ("server", str(j))})
            assert found["lbgym_region_server_completed_flows_total", labels] == published.completed[j]
            assert found["lbgym_region_server_open_flows", labels] == published.stats[j, 0]
            assert found["lbgym_region_server_active", labels] == published.active[j]
        producer.kill()
        found = samples(exposition([monitor.view()]))
        assert found["lbgym_region_producer_up", frozenset({("region", "lb0")})] == 0.0
        assert not [name for name, _ in found if name.startswith("lbgym_region_server")]


def test_the_dashboard_serves_them(shm_dir: Path) -> None:
    with Producer("lb0") as producer, Dashboard(["lb0"], port=0, rate=20) as page:
        producer.run(0.05)
        port = int(page.url.rstrip("/").rsplit(":", 1)[1])
        found: dict[Any, float] = {}
        while ("lbgym_region_producer_up", frozenset({("region", "lb0")})) not in found:
            with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
                connection.request("GET", "/metrics")
                answer = connection.getresponse()
                assert answer.status == 200 and answer.headers["Content-Type"] == CONTENT_TYPE
                found = samples(answer.read())


def known(shm_dir: Path) -> set[str]:
    """Names of all metrics, with the endings that their samples have."""
    files = ("src/lbgym/controller/metrics.py", "src/lbgym/drivers/metrics.py")
    agent = {name for file in files for name in re.findall(r'"(lbgym_\w+)"', (ROOT / file).read_text())}
    with Producer("lb0") as producer, RegionMonitor("lb0") as monitor:
        producer.publish(1)
        monitor.look()
        regions = {name for name, _ in samples(exposition([monitor.view()]))}
    return agent | {f"{name}{end}" for name in agent for end in ("_total", "_bucket")} | regions


def test_alerts_and_pictures_are_of_metrics_that_there_are(shm_dir: Path) -> None:
    alerts = (DEPLOY / "prometheus" / "alerts.yml").read_text()
    dashboard = json.loads((DEPLOY / "grafana" / "lbgym.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    used = set(
        re.findall(r"\blbgym_\w+", " ".join([*re.findall(r"expr: (?:>-\n)?((?:.*\n)+?) +for:", alerts), *queries]))
    )
    assert len(used) > 20 and used <= known(shm_dir)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_promtool_accepts_and_tests_the_alerts() -> None:
    promtool = shutil.which("promtool", path=os.pathsep.join([os.environ["PATH"], str(ROOT / "build")]))
    if promtool is None:
        skip_if("no promtool: make promtool", "promtool")
    for arguments in ("check config prometheus.yml", "check rules alerts.yml", "test rules alerts_test.yml"):
        done = subprocess.run([promtool, *arguments.split()], cwd=DEPLOY / "prometheus", capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_containers_run_commands_that_there_are() -> None:
    yaml = pytest.importorskip("yaml")
    typer = pytest.importorskip("typer")
    from lbgym.cli import _app

    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    entry = re.search(r"^ENTRYPOINT (\[.*\])$", (DEPLOY / "Containerfile").read_text(), re.MULTILINE)
    assert entry is not None
    services, given = compose["services"], {}
    for name in ("emulator", "agent", "regions"):
        service = services[name]
        program, *words = service.get("entrypoint", json.loads(entry[1]))
        assert program == "lbgym"
        words += service.get("command", [])
        command = typer.main.get_command(_app())
        while hasattr(command, "commands"):
            word, *words = words
            command = command.commands[word]
        given[name] = command.make_context("lbgym", words).params
    assert given["agent"]["shm"] == given["emulator"]["name"] and given["regions"]["host"] == "0.0.0.0"
    targets = re.findall(r'targets: \["(\w+):(\d+)"\]', compose["configs"]["prometheus"]["content"])
    assert targets == [("agent", "9464"), ("regions", "8080")] and {name for name, _ in targets} <= services.keys()
    for volume in services["grafana"]["volumes"]:
        assert (DEPLOY / shlex.split(volume.split(":")[0])[0]).exists()


def test_the_parts_of_the_compose_file_fit_together() -> None:
    yaml = pytest.importorskip("yaml")
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    services = compose["services"]
    images = {name: service["image"] for name, service in services.items()}
    assert set(images.values()) == {"lbgym-run", "prom/prometheus", "grafana/grafana"}
    # What is of this repository is built once, and all of it shares memory in one place.
    (build,) = (service["build"] for service in services.values() if "build" in service)
    assert (DEPLOY / build["context"] / build["dockerfile"]).samefile(DEPLOY / "Containerfile")
    assert (
        set(build["args"]["EXTRAS"].split(",")) <= extras() and "ARG EXTRAS=" in (DEPLOY / "Containerfile").read_text()
    )
    for name, service in services.items():
        assert set(service.get("depends_on", ())) <= services.keys() - {name}
        assert {config["source"] for config in service.get("configs", ())} <= compose["configs"].keys()
        named = {volume.split(":")[0] for volume in service.get("volumes", ()) if not volume.startswith(".")}
        assert named <= compose["volumes"].keys()
        if service["image"] == "lbgym-run":
            (volume,) = service["volumes"]
            assert volume == f"shm:{service['environment']['LBGYM_SHM_DIR']}"
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
    assert (DEPLOY / compose["configs"]["alerts"]["file"]).is_file()
    inside = yaml.safe_load(compose["configs"]["prometheus"]["content"])
    outside = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    for config in (inside, outside):
        for job in config["scrape_configs"]:
            del job["static_configs"]
    assert inside == outside
    (source,) = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/lbgym.yml").read_text())["providers"]
    mounted = [volume.split(":")[1] for volume in services["grafana"]["volumes"]]
    assert any(path.startswith(provider["options"]["path"] + "/") for path in mounted)


def extras() -> set[str]:
    return set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
