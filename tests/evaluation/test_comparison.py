from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from lbgym.errors import PolicyError, ScenarioError, UnknownNameError, WorkerLostError
from lbgym.evaluation import (
    COUNTS,
    METRICS,
    SHORTHANDS,
    WEIGHTED_RULES,
    Comparison,
    Conditions,
    Contender,
    Run,
    RunSettings,
    Verdict,
    compare,
    parse_contender,
    simulate,
)
from lbgym.evaluation.pool import Job, run_jobs
from lbgym.evaluation.runner import agents_of, decide
from lbgym.evaluation.statistics import fct_histogram
from lbgym.policies import HEURISTICS
from lbgym.scenarios import DISPATCH_RULES, Event, Exponential, Scenario, Server, Trace, Workload
from lbgym.simulator import Simulation

SMALL = Scenario(
    name="small",
    servers=(Server(cores=1), Server(cores=2), Server(cores=2, speed=0.5)),
    workload=Workload(load=0.7, demand=Exponential(mean=0.05)),
    balancers=2,
    duration=12.0,
    reject_timeout=5.0,
)
SETTINGS = RunSettings(duration=12.0, warmup=2.0, drain=5.0, keep_flows=True)


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return compare(SMALL, "ecmp,sed,sed+latency", 4, processes=1, keep_flows=True)


def test_every_contender_sees_the_same_flows() -> None:
    plain = [name for name, entry in HEURISTICS.items() if not (entry.tables or entry.background)]
    names = [
        *DISPATCH_RULES,
        *(f"{rule}+{name}" for rule in WEIGHTED_RULES for name in plain),
        *SHORTHANDS,
        "lsq+field",
        "marginal+field",
    ]
    reference = simulate(SMALL, parse_contender("ecmp"), 5, SETTINGS)
    assert reference is not None and reference.flows is not None and len(reference.flows["fct"]) > 300
    fcts = set()
    for name in names:
        run = simulate(SMALL, parse_contender(name), 5, SETTINGS)
        assert run is not None and run.flows is not None
        for column in ("flow_id", "arrival", "demand", "balancer"):
            assert np.array_equal(run.flows[column], reference.flows[column]), (name, column)
        fcts.add(run.metrics["fct_mean"])
    assert len(fcts) > len(names) / 2, "the contenders hardly differ"


def test_another_interval_sees_the_same_flows() -> None:
    runs = [simulate(SMALL, parse_contender("sed+latency"), 5, replace(SETTINGS, interval=i)) for i in (0.25, 0.7, 5.0)]
    flows = [run.flows for run in runs if run is not None and run.flows is not None]
    assert len(flows) == 3
    assert all(np.array_equal(f["arrival"], flows[0]["arrival"]) for f in flows)
    assert len({f["fct"].sum() for f in flows}) == 3


def test_no_flow_of_the_window_is_lost() -> None:
    run = simulate(SMALL, parse_contender("wcmp"), 1, SETTINGS)
    assert run is not None and run.flows is not None
    ids, arrival = run.flows["flow_id"], run.flows["arrival"]
    assert np.array_equal(ids, np.arange(ids[0], ids[-1] + 1))
    assert (arrival >= SETTINGS.warmup).all() and (arrival < SETTINGS.duration).all()
    whole = simulate(SMALL, parse_contender("wcmp"), 1, replace(SETTINGS, warmup=0.0))
    assert whole is not None and whole.flows is not None
    # what came before the warm-up ended is what is missing
    assert whole.flows["arrival"][ids[0] - 1] < SETTINGS.warmup <= arrival[0]
    assert len(whole.flows["arrival"]) == ids[-1] + 1


def test_metrics_are_those_of_the_flows(comparison: Comparison) -> None:
    for run in comparison.runs:
        assert run.flows is not None
        fct, status = run.flows["fct"], run.flows["status"]
        assert run.metrics["fct_mean"] == pytest.approx(fct.mean(), rel=1e-12)
        for name, q in (("fct_p50", 50), ("fct_p90", 90), ("fct_p99", 99), ("fct_p999", 99.9)):
            assert run.metrics[name] == pytest.approx(np.percentile(fct, q), rel=1e-12)
        assert run.metrics["completed"] == (status == 0).sum()
        assert run.metrics["flows"] == len(fct)
        load = run.utilization
        assert run.metrics["jain"] == pytest.approx(load.sum() ** 2 / (len(load) * (load**2).sum()), rel=1e-12)


