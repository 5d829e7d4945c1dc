from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from lbgym.errors import InvalidOptionError, PolicyError, ResultError, ScenarioError, UnknownNameError
from lbgym.evaluation import parse_contender, simulate
from lbgym.evaluation.suite import (
    Case,
    Entry,
    Protocol,
    Scores,
    SuiteResult,
    protocol_names,
    protocol_of,
    read_result,
    run_suite,
    verify_result,
)
from lbgym.evaluation.suite import protocols as named
from lbgym.evaluation.suite.page import score_table, write_page
from lbgym.evaluation.suite.results import KEPT
from lbgym.evaluation.suite.scores import interquartile_mean, probability_of_improvement, resampled
from lbgym.scenarios import Exponential, Trace, Workload, named_scenario

from .suites import TINY, small

#: Of protocol v1. Results that others have published are of this hash: if it changes, what changed needs a v2.
V1 = "dc22a236c35e16a4bfb607ddab0514613a191bb3c39af2b6ce650632401db6c0"


def test_v1_is_what_it_was() -> None:
    assert protocol_names() == ("v1",)
    assert protocol_of("v1").hash == V1
    with pytest.raises(UnknownNameError, match="unknown protocol 'v3'"):
        protocol_of("v3")


def test_v1_covers_what_it_promises() -> None:
    protocol = protocol_of("v1")
    assert len(protocol.cases) >= 24 and len(protocol.families) == 6 and protocol.seeds == tuple(range(20))
    sizes = [case.scenario.num_servers for case in protocol.cases]
    balancers = [case.scenario.balancers for case in protocol.cases]
    assert (min(sizes), max(sizes)) == (4, 256) and (min(balancers), max(balancers)) == (1, 8)
    for name, rates in {"marllb-moderate": [518.8, 690.9, 696.5, 796.3], "marllb-large": [398.5, 419.3]}.items():
        assert [case.scenario.rate for case in protocol.cases if case.name.startswith(name)] == rates
    assert protocol.case("prequal-ramp").scenario.events
    for case in protocol.cases:
        assert case.warmup >= 20 and case.settings.drain == case.scenario.reject_timeout


def test_the_hash_is_of_all_that_matters_and_nothing_else() -> None:
    case = TINY.cases[0]

    def changed(**changes: object) -> str:
        return replace(TINY, cases=(replace(case, **changes), *TINY.cases[1:])).hash  # type: ignore[arg-type]

    same = changed(scenario=replace(case.scenario, description="in other words"))
    assert same == TINY.hash == replace(TINY).hash
    others = {
        replace(TINY, seeds=(0, 1)).hash,
        replace(TINY, version="other").hash,
        replace(TINY, baseline="sed").hash,
        replace(TINY, cases=TINY.cases[::-1]).hash,
        changed(warmup=3.0),
        changed(family="other"),
        changed(scenario=replace(case.scenario, balancers=2)),
        changed(scenario=replace(case.scenario, duration=9.0)),
        changed(scenario=replace(case.scenario, workload=Workload(load=0.7, demand=Exponential(mean=0.06)))),
        changed(scenario=replace(case.scenario, reject_timeout=6.0)),
    }
    assert len(others) == 10 and TINY.hash not in others


def test_protocols_that_make_no_sense_are_refused() -> None:
    case = TINY.cases[0]
    with pytest.raises(ScenarioError, match="different names, got one twice"):
        Protocol(version="x", cases=(case, case))
    with pytest.raises(ScenarioError, match=r"different seeds of at least 0, got \[1, 1\]"):
        Protocol(version="x", cases=(case,), seeds=(1, 1))
    with pytest.raises(ScenarioError, match="case 'one': warmup must be"):
        Protocol(version="x", cases=(replace(case, warmup=8.0),))
    trace = Workload(trace=Trace(times=np.arange(9.0), demands=np.ones(9)), load=0.5)
    with pytest.raises(ScenarioError, match="cannot hold a trace"):
        Protocol(version="x", cases=(Case(scenario=small("t", workload=trace), family="f", warmup=1.0),)).hash  # noqa: B018


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("suite")
    run_suite(TINY, "sed,sed+latency,random=sed+random", out, processes=1)
    return out


