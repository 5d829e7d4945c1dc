"""Every format of trace, everything that can be wrong with one, and the real ones where they are present."""

from __future__ import annotations

import builtins
import gzip
import io
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lbgym.errors import LbgymError, MissingExtraError, ScenarioError, TraceError
from lbgym.scenarios import (
    TRACE_FORMATS,
    TRACE_OPTIONS,
    Scenario,
    Server,
    Trace,
    Workload,
    from_toml,
    read_trace,
    to_toml,
    write_trace,
)
from lbgym.simulator import Simulation

REAL = Path(__file__).parents[2] / ".." / "shared" / "traces"

CSV = "time,demand\n10,0.5\n10.5,1\n12,0.25\n"
MARLLB = "time\tquery\n0.1\t/dummy.php/?n=1000\n0.3\t/dummy.php/?n=0\n1.1\t/x?a=b&n=500&c=d\n"
AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 23:59:59.9799600,1000,80\n2023-11-17 00:00:00.0319601,0,40\n"
)
CLF = (
    '10.0.0.1 - - [17/May/2015:10:05:03 +0000] "GET /a HTTP/1.1" 200 1000 "http://x/" "Agent (1; \\"2\\")"\n'
    '10.0.0.2 - jo smith [17/May/2015:10:05:03 +0000] "GET /b HTTP/1.1" 304 -\n'
    '::1 - - [17/May/2015:12:05:05 +0200] "POST /\\"c\\" HTTP/2.0" 201 50\r\n'
    '10.0.0.1 - - [17/May/2015:10:05:02 +0000] "GET /late HTTP/1.1" 200 10 "-" "caf\xe9" 0.004\n'
)
TEXTS = {"csv": CSV, "marllb": MARLLB, "azure-llm": AZURE, "clf": CLF}


@pytest.fixture
def file(tmp_path: Path) -> Any:
    def make(content: str | bytes, name: str = "t.txt") -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return make


def parquet(times: Any, demands: Any, names: tuple[str, str] = ("time", "demand")) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(dict(zip(names, (times, demands), strict=True))), sink)
    return sink.getvalue().to_pybytes()


