"""What a newcomer waits for: importing, compiling once, and starting again: ``python -m benchmarks.first_run``.

Every start is a new process that makes the default environment, resets it and takes one step. The first one finds an
empty cache of compiled code.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from statistics import median

from benchmarks.common import markdown, parser, report

START = """
import json, sys, time
begin = time.perf_counter()
import gymnasium, numpy
neighbours = time.perf_counter()
import lbgym
imported = time.perf_counter()
env = gymnasium.make("lbgym/LoadBalance-v0")
env.reset(seed=1)
env.step(env.action_space.sample())
ready = time.perf_counter()
print(json.dumps({"import NumPy and Gymnasium": neighbours - begin, "import lbgym after them": imported - neighbours,
                  "make, reset, first step": ready - imported}))
"""


def start(cache: str) -> tuple[dict[str, float], str]:
    """Seconds of each stage in a new process, and what it wrote to stderr."""
    environment = os.environ | {"NUMBA_CACHE_DIR": cache}
    done = subprocess.run([sys.executable, "-c", START], env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout), done.stderr


def main(argv: Sequence[str] | None = None) -> int:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--starts", type=int, default=5, help="starts after the first")
    arguments = options.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="lbgym-first-run-") as cache:
        first, message = start(cache)
        later = [start(cache)[0] for _ in range(1 if arguments.quick else arguments.starts)]
    usual = {stage: median(each[stage] for each in later) for stage in first}
    rows = [(stage, first[stage], usual[stage]) for stage in first]
    text = markdown(rows, ("seconds", "first start", f"later, median of {len(later)}"))
    targets = [
        ("first start: until the first step is done, s", 30.0, sum(first.values())),
        ("later start: until the first step is done, s", 3.0, sum(usual.values())),
        ("import lbgym after NumPy and Gymnasium, s", 0.1, usual["import lbgym after them"]),
    ]
    said = "compil" in message
    text += "\n\n" + markdown(
        [*[(n, w, m, m <= w) for n, w, m in targets], ("first start: says that it compiles", "", "", said)],
        ("target", "at most", "measured", "reached"),
    )
    text += f"\n\nMessage of the first start: {' / '.join(message.split(chr(10))).strip(' /') or 'none'}"
    report("first_run", arguments, text, {"first": first, "later": later, "message": message})
    return 0


if __name__ == "__main__":
    sys.exit(main())