def test_utilization_carries_the_offered_work() -> None:
    long = RunSettings(duration=300.0, warmup=50.0, drain=5.0)
    run = simulate(SMALL, parse_contender("sed"), 2, long)
    assert run is not None and (run.utilization > 0).all() and (run.utilization <= 1 + 1e-9).all()
    work = sum(u * server.capacity for u, server in zip(run.utilization, SMALL.servers, strict=True))
    assert work / SMALL.capacity == pytest.approx(SMALL.load, rel=0.1)


def test_lost_flows_count_with_the_reject_timeout() -> None:
    full = replace(
        SMALL,
        servers=(Server(workers=2, backlog=1), Server(workers=2, backlog=1)),
        workload=Workload(load=1.5, demand=Exponential(mean=0.05)),
        events=(Event(time=6.0, kind="down", server=0), Event(time=8.0, kind="down", server=1)),
    )
    run = simulate(full, parse_contender("lsq"), 3, SETTINGS)
    assert run is not None and run.flows is not None
    metrics, status = run.metrics, run.flows["status"]
    assert min(metrics["rejected"], metrics["failed"], metrics["unrouted"]) > 0 and metrics["open"] == 0
    assert (run.flows["fct"][status > 0] == full.reject_timeout).all()
    assert (run.flows["server"][status == 3] == -1).all()
    lost = metrics["rejected"] + metrics["failed"] + metrics["unrouted"]
    assert metrics["rejected_share"] == pytest.approx(lost / metrics["flows"])
    assert metrics["completed"] + lost == metrics["flows"]


def test_flows_still_open_count_with_their_age() -> None:
    overloaded = SMALL.with_changes(load=1.5)
    settings = replace(SETTINGS, drain=3.0)
    run = simulate(overloaded, parse_contender("sed"), 3, settings)
    assert run is not None and run.flows is not None
    still = run.flows["status"] == 4
    assert 0 < still.sum() == run.metrics["open"]
    end = settings.duration + settings.drain
    assert run.flows["fct"][still] == pytest.approx(end - run.flows["arrival"][still])
    # given the time, they take longer than that
    later = simulate(overloaded, parse_contender("sed"), 3, replace(settings, drain=60.0))
    assert later is not None and later.flows is not None and later.metrics["open"] < run.metrics["open"]
    assert (later.flows["fct"][still] > run.flows["fct"][still]).all()
    assert np.array_equal(later.flows["fct"][~still], run.flows["fct"][~still])


def test_each_balancer_follows_its_own_observation() -> None:
    agents = agents_of(parse_contender("sed+latency"), SMALL, 0)
    simulation = Simulation(SMALL)
    snapshot, in_force = simulation.reset([0]), np.ones((1, 2, 3))
    for _ in range(20):
        in_force = decide(agents, snapshot, in_force)
        snapshot = simulation.step(in_force, 0.25)
    weights = decide(agents, snapshot, in_force)[0]
    assert weights.shape == (2, 3) and not np.allclose(weights[0], weights[1])


def test_random_weights_differ_between_balancers_and_seeds_but_not_between_runs() -> None:
    first, again, other = (
        simulate(SMALL, parse_contender("sed+random"), seed, SETTINGS, series=True) for seed in (1, 1, 2)
    )
    assert first is not None and again is not None and other is not None
    assert first.series is not None and again.series is not None and other.series is not None
    assert np.array_equal(first.series.weights, again.series.weights)
    assert not np.array_equal(first.series.weights, other.series.weights)
    assert first.metrics == again.metrics


def test_processes_do_not_change_the_result(comparison: Comparison) -> None:
    calls: list[tuple[int, int]] = []
    parallel = compare(
        SMALL, "ecmp,sed,sed+latency", 4, processes=2, keep_flows=True, progress=lambda *a: calls.append(a[:2])
    )
    assert calls == [(i, 12) for i in range(1, 13)]
    for a, b in zip(comparison.runs, parallel.runs, strict=True):
        assert (a.label, a.seed, a.metrics) == (b.label, b.seed, b.metrics)
        assert a.flows is not None and b.flows is not None and np.array_equal(a.flows["fct"], b.flows["fct"])
        assert (a.series is None) == (b.series is None)