def parquet_of(**columns: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


# Formats


def test_csv(file: Any) -> None:
    trace = read_trace(file(CSV))
    np.testing.assert_allclose(trace.times, [0, 0.5, 2])
    np.testing.assert_allclose(trace.demands, [0.5, 1, 0.25])
    assert (trace.repeat, trace.random_start, trace.skipped) == (True, False, 0)
    assert trace.source.endswith("t.txt")


@pytest.mark.parametrize(
    "text",
    [
        "demand;time\n0.5;10\n1;10.5\n0.25;12\n",
        "id\tdemand\ttime\n1\t.5\t1e1\n2\t1.\t+10.5\n3\t2.5e-1\t12",
        ' "time" , demand ,"a, b"\r\n10,"0.5","x, y"\r\n\r\n10.5,1\r\n12,0.25,extra,cells\r\n\r\n',
        "\ufefftime,demand\n10,0.5\n10.5,1\n12,0.25\n",
        "\n\ntime,demand\n10,0.5\n10.5,1\n12,0.25\n",
        "time,demand\n2020-02-28T23:59:59Z,0.5\n2020-02-29 00:59:59.5+01:00,1\n2020-02-28 18:30:01-0530,0.25\n",
    ],
)
def test_csv_as_people_write_it(file: Any, text: str) -> None:
    trace = read_trace(file(text))
    np.testing.assert_allclose(trace.times, [0, 0.5, 2])
    np.testing.assert_allclose(trace.demands, [0.5, 1, 0.25])


def test_named_columns(file: Any) -> None:
    path = file("time,start,cpu,demand\n9,0,2,9\n9,4,3,9\n")
    trace = read_trace(path, time_column="start", demand_column="cpu")
    assert (trace.times.tolist(), trace.demands.tolist()) == ([0, 4], [2, 3])


def test_marllb(file: Any) -> None:
    trace = read_trace(file(MARLLB), seconds_per_iteration=0.001)
    np.testing.assert_allclose(trace.times, [0, 0.2, 1.0])
    np.testing.assert_allclose(trace.demands, [1.0, 0.0, 0.5])
    np.testing.assert_allclose(read_trace(file(MARLLB)).demands, np.array([1000, 0, 500]) * 0.2 / 3.67e6)


def test_marllb_without_its_header_line(file: Any) -> None:
    path = file(MARLLB.split("\n", 1)[1])
    assert read_trace(path).times.tolist() == read_trace(path, "marllb").times.tolist() == pytest.approx([0, 0.2, 1.0])


def test_azure_llm_keeps_the_clock_of_100_ns(file: Any) -> None:
    trace = read_trace(file(AZURE), prefill_rate=1000, decode_rate=40)
    assert trace.times[1] == pytest.approx(0.0520001, abs=1e-12)
    np.testing.assert_allclose(trace.demands, [1 + 2, 1])
    np.testing.assert_allclose(read_trace(file(AZURE)).demands, [0.1 + 1, 0.5])


def test_access_log_is_sorted_and_its_seconds_are_filled_evenly(file: Any) -> None:
    trace = read_trace(file(CLF.encode("latin-1")))
    # Seconds 2, 3, 3, 5 with one, two and one flow: at 1/2, 1/4 and 3/4, 1/2 of them.
    np.testing.assert_allclose(trace.times, np.array([2.5, 3.25, 3.75, 5.5]) - 2.5)
    np.testing.assert_allclose(trace.demands, 0.005 + 1e-7 * np.array([10, 1000, 0, 50]))
    other = read_trace(file(CLF.encode("latin-1")), "clf", base_demand=0, seconds_per_byte=2)
    np.testing.assert_allclose(other.demands, [20, 2000, 0, 100])


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_parquet_with_timestamps(file: Any, unit: str) -> None:
    start = np.datetime64("2023-11-16T18:00:00", unit)
    times = pa.array(start + np.array([0, 1, 3600]) * np.timedelta64(1, "s").astype(f"timedelta64[{unit}]"))
    trace = read_trace(file(parquet(times, pa.array([1, 2, 3], pa.int32()))))
    assert (trace.times.tolist(), trace.demands.tolist()) == ([0, 1, 3600], [1, 2, 3])


def test_parquet_with_numbers_and_named_columns(file: Any) -> None:
    data = parquet([1.5, 2.5], pa.array([1, 2], pa.float32()), ("t", "d"))
    trace = read_trace(file(data), "parquet", time_column="t", demand_column="d")
    assert (trace.times.tolist(), trace.demands.tolist()) == ([0, 1], [1, 2])


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("level", [0, 9])
def test_gzip_is_told_by_content_and_so_is_the_format(file: Any, kind: str, level: int) -> None:
    plain = read_trace(file(TEXTS[kind], "plain"), kind)
    packed = read_trace(file(gzip.compress(TEXTS[kind].encode(), level, mtime=0), "not-gz-by-name.csv"))
    np.testing.assert_array_equal(packed.times, plain.times)
    np.testing.assert_array_equal(packed.demands, plain.demands)
    assert packed.origin is not None
    assert packed.origin["format"] == kind


def test_parquet_with_two_columns_of_a_name(file: Any) -> None:
    table = pa.table([[1.0, 2.0], [1.0, 2.0], [3.0, 4.0]], names=["time", "demand", "time"])
    stream = io.BytesIO()
    pq.write_table(table, stream)
    with pytest.raises(TraceError, match="the Parquet trace has 2 columns 'time', which must be one"):
        read_trace(file(stream.getvalue()))


def test_gzip_of_several_members_and_of_parquet(file: Any) -> None:
    two = gzip.compress(b"time,demand\n0,1\n", mtime=0) + gzip.compress(b"2,3\n")
    assert read_trace(file(two)).times.tolist() == [0, 2]
    assert read_trace(file(gzip.compress(parquet([0.0, 2.0], [1.0, 3.0]), mtime=0))).times.tolist() == [0, 2]


# Options


def test_speedup_scale_and_the_rest(file: Any) -> None:
    trace = read_trace(file(CSV), speedup=2, scale=10, repeat=False, random_start=True)
    np.testing.assert_allclose(trace.times, [0, 0.25, 1])
    np.testing.assert_allclose(trace.demands, [5, 10, 2.5])
    assert (trace.repeat, trace.random_start) == (False, True)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"format": "cvs"}, r"unknown trace format 'cvs'. Did you mean 'csv'\?"),
        ({"on_error": "ignore"}, r"unknown on_error 'ignore'.*Known: raise, skip"),
        ({"speedup": 0}, "trace speedup must be a finite number above 0, got 0"),
        ({"scale": "2"}, "trace scale must be a finite number above 0, got '2'"),
        ({"repeat": "no"}, "trace repeat must be true or false, got 'no'"),
        ({"random_start": 1}, "trace random_start must be true or false, got 1"),
        ({"time_column": 3}, "trace time_column must be text, got 3"),
        ({"decode_rate": 50.0}, "'decode_rate' does not apply to the format 'csv' without input_tokens_column"),
        (
            {"format": "csv", "input_tokens_column": "demand"},
            "input_tokens_column and output_tokens_column together, got input_tok",
        ),
        ({"time_unit": "m"}, "unknown time_unit 'm'.*Known: ms, ns, s, us"),
        ({"sort": 1}, "trace sort must be true or false, got 1"),
        ({"clock_resolution": -1}, "trace clock_resolution must be a finite number of at least 0, got -1"),
        ({"prefill_rate": 0}, "trace prefill_rate must be a finite number above 0, got 0"),
        ({"base_demand": -1}, "trace base_demand must be a finite number of at least 0, got -1"),
        (
            {"base_demand": 50.0},
            r"t.txt: trace option 'base_demand' does not apply to the format 'csv', which takes: time_column",
        ),
    ],
)
def test_wrong_options(file: Any, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(LbgymError, match=sentence):
        read_trace(file(CSV), **options)
    with pytest.raises(ScenarioError, match="trace path must be a path, got 3"):
        read_trace(3)  # type: ignore[arg-type]


def test_too_much_speed_is_refused(file: Any) -> None:
    with pytest.raises(ScenarioError, match=r"times must be from 0 to 1e\+15, got inf for flow 1"):
        read_trace(file(CSV), speedup=1e-320)


def test_the_options_of_toml_files_are_the_keywords_of_the_function() -> None:
    keywords = set(read_trace.__annotations__) - {"path", "return"}
    assert set(TRACE_OPTIONS) == keywords


# Malformed lines


MALFORMED = [
    ("csv", "0.5", "1 columns where at least 2 are needed"),
    ("csv", "x,1", "time must be a number, got 'x'"),
    ("csv", "11,", "demand must be a number, got ''"),
    ("csv", "11,-0.5", "demand must be at least 0, got '-0.5'"),
    ("csv", "nan,1", "time must be a number, got 'nan'"),
    ("csv", "11,inf", "demand must be a number, got 'inf'"),
    ("csv", "11,1_0", "demand must be a number, got '1_0'"),
    ("csv", "11,\u0663", "demand must be a number, got '\u0663'"),
    ("csv", "11,1e999", "demand must be at most 1e+15, got '1e999'"),
    ("csv", "11,5e-324", "the demand must be 0 or at least 1e-09 core-seconds, got 4.94066e-324"),
    ("csv", "0,5;1", "demand must be a number, got '5;1'"),
    ("csv", '"11,5",1', "time must be a number, got '11,5'; write a decimal point, 11.5"),
    ("csv", "# 11,1", "this looks like a comment: remove comment lines, as by grep -v '^#'"),
    ("csv", "2020-13-01 00:00:00,1", "month must be in 1..12"),
    ("csv", "2020-01-01 25:00:00,1", "no such time of day: 25:00:00"),
    ("csv", "12:30,1", "the time must be like 2023-11-16 18:17:03.97, got '12:30'"),
    ("marllb", "2.0", "1 columns where at least 2 are needed"),
    ("marllb", "2.0\t/dummy.php", "the query has no n=ITERATIONS: '/dummy.php'"),
    ("marllb", "2.0\t/?n=-5", "n must be at least 0, got '-5'"),
    ("marllb", "2.0\t/?n=abc", "n must be a number, got 'abc'"),
    ("marllb", "2.0\t/?n=1e15&n=2", ""),
    ("azure-llm", "yesterday,1,1", "the time must be like 2023-11-16 18:17:03.97, got 'yesterday'"),
    ("azure-llm", "2023-11-18 00:00:00,-4,1", "ContextTokens must be at least 0, got '-4'"),
    ("azure-llm", "2023-11-18 00:00:00,4,", "GeneratedTokens must be a number, got ''"),
    ("azure-llm", "2023-02-30 00:00:00,4,4", "day is out of range for month"),
    ("clf", "hello", "not in the common or combined log format: 'hello'"),
    ("clf", '1 - - [17/May/2015:10:05:03 +0000] "GET /a" 200 -5', "not in the common or combined log format"),
    ("clf", '1 - - [17/May/2015:10:05:03 +0000] "GET /a" 200 12x', "not in the common or combined log format"),
    ("clf", '1 - - [17/May/2015:10:05:03 +0000] "GET /a 200 5', "not in the common or combined log format"),
    ("clf", '1 - - [17/Mai/2015:10:05:03 +0000] "GET /a" 200 5', "no such month: 'Mai'"),
    ("clf", '1 - - [31/Apr/2015:10:05:03 +0000] "GET /a" 200 5', "day is out of range for month"),
    ("clf", '1 - - [17/May/2015:24:05:03 +0000] "GET /a" 200 5', "no such time of day: 24:05:03"),
    (
        "clf",
        '1 - - [17/May/2015:10:05:03 +0000] "GET /a" 200 ' + "9" * 40,
        "a response of 9999999999999999999999999999999999999999 bytes; at most 1e+15",
    ),
]


@pytest.mark.parametrize(("kind", "line", "sentence"), [case for case in MALFORMED if case[2]])
def test_a_malformed_line_is_an_error_with_its_number_or_is_skipped(
    file: Any, caplog: pytest.LogCaptureFixture, kind: str, line: str, sentence: str
) -> None:
    good = TEXTS[kind].encode("latin-1").rstrip(b"\n")
    path = file(good + b"\n" + line.encode() + b"\n")
    number = good.count(b"\n") + 2
    for form in (kind, "auto"):
        with pytest.raises(TraceError) as caught:
            read_trace(path, form)
        assert f"t.txt:{number}: {sentence}" in str(caught.value)
    assert not caplog.records
    with caplog.at_level(logging.WARNING, "lbgym"):
        trace = read_trace(path, on_error="skip")
    reference = read_trace(file(good, "good.txt"))
    np.testing.assert_array_equal(trace.times, reference.times)
    assert trace.skipped == 1
    total = len(reference.times) + 1
    assert f"t.txt: skipped 1 of {total} lines; the first, line {number}: {sentence}" in caplog.text


def test_all_skipped_lines_are_counted_and_the_first_is_named(file: Any, caplog: pytest.LogCaptureFixture) -> None:
    path = file("time,demand\n5,1\ny,1\nx,1\n\n6,1\n8,-1\n")
    assert read_trace(path, on_error="skip").skipped == 3
    assert "skipped 3 of 5 lines; the first, line 3: time must be a number, got 'y'" in caplog.text
    assert len(caplog.records) == 1


@pytest.mark.parametrize("on_error", ["raise", "skip"])
@pytest.mark.parametrize("kind", ["csv", "marllb", "parquet"])
def test_a_late_line_is_never_dropped_and_can_be_sorted(file: Any, kind: str, on_error: Any) -> None:
    content = {
        "csv": b"time,demand\n5,1\n4,2\n7,3\n4,4\n",
        "marllb": b"time\tquery\n5\t?n=1\n4\t?n=2\n7\t?n=3\n4\t?n=4\n",
        "parquet": parquet([5, 4, 7, 4], [1.0, 2.0, 3.0, 4.0]),
    }[kind]
    keys: dict[str, Any] = {"on_error": on_error, "clock_resolution": 0.0}
    keys |= {"seconds_per_iteration": 1.0} if kind == "marllb" else {}
    with pytest.raises(TraceError, match=r"t.txt:\d: the time is 1 s before that of an earlier line.*sort=true"):
        read_trace(file(content), **keys)
    trace = read_trace(file(content), sort=True, **keys)
    assert (trace.times.tolist(), trace.demands.tolist(), trace.skipped) == ([0, 0, 1, 3], [2, 4, 1, 3], 0)


# The clock


def _mean_fct_of_lsq(trace: Trace) -> float:
    scenario = Scenario(servers=(Server(cores=2),) * 4, workload=Workload(trace=trace), dispatch="lsq")
    simulation = Simulation(scenario, reservoirs=False, record_flows=True)
    simulation.reset([1])
    simulation.step(None, trace.period)
    return float(simulation.take_flows()["fct"].mean())


@pytest.mark.parametrize("form", ["csv", "timestamps", "parquet", "azure-llm", "marllb"])
def test_a_clock_of_whole_seconds_gives_nearly_the_fcts_of_the_true_times(
    file: Any, caplog: pytest.LogCaptureFixture, form: str
) -> None:
    rng = np.random.default_rng(5)
    times, demands = np.sort(rng.uniform(1000, 1600, 30_000)), np.ceil(rng.exponential(80, 30_000))
    seconds = np.floor(times).astype(int).tolist()
    stamps = [f"2023-11-16 {18 + t // 3600}:{t // 60 % 60:02}:{t % 60:02}" for t in seconds]
    work = demands / 1000  # 0.08 core-seconds, 50 per second, on 8 cores: load 0.5
    content: Any = {
        "csv": "time,demand\n" + "".join(f"{t},{d!r}\n" for t, d in zip(seconds, work.tolist(), strict=True)),
        "timestamps": "time,demand\n" + "".join(f"{t},{d!r}\n" for t, d in zip(stamps, work.tolist(), strict=True)),
        "parquet": parquet(np.array(seconds, "datetime64[s]"), work),
        "azure-llm": "Timestamp,Model,Request tokens,Response tokens\n"
        + "".join(f"{t},a,0,{d:.0f}\n" for t, d in zip(seconds, demands, strict=True)),
        "marllb": "time\tquery\n" + "".join(f"{t}\t/?n={d:.0f}\n" for t, d in zip(seconds, demands, strict=True)),
    }[form]
    keys: dict[str, Any] = {}
    if form == "azure-llm":
        keys = {"time_column": "Timestamp", "input_tokens_column": "Request tokens", "decode_rate": 1000.0}
        keys |= {"output_tokens_column": "Response tokens"}
    elif form == "marllb":
        keys = {"seconds_per_iteration": 1e-3}
    trace = read_trace(file(content), **keys)
    np.testing.assert_allclose(trace.demands, work, rtol=1e-12)
    assert "its clock ticks every 1 s, so flows of the same time are spread over a tick; clock_resolution = 0" in (
        caplog.text
    )
    assert trace.origin is not None
    assert trace.origin["clock_resolution"] == 1.0
    true = _mean_fct_of_lsq(Trace(times - times[0], work))
    coarse = _mean_fct_of_lsq(read_trace(file(content), clock_resolution=0, **keys))
    assert coarse > 2 * true
    assert _mean_fct_of_lsq(trace) == pytest.approx(true, rel=0.1)


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ("7 7 8", [0, 0.5, 1.25]),  # at 1/4 and 3/4 of a second, and at 1/2
        ("0.25 0.25 0.5", [0, 0.005, 0.2525]),
        ("1790000000.001 1790000000.001 1790000000.003", [0, 0.0005, 0.00225]),
        ("60 60 120 180 300", [0, 30, 75, 135, 255]),
        ("120 120 360", [0, 0.5, 240.25]),  # too few to say that it ticks once a minute
        ("0.0001 0.0001 1", [0, 0, 0.9999]),
        ("1 2 3", [0, 1, 2]),
        ("0 0 0", [0, 0, 0]),
    ],
)
def test_the_tick_is_the_largest_that_divides_every_time_where_some_are_equal(
    file: Any, times: str, expected: list[float]
) -> None:
    path = file("time,demand\n" + "".join(f"{t},1\n" for t in times.split()))
    np.testing.assert_allclose(read_trace(path).times, expected, atol=1e-12 if "." not in times else 1e-6)


