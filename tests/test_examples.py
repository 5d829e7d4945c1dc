"""Every example runs; the one for the keyboard runs on a real (pseudo) terminal and gives it back."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.forked import Template

EXAMPLES = Path(__file__).parents[1] / "examples"
TIMEOUT = 180.0

#: The arguments, if any, that make a run short.
SHORT = {
    "live_training.py": ["--steps", "600"],
    "random_policy.py": [],
    "multi_agent.py": [],
    "manual_control.py": ["--scenario", "uniform"],
    "train_benchmarl.py": ["--seconds", "1", "--seeds", "2"],
    "train_ppo.py": ["--seconds", "1"],
    "train_rllib.py": ["--seconds", "1", "--seeds", "2"],
    "train_sb3.py": ["--seconds", "1", "--seeds", "2"],
    "train_sac_gru.py": ["--seconds", "1", "--seeds", "2"],
}
#: Modules an example needs beyond the core.
NEEDS = {
    "live_training.py": ("stable_baselines3", "typer"),
    "multi_agent.py": ("pettingzoo",),
    "train_benchmarl.py": ("benchmarl", "rich", "scipy"),
    "train_ppo.py": ("torch", "rich", "scipy"),
    "train_rllib.py": ("ray", "rich", "scipy"),
    "train_sb3.py": ("stable_baselines3", "rich", "scipy"),
    "train_sac_gru.py": ("torch", "rich", "scipy"),
}


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error", "TERM": "xterm"}


def run(python: Template, name: str, *arguments: str, cwd: Path, keys: str = "") -> str:
    command = [EXAMPLES / name, *arguments]
    # On one core a comparison needs no other processes, each of which would import torch.
    cores = None if name == "train_ppo.py" else 1
    done = python.run(command, input=keys, cwd=cwd, env=environment(), cores=cores, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_run() -> None:
    assert SHORT.keys() == {path.name for path in EXAMPLES.glob("*.py")}


@pytest.mark.parametrize("name", sorted(SHORT.keys() - {"live_training.py"}))
def test_runs(name: str, tmp_path: Path, python: Template) -> None:
    for module in NEEDS.get(name, ()):
        pytest.importorskip(module)
    assert run(python, name, *SHORT[name], cwd=tmp_path).strip()


def test_live_training_counts_every_missed_deadline(tmp_path: Path, python: Template) -> None:
    """PPO on the emulator at twenty times real time: steps and missed deadlines are all the time there was."""
    for module in NEEDS["live_training.py"]:
        pytest.importorskip(module)
    said = run(python, "live_training.py", *SHORT["live_training.py"], cwd=tmp_path).replace(",", "")
    steps, intervals = map(int, re.findall(r"(\d+) steps in (\d+) intervals", said)[0])
    (missed,) = map(int, re.findall(r"(\d+) deadlines missed", said))
    assert steps >= 599
    # The updates between rollouts of 256 steps take longer than 12.5 ms.
    assert missed > 0
    assert abs(intervals - steps - missed) <= 1


def table_row(frame: str, server: int) -> list[str]:
    line = next(line for line in frame.splitlines() if re.match(rf"[> ] +{server} ", line))
    return re.sub(r"[█▏▎▍▌▋▊▉>]", " ", line).split()


def test_weights_by_script_move_flows(tmp_path: Path, python: Template) -> None:
    keys = "0" + "-" * 12 + "2" + "+" * 12 + "." * 40
    output = run(python, "manual_control.py", "--scenario", "uniform", cwd=tmp_path, keys=keys)
    frames = output.split("\n\nserver ")
    assert len(frames) > len(keys)
    last = frames[-2]
    assert float(table_row(last, 0)[1]) == pytest.approx(0.1, abs=0.01)
    assert float(table_row(last, 2)[1]) == pytest.approx(10.0, abs=0.1)
    # Open flows: a weight a hundred times as large draws them.
    assert float(table_row(last, 2)[2]) > float(table_row(last, 0)[2])
    assert re.search(r"\d+ steps, mean FCT so far: yours [\d.]+ s, equal weights [\d.]+ s$", output.strip())


class Screen:
    """A terminal with a program on it."""

    def __init__(self, *arguments: str) -> None:
        self.master, self.slave = pty.openpty()
        termios.tcsetwinsize(self.slave, (30, 120))
        self.before = termios.tcgetattr(self.slave)
        self.text = ""
        self.process = subprocess.Popen(
            [sys.executable, str(EXAMPLES / "manual_control.py"), *arguments],
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            env=environment(),
            start_new_session=True,
            preexec_fn=self._own_terminal,
        )

    @staticmethod
    def _own_terminal() -> None:
        """Make the terminal the controlling one, so that Ctrl-C typed on it is a signal."""
        os.close(os.open(os.ttyname(0), os.O_RDWR))
        # A shell's jobs in the background ignore it, and so would whatever they start.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def press(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def wait_for(self, pattern: str) -> str:
        """Read on until what came since the last call matches."""
        seen = ""
        deadline = time.monotonic() + TIMEOUT
        while not re.search(pattern, seen):
            assert time.monotonic() < deadline, f"no {pattern!r} in:\n{self.text[-4000:]}"
            if select.select([self.master], [], [], 0.2)[0]:
                part = os.read(self.master, 65536).decode(errors="replace")
                seen += part
                self.text += part
            else:
                assert self.process.poll() is None, self.text[-4000:]
        return seen

    def finish(self) -> int:
        deadline = time.monotonic() + TIMEOUT
        while self.process.poll() is None and time.monotonic() < deadline:
            if select.select([self.master], [], [], 0.1)[0]:
                self.text += os.read(self.master, 65536).decode(errors="replace")
        while select.select([self.master], [], [], 0.1)[0]:
            self.text += os.read(self.master, 65536).decode(errors="replace")
        return self.process.wait(1)

    def is_as_before(self) -> bool:
        """Line discipline restored, cursor shown, wrapping on, main screen back."""
        after = self.text[self.text.rindex("\x1b[?1049l") :]
        restored = "\x1b[?25h" in self.text and "\x1b[?7h" in self.text and "\x1b[?1049h" not in after
        return restored and termios.tcgetattr(self.slave) == self.before

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def screen() -> Iterator[Screen]:
    opened = Screen("--scenario", "uniform", "--pace", "50")
    yield opened
    opened.close()


def test_manual_control_on_a_terminal(screen: Screen) -> None:
    screen.wait_for(r"server 0: weight 1\.00")
    screen.press("\x1b[B+")
    screen.wait_for(r"server 1: weight 1\.25")
    screen.press("\x1b[D\x1b[D")
    screen.wait_for(r"server 1: weight 0\.80")
    screen.press("e")
    screen.wait_for(r"server 1: weight 1\.00")
    screen.press(" ")
    step = re.findall(r"step (\d+)", screen.wait_for("paused"))[-1]
    screen.press("s")
    assert re.findall(r"step (\d+)", screen.wait_for(rf"step (?!{step}\b)\d+"))[-1] == str(int(step) + 1)
    screen.press("r")
    screen.wait_for(r"step 0\b")
    screen.press("q")
    assert screen.finish() == 0
    assert screen.is_as_before()
    assert re.search(r"\d+ steps, mean FCT so far", screen.text)


def test_ctrl_c_gives_the_terminal_back(screen: Screen) -> None:
    screen.wait_for(r"server 0: weight")
    screen.press("\x03")
    assert screen.finish() == 130
    assert screen.is_as_before()
    assert "Traceback" not in screen.text


def test_termination_gives_the_terminal_back(screen: Screen) -> None:
    screen.wait_for(r"server 0: weight")
    screen.process.send_signal(signal.SIGTERM)
    assert screen.finish() == 128 + signal.SIGTERM
    assert screen.is_as_before()