def test_intervals_and_differences(comparison: Comparison) -> None:
    assert comparison.baseline == "ecmp"
    ecmp, sed = comparison.values("ecmp", "fct_mean"), comparison.values("sed", "fct_mean")
    low, high = stats.t.interval(0.95, 3, loc=sed.mean(), scale=stats.sem(sed))
    interval = comparison.interval("sed", "fct_mean")
    assert (interval.low, interval.high) == pytest.approx((low, high))
    expected = stats.ttest_rel(sed, ecmp).confidence_interval(0.95)
    difference = comparison.difference("sed", "fct_mean")
    assert (difference.absolute.low, difference.absolute.high) == pytest.approx((expected.low, expected.high))
    turned = comparison.difference("ecmp", "fct_mean", baseline="sed")
    assert turned.absolute.mean == pytest.approx(-difference.absolute.mean)
    assert comparison.difference("ecmp", "fct_mean").absolute.mean == 0


def test_the_order_is_that_of_contenders_and_seeds(comparison: Comparison) -> None:
    assert [(r.label, r.seed) for r in comparison.runs] == [(c, s) for c in comparison.labels for s in range(4)]
    assert [r.seed for r in comparison.runs_of("sed") if r.series is not None] == [0]


def test_ccdf_is_that_of_all_flows(comparison: Comparison) -> None:
    edges, longer = comparison.fct_ccdf("sed")
    fct = np.concatenate([r.flows["fct"] for r in comparison.runs_of("sed") if r.flows is not None])
    for x in (0.01, 0.05, 0.2):
        near = longer[np.searchsorted(edges, x)]
        assert (fct > x * 1.01).mean() - 1e-12 <= near <= (fct > x).mean() + 1e-12


def test_json_holds_it_all(comparison: Comparison) -> None:
    data = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    assert [c["label"] for c in data["contenders"]] == comparison.labels
    sed = data["contenders"][1]
    assert sed["dispatch"] == "sed" and sed["policy"] == "cores"
    assert sed["metrics"]["fct_mean"]["mean"] == pytest.approx(comparison.interval("sed", "fct_mean").mean)
    assert sed["versus_baseline"]["fct_p99"]["relative_percent"]["n"] == 4
    assert [run["seed"] for run in sed["runs"]] == [0, 1, 2, 3]
    assert sed["runs"][2]["fct_mean"] == comparison.values("sed", "fct_mean")[2]


def test_one_seed_has_no_intervals() -> None:
    single = compare(SMALL, "sed,lsq", 1, processes=1)
    assert math.isnan(single.interval("sed", "fct_mean").half_width)
    json.dumps(single.to_dict(), allow_nan=False)
    assert len(single.table().rows) == 2 and len(single.difference_table().rows) == 1