def test_the_resolution_can_be_said(file: Any, caplog: pytest.LogCaptureFixture) -> None:
    path = file("time,demand\n10.2,1\n10.7,1\n12.5,1\n12.5,1\n")
    np.testing.assert_allclose(read_trace(path, clock_resolution=1).times, [0, 0.5, 2, 2.5])
    np.testing.assert_allclose(read_trace(path, clock_resolution=0).times, [0, 0.5, 2.3, 2.3])
    assert not caplog.records
    log = "\n".join(f'1 - - [17/May/2015:10:05:0{s}.250 +0000] "GET /" 200 5' for s in (3, 3, 4))
    np.testing.assert_allclose(read_trace(file(log)).times, [0, 0.005, 1.0025])


@pytest.mark.parametrize(("unit", "zeros"), [("s", ""), ("ms", "000"), ("us", "000000"), ("ns", "000000000")])
def test_epochs_show_their_unit(file: Any, caplog: pytest.LogCaptureFixture, unit: str, zeros: str) -> None:
    half = {"s": ".5", "ms": "500", "us": "500000", "ns": "500000001"}[unit]
    text = f"time,demand\n1790000000{zeros},1\n1790000000{half},1\n"
    integers = None if unit == "s" else pa.array([int(f"1790000000{zeros}"), int(f"1790000000{half}")])
    for content in (text, parquet(integers, [1.0, 1.0]) if integers is not None else text):
        caplog.clear()
        trace = read_trace(file(content))
        assert trace.times[1] == pytest.approx(0.5, abs=2e-9)
        assert (f"times are read as {unit} since 1970" in caplog.text) == (unit != "s")
        np.testing.assert_array_equal(read_trace(file(content), time_unit=unit).times, trace.times)
    if unit != "s":
        factor = float(f"1{zeros}")
        with pytest.raises(ScenarioError, match=f'write time_unit = "{unit}" in place of speedup'):
            read_trace(file(text), speedup=factor)
        assert read_trace(file(text), speedup=factor, time_unit=unit).times[1] == pytest.approx(0.5 / factor)


