"""Run a suite, and go on where an earlier run was stopped, however it was."""

from __future__ import annotations

import fcntl
import json
import math
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from ...atomic import check_writable
from ...errors import InvalidOptionError, PolicyError, ResultError
from ..contenders import Contender, parse_contender, parse_contenders
from ..pool import Job, run_jobs
from ..results import Run
from .protocol import Protocol
from .results import FORMAT, KEPT, Entry, SuiteResult, kept, read_result

#: Called after every run: runs done, runs in all, contender, case and seed.
SuiteProgress = Callable[[int, int, str, str, int], None]


class Backend(StrEnum):
    """The machines that make the runs."""

    LOCAL = "local"
    RAY = "ray"


def run_suite(
    protocol: Protocol,
    contenders: str | Iterable[str | Contender],
    out: str | Path,
    *,
    seeds: int | None = None,
    processes: int | None = None,
    backend: Backend | str = Backend.LOCAL,
    address: str | None = None,
    progress: SuiteProgress | None = None,
) -> list[SuiteResult]:
    """Run contenders through a protocol and write a file for each.

    Every run is written down as soon as it is made, in ``NAME.json.runs`` beside the result to come; a later call with
    the same arguments makes only what is missing. The protocol's baseline is run as well unless its result is there.

    Args:
        protocol: what to run.
        contenders: as :func:`lbgym.evaluation.parse_contender` reads them, in a list or separated by commas.
        out: folder of the results, made if need be.
        seeds: only so many of the protocol's seeds, the first ones; such a result is not complete.
        processes: of this machine; None: one per core. Not with Ray.
        backend: "local", or "ray": on a Ray cluster, whose nodes need lbgym.
        address: of the Ray cluster; None: RAY_ADDRESS, else a local one.
        progress: called in this process after every run.

    Returns:
        The contenders' results, in order.

    Raises:
        UnknownNameError: for an unknown rule or policy.
        PolicyError: for a model that does not fit a scenario, two contenders of the same name, or another contender of
            the baseline's name.
        ResultError: for a file of another protocol or contender in the way, or one that another process writes.
        InvalidOptionError: for options that make no sense.
        FileWriteError: if a file cannot be written.
        WorkerLostError: if one of the other processes was killed.
        MissingExtraError: with Ray and without its package.
    """
    backend = Backend(backend)
    if address is not None and backend is not Backend.RAY:
        raise InvalidOptionError(f"the address {address!r} of a Ray cluster needs the backend 'ray'")
    if processes is not None and backend is Backend.RAY:
        raise InvalidOptionError(f"processes are those of this machine, got {processes!r} with the backend 'ray'")
    if seeds is not None and not 1 <= seeds <= len(protocol.seeds):
        raise InvalidOptionError(f"seeds must be from 1 to {len(protocol.seeds)}, got {seeds!r}")
    numbers = protocol.seeds[:seeds]
    folder, chosen = Path(out), parse_contenders(contenders)
    asked = [contender.label for contender in chosen]
    check_writable(folder / "result.json")
    baseline = parse_contender(protocol.baseline)
    if baseline.label not in asked:
        chosen.append(baseline)
    for contender in chosen:
        # Scores are over whatever has the baseline's label.
        if contender.label == baseline.label and contender != baseline:
            raise PolicyError(
                f"{baseline.label!r} is the protocol's baseline, and that label was given to another contender "
                f"({_spelled(contender)}): name it otherwise"
            )
    entries = [Entry.of(contender, protocol) for contender in chosen]
    files = [entry.file_name for entry in entries]
    for file in files:
        if files.count(file) > 1:
            names = ", ".join(repr(e.label) for e in entries if e.file_name == file)
            raise PolicyError(f"{names} would share the file {file}; name one of them with LABEL=CONTENDER")

    with ExitStack() as stack:
        journals = [stack.enter_context(_Journal(folder, entry, protocol, numbers)) for entry in entries]
        jobs = [
            Job(place, contender, seed)
            for contender, journal in zip(chosen, journals, strict=True)
            for seed in numbers
            for place, case in enumerate(protocol.cases)
            if (case.name, seed) not in journal.runs
        ]
        of_label = {entry.label: journal for entry, journal in zip(entries, journals, strict=True)}
        total = len(numbers) * len(protocol.cases) * len(chosen)
        done = total - len(jobs)
        for job, run in _made(protocol, jobs, backend, address, processes):
            journal, case = of_label[job.contender.label], protocol.cases[job.setting]
            journal.add(case.name, job.seed, run)
            if journal.is_full():
                journal.finish()
            done += 1
            if progress is not None:
                progress(done, total, job.contender.label, case.name, job.seed)
        results = {entry.label: read_result(folder / entry.file_name) for entry in entries}
    return [results[label] for label in asked]


def _spelled(contender: Contender) -> str:
    """What a contender is, whatever its label."""
    return "+".join(part for part in (contender.dispatch, contender.path or contender.policy) if part)


