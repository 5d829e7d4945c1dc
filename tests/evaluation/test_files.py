from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from lbgym.atomic import whole_file
from lbgym.evaluation import METRICS, Comparison, compare, save
from lbgym.evaluation.plots import fct_distribution, load_and_weights
from lbgym.scenarios import load_scenario


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return compare("failure", "lsq,sed+latency,wcmp", 3, duration=20.0, processes=1, keep_flows=True)


def test_parquet_equals_memory(comparison: Comparison, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    files = save(comparison, tmp_path / "new" / "folder")
    names = ["results.parquet", "flows.parquet", "summary.json", "fct_distribution.png", "load_and_weights.png"]
    assert [file.name for file in files] == names
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == sorted(names)
    rows = parquet.read_table(files[0]).to_pylist()
    assert len(rows) == 9
    for row, run in zip(rows, comparison.runs, strict=True):
        assert (row["contender"], row["seed"], row["dispatch"]) == (run.label, run.seed, run.dispatch)
        assert {name: row[name] for name in run.metrics} == run.metrics
        assert [row[f"utilization_{j}"] for j in range(6)] == run.utilization.tolist()
    flows = parquet.read_table(files[1])
    kept = [run.flows for run in comparison.runs if run.flows is not None]
    for name in kept[0]:
        assert np.array_equal(flows[name].to_numpy(), np.concatenate([f[name] for f in kept]))
    assert flows["contender"].to_pylist()[0] == "lsq" and set(flows["seed"].to_pylist()) == {0, 1, 2}
    assert json.loads(files[2].read_text()) == comparison.to_dict()
    for file in files[3:]:
        assert file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 10_000


def test_csv_without_pyarrow_equals_memory(
    comparison: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    files = save(comparison, tmp_path, plots=False)
    assert [file.name for file in files] == ["results.csv", "flows.csv", "summary.json"]
    with files[0].open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    for row, run in zip(rows, comparison.runs, strict=True):
        assert (row["contender"], int(row["seed"])) == (run.label, run.seed)
        assert {name: float(row[name]) for name in METRICS} == {name: run.metrics[name] for name in METRICS}
    with files[1].open(newline="") as stream:
        fct = [float(row["fct"]) for row in csv.DictReader(stream)]
    assert fct == [x for run in comparison.runs if run.flows is not None for x in run.flows["fct"].tolist()]


def test_a_file_is_whole_or_the_former_one(tmp_path: Path) -> None:
    target = tmp_path / "summary.json"
    target.write_text("former")
    with pytest.raises(KeyboardInterrupt), whole_file(target) as path:
        path.write_text("hal")
        raise KeyboardInterrupt
    assert target.read_text() == "former" and list(tmp_path.iterdir()) == [target]
    with whole_file(target) as path:
        path.write_text("new")
        assert target.read_text() == "former"
    assert target.read_text() == "new" and list(tmp_path.iterdir()) == [target]
    (tmp_path / "plain").touch()
    assert target.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_distribution_has_a_line_per_contender(comparison: Comparison) -> None:
    axes = fct_distribution(comparison).axes[0]
    assert axes.get_xscale() == axes.get_yscale() == "log"
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ["lsq (baseline)", "sed+latency", "wcmp"]
    line = next(line for line in axes.lines if line.get_label() == "wcmp")
    fct = np.concatenate([r.flows["fct"] for r in comparison.runs_of("wcmp") if r.flows is not None])
    x, y = np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)
    assert (np.diff(y) <= 0).all()
    assert x[np.argmax(y <= 0.1)] == pytest.approx(np.quantile(fct, 0.9), rel=0.03)


def test_lines_of_few_servers(comparison: Comparison) -> None:
    figure = load_and_weights(comparison)
    assert [axes.get_title(loc="left") for axes in figure.axes[:3]] == comparison.labels
    lsq, latency = figure.axes[3], figure.axes[4]
    assert len(figure.axes[0].lines) == 6 and len(latency.lines) == 6
    # lsq has no use for weights, and the picture says so
    assert not lsq.lines and lsq.texts[0].get_text() == "lsq reads no weights"
    # a server that is down has no weight: server 0 from 15 s on
    times, weights = latency.lines[0].get_data()
    assert np.isnan(np.asarray(weights)[np.asarray(times) > 15.3]).all()
    assert np.isfinite(np.asarray(weights)[np.asarray(times) < 14.9]).all()
    one = load_and_weights(comparison, ["wcmp"])
    assert len(one.axes) == 2 and f"(1 of {len(comparison.labels)} contenders)" in one.get_suptitle()


def test_pictures_of_many_servers() -> None:
    many = compare(load_scenario("marllb-large"), "sed,sed+latency", 1, duration=4.0, processes=1)
    figure = load_and_weights(many)
    images = [axes.images[0] for axes in figure.axes[:4]]
    assert all(image.get_array().shape == (24, 16) for image in images)
