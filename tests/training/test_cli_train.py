"""``lbgym train`` on the command line."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("typer")

from lbgym.policies import load_policy
from lbgym.training import read_checkpoint
from tests.forked import Template

SHORT = ("--num-envs", "6", "--scenario", "uniform", "--no-tensorboard")


def in_process(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    from lbgym.cli import main

    with pytest.raises(SystemExit) as exit_:
        main(["train", *map(str, arguments)])
    captured = capsys.readouterr()
    assert isinstance(exit_.value.code, int | None)
    return exit_.value.code or 0, captured.out, captured.err


def result_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    code, out, _ = in_process(capsys, *arguments, "--json")
    assert code == 0
    result = json.loads(out)
    assert isinstance(result, dict)
    return result


def test_training_says_where_the_checkpoint_is(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "agent.pt"
    code, out, err = in_process(capsys, *SHORT, "--steps", 200, "--reward", "mean_fct", "--seed", 3, "--out", path)
    assert code == 0, err
    assert f"checkpoint: {path}" in out.replace("\n", "")
    saved = read_checkpoint(path)
    assert saved["config"]["reward_type"] == "mean_fct"
    assert saved["config"]["seed"] == 3
    assert saved["step"] >= 200


def test_json_and_resume(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    first = result_of(capsys, *SHORT, "--steps", 200, "--out", tmp_path)
    assert first["checkpoint"] == str(tmp_path / "ppo.pt")
    assert first["interrupted"] is False
    assert first["steps"] >= 200
    assert first["fct_mean"] > 0
    second = result_of(capsys, "--resume", tmp_path / "ppo.pt", "--steps", 400, "--no-tensorboard")
    assert second["checkpoint"] == first["checkpoint"]
    assert 400 <= second["steps"] < 600
    assert read_checkpoint(tmp_path / "ppo.pt")["config"]["scenario"] == "uniform"


def test_a_budget_that_is_used_up_is_said_to_be(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "agent.pt"
    for trained in ("steps/s", "nothing was trained: --steps and --seconds count what was trained before"):
        again = ("--resume", path, "--no-tensorboard") if path.exists() else (*SHORT, "--out", path)
        code, out, _ = in_process(capsys, *again, "--steps", 200)
        assert code == 0 and trained in out


@pytest.mark.parametrize("name", ["agent.zip", "notes.txt"])
def test_a_checkpoint_takes_the_place_of_no_other_file(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    code, _, err = in_process(capsys, *SHORT, "--steps", 200, "--out", tmp_path / name)
    assert code == 2 and f"a checkpoint of this recipe ends in .pt, got '{tmp_path / name}'" in err
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_stable_baselines3(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("stable_baselines3")
    arguments = (*SHORT, "--algo", "sb3-ppo", "--steps", 400, "--action-type", "discrete")
    result = result_of(capsys, *arguments, "--out", tmp_path)
    assert result["checkpoint"] == str(tmp_path / "sb3-ppo.zip")
    assert load_policy(tmp_path / "sb3-ppo.zip").env_kwargs["action_type"] == "discrete"


def test_a_file_has_the_settings_and_options_go_over_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "agent.toml"
    file.write_text('algo = "sac-gru"\nscenario = "uniform"\nseconds = 100\nnum_envs = 4\nwarmup = 1\nhidden = 16\n')
    arguments = ("--config", file, "--steps", 64, "--set", "sequence_length=4", "--set", "burn_in=2")
    code, printed, _ = in_process(capsys, *arguments, "--set", 'dispatch="wcmp"', "--print-config")
    assert code == 0
    told = tomllib.loads(printed)
    assert told.items() >= {"algo": "sac-gru", "hidden": 16, "sequence_length": 4, "total_steps": 64}.items()
    assert told["dispatch"] == "wcmp"
    # a budget on the command line is all of it
    assert "seconds" not in told
    result = result_of(capsys, *arguments, "--no-tensorboard", "--out", tmp_path)
    assert result["checkpoint"] == str(tmp_path / "sac-gru.pt")
    # what was printed is a configuration of the same training, and --resume knows the recipe
    (tmp_path / "printed.toml").write_text(printed)
    again = ("--config", tmp_path / "printed.toml", "--resume", tmp_path / "sac-gru.pt", "--steps", 128)
    assert result_of(capsys, *again, "--no-tensorboard")["steps"] >= 128


def test_every_limit_of_the_command_line_holds(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tomli_w")
    for arguments in (("--seconds", 5, "--set", "total_steps=1000"), ("--steps", 1000, "--set", "seconds=5")):
        code, printed, _ = in_process(capsys, *arguments, "--print-config")
        assert code == 0
        told = tomllib.loads(printed)
        assert (told["seconds"], told["total_steps"]) == (5, 1000)


def test_the_result_is_compared(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("rich")
    code, out, _ = in_process(capsys, *SHORT, "--steps", 64, "--out", tmp_path, "--evaluate", 2)
    assert code == 0
    assert re.search(r"\becmp\b.*\blsq\b.*\bsed\b.*\bppo\b", out, flags=re.DOTALL)
    # with --json in the same document
    result = result_of(capsys, *SHORT, "--steps", 64, "--out", tmp_path, "--evaluate", 1)
    assert result["checkpoint"] == str(tmp_path / "ppo.pt")
    assert [one["label"] for one in result["comparison"]["contenders"]] == ["ecmp", "lsq", "sed", "ppo"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--algo", "poo"), "unknown recipe 'poo'. Did you mean 'ppo'?"),
        (("--set", "gamma"), "--set takes KEY=VALUE, got 'gamma'"),
        (("--set", "gama=1"), "unknown setting 'gama' in the options. Did you mean 'gamma'?"),
        (("--set", "gamma=high"), "gamma in the options must be of type float, got 'high'"),
        (("--set", "gamma=7.5"), "PPOConfig.gamma must be a finite number from 0 to 1, got 7.5"),
        (("--set", "learning_rate=nan"), "PPOConfig.learning_rate must be a finite number of at least 0, got nan"),
        (("--set", "env_kwargs={foo=1}"), "unknown key 'foo' in PPOConfig.env_kwargs"),
        (("--set", "total_steps=50"), "give --steps or --set total_steps, not both; got 100 and 50"),
        (("--reward", "jain", "--set", "reward_type=max"), "give --reward or --set reward_type, not both; got 'jain'"),
        (("--network", "mlp"), "ppo has one network; only the sb3-, rllib- and benchmarl- recipes"),
        (("--policy", "mlp"), "--policy is now --network"),
        (("--config", "none.toml"), "there is no configuration file none.toml"),
        (("--address", "10.0.0.1:6379"), "--address 10.0.0.1:6379 needs --backend ray"),
        (("--scenario", "heterogenous"), "Did you mean 'heterogeneous'?"),
        (("--reward", "jane"), "Did you mean 'jain'?"),
        (("--resume", "none.pt"), "none.pt does not exist"),
        (("--action-type", "continuous"), 'use action_type="normalized"'),
    ],
)
def test_what_the_user_can_put_right(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, _, err = in_process(capsys, "--steps", 100, "--num-envs", 4, "--out", tmp_path, *arguments)
    assert code == 2
    assert message in err.replace("\n", " ")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_saves_the_checkpoint(number: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lbgym", "train", *SHORT, "--seconds", "1000", "--out", str(tmp_path)]
    # the bar moves only on a terminal
    here, there = pty.openpty()
    environment = os.environ | {"COLUMNS": "120", "TERM": "xterm"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=there, text=True, env=environment)
    os.close(there)
    seen = ""
    try:
        deadline = time.monotonic() + 120
        while "steps/s" not in seen and time.monotonic() < deadline:
            if select.select([here], [], [], 1.0)[0]:
                seen += os.read(here, 4096).decode(errors="replace")
        assert "steps/s" in seen, seen
        process.send_signal(number)
        # what the bar still writes must not fill the terminal's buffer
        while process.poll() is None and time.monotonic() < deadline:
            if select.select([here], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):
                    seen += os.read(here, 4096).decode(errors="replace")
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        os.close(here)
    assert process.returncode == 128 + number, seen
    assert "Traceback" not in seen
    assert [p.name for p in tmp_path.iterdir()] == ["ppo.pt"]
    assert read_checkpoint(tmp_path / "ppo.pt")["step"] > 0
    assert str(tmp_path / "ppo.pt") in out.replace("\n", "")


#: Runs with a limit on the size of files, which the system enforces as it does a full disk. What is compiled must not
#: be written, or the limit would be met there.
_NO_SPACE = """
import resource, sys
from lbgym.cli import main
sys.dont_write_bytecode = True
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
main(sys.argv[1:])
"""


def test_a_full_disk_is_one_line_and_keeps_the_older_checkpoint(tmp_path: Path, python: Template) -> None:
    out = tmp_path / "ppo.pt"
    out.write_bytes(b"older")
    arguments = ["train", *SHORT, "--steps", "64", "--out", str(out)]
    done = python.run(["-c", _NO_SPACE, *arguments])
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("lbgym: error: cannot write") and str(out) in last and "File too large" in last
    assert "Traceback" not in done.stderr
    assert out.read_bytes() == b"older" and [path.name for path in tmp_path.iterdir()] == ["ppo.pt"]


def test_an_empty_checkpoint_is_said_to_be_empty(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from lbgym.cli import main

    empty = tmp_path / "agent.pt"
    empty.touch()
    code, _, err = in_process(capsys, "--resume", empty, "--steps", 64, "--no-tensorboard")
    assert code == 2 and err == f"lbgym: error: checkpoint {empty} is empty: whatever wrote it did not finish\n"
    with pytest.raises(SystemExit) as end:
        main(["compare", "--scenario", "uniform", "--policies", f"lsq,{empty}", "--seeds", "2"])
    assert end.value.code == 2 and "is empty: whatever wrote it did not finish" in capsys.readouterr().err
