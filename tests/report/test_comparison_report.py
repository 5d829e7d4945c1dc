"""``lbgym compare --report``: one file, which a browser shows without a network."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from lbgym.errors import MissingExtraError
from lbgym.evaluation import Comparison, compare
from lbgym.report import comparison_report, save_report
from lbgym.report.charts import thinned
from lbgym.report.comparison import verdict
from lbgym.scenarios import Scenario, Server, Workload, load_scenario
from tests.report.conftest import Open
from tests.test_cli import in_process

pytest.importorskip("bokeh")
pytest.importorskip("scipy")

#: Bytes.
MOST = 3_000_000


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return compare("failure", "lsq,sed+latency,<b>&co=wcmp", 3, duration=20.0, processes=1)


@pytest.fixture(scope="module")
def page(comparison: Comparison, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    save_report(comparison, path, scenario=load_scenario("failure"), command="lbgym compare -s failure --report x")
    return path


def test_the_file_has_all_and_is_small(comparison: Comparison, page: Path) -> None:
    text = page.read_text()
    assert len(text.encode()) < MOST
    # Nothing is fetched: no address in a tag that a browser would load.
    assert not re.search(r"<(?:script|img|link|iframe)[^>]*\s(?:src|href)=[\"']?(?:https?:)?//", text)
    for part in ("lbgym compare -s failure --report x", "numpy", "[[servers]]", "&lt;b&gt;&amp;co"):
        assert part in text, part
    for table in (comparison.table(), comparison.difference_table()):
        for row in table.rows:
            for cell in row:
                assert f"{cell.text} {cell.spread}".rstrip() in text or cell.text == "<b>&co"


def test_a_browser_shows_it(page: Path, comparison: Comparison, open_page: Open) -> None:
    with open_page(page.as_uri(), height=1400) as tab:
        tab.wait_for_function("() => window.Bokeh && Bokeh.documents.length > 0")
        # Distribution, two differences, open flows, one per contender and the weights of the one that moves them.
        figures = tab.locator("figure")
        assert figures.count() == 4 + len(comparison.labels) + 1
        assert tab.get_by_text("sed+latency: weights").count() == 1
        tab.wait_for_function("n => document.querySelectorAll('figure .bk-Figure').length == n", arg=figures.count())
        tab.wait_for_timeout(500)
        assert tab.inner_text(".verdict") == " ".join(verdict(comparison).split())
        # Nothing is wider than the window, and every plot has a height.
        assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        heights = tab.evaluate("[...document.querySelectorAll('figure .bk-Figure')].map(f => f.clientHeight)")
        assert min(heights) > 100
        # A name in the legend hides its line.
        hidden = """() => {
            const figure = Bokeh.documents[0].roots()[0];
            const legend = figure.right.find(part => part.type == "Legend");
            legend.items[0].renderers[0].visible = false;
            return figure.renderers.filter(line => line.visible).length;
        }"""
        assert tab.evaluate(hidden) == len(comparison.labels) - 1
        tab.locator("summary").click()
        assert "[[servers]]" in tab.inner_text("pre")


def test_a_narrow_window(page: Path, open_page: Open) -> None:
    with open_page(page.as_uri(), width=420) as tab:
        tab.wait_for_function("() => window.Bokeh && Bokeh.documents.length > 0")
        assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_one_contender_one_seed_and_many_servers(open_page: Open, tmp_path: Path) -> None:
    many = Scenario(servers=(Server(),) * 40, workload=Workload(load=0.5), duration=6.0)
    alone = compare(many, "sed", 1, processes=1)
    assert verdict(alone).startswith("sed has a mean FCT of ")
    save_report(alone, tmp_path / "alone.html")
    text = (tmp_path / "alone.html").read_text()
    assert "median" in text and "server 17" not in text
    with open_page((tmp_path / "alone.html").as_uri()) as tab:
        tab.wait_for_function("() => window.Bokeh && Bokeh.documents.length > 0")
        assert tab.locator("figure").count() == 3
    two = compare(many, "sed,lsq", 1, processes=1)
    assert "one seed cannot show whether by chance" in verdict(two)
    assert "nan" not in two.verdict("sed") + two.verdict("lsq")
    assert len(comparison_report(two).encode()) < MOST


def test_means_of_parts() -> None:
    assert thinned(np.array([1.0, 3.0, 5.0, 7.0, 10.0]), 2).tolist() == [2.0, 6.0, 10.0]


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "report.html"
    arguments = ["compare", "-s", "uniform", "-p", "sed,lsq", "-n", 2, "--duration", 2, "--processes", 1, "--quiet"]
    code, out, _ = in_process(capsys, *arguments, "--report", path)
    assert code == 0 and f"wrote {path}" in out.replace("\n", "")
    assert f"lbgym compare -s uniform -p sed,lsq -n 2 --duration 2 --processes 1 --quiet --report {path}" in (
        path.read_text()
    )


def test_without_bokeh(monkeypatch: pytest.MonkeyPatch, comparison: Comparison) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "bokeh", None)
    with pytest.raises(MissingExtraError, match=r"an HTML report needs 'bokeh'.*lbgym\[report\]"):
        comparison_report(comparison)
