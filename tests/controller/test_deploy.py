"""The files of deploy/ agree with the code."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from lbgym.controller import ControllerConfig, config_from
from lbgym.controller.config import KEYS, read_keys

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
UNIT = "lbgym-run@.service"


def options_of_run() -> set[str]:
    typer = pytest.importorskip("typer")
    from lbgym.cli import _app

    (run,) = [c for name, c in typer.main.get_command(_app()).commands.items() if name == "run"]
    return {option for parameter in run.params for option in (*parameter.opts, *parameter.secondary_opts)}


def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[method-assign, assignment]
    parser.read_string((DEPLOY / UNIT).read_text())
    return parser


def assert_runs(command: list[str]) -> None:
    """It is ``lbgym run`` with options that exist."""
    program, subcommand, *rest = command
    assert Path(program).name == "lbgym" and subcommand == "run"
    given = [word for word in rest if word.startswith("-")]
    assert given and set(given) <= options_of_run()


def test_every_key_is_an_option() -> None:
    assert {f"--{key.replace('_', '-')}" for key in KEYS} | {"--config"} <= options_of_run()


def test_the_example_has_every_key_with_its_default() -> None:
    path = DEPLOY / "controller.toml"
    known = read_keys(path)
    assert config_from({}, path) == ControllerConfig(policy=known["policy"], shm=known["shm"])
    without = {key for key, field in KEYS.items() if field.default is None}
    assert known.keys() == KEYS.keys() - without
    text = path.read_text()
    commented = tomllib.loads("\n".join(re.findall(r"^# (\w+ = .*)$", text, re.MULTILINE)))
    assert commented.keys() == without
    ControllerConfig(**(known | commented))
    assert max(map(len, text.splitlines())) <= 120


def test_the_unit() -> None:
    parser = unit()
    service = parser["Service"]
    assert service["Type"] == "notify" and service["Restart"] == "always"
    assert_runs(shlex.split(service["ExecStart"]))
    # The watchdog hears of every step and of every timeout.
    config = ControllerConfig(policy="uniform", shm="lb0")
    assert float(service["WatchdogSec"]) > 2 * (config.timeout + 0.25)
    for key in ("NoNewPrivileges", "ProtectHome", "PrivateDevices"):
        assert service[key] == "yes"
    assert service["ProtectSystem"] == "strict" and "MemoryDenyWriteExecute" not in service
    assert {"AF_UNIX", "AF_INET", "AF_INET6"} <= set(service["RestrictAddressFamilies"].split())


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_has_nothing_against_the_unit(tmp_path: Path) -> None:
    command = unit()["Service"]["ExecStart"].split()[0]
    (tmp_path / UNIT).write_text((DEPLOY / UNIT).read_text().replace(command, sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", str(tmp_path / UNIT)], capture_output=True, text=True)
    # It also complains about units of the machine that it runs on.
    complaints = [line for line in done.stderr.splitlines() if UNIT.split("@")[0] in line]
    assert complaints == []


def test_the_containerfile() -> None:
    text = (DEPLOY / "Containerfile").read_text()
    extras = re.search(r"^ARG EXTRAS=(\S+)$", text, re.MULTILINE)
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras is not None and set(extras[1].split(",")) <= known.keys() and "run" in extras[1].split(",")
    entry = re.search(r"^ENTRYPOINT (\[.*\])$", text, re.MULTILINE)
    assert entry is not None
    command = json.loads(entry[1])
    assert_runs(command)
    port = command[command.index("--metrics-port") + 1]
    assert f"EXPOSE {port}" in text and f":{port}/metrics" in text
    assert re.search(r"^USER (?!root)", text, re.MULTILINE) and re.search(r"^HEALTHCHECK ", text, re.MULTILINE)
    copied = re.search(r"^COPY (.*) \S+$", text, re.MULTILINE)
    assert copied is not None and (ROOT / copied[1].split()[0]).is_file()


def test_the_readme_leads_somewhere_and_names_what_there_is() -> None:
    text = (DEPLOY / "README.md").read_text()
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert (DEPLOY / target).is_file()
    metrics = "".join((ROOT / f"src/lbgym/{room}/metrics.py").read_text() for room in ("controller", "drivers"))
    for name in re.findall(r"`(lbgym_\w+)`", text):
        assert name.removesuffix("_total") in metrics