def test_times_that_do_not_show_their_unit(file: Any) -> None:
    path = file("time,demand\n0,1\n3600000000000,1\n")
    with pytest.raises(TraceError, match='would be thousands of years in seconds; say their unit, time_unit = "s" or'):
        read_trace(path)
    assert read_trace(path, time_unit="ns").times.tolist() == [0, 3600]
    with pytest.raises(TraceError, match=r"t.txt:2: the time is a date, and time_unit is for numbers"):
        read_trace(file("time,demand\n2020-01-01 00:00:00,1\n"), time_unit="ms")


def test_what_was_found_is_written_with_a_scenario(file: Any, tmp_path: Path) -> None:
    file("time,demand\n1790000000000,1\n1790000000000,1\n1790000009000,1\n", "t.csv")
    text = '[[servers]]\n[workload]\ntrace = { path = "t.csv" }\n'
    scenario = from_toml(text, folder=tmp_path)
    written = to_toml(scenario)
    assert 'time_unit = "ms"' in written
    assert "clock_resolution = 1.0" in written
    np.testing.assert_array_equal(from_toml(written).reference.workload.trace.times, [0, 0.5, 9.25])  # type: ignore[union-attr]


def test_demands_from_two_columns_of_any_table(file: Any) -> None:
    keys: dict[str, Any] = {"input_tokens_column": "in", "output_tokens_column": "out", "decode_rate": 10.0}
    for content in (
        "time,in,out\n0,10000,20\n1.5,0,5\n",
        parquet_of(time=[0, 1.5], **{"in": [10000, 0], "out": [20, 5]}),
    ):
        trace = read_trace(file(content), **keys)
        assert (trace.times.tolist(), trace.demands.tolist()) == ([0, 1.5], [3, 0.5])


