"""A longer run of libFuzzer on the balancer core: ``python -m benchmarks.core_fuzz``, needs clang.

Continues from the corpus in tests/plugins/corpus. What makes the core fail is kept in the folder of ``--out``.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import markdown, parser, report
from tests.plugins.test_sanitizers import CORPUS, FLAGS, HERE, SOURCES, include_flags

SECONDS = 300


def main(arguments: Sequence[str] | None = None) -> int:
    given = parser(__doc__.splitlines()[0]).parse_args(arguments)
    clang = shutil.which("clang")
    if clang is None:
        sys.stderr.write("not measured: no clang for libFuzzer\n")
        return 1
    with tempfile.TemporaryDirectory() as folder:
        program, found = Path(folder, "fuzz"), Path(folder, "found")
        found.mkdir()
        kept = given.out or Path(folder)
        kept.mkdir(parents=True, exist_ok=True)
        sanitizers = "-fsanitize=fuzzer,address,undefined"
        subprocess.run(
            [clang, *FLAGS, sanitizers, *include_flags(), "-o", program, HERE / "fuzz.c", *SOURCES, "-lm"], check=True
        )
        seconds = 5 if given.quick else SECONDS
        done = subprocess.run(
            [program, f"-max_total_time={seconds}", "-max_len=512", f"-artifact_prefix={kept}/", found, CORPUS],
            capture_output=True,
            text=True,
        )
    runs = re.findall(r"#(\d+)\s.*cov: (\d+)", done.stderr)
    inputs, reached = (int(runs[-1][0]), int(runs[-1][1])) if runs else (0, 0)
    good = done.returncode == 0
    text = markdown([(seconds, inputs, reached, good)], ("seconds", "packets", "edges reached", "no fault"))
    if not good:
        text += f"\n\n{done.stderr[-2000:]}"
    report("core_fuzz", given, text, {"seconds": seconds, "packets": inputs, "edges": reached, "reached": good})
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