def test_results_are_those_of_the_runs(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["lsq.json", "random.json", "sed+latency.json", "sed.json"]
    for file, text in (("lsq", "lsq"), ("random", "random=sed+random"), ("sed+latency", "sed+latency")):
        result = read_result(folder / f"{file}.json")
        assert result.is_complete(TINY) and result.entry == Entry.of(parse_contender(text), TINY)
        for case in TINY.cases:
            for place, seed in enumerate(TINY.seeds):
                run = simulate(case.scenario, parse_contender(text), seed, case.settings)
                assert run is not None
                for name in KEPT:
                    assert result.runs[case.name][name][place] == run.metrics[name]
    # Flows that failed with their server count.
    assert read_result(folder / "lsq.json").values("rejected_share")[:, 2].max() > 0


def test_a_result_is_not_made_twice(folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir()}
    made: list[object] = []
    results = run_suite(TINY, "sed+latency,sed", folder, processes=1, progress=lambda *run: made.append(run))
    assert made == [] and [result.label for result in results] == ["sed+latency", "sed"]
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_more_seeds_are_added_to_fewer(tmp_path: Path, folder: Path) -> None:
    (first,) = run_suite(TINY, "sed", tmp_path, seeds=2, processes=1)
    assert first.seeds == (0, 1) and not first.is_complete(TINY)
    made: list[tuple[str, int]] = []
    run_suite(TINY, "sed", tmp_path, processes=1, progress=lambda *run: made.append((run[2], run[4])))
    assert {seed for _, seed in made} == {2, 5} and len(made) == 2 * 3 * 2
    for name in ("sed.json", "lsq.json"):
        assert read_result(tmp_path / name).runs == read_result(folder / name).runs


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, folder: Path, processes: int) -> None:
    script = [sys.executable, "-m", "tests.evaluation.suites", str(tmp_path), str(processes)]
    root = Path(__file__).parents[2]
    made: list[list[str]] = []
    kills = 0
    # 36 runs; it is killed for good after some of them, twice, and then left alone.
    for stop in (7, 9, None):
        with subprocess.Popen(script, stdout=subprocess.PIPE, text=True, cwd=root, start_new_session=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                made.append(line.split()[1:])
                if stop is not None and len(made) == stop + kills * 9:
                    os.killpg(process.pid, signal.SIGKILL)
                    kills += 1
                    stop = None
                    break
            process.stdout.read()
            code = process.wait(120)
        if code == 0:
            break
        assert code == -signal.SIGKILL and list(tmp_path.glob("*.json.runs"))
    assert kills == 2 and code == 0 and not list(tmp_path.glob("*.runs"))
    # What had been reported was not made again, so each run was reported once; it may have been made before.
    assert len({tuple(run) for run in made}) == len(made)
    for name in ("sed.json", "sed+latency.json", "lsq.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def journal(folder: Path, count: int) -> Path:
    """A journal of an interrupted run of SED: so many runs."""

    class Enough(Exception):
        pass

    def stop(done: int, *_: object) -> None:
        if done == count:
            raise Enough

    with pytest.raises(Enough):
        run_suite(TINY, "sed", folder, processes=1, progress=stop)
    return folder / "sed.json.runs"


def test_a_line_that_was_cut_short_is_made_again(tmp_path: Path, folder: Path) -> None:
    path = journal(tmp_path, 5)
    text = path.read_text()
    assert len(text.splitlines()) == 1 + 5
    path.write_text(text[:-20])
    made: list[int] = []
    run_suite(TINY, "sed", tmp_path, processes=1, progress=lambda done, *_: made.append(done))
    assert made == list(range(5, 25))
    assert (tmp_path / "sed.json").read_bytes() == (folder / "sed.json").read_bytes()


def test_runs_of_something_else_are_not_mixed_in(tmp_path: Path, folder: Path) -> None:
    path = journal(tmp_path, 5)
    other = replace(TINY, seeds=(0, 1))
    with pytest.raises(ResultError, match=r"sed.json.runs' has runs of another protocol, contender or version"):
        run_suite(other, "sed", tmp_path, processes=1)
    assert path.exists()
    with pytest.raises(ResultError, match=r"is of protocol tiny with hash .*move it away"):
        run_suite(other, "sed", folder, processes=1)
    with pytest.raises(ResultError, match="is of another contender"):
        run_suite(TINY, "sed=sed+uniform", folder, processes=1)


def test_a_journal_of_all_runs_becomes_a_result(tmp_path: Path, folder: Path) -> None:
    path = journal(tmp_path, 12)
    # As if killed after the last run of SED and before the result was written.
    (tmp_path / "sed.json").unlink(missing_ok=True)
    runs = [[case, seed, kept] for case, seed, kept in all_runs(folder / "sed.json")]
    head = (tmp_path / "lsq.json.runs").read_text().splitlines()[0]
    sed = json.loads(head) | {"contender": json.loads((folder / "sed.json").read_text())["contender"]}
    path.write_text("".join(json.dumps(line) + "\n" for line in (sed, *runs)))
    made: list[str] = []
    run_suite(TINY, "sed", tmp_path, processes=1, progress=lambda *run: made.append(run[2]))
    assert set(made) == {"lsq"} and not path.exists()
    assert (tmp_path / "sed.json").read_bytes() == (folder / "sed.json").read_bytes()


def all_runs(path: Path) -> list[tuple[str, int, dict[str, float]]]:
    """The runs of a result, as its journal has them."""
    result = read_result(path)
    return [
        (case, seed, {name: table[name][place] for name in KEPT})
        for place, seed in enumerate(result.seeds)
        for case, table in result.runs.items()
    ]


def test_a_damaged_journal_is_said_so(tmp_path: Path) -> None:
    path = journal(tmp_path, 3)
    path.write_text(path.read_text().replace("fct_mean", '"', 1))
    with pytest.raises(ResultError, match=r"sed.json.runs' is damaged .*: remove it"):
        run_suite(TINY, "sed", tmp_path, processes=1)


@pytest.mark.parametrize(
    "line", ["null", "5", "[1]", '"sed"', '["one", 0, null]', '["one", 0, {"fct_mean": 1.0}]', "[[], 0, {}]"]
)
def test_a_line_of_another_kind_is_damage(line: str, tmp_path: Path) -> None:
    path = journal(tmp_path, 3)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ResultError, match=r"sed.json.runs' is damaged \(line 5 is no run with fct_mean.*\): remove it"):
        run_suite(TINY, "sed", tmp_path, processes=1)


def test_the_baselines_name_is_for_the_baseline(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(PolicyError, match=r"'lsq' is the protocol's baseline, .* \(sed\+cores\): name it otherwise"):
        run_suite(TINY, "lsq=sed,ecmp", tmp_path, processes=1)
    assert not list(tmp_path.iterdir())
    sed, lsq = (read_result(folder / f"{name}.json") for name in ("sed", "lsq"))
    other = replace(lsq, entry=replace(sed.entry, label="lsq"))
    with pytest.raises(
        ResultError, match="of 'lsq' is not of the baseline of that name, but of rule 'sed' with 'cores'"
    ):
        Scores(TINY, [sed, other])


def test_two_processes_do_not_write_the_same_result(tmp_path: Path) -> None:
    import fcntl

    path = journal(tmp_path, 3)
    with path.open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(ResultError, match=r"another process is writing .*sed.json.runs"):
            run_suite(TINY, "sed", tmp_path, processes=1)


def test_options_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidOptionError, match="seeds must be from 1 to 4, got 9"):
        run_suite(TINY, "sed", tmp_path, seeds=9)
    with pytest.raises(InvalidOptionError, match="needs the backend 'ray'"):
        run_suite(TINY, "sed", tmp_path, address="auto")
    with pytest.raises(InvalidOptionError, match="processes are those of this machine"):
        run_suite(TINY, "sed", tmp_path, backend="ray", processes=2)
    with pytest.raises(PolicyError, match=r"'a b', 'a\?b' would share the file a_b.json"):
        run_suite(TINY, "a b=sed,a?b=lsq", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "knows"),
    [
        ("lsq", "nothing"),
        ("sed", "configured"),
        ("sed+latency", "nothing"),
        ("sed+littles-law", "configured"),
        ("sed+slow-start+latency", "nothing"),
        ("awcmp", "ground truth"),
        ("round_robin+orca", "ground truth"),
        ("oracle_sed", "oracle"),
    ],
)
def test_entries_say_what_a_contender_knows(text: str, knows: str) -> None:
    assert Entry.of(parse_contender(text), TINY).knows == knows