# Access logs as servers write them


@pytest.mark.parametrize(
    ("line", "size"),
    [
        ('www.example.com:80 ::1 - - [24/Mar/2011:00:01:04 -0500] "OPTIONS * HTTP/1.0" 200 126 "-" "(dummy)"', 126),
        ('1 - - [24/Mar/2011:00:01:08 -0500] "-" 408 - "-" "-"', 0),
        ('1 - - [24/Mar/2011:00:01:10 -0500] "" 400 7 "-" "-"', 7),
        ('1 - - [24/Mar/2011:00:01:11 -0500] 0/799940 "GET /c HTTP/1.1" 200 23026 "-" "x"', 23026),
        ('1 - - [24/Mar/2011:00:01:13 -0500]  "GET /e HTTP/1.1"  200  12', 12),
        ('1 - - [24/Mar/2011:00:01:14.123 -0500] "GET /f HTTP/1.1" 200 13', 13),
        ('1 - - [24/mar/2011:00:01:16 -0500] "GET /g HTTP/1.1" 200 14', 14),
        ('1 - - [24/Mar/2011:00:01:17 -0500] "GET /"bad" HTTP/1.1" 200 15', 15),
        ('1 - - [24/Mar/2011:00:01:18 -0500] "GET /x[1] HTTP/1.1" 200 16', 16),
    ],
)
def test_access_logs_as_servers_write_them(file: Any, line: str, size: int) -> None:
    trace = read_trace(file(line + "\n"), base_demand=0, seconds_per_byte=1)
    assert trace.demands.tolist() == [size]