def _made(
    protocol: Protocol, jobs: Sequence[Job], backend: Backend, address: str | None, processes: int | None
) -> Iterator[tuple[Job, Run]]:
    if not jobs:
        return iter(())
    settings = [(case.scenario, case.settings) for case in protocol.cases]
    if backend is Backend.RAY:
        from ..on_ray import run_jobs_on_ray

        return run_jobs_on_ray(settings, jobs, address)
    return run_jobs(settings, jobs, processes)


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    from ... import __version__

    packages = {name: version(name) for name in ("numpy", "numba")}
    return {"lbgym": __version__, "python": platform.python_version(), **packages, "machine": platform.machine()}


def _run_of(document: Any, line: int) -> tuple[str, int, dict[str, float]]:
    """The case, the seed and the metrics that a line of a journal holds.

    Raises:
        ValueError: if it is another kind of JSON.
    """
    match document:
        case [str() as case, int() as seed, dict() as values] if values.keys() == {*KEPT} and all(
            isinstance(x, (int, float)) and math.isfinite(x) and x >= 0 for x in values.values()
        ):
            return case, seed, values
    raise ValueError(f"line {line} is no run with {', '.join(KEPT)}")


class _Journal:
    """The runs of one contender: those of an earlier call, and those that are made now.

    Args:
        folder: of the results.
        entry: the contender.
        protocol: what is run.
        seeds: of the runs.

    Attributes:
        runs: what is kept of each, by case and seed.
    """

    def __init__(self, folder: Path, entry: Entry, protocol: Protocol, seeds: tuple[int, ...]) -> None:
        self._entry, self._protocol, self._seeds = entry, protocol, seeds
        self._result = folder / entry.file_name
        self._path = folder / f"{entry.file_name}.runs"
        self._stream: IO[str] | None = None
        self._versions: dict[str, str] = {}
        self.runs: dict[tuple[str, int], dict[str, float]] = {}

    def __enter__(self) -> _Journal:
        if self._result.exists():
            self._take(read_result(self._result))
        if self.is_full():
            return self
        if self.runs and self._versions != versions():
            raise ResultError(
                f"{str(self._result)!r} was made with {self._versions}, and its missing runs would be with "
                f"{versions()}: move it away"
            )
        self._stream = self._path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._recover(self._stream)
            if self.is_full():
                # Killed after the last run, before the result was written.
                self.finish()
        except ValueError as error:
            self._stream.close()
            if isinstance(error, ResultError):
                raise
            raise ResultError(f"{str(self._path)!r} is damaged ({error}): remove it") from None
        except BlockingIOError:
            self._stream.close()
            raise ResultError(f"another process is writing {str(self._path)!r}: wait for it, or end it") from None
        except BaseException:
            self._stream.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            self._stream.close()

    def is_full(self) -> bool:
        """True if every run that is asked for is there."""
        return all((case, seed) in self.runs for case in self._protocol.names for seed in self._seeds)

    @property
    def _head(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "protocol": self._protocol.version,
            "protocol_hash": self._protocol.hash,
            "contender": self._entry.to_dict(),
            "versions": versions(),
        }

    def _take(self, result: SuiteResult) -> None:
        """The runs of a finished file, which may have fewer seeds than are asked for now."""
        if result.protocol_hash != self._protocol.hash:
            raise ResultError(
                f"{str(self._result)!r} is of protocol {result.protocol} with hash {result.protocol_hash[:12]}..., and "
                f"this is {self._protocol.version} with {self._protocol.hash[:12]}...: move it away"
            )
        if result.entry != self._entry:
            raise ResultError(f"{str(self._result)!r} is of another contender ({result.entry}): move it away")
        self._versions = dict(result.versions)
        for case in self._protocol.names:
            for place, seed in enumerate(result.seeds):
                if case in result.runs:
                    self.runs[case, seed] = {name: result.runs[case][name][place] for name in KEPT}

    def _recover(self, stream: IO[str]) -> None:
        """Read what is there, leave out a last line that was cut short, and get ready to append."""
        stream.seek(0)
        text = stream.read()
        whole = text[: text.rfind("\n") + 1]
        lines = whole.splitlines()
        if lines and json.loads(lines[0]) != self._head:
            raise ResultError(
                f"{str(self._path)!r} has runs of another protocol, contender or version than asked for now: remove it"
            )
        for number, line in enumerate(lines[1:], start=2):
            case, seed, values = _run_of(json.loads(line), number)
            self.runs[case, seed] = values
        if whole != text:
            stream.truncate(len(whole.encode()))
        if not lines:
            self._write(self._head)

    def _write(self, document: Any) -> None:
        assert self._stream is not None
        self._stream.write(json.dumps(document, allow_nan=False) + "\n")
        # Handed to the system: a process that is killed from here on has lost nothing.
        self._stream.flush()

    def add(self, case: str, seed: int, run: Run) -> None:
        """Write down a run."""
        self.runs[case, seed] = kept(run)
        self._write([case, seed, self.runs[case, seed]])

    def finish(self) -> None:
        """Write the result, and remove the journal."""
        seeds = tuple(
            seed for seed in self._protocol.seeds if all((case, seed) in self.runs for case in self._protocol.names)
        )
        runs = {
            case: {name: tuple(self.runs[case, seed][name] for seed in seeds) for name in KEPT}
            for case in self._protocol.names
        }
        result = SuiteResult(self._protocol.version, self._protocol.hash, self._entry, seeds, runs, versions())
        result.save(self._result)
        self._path.unlink()
