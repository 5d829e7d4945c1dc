"""Pages of a suite's scores and of recordings: one file each, which a browser shows without a network."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lbgym.errors import RecordingError
from lbgym.evaluation.suite import Entry, Scores, SuiteResult, protocol_of
from lbgym.features import FEATURE_NAMES
from lbgym.recording import Recording
from lbgym.report import recording_report
from lbgym.report.suite import suite_verdict
from lbgym.scenarios import Event, Exponential, Scenario, Server, Workload
from tests.recordings import record_at_full_speed
from tests.report.conftest import Open
from tests.sharedmemory.conftest import shm_dir
from tests.test_cli import in_process

pytest.importorskip("bokeh")
pytest.importorskip("scipy")

__all__ = ["shm_dir"]

#: Bytes.
MOST = 3_000_000
PROTOCOL = protocol_of("v1")


def result(label: str, knows: str, factor: float, spread: float, seeds: int = 2) -> SuiteResult:
    """A result with FCTs of about so many seconds."""
    rng = np.random.default_rng(len(label))

    def values() -> tuple[float, ...]:
        return tuple((factor * np.exp(spread * rng.standard_normal(seeds))).tolist())

    runs = {
        name: {"fct_mean": values(), "fct_p99": values(), "rejected_share": (0.0,) * seeds, "flows": (100.0,) * seeds}
        for name in PROTOCOL.names
    }
    model = ("agent.pt", "0" * 64) if knows == "trained" else (None, None)
    rule = "lsq" if label == "lsq" else "sed"
    entry = Entry(label, rule, None if model[0] else "cores", *model, "configured" if model[0] else knows)
    return SuiteResult(PROTOCOL.version, PROTOCOL.hash, entry, PROTOCOL.seeds[:seeds], runs, {})


RESULTS = [
    result("lsq", "nothing", 1.0, 0.01),
    result("sed<&>", "configured", 0.9, 0.01),
    result("agent", "trained", 0.8, 0.01),
    result("a-contender-with-a-long-name", "nothing", 9.0, 0.5),
    result("oracle_sed", "oracle", 0.6, 0.01),
]


def nothing_is_fetched(text: str) -> bool:
    return not re.search(r"<(?:script|img|link|iframe)[^>]*\s(?:src|href)=[\"']?(?:https?:)?//", text)


def fits(tab: object) -> bool:
    """Plots are drawn, and nothing but what scrolls is wider than the window."""
    tab.wait_for_function(  # type: ignore[attr-defined]
        "() => window.Bokeh && document.querySelectorAll('figure .bk-Figure').length == "
        "document.querySelectorAll('figure').length"
    )
    script = "document.documentElement.scrollWidth <= window.innerWidth"
    return bool(tab.evaluate(script))  # type: ignore[attr-defined]


def test_the_verdict_of_a_suite() -> None:
    scores = Scores(PROTOCOL, RESULTS)
    said = suite_verdict(scores)
    # The oracle is better, but nobody can have it.
    assert re.match(r"agent has the least mean FCT over 32 scenarios: 0\.\d+ of lsq's, 0\.\d+ \[0\.\d+, 0\.\d+\]", said)
    assert said.endswith("of that of sed<&>, the next. Not a complete result: 2 of 20 seeds.")
    alike = [RESULTS[0], result("same", "nothing", 1.0, 0.01)]
    assert "that difference may be chance" in suite_verdict(Scores(PROTOCOL, alike))
    one = [result("lsq", "nothing", 1.0, 0.1, 1), result("b", "nothing", 0.5, 0.1, 1)]
    assert "one seed cannot show whether by chance" in suite_verdict(Scores(PROTOCOL, one))
    assert suite_verdict(Scores(PROTOCOL, one[:1])).startswith("lsq is the baseline, and there is no other contender")


def test_the_page_of_a_suite(tmp_path: Path, capsys: pytest.CaptureFixture[str], open_page: Open) -> None:
    for each in RESULTS:
        each.save(tmp_path / each.entry.file_name)
    page = tmp_path / "pages" / "suite.html"
    code, out, err = in_process(capsys, "suite", "table", tmp_path, "--report", page)
    assert code == 0 and f"wrote {page}" in out.replace("\n", ""), err
    text = page.read_text()
    assert len(text.encode()) < MOST and nothing_is_fetched(text)
    assert "sed&lt;&amp;&gt;" in text and PROTOCOL.hash in text and f"lbgym suite table {tmp_path}" in text
    for width in (1300, 400):
        with open_page(page.as_uri(), width=width) as tab:
            assert fits(tab) and tab.locator("figure").count() == 6
            tab.get_by_text("Mean FCT by scenario").click()
            assert tab.get_by_text("heavy-tailed").first.is_visible()


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    scenario = Scenario(
        servers=(Server(cores=1), Server(cores=2, speed=0.5), Server(cores=1)),
        workload=Workload(load=0.5, demand=Exponential(mean=0.05)),
        events=(Event(time=15.0, kind="down", server=1),),
    )
    path = tmp_path_factory.mktemp("recording") / "r.parquet"
    return record_at_full_speed(scenario, path, 30.0, weights=lambda t: np.array([1.0, 1.0 + t / 10.0, 1.0]))


def test_the_page_of_a_recording(
    recording: Recording, tmp_path: Path, capsys: pytest.CaptureFixture[str], open_page: Open
) -> None:
    text = recording_report(recording, command="lbgym shm report a b")
    assert len(text.encode()) < MOST and nothing_is_fetched(text) and "lbgym shm report a b" in text
    ended = recording.completed[-1].sum() - recording.completed[0].sum()
    (said,) = re.findall(r'class="verdict">(.*?)</p>', text)
    assert said.startswith(f"3 servers completed {ended:,} flows in 29.9 s, with a mean FCT of ")
    assert re.search(r"; \d+ failed; an agent&#x27;s weights were in force [\d.]+ % of the time\.$", said), said
    page = tmp_path / "recording.html"
    page.write_text(text)
    for width in (1300, 400):
        with open_page(page.as_uri(), width=width) as tab:
            # Load, open flows, weights, rate, the other features and the ground truth.
            assert fits(tab) and tab.locator("figure").count() == 4 + len(FEATURE_NAMES) - 1 + 3
            assert tab.get_by_text("Flow duration: decayed mean").count() == 1


def test_what_is_not_measured_is_left_out(recording: Recording) -> None:
    producers = [{**producer, "real_features": ["n_flow_on"]} for producer in recording.metadata["producers"]]
    text = recording_report(replace(recording, metadata={**recording.metadata, "producers": producers}))
    assert text.count("<figure") == 4 and "Not measured" in text


def test_many_servers_and_restarts(recording: Recording) -> None:
    def many(values: np.ndarray) -> np.ndarray:
        return np.concatenate([values] * 10, axis=1)

    wide = ("active", "stats", "states", "started", "completed", "rejected", "failed", "weights", "safe_weights")
    changed = {name: many(getattr(recording, name)) for name in wide}
    # Few plots are quickly drawn.
    first = dict(recording.metadata["producers"][0], real_features=["n_flow_on"])
    again = dict(first, instance=7)
    instance = np.where(np.arange(len(recording)) < 100, recording.instance, 7)
    metadata = {**recording.metadata, "producers": [first, again]}
    found = replace(
        recording,
        ground_truth=None,
        instance=instance,
        metadata=metadata,
        num_servers=recording.num_servers * 10,
        **changed,
    )
    text = recording_report(found)
    assert "The least, median and largest of 30 servers." in text and "Restarts of the producer</dt><dd>1" in text
    assert len(text.encode()) < MOST


def test_too_short_a_recording_is_refused(recording: Recording) -> None:
    cut = {name: values[:1] for name, values in vars(recording).items() if isinstance(values, np.ndarray)}
    with pytest.raises(RecordingError, match="a page needs two observations or more, and the recording has 1"):
        recording_report(replace(recording, **cut))