def test_damaged_files_are_refused(tmp_path: Path, folder: Path) -> None:
    document = json.loads((folder / "sed.json").read_text())
    path = tmp_path / "bad.json"
    for change, message in (
        ({"format": 99}, "has format 99, and this lbgym reads format 1"),
        ({"seeds": [0]}, "must be 1 finite numbers of at least 0"),
        ({"runs": {"one": {}}}, "damaged result of a suite: KeyError"),
        ({"contender": {"label": "x"}}, "damaged result of a suite: TypeError"),
    ):
        path.write_text(json.dumps(document | change))
        with pytest.raises(ResultError, match=message):
            read_result(path)
    for text in ("{", "[]", "{}"):
        path.write_text(text)
        with pytest.raises(ResultError, match="is no result of a suite"):
            read_result(path)


def test_a_part_is_repeated_bit_for_bit(folder: Path) -> None:
    result = read_result(folder / "random.json")
    found = verify_result(result, TINY, processes=1)
    assert found.runs == 3 and not found.mismatches and not found.versions
    every = verify_result(result, TINY, runs=12, processes=1)
    assert every.runs == 12 and not every.mismatches


def test_a_figure_that_differs_in_the_last_bit_is_found(folder: Path) -> None:
    result = read_result(folder / "sed.json")
    values = list(result.runs["two"]["fct_mean"])
    values[2] = float(np.nextafter(values[2], 1))
    runs = {case: dict(table) for case, table in result.runs.items()}
    runs["two"]["fct_mean"] = tuple(values)
    changed = replace(result, runs=runs, versions=dict(result.versions) | {"numba": "0.1"})
    found = verify_result(changed, TINY, runs=12, processes=1)
    (mismatch,) = found.mismatches
    assert (mismatch.case, mismatch.seed, mismatch.metric) == ("two", 2, "fct_mean")
    assert found.versions == {"numba": ("0.1", result.versions["numba"])}
    with pytest.raises(ResultError, match="is of protocol tiny"):
        verify_result(result, replace(TINY, seeds=(0,)))
    with pytest.raises(InvalidOptionError, match="runs must be from 1 to the result's 12, got 13"):
        verify_result(result, TINY, runs=13)