LOGS = [
    ('1 - - [24/Mar/2011:00:01:19 -0500] "GET /x" 200 7,5', "the bytes sent must be a whole number, or -"),
    ('1 - - [24/Mar/2011:00:01:19 -0500] "GET /x" 20 75', "no status of three digits after the request"),
    ("1 - - [24/Mar/2011:00:01:19 -0500] GET /x 200 75", "no request in quotes after the time"),
    ('1 - - "GET /x" 200 75', "no time such as"),
    (
        '1 - - [24/Mar/2011:00:01:20 -0500] "GET /x" 200 99999999999999999999',
        "a response of 99999999999999999999 bytes",
    ),
    (
        '{"type":"Point","metric":"http_req_duration","data":{"time":"2017-05-09T14:34:45Z","value":1}}',
        "JSON output of k6",
    ),
    ('{"time": 3, "duration": 2}', "this looks like JSON: convert it to CSV"),
    ("metric_name,timestamp,metric_value,check", "CSV output of k6"),
    (
        "haproxy[14389]: 10.0.1.2:33317 [06/Feb/2009:12:14:14.655] http-in static/srv1 10/0/30/69/109 200 2750 - - "
        '---- 1/1/1/1/0 0/0 {1wt.eu} {} "GET /index.html HTTP/1.1"',
        "option httplog clf",
    ),
    ('[2016-04-15T20:17:00.310Z] "POST /api HTTP/2" 204 - 154 0 226 100 "10.0.35.28"', "an Envoy access log"),
    (
        "http 2018-07-02T22:23:00.186641Z app/my-lb/50dc6c495c0c9188 192.168.131.39:2817 10.0.0.1:80 0.000 0.001 0.000 "
        '200 200 34 366 "GET http://x:80/ HTTP/1.1"',
        "an access log of an AWS Application Load Balancer",
    ),
    ("#Fields: date time cs-uri", "a W3C extended log"),
]


@pytest.mark.parametrize(("line", "sentence"), LOGS)
def test_a_log_that_is_refused_says_why_and_what_to_do(file: Any, line: str, sentence: str) -> None:
    path = file(TEXTS["clf"].encode("latin-1") + line.encode() + b"\n")
    with pytest.raises(TraceError) as caught:
        read_trace(path)
    assert "t.txt:5: " in str(caught.value)
    assert sentence in str(caught.value)
    assert "--skip-malformed" in str(caught.value)
    assert read_trace(path, on_error="skip").skipped == 1
    if "looks like" in str(caught.value):
        with pytest.raises(TraceError, match="cannot tell the format") as whole:
            read_trace(file(line + "\n"))
        assert sentence in str(whole.value)


def test_lines_that_end_with_a_lone_cr(file: Any) -> None:
    assert read_trace(file("time,demand\r0,1\r2,3\r")).times.tolist() == [0, 2]


