"""Balance the load by hand: set weights from the keyboard and see the servers react.

    python examples/manual_control.py --scenario heterogeneous

Beside your mean flow completion time (FCT) stands that of equal weights on the same flows. Keys come from the
terminal; without one, from standard input, one step after each: ``printf '++++q' | python examples/manual_control.py``.
"""

from __future__ import annotations

import argparse
import os
import re
import select
import shutil
import signal
import sys
import termios
import time
import tty
from collections import deque
from types import TracebackType
from typing import Any

import numpy as np

import lbgym

HELP = "up/down server, left/right weight, e equal, space pause, s step, r reset, q quit"
ARROWS = {"\x1b[A": "up", "\x1b[B": "down", "\x1b[C": "+", "\x1b[D": "-"}
ARROWS |= {code.replace("[", "O"): key for code, key in ARROWS.items()}
FACTOR = 1.25
HEADING = 4  # lines of the rendered table above the first server


def split_keys(text: str) -> list[str]:
    """Single keys from what a terminal sent, in which an arrow is three characters."""
    return [ARROWS.get(key, key) for key in re.findall(r"\x1b[\[O][A-Z]|.|\n", text)]


class Terminal:
    """Keys in and frames out; on a terminal unbuffered and in place, and given back as it was found."""

    def __init__(self) -> None:
        self.interactive = sys.stdin.isatty()
        self.in_place = sys.stdout.isatty()
        self._script = deque([] if self.interactive else split_keys(sys.stdin.read()))

    def __enter__(self) -> Terminal:
        # A kill or a closed window must give the terminal back, too.
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda signum, _: sys.exit(128 + signum))
        if self.interactive:
            self._before = termios.tcgetattr(sys.stdin)
            tty.setcbreak(sys.stdin)
        if self.in_place:
            # Alternate screen, no cursor, no wrapping of long lines.
            sys.stdout.write("\x1b[?1049h\x1b[?25l\x1b[?7l")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.in_place:
            sys.stdout.write("\x1b[?7h\x1b[?25h\x1b[?1049l")
            sys.stdout.flush()
        if self.interactive:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self._before)

    def keys(self, timeout: float) -> list[str]:
        """Keys pressed within ``timeout`` seconds; of a script the next one, at its end the one that quits."""
        if not self.interactive:
            return [self._script.popleft() if self._script else "q"]
        ready, _, _ = select.select([sys.stdin], [], [], timeout)
        if not ready:
            return []
        text = os.read(sys.stdin.fileno(), 1024).decode(errors="ignore")
        return split_keys(text) if text else ["q"]

    def show(self, lines: list[str], selected: int) -> None:
        """One frame; a table too long for the screen is cut around the selected server."""
        head, rows, foot = lines[:HEADING], lines[HEADING:-3], lines[-3:]
        if not self.in_place:
            sys.stdout.write("\n".join([*head, *rows, *foot]) + "\n\n")
        else:
            room = max(1, shutil.get_terminal_size().lines - len(head) - len(foot))
            first = min(max(0, selected - room // 2), max(0, len(rows) - room))
            frame = [*head, *rows[first : first + room], *foot]
            sys.stdout.write("\x1b[H" + "\x1b[K\n".join(frame) + "\x1b[K\x1b[J")
        sys.stdout.flush()


class Game:
    """An environment under manual weights, and the same flows under equal ones."""

    def __init__(self, scenario: str, load: float | None, seed: int) -> None:
        make: dict[str, Any] = {"scenario": scenario, "action_type": "continuous", "max_steps": 1_000_000}
        self.env = lbgym.LoadBalanceEnv(**make, render_mode="ansi")
        self.equal = lbgym.LoadBalanceEnv(**make)
        self.actions: Any = self.env.action_space
        self.seed, self.options = seed, {} if load is None else {"load": load}
        self.selected = 0
        self.reset()

    def reset(self) -> None:
        for env in (self.env, self.equal):
            env.reset(seed=self.seed, options=self.options)
        self.steps = 0
        self.weights = np.ones(self.actions.shape, dtype=np.float32)
        self.flows, self.fct = np.zeros(2), np.zeros(2)

    def step(self) -> None:
        actions = (self.weights, np.ones_like(self.weights))
        for i, (env, action) in enumerate(zip((self.env, self.equal), actions, strict=True)):
            *_, info = env.step(action)
            flows = int(info["completed"]) + int(info["rejected"])
            self.flows[i] += flows
            self.fct[i] += flows * info["fct_mean"]
        self.steps += 1

    def press(self, key: str) -> None:
        """Keys that change the weights, the selection or begin again."""
        if key in ("up", "k", "down", "j"):
            self.selected = (self.selected + (1 if key in ("down", "j") else -1)) % len(self.weights)
        elif key.isdigit() and int(key) < len(self.weights):
            self.selected = int(key)
        elif key in ("+", "=", "-"):
            self.weights[self.selected] *= 1 / FACTOR if key == "-" else FACTOR
            self.weights = np.clip(self.weights, self.actions.low, self.actions.high)
        elif key == "e":
            self.weights[:] = 1
        elif key == "r":
            self.reset()

    def score(self) -> str:
        yours, equal = self.fct / np.maximum(self.flows, 1)
        return f"mean FCT so far: yours {yours:.3f} s, equal weights {equal:.3f} s"

    def lines(self, note: str) -> list[str]:
        """The environment's own table with the selected server marked, the score, the keys."""
        table = self.env.render().splitlines()
        row = HEADING + self.selected
        if row < len(table):
            table[row] = ">" + table[row][1:]
        weight = self.weights[self.selected]
        return [*table, "", f"server {self.selected}: weight {weight:.2f}   {self.score()}   {note}".rstrip(), HELP]


def play(game: Game, terminal: Terminal, pace: float) -> None:
    """Steps of the environment at ``pace`` per second until the key that quits."""
    paused = False
    due = time.monotonic()
    while True:
        keys = terminal.keys(3600.0 if paused else max(0.0, due - time.monotonic()))
        for key in keys:
            if key == "q":
                return
            if key == " ":
                paused = not paused
                due = time.monotonic()
            elif key == "s" and paused:
                game.step()
            else:
                game.press(key)
        if not paused and (not terminal.interactive or time.monotonic() >= due):
            game.step()
            due = max(due + 1 / pace, time.monotonic())
        terminal.show(game.lines("paused" if paused else ""), game.selected)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", default="heterogeneous", help="a named scenario or a TOML file")
    parser.add_argument("--load", type=float, help="offered work as a fraction of the cluster's capacity")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pace", type=float, default=4.0, help="steps per second; 4 is real time")
    options = parser.parse_args()
    if not options.pace > 0:
        parser.error(f"--pace must be above 0, got {options.pace}")

    game = Game(options.scenario, options.load, options.seed)
    try:
        with Terminal() as terminal:
            play(game, terminal, options.pace)
    except KeyboardInterrupt:
        return 130
    finally:
        print(f"{game.steps} steps, {game.score()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
