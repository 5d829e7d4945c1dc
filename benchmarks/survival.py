"""The longer soak: producers and agents of a region killed at random instants: ``python -m benchmarks.survival``.

The tests do the same a thousand times (``tests/sharedmemory/test_survival.py``). All processes are real, and so are the
kills (SIGKILL). After each, what is left in shared memory is checked: observations and actions are whole, the safe
weights come in force with the end of the lease, the next process starts at once. The first violation ends it with a
traceback.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable

from benchmarks.common import markdown, parser, report
from lbgym.sharedmemory.system import DIRECTORY_VARIABLE
from tests.sharedmemory.kills import kill_agents, kill_producers, step_through_kills
from tests.sharedmemory.nursery import Nursery

#: What is killed, how, and kills in one turn.
TURNS: dict[str, tuple[Callable[[Nursery, int, int], Counter[str]], int]] = {
    "producers at full speed": (kill_producers, 200),
    "agents at full speed": (kill_agents, 200),
    "producers of an agent that steps": (step_through_kills, 20),
}


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--kills", type=int, default=10_000, help="kills in all, at least")
    options.add_argument("--minutes", type=float, default=0.0, help="go on for so long, at least")
    options.add_argument("--seed", type=int, default=0, help="of the instants")
    arguments = options.parse_args()
    kills = 100 if arguments.quick else arguments.kills
    tallies: dict[str, Counter[str]] = {name: Counter() for name in TURNS}
    logging.getLogger("lbgym").setLevel(logging.ERROR)
    nursery, began, turn = Nursery(), time.monotonic(), 0
    while True:
        passed = time.monotonic() - began
        left = kills - sum(tally["kills"] for tally in tallies.values())
        if left <= 0 and passed >= 60.0 * arguments.minutes:
            break
        for name, (kill, most) in TURNS.items():
            folder = tempfile.mkdtemp(prefix="lbgym-survival-", dir="/dev/shm")
            os.environ[DIRECTORY_VARIABLE] = folder
            try:
                count = max(5, min(most, left // 2)) if arguments.quick else most
                tallies[name].update(kill(nursery, count, arguments.seed + turn))
            finally:
                shutil.rmtree(folder)
        turn += 1
    nursery.close()
    header = ("killed", "kills", "of them while writing", "before the first observation", "whole reads", "whole steps",
              "restarts followed", "timeouts, with their reason")  # fmt: skip
    keys = ("kills", "half_written", "unpublished", "reads", "steps", "restarts_followed", "timeouts")
    rows = [[name, *[tally.get(key) for key in keys]] for name, tally in tallies.items()]
    total = sum(tally["kills"] for tally in tallies.values())
    text = markdown([[cell if cell is not None else "" for cell in row] for row in rows], header)
    text += f"\n\n{total:,} kills in {(time.monotonic() - began) / 60.0:.1f} minutes; nothing torn, nothing blocked."
    report("survival", arguments, text, {"kills": total, "seed": arguments.seed, "tallies": tallies})


if __name__ == "__main__":
    main()