def test_a_long_read_says_how_far_it_is(
    file: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lbgym.scenarios.traces import _lines

    monkeypatch.setattr(_lines, "_MESSAGE_INTERVAL", -1.0)
    with caplog.at_level(logging.INFO, "lbgym"):
        read_trace(file("time,demand\n" + "".join(f"{k},1\n" for k in range(70_000))))
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert "t.txt: 32768 lines, " in messages[0]


def test_text_that_is_not_utf8(file: Any) -> None:
    path = file(b"time,demand,note\n0,1,a\n1,1,caf\xe9\n2,1,b\n")
    with pytest.raises(TraceError, match=r"t.txt:3: not UTF-8 text \(byte 0xe9\)"):
        read_trace(path)
    assert read_trace(path, on_error="skip").times.tolist() == [0, 1, 2]


def test_a_quoted_cell_beyond_the_limit_of_csv_is_a_malformed_line(file: Any) -> None:
    path = file('time,demand\n0,"' + "1" * 200_000 + '"\n')
    with pytest.raises(TraceError, match=r"t.txt:2: field larger than field limit"):
        read_trace(path)


# Files that are no traces


@pytest.mark.parametrize(
    ("content", "options", "sentence"),
    [
        (b"", {}, "t.txt: the trace file is empty"),
        (b" \n\r\n \n", {}, "t.txt: the trace file is empty"),
        (gzip.compress(b"", mtime=0), {}, "t.txt: the trace file is empty"),
        (b"time,demand\n", {}, "t.txt: no flow in the trace"),
        (
            b"time,demand\nx,1\ny,1\n",
            {"on_error": "skip"},
            "t.txt: no flow in the trace; the first of 2 malformed lines is 2: time must be a number, got 'x'",
        ),
        (b"\x1c", {"format": "csv"}, r"t.txt:1: a trace of format 'csv' needs a header line .* got '\\x1c'"),
        (b"hello world\n", {}, "cannot tell the format of the trace from the first line 'hello world'. Give format="),
        (b"start,work\n0,1\n", {}, r"the first line 'start,work'. Give format= \(one of marllb, csv, .*time_column="),
        (bytes(range(256)) * 9, {}, "cannot tell the format of the trace from binary data"),
        (gzip.compress(CSV.encode() * 99, mtime=0)[:-12], {}, "t.txt: the gzip data is cut off"),
        (gzip.compress(CSV.encode(), mtime=0)[:5], {}, "t.txt: the gzip data is cut off"),
        (b"\x1f\x8bnonsense", {}, "t.txt: damaged gzip data"),
        (gzip.compress(CSV.encode(), mtime=0) + b"junk", {}, "t.txt: damaged gzip data"),
        (b"\x28\xb5\x2f\xfd123", {}, "the trace file is compressed with zstd; give plain UTF-8 text, gzip or Parquet"),
        (b"PK\x03\x04123", {}, "the trace file is a zip archive; give"),
        (CSV.encode("utf-16"), {}, "the trace file is UTF-16 text; give"),
        (
            b"a,b\n1,2\n",
            {"format": "csv"},
            "t.txt:1: a trace of format 'csv' needs a header line with the columns 'time', 'demand', g",
        ),
        (
            b"\n1\t2\n",
            {"format": "marllb"},
            "t.txt:2: a trace of format 'marllb' needs a header line with the columns 'time', 'query'",
        ),
        (
            b"x",
            {"format": "azure-llm"},
            "t.txt:1: a trace of format 'azure-llm' needs .*'ContextTokens', 'GeneratedTokens', got 'x'",
        ),
        (b"x", {"format": "clf"}, "t.txt:1: not in the common or combined log format: 'x'"),
        (CSV.encode(), {"format": "parquet"}, "t.txt: not a readable Parquet file: "),
        (b"PAR1" * 9, {}, "t.txt: not a readable Parquet file: "),
        (parquet([0.0], [1.0])[:-9] + b"PAR1", {}, "t.txt: not a readable Parquet file: "),
        (
            parquet([0.0], [1.0], ("time", "cpu")),
            {},
            "t.txt: no column 'demand' in the Parquet trace; it has: time, cpu",
        ),
        (parquet(["0"], [1.0]), {}, "t.txt: column 'time' of the Parquet trace must hold numbers, not string"),
        (parquet([0.0, None], [1.0, 1.0]), {}, r"t.txt:2: time must be a number of at most 1e\+15, got None"),
        (parquet([0.0, 1.0], [-1.0, 1.0]), {}, r"t.txt:1: demand must be a number from 0 to 1e\+15, got -1.0"),
        (parquet([0.0, 1.0], [1.0, np.nan]), {}, r"t.txt:2: demand must be a number from 0 to 1e\+15, got nan"),
        (parquet([1.0, 0.5], [1.0, 1.0]), {}, "t.txt:2: the time is 0.5 s before that of an earlier line"),
    ],
)
def test_files_that_are_no_traces(file: Any, content: bytes, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(TraceError, match=sentence):
        read_trace(file(content), **options)


def test_rows_of_parquet_can_be_skipped(file: Any) -> None:
    data = parquet([0.0, None, 2.0, 1.0, 3.0], [1.0, 1.0, None, 1.0, 4.0])
    trace = read_trace(file(data), on_error="skip")
    assert (trace.times.tolist(), trace.demands.tolist(), trace.skipped) == ([0, 1, 3], [1, 1, 4], 2)


def test_paths_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"no such trace file: .*missing.csv"):
        read_trace(tmp_path / "missing.csv")
    with pytest.raises(TraceError, match=r"cannot read trace file .*: Is a directory"):
        read_trace(tmp_path)
    with pytest.raises(TraceError, match=r"cannot read trace file .*null byte"):
        read_trace("a\0b")
    with pytest.raises(TraceError, match=r"no such path: ~nobody-of-that-name/x.csv"):
        read_trace("~nobody-of-that-name/x.csv")
    with pytest.raises(TraceError, match=r"cannot write trace file .*No such file or directory"):
        write_trace(Trace(np.zeros(1), np.ones(1)), tmp_path / "no" / "t.csv")


def test_a_path_in_the_home_folder(file: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(file(CSV).parent))
    assert len(read_trace("~/t.txt").times) == 3


def test_parquet_without_pyarrow_names_the_extra(file: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = file(parquet([0.0], [1.0])), builtins.__import__

    def without_pyarrow(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_pyarrow)
    with pytest.raises(
        MissingExtraError, match=r"reading a Parquet trace needs 'pyarrow'.*pip install 'lbgym\[eval\]'"
    ):
        read_trace(path)


# Writing


demands = st.just(0.0) | st.floats(1e-9, 1e6)


@given(st.lists(st.tuples(st.floats(0, 1e6), demands), min_size=1, max_size=20), st.sampled_from(("", ".gz")))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@example([(0.0, 1.0), (3.0, 1.0), (3.0, 2.0)], "")
def test_write_and_read_again(tmp_path: Path, flows: list[tuple[float, float]], suffix: str) -> None:
    times = np.sort([time for time, _ in flows])
    trace = Trace(times - times[0], np.array([demand for _, demand in flows]))
    write_trace(trace, tmp_path / f"t.csv{suffix}")
    again = read_trace(tmp_path / f"t.csv{suffix}")
    np.testing.assert_array_equal(again.times, trace.times)
    np.testing.assert_array_equal(again.demands, trace.demands)


def test_the_same_flows_give_the_same_bytes(tmp_path: Path) -> None:
    trace = Trace(np.arange(3.0), np.ones(3))
    for name in ("a.csv.gz", "b.csv.gz"):
        write_trace(trace, tmp_path / name)
    assert (tmp_path / "a.csv.gz").read_bytes() == (tmp_path / "b.csv.gz").read_bytes()


# Junk

formats = st.sampled_from(TRACE_FORMATS)
errors = st.sampled_from(("raise", "skip"))


def _read_or_refuse(path: Path, content: bytes, form: str, on_error: Any) -> None:
    path.write_bytes(content)
    try:
        trace = read_trace(path, form, on_error=on_error)
    except LbgymError as error:
        assert os.path.basename(path) in str(error)
    else:
        assert trace.times[0] == 0
        assert (np.diff(trace.times) >= 0).all()
        assert np.isfinite(trace.rate)


@given(st.binary(max_size=200), formats, errors)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_read_or_refused(tmp_path: Path, content: bytes, form: str, on_error: str) -> None:
    _read_or_refuse(tmp_path / "junk", content, form, on_error)


@given(
    st.sampled_from([*(text.encode("latin-1") for text in TEXTS.values()), parquet([0.0, 1.0], [1.0, 2.0])]),
    st.data(),
    formats,
    errors,
    st.booleans(),
)
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_traces_are_read_or_refused(
    tmp_path: Path, content: bytes, data: st.DataObject, form: str, on_error: str, pack: bool
) -> None:
    packed = gzip.compress(content, mtime=0) if pack else content
    start = data.draw(st.integers(0, len(packed) - 1))
    end = data.draw(st.integers(start, len(packed)))
    patch = data.draw(st.binary(max_size=8) | st.sampled_from([b"\n", b",", b"-1", b"1e400", b'"', b"nan", b"\0"]))
    _read_or_refuse(tmp_path / "junk", packed[:start] + patch + packed[end:], form, on_error)


@given(st.lists(st.lists(st.text(max_size=8) | st.floats().map(repr), max_size=3), max_size=6), errors)
@example([["1e308", "1"], ["-1e308", "1"]], "skip")
@example([["-1e15", "1"], ["1e15", "1e15"]], "raise")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_cells_are_read_or_refused(tmp_path: Path, rows: list[list[str]], on_error: str) -> None:
    text = "time,demand\n" + "\n".join(",".join(row) for row in rows)
    _read_or_refuse(tmp_path / "junk", text.encode("utf-8", "replace"), "csv", on_error)


# Real traces


@pytest.mark.parametrize(
    ("name", "form", "rows", "rate", "mean"),
    [
        ("azure_llm_code.csv.gz", "azure-llm", 8_819, 2.57, None),
        ("azure_llm_conv.csv.gz", "azure-llm", 19_366, 5.53, None),
        ("apache_access.log.gz", "clf", 10_000, 0.0335, None),
        ("marllb_poisson_for_loop_rate_150.csv.gz", "marllb", 78_011, 145.9, 0.2),
        ("marllb_poisson_for_loop_rate_350.csv.gz", "marllb", 77_960, 340.6, 0.2),
        ("marllb_poisson_for_loop_rate_500.csv.gz", "marllb", 77_965, 487.7, 0.2),
    ],
)
def test_real_traces(name: str, form: str, rows: int, rate: float, mean: float | None) -> None:
    path = REAL / name
    if not path.exists():
        pytest.skip(f"{name} is not present")
    trace = read_trace(path)
    assert trace.origin is not None
    assert trace.origin["format"] == form
    assert (len(trace.times), trace.skipped) == (rows, 0)
    assert trace.rate == pytest.approx(rate, rel=1e-3 if form == "marllb" else 5e-3)
    if mean is not None:
        # The published iterations are exponential with a mean of 3.67 million.
        assert trace.mean == pytest.approx(mean, rel=0.01)
        assert trace.demands.std() == pytest.approx(mean, rel=0.02)


def test_tokens_of_the_azure_trace_give_the_demands(file: Any) -> None:
    path = REAL / "azure_llm_conv.csv.gz"
    if not path.exists():
        pytest.skip("the Azure trace is not present")
    with gzip.open(path, "rt") as text:
        tokens = np.array([line.split(",")[1:] for line in text.read().split()[2::2]], dtype=float)
    trace = read_trace(path, prefill_rate=7000, decode_rate=30)
    np.testing.assert_allclose(trace.demands, tokens[:, 0] / 7000 + tokens[:, 1] / 30)
