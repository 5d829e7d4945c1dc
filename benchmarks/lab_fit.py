"""``lbgym fit`` on recordings of the laboratory: ``python -m benchmarks.lab_fit``, as root.

One run of real flows is recorded and fitted. What is known of the laboratory is the truth: each server's share of the
CPUs, and the law that the flows' demands were drawn from.
"""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.common import markdown, parser, report
from lbgym.errors import LbgymError
from lbgym.lab import LabConfig, Laboratory, compare_in
from lbgym.lab.config import small_scenario
from lbgym.recording.fit import fit_recording
from lbgym.scenarios import Exponential, Workload

#: Speeds are to be this near.
LIMIT = 0.15


def main(arguments: list[str] | None = None) -> int:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--data-plane", default="xdp", help="as lbgym lab takes it")
    options.add_argument("--policy", default="lsq", help="contender, as lbgym compare takes it")
    options.add_argument("--load", type=float, default=0.6)
    options.add_argument("--duration", type=float, default=600.0, help="seconds")
    options.add_argument("--demand", type=float, default=0.03, help="mean of the exponential demands, core-seconds")
    given = options.parse_args(arguments)
    if given.quick:
        given.duration = 30.0
    workload = Workload(load=given.load, demand=Exponential(mean=given.demand))
    config = LabConfig(name="fit", data_plane=given.data_plane, scenario=replace(small_scenario(), workload=workload))
    lab = Laboratory(config)
    with tempfile.TemporaryDirectory() as folder, lab.temporarily():
        compare_in(
            lab, f"recorded={given.policy}", 1, duration=given.duration, recordings=Path(folder),
            watch=lambda _label, _seed, now, end: print(f"\r{now:.0f} of {end:.0f} s ", end="", file=sys.stderr),
        )  # fmt: skip
        fit = fit_recording(Path(folder) / "recorded-0.parquet", cores=1)
    shares = np.array(config.shares())
    truth = shares / shares.mean()
    rows = [
        (server.name, f"{share:g}", f"{true:.3f}", f"{server.speed:.3f}", f"{server.speed_low:.3f} to "
         f"{server.speed_high:.3f}", f"{100 * (server.speed / true - 1):+.1f}", f"{server.completed:,}")
        for server, share, true in zip(fit.servers, shares.tolist(), truth.tolist(), strict=True)
    ]  # fmt: skip
    errors = np.abs(np.array([server.speed for server in fit.servers]) / truth - 1.0)
    held = {row.measure: row for row in fit.held_out if row.server == "all"}
    text = markdown(rows, ("server", "CPUs", "speed", "fitted", "95 % interval", "error, %", "flows"))
    text += (
        f"\n\nlaw of demands: {type(fit.demand.law).__name__}, {fit.demand.singles:,} single flows; "
        + ", ".join(f"{kind} {value:.3f}" for kind, value in fit.demand.likelihoods.items())
        + f"\noverhead {1e3 * fit.overhead:.3g} ms ({1e3 * fit.overhead_low:.3g} to {1e3 * fit.overhead_high:.3g})"
        + "".join(
            f"\n{name}, held out: predicted {row.predicted:.4g}, recorded {row.recorded:.4g} ({100 * row.error:+.1f} %)"
            for name, row in held.items()
        )
        + "".join(f"\n{warning}" for warning in fit.warnings)
        + f"\nlargest error of a speed: {100 * errors.max():.1f} % (at most {100 * LIMIT:g} %)"
        f"\nload average of the machine {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores"
    )
    reached = bool(errors.max() <= LIMIT)
    report("lab_fit", given, text, {"fit": fit.to_dict(), "truth": truth, "reached": reached})
    return 0 if reached or given.quick else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LbgymError as error:
        sys.exit(f"not measured: {error}")