def test_a_trained_model_is_known_by_its_contents(tmp_path: Path) -> None:
    model = tmp_path / "model.pt"
    model.write_bytes(b"one")
    entry = Entry("mine", None, None, "model.pt", "0" * 64, "nothing")
    with pytest.raises(ResultError, match=r"'mine' is the trained model model\.pt: give its file"):
        entry.contender()
    with pytest.raises(ResultError, match="SHA-256 000000000000"):
        entry.contender(model)


# Scores


def result_of(label: str, mean: np.ndarray, p99: np.ndarray | None = None) -> SuiteResult:
    """A result with these FCTs, float64[seeds, cases]."""
    tables = {"fct_mean": mean, "fct_p99": mean if p99 is None else p99}
    runs = {
        case: {name: tuple(tables[name][:, k]) if name in tables else (0.25,) * len(mean) for name in KEPT}
        for k, case in enumerate(TINY.names)
    }
    return SuiteResult("tiny", TINY.hash, Entry(label, label, "cores", None, None, "nothing"), TINY.seeds, runs, {})


@pytest.fixture
def scores() -> Scores:
    rng = np.random.default_rng(7)
    base = rng.uniform(0.1, 1.0, (4, 3))
    return Scores(
        TINY,
        [
            result_of("lsq", base),
            result_of("half", base / 2, base),
            result_of("noisy", base * rng.lognormal(-0.2, 0.2, (4, 3))),
        ],
    )


def test_scores_are_over_the_baseline_on_the_same_flows(scores: Scores) -> None:
    assert scores.labels == ["half", "noisy", "lsq"]
    assert scores.scores("half", "fct_mean") == pytest.approx(np.full((4, 3), 0.5))
    half = scores.geometric_mean("half", "fct_mean")
    assert (half.value, half.low, half.high) == pytest.approx((0.5, 0.5, 0.5))
    assert scores.iqm("half", "fct_mean").value == pytest.approx(0.5)
    assert scores.probability_of_improvement("half", "lsq", "fct_mean").value == 1.0
    assert scores.probability_of_improvement("half", "lsq", "fct_p99").value == 0.5
    assert scores.rejected("half") == 0.25 and scores.complete


def test_the_geometric_mean_is_scipys_and_its_interval_students(scores: Scores) -> None:
    noisy = scores.scores("noisy", "fct_mean")
    found = scores.geometric_mean("noisy", "fct_mean")
    assert found.value == pytest.approx(stats.gmean(noisy, axis=None))
    logs = np.log(noisy).mean(axis=1)
    low, high = stats.t.interval(0.95, 3, logs.mean(), stats.sem(logs))
    assert (found.low, found.high) == pytest.approx((np.exp(low), np.exp(high)))
    assert scores.geometric_mean("noisy", "fct_mean", versus="half").value == pytest.approx(found.value / 0.5)
    steady = scores.geometric_mean("noisy", "fct_mean", family="steady")
    assert steady.value == pytest.approx(stats.gmean(noisy[:, :2], axis=None))
    assert scores.case_means("noisy", "fct_mean") == pytest.approx(stats.gmean(noisy, axis=0))