def test_a_trace_is_replayed_as_it_is() -> None:
    rng = np.random.default_rng(1)
    trace = Trace(times=np.sort(rng.uniform(0, 10, 800)), demands=rng.exponential(0.02, 800))
    scenario = replace(SMALL, workload=Workload(trace=trace))
    run = simulate(scenario, parse_contender("lsq"), 0, RunSettings(9.0, 0.0, 5.0, keep_flows=True))
    assert run is not None and run.flows is not None
    counts = trace.times - trace.times[0] < 9.0
    assert run.flows["demand"] == pytest.approx(trace.demands[: len(run.flows["demand"])])
    assert abs(len(run.flows["demand"]) - counts.sum()) <= 10


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"contenders": "sed", "baseline": "lsq"}, UnknownNameError, "unknown baseline 'lsq'"),
        ({"contenders": "sed", "seeds": 0}, ScenarioError, "seeds must be"),
        ({"contenders": "sed", "seeds": [1, 1]}, ScenarioError, "seeds must be"),
        ({"contenders": "sed", "seeds": [-1]}, ScenarioError, "seeds must be"),
        ({"contenders": "sed", "seeds": [0.5, 1.5]}, ScenarioError, "each of the seeds must be a whole .*, got 0.5"),
        ({"contenders": "sed", "seeds": 2.0}, ScenarioError, "seeds must be a list of whole numbers, got 2.0"),
        ({"contenders": "sed", "seeds": "12"}, ScenarioError, "seeds must be a list of whole numbers, got '12'"),
        ({"contenders": "sed", "seeds": True}, ScenarioError, "the number of seeds must be a whole number"),
        ({"contenders": "sed", "duration": "5"}, ScenarioError, "duration must be a finite number above 0 .*, got '5'"),
        ({"contenders": "sed", "warmup": "5"}, ScenarioError, "warmup must be"),
        ({"contenders": "sed", "drain": "5"}, ScenarioError, "drain must be"),
        ({"contenders": "sed", "interval": "5"}, ScenarioError, "interval must be"),
        ({"contenders": "sed", "duration": 0}, ScenarioError, "duration must be"),
        ({"contenders": "sed", "duration": math.nan}, ScenarioError, "duration must be"),
        ({"contenders": "sed", "warmup": 12.0}, ScenarioError, "warmup must be"),
        ({"contenders": "sed", "drain": -1.0}, ScenarioError, "drain must be"),
        ({"contenders": "sed", "interval": 0.0}, ScenarioError, "interval must be"),
        ({"contenders": "sed", "processes": 0}, ScenarioError, "processes must be"),
        ({"contenders": "sed", "duration": 1e-3, "warmup": 9e-4}, ScenarioError, "no flow of scenario 'small' arrives"),
        ({"contenders": ""}, PolicyError, "at least one contender"),
    ],
)
def test_bad_arguments(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        compare(SMALL, **{"processes": 1, **arguments})


def test_numbers_of_numpy_are_as_good_as_pythons() -> None:
    keys = {"contenders": "sed", "processes": 1}
    plain = compare(SMALL, seeds=1, duration=3, **keys)
    for seeds in (np.int64(1), np.arange(1)):
        made = compare(SMALL, seeds=seeds, duration=np.float64(3.0), **keys)
        assert made.to_dict() == plain.to_dict()


def test_an_error_in_another_process_comes_back_as_it_is() -> None:
    with pytest.raises(ScenarioError, match="no flow of scenario 'small' arrives"):
        compare(SMALL, "sed,lsq", 2, duration=1e-3, warmup=9e-4, processes=2)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("killed", [(0, 1), (0,), (1,)])
def test_a_process_is_killed_in_the_middle_of_its_result(killed: tuple[int, ...]) -> None:
    """What has been read of the result then is half of it, and no end of anything; nor is it where the other one is
    stuck in the middle of its own."""
    settings = replace(SETTINGS, duration=400.0)
    jobs = [Job(0, parse_contender("sed"), seed) for seed in range(8)]
    runs = run_jobs([(SMALL, settings)], jobs, processes=2)
    next(runs)
    workers = sorted(process.pid or 0 for process in multiprocessing.active_children())
    # Nobody takes their results: both wait in the middle of one, which no pipe can hold.
    ticks, since, deadline = 0, time.monotonic(), time.monotonic() + 120.0
    while time.monotonic() - since < 1.0:
        assert time.monotonic() < deadline
        used = sum(sum(map(int, Path(f"/proc/{pid}/stat").read_text().split()[13:15])) for pid in workers)
        ticks, since = (ticks, since) if used == ticks else (used, time.monotonic())
        time.sleep(0.05)
    for number, pid in enumerate(workers):
        if number not in killed:
            os.kill(pid, signal.SIGSTOP)
    for number in killed:
        os.kill(workers[number], signal.SIGKILL)
    with pytest.raises(WorkerLostError, match="one of the 2 processes that make the runs was killed"):
        list(runs)
    assert not multiprocessing.active_children()


def test_unknown_labels_and_metrics(comparison: Comparison) -> None:
    with pytest.raises(UnknownNameError, match="unknown contender 'lsq'"):
        comparison.values("lsq", "fct_mean")
    with pytest.raises(UnknownNameError, match="unknown metric 'fct_p95'"):
        comparison.values("sed", "fct_p95")


def test_overload_is_said(caplog: pytest.LogCaptureFixture) -> None:
    compare(SMALL.with_changes(load=1.3), "sed", 1, duration=3.0, processes=1)
    assert "offers 1.30 times the capacity" in caplog.text


def test_tables_show_every_number(comparison: Comparison) -> None:
    text = comparison.table().text()
    assert max(map(len, text.splitlines())) <= 120 and all(label in text for label in comparison.labels)
    header = next(line for line in text.splitlines() if "contender" in line)
    assert header.split()[:9] == ["contender", "mean", "p50", "p90", "p99", "p99.9", "Jain", "rejected,", "%"]
    row = next(line for line in text.splitlines() if line.split()[:1] == ["sed"]).split()
    interval = comparison.interval("sed", "fct_mean")
    assert float(row[1]) == pytest.approx(1e3 * interval.mean, rel=0.01)
    assert float(row[2].removeprefix("±")) == pytest.approx(1e3 * interval.half_width, rel=0.2)
    differences = comparison.difference_table().text()
    assert "Difference from ecmp" in differences
    row = next(line for line in differences.splitlines() if line.split()[:1] == ["sed"]).split()
    assert float(row[1]) == pytest.approx(comparison.difference("sed", "fct_mean").relative.mean, abs=0.1)


def test_cells_say_what_is_better(comparison: Comparison) -> None:
    columns = comparison.table().columns
    mean, jain = columns.index("mean"), columns.index("Jain")
    cells = {row[0].text: row for row in comparison.table().rows}
    least = min(comparison.labels, key=lambda label: comparison.interval(label, "fct_mean").mean)
    assert [label for label, row in cells.items() if row[mean].verdict is Verdict.BEST] == [least]
    fairest = max(comparison.labels, key=lambda label: comparison.interval(label, "jain").mean)
    assert cells[fairest][jain].verdict is Verdict.BEST
    for label, *row in comparison.difference_table().rows:
        interval = comparison.difference(label.text, "fct_mean").relative
        expected = Verdict.BETTER if interval.high < 0 else Verdict.WORSE if interval.low > 0 else Verdict.UNCLEAR
        assert row[mean - 1].verdict is expected


def test_a_narrow_table_puts_half_widths_below(comparison: Comparison) -> None:
    for table in (comparison.table(), comparison.difference_table()):
        wide, narrow = table.text(), table.text(80)
        assert max(map(len, narrow.splitlines()[1:])) <= 80 < max(map(len, wide.splitlines()[1:]))
        assert set(narrow.split()) == set(wide.split()) - {"-" * n for n in range(1, 200)} | {
            word for word in narrow.split() if set(word) == {"-"}
        }


def test_printed_it_is_readable_text(
    comparison: Comparison, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    print(comparison)
    out = capsys.readouterr().out
    assert out == f"{comparison.table()}\n\n{comparison.difference_table()}\n"
    assert out.startswith("FCT in ms: mean ±") and "object at" not in out
    assert comparison.table()._repr_html_().count("<tr>") == 4


def test_a_comparison_is_filled_without_a_simulator() -> None:
    """As from a testbed, where capacity and load are not known."""
    rng = np.random.default_rng(0)
    labels, seeds = ("a", "b"), (0, 1, 2)
    runs = []
    for label in labels:
        for seed in seeds:
            fct = rng.exponential(0.1 if label == "a" else 0.2, 1000)
            metrics = {name: math.nan for name in METRICS} | dict.fromkeys(COUNTS, 0)
            metrics |= {"fct_mean": float(fct.mean()), "flows": len(fct), "completed": len(fct)}
            runs.append(Run(label, seed, "lsq", metrics, np.full(4, math.nan), fct_histogram(fct)))
    measured = Comparison(
        scenario="rack-3",
        balancers=1,
        conditions=(Conditions(servers=4),) * 3,
        contenders=tuple(Contender(label, "lsq", "cores") for label in labels),
        seeds=seeds,
        baseline="a",
        settings=RunSettings(60.0, 10.0, 0.0),
        runs=tuple(runs),
    )
    data = json.loads(json.dumps(measured.to_dict(), allow_nan=False))
    assert data["scenario"]["load"] is None and data["scenario"]["servers"] == 4
    assert data["contenders"][0]["runs"][0]["flows"] == 1000
    assert str(measured).count("\n") >= 8 and "b is not shown to have a lower mean FCT" in measured.verdict(
        "b", ["fct_mean"]
    )
    edges, longer = measured.fct_ccdf("b")
    assert longer[np.searchsorted(edges, 0.2)] == pytest.approx(math.exp(-1), abs=0.03)


def test_verdict_says_what_the_intervals_say(comparison: Comparison) -> None:
    text = comparison.verdict("sed")
    assert "sed has a lower mean and p99 FCT than ecmp" in text
    assert "ecmp is not shown to have a lower mean and p99 FCT than sed (" in comparison.verdict("ecmp")
    assert len(comparison.versus_table("sed").rows) == 2


def test_metrics_have_a_heading_each() -> None:
    from lbgym.evaluation.tables import HEADINGS

    assert set(HEADINGS) == set(METRICS)
