"""``lbgym suite``: the benchmark with a fixed protocol."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InvalidOptionError, MissingExtraError, ResultError
from ._command_line import command_line
from ._console import print_json, results_console
from ._options import installed
from ._progress import ProgressBar
from ._report import Report, check_report

if TYPE_CHECKING:
    from ..evaluation.suite import Scores, SuiteResult

_PROTOCOL = Annotated[str, typer.Option("--protocol", metavar="NAME", help="Version of the suite.")]
_PROCESSES = Annotated[int | None, typer.Option(min=1, help="Processes.", show_default="one per core")]
_QUIET = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
_JSON = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables, and no progress.")]


def run(
    policies: Annotated[
        str,
        typer.Option(
            "--policies",
            "-p",
            help="Contenders, separated by commas, as of lbgym compare; the baseline is run as well.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the results.")] = Path("out/suite"),
    protocol: _PROTOCOL = "v1",
    seeds: Annotated[
        int | None, typer.Option("--seeds", "-n", min=1, help="Only the first of the protocol's seeds.")
    ] = None,
    report: Report = None,
    processes: _PROCESSES = None,
    backend: Annotated[
        str, typer.Option(metavar="NAME", help="local: on this machine's cores; ray: on a Ray cluster.")
    ] = "local",
    address: Annotated[
        str | None,
        typer.Option(help="Of the Ray cluster, with --backend ray.", show_default="RAY_ADDRESS, else a local one"),
    ] = None,
    as_json: _JSON = False,
    quiet: _QUIET = False,
) -> None:
    """Run contenders through the suite; each gets a results file.

    Every run is kept as soon as it is made: killed and started again, the command makes only what is missing.
    """
    from ..evaluation.suite import Backend, Scores, protocol_of, read_result, run_suite

    if backend not in tuple(Backend):
        raise InvalidOptionError(f"--backend must be one of {', '.join(Backend)}, got {backend!r}")
    chosen = protocol_of(protocol)
    _need_scipy()
    check_report(report)
    with ProgressBar("suite", total=1, quiet=quiet or as_json) as bar:

        def show(done: int, total: int, label: str, case: str, seed: int) -> None:
            bar.show(done, f"{label}, {case}, seed {seed}", total=total)

        results = run_suite(
            chosen,
            policies,
            out,
            seeds=seeds,
            processes=processes,
            backend=backend,
            address=address,
            progress=show,
        )
    labels = {result.label for result in results}
    if chosen.baseline not in labels:
        results.append(read_result(out / f"{chosen.baseline}.json"))
    comparable = all(result.seeds == results[0].seeds for result in results)
    if comparable:
        _show(Scores(chosen, results), as_json, report)
    if not as_json:
        for result in results:
            typer.echo(f"{out / result.entry.file_name}: {_state(result, chosen.seeds)}")
    if report is not None and not comparable:
        counts = ", ".join(f"{result.label} has {len(result.seeds)} of them" for result in results)
        raise ResultError(f"{report} is not written, since scores need the same seeds: {counts}")


def verify(
    file: Annotated[Path, typer.Argument(help="A contender's results file.")],
    runs: Annotated[
        int | None, typer.Option("--runs", "-n", min=1, help="Runs to repeat.", show_default="one per scenario")
    ] = None,
    draw: Annotated[int, typer.Option(min=0, help="Seed of the draw of those runs.")] = 0,
    model: Annotated[Path | None, typer.Option(help="The trained model, if the result is of one.")] = None,
    processes: _PROCESSES = None,
    as_json: _JSON = False,
    quiet: _QUIET = False,
) -> None:
    """Repeat some runs of a results file and compare them bit for bit; exit code 2 if any differs."""
    from ..evaluation.suite import protocol_of, read_result, verify_result

    result = read_result(file)
    with ProgressBar("verifying", total=1, quiet=quiet or as_json) as bar:
        found = verify_result(
            result,
            protocol_of(result.protocol),
            runs=runs,
            draw=draw,
            model=model,
            processes=processes,
            progress=lambda done, total: bar.show(done, result.label, total=total),
        )
    if as_json:
        print_json(
            {
                "file": str(file),
                "contender": result.label,
                "runs": found.runs,
                "mismatches": [
                    {name: getattr(mismatch, name) for name in mismatch.__slots__} for mismatch in found.mismatches
                ],
                "versions": {name: list(pair) for name, pair in found.versions.items()},
            }
        )
    elif not found.mismatches:
        typer.echo(f"{result.label}: {found.runs} runs repeated, every figure the same bit for bit")
    if found.mismatches:
        others = ", ".join(f"{name} {now} instead of {was}" for name, (was, now) in found.versions.items())
        raise ResultError(
            f"{file}: {len(found.mismatches)} figures of {found.runs} repeated runs differ, the first of "
            f"{found.mismatches[0]}" + (f"; versions differ as well: {others}" if others else "")
        )


def table(
    files: Annotated[list[Path], typer.Argument(help="Results files, or folders of them.")],
    protocol: _PROTOCOL = "v1",
    page: Annotated[
        Path | None, typer.Option(help="Also write this Markdown page, and its plots into images/ beside it.")
    ] = None,
    report: Report = None,
    as_json: _JSON = False,
) -> None:
    """Print the scores of results files, and write them as a page with plots."""
    from ..evaluation.suite import Scores, protocol_of, read_result

    _need_scipy()
    if page is not None and not installed("matplotlib"):
        raise MissingExtraError("matplotlib", "eval", "a plot of a suite")
    check_report(report)
    paths = [path for file in files for path in (sorted(file.glob("*.json")) if file.is_dir() else [file])]
    if not paths:
        raise ResultError(f"there is no results file in {', '.join(map(str, files))}")
    results = {}
    for path in paths:
        result = read_result(path)
        if result.label in results:
            raise ResultError(f"{path} is a second result of {result.label!r}")
        results[result.label] = result
    scores = Scores(protocol_of(protocol), list(results.values()))
    _show(scores, as_json, report)
    if page is not None:
        from ..evaluation.suite.page import write_page

        shown = " ".join(map(str, files))
        for file in write_page(scores, page, command=f"lbgym suite table {shown} --page {page}"):
            if not as_json:
                typer.echo(f"wrote {file}")


def show(protocol: _PROTOCOL = "v1", as_json: _JSON = False) -> None:
    """Show what the suite runs, and the hash of its protocol."""
    from ..evaluation.suite import protocol_of
    from ..evaluation.suite.page import case_table
    from ._tables import drawn_table

    chosen = protocol_of(protocol)
    if as_json:
        cases = [
            {
                "name": case.name,
                "family": case.family,
                "servers": case.scenario.num_servers,
                "balancers": case.scenario.balancers,
                "load": case.scenario.load,
                "rate": case.scenario.rate,
                "warmup": case.warmup,
                "duration": case.scenario.duration,
            }
            for case in chosen.cases
        ]
        print_json({"protocol": chosen.version, "hash": chosen.hash, "seeds": list(chosen.seeds), "cases": cases})
        return
    console = results_console()
    console.print(drawn_table(case_table(chosen), console))
    console.print(f"hash {chosen.hash}", markup=False)


def _show(scores: Scores, as_json: bool, report: Path | None) -> None:
    """Print the scores, and write their page."""
    _print(scores, as_json)
    if report is not None:
        from ..report import save_suite_report

        save_suite_report(scores, report, command=command_line())
        if not as_json:
            typer.echo(f"wrote {report}")


def _print(scores: Scores, as_json: bool) -> None:
    from ..evaluation.suite.page import family_table, score_table
    from ._tables import drawn_table

    if as_json:
        print_json(scores.to_dict())
        return
    console = results_console()
    for drawn in (score_table(scores), family_table(scores, "fct_mean"), family_table(scores, "fct_p99")):
        console.print(drawn_table(drawn, console))


def _state(result: SuiteResult, seeds: Sequence[int]) -> str:
    count = len(result.seeds)
    return "complete" if result.seeds == tuple(seeds) else f"{count} of {len(seeds)} seeds"


def _need_scipy() -> None:
    if not installed("scipy"):
        raise MissingExtraError("scipy", "eval", "a confidence interval")