def test_the_interquartile_mean_is_scipys() -> None:
    rng = np.random.default_rng(1)
    for count in (4, 7, 60, 61, 63):
        values = rng.standard_t(2, (3, count))
        assert interquartile_mean(values) == pytest.approx(stats.trim_mean(values, 0.25, axis=-1))


def test_the_probability_of_improvement_is_mann_and_whitneys() -> None:
    rng = np.random.default_rng(2)
    x, y = rng.integers(0, 6, (8, 5)) / 6, rng.integers(1, 7, (8, 5)) / 6
    expected = np.mean([stats.mannwhitneyu(y[:, k], x[:, k]).statistic / 64 for k in range(5)])
    assert probability_of_improvement(x, y) == pytest.approx(expected)


def test_the_bootstrap_is_stratified_and_agrees_with_scipys(scores: Scores) -> None:
    noisy = scores.scores("noisy", "fct_mean")
    drawn = resampled(noisy, np.random.default_rng(0), 500)
    assert drawn.shape == (500, 4, 3)
    for k in range(3):
        assert set(drawn[..., k].ravel()) == set(noisy[:, k])
    # The runs of a case are drawn on their own; their mean varies as n draws from them do.
    deviation = drawn.mean(axis=1).std(axis=0)
    assert deviation == pytest.approx(noisy.std(axis=0) / 2, rel=0.15)
    many = np.random.default_rng(3).lognormal(0, 0.3, (60, 1))
    ours = np.quantile(interquartile_mean(resampled(many, np.random.default_rng(0), 4000)[..., 0]), [0.025, 0.975])
    theirs = stats.bootstrap(
        (many[:, 0],), lambda x, axis: stats.trim_mean(x, 0.25, axis=axis), method="percentile", n_resamples=4000, rng=0
    ).confidence_interval
    assert ours == pytest.approx(list(theirs), abs=0.1 * (theirs.high - theirs.low))


def test_the_profile_is_the_distribution_of_the_scores(scores: Scores) -> None:
    noisy = scores.scores("noisy", "fct_mean").ravel()
    limits = np.linspace(0.2, 2, 19)
    share, low, high = scores.profile("noisy", "fct_mean", limits)
    assert share == pytest.approx(stats.ecdf(noisy).cdf.evaluate(limits))
    assert (low <= share).all() and (share <= high).all()


def test_one_seed_has_no_interval(folder: Path) -> None:
    results = [read_result(folder / f"{name}.json") for name in ("sed", "lsq")]
    one = {
        result.label: {
            case: {name: values[:1] for name, values in table.items()} for case, table in result.runs.items()
        }
        for result in results
    }
    scores = Scores(TINY, [replace(result, seeds=result.seeds[:1], runs=one[result.label]) for result in results])
    for estimate in (
        scores.geometric_mean("sed", "fct_mean"),
        scores.iqm("sed", "fct_mean"),
        scores.probability_of_improvement("sed", "lsq", "fct_mean"),
    ):
        assert np.isfinite(estimate.value) and np.isnan([estimate.low, estimate.high]).all()
    share, low, high = scores.profile("sed", "fct_mean", np.array([0.5, 1.0]))
    assert np.isfinite(share).all() and np.isnan([low, high]).all()


def test_results_that_cannot_be_compared_are_refused(folder: Path) -> None:
    sed, lsq = (read_result(folder / f"{name}.json") for name in ("sed", "lsq"))
    with pytest.raises(ResultError, match="no result of the baseline 'lsq'"):
        Scores(TINY, [sed])
    with pytest.raises(ResultError, match="is of protocol tiny"):
        Scores(replace(TINY, version="other"), [sed, lsq])
    with pytest.raises(ResultError, match=r"has the seeds \[0, 1\]"):
        Scores(TINY, [lsq, replace(sed, seeds=(0, 1))])
    with pytest.raises(ResultError, match="lacks two"):
        Scores(TINY, [lsq, replace(sed, runs={name: table for name, table in sed.runs.items() if name != "two"})])


def test_the_page_has_every_contender_and_its_plots(tmp_path: Path, folder: Path) -> None:
    found = Scores(TINY, [read_result(path) for path in sorted(folder.glob("*.json"))])
    files = write_page(found, tmp_path / "board.md", command="make board")
    assert [file.name for file in files] == [
        "board-scores.png", "board-profiles.png", "board-scenarios.png", "board.md",
    ]  # fmt: skip
    text = (tmp_path / "board.md").read_text()
    for word in (TINY.hash, "make board", "| sed+latency | nothing |", "| two | steady | 3 | 2 |"):
        assert word in text
    for file in files[:3]:
        assert file.read_bytes().startswith(b"\x89PNG") and f"images/{file.name}" in text
    assert "Not a complete result" not in text
    best = score_table(found).rows[0][0].text
    assert best == found.labels[0]


# The command


@pytest.fixture
def tiny_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(named._PROTOCOLS, "tiny", lambda: TINY)


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    from lbgym.cli import main

    with pytest.raises(SystemExit) as exit_:
        main(["suite", *map(str, arguments)])
    out, err = capsys.readouterr()
    return int(exit_.value.code or 0), out, err


def test_the_command_runs_shows_and_verifies(
    tiny_by_name: None, tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results"
    options = ("--protocol", "tiny", "--out", out, "--processes", 1)
    page = tmp_path / "suite.html"
    code, text, _ = command(capsys, "run", "--policies", "sed", *options, "--report", page)
    assert code == 0 and "suite tiny, 3 scenarios, 4 seeds" in text and "sed.json: complete" in text
    assert "sed has the least mean FCT over 3 scenarios" in page.read_text()
    code, text, err = command(
        capsys, "run", "-p", "sed+latency", *options, "--seeds", 1, "--report", tmp_path / "not.html"
    )
    assert code == 2 and "sed+latency.json: 1 of 4 seeds" in text and not (tmp_path / "not.html").exists()
    assert "not.html is not written, since scores need the same seeds: sed+latency has 1 of them, lsq has 4" in err
    assert (out / "sed.json").read_bytes() == (folder / "sed.json").read_bytes()
    code, text, _ = command(capsys, "table", folder, "--protocol", "tiny", "--json", "--page", tmp_path / "page.md")
    rows = json.loads(text)["contenders"]
    assert code == 0 and {row["contender"] for row in rows} == {"lsq", "sed", "sed+latency", "random"}
    assert (tmp_path / "page.md").exists()
    code, text, _ = command(capsys, "verify", out / "sed.json", "--processes", 1)
    assert code == 0 and "3 runs repeated, every figure the same bit for bit" in text
    document = json.loads((out / "sed.json").read_text())
    document["runs"]["one"]["fct_p99"] = [x * 1.001 for x in document["runs"]["one"]["fct_p99"]]
    (out / "sed.json").write_text(json.dumps(document))
    code, _, err = command(capsys, "verify", out / "sed.json", "--processes", 1)
    assert code == 2 and "1 figures of 3 repeated runs differ" in err and "fct_p99" in err


def test_the_command_shows_the_protocol(capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = command(capsys, "show")
    assert code == 0 and V1 in text and "prequal-ramp" in text
    code, text, _ = command(capsys, "show", "--json")
    document = json.loads(text)
    assert document["hash"] == V1 and len(document["cases"]) == len(protocol_of("v1").cases)


def test_the_command_refuses_with_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = command(capsys, "run", "-p", "sed", "--backend", "slurm", "--out", tmp_path)
    assert code == 2 and "--backend must be one of local, ray, got 'slurm'" in err
    code, _, err = command(capsys, "table", tmp_path)
    assert code == 2 and "there is no results file in" in err


def test_prequals_ramp_is_within_what_its_machines_have() -> None:
    scenario = named_scenario("prequal-ramp")
    speed = {j: server.speed for j, server in enumerate(scenario.servers)}
    factor, loads = 1.0, []
    times = sorted({event.time for event in scenario.events})
    for time in times:
        for event in scenario.events:
            if event.time == time and event.kind == "rate":
                factor = event.value or 0.0
            elif event.time == time and event.kind == "speed":
                assert event.server is not None and event.value is not None
                speed[event.server] = scenario.servers[event.server].speed * event.value
        assert sorted(speed.values()) == pytest.approx([0.55] * 30 + [1.1] * 70)
        capacity = sum(speed[j] * server.cores for j, server in enumerate(scenario.servers))
        loads.append(scenario.rate * factor * scenario.workload.mean_demand / capacity)
    allocated = np.array(loads) * (70 * 2.2 + 30 * 1.1) * 2 / 200
    assert allocated == pytest.approx([0.75, 0.83, 0.93, 1.03, 1.14, 1.27, 1.41, 1.57, 1.74])
    assert max(loads) == pytest.approx(0.93, abs=0.005)
